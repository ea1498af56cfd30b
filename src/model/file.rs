//! Model files: the parameters of a network in one safetensors file, under their official names.
//!
//! Metadata: `config` is the [`Config`] as JSON; `edm2k` is [`ModelMeta`] as JSON, so that sampling needs nothing but
//! the file. A file without `edm2k`, which another program made, is taken to be of square images of `img_resolution`,
//! and of latents if they have four channels. A file without `config` too is a bare `state_dict`, in safetensors or by
//! `torch.save`. Then the shapes of its tensors tell what they can, and the rest is as in EDM2. Weights are stored as
//! the optimizer left them, not normalised, in f16 or f32.

use std::collections::HashMap;
use std::f32::consts::TAU;
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::{Config, ConfigError};
use super::error::ModelError;
use super::guess;
use super::precond::Precond;
use crate::backend::{BackendError, NetworkBackend, Slot, TrainingBackend};
use crate::codec::{Autoencoder, LATENTS};
use crate::condition::vocabulary::{Tag, Vocabulary, VocabularyError};
use crate::condition::{Conditioning, Meaning};
use crate::formats::fingerprint::{Fingerprint, settle};
use crate::formats::safetensors::{self, Dtype, SafeFile, not_finite};
use crate::formats::{json, weights};
use crate::params::{ParamId, ParamKind, ParamTable};
use crate::rng::{Purpose, Stream};

/// What the network's images are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageSpace {
    /// Pixels as x / 127.5 - 1.
    #[default]
    Rgb,
    /// Latents of the Stable Diffusion autoencoder.
    SdVae,
}

/// Element type that weights are saved in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Stored {
    /// The weights as they are in training
    F32,
    /// Rounded to half precision
    F16,
}

impl Stored {
    fn dtype(self) -> Dtype {
        match self {
            Stored::F16 => Dtype::F16,
            Stored::F32 => Dtype::F32,
        }
    }
}

/// What a model file says beside its config; the `edm2k` entry of the metadata.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelMeta {
    /// Height of the images or latents that the network was trained on.
    pub height: usize,
    /// Width of these images or latents.
    pub width: usize,
    /// Whether they are pixels or latents.
    pub encoder: ImageSpace,
    /// Tags of the condition's channels, in order; empty if conditions are not made of tags.
    #[serde(default)]
    pub vocabulary: Vec<String>,
    /// What conditions are made of.
    #[serde(default)]
    pub conditioning: Conditioning,
    /// The autoencoder that made the latents; `None` for pixels, or if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Fingerprint of the training split that it learned from last; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Fingerprint>,
    /// Images seen in training.
    #[serde(default)]
    pub images_seen: u64,
    /// The share of these that was shown without a condition at last; `None` if unknown. If it is 0, the network does not know
    /// what no condition is, so guidance cannot lead away from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cond_dropout: Option<f64>,
    /// Relative standard deviation of the moving average that the weights are, if they are one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_std: Option<f64>,
    /// Seed of the training run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// For a moving average: fingerprint of the options of its training run; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<Fingerprint>,
    /// Fingerprint of the weights that its training began from; `None` if it began from fresh ones, or if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began_from: Option<Fingerprint>,
    /// Where the training images are from.
    #[serde(default)]
    pub source: String,
    /// Licence of the training images.
    #[serde(default)]
    pub licence: String,
}

impl ModelMeta {
    /// What is assumed of a network about which only its config is known.
    pub fn of(config: &Config) -> Self {
        Self {
            height: config.img_resolution,
            width: config.img_resolution,
            encoder: if config.img_channels == LATENTS { ImageSpace::SdVae } else { ImageSpace::Rgb },
            ..Self::default()
        }
    }

    /// Whether the network has never seen an image without its condition, as far as the file says. Then guidance has nothing to
    /// lead away from but another condition, or what another network makes.
    pub fn is_always_conditional(&self, config: &Config) -> bool {
        config.label_dim > 0 && self.cond_dropout == Some(0.0)
    }

    /// Whether conditions, if the network takes some, are classes for all that the file says: neither features nor tags.
    pub fn is_of_classes(&self) -> bool {
        self.conditioning == Conditioning::Tags && self.vocabulary.is_empty()
    }

    /// What the conditions mean. A network of which only the config is known is not known to be conditioned by tags.
    pub fn meaning(&self) -> Meaning {
        let said = (!self.is_of_classes()).then(|| self.conditioning.clone());
        Meaning { conditioning: said, tags: self.vocabulary.clone() }
    }

    /// The tags of its conditions. Their counts are not known here.
    ///
    /// # Errors
    /// [`VocabularyError`]: they cannot be those of a vocabulary.
    pub fn tags(&self) -> Result<Vocabulary, VocabularyError> {
        Vocabulary::new(self.vocabulary.iter().map(|tag| Tag { tag: tag.clone(), count: 0 }).collect())
    }

    /// Takes over from `then` whatever is not known to differ. A comparison of all fields afterwards then finds only
    /// known differences.
    pub fn settle(&mut self, then: &Self) {
        settle(&mut self.autoencoder, &then.autoencoder);
        settle(&mut self.data, &then.data);
        settle(&mut self.options, &then.options);
        settle(&mut self.began_from, &then.began_from);
        if !self.conditioning.differs(&then.conditioning) {
            self.conditioning.clone_from(&then.conditioning);
        }
    }
}

/// A network with its parameters on the host.
///
/// ```
/// use edm2k::model::{Model, Stored};
///
/// let mut model = Model::load("demo/emoji.safetensors")?;
/// assert_eq!(model.get("unet.emb_label.weight").map(<[f32]>::len), Some(128 * 1024));
/// model.get_mut("unet.out_gain").unwrap()[0] *= 0.5;
/// let path = std::env::temp_dir().join("halved.safetensors");
/// model.save(&path, Stored::F32)?;
/// assert_eq!(Model::load(&path)?.get("unet.out_gain"), model.get("unet.out_gain"));
/// # std::fs::remove_file(path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Model {
    /// What the file says beside the config.
    pub meta: ModelMeta,
    /// The network.
    pub net: Precond,
    /// Names and shapes of its parameters.
    pub table: ParamTable,
    /// Values of each parameter, by [`ParamId`], in PyTorch's order.
    pub weights: Vec<Vec<f32>>,
    /// What was assumed where its file leaves it open, for people.
    pub doubts: Vec<String>,
}

debug!(Model { meta });

/// A parameter that [`Model::adapt`] could not take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reinitialised {
    /// Its name.
    pub name: String,
    /// Its shape in the model that was given, if it has it.
    pub found: Option<Vec<usize>>,
    /// Its shape in the new network.
    pub expected: Vec<usize>,
}

/// An open model file. Everything but the values has been checked.
pub struct ModelFile {
    /// What the file says beside the config.
    pub meta: ModelMeta,
    /// The network.
    pub net: Precond,
    /// Names and shapes of its parameters.
    pub table: ParamTable,
    /// What was assumed where the file leaves it open, for people.
    pub doubts: Vec<String>,
    file: SafeFile,
}

debug!(ModelFile { meta });

impl ModelFile {
    /// Opens a model file and checks its metadata and the shapes of its tensors.
    ///
    /// # Errors
    /// See [`ModelError`]; the message names the file, the tensor, what was found and what was expected.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        Self::open_with(path, &Map::new())
    }

    /// The same of a file without a config, of which some of the config's options are `given`.
    ///
    /// # Errors
    /// As [`ModelFile::open`]; the file has a config; [`ModelError::Given`].
    pub fn open_with(path: impl AsRef<Path>, given: &Map<String, Value>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let mut file = weights::open(path)?;
        let metadata = |key, what: String| ModelError::Metadata { path: path.into(), key, what };
        let taken = file.metadata().get(weights::TAKEN);
        let mut doubts: Vec<String> =
            taken.map(|taken| format!("its network is that of {taken}")).into_iter().collect();
        if file.metadata().contains_key("train") {
            return Err(ModelError::Checkpoint { path: path.into() });
        }
        let config: Config = match file.metadata().get("config") {
            Some(_) if !given.is_empty() => {
                return Err(metadata("config", "it is there, so nothing is to be said of the network".into()));
            }
            Some(config) => json::read(config).map_err(|e| metadata("config", e.to_string()))?,
            None => {
                let guessed = guess::guessed(path, file, given)?;
                file = guessed.file;
                doubts.extend(guessed.doubts);
                guessed.config
            }
        };
        let meta = match file.metadata().get("edm2k") {
            None => ModelMeta::of(&config),
            Some(text) => json::read(text).map_err(|e| metadata("edm2k", e.to_string()))?,
        };
        let (net, table) = check_network(path, &config, &meta)?;
        if let Some(name) = file.names().find(|name| table.find(name).is_none()) {
            return Err(ModelError::Unknown { path: path.into(), name: name.into() });
        }
        for (_, spec) in table.iter() {
            file.expect_shape(&spec.name, &spec.shape)?;
        }
        doubts.iter_mut().for_each(|doubt| *doubt = format!("{}: {doubt}", path.display()));
        Ok(Self { meta, net, table, doubts, file })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The smaller type that holds its weights as they are.
    pub fn stored(&self) -> Stored {
        let half = |name| self.file.dtype(name).is_ok_and(|dtype| dtype == Dtype::F16);
        if self.file.names().all(half) { Stored::F16 } else { Stored::F32 }
    }

    /// Reads the values of a parameter, in PyTorch's order.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`], [`ModelError::File`].
    pub fn values(&self, id: ParamId) -> Result<Vec<f32>, ModelError> {
        let name = &self.table[id].name;
        let values = self.file.f32(name)?;
        check_finite(self.path(), name, &values, &values, self.file.dtype(name)?)?;
        Ok(values)
    }
}

impl Model {
    /// Reads and checks a model file.
    ///
    /// # Errors
    /// See [`ModelError`]; the message names the file, the tensor, what was found and what was expected.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        Self::read(ModelFile::open(path)?)
    }

    /// Reads the weights of an open model file.
    ///
    /// # Errors
    /// As [`ModelFile::values`].
    pub fn read(file: ModelFile) -> Result<Self, ModelError> {
        // All at once, and then the first error, whoever met one first.
        let ids: Vec<ParamId> = file.table.iter().map(|(id, _)| id).collect();
        let weights: Vec<_> = ids.into_par_iter().map(|id| file.values(id)).collect();
        let weights = weights.into_iter().collect::<Result<_, _>>()?;
        let ModelFile { meta, net, table, doubts, .. } = file;
        Ok(Self { meta, net, table, weights, doubts })
    }

    /// A network with fresh parameters: weights N(0, 1), gains 0, Fourier frequencies 2 pi N(0, 1) and
    /// phases 2 pi U(0, 1). A parameter's values depend on the seed and its place in the table only.
    ///
    /// # Errors
    /// If the config is not valid.
    pub fn init(config: &Config, seed: u64) -> Result<Self, ConfigError> {
        let (net, table) = Precond::new(config)?;
        let weights = table
            .iter()
            .map(|(id, spec)| {
                let stream = Stream { seed, purpose: Purpose::Init, step: id.0 as u32, image: 0 };
                let mut values = vec![0.0; spec.numel()];
                match spec.kind {
                    ParamKind::Gain => {}
                    ParamKind::Weight { .. } => stream.normals(&mut values),
                    ParamKind::Freqs => {
                        stream.normals(&mut values);
                        values.iter_mut().for_each(|x| *x *= TAU);
                    }
                    ParamKind::Phases => {
                        for (channel, x) in values.iter_mut().enumerate() {
                            *x = TAU * Stream { image: channel as u64, ..stream }.uniform();
                        }
                    }
                }
                values
            })
            .collect();
        Ok(Self {
            meta: ModelMeta { seed: Some(seed), ..ModelMeta::of(config) },
            net,
            table,
            weights,
            doubts: Vec::new(),
        })
    }

    /// The network of another config with this model's parameters, for fine-tuning. Parameters that this model lacks or
    /// has in another shape are fresh, and are listed.
    ///
    /// # Errors
    /// If the config is not valid.
    pub fn adapt(mut self, config: &Config, seed: u64) -> Result<(Self, Vec<Reinitialised>), ConfigError> {
        let mut new = Self::init(config, seed)?;
        let mut fresh = Vec::new();
        for ((_, spec), values) in new.table.iter().zip(&mut new.weights) {
            let old = self.table.find(&spec.name);
            match old {
                Some(id) if self.table[id].shape == spec.shape => *values = std::mem::take(&mut self.weights[id.0]),
                _ => fresh.push(Reinitialised {
                    name: spec.name.clone(),
                    found: old.map(|id| self.table[id].shape.clone()),
                    expected: spec.shape.clone(),
                }),
            }
        }
        Ok((new, fresh))
    }

    /// The values of the parameter of this official name, in PyTorch's order; none if there is no such parameter.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.table.find(name).map(|id| &*self.weights[id.0])
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        self.table.find(name).map(|id| &mut *self.weights[id.0])
    }

    /// Writes a model file, atomically.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] for a weight that the element type cannot hold, [`ModelError::File`] if writing fails, and
    /// as those of [`ModelWriter::create`]; then `path` keeps its old content.
    ///
    /// # Panics
    /// If there is not a value for each place of each parameter.
    pub fn save(&self, path: impl AsRef<Path>, stored: Stored) -> Result<(), ModelError> {
        self.check();
        let mut writer = ModelWriter::create(path, &self.net.config, &self.meta, &self.table, stored)?;
        self.weights.iter().try_for_each(|values| writer.write(values))?;
        writer.finish()
    }

    /// Panics unless there is a value for each place of each parameter.
    fn check(&self) {
        assert_eq!(self.weights.len(), self.table.len(), "values of as many parameters as the network has");
        for ((_, spec), values) in self.table.iter().zip(&self.weights) {
            assert_eq!(values.len(), spec.numel(), "values of {}", spec.name);
        }
    }

    /// Copies the parameters into a backend that was made for this table, ready to be sampled with.
    ///
    /// # Errors
    /// The backend was made for a table with other sizes, or its device fails.
    ///
    /// # Panics
    /// If there is not a value for each place of each parameter.
    pub fn load_into<B: NetworkBackend>(&self, backend: &mut B) -> Result<(), BackendError> {
        self.check();
        self.table.iter().zip(&self.weights).try_for_each(|((id, _), values)| backend.load_param(id, values))?;
        backend.normalize()
    }

    /// Copies the parameters into a slot of a backend that was made for this table.
    ///
    /// # Errors
    /// As [`Model::load_into`]; or the backend does not hold the slot.
    ///
    /// # Panics
    /// As there.
    pub fn upload<B: TrainingBackend>(&self, backend: &mut B, slot: Slot) -> Result<(), BackendError> {
        self.check();
        self.table.iter().zip(&self.weights).try_for_each(|((id, _), values)| backend.write_param(slot, id, values))
    }
}

/// Writes a model file parameter by parameter, in the order of the table, so that memory need not hold them all.
/// The file is there once [`finish`](Self::finish) has returned.
pub struct ModelWriter<'a> {
    path: PathBuf,
    file: safetensors::Writer,
    names: Box<dyn Iterator<Item = &'a str> + 'a>,
    stored: Stored,
}

debug!(ModelWriter<'_> { path });

impl<'a> ModelWriter<'a> {
    /// Begins a file of the network of `config`, whose parameters `table` lists.
    ///
    /// # Errors
    /// [`ModelError::File`]; [`ModelError::Config`] and [`ModelError::Metadata`] for what [`ModelFile::open`] would refuse.
    ///
    /// # Panics
    /// If the table is of another network.
    pub fn create(
        path: impl AsRef<Path>,
        config: &Config,
        meta: &ModelMeta,
        table: &'a ParamTable,
        stored: Stored,
    ) -> Result<Self, ModelError> {
        let path = path.as_ref().to_path_buf();
        let (_, expected) = check_network(&path, config, meta)?;
        assert!(*table == expected, "parameters of another network than its config says");
        let json = |key, value: serde_json::Result<String>| {
            value.map_err(|e| ModelError::Metadata { path: path.clone(), key, what: e.to_string() })
        };
        let metadata = HashMap::from([
            ("config".to_owned(), json("config", serde_json::to_string(config))?),
            ("edm2k".to_owned(), json("edm2k", serde_json::to_string(meta))?),
        ]);
        let dtype = stored.dtype();
        let tensors: Vec<_> =
            table.iter().map(|(_, spec)| (spec.name.as_str(), dtype, spec.shape.as_slice())).collect();
        let file = safetensors::Writer::create(&path, &tensors, &metadata)?;
        Ok(Self { path, file, names: Box::new(table.iter().map(|(_, spec)| spec.name.as_str())), stored })
    }

    /// Writes the values of the next parameter, in PyTorch's order.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] for one that the element type cannot hold, [`ModelError::File`].
    pub fn write(&mut self, values: &[f32]) -> Result<(), ModelError> {
        let name = self.names.next().unwrap_or_default();
        let bytes: Vec<u8> = match self.stored {
            Stored::F16 => {
                let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                let rounded: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
                check_finite(&self.path, name, values, &rounded, Dtype::F16)?;
                halves.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            Stored::F32 => {
                check_finite(&self.path, name, values, values, Dtype::F32)?;
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
        };
        Ok(self.file.write(&bytes)?)
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// [`ModelError::File`]; then the path keeps its old content.
    pub fn finish(self) -> Result<(), ModelError> {
        Ok(self.file.finish()?)
    }
}

/// The network of a file, whose config and metadata must go together.
fn check_network(path: &Path, config: &Config, meta: &ModelMeta) -> Result<(Precond, ParamTable), ModelError> {
    let config_error = |cause| ModelError::Config { path: path.into(), cause };
    let metadata = |what| ModelError::Metadata { path: path.into(), key: "edm2k", what };
    let made = Precond::new(config).map_err(config_error)?;
    config.check_size(meta.height, meta.width).map_err(config_error)?;
    let tags = meta.vocabulary.len();
    if tags > 0 && tags != config.label_dim {
        return Err(metadata(format!("{tags} tags in the vocabulary, expected label_dim = {}", config.label_dim)));
    }
    meta.tags().map_err(|cause| metadata(cause.to_string()))?;
    Ok(made)
}

/// Checks that `values`, which are `rounded` in a file, are finite numbers there.
fn check_finite(path: &Path, name: &str, values: &[f32], rounded: &[f32], dtype: Dtype) -> Result<(), ModelError> {
    match not_finite(rounded) {
        None => Ok(()),
        Some(at) => Err(ModelError::NotFinite { path: path.into(), name: name.into(), at, value: values[at], dtype }),
    }
}
