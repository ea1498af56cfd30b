//! Inventing conditions with a trained condition model.

use super::{ConditionKind, Vae, tag_input};
use crate::condition::prompt::Prompt;
use crate::condition::unit_norm;
use crate::real::{mp_silu, mp_silu_grad};
use crate::rng::{Purpose, Stream};

/// Times that an invented condition is encoded and decoded again.
const ROUNDS: u32 = 3;
/// The most steps that a latent takes towards the given tags.
const APPROACH: usize = 20;
/// How many of the anchors nearest to one it may be mixed with.
const NEAR: usize = 6;

/// Conditions that nobody has seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Invented {
    /// [count, D], ready for the network.
    pub conditions: Vec<f32>,
    /// The tags of each condition. For [`ConditionKind::Tags`] all of them, where those that were asked for have their
    /// weights; else only those that were asked for.
    pub tags: Vec<Prompt>,
}

impl Vae {
    /// `count` conditions that have the tags `given` (none = any). The i-th depends on the seed, i and the
    /// given tags only.
    ///
    /// # Panics
    /// If a tag is not in the vocabulary.
    pub fn invent(&self, given: &Prompt, count: usize, seed: u64) -> Invented {
        let (d, v, z, _) = self.sizes();
        let [encoder, ..] = self.layers();
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
            if self.header.kind == ConditionKind::Features {
                latent.chunks_mut(z).for_each(|z| self.approach(z, given));
            }
            let out = self.decode(&latent, &asked);
            let mut input = vec![0.0; count * (d + v)];
            invented = Invented { conditions: Vec::with_capacity(count * d), tags: Vec::with_capacity(count) };
            for (out, input) in out.chunks(self.outputs().0).zip(input.chunks_mut(d + v)) {
                let (x, c) = input.split_at_mut(d);
                c.copy_from_slice(&asked);
                match self.header.kind {
                    ConditionKind::Tags => {
                        let mut tags: Vec<u32> = (0..d as u32).filter(|&t| out[t as usize] > 0.0).collect();
                        if tags.is_empty() && given.tags().is_empty() {
                            tags.extend((0..d as u32).max_by(|&a, &b| out[a as usize].total_cmp(&out[b as usize])));
                        }
                        let prompt = given.with(&tags);
                        tag_input(&prompt, v, x);
                        invented.conditions.extend(self.vocabulary.condition(&prompt));
                        invented.tags.push(prompt);
                    }
                    ConditionKind::Features => {
                        let moments = || self.std.iter().zip(&self.mean);
                        let mut feature: Vec<f32> = out.iter().zip(moments()).map(|(&x, (s, m))| x * s + m).collect();
                        // A vector of zeros has no direction and would be no condition; it does not occur.
                        let _ = unit_norm(&mut feature);
                        x.iter_mut().zip(&feature).zip(moments()).for_each(|((x, f), (s, m))| *x = (f - m) / s);
                        invented.conditions.extend(feature);
                        invented.tags.push(given.clone());
                    }
                }
            }
            code = self.linear(encoder, &input);
        }
        invented
    }

    /// Moves a latent to where the decoder, told of no tag, makes the given tags likely. It climbs the weighted sum of
    /// their ln p. Each step would bring that sum to 0 if it were linear, but has length 1 at most, as latents have
    /// variance 1. Tags that exclude each other have their optimum below 0, where the gradient vanishes.
    fn approach(&self, latent: &mut [f32], given: &Prompt) {
        let (_, v, z, h) = self.sizes();
        let [_, hidden, output] = self.layers();
        let (_, features) = self.outputs();
        for _ in 0..APPROACH {
            let input = [&*latent, &vec![0.0; v][..]].concat();
            let pre = self.linear(hidden, &input);
            let active: Vec<f32> = pre.iter().map(|&x| mp_silu(x)).collect();
            let (mut missing, mut g_hidden) = (0.0, vec![0.0; h]);
            for &(tag, importance) in given.tags() {
                let tag = features + tag as usize;
                let weight = &self.params[output.at + tag * h..][..h];
                let logit: f32 = self.params[output.bias() + tag] + dot(weight, &active);
                missing += importance * ((-logit).max(0.0) + (-logit.abs()).exp().ln_1p()); // -ln p
                let doubt = importance / (1.0 + logit.exp());
                g_hidden.iter_mut().zip(weight).for_each(|(g, w)| *g += doubt * w);
            }
            if missing <= 0.1 * given.tags().iter().map(|(_, importance)| importance).sum::<f32>() {
                return;
            }
            g_hidden.iter_mut().zip(&pre).for_each(|(g, &x)| *g *= mp_silu_grad(x));
            let mut gradient = vec![0.0; z];
            for (g, row) in g_hidden.iter().zip(self.params[hidden.at..].chunks(z + v)) {
                gradient.iter_mut().zip(row).for_each(|(sum, w)| *sum += g * w);
            }
            let square = dot(&gradient, &gradient).max(f32::MIN_POSITIVE);
            let step = (missing / square).min(1.0 / square.sqrt());
            latent.iter_mut().zip(&gradient).for_each(|(z, g)| *z += step * g);
        }
    }

    /// Codes [count, 2 Z] to begin with. Each is an anchor mixed with one near it; anchors are drawn by how likely they
    /// make the given tags.
    fn starts(&self, given: &Prompt, count: usize, seed: u64) -> Vec<f32> {
        let (_, v, z, _) = self.sizes();
        let (outputs, features) = self.outputs();
        let anchors: Vec<&[f32]> = self.anchors.chunks(2 * z).collect();
        let means: Vec<f32> = anchors.iter().flat_map(|code| &code[..z]).copied().collect();
        let out = self.decode(&means, &vec![0.0; v]);
        // ln of the product of the tags' probabilities, each to the power of its weight
        let ln_p = |logit: f32| -(-logit).exp().ln_1p();
        let score =
            |out: &[f32]| -> f32 { given.tags().iter().map(|&(t, w)| w * ln_p(out[features + t as usize])).sum() };
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
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
