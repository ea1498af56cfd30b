//! The loss on images that are not learnt from: at random noise levels while training, and level by level.
//!
//! Noise depends on an image's place in the dataset and the level's number only, so two networks are compared on
//! the same noisy images. Ranks share them, and add up what all have found in the order of the images. Cost: a forward
//! pass for each image and level.

use std::collections::BTreeMap;

use super::{Settings, batch};
use crate::backend::{BackendError, NetworkBackend};
use crate::collective::{Collective, CollectiveError, share};
use crate::data::dataset::{Dataset, DatasetError};
use crate::model::Precond;
use crate::rng::{Purpose, Stream};

/// So many images of the validation split are looked at while training.
const IMAGES: usize = 1024;
/// Noise levels for each of them.
const DRAWS: usize = 4;

/// Why there is no loss.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ValidationError {
    #[error(transparent)]
    Data(#[from] DatasetError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Ranks(#[from] CollectiveError),
}

/// Noise levels of `edm2k eval`, from where nothing is hidden to where everything is.
pub const SIGMAS: [f64; 15] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 80.0];

/// Means over images and their elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// What training minimises: `error` / exp(`logvar`) + `logvar` (EDM2, eq. 14).
    pub loss: f64,
    /// Squared error of the denoised image, times (sigma^2 + sigma_data^2) / (sigma sigma_data)^2: 1 for a network
    /// that knows nothing but the mean and the size of the data.
    pub error: f64,
    /// ln(`error`) as the network expects it.
    pub logvar: f64,
}

/// Mean loss of the effective weights, which are the same on all ranks, on the first images of a split, each at a few noise
/// levels, drawn as in training.
pub fn loss<B: NetworkBackend>(
    b: &mut B,
    net: &Precond,
    settings: &Settings,
    data: &Dataset,
    batch: usize,
    ranks: &mut dyn Collective,
) -> Result<f64, ValidationError> {
    let sigma = |k| batch::noise_level(settings, Stream::new(0, Purpose::TrainSigma, k));
    let images = data.len().min(IMAGES);
    let losses = losses(b, net, data, images, DRAWS, sigma, batch, &mut |_| {}, ranks)?;
    Ok(losses.iter().map(|level| level.loss).sum::<f64>() / DRAWS as f64)
}

/// Losses of the effective weights on the first `images` of a split at each of [`SIGMAS`]; `progress` is told how
/// many more images have been denoised.
pub fn loss_by_level<B: NetworkBackend>(
    b: &mut B,
    net: &Precond,
    data: &Dataset,
    images: usize,
    batch: usize,
    progress: &mut dyn FnMut(u64),
    ranks: &mut dyn Collective,
) -> Result<Vec<Loss>, ValidationError> {
    losses(b, net, data, images, SIGMAS.len(), |k| SIGMAS[k as usize % SIGMAS.len()] as f32, batch, progress, ranks)
}

/// The plan of a batch: denoised images and logvar.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Validating;

/// Shows each image `draws` times; time number j of image i with noise k = i * `draws` + j of level `sigma(k)`.
/// Means over the images for each j.
#[allow(clippy::too_many_arguments)]
fn losses<B: NetworkBackend>(
    b: &mut B,
    net: &Precond,
    data: &Dataset,
    images: usize,
    draws: usize,
    sigma: impl Fn(u64) -> f32,
    batch: usize,
    progress: &mut dyn FnMut(u64),
    ranks: &mut dyn Collective,
) -> Result<Vec<Loss>, ValidationError> {
    let dim = net.config.label_dim;
    let sd2 = net.config.sigma_data.powi(2);
    let total = images * draws;
    let own = share(total as u64, ranks.rank(), ranks.size());
    let (begin, end) = (own.start as usize, own.end as usize);
    // A batch is of one size.
    let mut by_size: BTreeMap<[usize; 3], Vec<usize>> = BTreeMap::new();
    (begin..end).for_each(|k| by_size.entry(data.shape_of(k / draws)).or_default().push(k));
    let batches = by_size.iter().flat_map(|(shape, all)| all.chunks(batch).map(move |all| (*shape, all)));
    let mut found = vec![[0.0; 3]; end - begin];
    for ([h, w, c], all) in batches {
        let (n, numel) = (all.len(), h * w * c);
        let mut clean = vec![0.0; n * numel];
        let mut noisy = vec![0.0; n * numel];
        let mut labels = vec![0.0; n * dim];
        let levels: Vec<f32> = all.iter().map(|&k| sigma(k as u64)).collect();
        for (j, &k) in all.iter().enumerate() {
            let image = &mut clean[j * numel..][..numel];
            // The same latent at every level.
            data.image(k / draws, Stream::new(0, Purpose::Latent, (k / draws) as u64), image)?;
            if dim > 0 {
                data.condition(k / draws, &mut labels[j * dim..][..dim]);
            }
            let noisy = &mut noisy[j * numel..][..numel];
            Stream::new(0, Purpose::TrainNoise, k as u64).normals(noisy);
            noisy.iter_mut().zip(image).for_each(|(x, clean)| *x = *clean + levels[j] * *x);
        }
        let mut inputs = vec![b.upload([n, h, w, c], &noisy), b.upload([n, 1, 1, 1], &levels)];
        if dim > 0 {
            inputs.push(b.upload([n, 1, 1, dim], &labels));
        }
        let made = b.planned::<BackendError>(&Validating, &inputs, &mut |b, inputs| {
            let denoised = net.denoise(b, &inputs[0], &inputs[1], inputs.get(2));
            Ok(vec![denoised, net.logvar(b, &inputs[1]).1])
        })?;
        let (denoised, logvar) = (b.download(&made[0])?, b.download(&made[1])?);
        for (j, k) in all.iter().enumerate() {
            let (d, y) = (&denoised[j * numel..][..numel], &clean[j * numel..][..numel]);
            let square = d.iter().zip(y).map(|(d, y)| f64::from(d - y).powi(2)).sum::<f64>() / numel as f64;
            let (s2, logvar) = (f64::from(levels[j]).powi(2), f64::from(logvar[j]));
            let error = (s2 + sd2) / (s2 * sd2) * square;
            found[k - begin] = [error / logvar.exp() + logvar, error, logvar];
        }
        progress(n as u64);
    }
    let all: Vec<f64> =
        bytemuck::pod_collect_to_vec(&ranks.gather(bytemuck::cast_slice::<[f64; 3], u8>(&found))?.concat());
    let mut sums = vec![Loss::default(); draws];
    for (k, [loss, error, logvar]) in all.as_chunks().0.iter().enumerate() {
        let sum = &mut sums[k % draws];
        sum.loss += loss;
        sum.error += error;
        sum.logvar += logvar;
    }
    let mean = |sum: f64| sum / images as f64;
    Ok(sums.iter().map(|s| Loss { loss: mean(s.loss), error: mean(s.error), logvar: mean(s.logvar) }).collect())
}
