//! The CPU reproduces the official implementation's numbers, and `edm2k verify` knows nothing of the network
//! that they are of: a directory with another one, made here in f64, passes, and a wrong number in it fails.

use std::collections::HashMap;
use std::path::Path;

use crate::common::command::{here, printed, refused};
use crate::common::normals::normals;
use edm2k::backend::cpu::{Cpu, bf16_is_available};
use edm2k::backend::gpu::launch::Precision;
use edm2k::backend::{Backend, NetworkBackend, Normalization, OptimizerStep, Slot, TrainingBackend};
use edm2k::formats::safetensors::{self, Dtype};
use edm2k::model::{Config, Precond};
use edm2k::params::{ParamKind, ParamTable};
use edm2k::verify::{Bounds, Finding, Totals, verify};
use edm2k::{Device, Numbers};
use serde_json::json;

fn replay(dir: &Path) -> (Totals, Vec<Finding>) {
    replay_within(dir, Bounds::F32)
}

/// On the CPU, as if its arithmetic allowed for these bounds.
fn replay_within(dir: &Path, bounds: Bounds) -> (Totals, Vec<Finding>) {
    replay_on(&Device::open("cpu").unwrap(), dir, bounds)
}

fn replay_on(device: &Device, dir: &Path, bounds: Bounds) -> (Totals, Vec<Finding>) {
    let mut outcomes = Vec::new();
    let summary = verify(dir, device, bounds, &mut |outcome| outcomes.push(outcome.clone()));
    (summary.unwrap(), outcomes)
}

/// Names of the checks that failed.
fn failures(outcomes: &[Finding]) -> Vec<&str> {
    let failed = outcomes.iter().filter_map(|outcome| match outcome {
        Finding::Check(check) if !check.ok => Some(check.name.as_str()),
        _ => None,
    });
    failed.collect()
}

fn assert_all_ok(dir: &Path, at_least: usize) {
    assert_ok(dir, &replay(dir), at_least);
}

fn assert_ok(dir: &Path, (summary, outcomes): &(Totals, Vec<Finding>), at_least: usize) {
    let failed = outcomes.iter().filter(|outcome| matches!(outcome, Finding::Check(check) if !check.ok));
    let failed: Vec<String> = failed.map(Finding::to_string).collect();
    assert!(failed.is_empty(), "{}:\n{}", dir.display(), failed.join("\n"));
    assert!(summary.ok >= at_least, "only {} checks in {}", summary.ok, dir.display());
}

#[test]
fn the_cpu_reproduces_the_official_numbers() {
    assert_all_ok(Path::new("tests/golden"), 900);
}

/// Three levels, RGB, no labels, odd balances, heads of 8 channels: `scripts/golden.py --config` of the README's settings.
#[test]
fn the_cpu_reproduces_the_official_numbers_of_an_odd_network() {
    assert_all_ok(Path::new("tests/golden_odd"), 300);
}

/// Products in bfloat16 lose no more than the official code's own run in it.
#[test]
fn the_cpu_in_bf16_reproduces_the_official_numbers_as_well_as_bf16_can() {
    if !bf16_is_available() {
        return eprintln!("skipped: this processor has no AVX-512 BF16");
    }
    let device = Device::open("cpu").unwrap().with_numbers(Numbers::Bf16).unwrap();
    for (dir, at_least) in [("tests/golden", 900), ("tests/golden_odd", 300)] {
        let dir = Path::new(dir);
        let replayed = replay_on(&device, dir, Bounds::of(Precision::Bf16));
        assert_ok(dir, &replayed, at_least);
        let errors = replayed.1.iter().filter_map(|outcome| match outcome {
            Finding::Check(check) if check.name.ends_with("D_x") => Some(check.error),
            _ => None,
        });
        let worst = errors.fold(0.0, f64::max);
        // It would be 1e-6 if the products were of f32.
        assert!(worst > 1e-4, "{}: {worst:e}", dir.display());
    }
}

/// A complete directory, or another one, is named in the environment.
#[test]
fn the_cpu_reproduces_the_directory_of_the_environment() {
    match std::env::var_os("EDM2K_GOLDEN") {
        Some(dir) => assert_all_ok(Path::new(&dir), 1),
        None => eprintln!("EDM2K_GOLDEN is not set"),
    }
}

/// Name, shape, values.
type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn write(dir: &Path, name: &str, config: &Config, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let out: Vec<safetensors::TensorOut> = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.as_str(), Dtype::F32, shape.as_slice(), bytes.as_slice()))
        .collect();
    let metadata = HashMap::from([("config".to_owned(), serde_json::to_string(config).unwrap())]);
    safetensors::write(dir.join(name), &out, &metadata).unwrap();
}

/// [n, c, h, w] to [n, h, w, c], or back with h * w and c exchanged.
fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let image = |x: &[f32]| {
        (0..cols).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| x[r * cols + c]).collect::<Vec<_>>()
    };
    x.chunks(rows * cols).flat_map(image).collect()
}

const N: usize = 3;
const HEIGHT: usize = 12;
const WIDTH: usize = 20;

/// Three levels, heads of 8 channels, RGB, no labels, odd balances.
fn config() -> Config {
    serde_json::from_value(json!({
        "img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_channels": 8, "channel_mult": [1, 2, 3],
        "channel_mult_emb": 2, "num_blocks": 1, "attn_resolutions": [16], "channels_per_head": 8,
        "concat_balance": 0.4, "res_balance": 0.35, "attn_balance": 0.25, "sigma_data": 0.7, "logvar_channels": 20,
    }))
    .unwrap()
}

struct Maker<'a> {
    dir: &'a Path,
    config: Config,
    net: Precond,
    table: ParamTable,
    weights: Vec<Vec<f32>>,
}

impl<'a> Maker<'a> {
    fn new(dir: &'a Path) -> Self {
        let config = config();
        let (net, table) = Precond::new(&config).unwrap();
        let weights = table
            .iter()
            .map(|(id, spec)| match spec.kind {
                ParamKind::Gain => vec![0.4 + 0.05 * id.0 as f32 / table.len() as f32],
                ParamKind::Weight { .. } => normals(spec.numel(), 100 + id.0 as u64, 0.8),
                ParamKind::Freqs | ParamKind::Phases => normals(spec.numel(), 100 + id.0 as u64, 4.0),
            })
            .collect();
        Self { dir, config, net, table, weights }
    }

    fn write(&self, name: &str, tensors: &Tensors) {
        write(self.dir, name, &self.config, tensors);
    }

    fn read(&self, name: &str) -> Tensors {
        let file = safetensors::SafeFile::open(self.dir.join(name)).unwrap();
        file.names().map(|n| (n.to_owned(), file.shape(n).unwrap().to_vec(), file.f32(n).unwrap())).collect()
    }

    /// Gives a tensor of `tiny_grads` an entry of `tolerances.json`.
    fn tolerate(&self, tensor: &str, entry: serde_json::Value) {
        let path = self.dir.join("tolerances.json");
        let mut all: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        all["tiny_grads.safetensors"][tensor] = entry;
        std::fs::write(path, all.to_string()).unwrap();
    }

    fn backend(&self, how: Normalization) -> Cpu<f64> {
        let mut b = Cpu::for_training(&self.table, 1);
        for (id, _) in self.table.iter() {
            b.write_param(Slot::Weight, id, &self.weights[id.0]).unwrap();
            b.write_param(Slot::Ema(0), id, &self.weights[id.0]).unwrap();
        }
        b.make_effective(Slot::Weight, how).unwrap();
        b
    }

    fn parameters(&self, prefix: &str, values: impl Fn(usize) -> Vec<f32>) -> Tensors {
        let all = self.table.iter().filter(|(_, spec)| prefix.is_empty() || spec.trained());
        all.map(|(id, spec)| (format!("{prefix}{}", spec.name), spec.shape.clone(), values(id.0))).collect()
    }

    fn sigmas() -> [f32; N] {
        [0.05, 0.9, 7.0]
    }

    fn forward(&self) {
        let shape = vec![N, 3, HEIGHT, WIDTH];
        let x = normals(N * 3 * HEIGHT * WIDTH, 1, 1.0);
        let mut b = self.backend(Normalization::Eval);
        let tx = b.upload([N, HEIGHT, WIDTH, 3], &transpose(&x, 3, HEIGHT * WIDTH));
        let sigma = b.upload([N, 1, 1, 1], &Self::sigmas());
        let mut activations = Vec::new();
        let (d, raw, _) = self.net.denoise_probed(&mut b, &tx, &sigma, None, &mut |name, t| {
            activations.push((format!("odd.act.{name}"), t.clone()));
        });
        let (_, logvar) = self.net.logvar(&mut b, &sigma);
        let gain = f64::from(self.weights[self.net.out_gain().0][0]);
        let raw = b.linear_combination(&[(&raw, gain)]);
        let mut tensors = vec![
            ("odd.x".to_owned(), shape.clone(), x),
            ("odd.sigma".to_owned(), vec![N], Self::sigmas().to_vec()),
            ("odd.logvar".to_owned(), vec![N, 1, 1, 1], b.download(&logvar).unwrap()),
        ];
        let results = [("odd.D_x".to_owned(), d), ("odd.F_x".to_owned(), raw)];
        for (name, t) in results.into_iter().chain(activations) {
            let [n, h, w, c] = b.shape(&t);
            tensors.push((name, vec![n, c, h, w], transpose(&b.download(&t).unwrap(), h * w, c)));
        }
        self.write("tiny_model.safetensors", &self.parameters("", |id| self.weights[id].clone()));
        self.write("tiny_forward.safetensors", &tensors);
    }

    /// A training step; with `gradients` only, or the whole of it.
    fn step(&self, prefix: &str) -> (Cpu<f64>, Tensors) {
        let shape = vec![N, 3, HEIGHT, WIDTH];
        let len = 3 * HEIGHT * WIDTH;
        let (clean, noise) = (normals(N * len, 2, 1.0), normals(N * len, 3, 1.0));
        let noisy = clean.iter().zip(&noise).enumerate().map(|(i, (x, n))| x + Self::sigmas()[i / len] * n);
        let noisy: Vec<f32> = noisy.collect();
        let mut b = self.backend(Normalization::Train { rounds: 1 });
        let upload = |b: &mut Cpu<f64>, x: &[f32]| b.upload([N, HEIGHT, WIDTH, 3], &transpose(x, 3, HEIGHT * WIDTH));
        let (tclean, tnoisy) = (upload(&mut b, &clean), upload(&mut b, &noisy));
        let sigma = b.upload([N, 1, 1, 1], &Self::sigmas());
        let pass = self.net.train_forward(&mut b, &tclean, &tnoisy, &sigma, None, None);
        let d = b.precond_output(&tnoisy, &pass.raw, &sigma, self.net.out_gain(), self.config.sigma_data);
        let d = transpose(&b.download(&d).unwrap(), HEIGHT * WIDTH, 3);
        let logvar = b.download(&pass.logvar).unwrap();
        let data = self.config.sigma_data;
        let loss = d.iter().zip(&clean).enumerate().map(|(i, (d, x))| {
            let (sigma, logvar) = (f64::from(Self::sigmas()[i / len]), f64::from(logvar[i / len]));
            let weight = (sigma * sigma + data * data) / (sigma * data).powi(2);
            (weight / logvar.exp() * f64::from(d - x).powi(2) + logvar) as f32
        });
        let loss: Vec<f32> = loss.collect();
        self.net.backward(&mut b, pass, &mut |_, _| {});
        let tensors = vec![
            (format!("{prefix}images"), shape.clone(), clean),
            (format!("{prefix}noise_unit"), shape.clone(), noise),
            (format!("{prefix}sigma"), vec![N, 1, 1, 1], Self::sigmas().to_vec()),
            ("loss_elem".to_owned(), shape, loss),
        ];
        (b, tensors)
    }

    fn training(&self) {
        let step = OptimizerStep {
            lr: 0.01,
            betas: (0.9, 0.99),
            eps: 1e-8,
            step: 1,
            grad_scale: 1.0 / N as f64,
            rounds: 1,
            ema_betas: &[0.8],
        };
        for (name, prefix) in [("tiny_grads.safetensors", ""), ("tiny_train_step1.safetensors", "data.")] {
            let (mut b, mut tensors) = self.step(prefix);
            b.optimizer_step(&step).unwrap();
            let slots =
                [("grad.", Slot::Grad), ("weight.", Slot::Weight), ("ema075.", Slot::Ema(0)), ("adam_v.", Slot::AdamV)];
            let slots = if prefix.is_empty() { &slots[..1] } else { &slots };
            for (prefix, slot) in slots {
                let mut values = HashMap::new();
                for (id, _) in self.table.iter() {
                    values.insert(id.0, b.read_param(*slot, id).unwrap());
                }
                tensors.extend(self.parameters(prefix, |id| values[&id].clone()));
            }
            self.write(name, &tensors);
        }
        self.write("tiny_train_init.safetensors", &self.parameters("", |id| self.weights[id].clone()));
        let settings = json!({
            "adam": {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}, "P_mean": -0.4, "P_std": 1.0,
            "ema_stds": [0.075], "steps": [{"lr": 0.01, "ema_betas": [0.8]}, {"lr": 0.01, "ema_betas": [0.8]}],
        });
        std::fs::write(self.dir.join("tiny_train.json"), settings.to_string()).unwrap();
    }

    /// What float32 does to such networks: 1e-6 forward, a few times that in gradients.
    fn tolerances(&self) {
        let entry = json!({"rel_l2": 1e-6});
        let gradient = json!({"rel_l2": 5e-6});
        let mut train = serde_json::Map::new();
        for (_, spec) in self.table.iter() {
            for kind in ["grad", "weight", "ema075", "adam_v"] {
                train.insert(format!("{kind}.{}", spec.name), gradient.clone());
            }
        }
        train.insert("loss_elem".into(), entry.clone());
        let forward = ["odd.D_x", "odd.F_x", "odd.logvar"].map(|name| (name.to_owned(), entry.clone()));
        let mut forward: serde_json::Map<_, _> = forward.into_iter().collect();
        for block in ["enc", "dec"] {
            for name in ["32x32_block0", "16x16_down", "16x16_block0", "8x8_down", "8x8_block0"] {
                forward.insert(format!("odd.act.{block}.{name}"), entry.clone());
            }
        }
        let all = json!({
            "tiny_forward.safetensors": forward,
            "tiny_grads.safetensors": train,
            "tiny_train_step1.safetensors": train,
        });
        std::fs::write(self.dir.join("tolerances.json"), all.to_string()).unwrap();
    }
}

#[test]
fn another_network_is_replayed_and_a_wrong_number_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let maker = Maker::new(dir.path());
    maker.forward();
    maker.training();
    maker.tolerances();
    assert_all_ok(dir.path(), 200);

    let verify = || here(&["verify"]).arg(dir.path()).assert();
    let out = printed(verify());
    assert!(out.contains("skip samplers.safetensors: samplers.safetensors is absent"), "{out}");
    assert!(out.contains("skip tiny_train_step2.safetensors"), "{out}");

    // One gradient in one place, by a part in ten thousand of the largest.
    let name = "grad.unet.dec.16x16_up.conv_res1.weight";
    let mut tensors = maker.read("tiny_grads.safetensors");
    falsify(&mut tensors, name, 17, 3e-4);
    maker.write("tiny_grads.safetensors", &tensors);
    let (summary, outcomes) = replay(dir.path());
    assert_eq!(summary.failed, 1);
    let failed = outcomes.iter().find(|outcome| matches!(outcome, Finding::Check(check) if !check.ok)).unwrap();
    let Finding::Check(check) = failed else { unreachable!() };
    assert_eq!(check.name, format!("tiny_grads/{name}"));
    assert_eq!(check.worst.as_ref().unwrap().index, [0, 1, 2, 2]);
    let out = verify().code(1);
    let out = String::from_utf8_lossy(&out.get_output().stdout).into_owned();
    assert!(out.contains(&format!("FAIL tiny_grads/{name}")), "{out}");
}

/// Adds to one value a share of its tensor's norm.
fn falsify(tensors: &mut Tensors, name: &str, at: usize, share: f32) {
    let wrong = tensors.iter_mut().find(|t| t.0 == name).unwrap();
    let norm = wrong.2.iter().map(|x| x * x).sum::<f32>().sqrt();
    wrong.2[at] += share * norm;
}

/// A large tensor may not be wrong by what the precision allows at most, if the official code is better; a sum that it
/// loses itself may be wrong by more.
#[test]
fn sixteen_bits_are_bounded_by_what_the_official_code_loses() {
    let dir = tempfile::tempdir().unwrap();
    let maker = Maker::new(dir.path());
    maker.forward();
    maker.training();
    maker.tolerances();
    let (large, sum) = ("grad.unet.dec.16x16_up.conv_res1.weight", "grad.unet.enc.16x16_down.emb_gain");
    let mut tensors = maker.read("tiny_grads.safetensors");
    falsify(&mut tensors, large, 17, 0.01);
    falsify(&mut tensors, sum, 0, 0.05);
    maker.write("tiny_grads.safetensors", &tensors);
    let fails = |precision, expected: &[&str]| {
        let (_, outcomes) = replay_within(dir.path(), Bounds::of(precision));
        let expected: Vec<String> = expected.iter().map(|name| format!("tiny_grads/{name}")).collect();
        assert_eq!(failures(&outcomes), expected);
    };
    fails(Precision::F16, &[sum]);
    maker.tolerate(large, json!({"rel_l2": 5e-6, "f16": 2e-3, "bf16": 1e-2}));
    fails(Precision::F16, &[sum, large]);
    maker.tolerate(sum, json!({"rel_l2": 5e-6, "f16": 1e-2, "bf16": 2e-3}));
    fails(Precision::F16, &[large]);
    maker.tolerate(large, json!({"rel_l2": 5e-6, "f16": 4e-3}));
    fails(Precision::F16, &[]);
    fails(Precision::Bf16, &[sum]);
}

/// The reference's own float32 loses more of a sum with cancellation than any contract allows.
#[test]
fn a_sum_that_the_reference_loses_may_be_lost() {
    let dir = tempfile::tempdir().unwrap();
    let maker = Maker::new(dir.path());
    maker.forward();
    maker.training();
    maker.tolerances();
    let sum = "grad.unet.enc.16x16_down.emb_gain";
    let mut tensors = maker.read("tiny_grads.safetensors");
    falsify(&mut tensors, sum, 0, 5e-4);
    maker.write("tiny_grads.safetensors", &tensors);
    assert_eq!(failures(&replay(dir.path()).1), [format!("tiny_grads/{sum}")]);
    maker.tolerate(sum, json!({"rel_l2": 1e-4}));
    assert_eq!(failures(&replay(dir.path()).1), Vec::<&str>::new());
}

/// What is known of a whole gradient holds for its first rows in proportion to the whole, not to them.
#[test]
fn rows_smaller_than_the_rest_may_lose_what_the_rest_loses() {
    let dir = tempfile::tempdir().unwrap();
    let maker = Maker::new(dir.path());
    maker.forward();
    maker.training();
    maker.tolerances();
    let tensors = maker.read("tiny_grads.safetensors");
    let rms = |x: &[f32]| (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
    let row = |t: &(String, Vec<usize>, Vec<f32>)| t.2[..t.2.len() / t.1[0]].to_vec();
    // The one whose first row is smallest beside the rest.
    let large = tensors.iter().filter(|t| t.1.len() == 4 && t.0.starts_with("grad."));
    let share = |t: &&(String, Vec<usize>, Vec<f32>)| rms(&row(t)) / rms(&t.2);
    let least = large.min_by(|a, b| share(a).total_cmp(&share(b))).unwrap();
    assert!(share(&least) < 0.7, "{}", share(&least));
    let name = least.0.trim_start_matches("grad.");
    let bound = 10.0 * 5e-6;
    let mut values = row(least);
    let wrong = 0.9 * bound * rms(&least.2) * (values.len() as f32).sqrt();
    values[3] += wrong;
    let mut shape = least.1.clone();
    shape[0] = 1;
    let norm = rms(&least.2) * (least.2.len() as f32).sqrt();
    let mut changed: Tensors = tensors.iter().filter(|t| t.0 != least.0).cloned().collect();
    changed.push((format!("grad_rows.{name}"), shape, values));
    maker.write("tiny_grads.safetensors", &changed);
    assert_eq!(failures(&replay(dir.path()).1), [format!("tiny_grads/grad_rows.{name}")]);
    changed.push((format!("gradnorm.{name}"), vec![], vec![norm]));
    maker.write("tiny_grads.safetensors", &changed);
    assert_eq!(failures(&replay(dir.path()).1), Vec::<&str>::new());
}

#[test]
fn directories_that_cannot_be_replayed_are_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let says = |what: &str| {
        let err = refused(here(&["verify"]).arg(dir.path().join("set")).assert().code(1));
        assert!(err.contains(what) && err.lines().count() == 1, "{what}: {err}");
    };
    says("No such file");
    std::fs::create_dir(dir.path().join("set")).unwrap();
    says("no golden data in it");
    std::fs::write(dir.path().join("set/ops.safetensors"), [7; 9]).unwrap();
    says("ops.safetensors: not a whole safetensors file");
    let small = vec![
        ("conv3x3.x".to_owned(), vec![1, 2, 3, 3], vec![0.0; 18]),
        ("conv3x3.w".to_owned(), vec![4, 5, 3, 3], vec![0.0; 180]),
    ];
    write(&dir.path().join("set"), "ops.safetensors", &config(), &small);
    says("ops.safetensors: tensor conv3x3.x: found shape [1, 2, 3, 3], expected 5 channels");
}
