//! Training batches: images, mirrored or not, with which noise and labels.
//!
//! Everything random is a function of the run's seed and the image's number in the run, as is which image that is
//! ([`order`](super::order)).

use super::Settings;
use super::order::Shown;
use crate::data::dataset::{Dataset, DatasetError};
use crate::rng::{Purpose, Stream, mask_key};

/// Images with noise and labels on the host, NHWC.
pub struct Batch {
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
    /// Keys of the masks of dropout [n, 2]; none without.
    pub keys: Option<Vec<f32>>,
}

impl Batch {
    /// Makes a batch of images of a run, which are of one size.
    ///
    /// # Errors
    /// [`DatasetError`]: a damaged image.
    ///
    /// # Panics
    /// If there is no image, or they are of several sizes.
    pub fn of(data: &Dataset, s: &Settings, shown: &[Shown]) -> Result<Self, DatasetError> {
        let n = shown.len();
        let shape @ [h, w, c] = data.shape_of(shown[0].image);
        let numel = h * w * c;
        let dim = s.config.label_dim;
        let mut clean = vec![0.0; n * numel];
        let mut noisy = vec![0.0; n * numel];
        let mut sigma = vec![0.0; n];
        let mut labels = (dim > 0).then(|| vec![0.0; n * dim]);
        for (j, &Shown { number: k, image: i }) in shown.iter().enumerate() {
            let stream = |purpose| Stream::new(s.seed, purpose, k);
            let image = &mut clean[j * numel..][..numel];
            data.image(i, stream(Purpose::Latent), image)?;
            if s.flip && data.flip_allowed(i) && stream(Purpose::Flip).uniform() < 0.5 {
                mirror(image, w, c);
            }
            sigma[j] = noise_level(s, stream(Purpose::TrainSigma));
            let noisy = &mut noisy[j * numel..][..numel];
            stream(Purpose::TrainNoise).normals(noisy);
            noisy.iter_mut().zip(image).for_each(|(x, clean)| *x = *clean + sigma[j] * *x);
            let dropped = k >= s.cond_dropout_from && f64::from(stream(Purpose::Dropout).uniform()) < s.cond_dropout;
            if let (Some(labels), false) = (&mut labels, dropped) {
                data.condition(i, &mut labels[j * dim..][..dim]);
            }
        }
        let keys = (s.dropout > 0.0).then(|| shown.iter().flat_map(|shown| mask_key(s.seed, shown.number)).collect());
        Ok(Self { n, shape, clean, noisy, sigma, labels, keys })
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
