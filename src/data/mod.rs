//! Images and their conditions on disk: made by [`prepare`], read by [`dataset`].

pub mod dataset;
pub mod prepare;
