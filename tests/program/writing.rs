//! What is written, and what is not: whole files or none, with any number of writers; nothing over what was there
//! unasked; and nothing lost for want of someone who reads along.
#![cfg(unix)]

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use crate::common::place::{self, Place};
use edm2k::formats::{AtomicFile, Claim, DirLock, LockError, write_atomically, write_new};
use edm2k::model::{Config, Model, Stored};

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

fn put(path: &Path, text: &str) -> std::io::Result<()> {
    write_atomically(path, |out| out.write_all(text.as_bytes()))
}

#[test]
fn a_lock_file_that_holds_something_is_somebody_s_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".edm2k.lock");
    drop(DirLock::exclusive(dir.path()).unwrap());
    assert!(!path.exists());
    fs::write(&path, "mine").unwrap();
    let lock = DirLock::exclusive(dir.path()).unwrap();
    assert!(matches!(DirLock::exclusive(dir.path()), Err(LockError::Busy { .. })));
    drop(lock);
    assert_eq!(fs::read_to_string(path).unwrap(), "mine");
}

#[test]
fn only_files_are_replaced_and_their_permissions_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("private"), "old").unwrap();
    fs::set_permissions(path("private"), fs::Permissions::from_mode(0o600)).unwrap();
    // Names that somebody else may use.
    fs::write(path("private.tmp"), "mine").unwrap();
    put(&path("private"), "new").unwrap();
    assert_eq!(fs::metadata(path("private")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        (fs::read(path("private")).unwrap(), fs::read(path("private.tmp")).unwrap()),
        (b"new".into(), b"mine".into())
    );

    fs::create_dir(path("folder")).unwrap();
    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    symlink("/dev/null", path("device")).unwrap();
    // As /dev/stdout does, whatever that is at the moment.
    let redirected = fs::File::create(path("redirected")).unwrap();
    symlink(format!("/proc/self/fd/{}", redirected.as_raw_fd()), path("stdout")).unwrap();
    for (name, message) in [
        ("folder", "it is a directory"),
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("stdout", "it stands for an open file"),
    ] {
        let error = put(&path(name), "new").unwrap_err();
        assert!(error.to_string().contains(message), "{name}: {error}");
        assert!(Claim::new(&path(name), true).is_err(), "{name}");
    }
    assert!(fs::metadata(path("pipe")).unwrap().file_type().is_fifo());
    // A link is replaced and not followed, wherever it leads.
    for target in ["private", "nowhere"] {
        symlink(path(target), path("link")).unwrap();
        assert_eq!(Claim::new(&path("link"), false).err().map(|e| e.kind()), Some(ErrorKind::AlreadyExists));
        put(&path("link"), "through").unwrap();
        assert!(path("link").symlink_metadata().unwrap().is_file());
        fs::remove_file(path("link")).unwrap();
    }
    assert_eq!(names(dir.path()), ["device", "folder", "pipe", "private", "private.tmp", "redirected", "stdout"]);
    assert_eq!(fs::read(path("private")).unwrap(), b"new");
    // The longest name that file systems take.
    put(&path(&"n".repeat(255)), "long").unwrap();
}

#[test]
fn with_any_number_of_writers_a_path_holds_the_whole_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let content = |writer: u8| vec![writer; 100_000 + usize::from(writer)];
    put(&path, "").unwrap();
    thread::scope(|scope| {
        let writers: Vec<_> = (1..7)
            .map(|writer| {
                let path = &path;
                scope.spawn(move || {
                    (0..30).for_each(|_| write_atomically(path, |out| out.write_all(&content(writer))).unwrap())
                })
            })
            .collect();
        while !writers.iter().all(|writer| writer.is_finished()) {
            let found = fs::read(&path).unwrap();
            assert!(found.first().is_none_or(|&writer| found == content(writer)), "a torn file");
        }
    });
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn of_any_number_of_writers_of_a_new_file_one_is_first() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = &dir.path().join(format!("file-{round}"));
        let wrote = |writer: u8| write_new(path, |out| out.write_all(&vec![writer; 100_000]));
        let done: Vec<_> = thread::scope(|scope| {
            let writers: Vec<_> = (1..7).map(|writer| scope.spawn(move || (writer, wrote(writer)))).collect();
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        let (first, others): (Vec<_>, Vec<_>) = done.into_iter().partition(|(_, done)| done.is_ok());
        assert_eq!(first.len(), 1);
        assert_eq!(fs::read(path).unwrap(), vec![first[0].0; 100_000]);
        assert!(others.into_iter().all(|(_, why)| why.unwrap_err().kind() == ErrorKind::AlreadyExists));
    }
    assert_eq!(names(dir.path()).len(), 20, "{:?}", names(dir.path()));
}

#[test]
fn claims_exclude_each_other_and_outlast_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let (left, other) = (dir.path().join("model.0123456789abcdef.tmp"), dir.path().join("else.0123456789abcdef.tmp"));
    fs::write(&left, "left by a killed process").unwrap();
    fs::write(&other, "of another file").unwrap();
    let claim = Claim::new(&path, false).unwrap();
    assert!(!left.exists() && other.exists());
    assert!(Claim::new(&path, true).err().unwrap().to_string().contains("another process is writing it"));
    drop(Claim::new(&dir.path().join("model2"), false).unwrap());
    put(&path, "whole").unwrap();
    drop(claim);
    assert_eq!(Claim::new(&path, false).err().map(|e| e.kind()), Some(ErrorKind::AlreadyExists));
    Claim::new(&path, true).unwrap();
    assert_eq!(names(dir.path()), ["else.0123456789abcdef.tmp", "model"]);
    assert!(Claim::new(&dir.path().join("nowhere/x"), false).is_err());
}

#[test]
fn a_directory_has_one_owner_or_many_who_share() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("run");
    drop(DirLock::exclusive(&dir).unwrap());
    assert!(!dir.exists(), "a directory for nothing was left");

    let owner = DirLock::exclusive(&dir).unwrap();
    assert!(matches!(DirLock::exclusive(&dir), Err(LockError::Busy { .. })));
    assert!(matches!(DirLock::shared(&dir), Err(LockError::Busy { .. })));
    let mut unfinished = AtomicFile::create(&dir.join("file")).unwrap();
    unfinished.writer().write_all(b"half").unwrap();
    fs::write(dir.join("dead.0123456789abcdef.tmp"), "").unwrap();
    fs::write(dir.join("mine.tmp"), "").unwrap();
    drop(owner);
    let (first, second) = (DirLock::shared(&dir).unwrap(), DirLock::shared(&dir).unwrap());
    unfinished.commit().unwrap();
    drop(first);
    assert!(matches!(DirLock::exclusive(&dir), Err(LockError::Busy { .. })), "one of two still writes");
    drop(second);
    drop(DirLock::exclusive(&dir).unwrap());
    assert_eq!(names(&dir), ["file", "mine.tmp"]);
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"half");
}

// ---- commands -------------------------------------------------------------------------------

/// The command under way, unheard.
fn start(place: &Place, arguments: &str) -> Child {
    place.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn said(output: &Output) -> String {
    let text = place::text(output);
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// A directory with a small model of 16x16 RGB images.
fn place() -> Place {
    let place = Place::empty();
    let config = r#"{"img_resolution": 16, "img_channels": 3, "label_dim": 0, "model_channels": 8,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}"#;
    let config: Config = serde_json::from_str(config).unwrap();
    let mut model = Model::init(&config, 1).unwrap();
    model.meta.source = "a\nedm2k: all is well\u{1b}[2J".into();
    model.save(place.path("m"), Stored::F32).unwrap();
    place
}

fn emoji() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji")
}

#[test]
fn outputs_are_claimed_before_the_work_and_nothing_is_overwritten_unasked() {
    let place = place();
    let dir = place.dir();
    let data = emoji().display().to_string();
    fs::create_dir(dir.join("folder")).unwrap();
    fs::write(dir.join("keep.svg"), "keep").unwrap();
    assert!(Command::new("mkfifo").arg(dir.join("pipe")).status().unwrap().success());
    let cases = [
        ("export m --overwrite --out folder", "folder: it is a directory"),
        ("export m --overwrite --out pipe", "pipe: it is not a regular file"),
        ("export m --overwrite --out /dev/null", "/dev/null: it is not a regular file"),
        ("export m --out m", "m exists; give --overwrite"),
        (&format!("eval --model m --data {data} --plot ./m --overwrite"), "would replace m, which is read"),
        ("export m --out nowhere/x", "nowhere: the directory does not exist"),
        // All of these would otherwise work for hours first.
        (&format!("condition train --epochs 60000 --data {data} --out folder"), "folder exists"),
        (&format!("condition train --epochs 60000 --data {data} --overwrite --out folder"), "it is a directory"),
        (&format!("condition train --epochs 60000 --data {data} --out folder/new/"), "the name of a directory"),
        (&format!("condition train --epochs 60000 --data {data} --out folder/new/."), "the name of a directory"),
        (&format!("eval --model m --data {data} --images 100000 --plot keep.svg"), "keep.svg exists"),
        (&format!("eval --model m --data {data} --images 100000 --plot nowhere/x.svg"), "the directory does not exist"),
        ("sample --model m --steps 10000 --outdir m", "m: "),
    ];
    for (arguments, message) in cases {
        let output = place.command(arguments).output().unwrap();
        let said = said(&output);
        assert!(output.status.code() == Some(1) && said.contains(message), "{arguments}: {said}expected {message}");
    }
    assert_eq!(fs::read(dir.join("keep.svg")).unwrap(), b"keep");
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert_eq!(names(dir), ["folder", "keep.svg", "m", "pipe"]);
    fs::create_dir_all(dir.join("pictures/000001.png")).unwrap();
    let output =
        place.command("sample --model m --steps 10000 --outdir pictures --overwrite --seeds 0-1").output().unwrap();
    assert!(said(&output).contains("000001.png is a directory"), "{}", said(&output));
    assert_eq!(names(&dir.join("pictures")), ["000001.png"]);
    // The dataset's own files as its metadata.
    fs::create_dir(dir.join("d")).unwrap();
    let own = r#"{"id": 1, "file": "a.png", "tags": ["a"]}"#;
    fs::write(dir.join("d/vocabulary.json"), own).unwrap();
    let output = place.command("prepare --images . --metadata d/vocabulary.json --size 8x8 --out d").output().unwrap();
    assert!(said(&output).contains("expected another file"), "{}", said(&output));
    assert_eq!(fs::read_to_string(dir.join("d/vocabulary.json")).unwrap(), own);
}

#[test]
fn seeds_can_be_added_later_or_at_the_same_time() {
    let place = place();
    let dir = place.dir();
    let sample = "sample --model m --steps 2 --device cpu --outdir out --seeds";
    for seeds in ["0-3", "4-7"] {
        let output = place.command(&format!("{sample} {seeds}")).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    let other = place.command(&format!("{sample} 7-8").replace("--steps 2", "--steps 3")).output().unwrap();
    assert!(
        said(&other)
            .contains("000007.png exists, of something else: sampler.steps is 2 there, 3 here; give --overwrite"),
        "{}",
        said(&other)
    );
    assert_eq!(
        names(&dir.join("out")).iter().filter(|name| name.starts_with("grid")).collect::<Vec<_>>(),
        ["grid-2.png", "grid.png"]
    );
    let all: Vec<_> = (1..9).map(|k| start(&place, &format!("{sample} {k}0-{k}2 --overwrite"))).collect();
    for mut child in all {
        assert!(child.wait().unwrap().success());
    }
    let names = names(&dir.join("out"));
    assert_eq!(names.len(), 8 + 2 + 24, "{names:?}");
    assert!(names.iter().all(|name| image::open(dir.join("out").join(name)).is_ok()));
}

#[test]
fn two_exports_to_one_path_leave_one_whole_file() {
    let place = place();
    let dir = place.dir();
    let mut whole = HashMap::new();
    for dtype in ["f32", "f16"] {
        assert!(place.command(&format!("export m --dtype {dtype} --out {dtype}")).output().unwrap().status.success());
        whole.insert(fs::read(dir.join(dtype)).unwrap(), dtype);
    }
    for _ in 0..20 {
        let both =
            ["f32", "f16"].map(|dtype| start(&place, &format!("export m --dtype {dtype} --out both --overwrite")));
        let codes = both.map(|mut child| child.wait().unwrap().code().unwrap());
        let found = fs::read(dir.join("both")).ok();
        assert!(found.as_ref().is_none_or(|bytes| whole.contains_key(bytes)), "a torn file");
        assert!(found.is_some() == codes.contains(&0), "{codes:?}");
        let _ = fs::remove_file(dir.join("both"));
    }
    assert_eq!(names(dir), ["f16", "f32", "m"]);
}

#[test]
fn what_cannot_be_printed_stops_no_work() {
    let place = place();
    let dir = place.dir();
    let shell = |arguments: &str, redirection: &str| {
        let script = format!("exec {} {arguments} {redirection}", env!("CARGO_BIN_EXE_edm2k"));
        Command::new("bash").args(["-c", &script]).current_dir(dir).output().unwrap()
    };
    for (number, redirection) in ["2>/dev/full", "2>&-", "2> >(true)", ">&- 2>&-"].iter().enumerate() {
        let output = shell(&format!("sample --model m --steps 1 --seeds 0-9 --outdir s{number}"), redirection);
        assert_eq!(output.status.code(), Some(0), "{redirection} {}", said(&output));
        assert_eq!(names(&dir.join(format!("s{number}"))).len(), 11, "{redirection}");
    }
    // What somebody wanted to read and did not get is an error, after the work.
    let output = shell("export m --out e", ">/dev/full");
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("all was done, but the results could not be printed: No space left"));
    assert!(dir.join("e").exists());
    // Somebody who has read enough did get it.
    assert_eq!(shell("info m", "> >(true)").status.code(), Some(0));
    assert_eq!(shell("info m", ">&-").status.code(), Some(0));
}

#[test]
fn names_and_texts_of_files_stay_within_their_line() {
    let place = place();
    let dir = place.dir();
    let told = said(&place.command("info m").output().unwrap());
    assert!(told.contains("source         a\\nedm2k: all is well\\u001b[2J") && !told.contains('\u{1b}'), "{told}");
    let odd = "no\u{1b}[31m\nsuch";
    for long in [odd.to_owned(), format!("{odd}{}", "x".repeat(3000))] {
        let info = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
            said(&command.arg("info").args(arguments).current_dir(dir).output().unwrap())
        };
        let told = info(&[&long]);
        assert!(told.lines().count() == 1 && !told.contains('\u{1b}') && told.chars().count() <= 300, "{told}");
        let told = info(&["--preset", &long, "--size", &long]);
        assert!(told.lines().all(|line| line.chars().count() <= 300) && !told.contains('\u{1b}'), "{told}");
    }
}
