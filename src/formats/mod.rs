//! File formats. Each is read without trusting what the file says, and written whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub mod atomic;
pub mod differences;
pub mod fingerprint;
pub mod input;
pub mod json;
pub mod mapped;
pub mod npy;
pub mod pickle;
pub mod safetensors;
pub mod tar;
pub mod torch;
pub mod weights;
pub mod zip;

pub use atomic::{AtomicFile, Claim, DirLock, LockError, write_atomically, write_new};

/// What the system says of a file or a directory.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", path.display())]
#[allow(missing_docs)] // the message says it
pub struct FileError {
    pub path: PathBuf,
    pub cause: io::Error,
}

/// Adds to an error of the system which file it is about.
pub trait At<T> {
    /// # Errors
    /// That of `self`, with the path.
    fn at(self, path: impl AsRef<Path>) -> Result<T, FileError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T, FileError> {
        self.map_err(|cause| FileError { path: path.as_ref().into(), cause })
    }
}

/// Whether a file's name has an ending, such as `zip`, in whichever case.
pub fn ends_in(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|own| own.eq_ignore_ascii_case(ending))
}

/// The names in a directory, sorted, but for those that are not UTF-8.
pub fn names(dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        found.extend(entry?.file_name().into_string().ok());
    }
    Ok(found)
}

/// A number as people read it: as `{:e}` where it would otherwise begin or end in many zeros.
pub fn short(x: f64) -> String {
    let in_full = x == 0.0 || !x.is_finite() || (1e-5..1e16).contains(&x.abs());
    if in_full { x.to_string() } else { format!("{x:e}") }
}

/// The values of [rows, columns] as [columns, rows]: [H, W, C] as [C, H, W] by its channels, and back by its pixels.
pub fn transposed<T: Copy>(values: &[T], columns: usize) -> impl Iterator<Item = T> {
    (0..columns).flat_map(move |column| values.iter().skip(column).step_by(columns).copied())
}

/// A name for something that is set aside: `path` with an ending such that no file has that name yet.
pub(crate) fn free_name(path: &Path, ending: &str) -> PathBuf {
    let name = |number: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(if number == 1 { format!(".{ending}") } else { format!(".{ending}-{number}") });
        PathBuf::from(name)
    };
    (1..).map(name).find(|path| path.symlink_metadata().is_err()).unwrap_or_default()
}
