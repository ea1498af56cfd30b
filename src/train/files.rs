//! The names of the files in a run's directory. Numbers in them are of images seen.

use std::io;
use std::path::Path;

use super::ema;
use crate::formats::names;

/// The run's [`Settings`](super::Settings).
pub const OPTIONS: &str = "training_options.json";
/// Its statistics, a line for each interval.
pub const STATS: &str = "stats.jsonl";
/// The picture of its losses.
pub const LOSSES: &str = "loss.svg";
/// How the names of TensorBoard's event files begin.
pub const EVENTS: &str = "events.out.tfevents.";

const CHECKPOINT: &str = "checkpoint-";
const SNAPSHOT: &str = "snapshot-";
const GRID: &str = "grid-";
const MODEL: &str = ".safetensors";
const PICTURE: &str = ".png";

/// Name of a checkpoint.
pub fn checkpoint(nimg: u64) -> String {
    format!("{CHECKPOINT}{nimg:09}{MODEL}")
}

/// Name of the snapshot of a moving average, which its relative standard deviation tells from others.
pub fn snapshot(nimg: u64, std: f64) -> String {
    format!("{SNAPSHOT}{nimg:09}-{}{MODEL}", ema::name_of(std))
}

/// Name of a sample grid.
pub fn grid(nimg: u64) -> String {
    format!("{GRID}{nimg:09}{PICTURE}")
}

/// The images of a checkpoint of this name. A copy that somebody made under another name is none.
pub fn checkpoint_of(name: &str) -> Option<u64> {
    let nimg = name.strip_prefix(CHECKPOINT)?.strip_suffix(MODEL)?.parse().ok()?;
    (checkpoint(nimg) == name).then_some(nimg)
}

/// The images and the standard deviation of a snapshot of this name.
pub fn snapshot_of(name: &str) -> Option<(u64, &str)> {
    let (nimg, std) = name.strip_prefix(SNAPSHOT)?.strip_suffix(MODEL)?.split_once('-')?;
    Some((nimg.parse().ok()?, std))
}

/// The images of a sample grid of this name.
pub fn grid_of(name: &str) -> Option<u64> {
    name.strip_prefix(GRID)?.strip_suffix(PICTURE)?.parse().ok()
}

/// The names in a directory that snapshots have, in order, whatever stands for the numbers in them.
///
/// # Errors
/// If the directory cannot be listed.
pub fn snapshots(dir: &Path) -> io::Result<Vec<String>> {
    Ok(names(dir)?.into_iter().filter(|name| name.starts_with(SNAPSHOT) && name.ends_with(MODEL)).collect())
}

/// The names in a directory that begin as those of a run's files do.
///
/// # Errors
/// If the directory cannot be listed.
pub fn made_by_runs(dir: &Path) -> io::Result<Vec<String>> {
    let made = [CHECKPOINT, SNAPSHOT, GRID, STATS, OPTIONS, LOSSES, EVENTS];
    Ok(names(dir)?.into_iter().filter(|name| made.iter().any(|start| name.starts_with(start))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_were_made_of() {
        assert_eq!(checkpoint(64), "checkpoint-000000064.safetensors");
        assert_eq!(checkpoint_of(&checkpoint(1_234_567_890)), Some(1_234_567_890));
        assert_eq!(checkpoint_of("checkpoint-64.safetensors"), None);
        assert_eq!(snapshot_of(&snapshot(64, 0.05)), Some((64, "0.050")));
        assert_eq!(snapshot_of("snapshot-64.safetensors"), None);
        assert_eq!(grid_of(&grid(64)), Some(64));
        assert_eq!(grid_of("grid-64.png.part"), None);
    }
}
