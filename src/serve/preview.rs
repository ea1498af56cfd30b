//! What pictures look like before they are finished.
//!
//! Latents without a TAESD are shown by an affine map to colours, `rgb = A z + b` for each of their pixels. It is
//! fitted by least squares to the decoder that is at hand, so no table of numbers is needed. The decoder is shown one
//! latent of flat tiles. Each tile has a random colour of latent space (normal, with the standard deviation of EDM2's
//! latents). The map has to predict the mean colour that the decoder makes of each tile's middle. All tiles are in one
//! picture because the decoder normalises over all of it: a picture of one colour would be unlike any that it knows.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nalgebra::{DMatrix, SMatrix};

use crate::codec::{FINAL_STD, LATENTS};
use crate::pictures::Picture;
use crate::rng::{Purpose, Stream};

/// Tiles along each side of the latent that the decoder is shown.
const TILES: usize = 8;
/// Latent pixels along each side of a tile.
const TILE: usize = 4;
/// The most pixels of a preview that is sent as PNG; larger ones are sent as JPEG.
const MAX_PNG: usize = 1 << 16;
/// The JPEG's quality.
const QUALITY: u8 = 80;

/// The map from latents to colours.
#[derive(Clone, Debug)]
pub struct ColourMap {
    /// Rows: the latent's channels and 1; columns: red, green, blue from 0 to 255.
    map: SMatrix<f64, { LATENTS + 1 }, 3>,
}

impl ColourMap {
    /// The latent that a decoder is to be shown: [height, width] and values.
    pub fn tiles() -> ([usize; 2], Vec<f32>) {
        let mut colours = vec![0.0; TILES * TILES * LATENTS];
        Stream { seed: 0, purpose: Purpose::SampleNoise, step: 0, image: 0 }.normals(&mut colours);
        let side = TILES * TILE;
        let tile = |pixel: usize| pixel / side / TILE * TILES + pixel % side / TILE;
        let values = (0..side * side).flat_map(|pixel| &colours[tile(pixel) * LATENTS..][..LATENTS]);
        ([side, side], values.map(|x| FINAL_STD * x).collect())
    }

    /// The map that best fits what a decoder makes of [`ColourMap::tiles`]; none if the picture has another size.
    pub fn fit(picture: &Picture) -> Option<Self> {
        let ([side, _], latents) = Self::tiles();
        let factor = picture.width() / side;
        if factor == 0 || (picture.width(), picture.height()) != (side * factor, side * factor) {
            return None;
        }
        let origin = |tile: usize| [tile / TILES * TILE, tile % TILES * TILE];
        let inputs = DMatrix::from_fn(TILES * TILES, LATENTS + 1, |tile, channel| {
            let [y, x] = origin(tile);
            if channel == LATENTS { 1.0 } else { f64::from(latents[(y * side + x) * LATENTS + channel]) }
        });
        // A quarter is left out at each edge, since neighbouring tiles colour it.
        let (edge, inner) = (TILE * factor / 4, (TILE * factor / 2).max(1));
        let colours = DMatrix::from_fn(TILES * TILES, 3, |tile, channel| {
            let [y, x] = origin(tile).map(|at| at * factor + edge);
            let pixels = (0..inner * inner).map(|i| (y + i / inner) * picture.width() + x + i % inner);
            let sum: f64 = pixels.map(|pixel| f64::from(picture.rgb()[3 * pixel + channel])).sum();
            sum / (inner * inner) as f64
        });
        let map = inputs.svd(true, true).solve(&colours, 1e-9).ok()?;
        Some(Self { map: SMatrix::from_fn(|row, column| map[(row, column)]) })
    }

    /// The picture of a latent [height, width, 4], a pixel for each latent pixel.
    pub fn picture(&self, [height, width]: [usize; 2], latent: &[f32]) -> Picture {
        let colour = |z: &[f32]| -> [u8; 3] {
            std::array::from_fn(|c| {
                let sum: f64 = z.iter().enumerate().map(|(i, &z)| f64::from(z) * self.map[(i, c)]).sum();
                (sum + self.map[(LATENTS, c)]).round() as u8
            })
        };
        Picture::new(height, width, latent.chunks_exact(LATENTS).flat_map(colour).collect())
    }
}

/// A picture as a `data:` URL; none if it cannot be one.
pub fn data_url(picture: &Picture) -> Option<String> {
    let (kind, bytes) = match picture.width() * picture.height() {
        ..=MAX_PNG => ("png", picture.png(&[]).ok()?),
        _ => ("jpeg", picture.jpeg(QUALITY).ok()?),
    };
    Some(format!("data:image/{kind};base64,{}", BASE64_STANDARD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A decoder that is affine, enlarges four times, and blurs across a pixel.
    fn decode([height, width]: [usize; 2], latent: &[f32]) -> Picture {
        let colour = |y: usize, x: usize| -> [f64; 3] {
            let z = &latent[(y.min(height - 1) * width + x.min(width - 1)) * LATENTS..][..LATENTS];
            let z: Vec<f64> = z.iter().map(|&z| f64::from(z)).collect();
            [120.0 + 40.0 * z[0] - 10.0 * z[3], 100.0 + 30.0 * z[1], 140.0 + 20.0 * z[2] + 10.0 * z[0]]
        };
        let pixels = (0..16 * height * width).map(|i| (i / (4 * width), i % (4 * width)));
        let rgb = pixels.flat_map(|(y, x)| {
            let (near, far) = (colour(y / 4, x / 4), colour((y + 1) / 4, (x + 1) / 4));
            [0, 1, 2].map(|c| (0.5 * near[c] + 0.5 * far[c]) as u8)
        });
        Picture::new(4 * height, 4 * width, rgb.collect())
    }

    #[test]
    fn the_map_finds_what_a_decoder_does_to_colours() {
        let (size, tiles) = ColourMap::tiles();
        let map = ColourMap::fit(&decode(size, &tiles)).unwrap();
        let latent = [0.5, -1.0, 0.25, 0.75];
        let shown = map.picture([1, 1], &latent);
        // Decoded colours are cut to whole numbers: half a level in the mean, and one of the rounding.
        for (got, want) in shown.rgb().iter().zip([132.5, 70.0, 150.0]) {
            assert!((f64::from(*got) - want).abs() < 2.0, "{:?}", shown.rgb());
        }
        assert!(ColourMap::fit(&Picture::new(8, 8, vec![0; 192])).is_none());
    }
}
