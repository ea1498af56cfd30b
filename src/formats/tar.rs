//! Tar archives, read in place: the headers say where each file lies, and nothing is unpacked.
//!
//! Layout: blocks of 512 bytes. A header has the name (100 bytes), at 124 the size (12), at 148 a checksum (8), at 156
//! the type, at 345 a prefix of the name (155, POSIX only); numbers are octal digits, or base 256 if their first bit is
//! set. The content follows, padded to whole blocks; a block of zeros ends the archive. Long names stand in a member of
//! their own before the file's (GNU type `L`, POSIX type `x`). A hard link (type `1`) has at 157 the name (100) of the
//! member whose content it is, or a long one likewise (`K`, `x`). Of members of one name the last counts, as it does where
//! an archive is unpacked.
//!
//! Cost: one read of 512 bytes a member. [`index_noted`] writes what it finds to a file, and reads only that the next
//! time.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::fingerprint::Fingerprint;
use super::{At, FileError, input, write_atomically};
use crate::system;

/// Size of a block.
const BLOCK: u64 = 512;
/// Longest name, or list of POSIX attributes, that is read.
const MAX_EXTENSION: u64 = 1 << 20;

/// A file in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name; not to be trusted as a path.
    pub name: String,
    /// Where its content begins in the archive.
    pub offset: u64,
    /// Length of its content; all of it lies within the archive.
    pub size: u64,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum TarError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: damaged at byte {at}: {what}", path.display())]
    Damaged { path: PathBuf, at: u64, what: String },
}

/// The most bytes of zeros behind the end of an archive.
const PADDING: u64 = 1 << 20;

/// Calls `visit` with each regular file of an archive, in order. A hard link to a member before it is such a file too.
///
/// # Errors
/// [`TarError`]; then `visit` has not been called.
pub fn index(path: &Path, visit: &mut dyn FnMut(Member)) -> Result<(), TarError> {
    let damage = |at, what| TarError::Damaged { path: path.into(), at, what };
    let mut archive = input::open(path).at(path)?;
    let length = archive.metadata().at(path)?.len();
    if length == 0 {
        return Err(damage(0, "it is empty".into()));
    }
    let mut at = 0;
    // What an extension has said of the file that follows it.
    let (mut long_name, mut long_size, mut long_link, mut sparse) = (None, None, None, false);
    let (mut members, mut places) = (Vec::<Member>::new(), HashMap::<String, usize>::new());
    while at < length {
        let damaged = |what: String| damage(at, what);
        if length - at < BLOCK {
            return Err(damaged(format!("{} bytes, expected a header of {BLOCK}", length - at)));
        }
        let mut header = [0; BLOCK as usize];
        archive.seek(SeekFrom::Start(at)).at(path)?;
        archive.read_exact(&mut header).at(path)?;
        if header.iter().all(|&b| b == 0) {
            // Programs pad an archive by some KiB. A download that has not ended may have been given its whole length.
            let mut rest = Vec::new();
            (&mut archive).take(PADDING + 1).read_to_end(&mut rest).at(path)?;
            if rest.len() as u64 > PADDING || rest.iter().any(|&b| b != 0) {
                return Err(damaged(format!("zeros end it, but {} bytes follow", length - at - BLOCK)));
            }
            break;
        }
        // The checksum's own bytes count as spaces.
        let sum: u64 = header[..148].iter().chain(&header[156..]).map(|&b| u64::from(b)).sum();
        if number(&header[148..156]) != Some(sum + 8 * u64::from(b' ')) {
            return Err(damaged("no header (its checksum is wrong)".into()));
        }
        let kind = header[156];
        let (mut name, size) = (header_name(&header), number(&header[124..136]));
        let mut size = size.ok_or_else(|| damaged(format!("the size of member {name} is no number")))?;
        let mut link = text(&header[157..257]);
        if !matches!(kind, b'L' | b'K' | b'x' | b'g') {
            name = long_name.take().unwrap_or(name);
            size = long_size.take().unwrap_or(size);
            link = long_link.take().unwrap_or(link);
            if std::mem::take(&mut sparse) || kind == b'S' {
                return Err(damaged(format!("member {name} is a sparse file, which is not known here")));
            }
        }
        let offset = at + BLOCK;
        let left = length - offset;
        if size > left {
            return Err(damaged(format!("member {name} claims {size} bytes, but {left} are left")));
        }
        match kind {
            b'L' | b'K' | b'x' => {
                if size > MAX_EXTENSION {
                    let what =
                        format!("a name or list of attributes of {size} bytes, expected {MAX_EXTENSION} at most");
                    return Err(damaged(what));
                }
                let mut bytes = vec![0; size as usize];
                archive.read_exact(&mut bytes).at(path)?;
                if kind == b'L' {
                    long_name = Some(text(&bytes));
                } else if kind == b'K' {
                    long_link = Some(text(&bytes));
                } else {
                    let attributes = attributes(&bytes).ok_or_else(|| damaged("unreadable POSIX attributes".into()))?;
                    for (key, value) in attributes {
                        match key {
                            b"path" | b"GNU.sparse.name" => long_name = Some(text(value)),
                            b"linkpath" => long_link = Some(text(value)),
                            b"size" => {
                                let size = str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                                long_size = Some(size.ok_or_else(|| damaged("a size that is no number".into()))?);
                            }
                            _ => {}
                        }
                        sparse |= key.starts_with(b"GNU.sparse.");
                    }
                }
            }
            // Passed over: folders, symbolic links, devices, attributes of the archive.
            _ => {}
        }
        let content = match kind {
            b'0' | 0 | b'7' if !name.ends_with('/') => Some((offset, size)),
            b'1' => places.get(&link).map(|&place| (members[place].offset, members[place].size)),
            _ => None,
        };
        if let Some((offset, size)) = content {
            places.insert(name.clone(), members.len());
            members.push(Member { name, offset, size });
        }
        // The last member's padding may be missing.
        at = (offset + size.next_multiple_of(BLOCK)).min(length);
    }
    let last = |(place, member): &(usize, Member)| places.get(&member.name) == Some(place);
    members.into_iter().enumerate().filter(last).for_each(|(_, member)| visit(member));
    Ok(())
}

/// An archive that changed less than this ago may change again without getting another date, since dates of file
/// systems are coarse.
const SETTLED: Duration = Duration::from_secs(2);

/// Goes into notes, so that those of other versions, which made other things of links, count as none.
const VERSION: u32 = 2;

/// As [`index`], but reads the members of an unchanged archive from the note that an earlier call left in `notes`.
/// Returns whether it did so. An archive's length and date say whether it has changed.
///
/// # Errors
/// As [`index`]; or the note cannot be written. A damaged note counts as none.
pub fn index_noted(path: &Path, notes: &Path, visit: &mut dyn FnMut(Member)) -> Result<bool, TarError> {
    let about = fs::metadata(path).at(path)?;
    let changed = system::changed(&about);
    let stamp = changed.and_then(|changed| changed.duration_since(SystemTime::UNIX_EPOCH).ok());
    let stamp = stamp.map(|stamp| format!("{} {} {VERSION}", about.len(), stamp.as_nanos()));
    let place = fs::canonicalize(path).at(path)?;
    let note = notes.join(format!("{:?}.index", Fingerprint::of([place.as_os_str().as_encoded_bytes()])));
    if let Some(members) = stamp.as_ref().and_then(|stamp| read_note(&note, stamp)) {
        members.into_iter().for_each(visit);
        return Ok(true);
    }
    let mut body = Vec::new();
    index(path, &mut |member| {
        body.extend(serde_json::json!([member.offset, member.size, member.name]).to_string().into_bytes());
        body.push(b'\n');
        visit(member);
    })?;
    let settled = changed.is_some_and(|changed| changed.elapsed().is_ok_and(|ago| ago > SETTLED));
    if let Some(stamp) = stamp.filter(|_| settled) {
        fs::create_dir_all(notes).at(notes)?;
        let head = format!("{stamp} {:?}\n", Fingerprint::of([&body]));
        let write = |out: &mut std::io::BufWriter<fs::File>| {
            out.write_all(head.as_bytes())?;
            out.write_all(&body)
        };
        write_atomically(&note, write).at(&note)?;
    }
    Ok(false)
}

/// The members in a note; none if the note is damaged, or belongs to an archive with another stamp.
fn read_note(note: &Path, stamp: &str) -> Option<Vec<Member>> {
    let text = fs::read(note).ok()?;
    let end = text.iter().position(|&byte| byte == b'\n')?;
    let (head, body) = (str::from_utf8(&text[..end]).ok()?, &text[end + 1..]);
    (head == format!("{stamp} {:?}", Fingerprint::of([body]))).then_some(())?;
    let member = |line: &[u8]| {
        let (offset, size, name) = serde_json::from_slice(line).ok()?;
        Some(Member { name, offset, size })
    };
    body.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(member).collect()
}

/// Octal digits between spaces and zeros, or base 256; 0 if there is nothing.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        let (high, low) = rest.split_at(rest.len().saturating_sub(8));
        return high.iter().all(|&b| b == 0).then(|| low.iter().fold(0, |n, &b| n << 8 | u64::from(b)));
    }
    let text = str::from_utf8(field).ok()?.trim_matches(|c| c == ' ' || c == '\0');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok().filter(|_| !text.starts_with('+')) }
}

/// Bytes up to the first zero; what is not UTF-8 is replaced.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn header_name(header: &[u8; BLOCK as usize]) -> String {
    let name = text(&header[..100]);
    let prefix = text(&header[345..500]);
    // GNU's own format has dates where POSIX has the prefix.
    if &header[257..263] == b"ustar\0" && !prefix.is_empty() { format!("{prefix}/{name}") } else { name }
}

/// The `LENGTH KEY=VALUE\n` of a POSIX extension, LENGTH counting all of it.
fn attributes(mut bytes: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|&b| b == b' ')?;
        let length: usize = str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
        let (record, rest) = bytes.split_at_checked(length)?;
        let pair = record.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = pair.iter().position(|&b| b == b'=')?;
        found.push((&pair[..equals], &pair[equals + 1..]));
        bytes = rest;
    }
    Some(found)
}
