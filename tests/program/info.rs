//! `edm2k info`, what it says of models, datasets and everything else; and `edm2k bench`, which measures a machine.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::autoencoder;
use crate::common::command::{here, printed, refused_in_one_line};
#[cfg(feature = "onnx")]
use crate::common::onnx;
use edm2k::formats::safetensors::SafeFile;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::Value;

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
fn a_picture_tells_what_it_was_made_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let picture = out.join("000007.png").display().to_string();
    let sample = ["sample", "--model", "demo/emoji.safetensors", "--tags", "cat", "--seeds", "7", "--steps", "1"];
    here(&[&sample[..], &["--device", "cpu", "--outdir", out.to_str().unwrap()]].concat()).assert().success();
    info(&[&picture])
        .success()
        .stdout(contains("model          emoji.safetensors"))
        .stdout(contains("seed           7"))
        .stdout(contains("  tags                 cat"))
        .stdout(contains("  guidance             5.0"));
    let shown = json(&[&picture]);
    assert_eq!((&shown["kind"], &shown["parameters"]["condition"]["tags"]), (&"picture".into(), &"cat".into()));
    let other = dir.path().join("other.png");
    image::RgbImage::new(2, 2).save(&other).unwrap();
    assert!(refused(&other).contains("a PNG that says nothing of edm2k"));
    assert!(refused(&out).ends_with("; expected one, a run's directory, or a file\n"));
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
    assert!(said.contains("not a readable PNG"), "{said}");
    assert!(refused(&file("empty", b"")).contains("it is empty"));
    let tensors = [("x", edm2k::formats::safetensors::Dtype::U8, &[1][..], &[1][..])];
    let other = dir.path().join("other.safetensors");
    edm2k::formats::safetensors::write(&other, &tensors, &Default::default()).unwrap();
    assert!(refused(&other).contains("metadata \"config\": it is missing, so this is not a model file"));
    assert!(refused(&dir.path().join("nowhere")).contains("No such file"));
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    assert!(
        refused(&folder).contains("folder: no dataset of edm2k (there is no vocabulary.json in it); expected one, ")
    );
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
    let large = here(&["bench", "--device", "cpu", "--size", "65536x65536"]).assert().failure();
    let said = String::from_utf8_lossy(&large.get_output().stderr).into_owned();
    assert!(said.contains("error: a batch of 2 images of 65536x65536 needs "), "{said}");
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
        ("m.ckpt", &zip[..], "not a file of weights: a damaged zip"),
        ("m.pkl", b"\x80\x02}q\0.........", "`edm2k import` reads NVIDIA's snapshots"),
        ("m.npz", b"PK\x03\x04\x14\0\0\0arr_0.npy", "not a file of weights"),
        ("m.json", b"{\"a\":1}", "it is text in JSON"),
        ("m.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0", "it is a video (MP4 or QuickTime)"),
        ("m.avif", b"\0\0\0\x1cftypavif\0\0\0\0", "it is an image (AVIF)"),
        ("m.html", b"<!doctype html><title>Sign in</title>", "it is a web page (HTML)"),
        ("m.lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git LFS pointer"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let said = refused(&path);
        assert!(said.contains(expected) && said.len() < 350, "{said}");
    }
    // A help that nobody gets is a failure.
    for asked in ["--help", "--version"] {
        let full = fs::File::options().write(true).open("/dev/full");
        let Ok(full) = full else { continue };
        let status = std::process::Command::new(env!("CARGO_BIN_EXE_edm2k")).arg(asked).stdout(full).status().unwrap();
        assert_eq!(status.code(), Some(1), "{asked}");
    }
    // Nor does a pipe hang, or a device fill the memory.
    let pipe = dir.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: a path that ends in a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    assert!(refused(&pipe).contains("it is a pipe, not a regular file"));
    assert!(refused(Path::new("/dev/zero")).contains("it is a device, not a regular file"));
}

// ---- runs, and the networks beside the U-Net ------------------------------------------------

/// A run of two steps on the committed emoji, in a directory.
fn run(dir: &Path) -> PathBuf {
    let (config, out) = (dir.join("config.json"), dir.join("run"));
    let json = r#"{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}"#;
    fs::write(&config, json).unwrap();
    let options = "--duration 16 --batch 8 --ema 0.05,0.10 --snapshot 16 --checkpoint 8 --grid 0 --device cpu";
    let mut arguments = vec!["train", "--data", "tests/data/emoji"];
    arguments.extend(["--config", config.to_str().unwrap(), "--outdir", out.to_str().unwrap()]);
    arguments.extend(options.split(' '));
    here(&arguments).assert().success();
    out
}

fn export(arguments: &[&str], out: &Path) -> assert_cmd::assert::Assert {
    here(&[&["export", "--out", out.to_str().unwrap()], arguments].concat()).assert()
}

#[test]
fn a_checkpoint_becomes_the_snapshot_that_its_run_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path());
    let checkpoint = run.join("checkpoint-000000016.safetensors");
    let (shown, out) = (checkpoint.to_str().unwrap(), dir.path().join("m.safetensors"));
    let from = ["--from-checkpoint", shown];
    let made = |more: &[&str]| {
        export(&[&from, more].concat(), &out).success();
        let bytes = fs::read(&out).unwrap();
        fs::remove_file(&out).unwrap();
        bytes
    };
    let snapshot = |std: &str| fs::read(run.join(format!("snapshot-000000016-{std}.safetensors"))).unwrap();
    assert!(made(&[]) == snapshot("0.050"), "the first average");
    assert!(made(&["--ema", "0.10"]) == snapshot("0.100"), "the second average");

    export(&[&from[..], &["--ema", "none", "--dtype", "f32"]].concat(), &out).success();
    let (model, whole) = (SafeFile::open(&out).unwrap(), SafeFile::open(&checkpoint).unwrap());
    assert!(!model.metadata()["edm2k"].contains("ema_std"), "{:?}", model.metadata());
    for name in model.names() {
        assert_eq!(model.bytes(name).unwrap(), whole.bytes(&format!("weight.{name}")).unwrap(), "{name}");
    }
    fs::remove_file(&out).unwrap();

    let said = refused_in_one_line(info(&[run.join("stats.jsonl").to_str().unwrap()]));
    assert!(said.contains("stats.jsonl: the statistics of a run; give the run's directory"), "{said}");

    let refused = |arguments: &[&str], expected: &str| {
        let said = refused_in_one_line(export(arguments, &out));
        assert!(said.contains(expected) && !out.exists(), "{said}; expected {expected}");
    };
    refused(&[&from[..], &["--ema", "0.2"]].concat(), "--ema 0.2: the averages in ");
    refused(&["--from-checkpoint", "demo/emoji.safetensors"], "emoji.safetensors: no checkpoint of a run");
    refused(&["demo/emoji.safetensors", "--ema", "0.1"], "--ema says which average of a checkpoint to take");
    refused(
        &[shown],
        "a checkpoint of a run, expected a model of images; `edm2k export --from-checkpoint` makes a model of it",
    );
    let mut bytes = fs::read(&checkpoint).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&checkpoint, bytes).unwrap();
    refused(&from, "damaged: checksum of tensor ");
}

#[test]
fn runs_and_checkpoints_tell_how_far_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path());
    let shown = run.to_str().unwrap();
    info(&[shown])
        .success()
        .stdout(contains("trained on     16 of 16 images, 2 steps of 8"))
        .stdout(contains("averages       0.05, 0.1\n"))
        .stdout(contains("checkpoints    2, the newest checkpoint-000000016.safetensors"))
        .stdout(contains("snapshots      2, the newest snapshot-000000016-0.100.safetensors"));
    let about = json(&[shown]);
    let lines = fs::read_to_string(run.join("stats.jsonl")).unwrap();
    let loss =
        lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).next_back();
    assert_eq!((about["kind"].as_str(), about["latest"]["loss"].as_f64()), (Some("run"), loss));

    info(&[shown, "--size", "8x8"]).failure().stderr(contains("--size goes with a model or a --preset"));
    // What was no number in the newest line is not known by an older one.
    let stats = run.join("stats.jsonl");
    fs::write(&stats, format!("{lines}{{\"nimg\":16,\"loss\":\"x\"}}\nnonsense\n")).unwrap();
    info(&[shown])
        .success()
        .stdout(contains("damaged        stats.jsonl: 1 line is no statistics"))
        .stdout(contains("\nloss ").not());
    fs::write(&stats, &lines).unwrap();

    let newest = run.join("checkpoint-000000016.safetensors");
    let name = newest.to_str().unwrap();
    info(&[name]).success().stdout(contains("computed on    the CPU")).stdout(contains("model_channels"));
    info(&["--check", name]).success().stdout(contains("checked        all tensors are whole"));
    let about = json(&[name]);
    assert_eq!((about["kind"].as_str(), about["state"]["nimg"].as_u64()), (Some("checkpoint"), Some(16)));
    info(&["--check", shown]).success().stdout(contains("checked        all checkpoints are whole"));

    // A flipped bit is found by who reads all of it.
    let good = fs::read(&newest).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&newest, &bad).unwrap();
    assert!(refused_in_one_line(info(&["--check", name])).contains("damaged: checksum of tensor "));
    let checked = info(&["--check", shown]).code(1).stdout(contains("damaged: checksum of tensor "));
    checked.stderr(contains("1 of 2 checkpoints are damaged"));
    // One in the metadata by everybody; the run has an older checkpoint.
    let at = good.windows(8).position(|bytes| bytes == br#"\"nimg\""#).unwrap();
    let mut bad = good.clone();
    bad[at + 2] = b'N';
    fs::write(&newest, &bad).unwrap();
    assert!(refused(&newest).contains("damaged: checksum of the metadata"));
    info(&[shown])
        .success()
        .stdout(contains("trained on     8 of 16 images"))
        .stdout(contains("damaged        ").and(contains("checkpoint-000000016.safetensors: damaged: ")));
    fs::write(&newest, &good[..good.len() / 2]).unwrap();
    assert!(refused(&newest).contains("(truncated?)"));
}

#[test]
fn a_condition_model_tells_what_it_invents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.safetensors");
    let name = path.to_str().unwrap();
    here(&["condition", "train", "--data", "tests/data/emoji", "--out", name, "--epochs", "1"]).assert().success();
    info(&[name])
        .success()
        .stdout(contains("a model that invents conditions"))
        .stdout(contains("conditions are tags"))
        .stdout(contains("vocabulary     64 tags: "));
    let about = json(&[name]);
    // (D + V) 2Z + 2Z, (Z + V) H + H and H D + D, of D = V = 64, Z = 32, H = 256.
    let parameters = 128 * 64 + 64 + 96 * 256 + 256 + 256 * 64 + 64;
    assert_eq!((about["kind"].as_str(), about["parameters"].as_u64()), (Some("condition model"), Some(parameters)));
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let at = good.windows(10).position(|bytes| bytes == br#"\"latent\""#).unwrap();
    bad[at + 2] = b'L';
    fs::write(&path, bad).unwrap();
    assert!(refused(&path).contains("metadata \"condition_model\": unknown field `Latent`"));
}

#[test]
fn an_autoencoder_tells_which_it_is_and_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vae.safetensors");
    let whole = autoencoder::sd_vae(&[32, 64], 1);
    autoencoder::write(&path, &whole);
    info(&[path.to_str().unwrap()])
        .success()
        .stdout(contains("an autoencoder: the SD-VAE, encoder and decoder"))
        .stdout(contains("factor         2 pixels for a latent"))
        .stdout(contains("channels       32, 64"));
    let mut half = autoencoder::taesd(8);
    let about = |file: &autoencoder::File| {
        autoencoder::write(&path, file);
        json(&[path.to_str().unwrap()])
    };
    let made_by = about(&half)["fingerprint"].clone();
    half.retain(|name, _| name.starts_with("decoder"));
    let decoder = half.iter().map(|(name, value)| {
        let (number, rest) = name.strip_prefix("decoder.layers.").unwrap().split_once('.').unwrap();
        (format!("{}.{rest}", number.parse::<usize>().unwrap() + 1), value.clone())
    });
    let decoder = about(&decoder.collect());
    assert!(made_by.is_string() && decoder["fingerprint"].is_null(), "{made_by} {decoder}");
    assert_eq!((&decoder["encoder"], &decoder["decoder"]), (&Value::from(false), &Value::from(true)));
    let mut lacking = whole;
    lacking.remove("encoder.conv_out.bias");
    autoencoder::write(&path, &lacking);
    assert!(refused(&path).contains("encoder.conv_out.bias"));
}

#[cfg(feature = "onnx")]
#[test]
fn an_onnx_file_tells_what_goes_in_and_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tagger.onnx");
    let good = onnx::Tagger::new(9, 6).file();
    fs::write(&path, &good).unwrap();
    info(&[path.to_str().unwrap()])
        .success()
        .stdout(contains(": float [batch, 9, 9, 3]"))
        .stdout(contains("output: float ["))
        .stdout(contains(format!("features       {}", onnx::POOLED)));
    let about = json(&[path.to_str().unwrap()]);
    assert_eq!((&about["kind"], &about["inputs"][0]["shape"][3]), (&"onnx".into(), &"3".into()));
    assert_eq!(about["unsupported"], Value::Array(vec![]));
    for bytes in [&good[..good.len() / 2], b"\x08\x08\x12\x07pytorch"] {
        fs::write(&path, bytes).unwrap();
        let said = refused(&path);
        assert!(said.contains("ONNX"), "{said}");
    }
    fs::write(&path, b"\x89PNG\r\n\x1a\n").unwrap();
    assert!(refused(&path).contains("not an ONNX file: it is an image (PNG)"));
}

#[cfg(not(feature = "onnx"))]
#[test]
fn an_onnx_file_is_refused_by_a_build_without_onnx() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tagger.onnx");
    fs::write(&path, b"\x08\x08\x12\x07pytorch").unwrap();
    assert!(refused(&path).contains("built without ONNX"));
}

/// What is wider is wrapped, and then a line that was copied is no command.
#[test]
fn no_example_of_a_help_is_wider_than_a_terminal() {
    let help = |of: &[&str]| printed(here(&[of, &["--help"]].concat()).assert());
    let names = |help: &str| -> Vec<String> {
        let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let names = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        names
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .map(String::from)
            .collect()
    };
    let mut helps = Vec::new();
    for name in names(&help(&[])) {
        let text = help(&[&name]);
        helps.extend(names(&text).iter().map(|inner| help(&[&name, inner])));
        helps.push(text);
    }
    assert!(helps.len() > 12, "{}", helps.len());
    let mut seen = 0;
    for text in &helps {
        let examples = text.lines().skip_while(|line| *line != "Examples:").skip(1).take_while(|line| !line.is_empty());
        let mut goes_on = false;
        for line in examples {
            let begins = ["  edm2k ", "  torchrun ", "  EDM2K_TOKEN="].iter().any(|start| line.starts_with(start));
            assert!(line.chars().count() <= 98 && begins != goes_on, "{line}");
            goes_on = line.ends_with('\\');
            seen += 1;
        }
        assert!(!goes_on);
    }
    assert!(seen > 40, "{seen} lines");
}
