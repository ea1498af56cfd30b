//! Random numbers for tests.

use edm2k::rng::{Purpose, Stream};

/// `n` normally distributed numbers times `size`, others for each seed.
pub fn normals(n: usize, seed: u64, size: f32) -> Vec<f32> {
    let mut values = vec![0.0; n];
    Stream::new(seed, Purpose::Init, 0).normals(&mut values);
    values.iter_mut().for_each(|x| *x *= size);
    values
}
