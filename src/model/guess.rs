//! The config of a network of which only the tensors are known. Their shapes tell a part of it; the rest is EDM2's
//! defaults (width of the attention heads, balances, clip, sigma_data).

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{Config, ConfigError, default_channels_per_head};
use super::error::{ModelError, OtherFile};
use crate::formats::json;
use crate::formats::safetensors::{SafeError, SafeFile};

/// The official name of a tensor that every network has.
const KNOWN: &str = "unet.emb_fourier.freqs";

/// A network of which only the tensors are known.
pub struct Guessed {
    /// Its tensors, under their official names.
    pub file: SafeFile,
    pub config: Config,
    /// What the file leaves open, and was decided.
    pub doubts: Vec<String>,
}

/// The network of a file without a config, with options that are `given` over what is read and assumed.
///
/// # Errors
/// There is none, it is something else, or [`ModelError::Given`].
pub fn guessed(path: &Path, file: SafeFile, given: &Map<String, Value>) -> Result<Guessed, ModelError> {
    let missing = || match OtherFile::of(&file) {
        Some(what) => ModelError::Other { path: path.into(), what },
        None => {
            let what = "it is missing, so this is not a model file".into();
            ModelError::Metadata { path: path.into(), key: "config", what }
        }
    };
    let bare = !file.metadata().contains_key("edm2k");
    let (prefix, others) = prefix(&file).filter(|_| bare).ok_or_else(missing)?;
    let mut doubts = Vec::new();
    if !others.is_empty() {
        doubts.push(format!("its network is that of '{prefix}', not '{}'", others.join("', '")));
    }
    let file = file.renamed(|name| name.strip_prefix(&prefix).map(str::to_owned));
    let wrong = |what| ModelError::Given { path: path.into(), what };
    let read = options(&file, given)?.to_string();
    let config: Config = json::object(&read).map_err(|e| wrong(e.to_string()))?;
    let assumed = !given.contains_key(HEADS);
    let of_heads = |cause: &ConfigError| matches!(cause, ConfigError::Field { field, .. } if *field == HEADS);
    config.validate().map_err(|cause| match cause {
        cause if assumed && of_heads(&cause) => ModelError::Heads { path: path.into(), cause },
        cause if given.is_empty() => ModelError::Config { path: path.into(), cause },
        cause => wrong(cause.to_string()),
    })?;
    if assumed {
        doubts.push(format!(
            "it does not say how wide attention heads are, {} is assumed, as in EDM2; `edm2k import` with a config sets \
             another width",
            config.channels_per_head
        ));
    }
    Ok(Guessed { file, config, doubts })
}

/// What stands before the official names of the network that is taken, and before those of the file's other networks;
/// `None` if there is no EDM2 network. An average of weights is taken rather than the weights.
fn prefix(file: &SafeFile) -> Option<(String, Vec<String>)> {
    let mut all: Vec<String> = file.names().filter_map(|name| Some(name.strip_suffix(KNOWN)?.to_owned())).collect();
    all.sort_by_key(|prefix| !prefix.split(['.', '_']).any(|word| word == "ema"));
    let others = all.split_off(all.len().min(1));
    Some((all.pop()?, others))
}

/// The option that says how wide attention heads are, which no tensor's shape tells.
const HEADS: &str = "channels_per_head";

/// The config, in JSON, of a network in official names. An error if a tensor is missing, or has too few sides; the caller
/// checks all of them, and the options.
fn options(file: &SafeFile, given: &Map<String, Value>) -> Result<Value, SafeError> {
    let side = |name: &str, at: usize| -> Result<usize, SafeError> {
        let shape = file.shape(name)?;
        shape.get(at).copied().ok_or_else(|| file.unexpected(name, format!("shape {shape:?}"), "more sides"))
    };
    // unet.enc.64x64_conv.weight and unet.enc.64x64_block0.conv_res1.weight
    let of_level = |name: &str| -> Option<usize> {
        let (resolution, other) = name.strip_prefix("unet.enc.")?.split_once('_')?.0.split_once('x')?;
        (resolution == other).then(|| resolution.parse().ok())?
    };
    let mut levels: Vec<usize> = file.names().filter_map(of_level).collect();
    levels.sort_unstable_by(|a, b| b.cmp(a));
    levels.dedup();
    let first = levels.first().copied().unwrap_or(1);
    let block = |resolution: usize, number: usize| format!("unet.enc.{resolution}x{resolution}_block{number}");
    let mut widths = Vec::new();
    for &resolution in &levels {
        widths.push(side(&format!("{}.conv_res1.weight", block(resolution, 0)), 0)?.max(1));
    }
    let (noise, emb) = (side("unet.emb_fourier.freqs", 0)?, side("unet.emb_noise.weight", 0)?);
    // The largest width of which all others are whole multiples: that of the first level, or less.
    let width = widths.iter().copied().chain([noise, emb]).fold(0, gcd).max(1);
    let attends = |&&resolution: &&usize| {
        (0..64).any(|number| file.contains(&format!("{}.attn_qkv.weight", block(resolution, number))))
    };
    let blocks = (0..64).take_while(|&number| file.contains(&format!("{}.conv_res0.weight", block(first, number))));
    let label = "unet.emb_label.weight";
    let mut config = json!({
        HEADS: default_channels_per_head(),
        "img_resolution": first,
        "img_channels": side("unet.out_conv.weight", 0)?,
        "label_dim": if file.contains(label) { side(label, 1)? } else { 0 },
        "model_channels": width,
        "channel_mult": widths.iter().map(|w| w / width).collect::<Vec<_>>(),
        "channel_mult_noise": noise / width,
        "channel_mult_emb": emb / width,
        "num_blocks": blocks.count(),
        "attn_resolutions": levels.iter().filter(attends).collect::<Vec<_>>(),
        "logvar_channels": side("logvar_fourier.freqs", 0)?,
    });
    given.iter().for_each(|(option, value)| config[option] = value.clone());
    Ok(config)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
