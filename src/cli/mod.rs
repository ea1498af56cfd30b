//! The command line: one file per subcommand, and what they share.

pub mod bench;
pub mod condition;
pub mod export;
pub mod import;
pub mod info;
pub mod prepare;
pub mod sample;
pub mod train;
pub mod verify;

use std::path::Path;

use anyhow::ensure;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// The best that there is
    Auto,
    /// This machine's processor
    Cpu,
}

/// Refuses to write to a file that exists, or into a directory that does not, before the work, not after it.
pub fn claim(path: &Path, overwrite: bool) -> anyhow::Result<()> {
    ensure!(overwrite || !path.exists(), "{} exists; give --overwrite, or another name", path.display());
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        ensure!(parent.is_dir(), "{}: the directory does not exist", parent.display());
    }
    Ok(())
}

/// Parses a size given as width x height, e.g. `64x88`; returns [height, width].
pub fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let wrong = || format!("'{text}' is not a size, expected WIDTHxHEIGHT, e.g. 512x704");
    let (width, height) = text.split_once(['x', 'X']).ok_or_else(wrong)?;
    let number = |n: &str| n.parse().ok().filter(|n| (1..=1 << 16).contains(n)).ok_or_else(wrong);
    Ok([number(height)?, number(width)?])
}
