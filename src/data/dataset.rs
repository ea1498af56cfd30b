//! A dataset: a directory of memory-mapped shards `train-00000.safetensors`,
//! `validation-00000.safetensors`, `test-...`, and `vocabulary.json` beside them.
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
//! The metadata's `dataset` is a JSON [`Header`], its `checksums` the fingerprints of all
//! tensors and of the rest of the metadata (`Checksums`); shards of older versions have none.
//! Everything is checked when a split is opened, except the values of pixels and latents,
//! which are only read when asked for ([`Dataset::check`] does); opening therefore costs one
//! pass over the conditions. Reading an image touches its own bytes only.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::codec::Autoencoder;
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::condition::{Conditioning, Meaning};
use crate::fingerprint::{Fingerprint, differ};
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile, TensorOut};
use crate::pictures::to_model;
use crate::rng::Stream;

/// Key of the [`Header`] in a shard's metadata.
pub const HEADER_KEY: &str = "dataset";
/// Key of the [`Checksums`] in a shard's metadata.
const CHECKSUMS_KEY: &str = "checksums";
/// Name of the vocabulary's file.
pub const VOCABULARY_FILE: &str = "vocabulary.json";

/// Which images: those to learn from, to watch the loss on, or to leave alone until the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl Split {
    /// All splits.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// Name of the split's shard of this number.
    pub fn shard_name(self, number: usize) -> String {
        format!("{self}-{number:05}.safetensors")
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

/// What the pixels of a dataset are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// U8 pixels; the model sees x / 127.5 - 1.
    Images,
    /// F16 means and standard deviations of latents, in the model's scale; the model sees mean + std * noise.
    Latents,
}

impl Kind {
    /// Name and type of the tensor, and how many planes it has for each channel.
    pub(super) fn tensor(self) -> (&'static str, Dtype, usize) {
        match self {
            Kind::Images => ("images", Dtype::U8, 1),
            Kind::Latents => ("latents", Dtype::F16, 2),
        }
    }
}

/// The JSON header of each shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Pixels or latents.
    pub kind: Kind,
    /// Height of the images or latents.
    pub height: usize,
    /// Width of the images or latents.
    pub width: usize,
    /// Their channels.
    pub channels: usize,
    /// Width D of the conditions.
    pub condition_dim: usize,
    /// What they are made of.
    #[serde(default)]
    pub conditioning: Conditioning,
    /// What latents are of; none of pixels, or if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Of the vocabulary that the tags are places in; none if nobody said.
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

/// What a vocabulary is recognised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabularyPrint {
    /// [`Vocabulary::fingerprint`] when the shard was made. Somebody may have renamed tags since.
    pub tags: Fingerprint,
    /// [`Vocabulary::fingerprint_of_counts`]; that does not change.
    pub counts: Fingerprint,
}

impl VocabularyPrint {
    /// Of a vocabulary.
    pub fn of(vocabulary: &Vocabulary) -> Self {
        Self { tags: vocabulary.fingerprint(), counts: vocabulary.fingerprint_of_counts() }
    }
}

/// Fingerprints of all that is in a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Checksums {
    /// Of the metadata but these.
    metadata: Fingerprint,
    /// Of each tensor.
    tensors: BTreeMap<String, Fingerprint>,
}

impl Checksums {
    fn of_metadata(metadata: &HashMap<String, String>) -> Fingerprint {
        let others: BTreeMap<_, _> = metadata.iter().filter(|(key, _)| *key != CHECKSUMS_KEY).collect();
        Fingerprint::of(others.into_iter().flat_map(|(key, value)| [key, value]))
    }

    /// Those that a shard has; none if it is of an older version.
    fn read(file: &SafeFile) -> Result<Option<Self>, SafeError> {
        let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
        // Every version that noted the vocabulary noted them too.
        let newer = file.metadata().get(HEADER_KEY).is_some_and(|header| header.contains("\"vocabulary\":"));
        let Some(text) = file.metadata().get(CHECKSUMS_KEY) else {
            return if newer { Err(malformed(format!("its {CHECKSUMS_KEY} are missing"))) } else { Ok(None) };
        };
        let sums: Self = serde_json::from_str(text).map_err(|e| malformed(format!("its {CHECKSUMS_KEY}: {e}")))?;
        if Self::of_metadata(file.metadata()) != sums.metadata {
            return Err(malformed("the checksum of its metadata is wrong".into()));
        }
        match file.names().eq(sums.tensors.keys().map(String::as_str)) {
            true => Ok(Some(sums)),
            false => Err(malformed(format!("its {CHECKSUMS_KEY} are of other tensors"))),
        }
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

/// Writes a shard with the checksums of all that is in it.
pub(super) fn write_shard(
    path: &Path,
    tensors: &[TensorOut],
    mut metadata: HashMap<String, String>,
) -> Result<(), SafeError> {
    let sum = |&(name, dtype, shape, bytes): &TensorOut| (name.into(), safetensors::fingerprint(dtype, shape, bytes));
    let tensor_sums = tensors.iter().map(sum).collect();
    let sums = Checksums { metadata: Checksums::of_metadata(&metadata), tensors: tensor_sums };
    metadata.insert(CHECKSUMS_KEY.into(), serde_json::json!(sums).to_string());
    safetensors::write(path, tensors, &metadata)
}

/// Reads all of a shard; whether it has checksums to compare with.
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

/// What can be wrong with a dataset.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum DatasetError {
    #[error(transparent)]
    File(#[from] SafeError),
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    #[error("{}: metadata \"{HEADER_KEY}\": {what}", path.display())]
    Header { path: PathBuf, what: String },
    #[error("{}: no {split} shards (expected {})", dir.display(), split.shard_name(0))]
    NoShards { dir: PathBuf, split: Split },
    #[error("{}: shard {name} is missing ({found} of {expected} are there)", dir.display())]
    MissingShard { dir: PathBuf, name: String, found: usize, expected: usize },
    #[error("{}: the {split} split has no images", dir.display())]
    Empty { dir: PathBuf, split: Split },
    #[error("{}: {what} is {found}, but {expected} in {}", path.display(), first.display())]
    Differs { path: PathBuf, first: PathBuf, what: &'static str, found: String, expected: String },
    #[error(
        "{}: not the vocabulary of {}, which was made with one of other counts ({expected}, found {found}): it is \
         damaged or of another dataset; `edm2k prepare` writes it anew where there is none", path.display(),
        shard.display()
    )]
    OtherVocabulary { path: PathBuf, shard: PathBuf, found: Fingerprint, expected: Fingerprint },
    #[error("{}: id {id} occurs twice", path.display())]
    RepeatedId { path: PathBuf, id: i64 },
}

struct Shard {
    file: SafeFile,
    first: usize,
    /// Of its tensors, if it has checksums.
    content: Option<Fingerprint>,
}

/// One split of a dataset, opened and checked. Cheap to read at random, from any thread.
pub struct Dataset {
    header: Header,
    shards: Vec<Shard>,
    vocabulary: Vocabulary,
    ids: Vec<i64>,
    flips: Vec<bool>,
    repeats: Vec<u8>,
    tag_offsets: Vec<usize>, // [len + 1], over all shards
    tag_indices: Vec<u32>,
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({} of {:?}, {:?})", self.len(), self.shape(), self.header.kind)
    }
}

impl Dataset {
    /// Opens and checks one split of the dataset in a directory.
    ///
    /// # Errors
    /// A missing, damaged, empty or inconsistent dataset: see [`DatasetError`]; the message
    /// names the file, the tensor, what was found and what was expected.
    pub fn open(dir: &Path, split: Split) -> Result<Self, DatasetError> {
        let vocabulary = Vocabulary::load(&dir.join(VOCABULARY_FILE))?;
        let (found, expected) = find_shards(dir, split)?;
        let mut dataset: Option<Dataset> = None;
        let mut seen = HashSet::new();
        for number in 0..expected {
            let path = dir.join(split.shard_name(number));
            if !path.exists() {
                return Err(DatasetError::MissingShard {
                    dir: dir.into(),
                    name: split.shard_name(number),
                    found,
                    expected,
                });
            }
            let file = SafeFile::open(&path)?;
            let header = read_header(&file)?;
            let (found, made_with) = (VocabularyPrint::of(&vocabulary), header.vocabulary);
            if let Some(made_with) = made_with.filter(|made_with| made_with.counts != found.counts) {
                let (found, expected) = (found.counts, made_with.counts);
                let (path, shard) = (dir.join(VOCABULARY_FILE), path);
                return Err(DatasetError::OtherVocabulary { path, shard, found, expected });
            }
            let shard = check_shard(&file, &header, vocabulary.len())?;
            let dataset = dataset.get_or_insert_with(|| Dataset {
                header: Header { count: 0, ..header.clone() },
                shards: Vec::new(),
                vocabulary: vocabulary.clone(),
                ids: Vec::new(),
                flips: Vec::new(),
                repeats: Vec::new(),
                tag_offsets: vec![0],
                tag_indices: Vec::new(),
            });
            dataset.check_same(&file, &header)?;
            if let Some(&id) = shard.ids.iter().find(|&&id| !seen.insert(id)) {
                return Err(DatasetError::RepeatedId { path, id });
            }
            let base = dataset.tag_indices.len();
            dataset.tag_offsets.extend(shard.tag_offsets.iter().skip(1).map(|end| base + end));
            dataset.tag_indices.extend(shard.tag_indices);
            dataset.shards.push(Shard { file, first: dataset.ids.len(), content: shard.content });
            dataset.ids.extend(shard.ids);
            dataset.flips.extend(shard.flips);
            dataset.repeats.extend(shard.repeats);
            dataset.header.count += header.count;
        }
        match dataset {
            Some(dataset) if dataset.len() > 0 => Ok(dataset),
            _ => Err(DatasetError::Empty { dir: dir.into(), split }),
        }
    }

    fn check_same(&self, file: &SafeFile, header: &Header) -> Result<(), DatasetError> {
        let Some(first) = self.shards.first() else {
            return Ok(());
        };
        let ours = &self.header;
        let json = |conditioning: &Conditioning| serde_json::json!(conditioning).to_string();
        let made_by = |made: &Option<Autoencoder>| made.as_ref().map(ToString::to_string).unwrap_or_default();
        // What is unknown is the same.
        let conditioning = match header.conditioning.differs(&ours.conditioning) {
            true => (json(&header.conditioning), json(&ours.conditioning)),
            false => Default::default(),
        };
        let autoencoder = match differ(&header.autoencoder, &ours.autoencoder) {
            true => (made_by(&header.autoencoder), made_by(&ours.autoencoder)),
            false => Default::default(),
        };
        let pairs = [
            ("kind", format!("{:?}", header.kind), format!("{:?}", ours.kind)),
            ("height", header.height.to_string(), ours.height.to_string()),
            ("width", header.width.to_string(), ours.width.to_string()),
            ("channels", header.channels.to_string(), ours.channels.to_string()),
            ("condition_dim", header.condition_dim.to_string(), ours.condition_dim.to_string()),
            ("conditioning", conditioning.0, conditioning.1),
            ("autoencoder", autoencoder.0, autoencoder.1),
            ("shards", header.shards.to_string(), ours.shards.to_string()),
        ];
        for (what, found, expected) in pairs {
            if found != expected {
                return Err(DatasetError::Differs {
                    path: file.path().into(),
                    first: first.file.path().into(),
                    what,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// Number of images; at least 1.
    #[allow(clippy::len_without_is_empty)] // an empty dataset cannot be opened
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Height, width and channels of each image.
    pub fn shape(&self) -> [usize; 3] {
        [self.header.height, self.header.width, self.header.channels]
    }

    /// Width D of the conditions.
    pub fn condition_dim(&self) -> usize {
        self.header.condition_dim
    }

    /// The header; its `count` is [`Dataset::len`].
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the conditions mean.
    pub fn meaning(&self) -> Meaning {
        let tags = match self.header.conditioning {
            Conditioning::Tags => self.vocabulary.tags().iter().map(|tag| tag.tag.clone()).collect(),
            // Places of features have no names.
            Conditioning::Features { .. } => Vec::new(),
        };
        Meaning { conditioning: Some(self.header.conditioning.clone()), tags }
    }

    /// Of all images and conditions; none if a shard is of an older version, which kept no checksums.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        let shards: Option<Vec<_>> = self.shards.iter().map(|shard| shard.content).collect();
        Some(Fingerprint::of(shards?.iter().map(|content| format!("{content:?}"))))
    }

    /// Whether tags have been renamed in the vocabulary's file since the shards were made.
    pub fn renamed(&self) -> bool {
        self.header.vocabulary.is_some_and(|made_with| made_with.tags != self.vocabulary.fingerprint())
    }

    /// Reads all images too and compares them with the checksums; how many shards have some. `progress` is told after
    /// each.
    ///
    /// # Errors
    /// The first damaged tensor.
    pub fn check(&self, progress: &mut dyn FnMut()) -> Result<usize, DatasetError> {
        let mut known = 0;
        for shard in &self.shards {
            known += usize::from(check_whole(&shard.file)?);
            progress();
        }
        Ok(known)
    }

    /// The tags that [`Dataset::tags`] points into.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The number that the dataset's maker gave image `i`.
    ///
    /// # Panics
    /// Here and below: if `i` is not below [`Dataset::len`].
    pub fn id(&self, i: usize) -> i64 {
        self.ids[i]
    }

    /// The image with this id, if there is one.
    pub fn find(&self, id: i64) -> Option<usize> {
        self.ids.iter().position(|&known| known == id)
    }

    /// Indices of the tags of image `i` in the vocabulary.
    pub fn tags(&self, i: usize) -> &[u32] {
        &self.tag_indices[self.tag_offsets[i]..self.tag_offsets[i + 1]]
    }

    /// Whether mirroring image `i` leaves its meaning and its tags as they are.
    pub fn flip_allowed(&self, i: usize) -> bool {
        self.flips[i]
    }

    /// How often training shows image `i` in an epoch; at least 1.
    pub fn repeats(&self, i: usize) -> usize {
        usize::from(self.repeats[i])
    }

    fn row(&self, i: usize, tensor: &str, bytes: usize) -> &[u8] {
        assert!(i < self.len(), "image {i} of {}", self.len());
        let shard = &self.shards[self.shards.partition_point(|shard| shard.first <= i) - 1];
        let at = (i - shard.first) * bytes;
        // Name and size were checked when the shard was opened.
        shard.file.bytes(tensor).map(|data| &data[at..at + bytes]).unwrap_or_default()
    }

    /// Writes image `i` in model space, `[H, W, C]`: pixels as x / 127.5 - 1, which is
    /// EDM2's `StandardRGBEncoder`; of latents one that is drawn with the numbers of `noise`.
    ///
    /// # Panics
    /// If `out` is not H * W * C long.
    pub fn image(&self, i: usize, noise: Stream, out: &mut [f32]) {
        let [height, width, channels] = self.shape();
        let area = height * width;
        assert_eq!(out.len(), area * channels, "length of the image's buffer");
        match self.header.kind {
            Kind::Images => {
                let pixels = self.row(i, "images", area * channels);
                for (c, plane) in pixels.chunks_exact(area).enumerate() {
                    for (place, &x) in plane.iter().enumerate() {
                        out[place * channels + c] = to_model(x);
                    }
                }
            }
            Kind::Latents => {
                let moments = self.row(i, "latents", 4 * area * channels);
                let (mean, std) = moments.split_at(moments.len() / 2);
                let pairs = mean.as_chunks::<2>().0.iter().zip(std.as_chunks::<2>().0);
                noise.normals(out);
                for (at, (&mean, &std)) in pairs.enumerate() {
                    let x = &mut out[at % area * channels + at / area];
                    *x = f16::from_le_bytes(mean).to_f32() + f16::from_le_bytes(std).to_f32() * *x;
                }
            }
        }
    }

    /// Writes the condition of image `i`, `[D]`; always finite.
    ///
    /// # Panics
    /// If `out` is not D long.
    pub fn condition(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.condition_dim(), "length of the condition's buffer");
        let row = self.row(i, "conditions", 2 * out.len());
        for (x, &bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
            *x = f16::from_le_bytes(bytes).to_f32();
        }
    }
}

/// How many shards of a split there are and should be: as the highest number present
/// says, or the first shard's header if that is more.
fn find_shards(dir: &Path, split: Split) -> Result<(usize, usize), DatasetError> {
    let io_error = |cause| DatasetError::Io { path: dir.into(), cause };
    let prefix = format!("{split}-");
    let (mut found, mut expected) = (0, 0);
    for entry in fs::read_dir(dir).map_err(io_error)? {
        let name = entry.map_err(io_error)?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".safetensors"))
            .filter(|digits| digits.len() >= 5 && digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse::<u32>().ok());
        if let Some(number) = number {
            found += 1;
            expected = expected.max(number as usize + 1);
        }
    }
    if expected == 0 {
        return Err(DatasetError::NoShards { dir: dir.into(), split });
    }
    let first = dir.join(split.shard_name(0));
    if first.exists() {
        expected = expected.max(read_header(&SafeFile::open(first)?)?.shards);
    }
    Ok((found, expected))
}

fn read_header(file: &SafeFile) -> Result<Header, DatasetError> {
    let wrong = |what: String| DatasetError::Header { path: file.path().into(), what };
    let text = file.metadata().get(HEADER_KEY).ok_or_else(|| wrong("it is missing".into()))?;
    let header: Header = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
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
    Ok(header)
}

struct Checked {
    content: Option<Fingerprint>,
    ids: Vec<i64>,
    flips: Vec<bool>,
    repeats: Vec<u8>,
    tag_offsets: Vec<usize>,
    tag_indices: Vec<u32>,
}

fn check_shard(file: &SafeFile, header: &Header, tags: usize) -> Result<Checked, DatasetError> {
    let n = header.count;
    let is = |name: &str, dtype: Dtype, shape: &[usize]| {
        let found = (file.dtype(name)?, file.shape(name)?);
        if found == (dtype, shape) {
            return Ok(());
        }
        let expected = format!("{dtype} {shape:?}");
        Err(file.unexpected(name, format!("{} {:?}", found.0, found.1), expected))
    };
    let (pixels, dtype, planes) = header.kind.tensor();
    is(pixels, dtype, &[n, planes * header.channels, header.height, header.width])?;
    is("conditions", Dtype::F16, &[n, header.condition_dim])?;
    is("ids", Dtype::I64, &[n])?;
    is("tag_offsets", Dtype::I64, &[n.saturating_add(1)])?;

    let sums = Checksums::read(file)?;
    if let Some(sums) = &sums {
        file.names().filter(|name| *name != pixels).try_for_each(|name| sums.check(file, name))?;
    }
    let content = sums
        .map(|sums| Fingerprint::of(sums.tensors.iter().flat_map(|(name, sum)| [name.clone(), format!("{sum:?}")])));

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

    let optional = |name: &str, default: u8, allowed: std::ops::RangeInclusive<u8>, expected: &str| {
        if !file.contains(name) {
            return Ok(vec![default; n]);
        }
        is(name, Dtype::U8, &[n])?;
        let bytes = file.bytes(name)?;
        if let Some(at) = bytes.iter().position(|b| !allowed.contains(b)) {
            let found = format!("{} at {at}", bytes[at]);
            return Err(file.unexpected(name, found, expected));
        }
        Ok(bytes.to_vec())
    };
    let flips = optional("flips", 0, 0..=1, "0 or 1")?;
    let repeats = optional("repeats", 1, 1..=u8::MAX, "1 to 255")?;
    Ok(Checked {
        content,
        ids: file.i64("ids")?,
        flips: flips.into_iter().map(|b| b == 1).collect(),
        repeats,
        tag_offsets: offsets.into_iter().map(|offset| offset as usize).collect(),
        tag_indices,
    })
}
