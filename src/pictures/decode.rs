//! From an image file's bytes to 8-bit sRGB pixels:
//!
//! 1. decode (no more than [`MAX_PIXELS`], so that an image bomb costs no memory), all of it (`jpeg::check`), turn as
//!    its EXIF says;
//! 2. convert to sRGB by its colour profile, or what a PNG says in its place, if that does anything; then round 16 bits
//!    to 8;
//! 3. composite transparency on the background colour, in sRGB as every viewer does, before resizing: no fringe of
//!    hidden colours can appear.
//!
//! ```
//! use edm2k::pictures::decode::{decode, size};
//! use edm2k::pictures::{Picture, Size};
//!
//! let png = Picture::new(1, 2, vec![10, 20, 30, 40, 50, 60]).png(&[])?;
//! assert_eq!(size(&png)?, Size { width: 2, height: 1 });
//! let image = decode(&png, [255; 3])?; // white behind what is transparent
//! assert_eq!(image.picture.rgb(), [10, 20, 30, 40, 50, 60]);
//! assert!(decode(b"GIF8", [255; 3]).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io::Cursor;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader};
use moxcms::Layout;

use super::colour::{space, to_srgb};
use super::{Picture, PictureError, Size, jpeg};
use crate::formats::input;

/// The most pixels that an image may have: 64 Mi.
pub const MAX_PIXELS: u64 = 1 << 26;

/// The most bytes that a decoder may take for what is not pixels (a colour profile, texts) and for a row of a PNG.
const METADATA: u64 = 64 << 20;

/// Longest image file: no decoder should need more than the largest image.
pub const MAX_BYTES: u64 = 16 * MAX_PIXELS;

/// What stands behind transparent pixels where nobody says another colour.
pub const WHITE: [u8; 3] = [255; 3];

/// A decoded image.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Its pixels.
    pub picture: Picture,
    /// The name of its colour space, if that could not be converted; then its colours were taken for sRGB.
    pub unapplied: Option<String>,
}

impl Decoded {
    /// A warning if its colours were taken for sRGB, in which the picture is called `shown`.
    pub fn warning(&self, shown: &str) -> Option<String> {
        self.unapplied.as_deref().map(|profile| unapplied(shown, profile))
    }
}

/// Says that a colour profile could not be converted.
pub fn unapplied(shown: &str, profile: &str) -> String {
    format!("{shown}: its colour profile ({profile}) cannot be applied; taken for sRGB")
}

/// A share of the [`MAX_PIXELS`] pixels that all threads together may decode at a time. So the memory for that does not
/// grow with the number of cores.
struct Share(u64);

static TAKEN: Mutex<u64> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Share {
    /// Waits until so many pixels are left, and takes them.
    fn take(pixels: u64) -> Self {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = GIVEN_BACK.wait_while(taken, |taken| *taken + pixels > MAX_PIXELS);
        *waited.unwrap_or_else(PoisonError::into_inner) += pixels;
        Self(pixels)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        GIVEN_BACK.notify_all();
    }
}

/// The picture in a file, on a background if it is transparent.
///
/// # Errors
/// The file cannot be read, or is no image.
pub fn open(path: &Path, background: [u8; 3]) -> Result<Decoded, PictureError> {
    decode(&input::read(path, MAX_BYTES)?, background)
}

/// The size that an image file's head says, turned as its EXIF says; nothing is decoded.
///
/// # Errors
/// The file is of no known kind, or its head is damaged.
pub fn size(bytes: &[u8]) -> Result<Size, PictureError> {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let mut decoder = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_decoder()?;
    let (width, height) = decoder.dimensions();
    Ok(match decoder.orientation() {
        Ok(Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH) => Size { width: height, height: width },
        _ => Size { width, height },
    })
}

/// Decodes an image file, on a background if it is transparent.
///
/// # Errors
/// What is wrong with it.
pub fn decode(bytes: &[u8], background: [u8; 3]) -> Result<Decoded, PictureError> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    if reader.format().is_none() {
        return Err(PictureError::Kind(input::kind(bytes).unwrap_or("no image of a known kind")));
    }
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(METADATA);
    reader.limits(limits.clone());
    let size = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut decoder = match reader.into_decoder() {
        Err(ImageError::Limits(why)) => {
            return Err(match size.into_dimensions() {
                Ok((width, height)) if u64::from(width) * u64::from(height) > MAX_PIXELS => {
                    PictureError::TooLarge { width, height }
                }
                _ => ImageError::Limits(why).into(),
            });
        }
        made => made?,
    };
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(PictureError::TooLarge { width, height });
    }
    let _share = Share::take(pixels);
    limits.max_alloc = Some(METADATA + 16 * pixels);
    decoder.set_limits(limits)?;
    // A damaged tag is no reason to lose the picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let profile = decoder.icc_profile().unwrap_or(None);
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    if bytes.starts_with(b"\xff\xd8") {
        jpeg::check(bytes).map_err(PictureError::NotWhole)?;
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    let color = image.color();
    let grey = !color.has_color();
    let mut space = space(bytes, profile.as_deref());
    let mut unapplied = None;
    let of_16_bits = color.bytes_per_pixel() / color.channel_count() == 2;
    if let Some(space) = space.take_if(|space| of_16_bits && space.is_ok()) {
        // Rounded to 8 bits before, dark levels of linear light would be few.
        let mut rgba = image.into_rgba16();
        unapplied = to_srgb(&space, &mut rgba, Layout::Rgba, grey);
        image = rgba.into();
    }
    let (rgb, converted) = if color.has_alpha() {
        let over = |x: u8, behind: u8, alpha: u32| {
            ((u32::from(x) * alpha + u32::from(behind) * (255 - alpha) + 127) / 255) as u8
        };
        let mut rgba = image.into_rgba8();
        let converted = space.and_then(|space| to_srgb(&space, &mut rgba, Layout::Rgba, grey));
        let rgb = rgba.pixels().flat_map(|pixel| {
            let [r, g, b, alpha] = pixel.0;
            let alpha = u32::from(alpha);
            let [behind_r, behind_g, behind_b] = background;
            [over(r, behind_r, alpha), over(g, behind_g, alpha), over(b, behind_b, alpha)]
        });
        (rgb.collect(), converted)
    } else {
        let mut rgb = image.into_rgb8().into_raw();
        let converted = space.and_then(|space| to_srgb(&space, &mut rgb, Layout::Rgb, grey));
        (rgb, converted)
    };
    Ok(Decoded { picture: Picture::new(height, width, rgb), unapplied: unapplied.or(converted) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_profile_that_cannot_be_unpacked_is_named() {
        let mut png = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut png);
        image::ImageEncoder::write_image(encoder, &[7; 12], 2, 2, image::ExtendedColorType::Rgb8).unwrap();
        assert_eq!(decode(&png, [0; 3]).unwrap().unapplied, None);
        // Behind IHDR. Its content should be compressed, and is not.
        let body = b"iCCPname\0\0no profile";
        let chunk = [&(body.len() as u32 - 4).to_be_bytes(), &body[..], &crc32fast::hash(body).to_be_bytes()].concat();
        png.splice(33..33, chunk);
        let image = decode(&png, [0; 3]).unwrap();
        assert_eq!(image.unapplied.as_deref(), Some("one that cannot be unpacked"));
        assert_eq!(image.picture.rgb(), [7; 12]);
    }

    #[test]
    fn large_pictures_wait_for_each_other() {
        let all = Share::take(MAX_PIXELS);
        let (done, waits) = mpsc::channel();
        let other = std::thread::spawn(move || {
            let _one = Share::take(1);
            done.send(()).unwrap();
        });
        assert!(waits.recv_timeout(Duration::from_millis(100)).is_err());
        drop(all);
        waits.recv_timeout(Duration::from_secs(10)).unwrap();
        other.join().unwrap();
    }
}
