//! Records: where pictures are and what is known of them. For pictures that are kept in another form, implement
//! [`Records`].

use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::report::{PrepareError, Report};
use super::settings::Settings;
use crate::condition::vocabulary::Vocabulary;
use crate::data::shard::DropCounts;
use crate::formats::{At, FileError, input};
use crate::pictures::decode::MAX_BYTES;
use crate::system;

/// Longest line of a JSON-lines file.
const MAX_LINE: u64 = 1 << 24;

/// A source of records.
pub trait Records: Sync {
    /// The file that lists them.
    fn metadata(&self) -> &Path;

    /// Reads the records, in the order that shards shall have them. Those that the metadata alone rules out are dropped
    /// here, and counted.
    ///
    /// # Errors
    /// The metadata is no such file, or the pictures cannot be looked for. A single bad picture is not an error.
    fn read(&self, settings: &Settings, report: Report) -> Result<Listing, PrepareError>;

    /// Whether pictures that are smaller than the target are taken; none if the source has no such option and always
    /// takes them.
    fn enlarge(&self) -> Option<bool> {
        None
    }
}

/// The records of a source.
#[derive(Debug, Default)]
pub struct Listing {
    /// How many there were at first.
    pub read: usize,
    /// Those that were not dropped.
    pub records: Vec<Record>,
    /// Their tags.
    pub tags: TagTable,
    /// The others.
    pub dropped: DropCounts,
    /// Distinct tags that cannot be tags here.
    pub unusable_tags: usize,
}

impl Listing {
    /// For each tag, by its number, its place in a vocabulary.
    pub(super) fn places(&self, vocabulary: &Vocabulary) -> Vec<Option<u32>> {
        self.tags.names().iter().map(|tag| vocabulary.get(tag)).collect()
    }
}

/// An image and what is known of it.
#[derive(Debug)]
pub struct Record {
    /// Its number; decides its split.
    pub id: i64,
    /// Name of its file, for people.
    pub file: String,
    /// Where it is.
    pub place: Location,
    /// Numbers of its tags in [`Listing::tags`], in the order of their names.
    pub tags: Box<[u32]>,
    /// Whether mirroring leaves its meaning.
    pub flip: bool,
    /// How often training shows it in an epoch.
    pub repeats: NonZeroU8,
}

impl Record {
    /// Places of its tags in a vocabulary, ascending. `places` is from [`Listing::places`].
    pub(super) fn places(&self, places: &[Option<u32>]) -> Vec<u32> {
        let mut tags: Vec<u32> = self.tags.iter().filter_map(|&tag| places[tag as usize]).collect();
        tags.sort_unstable();
        tags
    }

    /// The bytes of its file; or why it is no image.
    pub(super) fn read(&self) -> Result<Result<Vec<u8>, String>, FileError> {
        self.place.read().at(self.place.path())
    }
}

/// Where an image's bytes are.
#[derive(Clone, Debug)]
pub enum Location {
    /// All of a file.
    File(PathBuf),
    /// `size` bytes in an archive, from `offset` on.
    #[allow(missing_docs)]
    Member { tar: Arc<Path>, offset: u64, size: u64 },
}

impl Location {
    /// Number of bytes; 0 for a file that is not there.
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::File(path) => fs::metadata(path).map_or(0, |about| about.len()),
            Self::Member { size, .. } => *size,
        }
    }

    /// The bytes; or why the file is no image.
    ///
    /// # Errors
    /// The disk failed, or an archive is not there any more. That says nothing of the image.
    fn read(&self) -> io::Result<Result<Vec<u8>, String>> {
        let length = self.length();
        if length > MAX_BYTES {
            return Ok(Err(format!("{length} bytes, expected {MAX_BYTES} at most")));
        }
        match self {
            Self::File(path) => match input::read(path, MAX_BYTES) {
                Err(error) if system::is_of_the_file(&error) => Ok(Err(error.to_string())),
                read => read.map(Ok),
            },
            Self::Member { tar, offset, size } => {
                let mut file = input::open(tar)?;
                file.seek(SeekFrom::Start(*offset))?;
                let mut bytes = vec![0; *size as usize];
                file.read_exact(&mut bytes)?;
                Ok(Ok(bytes))
            }
        }
    }

    /// When the file that it is in was last changed, or put there; none if there is no such file.
    pub(super) fn changed(&self) -> Option<SystemTime> {
        system::changed(&fs::metadata(self.path()).ok()?)
    }

    /// The file that it is in.
    fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Member { tar, .. } => tar,
        }
    }
}

/// Tags by number, so that the text of a tag that a million images have is kept once.
#[derive(Debug, Default)]
pub struct TagTable {
    names: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl TagTable {
    /// Numbers of a picture's tags, in the order of their names, each once.
    pub fn numbers(&mut self, mut tags: Vec<String>) -> Box<[u32]> {
        tags.sort_unstable();
        tags.dedup();
        tags.iter().map(|tag| self.number(tag)).collect()
    }

    fn number(&mut self, tag: &str) -> u32 {
        if let Some(&number) = self.numbers.get(tag) {
            return number;
        }
        let number = self.names.len() as u32;
        self.numbers.insert(tag.into(), number);
        self.names.push(tag.into());
        number
    }

    /// The tag of a number.
    pub fn name(&self, number: u32) -> &str {
        &self.names[number as usize]
    }

    /// All tags, by number.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// Calls `each` with every line of a JSON-lines file that is not blank, its number, and where it ends in the file.
pub fn read_lines<E: Display>(
    path: &Path,
    mut each: impl FnMut(&[u8], u64) -> Result<(), E>,
) -> Result<(), PrepareError> {
    let mut reader = BufReader::with_capacity(1 << 20, input::open(path).at(path)?);
    let head = reader.fill_buf().at(path)?;
    let array = head.trim_ascii_start().starts_with(b"[");
    let what = if array { Some("a list in JSON") } else { input::kind(head) };
    if let Some(what) = what.filter(|what| array || !what.contains("JSON") && *what != "empty") {
        return Err(PrepareError::NotLines { path: path.into(), what });
    }
    let (mut text, mut end) = (Vec::new(), 0);
    if head.starts_with(input::MARK) {
        reader.consume(input::MARK.len());
        end += input::MARK.len() as u64;
    }
    for line in 1.. {
        text.clear();
        let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut text).at(path)? as u64;
        if length == 0 {
            break;
        }
        end += length;
        let wrong = |what| PrepareError::Line { path: path.into(), line, what };
        if length == MAX_LINE {
            return Err(wrong(format!("longer than {MAX_LINE} bytes, expected a record a line")));
        }
        let text = text.trim_ascii();
        if !text.is_empty() {
            each(text, end).map_err(|why| wrong(why.to_string()))?;
        }
    }
    Ok(())
}
