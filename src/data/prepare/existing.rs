//! The dataset that is to be changed, opened.

use std::path::Path;

use super::report::PrepareError;
use crate::condition::vocabulary::Vocabulary;
use crate::data::dataset::{DatasetError, Split, open_shards};
use crate::data::pending::PendingView;
use crate::data::shard::{Shard, VOCABULARY_FILE};

/// A dataset that is there.
pub(super) struct ExistingDataset {
    pub vocabulary: Vocabulary,
    splits: Vec<Vec<Shard>>,
}

impl ExistingDataset {
    /// Opens all splits.
    ///
    /// # Errors
    /// There is no dataset, or it is damaged. `to` is what the message says it is needed for.
    pub fn open(dir: &Path, to: &'static str) -> Result<Self, PrepareError> {
        let view = PendingView::of(dir);
        let path = view.path(VOCABULARY_FILE);
        let none = || PrepareError::NoDataset { dir: dir.into(), to };
        if !path.exists() {
            return Err(none());
        }
        let vocabulary = Vocabulary::load(&path)?;
        let of = |split| match open_shards(dir, &view, split, &vocabulary) {
            Err(DatasetError::NoShards { .. }) => Ok(Vec::new()),
            other => other,
        };
        let splits = Split::ALL.into_iter().map(of).collect::<Result<Vec<_>, _>>()?;
        let there = Self { vocabulary, splits };
        if there.shards().next().is_none() { Err(none()) } else { Ok(there) }
    }

    /// Whether tags have other names by now than when the shards were made.
    pub fn renamed(&self) -> bool {
        let print = self.vocabulary.fingerprint();
        self.shards().any(|(.., shard)| shard.header.vocabulary.is_some_and(|made_with| made_with.tags != print))
    }

    /// The shards of a split.
    pub fn of(&self, split: Split) -> &[Shard] {
        &self.splits[split as usize]
    }

    /// All shards, with their splits and numbers.
    pub fn shards(&self) -> impl Iterator<Item = (Split, usize, &Shard)> {
        let of = |split| self.of(split).iter().enumerate().map(move |(number, shard)| (split, number, shard));
        Split::ALL.into_iter().flat_map(of)
    }
}
