//! The CUDA engine: the kernels in `kernels/`, run by a device or by the emulator.

#[cfg(feature = "emulator")]
pub mod attention;
#[cfg(feature = "emulator")]
pub mod conv;
#[cfg(feature = "emulator")]
pub mod emulated;
#[cfg(feature = "emulator")]
pub mod launch;
#[cfg(feature = "emulator")]
pub mod pixelwise;
#[cfg(feature = "emulator")]
pub mod precond;
#[cfg(feature = "emulator")]
pub mod tiles;
#[cfg(feature = "emulator")]
pub mod weights;
