//! The sample grid: what the network makes of a few conditions, one to a row, the image that the condition belongs to
//! first. Conditions and seeds are the same each time, so that one can leaf through the grids of a run. If images have
//! several sizes, grids show the most frequent one.

use std::path::Path;

use serde_json::json;

use crate::backend::NetworkBackend;
use crate::codec::CodecError;
use crate::collective::{Collective, CollectiveError, Part};
use crate::data::dataset::{Dataset, DatasetError};
use crate::model::{Config, Precond};
use crate::pictures::Picture;
use crate::pictures::png::PngError;
use crate::rng::{Purpose, Stream};
use crate::sample::{Batch, SampleError, Sampler, SamplerConfig};
use crate::train::memory::{Halved, halving};

/// Conditions of a grid, one to a row.
const ROWS: usize = 6;
/// Samples of each condition.
const SAMPLES: usize = 4;

/// At most one part in this many of a run's time goes to grids.
pub const SHARE: u64 = 100;

/// Makes a picture of an image [height, width, channels] in model space.
pub type Show<'a> = dyn FnMut([usize; 2], &[f32]) -> Result<Picture, CodecError> + 'a;

/// Why there is no grid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GridError {
    /// Sampling failed.
    #[error("{0}")]
    Sample(#[from] SampleError),
    /// An image of the dataset.
    #[error("{0}")]
    Data(#[from] DatasetError),
    /// Its latents have no picture.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// The picture could not be written.
    #[error("{0}")]
    Png(#[from] PngError),
    /// The ranks lost each other.
    #[error("{0}")]
    Ranks(#[from] CollectiveError),
    /// Another rank failed to sample its share.
    #[error("rank {rank} could not sample its share")]
    Elsewhere {
        /// Which one.
        rank: usize,
    },
}

impl GridError {
    /// Whether a later grid may be made all the same.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Sample(SampleError::Backend(why)) | Self::Codec(CodecError::Backend(why)) => why.is_out_of_memory(),
            Self::Sample(SampleError::NotFinite { .. }) | Self::Codec(CodecError::Overflow) => true,
            Self::Elsewhere { .. } => true,
            _ => false,
        }
    }
}

/// How many training images take as long as a grid, counted in multiply-adds. A training image costs three forward
/// passes. `guided` is as in [`GridInputs`]; `picture` are the multiply-adds of making a picture of an image of this size.
pub fn cost(config: &Config, [height, width]: [usize; 2], guided: bool, picture: u64) -> u64 {
    // A config that describes no network draws nothing.
    let Ok((net, table)) = Precond::new(config) else { return 0 };
    let pass = u128::from(net.macs(&table, height, width));
    let sampler = sampler(guided, config);
    let passes = sampler.steps * if sampler.guidance == 1.0 { 1 } else { 2 };
    let samples = (ROWS * SAMPLES * passes) as u128 * pass;
    let pictures = (ROWS * (1 + SAMPLES)) as u128 * u128::from(picture);
    u64::try_from((samples + pictures).div_ceil(3 * pass.max(1))).unwrap_or(u64::MAX)
}

/// The usual sampler, with or without guidance.
fn sampler(guided: bool, config: &Config) -> SamplerConfig {
    let usual = SamplerConfig::default();
    let guidance = if guided && config.label_dim > 0 { usual.guidance } else { 1.0 };
    SamplerConfig { guidance, ..usual }
}

/// What a grid is sampled with.
pub struct GridInputs<'a, B> {
    /// Its effective weights.
    pub backend: &'a mut B,
    /// The network.
    pub net: &'a Precond,
    /// Where the conditions come from.
    pub data: &'a Dataset,
    /// Whether it was trained without conditions too, which guidance needs.
    pub guided: bool,
    /// Most images at a time; halved where the device has no memory for so many.
    pub batch: &'a mut usize,
    /// Is told of that.
    pub halved: &'a mut Halved<'a>,
    /// Each samples its share.
    pub ranks: &'a mut dyn Collective,
}

/// Samples and writes the grid as `show` has its images; rank 0 writes. Returns whether this rank wrote the file.
pub fn write<B: NetworkBackend>(path: &Path, with: GridInputs<B>, show: &mut Show) -> Result<bool, GridError> {
    let GridInputs { backend, net, data, guided, batch, halved, ranks } = with;
    let [h, w, c] = data.shape();
    let (numel, dim) = (h * w * c, net.config.label_dim);
    let config = sampler(guided, &net.config);
    let all: Vec<usize> = (0..data.len()).filter(|&i| data.shape_of(i) == data.shape()).collect();
    let rows = ROWS.min(all.len());
    let chosen: Vec<usize> = (0..rows).map(|row| all[row * all.len() / rows]).collect();
    let jobs: Vec<(usize, u64)> = chosen.iter().flat_map(|&i| (0..SAMPLES as u64).map(move |seed| (i, seed))).collect();
    let own = &jobs[ranks.part().share(jobs.len())];
    let sample = |batch: usize| -> Result<Vec<f32>, SampleError> {
        let mut samples = Vec::new();
        for jobs in own.chunks(batch.max(1)) {
            let mut labels = vec![0.0; jobs.len() * dim];
            for (label, &(i, _)) in labels.chunks_mut(dim.max(1)).zip(jobs) {
                data.condition(i, label);
            }
            let seeds: Vec<u64> = jobs.iter().map(|&(_, seed)| seed).collect();
            let mut sampler = Sampler { backend, net, gnet: None };
            let batch = Batch { seeds: &seeds, size: [h, w], labels: &labels, ..Batch::default() };
            samples.extend(sampler.run(&batch, &config, None)?);
        }
        Ok(samples)
    };
    let all = gathered(sample, (batch, halved), ranks)?;
    let lengths = Part::all(ranks.size()).map(|part| part.share(jobs.len()).len() * numel * size_of::<f32>());
    if let Some(rank) = all.iter().zip(lengths).position(|(samples, expected)| samples.len() != expected) {
        return Err(GridError::Elsewhere { rank });
    }
    if ranks.rank() > 0 {
        return Ok(false);
    }
    let samples: Vec<f32> = bytemuck::pod_collect_to_vec(&all.concat());
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
    Picture::grid(&pictures, 1 + SAMPLES).save(path, &[("edm2k", &made_with)])?;
    Ok(true)
}

/// What `sample` makes of this rank's share, and the others of theirs, in bytes. A rank that has no memory for so many
/// images at a time takes fewer before it meets the others: they meet once.
fn gathered(
    sample: impl FnMut(usize) -> Result<Vec<f32>, SampleError>,
    (batch, halved): (&mut usize, &mut Halved),
    ranks: &mut dyn Collective,
) -> Result<Vec<Vec<u8>>, GridError> {
    let out_of_memory = |why: &SampleError| matches!(why, SampleError::Backend(why) if why.is_out_of_memory());
    let own = halving(batch, out_of_memory, sample, |why, n| halved(why, n));
    // Whoever fails comes to the meeting all the same, and the others do not wait for nothing.
    let all = ranks.gather(bytemuck::cast_slice(own.as_deref().unwrap_or_default()))?;
    own?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, DeviceError, Values};

    /// A rank that counts its meetings.
    struct Counting(usize);

    impl Collective for Counting {
        fn rank(&self) -> usize {
            0
        }
        fn size(&self) -> usize {
            1
        }
        fn all_reduce(&mut self, _: Values) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn broadcast(&mut self, _: Values) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
            self.0 += 1;
            Ok(vec![own.to_vec()])
        }
    }

    #[test]
    fn a_rank_without_memory_takes_fewer_images_before_it_meets_the_others() {
        let none = || DeviceError::OutOfMemory {
            device: "a card".into(),
            asked: Some(1),
            purpose: "a test",
            free: 0,
            total: 0,
            advice: "none",
        };
        for (room, left, told) in [(8, 8, 0), (3, 2, 2), (0, 1, 3)] {
            let (mut ranks, mut batch, mut times) = (Counting(0), 8, 0);
            let sample = |n: usize| if n <= room { Ok(vec![n as f32]) } else { Err(BackendError::from(none()).into()) };
            let found = gathered(sample, (&mut batch, &mut |_, _| times += 1), &mut ranks);
            assert_eq!((ranks.0, batch, times), (1, left, told), "room for {room}");
            let failed = matches!(&found, Err(GridError::Sample(SampleError::Backend(why))) if why.is_out_of_memory());
            assert_eq!(failed, room == 0);
            assert!(failed || found.unwrap() == [(left as f32).to_le_bytes()]);
        }
    }
}
