//! The directory that images are written to.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::images::text_of;
use super::{Image, SOFTWARE};
use crate::collective::Part;
use crate::formats::differences::differing_texts;
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile, TensorOut};
use crate::formats::{At, DirLock, FileError, LockError, names, transposed};
use crate::pictures::png::{self, PngError};
use crate::pictures::{Picture, PictureError, decode};

/// Why images cannot be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum OutputError {
    #[error("{0}")]
    Lock(#[from] LockError),
    #[error("{} exists{}", path.display(), differs.as_ref().map_or(String::new(), |what| format!(", of something else: {what}")))]
    Exists { path: PathBuf, differs: Option<String> },
    #[error("{} is a directory, expected a picture or nothing there; remove it, or take another directory", path.display())]
    Directory { path: PathBuf },
    #[error("{}: somebody else has made it meanwhile", path.display())]
    Meanwhile { path: PathBuf },
    #[error("{}: not of these parts; some of them have gone meanwhile", path.display())]
    Unjoined { path: PathBuf },
    #[error("{}: {why}; remove it, and give the command again", path.display())]
    Picture { path: PathBuf, why: Box<PictureError> },
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{0}")]
    Png(#[from] PngError),
    #[error("{0}")]
    Latents(#[from] SafeError),
}

type Result<T, E = OutputError> = std::result::Result<T, E>;

/// Why an image, or the latents of a part, are not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// There is no file, or none that says what it is.
    Missing,
    /// There is one of something else, and this is how it differs.
    Differs(String),
}

impl Lacking {
    /// The error that this is where there is a file.
    fn in_the_way(self, path: PathBuf) -> OutputError {
        let differs = match self {
            Self::Missing => None,
            Self::Differs(how) => Some(how),
        };
        OutputError::Exists { path, differs }
    }
}

/// A directory of images. It has `000007.png` for seed 7, `000007-2.png` for the second image of that seed,
/// `000007-steps.png` for its steps, and `grid.png` for all. Latents are in `latents.safetensors`, for which each part
/// leaves a file such as `latents-2-of-3.safetensors`. Other processes may add their seeds meanwhile.
///
/// A file carries all that it depends on, contents of files by their fingerprints. So one that is there already with the same
/// parameters is what would be made anew, whoever made it.
pub struct OutDir {
    dir: PathBuf,
    overwrite: bool,
    lock: DirLock,
    /// What each image is called.
    names: Vec<String>,
    /// Seeds of the images.
    seeds: Vec<u64>,
    /// Which of them this process makes.
    part: Part,
    /// Numbers of its images that are there.
    there: BTreeSet<usize>,
    /// Whether there is a file of its latents.
    latents_there: bool,
}

debug!(OutDir { dir });

/// What is written of each image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// A picture.
    Pictures,
    /// A picture, and one of its steps.
    Steps,
    /// Latents, of all images in one file.
    Latents,
}

impl OutDir {
    /// Makes the directory, for images of these seeds of which this process makes a part.
    ///
    /// # Errors
    /// [`OutputError::Lock`]: it cannot be written in.
    pub fn open(dir: &Path, overwrite: bool, seeds: &[u64], part: Part) -> Result<Self> {
        let mut times = HashMap::new();
        let names = seeds.iter().map(|&seed| {
            let count = times.entry(seed).or_insert(0);
            *count += 1;
            if *count == 1 { format!("{seed:06}") } else { format!("{seed:06}-{count}") }
        });
        let (names, lock, seeds) = (names.collect(), DirLock::shared(dir)?, seeds.into());
        Ok(Self { dir: dir.into(), overwrite, lock, names, seeds, part, there: BTreeSet::new(), latents_there: false })
    }

    /// Refuses, before anything is computed, to overwrite the pictures of this part's images, whose numbers are `own` and
    /// parameters `about`, or with `steps` those of their steps. Pictures that have them already need not be made.
    ///
    /// # Errors
    /// [`OutputError`]: the directory holds one of the files already, of something else, and `overwrite` was not given.
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn claim(&mut self, own: Range<usize>, steps: bool, about: impl Fn(usize) -> Value) -> Result<()> {
        // Whether a file has these parameters; an error if it is in the way.
        let is_there = |name: String, about: &Value| {
            let path = self.dir.join(name);
            if path.is_dir() {
                return Err(OutputError::Directory { path });
            }
            if self.overwrite || path.symlink_metadata().is_err() {
                return Ok(false);
            }
            compared(&path, about).map(|()| true).map_err(|why| why.in_the_way(path))
        };
        let mut there = BTreeSet::new();
        for number in own {
            let (name, about) = (&self.names[number], about(number));
            let picture = is_there(picture_name(name), &about)?;
            let steps = !steps || is_there(steps_name(name), &about)?;
            there.extend((picture && steps).then_some(number));
        }
        self.there = there;
        Ok(())
    }

    /// The same of latents, which are made together: those of this part, whose images are `own`, or of all, with the
    /// parameters `about`.
    ///
    /// # Errors
    /// As [`OutDir::claim`].
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn claim_latents(&mut self, own: Range<usize>, about: &Value) -> Result<()> {
        for (part, images) in [(Part::WHOLE, 0..self.seeds.len()), (self.part, own.clone())] {
            let path = self.dir.join(latents_name(part));
            if path.is_dir() {
                return Err(OutputError::Directory { path });
            }
            if !self.overwrite && path.symlink_metadata().is_ok() {
                self.latents(part, images, about).map_err(|why| why.in_the_way(path))?;
                (self.there, self.latents_there) = (own.clone().collect(), true);
            }
        }
        Ok(())
    }

    /// Whether the latents of this part, or of all, were there when they were claimed.
    pub fn had_latents(&self) -> bool {
        self.latents_there
    }

    /// Whether image `number`, one of this part, was there when it was claimed.
    pub fn had(&self, number: usize) -> bool {
        self.there.contains(&number)
    }

    /// A warning, if the file system has no locks.
    pub fn warning(&self) -> Option<String> {
        self.lock.warning()
    }

    /// Writes an image's picture, and the pictures of its steps side by side if there are some; not those that are there.
    ///
    /// # Panics
    /// If it is none of the images for which the directory was claimed.
    ///
    /// # Errors
    /// [`OutputError::Meanwhile`], [`OutputError::Png`].
    pub fn save(&self, image: &Image, steps: &[Picture]) -> Result<()> {
        let (about, own) = (image.about.to_string(), &self.names[image.number]);
        let save = |picture: &Picture, name: String, infotext: Option<&str>| {
            let (path, text) = (self.dir.join(name), text_of(&about, infotext));
            if self.overwrite {
                return Ok(picture.save(&path, &text)?);
            }
            if path.symlink_metadata().is_err() {
                match picture.save_new(&path, &text) {
                    // Another process was faster.
                    Err(PngError::Io(why)) if why.cause.kind() == io::ErrorKind::AlreadyExists => {}
                    saved => return Ok(saved?),
                }
            }
            compared(&path, &image.about).map_err(|_| OutputError::Meanwhile { path })
        };
        if self.overwrite {
            // Those that are there are of another picture.
            drop(fs::remove_file(self.dir.join(steps_name(own))));
        }
        if let Some(picture) = &image.picture {
            save(picture, picture_name(own), Some(&image.infotext(picture)))?;
        }
        if steps.is_empty() { Ok(()) } else { save(&Picture::grid(steps, steps.len()), steps_name(own), None) }
    }

    /// Whether some process has written image `number` with the parameters `about`.
    ///
    /// # Errors
    /// [`Lacking`]: not so.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn has(&self, number: usize, about: &Value) -> Result<(), Lacking> {
        compared(&self.dir.join(picture_name(&self.names[number])), about)
    }

    /// The picture of an image that is there.
    ///
    /// # Errors
    /// [`OutputError::Picture`]: it is not, or is damaged.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn picture(&self, number: usize) -> Result<Picture> {
        let path = self.dir.join(picture_name(&self.names[number]));
        decode::open(&path, decode::WHITE)
            .map(|image| image.picture)
            .map_err(|why| OutputError::Picture { path, why: why.into() })
    }

    /// Writes a grid of pictures, `columns` to a row, under the first name that is free or has the same grid already.
    /// So seeds that come later get a grid of their own. Returns its path.
    ///
    /// # Errors
    /// [`OutputError::Png`].
    ///
    /// # Panics
    /// If `columns` is 0.
    pub fn save_grid(&self, pictures: &[Picture], columns: usize, about: &Value) -> Result<PathBuf> {
        let name = |number| match number {
            1 => self.dir.join("grid.png"),
            _ => self.dir.join(format!("grid-{number}.png")),
        };
        let free = |path: &PathBuf| self.overwrite || path.symlink_metadata().is_err() || compared(path, about).is_ok();
        let path = (1..).map(name).find(free).unwrap_or_default();
        Picture::grid(pictures, columns).save(&path, &text_of(&about.to_string(), None))?;
        Ok(path)
    }

    /// Writes `latents` [N, C, H, W] of this part's images [H, W, C], their `seeds` `[N]`, and `steps`
    /// [N, steps, C, H, W] if there are some, where those of one image follow each other.
    ///
    /// # Errors
    /// [`OutputError::Latents`].
    pub fn save_latents(
        &self,
        images: &[Image],
        steps: &[f32],
        [height, width, channels]: [usize; 3],
        about: &Value,
    ) -> Result<()> {
        let (n, area) = (images.len(), height * width);
        let planar = |image: &[f32]| -> Vec<u8> { transposed(image, channels).flat_map(f32::to_le_bytes).collect() };
        let latents: Vec<u8> = images.iter().flat_map(|image| planar(&image.values)).collect();
        let seeds: Vec<u8> = images.iter().flat_map(|image| image.seed.to_le_bytes()).collect();
        let shape = [n, channels, height, width];
        let steps_shape = [n, steps.len() / (n * area * channels).max(1), channels, height, width];
        let steps: Vec<u8> = steps.chunks(area * channels).flat_map(planar).collect();
        let count = [n];
        let mut tensors: Vec<TensorOut> =
            vec![("latents", Dtype::F32, &shape, &latents), ("seeds", Dtype::I64, &count, &seeds)];
        if !steps.is_empty() {
            tensors.push(("steps", Dtype::F32, &steps_shape, &steps));
        }
        let path = self.dir.join(latents_name(self.part));
        Ok(safetensors::write(&path, &tensors, &HashMap::from([("edm2k".to_owned(), about.to_string())]))?)
    }

    /// The file of the latents of all images.
    pub fn latents_path(&self) -> PathBuf {
        self.dir.join(LATENTS)
    }

    /// The file of the latents of a part, whose images are `own`, if some process has written it with the parameters
    /// `about`.
    ///
    /// # Errors
    /// As [`OutDir::has`].
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn latents(&self, part: Part, own: Range<usize>, about: &Value) -> Result<SafeFile, Lacking> {
        let file = SafeFile::open(self.dir.join(latents_name(part))).map_err(|_| Lacking::Missing)?;
        let (ours, theirs) = (about.to_string(), file.metadata().get("edm2k").cloned().unwrap_or_default());
        let seeds = file.i64("seeds").map_err(|_| Lacking::Missing)?;
        match seeds.iter().map(|&seed| seed as u64).eq(self.seeds[own].iter().copied()) {
            true if ours == theirs => Ok(file),
            true => Err(Lacking::Differs(differing_texts(&ours, &theirs))),
            false => Err(Lacking::Differs("other seeds".into())),
        }
    }

    /// Whether the file of all images has the same latents for the images `own` as the file of their part.
    ///
    /// # Errors
    /// [`OutputError::Latents`].
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn holds(&self, all: &SafeFile, own: Range<usize>, part: &SafeFile) -> Result<bool> {
        for name in ["latents", "steps"] {
            let [all, known] = [all, part].map(|file| if file.contains(name) { file.bytes(name) } else { Ok(&[][..]) });
            let (all, known) = (all?, known?);
            let row = all.len() / self.seeds.len().max(1);
            if all[own.start * row..own.end * row] != *known {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Joins the latents of all parts to the file that one process would write, and removes theirs, and what is left of
    /// the same images in another number of parts. If some files are not there any more, another process has joined them.
    ///
    /// # Errors
    /// [`OutputError::Latents`]: a damaged part, among others. [`OutputError::Unjoined`].
    pub fn join_latents(&self, parts: Vec<SafeFile>, about: &Value) -> Result<()> {
        let images = parts.iter().map(|part| Ok(part.shape("seeds")?[0])).sum::<Result<usize>>()?;
        if images < self.seeds.len() {
            // What is removed below must be in the file of all.
            let all = self.latents(Part::WHOLE, 0..self.seeds.len(), about);
            all.map_err(|_| OutputError::Unjoined { path: self.latents_path() })?;
        } else {
            let mut joined = Vec::new();
            for name in ["latents", "seeds", "steps"] {
                // A part without images has no steps.
                let having: Vec<_> = parts.iter().filter(|part| part.contains(name)).collect();
                let Some(first) = having.first() else { continue };
                let (dtype, mut shape) = (first.dtype(name)?, first.shape(name)?.to_vec());
                shape[0] = self.seeds.len();
                let bytes = having.iter().map(|part| part.bytes(name)).collect::<Result<Vec<_>, _>>()?.concat();
                joined.push((name, dtype, shape, bytes));
            }
            let tensors = joined.iter().map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], &bytes[..]));
            let about = HashMap::from([("edm2k".to_owned(), about.to_string())]);
            safetensors::write(self.latents_path(), &tensors.collect::<Vec<TensorOut>>(), &about)?;
        }
        drop(parts);
        let ours = about.to_string();
        let is_part = |path: &PathBuf| {
            let Ok(file) = SafeFile::open(path) else { return false };
            let Ok(seeds) = file.i64("seeds") else { return false };
            let among = |own: &[u64]| own.iter().copied().eq(seeds.iter().map(|&seed| seed as u64));
            file.metadata().get("edm2k") == Some(&ours)
                && (seeds.is_empty() || self.seeds.windows(seeds.len()).any(among))
        };
        for name in names(&self.dir).at(&self.dir)?.into_iter().filter(|name| Part::is_file(name, "latents")) {
            // Another process may have removed it already.
            drop(Some(self.dir.join(name)).filter(is_part).map(fs::remove_file));
        }
        Ok(())
    }

    /// The PNG files of a directory, without grids and steps, sorted by name.
    ///
    /// # Errors
    /// [`OutputError::Io`].
    pub fn pictures(dir: &Path) -> Result<Vec<PathBuf>> {
        let read = || -> io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect() };
        let mut files = read().at(dir)?;
        files.retain(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            let number = name.strip_prefix("grid").and_then(|rest| rest.strip_suffix(".png"));
            let grid =
                number.is_some_and(|n| n.is_empty() || n.strip_prefix('-').is_some_and(|n| n.parse::<u32>().is_ok()));
            name.ends_with(".png") && !grid && !name.ends_with("-steps.png")
        });
        files.sort();
        Ok(files)
    }
}

/// Whether a PNG carries these parameters, and is whole.
fn compared(path: &Path, about: &Value) -> Result<(), Lacking> {
    let texts = png::read_text(path).map_err(|_| Lacking::Missing)?;
    let text = |key: &str| texts.iter().find(|(name, _)| name == key).map(|(_, text)| text).ok_or(Lacking::Missing);
    let (ours, theirs, software) = (about.to_string(), text("edm2k")?, text("Software")?);
    Err(Lacking::Differs(match *theirs == ours {
        _ if software != SOFTWARE => format!("made by {software}"),
        false => differing_texts(&ours, theirs),
        true if png::is_whole(path) => return Ok(()),
        true => "its end is missing".into(),
    }))
}

const LATENTS: &str = "latents.safetensors";

/// The name of the file of all latents, or of those of one of several parts.
fn latents_name(part: Part) -> String {
    if part == Part::WHOLE { LATENTS.into() } else { part.file("latents") }
}

fn picture_name(name: &str) -> String {
    format!("{name}.png")
}

fn steps_name(name: &str) -> String {
    format!("{name}-steps.png")
}
