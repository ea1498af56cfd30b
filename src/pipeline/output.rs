//! The directory that images are written to.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Image;
use super::images::text_of;
use crate::collective::Part;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile, TensorOut};
use crate::formats::{At, DirLock, FileError, LockError, input, transposed, write_atomically};
use crate::pictures::png::{PngError, read_text};
use crate::pictures::{Picture, decode};

/// Why images cannot be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum OutputError {
    #[error("{0}")]
    Lock(#[from] LockError),
    #[error("{} exists", path.display())]
    Exists { path: PathBuf },
    #[error("{} is a directory, expected a picture or nothing there; remove it, or take another directory", path.display())]
    Directory { path: PathBuf },
    #[error("{}: somebody else has made it meanwhile", path.display())]
    Meanwhile { path: PathBuf },
    #[error("{}: another process is making these images", path.display())]
    Busy { path: PathBuf },
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{0}")]
    Png(#[from] PngError),
    #[error("{0}")]
    Latents(#[from] SafeError),
}

type Result<T, E = OutputError> = std::result::Result<T, E>;

/// A directory of images. It has `000007.png` for seed 7, `000007-2.png` for the second image of that seed,
/// `000007-steps.png` for its steps, and `grid.png` for all. Latents are in `latents.safetensors`, for which each part
/// leaves a file such as `latents-2-of-3.safetensors`. A part also leaves what it was given, in `part-2-of-3.json`, until all
/// are there. Work that does not end leaves a mark, such as `unfinished-0123456789ab.json`: the same work goes on with the
/// pictures that it finds. Other processes may add their seeds meanwhile.
pub struct OutDir {
    dir: PathBuf,
    overwrite: bool,
    lock: DirLock,
    /// Whether it has pictures of the same work, which did not end.
    goes_on: bool,
    /// What says so if this process does not end either; locked, since until it ends nobody else goes on.
    mark: Option<(PathBuf, File)>,
    /// What each image is called.
    names: Vec<String>,
    /// Seeds of the images.
    seeds: Vec<u64>,
    /// Which of them this process makes.
    part: Part,
}

debug!(OutDir { dir });

/// What is written of each image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
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
        let (names, lock) = (names.collect(), DirLock::shared(dir)?);
        Ok(Self { dir: dir.into(), overwrite, lock, goes_on: false, mark: None, names, seeds: seeds.into(), part })
    }

    /// Refuses, before anything is computed, to overwrite the files of this part's images, whose numbers are `own` and
    /// parameters `about`. If the work may be gone on with, `given` is all that its pictures depend on; those that it has made
    /// are in nobody's way.
    ///
    /// # Errors
    /// [`OutputError`]: the directory has one of the files already and may not overwrite it, or cannot be written in.
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn claim(
        &mut self,
        own: Range<usize>,
        kept: Kept,
        about: impl Fn(usize) -> Value,
        given: Option<&Value>,
    ) -> Result<()> {
        let mark = given.map(|given| {
            let digest = Fingerprint::of([given.to_string().as_bytes(), self.part.to_string().as_bytes()]);
            self.dir.join(format!("{UNFINISHED}{digest}.json"))
        });
        if let Some(path) = mark.as_ref().filter(|path| !self.overwrite && path.is_file()) {
            self.mark = Some((path.clone(), locked(path)?));
            self.goes_on = true;
        }
        let files: Vec<(String, Option<usize>)> = match kept {
            Kept::Latents => [LATENTS.into(), latents_name(self.part)].map(|name| (name, None)).into(),
            _ => own.flat_map(|number| self.names_of(number, kept).map(move |name| (name, Some(number)))).collect(),
        };
        let mut replaces = false;
        for (name, number) in files {
            let path = self.dir.join(name);
            let there = path.symlink_metadata().is_ok();
            if path.is_dir() {
                return Err(OutputError::Directory { path });
            }
            if there && !self.overwrite && !number.is_some_and(|number| self.goes_on && says(&path, &about(number))) {
                return Err(OutputError::Exists { path });
            }
            replaces |= there && self.overwrite;
        }
        if self.overwrite {
            // From now on a picture may be of other work than its parameters tell.
            let files = fs::read_dir(&self.dir).at(&self.dir)?.flatten();
            let marks = files.filter(|file| file.file_name().to_string_lossy().starts_with(UNFINISHED));
            marks.for_each(|mark| drop(fs::remove_file(mark.path())));
        }
        if let (Some(path), Some(given), false) = (mark, given, replaces || self.goes_on) {
            write_atomically(&path, |out| write!(out, "{given}")).at(&path)?;
            self.mark = Some((path.clone(), locked(&path)?));
        }
        Ok(())
    }

    /// The files of an image that is kept as a picture.
    fn names_of(&self, number: usize, kept: Kept) -> impl Iterator<Item = String> + use<> {
        let name = &self.names[number];
        let steps = (kept == Kept::Steps).then(|| steps_name(name));
        [picture_name(name)].into_iter().chain(steps)
    }

    /// Whether the same work has made an image before it was interrupted, whose parameters are `about`.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn has(&self, number: usize, kept: Kept, about: &Value) -> bool {
        self.goes_on && self.names_of(number, kept).all(|name| says(&self.dir.join(name), about))
    }

    /// All is made: there is nothing to go on with.
    pub fn finish(self) {
        if let Some((path, file)) = self.mark {
            drop(file); // or Windows would keep the file
            drop(fs::remove_file(path));
        }
    }

    /// A warning, if the file system has no locks.
    pub fn warning(&self) -> Option<String> {
        self.lock.warning()
    }

    /// Leaves for the other parts what this one was given.
    ///
    /// # Errors
    /// [`OutputError::Io`].
    pub fn note(&self, given: &Value) -> Result<()> {
        let path = self.dir.join(note_name(self.part));
        Ok(write_atomically(&path, |out| write!(out, "{given}")).at(path)?)
    }

    /// Whether the directory has another picture with the same parameters. So something that they do not tell was another,
    /// such as a model of the same name.
    pub fn has_another(&self, image: &Image) -> bool {
        let there = self.written(image.number, &image.about);
        there.is_some_and(|there| image.picture.as_ref().is_some_and(|picture| picture.rgb() != there.rgb()))
    }

    /// Leaves a note for each of the other parts that has left none.
    ///
    /// # Errors
    /// [`OutputError::Io`].
    pub fn note_others(&self, given: &Value) -> Result<()> {
        for number in (0..self.part.of).filter(|&number| number != self.part.number) {
            let path = self.dir.join(note_name(Part { number, ..self.part }));
            if path.symlink_metadata().is_err() {
                write_atomically(&path, |out| write!(out, "{given}")).at(path)?;
            }
        }
        Ok(())
    }

    /// What a part was given, if it has left that.
    pub fn noted(&self, part: Part) -> Option<String> {
        input::text(&self.dir.join(note_name(part))).ok()
    }

    /// Removes what the parts have left, all of which are there.
    pub fn forget(&self) {
        let all = (0..self.part.of).map(|number| self.dir.join(note_name(Part { number, ..self.part })));
        // Another process may have removed it already.
        all.for_each(|path| drop(fs::remove_file(path)));
    }

    /// Writes an image's picture, and the pictures of its steps side by side if there are some.
    ///
    /// # Panics
    /// If it is none of the images for which the directory was claimed.
    ///
    /// # Errors
    /// [`OutputError::Meanwhile`], [`OutputError::Png`].
    pub fn save(&self, image: &Image, steps: &[Picture]) -> Result<()> {
        let (about, own) = (image.about.to_string(), &self.names[image.number]);
        let save = |picture: &Picture, name: String, infotext: Option<&str>| {
            let path = self.dir.join(name);
            let ours = self.overwrite || self.goes_on && says(&path, &image.about);
            if !ours && path.symlink_metadata().is_ok() {
                return Err(OutputError::Meanwhile { path });
            }
            Ok(picture.save(&path, &text_of(&about, infotext))?)
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

    /// The picture of image `number`, if some process has written it with the parameters `about`. A file with other
    /// parameters is another picture.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn written(&self, number: usize, about: &Value) -> Option<Picture> {
        let path = self.dir.join(picture_name(&self.names[number]));
        says(&path, about).then(|| decode::open(&path, [255; 3]).ok().map(|image| image.picture))?
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
        let free = |path: &PathBuf| self.overwrite || path.symlink_metadata().is_err() || says(path, about);
        let path = (1..).map(name).find(free).unwrap_or_default();
        Picture::grid(pictures, columns).save(&path, &text_of(&about.to_string(), None))?;
        Ok(path)
    }

    /// Writes `latents` [N, C, H, W] of this part's images [H, W, C], their `seeds` `[N]`, and `steps`
    /// [N, steps, C, H, W] if there are some, where those of one image follow each other. Returns the file's path.
    ///
    /// # Errors
    /// [`OutputError::Latents`].
    pub fn save_latents(
        &self,
        images: &[Image],
        steps: &[f32],
        [height, width, channels]: [usize; 3],
        about: &Value,
    ) -> Result<PathBuf> {
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
        safetensors::write(&path, &tensors, &HashMap::from([("edm2k".to_owned(), about.to_string())]))?;
        Ok(path)
    }

    /// The file of the latents of a part, whose images are `own`, if some process has written it with the parameters
    /// `about`.
    ///
    /// # Panics
    /// If `own` goes beyond the seeds.
    pub fn latents(&self, part: Part, own: Range<usize>, about: &Value) -> Option<SafeFile> {
        let file = SafeFile::open(self.dir.join(latents_name(part))).ok()?;
        let says = file.metadata().get("edm2k") == Some(&about.to_string());
        let seeds = file.i64("seeds").ok()?;
        (says && seeds.iter().map(|&seed| seed as u64).eq(self.seeds[own].iter().copied())).then_some(file)
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

    /// Joins the latents of all parts to the file that one process would write, and removes theirs. Given fewer files than
    /// parts, it only removes them: another process has joined them. Returns the file's path.
    ///
    /// # Errors
    /// [`OutputError::Latents`]: a damaged part, among others.
    pub fn join_latents(&self, parts: Vec<SafeFile>, about: &Value) -> Result<PathBuf> {
        let path = self.dir.join(LATENTS);
        if parts.len() == self.part.of {
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
            safetensors::write(&path, &tensors.collect::<Vec<TensorOut>>(), &about)?;
        }
        let paths: Vec<_> = parts.iter().map(|part| part.path().to_owned()).collect();
        drop(parts);
        // Another process may have removed them already.
        paths.iter().for_each(|path| drop(fs::remove_file(path)));
        Ok(path)
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

/// A mark of unfinished work that no other process works on.
fn locked(path: &Path) -> Result<File> {
    let file = File::open(path).at(path)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(OutputError::Busy { path: path.into() }),
        // Some file systems have no locks.
        _ => Ok(file),
    }
}

/// Whether a PNG carries these parameters.
fn says(path: &Path, about: &Value) -> bool {
    let about = about.to_string();
    read_text(path).is_ok_and(|texts| texts.iter().any(|(key, text)| key == "edm2k" && *text == about))
}

const LATENTS: &str = "latents.safetensors";
/// What the names of marks begin with.
const UNFINISHED: &str = "unfinished-";

/// The name of the file of all latents, or of those of one of several parts.
fn latents_name(part: Part) -> String {
    if part == Part::WHOLE { LATENTS.into() } else { part.file("latents") }
}

fn note_name(part: Part) -> String {
    format!("part-{}-of-{}.json", part.number + 1, part.of)
}

fn picture_name(name: &str) -> String {
    format!("{name}.png")
}

fn steps_name(name: &str) -> String {
    format!("{name}-steps.png")
}
