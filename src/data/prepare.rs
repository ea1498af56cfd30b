//! From a folder of images and a JSON-lines file to the shards of a [`dataset`](super::dataset).
//!
//! Each line of the metadata is `{"id": 7, "file": "a/b.png", "tags": ["x", "y"]}` with an
//! optional `"flip": true` where mirroring the image leaves its meaning, and an optional
//! `"repeats": 4` where training shall show it that often in an epoch. Then, per image:
//!
//! 1. decode (no more than [`MAX_PIXELS`], so that an image bomb costs no memory), turn as
//!    its EXIF says;
//! 2. composite transparency on the background colour, in sRGB as every viewer does, before
//!    resizing: no fringe of hidden colours can appear;
//! 3. crop to the target's shape, about the centre; an image that would lose more than
//!    the given share of its area is dropped;
//! 4. resize by a Lanczos3 filter in linear light (16 bits a channel), back to 8-bit sRGB.
//!
//! Splits follow from the id alone: `id % M == 0` is validation, `== 1` test. So they stay
//! what they are when images are added. The vocabulary is counted on the training images.
//!
//! Records are ordered by id and cut into shards before anything is decoded. So a shard
//! depends on its records and the settings only: it is made again with the same bytes, in
//! any order, by any number of threads; one that is there already is kept.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use half::f16;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader};
use rayon::prelude::*;
use resize::px::RGB;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::dataset::{HEADER_KEY, Header, Kind, Split, VOCABULARY_FILE};
use crate::condition::Conditioning;
use crate::condition::vocabulary::{Vocabulary, VocabularyError, check_tag};
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile};

/// Most pixels that an image may have: 64 Mi.
pub const MAX_PIXELS: u64 = 1 << 26;

/// Key of the settings in a shard's metadata.
const SETTINGS_KEY: &str = "settings";
/// Key of the list of records that are not in a shard though they belong there.
const DROPPED_KEY: &str = "dropped";

/// What to make of what.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder that the metadata's file names are relative to.
    pub images: PathBuf,
    /// The JSON-lines file.
    pub metadata: PathBuf,
    /// Directory of the dataset; created if it is missing.
    pub out: PathBuf,
    /// Target width and height.
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
    #[error("{what} is {found}, expected {expected}")]
    Setting { what: &'static str, found: String, expected: &'static str },
    #[error(
        "{}: made before with {what} {found}, now {now}; remove the dataset or choose another \
         directory", path.display()
    )]
    OtherSettings { path: PathBuf, what: String, found: String, now: String },
    #[error("{}: a shard of another dataset; remove it or choose another directory", path.display())]
    Stray { path: PathBuf },
    #[error(transparent)]
    Shard(#[from] SafeError),
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    #[error("none of the {records} images could be kept ({unreadable} unreadable, {cropped} of too different a shape)")]
    NothingKept { records: usize, unreadable: usize, cropped: usize },
}

/// What happens meanwhile, for a progress display; reported from any thread.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// So many records will be handled.
    Start(usize),
    /// So many records are done.
    Done(usize),
    /// An image cannot be used.
    Unreadable {
        /// Its name in the metadata.
        file: &'a str,
        /// Why.
        why: &'a str,
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

/// Counts of one split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Images in the dataset.
    pub kept: usize,
    /// Of these: smaller than the target, hence enlarged.
    pub enlarged: usize,
    /// Of these: no tag in the vocabulary, hence without condition.
    pub untagged: usize,
    /// Dropped: could not be decoded.
    pub unreadable: usize,
    /// Dropped: would have lost more than the allowed share by cropping.
    pub cropped: usize,
}

/// What was made.
#[derive(Debug)]
pub struct Summary {
    /// Counts of train, validation and test, in this order.
    pub splits: [(Split, Counts); 3],
    /// The vocabulary.
    pub vocabulary: Vocabulary,
}

#[derive(Deserialize)]
struct Record {
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

#[derive(Serialize, Deserialize, PartialEq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Drop {
    Unreadable,
    Cropped,
}

#[derive(Serialize, Deserialize)]
struct Dropped {
    id: i64,
    file: String,
    drop: Drop,
    why: String,
}

/// Prepares a dataset.
///
/// # Errors
/// Unusable settings or metadata, an output directory that holds another dataset or cannot
/// be written. An unreadable image is no error: it is reported, counted and left out.
pub fn prepare(settings: &Settings, report: &(dyn Fn(Event) + Sync)) -> Result<Summary, PrepareError> {
    check_settings(settings)?;
    let records = read_records(settings)?;
    let split_of = |record: &Record| match record.id.rem_euclid(settings.validation_modulus) {
        0 => Split::Validation,
        1 => Split::Test,
        _ => Split::Train,
    };
    let training = records.iter().filter(|record| split_of(record) == Split::Train);
    let vocabulary =
        Vocabulary::most_frequent(training.map(|record| record.tags.iter().map(String::as_str)), settings.vocabulary)?;
    if vocabulary.is_empty() {
        return Err(PrepareError::Setting {
            what: "the number of distinct tags on training images",
            found: "0".into(),
            expected: "at least 1",
        });
    }
    let fingerprint = fingerprint(settings, &records)?;
    fs::create_dir_all(&settings.out).map_err(|cause| PrepareError::Io { path: settings.out.clone(), cause })?;

    let mut jobs = Vec::new();
    for split in Split::ALL {
        let members: Vec<_> = records.iter().filter(|record| split_of(record) == split).collect();
        let shards = members.len().div_ceil(settings.shard_size);
        for number in 0..shards {
            let end = members.len().min((number + 1) * settings.shard_size);
            let members = members[number * settings.shard_size..end].to_vec();
            jobs.push(Job { split, name: split.shard_name(number), shards, members });
        }
    }
    // Before anything is written: a dataset made otherwise stays as it is.
    let existing = jobs
        .iter()
        .map(|job| existing_shard(&settings.out.join(&job.name), &fingerprint))
        .collect::<Result<Vec<_>, _>>()?;
    refuse_strays(&settings.out, &jobs)?;
    vocabulary.save(&settings.out.join(VOCABULARY_FILE))?;

    report(Event::Start(records.len()));
    let mut counts: BTreeMap<String, Counts> = BTreeMap::new();
    for (job, existing) in jobs.iter().zip(existing) {
        let path = settings.out.join(&job.name);
        let (file, kept) = match existing {
            Some(file) => {
                report(Event::Done(job.members.len()));
                (file, true)
            }
            None => {
                make_shard(settings, job, &vocabulary, &fingerprint, &path, report)?;
                (SafeFile::open(&path)?, false)
            }
        };
        let made = read_counts(&file)?;
        for dropped in &made.dropped {
            if dropped.drop == Drop::Unreadable {
                report(Event::Unreadable { file: &dropped.file, why: &dropped.why });
            }
        }
        report(Event::Shard { name: &job.name, images: made.counts.kept, kept });
        let sum = counts.entry(job.split.to_string()).or_default();
        sum.kept += made.counts.kept;
        sum.enlarged += made.counts.enlarged;
        sum.untagged += made.counts.untagged;
        sum.unreadable += made.counts.unreadable;
        sum.cropped += made.counts.cropped;
    }
    let splits = Split::ALL.map(|split| (split, counts.get(&split.to_string()).copied().unwrap_or_default()));
    let sum = |what: fn(&Counts) -> usize| splits.iter().map(|(_, counts)| what(counts)).sum();
    let kept: usize = sum(|counts| counts.kept);
    if kept == 0 {
        return Err(PrepareError::NothingKept {
            records: records.len(),
            unreadable: sum(|counts| counts.unreadable),
            cropped: sum(|counts| counts.cropped),
        });
    }
    Ok(Summary { splits, vocabulary })
}

fn check_settings(settings: &Settings) -> Result<(), PrepareError> {
    let wrong = |what, found: String, expected| Err(PrepareError::Setting { what, found, expected });
    let [width, height] = settings.size;
    if !(1..=16384).contains(&width) || !(1..=16384).contains(&height) {
        return wrong("the size", format!("{width}x{height}"), "sides of 1 to 16384");
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

/// The records in order of their ids.
fn read_records(settings: &Settings) -> Result<Vec<Record>, PrepareError> {
    let path = &settings.metadata;
    let io_error = |cause| PrepareError::Io { path: path.clone(), cause };
    let mut records = Vec::new();
    let mut ids = HashSet::new();
    for (number, text) in BufReader::new(File::open(path).map_err(io_error)?).lines().enumerate() {
        let wrong = |what| PrepareError::Line { path: path.clone(), line: number + 1, what };
        let text = text.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => wrong("not UTF-8".into()),
            _ => io_error(error),
        })?;
        if text.trim().is_empty() {
            continue;
        }
        let mut record: Record = serde_json::from_str(&text).map_err(|error| {
            wrong(format!("{error}; expected {{\"id\", \"file\", \"tags\", \"flip\" and \"repeats\" (optional)}}"))
        })?;
        for tag in &record.tags {
            check_tag(tag).map_err(|what| wrong(format!("tag {what}")))?;
        }
        if !ids.insert(record.id) {
            return Err(wrong(format!("id {} occurs twice", record.id)));
        }
        record.tags.sort_unstable();
        record.tags.dedup();
        records.push(record);
    }
    if records.is_empty() {
        return Err(PrepareError::NoRecords { path: path.clone() });
    }
    records.sort_unstable_by_key(|record| record.id);
    Ok(records)
}

/// Everything that a shard's bytes depend on. Of an image file that is its length: reading
/// it whole would cost as much as doing the work again, and its date changes with copying.
fn fingerprint(settings: &Settings, records: &[Record]) -> Result<Value, PrepareError> {
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
        record.tags.iter().for_each(|tag| add(tag.as_bytes()));
        add(&[u8::from(record.flip), record.repeats.get()]);
        let length = fs::metadata(settings.images.join(&record.file)).map_or(0, |m| m.len());
        add(&length.to_le_bytes());
    }
    let [width, height] = settings.size;
    let [r, g, b] = settings.background;
    Ok(json!({
        "size": format!("{width}x{height}"),
        "background": format!("#{r:02x}{g:02x}{b:02x}"),
        "max-crop": settings.max_crop,
        "vocabulary": settings.vocabulary,
        "validation-modulus": settings.validation_modulus,
        "shard-size": settings.shard_size,
        "source": settings.source,
        "licence": settings.licence,
        "records": format!("{} ({hash:016x})", records.len()),
    }))
}

fn refuse_strays(out: &Path, jobs: &[Job]) -> Result<(), PrepareError> {
    let io_error = |cause| PrepareError::Io { path: out.into(), cause };
    let ours: HashSet<_> = jobs.iter().map(|job| job.name.as_str()).collect();
    for entry in fs::read_dir(out).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let of_split = Split::ALL.iter().any(|split| name.starts_with(&format!("{split}-")));
        if of_split && name.ends_with(".safetensors") && !ours.contains(name) {
            return Err(PrepareError::Stray { path: entry.path() });
        }
    }
    Ok(())
}

/// The shard at `path` if it is there and whole; an error if it was made otherwise.
fn existing_shard(path: &Path, fingerprint: &Value) -> Result<Option<SafeFile>, PrepareError> {
    let Ok(file) = SafeFile::open(path) else {
        return Ok(None);
    };
    let before = file.metadata().get(SETTINGS_KEY).and_then(|text| serde_json::from_str(text).ok());
    let (Some(Value::Object(before)), Value::Object(now)) = (before, fingerprint) else {
        return Err(PrepareError::Stray { path: path.into() });
    };
    let show = |settings: &Map<String, Value>, key: &String| match settings.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "none".into(),
    };
    for key in now.keys().chain(before.keys()) {
        if before.get(key) != now.get(key) {
            return Err(PrepareError::OtherSettings {
                path: path.into(),
                what: key.clone(),
                found: show(&before, key),
                now: show(now, key),
            });
        }
    }
    Ok(read_counts(&file).is_ok().then_some(file))
}

struct Made {
    counts: Counts,
    dropped: Vec<Dropped>,
}

/// The counts of a shard, from what it holds.
fn read_counts(file: &SafeFile) -> Result<Made, SafeError> {
    let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
    let text = |key: &str| file.metadata().get(key).ok_or_else(|| malformed(format!("its metadata lacks {key}")));
    let dropped: Vec<Dropped> =
        serde_json::from_str(text(DROPPED_KEY)?).map_err(|error| malformed(error.to_string()))?;
    let enlarged: usize = text("enlarged")?.parse().map_err(|_| malformed("enlarged is no number".into()))?;
    let offsets = file.i64("tag_offsets")?;
    let count = |drop| dropped.iter().filter(|dropped| dropped.drop == drop).count();
    let counts = Counts {
        kept: file.i64("ids")?.len(),
        enlarged,
        untagged: offsets.windows(2).filter(|pair| pair[0] == pair[1]).count(),
        unreadable: count(Drop::Unreadable),
        cropped: count(Drop::Cropped),
    };
    Ok(Made { counts, dropped })
}

struct Job<'a> {
    split: Split,
    name: String,
    shards: usize,
    members: Vec<&'a Record>,
}

fn make_shard(
    settings: &Settings,
    job: &Job,
    vocabulary: &Vocabulary,
    fingerprint: &Value,
    path: &Path,
    report: &(dyn Fn(Event) + Sync),
) -> Result<(), PrepareError> {
    let fitted: Vec<_> = job
        .members
        .par_iter()
        .map(|record| {
            let fitted =
                decode(&settings.images.join(&record.file), settings.background).and_then(|image| fit(image, settings));
            report(Event::Done(1));
            fitted
        })
        .collect();

    let [width, height] = settings.size.map(|side| side as usize);
    let width_of_condition = vocabulary.len();
    let (mut images, mut conditions) = (Vec::new(), Vec::new()); // [N, 3, H, W], [N, D] f16
    let (mut ids, mut flips, mut repeats) = (Vec::<i64>::new(), Vec::<u8>::new(), Vec::<u8>::new());
    let (mut tag_offsets, mut tag_indices) = (vec![0i64], Vec::<i32>::new());
    let (mut dropped, mut enlarged) = (Vec::new(), 0);
    for (record, fitted) in job.members.iter().zip(fitted) {
        let fitted = match fitted {
            Ok(fitted) => fitted,
            Err((drop, why)) => {
                dropped.push(Dropped { id: record.id, file: record.file.clone(), drop, why });
                continue;
            }
        };
        enlarged += usize::from(fitted.enlarged);
        for c in 0..3 {
            images.extend(fitted.rgb.iter().skip(c).step_by(3));
        }
        let mut tags: Vec<u32> = record.tags.iter().filter_map(|tag| vocabulary.get(tag)).collect();
        tags.sort_unstable();
        for x in vocabulary.multi_hot(&tags) {
            conditions.extend(f16::from_f32(x).to_le_bytes());
        }
        tag_indices.extend(tags.iter().map(|&tag| tag as i32));
        tag_offsets.push(tag_indices.len() as i64);
        ids.push(record.id);
        flips.push(u8::from(record.flip));
        repeats.push(record.repeats.get());
    }

    let n = ids.len();
    let header = Header {
        kind: Kind::Images,
        height,
        width,
        channels: 3,
        condition_dim: width_of_condition,
        conditioning: Conditioning::Tags,
        count: n,
        shards: job.shards,
        source: settings.source.clone(),
        licence: settings.licence.clone(),
    };
    let metadata = [
        (HEADER_KEY, json!(header).to_string()),
        (SETTINGS_KEY, fingerprint.to_string()),
        (DROPPED_KEY, json!(dropped).to_string()),
        ("enlarged", enlarged.to_string()),
    ];
    let little = |values: &[i64]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let indices: Vec<u8> = tag_indices.iter().flat_map(|x| x.to_le_bytes()).collect();
    safetensors::write(
        path,
        &[
            ("images", Dtype::U8, &[n, 3, height, width], &images),
            ("conditions", Dtype::F16, &[n, width_of_condition], &conditions),
            ("ids", Dtype::I64, &[n], &little(&ids)),
            ("tag_offsets", Dtype::I64, &[n + 1], &little(&tag_offsets)),
            ("tag_indices", Dtype::I32, &[tag_indices.len()], &indices),
            ("flips", Dtype::U8, &[n], &flips),
            ("repeats", Dtype::U8, &[n], &repeats),
        ],
        &metadata.map(|(key, value)| (key.to_string(), value)).into(),
    )?;
    Ok(())
}

/// An opaque sRGB image, `[H, W, 3]`.
struct Opaque {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

fn decode(path: &Path, background: [u8; 3]) -> Result<Opaque, (Drop, String)> {
    let unreadable = |why: String| (Drop::Unreadable, why);
    let load = || -> image::ImageResult<Result<DynamicImage, String>> {
        let mut reader = ImageReader::open(path)?.with_guessed_format()?;
        let mut limits = image::Limits::default();
        limits.max_alloc = Some(16 * MAX_PIXELS); // what the largest allowed image needs
        reader.limits(limits);
        let mut decoder = reader.into_decoder()?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Ok(Err(format!("{width}x{height} is more than {MAX_PIXELS} pixels")));
        }
        // A damaged tag is no reason to lose the picture.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(Ok(image))
    };
    let image = load().map_err(|error| unreadable(error.to_string()))?.map_err(unreadable)?;
    let (width, height) = (image.width(), image.height());
    let rgb = if image.color().has_alpha() {
        let over = |x: u8, behind: u8, alpha: u32| {
            ((u32::from(x) * alpha + u32::from(behind) * (255 - alpha) + 127) / 255) as u8
        };
        let rgba = image.into_rgba8();
        rgba.pixels()
            .flat_map(|pixel| {
                let [r, g, b, alpha] = pixel.0;
                let alpha = u32::from(alpha);
                let [behind_r, behind_g, behind_b] = background;
                [over(r, behind_r, alpha), over(g, behind_g, alpha), over(b, behind_b, alpha)]
            })
            .collect()
    } else {
        image.into_rgb8().into_raw()
    };
    Ok(Opaque { width, height, rgb })
}

/// A pixel in linear light.
type RGB16 = RGB<u16>;

struct Fitted {
    rgb: Vec<u8>, // [H, W, 3] sRGB
    enlarged: bool,
}

/// Crops about the centre to the target's shape, and resizes.
fn fit(image: Opaque, settings: &Settings) -> Result<Fitted, (Drop, String)> {
    let [width, height] = settings.size;
    let (from_width, from_height) = (f64::from(image.width), f64::from(image.height));
    let scale = (from_width / f64::from(width)).min(from_height / f64::from(height));
    let (crop_width, crop_height) = (scale * f64::from(width), scale * f64::from(height));
    let lost = 1.0 - (crop_width * crop_height) / (from_width * from_height);
    // The tolerance keeps rounding from dropping an image that needs no crop.
    if lost > settings.max_crop + 1e-9 {
        let why =
            format!("{}x{} loses {:.1} % by cropping to {width}x{height}", image.width, image.height, 100.0 * lost);
        return Err((Drop::Cropped, why));
    }
    let enlarged = image.width < width || image.height < height;
    if (image.width, image.height) == (width, height) {
        return Ok(Fitted { rgb: image.rgb, enlarged });
    }
    let failed = |error: resize::Error| (Drop::Unreadable, format!("cannot be resized: {error}"));
    let linear: Vec<RGB16> =
        image.rgb.as_chunks::<3>().0.iter().map(|rgb| rgb.map(|x| TO_LINEAR[usize::from(x)]).into()).collect();
    // Whole pixels: the crop is centred to half a pixel.
    let crop = |side: f64, from: u32| (side.round() as usize).clamp(1, from as usize);
    let (crop_width, crop_height) = (crop(crop_width, image.width), crop(crop_height, image.height));
    let left = (image.width as usize - crop_width) / 2;
    let top = (image.height as usize - crop_height) / 2;
    let source = &linear[top * image.width as usize + left..];
    let (width, height) = (width as usize, height as usize);
    let mut target = vec![RGB16::new(0, 0, 0); width * height];
    resize::new(crop_width, crop_height, width, height, resize::Pixel::RGB16, resize::Type::Lanczos3)
        .and_then(|mut resizer| resizer.resize_stride(source, image.width as usize, &mut target))
        .map_err(failed)?;
    let rgb = target.iter().flat_map(|x| [x.r, x.g, x.b].map(|x| TO_SRGB[usize::from(x)])).collect();
    Ok(Fitted { rgb, enlarged })
}

/// sRGB (IEC 61966-2-1) to linear light, 0 to 65535.
static TO_LINEAR: LazyLock<[u16; 256]> = LazyLock::new(|| {
    std::array::from_fn(|x| {
        let x = x as f64 / 255.0;
        let linear = if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) };
        (linear * 65535.0).round() as u16
    })
});

/// The inverse, rounded; exact on the values of [`TO_LINEAR`].
static TO_SRGB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    (0..=65535u16)
        .map(|x| {
            let x = f64::from(x) / 65535.0;
            let srgb = if x <= 0.003_130_8 { 12.92 * x } else { 1.055 * x.powf(1.0 / 2.4) - 0.055 };
            (srgb * 255.0).round() as u8
        })
        .collect()
});
