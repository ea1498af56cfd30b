//! The CUDA engine: the kernels in `kernels/`, run by a device or by the emulator.

#[cfg(feature = "emulator")]
pub mod emulated;
