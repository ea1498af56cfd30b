//! `edm2k condition`: the tags, and the tiny model that invents conditions.

use std::collections::HashMap;
use std::fs;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::json;

use edm2k::condition::vae::{Learning, LearningSettings, Vae};
use edm2k::condition::{Conditioning, MEANING_KEY};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::At;
use edm2k::formats::safetensors::{self, Dtype};
use edm2k::pipeline::Domain;

use super::Ended;
use super::say::{self, note, out};
use super::signals::Requests;

/// Look up tags; train and use a model that invents conditions.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  edm2k condition tags --data data/emoji heart
  edm2k condition train --data data/emoji --out conditions.safetensors
  edm2k condition sample --model conditions.safetensors --count 8
  edm2k condition sample --model conditions.safetensors --tags 'cat, smiling' --count 8 \\
      --data data/emoji --out cats.safetensors
  edm2k sample --model emoji.safetensors --conditions cats.safetensors --outdir cats

`train` reads conditions as it needs them, and keeps what it has learned beside --out after each
pass: the same command again goes on from there. It needs less than 1 GB for a million conditions.

The names of tags are those of the dataset's vocabulary.json, where they may be changed before
`train`.")]
pub struct ConditionArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List a dataset's tags, or those like a text, with how many records for training had them when the tags were
    /// counted: by `prepare`, or `prepare --retag`, not by `--add`. Dropped pictures count too
    Tags(TagsArgs),
    /// Learn to invent conditions from a dataset's training split
    Train(TrainArgs),
    /// Invent conditions, and say them in words
    Sample(SampleArgs),
}

#[derive(clap::Args)]
struct TagsArgs {
    /// Dataset made by `edm2k prepare`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Part of a tag
    text: Option<String>,
}

#[derive(clap::Args)]
struct TrainArgs {
    /// Dataset made by `edm2k prepare`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The model, .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Passes over the conditions
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..))]
    epochs: u16,
    /// Seed of initial weights, order and noise
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Overwrite an existing model
    #[arg(long)]
    overwrite: bool,
}

#[derive(clap::Args)]
struct SampleArgs {
    /// Made by `edm2k condition train`
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Tags that each condition must have, separated by commas
    #[arg(long, value_name = "TAGS", default_value = "")]
    tags: String,
    /// How many conditions
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
    /// Seed of the conditions
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Also name the training image with the nearest condition, and its tags
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write the conditions [N, D] for `edm2k sample --conditions`
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Overwrite an existing file
    #[arg(long)]
    overwrite: bool,
}

/// Runs the subcommand; progress on stderr, results on stdout.
pub fn run(args: ConditionArgs) -> anyhow::Result<Ended> {
    match args.command {
        Command::Tags(args) => tags(&args)?,
        Command::Train(args) => {
            let requests = Requests::watch("stopping; what the passes so far have learned is kept");
            return train(&args, &requests);
        }
        Command::Sample(args) => sample(&args)?,
    }
    Ok(Ended::Done)
}

fn tags(args: &TagsArgs) -> anyhow::Result<()> {
    let vocabulary = Dataset::tags_of(&args.data)?;
    let text = args.text.as_deref().unwrap_or_default();
    let lower = text.to_lowercase();
    let mut found: Vec<_> = vocabulary.tags().iter().filter(|tag| tag.tag.to_lowercase().contains(&lower)).collect();
    if found.is_empty() {
        let near = vocabulary.nearest(text, 10);
        found = vocabulary.tags().iter().filter(|tag| near.contains(&tag.tag)).collect();
    }
    ensure!(!found.is_empty(), "no tag is like \"{text}\"");
    for tag in found {
        out!("{:6}  {}", tag.count, tag.tag);
    }
    Ok(())
}

/// Where the progress of a training is kept: beside the model, until the model is there.
fn progress_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".progress");
    name.into()
}

fn train(args: &TrainArgs, requests: &Requests) -> anyhow::Result<Ended> {
    requests.begin();
    let _claim = super::claim_tensors(&args.out, args.overwrite, &[])?;
    let data = Dataset::open(&args.data, Split::Train)?;
    let (width, known) = (data.condition_dim(), data.vocabulary().len());
    let tags = data.header().conditioning == Conditioning::Tags;
    let dir = args.data.display();
    ensure!(!tags || known > 0, "{dir}: its conditions are classes, so there is nothing to invent");
    ensure!(
        !tags || known == width,
        "{dir}: its conditions are {width} wide, expected the {known} tags of the vocabulary"
    );
    let how = LearningSettings { epochs: args.epochs.into(), seed: args.seed, ..LearningSettings::default() };
    let (place, print) = (progress_path(&args.out), data.fingerprint());
    // This also removes what a killed training left half written.
    let _kept = super::claim(&place, true, &[])?;
    let mut learning = if place.exists() {
        let learning = Learning::load(&place, &data, &how, print)?;
        note!("going on after {} of {} passes: {}", learning.passes(), how.epochs, place.display());
        learning
    } else {
        Learning::new(&data, &how)?
    };
    let rows = data.len() as u64;
    let bar = say::bar(rows * how.epochs as u64, "{human_pos} of {human_len} conditions, {per_sec}, {eta} left, {msg}");
    bar.set_position(rows * learning.passes() as u64);
    bar.reset_eta();
    let terminal = std::io::stderr().is_terminal();
    let started = Instant::now();
    while !learning.is_done() {
        let mut step = |rows| {
            bar.inc(rows as u64);
            if requests.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let Some(loss) = learning.pass(&mut step)? else {
            bar.finish_and_clear();
            let (done, of) = (learning.passes(), how.epochs);
            note!("stopped after {done} of {of} passes; the same command again goes on from there");
            return Ok(Ended::Stopped);
        };
        learning.save(&place, print)?;
        let (done, text) =
            (learning.passes(), format!("reconstruction {:.2}, KL {:.2} nats", loss.reconstruction, loss.kl));
        if !terminal && (done % 10 == 0 || learning.is_done()) {
            note!("epoch {done} of {}: {text}", how.epochs);
        }
        bar.set_message(text);
    }
    bar.finish_and_clear();
    learning.finish()?.save(&args.out)?;
    fs::remove_file(&place).at(&place)?;
    let kind = if tags { "tag sets" } else { "features and their tags" };
    let seconds = started.elapsed().as_secs_f64();
    out!("learned from {rows} {kind} in {seconds:.0} s: {}", args.out.display());
    Ok(Ended::Done)
}

fn sample(args: &SampleArgs) -> anyhow::Result<()> {
    let claimed = |out: &PathBuf| super::claim_tensors(out, args.overwrite, &[&args.model]);
    let _claim = args.out.as_ref().map(claimed).transpose()?;
    let vae = Vae::load(&args.model).context("--model")?;
    let vocabulary = vae.vocabulary();
    let width = vae.header().width;
    let given = vocabulary.parse(&args.tags).with_context(|| format!("--tags \"{}\"", args.tags))?;
    let data = args.data.as_ref().map(|dir| Dataset::open(dir, Split::Train)).transpose().context("--data")?;
    if let Some((data, dir)) = data.as_ref().zip(args.data.as_ref()) {
        let ours = Domain::of_condition_model(&vae);
        Domain::of_dataset(data).check_given(dir.display(), &ours, args.model.display()).context("--data")?;
    }
    let invented = vae.invent(&given, args.count.into(), args.seed);
    for (number, (condition, tags)) in invented.conditions.chunks(width).zip(&invented.tags).enumerate() {
        out!("{number:3}  {}", vocabulary.text(tags));
        if let Some(data) = &data {
            let (nearest, cosine) = nearest(data, condition);
            let words = data.vocabulary().words(data.tags(nearest));
            out!("     nearest ({cosine:.2}): image {}: {words}", data.id(nearest));
        }
    }
    if let Some(out) = &args.out {
        let bytes: Vec<u8> = invented.conditions.iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = [usize::from(args.count), width];
        let words: Vec<_> = invented.tags.iter().map(|tags| vocabulary.text(tags)).collect();
        let about = json!({"model": args.model.display().to_string(), "seed": args.seed, "tags": words});
        let metadata = HashMap::from([
            ("edm2k".to_owned(), about.to_string()),
            (MEANING_KEY.to_owned(), json!(vae.meaning()).to_string()),
        ]);
        safetensors::write(out, &[("conditions", Dtype::F32, &shape, &bytes)], &metadata)?;
        out!("{} conditions: {}", args.count, out.display());
    }
    Ok(())
}

/// The image whose condition has the largest cosine with this one, and the cosine.
fn nearest(data: &Dataset, condition: &[f32]) -> (usize, f32) {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    let ours = norm(condition);
    let mut row = vec![0.0; condition.len()];
    let mut best = (0, f32::NEG_INFINITY);
    for i in 0..data.len() {
        data.condition(i, &mut row);
        let cosine = row.iter().zip(condition).map(|(x, y)| x * y).sum::<f32>() / (norm(&row) * ours);
        if cosine > best.1 {
            best = (i, cosine);
        }
    }
    best
}
