//! Bicubic resizing to the byte as Pillow does it, which networks of features were trained with.
//!
//! Keys' kernel with a = -0.5, widened by the factor of reduction, so that every pixel of the source counts; weights
//! in fixed point with 22 bits; first along rows, then along columns (newer versions of Pillow take pictures that are
//! twice as high as wide the other way round), rounded to 8 bits after each. Cost: about 4
//! multiply-adds for each value, times the factor where it is a reduction, for each direction.

use rayon::prelude::*;

use crate::formats::png::Picture;

/// Bits behind the point of a weight: 8 are a pixel's, and sums have a sign and may exceed the largest pixel.
const BITS: u32 = 32 - 8 - 2;

/// Resizes a picture, whatever that does to its shape.
///
/// # Panics
/// If a side is 0.
pub fn resize(picture: &Picture, [height, width]: [usize; 2]) -> Picture {
    let mut rgb = picture.rgb().to_vec();
    if width != picture.width() {
        let taps = taps(picture.width(), width);
        let row = |row: &[u8]| -> Vec<u8> {
            let pixel = |(first, weights): &(usize, Vec<i32>)| -> [u8; 3] {
                std::array::from_fn(|c| weighted(weights, |k| row[3 * (first + k) + c]))
            };
            taps.iter().flat_map(pixel).collect()
        };
        rgb = rgb.par_chunks_exact(3 * picture.width()).flat_map_iter(row).collect();
    }
    if height != picture.height() {
        let rows: Vec<&[u8]> = rgb.chunks_exact(3 * width).collect();
        let row = |(first, weights): &(usize, Vec<i32>)| -> Vec<u8> {
            (0..3 * width).map(|i| weighted(weights, |k| rows[first + k][i])).collect()
        };
        rgb = taps(picture.height(), height).par_iter().flat_map_iter(row).collect();
    }
    Picture::new(height, width, rgb)
}

fn weighted(weights: &[i32], value: impl Fn(usize) -> u8) -> u8 {
    let half = 1 << (BITS - 1);
    let sum = weights.iter().enumerate().fold(half, |sum: i32, (k, weight)| sum + weight * i32::from(value(k)));
    (sum >> BITS).clamp(0, 255) as u8
}

/// For each place of the result the first place of the source that counts, and the weights from there on.
fn taps(from: usize, to: usize) -> Vec<(usize, Vec<i32>)> {
    assert!(from > 0 && to > 0, "resizing {from} to {to}");
    let scale = from as f64 / to as f64;
    let wide = scale.max(1.0);
    let reach = 2.0 * wide;
    (0..to)
        .map(|place| {
            let centre = (place as f64 + 0.5) * scale;
            // The casts truncate, and make 0 of what is negative.
            let first = (centre - reach + 0.5) as usize;
            let end = ((centre + reach + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end).map(|x| keys((x as f64 - centre + 0.5) * (1.0 / wide))).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: f64| (weight / sum * f64::from(1 << BITS)).round() as i32;
            (first, weights.into_iter().map(fixed).collect())
        })
        .collect()
}

/// Keys' cubic kernel with a = -0.5.
fn keys(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}
