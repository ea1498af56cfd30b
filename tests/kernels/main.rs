//! The CUDA kernels and the engine against the CPU backend, and the CUDA runtime: on the emulator, and on a GPU where there
//! is one. `make bundle` takes this program to GPU machines, where check.sh runs its modules one by one.
#![cfg(any(feature = "emulator", feature = "cuda"))]

#[path = "../common"]
mod common {
    pub mod close;
    #[cfg(all(feature = "emulator", feature = "cuda"))]
    pub mod driver;
    pub mod normals;
}
mod testbed;

mod attention;
mod codec;
mod conv;
mod cuda;
mod embedding;
mod engine;
mod pixelwise;
