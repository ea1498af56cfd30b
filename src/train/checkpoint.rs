//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A safetensors file `checkpoint-{nimg:09}.safetensors` of F32 tensors `weight.NAME`, `adam_m.NAME`,
//! `adam_v.NAME` and `ema0.NAME`, ... of every parameter, the metadata `config` and `edm2k` as in a model
//! file and `train` (the JSON of [`State`]), and last `checksums`: the CRC-32 of each tensor before it and of
//! the metadata. Written parameter by parameter, so that it costs no second copy of the state in memory.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Execution, Settings, Sums, files};
use crate::backend::{BackendError, Slot, TrainingBackend};
use crate::formats::safetensors::{Dtype, SafeError, SafeFile, Writer};
use crate::formats::{FileError, names};
use crate::model::{Model, ModelMeta, Precond};
use crate::params::{ParamId, ParamTable};

/// What a checkpoint says beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Images seen.
    pub nimg: u64,
    /// Optimizer steps taken.
    pub step: u64,
    /// Seconds spent in training.
    pub seconds: f64,
    /// Statistics since the last status line.
    pub sums: Sums,
    /// What the run was started with.
    pub settings: Settings,
    /// Device and number type of the last step, for people.
    #[serde(default)]
    pub computed_on: String,
    /// Images at a time in the last step; of the first rank, if there are several. `None` if unknown.
    #[serde(default)]
    pub batch_gpu: Option<u64>,
    /// Whether it is there only because the run was told to stop. Then it is removed when there is a newer one.
    #[serde(default)]
    pub stopgap: bool,
}

impl State {
    /// That of a run that begins.
    pub(super) fn beginning(settings: &Settings, execution: &Execution) -> Self {
        Self {
            nimg: 0,
            step: 0,
            seconds: 0.0,
            sums: Sums::default(),
            settings: settings.clone(),
            computed_on: execution.computed_on.clone(),
            batch_gpu: None,
            stopgap: false,
        }
    }
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum CheckpointError {
    #[error("{0}")]
    Io(#[from] FileError),
    /// The checkpoint is not whole. An older one may be.
    #[error("{}: damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    /// It is whole, but of another version of this program.
    #[error("{}: metadata \"train\": {cause}", path.display())]
    State { path: PathBuf, cause: serde_json::Error },
    /// The run has values that are not finite. No checkpoint is made of such values.
    #[error("{what} is not finite")]
    NotFinite { what: String },
    #[error("{0}")]
    Backend(#[from] BackendError),
}

/// Name of the tensor with the checksums.
const CHECKSUMS: &str = "checksums";
/// Key of the [`State`] in the metadata.
const STATE: &str = "train";

/// Whether a file is a checkpoint, whole or not.
#[doc(hidden)]
pub fn is_one(file: &SafeFile) -> bool {
    file.metadata().contains_key(STATE)
}

/// What is saved: of each slot every parameter, and the name of its tensor.
fn tensors(table: &ParamTable, averages: usize) -> Vec<(Slot, ParamId, &[usize], String)> {
    let fixed = [(Slot::Weight, "weight"), (Slot::AdamM, "adam_m"), (Slot::AdamV, "adam_v")];
    let slots = fixed.map(|(slot, name)| (slot, name.to_owned())).into_iter();
    let slots = slots.chain((0..averages).map(|i| (Slot::Ema(i), format!("ema{i}"))));
    let of = |(slot, prefix): (Slot, String)| {
        table.iter().map(move |(id, spec)| (slot, id, &*spec.shape, format!("{prefix}.{}", spec.name)))
    };
    slots.flat_map(of).collect()
}

/// The checkpoints in a directory, newest first.
///
/// # Errors
/// If the directory cannot be listed.
pub fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<u64> = names(dir)?.iter().filter_map(|name| files::checkpoint_of(name)).collect();
    found.sort_unstable();
    Ok(found.into_iter().rev().map(|nimg| dir.join(files::checkpoint(nimg))).collect())
}

/// The checkpoints in a directory that a run removes if it keeps `keep` of them. These are the older ones, and those
/// that were made only because of a stop, since a run without stops does not have them. The newest one always stays.
///
/// # Errors
/// If the directory cannot be listed.
pub fn superseded(dir: &Path, keep: usize) -> io::Result<Vec<PathBuf>> {
    let is_stopgap = |path: &PathBuf| Checkpoint::open(path).is_ok_and(|checkpoint| checkpoint.state.stopgap);
    let mut all = list(dir)?;
    if all.first().is_some_and(is_stopgap) {
        all.remove(0);
    }
    let (stopgaps, regular): (Vec<_>, Vec<_>) = all.into_iter().partition(is_stopgap);
    Ok(regular.into_iter().skip(keep.max(1)).chain(stopgaps).collect())
}

/// Writes a checkpoint, atomically.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Backend`], [`CheckpointError::NotFinite`]; then there is no file at
/// `path`, or the old one.
pub fn save<B: TrainingBackend>(
    path: &Path,
    backend: &mut B,
    meta: &ModelMeta,
    state: &State,
) -> Result<(), CheckpointError> {
    let table = backend.table().clone();
    let saved = tensors(&table, state.settings.ema.len());
    let text = |key: &str, value: serde_json::Result<String>| match value {
        Ok(text) => Ok((key.to_owned(), text)),
        Err(cause) => Err(FileError { path: path.into(), cause: cause.into() }),
    };
    let metadata = HashMap::from([
        text("config", serde_json::to_string(&state.settings.config))?,
        text("edm2k", serde_json::to_string(meta))?,
        text(STATE, serde_json::to_string(state))?,
    ]);
    let count = [saved.len() + 1];
    let mut header: Vec<_> = saved.iter().map(|(_, _, shape, name)| (&**name, Dtype::F32, *shape)).collect();
    header.push((CHECKSUMS, Dtype::I64, &count));

    let failed = |error| damage(path, error);
    let mut out = Writer::create(path, &header, &metadata).map_err(failed)?;
    let mut checksums = Vec::with_capacity(8 * count[0]);
    for (slot, id, _, name) in &saved {
        let values = backend.read_param(*slot, *id)?;
        if values.iter().any(|x| !x.is_finite()) {
            return Err(CheckpointError::NotFinite { what: name.clone() });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        checksums.extend(i64::from(crc32fast::hash(&bytes)).to_le_bytes());
        out.write(&bytes).map_err(failed)?;
    }
    checksums.extend(i64::from(metadata_checksum(&metadata)).to_le_bytes());
    out.write(&checksums).map_err(failed)?;
    out.finish().map_err(failed)
}

fn metadata_checksum(metadata: &HashMap<String, String>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for key in ["config", "edm2k", STATE] {
        hasher.update(metadata.get(key).map_or("", String::as_str).as_bytes());
    }
    hasher.finalize()
}

/// A checkpoint whose metadata is known to be whole.
pub struct Checkpoint {
    /// What it says beside the tensors.
    pub state: State,
    file: SafeFile,
    checksums: Vec<i64>,
}

debug!(Checkpoint { state });

impl Checkpoint {
    /// Opens a checkpoint and checks its metadata.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]: it cannot be read now; [`CheckpointError::Damaged`]: it is not whole, or no checkpoint;
    /// [`CheckpointError::State`]: another version wrote it.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = SafeFile::open(path).map_err(|error| match (error, instead(path)) {
            (SafeError::Io(_), Some(what)) => CheckpointError::Damaged { path: path.into(), what: what.into() },
            (error, _) => damage(path, error),
        })?;
        let checksums = file.i64(CHECKSUMS).map_err(|error| damage(path, error))?;
        if checksums.last() != Some(&i64::from(metadata_checksum(file.metadata()))) {
            return Err(CheckpointError::Damaged { path: path.into(), what: "checksum of the metadata".into() });
        }
        let train = file.metadata().get(STATE).map_or("", String::as_str);
        let state = serde_json::from_str(train).map_err(|cause| CheckpointError::State { path: path.into(), cause })?;
        Ok(Self { state, file, checksums })
    }

    /// The network that the checkpoint is of, and its parameters.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`]: there is no network of its config.
    pub fn network(&self) -> Result<(Precond, ParamTable), CheckpointError> {
        let config = &self.state.settings.config;
        Precond::new(config).map_err(|why| self.damaged(format!("its config: {why}")))
    }

    fn damaged(&self, what: String) -> CheckpointError {
        CheckpointError::Damaged { path: self.file.path().into(), what }
    }

    /// Makes a model of it, like a run's snapshots: of the moving average with this number, or of the weights
    /// themselves. All of the checkpoint is [checked](Self::check) before.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] names the tensor.
    ///
    /// # Panics
    /// If there is no such average among those of its settings.
    pub fn model(&self, average: Option<usize>) -> Result<Model, CheckpointError> {
        let (net, table) = self.network()?;
        self.check(&table)?;
        let meta = self.file.metadata().get("edm2k").map_or("", String::as_str);
        let meta = serde_json::from_str(meta).map_err(|why| self.damaged(format!("metadata \"edm2k\": {why}")))?;
        let meta = ModelMeta {
            ema_std: average.map(|i| self.state.settings.ema[i]),
            options: average.map(|_| self.state.settings.fingerprint()),
            began_from: average.and_then(|_| self.state.settings.began_from()),
            ..meta
        };
        let slot = average.map_or(Slot::Weight, Slot::Ema);
        // Tensors are read in the order of the table.
        let saved = tensors(&table, self.state.settings.ema.len()).into_iter().filter(|(of, ..)| *of == slot);
        let values = |name: &str| self.file.f32(name).map_err(|error| damage(self.file.path(), error));
        let weights = saved.map(|(.., name)| values(&name)).collect::<Result<_, _>>()?;
        Ok(Model { meta, net, table, weights, doubts: Vec::new() })
    }

    /// Checks every tensor: element type, shape, checksum, and that its values are finite.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] names the tensor.
    pub fn check(&self, table: &ParamTable) -> Result<(), CheckpointError> {
        let failed = |error| damage(self.file.path(), error);
        let mut checksums = self.checksums.iter();
        for (_, _, expected, name) in tensors(table, self.state.settings.ema.len()) {
            let (dtype, shape) = (self.file.dtype(&name).map_err(failed)?, self.file.shape(&name).map_err(failed)?);
            if dtype != Dtype::F32 || shape != expected {
                let wanted = Dtype::F32;
                return Err(self.damaged(format!("tensor {name} is {dtype} {shape:?}, expected {wanted} {expected:?}")));
            }
            let bytes = self.file.bytes(&name).map_err(failed)?;
            if checksums.next() != Some(&i64::from(crc32fast::hash(bytes))) {
                return Err(self.damaged(format!("checksum of tensor {name}")));
            }
            if bytes.as_chunks::<4>().0.iter().any(|&x| !f32::from_le_bytes(x).is_finite()) {
                return Err(self.damaged(format!("tensor {name} is not finite")));
            }
        }
        Ok(())
    }

    /// Loads every tensor of a checkpoint that was [checked](Self::check).
    ///
    /// # Errors
    /// The file can no longer be read, or the device fails.
    pub fn load<B: TrainingBackend>(&self, backend: &mut B) -> Result<(), CheckpointError> {
        let table = backend.table().clone();
        for (slot, id, _, name) in tensors(&table, self.state.settings.ema.len()) {
            let values = self.file.f32(&name).map_err(|error| damage(self.file.path(), error))?;
            backend.write_param(slot, id, &values)?;
        }
        Ok(())
    }
}

/// What stands in the place of a file and is none, so that trying again would not help.
fn instead(path: &Path) -> Option<&'static str> {
    match path.metadata() {
        Ok(about) if !about.is_file() => Some("it is not a regular file"),
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_symlink() => Some("it is a link that leads nowhere"),
        _ => None,
    }
}

/// Tells a file that is not whole from one that cannot be read now.
fn damage(path: &Path, error: SafeError) -> CheckpointError {
    match error {
        SafeError::Io(error) => error.into(),
        other => {
            let (text, name) = (other.to_string(), format!("{}: ", path.display()));
            CheckpointError::Damaged { path: path.into(), what: text.strip_prefix(&name).unwrap_or(&text).into() }
        }
    }
}
