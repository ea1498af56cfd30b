//! An estimate of how much memory training needs: for every parameter, and for what the backward pass needs of the
//! forward pass. Temporary buffers of single operations come on top.

use serde::Serialize;

use crate::model::Config;
use crate::params::ParamTable;

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// Weights, effective weights, gradients, Adam's two moments, moving averages; f32.
    pub parameters: u64,
    /// Kept activations of a micro-batch; f32.
    pub activations: u64,
}

/// Is told why there are to be fewer images at a time, and how many.
pub type Halved<'a> = dyn FnMut(&dyn std::fmt::Display, usize) + 'a;

/// Does `work` with `batch` images at a time. Each time that the device has no memory for so many, it calls `halved`
/// and tries again with half of them. Afterwards `batch` is the number that worked.
///
/// # Errors
/// Those of `work`, also when there is no memory even for one image.
pub fn halving<T, E: std::fmt::Display>(
    batch: &mut usize,
    is_out_of_memory: impl Fn(&E) -> bool,
    mut work: impl FnMut(usize) -> Result<T, E>,
    mut halved: impl FnMut(&E, usize),
) -> Result<T, E> {
    loop {
        match work(*batch) {
            Err(why) if *batch > 1 && is_out_of_memory(&why) => {
                *batch = batch.div_ceil(2);
                halved(&why, *batch);
            }
            done => return done,
        }
    }
}

/// Estimate for micro-batches of `batch_gpu` images of `height` x `width`.
pub fn estimate(
    config: &Config,
    table: &ParamTable,
    height: usize,
    width: usize,
    batch_gpu: u64,
    averages: usize,
) -> MemoryEstimate {
    let values: usize = table.iter().map(|(_, spec)| spec.numel()).sum();
    let parameters = 4 * values as u64 * (5 + averages as u64);
    let activations = 4u64.saturating_mul(batch_gpu).saturating_mul(kept_values(config, height, width));
    MemoryEstimate { parameters, activations }
}

/// Values that are kept for the backward pass of one image. A block keeps its residual branch before and after mp_silu
/// and its result, in the encoder also the normalised input; attention adds q, k, v and two more.
fn kept_values(config: &Config, height: usize, width: usize) -> u64 {
    let levels = config.level_channels();
    let area = height as u128 * width as u128;
    let mut total = area * (2 * config.img_channels + levels[0]) as u128;
    for (level, &c) in levels.iter().enumerate() {
        let pixels = area >> (2 * level);
        let attends = config.attn_resolutions.contains(&(config.img_resolution >> level));
        let attention = if attends { 5 } else { 0 };
        total += pixels * (c * config.num_blocks * (4 + attention)) as u128;
        total += pixels * (c * (config.num_blocks + 1) * (3 + attention)) as u128;
        let deeper = levels.get(level + 1).map_or(2 * 3 * c + 5 * c, |&below| 4 * below);
        let above = if level > 0 { 4 * levels[level - 1] + c } else { 0 };
        total += pixels * (deeper + above) as u128;
    }
    u64::try_from(total).unwrap_or(u64::MAX)
}

/// Default size of a micro-batch: a power of two whose activations fit into 1 GiB in f32, or on a GPU into 4 GiB in 16
/// bits. It depends on nothing else of the machine, so that the same command computes the same bits on another one.
pub fn default_batch_gpu(config: &Config, height: usize, width: usize, batch: u64, on_gpu: bool) -> u64 {
    let values = if on_gpu { (4 << 30) / 2 } else { (1 << 30) / 4 };
    let fits = values / kept_values(config, height, width).max(1);
    if batch <= fits { batch } else { 1 << fits.max(1).ilog2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_with_as_many_images_as_there_is_memory_for() {
        let run = |mut batch: usize, room: usize| {
            let (mut tried, mut told) = (vec![], vec![]);
            let work = |n: usize| {
                tried.push(n);
                if n <= room { Ok(n) } else { Err("memory") }
            };
            let done = halving(&mut batch, |why| *why == "memory", work, |_, n| told.push(n));
            (done, batch, tried, told)
        };
        assert_eq!(run(13, 3), (Ok(2), 2, vec![13, 7, 4, 2], vec![7, 4, 2]));
        assert_eq!(run(8, 8), (Ok(8), 8, vec![8], vec![]));
        assert_eq!(run(3, 0), (Err("memory"), 1, vec![3, 2, 1], vec![2, 1]));
        let other = halving(&mut 4, |why: &&str| *why == "memory", |_| Err::<(), _>("disk"), |_, _| panic!("halved"));
        assert_eq!(other, Err("disk"));
    }
}
