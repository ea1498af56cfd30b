//! The operations that the network is written in.
//!
//! A [`Backend`] offers the *fused* operations that a GPU wants, one kernel each; the network
//! ([`crate::model`]) is written once against it. [`cpu::Cpu`] implements each by plain
//! composition in f32 (or f64), readable against the paper, and is the reference of every kernel.
//!
//! Conventions, for all backends:
//!
//! * Activations are NHWC: a shape is `[n, height, width, channels]`; per-image vectors are
//!   `[n, 1, 1, channels]`. A tensor handle is cheap to clone; its memory is free for reuse when
//!   the last clone is dropped, which is how a plan learns how long each buffer lives.
//! * Convolutions are 3x3 with zero padding or 1x1, by the weight's shape, without bias.
//! * *Weights* here are the effective ones that [`Backend::prepare`] made from the stored ones:
//!   `normalize(w) / sqrt(fan_in)` (EDM2, eq. 47 and 66). Gains are applied to a layer's output.
//! * `wa`, `wb` of an `mp_sum` with weight t of b (eq. 88): (1-t)/n and t/n, n = sqrt((1-t)^2 + t^2).
//! * Gradients of activations and weights are those of the *sum* of the loss over all elements, so
//!   that they stay O(1); [`Step::grad_scale`] brings in the 1/batch.
//! * Operations do not fail by themselves; a device's error comes out of the next call that
//!   returns a `Result`.

pub mod codec;
pub mod cpu;
pub mod gpu;

use crate::params::{ParamId, ParamTable};

/// `[n, height, width, channels]`.
pub type Shape = [usize; 4];

/// Input of a convolution: one tensor, or the `mp_cat` of two, optionally through `mp_silu`.
///
/// The concatenation (x first, skip second; each times its scale, eq. 103) is never materialised.
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
    pub fn plain(x: &'a T) -> Self {
        Self { x, x_scale: 1.0, skip: None, silu: false }
    }

    /// `mp_silu(x)`.
    pub fn silu(x: &'a T) -> Self {
        Self { x, x_scale: 1.0, skip: None, silu: true }
    }
}

/// Gradients with respect to the inputs of an [`Operand`].
#[derive(Clone)]
pub struct OperandGrad<T> {
    /// Shape of `Operand::x`.
    pub x: T,
    /// Shape of `Operand::skip`, where there is one.
    pub skip: Option<T>,
}

/// The per-channel scales of one block: channels `offset..offset + channels` of what
/// [`Backend::emb_scales`] returned.
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

/// What [`Backend::embed`] returns.
#[derive(Clone)]
pub struct Embedding<T> {
    /// Fourier features [n, 1, 1, noise_channels].
    pub features: T,
    /// Before the last `mp_silu`, [n, 1, 1, emb_channels].
    pub pre: T,
    /// The embedding [n, 1, 1, emb_channels].
    pub emb: T,
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

/// Inputs of the training loss.
pub struct LossInput<'a, T> {
    /// Clean images [n, h, w, c].
    pub clean: &'a T,
    /// clean + sigma * noise, [n, h, w, c].
    pub noisy: &'a T,
    /// Output of the U-Net before `out_gain`, [n, h, w, c].
    pub raw: &'a T,
    /// Noise levels [n, 1, 1, 1].
    pub sigma: &'a T,
    /// Learned log variance [n, 1, 1, 1].
    pub logvar: &'a T,
    /// The gain of the output convolution.
    pub out_gain: ParamId,
    /// Standard deviation of the data.
    pub sigma_data: f64,
}

/// Loss of each image, and the gradients that start the backward pass.
pub struct Loss<T> {
    /// Sum over the image's elements of weight/exp(logvar) * (D - clean)^2 + logvar, [n, 1, 1, 1].
    pub per_image: T,
    /// With respect to `raw`.
    pub grad_raw: T,
    /// With respect to `logvar`.
    pub grad_logvar: T,
}

/// One of the values that a backend holds for every parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The stored (not normalised) weight, as Adam left it.
    Weight,
    /// Gradient with respect to the *stored* weight, after [`Backend::optimizer_step`];
    /// what the last step used.
    Grad,
    /// Adam's first moment.
    AdamM,
    /// Adam's second moment.
    AdamV,
    /// An exponential moving average of the weights.
    Ema(usize),
}

/// How stored weights become effective ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalization {
    /// Evaluation: normalised once.
    Eval,
    /// Training: the stored weight undergoes forced normalisation once for each micro-batch of the
    /// step, and the effective weight is the normalised stored one (EDM2, section 2.3).
    Train {
        /// Micro-batches of the step; more than one matters only by the eps of the normalisation.
        rounds: usize,
    },
}

/// Settings of one optimizer step.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// Learning rate.
    pub lr: f64,
    /// Adam's decay rates of the two moments.
    pub betas: (f64, f64),
    /// Adam's eps.
    pub eps: f64,
    /// Number of this step, from 1; for Adam's bias correction.
    pub step: u64,
    /// Factor of the accumulated gradients: 1 / batch.
    pub grad_scale: f64,
    /// Micro-batches that were accumulated, as in [`Normalization::Train`].
    pub rounds: usize,
    /// Decay of each moving average in this step.
    pub ema_betas: &'a [f64],
}

/// What an optimizer step saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// L2 norm of the gradient with respect to the stored weights.
    pub grad_norm: f64,
    /// Gradient values that were not finite and were replaced by zero.
    pub nonfinite: u64,
}

/// Why a device did not do what was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// Device memory does not suffice.
    #[error(
        "out of device memory: {asked} MiB asked for {purpose}, {free} MiB of {total} MiB free on {device}; {advice}",
        asked = asked.div_ceil(1 << 20), free = free >> 20, total = total >> 20
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        asked: u64,
        /// For what.
        purpose: &'static str,
        /// Bytes that were free.
        free: u64,
        /// Bytes that the device has.
        total: u64,
        /// Which option to lower.
        advice: &'static str,
    },
    /// There is no such device.
    #[error("{0}")]
    Absent(String),
    /// It is not one for which this program was built, or cannot do what is asked.
    #[error("{0}")]
    Unavailable(String),
    /// A kernel did something wrong, or the device was lost.
    #[error("{device}: {what}")]
    Failed {
        /// The device.
        device: String,
        /// What it reported.
        what: String,
    },
}

/// Why an operation could not be done.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A parameter was given the wrong number of values.
    #[error("parameter {name}: {found} values, expected {expected}")]
    ParamSize {
        /// Its name.
        name: String,
        /// Number of values given.
        found: usize,
        /// Number of values of its shape.
        expected: usize,
    },
    /// The backend was created without training state (gradients, moments, averages).
    #[error("{0:?} is not held: the network was loaded for sampling only")]
    NotTraining(Slot),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Shape and values of an input, NHWC.
pub type Input<'a> = (Shape, &'a [f32]);

/// What [`Backend::planned`] runs: from inputs on the device to results on it.
pub type Body<'a, B> = dyn FnMut(&mut B, &[<B as Backend>::Tensor]) -> Vec<<B as Backend>::Tensor> + 'a;

/// Executes the network's operations on one device. See the module's text for conventions.
pub trait Backend: Sized {
    /// Handle of a tensor on the device.
    type Tensor: Clone;

    // ---- memory and parameters ------------------------------------------------------------

    /// Shape of a tensor.
    fn shape(&self, t: &Self::Tensor) -> Shape;
    /// Copies host values (in NHWC order) to the device.
    fn upload(&mut self, shape: Shape, values: &[f32]) -> Self::Tensor;
    /// Waits for the device and copies a tensor to the host.
    fn download(&mut self, t: &Self::Tensor) -> Result<Vec<f32>, BackendError>;

    /// Runs `body` on `inputs` (shape and values, as for [`Backend::upload`]) and returns what it returns.
    ///
    /// A device may record what `body` asks for when it first meets `key` with inputs of these shapes, and replay
    /// that from then on. So what `body` does depends on nothing else, and it downloads nothing; it may be called
    /// several times.
    fn planned(
        &mut self,
        key: &str,
        inputs: &[Input],
        body: &mut Body<Self>,
    ) -> Result<Vec<Self::Tensor>, BackendError> {
        let _ = key;
        let inputs: Vec<_> = inputs.iter().map(|(shape, values)| self.upload(*shape, values)).collect();
        Ok(body(self, &inputs))
    }

    /// The parameters that this backend holds.
    fn table(&self) -> &ParamTable;
    /// Sets one slot of a parameter, values in PyTorch's order.
    fn write_param(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError>;
    /// Reads one slot of a parameter, values in PyTorch's order.
    fn read_param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError>;
    /// Makes the effective weights from a slot ([`Slot::Weight`] or [`Slot::Ema`]). To be called
    /// before the first forward pass and after every change of that slot.
    fn prepare(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError>;

    // ---- forward --------------------------------------------------------------------------

    /// `[c_in * x, 1]`: the preconditioned input with the channel of ones, [n, h, w, c + 1].
    fn precond_input(&mut self, x: &Self::Tensor, sigma: &Self::Tensor, sigma_data: f64) -> Self::Tensor;
    /// D(x; sigma) = c_skip * x + c_out * out_gain * raw (EDM eq. 7).
    fn precond_output(
        &mut self,
        x: &Self::Tensor,
        raw: &Self::Tensor,
        sigma: &Self::Tensor,
        out_gain: ParamId,
        sigma_data: f64,
    ) -> Self::Tensor;
    /// Embedding of the noise level c_noise = ln(sigma)/4 and the labels [n, 1, 1, label_dim];
    /// no labels = zeros.
    fn embed(&mut self, p: &Embed, sigma: &Self::Tensor, labels: Option<&Self::Tensor>) -> Embedding<Self::Tensor>;
    /// All `emb_linear` layers as one product: `emb_gain * (W emb) + 1`, [n, 1, 1, sum of channels].
    fn emb_scales(&mut self, layers: &[EmbLayer], emb: &Self::Tensor) -> Self::Tensor;
    /// Fourier features [n, 1, 1, logvar_channels] and logvar [n, 1, 1, 1] of the noise levels.
    fn logvar(&mut self, p: &Logvar, sigma: &Self::Tensor) -> (Self::Tensor, Self::Tensor);
    /// Pixel norm over channels (eq. 30), after 2x2 averaging if `down`.
    fn pixel_norm(&mut self, x: &Self::Tensor, down: bool) -> Self::Tensor;
    /// Nearest-neighbour upsampling by 2.
    fn upsample(&mut self, x: &Self::Tensor) -> Self::Tensor;
    /// Convolution, nothing after it.
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
    /// Self-attention over the pixels: q, k, v are pixel-normalised per head, then
    /// softmax(q k / sqrt(c)) v. `qkv` is [n, h, w, heads * c * 3] with channel
    /// `(head * c + i) * 3 + {q, k, v}`; the result [n, h, w, heads * c].
    fn attention(&mut self, qkv: &Self::Tensor, heads: usize) -> Self::Tensor;

    // ---- loss and backward ----------------------------------------------------------------

    /// EDM2's loss (eq. 14, 15) with gradients; that of `out_gain` is accumulated.
    fn loss(&mut self, input: LossInput<Self::Tensor>) -> Loss<Self::Tensor>;
    /// Accumulates the gradient of the logvar layer.
    fn logvar_backward(&mut self, p: &Logvar, features: &Self::Tensor, grad: &Self::Tensor);
    /// Accumulates the gradient of a convolution's weight: `gain` times x (*) grad.
    fn conv_wgrad(&mut self, w: ParamId, x: Operand<Self::Tensor>, grad: &Self::Tensor, gain: f64);
    /// Gradient of `gain` times the convolution with respect to the inputs of its operand (through
    /// scales and `mp_silu`), plus `acc.1 * acc.0`.
    fn conv_dgrad(
        &mut self,
        w: ParamId,
        grad: &Self::Tensor,
        gain: f64,
        x: Operand<Self::Tensor>,
        acc: Option<(OperandGrad<Self::Tensor>, f64)>,
    ) -> OperandGrad<Self::Tensor>;
    /// Gradient of `gain` times the convolution whose input is `mp_silu(pre * scale)`, with respect to
    /// `pre`. The gradient of the scales is written to channels `scale.offset..` of `grad_scales`.
    fn conv_dgrad_scale_silu(
        &mut self,
        w: ParamId,
        grad: &Self::Tensor,
        gain: f64,
        pre: &Self::Tensor,
        scale: Scale<Self::Tensor>,
        grad_scales: &mut Self::Tensor,
    ) -> Self::Tensor;
    /// Gradient through the clip whose result was `out`: zero where |out| reached `clip`.
    fn clip_backward(&mut self, grad: Self::Tensor, out: &Self::Tensor, clip: f64) -> Self::Tensor;
    /// Gradient of [`Backend::pixel_norm`] with respect to its input `x`, plus `acc`.
    fn pixel_norm_backward(
        &mut self,
        x: &Self::Tensor,
        grad: &Self::Tensor,
        down: bool,
        acc: Option<Self::Tensor>,
    ) -> Self::Tensor;
    /// Gradient of [`Backend::upsample`]: the sum over each 2x2 square.
    fn upsample_backward(&mut self, grad: &Self::Tensor) -> Self::Tensor;
    /// Gradient of [`Backend::attention`] with respect to `qkv`.
    fn attention_backward(&mut self, qkv: &Self::Tensor, heads: usize, grad: &Self::Tensor) -> Self::Tensor;
    /// A tensor of zeros for the gradients of the scales of all blocks.
    fn zero_scales_grad(&mut self, scales: &Self::Tensor) -> Self::Tensor;
    /// Accumulates the gradients of all `emb_linear` and `emb_gain`; returns that of `emb`.
    fn emb_scales_backward(
        &mut self,
        layers: &[EmbLayer],
        emb: &Self::Tensor,
        grad_scales: &Self::Tensor,
    ) -> Self::Tensor;
    /// Accumulates the gradients of the noise and label layers.
    fn embed_backward(
        &mut self,
        p: &Embed,
        e: &Embedding<Self::Tensor>,
        labels: Option<&Self::Tensor>,
        grad_emb: &Self::Tensor,
    );

    // ---- optimizer ------------------------------------------------------------------------

    /// One pass over all parameters: zeroes non-finite gradients, projects them through the weight
    /// normalisation, Adam, the moving averages; clears the gradients and makes the effective
    /// weights of the next step (as [`Normalization::Train`] with the same rounds).
    fn optimizer_step(&mut self, step: &Step) -> Result<StepStats, BackendError>;

    // ---- sampling -------------------------------------------------------------------------

    /// The sum of factor times tensor: solver updates and guidance. All of one shape.
    fn linear_combination(&mut self, terms: &[(&Self::Tensor, f64)]) -> Self::Tensor;
}
