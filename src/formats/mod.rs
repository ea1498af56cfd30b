//! File formats, each read with suspicion and written whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub mod npy;
pub mod pickle;
pub mod png;
pub mod safetensors;
pub mod torch;

/// Writes a file so that `path` holds either its old content or all of the new one,
/// whenever the process or the machine dies: `fill` writes to `path` + `.tmp`, which is
/// then synced and renamed, and the directory is synced.
///
/// # Errors
/// Whatever creating, filling, syncing or renaming reports; the temporary file is
/// removed and `path` is untouched.
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut name = path
        .file_name()
        .map(|name| name.to_owned())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    name.push(".tmp");
    let temporary: PathBuf = path.with_file_name(name);
    let written = (|| {
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
        fill(&mut writer)?;
        writer.flush()?;
        writer.get_ref().sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one worth reporting; a leftover is overwritten next time.
        let _ = fs::remove_file(&temporary);
        return written;
    }
    // Without this the rename itself may be lost with the power. Some file systems
    // cannot sync a directory; the file's content is safe either way.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
    Ok(())
}
