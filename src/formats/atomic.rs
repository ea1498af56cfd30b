//! Writing files. A path holds its old content or all of the new one, whichever process dies meanwhile, and however
//! many write.
//!
//! A file is written under a name that no one else has ([`AtomicFile`]), synced and renamed. A command whose work takes
//! long holds a [`Claim`] on its output from before the work, or a [`DirLock`] on its directory. All three use locks of
//! the system, which end with their process. So what a killed process left is recognised, and removed.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{At, FileError};
use crate::system::{self, is_at, leads_to_open_file};

/// A file that is being written: its path holds either its old content or all of the new one, whenever the
/// process or the machine dies. What is written goes to a temporary name beside it, which [`commit`](Self::commit)
/// syncs and renames, and which is removed if that never happens.
///
/// The new file has the permissions of the old one. A symbolic link is replaced itself, not what it leads to. Anything
/// that is no regular file is never replaced.
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    writer: BufWriter<File>,
    committed: bool,
}

impl AtomicFile {
    /// Begins to write.
    ///
    /// # Errors
    /// The path holds something other than a file; or whatever creating the temporary file reports.
    pub fn create(path: &Path) -> io::Result<Self> {
        let permissions = replaceable(path)?;
        let (temporary, file) = create_temporary(path, permissions.is_some())?;
        let writer = BufWriter::with_capacity(1 << 20, file);
        let file = Self { path: path.into(), temporary, writer, committed: false };
        if let Some(permissions) = permissions {
            file.writer.get_ref().set_permissions(permissions)?;
        }
        Ok(file)
    }

    /// Where it lies until then.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Where the content goes.
    pub fn writer(&mut self) -> &mut BufWriter<File> {
        &mut self.writer
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// Whatever writing, syncing or renaming reports; then the path is untouched.
    pub fn commit(self) -> io::Result<()> {
        self.put(|temporary, path| fs::rename(temporary, path))
    }

    /// Puts the file in its place, unless there is something by now. A file system without hard links cannot do both at
    /// once, so there what somebody writes at that very moment is replaced.
    ///
    /// # Errors
    /// As [`commit`](Self::commit); [`io::ErrorKind::AlreadyExists`].
    pub fn commit_new(self) -> io::Result<()> {
        self.put(|temporary, path| match fs::hard_link(temporary, path) {
            // The other name goes.
            Ok(()) => {
                drop(fs::remove_file(temporary));
                Ok(())
            }
            Err(_) if path.symlink_metadata().is_ok() => Err(io::ErrorKind::AlreadyExists.into()),
            Err(_) => fs::rename(temporary, path),
        })
    }

    fn put(mut self, place: impl FnOnce(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().sync_all()?;
        place(&self.temporary, &self.path)?;
        self.committed = true;
        // Without this the rename itself may be lost with the power. Some file systems
        // cannot sync a directory; the file's content is safe either way.
        if let Ok(directory) = File::open(parent(&self.path)) {
            let _ = directory.sync_all();
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // The first error is the one worth reporting; a leftover is removed next time.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a file with `fill`, all of it or nothing: see [`AtomicFile`].
///
/// # Errors
/// Whatever creating, filling, syncing or renaming reports; the temporary file is
/// removed and `path` is untouched.
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    fill(file.writer())?;
    file.commit()
}

/// As [`write_atomically`], unless there is something by then ([`AtomicFile::commit_new`]).
///
/// # Errors
/// As there; [`io::ErrorKind::AlreadyExists`].
pub fn write_new(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    fill(file.writer())?;
    file.commit_new()
}

/// The right to write a file, held from before the work that makes it until it is written. So it is known early that
/// the file can be written, and two processes do not work for the same path.
pub struct Claim {
    _probe: AtomicFile,
}

impl Claim {
    /// Claims a path.
    ///
    /// # Errors
    /// The path holds something, unless it may be overwritten and is a file; it cannot be written there; another
    /// process has a claim on it.
    pub fn new(path: &Path, overwrite: bool) -> io::Result<Self> {
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists"));
        }
        let claim = Self { _probe: AtomicFile::create(path)? };
        // Of two that come at the same moment both may be refused, but never neither. One of the files found is its
        // own.
        match remove_abandoned(parent(path), |other| other == stem(path))? {
            0 | 1 => Ok(claim),
            _ => Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process is writing it")),
        }
    }
}

/// A directory in which this process writes, alone or with others of its kind.
pub struct DirLock {
    dir: PathBuf,
    file: File,
    created: bool,
    guarded: bool,
}

/// Name of the file that is locked, which holds nothing. Some network file systems lock no directories.
const LOCK_FILE: &str = ".edm2k.lock";

/// Why a directory cannot be written in.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum LockError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: another run is writing here", dir.display())]
    Busy { dir: PathBuf },
}

impl DirLock {
    /// Creates the directory if it is missing, checks that files can be written in it, keeps all other processes from
    /// it, and removes what killed processes left half written.
    pub fn exclusive(dir: &Path) -> Result<Self, LockError> {
        Self::new(dir, File::try_lock)
    }

    /// As [`exclusive`](Self::exclusive), but shared with other processes that call `shared`.
    pub fn shared(dir: &Path) -> Result<Self, LockError> {
        Self::new(dir, File::try_lock_shared)
    }

    fn new(dir: &Path, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Self, LockError> {
        let created = !dir.exists();
        fs::create_dir_all(dir).at(dir)?;
        let path = dir.join(LOCK_FILE);
        for _ in 0..ATTEMPTS {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = system::no_follow(&mut options).open(&path).at(&path)?;
            let guarded = match lock(&file) {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return Err(LockError::Busy { dir: dir.into() }),
                Err(TryLockError::Error(cause)) if cause.kind() == io::ErrorKind::Unsupported => false,
                Err(TryLockError::Error(cause)) => return Err(FileError { path: dir.into(), cause }.into()),
            };
            // The process that had the lock may have removed the file between the opening and the locking.
            if guarded && !is_at(&file, &path) {
                continue;
            }
            let lock = Self { dir: dir.into(), file, created, guarded };
            remove_abandoned(dir, |_| true).at(dir)?;
            return Ok(lock);
        }
        // Others come and go all the time.
        Err(LockError::Busy { dir: dir.into() })
    }

    /// A warning, if the file system has no locks.
    pub fn warning(&self) -> Option<String> {
        let text = "its file system has no locks, so see to it that nothing else writes here";
        (!self.guarded).then(|| format!("{}: {text}", self.dir.display()))
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // If others still share the lock, the file is left to them.
        let path = self.dir.join(LOCK_FILE);
        // A file that holds something is somebody's own.
        let ours = self.file.metadata().is_ok_and(|about| about.len() == 0);
        if self.guarded && ours && self.file.try_lock().is_ok() && is_at(&self.file, &path) {
            let _ = fs::remove_file(&path);
            if self.created {
                // If nothing was written, the directory goes too. One that has something in it stays.
                let _ = fs::remove_dir(&self.dir);
            }
        }
    }
}

impl fmt::Debug for DirLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirLock({})", self.dir.display())
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The permissions of the file that `path` holds, if it holds one; an error if it holds something else.
fn replaceable(path: &Path) -> io::Result<Option<Permissions>> {
    let missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    match path.symlink_metadata() {
        Err(e) if missing(&e) => return Ok(None),
        Err(e) => return Err(e),
        Ok(_) => {}
    }
    if leads_to_open_file(path) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it stands for an open file, so it is not replaced"));
    }
    match path.metadata() {
        // It is a link that leads nowhere.
        Err(e) if missing(&e) => Ok(None),
        Err(e) => Err(e),
        Ok(about) if about.is_file() => Ok(Some(about.permissions())),
        Ok(about) if about.is_dir() => Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory")),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file, so it is not replaced")),
    }
}

/// What the temporary names of a file begin with; short enough for what follows.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name[..name.floor_char_boundary(200)].to_owned()
}

/// The stem in a temporary name: `STEM.0123456789abcdef.tmp`.
pub(crate) fn stem_of_temporary(name: &str) -> Option<&str> {
    let (stem, digits) = name.strip_suffix(".tmp")?.rsplit_once('.')?;
    (digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit())).then_some(stem)
}

/// How often a file is made, or opened, that is no longer where it was.
const ATTEMPTS: usize = 100;

/// A new, locked file beside `path`, which only its owner may read if it is `private`.
fn create_temporary(path: &Path, private: bool) -> io::Result<(PathBuf, File)> {
    let nameless = || io::Error::new(io::ErrorKind::InvalidInput, "the path names no file");
    path.file_name().ok_or_else(nameless)?;
    for _ in 0..ATTEMPTS {
        let random = RandomState::new().build_hasher().finish();
        let temporary = path.with_file_name(format!("{}.{random:016x}.tmp", stem(path)));
        let mut how = OpenOptions::new();
        how.write(true).create_new(true);
        if private {
            // Nobody may read it who could not read the old one, not even for a moment.
            system::private(&mut how);
        }
        let file = match how.open(&temporary) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        // On a file system without locks, no file is taken for abandoned.
        let _ = file.try_lock();
        // Somebody may have seen it before it was locked, and removed it.
        if is_at(&file, &temporary) {
            return Ok((temporary, file));
        }
    }
    Err(io::Error::other("files do not stay where they are made"))
}

/// Removes the temporary files of killed processes whose stems are `wanted`. Returns how many of living processes there
/// are.
fn remove_abandoned(dir: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<usize> {
    let mut alive = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !regular || !stem_of_temporary(&name.to_string_lossy()).is_some_and(&wanted) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = system::no_follow(OpenOptions::new().write(true)).open(&path) else { continue };
        match file.try_lock() {
            Ok(()) => match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            },
            Err(TryLockError::WouldBlock) => alive += 1,
            Err(TryLockError::Error(_)) => {}
        }
    }
    Ok(alive)
}
