//! The autoencoder of Stable Diffusion (AutoencoderKL; Rombach et al. 2022), under the names of the `diffusers`
//! library. Levels, widths and blocks follow from the file.
//!
//! ```text
//! encoder  conv 3->c0; levels of `layers` resnets, each but the last ending in a conv of stride 2 (zeros right
//!          and below); resnet, attention, resnet; silu(norm), conv ->8; 1x1 ("quant_conv"): mean, log variance
//! decoder  1x1 ("post_quant_conv"); conv 4->c_last; resnet, attention, resnet; levels of `layers` + 1 resnets
//!          from the widest on, each but the last ending in a conv of the image enlarged by two;
//!          silu(norm), conv ->3
//! resnet   y = conv2(silu(norm2(conv1(silu(norm1(x)))))) + x, x through a 1x1 conv where the widths differ
//! ```
//!
//! Cost of the published size (84 M parameters) decoding to 512x704: 1.5 T multiply-adds; activations 0.75 GB in
//! f32, the 256 channels of the last level and what becomes of them.

use super::CodecError;
use super::layers::{ConvId, GROUPS, Layers, NormId, Weights, count};
use crate::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};
use crate::formats::safetensors::SafeFile;

/// Channels of an image.
const PIXELS: usize = 3;
/// Channels of a latent.
pub const LATENTS: usize = 4;

/// The most levels of an autoencoder. The published one has 4.
const MAX_LEVELS: usize = 8;

/// What stands before an autoencoder's names in a checkpoint of Stable Diffusion.
pub const PART: &str = "first_stage_model.";

/// Renames the tensors of a file to the names of `diffusers`, if they have those of the latent diffusion model's
/// authors (`encoder.down.0.block.0`). Before these may stand `first_stage_model.`; then the rest of the file is left
/// out. Other files stay as they are.
pub fn known_names(file: SafeFile) -> SafeFile {
    let whole = file.names().any(|name| name.starts_with(PART));
    let file = if whole { file.renamed(|name| name.strip_prefix(PART).map(str::to_owned)) } else { file };
    if !file.contains("encoder.down.0.block.0.norm1.weight") {
        return file;
    }
    let levels = count(&file, "decoder.up.", ".block.0.norm1.weight");
    file.renamed(|name| renamed(name, levels))
}

/// The name that `diffusers` has for it; none for what only a network in training has.
fn renamed(name: &str, levels: usize) -> Option<String> {
    if ["loss.", "model_ema."].iter().any(|other| name.starts_with(other)) {
        return None;
    }
    let parts: Vec<&str> = name.split('.').collect();
    let of_resnet = |part: &[&str]| match part {
        ["nin_shortcut", rest @ ..] => format!("conv_shortcut.{}", rest.join(".")),
        other => other.join("."),
    };
    Some(match parts[..] {
        [side, "down", level, "block", block, ref rest @ ..] => {
            format!("{side}.down_blocks.{level}.resnets.{block}.{}", of_resnet(rest))
        }
        [side, "down", level, "downsample", ref rest @ ..] => {
            format!("{side}.down_blocks.{level}.downsamplers.0.{}", rest.join("."))
        }
        // The authors count levels from the image on, `diffusers` from the latent on.
        [side, "up", level, what, ref rest @ ..] => {
            let level = levels.checked_sub(level.parse::<usize>().ok()? + 1)?;
            match (what, rest) {
                ("block", [block, rest @ ..]) => {
                    format!("{side}.up_blocks.{level}.resnets.{block}.{}", of_resnet(rest))
                }
                ("upsample", rest) => format!("{side}.up_blocks.{level}.upsamplers.0.{}", rest.join(".")),
                _ => name.into(),
            }
        }
        [side, "mid", "block_1", ref rest @ ..] => format!("{side}.mid_block.resnets.0.{}", of_resnet(rest)),
        [side, "mid", "block_2", ref rest @ ..] => format!("{side}.mid_block.resnets.1.{}", of_resnet(rest)),
        [side, "mid", "attn_1", part, end] => {
            let part = match part {
                "norm" => "group_norm",
                "q" => "to_q",
                "k" => "to_k",
                "v" => "to_v",
                "proj_out" => "to_out.0",
                other => other,
            };
            format!("{side}.{ATTENTION}.{part}.{end}")
        }
        [side, "norm_out", end] => format!("{side}.conv_norm_out.{end}"),
        _ => name.into(),
    })
}

/// How the linear layers of the attention are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `query`, `key`, `value`, `proj_attn`: files from the days of Stable Diffusion 1.
    Old,
    /// `to_q`, `to_k`, `to_v`, `to_out.0`.
    New,
}

/// What differs between two SD-VAEs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SdVaeConfig {
    /// `block_out_channels`: width of each level, from the image on; multiples of 32.
    pub channels: Vec<usize>,
    /// `layers_per_block`: resnets of a level of the encoder; the decoder has one more.
    pub layers: usize,
    /// How the attention's layers are called.
    pub naming: Naming,
}

impl SdVaeConfig {
    /// The config of stabilityai/sd-vae-ft-mse and of all autoencoders of Stable Diffusion 1 and 2.
    pub fn published() -> Self {
        Self { channels: vec![128, 256, 512, 512], layers: 2, naming: Naming::New }
    }

    /// The config that a file's tensors imply.
    ///
    /// # Errors
    /// If it has no level at all, or one whose width is no multiple of 32.
    pub fn of(file: &SafeFile) -> Result<Self, CodecError> {
        let first = |level| format!("encoder.down_blocks.{level}.resnets.0.conv1.weight");
        let levels = count(file, "encoder.down_blocks.", ".resnets.0.conv1.weight").max(1);
        if levels > MAX_LEVELS {
            let name = format!("encoder.down_blocks.{MAX_LEVELS}.resnets.0.conv1.weight");
            return Err(file.unexpected(&name, "a level", format!("{MAX_LEVELS} levels at most")).into());
        }
        let mut channels = Vec::new();
        for level in 0..levels {
            let shape = file.shape(&first(level))?;
            match shape {
                &[cout, _, 3, 3] if cout > 0 && cout.is_multiple_of(GROUPS) => channels.push(cout),
                _ => {
                    let expected = format!("[a multiple of {GROUPS}, _, 3, 3]");
                    return Err(file.unexpected(&first(level), format!("shape {shape:?}"), expected).into());
                }
            }
        }
        let layers = count(file, "encoder.down_blocks.0.resnets.", ".conv1.weight");
        let new = ["encoder", "decoder"].iter().any(|side| file.contains(&format!("{side}.{ATTENTION}.to_q.weight")));
        Ok(Self { channels, layers, naming: if new { Naming::New } else { Naming::Old } })
    }

    /// Pixels of the image for one of the latent, in each direction.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// As an error calls it.
    pub fn describe(&self) -> String {
        format!("an SD-VAE of block_out_channels {:?} and layers_per_block {}", self.channels, self.layers)
    }
}

const ATTENTION: &str = "mid_block.attentions.0";

struct Resnet {
    norm1: NormId,
    conv1: ConvId,
    norm2: NormId,
    conv2: ConvId,
    shortcut: Option<ConvId>,
}

impl Resnet {
    fn new(t: &mut Layers, name: &str, cin: usize, cout: usize) -> Self {
        Self {
            norm1: t.norm(format!("{name}.norm1"), cin),
            conv1: t.conv(format!("{name}.conv1"), cin, cout, Reach::Same),
            norm2: t.norm(format!("{name}.norm2"), cout),
            conv2: t.conv(format!("{name}.conv2"), cout, cout, Reach::Same),
            shortcut: (cin != cout).then(|| t.conv(format!("{name}.conv_shortcut"), cin, cout, Reach::Point)),
        }
    }

    /// Takes ownership of `x`, so that its memory is freed, or overwritten with the result, as early as possible.
    fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: B::Tensor) -> B::Tensor {
        let h = w.norm_silu_conv(b, self.norm1, self.conv1, &x, Epilogue::NOTHING);
        let residual = match self.shortcut {
            Some(shortcut) => w.conv_alone(b, shortcut, &x),
            None => x,
        };
        w.norm_silu_conv(b, self.norm2, self.conv2, &h, Epilogue::add(residual))
    }

    fn macs(&self, t: &Layers, pixels: u64) -> u64 {
        let convs = [Some(self.conv1), Some(self.conv2), self.shortcut];
        convs.into_iter().flatten().map(|id| t.macs(id) * pixels).sum()
    }
}

/// Resnet, attention, resnet.
struct Middle {
    resnets: [Resnet; 2],
    norm: NormId,
    qkv: ConvId,
    proj: ConvId,
}

impl Middle {
    fn new(t: &mut Layers, side: &str, channels: usize, naming: Naming) -> Self {
        let first = Resnet::new(t, &format!("{side}.mid_block.resnets.0"), channels, channels);
        let attention = format!("{side}.{ATTENTION}");
        let (qkv, proj) = match naming {
            Naming::Old => (["query", "key", "value"], "proj_attn"),
            Naming::New => (["to_q", "to_k", "to_v"], "to_out.0"),
        };
        let norm = t.norm(format!("{attention}.group_norm"), channels);
        let qkv = t.linear(qkv.map(|part| format!("{attention}.{part}")).into(), channels, channels);
        let proj = t.linear(vec![format!("{attention}.{proj}")], channels, channels);
        let second = Resnet::new(t, &format!("{side}.mid_block.resnets.1"), channels, channels);
        Self { resnets: [first, second], norm, qkv, proj }
    }

    fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: B::Tensor) -> B::Tensor {
        let x = self.resnets[0].forward(b, w, x);
        let affine = w.norm(b, self.norm, &x);
        let qkv = w.conv(b, self.qkv, &x, Prologue::Affine(&affine), Epilogue::NOTHING);
        let y = b.self_attention(&qkv);
        drop(qkv);
        let x = w.conv(b, self.proj, &y, Prologue::Nothing, Epilogue::add(x));
        self.resnets[1].forward(b, w, x)
    }

    fn macs(&self, t: &Layers, pixels: u64) -> u64 {
        let scores = 2 * pixels * t.cout(self.proj) as u64;
        let linear = t.macs(self.qkv) + t.macs(self.proj);
        self.resnets.iter().map(|r| r.macs(t, pixels)).sum::<u64>() + (linear + scores) * pixels
    }
}

/// Resnets of one width, then perhaps a convolution to another size.
struct Level {
    resnets: Vec<Resnet>,
    resize: Option<ConvId>,
}

impl Level {
    fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, mut x: B::Tensor) -> B::Tensor {
        for resnet in &self.resnets {
            x = resnet.forward(b, w, x);
        }
        if let Some(resize) = self.resize {
            b.trim();
            x = w.conv_alone(b, resize, &x);
        }
        x
    }
}

/// Images to latents.
pub struct Encoder {
    conv_in: ConvId,
    levels: Vec<Level>,
    middle: Middle,
    norm_out: NormId,
    conv_out: ConvId,
    quant: ConvId,
}

impl Encoder {
    /// The encoder of a config, and its layers.
    pub fn new(config: &SdVaeConfig) -> (Self, Layers) {
        let mut t = Layers::default();
        let mut width = config.channels[0];
        let conv_in = t.conv("encoder.conv_in", PIXELS, width, Reach::Same);
        let mut levels = Vec::new();
        for (i, &channels) in config.channels.iter().enumerate() {
            let name = format!("encoder.down_blocks.{i}");
            let mut resnets = Vec::new();
            for j in 0..config.layers {
                resnets.push(Resnet::new(&mut t, &format!("{name}.resnets.{j}"), width, channels));
                width = channels;
            }
            let last = i + 1 == config.channels.len();
            let resize = (!last).then(|| t.conv(format!("{name}.downsamplers.0.conv"), width, width, Reach::Down));
            levels.push(Level { resnets, resize });
        }
        let middle = Middle::new(&mut t, "encoder", width, config.naming);
        let norm_out = t.norm("encoder.conv_norm_out", width);
        let conv_out = t.conv("encoder.conv_out", width, 2 * LATENTS, Reach::Same);
        let quant = t.conv("quant_conv", 2 * LATENTS, 2 * LATENTS, Reach::Point);
        (Self { conv_in, levels, middle, norm_out, conv_out, quant }, t)
    }

    /// Pixels [n, h, w, 3], height and width multiples of the factor, to the result before and after `quant_conv`:
    /// [n, h, w, 8] each, four channels of means, four of log variances.
    pub fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: &B::Tensor) -> [B::Tensor; 2] {
        let mut x = w.conv_alone(b, self.conv_in, x);
        for level in &self.levels {
            x = level.forward(b, w, x);
        }
        let x = self.middle.forward(b, w, x);
        let out = w.norm_silu_conv(b, self.norm_out, self.conv_out, &x, Epilogue::NOTHING);
        let moments = w.conv_alone(b, self.quant, &out);
        b.trim();
        [out, moments]
    }
}

/// Latents to images.
pub struct Decoder {
    post_quant: ConvId,
    conv_in: ConvId,
    middle: Middle,
    levels: Vec<Level>,
    norm_out: NormId,
    conv_out: ConvId,
}

impl Decoder {
    /// The decoder of a config, and its layers.
    pub fn new(config: &SdVaeConfig) -> (Self, Layers) {
        let mut t = Layers::default();
        let post_quant = t.conv("post_quant_conv", LATENTS, LATENTS, Reach::Point);
        let mut width = config.channels[config.channels.len() - 1];
        let conv_in = t.conv("decoder.conv_in", LATENTS, width, Reach::Same);
        let middle = Middle::new(&mut t, "decoder", width, config.naming);
        let mut levels = Vec::new();
        for (i, &channels) in config.channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{i}");
            let mut resnets = Vec::new();
            for j in 0..=config.layers {
                resnets.push(Resnet::new(&mut t, &format!("{name}.resnets.{j}"), width, channels));
                width = channels;
            }
            let last = i + 1 == config.channels.len();
            let resize = (!last).then(|| t.conv(format!("{name}.upsamplers.0.conv"), width, width, Reach::Double));
            levels.push(Level { resnets, resize });
        }
        let norm_out = t.norm("decoder.conv_norm_out", width);
        let conv_out = t.conv("decoder.conv_out", width, PIXELS, Reach::Same);
        (Self { post_quant, conv_in, middle, levels, norm_out, conv_out }, t)
    }

    /// Latents [n, h, w, 4] to pixels [n, factor h, factor w, 3].
    pub fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, z: &B::Tensor) -> B::Tensor {
        let z = w.conv_alone(b, self.post_quant, z);
        let x = w.conv_alone(b, self.conv_in, &z);
        let mut x = self.middle.forward(b, w, x);
        for level in &self.levels {
            x = level.forward(b, w, x);
        }
        let image = w.norm_silu_conv(b, self.norm_out, self.conv_out, &x, Epilogue::NOTHING);
        drop(x);
        b.trim();
        image
    }

    /// Multiply-adds of decoding `pixels` latent pixels; of enlarged images those of the original's pixels.
    pub fn macs(&self, t: &Layers, mut pixels: u64) -> u64 {
        let mut macs = (t.macs(self.post_quant) + t.macs(self.conv_in)) * pixels + self.middle.macs(t, pixels);
        for level in &self.levels {
            macs += level.resnets.iter().map(|resnet| resnet.macs(t, pixels)).sum::<u64>();
            if let Some(resize) = level.resize {
                pixels *= 4;
                macs += t.macs(resize) * pixels;
            }
        }
        macs + t.macs(self.conv_out) * pixels
    }
}
