//! File formats, each read with suspicion and written whole or not at all.

pub mod atomic;
pub mod fingerprint;
pub mod input;
pub mod mapped;
pub mod npy;
pub mod pickle;
pub mod safetensors;
pub mod tar;
pub mod torch;
pub mod weights;
pub mod zip;

pub use atomic::{AtomicFile, Claim, DirLock, LockError, write_atomically};
