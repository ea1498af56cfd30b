//! Cropping and resizing to a dataset's size; if it has several, to the one that suits the picture best:
//!
//! 1. crop to the target's shape, about the centre;
//! 2. resize by a Lanczos3 filter in linear light (16 bits a channel), back to 8-bit sRGB.
//!
//! ```
//! use edm2k::pictures::fit::{choose, fit};
//! use edm2k::pictures::{Picture, Size};
//!
//! let wide = Picture::new(60, 90, vec![200; 60 * 90 * 3]);
//! let targets = [Size { width: 32, height: 32 }, Size { width: 48, height: 32 }];
//! let (best, crop) = choose(wide.size(), &targets);
//! assert_eq!((best, crop.lost), (1, 0.0));
//! assert_eq!(fit(wide, crop, targets[best])?, Picture::new(32, 48, vec![200; 32 * 48 * 3]));
//! # Ok::<(), edm2k::pictures::PictureError>(())
//! ```

use resize::px::RGB;

use super::colour::{TO_LINEAR, TO_SRGB};
use super::{Picture, PictureError, Size};

/// A crop about the centre that has the target's shape, as large as it can be.
#[derive(Clone, Copy, Debug)]
pub struct Crop {
    // In pixels of the image; not whole.
    width: f64,
    height: f64,
    /// Share of the image's area that is cut off.
    pub lost: f64,
    /// Whether the image is narrower or lower than the target.
    pub enlarged: bool,
}

/// How an image of `from` is cropped for a target of `to`.
pub fn crop(from: Size, to: Size) -> Crop {
    let (from_width, from_height) = (f64::from(from.width), f64::from(from.height));
    let (width, height) = (f64::from(to.width), f64::from(to.height));
    let scale = (from_width / width).min(from_height / height);
    let (width, height) = (scale * width, scale * height);
    let lost = 1.0 - (width * height) / (from_width * from_height);
    Crop { width, height, lost, enlarged: from.width < to.width || from.height < to.height }
}

/// The one of several targets that crops an image of `from` least, and that crop. Of targets that crop alike it is the
/// one that resamples least; of those, the first.
///
/// # Panics
/// If there is no target.
pub fn choose(from: Size, targets: &[Size]) -> (usize, Crop) {
    // Compares fractions of whole numbers below 2^64, so that no rounding decides.
    let less = |a: [u128; 2], b: [u128; 2]| (a[0] * b[1]).cmp(&(b[0] * a[1]));
    let sides = |size: &Size| (u128::from(size.width), u128::from(size.height));
    let ranked = |target: &Size| {
        let ((from_width, from_height), (width, height)) = (sides(&from), sides(target));
        // The factors by which width and height are scaled, both times the target's area.
        let (across, down) = (from_width * height, from_height * width);
        let kept = [across.min(down), across.max(down)];
        let [a, b] = if across <= down { [from_width, width] } else { [from_height, height] };
        (kept, [a.max(b), a.min(b)])
    };
    let all = targets.iter().map(ranked).enumerate();
    let best = all.min_by(|(_, (kept, factor)), (_, (other_kept, other_factor))| {
        less(*other_kept, *kept).then(less(*factor, *other_factor))
    });
    let (at, _) = best.expect("there are targets");
    (at, crop(from, targets[at]))
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
pub fn fit(image: Picture, crop: Crop, target: Size) -> Result<Picture, PictureError> {
    if image.size() == target {
        return Ok(image);
    }
    let (width, height) = (target.width as usize, target.height as usize);
    let linear: Vec<RGB16> =
        image.rgb().as_chunks::<3>().0.iter().map(|rgb| rgb.map(|x| TO_LINEAR[usize::from(x)]).into()).collect();
    // The crop is of whole pixels, so it is centred to within half a pixel.
    let whole = |side: f64, from: usize| (side.round() as usize).clamp(1, from);
    let (crop_width, crop_height) = (whole(crop.width, image.width()), whole(crop.height, image.height()));
    let left = (image.width() - crop_width) / 2;
    let top = (image.height() - crop_height) / 2;
    let source = &linear[top * image.width() + left..];
    let mut target = vec![RGB16::new(0, 0, 0); width * height];
    resize::new(crop_width, crop_height, width, height, resize::Pixel::RGB16, resize::Type::Lanczos3)
        .and_then(|mut resizer| resizer.resize_stride(source, image.width(), &mut target))?;
    let rgb = target.iter().flat_map(|x| [x.r, x.g, x.b].map(|x| TO_SRGB[usize::from(x)])).collect();
    Ok(Picture::new(height, width, rgb))
}
