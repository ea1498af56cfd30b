//! Changing a dataset that is there: pictures are added as new shards, or all shards get other tags and conditions. Either
//! comes into force at one moment ([`pending`](crate::data::pending)): whoever opens the dataset before that, or after a
//! kill, finds the old one.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::agenda::{Agenda, COMMON, check_pictures, check_some_settings, count_tags, date, made_with, same_setting};
use super::existing::ExistingDataset;
use super::records::{Listing, Record, Records};
use super::render::{Conditions, LatentEncoder, feature, print};
use super::report::{Event, PrepareError, Report, Summary};
use super::settings::{ConditionInput, Settings};
use super::{Tally, listed, make, owned, rendering};
use crate::condition::Conditioning;
use crate::condition::vocabulary::Vocabulary;
use crate::data::dataset::{Dataset, DatasetError, Split};
use crate::data::pending::Pending;
use crate::data::shard::{
    DropCounts, DropReason, DroppedRecord, Header, Notes, SUMMARY_FILE, Shard, ShardImage, ShardImages,
    VOCABULARY_FILE, VocabularyPrint,
};
use crate::formats::At;
use crate::formats::fingerprint::Fingerprint;

/// Adds the pictures of records whose ids are not there yet, as new shards. The vocabulary stays. The same call again
/// resumes one that was killed.
///
/// # Errors
/// As [`prepare`](super::prepare()); there is no dataset, or one made in another way.
pub fn add(
    records: &dyn Records,
    settings: &Settings,
    mut codec: Option<LatentEncoder>,
    report: Report,
) -> Result<Summary, PrepareError> {
    let out = &settings.out;
    let (_lock, pending) = owned(records, settings, codec.as_ref(), report)?;
    let there = ExistingDataset::open(out, "add to")?;
    let conditions = Conditions::open(&settings.conditions)?;
    let mut listing = listed(records, settings, report)?;
    let now = made_with(None, settings, records.enlarge(), codec.as_ref(), &conditions);
    for (.., shard) in there.shards() {
        check_some_settings(&shard.file, &now, &|key| COMMON.contains(&key))?;
    }
    let advice = "give it an id of its own as a new picture, or prepare the dataset anew";
    let mut tally = Tally::default();
    let (mut known, mut refused) = (HashSet::new(), HashMap::new());
    let places: HashMap<i64, usize> = listing.records.iter().enumerate().map(|(i, record)| (record.id, i)).collect();
    compare(&there, &listing.records, &places, advice, report, |split, shard, notes| {
        tally.count(split, shard, notes);
        known.extend(&shard.ids);
        // A picture that had no usable feature may have one among others.
        let other_features = !same_setting(notes.settings.get("features"), now.get("features"));
        let stays = |drop: DropReason| drop != DropReason::NoFeature || !other_features;
        refused.extend(refusals(&places, shard, notes).into_iter().filter(|(_, (drop, _))| stays(*drop)));
    })?;
    // A picture that was dropped is looked at again if its file is another by now.
    let skipped = places.keys().filter(|id| known.contains(*id)).count();
    let mut dropped = DropCounts::default();
    let refused: Vec<_> = refused.into_iter().filter(|(id, _)| !known.contains(id)).collect();
    let (done, total) = (AtomicU64::new(0), refused.len() as u64);
    let another = |(id, (_, then)): &(i64, (DropReason, Option<Fingerprint>))| -> Result<bool, PrepareError> {
        let record = places.get(id).map(|&place| &listing.records[place]);
        let another = match (record, then) {
            (Some(record), Some(then)) => print(&record.read()?) != *then,
            _ => false,
        };
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        report(Event::Reading { what: "pictures that were dropped", done, total });
        Ok(another)
    };
    let again = refused.par_iter().map(another).collect::<Result<Vec<_>, _>>()?;
    for ((id, (drop, _)), _) in refused.into_iter().zip(again).filter(|(_, again)| !again) {
        dropped.add(drop);
        known.insert(id);
    }
    listing.records.retain(|record| !known.contains(&record.id));
    conditions.select(&mut listing);
    tally.dropped = std::mem::take(&mut listing.dropped);
    dropped.0.into_iter().for_each(|(drop, count)| *tally.dropped.0.entry(drop).or_default() += count);

    let enlarge = records.enlarge();
    let agenda = Agenda::new(&listing, settings, enlarge, codec.as_ref(), &conditions, Some(&there))?;
    if let Some((shard, job)) = there.shards().map(|(.., shard)| shard).next().zip(agenda.jobs.first()) {
        check_conditions(shard, &job.header)?;
    }
    if there.renamed() {
        let text = format!("tags are renamed in {VOCABULARY_FILE}: new pictures have those that are called as there");
        report(Event::Warning { text: &text });
    }
    warn_of_unknown_tags(&listing, &there.vocabulary, settings.vocabulary, report);
    pending.begin(|name| agenda.jobs.iter().any(|job| job.name == name))?;
    let path = |name: &str| pending.path(name);
    let existing =
        agenda.jobs.iter().map(|job| agenda.is_made(job, &path(&job.name))).collect::<Result<Vec<_>, _>>()?;
    let images = |tally: &Tally| tally.splits.iter().map(|counts| counts.kept).sum::<usize>();
    let old = images(&tally);
    let renderer = rendering(&agenda, settings, enlarge, &conditions);
    make(&agenda, &existing, &path, &renderer, codec.as_mut(), &mut tally, report)?;
    // Shards without a picture would be looked through for ever.
    if images(&tally) > old {
        let summary = tally.finish(&listing, settings, skipped, agenda.vocabulary, &path(SUMMARY_FILE))?;
        commit(pending, out)?;
        Ok(summary)
    } else {
        pending.discard()?;
        tally.shards.retain(|name, _| out.join(name).exists());
        tally.finish(&listing, settings, skipped, agenda.vocabulary, &out.join(SUMMARY_FILE))
    }
}

/// Says which tags of new pictures are lost, since the vocabulary stays, though a vocabulary of `most` tags that was counted
/// now would have them.
fn warn_of_unknown_tags(listing: &Listing, vocabulary: &Vocabulary, most: usize, report: Report) {
    let mut counts: HashMap<u32, u64> = HashMap::new();
    listing.records.iter().flat_map(|record| &*record.tags).for_each(|tag| *counts.entry(*tag).or_default() += 1);
    let least = vocabulary.tags().last().filter(|_| vocabulary.tags().len() >= most).map_or(1, |rarest| rarest.count);
    let named = counts.into_iter().map(|(tag, count)| (listing.tags.name(tag), count));
    let mut unknown: Vec<_> = named.filter(|(name, count)| *count >= least && vocabulary.get(name).is_none()).collect();
    unknown.sort_unstable_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
    if let Some((first, of)) = unknown.first() {
        let count = unknown.len();
        let text = format!(
            "{VOCABULARY_FILE} stays, and lacks {count} of the new pictures' tags, such as {first:?}, which is on {of} of them"
        );
        report(Event::Warning { text: &text });
    }
}

/// Puts what was made in force, once it is known that the dataset can be opened with it.
fn commit(pending: Pending, out: &Path) -> Result<(), PrepareError> {
    for split in Split::ALL {
        match Dataset::of_view(out, &pending.view(), split) {
            Err(DatasetError::NoShards { .. } | DatasetError::Empty { .. }) => {}
            opened => drop(opened?),
        }
    }
    Ok(pending.commit()?)
}

/// The ids of a shard's records, including those that were dropped, each with what its file was, as far as that is
/// known. `places` has the place of every record in its listing.
fn files<'a>(places: &HashMap<i64, usize>, shard: &Shard, notes: &'a Notes) -> Vec<(i64, &'a Fingerprint)> {
    notes.files(|| {
        let dropped = notes.dropped.iter().map(|dropped| dropped.id);
        let mut members: Vec<i64> = shard.ids.iter().copied().chain(dropped).collect();
        members.sort_unstable_by_key(|id| places.get(id));
        // If some are not listed by now, nobody knows where they were in the order.
        if members.iter().all(|id| places.contains_key(id)) { members } else { Vec::new() }
    })
}

/// The records that were dropped from a shard, each with the reason and, if that is known, what its file was.
fn refusals(
    places: &HashMap<i64, usize>,
    shard: &Shard,
    notes: &Notes,
) -> Vec<(i64, (DropReason, Option<Fingerprint>))> {
    let files: HashMap<_, _> = files(places, shard, notes).into_iter().collect();
    let refusal = |dropped: &DroppedRecord| (dropped.id, (dropped.drop, files.get(&dropped.id).map(|file| **file)));
    notes.dropped.iter().map(refusal).collect()
}

/// Calls `each` with every shard. It is an error, with `advice`, if a picture in one of them has changed since; the
/// picture's file may be gone.
fn compare<'a>(
    there: &'a ExistingDataset,
    records: &[Record],
    places: &HashMap<i64, usize>,
    advice: &'static str,
    report: Report,
    mut each: impl FnMut(Split, &'a Shard, &Notes),
) -> Result<(), PrepareError> {
    let total = there.shards().count() as u64;
    for (done, (split, _, shard)) in (1..).zip(there.shards()) {
        let (notes, kept) = (Notes::read(&shard.file)?, shard.ids.iter().collect::<HashSet<_>>());
        let files = files(places, shard, &notes).into_iter().filter(|(id, _)| kept.contains(id));
        let pairs: Vec<_> = files.filter_map(|(id, then)| Some((&records[*places.get(&id)?], then))).collect();
        let now = |record: &Record| match record.read() {
            Ok(read @ Ok(_)) => Ok(Some(print(&read))),
            _ => Ok(None),
        };
        check_pictures(shard.file.path(), &pairs, &now, advice)?;
        report(Event::Reading { what: "pictures that are there", done, total });
        each(split, shard, &notes);
    }
    Ok(())
}

/// An error if a new shard's conditions would not mean the same as those that are there.
fn check_conditions(there: &Shard, new: &Header) -> Result<(), PrepareError> {
    let old = &there.header;
    if old.condition_dim == new.condition_dim && !old.conditioning.differs(&new.conditioning) {
        return Ok(());
    }
    let show = |header: &Header| format!("{} values of {}", header.condition_dim, header.conditioning);
    let differs = format!("conditions of {}, now {}", show(old), show(new));
    Err(PrepareError::OtherSettings { path: there.file.path().into(), differs })
}

/// Whether a picture was dropped for want of a feature that it has now.
fn has_feature_now(dropped: &DroppedRecord, conditions: &Conditions) -> bool {
    let Conditions::Known(features) = conditions else { return false };
    dropped.drop == DropReason::NoFeature && features.get(dropped.id).is_some_and(|values| feature(values).is_ok())
}

/// Gives all images the tags, flip and repeats that the records have by now, and new conditions: made of these tags, or
/// the features of [`Settings::conditions`]. If the conditions are features and no new ones are given, they stay as they are. The
/// vocabulary is counted anew, on the dataset's records. Nothing is decoded or encoded; disk space for all shards again is
/// needed meanwhile.
///
/// # Errors
/// As [`prepare`](super::prepare()); an image has no record, or no feature.
pub fn retag(records: &dyn Records, settings: &Settings, report: Report) -> Result<Summary, PrepareError> {
    let out = &settings.out;
    let (_lock, pending) = owned(records, settings, None, report)?;
    let there = ExistingDataset::open(out, "change the tags of")?;
    let conditions = Conditions::open(&settings.conditions)?;
    let mut listing = listed(records, settings, report)?;
    let places: HashMap<i64, usize> = listing.records.iter().enumerate().map(|(i, record)| (record.id, i)).collect();
    all_have(&there, records.metadata(), "no usable record", |id| places.contains_key(&id))?;
    if let (Conditions::Known(features), ConditionInput::Features { path, .. }) = (&conditions, &settings.conditions) {
        all_have(&there, path, "no feature", |id| features.get(id).is_some_and(|values| feature(values).is_ok()))?;
    }
    let mut now = made_with(None, settings, records.enlarge(), None, &conditions);
    // Settings that only matter when pictures are encoded may be left out.
    let counts = |key: &str| COMMON.contains(&key) && !["vae", "tagger"].contains(&key);
    for (.., shard) in there.shards() {
        check_some_settings(&shard.file, &now, &counts)?;
    }
    let advice = "if only its file was written anew, an empty folder of images will do: no picture is needed";
    let mut members = HashSet::new();
    compare(&there, &listing.records, &places, advice, report, |_, shard, notes| {
        members.extend(&shard.ids);
        members.extend(notes.dropped.iter().filter(|dropped| !has_feature_now(dropped, &conditions)).map(|of| of.id));
    })?;
    let listed = listing.records.len();
    listing.records.retain(|record| members.contains(&record.id));
    let skipped = listed - listing.records.len();
    let mut tally = Tally { dropped: std::mem::take(&mut listing.dropped), ..Tally::default() };
    // All images have a feature. What else has none was dropped already, and its shard says why.
    conditions.select(&mut listing);
    let with = made_with(Some(&listing), settings, records.enlarge(), None, &conditions);
    let with = with.get("records").and_then(Value::as_str).unwrap_or_default();
    now.insert("records".into(), format!("{}{with}", Notes::RETAGGED).into());
    if there.renamed() {
        let (file, metadata) = (VOCABULARY_FILE, records.metadata().display());
        let text = format!("tags that were renamed in {file} are called again as in {metadata}");
        report(Event::Warning { text: &text });
    }
    let vocabulary = count_tags(&listing, settings)?;
    let (then, tags) = (there.vocabulary.tags().len(), vocabulary.tags().len());
    if tags != then {
        let text = format!("{VOCABULARY_FILE} has {tags} tags from now on, it had {then}");
        report(Event::Warning { text: &text });
    }
    let tagged = Tagged::new(&there, &listing, &vocabulary, &conditions, &now)?;
    if tagged.keeps {
        let conditioning = &tagged.conditioning;
        let text =
            format!("conditions stay {conditioning}: another dataset, without features, is how they become tags");
        report(Event::Warning { text: &text });
    }
    pending.begin(|_| false)?;
    report(Event::Start(there.shards().map(|(.., shard)| shard.ids.len()).sum()));
    for (split, number, shard) in there.shards() {
        let (name, images) = (split.shard_name(number), shard.ids.len());
        let path = pending.path(&name);
        let notes = tagged.write(shard, &path)?;
        report(Event::Done(images));
        report(Event::Shard { name: &name, images, kept: false });
        tally.add(split, &Shard::open(&path, &vocabulary)?, &notes);
    }
    vocabulary.save(&pending.path(VOCABULARY_FILE))?;
    let summary = tally.finish(&listing, settings, skipped, vocabulary, &pending.path(SUMMARY_FILE))?;
    commit(pending, out)?;
    Ok(summary)
}

/// An error that names the first image of a dataset that has nothing in a file, if there is one.
fn all_have(
    there: &ExistingDataset,
    path: &Path,
    lack: &'static str,
    has: impl Fn(i64) -> bool,
) -> Result<(), PrepareError> {
    let mut lacking = there.shards().flat_map(|(.., shard)| &shard.ids).copied().filter(|&id| !has(id));
    match lacking.next() {
        None => Ok(()),
        Some(id) => Err(PrepareError::Lacking { path: path.into(), lack, count: 1 + lacking.count(), id }),
    }
}

/// What all shards are given instead of their tags and conditions.
struct Tagged<'a> {
    records: HashMap<i64, &'a Record>,
    /// Where the listing's tags are in the vocabulary.
    places: Vec<Option<u32>>,
    vocabulary: &'a Vocabulary,
    conditions: &'a Conditions,
    /// Whether the shards keep the features that they have.
    keeps: bool,
    dim: usize,
    conditioning: Conditioning,
    made_with: &'a Map<String, Value>,
}

impl<'a> Tagged<'a> {
    fn new(
        there: &ExistingDataset,
        listing: &'a Listing,
        vocabulary: &'a Vocabulary,
        conditions: &'a Conditions,
        made_with: &'a Map<String, Value>,
    ) -> Result<Self, PrepareError> {
        let old = there.shards().next().map(|(.., shard)| &shard.header);
        let features = |header: &&Header| header.conditioning != Conditioning::Tags;
        let kept = old.filter(|header| matches!(conditions, Conditions::Tags) && features(header));
        let (dim, conditioning) = match kept {
            Some(header) => (header.condition_dim, header.conditioning.clone()),
            None => (conditions.width().unwrap_or(vocabulary.len()), conditions.conditioning()),
        };
        if dim == 0 {
            let (what, found) = ("the number of distinct tags on training images", "0".into());
            return Err(PrepareError::Setting { what, found, expected: "at least 1".into() });
        }
        let records = listing.records.iter().map(|record| (record.id, record)).collect();
        let places = listing.places(vocabulary);
        Ok(Self { records, places, vocabulary, conditions, keeps: kept.is_some(), dim, conditioning, made_with })
    }

    /// Writes a shard anew, and returns its notes.
    fn write(&self, shard: &Shard, path: &Path) -> Result<Notes, PrepareError> {
        let mut rows = ShardImages::default();
        for (i, &id) in shard.ids.iter().enumerate() {
            let record = self.records[&id];
            let tags = record.places(&self.places);
            let condition = match self.conditions {
                _ if self.keeps => {
                    shard.condition(i).as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect()
                }
                Conditions::Known(features) => feature(features.get(id).unwrap_or_default()).unwrap_or_default(),
                _ => self.vocabulary.multi_hot(&tags),
            };
            let (image, shape, flip, repeats) = (shard.image(i), shard.shapes[i], record.flip, record.repeats);
            rows.push(&ShardImage { id, image, shape, condition: &condition, tags: &tags, flip, repeats });
        }
        let mut notes = Notes::read(&shard.file)?;
        // Adding takes them.
        notes.dropped.retain(|dropped| !has_feature_now(dropped, self.conditions));
        for key in ["records", "vocabulary", "features", "tagger"] {
            match self.made_with.get(key) {
                Some(value) => notes.settings.insert(key.into(), value.clone()),
                // Features that stay are still what they were made of.
                None if self.keeps => None,
                None => notes.settings.remove(key),
            };
        }
        let (conditioning, vocabulary) = (self.conditioning.clone(), Some(VocabularyPrint::of(self.vocabulary)));
        let header = Header { condition_dim: self.dim, conditioning, vocabulary, ..shard.header.clone() };
        rows.write(path, &header, &notes)?;
        // It is as old as its pictures.
        let about = fs::metadata(shard.file.path()).and_then(|about| about.modified()).at(shard.file.path())?;
        date(path, about)?;
        Ok(notes)
    }
}
