//! Conditions that somebody computed beforehand: a feature for each image id, in a file.
//!
//! * `.safetensors`: tensors `ids` I64 `[N]` and `features` [N, D] of F16 or F32. Its metadata may say what made
//!   them: `conditioning`, the JSON of a [`Conditioning`].
//! * `.npy`: features [N, D], and their ids `[N]` in a second `.npy` of whole numbers.
//!
//! A safetensors file is mapped, so that only what is asked for is read; a `.npy` is read whole.
//!
//! ```
//! use edm2k::data::features::Features;
//!
//! # use edm2k::formats::safetensors::{Dtype, write};
//! # let path = std::env::temp_dir().join(format!("edm2k-features-{}.safetensors", std::process::id()));
//! # let ids = [7i64, 9].map(i64::to_le_bytes).concat();
//! # let values = [0.5f32, 0.25].map(f32::to_le_bytes).concat();
//! # let tensors = [("ids", Dtype::I64, &[2][..], &ids[..]), ("features", Dtype::F32, &[2, 1], &values)];
//! # write(&path, &tensors, &Default::default())?;
//! let features = Features::open(&path, None)?; // of images 7 and 9, one value wide
//! assert_eq!((features.width(), features.get(9)), (1, Some(vec![0.25])));
//! assert!(!features.contains(8));
//! # drop(features);
//! # std::fs::remove_file(path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::condition::Conditioning;
use crate::formats::fingerprint::{self, Fingerprint, Identity};
use crate::formats::npy::{self, NpyError};
use crate::formats::safetensors::{Dtype, SafeError, SafeFile, widen};
use crate::formats::{At, FileError, ends_in};

/// Key of the [`Conditioning`] in a file's metadata.
pub const CONDITIONING_KEY: &str = "conditioning";

/// What can be wrong with such a file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum FeatureError {
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{0}")]
    Npy(#[from] NpyError),
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: metadata \"{CONDITIONING_KEY}\": {what}", path.display())]
    Conditioning { path: PathBuf, what: String },
    #[error("{}: features without ids; give the .npy of their ids too", path.display())]
    NoIds { path: PathBuf },
    #[error("{}: it has ids of its own, but {} was given too", path.display(), ids.display())]
    TwoIds { path: PathBuf, ids: PathBuf },
    #[error("{}: {what} of shape {found:?}, expected {expected}", path.display())]
    Shape { path: PathBuf, what: &'static str, found: Vec<usize>, expected: String },
    #[error("{}: id {id} occurs twice", path.display())]
    RepeatedId { path: PathBuf, id: i64 },
}

/// Features by image id.
#[derive(Debug)]
pub struct Features {
    rows: HashMap<i64, usize>,
    width: usize,
    values: FeatureValues,
    conditioning: Conditioning,
    identity: Identity,
}

#[derive(Debug)]
enum FeatureValues {
    Mapped(SafeFile),
    Read(Vec<f32>),
}

impl Features {
    /// Opens a file of features, and with a `.npy` that of their ids.
    ///
    /// # Errors
    /// [`FeatureError`]: the message names the file, the tensor, what was found and what was expected.
    pub fn open(path: &Path, ids_path: Option<&Path>) -> Result<Self, FeatureError> {
        let shape_error = |path: &Path, what, found: &[usize], expected: String| {
            Err(FeatureError::Shape { path: path.into(), what, found: found.into(), expected })
        };
        let (shape, ids_shape, ids, values, conditioning) = if ends_in(path, "npy") {
            let ids_path = ids_path.ok_or_else(|| FeatureError::NoIds { path: path.into() })?;
            let (shape, values) = npy::read(path)?;
            let (ids_shape, ids) = npy::read_i64(ids_path)?;
            (shape, ids_shape, ids, FeatureValues::Read(values), Conditioning::UNKNOWN_FEATURES)
        } else {
            if let Some(ids) = ids_path {
                return Err(FeatureError::TwoIds { path: path.into(), ids: ids.into() });
            }
            let file = SafeFile::open(path)?;
            let dtype = file.dtype("features")?;
            if !matches!(dtype, Dtype::F16 | Dtype::F32) {
                return Err(file.unexpected("features", dtype, "F16 or F32").into());
            }
            let conditioning = match file.metadata().get(CONDITIONING_KEY) {
                None => Conditioning::UNKNOWN_FEATURES,
                Some(text) => serde_json::from_str(text)
                    .map_err(|e| FeatureError::Conditioning { path: path.into(), what: e.to_string() })?,
            };
            if conditioning == Conditioning::Tags {
                let what = "found tags, expected features".into();
                return Err(FeatureError::Conditioning { path: path.into(), what });
            }
            let (ids_shape, ids) = (file.shape("ids")?.to_vec(), file.i64("ids")?);
            (file.shape("features")?.to_vec(), ids_shape, ids, FeatureValues::Mapped(file), conditioning)
        };
        let [count, width @ 1..=0x10_0000] = shape[..] else {
            return shape_error(path, "features", &shape, "[N, D]".into());
        };
        if ids_shape != [count] {
            return shape_error(ids_path.unwrap_or(path), "ids", &ids_shape, format!("[{count}], one a feature"));
        }
        let mut rows = HashMap::with_capacity(count);
        for (row, id) in ids.into_iter().enumerate() {
            if rows.insert(id, row).is_some() {
                return Err(FeatureError::RepeatedId { path: ids_path.unwrap_or(path).into(), id });
            }
        }
        // The fingerprint comes last, since a file that has no features need not be read to its end.
        let content = |path: &Path| Fingerprint::of_file(path).at(path);
        let fingerprint = match ids_path {
            None => content(path)?,
            Some(ids) => Fingerprint::of([Some(content(path)?), Some(content(ids)?)].map(|of| format!("{of:?}"))),
        };
        let identity = Identity { name: fingerprint::name(path), fingerprint: Some(fingerprint) };
        Ok(Self { rows, width, values, conditioning, identity })
    }

    /// Width D of the features.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What made them.
    pub fn conditioning(&self) -> &Conditioning {
        &self.conditioning
    }

    /// The identity of the file, or of the two files of features and of ids.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether an image has a feature.
    pub fn contains(&self, id: i64) -> bool {
        self.rows.contains_key(&id)
    }

    /// The feature of an image as it stands in the file, `[D]`.
    pub fn get(&self, id: i64) -> Option<Vec<f32>> {
        let row = *self.rows.get(&id)?;
        Some(match &self.values {
            FeatureValues::Read(values) => values[row * self.width..][..self.width].to_vec(),
            FeatureValues::Mapped(file) => {
                // Name and size were checked when the file was opened.
                let bytes = file.bytes("features").unwrap_or_default();
                let row = &bytes[row * (bytes.len() / self.rows.len())..][..bytes.len() / self.rows.len()];
                let mut values = vec![0.0; self.width];
                match row.len() / self.width {
                    2 => widen(row, &mut values),
                    _ => values.iter_mut().zip(row.as_chunks().0).for_each(|(x, &b)| *x = f32::from_le_bytes(b)),
                }
                values
            }
        })
    }
}
