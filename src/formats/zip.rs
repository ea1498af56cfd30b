//! Zip archives whose entries are stored, not compressed: mapped, and read in place.
//!
//! The directory is at the end (PKWARE's APPNOTE, 4.3): a record that says where the list of entries is, in archives of
//! more than 65,535 entries or 4 GiB a second one of 64 bits. Each entry's bytes follow a header of its own.

use std::io;
use std::path::{Path, PathBuf};

use super::fingerprint::Fingerprint;
use super::input;
use super::mapped::Mapped;

/// What can be wrong with an archive.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ZipError {
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    #[error("{}: not a usable zip archive: {what}", path.display())]
    Malformed { path: PathBuf, what: String },
    #[error("{}: entry {name}: {what}", path.display())]
    Entry { path: PathBuf, name: String, what: String },
}

/// An open archive.
pub struct Zip {
    path: PathBuf,
    map: Mapped,
    entries: Vec<Entry>,
}

/// What the directory says of an entry.
pub struct Entry {
    /// Its name, folders separated by slashes.
    pub name: Box<str>,
    checksum: u32,
    method: u16,
    offset: u64,
    size: u64,
}

/// Little-endian numbers at a place; none beyond the end.
fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

impl Zip {
    /// Opens an archive and reads its directory.
    ///
    /// # Errors
    /// [`ZipError`]: it cannot be read, or its directory is damaged.
    pub fn open(path: &Path) -> Result<Self, ZipError> {
        let io_error = |cause| ZipError::Io { path: path.into(), cause };
        let file = input::open(path).map_err(io_error)?;
        let malformed = |what: &str| ZipError::Malformed { path: path.into(), what: what.into() };
        if file.metadata().map_err(io_error)?.len() < 22 {
            return Err(malformed("it is shorter than an empty archive"));
        }
        // SAFETY: datasets are not changed while they are read; that one is truncated is caught.
        let map = unsafe { Mapped::new(&file, path) }.map_err(io_error)?;
        let entries = directory(&map).map_err(|what| malformed(&what))?;
        Ok(Self { path: path.into(), map, entries })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its entries, in the order of the directory.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Of the names, sizes and checksums of all entries.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.entries.iter().map(|e| format!("{} {} {:08x}", e.name, e.size, e.checksum)))
    }

    /// The bytes of an entry.
    ///
    /// # Errors
    /// [`ZipError::Entry`]: it is compressed, or the archive is damaged.
    pub fn bytes(&self, entry: &Entry) -> Result<&[u8], ZipError> {
        let wrong =
            |what: &str| ZipError::Entry { path: self.path.clone(), name: entry.name.to_string(), what: what.into() };
        if entry.method != 0 {
            return Err(wrong("it is compressed, expected a stored one"));
        }
        let found = || {
            let at = usize::try_from(entry.offset).ok()?;
            let header = self.map.get(at..)?.strip_prefix(b"PK\x03\x04")?;
            let skip = 26 + usize::from(u16_at(header, 22)?) + usize::from(u16_at(header, 24)?);
            header.get(skip..)?.get(..usize::try_from(entry.size).ok()?)
        };
        found().ok_or_else(|| wrong("the archive is damaged where it should be"))
    }
}

/// The entries that the directory at the end of an archive lists.
fn directory(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    // A comment of up to 65,535 bytes may follow the last record.
    let from = bytes.len().saturating_sub(22 + 0xffff);
    let end = (from..=bytes.len() - 22).rev().find(|&at| {
        bytes[at..].starts_with(b"PK\x05\x06") && u16_at(bytes, at + 20) == u16::try_from(bytes.len() - at - 22).ok()
    });
    let end = end.ok_or_else(|| match input::kind(&bytes[..bytes.len().min(input::HEAD)]) {
        Some(kind) if !kind.contains("zip") => format!("it is {kind}"),
        _ => "it has no directory at its end: is it complete?".into(),
    })?;
    let damaged = || "its directory is damaged".to_owned();
    let locator = end.checked_sub(20).filter(|&at| bytes[at..].starts_with(b"PK\x06\x07"));
    let (count, mut at) = match locator {
        None => (u16_at(bytes, end + 10).map(u64::from), u32_at(bytes, end + 16).map(u64::from)),
        Some(locator) => {
            let record = u64_at(bytes, locator + 8).and_then(|at| usize::try_from(at).ok()).ok_or_else(damaged)?;
            if !bytes.get(record..).is_some_and(|rest| rest.starts_with(b"PK\x06\x06")) {
                return Err(damaged());
            }
            (u64_at(bytes, record + 32), u64_at(bytes, record + 48))
        }
    };
    let mut entries = Vec::new();
    for _ in 0..count.ok_or_else(damaged)? {
        let place = at.and_then(|at| usize::try_from(at).ok());
        let (entry, length) = place.and_then(|place| entry(bytes.get(place..)?)).ok_or_else(damaged)?;
        at = at.map(|at| at + length as u64);
        entries.push(entry);
    }
    Ok(entries)
}

/// The entry at the beginning of these bytes of the directory, and how many it takes.
fn entry(bytes: &[u8]) -> Option<(Entry, usize)> {
    if !bytes.starts_with(b"PK\x01\x02") {
        return None;
    }
    let [name, extra, comment] = [28, 30, 32].map(|at| u16_at(bytes, at).map(usize::from));
    let (name, extra) = (name?, extra?);
    let length = 46 + name + extra + comment?;
    let name_bytes = bytes.get(46..46 + name)?;
    let mut more = bytes.get(46 + name..46 + name + extra)?;
    // What does not fit into 32 bits follows in a field of type 1, in this order.
    let mut wide = loop {
        match (u16_at(more, 0), u16_at(more, 2)) {
            (Some(1), Some(size)) => break more.get(4..4 + usize::from(size))?,
            (Some(_), Some(size)) => more = more.get(4 + usize::from(size)..)?,
            _ => break &[][..],
        }
    };
    let mut number = |at: usize| match u32_at(bytes, at)? {
        u32::MAX => {
            let value = u64_at(wide, 0)?;
            wide = &wide[8..];
            Some(value)
        }
        value => Some(value.into()),
    };
    let (size, stored, offset) = (number(24)?, number(20)?, number(42)?);
    let (method, checksum) = (u16_at(bytes, 10)?, u32_at(bytes, 16)?);
    let name = String::from_utf8_lossy(name_bytes).into_owned().into_boxed_str();
    let method = if size == stored { method } else { method.max(1) };
    Some((Entry { name, checksum, method, offset, size }, length))
}
