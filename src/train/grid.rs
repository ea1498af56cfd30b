//! The sample grid: what the network makes of a few conditions, one to a row, the image that the condition
//! belongs to first. The same conditions and seeds each time, so that grids of a run can be leafed through.

use std::path::Path;

use serde_json::json;

use crate::backend::NetworkBackend;
use crate::codec::CodecError;
use crate::data::dataset::{Dataset, DatasetError};
use crate::model::Precond;
use crate::pictures::Picture;
use crate::pictures::png::PngError;
use crate::rng::{Purpose, Stream};
use crate::sample::{Batch, SampleError, Sampler, SamplerConfig};

/// Conditions.
const ROWS: usize = 6;
/// Samples of each.
const SAMPLES: usize = 4;

/// Makes a picture of an image [height, width, channels] in model space.
pub type Show<'a> = dyn FnMut([usize; 2], &[f32]) -> Result<Picture, CodecError> + 'a;

/// Why there is no grid.
#[derive(Debug, thiserror::Error)]
pub enum GridError {
    /// Sampling failed.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// An image of the dataset.
    #[error(transparent)]
    Data(#[from] DatasetError),
    /// Its latents have no picture.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The picture could not be written.
    #[error(transparent)]
    Png(#[from] PngError),
}

/// Samples with the prepared weights of `backend` and writes the grid, at most `batch` images at a time, as `show` has
/// them.
/// Guidance needs a network that was trained without conditions too: `guided` says whether it was.
pub fn write<B: NetworkBackend>(
    path: &Path,
    backend: &mut B,
    net: &Precond,
    data: &Dataset,
    show: &mut Show,
    guided: bool,
    batch: usize,
) -> Result<(), GridError> {
    let [h, w, c] = data.shape();
    let (numel, dim) = (h * w * c, net.config.label_dim);
    let mut config = SamplerConfig::default();
    if !guided || dim == 0 {
        config.guidance = 1.0;
    }
    let rows = ROWS.min(data.len());
    let chosen: Vec<usize> = (0..rows).map(|row| row * data.len() / rows).collect();
    let mut samples = Vec::with_capacity(rows * SAMPLES * numel);
    let jobs: Vec<(usize, u64)> = chosen.iter().flat_map(|&i| (0..SAMPLES as u64).map(move |seed| (i, seed))).collect();
    for jobs in jobs.chunks(batch.max(1)) {
        let mut labels = vec![0.0; jobs.len() * dim];
        for (label, &(i, _)) in labels.chunks_mut(dim.max(1)).zip(jobs) {
            data.condition(i, label);
        }
        let seeds: Vec<u64> = jobs.iter().map(|&(_, seed)| seed).collect();
        let mut sampler = Sampler { backend, net, gnet: None };
        let batch = Batch { seeds: &seeds, size: [h, w], labels: &labels, ..Batch::default() };
        samples.extend(sampler.run(&batch, &config, None)?);
    }
    let mut pictures = Vec::with_capacity(rows * (1 + SAMPLES));
    for (&i, samples) in chosen.iter().zip(samples.chunks(SAMPLES * numel)) {
        let mut image = vec![0.0; numel];
        data.image(i, Stream::new(0, Purpose::Latent, i as u64), &mut image)?;
        for image in std::iter::once(&image[..]).chain(samples.chunks(numel)) {
            pictures.push(show([h, w], image)?);
        }
    }
    let ids: Vec<i64> = chosen.iter().map(|&i| data.id(i)).collect();
    let made_with = json!({"rows": ids, "seeds": [0, SAMPLES - 1], "sampler": config}).to_string();
    Ok(Picture::grid(&pictures, 1 + SAMPLES).save(path, &[("edm2k", &made_with)])?)
}
