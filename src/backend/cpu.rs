//! Plain Rust: the reference of every kernel, and the engine of machines without a GPU.
