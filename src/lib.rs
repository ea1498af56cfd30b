//! EDM2 diffusion models, trained and sampled without a deep-learning framework.
//!
//! ```no_run
//! use edm2k::{Device, Pipeline, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("auto")?.fastest();
//! let mut pipeline = Pipeline::load(&device, "demo/emoji.safetensors")?;
//! let conditions = vec![pipeline.tags("green, heart", 0)?, pipeline.tags("cat, face", 0)?];
//! for image in pipeline.generate(&Request { conditions, seeds: vec![0, 1], ..Request::default() })? {
//!     std::fs::write(format!("{}.png", image.seed), image.png()?)?;
//! }
//! # Ok(()) }
//! ```
//!
//! From the top: [`pipeline`] makes pictures from a model file and [`train`] makes model files from a dataset, both on
//! a [`Device`]. Below them, [`sample`] has the solvers, [`condition`] what images are asked to show, [`data`]
//! datasets, [`pictures`] pixels, [`codec`] latents. The network of [`model`] is written once, in the operations of
//! [`backend`], which the CPU and GPUs implement. Everything else that is public is there for the command line and the
//! tests. It is not meant for others and may change at any time.
//!
//! Examples that read `demo/` and `tests/` run in a checkout only, since the published crate has neither.
//!
//! Features: `cuda` (NVIDIA GPUs), `onnx` (taggers and other networks for features), `cli` (the program `edm2k`), `serve`
//! (its page and API), all on by default; `emulator` runs the CUDA kernels on the CPU, checked.

pub mod backend;
pub mod codec;
#[doc(hidden)]
pub mod collective;
pub mod condition;
pub mod data;
mod device;
#[doc(hidden)]
pub mod formats;
#[doc(hidden)]
pub mod frechet;
#[doc(hidden)]
pub mod memory;
pub mod model;
#[doc(hidden)]
pub mod onnx;
#[doc(hidden)]
pub mod params;
pub mod pictures;
pub mod pipeline;
mod real;
#[doc(hidden)]
pub mod rng;
pub mod sample;
#[cfg(feature = "serve")]
pub mod serve;
#[doc(hidden)]
pub mod system;
pub mod train;
#[doc(hidden)]
pub mod tuning;
#[doc(hidden)]
pub mod verify;

pub use backend::DeviceError;
pub use device::{Backends, Device, DeviceName, NoDevice, Numbers, Work};
pub use pipeline::{Condition, Image, Pipeline, PipelineError, Request};
#[doc(hidden)]
pub use real::median;
