//! A dataset: a directory of memory-mapped shards `train-00000.safetensors`, `validation-00000.safetensors`,
//! `test-...` ([`shard`](super::shard)), and `vocabulary.json` beside them.
//!
//! A dataset that grows has more shards; what is written meanwhile comes into force at one moment (`pending.rs`).
//!
//! A dataset may also be one of EDM2's zips ([`edm2`](super::edm2)), which has a train split only.
//!
//! Images may be of several sizes ([`Dataset::buckets`]), wherever they stand in the shards.
//!
//! Opening a split costs one pass over its conditions. Reading an image touches its own bytes only.
//!
//! ```
//! use edm2k::data::dataset::{Dataset, Split};
//!
//! let data = Dataset::open("tests/data/emoji".as_ref(), Split::Train)?;
//! let [height, width, channels] = data.shape();
//! assert_eq!((height, width, channels, data.condition_dim()), (32, 32, 3, data.vocabulary().len()));
//! assert_eq!(data.find(data.id(5)), Some(5));
//! # Ok::<(), edm2k::data::dataset::DatasetError>(())
//! ```

use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;

pub use super::edm2::ArchiveError;
use super::edm2::{Archive, LABELS};
use super::pending::{self, PendingView};
use super::shard::{Contents, Notes, SUMMARY_FILE, Shard, check_whole};
pub use super::shard::{Header, Representation, ShardError, Split, VOCABULARY_FILE};
use crate::condition::vae;
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::condition::{Conditioning, Meaning};
use crate::formats::fingerprint::{Fingerprint, differ};
use crate::formats::safetensors::{SafeFile, widen};
use crate::formats::{At, FileError, ends_in, input};
use crate::pictures::to_model;
use crate::rng::Stream;

/// What can be wrong with a dataset.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum DatasetError {
    #[error("{0}")]
    Shard(#[from] ShardError),
    #[error("{0}")]
    Vocabulary(#[from] VocabularyError),
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: no dataset of edm2k (there is no {VOCABULARY_FILE} in it)", dir.display())]
    NoDataset { dir: PathBuf },
    #[error("{}: an unpacked EDM2 dataset: `dataset_tool.py convert` packs it into a zip, which is read", dir.display())]
    Unpacked { dir: PathBuf },
    #[error("{}: a zip of EDM2's, whose conditions are classes; it has no tags", path.display())]
    NoTags { path: PathBuf },
    #[error("{}: no {split} shards (expected {})", dir.display(), split.shard_name(0))]
    NoShards { dir: PathBuf, split: Split },
    #[error("{}: shard {name} is missing ({found} of {expected} are there)", dir.display())]
    MissingShard { dir: PathBuf, name: String, found: usize, expected: usize },
    #[error("{}: the {split} split has no images", dir.display())]
    Empty { dir: PathBuf, split: Split },
    #[error("{}: {what} is {found}, but {expected} in {}", path.display(), first.display())]
    Differs { path: PathBuf, first: Box<Path>, what: &'static str, found: String, expected: String },
    #[error("{}: id {id} occurs twice", path.display())]
    RepeatedId { path: PathBuf, id: i64 },
    #[error("{0}")]
    Archive(#[from] ArchiveError),
    #[error("{}: a zip has no {split} split, as all of it is for training", path.display())]
    NoSplit { path: PathBuf, split: Split },
}

/// One split of a dataset, opened and checked. Cheap to read at random, from any thread.
pub struct Dataset {
    header: Header,
    /// How many images there are of each of the header's sizes.
    counts: Vec<usize>,
    source: Source,
    vocabulary: Vocabulary,
}

/// Where the images are.
enum Source {
    /// Shards, and where the images of each begin.
    Shards(Vec<Shard>, Vec<usize>),
    Zip(Box<Archive>),
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({} of {:?}, {:?})", self.len(), self.shape(), self.header.kind)
    }
}

impl Dataset {
    /// Opens and checks one split of the dataset in a directory, or a zip of EDM2's.
    ///
    /// # Errors
    /// A missing, damaged, empty or inconsistent dataset: see [`DatasetError`]; the message
    /// names the file, the tensor, what was found and what was expected.
    pub fn open(dir: &Path, split: Split) -> Result<Self, DatasetError> {
        if is_zip(dir) {
            if split != Split::Train {
                return Err(DatasetError::NoSplit { path: dir.into(), split });
            }
            let archive = Archive::open(dir)?;
            let (header, vocabulary) = (archive.header.clone(), Vocabulary::default());
            let counts = vec![header.count];
            return Ok(Self { header, counts, source: Source::Zip(archive.into()), vocabulary });
        }
        if dir.is_file() {
            let what = input::open(dir).and_then(|file| input::head(&file)).at(dir)?;
            let what = input::kind(&what).unwrap_or("a file");
            let text = format!("it is {what}, expected the directory of a dataset, or a zip called .zip");
            return Err(FileError { path: dir.into(), cause: io::Error::other(text) }.into());
        }
        // A change that comes into force while the dataset is being opened may be seen by half. Then it is opened once
        // more.
        loop {
            let before = pending::moment(dir);
            match Self::of_view(dir, &PendingView::of(dir), split) {
                Err(_) if pending::moment(dir) != before => {}
                opened => return opened,
            }
        }
    }

    /// Opens a split of the dataset in a directory as it looks before or after a change.
    pub(super) fn of_view(dir: &Path, view: &PendingView, split: Split) -> Result<Self, DatasetError> {
        let vocabulary = vocabulary_of(dir, view)?;
        let shards = open_shards(dir, view, split, &vocabulary)?;
        let (mut first, mut count) = (Vec::new(), 0);
        for shard in &shards {
            first.push(count);
            count += shard.ids.len();
        }
        match shards.first().filter(|_| count > 0) {
            Some(shard) => {
                for other in Split::ALL.into_iter().filter(|other| *other != split) {
                    let path = view.path(&other.shard_name(0));
                    if path.exists()
                        && let Some(header) = Header::of(&SafeFile::open(&path).map_err(ShardError::File)?)?
                    {
                        check_tags(&path, &header, shard)?;
                    }
                }
                // Pictures that were added may have another source and licence.
                let all = |of: fn(&Header) -> &String| {
                    let mut texts: Vec<&str> = shards.iter().map(|shard| of(&shard.header).as_str()).collect();
                    let mut seen = HashSet::new();
                    texts.retain(|text| !text.is_empty() && seen.insert(*text));
                    texts.join("; ")
                };
                let (source, licence) = (all(|header| &header.source), all(|header| &header.licence));
                let sizes = shard.header.all_sizes();
                let mut counts = vec![0; sizes.len()];
                shards.iter().flat_map(|shard| &shard.shapes).for_each(|&shape| counts[usize::from(shape)] += 1);
                let most = (0..sizes.len()).max_by_key(|&at| (counts[at], Reverse(at))).unwrap_or(0);
                let [height, width] = sizes[most];
                let number = shards.len();
                let header = Header { height, width, count, shards: number, source, licence, ..shard.header.clone() };
                Ok(Self { header, counts, source: Source::Shards(shards, first), vocabulary })
            }
            None => Err(DatasetError::Empty { dir: dir.into(), split }),
        }
    }

    /// The tags of the dataset in a directory alone.
    ///
    /// # Errors
    /// [`DatasetError`]: there is none, or it is damaged; a zip has none.
    pub fn tags_of(dir: &Path) -> Result<Vocabulary, DatasetError> {
        if is_zip(dir) {
            return Err(DatasetError::NoTags { path: dir.into() });
        }
        vocabulary_of(dir, &PendingView::of(dir))
    }

    /// Number of images; at least 1.
    #[allow(clippy::len_without_is_empty)] // an empty dataset cannot be opened
    pub fn len(&self) -> usize {
        self.header.count
    }

    /// Height, width and channels of the images; where there are several sizes, those of the most frequent one.
    pub fn shape(&self) -> [usize; 3] {
        [self.header.height, self.header.width, self.header.channels]
    }

    /// Height, width and channels of image `i`.
    ///
    /// # Panics
    /// If `i` is not below [`Dataset::len`].
    pub fn shape_of(&self, i: usize) -> [usize; 3] {
        let Some((shard, row)) = self.at(i).filter(|_| !self.header.sizes.is_empty()) else { return self.shape() };
        let [height, width] = self.header.sizes[usize::from(shard.shapes[row])];
        [height, width, self.header.channels]
    }

    /// Height and width of the sizes that occur in this split.
    pub fn sizes(&self) -> Vec<[usize; 2]> {
        self.buckets().into_iter().filter(|(_, images)| *images > 0).map(|(size, _)| size).collect()
    }

    /// Height and width of each size that images of the dataset may have, and how many of this split have it.
    pub fn buckets(&self) -> Vec<([usize; 2], usize)> {
        self.header.all_sizes().into_iter().zip(self.counts.iter().copied()).collect()
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

    /// Fingerprint of all images and conditions; none if a shard is of an older version, which kept no checksums.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        let shards = match &self.source {
            Source::Shards(shards, _) => shards.iter().map(|shard| shard.content).collect::<Option<Vec<_>>>()?,
            Source::Zip(archive) => return Some(archive.fingerprint()),
        };
        Some(of_contents(&shards))
    }

    /// Whether this dataset once had the fingerprint `then`, and has grown by shards since.
    pub fn grown_from(&self, then: Fingerprint) -> bool {
        let contents: Option<Vec<_>> = self.shards().iter().map(|shard| shard.content).collect();
        let contents = contents.unwrap_or_default();
        (1..contents.len()).any(|n| of_contents(&contents[..n]) == then)
    }

    /// A warning, if nothing tells whether the shards were made together, or whether a split that has none is yet to be made.
    pub fn doubt(&self) -> Option<String> {
        let shards = self.shards();
        let path = shards.iter().find(|shard| !shard.vouched)?.file.path();
        let lacks = |split: Split| !path.with_file_name(split.shard_name(0)).exists();
        let of = match shards.len() {
            1 if lacks(Split::Train) || lacks(Split::Validation) => "that the dataset is whole",
            1 => return None,
            _ => "that its shards belong together",
        };
        Some(format!(
            "{}: no {SUMMARY_FILE} beside it knows its content, so nothing tells {of}; `edm2k prepare` as before checks and \
             writes it",
            path.display()
        ))
    }

    /// Whether tags have been renamed in the vocabulary's file since the shards were made.
    pub fn renamed(&self) -> bool {
        self.header.vocabulary.is_some_and(|made_with| made_with.tags != self.vocabulary.fingerprint())
    }

    /// Reads all images too and compares everything with the checksums. Returns how many shards, or zips, have
    /// checksums. `progress` is called after each.
    ///
    /// # Errors
    /// The first damaged tensor or image.
    pub fn check(&self, progress: &mut dyn FnMut()) -> Result<usize, DatasetError> {
        let mut known = 0;
        if let Source::Zip(archive) = &self.source {
            archive.check()?;
            known += 1;
            progress();
        }
        for shard in self.shards() {
            known += usize::from(check_whole(&shard.file).map_err(ShardError::File)?);
            progress();
        }
        Ok(known)
    }

    /// The tags that [`Dataset::tags`] points into.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn shards(&self) -> &[Shard] {
        match &self.source {
            Source::Shards(shards, _) => shards,
            Source::Zip(_) => &[],
        }
    }

    /// The shard of image `i`, and its row there; none of a zip.
    fn at(&self, i: usize) -> Option<(&Shard, usize)> {
        assert!(i < self.len(), "image {i} of {}", self.len());
        let Source::Shards(shards, first) = &self.source else { return None };
        let shard = first.partition_point(|&first| first <= i) - 1;
        Some((&shards[shard], i - first[shard]))
    }

    /// The number that the dataset's maker gave image `i`; in a zip its place.
    ///
    /// # Panics
    /// Here and below: if `i` is not below [`Dataset::len`].
    pub fn id(&self, i: usize) -> i64 {
        self.at(i).map_or(i as i64, |(shard, row)| shard.ids[row])
    }

    /// The image with this id, if there is one.
    pub fn find(&self, id: i64) -> Option<usize> {
        match &self.source {
            Source::Shards(shards, _) => shards.iter().flat_map(|shard| &shard.ids).position(|&known| known == id),
            Source::Zip(_) => usize::try_from(id).ok().filter(|&i| i < self.len()),
        }
    }

    /// Indices of the tags of image `i` in the vocabulary.
    pub fn tags(&self, i: usize) -> &[u32] {
        self.at(i).map_or(&[], |(shard, row)| shard.tags(row))
    }

    /// Whether mirroring image `i` leaves its meaning and its tags as they are.
    pub fn flip_allowed(&self, i: usize) -> bool {
        // Latents of a mirrored picture are not mirrored latents.
        self.header.kind == Representation::Images && self.at(i).is_none_or(|(shard, row)| shard.flips[row] == 1)
    }

    /// How often training shows image `i` in an epoch; at least 1.
    pub fn repeats(&self, i: usize) -> usize {
        self.at(i).map_or(1, |(shard, row)| shard.repeats[row].into())
    }

    /// Writes image `i` in model space, `[H, W, C]` of its own [shape](Self::shape_of): pixels as x / 127.5 - 1, which
    /// is EDM2's `StandardRGBEncoder`; for latents, one that is drawn with the numbers of `noise`.
    ///
    /// # Errors
    /// [`DatasetError::Archive`]: an image of a zip is damaged, which is only found out when it is read.
    ///
    /// # Panics
    /// If `out` is not H * W * C long.
    pub fn image(&self, i: usize, noise: Stream, out: &mut [f32]) -> Result<(), DatasetError> {
        let [height, width, channels] = self.shape_of(i);
        let area = height * width;
        assert_eq!(out.len(), area * channels, "length of the image's buffer");
        let stored = match (&self.source, self.at(i)) {
            (Source::Zip(archive), _) => return Ok(archive.image(i, noise, out)?),
            (_, at) => at.map_or(&[][..], |(shard, row)| shard.image(row)),
        };
        match self.header.kind {
            Representation::Images => {
                for (c, plane) in stored.chunks_exact(area).enumerate() {
                    for (place, &x) in plane.iter().enumerate() {
                        out[place * channels + c] = to_model(x);
                    }
                }
            }
            Representation::Latents => {
                noise.normals(out);
                let (means, stds) = stored.split_at(stored.len() / 2);
                let (mut mean, mut std) = (vec![0.0; area], vec![0.0; area]);
                let planes = means.chunks_exact(2 * area).zip(stds.chunks_exact(2 * area));
                for (c, (means, stds)) in planes.enumerate() {
                    widen(means, &mut mean);
                    widen(stds, &mut std);
                    let pixels = out.chunks_exact_mut(channels).zip(mean.iter().zip(&std));
                    pixels.for_each(|(pixel, (mean, std))| pixel[c] = mean + std * pixel[c]);
                }
            }
        }
        Ok(())
    }

    /// Writes the condition of image `i`, `[D]`; always finite.
    ///
    /// # Panics
    /// If `out` is not D long.
    pub fn condition(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.condition_dim(), "length of the condition's buffer");
        let stored = match (&self.source, self.at(i)) {
            (Source::Zip(archive), _) => return archive.condition(i, out),
            (_, at) => at.map_or(&[][..], |(shard, row)| shard.condition(row)),
        };
        widen(stored, out);
    }
}

/// A condition model learns from a dataset's conditions. Only those that are asked for are read.
impl vae::ConditionSource for Dataset {
    fn kind(&self) -> vae::ConditionKind {
        match self.header.conditioning {
            Conditioning::Tags => vae::ConditionKind::Tags,
            Conditioning::Features { .. } => vae::ConditionKind::Features,
        }
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn conditioning(&self) -> Option<Conditioning> {
        Some(self.header.conditioning.clone())
    }

    fn count(&self) -> usize {
        self.len()
    }

    fn width(&self) -> usize {
        self.condition_dim()
    }

    fn tags(&self, row: usize) -> &[u32] {
        Dataset::tags(self, row)
    }

    fn dense(&self, row: usize, out: &mut [f32]) {
        self.condition(row, out);
    }
}

fn is_zip(path: &Path) -> bool {
    ends_in(path, "zip") && !path.is_dir()
}

/// The vocabulary of the dataset in a directory; else an error that says what the directory is.
fn vocabulary_of(dir: &Path, view: &PendingView) -> Result<Vocabulary, DatasetError> {
    let path = view.path(VOCABULARY_FILE);
    let lacks = dir.is_dir() && !path.exists();
    match lacks {
        true if dir.join(LABELS).exists() => Err(DatasetError::Unpacked { dir: dir.into() }),
        true => Err(DatasetError::NoDataset { dir: dir.into() }),
        false => Ok(Vocabulary::load(&path)?),
    }
}

/// An error if two shards were made with different vocabularies. Those of one dataset never are: whoever renames tags
/// does so for all shards.
fn check_tags(path: &Path, header: &Header, first: &Shard) -> Result<(), DatasetError> {
    match [header, &first.header].map(|header| header.vocabulary.map(|print| print.tags)) {
        [Some(found), Some(expected)] if found != expected => {
            let (path, first) = (path.into(), first.file.path().into());
            let [found, expected] = [found, expected].map(|print| print.to_string());
            Err(DatasetError::Differs { path, first, what: "the vocabulary that it was made with", found, expected })
        }
        _ => Ok(()),
    }
}

/// An error if two shards were made by one call (they know of equally many shards) but not from the same records. One of
/// a retagged dataset may have been made anew since.
fn check_together(shard: &Shard, before: &Shard) -> Result<(), DatasetError> {
    let of_one_call = shard.header.shards == before.header.shards;
    let records = |shard: &Shard| {
        let settings = Notes::settings(&shard.file)?;
        Some((Notes::retagged(&settings), settings.get("records")?.as_str()?.to_owned()))
    };
    match (records(shard), records(before)) {
        (Some((a, found)), Some((b, expected))) if of_one_call && a == b && found != expected => {
            let (path, first) = (shard.file.path().into(), before.file.path().into());
            Err(DatasetError::Differs { path, first, what: "the list of records that it is of", found, expected })
        }
        _ => Ok(()),
    }
}

/// An error if a shard's header is known to differ from the first one's.
fn check_same(shard: &Shard, first: &Shard) -> Result<(), DatasetError> {
    let (header, ours) = (&shard.header, &first.header);
    check_tags(shard.file.path(), header, first)?;
    type Show = fn(&Header) -> String;
    let fields: [(_, _, Show); 9] = [
        ("kind", header.kind != ours.kind, |h| format!("{:?}", h.kind)),
        ("height", header.height != ours.height, |h| h.height.to_string()),
        ("width", header.width != ours.width, |h| h.width.to_string()),
        ("sizes", header.sizes != ours.sizes, |h| format!("{:?}", h.sizes)),
        ("channels", header.channels != ours.channels, |h| h.channels.to_string()),
        ("condition_dim", header.condition_dim != ours.condition_dim, |h| h.condition_dim.to_string()),
        ("conditioning", header.conditioning.differs(&ours.conditioning), |h| json!(h.conditioning).to_string()),
        ("autoencoder", differ(&header.autoencoder, &ours.autoencoder), |h| {
            h.autoencoder.as_ref().map(ToString::to_string).unwrap_or_default()
        }),
        ("shards", header.shards < ours.shards, |h| h.shards.to_string()),
    ];
    let Some((what, _, show)) = fields.into_iter().find(|(_, differs, _)| *differs) else { return Ok(()) };
    let (path, first) = (shard.file.path().into(), first.file.path().into());
    Err(DatasetError::Differs { path, first, what, found: show(header), expected: show(ours) })
}

/// The shards of a split, in order, each known to be whole but for its images, and all of one kind.
///
/// # Errors
/// See [`DatasetError`].
pub(super) fn open_shards(
    dir: &Path,
    view: &PendingView,
    split: Split,
    vocabulary: &Vocabulary,
) -> Result<Vec<Shard>, DatasetError> {
    let numbers = find_shards(view, split)?;
    let Some(&last) = numbers.last() else { return Err(DatasetError::NoShards { dir: dir.into(), split }) };
    let contents = Contents::read(&view.path(SUMMARY_FILE))?;
    let (mut shards, mut seen, mut expected) = (Vec::<Shard>::new(), HashSet::new(), last + 1);
    while shards.len() < expected {
        let name = split.shard_name(shards.len());
        let path = view.path(&name);
        if !path.exists() {
            let (dir, found) = (dir.into(), numbers.len());
            return Err(DatasetError::MissingShard { dir, name, found, expected });
        }
        let mut shard = Shard::open(&path, vocabulary)?;
        if let Some(first) = shards.first() {
            check_same(&shard, first)?;
        }
        shard.vouched = contents.check(&path, shard.content)?;
        if let Some(before) = shards.last() {
            check_together(&shard, before)?;
        }
        if let Some(&id) = shard.ids.iter().find(|&&id| !seen.insert(id)) {
            return Err(DatasetError::RepeatedId { path, id });
        }
        // A shard that was added knows of more shards than those before it.
        expected = expected.max(shard.header.shards);
        shards.push(shard);
    }
    Ok(shards)
}

fn of_contents(shards: &[Fingerprint]) -> Fingerprint {
    Fingerprint::of(shards.iter().map(|content| format!("{content:?}")))
}

/// The numbers of the shards of a split that are there, ascending.
fn find_shards(view: &PendingView, split: Split) -> Result<Vec<usize>, DatasetError> {
    let mut numbers: Vec<_> = view.names()?.iter().filter_map(|name| split.shard_number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
