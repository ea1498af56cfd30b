//! `edm2k export`: a model file in the element type that one asks for, for the official code; or one of a checkpoint.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};

use edm2k::formats::safetensors::SafeFile;
use edm2k::formats::short;
use edm2k::model::{Model, Stored};
use edm2k::train::checkpoint::{self, Checkpoint};

use super::say::{note, out};

/// Write a model's weights for NVIDIA's code, or make a model from a run's checkpoint.
#[derive(clap::Args)]
#[command(
    after_help = "\
Model files already have the official names, shapes and order, and load in the same way; this one
writes them in f32 (exact) or f16 (half the size), checked. In NVIDIA's edm2 directory, in Python:

  f = safetensors.safe_open(\"FILE\", \"pt\")
  net = training.networks_edm2.Precond(**json.loads(f.metadata()[\"config\"]))
  net.load_state_dict({name: f.get_tensor(name) for name in f.keys()})

A checkpoint holds the weights and all their averages. What is made of one of these is the
snapshot that `edm2k train` would have written at that moment.

Examples:
  edm2k export runs/mine/snapshot-000200000-0.100.safetensors --out official.safetensors
  edm2k export --from-checkpoint runs/mine/checkpoint-000204800.safetensors --ema 0.10 \\
      --out now.safetensors",
    group(clap::ArgGroup::new("source").required(true))
)]
pub struct ExportArgs {
    /// Model file
    #[arg(value_name = "MODEL", group = "source")]
    model: Option<PathBuf>,
    /// Checkpoint of a run instead
    #[arg(long, value_name = "FILE", group = "source")]
    from_checkpoint: Option<PathBuf>,
    /// Width of the average to take of a checkpoint, or `none` for the weights themselves [default: the run's first]
    #[arg(long, value_name = "STD", value_parser = parse_average)]
    ema: Option<Average>,
    /// The model, .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Element type [default: f32; of a checkpoint f16, as snapshots have it]
    #[arg(long, value_name = "TYPE", value_enum)]
    dtype: Option<Stored>,
    /// Overwrite an existing file
    #[arg(long)]
    overwrite: bool,
}

/// What to take of a checkpoint.
#[derive(Clone, Copy, Debug)]
enum Average {
    Std(f64),
    Weights,
}

fn parse_average(text: &str) -> Result<Average, String> {
    match text.parse() {
        _ if text == "none" => Ok(Average::Weights),
        Ok(std) => Ok(Average::Std(std)),
        Err(_) => Err("expected a width such as 0.10, or none".into()),
    }
}

/// Writes the model; what it is goes to stdout.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    // A model may be replaced by itself in another precision. A checkpoint may not be: it holds more than a model.
    let checkpoint: Vec<&Path> = args.from_checkpoint.iter().map(PathBuf::as_path).collect();
    ensure!(
        args.ema.is_none() || args.from_checkpoint.is_some(),
        "--ema says which average of a checkpoint to take: give --from-checkpoint, not a model, which has one"
    );
    let _claim = super::claim_tensors(&args.out, args.overwrite, &checkpoint)?;
    let (model, usual) = match (&args.model, &args.from_checkpoint) {
        (_, Some(path)) => (of_checkpoint(path, args.ema)?, Stored::F16),
        (Some(path), None) => (Model::load(path)?, Stored::F32),
        (None, None) => bail!("give a model, or --from-checkpoint"),
    };
    model.doubts.iter().for_each(|doubt| note!("warning: {doubt}"));
    let dtype = args.dtype.unwrap_or(usual);
    model.save(&args.out, dtype)?;
    out!("exported {} tensors: {}", model.table.len(), args.out.display());
    Ok(())
}

fn of_checkpoint(path: &Path, wanted: Option<Average>) -> anyhow::Result<Model> {
    let shown = path.display();
    ensure!(checkpoint::is_one(&SafeFile::open(path)?), "{shown}: no checkpoint of a run, expected one");
    let checkpoint = Checkpoint::open(path)?;
    let averages = &checkpoint.state.settings.ema;
    let average = match wanted {
        Some(Average::Weights) => None,
        None => (!averages.is_empty()).then_some(0),
        Some(Average::Std(std)) => match averages.iter().position(|&known| known == std) {
            Some(place) => Some(place),
            None => bail!("--ema {}: the averages in {shown} are {averages:?}", short(std)),
        },
    };
    Ok(checkpoint.model(average)?)
}
