//! By what a shard is recognised, and damage in it noticed.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CHECKSUMS, HEADER, SETTINGS, ShardError};
use crate::formats::fingerprint::Fingerprint;
use crate::formats::input;
use crate::formats::safetensors::{SafeError, SafeFile};

/// What a dataset's shards hold, by the names of their files, as its summary says. It is needed because a shard by
/// itself does not tell that it belongs to another dataset with the same records.
#[derive(Debug, Default, Deserialize)]
pub(in crate::data) struct Contents {
    #[serde(default)]
    shards: BTreeMap<String, Fingerprint>,
}

impl Contents {
    /// Reads them from a summary. A dataset need not have one, and older ones say nothing of shards.
    ///
    /// # Errors
    /// [`ShardError::Summary`]: there is one, and it is damaged.
    pub fn read(summary: &Path) -> Result<Self, ShardError> {
        let damaged = |what: String| ShardError::Summary { path: summary.into(), what };
        match input::text(summary) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            text => {
                let text = text.map_err(|error| damaged(error.to_string()))?;
                let summary: Value = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
                // A summary of another program may call something else `shards`.
                let known = summary.get("shards").is_some_and(Value::is_object);
                let contents = known.then(|| serde_json::from_value(summary)).transpose();
                contents.map(Option::unwrap_or_default).map_err(|error| damaged(error.to_string()))
            }
        }
    }

    /// Whether the summary knows this shard. It is an error if the summary says that a shard of this name has another
    /// content.
    pub fn check(&self, path: &Path, found: Option<Fingerprint>) -> Result<bool, ShardError> {
        match path.file_name().and_then(|name| self.shards.get(name.to_str()?)) {
            Some(&expected) if found != Some(expected) => {
                let found = found.map_or("none".into(), |found| found.to_string());
                Err(ShardError::OtherShard { path: path.into(), found, expected })
            }
            known => Ok(known.is_some()),
        }
    }
}

/// Fingerprint of all that a shard's tensors hold; none if it is of an older version, which kept no checksums.
pub(in crate::data) fn content(file: &SafeFile) -> Result<Option<Fingerprint>, SafeError> {
    Ok(Checksums::read(file)?.map(|sums| sums.content()))
}

/// Whether a shard was prepared, and all of its images were dropped.
pub(in crate::data) fn holds_nothing(file: &SafeFile) -> bool {
    file.metadata().contains_key(SETTINGS) && file.shape("ids").is_ok_and(|shape| shape == [0])
}

/// Fingerprints of all that is in a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checksums {
    /// Of the metadata without these checksums.
    pub metadata: Fingerprint,
    /// Of each tensor.
    pub tensors: BTreeMap<String, Fingerprint>,
}

impl Checksums {
    pub fn of_metadata(metadata: &HashMap<String, String>) -> Fingerprint {
        let others: BTreeMap<_, _> = metadata.iter().filter(|(key, _)| *key != CHECKSUMS).collect();
        Fingerprint::of(others.into_iter().flat_map(|(key, value)| [key, value]))
    }

    /// The checksums that a shard has; none if it is of an older version.
    pub fn read(file: &SafeFile) -> Result<Option<Self>, SafeError> {
        let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
        // Every version that noted the vocabulary also wrote checksums.
        let newer = file.metadata().get(HEADER).is_some_and(|header| header.contains("\"vocabulary\":"));
        let Some(text) = file.metadata().get(CHECKSUMS) else {
            return if newer { Err(malformed(format!("its {CHECKSUMS} are missing"))) } else { Ok(None) };
        };
        let sums: Self = serde_json::from_str(text).map_err(|e| malformed(format!("its {CHECKSUMS}: {e}")))?;
        if Self::of_metadata(file.metadata()) != sums.metadata {
            return Err(malformed("the checksum of its metadata is wrong".into()));
        }
        match file.names().eq(sums.tensors.keys().map(String::as_str)) {
            true => Ok(Some(sums)),
            false => Err(malformed(format!("its {CHECKSUMS} are of other tensors"))),
        }
    }

    /// Fingerprint of all that the shard's tensors hold.
    pub fn content(&self) -> Fingerprint {
        Fingerprint::of(self.tensors.iter().flat_map(|(name, sum)| [name.clone(), format!("{sum:?}")]))
    }

    pub fn check(&self, file: &SafeFile, tensor: &str) -> Result<(), SafeError> {
        match self.tensors.get(tensor) == Some(&file.fingerprint(tensor)?) {
            true => Ok(()),
            false => {
                let what = "its bytes are not those that were written (checksum)".into();
                Err(SafeError::Tensor { path: file.path().into(), name: tensor.into(), what })
            }
        }
    }
}

/// Reads all of a shard and compares it with its checksums. Returns whether it has any.
///
/// # Errors
/// [`SafeError`] names the tensor that is damaged.
pub fn check_whole(file: &SafeFile) -> Result<bool, SafeError> {
    let sums = Checksums::read(file)?;
    sums.iter()
        .flat_map(|sums| sums.tensors.keys().map(move |name| sums.check(file, name)))
        .collect::<Result<(), _>>()?;
    Ok(sums.is_some())
}
