//! What an image is asked to show: tags, and the vectors made of them.

pub mod vocabulary;
