//! `edm2k condition`: the tags, and the tiny model that invents conditions.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::json;

use edm2k::condition::vae::{Kind, Rows, Training, Vae};
use edm2k::condition::vocabulary::Vocabulary;
use edm2k::condition::{Conditioning, MEANING_KEY};
use edm2k::data::dataset::{Dataset, Split, VOCABULARY_FILE};
use edm2k::formats::safetensors::{self, Dtype};
use edm2k::pipeline::Domain;

use super::say::{self, note, out};

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

The names of tags are those of the dataset's vocabulary.json, where they may be changed before `train`.")]
pub struct ConditionArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the tags of a dataset that are like a text, or all, with how many images have them
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
    /// Also say the training image with the nearest condition, and its tags
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
pub fn run(args: ConditionArgs) -> anyhow::Result<()> {
    match args.command {
        Command::Tags(args) => tags(&args),
        Command::Train(args) => train(&args),
        Command::Sample(args) => sample(&args),
    }
}

fn tags(args: &TagsArgs) -> anyhow::Result<()> {
    let vocabulary = Vocabulary::load(&args.data.join(VOCABULARY_FILE))?;
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

/// The conditions of a dataset, and the tags that go with them.
fn rows(data: &Dataset) -> anyhow::Result<Rows> {
    let width = data.condition_dim();
    let vocabulary = data.vocabulary().clone();
    let tags: Vec<Vec<u32>> = (0..data.len()).map(|i| data.tags(i).to_vec()).collect();
    let conditioning = Some(data.header().conditioning.clone());
    if data.header().conditioning == Conditioning::Tags {
        let known = vocabulary.len();
        ensure!(known == width, "its conditions are {width} wide, expected the {known} tags of the vocabulary");
        return Ok(Rows { kind: Kind::Tags, vocabulary, tags, dense: Vec::new(), conditioning });
    }
    let mut dense = vec![0.0; data.len() * width];
    dense.chunks_mut(width).enumerate().for_each(|(i, row)| data.condition(i, row));
    Ok(Rows { kind: Kind::Dense, vocabulary, tags, dense, conditioning })
}

fn train(args: &TrainArgs) -> anyhow::Result<()> {
    let _claim = super::claim(&args.out, args.overwrite)?;
    let data = Dataset::open(&args.data, Split::Train)?;
    let rows = rows(&data).with_context(|| args.data.display().to_string())?;
    let how = Training { epochs: args.epochs.into(), seed: args.seed, ..Training::default() };
    let bar = say::bar(how.epochs as u64, "{pos}/{len} epochs {msg} (about {eta} left)");
    let terminal = std::io::stderr().is_terminal();
    let started = Instant::now();
    let vae = Vae::train(&rows, &how, |epoch, loss| {
        let text = format!("reconstruction {:.2}, KL {:.2} nats", loss.reconstruction, loss.kl);
        if !terminal && (epoch % 10 == 9 || epoch + 1 == how.epochs) {
            note!("epoch {} of {}: {text}", epoch + 1, how.epochs);
        }
        bar.set_message(text);
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    vae.save(&args.out)?;
    let kind = match rows.kind {
        Kind::Tags => "tag sets",
        Kind::Dense => "features and their tags",
    };
    let (count, seconds) = (data.len(), started.elapsed().as_secs_f64());
    out!("learned from {count} {kind} in {seconds:.0} s: {}", args.out.display());
    Ok(())
}

fn sample(args: &SampleArgs) -> anyhow::Result<()> {
    let _claim = args.out.as_ref().map(|out| super::claim(out, args.overwrite)).transpose()?;
    let vae = Vae::load(&args.model).context("--model")?;
    let vocabulary = vae.vocabulary();
    let width = vae.header().width;
    let given = vocabulary.parse(&args.tags).with_context(|| format!("--tags \"{}\"", args.tags))?;
    let data = args.data.as_ref().map(|dir| Dataset::open(dir, Split::Train)).transpose().context("--data")?;
    if let Some((data, dir)) = data.as_ref().zip(args.data.as_ref()) {
        let ours = Domain::of_condition_model(&vae);
        Domain::of_dataset(data).check(dir.display(), &ours, args.model.display()).context("--data")?;
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
