//! Libraries that stand for NVIDIA's where there is no card, compiled when they are needed.

use std::path::PathBuf;
use std::process::Command;

/// A directory with the library `name` of a file of tests/, compiled with these flags too, and the library's path.
pub fn stand_in(source: &str, name: &str, more: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join(name);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let source = format!("{}/tests/{source}", env!("CARGO_MANIFEST_DIR"));
    let flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", &source, "-ldl", "-o"];
    let made = Command::new(compiler).args(flags).arg(&library).args(more).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (dir, library)
}
