//! Training batches: images, mirrored or not, with which noise and labels.
//!
//! The images of a batch are made on all threads, as a card may take more than one thread makes (docs/measured.md).
//! Everything random is a function of the run's seed and the image's number in the run, as is which image that is
//! ([`order`](super::order)).

use std::ops::Range;

use rayon::prelude::*;

use super::order::Shown;
use super::{Inputs, Settings};
use crate::backend::Backend;
use crate::data::dataset::{Dataset, DatasetError};
use crate::rng::{Purpose, Stream, mask_key};

/// Images with noise and labels on the host, NHWC.
pub struct HostBatch {
    /// Number of images.
    pub n: usize,
    /// Height, width and channels of each.
    pub shape: [usize; 3],
    /// Clean images [n, h, w, c].
    pub clean: Vec<f32>,
    /// clean + sigma * noise [n, h, w, c].
    pub noisy: Vec<f32>,
    /// Noise levels `[n]`.
    pub sigma: Vec<f32>,
    /// Conditions [n, label_dim], zero rows where dropped; none for an unconditional network.
    pub labels: Option<Vec<f32>>,
    /// Keys of the masks of dropout [n, 2]; `None` without dropout.
    pub keys: Option<Vec<f32>>,
}

/// An image, as it is to be shown.
pub(super) struct Showing {
    /// Which one of the dataset it is.
    pub image: usize,
    /// Which latent of its distribution.
    pub latent: Stream,
    /// Whether left and right are exchanged.
    pub mirrored: bool,
    /// Noise level.
    pub sigma: f32,
    /// The noise.
    pub noise: Stream,
    /// Whether with its condition.
    pub conditioned: bool,
}

impl Showing {
    /// Writes the image, clean and noisy, and its condition unless there is no room for it.
    fn make(
        &self,
        data: &Dataset,
        clean: &mut [f32],
        noisy: &mut [f32],
        condition: &mut [f32],
    ) -> Result<(), DatasetError> {
        data.image(self.image, self.latent, clean)?;
        if self.mirrored {
            let [_, w, c] = data.shape_of(self.image);
            mirror(clean, w, c);
        }
        self.noise.normals(noisy);
        noisy.iter_mut().zip(clean).for_each(|(x, clean)| *x = *clean + self.sigma * *x);
        if self.conditioned && !condition.is_empty() {
            data.condition(self.image, condition);
        }
        Ok(())
    }
}

impl HostBatch {
    /// Makes a batch of images of a run, which are of one size.
    ///
    /// # Errors
    /// [`DatasetError`]: a damaged image.
    ///
    /// # Panics
    /// If there is no image, or they are of several sizes.
    pub fn of(data: &Dataset, s: &Settings, shown: &[Shown]) -> Result<Self, DatasetError> {
        let showing = |&Shown { number, image }: &Shown| {
            let stream = |purpose| Stream::new(s.seed, purpose, number);
            let dropped = f64::from(stream(Purpose::ConditionDropout).uniform()) < s.cond_dropout_of(number);
            Showing {
                image,
                latent: stream(Purpose::Latent),
                mirrored: s.flip && data.flip_allowed(image) && stream(Purpose::Flip).uniform() < 0.5,
                sigma: noise_level(s, stream(Purpose::TrainSigma)),
                noise: stream(Purpose::TrainNoise),
                conditioned: !dropped,
            }
        };
        let showings: Vec<_> = shown.iter().map(showing).collect();
        let keys = (s.dropout > 0.0).then(|| shown.iter().flat_map(|shown| mask_key(s.seed, shown.number)).collect());
        Ok(Self { keys, ..Self::showing(data, s.config.label_dim, &showings)? })
    }

    /// Uploads some of the images as a micro-batch.
    pub(super) fn upload<B: Backend>(&self, b: &mut B, images: Range<usize>) -> Inputs<B::Tensor> {
        let n = images.len();
        let mut part = |[h, w, c]: [usize; 3], values: &[f32]| {
            let numel = h * w * c;
            b.upload([n, h, w, c], &values[images.start * numel..images.end * numel])
        };
        Inputs {
            clean: part(self.shape, &self.clean),
            noisy: part(self.shape, &self.noisy),
            sigma: part([1, 1, 1], &self.sigma),
            keys: self.keys.as_ref().map(|keys| part([1, 1, 2], keys)),
            labels: self.labels.as_ref().map(|labels| part([1, 1, labels.len() / self.n], labels)),
        }
    }

    /// Makes a batch of images of one size, on all threads; without keys.
    pub(super) fn showing(data: &Dataset, label_dim: usize, showings: &[Showing]) -> Result<Self, DatasetError> {
        let n = showings.len();
        let shape @ [h, w, c] = data.shape_of(showings[0].image);
        let numel = h * w * c;
        let (mut clean, mut noisy, mut labels) = (vec![0.0; n * numel], vec![0.0; n * numel], vec![0.0; n * label_dim]);
        let mut conditions = labels.chunks_mut(label_dim.max(1));
        let room = clean.chunks_mut(numel).zip(noisy.chunks_mut(numel));
        let room: Vec<_> = room.map(|(clean, noisy)| (clean, noisy, conditions.next().unwrap_or_default())).collect();
        let images = showings.par_iter().zip(room);
        images.try_for_each(|(showing, (clean, noisy, condition))| showing.make(data, clean, noisy, condition))?;
        let sigma = showings.iter().map(|showing| showing.sigma).collect();
        Ok(Self { n, shape, clean, noisy, sigma, labels: (label_dim > 0).then_some(labels), keys: None })
    }
}

/// sigma with ln(sigma) ~ N(P_mean, P_std^2).
pub(super) fn noise_level(s: &Settings, stream: Stream) -> f32 {
    (s.p_mean + s.p_std * f64::from(stream.normal())).exp() as f32
}

/// Mirrors an image [h, w, c] left to right.
fn mirror(image: &mut [f32], w: usize, c: usize) {
    for row in image.chunks_mut(w * c) {
        for x in 0..w / 2 {
            let (left, right) = row.split_at_mut((w - 1 - x) * c);
            left[x * c..][..c].swap_with_slice(&mut right[..c]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirroring_reverses_pixels_and_keeps_channels() {
        let mut image: Vec<f32> = (0..2 * 3 * 2).map(|x| x as f32).collect();
        mirror(&mut image, 3, 2);
        assert_eq!(image, [4.0, 5.0, 2.0, 3.0, 0.0, 1.0, 10.0, 11.0, 8.0, 9.0, 6.0, 7.0]);
    }
}
