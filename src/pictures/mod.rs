//! Pictures of 8-bit sRGB: read from image files and written to them, and converted to and from the numbers that a
//! network sees.
//!
//! ```
//! use edm2k::pictures::Picture;
//!
//! // Black and white in model space, side by side.
//! let cells = [-1.0, 1.0].map(|x| Picture::from_model(1, 1, &[x; 3]));
//! let png = Picture::grid(&cells, 2).png(&[("Comment", "two pixels")])?;
//! assert!(png.starts_with(b"\x89PNG"));
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod bicubic;
mod colour;
pub mod decode;
pub mod fit;
mod jpeg;
pub mod png;

use std::fmt;
use std::io;

/// Why a file is no picture.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum PictureError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is {0}")]
    Kind(&'static str),
    #[error("{width}x{height} is more than {} pixels", decode::MAX_PIXELS)]
    TooLarge { width: u32, height: u32 },
    #[error("{}", plain(&.0.to_string()))]
    Damaged(#[from] image::ImageError),
    #[error("a JPEG that is not whole: {0}")]
    NotWhole(String),
    #[error("cannot be resized: {0}")]
    Resize(#[from] resize::Error),
}

/// A decoder's message in one line, without the names of Rust's types.
fn plain(message: &str) -> String {
    let mut text = message.replace("\\n", " ").split_whitespace().collect::<Vec<_>>().join(" ");
    // A chunk of a PNG file.
    while let Some((before, (chunk, after))) =
        text.split_once("ChunkType { type: ").and_then(|(before, rest)| Some((before, rest.split_once(" }")?)))
    {
        text = format!("{before}{}{after}", chunk.split(',').next().unwrap_or_default());
    }
    text
}

/// Pixels between the cells of a grid and around it.
const GUTTER: usize = 2;
/// The grey of the gutters, which differs from both black and white pictures.
const GUTTER_GREY: u8 = 0xc0;

/// A pixel's value in model space, -1 to 1: EDM2's `StandardRGBEncoder`.
pub fn to_model(x: u8) -> f32 {
    f32::from(x) / 127.5 - 1.0
}

/// The size of a picture in pixels; shown as `WIDTHxHEIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// From left to right.
    pub width: u32,
    /// From top to bottom.
    pub height: u32,
}

impl Size {
    /// How many pixels that is.
    pub fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// An 8-bit sRGB picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>, // [H, W, 3]
}

impl Picture {
    /// A picture of these pixels, `[H, W, 3]`.
    ///
    /// # Panics
    /// If `rgb` is not H * W * 3 long.
    pub fn new(height: usize, width: usize, rgb: Vec<u8>) -> Self {
        assert_eq!(rgb.len(), height * width * 3, "length of a {width}x{height} picture");
        Self { width, height, rgb }
    }

    /// The picture of an image in model space, `[H, W, 3]`: 127.5 x + 128 cut to 0..255 and
    /// truncated, as EDM2's `StandardRGBEncoder` decodes; the exact inverse of
    /// [`to_model`].
    ///
    /// # Panics
    /// If `image` is not H * W * 3 long.
    pub fn from_model(height: usize, width: usize, image: &[f32]) -> Self {
        // The cast truncates, saturates, and turns NaN into 0.
        Self::new(height, width, image.iter().map(|x| (x * 127.5 + 128.0) as u8).collect())
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Width and height.
    pub fn size(&self) -> Size {
        // As files have them; sides of grids are far below that, too.
        Size { width: self.width as u32, height: self.height as u32 }
    }

    /// Pixels, `[H, W, 3]`.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Pictures side by side, `columns` to a row, with thin gutters. Cells are as large as
    /// the largest picture; cells left over stay grey.
    ///
    /// # Panics
    /// If `columns` is 0.
    pub fn grid(pictures: &[Picture], columns: usize) -> Self {
        let cell_width = pictures.iter().map(|picture| picture.width).max().unwrap_or(0);
        let cell_height = pictures.iter().map(|picture| picture.height).max().unwrap_or(0);
        let rows = pictures.len().div_ceil(columns);
        let columns = columns.min(pictures.len());
        let width = GUTTER + columns * (cell_width + GUTTER);
        let height = GUTTER + rows * (cell_height + GUTTER);
        let mut rgb = vec![GUTTER_GREY; width * height * 3];
        for (number, picture) in pictures.iter().enumerate() {
            let top = GUTTER + number / columns * (cell_height + GUTTER);
            let left = GUTTER + number % columns * (cell_width + GUTTER);
            for (y, row) in picture.rgb.chunks_exact((picture.width * 3).max(1)).enumerate() {
                let at = ((top + y) * width + left) * 3;
                rgb[at..at + row.len()].copy_from_slice(row);
            }
        }
        Self { width, height, rgb }
    }
}
