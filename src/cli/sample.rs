//! `edm2k sample`: images from conditions.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Error, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use edm2k::backend::codec::CodecBackend;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::engine::Gpu;
use edm2k::backend::gpu::launch::Math;
use edm2k::backend::{Backend, Normalization, Slot};
use edm2k::codec::{Autoencoder, CodecFile, LATENTS};
use edm2k::condition::tagger::Tagger;
use edm2k::condition::vae::Vae;
use edm2k::condition::vocabulary::{Tag, Vocabulary};
use edm2k::condition::{Conditioning, MEANING_KEY, Meaning, unit_norm};
use edm2k::data::dataset::{Dataset, DatasetError, Split};
use edm2k::data::features::CONDITIONING_KEY;
use edm2k::formats::DirLock;
use edm2k::formats::npy;
use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::model::{Encoder, Model};
use edm2k::params::ParamTable;
use edm2k::pictures::{Picture, decode};
use edm2k::sample::{Churn, Observe, Sampler, SamplerConfig, Solver, Step, parse_seeds};

use super::say::{note, out};
use super::{DeviceArgs, Engine};

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

/// Conditions and where each is from.
#[derive(Default)]
struct Conditions {
    values: Vec<f32>,
    origins: Vec<Value>,
}

impl Conditions {
    fn push(&mut self, values: &[f32], origin: Value) {
        self.values.extend_from_slice(values);
        self.origins.push(origin);
    }
}

/// Samples the images, showing progress on stderr and what was written on stdout.
pub fn run(args: SampleArgs) -> anyhow::Result<()> {
    let model = Model::load(&args.model).context("--model")?;
    let config = args.sampler.config()?;
    let size = args.size.unwrap_or([model.meta.height, model.meta.width]);
    model.net.config.check_size(size[0], size[1])?;
    let gnet = args.gnet.as_ref().map(Model::load).transpose().context("--gnet")?;
    if let Some((gnet, path)) = gnet.as_ref().zip(args.gnet.as_ref()) {
        check_guide(&path.display().to_string(), gnet, &args, &model).context("--gnet")?;
    }
    let conditions = gather_conditions(&args, &model)?;
    let rows = conditions.origins.len();
    let seeds = match &args.seeds {
        Some(Seeds(seeds)) => seeds.clone(),
        None => (0..(rows.max(1) * usize::from(args.per_condition)) as u64).collect(),
    };
    let engine = args.device.open()?;
    let batch = seeds.len().min(args.batch.into());
    super::check_forward(&engine, &model.net.config, size, batch)?;
    let mut decode = decoder(&args, &model, size, &engine)?;
    if decode.is_none() {
        let steps = if args.save_steps { config.steps } else { 0 } as u128;
        let values = (size[0] * size[1] * model.net.config.img_channels) as u128;
        // They are written in another order than they are made.
        let needed = 2 * 4 * seeds.len() as u128 * values * (1 + steps);
        edm2k::memory::check(format!("keeping {} latents of {}x{}", seeds.len(), size[1], size[0]), needed)?;
    }
    let job = Job { args: &args, model: &model, config, size, conditions, seeds };
    let _lock = job.claim_outputs(decode.is_some())?;
    match engine {
        Engine::Cpu => job.run(gnet.as_ref(), decode.as_mut(), true, &|table| Ok(Cpu::<f32>::for_sampling(table))),
        Engine::Gpu(runtime) => job.run(gnet.as_ref(), decode.as_mut(), false, &|table| {
            Ok(Gpu::for_sampling(runtime.clone(), args.device.math(), table)?)
        }),
    }
}

/// Whether a network that guides is of the same conditions and latents.
fn check_guide(path: &str, gnet: &Model, args: &SampleArgs, model: &Model) -> anyhow::Result<()> {
    let name = args.model.display();
    gnet.meta.meaning().check(path, &model.meta.meaning(), &name).map_err(Error::msg)?;
    match (&gnet.meta.autoencoder, &model.meta.autoencoder) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            bail!("{path}: its latents are of {theirs}, those of {name} of {ours}")
        }
        _ => Ok(()),
    }
}

pub(super) fn loaded<B: Backend>(model: &Model, new: &dyn Fn(&ParamTable) -> anyhow::Result<B>) -> anyhow::Result<B> {
    let mut backend = new(&model.table)?;
    model.upload(&mut backend, Slot::Weight)?;
    backend.prepare(Slot::Weight, Normalization::Eval)?;
    Ok(backend)
}

/// Makes a picture of what the network made.
pub(super) type Decode = Box<dyn FnMut(&[f32]) -> anyhow::Result<Picture>>;

/// How pictures are made; none for latents without an autoencoder.
fn decoder(args: &SampleArgs, model: &Model, size: [usize; 2], engine: &Engine) -> anyhow::Result<Option<Decode>> {
    let latents = model.meta.encoder == Encoder::SdVae && model.net.config.img_channels == LATENTS;
    let pixels = model.meta.encoder == Encoder::Rgb && model.net.config.img_channels == 3;
    let Some(path) = &args.vae else {
        let plain: Decode = Box::new(move |image| Ok(Picture::from_model(size[0], size[1], image)));
        return Ok(pixels.then_some(plain));
    };
    ensure!(latents, "--vae: {} makes no latents of an SD-VAE, but pixels", args.model.display());
    let of = (args.model.display().to_string(), model.meta.autoencoder.as_ref());
    autoencoder(path, of, size, engine, args.device.math()).map(Some)
}

/// What makes pictures of latents of `size`, which `of` (its name) has of such an autoencoder.
pub(super) fn autoencoder(
    path: &Path,
    of: (String, Option<&Autoencoder>),
    size: [usize; 2],
    engine: &Engine,
    math: Math,
) -> anyhow::Result<Decode> {
    let file = CodecFile::open(path).context("--vae")?;
    let needed = file.decoder_bytes(size);
    edm2k::memory::check(format!("decoding latents of {}x{}", size[1], size[0]), needed).context("--vae")?;
    if let Some(warning) = file.check_latents(&of.0, of.1).context("--vae")? {
        note!("warning: --vae {warning}");
    }
    let decode = match engine {
        Engine::Cpu => decoder_on(Cpu::<f32>::for_codec(), &file, size),
        Engine::Gpu(runtime) => decoder_on(Gpu::for_codec(runtime.clone(), math)?, &file, size),
    };
    decode.context("--vae")
}

fn decoder_on<B: CodecBackend + 'static>(mut b: B, file: &CodecFile, size: [usize; 2]) -> anyhow::Result<Decode> {
    let decoder = file.decoder(&mut b)?;
    Ok(Box::new(move |latent| Ok(decoder.decode(&mut b, size, latent)?)))
}

fn gather_conditions(args: &SampleArgs, model: &Model) -> anyhow::Result<Conditions> {
    let width = model.net.config.label_dim;
    let mut all = Conditions::default();
    let asked = !args.tags.is_empty()
        || !args.like.is_empty()
        || !args.row.is_empty()
        || args.conditions.is_some()
        || args.random_conditions.is_some();
    if asked && width == 0 {
        bail!("{}: the model is unconditional, so it takes no condition", args.model.display());
    }
    let meaning = model.meta.meaning();
    let features = matches!(model.meta.conditioning, Conditioning::Features { .. });
    // Of features nobody knows which tags they have: only the condition model does.
    let complete = args.complete || features && !args.tags.is_empty();
    if complete && args.condition_model.is_none() {
        let (model, made_of) = (args.model.display(), &model.meta.conditioning);
        bail!("{model}: its conditions are {made_of}, so --tags needs a --condition-model that has learned from them");
    }
    let vae = args.condition_model.as_ref().filter(|_| complete || args.random_conditions.is_some());
    let vae = vae.map(Vae::load).transpose().context("--condition-model")?;
    if let (Some(vae), Some(path)) = (&vae, &args.condition_model) {
        let found = vae.header().width;
        ensure!(found == width, "{}: conditions are {found} wide, expected {width}", path.display());
        vae.meaning().check(path.display(), &meaning, args.model.display()).map_err(Error::msg)?;
    }

    if !args.tags.is_empty() {
        let vocabulary = match (&vae, complete) {
            (Some(vae), true) => vae.vocabulary().clone(),
            _ => vocabulary(model, &args.model)?,
        };
        for text in &args.tags {
            let tags = vocabulary.parse(text).with_context(|| format!("--tags \"{text}\""))?;
            ensure!(!tags.is_empty(), "--tags \"{text}\" has no tag");
            match (&vae, complete) {
                (Some(vae), true) => {
                    let invented = vae.invent(&tags, 1, args.condition_seed);
                    let words = vocabulary.words(&invented.tags[0]);
                    all.push(&invented.conditions, json!({"asked": vocabulary.words(&tags), "tags": words}));
                }
                _ => all.push(&vocabulary.multi_hot(&tags), json!({"tags": vocabulary.words(&tags)})),
            }
        }
    }
    if let Some(path) = args.tagger.as_ref().filter(|_| !args.like.is_empty()) {
        likenesses(args, model, path, &mut all)?;
    }
    for row in &args.row {
        let (values, theirs, origin) = dataset_row(row).with_context(|| format!("--row {row}"))?;
        let found = values.len();
        ensure!(found == width, "--row {row}: the condition is {found} wide, expected {width}");
        theirs.check(format_args!("--row {row}"), &meaning, args.model.display()).map_err(Error::msg)?;
        all.push(&values, origin);
    }
    if let Some(path) = &args.conditions {
        let (shape, mut values, theirs) = read_conditions(path).context("--conditions")?;
        theirs.check(path.display(), &meaning, args.model.display()).map_err(Error::msg).context("--conditions")?;
        let fits = matches!(shape[..], [d] | [_, d] if d == width) && !values.is_empty();
        ensure!(fits, "{}: conditions of shape {shape:?}, expected [N, {width}]", path.display());
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            bail!("{}: row {} has a value that is not finite", path.display(), at / width);
        }
        for (row, values) in values.chunks_mut(width).enumerate() {
            // As `prepare` does; what has norm 1 keeps it.
            let scaled = !features || unit_norm(values);
            ensure!(scaled, "{}: row {row} is zero, which is no feature", path.display());
            all.push(values, json!({"file": path.display().to_string(), "row": row}));
        }
    }
    if let (Some(vae), Some(count)) = (&vae, args.random_conditions) {
        let invented = vae.invent(&[], count.into(), args.condition_seed);
        for (index, (values, tags)) in invented.conditions.chunks(width).zip(&invented.tags).enumerate() {
            let words = vae.vocabulary().words(tags);
            all.push(values, json!({"invented": index, "condition_seed": args.condition_seed, "tags": words}));
        }
    }
    Ok(all)
}

/// The features of the --like pictures.
fn likenesses(args: &SampleArgs, model: &Model, tagger: &Path, all: &mut Conditions) -> anyhow::Result<()> {
    let name = args.model.display();
    let made_of = &model.meta.conditioning;
    if *made_of == Conditioning::Tags {
        bail!("{name}: its conditions are {made_of}, not features, so it takes no --like");
    }
    let tagger = Tagger::open(tagger, args.tagger_node.as_deref()).context("--tagger")?;
    let path = tagger.network().path().display();
    let (found, expected) = (tagger.network().width(), model.net.config.label_dim);
    ensure!(found == expected, "--tagger: {path}: its features are {found} wide, expected the model's {expected}");
    let (tensor, theirs) = (tagger.network().node(), tagger.conditioning());
    let known = matches!(made_of, Conditioning::Features { fingerprint: Some(_), .. });
    let differs = theirs.differs(made_of);
    ensure!(!differs || !known, "--tagger: {name} was trained on {made_of}, but these are {theirs}");
    if differs {
        note!("warning: {name} was trained on {made_of}, but these are {theirs}");
    }
    for like in &args.like {
        let image = decode::open(like, Tagger::BACKGROUND);
        let image = image.map_err(|why| anyhow!("--like {}: {why}", like.display()))?;
        if let Some(profile) = image.unapplied {
            note!("warning: {}: its colour profile ({profile}) cannot be applied; taken for sRGB", like.display());
        }
        let mut features = tagger.features(&image.picture, &like.display().to_string()).context("--tagger")?;
        ensure!(unit_norm(&mut features), "--like {}: its features are all zero", like.display());
        all.push(&features, json!({"like": like.display().to_string(), "tagger": path.to_string(), "node": tensor}));
    }
    Ok(())
}

fn vocabulary(model: &Model, path: &Path) -> anyhow::Result<Vocabulary> {
    let tags = &model.meta.vocabulary;
    ensure!(!tags.is_empty(), "{}: the model has no vocabulary, so it takes no --tags", path.display());
    let tags = tags.iter().map(|tag| Tag { tag: tag.clone(), count: 0 }).collect();
    Vocabulary::new(tags).with_context(|| path.display().to_string())
}

/// Looks for the id in all splits, so that one need not know in which it is.
fn dataset_row(row: &str) -> anyhow::Result<(Vec<f32>, Meaning, Value)> {
    let (dir, id) = row.rsplit_once(':').context("expected DATASET:ID")?;
    let number: i64 = id.parse().ok().with_context(|| format!("'{id}' is not an id"))?;
    for split in Split::ALL {
        let dataset = match Dataset::open(Path::new(dir), split) {
            Err(DatasetError::NoShards { .. } | DatasetError::Empty { .. }) => continue,
            opened => opened?,
        };
        if let Some(i) = dataset.find(number) {
            let mut values = vec![0.0; dataset.condition_dim()];
            dataset.condition(i, &mut values);
            let tags = dataset.vocabulary().words(dataset.tags(i));
            let origin = json!({"dataset": dir, "id": number, "split": split.to_string(), "tags": tags});
            return Ok((values, dataset.meaning(), origin));
        }
    }
    bail!("no image of {dir} has the id {number}")
}

/// Shape, values, and what they mean, as far as the file says it.
fn read_conditions(path: &Path) -> anyhow::Result<(Vec<usize>, Vec<f32>, Meaning)> {
    if path.extension().is_some_and(|extension| extension == "npy") {
        let (shape, values) = npy::read(path)?;
        return Ok((shape, values, Meaning::default()));
    }
    let file = SafeFile::open(path)?;
    let said = |key: &str| {
        let text = file.metadata().get(key);
        text.with_context(|| key.to_owned()).and_then(|text| Ok(serde_json::from_str::<Value>(text)?)).ok()
    };
    let meaning = match (said(MEANING_KEY), said(CONDITIONING_KEY)) {
        (Some(meaning), _) => serde_json::from_value(meaning),
        (None, Some(made_of)) => serde_json::from_value(json!({"conditioning": made_of, "tags": []})),
        (None, None) => Ok(Meaning::default()),
    };
    let meaning = meaning.with_context(|| format!("{}: what its conditions mean", path.display()))?;
    let names: Vec<_> = file.names().collect();
    let name = match names[..] {
        [one] => one,
        _ if file.contains("features") => "features",
        _ => "conditions",
    };
    Ok((file.shape(name)?.to_vec(), file.f32(name)?, meaning))
}

/// Everything about one call.
struct Job<'a> {
    args: &'a SampleArgs,
    model: &'a Model,
    config: SamplerConfig,
    size: [usize; 2],
    conditions: Conditions,
    seeds: Vec<u64>,
}

/// Most images of a grid: above, nobody looks at it.
const GRID: usize = 1024;
/// Bytes of pictures that are kept for it.
const GRID_BYTES: usize = 1 << 32;

impl Job<'_> {
    fn picture_file(&self, seed: u64) -> PathBuf {
        self.args.outdir.join(format!("{seed:06}.png"))
    }

    fn steps_file(&self, seed: u64) -> PathBuf {
        self.args.outdir.join(format!("{seed:06}-steps.png"))
    }

    /// The first name that is free: seeds that come later have a grid of their own.
    fn grid_file(&self) -> PathBuf {
        let name = |number| match number {
            1 => self.args.outdir.join("grid.png"),
            _ => self.args.outdir.join(format!("grid-{number}.png")),
        };
        let free = |path: &PathBuf| self.args.overwrite || path.symlink_metadata().is_err();
        (1..).map(name).find(free).unwrap_or_default()
    }

    fn latents_file(&self) -> PathBuf {
        self.args.outdir.join("latents.safetensors")
    }

    /// Makes the directory, and refuses to overwrite before anything is computed. Others may add their seeds
    /// meanwhile.
    fn claim_outputs(&self, pictures: bool) -> anyhow::Result<DirLock> {
        let lock = DirLock::shared(&self.args.outdir).context("--outdir")?;
        lock.warning().iter().for_each(|warning| note!("warning: {warning}"));
        if self.args.overwrite {
            return Ok(lock);
        }
        let mut files = if pictures { vec![] } else { vec![self.latents_file()] };
        if pictures {
            files.extend(self.seeds.iter().map(|&seed| self.picture_file(seed)));
            if self.args.save_steps {
                files.extend(self.seeds.iter().map(|&seed| self.steps_file(seed)));
            }
        }
        match files.iter().find(|file| file.symlink_metadata().is_ok()) {
            Some(file) => bail!("{} exists; give --overwrite, or another --outdir", file.display()),
            None => Ok(lock),
        }
    }

    /// Condition of the k-th image.
    fn condition(&self, k: usize) -> Option<usize> {
        let rows = self.conditions.origins.len();
        (rows > 0).then(|| k / usize::from(self.args.per_condition) % rows)
    }

    /// Parameters common to all images.
    fn parameters(&self) -> Value {
        let mut all = json!({
            "model": self.args.model.display().to_string(),
            "images_seen": self.model.meta.images_seen,
            "width": self.size[1],
            "height": self.size[0],
            "sampler": self.config,
        });
        if let Some(gnet) = &self.args.gnet {
            all["gnet"] = gnet.display().to_string().into();
        }
        if let Some(vae) = &self.args.vae {
            all["vae"] = vae.display().to_string().into();
        }
        if let Some(vae) = self.args.condition_model.as_ref().filter(|_| !self.conditions.origins.is_empty()) {
            all["condition_model"] = vae.display().to_string().into();
        }
        all
    }

    /// Samples on the backends that `new` makes; makes pictures by `decode`, or keeps the latents. `steps_show`: whether a step takes so long that people want to see
    /// it; a device that runs all steps as one plan cannot show them.
    fn run<B: Backend>(
        &self,
        gnet: Option<&Model>,
        mut decode: Option<&mut Decode>,
        steps_show: bool,
        new: &dyn Fn(&ParamTable) -> anyhow::Result<B>,
    ) -> anyhow::Result<()> {
        let mut backend = loaded(self.model, new)?;
        let mut guide = gnet.map(|gnet| loaded(gnet, new).map(|b| (b, &gnet.net))).transpose()?;
        let gnet = guide.as_mut().map(|(b, net)| (b, *net));
        let mut sampler = Sampler { backend: &mut backend, net: &self.model.net, gnet };
        let observed = steps_show || self.args.save_steps;
        let [height, width] = self.size;
        let channels = self.model.net.config.img_channels;
        let label_dim = self.model.net.config.label_dim;
        let values = height * width * channels;
        let batch = usize::from(self.args.batch);
        let bar = ProgressBar::new((self.seeds.len().div_ceil(batch) * self.config.steps) as u64);
        bar.set_style(ProgressStyle::with_template("{bar:30} {msg} {per_sec} {elapsed} (about {eta} left)")?);
        let terminal = std::io::stderr().is_terminal();
        let started = Instant::now();
        let mut pictures = Vec::new();
        let mut latents = Vec::new();
        let mut latent_steps = Vec::new();
        for (at, seeds) in self.seeds.chunks(batch).enumerate().map(|(i, seeds)| (i * batch, seeds)) {
            bar.set_message(format!("{at} of {} images", self.seeds.len()));
            let chosen = (at..at + seeds.len()).filter_map(|k| self.condition(k));
            let labels: Vec<f32> =
                chosen.flat_map(|row| &self.conditions.values[row * label_dim..][..label_dim]).copied().collect();
            let mut steps: Vec<Vec<f32>> = vec![Vec::new(); seeds.len()];
            let mut observe = |b: &mut B, step: Step<B::Tensor>| {
                bar.inc(1);
                if self.args.save_steps {
                    let denoised = step.denoised.tensor(b);
                    let denoised = b.download(&denoised)?;
                    steps.iter_mut().zip(denoised.chunks(values)).for_each(|(all, x)| all.extend_from_slice(x));
                }
                Ok(())
            };
            let observe: Option<&mut Observe<B>> = if observed { Some(&mut observe) } else { None };
            let images = sampler.run(&labels, seeds, self.size, &self.config, observe)?;
            if !observed {
                bar.inc(self.config.steps as u64);
            }
            for (i, (&seed, image)) in seeds.iter().zip(images.chunks(values)).enumerate() {
                if let Some(decode) = &mut decode {
                    let picture = decode(image)?;
                    let steps: anyhow::Result<Vec<_>> = steps[i].chunks(values).map(decode).collect();
                    self.save_picture(at + i, seed, &picture, &steps?)?;
                    let most = (GRID_BYTES / picture.rgb().len().max(1)).clamp(1, GRID);
                    pictures.push(picture);
                    pictures.truncate(most);
                } else {
                    latents.extend_from_slice(image);
                    latent_steps.append(&mut steps[i]);
                }
            }
            if !terminal {
                let done = at + seeds.len();
                note!("{done} of {} images, {:.1} s", self.seeds.len(), started.elapsed().as_secs_f64());
            }
        }
        bar.finish_and_clear();
        let seconds = started.elapsed().as_secs_f64();
        let rate = bar.length().unwrap_or(0) as f64 / seconds;
        let target = if decode.is_some() {
            self.save_grid(&pictures)?
        } else {
            out!("The images are latents, kept as they are; --vae FILE (an SD-VAE or a TAESD) makes pictures of them.");
            self.save_latents(&latents, &latent_steps)?
        };
        let [height, width] = pictures.first().map_or(self.size, |picture| [picture.height(), picture.width()]);
        let count = self.seeds.len();
        let target = target.display();
        out!("{count} images of {width}x{height} in {seconds:.1} s ({rate:.2} it/s): {target}");
        Ok(())
    }

    fn save_picture(&self, k: usize, seed: u64, picture: &Picture, steps: &[Picture]) -> anyhow::Result<()> {
        let mut about = self.parameters();
        about["seed"] = seed.into();
        about["condition"] = self.condition(k).map_or(Value::Null, |row| self.conditions.origins[row].clone());
        let about = about.to_string();
        let text = [("Software", SOFTWARE), ("edm2k", about.as_str())];
        let save = |picture: &Picture, path: PathBuf| -> anyhow::Result<()> {
            let free = self.args.overwrite || path.symlink_metadata().is_err();
            ensure!(free, "{}: somebody else has made it meanwhile; give --overwrite to replace it", path.display());
            Ok(picture.save(&path, &text)?)
        };
        save(picture, self.picture_file(seed))?;
        if self.args.save_steps {
            save(&Picture::grid(steps, steps.len()), self.steps_file(seed))?;
        }
        Ok(())
    }

    /// All pictures, a row for each condition if they are grouped.
    fn save_grid(&self, pictures: &[Picture]) -> anyhow::Result<PathBuf> {
        let columns = match self.args.per_condition {
            1 => (pictures.len() as f64).sqrt().ceil() as usize,
            per_condition => per_condition.into(),
        };
        let mut about = self.parameters();
        about["seeds"] = json!(self.seeds[..pictures.len()]);
        about["per_condition"] = self.args.per_condition.into();
        about["conditions"] = json!(self.conditions.origins);
        let about = about.to_string();
        let file = self.grid_file();
        Picture::grid(pictures, columns).save(&file, &[("Software", SOFTWARE), ("edm2k", about.as_str())])?;
        Ok(file)
    }

    /// `latents` [N, C, H, W], `seeds` [N], `steps` [N, steps, C, H, W] if asked for.
    fn save_latents(&self, latents: &[f32], steps: &[f32]) -> anyhow::Result<PathBuf> {
        let [height, width] = self.size;
        let channels = self.model.net.config.img_channels;
        let planar = |values: &[f32]| -> Vec<u8> {
            let area = height * width;
            let image = |x: &[f32]| -> Vec<u8> {
                (0..area * channels).flat_map(|i| x[i % area * channels + i / area].to_le_bytes()).collect()
            };
            values.chunks(area * channels).flat_map(image).collect()
        };
        let n = self.seeds.len();
        let (latents, steps) = (planar(latents), planar(steps));
        let seeds: Vec<u8> = self.seeds.iter().flat_map(|seed| seed.to_le_bytes()).collect();
        let (shape, steps_shape) = ([n, channels, height, width], [n, self.config.steps, channels, height, width]);
        let count = [n];
        let mut tensors: Vec<safetensors::TensorOut> =
            vec![("latents", Dtype::F32, &shape, &latents), ("seeds", Dtype::I64, &count, &seeds)];
        if self.args.save_steps {
            tensors.push(("steps", Dtype::F32, &steps_shape, &steps));
        }
        let mut about = self.parameters();
        about["per_condition"] = self.args.per_condition.into();
        about["conditions"] = json!(self.conditions.origins);
        let file = self.latents_file();
        safetensors::write(&file, &tensors, &HashMap::from([("edm2k".to_owned(), about.to_string())]))?;
        Ok(file)
    }
}

const SOFTWARE: &str = concat!("edm2k ", env!("CARGO_PKG_VERSION"));
