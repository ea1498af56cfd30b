//! What the maker of a shard notes in it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::SETTINGS;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::safetensors::{SafeError, SafeFile};

const DROPPED: &str = "dropped";
const PROFILES: &str = "profiles";
const ENLARGED: &str = "enlarged";
const PICTURES: &str = "pictures";
const PICTURE_IDS: &str = "picture-ids";

/// What the maker of a shard notes in it: what it was made with, and what was to be in it and is not.
pub(in crate::data) struct Notes {
    /// Settings by name.
    pub settings: Map<String, Value>,
    /// Fingerprints of the files of all pictures that were looked at, including those that were dropped. Older shards
    /// have none.
    pub pictures: Vec<Fingerprint>,
    /// The ids of their records. Older shards have none.
    pub picture_ids: Vec<i64>,
    /// Records that were dropped when their pictures were looked at.
    pub dropped: Vec<DroppedRecord>,
    /// Images whose colours could not be converted.
    pub unapplied: Vec<Unapplied>,
    /// Images that were smaller than the target.
    pub enlarged: usize,
}

impl Notes {
    /// What the setting `records` begins with once the shards have been given other tags. Then it says nothing of which
    /// records they were cut from.
    pub const RETAGGED: &str = "retagged with ";

    /// Whether settings are of shards that have been given other tags.
    pub fn retagged(settings: &Map<String, Value>) -> bool {
        settings.get("records").and_then(Value::as_str).is_some_and(|records| records.starts_with(Self::RETAGGED))
    }

    /// The settings that a shard was made with; none if [`prepare`](mod@crate::data::prepare) did not make it.
    pub fn settings(file: &SafeFile) -> Option<Map<String, Value>> {
        serde_json::from_str(file.metadata().get(SETTINGS)?).ok()
    }

    /// The notes of a shard.
    ///
    /// # Errors
    /// Some are missing or damaged.
    pub fn read(file: &SafeFile) -> Result<Self, SafeError> {
        let malformed = |what: String| SafeError::Malformed { path: file.path().into(), what };
        let text = |key: &str| file.metadata().get(key).ok_or_else(|| malformed(format!("its metadata lacks {key}")));
        let parsed = |error: serde_json::Error| malformed(error.to_string());
        Ok(Self {
            settings: Self::settings(file).ok_or_else(|| malformed(format!("its metadata lacks {SETTINGS}")))?,
            dropped: serde_json::from_str(text(DROPPED)?).map_err(parsed)?,
            enlarged: text(ENLARGED)?.parse().map_err(|_| malformed(format!("{ENLARGED} is no number")))?,
            // Older versions did not look at colour profiles.
            unapplied: text(PROFILES).map_or(Ok(Vec::new()), |text| serde_json::from_str(text)).map_err(parsed)?,
            pictures: text(PICTURES).map_or(Ok(Vec::new()), |text| serde_json::from_str(text)).map_err(parsed)?,
            picture_ids: text(PICTURE_IDS).map_or(Ok(Vec::new()), |text| serde_json::from_str(text)).map_err(parsed)?,
        })
    }

    /// What the file of each record was. An older shard tells it only with the ids of its records in the order that they
    /// had when it was made, and tells nothing if `members` has others.
    pub fn files(&self, members: impl FnOnce() -> Vec<i64>) -> Vec<(i64, &Fingerprint)> {
        let ids = if self.picture_ids.is_empty() { members() } else { self.picture_ids.clone() };
        match ids.len() == self.pictures.len() {
            true => ids.into_iter().zip(&self.pictures).collect(),
            false => Vec::new(),
        }
    }

    /// As a shard's metadata has them.
    pub fn metadata(&self) -> HashMap<String, String> {
        let all = [
            (SETTINGS, json!(self.settings).to_string()),
            (DROPPED, json!(self.dropped).to_string()),
            (PROFILES, json!(self.unapplied).to_string()),
            (ENLARGED, self.enlarged.to_string()),
            (PICTURES, json!(self.pictures).to_string()),
            (PICTURE_IDS, json!(self.picture_ids).to_string()),
        ];
        all.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// An image whose colours were taken for sRGB though the file says otherwise.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::data) struct Unapplied {
    pub file: String,
    pub profile: String,
}

/// A record that is not in its shard.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::data) struct DroppedRecord {
    pub id: i64,
    pub file: String,
    pub drop: DropReason,
    pub why: String,
}

/// Why a record is not in the dataset. The first reason that applies counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// Danbooru: it lacks a tag that it must have.
    LacksTags,
    /// Danbooru: a film or an animation, or something else that is no still image.
    NotStill,
    /// Danbooru: deleted there.
    Deleted,
    /// Danbooru: its artist does not want it shown.
    Banned,
    /// Danbooru: not of the ratings asked for.
    OtherRating,
    /// It would have lost more than the allowed share by cropping.
    Cropped,
    /// Danbooru: it would have to be enlarged.
    Small,
    /// Danbooru: its id was listed before.
    Repeated,
    /// Danbooru: no file bears its id.
    NoFile,
    /// No feature is known for it, or only one that is zero or not a number.
    NoFeature,
    /// It could not be decoded.
    Unreadable,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DropReason::LacksTags => "without the required tags",
            DropReason::NotStill => "not a still image",
            DropReason::Deleted => "deleted",
            DropReason::Banned => "banned",
            DropReason::OtherRating => "of another rating",
            DropReason::Cropped => "of too different a shape",
            DropReason::Small => "too small",
            DropReason::Repeated => "listed before",
            DropReason::NoFile => "without a file",
            DropReason::NoFeature => "without a usable feature",
            DropReason::Unreadable => "unreadable",
        })
    }
}

/// How many records were dropped for each reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct DropCounts(pub BTreeMap<DropReason, usize>);

impl DropCounts {
    /// Counts one more.
    pub fn add(&mut self, drop: DropReason) {
        *self.0.entry(drop).or_default() += 1;
    }
}

impl fmt::Display for DropCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(drop, count)| format!("{count} {drop}")).collect();
        f.write_str(&parts.join(", "))
    }
}
