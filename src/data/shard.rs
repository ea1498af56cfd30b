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

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::iter::repeat;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::codec::Autoencoder;
use crate::condition::Conditioning;
use crate::condition::vocabulary::Vocabulary;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::input;
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile, TensorOut};

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

    /// The number of the split's shard of this name; none if no shard of it is called so. What only begins like one, as
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
const DROPPED: &str = "dropped";
const PROFILES: &str = "profiles";
const ENLARGED: &str = "enlarged";
const PICTURES: &str = "pictures";

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
    /// The autoencoder that made the latents; none for pixels, or if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Fingerprints of the vocabulary that the tags are places in; none if nobody said.
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
    #[error(transparent)]
    File(#[from] SafeError),
    #[error("{}: metadata \"{HEADER}\": {what}", path.display())]
    Header { path: PathBuf, what: String },
    #[error(
        "{}: not the vocabulary of {}, which was made with one of other counts ({expected}, found {found}): it is \
         damaged or of another dataset; `edm2k prepare` writes it anew where there is none",
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

/// What a dataset's shards hold, by the names of their files, as its summary says. It is needed because a shard by
/// itself does not tell that it belongs to another dataset with the same records.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Contents {
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
pub(super) fn content(file: &SafeFile) -> Result<Option<Fingerprint>, SafeError> {
    Ok(Checksums::read(file)?.map(|sums| sums.content()))
}

/// Whether a shard was prepared, and all of its images were dropped.
pub(super) fn holds_nothing(file: &SafeFile) -> bool {
    file.metadata().contains_key(SETTINGS) && file.shape("ids").is_ok_and(|shape| shape == [0])
}

/// Fingerprints of all that is in a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Checksums {
    /// Of the metadata without these checksums.
    metadata: Fingerprint,
    /// Of each tensor.
    tensors: BTreeMap<String, Fingerprint>,
}

impl Checksums {
    fn of_metadata(metadata: &HashMap<String, String>) -> Fingerprint {
        let others: BTreeMap<_, _> = metadata.iter().filter(|(key, _)| *key != CHECKSUMS).collect();
        Fingerprint::of(others.into_iter().flat_map(|(key, value)| [key, value]))
    }

    /// The checksums that a shard has; none if it is of an older version.
    fn read(file: &SafeFile) -> Result<Option<Self>, SafeError> {
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
    fn content(&self) -> Fingerprint {
        Fingerprint::of(self.tensors.iter().flat_map(|(name, sum)| [name.clone(), format!("{sum:?}")]))
    }

    fn check(&self, file: &SafeFile, tensor: &str) -> Result<(), SafeError> {
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

/// An open shard, checked.
pub(super) struct Shard {
    pub file: SafeFile,
    pub header: Header,
    /// Fingerprint of its tensors; none if it is of an older version, which kept no checksums.
    pub content: Option<Fingerprint>,
    /// Whether the summary beside it knows it.
    pub vouched: bool,
    pub ids: Vec<i64>,
    pub flips: Vec<u8>,
    pub repeats: Vec<u8>,
    /// The size of each image, as its place in [`Header::all_sizes`].
    pub shapes: Vec<u8>,
    /// The row of each image in the tensor of its size.
    rows: Vec<u32>,
    /// Names of these tensors.
    pixels: Vec<String>,
    tag_offsets: Vec<usize>, // [N + 1]
    tag_indices: Vec<u32>,
}

impl Shard {
    /// Opens a shard whose tags are places in this vocabulary.
    ///
    /// # Errors
    /// See [`ShardError`]; the message names the file, the tensor, what was found and what was expected.
    pub fn open(path: &Path, vocabulary: &Vocabulary) -> Result<Self, ShardError> {
        let file = SafeFile::open(path)?;
        let missing = || ShardError::Header { path: path.into(), what: "it is missing".into() };
        let header = Header::of(&file)?.ok_or_else(missing)?;
        let (found, made_with) = (VocabularyPrint::of(vocabulary), header.vocabulary);
        if let Some(made_with) = made_with.filter(|made_with| made_with.counts != found.counts) {
            let (found, expected) = (found.counts, made_with.counts);
            return Err(ShardError::OtherVocabulary { shard: path.into(), found, expected });
        }
        Self::checked(file, header, vocabulary.len())
    }

    fn checked(file: SafeFile, header: Header, tags: usize) -> Result<Self, ShardError> {
        let n = header.count;
        let is = |name: &str, dtype: Dtype, shape: &[usize]| {
            let found = (file.dtype(name)?, file.shape(name)?);
            if found == (dtype, shape) {
                return Ok(());
            }
            let expected = format!("{dtype} {shape:?}");
            Err(file.unexpected(name, format!("{} {:?}", found.0, found.1), expected))
        };
        let pixels = header.pixels();
        let bytes_of = |name: &str, allowed: std::ops::RangeInclusive<u8>, expected: &str| {
            is(name, Dtype::U8, &[n])?;
            let bytes = file.bytes(name)?;
            match bytes.iter().position(|b| !allowed.contains(b)) {
                Some(at) => Err(file.unexpected(name, format!("{} at {at}", bytes[at]), expected)),
                None => Ok(bytes.to_vec()),
            }
        };
        let shapes = match header.sizes.len() {
            0 => None,
            sizes => Some(bytes_of("shapes", 0..=sizes as u8 - 1, &format!("places among {sizes} sizes"))?),
        };
        let mut counts = vec![0; pixels.len()];
        let mut row = |&shape: &u8| {
            counts[usize::from(shape)] += 1;
            counts[usize::from(shape)] - 1
        };
        let rows: Option<Vec<u32>> = shapes.as_ref().map(|shapes| shapes.iter().map(&mut row).collect());
        for (shape, (name, [planes, height, width])) in pixels.iter().enumerate() {
            let images = if shapes.is_some() { counts[shape] as usize } else { n };
            is(name, header.kind.tensor().1, &[images, *planes, *height, *width])?;
        }
        is("conditions", Dtype::F16, &[n, header.condition_dim])?;
        is("ids", Dtype::I64, &[n])?;
        is("tag_offsets", Dtype::I64, &[n.saturating_add(1)])?;

        let sums = Checksums::read(&file)?;
        if let Some(sums) = &sums {
            let small = |name: &&str| pixels.iter().all(|(pixels, _)| pixels != name);
            file.names().filter(small).try_for_each(|name| sums.check(&file, name))?;
        }
        let content = sums.map(|sums| sums.content());

        // Exponent bits all set: infinite or not a number.
        let conditions = file.bytes("conditions")?;
        let bad = conditions
            .par_chunks(2 * header.condition_dim)
            .position_any(|row| row.as_chunks::<2>().0.iter().any(|b| b[1] & 0x7c == 0x7c));
        if let Some(row) = bad {
            let found = format!("a NaN or infinity in row {row}");
            return Err(file.unexpected("conditions", found, "finite numbers").into());
        }

        let places = file.i64("tag_indices")?;
        is("tag_indices", Dtype::I32, &[places.len()])?;
        let mut tag_indices = Vec::with_capacity(places.len());
        for (at, place) in places.into_iter().enumerate() {
            match u32::try_from(place) {
                Ok(place) if (place as usize) < tags => tag_indices.push(place),
                _ => {
                    let found = format!("{place} at {at}");
                    let expected = format!("places in a vocabulary of {tags}");
                    return Err(file.unexpected("tag_indices", found, expected).into());
                }
            }
        }

        let offsets = file.i64("tag_offsets")?;
        let ordered = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        let ends = (offsets.first(), offsets.last());
        if !ordered || ends != (Some(&0), Some(&(tag_indices.len() as i64))) {
            let found = if ordered { format!("ends {ends:?}") } else { "a decrease".into() };
            let expected = format!("offsets rising from 0 to {}", tag_indices.len());
            return Err(file.unexpected("tag_offsets", found, expected).into());
        }

        let flips = if file.contains("flips") { bytes_of("flips", 0..=1, "0 or 1")? } else { vec![0; n] };
        let all = 1..=u8::MAX;
        let repeats = if file.contains("repeats") { bytes_of("repeats", all, "1 to 255")? } else { vec![1; n] };
        let ids = file.i64("ids")?;
        let tag_offsets = offsets.into_iter().map(|offset| offset as usize).collect();
        let shapes = shapes.unwrap_or_else(|| vec![0; n]);
        let rows = rows.unwrap_or_else(|| (0..n as u32).collect());
        let pixels = pixels.into_iter().map(|(name, _)| name).collect();
        let vouched = false;
        Ok(Self { file, header, content, vouched, ids, flips, repeats, shapes, rows, pixels, tag_offsets, tag_indices })
    }

    /// Places in the vocabulary of the tags of image `i` of this shard.
    pub fn tags(&self, i: usize) -> &[u32] {
        &self.tag_indices[self.tag_offsets[i]..self.tag_offsets[i + 1]]
    }

    /// [`Row::image`] of image `i`.
    pub fn image(&self, i: usize) -> &[u8] {
        let name = &self.pixels[usize::from(self.shapes[i])];
        self.row(name, self.rows[i] as usize)
    }

    /// The condition of image `i`, `[D]` in f16.
    pub fn condition(&self, i: usize) -> &[u8] {
        self.row("conditions", i)
    }

    fn row(&self, tensor: &str, i: usize) -> &[u8] {
        // Names and sizes were checked when the shard was opened.
        let bytes = self.file.bytes(tensor).unwrap_or_default();
        let length = bytes.len() / self.file.shape(tensor).map_or(1, |shape| shape[0]);
        &bytes[i * length..][..length]
    }
}

/// What a shard will hold for one image.
pub(super) struct Row<'a> {
    pub id: i64,
    /// Pixels `[C, H, W]` in u8, or moments of latents [2C, H, W] in f16.
    pub image: &'a [u8],
    /// Its size, as a place in [`Header::all_sizes`].
    pub shape: u8,
    /// `[D]`.
    pub condition: &'a [f32],
    /// Places in the vocabulary, ascending.
    pub tags: &'a [u32],
    pub flip: bool,
    pub repeats: NonZeroU8,
}

/// The images of a shard that is being made.
#[derive(Default)]
pub(super) struct Rows {
    /// The bytes of the images of each size.
    images: Vec<Vec<u8>>,
    shapes: Vec<u8>,
    conditions: Vec<u8>,
    ids: Vec<u8>,
    flips: Vec<u8>,
    repeats: Vec<u8>,
    tag_ends: Vec<u8>,
    tag_indices: Vec<u8>,
}

impl Rows {
    /// Adds an image.
    pub fn push(&mut self, row: &Row) {
        let shape = usize::from(row.shape);
        self.images.resize_with(self.images.len().max(shape + 1), Vec::new);
        self.images[shape].extend(row.image);
        self.shapes.push(row.shape);
        self.conditions.extend(row.condition.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
        self.ids.extend(row.id.to_le_bytes());
        self.flips.push(row.flip.into());
        self.repeats.push(row.repeats.get());
        self.tag_indices.extend(row.tags.iter().flat_map(|&tag| (tag as i32).to_le_bytes()));
        self.tag_ends.extend((self.tag_indices.len() as i64 / 4).to_le_bytes());
    }

    /// Writes the shard, atomically, with the checksums of all that is in it; `header.count` is taken from the rows.
    ///
    /// # Errors
    /// [`SafeError::Io`].
    pub fn write(&self, path: &Path, header: &Header, notes: &Notes) -> Result<(), SafeError> {
        let n = self.flips.len();
        let header = Header { count: n, ..header.clone() };
        let of_shape = |(shape, (name, [planes, height, width])): (u8, (String, [usize; 3]))| {
            let images = self.shapes.iter().filter(|&&of| of == shape).count();
            (name, [images, planes, height, width])
        };
        let pixels: Vec<(String, [usize; 4])> = (0..).zip(header.pixels()).map(of_shape).collect();
        let images = self.images.iter().map(Vec::as_slice).chain(repeat(&[][..]));
        let offsets = [&0i64.to_le_bytes(), &self.tag_ends[..]].concat();
        let (count, ends, conditions) = ([n], [n + 1], [n, header.condition_dim]);
        let indices = [self.tag_indices.len() / 4];
        let mut tensors: Vec<TensorOut> = pixels
            .iter()
            .zip(images)
            .map(|((name, shape), images)| (&**name, header.kind.tensor().1, &shape[..], images))
            .collect();
        tensors.extend::<[TensorOut; 6]>([
            ("conditions", Dtype::F16, &conditions, &self.conditions),
            ("ids", Dtype::I64, &count, &self.ids),
            ("tag_offsets", Dtype::I64, &ends, &offsets),
            ("tag_indices", Dtype::I32, &indices, &self.tag_indices),
            ("flips", Dtype::U8, &count, &self.flips),
            ("repeats", Dtype::U8, &count, &self.repeats),
        ]);
        if !header.sizes.is_empty() {
            tensors.push(("shapes", Dtype::U8, &count, &self.shapes));
        }
        let mut metadata = notes.metadata();
        metadata.insert(HEADER.into(), json!(header).to_string());
        let sum =
            |&(name, dtype, shape, bytes): &TensorOut| (name.into(), safetensors::fingerprint(dtype, shape, bytes));
        let sums =
            Checksums { metadata: Checksums::of_metadata(&metadata), tensors: tensors.iter().map(sum).collect() };
        metadata.insert(CHECKSUMS.into(), json!(sums).to_string());
        safetensors::write(path, &tensors, &metadata)
    }
}

/// What the maker of a shard notes in it: what it was made with, and what was to be in it and is not.
pub(super) struct Notes {
    /// Settings by name.
    pub settings: Map<String, Value>,
    /// Fingerprints of the files of all pictures that were looked at, including those that were dropped. Older shards
    /// have none.
    pub pictures: Vec<Fingerprint>,
    /// Records that were dropped when their pictures were looked at.
    pub dropped: Vec<Dropped>,
    /// Images whose colours could not be converted.
    pub unapplied: Vec<Unapplied>,
    /// Images that were smaller than the target.
    pub enlarged: usize,
}

impl Notes {
    /// The settings that a shard was made with; none if [`prepare`](super::prepare) did not make it.
    pub fn settings(file: &SafeFile) -> Option<Map<String, Value>> {
        serde_json::from_str(file.metadata().get(SETTINGS)?).ok()
    }

    /// The notes of a shard.
    ///
    /// # Errors
    /// Some are missing or damaged.
    pub fn read(file: &SafeFile) -> Result<Self, SafeError> {
        let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
        let text = |key: &str| file.metadata().get(key).ok_or_else(|| malformed(format!("its metadata lacks {key}")));
        let parsed = |error: serde_json::Error| malformed(error.to_string());
        Ok(Self {
            settings: Self::settings(file).ok_or_else(|| malformed(format!("its metadata lacks {SETTINGS}")))?,
            dropped: serde_json::from_str(text(DROPPED)?).map_err(parsed)?,
            enlarged: text(ENLARGED)?.parse().map_err(|_| malformed(format!("{ENLARGED} is no number")))?,
            // Older versions did not look at colour profiles.
            unapplied: text(PROFILES).map_or(Ok(Vec::new()), |text| serde_json::from_str(text)).map_err(parsed)?,
            pictures: text(PICTURES).map_or(Ok(Vec::new()), |text| serde_json::from_str(text)).map_err(parsed)?,
        })
    }

    fn metadata(&self) -> HashMap<String, String> {
        let all = [
            (SETTINGS, json!(self.settings).to_string()),
            (DROPPED, json!(self.dropped).to_string()),
            (PROFILES, json!(self.unapplied).to_string()),
            (ENLARGED, self.enlarged.to_string()),
            (PICTURES, json!(self.pictures).to_string()),
        ];
        all.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// An image whose colours were taken for sRGB though the file says otherwise.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Unapplied {
    pub file: String,
    pub profile: String,
}

/// A record that is not in its shard.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Dropped {
    pub id: i64,
    pub file: String,
    pub drop: Drop,
    pub why: String,
}

/// Why a record is not in the dataset. The first reason that applies counts.
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
    /// No feature is known for it, or only one that is zero or not a number.
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
    /// Counts one more.
    pub fn add(&mut self, drop: Drop) {
        *self.0.entry(drop).or_default() += 1;
    }
}

impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(drop, count)| format!("{count} {drop}")).collect();
        f.write_str(&parts.join(", "))
    }
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
