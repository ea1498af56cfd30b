//! `edm2k eval`: how well a model denoises, by noise level; with `--fid`, how far what it makes is from a dataset.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::engine::Gpu;
use edm2k::data::dataset::{Dataset, Kind, Split};
use edm2k::formats::write_atomically;
use edm2k::model::{Encoder, Model};
use edm2k::train::stats::plot;
use edm2k::train::validation::{Loss, SIGMAS, loss_by_level};

use super::fid::FidArgs;
use super::sample::loaded;
use super::say::out;
use super::{DeviceArgs, Engine, claim};

/// Measure the loss of a model by noise level, or the distance of its images from a dataset's.
#[derive(clap::Args)]
#[command(after_help = "\
The error is that of the denoised image, relative to what is achieved by knowing the mean and the size of the
data only. The loss is what training minimises: error / exp(logvar) + logvar, with the network's own
expectation logvar of ln(error). Noise is the same in every call, so models can be compared.

With --fid it is the Frechet distance between the features of images that the model makes and of the dataset's,
each set taken for a normal distribution: FID if NETWORK is Inception, FD-DINOv2 if it is DINOv2. NETWORK is given
one image at a time, f32 [1, 3, H, W] or [1, H, W, 3], RGB from 0 to 255; what else it wants (the range -1 to 1 of
Inception, ImageNet's mean and deviation of DINOv2) must be part of it: put it in front when exporting. Images are
resized to its height and width (bicubic); a network that leaves these open gets them as they are. Its only output is
[1, D]. Image number i has seed i and the condition of the split's image i modulo their number. Latents of the
dataset are shown as --vae decodes them. Numbers of other tools need their export, their sampler, and as many
images: 50000 against the whole training split.

Examples:
  edm2k eval --model demo/emoji.safetensors --data demo/cache/emoji-32
  edm2k eval --model averages/ema-000200000-0.080.safetensors --data data/mine --split test \\
      --plot loss.svg
  edm2k eval --fid --network inception.onnx --model emoji.safetensors --data demo/cache/emoji-32 --split train \\
      --count 5000 --guidance 1
  edm2k eval --fid --network inception.onnx --generated out --data demo/cache/emoji-32 --split train")]
pub struct EvalArgs {
    /// Model file
    #[arg(long, value_name = "FILE", required_unless_present = "generated")]
    pub(super) model: Option<PathBuf>,
    /// Dataset made by `edm2k prepare`
    #[arg(long, value_name = "DIR")]
    pub(super) data: PathBuf,
    /// Which of its images
    #[arg(long, value_enum, default_value_t = Split::Validation)]
    pub(super) split: Split,
    /// Most of its images to look at: the first ones [default: 1024; all with --fid]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) images: Option<u32>,
    /// Images at a time; changes speed and memory only
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) batch: u16,
    /// Draw the curves, as SVG
    #[arg(long, value_name = "FILE", conflicts_with = "fid")]
    plot: Option<PathBuf>,
    /// Overwrite an existing picture of the curves
    #[arg(long, requires = "plot")]
    overwrite: bool,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    #[command(flatten)]
    pub(super) fid: FidArgs,
}

/// Prints the table to stdout, showing progress on stderr.
pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let _claim = args.plot.as_ref().map(|plot| claim(plot, args.overwrite)).transpose()?;
    let model = args.model.as_ref().map(Model::load).transpose().context("--model")?;
    let data = Dataset::open(&args.data, args.split).context("--data")?;
    if let (Some(model), Some(path)) = (&model, &args.model) {
        check_match(&args.data, path, model, &data)?;
    }
    if args.fid.fid {
        return super::fid::run(&args, model.as_ref(), &data);
    }
    let (Some(model), Some(path)) = (model, &args.model) else {
        bail!("--model is missing");
    };
    let images = data.len().min(args.images.unwrap_or(1024) as usize);

    let bar = ProgressBar::new((images * SIGMAS.len()) as u64).with_style(ProgressStyle::with_template(
        "{bar:30} {human_pos} of {human_len} noisy images, {per_sec}, {eta} left",
    )?);
    let (net, batch, mut progress) = (&model.net, args.batch.into(), |n| bar.inc(n));
    let engine = args.device.open()?;
    let [height, width, _] = data.shape();
    super::check_forward(&engine, &net.config, [height, width], images.min(batch))?;
    let levels = match engine {
        Engine::Cpu => {
            let mut backend = loaded(&model, &|table| Ok(Cpu::<f32>::for_sampling(table)))?;
            loss_by_level(&mut backend, net, &data, images, batch, &mut progress)?
        }
        Engine::Gpu(runtime) => {
            let new = |table: &_| Ok(Gpu::for_sampling(runtime.clone(), args.device.math(), table)?);
            loss_by_level(&mut loaded(&model, &new)?, net, &data, images, batch, &mut progress)?
        }
    };
    bar.finish_and_clear();

    if args.json {
        let level = |(sigma, level): (&f64, &Loss)| {
            let Loss { loss, error, logvar } = level;
            json!({"sigma": sigma, "loss": loss, "error": error, "logvar": logvar})
        };
        let levels: Vec<_> = SIGMAS.iter().zip(&levels).map(level).collect();
        let (model, data, split) = (path.display().to_string(), args.data.display().to_string(), args.split);
        let all = json!({"model": model, "data": data, "split": split.to_string(), "images": images, "levels": levels});
        out!("{all}");
    } else {
        out!("{images} images of the {} split", args.split);
        out!("{:>8} {:>10} {:>10} {:>10}", "sigma", "loss", "error", "logvar");
        for (sigma, Loss { loss, error, logvar }) in SIGMAS.iter().zip(&levels) {
            out!("{sigma:>8} {loss:>10.5} {error:>10.5} {logvar:>10.5}");
        }
    }
    if let Some(path) = &args.plot {
        let svg = draw(&levels).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        write_atomically(path, |out| out.write_all(svg.as_bytes())).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Whether the model is one of such images and conditions.
fn check_match(dir: &Path, path: &Path, model: &Model, data: &Dataset) -> anyhow::Result<()> {
    let (config, dir) = (&model.net.config, dir.display());
    let [height, width, channels] = data.shape();
    let of = match model.meta.encoder {
        Encoder::Rgb => Kind::Images,
        Encoder::SdVae => Kind::Latents,
    };
    let kind = data.header().kind;
    let word = |kind| if kind == Kind::Images { "pixels" } else { "latents" };
    ensure!(kind == of, "{dir}: the images are {}, the model's are {}", word(kind), word(of));
    let expected = config.img_channels;
    ensure!(channels == expected, "{dir}: the images have {channels} channels, the model's {expected}");
    config.check_size(height, width).with_context(|| dir.to_string())?;
    let (found, expected) = (data.condition_dim(), config.label_dim);
    ensure!(
        expected == 0 || found == expected,
        "{dir}: the conditions are {found} wide, expected the model's {expected}"
    );
    if expected > 0 {
        data.meaning().check(&dir, &model.meta.meaning(), path.display()).map_err(Error::msg)?;
    }
    match (&data.header().autoencoder, &model.meta.autoencoder) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            bail!("{dir}: the latents are of {theirs}, the model's of {ours}")
        }
        _ => Ok(()),
    }
}

/// Loss and error over the noise level, which is drawn logarithmically.
fn draw(levels: &[Loss]) -> Result<String, edm2k::train::stats::PlotError> {
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
