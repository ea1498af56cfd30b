//! Training as in EDM2: loss with learned uncertainty, Adam, forced weight normalisation, power-function
//! moving averages; statistics, validation, snapshots and checkpoints on intervals.
//!
//! A step over images t .. t + batch of the run ([`order`]): micro-batches ([`batch`]) go forward and backward, their
//! gradients add up, then one pass over the parameters ([`TrainingBackend::optimizer_step`]) with the learning rate at
//! t and the moving averages at t + batch. What a step does depends on the parameters, the moments and t
//! alone, all of which a checkpoint holds to the bit; so a run that was stopped ends where one that was not
//! does.
//!
//! In the output directory: `checkpoint-*.safetensors` (rotated), `snapshot-*-*.safetensors` (kept: post-hoc
//! averaging needs them), `grid-*.png`, `stats.jsonl`, `loss.svg`, and `training_options.json`, the [`Settings`].
//!
//! On several ranks ([`Collective`]) each takes its share of every step's images, the gradients are summed once a step,
//! and every rank takes the same step with them. Since all that is random is a function of an image's number, such a run
//! computes what one rank does, but for the rounding of sums. Rank 0 reads and writes; validation and grids are shared.
//!
//! A run is [`Settings`], which decide what it computes, and an [`Execution`], which decides what it does beside; see
//! [`Training`] and `examples/train.rs`.
//!
//! ```
//! use edm2k::data::dataset::{Dataset, Split};
//! use edm2k::model::Model;
//! use edm2k::train::{Settings, meta_of};
//!
//! let data = Dataset::open("tests/data/emoji".as_ref(), Split::Train)?;
//! let mut config = Model::load("demo/emoji.safetensors")?.net.config;
//! config.label_dim = data.condition_dim();
//! let settings = Settings { batch: 64, ..Settings::new(&data, config.clone(), 200_000) };
//! assert_eq!(settings.learning_rate().at(10_000), 0.005); // halfway up
//! assert_eq!(meta_of(&data, &config, settings.seed).vocabulary.len(), 64);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

pub mod batch;
pub mod checkpoint;
pub mod ema;
pub mod events;
pub mod grid;
pub mod memory;
pub mod order;
pub mod posthoc;
pub mod schedule;
pub mod stats;
pub mod validation;

pub use checkpoint::{CheckpointError, State};
pub use schedule::{LearningRate, Schedule};
pub use stats::{Status, Sums, Validation};

use crate::backend::{BackendError, Masks, Normalization, Slot, Step, TrainingBackend, Values};
use crate::codec::Autoencoder;
use crate::collective::{Collective, CollectiveError, agree, share};
use crate::condition::Conditioning;
use crate::data::dataset::{Dataset, DatasetError, Header, Representation};
use crate::device::{Backends, Device, Work};
use crate::formats::fingerprint::{Fingerprint, Identity, settle};
use crate::formats::{At, DirLock, FileError, LockError, free_name, input, write_atomically};
use crate::model::file::save;
use crate::model::{Config, Encoder, Model, ModelError, ModelMeta, Precision, Precond};
use crate::params::ParamId;
use crate::sample::SampleError;
use batch::Batch;
use checkpoint::Checkpoint;
use events::Events;
use order::Order;
use stats::StatsFile;

/// Everything that decides what a run computes; a run may only be resumed with the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The network.
    pub config: Config,
    /// The training images.
    pub data: DataIdentity,
    /// Weights that the run starts from, if not fresh ones.
    pub init: Option<Identity>,
    /// Seed of everything random.
    pub seed: u64,
    /// Images to train on; the last step may go past it. Matters to the `linear` schedule only.
    pub duration: u64,
    /// Images per optimizer step.
    pub batch: u64,
    /// Reference learning rate.
    pub lr: f64,
    /// Shape of the learning rate.
    pub schedule: Schedule,
    /// Batches after which `edm2`'s learning rate falls; 0 = never.
    pub decay: f64,
    /// Images over which the learning rate rises; 0 = none.
    pub rampup: u64,
    /// Mean of ln(sigma).
    pub p_mean: f64,
    /// Standard deviation of ln(sigma).
    pub p_std: f64,
    /// Relative standard deviations of the moving averages.
    pub ema: Vec<f64>,
    /// Share of the images that are shown without their condition.
    pub cond_dropout: f64,
    /// Images after which that begins.
    pub cond_dropout_from: u64,
    /// Whether half of the images that allow it are mirrored.
    pub flip: bool,
    /// Share of the activations that are zeroed before each block's second convolution.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropout: f64,
}

fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

/// Name of the file of a run's [`Settings`].
const OPTIONS_FILE: &str = "training_options.json";
/// Adam's decay rates of the two moments.
const BETAS: (f64, f64) = (0.9, 0.99);
/// Adam's eps.
const EPS: f64 = 1e-8;

/// What tells one training split from another, wherever it lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// Number of images.
    pub images: usize,
    /// Height, width, channels; where there are several sizes, of the most frequent one.
    pub shape: [usize; 3],
    /// Height and width of each size that there are images of, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sizes: Vec<[usize; 2]>,
    /// Width of the conditions.
    pub condition_dim: usize,
    /// CRC-32 of the ids in order, each as often as an epoch shows it.
    pub ids: u32,
    /// Pixels or latents.
    pub kind: Representation,
    /// What the conditions are made of.
    pub conditioning: Conditioning,
    /// What latents are of; none of pixels, or if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Of the tags; none if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<Fingerprint>,
    /// Of all images and conditions; none if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Fingerprint>,
}

impl DataIdentity {
    /// The identity of a split.
    pub fn of(data: &Dataset) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        (0..data.len()).for_each(|i| hasher.update(&data.id(i).to_le_bytes().repeat(data.repeats(i))));
        let ids = hasher.finalize();
        let Header { kind, conditioning, autoencoder, .. } = data.header().clone();
        let sizes = data.sizes();
        Self {
            images: data.len(),
            shape: data.shape(),
            sizes: if sizes.len() > 1 { sizes } else { Vec::new() },
            condition_dim: data.condition_dim(),
            ids,
            kind,
            conditioning,
            autoencoder,
            vocabulary: Some(data.vocabulary().fingerprint()),
            content: data.fingerprint(),
        }
    }

    /// Height and width of each size that there are images of; one at least.
    pub fn all_sizes(&self) -> Vec<[usize; 2]> {
        if self.sizes.is_empty() { vec![[self.shape[0], self.shape[1]]] } else { self.sizes.clone() }
    }

    /// The size with most pixels: what it has room for, the others have.
    pub fn largest(&self) -> [usize; 2] {
        let [height, width, _] = self.shape;
        self.all_sizes().into_iter().max_by_key(|[height, width]| height * width).unwrap_or([height, width])
    }

    /// Takes over from `then` what is not known to differ.
    fn settle(&mut self, then: &Self) {
        settle(&mut self.autoencoder, &then.autoencoder);
        settle(&mut self.vocabulary, &then.vocabulary);
        settle(&mut self.content, &then.content);
        if !self.conditioning.differs(&then.conditioning) {
            self.conditioning.clone_from(&then.conditioning);
        }
    }
}

/// Paths need not be UTF-8, JSON does.
fn as_shown<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// What a run does beside training: intervals are in images, 0 = never.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Execution {
    /// Where everything goes.
    #[serde(serialize_with = "as_shown")]
    pub outdir: PathBuf,
    /// Images per micro-batch; changes results by rounding only.
    pub batch_gpu: u64,
    /// Interval of statistics.
    pub status: u64,
    /// Interval of the validation loss.
    pub validate: u64,
    /// Interval of sample grids.
    pub grid: u64,
    /// Whether statistics go into an event file of TensorBoard's too.
    pub tensorboard: bool,
    /// Interval of snapshots.
    pub snapshot: u64,
    /// Interval of checkpoints.
    pub checkpoint: u64,
    /// Checkpoints to keep.
    pub keep: usize,
    /// Whether a run that is gone on with keeps its ramp-up, as no other was asked for.
    pub keep_rampup: bool,
    /// Whether to begin anew, with what the directory has set aside.
    pub restart: bool,
    /// Device and number type, for people.
    pub computed_on: String,
}

impl Execution {
    /// What suits the length of a run: 10 snapshots, 50 checkpoints and grids, 100 validations, 500 lines of statistics;
    /// fewer grids, so that all but the one at the end take a hundredth of the time at most (see [`grid::cost`]).
    /// Micro-batches are as large as 1 GiB of activations allows, on a GPU 4 GiB.
    pub fn new(outdir: impl Into<PathBuf>, settings: &Settings, device: &Device) -> Self {
        let every = |times: u64| (settings.duration / times).max(1);
        let ([height, width], on_gpu) = (settings.data.largest(), device.runtime().is_some());
        Self {
            outdir: outdir.into(),
            batch_gpu: memory::default_batch_gpu(&settings.config, height, width, settings.batch, on_gpu),
            status: every(500),
            validate: every(100),
            grid: every(50).max(grid::SHARE.saturating_mul(grid::cost(settings, 0))),
            tensorboard: false,
            snapshot: every(10),
            checkpoint: every(50),
            keep: 3,
            keep_rampup: true,
            restart: false,
            computed_on: device.to_string(),
        }
    }
}

/// What a model that learns from these images says of itself.
pub fn meta_of(data: &Dataset, config: &Config, seed: u64) -> ModelMeta {
    let header = data.header();
    // Places of features have no names.
    let tags = match header.conditioning {
        Conditioning::Tags => data.vocabulary().tags(),
        Conditioning::Features { .. } => &[],
    };
    ModelMeta {
        height: header.height,
        width: header.width,
        encoder: if header.kind == Representation::Latents { Encoder::SdVae } else { Encoder::Rgb },
        vocabulary: if tags.len() == config.label_dim { tags.iter().map(|t| t.tag.clone()).collect() } else { vec![] },
        conditioning: header.conditioning.clone(),
        autoencoder: header.autoencoder.clone(),
        data: data.fingerprint(),
        seed: Some(seed),
        source: header.source.clone(),
        licence: header.licence.clone(),
        ..ModelMeta::default()
    }
}

/// Why training could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TrainError {
    #[error(transparent)]
    Io(#[from] FileError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Data(#[from] DatasetError),
    #[error(transparent)]
    Validation(#[from] validation::ValidationError),
    #[error(transparent)]
    Grid(#[from] grid::GridError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The run that is to be resumed had other settings.
    #[error("{} was made with other options: {differences}. Give the same, or another --outdir", path.display())]
    Settings { path: PathBuf, differences: String },
    /// The dataset has more images than when the run began.
    #[error(
        "{}: made with {then} images ({then_print}), and the dataset has grown to {now} ({now_print}). A run keeps to its \
         images: begin another --outdir, with --init and a snapshot of this run", path.display()
    )]
    Grown { path: PathBuf, then: usize, then_print: Fingerprint, now: usize, now_print: Fingerprint },
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Ranks(#[from] CollectiveError),
    /// Some ranks would have nothing to do.
    #[error("a batch of {batch} images, expected one at least for each of {ranks} ranks")]
    FewImages { batch: u64, ranks: usize },
    /// There are checkpoints, but none is whole.
    #[error(
        "no whole checkpoint is left in {} ({first}{}). --restart would set aside what is there, and begin anew",
        dir.display(), if *more > 0 { format!("; {more} more are damaged") } else { String::new() }
    )]
    AllDamaged { dir: PathBuf, first: CheckpointError, more: usize },
    /// Going on would only make numbers that mean nothing.
    #[error(
        "the run has diverged after {nimg} images: {what}. Begin in another --outdir with a lower --lr (it was {lr:e}) \
         or a longer --rampup{}", last.as_ref().map_or(String::new(), |last| format!("; the last good checkpoint is {}", last.display()))
    )]
    Diverged { nimg: u64, what: String, lr: f64, last: Option<PathBuf> },
}

impl TrainError {
    /// Whether fewer images at a time may help.
    fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Backend(why)
            | Self::Validation(validation::ValidationError::Backend(why))
            | Self::Grid(grid::GridError::Sample(SampleError::Backend(why))) => why.is_out_of_memory(),
            _ => false,
        }
    }
}

/// What a run tells while it goes.
pub enum Event<'a> {
    /// A step is done; images seen.
    Step(u64),
    /// A status interval is over.
    Status(&'a Status),
    /// A file was written, whole.
    Saved(&'a Path),
    /// Something else worth a line.
    Note(String),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All images have been seen.
    Finished,
    /// It was told to stop and has saved a checkpoint.
    Stopped,
}

impl Settings {
    /// EDM2's, for a network of this config on these images; none of them mirrored or without its condition.
    pub fn new(data: &Dataset, config: Config, duration: u64) -> Self {
        Self {
            config,
            data: DataIdentity::of(data),
            init: None,
            seed: 0,
            duration,
            batch: 128,
            lr: 0.01,
            schedule: Schedule::Edm2,
            decay: 70_000.0,
            rampup: 10_000_000.min(duration / 10),
            p_mean: -0.4,
            p_std: 1.0,
            ema: vec![0.05, 0.10],
            cond_dropout: 0.0,
            cond_dropout_from: 0,
            flip: false,
            dropout: 0.0,
        }
    }

    /// The learning rate over time.
    pub fn learning_rate(&self) -> LearningRate {
        LearningRate {
            schedule: self.schedule,
            reference: self.lr,
            decay: self.decay,
            rampup: self.rampup as f64,
            batch: self.batch as f64,
            duration: self.duration as f64,
        }
    }

    /// What tells the snapshots of this run from those of one with other options. Of what a model tells itself, its network,
    /// its data and what it began from, and of what may change in a run, its length, nothing is in it.
    fn fingerprint(&self) -> Fingerprint {
        let mut options = serde_json::to_value(self).unwrap_or_default();
        if let Some(options) = options.as_object_mut() {
            options.retain(|name, _| !["config", "data", "init", "duration"].contains(&&**name));
        }
        Fingerprint::of([options.to_string()])
    }

    /// Of what the run began from.
    fn began_from(&self) -> Option<Fingerprint> {
        self.init.as_ref()?.fingerprint
    }

    /// The options that keep a run of `self` from being gone on with under `other`, with both values.
    fn differences(&self, other: &Self) -> String {
        let mut other = other.clone();
        other.data.settle(&self.data);
        // Whoever goes on needs no file to start from. Where it lies, and what it is called, does not matter.
        let same = |then: &Identity| other.init.as_ref().is_none_or(|now| !now.differs(then));
        if self.init.as_ref().is_some_and(same) {
            other.init.clone_from(&self.init);
        }
        if self.schedule != Schedule::Linear {
            other.duration = self.duration;
        }
        differing(self, &other, |key, then, now| format!("{key} was {then}, now {now}"))
    }
}

/// What differs between two values of one type, a text for each field that does; a field within one has both names.
fn differing<T: Serialize>(a: &T, b: &T, line: impl Fn(&str, &str, &str) -> String) -> String {
    let [a, b] = [a, b].map(|value| serde_json::to_value(value).unwrap_or_default());
    let (mut text, mut others) = (String::new(), Vec::new());
    each_difference("", &a, &b, &mut |key, a, b| {
        let line = line(key, a, b);
        // All are named, and as many as a message has room for shown.
        if text.len() + line.len() < 150 || text.is_empty() {
            text += &format!("{}{line}", if text.is_empty() { "" } else { "; " });
        } else {
            others.push(key.to_owned());
        }
    });
    if others.is_empty() { text } else { format!("{text}; and {}", others.join(", ")) }
}

fn each_difference(key: &str, a: &Value, b: &Value, each: &mut impl FnMut(&str, &str, &str)) {
    let file = |value: &Value| Identity::deserialize(value).ok();
    let shown = |value: &Value| match value {
        Value::Null => "not given".into(),
        Value::String(text) => Fingerprint::deserialize(value).map_or_else(|_| text.clone(), |print| print.to_string()),
        other => file(other).map_or_else(|| other.to_string(), |file| file.to_string()),
    };
    match (a, b) {
        (Value::Object(fields), Value::Object(others)) if file(a).is_none() => {
            let (a, b) = (fields, others);
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                let [a, b] = [a, b].map(|fields| fields.get(name).unwrap_or(&Value::Null));
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                each_difference(&key, a, b, each);
            }
        }
        (a, b) if a != b => each(key, &shown(a), &shown(b)),
        _ => {}
    }
}

/// What every rank must have been given alike.
#[derive(Serialize, Deserialize)]
struct Given {
    settings: Settings,
    execution: Execution,
}

impl Given {
    /// Whether this is what another rank was given; texts are JSON.
    fn differences(ours: &str, theirs: &str) -> String {
        let line = |key: &str, ours: &str, theirs: &str| format!("{key} is {theirs} there, {ours} here");
        let (Ok(ours), Ok(mut theirs)) = (serde_json::from_str::<Self>(ours), serde_json::from_str::<Self>(theirs))
        else {
            return "it is another version".into();
        };
        // Where a file lies, and what it is called, does not matter.
        if let (Some(ours), Some(init)) = (&ours.settings.init, &theirs.settings.init)
            && !init.differs(ours)
        {
            theirs.settings.init = Some(ours.clone());
        }
        // Cards may have room for different numbers of images, and different numbers; not for other types of values.
        theirs.execution.batch_gpu = ours.execution.batch_gpu;
        let numbers =
            |execution: &Execution| execution.computed_on.split_once(", ").map(|(_, numbers)| numbers.to_owned());
        if numbers(&ours.execution) == numbers(&theirs.execution) {
            theirs.execution.computed_on.clone_from(&ours.execution.computed_on);
        }
        let all =
            [differing(&ours.settings, &theirs.settings, line), differing(&ours.execution, &theirs.execution, line)];
        all.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

/// The images of a run.
#[derive(Clone, Copy)]
pub struct Splits<'a> {
    /// To learn from.
    pub train: &'a Dataset,
    /// To watch the loss on, of the same sizes.
    pub validation: Option<&'a Dataset>,
}

/// A run, to be done on a device: [`Device::run`].
pub struct Training<'a> {
    /// To start from.
    pub model: Model,
    /// What it computes.
    pub settings: &'a Settings,
    /// What it does beside.
    pub execution: &'a Execution,
    /// The images.
    pub splits: Splits<'a>,
    /// Makes the pictures of sample grids; without it there are none.
    pub show: Option<&'a mut grid::Show<'a>>,
    /// Whether to stop after the step at hand.
    pub stop: &'a AtomicBool,
    /// Is told how it goes.
    pub event: &'a mut dyn FnMut(Event),
    /// Who else trains the same; [`Alone`](crate::collective::Alone) if nobody does.
    pub ranks: &'a mut dyn Collective,
}

impl Work for Training<'_> {
    type Output = Result<Outcome, TrainError>;

    /// See [`train`].
    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let Self { model, settings, execution, splits, show, stop, event, ranks } = self;
        let mut backend = backends.training(&model.table, settings.ema.len()).map_err(BackendError::from)?;
        train(&mut backend, model, settings, execution, splits, show, stop, event, ranks)
    }
}

/// Trains until `settings.duration` images have been seen or `stop` is set; goes on from the newest whole
/// checkpoint in `execution.outdir`, and from `model` if there is none.
///
/// `backend` was made for the model's table and as many moving averages as `settings.ema` has.
///
/// # Errors
/// See [`TrainError`]. Whatever was saved before stays.
#[allow(clippy::too_many_arguments)] // those of a [`Training`]
pub fn train<B: TrainingBackend>(
    backend: &mut B,
    model: Model,
    settings: &Settings,
    execution: &Execution,
    data: Splits,
    show: Option<&mut grid::Show>,
    stop: &AtomicBool,
    event: &mut dyn FnMut(Event),
    ranks: &mut dyn Collective,
) -> Result<Outcome, TrainError> {
    let dir = execution.outdir.as_path();
    let (rank, size) = (ranks.rank(), ranks.size());
    if settings.batch < size as u64 {
        return Err(TrainError::FewImages { batch: settings.batch, ranks: size });
    }
    let given = serde_json::to_string(&Given { settings: settings.clone(), execution: execution.clone() });
    agree(ranks, &given.unwrap_or_default(), Given::differences)?;
    // Rank 0 alone reads and writes: no other needs to see its directory.
    let (mut lock, mut state) = (None, None);
    if rank == 0 {
        let held = lock.insert(DirLock::exclusive(dir)?);
        held.warning().into_iter().for_each(|warning| event(Event::Note(format!("warning: {warning}"))));
        if execution.restart {
            set_aside(dir, event).at(dir)?;
        }
        state = Some(match newest(backend, settings, execution, data.train, event)? {
            Some(state) => state,
            None => {
                begin_anew(dir, settings, event).at(dir)?;
                model.upload(backend, Slot::Weight)?;
                (0..settings.ema.len()).try_for_each(|i| model.upload(backend, Slot::Ema(i)))?;
                let (settings, computed_on) = (settings.clone(), execution.computed_on.clone());
                State { nimg: 0, step: 0, seconds: 0.0, sums: Sums::default(), settings, computed_on, stopgap: false }
            }
        });
    }
    let state = begin_together(backend, ranks, state)?;
    let settings = &state.settings.clone();
    let mut files = None;
    if rank == 0 {
        // Of a run that is over nothing is written anew.
        if state.nimg < settings.duration {
            write_options(dir, settings).at(dir)?;
        }
        let stats_path = dir.join(stats::FILE);
        let (stats, foreign) = StatsFile::open(&stats_path, state.nimg).at(&stats_path)?;
        if let Some(aside) = foreign {
            let text = format!("{} had more than statistics: set aside as {}", stats_path.display(), aside.display());
            event(Event::Note(text));
        }
        let events = execution.tensorboard.then(|| Events::create(dir, state.nimg)).transpose().at(dir)?;
        files = Some(Files { stats, events });
    }
    let batch_gpu = execution.batch_gpu.min(settings.batch) as usize;
    // A thread makes batches ahead, so that the device does not wait for its data.
    let (sender, batches) = sync_channel(2);
    let (mut order, nimg) = (Order::new(data.train, settings), state.nimg);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let own = share(settings.batch, rank, size);
            let mut micro_batches = (nimg..)
                .step_by(settings.batch as usize)
                .flat_map(|first| order.micro_batches(first + own.start..first + own.end, execution.batch_gpu));
            // It ends when nobody waits for batches any more.
            micro_batches.find(|shown| sender.send(Batch::of(data.train, settings, shown)).is_err());
        });
        let mut run = Run {
            backend,
            net: model.net,
            meta: model.meta,
            settings,
            execution,
            batches,
            data,
            before: state.seconds,
            last_status: (Instant::now(), state.nimg),
            state,
            started: Instant::now(),
            files,
            show,
            batch_gpu,
            rounds: 0,
            batch_aside: batch_gpu,
            ranks,
        };
        run.rounds = run.agreed_rounds()?;
        run.backend.make_effective(Slot::Weight, Normalization::Train { rounds: run.rounds })?;
        let outcome = run.go(stop, event)?;
        // What rank 0 wrote last is there before any rank ends.
        run.ranks.barrier()?;
        Ok(outcome)
    })
}

/// Names of the files in a directory that runs make.
fn made_by_runs(dir: &Path) -> io::Result<Vec<OsString>> {
    let made = ["checkpoint-", "snapshot-", "grid-", stats::FILE, OPTIONS_FILE, "loss.svg", "events.out.tfevents."];
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        files.extend(made.iter().any(|start| name.to_string_lossy().starts_with(start)).then_some(name));
    }
    Ok(files)
}

/// Moves what a run has made into a folder of its own.
fn set_aside(dir: &Path, event: &mut dyn FnMut(Event)) -> io::Result<()> {
    let files = made_by_runs(dir)?;
    if files.is_empty() {
        return Ok(());
    }
    let old = free_name(&dir.join("before"), "restart");
    fs::create_dir(&old)?;
    files.iter().try_for_each(|name| fs::rename(dir.join(name), old.join(name)))?;
    event(Event::Note(format!("set aside {} files of the run before in {}", files.len(), old.display())));
    Ok(())
}

/// Sets aside what a directory without a checkpoint has of another run, or of one with other options: what the options'
/// file beside it does not vouch for. Of this run, all will be written again, with the same bits.
fn begin_anew(dir: &Path, settings: &Settings, event: &mut dyn FnMut(Event)) -> io::Result<()> {
    let options = dir.join(OPTIONS_FILE);
    let then = input::text(&options).ok().and_then(|text| serde_json::from_str::<Settings>(&text).ok());
    // A run that was killed before it wrote a line has a file of them.
    let nothing = |name: &Path| name.symlink_metadata().is_ok_and(|about| about.is_file() && about.len() == 0);
    let made = made_by_runs(dir)?.into_iter().filter(|name| name != OPTIONS_FILE && !nothing(&dir.join(name)));
    if made.count() > 0 {
        // Without a checkpoint it needs what it began from.
        let same =
            |then: &Settings| then.init.is_none() == settings.init.is_none() && then.differences(settings).is_empty();
        match then.as_ref().is_some_and(same) {
            true => event(Event::Note(format!("no checkpoint is left in {}: the run begins again", dir.display()))),
            false => set_aside(dir, event)?,
        }
    }
    Ok(())
}

/// Writes the options' file; one that is somebody's own is set aside.
fn write_options(dir: &Path, settings: &Settings) -> io::Result<()> {
    let path = dir.join(OPTIONS_FILE);
    let ours = input::text(&path).is_ok_and(|text| serde_json::from_str::<Settings>(&text).is_ok());
    if path.symlink_metadata().is_ok() && !ours {
        fs::rename(&path, free_name(&path, "foreign"))?;
    }
    let text = serde_json::to_string_pretty(settings)?;
    write_atomically(&path, |out| writeln!(out, "{text}"))
}

/// Loads the newest whole checkpoint; damaged ones are set aside and named. Nothing is touched if none is whole.
fn newest<B: TrainingBackend>(
    backend: &mut B,
    settings: &Settings,
    execution: &Execution,
    data: &Dataset,
    event: &mut dyn FnMut(Event),
) -> Result<Option<State>, TrainError> {
    let dir = execution.outdir.as_path();
    let table = backend.table().clone();
    let mut damaged = Vec::new();
    for path in checkpoint::list(dir).at(dir)? {
        let opened = Checkpoint::open(&path).map_err(TrainError::from).and_then(|checkpoint| {
            let mut asked = settings.clone();
            if execution.keep_rampup {
                asked.rampup = checkpoint.state.settings.rampup;
            }
            let nimg = checkpoint.state.nimg;
            if checkpoint::path(dir, nimg) != path {
                let what = format!("it is of {nimg} images, not of as many as its name says");
                return Err(CheckpointError::Damaged { path: path.clone(), what }.into());
            }
            let then = &checkpoint.state.settings.data;
            if let (Some(then_print), Some(now_print)) = (then.content, settings.data.content)
                && data.grown_from(then_print)
            {
                let (path, then, now) = (path.clone(), then.images, data.len());
                return Err(TrainError::Grown { path, then, then_print, now, now_print });
            }
            asked.init = asked.init.or_else(|| checkpoint.state.settings.init.clone());
            let differences = checkpoint.state.settings.differences(&asked);
            if !differences.is_empty() {
                return Err(TrainError::Settings { path: path.clone(), differences });
            }
            checkpoint.check(&table)?;
            Ok((checkpoint, asked))
        });
        let (checkpoint, settings) = match opened {
            Err(TrainError::Checkpoint(error @ CheckpointError::Damaged { .. })) => {
                damaged.push((path, error));
                continue;
            }
            other => other?,
        };
        for (path, error) in damaged {
            let aside = free_name(&path, "damaged");
            fs::rename(&path, &aside).at(&path)?;
            event(Event::Note(format!("{error}; set aside as {}", aside.display())));
        }
        checkpoint.load(backend)?;
        event(Event::Note(format!("resuming from {}", path.display())));
        let before = &checkpoint.state.computed_on;
        if !before.is_empty() && *before != execution.computed_on {
            let now = &execution.computed_on;
            event(Event::Note(format!(
                "warning: computed on {before} so far, on {now} from here: it rounds otherwise"
            )));
        }
        return Ok(Some(State { settings, computed_on: execution.computed_on.clone(), ..checkpoint.state }));
    }
    let more = damaged.len().saturating_sub(1);
    match damaged.into_iter().next() {
        None => Ok(None),
        Some((_, first)) => Err(TrainError::AllDamaged { dir: dir.into(), first, more }),
    }
}

/// Has all ranks begin where rank 0 does: with its state and what its device holds.
fn begin_together<B: TrainingBackend>(
    backend: &mut B,
    ranks: &mut dyn Collective,
    state: Option<State>,
) -> Result<State, TrainError> {
    let state = match state {
        Some(state) if ranks.size() == 1 => return Ok(state),
        state => state,
    };
    let text = state.map(|state| serde_json::to_string(&state).unwrap_or_default()).unwrap_or_default();
    let state: State = serde_json::from_slice(&ranks.gather(text.as_bytes())?[0])
        .map_err(|cause| CollectiveError::Differs(format!("what rank 0 begins with: {cause}")))?;
    let averages = (0..state.settings.ema.len()).map(Slot::Ema);
    for slot in [Slot::Weight, Slot::AdamM, Slot::AdamV].into_iter().chain(averages) {
        with_values(backend, slot, |values| ranks.broadcast(values))?;
    }
    ranks.barrier()?;
    Ok(state)
}

/// Gives the values of a slot to a call of all ranks.
fn with_values<B: TrainingBackend>(
    backend: &mut B,
    slot: Slot,
    mut call: impl FnMut(Values) -> Result<(), CollectiveError>,
) -> Result<(), TrainError> {
    let mut done = Ok(());
    backend.exchange(slot, &mut |values| {
        if done.is_ok() {
            done = call(values);
        }
    })?;
    Ok(done?)
}

/// What rank 0 writes besides models.
struct Files {
    stats: StatsFile,
    events: Option<Events>,
}

struct Run<'a, 's, B: TrainingBackend> {
    backend: &'a mut B,
    net: Precond,
    meta: ModelMeta,
    settings: &'a Settings,
    execution: &'a Execution,
    batches: Receiver<Result<Batch, DatasetError>>,
    data: Splits<'a>,
    state: State,
    before: f64,
    started: Instant,
    /// When the last status line was written, and after how many images.
    last_status: (Instant, u64),
    /// Of rank 0.
    files: Option<Files>,
    show: Option<&'a mut grid::Show<'s>>,
    /// Images at a time: the execution's, until the device has no memory for them.
    batch_gpu: usize,
    /// Micro-batches of a step, of the rank that has most, if all images were of one size: on all ranks the same, as their
    /// weights are.
    rounds: usize,
    /// The same in validation and sample grids.
    batch_aside: usize,
    ranks: &'a mut dyn Collective,
}

impl<B: TrainingBackend> Run<'_, '_, B> {
    fn go(&mut self, stop: &AtomicBool, event: &mut dyn FnMut(Event)) -> Result<Outcome, TrainError> {
        if self.state.nimg >= self.settings.duration {
            if self.files.is_some() {
                event(Event::Note(format!("{} images have been seen already: nothing to do", self.state.nimg)));
                // The process that saw the last ones may have been killed before this.
                self.tidy(event)?;
            }
            return Ok(Outcome::Finished);
        }
        loop {
            let (lr, stop) = self.step(stop, event)?;
            let done = self.state.nimg >= self.settings.duration;
            let stopped = !done && stop;
            let (nimg, batch) = (self.state.nimg, self.settings.batch);
            let due = |interval: u64| interval > 0 && (done || nimg / interval > (nimg - batch) / interval);
            event(Event::Step(nimg));
            let writes = self.files.is_some();
            // The checkpoint comes last: what it promises to have been done has been.
            if due(self.execution.status) && writes {
                self.status(lr, event)?;
            }
            if due(self.execution.validate) {
                self.validate(event)?;
            }
            if due(self.execution.grid) {
                self.grid(event)?;
            }
            if due(self.execution.snapshot) && writes {
                self.snapshot(event)?;
            }
            let regular = due(self.execution.checkpoint) || done;
            if (regular || stopped) && writes {
                self.state.stopgap = !regular;
                self.checkpoint(event)?;
            }
            if done || stopped {
                return Ok(if done { Outcome::Finished } else { Outcome::Stopped });
            }
        }
    }

    /// One optimizer step; returns its learning rate, and whether some rank is to stop.
    fn step(&mut self, stop: &AtomicBool, event: &mut dyn FnMut(Event)) -> Result<(f64, bool), TrainError> {
        let s = self.settings;
        let numel = |[h, w, c]: [usize; 3]| (h * w * c) as f64;
        let usual = numel(self.data.train.shape());
        let lr = s.learning_rate().at(self.state.nimg);
        let end = self.state.nimg + s.batch;
        let mut losses = Vec::new();
        let mut seen = 0;
        let own = share(s.batch, self.ranks.rank(), self.ranks.size());
        while seen < (own.end - own.start) as usize {
            let batch = self.batches.recv().expect("batches are made as long as they are asked for")?;
            let [h, w, c] = batch.shape;
            let mut first = 0;
            while first < batch.n {
                let n = self.batch_gpu.min(batch.n - first);
                let b = &mut *self.backend;
                let mut upload = |[h, w, c]: [usize; 3], values: &[f32]| {
                    b.upload([n, h, w, c], &values[first * h * w * c..][..n * h * w * c])
                };
                let mut inputs = vec![upload([h, w, c], &batch.clean), upload([h, w, c], &batch.noisy)];
                inputs.push(upload([1, 1, 1], &batch.sigma));
                inputs.extend(batch.keys.as_ref().map(|keys| upload([1, 1, 2], keys)));
                inputs.extend(batch.labels.as_ref().map(|labels| upload([1, 1, s.config.label_dim], labels)));
                match micro_batch(b, &self.net, s.dropout, &inputs) {
                    Err(why) if n > 1 && why.is_out_of_memory() => self.halve(n, &why, event),
                    made => {
                        losses.push((made?, usual / numel(batch.shape)));
                        first += n;
                    }
                }
            }
            seen += batch.n;
        }
        if self.ranks.size() > 1 {
            with_values(self.backend, Slot::Grad, |values| self.ranks.all_reduce(values))?;
        }
        let betas: Vec<f64> = s.ema.iter().map(|&std| ema::power_function_beta(std, end, s.batch)).collect();
        let stats = self.backend.optimizer_step(&Step {
            lr,
            betas: BETAS,
            eps: EPS,
            step: self.state.step + 1,
            grad_scale: 1.0 / s.batch as f64,
            rounds: self.rounds,
            ema_betas: &betas,
        })?;
        // Only now: a device computes on while the host gets the next micro-batch ready.
        let mut loss = 0.0;
        for (per_image, weight) in losses {
            loss += weight * self.backend.download(&per_image)?.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
        let said =
            Said { loss, grad_norm: stats.grad_norm, stop: stop.load(Ordering::Relaxed), rounds: self.own_rounds() };
        let said = said.of_all(self.ranks)?;
        let loss: f64 = said.iter().map(|rank| rank.loss).sum();
        self.rounds = said.iter().map(|rank| rank.rounds).max().unwrap_or(1);
        self.state.nimg = end;
        if !loss.is_finite() {
            return Err(self.diverged(format!("the loss is {loss}")));
        }
        self.state.step += 1;
        self.state.seconds = self.before + self.started.elapsed().as_secs_f64();
        let sums = &mut self.state.sums;
        sums.nonfinite += stats.nonfinite;
        // One overflow would hide all other steps of the interval.
        if stats.grad_norm.is_finite() {
            sums.images += s.batch;
            sums.steps += 1;
            sums.loss += loss / usual;
            sums.grad_norm += stats.grad_norm;
        }
        Ok((lr, said.iter().any(|rank| rank.stop)))
    }

    /// Micro-batches of a step on the rank with the largest share, if all took as many images at a time as this one.
    fn own_rounds(&self) -> usize {
        let largest = self.settings.batch.div_ceil(self.ranks.size() as u64) as usize;
        largest.div_ceil(self.batch_gpu)
    }

    /// The same of all ranks: the most.
    fn agreed_rounds(&mut self) -> Result<usize, CollectiveError> {
        let own = Said { loss: 0.0, grad_norm: 0.0, stop: false, rounds: self.own_rounds() };
        Ok(own.of_all(self.ranks)?.iter().map(|rank| rank.rounds).max().unwrap_or(1))
    }

    /// Takes fewer images at a time from here on, as the device has no memory for `n`.
    fn halve(&mut self, n: usize, why: &BackendError, event: &mut dyn FnMut(Event)) {
        // The step at hand counts as many rounds as all ranks do; the next one has more.
        self.batch_gpu = n.div_ceil(2);
        event(Event::Note(format!("warning: {why}; going on with --batch-gpu {}", self.batch_gpu)));
    }

    fn diverged(&self, what: String) -> TrainError {
        let last = checkpoint::list(&self.execution.outdir).ok().and_then(|all| all.into_iter().next());
        TrainError::Diverged { nimg: self.state.nimg, what, lr: self.settings.lr, last }
    }

    fn write_stats(&mut self, line: &impl Serialize) -> Result<(), TrainError> {
        let Some(Files { stats, events }) = &mut self.files else { return Ok(()) };
        let path = self.execution.outdir.join(stats::FILE);
        stats.write(line).at(path)?;
        let Some(events) = events else { return Ok(()) };
        let line = serde_json::to_value(line).unwrap_or_default();
        Ok(events.write(self.state.nimg, &line).at(events.path())?)
    }

    fn status(&mut self, lr: f64, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let sums = std::mem::take(&mut self.state.sums);
        let (since, nimg) = self.last_status;
        let status = Status {
            nimg: self.state.nimg,
            step: self.state.step,
            loss: sums.loss / sums.images as f64,
            lr,
            grad_norm: sums.grad_norm / sums.steps as f64,
            nonfinite: sums.nonfinite,
            images_per_s: (self.state.nimg - nimg) as f64 / since.elapsed().as_secs_f64(),
            seconds: self.state.seconds,
            peak_mib: stats::peak_mib(),
        };
        self.write_stats(&status)?;
        event(Event::Status(&status));
        self.last_status = (Instant::now(), self.state.nimg);
        Ok(())
    }

    /// Loss on the validation split, with the same noise every time and in every run.
    fn validate(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(data) = self.data.validation else { return Ok(()) };
        let loss = self.with_average(event, |run, batch| {
            Ok(validation::loss(run.backend, &run.net, run.settings, data, batch, run.ranks)?)
        })?;
        self.write_stats(&Validation { nimg: self.state.nimg, validation_loss: loss })?;
        if self.files.is_some() {
            event(Event::Note(format!("validation loss {loss:.5} after {} images", self.state.nimg)));
        }
        Ok(())
    }

    /// Does something with the first moving average in the place of the weights, with so many images at a time, fewer if
    /// the device has no memory for them; what that takes is no time of training.
    fn with_average<T>(
        &mut self,
        event: &mut dyn FnMut(Event),
        mut work: impl FnMut(&mut Self, usize) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let begun = Instant::now();
        self.backend.make_effective(Slot::Ema(0), Normalization::Eval)?;
        let mut batch = self.batch_aside.min(self.batch_gpu);
        let halved = |why: &TrainError, n| {
            event(Event::Note(format!("warning: {why}; going on with {n} images at a time beside training")));
        };
        let done = memory::halving(&mut batch, TrainError::is_out_of_memory, |n| work(self, n), halved);
        self.batch_aside = batch;
        self.backend.make_effective(Slot::Weight, Normalization::Train { rounds: self.rounds })?;
        self.last_status.0 += begun.elapsed();
        done
    }

    /// Samples of the first moving average as a picture.
    fn grid(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(show) = self.show.take() else { return Ok(()) };
        let path = self.execution.outdir.join(format!("grid-{:09}.png", self.state.nimg));
        let data = self.data.validation.unwrap_or(self.data.train);
        let guided = self.settings.cond_dropout > 0.0;
        let written = self.with_average(event, |run, batch| {
            Ok(grid::write(&path, run.backend, &run.net, data, show, guided, batch, run.ranks)?)
        });
        self.show = Some(show);
        match written {
            // A network can be too young to sample from; it may grow up.
            Err(TrainError::Grid(
                error @ (grid::GridError::Sample(SampleError::NotFinite { .. }) | grid::GridError::Elsewhere { .. }),
            )) => {
                if self.files.is_some() {
                    event(Event::Note(format!("no sample grid: {error}")));
                }
            }
            other => {
                if other? {
                    event(Event::Saved(&path));
                }
            }
        }
        Ok(())
    }

    /// A model file for each moving average.
    fn snapshot(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        for (i, &std) in self.settings.ema.iter().enumerate() {
            let table = self.backend.table().clone();
            let weights = (0..table.len())
                .map(|id| self.backend.read_param(Slot::Ema(i), ParamId(id)))
                .collect::<Result<Vec<_>, _>>()?;
            let options = Some(self.settings.fingerprint());
            let (images_seen, began_from) = (self.state.nimg, self.settings.began_from());
            let meta = ModelMeta { images_seen, ema_std: Some(std), options, began_from, ..self.meta.clone() };
            let name = format!("snapshot-{:09}-{}.safetensors", self.state.nimg, ema::name_of(std));
            let path = self.execution.outdir.join(name);
            match save(&path, &self.settings.config, &meta, &table, &weights, Precision::F16) {
                Err(ModelError::NotFinite { name, value, .. }) => {
                    return Err(self.diverged(format!("an average of {name} is {value:e}")));
                }
                other => other?,
            }
            event(Event::Saved(&path));
        }
        Ok(())
    }

    /// Writes a checkpoint, unless the run has diverged, and tidies up.
    fn checkpoint(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let dir = &self.execution.outdir;
        let path = checkpoint::path(dir, self.state.nimg);
        let meta = ModelMeta { images_seen: self.state.nimg, ..self.meta.clone() };
        match checkpoint::save(&path, self.backend, &meta, &self.state) {
            Err(e @ CheckpointError::NotFinite { .. }) => return Err(self.diverged(e.to_string())),
            other => other?,
        }
        event(Event::Saved(&path));
        self.tidy(event)
    }

    /// Removes the checkpoints that are not to be kept, and draws the losses.
    fn tidy(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let dir = &self.execution.outdir;
        for old in checkpoint::superseded(dir, self.execution.keep).at(dir)? {
            fs::remove_file(&old).at(&old)?;
        }
        // No run ends for want of a picture.
        if let Some(Err(cause)) = self.files.as_ref().map(|files| files.stats.draw()) {
            event(Event::Note(format!("warning: {}: {cause}", dir.join("loss.svg").display())));
        }
        Ok(())
    }
}

/// What a rank says after a step.
struct Said {
    /// Sum over its images, of each as if it had as many elements as the most frequent size has.
    loss: f64,
    grad_norm: f64,
    stop: bool,
    rounds: usize,
}

impl Said {
    /// What all say, in their order. The gradients were the same on all, and so must be what each makes of them: a rank
    /// that has lost its way would go on unseen.
    fn of_all(&self, ranks: &mut dyn Collective) -> Result<Vec<Self>, CollectiveError> {
        let own = [self.loss.to_bits(), self.grad_norm.to_bits(), u64::from(self.stop), self.rounds as u64];
        let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
        let all = ranks.gather(&bytes)?;
        let said = |said: &Vec<u8>| {
            let [loss, grad_norm, stop, rounds] = said.as_chunks::<8>().0 else { return None };
            let [loss, grad_norm] = [loss, grad_norm].map(|bits| f64::from_le_bytes(*bits));
            Some(Self {
                loss,
                grad_norm,
                stop: u64::from_le_bytes(*stop) > 0,
                rounds: u64::from_le_bytes(*rounds) as usize,
            })
        };
        let all: Option<Vec<Self>> = all.iter().map(said).collect();
        let all = all.ok_or_else(|| CollectiveError::Differs("ranks are at different steps".into()))?;
        let bits = all[0].grad_norm.to_bits();
        match all.iter().position(|rank| rank.grad_norm.to_bits() != bits) {
            None => Ok(all),
            Some(rank) => Err(CollectiveError::Differs(format!(
                "rank {rank} computes otherwise than rank 0: the gradient's norm is {:e} there, {:e} here (cards of one kind, \
                 and one edm2k, compute alike)",
                all[rank].grad_norm, all[0].grad_norm
            ))),
        }
    }
}

/// The plan of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroBatch {
    /// See [`Settings::dropout`].
    pub dropout: f64,
}

/// Forward and backward of clean images, noisy ones, noise levels, with dropout the keys of its masks, and (unless
/// unconditional) labels; the loss of each image. The gradients add up in the backend.
pub fn micro_batch<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    inputs: &[B::Tensor],
) -> Result<B::Tensor, BackendError> {
    let mut made = b.planned::<BackendError>(&MicroBatch { dropout }, inputs, &mut |b, inputs| {
        let (images, rest) = inputs.split_at(3);
        let (keys, labels) = rest.split_at(usize::from(dropout > 0.0));
        let masks = keys.first().map(|keys| Masks { keys: keys.clone(), rate: dropout });
        let pass = net.train_forward(b, &images[0], &images[1], &images[2], labels.first(), masks.as_ref());
        let per_image = pass.per_image.clone();
        net.backward(b, pass);
        Ok(vec![per_image])
    })?;
    Ok(made.swap_remove(0))
}

/// A micro-batch of [n, height, width] images of zeros, so that a device plans it and knows what it costs. Where its
/// gradients matter, they are to be cleared.
///
/// # Errors
/// The device does not have the memory.
pub fn rehearse<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    [n, h, w]: [usize; 3],
) -> Result<(), BackendError> {
    let dim = net.config.label_dim;
    let image = b.upload([n, h, w, net.config.img_channels], &vec![0.0; n * h * w * net.config.img_channels]);
    let mut inputs = vec![image.clone(), image, b.upload([n, 1, 1, 1], &vec![1.0; n])];
    inputs.extend((dropout > 0.0).then(|| b.upload([n, 1, 1, 2], &vec![0.0; 2 * n])));
    inputs.extend((dim > 0).then(|| b.upload([n, 1, 1, dim], &vec![0.0; n * dim])));
    micro_batch(b, net, dropout, &inputs).map(|_| ())
}
