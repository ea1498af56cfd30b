//! File formats, each read with suspicion and written whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub mod input;
pub mod jpeg;
pub mod npy;
pub mod pickle;
pub mod png;
pub mod safetensors;
pub mod tar;
pub mod torch;

/// A file that is being written: its path holds either its old content or all of the new one, whenever the
/// process or the machine dies. What is written goes to the path + `.tmp`, which [`commit`](Self::commit) syncs
/// and renames, and which is removed if that never happens.
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
    /// Whatever creating the temporary file reports.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut name = path
            .file_name()
            .map(|name| name.to_owned())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let writer = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
        Ok(Self { path: path.into(), temporary, writer, committed: false })
    }

    /// Where the content goes.
    pub fn writer(&mut self) -> &mut BufWriter<File> {
        &mut self.writer
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// Whatever writing, syncing or renaming reports; then the path is untouched.
    pub fn commit(mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.committed = true;
        // Without this the rename itself may be lost with the power. Some file systems
        // cannot sync a directory; the file's content is safe either way.
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if let Ok(directory) = File::open(directory) {
            let _ = directory.sync_all();
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // The first error is the one worth reporting; a leftover is overwritten next time.
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
