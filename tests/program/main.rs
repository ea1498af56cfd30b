//! What `edm2k` does on the command line, and what the library does behind it, one module a subject; the examples and
//! check.sh too.

#[path = "../common"]
mod common {
    pub mod autoencoder;
    pub mod close;
    pub mod command;
    pub mod danbooru;
    #[cfg(all(feature = "emulator", feature = "cuda", unix))]
    pub mod driver;
    pub mod normals;
    #[cfg(feature = "onnx")]
    pub mod onnx;
    pub mod place;
    #[cfg(all(feature = "cli", feature = "serve", unix))]
    pub mod server;
    pub mod zip;
}

mod bench;
mod buckets;
mod check;
mod condition;
mod danbooru;
mod data;
mod edm2;
mod ema;
mod eval;
mod examples;
mod import;
mod info;
mod onnx;
mod page;
mod pipeline;
mod ranks;
mod sample;
mod serve;
mod train;
mod weights;
mod writing;
