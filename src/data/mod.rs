//! Images and their conditions on disk: made by [`prepare`], read by [`dataset`].

pub mod danbooru;
pub mod dataset;
pub mod features;
pub mod prepare;
