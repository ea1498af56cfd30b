//! Images and their conditions on disk: made by [`prepare`](mod@prepare), read by [`dataset`].

pub mod dataset;
pub mod features;
pub mod prepare;
pub mod shard;
