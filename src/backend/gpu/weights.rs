//! Launches of `kernels/weights.cu`: the optimizer step and the effective weights.
//!
//! Stored weights, gradients, moments and averages are f32 arenas of equal offsets, each parameter
//! `[cout][tap][cin]` with cin padded by zeros so that a row is a multiple of 8 values; the effective
//! weights are a 16-bit arena with rows of the same length. Gains and buffers are rows of exact values,
//! whose effective copy is f32.

use super::launch::{DevicePtr, Launch, Precision, int};
use super::structs::{ReduceStats, StepScalars, TurnTile, WeightEffective, WeightRow, WeightStep, WeightTurn};
use super::tables::weights::ROWS;
use crate::backend::{Normalization, OptimizerStep};

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
            from: int(from),
            to: int(to),
            cout: int(cout),
            cin: int(cin),
            taps: int(taps),
            tap: int(tap),
            co: int(co),
            c: int(c),
        };
        (0..taps).flat_map(move |tap| {
            (0..cout).step_by(64).flat_map(move |co| (0..cin).step_by(64).map(move |c| tile(tap, co, c)))
        })
    }
}

/// `turned[c][taps - 1 - t][co] = effective[co][t][c]`, for `count` tiles.
pub fn turn(count: usize, memory: WeightTurn) -> Launch {
    Launch::new("weight_turn", [count, 1, 1], 256, 0, &memory)
}

impl StepScalars {
    /// The scalars of `step`. A network has at most [`MAX_EMAS`] averages.
    pub fn new(step: &OptimizerStep) -> Self {
        let (rate, root) = step.corrected();
        let mut ema_rest = [0.0; MAX_EMAS];
        ema_rest.iter_mut().zip(step.ema_betas).for_each(|(rest, beta)| *rest = (1.0 - beta) as f32);
        Self {
            grad_scale: step.grad_scale as f32,
            rate: rate as f32,
            rest1: 1.0 - step.betas.0 as f32,
            beta2: step.betas.1 as f32,
            rest2: 1.0 - step.betas.1 as f32,
            root: root as f32,
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

    /// First row, rows, threads, vectors of a thread: of each launch.
    fn launches(&self) -> impl Iterator<Item = [usize; 4]> {
        let mut first = 0;
        self.rows.chunk_by(|a, b| block(a.length) == block(b.length)).map(move |rows| {
            let at = first;
            first += rows.len();
            let (vectors, threads) = block(rows[0].length);
            [at, rows.len(), threads, vectors]
        })
    }
}

/// Vectors of a thread, and threads, for a row of this length.
fn block(length: i32) -> (usize, usize) {
    let length = length as usize;
    let [vectors, _] = ROWS.into_iter().find(|&line| length <= capacity(line)).expect("`RowTable::new` checks lengths");
    (vectors, length.div_ceil(4 * vectors).next_multiple_of(32))
}

/// One optimizer step over all rows of `table`; it also makes the effective weights of the next step. `scalars` is one
/// [`StepScalars`], `stats` 8 bytes of scratch for each row. `memory` also has the counts, with `rounds` as in
/// [`Normalization::Train`]. `totals` receives one [`StepTotals`](super::structs::StepTotals).
pub fn step(p: Precision, table: &RowTable, memory: WeightStep, totals: DevicePtr) -> Vec<Launch> {
    let launch = |[first, rows, threads, vectors]: [usize; 4]| {
        let kernel = format!("weight_step_{vectors}_{}", p.name());
        let params = WeightStep {
            rows: memory.rows.offset(first * size_of::<WeightRow>()),
            stats: memory.stats.offset(first * 8),
            ..memory
        };
        Launch::new(kernel, [rows, 1, 1], threads, 0, &params)
    };
    let params = ReduceStats { rows: memory.stats, totals, count: int(table.rows.len()), padding: 0 };
    let reduce = Launch::new("weight_stats", [1, 1, 1], 1024, 0, &params);
    table.launches().map(launch).chain([reduce]).collect()
}

/// Effective weights from `source`, an arena of stored weights or of an average.
pub fn make_effective(p: Precision, table: &RowTable, how: Normalization, memory: WeightEffective) -> Vec<Launch> {
    let rounds = int(how.rounds());
    let launch = |[first, count, threads, vectors]: [usize; 4]| {
        let kernel = format!("weight_effective_{vectors}_{}", p.name());
        let rows = memory.rows.offset(first * size_of::<WeightRow>());
        Launch::new(kernel, [count, 1, 1], threads, 0, &WeightEffective { rows, rounds, ..memory })
    };
    table.launches().map(launch).collect()
}
