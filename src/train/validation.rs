//! The loss on images that are not learned from: while training at random noise levels, in `edm2k eval` level by level.
//!
//! Noise depends on an image's place in the dataset and the level's number only, so two networks are compared on the
//! same noisy images. Ranks, or other processes, share them, and add up the results of all in a fixed order. Cost: a
//! forward pass for each image and level.

use bytemuck::{Pod, Zeroable};

use super::Settings;
use super::batch::{self, HostBatch, Showing};
use crate::backend::{BackendError, NetworkBackend};
use crate::collective::{Collective, CollectiveError, Part};
use crate::data::dataset::{Dataset, DatasetError};
use crate::device::{Backends, Device, Work};
use crate::model::{Model, Precond};
use crate::rng::{Purpose, Stream};

/// How many images of the validation split are looked at while training.
const IMAGES: usize = 1024;
/// Noise levels for each of them.
const DRAWS: usize = 4;

/// Why there is no loss.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ValidationError {
    #[error("{0}")]
    Data(#[from] DatasetError),
    #[error("{0}")]
    Backend(#[from] BackendError),
    #[error("{0}")]
    Ranks(#[from] CollectiveError),
}

/// Noise levels of `edm2k eval`, from where nothing is hidden to where everything is.
pub const SIGMAS: [f64; 15] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 80.0];

/// Of a noisy image, means over its elements; or means of these over images, at one noise level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct LevelLoss {
    /// What training minimises: `error` / exp(`logvar`) + `logvar` (EDM2, eq. 14).
    pub loss: f64,
    /// Squared error of the denoised image, times (sigma^2 + sigma_data^2) / (sigma sigma_data)^2: 1 for a network that
    /// knows nothing but that the data have mean 0 and standard deviation sigma_data.
    pub error: f64,
    /// ln(`error`) as the network expects it.
    pub logvar: f64,
}

/// Mean loss of the effective weights, which are the same on all ranks, on the first images of a split, each at a few noise
/// levels, drawn as in training.
///
/// # Errors
/// An image cannot be read, the device fails, or another rank is gone.
pub fn loss<B: NetworkBackend>(
    b: &mut B,
    net: &Precond,
    settings: &Settings,
    data: &Dataset,
    batch: usize,
    ranks: &mut dyn Collective,
) -> Result<f64, ValidationError> {
    let sigma = |k| batch::noise_level(settings, Stream::new(0, Purpose::TrainSigma, k));
    // Images are shared out one by one, since ranks may have room for different numbers of them at a time.
    let noisy = Noisy::new(data, data.len().min(IMAGES), DRAWS, 1, sigma);
    let own = noisy.of(ranks.part());
    let found = noisy.measure(b, net, own, batch, &mut |_| {})?;
    let losses = noisy.means(&noisy.gathered(&found, ranks)?);
    Ok(losses.iter().map(|level| level.loss).sum::<f64>() / DRAWS as f64)
}

/// The plan of a batch: denoised images and logvar.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Validating;

/// The first images of a split, each made noisy a few times. The noise number of image i at its j-th time is k = i *
/// draws + j.
pub struct Noisy<'a> {
    data: &'a Dataset,
    draws: usize,
    sigma: Box<dyn Fn(u64) -> f32 + 'a>,
    /// Their numbers k, sorted so that those of images of one size follow each other.
    order: Vec<usize>,
    /// How many images of a size are kept together in one part, if there are so many.
    together: usize,
}

debug!(Noisy<'_> { draws });

impl<'a> Noisy<'a> {
    fn new(data: &'a Dataset, images: usize, draws: usize, together: usize, sigma: impl Fn(u64) -> f32 + 'a) -> Self {
        let mut order: Vec<usize> = (0..images * draws).collect();
        // A batch is of one size.
        order.sort_by_key(|k| data.shape_of(k / draws));
        Self { data, draws, sigma: Box::new(sigma), order, together }
    }

    /// Each image at each of [`SIGMAS`]. Parts are made of whole batches. So an image shares its batch with the same
    /// images as if one process did it all, and gives the same result to the bit.
    pub fn by_level(data: &'a Dataset, images: usize, batch: usize) -> Self {
        let sigma = |k| SIGMAS[k as usize % SIGMAS.len()] as f32;
        Self::new(data, images, SIGMAS.len(), batch, sigma)
    }

    fn batches<'k>(&'k self, numbers: &'k [usize], most: usize) -> impl Iterator<Item = &'k [usize]> {
        let shape = |k: &usize| self.data.shape_of(k / self.draws);
        numbers.chunk_by(move |a, b| shape(a) == shape(b)).flat_map(move |same| same.chunks(most))
    }

    /// The numbers k in a part.
    pub fn of(&self, part: Part) -> &[usize] {
        let lengths: Vec<usize> = self.batches(&self.order, self.together).map(<[usize]>::len).collect();
        let own = part.share(lengths.len());
        &self.order[lengths[..own.start].iter().sum()..][..lengths[own].iter().sum()]
    }

    /// Measures a model on these of the noisy images, `batch` at a time. `progress` is told how many more have been denoised.
    ///
    /// # Errors
    /// The device's, or a damaged image.
    pub fn losses(
        &self,
        device: &Device,
        model: &Model,
        numbers: &[usize],
        batch: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<LevelLoss>, ValidationError> {
        device.run(Measuring { noisy: self, model, numbers, batch, progress })
    }

    /// As [`Noisy::losses`], of the effective weights that a backend holds.
    fn measure<B: NetworkBackend>(
        &self,
        b: &mut B,
        net: &Precond,
        numbers: &[usize],
        batch: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<LevelLoss>, ValidationError> {
        let Self { data, draws, .. } = *self;
        let (dim, sd2) = (net.config.label_dim, net.config.sigma_data.powi(2));
        let mut found = Vec::with_capacity(numbers.len());
        for all in self.batches(numbers, batch) {
            let showing = |&k: &usize| Showing {
                image: k / draws,
                // The drawn latent of an image is the same at every noise level.
                latent: Stream::new(0, Purpose::Latent, (k / draws) as u64),
                mirrored: false,
                sigma: (self.sigma)(k as u64),
                noise: Stream::new(0, Purpose::TrainNoise, k as u64),
                conditioned: true,
            };
            let showings: Vec<_> = all.iter().map(showing).collect();
            let HostBatch { n, shape: shape @ [h, w, c], clean, noisy, sigma, labels, .. } =
                HostBatch::showing(data, dim, &showings)?;
            let numel = shape.iter().product();
            let mut inputs = vec![b.upload([n, h, w, c], &noisy), b.upload([n, 1, 1, 1], &sigma)];
            inputs.extend(labels.map(|labels| b.upload([n, 1, 1, dim], &labels)));
            let made = b.planned::<BackendError>(&Validating, &inputs, &mut |b, inputs| {
                let denoised = net.denoise(b, &inputs[0], &inputs[1], inputs.get(2));
                Ok(vec![denoised, net.logvar(b, &inputs[1]).1])
            })?;
            let (denoised, logvar) = (b.download(&made[0])?, b.download(&made[1])?);
            for j in 0..n {
                let (d, y) = (&denoised[j * numel..][..numel], &clean[j * numel..][..numel]);
                let square = d.iter().zip(y).map(|(d, y)| f64::from(d - y).powi(2)).sum::<f64>() / numel as f64;
                let (s2, logvar) = (f64::from(sigma[j]).powi(2), f64::from(logvar[j]));
                let error = (s2 + sd2) / (s2 * sd2) * square;
                found.push(LevelLoss { loss: error / logvar.exp() + logvar, error, logvar });
            }
            progress(n as u64);
        }
        Ok(found)
    }

    /// What all ranks have found, one after the other, given what this one has of its part.
    ///
    /// # Errors
    /// A rank is lost, or has found another number of losses than its part has.
    pub fn gathered(&self, found: &[LevelLoss], ranks: &mut dyn Collective) -> Result<Vec<LevelLoss>, CollectiveError> {
        let mut all = Vec::with_capacity(self.order.len());
        for (part, said) in Part::all(ranks.size()).zip(ranks.gather(bytemuck::cast_slice(found))?) {
            let expected = self.of(part).len() * size_of::<LevelLoss>();
            if said.len() != expected {
                let rank = part.number;
                let what = format!("rank {rank} sends {} bytes of losses, expected {expected}", said.len());
                return Err(CollectiveError::Differs(what));
            }
            all.extend(bytemuck::pod_collect_to_vec::<u8, LevelLoss>(&said));
        }
        Ok(all)
    }

    /// Means over the images for each time that they were shown, of what all parts have found, one part after the other.
    pub fn means(&self, found: &[LevelLoss]) -> Vec<LevelLoss> {
        let mut sums = vec![LevelLoss::default(); self.draws];
        // They are added in one order, whichever process has measured them.
        for (k, found) in self.order.iter().zip(found) {
            let sum = &mut sums[k % self.draws];
            sum.loss += found.loss;
            sum.error += found.error;
            sum.logvar += found.logvar;
        }
        let mean = |sum: f64| sum / (self.order.len() / self.draws) as f64;
        sums.iter().map(|s| LevelLoss { loss: mean(s.loss), error: mean(s.error), logvar: mean(s.logvar) }).collect()
    }
}

/// A model's losses, on whichever device.
struct Measuring<'a> {
    noisy: &'a Noisy<'a>,
    model: &'a Model,
    numbers: &'a [usize],
    batch: usize,
    progress: &'a mut dyn FnMut(u64),
}

impl Work for Measuring<'_> {
    type Output = Result<Vec<LevelLoss>, ValidationError>;

    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let mut backend = backends.sampling(&self.model.table).map_err(BackendError::from)?;
        self.model.load_into(&mut backend)?;
        self.noisy.measure(&mut backend, &self.model.net, self.numbers, self.batch, self.progress)
    }
}
