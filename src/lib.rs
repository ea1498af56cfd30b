//! EDM2 diffusion models, trained and sampled without a deep-learning framework.

pub mod backend;
pub mod codec;
pub mod condition;
pub mod data;
mod device;
pub mod fingerprint;
pub mod formats;
pub mod frechet;
pub mod memory;
pub mod model;
pub mod onnx;
pub mod params;
pub mod pictures;
pub mod pipeline;
mod real;
pub mod rng;
pub mod sample;
pub mod system;
pub mod train;
pub mod verify;

pub use backend::DeviceError;
pub use device::{Backends, Device, DeviceName, NoDevice, Numbers, Work};
pub use pipeline::{Condition, Image, Pipeline, PipelineError, Request};
