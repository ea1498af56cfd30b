//! Zip archives whose entries are stored, not compressed: mapped, and read in place.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rawzip::{CompressionMethod, ZipArchive, ZipArchiveEntryWayfinder, ZipSliceArchive};

use super::fingerprint::Fingerprint;
use super::mapped::Mapped;
use super::{At, FileError, input};

/// What can be wrong with an archive.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ZipError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not a usable zip archive: {what}", path.display())]
    Malformed { path: PathBuf, what: String },
    #[error("{}: entry {name}: {what}", path.display())]
    Entry { path: PathBuf, name: String, what: String },
}

/// An open archive.
pub struct Zip {
    path: PathBuf,
    archive: ZipSliceArchive<Mapped>,
    entries: Vec<ZipEntry>,
}

/// What the directory says of an entry.
pub struct ZipEntry {
    /// Its name, folders separated by slashes.
    pub name: Box<str>,
    /// Its length.
    pub size: u64,
    checksum: u32,
    stored: bool,
    place: ZipArchiveEntryWayfinder,
}

impl Zip {
    /// Opens an archive and reads its directory.
    ///
    /// # Errors
    /// [`ZipError`]: it cannot be read, or its directory is damaged.
    pub fn open(path: &Path) -> Result<Self, ZipError> {
        let file = input::open(path).at(path)?;
        let malformed = |error: rawzip::Error| ZipError::Malformed { path: path.into(), what: error.to_string() };
        // SAFETY: datasets are not changed while they are read; that one is truncated is caught.
        let map = unsafe { Mapped::new(&file, path) }.at(path)?;
        let archive = ZipArchive::from_slice(map).map_err(malformed)?;
        let (mut entries, mut list) = (Vec::<ZipEntry>::new(), archive.entries());
        while let Some(entry) = list.next_entry().map_err(malformed)? {
            entries.push(ZipEntry {
                name: String::from_utf8_lossy(entry.file_path().as_ref()).into_owned().into_boxed_str(),
                size: entry.uncompressed_size_hint(),
                checksum: entry.crc32(),
                stored: entry.compression_method() == CompressionMethod::STORE,
                place: entry.wayfinder(),
            });
        }
        // What is put into an archive again replaces what it had of the name, for all who read it.
        let mut seen = HashSet::new();
        let mut last: Vec<bool> = entries.iter().rev().map(|entry| seen.insert(entry.name.clone())).collect();
        entries.retain(|_| last.pop() == Some(true));
        Ok(Self { path: path.into(), archive, entries })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its entries, in the order of the directory; of those of one name the last.
    pub fn entries(&self) -> &[ZipEntry] {
        &self.entries
    }

    /// Fingerprint of the names and checksums of all entries.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.entries.iter().map(|entry| format!("{} {:08x}", entry.name, entry.checksum)))
    }

    /// The bytes of an entry, compared with its checksum.
    ///
    /// # Errors
    /// [`ZipError::Entry`]: it is compressed, or damaged.
    pub fn bytes(&self, entry: &ZipEntry) -> Result<&[u8], ZipError> {
        let wrong = |what: String| ZipError::Entry { path: self.path.clone(), name: entry.name.to_string(), what };
        let (bytes, checksum) = (self.archive.get_ref(), Some(entry.checksum));
        let stored = Stored::find(bytes, &self.archive, entry.place, entry.stored, checksum);
        stored.and_then(|stored| stored.bytes()).map_err(wrong)
    }
}

/// A stored entry of an archive in memory.
pub(super) struct Stored<'a> {
    /// Its bytes, which may be damaged.
    pub data: &'a [u8],
    /// Where they begin in the archive.
    pub at: usize,
    /// Their CRC, if it is known.
    pub checksum: Option<u32>,
}

impl<'a> Stored<'a> {
    /// Finds an entry; what is wrong if it is compressed, or not within the archive.
    pub fn find<T: AsRef<[u8]>>(
        archive: &'a [u8],
        parsed: &ZipSliceArchive<T>,
        place: ZipArchiveEntryWayfinder,
        is_stored: bool,
        checksum: Option<u32>,
    ) -> Result<Self, String> {
        if !is_stored {
            return Err(
                "it is compressed, expected a stored one: unpack the archive, and pack it by `zip -0 -r`".into()
            );
        }
        let (from, to) = parsed.get_entry(place).map_err(|error| error.to_string())?.compressed_data_range();
        let data = archive.get(from as usize..to as usize).ok_or("the archive ends within it")?;
        Ok(Self { data, at: from as usize, checksum })
    }

    /// Its bytes, compared with their checksum.
    pub fn bytes(&self) -> Result<&'a [u8], String> {
        match self.checksum.map(|expected| (crc32fast::hash(self.data), expected)) {
            Some((found, expected)) if found != expected => {
                Err(format!("checksum {found:08x}, expected {expected:08x}: it is damaged"))
            }
            _ => Ok(self.data),
        }
    }
}
