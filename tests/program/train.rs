//! Training: the tables of the official code, and what must survive a kill, a full disk or bad input.
#![cfg(unix)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::autoencoder;
use crate::common::place::{self, assert_same_tensors, signal, stats, succeed, text};
use edm2k::Device;
use edm2k::backend::cpu::Cpu;
use edm2k::collective::Alone;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::model::{Config, Model, Stored};
use edm2k::pictures::png::read_text;
use edm2k::rng::{Purpose, Stream};
use edm2k::sample::SamplerConfig;
use edm2k::train::batch::HostBatch;
use edm2k::train::order::Order;
use edm2k::train::{
    DataIdentity, Event, Execution, LearningRate, Outcome, Schedule, Settings, Splits, TrainError, Training, ema, train,
};
use half::f16;
use serde_json::{Value, json};

const CONFIG: &str = r#"{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 8}"#;
const SIZE: usize = 8;
const DIM: usize = 6;

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

// ---- a dataset and the command line ---------------------------------------------------------

/// A directory with a dataset of noise, every second image mirrorable, and a config.
enum Here {}
type Place = place::Place<Here>;

impl Place {
    fn new() -> Self {
        let place = Self::empty();
        let data = place.path("data");
        fs::create_dir(&data).unwrap();
        let tags: Vec<_> = (0..DIM).map(|i| json!({"tag": format!("t{i}"), "count": 1})).collect();
        fs::write(data.join("vocabulary.json"), serde_json::to_string(&tags).unwrap()).unwrap();
        for (split, first, n) in [(Split::Train, 0, 37), (Split::Validation, 1000, 5)] {
            write_shard(&data.join(split.shard_name(0)), first, n, false);
        }
        fs::write(place.path("config.json"), CONFIG).unwrap();
        place
    }

    /// `edm2k train` on the dataset into `out`; later options are added to the basic ones.
    fn train(&self, out: &str, options: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
        command.args(["train", "--data"]).arg(self.path("data")).arg("--outdir").arg(self.path(out));
        if !options.contains("--init") && !options.contains("--preset") {
            command.arg("--config").arg(self.path("config.json"));
        }
        command.args(options.split_whitespace());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

fn write_shard(path: &Path, first: i64, n: usize, latents: bool) {
    let random = |purpose, i: usize, len: usize| {
        let mut x = vec![0.0; len];
        Stream::new(99, purpose, first as u64 + i as u64).normals(&mut x);
        x
    };
    let channels = if latents { 4 } else { 3 };
    let planes = if latents { 8 } else { 3 };
    let (mut images, mut conditions, mut ids, mut flips) = (vec![], vec![], vec![], vec![]);
    for i in 0..n {
        let noise = random(Purpose::TrainNoise, i, channels * SIZE * SIZE);
        match latents {
            true => {
                // The standard deviations: a quarter.
                let all = noise.iter().copied().chain(std::iter::repeat_n(0.25, noise.len()));
                images.extend(all.flat_map(|x| f16::from_f32(x).to_le_bytes()));
            }
            false => images.extend(noise.iter().map(|x| (x * 64.0 + 128.0) as u8)),
        }
        let hot = |c: usize| f16::from_f32(if c == i % DIM { 1.0 } else { 0.0 });
        conditions.extend((0..DIM).flat_map(|c| hot(c).to_le_bytes()));
        ids.extend((first + i as i64).to_le_bytes());
        flips.push((i % 2) as u8);
    }
    let offsets: Vec<u8> = (0..=n as i64).flat_map(|i| i.to_le_bytes()).collect();
    let indices: Vec<u8> = (0..n).flat_map(|i| ((i % DIM) as i32).to_le_bytes()).collect();
    let (kind, dtype) = if latents { ("latents", Dtype::F16) } else { ("images", Dtype::U8) };
    let header = json!({
        "kind": kind, "height": SIZE, "width": SIZE, "channels": channels, "condition_dim": DIM,
        "count": n, "shards": 1, "source": "noise", "licence": "none",
    });
    let tensors: [safetensors::TensorOut; 6] = [
        (kind, dtype, &[n, planes, SIZE, SIZE], &images),
        ("conditions", Dtype::F16, &[n, DIM], &conditions),
        ("ids", Dtype::I64, &[n], &ids),
        ("flips", Dtype::U8, &[n], &flips),
        ("tag_offsets", Dtype::I64, &[n + 1], &offsets),
        ("tag_indices", Dtype::I32, &[n], &indices),
    ];
    safetensors::write(path, &tensors, &[("dataset".to_owned(), header.to_string())].into()).unwrap();
}

/// Checkpoints in a directory, oldest first.
fn checkpoints(dir: &Path) -> Vec<PathBuf> {
    let mut found = edm2k::train::checkpoint::list(dir).unwrap_or_default();
    found.reverse();
    found
}

/// Files that somebody did not finish.
fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|ending| ending == "tmp")).collect()
}

/// Runs into an error; what it said.
fn fail(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{command:?}\n{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn state(checkpoint: &Path) -> Value {
    serde_json::from_str(&SafeFile::open(checkpoint).unwrap().metadata()["train"]).unwrap()
}

/// Every tensor, and every counter but the time, are the same to the bit.
fn assert_same(a: &Path, b: &Path) {
    assert_same_tensors(a, b);
    let (sa, sb) = (state(a), state(b));
    for key in ["nimg", "step", "sums", "settings"] {
        assert_eq!(sa[key], sb[key], "{key}");
    }
}

/// What the statistics say, without what depends on the machine's speed.
fn lasting(dir: &Path) -> Vec<Value> {
    let mut lines = stats(dir);
    for line in &mut lines {
        for key in ["images_per_s", "seconds", "peak_mib"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

// ---- against the official code --------------------------------------------------------------

#[test]
fn learning_rates_are_the_official_ones() {
    for case in golden("lr_schedule.json").as_array().unwrap() {
        let f = |key: &str| case[key].as_f64().unwrap();
        let schedule = LearningRate {
            schedule: Schedule::Edm2,
            reference: f("ref_lr"),
            decay: f("ref_batches"),
            rampup: f("rampup_Mimg") * 1e6,
            batch: f("batch_size"),
            duration: 1.0,
        };
        let (found, expected) = (schedule.at(case["cur_nimg"].as_u64().unwrap()), f("lr"));
        // A few roundings in f64.
        assert!((found - expected).abs() <= 1e-15 * expected.abs() * 4.0, "{case}: {found}");
    }
    let linear = LearningRate {
        schedule: Schedule::Linear,
        reference: 0.012,
        decay: 0.0,
        rampup: 0.0,
        batch: 2000.0,
        duration: 11e6,
    };
    assert_eq!((linear.at(0), linear.at(5_500_000), linear.at(11_000_000)), (0.012, 0.006, 0.0));
}

#[test]
fn moving_averages_decay_as_the_official_ones() {
    let table = golden("phema.json");
    for case in table["std_to_exp"].as_array().unwrap() {
        let (std, expected) = (case["std"].as_f64().unwrap(), case["exp"].as_f64().unwrap());
        let found = ema::std_to_exp(std);
        // The reference's roots are eigenvalues, good to about 1e-12.
        assert!((found - expected).abs() <= 1e-11 * (1.0 + expected), "std {std}: {found}, expected {expected}");
    }
    assert!(ema::std_to_exp(ema::MAX_STD).abs() < 1e-12);
    for case in table["power_function_beta"].as_array().unwrap() {
        let n = |key: &str| case[key].as_u64().unwrap();
        let found = ema::power_function_beta(case["std"].as_f64().unwrap(), n("t_next"), n("t_delta"));
        let expected = case["beta"].as_f64().unwrap();
        // The exponent's error, times ln(beta): up to 1e2 times larger.
        assert!((found - expected).abs() <= 1e-10 * expected, "{case}: {found}");
    }
}

// ---- batches --------------------------------------------------------------------------------

fn settings(data: &Dataset) -> Settings {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    for (key, value) in [("img_resolution", SIZE), ("img_channels", 3), ("label_dim", DIM)] {
        config[key] = value.into();
    }
    Settings {
        config: serde_json::from_value(config).unwrap(),
        data: DataIdentity::of(data),
        init: None,
        seed: 5,
        duration: 1,
        batch: 8,
        lr: 0.01,
        schedule: Schedule::Edm2,
        decay: 0.0,
        rampup: 0,
        p_mean: -0.4,
        p_std: 1.5,
        ema: vec![0.05],
        cond_dropout: 0.25,
        cond_dropout_from: 1000,
        flip: true,
        dropout: 0.0,
    }
}

/// The images of these numbers at once.
fn batch(data: &Dataset, s: &Settings, numbers: Range<u64>) -> HostBatch {
    let shown = Order::new(data, s).micro_batches(numbers, u64::MAX);
    HostBatch::of(data, s, &shown[0]).unwrap()
}

#[test]
fn batches_do_not_depend_on_how_they_are_cut() {
    let place = Place::new();
    for latents in [false, true] {
        write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 37, latents);
        let data = place.open("data", Split::Train);
        let s = settings(&data);
        // 30..50 crosses the end of an epoch of 37.
        let whole = batch(&data, &s, 30..50);
        let mut cut = Order::new(&data, &s);
        cut.micro_batches(900..901, 1);
        let parts = [30..33, 33..49, 49..50]
            .map(|numbers| HostBatch::of(&data, &s, &cut.micro_batches(numbers, 20)[0]).unwrap());
        assert_eq!(whole.clean, parts.iter().flat_map(|p| p.clean.clone()).collect::<Vec<_>>());
        assert_eq!(whole.noisy, parts.iter().flat_map(|p| p.noisy.clone()).collect::<Vec<_>>());
        assert_eq!(whole.sigma, parts.iter().flat_map(|p| p.sigma.clone()).collect::<Vec<_>>());
        assert_eq!(whole.labels, Some(parts.iter().flat_map(|p| p.labels.clone().unwrap()).collect::<Vec<_>>()));
    }
}

#[test]
fn each_time_training_draws_another_latent_of_an_image() {
    let place = Place::new();
    write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 1, true);
    let data = place.open("data", Split::Train);
    let s = Settings { flip: false, ..settings(&data) };
    let numel = 4 * SIZE * SIZE;
    let n = 200;
    let drawn = batch(&data, &s, 0..n as u64).clean;
    let other = batch(&data, &Settings { seed: 6, ..s }, 0..1).clean;
    assert_ne!(other, drawn[..numel], "another seed, another latent");
    let (mut sum, mut squares) = (0.0, 0.0);
    let mut mean = vec![0.0; numel];
    Stream::new(99, Purpose::TrainNoise, 0).normals(&mut mean);
    for (at, x) in drawn.iter().enumerate() {
        // Drawn are [H, W, C], stored [C, H, W].
        let (place, channel) = (at % numel / 4, at % 4);
        let away = f64::from(x - f16::from_f32(mean[channel * SIZE * SIZE + place]).to_f32());
        sum += away;
        squares += away * away;
    }
    let count = (n * numel) as f64;
    // Five standard errors of mean and variance.
    assert!((sum / count).abs() < 5.0 * 0.25 / count.sqrt(), "mean {}", sum / count);
    let variance = squares / count / 0.0625;
    assert!((variance - 1.0).abs() < 5.0 * (2.0 / count).sqrt(), "variance {variance} of that stored");
}

#[test]
fn noise_dropout_and_mirroring_happen_as_often_as_asked() {
    let place = Place::new();
    let data = place.open("data", Split::Train);
    let s = settings(&data);
    let n = 37 * 100;
    let batch = batch(&data, &s, 0..n as u64);
    let numel = 3 * SIZE * SIZE;
    let originals: Vec<Vec<f32>> = (0..data.len())
        .map(|i| {
            let mut image = vec![0.0; numel];
            data.image(i, Stream::new(0, Purpose::Latent, 0), &mut image).unwrap();
            image
        })
        .collect();
    let (mut mirrored, mut dropped, mut noise, mut ln_sigma) = (0, 0, vec![], vec![]);
    for k in 0..n {
        let clean = &batch.clean[k * numel..][..numel];
        if let Some(i) = originals.iter().position(|image| image == clean) {
            let row = &batch.labels.as_ref().unwrap()[k * DIM..][..DIM];
            let hot = row.iter().position(|&x| x == 1.0);
            assert!(hot.is_none() || hot == Some(i % DIM), "the label is another image's");
        } else {
            mirrored += 1;
        }
        let zero = batch.labels.as_ref().unwrap()[k * DIM..][..DIM].iter().all(|&x| x == 0.0);
        assert!(!zero || k >= 1000, "image {k} lost its condition too early");
        dropped += usize::from(zero);
        let sigma = f64::from(batch.sigma[k]);
        ln_sigma.push(sigma.ln());
        noise.extend(clean.iter().zip(&batch.noisy[k * numel..]).map(|(c, x)| f64::from(x - c) / sigma));
    }
    // Five standard deviations of each count and mean.
    let near = |what: &str, found: f64, expected: f64, sd: f64| {
        assert!((found - expected).abs() < 5.0 * sd, "{what}: {found}, expected {expected} +- {sd}");
    };
    let allowed = 18.0 * 100.0; // odd images of 37
    near("mirrored", mirrored as f64, allowed / 2.0, (allowed / 4.0).sqrt());
    let late = (n - 1000) as f64;
    near("dropped", dropped as f64, late * 0.25, (late * 0.25 * 0.75).sqrt());
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let square = |x: &[f64], m: f64| x.iter().map(|x| (x - m) * (x - m)).sum::<f64>() / x.len() as f64;
    near("mean of ln sigma", mean(&ln_sigma), -0.4, 1.5 / (n as f64).sqrt());
    near("variance of ln sigma", square(&ln_sigma, -0.4), 2.25, 2.25 * (2.0 / n as f64).sqrt());
    // Recovering the noise cancels up to 1 / sigma of it; the smallest sigma here is about 0.003.
    near("variance of the noise", square(&noise, 0.0), 1.0, (2.0 / noise.len() as f64).sqrt() + 1e-3);
}

// ---- runs -----------------------------------------------------------------------------------

#[test]
fn the_loss_falls_on_real_images() {
    let place = Place::new();
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.args(["train", "--data"]).arg(emoji).arg("--outdir").arg(place.path("run"));
    command.arg("--config").arg(place.path("config.json"));
    let options = "--duration 512 --batch 16 --rampup 0 --lr 0.02 --status 32 --validate 128 --grid 512 --flip";
    succeed(command.args(options.split_whitespace()));
    let lines = stats(&place.path("run"));
    let losses: Vec<f64> = lines.iter().filter_map(|line| line["loss"].as_f64()).collect();
    let validation: Vec<f64> = lines.iter().filter_map(|line| line["validation_loss"].as_f64()).collect();
    // An untrained network has a loss of about 2; the noise of 32 images is far below the fall.
    assert!(losses[15] < 0.75 * losses[0], "{losses:?}");
    assert!(validation[3] < 0.9 * validation[0], "{validation:?}");
    assert!(fs::read_to_string(place.path("run/loss.svg")).unwrap().contains("</svg>"));
    let model = Model::load(place.path("run/snapshot-000000512-0.050.safetensors")).unwrap();
    assert_eq!((model.meta.images_seen, model.meta.vocabulary.len()), (512, 64));
    assert!(place.path("run/grid-000000512.png").exists());
}

const SHORT: &str = "--duration 600 --batch 8 --rampup 40 --status 24 --validate 104 --snapshot 200 --checkpoint 48 \
                     --grid 0 --cond-dropout 0.1 --flip --keep 100 --seed 3";

/// Kills the process when `done` says so or it ends by itself; whether it had ended.
fn kill_when(mut child: Child, mut done: impl FnMut() -> bool) -> bool {
    let give_up = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{}", text(&child.wait_with_output().unwrap()));
            return true;
        }
        assert!(Instant::now() < give_up, "it does not end");
        if done() {
            child.kill().unwrap(); // SIGKILL
            child.wait().unwrap();
            return false;
        }
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_run_killed_at_random_moments_ends_as_one_that_was_not() {
    let place = Place::new();
    succeed(&mut place.train("whole", SHORT));
    let mut kills = 0;
    let mut lives = 0;
    loop {
        // Each life reaches the next checkpoint and dies at a random moment after it: in a step, while
        // validating, in the middle of a file.
        let before = checkpoints(&place.path("killed")).len();
        let extra = Duration::from_micros(u64::from(Stream::new(1, Purpose::Order, lives).block(0)[0] % 60_000));
        let mut reached = None;
        lives += 1;
        let child = place.train("killed", SHORT).spawn().unwrap();
        let ended = kill_when(child, || {
            if reached.is_none() && checkpoints(&place.path("killed")).len() > before {
                reached = Some(Instant::now());
            }
            reached.is_some_and(|at| at.elapsed() >= extra)
        });
        if ended {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 3, "only {kills} kills");
    assert_same(&place.newest("whole"), &place.newest("killed"));
    assert_eq!(lasting(&place.path("whole")), lasting(&place.path("killed")));
    for entry in fs::read_dir(place.path("killed")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.ends_with(".tmp"), "{name} was left behind");
        if name.starts_with("snapshot") {
            assert_eq!(
                fs::read(place.path("killed").join(&name)).unwrap(),
                fs::read(place.path("whole").join(&name)).unwrap()
            );
        }
    }
}

#[test]
fn ctrl_c_saves_and_the_same_command_goes_on() {
    let place = Place::new();
    // No checkpoint is due before the end: the one that is found then is of the interruption.
    let options = SHORT.replace("--checkpoint 48", "--checkpoint 0");
    succeed(&mut place.train("whole", &options));
    let child = heeding(&mut place.train("stopped", &options), None).spawn().unwrap();
    let begun = Instant::now();
    while !place.path("stopped/stats.jsonl").exists()
        || fs::metadata(place.path("stopped/stats.jsonl")).unwrap().len() == 0
    {
        assert!(begun.elapsed() < Duration::from_secs(60), "no statistics appear");
        sleep(Duration::from_millis(1));
    }
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(text(&output).contains("the same command again goes on"), "{}", text(&output));
    let nimg = state(&place.newest("stopped"))["nimg"].as_u64().unwrap();
    assert!(nimg < 600, "it ended before it was stopped");
    let said = succeed(&mut place.train("stopped", &options));
    assert!(said.contains(&format!("resuming from {}", place.path("stopped").display())), "{said}");
    assert_same(&place.newest("whole"), &place.newest("stopped"));
    assert_eq!(lasting(&place.path("whole")), lasting(&place.path("stopped")));
    let said = succeed(&mut place.train("stopped", &options));
    assert!(said.contains("nothing to do"), "{said}");
}

#[test]
fn a_damaged_checkpoint_is_set_aside_for_an_older_one() {
    let place = Place::new();
    let options = "--duration 96 --batch 8 --checkpoint 32 --grid 0 --validate 0 --snapshot 0";
    succeed(&mut place.train("whole", options));
    let whole = fs::read(place.newest("whole")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let metadata = whole.windows(8).position(|w| w == b"\\\"nimg\\\"").unwrap() + 10;
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let dtype = whole.windows(5).position(|w| w == b"\"F32\"").unwrap() + 1;
    let damages: [(&str, &str, Damage); 5] = [
        ("another element type", "expected F32", Box::new(move |b| b[dtype] = b'I')),
        ("a flipped bit in a tensor", "checksum of tensor", Box::new(move |b| b[header + 12345] ^= 4)),
        ("a changed digit in the metadata", "checksum of the metadata", Box::new(move |b| b[metadata] ^= 1)),
        ("the end is missing", "truncated?", Box::new(|b| b.truncate(b.len() - 1))),
        ("nothing but zeros", "damaged", Box::new(|b| b.fill(0))),
    ];
    for (what, message, damage) in damages {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        let path = place.newest("whole");
        fs::write(&path, bytes).unwrap();
        let said = succeed(&mut place.train("whole", options));
        let names = said.contains(&format!("{}: damaged", path.display())) && said.contains(message);
        assert!(names && said.contains("set aside"), "{what}: {said}");
        assert!(said.contains("checkpoint-000000064.safetensors"), "{what}: {said}");
        let reference = place.path("reference.safetensors");
        fs::write(&reference, &whole).unwrap();
        assert_same(&reference, &place.newest("whole"));
    }
    let aside = fs::read_dir(place.path("whole")).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
        name.starts_with("checkpoint-000000096.safetensors.damaged")
    });
    assert_eq!(aside.count(), 5, "one replaced another");
    // A run that is over stays as it is, whatever shorter one is asked for.
    let written = fs::read(place.path("whole/training_options.json")).unwrap();
    succeed(&mut place.train("whole", &options.replace("--duration 96", "--duration 64")));
    assert!(written == fs::read(place.path("whole/training_options.json")).unwrap());
}

#[cfg(unix)]
#[test]
fn what_stands_where_a_checkpoint_should_be_is_set_aside_but_one_that_cannot_be_read_now_stops_the_run() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let place = Place::new();
    let options = "--duration 96 --batch 8 --checkpoint 32 --grid 0 --validate 0 --snapshot 0";
    succeed(&mut place.train("run", options));
    let path = place.newest("run");
    let whole = fs::read(&path).unwrap();
    type Make = fn(&Path);
    let cases: [(&str, &str, Make); 5] = [
        ("a link to nothing", "it is a link that leads nowhere", |path| symlink("nothing", path).unwrap()),
        ("a link to a folder", "not a regular file", |path| symlink("/tmp", path).unwrap()),
        ("a folder", "not a regular file", |path| fs::create_dir(path).unwrap()),
        ("a pipe", "not a regular file", |path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success())),
        ("a socket", "not a regular file", |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap())),
    ];
    for (what, message, make) in cases {
        fs::remove_file(&path).unwrap();
        make(&path);
        let said = succeed(&mut place.train("run", options));
        let names = said.contains(&format!("{}: damaged", path.display())) && said.contains(message);
        assert!(names && said.contains("set aside as"), "{what}: {said}");
        let reference = place.path("reference.safetensors");
        fs::write(&reference, &whole).unwrap();
        assert_same(&reference, &path);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Who may read everything cannot be kept from it.
    if fs::File::open(&path).is_err() {
        let said = fail(&mut place.train("run", options));
        assert!(said.contains("Permission denied") && path.exists(), "{said}");
    }
    // Of a link in a loop nobody knows what it is: it stays, and so does the run.
    fs::remove_file(&path).unwrap();
    symlink(&path, &path).unwrap();
    fail(&mut place.train("run", options));
    assert!(path.is_symlink());
}

#[test]
fn without_a_whole_checkpoint_a_run_does_not_begin_anew_unasked() {
    let place = Place::new();
    let options = "--duration 48 --batch 8 --checkpoint 16 --grid 0 --validate 0 --snapshot 24";
    succeed(&mut place.train("run", options));
    let reference = place.path("reference.safetensors");
    fs::copy(place.newest("run"), &reference).unwrap();
    for path in checkpoints(&place.path("run")) {
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 9999;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let files = |dir: &Path| {
        let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all.into_iter().map(|path| (path.file_name().unwrap().to_owned(), fs::read(path).unwrap())).collect::<Vec<_>>()
    };
    let before = files(&place.path("run"));
    let said = fail(&mut place.train("run", options));
    assert!(said.contains("no whole checkpoint is left in") && said.contains("2 more are damaged"), "{said}");
    assert!(said.contains("checkpoint-000000048.safetensors: damaged") && said.contains("--restart"), "{said}");
    assert!(!said.contains("what was saved"), "{said}");
    assert!(before == files(&place.path("run")), "a file was touched");

    let said = succeed(&mut place.train("run", &format!("{options} --restart")));
    assert!(said.contains("set aside"), "{said}");
    assert!(before == files(&place.path("run/before.restart")), "something was lost");
    assert_same(&reference, &place.newest("run"));
}

#[test]
fn snapshots_of_other_options_are_not_written_over() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --checkpoint 0 --snapshot 8 --status 8 --grid 0 --validate 0";
    let files = |dir: &str| -> Vec<PathBuf> {
        let mut paths: Vec<_> = fs::read_dir(place.path(dir)).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.is_file() && path.extension().is_some_and(|ending| ending != "lock"));
        paths
    };
    let without_checkpoints = || {
        for path in files("run").iter().filter(|path| path.to_string_lossy().contains("checkpoint-")) {
            fs::remove_file(path).unwrap();
        }
    };
    succeed(&mut place.train("run", options));
    without_checkpoints();
    let before = files("run").len();
    // The same run makes the same files again.
    assert!(!succeed(&mut place.train("run", options)).contains("set aside"));
    without_checkpoints();
    let said = succeed(&mut place.train("run", &format!("{options} --lr 0.02")));
    assert!(said.contains("set aside"), "{said}");
    assert_eq!(files("run/before.restart").len(), before);

    // Nor are those of another beginning averaged with them.
    let init =
        |run: &str| format!("{options} --init {}/snapshot-000000016-0.050.safetensors", place.path(run).display());
    succeed(&mut place.train("a", &init("run")));
    succeed(&mut place.train("b", &init("run/before.restart")));
    let mut ema = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    ema.current_dir(place.dir()).args(["ema", "a", "b", "--std", "0.07", "--out", "averages"]);
    let said = fail(&mut ema);
    assert!(said.contains("is not of the same run as") && said.contains("they differ in began_from"), "{said}");
}

#[test]
fn what_a_run_left_before_its_first_checkpoint_is_its_own_or_set_aside() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --checkpoint 0 --snapshot 0 --status 8 --grid 0 --validate 0";
    succeed(&mut place.train("run", options));
    let without_checkpoint = || {
        fs::remove_file(place.newest("run")).unwrap();
        fs::read(place.path("run/stats.jsonl")).unwrap()
    };
    // As if it had been killed before.
    without_checkpoint();
    let said = succeed(&mut place.train("run", options));
    assert!(said.contains("/run: the run begins again") && !said.contains("set aside"), "{said}");
    assert_eq!(stats(&place.path("run")).len(), 2);

    let other = format!("{options} --lr 0.02");
    for (config, aside) in [("\"num_blocks\": 1", "before.restart"), ("\"num_blocks\": 2", "before.restart-2")] {
        let before = without_checkpoint();
        fs::write(place.path("config.json"), CONFIG.replace("\"num_blocks\": 1", config)).unwrap();
        let said = succeed(&mut place.train("run", &other));
        assert!(said.contains("set aside 3 files of the run before"), "{said}");
        assert!(fs::read(place.path("run").join(aside).join("stats.jsonl")).unwrap() == before);
    }
    // Nobody knows of which options it is.
    without_checkpoint();
    fs::write(place.path("run/training_options.json"), "my options").unwrap();
    let said = succeed(&mut place.train("run", &other));
    assert!(said.contains("set aside 3 files of the run before"), "{said}");
    // One that began from weights cannot begin again without them.
    succeed(&mut place.train("other", &other.replace("--snapshot 0", "--snapshot 16")));
    let start = place.path("other/snapshot-000000016-0.050.safetensors");
    succeed(&mut place.train("begun", &format!("{other} --init {}", start.display())));
    fs::remove_file(place.newest("begun")).unwrap();
    let said = succeed(&mut place.train("begun", &other));
    assert!(said.contains("set aside 3 files of the run before"), "{said}");
    // A run that was killed before it wrote a line left nothing to set aside.
    without_checkpoint();
    fs::remove_file(place.path("run/loss.svg")).unwrap();
    fs::write(place.path("run/stats.jsonl"), "").unwrap();
    assert!(!succeed(&mut place.train("run", options)).contains("set aside"));
}

#[test]
fn statistics_are_not_written_through_a_link() {
    let place = Place::new();
    fs::create_dir(place.path("run")).unwrap();
    fs::write(place.path("victim"), "").unwrap();
    std::os::unix::fs::symlink("../victim", place.path("run/stats.jsonl")).unwrap();
    succeed(&mut place.train("run", "--duration 16 --batch 8 --status 8 --grid 0 --validate 0 --snapshot 0"));
    assert_eq!(fs::read(place.path("victim")).unwrap(), b"");
    assert_eq!(stats(&place.path("run")).len(), 2);
}

#[test]
fn a_checkpoint_called_otherwise_than_what_it_is_of_is_set_aside() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --checkpoint 8 --grid 0 --validate 0 --snapshot 0";
    succeed(&mut place.train("run", options));
    let newest = fs::read(place.newest("run")).unwrap();
    let (first, far) =
        (place.path("run/checkpoint-000000008.safetensors"), place.path("run/checkpoint-000000999.safetensors"));
    fs::copy(&first, &far).unwrap();
    fs::copy(&first, place.path("run/checkpoint-20.safetensors")).unwrap();
    let said = succeed(&mut place.train("run", options));
    assert!(
        said.contains("it is of 8 images, not of as many as its name says")
            && said.contains("run/checkpoint-000000016.safetensors\n"),
        "{said}"
    );
    assert!(!far.exists() && fs::read(place.newest("run")).unwrap() == newest);
    assert!(place.path("run/checkpoint-20.safetensors").exists(), "a copy that is somebody's");
}

#[test]
fn a_restart_sets_aside_the_events_of_tensorboard_too() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --checkpoint 8 --status 8 --grid 0 --validate 0 --snapshot 0 --tensorboard";
    let events = |dir: &str| -> Vec<(PathBuf, Vec<u8>)> {
        let paths = fs::read_dir(place.path(dir)).unwrap().map(|entry| entry.unwrap().path());
        let events = paths.filter(|path| path.file_name().unwrap().to_string_lossy().contains("tfevents"));
        events.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
    };
    // A file that a killed run left before its first checkpoint is not counted.
    let session = |file: &[u8]| file.windows(4).any(|bytes| bytes == [7 << 3 | 2, 2, 0x08, 1]);
    fs::create_dir(place.path("killed")).unwrap();
    fs::write(place.path("killed/events.out.tfevents.0000000001.edm2k.0"), "").unwrap();
    succeed(&mut place.train("killed", options));
    assert!(events("killed").iter().any(|(_, file)| session(file)));
    succeed(&mut place.train("run", options));
    let before = events("run");
    assert!(!session(&before[0].1));
    assert!(before.len() == 1 && before[0].1.len() > 100, "{before:?}");
    succeed(&mut place.train("run", &format!("{options} --restart")));
    assert!(events("run/before.restart") == before, "what the run before had written");
    let now = events("run");
    assert!(now.len() == 1 && now[0].1.len() > 100, "only those of the new run: {now:?}");
}

#[test]
fn resuming_with_other_options_says_which() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --grid 0 --validate 0 --snapshot 0";
    succeed(&mut place.train("run", options));
    let before = fs::read(place.newest("run")).unwrap();
    let cases = [
        ("--duration 16 --batch 4 --rampup 1", "batch was 8, now 4"),
        ("--duration 16 --batch 8 --rampup 1 --seed 1", "seed was 0, now 1"),
        ("--duration 16 --batch 8 --rampup 1 --lr 0.5 --flip", "lr was 0.01, now 0.5; flip was false, now true"),
    ];
    for (options, message) in cases {
        let said = fail(&mut place.train("run", options));
        assert!(said.contains(message) && said.contains("checkpoint-000000016"), "{said}\nexpected {message}");
    }
    fs::write(place.path("config.json"), CONFIG.replace("\"num_blocks\": 1", "\"num_blocks\": 2")).unwrap();
    let said = fail(&mut place.train("run", options));
    assert!(said.contains("config.num_blocks was 1, now 2"), "{said}");
    fs::write(place.path("config.json"), CONFIG).unwrap();
    write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 38, false);
    let said = fail(&mut place.train("run", options));
    assert!(said.contains("data.images was 37, now 38"), "{said}");
    assert_eq!(before, fs::read(place.newest("run")).unwrap(), "the checkpoint was touched");
    // Another number of images at a time is no other run. It is the one of before unless it is given.
    let longer = |duration: usize, more: &str| {
        let options = format!("--duration {duration} --batch 8 --rampup 1 --grid 0 --validate 0 --snapshot 0 {more}");
        succeed(&mut place.train("pieces", &options))
    };
    longer(8, "--batch-gpu 4");
    let said = longer(16, "");
    assert!(said.contains("4 images at a time, as before") && !said.contains("warning"), "{said}");
    assert!(
        longer(24, "--batch-gpu 2").contains("warning: 4 images at a time so far, 2 from here: it rounds otherwise")
    );
    // A longer run with the same learning rate is the same run.
    write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 37, false);
    succeed(&mut place.train("run", "--duration 32 --batch 8 --rampup 1 --grid 0 --validate 0"));
}

#[test]
fn the_size_of_micro_batches_changes_rounding_only() {
    let place = Place::new();
    let options = "--duration 48 --batch 8 --rampup 0 --grid 0 --validate 0 --snapshot 0";
    for gpu in [8, 3, 1] {
        succeed(&mut place.train(&format!("gpu{gpu}"), &format!("{options} --batch-gpu {gpu}")));
    }
    let read = |gpu: usize, name: &str| SafeFile::open(place.newest(&format!("gpu{gpu}"))).unwrap().f32(name).unwrap();
    let mut worst = (0.0, String::new());
    for name in SafeFile::open(place.newest("gpu8")).unwrap().names() {
        let Some(parameter) = name.strip_prefix("weight.") else { continue };
        for gpu in [3, 1] {
            let (a, b) = (read(8, name), read(gpu, name));
            let difference = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            let size = a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
            let error = (difference / size.max(1e-30)).sqrt();
            if error > worst.0 {
                worst = (error, format!("{parameter} with {gpu}"));
            }
        }
    }
    println!("worst: {worst:?}");
    // Adam turns the sign of a gradient near zero into a step of lr; a few elements flip. Any other
    // order, noise or scale of the images would move every weight by lr a step, 1e-1 in all.
    assert!(worst.0 < 5e-3, "{worst:?}");
}

#[test]
fn old_checkpoints_are_removed_and_snapshots_are_not() {
    let place = Place::new();
    let options = "--duration 80 --batch 8 --checkpoint 16 --snapshot 40 --keep 2 --grid 0 --validate 0";
    succeed(&mut place.train("run", options));
    let names: Vec<_> = checkpoints(&place.path("run")).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["checkpoint-000000064.safetensors", "checkpoint-000000080.safetensors"]);
    for nimg in [40, 80] {
        for std in ["0.050", "0.100"] {
            Model::load(place.path(&format!("run/snapshot-{nimg:09}-{std}.safetensors"))).unwrap();
        }
    }
}

#[test]
fn that_latents_have_no_sample_grids_is_said_once() {
    let place = Place::new();
    fs::remove_file(place.path("data").join(Split::Validation.shard_name(0))).unwrap();
    write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 9, true);
    let options = "--duration 16 --batch 8 --snapshot 0";
    let note = "no sample grids: the images are latents";
    assert_eq!(succeed(&mut place.train("run", options)).matches(note).count(), 1);
    assert!(!succeed(&mut place.train("quiet", &format!("{options} --grid 0"))).contains(note));
}

/// Guidance leads away from no condition, and what that is a network only knows if it was shown.
#[test]
fn a_model_that_always_saw_conditions_is_drawn_from_without_guidance() {
    let place = Place::new();
    let options = "--duration 48 --batch 8 --snapshot 24 --grid 0 --validate 0 --ema 0.1";
    let said = succeed(&mut place.train("always", options));
    assert!(said.contains("every image keeps its condition"), "{said}");
    // Its later half is shown without conditions at times.
    let late = "--duration 48 --batch 8 --snapshot 24 --grid 24 --validate 0 --ema 0.1 --cond-dropout 0.5";
    let said = succeed(&mut place.train("late", &format!("{late} --cond-dropout-from 24")));
    assert!(!said.contains("every image keeps its condition"), "{said}");
    let guidance = |nimg: usize| {
        let text = read_text(&place.path(&format!("late/grid-{nimg:09}.png"))).unwrap();
        serde_json::from_str::<Value>(&text[0].1).unwrap()["sampler"]["guidance"].as_f64().unwrap()
    };
    assert_eq!([24, 48].map(guidance), [1.0, SamplerConfig::default().guidance]);
    // What begins after the end is not there.
    let said = succeed(&mut place.train("never", &format!("{late} --cond-dropout-from 48 -n")));
    assert!(said.contains("every image keeps its condition"), "{said}");
    let of = |run: &str, nimg: usize| format!("{run}/snapshot-{nimg:09}-0.100.safetensors");
    let dropout = |name: &str| Model::load(place.path(name)).unwrap().meta.cond_dropout;
    assert_eq!(
        [of("always", 48), of("late", 24), of("late", 48)].map(|name| dropout(&name)),
        [Some(0.0), Some(0.0), Some(0.5)]
    );

    let sample = |model: &str, out: &str, more: &str| {
        let line = format!("sample --model {model} --outdir {out} --tags t1 --steps 2 {more}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
        command.current_dir(place.dir()).args(line.split_whitespace());
        let said = succeed(&mut command);
        (said, fs::read(place.path(&format!("{out}/000000.png"))).unwrap())
    };
    let (said, usual) = sample(&of("always", 48), "usual", "");
    assert!(said.contains("trained without --cond-dropout") && said.contains("--guidance 1"), "{said}");
    let (said, unguided) = sample(&of("always", 48), "unguided", "--guidance 1");
    assert!(!said.contains("cond-dropout"), "{said}");
    assert_eq!(pixels(&usual), pixels(&unguided));
    let (said, asked) = sample(&of("always", 48), "asked", "--guidance 5");
    assert!(said.contains("warning: the model was trained without --cond-dropout"), "{said}");
    assert_ne!(pixels(&asked), pixels(&unguided));
    // With another network, or a negative prompt, there is something to lead away from.
    for (out, more) in [("with-net", format!("--gnet {}", of("late", 24))), ("negative", "--negative t2".to_owned())] {
        let (said, _) = sample(&of("always", 48), out, &more);
        assert!(!said.contains("cond-dropout"), "{said}");
    }
    let (said, _) = sample(&of("late", 48), "late-usual", "");
    assert!(!said.contains("cond-dropout"), "{said}");
    // An average of both snapshots knows what the newest does.
    let mut average = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    succeed(average.current_dir(place.dir()).args(["ema", "late", "--std", "0.1", "--out", "averages"]));
    let file = fs::read_dir(place.path("averages")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(Model::load(file).unwrap().meta.cond_dropout, Some(0.5));
}

/// The pixels of a PNG file.
fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).unwrap().into_rgb8().into_raw()
}

#[test]
fn fine_tuning_names_the_parameters_that_start_afresh() {
    let place = Place::new();
    let config = edm2k::model::Config { label_dim: 11, ..settings(&place.open("data", Split::Train)).config };
    let old = Model::init(&config, 77).unwrap();
    let init = place.path("init.safetensors");
    old.save(&init, Stored::F16).unwrap();
    // The learning rate of the first step of a ramp is zero: what is saved is where it began.
    let options = format!("--duration 8 --batch 8 --rampup 8 --grid 0 --init {}", init.display());
    let said = succeed(&mut place.train("run", &options));
    assert!(said.contains("unet.emb_label.weight starts afresh: [16, 11] in --init, [16, 6] here"), "{said}");
    assert_eq!(said.matches("starts afresh").count(), 1, "{said}");
    let file = SafeFile::open(place.newest("run")).unwrap();
    for ((_, spec), values) in old.table.iter().zip(&old.weights) {
        let new = file.f32(&format!("weight.{}", spec.name)).unwrap();
        if spec.name == "unet.emb_label.weight" {
            continue;
        }
        // Forced normalisation scales each row of a weight; directions stay.
        let row = spec.numel() / spec.shape.first().copied().unwrap_or(1);
        for (a, b) in values.chunks(row).zip(new.chunks(row)) {
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
            // f16 rounding of the file.
            assert!(aa == 0.0 && bb == 0.0 || ab / (aa * bb).sqrt() > 1.0 - 1e-5, "{}", spec.name);
        }
    }
}

/// The JSON that a process printed before it said anything else.
fn first_json(said: &str) -> Value {
    serde_json::Deserializer::from_str(said).into_iter().next().expect("JSON").unwrap()
}

#[test]
fn a_dry_run_says_everything_and_writes_nothing() {
    let place = Place::new();
    let said = succeed(&mut place.train("run", "--duration 1.5k --batch 32 --batch-gpu 4 -n"));
    let json = first_json(&said);
    let (_, table) = edm2k::model::Precond::new(&settings(&place.open("data", Split::Train)).config).unwrap();
    assert_eq!(json["parameters"], table.trained_values());
    assert_eq!(json["settings"]["duration"], 1500);
    assert_eq!(json["execution"]["batch_gpu"], 4);
    assert!(json["memory_bytes"]["activations"].as_u64().unwrap() > 0);
    assert!(!place.path("run").exists());
    let mut nowhere = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    nowhere
        .args(["train", "--dry-run", "--duration", "1500", "--data"])
        .arg(place.path("data"))
        .arg("--config")
        .arg(place.path("config.json"));
    let without = first_json(&succeed(&mut nowhere));
    assert_eq!(without["parameters"], json["parameters"]);

    let recipe = "--preset 1girl-xs --cond-dropout 0.05 --cond-dropout-from 9M -n";
    let json = first_json(&succeed(&mut place.train("run", recipe)));
    let expected = json!({"batch": 2000, "lr": 0.012, "schedule": "linear", "rampup": 0, "duration": 11_000_000,
        "cond_dropout": 0.05, "cond_dropout_from": 9_000_000, "ema": [0.05, 0.1], "p_mean": -0.4, "p_std": 1.0});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&json["settings"][name], value, "{name}");
    }
    // Of the loop that only Hopper has, the plan is an H100's.
    let plan =
        first_json(&succeed(&mut place.train("run", &format!("{recipe} --conv-loop wgmma"))))["on_a_gpu"].clone();
    assert!(plan["total_bytes"].is_u64(), "{plan}");
    // A restart goes on from nothing.
    succeed(&mut place.train("there", "--duration 8 --batch 8 --grid 0 --validate 0 --snapshot 0"));
    for (options, from) in [("", true), ("--restart", false)] {
        let json = first_json(&succeed(&mut place.train("there", &format!("--duration 16 --batch 8 -n {options}"))));
        assert_eq!(json["resumes_from"].is_string(), from, "{options}");
    }
}

#[test]
fn grids_take_a_hundredth_of_the_operations_at_most() {
    let place = Place::new();
    let dry =
        |options: &str| -> Value { first_json(&succeed(&mut place.train("run", &format!("--batch 8 -n {options}")))) };
    let interval = |options: &str| dry(options)["execution"]["grid"].as_u64().unwrap();
    assert_eq!(interval("--duration 1M"), 20_000);
    // 24 samples of 16 steps; an image costs three passes in training, and guidance takes two in sampling.
    assert_eq!(interval("--duration 100k"), 100 * 24 * 16 / 3);
    assert_eq!(interval("--duration 100k --cond-dropout 0.1"), 100 * 24 * 32 / 3);
    assert_eq!(interval("--duration 100k --grid 50"), 50);

    // 30 pictures of latents, too. The levels of a TAESD begin with its layers 6, 11 and 16, which enlarge: each pixel of
    // their result sees 4 of the 9 that their weights are for.
    fs::remove_file(place.path("data").join(Split::Validation.shard_name(0))).unwrap();
    write_shard(&place.path("data").join(Split::Train.shard_name(0)), 0, 9, true);
    let taesd = autoencoder::taesd(8);
    autoencoder::write(&place.path("taesd.safetensors"), &taesd);
    let macs = taesd.iter().filter(|(_, (shape, _))| shape.len() == 4).map(|(name, (shape, _))| {
        let Some(layer) = name.strip_prefix("decoder.layers.") else { return 0 };
        let layer: usize = layer.split('.').next().unwrap().parse().unwrap();
        let level = [6, 11, 16].iter().filter(|first| **first <= layer).count();
        let taps = if [6, 11, 16].contains(&layer) { 4 } else { 9 };
        (shape[0] * shape[1] * taps) << (2 * level)
    });
    let picture = 30 * macs.sum::<usize>() * SIZE * SIZE;
    let options = format!("--duration 100k --vae {}", place.path("taesd.safetensors").display());
    let config = serde_json::from_value(dry(&options)["settings"]["config"].clone()).unwrap();
    let (net, table) = edm2k::model::Precond::new(&config).unwrap();
    let pass = net.macs(&table, SIZE, SIZE) as usize;
    assert_eq!(interval(&options), 100 * (24 * 16 * pass + picture).div_ceil(3 * pass) as u64);
}

#[test]
fn a_full_disk_costs_nothing_that_was_saved() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --checkpoint 8 --grid 0 --validate 0 --snapshot 0";
    succeed(&mut place.train("run", options));
    let before = fs::read(place.newest("run")).unwrap();
    // A limit on the size of files fails a write in the middle, as a full disk does.
    let more = options.replace("--duration 16", "--duration 64 --rampup 1");
    let train = place.train("run", &more);
    let arguments: Vec<_> = train.get_args().map(|a| a.to_str().unwrap().to_owned()).collect();
    let mut limited = Command::new("bash");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "bash", env!("CARGO_BIN_EXE_edm2k")])
        .args(arguments);
    let said = fail(limited.stdout(Stdio::piped()).stderr(Stdio::piped()));
    assert!(said.contains("checkpoint-000000024.safetensors: File too large"), "{said}");
    assert_eq!(before, fs::read(place.newest("run")).unwrap());
    assert!(leftovers(&place.path("run")).is_empty());
    succeed(&mut place.train("run", &more));
}

#[test]
fn a_run_that_diverges_stops_with_advice_and_keeps_its_last_good_checkpoint() {
    let place = Place::new();
    // Without a ramp-up the first step ruins the weights, and the second sees it; a checkpoint finds it at once.
    for checkpoint in [8, 0] {
        let options = format!("--duration 64 --batch 8 --lr 1e38 --rampup 0 --checkpoint {checkpoint} --grid 0");
        let said = fail(&mut place.train("ruined", &options));
        assert!(said.contains("the run has diverged after") && said.contains("lower lr (it was 1e38)"), "{said}");
        assert!(checkpoints(&place.path("ruined")).is_empty(), "{said}");
    }
    // Weights that are finite, but too large for a snapshot, are no better.
    let options = "--duration 16 --batch 8 --lr 1e30 --rampup 0 --snapshot 8 --checkpoint 0 --grid 0 --validate 0";
    let said = fail(&mut place.train("large", options));
    assert!(said.contains("the run has diverged after 8") && said.contains("lower lr (it was 1e30)"), "{said}");
    // The first step of a ramp moves nothing: that checkpoint is good.
    let options = "--duration 640 --batch 8 --lr 1e38 --rampup 600 --status 8 --checkpoint 8 --snapshot 0 --grid 0 \
                   --validate 0 --keep 1";
    let said = fail(&mut place.train("run", options));
    let good = place.newest("run");
    assert!(said.contains(&format!("the last good checkpoint is {}", good.display())), "{said}");
    assert!(said.contains("training stopped; what was saved is whole"), "{said}");
    let whole = fs::read(&good).unwrap();
    let file = SafeFile::open(&good).unwrap();
    for name in file.names().filter(|&name| name != "checksums") {
        assert!(file.f32(name).unwrap().iter().all(|x| x.is_finite()), "{name}");
    }
    let said = fail(&mut place.train("run", options));
    assert!(
        said.contains("resuming from") && said.contains("has diverged") && !said.contains("what was saved"),
        "{said}"
    );
    assert!(whole == fs::read(place.newest("run")).unwrap(), "the last good checkpoint is another");
}

#[test]
fn a_finished_run_goes_on_with_a_longer_duration() {
    let place = Place::new();
    let options = "--batch 8 --grid 0 --validate 0 --snapshot 0 --checkpoint 0";
    // The default ramp-up is a tenth of the duration: the longer run keeps the one that it began with.
    succeed(&mut place.train("run", &format!("--duration 160 {options}")));
    succeed(&mut place.train("run", &format!("--duration 320 {options}")));
    succeed(&mut place.train("straight", &format!("--duration 320 --rampup 16 {options}")));
    let (a, b) = (place.newest("run"), place.newest("straight"));
    assert_same_tensors(&a, &b);
    assert_eq!(state(&a)["settings"]["rampup"], 16);
    let said = fail(&mut place.train("run", &format!("--duration 480 --rampup 48 {options}")));
    assert!(said.contains("rampup was 16, now 48"), "{said}");
}

#[test]
fn a_run_killed_after_its_last_checkpoint_is_tidied_up() {
    let place = Place::new();
    let options = "--duration 80 --batch 8 --rampup 8 --checkpoint 16 --snapshot 0 --grid 0 --validate 0";
    succeed(&mut place.train("run", &format!("{options} --keep 9")));
    let drawn = fs::read(place.path("run/loss.svg")).unwrap();
    fs::write(place.path("run/loss.svg"), "stale").unwrap();
    let said = succeed(&mut place.train("run", &format!("{options} --keep 2")));
    assert!(said.contains("nothing to do"), "{said}");
    assert_eq!(checkpoints(&place.path("run")).len(), 2);
    assert!(drawn == fs::read(place.path("run/loss.svg")).unwrap());
}

#[test]
fn what_is_not_statistics_in_their_file_is_set_aside_and_the_rest_kept() {
    let place = Place::new();
    let options = "--batch 8 --rampup 8 --status 8 --checkpoint 0 --snapshot 0 --grid 0 --validate 0";
    succeed(&mut place.train("whole", &format!("--duration 64 {options}")));
    succeed(&mut place.train("run", &format!("--duration 32 {options}")));
    let path = place.path("run/stats.jsonl");
    let mut bytes = b"\xff\xfe\x00 not a line\n\x1b[2J\n".to_vec();
    bytes.extend(fs::read(&path).unwrap());
    bytes.extend(b"[1, 2]\n{\"loss\": 3}\n{\"nimg\": 40, \"lo");
    fs::write(&path, &bytes).unwrap();
    let said = succeed(&mut place.train("run", &format!("--duration 64 {options}")));
    assert!(said.contains("stats.jsonl had more than statistics: set aside as"), "{said}");
    assert!(bytes == fs::read(place.path("run/stats.jsonl.damaged")).unwrap());
    assert_eq!(lasting(&place.path("whole")), lasting(&place.path("run")));

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    succeed(&mut place.train("run", &format!("--duration 80 {options}")));
    assert!(place.path("run/stats.jsonl.damaged-2").is_dir() && stats(&place.path("run")).len() == 2);
}

#[test]
fn averages_of_nearly_the_same_width_have_files_of_their_own() {
    let place = Place::new();
    let options = "--duration 16 --batch 8 --grid 0 --validate 0 --snapshot 16";
    succeed(&mut place.train("run", &format!("{options} --ema 0.1001,0.1004,0.1")));
    for std in [0.1001, 0.1004, 0.1] {
        let name = if std == 0.1 { "0.100".to_owned() } else { std.to_string() };
        let model = Model::load(place.path(&format!("run/snapshot-000000016-{name}.safetensors"))).unwrap();
        assert_eq!(model.meta.ema_std, Some(std));
    }
    assert!(
        fail(&mut place.train("twice", &format!("{options} --ema 0.1,0.05,0.1")))
            .contains("error: ema 0.1 is given twice")
    );
}

/// Trains on in `run` up to `duration` images, eight a step, or until `stop_at`; what it noted.
fn go_on(place: &Place, duration: u64, stop_at: Option<u64>, execution: &Execution) -> String {
    let data = place.open("data", Split::Train);
    let settings = Settings { batch: 8, duration, ..settings(&data) };
    let model = Model::init(&settings.config, 0).unwrap();
    let mut backend = Cpu::<f32>::for_training(&model.table, 1);
    let (mut said, stop) = (String::new(), AtomicBool::new(false));
    let mut note = |event: Event| match event {
        Event::Step(nimg) if Some(nimg) == stop_at => stop.store(true, Ordering::Relaxed),
        Event::Note(text) | Event::Warning(text) => said += &text,
        _ => {}
    };
    let splits = Splits { train: &data, validation: None };
    let (settings, stop, event, ranks) = (&settings, &stop, &mut note, &mut Alone);
    let training = Training { model, settings, execution, splits, show: None, stop, event, ranks };
    let outcome = train(&mut backend, training).unwrap();
    assert_eq!(outcome == Outcome::Stopped, stop_at.is_some());
    said
}

/// A program is refused what the command line is refused, in the same words, before anything is written.
#[test]
fn settings_that_cannot_be_computed_are_refused() {
    let place = Place::new();
    let data = place.open("data", Split::Train);
    let good = Settings { batch: 8, duration: 16, ..settings(&data) };
    assert!(good.validate().is_ok());
    for (bad, batch_gpu, message) in [
        (Settings { lr: f64::NAN, ..good.clone() }, 3, "lr is NaN, expected a positive number"),
        (Settings { batch: 0, ..good.clone() }, 3, "batch is 0, expected a positive number"),
        (Settings { p_mean: f64::NAN, ..good.clone() }, 3, "p_mean NaN and p_std "),
        (Settings { cond_dropout: -0.1, ..good.clone() }, 3, "cond_dropout is -0.1, expected 0 to 1"),
        (Settings { duration: 7, ..good.clone() }, 3, "batch is 8, more than the whole run"),
        (good, 0, "batch_gpu is 0, expected a positive number"),
    ] {
        let device = Device::open("cpu").unwrap();
        let execution = Execution { batch_gpu, ..Execution::new(place.path("refused"), &bad, &device) };
        let splits = Splits { train: &data, validation: None };
        let (model, stop) = (Model::init(&bad.config, 0).unwrap(), AtomicBool::new(false));
        let (settings, execution, event, ranks) = (&bad, &execution, &mut |_: Event| {}, &mut Alone);
        let training = Training { model, settings, execution, splits, show: None, stop: &stop, event, ranks };
        let refused = training.run(&device).unwrap_err();
        assert!(matches!(refused, TrainError::Setting(_)) && refused.to_string().contains(message), "{refused}");
        assert!(!place.path("refused").exists());
    }
}

/// The command line sees to it that what a run is made of belongs together; a program is told.
#[test]
fn what_does_not_belong_together_is_refused() {
    let place = Place::new();
    let (data, validation) = (place.open("data", Split::Train), place.open("data", Split::Validation));
    let good = Settings { batch: 8, duration: 16, ..settings(&data) };
    let model = Model::init(&good.config, 0).unwrap();
    let other = Config { model_channels: 16, ..good.config.clone() };
    let fourth = Config { img_channels: 4, ..good.config.clone() };
    let wide = Config { label_dim: good.config.label_dim + 1, ..good.config.clone() };
    let deep = Config { img_resolution: 32, channel_mult: vec![1, 1, 1, 1, 1], ..good.config.clone() };
    let of = |config: &Config| (Model::init(config, 0).unwrap(), Settings { config: config.clone(), ..good.clone() });
    let elsewhere = DataIdentity { ids: good.data.ids ^ 1, ..good.data.clone() };
    for ((model, settings), message) in [
        ((Model::init(&other, 0).unwrap(), good.clone()), "the model is of another network than the settings'"),
        ((model.clone(), Settings { data: elsewhere, ..good.clone() }), "other images than those to train on"),
        (of(&fourth), "images of 3 channels, and a network for 4"),
        (of(&wide), "values, and a network for"),
        (of(&deep), "an image of"),
    ] {
        let device = Device::open("cpu").unwrap();
        let execution = Execution::new(place.path("refused"), &settings, &device);
        let (splits, stop) = (Splits { train: &data, validation: Some(&validation) }, AtomicBool::new(false));
        let (settings, execution, event, ranks) = (&settings, &execution, &mut |_: Event| {}, &mut Alone);
        let training = Training { model, settings, execution, splits, show: None, stop: &stop, event, ranks };
        let refused = training.run(&device).unwrap_err().to_string();
        assert!(refused.contains(message), "{refused}; expected {message}");
        assert!(!place.path("refused").exists());
    }
    let missing = std::panic::catch_unwind(|| {
        let mut model = model.clone();
        model.weights.pop();
        model.save(place.path("m.safetensors"), Stored::F16)
    });
    assert!(missing.is_err() && !place.path("m.safetensors").exists());
    let mut named = model;
    named.meta.vocabulary = vec!["one".into(), "two".into()];
    let refused = named.save(place.path("m.safetensors"), Stored::F16).unwrap_err().to_string();
    assert!(refused.contains("2 tags in the vocabulary, expected label_dim = "), "{refused}");
}

/// Training alone, and the last checkpoint.
fn usual_execution(place: &Place) -> Execution {
    Execution {
        outdir: place.path("run"),
        batch_gpu: 8,
        status: 0,
        validate: 0,
        grid: 0,
        tensorboard: false,
        snapshot: 0,
        checkpoint: 0,
        keep: 1,
        keep_rampup: false,
        restart: false,
        computed_on: "the CPU, f32".into(),
    }
}

#[test]
fn another_device_on_the_way_is_said() {
    let place = Place::new();
    let execution = usual_execution(&place);
    go_on(&place, 8, None, &Execution { computed_on: "a GPU, f16".into(), ..execution.clone() });
    let said = go_on(&place, 16, None, &execution);
    assert!(said.contains("computed on a GPU, f16 so far, on the CPU, f32 from here"), "{said}");
    assert!(!go_on(&place, 24, None, &execution).contains("so far"));
}

#[test]
fn a_checkpoint_that_a_stop_made_goes_with_the_next_and_counts_for_none() {
    let place = Place::new();
    let execution = Execution { checkpoint: 32, keep: 2, ..usual_execution(&place) };
    let there = || {
        let of = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap()[11..].parse::<u64>().unwrap();
        checkpoints(&place.path("run")).iter().map(of).collect::<Vec<_>>()
    };
    // What comes with a step is heeded after the next.
    go_on(&place, 128, Some(32), &execution);
    assert_eq!(there(), [32, 40]);
    go_on(&place, 128, Some(56), &execution);
    assert_eq!(there(), [32, 64], "where a checkpoint was due anyway, none is a stop's");
    go_on(&place, 128, Some(72), &execution);
    assert_eq!(there(), [32, 64, 80]);
    go_on(&place, 128, None, &execution);
    assert_eq!(there(), [96, 128]);
}

/// Starts a run without an end and waits until it is under way.
fn under_way(place: &Place, command: &mut Command) -> Child {
    let child = command.spawn().unwrap();
    let begun = Instant::now();
    while !place.path("run/stats.jsonl").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the run does not begin");
        sleep(Duration::from_millis(1));
    }
    child
}

const ENDLESS: &str = "--duration 10M --batch 8 --grid 0 --validate 0 --checkpoint 0 --snapshot 0 --status 0";

/// What a shell gives its programs, whatever this test was started with.
fn heeding(command: &mut Command, ignored: Option<libc::c_int>) -> &mut Command {
    let reset = move || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let action = if ignored == Some(signal) { libc::SIG_IGN } else { libc::SIG_DFL };
            // SAFETY: a valid signal and action.
            unsafe { libc::signal(signal, action) };
        }
        Ok(())
    };
    // SAFETY: `signal` may be called between fork and exec.
    unsafe { command.pre_exec(reset) }
}

#[test]
fn two_signals_of_one_request_are_one_request() {
    for signals in [["-TERM", "-HUP"], ["-HUP", "-HUP"], ["-TERM", "-TERM"], ["-TERM", "-INT"]] {
        let place = Place::new();
        let child = under_way(&place, heeding(&mut place.train("run", ENDLESS), None));
        signals.iter().for_each(|name| signal(&child, name));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{signals:?}: {}", text(&output));
        assert!(text(&output).contains("stopped after"), "{}", text(&output));
        assert_eq!(checkpoints(&place.path("run")).len(), 1, "{signals:?}: {}", text(&output));
    }
}

#[test]
fn a_second_ctrl_c_quits_at_once() {
    let place = Place::new();
    // A step of minutes.
    let options = ENDLESS.replace("--batch 8", "--batch 200k --batch-gpu 8");
    let mut child = under_way(&place, heeding(&mut place.train("run", &options), None));
    signal(&child, "-INT");
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("a second Ctrl-C quits at once")));
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(checkpoints(&place.path("run")).len(), 0);
}

/// `edm2k train | less`, and nobody scrolls.
#[cfg(target_os = "linux")]
#[test]
fn a_second_ctrl_c_quits_where_nobody_reads_what_is_printed() {
    let place = Place::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = place.train("run", &ENDLESS.replace("--status 0", "--status 8"));
    heeding(&mut command, None).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    assert!(BufReader::new(&reader).lines().any(|line| line.unwrap().contains("images/s")), "under way");
    // The same pipe, which this process alone does not wait for.
    let pipe = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let mut filler = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(pipe).unwrap();
    // To the last byte: whatever the run prints from here on, it waits.
    let filled = loop {
        if let Err(why) = filler.write(b".") {
            break why;
        }
    };
    assert_eq!(filled.kind(), std::io::ErrorKind::WouldBlock);
    signal(&child, "-INT");
    sleep(Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None);
    signal(&child, "-INT");
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if begun.elapsed() > Duration::from_secs(10) => break None,
            None => sleep(Duration::from_millis(10)),
        }
    };
    drop(reader);
    let _ = child.kill();
    assert_eq!(status.and_then(|status| status.code()), Some(130));
}

#[test]
fn a_signal_that_the_parent_ignores_stays_ignored() {
    let place = Place::new();
    let child = under_way(&place, heeding(&mut place.train("run", ENDLESS), Some(libc::SIGHUP)));
    signal(&child, "-HUP");
    sleep(Duration::from_millis(300));
    assert_eq!(checkpoints(&place.path("run")).len(), 0, "it stopped at a SIGHUP that it was told to ignore");
    signal(&child, "-TERM");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    assert_eq!(checkpoints(&place.path("run")).len(), 1);
}

#[test]
fn a_shard_that_is_cut_off_meanwhile_is_named() {
    let place = Place::new();
    let child = under_way(&place, &mut place.train("run", ENDLESS));
    let shard = place.path("data").join(Split::Train.shard_name(0));
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(0).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?} {}", output.status, text(&output));
    assert!(text(&output).contains(&format!("{}: it can no longer be read", shard.display())), "{}", text(&output));
}

#[test]
fn a_full_or_closed_stderr_stops_no_run() {
    let place = Place::new();
    let options = "--duration 32 --batch 8 --status 8 --grid 0 --validate 0 --snapshot 0 --checkpoint 16";
    for (name, redirection) in [("full", "2>/dev/full"), ("closed", "2>&-"), ("gone", "2> >(true)")] {
        let train = place.train(name, options);
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("exec \"$@\" >/dev/null {redirection}"), "bash", env!("CARGO_BIN_EXE_edm2k")]);
        assert!(shell.args(train.get_args()).status().unwrap().success(), "{name}");
        assert!(place.newest(name).ends_with("checkpoint-000000032.safetensors"), "{name}");
    }
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let place = Place::new();
    let mut first = place.train("run", "--duration 10M --batch 8 --grid 0 --validate 0").spawn().unwrap();
    let begun = Instant::now();
    while !place.path("run/stats.jsonl").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the first run does not begin");
        sleep(Duration::from_millis(1));
    }
    let said = fail(&mut place.train("run", "--duration 10M --batch 8 --grid 0 --validate 0"));
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(said.contains("another run is writing here"), "{said}");
}

#[test]
fn bad_input_is_one_clear_line() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    let cases = [
        ("run", "--duration 1x", "'1x' is not a number of images"),
        ("run", "--duration 0", "error: duration is 0"),
        ("run", "--duration 8 --batch 0", "batch is 0"),
        ("run", "--duration 8 --batch 16", "error: batch is 16, more than the whole run"),
        ("run", "--duration 8 --lr NaN", "lr is NaN"),
        ("run", "--duration 8 --lr 1e39", "error: lr is 1e39"),
        (
            "run",
            "--duration 8 --lr 1e-46",
            "error: lr is 1e-46, expected a number that f32 can hold, 1.2e-38 to 3.4e38",
        ),
        ("run", "--duration 8 --p-std 1e-300", "error: p_std is 1e-300, expected a number that f32 can hold"),
        ("run", "--duration 8 --decay inf", "error: decay is inf"),
        ("run", "--duration 8 --decay 1e-300", "error: decay is 1e-300, expected 0 or a number from 1e-6"),
        ("run", "--duration 8 --p-mean inf", "error: p_mean inf"),
        ("run", "--duration 8 --p-std 20", "and p_std 20"),
        ("run", "--duration 8 --p-std 1e30", "make noise levels up to e^7e30, expected at most e^80"),
        ("run", "--duration 8 --ema 0.5", "error: ema is 0.5"),
        ("run", "--duration 8 --ema 0.05,1e-300", "error: ema is 1e-300, expected 1e-6 to 0.2887"),
        ("run", "--duration 8 --cond-dropout 2", "error: cond_dropout is 2"),
        ("run", "--duration 8 --preset edm2", "preset 'edm2' is unknown, expected one of edm2-img512-xxs"),
        ("run", "--duration 8 --init nowhere.safetensors", "nowhere.safetensors: No such file"),
        ("file/run", "--duration 8 --batch 8", "file/run: Not a directory"),
    ];
    for (out, options, message) in cases {
        let output = place.train(out, options).output().unwrap();
        let said = text(&output);
        assert!(!output.status.success() && said.contains(message), "{options}: {said}\nexpected {message}");
        assert!(!said.contains("panicked"), "{said}");
    }
    let configs = [
        ("{", "config.json: EOF"),
        (r#"{"model_channels": 8, "colour": 1}"#, "unknown field `colour`"),
        (
            r#"{"model_channels": 8, "sigma_data": 1e-320, "channels_per_head": 8}"#,
            "config.json: sigma_data = 1e-320, expected 1e-6 to 1e6",
        ),
        (
            r#"{"model_channels": 8, "clip_act": 0, "channels_per_head": 8}"#,
            "config.json: clip_act = 0, expected 1e-6 to 1e38",
        ),
        (r#"{"model_channels": 7}"#, "config.json: model_channels = 7"),
        (r#"{"model_channels": 8, "label_dim": 7}"#, "label_dim = 7, but the dataset's conditions have 6"),
        (r#"{"model_channels": 8, "img_channels": 4}"#, "img_channels = 4, but the dataset's images have 3"),
        (
            r#"{"model_channels": 8, "img_resolution": 64, "channel_mult": [1,1,1,1,1], "channels_per_head": 8}"#,
            "an image of 8x8 (width x height), expected both to be multiples of 16",
        ),
    ];
    for (config, message) in configs {
        fs::write(place.path("config.json"), config).unwrap();
        let said = fail(&mut place.train("run", "--duration 8"));
        assert!(said.contains(message), "{said}\nexpected {message}");
    }
    let said = fail(&mut train_on(&place, "config.json", "run", "--duration 8"));
    assert!(said.contains("config.json: it is text in JSON, expected the directory of a dataset"), "{said}");
    assert!(!place.path("run").exists());
}

// ---- what a run is of -----------------------------------------------------------------------

/// Prepares a dataset of a few pictures in this shade; `exchanged` exchanges two of their tags.
fn prepare(place: &Place, name: &str, shade: u8, exchanged: bool) {
    let images = place.path(&format!("{name}-images"));
    fs::create_dir(&images).unwrap();
    let mut lines = String::new();
    for id in 2..10u8 {
        let picture = image::RgbImage::from_fn(8, 8, |x, y| image::Rgb([(x * 30) as u8, (y * 30) as u8, shade + id]));
        picture.save(images.join(format!("{id}.png"))).unwrap();
        let tag = if exchanged && id < 4 { 5 - id } else { id };
        lines += &format!("{}\n", json!({"id": id, "file": format!("{id}.png"), "tags": [format!("t{tag}")]}));
    }
    let metadata = place.path(&format!("{name}.jsonl"));
    fs::write(&metadata, lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.arg("prepare").arg("--images").arg(images).arg("--metadata").arg(metadata).arg("--out");
    succeed(command.arg(place.path(name)).args(["--size", "8x8"]));
}

fn train_on(place: &Place, data: &str, out: &str, options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.current_dir(place.dir()).args(["train", "--data", data, "--outdir", out, "--config", "config.json"]);
    command.args("--batch 8 --grid 0 --validate 0 --snapshot 8 --rampup 8".split_whitespace());
    command.args(options.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_run_goes_on_with_the_same_images_and_tags_only() {
    let place = Place::new();
    prepare(&place, "one", 10, false);
    prepare(&place, "tags", 10, true);
    prepare(&place, "shade", 11, false);
    succeed(&mut train_on(&place, "one", "run", "--duration 8"));
    for other in ["tags", "shade"] {
        let said = fail(&mut train_on(&place, other, "run", "--duration 16"));
        assert!(said.contains("data.content was ") && said.contains(", now ") && !said.contains('{'), "{said}");
    }
    // Where it lies does not matter.
    fs::rename(place.path("one"), place.path("elsewhere")).unwrap();
    succeed(&mut train_on(&place, "elsewhere", "run", "--duration 16"));
    // Snapshots of two datasets are not of one run.
    succeed(&mut train_on(&place, "shade", "other", "--duration 24"));
    let mut ema = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    ema.current_dir(place.dir()).args(["ema", "run", "other", "--std", "0.07", "--out", "averages"]);
    let said = fail(&mut ema);
    assert!(said.contains("is not of the same run as") && said.contains("they differ in data"), "{said}");
    // A tag renamed: the snapshots would not fit together.
    let vocabulary = place.path("elsewhere/vocabulary.json");
    fs::write(&vocabulary, fs::read_to_string(&vocabulary).unwrap().replace("t4", "four")).unwrap();
    let said = fail(&mut train_on(&place, "elsewhere", "run", "--duration 24"));
    assert!(said.contains("data.vocabulary was "), "{said}");
}

#[test]
fn a_run_does_not_go_on_with_a_dataset_that_has_grown() {
    let place = Place::new();
    prepare(&place, "one", 10, false);
    succeed(&mut train_on(&place, "one", "run", "--duration 8"));
    let images = place.path("one-images");
    image::RgbImage::new(8, 8).save(images.join("12.png")).unwrap();
    let metadata = place.path("one.jsonl");
    let lines = fs::read_to_string(&metadata).unwrap() + r#"{"id": 12, "file": "12.png", "tags": ["t4"]}"#;
    fs::write(&metadata, lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.args(["prepare", "--add", "--size", "8x8", "--images"]).arg(&images).arg("--metadata").arg(&metadata);
    succeed(command.arg("--out").arg(place.path("one")));
    let before = fs::read(place.newest("run")).unwrap();
    let said = fail(&mut train_on(&place, "one", "run", "--duration 16"));
    let then = &state(&place.newest("run"))["settings"]["data"]["content"];
    let expected = format!("made with 8 images ({:.12}), and the dataset has grown to 9 (", then.as_str().unwrap());
    assert!(
        said.contains(&expected) && said.contains("begin another, from a snapshot of this one; --init takes one"),
        "{said}\nexpected {expected}"
    );
    assert!(fs::read(place.newest("run")).unwrap() == before);
    succeed(&mut train_on(&place, "one", "new", "--duration 16 --init run/snapshot-000000008-0.050.safetensors"));
}

#[test]
fn a_run_of_an_older_version_goes_on() {
    let place = Place::new();
    prepare(&place, "data2", 10, false);
    succeed(&mut train_on(&place, "data2", "run", "--duration 8"));
    let path = place.newest("run");
    let file = SafeFile::open(&path).unwrap();
    let mut metadata = file.metadata().clone();
    // As such a version wrote it.
    let mut state: Value = serde_json::from_str(&metadata["train"]).unwrap();
    for key in ["content", "vocabulary"] {
        state["settings"]["data"].as_object_mut().unwrap().remove(key).unwrap();
    }
    metadata.insert("train".into(), state.to_string());
    let mut sums = file.i64("checksums").unwrap();
    let whole = ["config", "edm2k", "train"].map(|key| metadata[key].as_str()).concat();
    *sums.last_mut().unwrap() = crc32fast::hash(whole.as_bytes()).into();
    let sums: Vec<u8> = sums.iter().flat_map(|x| x.to_le_bytes()).collect();
    let names: Vec<_> = file.names().map(str::to_owned).collect();
    let tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = names
        .into_iter()
        .map(|name| {
            let bytes = if name == "checksums" { sums.clone() } else { file.bytes(&name).unwrap().to_vec() };
            (name.clone(), file.dtype(&name).unwrap(), file.shape(&name).unwrap().to_vec(), bytes)
        })
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.as_slice(), b.as_slice())).collect();
    drop(file);
    safetensors::write(&path, &tensors, &metadata).unwrap();
    let said = succeed(&mut train_on(&place, "data2", "run", "--duration 16"));
    assert!(said.contains("resuming from"), "{said}");
}

#[test]
fn what_a_run_started_from_is_recognised_by_its_content_and_not_needed_to_go_on() {
    let place = Place::new();
    prepare(&place, "set", 10, false);
    prepare(&place, "others", 10, true);
    let config = edm2k::model::Config { label_dim: 8, ..settings(&place.open("data", Split::Train)).config };
    let save = |name: &str, seed: u64| {
        let mut model = Model::init(&config, seed).unwrap();
        model.meta.vocabulary = (2..10).map(|i| format!("t{i}")).collect();
        model.save(place.path(name), Stored::F16).unwrap();
    };
    save("start.safetensors", 1);
    let said = succeed(&mut train_on(&place, "set", "run", "--duration 8 --init start.safetensors"));
    assert!(!said.contains("relearn"), "{said}");
    let there = place.path("start.safetensors");
    let go_on = |init: &str, duration: u32| train_on(&place, "set", "run", &format!("--duration {duration} {init}"));
    succeed(&mut go_on("--init ./start.safetensors", 16));
    succeed(&mut go_on(&format!("--init {}", there.display()), 24));
    fs::rename(&there, place.path("renamed.safetensors")).unwrap();
    succeed(&mut go_on("--init renamed.safetensors", 32));
    save("start.safetensors", 2);
    let said = fail(&mut go_on("--init start.safetensors", 40));
    assert!(said.contains("init was renamed.safetensors (") && said.contains(", now start.safetensors ("), "{said}");
    fs::remove_file(&there).unwrap();
    let said = succeed(&mut go_on("--init start.safetensors", 40));
    assert!(said.contains("resuming from") && !said.contains("starts afresh"), "{said}");
    assert!(
        said.contains("--init start.safetensors is not there; the run, which has begun, does not need it"),
        "{said}"
    );
    // To begin anew it does.
    let before = fs::read(place.newest("run")).unwrap();
    let said = fail(&mut go_on("--init start.safetensors --restart", 40));
    assert!(said.contains("cannot start from --init: start.safetensors"), "{said}");
    assert!(before == fs::read(place.newest("run")).unwrap(), "nothing is set aside");
    succeed(&mut go_on("", 48));
    // It is remembered all the same.
    save("start.safetensors", 2);
    fail(&mut go_on("--init start.safetensors", 56));
    succeed(&mut go_on("--init renamed.safetensors", 56));
    // A run that has not begun needs it, and one that began from nothing has none.
    fs::remove_file(&there).unwrap();
    let said = fail(&mut train_on(&place, "set", "new", "--duration 8 --init start.safetensors"));
    assert!(said.contains("cannot start from --init"), "{said}");
    succeed(&mut train_on(&place, "set", "plain", "--duration 8"));
    let said = fail(&mut train_on(&place, "set", "plain", "--duration 16 --init renamed.safetensors"));
    assert!(said.contains("init was not given, now renamed.safetensors ("), "{said}");

    // Another vocabulary is a warning: somebody may want to fine-tune.
    let vocabulary = place.path("others/vocabulary.json");
    fs::write(&vocabulary, fs::read_to_string(&vocabulary).unwrap().replace("t9", "nine")).unwrap();
    let said = succeed(&mut train_on(&place, "others", "fine", "--duration 8 --init renamed.safetensors"));
    assert!(
        said.contains("warning: --init has to relearn: others: made for another vocabulary (it has \"nine\""),
        "{said}"
    );
}

#[cfg(unix)]
#[test]
fn a_path_that_is_not_utf8_can_be_started_from() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let config = settings(&place.open("data", Split::Train)).config;
    let model = Model::init(&config, 1).unwrap();
    let path = place.path("").join(std::ffi::OsStr::from_bytes(b"bad\xff.safetensors"));
    model.save(&path, Stored::F16).unwrap();
    let run = |duration: &str| {
        let mut command = train_on(&place, "data", "run", duration);
        succeed(command.arg("--init").arg(&path))
    };
    run("--duration 8");
    assert!(run("--duration 16").contains("resuming from"));
}
