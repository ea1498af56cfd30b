//! `edm2k ema`: moving averages of any width, made from the snapshots of a run after it.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use edm2k::model::ModelFile;
use edm2k::train::check_widths;
use edm2k::train::ema::name_of;
use edm2k::train::files::snapshots;
use edm2k::train::posthoc::Reconstruction;

use super::claim;
use super::say::{self, out};
use super::train::parse_images;

/// Make moving averages of other widths from a run's snapshots (post-hoc EMA).
#[derive(clap::Args)]
#[command(after_help = "\
Snapshots of two widths at ten times or more are enough for widths from 0.02 to 0.25. How well the
average that was asked for is met is printed with each file: 0 % is exactly, 10 % is fair.

Examples:
  edm2k ema runs/mine --std 0.05,0.10,0.15 --out averages
  edm2k ema runs/mine/snapshot-*.safetensors --std 0.08 --at 200k --out averages")]
pub struct EmaArgs {
    /// Snapshots, or directories of runs: all snapshots in them
    #[arg(value_name = "RUN|FILE", required = true)]
    snapshots: Vec<PathBuf>,
    /// Widths: relative standard deviations of the averages
    #[arg(long, value_name = "STD,...", value_delimiter = ',', required = true)]
    std: Vec<f64>,
    /// Directory of the model files; created if it is missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Images seen when the averages end; there must be a snapshot then [default: the last]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    at: Option<u64>,
    /// Overwrite existing files
    #[arg(long)]
    overwrite: bool,
}

/// Writes the files, showing progress on stderr and what was written on stdout.
pub fn run(args: EmaArgs) -> anyhow::Result<()> {
    check_widths("--std", &args.std)?;
    let mut snapshots = Vec::new();
    for path in &args.snapshots {
        match path.is_dir() {
            true => snapshots.extend(list(path)?),
            false => snapshots.push(path.clone()),
        }
    }
    let inputs: Vec<&Path> = snapshots.iter().map(PathBuf::as_path).collect();
    let files = snapshots.iter().map(ModelFile::open).collect::<Result<Vec<_>, _>>()?;
    let job = Reconstruction::new(files, &args.std, args.at)?;
    let paths: Vec<PathBuf> = args.std.iter().map(|&std| args.out.join(file_name(job.at(), std))).collect();
    std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    let _claims = paths.iter().map(|path| claim(path, args.overwrite, &inputs)).collect::<Result<Vec<_>, _>>()?;

    let bar = say::bar(job.values(), "{human_pos} of {human_len} values, {per_sec}, {eta} left");
    job.write(&paths, &mut |values| bar.inc(values))?;
    bar.finish_and_clear();
    for ((path, std), missed) in paths.iter().zip(&args.std).zip(job.mismatch()) {
        let (at, from, missed) = (job.at(), job.snapshots(), 100.0 * missed);
        out!("{}: std {std} at {at} images, from {from} snapshots, {missed:.1} % off", path.display());
    }
    Ok(())
}

/// The snapshots in the directory of a run, in order.
fn list(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let found = snapshots(dir).with_context(|| dir.display().to_string())?;
    ensure!(!found.is_empty(), "{}: no snapshot-*.safetensors in it", dir.display());
    Ok(found.into_iter().map(|name| dir.join(name)).collect())
}

/// As snapshots are called.
fn file_name(at: u64, std: f64) -> String {
    format!("ema-{at:09}-{}.safetensors", name_of(std))
}
