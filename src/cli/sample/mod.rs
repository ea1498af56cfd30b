//! `edm2k sample`: images from conditions.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use edm2k::collective::{Part, agree_on};
use edm2k::condition::Conditioning;
use edm2k::condition::classes::Classes;
use edm2k::memory;
use edm2k::model::ModelFile;
use edm2k::pipeline::{Condition, OutDir, OutputKind, Pipeline, Request};
use edm2k::sample::presets::{SamplingPreset, preset};
use edm2k::sample::{Churn, SamplerConfig, Solver, parse_seeds};

use super::DeviceArgs;
use super::ranks::{self, Ranks};
use super::say::note;

mod draw;
mod wanted;

use draw::{about_several, draw, images_of};
use wanted::wanted;

/// Make images.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("pictures").args(["like", "mix"]).multiple(true)), after_help = "\
Conditions come from --tags, --prompts, --class, --like, --mix, --row, --conditions and
--random-conditions, in this order; all may be given. The images take them in turn,
--per-condition images each. Without any, the images are unconditional. Each file is named after
its seed and carries all parameters in a text chunk. After an interruption the same command, without
--overwrite, makes the pictures that are missing.

In tags, (blue hair:1.3) weighs 1.3 times as much as others, (blue hair) 1.1 times, [blue hair] 1
/ 1.1 times; brackets may hold several tags, and each other. A tag of the vocabulary is found as
it is written there, so that ':)' and 'saber (fate)' need nothing. Elsewhere a backslash takes a
character's meaning away; a text that begins with a dash follows an equals sign: --tags='-_-'.

Examples:
  edm2k sample --model emoji.safetensors --outdir out --tags 'cat, smiling' --seeds 0-15
  edm2k sample --model emoji.safetensors --outdir out \\
      --tags heart --tags 'flag, star' --per-condition 8
  edm2k sample --model emoji.safetensors --outdir grid --random-conditions 4 --per-condition 4 \\
      --condition-model conditions.safetensors
  edm2k sample --model emoji.safetensors --outdir out --tags heart --complete \\
      --condition-model conditions.safetensors --solver heun --steps 32 --guidance 2
  edm2k sample --model emoji.safetensors --outdir out \\
      --tags '(red:1.5), heart' --negative 'face, arrow'
  edm2k sample --model emoji.safetensors --outdir out --prompts prompts.txt --per-condition 4
  edm2k sample --model emoji.safetensors --outdir out \\
      --tags 'cat' --tags 'dog' --seeds 7 --interpolate 8
  edm2k sample --model emoji.safetensors --outdir out \\
      --tags 'green, heart' --from drawing.png --strength 0.4
  edm2k sample --model edm2-s.safetensors --gnet edm2-xs.safetensors \\
      --preset edm2-img512-s-autog-fid --vae sd-vae-ft-mse.safetensors --outdir out \\
      --seeds 0-63 --class random
  edm2k sample --model edm2-s.safetensors --vae sd-vae-ft-mse.safetensors --outdir out \\
      --guidance 1.4 --class 207 --class goldfish --class-names imagenet.txt --per-condition 4
  edm2k sample --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors \\
      --outdir out --seeds 0-3
  edm2k sample --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors --outdir out \\
      --like picture.png --tagger wd-swinv2-tagger-v3/model.onnx --per-condition 4")]
pub struct SampleArgs {
    /// Model file; or weights alone (.safetensors, .ckpt, .pt, .pth, .bin), see `edm2k import`
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
    /// Autoencoder that makes pictures of latents: an SD-VAE, or a TAESD for quick previews; .safetensors, .ckpt, .pt, .pth or
    /// .bin, under the names of diffusers or of LDM, alone or in a whole Stable Diffusion checkpoint
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
    /// File with a prompt on each line: tags as --tags takes them, or {"tags": "...", "negative": "...", "seed": 7},
    /// where tags or negative may be left out, and seed. --per-condition images of each have its seed and those that follow;
    /// - is standard input
    #[arg(long, value_name = "FILE", help_heading = "Conditions")]
    prompts: Option<PathBuf>,
    /// Tags (or a class, for a class-conditional model) to guide away from [default: from no condition]; also used for prompts
    /// that have no negative
    #[arg(long, value_name = "TAGS|CLASS", help_heading = "Conditions")]
    negative: Option<String>,
    /// Class of a class-conditional model: its number, a name of --class-names, or "random", which is another one for each
    /// seed and goes alone; repeatable
    #[arg(long, value_name = "CLASS", help_heading = "Conditions")]
    class: Vec<String>,
    /// Names of the classes, a line for each, synonyms separated by commas
    #[arg(long, value_name = "FILE", help_heading = "Conditions")]
    class_names: Option<PathBuf>,
    /// Let the condition model complete the tags of --tags and --prompts to a plausible set
    #[arg(long, requires = "condition_model", help_heading = "Conditions")]
    complete: bool,
    /// Picture whose features are the condition, if the model's conditions are a tagger's features; repeatable
    #[arg(long, value_name = "IMAGE", requires = "tagger", help_heading = "Conditions")]
    like: Vec<PathBuf>,
    /// Several conditions in one, such as 'a.png:0.6,b.png:0.4': pictures as --like, DATASET:ID as --row, or random-0,
    /// random-1, ... as --random-conditions has them, each with its weight, of which a negative one leads away; a backslash
    /// before a comma makes it one of a name; repeatable
    #[arg(long, value_name = "SOURCE:WEIGHT,...", help_heading = "Conditions")]
    mix: Vec<String>,
    /// ONNX file of the tagger that made the features the model was trained on
    #[arg(long, value_name = "FILE", requires = "pictures", help_heading = "Conditions")]
    tagger: Option<PathBuf>,
    /// Tensor of the features in it [default: what a WD tagger's classifier is given]
    #[arg(long, value_name = "NAME", requires = "tagger", help_heading = "Conditions")]
    tagger_node: Option<String>,
    /// Condition of the image with this id in a dataset; repeatable
    #[arg(long, value_name = "DATASET:ID", help_heading = "Conditions")]
    row: Vec<String>,
    /// Conditions [N, D] as .npy, or as .safetensors with one tensor or one named "conditions" or
    /// "features"; each is divided by its norm
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
    #[arg(long, value_name = "SEED", default_value_t = 0, requires = "condition_model", help_heading = "Conditions")]
    condition_seed: u64,
    /// Images of each condition: a row of the grid
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Conditions",
          value_parser = clap::value_parser!(u16).range(1..))]
    per_condition: u16,
    /// A row of N images on the way between two conditions, two seeds, or both
    #[arg(long, value_name = "N", help_heading = "Conditions", conflicts_with = "per_condition",
          value_parser = clap::value_parser!(u16).range(2..))]
    interpolate: Option<u16>,

    /// Begin from a picture, or from latents in .safetensors, instead of from noise alone. A picture of another shape is
    /// cropped about its centre
    #[arg(long, value_name = "IMAGE", help_heading = "Sampler")]
    from: Option<PathBuf>,
    /// How much of it may change: the share of the steps that are taken, above 0, up to 1 [default: 0.5]
    #[arg(long, value_name = "S", requires = "from", help_heading = "Sampler")]
    strength: Option<f64>,
    /// Network to guide away from (autoguidance) [default: the model without its condition]
    #[arg(long, value_name = "FILE", help_heading = "Sampler")]
    gnet: Option<PathBuf>,
    /// Solver, steps and guidance of EDM2's authors, such as edm2-img512-s-autog-fid, unless they are given too; a wrong name lists
    /// all. Prints which files it is meant for
    #[arg(long, value_name = "NAME", value_parser = preset, help_heading = "Sampler")]
    preset: Option<SamplingPreset>,
    #[command(flatten)]
    sampler: SamplerArgs,

    /// Make only part K of N of the images, with the same --batch in all; the last of all parts to end makes the grid, or the
    /// file of all latents
    #[arg(long, value_name = "K/N")]
    part: Option<Part>,
}

/// How images come out of noise.
#[derive(clap::Args)]
pub struct SamplerArgs {
    /// How the differential equation is solved [default: dpmpp_2m]
    #[arg(long, value_enum, help_heading = "Sampler")]
    solver: Option<Solver>,
    /// Steps [default: 16]
    #[arg(long, value_name = "N", help_heading = "Sampler")]
    steps: Option<usize>,
    /// Strength of guidance; 1 = none [default: 5]
    #[arg(long, value_name = "G", help_heading = "Sampler")]
    guidance: Option<f64>,
    /// Guide only at noise levels above LO and up to HI
    #[arg(long, value_name = "LO,HI", value_parser = parse_interval, help_heading = "Sampler")]
    guidance_interval: Option<(f64, f64)>,
    /// Lowest noise level
    #[arg(long, value_name = "SIGMA", default_value_t = SamplerConfig::default().sigma_min, help_heading = "Sampler")]
    sigma_min: f64,
    /// Highest noise level
    #[arg(long, value_name = "SIGMA", default_value_t = SamplerConfig::default().sigma_max, help_heading = "Sampler")]
    sigma_max: f64,
    /// Spacing of the noise levels; larger = more of them at low noise
    #[arg(long, value_name = "RHO", default_value_t = SamplerConfig::default().rho, help_heading = "Sampler")]
    rho: f64,
    /// Noise added back over all steps; for heun and euler
    #[arg(long = "S-churn", value_name = "X", default_value_t = Churn::NONE.s_churn, help_heading = "Sampler")]
    s_churn: f64,
    /// Noise level below which none is added
    #[arg(long = "S-min", value_name = "SIGMA", default_value_t = Churn::NONE.s_min, help_heading = "Sampler")]
    s_min: f64,
    /// Noise level above which none is added
    #[arg(long = "S-max", value_name = "SIGMA", default_value_t = Churn::NONE.s_max, help_heading = "Sampler")]
    s_max: f64,
    /// Standard deviation of the added noise
    #[arg(long = "S-noise", value_name = "X", default_value_t = Churn::NONE.s_noise, help_heading = "Sampler")]
    s_noise: f64,
}

impl SamplerArgs {
    /// The settings, checked; solver, steps and guidance are those of `usual` where they are not given.
    pub fn config(&self, usual: &SamplerConfig) -> anyhow::Result<SamplerConfig> {
        let config = SamplerConfig {
            solver: self.solver.unwrap_or(usual.solver),
            steps: self.steps.unwrap_or(usual.steps),
            sigma_min: self.sigma_min,
            sigma_max: self.sigma_max,
            rho: self.rho,
            guidance: self.guidance.unwrap_or(usual.guidance),
            guidance_interval: self.guidance_interval,
            churn: Churn { s_churn: self.s_churn, s_min: self.s_min, s_max: self.s_max, s_noise: self.s_noise },
            ..SamplerConfig::default()
        };
        config.validate()?;
        Ok(config)
    }

    /// Where guidance has nothing to lead away from ([`Pipeline::cannot_guide`]), there is none unless it was asked for. What
    /// to say then.
    pub fn without_guide(&self, config: &mut SamplerConfig) -> Option<String> {
        let why = "the model was trained without --cond-dropout, and there is no network to guide away from";
        match self.guidance {
            Some(1.0) => None,
            None if config.guidance == 1.0 => None, // the preset's
            Some(_) => Some(format!("warning: {why}: --guidance makes pictures worse")),
            None => {
                config.guidance = 1.0;
                Some(format!("{why}: --guidance 1"))
            }
        }
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
    kept: OutputKind,
    /// This process's part of all images.
    part: Part,
}

/// Samples the images, alone or with the ranks that a launcher started, showing progress on stderr and what was written on
/// stdout.
pub fn run(args: SampleArgs) -> anyhow::Result<()> {
    ranks::together("sample", |ranks| {
        let resolved = resolve(&args, ranks)?;
        let Resolved { pipeline, request, kept, part } = &resolved;
        let mut out = OutDir::open(&args.outdir, args.overwrite, &request.seeds, *part).context("--outdir")?;
        let own = images_of(*part, request);
        let claimed = match kept {
            OutputKind::Latents => out.claim_latents(own, &about_several(&resolved, &args, request.seeds.len())),
            _ => {
                let common = pipeline.parameters(request);
                out.claim(own, *kept == OutputKind::Steps, |number| request.about(&common, number))
            }
        };
        claimed.context("--outdir")?;
        if ranks.first() {
            out.warning().iter().for_each(|warning| note!("warning: {warning}"));
        }
        draw(resolved, &args, &out, ranks)
    })
}

/// Opens what the arguments name, and checks it all before anything is computed.
fn resolve(args: &SampleArgs, ranks: &mut Ranks) -> anyhow::Result<Resolved> {
    let mut sampler = sampler(args, ranks)?;
    let mut pipeline = opened(args, sampler.guidance != 1.0, ranks)?;
    let piped = args.prompts.as_deref() == Some("-".as_ref());
    ensure!(!piped || ranks.size() == 1, "--prompts -: each process has an input of its own; give a file");
    let wanted = wanted(args, &mut pipeline)?;
    warn(&mut pipeline, ranks, "");
    if let Some(vae) = &args.vae {
        pipeline = pipeline.with_codec(vae).context("--vae")?;
        warn(&mut pipeline, ranks, "--vae ");
    }
    if args.condition_model.is_some() && !invents(args, &pipeline) {
        ranks.warn("--condition-model does nothing: --complete has it complete tags, --random-conditions invents some");
    }
    let seeds = seeds(args, &wanted.iter().map(|(_, seed)| *seed).collect::<Vec<_>>())?;
    let conditions: Vec<_> = wanted.into_iter().map(|(condition, _)| condition).collect();
    let guides = args.sampler.guidance.is_some() || args.sampler.guidance_interval.is_some();
    if conditions.is_empty() && args.gnet.is_none() && guides && sampler.guidance != 1.0 {
        ranks.warn("guidance does nothing: there is no condition, no --negative and no --gnet");
    }
    if pipeline.cannot_guide() {
        unguided(args, &conditions, &mut sampler, ranks)?;
    }
    if conditions.is_empty() && pipeline.meta().is_always_conditional(&pipeline.net().config) {
        ranks.warn("the model was trained without --cond-dropout, so it never learned to draw without a condition");
    }
    let kept = match (pipeline.makes_pictures(), args.save_steps) {
        (false, _) => OutputKind::Latents,
        (true, true) => OutputKind::Steps,
        (true, false) => OutputKind::Pictures,
    };
    let per_condition = usize::from(args.per_condition);
    let (size, batch) = (args.size, args.batch.into());
    let mut request = Request { conditions, per_condition, seeds, size, sampler, batch, ..Request::default() };
    if let Some(count) = args.interpolate {
        request = request.interpolated(count.into()).context("--interpolate")?;
    }
    // Before --from, which there may be no room for.
    pipeline.check(&request)?;
    if let Some(path) = &args.from {
        let size = pipeline.size(&request);
        request.from = Some(pipeline.beginning(path, size).context("--from")?);
        warn(&mut pipeline, ranks, "--from ");
    }
    let part = ranks.part(args.part)?;
    agree_on(ranks.met(), &given(args, &pipeline, &request))?;
    if kept == OutputKind::Latents {
        let [height, width] = pipeline.size(&request);
        let steps = if args.save_steps { request.sampler.taken() } else { 0 } as u128;
        let values = (height * width * pipeline.net().config.img_channels) as u128;
        // Latents are written in another order than they are made, and those of all parts are joined, so all are kept
        // in memory.
        let (own, all) = (images_of(part, &request).len(), request.seeds.len());
        let needed = (2 * own).max(all) as u128 * 4 * values * (1 + steps);
        memory::check(format!("keeping {all} latents of {width}x{height}"), needed)?;
    }
    Ok(Resolved { pipeline, request, kept, part })
}

/// How the sampler is to work, by the options and the preset.
fn sampler(args: &SampleArgs, ranks: &Ranks) -> anyhow::Result<SamplerConfig> {
    let usual = args.preset.as_ref().map_or_else(SamplerConfig::default, SamplingPreset::config);
    let mut sampler = args.sampler.config(&usual)?;
    if let Some(preset) = &args.preset {
        ensure!(preset.guide.is_none() || args.gnet.is_some(), "--preset {}: there is no --gnet", preset.name);
        let by = preset.guide.map_or(String::new(), |(by, _)| format!(", --gnet of {by}.pkl"));
        ranks.say(&format!("{} is meant for --model of {}.pkl{by}", preset.name, preset.net));
    }
    if args.from.is_some() {
        sampler.strength = args.strength.unwrap_or(0.5);
        sampler.validate()?;
    }
    Ok(sampler)
}

/// The pipeline with all that conditions are made of.
fn opened(args: &SampleArgs, guided: bool, ranks: &mut Ranks) -> anyhow::Result<Pipeline> {
    let device = ranks.open(&args.device)?.fastest();
    let mut pipeline = Pipeline::load(&device, &args.model).context("--model")?;
    match &args.gnet {
        Some(guide) if !guided => {
            ModelFile::open(guide).context("--gnet")?;
            ranks.warn("--gnet does nothing at guidance 1");
        }
        Some(guide) => pipeline = pipeline.with_guide(guide).context("--gnet")?,
        None => {}
    }
    if let Some(vae) = &args.condition_model {
        pipeline = pipeline.with_condition_model(vae).context("--condition-model")?;
    }
    if let Some(tagger) = &args.tagger {
        pipeline = pipeline.with_tagger(tagger, args.tagger_node.as_deref()).context("--tagger")?;
    }
    if let Some(path) = &args.class_names {
        ensure!(
            !args.class.is_empty() || args.negative.is_some(),
            "--class-names: there is no --class and no --negative"
        );
        warn(&mut pipeline, ranks, "");
        let names = Classes::load(path).context("--class-names")?;
        pipeline = pipeline.with_class_names(names).context("--class-names")?;
        warn(&mut pipeline, ranks, &format!("--class-names {}: ", path.display()));
    }
    Ok(pipeline)
}

/// Does without guidance where it has nothing to lead away from: where no condition has a negative. All of them must have
/// one, or none.
fn unguided(
    args: &SampleArgs,
    conditions: &[Condition],
    sampler: &mut SamplerConfig,
    ranks: &Ranks,
) -> anyhow::Result<()> {
    let Some(lacking) = conditions.iter().position(|condition| condition.away.is_none()) else { return Ok(()) };
    ensure!(
        args.sampler.guidance.is_some() || conditions.iter().all(|condition| condition.away.is_none()),
        "condition {} has no negative, and the model was trained without --cond-dropout, so guidance has nothing to \
         lead away from there; --negative is for all that have none of their own",
        lacking + 1
    );
    args.sampler.without_guide(sampler).iter().for_each(|text| ranks.say(text));
    Ok(())
}

/// Whether the condition model is asked for anything. A model of features has it invent what has given tags.
fn invents(args: &SampleArgs, pipeline: &Pipeline) -> bool {
    let tags = !args.tags.is_empty() || args.prompts.is_some() || args.negative.is_some();
    args.complete
        || args.random_conditions.is_some()
        || args.mix.iter().any(|text| text.contains("random-"))
        || tags && matches!(pipeline.meta().conditioning, Conditioning::Features { .. })
}

/// What all ranks must have been given alike.
fn given(args: &SampleArgs, pipeline: &Pipeline, request: &Request) -> Value {
    let origins: Vec<_> = request.conditions.iter().map(|condition| &condition.origin).collect();
    json!({
        "files": pipeline.files(),
        "outdir": args.outdir,
        "parameters": pipeline.parameters(request),
        "seeds": request.seeds,
        "towards": request.towards,
        "per_condition": request.per_condition,
        "batch": request.batch,
        "save_steps": args.save_steps,
        "conditions": origins,
        "values of the conditions": request.conditions.iter().map(Condition::fingerprint).collect::<Vec<_>>(),
    })
}

/// Says what the pipeline warns of, as far as an option has led to it.
fn warn(pipeline: &mut Pipeline, ranks: &Ranks, option: &str) {
    pipeline.warnings().iter().for_each(|warning| ranks.warn(&format!("{option}{warning}")));
}

/// The seed of each image. Without --seeds those of the prompts, and where they have none, the image's number. A row leads
/// from one of the prompts' seeds to the other, if they have two.
fn seeds(args: &SampleArgs, of_prompts: &[Option<u64>]) -> anyhow::Result<Vec<u64>> {
    if let Some(Seeds(seeds)) = &args.seeds {
        ensure!(of_prompts.iter().all(Option::is_none), "--seeds: the prompts of --prompts have seeds of their own");
        return Ok(seeds.clone());
    }
    if args.interpolate.is_some() {
        let mut seeds: Vec<u64> = of_prompts.iter().copied().flatten().collect();
        seeds.dedup();
        return Ok(if seeds.is_empty() { vec![0] } else { seeds });
    }
    let (each, mut seeds) = (u64::from(args.per_condition), Vec::new());
    for (number, seed) in (0..).zip(if of_prompts.is_empty() { &[None] } else { of_prompts }) {
        let first = seed.unwrap_or(number * each);
        seeds.extend(first..first + each);
    }
    Ok(seeds)
}
