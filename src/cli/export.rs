//! `edm2k export`: a model file in the element type that one asks for, for the official code.

use std::path::PathBuf;

use edm2k::model::file::save;
use edm2k::model::{Model, Precision};

use super::say::out;

/// Write a model's weights for NVIDIA's code.
#[derive(clap::Args)]
#[command(after_help = "\
Model files already have the official names, shapes and order, and load in the same way; this one writes
them in f32 (exact) or f16 (half the size), checked. In NVIDIA's edm2 directory, in Python:

  f = safetensors.safe_open(\"FILE\", \"pt\"); net = training.networks_edm2.Precond(**json.loads(f.metadata()[\"config\"]))
  net.load_state_dict({name: f.get_tensor(name) for name in f.keys()})

Example:
  edm2k export runs/mine/snapshot-000200000-0.100.safetensors --out official.safetensors")]
pub struct ExportArgs {
    /// Model file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The exported weights, .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Element type
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    /// Overwrite an existing file
    #[arg(long)]
    overwrite: bool,
}

/// Writes the weights; what they are goes to stdout.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    let _claim = super::claim(&args.out, args.overwrite)?;
    let model = Model::load(&args.model)?;
    save(&args.out, &model.net.config, &model.meta, &model.table, &model.weights, args.dtype)?;
    out!("exported {} tensors: {}", model.table.len(), args.out.display());
    Ok(())
}
