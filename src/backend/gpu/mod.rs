//! The CUDA engine: the kernels in `kernels/`, run by a device or by the emulator.

#[doc(hidden)]
pub mod attention;
#[doc(hidden)]
pub mod codec;
#[doc(hidden)]
pub mod conv;
mod conv_hopper;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod cuda;
#[doc(hidden)]
pub mod embedding;
#[cfg(feature = "emulator")]
pub mod emulated;
#[doc(hidden)]
pub mod engine;
#[doc(hidden)]
pub mod launch;
#[doc(hidden)]
pub mod limits;
#[doc(hidden)]
pub mod params;
#[doc(hidden)]
pub mod pixelwise;
#[doc(hidden)]
pub mod precond;
#[doc(hidden)]
pub mod runtime;
#[doc(hidden)]
pub mod structs;
#[doc(hidden)]
pub mod tables;
#[doc(hidden)]
pub mod tensor;
#[doc(hidden)]
pub mod tiles;
#[doc(hidden)]
pub mod weights;

/// Whether Hopper's kernels are there: a program may have been compiled for other cards alone (EDM2K_CUDA_ARCHS).
#[cfg(feature = "cuda")]
const HAS_HOPPER: bool = cuda::HAS_HOPPER;
#[cfg(not(feature = "cuda"))]
const HAS_HOPPER: bool = true;

pub use launch::{Accum, ConvLoop, Math, Precision};
#[doc(hidden)]
pub use launch::{DevicePtr, Launch};
#[doc(hidden)]
pub use runtime::Runtime;
