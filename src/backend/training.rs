//! What learning adds: loss, backward pass, optimizer.
//!
//! Gradients of activations and weights are those of the *sum* of the loss over all elements, so that they stay O(1).
//! The factor 1/batch comes in as [`OptimizerStep::grad_scale`].

use std::fmt;

use super::memory::Memory;
use super::{
    Backend, BackendError, EmbLayer, Embed, Embedding, Logvar, NetworkBackend, Operand, OperandGrad, PlanKey, Scale,
};
use crate::params::{ParamId, Portions, Whole};
use std::ops::Range;

/// Inputs of the training loss.
#[derive(Debug)]
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
#[derive(Debug)]
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
    /// Gradient with respect to the *stored* weight that the last [`TrainingBackend::optimizer_step`] used.
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
        /// Micro-batches of the step; more than one matters only through the eps of the normalisation.
        rounds: usize,
    },
}

impl Normalization {
    /// How often the stored weight is normalised.
    pub fn rounds(self) -> usize {
        match self {
            Self::Eval => 1,
            Self::Train { rounds } => rounds + 1,
        }
    }
}

/// Settings of one optimizer step.
#[derive(Clone, Debug)]
pub struct OptimizerStep<'a> {
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

impl OptimizerStep<'_> {
    /// Panics if it is no step of a backend that keeps so many moving averages.
    pub(super) fn check(&self, averages: usize) {
        assert!(self.step > 0, "steps are counted from 1");
        assert_eq!(self.ema_betas.len(), averages, "a decay for each moving average");
    }

    /// The learning rate and the factor of the second moment's root, both with Adam's bias correction.
    pub fn corrected(&self) -> (f64, f64) {
        let power = |beta: f64| 1.0 - beta.powi(self.step.min(i32::MAX as u64) as i32);
        (self.lr / power(self.betas.0), 1.0 / power(self.betas.1).sqrt())
    }
}

/// What an optimizer step saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// L2 norm of the gradient with respect to the stored weights.
    pub grad_norm: f64,
    /// Gradient values that were not finite and were replaced by zero.
    pub nonfinite: u64,
}

/// f32 values in the memory where they lie. Those of a slot are in an order of the device's own, which is the same for
/// all networks with the same table.
pub enum Values<'a> {
    /// In main memory.
    Host(&'a mut [f32]),
    /// In device memory, at this range of its bytes.
    Device(&'a dyn Memory, Range<usize>),
}

impl fmt::Debug for Values<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(values) => write!(f, "Host({} values)", values.len()),
            Self::Device(_, bytes) => write!(f, "Device({bytes:?})"),
        }
    }
}

/// Called with the gradients that are complete.
pub type Done<'a, B> = dyn FnMut(&mut B, Whole) + 'a;

/// As [`Body`](super::Body), for a pass that accumulates gradients. It calls [`Done`] with those that are complete.
pub type Pass<'a, B, E> =
    dyn FnMut(&mut B, &[<B as Backend>::Tensor], &mut Done<B>) -> Result<Vec<<B as Backend>::Tensor>, E> + 'a;

/// A device that trains a network.
pub trait TrainingBackend: NetworkBackend {
    /// Sets one slot of a parameter, values in PyTorch's order.
    ///
    /// # Errors
    /// [`BackendError::ParamSize`], [`BackendError::NotTraining`], or the device's.
    fn write_param(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError>;
    /// Reads one slot of a parameter, values in PyTorch's order.
    ///
    /// # Errors
    /// [`BackendError::NotTraining`], or the device's.
    fn read_param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError>;
    /// The portions in which [`exchange`](Self::exchange) gives out the values of a slot.
    fn portions(&self) -> &Portions;
    /// Gives the values of one of [`portions`](Self::portions) in a slot to `exchange`, one part after the other.
    /// `exchange` may replace them: by the sum of the gradients over several devices, or by the weights of another
    /// device. Call [`make_effective`](Self::make_effective) after a change of the weights.
    ///
    /// # Errors
    /// [`BackendError::NotTraining`], or the device's.
    fn exchange(&mut self, slot: Slot, portion: usize, exchange: &mut dyn FnMut(Values)) -> Result<(), BackendError>;
    /// As [`Backend::planned`], for a pass that says which gradients are complete. `done` is called with them, at least
    /// where another portion is complete. At that moment the device has been given everything that adds to them, and
    /// nothing of what follows.
    ///
    /// # Errors
    /// The device's, or those of `pass`. Where memory does not suffice, nothing has been added to the gradients.
    fn planned_pass<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Self::Tensor],
        pass: &mut Pass<Self, E>,
        done: &mut Done<Self>,
    ) -> Result<Vec<Self::Tensor>, E> {
        let _ = key;
        pass(self, inputs, done)
    }
    /// Makes the effective weights from a slot ([`Slot::Weight`] or [`Slot::Ema`]). To be called
    /// before the first forward pass and after every change of that slot.
    ///
    /// # Errors
    /// [`BackendError::NotTraining`], or the device's.
    fn make_effective(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError>;

    /// EDM2's loss (eq. 14, 15) with its gradients; the gradient of `out_gain` is accumulated.
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
    /// Gradient of [`NetworkBackend::pixel_norm`] with respect to its input `x`, plus `acc`.
    fn pixel_norm_backward(
        &mut self,
        x: &Self::Tensor,
        grad: &Self::Tensor,
        down: bool,
        acc: Option<Self::Tensor>,
    ) -> Self::Tensor;
    /// Gradient of [`NetworkBackend::upsample`]: the sum over each 2x2 square.
    fn upsample_backward(&mut self, grad: &Self::Tensor) -> Self::Tensor;
    /// Gradient of [`NetworkBackend::attention`] with respect to `qkv`.
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

    /// One pass over all parameters. It zeroes gradients that are not finite, projects them through the weight
    /// normalisation, and updates the weights by Adam and the moving averages. It clears the gradients and makes the
    /// effective weights of the next step (as [`Normalization::Train`] with the same rounds).
    ///
    /// # Errors
    /// [`BackendError::NotTraining`], or the device's.
    ///
    /// # Panics
    /// If the step's number is 0, or there is not a decay for each moving average.
    fn optimizer_step(&mut self, step: &OptimizerStep) -> Result<StepStats, BackendError>;
}
