//! Training of a condition model. It goes over the rows pass by pass and reads them one at a time, so that they need
//! not be in memory.

use std::ops::{ControlFlow, RangeInclusive};

use half::f16;
use serde::{Deserialize, Serialize};

use super::net::{RowBatch, VaeLoss};
use super::{ConditionKind, Vae, VaeError, VaeHeader, tag_input};
use crate::condition::Conditioning;
use crate::condition::prompt::Prompt;
use crate::condition::vocabulary::Vocabulary;
use crate::rng::{Purpose, Stream};

/// The most rows whose codes are kept as anchors.
const ANCHORS: usize = 256;

/// Conditions to learn from, wherever they lie. They are asked for one row at a time.
pub trait ConditionSource: Sync {
    /// What they are.
    fn kind(&self) -> ConditionKind;
    /// The tags.
    fn vocabulary(&self) -> &Vocabulary;
    /// What made them; `None` if unknown.
    fn conditioning(&self) -> Option<Conditioning>;
    /// How many there are.
    fn count(&self) -> usize;
    /// D.
    fn width(&self) -> usize;
    /// Tags of a row, places in the vocabulary.
    fn tags(&self, row: usize) -> &[u32];
    /// [`ConditionKind::Features`]: writes a row, `[D]`.
    fn dense(&self, row: usize, out: &mut [f32]);
}

/// Conditions in memory.
pub struct Rows {
    /// What they are.
    pub kind: ConditionKind,
    /// The tags.
    pub vocabulary: Vocabulary,
    /// Tags of each row, places in the vocabulary.
    pub tags: Vec<Vec<u32>>,
    /// [`ConditionKind::Features`]: the rows, [N, D]. [`ConditionKind::Tags`]: empty, as the tags say it all.
    pub dense: Vec<f32>,
    /// What made them; `None` if unknown.
    pub conditioning: Option<Conditioning>,
}

debug!(Rows { kind });

impl ConditionSource for Rows {
    fn kind(&self) -> ConditionKind {
        self.kind
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn conditioning(&self) -> Option<Conditioning> {
        self.conditioning.clone()
    }

    fn count(&self) -> usize {
        self.tags.len()
    }

    fn width(&self) -> usize {
        match self.kind {
            ConditionKind::Tags => self.vocabulary.len(),
            ConditionKind::Features => self.dense.len() / self.tags.len().max(1),
        }
    }

    fn tags(&self, row: usize) -> &[u32] {
        &self.tags[row]
    }

    fn dense(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.dense[row * out.len()..][..out.len()]);
    }
}

/// How to learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearningSettings {
    /// Z.
    pub latent: usize,
    /// H.
    pub hidden: usize,
    /// Passes over the rows.
    pub epochs: usize,
    /// Rows per step.
    pub batch: usize,
    /// Learning rate at the beginning; it falls to 0 linearly.
    pub lr: f64,
    /// beta: weight of the KL divergence; reached after a tenth of the training.
    pub kl_weight: f64,
    /// Of initial weights, order and noise.
    pub seed: u64,
}

impl Default for LearningSettings {
    fn default() -> Self {
        Self { latent: 32, hidden: 256, epochs: 60, batch: 64, lr: 2e-3, kl_weight: 0.1, seed: 0 }
    }
}

impl LearningSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// [`VaeError::Setting`] naming the first that makes no sense.
    pub fn validate(&self) -> Result<(), VaeError> {
        let check = |name, found: f64, range: RangeInclusive<f64>, expected| match range.contains(&found) {
            true => Ok(()),
            false => Err(VaeError::Setting { name, found, expected }),
        };
        check("latent", self.latent as f64, 1.0..=65536.0, "1 to 65536")?;
        check("hidden", self.hidden as f64, 1.0..=65536.0, "1 to 65536")?;
        check("epochs", self.epochs as f64, 1.0..=f64::MAX, "1 at least")?;
        check("batch", self.batch as f64, 1.0..=f64::MAX, "1 at least")?;
        check("lr", self.lr, f64::MIN_POSITIVE..=f64::MAX, "a positive number")?;
        check("kl_weight", self.kl_weight, 0.0..=f64::MAX, "a number from 0")
    }
}

/// A training that is under way. Between two passes it can be [saved](Self::save), and [resumed](Self::load) to the same
/// bits: order and noise are functions of the seed, the pass and the row.
pub struct Learning<'a, S> {
    pub(super) source: &'a S,
    pub(super) how: LearningSettings,
    pub(super) vae: Vae,
    pub(super) adam: Adam,
    pub(super) passes: usize,
}

debug!(Learning<'_, S> { how, passes } [S]);

impl<'a, S: ConditionSource> Learning<'a, S> {
    /// Begins to learn. Features are read once, for their means.
    ///
    /// # Errors
    /// [`VaeError::Setting`], [`VaeError::Alike`].
    ///
    /// # Panics
    /// If there are no rows.
    pub fn new(source: &'a S, how: &LearningSettings) -> Result<Self, VaeError> {
        how.validate()?;
        let (count, width) = (source.count(), source.width());
        assert!(count > 0 && width > 0, "conditions to learn from");
        let vocabulary = source.vocabulary();
        let header = VaeHeader {
            kind: source.kind(),
            width,
            latent: how.latent,
            hidden: how.hidden,
            vocabulary: vocabulary.tags().to_vec(),
            conditioning: source.conditioning(),
        };
        let mut vae = Vae::init(header, vocabulary.clone(), how.seed);
        if source.kind() == ConditionKind::Features {
            (vae.mean, vae.std) = moments(source);
            if count > 1 && vae.std.iter().all(|&std| std <= LEAST_STD) {
                return Err(VaeError::Alike(count));
            }
        }
        let adam = Adam::new(vae.params.len());
        Ok(Self { source, how: how.clone(), vae, adam, passes: 0 })
    }

    /// Passes over the rows that are done.
    pub fn passes(&self) -> usize {
        self.passes
    }

    /// Whether all of them are.
    pub fn is_done(&self) -> bool {
        self.passes >= self.how.epochs
    }

    /// Makes one more pass. `progress` is called with the number of rows that are done since the last call.
    ///
    /// # Errors
    /// [`VaeError::Diverged`].
    ///
    /// # Panics
    /// If a tag is not in the vocabulary.
    pub fn pass(&mut self, progress: &mut dyn FnMut(usize) -> ControlFlow<()>) -> Result<Option<VaeLoss>, VaeError> {
        let Self { source, how, vae, adam, passes: epoch } = self;
        let count = source.count();
        let batch_size = how.batch.min(count);
        let in_a_pass = count.div_ceil(batch_size);
        let steps = how.epochs * in_a_pass;
        let order = shuffled(count, how.seed, *epoch as u32);
        let mut grad = vec![0.0; vae.params.len()];
        let mut sum = VaeLoss::default();
        for (number, chunk) in order.chunks(batch_size).enumerate() {
            let batch = vae.batch(*source, chunk, how.seed, Some(*epoch as u32));
            let done = (*epoch * in_a_pass + number) as f64 / steps as f64;
            let loss = vae.loss(&batch, how.kl_weight * (done * 10.0).min(1.0), &mut grad);
            if !(loss.reconstruction + loss.kl).is_finite() {
                return Err(VaeError::Diverged(*epoch));
            }
            adam.step(&mut vae.params, &grad, how.lr * (1.0 - done));
            let share = chunk.len() as f64 / count as f64;
            sum.reconstruction += share * loss.reconstruction;
            sum.kl += share * loss.kl;
            if progress(chunk.len()).is_break() {
                return Ok(None);
            }
        }
        *epoch += 1;
        Ok(Some(sum))
    }

    /// The model, with the codes of some rows.
    ///
    /// # Errors
    /// [`VaeError::Diverged`]: a value is not finite in f16, which it will be saved in.
    pub fn finish(self) -> Result<Vae, VaeError> {
        let Self { source, how, mut vae, .. } = self;
        let count = source.count();
        let some = shuffled(count, how.seed, u32::MAX);
        let batch = vae.batch(source, &some[..ANCHORS.min(count)], how.seed, None);
        let [encoder, ..] = vae.layers();
        vae.anchors = vae.linear(encoder, &batch.input);
        let finite = |x: &f32| f16::from_f32(*x).is_finite();
        if !vae.params.iter().chain(&vae.anchors).all(finite) {
            return Err(VaeError::Diverged(how.epochs.saturating_sub(1)));
        }
        Ok(vae)
    }
}

impl Vae {
    /// Makes all passes, and calls `progress(epoch, loss)` after each.
    ///
    /// # Errors
    /// As [`Learning`].
    ///
    /// # Panics
    /// As [`Learning`].
    pub fn train(
        source: &impl ConditionSource,
        how: &LearningSettings,
        mut progress: impl FnMut(usize, VaeLoss),
    ) -> Result<Self, VaeError> {
        let mut learning = Learning::new(source, how)?;
        while !learning.is_done() {
            let loss = learning.pass(&mut |_| ControlFlow::Continue(()))?.unwrap_or_default();
            progress(learning.passes() - 1, loss);
        }
        learning.finish()
    }

    /// A batch of some rows, with the tags and the noise that an epoch gives them; without an epoch they have no tags.
    fn batch(&self, rows: &impl ConditionSource, chunk: &[usize], seed: u64, epoch: Option<u32>) -> RowBatch<f32> {
        let (d, v, z, _) = self.sizes();
        let columns = d + v;
        let (outputs, features) = self.outputs();
        let n = chunk.len();
        let (input, target) = (vec![0.0; n * columns], vec![0.0; n * outputs]);
        let mut batch = RowBatch { n, input, target, eps: vec![0.0; n * z] };
        for (i, &row) in chunk.iter().enumerate() {
            let stream = Stream { seed, purpose: Purpose::Condition, step: epoch.unwrap_or(0), image: row as u64 };
            stream.normals(&mut batch.eps[i * z..][..z]);
            let tags = rows.tags(row);
            let (input, given) = batch.input[i * columns..][..columns].split_at_mut(d);
            let (target, target_tags) = batch.target[i * outputs..][..outputs].split_at_mut(features);
            tags.iter().for_each(|&tag| target_tags[tag as usize] = 1.0);
            match rows.kind() {
                ConditionKind::Tags => tag_input(&Prompt::of(tags), v, input),
                ConditionKind::Features => {
                    rows.dense(row, input);
                    for ((x, y), (mean, std)) in input.iter_mut().zip(target).zip(self.mean.iter().zip(&self.std)) {
                        *x = (*x - mean) / std;
                        *y = *x;
                    }
                }
            }
            if epoch.is_some() {
                let stream = Stream { purpose: Purpose::ConditionDropout, ..stream };
                tag_input(&Prompt::of(&some_of(tags, &stream)), v, given);
            }
        }
        batch
    }
}

/// No tags half of the time, else a random part of them: mostly few, sometimes all.
fn some_of(tags: &[u32], stream: &Stream) -> Vec<u32> {
    let word = |position: u32, bound: usize| ((u64::from(stream.block(position)[0]) * bound as u64) >> 32) as usize;
    let u = f64::from(stream.block(0)[0]) / 4_294_967_296.0;
    if u < 0.5 || tags.is_empty() {
        return Vec::new();
    }
    let count = (tags.len() as f64 * (2.0 * u - 1.0).powi(3)).ceil() as usize;
    let mut rest = tags.to_vec();
    (1..=count.max(1) as u32).map(|position| rest.swap_remove(word(position, rest.len()))).collect()
}

/// 0..n in the random order of an epoch.
fn shuffled(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_cached_key(|&i| Stream { seed, purpose: Purpose::Order, step: epoch, image: i as u64 }.block(0));
    order
}

/// Standard deviation of a feature that is always the same.
const LEAST_STD: f32 = 1e-6;

/// Mean and standard deviation of each feature.
fn moments(source: &impl ConditionSource) -> (Vec<f32>, Vec<f32>) {
    let (width, n) = (source.width(), source.count() as f64);
    let (mut sum, mut squares) = (vec![0.0f64; width], vec![0.0f64; width]);
    let mut values = vec![0.0; width];
    for row in 0..source.count() {
        source.dense(row, &mut values);
        for (c, &x) in values.iter().enumerate() {
            sum[c] += f64::from(x);
            squares[c] += f64::from(x) * f64::from(x);
        }
    }
    let std = |(s, q): (&f64, &f64)| (((q - s * s / n) / n).max(0.0).sqrt() as f32).max(LEAST_STD);
    (sum.iter().map(|s| (s / n) as f32).collect(), sum.iter().zip(&squares).map(std).collect())
}

/// Adam (0.9, 0.999).
pub(super) struct Adam {
    pub m: Vec<f32>,
    pub v: Vec<f32>,
    pub step: i32,
}

impl Adam {
    fn new(n: usize) -> Self {
        Self { m: vec![0.0; n], v: vec![0.0; n], step: 0 }
    }

    fn step(&mut self, params: &mut [f32], grad: &[f32], lr: f64) {
        self.step += 1;
        let factor = lr * (1.0 - 0.999f64.powi(self.step)).sqrt() / (1.0 - 0.9f64.powi(self.step));
        let factor = factor as f32;
        for (((p, &g), m), v) in params.iter_mut().zip(grad).zip(&mut self.m).zip(&mut self.v) {
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            *p -= factor * *m / (v.sqrt() + 1e-8);
        }
    }
}
