//! File formats, each read with suspicion and written whole or not at all.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;

pub mod atomic;
pub mod mapped;
pub mod npy;
pub mod pickle;
pub mod png;
pub mod safetensors;
pub mod tar;
pub mod torch;

pub use atomic::{AtomicFile, Claim, DirLock, LockError, write_atomically};

/// Name and CRC-32 of a file: what it is recognised by, wherever it lies.
///
/// # Errors
/// Whatever reading it reports.
pub fn identity(path: &Path) -> io::Result<String> {
    struct Checksum(crc32fast::Hasher);
    impl Write for Checksum {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut checksum = Checksum(crc32fast::Hasher::new());
    io::copy(&mut BufReader::with_capacity(1 << 20, File::open(path)?), &mut checksum)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(format!("{name} ({:08x})", checksum.0.finalize()))
}
