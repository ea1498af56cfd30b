//! From images and their tags to the shards of a [`dataset`](super::dataset), in four stages:
//!
//! 1. read: the [`Records`] of a [`Folder`] or of [`Danbooru`], or of another source;
//! 2. plan: they are ordered and cut into shards, before anything is decoded, and compared with what is there;
//! 3. render: each picture is decoded, cropped and resized ([`pictures`](crate::pictures)); one that would lose more
//!    than the given share of its area by cropping is dropped. Then a codec may make latents of it. The condition is
//!    its tags, or a feature divided by its norm: that in a file ([`features`](super::features)), or what a tagger
//!    makes of the picture before it is cropped and resized;
//! 4. write: the shards ([`shard`](super::shard)), one after the other, and `summary.json` ([`Summary`]).
//!
//! Splits follow from the id alone: `id % M == 0` is validation, `== 1` test. So they stay
//! what they are when images are added. The vocabulary is counted on the training images.
//!
//! A shard depends on its records and the settings only: it is made again with the same bytes, in any order, by any
//! number of threads; one that is there already, and whole, is kept. Shards that were made with other settings, or of
//! other pictures, stop everything, unless no image is in any of them.

mod danbooru;
mod folder;
mod plan;
mod records;
mod render;
mod report;
mod settings;

use std::path::Path;
use std::time::SystemTime;

pub use danbooru::Danbooru;
pub use folder::Folder;
pub use records::{Listing, Place, Record, Records, Tags, read_lines};
pub use render::{Codec, Encode};
pub use report::{Counts, Event, PrepareError, Report, SUMMARY_FILE, Summary};
pub use settings::Settings;

use super::dataset::Split;
pub use super::shard::{Drop, Drops};
use super::shard::{Dropped, Notes, Shard, Unapplied, VOCABULARY_FILE};
use crate::formats::DirLock;
use plan::{Plan, date};
use render::{Conditions, Renderer};

/// Prepares a dataset: of pictures, or with a codec of their latents.
///
/// # Errors
/// Unusable settings or metadata, an output directory that holds another dataset or cannot
/// be written. An unreadable image is no error: it is reported, counted and left out.
pub fn prepare(
    records: &dyn Records,
    settings: &Settings,
    mut codec: Option<Codec>,
    report: Report,
) -> Result<Summary, PrepareError> {
    settings.check(codec.as_ref().map_or(1, |codec| codec.factor))?;
    let out = &settings.out;
    let lock = DirLock::exclusive(out)?;
    lock.warning().iter().for_each(|text| report(Event::Warning { text }));
    spare(records.metadata(), out)?;
    let conditions = Conditions::open(settings)?;
    let mut listing = records.read(settings, report)?;
    if listing.read == 0 {
        return Err(PrepareError::NoRecords { path: records.metadata().into() });
    }
    conditions.select(&mut listing);
    let (read, mut dropped) = (listing.read, std::mem::take(&mut listing.dropped));
    if listing.records.is_empty() {
        return Err(PrepareError::NothingKept { records: read, dropped });
    }

    let enlarge = records.enlarge();
    let plan = Plan::new(&listing, settings, enlarge, codec.as_ref(), &conditions)?;
    // Before anything is written: a dataset made otherwise stays as it is.
    let existing = plan.existing(out, report)?;
    plan.settle_vocabulary(out, existing.contains(&true), report)?;

    report(Event::Start(listing.records.len()));
    let renderer = Renderer {
        settings,
        enlarge: enlarge.unwrap_or(true),
        vocabulary: &plan.vocabulary,
        places: listing.tags.names().iter().map(|tag| plan.vocabulary.get(tag)).collect(),
        conditions: &conditions,
        made_with: &plan.made_with,
    };
    let mut splits = Split::ALL.map(|split| (split, Counts::default()));
    for (job, kept) in plan.jobs.iter().zip(existing) {
        let path = out.join(&job.name);
        if kept {
            report(Event::Done(job.members.len()));
        } else {
            let begun = SystemTime::now();
            let (rows, notes) = renderer.render(&job.members, codec.as_mut(), report)?;
            rows.write(&path, &job.header, &notes)?;
            date(&path, begun)?;
        }
        let shard = Shard::open(&path, &plan.vocabulary)?;
        let notes = Notes::read(&shard.file)?;
        for Dropped { drop, file, why, .. } in &notes.dropped {
            dropped.add(*drop);
            if *drop == Drop::Unreadable {
                report(Event::Unreadable { file, why });
            }
        }
        notes.unapplied.iter().for_each(|Unapplied { file, profile }| report(Event::Unapplied { file, profile }));
        let images = shard.ids.len();
        report(Event::Shard { name: &job.name, images, kept });
        let sum = &mut splits[job.split as usize].1;
        sum.kept += images;
        sum.enlarged += notes.enlarged;
        sum.untagged += (0..images).filter(|&i| shard.tags(i).is_empty()).count();
        sum.unapplied += notes.unapplied.len();
    }
    if splits.iter().all(|(_, counts)| counts.kept == 0) {
        return Err(PrepareError::NothingKept { records: read, dropped });
    }
    let Plan { vocabulary, .. } = plan;
    let summary = Summary { records: read, splits, dropped, unusable_tags: listing.unusable_tags, vocabulary };
    summary.save(out)?;
    Ok(summary)
}

/// Refuses metadata that lies where the dataset's own files will.
fn spare(metadata: &Path, out: &Path) -> Result<(), PrepareError> {
    let place = metadata.canonicalize().ok();
    let ours = [VOCABULARY_FILE, SUMMARY_FILE].map(|name| Some(out.canonicalize().ok()?.join(name)));
    if place.is_some() && ours.contains(&place) {
        return Err(PrepareError::Setting {
            what: "the metadata",
            found: metadata.display().to_string(),
            expected: "another file than one that the dataset will be made of".into(),
        });
    }
    Ok(())
}
