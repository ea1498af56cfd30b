//! Launches of `kernels/precond.cu`: preconditioning, the loss and its gradients, logvar.
//!
//! Images are f32 `[n, height, width, channels]`; what the U-Net reads and writes is 16 bits, with the
//! channels padded to a multiple of 8.

use super::launch::{Launch, Precision, int};
use super::structs::{Logvar, LogvarBackward, LossParams, PrecondInput, PrecondOutput};
use super::tables::precond::LOSS_PIXELS;
use crate::backend::Shape;

const BLOCK: usize = 256;

/// `out` = [c_in x, 1, 0 ...], c + 1 channels padded to a multiple of 8. `shape` is that of x, but with as many images
/// as there are noise levels; the `x_images` images of x are taken in turn.
pub fn precond_input(p: Precision, shape: Shape, x_images: usize, sigma_data: f64, memory: PrecondInput) -> Launch {
    let [n, h, w, c] = shape;
    let vectors = (c + 1).div_ceil(8);
    let params = PrecondInput {
        pixels: int(n * h * w),
        per_image: int(h * w),
        channels: int(c),
        vectors: int(vectors),
        sigma_data: sigma_data as f32,
        x_pixels: int(x_images * h * w),
        ..memory
    };
    Launch::over(p.pick(["precond_input_f16", "precond_input_bf16"]), n * h * w * vectors, BLOCK, &params)
}

/// `out` = D(x; sigma), f32, from the U-Net's `raw` output (channels padded to a multiple of 8) and the
/// f32 scalar `gain`. `shape` and `x_images` as in [`precond_input`].
pub fn precond_output(p: Precision, shape: Shape, x_images: usize, sigma_data: f64, memory: PrecondOutput) -> Launch {
    let [n, h, w, c] = shape;
    let params = PrecondOutput {
        pixels: int(n * h * w),
        per_image: int(h * w),
        channels: int(c),
        vectors: int(c.div_ceil(8)),
        sigma_data: sigma_data as f32,
        x_pixels: int(x_images * h * w),
        ..memory
    };
    Launch::over(p.pick(["precond_output_f16", "precond_output_bf16"]), n * h * w, BLOCK, &params)
}

/// Bytes of [`LossParams::partial`].
pub fn loss_scratch([n, h, w, _]: Shape) -> usize {
    n * (h * w).div_ceil(LOSS_PIXELS) * 8
}

/// EDM2's loss of images of `shape`, and the gradients that start the backward pass. `partial` is of [`loss_scratch`] bytes.
pub fn loss(p: Precision, shape: Shape, sigma_data: f64, memory: LossParams) -> [Launch; 2] {
    let [n, h, w, c] = shape;
    let chunks = (h * w).div_ceil(LOSS_PIXELS);
    let params = LossParams {
        images: int(n),
        pixels: int(h * w),
        channels: int(c),
        vectors: int(c.div_ceil(8)),
        chunks: int(chunks),
        sigma_data: sigma_data as f32,
        ..memory
    };
    [
        Launch::new(p.pick(["loss_f16", "loss_bf16"]), [n * chunks, 1, 1], BLOCK, 0, &params),
        Launch::new("loss_reduce", [1, 1, 1], BLOCK, 0, &params),
    ]
}

/// Fourier features [n, channels] and logvar `[n]` of `n` noise levels.
pub fn logvar(p: Precision, n: usize, channels: usize, memory: Logvar) -> Launch {
    let params = Logvar { channels: int(channels), ..memory };
    Launch::new(p.pick(["logvar_f16", "logvar_bf16"]), [n, 1, 1], 32, 0, &params)
}

/// Adds the gradient of the logvar layer's weight to `grad_weight` `[channels]`, f32, from that of logvar `[n]`.
pub fn logvar_backward(n: usize, channels: usize, memory: LogvarBackward) -> Launch {
    let params = LogvarBackward { images: int(n), channels: int(channels), ..memory };
    Launch::over("logvar_backward", channels, BLOCK, &params)
}
