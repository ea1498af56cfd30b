//! The CUDA engine: the kernels in `kernels/`, run by a device or by the emulator.

pub mod conv;
#[cfg(feature = "emulator")]
pub mod emulated;
pub mod tiles;
