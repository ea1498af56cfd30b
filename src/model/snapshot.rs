//! Snapshots of NVIDIA's EDM2 (`network-snapshot-*.pkl`) as models.
//!
//! Such a file is a pickle of a dictionary `{encoder, dataset_kwargs, loss_fn, ema}`, of which `ema` is the network:
//!
//! ```text
//! ema = Precond                       attributes img_resolution, img_channels, label_dim, sigma_data;
//!   unet = UNet                       _init_kwargs: the options that it was made with
//!     enc, dec = ModuleDict           label_balance, concat_balance
//!       64x64_block0 = Block, ...     flavor, resample_mode, num_heads, res_balance, attn_balance, clip_act
//!         conv_res0 = MPConv, ...     _parameters {weight: tensor}
//! ```
//!
//! `X = Class` is a call of `torch_utils.persistence._reconstruct_persistent_obj` with the class's name and a state
//! `{_parameters, _buffers, _modules, _init_args, _init_kwargs, attributes ...}`; that the file also holds the
//! program text of its classes is of no interest here. Names and shapes of the tensors are those of the
//! [`ParamTable`].
//!
//! Nothing in the file is run, and what is not needed is not looked at (see [`crate::formats::pickle`]). Memory is
//! bounded by the file: twice its size for the weights of a file in f16, which become f32.

use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::config::Config;
use super::file::{ImageSpace, Model, ModelMeta, Stored};
use super::precond::Precond;
use crate::formats::mapped::Mapped;
use crate::formats::pickle::{Id, Pickle, PickleError, Value, quoted};
use crate::formats::safetensors::Dtype;
use crate::formats::torch::{Storages, Tensor};
use crate::formats::{At, FileError, input};
use crate::params::ParamTable;

/// Most modules of a network.
const MAX_MODULES: usize = 1 << 14;

/// Longest name of a module or tensor.
const MAX_NAME: usize = 200;

/// The most entries of dictionaries that are looked at, counted over all look-ups. EDM2's networks take about 40,000.
const MAX_LOOKED_AT: usize = 1 << 24;

/// Options of the official network that are ignored here.
const IGNORED: [&str; 3] = ["use_fp16", "dropout", "resample_filter"];

/// Why a file is not a snapshot that can be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum SnapshotError {
    #[error("{0}")]
    Io(#[from] FileError),
    /// It is no pickle, or a damaged one.
    #[error("{}: not a whole pickle: {cause}", path.display())]
    Pickle { path: PathBuf, cause: PickleError },
    /// What the pickle holds is not what an EDM2 network has there.
    #[error("{}: {at}: {what}", path.display())]
    Tree { path: PathBuf, at: String, what: String },
}

type Result<T, E = SnapshotError> = std::result::Result<T, E>;

/// A snapshot, read.
#[derive(Debug)]
pub struct OfficialSnapshot {
    /// The network with its weights.
    pub model: Model,
    /// The smaller type that holds its weights unchanged.
    pub stored: Stored,
}

impl OfficialSnapshot {
    /// Reads a snapshot. Images seen and width of the moving average are taken from the file's name if
    /// that ends as official names do, in thousands of images and width: `...-2147483-0.135.pkl`. Such a network has seen no
    /// image without its label.
    ///
    /// The file must not be changed while it is read.
    ///
    /// # Errors
    /// [`SnapshotError`]: the file cannot be read, is no pickle, or holds no EDM2 network.
    pub fn open(path: &Path) -> Result<Self> {
        let file = input::open(path).at(path)?;
        // SAFETY: that nobody changes the file meanwhile is the documented condition.
        let map = unsafe { Mapped::new(&file, path) }.at(path)?;
        let mut snapshot = Self::parse(path, &map)?;
        if let Some((images_seen, std)) = path.file_stem().and_then(|name| trained(name.to_str()?)) {
            snapshot.model.meta.images_seen = images_seen;
            snapshot.model.meta.ema_std = Some(std);
            // The published networks saw all labels; a network without labels of its own guides them.
            snapshot.model.meta.cond_dropout = Some(0.0);
        }
        Ok(snapshot)
    }

    /// Reads a snapshot from memory; `path` is what errors call it.
    ///
    /// # Errors
    /// As [`OfficialSnapshot::open`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let damaged = |cause| SnapshotError::Pickle { path: path.into(), cause };
        if let Some(kind) = input::kind(bytes).filter(|kind| !kind.contains("pickle")) {
            return Err(damaged(PickleError { offset: 0, what: format!("it is {kind}, expected a pickle") }));
        }
        let pickle = Pickle::parse(bytes, 0).map_err(damaged)?;
        let rest = bytes.len() - pickle.end();
        if rest > 0 {
            return Err(damaged(PickleError { offset: pickle.end(), what: format!("{rest} bytes after its end") }));
        }
        let tree = Tree { path, pickle: &pickle, looked_at: Cell::new(0) };
        let root = tree.entries("the file", pickle.root())?;
        let none = || {
            tree.error("the file", "it has no ema, as snapshots have; weights alone are read as a model as they are")
        };
        let ema = tree.get(root, "ema")?.ok_or_else(none)?;
        let modules = tree.modules(ema)?;
        let config = tree.config(&modules)?;
        let (net, table) = Precond::new(&config).map_err(|e| tree.error("ema._init_kwargs", e))?;
        let numel: usize = table.iter().map(|(_, spec)| spec.numel()).sum();
        // Elements have two bytes at least. More elements could not be read, but would be allocated.
        if numel > bytes.len() / 2 {
            let what = format!("a network of {numel} values, more than the file's {} bytes can hold", bytes.len());
            return Err(tree.error("ema._init_kwargs", what));
        }
        tree.check_blocks(&modules, &config, &table)?;
        let (weights, stored) = tree.weights(&modules, &table)?;
        let mut meta = ModelMeta::of(&config);
        // Only the encoder's class matters, and it may be one that is not known here.
        let encoder = tree.get(root, "encoder")?.and_then(|id| tree.object("encoder", id).ok());
        match encoder {
            Some(("StabilityVAEEncoder", _)) => meta.encoder = ImageSpace::SdVae,
            Some(("StandardRGBEncoder", _)) => meta.encoder = ImageSpace::Rgb,
            _ => {}
        }
        Ok(Self { model: Model { meta, net, table, weights, doubts: Vec::new() }, stored })
    }
}

/// Images seen and width of the average, from an official file name without its ending.
fn trained(stem: &str) -> Option<(u64, f64)> {
    let (rest, std) = stem.rsplit_once('-')?;
    let (_, thousands) = rest.rsplit_once('-')?;
    if thousands.len() < 7 || !thousands.bytes().all(|b| b.is_ascii_digit()) || !std.starts_with("0.") {
        return None;
    }
    let std = std.parse().ok().filter(|std| (0.0..1.0).contains(std) && *std > 0.0)?;
    Some((thousands.parse::<u64>().ok()?.checked_mul(1000)?, std))
}

/// Keys and values of a dictionary.
type DictEntries<'p> = &'p [(Id, Id)];

/// A module of the network.
struct Module<'a, 'p> {
    /// Its place, `ema` or `ema.` and its official name.
    at: String,
    class: &'a str,
    state: DictEntries<'p>,
}

/// What the pickle made, and how much of it has been looked at.
struct Tree<'a, 'p> {
    path: &'p Path,
    pickle: &'p Pickle<'a>,
    looked_at: Cell<usize>,
}

impl<'a, 'p> Tree<'a, 'p> {
    fn error(&self, at: &str, what: impl ToString) -> SnapshotError {
        SnapshotError::Tree { path: self.path.into(), at: at.into(), what: what.to_string() }
    }

    fn unexpected(&self, at: &str, id: Id, expected: &str) -> SnapshotError {
        self.error(at, self.pickle.unexpected(id, expected))
    }

    /// Counts look-ups, which a hostile file could make slow by having many in one large dictionary.
    fn look_at(&self, entries: DictEntries<'p>) -> Result<DictEntries<'p>> {
        self.looked_at.set(self.looked_at.get() + entries.len());
        match self.looked_at.get() > MAX_LOOKED_AT {
            true => Err(self.error("ema", format!("more than {MAX_LOOKED_AT} entries to look through"))),
            false => Ok(entries),
        }
    }

    /// What a dictionary of any kind holds.
    fn entries(&self, at: &str, id: Id) -> Result<DictEntries<'p>> {
        const DICTIONARIES: [(&str, &str); 2] = [("collections", "OrderedDict"), ("dnnlib.util", "EasyDict")];
        match &self.pickle[id] {
            Value::Dict(items) => self.look_at(items),
            Value::Call { items, .. } if self.pickle.call_of(id, &DICTIONARIES).is_some() => self.look_at(items),
            _ => Err(self.unexpected(at, id, "a dictionary")),
        }
    }

    fn get(&self, entries: DictEntries<'p>, key: &str) -> Result<Option<Id>> {
        let found = self.look_at(entries)?.iter().rfind(|&&(k, _)| self.pickle[k] == Value::Text(key));
        Ok(found.map(|&(_, value)| value))
    }

    fn need(&self, at: &str, entries: DictEntries<'p>, key: &str) -> Result<Id> {
        self.get(entries, key)?.ok_or_else(|| self.error(at, format!("it has no {key}")))
    }

    /// A name that may become part of a path.
    fn name(&self, at: &str, id: Id) -> Result<&'a str> {
        match self.pickle[id] {
            Value::Text(name) if at.len() + name.len() <= MAX_NAME => Ok(name),
            _ => Err(self.unexpected(at, id, "a name")),
        }
    }

    /// Class and state of a persistent object.
    fn object(&self, at: &str, id: Id) -> Result<(&'a str, DictEntries<'p>)> {
        let object = [("torch_utils.persistence", "_reconstruct_persistent_obj")];
        let Some(&[meta]) = self.pickle.call_of(id, &object) else {
            return Err(self.unexpected(at, id, "an object of torch_utils.persistence"));
        };
        let meta = self.entries(at, meta)?;
        for (key, value, expected) in [
            ("type", Value::Text("class"), "the type 'class' of a persistent object"),
            ("version", Value::Int(6), "version 6 of persistent objects"),
        ] {
            let found = self.need(at, meta, key)?;
            if self.pickle[found] != value {
                return Err(self.unexpected(at, found, expected));
            }
        }
        let class = self.name(at, self.need(at, meta, "class_name")?)?;
        Ok((class, self.entries(at, self.need(at, meta, "state")?)?))
    }

    fn module(&self, at: String, id: Id) -> Result<Module<'a, 'p>> {
        if let Value::Call { state: Some(state), .. } = self.pickle[id]
            && self.pickle.call_of(id, &[("torch.nn.modules.container", "ModuleDict")]).is_some()
        {
            let state = self.entries(&at, state)?;
            return Ok(Module { at, class: "ModuleDict", state });
        }
        let (class, state) = self.object(&at, id)?;
        let classes: &[&str] = if at == "ema" { &["Precond"] } else { &["UNet", "Block", "MPConv", "MPFourier"] };
        if !classes.contains(&class) {
            let what = format!("found a module of class {}, expected {}", quoted(class), classes.join(", "));
            return Err(self.error(&at, what));
        }
        Ok(Module { at, class, state })
    }

    /// The network and every module in it, the outer ones first.
    fn modules(&self, ema: Id) -> Result<Vec<Module<'a, 'p>>> {
        let mut modules = vec![self.module("ema".into(), ema)?];
        let mut next = 0;
        while next < modules.len() {
            let Module { at, state, .. } = &modules[next];
            let (at, children) = (at.clone(), self.entries(at, self.need(at, state, "_modules")?)?);
            for &(name, child) in children {
                if self.pickle[child] == Value::None {
                    continue;
                }
                let at = format!("{at}.{}", self.name(&at, name)?);
                if modules.len() == MAX_MODULES {
                    return Err(self.error(&at, format!("more than {MAX_MODULES} modules")));
                }
                modules.push(self.module(at, child)?);
            }
            next += 1;
        }
        Ok(modules)
    }

    /// A number, a flag, a word, nothing, or a short list of numbers.
    fn json(&self, at: &str, id: Id) -> Result<Json> {
        let expected = "a number, a word or a list of 16 numbers at most";
        Ok(match &self.pickle[id] {
            Value::None => Json::Null,
            Value::Bool(value) => (*value).into(),
            Value::Int(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(word) if word.len() <= MAX_NAME => (*word).into(),
            Value::List(items) | Value::Tuple(items) if items.len() <= 16 => {
                let number = |&id: &Id| match self.pickle[id] {
                    Value::Int(value) => Ok(Json::from(value)),
                    _ => Err(self.unexpected(at, id, "a whole number")),
                };
                items.iter().map(number).collect::<Result<_>>()?
            }
            _ => return Err(self.unexpected(at, id, expected)),
        })
    }

    /// An attribute of a module.
    fn attribute(&self, module: &Module<'a, 'p>, name: &str) -> Result<Json> {
        self.json(&format!("{}.{name}", module.at), self.need(&module.at, module.state, name)?)
    }

    /// The network's options: those that it was made with, where the modules' own attributes override them.
    fn config(&self, modules: &[Module<'a, 'p>]) -> Result<Config> {
        let precond = &modules[0];
        let args = self.need("ema", precond.state, "_init_args")?;
        if self.pickle[args] != Value::Tuple(Vec::new()) {
            return Err(self.unexpected("ema._init_args", args, "an empty tuple (options are known by their names)"));
        }
        let at = "ema._init_kwargs";
        let mut options = Map::new();
        for &(name, value) in self.entries(at, self.need("ema", precond.state, "_init_kwargs")?)? {
            let name = self.name(at, name)?;
            if !IGNORED.contains(&name) {
                options.insert(name.into(), self.json(&format!("{at}.{name}"), value)?);
            }
        }
        let unet = modules.iter().find(|m| m.at == "ema.unet").ok_or_else(|| self.error("ema", "it has no unet"))?;
        for (module, names) in [
            (precond, ["img_resolution", "img_channels", "label_dim", "sigma_data"].as_slice()),
            (unet, &["label_balance", "concat_balance"]),
        ] {
            for &name in names {
                options.insert(name.into(), self.attribute(module, name)?);
            }
        }
        let mut of_blocks = Map::new();
        for block in modules.iter().filter(|module| module.class == "Block") {
            for name in ["res_balance", "attn_balance", "clip_act"] {
                let value = self.attribute(block, name)?;
                let first = of_blocks.entry(name).or_insert_with(|| value.clone());
                if *first != value {
                    let what = format!("found {value}, expected {first} as in the other blocks");
                    return Err(self.error(&format!("{}.{name}", block.at), what));
                }
            }
        }
        options.extend(of_blocks);
        serde_json::from_value(Json::Object(options)).map_err(|e| self.error(at, e))
    }

    /// Checks that each block computes what its name and the options imply.
    fn check_blocks(&self, modules: &[Module<'a, 'p>], config: &Config, table: &ParamTable) -> Result<()> {
        for block in modules.iter().filter(|module| module.class == "Block") {
            let name = &block.at["ema.".len()..];
            let heads = match table.find(&format!("{name}.attn_proj.weight")) {
                Some(id) => table[id].shape[0] / config.channels_per_head,
                None => 0,
            };
            let flavor = if name.starts_with("unet.enc.") { "enc" } else { "dec" };
            let mode = ["down", "up"].into_iter().find(|mode| name.ends_with(&format!("_{mode}"))).unwrap_or("keep");
            for (attribute, expected) in [
                ("flavor", Json::from(flavor)),
                ("resample_mode", mode.into()),
                ("resample_filter", vec![1, 1].into()),
                ("num_heads", heads.into()),
            ] {
                let found = self.attribute(block, attribute)?;
                if found != expected {
                    let what = format!("found {found}, expected {expected}");
                    return Err(self.error(&format!("{}.{attribute}", block.at), what));
                }
            }
        }
        Ok(())
    }

    /// The values of every parameter and buffer, by [`crate::params::ParamId`].
    fn weights(&self, modules: &[Module<'a, 'p>], table: &ParamTable) -> Result<(Vec<Vec<f32>>, Stored)> {
        let by_name: HashMap<&str, _> = table.iter().map(|(id, spec)| (spec.name.as_str(), id)).collect();
        let mut weights: Vec<Option<Vec<f32>>> = vec![None; table.len()];
        let mut stored = Stored::F16;
        let mut storages = Storages::new();
        for module in modules {
            for kind in ["_parameters", "_buffers"] {
                for &(name, value) in self.entries(&module.at, self.need(&module.at, module.state, kind)?)? {
                    if self.pickle[value] == Value::None {
                        continue;
                    }
                    let at = format!("{}.{}", module.at, self.name(&module.at, name)?);
                    let Some(&id) = by_name.get(&at["ema.".len()..]) else {
                        return Err(self.error(&at, "a tensor that a network of these options does not have"));
                    };
                    let expected = &table[id].shape;
                    let tensor = Tensor::read(self.pickle, value, &mut storages).map_err(|e| self.error(&at, e))?;
                    if tensor.shape != *expected {
                        let found = &tensor.shape;
                        return Err(self.error(&at, format!("found shape {found:?}, expected {expected:?}")));
                    }
                    let values = tensor.values();
                    if let Some(place) = values.iter().position(|x| !x.is_finite()) {
                        return Err(self.error(&at, format!("found {} at {place}, expected numbers", values[place])));
                    }
                    if tensor.dtype != Dtype::F16 {
                        stored = Stored::F32;
                    }
                    if weights[id.0].replace(values).is_some() {
                        return Err(self.error(&at, "it is there twice"));
                    }
                }
            }
        }
        let found = weights.into_iter().zip(table.iter());
        let weights = found.map(|(values, (_, spec))| {
            values.ok_or_else(|| self.error(&format!("ema.{}", spec.name), "the tensor is missing"))
        });
        Ok((weights.collect::<Result<_>>()?, stored))
    }
}
