//! The architecture of an EDM2 U-Net, under the official option names, and its presets.
//!
//! Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
//! Models" (EDM2), appendix A, table 6 and figure 21.
//!
//! ```
//! use edm2k::model::config::{Config, preset};
//!
//! let xs = preset("edm2-img512-xs")?;
//! assert_eq!((xs.config.model_channels, xs.lr), (128, 0.0120));
//! let own = Config { num_blocks: 2, ..Config::new(32, 3, 10, 64) };
//! own.validate()?;
//! let refused = own.check_size(30, 32).unwrap_err(); // four levels halve it three times
//! assert!(refused.to_string().contains("30"), "{refused}");
//! # Ok::<(), edm2k::model::ConfigError>(())
//! ```

use serde::{Deserialize, Serialize};

use crate::formats::short;

/// Largest side of an image or latent.
pub const MAX_SIDE: usize = 1 << 16;

/// Architecture of one network. Serialised as JSON in the metadata of every model file.
///
/// Fields that the official snapshots leave at their defaults may be absent in the JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Nominal side length of the images; names the levels (`64x64`, `32x32`, ...) and is
    /// what `attn_resolutions` refers to. Actual heights and widths may differ.
    pub img_resolution: usize,
    /// Channels of the images or latents.
    pub img_channels: usize,
    /// Width of the condition vector; 0 = unconditional.
    pub label_dim: usize,
    /// Base width of the network.
    pub model_channels: usize,
    /// Width of each level, in units of `model_channels`.
    #[serde(default = "default_channel_mult")]
    pub channel_mult: Vec<usize>,
    /// Width of the Fourier features, in units of `model_channels`; default: that of the first level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_mult_noise: Option<usize>,
    /// Width of the embedding, in units of `model_channels`; default: that of the widest level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_mult_emb: Option<usize>,
    /// Residual blocks of each level in the encoder; the decoder has one more.
    #[serde(default = "default_num_blocks")]
    pub num_blocks: usize,
    /// Nominal resolutions of the levels whose blocks have self-attention.
    #[serde(default = "default_attn_resolutions")]
    pub attn_resolutions: Vec<usize>,
    /// Width of an attention head.
    #[serde(default = "default_channels_per_head")]
    pub channels_per_head: usize,
    /// Weight of the label against the noise embedding in their `mp_sum`.
    #[serde(default = "default_half")]
    pub label_balance: f64,
    /// Weight of the skip connection in `mp_cat`.
    #[serde(default = "default_half")]
    pub concat_balance: f64,
    /// Weight of the residual branch in `mp_sum`.
    #[serde(default = "default_balance")]
    pub res_balance: f64,
    /// Weight of the attention branch in `mp_sum`.
    #[serde(default = "default_balance")]
    pub attn_balance: f64,
    /// Activations are clipped to +- this at the end of each block.
    #[serde(default = "default_clip_act")]
    pub clip_act: f64,
    /// Standard deviation of the data.
    #[serde(default = "default_half")]
    pub sigma_data: f64,
    /// Fourier features of the learned uncertainty, `logvar`.
    #[serde(default = "default_logvar_channels")]
    pub logvar_channels: usize,
}

fn default_channel_mult() -> Vec<usize> {
    vec![1, 2, 3, 4]
}
fn default_num_blocks() -> usize {
    3
}
fn default_attn_resolutions() -> Vec<usize> {
    vec![16, 8]
}
pub(crate) fn default_channels_per_head() -> usize {
    64
}
fn default_half() -> f64 {
    0.5
}
pub(crate) fn default_balance() -> f64 {
    0.3
}
pub(crate) fn default_clip_act() -> f64 {
    256.0
}
fn default_logvar_channels() -> usize {
    128
}

/// Why a [`Config`] does not describe a network.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ConfigError {
    /// A field is out of range.
    #[error("{field} = {found}, expected {expected}")]
    Field { field: &'static str, found: String, expected: String },
    /// The image size does not suit the levels.
    #[error(
        "an image of {width}x{height} (width x height), expected both to be multiples of {multiple} for {levels} levels"
    )]
    Size { width: usize, height: usize, multiple: usize, levels: usize },
    /// The image is larger than any that is known here.
    #[error("an image of {width}x{height} (width x height), expected sides up to {MAX_SIDE}")]
    Large { width: usize, height: usize },
    /// No preset has this name.
    #[error("preset '{0}' is unknown, expected one of {1}")]
    Preset(String, String),
}

impl Config {
    /// EDM2's defaults at a given size and width.
    pub fn new(img_resolution: usize, img_channels: usize, label_dim: usize, width: usize) -> Self {
        Self {
            img_resolution,
            img_channels,
            label_dim,
            model_channels: width,
            channel_mult: default_channel_mult(),
            channel_mult_noise: None,
            channel_mult_emb: None,
            num_blocks: default_num_blocks(),
            attn_resolutions: default_attn_resolutions(),
            channels_per_head: default_channels_per_head(),
            label_balance: default_half(),
            concat_balance: default_half(),
            res_balance: default_balance(),
            attn_balance: default_balance(),
            clip_act: default_clip_act(),
            sigma_data: default_half(),
            logvar_channels: default_logvar_channels(),
        }
    }

    /// Width of each level in channels.
    pub fn level_channels(&self) -> Vec<usize> {
        self.channel_mult.iter().map(|m| m * self.model_channels).collect()
    }

    /// Width of the Fourier features of the noise level.
    pub fn noise_channels(&self) -> usize {
        match self.channel_mult_noise {
            Some(m) => m * self.model_channels,
            None => self.level_channels()[0],
        }
    }

    /// Width of the embedding.
    pub fn emb_channels(&self) -> usize {
        match self.channel_mult_emb {
            Some(m) => m * self.model_channels,
            None => self.level_channels().into_iter().max().unwrap_or(0),
        }
    }

    /// Checks every field, so that a config from a file can be trusted afterwards.
    ///
    /// # Errors
    /// [`ConfigError::Field`] names the first one with which there is no network, or none that a device can compute.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let range = |field, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(ConfigError::Field { field, found: value.to_string(), expected: format!("{low} to {high}") })
        };
        range("img_resolution", self.img_resolution, 1, MAX_SIDE)?;
        range("img_channels", self.img_channels, 1, 64)?;
        range("label_dim", self.label_dim, 0, 1 << 20)?;
        range("model_channels", self.model_channels, 8, 4096)?;
        range("number of levels (channel_mult)", self.channel_mult.len(), 1, 8)?;
        range("num_blocks", self.num_blocks, 1, 64)?;
        range("channels_per_head", self.channels_per_head, 1, 512)?;
        range("logvar_channels", self.logvar_channels, 1, 4096)?;
        let mults = self.channel_mult.iter().map(|m| ("channel_mult", m));
        let mults = mults.chain(self.channel_mult_noise.iter().map(|m| ("channel_mult_noise", m)));
        for (name, &m) in mults.chain(self.channel_mult_emb.iter().map(|m| ("channel_mult_emb", m))) {
            range(name, m, 1, 64)?;
        }
        let divisor = 1 << (self.channel_mult.len() - 1);
        if !self.img_resolution.is_multiple_of(divisor) {
            return Err(ConfigError::Field {
                field: "img_resolution",
                found: self.img_resolution.to_string(),
                expected: format!("a multiple of {divisor} for {} levels", self.channel_mult.len()),
            });
        }
        for (level, channels) in self.level_channels().into_iter().enumerate() {
            let last = level + 1 == self.channel_mult.len();
            let attends = last || self.attn_resolutions.contains(&(self.img_resolution >> level));
            if attends && !channels.is_multiple_of(self.channels_per_head) {
                return Err(ConfigError::Field {
                    field: "channels_per_head",
                    found: self.channels_per_head.to_string(),
                    expected: format!("a divisor of the {channels} channels of level {level}, which has attention"),
                });
            }
        }
        let unit = |field, value: f64| {
            if value > 0.0 && value < 1.0 {
                return Ok(());
            }
            Err(ConfigError::Field { field, found: short(value), expected: "a number between 0 and 1".into() })
        };
        unit("label_balance", self.label_balance)?;
        unit("concat_balance", self.concat_balance)?;
        unit("res_balance", self.res_balance)?;
        unit("attn_balance", self.attn_balance)?;
        // Devices compute in f32, and need the square of sigma_data.
        for (field, value, most) in [("clip_act", self.clip_act, 1e38), ("sigma_data", self.sigma_data, 1e6)] {
            if !(1e-6..=most).contains(&value) {
                let expected = format!("1e-6 to {most:e}");
                return Err(ConfigError::Field { field, found: short(value), expected });
            }
        }
        Ok(())
    }

    /// The fewest bytes that a forward pass of `images` holds at once on a CPU: the image, what the first level works on,
    /// what the encoder keeps for the decoder, and the scores of one head of attention, in f32.
    pub fn forward_bytes(&self, images: usize, height: usize, width: usize) -> u128 {
        let pixels = |level: usize| (height as u128 * width as u128) >> (2 * level);
        let kept = self.level_channels().into_iter().enumerate();
        let kept: u128 = kept.map(|(level, c)| pixels(level) * c as u128 * (self.num_blocks as u128 + 1)).sum();
        let first = pixels(0) * (4 * self.img_channels + 2 * self.level_channels()[0]) as u128;
        // The deepest level always attends, between encoder and decoder.
        let attends = |level: &usize| self.attn_resolutions.contains(&(self.img_resolution >> level));
        let deepest = self.channel_mult.len() - 1;
        let tokens = pixels((0..deepest).find(attends).unwrap_or(deepest));
        4 * (images as u128 * (first + kept) + tokens * tokens)
    }

    /// As [`Config::check_size`], of sizes [height, width].
    ///
    /// # Errors
    /// Those of the first that is wrong.
    pub fn check_sizes(&self, sizes: &[[usize; 2]]) -> Result<(), ConfigError> {
        sizes.iter().try_for_each(|[height, width]| self.check_size(*height, *width))
    }

    /// Checks that every level halves `height` x `width` (pixels of the image or latent) exactly.
    ///
    /// # Errors
    /// [`ConfigError::Size`]: it does not; [`ConfigError::Large`]: a side is longer than [`MAX_SIDE`].
    pub fn check_size(&self, height: usize, width: usize) -> Result<(), ConfigError> {
        if height.max(width) > MAX_SIDE {
            return Err(ConfigError::Large { width, height });
        }
        let levels = self.channel_mult.len();
        let multiple = 1 << (levels - 1);
        let fits = |n: usize| n > 0 && n.is_multiple_of(multiple);
        if fits(height) && fits(width) {
            return Ok(());
        }
        Err(ConfigError::Size { width, height, multiple, levels })
    }
}

/// A named configuration with the training settings of the EDM2 paper (table 6).
#[derive(Clone, Debug)]
pub struct Preset {
    /// Name as in the official code.
    pub name: &'static str,
    /// The network.
    pub config: Config,
    /// Height and width of the image or latent that it was made for.
    pub size: [usize; 2],
    /// Images per optimizer step.
    pub batch: usize,
    /// Reference learning rate.
    pub lr: f64,
    /// `edm2` schedule: the learning rate falls as 1/sqrt after this many batches.
    pub decay: f64,
    /// Mean of ln(sigma).
    pub p_mean: f64,
    /// Standard deviation of ln(sigma).
    pub p_std: f64,
    /// Share of the activations that are zeroed before each block's second convolution.
    pub dropout: f64,
    /// Images to train on.
    pub duration: u64,
    /// What the preset `1girl-xs` sets beyond EDM2's settings.
    pub recipe: Option<Recipe>,
}

/// The rest of a whole recipe of fine-tuning: the learning rate falls linearly to zero, without a ramp-up.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Images at a time.
    pub batch_gpu: u64,
}

/// Every preset: EDM2's of ImageNet-512 (latents) and ImageNet-64 (RGB), and `1girl-xs`,
/// EDM2-XS with a 1024-wide condition on 512x704 images (64x88 latents).
pub fn presets() -> Vec<Preset> {
    let img512 = [
        ("edm2-img512-xxs", 64, 0.0170, 2048),
        ("edm2-img512-xs", 128, 0.0120, 2048),
        ("edm2-img512-s", 192, 0.0100, 2048),
        ("edm2-img512-m", 256, 0.0090, 2048),
        ("edm2-img512-l", 320, 0.0080, 1792),
        ("edm2-img512-xl", 384, 0.0070, 1280),
        ("edm2-img512-xxl", 448, 0.0065, 896),
    ];
    let img64 = [
        ("edm2-img64-xs", 128, 0.0120, 1024),
        ("edm2-img64-s", 192, 0.0100, 1024),
        ("edm2-img64-m", 256, 0.0090, 2048),
        ("edm2-img64-l", 320, 0.0080, 1024),
        ("edm2-img64-xl", 384, 0.0070, 640),
    ];
    // M and larger.
    let dropout = |width| if width >= 256 { 0.1 } else { 0.0 };
    let latents = |(name, width, lr, duration): (_, _, _, u64)| Preset {
        name,
        config: Config::new(64, 4, 1000, width),
        size: [64, 64],
        batch: 2048,
        lr,
        decay: 70000.0,
        p_mean: -0.4,
        p_std: 1.0,
        dropout: dropout(width),
        duration: duration << 20,
        recipe: None,
    };
    let rgb = |(name, width, lr, duration)| {
        let config = Config::new(64, 3, 1000, width);
        Preset { config, decay: 35000.0, p_mean: -0.8, p_std: 1.6, ..latents((name, width, lr, duration)) }
    };
    let girl = Preset {
        config: Config::new(64, 4, 1024, 128),
        size: [88, 64],
        batch: 2000,
        decay: 0.0,
        duration: 11_000_000,
        recipe: Some(Recipe { batch_gpu: 40 }),
        ..latents(("1girl-xs", 128, 0.0120, 0))
    };
    img512.into_iter().map(latents).chain(img64.into_iter().map(rgb)).chain([girl]).collect()
}

/// The preset of this name.
///
/// # Errors
/// [`ConfigError::Preset`] names those that there are.
pub fn preset(name: &str) -> Result<Preset, ConfigError> {
    let all = presets();
    let names = all.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    all.into_iter().find(|p| p.name == name).ok_or(ConfigError::Preset(name.into(), names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid() {
        for p in presets() {
            p.config.validate().unwrap();
            p.config.check_size(p.size[0], p.size[1]).unwrap();
        }
    }

    #[test]
    fn config_survives_json_and_refuses_unknown_fields() {
        let c = preset("1girl-xs").unwrap().config;
        let json = serde_json::to_string(&c).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), c);
        let bad = json.replacen("\"img_resolution\"", "\"resolution\"", 1);
        assert!(serde_json::from_str::<Config>(&bad).is_err());
    }
}
