//! The codecs' operations on the GPU: launches of `kernels/codec.cu`, which explains them, and
//! [`CodecBackend`] for a [`Gpu`] that owns no network.
//!
//! Everything is 16 bits wide and summed in f32. What exceeds 65504 in f16 becomes infinite, the next group norm
//! makes NaN of it, and [`crate::codec::Decoder::decode`] reports it; bf16 has the range of f32. The SD-VAEs of
//! Stable Diffusion 1 and 2 are commonly run in f16; that of SDXL is known to overflow.

use super::conv_hopper::{self, Images, Pixels};
use super::engine::{Gpu, Work};
use super::launch::{ConvLoop, DevicePtr, Launch, Math, Precision, int};
use super::runtime::{PARAMETERS, Runtime};
use super::structs::{CodecAttention, CodecBytes, CodecConv, CodecNorm, CodecNormalise};
use super::tables::codec::{ATTENTION, BYTES_PIXELS, KEYS, NORM_VECTORS, QUERIES, SCORE_ROW};
use super::tensor::{Buffer, Format, Tensor, padded};
use super::tiles::{self, Card, Chooser, Kernels, Kind, Product, Question};
use crate::backend::codec::{After, Before, CodecBackend, Reach};
use crate::backend::{BackendError, DeviceError, Shape};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use std::rc::Rc;

/// Threads of all kernels but the convolutions.
const THREADS: u32 = 256;
/// Chunks of an image's statistics, at most: several blocks for each multiprocessor of any card.
const CHUNKS: usize = 1024;
/// Pixels of a chunk, at least.
const CHUNK: usize = 64;
/// Values that a thread packs at a time, at least.
const PACKED: usize = 1 << 15;
/// Bytes of the scores that the attention's warps exchange.
const SCORES: usize = QUERIES * SCORE_ROW * 4;

/// Why the kernels cannot do what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ShapeError {
    /// Of an image, or its channels.
    #[error("an autoencoder's tensor of shape {0:?}: too large, or empty")]
    Shape(Shape),
    /// Stride 2.
    #[error("a convolution of stride 2 of shape {0:?}, expected even height and width")]
    Odd(Shape),
    /// Groups do not divide the channels.
    #[error("a group norm of {channels} channels in {groups} groups")]
    Groups { channels: usize, groups: usize },
    /// Width of the attention.
    #[error("self-attention of {0} channels, expected a multiple of 8 up to 512")]
    Width(usize),
}

/// Checks that the values of a tensor can be counted in 32 bits.
fn check(shape: Shape) -> Result<(), ShapeError> {
    let [n, h, w, c] = shape;
    let fits = h < 1 << 15 && w < 1 << 15 && c < 1 << 16 && n < 1 << 16;
    match shape.iter().all(|&x| x > 0) && fits && (n * h * w + 2 * w + 2) * padded(c) < 1 << 31 {
        true => Ok(()),
        false => Err(ShapeError::Shape(shape)),
    }
}

/// How a [`Reach`] is computed.
#[derive(Clone, Copy)]
struct Window {
    side: usize,
    stride: usize,
    before: usize,
    phases: usize,
}

impl Window {
    fn of(reach: Reach) -> Self {
        let window = |side, stride, before, phases| Self { side, stride, before, phases };
        match reach {
            Reach::Point => window(1, 1, 0, 1),
            Reach::Same => window(3, 1, 1, 1),
            Reach::Double => window(2, 1, 1, 4),
            Reach::Down => window(3, 2, 0, 1),
            Reach::Halve => window(3, 2, 1, 1),
        }
    }
}

/// Shape of a convolution's result.
fn result(reach: Reach, [n, h, w, _]: Shape, cout: usize) -> Shape {
    match reach {
        Reach::Point | Reach::Same => [n, h, w, cout],
        Reach::Double => [n, 2 * h, 2 * w, cout],
        Reach::Down | Reach::Halve => [n, h / 2, w / 2, cout],
    }
}

/// A weight `[cout, cin, side, side]` as the kernel reads it, `[phases][cout][taps][cin]` with padded channels, in 16 bits.
pub fn pack(precision: Precision, reach: Reach, cin: usize, weight: &[f32]) -> Vec<u16> {
    let Window { side, phases, .. } = Window::of(reach);
    let (given, taps, wide) = (reach.side(), side * side, padded(cin));
    let kernels = weight.len() / (cin * given * given);
    let row = taps * wide;
    let mut packed = vec![0; phases * padded(kernels) * row];
    let pack_row = |values: &mut Vec<f32>, (at, bits): (usize, &mut [u16])| {
        let (phase, co) = (at / padded(kernels), at % padded(kernels));
        // In half p of an enlarged pixel, tap t of three falls on tap (t + 1 - p) div 2 of two.
        let place = |t: usize, p: usize| if phases == 4 { (t + 1 - p) / 2 } else { t };
        let tap = |i: usize| place(i / given, phase / 2) * side + place(i % given, phase % 2);
        values.fill(0.0);
        for (i, tap) in (0..given * given).map(tap).enumerate() {
            let from = weight[co * cin * given * given + i..].iter().step_by(given * given);
            values[tap * wide..].iter_mut().zip(from.take(cin)).for_each(|(to, x)| *to += x);
        }
        match precision {
            Precision::F16 => bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
            Precision::Bf16 => bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        }
    };
    let rows = packed.par_chunks_mut(row).enumerate().with_min_len((PACKED / row).max(1));
    rows.filter(|(at, _)| at % padded(kernels) < kernels).for_each_init(|| vec![0.0; row], pack_row);
    packed
}

/// The product for which a tile of this convolution is chosen.
pub fn question(math: Math, card: Card, reach: Reach, [n, h, w, cin]: Shape, cout: usize) -> Question {
    let Window { side, stride, phases, .. } = Window::of(reach);
    // Bulk copies bring the neighbours of every pixel, and cannot skip every other one. So stride 2 takes mma.sync.
    let math = if stride == 1 { math } else { Math { conv_loop: Some(ConvLoop::Mma), ..math } };
    let (cin, columns, taps) = (padded(cin), padded(cout), side * side);
    let rows = n * (h / stride) * (w / stride);
    let product = Product { groups: phases, rows, columns, steps: tiles::steps_of(&[(taps, cin)]) };
    Question { kernels: Kernels::new(Kind::Codec, math, card, &[cin], columns), taps, product }
}

/// y = residual + bias + conv of x [n, h, w, cin], and at least 0 if so asked. `weight` is from [`pack`], `bias` is f32
/// with padded channels; `residual` has the shape of the result and may be `y`. Where x, weight and bias are padded
/// with zeros, so is y.
///
/// # Errors
/// A shape beyond the kernels' limits.
#[allow(clippy::too_many_arguments, reason = "the operation has them")]
pub fn convolve(
    math: Math,
    by: impl Into<Chooser>,
    reach: Reach,
    shape: Shape,
    cout: usize,
    x: DevicePtr,
    (weight, bias): (DevicePtr, DevicePtr),
    residual: Option<DevicePtr>,
    relu: bool,
    y: DevicePtr,
) -> Result<Vec<Launch>, ShapeError> {
    let Window { side, stride, before, phases } = Window::of(reach);
    let [n, h, w, cin] = shape;
    if !h.is_multiple_of(stride) || !w.is_multiple_of(stride) {
        return Err(ShapeError::Odd(shape));
    }
    check(shape)?;
    check(result(reach, shape, cout))?;
    check([1, side * side, padded(cin), cout])?;
    let (rows, columns) = (h / stride, w / stride);
    let (pixels, cin, cout) = (n * rows * columns, padded(cin), padded(cout));
    let by = by.into();
    let question = question(math, by.card, reach, shape, cout);
    let choice = by.choose(&question);
    let (kernel, tile) = (question.kernels.instance(choice.tile), choice.tile);
    let params = CodecConv {
        x,
        weight,
        bias,
        residual: residual.unwrap_or_default(),
        y,
        pixels: int(pixels),
        height: int(h),
        width: int(w),
        rows: int(rows),
        columns: int(columns),
        cin: int(cin),
        cout: int(cout),
        side: int(side),
        stride: int(stride),
        before: int(before),
        phases: int(phases),
        relu: relu.into(),
        phase: 0,
        padding: 0,
    };
    let precision = math.precision;
    if !question.kernels.hopper {
        let grid = [pixels.div_ceil(tile.m), cout.div_ceil(tile.n), phases].map(|x| int(x) as u32);
        return Ok(vec![Launch::new(kernel, grid, tile.threads, tile.shared, &params)]);
    }
    let launch = |phase: usize| {
        let product = Pixels {
            precision,
            x: Images { at: x, n, h, w, channels: cin },
            skip: None,
            main: None,
            window: conv_hopper::Window { side, up: before - phase / 2, left: before - phase % 2 },
            weight: weight.offset(phase * cout * side * side * cin * 2),
            columns: cout,
            tiles_m: pixels.div_ceil(tile.m),
        };
        conv_hopper::pixels(kernel.clone(), &product, &choice, by.card, &CodecConv { phase: int(phase), ..params })
    };
    Ok((0..phases).map(launch).collect())
}

/// Makes y of x, both of `shape`: what a convolution reads in place of x. `affine` is f32 [n, 1, 2, c], not padded.
/// There is nothing to launch for [`Before::Nothing`].
pub fn normalise(
    precision: Precision,
    shape: Shape,
    x: DevicePtr,
    before: Before<DevicePtr>,
    y: DevicePtr,
) -> Result<Option<Launch>, ShapeError> {
    check(shape)?;
    let (before, affine) = match before {
        Before::Nothing => return Ok(None),
        Before::Affine(affine) => (0, *affine),
        Before::AffineSilu(affine) => (1, *affine),
        Before::SoftClip => (2, DevicePtr::NULL),
    };
    let [n, h, w, c] = shape;
    let vectors = padded(c) / 8;
    let image = h * w * vectors;
    let params = CodecNormalise {
        x,
        affine,
        y,
        count: int(n * image),
        image: int(image),
        vectors: int(vectors),
        channels: int(c),
        before,
        padding: 0,
    };
    let kernel = precision.pick(["codec_normalise_f16", "codec_normalise_bf16"]);
    Ok(Some(Launch::over(kernel, n * image, THREADS, &params)))
}

/// Pixels of a chunk, and chunks of an image.
fn chunks(pixels: usize) -> (usize, usize) {
    let chunk = pixels.div_ceil(CHUNKS).max(CHUNK);
    (chunk, pixels.div_ceil(chunk))
}

/// Bytes of scratch memory of [`group_norm`].
pub fn group_norm_scratch([n, h, w, c]: Shape) -> usize {
    n * chunks(h * w).1 * 2 * padded(c) * 4
}

/// Scale and shift f32 [n, 1, 2, c] of the group norm of x, given weight and bias f32 [1, 1, 2, c].
///
/// # Errors
/// As [`convolve`], or groups that do not divide the channels.
#[allow(clippy::too_many_arguments, reason = "the operation has them")]
pub fn group_norm(
    precision: Precision,
    shape: Shape,
    groups: usize,
    eps: f64,
    x: DevicePtr,
    affine: DevicePtr,
    scales: DevicePtr,
    scratch: DevicePtr,
) -> Result<[Launch; 2], ShapeError> {
    check(shape)?;
    let [n, h, w, channels] = shape;
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(ShapeError::Groups { channels, groups });
    }
    let ((chunk, chunks), vectors) = (chunks(h * w), padded(channels) / 8);
    let params = CodecNorm {
        x,
        affine,
        sums: scratch,
        scales,
        pixels: int(h * w),
        chunk: int(chunk),
        chunks: int(chunks),
        vectors: int(vectors),
        channels: int(channels),
        groups: int(groups),
        eps: eps as f32,
        padding: 0,
    };
    let sums = precision.pick(["codec_sums_f16", "codec_sums_bf16"]);
    let grid = [chunks, vectors.div_ceil(NORM_VECTORS), n].map(|x| int(x) as u32);
    Ok([
        Launch::new(sums, grid, THREADS, 0, &params),
        Launch::new("codec_scales_f32", [groups as u32, n as u32, 1], THREADS, 0, &params),
    ])
}

/// out [n, h, w, c] of qkv [n, h, w, 3 c].
///
/// # Errors
/// As [`convolve`], or a width without a kernel.
pub fn self_attention(
    precision: Precision,
    shape: Shape,
    qkv: DevicePtr,
    out: DevicePtr,
) -> Result<Launch, ShapeError> {
    let [n, h, w, c] = shape;
    check([n, h, w, 3 * c])?;
    let [width] =
        ATTENTION.into_iter().find(|&[width]| c <= width && c.is_multiple_of(8)).ok_or(ShapeError::Width(c))?;
    let scale = (std::f64::consts::LOG2_E / (c as f64).sqrt()) as f32;
    let params = CodecAttention { qkv, out, tokens: int(h * w), channels: int(c), scale, padding: 0 };
    let shared = (QUERIES + KEYS) * width * 2 + (KEYS * width * 2).max(SCORES);
    let grid = [(h * w).div_ceil(QUERIES) as u32, n as u32, 1];
    let kernel = format!("codec_attention_{}_c{width}", precision.name());
    Ok(Launch::new(kernel, grid, THREADS, shared as u32, &params))
}

/// 32-bit words that [`bytes`] writes for so many pixels: those of the bytes, and one of each block, which says whether
/// all was finite.
pub fn bytes_words(pixels: usize) -> [usize; 2] {
    let threads = pixels.div_ceil(BYTES_PIXELS);
    [3 * threads, threads.div_ceil(THREADS as usize)]
}

/// x [pixels, 3] in 8 bits: trunc(255 clamp(scale x + shift, 0, 1)). Behind that a word of each block says whether it
/// met a value that is not finite.
pub fn bytes(precision: Precision, pixels: usize, x: DevicePtr, [scale, shift]: [f32; 2], to: DevicePtr) -> Launch {
    let [words, _] = bytes_words(pixels);
    let params =
        CodecBytes { x, words: to, strange: to.offset(4 * words), pixels: int(pixels), scale, shift, padding: 0 };
    let kernel = precision.pick(["codec_bytes_f16", "codec_bytes_bf16"]);
    Launch::over(kernel, pixels.div_ceil(BYTES_PIXELS), THREADS, &params)
}

/// A convolution's weight and bias on the device.
pub struct Conv {
    reach: Reach,
    cin: usize,
    cout: usize,
    /// `[phases][cout][taps][cin]`, 16 bits.
    weight: Tensor,
    /// `[cout]`, padded.
    bias: Tensor,
}

/// What a device knows of the autoencoders that it loaded: the bytes of their weights. The weights themselves are in
/// [`Conv`]s.
#[derive(Default)]
pub struct Loaded {
    bytes: usize,
}

impl Gpu<Loaded> {
    /// A device for codecs, which has no network's parameters.
    pub fn for_codec(runtime: Rc<dyn Runtime>, math: impl Into<Math>) -> Result<Self, DeviceError> {
        Self::new(runtime, math.into(), Loaded::default())
    }

    /// Bytes of device memory for the weights that were loaded.
    pub fn param_bytes(&self) -> usize {
        self.params.bytes
    }

    /// Weights of a codec.
    fn load(&mut self, bytes: &[u8]) -> Buffer {
        self.params.bytes += bytes.len();
        self.own_values(bytes, PARAMETERS)
    }

    /// What a convolution reads: its input through `before`.
    fn normalised(&mut self, x: &Tensor, before: Before<Tensor>) -> Tensor {
        let affine = match before {
            Before::Affine(affine) | Before::AffineSilu(affine) => affine.ptr(),
            Before::Nothing | Before::SoftClip => DevicePtr::NULL,
        };
        let before = match before {
            Before::Nothing => return x.clone(),
            Before::Affine(_) => Before::Affine(&affine),
            Before::AffineSilu(_) => Before::AffineSilu(&affine),
            Before::SoftClip => Before::SoftClip,
        };
        let y = self.unset(x.shape(), Format::Half);
        let launch = normalise(self.precision, x.shape(), x.ptr(), before, y.ptr());
        self.go_if(Work::new("codec_normalise", x.shape()).with([x, &y]), launch);
        y
    }
}

impl CodecBackend for Gpu<Loaded> {
    type Conv = Conv;

    fn load_conv(&mut self, reach: Reach, cin: usize, weight: &[f32], bias: Option<&[f32]>) -> Conv {
        let cout = weight.len() / (cin * reach.side() * reach.side());
        let bits = pack(self.precision, reach, cin, weight);
        let buffer = self.load(bytemuck::cast_slice(&bits));
        let weight = Tensor::new([1, 1, 1, bits.len()], Format::Half, None, buffer);
        let mut values = bias.map_or(vec![0.0; cout], <[f32]>::to_vec);
        values.resize(padded(cout), 0.0);
        let buffer = self.load(bytemuck::cast_slice(&values));
        let bias = Tensor::new([1, 1, 1, values.len()], Format::F32, None, buffer);
        Conv { reach, cin, cout, weight, bias }
    }

    fn convolve(&mut self, conv: &Conv, x: &Tensor, before: Before<Tensor>, after: After<Tensor>) -> Tensor {
        let Conv { reach, cin, cout, weight, bias } = conv;
        let x = self.half(x);
        let shape = result(*reach, x.shape(), *cout);
        assert_eq!(x.shape()[3], *cin, "channels of a convolution's input");
        let x = self.normalised(&x, before);
        let residual = after.residual.map(|residual| self.half(&residual));
        assert!(residual.as_ref().is_none_or(|r| r.shape() == shape), "shape of a residual");
        self.keep(&[weight, bias]);
        let from = residual.as_ref().map(Tensor::ptr);
        let (math, by, side) = (self.math, self.chooser.clone(), Window::of(*reach).side);
        let work = Work::new("codec_conv", shape).sums(side * side * cin).with([&x, weight]).with(&residual);
        let work = work.of(question(math, by.card, *reach, x.shape(), *cout));
        let (y, held) = self.sum_into(residual, shape);
        let at = (weight.ptr(), bias.ptr());
        let launches = convolve(math, by, *reach, x.shape(), *cout, x.ptr(), at, from, after.relu, y.ptr());
        self.go_if(work.with([&y]), launches);
        drop(held);
        y
    }

    fn group_norm(&mut self, x: &Tensor, affine: &Tensor, groups: usize, eps: f64) -> Tensor {
        let (x, [n, _, _, c]) = (self.half(x), x.shape());
        let scales = self.unset([n, 1, 2, c], Format::F32);
        let scratch = self.scratch(group_norm_scratch(x.shape()));
        self.keep(&[affine]);
        let (from, to) = (affine.ptr(), scales.ptr());
        let launches = group_norm(self.precision, x.shape(), groups, eps, x.ptr(), from, to, scratch.ptr());
        self.go_if(Work::new("codec_group_norm", x.shape()).with([&x]), launches);
        scales
    }

    fn self_attention(&mut self, qkv: &Tensor) -> Tensor {
        let (qkv, [n, h, w, c]) = (self.half(qkv), qkv.shape());
        let out = self.unset([n, h, w, c / 3], Format::Half);
        let launch = self_attention(self.precision, out.shape(), qkv.ptr(), out.ptr());
        let work = Work::new("codec_attention", out.shape()).sums(2 * h * w);
        self.go_if(work.with([&qkv, &out]), launch.map(|launch| [launch]));
        out
    }

    fn download_rgb(&mut self, x: &Tensor, stretch: [f32; 2]) -> Result<(Vec<u8>, bool), BackendError> {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        assert_eq!(c, 3, "channels of a picture");
        let pixels = n * h * w;
        let [words, blocks] = bytes_words(pixels);
        let out = self.scratch(4 * (words + blocks));
        let launch = bytes(self.precision, pixels, x.ptr(), stretch, out.ptr());
        self.go(Work::new("codec_bytes", x.shape()).with([&x, &out]), [launch]);
        self.check()?;
        let (memory, first) = out.memory().expect("nothing is downloaded while a plan is made");
        let mut rgb = vec![0; 4 * (words + blocks)];
        memory.read(first, &mut rgb)?;
        let finite = rgb[4 * words..].iter().all(|&x| x == 0);
        rgb.truncate(3 * pixels);
        Ok((rgb, finite))
    }

    /// Does nothing: a plan's tensors share one place, and outside of plans memory is freed with the last handle.
    fn trim(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_weight_has_each_value_where_the_kernel_reads_it() {
        let [cin, cout] = [11, 13];
        for reach in [Reach::Point, Reach::Same, Reach::Double, Reach::Down, Reach::Halve] {
            let Window { side, phases, .. } = Window::of(reach);
            let given = reach.side();
            let weight: Vec<f32> = (0..cout * cin * given * given).map(|i| (i as f32 * 0.7).sin()).collect();
            // One value at a time, in PyTorch's order.
            let mut want = vec![0.0f32; phases * padded(cout) * side * side * padded(cin)];
            for (i, &value) in weight.iter().enumerate() {
                let (co, ci) = (i / (cin * given * given), i / (given * given) % cin);
                let (y, x) = (i / given % given, i % given);
                for phase in 0..phases {
                    let place = |t: usize, p: usize| if phases == 4 { (t + 1 - p) / 2 } else { t };
                    let tap = place(y, phase / 2) * side + place(x, phase % 2);
                    want[((phase * padded(cout) + co) * side * side + tap) * padded(cin) + ci] += value;
                }
            }
            let f16: Vec<u16> = want.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
            let bf16: Vec<u16> = want.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            assert_eq!(pack(Precision::F16, reach, cin, &weight), f16, "{reach:?}");
            assert_eq!(pack(Precision::Bf16, reach, cin, &weight), bf16, "{reach:?}");
        }
    }
}
