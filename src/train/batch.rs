//! Training batches: which images, mirrored or not, with which noise and labels.
//!
//! Everything random is a function of the run's seed and the image's number in the run (images seen before
//! it), so neither the size of a micro-batch nor a restart changes anything, and there is no state to save.
//! Each epoch is a permutation of the dataset, images that it wants repeated counted as often (Fisher-Yates
//! with numbers keyed by the epoch).

use super::Settings;
use crate::data::dataset::{Dataset, DatasetError};
use crate::rng::{Purpose, Stream, mask_key};

/// Images with noise and labels on the host, NHWC.
pub struct Batch {
    /// Number of images.
    pub n: usize,
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

/// Makes the batches of a run.
pub struct Batches<'a> {
    data: &'a Dataset,
    settings: &'a Settings,
    /// Every image as often as an epoch shows it.
    images: Vec<u32>,
    epoch: u64,
    order: Vec<u32>,
}

impl<'a> Batches<'a> {
    /// Batches of a training split with no more than 2^32 images.
    pub fn new(data: &'a Dataset, settings: &'a Settings) -> Self {
        let images: Vec<u32> = (0..data.len()).flat_map(|i| std::iter::repeat_n(i as u32, data.repeats(i))).collect();
        let order = permutation(settings.seed, 0, images.len());
        Self { data, settings, images, epoch: 0, order }
    }

    /// Index in the dataset of image number `k` of the run.
    fn index(&mut self, k: u64) -> usize {
        let len = self.images.len() as u64;
        if k / len != self.epoch {
            self.epoch = k / len;
            self.order = permutation(self.settings.seed, self.epoch, self.images.len());
        }
        self.images[self.order[(k % len) as usize] as usize] as usize
    }

    /// Images number `first` to `first + n` of the run.
    ///
    /// # Errors
    /// [`DatasetError`]: a damaged image.
    pub fn get(&mut self, first: u64, n: usize) -> Result<Batch, DatasetError> {
        let s = self.settings;
        let [h, w, c] = self.data.shape();
        let numel = h * w * c;
        let dim = s.config.label_dim;
        let mut clean = vec![0.0; n * numel];
        let mut noisy = vec![0.0; n * numel];
        let mut sigma = vec![0.0; n];
        let mut labels = (dim > 0).then(|| vec![0.0; n * dim]);
        for j in 0..n {
            let k = first + j as u64;
            let i = self.index(k);
            let stream = |purpose| Stream::new(s.seed, purpose, k);
            let image = &mut clean[j * numel..][..numel];
            self.data.image(i, stream(Purpose::Latent), image)?;
            if s.flip && self.data.flip_allowed(i) && stream(Purpose::Flip).uniform() < 0.5 {
                mirror(image, w, c);
            }
            sigma[j] = noise_level(s, stream(Purpose::TrainSigma));
            let noisy = &mut noisy[j * numel..][..numel];
            stream(Purpose::TrainNoise).normals(noisy);
            noisy.iter_mut().zip(image).for_each(|(x, clean)| *x = *clean + sigma[j] * *x);
            let dropped = k >= s.cond_dropout_from && f64::from(stream(Purpose::Dropout).uniform()) < s.cond_dropout;
            if let (Some(labels), false) = (&mut labels, dropped) {
                self.data.condition(i, &mut labels[j * dim..][..dim]);
            }
        }
        let keys = (s.dropout > 0.0).then(|| (first..first + n as u64).flat_map(|k| mask_key(s.seed, k)).collect());
        Ok(Batch { n, clean, noisy, sigma, labels, keys })
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

/// The order of `len` images in an epoch.
fn permutation(seed: u64, epoch: u64, len: usize) -> Vec<u32> {
    let stream = Stream::new(seed, Purpose::Order, epoch);
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        let word = stream.block(i as u32 / 4)[i % 4];
        // A word scaled to 0..=i; its bias is below 2^-32 * len, nothing that training could notice.
        order.swap(i, ((u64::from(word) * (i as u64 + 1)) >> 32) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_shows_each_image_once_and_in_another_order_than_the_last() {
        let a = permutation(1, 0, 1001);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().enumerate().all(|(i, &x)| i == x as usize));
        for other in [permutation(1, 1, 1001), permutation(2, 0, 1001)] {
            // Two random permutations agree in one place on average.
            assert!(a.iter().zip(&other).filter(|(a, b)| a == b).count() < 10);
        }
    }

    #[test]
    fn mirroring_reverses_pixels_and_keeps_channels() {
        let mut image: Vec<f32> = (0..2 * 3 * 2).map(|x| x as f32).collect();
        mirror(&mut image, 3, 2);
        assert_eq!(image, [4.0, 5.0, 2.0, 3.0, 0.0, 1.0, 10.0, 11.0, 8.0, 9.0, 6.0, 7.0]);
    }
}
