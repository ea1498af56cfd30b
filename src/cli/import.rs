//! `edm2k import`: a snapshot of NVIDIA's EDM2 becomes a model file.

use std::path::PathBuf;

use edm2k::model::file::save;
use edm2k::model::{Config, Snapshot};

use super::say::out;

/// Make a model file from one of NVIDIA's network snapshots.
#[derive(clap::Args)]
#[command(after_help = "\
Reads the pickle as data: nothing in it is run. The weights stay as they are, in half precision if they are.
Images seen and width of the moving average are taken from a file name that ends as NVIDIA's do,
in thousands of images and relative width: ...-2147483-0.135.pkl.

Examples:
  edm2k import edm2-img512-xs-2147483-0.135.pkl --out edm2-img512-xs.safetensors
  edm2k import edm2-img512-xs-2147483-0.135.pkl --condition-dim 1024 --out start.safetensors
  edm2k train --init start.safetensors --data data/mine --outdir runs/mine")]
pub struct ImportArgs {
    /// Snapshot, .pkl
    #[arg(value_name = "SNAPSHOT")]
    snapshot: PathBuf,
    /// The model, .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Put a fresh embedding of conditions of this width in the place of the class embedding, for fine-tuning
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    condition_dim: Option<u32>,
    /// Overwrite an existing model
    #[arg(long)]
    overwrite: bool,
}

/// Writes the model; what it is goes to stdout.
pub fn run(args: ImportArgs) -> anyhow::Result<()> {
    let _claim = super::claim(&args.out, args.overwrite, &[&args.snapshot])?;
    let Snapshot { mut model, precision } = Snapshot::open(&args.snapshot)?;
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
    save(&args.out, &model.net.config, &model.meta, &model.table, &model.weights, precision)?;
    let millions = model.table.trained_values() as f64 / 1e6;
    out!("imported a network of {millions:.1} M parameters: {}", args.out.display());
    Ok(())
}
