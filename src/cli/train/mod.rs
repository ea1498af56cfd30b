//! `edm2k train`: train, fine-tune, resume.

mod plan;
mod progress;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

use super::ranks::{self, Ranks};
use super::say::results;
use super::signals::Requests;
use super::{DeviceArgs, Ended};
use edm2k::Device;
use edm2k::codec::{CodecError, CodecFile};
use edm2k::data::dataset::{Dataset, DatasetError, Representation, Split, VOCABULARY_FILE};
use edm2k::formats::fingerprint::Identity;
use edm2k::formats::input;
use edm2k::formats::json::Fields;
use edm2k::model::config::{Preset, Recipe, preset};
use edm2k::model::{Config, Model, Precond};
use edm2k::pipeline::{Domain, Mismatch, Viewer};
use edm2k::train::checkpoint::Checkpoint;
use edm2k::train::grid::Show;
use edm2k::train::{
    DataIdentity, Execution, Outcome, Schedule, Settings, Splits, State, Training, checkpoint, memory, meta_of,
};
use plan::{Fit, describe, fitting, plan_on_gpu};
use progress::Progress;

/// Train a network, or go on with a run.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("network").args(["preset", "config", "init"]).required(true).multiple(true)), after_help = "\
The same command again goes on from the newest whole checkpoint in --outdir. torchrun, srun and
mpirun start it on several cards, one process each (docs/scale.md); it may go on with another
number. Numbers of images may end in k, M, G (1000s) or Ki, Mi, Gi (1024s).

Examples:
  edm2k train --data data/emoji --outdir runs/emoji --config emoji.json \\
      --duration 1M --batch 128 --lr 0.01 --cond-dropout 0.1
  edm2k train --data data/mine --outdir runs/xs --preset 1girl-xs \\
      --init edm2-img512-xs.safetensors --cond-dropout 0.05 --cond-dropout-from 9M
  edm2k train --data data/mine --outdir runs/fine --init edm2-img512-xs.safetensors \\
      --duration 500k --lr 0.002
  torchrun --no-python --nproc-per-node 8 edm2k train --data data/mine --outdir runs/xs \\
      --preset edm2-img512-xs
  edm2k train --data data/mine --outdir runs/xs --preset edm2-img512-xs --duration 8Mi --dry-run")]
pub struct TrainArgs {
    /// Dataset made by `edm2k prepare`, or a zip made by EDM2's dataset_tool.py, as it is
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Directory of the run: checkpoints, snapshots, statistics
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    outdir: Option<PathBuf>,
    /// Network and training settings by name, such as edm2-img512-xs
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    preset: Option<String>,
    /// Network as a JSON file; img_channels, label_dim and img_resolution default to the dataset's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Start from the weights of a model file; its network is the default
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Images to train on [default: the preset's, if it has one]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    duration: Option<u64>,
    /// Images per optimizer step [default: the preset's, or 128]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    batch: Option<u64>,
    /// Images at a time on one device; fewer need less memory [default: as before when a run is resumed; else the preset's; else
    /// what fits into 1 GiB of activations, 4 GiB on a GPU, halved until the card has room]. If memory runs out, the run goes
    /// on with half as many
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    batch_gpu: Option<u64>,
    /// Reference learning rate [default: the preset's, or 0.01]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Learning rate: EDM2's inverse square root, or linear to zero at the end [default: the preset's, or edm2]
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// edm2: batches after which the rate falls, 0 = never [default: the preset's, or 70000]
    #[arg(long, value_name = "BATCHES")]
    decay: Option<f64>,
    /// Images over which the rate rises, 0 = none [default: the preset's, or 10M, or a
    /// tenth of the duration if that is less]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    rampup: Option<u64>,
    /// Mean of ln(sigma) [default: the preset's, or -0.4]
    #[arg(long, value_name = "MEAN", allow_negative_numbers = true)]
    p_mean: Option<f64>,
    /// Standard deviation of ln(sigma) [default: the preset's, or 1]
    #[arg(long, value_name = "STD")]
    p_std: Option<f64>,
    /// Relative standard deviations of the moving averages of the weights; on a GPU four at most
    #[arg(long, value_name = "STD,...", value_delimiter = ',', default_value = "0.05,0.10")]
    ema: Vec<f64>,
    /// Share of the images shown without their condition
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    cond_dropout: f64,
    /// Images after which --cond-dropout begins
    #[arg(long, value_name = "IMAGES", value_parser = parse_images, default_value = "0")]
    cond_dropout_from: u64,
    /// Share of the activations that are zeroed before each block's second convolution [default: the preset's, or 0]
    #[arg(long, value_name = "SHARE")]
    dropout: Option<f64>,
    /// Mirror half of the images that the dataset allows it for
    #[arg(long)]
    flip: bool,
    /// Seed of initial weights, order, noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Interval of statistics, 0 = never [default: 500 in the whole run]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    status: Option<u64>,
    /// Interval of the validation loss, 0 = never [default: 100 in the whole run]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    validate: Option<u64>,
    /// Interval of sample grids, 0 = never [default: 50 in the whole run, fewer if they took over 1 % of it]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    grid: Option<u64>,
    /// Autoencoder that makes pictures of latents for the sample grids: an SD-VAE, or a TAESD, which is quicker
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// Also write an event file of TensorBoard's
    #[arg(long)]
    tensorboard: bool,
    /// Interval of snapshots: a model file for each average, 0 = never [default: 10 in the whole run]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    snapshot: Option<u64>,
    /// Interval of checkpoints, 0 = only at the end [default: 50 in the whole run]
    #[arg(long, value_name = "IMAGES", value_parser = parse_images)]
    checkpoint: Option<u64>,
    /// Checkpoints to keep; snapshots are all kept
    #[arg(long, value_name = "N", default_value_t = 3)]
    keep: usize,
    /// Begin anew, and set aside in --outdir what the run has made so far
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the resolved configuration and the memory need as JSON, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// A number of images: digits, perhaps with a decimal point, and a unit.
pub(super) fn parse_images(text: &str) -> Result<u64, String> {
    let units =
        [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("k", 1000), ("M", 1_000_000), ("G", 1_000_000_000)];
    let (digits, unit) =
        units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).unwrap_or((text, 1u64));
    let wrong = || format!("'{text}' is not a number of images such as 50000, 400k, 1.5M or 8Mi");
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(wrong);
    }
    let value = digits.parse::<f64>().map_err(|_| wrong())? * unit as f64;
    if value >= 0.0 && value.fract() == 0.0 && value < 9e15 { Ok(value as u64) } else { Err(wrong()) }
}

/// What the arguments and the dataset come to.
struct Resolved {
    settings: Settings,
    execution: Execution,
    model: Model,
    notes: Vec<String>,
}

/// Trains, alone or with the ranks that a launcher started, showing progress on stderr.
pub fn run(args: TrainArgs) -> anyhow::Result<Ended> {
    let requests = Requests::watch("finishing this step, then saving");
    Ok(match ranks::together("train", |ranks| train(&args, &requests, ranks))? {
        Outcome::Finished => Ended::Done,
        Outcome::Stopped => Ended::Stopped,
    })
}

fn train(args: &TrainArgs, requests: &Requests, ranks: &mut Ranks) -> anyhow::Result<Outcome> {
    if let Some(dir) = args.outdir.as_ref().filter(|dir| dir.join(VOCABULARY_FILE).exists()) {
        // A run that is there already may go on.
        let begins = checkpoint::list(dir).with_context(|| dir.display().to_string())?.is_empty();
        ensure!(!begins, "--outdir {}: a dataset is there, and a run needs a directory of its own", dir.display());
    }
    let data = Dataset::open(&args.data, Split::Train).context("cannot open the dataset")?;
    let validation = match Dataset::open(&args.data, Split::Validation) {
        Err(DatasetError::NoShards { .. } | DatasetError::NoSplit { .. }) => None,
        other => Some(other.context("cannot open the dataset")?),
    };
    if let Some(v) = &validation {
        let dir = args.data.display();
        Domain::of_dataset(v).check_given(
            format!("{dir} (validation)"),
            &Domain::of_dataset(&data),
            "the training split",
        )?;
        let sizes = |data: &Dataset| data.header().all_sizes();
        ensure!(sizes(v) == sizes(&data), "{dir}: the validation split is not of the same size");
    }
    let device = if args.dry_run { ranks.open_to_plan(&args.device)? } else { ranks.open(&args.device)? };
    let (mut viewer, warning) = viewer(args, &data, &device, ranks.first()).context("--vae")?;
    let Resolved { settings, execution, model, mut notes } = resolve(args, &data, &device, ranks.size())?;
    let doubts = [Some(&data), validation.as_ref()].into_iter().flatten().filter_map(Dataset::doubt);
    notes.extend(doubts.map(|doubt| format!("warning: {doubt}")));
    if args.dry_run {
        notes.iter().for_each(|note| ranks.say(note));
        if ranks.first() {
            results(&describe(&settings, &execution, &model, &device, args.device.math())?);
        }
        return Ok(Outcome::Finished);
    }

    notes.extend(warning.map(|warning| format!("warning: --vae {warning}")));
    ranks.connect(&device)?;
    notes.iter().for_each(|note| ranks.say(note));
    let mut progress = Progress::new(ranks, settings.duration);
    requests.begin();
    let mut picture = viewer.as_mut().map(|viewer| |size, image: &[f32]| viewer.picture(size, image));
    let training = Training {
        model,
        settings: &settings,
        execution: &execution,
        splits: Splits { train: &data, validation: validation.as_ref() },
        show: picture.as_mut().map(|picture| picture as &mut Show),
        stop: &requests.stop,
        event: &mut |event| progress.show(event),
        ranks: ranks.met(),
    };
    let outcome = training.run(&device);
    progress.end();
    let outcome = if progress.saved { outcome.context("training stopped; what was saved is whole")? } else { outcome? };
    if outcome == Outcome::Stopped {
        ranks.say(&format!(
            "stopped after {} images; the same command again goes on from there",
            progress.seen.unwrap_or(0)
        ));
    }
    Ok(outcome)
}

/// What shows the sample grids, and a warning of it. A GPU's memory for that is taken, where grids are made, before the rest
/// is shared out.
fn viewer(
    args: &TrainArgs,
    data: &Dataset,
    device: &Device,
    first: bool,
) -> anyhow::Result<(Option<Viewer>, Option<String>)> {
    if args.dry_run {
        return Ok((None, None));
    }
    let (mut viewer, warning) = Viewer::of(device, data, &args.data.display().to_string(), args.vae.as_deref())?;
    if let (Some(viewer), Some(_)) = (&mut viewer, device.runtime().filter(|_| first && args.grid != Some(0))) {
        let [height, width, channels] = data.shape();
        viewer.picture([height, width], &vec![0.0; height * width * channels])?;
    }
    Ok((viewer, warning))
}

/// The network that the arguments ask for, fitted to the dataset.
fn network(args: &TrainArgs, data: &Dataset, preset: Option<&Preset>, init: Option<&Model>) -> anyhow::Result<Config> {
    let (channels, dim) = (data.shape()[2], data.condition_dim());
    let config = match (&args.config, preset, init) {
        (Some(path), ..) => read_config(path, data).with_context(|| path.display().to_string())?,
        (None, Some(preset), _) => Config { img_channels: channels, label_dim: dim, ..preset.config.clone() },
        (None, None, Some(model)) => Config { img_channels: channels, label_dim: dim, ..model.net.config.clone() },
        (None, None, None) => bail!("give a network: --preset, --config or --init"),
    };
    let checked = config.validate().map_err(anyhow::Error::from);
    match &args.config {
        Some(path) => checked.with_context(|| path.display().to_string())?,
        None => checked?,
    }
    config.check_sizes(&data.sizes()).with_context(|| format!("the dataset {}", args.data.display()))?;
    Ok(config)
}

/// A config file; what it leaves open is taken from the dataset.
fn read_config(path: &Path, data: &Dataset) -> anyhow::Result<Config> {
    let [height, width, channels] = data.shape();
    let mut fields = Fields::parse(&input::text(path)?)?;
    fields.or("img_resolution", height.min(width));
    fields.or("img_channels", channels);
    fields.or("label_dim", data.condition_dim());
    let config: Config = fields.read()?;
    let (found, dim) = (config.img_channels, data.condition_dim());
    ensure!(found == channels, "img_channels = {found}, but the dataset's images have {channels}");
    let found = config.label_dim;
    ensure!(found == dim || found == 0, "label_dim = {found}, but the dataset's conditions have {dim}");
    Ok(config)
}

/// Refuses what this machine has no room for, before any of it is made.
fn check_memory(args: &TrainArgs, config: &Config, data: &Dataset, on_gpu: bool) -> anyhow::Result<()> {
    let ([height, width], channels) = (DataIdentity::of(data).largest(), config.img_channels);
    let (_, table) = Precond::new(config)?;
    // Even if a GPU computes, images, weights and checkpoints pass through this machine's memory.
    let batch_gpu = args.batch_gpu.unwrap_or(1).min(args.batch.unwrap_or(u64::MAX));
    let all = memory::estimate(config, &table, height, width, batch_gpu, args.ema.len());
    let host = 32 * u128::from(args.batch.unwrap_or(0))
        + 4 * table.iter().map(|(_, spec)| spec.numel() as u128).sum::<u128>()
        + 12 * u128::from(batch_gpu) * (height * width * channels) as u128;
    let needed = if on_gpu || args.dry_run { host } else { u128::from(all.parameters) + u128::from(all.activations) };
    edm2k::memory::check(format!("training with micro-batches of {batch_gpu}"), needed)?;
    let most = 1 << 60;
    ensure!(args.batch.is_none_or(|n| n <= most), "--batch is more than {most}");
    ensure!(args.duration.is_none_or(|n| n <= most), "--duration is more than {most}");
    Ok(())
}

/// The state that the run in `outdir` goes on from, if it has begun and is not to begin anew.
fn begun(args: &TrainArgs) -> Option<State> {
    let outdir = args.outdir.as_deref().filter(|_| !args.restart)?;
    let newest = checkpoint::list(outdir).ok()?.iter().find_map(|path| Checkpoint::open(path).ok())?;
    Some(newest.state)
}

/// The model to start from, and the identity of its file, which the run notes. A run that has begun needs only the
/// network, which its checkpoints know, so by then the file may be gone.
fn start(path: &Path, begun: Option<&State>, notes: &mut Vec<String>) -> anyhow::Result<(Model, Identity)> {
    if !path.exists()
        && let Some(State { settings: Settings { init: Some(init), config, seed, .. }, .. }) = begun
    {
        notes.push(format!("--init {} is not there; the run, which has begun, does not need it", path.display()));
        return Ok((Model::init(config, *seed)?, init.clone()));
    }
    let model = Model::load(path).context("cannot start from --init")?;
    Ok((model, Identity::of_file(path).with_context(|| format!("--init {}", path.display()))?))
}

/// Warnings of what the model to start from has to relearn, since it means something else than the dataset does.
/// Parameters of another shape start afresh and are reported elsewhere.
fn other_meaning(args: &TrainArgs, init: &Model, data: &Dataset) -> Vec<String> {
    let (path, theirs) = (args.init.as_deref().unwrap_or(Path::new("")), Domain::of_dataset(data));
    let all = theirs.differences(args.data.display(), &Domain::of_model(&init.net.config, &init.meta), path.display());
    let warning = |what: Mismatch| match what {
        Mismatch::Meaning(_) | Mismatch::Latents { .. } => Some(format!("warning: --init has to relearn: {what}")),
        Mismatch::NoConditions { .. } => Some(format!("warning: the conditions of --init are lost: {what}")),
        _ => None,
    };
    all.into_iter().filter_map(warning).collect()
}

fn resolve(args: &TrainArgs, data: &Dataset, device: &Device, ranks: usize) -> anyhow::Result<Resolved> {
    let on_gpu = device.runtime().is_some();
    let mut notes = Vec::new();
    let preset = args.preset.as_deref().map(preset).transpose()?;
    let begun = begun(args);
    let init = args.init.as_ref().map(|path| start(path, begun.as_ref(), &mut notes)).transpose()?;
    let (init, start) = init.map_or((None, None), |(model, identity)| (Some(model), Some(identity)));
    let config = network(args, data, preset.as_ref(), init.as_ref())?;
    if config.label_dim == 0 && data.condition_dim() > 0 {
        notes.push("warning: the network takes no conditions (label_dim is 0), though the dataset has some".to_owned());
    }
    check_memory(args, &config, data, on_gpu)?;
    let model = model(args, data, &config, init, &mut notes)?;
    if decay_does_nothing(args, preset.as_ref()) {
        notes.push("warning: --decay does nothing with --schedule linear".to_owned());
    }
    if args.vae.is_some() && args.grid == Some(0) {
        notes.push("warning: --vae does nothing with --grid 0".to_owned());
    }
    let kind = data.header().kind;
    if kind == Representation::Latents && args.grid != Some(0) && args.vae.is_none() {
        notes.push("no sample grids: the images are latents, and there is no --vae to show them".to_owned());
    }
    let mirrored = args.flip && kind == Representation::Latents;
    ensure!(!mirrored, "--flip: the images are latents, and mirrored ones are not those of the mirrored picture");
    if args.flip && !(0..data.len()).any(|image| data.flip_allowed(image)) {
        notes.push("warning: --flip mirrors nothing, since the dataset's metadata allows it for no image".to_owned());
    }
    let settings = settings(args, data, config, preset.as_ref(), start)?;
    settings.validate()?;
    notes.extend(of_conditions(&settings).map(str::to_owned));

    let recipe = preset.as_ref().and_then(|preset| preset.recipe);
    let mut execution = execution(args, &settings, device, recipe)?;
    // A run that goes on takes as many images at a time as before, so that it rounds in the same way.
    let before = begun.and_then(|state| state.batch_gpu).filter(|_| args.batch_gpu.is_none());
    if let Some(before) = before.filter(|&before| before != execution.batch_gpu.min(settings.batch)) {
        notes.push(format!("{before} images at a time, as before; --batch-gpu sets another number"));
        execution.batch_gpu = before;
    }
    execution.batch_gpu = execution.batch_gpu.min(settings.batch.div_ceil(ranks as u64));
    let needed = |n: u64| {
        let plan = plan_on_gpu(&settings, n, &model, device, args.device.math()).ok()?;
        Some(plan.total_bytes as u64)
    };
    if args.batch_gpu.is_none()
        && let Some(Fit { images, takes, free }) = fitting(device, execution.batch_gpu, needed)
    {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let (takes, free) = (gb(takes), gb(free));
        notes.push(format!(
            "{images} images at a time take {takes:.1} of {free:.1} GB; --batch-gpu sets another number"
        ));
        execution.batch_gpu = images;
    }
    execution.validate()?;
    Ok(Resolved { settings, execution, model, notes })
}

/// Whether a --decay is given that the schedule has no use for.
fn decay_does_nothing(args: &TrainArgs, preset: Option<&Preset>) -> bool {
    let usual = if preset.is_some_and(|preset| preset.recipe.is_some()) { Schedule::Linear } else { Schedule::Edm2 };
    args.decay.is_some() && args.schedule.unwrap_or(usual) == Schedule::Linear
}

/// What to say of how a run deals with conditions.
fn of_conditions(settings: &Settings) -> Option<&'static str> {
    let drops_all = settings.cond_dropout == 1.0 && settings.cond_dropout_from == 0;
    match settings.config.label_dim {
        0 if settings.cond_dropout > 0.0 => {
            Some("warning: --cond-dropout drops nothing, since the network takes no conditions")
        }
        0 => None,
        _ if drops_all => Some("warning: --cond-dropout 1 drops every condition, so the model learns none"),
        _ if settings.cond_dropout_of(settings.duration.saturating_sub(1)) == 0.0 => Some(
            "every image keeps its condition (--cond-dropout): the model will not learn to draw without one, so `sample` will \
             use no guidance",
        ),
        _ => None,
    }
}

/// How many parameters that start afresh are named.
const FRESH: usize = 8;

/// The model that the run begins with: a fresh one, or `init` fitted to the dataset.
fn model(
    args: &TrainArgs,
    data: &Dataset,
    config: &Config,
    init: Option<Model>,
    notes: &mut Vec<String>,
) -> anyhow::Result<Model> {
    let mut model = match init {
        None => Model::init(config, args.seed)?,
        Some(old) => {
            notes.extend(old.doubts.iter().map(|doubt| format!("warning: --init {doubt}")));
            notes.extend(other_meaning(args, &old, data));
            let (model, fresh) = old.adapt(config, args.seed)?;
            ensure!(fresh.len() < model.table.len(), "no parameter of --init fits the network");
            if fresh.len() > FRESH {
                let (fresh, all) = (fresh.len(), model.table.len());
                notes.push(format!("warning: {fresh} of {all} parameters start afresh: --init is another network"));
            }
            for p in fresh.iter().take(FRESH) {
                let found = p.found.as_ref().map_or("missing".to_owned(), |shape| format!("{shape:?}"));
                notes.push(format!("{} starts afresh: {found} in --init, {:?} here", p.name, p.expected));
            }
            model
        }
    };
    model.meta = meta_of(data, config, args.seed);
    Ok(model)
}

/// The settings: of the arguments, else of the preset, else EDM2's.
fn settings(
    args: &TrainArgs,
    data: &Dataset,
    config: Config,
    preset: Option<&Preset>,
    init: Option<Identity>,
) -> anyhow::Result<Settings> {
    let of = |f: fn(&Preset) -> f64, default: f64| preset.map_or(default, f);
    let fine_tunes = preset.is_some_and(|preset| preset.recipe.is_some());
    let duration = args.duration.or(preset.map(|preset| preset.duration));
    let edm2 = Settings::new(data, config, duration.context("give --duration, the images to train on")?);
    Ok(Settings {
        init,
        seed: args.seed,
        batch: args.batch.unwrap_or(preset.map_or(edm2.batch, |p| p.batch as u64)),
        lr: args.lr.unwrap_or(of(|p| p.lr, edm2.lr)),
        schedule: args.schedule.unwrap_or(if fine_tunes { Schedule::Linear } else { edm2.schedule }),
        decay: args.decay.unwrap_or(of(|p| p.decay, edm2.decay)),
        rampup: args.rampup.unwrap_or(if fine_tunes { 0 } else { edm2.rampup }),
        p_mean: args.p_mean.unwrap_or(of(|p| p.p_mean, edm2.p_mean)),
        p_std: args.p_std.unwrap_or(of(|p| p.p_std, edm2.p_std)),
        ema: args.ema.clone(),
        cond_dropout: args.cond_dropout,
        cond_dropout_from: args.cond_dropout_from,
        flip: args.flip,
        dropout: args.dropout.unwrap_or(of(|p| p.dropout, 0.0)),
        ..edm2
    })
}

/// How the run is executed: as the arguments say, else as suits the settings.
fn execution(
    args: &TrainArgs,
    settings: &Settings,
    device: &Device,
    recipe: Option<Recipe>,
) -> anyhow::Result<Execution> {
    let usual = Execution::new(args.outdir.clone().unwrap_or_default(), settings, device);
    // With an autoencoder a grid costs its pictures, too.
    let with_pictures = |path| {
        let [height, width, _] = settings.data.shape;
        let picture = CodecFile::open(path)?.decoder_macs([height, width])?;
        Ok::<_, CodecError>(settings.grid_interval(picture))
    };
    let seldom = args.vae.as_ref().map(with_pictures).transpose().context("--vae")?.unwrap_or(0);
    let of_recipe = recipe.map(|recipe| recipe.batch_gpu).filter(|_| device.runtime().is_some());
    Ok(Execution {
        batch_gpu: args.batch_gpu.or(of_recipe).unwrap_or(usual.batch_gpu),
        status: args.status.unwrap_or(usual.status),
        validate: args.validate.unwrap_or(usual.validate),
        grid: args.grid.unwrap_or(usual.grid.max(seldom)),
        tensorboard: args.tensorboard,
        snapshot: args.snapshot.unwrap_or(usual.snapshot),
        checkpoint: args.checkpoint.unwrap_or(usual.checkpoint),
        keep: args.keep,
        keep_rampup: args.rampup.is_none() && recipe.is_none(),
        restart: args.restart,
        ..usual
    })
}
