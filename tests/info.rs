//! `edm2k info`, what it says of models, datasets and everything else; and `edm2k bench`, which measures a machine.

use std::fs;
use std::path::Path;

use predicates::str::contains;
use serde_json::Value;

#[path = "common/command.rs"]
mod command;
use command::{here, printed, refused_in_one_line};

fn info(arguments: &[&str]) -> assert_cmd::assert::Assert {
    here(&[&["info"], arguments].concat()).assert()
}

fn json(arguments: &[&str]) -> Value {
    let output = info(&[arguments, &["--json"]].concat()).success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// One line on stderr, nothing on stdout, and a failure.
fn refused(path: &Path) -> String {
    let said = refused_in_one_line(info(&[path.to_str().unwrap()]));
    assert!(said.contains(path.to_str().unwrap()), "{said}");
    said
}

#[test]
fn a_model_file_tells_its_size_cost_and_training() {
    info(&["demo/emoji.safetensors"])
        .success()
        .stdout(contains("32 x 32 (width x height), 3 channels"))
        .stdout(contains("condition      1024 values"))
        .stdout(contains("weights        moving average of relative width"))
        .stdout(contains("vocabulary     1024 tags: "))
        .stdout(contains("model_channels"));
    let model = json(&["demo/emoji.safetensors", "--size", "64x32"]);
    assert_eq!((&model["kind"], &model["encoder"]), (&"model".into(), &"rgb".into()));
    assert_eq!(model["vocabulary"].as_array().unwrap().len(), 1024);
    let twice = model["multiply_adds"].as_u64().unwrap() as f64;
    let once = json(&["demo/emoji.safetensors"])["multiply_adds"].as_u64().unwrap() as f64;
    // Attention costs the square of the pixels, the rest their number.
    assert!((2.0..2.2).contains(&(twice / once)), "{once} at 32x32, {twice} at 64x32");
}

#[test]
fn presets_have_the_paper_s_sizes() {
    // 124.7 M parameters: table 2 of the paper.
    assert_eq!(json(&["--preset", "1girl-xs"])["parameters"].as_u64().unwrap() / 100_000, 1247);
    info(&["--preset", "edm2"]).code(1).stderr(contains("preset 'edm2' is unknown, expected one of edm2-img512-xxs"));
    info(&["--preset", "1girl-xs", "--size", "65x88"]).code(1).stderr(contains("65x88"));
}

#[test]
fn a_dataset_and_a_shard_tell_what_is_in_them() {
    info(&["tests/data/emoji"])
        .success()
        .stdout(contains("images         32 x 32 (width x height), 3 channels"))
        .stdout(contains("condition      64 values"))
        .stdout(contains("licence        images Apache-2.0"))
        .stdout(contains("vocabulary     64 tags: "));
    let dataset = json(&["tests/data/emoji"]);
    assert_eq!((&dataset["kind"], &dataset["parts"][1]["name"]), (&"dataset".into(), &"validation".into()));
    let shard = json(&["tests/data/emoji/train-00000.safetensors"]);
    assert_eq!(shard["kind"], "shard");
    assert_eq!(shard["parts"][0]["images"], dataset["parts"][0]["images"]);
}

#[test]
fn what_is_neither_or_not_whole_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let model = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/emoji.safetensors")).unwrap();
    let said = refused(&file("cut.safetensors", &model[..model.len() / 2]));
    assert!(said.contains("do not lie in the file's") && said.contains("(truncated?)"), "{said}");
    let said = refused(&file("header.safetensors", &model[..100]));
    assert!(said.contains("it claims a header of"), "{said}");
    let mut nan = model.clone();
    let end = nan.len();
    nan[end - 2..].copy_from_slice(&0x7e00u16.to_le_bytes());
    let said = refused(&file("nan.safetensors", &nan));
    assert!(said.contains("found NaN") && said.contains("expected finite F16 numbers"), "{said}");

    let said = refused(&file("picture.png", b"\x89PNG\r\n\x1a\n, or so"));
    assert!(said.contains("not a whole safetensors file"), "{said}");
    assert!(refused(&file("empty", b"")).contains("0 bytes, expected a header of 8 at least"));
    let tensors = [("x", edm2k::formats::safetensors::Dtype::U8, &[1][..], &[1][..])];
    let other = dir.path().join("other.safetensors");
    edm2k::formats::safetensors::write(&other, &tensors, &Default::default()).unwrap();
    assert!(refused(&other).contains("metadata \"config\": it is missing, so this is not a model file"));
    assert!(refused(&dir.path().join("nowhere")).contains("No such file"));
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    assert!(refused(&folder).contains("vocabulary.json: No such file"));
}

#[test]
fn bench_measures_time_and_memory() {
    let table = printed(here(&["bench", "--device", "cpu", "--size", "8x8", "--repeats", "1"]).assert());
    for what in ["forward, batch 1", "forward, batch 2", "SD-VAE decode, one image", "training step, batch 1"] {
        let row = table.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("{what}: {table}"));
        assert!(row.contains(" images/s "), "{row}");
        // Linux tells the peak of a process.
        assert!(row.ends_with(" MiB") || !cfg!(target_os = "linux"), "{row}");
    }
}

#[test]
fn sizes_that_no_image_has_are_one_line() {
    use edm2k::formats::safetensors::{self, SafeFile};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let file = SafeFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/emoji.safetensors")).unwrap();
    let tensors: Vec<safetensors::TensorOut> = file
        .names()
        .map(|name| (name, file.dtype(name).unwrap(), file.shape(name).unwrap(), file.bytes(name).unwrap()))
        .collect();
    for [height, width] in [[1u64 << 60, 32], [(1 << 63) + 8, 8], [1 << 40, 1 << 40], [65544, 8], [0, 8]] {
        let mut metadata = file.metadata().clone();
        let mut about: Value = serde_json::from_str(&metadata["edm2k"]).unwrap();
        (about["height"], about["width"]) = (Value::from(height), Value::from(width));
        metadata.insert("edm2k".into(), about.to_string());
        safetensors::write(&path, &tensors, &metadata).unwrap();
        assert!(refused(&path).contains("an image of "), "{height}x{width}");
    }
    // The largest there is: told, not planned.
    let large = json(&["demo/emoji.safetensors", "--size", "65536x65536"]);
    assert!(large["multiply_adds"].as_u64().unwrap() > 1 << 50);
    assert!(large["on_a_gpu"]["Err"].as_str().unwrap().contains("more elements than the kernels count"), "{large}");
}

#[cfg(unix)]
#[test]
fn files_of_another_kind_are_called_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let zip = b"PK\x03\x04\x14\0\0\0archive/data.pkl";
    for (name, bytes, expected) in [
        ("m.ckpt", &zip[..], "it is a PyTorch checkpoint"),
        ("m.pkl", b"\x80\x02}q\0.........", "it is a Python pickle (.pkl, .pt, .ckpt); `edm2k import`"),
        ("m.npz", b"PK\x03\x04\x14\0\0\0arr_0.npy", "it is a NumPy archive (.npz)"),
        ("m.html", b"<!doctype html><title>Sign in</title>", "it is a web page (HTML)"),
        ("m.lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git LFS pointer"),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", "it is an ONNX file"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let said = refused(&path);
        assert!(said.contains(expected) && said.len() < 350, "{said}");
    }
    // Nor does a pipe hang, or a device fill the memory.
    let pipe = dir.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: a path that ends in a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    assert!(refused(&pipe).contains("it is a pipe, not a regular file"));
    assert!(refused(Path::new("/dev/zero")).contains("it is a device, not a regular file"));
}
