//! Launches of `kernels/codec.cu`, which explains them, and of the codecs' convolutions on Hopper.
//!
//! Everything is 16 bits wide and summed in f32. What exceeds 65504 in f16 becomes infinite, the next group norm
//! makes NaN of it, and [`crate::codec::Decoder::decode`] reports it; bf16 has the range of f32. The SD-VAEs of
//! Stable Diffusion 1 and 2 are commonly run in f16; that of SDXL is known to overflow.

use super::conv_hopper::{self, ImagesAt, PixelProduct};
use super::launch::{ConvLoop, DevicePtr, Launch, Math, Precision, int};
use super::structs::{CodecAttention, CodecBytes, CodecConv, CodecNorm, CodecNormalise};
use super::tables::codec::{ATTENTION, BYTES_PIXELS, KEYS, NORM_VECTORS, QUERIES, SCORE_ROW};
use super::tables::codec::{ATTENTION_THREADS, BYTES_THREADS, NORM_THREADS};
use super::tensor::padded;
use super::tiles::{self, Card, Chooser, Kernels, Kind, Product, Question};
use crate::backend::Shape;
use crate::backend::codec::{Prologue, Reach, Window};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;

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

/// A weight `[cout, cin, side, side]` as the kernel reads it, `[phases][cout][taps][cin]` with padded channels, in 16 bits.
pub fn pack(precision: Precision, reach: Reach, cin: usize, weight: &[f32]) -> Vec<u16> {
    let window @ Window { side, scale, .. } = reach.window();
    let (given, taps, wide, phases) = (reach.side(), side * side, padded(cin), scale * scale);
    let kernels = weight.len() / (cin * given * given);
    let row = taps * wide;
    let mut packed = vec![0; phases * padded(kernels) * row];
    let pack_row = |values: &mut Vec<f32>, (at, bits): (usize, &mut [u16])| {
        let (phase, co) = (at / padded(kernels), at % padded(kernels));
        let tap = |i: usize| window.tap(i / given, phase / 2) * side + window.tap(i % given, phase % 2);
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
    let Window { side, stride, scale, .. } = reach.window();
    // Bulk copies bring the neighbours of every pixel, and cannot skip every other one. So stride 2 takes mma.sync.
    let math = if stride == 1 { math } else { Math { conv_loop: Some(ConvLoop::Mma), ..math } };
    let (cin, columns, taps) = (padded(cin), padded(cout), side * side);
    let rows = n * (h / stride) * (w / stride);
    let product = Product { groups: scale * scale, rows, columns, steps: tiles::steps_of(&[(taps, cin)]) };
    Question { kernels: Kernels::new(Kind::Codec, math, card, &[cin], columns), taps, product }
}

/// y = residual + bias + conv of x [n, h, w, cin], and at least 0 if `memory` says `relu`. `weight` is from [`pack`], `bias` is
/// f32 with padded channels; `residual` has the shape of the result and may be `y`. Where x, weight and bias are padded
/// with zeros, so is y.
///
/// # Errors
/// A shape beyond the kernels' limits.
pub fn convolve(
    math: Math,
    by: impl Into<Chooser>,
    reach: Reach,
    shape: Shape,
    cout: usize,
    memory: CodecConv,
) -> Result<Vec<Launch>, ShapeError> {
    let window @ Window { side, stride, scale, before } = reach.window();
    let phases = scale * scale;
    let [n, h, w, cin] = shape;
    if !h.is_multiple_of(stride) || !w.is_multiple_of(stride) {
        return Err(ShapeError::Odd(shape));
    }
    check(shape)?;
    check(window.result(shape, cout))?;
    check([1, side * side, padded(cin), cout])?;
    let (rows, columns) = (h / stride, w / stride);
    let (pixels, cin, cout) = (n * rows * columns, padded(cin), padded(cout));
    let by = by.into();
    let question = question(math, by.card, reach, shape, cout);
    let choice = by.choose(&question);
    let (kernel, tile) = (question.kernels.instance(choice.tile), choice.tile);
    let params = CodecConv {
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
        ..memory
    };
    let precision = math.precision;
    if !question.kernels.hopper {
        let grid = [pixels.div_ceil(tile.m), cout.div_ceil(tile.n), phases];
        return Ok(vec![Launch::new(kernel, grid, tile.threads, tile.shared, &params)]);
    }
    let launch = |phase: usize| {
        let product = PixelProduct {
            precision,
            x: ImagesAt { at: memory.x, n, h, w, channels: cin },
            skip: None,
            main: None,
            window: conv_hopper::Window { side, up: before - phase / 2, left: before - phase % 2 },
            weight: memory.weight.offset(phase * cout * side * side * cin * 2),
            columns: cout,
            tiles_m: pixels.div_ceil(tile.m),
        };
        conv_hopper::pixels(kernel.clone(), &product, &choice, by.card, &CodecConv { phase: int(phase), ..params })
    };
    Ok((0..phases).map(launch).collect())
}

/// Makes y of x, both of `shape`: what a convolution reads in place of x. `affine` is f32 [n, 1, 2, c], not padded.
/// There is nothing to launch for [`Prologue::Nothing`].
pub fn normalise(
    precision: Precision,
    shape: Shape,
    x: DevicePtr,
    prologue: Prologue<DevicePtr>,
    y: DevicePtr,
) -> Result<Option<Launch>, ShapeError> {
    check(shape)?;
    let (before, affine) = match prologue {
        Prologue::Nothing => return Ok(None),
        Prologue::Affine(affine) => (0, *affine),
        Prologue::AffineSilu(affine) => (1, *affine),
        Prologue::SoftClip => (2, DevicePtr::NULL),
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
    Ok(Some(Launch::over(kernel, n * image, NORM_THREADS, &params)))
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

/// `scales`, which are scale and shift f32 [n, 1, 2, c], of the group norm of x, given weight and bias in `affine`, f32
/// [1, 1, 2, c]. `sums` is of [`group_norm_scratch`] bytes.
///
/// # Errors
/// As [`convolve`], or groups that do not divide the channels.
pub fn group_norm(
    precision: Precision,
    shape: Shape,
    groups: usize,
    eps: f64,
    memory: CodecNorm,
) -> Result<[Launch; 2], ShapeError> {
    check(shape)?;
    let [n, h, w, channels] = shape;
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(ShapeError::Groups { channels, groups });
    }
    let ((chunk, chunks), vectors) = (chunks(h * w), padded(channels) / 8);
    let params = CodecNorm {
        pixels: int(h * w),
        chunk: int(chunk),
        chunks: int(chunks),
        vectors: int(vectors),
        channels: int(channels),
        groups: int(groups),
        eps: eps as f32,
        ..memory
    };
    let sums = precision.pick(["codec_sums_f16", "codec_sums_bf16"]);
    let grid = [chunks, vectors.div_ceil(NORM_VECTORS), n];
    Ok([
        Launch::new(sums, grid, NORM_THREADS, 0, &params),
        Launch::new("codec_scales_f32", [groups, n, 1], NORM_THREADS, 0, &params),
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
    let grid = [(h * w).div_ceil(QUERIES), n, 1];
    let kernel = format!("codec_attention_{}_c{width}", precision.name());
    Ok(Launch::new(kernel, grid, ATTENTION_THREADS, shared, &params))
}

/// 32-bit words that [`bytes`] writes for so many pixels: those of the bytes, and one of each block, which says whether
/// all was finite.
pub fn bytes_words(pixels: usize) -> [usize; 2] {
    let threads = pixels.div_ceil(BYTES_PIXELS);
    [3 * threads, threads.div_ceil(BYTES_THREADS)]
}

/// x [pixels, 3] in 8 bits: trunc(255 clamp(scale x + shift, 0, 1)). Behind that a word of each block says whether it
/// met a value that is not finite.
pub fn bytes(precision: Precision, pixels: usize, x: DevicePtr, [scale, shift]: [f32; 2], to: DevicePtr) -> Launch {
    let [words, _] = bytes_words(pixels);
    let params =
        CodecBytes { x, words: to, strange: to.offset(4 * words), pixels: int(pixels), scale, shift, padding: 0 };
    let kernel = precision.pick(["codec_bytes_f16", "codec_bytes_bf16"]);
    Launch::over(kernel, pixels.div_ceil(BYTES_PIXELS), BYTES_THREADS, &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_weight_has_each_value_where_the_kernel_reads_it() {
        let [cin, cout] = [11, 13];
        for reach in [Reach::Point, Reach::Same, Reach::Double, Reach::Down, Reach::Halve] {
            let Window { side, scale, .. } = reach.window();
            let (given, phases) = (reach.side(), scale * scale);
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
