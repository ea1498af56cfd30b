//! The condition model's file: safetensors, with weights in f16 and everything else in the metadata. Also the file of a
//! training that is under way, in f32.

use std::collections::HashMap;
use std::path::Path;

use half::f16;
use serde::{Deserialize, Serialize};

use super::net::Linear;
use super::training::Adam;
use super::{ConditionKind, ConditionSource, HEADER_KEY, Learning, LearningSettings, Vae, VaeError, VaeHeader};
use crate::condition::vocabulary::Vocabulary;
use crate::formats::differences::differing;
use crate::formats::fingerprint::{Fingerprint, differ};
use crate::formats::json;
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile};

/// Whether a file is a condition model, whole or not.
#[doc(hidden)]
pub fn is_one(file: &SafeFile) -> bool {
    file.metadata().contains_key(HEADER_KEY)
}

impl Vae {
    /// Reads and checks a condition model.
    ///
    /// # Errors
    /// [`VaeError`]: the message names the file, the tensor, what was found and what was expected.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, VaeError> {
        let path = path.as_ref();
        let file = SafeFile::open(path)?;
        let wrong = |what: String| VaeError::Header { path: path.into(), what };
        let text = file.metadata().get(HEADER_KEY);
        let text = text.ok_or_else(|| wrong("it is missing, so this is not a condition model".into()))?;
        let header: VaeHeader = json::read(text).map_err(|e| wrong(e.to_string()))?;
        let v = header.vocabulary.len();
        for (what, size) in [("width", header.width), ("latent", header.latent), ("hidden", header.hidden)] {
            if !(1..=1 << 16).contains(&size) {
                return Err(wrong(format!("{what} is {size}, expected 1 to {}", 1 << 16)));
            }
        }
        if v > 1 << 16 || (header.kind == ConditionKind::Tags && v != header.width) {
            return Err(wrong(format!("{v} tags in the vocabulary, expected {}", header.width)));
        }
        let vocabulary = Vocabulary::new(header.vocabulary.clone())
            .map_err(|cause| VaeError::Vocabulary { path: path.into(), cause })?;
        let kind = header.kind;
        let mut vae = Self::new(header, vocabulary);
        for (name, shape) in vae.tensors() {
            vae.params.extend(read_tensor(&file, name, &shape)?);
        }
        let count = file.shape("anchors")?.first().copied().unwrap_or(0);
        if count == 0 {
            return Err(file.unexpected("anchors", "none", "one at least").into());
        }
        vae.anchors = read_tensor(&file, "anchors", &[count, 2 * vae.header.latent])?;
        if kind == ConditionKind::Features {
            vae.mean = read_tensor(&file, "mean", &[vae.header.width])?;
            vae.std = read_tensor(&file, "std", &[vae.header.width])?;
        }
        Ok(vae)
    }

    /// Writes the model, atomically: weights in f16, everything else in the metadata.
    ///
    /// # Errors
    /// [`VaeError::File`] if writing fails; then `path` keeps its old content.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), VaeError> {
        let path = path.as_ref();
        let half = |values: &[f32]| values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect::<Vec<u8>>();
        let full = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut rest = self.params.as_slice();
        let mut tensors = Vec::new();
        for (name, shape) in self.tensors() {
            let (values, after) = rest.split_at(shape.iter().product());
            tensors.push((name, Dtype::F16, shape, half(values)));
            rest = after;
        }
        let codes = 2 * self.header.latent;
        tensors.push(("anchors", Dtype::F16, vec![self.anchors.len() / codes, codes], half(&self.anchors)));
        if self.header.kind == ConditionKind::Features {
            tensors.push(("mean", Dtype::F32, vec![self.header.width], full(&self.mean)));
            tensors.push(("std", Dtype::F32, vec![self.header.width], full(&self.std)));
        }
        let out: Vec<safetensors::TensorOut> =
            tensors.iter().map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], &bytes[..])).collect();
        let header = serde_json::to_string(&self.header)
            .map_err(|e| VaeError::Header { path: path.into(), what: e.to_string() })?;
        Ok(safetensors::write(path, &out, &HashMap::from([(HEADER_KEY.to_owned(), header)]))?)
    }

    /// Names and shapes of the parameters, in their order in memory.
    fn tensors(&self) -> impl Iterator<Item = (&'static str, Vec<usize>)> + use<> {
        let names =
            [["encoder.weight", "encoder.bias"], ["hidden.weight", "hidden.bias"], ["output.weight", "output.bias"]];
        let of = |(layer, [weight, bias]): (Linear, [_; 2])| {
            [(weight, vec![layer.rows, layer.columns]), (bias, vec![layer.rows])]
        };
        self.layers().into_iter().zip(names).flat_map(of)
    }
}

/// Key of [`LearningState`] in the metadata of a training under way.
const PROGRESS_KEY: &str = "condition_training";

/// What the file of a training under way says of it.
#[derive(Serialize, Deserialize)]
struct LearningState {
    how: LearningSettings,
    header: VaeHeader,
    rows: usize,
    /// Fingerprint of the rows; `None` if unknown.
    data: Option<Fingerprint>,
    passes: usize,
    steps: i32,
    /// Fingerprint of the tensors, in the order of [`STATE`].
    content: Fingerprint,
}

/// Parameters, and Adam's moments of them.
const STATE: [&str; 3] = ["params", "adam_m", "adam_v"];

impl<'a, S: ConditionSource> Learning<'a, S> {
    /// Saves the training, atomically. `data` is the fingerprint of its rows.
    ///
    /// # Errors
    /// [`VaeError::File`]; then `path` keeps its old content.
    pub fn save(&self, path: &Path, data: Option<Fingerprint>) -> Result<(), VaeError> {
        let values = [&self.vae.params, &self.adam.m, &self.adam.v];
        let bytes = values.map(|values| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        let progress = LearningState {
            how: self.how.clone(),
            header: self.vae.header.clone(),
            rows: self.source.count(),
            data,
            passes: self.passes,
            steps: self.adam.step,
            content: Fingerprint::of(&bytes),
        };
        let text = serde_json::to_string(&progress)
            .map_err(|e| VaeError::Header { path: path.into(), what: e.to_string() })?;
        let shape = [self.vae.params.len()];
        let tensors: Vec<safetensors::TensorOut> =
            STATE.iter().zip(&bytes).map(|(name, bytes)| (*name, Dtype::F32, &shape[..], &bytes[..])).collect();
        Ok(safetensors::write(path, &tensors, &HashMap::from([(PROGRESS_KEY.to_owned(), text)]))?)
    }

    /// Goes on with a training of the same rows in the same way.
    ///
    /// # Errors
    /// [`VaeError::OtherTraining`] says what differs; [`VaeError::Damaged`].
    pub fn load(
        path: &Path,
        source: &'a S,
        how: &LearningSettings,
        data: Option<Fingerprint>,
    ) -> Result<Self, VaeError> {
        // The file is named once.
        let name = format!("{}: ", path.display());
        let damaged = |what: String| VaeError::Damaged { path: path.into(), what: what.replacen(&name, "", 1) };
        let file = SafeFile::open(path).map_err(|why| damaged(why.to_string()))?;
        let text = file.metadata().get(PROGRESS_KEY).ok_or_else(|| damaged("no training under way".into()))?;
        let then: LearningState = json::read(text).map_err(|why| damaged(why.to_string()))?;
        let mut now = Self::new(source, how)?;
        let differs = |key: &str, then: &str, now: &str| format!("{key} {then}, now {now}");
        let other = |what: String| Err(VaeError::OtherTraining { path: path.into(), what });
        let what = differing(&then.how, how, differs);
        if !what.is_empty() {
            return other(what);
        }
        let shown = |rows: usize, data: Option<Fingerprint>| {
            format!("{rows} conditions{}", data.map_or(String::new(), |data| format!(" ({data})")))
        };
        if then.rows != source.count() || differ(&then.data, &data) {
            return other(differs("the data", &shown(then.rows, then.data), &shown(source.count(), data)));
        }
        // The values of these fields may be long.
        let fields = differing(&then.header, &now.vae.header, |field, _, _| format!("another {field}"));
        if !fields.is_empty() {
            return other(fields);
        }
        let mut tensors = Vec::new();
        for name in STATE {
            file.expect_shape(name, &[now.vae.params.len()]).map_err(|why| damaged(why.to_string()))?;
            tensors.push(file.bytes(name).map_err(|why| damaged(why.to_string()))?);
        }
        if Fingerprint::of(&tensors) != then.content || then.passes > how.epochs {
            return Err(damaged("its checksum".into()));
        }
        let mut values = tensors
            .into_iter()
            .map(|bytes| -> Vec<f32> { bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect() });
        let mut next = || values.next().unwrap_or_default();
        now.vae.params = next();
        now.adam = Adam { m: next(), v: next(), step: then.steps };
        now.passes = then.passes;
        Ok(now)
    }
}

fn read_tensor(file: &SafeFile, name: &str, shape: &[usize]) -> Result<Vec<f32>, SafeError> {
    file.expect_shape(name, shape)?;
    file.finite_f32(name)
}
