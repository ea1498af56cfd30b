//! `edm2k eval`: how well a model denoises, by noise level.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};

use edm2k::collective::{Part, agree_on};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::differences::differing_texts;
use edm2k::formats::fingerprint::Identity;
use edm2k::formats::safetensors::{self, Dtype, SafeError, SafeFile};
use edm2k::formats::{DirLock, LockError, write_atomically};
use edm2k::model::Model;
use edm2k::pipeline::{Domain, check_forward, learned_from};
use edm2k::train::DataIdentity;
use edm2k::train::stats::{PlotError, plot};
use edm2k::train::validation::{LevelLoss, Noisy, SIGMAS};

use super::ranks::{self, Ranks};
use super::say::{note, out};
use super::{DeviceArgs, claim, exists, may_be_written, no_other_format};

/// Longest time that a part waits for another to leave what it has found.
const TOGETHER: Duration = Duration::from_secs(10);

/// Measure the loss of a model by noise level.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("written").args(["plot", "part"]).multiple(true)), after_help = "\
The error is that of the denoised image, relative to what is achieved by knowing only that the
data have mean 0 and standard deviation sigma_data. The loss is what training minimises:
error / exp(logvar) + logvar, with the network's own expectation logvar of ln(error). Noise is the
same in every call, so models can be compared.

Examples:
  edm2k eval --model demo/emoji.safetensors --data demo/cache/emoji-32
  edm2k eval --model averages/ema-000200000-0.080.safetensors --data data/mine --split test \\
      --plot loss.svg")]
pub struct EvalArgs {
    /// Model file
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Dataset made by `edm2k prepare`, or a zip made by EDM2's dataset_tool.py, which is all --split train
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which of its images
    #[arg(long, value_enum, default_value_t = Split::Validation)]
    split: Split,
    /// Use only the first N images of the split
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    images: u32,
    /// Images at a time; changes speed and memory only
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Draw the curves, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Overwrite an existing picture of the curves, or what this part has left before
    #[arg(long, requires = "written")]
    overwrite: bool,
    /// Measure only part K of N of the noisy images; the last of all parts to end prints and draws
    #[arg(long, value_name = "K/N", requires = "outdir")]
    part: Option<Part>,
    /// Directory where the parts leave their losses; created if it is missing
    #[arg(long, value_name = "DIR", requires = "part")]
    outdir: Option<PathBuf>,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Measures, alone or with the ranks that a launcher started.
pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    ranks::together("eval", |ranks| eval(&args, ranks))
}

/// Prints the table to stdout, showing progress on stderr.
fn eval(args: &EvalArgs, ranks: &mut Ranks) -> anyhow::Result<()> {
    let part = ranks.part(args.part)?;
    let plot = args.plot.as_ref().filter(|_| ranks.first());
    if let Some(path) = &args.plot {
        no_other_format(path, &["png", "jpg", "jpeg", "webp", "gif", "pdf"], "svg")?;
    }
    let claimed = |path: &PathBuf| claim(path, args.overwrite, &[&args.model, &args.data]);
    // Of several parts the last to end draws. Nobody knows yet which that is, so none claims the file.
    let _plot = match plot {
        Some(path) if args.part.is_some() => {
            may_be_written(path, &[&args.model, &args.data])?;
            if !args.overwrite && path.symlink_metadata().is_ok() {
                return Err(exists(path));
            }
            None
        }
        plot => plot.map(claimed).transpose()?,
    };
    let (model, data) = opened(args, ranks)?;
    let images = data.len().min(args.images as usize);
    let batch = usize::from(args.batch);

    let device = ranks.open(&args.device)?;
    let identity = DataIdentity::of(&data);
    let largest = identity.largest();
    let given = json!({
        "model": Identity::of_file(&args.model).context("--model")?, "split": args.split.to_string(),
        "data": identity, "images": images, "batch": batch,
        "numbers": device.numbers(),
    });
    agree_on(ranks.met(), &given)?;
    let noisy = Noisy::by_level(&data, images, batch);
    let own = noisy.of(part);
    let bar = ranks.bar(own.len() as u64, "{human_pos} of {human_len} noisy images, {per_sec}, {eta} left");
    let _own = match &args.outdir {
        Some(dir) => {
            fs::create_dir_all(dir).with_context(|| format!("--outdir {}", dir.display()))?;
            Some(claimed(&losses_of(dir, part))?)
        }
        None => None,
    };
    check_forward(&device, &model.net.config, largest, images.min(batch), 1)?;
    let found = noisy.losses(&device, &model, own, batch, &mut |n| bar.inc(n))?;
    bar.finish_and_clear();
    let found = match &args.outdir {
        None => Some(noisy.gathered(&found, ranks.met())?),
        Some(dir) => joined(args, dir, part, &found, &noisy, &given)?,
    };
    // Another rank or part prints.
    let Some(found) = found.filter(|_| ranks.first()) else { return Ok(()) };
    let levels = noisy.means(&found);
    print(args, images, &levels);
    if let Some(path) = plot {
        let svg = draw(&levels).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        if args.part.is_some() && !args.overwrite && path.symlink_metadata().is_ok() {
            // Where nothing can be locked, another part may have found all of them too.
            let made = fs::read(path).is_ok_and(|made| made == svg.as_bytes());
            return if made { Ok(()) } else { Err(exists(path)) };
        }
        write_atomically(path, |out| out.write_all(svg.as_bytes())).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The model and the images, which must go together.
fn opened(args: &EvalArgs, ranks: &Ranks) -> anyhow::Result<(Model, Dataset)> {
    let model = Model::load(&args.model).context("--model")?;
    model.doubts.iter().for_each(|doubt| ranks.warn(&format!("--model {doubt}")));
    let data = Dataset::open(&args.data, args.split).context("--data")?;
    data.doubt().iter().for_each(|doubt| ranks.warn(doubt));
    let (config, dir) = (&model.net.config, args.data.display());
    let (theirs, ours) = (Domain::of_dataset(&data), Domain::of_model(config, &model.meta));
    theirs.check_given(&dir, &ours, args.model.display())?;
    config.check_sizes(&data.sizes()).with_context(|| dir.to_string())?;
    let unknown = theirs.doubt(&dir, &ours, args.model.display()).filter(|_| !learned_from(&model.meta, &args.data));
    unknown.iter().for_each(|warning| ranks.warn(warning));
    Ok((model, data))
}

/// Leaves what a part has found in a directory; and what all parts have, once they are there. Says which are missing.
fn joined(
    args: &EvalArgs,
    dir: &Path,
    part: Part,
    found: &[LevelLoss],
    noisy: &Noisy,
    given: &Value,
) -> anyhow::Result<Option<Vec<LevelLoss>>> {
    let alone = alone_in(dir)?;
    keep(&losses_of(dir, part), found, given).context("--outdir")?;
    let all = of_all_parts(dir, part.of, noisy, given);
    drop(alone);
    let missing = match all {
        Ok(all) => return Ok(Some(all)),
        Err(missing) => missing.join(", "),
    };
    let (own, all, dir) = (found.len(), noisy.of(Part::WHOLE).len(), dir.display());
    let said = format!("{own} noisy images of {all}: {dir}. Still missing: part {missing}");
    if args.json {
        note!("{said}");
    } else {
        out!("{said}");
    }
    Ok(None)
}

/// Prints the losses to stdout.
fn print(args: &EvalArgs, images: usize, levels: &[LevelLoss]) {
    if args.json {
        let level = |(sigma, level): (&f64, &LevelLoss)| {
            let LevelLoss { loss, error, logvar } = level;
            json!({"sigma": sigma, "loss": loss, "error": error, "logvar": logvar})
        };
        let levels: Vec<_> = SIGMAS.iter().zip(levels).map(level).collect();
        let [model, data] = [&args.model, &args.data].map(|path| path.display().to_string());
        let split = args.split.to_string();
        out!("{}", json!({"model": model, "data": data, "split": split, "images": images, "levels": levels}));
        return;
    }
    out!("{images} images of the {} split", args.split);
    out!("{:>8} {:>10} {:>10} {:>10}", "sigma", "loss", "error", "logvar");
    for (sigma, LevelLoss { loss, error, logvar }) in SIGMAS.iter().zip(levels) {
        out!("{sigma:>8} {loss:>10.5} {error:>10.5} {logvar:>10.5}");
    }
}

/// Has parts that end together leave what they have found one after the other, so that only the last one finds all.
/// `None` if somebody else keeps the directory for long.
fn alone_in(dir: &Path) -> anyhow::Result<Option<DirLock>> {
    let begun = Instant::now();
    loop {
        match DirLock::exclusive(dir) {
            Err(LockError::Busy { .. }) if begun.elapsed() < TOGETHER => sleep(Duration::from_millis(20)),
            Err(LockError::Busy { .. }) => return Ok(None),
            other => return Ok(Some(other.context("--outdir")?)),
        }
    }
}

/// Where a part leaves what it has found.
fn losses_of(dir: &Path, part: Part) -> PathBuf {
    dir.join(part.file("losses"))
}

/// Writes what a part has found, and with which options, data and model.
fn keep(path: &Path, found: &[LevelLoss], given: &Value) -> Result<(), SafeError> {
    let about = HashMap::from([("edm2k".to_owned(), given.to_string())]);
    safetensors::write(path, &[("losses", Dtype::F64, &[found.len(), 3], bytemuck::cast_slice(found))], &about)
}

/// What all parts of the same measurement have found; else a message that says which parts are missing, or do not
/// belong to it.
fn of_all_parts(dir: &Path, of: usize, noisy: &Noisy, given: &Value) -> Result<Vec<LevelLoss>, Vec<String>> {
    let (mut all, mut missing) = (Vec::new(), Vec::new());
    for part in Part::all(of) {
        let path = losses_of(dir, part);
        let of_these = |file: SafeFile| -> Result<Result<Vec<f64>, String>, SafeError> {
            let noted = file.metadata().get("edm2k").map_or("", String::as_str);
            let (found, expected) = (file.f64("losses")?, 3 * noisy.of(part).len());
            Ok(match differing_texts(&given.to_string(), noted) {
                differs if !differs.is_empty() => Err(format!("of something else: {differs}")),
                _ if found.len() != expected => Err(format!("of {} values, expected {expected}", found.len())),
                _ => Ok(found),
            })
        };
        match SafeFile::open(&path).and_then(of_these) {
            Ok(Ok(found)) => all.extend_from_slice(bytemuck::cast_slice(&found)),
            Ok(Err(differs)) => missing.push(format!("{part} ({} is {differs})", path.display())),
            Err(_) if !path.exists() => missing.push(part.to_string()),
            Err(why) => missing.push(format!("{part} ({why})")),
        }
    }
    if missing.is_empty() { Ok(all) } else { Err(missing) }
}

/// Loss and error over the noise level, which is drawn logarithmically.
fn draw(levels: &[LevelLoss]) -> Result<String, PlotError> {
    let curve = |value: fn(&LevelLoss) -> f64| -> Vec<(f64, f64)> {
        let points = SIGMAS.iter().zip(levels).map(|(sigma, level)| (sigma.log10(), value(level)));
        points.filter(|point| point.1.is_finite()).collect()
    };
    let (loss, error) = (curve(|level| level.loss), curve(|level| level.error));
    let values = || loss.iter().chain(&error).map(|point| point.1);
    let range = values().fold(0.0, f64::min)..values().fold(1.0, f64::max);
    let label = |x: f64| format!("{}", (10f64.powf(x) * 1e4).round() / 1e4);
    let ends = (SIGMAS[0].log10(), SIGMAS[SIGMAS.len() - 1].log10());
    plot(("noise level sigma", ends.0..ends.1, &label), ("loss", range), &[("loss", &loss), ("error", &error)])
}
