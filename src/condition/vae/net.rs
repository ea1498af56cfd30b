//! The condition model's network, forward and backward.

use rayon::prelude::*;

use super::{ConditionKind, Vae, VaeHeader};
use crate::condition::vocabulary::Vocabulary;
use crate::real::{Dst, Mat, Real, Threads, matmul, mp_silu, mp_silu_grad};
use crate::rng::{Purpose, Stream};

/// The loss of a batch: means over its rows, in nats.
#[derive(Clone, Copy, Debug, Default)]
pub struct VaeLoss {
    /// -ln p(x | out).
    pub reconstruction: f64,
    /// KL divergence of z from N(0, 1).
    pub kl: f64,
}

/// A linear layer: its weight [rows, columns] begins at a place among the parameters, its bias `[rows]` follows.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub at: usize,
    pub rows: usize,
    pub columns: usize,
}

impl Linear {
    /// Where the bias begins.
    pub fn bias(self) -> usize {
        self.at + self.rows * self.columns
    }

    /// Where it ends.
    pub fn end(self) -> usize {
        self.bias() + self.rows
    }
}

/// One batch in the layout of the layers.
pub(super) struct RowBatch<T> {
    pub n: usize,
    /// [n, D + V]: normalised conditions, then given tags.
    pub input: Vec<T>,
    /// [n, D], or for features [n, D + V]: what the output is compared with.
    pub target: Vec<T>,
    /// [n, Z]: unit normal noise.
    pub eps: Vec<T>,
}

impl<T: Real> Vae<T> {
    /// A network with fresh parameters: weights N(0, 1/fan_in), biases 0.
    pub(super) fn init(header: VaeHeader, vocabulary: Vocabulary, seed: u64) -> Self {
        let mut vae = Self::new(header, vocabulary);
        let layers = vae.layers();
        let mut values = vec![0.0; layers[2].end()];
        for (layer, step) in layers.into_iter().zip(0..) {
            let weight = &mut values[layer.at..layer.bias()];
            Stream { seed, purpose: Purpose::Init, step, image: 0 }.normals(weight);
            weight.iter_mut().for_each(|x| *x /= (layer.columns as f32).sqrt());
        }
        vae.params = values.into_iter().map(|x| T::of(f64::from(x))).collect();
        vae
    }

    /// D, V, Z, H.
    pub(super) fn sizes(&self) -> (usize, usize, usize, usize) {
        (self.header.width, self.header.vocabulary.len(), self.header.latent, self.header.hidden)
    }

    /// Width of `out`, and how many of its values are features: those before the logits of tags.
    pub(super) fn outputs(&self) -> (usize, usize) {
        match self.header.kind {
            ConditionKind::Tags => (self.header.width, 0),
            ConditionKind::Features => (self.header.width + self.header.vocabulary.len(), self.header.width),
        }
    }

    /// Encoder, hidden layer and output, in the order of the file.
    pub(super) fn layers(&self) -> [Linear; 3] {
        let (d, v, z, h) = self.sizes();
        let mut at = 0;
        [(2 * z, d + v), (h, z + v), (self.outputs().0, h)].map(|(rows, columns)| {
            let layer = Linear { at, rows, columns };
            at = layer.end();
            layer
        })
    }

    /// y [n, rows] = x [n, columns] times the weight, plus the bias.
    pub(super) fn linear(&self, layer: Linear, x: &[T]) -> Vec<T> {
        let Linear { at, rows, columns } = layer;
        let n = x.len() / columns;
        let (weight, bias) = self.params[at..layer.end()].split_at(rows * columns);
        let mut y: Vec<T> = std::iter::repeat_n(bias, n).flatten().copied().collect();
        let weight = Mat::new(weight, columns).t();
        let out = Dst { values: &mut y, rows, accumulate: true };
        matmul((n, rows, columns), out, Mat::new(x, columns), weight, T::one(), Threads::All);
        y
    }

    /// Gradients of [`Vae::linear`]: of weight and bias into `grad`, of x as the result.
    fn linear_backward(&self, layer: Linear, x: &[T], gy: &[T], grad: &mut [T]) -> Vec<T> {
        let Linear { at, rows, columns } = layer;
        let n = x.len() / columns;
        let (weight, bias) = grad[at..layer.end()].split_at_mut(rows * columns);
        let (a, b) = (Mat::new(gy, rows).t(), Mat::new(x, columns));
        matmul((rows, columns, n), Dst::new(weight, columns), a, b, T::one(), Threads::All);
        bias.fill(T::zero());
        gy.chunks(rows).for_each(|row| bias.iter_mut().zip(row).for_each(|(b, &g)| *b += g));
        let mut gx = vec![T::zero(); n * columns];
        let weight = Mat::new(&self.params[at..], columns);
        matmul((n, columns, rows), Dst::new(&mut gx, columns), Mat::new(gy, rows), weight, T::one(), Threads::All);
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

    /// Output of the decoder for latents `[n, Z]`, all with the same tags `[V]`.
    pub(super) fn decode(&self, latent: &[T], asked: &[T]) -> Vec<T> {
        let z = self.header.latent;
        let [_, hidden, output] = self.layers();
        let n = latent.len() / z;
        let input = self.decoder_input(latent, std::iter::repeat_n(asked, n).flatten().copied(), n);
        let pre = self.linear(hidden, &input);
        let hidden: Vec<T> = pre.iter().map(|&x| mp_silu(x)).collect();
        self.linear(output, &hidden)
    }

    /// Loss of a batch, and the gradient of reconstruction + kl_weight * kl.
    pub(super) fn loss(&self, batch: &RowBatch<T>, kl_weight: f64, grad: &mut [T]) -> VaeLoss {
        let (d, v, z, _) = self.sizes();
        let [encoder, hidden, output] = self.layers();
        let n = batch.n;
        let (half, one, inv_n) = (T::of(0.5), T::one(), T::of(1.0 / n as f64));

        let code = self.linear(encoder, &batch.input);
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
        let pre = self.linear(hidden, &x1);
        let x2: Vec<T> = pre.iter().map(|&x| mp_silu(x)).collect();
        let (outputs, features) = self.outputs();
        let mut out = self.linear(output, &x2);

        // The variance of features that fits best.
        let rows = out.chunks(outputs).zip(batch.target.chunks(outputs));
        let pairs = rows.flat_map(|(out, target)| out[..features].iter().zip(target));
        let squares: f64 = pairs.map(|(&l, &t)| ((l - t) * (l - t)).wide()).sum();
        let variance = (squares / (n * features).max(1) as f64).max(1e-12);
        let factor = T::of(1.0 / (variance * n as f64));
        // From here on `out` holds the gradient of the loss with respect to itself.
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

        let mut g = self.linear_backward(output, &x2, &out, grad);
        g.iter_mut().zip(&pre).for_each(|(g, &x)| *g *= mp_silu_grad(x));
        let g = self.linear_backward(hidden, &x1, &g, grad);
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
        self.linear_backward(encoder, &batch.input, &g_code, grad);
        VaeLoss { reconstruction, kl: kl / n as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::vocabulary::Tag;

    fn numbers(step: u32, n: usize) -> Vec<f64> {
        let mut values = vec![0.0; n];
        Stream { seed: 4, purpose: Purpose::Init, step, image: 1 }.normals(&mut values);
        values.into_iter().map(f64::from).collect()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (d, z, h, n) = (7, 3, 5, 4);
        for kind in [ConditionKind::Tags, ConditionKind::Features] {
            let v = if kind == ConditionKind::Tags { d } else { 2 };
            let tags = (0..v).map(|i| Tag { tag: format!("tag {i}"), count: 1 }).collect::<Vec<_>>();
            let vocabulary = Vocabulary::new(tags.clone()).unwrap();
            let header = VaeHeader { kind, width: d, latent: z, hidden: h, vocabulary: tags, conditioning: None };
            let mut vae = Vae::<f64>::init(header, vocabulary, 2);
            let biased = numbers(0, vae.params.len());
            vae.params.iter_mut().zip(&biased).for_each(|(p, x)| *p += 0.1 * x); // no bias stays 0
            let (outputs, features) = vae.outputs();
            let of = |(i, x): (usize, f64)| if i % outputs < features { x } else { f64::from(x > 0.0) };
            let target = numbers(1, n * outputs).into_iter().enumerate().map(of).collect();
            let batch = RowBatch { n, input: numbers(2, n * (d + v)), target, eps: numbers(3, n * z) };
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
