//! What a run is told. [`Settings`] decide what it computes, and an [`Execution`] what it does beside that. Both are
//! compared with those of the run that is resumed, and with those that the other ranks were given.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

use super::ema::{MAX_STD, MIN_STD};
use super::{LearningRate, Schedule, grid, memory};
use crate::codec::Autoencoder;
use crate::condition::Conditioning;
use crate::data::dataset::{Dataset, Header, Representation};
use crate::device::Device;
use crate::formats::differences::{differing, there_and_here};
use crate::formats::fingerprint::{Fingerprint, Identity, settle};
use crate::formats::short;
use crate::model::{Config, ImageSpace, ModelMeta};

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

impl Settings {
    /// EDM2's settings, for a network of this config on these images. No image is mirrored or shown without its
    /// condition.
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

    /// Checks that a run with these settings can be computed.
    ///
    /// # Errors
    /// The first setting with which it cannot be computed.
    pub fn validate(&self) -> Result<(), SettingError> {
        positive("duration", self.duration as f64)?;
        positive("batch", self.batch as f64)?;
        positive("lr", self.lr)?;
        positive("p_std", self.p_std)?;
        // Noise levels are f32, and no draw is more than seven standard deviations away.
        let farthest = self.p_mean.abs() + 7.0 * self.p_std;
        if farthest.is_nan() || farthest > 80.0 {
            return Err(SettingError::Noise { p_mean: self.p_mean, p_std: self.p_std, farthest });
        }
        // The learning rate depends on its square root.
        let some = self.decay == 0.0 || (1e-6..f64::INFINITY).contains(&self.decay);
        check(some, "decay", self.decay, "0 or a number from 1e-6")?;
        check((0.0..=0.95).contains(&self.dropout), "dropout", self.dropout, "0 to 0.95")?;
        check((0.0..=1.0).contains(&self.cond_dropout), "cond_dropout", self.cond_dropout, "0 to 1")?;
        check_widths("ema", &self.ema)?;
        let Self { batch, duration, .. } = *self;
        if batch > duration { Err(SettingError::Short { batch, duration }) } else { Ok(()) }
    }

    /// How likely the image with this number in the run is shown without its condition.
    pub fn cond_dropout_of(&self, number: u64) -> f64 {
        if number >= self.cond_dropout_from { self.cond_dropout } else { 0.0 }
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

    /// The interval at which sample grids take a hundredth of the run's time, where making a picture of an image takes so
    /// many multiply-adds.
    pub fn grid_interval(&self, picture: u64) -> u64 {
        let [height, width, _] = self.data.shape;
        let cost = grid::cost(&self.config, [height, width], self.cond_dropout > 0.0, picture);
        grid::SHARE.saturating_mul(cost)
    }

    /// A fingerprint of the options, which tells this run's snapshots from another's. It leaves out what a model file
    /// has an entry for (network, data, start) and what may change (the length).
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let mut options = serde_json::to_value(self).unwrap_or_default();
        if let Some(options) = options.as_object_mut() {
            options.retain(|name, _| !["config", "data", "init", "duration"].contains(&&**name));
        }
        Fingerprint::of([options.to_string()])
    }

    /// The fingerprint of the weights that the run began from.
    pub(super) fn began_from(&self) -> Option<Fingerprint> {
        self.init.as_ref()?.fingerprint
    }

    /// The options that keep a run of `self` from being resumed under `other`, with both values.
    pub(super) fn differences(&self, other: &Self) -> String {
        let mut other = other.clone();
        other.data.settle(&self.data);
        // A run that goes on needs no file to start from. Where that file lies, and what it is called, does not matter.
        let same = |then: &Identity| other.init.as_ref().is_none_or(|now| !now.differs(then));
        if self.init.as_ref().is_some_and(same) {
            other.init.clone_from(&self.init);
        }
        if self.schedule != Schedule::Linear {
            other.duration = self.duration;
        }
        let why =
            |key: &str| if key == "duration" { ", which decides the learning rates of a linear schedule" } else { "" };
        differing(self, &other, |key, then, now| format!("{key} was {then}, now {now}{}", why(key)))
    }
}

/// A setting with which nothing can be computed, under its name in [`Settings`] or [`Execution`], or as the caller calls it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum SettingError {
    #[error("{setting} is {}, expected {expected}", short(*.found))]
    Range { setting: &'static str, found: f64, expected: String },
    #[error("{setting} {found} is given twice")]
    Twice { setting: &'static str, found: f64 },
    #[error(
        "p_mean {} and p_std {} make noise levels up to e^{}, expected at most e^80",
        short(*.p_mean), short(*.p_std), short(.farthest.round())
    )]
    Noise { p_mean: f64, p_std: f64, farthest: f64 },
    #[error("batch is {batch}, more than the whole run: duration is {duration} images")]
    Short { batch: u64, duration: u64 },
}

fn check(holds: bool, setting: &'static str, found: f64, expected: &str) -> Result<(), SettingError> {
    if holds { Ok(()) } else { Err(SettingError::Range { setting, found, expected: expected.into() }) }
}

fn positive(setting: &'static str, x: f64) -> Result<(), SettingError> {
    check(x > 0.0 && x.is_finite(), setting, x, "a positive number")?;
    // Devices compute in f32.
    check((x as f32).is_normal(), setting, x, "a number that f32 can hold, 1.2e-38 to 3.4e38")
}

/// Checks the widths of averages that a `setting` gives.
///
/// # Errors
/// A width is too small or too large, or is given twice.
pub fn check_widths(setting: &'static str, stds: &[f64]) -> Result<(), SettingError> {
    let expected = format!("{} to {MAX_STD:.4}", short(MIN_STD));
    for (k, &found) in stds.iter().enumerate() {
        check((MIN_STD..=MAX_STD).contains(&found), setting, found, &expected)?;
        if stds[..k].contains(&found) {
            return Err(SettingError::Twice { setting, found });
        }
    }
    Ok(())
}

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
    /// The autoencoder that made the latents; `None` for pixels, or if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoencoder: Option<Autoencoder>,
    /// Fingerprint of the tags; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<Fingerprint>,
    /// Fingerprint of all images and conditions; `None` if unknown.
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

    /// The size with the most pixels. Memory that suffices for it suffices for all.
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

/// Paths need not be UTF-8; JSON must be.
fn as_shown<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// What a run does beside training. Intervals are in images; 0 means never.
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
    /// Whether a run that is resumed keeps its ramp-up, because no other one was asked for.
    pub keep_rampup: bool,
    /// Whether to begin anew and set aside what the directory has.
    pub restart: bool,
    /// Device and number type, for people.
    pub computed_on: String,
}

impl Execution {
    /// What suits the length of a run: 10 snapshots, 50 checkpoints and grids, 100 validations, 500 lines of
    /// statistics. There are fewer grids if all but the one at the end would take more than a hundredth of the time
    /// (see [`Settings::grid_interval`]). Micro-batches are as large as 1 GiB of activations allows, on a GPU 4 GiB.
    pub fn new(outdir: impl Into<PathBuf>, settings: &Settings, device: &Device) -> Self {
        let every = |times: u64| (settings.duration / times).max(1);
        let ([height, width], on_gpu) = (settings.data.largest(), device.runtime().is_some());
        Self {
            outdir: outdir.into(),
            batch_gpu: memory::default_batch_gpu(&settings.config, height, width, settings.batch, on_gpu),
            status: every(500),
            validate: every(100),
            grid: every(50).max(settings.grid_interval(0)),
            tensorboard: false,
            snapshot: every(10),
            checkpoint: every(50),
            keep: 3,
            keep_rampup: true,
            restart: false,
            computed_on: device.to_string(),
        }
    }

    /// Checks that a run can be carried out in this way.
    ///
    /// # Errors
    /// The number of images at a time is 0.
    pub fn validate(&self) -> Result<(), SettingError> {
        positive("batch_gpu", self.batch_gpu as f64)
    }
}

/// The metadata of a model that learns from these images.
pub fn meta_of(data: &Dataset, config: &Config, seed: u64) -> ModelMeta {
    let (header, tags) = (data.header(), data.meaning().tags);
    ModelMeta {
        height: header.height,
        width: header.width,
        encoder: if header.kind == Representation::Latents { ImageSpace::SdVae } else { ImageSpace::Rgb },
        vocabulary: if tags.len() == config.label_dim { tags } else { vec![] },
        conditioning: header.conditioning.clone(),
        autoencoder: header.autoencoder.clone(),
        data: data.fingerprint(),
        seed: Some(seed),
        source: header.source.clone(),
        licence: header.licence.clone(),
        ..ModelMeta::default()
    }
}

/// What every rank must have been given alike.
#[derive(Serialize, Deserialize)]
pub(super) struct RankInputs {
    pub settings: Settings,
    pub execution: Execution,
    /// Images that the loss is watched on; none if there are none.
    pub validation: Option<DataIdentity>,
}

impl RankInputs {
    /// How what this rank was given differs from another rank's; both texts are JSON.
    pub fn differences(ours: &str, theirs: &str) -> String {
        let line = there_and_here;
        let (Ok(ours), Ok(mut theirs)) = (serde_json::from_str::<Self>(ours), serde_json::from_str::<Self>(theirs))
        else {
            return "it is another version".into();
        };
        // Where the file of --init lies, and what it is called, does not matter.
        if let (Some(ours), Some(init)) = (&ours.settings.init, &theirs.settings.init)
            && !init.differs(ours)
        {
            theirs.settings.init = Some(ours.clone());
        }
        // Ranks may have different cards, with room for different numbers of images, and tiles that were measured or
        // not; but all must compute in the same number type.
        theirs.execution.batch_gpu = ours.execution.batch_gpu;
        let numbers = |execution: &Execution| {
            let numbers = execution.computed_on.split_once(", ").map(|(_, numbers)| numbers);
            numbers.map(|numbers| numbers.split(", tuned").next().unwrap_or(numbers).to_owned())
        };
        if numbers(&ours.execution) == numbers(&theirs.execution) {
            theirs.execution.computed_on.clone_from(&ours.execution.computed_on);
        }
        let validation = match [&ours, &theirs].map(|given| given.validation.as_ref()) {
            [Some(ours), Some(theirs)] => {
                differing(ours, theirs, |key, ours, theirs| line(&format!("validation.{key}"), ours, theirs))
            }
            [ours, theirs] if ours.is_some() != theirs.is_some() => {
                let images = |data: Option<&DataIdentity>| data.map_or(0, |data| data.images).to_string();
                line("validation.images", &images(ours), &images(theirs))
            }
            _ => String::new(),
        };
        let all = [
            differing(&ours.settings, &theirs.settings, line),
            validation,
            differing(&ours.execution, &theirs.execution, line),
        ];
        all.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
    }
}
