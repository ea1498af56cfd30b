//! What a preparation reports: what stops it, what happens meanwhile, and what it has made.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::codec::CodecError;
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::data::dataset::{DatasetError, Split};
use crate::data::features::FeatureError;
use crate::data::shard::{DropCounts, ShardError};
use crate::formats::fingerprint::Fingerprint;
use crate::formats::safetensors::SafeError;
use crate::formats::tar::TarError;
use crate::formats::{At, FileError, LockError, write_atomically};
use crate::memory::TooLarge;
use crate::onnx::OnnxError;

/// What stops the preparation.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum PrepareError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{} line {line}: {what}", path.display())]
    Line { path: PathBuf, line: usize, what: String },
    #[error("{}: no records", path.display())]
    NoRecords { path: PathBuf },
    #[error("{}: it is {what}, expected a JSON object a line", path.display())]
    NotLines { path: PathBuf, what: &'static str },
    #[error("{}: neither archives (.tar) nor images named by their ids, such as 1003.png", path.display())]
    NoImages { path: PathBuf },
    #[error("{what} is {found}, expected {expected}")]
    Setting { what: &'static str, found: String, expected: String },
    #[error("{}: made before with {differs}; take the settings of before, or another directory", path.display())]
    OtherSettings { path: PathBuf, differs: String },
    #[error(
        "{}: made when {file} was another picture; {advice}",
        path.display()
    )]
    OtherPicture { path: PathBuf, file: String, advice: &'static str },
    #[error(
        "{}: made before with records {found}, now {now}; add the pictures that are new, change tags and conditions, or take \
         another directory", path.display()
    )]
    OtherRecords { path: PathBuf, found: String, now: String },
    #[error(
        "{}: {what}; add the pictures that are new, change tags and conditions, or take another directory", path.display()
    )]
    OtherContent { path: PathBuf, what: String },
    #[error("{}: pictures were added later; go on adding", path.display())]
    Added { path: PathBuf },
    #[error("{}: no dataset is there, or its vocabulary.json is missing; expected one to {to}", dir.display())]
    NoDataset { dir: PathBuf, to: &'static str },
    #[error("{}: {lack} for {count} images of the dataset, such as id {id}, expected one for each", path.display())]
    Lacking { path: PathBuf, lack: &'static str, count: usize, id: i64 },
    #[error("{}: a shard of another dataset; remove it or choose another directory", path.display())]
    Stray { path: PathBuf },
    #[error(
        "{}: not the vocabulary of these records, with tags renamed or not: {what}; remove it, and it is written anew",
        path.display()
    )]
    DamagedVocabulary { path: PathBuf, what: String },
    #[error("{0}; smaller shards need less")]
    Memory(#[from] TooLarge),
    #[error("{0}")]
    Lock(#[from] LockError),
    #[error("{0}")]
    Shard(#[from] ShardError),
    #[error("{0}")]
    Dataset(#[from] DatasetError),
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{0}")]
    Tar(#[from] TarError),
    #[error("{0}")]
    Features(#[from] FeatureError),
    #[error("{0}")]
    Tagger(#[from] OnnxError),
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("{0}")]
    Vocabulary(#[from] VocabularyError),
    #[error("none of the {records} images could be kept ({dropped})")]
    NothingKept { records: usize, dropped: DropCounts },
}

/// Is told what happens, from any thread.
pub type Report<'a> = &'a (dyn Fn(Event) + Sync);

/// What happens meanwhile, for a progress display.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)] // the variants say it
#[non_exhaustive]
pub enum Event<'a> {
    /// `done` of `total` of the input has been looked through; `what` says what kind of input that is.
    Reading { what: &'static str, done: u64, total: u64 },
    /// So many records will be handled.
    Start(usize),
    /// So many records are done.
    Done(usize),
    /// Something that the user should know.
    Warning { text: &'a str },
    /// An image cannot be used.
    Unreadable { file: &'a str, why: &'a str },
    /// An image has a colour profile of this name, which could not be applied.
    Unapplied { file: &'a str, profile: &'a str },
    /// A shard that was there is damaged, and made again.
    Damaged { why: &'a str },
    /// So many tags have other names in the vocabulary's file than in the records; `was` and `now` are those of the
    /// first.
    Renamed { tags: usize, was: &'a str, now: &'a str },
    /// A shard of so many images is whole; `kept` says whether it was there already.
    Shard { name: &'a str, images: usize, kept: bool },
}

/// Counts of one split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Images in the dataset.
    pub kept: usize,
    /// How many of these were smaller than the target, and so were enlarged.
    pub enlarged: usize,
    /// How many of these have no tag in the vocabulary.
    pub untagged: usize,
    /// How many of these have a colour profile that could not be applied, so that their colours were taken for sRGB.
    pub unapplied: usize,
}

/// Images of one size, of all splits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Width and height in pixels, such as 512x704.
    pub size: String,
    /// How many there are.
    pub images: usize,
}

/// What was made; in JSON as `summary.json` has it.
#[derive(Debug)]
pub struct Summary {
    /// Records in the metadata; when adding, in that of the new pictures.
    pub records: usize,
    /// Of these, those that were passed over: when adding, pictures that are there already; when retagging, those that are
    /// not there.
    pub skipped: usize,
    /// Counts of train, validation and test, in this order, of all the dataset.
    pub splits: [(Split, Counts); 3],
    /// The same images by their sizes.
    pub sizes: Vec<Bucket>,
    /// What is not in the dataset, and why.
    pub dropped: DropCounts,
    /// Danbooru: distinct tags that cannot be tags here, as commas separate them.
    pub unusable_tags: usize,
    /// The vocabulary.
    pub vocabulary: Vocabulary,
    /// The fingerprint of what each shard holds, by its file's name. Shards of older versions have none.
    pub shards: BTreeMap<String, Fingerprint>,
    /// Numbers of the parts whose shards are not all there. While there are any, the other fields are of this part
    /// alone, and `summary.json` is not written.
    pub lacking: Vec<usize>,
}

impl Serialize for Summary {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let splits: BTreeMap<_, _> = self.splits.iter().map(|(split, counts)| (split.to_string(), counts)).collect();
        let mut all = serializer.serialize_struct("Summary", 8)?;
        all.serialize_field("records", &self.records)?;
        all.serialize_field("skipped", &self.skipped)?;
        all.serialize_field("splits", &splits)?;
        if self.sizes.len() > 1 {
            all.serialize_field("sizes", &self.sizes)?;
        }
        all.serialize_field("dropped", &self.dropped)?;
        all.serialize_field("unusable_tags", &self.unusable_tags)?;
        all.serialize_field("vocabulary", &self.vocabulary.len())?;
        all.serialize_field("shards", &self.shards)?;
        all.end()
    }
}

impl Summary {
    /// Writes `summary.json`.
    pub(super) fn save(&self, path: &Path) -> Result<(), PrepareError> {
        let written = write_atomically(path, |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        });
        Ok(written.at(path)?)
    }
}
