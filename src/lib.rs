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
//! Examples that read `demo/` and `tests/` run in a checkout only, since the package has neither.
//!
//! Features: `cuda` (NVIDIA GPUs), `onnx` (taggers and other networks for features), `cli` (the program `edm2k`), `serve`
//! (its page and API), all on by default; `emulator` runs the CUDA kernels on the CPU, checked. A program that draws on
//! GPUs needs `edm2k = { path = "...", default-features = false, features = ["cuda"] }`.
//!
//! # What it does to your process
//!
//! It handles no signal, sets no panic hook, changes no environment variable, prints nothing and ends no process; the
//! program `edm2k` does. So:
//!
//! * Models and datasets are mapped into memory. If such a file is truncated meanwhile, or its disk fails, reading it
//!   raises SIGBUS (Windows: an in-page error), which kills a process that does not handle it.
//! * A panic inside tract, which reads ONNX files, is caught and becomes an error. The panic hook sees it before, and a
//!   process that aborts on panics ends there.
//! * Heavy work on the CPU is done in the global pool of [rayon](https://docs.rs/rayon), which may be in use already.
//! * On a Xeon with AMX, the first question whether the CPU computes in bf16 asks Linux to let the process use that unit.
//!   Stacks for signals must be larger then (`getauxval(AT_MINSIGSTKSZ)`).
//! * With `cuda`, opening a device loads NVIDIA's driver into the process. Training on several cards loads NCCL.
//! * On an NVIDIA GPU, measured choices of tiles are read from the user's cache (`~/.cache/edm2k`, macOS:
//!   `~/Library/Caches/edm2k`, Windows: `%LOCALAPPDATA%\edm2k`). Only `edm2k tune` writes there.
//!
//! Environment variables that are read:
//!
//! | variable | when | what it does |
//! |---|---|---|
//! | `EDM2K_UNTUNED` | a CUDA device is opened | `1`: tiles are guessed, whatever was measured |
//! | `EDM2K_OVERLAP` | a CUDA device is opened | `1`, `0`: launches of all plans may overlap, or of none |
//! | `XDG_CACHE_HOME`, `HOME`, `LOCALAPPDATA` | a CUDA device is opened | where the user's cache is |
//! | `EDM2K_NCCL`, `VIRTUAL_ENV`, `CONDA_PREFIX` | several cards train | where NCCL's library is |
//!
//! Those of launchers (`RANK`, `SLURM_PROCID`, `EDM2K_PORT` and their like), `EDM2K_RANKS_TIMEOUT` and `EDM2K_TOKEN`
//! are read by the program alone. On Windows, `SystemRoot` and `COMPUTERNAME` are read for messages. Libraries below
//! read their own: the CUDA driver `CUDA_VISIBLE_DEVICES`, rayon `RAYON_NUM_THREADS`.

/// Gives a type a `Debug` that says some of its fields. The others are large, or have no words.
macro_rules! debug {
    ($type:ty { $($field:ident),* } $([$($generics:tt)*])?) => {
        impl $(<$($generics)*>)? std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type))$(.field(stringify!($field), &self.$field))*.finish_non_exhaustive()
            }
        }
    };
}

pub mod backend;
pub mod codec;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod collective;
pub mod condition;
pub mod data;
mod device;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod formats;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod frechet;
#[doc(hidden)]
pub mod memory;
pub mod model;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
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
pub use device::{Device, DeviceName, NoDevice, Numbers};
pub use formats::fingerprint::{Fingerprint, Identity};
pub use formats::npy::NpyError;
pub use formats::pickle::PickleError;
pub use formats::safetensors::SafeError;
pub use formats::tar::TarError;
pub use formats::{FileError, LockError};
pub use pipeline::{Condition, Image, Pipeline, PipelineError, Request};
#[doc(hidden)]
pub use real::median;
// Values of JSON are in the signatures of conditions and images.
pub use serde_json;
