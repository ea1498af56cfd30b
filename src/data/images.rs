//! From an image file's bytes to 8-bit sRGB pixels of the size that a dataset has:
//!
//! 1. decode (no more than [`MAX_PIXELS`], so that an image bomb costs no memory), all of it ([`jpeg::check`]), turn as
//!    its EXIF says;
//! 2. convert to sRGB by its colour profile, if it has one that does anything;
//! 3. composite transparency on the background colour, in sRGB as every viewer does, before resizing: no fringe of
//!    hidden colours can appear;
//! 4. crop to the target's shape, about the centre;
//! 5. resize by a Lanczos3 filter in linear light (16 bits a channel), back to 8-bit sRGB.

use std::fs;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader};
use moxcms::{ColorProfile, DataColorSpace, Layout, ProfileText, TransformOptions};
use resize::px::RGB;

use crate::formats::png::Picture;
use crate::formats::{input, jpeg};

/// Most pixels that an image may have: 64 Mi.
pub const MAX_PIXELS: u64 = 1 << 26;

/// Longest image file: no decoder should need more than the largest image.
const MAX_BYTES: u64 = 16 * MAX_PIXELS;

/// Where an image's bytes are.
#[derive(Clone, Debug)]
pub enum Place {
    /// All of a file.
    File(PathBuf),
    /// A part of an archive.
    Member {
        /// The archive.
        tar: Arc<Path>,
        /// Where the part begins.
        offset: u64,
        /// Its length.
        size: u64,
    },
}

impl Place {
    /// Number of bytes; 0 for a file that is not there.
    pub fn length(&self) -> u64 {
        match self {
            Self::File(path) => fs::metadata(path).map_or(0, |about| about.len()),
            Self::Member { size, .. } => *size,
        }
    }

    /// The bytes; or what is wrong with the file, which is no image then.
    ///
    /// # Errors
    /// The disk failed, or an archive is not there any more: nothing is known of the image.
    pub fn read(&self) -> io::Result<Result<Vec<u8>, String>> {
        let length = self.length();
        if length > MAX_BYTES {
            return Ok(Err(format!("{length} bytes, expected {MAX_BYTES} at most")));
        }
        match self {
            Self::File(path) => match input::read(path, MAX_BYTES) {
                Err(error) if input::is_of_the_file(&error) => Ok(Err(error.to_string())),
                read => read.map(Ok),
            },
            Self::Member { tar, offset, size } => {
                let mut file = input::open(tar)?;
                file.seek(SeekFrom::Start(*offset))?;
                let mut bytes = vec![0; *size as usize];
                file.read_exact(&mut bytes)?;
                Ok(Ok(bytes))
            }
        }
    }

    /// The file that it is in.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Member { tar, .. } => tar,
        }
    }
}

/// A decoded image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its pixels.
    pub picture: Picture,
    /// The colour profile that it has and that could not be applied: its colours were taken for sRGB.
    pub unapplied: Option<String>,
}

/// The picture in a file, on a background if it is transparent.
///
/// # Errors
/// The file cannot be read, or is no image.
pub fn open(path: &Path, background: [u8; 3]) -> Result<Image, String> {
    let bytes = Place::File(path.into()).read().map_err(|error| error.to_string())??;
    decode(&bytes, background)
}

/// An image, and the bytes of its colour profile.
type WithProfile = (DynamicImage, Option<Vec<u8>>);

/// Decodes an image file, on a background if it is transparent.
///
/// # Errors
/// What is wrong with it.
pub fn decode(bytes: &[u8], background: [u8; 3]) -> Result<Image, String> {
    let load = || -> image::ImageResult<Result<WithProfile, String>> {
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        if reader.format().is_none() {
            return Ok(Err(format!("it is {}", input::kind(bytes).unwrap_or("no image of a known kind"))));
        }
        let mut limits = image::Limits::default();
        limits.max_alloc = Some(16 * MAX_PIXELS); // what the largest allowed image needs
        reader.limits(limits);
        let mut decoder = reader.into_decoder()?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Ok(Err(format!("{width}x{height} is more than {MAX_PIXELS} pixels")));
        }
        // A damaged tag is no reason to lose the picture.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let profile = decoder.icc_profile().unwrap_or(None);
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(Ok((image, profile)))
    };
    let (image, profile) = load().map_err(|error| error.to_string())??;
    if bytes.starts_with(b"\xff\xd8") {
        jpeg::check(bytes).map_err(|what| format!("a JPEG that is not whole: {what}"))?;
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    let grey = !image.color().has_color();
    let (rgb, unapplied) = if image.color().has_alpha() {
        let over = |x: u8, behind: u8, alpha: u32| {
            ((u32::from(x) * alpha + u32::from(behind) * (255 - alpha) + 127) / 255) as u8
        };
        let mut rgba = image.into_rgba8();
        let unapplied = profile.and_then(|profile| to_srgb(&profile, &mut rgba, Layout::Rgba, grey));
        let rgb = rgba.pixels().flat_map(|pixel| {
            let [r, g, b, alpha] = pixel.0;
            let alpha = u32::from(alpha);
            let [behind_r, behind_g, behind_b] = background;
            [over(r, behind_r, alpha), over(g, behind_g, alpha), over(b, behind_b, alpha)]
        });
        (rgb.collect(), unapplied)
    } else {
        let mut rgb = image.into_rgb8().into_raw();
        let unapplied = profile.and_then(|profile| to_srgb(&profile, &mut rgb, Layout::Rgb, grey));
        (rgb, unapplied)
    };
    Ok(Image { picture: Picture::new(height, width, rgb), unapplied })
}

/// Levels of 256 by which a profile must move a colour to be another one than sRGB: there are many sRGBs, that differ
/// in their rounding.
const NOTICEABLE: u8 = 2;

/// Converts pixels (RGB, or RGBA) by a colour profile; what it is called if that is not possible.
fn to_srgb(icc: &[u8], pixels: &mut [u8], layout: Layout, grey: bool) -> Option<String> {
    let Ok(profile) = ColorProfile::new_from_slice(icc) else { return Some("a damaged one".into()) };
    let name = || match &profile.description {
        Some(ProfileText::PlainString(text)) => text.clone(),
        Some(ProfileText::Localizable(texts)) => texts.first().map_or("unnamed".into(), |text| text.value.clone()),
        Some(ProfileText::Description(text)) => text.ascii_string.clone(),
        None => format!("an unnamed one of {:?}", profile.color_space),
    };
    // Of a grey image all channels are the same.
    let channels = if layout == Layout::Rgba { 4 } else { 3 };
    let (from, first) = match (profile.color_space, grey) {
        (DataColorSpace::Rgb, _) => (layout, false),
        (DataColorSpace::Gray, true) => (Layout::Gray, true),
        // CMYK has become RGB by the decoder's rule of thumb.
        _ => return Some(name()),
    };
    let to = if first { Layout::Rgb } else { layout };
    let srgb = ColorProfile::new_srgb();
    let Ok(transform) = profile.create_transform_8bit(from, &srgb, to, TransformOptions::default()) else {
        return Some(name());
    };
    // All pixels of a lattice, or all greys.
    let sample: Vec<u8> = match (first, channels) {
        (true, _) => (0..=255).collect(),
        (false, 3) => lattice().flatten().collect(),
        (false, _) => lattice().flat_map(|[r, g, b]| [r, g, b, 255]).collect(),
    };
    let mut moved = vec![0; if first { 3 * sample.len() } else { sample.len() }];
    if transform.transform(&sample, &mut moved).is_err() {
        return Some(name());
    }
    let before = |i: usize| if first { sample[i / 3] } else { sample[i] };
    if (0..moved.len()).all(|i| moved[i].abs_diff(before(i)) <= NOTICEABLE) {
        return None;
    }
    if first {
        // Grey comes out grey: sRGB and the profile have the same white.
        pixels.chunks_exact_mut(channels).for_each(|pixel| {
            let at = 3 * usize::from(pixel[0]);
            pixel[..3].copy_from_slice(&moved[at..at + 3]);
        });
        return None;
    }
    let source = pixels.to_vec();
    transform.transform(&source, pixels).err().map(|_| name())
}

/// Colours all over the cube.
fn lattice() -> impl Iterator<Item = [u8; 3]> {
    let levels = || (0..=8).map(|i| (255 * i / 8) as u8);
    levels().flat_map(move |r| levels().flat_map(move |g| levels().map(move |b| [r, g, b])))
}

/// A crop about the centre that has the target's shape, as large as it can be.
#[derive(Clone, Copy, Debug)]
pub struct Crop {
    /// Width and height, in pixels of the image; not whole.
    size: [f64; 2],
    /// Share of the image's area that is cut off.
    pub lost: f64,
    /// Whether the image is narrower or lower than the target.
    pub enlarged: bool,
}

/// How an image of `from` (width, height) is cropped for a target of `to`.
pub fn crop(from: [u32; 2], to: [u32; 2]) -> Crop {
    let [from_width, from_height] = from.map(f64::from);
    let [width, height] = to.map(f64::from);
    let scale = (from_width / width).min(from_height / height);
    let size = [scale * width, scale * height];
    let lost = 1.0 - (size[0] * size[1]) / (from_width * from_height);
    Crop { size, lost, enlarged: from[0] < to[0] || from[1] < to[1] }
}

impl Crop {
    /// Whether no more than this share is cut off.
    pub fn within(&self, share: f64) -> bool {
        // The tolerance keeps rounding from dropping an image that needs no crop.
        self.lost <= share + 1e-9
    }
}

/// A pixel in linear light.
type RGB16 = RGB<u16>;

/// Crops and resizes.
///
/// # Errors
/// The resizer cannot do it.
pub fn fit(image: Picture, crop: Crop, [width, height]: [u32; 2]) -> Result<Picture, String> {
    let (width, height) = (width as usize, height as usize);
    if (image.width(), image.height()) == (width, height) {
        return Ok(image);
    }
    let linear: Vec<RGB16> =
        image.rgb().as_chunks::<3>().0.iter().map(|rgb| rgb.map(|x| TO_LINEAR[usize::from(x)]).into()).collect();
    // Whole pixels: the crop is centred to half a pixel.
    let whole = |side: f64, from: usize| (side.round() as usize).clamp(1, from);
    let (crop_width, crop_height) = (whole(crop.size[0], image.width()), whole(crop.size[1], image.height()));
    let left = (image.width() - crop_width) / 2;
    let top = (image.height() - crop_height) / 2;
    let source = &linear[top * image.width() + left..];
    let mut target = vec![RGB16::new(0, 0, 0); width * height];
    resize::new(crop_width, crop_height, width, height, resize::Pixel::RGB16, resize::Type::Lanczos3)
        .and_then(|mut resizer| resizer.resize_stride(source, image.width(), &mut target))
        .map_err(|error| format!("cannot be resized: {error}"))?;
    let rgb = target.iter().flat_map(|x| [x.r, x.g, x.b].map(|x| TO_SRGB[usize::from(x)])).collect();
    Ok(Picture::new(height, width, rgb))
}

/// sRGB (IEC 61966-2-1) to linear light, 0 to 65535.
static TO_LINEAR: LazyLock<[u16; 256]> = LazyLock::new(|| {
    std::array::from_fn(|x| {
        let x = x as f64 / 255.0;
        let linear = if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) };
        (linear * 65535.0).round() as u16
    })
});

/// The inverse, rounded; exact on the values of [`TO_LINEAR`].
static TO_SRGB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    (0..=65535u16)
        .map(|x| {
            let x = f64::from(x) / 65535.0;
            let srgb = if x <= 0.003_130_8 { 12.92 * x } else { 1.055 * x.powf(1.0 / 2.4) - 0.055 };
            (srgb * 255.0).round() as u8
        })
        .collect()
});
