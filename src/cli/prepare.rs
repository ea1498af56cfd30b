//! `edm2k prepare`: images and tags to dataset shards.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use edm2k::data::prepare::{Event, Settings, Summary, prepare};

/// Make a dataset of a folder of images and a file of their tags.
#[derive(clap::Args)]
#[command(after_help = "\
Each line of METADATA describes an image:
  {\"id\": 7, \"file\": \"a/b.png\", \"tags\": [\"dog\", \"red\"], \"flip\": true}
where \"flip\" (optional) says that mirroring it leaves its meaning, and \"repeats\": 4 (optional)
that training shall show it four times an epoch.

Examples:
  edm2k prepare --images photos --metadata photos.jsonl --out data --size 512x704
  edm2k prepare --images icons --metadata icons.jsonl --out data --size 32x32 \\
      --background '#ffffff' --vocabulary 1024 --validation-modulus 50

The same command again keeps the shards that are whole and makes the missing ones.")]
pub struct PrepareArgs {
    /// Folder of the images
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// JSON lines: id, file (relative to the folder), tags, flip, repeats
    #[arg(long, value_name = "FILE")]
    metadata: PathBuf,
    /// Directory of the dataset
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Width and height of the dataset's images
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    size: [usize; 2],
    /// Colour behind transparent images
    #[arg(long, value_name = "#RRGGBB", default_value = "#ffffff", value_parser = parse_colour)]
    background: [u8; 3],
    /// Largest share of an image that cropping to the shape may take; others are dropped
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    max_crop: f64,
    /// Tags in the vocabulary: the most frequent ones; the width of the condition
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
}

fn parse_colour(text: &str) -> Result<[u8; 3], String> {
    let digits = text.strip_prefix('#').filter(|d| d.len() == 6 && d.is_ascii());
    let byte = |digits: &str, at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
    digits
        .and_then(|d| Some([byte(d, 0)?, byte(d, 2)?, byte(d, 4)?]))
        .ok_or_else(|| "expected a colour such as #ffffff".into())
}

/// Prepares the dataset, showing progress on stderr and the summary on stdout.
pub fn run(args: PrepareArgs) -> anyhow::Result<()> {
    let [height, width] = args.size.map(|side| side as u32); // at most 65536
    let settings = Settings {
        images: args.images,
        metadata: args.metadata,
        out: args.out,
        size: [width, height],
        background: args.background,
        max_crop: args.max_crop,
        vocabulary: args.vocabulary,
        validation_modulus: args.validation_modulus,
        shard_size: args.shard_size,
        source: args.source,
        licence: args.licence,
    };
    let bar = ProgressBar::no_length()
        .with_style(ProgressStyle::with_template("{bar:30} {human_pos} of {human_len} images, {per_sec}, {eta} left")?);
    let terminal = std::io::stderr().is_terminal();
    let say = |text: String| {
        if terminal { bar.println(text) } else { eprintln!("{text}") }
    };
    let summary = prepare(&settings, &|event| match event {
        Event::Start(records) => bar.set_length(records as u64),
        Event::Done(records) => bar.inc(records as u64),
        Event::Unreadable { file, why } => say(format!("unreadable: {file}: {why}")),
        Event::Shard { name, images, kept } => {
            let how = if kept { " (was there)" } else { "" };
            say(format!("{name}: {images} images{how}"));
        }
    });
    bar.finish_and_clear();
    let summary = summary.context("cannot prepare the dataset")?;
    print(&settings, &summary);
    Ok(())
}

fn print(settings: &Settings, summary: &Summary) {
    println!("{}:", settings.out.display());
    for (split, counts) in summary.splits {
        let mut line = format!("  {:10} {:>8} images", split.to_string(), counts.kept);
        for (number, what) in [
            (counts.enlarged, "smaller than the size, enlarged"),
            (counts.untagged, "without a known tag"),
            (counts.cropped, "dropped for their shape"),
            (counts.unreadable, "unreadable"),
        ] {
            if number > 0 {
                line += &format!(", {number} {what}");
            }
        }
        println!("{line}");
    }
    let tags = summary.vocabulary.tags();
    if let Some(rarest) = tags.last() {
        println!("  {:10} {:>8} tags, the rarest on {} images", "vocabulary", tags.len(), rarest.count);
    }
}
