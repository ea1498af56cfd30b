//! The tiles of the convolution kernels as data, and which of them a shape gets.
//!
//! Every line is one instance in `kernels/conv_*.cu`, in f16 and in bf16; `scripts/ptxas-report`
//! checks the last two columns against the compiler's report.

/// One instance of a product kernel: what a block computes and what it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tile {
    /// The end of the kernel's name.
    pub name: &'static str,
    /// Rows of the result (pixels; in wgrad output channels).
    pub m: usize,
    /// Columns of the result (channels; in wgrad taps and input channels).
    pub n: usize,
    /// Summands a step.
    pub k: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory: stages * (m + n) * k * 2.
    pub shared: u32,
    /// Blocks that a multiprocessor with 100 KB holds; the kernel's launch bounds promise it.
    pub blocks_per_sm: u32,
    /// Speed of its inner loop relative to the largest tile: it reads more shared memory for an
    /// operation. Affects only which tile is chosen.
    pub speed: f64,
}

const LARGE: Tile =
    Tile { name: "128x128x32_s3", m: 128, n: 128, k: 32, threads: 256, shared: 49152, blocks_per_sm: 2, speed: 1.0 };
const SMALL: Tile =
    Tile { name: "64x64x32_s4", m: 64, n: 64, k: 32, threads: 128, shared: 32768, blocks_per_sm: 3, speed: 0.7 };
/// For the output convolution: 4 channels, padded to 8.
const NARROW: Tile =
    Tile { name: "128x16x32_s4", m: 128, n: 16, k: 32, threads: 128, shared: 36864, blocks_per_sm: 2, speed: 0.35 };

/// Tiles of `conv_fprop_*`.
pub const FPROP: &[Tile] = &[LARGE, SMALL, NARROW];
/// Tiles of `conv_dgrad_*`.
pub const DGRAD: &[Tile] = &[LARGE, SMALL];
/// Tiles of `conv_wgrad_*`.
pub const WGRAD: &[Tile] = &[LARGE, SMALL];

/// What a choice depends on besides the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Multiprocessors.
    pub sms: usize,
}

/// A product of `m x n` values, in tiles that do not cross groups of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Number of groups of rows.
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// A tile and the number of parts of the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The instance.
    pub tile: &'static Tile,
    /// Parts of the sum, each its own blocks; more than one need a second pass.
    pub splits: usize,
    /// Steps of each part but the last.
    pub steps_per_split: usize,
}

/// Fewest steps worth a block of their own: filling its pipeline takes two or three.
const MIN_STEPS: usize = 8;
/// Most parts of a sum.
const MAX_SPLITS: usize = 32;
/// Cost of writing and reading one f32 partial sum, in steps of one value of a tile: 8 bytes through
/// the L2 cache against 32 multiply-adds on the tensor cores.
const PARTIAL_COST: f64 = 6.0;

/// The cheapest tile and split: the steps that the busiest multiprocessor works on, and the second
/// pass. `steps(tile)` is the length of the whole sum.
pub fn choose(tiles: &'static [Tile], product: Product, card: Card, steps: impl Fn(&Tile) -> usize) -> Choice {
    let Product { groups, rows, columns } = product;
    let cost = |c: &Choice| {
        let blocks = groups * rows.div_ceil(c.tile.m) * columns.div_ceil(c.tile.n) * c.splits;
        let busiest = blocks.div_ceil(card.sms.max(1)) * c.steps_per_split * c.tile.m * c.tile.n;
        let partial = if c.splits > 1 { PARTIAL_COST * (c.splits * groups * rows * columns) as f64 } else { 0.0 };
        busiest as f64 / c.tile.speed + partial / card.sms.max(1) as f64
    };
    let mut best: Option<(f64, Choice)> = None;
    for tile in tiles {
        let steps = steps(tile);
        for wanted in 1..=MAX_SPLITS.min((steps / MIN_STEPS).max(1)) {
            let steps_per_split = steps.div_ceil(wanted);
            let choice = Choice { tile, splits: steps.div_ceil(steps_per_split), steps_per_split };
            let cost = cost(&choice);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, choice));
            }
        }
    }
    best.map(|(_, choice)| choice).expect("the tables are not empty")
}
