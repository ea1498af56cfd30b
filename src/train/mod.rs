//! Training as in EDM2: loss with learned uncertainty, Adam, forced weight normalisation, power-function
//! moving averages; statistics, validation, snapshots and checkpoints on intervals.
//!
//! A step over images t .. t + batch of the run ([`order`]): micro-batches ([`batch`]) go forward and backward, their
//! gradients add up, then one pass over the parameters ([`TrainingBackend::optimizer_step`]) with the learning rate at
//! t and the moving averages at t + batch. What a step does depends only on the parameters, the moments and t, all of
//! which a checkpoint holds to the bit. So a run that was stopped ends with the same bits as one that was not.
//!
//! In the output directory: `checkpoint-*.safetensors` (rotated), `snapshot-*-*.safetensors` (kept: post-hoc
//! averaging needs them), `grid-*.png`, `stats.jsonl`, `loss.svg`, and `training_options.json`, the [`Settings`].
//!
//! On several ranks ([`Collective`]) each takes its share of every step's images, the gradients are summed once a step,
//! and every rank takes the same optimizer step with them. Since all that is random is a function of an image's number,
//! such a run computes what one rank does, but for the rounding of sums. Validation and grids are shared; rank 0 reads and
//! writes. Where all ranks see the output directory, they share the writing of snapshots too.
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

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use serde::Serialize;

#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod batch;
mod begin;
pub mod checkpoint;
pub mod ema;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod events;
#[doc(hidden)]
pub mod files;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod grid;
#[doc(hidden)]
pub mod memory;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod order;
pub mod posthoc;
pub mod schedule;
mod settings;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod stats;
mod step;
pub mod validation;

pub use crate::collective::{Alone, Collective, CollectiveError};
pub use checkpoint::{CheckpointError, State};
pub use grid::{GridError, Show};
pub use schedule::{LearningRate, Schedule};
#[doc(hidden)]
pub use settings::check_widths;
pub use settings::{DataIdentity, Execution, SettingError, Settings, meta_of};
pub use stats::{Status, Sums, Validation};
#[doc(hidden)]
pub use step::{Inputs, MicroBatchPlan, micro_batch, rehearse, shared_micro_batch};

use crate::backend::{BackendError, Normalization, Slot, TrainingBackend};
use crate::collective::{Part, agree};
use crate::data::dataset::{Dataset, DatasetError};
use crate::device::{Backends, Device, Work};
use crate::formats::fingerprint::Fingerprint;
use crate::formats::{At, DirLock, FileError, LockError};
use crate::model::file::ModelWriter;
use crate::model::{ConfigError, Model, ModelError, ModelMeta, Precond, Stored};
use batch::HostBatch;
use begin::{begin_together, check, first_state, write_options, writers};
use events::Events;
use order::Order;
use settings::RankInputs;
use stats::StatsFile;

/// Why training could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum TrainError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),
    #[error("{0}")]
    Model(#[from] ModelError),
    #[error("{0}")]
    Data(#[from] DatasetError),
    #[error("{0}")]
    Validation(#[from] validation::ValidationError),
    #[error("{0}")]
    Grid(#[from] grid::GridError),
    #[error("{0}")]
    Backend(#[from] BackendError),
    /// The run that is to be resumed had other settings.
    #[error("{} was made with other options: {differences}. Give the same, or take another directory", path.display())]
    Settings { path: PathBuf, differences: String },
    /// The dataset has more images than when the run began.
    #[error(
        "{}: made with {then} images ({then_print}), and the dataset has grown to {now} ({now_print}). A run keeps to its \
         images: begin another, from a snapshot of this one", path.display()
    )]
    Grown { path: PathBuf, then: usize, then_print: Fingerprint, now: usize, now_print: Fingerprint },
    #[error("{0}")]
    Lock(#[from] LockError),
    #[error("{0}")]
    Setting(#[from] SettingError),
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The model, the settings and the images do not belong together.
    #[error("{0}")]
    Mismatch(String),
    #[error("{0}")]
    Ranks(#[from] CollectiveError),
    /// Some ranks would have nothing to do.
    #[error("a batch of {batch} images, expected one at least for each of {ranks} ranks")]
    FewImages { batch: u64, ranks: usize },
    /// There are checkpoints, but none is whole.
    #[error(
        "no whole checkpoint is left in {} ({first}{})",
        dir.display(), if *more > 0 { format!("; {more} more are damaged") } else { String::new() }
    )]
    AllDamaged { dir: PathBuf, first: CheckpointError, more: usize },
    /// The run has diverged: going on would only make meaningless numbers.
    #[error(
        "the run has diverged after {nimg} images: {what}. Begin in another directory with a lower lr (it was {lr:e}) \
         or a longer rampup{}", last.as_ref().map_or(String::new(), |last| format!("; the last good checkpoint is {}", last.display()))
    )]
    Diverged { nimg: u64, what: String, lr: f64, last: Option<PathBuf> },
}

impl TrainError {
    /// Whether it may help to take fewer images at a time.
    fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Backend(why) | Self::Validation(validation::ValidationError::Backend(why)) => why.is_out_of_memory(),
            _ => false,
        }
    }
}

/// What a run reports while it goes.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done; so many images have been seen.
    Step(u64),
    /// A status interval is over.
    Status(&'a Status),
    /// A file was written to its end. Rank 0 reports those of all ranks.
    Saved(&'a Path),
    /// Something that the user should know: a line.
    Warning(String),
    /// A warning that the device has no memory for as many images at a time as before: a line.
    Fewer(String),
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

/// The images of a run.
#[derive(Clone, Copy, Debug)]
pub struct Splits<'a> {
    /// The images to learn from.
    pub train: &'a Dataset,
    /// The images to watch the loss on, of the same sizes.
    pub validation: Option<&'a Dataset>,
}

/// A run, which [`Training::run`] does on a device.
pub struct Training<'a> {
    /// The model to start from.
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
    /// Called with what happens.
    pub event: &'a mut dyn FnMut(Event),
    /// The ranks that train together; [`Alone`] if there is only this one.
    pub ranks: &'a mut dyn Collective,
}

debug!(Training<'_> { settings, execution });

impl Training<'_> {
    /// Trains until `settings.duration` images have been seen or `stop` is set; goes on from the newest whole checkpoint in
    /// `execution.outdir`, and from `model` if there is none.
    ///
    /// # Errors
    /// See [`TrainError`]. Whatever was saved before stays.
    pub fn run(self, device: &Device) -> Result<Outcome, TrainError> {
        device.run(self)
    }
}

impl Work for Training<'_> {
    type Output = Result<Outcome, TrainError>;

    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let made = backends.training(&self.model.table, self.settings.ema.len());
        train(&mut made.map_err(BackendError::from)?, self)
    }
}

/// As [`Training::run`], on a backend that was made for the model's table and for as many moving averages as `settings.ema`
/// has.
///
/// # Errors
/// As there.
#[doc(hidden)]
pub fn train<B: TrainingBackend>(backend: &mut B, training: Training) -> Result<Outcome, TrainError> {
    let Training { model, settings, execution, splits: data, show, stop, event, ranks } = training;
    settings.validate()?;
    execution.validate()?;
    check(&model, settings, data)?;
    let dir = execution.outdir.as_path();
    let part = ranks.part();
    if settings.batch < part.of as u64 {
        return Err(TrainError::FewImages { batch: settings.batch, ranks: part.of });
    }
    let validation = data.validation.map(DataIdentity::of);
    let given = RankInputs { settings: settings.clone(), execution: execution.clone(), validation };
    agree(ranks, &serde_json::to_string(&given).unwrap_or_default(), RankInputs::differences)?;
    // Rank 0 alone reads, so no other rank needs to see its directory.
    let (mut lock, mut state) = (None, None);
    if part.number == 0 {
        let held = lock.insert(DirLock::exclusive(dir)?);
        held.warning().into_iter().for_each(|warning| event(Event::Warning(warning)));
        state = Some(first_state(backend, &model, settings, execution, data.train, event)?);
    }
    // The device has them; a copy on the host would stay to the end.
    drop(model.weights);
    let (state, meta) = begin_together(backend, ranks, state, model.meta)?;
    let writers = writers(dir, ranks)?;
    let settings = &state.settings.clone();
    let mut journal = None;
    if part.number == 0 {
        // Nothing is written anew for a run that has ended.
        if state.nimg < settings.duration {
            write_options(dir, settings).at(dir)?;
        }
        journal = Some(Journal::open(execution, state.nimg, event)?);
    }
    let batch_gpu = execution.batch_gpu.min(settings.batch) as usize;
    // A thread makes batches ahead, so that the device does not wait for its data.
    let (sender, batches) = sync_channel(2);
    let nimg = state.nimg;
    std::thread::scope(|scope| {
        scope.spawn(move || make_batches(data.train, settings, execution.batch_gpu, part, nimg, &sender));
        let mut run = Run {
            backend,
            net: model.net,
            meta,
            settings,
            execution,
            batches,
            data,
            clock: Clock::new(&state),
            state,
            journal,
            writers,
            show,
            batch_gpu,
            rounds: 0,
            batch_aside: batch_gpu,
            ranks,
        };
        run.rounds = run.agreed_rounds()?;
        run.backend.make_effective(Slot::Weight, Normalization::Train { rounds: run.rounds })?;
        let outcome = run.go(stop, event)?;
        // What rank 0 writes last must be there before any rank ends.
        run.ranks.barrier()?;
        Ok(outcome)
    })
}

/// Makes a rank's share of every batch from image `nimg` on, until nobody waits for batches any more.
fn make_batches(
    data: &Dataset,
    settings: &Settings,
    batch_gpu: u64,
    part: Part,
    nimg: u64,
    sender: &SyncSender<Result<HostBatch, DatasetError>>,
) {
    let mut order = Order::new(data, settings);
    let own = part.share(settings.batch as usize);
    for first in (nimg..).step_by(settings.batch as usize) {
        for shown in order.micro_batches(first + own.start as u64..first + own.end as u64, batch_gpu) {
            if sender.send(HostBatch::of(data, settings, &shown)).is_err() {
                return;
            }
        }
    }
}

/// The run's statistics, as rank 0 writes them down.
struct Journal {
    stats: StatsFile,
    events: Option<Events>,
}

impl Journal {
    /// Opens that of a run after so many images.
    fn open(execution: &Execution, nimg: u64, event: &mut dyn FnMut(Event)) -> Result<Self, TrainError> {
        let dir = execution.outdir.as_path();
        let path = dir.join(files::STATS);
        let (stats, foreign) = StatsFile::open(&path, nimg).at(&path)?;
        if let Some(aside) = foreign {
            let text = format!("{} had more than statistics: set aside as {}", path.display(), aside.display());
            event(Event::Note(text));
        }
        let events = execution.tensorboard.then(|| Events::create(dir, nimg)).transpose().at(dir)?;
        Ok(Self { stats, events })
    }
}

/// The time that a run spends in training.
struct Clock {
    /// Seconds before this process went on with it.
    before: f64,
    started: Instant,
    /// When the last status line was written, and after how many images.
    last_status: (Instant, u64),
}

impl Clock {
    fn new(state: &State) -> Self {
        let now = Instant::now();
        Self { before: state.seconds, started: now, last_status: (now, state.nimg) }
    }

    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    /// Leaves out time that was spent beside training.
    fn leave_out(&mut self, spent: Duration) {
        self.started += spent;
        self.last_status.0 += spent;
    }

    /// Images a second since it was asked last.
    fn images_per_s(&mut self, nimg: u64) -> f64 {
        let (since, before) = std::mem::replace(&mut self.last_status, (Instant::now(), nimg));
        (nimg - before) as f64 / since.elapsed().as_secs_f64()
    }
}

struct Run<'a, 's, B: TrainingBackend> {
    backend: &'a mut B,
    net: Precond,
    meta: ModelMeta,
    settings: &'a Settings,
    execution: &'a Execution,
    batches: Receiver<Result<HostBatch, DatasetError>>,
    data: Splits<'a>,
    state: State,
    clock: Clock,
    /// Rank 0 alone has one.
    journal: Option<Journal>,
    /// How many ranks write snapshots.
    writers: usize,
    show: Option<&'a mut grid::Show<'s>>,
    /// Images at a time: the execution's, until the device has no memory for them.
    batch_gpu: usize,
    /// Micro-batches of a step on the rank that has the most, if all images were of one size. It is the same on all
    /// ranks, so that their weights are too.
    rounds: usize,
    /// Images at a time in validation and sample grids.
    batch_aside: usize,
    ranks: &'a mut dyn Collective,
}

impl<B: TrainingBackend> Run<'_, '_, B> {
    fn go(&mut self, stop: &AtomicBool, event: &mut dyn FnMut(Event)) -> Result<Outcome, TrainError> {
        if self.state.nimg >= self.settings.duration {
            if self.journal.is_some() {
                event(Event::Note(format!("{} images have been seen already: nothing to do", self.state.nimg)));
                // The process that trained on the last images may have been killed before it tidied up.
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
            let writes = self.journal.is_some();
            // The checkpoint comes last, since it promises that all before it has been done.
            if due(self.execution.status) && writes {
                self.status(lr, event)?;
            }
            if due(self.execution.validate) {
                self.validate(event)?;
            }
            if due(self.execution.grid) {
                self.grid(event)?;
            }
            if due(self.execution.snapshot) {
                self.snapshot(event)?;
            }
            let regular = due(self.execution.checkpoint) || done;
            if (regular || stopped) && writes {
                self.state.stopgap = !regular;
                self.state.batch_gpu = Some(self.batch_gpu as u64);
                self.checkpoint(event)?;
            }
            if done || stopped {
                return Ok(if done { Outcome::Finished } else { Outcome::Stopped });
            }
        }
    }

    fn diverged(&self, what: String) -> TrainError {
        let last = checkpoint::list(&self.execution.outdir).ok().and_then(|all| all.into_iter().next());
        TrainError::Diverged { nimg: self.state.nimg, what, lr: self.settings.lr, last }
    }

    fn write_stats(&mut self, line: &impl Serialize) -> Result<(), TrainError> {
        let Some(Journal { stats, events }) = &mut self.journal else { return Ok(()) };
        let path = self.execution.outdir.join(files::STATS);
        stats.write(line).at(path)?;
        let Some(events) = events else { return Ok(()) };
        let line = serde_json::to_value(line).unwrap_or_default();
        Ok(events.write(self.state.nimg, &line).at(events.path())?)
    }

    fn status(&mut self, lr: f64, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let sums = std::mem::take(&mut self.state.sums);
        let status = Status {
            nimg: self.state.nimg,
            step: self.state.step,
            loss: sums.loss / sums.images as f64,
            lr,
            grad_norm: sums.grad_norm / sums.steps as f64,
            nonfinite: sums.nonfinite,
            images_per_s: self.clock.images_per_s(self.state.nimg),
            seconds: self.state.seconds,
            peak_mib: stats::peak_mib(),
        };
        self.write_stats(&status)?;
        event(Event::Status(&status));
        Ok(())
    }

    /// Loss on the validation split, with the same noise every time and in every run.
    fn validate(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(data) = self.data.validation else { return Ok(()) };
        let loss = self.with_average(event, |run, batch, halved| {
            // Memory runs out before the ranks meet, if it does.
            let loss = |n| Ok(validation::loss(run.backend, &run.net, run.settings, data, n, run.ranks)?);
            memory::halving(batch, TrainError::is_out_of_memory, loss, |why, n| halved(why, n))
        })?;
        self.write_stats(&Validation { nimg: self.state.nimg, validation_loss: loss })?;
        if self.journal.is_some() {
            event(Event::Note(format!("validation loss {loss:.5} after {} images", self.state.nimg)));
        }
        Ok(())
    }

    /// Does something with the first moving average in the place of the weights, with `batch_aside` images at a time.
    /// It may halve that where the device has no memory for so many, and says so. Its time is not counted as training.
    fn with_average<T>(
        &mut self,
        event: &mut dyn FnMut(Event),
        work: impl FnOnce(&mut Self, &mut usize, &mut memory::Halved) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let begun = Instant::now();
        self.backend.make_effective(Slot::Ema(0), Normalization::Eval)?;
        let mut batch = self.batch_aside.min(self.batch_gpu);
        let mut halved = |why: &dyn std::fmt::Display, n: usize| {
            event(Event::Fewer(format!("{why}; going on with {n} images at a time beside training")));
        };
        let done = work(self, &mut batch, &mut halved);
        self.batch_aside = batch;
        self.backend.make_effective(Slot::Weight, Normalization::Train { rounds: self.rounds })?;
        self.clock.leave_out(begun.elapsed());
        done
    }

    /// Writes the sample grid of the first moving average.
    fn grid(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(show) = self.show.take() else { return Ok(()) };
        let path = self.execution.outdir.join(files::grid(self.state.nimg));
        let data = self.data.validation.unwrap_or(self.data.train);
        let guided = self.cond_dropout() > 0.0;
        let written = self.with_average(event, |run, batch, halved| {
            let (backend, net, ranks) = (&mut *run.backend, &run.net, &mut *run.ranks);
            Ok(grid::write(&path, grid::GridInputs { backend, net, data, guided, batch, halved, ranks }, show)?)
        });
        self.show = Some(show);
        match written {
            // A network may not be trained enough to sample from yet, or what it makes too much for the autoencoder. Memory
            // may be short. Later grids may work, and the run does not need them.
            Err(TrainError::Grid(error)) if error.is_passing() => {
                if self.journal.is_some() {
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

    /// Writes a model file for each moving average. All ranks have the same averages, so any of them can write any.
    fn snapshot(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let path = |&std: &f64| self.execution.outdir.join(files::snapshot(self.state.nimg, std));
        let paths: Vec<_> = self.settings.ema.iter().map(path).collect();
        let (rank, writers) = (self.ranks.rank(), self.writers);
        for (i, path) in paths.iter().enumerate().filter(|(i, _)| i % writers == rank) {
            match self.write_average(i, path) {
                Err(TrainError::Model(ModelError::NotFinite { name, value, .. })) => {
                    return Err(self.diverged(format!("an average of {name} is {value:e}")));
                }
                other => other?,
            }
        }
        // A checkpoint that follows promises that all of them are there.
        self.ranks.barrier()?;
        if self.journal.is_some() {
            paths.iter().for_each(|path| event(Event::Saved(path)));
        }
        Ok(())
    }

    /// How likely the last image was to be shown without its condition.
    fn cond_dropout(&self) -> f64 {
        self.state.nimg.checked_sub(1).map_or(0.0, |last| self.settings.cond_dropout_of(last))
    }

    fn meta_now(&self) -> ModelMeta {
        let cond_dropout = Some(self.cond_dropout());
        ModelMeta { images_seen: self.state.nimg, cond_dropout, ..self.meta.clone() }
    }

    /// Writes a moving average parameter by parameter. Ranks of one machine share its memory, and may write at once.
    fn write_average(&mut self, i: usize, path: &Path) -> Result<(), TrainError> {
        let meta = ModelMeta {
            ema_std: Some(self.settings.ema[i]),
            options: Some(self.settings.fingerprint()),
            began_from: self.settings.began_from(),
            ..self.meta_now()
        };
        let table = self.backend.table().clone();
        let mut file = ModelWriter::create(path, &self.settings.config, &meta, &table, Stored::F16)?;
        for (id, _) in table.iter() {
            file.write(&self.backend.read_param(Slot::Ema(i), id)?)?;
        }
        Ok(file.finish()?)
    }

    /// Writes a checkpoint, unless the run has diverged, and tidies up.
    fn checkpoint(&mut self, event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let dir = &self.execution.outdir;
        let path = dir.join(files::checkpoint(self.state.nimg));
        match checkpoint::save(&path, self.backend, &self.meta_now(), &self.state) {
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
        // A run does not end because a picture cannot be drawn.
        let picture = dir.join(files::LOSSES);
        if let Some(Err(cause)) = self.journal.as_ref().map(|journal| journal.stats.draw(&picture)) {
            event(Event::Warning(format!("{}: {cause}", picture.display())));
        }
        Ok(())
    }
}
