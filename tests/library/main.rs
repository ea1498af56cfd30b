//! What calls the library: its numbers, files and plans; and that the drawing of its modules is right.

#[path = "../common"]
mod common {
    pub mod autoencoder;
    pub mod close;
    pub mod command;
    pub mod normals;
}

mod architecture;
mod codec;
mod formats;
mod golden;
mod gradients;
mod model_file;
mod plan;
mod tuning;
