//! Colours: profiles to sRGB, and sRGB to linear light and back.

use std::sync::LazyLock;

use moxcms::{ColorProfile, DataColorSpace, Layout, ProfileText, TransformOptions};

/// Levels of 256 by which a profile must move a colour to be another one than sRGB: there are many sRGBs, that differ
/// in their rounding.
const NOTICEABLE: u8 = 2;

/// Converts pixels (RGB, or RGBA) by a colour profile; what it is called if that is not possible.
pub fn to_srgb(icc: &[u8], pixels: &mut [u8], layout: Layout, grey: bool) -> Option<String> {
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

/// sRGB (IEC 61966-2-1) to linear light, 0 to 65535.
pub static TO_LINEAR: LazyLock<[u16; 256]> = LazyLock::new(|| {
    std::array::from_fn(|x| {
        let x = x as f64 / 255.0;
        let linear = if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) };
        (linear * 65535.0).round() as u16
    })
});

/// The inverse, rounded; exact on the values of [`TO_LINEAR`].
pub static TO_SRGB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    (0..=65535u16)
        .map(|x| {
            let x = f64::from(x) / 65535.0;
            let srgb = if x <= 0.003_130_8 { 12.92 * x } else { 1.055 * x.powf(1.0 / 2.4) - 0.055 };
            (srgb * 255.0).round() as u8
        })
        .collect()
});
