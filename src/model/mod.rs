//! The network: configuration, parameters, U-Net, preconditioning and loss.

pub mod config;
pub mod file;
pub mod precond;
pub mod snapshot;
pub mod unet;

pub use config::{Config, ConfigError};
pub use file::{Encoder, Model, ModelError, ModelFile, ModelMeta, ModelWriter, Precision};
pub use precond::Precond;
pub use snapshot::{Snapshot, SnapshotError};
