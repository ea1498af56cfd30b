//! A shard of a dataset. Those who write it and those who read it take from here its name, the names, types and shapes
//! of its tensors, and the keys of its metadata; no other place knows them.
//!
//! Tensors of a shard with N images:
//!
//! | name | type | shape | content |
//! |---|---|---|---|
//! | `images` | U8 | [N, C, H, W] | pixels, or instead |
//! | `latents` | F16 | [N, 2C, H, W] | mean and standard deviation of the latents, as the model sees them |
//! | `conditions` | F16 | [N, D] | what the network is told |
//! | `ids` | I64 | `[N]` | numbers given by the maker of the dataset, each once |
//! | `tag_offsets` | I64 | [N + 1] | image i has `tag_indices[offsets[i]..offsets[i + 1]]` |
//! | `tag_indices` | I32 | `[sum]` | places in the vocabulary |
//! | `flips` | U8 | `[N]` | optional: 1 where mirroring leaves the meaning; default 0 |
//! | `repeats` | U8 | `[N]` | optional: times that training shows the image in an epoch; default 1 |
//!
//! Images of a dataset may be of several sizes, those of [`Header::sizes`]. Then `shapes`, U8 `[N]`, says which of them
//! each image has. Instead of `images` or `latents` there is a tensor for each size, such as `images.512x704` (width
//! times height), with the images of that size in their order. Which images a shard holds does not depend on their
//! sizes.
//!
//! The metadata's `dataset` is a JSON [`Header`], its `checksums` the fingerprints of all tensors and of the rest of
//! the metadata (`Checksums`); shards of older versions have none. The rest are `Notes` of the shard's making.
//! Everything is checked when a shard is opened, except the values of pixels and latents, which are only read when
//! asked for ([`check_whole`] does); opening therefore costs one pass over the conditions.

mod checksums;
mod notes;
mod read;
mod write;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::codec::Autoencoder;
use crate::condition::Conditioning;
use crate::condition::vocabulary::Vocabulary;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::safetensors::{Dtype, SafeError, SafeFile};

pub use checksums::check_whole;
pub(super) use checksums::{Contents, content, holds_nothing};
pub use notes::{DropCounts, DropReason};
pub(super) use notes::{DroppedRecord, Notes, Unapplied};
pub(super) use read::Shard;
pub(super) use write::{ShardImage, ShardImages};

/// Name of the vocabulary's file, beside the shards.
pub const VOCABULARY_FILE: &str = "vocabulary.json";
/// Name of the summary's file, beside the shards too.
pub const SUMMARY_FILE: &str = "summary.json";

/// The most sizes that the images of a dataset may have.
pub const MAX_SIZES: usize = 64;

/// Which images: those to learn from, to watch the loss on, or to leave alone until the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[allow(missing_docs)]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl Split {
    /// All splits.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// Name of the split's shard of this number, from 0.
    pub fn shard_name(self, number: usize) -> String {
        format!("{self}-{number:05}.safetensors")
    }

    /// The number of the split's shard of this name; `None` if no shard of it is called so. What only begins like one, as
    /// `train-old.safetensors` does, is somebody's own.
    pub fn shard_number(self, name: &str) -> Option<usize> {
        let digits = name.strip_prefix(&format!("{self}-"))?.strip_suffix(".safetensors")?;
        let number = digits.parse::<u32>().ok()? as usize;
        (self.shard_name(number) == name).then_some(number)
    }

    /// Whether a shard of any split is called so.
    pub(super) fn names(name: &str) -> bool {
        Self::ALL.iter().any(|split| split.shard_number(name).is_some())
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        })
    }
}

const HEADER: &str = "dataset";
const CHECKSUMS: &str = "checksums";
const SETTINGS: &str = "settings";

/// How a dataset keeps its pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Representation {
    /// U8 pixels; the model sees x / 127.5 - 1.
    Images,
    /// F16 means and standard deviations of latents, in the model's scale; the model sees mean + std * noise.
    Latents,
}

impl Representation {
    /// Name and type of the tensor, and how many planes it has for each channel.
    pub(super) fn tensor(self) -> (&'static str, Dtype, usize) {
        match self {
            Representation::Images => ("images", Dtype::U8, 1),
            Representation::Latents => ("latents", Dtype::F16, 2),
        }
    }
}

/// The JSON header of each shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Pixels or latents.
    pub kind: Representation,
    /// Height of the images or latents. If there are several sizes, a shard has that of the first one here, an open
    /// dataset that of the most frequent one.
    pub height: usize,
    /// Width of the images or latents, likewise.
    pub width: usize,
    /// Height and width of each size that images may have, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sizes: Vec<[usize; 2]>,
    /// Their channels.
    pub channels: usize,
    /// Width D of the conditions.
    pub condition_dim: usize,
    /// What the conditions are made of.
    #[serde(default)]
    pub conditioning: Conditioning,
    /// The autoencoder that made the latents; `None` for pixels, or if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Fingerprints of the vocabulary that the tags are places in; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<VocabularyPrint>,
    /// Images in this shard.
    pub count: usize,
    /// How many shards the split has.
    pub shards: usize,
    /// Where the images are from; may be empty.
    pub source: String,
    /// Their licence; may be empty.
    pub licence: String,
}

impl Header {
    /// Height and width of each size that images may have; one at least.
    pub fn all_sizes(&self) -> Vec<[usize; 2]> {
        if self.sizes.is_empty() { vec![[self.height, self.width]] } else { self.sizes.clone() }
    }

    /// The most bytes that an image takes in a shard.
    pub(super) fn image_bytes(&self) -> u128 {
        let (_, dtype, planes) = self.kind.tensor();
        let area = self.all_sizes().iter().map(|[height, width]| *height as u128 * *width as u128).max();
        (planes * self.channels * dtype.bitsize() / 8) as u128 * area.unwrap_or(0)
    }

    /// The tensors of the images: for each size its name, and the shape of one image in it.
    fn pixels(&self) -> Vec<(String, [usize; 3])> {
        let (name, _, planes) = self.kind.tensor();
        let of = |&[height, width]: &[usize; 2]| {
            let name = if self.sizes.is_empty() { name.to_owned() } else { format!("{name}.{width}x{height}") };
            (name, [planes * self.channels, height, width])
        };
        self.all_sizes().iter().map(of).collect()
    }

    /// The header of a file; none if it is no shard.
    ///
    /// # Errors
    /// [`ShardError::Header`].
    pub fn of(file: &SafeFile) -> Result<Option<Self>, ShardError> {
        let wrong = |what: String| ShardError::Header { path: file.path().into(), what };
        let Some(text) = file.metadata().get(HEADER) else { return Ok(None) };
        let header: Self = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        for (what, size) in [
            ("height", header.height),
            ("width", header.width),
            ("channels", header.channels),
            ("condition_dim", header.condition_dim),
            ("shards", header.shards),
        ] {
            if size == 0 || size > 1 << 20 {
                return Err(wrong(format!("{what} is {size}, expected 1 to {}", 1 << 20)));
            }
        }
        for (at, &size) in header.sizes.iter().enumerate() {
            let sides = size.iter().all(|side| (1..=1 << 20).contains(side));
            if !sides || header.sizes[..at].contains(&size) || header.sizes.len() > MAX_SIZES {
                return Err(wrong(format!("sizes are {:?}, expected up to {MAX_SIZES} different ones", header.sizes)));
            }
        }
        Ok(Some(header))
    }
}

/// What a vocabulary is recognised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabularyPrint {
    /// [`Vocabulary::fingerprint`] when the shard was made. Somebody may have renamed tags since.
    pub tags: Fingerprint,
    /// [`Vocabulary::fingerprint_of_counts`]; that does not change.
    pub counts: Fingerprint,
}

impl VocabularyPrint {
    /// The fingerprints of a vocabulary.
    pub fn of(vocabulary: &Vocabulary) -> Self {
        Self { tags: vocabulary.fingerprint(), counts: vocabulary.fingerprint_of_counts() }
    }
}

/// What can be wrong with a shard.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ShardError {
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{}: metadata \"{HEADER}\": {what}", path.display())]
    Header { path: PathBuf, what: String },
    #[error(
        "{}: not the vocabulary of {}, which was made with one of other counts ({expected}, found {found}): it is \
         damaged or of another dataset; `edm2k prepare` writes it anew where there is none, unless the dataset was changed later",
        shard.with_file_name(VOCABULARY_FILE).display(), shard.display()
    )]
    OtherVocabulary { shard: PathBuf, found: Fingerprint, expected: Fingerprint },
    #[error(
        "{}: not the shard that {SUMMARY_FILE} beside it knows ({expected}, found {found}): it is of another dataset, or \
         was made anew elsewhere; remove the shard, and `edm2k prepare` makes it again", path.display()
    )]
    OtherShard { path: PathBuf, found: String, expected: Fingerprint },
    #[error("{}: damaged ({what}); remove it, and nobody knows which shards were made together", path.display())]
    Summary { path: PathBuf, what: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_recognised_by_the_names_that_they_are_given() {
        for number in [0, 7, 99_999, 100_000, u32::MAX as usize] {
            for split in Split::ALL {
                assert_eq!(split.shard_number(&split.shard_name(number)), Some(number));
                assert!(Split::names(&split.shard_name(number)));
            }
        }
        assert_eq!(Split::Test.shard_number("train-00000.safetensors"), None);
        for odd in [
            "train-old.safetensors",
            "train-.safetensors",
            "train-0.safetensors",
            "train-000001.safetensors",
            "train-+0001.safetensors",
            "train--0001.safetensors",
            "train-4294967296.safetensors",
            "train-00000.safetensors.tmp",
            "train-00000",
            "TRAIN-00000.safetensors",
            "other-00000.safetensors",
            "",
        ] {
            assert!(!Split::names(odd), "{odd}");
        }
    }
}
