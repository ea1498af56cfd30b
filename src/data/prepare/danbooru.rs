//! Danbooru2023 as it is published: tar shards `data-0MMM.tar`, `data-1MMM.tar` (MMM = id % 1000) of `<id>.<ext>`, or
//! a folder of such files, and the posts as JSON lines, in the form that danbooru's own interface gives them.
//!
//! Both are looked for in the folder that is given and in all below it. Archives are read in place. A file belongs to
//! the post whose id it bears, whatever its ending is: smaller copies as WebP will do. What is in an archive is noted
//! beside the dataset, so that its headers are read once ([`tar::index_noted`]). The posts, 20 GB of them, stream by;
//! those that pass the filter stay in memory, a few hundred bytes each.
//!
//! A tag is danbooru's with spaces for underscores: `blue_hair` becomes "blue hair"; a face, such as `^_^` or `o_o`,
//! stays as it is. A tag that is not allowed here, because it has a comma or a space at its end, is left out and
//! counted. Records are ordered by id % 1000, then id. So training shards read each archive from its beginning to its
//! end.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Deserialize;

use super::records::{Listing, Location, Record, Records, read_lines};
use super::report::{Event, PrepareError, Report};
use super::settings::Settings;
use crate::condition::vocabulary::check_tag;
use crate::data::shard::DropReason;
use crate::formats::{At, ends_in, json, tar};
use crate::pictures::Size;
use crate::pictures::fit::choose;

/// The posts, and which to take of them.
#[derive(Clone, Debug)]
pub struct Danbooru {
    /// Folder of the archives, or of files.
    pub images: PathBuf,
    /// The posts, a line each.
    pub posts: PathBuf,
    /// Tags that a post must have, as danbooru writes them.
    pub require: Vec<String>,
    /// Ratings to take: of `g`, `s`, `q`, `e`.
    pub ratings: Vec<String>,
    /// Whether to take images that are smaller than the target.
    pub enlarge: bool,
}

/// Folder within the dataset's for the notes of what is in archives.
const NOTES: &str = "archives";

/// Endings of the names of still images.
const STILL: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// The fields of a post that are read. All but id and tags may be missing or null; then the post does not pass.
#[derive(Deserialize)]
struct Post<'a> {
    id: i64,
    #[serde(borrow)]
    tag_string: Text<'a>,
    #[serde(borrow, default)]
    rating: Option<Text<'a>>,
    #[serde(borrow, default)]
    file_ext: Option<Text<'a>>,
    #[serde(default)]
    image_width: Option<u32>,
    #[serde(default)]
    image_height: Option<u32>,
    #[serde(default)]
    is_deleted: Option<bool>,
    #[serde(default)]
    is_banned: Option<bool>,
}

/// A string that is copied only if it has escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Records for Danbooru {
    fn metadata(&self) -> &Path {
        &self.posts
    }

    fn read(&self, settings: &Settings, report: Report) -> Result<Listing, PrepareError> {
        let mut listing = Listing::default();
        let mut passed: HashMap<i64, Box<[u32]>> = HashMap::new();
        let mut unusable = HashSet::new();
        let total = fs::metadata(&self.posts).map_or(0, |about| about.len());
        read_lines(&self.posts, |line, end| -> Result<(), String> {
            let post: Post = json::read(line)
                .map_err(|error| format!("{error}; expected a post of danbooru, with \"id\", \"tag_string\", ..."))?;
            if listing.read.is_multiple_of(4096) || end == total {
                report(Event::Reading { what: "bytes of posts", done: end, total });
            }
            listing.read += 1;
            let refusal =
                self.refuse(&post, settings).or(passed.contains_key(&post.id).then_some(DropReason::Repeated));
            if let Some(drop) = refusal {
                listing.dropped.add(drop);
                return Ok(());
            }
            let names = post.tag_string.0.split_whitespace().map(readable);
            let (usable, others): (Vec<_>, Vec<_>) = names.partition(|name| check_tag(name).is_ok());
            unusable.extend(others);
            passed.insert(post.id, listing.tags.numbers(usable));
            Ok(())
        })?;
        listing.unusable_tags = unusable.len();
        if listing.read == 0 {
            return Ok(listing);
        }
        let notes = settings.out.join(NOTES);
        let mut files = find_files(&self.images, &notes, &passed, report)?;
        for (id, tags) in passed {
            match files.remove(&id) {
                Some((file, place)) => {
                    listing.records.push(Record { id, file, place, tags, flip: false, repeats: NonZeroU8::MIN });
                }
                None => listing.dropped.add(DropReason::NoFile),
            }
        }
        listing.records.sort_unstable_by_key(|record| (record.id.rem_euclid(1000), record.id));
        Ok(listing)
    }

    fn enlarge(&self) -> Option<bool> {
        Some(self.enlarge)
    }
}

impl Danbooru {
    /// The first reason against a post, if there is one. Missing tags come first, so that the counts of all other
    /// reasons are of wanted posts.
    fn refuse(&self, post: &Post, settings: &Settings) -> Option<DropReason> {
        let is =
            |field: &Option<Text>, allowed: &dyn Fn(&str) -> bool| field.as_ref().is_some_and(|text| allowed(&text.0));
        let lacks = |tag: &String| post.tag_string.0.split_whitespace().all(|own| own != tag);
        let [width, height] = [post.image_width, post.image_height].map(|side| side.unwrap_or(0));
        let size = Size { width, height };
        let (_, crop) = choose(size, &settings.sizes);
        let reasons = [
            (self.require.iter().any(lacks), DropReason::LacksTags),
            (!is(&post.file_ext, &|ending| STILL.contains(&ending)), DropReason::NotStill),
            (post.is_deleted != Some(false), DropReason::Deleted),
            (post.is_banned != Some(false), DropReason::Banned),
            (!is(&post.rating, &|rating| self.ratings.iter().any(|r| r == rating)), DropReason::OtherRating),
            (!crop.within(settings.max_crop), DropReason::Cropped),
            (crop.enlarged && !self.enlarge, DropReason::Small),
        ];
        reasons.into_iter().find(|(applies, _)| *applies).map(|(_, drop)| drop)
    }
}

/// A danbooru tag as it is stored here: with spaces between its words, but a face unchanged.
fn readable(tag: &str) -> String {
    let word = tag.split('_').any(|part| part.chars().filter(|c| c.is_alphanumeric()).count() > 1);
    if word { tag.replace('_', " ") } else { tag.into() }
}

/// The id of the post that a file belongs to, if its name is one.
fn id_of(name: &str) -> Option<i64> {
    let name = name.rsplit('/').next()?;
    let (stem, ending) = name.split_once('.')?;
    let digits = !stem.is_empty() && stem.bytes().all(|b| b.is_ascii_digit());
    let still = STILL.iter().any(|still| ending.eq_ignore_ascii_case(still));
    stem.parse().ok().filter(|_| digits && still)
}

/// Name and place of the files of the wanted posts. If several have one id, the first counts, in the order of the
/// archives' paths and then of the files' paths.
fn find_files<T: Sync>(
    dir: &Path,
    notes: &Path,
    wanted: &HashMap<i64, T>,
    report: Report,
) -> Result<HashMap<i64, (String, Location)>, PrepareError> {
    let mut paths = Vec::new();
    list(dir, &mut HashSet::new(), &mut paths)?;
    paths.sort_unstable();
    let ends = |path: &PathBuf| ends_in(path, "tar");
    let (tars, files): (Vec<_>, Vec<_>) = paths.into_iter().partition(ends);
    if tars.is_empty() && files.is_empty() {
        return Err(PrepareError::NoImages { path: dir.into() });
    }

    let (done, known) = (AtomicU64::new(0), AtomicU64::new(0));
    let in_tar = |path: PathBuf| -> Result<Vec<(i64, String, Location)>, PrepareError> {
        let tar: Arc<Path> = path.into();
        let mut found = Vec::new();
        let noted = tar::index_noted(&tar, notes, &mut |tar::Member { name, offset, size }| {
            if let Some(id) = id_of(&name).filter(|id| wanted.contains_key(id)) {
                let name = name.rsplit('/').next().unwrap_or_default().to_owned();
                found.push((id, name, Location::Member { tar: tar.clone(), offset, size }));
            }
        })?;
        let known = known.fetch_add(noted.into(), Ordering::Relaxed) + u64::from(noted);
        let (done, total) = (done.fetch_add(1, Ordering::Relaxed) + 1, tars.len() as u64);
        let what = if known == total { "archives, by what was noted of them" } else { "archives" };
        report(Event::Reading { what, done, total });
        Ok(found)
    };
    let in_tars: Vec<_> = tars.par_iter().cloned().map(in_tar).collect();
    let in_tars: Vec<_> = in_tars.into_iter().collect::<Result<_, _>>()?; // of several damaged ones, the first
    let as_files = files.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some((id_of(&name).filter(|id| wanted.contains_key(id))?, name, Location::File(path)))
    });
    let mut found = HashMap::new();
    for (id, name, place) in in_tars.into_iter().flatten().chain(as_files) {
        found.entry(id).or_insert((name, place));
    }
    Ok(found)
}

/// Lists the archives, and the files that bear an id, in a folder and below it.
fn list(dir: &Path, seen: &mut HashSet<PathBuf>, found: &mut Vec<PathBuf>) -> Result<(), PrepareError> {
    // Links may lead in circles.
    if !seen.insert(fs::canonicalize(dir).at(dir)?) {
        return Ok(());
    }
    for entry in fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if ends_in(&path, "tar") || id_of(name).is_some() {
            found.push(path);
        } else if path.is_dir() {
            list(&path, seen, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_separated_by_spaces_and_faces_stay() {
        for face in
            ["^_^", "^o^", "o_o", "0_0", "+_-", "||_||", "(o)_(o)", "<o>_<o>", "3_3", "6_9", ">_o", "u_u", "@_@"]
        {
            assert_eq!(readable(face), face);
        }
        for (tag, stored) in [
            ("blue_hair", "blue hair"),
            ("1girl", "1girl"),
            ("saber_(fate)", "saber (fate)"),
            ("x_arms", "x arms"),
            ("c.c._(code_geass)", "c.c. (code geass)"),
        ] {
            assert_eq!(readable(tag), stored);
        }
    }
}
