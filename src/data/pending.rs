//! Changes of many files of a dataset that come into force at one moment.
//!
//! New files are written into the folder `pending` in the dataset's. The moment is when a marker is written there, as
//! the last file. From then on, whoever opens the dataset takes a file from that folder if there is one of its name,
//! and otherwise from the dataset's folder. Then the files are moved to their places, and the folder goes. A process
//! that dies before the marker leaves the dataset as it was; one that dies after it leaves the new one, and the next
//! `prepare` moves the rest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::shard::{SUMMARY_FILE, Split, VOCABULARY_FILE};
use crate::formats::{At, FileError, atomic, names, write_atomically};

/// Name of the folder.
const FOLDER: &str = "pending";
/// Name of the marker, which puts the folder's content in force.
const MARKER: &str = "ready";

/// A dataset's folder, with what is pending in it if that is in force.
pub(super) struct PendingView {
    dir: PathBuf,
    pending: Option<PathBuf>,
}

impl PendingView {
    pub fn of(dir: &Path) -> Self {
        let pending = dir.join(FOLDER);
        Self { dir: dir.into(), pending: pending.join(MARKER).exists().then_some(pending) }
    }

    /// Where the file of this name is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        let new = self.pending.iter().map(|pending| pending.join(name)).find(|path| path.exists());
        new.unwrap_or_else(|| self.dir.join(name))
    }

    /// The names of all files.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn names(&self) -> Result<BTreeSet<String>, FileError> {
        let mut found = names(&self.dir).at(&self.dir)?;
        if let Some(pending) = &self.pending {
            found.extend(names(pending).at(pending)?.into_iter().filter(|name| name != MARKER));
        }
        Ok(found)
    }
}

/// A value that changes when something comes into force.
pub(super) fn moment(dir: &Path) -> (bool, [Option<SystemTime>; 2]) {
    let changed = |name| dir.join(name).metadata().and_then(|about| about.modified()).ok();
    (dir.join(FOLDER).join(MARKER).exists(), [VOCABULARY_FILE, SUMMARY_FILE].map(changed))
}

/// Whether a file has a name that files of a dataset have.
fn is_of_a_dataset(name: &str) -> bool {
    [VOCABULARY_FILE, SUMMARY_FILE, MARKER].contains(&name) || Split::names(name)
}

/// The changes that one process prepares. It owns the dataset's folder.
pub(super) struct Pending {
    dir: PathBuf,
    folder: PathBuf,
}

impl Pending {
    /// Ends the moving that a killed process began. What a process wrote and did not mark is kept.
    ///
    /// # Errors
    /// A file cannot be moved.
    pub fn new(dir: &Path) -> Result<Self, FileError> {
        let pending = Self { dir: dir.into(), folder: dir.join(FOLDER) };
        if pending.folder.join(MARKER).exists() {
            pending.put_in_place()?;
        }
        Ok(pending)
    }

    /// The names of the files in the folder. It is an error if one is no name of a dataset's file: then the folder is
    /// somebody's own, or a link to one.
    fn own_names(&self) -> Result<BTreeSet<String>, FileError> {
        let foreign = |what: String| {
            let what = format!("{what}, where the dataset puts what is not yet in force; move it away");
            FileError { path: self.folder.clone(), cause: io::Error::other(what) }
        };
        match self.folder.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Ok(about) if !about.is_dir() => return Err(foreign("not a folder".into())),
            about => about.map(drop).at(&self.folder)?,
        }
        let mut own = BTreeSet::new();
        for entry in fs::read_dir(&self.folder).at(&self.folder)? {
            let entry = entry.at(&self.folder)?;
            let (name, is_file) = (entry.file_name(), entry.file_type().is_ok_and(|of| of.is_file()));
            let known =
                |name: &str| is_of_a_dataset(name) || atomic::stem_of_temporary(name).is_some_and(is_of_a_dataset);
            match name.to_str().filter(|name| is_file && known(name)) {
                Some(name) => drop(own.insert(name.to_owned())),
                // Files that a desktop puts into any folder.
                None if is_file && [".DS_Store", "Thumbs.db", "desktop.ini"].iter().any(|of| name == *of) => {}
                None => return Err(foreign(format!("it has {name:?}"))),
            }
        }
        Ok(own)
    }

    /// Makes no changes: for one of several processes, which must leave what is pending alone.
    ///
    /// # Errors
    /// Something is in force, and not all of it has been moved to its place.
    pub fn none(dir: &Path) -> Result<Self, FileError> {
        let pending = Self { dir: dir.into(), folder: dir.join(FOLDER) };
        if pending.folder.join(MARKER).exists() {
            let cause = io::Error::other(
                "a killed process began to move it into place: preparing in one process, of all parts, ends that",
            );
            return Err(FileError { path: pending.folder, cause });
        }
        Ok(pending)
    }

    /// Makes the folder, and removes all files from it that are not `wanted`.
    ///
    /// # Errors
    /// It cannot be made, or a file not removed.
    pub fn begin(&self, wanted: impl Fn(&str) -> bool) -> Result<(), FileError> {
        let own = self.own_names()?;
        fs::create_dir_all(&self.folder).at(&self.folder)?;
        for name in own.iter().filter(|name| !wanted(name)) {
            let path = self.folder.join(name);
            fs::remove_file(&path).at(&path)?;
        }
        Ok(())
    }

    /// The dataset as it will be once the changes are in force.
    pub fn view(&self) -> PendingView {
        PendingView { dir: self.dir.clone(), pending: Some(self.folder.clone()) }
    }

    /// Where a new file is to be written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Removes the folder, with the files that [`begin`](Self::begin) found to be the dataset's and those that were put
    /// into it since.
    ///
    /// # Errors
    /// That is not possible.
    pub fn discard(&self) -> Result<(), FileError> {
        self.begin(|_| false)?;
        self.remove_folder()
    }

    /// Puts the new files in force, and moves them to their places.
    ///
    /// # Errors
    /// A file cannot be written or moved. If that happens before the marker is written, the dataset is the old one; if
    /// after, the new one.
    pub fn commit(self) -> Result<(), FileError> {
        let marker = self.folder.join(MARKER);
        write_atomically(&marker, |_| Ok(())).at(&marker)?;
        self.put_in_place()
    }

    fn put_in_place(&self) -> Result<(), FileError> {
        for name in self.own_names()?.iter().filter(|name| *name != MARKER) {
            let from = self.folder.join(name);
            fs::rename(&from, self.dir.join(name)).at(&from)?;
        }
        // All must be in place before the marker goes. Some file systems cannot sync a directory.
        if let Ok(directory) = File::open(&self.dir) {
            let _ = directory.sync_all();
        }
        let marker = self.folder.join(MARKER);
        fs::remove_file(&marker).at(&marker)?;
        self.remove_folder()
    }

    fn remove_folder(&self) -> Result<(), FileError> {
        match fs::remove_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => removed.at(&self.folder),
        }
    }
}
