//! `cargo test` compiles simt-check once and runs each kernel file in both builds and all thread orders.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The directory of simt.
fn simt() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn simt_check(arguments: &[&str]) {
    let tool = Path::new(env!("CARGO_TARGET_TMPDIR")).join("simt-check");
    let compile = ["-std=c++17", "-O1", "src/simt-check.cpp", "-pthread", "-ldl", "-o"];
    assert!(Command::new("c++").args(compile).arg(&tool).current_dir(simt()).status().unwrap().success());
    let run = Command::new(&tool).args(arguments).current_dir(simt()).env("SIMT_HOME", simt()).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
}

#[test]
fn softmax() {
    simt_check(&["tests/softmax.cu"]);
}
