//! Launches of `kernels/weights.cu`: the optimizer step and the effective weights.
//!
//! Stored weights, gradients, moments and averages are f32 arenas of equal offsets, each parameter
//! `[cout][tap][cin]` with cin padded by zeros so that a row is a multiple of 8 values; the effective
//! weights are a 16-bit arena with rows of the same length. Gains and buffers are rows of plain values,
//! whose effective copy is f32.

use super::launch::{DevicePtr, Launch, Precision};
use super::structs::{ReduceStats, StepScalars, TurnTile, WeightPrepare, WeightRow, WeightStep, WeightTurn};
use crate::backend::{Normalization, Step};

/// Most moving averages that a step can update.
pub const MAX_EMAS: usize = 4;

/// Most values of a row.
pub const MAX_ROW: usize = 64 * 512;

/// A convolution's weight that `weight_turn` copies.
#[derive(Clone, Copy, Debug)]
pub struct Turned {
    /// Its first value among the effective ones.
    pub from: usize,
    /// Its first value among the turned ones.
    pub to: usize,
    /// Output channels, padded.
    pub cout: usize,
    /// Input channels, padded.
    pub cin: usize,
    /// Taps.
    pub taps: usize,
}

impl Turned {
    /// What the kernel works on, one a block.
    pub fn tiles(&self) -> impl Iterator<Item = TurnTile> {
        let Self { from, to, cout, cin, taps } = *self;
        let tile = move |tap, co, c| TurnTile {
            from: from as i64,
            to: to as i64,
            cout: cout as i32,
            cin: cin as i32,
            taps: taps as i32,
            tap: tap as i32,
            co: co as i32,
            c: c as i32,
        };
        (0..taps).flat_map(move |tap| {
            (0..cout).step_by(64).flat_map(move |co| (0..cin).step_by(64).map(move |c| tile(tap, co, c)))
        })
    }
}

/// `turned[c][taps - 1 - t][co] = effective[co][t][c]`, for `count` tiles, which lie at `tiles`.
pub fn turn(tiles: DevicePtr, count: usize, effective: DevicePtr, turned: DevicePtr) -> Launch {
    Launch::new("weight_turn", [count as u32, 1, 1], 256, 0, &WeightTurn { tiles, effective, turned })
}

impl StepScalars {
    /// Those of `step`; averages beyond [`MAX_EMAS`] are not there.
    pub fn new(step: &Step) -> Self {
        let power = |beta: f64| 1.0 - beta.powi(step.step.min(i32::MAX as u64) as i32);
        let mut ema_rest = [0.0; MAX_EMAS];
        ema_rest.iter_mut().zip(step.ema_betas).for_each(|(rest, beta)| *rest = (1.0 - beta) as f32);
        Self {
            grad_scale: step.grad_scale as f32,
            rate: (step.lr / power(step.betas.0)) as f32,
            rest1: 1.0 - step.betas.0 as f32,
            beta2: step.betas.1 as f32,
            rest2: 1.0 - step.betas.1 as f32,
            root: (1.0 / power(step.betas.1).sqrt()) as f32,
            eps: step.eps as f32,
            ema_rest,
        }
    }
}

/// Rows in the order in which they lie on the device, and the launches that they need.
#[derive(Clone, Debug)]
pub struct RowTable {
    rows: Vec<WeightRow>,
}

impl RowTable {
    /// Sorts the rows by what they ask of a block.
    pub fn new(mut rows: Vec<WeightRow>) -> Self {
        for row in &rows {
            let length = row.length as usize;
            assert!(length.is_multiple_of(8) && (8..=MAX_ROW).contains(&length), "a row of {length} values");
        }
        rows.sort_by_key(|r| (block(r.length), r.first));
        Self { rows }
    }

    /// To be uploaded; its address is what the launches call `rows`.
    pub fn rows(&self) -> &[WeightRow] {
        &self.rows
    }

    /// (first row, rows, threads, whether a thread has up to 64 values) of each launch.
    fn launches(&self) -> impl Iterator<Item = (usize, usize, u32, bool)> {
        let mut first = 0;
        self.rows.chunk_by(|a, b| block(a.length) == block(b.length)).map(move |rows| {
            let at = first;
            first += rows.len();
            let (long, threads) = block(rows[0].length);
            (at, rows.len(), threads, long)
        })
    }
}

/// Threads for a row of this length, of 32 values each or (true) 64.
fn block(length: i32) -> (bool, u32) {
    let length = length as u32;
    let long = length > 32 * 512;
    (long, length.div_ceil(if long { 64 } else { 32 }).next_multiple_of(32))
}

/// Where the effective weights go.
#[derive(Clone, Copy, Debug)]
pub struct Effective {
    /// 16-bit effective weights.
    pub weights: DevicePtr,
    /// f32 gains and buffers.
    pub plain: DevicePtr,
}

/// One step over all rows of `table`; effective weights are then those of the next one. `memory` has the addresses: of the
/// rows, one [`StepScalars`], the arenas, and 8 bytes of scratch for each row in `stats`; and the counts, `rounds` as in
/// [`Normalization::Train`]. `totals` receives one [`StepTotals`](super::structs::StepTotals).
pub fn step(p: Precision, table: &RowTable, memory: WeightStep, totals: DevicePtr) -> Vec<Launch> {
    let launch = |(first, rows, threads, long): (usize, usize, u32, bool)| {
        let kernel = p.pick(if long {
            ["weight_step_16_f16", "weight_step_16_bf16"]
        } else {
            ["weight_step_8_f16", "weight_step_8_bf16"]
        });
        let params = WeightStep {
            rows: memory.rows.offset(first * size_of::<WeightRow>()),
            stats: memory.stats.offset(first * 8),
            ..memory
        };
        Launch::new(kernel, [rows as u32, 1, 1], threads, 0, &params)
    };
    let params = ReduceStats { rows: memory.stats, totals, count: table.rows.len() as i32, padding: 0 };
    let reduce = Launch::new("weight_stats", [1, 1, 1], 1024, 0, &params);
    table.launches().map(launch).chain([reduce]).collect()
}

/// Effective weights from `source`, an arena of stored weights or of an average. `rows` is the address of
/// `table`'s rows.
pub fn prepare(
    p: Precision,
    table: &RowTable,
    rows: DevicePtr,
    source: DevicePtr,
    how: Normalization,
    to: Effective,
) -> Vec<Launch> {
    let rounds = match how {
        Normalization::Eval => 1,
        Normalization::Train { rounds } => rounds as i32 + 1,
    };
    let launch = |(first, count, threads, long): (usize, usize, u32, bool)| {
        let kernel = p.pick(if long {
            ["weight_prepare_16_f16", "weight_prepare_16_bf16"]
        } else {
            ["weight_prepare_8_f16", "weight_prepare_8_bf16"]
        });
        let rows = rows.offset(first * size_of::<WeightRow>());
        let params = WeightPrepare { rows, source, effective: to.weights, plain: to.plain, rounds, padding: 0 };
        Launch::new(kernel, [count as u32, 1, 1], threads, 0, &params)
    };
    table.launches().map(launch).collect()
}
