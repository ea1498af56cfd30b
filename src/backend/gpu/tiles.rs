//! The tiles of the convolution kernels, and which of them a shape gets: the one that was measured to be the fastest on
//! the card ([`Tuned`]), or, where nobody has measured, the one that a model of the costs takes for the fastest.
//!
//! The list is `kernels/tiles.cuh`, from which the kernels are instantiated too.

use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::LazyLock;

pub use super::launch::Card;
use super::launch::{ConvLoop, Math};
use super::tables::conv_hopper::{GROUP, GROUP_WARPS, MAX_CLUSTER, OUT_COLUMNS};
use super::tables::{self, tiles as lines};

/// One instance of a product kernel: what a block computes and what it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    /// Rows of the result (pixels; in wgrad output channels).
    pub m: usize,
    /// Columns of the result (channels; in wgrad taps and input channels).
    pub n: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Dynamic shared memory.
    pub shared: usize,
    /// Speed of its inner loop relative to the largest tile.
    pub speed: f64,
    /// Blocks for which a multiprocessor has the registers, with sums in f32 and with sums in two levels.
    pub blocks: [usize; 2],
    /// Of Hopper's tiles of pixels: whether both warp groups work on it, or take tiles in turn.
    pub together: bool,
}

impl fmt::Display for Tile {
    /// The end of the kernel's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.m, self.n)
    }
}

/// Summands of a step.
pub const STEP: usize = tables::conv::BK;

/// Tiles for every card, of their lines: m, n, stages, warps along both, blocks for both kinds of sums, speed.
fn tiles(lines: &[[usize; 8]]) -> Vec<Tile> {
    let tile = |&[m, n, stages, warps_m, warps_n, blocks, blocks_f16x2, speed]: &[usize; 8]| Tile {
        m,
        n,
        threads: 32 * warps_m * warps_n,
        shared: stages * (m + n) * STEP * 2,
        speed: speed as f64 / 100.0,
        blocks: [blocks, blocks_f16x2],
        together: false,
    };
    lines.iter().map(tile).collect()
}

/// Tiles of pixels by channels, for channels in multiples of [`STEP`].
static PIXELS: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::PIXELS));
/// The same for channels in multiples of 8.
static FLAT: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::FLAT));
/// Tiles of `conv_wgrad_*`.
static GRADIENT: LazyLock<Vec<Tile>> = LazyLock::new(|| tiles(&lines::GRADIENT));

/// Bytes of dynamic shared memory of a Hopper kernel's pipeline (`Pipeline` of `kernels/conv_hopper.cu`): stages with
/// two barriers each, two more barriers, and what rounding up to 1024 loses.
fn hopper_shared(stages: usize, m: usize, n: usize) -> usize {
    1024 + stages * ((m + n) * STEP * 2 + 16) + 16
}

/// Tiles of `hopper_fprop_*` and its sisters, of their lines: three warp groups, of which two have 64 rows of 72 floats
/// for the epilogue, and four rows of sums.
static HOPPER: LazyLock<Vec<Tile>> = LazyLock::new(|| {
    let tile = |&[m, n, stages, together, speed]: &[usize; 5]| Tile {
        m,
        n,
        threads: 3 * GROUP,
        shared: hopper_shared(stages, m, n) + 2 * (64 * (OUT_COLUMNS + 8) + GROUP_WARPS * n) * size_of::<f32>(),
        speed: speed as f64 / 100.0,
        blocks: [1; 2],
        together: together == 1,
    };
    lines::HOPPER.iter().map(tile).collect()
});
/// Tiles of `hopper_wgrad_*`.
static HOPPER_GRADIENT: LazyLock<Vec<Tile>> = LazyLock::new(|| {
    let tile = |&[m, n, stages, blocks, speed]: &[usize; 5]| Tile {
        m,
        n,
        threads: 2 * GROUP + 32,
        shared: hopper_shared(stages, m, n),
        speed: speed as f64 / 100.0,
        blocks: [blocks; 2],
        together: false,
    };
    lines::HOPPER_GRADIENT.iter().map(tile).collect()
});

/// Which product a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // what the kernels' files are called
pub enum Kind {
    Fprop,
    Dgrad,
    Wgrad,
    Codec,
}

/// Kernels that differ in nothing but their tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernels {
    /// What they compute.
    pub kind: Kind,
    /// By Hopper's loop.
    pub hopper: bool,
    /// For channels that are not multiples of [`STEP`].
    pub flat: bool,
    /// Their number types, as in their names.
    math: &'static str,
}

impl Kernels {
    /// Those that multiply tensors of so many `channels` for a result of so many `columns` (of wgrad: of output
    /// channels). Hopper's loop takes a product if it is asked for, and whole steps of channels make at least a step of
    /// columns.
    pub fn new(kind: Kind, math: Math, card: Card, channels: &[usize], columns: usize) -> Self {
        let whole = channels.iter().all(|c| c.is_multiple_of(STEP));
        let hopper = math.conv_loop(card) == ConvLoop::Wgmma && whole && columns >= STEP;
        let alike = hopper || kind == Kind::Codec;
        let math = if alike { math.precision.name() } else { math.name(card) };
        Self { kind, hopper, flat: !whole && kind != Kind::Wgrad, math }
    }

    /// All that there are.
    fn all() -> impl Iterator<Item = Self> {
        let kinds = [Kind::Fprop, Kind::Dgrad, Kind::Wgrad, Kind::Codec];
        let of = |kind| ["f16", "bf16", "f16x2"].map(move |math| (kind, math));
        let loops = [(false, false), (false, true), (true, false)];
        let all = kinds
            .into_iter()
            .flat_map(of)
            .flat_map(move |(kind, math)| loops.map(|(hopper, flat)| Self { kind, hopper, flat, math }));
        all.filter(|k| !(k.flat && k.kind == Kind::Wgrad))
            .filter(|k| !(k.math == "f16x2" && (k.hopper || k.kind == Kind::Codec)))
    }

    /// Whether a cluster of blocks adds up the parts of a sum.
    pub fn in_clusters(self) -> bool {
        self.hopper && self.kind != Kind::Wgrad
    }

    /// Blocks with this tile that a multiprocessor holds at a time. Each takes 1 KB of shared memory more than it asks for.
    fn blocks(self, tile: &Tile, card: Card) -> usize {
        let registers = tile.blocks[usize::from(self.math == "f16x2")];
        registers.min(card.shared / (tile.shared + 1024)).max(1)
    }

    /// Their tiles.
    pub fn tiles(self) -> &'static [Tile] {
        match (self.hopper, self.kind, self.flat) {
            (true, Kind::Wgrad, _) => &HOPPER_GRADIENT,
            (true, ..) => &HOPPER,
            (_, Kind::Wgrad, _) => &GRADIENT,
            (.., true) => &FLAT,
            (.., false) => &PIXELS,
        }
    }

    /// The name of the instance with this tile.
    pub fn instance(self, tile: &Tile) -> String {
        format!("{self}_{tile}")
    }
}

impl fmt::Display for Kernels {
    /// The beginning of their names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Fprop => "fprop",
            Kind::Dgrad => "dgrad",
            Kind::Wgrad => "wgrad",
            Kind::Codec => "codec",
        };
        match self.hopper {
            true => write!(f, "hopper_{kind}_{}", self.math),
            false if self.kind == Kind::Codec => write!(f, "codec_conv_{}", self.math),
            false => write!(f, "conv_{kind}_{}", self.math),
        }?;
        f.write_str(if self.flat { "_flat" } else { "" })
    }
}

impl FromStr for Kernels {
    type Err = Unfit;

    fn from_str(name: &str) -> Result<Self, Unfit> {
        Self::all().find(|kernels| kernels.to_string() == name).ok_or_else(|| Unfit(format!("no kernels {name}")))
    }
}

/// The steps of the whole sum for inputs of so many taps and channels.
pub fn steps_of(inputs: &[(usize, usize)]) -> usize {
    inputs.iter().map(|(taps, c)| (taps * c).div_ceil(STEP)).sum()
}

/// A product of `m x n` values, in tiles that do not cross groups of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

impl Product {
    /// How many tiles it has.
    fn tiles(&self, tile: &Tile) -> usize {
        self.groups.saturating_mul(self.rows.div_ceil(tile.m)).saturating_mul(self.columns.div_ceil(tile.n))
    }
}

/// What a tile is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The kernels that compute it.
    pub kernels: Kernels,
    /// Taps of the convolution: neighbours are read again and again, from a cache.
    pub taps: usize,
    /// Its size.
    pub product: Product,
}

/// A tile and the number of parts of the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The instance.
    pub tile: &'static Tile,
    /// Parts of the sum, each its own blocks. The last of them adds them up, or their cluster does, or a second kernel.
    pub splits: usize,
    /// Steps of each part but the last.
    pub steps_per_split: usize,
}

/// Fewest steps worth a block of their own: filling its pipeline takes two.
const MIN_STEPS: usize = 4;
/// Most parts of a sum.
const MAX_SPLITS: usize = 32;
/// Most tiles whose sums are in parts: as many counters as there are, and enough for any card.
pub const MAX_SPLIT_TILES: usize = 1 << 14;

// The numbers of the models below. Those of Hopper's loop follow what an H200 took (docs/performance.md). The others
// are estimates that no card has confirmed, like the speeds of the tiles.

/// Speed of a block that is alone on a multiprocessor which could hold more, as a share of the full one.
const ALONE: f64 = 0.65;
/// Cost of writing and reading a part of one value's sum, in steps of one value, divided by the multiprocessors: where the
/// kernel itself adds the parts, and where a second one does.
const PARTIAL_STEPS: f64 = 3.0;
const REDUCED_STEPS: f64 = 20.0;
/// Cycles of a step of one value on Hopper's tensor cores.
const HOPPER_STEP: f64 = 1.0 / 32.0;
/// Cycles in which a warp takes four rows of 64 values out of its sums and does with them what follows.
const HOPPER_ROWS: f64 = 600.0;
/// Cycles in which the blocks of a cluster add up their sums: once, for each block, and for each value of a tile. The last is
/// a projection: 20 bytes a cycle come from other multiprocessors. (Measured was 0.1 for each value of each block, when few
/// blocks of a cluster read for all, and all the same one's at a time.)
const HOPPER_ADD: [f64; 3] = [3500.0, 300.0, 0.2];
/// Clusters of 1, 2, ... blocks, each alone on its multiprocessor, that run at a time, for each multiprocessor. A cluster does
/// not cross the card's groups of them (GPCs), which are of unequal sizes.
const HOPPER_CLUSTERS: [f64; MAX_CLUSTER] = [1.0, 0.5, 0.3, 0.2, 0.16, 0.13, 0.11, 0.1];

/// Blocks for each multiprocessor from which on more parts of a sum are not tried: the most that one of any card holds at a
/// time (four, tiles.cuh), twice.
const ENOUGH_BLOCKS: usize = 8;
/// Parts of a sum that are tried.
const TRIED_SPLITS: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, MAX_SPLITS];

impl Question {
    /// A tile with the sum in about `wanted` parts; none if its sum cannot be cut so.
    fn choice(&self, tile: &'static Tile, wanted: usize) -> Option<Choice> {
        let steps = self.product.steps;
        // Images of codecs are large, and their kernels know no parts.
        let whole = self.kernels.kind == Kind::Codec || self.product.tiles(tile) > MAX_SPLIT_TILES;
        let most = if self.kernels.in_clusters() { MAX_CLUSTER } else { MAX_SPLITS };
        let most = if whole { 1 } else { most.min((steps / MIN_STEPS).max(1)) };
        let steps_per_split = steps.div_ceil(wanted.max(1)).max(1);
        let choice = || Choice { tile, splits: steps.div_ceil(steps_per_split), steps_per_split };
        (1..=most).contains(&wanted).then(choice)
    }

    /// All tiles and splits.
    fn choices(&self) -> impl Iterator<Item = Choice> {
        let tiles = self.kernels.tiles().iter();
        tiles.flat_map(move |tile| (1..=MAX_SPLITS).map_while(move |wanted| self.choice(tile, wanted)))
    }

    /// The cheapest tile and split by a model.
    pub fn cheapest(&self, card: Card) -> Choice {
        let cost = |c: &Choice| if self.kernels.in_clusters() { self.hopper_cost(c, card) } else { self.cost(c, card) };
        self.choices().min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("the tables are not empty")
    }

    /// Steps of one value that the busiest multiprocessor works on, and those that the parts of a sum cost.
    fn cost(&self, c: &Choice, card: Card) -> f64 {
        let (sms, values) = (card.sms.max(1), (c.tile.m * c.tile.n) as f64);
        let Product { groups, rows, columns, .. } = self.product;
        let blocks = self.product.tiles(c.tile) * c.splits;
        let (busiest, part) = if self.kernels.kind == Kind::Wgrad {
            // The last wave may leave multiprocessors with fewer blocks than they hold.
            let held = self.kernels.blocks(c.tile, card);
            let (full, rest) = (blocks / (sms * held), blocks % (sms * held));
            let last = if rest > 0 { (rest.div_ceil(sms) as f64).max(ALONE * held as f64) } else { 0.0 };
            ((full * held) as f64 + last, REDUCED_STEPS)
        } else {
            (blocks.div_ceil(sms) as f64, PARTIAL_STEPS)
        };
        let parts = if c.splits > 1 { part * (c.splits * groups * rows * columns) as f64 / sms as f64 } else { 0.0 };
        busiest * c.steps_per_split as f64 * values / c.tile.speed + parts
    }

    /// Cycles, of kernels of pixels by Hopper's loop.
    fn hopper_cost(&self, c: &Choice, card: Card) -> f64 {
        let values = (c.tile.m * c.tile.n) as f64;
        let at_a_time = (card.sms.max(1) as f64 * HOPPER_CLUSTERS[c.splits - 1]).floor().max(1.0);
        let waves = (self.product.tiles(c.tile) as f64 / at_a_time).ceil();
        let product = c.steps_per_split as f64 * values * HOPPER_STEP / c.tile.speed;
        // By the four warps of a group, or the eight of both.
        let out = values / (4.0 * 64.0) / 4.0 * HOPPER_ROWS;
        match (c.splits, c.tile.together) {
            (1, true) => waves * (product + out / 2.0),
            // While one group takes its sums out, the other multiplies.
            (1, false) => product.max((product + out) / 2.0) * (waves - 1.0) + product + out,
            (splits, _) => {
                let [once, block, value] = HOPPER_ADD;
                let add = once + splits as f64 * block + value * values;
                waves * (product + add + out / (2 * splits) as f64)
            }
        }
    }

    /// What is worth timing on a card: the model's choice first, then every other tile, with the whole sum and with as
    /// many parts as leave some multiprocessor with little to do.
    pub fn candidates(&self, card: Card) -> Vec<Choice> {
        let mut candidates = vec![self.cheapest(card)];
        for tile in self.kernels.tiles() {
            let tiles = self.product.tiles(tile);
            // And what fills all multiprocessors once.
            let full = (card.sms * self.kernels.blocks(tile, card) / tiles.max(1)).max(1);
            let mut blocks = 0;
            for wanted in TRIED_SPLITS.into_iter().chain([full]) {
                let Some(choice) = self.choice(tile, wanted) else { continue };
                if blocks >= ENOUGH_BLOCKS * card.sms && wanted != full {
                    continue;
                }
                blocks = blocks.max(tiles * choice.splits);
                if !candidates.contains(&choice) {
                    candidates.push(choice);
                }
            }
        }
        candidates
    }
}

/// Why a choice does not belong to these kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {0}")]
pub struct Unfit(String);

/// Choices that were measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuned(HashMap<Question, Choice>);

impl Tuned {
    /// Takes a choice in, of a tile by its name and of so many parts of the sum.
    ///
    /// # Errors
    /// The kernels have no such tile, or their sums do not come in so many parts.
    pub fn add(&mut self, question: Question, tile: &str, splits: usize) -> Result<(), Unfit> {
        let kernels = question.kernels;
        let known = kernels.tiles().iter().find(|known| known.to_string() == tile);
        let tile = known.ok_or_else(|| Unfit(format!("no kernels {kernels}_{tile}")))?;
        let choice = question.choice(tile, splits).filter(|choice| choice.splits == splits);
        let choice = choice.ok_or_else(|| {
            let Product { groups, rows, columns, steps } = question.product;
            Unfit(format!("no {splits} parts of {steps} steps of {groups}x{rows}x{columns} in {kernels}_{tile}"))
        })?;
        self.0.insert(question, choice);
        Ok(())
    }

    /// A line for each choice, always in the same order.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.0.iter().map(|choice| format!("{choice:?}")).collect();
        lines.sort();
        lines
    }

    /// Whether there is a choice for it.
    pub fn has(&self, question: &Question) -> bool {
        self.0.contains_key(question)
    }
}

impl FromIterator<(Question, Choice)> for Tuned {
    /// Of choices among [`Question::candidates`].
    fn from_iter<I: IntoIterator<Item = (Question, Choice)>>(choices: I) -> Self {
        Self(choices.into_iter().collect())
    }
}

/// What tiles are chosen by.
#[derive(Clone, Debug)]
pub struct Chooser {
    /// The card.
    pub card: Card,
    /// What was measured on it, if anything was.
    pub tuned: Option<Rc<Tuned>>,
}

impl From<Card> for Chooser {
    /// By the model alone.
    fn from(card: Card) -> Self {
        Self { card, tuned: None }
    }
}

impl From<&Chooser> for Chooser {
    fn from(other: &Chooser) -> Self {
        other.clone()
    }
}

impl Chooser {
    /// Tile and split.
    pub fn choose(&self, question: &Question) -> Choice {
        let measured = self.tuned.as_ref().and_then(|tuned| tuned.0.get(question).copied());
        measured.unwrap_or_else(|| question.cheapest(self.card))
    }
}
