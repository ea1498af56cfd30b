//! Launches of `kernels/weights.cu`: the optimizer step and the effective weights.
//!
//! Stored weights, gradients, moments and averages are f32 arenas of equal offsets, each parameter
//! `[cout][tap][cin]` with cin padded by zeros so that a row is a multiple of 8 values; the effective
//! weights are a 16-bit arena with rows of the same length. Gains and buffers are rows of exact values,
//! whose effective copy is f32.

use super::launch::{DevicePtr, Launch, Precision};
use super::structs::{ReduceStats, StepScalars, TurnTile, WeightEffective, WeightRow, WeightStep, WeightTurn};
use super::tables::weights::ROWS;
use crate::backend::{Normalization, Step};

pub use super::tables::weights::MAX_EMAS;

/// The most values that a row may have.
pub const MAX_ROW: usize = capacity(ROWS[ROWS.len() - 1]);

/// Values of the longest row that an instance takes.
const fn capacity([vectors, threads]: [usize; 2]) -> usize {
    4 * vectors * threads
}

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
    /// The tiles of the weight: each block of the kernel copies one.
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
    /// The scalars of `step`. A network has at most [`MAX_EMAS`] averages.
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
    /// Sorts the rows by the size of the block that they need.
    pub fn new(mut rows: Vec<WeightRow>) -> Self {
        for row in &rows {
            let length = row.length as usize;
            assert!(length.is_multiple_of(8) && (8..=MAX_ROW).contains(&length), "a row of {length} values");
        }
        rows.sort_by_key(|r| block(r.length));
        Self { rows }
    }

    /// To be uploaded; its address is what the launches call `rows`.
    pub fn rows(&self) -> &[WeightRow] {
        &self.rows
    }

    /// (first row, rows, threads, vectors of a thread) of each launch.
    fn launches(&self) -> impl Iterator<Item = (usize, usize, u32, usize)> {
        let mut first = 0;
        self.rows.chunk_by(|a, b| block(a.length) == block(b.length)).map(move |rows| {
            let at = first;
            first += rows.len();
            let (vectors, threads) = block(rows[0].length);
            (at, rows.len(), threads, vectors)
        })
    }
}

/// Vectors of a thread, and threads, for a row of this length.
fn block(length: i32) -> (usize, u32) {
    let length = length as usize;
    let [vectors, _] = ROWS.into_iter().find(|&line| length <= capacity(line)).expect("`RowTable::new` checks lengths");
    (vectors, length.div_ceil(4 * vectors).next_multiple_of(32) as u32)
}

/// Where the effective weights go.
#[derive(Clone, Copy, Debug)]
pub struct Effective {
    /// 16-bit effective weights.
    pub weights: DevicePtr,
    /// f32 gains and buffers.
    pub exact: DevicePtr,
}

/// One optimizer step over all rows of `table`; it also makes the effective weights of the next step. `memory` has the
/// addresses of the rows, of one [`StepScalars`], of the arenas, and in `stats` of 8 bytes of scratch for each row; it
/// also has the counts, with `rounds` as in [`Normalization::Train`]. `totals` receives one
/// [`StepTotals`](super::structs::StepTotals).
pub fn step(p: Precision, table: &RowTable, memory: WeightStep, totals: DevicePtr) -> Vec<Launch> {
    let launch = |(first, rows, threads, vectors): (usize, usize, u32, usize)| {
        let kernel = format!("weight_step_{vectors}_{}", p.name());
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
pub fn make_effective(
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
    let launch = |(first, count, threads, vectors): (usize, usize, u32, usize)| {
        let kernel = format!("weight_effective_{vectors}_{}", p.name());
        let rows = rows.offset(first * size_of::<WeightRow>());
        let params = WeightEffective { rows, source, effective: to.weights, exact: to.exact, rounds, padding: 0 };
        Launch::new(kernel, [count as u32, 1, 1], threads, 0, &params)
    };
    table.launches().map(launch).collect()
}
