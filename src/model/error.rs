//! What can be wrong with a model file.

use std::fmt;
use std::path::PathBuf;

use super::config::ConfigError;
use crate::codec::CodecFile;
use crate::condition::{MEANING_KEY, vae};
use crate::formats::safetensors::{Dtype, SafeError, SafeFile};

/// What can be wrong with a model file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ModelError {
    #[error("{0}")]
    File(#[from] SafeError),
    /// An entry of the metadata is missing or malformed.
    #[error("{}: metadata \"{key}\": {what}", path.display())]
    Metadata { path: PathBuf, key: &'static str, what: String },
    /// The config does not describe a network, or not one for the image size.
    #[error("{}: {cause}", path.display())]
    Config { path: PathBuf, cause: ConfigError },
    /// What is assumed about attention heads is impossible.
    #[error("{}: it does not say how wide attention heads are, and as in EDM2 they cannot be: {cause}", path.display())]
    Heads { path: PathBuf, cause: ConfigError },
    /// Options that were given do not go with each other, or with what the file's shapes tell.
    #[error("of the network in {}: {what}", path.display())]
    Given { path: PathBuf, what: String },
    /// It is something else.
    #[error("{}: {what}, expected a model of images", path.display())]
    Other { path: PathBuf, what: OtherFile },
    /// It holds more than a model.
    #[error("{}: a checkpoint of a run, expected a model of images", path.display())]
    Checkpoint { path: PathBuf },
    /// A tensor that the network of the config does not have.
    #[error("{}: tensor {name} is not a parameter of the network that the file's config describes", path.display())]
    Unknown { path: PathBuf, name: String },
    /// A weight is infinite or not a number, or does not fit the element type that it is to be saved in.
    #[error(
        "{}: tensor {name}: found {value} at {at}, expected finite {dtype} numbers{}", path.display(),
        if value.is_finite() { ", which are smaller" } else { "" }
    )]
    NotFinite { path: PathBuf, name: String, at: usize, value: f32, dtype: Dtype },
}

/// What a file that is no model of images may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum OtherFile {
    ConditionModel,
    Autoencoder,
    Conditions,
}

impl fmt::Display for OtherFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConditionModel => "a condition model",
            Self::Autoencoder => "an autoencoder",
            Self::Conditions => "conditions of images",
        })
    }
}

impl OtherFile {
    /// What a file is that is not a model, as far as its tensors and metadata tell.
    pub(super) fn of(file: &SafeFile) -> Option<Self> {
        match file {
            _ if vae::is_one(file) => Some(Self::ConditionModel),
            _ if CodecFile::is_one(file) => Some(Self::Autoencoder),
            _ if file.metadata().contains_key(MEANING_KEY)
                || ["ids", "features"].iter().all(|name| file.contains(name)) =>
            {
                Some(Self::Conditions)
            }
            _ => None,
        }
    }
}
