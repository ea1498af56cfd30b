//! Pixels to latents and back: the SD-VAE, and TAESD for quick previews, from their safetensors files, with
//! EDM2's conventions.
//!
//! EDM2 (`StabilityVAEEncoder`) differs from Stable Diffusion in what it feeds the autoencoder and how it scales:
//!
//! ```text
//! v       = pixel / 255                                  in [0, 1], not [-1, 1]
//! raw     = mean + std * noise                           std = exp(logvar / 2), logvar within [-30, 20]
//! latent  = (raw - RAW_MEAN) * FINAL_STD / RAW_STD       per channel: what the network sees
//! pixel   = trunc(255 * clamp(decode(raw), 0, 1))
//! ```
//!
//! TAESD takes an image t where the SD-VAE takes 2 t - 1, and its latents are those of the SD-VAE times 0.18215. So it
//! can stand in for the SD-VAE with t = (v + 1) / 2 and raw = latents / 0.18215. It has no std, since it gives one
//! latent and no distribution.
//!
//! Everything about a file is checked when it is opened; [`CodecFile::encoder`] and [`CodecFile::decoder`] read the
//! half that is needed. Images pass one at a time, because activations need more memory than weights.
//!
//! ```
//! use edm2k::codec::{CodecError, CodecFile, LatentDistribution};
//!
//! // What an SD-VAE's encoder says of a pixel; EDM2's networks see it in another scale.
//! let [mean, std] = LatentDistribution { mean: vec![5.81, 3.25, 0.12, -2.15], logvar: vec![0.0; 4] }.scaled();
//! assert!(mean.iter().all(|x| x.abs() < 1e-6) && (std[0] - 0.5 / 4.17).abs() < 1e-6);
//! assert!(matches!(CodecFile::open("demo/emoji.safetensors"), Err(CodecError::Unknown { .. })));
//! ```

mod layers;
mod sd_vae;
mod taesd;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use half::f16;
use half::vec::HalfFloatVecExt;
use serde::{Deserialize, Serialize};

use crate::backend::BackendError;
use crate::backend::codec::CodecBackend;
use crate::formats::fingerprint::{self, Fingerprint, Hasher};
use crate::formats::safetensors::{self, Dtype, SafeError, SafeFile};
use crate::formats::weights;
use crate::pictures::Picture;
use crate::rng::{Purpose, Stream};
use layers::{Layers, Weights, check};

#[doc(hidden)]
pub use layers::CodecPlan;

pub use sd_vae::LATENTS;

/// Mean of the SD-VAE's latents, per channel (EDM2).
pub const RAW_MEAN: [f32; LATENTS] = [5.81, 3.25, 0.12, -2.15];
/// Their standard deviation (EDM2).
pub const RAW_STD: [f32; LATENTS] = [4.17, 4.62, 3.71, 3.28];
/// Standard deviation of the latents that the network sees (EDM2's sigma_data).
pub const FINAL_STD: f32 = 0.5;
/// What Stable Diffusion, and so TAESD, multiplies the SD-VAE's latents by; EDM2 does not.
pub const TAESD_SCALE: f32 = 0.18215;

/// What can go wrong with a codec.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum CodecError {
    #[error("{0}")]
    File(#[from] SafeError),
    #[error(
        "{}: neither an SD-VAE nor a TAESD (expected a tensor decoder.conv_in.weight or decoder.layers.0.weight)",
        path.display()
    )]
    Unknown { path: PathBuf },
    #[error("{}: tensor {name} is not part of {network}, which the file is by its other tensors", path.display())]
    Extra { path: PathBuf, name: String, network: String },
    #[error("{}: this TAESD file holds the {found} only, expected one with the {expected}", path.display())]
    Half { path: PathBuf, found: &'static str, expected: &'static str },
    #[error("{}: it is {found}, but the latents of {of} are of {made_by}", path.display())]
    OtherLatents { path: PathBuf, found: Box<Autoencoder>, of: String, made_by: Box<Autoencoder> },
    #[error("an image of {width}x{height}, expected multiples of {factor}")]
    Size { height: usize, width: usize, factor: usize },
    #[error(
        "the picture has values that are no finite numbers: the autoencoder exceeds the range of its numbers; on a GPU \
         try --precision bf16, or --device cpu"
    )]
    Overflow,
    #[error("{0}")]
    Backend(#[from] BackendError),
}

type Result<T, E = CodecError> = std::result::Result<T, E>;

/// Which autoencoder made some latents; stored with them and with the models that learn from them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Autoencoder {
    /// Its kind.
    pub network: AutoencoderKind,
    /// Name of its file, for people.
    pub name: String,
    /// Fingerprint of the weights of its encoder, rounded to f16, as they alone decide what latents are. So a file in
    /// half precision has the same fingerprint, and so has an autoencoder of which only the decoder was trained
    /// further.
    pub fingerprint: Fingerprint,
}

/// A kind of autoencoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoencoderKind {
    /// That of Stable Diffusion.
    SdVae,
    /// The small autoencoder that can stand in for it.
    Taesd,
}

impl PartialEq for Autoencoder {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl fmt::Display for Autoencoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.network, self.name, self.fingerprint)
    }
}

impl fmt::Display for AutoencoderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SdVae => "the SD-VAE",
            Self::Taesd => "the TAESD",
        })
    }
}

/// A file of an autoencoder, open and checked.
#[derive(Debug)]
pub struct CodecFile {
    file: SafeFile,
    architecture: Architecture,
}

#[derive(Debug)]
enum Architecture {
    SdVae(sd_vae::SdVaeConfig),
    /// Its channels, the prefix of the names in each half that is there, and the number of the decoder's first layer.
    Taesd {
        channels: usize,
        encoder: Option<&'static str>,
        decoder: Option<(&'static str, usize)>,
    },
}

impl CodecFile {
    /// Opens a file and checks that it has all tensors of its network, in the right shapes, and no others. The file is
    /// safetensors or what `torch.save` writes. It may be an SD-VAE under the names of `diffusers` or of its first
    /// authors, also as part of a whole Stable Diffusion checkpoint (`first_stage_model.`). Or it is a TAESD under the
    /// names of `diffusers`, or under those of its author (an encoder or a decoder alone). Its tensors tell which.
    ///
    /// # Errors
    /// See [`CodecError`]; the message names the file and the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = sd_vae::known_names(weights::open(path)?);
        let has = |name: &str| file.contains(name);
        let architecture = if has("decoder.conv_in.weight") || has("encoder.conv_in.weight") {
            let config = sd_vae::SdVaeConfig::of(&file)?;
            let tables = [sd_vae::Encoder::new(&config).1, sd_vae::Decoder::new(&config).1];
            check(&file, &tables.each_ref(), &config.describe())?;
            Architecture::SdVae(config)
        } else {
            let (encoder, decoder) = if has("decoder.layers.0.weight") || has("encoder.layers.0.weight") {
                (Some("encoder.layers."), Some(("decoder.layers.", 0)))
            } else if has("0.weight") {
                (Some(""), None)
            } else if has("1.weight") {
                (None, Some(("", 1)))
            } else {
                return Err(CodecError::Unknown { path: file.path().into() });
            };
            // Both halves have the same width.
            let first = match (encoder, decoder) {
                (None, Some((prefix, first))) => format!("{prefix}{first}.weight"),
                (encoder, _) => format!("{}0.weight", encoder.unwrap_or_default()),
            };
            let channels = file.shape(&first)?.first().copied().unwrap_or(0);
            if channels == 0 {
                let found = format!("shape {:?}", file.shape(&first)?);
                return Err(file.unexpected(&first, found, "[channels, _, 3, 3]").into());
            }
            let tables: Vec<Layers> = [
                encoder.map(|prefix| taesd::Encoder::new(prefix, channels).1),
                decoder.map(|(prefix, first)| taesd::Decoder::new(prefix, first, channels).1),
            ]
            .into_iter()
            .flatten()
            .collect();
            check(&file, &tables.iter().collect::<Vec<_>>(), &format!("a TAESD of {channels} channels"))?;
            Architecture::Taesd { channels, encoder, decoder }
        };
        Ok(Self { file, architecture })
    }

    /// Whether a file has tensors that only autoencoders have; `open` says whether it is whole.
    #[doc(hidden)]
    pub fn is_one(file: &SafeFile) -> bool {
        const MARKS: [&str; 6] = [
            "encoder.conv_in.weight",
            "decoder.conv_in.weight",
            "encoder.layers.0.weight",
            "decoder.layers.0.weight",
            "0.weight",
            "1.weight",
        ];
        file.names().any(|name| MARKS.contains(&name.strip_prefix(sd_vae::PART).unwrap_or(name)))
    }

    /// Whether it has an encoder, and whether a decoder.
    pub fn halves(&self) -> [bool; 2] {
        match &self.architecture {
            Architecture::SdVae(_) => [true; 2],
            Architecture::Taesd { encoder, decoder, .. } => [encoder.is_some(), decoder.is_some()],
        }
    }

    /// Channels of its levels, from the image on.
    pub fn channels(&self) -> Vec<usize> {
        match &self.architecture {
            Architecture::SdVae(config) => config.channels.clone(),
            Architecture::Taesd { channels, .. } => vec![*channels],
        }
    }

    /// Pixels of the image for one of the latent, in each direction.
    pub fn factor(&self) -> usize {
        match &self.architecture {
            Architecture::SdVae(config) => config.factor(),
            Architecture::Taesd { .. } => taesd::FACTOR,
        }
    }

    /// Loads the half that makes latents.
    ///
    /// # Errors
    /// [`CodecError::Half`] if the file lacks it, [`CodecError::File`] if a weight is no finite number.
    pub fn encoder<B: CodecBackend>(&self, b: &mut B) -> Result<Encoder<B>> {
        let (net, table) = match &self.architecture {
            Architecture::SdVae(config) => {
                let (net, table) = sd_vae::Encoder::new(config);
                (EncoderNet::SdVae(net), table)
            }
            Architecture::Taesd { channels, encoder: Some(prefix), .. } => {
                let (net, table) = taesd::Encoder::new(prefix, *channels);
                (EncoderNet::Taesd(net), table)
            }
            Architecture::Taesd { encoder: None, .. } => return Err(self.half("decoder", "encoder")),
        };
        Ok(Encoder { net, weights: table.load_file(b, &self.file)?, factor: self.factor(), depth: table.len() })
    }

    fn decoder_net(&self) -> Result<(DecoderNet, Layers)> {
        match &self.architecture {
            Architecture::SdVae(config) => {
                let (net, table) = sd_vae::Decoder::new(config);
                Ok((DecoderNet::SdVae(net), table))
            }
            Architecture::Taesd { channels, decoder: Some((prefix, first)), .. } => {
                let (net, table) = taesd::Decoder::new(prefix, *first, *channels);
                Ok((DecoderNet::Taesd(net), table))
            }
            Architecture::Taesd { decoder: None, .. } => Err(self.half("encoder", "decoder")),
        }
    }

    /// Loads the half that makes images.
    ///
    /// # Errors
    /// [`CodecError::Half`] if the file lacks it, [`CodecError::File`] if a weight is no finite number.
    pub fn decoder<B: CodecBackend>(&self, b: &mut B) -> Result<Decoder<B>> {
        let (net, table) = self.decoder_net()?;
        Ok(Decoder { net, weights: table.load_file(b, &self.file)?, factor: self.factor(), depth: table.len() })
    }

    /// Multiply-adds of decoding a latent of [height, width].
    ///
    /// # Errors
    /// [`CodecError::Half`] if the file lacks the decoder.
    pub fn decoder_macs(&self, [height, width]: [usize; 2]) -> Result<u64> {
        let (net, table) = self.decoder_net()?;
        Ok(net.macs(&table, (height * width) as u64))
    }

    /// Bytes that decoding holds at once for each place of a latent, at least: two of the last level's activations.
    pub fn decoder_bytes(&self) -> u128 {
        let channels = match &self.architecture {
            Architecture::SdVae(config) => config.channels[0],
            Architecture::Taesd { channels, .. } => *channels,
        };
        2 * 4 * (self.factor() as u128).pow(2) * channels as u128
    }

    /// Its kind.
    pub fn network(&self) -> AutoencoderKind {
        match self.architecture {
            Architecture::SdVae(_) => AutoencoderKind::SdVae,
            Architecture::Taesd { .. } => AutoencoderKind::Taesd,
        }
    }

    /// What its latents are of; none if it has no encoder.
    ///
    /// # Errors
    /// [`CodecError::File`] if a weight is of an unknown element type.
    pub fn autoencoder(&self) -> Result<Option<Autoencoder>> {
        let table = match &self.architecture {
            Architecture::SdVae(config) => sd_vae::Encoder::new(config).1,
            Architecture::Taesd { channels, encoder: Some(prefix), .. } => taesd::Encoder::new(prefix, *channels).1,
            Architecture::Taesd { encoder: None, .. } => return Ok(None),
        };
        // Weights are counted by their places in the table, as some have other names in older files.
        let mut hasher = Hasher::default();
        for (name, _) in table.tensors() {
            let halves = Vec::<f16>::from_f32_slice(&self.file.f32(&name)?);
            hasher.add(bytemuck::cast_slice(&halves));
        }
        let (network, name) = (self.network(), fingerprint::name(self.file.path()));
        Ok(Some(Autoencoder { network, name, fingerprint: hasher.finish() }))
    }

    /// Checks that this autoencoder made some latents, if it is known which one did. A TAESD may stand in for an
    /// SD-VAE, and the other way round; then a warning is returned.
    ///
    /// # Errors
    /// [`CodecError::OtherLatents`].
    pub fn check_latents(&self, of: &str, made_by: Option<&Autoencoder>) -> Result<Option<String>> {
        let (path, Some(made_by)) = (self.file.path(), made_by) else { return Ok(None) };
        if self.network() != made_by.network {
            let (path, network) = (path.display(), self.network());
            return Ok(Some(format!("{path} ({network}) only approximates {made_by}, which made the latents of {of}")));
        }
        match self.autoencoder()? {
            Some(found) if found != *made_by => {
                let (found, of) = (Box::new(found), of.to_owned());
                Err(CodecError::OtherLatents { path: path.into(), found, of, made_by: Box::new(made_by.clone()) })
            }
            _ => Ok(None),
        }
    }

    pub(crate) fn half(&self, found: &'static str, expected: &'static str) -> CodecError {
        CodecError::Half { path: self.file.path().into(), found, expected }
    }
}

enum EncoderNet {
    SdVae(sd_vae::Encoder),
    Taesd(taesd::Encoder),
}

enum DecoderNet {
    SdVae(sd_vae::Decoder),
    Taesd(taesd::Decoder),
}

impl DecoderNet {
    fn macs(&self, table: &Layers, pixels: u64) -> u64 {
        match self {
            Self::SdVae(net) => net.macs(table, pixels),
            Self::Taesd(net) => net.macs(table, pixels),
        }
    }
}

/// The distribution of an image's latents before EDM2's scaling, [h, w, 4] each.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentDistribution {
    /// Mean.
    pub mean: Vec<f32>,
    /// Logarithm of the variance, within [-30, 20]; minus infinity where there is none (TAESD).
    pub logvar: Vec<f32>,
}

impl LatentDistribution {
    /// Mean and standard deviation in the scale of EDM2's networks; a latent is mean + std * noise.
    pub fn scaled(&self) -> [Vec<f32>; 2] {
        let scaled = |values: &[f32], shift: bool| -> Vec<f32> {
            let channels = (0..LATENTS).map(scale_and_shift).cycle();
            values.iter().zip(channels).map(|(x, (a, b))| if shift { x * a + b } else { x * a }).collect()
        };
        [scaled(&self.mean, true), scaled(&self.std(), false)]
    }

    /// Standard deviation.
    pub fn std(&self) -> Vec<f32> {
        self.logvar.iter().map(|x| (0.5 * x).exp()).collect()
    }
}

/// Pixels to latents, on a device.
pub struct Encoder<B: CodecBackend> {
    net: EncoderNet,
    weights: Weights<B>,
    factor: usize,
    depth: usize,
}

debug!(Encoder<B> { factor, depth } [B: CodecBackend]);

impl<B: CodecBackend> Encoder<B> {
    /// Latents of a picture, before EDM2's scaling.
    ///
    /// # Errors
    /// [`CodecError::Size`], or the device's error.
    pub fn encode(&self, b: &mut B, picture: &Picture) -> Result<LatentDistribution> {
        let values: Vec<f32> = picture.rgb().iter().map(|&x| f32::from(x) / 255.0).collect();
        Ok(self.moments(b, [picture.height(), picture.width()], &values)?.0)
    }

    /// Latents of an image [h, w, 3] with values in [0, 1]; and, of an SD-VAE, what its `quant_conv` is given,
    /// [h, w, 8].
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    ///
    /// # Panics
    /// If the values are not h * w * 3.
    pub fn moments(
        &self,
        b: &mut B,
        [height, width]: [usize; 2],
        values: &[f32],
    ) -> Result<(LatentDistribution, Vec<f32>)> {
        let factor = self.factor;
        let fits = |side: usize| side > 0 && side.is_multiple_of(factor);
        if !fits(height) || !fits(width) {
            return Err(CodecError::Size { height, width, factor });
        }
        let body = &mut |b: &mut B, x: &[B::Tensor]| match &self.net {
            EncoderNet::SdVae(net) => Ok(net.forward(b, &self.weights, &x[0]).into()),
            EncoderNet::Taesd(net) => Ok(vec![net.forward(b, &self.weights, &x[0])]),
        };
        let x = b.upload([1, height, width, 3], values);
        let made = b.planned::<BackendError>(&self.weights.plan, &[x], body)?;
        match &made[..] {
            [out, moments] => {
                let (mean, logvar) = halves(&b.download(moments)?);
                let logvar = logvar.into_iter().map(|x| x.clamp(-30.0, 20.0)).collect();
                Ok((LatentDistribution { mean, logvar }, b.download(out)?))
            }
            latents => {
                let mean: Vec<f32> = b.download(&latents[0])?.iter().map(|x| x / TAESD_SCALE).collect();
                Ok((LatentDistribution { logvar: vec![f32::NEG_INFINITY; mean.len()], mean }, Vec::new()))
            }
        }
    }

    /// Convolutions of the network.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }
}

/// The first and the last four of each eight values.
fn halves(values: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let pixels = values.chunks_exact(2 * LATENTS).map(|pixel| pixel.split_at(LATENTS));
    let (first, last): (Vec<_>, Vec<_>) = pixels.unzip();
    (first.concat(), last.concat())
}

/// Random values of a weight, scaled so that its layer's output is about as large as its input.
fn random(shape: &[usize]) -> Vec<f32> {
    let mut values = vec![0.0; shape.iter().product()];
    Stream::new(0, Purpose::Init, values.len() as u64).normals(&mut values);
    let fan_in = shape[1..].iter().product::<usize>() as f32;
    values.iter_mut().for_each(|x| *x /= fan_in.sqrt());
    values
}

/// Writes an SD-VAE of the published size with random weights, in f16, for measurements.
///
/// # Errors
/// [`CodecError::File`]: it cannot be written.
#[doc(hidden)]
pub fn write_random(path: impl AsRef<Path>) -> Result<()> {
    let config = sd_vae::SdVaeConfig::published();
    let tables = [sd_vae::Encoder::new(&config).1, sd_vae::Decoder::new(&config).1];
    let tensors: Vec<(String, Vec<usize>)> = tables.iter().flat_map(Layers::tensors).collect();
    let infos: Vec<_> = tensors.iter().map(|(name, shape)| (name.as_str(), Dtype::F16, shape.as_slice())).collect();
    let mut file = safetensors::Writer::create(path, &infos, &HashMap::new())?;
    for (_, shape) in &tensors {
        let halves: Vec<f16> = random(shape).into_iter().map(f16::from_f32).collect();
        file.write(bytemuck::cast_slice(&halves))?;
    }
    Ok(file.finish()?)
}

/// Latents to pixels, on a device.
pub struct Decoder<B: CodecBackend> {
    net: DecoderNet,
    weights: Weights<B>,
    factor: usize,
    depth: usize,
}

debug!(Decoder<B> { factor, depth } [B: CodecBackend]);

impl<B: CodecBackend> Decoder<B> {
    /// An SD-VAE of the published size with random weights, for measurements, and the multiply-adds of decoding a
    /// latent of `height` x `width`.
    #[doc(hidden)]
    pub fn random(b: &mut B, height: usize, width: usize) -> Result<(Self, u64)> {
        let config = sd_vae::SdVaeConfig::published();
        let (net, table) = sd_vae::Decoder::new(&config);
        let shapes: HashMap<_, _> = table.tensors().into_iter().collect();
        let weights = table.load(b, &mut |name| Ok(random(&shapes[name])))?;
        let macs = net.macs(&table, (height * width) as u64);
        let (factor, depth) = (config.factor(), table.len());
        Ok((Self { net: DecoderNet::SdVae(net), weights, factor, depth }, macs))
    }

    /// The picture of a latent [h, w, 4] as EDM2's networks see and make it; it is `factor` times as high and wide.
    ///
    /// # Errors
    /// The device's, or [`CodecError::Overflow`].
    ///
    /// # Panics
    /// If the values are not h * w * 4.
    pub fn decode(&self, b: &mut B, [height, width]: [usize; 2], latent: &[f32]) -> Result<Picture> {
        let mut raw = latent.to_vec();
        for pixel in raw.chunks_exact_mut(LATENTS) {
            for (c, x) in pixel.iter_mut().enumerate() {
                let (scale, shift) = scale_and_shift(c);
                *x = (*x - shift) / scale;
            }
        }
        let image = self.run(b, [height, width], &raw)?;
        let (rgb, finite) = b.download_rgb(&image, self.stretch())?;
        if !finite && raw.iter().all(|x| x.is_finite()) {
            return Err(CodecError::Overflow);
        }
        Ok(Picture::new(height * self.factor, width * self.factor, rgb))
    }

    /// The image of a latent [h, w, 4] without EDM2's scaling: [factor h, factor w, 3], in [0, 1], about.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// As [`Decoder::decode`].
    pub fn image(&self, b: &mut B, size: [usize; 2], raw: &[f32]) -> Result<Vec<f32>> {
        let image = self.run(b, size, raw)?;
        let [scale, shift] = self.stretch();
        Ok(b.download(&image)?.into_iter().map(|x| scale * x + shift).collect())
    }

    /// The scale and the shift of what the network makes.
    fn stretch(&self) -> [f32; 2] {
        match &self.net {
            DecoderNet::SdVae(_) => [1.0, 0.0],
            DecoderNet::Taesd(_) => [2.0, -1.0],
        }
    }

    fn run(&self, b: &mut B, [height, width]: [usize; 2], raw: &[f32]) -> Result<B::Tensor> {
        let scaled: Vec<f32>;
        let z = match &self.net {
            DecoderNet::SdVae(_) => raw,
            DecoderNet::Taesd(_) => {
                scaled = raw.iter().map(|x| x * TAESD_SCALE).collect();
                &scaled
            }
        };
        let body = &mut |b: &mut B, z: &[B::Tensor]| {
            Ok(vec![match &self.net {
                DecoderNet::SdVae(net) => net.forward(b, &self.weights, &z[0]),
                DecoderNet::Taesd(net) => net.forward(b, &self.weights, &z[0]),
            }])
        };
        let z = b.upload([1, height, width, LATENTS], z);
        Ok(b.planned::<BackendError>(&self.weights.plan, &[z], body)?.remove(0))
    }

    /// Convolutions of the network.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// The key of its plan on a device.
    #[doc(hidden)]
    pub fn plan(&self) -> CodecPlan {
        self.weights.plan
    }
}

/// The factor and the shift that EDM2 applies to a channel of raw latents, rounded as EDM2 rounds them.
pub(crate) fn scale_and_shift(channel: usize) -> (f32, f32) {
    let scale = FINAL_STD / RAW_STD[channel];
    (scale, -RAW_MEAN[channel] * scale)
}
