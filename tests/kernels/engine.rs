//! The whole engine, on a GPU if there is one, else on the emulator: the official numbers, training and sampling
//! against the CPU, plans, resuming, and too little memory.
#![cfg(any(feature = "emulator", feature = "cuda"))]

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use crate::common::normals::normals;
use crate::testbed;
use edm2k::Device;
use edm2k::backend::cpu::Cpu;
#[cfg(feature = "emulator")]
use edm2k::backend::gpu::emulated::{Build, Emulated, Emulator};
use edm2k::backend::gpu::engine::Gpu;
use edm2k::backend::gpu::launch::{Accum, ConvLoop, Math, Precision};
use edm2k::backend::gpu::runtime::{Imagined, Runtime};
#[cfg(feature = "emulator")]
use edm2k::backend::gpu::tensor::Tensor;
use edm2k::backend::gpu::tiles::Card;
use edm2k::backend::{Backend, BackendError, NetworkBackend, Normalization, Shape, Slot, TrainingBackend, Values};
#[cfg(feature = "emulator")]
use edm2k::collective::CollectiveError;
use edm2k::collective::{Alone, Collective};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::safetensors::{self, Dtype, SafeFile, TensorOut};
use edm2k::model::config::{Preset, preset};
use edm2k::model::{Config, ImageSpace, Model, ModelMeta, Precond};
use edm2k::params::ParamTable;
use edm2k::sample::{Batch, Sampler, SamplerConfig, Solver, SolverStep};
use edm2k::train::{self, DataIdentity, Event, Execution, Schedule, Settings, Splits, Status, Training};
use edm2k::verify::{Bounds, Finding, verify};

/// The GPU or the emulator, whichever is there, as a device.
fn device(runtime: Rc<dyn Runtime>, precision: Precision) -> Device {
    Device::of_runtime(Some(runtime)).with_math(precision.into())
}

fn assert_verified(dir: &Path, precision: Precision, at_least: usize) {
    let Some(runtime) = testbed::runtime() else { return };
    let mut failed = Vec::new();
    let summary = verify(dir, &device(runtime, precision), Bounds::of(precision), &mut |outcome| {
        if matches!(outcome, Finding::Check(check) if !check.ok) {
            failed.push(outcome.to_string());
        }
    });
    assert!(failed.is_empty(), "{precision:?}:\n{}", failed.join("\n"));
    let ok = summary.unwrap().ok;
    assert!(ok >= at_least, "only {ok} checks");
}

/// On a GPU all of them. The emulator replays one of the three recorded samplings: all would take two minutes.
#[test]
fn f16_reproduces_the_official_numbers() {
    let golden = Path::new("tests/golden");
    if testbed::on_gpu().is_some() {
        return assert_verified(golden, Precision::F16, 1000);
    }
    let dir = tempfile::tempdir().unwrap();
    for file in golden.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let samplings = SafeFile::open(golden.join("samplers.safetensors")).unwrap();
    let kept = samplings.names().filter(|name| name.starts_with("dpmpp2m_g5.") || !name.contains('.'));
    let of = |name| -> TensorOut {
        (name, samplings.dtype(name).unwrap(), samplings.shape(name).unwrap(), samplings.bytes(name).unwrap())
    };
    let kept: Vec<_> = kept.map(of).collect();
    assert_eq!(kept.len(), 8);
    safetensors::write(dir.path().join("samplers.safetensors"), &kept, samplings.metadata()).unwrap();
    assert_verified(dir.path(), Precision::F16, 1000);
}

/// A network that nobody tuned a bound to. Its sums with cancellation are bounded by what the official code loses of them.
#[test]
fn both_precisions_reproduce_the_official_numbers_of_an_odd_network() {
    for precision in [Precision::F16, Precision::Bf16] {
        assert_verified(Path::new("tests/golden_odd"), precision, 300);
    }
}

/// Operations, blocks, gradients and a step: the rest differs from f16 by nothing but the type. In the step there is a
/// sum of which the official code loses 15 %.
#[test]
fn bf16_reproduces_the_official_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "configs.json",
        "ops.safetensors",
        "ops_blocks.safetensors",
        "tiny_model.safetensors",
        "tiny_grads.safetensors",
        "tiny_train.json",
        "tiny_train_init.safetensors",
        "tiny_train_step1.safetensors",
        "tolerances.json",
    ] {
        std::fs::copy(Path::new("tests/golden").join(name), dir.path().join(name)).unwrap();
    }
    assert_verified(dir.path(), Precision::Bf16, 400);
}

/// Skip connections of 12 channels: the kernels want multiples of 8.
#[test]
fn a_network_that_the_kernels_do_not_take_is_skipped_and_the_rest_replayed() {
    let Some(runtime) = testbed::runtime() else { return };
    let dir = tempfile::tempdir().unwrap();
    let config: Config = serde_json::from_value(serde_json::json!({
        "img_resolution": 32, "img_channels": 4, "label_dim": 0, "model_channels": 12, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 24,
    }))
    .unwrap();
    let (_, table) = Precond::new(&config).unwrap();
    let zeros = |shape: &[usize]| vec![0u8; 4 * shape.iter().product::<usize>()];
    let write = |name: &str, tensors: &[(String, Vec<usize>)]| {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| zeros(shape)).collect();
        let out: Vec<TensorOut> =
            tensors.iter().zip(&bytes).map(|((name, shape), b)| (&name[..], Dtype::F32, &shape[..], &b[..])).collect();
        let metadata = HashMap::from([("config".to_owned(), serde_json::to_string(&config).unwrap())]);
        safetensors::write(dir.path().join(name), &out, &metadata).unwrap();
    };
    let parameters: Vec<_> = table.iter().map(|(_, spec)| (spec.name.clone(), spec.shape.clone())).collect();
    write("tiny_model.safetensors", &parameters);
    let images = vec![1, 4, 16, 16];
    let inputs = [("a.x", images.clone()), ("a.sigma", vec![1]), ("a.D_x", images.clone()), ("a.F_x", images)];
    write("tiny_forward.safetensors", &inputs.map(|(name, shape)| (name.to_owned(), shape)));
    for name in ["ops.safetensors", "precond.json"] {
        std::fs::copy(Path::new("tests/golden").join(name), dir.path().join(name)).unwrap();
    }
    let mut skipped = Vec::new();
    let precision = Precision::F16;
    let summary = verify(dir.path(), &device(runtime, precision), Bounds::of(precision), &mut |outcome| {
        if let Finding::Skip { name, why } = outcome {
            skipped.push(format!("{name}: {why}"));
        }
    });
    let summary = summary.unwrap();
    assert!(summary.ok > 60 && summary.failed == 0, "{summary:?}");
    assert!(skipped.iter().any(|line| line.contains("the network does not fit the kernels")), "{skipped:?}");
}

// ---- training -----------------------------------------------------------------------------------

/// A small network for the demo's images.
fn config(data: &Dataset) -> Config {
    let json = serde_json::json!({
        "img_resolution": 32, "img_channels": 3, "label_dim": data.condition_dim(), "model_channels": 16,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16], "channels_per_head": 16,
    });
    serde_json::from_value(json).unwrap()
}

fn emoji() -> Dataset {
    Dataset::open(Path::new("tests/data/emoji"), Split::Train).unwrap()
}

fn settings(data: &Dataset, batch: u64, duration: u64) -> Settings {
    Settings {
        config: config(data),
        data: DataIdentity::of(data),
        init: None,
        seed: 3,
        duration,
        batch,
        lr: 0.01,
        schedule: Schedule::Edm2,
        decay: 0.0,
        rampup: 4 * batch,
        p_mean: -0.4,
        p_std: 1.0,
        ema: vec![0.05, 0.1],
        cond_dropout: 0.1,
        cond_dropout_from: 0,
        flip: false,
        dropout: 0.0,
    }
}

/// Trains; what each step reported.
fn run<B: TrainingBackend>(backend: &mut B, outdir: &Path, settings: &Settings, batch_gpu: u64) -> Vec<Status> {
    run_telling(backend, outdir, settings, batch_gpu, &mut |_| {}, &mut Alone)
}

/// The same, and everything else that it says.
fn run_telling<B: TrainingBackend>(
    backend: &mut B,
    outdir: &Path,
    settings: &Settings,
    batch_gpu: u64,
    tell: &mut dyn FnMut(Event),
    ranks: &mut dyn Collective,
) -> Vec<Status> {
    let data = emoji();
    let mut model = Model::init(&settings.config, settings.seed).unwrap();
    model.meta = ModelMeta { height: 32, width: 32, encoder: ImageSpace::Rgb, ..model.meta };
    let execution = Execution {
        outdir: outdir.into(),
        batch_gpu,
        status: 1,
        validate: 0,
        grid: 0,
        tensorboard: false,
        snapshot: 0,
        checkpoint: 0,
        keep: 1,
        keep_rampup: false,
        restart: false,
        computed_on: String::new(),
    };
    let mut seen = Vec::new();
    let splits = Splits { train: &data, validation: None };
    let mut event = |event: Event| match event {
        Event::Status(status) => seen.push(status.clone()),
        other => tell(other),
    };
    let stop = AtomicBool::new(false);
    let (execution, stop, event) = (&execution, &stop, &mut event);
    let training = Training { model, settings, execution, splits, show: None, stop, event, ranks };
    train::train(backend, training).unwrap();
    seen
}

fn gpu(runtime: &Rc<dyn Runtime>, settings: &Settings) -> Gpu {
    let table = edm2k::model::Precond::new(&settings.config).unwrap().1;
    Gpu::for_training(runtime.clone(), Precision::F16, &table, settings.ema.len()).unwrap()
}

#[test]
fn fifty_steps_lose_as_on_the_cpu() {
    let Some(runtime) = testbed::runtime() else { return };
    let (data, batch) = (emoji(), 2);
    let settings = settings(&data, batch, 50 * batch);
    let table = edm2k::model::Precond::new(&settings.config).unwrap().1;
    let dir = tempfile::tempdir().unwrap();
    let mut cpu = Cpu::<f32>::for_training(&table, 2);
    let expected = run(&mut cpu, &dir.path().join("cpu"), &settings, batch);
    let found = run(&mut gpu(&runtime, &settings), &dir.path().join("gpu"), &settings, batch);
    assert_eq!((found.len(), expected.len()), (50, 50));
    assert!(expected[49].loss < 0.7 * expected[0].loss, "nothing was learned: {:?}", expected[49]);
    for (found, expected) in found.chunks(10).zip(expected.chunks(10)) {
        let mean = |steps: &[Status]| steps.iter().map(|s| s.loss).sum::<f64>() / steps.len() as f64;
        let (found_loss, expected_loss) = (mean(found), mean(expected));
        let off = (found_loss / expected_loss - 1.0).abs();
        assert!(off < 0.01, "{found_loss} instead of {expected_loss} up to step {}", expected[9].step);
        assert!(found.iter().all(|s| s.nonfinite == 0));
    }
}

/// Channels in multiples of 64, as in every published network: what the lean loop, sums in two levels and Hopper's loop take.
#[test]
fn every_loop_trains_as_the_cpu_does() {
    let Some(runtime) = testbed::runtime() else { return };
    let (data, batch, steps) = (emoji(), 2, 2);
    let json = serde_json::json!({
        "img_resolution": 32, "img_channels": 3, "label_dim": data.condition_dim(), "model_channels": 64,
        "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 64,
    });
    let settings = Settings {
        config: serde_json::from_value(json).unwrap(),
        dropout: 0.2,
        ..settings(&data, batch, steps as u64 * batch)
    };
    let table = edm2k::model::Precond::new(&settings.config).unwrap().1;
    let dir = tempfile::tempdir().unwrap();
    let mut cpu = Cpu::<f32>::for_training(&table, 2);
    let expected = run(&mut cpu, &dir.path().join("cpu"), &settings, batch);
    let hopper = (runtime.card().capability == 90).then_some((Accum::F32, ConvLoop::Wgmma));
    for (accum, conv_loop) in [(Accum::F32, ConvLoop::Mma), (Accum::F16x2, ConvLoop::Mma)].into_iter().chain(hopper) {
        let math = Math { precision: Precision::F16, accum: Some(accum), conv_loop: Some(conv_loop) };
        let mut gpu = Gpu::for_training(runtime.clone(), math, &table, 2).unwrap();
        let found = run(&mut gpu, &dir.path().join(format!("{accum:?} {conv_loop:?}")), &settings, batch);
        assert_eq!((found.len(), expected.len()), (steps, steps));
        for (found, expected) in found.iter().zip(&expected) {
            let off = (found.loss / expected.loss - 1.0).abs();
            assert!(off < 0.01, "{math:?}: {} instead of {} in step {}", found.loss, expected.loss, expected.step);
            assert_eq!(found.nonfinite, 0);
        }
    }
}

/// As on cards that let a launch begin while the one before it ends: the checked kernels see that each waits for that one
/// before it touches what that one wrote. Forward, backward, a step, samples; both loops.
#[cfg(feature = "emulator")]
#[test]
fn the_launches_of_every_plan_wait_for_each_other() {
    let checked: Rc<dyn Runtime> = Rc::new(Emulated::new(Emulator::new(Build::Checked).unwrap(), u64::MAX));
    let data = emoji();
    let json = serde_json::json!({
        "img_resolution": 32, "img_channels": 3, "label_dim": data.condition_dim(), "model_channels": 64,
        "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [16], "channels_per_head": 64,
    });
    let config: Config = serde_json::from_value(json).unwrap();
    let settings = Settings { config, dropout: 0.2, ..settings(&data, 1, 1) };
    let mut model = Model::init(&settings.config, 3).unwrap();
    model.meta = ModelMeta { height: 32, width: 32, encoder: ImageSpace::Rgb, ..model.meta };
    let dir = tempfile::tempdir().unwrap();
    for conv_loop in [ConvLoop::Mma, ConvLoop::Wgmma] {
        let math = Math { precision: Precision::F16, accum: Some(Accum::F32), conv_loop: Some(conv_loop) };
        let mut gpu = Gpu::for_training(checked.clone(), math, &model.table, 2).unwrap();
        run(&mut gpu, &dir.path().join(format!("{conv_loop:?}")), &settings, 1);
        let mut gpu = loaded(Gpu::for_sampling(checked.clone(), math, &model.table).unwrap(), &model);
        let mut sampler = Sampler { backend: &mut gpu, net: &model.net, gnet: None };
        let labels = vec![0.1; settings.config.label_dim];
        let batch = Batch { labels: &labels, seeds: &[7], size: [16, 8], ..Batch::default() };
        sampler.run(&batch, &SamplerConfig { steps: 2, ..SamplerConfig::default() }, None).unwrap();
    }
}

#[test]
fn a_resumed_run_ends_in_the_same_bits() {
    let Some(runtime) = testbed::runtime() else { return };
    let data = emoji();
    let dir = tempfile::tempdir().unwrap();
    // Three images in micro-batches of two: plans for two sizes. After one step averages are the weights, so it stops later.
    let [half, whole] = [6, 12].map(|duration| Settings { dropout: 0.25, ..settings(&data, 3, duration) });
    run(&mut gpu(&runtime, &half), &dir.path().join("resumed"), &half, 2);
    run(&mut gpu(&runtime, &whole), &dir.path().join("resumed"), &whole, 2);
    run(&mut gpu(&runtime, &whole), &dir.path().join("straight"), &whole, 2);
    let weights = |run: &str| {
        let path = dir.path().join(run).join(train::files::checkpoint(12));
        let file = SafeFile::open(path).unwrap();
        let names: Vec<String> = file.names().filter(|&name| name != "checksums").map(str::to_owned).collect();
        assert!(names.len() > 100, "{names:?}");
        names.into_iter().map(|name| (file.f32(&name).unwrap(), name)).collect::<Vec<_>>()
    };
    for ((resumed, name), (straight, _)) in weights("resumed").into_iter().zip(weights("straight")) {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&resumed), bits(&straight), "{name}");
    }
}

// ---- sampling and plans --------------------------------------------------------------------------

fn loaded<B: NetworkBackend>(mut backend: B, model: &Model) -> B {
    model.load_into(&mut backend).unwrap();
    backend
}

fn demo() -> Model {
    Model::load(Path::new("demo/emoji.safetensors")).unwrap()
}

#[test]
fn a_sampled_image_is_the_cpu_s() {
    let Some(runtime) = testbed::runtime() else { return };
    let model = demo();
    let config = SamplerConfig { steps: 8, ..SamplerConfig::default() };
    let mut labels = vec![0.0; model.net.config.label_dim];
    labels[..3].fill(1.0);
    let size = [model.meta.height, model.meta.width];
    let batch = Batch { labels: &labels, seeds: &[7], size, ..Batch::default() };
    let mut cpu = loaded(Cpu::<f32>::for_sampling(&model.table), &model);
    let expected = Sampler { backend: &mut cpu, net: &model.net, gnet: None };
    let expected = { expected }.run(&batch, &config, None).unwrap();
    let device = Gpu::for_sampling(runtime, Precision::F16, &model.table).unwrap();
    let mut device = loaded(device, &model);
    let found = Sampler { backend: &mut device, net: &model.net, gnet: None }.run(&batch, &config, None).unwrap();
    let error = found.iter().zip(&expected).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>() / found.len() as f64;
    // Pixels span -1 to 1.
    let psnr = 10.0 * (4.0 / error).log10();
    assert!(psnr >= 40.0, "{psnr:.1} dB");
    let cost = device.costs().next().unwrap();
    // Condition and no condition go through the network together.
    assert!((8 * 50..8 * 65).contains(&cost.launches), "{cost:?}");
}

/// What a card is asked for, of EDM2-XS at 64x88: counted, which needs no card.
#[test]
fn launches_of_a_picture() {
    let Preset { config, size, .. } = preset("1girl-xs").unwrap();
    let (net, table) = Precond::new(&config).unwrap();
    let runtime = Rc::new(Imagined::new(Card::new(128, 89)));
    let launches = |steps: usize, guidance: f64| {
        let mut gpu = Gpu::for_sampling(runtime.clone(), Precision::F16, &table).unwrap();
        let config = SamplerConfig { steps, guidance, ..SamplerConfig::default() };
        let labels = vec![0.1; net.config.label_dim];
        let batch = Batch { labels: &labels, seeds: &[7], size, ..Batch::default() };
        Sampler { backend: &mut gpu, net: &net, gnet: None }.run(&batch, &config, None).unwrap();
        gpu.costs().next().unwrap().launches
    };
    // The scales of all steps: the embedding and one product.
    let ahead = 2;
    // Of each block two convolutions, 36; skips of another width in the encoder, 3, those of the decoder being part of the
    // second convolution; attention with its convolutions, 15; norms in the encoder, 15; enlarged maps, 3; the first and the
    // last convolution, and what is before and after the network.
    let forward = 2 * 36 + 3 + 3 * 15 + 15 + 3 + 2 + 2;
    for guidance in [1.0, 5.0] {
        // A step is one forward pass, guided or not, and its update.
        assert_eq!(launches(1, guidance), ahead + forward + 1);
        assert_eq!(launches(16, guidance), ahead + 16 * (forward + 1));
    }
}

#[test]
fn step_by_step_is_what_one_plan_computes() {
    let Some(runtime) = testbed::runtime() else { return };
    let model = demo();
    let mut labels = vec![0.0; model.net.config.label_dim];
    labels[..3].fill(0.5);
    let size = [model.meta.height, model.meta.width];
    let batch = Batch { labels: &labels, seeds: &[7], size, ..Batch::default() };
    let [mut device, mut other] =
        [(); 2].map(|()| loaded(Gpu::for_sampling(runtime.clone(), Precision::F16, &model.table).unwrap(), &model));

    let config = SamplerConfig { steps: 2, ..SamplerConfig::default() };
    let mut sampler = Sampler { backend: &mut device, net: &model.net, gnet: None };
    let whole = sampler.run(&batch, &config, None).unwrap();
    let mut steps = 0;
    let mut count = |_: &mut Gpu, _: SolverStep<_>| {
        steps += 1;
        Ok(())
    };
    let observed = sampler.run(&batch, &config, Some(&mut count)).unwrap();
    assert_eq!(steps, 2);
    assert!(observed == whole);

    // Guided by itself, a network goes where it goes alone.
    let alone = SamplerConfig { guidance: 1.0, ..config.clone() };
    let alone = sampler.run(&batch, &alone, None).unwrap();
    let gnet = Some((&mut other, &model.net));
    let mut guided = Sampler { backend: &mut device, net: &model.net, gnet };
    let guided = guided.run(&batch, &config, None).unwrap();
    // 5 d - 4 d rounds in f32, and the next evaluation rounds its input to f16.
    let worst = alone.iter().zip(&guided).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-2, "{worst}");
}

/// What a body reports comes out of the plan, and nothing is left of it.
#[test]
fn a_plan_whose_body_fails_is_none() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Key;
    let Some(runtime) = testbed::runtime() else { return };
    let mut device = Gpu::for_sampling(runtime, Precision::F16, &ParamTable::default()).unwrap();
    let x = device.upload([1, 1, 1, 8], &[1.0; 8]);
    let refused = device.planned::<BackendError>(&Key, std::slice::from_ref(&x), &mut |b, t| {
        b.linear_combination(&[(&t[0], 2.0)]);
        Err(BackendError::NotTraining(Slot::Grad))
    });
    assert!(matches!(refused, Err(BackendError::NotTraining(Slot::Grad))));
    let twice = &mut |b: &mut Gpu, t: &[_]| Ok(vec![b.linear_combination(&[(&t[0], 2.0)])]);
    let made = device.planned::<BackendError>(&Key, &[x], twice).unwrap();
    assert_eq!(device.download(&made[0]).unwrap(), [2.0; 8]);
}

/// Condition and no condition go through the network as one batch; a batch of two and two of one choose other tiles, so the
/// parts of a sum are others.
#[test]
fn a_guided_batch_is_its_two_halves() {
    let Some(runtime) = testbed::runtime() else { return };
    let model = demo();
    let mut device = loaded(Gpu::for_sampling(runtime, Precision::F16, &model.table).unwrap(), &model);
    let (c, dim) = (model.net.config.img_channels, model.net.config.label_dim);
    let shape: Shape = [1, model.meta.height, model.meta.width, c];
    let mut x = vec![0.0; shape.iter().product()];
    edm2k::rng::Stream::new(7, edm2k::rng::Purpose::SampleNoise, 0).normals(&mut x);
    let mut labels = vec![0.0; dim];
    labels[..3].fill(0.5);
    let batch = Batch { labels: &labels, seeds: &[7], size: [shape[1], shape[2]], ..Batch::default() };
    // A single Euler step to 0 is the guided denoised image.
    let config = SamplerConfig { steps: 1, solver: Solver::Euler, sigma_max: 2.0, ..SamplerConfig::default() };
    let mut sampler = Sampler { backend: &mut device, net: &model.net, gnet: None };
    let together = sampler.run(&batch, &config, None).unwrap();
    x.iter_mut().for_each(|x| *x *= 2.0);
    let inputs = [(shape, &x[..]), ([1; 4], &[2.0][..]), ([1, 1, 1, dim], &labels[..])];
    let t = inputs.map(|(shape, values)| device.upload(shape, values));
    let [with, without] = [&t[..], &t[..2]].map(|inputs| {
        let made = model.net.planned(&mut device, inputs).unwrap();
        device.download(&made).unwrap()
    });
    let g = config.guidance as f32;
    let apart: Vec<f32> = with.iter().zip(&without).map(|(d, r)| g * d + (1.0 - g) * r).collect();
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let off = square(&mut together.iter().zip(&apart).map(|(x, y)| x - y)) / square(&mut apart.iter().copied());
    // Guidance multiplies what f16 rounds by five.
    assert!(off < 5.0 * 2e-3, "{off}");
    let moved = square(&mut with.iter().zip(&without).map(|(x, y)| x - y)) / square(&mut with.iter().copied());
    assert!(moved > 10.0 * off, "a condition moves by {moved}, the batches differ by {off}");
}

#[test]
fn a_replayed_plan_computes_what_its_operations_do_at_once() {
    let Some(runtime) = testbed::runtime() else { return };
    let model = demo();
    let device = Gpu::for_sampling(runtime, Precision::F16, &model.table).unwrap();
    let mut device = loaded(device, &model);
    let (c, dim) = (model.net.config.img_channels, model.net.config.label_dim);
    // Another batch in between makes the workspace grow and the first plan anew.
    let mut runs = Vec::new();
    for (n, seed) in [(1, 1u64), (3, 2), (1, 3), (3, 4), (1, 1)] {
        let shape: Shape = [n, 16, 8, c];
        let mut x = vec![0.0; n * 16 * 8 * c];
        edm2k::rng::Stream::new(seed, edm2k::rng::Purpose::SampleNoise, 0).normals(&mut x);
        let sigma: Vec<f32> = (0..n).map(|i| 0.3 + i as f32).collect();
        let labels = vec![0.02; n * dim];
        let inputs = [(shape, &x[..]), ([n, 1, 1, 1], &sigma[..]), ([n, 1, 1, dim], &labels[..])];
        let t = inputs.map(|(shape, values)| device.upload(shape, values));
        let made = model.net.planned(&mut device, &t).unwrap();
        let found = device.download(&made).unwrap();
        let expected = model.net.denoise(&mut device, &t[0], &t[1], Some(&t[2]));
        let expected = device.download(&expected).unwrap();
        // In a plan the activation is of what a kernel computed, else of that rounded to 16 bits.
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&mut found.iter().zip(&expected).map(|(x, y)| x - y)) / norm(&mut expected.iter().copied());
        assert!(error < 2e-3, "batch {n}, seed {seed}: {error:e}");
        runs.push((n, seed, found));
    }
    assert_eq!(runs[0], runs[4], "the same inputs, after other batches");
}

// ---- ranks --------------------------------------------------------------------------------------

/// One of two ranks that are given the same: a sum is twice a value.
#[cfg(feature = "emulator")]
#[derive(Default)]
struct Twins {
    /// The bytes of what was summed, in their order.
    sums: Vec<std::ops::Range<usize>>,
}

#[cfg(feature = "emulator")]
impl Collective for Twins {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        2
    }

    fn all_reduce(&mut self, values: Values) -> Result<(), CollectiveError> {
        let Values::Device(memory, bytes) = values else { panic!("values on the host") };
        let mut copy = vec![0f32; bytes.len() / 4];
        memory.read(bytes.start, bytemuck::cast_slice_mut(&mut copy))?;
        copy.iter_mut().for_each(|x| *x *= 2.0);
        memory.write(bytes.start, bytemuck::cast_slice(&copy))?;
        self.sums.push(bytes);
        Ok(())
    }

    fn broadcast(&mut self, _: Values) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![own.to_vec(); 2])
    }
}

/// The bits of a portion's gradients, and where they lie if that is in device memory.
fn gradients<B: TrainingBackend>(b: &mut B, portion: usize) -> (Vec<u32>, Option<std::ops::Range<usize>>) {
    let (mut bits, mut place) = (Vec::new(), None);
    let mut keep = |values: Values| match values {
        Values::Host(values) => bits.extend(values.iter().map(|x| x.to_bits())),
        Values::Device(memory, bytes) => {
            bits.resize(bytes.len() / 4, 0);
            memory.read(bytes.start, bytemuck::cast_slice_mut(&mut bits)).unwrap();
            place = Some(bytes);
        }
    };
    b.exchange(Slot::Grad, portion, &mut keep).unwrap();
    (bits, place)
}

/// What a pass says of gradients is true: nothing adds to them any more. The last pass of several, the only one, and one
/// that is replayed.
fn gradients_said_to_be_whole_are<B: TrainingBackend>(make: impl Fn() -> B, model: &Model) {
    let values = |n: usize, seed| normals(n, seed, 0.5);
    let inputs = |b: &mut B, [n, h, w]: [usize; 3]| {
        let (c, dim) = (model.net.config.img_channels, model.net.config.label_dim);
        let [clean, noisy] = [1, 2].map(|seed| b.upload([n, h, w, c], &values(n * h * w * c, seed)));
        let sigma = b.upload([n, 1, 1, 1], &vec![0.7; n]);
        let labels = Some(b.upload([n, 1, 1, dim], &values(n * dim, 3)));
        train::Inputs { clean, noisy, sigma, keys: None, labels }
    };
    let loaded = || {
        let mut b = make();
        model.upload(&mut b, Slot::Weight).unwrap();
        b.make_effective(Slot::Weight, Normalization::Train { rounds: 1 }).unwrap();
        b
    };
    let (odd, other) = ([3, 16, 8], [1, 8, 20]);
    for sizes in [&[odd][..], &[other, odd, other, odd]] {
        let (mut b, mut plain) = (loaded(), loaded());
        let (mut whole, mut said) = (Vec::new(), Vec::new());
        for (number, &size) in sizes.iter().enumerate() {
            let [own, theirs] = [&mut b, &mut plain].map(|b| inputs(b, size));
            train::shared_micro_batch(&mut b, &model.net, 0.0, own, &mut |b, done| {
                if number + 1 == sizes.len() {
                    let portions = b.portions().whole(done);
                    said.push(portions);
                    (whole.len()..portions).for_each(|portion| whole.push(gradients(b, portion)));
                }
            })
            .unwrap();
            train::micro_batch(&mut plain, &model.net, 0.0, theirs).unwrap();
        }
        let count = b.portions().ids().len();
        said.dedup();
        // Most of them before the pass is over, and the last one when it is.
        assert!(
            count >= 12 && said.len() > 6 && said[said.len() - 2] < count && whole.len() == count,
            "{said:?} of {count}"
        );
        let found: Vec<_> = (0..count).map(|portion| gradients(&mut b, portion)).collect();
        let late: Vec<_> = (0..count).filter(|&portion| found[portion] != whole[portion]).collect();
        assert!(late.is_empty(), "something was added to portions {late:?} of {count} when they had been called whole");
        assert!(found.iter().all(|(bits, _)| bits.iter().any(|&bits| f32::from_bits(bits) != 0.0)));
        // The same bits as in one piece, and all of them.
        assert!((0..count).all(|portion| gradients(&mut plain, portion) == found[portion]));
        let values = found.iter().map(|(bits, _)| bits.len()).sum::<usize>();
        let places: Option<Vec<_>> = found.into_iter().map(|(_, place)| place).collect();
        match places {
            None => assert_eq!(values, model.table.trained_values()),
            // From the end to the beginning, without a gap.
            Some(places) => {
                assert!(places.windows(2).all(|pair| pair[1].end == pair[0].start) && places[count - 1].start == 0);
                assert!(values >= model.table.trained_values());
            }
        }
    }
}

#[test]
fn gradients_that_are_said_to_be_whole_are() {
    let config = config(&emoji());
    let mut model = Model::init(&config, 4).unwrap();
    // With gains of zero most gradients would be zero.
    model.weights.iter_mut().filter(|values| values.len() == 1).for_each(|gain| gain[0] = 0.5);
    gradients_said_to_be_whole_are(|| Cpu::<f32>::for_training(&model.table, 0), &model);
    let Some(runtime) = testbed::runtime() else { return };
    gradients_said_to_be_whole_are(
        || Gpu::for_training(runtime.clone(), Precision::F16, &model.table, 0).unwrap(),
        &model,
    );
}

/// A card that has no room for four images goes on with two, and computes what a run computes that had two at first.
#[cfg(feature = "emulator")]
#[test]
fn a_run_that_runs_out_of_memory_goes_on_with_half() {
    let data = emoji();
    let settings = settings(&data, 4, 12);
    let (net, table) = edm2k::model::Precond::new(&settings.config).unwrap();
    let needed = |n: usize| {
        let card = Rc::new(Imagined::new(Card::new(4, 90)));
        let mut gpu = Gpu::for_training(card, Precision::F16, &table, 2).unwrap();
        train::rehearse(&mut gpu, &net, 0.0, [n, 32, 32]).unwrap();
        gpu.param_bytes() + gpu.costs().next().unwrap().workspace
    };
    let (two, four) = (needed(2), needed(4));
    let dir = tempfile::tempdir().unwrap();
    let on = |limit: u64| {
        let emulator = Emulator::new(Build::Normal).unwrap();
        let runtime: Rc<dyn Runtime> = Rc::new(Emulated::new(emulator, limit));
        Gpu::for_training(runtime, Precision::F16, &table, 2).unwrap()
    };
    let expected = run(&mut on(u64::MAX), &dir.path().join("two"), &settings, 2);
    // The same as one of two ranks with half of 8 images, whose sums come once for each portion, when the last images
    // have been taken, for which at first there is no room.
    let halved = Settings { batch: 8, duration: 8, ..settings.clone() };
    let mut twins = [Twins::default(), Twins::default()];
    let [all, less] = &mut twins;
    let all = run_telling(&mut on(u64::MAX), &dir.path().join("two-halved"), &halved, 2, &mut |_| {}, all);
    let mut notes = Vec::new();
    let mut note = |event: Event| {
        if let Event::Fewer(text) = event {
            notes.push(text);
        }
    };
    let limit = two + (four - two) / 2;
    let found = run_telling(&mut on(limit as u64), &dir.path().join("less"), &settings, 4, &mut note, &mut Alone);
    let found_halved = run_telling(&mut on(limit as u64), &dir.path().join("less-halved"), &halved, 4, &mut note, less);
    assert_eq!([&found, &expected, &found_halved, &all].map(Vec::len), [3, 3, 1, 1]);
    for Twins { sums } in twins {
        // Each value once, from the end to the beginning.
        assert!(sums.len() > 12 && sums[sums.len() - 1].start == 0, "{sums:?}");
        assert!(sums.windows(2).all(|pair| pair[1].end == pair[0].start), "{sums:?}");
    }
    for (found, expected) in found.iter().zip(&expected).chain(found_halved.iter().zip(&all)) {
        assert!((found.loss / expected.loss - 1.0).abs() < 1e-3, "{} instead of {}", found.loss, expected.loss);
    }
    assert!((found_halved[0].grad_norm / all[0].grad_norm - 1.0).abs() < 1e-3, "{:?} {:?}", found_halved[0], all[0]);
    let said: Vec<_> = notes.iter().filter(|note| note.contains("out of device memory")).collect();
    assert!(said.len() == 2 && said.iter().all(|said| said.ends_with("going on with 2 images at a time")), "{said:?}");
}

/// A plan that lacks what other plans hold gets it. Between them they ask for more than there is.
#[cfg(feature = "emulator")]
#[test]
fn plans_make_room_for_each_other() {
    let model = demo();
    let shape = [1, 64, 64, 8];
    let values = normals(64 * 64 * 8, 3, 1.0);
    // All of the terms are there at once, then their sum.
    let sum = |b: &mut Gpu, x: &[Tensor]| -> Result<Vec<Tensor>, BackendError> {
        let terms: Vec<_> = (1..=12).map(|i| b.linear_combination(&[(&x[0], f64::from(i))])).collect();
        let mut sum = x[0].clone();
        for term in &terms {
            sum = b.linear_combination(&[(&sum, 1.0), (term, 1.0)]);
        }
        Ok(vec![sum])
    };
    let multiples = |b: &mut Gpu, x: &[Tensor]| -> Result<Vec<Tensor>, BackendError> {
        Ok((1..=3).map(|i| b.linear_combination(&[(&x[0], f64::from(i))])).collect())
    };
    let both = |limit: u64| {
        let runtime = Rc::new(Emulated::new(Emulator::new(Build::Normal).unwrap(), limit));
        let mut gpu = Gpu::for_sampling(runtime.clone(), Precision::F16, &model.table)?;
        let (params, mut found) = (limit - runtime.free().unwrap_or_default(), Vec::new());
        let x = gpu.upload(shape, &values);
        for _ in 0..2 {
            let sums = gpu.planned(&"sum", std::slice::from_ref(&x), &mut sum.clone())?;
            found.push(gpu.download(&sums[0])?);
            drop(sums);
            let three = gpu.planned(&"multiples", std::slice::from_ref(&x), &mut multiples.clone())?;
            found.extend(three.iter().map(|made| gpu.download(made)).collect::<Result<Vec<_>, _>>()?);
        }
        let workspaces: Vec<u64> = gpu.costs().map(|cost| cost.workspace as u64).collect();
        Ok::<_, BackendError>((found, params, workspaces))
    };
    let (expected, params, workspaces) = both(1 << 40).unwrap();
    let [of_sum, of_multiples] = workspaces[..] else { panic!("{workspaces:?}") };
    let tensor = of_multiples / 4;
    assert!(of_sum >= 6 * tensor, "{of_sum} and {of_multiples} bytes");
    // Beside the larger workspace there is no room for an input and three results.
    let (found, ..) = both(params + of_sum + 3 * tensor).unwrap();
    assert_eq!(found, expected);
    assert!(both(params + of_sum / 2).is_err_and(|why| why.is_out_of_memory()));
}

#[cfg(feature = "emulator")]
#[test]
fn too_little_memory_is_an_error_that_says_what_to_lower() {
    use edm2k::backend::gpu::emulated::{Build, Emulated, Emulator};
    let runtime = |limit| Rc::new(Emulated::new(Emulator::new(Build::Normal).unwrap(), limit));
    let model = demo();
    let params = 8 << 20;
    let error = Gpu::for_sampling(runtime(params), Precision::F16, &model.table).err().unwrap().to_string();
    assert!(error.contains("out of device memory") && error.contains("parameters"), "{error}");

    let device = Gpu::for_sampling(runtime(24 << 20), Precision::F16, &model.table).unwrap();
    let mut device = loaded(device, &model);
    let mut sample = |images: u64| {
        let seeds: Vec<u64> = (0..images).collect();
        let mut sampler = Sampler { backend: &mut device, net: &model.net, gnet: None };
        let batch = Batch { seeds: &seeds, size: [32, 32], ..Batch::default() };
        sampler.run(&batch, &SamplerConfig { steps: 1, ..SamplerConfig::default() }, None)
    };
    let error = sample(64).unwrap_err().to_string();
    assert!(error.contains("activations") && error.contains("fewer images at a time"), "{error}");
    // The device is still of use.
    assert!(sample(1).is_ok());
}
