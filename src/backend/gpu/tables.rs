//! Sizes of kernels and tables of their instances, as declared in `kernels/`, a module for each file: made by
//! `kernels/structs.rs`, part of the build script.

include!(concat!(env!("OUT_DIR"), "/tables.rs"));
