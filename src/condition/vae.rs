//! A tiny variational autoencoder that invents conditions: three linear layers in all.
//!
//! With x the condition and c the tags that it is asked to have (none, or a part of those of x):
//!
//! ```text
//! mean, logvar = encoder(x, c)                   [D + V] -> [2 Z]
//! z            = mean + exp(logvar / 2) * eps    [Z]
//! out          = output(mp_silu(hidden(z, c)))   [Z + V] -> [H] -> [D], of features [D + V]
//! loss         = -ln p(x | out) + beta * KL(N(mean, exp(logvar)) | N(0, 1))
//! ```
//!
//! [`Kind`] says what x is, and so what p is: tags in a multi-hot vector are Bernoulli variables whose
//! logits are `out`; dense features are normal variables with mean `out` and the one variance that fits
//! the batch best. Since features do not say what tags they have, their `out` is longer: V logits of the
//! row's tags follow, and the loss counts these too, so that z knows them. In training c is empty for half of the rows, so that one network serves both to
//! invent freely (z alone) and to complete given tags; the encoder sees c too, so that z learns what c
//! leaves open, and a z drawn from N(0, 1) does not contradict it.
//!
//! At beta = 1 the latents say too little and conditions come out as a mush of the commonest tags; at a
//! beta that keeps them apart, most of N(0, 1) is empty. So a condition is not invented from N(0, 1) but
//! from the codes of some training rows, the anchors: one that makes the given tags likely, mixed with
//! a neighbour. What that decodes to is encoded and decoded a few times more, which moves it towards the
//! data (Rezende et al., "Stochastic Backpropagation", 2014, section 6). Tags are those that are likelier
//! than not: drawing each by itself would put in tags that do not belong together. Of features z is moved,
//! each time before it is decoded, to where the given tags are likely.
//!
//! Memory: (D + V) 2Z + (Z + V) H + H D values (of features H (D + V), as the tags' logits come on top), 0.7 M for
//! 1,024 tags; and in training all rows, D values each. Cost of a training row: six multiply-adds for each value.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::vocabulary::{Tag, Vocabulary, VocabularyError};
use super::{Conditioning, Meaning, unit_norm};
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile};
use crate::real::{Mat, Real, Threads, matmul, mp_silu, mp_silu_grad};
use crate::rng::{Purpose, Stream};

/// Key of the [`Header`] in the file's metadata.
const HEADER_KEY: &str = "condition_model";

/// Times that an invented condition is encoded and decoded again.
const ROUNDS: u32 = 3;
/// Most rows whose codes are kept as anchors.
const ANCHORS: usize = 256;
/// Most steps of a latent towards the given tags.
const APPROACH: usize = 20;
/// Anchors near another one, any of which it may be mixed with.
const NEAR: usize = 6;

/// What a condition is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Tags, as [`Vocabulary::multi_hot`] lays them out.
    Tags,
    /// Features of a tagger or another network, of norm 1 ([`unit_norm`]).
    Dense,
}

/// Sizes of the layers, and what they work on; the JSON in the file's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// What a condition is made of.
    pub kind: Kind,
    /// D: width of a condition.
    pub width: usize,
    /// Z: latent variables.
    pub latent: usize,
    /// H: width of the hidden layer.
    pub hidden: usize,
    /// The V tags that can be asked for. With [`Kind::Tags`], V = D.
    pub vocabulary: Vec<Tag>,
    /// What made the conditions; none if nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditioning: Option<Conditioning>,
}

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

/// Mean over the rows of a batch, in nats.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loss {
    /// -ln p(x | out).
    pub reconstruction: f64,
    /// KL divergence of z from N(0, 1).
    pub kl: f64,
}

/// Conditions that nobody has seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Invented {
    /// [count, D], ready for the network.
    pub conditions: Vec<f32>,
    /// [`Kind::Tags`]: the tags of each; else only those that were asked for.
    pub tags: Vec<Vec<u32>>,
}

/// Offsets of the parameters in one vector, in the order of the file.
struct Layout {
    encoder: usize,
    encoder_bias: usize,
    hidden: usize,
    hidden_bias: usize,
    output: usize,
    output_bias: usize,
    end: usize,
}

/// The autoencoder.
pub struct Vae<T: Real = f32> {
    header: Header,
    vocabulary: Vocabulary,
    params: Vec<T>,
    /// Codes (mean, logvar) of some training rows: where the latent space is inhabited, [K, 2 Z].
    anchors: Vec<T>,
    /// [`Kind::Dense`]: mean and standard deviation of each feature, `[D]`. Else empty.
    mean: Vec<f32>,
    std: Vec<f32>,
}

/// One batch in the layout of the layers.
struct Batch<T> {
    n: usize,
    /// [n, D + V]: normalised conditions, then given tags.
    input: Vec<T>,
    /// [n, D], of features [n, D + V]: what the output is measured against.
    target: Vec<T>,
    /// [n, Z]: unit normal noise.
    eps: Vec<T>,
}

impl<T: Real> Vae<T> {
    /// A network with fresh parameters: weights N(0, 1/fan_in), biases 0.
    fn init(header: Header, vocabulary: Vocabulary, seed: u64) -> Self {
        let mut vae =
            Self { header, vocabulary, params: Vec::new(), anchors: Vec::new(), mean: Vec::new(), std: Vec::new() };
        let at = vae.layout();
        let mut values = vec![0.0; at.end];
        let (d, v, z, h) = vae.sizes();
        for (step, (begin, end, fan_in)) in
            [(at.encoder, at.encoder_bias, d + v), (at.hidden, at.hidden_bias, z + v), (at.output, at.output_bias, h)]
                .into_iter()
                .enumerate()
        {
            Stream { seed, purpose: Purpose::Init, step: step as u32, image: 0 }.normals(&mut values[begin..end]);
            values[begin..end].iter_mut().for_each(|x| *x /= (fan_in as f32).sqrt());
        }
        vae.params = values.into_iter().map(|x| T::of(f64::from(x))).collect();
        vae
    }

    fn sizes(&self) -> (usize, usize, usize, usize) {
        (self.header.width, self.header.vocabulary.len(), self.header.latent, self.header.hidden)
    }

    /// Width of `out`, and how many of its values are features: those before the logits of tags.
    fn outputs(&self) -> (usize, usize) {
        match self.header.kind {
            Kind::Tags => (self.header.width, 0),
            Kind::Dense => (self.header.width + self.header.vocabulary.len(), self.header.width),
        }
    }

    fn layout(&self) -> Layout {
        let (d, v, z, h) = self.sizes();
        let (outputs, _) = self.outputs();
        let encoder_bias = 2 * z * (d + v);
        let hidden = encoder_bias + 2 * z;
        let hidden_bias = hidden + h * (z + v);
        let output = hidden_bias + h;
        let output_bias = output + outputs * h;
        Layout { encoder: 0, encoder_bias, hidden, hidden_bias, output, output_bias, end: output_bias + outputs }
    }

    /// y [n, rows] = x [n, columns] times the weight [rows, columns] at `at`, plus the bias after it.
    fn linear(&self, at: usize, (rows, columns): (usize, usize), x: &[T]) -> Vec<T> {
        let n = x.len() / columns;
        let (weight, bias) = self.params[at..][..rows * (columns + 1)].split_at(rows * columns);
        let mut y: Vec<T> = std::iter::repeat_n(bias, n).flatten().copied().collect();
        let weight = Mat::new(weight, columns).t();
        matmul((n, rows, columns), &mut y, true, Mat::new(x, columns), weight, T::one(), Threads::All);
        y
    }

    /// Gradients of [`Vae::linear`]: of weight and bias into `grad`, of x as the result.
    fn linear_backward(&self, at: usize, (rows, columns): (usize, usize), x: &[T], gy: &[T], grad: &mut [T]) -> Vec<T> {
        let n = x.len() / columns;
        let (weight, bias) = grad[at..][..rows * (columns + 1)].split_at_mut(rows * columns);
        let (a, b) = (Mat::new(gy, rows).t(), Mat::new(x, columns));
        matmul((rows, columns, n), weight, false, a, b, T::one(), Threads::All);
        bias.fill(T::zero());
        gy.chunks(rows).for_each(|row| bias.iter_mut().zip(row).for_each(|(b, &g)| *b += g));
        let mut gx = vec![T::zero(); n * columns];
        let weight = Mat::new(&self.params[at..], columns);
        matmul((n, columns, rows), &mut gx, false, Mat::new(gy, rows), weight, T::one(), Threads::All);
        gx
    }

    /// Input of the hidden layer: [n, Z + V].
    fn decoder_input(&self, z: &[T], given: impl Iterator<Item = T>, n: usize) -> Vec<T> {
        let (_, v, latent, _) = self.sizes();
        let mut given = given;
        let mut input = Vec::with_capacity(n * (latent + v));
        for row in z.chunks(latent) {
            input.extend_from_slice(row);
            input.extend(given.by_ref().take(v));
        }
        input
    }

    /// Loss of a batch, and the gradient of reconstruction + kl_weight * kl.
    fn loss(&self, batch: &Batch<T>, kl_weight: f64, grad: &mut [T]) -> Loss {
        let (d, v, z, h) = self.sizes();
        let at = self.layout();
        let n = batch.n;
        let (half, one, inv_n) = (T::of(0.5), T::one(), T::of(1.0 / n as f64));

        let code = self.linear(at.encoder, (2 * z, d + v), &batch.input);
        let mut kl = 0.0;
        let mut latent = Vec::with_capacity(n * z);
        for (row, eps) in code.chunks(2 * z).zip(batch.eps.chunks(z)) {
            for ((&mean, &logvar), &e) in row[..z].iter().zip(&row[z..]).zip(eps) {
                kl += 0.5 * (mean * mean + logvar.exp() - logvar - one).wide();
                latent.push(mean + (half * logvar).exp() * e);
            }
        }
        let given = batch.input.chunks(d + v).flat_map(|row| row[d..].iter().copied());
        let x1 = self.decoder_input(&latent, given, n);
        let pre = self.linear(at.hidden, (h, z + v), &x1);
        let x2: Vec<T> = pre.iter().map(|&x| mp_silu(x)).collect();
        let (outputs, features) = self.outputs();
        let mut out = self.linear(at.output, (outputs, h), &x2);

        // The variance of features that fits best.
        let rows = out.chunks(outputs).zip(batch.target.chunks(outputs));
        let pairs = rows.flat_map(|(out, target)| out[..features].iter().zip(target));
        let squares: f64 = pairs.map(|(&l, &t)| ((l - t) * (l - t)).wide()).sum();
        let variance = (squares / (n * features).max(1) as f64).max(1e-12);
        let factor = T::of(1.0 / (variance * n as f64));
        // From here on `out` is its own gradient.
        let of_tags: f64 = out
            .par_chunks_mut(outputs)
            .zip(batch.target.par_chunks(outputs))
            .map(|(out, target)| {
                let ((out, logits), (target, tags)) = (out.split_at_mut(features), target.split_at(features));
                out.iter_mut().zip(target).for_each(|(l, &t)| *l = (*l - t) * factor);
                let mut sum = 0.0;
                for (l, &t) in logits.iter_mut().zip(tags) {
                    // ln(1 + e^l) - t l, without overflow
                    let e = (-l.abs()).exp();
                    sum += (l.max(T::zero()) + e.ln_1p() - t * *l).wide();
                    let p = if *l >= T::zero() { one / (one + e) } else { e / (one + e) };
                    *l = (p - t) * inv_n;
                }
                sum
            })
            .sum();
        let of_features = 0.5 * features as f64 * ((variance * std::f64::consts::TAU).ln() + 1.0);
        let reconstruction = of_tags / n as f64 + of_features;

        let mut g = self.linear_backward(at.output, (outputs, h), &x2, &out, grad);
        g.iter_mut().zip(&pre).for_each(|(g, &x)| *g *= mp_silu_grad(x));
        let g = self.linear_backward(at.hidden, (h, z + v), &x1, &g, grad);
        let beta = T::of(kl_weight) * inv_n;
        let mut g_code = Vec::with_capacity(code.len());
        for ((row, eps), g) in code.chunks(2 * z).zip(batch.eps.chunks(z)).zip(g.chunks(z + v)) {
            let (mean, logvar) = row.split_at(z);
            g_code.extend(mean.iter().zip(g).map(|(&m, &g)| g + beta * m));
            g_code.extend(
                logvar
                    .iter()
                    .zip(eps)
                    .zip(g)
                    .map(|((&l, &e), &g)| half * (g * e * (half * l).exp() + beta * (l.exp() - one))),
            );
        }
        self.linear_backward(at.encoder, (2 * z, d + v), &batch.input, &g_code, grad);
        Loss { reconstruction, kl: kl / n as f64 }
    }
}

/// Normalised input of a tag set: sqrt(V) times the multi-hot condition, so that its mean square is 1.
fn tag_input(tags: &[u32], width: usize, out: &mut [f32]) {
    let value = (width as f32 / tags.len().max(1) as f32).sqrt();
    tags.iter().for_each(|&tag| out[tag as usize] = value);
}

impl Vae<f32> {
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
        let (d, v, z, _) = vae.sizes();
        vae.anchors = vae.linear(0, (2 * z, d + v), &batch.input);
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
                Kind::Tags => tag_input(tags, v, input),
                Kind::Dense => {
                    for (c, (x, y)) in input.iter_mut().zip(target).enumerate() {
                        *x = (rows.dense[row * d + c] - self.mean[c]) / self.std[c];
                        *y = *x;
                    }
                }
            }
            if epoch.is_some() {
                let stream = Stream { purpose: Purpose::Dropout, ..stream };
                tag_input(&some_of(tags, &stream), v, given);
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

impl Vae<f32> {
    /// What the model works on.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the conditions mean that it invents.
    pub fn meaning(&self) -> Meaning {
        let Header { kind, conditioning, vocabulary, .. } = &self.header;
        let unsaid = || match kind {
            Kind::Tags => Conditioning::Tags,
            Kind::Dense => Conditioning::Features { source: String::new(), node: String::new(), fingerprint: None },
        };
        Meaning {
            conditioning: Some(conditioning.clone().unwrap_or_else(unsaid)),
            tags: match kind {
                Kind::Tags => vocabulary.iter().map(|tag| tag.tag.clone()).collect(),
                Kind::Dense => Vec::new(),
            },
        }
    }

    /// The tags that can be asked for.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// `count` conditions that have the tags `given` (none = any). The i-th depends on the seed, i and the
    /// given tags only.
    ///
    /// # Panics
    /// If a tag is not in the vocabulary.
    pub fn invent(&self, given: &[u32], count: usize, seed: u64) -> Invented {
        let (d, v, z, _) = self.sizes();
        let at = self.layout();
        let mut asked = vec![0.0; v];
        tag_input(given, v, &mut asked);
        let mut code = self.starts(given, count, seed);
        let mut invented = Invented { conditions: Vec::new(), tags: Vec::new() };
        for round in 0..=ROUNDS {
            let mut latent = vec![0.0; count * z];
            for (i, (row, code)) in latent.chunks_mut(z).zip(code.chunks(2 * z)).enumerate() {
                Stream { seed, purpose: Purpose::Condition, step: round, image: i as u64 }.normals(row);
                let (mean, logvar) = code.split_at(z);
                row.iter_mut().zip(mean).zip(logvar).for_each(|((x, m), l)| *x = m + (0.5f32 * l).exp() * *x);
            }
            if self.header.kind == Kind::Dense {
                latent.chunks_mut(z).for_each(|z| self.approach(z, given));
            }
            let out = self.decode(&latent, &asked);
            let mut input = vec![0.0; count * (d + v)];
            invented = Invented { conditions: Vec::with_capacity(count * d), tags: Vec::with_capacity(count) };
            for (out, input) in out.chunks(self.outputs().0).zip(input.chunks_mut(d + v)) {
                let (x, c) = input.split_at_mut(d);
                c.copy_from_slice(&asked);
                match self.header.kind {
                    Kind::Tags => {
                        let mut tags: Vec<u32> = (0..d as u32).filter(|&t| out[t as usize] > 0.0).collect();
                        tags.extend(given);
                        if tags.is_empty() {
                            tags.extend((0..d as u32).max_by(|&a, &b| out[a as usize].total_cmp(&out[b as usize])));
                        }
                        tags.sort_unstable();
                        tags.dedup();
                        tag_input(&tags, v, x);
                        invented.conditions.extend(self.vocabulary.multi_hot(&tags));
                        invented.tags.push(tags);
                    }
                    Kind::Dense => {
                        let moments = || self.std.iter().zip(&self.mean);
                        let mut feature: Vec<f32> = out.iter().zip(moments()).map(|(&x, (s, m))| x * s + m).collect();
                        // Zeros, which have no direction, would be no condition; they do not occur.
                        let _ = unit_norm(&mut feature);
                        x.iter_mut().zip(&feature).zip(moments()).for_each(|((x, f), (s, m))| *x = (f - m) / s);
                        invented.conditions.extend(feature);
                        invented.tags.push(given.to_vec());
                    }
                }
            }
            code = self.linear(at.encoder, (2 * z, d + v), &input);
        }
        invented
    }

    /// Moves a latent to where the decoder, told of no tag, makes the given ones likely: ascent of the sum of their
    /// ln p, in steps that would bring it to 0 if it were linear, but of length 1 at most (latents have variance 1):
    /// tags that exclude each other have their optimum elsewhere, where the gradient vanishes.
    fn approach(&self, latent: &mut [f32], given: &[u32]) {
        let (_, v, z, h) = self.sizes();
        let at = self.layout();
        let (_, features) = self.outputs();
        for _ in 0..APPROACH {
            let input = [&*latent, &vec![0.0; v][..]].concat();
            let pre = self.linear(at.hidden, (h, z + v), &input);
            let hidden: Vec<f32> = pre.iter().map(|&x| mp_silu(x)).collect();
            let (mut missing, mut g_hidden) = (0.0, vec![0.0; h]);
            for tag in given.iter().map(|&tag| features + tag as usize) {
                let weight = &self.params[at.output + tag * h..][..h];
                let logit: f32 = self.params[at.output_bias + tag] + dot(weight, &hidden);
                missing += (-logit).max(0.0) + (-logit.abs()).exp().ln_1p(); // -ln p
                let doubt = 1.0 / (1.0 + logit.exp());
                g_hidden.iter_mut().zip(weight).for_each(|(g, w)| *g += doubt * w);
            }
            if missing <= 0.1 * given.len() as f32 {
                return;
            }
            g_hidden.iter_mut().zip(&pre).for_each(|(g, &x)| *g *= mp_silu_grad(x));
            let mut gradient = vec![0.0; z];
            for (g, row) in g_hidden.iter().zip(self.params[at.hidden..].chunks(z + v)) {
                gradient.iter_mut().zip(row).for_each(|(sum, w)| *sum += g * w);
            }
            let square = dot(&gradient, &gradient).max(f32::MIN_POSITIVE);
            let step = (missing / square).min(1.0 / square.sqrt());
            latent.iter_mut().zip(&gradient).for_each(|(z, g)| *z += step * g);
        }
    }

    /// Output of the decoder for latents `[n, Z]`, all with the same tags `[V]`.
    fn decode(&self, latent: &[f32], asked: &[f32]) -> Vec<f32> {
        let (_, v, z, h) = self.sizes();
        let at = self.layout();
        let n = latent.len() / z;
        let input = self.decoder_input(latent, std::iter::repeat_n(asked, n).flatten().copied(), n);
        let pre = self.linear(at.hidden, (h, z + v), &input);
        let hidden: Vec<f32> = pre.iter().map(|&x| mp_silu(x)).collect();
        self.linear(at.output, (self.outputs().0, h), &hidden)
    }

    /// Codes [count, 2 Z] to begin with: an anchor, drawn by how likely it makes the given tags, mixed with
    /// one near it.
    fn starts(&self, given: &[u32], count: usize, seed: u64) -> Vec<f32> {
        let (_, v, z, _) = self.sizes();
        let (outputs, features) = self.outputs();
        let anchors: Vec<&[f32]> = self.anchors.chunks(2 * z).collect();
        let means: Vec<f32> = anchors.iter().flat_map(|code| &code[..z]).copied().collect();
        let out = self.decode(&means, &vec![0.0; v]);
        // ln of the product of the tags' probabilities
        let score = |out: &[f32]| -> f32 { given.iter().map(|&t| -(-out[features + t as usize]).exp().ln_1p()).sum() };
        let scores: Vec<f32> = out.chunks(outputs).map(score).collect();
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        let cumulative: Vec<f32> = scores
            .iter()
            .map(|&score| {
                sum += (score - best).exp();
                sum
            })
            .collect();
        let mut starts = Vec::with_capacity(count * 2 * z);
        for i in 0..count {
            let stream = Stream { seed, purpose: Purpose::Order, step: 0, image: i as u64 };
            let [a, b, c, _] = stream.block(0).map(|word| (word >> 8) as f32 / 16_777_216.0);
            let chosen = cumulative.partition_point(|&edge| edge <= a * sum).min(anchors.len() - 1);
            let code = anchors[chosen];
            let distance = |other: &[f32]| other[..z].iter().zip(code).map(|(x, y)| (x - y) * (x - y)).sum::<f32>();
            let mut near: Vec<usize> = (0..anchors.len()).collect();
            near.sort_by(|&x, &y| distance(anchors[x]).total_cmp(&distance(anchors[y])));
            near.truncate(NEAR);
            let other = anchors[near[(b * near.len() as f32) as usize]];
            starts.extend(code.iter().zip(other).map(|(x, y)| x + 0.5 * c * (y - x)));
        }
        starts
    }

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
        let mut vae =
            Self { header, vocabulary, params: Vec::new(), anchors: Vec::new(), mean: Vec::new(), std: Vec::new() };
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
    fn tensors(&self) -> [(&'static str, Vec<usize>); 6] {
        let (d, v, z, h) = self.sizes();
        let (outputs, _) = self.outputs();
        [
            ("encoder.weight", vec![2 * z, d + v]),
            ("encoder.bias", vec![2 * z]),
            ("hidden.weight", vec![h, z + v]),
            ("hidden.bias", vec![h]),
            ("output.weight", vec![outputs, h]),
            ("output.bias", vec![outputs]),
        ]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn read_tensor(file: &SafeFile, name: &str, shape: &[usize]) -> Result<Vec<f32>, SafeError> {
    let found = file.shape(name)?;
    if found != shape {
        return Err(file.unexpected(name, format!("shape {found:?}"), format!("{shape:?}")));
    }
    let values = file.f32(name)?;
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(file.unexpected(name, format!("{} at {at}", values[at]), "finite numbers")),
        None => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(step: u32, n: usize) -> Vec<f64> {
        let mut values = vec![0.0; n];
        Stream { seed: 4, purpose: Purpose::Init, step, image: 1 }.normals(&mut values);
        values.into_iter().map(f64::from).collect()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (d, z, h, n) = (7, 3, 5, 4);
        for kind in [Kind::Tags, Kind::Dense] {
            let v = if kind == Kind::Tags { d } else { 2 };
            let tags = (0..v).map(|i| Tag { tag: format!("tag {i}"), count: 1 }).collect::<Vec<_>>();
            let vocabulary = Vocabulary::new(tags.clone()).unwrap();
            let header = Header { kind, width: d, latent: z, hidden: h, vocabulary: tags, conditioning: None };
            let mut vae = Vae::<f64>::init(header, vocabulary, 2);
            let biased = numbers(0, vae.params.len());
            vae.params.iter_mut().zip(&biased).for_each(|(p, x)| *p += 0.1 * x); // no bias stays 0
            let (outputs, features) = vae.outputs();
            let of = |(i, x): (usize, f64)| if i % outputs < features { x } else { f64::from(x > 0.0) };
            let target = numbers(1, n * outputs).into_iter().enumerate().map(of).collect();
            let batch = Batch { n, input: numbers(2, n * (d + v)), target, eps: numbers(3, n * z) };
            let mut grad = vec![0.0; vae.params.len()];
            vae.loss(&batch, 0.7, &mut grad);
            let mut scratch = grad.clone();
            let mut worst = (0.0, 0, 0.0, 0.0);
            for (i, &analytic) in grad.iter().enumerate() {
                let mut at = |delta: f64| {
                    let kept = vae.params[i];
                    vae.params[i] += delta;
                    let loss = vae.loss(&batch, 0.7, &mut scratch);
                    vae.params[i] = kept;
                    loss.reconstruction + 0.7 * loss.kl
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let error = (analytic - numeric).abs() / (analytic.abs() + numeric.abs() + 1e-3);
                if error > worst.0 {
                    worst = (error, i, analytic, numeric);
                }
            }
            // Central differences in f64 at 1e-5: rounding 1e-11, curvature 1e-10, of gradients of about 1.
            assert!(worst.0 < 1e-6, "{kind:?}: {worst:?} (error, parameter, gradient, finite difference)");
        }
    }
}
