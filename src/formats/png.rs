//! Pictures: from model space to 8-bit RGB, grids of them, and PNG files that carry the
//! parameters they were made with as text chunks.
//!
//! Text is stored as iTXt (UTF-8, so any prompt survives) before the pixels; `exiftool`,
//! ImageMagick's `identify -verbose` and Python's PIL show it.

use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use super::{input, write_atomically};

/// Pixels between the cells of a grid and around it.
const GUTTER: usize = 2;
/// Their grey: apart from both black and white pictures.
const GUTTER_GREY: u8 = 0xc0;

/// What can go wrong with a PNG file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PngError {
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    #[error("{}: not a readable PNG: {what}", path.display())]
    Format { path: PathBuf, what: String },
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
    /// [`Dataset::image`](crate::data::dataset::Dataset::image).
    ///
    /// # Panics
    /// If `image` is not H * W * 3 long.
    pub fn from_model(height: usize, width: usize, image: &[f32]) -> Self {
        // The cast truncates, saturates, and makes 0 of a NaN.
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

    /// Writes the picture as a PNG file, atomically, with text chunks of (keyword, text).
    /// A keyword has 1 to 79 Latin-1 characters.
    ///
    /// # Errors
    /// [`PngError::Io`]; then `path` keeps its old content. An empty picture, or a keyword
    /// that PNG does not allow, is one too.
    pub fn save(&self, path: &Path, text: &[(&str, &str)]) -> Result<(), PngError> {
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "too large for a PNG");
        write_atomically(path, |out| {
            let width = u32::try_from(self.width).map_err(too_large)?;
            let height = u32::try_from(self.height).map_err(too_large)?;
            let mut encoder = png::Encoder::new(out, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            for (keyword, text) in text {
                encoder.add_itxt_chunk((*keyword).into(), (*text).into())?;
            }
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&self.rgb)?;
            Ok(writer.finish()?)
        })
        .map_err(|cause| PngError::Io { path: path.into(), cause })
    }
}

/// The text chunks (keyword, text) that stand before a PNG file's pixels, where
/// [`Picture::save`] puts them; iTXt first, then tEXt.
///
/// # Errors
/// [`PngError::Io`] if the file cannot be opened, [`PngError::Format`] if it is no PNG.
pub fn read_text(path: &Path) -> Result<Vec<(String, String)>, PngError> {
    let file = input::open(path).map_err(|cause| PngError::Io { path: path.into(), cause })?;
    let format = |error: png::DecodingError| PngError::Format { path: path.into(), what: error.to_string() };
    let reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(format)?;
    let info = reader.info();
    let mut found = Vec::new();
    for chunk in &info.utf8_text {
        found.push((chunk.keyword.clone(), chunk.get_text().map_err(format)?));
    }
    for chunk in &info.uncompressed_latin1_text {
        found.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    Ok(found)
}
