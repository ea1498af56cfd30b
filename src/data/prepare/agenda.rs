//! The second stage: which shards there will be, what they depend on, and which of them are there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::existing::ExistingDataset;
use super::records::{Listing, Record};
use super::render::{CHUNK, Conditions, LatentEncoder, print};
use super::report::{Event, PrepareError, Report};
use super::settings::Settings;
use crate::codec::LATENTS;
use crate::collective::Part;
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::data::dataset::Split;
use crate::data::shard::{
    self, Contents, Header, Notes, Representation, SUMMARY_FILE, Shard, VOCABULARY_FILE, VocabularyPrint, check_whole,
};
use crate::formats::fingerprint::{Fingerprint, Identity};
use crate::formats::safetensors::SafeFile;
use crate::formats::{At, names};
use crate::memory;
use crate::pictures::Size;

/// How far apart the clocks of file systems, and of machines that share them, may be.
const SLACK: Duration = Duration::from_secs(2);

/// How many pictures of a shard are compared whatever their dates are, since the pictures of another folder may all be
/// older.
const LOOKED_AT: usize = 4;

/// A shard to be made.
pub(super) struct PlannedShard<'a> {
    pub split: Split,
    pub name: String,
    pub members: Vec<&'a Record>,
    /// The shard's header, but for its count.
    pub header: Header,
}

/// What is to be made.
pub(super) struct Agenda<'a> {
    /// The vocabulary, counted on the training images.
    pub vocabulary: Vocabulary,
    /// See [`Listing::places`].
    pub places: Vec<Option<u32>>,
    pub jobs: Vec<PlannedShard<'a>>,
    /// The settings that shards depend on, by name.
    pub made_with: Map<String, Value>,
}

impl<'a> Agenda<'a> {
    /// Cuts the records into shards. Shards that are added to a dataset follow its own, and use its vocabulary.
    pub fn new(
        listing: &'a Listing,
        settings: &Settings,
        enlarge: Option<bool>,
        codec: Option<&LatentEncoder>,
        conditions: &Conditions,
        there: Option<&ExistingDataset>,
    ) -> Result<Self, PrepareError> {
        let of = |split| listing.records.iter().filter(move |record| settings.split(record.id) == split);
        let vocabulary = match there {
            Some(there) => there.vocabulary.clone(),
            None => count_tags(listing, settings)?,
        };
        if vocabulary.is_empty() && matches!(conditions, Conditions::Tags) {
            return Err(PrepareError::Setting {
                what: "the number of distinct tags on training images",
                found: "0".into(),
                expected: "at least 1".into(),
            });
        }
        // Somebody may have renamed tags since, but all shards of a dataset must know the same names.
        let known = there.and_then(|there| there.shards().find_map(|(.., shard)| shard.header.vocabulary));
        let (kind, factor, channels) = match codec {
            None => (Representation::Images, 1, 3),
            Some(codec) => (Representation::Latents, codec.factor, LATENTS),
        };
        let stored = |size: &Size| [size.height, size.width].map(|side| side as usize / factor);
        let sizes: Vec<[usize; 2]> = settings.sizes.iter().map(stored).collect();
        let [height, width] = sizes[0];
        let header = Header {
            kind,
            height,
            width,
            // The header of a dataset of one size is as it was before there could be several.
            sizes: if sizes.len() > 1 { sizes } else { Vec::new() },
            channels,
            condition_dim: conditions.width().unwrap_or(vocabulary.len()),
            conditioning: conditions.conditioning(),
            autoencoder: codec.map(|codec| codec.autoencoder.clone()),
            vocabulary: known.or_else(|| Some(VocabularyPrint::of(&vocabulary))),
            count: 0,
            shards: 0,
            source: settings.source.clone(),
            licence: settings.licence.clone(),
        };
        let images = listing.records.len().min(settings.shard_size);
        let area = settings.sizes.iter().map(|size| u128::from(size.pixels())).max();
        let decoded = 3 * area.unwrap_or(0) * images.min(CHUNK) as u128;
        let what = format!("making shards of {images} images of {}", settings.named_sizes());
        memory::check(what, images as u128 * header.image_bytes() + decoded)?;

        let mut jobs = Vec::new();
        for split in Split::ALL {
            let members: Vec<_> = of(split).collect();
            let first = there.map_or(0, |there| there.of(split).len());
            let shards = first + members.len().div_ceil(settings.shard_size);
            let header = Header { shards, ..header.clone() };
            let parts = members.chunks(settings.shard_size).enumerate();
            jobs.extend(parts.map(|(number, members)| {
                let (name, members) = (split.shard_name(first + number), members.to_vec());
                PlannedShard { split, name, members, header: header.clone() }
            }));
        }
        let made_with = made_with(Some(listing), settings, enlarge, codec, conditions);
        let places = listing.places(&vocabulary);
        Ok(Self { vocabulary, places, jobs, made_with })
    }

    /// Which of the shards are there and, if they belong to this part, whole. A shard that holds no image is made
    /// again, whatever it was made with. Any other that was made in another way is an error.
    pub fn existing(&self, out: &Path, part: Part, report: Report) -> Result<Vec<bool>, PrepareError> {
        let mut there = BTreeMap::new();
        for name in names(out).at(out)?.into_iter().filter(|name| Split::names(name)) {
            there.insert(name.clone(), SafeFile::open(out.join(name)));
        }
        // A call that kept no image, with the wrong folder for example, must not stand in the way of the right one.
        let names: Vec<String> = there.keys().cloned().collect();
        if there.values().all(|file| file.as_ref().is_ok_and(shard::holds_nothing)) {
            // A shard that another part has just made with the same settings may stay.
            let made_so = |file: &SafeFile| Notes::settings(file).as_ref() == Some(&self.made_with);
            there.retain(|_, file| part != Part::WHOLE && file.as_ref().is_ok_and(made_so));
            // Each part removes its own shards, so that none removes what another has just made again. The first also
            // removes what belongs to no part.
            let of = |name: &String| self.jobs.iter().position(|job| job.name == *name).map_or(0, |at| at % part.of);
            for name in names.iter().filter(|name| !there.contains_key(*name) && of(name) == part.number) {
                super::gone(fs::remove_file(out.join(name))).at(out.join(name))?;
            }
        }
        let files: Vec<_> = self.jobs.iter().map(|job| there.remove(&job.name).and_then(Result::ok)).collect();
        files.iter().flatten().try_for_each(|file| check_settings(file, &self.made_with))?;
        let ours: HashSet<_> = self.jobs.iter().map(|job| job.name.as_str()).collect();
        if let Some((name, file)) = there.iter().filter(|(name, _)| !ours.contains(name.as_str())).min_by_key(|of| of.0)
        {
            let path = out.join(name);
            let added = file.as_ref().is_ok_and(|file| Notes::settings(file).is_some());
            return Err(if added { PrepareError::Added { path } } else { PrepareError::Stray { path } });
        }
        let any = files.iter().any(Option::is_some);
        let contents = if any { Contents::read(&out.join(SUMMARY_FILE))? } else { Contents::default() };
        let own = |at: usize| at % part.of == part.number;
        let total = files.iter().enumerate().filter(|(at, file)| own(*at) && file.is_some()).count() as u64;
        let mut done = 0;
        let whole = |(at, (job, file)): (usize, (&PlannedShard, Option<SafeFile>))| {
            let Some(file) = file else { return Ok(false) };
            if !own(at) {
                return Ok(true);
            }
            let checked = check_whole(&file).and_then(|_| Notes::read(&file));
            done += 1;
            report(Event::Reading { what: "shards that are there", done, total });
            match checked {
                Ok(notes) => {
                    contents.check(file.path(), shard::content(&file)?)?;
                    self.check_job(job, &file, &notes).map(|()| true)
                }
                Err(why) => {
                    report(Event::Damaged { why: &why.to_string() });
                    Ok(false)
                }
            }
        };
        self.jobs.iter().zip(files).enumerate().map(whole).collect()
    }

    /// Writes the vocabulary. But where shards are there, the file is theirs and stays, since somebody may have renamed
    /// tags in it.
    pub fn settle_vocabulary(&self, out: &Path, shards: bool, report: Report) -> Result<(), PrepareError> {
        let path = out.join(VOCABULARY_FILE);
        match shards && path.exists() {
            true => check_vocabulary(&path, &self.vocabulary, report),
            false => Ok(self.vocabulary.save(&path)?),
        }
    }

    /// Whether a pending shard, which is not part of the dataset yet, is what a job would make.
    pub fn is_made(&self, job: &PlannedShard, path: &Path) -> Result<bool, PrepareError> {
        let Ok(file) = SafeFile::open(path) else { return Ok(false) };
        if Notes::settings(&file).as_ref() != Some(&self.made_with) || check_whole(&file).is_err() {
            return Ok(false);
        }
        let Ok(notes) = Notes::read(&file) else { return Ok(false) };
        // Tags may have been renamed since it was made.
        if self.other_tags(job, &file)?.is_some() {
            return Ok(false);
        }
        match self.check_job(job, &file, &notes) {
            Err(PrepareError::OtherPicture { .. } | PrepareError::OtherContent { .. }) => Ok(false),
            checked => checked.map(|()| true),
        }
    }

    /// An error if a shard is not of the records of a job, or was made of other pictures than those that are there now.
    fn check_job(&self, job: &PlannedShard, file: &SafeFile, notes: &Notes) -> Result<(), PrepareError> {
        let records: BTreeMap<i64, &Record> = job.members.iter().map(|&record| (record.id, record)).collect();
        let dropped = notes.dropped.iter().map(|dropped| dropped.id);
        let found: BTreeSet<i64> = file.i64("ids")?.into_iter().chain(dropped).collect();
        let what = match found.symmetric_difference(&records.keys().copied().collect()).next() {
            Some(id) => {
                let lacks = if found.contains(id) { "not expected" } else { "missing" };
                Some(format!("of {} records, expected {} (id {id} is {lacks})", found.len(), records.len()))
            }
            None if Notes::retagged(&notes.settings) => self.other_tags(job, file)?,
            None => None,
        };
        if let Some(what) = what {
            return Err(PrepareError::OtherContent { path: file.path().into(), what });
        }
        let files = notes.files(|| job.members.iter().map(|record| record.id).collect());
        let pairs: Vec<_> = files.into_iter().filter_map(|(id, file)| Some((*records.get(&id)?, file))).collect();
        let now = |record: &Record| Ok(Some(print(&record.read()?)));
        check_pictures(file.path(), &pairs, &now, "remove this shard, and it is made anew")
    }

    /// How a shard's vocabulary, number or tags differ from those that a job would give it.
    fn other_tags(&self, job: &PlannedShard, file: &SafeFile) -> Result<Option<String>, PrepareError> {
        let Some(header) = Header::of(file)? else { return Ok(Some("no shard".into())) };
        if header.shards != job.header.shards {
            return Ok(Some(format!("one of {} shards, expected {}", header.shards, job.header.shards)));
        }
        if header.vocabulary != job.header.vocabulary {
            return Ok(Some("with a vocabulary that was counted on other records".into()));
        }
        let shard = Shard::open(file.path(), &self.vocabulary)?;
        let rows: HashMap<i64, usize> = shard.ids.iter().copied().zip(0..).collect();
        let other = |record: &&&Record| {
            rows.get(&record.id).is_some_and(|&i| {
                let now = (u8::from(record.flip), record.repeats.get());
                (shard.flips[i], shard.repeats[i]) != now || shard.tags(i) != record.places(&self.places)
            })
        };
        Ok(job.members.iter().find(other).map(|record| format!("with other tags, flip or repeats of id {}", record.id)))
    }
}

/// The most frequent tags of the records for training, whether or not their pictures turn out to be usable.
pub(super) fn count_tags(listing: &Listing, settings: &Settings) -> Result<Vocabulary, VocabularyError> {
    let train = listing.records.iter().filter(|record| settings.split(record.id) == Split::Train);
    let sets = train.map(|record| record.tags.iter().map(|&tag| listing.tags.name(tag)));
    Vocabulary::most_frequent(sets, settings.vocabulary)
}

/// Everything that the bytes of shards depend on; without a listing, all but the records. Image files count by their
/// lengths, since their dates change with copying. [`check_pictures`] looks at their contents.
pub(super) fn made_with(
    listing: Option<&Listing>,
    settings: &Settings,
    enlarge: Option<bool>,
    codec: Option<&LatentEncoder>,
    conditions: &Conditions,
) -> Map<String, Value> {
    let [r, g, b] = settings.background;
    let Value::Object(mut all) = json!({
        "size": settings.named_sizes(),
        "background": format!("#{r:02x}{g:02x}{b:02x}"),
        "max-crop": settings.max_crop,
        "vocabulary": settings.vocabulary,
        "validation-modulus": settings.validation_modulus,
        "shard-size": settings.shard_size,
        "source": settings.source,
        "licence": settings.licence,
    }) else {
        unreachable!("braces make an object")
    };
    let vae = codec.map(|codec| json!({"name": codec.autoencoder.name, "fingerprint": codec.autoencoder.fingerprint}));
    let (known, tagger) = match conditions {
        Conditions::Tags => (None, None),
        Conditions::Known(features) => (Some(json!(features.identity())), None),
        Conditions::Tagger(tagger) => {
            let network = tagger.network();
            let (name, node) = (tagger.source(), network.node());
            (None, Some(json!({"name": name, "fingerprint": network.fingerprint(), "node": node})))
        }
    };
    let records = listing.map(|listing| Value::from(format!("{} ({:016x})", listing.records.len(), hash(listing))));
    let others = [
        ("records", records),
        ("enlarge", enlarge.map(Value::from)),
        ("vae", vae),
        ("features", known),
        ("tagger", tagger),
    ];
    all.extend(others.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
    all
}

/// FNV-1a of 64 bits. It has to recognise a change, not to withstand an attack.
fn hash(listing: &Listing) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes.iter().chain(&[0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for record in &listing.records {
        add(&record.id.to_le_bytes());
        add(record.file.as_bytes());
        record.tags.iter().for_each(|&tag| add(listing.tags.name(tag).as_bytes()));
        add(&[u8::from(record.flip), record.repeats.get()]);
        add(&record.place.length().to_le_bytes());
    }
    hash
}

/// Whether a setting is the same. Files are recognised by their content.
pub(super) fn same_setting(before: Option<&Value>, now: Option<&Value>) -> bool {
    match (before, now) {
        (Some(Value::Object(before)), Some(Value::Object(now))) => {
            ["fingerprint", "node"].iter().all(|&key| before.get(key) == now.get(key))
        }
        (before, now) => before == now,
    }
}

/// Settings that must be the same for all pictures of a dataset.
pub(super) const COMMON: [&str; 7] =
    ["size", "background", "max-crop", "validation-modulus", "enlarge", "vae", "tagger"];

/// An error if a shard was made with another value of any setting. [`Agenda::existing`] looks at the records of one that
/// was retagged.
pub(super) fn check_settings(file: &SafeFile, now: &Map<String, Value>) -> Result<(), PrepareError> {
    let retagged = Notes::settings(file).is_some_and(|settings| Notes::retagged(&settings));
    check_some_settings(file, now, &|key| key != "records" || !retagged)
}

/// An error if a shard was made with another value of a setting that counts.
pub(super) fn check_some_settings(
    file: &SafeFile,
    now: &Map<String, Value>,
    counts: &dyn Fn(&str) -> bool,
) -> Result<(), PrepareError> {
    let path = file.path();
    let before = Notes::settings(file).ok_or_else(|| PrepareError::Stray { path: path.into() })?;
    let show = |settings: &Map<String, Value>, key: &String| match settings.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => match serde_json::from_value::<Identity>(other.clone()) {
            Ok(file) => match other.get("node").and_then(Value::as_str) {
                Some(node) => format!("{file}, tensor {node}"),
                None => file.to_string(),
            },
            Err(_) => other.to_string(),
        },
        None => "none".into(),
    };
    let added = before.keys().filter(|key| !now.contains_key(*key));
    let differs = |key: &&String| counts(key) && !same_setting(before.get(*key), now.get(*key));
    let others: Vec<_> = now.keys().chain(added).filter(differs).collect();
    let path = path.into();
    match others[..] {
        [] => Ok(()),
        [key] if key == "records" => {
            Err(PrepareError::OtherRecords { path, found: show(&before, key), now: show(now, key) })
        }
        _ => {
            let of = |key: &&String| format!("{key} {}, now {}", show(&before, key), show(now, key));
            Err(PrepareError::OtherSettings { path, differs: others.iter().map(of).collect::<Vec<_>>().join("; ") })
        }
    }
}

/// An error, with `advice`, if a shard was made of other pictures than those that are there `now`. Pictures that are
/// not there are not compared. Those whose files are newer than the shard are read again, and [`LOOKED_AT`] others.
/// Contents decide; a date is only a reason to look, as it changes with copying.
pub(super) fn check_pictures(
    path: &Path,
    pairs: &[(&Record, &Fingerprint)],
    now: &(dyn Fn(&Record) -> Result<Option<Fingerprint>, PrepareError> + Sync),
    advice: &'static str,
) -> Result<(), PrepareError> {
    let begun = SystemTime::now();
    let made = fs::metadata(path).and_then(|about| about.modified()).at(path)?;
    let newer = |(record, _): &&(&Record, _)| record.place.changed().is_some_and(|changed| changed + SLACK > made);
    let suspects: Vec<_> = pairs.iter().filter(newer).collect();
    let others = pairs.iter().step_by(pairs.len().div_ceil(LOOKED_AT).max(1));
    let looked_at: Vec<_> = suspects.iter().copied().chain(others).collect();
    let replaced = |(record, then): &&(&Record, &Fingerprint)| -> Result<Option<String>, PrepareError> {
        Ok(now(record)?.filter(|now| now != *then).map(|_| record.file.clone()))
    };
    let found: Result<Vec<_>, _> = looked_at.par_iter().map(replaced).collect();
    match found?.into_iter().flatten().next() {
        Some(file) => Err(PrepareError::OtherPicture { path: path.into(), file, advice }),
        None if suspects.is_empty() => Ok(()),
        // So that next time there is no reason to look.
        None => date(path, begun),
    }
}

/// Gives a shard the time at which reading its pictures began. So whatever has changed since then is newer than the
/// shard.
pub(super) fn date(path: &Path, begun: SystemTime) -> Result<(), PrepareError> {
    Ok(File::options().write(true).open(path).and_then(|file| file.set_modified(begun)).at(path)?)
}

/// An error if a vocabulary's file is not what was counted, where other names of tags do not matter.
fn check_vocabulary(path: &Path, counted: &Vocabulary, report: Report) -> Result<(), PrepareError> {
    let damaged = |what: String| PrepareError::DamagedVocabulary { path: path.into(), what };
    let found = Vocabulary::load(path).map_err(|error| match error {
        VocabularyError::Io(_) => error.into(),
        VocabularyError::Json { cause, .. } => damaged(cause.to_string()),
        VocabularyError::File { cause, .. } => damaged(cause.to_string()),
        other => damaged(other.to_string()),
    })?;
    let (found, counted) = (found.tags(), counted.tags());
    if found.len() != counted.len() {
        return Err(damaged(format!("it has {} tags, the records {}", found.len(), counted.len())));
    }
    let pairs = || found.iter().zip(counted);
    if let Some((found, counted)) = pairs().find(|(found, counted)| found.count != counted.count) {
        let (a, b) = (&found.tag, &counted.tag);
        return Err(damaged(format!("{a:?} is on {} images, {b:?} at its place on {}", found.count, counted.count)));
    }
    let renamed = || pairs().filter(|(found, counted)| found.tag != counted.tag);
    if let Some((first, counted)) = renamed().next() {
        report(Event::Renamed { tags: renamed().count(), was: &counted.tag, now: &first.tag });
    }
    Ok(())
}
