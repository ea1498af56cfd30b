//! A folder of pictures, and a JSON-lines file with a line such as `{"id": 7, "file": "a/b.png", "tags": ["x", "y"]}` for
//! each, with an optional `"flip": true` where mirroring the picture leaves its meaning, and an optional `"repeats": 4`
//! where training shall show it that often in an epoch. Records are ordered by id.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::records::{Listing, Location, Record, Records, read_lines};
use super::report::{Event, PrepareError, Report};
use super::settings::Settings;
use crate::condition::vocabulary::check_new_tag;
use crate::formats::{At, json};

/// A folder of pictures, and the file with a line of JSON for each.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The folder, which the names of files are relative to.
    pub images: PathBuf,
    /// The lines.
    pub metadata: PathBuf,
}

#[derive(Deserialize)]
struct Line {
    id: i64,
    file: String,
    tags: Vec<String>,
    #[serde(default)]
    flip: bool,
    #[serde(default = "once")]
    repeats: NonZeroU8,
    /// Any other fields.
    #[serde(flatten)]
    others: BTreeMap<String, IgnoredAny>,
}

fn once() -> NonZeroU8 {
    NonZeroU8::MIN
}

impl Records for Folder {
    fn metadata(&self) -> &Path {
        &self.metadata
    }

    fn read(&self, _: &Settings, report: Report) -> Result<Listing, PrepareError> {
        fs::read_dir(&self.images).at(&self.images)?;
        let mut listing = Listing::default();
        let (mut ids, mut unread) = (HashSet::new(), BTreeSet::new());
        read_lines(&self.metadata, |text, _| -> Result<(), String> {
            let text = str::from_utf8(text).map_err(|_| "not UTF-8")?;
            let Line { id, file, tags, flip, repeats, others } = json::read(text).map_err(|error| {
                format!("{error}; expected {{\"id\", \"file\", \"tags\", \"flip\" and \"repeats\" (optional)}}")
            })?;
            for tag in &tags {
                check_new_tag(tag).map_err(|what| format!("a tag: {what}"))?;
            }
            unread.extend(others.into_keys());
            if !ids.insert(id) {
                return Err(format!("id {id} occurs twice"));
            }
            let (place, tags) = (Location::File(self.images.join(&file)), listing.tags.numbers(tags));
            listing.records.push(Record { id, file, place, tags, flip, repeats });
            Ok(())
        })?;
        if !unread.is_empty() {
            // A misspelt field would change what training sees, so an unknown one is mentioned.
            let (shown, more) = (
                unread.iter().take(5).map(|name| format!("{name:?}")).collect::<Vec<_>>(),
                unread.len() - 5.min(unread.len()),
            );
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let (path, shown) = (self.metadata.display(), shown.join(", "));
            let text = format!("{path}: nothing reads {shown}{more}; only id, file, tags, flip and repeats count");
            report(Event::Warning { text: &text });
        }
        listing.read = listing.records.len();
        listing.records.sort_unstable_by_key(|record| record.id);
        Ok(listing)
    }
}
