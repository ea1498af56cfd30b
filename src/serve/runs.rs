//! Training runs, to look at: a directory of run directories, or one of them. Nothing is written. No path is made from
//! what a request says; names are looked up among those that are there.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::Value;

use super::refusal::Refusal;
use crate::formats::{self, input};
use crate::train::checkpoint::{self, Checkpoint};
use crate::train::files::{self, STATS};

/// Largest file of statistics, and largest grid, that is read.
const MAX_BYTES: u64 = 1 << 26;
/// The most points of a curve in one answer, more than a screen has pixels.
const MAX_POINTS: usize = 4000;

/// Where runs are.
#[derive(Debug)]
pub struct Runs {
    dir: PathBuf,
}

/// A run in a few numbers; `None` where one is not known.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Name of its directory.
    pub name: String,
    /// Images seen.
    pub nimg: u64,
    /// Images that it is to see.
    pub duration: Option<u64>,
    /// Training loss.
    pub loss: Option<f64>,
    /// Validation loss.
    pub validation_loss: Option<f64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Speed.
    pub images_per_s: Option<f64>,
    /// Time that was spent in training.
    pub seconds: Option<f64>,
    /// Seconds that it will still take at this speed.
    pub seconds_left: Option<f64>,
    /// Seconds since its last line of statistics.
    pub quiet_seconds: f64,
    /// Whether its lines of statistics still come at the usual pace.
    pub running: bool,
    /// Its sample grids, oldest first.
    pub grids: Vec<Grid>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// A sample grid.
#[derive(Clone, Debug, Serialize)]
pub struct Grid {
    /// Name of the file.
    pub name: String,
    /// Images seen.
    pub nimg: u64,
}

/// Weights to draw with.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// What a request for pictures calls the model.
    pub model: String,
    /// Images seen.
    pub nimg: u64,
    /// Relative standard deviation of the average, as the file's name has it.
    pub ema: String,
}

/// A part of a run's statistics.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// Lines, thinned out where there are very many.
    pub points: Vec<Value>,
    /// Where the next part begins.
    pub next: u64,
    /// Whether this part begins at the file's start again, as the file has become shorter.
    pub anew: bool,
}

/// The names of the files in a directory, in order. Links are left out: nobody said that what they lead to may be shown.
fn names(dir: &Path) -> impl Iterator<Item = String> {
    let is_file = |name: &String| dir.join(name).symlink_metadata().is_ok_and(|about| about.is_file());
    formats::names(dir).unwrap_or_default().into_iter().filter(is_file)
}

impl Runs {
    /// The runs in a directory.
    ///
    /// # Errors
    /// It is none.
    pub fn new(dir: PathBuf) -> Result<Self, std::io::Error> {
        fs::read_dir(&dir)?;
        Ok(Self { dir })
    }

    /// Name and directory of each.
    fn all(&self) -> Vec<(String, PathBuf)> {
        if self.dir.join(STATS).is_file() {
            let absolute = fs::canonicalize(&self.dir).unwrap_or_else(|_| self.dir.clone());
            let name = absolute.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
            return vec![(name, self.dir.clone())];
        }
        let names = formats::names(&self.dir).unwrap_or_default();
        let dirs = names.into_iter().map(|name| (name.clone(), self.dir.join(name)));
        dirs.filter(|(_, dir)| dir.join(STATS).is_file()).collect()
    }

    fn find(&self, name: &str) -> Result<PathBuf, Refusal> {
        let found = self.all().into_iter().find(|(known, _)| known == name);
        found.map(|(_, dir)| dir).ok_or_else(|| Refusal::NotFound(format!("run {name:?}")))
    }

    /// All runs, the one that changed last first.
    pub fn list(&self) -> Vec<Run> {
        let mut runs: Vec<_> = self.all().iter().filter_map(|(name, dir)| Run::read(name, dir).ok()).collect();
        runs.sort_by(|a, b| a.quiet_seconds.total_cmp(&b.quiet_seconds));
        runs
    }

    /// One run.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read.
    pub fn get(&self, name: &str) -> Result<Run, Refusal> {
        Run::read(name, &self.find(name)?)
    }

    /// The statistics of a run from this byte on.
    ///
    /// # Errors
    /// There is no such run, or it cannot be read.
    pub fn stats(&self, name: &str, from: u64) -> Result<Stats, Refusal> {
        let (length, text) = end(&self.find(name)?.join(STATS))?;
        let begin = length - text.len() as u64;
        // A restarted run drops the lines that are newer than its checkpoint.
        let anew = from > length;
        let from = if anew { begin } else { from.max(begin) };
        // A line counts once its end is there.
        let new = &text[(from - begin) as usize..];
        let whole = new.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let (points, end) = (points(&new[..whole]), from + whole as u64);
        let (checks, curve): (Vec<_>, Vec<_>) = points.into_iter().partition(|p| p.get("validation_loss").is_some());
        let every = curve.len().div_ceil(MAX_POINTS).max(1);
        let last = curve.len().wrapping_sub(1);
        let curve = curve.into_iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last).map(|(_, point)| point);
        Ok(Stats { points: curve.chain(checks).collect(), next: end, anew })
    }

    /// A sample grid, as PNG.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read.
    pub fn grid(&self, run: &str, name: &str) -> Result<Vec<u8>, Refusal> {
        let dir = self.find(run)?;
        let found = grids(&dir).into_iter().find(|grid| grid.name == name);
        let grid = found.ok_or_else(|| Refusal::NotFound(format!("grid {name:?} of {run:?}")))?;
        read(&dir.join(grid.name))
    }

    /// The file of a snapshot, by the name that a request gives it; none if there is no such snapshot.
    pub fn snapshot(&self, model: &str) -> Option<PathBuf> {
        self.all().into_iter().find_map(|(run, dir)| {
            let file = snapshots(&run, &dir).into_iter().find(|(snapshot, _)| snapshot.model == model)?.1;
            Some(dir.join(file))
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Refusal> {
    input::read(path, MAX_BYTES).map_err(|error| failed(path, &error))
}

/// The length of a file, and its last bytes.
fn end(path: &Path) -> Result<(u64, Vec<u8>), Refusal> {
    let read = || {
        let (mut file, mut bytes) = (input::open(path)?, Vec::new());
        let begin = file.metadata()?.len().saturating_sub(MAX_BYTES);
        file.seek(SeekFrom::Start(begin))?;
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok((begin + bytes.len() as u64, bytes))
    };
    read().map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &io::Error) -> Refusal {
    // The name only: the path is nobody's business.
    Refusal::Failed(format!("{}: {error}", path.file_name().unwrap_or_default().to_string_lossy()))
}

fn points(text: &[u8]) -> Vec<Value> {
    let lines = text.split(|&byte| byte == b'\n');
    let values = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    values.filter(|value| value.get("nimg").is_some_and(Value::is_u64)).collect()
}

/// The snapshots of a run and the names of their files.
fn snapshots(run: &str, dir: &Path) -> Vec<(Snapshot, String)> {
    let parse = |file: String| {
        let (nimg, ema) = files::snapshot_of(&file)?;
        let model = format!("{run}/{}", file.strip_suffix(".safetensors")?);
        Some((Snapshot { model, nimg, ema: ema.into() }, file))
    };
    names(dir).filter_map(parse).collect()
}

/// The sample grids of a run.
fn grids(dir: &Path) -> Vec<Grid> {
    names(dir).filter_map(|name| Some(Grid { nimg: files::grid_of(&name)?, name })).collect()
}

/// Images that a run is to see, as its newest checkpoint says.
fn duration(dir: &Path) -> Option<u64> {
    let newest = checkpoint::list(dir).ok()?.into_iter().next()?;
    Some(Checkpoint::open(&newest).ok()?.state.settings.duration)
}

impl Run {
    fn read(name: &str, dir: &Path) -> Result<Self, Refusal> {
        let stats = dir.join(STATS);
        // The end of a long file says enough.
        let points = points(&end(&stats)?.1);
        let of = |key: &'static str| points.iter().filter_map(move |point| point.get(key)?.as_f64());
        let last = |key| of(key).next_back();
        let nimg = points.iter().filter_map(|point| point["nimg"].as_u64()).max().unwrap_or(0);
        let (duration, images_per_s) = (duration(dir), last("images_per_s"));
        let quiet = fs::metadata(&stats).and_then(|about| about.modified());
        let quiet = quiet.ok().and_then(|then| SystemTime::now().duration_since(then).ok()).unwrap_or(Duration::ZERO);
        let mut seconds = of("seconds").rev();
        let (end, before) = (seconds.next(), seconds.next());
        let usual = end.zip(before).map_or(0.0, |(end, before)| end - before);
        let left = duration.map(|duration| duration.saturating_sub(nimg));
        Ok(Self {
            name: name.into(),
            nimg,
            duration,
            loss: last("loss"),
            validation_loss: last("validation_loss"),
            lr: last("lr"),
            images_per_s,
            seconds: end,
            seconds_left: left.zip(images_per_s).filter(|(_, rate)| *rate > 0.0).map(|(left, rate)| left as f64 / rate),
            quiet_seconds: quiet.as_secs_f64(),
            running: left != Some(0) && quiet.as_secs_f64() < (3.0 * usual).max(60.0),
            grids: grids(dir),
            snapshots: snapshots(name, dir).into_iter().map(|(snapshot, _)| snapshot).collect(),
        })
    }
}
