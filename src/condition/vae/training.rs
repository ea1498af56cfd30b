//! How it learns.

use half::f16;

use super::net::{Batch, Loss};
use super::{Header, Kind, Vae, VaeError, tag_input};
use crate::condition::Conditioning;
use crate::condition::prompt::Prompt;
use crate::condition::vocabulary::Vocabulary;
use crate::rng::{Purpose, Stream};

/// Most rows whose codes are kept as anchors.
const ANCHORS: usize = 256;

/// The conditions to learn from.
pub struct Rows {
    /// What they are.
    pub kind: Kind,
    /// The tags.
    pub vocabulary: Vocabulary,
    /// Tags of each row, places in the vocabulary.
    pub tags: Vec<Vec<u32>>,
    /// [`Kind::Dense`]: the rows, [N, D]. [`Kind::Tags`]: empty, as the tags say it all.
    pub dense: Vec<f32>,
    /// What made them; none if nobody said.
    pub conditioning: Option<Conditioning>,
}

impl Rows {
    /// D.
    pub fn width(&self) -> usize {
        match self.kind {
            Kind::Tags => self.vocabulary.len(),
            Kind::Dense => self.dense.len() / self.tags.len().max(1),
        }
    }
}

/// How to learn.
#[derive(Clone, Debug)]
pub struct Training {
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

impl Default for Training {
    fn default() -> Self {
        Self { latent: 32, hidden: 256, epochs: 60, batch: 64, lr: 2e-3, kl_weight: 0.1, seed: 0 }
    }
}

impl Vae {
    /// Learns from `rows`; `progress(epoch, loss)` after each pass.
    ///
    /// # Errors
    /// [`VaeError::Diverged`].
    ///
    /// # Panics
    /// If there are no rows, or a tag is not in the vocabulary.
    pub fn train(rows: &Rows, how: &Training, mut progress: impl FnMut(usize, Loss)) -> Result<Self, VaeError> {
        let (count, width) = (rows.tags.len(), rows.width());
        assert!(count > 0 && width > 0, "conditions to learn from");
        let header = Header {
            kind: rows.kind,
            width,
            latent: how.latent,
            hidden: how.hidden,
            vocabulary: rows.vocabulary.tags().to_vec(),
            conditioning: rows.conditioning.clone(),
        };
        let mut vae = Self::init(header, rows.vocabulary.clone(), how.seed);
        if rows.kind == Kind::Dense {
            (vae.mean, vae.std) = moments(&rows.dense, width);
        }
        let batch_size = how.batch.min(count);
        let steps = how.epochs * count.div_ceil(batch_size);
        let mut adam = Adam::new(vae.params.len());
        let mut grad = vec![0.0; vae.params.len()];
        let mut step = 0;
        for epoch in 0..how.epochs {
            let order = shuffled(count, how.seed, epoch as u32);
            let mut sum = Loss::default();
            for chunk in order.chunks(batch_size) {
                let batch = vae.batch(rows, chunk, how.seed, Some(epoch as u32));
                let done = step as f64 / steps as f64;
                let loss = vae.loss(&batch, how.kl_weight * (done * 10.0).min(1.0), &mut grad);
                if !(loss.reconstruction + loss.kl).is_finite() {
                    return Err(VaeError::Diverged(epoch));
                }
                adam.step(&mut vae.params, &grad, how.lr * (1.0 - done));
                let share = chunk.len() as f64 / count as f64;
                sum.reconstruction += share * loss.reconstruction;
                sum.kl += share * loss.kl;
                step += 1;
            }
            progress(epoch, sum);
        }
        let some = shuffled(count, how.seed, u32::MAX);
        let batch = vae.batch(rows, &some[..ANCHORS.min(count)], how.seed, None);
        let [encoder, ..] = vae.layers();
        vae.anchors = vae.linear(encoder, &batch.input);
        // As they will be saved.
        let finite = |x: &f32| f16::from_f32(*x).is_finite();
        if !vae.params.iter().chain(&vae.anchors).all(finite) {
            return Err(VaeError::Diverged(how.epochs - 1));
        }
        Ok(vae)
    }

    /// Some rows, with the tags and the noise that an epoch gives them; without an epoch, no tags.
    fn batch(&self, rows: &Rows, chunk: &[usize], seed: u64, epoch: Option<u32>) -> Batch<f32> {
        let (d, v, z, _) = self.sizes();
        let columns = d + v;
        let (outputs, features) = self.outputs();
        let n = chunk.len();
        let (input, target) = (vec![0.0; n * columns], vec![0.0; n * outputs]);
        let mut batch = Batch { n, input, target, eps: vec![0.0; n * z] };
        for (i, &row) in chunk.iter().enumerate() {
            let stream = Stream { seed, purpose: Purpose::Condition, step: epoch.unwrap_or(0), image: row as u64 };
            stream.normals(&mut batch.eps[i * z..][..z]);
            let tags = &rows.tags[row];
            let (input, given) = batch.input[i * columns..][..columns].split_at_mut(d);
            let (target, target_tags) = batch.target[i * outputs..][..outputs].split_at_mut(features);
            tags.iter().for_each(|&tag| target_tags[tag as usize] = 1.0);
            match rows.kind {
                Kind::Tags => tag_input(&Prompt::of(tags), v, input),
                Kind::Dense => {
                    for (c, (x, y)) in input.iter_mut().zip(target).enumerate() {
                        *x = (rows.dense[row * d + c] - self.mean[c]) / self.std[c];
                        *y = *x;
                    }
                }
            }
            if epoch.is_some() {
                let stream = Stream { purpose: Purpose::Dropout, ..stream };
                tag_input(&Prompt::of(&some_of(tags, &stream)), v, given);
            }
        }
        batch
    }
}

/// No tag half of the time, else a random part: few mostly, all of them at times.
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

/// Mean and standard deviation of each of the `width` columns.
fn moments(values: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let n = (values.len() / width) as f64;
    let (mut sum, mut squares) = (vec![0.0f64; width], vec![0.0f64; width]);
    for row in values.chunks(width) {
        for (c, &x) in row.iter().enumerate() {
            sum[c] += f64::from(x);
            squares[c] += f64::from(x) * f64::from(x);
        }
    }
    let std = sum.iter().zip(&squares).map(|(s, q)| ((q - s * s / n) / n).max(1e-12).sqrt() as f32);
    let std = std.collect();
    (sum.iter().map(|s| (s / n) as f32).collect(), std)
}

/// Adam (0.9, 0.999).
struct Adam {
    m: Vec<f32>,
    v: Vec<f32>,
    step: i32,
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
