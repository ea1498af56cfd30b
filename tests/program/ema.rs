//! Post-hoc moving averages: the official coefficients, a run's own averages, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::command::{here, refused_in_one_line};
use edm2k::formats::fingerprint::Fingerprint;
use edm2k::formats::safetensors::SafeFile;
use edm2k::model::{Config, Model, ModelMeta, Stored};
use edm2k::train::posthoc::{mismatch, solve_posthoc};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn refused(arguments: &[&str]) -> String {
    refused_in_one_line(here(arguments).assert())
}

fn config(channels: usize) -> Config {
    serde_json::from_value(serde_json::json!({
        "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": channels, "channel_mult": [1],
        "num_blocks": 1, "attn_resolutions": [], "channels_per_head": channels,
    }))
    .unwrap()
}

/// Writes a snapshot with these values in every parameter, repeated.
fn snapshot(path: &Path, config: &Config, meta: impl FnOnce(&mut ModelMeta), value: impl Fn(usize) -> f32) {
    let mut model = Model::init(config, 1).unwrap();
    meta(&mut model.meta);
    for values in &mut model.weights {
        values.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
    }
    model.save(path, Stored::F16).unwrap();
}

fn at(images_seen: u64, std: f64) -> impl Fn(&mut ModelMeta) {
    move |meta| (meta.images_seen, meta.ema_std) = (images_seen, Some(std))
}

#[test]
fn snapshots_are_combined_with_the_official_coefficients() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let cases: Value = serde_json::from_str(&fs::read_to_string(golden.join("phema.json")).unwrap()).unwrap();
    let exact = SafeFile::open(golden.join("phema.safetensors")).unwrap();
    for case in cases["posthoc"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
        let (times, stds, wanted) = (numbers("in_nimg"), numbers("in_std"), numbers("out_std"));
        let dir = tempfile::tempdir().unwrap();
        // Snapshot i has ones at i, i + n, ...: what comes out are the coefficients themselves.
        let n = times.len();
        let config = config(16);
        for (i, (&time, &std)) in times.iter().zip(&stds).enumerate() {
            let path = dir.path().join(format!("snapshot-{i:02}.safetensors"));
            snapshot(&path, &config, at(time as u64, std), |j| if j % n == i { 1.0 } else { 0.0 });
        }
        let asked = wanted.iter().map(f64::to_string).collect::<Vec<_>>().join(",");
        let out = dir.path().join("out");
        here(&["ema", text(dir.path()), "--std", &asked, "--out", text(&out)]).assert().success();

        let x = exact.f64(&format!("{name}.X_exact")).unwrap();
        let last = case["out_nimg"].as_u64().unwrap();
        for (k, std) in wanted.iter().enumerate() {
            let model = Model::load(out.join(format!("ema-{last:09}-{std:.3}.safetensors"))).unwrap();
            assert_eq!((model.meta.images_seen, model.meta.ema_std), (last, Some(*std)));
            for values in model.weights.iter().filter(|values| values.len() >= n) {
                for (j, &got) in values.iter().enumerate() {
                    let want = x[j % n * wanted.len() + k];
                    // f16 rounds by 2^-11 of the value, or by 2^-25 below 2^-14; f32 before it by much less.
                    let bound = 2f64.powi(-11) * want.abs() + 2f64.powi(-24);
                    assert!((f64::from(got) - want).abs() <= bound, "{name}, std {std}, {j}: {got}, expected {want}");
                }
            }
        }
    }
}

/// Trains on the committed emoji with these averages; the run's directory.
fn trained(dir: &Path, name: &str, stds: &str) -> PathBuf {
    let network = dir.join("config.json");
    fs::write(
        &network,
        r#"{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}"#,
    )
    .unwrap();
    let run = dir.join(name);
    here(&["train", "--data", "tests/data/emoji", "--config", text(&network), "--outdir", text(&run)])
        .args(["--ema", stds, "--duration", "640", "--batch", "8", "--snapshot", "64", "--rampup", "80"])
        .args(["--grid", "0", "--validate", "0", "--checkpoint", "0"])
        .assert()
        .success();
    run
}

#[test]
fn a_run_s_own_averages_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    // What is averaged has no influence on training: the second run's 0.07 is what the first would have had.
    let run = trained(dir.path(), "two", "0.05,0.10");
    let more = trained(dir.path(), "three", "0.05,0.07,0.10");
    let out = dir.path().join("out");
    let said = here(&["ema", text(&run), "--std", "0.05,0.07,0.10", "--out", text(&out)]).assert().success();
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    assert!(said.lines().all(|line| line.contains("at 640 images, from 20 snapshots")), "{said}");
    for stored in ["0.050", "0.100"] {
        let (a, b) =
            (format!("ema-000000640-{stored}.safetensors"), format!("snapshot-000000640-{stored}.safetensors"));
        assert!(fs::read(out.join(a)).unwrap() == fs::read(run.join(b)).unwrap(), "{stored}");
    }
    let load = |path: PathBuf| Model::load(path).unwrap().weights.concat();
    let far = |a: &[f32], b: &[f32]| {
        let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        (a.iter().zip(b).map(square).sum::<f64>() / b.iter().map(|x| f64::from(x * x)).sum::<f64>()).sqrt()
    };
    let want = load(more.join("snapshot-000000640-0.070.safetensors"));
    let got = far(&load(out.join("ema-000000640-0.070.safetensors")), &want);
    let nearest = far(&load(run.join("snapshot-000000640-0.050.safetensors")), &want);
    // What is left is the rounding of the snapshots and of both files to f16, 2^-12 of a value at the most each.
    assert!(got < 2f64.powi(-11), "{got:e} off");
    assert!(nearest > 2f64.powi(-9), "{nearest:e}: the snapshots are too much alike to show anything");

    let sample =
        ["sample", "--model", text(&out.join("ema-000000640-0.070.safetensors")), "--outdir"].map(str::to_owned);
    here(&sample.each_ref().map(String::as_str)).arg(dir.path().join("images")).assert().success();

    let early = dir.path().join("early");
    here(&["ema", text(&run), "--std", "0.0625", "--at", "384", "--out", text(&early)]).assert().success();
    let meta = Model::load(early.join("ema-000000384-0.0625.safetensors")).unwrap().meta;
    assert_eq!((meta.images_seen, meta.ema_std), (384, Some(0.0625)));
}

#[test]
fn the_mismatch_is_the_distance_of_the_profiles() {
    // By quadrature, on profiles of unit integral.
    let inputs = [(0.5, 0.1), (1.0, 0.05), (1.0, 0.1)];
    let outputs = [(1.0, 0.03), (1.0, 0.2), (1.0, 0.1)];
    let x = solve_posthoc(&inputs, &outputs).unwrap();
    let steps = 200_000;
    let value = |(t, std): (f64, f64), tau: f64| {
        let gamma = edm2k::train::ema::std_to_exp(std);
        if tau > t { 0.0 } else { (gamma + 1.0) / t * (tau / t).powf(gamma) }
    };
    for (k, got) in mismatch(&inputs, &outputs, &x).into_iter().enumerate() {
        let (mut far, mut norm) = (0.0, 0.0);
        for i in 0..steps {
            let tau = (f64::from(i) + 0.5) / f64::from(steps);
            let p = value(outputs[k], tau);
            let sum: f64 = inputs.iter().enumerate().map(|(j, &input)| x[j * 3 + k] * value(input, tau)).sum();
            far += (sum - p) * (sum - p);
            norm += p * p;
        }
        let want = f64::sqrt(far / norm);
        assert!((got - want).abs() < 1e-6, "{k}: {got}, expected {want}"); // midpoint rule: (gamma / steps)^2 and a jump
    }
}

#[test]
fn what_cannot_be_reconstructed_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let make = |name: &str, channels, time, std| {
        snapshot(&file(name), &config(channels), at(time, std), |_| 1.0);
    };
    make("a", 8, 1000, 0.05);
    make("b", 8, 1000, 0.1);
    make("c", 16, 2000, 0.1);
    make("d", 8, 1000, 0.1);
    make("e", 8, 2000, 0.1 + 1e-9);
    make("f", 8, 2000, 0.1);
    snapshot(
        &file("seeded"),
        &config(8),
        |meta| (meta.images_seen, meta.ema_std, meta.seed) = (7, Some(0.1), None),
        |_| 1.0,
    );
    snapshot(
        &file("optional"),
        &config(8),
        |meta| (meta.images_seen, meta.ema_std, meta.options) = (7, Some(0.1), Some(Fingerprint::of(["another rate"]))),
        |_| 1.0,
    );
    snapshot(
        &file("chosen"),
        &config(8),
        |meta| (meta.images_seen, meta.ema_std, meta.options) = (9, Some(0.1), Some(Fingerprint::of(["a rate"]))),
        |_| 1.0,
    );
    snapshot(&file("raw"), &config(8), |meta| meta.images_seen = 5, |_| 1.0);
    snapshot(&file("timeless"), &config(8), |meta| meta.ema_std = Some(0.1), |_| 1.0);
    snapshot(&file("wide"), &config(8), at(9, 0.5), |_| 1.0);
    fs::write(file("junk"), "junk").unwrap();
    fs::create_dir(file("empty")).unwrap();
    let out = file("out");
    let ema = |names: &[&str], options: &[&str]| {
        let files: Vec<PathBuf> = names.iter().map(|name| file(name)).collect();
        let files: Vec<&str> = files.iter().map(|file| text(file)).collect();
        refused(&[&["ema", "--out", text(&out)], &files[..], options].concat())
    };
    let cases: [(&[&str], &[&str], &str); 19] = [
        (&["a", "b"], &["--std", "0.3"], "--std is 0.3, expected 1e-6 to 0.2887"),
        (&["a", "b"], &["--std", "0"], "--std is 0, expected 1e-6"),
        (&["a", "b"], &["--std", "NaN"], "--std is NaN, expected 1e-6"),
        (&["a", "b"], &["--std", "0.07,0.07"], "--std 0.07 is given twice"),
        (&["a", "b"], &["--std", "0.002"], "no combination of the 2 snapshots comes near std 0.002: "),
        (&["a", "b"], &["--std", "1e-6"], "no combination of the 2 snapshots comes near std 1e-6: "),
        (&["a", "b"], &["--std", "1e-200"], "--std is 1e-200, expected 1e-6 to 0.2887"),
        (&["a", "b"], &["--std", "0.28"], "136 % of its profile are missed, expected at most 50 %"),
        (&["a", "b"], &["--std", "0.07", "--at", "2k"], "no snapshot at 2000 images; the nearest is at 1000"),
        (&["a"], &["--std", "0.07"], "snapshots up to 1000 images: 1, expected 2 or more"),
        (&["a", "f"], &["--std", "0.07", "--at", "1000"], "snapshots up to 1000 images: 1, expected 2 or more"),
        (&["a", "c"], &["--std", "0.07"], "c is not of the same run as "),
        (&["a", "seeded"], &["--std", "0.07"], "they differ in seed"),
        (&["optional", "chosen"], &["--std", "0.07"], "they differ in options"),
        (&["a", "b", "d"], &["--std", "0.07"], "are the same average (std 0.1 at 1000 images)"),
        (&["e", "f"], &["--std", "0.07"], "the 2 snapshots are too much alike to be combined"),
        (&["a", "raw"], &["--std", "0.07"], "raw: no usable ema_std in its metadata"),
        (&["a", "timeless"], &["--std", "0.07"], "timeless: no usable images_seen in its metadata"),
        (&["a", "wide"], &["--std", "0.07"], "wide: no usable ema_std in its metadata"),
    ];
    for (names, options, message) in cases {
        let said = ema(names, options);
        assert!(said.contains(message), "{said}expected {message}");
    }
    assert!(ema(&["a", "c"], &["--std", "0.07"]).contains("they differ in model_channels, channels_per_head"));
    assert!(ema(&["a", "junk"], &["--std", "0.07"]).contains("junk: not a whole safetensors file"));
    assert!(ema(&["a", "nowhere"], &["--std", "0.07"]).contains("nowhere: No such file"));
    assert!(ema(&["empty"], &["--std", "0.07"]).contains("empty: no snapshot-*.safetensors in it"));
    assert!(!out.exists());

    // Weights that f16 cannot hold: nothing is left half written.
    let snapshot_of = |name: &str, std, value: f32| snapshot(&file(name), &config(8), at(1000, std), move |_| value);
    snapshot_of("large", 0.05, 60000.0);
    snapshot_of("small", 0.1, -60000.0);
    assert!(ema(&["large", "small"], &["--std", "0.04"]).contains("expected finite F16 numbers"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    let again = ["ema", text(&file("a")), text(&file("b")), "--std", "0.07", "--out", text(&out)].map(str::to_owned);
    let again = again.each_ref().map(String::as_str);
    here(&again).assert().success();
    assert!(refused(&again).contains("ema-000001000-0.070.safetensors exists; give --overwrite"));
    here(&again).arg("--overwrite").assert().success();
    fs::write(file("taken"), "").unwrap();
    assert!(refused(&["ema", again[1], again[2], "--std", "0.07", "--out", text(&file("taken"))]).contains("taken: "));
}
