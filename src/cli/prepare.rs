//! `edm2k prepare`: images and tags to dataset shards.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use edm2k::codec::CodecFile;
use edm2k::collective::{Part, agree_on};
use edm2k::data::dataset::VOCABULARY_FILE;
use edm2k::data::prepare::{
    self, Bucket, ConditionInput, Danbooru, DropReason, Event, Folder, LatentEncoder, Records, Settings, Summary,
};
use edm2k::formats::fingerprint::Identity;
use edm2k::pictures::Size;
use edm2k::pictures::decode::unapplied;

use super::DeviceArgs;
use super::info;
use super::ranks::{self, Ranks};
use super::say::{self, above, note, out};

/// Make a dataset from images and their tags.
#[derive(clap::Args)]
#[command(
    after_help = "\
With --images, each line of METADATA describes an image:
  {\"id\": 7, \"file\": \"a/b.png\", \"tags\": [\"dog\", \"red\"], \"flip\": true}
where \"flip\" (optional) says that mirroring it leaves its meaning, and \"repeats\": 4 (optional)
that training shall show it four times an epoch.

With --danbooru, it is the posts.json of danbooru2023, a post a line. A tag is danbooru's with
spaces for underscores: blue_hair is \"blue hair\" from here on.

The dataset's vocabulary.json has a tag a line. To rename one, change it there: images and
conditions know tags by their places. Models take the names when they are trained. --retag takes
all names from METADATA again.

Examples:
  edm2k prepare --images photos --metadata photos.jsonl --out data --size 512x704 --max-crop 0.5
  edm2k prepare --images icons --metadata icons.jsonl --out data --size 32x32 \\
      --background '#ffffff' --vocabulary 1024 --validation-modulus 50
  edm2k prepare --images photos --metadata photos.jsonl --out data \\
      --vae sd-vae-ft-mse.safetensors --sizes 512x704,704x512,576x640,640x576 --max-crop 0.1
  edm2k prepare --danbooru danbooru2023 --metadata posts.json --out data --rating g,s \\
      --vae sd-vae-ft-mse.safetensors --features features.safetensors

Several processes can make one dataset, on one machine or on several that see the same --out: with
--part 1/2 and --part 2/2, or by a launcher (torchrun, srun, mpirun; docs/scale.md), a GPU each.

The same command again keeps the shards that are whole and makes the missing ones. With --add the
pictures of METADATA whose ids the dataset does not have yet become new shards of it; with --retag
all images get the tags, flip and repeats of METADATA, and the conditions of --features, and
nothing is encoded again. Both come into force at once at their end; until then, and after a kill,
the dataset is the old one. A training run keeps to the images that it began with: begin another
one on a dataset that changed.",
    group(clap::ArgGroup::new("input").required(true)),
    group(clap::ArgGroup::new("shape").required(true).multiple(true))
)]
pub struct PrepareArgs {
    /// Folder of the images
    #[arg(long, value_name = "DIR", group = "input")]
    images: Option<PathBuf>,
    /// Folder of danbooru2023's archives, read in place, or of files named <id>.<ext>; at any depth
    #[arg(long, value_name = "DIR", groups = ["input", "shape"])]
    danbooru: Option<PathBuf>,
    /// JSON lines: id, file (relative to the folder), tags, flip, repeats; or danbooru's posts
    #[arg(long, value_name = "FILE")]
    metadata: PathBuf,
    /// Directory of the dataset
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Add the pictures that are new to the dataset that is there; summary.json then counts all images, and the records
    /// of this METADATA
    #[arg(long)]
    add: bool,
    /// Give the images that are there other tags, flip and repeats, and with --features other conditions; what are
    /// features do not become tags again. Give --vocabulary and the pictures' options as before
    #[arg(long, conflicts_with_all = ["add", "tagger"])]
    retag: bool,
    /// Width and height of the dataset's images, in pixels [default with --danbooru: 512x704]
    #[arg(long, value_name = "WxH", value_parser = super::parse_size, group = "shape")]
    size: Option<[usize; 2]>,
    /// Several sizes. Each image gets the size that crops it least; if equal, the one that resizes it least; then the first listed.
    /// Training takes images of one size at a time
    #[arg(long, value_name = "WxH,...", value_delimiter = ',', value_parser = super::parse_size, conflicts_with = "size",
          group = "shape")]
    sizes: Vec<[usize; 2]>,
    /// Make only part K of N of the shards; the last of all parts to end writes the summary
    #[arg(long, value_name = "K/N", conflicts_with_all = ["add", "retag"])]
    part: Option<Part>,
    /// Store latents: an SD-VAE, or a TAESD with an encoder
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// Conditions to take instead of tags: .safetensors with ids I64 [N] and features [N, D] of F16 or F32, or .npy
    /// [N, D]. Each is divided by its norm; images without one are dropped
    #[arg(long, value_name = "FILE")]
    features: Option<PathBuf>,
    /// Ids of the features in a .npy: .npy of whole numbers [N]
    #[arg(long, value_name = "FILE", requires = "features", conflicts_with = "tagger")]
    feature_ids: Option<PathBuf>,
    /// Conditions to take instead of tags: features that this tagger makes of each image, by its ONNX file. It sees the
    /// whole image, on white
    #[arg(long, value_name = "FILE", conflicts_with = "features")]
    tagger: Option<PathBuf>,
    /// Tensor of the features in it [default: what a WD tagger's classifier is given]
    #[arg(long, value_name = "NAME", requires = "tagger", conflicts_with_all = ["features", "retag"])]
    tagger_node: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Colour behind transparent images
    #[arg(long, value_name = "#RRGGBB", default_value = "#ffffff", value_parser = parse_colour)]
    background: [u8; 3],
    /// Largest share of an image that cropping to the shape may take; others are dropped
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    max_crop: f64,
    /// Tags in the vocabulary: the most frequent ones of the records for training, whether their pictures turn out to be
    /// usable or not; the width of the condition, unless it is a feature
    #[arg(long, value_name = "N", default_value_t = 1024)]
    vocabulary: usize,
    /// id % N == 0 is validation, id % N == 1 is test
    #[arg(long, value_name = "N", default_value_t = 1000)]
    validation_modulus: i64,
    /// Images per shard
    #[arg(long, value_name = "N", default_value_t = 1024)]
    shard_size: usize,
    /// Where the images are from, for the header
    #[arg(long, value_name = "TEXT", default_value = "")]
    source: String,
    /// Licence of the images, for the header
    #[arg(long, value_name = "TEXT", default_value = "")]
    licence: String,

    /// Tags that a post must have, as danbooru writes them, separated by spaces
    #[arg(
        long,
        value_name = "TAGS",
        default_value = "1girl solo",
        conflicts_with = "images",
        help_heading = "Danbooru"
    )]
    require: String,
    /// Ratings to take: g(eneral), s(ensitive), q(uestionable), e(xplicit)
    #[arg(long, value_name = "R,...", value_delimiter = ',', default_value = "g", conflicts_with = "images",
          value_parser = ["g", "s", "q", "e"], help_heading = "Danbooru")]
    rating: Vec<String>,
    /// Take images smaller than the size too
    #[arg(long, conflicts_with = "images", help_heading = "Danbooru")]
    enlarge: bool,
}

fn parse_colour(text: &str) -> Result<[u8; 3], String> {
    let digits = text.strip_prefix('#').filter(|d| d.len() == 6 && d.is_ascii());
    let byte = |digits: &str, at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
    digits
        .and_then(|d| Some([byte(d, 0)?, byte(d, 2)?, byte(d, 4)?]))
        .ok_or_else(|| "expected a colour such as #ffffff".into())
}

/// Prepares the dataset, alone or with the ranks that a launcher started.
pub fn run(args: PrepareArgs) -> anyhow::Result<()> {
    ranks::together("prepare", |ranks| make(args, ranks))
}

/// Makes this process's part; shows progress on stderr and the summary on stdout.
fn make(args: PrepareArgs, ranks: &mut Ranks) -> anyhow::Result<()> {
    let part = ranks.part(args.part)?;
    ensure!(
        part == Part::WHOLE || !(args.add || args.retag),
        "--add and --retag are done by one process, without a launcher"
    );
    if args.retag && args.vae.is_some() {
        ranks.warn("--vae does nothing with --retag, which encodes nothing");
    }
    let (records, settings) = wanted(&args, part);
    may_be_dataset(&args.out, args.images.as_deref().or(args.danbooru.as_deref()))?;
    if ranks.size() > 1 {
        agree_on(ranks.met(), &given(&args, &settings)?)?;
    }
    let progress = Progress::new(ranks);
    let report = |event: Event| progress.report(event);
    let make = if args.add { prepare::add } else { prepare::prepare };
    let summary = match &args.vae {
        _ if args.retag => prepare::retag(&*records, &settings, &report),
        None => make(&*records, &settings, None, &report),
        Some(path) => {
            let file = CodecFile::open(path).context("--vae")?;
            let codec = LatentEncoder::open(&ranks.open(&args.device)?, &file).context("--vae")?;
            make(&*records, &settings, Some(codec), &report)
        }
    };
    progress.bar.finish_and_clear();
    let summary = summary.context("cannot prepare the dataset")?;
    let skipped = if args.add { "there already" } else { "not of the dataset" };
    // Of several parts only the last to end knows what all have made.
    let text = if summary.lacking.is_empty() { shown(&settings, &summary, skipped) } else { String::new() };
    let told = ranks.met().gather(text.as_bytes())?;
    if !ranks.first() {
        return Ok(());
    }
    if let Some(text) = told.iter().find(|text| !text.is_empty()) {
        String::from_utf8_lossy(text).lines().for_each(|line| out!("{line}"));
        return Ok(());
    }
    let lacking: Vec<_> = summary.lacking.iter().map(|&number| Part { number, ..part }.to_string()).collect();
    let (dir, lacking) = (settings.out.display(), lacking.join(", "));
    ensure!(ranks.size() == 1, "{dir}: shards of part {lacking} are missing: do all ranks see this directory?");
    let images: usize = summary.splits.iter().map(|(_, counts)| counts.kept).sum();
    out!("{images} images of part {part}: {dir}. Shards of part {lacking} are still missing");
    Ok(())
}

/// Refuses a directory that belongs to a run, or to the pictures: a dataset needs one of its own. One that is there already
/// may go on.
fn may_be_dataset(out: &Path, images: Option<&Path>) -> anyhow::Result<()> {
    if out.join(VOCABULARY_FILE).exists() {
        return Ok(());
    }
    let what = match images.map(|images| images.canonicalize().ok().zip(out.canonicalize().ok())) {
        Some(Some((images, out))) if images == out => "the pictures are",
        _ if out.is_dir() && info::run::is_one(out)? => "a run is",
        _ => return Ok(()),
    };
    bail!("--out {}: {what} there, and a dataset needs a directory of its own", out.display());
}

/// What all ranks must have been given alike, by what is in the files. Where the pictures lie does not matter. Whether
/// all ranks have the same pictures is not checked: that would take as long as the work.
fn given(args: &PrepareArgs, settings: &Settings) -> anyhow::Result<Value> {
    let file = |option: &str, path: Option<&PathBuf>| {
        path.map(|path| Identity::of_file(path).with_context(|| format!("{option} {}", path.display()))).transpose()
    };
    let Settings { sizes, background, max_crop, vocabulary, validation_modulus, shard_size, .. } = settings;
    let PrepareArgs { danbooru, require, rating, enlarge, tagger_node, source, licence, .. } = args;
    Ok(json!({
        "metadata": file("--metadata", Some(&args.metadata))?,
        "out": args.out.display().to_string(),
        "sizes": sizes.iter().map(Size::to_string).collect::<Vec<_>>(),
        "background": background,
        "max-crop": max_crop,
        "vocabulary": vocabulary,
        "validation-modulus": validation_modulus,
        "shard-size": shard_size,
        "vae": file("--vae", args.vae.as_ref())?,
        "precision": args.device.precision.map(|numbers| format!("{numbers:?}")),
        "features": file("--features", args.features.as_ref())?,
        "feature-ids": file("--feature-ids", args.feature_ids.as_ref())?,
        "tagger": file("--tagger", args.tagger.as_ref())?,
        "tagger-node": tagger_node,
        "danbooru": danbooru.is_some().then(|| json!({"require": require, "rating": rating, "enlarge": enlarge})),
        "source": source,
        "licence": licence,
    }))
}

/// The records and the settings that the arguments ask for.
fn wanted(args: &PrepareArgs, part: Part) -> (Box<dyn Records>, Settings) {
    let records: Box<dyn Records> = match args.danbooru.clone() {
        Some(images) => Box::new(Danbooru {
            images,
            posts: args.metadata.clone(),
            require: args.require.split_whitespace().map(str::to_owned).collect(),
            ratings: args.rating.clone(),
            enlarge: args.enlarge,
        }),
        None => Box::new(Folder { images: args.images.clone().unwrap_or_default(), metadata: args.metadata.clone() }),
    };
    let sizes = if args.sizes.is_empty() { vec![args.size.unwrap_or([704, 512])] } else { args.sizes.clone() };
    // At most 65536.
    let sizes = sizes.iter().map(|[height, width]| Size { width: *width as u32, height: *height as u32 }).collect();
    let conditions = match (args.features.clone(), args.tagger.clone()) {
        (Some(path), _) => ConditionInput::Features { path, ids: args.feature_ids.clone() },
        (None, Some(path)) => ConditionInput::Tagger { path, node: args.tagger_node.clone() },
        (None, None) => ConditionInput::Tags,
    };
    let settings = Settings {
        conditions,
        out: args.out.clone(),
        part,
        sizes,
        background: args.background,
        max_crop: args.max_crop,
        vocabulary: args.vocabulary,
        validation_modulus: args.validation_modulus,
        shard_size: args.shard_size,
        source: args.source.clone(),
        licence: args.licence.clone(),
    };
    (records, settings)
}

/// What is shown of a preparation while it goes.
struct Progress {
    bar: ProgressBar,
    /// Whether this process speaks for all.
    first: bool,
    terminal: bool,
    /// When the shard at hand was begun.
    since: Mutex<Instant>,
}

impl Progress {
    fn new(ranks: &Ranks) -> Self {
        let (terminal, since) = (std::io::stderr().is_terminal(), Mutex::new(Instant::now()));
        Self { bar: ranks.bar(0, ""), first: ranks.first(), terminal, since }
    }

    fn report(&self, event: Event) {
        let bar = &self.bar;
        let say = |text: String| above(bar, &text);
        match event {
            Event::Reading { what, done, total } => {
                if bar.message() != what {
                    bar.set_style(say::style("{human_pos} of {human_len} {msg}, {eta} left"));
                    bar.set_message(what);
                    bar.reset();
                }
                bar.set_length(total);
                bar.set_position(done);
                if !self.terminal && done == total {
                    note!("read {total} {what}");
                }
            }
            Event::Start(records) => {
                let _ = self.since.lock().map(|mut since| *since = Instant::now());
                bar.set_style(say::style("{human_pos} of {human_len} images, {per_sec}, {eta} left"));
                bar.reset();
                bar.set_length(records as u64);
            }
            Event::Done(records) => bar.inc(records as u64),
            Event::Warning { text } => say(format!("warning: {text}")),
            Event::Unreadable { file, why } => say(format!("unreadable: {file}: {why}")),
            Event::Unapplied { file, profile } => say(unapplied(file, profile)),
            Event::Damaged { why } => say(format!("made again: {why}")),
            Event::Renamed { tags, was, now } => {
                say(format!("{VOCABULARY_FILE}: {tags} renamed tags: {was:?} is {now:?} there, ..."));
            }
            // The first speaks for all; but each says itself what is wrong.
            Event::Shard { .. } if !self.first => {}
            Event::Shard { name, images, kept } => {
                let begun = self.since.lock().map(|mut since| std::mem::replace(&mut *since, Instant::now()));
                let seconds = begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
                let how =
                    if kept { "was there".to_owned() } else { format!("{:.1} a second", images as f64 / seconds) };
                say(format!("{name}: {images} images ({how})"));
            }
            _ => {}
        }
    }
}

/// A summary, for people.
fn shown(settings: &Settings, summary: &Summary, skipped: &str) -> String {
    let mut lines = Vec::new();
    lines.push(format!("{}:", settings.out.display()));
    for (split, counts) in summary.splits {
        let mut line = format!("  {:10} {:>8} images", split.to_string(), counts.kept);
        for (number, what) in [
            (counts.enlarged, "smaller than the size, enlarged"),
            (counts.untagged, "without a known tag"),
            (counts.unapplied, "with a colour profile that cannot be applied"),
        ] {
            if number > 0 {
                line += &format!(", {number} {what}");
            }
        }
        lines.push(line);
    }
    let [(_, train), (_, validation), _] = &summary.splits;
    for (number, what) in [(train.kept, "nothing to train on"), (validation.kept, "no validation loss and no `eval`")] {
        if number == 0 {
            lines.push(format!(
                "  warning: {what}: one in --validation-modulus {} is set aside",
                settings.validation_modulus
            ));
        }
    }
    for Bucket { size, images } in summary.sizes.iter().filter(|_| summary.sizes.len() > 1) {
        lines.push(format!("  {size:10} {images:>8} images"));
    }
    let tags = summary.vocabulary.tags();
    if let Some(rarest) = tags.last() {
        lines.push(format!("  {:10} {:>8} tags, the rarest in {} records", "vocabulary", tags.len(), rarest.count));
    }
    if summary.skipped > 0 {
        lines.push(format!("  {:10} {:>8} {skipped}", "skipped", summary.skipped));
    }
    for (number, (drop, count)) in summary.dropped.0.iter().enumerate() {
        let head = if number == 0 { "dropped" } else { "" };
        let advice = if *drop == DropReason::Cropped { " (a larger --max-crop keeps more)" } else { "" };
        lines.push(format!("  {head:10} {count:>8} {drop}{advice}"));
    }
    if summary.unusable_tags > 0 {
        lines.push(format!(
            "  {:10} {:>8} tags with a comma in them or a space at an end",
            "left out", summary.unusable_tags
        ));
    }
    lines.join("\n")
}
