//! The operations of which networks are made, and the devices that compute them.
//!
//! A device offers *fused* operations, those that a GPU wants as one kernel each. They come in several traits, so that
//! whoever uses some does not see the others:
//!
//! ```text
//! Backend            tensors and their sums, plans       the solvers
//!  ├ NetworkBackend  a network's parameters, forward     the U-Net's forward pass, the sampler
//!  │  └ TrainingBackend  loss, backward, optimizer       its backward pass, the trainer
//!  └ CodecBackend    ordinary convolutions               the autoencoders; it owns no network
//! ```
//!
//! The traits are for calling, not for implementing outside of this crate: they gain operations whenever networks do.
//!
//! [`cpu::Cpu`] implements each operation by plain composition in f32 (or f64), which can be read beside the paper.
//! Every kernel is compared with it. The kernels are in [`gpu`].
//!
//! Conventions, for all backends:
//!
//! * Activations are NHWC: a shape is `[n, height, width, channels]`; per-image vectors are
//!   `[n, 1, 1, channels]`. A tensor handle is cheap to clone; its memory is free for reuse when
//!   the last clone is dropped, which is how a plan learns how long each buffer lives.
//! * Operations do not fail by themselves; a device's error comes out of the next call that
//!   returns a `Result`.
//!
//! ```
//! use edm2k::backend::{Backend, cpu::Cpu};
//!
//! let mut cpu = Cpu::<f32, ()>::for_codec(); // of no network
//! let x = cpu.upload([1, 1, 2, 1], &[1.0, 2.0]);
//! let y = cpu.linear_combination(&[(&x, 3.0), (&x, -0.5)]);
//! assert_eq!(cpu.shape(&y), [1, 1, 2, 1]);
//! assert_eq!(cpu.download(&y)?, [2.5, 5.0]);
//! # Ok::<(), edm2k::backend::BackendError>(())
//! ```

use std::any::Any;
use std::fmt::Debug;

pub mod codec;
pub mod cpu;
#[allow(missing_debug_implementations)]
pub mod gpu;
#[doc(hidden)]
pub mod memory;
mod network;
mod training;

pub use memory::{DevicePtr, Memory};
pub use network::{EmbLayer, Embed, Embedding, Logvar, Masks, NetworkBackend, Operand, OperandGrad, Scale};
pub use training::{
    Done, Loss, LossInput, Normalization, OptimizerStep, Pass, Slot, StepStats, TrainingBackend, Values,
};

/// `[n, height, width, channels]`.
pub type Shape = [usize; 4];

/// Why a device did not do what was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum DeviceError {
    /// Device memory does not suffice; sizes are in bytes. How much was asked for is none where the driver does not say it.
    #[error(
        "out of device memory: {}{purpose}, {free} MiB of {total} MiB free on {device}; {advice}",
        asked.map_or("no room for ".into(), |asked| format!("{} MiB asked for ", asked.div_ceil(1 << 20))),
        free = free >> 20, total = total >> 20
    )]
    OutOfMemory {
        device: String,
        asked: Option<u64>,
        purpose: &'static str,
        free: u64,
        total: u64,
        advice: &'static str,
    },
    /// The text names no device.
    #[error("{0}")]
    Unknown(String),
    /// This build has no code for it.
    #[error("{0}")]
    NotBuilt(String),
    /// NVIDIA's driver is not installed.
    #[error("no NVIDIA driver found ({library})")]
    NoDriver { library: &'static str },
    /// There is no such card.
    #[error("{0}")]
    Absent(String),
    /// It is there, but its driver does not work, or it cannot do what is asked.
    #[error("{0}")]
    Unavailable(String),
    /// Its convolutions cannot run the loop that was asked for.
    #[error("{0}")]
    NoLoop(String),
    /// Training would keep more moving averages than its kernels take.
    #[error("{found} moving averages, at most {most} on a GPU")]
    Averages { found: usize, most: usize },
    /// A kernel did something wrong, or the device was lost.
    #[error("{device}: {what}")]
    Failed { device: String, what: String },
}

/// Why an operation could not be done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum BackendError {
    /// A parameter was given the wrong number of values.
    #[error("parameter {name}: {found} values, expected {expected}")]
    ParamSize { name: String, found: usize, expected: usize },
    /// The backend was created without that: to sample only, or with fewer moving averages.
    #[error("{0:?} is not held: the network was loaded to sample only, or with fewer moving averages")]
    NotTraining(Slot),
    #[error("{0}")]
    Device(#[from] DeviceError),
}

impl BackendError {
    /// Whether it may help to take fewer images at a time.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Device(DeviceError::OutOfMemory { .. }))
    }
}

/// What tells one plan of a device from another, beside the shapes of its inputs. It is a value of any type that the
/// caller chooses.
pub trait PlanKey: Any + Debug {
    /// Whether the other one is of the same type and value.
    fn equals(&self, other: &dyn PlanKey) -> bool;
    /// A copy that a device can keep.
    fn boxed(&self) -> Box<dyn PlanKey>;
}

impl<K: Any + Debug + Clone + PartialEq> PlanKey for K {
    fn equals(&self, other: &dyn PlanKey) -> bool {
        (other as &dyn Any).downcast_ref() == Some(self)
    }

    fn boxed(&self) -> Box<dyn PlanKey> {
        Box::new(self.clone())
    }
}

/// What [`Backend::planned`] runs: from inputs on the device to results on it.
pub type Body<'a, B, E> = dyn FnMut(&mut B, &[<B as Backend>::Tensor]) -> Result<Vec<<B as Backend>::Tensor>, E> + 'a;

/// What every device does: it holds tensors and adds them up. It may record what is asked of it again and again as a
/// plan.
pub trait Backend: Sized {
    /// Handle of a tensor on the device.
    type Tensor: Clone;

    /// Shape of a tensor.
    fn shape(&self, t: &Self::Tensor) -> Shape;
    /// Copies host values (in NHWC order) to the device.
    fn upload(&mut self, shape: Shape, values: &[f32]) -> Self::Tensor;
    /// Waits for the device and copies a tensor to the host.
    ///
    /// # Errors
    /// What went wrong on the device since the last call that returned a `Result`.
    fn download(&mut self, t: &Self::Tensor) -> Result<Vec<f32>, BackendError>;

    /// Waits until the device has done what it had been given when this was called the last time. A caller that does so
    /// after each step keeps the device's pace, with one step of work always under way.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn pace(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Runs `body` on `inputs` and returns what it returns.
    ///
    /// A device may record what `body` asks for when it first meets `key` with inputs of these shapes, and replay that
    /// from then on. So what `body` does must depend on nothing else, and it must download nothing. It may be called
    /// several times. A plan within a plan becomes part of that one.
    ///
    /// # Errors
    /// The device's, or those of `body`.
    fn planned<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Self::Tensor],
        body: &mut Body<Self, E>,
    ) -> Result<Vec<Self::Tensor>, E> {
        let _ = key;
        body(self, inputs)
    }

    /// The sum of factor times tensor over `terms`, all of one shape. Solver updates and guidance are made of it.
    ///
    /// # Panics
    /// If there are no terms.
    fn linear_combination(&mut self, terms: &[(&Self::Tensor, f64)]) -> Self::Tensor;
    /// Splits n images into `parts` tensors of n / `parts`, in order.
    fn split(&mut self, x: &Self::Tensor, parts: usize) -> Vec<Self::Tensor>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_nobody_knows_is_not_told() {
        let lacks = |asked, purpose| {
            let (device, advice) = ("a card".into(), "take less");
            DeviceError::OutOfMemory { device, asked, purpose, free: 3 << 20, total: 9 << 20, advice }.to_string()
        };
        let rest = "3 MiB of 9 MiB free on a card; take less";
        let known = lacks(Some(5 << 20), "activations");
        assert_eq!(known, format!("out of device memory: 5 MiB asked for activations, {rest}"));
        assert_eq!(lacks(None, "a graph"), format!("out of device memory: no room for a graph, {rest}"));
    }
}
