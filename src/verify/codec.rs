//! Autoencoders: images to latents and back.

use super::{Array, BoundRange, Golden, Result, Session, planar};
use crate::codec::{CodecFile, LATENTS, LatentDistribution, TAESD_SCALE};
use crate::device::Backends;

/// Both directions of the SD-VAE.
pub(super) fn sd_vae(s: &mut Session<impl Backends>) -> Result<()> {
    replay(s, "vae", |moments, out| {
        let std = moments.std();
        vec![
            ("encoder_out", 2 * LATENTS, out),
            ("mean", LATENTS, moments.mean),
            ("logvar", LATENTS, moments.logvar),
            ("std", LATENTS, std),
        ]
    })
}

/// Both directions of TAESD, whose latents the directory has in its own scale.
pub(super) fn taesd(s: &mut Session<impl Backends>) -> Result<()> {
    replay(s, "taesd", |moments, _| {
        let latents = moments.mean.iter().map(|x| x * TAESD_SCALE).collect();
        vec![("latents", LATENTS, latents)]
    })
}

/// Name, channels and values of a result in NHWC order.
type Results = Vec<(&'static str, usize, Vec<f32>)>;

fn replay(
    s: &mut Session<impl Backends>,
    stem: &str,
    results: impl Fn(LatentDistribution, Vec<f32>) -> Results,
) -> Result<()> {
    let b = &mut s.backends.codec()?;
    let model = CodecFile::open(s.dir.join(format!("{stem}_model.safetensors")))?;
    let f = &s.open(&format!("{stem}.safetensors"))?;
    s.case(&format!("{stem}/encoder"), |s| {
        let images = images(f, "image", 3)?;
        let encoder = model.encoder(b)?;
        let mut all: Results = Vec::new();
        for image in images.nhwc_values().chunks_exact(images.values.len() / images.shape[0]) {
            let (moments, out) = encoder.moments(b, [images.shape[2], images.shape[3]], image)?;
            for (i, (name, channels, mut values)) in results(moments, out).into_iter().enumerate() {
                match all.get_mut(i) {
                    Some(all) => all.2.append(&mut values),
                    None => all.push((name, channels, values)),
                }
            }
        }
        for (name, channels, values) in all {
            check(s, f, name, channels, &values, encoder.depth())?;
        }
        Ok(())
    })?;
    s.case(&format!("{stem}/decoder"), |s| {
        let z = images(f, "z", LATENTS)?;
        let decoder = model.decoder(b)?;
        let scale = if stem == "taesd" { 1.0 / TAESD_SCALE } else { 1.0 };
        let latents: Vec<f32> = z.nhwc_values().iter().map(|x| x * scale).collect();
        let mut all = Vec::new();
        for latent in latents.chunks_exact(z.values.len() / z.shape[0]) {
            all.append(&mut decoder.image(b, [z.shape[2], z.shape[3]], latent)?);
        }
        check(s, f, "decoded", 3, &all, decoder.depth())
    })?;
    s.skip_rest(f, "not computed, or its case was skipped");
    Ok(())
}

/// [N, `channels`, H, W], none of them 0.
fn images(f: &Golden, name: &str, channels: usize) -> Result<Array> {
    let array = f.images(name)?;
    match array.shape.len() == 4 && array.shape[1] == channels {
        true => Ok(array),
        false => Err(f.misshapen(name, &array.shape, format!("[N, {channels}, H, W]"))),
    }
}

/// Compares `got` (NHWC) with a tensor of the file. The reference is exact; the rounding of `depth` convolutions
/// in a row adds up like independent errors.
fn check(
    s: &mut Session<impl Backends>,
    f: &Golden,
    name: &str,
    channels: usize,
    got: &[f32],
    depth: usize,
) -> Result<()> {
    if !f.has(name) {
        s.skip(format!("{}/{name}", f.stem), "absent");
        return Ok(());
    }
    let expected = images(f, name, channels)?;
    let BoundRange { floor, contract } = s.bounds.forward;
    let bound = (floor * (depth as f64).sqrt()).min(contract);
    let [n, h, w, c] = expected.nhwc();
    let got = match got.len() == n * h * w * c {
        true => planar(got, [n, h, w, c]),
        false => got.iter().map(|&x| f64::from(x)).collect(),
    };
    s.compare(format!("{}/{name}", f.stem), bound, &got, &expected);
    Ok(())
}
