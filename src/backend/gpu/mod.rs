//! The CUDA engine: the kernels in `kernels/`, run by a device or by the emulator.

pub mod attention;
pub mod codec;
pub mod conv;
mod conv_hopper;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod embedding;
#[cfg(feature = "emulator")]
pub mod emulated;
pub mod engine;
pub mod launch;
pub mod limits;
pub mod params;
pub mod pixelwise;
pub mod precond;
pub mod runtime;
pub mod structs;
pub mod tables;
pub mod tensor;
pub mod tiles;
pub mod weights;
