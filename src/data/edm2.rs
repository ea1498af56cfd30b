//! EDM2's own datasets, as its `dataset_tool.py` makes them, read in place: a zip of stored image files, or of latents
//! (`.npy`, f32 [8, H, W]: mean and standard deviation of the SD-VAE's, before EDM2's scaling), and of `dataset.json`,
//! `{"labels": [["00000/img00000000.png", 207], ...]}`.
//!
//! Images are in the order of their names and have no splits. A label is a class; the condition is one-hot.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::shard::{Header, Representation};
use crate::codec::{LATENTS, scale_and_shift};
use crate::condition::Conditioning;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::npy;
use crate::formats::zip::{Zip, ZipEntry, ZipError};
use crate::pictures::{decode, to_model};
use crate::rng::Stream;

/// The entry with the labels.
pub const LABELS: &str = "dataset.json";

#[derive(Deserialize)]
struct Labels {
    labels: Option<Vec<(String, u32)>>,
}

/// Endings of the names of images, without their dot.
const IMAGES: [&str; 9] = ["png", "npy", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp"];

/// Those of images that nothing reads here, though EDM2 does.
const OTHERS: [&str; 12] = ["tif", "tiff", "avif", "jp2", "j2k", "ppm", "pgm", "pbm", "tga", "dds", "ico", "heic"];

/// Most classes.
const CLASSES: usize = 1 << 20;

/// Why an archive is no dataset.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ArchiveError {
    #[error("{0}")]
    Zip(#[from] ZipError),
    #[error("{}: it has no images (.{})", path.display(), IMAGES.join(", ."))]
    NoImages { path: PathBuf },
    #[error("{}: labels of {found} classes, expected {CLASSES} at most", path.display())]
    Classes { path: PathBuf, found: usize },
}

/// An open archive.
pub struct Archive {
    zip: Zip,
    /// Places of the images among the entries.
    images: Vec<u32>,
    /// The class of each image; empty if there are no labels.
    classes: Vec<u32>,
    /// The header that a shard with its contents would have.
    pub header: Header,
}

impl Archive {
    /// Opens an archive and reads its labels and its first image.
    ///
    /// # Errors
    /// [`ArchiveError`]: it is damaged, or has no images or not all labels.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let zip = Zip::open(path)?;
        let is_image = |name: &str| ends(name, &IMAGES);
        let entries = || (0..).zip(zip.entries());
        if let Some((_, other)) = entries().find(|(_, entry)| ends(&entry.name, &OTHERS)) {
            let what = format!("an image that cannot be read, expected one of .{}", IMAGES.join(", ."));
            return Err(entry_error(&zip, other, what));
        }
        let mut images: Vec<u32> = entries().filter(|(_, entry)| is_image(&entry.name)).map(|(at, _)| at).collect();
        let entry = |at: u32| &zip.entries()[at as usize];
        images.sort_unstable_by_key(|&at| &entry(at).name);
        let Some(&first) = images.first() else { return Err(ArchiveError::NoImages { path: path.into() }) };

        // Of pictures only their files tell their sizes, and opening all of them would take long: `check` does that.
        let kind = |at: u32| is_latents(entry(at)).then_some(entry(at).size);
        if let Some(&other) = images.iter().find(|&&at| kind(at) != kind(first)) {
            let what = format!("not of the kind and size of {}, the archive's first", entry(first).name);
            return Err(entry_error(&zip, entry(other), what));
        }
        let mut classes = Vec::new();
        if let Some((_, labels)) = entries().find(|(_, entry)| &*entry.name == LABELS) {
            let wrong = |what: String| entry_error(&zip, labels, what);
            let read: Labels = serde_json::from_slice(zip.bytes(labels)?).map_err(|error| wrong(error.to_string()))?;
            let read = read.labels.map(HashMap::<String, u32>::from_iter);
            for &at in read.iter().flat_map(|_| &images) {
                let name = &entry(at).name;
                let class = read.as_ref().and_then(|read| read.get(&**name));
                classes.push(*class.ok_or_else(|| wrong(format!("it has no label of {name}")))?);
            }
        }
        let condition_dim = classes.iter().max().map_or(0, |&most| most as usize + 1);
        if condition_dim > CLASSES {
            return Err(ArchiveError::Classes { path: path.into(), found: condition_dim });
        }
        let [height, width, channels] = match pixels(&zip, entry(first))? {
            EntryContent::Picture(picture) => [picture.height(), picture.width(), 3],
            EntryContent::Latents { shape: [height, width], .. } => [height, width, LATENTS],
        };
        let header = Header {
            kind: if channels == LATENTS { Representation::Latents } else { Representation::Images },
            height,
            width,
            sizes: Vec::new(),
            channels,
            condition_dim,
            conditioning: Conditioning::Tags,
            autoencoder: None,
            vocabulary: None,
            count: images.len(),
            shards: 1,
            source: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            licence: String::new(),
        };
        Ok(Self { zip, images, classes, header })
    }

    /// Fingerprint of the names, checksums and order of the images, and of the labels.
    pub fn fingerprint(&self) -> Fingerprint {
        self.zip.fingerprint()
    }

    /// Compares all images with their checksums, and their sizes with the first one's.
    ///
    /// # Errors
    /// The first one that is damaged or of another size.
    pub fn check(&self) -> Result<(), ArchiveError> {
        self.images.iter().try_for_each(|&at| {
            let entry = &self.zip.entries()[at as usize];
            let bytes = self.zip.bytes(entry)?;
            let wrong = |what: String| entry_error(&self.zip, entry, what);
            let found = match is_latents(entry) {
                true => format!("latents of shape {:?}", npy::shape(bytes).map_err(wrong)?),
                false => format!("a picture of {}", decode::size(bytes).map_err(|why| wrong(why.to_string()))?),
            };
            let Header { height, width, .. } = self.header;
            let expected = match self.header.kind {
                Representation::Latents => format!("latents of shape {:?}", [2 * LATENTS, height, width]),
                Representation::Images => format!("a picture of {width}x{height}"),
            };
            match found == expected {
                true => Ok(()),
                false => Err(wrong(format!("{found}, but the archive's first is {expected}"))),
            }
        })
    }

    /// See [`Dataset::image`](super::dataset::Dataset::image).
    ///
    /// # Errors
    /// The image is damaged, or not like the first one.
    pub fn image(&self, i: usize, noise: Stream, out: &mut [f32]) -> Result<(), ArchiveError> {
        let entry = &self.zip.entries()[self.images[i] as usize];
        let Header { height, width, .. } = self.header;
        let other = |found: String| {
            Err(entry_error(&self.zip, entry, format!("{found}, but the archive's first is of {width}x{height}")))
        };
        match (pixels(&self.zip, entry)?, self.header.kind) {
            (EntryContent::Picture(picture), Representation::Images)
                if [picture.height(), picture.width()] == [height, width] =>
            {
                out.iter_mut().zip(picture.rgb()).for_each(|(x, &pixel)| *x = to_model(pixel));
            }
            (EntryContent::Latents { shape, moments }, Representation::Latents) if shape == [height, width] => {
                noise.normals(out);
                let (mean, std) = moments.split_at(out.len());
                for (at, (mean, std)) in mean.iter().zip(std).enumerate() {
                    let (channel, place) = (at / (height * width), at % (height * width));
                    let (scale, shift) = scale_and_shift(channel);
                    let x = &mut out[place * LATENTS + channel];
                    *x = mean * scale + shift + std * scale * *x;
                }
            }
            (EntryContent::Picture(picture), _) => {
                return other(format!("a picture of {}x{}", picture.width(), picture.height()));
            }
            (EntryContent::Latents { shape: [h, w], .. }, _) => return other(format!("latents of {w}x{h}")),
        }
        Ok(())
    }

    /// See [`Dataset::condition`](super::dataset::Dataset::condition).
    pub fn condition(&self, i: usize, out: &mut [f32]) {
        out.fill(0.0);
        if let Some(&class) = self.classes.get(i) {
            out[class as usize] = 1.0;
        }
    }
}

/// The content of an entry.
enum EntryContent {
    Picture(crate::pictures::Picture),
    /// [height, width]; means and standard deviations, [8, height, width].
    Latents {
        shape: [usize; 2],
        moments: Vec<f32>,
    },
}

fn entry_error(zip: &Zip, entry: &ZipEntry, what: String) -> ArchiveError {
    ZipError::Entry { path: zip.path().into(), name: entry.name.to_string(), what }.into()
}

/// Whether a name has one of these endings.
fn ends(name: &str, endings: &[&str]) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending);
    ending.is_some_and(|own| endings.iter().any(|of| own.eq_ignore_ascii_case(of)))
}

fn is_latents(entry: &ZipEntry) -> bool {
    ends(&entry.name, &["npy"])
}

fn pixels(zip: &Zip, entry: &ZipEntry) -> Result<EntryContent, ArchiveError> {
    let bytes = zip.bytes(entry)?;
    let wrong = |what: String| entry_error(zip, entry, what);
    if !is_latents(entry) {
        return Ok(EntryContent::Picture(
            decode::decode(bytes, [255; 3]).map_err(|why| wrong(why.to_string()))?.picture,
        ));
    }
    let (shape, moments) = npy::floats(bytes).map_err(wrong)?;
    if let Some(value) = moments.iter().find(|x| !x.is_finite()) {
        return Err(wrong(format!("a value of {value}, expected finite numbers")));
    }
    match shape[..] {
        [planes, height, width] if planes == 2 * LATENTS && height > 0 && width > 0 => {
            Ok(EntryContent::Latents { shape: [height, width], moments })
        }
        _ => Err(wrong(format!("an array of shape {shape:?}, expected [{}, height, width]", 2 * LATENTS))),
    }
}
