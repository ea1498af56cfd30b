//! Colours: what a file says of its colour space, conversion to sRGB, and sRGB to linear light and back.

use std::io::Cursor;
use std::sync::{Arc, LazyLock};

use moxcms::{
    Chromaticity, CicpColorPrimaries, CicpProfile, CmsError, ColorPrimaries, ColorProfile, DataColorSpace, Layout,
    MatrixCoefficients, ProfileText, ToneReprCurve, TransferCharacteristics, TransformExecutor, TransformOptions,
};

/// By how many of 256 levels a profile must move a colour to count as different from sRGB. There are many profiles of
/// sRGB that differ in their rounding.
const NOTICEABLE: u32 = 2;

/// A colour space that is not known to be sRGB; or its name, if it cannot be understood.
type Space = Result<ColorProfile, String>;

/// How a pixel's channel is stored: `u8` or `u16`.
pub trait Level: Copy + Default + Into<u32> + TryFrom<u32> {
    /// Levels for one of 256.
    const STEP: u32;

    /// moxcms has a function for each.
    fn transform(from: &ColorProfile, layout: Layout, to: Layout)
    -> Result<Arc<dyn TransformExecutor<Self>>, CmsError>;

    /// The level of one of 256 * `STEP`.
    fn of(level: u32) -> Self {
        Self::try_from(level).unwrap_or_default()
    }
}

impl Level for u8 {
    const STEP: u32 = 1;

    fn transform(from: &ColorProfile, layout: Layout, to: Layout) -> Result<Arc<dyn TransformExecutor<u8>>, CmsError> {
        Ok(from.create_transform_8bit(layout, &ColorProfile::new_srgb(), to, TransformOptions::default())?)
    }
}

impl Level for u16 {
    const STEP: u32 = 257;

    fn transform(from: &ColorProfile, layout: Layout, to: Layout) -> Result<Arc<dyn TransformExecutor<u16>>, CmsError> {
        Ok(from.create_transform_16bit(layout, &ColorProfile::new_srgb(), to, TransformOptions::default())?)
    }
}

/// What a file says of its colours; none if it says nothing, or says sRGB. `icc` is its profile. In a PNG, `cICP`
/// counts before the profile. Without either, `gAMA` and `cHRM` count, unless there is `sRGB`.
pub fn space(bytes: &[u8], icc: Option<&[u8]>) -> Option<Space> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info().ok();
    let chunks = reader.as_ref().map(|reader| reader.info());
    if let Some(points) = chunks.and_then(|chunks| chunks.coding_independent_code_points) {
        return of_code_points(points);
    }
    if let Some(icc) = icc {
        return Some(ColorProfile::new_from_slice(icc).map_err(|_| "a damaged one".into()));
    }
    let chunks = chunks.filter(|chunks| chunks.srgb.is_none())?;
    match (chunks.gama_chunk, chunks.chrm_chunk) {
        (None, None) => has_profile(bytes).then(|| Err("one that cannot be unpacked".into())),
        (gamma, primaries) => Some(of_gamma(gamma, primaries)),
    }
}

/// Whether a PNG has a profile, even one that its decoder ignored.
fn has_profile(png: &[u8]) -> bool {
    let mut rest = png.get(8..).unwrap_or_default();
    while let Some((&[a, b, c, d, ref name @ ..], after)) = rest.split_first_chunk::<8>() {
        match name {
            b"iCCP" => return true,
            b"IDAT" => return false,
            _ => rest = after.get(u32::from_be_bytes([a, b, c, d]) as usize + 4..).unwrap_or_default(),
        }
    }
    false
}

/// The space of a PNG's `cICP`: numbers of ITU-T H.273.
fn of_code_points(points: png::CodingIndependentCodePoints) -> Option<Space> {
    let (primaries, transfer) = (points.color_primaries, points.transfer_function);
    if (primaries, transfer) == (1, 13) && points.is_video_full_range_image {
        return None;
    }
    let name = || format!("cICP {primaries}, {transfer}");
    // Brightness beyond white (PQ and HLG) has no one rendering in sRGB.
    if matches!(transfer, 16 | 18) || points.matrix_coefficients != 0 || !points.is_video_full_range_image {
        return Some(Err(name()));
    }
    let mut profile = named(name());
    profile.red_trc = None;
    let codes = CicpColorPrimaries::try_from(primaries).ok().zip(TransferCharacteristics::try_from(transfer).ok());
    if let Some((color_primaries, transfer_characteristics)) = codes {
        let matrix_coefficients = MatrixCoefficients::Identity;
        profile.update_rgb_colorimetry_from_cicp(CicpProfile {
            color_primaries,
            transfer_characteristics,
            matrix_coefficients,
            full_range: true,
        });
    }
    Some(if profile.red_trc.is_some() { Ok(profile) } else { Err(name()) })
}

/// The space of a PNG's `gAMA` and `cHRM`; what one of them leaves open is as in sRGB.
fn of_gamma(gamma: Option<png::ScaledFloat>, primaries: Option<png::SourceChromaticities>) -> Space {
    let value = gamma.map(png::ScaledFloat::into_value);
    let name = match value {
        Some(gamma) if primaries.is_some() => format!("gAMA {gamma} and cHRM"),
        Some(gamma) => format!("gAMA {gamma}"),
        None => "cHRM".into(),
    };
    let mut profile = named(name.clone());
    match value {
        None => {}
        // The standard lets sRGB call itself 1/2.2.
        Some(gamma) if (gamma - 1.0 / 2.2).abs() < 0.005 => {}
        Some(gamma) if (0.1..=10.0).contains(&gamma) => {
            let curve = ToneReprCurve::Parametric(vec![1.0 / gamma, 1.0, 0.0, 0.0, 0.0]);
            profile.red_trc = Some(curve.clone());
            profile.green_trc = Some(curve.clone());
            profile.blue_trc = Some(curve);
        }
        Some(_) => return Err(name),
    }
    if let Some(png::SourceChromaticities { white, red, green, blue }) = primaries {
        let at = |(x, y): (png::ScaledFloat, png::ScaledFloat)| Chromaticity::new(x.into_value(), y.into_value());
        let primaries = ColorPrimaries { red: at(red), green: at(green), blue: at(blue) };
        profile.update_rgb_colorimetry(at(white).to_xyyb(), primaries);
        // The primaries lie on a line, or white lies outside of them.
        let matrix = profile.colorant_matrix();
        if !matrix.v.as_flattened().iter().all(|x| x.abs() < 4.0) {
            return Err(name);
        }
    }
    Ok(profile)
}

/// A copy of sRGB under another name, which the caller changes.
fn named(name: String) -> ColorProfile {
    let mut profile = ColorProfile::new_srgb();
    profile.cicp = None;
    profile.description = Some(ProfileText::PlainString(name));
    profile
}

/// Converts pixels (RGB or RGBA) from a colour space. If that is not possible, returns the space's name.
pub fn to_srgb<T: Level>(space: &Space, pixels: &mut [T], layout: Layout, grey: bool) -> Option<String> {
    let profile = match space {
        Ok(profile) => profile,
        Err(name) => return Some(name.clone()),
    };
    let name = || match &profile.description {
        Some(ProfileText::PlainString(text)) => text.clone(),
        Some(ProfileText::Localizable(texts)) => texts.first().map_or("unnamed".into(), |text| text.value.clone()),
        Some(ProfileText::Description(text)) => text.ascii_string.clone(),
        None => format!("an unnamed one of {:?}", profile.color_space),
    };
    // In a grey image all channels are the same.
    let channels = if layout == Layout::Rgba { 4 } else { 3 };
    let (from, first) = match (profile.color_space, grey) {
        (DataColorSpace::Rgb, _) => (layout, false),
        (DataColorSpace::Gray, true) => (Layout::Gray, true),
        // CMYK has become RGB by the decoder's rule of thumb.
        _ => return Some(name()),
    };
    let to = if first { Layout::Rgb } else { layout };
    let Ok(transform) = T::transform(profile, from, to) else { return Some(name()) };
    // A lattice of colours, or all greys.
    let most = 255 * T::STEP;
    let lattice = || lattice().map(|colour| colour.map(|level| T::of(u32::from(level) * T::STEP)));
    let sample: Vec<T> = match (first, channels) {
        (true, _) => (0..=most).map(T::of).collect(),
        (false, 3) => lattice().flatten().collect(),
        (false, _) => lattice().flat_map(|[r, g, b]| [r, g, b, T::of(most)]).collect(),
    };
    let mut moved = vec![T::default(); if first { 3 * sample.len() } else { sample.len() }];
    if transform.transform(&sample, &mut moved).is_err() {
        return Some(name());
    }
    let before = |i: usize| if first { sample[i / 3] } else { sample[i] };
    if (0..moved.len()).all(|i| moved[i].into().abs_diff(before(i).into()) <= NOTICEABLE * T::STEP) {
        return None;
    }
    if first {
        // Grey stays grey, since sRGB and the profile have the same white.
        pixels.chunks_exact_mut(channels).for_each(|pixel| {
            let at = 3 * pixel[0].into() as usize;
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
