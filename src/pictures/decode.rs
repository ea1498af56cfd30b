//! From an image file's bytes to 8-bit sRGB pixels:
//!
//! 1. decode (no more than [`MAX_PIXELS`], so that an image bomb costs no memory), all of it (`jpeg::check`), turn as
//!    its EXIF says;
//! 2. convert to sRGB by its colour profile, or what a PNG says in its place, if that does anything;
//! 3. composite transparency on the background colour, in sRGB as every viewer does, before resizing: no fringe of
//!    hidden colours can appear.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader};
use moxcms::Layout;

use super::colour::{space, to_srgb};
use super::{Picture, PictureError, jpeg};
use crate::formats::input;

/// An image may have so many pixels: 64 Mi.
pub const MAX_PIXELS: u64 = 1 << 26;

/// Longest image file: no decoder should need more than the largest image.
pub const MAX_BYTES: u64 = 16 * MAX_PIXELS;

/// A decoded image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its pixels.
    pub picture: Picture,
    /// The colour space that it says and that could not be converted: its colours were taken for sRGB.
    pub unapplied: Option<String>,
}

/// The picture in a file, on a background if it is transparent.
///
/// # Errors
/// The file cannot be read, or is no image.
pub fn open(path: &Path, background: [u8; 3]) -> Result<Image, PictureError> {
    decode(&input::read(path, MAX_BYTES)?, background)
}

/// Width and height that an image file's head says, in pixels; nothing is decoded.
///
/// # Errors
/// It is of no known kind, or its head is damaged.
pub fn size(bytes: &[u8]) -> Result<[u32; 2], PictureError> {
    let (width, height) = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_dimensions()?;
    Ok([width, height])
}

/// Decodes an image file, on a background if it is transparent.
///
/// # Errors
/// What is wrong with it.
pub fn decode(bytes: &[u8], background: [u8; 3]) -> Result<Image, PictureError> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    if reader.format().is_none() {
        return Err(PictureError::Kind(input::kind(bytes).unwrap_or("no image of a known kind")));
    }
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(16 * MAX_PIXELS); // what the largest allowed image needs
    reader.limits(limits);
    let size = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut decoder = match reader.into_decoder() {
        Err(ImageError::Limits(why)) => {
            let (width, height) = size.into_dimensions().map_err(|_| ImageError::Limits(why))?;
            return Err(PictureError::TooLarge { width, height });
        }
        made => made?,
    };
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(PictureError::TooLarge { width, height });
    }
    // A damaged tag is no reason to lose the picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let profile = decoder.icc_profile().unwrap_or(None);
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    if bytes.starts_with(b"\xff\xd8") {
        jpeg::check(bytes).map_err(PictureError::NotWhole)?;
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    let grey = !image.color().has_color();
    let space = space(bytes, profile.as_deref());
    let (rgb, unapplied) = if image.color().has_alpha() {
        let over = |x: u8, behind: u8, alpha: u32| {
            ((u32::from(x) * alpha + u32::from(behind) * (255 - alpha) + 127) / 255) as u8
        };
        let mut rgba = image.into_rgba8();
        let unapplied = space.and_then(|space| to_srgb(&space, &mut rgba, Layout::Rgba, grey));
        let rgb = rgba.pixels().flat_map(|pixel| {
            let [r, g, b, alpha] = pixel.0;
            let alpha = u32::from(alpha);
            let [behind_r, behind_g, behind_b] = background;
            [over(r, behind_r, alpha), over(g, behind_g, alpha), over(b, behind_b, alpha)]
        });
        (rgb.collect(), unapplied)
    } else {
        let mut rgb = image.into_rgb8().into_raw();
        let unapplied = space.and_then(|space| to_srgb(&space, &mut rgb, Layout::Rgb, grey));
        (rgb, unapplied)
    };
    Ok(Image { picture: Picture::new(height, width, rgb), unapplied })
}
