//! What a dataset is to be like.

use std::path::PathBuf;

use super::report::PrepareError;
use crate::collective::Part;
use crate::data::dataset::Split;
use crate::data::shard::MAX_SIZES;
use crate::pictures::Size;
#[cfg(doc)]
use crate::pictures::fit;

/// What conditions are made of.
#[derive(Debug, Clone)]
pub enum ConditionInput {
    /// The images' tags.
    Tags,
    /// A file of conditions by image id; if it is a `.npy`, `ids` is the file of the ids.
    #[allow(missing_docs)] // the variant says it
    Features { path: PathBuf, ids: Option<PathBuf> },
    /// Features that a tagger makes of the images; `node` is the tensor that has them.
    #[allow(missing_docs)] // the variant says it
    Tagger { path: PathBuf, node: Option<String> },
}

/// What to make of the records.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What conditions are made of.
    pub conditions: ConditionInput,
    /// Directory of the dataset; created if it is missing.
    pub out: PathBuf,
    /// Which of the shards to make: every `of`th, from `number` on. A process that finds the shards of all other parts
    /// there writes the summary.
    pub part: Part,
    /// Target sizes; of several, each picture gets the one that [crops it least](fit::choose).
    pub sizes: Vec<Size>,
    /// sRGB colour behind transparent images.
    pub background: [u8; 3],
    /// Largest share of an image's area that cropping may take.
    pub max_crop: f64,
    /// Most tags of the vocabulary, which has the most frequent ones.
    pub vocabulary: usize,
    /// M, by which ids are divided to choose a split; at least 3.
    pub validation_modulus: i64,
    /// Records per shard.
    pub shard_size: usize,
    /// Kept in the header: where the images are from.
    pub source: String,
    /// Kept in the header: their licence.
    pub licence: String,
}

impl Settings {
    /// The split of the image with this id.
    pub(super) fn split(&self, id: i64) -> Split {
        match id.rem_euclid(self.validation_modulus) {
            0 => Split::Validation,
            1 => Split::Test,
            _ => Split::Train,
        }
    }

    /// The sizes as a user writes them.
    pub(super) fn named_sizes(&self) -> String {
        self.sizes.iter().map(Size::to_string).collect::<Vec<_>>().join(",")
    }

    /// Refuses settings that cannot be followed. `factor` is how many pixels the codec has for one latent pixel in each
    /// direction, 1 without a codec.
    pub(super) fn check(&self, factor: usize) -> Result<(), PrepareError> {
        let wrong =
            |what, found: String, expected: &str| Err(PrepareError::Setting { what, found, expected: expected.into() });
        if !(1..=MAX_SIZES).contains(&self.sizes.len()) {
            return wrong("the number of sizes", self.sizes.len().to_string(), &format!("1 to {MAX_SIZES}"));
        }
        for (at, &size) in self.sizes.iter().enumerate() {
            let sides = [size.width, size.height];
            if !sides.iter().all(|side| (1..=16384).contains(side)) {
                return wrong("the size", size.to_string(), "sides of 1 to 16384");
            }
            if !sides.iter().all(|side| side.is_multiple_of(factor as u32)) {
                let expected = format!("multiples of the {factor} pixels that the codec has for a latent");
                return wrong("the size", size.to_string(), &expected);
            }
            if self.sizes[..at].contains(&size) {
                return wrong("the list of sizes", self.named_sizes(), &format!("{size} once"));
            }
        }
        if !(0.0..1.0).contains(&self.max_crop) {
            return wrong("the largest crop", self.max_crop.to_string(), "a share from 0 below 1");
        }
        if self.validation_modulus < 3 {
            let found = self.validation_modulus.to_string();
            return wrong("the validation modulus", found, "at least 3, or nothing is left to train on");
        }
        if self.shard_size == 0 {
            return wrong("the shard size", "0".into(), "at least 1");
        }
        if !(1..=1 << 20).contains(&self.vocabulary) {
            return wrong("the vocabulary", self.vocabulary.to_string(), "1 to 1048576 tags");
        }
        Ok(())
    }
}
