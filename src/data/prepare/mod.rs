//! From images and their tags to the shards of a [`dataset`](super::dataset), in four stages:
//!
//! 1. read: the [`Records`] of a [`Folder`] or of [`Danbooru`], or of another source;
//! 2. agenda: they are ordered and cut into shards, before anything is decoded, and compared with what is there;
//! 3. render: each picture is decoded, cropped and resized ([`pictures`](crate::pictures)), of several sizes to the one
//!    that crops it least ([`choose`](crate::pictures::fit::choose)); one that would lose more than the given share of its
//!    area by that is dropped. Then a codec may make latents of it. The condition is its tags, or a feature divided by
//!    its norm: that in a file ([`features`](super::features)), or what a tagger makes of the picture before it is
//!    cropped and resized;
//! 4. write: the shards ([`shard`](super::shard)), one after the other, and `summary.json` ([`Summary`]).
//!
//! Splits follow from the id alone: `id % M == 0` is validation, `== 1` test. So an image stays in its split when
//! others are added. The vocabulary is counted on the training images.
//!
//! A shard depends on its records and the settings only. So it is made again with the same bytes, in any order, by any
//! number of threads. A shard that is there already, and whole, is kept. Shards that were made with other settings, or
//! of other pictures, stop everything, unless no image is in any of them.
//!
//! Several processes can make the shards of one dataset ([`Settings::part`]). All come to the same agenda, and each
//! makes its own part of it.
//!
//! A dataset that is there can [grow](add), and its tags and conditions can be [changed](retag) without encoding again.
//!
//! ```
//! use edm2k::data::prepare::{ConditionInput, Folder, Part, Settings, prepare};
//! use edm2k::pictures::{Picture, Size};
//!
//! let dir = tempfile::tempdir()?;
//! Picture::new(20, 16, vec![200; 20 * 16 * 3]).save(&dir.path().join("a.png"), &[])?;
//! let metadata = dir.path().join("a.jsonl");
//! std::fs::write(&metadata, r#"{"id": 7, "file": "a.png", "tags": ["grey"]}"#)?;
//! let settings = Settings {
//!     conditions: ConditionInput::Tags,
//!     out: dir.path().join("data"),
//!     part: Part::WHOLE,
//!     sizes: vec![Size { width: 16, height: 16 }],
//!     background: [255; 3],
//!     max_crop: 0.3,
//!     vocabulary: 1024,
//!     validation_modulus: 1000,
//!     shard_size: 1024,
//!     source: "made up".into(),
//!     licence: String::new(),
//! };
//! let summary = prepare(&Folder { images: dir.path().into(), metadata }, &settings, None, &|event| println!("{event:?}"))?;
//! assert_eq!(summary.vocabulary.tags()[0].tag, "grey");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod agenda;
mod danbooru;
mod existing;
mod folder;
mod grow;
mod records;
mod render;
mod report;
mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

pub use danbooru::Danbooru;
pub use folder::Folder;
pub use grow::{add, retag};
pub use records::{Listing, Location, Record, Records, TagTable};
pub use render::LatentEncoder;
pub use report::{Bucket, Counts, Event, PrepareError, Report, Summary};
pub use settings::{ConditionInput, Settings};

use super::dataset::Split;
use super::pending::Pending;
pub use super::shard::SUMMARY_FILE;
pub use super::shard::{DropCounts, DropReason};
use super::shard::{DroppedRecord, Notes, Shard, ShardError, Unapplied, VOCABULARY_FILE};
pub use crate::collective::Part;
use crate::condition::vocabulary::Vocabulary;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::{At, DirLock, fingerprint, free_name, input};
use agenda::{Agenda, check_settings, date};
use render::{Conditions, Renderer};

/// Prepares a dataset of pictures, or with a codec one of their latents.
///
/// # Errors
/// Unusable settings or metadata, an output directory that holds another dataset or cannot
/// be written. An unreadable image is no error: it is reported, counted and left out.
pub fn prepare(
    records: &dyn Records,
    settings: &Settings,
    mut codec: Option<LatentEncoder>,
    report: Report,
) -> Result<Summary, PrepareError> {
    let out = &settings.out;
    let (_lock, _) = owned(records, settings, codec.as_ref(), report)?;
    let part = settings.part;
    let conditions = Conditions::open(&settings.conditions)?;
    let mut listing = listed(records, settings, report)?;
    conditions.select(&mut listing);
    let mut tally = Tally { dropped: std::mem::take(&mut listing.dropped), ..Tally::default() };
    if listing.records.is_empty() {
        return Err(PrepareError::NothingKept { records: listing.read, dropped: tally.dropped });
    }

    let enlarge = records.enlarge();
    let agenda = Agenda::new(&listing, settings, enlarge, codec.as_ref(), &conditions, None)?;
    // This comes before anything is written, and moves only what is no file of the dataset. A dataset that was made
    // with other settings stays as it is.
    set_aside(out, agenda.jobs.iter().map(|job| &*job.name), report)?;
    let existing = agenda.existing(out, part, report)?;
    if !existing.contains(&true) {
        set_aside(out, [VOCABULARY_FILE, SUMMARY_FILE], report)?;
    }
    agenda.settle_vocabulary(out, existing.contains(&true), report)?;
    let renderer = rendering(&agenda, settings, enlarge, &conditions);
    let summary = out.join(SUMMARY_FILE);
    if existing.contains(&false) && summary.exists() {
        // The summary may say of a shard what is not true of the one that is made now.
        gone(fs::remove_file(&summary)).at(&summary)?;
    }
    make(&agenda, &existing, &|name| out.join(name), &renderer, codec.as_mut(), &mut tally, report)?;
    let (mut lacking, mut others) = (BTreeSet::new(), Vec::new());
    for (at, job) in agenda.jobs.iter().enumerate().filter(|(at, _)| at % part.of != part.number) {
        let opened = Shard::open(&out.join(&job.name), &agenda.vocabulary);
        match opened.and_then(|shard| Ok((Notes::read(&shard.file)?, shard))) {
            Ok((notes, shard)) => {
                check_settings(&shard.file, &agenda.made_with)?;
                others.push((job.split, shard, notes));
            }
            // The shard is missing or damaged. The part that it belongs to has to make it.
            Err(ShardError::File(_) | ShardError::Header { .. }) => drop(lacking.insert(at % part.of)),
            Err(other) => return Err(other.into()),
        }
    }
    if lacking.is_empty() {
        others.iter().for_each(|(split, shard, notes)| tally.add(*split, shard, notes));
        return tally.finish(&listing, settings, 0, agenda.vocabulary, &summary);
    }
    Ok(Summary { lacking: lacking.into_iter().collect(), ..tally.summary(&listing, settings, 0, agenda.vocabulary) })
}

/// Ignores that a file is not there: another part may have removed it in the meantime.
fn gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Takes a dataset's directory for this process, once the settings and the metadata's place have been checked.
fn owned(
    records: &dyn Records,
    settings: &Settings,
    codec: Option<&LatentEncoder>,
    report: Report,
) -> Result<(DirLock, Pending), PrepareError> {
    settings.check(codec.map_or(1, |codec| codec.factor))?;
    let alone = settings.part == Part::WHOLE;
    let lock = if alone { DirLock::exclusive(&settings.out)? } else { DirLock::shared(&settings.out)? };
    if settings.part.number == 0 {
        lock.warning().iter().for_each(|text| report(Event::Warning { text }));
    }
    let pending = if alone { Pending::new(&settings.out)? } else { Pending::none(&settings.out)? };
    spare(records.metadata(), &settings.out)?;
    Ok((lock, pending))
}

/// Reads the records; an error if there are none.
fn listed(records: &dyn Records, settings: &Settings, report: Report) -> Result<Listing, PrepareError> {
    let listing = records.read(settings, report)?;
    if listing.read == 0 {
        return Err(PrepareError::NoRecords { path: records.metadata().into() });
    }
    Ok(listing)
}

/// What the shards counted so far hold.
#[derive(Default)]
struct Tally {
    splits: [Counts; 3],
    /// Images of each size.
    sizes: Vec<usize>,
    dropped: DropCounts,
    shards: BTreeMap<String, Fingerprint>,
}

impl Tally {
    /// Counts a shard.
    fn count(&mut self, split: Split, shard: &Shard, notes: &Notes) {
        let images = shard.ids.len();
        self.shards.extend(shard.content.map(|content| (fingerprint::name(shard.file.path()), content)));
        let sum = &mut self.splits[split as usize];
        sum.kept += images;
        sum.enlarged += notes.enlarged;
        sum.untagged += (0..images).filter(|&i| shard.tags(i).is_empty()).count();
        sum.unapplied += notes.unapplied.len();
        self.sizes.resize(shard.header.all_sizes().len(), 0);
        shard.shapes.iter().for_each(|&shape| self.sizes[usize::from(shape)] += 1);
    }

    /// Counts a shard, and what was dropped from it.
    fn add(&mut self, split: Split, shard: &Shard, notes: &Notes) {
        notes.dropped.iter().for_each(|dropped| self.dropped.add(dropped.drop));
        self.count(split, shard, notes);
    }

    /// Writes the summary.
    fn finish(
        self,
        listing: &Listing,
        settings: &Settings,
        skipped: usize,
        vocabulary: Vocabulary,
        path: &Path,
    ) -> Result<Summary, PrepareError> {
        if self.splits.iter().all(|counts| counts.kept == 0) {
            return Err(PrepareError::NothingKept { records: listing.read, dropped: self.dropped });
        }
        let summary = self.summary(listing, settings, skipped, vocabulary);
        summary.save(path)?;
        Ok(summary)
    }

    fn summary(self, listing: &Listing, settings: &Settings, skipped: usize, vocabulary: Vocabulary) -> Summary {
        let Self { splits, sizes, dropped, shards } = self;
        let splits = Split::ALL.map(|split| (split, splits[split as usize]));
        let sizes = settings.sizes.iter().zip(sizes);
        let sizes = sizes.map(|(size, images)| Bucket { size: size.to_string(), images }).collect();
        let (records, unusable_tags, lacking) = (listing.read, listing.unusable_tags, Vec::new());
        Summary { records, skipped, splits, sizes, dropped, unusable_tags, vocabulary, shards, lacking }
    }
}

/// The renderer for an agenda's shards.
fn rendering<'a>(
    agenda: &'a Agenda,
    settings: &'a Settings,
    enlarge: Option<bool>,
    conditions: &'a Conditions,
) -> Renderer<'a> {
    Renderer {
        settings,
        enlarge: enlarge.unwrap_or(true),
        vocabulary: &agenda.vocabulary,
        places: &agenda.places,
        conditions,
        made_with: &agenda.made_with,
    }
}

/// Makes the shards of a part that do not exist, and counts all of the part.
fn make(
    agenda: &Agenda,
    existing: &[bool],
    path: &dyn Fn(&str) -> PathBuf,
    renderer: &Renderer,
    mut codec: Option<&mut LatentEncoder>,
    tally: &mut Tally,
    report: Report,
) -> Result<(), PrepareError> {
    let Part { number, of } = renderer.settings.part;
    let jobs = || agenda.jobs.iter().zip(existing).skip(number).step_by(of);
    report(Event::Start(jobs().map(|(job, _)| job.members.len()).sum()));
    for (job, &kept) in jobs() {
        let path = path(&job.name);
        if kept {
            report(Event::Done(job.members.len()));
        } else {
            let begun = SystemTime::now();
            let (rows, notes) = renderer.render(&job.members, codec.as_deref_mut(), report)?;
            rows.write(&path, &job.header, &notes)?;
            date(&path, begun)?;
        }
        let shard = Shard::open(&path, &agenda.vocabulary)?;
        let notes = Notes::read(&shard.file)?;
        tally.add(job.split, &shard, &notes);
        for DroppedRecord { file, why, .. } in
            notes.dropped.iter().filter(|dropped| dropped.drop == DropReason::Unreadable)
        {
            report(Event::Unreadable { file, why });
        }
        notes.unapplied.iter().for_each(|Unapplied { file, profile }| report(Event::Unapplied { file, profile }));
        report(Event::Shard { name: &job.name, images: shard.ids.len(), kept });
    }
    Ok(())
}

/// Refuses metadata that lies where the dataset's own files will lie.
fn spare(metadata: &Path, out: &Path) -> Result<(), PrepareError> {
    let place = metadata.canonicalize().ok();
    let there = place.as_deref().and_then(Path::parent).map(Path::to_path_buf) == out.canonicalize().ok();
    let ours = |name: &str| Split::names(name) || [VOCABULARY_FILE, SUMMARY_FILE].contains(&name);
    if there && place.as_deref().is_some_and(|place| ours(&fingerprint::name(place))) {
        return Err(PrepareError::Setting {
            what: "the metadata",
            found: metadata.display().to_string(),
            expected: "another file than one that the dataset will be made of".into(),
        });
    }
    Ok(())
}

/// Sets aside anything that lies where a file of the dataset will be written and is no such file. It may be somebody's
/// own.
fn set_aside<'a>(out: &Path, names: impl IntoIterator<Item = &'a str>, report: Report) -> Result<(), PrepareError> {
    for path in names.into_iter().map(|name| out.join(name)).filter(|path| path.is_file()) {
        let foreign = match path.file_name().and_then(|name| name.to_str()) {
            Some(VOCABULARY_FILE) => Vocabulary::load(&path).is_err(),
            Some(SUMMARY_FILE) => {
                let summary = input::text(&path).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
                summary.is_none_or(|summary| summary.get("records").is_none())
            }
            // A file that begins as a shard does and is damaged is made again.
            _ => {
                let head = File::open(&path).and_then(|file| input::head(&file)).at(&path)?;
                !input::kind(&head).is_some_and(|kind| kind.contains("safetensors"))
            }
        };
        if foreign {
            let aside = free_name(&path, "foreign");
            gone(fs::rename(&path, &aside)).at(&path)?;
            let text = format!("{}: not of a dataset; set aside as {}", path.display(), aside.display());
            report(Event::Warning { text: &text });
        }
    }
    Ok(())
}
