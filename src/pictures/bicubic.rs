//! Bicubic resizing, to the same bytes as Pillow's, since feature networks were trained with that.
//!
//! The kernel is Keys' with a = -0.5. It is widened by the factor of reduction, so that every pixel of the source
//! counts. Weights are in fixed point with 22 bits. Rows come first, then columns, each rounded to 8 bits (newer
//! versions of Pillow begin with columns where that is less work, such as from 512 x 1100 to 299 x 299, with other bytes). Cost:
//! about 4 multiply-adds for each value, times the factor where it is a reduction, for each direction.

use rayon::prelude::*;

use super::Picture;

/// Bits of a weight behind the point: of 32, 8 are for a pixel and 2 for the sign of a sum and for sums above the
/// largest pixel.
const BITS: u32 = 32 - 8 - 2;

/// Resizes a picture, whatever that does to its shape.
///
/// # Panics
/// If a side is 0.
pub fn resize(picture: &Picture, size: [usize; 2]) -> Picture {
    within(picture, [picture.height(), picture.width()], 0, size)
}

/// Resizes a picture that stands in the middle of a canvas of [height, width], which is of one grey. The canvas itself
/// is never made: for a long strip it would be as high as the strip is wide.
///
/// # Panics
/// If a side is 0, or the canvas is smaller than the picture.
pub fn within(picture: &Picture, canvas: [usize; 2], grey: u8, [height, width]: [usize; 2]) -> Picture {
    let [top, left] = [(canvas[0] - picture.height()) / 2, (canvas[1] - picture.width()) / 2];
    let across = Taps::new(canvas[1], width, left, picture.width());
    let down = Taps::new(canvas[0], height, top, picture.height());
    let row = |row: &[u8]| -> Vec<u8> {
        let pixel = |taps: &Tap| -> [u8; 3] { std::array::from_fn(|c| taps.of(grey, |x| row[3 * x + c])) };
        across.0.iter().flat_map(pixel).collect()
    };
    let rgb: Vec<u8> = picture.rgb().par_chunks_exact(3 * picture.width()).flat_map_iter(row).collect();
    let rows: Vec<&[u8]> = rgb.chunks_exact(3 * width).collect();
    let row = |taps: &Tap| -> Vec<u8> { (0..3 * width).map(|i| taps.of(grey, |y| rows[y][i])).collect() };
    Picture::new(height, width, down.0.par_iter().flat_map_iter(row).collect())
}

/// What one place of the result is made of.
struct Tap {
    /// First place of the picture that counts.
    first: usize,
    /// Weights of the places from there on.
    weights: Vec<i32>,
    /// Weight of all that is around the picture.
    around: i32,
}

impl Tap {
    fn of(&self, grey: u8, value: impl Fn(usize) -> u8) -> u8 {
        let start = (1 << (BITS - 1)) + self.around * i32::from(grey);
        let weights = self.weights.iter().enumerate();
        let sum = weights.fold(start, |sum, (k, weight)| sum + weight * i32::from(value(self.first + k)));
        (sum >> BITS).clamp(0, 255) as u8
    }
}

/// The taps of a row or a column.
struct Taps(Vec<Tap>);

impl Taps {
    /// The taps for a canvas of `from` places, of which `length` are the picture's, from `begin` on.
    fn new(from: usize, to: usize, begin: usize, length: usize) -> Self {
        if from == to {
            let own = |place: usize| match place.checked_sub(begin) {
                Some(first) if first < length => Tap { first, weights: vec![1 << BITS], around: 0 },
                _ => Tap { first: 0, weights: vec![], around: 1 << BITS },
            };
            return Self((0..to).map(own).collect());
        }
        let cut = |(first, weights): (usize, Vec<i32>)| {
            let end = (first + weights.len()).clamp(begin, begin + length);
            let start = first.clamp(begin, end);
            let own = if start < end { &weights[start - first..end - first] } else { &[] };
            let around = weights.iter().sum::<i32>() - own.iter().sum::<i32>();
            Tap { first: start - begin, weights: own.to_vec(), around }
        };
        Self(taps(from, to).into_iter().map(cut).collect())
    }
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
            // The casts truncate, and turn negative numbers into 0.
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
