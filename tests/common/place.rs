//! A directory of a test's own, processes in it, and what is found in such a one.

use std::collections::BTreeMap;
use std::fs;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::safetensors::SafeFile;
use edm2k::train::checkpoint;
use serde_json::Value;
use tempfile::TempDir;

/// The directory; it ends with the test. A module that gives it methods of its own names itself as `Of`, so that other
/// modules may have methods of the same names.
pub struct Place<Of = ()>(TempDir, PhantomData<Of>);

impl<Of> Place<Of> {
    pub fn empty() -> Self {
        Self(tempfile::tempdir().unwrap(), PhantomData)
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `edm2k` in it with these arguments, which spaces separate.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
        command.args(arguments.split_whitespace()).current_dir(self.0.path());
        command
    }

    /// A dataset in it.
    pub fn open(&self, name: &str, split: Split) -> Dataset {
        Dataset::open(&self.path(name), split).unwrap()
    }

    /// Newest checkpoint of a run.
    pub fn newest(&self, run: &str) -> PathBuf {
        checkpoint::list(&self.path(run)).unwrap().into_iter().next().expect("a checkpoint")
    }
}

/// The files of a directory with their bytes, but for what holds its lock.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_file());
    let all = entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    all.filter(|(name, _)| name != ".edm2k.lock").collect()
}

/// A run's statistics.
pub fn stats(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("stats.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every tensor of two files is the same to the bit. A part of the metadata's checksum is the time.
pub fn assert_same_tensors(a: &Path, b: &Path) {
    let (fa, fb) = (SafeFile::open(a).unwrap(), SafeFile::open(b).unwrap());
    assert!(fa.names().eq(fb.names()), "{} {}", a.display(), b.display());
    for name in fa.names().filter(|&name| name != "checksums") {
        assert!(fa.bytes(name).unwrap() == fb.bytes(name).unwrap(), "{name} differs: {} {}", a.display(), b.display());
    }
}

/// The relative distance of two checkpoints' tensors of these slots, that of the worst, and its name. What has a smaller norm
/// than `least` counts as if it had that.
pub fn distance(a: &Path, b: &Path, slots: &[&str], least: f64) -> (f64, String) {
    let (a, b) = (SafeFile::open(a).unwrap(), SafeFile::open(b).unwrap());
    let of = |name: &str| {
        let (a, b) = (a.f32(name).unwrap(), b.f32(name).unwrap());
        let difference = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let size = a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
        (difference.sqrt() / size.sqrt().max(least), name.to_owned())
    };
    let names = a.names().filter(|name| slots.iter().any(|slot| name.starts_with(slot)));
    names.map(of).max_by(|a, b| a.0.total_cmp(&b.0)).expect("tensors of these slots")
}

/// Sends a signal, such as `-TERM`.
pub fn signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// All that a finished process said.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs to the end; what it said.
pub fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", text(&output));
    text(&output)
}
