//! What an image is asked to show: tags, the vectors made of them, and a model that invents both.

pub mod vae;
pub mod vocabulary;
