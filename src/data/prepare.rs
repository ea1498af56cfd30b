//! From images and their tags to the shards of a [`dataset`](super::dataset).
//!
//! The images are those of a folder and a JSON-lines file with a line such as
//! `{"id": 7, "file": "a/b.png", "tags": ["x", "y"]}` for each, with an optional `"flip": true` where mirroring the
//! image leaves its meaning, and an optional `"repeats": 4` where training shall show it that often in an epoch; or
//! those of danbooru ([`danbooru`]). Each is decoded, cropped and resized ([`pictures`](crate::pictures)); one that would lose more than
//! the given share of its area by cropping is dropped. Then a codec may make latents of it. The condition is its
//! tags, or a feature divided by its norm: that in a file ([`features`](super::features)), or what a tagger makes of
//! the image before it is cropped and resized.
//!
//! Splits follow from the id alone: `id % M == 0` is validation, `== 1` test. So they stay
//! what they are when images are added. The vocabulary is counted on the training images.
//!
//! Records are ordered and cut into shards before anything is decoded. So a shard
//! depends on its records and the settings only: it is made again with the same bytes, in
//! any order, by any number of threads; one that is there already, and whole, is kept. Shards
//! that were made with other settings stop everything, unless no image is in any of them.
//!
//! What was kept and dropped is written to `summary.json` ([`Summary`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use half::f16;
use rayon::prelude::*;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::danbooru;
use super::dataset::{HEADER_KEY, Header, Kind, Split, VOCABULARY_FILE, VocabularyPrint, check_whole, write_shard};
use super::features::{FeatureError, Features};
use crate::codec::{Autoencoder, CodecError, LATENTS};
use crate::condition::tagger::Tagger;
use crate::condition::vocabulary::{Vocabulary, VocabularyError, check_tag};
use crate::condition::{Conditioning, unit_norm};
use crate::fingerprint::{Fingerprint, Identity};
use crate::formats::safetensors::{Dtype, SafeError, SafeFile};
use crate::formats::tar::TarError;
use crate::formats::{DirLock, LockError, input, write_atomically};
use crate::memory::{self, TooLarge};
use crate::onnx::OnnxError;
use crate::pictures::decode::{Image, MAX_BYTES, decode};
use crate::pictures::{Picture, fit};

/// Key of the settings in a shard's metadata.
const SETTINGS_KEY: &str = "settings";
/// Key of the list of records that are not in a shard though they belong there.
const DROPPED_KEY: &str = "dropped";
/// Key of the list of images whose colour profile could not be applied.
const PROFILES_KEY: &str = "profiles";
/// Name of the summary's file.
pub const SUMMARY_FILE: &str = "summary.json";
/// Images that are decoded at a time.
const CHUNK: usize = 64;
/// Longest line of a JSON-lines file.
const MAX_LINE: u64 = 1 << 24;

/// What to make of what.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder of the images: the metadata's file names are relative to it.
    pub images: PathBuf,
    /// The JSON-lines file.
    pub metadata: PathBuf,
    /// The images and the metadata are danbooru's: which of its posts to take.
    pub danbooru: Option<danbooru::Filter>,
    /// Conditions by image id, to take instead of tags; and if it is a `.npy`, that of the ids.
    pub features: Option<(PathBuf, Option<PathBuf>)>,
    /// The tagger whose features of the images are the conditions; and the tensor that has them.
    pub tagger: Option<(PathBuf, Option<String>)>,
    /// Directory of the dataset; created if it is missing.
    pub out: PathBuf,
    /// Target width and height in pixels.
    pub size: [u32; 2],
    /// sRGB colour behind transparent images.
    pub background: [u8; 3],
    /// Largest share of an image's area that cropping may take.
    pub max_crop: f64,
    /// Most tags in the vocabulary.
    pub vocabulary: usize,
    /// M of the splits; at least 3.
    pub validation_modulus: i64,
    /// Records per shard.
    pub shard_size: usize,
    /// Kept in the header: where the images are from.
    pub source: String,
    /// Kept in the header: their licence.
    pub licence: String,
}

/// What makes latents of pictures, wherever it computes.
pub struct Codec<'a> {
    /// What its latents are of.
    pub autoencoder: Autoencoder,
    /// Pixels for a latent, in each direction.
    pub factor: usize,
    /// How it does it.
    pub encode: &'a mut Encode<'a>,
}

/// Mean and standard deviation of a picture's latents, [H / factor, W / factor, C] each, in the network's scale.
pub type Encode<'a> = dyn FnMut(&Picture) -> Result<[Vec<f32>; 2], CodecError> + 'a;

/// What stops the preparation.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PrepareError {
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
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
    #[error(
        "{}: made before with {what} {found}, now {now}; remove the dataset or choose another \
         directory", path.display()
    )]
    OtherSettings { path: PathBuf, what: String, found: String, now: String },
    #[error("{}: a shard of another dataset; remove it or choose another directory", path.display())]
    Stray { path: PathBuf },
    #[error(
        "{}: not the vocabulary of these records, with tags renamed or not: {what}; remove it, and it is written anew",
        path.display()
    )]
    DamagedVocabulary { path: PathBuf, what: String },
    #[error("{0}; a smaller --shard-size needs less")]
    Memory(#[from] TooLarge),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Shard(#[from] SafeError),
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error(transparent)]
    Features(#[from] FeatureError),
    #[error(transparent)]
    Tagger(#[from] OnnxError),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    #[error("none of the {records} images could be kept ({dropped})")]
    NothingKept { records: usize, dropped: Drops },
}

/// What happens meanwhile, for a progress display; reported from any thread.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// So much of the input has been looked through, of so much.
    Reading {
        /// What it is.
        what: &'static str,
        /// How much has been read.
        done: u64,
        /// How much there is.
        total: u64,
    },
    /// So many records will be handled.
    Start(usize),
    /// So many records are done.
    Done(usize),
    /// Something that the user should know.
    Warning {
        /// What.
        text: &'a str,
    },
    /// An image cannot be used.
    Unreadable {
        /// Its name.
        file: &'a str,
        /// Why.
        why: &'a str,
    },
    /// An image has a colour profile that could not be applied.
    Unapplied {
        /// Its name.
        file: &'a str,
        /// That of the profile.
        profile: &'a str,
    },
    /// A shard that was there is damaged, and made again.
    Damaged {
        /// What is wrong with it.
        why: &'a str,
    },
    /// Tags have other names in the vocabulary's file than in the records.
    Renamed {
        /// How many.
        tags: usize,
        /// The first of them, in the records.
        was: &'a str,
        /// In the file.
        now: &'a str,
    },
    /// A shard is whole.
    Shard {
        /// Name of its file.
        name: &'a str,
        /// Images in it.
        images: usize,
        /// Whether it was there already.
        kept: bool,
    },
}

/// Why a record is not in the dataset; the first that applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Drop {
    /// Danbooru: it lacks a tag that it must have.
    LacksTags,
    /// Danbooru: a film or an animation, or something else that is no still image.
    NotStill,
    /// Danbooru: deleted there.
    Deleted,
    /// Danbooru: its artist does not want it shown.
    Banned,
    /// Danbooru: not of the ratings asked for.
    OtherRating,
    /// It would have lost more than the allowed share by cropping.
    Cropped,
    /// Danbooru: it would have to be enlarged.
    Small,
    /// Danbooru: its id was listed before.
    Repeated,
    /// Danbooru: no file bears its id.
    NoFile,
    /// No feature is known of it, or one that is zero or no number.
    NoFeature,
    /// It could not be decoded.
    Unreadable,
}

impl fmt::Display for Drop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Drop::LacksTags => "without the required tags",
            Drop::NotStill => "not a still image",
            Drop::Deleted => "deleted",
            Drop::Banned => "banned",
            Drop::OtherRating => "of another rating",
            Drop::Cropped => "of too different a shape (a larger --max-crop keeps more)",
            Drop::Small => "too small",
            Drop::Repeated => "listed before",
            Drop::NoFile => "without a file",
            Drop::NoFeature => "without a usable feature",
            Drop::Unreadable => "unreadable",
        })
    }
}

/// How many records were dropped for each reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Drops(pub BTreeMap<Drop, usize>);

impl Drops {
    pub(super) fn add(&mut self, drop: Drop) {
        *self.0.entry(drop).or_default() += 1;
    }
}

impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(drop, count)| format!("{count} {drop}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// Counts of one split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Images in the dataset.
    pub kept: usize,
    /// Of these: smaller than the target, hence enlarged.
    pub enlarged: usize,
    /// Of these: no tag in the vocabulary.
    pub untagged: usize,
    /// Of these: a colour profile that could not be applied, so that the colours were taken for sRGB.
    pub unapplied: usize,
}

/// What was made; in JSON as `summary.json` has it.
#[derive(Debug)]
pub struct Summary {
    /// Lines of the metadata.
    pub records: usize,
    /// Counts of train, validation and test, in this order.
    pub splits: [(Split, Counts); 3],
    /// What is not in the dataset, and why.
    pub dropped: Drops,
    /// Danbooru: distinct tags that cannot be tags here, as commas separate them.
    pub unusable_tags: usize,
    /// The vocabulary.
    pub vocabulary: Vocabulary,
}

impl Serialize for Summary {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let splits: BTreeMap<_, _> = self.splits.iter().map(|(split, counts)| (split.to_string(), counts)).collect();
        let mut all = serializer.serialize_struct("Summary", 5)?;
        all.serialize_field("records", &self.records)?;
        all.serialize_field("splits", &splits)?;
        all.serialize_field("dropped", &self.dropped)?;
        all.serialize_field("unusable_tags", &self.unusable_tags)?;
        all.serialize_field("vocabulary", &self.vocabulary.len())?;
        all.end()
    }
}

/// Where an image's bytes are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// All of a file.
    File(PathBuf),
    /// A part of an archive.
    Member {
        /// The archive.
        tar: Arc<Path>,
        /// Where the part begins.
        offset: u64,
        /// Its length.
        size: u64,
    },
}

impl Place {
    /// Number of bytes; 0 for a file that is not there.
    fn length(&self) -> u64 {
        match self {
            Self::File(path) => fs::metadata(path).map_or(0, |about| about.len()),
            Self::Member { size, .. } => *size,
        }
    }

    /// The bytes; or what is wrong with the file, which is no image then.
    ///
    /// # Errors
    /// The disk failed, or an archive is not there any more: nothing is known of the image.
    fn read(&self) -> io::Result<Result<Vec<u8>, String>> {
        let length = self.length();
        if length > MAX_BYTES {
            return Ok(Err(format!("{length} bytes, expected {MAX_BYTES} at most")));
        }
        match self {
            Self::File(path) => match input::read(path, MAX_BYTES) {
                Err(error) if input::is_of_the_file(&error) => Ok(Err(error.to_string())),
                read => read.map(Ok),
            },
            Self::Member { tar, offset, size } => {
                let mut file = input::open(tar)?;
                file.seek(SeekFrom::Start(*offset))?;
                let mut bytes = vec![0; *size as usize];
                file.read_exact(&mut bytes)?;
                Ok(Ok(bytes))
            }
        }
    }

    /// The file that it is in.
    fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Member { tar, .. } => tar,
        }
    }
}

/// An image and what is known of it.
pub(super) struct Record {
    pub id: i64,
    /// Name of its file.
    pub file: String,
    pub place: Place,
    /// Numbers of its tags in [`Records::tags`], in the order of their names.
    pub tags: Box<[u32]>,
    pub flip: bool,
    pub repeats: NonZeroU8,
}

/// The images to be prepared, in order.
#[derive(Default)]
pub(super) struct Records {
    /// How many there were at first.
    pub read: usize,
    pub list: Vec<Record>,
    pub tags: Tags,
    pub dropped: Drops,
    pub unusable_tags: usize,
}

/// Tags by number: a tag occurs on a million images, its text once.
#[derive(Default)]
pub(super) struct Tags {
    names: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Tags {
    /// The number of a tag.
    pub fn number(&mut self, tag: &str) -> u32 {
        if let Some(&number) = self.numbers.get(tag) {
            return number;
        }
        let number = self.names.len() as u32;
        self.numbers.insert(tag.into(), number);
        self.names.push(tag.into());
        number
    }

    fn name(&self, number: u32) -> &str {
        &self.names[number as usize]
    }
}

/// A line of the metadata of a folder.
#[derive(Deserialize)]
struct Line {
    id: i64,
    file: String,
    tags: Vec<String>,
    #[serde(default)]
    flip: bool,
    #[serde(default = "once")]
    repeats: NonZeroU8,
}

fn once() -> NonZeroU8 {
    NonZeroU8::MIN
}

/// An image whose colour profile could not be applied.
#[derive(Serialize, Deserialize)]
struct Unapplied {
    file: String,
    profile: String,
}

#[derive(Serialize, Deserialize)]
struct Dropped {
    id: i64,
    file: String,
    drop: Drop,
    why: String,
}

/// Prepares a dataset: of pictures, or with a codec of their latents.
///
/// # Errors
/// Unusable settings or metadata, an output directory that holds another dataset or cannot
/// be written. An unreadable image is no error: it is reported, counted and left out.
pub fn prepare(
    settings: &Settings,
    mut codec: Option<Codec>,
    report: &(dyn Fn(Event) + Sync),
) -> Result<Summary, PrepareError> {
    check_settings(settings, codec.as_ref())?;
    let lock = DirLock::exclusive(&settings.out)?;
    lock.warning().iter().for_each(|text| report(Event::Warning { text }));
    spare_metadata(settings)?;
    let source = Source::open(settings)?;
    let mut records = match &settings.danbooru {
        None => read_records(settings)?,
        Some(filter) => danbooru::read_records(settings, filter, report)?,
    };
    if let Source::Known(features) = &source {
        let Records { list, dropped, .. } = &mut records;
        list.retain(|record| {
            let known = features.contains(record.id);
            if !known {
                dropped.add(Drop::NoFeature);
            }
            known
        });
    }
    let Records { read, list, tags, mut dropped, unusable_tags } = records;
    let split_of = |record: &Record| match record.id.rem_euclid(settings.validation_modulus) {
        0 => Split::Validation,
        1 => Split::Test,
        _ => Split::Train,
    };
    if list.is_empty() {
        return Err(PrepareError::NothingKept { records: read, dropped });
    }
    let training = list.iter().filter(|record| split_of(record) == Split::Train);
    let sets = training.map(|record| record.tags.iter().map(|&tag| tags.name(tag)));
    let vocabulary = Vocabulary::most_frequent(sets, settings.vocabulary)?;
    if vocabulary.is_empty() && matches!(source, Source::Tags) {
        return Err(PrepareError::Setting {
            what: "the number of distinct tags on training images",
            found: "0".into(),
            expected: "at least 1".into(),
        });
    }
    let [width, height] = settings.size.map(u128::from);
    let factor = codec.as_ref().map_or(1, |codec| codec.factor as u128);
    let bytes = match &codec {
        None => 3 * width * height,
        Some(_) => 4 * LATENTS as u128 * (width / factor) * (height / factor),
    };
    let (images, ahead) = (list.len().min(settings.shard_size), list.len().min(CHUNK));
    let needed = images as u128 * bytes + ahead as u128 * 3 * width * height;
    memory::check(format!("making shards of {images} images of {width}x{height}"), needed)?;
    let made_with = made_with(settings, &list, &tags, codec.as_ref(), &source);

    let mut jobs = Vec::new();
    for split in Split::ALL {
        let members: Vec<_> = list.iter().filter(|record| split_of(record) == split).collect();
        let shards = members.len().div_ceil(settings.shard_size);
        for number in 0..shards {
            let end = members.len().min((number + 1) * settings.shard_size);
            let members = members[number * settings.shard_size..end].to_vec();
            jobs.push(Job { split, name: split.shard_name(number), shards, members });
        }
    }
    // Before anything is written: a dataset made otherwise stays as it is.
    let existing = existing_shards(&settings.out, &jobs, &made_with, report)?;
    let vocabulary_path = settings.out.join(VOCABULARY_FILE);
    // Beside shards it is theirs, and somebody may have renamed tags in it.
    if !vocabulary_path.exists() || existing.iter().all(Option::is_none) {
        vocabulary.save(&vocabulary_path)?;
    } else {
        check_vocabulary(&vocabulary_path, &vocabulary, report)?;
    }

    report(Event::Start(list.len()));
    let places = tags.names.iter().map(|tag| vocabulary.get(tag)).collect();
    let maker = Maker { settings, vocabulary: &vocabulary, places, source: &source, made_with: &made_with };
    let mut splits = Split::ALL.map(|split| (split, Counts::default()));
    for (job, existing) in jobs.iter().zip(existing) {
        let path = settings.out.join(&job.name);
        let (file, kept) = match existing {
            Some(file) => {
                report(Event::Done(job.members.len()));
                (file, true)
            }
            None => {
                maker.make(job, codec.as_mut(), &path, report)?;
                (SafeFile::open(&path)?, false)
            }
        };
        let made = read_counts(&file)?;
        for Dropped { drop, file, why, .. } in &made.dropped {
            dropped.add(*drop);
            if *drop == Drop::Unreadable {
                report(Event::Unreadable { file, why });
            }
        }
        made.unapplied.iter().for_each(|Unapplied { file, profile }| report(Event::Unapplied { file, profile }));
        report(Event::Shard { name: &job.name, images: made.counts.kept, kept });
        let sum = &mut splits[job.split as usize].1;
        sum.kept += made.counts.kept;
        sum.enlarged += made.counts.enlarged;
        sum.untagged += made.counts.untagged;
        sum.unapplied += made.counts.unapplied;
    }
    if splits.iter().all(|(_, counts)| counts.kept == 0) {
        return Err(PrepareError::NothingKept { records: read, dropped });
    }
    let summary = Summary { records: read, splits, dropped, unusable_tags, vocabulary };
    let path = settings.out.join(SUMMARY_FILE);
    write_atomically(&path, |out| {
        serde_json::to_writer_pretty(&mut *out, &summary)?;
        out.write_all(b"\n")
    })
    .map_err(|cause| PrepareError::Io { path, cause })?;
    Ok(summary)
}

fn check_settings(settings: &Settings, codec: Option<&Codec>) -> Result<(), PrepareError> {
    let wrong =
        |what, found: String, expected: &str| Err(PrepareError::Setting { what, found, expected: expected.into() });
    let [width, height] = settings.size;
    let size = format!("{width}x{height}");
    if !(1..=16384).contains(&width) || !(1..=16384).contains(&height) {
        return wrong("the size", size, "sides of 1 to 16384");
    }
    let factor = codec.map_or(1, |codec| codec.factor as u32);
    if !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
        return wrong("the size", size, &format!("multiples of the {factor} pixels that the codec has for a latent"));
    }
    if !(0.0..1.0).contains(&settings.max_crop) {
        return wrong("the largest crop", settings.max_crop.to_string(), "a share from 0 below 1");
    }
    if settings.validation_modulus < 3 {
        let found = settings.validation_modulus.to_string();
        return wrong("the validation modulus", found, "at least 3, or nothing is left to train on");
    }
    if settings.shard_size == 0 {
        return wrong("the shard size", "0".into(), "at least 1");
    }
    if !(1..=1 << 20).contains(&settings.vocabulary) {
        return wrong("the vocabulary", settings.vocabulary.to_string(), "1 to 1048576 tags");
    }
    Ok(())
}

/// Refuses metadata that lies where the dataset's own files will.
fn spare_metadata(settings: &Settings) -> Result<(), PrepareError> {
    let place = settings.metadata.canonicalize().ok();
    let ours = [VOCABULARY_FILE, SUMMARY_FILE].map(|name| Some(settings.out.canonicalize().ok()?.join(name)));
    if place.is_some() && ours.contains(&place) {
        return Err(PrepareError::Setting {
            what: "the metadata",
            found: settings.metadata.display().to_string(),
            expected: "another file than one that the dataset will be made of".into(),
        });
    }
    Ok(())
}

/// The lines of a JSON-lines file that are not blank, one after the other, to `each` with their number and where they
/// end in the file.
pub(super) fn read_lines(
    path: &Path,
    mut each: impl FnMut(&[u8], u64) -> Result<(), String>,
) -> Result<(), PrepareError> {
    let io_error = |cause| PrepareError::Io { path: path.into(), cause };
    let mut reader = BufReader::with_capacity(1 << 20, input::open(path).map_err(io_error)?);
    let head = reader.fill_buf().map_err(io_error)?;
    let array = head.trim_ascii_start().starts_with(b"[");
    let what = if array { Some("a list in JSON") } else { input::kind(head) };
    if let Some(what) = what.filter(|what| array || !what.contains("JSON") && *what != "empty") {
        return Err(PrepareError::NotLines { path: path.into(), what });
    }
    let (mut text, mut end) = (Vec::new(), 0);
    if head.starts_with(input::MARK) {
        reader.consume(input::MARK.len());
        end += input::MARK.len() as u64;
    }
    for line in 1.. {
        text.clear();
        let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut text).map_err(io_error)? as u64;
        if length == 0 {
            break;
        }
        end += length;
        let wrong = |what| PrepareError::Line { path: path.into(), line, what };
        if length == MAX_LINE {
            return Err(wrong(format!("longer than {MAX_LINE} bytes, expected a record a line")));
        }
        let text = text.trim_ascii();
        if !text.is_empty() {
            each(text, end).map_err(wrong)?;
        }
    }
    Ok(())
}

/// The records of a folder in order of their ids.
fn read_records(settings: &Settings) -> Result<Records, PrepareError> {
    fs::read_dir(&settings.images).map_err(|cause| PrepareError::Io { path: settings.images.clone(), cause })?;
    let mut records = Records::default();
    let mut ids = HashSet::new();
    read_lines(&settings.metadata, |text, _| {
        let text = str::from_utf8(text).map_err(|_| "not UTF-8")?;
        let mut line: Line = serde_json::from_str(text).map_err(|error| {
            let error = input::in_one_line(&error);
            format!("{error}; expected {{\"id\", \"file\", \"tags\", \"flip\" and \"repeats\" (optional)}}")
        })?;
        for tag in &line.tags {
            check_tag(tag).map_err(|what| format!("tag {what}"))?;
        }
        if !ids.insert(line.id) {
            return Err(format!("id {} occurs twice", line.id));
        }
        line.tags.sort_unstable();
        line.tags.dedup();
        let tags = line.tags.iter().map(|tag| records.tags.number(tag)).collect();
        let place = Place::File(settings.images.join(&line.file));
        let Line { id, file, flip, repeats, .. } = line;
        records.list.push(Record { id, file, place, tags, flip, repeats });
        Ok(())
    })?;
    if records.list.is_empty() {
        return Err(PrepareError::NoRecords { path: settings.metadata.clone() });
    }
    records.read = records.list.len();
    records.list.sort_unstable_by_key(|record| record.id);
    Ok(records)
}

/// Everything that a shard's bytes depend on. Of an image file that is its length: reading
/// it whole would cost as much as doing the work again, and its date changes with copying.
fn made_with(settings: &Settings, records: &[Record], tags: &Tags, codec: Option<&Codec>, source: &Source) -> Value {
    // FNV-1a, 64 bits: it recognises a change, nobody attacks it.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes.iter().chain(&[0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for record in records {
        add(&record.id.to_le_bytes());
        add(record.file.as_bytes());
        record.tags.iter().for_each(|&tag| add(tags.name(tag).as_bytes()));
        add(&[u8::from(record.flip), record.repeats.get()]);
        add(&record.place.length().to_le_bytes());
    }
    let [width, height] = settings.size;
    let [r, g, b] = settings.background;
    let mut all = json!({
        "size": format!("{width}x{height}"),
        "background": format!("#{r:02x}{g:02x}{b:02x}"),
        "max-crop": settings.max_crop,
        "vocabulary": settings.vocabulary,
        "validation-modulus": settings.validation_modulus,
        "shard-size": settings.shard_size,
        "source": settings.source,
        "licence": settings.licence,
        "records": format!("{} ({hash:016x})", records.len()),
    });
    let file = |name: &str, content: Fingerprint| json!({"name": name, "fingerprint": content});
    let (known, tagger) = match source {
        Source::Tags => (None, None),
        Source::Known(features) => (Some(json!(features.identity())), None),
        Source::Tagger(tagger) => {
            let mut made_by = file(&tagger.source(), tagger.network().fingerprint());
            made_by["node"] = tagger.network().node().into();
            (None, Some(made_by))
        }
    };
    let enlarge = settings.danbooru.as_ref().map(|filter| Value::from(filter.enlarge));
    let vae = codec.map(|codec| file(&codec.autoencoder.name, codec.autoencoder.fingerprint));
    for (key, value) in [("enlarge", enlarge), ("vae", vae), ("features", known), ("tagger", tagger)] {
        if let Some(value) = value {
            all[key] = value;
        }
    }
    all
}

/// Whether a setting is the same. Files are recognised by their content; older versions noted `NAME (CRC)`, and after a
/// comma the tensor: then by their name.
fn same_setting(before: Option<&Value>, now: Option<&Value>) -> bool {
    match (before, now) {
        (Some(Value::Object(before)), Some(Value::Object(now))) => {
            ["fingerprint", "node"].iter().all(|&key| before.get(key) == now.get(key))
        }
        (Some(Value::String(before)), Some(Value::Object(now))) => {
            let (name, rest) = before.rsplit_once(" (").unwrap_or((before, ""));
            let node = rest.split_once(", ").map(|(_, node)| node);
            let of = |key| now.get(key).and_then(Value::as_str);
            let first = name.split_once(" (").map_or(name, |(first, _)| first);
            of("name") == Some(first) && of("node").is_none_or(|now| Some(now) == node)
        }
        (before, now) => before == now,
    }
}

/// The shards of these jobs that are there and whole. Those that hold no image are made again, whatever they were made
/// with; any other that was made otherwise is an error.
fn existing_shards(
    out: &Path,
    jobs: &[Job],
    made_with: &Value,
    report: &(dyn Fn(Event) + Sync),
) -> Result<Vec<Option<SafeFile>>, PrepareError> {
    let io_error = |cause| PrepareError::Io { path: out.into(), cause };
    let mut there = HashMap::new();
    for entry in fs::read_dir(out).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let of_split = Split::ALL.iter().any(|split| name.starts_with(&format!("{split}-")));
        if of_split && name.ends_with(".safetensors") {
            there.insert(name, SafeFile::open(entry.path()));
        }
    }
    // A call that kept nothing, for the wrong folder say, must not stand in the way of the right one.
    let holds_nothing = |file: &SafeFile| {
        file.metadata().contains_key(SETTINGS_KEY) && file.shape("ids").is_ok_and(|shape| shape == [0])
    };
    if there.values().all(|file| file.as_ref().is_ok_and(holds_nothing)) {
        for name in there.keys() {
            fs::remove_file(out.join(name)).map_err(|cause| PrepareError::Io { path: out.join(name), cause })?;
        }
        return Ok(jobs.iter().map(|_| None).collect());
    }
    let ours: HashSet<_> = jobs.iter().map(|job| job.name.as_str()).collect();
    let files: Vec<_> = jobs.iter().map(|job| there.remove(&job.name).and_then(Result::ok)).collect();
    files.iter().flatten().try_for_each(|file| check_settings_of(file, made_with))?;
    if let Some(name) = there.keys().filter(|name| !ours.contains(name.as_str())).min() {
        return Err(PrepareError::Stray { path: out.join(name) });
    }
    let total = files.iter().flatten().count() as u64;
    let mut done = 0;
    let whole = |file: Option<SafeFile>| {
        let file = file?;
        let checked = check_whole(&file).and_then(|_| read_counts(&file));
        done += 1;
        report(Event::Reading { what: "shards that are there", done, total });
        match checked {
            Ok(_) => Some(file),
            Err(why) => {
                report(Event::Damaged { why: &why.to_string() });
                None
            }
        }
    };
    Ok(files.into_iter().map(whole).collect())
}

/// An error if a shard was made otherwise.
fn check_settings_of(file: &SafeFile, made_with: &Value) -> Result<(), PrepareError> {
    let path = file.path();
    let before = file.metadata().get(SETTINGS_KEY).and_then(|text| serde_json::from_str(text).ok());
    let (Some(Value::Object(before)), Value::Object(now)) = (before, made_with) else {
        return Err(PrepareError::Stray { path: path.into() });
    };
    let show = |settings: &Map<String, Value>, key: &String| match settings.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => match serde_json::from_value::<Identity>(other.clone()) {
            Ok(file) => file.to_string(),
            Err(_) => other.to_string(),
        },
        None => "none".into(),
    };
    for key in now.keys().chain(before.keys()) {
        if !same_setting(before.get(key), now.get(key)) {
            return Err(PrepareError::OtherSettings {
                path: path.into(),
                what: key.clone(),
                found: show(&before, key),
                now: show(now, key),
            });
        }
    }
    Ok(())
}

/// An error if a vocabulary's file is not what was counted, but for the names of tags.
fn check_vocabulary(path: &Path, counted: &Vocabulary, report: &(dyn Fn(Event) + Sync)) -> Result<(), PrepareError> {
    let damaged = |what: String| PrepareError::DamagedVocabulary { path: path.into(), what };
    let found = Vocabulary::load(path).map_err(|error| match error {
        VocabularyError::Io { .. } => error.into(),
        VocabularyError::Json { cause, .. } => damaged(cause.to_string()),
        VocabularyError::File { cause, .. } => damaged(cause.to_string()),
        other => damaged(other.to_string()),
    })?;
    let (found, counted) = (found.tags(), counted.tags());
    if found.len() != counted.len() {
        return Err(damaged(format!("it has {} tags, the records {}", found.len(), counted.len())));
    }
    let pairs = || found.iter().zip(counted);
    if let Some((found, counted)) = pairs().find(|(found, counted)| found.count != counted.count) {
        let (a, b) = (&found.tag, &counted.tag);
        return Err(damaged(format!("{a:?} is on {} images, {b:?} at its place on {}", found.count, counted.count)));
    }
    let renamed = || pairs().filter(|(found, counted)| found.tag != counted.tag);
    if let Some((first, counted)) = renamed().next() {
        report(Event::Renamed { tags: renamed().count(), was: &counted.tag, now: &first.tag });
    }
    Ok(())
}

struct Made {
    counts: Counts,
    dropped: Vec<Dropped>,
    unapplied: Vec<Unapplied>,
}

/// The counts of a shard, from what it holds.
fn read_counts(file: &SafeFile) -> Result<Made, SafeError> {
    let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
    let text = |key: &str| file.metadata().get(key).ok_or_else(|| malformed(format!("its metadata lacks {key}")));
    let dropped: Vec<Dropped> =
        serde_json::from_str(text(DROPPED_KEY)?).map_err(|error| malformed(error.to_string()))?;
    let enlarged: usize = text("enlarged")?.parse().map_err(|_| malformed("enlarged is no number".into()))?;
    let offsets = file.i64("tag_offsets")?;
    let untagged = offsets.windows(2).filter(|pair| pair[0] == pair[1]).count();
    let unapplied: Vec<Unapplied> = match file.metadata().get(PROFILES_KEY) {
        // Older shards did not look.
        None => Vec::new(),
        Some(text) => serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?,
    };
    let counts = Counts { kept: file.i64("ids")?.len(), enlarged, untagged, unapplied: unapplied.len() };
    Ok(Made { counts, dropped, unapplied })
}

struct Job<'a> {
    split: Split,
    name: String,
    shards: usize,
    members: Vec<&'a Record>,
}

/// What conditions are made of.
enum Source {
    Tags,
    Known(Box<Features>),
    Tagger(Tagger),
}

impl Source {
    fn open(settings: &Settings) -> Result<Self, PrepareError> {
        Ok(match (&settings.features, &settings.tagger) {
            (Some((path, ids)), _) => Self::Known(Features::open(path, ids.as_deref())?.into()),
            (None, Some((path, node))) => Self::Tagger(Tagger::open(path, node.as_deref())?),
            (None, None) => Self::Tags,
        })
    }

    /// Width of features.
    fn width(&self) -> Option<usize> {
        match self {
            Self::Tags => None,
            Self::Known(features) => Some(features.width()),
            Self::Tagger(tagger) => Some(tagger.network().width()),
        }
    }

    fn conditioning(&self) -> Conditioning {
        match self {
            Self::Tags => Conditioning::Tags,
            Self::Known(features) => features.conditioning().clone(),
            Self::Tagger(tagger) => tagger.conditioning(),
        }
    }
}

/// An image that can be kept.
struct Ready {
    /// At the target's size.
    picture: Picture,
    /// Whether it was smaller.
    enlarged: bool,
    /// See [`Image`].
    unapplied: Option<String>,
    /// Places of its tags in the vocabulary, ascending.
    tags: Vec<u32>,
    condition: Vec<f32>,
}

/// A feature as a condition.
fn feature(mut feature: Vec<f32>) -> Result<Vec<f32>, Refusal> {
    match unit_norm(&mut feature) {
        true => Ok(feature),
        false => Err((Drop::NoFeature, "its feature is zero or not finite".into())),
    }
}

/// What all shards are made with.
struct Maker<'a> {
    settings: &'a Settings,
    vocabulary: &'a Vocabulary,
    /// Where each of [`Records::tags`] is in the vocabulary.
    places: Vec<Option<u32>>,
    source: &'a Source,
    made_with: &'a Value,
}

/// Why an image is left out, and that in words.
type Refusal = (Drop, String);

impl Maker<'_> {
    /// What becomes of an image. A disk that fails is no property of the image: it stops everything.
    fn ready(&self, record: &Record) -> Result<Result<Ready, Refusal>, PrepareError> {
        let path = || record.place.path().into();
        let bytes = record.place.read().map_err(|cause| PrepareError::Io { path: path(), cause })?;
        Ok(bytes.map_err(|why| (Drop::Unreadable, why)).and_then(|bytes| self.made_of(record, &bytes)))
    }

    fn made_of(&self, record: &Record, bytes: &[u8]) -> Result<Ready, Refusal> {
        let Settings { size, background, max_crop, danbooru, .. } = self.settings;
        let unreadable = |why: String| (Drop::Unreadable, why);
        let Image { picture: image, unapplied } = decode(bytes, *background).map_err(unreadable)?;
        let [width, height] = [image.width(), image.height()].map(|side| side as u32); // at most 2^26
        let crop = fit::crop([width, height], *size);
        if !crop.within(*max_crop) {
            let lost = 100.0 * crop.lost;
            let why = format!("{width}x{height} loses {lost:.1} % by cropping to {}x{}", size[0], size[1]);
            return Err((Drop::Cropped, why));
        }
        if crop.enlarged && danbooru.as_ref().is_some_and(|filter| !filter.enlarge) {
            return Err((Drop::Small, format!("{width}x{height} is smaller than {}x{}", size[0], size[1])));
        }
        let mut tags: Vec<u32> = record.tags.iter().filter_map(|&tag| self.places[tag as usize]).collect();
        tags.sort_unstable();
        let condition = match self.source {
            Source::Tags => self.vocabulary.multi_hot(&tags),
            Source::Known(features) => feature(features.get(record.id).unwrap_or_default())?,
            Source::Tagger(tagger) => {
                let other = (*background != Tagger::BACKGROUND).then(|| decode(bytes, Tagger::BACKGROUND));
                let other = other.transpose().map_err(unreadable)?;
                let shown = other.as_ref().map_or(&image, |other| &other.picture);
                let made = tagger.features(shown, &record.file);
                feature(made.map_err(|why| (Drop::NoFeature, why.to_string()))?)?
            }
        };
        let picture = fit::fit(image, crop, *size).map_err(unreadable)?;
        Ok(Ready { picture, enlarged: crop.enlarged, unapplied, tags, condition })
    }

    fn make(
        &self,
        job: &Job,
        mut codec: Option<&mut Codec>,
        path: &Path,
        report: &(dyn Fn(Event) + Sync),
    ) -> Result<(), PrepareError> {
        // [N, 3, H, W] u8 or [N, 2C, h, w] f16; [N, D] f16
        let (mut images, mut conditions) = (Vec::new(), Vec::new());
        let (mut ids, mut flips, mut repeats) = (Vec::<i64>::new(), Vec::<u8>::new(), Vec::<u8>::new());
        let (mut tag_offsets, mut tag_indices) = (vec![0i64], Vec::<i32>::new());
        let (mut dropped, mut enlarged, mut profiles) = (Vec::new(), 0, Vec::new());
        thread::scope(|scope| -> Result<(), PrepareError> {
            // The next images are decoded while a codec works on these.
            let (sender, pictures) = sync_channel(1);
            scope.spawn(move || {
                let all = |chunk: &[&Record]| chunk.par_iter().map(|record| self.ready(record)).collect::<Vec<_>>();
                job.members.chunks(CHUNK).find(|chunk| sender.send(all(chunk)).is_err());
            });
            for (record, ready) in job.members.iter().zip(pictures.into_iter().flatten()) {
                let made = match ready? {
                    Ok(ready) => {
                        let bytes = match &mut codec {
                            None => Ok(planes(ready.picture.rgb(), 3).collect()),
                            Some(codec) => latents(codec, &ready.picture)?,
                        };
                        bytes.map(|bytes: Vec<u8>| (bytes, ready))
                    }
                    Err(refusal) => Err(refusal),
                };
                report(Event::Done(1));
                let (bytes, Ready { enlarged: was_smaller, unapplied, tags, condition, .. }) = match made {
                    Ok(made) => made,
                    Err((drop, why)) => {
                        dropped.push(Dropped { id: record.id, file: record.file.clone(), drop, why });
                        continue;
                    }
                };
                images.extend(bytes);
                conditions.extend(condition.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
                enlarged += usize::from(was_smaller);
                profiles.extend(unapplied.map(|profile| Unapplied { file: record.file.clone(), profile }));
                tag_indices.extend(tags.iter().map(|&tag| tag as i32));
                tag_offsets.push(tag_indices.len() as i64);
                ids.push(record.id);
                flips.push(u8::from(record.flip));
                repeats.push(record.repeats.get());
            }
            Ok(())
        })?;

        let n = ids.len();
        let condition_dim = self.source.width().unwrap_or(self.vocabulary.len());
        let [width, height] = self.settings.size.map(|side| side as usize);
        let (kind, factor, channels) = match &codec {
            None => (Kind::Images, 1, 3),
            Some(codec) => (Kind::Latents, codec.factor, LATENTS),
        };
        let header = Header {
            kind,
            height: height / factor,
            width: width / factor,
            channels,
            condition_dim,
            conditioning: self.source.conditioning(),
            autoencoder: codec.map(|codec| codec.autoencoder.clone()),
            vocabulary: Some(VocabularyPrint::of(self.vocabulary)),
            count: n,
            shards: job.shards,
            source: self.settings.source.clone(),
            licence: self.settings.licence.clone(),
        };
        let metadata = [
            (HEADER_KEY, json!(header).to_string()),
            (SETTINGS_KEY, self.made_with.to_string()),
            (DROPPED_KEY, json!(dropped).to_string()),
            (PROFILES_KEY, json!(profiles).to_string()),
            ("enlarged", enlarged.to_string()),
        ];
        let little = |values: &[i64]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let indices: Vec<u8> = tag_indices.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (tensor, dtype, planes) = kind.tensor();
        write_shard(
            path,
            &[
                (tensor, dtype, &[n, planes * channels, header.height, header.width], &images),
                ("conditions", Dtype::F16, &[n, condition_dim], &conditions),
                ("ids", Dtype::I64, &[n], &little(&ids)),
                ("tag_offsets", Dtype::I64, &[n + 1], &little(&tag_offsets)),
                ("tag_indices", Dtype::I32, &[tag_indices.len()], &indices),
                ("flips", Dtype::U8, &[n], &flips),
                ("repeats", Dtype::U8, &[n], &repeats),
            ],
            metadata.map(|(key, value)| (key.to_string(), value)).into(),
        )?;
        Ok(())
    }
}

/// [H, W, C] as [C, H, W].
fn planes<T: Copy>(values: &[T], channels: usize) -> impl Iterator<Item = T> {
    (0..channels).flat_map(move |c| values.iter().skip(c).step_by(channels).copied())
}

/// Mean and standard deviation of a picture's latents, [2C, h, w] in f16.
fn latents(codec: &mut Codec, picture: &Picture) -> Result<Result<Vec<u8>, Refusal>, CodecError> {
    let moments = (codec.encode)(picture)?;
    let halves: Vec<f16> = moments.iter().flat_map(|values| planes(values, LATENTS)).map(f16::from_f32).collect();
    Ok(match halves.iter().all(|x| x.is_finite()) {
        true => Ok(halves.iter().flat_map(|x| x.to_le_bytes()).collect()),
        false => Err((Drop::Unreadable, "the codec makes numbers of it that are not finite in f16".into())),
    })
}
