//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A safetensors file `checkpoint-{nimg:09}.safetensors` of F32 tensors `weight.NAME`, `adam_m.NAME`,
//! `adam_v.NAME` and `ema0.NAME`, ... of every parameter, the metadata `config` and `edm2k` as in a model
//! file and `train` (the JSON of [`State`]), and last `checksums`: the CRC-32 of each tensor before it and of
//! the metadata. Written parameter by parameter, so that it costs no second copy of the state in memory.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Settings, Sums};
use crate::backend::{Backend, BackendError, Slot};
use crate::formats::safetensors::{SafeError, SafeFile};
use crate::formats::write_atomically;
use crate::model::{ModelMeta, ParamId};

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
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// It is not whole. An older one may be.
    #[error("{}: damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// It is whole, but of another version of this program.
    #[error("{}: metadata \"train\": {cause}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: serde_json::Error,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Name of the tensor with the checksums.
const CHECKSUMS: &str = "checksums";

/// What is saved of each parameter, with the prefix of its tensor.
fn slots(profiles: usize) -> Vec<(Slot, String)> {
    let fixed = [(Slot::Weight, "weight"), (Slot::AdamM, "adam_m"), (Slot::AdamV, "adam_v")];
    let emas = (0..profiles).map(|i| (Slot::Ema(i), format!("ema{i}")));
    fixed.into_iter().map(|(slot, name)| (slot, name.to_owned())).chain(emas).collect()
}

/// Path of the checkpoint after `nimg` images.
pub fn path(dir: &Path, nimg: u64) -> PathBuf {
    dir.join(format!("checkpoint-{nimg:09}.safetensors"))
}

/// The checkpoints in a directory, newest first.
///
/// # Errors
/// If the directory cannot be listed.
pub fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix("checkpoint-")?.strip_suffix(".safetensors"))
            .and_then(|digits| digits.parse::<u64>().ok());
        found.extend(number.map(|number| (number, path)));
    }
    found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Writes a checkpoint, atomically.
///
/// # Errors
/// [`CheckpointError::Io`]; then there is no file at `path`, or the old one.
pub fn save<B: Backend>(path: &Path, backend: &mut B, meta: &ModelMeta, state: &State) -> Result<(), CheckpointError> {
    let io_error = |cause| CheckpointError::Io { path: path.into(), cause };
    let slots = slots(state.settings.ema.len());
    let table = backend.table().clone();
    let text = |value: serde_json::Result<String>| value.map_err(|e| io_error(e.into()));
    let metadata = json!({
        "config": text(serde_json::to_string(&state.settings.config))?,
        "edm2k": text(serde_json::to_string(meta))?,
        "train": text(serde_json::to_string(state))?,
    });
    let mut header = Map::new();
    header.insert("__metadata__".into(), metadata.clone());
    let mut end = 0;
    for (_, prefix) in &slots {
        for (_, spec) in table.iter() {
            let begin = end;
            end += 4 * spec.numel();
            let info = json!({"dtype": "F32", "shape": spec.shape, "data_offsets": [begin, end]});
            header.insert(format!("{prefix}.{}", spec.name), info);
        }
    }
    let count = slots.len() * table.len() + 1;
    let info = json!({"dtype": "I64", "shape": [count], "data_offsets": [end, end + 8 * count]});
    header.insert(CHECKSUMS.into(), info);
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

    write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        let mut checksums = Vec::with_capacity(count);
        for (slot, _) in &slots {
            for id in (0..table.len()).map(ParamId) {
                let values = backend.read_param(*slot, id).map_err(io::Error::other)?;
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                checksums.push(crc32fast::hash(&bytes));
                out.write_all(&bytes)?;
            }
        }
        checksums.push(metadata_checksum(|key| metadata[key].as_str()));
        checksums.iter().try_for_each(|&sum| out.write_all(&i64::from(sum).to_le_bytes()))
    })
    .map_err(io_error)
}

fn metadata_checksum<'a>(get: impl Fn(&str) -> Option<&'a str>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for key in ["config", "edm2k", "train"] {
        hasher.update(get(key).unwrap_or_default().as_bytes());
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

impl Checkpoint {
    /// Opens a checkpoint and checks its metadata.
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = SafeFile::open(path).map_err(|error| damage(path, error))?;
        let checksums = file.i64(CHECKSUMS).map_err(|error| damage(path, error))?;
        let sum = metadata_checksum(|key| file.metadata().get(key).map(String::as_str));
        if checksums.last() != Some(&i64::from(sum)) {
            return Err(CheckpointError::Damaged { path: path.into(), what: "checksum of the metadata".into() });
        }
        let train = file.metadata().get("train").map_or("", String::as_str);
        let state = serde_json::from_str(train).map_err(|cause| CheckpointError::State { path: path.into(), cause })?;
        Ok(Self { state, file, checksums })
    }

    /// Checks every tensor, then loads all of them.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] names the tensor; then nothing has been loaded.
    pub fn load<B: Backend>(&self, backend: &mut B) -> Result<(), CheckpointError> {
        let path = self.file.path();
        let slots = slots(self.state.settings.ema.len());
        let table = backend.table().clone();
        let all =
            || slots.iter().flat_map(|(slot, prefix)| table.iter().map(move |(id, spec)| (*slot, prefix, id, spec)));
        let mut checksums = self.checksums.iter();
        for (_, prefix, _, spec) in all() {
            let name = format!("{prefix}.{}", spec.name);
            let bytes = self.file.bytes(&name).map_err(|error| damage(path, error))?;
            let shape = self.file.shape(&name).map_err(|error| damage(path, error))?;
            let sum = i64::from(crc32fast::hash(bytes));
            if shape != spec.shape || checksums.next() != Some(&sum) {
                return Err(CheckpointError::Damaged { path: path.into(), what: format!("checksum of tensor {name}") });
            }
        }
        for (slot, prefix, id, spec) in all() {
            let name = format!("{prefix}.{}", spec.name);
            let values = self.file.f32(&name).map_err(|error| damage(path, error))?;
            backend.write_param(slot, id, &values)?;
        }
        Ok(())
    }
}

/// Tells a file that is not whole from one that cannot be read now.
fn damage(path: &Path, error: SafeError) -> CheckpointError {
    match error {
        SafeError::Io { path, cause } => CheckpointError::Io { path, cause },
        other => CheckpointError::Damaged { path: path.into(), what: other.to_string() },
    }
}
