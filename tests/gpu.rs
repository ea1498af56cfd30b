//! The tests that use a GPU as one program, for `make bundle`; `cargo test` runs them from their own files.

#[path = "attention_kernels.rs"]
mod attention_kernels;
#[path = "codec_kernels.rs"]
mod codec_kernels;
#[path = "conv_kernels.rs"]
mod conv_kernels;
#[path = "cuda.rs"]
mod cuda;
#[path = "embedding_kernels.rs"]
mod embedding_kernels;
#[path = "engine.rs"]
mod engine;
#[path = "pixelwise_kernels.rs"]
mod pixelwise_kernels;
