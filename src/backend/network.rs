//! The operations of a network's forward pass.
//!
//! * Convolutions are 3x3 with zero padding or 1x1, by the weight's shape, without bias.
//! * *Weights* are the effective ones that [`NetworkBackend::normalize`] made from the stored ones:
//!   `normalize(w) / sqrt(fan_in)` (EDM2, eq. 47 and 66). Gains are applied to a layer's output.
//! * `wa`, `wb` of an `mp_sum` with weight t of b (eq. 88): (1-t)/n and t/n, n = sqrt((1-t)^2 + t^2).

use super::{Backend, BackendError};
use crate::params::{ParamId, ParamTable};

/// Input of a convolution: one tensor, or the `mp_cat` of two, optionally through `mp_silu`.
///
/// The concatenation (x first, skip second; each times its scale, eq. 103) is never materialised.
#[derive(Debug)]
pub struct Operand<'a, T> {
    /// First (or only) input, [n, h, w, ca].
    pub x: &'a T,
    /// Factor of `x`.
    pub x_scale: f64,
    /// Second input [n, h, w, cb] and its factor.
    pub skip: Option<(&'a T, f64)>,
    /// Whether `mp_silu` is applied to the scaled values.
    pub silu: bool,
}

impl<T> Clone for Operand<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Operand<'_, T> {}

impl<'a, T> Operand<'a, T> {
    /// `x` as it is.
    pub fn of(x: &'a T) -> Self {
        Self { x, x_scale: 1.0, skip: None, silu: false }
    }

    /// `mp_silu(x)`.
    pub fn silu(x: &'a T) -> Self {
        Self { x, x_scale: 1.0, skip: None, silu: true }
    }
}

/// Gradients with respect to the inputs of an [`Operand`].
#[derive(Clone, Debug)]
pub struct OperandGrad<T> {
    /// With respect to `Operand::x`.
    pub x: T,
    /// With respect to `Operand::skip`, where there is one.
    pub skip: Option<T>,
}

/// The per-channel scales of one block: channels `offset..offset + channels` of what
/// [`NetworkBackend::emb_scales`] returned.
#[derive(Debug)]
pub struct Scale<'a, T> {
    /// `[n, 1, 1, all channels]`.
    pub all: &'a T,
    /// First channel of this block.
    pub offset: usize,
}

impl<T> Clone for Scale<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Scale<'_, T> {}

/// One `emb_linear` layer with its `emb_gain`.
#[derive(Clone, Copy, Debug)]
pub struct EmbLayer {
    /// Weight [channels, emb_channels].
    pub weight: ParamId,
    /// Gain, a scalar.
    pub gain: ParamId,
    /// Where its channels begin in the joint product.
    pub offset: usize,
    /// Output channels.
    pub channels: usize,
}

/// Parameters of the noise and label embedding.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    /// Fourier frequencies `[noise_channels]`; contain the 2 pi.
    pub freqs: ParamId,
    /// Fourier phases `[noise_channels]`; contain the 2 pi.
    pub phases: ParamId,
    /// `emb_noise` [emb_channels, noise_channels].
    pub noise: ParamId,
    /// `emb_label` [emb_channels, label_dim], unless unconditional.
    pub label: Option<ParamId>,
    /// Weight of the label in the `mp_sum`.
    pub label_balance: f64,
}

/// What [`NetworkBackend::embed`] returns.
#[derive(Clone, Debug)]
pub struct Embedding<T> {
    /// Fourier features [n, 1, 1, noise_channels].
    pub features: T,
    /// The embedding before its last `mp_silu`, [n, 1, 1, emb_channels].
    pub pre: T,
    /// The embedding [n, 1, 1, emb_channels].
    pub emb: T,
}

/// Which activations dropout zeroes in training (Srivastava et al. 2014; EDM2 does so before each block's second
/// convolution).
#[derive(Clone, Debug, PartialEq)]
pub struct Masks<T> {
    /// [`rng::mask_key`](crate::rng::mask_key) of each image, [n, 1, 1, 2].
    pub keys: T,
    /// Share that is zeroed, 0 to 1, in steps of 2^-16.
    pub rate: f64,
}

impl<T> Masks<T> {
    /// The threshold that [`rng::dropped`](crate::rng::dropped) compares with.
    pub fn threshold(&self) -> u32 {
        (self.rate * 65536.0).round() as u32
    }

    /// The factor of what is not zeroed, so that the mean stays the same.
    pub fn gain(&self) -> f64 {
        65536.0 / (65536.0 - f64::from(self.threshold()))
    }
}

/// Parameters of the learned uncertainty `logvar(sigma)`.
#[derive(Clone, Copy, Debug)]
pub struct Logvar {
    /// Fourier frequencies `[logvar_channels]`.
    pub freqs: ParamId,
    /// Fourier phases `[logvar_channels]`.
    pub phases: ParamId,
    /// Linear layer [1, logvar_channels].
    pub weight: ParamId,
}

/// A device that holds a network's parameters and computes its forward pass.
pub trait NetworkBackend: Backend {
    /// The parameters that this backend holds.
    fn table(&self) -> &ParamTable;
    /// Sets a stored parameter, values in PyTorch's order.
    ///
    /// # Errors
    /// [`BackendError::ParamSize`], or the device's.
    fn load_param(&mut self, id: ParamId, values: &[f32]) -> Result<(), BackendError>;
    /// Makes the effective weights from the stored ones. To be called before the first forward pass and after every
    /// change of a parameter.
    ///
    /// # Errors
    /// The device's.
    fn normalize(&mut self) -> Result<(), BackendError>;

    /// `[c_in * x, 1]`: the preconditioned input with the channel of ones, [n, h, w, c + 1], for noise levels
    /// [n, 1, 1, 1]. x may have fewer than n images, a divisor of n: then image i is x[i modulo their number]. So an
    /// image that is guided by its own network is there once, and computed twice.
    fn precond_input(&mut self, x: &Self::Tensor, sigma: &Self::Tensor, sigma_data: f64) -> Self::Tensor;
    /// D(x; sigma) = c_skip * x + c_out * out_gain * raw (EDM eq. 7), of x as in [`NetworkBackend::precond_input`].
    fn precond_output(
        &mut self,
        x: &Self::Tensor,
        raw: &Self::Tensor,
        sigma: &Self::Tensor,
        out_gain: ParamId,
        sigma_data: f64,
    ) -> Self::Tensor;
    /// Embedding of the noise level c_noise = ln(sigma)/4 and of the labels [n, 1, 1, label_dim]. Where there are fewer
    /// labels than n, they are taken in turn; without any they are zeros.
    fn embed(&mut self, p: &Embed, sigma: &Self::Tensor, labels: Option<&Self::Tensor>) -> Embedding<Self::Tensor>;
    /// All `emb_linear` layers as one product: `emb_gain * (W emb) + 1`, [n, 1, 1, sum of channels].
    fn emb_scales(&mut self, layers: &[EmbLayer], emb: &Self::Tensor) -> Self::Tensor;
    /// Fourier features [n, 1, 1, logvar_channels] and logvar [n, 1, 1, 1] of the noise levels.
    fn logvar(&mut self, p: &Logvar, sigma: &Self::Tensor) -> (Self::Tensor, Self::Tensor);
    /// Pixel norm over channels (eq. 30), after 2x2 averaging if `down`.
    fn pixel_norm(&mut self, x: &Self::Tensor, down: bool) -> Self::Tensor;
    /// Nearest-neighbour upsampling by 2.
    fn upsample(&mut self, x: &Self::Tensor) -> Self::Tensor;
    /// Convolution with no epilogue.
    fn conv(&mut self, w: ParamId, x: Operand<Self::Tensor>) -> Self::Tensor;
    /// Convolution, then `mp_silu(pre * scale)` per image and channel. Returns that, and `pre` if
    /// `keep` (the backward pass needs it).
    fn conv_scale_silu(
        &mut self,
        w: ParamId,
        x: Operand<Self::Tensor>,
        scale: Scale<Self::Tensor>,
        keep: bool,
    ) -> (Self::Tensor, Option<Self::Tensor>);
    /// Convolution, then `mp_sum(residual, conv, t)`, clipped to +-`clip` if given.
    fn conv_mp_sum(
        &mut self,
        w: ParamId,
        x: Operand<Self::Tensor>,
        residual: &Self::Tensor,
        t: f64,
        clip: Option<f64>,
    ) -> Self::Tensor;
    /// `mp_sum(main, conv, t)` of two convolutions, where that of `main` has one tap; clipped as in
    /// [`conv_mp_sum`](Self::conv_mp_sum). A device may compute both at once.
    fn convs_mp_sum(
        &mut self,
        w: ParamId,
        x: Operand<Self::Tensor>,
        main: (ParamId, Operand<Self::Tensor>),
        t: f64,
        clip: Option<f64>,
    ) -> Self::Tensor {
        let main = self.conv(main.0, main.1);
        self.conv_mp_sum(w, x, &main, t, clip)
    }
    /// `x`, where the values that `masks` drops in this layer are zero, and all others are multiplied by `factor`.
    /// Vector v = p ceil(c / 8) + k of an image holds channels 8 k to 8 k + 7 of pixel p.
    fn dropout(&mut self, x: &Self::Tensor, masks: &Masks<Self::Tensor>, layer: u32, factor: f64) -> Self::Tensor;
    /// Self-attention over the pixels: q, k, v are pixel-normalised per head, then
    /// softmax(q k / sqrt(c)) v. `qkv` is [n, h, w, heads * c * 3] with channel
    /// `(head * c + i) * 3 + {q, k, v}`; the result [n, h, w, heads * c].
    fn attention(&mut self, qkv: &Self::Tensor, heads: usize) -> Self::Tensor;
}
