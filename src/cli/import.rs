//! `edm2k import`: a snapshot of NVIDIA's EDM2, or weights alone, become a model file.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use edm2k::formats::safetensors::SafeError;
use edm2k::formats::{input, json};
use edm2k::model::{Config, Model, ModelError, ModelFile, OfficialSnapshot, Stored};

use super::say::{note, out};

/// Make a model file from one of NVIDIA's network snapshots, or from a state_dict.
#[derive(clap::Args)]
#[command(after_help = "\
Reads the pickle as data: nothing in it is run. The weights stay as they are, in half precision if
they are. Images seen and width of the moving average are taken from a file name that ends as
NVIDIA's do, in thousands of images and relative width: ...-2147483-0.135.pkl.

A state_dict (.safetensors, .pt, .pth, .bin, .pkl) needs no import, but says nothing of the
network beside its shapes: every command assumes EDM2's attention heads of 64 channels, and says
so. --config is a JSON object of what is otherwise, such as {\"channels_per_head\": 32}, also
label_balance, concat_balance, res_balance, attn_balance, clip_act and sigma_data; the model that
is made knows it.

Examples:
  edm2k import edm2-img512-xs-2147483-0.135.pkl --out edm2-img512-xs.safetensors
  edm2k import edm2-img512-xs-2147483-0.135.pkl --condition-dim 1024 --out start.safetensors
  edm2k train --init start.safetensors --data data/mine --outdir runs/mine
  edm2k import weights.pt --config heads.json --out model.safetensors")]
pub struct ImportArgs {
    /// Snapshot, .pkl; or with --config a state_dict
    #[arg(value_name = "SNAPSHOT")]
    snapshot: PathBuf,
    /// The model, .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What the shapes of a state_dict do not tell, as a JSON object of the options that `train --config` takes
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Put a fresh embedding of conditions of this width in the place of the class embedding, for fine-tuning
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    condition_dim: Option<u32>,
    /// Overwrite an existing model
    #[arg(long)]
    overwrite: bool,
}

/// Writes the model; what it is goes to stdout.
pub fn run(args: ImportArgs) -> anyhow::Result<()> {
    let inputs: Vec<&Path> = [&args.snapshot].into_iter().chain(&args.config).map(PathBuf::as_path).collect();
    let _claim = super::claim_tensors(&args.out, args.overwrite, &inputs)?;
    let (mut model, stored) = match &args.config {
        Some(config) => bare(&args.snapshot, config)?,
        None if input::is_safetensors(&args.snapshot) => bail!(
            "{}: a safetensors file, expected a snapshot; a model and the weights of a network alone are read as they are, and \
             --config says what the shapes of weights do not tell",
            args.snapshot.display()
        ),
        None => {
            let OfficialSnapshot { model, stored } = OfficialSnapshot::open(&args.snapshot)?;
            (model, stored)
        }
    };
    model.doubts.iter().for_each(|doubt| note!("warning: {doubt}"));
    let classes = model.net.config.label_dim;
    if let Some(width) = args.condition_dim {
        // The model is first made one without labels, so that the embedding is a fresh one even if its width stays the
        // same.
        let meta = model.meta.clone();
        for label_dim in [0, width as usize] {
            let config = Config { label_dim, ..model.net.config.clone() };
            (model, _) = model.adapt(&config, 0)?;
        }
        model.meta = meta;
        out!("unet.emb_label.weight is fresh: conditions of {width} values instead of {classes}");
    }
    model.save(&args.out, stored)?;
    let millions = model.table.trained_values() as f64 / 1e6;
    out!("imported a network of {millions:.1} M parameters: {}", args.out.display());
    Ok(())
}

/// A state_dict, of whose network a config says what its shapes do not tell.
fn bare(path: &Path, config: &Path) -> anyhow::Result<(Model, Stored)> {
    let of_config = || format!("--config {}", config.display());
    let text = input::text(config).with_context(of_config)?;
    let given: Map<String, Value> = json::object(&text).with_context(of_config)?;
    // What is wrong with the file itself is no fault of the config.
    let file = ModelFile::open_with(path, &given).map_err(|why| match why {
        ModelError::File(
            SafeError::Io(_) | SafeError::Malformed { .. } | SafeError::Torch { .. } | SafeError::Tensor { .. },
        )
        | ModelError::Metadata { .. }
        | ModelError::Other { .. }
        | ModelError::Checkpoint { .. }
        | ModelError::Heads { .. } => anyhow::Error::from(why),
        why => anyhow::Error::from(why).context(of_config()),
    })?;
    let stored = file.stored();
    Ok((Model::read(file)?, stored))
}
