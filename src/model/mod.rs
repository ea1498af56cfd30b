//! The network: configuration, parameters, U-Net, preconditioning and loss.
//!
//! ```
//! use edm2k::model::Model;
//!
//! let model = Model::load("demo/emoji.safetensors")?;
//! let millions = model.table.trained_values() as f64 / 1e6;
//! println!("{millions:.1} M parameters, {} MACs", model.net.macs(&model.table, 32, 32));
//! assert_eq!(model.meta.vocabulary.len(), model.net.config.label_dim);
//! # Ok::<(), edm2k::model::ModelError>(())
//! ```

pub mod config;
pub mod error;
pub mod file;
mod guess;
pub mod precond;
pub mod snapshot;
pub mod unet;

pub use config::{Config, ConfigError};
pub use error::ModelError;
pub use file::{ImageSpace, Model, ModelFile, ModelMeta, ModelWriter, Stored};
pub use precond::Precond;
pub use snapshot::{OfficialSnapshot, SnapshotError};

pub use crate::params::{ParamId, ParamKind, ParamSpec, ParamTable, Portions, Whole};
