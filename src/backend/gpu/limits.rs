//! What a card can do at most, measured: multiply-adds of its tensor cores, and bytes of its memory.

use super::launch::{Launch, Precision};
use super::runtime::{Command, Runtime};
use super::structs::MmaRate;
use super::tables::limits::CHAINS;
use crate::backend::DeviceError;

/// The most that a card reached.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Limits {
    /// Multiply-adds a second of mma.sync.m16n8k16 with f32 sums (`kernels/limits.cu`).
    pub macs_per_s: f64,
    /// Bytes a second of a copy within device memory, read and written ones.
    pub bytes_per_s: f64,
}

const THREADS: u32 = 256;
/// Blocks for each multiprocessor: enough to hide the latency of every instruction.
const BLOCKS: u32 = 4;
const ROUNDS: i32 = 4096;
/// More than any cache holds.
const COPY_BYTES: usize = 512 << 20;

/// Measures both, the best of `repeats`.
pub fn measure(runtime: &dyn Runtime, precision: Precision, repeats: usize) -> Result<Limits, DeviceError> {
    let memory = runtime.allocate(2 * COPY_BYTES, "measuring the memory")?;
    let (from, to) = (memory.ptr(), memory.ptr().offset(COPY_BYTES));
    let blocks = BLOCKS * runtime.card().sms as u32;
    let params = MmaRate { out: from, rounds: ROUNDS, padding: 0 };
    let kernel = precision.pick(["mma_rate_f16", "mma_rate_bf16"]);
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS, 0, &params);
    let best = |command: Command| -> Result<f64, DeviceError> {
        // SAFETY: both halves of the memory above; the kernel writes one float at most.
        let (work, nothing) = unsafe { (runtime.record(vec![command])?, runtime.record(vec![])?) };
        Ok(runtime.time(&*work, &*nothing, repeats)?.into_iter().fold(f64::INFINITY, f64::min))
    };
    let warps = u64::from(blocks * THREADS / 32);
    let macs = warps * ROUNDS as u64 * CHAINS as u64 * 16 * 8 * 16;
    let copy = Command::Copy { from, to, bytes: COPY_BYTES };
    Ok(Limits { macs_per_s: macs as f64 / best(launch.into())?, bytes_per_s: 2.0 * COPY_BYTES as f64 / best(copy)? })
}
