//! The tiles of the convolution kernels, and which of them a shape gets.
//!
//! The list is `kernels/tiles.cuh`, from which the kernels are instantiated too.

use std::sync::LazyLock;

use super::launch::{ConvLoop, Math};
use super::tables::{self, tiles as lines};

/// One instance of a product kernel: what a block computes and what it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    /// The end of the kernel's name.
    pub name: String,
    /// Rows of the result (pixels; in wgrad output channels).
    pub m: usize,
    /// Columns of the result (channels; in wgrad taps and input channels).
    pub n: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory.
    pub shared: u32,
    /// Speed of its inner loop relative to the largest tile.
    pub speed: f64,
}

/// Summands of a step.
pub const STEP: usize = tables::conv::BK;

/// Tiles for every card, of their lines: m, n, stages, warps along both, blocks for both kinds of sums, speed.
fn tiles(lines: &[[usize; 8]], prefix: &str) -> Vec<Tile> {
    let tile = |&[m, n, stages, warps_m, warps_n, _, _, speed]: &[usize; 8]| Tile {
        name: format!("{prefix}{m}x{n}"),
        m,
        n,
        threads: (32 * warps_m * warps_n) as u32,
        shared: (stages * (m + n) * STEP * 2) as u32,
        speed: speed as f64 / 100.0,
    };
    lines.iter().map(tile).collect()
}

/// Tiles of pixels by channels, for channels in multiples of [`STEP`].
pub static PIXELS: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::PIXELS, ""));
/// The same for channels in multiples of 8.
pub static FLAT: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::FLAT, "flat_"));
/// Tiles of `conv_wgrad_*`.
pub static GRADIENT: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::GRADIENT, ""));

/// Bytes of dynamic shared memory of a Hopper kernel's pipeline (`Pipeline` of `kernels/conv_hopper.cu`): stages with two barriers
/// each, two more barriers, and what rounding up to 1024 loses.
fn hopper_shared(stages: usize, m: usize, n: usize) -> usize {
    1024 + stages * ((m + n) * STEP * 2 + 16) + 16
}

/// Tiles for Hopper, of their lines: m, n, stages, speed.
fn hopper_tiles(lines: &[[usize; 4]], threads: u32, beside: usize) -> Vec<Tile> {
    let tile = |&[m, n, stages, speed]: &[usize; 4]| Tile {
        name: format!("{m}x{n}"),
        m,
        n,
        threads,
        shared: (hopper_shared(stages, m, n) + beside) as u32,
        speed: speed as f64 / 100.0,
    };
    lines.iter().map(tile).collect()
}

/// Tiles of `hopper_fprop_*` and its sisters: three groups of threads, of which two have 64 rows of 72 floats for the way out.
pub static HOPPER: LazyLock<Vec<Tile>> = LazyLock::new(|| hopper_tiles(&lines::HOPPER, 384, 2 * 64 * 72 * 4));
/// Tiles of `hopper_wgrad_*`.
pub static HOPPER_GRADIENT: LazyLock<Vec<Tile>> = LazyLock::new(|| hopper_tiles(&lines::HOPPER_GRADIENT, 288, 0));

/// The tiles of pixels for inputs of so many taps and channels, and the steps of the whole sum.
pub fn of_inputs(inputs: &[(usize, usize)]) -> (&'static [Tile], usize) {
    let tiles = if inputs.iter().all(|(_, c)| c.is_multiple_of(STEP)) { &PIXELS } else { &FLAT };
    (tiles, inputs.iter().map(|(taps, c)| (taps * c).div_ceil(STEP)).sum())
}

/// Whether a product goes by Hopper's loop: if asked for, and whole steps of channels make at least a step of columns.
pub fn by_wgmma(math: Math, channels: &[usize], columns: usize) -> bool {
    math.conv_loop == ConvLoop::Wgmma && channels.iter().all(|c| c.is_multiple_of(STEP)) && columns >= STEP
}

/// What a choice depends on besides the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Multiprocessors.
    pub sms: usize,
    /// Compute capability: 89 is 8.9.
    pub capability: u32,
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
    /// Steps of the whole sum.
    pub steps: usize,
}

/// A tile and the number of parts of the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The instance.
    pub tile: &'static Tile,
    /// Parts of the sum, each its own blocks, of which the last adds them up.
    pub splits: usize,
    /// Steps of each part but the last.
    pub steps_per_split: usize,
}

/// Fewest steps worth a block of their own: filling its pipeline takes two.
const MIN_STEPS: usize = 4;
/// Most parts of a sum.
const MAX_SPLITS: usize = 32;
/// Most tiles whose sums are in parts: so many are enough for any card.
pub const MAX_SPLIT_TILES: usize = 1 << 14;
/// Cost of writing and reading one f32 partial sum, in steps of one value of a tile: 8 bytes through
/// the L2 cache against 64 multiply-adds on the tensor cores.
const PARTIAL_COST: f64 = 3.0;

/// The cheapest tile and split: the steps that the busiest multiprocessor works on, and the sums of the parts.
pub fn choose(tiles: &'static [Tile], product: Product, card: Card) -> Choice {
    let Product { groups, rows, columns, steps } = product;
    let cost = |c: &Choice| {
        let blocks = groups * rows.div_ceil(c.tile.m) * columns.div_ceil(c.tile.n) * c.splits;
        let busiest = blocks.div_ceil(card.sms.max(1)) * c.steps_per_split * c.tile.m * c.tile.n;
        let partial = if c.splits > 1 { PARTIAL_COST * (c.splits * groups * rows * columns) as f64 } else { 0.0 };
        busiest as f64 / c.tile.speed + partial / card.sms.max(1) as f64
    };
    let mut best: Option<(f64, Choice)> = None;
    for tile in tiles {
        let tiles = groups * rows.div_ceil(tile.m) * columns.div_ceil(tile.n);
        let most = if tiles > MAX_SPLIT_TILES { 1 } else { MAX_SPLITS };
        for wanted in 1..=most.min((steps / MIN_STEPS).max(1)) {
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
