//! Its file: safetensors, weights in f16, everything else in the metadata.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::f16;

use super::net::Linear;
use super::{Header, Kind, Vae};
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile};

/// Key of the [`Header`] in the file's metadata.
const HEADER_KEY: &str = "condition_model";

/// What can be wrong with a condition model.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum VaeError {
    #[error(transparent)]
    File(#[from] SafeError),
    #[error("{}: metadata \"{HEADER_KEY}\": {what}", path.display())]
    Header { path: PathBuf, what: String },
    #[error("{}: its vocabulary: {cause}", path.display())]
    Vocabulary { path: PathBuf, cause: VocabularyError },
    #[error("training diverged in epoch {0}: the loss or a weight is not finite, or not in f16")]
    Diverged(usize),
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
        let header: Header = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let v = header.vocabulary.len();
        for (what, size) in [("width", header.width), ("latent", header.latent), ("hidden", header.hidden)] {
            if !(1..=1 << 16).contains(&size) {
                return Err(wrong(format!("{what} is {size}, expected 1 to {}", 1 << 16)));
            }
        }
        if v > 1 << 16 || (header.kind == Kind::Tags && v != header.width) {
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
        if kind == Kind::Dense {
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
        if self.header.kind == Kind::Dense {
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

fn read_tensor(file: &SafeFile, name: &str, shape: &[usize]) -> Result<Vec<f32>, SafeError> {
    file.expect_shape(name, shape)?;
    file.finite_f32(name)
}
