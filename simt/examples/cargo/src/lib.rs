//! A crate with kernels; tests/kernels.rs runs them on the CPU, checked: no GPU, no CUDA.
