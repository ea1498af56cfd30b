//! `edm2k eval`: how well a model denoises, by noise level.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use edm2k::collective::{Collective, agree, share};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::fingerprint::Identity;
use edm2k::formats::write_atomically;
use edm2k::model::Model;
use edm2k::pipeline::{Domain, learned_from};
use edm2k::train::DataIdentity;
use edm2k::train::stats::{PlotError, plot};
use edm2k::train::validation::{Loss, SIGMAS, ValidationError, loss_by_level};
use edm2k::{Backends, Work};

use super::ranks::{self, Ranks};
use super::say::{note, out};
use super::train::doubt;
use super::{DeviceArgs, claim};

/// Measure the loss of a model by noise level.
#[derive(clap::Args)]
#[command(after_help = "\
The error is that of the denoised image, relative to what is achieved by knowing the mean and the size of the
data only. The loss is what training minimises: error / exp(logvar) + logvar, with the network's own
expectation logvar of ln(error). Noise is the same in every call, so models can be compared.

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
    /// Most of its images to look at: the first ones
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    images: u32,
    /// Images at a time; changes speed and memory only
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Draw the curves, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Overwrite an existing picture of the curves
    #[arg(long, requires = "plot")]
    overwrite: bool,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Measures, alone or with the ranks that a launcher started.
pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    ranks::together(|ranks| eval(&args, ranks))
}

/// Prints the table to stdout, showing progress on stderr.
fn eval(args: &EvalArgs, ranks: &mut Ranks) -> anyhow::Result<()> {
    let plot = args.plot.as_ref().filter(|_| ranks.first());
    let _claim = plot.map(|plot| claim(plot, args.overwrite, &[&args.model, &args.data])).transpose()?;
    let model = Model::load(&args.model).context("--model")?;
    let data = Dataset::open(&args.data, args.split).context("--data")?;
    doubt(&data).iter().filter(|_| ranks.first()).for_each(|warning| note!("{warning}"));
    let (config, dir) = (&model.net.config, args.data.display());
    let (theirs, ours) = (Domain::of_dataset(&data), Domain::of_model(config, &model.meta));
    theirs.check(&dir, &ours, args.model.display())?;
    let unknown = theirs.doubt(&dir, &ours, args.model.display()).filter(|_| !learned_from(&model.meta, &args.data));
    unknown.iter().filter(|_| ranks.first()).for_each(|warning| note!("warning: {warning}"));
    let sizes = data.sizes();
    let checked = sizes.iter().try_for_each(|[height, width]| config.check_size(*height, *width));
    checked.with_context(|| dir.to_string())?;
    let images = data.len().min(args.images as usize);
    let batch = usize::from(args.batch);

    let identity = DataIdentity::of(&data);
    let largest = identity.largest();
    let given = json!({
        "model": Identity::of_file(&args.model).context("--model")?.to_string(), "split": args.split.to_string(),
        "data": identity, "images": images, "precision": args.device.math().precision.name(),
    });
    agree(ranks.met(), &given.to_string(), |ours, theirs| format!("it was given {theirs}, rank 0 {ours}"))?;
    let own = share((images * SIGMAS.len()) as u64, ranks.met().rank(), ranks.size());
    let bar = ranks.bar(own.end - own.start, "{human_pos} of {human_len} noisy images, {per_sec}, {eta} left");
    let device = ranks.open(&args.device)?;
    device.check_forward(config, largest, images.min(batch), 1)?;
    let (first, progress) = (ranks.first(), &mut |n| bar.inc(n));
    let measuring = Measuring { model: &model, data: &data, images, batch, progress, ranks: ranks.met() };
    let levels = device.run(measuring)?;
    bar.finish_and_clear();
    if !first {
        return Ok(());
    }

    if args.json {
        let level = |(sigma, level): (&f64, &Loss)| {
            let Loss { loss, error, logvar } = level;
            json!({"sigma": sigma, "loss": loss, "error": error, "logvar": logvar})
        };
        let levels: Vec<_> = SIGMAS.iter().zip(&levels).map(level).collect();
        let (model, split) = (args.model.display().to_string(), args.split.to_string());
        let all = json!({"model": model, "data": dir.to_string(), "split": split, "images": images, "levels": levels});
        out!("{all}");
    } else {
        out!("{images} images of the {} split", args.split);
        out!("{:>8} {:>10} {:>10} {:>10}", "sigma", "loss", "error", "logvar");
        for (sigma, Loss { loss, error, logvar }) in SIGMAS.iter().zip(&levels) {
            out!("{sigma:>8} {loss:>10.5} {error:>10.5} {logvar:>10.5}");
        }
    }
    if let Some(path) = plot {
        let svg = draw(&levels).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        write_atomically(path, |out| out.write_all(svg.as_bytes())).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The losses of a model, on whichever device.
struct Measuring<'a> {
    model: &'a Model,
    data: &'a Dataset,
    images: usize,
    batch: usize,
    progress: &'a mut dyn FnMut(u64),
    ranks: &'a mut dyn Collective,
}

impl Work for Measuring<'_> {
    type Output = Result<Vec<Loss>, ValidationError>;

    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let mut backend = backends.loaded(self.model)?;
        loss_by_level(&mut backend, &self.model.net, self.data, self.images, self.batch, self.progress, self.ranks)
    }
}

/// Loss and error over the noise level, which is drawn logarithmically.
fn draw(levels: &[Loss]) -> Result<String, PlotError> {
    let curve = |value: fn(&Loss) -> f64| -> Vec<(f64, f64)> {
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
