//! The structs that kernels and their launches share, as declared in `kernels/`: made by `kernels/structs.rs`, part of the build
//! script, with a field's comment there as its documentation here.

use super::launch::{DevicePtr, TensorMap};
use bytemuck::{Pod, Zeroable};

include!(concat!(env!("OUT_DIR"), "/structs.rs"));
