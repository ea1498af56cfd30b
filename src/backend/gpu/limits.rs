//! What a card can do at most, measured: multiply-adds of its tensor cores, and bytes of its memory.

use super::launch::{ConvLoop, Launch, Math, int};
use super::runtime::Runtime;
use super::structs::{CopyRate, Rate};
use super::tables::limits::{CHAINS, COPIES};
use crate::backend::DeviceError;

/// The most that a card reached.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Peaks {
    /// Multiply-adds a second with sums of the type that convolutions have: of mma.sync.m16n8k16 (`kernels/limits.cu`), or where
    /// they are computed by wgmma, of wgmma.m64n256k16 (`kernels/limits_hopper.cu`).
    pub macs_per_s: f64,
    /// Bytes a second of a copy within device memory, read and written ones.
    pub bytes_per_s: f64,
}

const THREADS: usize = 256;
/// Blocks of mma.sync for each multiprocessor: enough to hide the latency of every instruction.
const BLOCKS: usize = 4;
const MMA_ROUNDS: usize = 4096;
const WGMMA_ROUNDS: usize = 1024;
/// Shared memory of a block of wgmma: operands of 128 and 256 rows of 128 bytes, aligned to 1024.
const WGMMA_SHARED: usize = 1024 + (128 + 256) * 128;
/// More than any cache holds.
const COPY_BYTES: usize = 512 << 20;

/// Measures both, the best of `repeats`.
pub fn measure(runtime: &dyn Runtime, math: Math, repeats: usize) -> Result<Peaks, DeviceError> {
    let memory = runtime.allocate(2 * COPY_BYTES, "measuring the memory")?;
    let (from, to) = (memory.ptr(), memory.ptr().offset(COPY_BYTES));
    let card = runtime.card();
    let best = |launch: Launch| -> Result<f64, DeviceError> {
        // SAFETY: both halves of the memory above; a kernel of products writes one float at most.
        let (work, nothing) = unsafe { (runtime.record(vec![launch.into()], false)?, runtime.record(vec![], false)?) };
        Ok(runtime.time(&*work, &*nothing, repeats)?.into_iter().fold(f64::INFINITY, f64::min))
    };
    let (products, macs) = match math.conv_loop(card) {
        ConvLoop::Mma => {
            let blocks = BLOCKS * card.sms;
            let params = Rate { out: from, rounds: int(MMA_ROUNDS), padding: 0 };
            let kernel = format!("mma_rate_{}", math.name(card));
            let macs = blocks * THREADS / 32 * MMA_ROUNDS * CHAINS * 16 * 8 * 16;
            (Launch::new(kernel, [blocks, 1, 1], THREADS, 0, &params), macs)
        }
        ConvLoop::Wgmma => {
            let params = Rate { out: from, rounds: int(WGMMA_ROUNDS), padding: 0 };
            let kernel = format!("wgmma_rate_{}", math.precision.name());
            let macs = card.sms * WGMMA_ROUNDS * 128 * 256 * 64;
            (Launch::new(kernel, [card.sms, 1, 1], THREADS, WGMMA_SHARED, &params), macs)
        }
    };
    let blocks = COPY_BYTES / (THREADS * COPIES * 16);
    let copy = Launch::new("copy_rate", [blocks, 1, 1], THREADS, 0, &CopyRate { from, to });
    Ok(Peaks { macs_per_s: macs as f64 / best(products)?, bytes_per_s: 2.0 * COPY_BYTES as f64 / best(copy)? })
}
