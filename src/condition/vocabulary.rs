//! The tag vocabulary: a fixed, ordered list of tags, and the conditions made of it.
//!
//! A set of k tags becomes the D-wide vector with 1/sqrt(k) at each tag and 0 elsewhere: a multi-hot vector of norm 1.
//! EDM2 feeds `emb_label` with `sqrt(D) * one_hot`, so that the embedding has unit variance; with norm 1 that stays
//! true for any number of tags, and many tags do not drown the noise embedding. One tag alone gives exactly EDM2's
//! class label. No tag gives zeros, which is what EDM2 calls unconditional.
//!
//! On disk: a JSON list of `{"tag", "count"}`, most frequent first; the place in the list
//! is the index in the vector.
//!
//! ```
//! use edm2k::condition::vocabulary::Vocabulary;
//!
//! let vocabulary = Vocabulary::most_frequent([["cat", "face"], ["cat", "red"]], 1024)?;
//! assert_eq!((vocabulary.tag(0), vocabulary.get("red"), vocabulary.len()), (Some("cat"), Some(2), 3));
//! // The condition of two tags: 1/sqrt(2) at each of them.
//! let condition = vocabulary.multi_hot(&[vocabulary.index("cat")?, vocabulary.index("red")?]);
//! assert_eq!(condition, [0.5f32.sqrt(), 0.0, 0.5f32.sqrt()]);
//! # Ok::<(), edm2k::condition::vocabulary::VocabularyError>(())
//! ```

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::formats::fingerprint::Fingerprint;
use crate::formats::json::{self, JsonError};
use crate::formats::{At, FileError, input, write_atomically};

/// Bytes of the longest text that known tags are compared with.
const LONGEST: usize = 256;

/// One entry of a vocabulary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tag {
    /// The tag as it is written; no comma, no space at its ends.
    pub tag: String,
    /// How many records for training have it, whether their pictures turned out to be usable or not.
    pub count: u64,
}

/// What can be wrong with a vocabulary or with tags looked up in it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum VocabularyError {
    #[error("unknown tag \"{}\"{}", beginning(tag), suggest(nearest))]
    Unknown { tag: String, nearest: Vec<String> },
    #[error("weight {weight} in {:?}, expected 0 to {most}", beginning(part))]
    Weight { weight: f32, most: f32, part: String },
    #[error("the bracket {bracket} has no partner in {:?}", beginning(text))]
    Bracket { bracket: char, text: String },
    #[error("more than {most} brackets around each other in {:?}", beginning(text))]
    Deep { most: usize, text: String },
    #[error("tag {index} of the vocabulary: {cause}")]
    Entry { index: u32, cause: NoTag },
    #[error("tag {index} of the vocabulary: \"{tag}\" is already tag {first}")]
    Repeated { index: u32, tag: String, first: u32 },
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not a vocabulary, expected a list of {{\"tag\", \"count\"}}: {cause}", path.display())]
    Json { path: PathBuf, cause: JsonError },
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: Box<VocabularyError> },
}

/// A text, or as much of it as a message has room for.
fn beginning(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

fn suggest(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return String::new();
    }
    let quoted: Vec<_> = nearest.iter().map(|tag| format!("\"{tag}\"")).collect();
    format!(", did you mean {}?", quoted.join(" or "))
}

/// Why a text cannot be a tag. Commas separate tags on the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum NoTag {
    #[error("it is empty")]
    Empty,
    #[error("{0:?} begins or ends with a space")]
    Space(String),
    #[error("{0:?} contains a comma")]
    Comma(String),
    #[error("{0:?} has a control character")]
    Control(String),
    #[error("{0:?} has an invisible character")]
    Invisible(String),
}

/// Whether a text can be a tag.
///
/// # Errors
/// [`NoTag`]: why not.
pub fn check_tag(tag: &str) -> Result<(), NoTag> {
    match tag {
        "" => Err(NoTag::Empty),
        _ if tag.trim() != tag => Err(NoTag::Space(tag.into())),
        _ if tag.contains(',') => Err(NoTag::Comma(tag.into())),
        _ if tag.contains(char::is_control) => Err(NoTag::Control(tag.into())),
        _ => Ok(()),
    }
}

/// As [`check_tag`], of a tag that somebody has just written: neither a byte order mark, which some editors put before
/// text, nor what else nobody sees may make two tags of one.
///
/// # Errors
/// [`NoTag`]: why not.
pub fn check_new_tag(tag: &str) -> Result<(), NoTag> {
    match tag.contains(['\u{feff}', '\u{200b}', '\u{2060}']) {
        true => Err(NoTag::Invisible(tag.into())),
        false => check_tag(tag),
    }
}

/// An ordered list of distinct tags.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    tags: Vec<Tag>,
    index: HashMap<String, u32>,
}

impl Vocabulary {
    /// A vocabulary of these tags in this order.
    ///
    /// # Errors
    /// [`VocabularyError::Entry`] for an unusable or repeated tag.
    pub fn new(tags: Vec<Tag>) -> Result<Self, VocabularyError> {
        let mut index = HashMap::with_capacity(tags.len());
        for (place, Tag { tag, .. }) in (0..).zip(&tags) {
            check_tag(tag).map_err(|cause| VocabularyError::Entry { index: place, cause })?;
            if let Some(first) = index.insert(tag.clone(), place) {
                return Err(VocabularyError::Repeated { index: place, tag: tag.clone(), first });
            }
        }
        Ok(Self { tags, index })
    }

    /// The `size` most frequent tags of a collection of tag sets (fewer if it has fewer),
    /// most frequent first, ties in alphabetical order. A set counts a tag once.
    ///
    /// # Errors
    /// [`VocabularyError::Entry`] for an unusable tag among them.
    pub fn most_frequent<'a, S>(sets: impl IntoIterator<Item = S>, size: usize) -> Result<Self, VocabularyError>
    where
        S: IntoIterator<Item = &'a str>,
    {
        let mut counts: HashMap<&str, (u64, usize)> = HashMap::new();
        for (number, set) in sets.into_iter().enumerate() {
            for tag in set {
                let (count, last) = counts.entry(tag).or_insert((0, usize::MAX));
                if *last != number {
                    (*count, *last) = (*count + 1, number);
                }
            }
        }
        let mut tags: Vec<_> = counts.into_iter().map(|(tag, (count, _))| Tag { tag: tag.into(), count }).collect();
        tags.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.tag.cmp(&b.tag)));
        tags.truncate(size);
        Self::new(tags)
    }

    /// Number of tags: the width of the condition.
    pub fn len(&self) -> usize {
        self.tags.len()
    }

    /// Whether there is no tag at all.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// All tags in order.
    pub fn tags(&self) -> &[Tag] {
        &self.tags
    }

    /// The tag at an index; `None` beyond the end.
    pub fn tag(&self, index: u32) -> Option<&str> {
        self.tags.get(index as usize).map(|tag| tag.tag.as_str())
    }

    /// The index of a tag; `None` if it is not in the vocabulary.
    pub fn get(&self, tag: &str) -> Option<u32> {
        self.index.get(tag).copied()
    }

    /// The index of a tag.
    ///
    /// # Errors
    /// [`VocabularyError::Unknown`] with the nearest known tags.
    pub fn index(&self, tag: &str) -> Result<u32, VocabularyError> {
        self.get(tag).ok_or_else(|| VocabularyError::Unknown { tag: tag.into(), nearest: self.nearest(tag, 3) })
    }

    /// Known tags like this text: equal but for case, one beginning with the other, or few
    /// edits apart; best first, at most `most`.
    pub fn nearest(&self, text: &str, most: usize) -> Vec<String> {
        // No known tag is like such a long text, and comparing takes as long as the product of both lengths.
        if text.len() > LONGEST {
            return Vec::new();
        }
        let text = text.to_lowercase();
        let mut scored: Vec<_> = self
            .tags
            .iter()
            .filter_map(|Tag { tag, count }| {
                let known = tag.to_lowercase();
                let score =
                    strsim::jaro_winkler(&known, &text).max(strsim::normalized_damerau_levenshtein(&known, &text));
                (score > 0.8).then_some((score, count, tag))
            })
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(a.1)).then(a.2.cmp(b.2)));
        scored.into_iter().take(most).map(|(.., tag)| tag.clone()).collect()
    }

    /// The tags at these places, in words, separated by commas; places beyond the end are left out.
    pub fn words(&self, indices: &[u32]) -> String {
        indices.iter().filter_map(|&index| self.tag(index)).collect::<Vec<_>>().join(", ")
    }

    /// Fingerprint of the tags in their order. It says what conditions made of them mean.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.tags.iter().map(|tag| &tag.tag))
    }

    /// Fingerprint of the tags' counts, in their order. It stays the same when somebody renames tags, and so tells
    /// whether a vocabulary belongs to some shards.
    pub fn fingerprint_of_counts(&self) -> Fingerprint {
        Fingerprint::of(self.tags.iter().map(|tag| tag.count.to_le_bytes()))
    }

    /// Reads a vocabulary file.
    ///
    /// # Errors
    /// [`VocabularyError::Io`], [`VocabularyError::Json`]; [`VocabularyError::File`] with
    /// what [`Vocabulary::new`] says.
    pub fn load(path: &Path) -> Result<Self, VocabularyError> {
        let text = input::text(path).at(path)?;
        let tags = json::read(&text).map_err(|cause| VocabularyError::Json { path: path.into(), cause })?;
        Self::new(tags).map_err(|cause| VocabularyError::File { path: path.into(), cause: Box::new(cause) })
    }

    /// Writes a vocabulary file, atomically, one tag a line.
    ///
    /// # Errors
    /// [`VocabularyError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), VocabularyError> {
        let written = write_atomically(path, |out| {
            out.write_all(b"[")?;
            for (place, tag) in self.tags.iter().enumerate() {
                out.write_all(if place == 0 { b"\n" } else { b",\n" })?;
                serde_json::to_writer(&mut *out, tag)?;
            }
            out.write_all(b"\n]\n")
        });
        Ok(written.at(path)?)
    }
}
