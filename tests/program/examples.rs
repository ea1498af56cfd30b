//! The examples do what they say. `cargo test` has built them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::command::here;

fn run(example: &str, arguments: &[&str], environment: &[(&str, &Path)]) -> String {
    let tests = std::env::current_exe().unwrap();
    let path = tests.ancestors().nth(2).unwrap().join("examples").join(example);
    assert!(path.exists(), "{}: missing; cargo build --examples makes it", path.display());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output =
        Command::new(path).args(arguments).envs(environment.iter().copied()).current_dir(root).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
    assert!(output.status.success(), "{example} {arguments:?}: {out}{err}");
    out
}

/// The pictures are those of the command, watched as the example watches its steps.
#[test]
fn sample_draws_what_the_command_draws() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    fs::create_dir(&ours).unwrap();
    let tags = ["green, heart", "cat, face"];
    let out = run("sample", &tags, &[("STEPS", Path::new("2")), ("OUTDIR", &ours)]);
    assert!(out.contains("step 2 of 2, noise level 0.002"), "{out}");
    let mut command = here(&["sample", "--model", "demo/emoji.safetensors", "--steps", "2", "--save-steps"]);
    command.args(tags.iter().flat_map(|tags| ["--tags", tags])).arg("--outdir").arg(&theirs).assert().success();
    for name in ["000000.png", "000001.png"] {
        assert!(fs::read(ours.join(name)).unwrap() == fs::read(theirs.join(name)).unwrap(), "{name}");
    }
}

/// The README's program is the crate's first doctest, which is compiled.
#[test]
fn the_readme_shows_what_compiles() {
    let read = |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let block = |text: &str, fence: &str| {
        let block = text.split_once(fence).unwrap().1.split_once("```").unwrap().0.to_owned();
        block
            .trim()
            .lines()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.starts_with("# "))
            .collect::<Vec<_>>()
    };
    let docs: String =
        read("src/lib.rs").lines().map_while(|line| line.strip_prefix("//!")).map(|l| format!("{l}\n")).collect();
    assert_eq!(block(&read("README.md"), "```rust\n"), block(&docs, "```no_run\n"));
}

#[test]
fn train_makes_snapshots_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").display().to_string();
    let snapshot = |images: u32| PathBuf::from(&out).join(format!("snapshot-{images:09}-0.050.safetensors"));
    let said = run("train", &["tests/data/emoji", &out, "64"], &[]);
    assert!(said.contains("64 images, loss ") && snapshot(64).exists(), "{said}");
    let said = run("train", &["tests/data/emoji", &out, "96"], &[]);
    assert!(said.contains("96 images, loss ") && !said.contains("32 images, loss ") && snapshot(96).exists(), "{said}");
}

#[test]
#[cfg(feature = "emulator")]
fn own_kernel_runs_on_the_emulator() {
    run("own_kernel", &[], &[]);
}
