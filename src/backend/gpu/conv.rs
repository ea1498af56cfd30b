//! Convolutions on the GPU: typed calls that check shapes, choose a tile and fill the parameters of
//! the kernels in `kernels/conv_*.cu`.
//!
//! A call is made in two steps, as a plan needs it. [`Fprop::new`] and its sisters choose by shape and
//! card and tell how much scratch memory they want; `launches` then turns addresses into [`Launch`]es,
//! plain data that any runtime executes in order. Nothing is looked up or allocated while launching.

use super::conv_hopper::{self, ImagesAt, PixelProduct, Window};
use super::launch::{DevicePtr, Launch, Math, Precision, int};
use super::structs::{ConvDgrad, ConvFprop, ConvWgrad, PixelTiles};
use super::tiles::{self, Card, Choice, Chooser, Kernels, Kind, Product, Question};
use bytemuck::NoUninit;

/// A convolution of [n, h, w, ca] and, unless cb is 0, [n, h, w, cb] to [n, h, w, cout]. Channels are
/// padded to multiples of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images.
    pub n: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// Channels of the first input.
    pub ca: usize,
    /// Channels of the second input, or 0.
    pub cb: usize,
    /// Output channels.
    pub cout: usize,
    /// 9 (3x3) or 1 (1x1).
    pub taps: usize,
}

impl ConvShape {
    /// Pixels of all images.
    pub fn pixels(&self) -> usize {
        self.n * self.h * self.w
    }

    fn cin(&self) -> usize {
        self.ca + self.cb
    }

    /// A tensor of so many channels.
    fn images(&self, at: DevicePtr, channels: usize) -> ImagesAt {
        ImagesAt { at, n: self.n, h: self.h, w: self.w, channels }
    }

    fn check(&self) -> Result<(), ConvError> {
        let wrong = |what| Err(ConvError { shape: *self, what });
        if self.taps != 1 && self.taps != 9 {
            return wrong("the weight has 1 or 9 taps");
        }
        if self.pixels() == 0 || self.ca == 0 || self.cout == 0 {
            return wrong("an empty tensor");
        }
        if [self.ca, self.cb, self.cout].iter().any(|c| !c.is_multiple_of(8)) {
            return wrong("channels must be padded to a multiple of 8");
        }
        // The kernels count the values of a tensor, and those of the weight, in 32 bits. There must be room left for
        // the addresses of neighbours that lie outside and are not read.
        let widest = self.ca.max(self.cb).max(self.cout);
        let around = self.pixels().saturating_add(2 * self.w + 2);
        let values = [around.saturating_mul(widest), (self.taps * self.cin()).saturating_mul(self.cout)];
        if values.iter().any(|&values| values >= 1 << 31) {
            return wrong("too large");
        }
        Ok(())
    }
}

/// Why a convolution cannot be launched.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("convolution {shape:?}: {what}")]
#[allow(missing_docs)] // the message says it
pub struct ConvError {
    pub shape: ConvShape,
    pub what: &'static str,
}

/// The two inputs, and the factors that their gradients are multiplied by: the scales of `mp_cat`, or 1.
#[derive(Clone, Copy, Debug)]
pub struct ConvInputs {
    /// [n, h, w, ca].
    pub x: DevicePtr,
    /// Factor of `x`.
    pub x_scale: f32,
    /// [n, h, w, cb] and its factor.
    pub skip: Option<(DevicePtr, f32)>,
}

impl ConvInputs {
    fn check(&self, shape: &ConvShape) -> Result<(DevicePtr, f32), ConvError> {
        Ok((second(shape, self.skip.map(|s| s.0))?, self.skip.map_or(1.0, |s| s.1)))
    }
}

/// The second input, which is there if and only if it has channels.
fn second(shape: &ConvShape, skip: Option<DevicePtr>) -> Result<DevicePtr, ConvError> {
    if skip.is_some() != (shape.cb != 0) {
        return Err(ConvError { shape: *shape, what: "a second input needs channels, and channels an input" });
    }
    Ok(skip.unwrap_or(DevicePtr::NULL))
}

/// The embedding's scales of one block.
#[derive(Clone, Copy, Debug)]
pub struct BlockScales {
    /// First channel of the block in the first image, f32.
    pub all: DevicePtr,
    /// f32 values from one image to the next.
    pub stride: usize,
}

/// What follows a convolution; tensors are [n, h, w, cout].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the formulas say it
pub enum Epilogue {
    /// y = gain * conv.
    Gain(f32),
    /// y = mp_silu(conv * scale); and `pre` = conv, if it is wanted.
    ScaleSilu { scale: BlockScales, pre: Option<DevicePtr> },
    /// y = wa * main + wb * conv, within +-clip.
    MpSum { main: MainPath, wa: f32, wb: f32, clip: Option<f32> },
}

/// What `mp_sum` adds a convolution to.
#[derive(Clone, Copy, Debug)]
pub enum MainPath {
    /// A tensor [n, h, w, cout].
    Tensor(DevicePtr),
    /// A convolution of one tap that is computed with it, see [`Fprop::and_main`].
    Conv {
        /// As those of [`Fprop::launch`].
        inputs: (DevicePtr, Option<DevicePtr>),
        /// `[cout][ca + cb]`.
        weight: DevicePtr,
    },
}

/// A product's kernel: which it is, its tile, and in how many parts it sums.
#[derive(Clone, Debug)]
struct ProductKernel {
    question: Question,
    choice: Choice,
    precision: Precision,
    card: Card,
}

impl ProductKernel {
    /// The kernel for a convolution's product, with so many taps and so many channels of each tensor.
    fn of_pixels(
        kind: Kind,
        math: Math,
        by: impl Into<Chooser>,
        inputs: &[(usize, usize)],
        groups: usize,
        [rows, columns]: [usize; 2],
    ) -> Self {
        let by = by.into();
        let channels: Vec<usize> = inputs.iter().map(|&(_, channels)| channels).collect();
        let kernels = Kernels::new(kind, math, by.card, &channels, columns);
        let product = Product { groups, rows, columns, steps: tiles::steps_of(inputs) };
        Self::new(math, &by, Question { kernels, taps: inputs[0].0, product })
    }

    fn new(math: Math, by: &Chooser, question: Question) -> Self {
        Self { question, choice: by.choose(&question), precision: math.precision, card: by.card }
    }

    fn hopper(&self) -> bool {
        self.question.kernels.hopper
    }

    /// The name of the instance.
    fn name(&self) -> String {
        self.question.kernels.instance(self.choice.tile)
    }

    /// What bulk copies read for a convolution, or for the gradient of its input.
    fn pixels(
        &self,
        shape: &ConvShape,
        [x, skip]: [DevicePtr; 2],
        [ca, cb]: [usize; 2],
        weight: DevicePtr,
        columns: usize,
        tiles_m: usize,
    ) -> PixelProduct {
        PixelProduct {
            precision: self.precision,
            x: shape.images(x, ca),
            skip: (cb > 0).then(|| shape.images(skip, cb)),
            main: None,
            window: Window::same(shape.taps),
            weight,
            columns,
            tiles_m,
        }
    }

    /// Whether the sums come in parts that lie in device memory; a cluster's blocks have them in shared memory.
    fn in_parts(&self) -> bool {
        self.choice.splits > 1 && !self.question.kernels.in_clusters()
    }

    /// Where the parts go, if there are several.
    fn parts(&self, scratch: DevicePtr) -> DevicePtr {
        if self.in_parts() { scratch } else { DevicePtr::NULL }
    }

    /// Bytes of the f32 sums of all parts, if there are several.
    fn partial_bytes(&self, values: usize) -> usize {
        if self.in_parts() { self.choice.splits * values * 4 } else { 0 }
    }

    /// How a convolution's pixels are cut into tiles, within each of `groups` equal groups of images.
    fn tiles(&self, shape: &ConvShape, groups: usize) -> PixelTiles {
        let group = shape.pixels() / groups;
        PixelTiles {
            height: int(shape.h),
            width: int(shape.w),
            group: int(group),
            tiles_per_group: int(group.div_ceil(self.choice.tile.m)),
        }
    }

    /// A launch of the loop for every card.
    fn launch(&self, grid: [usize; 2], params: &impl NoUninit) -> Launch {
        let Choice { tile, splits, .. } = self.choice;
        Launch::new(self.name(), [grid[0], grid[1], splits], tile.threads, tile.shared, params)
    }
}

/// A launch of a second pass, which adds up the parts of a weight's gradient, or the tiles' sums.
fn pass(kernel: &'static str, grid: [usize; 2], threads: usize, params: &impl NoUninit) -> Launch {
    Launch::new(kernel, [grid[0], grid[1], 1], threads, 0, params)
}

/// A forward convolution (`conv`, `conv_scale_silu`, `conv_mp_sum`, `convs_mp_sum` of [`crate::backend::NetworkBackend`]).
#[derive(Clone, Debug)]
pub struct Fprop {
    shape: ConvShape,
    /// The shape of the main path's convolution, if the main path is one.
    main: Option<ConvShape>,
    kernel: ProductKernel,
}

impl Fprop {
    /// Chooses the tile and the number of parts.
    pub fn new(shape: ConvShape, math: Math, by: impl Into<Chooser>) -> Result<Self, ConvError> {
        Self::of(shape, None, math, by)
    }

    /// The same for a convolution together with the main path's, of one tap, to which [`Epilogue::MpSum`] adds it.
    pub fn and_main(shape: ConvShape, main: ConvShape, math: Math, by: impl Into<Chooser>) -> Result<Self, ConvError> {
        if main != (ConvShape { ca: main.ca, cb: main.cb, taps: 1, ..shape }) {
            return Err(ConvError {
                shape: main,
                what: "it is not of one tap, or its result is not of the same shape",
            });
        }
        Self::of(shape, Some(main), math, by)
    }

    fn of(shape: ConvShape, main: Option<ConvShape>, math: Math, by: impl Into<Chooser>) -> Result<Self, ConvError> {
        let mut inputs = Vec::new();
        for of in std::iter::once(&shape).chain(&main) {
            of.check()?;
            inputs.extend([(of.taps, of.ca), (of.taps, of.cb)]);
        }
        let product = [shape.pixels(), shape.cout];
        Ok(Self { shape, main, kernel: ProductKernel::of_pixels(Kind::Fprop, math, by, &inputs, 1, product) })
    }

    /// The name of the instance chosen.
    pub fn kernel(&self) -> String {
        self.kernel.name()
    }

    /// The product for which the tile and the number of parts were chosen.
    pub fn question(&self) -> Question {
        self.kernel.question
    }

    /// Bytes of scratch memory.
    pub fn scratch_bytes(&self) -> usize {
        self.kernel.partial_bytes(self.shape.pixels() * self.shape.cout)
    }

    /// Writes y [n, h, w, cout]; and where `act` is given, mp_silu(factor * y) to its address. x [n, h, w, ca] and skip
    /// [n, h, w, cb] are what the convolution multiplies. Where the operand goes through `mp_silu`, pass the activated
    /// tensors. Where it does not, the scales of `mp_cat` are in `weight` `[cout][taps][ca + cb]`. Beside that and y,
    /// `memory` has `partial` of [`Fprop::scratch_bytes`] and `arrived` of [`ARRIVED_BYTES`]; the rest of it is zeros.
    pub fn launch(
        &self,
        (x, skip): (DevicePtr, Option<DevicePtr>),
        epilogue: Epilogue,
        act: Option<(DevicePtr, f32)>,
        memory: ConvFprop,
    ) -> Result<Launch, ConvError> {
        let (shape, Choice { tile, splits, steps_per_split }) = (&self.shape, self.kernel.choice);
        let wrong = |what| Err(ConvError { shape: *shape, what });
        let skip = second(shape, skip)?;
        let tiles_m = shape.pixels().div_ceil(tile.m);
        let before = ConvFprop {
            x,
            skip,
            act: act.map_or(DevicePtr::NULL, |a| a.0),
            act_scale: act.map_or(1.0, |a| a.1),
            partial: self.kernel.parts(memory.partial),
            tiles: self.kernel.tiles(shape, 1),
            pixels: int(shape.pixels()),
            ca: int(shape.ca),
            cb: int(shape.cb),
            cout: int(shape.cout),
            taps: int(shape.taps),
            steps_per_split: int(steps_per_split),
            splits: int(splits),
            gain: 1.0,
            to_main: 1.0,
            clip: f32::INFINITY,
            ..memory
        };
        let mut main = None;
        let params = match epilogue {
            Epilogue::Gain(gain) => ConvFprop { gain, ..before },
            Epilogue::ScaleSilu { .. } if act.is_some() => {
                return wrong("a result scaled by the embedding is an activation, and has no other beside it");
            }
            Epilogue::ScaleSilu { scale, pre } => ConvFprop {
                scale: scale.all,
                scale_stride: int(scale.stride),
                pre: pre.unwrap_or(DevicePtr::NULL),
                ..before
            },
            Epilogue::MpSum { main: path, wa, wb, clip } => {
                let before = ConvFprop { clip: clip.unwrap_or(f32::INFINITY), ..before };
                match (path, self.main) {
                    (MainPath::Tensor(residual), None) => ConvFprop { residual, wa, gain: wb, ..before },
                    (MainPath::Conv { inputs: (x, skip), weight }, Some(of)) => {
                        // The main path's products are added to the sums, so its weight is that of all.
                        let to_main = wb / wa;
                        if !to_main.is_finite() {
                            return wrong("a main path that does not count is no scale for the sums");
                        }
                        let skip = second(&of, skip)?;
                        let (x, skip) = (of.images(x, of.ca), of.images(skip, of.cb));
                        main = Some(conv_hopper::Onto { x, skip, weight, to_main });
                        ConvFprop {
                            main_x: x.at,
                            main_skip: skip.at,
                            main_weight: weight,
                            main_ca: int(x.channels),
                            main_cb: int(skip.channels),
                            gain: wa,
                            to_main,
                            ..before
                        }
                    }
                    _ => return wrong(MAIN_PATH_DIFFERS),
                }
            }
        };
        if self.main.is_some() != main.is_some() {
            return wrong(MAIN_PATH_DIFFERS);
        }
        let grid = [tiles_m, shape.cout.div_ceil(tile.n)];
        Ok(if self.kernel.hopper() {
            let channels = [shape.ca, shape.cb];
            let product = self.kernel.pixels(shape, [x, skip], channels, memory.weight, shape.cout, tiles_m);
            let product = PixelProduct { main, ..product };
            conv_hopper::pixels(self.kernel.name(), &product, &self.kernel.choice, self.kernel.card, &params)
        } else {
            self.kernel.launch(grid, &params)
        })
    }
}

const MAIN_PATH_DIFFERS: &str = "planned with a convolution of the main path and called without, or the reverse";

/// Bytes of `arrived`: a counter for each tile whose sum may come in parts. They are zeros, and the kernel leaves them as
/// zeros. So one such buffer serves all convolutions that run one after the other.
pub const ARRIVED_BYTES: usize = tiles::MAX_SPLIT_TILES * 4;

/// Through what the gradient of a convolution's input goes on.
#[derive(Clone, Copy, Debug)]
pub enum Through {
    /// The inputs were multiplied as they are: through their factors alone.
    Linear,
    /// The convolution read `mp_silu` of the inputs times their factors; `inputs` are the tensors before `mp_silu`.
    Silu,
    /// The convolution read `mp_silu(x * scale)`; `inputs` has the x before it. The gradient of the scales is written
    /// too, with the same stride.
    ScaleSilu {
        /// The scales.
        scale: BlockScales,
        /// Where their gradient goes: first channel of the block in the first image, f32.
        scale_grad: DevicePtr,
    },
}

/// Gradient of a convolution's input (`conv_dgrad`, `conv_dgrad_scale_silu`).
#[derive(Clone, Debug)]
pub struct Dgrad {
    shape: ConvShape,
    kernel: ProductKernel,
    scaled: bool,
}

impl Dgrad {
    /// Chooses the tile and the number of parts; `scaled` says that the gradient goes [`Through::ScaleSilu`].
    pub fn new(shape: ConvShape, scaled: bool, math: Math, by: impl Into<Chooser>) -> Result<Self, ConvError> {
        shape.check()?;
        if scaled && shape.cb != 0 {
            return Err(ConvError { shape, what: "a scaled input is one tensor" });
        }
        let groups = if scaled { shape.n } else { 1 };
        let product = [shape.pixels() / groups, shape.cin()];
        let kernel = ProductKernel::of_pixels(Kind::Dgrad, math, by, &[(shape.taps, shape.cout)], groups, product);
        Ok(Self { shape, kernel, scaled })
    }

    /// The name of the instance chosen.
    pub fn kernel(&self) -> String {
        self.kernel.name()
    }

    /// The product for which the tile and the number of parts were chosen.
    pub fn question(&self) -> Question {
        self.kernel.question
    }

    fn groups(&self) -> usize {
        if self.scaled { self.shape.n } else { 1 }
    }

    fn tiles_per_group(&self) -> usize {
        (self.shape.pixels() / self.groups()).div_ceil(self.kernel.choice.tile.m)
    }

    /// Bytes of scratch memory: partial sums, then the tiles' sums for the gradient of the scales.
    pub fn scratch_bytes(&self) -> usize {
        let tiles = self.groups() * self.tiles_per_group();
        // Each block of a cluster has sums of its own.
        let rows = if self.kernel.in_parts() { tiles } else { tiles * self.kernel.choice.splits };
        let sums = if self.scaled { rows * self.shape.ca * 4 } else { 0 };
        self.kernel.partial_bytes(self.shape.pixels() * self.shape.cin()) + sums
    }

    /// Writes gx [n, h, w, ca] and gskip [n, h, w, cb]: the gradients of `gain` times the convolution, from grad
    /// [n, h, w, cout], plus `acc_factor` times acc_x and acc_skip of the same shapes (which may be gx and gskip). `turned`
    /// `[ca + cb][taps][cout]` is the weight transposed, with its taps in reverse. Where the scales of the inputs are
    /// in it, those of `inputs` must be 1. With [`Through::Linear`] the tensors of `inputs` are not read. `memory` has
    /// these, gain and acc_factor, `partial` of [`Dgrad::scratch_bytes`] and `arrived` of [`ARRIVED_BYTES`]; the rest of it is
    /// zeros.
    pub fn launches(&self, inputs: ConvInputs, through: Through, memory: ConvDgrad) -> Result<Vec<Launch>, ConvError> {
        let (shape, Choice { tile, splits, steps_per_split }) = (&self.shape, self.kernel.choice);
        let (skip, skip_scale) = inputs.check(shape)?;
        let wrong = |what| Err(ConvError { shape: *shape, what });
        let before = ConvDgrad {
            x: inputs.x,
            skip,
            partial: self.kernel.parts(memory.partial),
            tiles: self.kernel.tiles(shape, self.groups()),
            pixels: int(shape.pixels()),
            ca: int(shape.ca),
            cb: int(shape.cb),
            cout: int(shape.cout),
            taps: int(shape.taps),
            steps_per_split: int(steps_per_split),
            splits: int(splits),
            x_scale: inputs.x_scale,
            skip_scale,
            ..memory
        };
        let params = match (through, self.scaled) {
            (Through::Linear, false) => ConvDgrad { x: DevicePtr::NULL, skip: DevicePtr::NULL, ..before },
            (Through::Silu, false) => before,
            (Through::ScaleSilu { .. }, true) if inputs.x_scale != 1.0 || memory.acc_x != DevicePtr::NULL => {
                return wrong(
                    "an input scaled by the embedding has no other factor, and nothing is added to its gradient",
                );
            }
            (Through::ScaleSilu { scale, scale_grad }, true) => {
                let partial = self.kernel.partial_bytes(shape.pixels() * shape.cin());
                ConvDgrad {
                    scale: scale.all,
                    scale_stride: int(scale.stride),
                    scale_grad,
                    sums: memory.partial.offset(partial),
                    ..before
                }
            }
            _ => return wrong("planned with scales and called without, or the reverse"),
        };
        let tiles_m = self.tiles_per_group();
        let grid = [self.groups() * tiles_m, shape.cin().div_ceil(tile.n)];
        let mut launches = vec![if self.kernel.hopper() {
            let read = [memory.grad, DevicePtr::NULL];
            let product = self.kernel.pixels(shape, read, [shape.cout, 0], memory.turned, shape.cin(), grid[0]);
            conv_hopper::pixels(self.kernel.name(), &product, &self.kernel.choice, self.kernel.card, &params)
        } else {
            self.kernel.launch(grid, &params)
        }];
        if self.scaled {
            let grid = [shape.ca.div_ceil(128), shape.n];
            launches.push(pass("conv_dgrad_scale_sums", grid, 128, &params));
        }
        Ok(launches)
    }
}

/// Gradient of a convolution's weight (`conv_wgrad`).
#[derive(Clone, Debug)]
pub struct Wgrad {
    shape: ConvShape,
    kernel: ProductKernel,
}

impl Wgrad {
    /// Chooses the tile and the number of parts.
    pub fn new(shape: ConvShape, math: Math, by: impl Into<Chooser>) -> Result<Self, ConvError> {
        shape.check()?;
        let steps = shape.pixels().div_ceil(tiles::STEP);
        let product = Product { groups: 1, rows: shape.cout, columns: shape.taps * shape.cin(), steps };
        let by = by.into();
        let kernels = Kernels::new(Kind::Wgrad, math, by.card, &[shape.ca, shape.cb], shape.cout);
        Ok(Self { shape, kernel: ProductKernel::new(math, &by, Question { kernels, taps: shape.taps, product }) })
    }

    /// The name of the instance chosen.
    pub fn kernel(&self) -> String {
        self.kernel.name()
    }

    /// The product for which the tile and the number of parts were chosen.
    pub fn question(&self) -> Question {
        self.kernel.question
    }

    fn values(&self) -> usize {
        self.shape.cout * self.shape.taps * self.shape.cin()
    }

    /// Bytes of scratch memory.
    pub fn scratch_bytes(&self) -> usize {
        self.kernel.partial_bytes(self.values())
    }

    /// dw `[cout][taps][ca + cb]` f32 += gain * inputs (*) grad [n, h, w, cout]. The inputs are what the
    /// convolution multiplied, as in [`Fprop::launch`], with their factors. `memory` has gain too, and `partial` of
    /// [`Wgrad::scratch_bytes`].
    pub fn launches(&self, inputs: ConvInputs, memory: ConvWgrad) -> Result<Vec<Launch>, ConvError> {
        let (shape, Choice { tile, splits, steps_per_split }) = (&self.shape, self.kernel.choice);
        let (skip, skip_scale) = inputs.check(shape)?;
        let params = ConvWgrad {
            x: inputs.x,
            skip,
            partial: self.kernel.parts(memory.partial),
            height: int(shape.h),
            width: int(shape.w),
            pixels: int(shape.pixels()),
            ca: int(shape.ca),
            cb: int(shape.cb),
            cout: int(shape.cout),
            taps: int(shape.taps),
            steps_per_split: int(steps_per_split),
            splits: int(splits),
            x_scale: inputs.x_scale,
            skip_scale,
            ..memory
        };
        let grid = [shape.cout.div_ceil(tile.m), (shape.taps * shape.cin()).div_ceil(tile.n)];
        let mut launches = vec![if self.kernel.hopper() {
            let images = |at, channels| shape.images(at, channels);
            let skip = (shape.cb > 0).then(|| images(skip, shape.cb));
            let tensors = (images(inputs.x, shape.ca), skip, images(memory.grad, shape.cout));
            let ProductKernel { precision, choice, .. } = &self.kernel;
            conv_hopper::weights(self.kernel.name(), *precision, tensors, shape.taps, choice, &params)
        } else {
            self.kernel.launch(grid, &params)
        }];
        if splits > 1 {
            launches.push(pass("conv_wgrad_reduce", [(self.values() / 8).div_ceil(256), 1], 256, &params));
        }
        Ok(launches)
    }
}
