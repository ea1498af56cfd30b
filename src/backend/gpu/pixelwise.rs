//! Launches of `kernels/pixelwise.cu`: pixel norm, resampling, activation, clip, linear combinations, casts.
//!
//! Shapes are `[n, height, width, channels]` with channels a multiple of 8; casts take any number. Optional
//! pointers are [`DevicePtr::NULL`] where not there.

use super::launch::{DevicePtr, Launch, Precision, int};
use super::structs::{Cast, Combine, Dropout, Elementwise, PixelNorm, PixelNormBackward, Upsample};
use crate::backend::Shape;

pub use super::tables::pixelwise::MAX_TERMS;

use bytemuck::{NoUninit, Zeroable};

const BLOCK: usize = 256;

/// 16-byte vectors of a pixel; the padding of the last stays zero in all of these operations.
fn vectors(channels: usize) -> usize {
    channels.div_ceil(8)
}

/// 16-byte vectors of a tensor.
fn count([n, h, w, c]: Shape) -> usize {
    n * h * w * vectors(c)
}

/// The lanes for one pixel: the least power of two that gives each lane at most one vector, and at most a warp.
fn lanes(vectors: usize) -> usize {
    vectors.next_power_of_two().min(32)
}

fn over<P: NoUninit>(precision: Precision, kernels: [&'static str; 2], threads: usize, params: &P) -> Launch {
    Launch::over(precision.pick(kernels), threads, BLOCK, params)
}

/// Pixel norm: y and, unless null, `silu` = mp_silu(y), both of shape `out`. If `down`, x has twice that height and
/// width.
pub fn pixel_norm(p: Precision, out: Shape, down: bool, memory: PixelNorm) -> Launch {
    let [n, h, w, c] = out;
    assert!(c.is_multiple_of(8), "the norm of {c} channels, expected a multiple of 8");
    let (pixels, vectors) = (n * h * w, vectors(c));
    let lanes = lanes(vectors);
    let params = PixelNorm {
        pixels: int(pixels),
        width: int(w),
        vectors: int(vectors),
        lanes: int(lanes),
        down: down.into(),
        ..memory
    };
    over(p, ["pixel_norm_f16", "pixel_norm_bf16"], pixels * lanes, &params)
}

/// Gradient of [`pixel_norm`] with respect to x, plus `acc` unless null: the result, of the shape of x, may be `acc`.
/// `grad` has `shape`.
pub fn pixel_norm_backward(p: Precision, shape: Shape, down: bool, memory: PixelNormBackward) -> Launch {
    let [n, h, w, c] = shape;
    assert!(c.is_multiple_of(8), "the norm of {c} channels, expected a multiple of 8");
    let (pixels, vectors) = (n * h * w, vectors(c));
    let lanes = lanes(vectors);
    let params = PixelNormBackward {
        pixels: int(pixels),
        width: int(w),
        vectors: int(vectors),
        lanes: int(lanes),
        down: down.into(),
        ..memory
    };
    over(p, ["pixel_norm_backward_f16", "pixel_norm_backward_bf16"], pixels * lanes, &params)
}

/// `from` of shape `small` upsampled by 2: y and, unless null, `silu` = mp_silu(y).
pub fn upsample(p: Precision, small: Shape, memory: Upsample) -> Launch {
    over(p, ["upsample_f16", "upsample_bf16"], count(small), &upsampling(small, memory))
}

/// Gradient of [`upsample`] with respect to `from`: `out` of shape `small`.
pub fn upsample_backward(p: Precision, small: Shape, grad: DevicePtr, out: DevicePtr) -> Launch {
    let params = upsampling(small, Upsample { from: grad, y: out, ..Zeroable::zeroed() });
    over(p, ["upsample_backward_f16", "upsample_backward_bf16"], count(small), &params)
}

fn upsampling(small: Shape, memory: Upsample) -> Upsample {
    Upsample { count: int(count(small)), width: int(small[2]), vectors: int(vectors(small[3])), ..memory }
}

/// `out` = mp_silu(scale x).
pub fn activate(p: Precision, shape: Shape, x: DevicePtr, scale: f64, out: DevicePtr) -> Launch {
    let params = Elementwise { a: x, b: DevicePtr::NULL, out, count: int(count(shape)), by: scale as f32 };
    over(p, ["activate_f16", "activate_bf16"], count(shape), &params)
}

/// `out` = b where |a| < clip, else 0: a is what was clipped, b is its gradient, and `out` may be `b`.
pub fn clip_backward(p: Precision, shape: Shape, clip: f64, memory: Elementwise) -> Launch {
    let params = Elementwise { count: int(count(shape)), by: clip as f32, ..memory };
    over(p, ["clip_backward_f16", "clip_backward_bf16"], count(shape), &params)
}

/// `out` = x, zero where [`rng::dropped`](crate::rng::dropped) says so, and times a factor elsewhere. `memory` also has
/// threshold, layer and factor.
pub fn dropout(p: Precision, shape: Shape, memory: Dropout) -> Launch {
    let (count, [n, ..]) = (count(shape), shape);
    let params = Dropout { count: int(count), image: int(count / n.max(1)), ..memory };
    over(p, ["dropout_f16", "dropout_bf16"], count, &params)
}

/// `out` = the sum of factor times tensor, at most [`MAX_TERMS`], of activations.
pub fn combine(p: Precision, shape: Shape, terms: &[(DevicePtr, f64)], out: DevicePtr) -> Launch {
    let params = combination(8 * count(shape), terms, out);
    over(p, ["combine_f16", "combine_bf16"], count(shape), &params)
}

/// `out` = the sum of factor times tensor, at most [`MAX_TERMS`], of `values` f32 numbers each.
pub fn combine_f32(values: usize, terms: &[(DevicePtr, f64)], out: DevicePtr) -> Launch {
    Launch::over("combine_f32", values.div_ceil(4), BLOCK, &combination(values, terms, out))
}

fn combination(values: usize, from: &[(DevicePtr, f64)], out: DevicePtr) -> Combine {
    assert!((1..=MAX_TERMS).contains(&from.len()), "a combination of {} terms", from.len());
    let (mut terms, mut factors) = ([DevicePtr::NULL; MAX_TERMS], [0.0; MAX_TERMS]);
    for (i, &(term, factor)) in from.iter().enumerate() {
        (terms[i], factors[i]) = (term, factor as f32);
    }
    Combine { terms, out, factors, count: int(from.len()), padding: 0, values: int(values) }
}

/// `to`, 16 bits [pixels, channels padded by zeros to a multiple of 8], = `from`, f32 [pixels, channels].
pub fn narrow(p: Precision, pixels: usize, channels: usize, from: DevicePtr, to: DevicePtr) -> Launch {
    cast(p, ["narrow_f16", "narrow_bf16"], pixels, channels, from, to)
}

/// `to`, f32 [pixels, channels], = `from`, 16 bits with channels padded to a multiple of 8.
pub fn widen(p: Precision, pixels: usize, channels: usize, from: DevicePtr, to: DevicePtr) -> Launch {
    cast(p, ["widen_f16", "widen_bf16"], pixels, channels, from, to)
}

fn cast(
    p: Precision,
    kernels: [&'static str; 2],
    pixels: usize,
    channels: usize,
    from: DevicePtr,
    to: DevicePtr,
) -> Launch {
    let vectors = vectors(channels);
    let (count, channels) = (pixels * vectors, int(channels));
    over(p, kernels, count, &Cast { from, to, count: int(count), vectors: int(vectors), channels, padding: 0 })
}
