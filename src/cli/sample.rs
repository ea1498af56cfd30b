//! `edm2k sample`: images from conditions.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use edm2k::memory;
use edm2k::pictures::Picture;
use edm2k::pipeline::{Condition, Kept, OutDir, Pipeline, PipelineError, Request, Step};
use edm2k::sample::{Churn, SamplerConfig, Solver, parse_seeds};

use super::DeviceArgs;
use super::say::{note, out};

/// Make images.
#[derive(clap::Args)]
#[command(after_help = "\
Conditions come from --tags, --like, --row, --conditions and --random-conditions, in this order; all may
be given. The images take them in turn, --per-condition images each. Without any, the images are
unconditional. Each file is named after its seed and carries all parameters in a text chunk.

Examples:
  edm2k sample --model emoji.safetensors --outdir out --tags 'cat, smiling' --seeds 0-15
  edm2k sample --model emoji.safetensors --outdir out --tags heart --tags 'flag, star' --per-condition 8
  edm2k sample --model emoji.safetensors --outdir grid --random-conditions 4 --per-condition 4 \\
      --condition-model conditions.safetensors
  edm2k sample --model emoji.safetensors --outdir out --tags heart --complete \\
      --condition-model conditions.safetensors --solver heun --steps 32 --guidance 2
  edm2k sample --model xl.safetensors --gnet xs.safetensors --guidance 2.1 --outdir out --row data:1234
  edm2k sample --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors --outdir out --seeds 0-3
  edm2k sample --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors --outdir out \\
      --like picture.png --tagger wd-swinv2-tagger-v3/model.onnx --per-condition 4")]
pub struct SampleArgs {
    /// Model file
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Directory of the images; created if it is missing
    #[arg(long, value_name = "DIR")]
    outdir: PathBuf,
    /// One image for each seed, such as 0-15,20 [default: from 0, one round of the conditions]
    #[arg(long, value_name = "LIST", value_parser = |text: &str| parse_seeds(text).map(Seeds))]
    seeds: Option<Seeds>,
    /// Width and height of the images, or latents [default: what the model was trained on]
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    size: Option<[usize; 2]>,
    /// Autoencoder that makes pictures of latents: an SD-VAE, or a TAESD for quick previews
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// Images at a time; changes speed and memory, not the images
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    #[command(flatten)]
    device: DeviceArgs,
    /// Overwrite existing images
    #[arg(long)]
    overwrite: bool,
    /// Also write what the network made of the noise in each step
    #[arg(long)]
    save_steps: bool,

    /// Tags of one condition, separated by commas; repeatable. If the model's conditions are features, the condition
    /// model invents one that has them
    #[arg(long, value_name = "TAGS", help_heading = "Conditions")]
    tags: Vec<String>,
    /// Let the condition model complete each of the --tags to a plausible set
    #[arg(long, requires_all = ["tags", "condition_model"], help_heading = "Conditions")]
    complete: bool,
    /// Picture whose features are the condition, if the model's conditions are a tagger's features; repeatable
    #[arg(long, value_name = "IMAGE", requires = "tagger", help_heading = "Conditions")]
    like: Vec<PathBuf>,
    /// ONNX file of the tagger that made the features the model was trained on
    #[arg(long, value_name = "FILE", requires = "like", help_heading = "Conditions")]
    tagger: Option<PathBuf>,
    /// Tensor of the features in it [default: what a WD tagger's classifier is given]
    #[arg(long, value_name = "NAME", requires = "tagger", help_heading = "Conditions")]
    tagger_node: Option<String>,
    /// Condition of the image with this id in a dataset; repeatable
    #[arg(long, value_name = "DATASET:ID", help_heading = "Conditions")]
    row: Vec<String>,
    /// Conditions [N, D] as .npy, or as .safetensors with one tensor or one named "conditions" or
    /// "features"; features are divided by their norm
    #[arg(long, value_name = "FILE", help_heading = "Conditions")]
    conditions: Option<PathBuf>,
    /// Conditions that the condition model invents
    #[arg(long, value_name = "N", requires = "condition_model", help_heading = "Conditions",
          value_parser = clap::value_parser!(u16).range(1..))]
    random_conditions: Option<u16>,
    /// Made by `edm2k condition train`
    #[arg(long, value_name = "FILE", help_heading = "Conditions")]
    condition_model: Option<PathBuf>,
    /// Seed of what the condition model invents
    #[arg(long, value_name = "SEED", default_value_t = 0, help_heading = "Conditions")]
    condition_seed: u64,
    /// Images of each condition: a row of the grid
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Conditions",
          value_parser = clap::value_parser!(u16).range(1..))]
    per_condition: u16,

    /// Network to guide away from (autoguidance) [default: the model without its condition]
    #[arg(long, value_name = "FILE", help_heading = "Sampler")]
    gnet: Option<PathBuf>,
    #[command(flatten)]
    sampler: SamplerArgs,
}

/// How images come out of noise.
#[derive(clap::Args)]
pub struct SamplerArgs {
    /// How the differential equation is solved
    #[arg(long, value_enum, default_value = "dpmpp_2m", help_heading = "Sampler")]
    solver: Solver,
    /// Steps
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Sampler")]
    steps: usize,
    /// Strength of guidance; 1 = none
    #[arg(long, value_name = "G", default_value_t = 5.0, help_heading = "Sampler")]
    guidance: f64,
    /// Guide only at noise levels above LO and up to HI
    #[arg(long, value_name = "LO,HI", value_parser = parse_interval, help_heading = "Sampler")]
    guidance_interval: Option<(f64, f64)>,
    /// Lowest noise level
    #[arg(long, value_name = "SIGMA", default_value_t = 0.002, help_heading = "Sampler")]
    sigma_min: f64,
    /// Highest noise level
    #[arg(long, value_name = "SIGMA", default_value_t = 80.0, help_heading = "Sampler")]
    sigma_max: f64,
    /// How much the noise levels crowd at the low end
    #[arg(long, value_name = "RHO", default_value_t = 7.0, help_heading = "Sampler")]
    rho: f64,
    /// Noise added back over all steps; for heun and euler
    #[arg(long = "S-churn", value_name = "X", default_value_t = 0.0, help_heading = "Sampler")]
    s_churn: f64,
    /// Noise level below which none is added
    #[arg(long = "S-min", value_name = "SIGMA", default_value_t = 0.0, help_heading = "Sampler")]
    s_min: f64,
    /// Noise level above which none is added
    #[arg(long = "S-max", value_name = "SIGMA", default_value_t = f64::INFINITY, help_heading = "Sampler")]
    s_max: f64,
    /// Standard deviation of the added noise
    #[arg(long = "S-noise", value_name = "X", default_value_t = 1.0, help_heading = "Sampler")]
    s_noise: f64,
}

impl SamplerArgs {
    /// The settings, checked.
    pub fn config(&self) -> anyhow::Result<SamplerConfig> {
        let config = SamplerConfig {
            solver: self.solver,
            steps: self.steps,
            sigma_min: self.sigma_min,
            sigma_max: self.sigma_max,
            rho: self.rho,
            guidance: self.guidance,
            guidance_interval: self.guidance_interval,
            churn: Churn { s_churn: self.s_churn, s_min: self.s_min, s_max: self.s_max, s_noise: self.s_noise },
        };
        config.validate()?;
        Ok(config)
    }
}

/// A type of its own, as clap takes a plain vector for a repeated option.
#[derive(Clone)]
struct Seeds(Vec<u64>);

fn parse_interval(text: &str) -> Result<(f64, f64), String> {
    let (low, high) = text.split_once(',').ok_or("expected two noise levels, such as 0.2,5")?;
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| format!("'{text}' is not a number"));
    Ok((number(low)?, number(high)?))
}

/// What the arguments and the files come to.
struct Resolved {
    pipeline: Pipeline,
    request: Request,
    kept: Kept,
}

/// Samples the images, showing progress on stderr and what was written on stdout.
pub fn run(args: SampleArgs) -> anyhow::Result<()> {
    let Resolved { pipeline, request, kept } = resolve(&args)?;
    let out = OutDir::claim(&args.outdir, args.overwrite, &request.seeds, kept).context("--outdir")?;
    out.warning().iter().for_each(|warning| note!("warning: {warning}"));
    draw(pipeline, &request, kept, args.save_steps, &out)
}

/// Opens what the arguments name, and checks it all before anything is computed.
fn resolve(args: &SampleArgs) -> anyhow::Result<Resolved> {
    let sampler = args.sampler.config()?;
    let mut pipeline = Pipeline::load(&args.device.open()?.fastest(), &args.model).context("--model")?;
    if let Some(guide) = &args.gnet {
        pipeline = pipeline.with_guide(guide).context("--gnet")?;
    }
    if let Some(vae) = &args.condition_model {
        pipeline = pipeline.with_condition_model(vae).context("--condition-model")?;
    }
    if let Some(tagger) = &args.tagger {
        pipeline = pipeline.with_tagger(tagger, args.tagger_node.as_deref()).context("--tagger")?;
    }
    let conditions = conditions(args, &mut pipeline)?;
    warn(&mut pipeline, "");
    if let Some(vae) = &args.vae {
        pipeline = pipeline.with_codec(vae).context("--vae")?;
        warn(&mut pipeline, "--vae ");
    }
    let kept = match (pipeline.makes_pictures(), args.save_steps) {
        (false, _) => Kept::Latents,
        (true, true) => Kept::Steps,
        (true, false) => Kept::Pictures,
    };
    let per_condition = usize::from(args.per_condition);
    let round = (conditions.len().max(1) * per_condition) as u64;
    let seeds = args.seeds.as_ref().map_or_else(|| (0..round).collect(), |Seeds(seeds)| seeds.clone());
    let request = Request { conditions, per_condition, seeds, size: args.size, sampler, batch: args.batch.into() };
    pipeline.check(&request)?;
    if kept == Kept::Latents {
        let [height, width] = pipeline.size(&request);
        let steps = if args.save_steps { request.sampler.steps } else { 0 } as u128;
        let values = (height * width * pipeline.net().config.img_channels) as u128;
        // They are written in another order than they are made.
        let needed = 2 * 4 * request.seeds.len() as u128 * values * (1 + steps);
        memory::check(format!("keeping {} latents of {width}x{height}", request.seeds.len()), needed)?;
    }
    Ok(Resolved { pipeline, request, kept })
}

fn warn(pipeline: &mut Pipeline, option: &str) {
    pipeline.warnings().iter().for_each(|warning| note!("warning: {option}{warning}"));
}

/// The conditions that the arguments ask for, in the order of the help.
fn conditions(args: &SampleArgs, pipeline: &mut Pipeline) -> anyhow::Result<Vec<Condition>> {
    let (mut all, seed) = (Vec::new(), args.condition_seed);
    for text in &args.tags {
        let condition = if args.complete { pipeline.complete(text, seed) } else { pipeline.tags(text, seed) };
        all.push(condition.context("--tags")?);
    }
    for path in &args.like {
        all.push(pipeline.like(path).context("--like")?);
    }
    for row in &args.row {
        let wanted = || -> anyhow::Result<Condition> {
            let (dataset, id) = row.rsplit_once(':').context("expected DATASET:ID")?;
            let id = id.parse().ok().with_context(|| format!("'{id}' is not an id"))?;
            Ok(pipeline.row(dataset, id)?)
        };
        all.push(wanted().with_context(|| format!("--row {row}"))?);
    }
    if let Some(path) = &args.conditions {
        all.extend(pipeline.conditions(path).context("--conditions")?);
    }
    if let Some(count) = args.random_conditions {
        all.extend(pipeline.invent(count.into(), seed).context("--random-conditions")?);
    }
    Ok(all)
}

/// Most images of a grid: above, nobody looks at it.
const GRID: usize = 1024;
/// Bytes of pictures that are kept for it.
const GRID_BYTES: usize = 1 << 32;

/// What was seen of the steps of a batch: of each image the pictures, or the latents one after the other.
#[derive(Default)]
struct Steps {
    pictures: BTreeMap<usize, Vec<Picture>>,
    latents: BTreeMap<usize, Vec<f32>>,
}

impl Steps {
    fn keep(&mut self, step: &mut Step, pictures: bool) -> Result<(), PipelineError> {
        if pictures {
            for (number, picture) in (step.first..).zip(step.pictures()?) {
                self.pictures.entry(number).or_default().push(picture);
            }
            return Ok(());
        }
        let values = step.denoised()?;
        for (number, image) in (step.first..).zip(values.chunks(values.len() / step.images)) {
            self.latents.entry(number).or_default().extend_from_slice(image);
        }
        Ok(())
    }
}

/// Makes the images and writes them. A device that runs all steps as one plan cannot show them: so steps are watched where
/// they are kept, and on the CPU, where each takes so long that people want to see it.
fn draw(mut pipeline: Pipeline, request: &Request, kept: Kept, save_steps: bool, out: &OutDir) -> anyhow::Result<()> {
    let count = request.seeds.len();
    let mut about = pipeline.parameters(request);
    let [height, width] = pipeline.size(request);
    let shape = [height, width, pipeline.net().config.img_channels];
    let watched = save_steps || pipeline.device().runtime().is_none();
    let bar = ProgressBar::new((count.div_ceil(request.batch) * request.sampler.steps) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {msg} {per_sec} {elapsed} (about {eta} left)")?);
    bar.set_message(format!("0 of {count} images"));
    let terminal = std::io::stderr().is_terminal();
    let started = Instant::now();
    let steps = RefCell::new(Steps::default());
    let mut images = pipeline.images(request)?;
    if watched {
        images = images.watched(|step| {
            bar.inc(1);
            if save_steps { steps.borrow_mut().keep(step, kept == Kept::Steps) } else { Ok(()) }
        });
    }
    let (mut pictures, mut latents, mut latent_steps) = (Vec::new(), Vec::new(), Vec::new());
    for image in images {
        let image = image?;
        let done = image.number + 1;
        if kept == Kept::Latents {
            latent_steps.append(&mut steps.borrow_mut().latents.remove(&image.number).unwrap_or_default());
            latents.push(image);
        } else {
            out.save(&image, &steps.borrow_mut().pictures.remove(&image.number).unwrap_or_default())?;
            pictures.extend(image.picture);
            let most = pictures.first().map_or(1, |picture: &Picture| GRID_BYTES / picture.rgb().len().max(1));
            pictures.truncate(most.clamp(1, GRID));
        }
        if done.is_multiple_of(request.batch) || done == count {
            if !watched {
                bar.inc(request.sampler.steps as u64);
            }
            bar.set_message(format!("{done} of {count} images"));
            if !terminal {
                note!("{done} of {count} images, {:.1} s", started.elapsed().as_secs_f64());
            }
        }
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let rate = bar.length().unwrap_or(0) as f64 / seconds;
    let origins: Vec<_> = request.conditions.iter().map(|condition| &condition.origin).collect();
    let target = if kept == Kept::Latents {
        out!("The images are latents, kept as they are; --vae FILE (an SD-VAE or a TAESD) makes pictures of them.");
        about["per_condition"] = request.per_condition.into();
        about["conditions"] = json!(origins);
        out.save_latents(&latents, &latent_steps, shape, &about)?
    } else {
        // A row for each condition if they are grouped.
        let columns = match request.per_condition {
            1 => (pictures.len() as f64).sqrt().ceil() as usize,
            per_condition => per_condition,
        };
        about["seeds"] = json!(request.seeds[..pictures.len()]);
        about["per_condition"] = request.per_condition.into();
        about["conditions"] = json!(origins);
        out.save_grid(&pictures, columns, &about)?
    };
    let [height, width] = pictures.first().map_or([height, width], |picture| [picture.height(), picture.width()]);
    let (target, device) = (target.display(), pipeline.device());
    out!("{count} images of {width}x{height} in {seconds:.1} s ({rate:.2} it/s on {device}): {target}");
    Ok(())
}
