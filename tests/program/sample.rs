//! Sampling: the solvers against the official trajectories, and what an image may depend on.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::autoencoder;
use crate::common::close::assert_close;
use crate::common::command::edm2k;
use serde_json::{Value, json};

use edm2k::Device;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::{Backend, Shape};
use edm2k::codec::CodecFile;
use edm2k::condition::vae::{ConditionKind, LearningSettings, Rows, Vae};
use edm2k::condition::vocabulary::{Tag, Vocabulary, VocabularyError};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::npy;
use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::model::file::{ImageSpace, Model, Stored};
use edm2k::model::{Config, Precond};
use edm2k::params::ParamTable;
use edm2k::pictures::{Picture, png};
use edm2k::pipeline::{Beginning, Condition, ConditionError, Image, Pipeline, PipelineError, Request, Step as Seen};
use edm2k::rng::{Purpose, Stream};
use edm2k::sample::{Batch, Churn, Denoise, Guided, SampleError, Sampler, SamplerConfig, Solver, solve};

type T = <Cpu<f32> as Backend>::Tensor;

fn golden(name: &str) -> SafeFile {
    SafeFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

/// [k, n, c, h, w] in the file as k tensors [n, h, w, c].
fn nhwc(file: &SafeFile, name: &str) -> (Shape, Vec<Vec<f32>>) {
    let shape = file.shape(name).unwrap();
    let &[n, c, h, w] = &shape[shape.len() - 4..] else { panic!("{name}: {shape:?}") };
    let values = file.f32(name).unwrap();
    let one = |values: &[f32]| {
        let mut out = Vec::with_capacity(values.len());
        for image in values.chunks(c * h * w) {
            out.extend((0..h * w * c).map(|i| image[i % c * h * w + i / c]));
        }
        out
    };
    ([n, h, w, c], values.chunks(n * c * h * w).map(one).collect())
}

/// Answers with the recorded outputs of the official network, and checks what it is asked.
struct Replay {
    shape: Shape,
    d_cond: Vec<Vec<f32>>,
    d_uncond: Option<Vec<Vec<f32>>>,
    guidance: f64,
    /// Expected noise level and input of each evaluation.
    inputs: Vec<(f64, Vec<f32>)>,
    calls: usize,
}

/// Solvers do a handful of f32 operations a step; a wrong formula is off by 1e-2 and more.
const BOUND: f64 = 1e-5;

impl Denoise<Cpu<f32>> for Replay {
    fn denoise(&mut self, b: &mut Cpu<f32>, x: &T, sigma: f64) -> Result<Guided<T>, SampleError> {
        let i = self.calls;
        self.calls += 1;
        let (level, input) = &self.inputs[i];
        assert!((sigma - level).abs() <= 1e-6 * level, "evaluation {i} at sigma {sigma}, expected {level}");
        assert_close(&format!("input of evaluation {i}"), &b.download(x)?, input, BOUND);
        let d = b.upload(self.shape, &self.d_cond[i]);
        Ok(match &self.d_uncond {
            None => Guided::unguided(d),
            Some(d_uncond) => {
                let reference = b.upload(self.shape, &d_uncond[i]);
                Guided::new(d, reference, self.guidance)
            }
        })
    }
    fn noise(&mut self, _: &mut Cpu<f32>, step: usize) -> T {
        panic!("no churn was asked for, but noise for step {step} was")
    }
}

#[test]
fn heun_follows_the_official_trajectory() {
    let file = golden("samplers.safetensors");
    for (case, guidance) in [("heun_g1", 1.0), ("heun_g2", 2.0)] {
        let config = SamplerConfig { solver: Solver::Heun, steps: 8, guidance, ..SamplerConfig::default() };
        let levels = file.f64(&format!("{case}.t_steps")).unwrap();
        for (got, want) in config.sigmas().iter().zip(&levels) {
            assert!((got - want).abs() <= 1.2e-7 * want, "sigma {got}, expected {want}"); // one f32 ulp
        }
        let (shape, x) = nhwc(&file, &format!("{case}.x"));
        let x_euler = nhwc(&file, &format!("{case}.x_euler")).1;
        let mut inputs = Vec::new();
        for i in 0..8 {
            inputs.push((levels[i], x[i].clone()));
            inputs.extend(x_euler.get(i).map(|x| (levels[i + 1], x.clone())));
        }
        let d_cond = nhwc(&file, &format!("{case}.D_cond")).1;
        let d_uncond = (guidance != 1.0).then(|| nhwc(&file, &format!("{case}.D_uncond")).1);
        let mut replay = Replay { shape, d_cond, d_uncond, guidance, inputs, calls: 0 };
        let last = run(&mut replay, &config, &file);
        assert_eq!(replay.calls, 15);
        assert_close(case, &last, &x[8], BOUND);
    }
}

#[test]
fn dpmpp_2m_follows_the_official_trajectory() {
    let file = golden("samplers.safetensors");
    let config = SamplerConfig::default();
    let levels = file.f64("dpmpp2m_g5.sigmas").unwrap();
    for (got, want) in config.sigmas().iter().zip(&levels) {
        assert!((got - want).abs() <= 1e-13 * want, "sigma {got}, expected {want}");
    }
    let (shape, x) = nhwc(&file, "dpmpp2m_g5.x");
    let inputs = levels.iter().copied().zip(x.iter().cloned()).take(16).collect();
    let (d_cond, d_uncond) = (nhwc(&file, "dpmpp2m_g5.D_cond").1, nhwc(&file, "dpmpp2m_g5.D_uncond").1);
    let mut replay = Replay { shape, d_cond, d_uncond: Some(d_uncond), guidance: 5.0, inputs, calls: 0 };
    let last = run(&mut replay, &config, &file);
    assert_eq!(replay.calls, 16);
    assert_close("dpmpp2m_g5", &last, &x[16], BOUND);
}

/// Noise of the first noise level.
fn at_first_level(b: &mut Cpu<f32>, noise: &T, config: &SamplerConfig) -> T {
    b.linear_combination(&[(noise, config.sigmas()[0])])
}

fn run(replay: &mut Replay, config: &SamplerConfig, file: &SafeFile) -> Vec<f32> {
    let mut b = Cpu::<f32>::for_sampling(&ParamTable::default());
    let (shape, noise) = nhwc(file, "noise");
    let noise = b.upload(shape, &noise[0]);
    let noisy = at_first_level(&mut b, &noise, config);
    let x = solve(&mut b, replay, config, &noisy).unwrap();
    b.download(&x).unwrap()
}

/// Data drawn from N(0, s^2) has the exact denoiser x s^2 / (s^2 + sigma^2), and every path of the flow is
/// known: x(sigma) = x(sigma_max) sqrt((s^2 + sigma^2) / (s^2 + sigma_max^2)).
struct Gaussian {
    variance: f64,
    calls: usize,
}

impl Denoise<Cpu<f32>> for Gaussian {
    fn denoise(&mut self, b: &mut Cpu<f32>, x: &T, sigma: f64) -> Result<Guided<T>, SampleError> {
        self.calls += 1;
        let factor = self.variance / (self.variance + sigma * sigma);
        Ok(Guided::unguided(b.linear_combination(&[(x, factor)])))
    }
    fn noise(&mut self, b: &mut Cpu<f32>, step: usize) -> T {
        unit_noise(b, Purpose::Churn, step as u32)
    }
}

fn unit_noise(b: &mut Cpu<f32>, purpose: Purpose, step: u32) -> T {
    let mut values = vec![0.0; 1 << 14];
    Stream { seed: 5, purpose, step, image: 0 }.normals(&mut values);
    b.upload([1, 64, 64, 4], &values)
}

#[test]
fn solvers_converge_at_their_order_to_the_exact_path() {
    let mut b = Cpu::<f32>::for_sampling(&ParamTable::default());
    let noise = unit_noise(&mut b, Purpose::SampleNoise, 0);
    let start = b.download(&noise).unwrap();
    let variance: f64 = 0.25;
    let mut error = |solver, steps| {
        let config = SamplerConfig { solver, steps, ..SamplerConfig::default() };
        let noisy = at_first_level(&mut b, &noise, &config);
        let x = solve(&mut b, &mut Gaussian { variance, calls: 0 }, &config, &noisy).unwrap();
        let exact = 80.0 * (variance / (variance + 6400.0)).sqrt();
        f64::from(b.download(&x).unwrap()[0] / start[0]) / exact - 1.0
    };
    for (solver, order) in [(Solver::Euler, 1.0), (Solver::Heun, 2.0), (Solver::Dpmpp2m, 2.0)] {
        let (coarse, fine) = (error(solver, 32).abs(), error(solver, 64).abs());
        let observed = (coarse / fine).log2();
        assert!((observed - order).abs() < 0.35, "{solver:?}: errors {coarse:.1e}, {fine:.1e}: order {observed:.2}");
    }
}

#[test]
fn churn_keeps_the_distribution_and_counts_its_interval() {
    let mut b = Cpu::<f32>::for_sampling(&ParamTable::default());
    let noise = unit_noise(&mut b, Purpose::SampleNoise, 0);
    let plain = SamplerConfig { solver: Solver::Heun, steps: 64, ..SamplerConfig::default() };
    let mut sample = |churn| {
        let noisy = at_first_level(&mut b, &noise, &plain);
        let config = SamplerConfig { churn, ..plain.clone() };
        let x = solve(&mut b, &mut Gaussian { variance: 0.25, calls: 0 }, &config, &noisy);
        b.download(&x.unwrap()).unwrap()
    };
    let still = sample(Churn::NONE);
    let churned = sample(Churn { s_churn: 20.0, ..Churn::NONE });
    let variance = churned.iter().map(|&x| f64::from(x * x)).sum::<f64>() / churned.len() as f64;
    // 16384 values: standard error of the variance sqrt(2/16384) = 1.1 %, five of them.
    assert!((variance / 0.25 - 1.0).abs() < 0.055, "variance {variance}, expected 0.25");
    assert!(still != churned);
    let outside = Churn { s_churn: 20.0, s_min: 100.0, s_max: 200.0, s_noise: 1.0 };
    assert!(still == sample(outside), "churn above sigma_max does nothing");
}

/// A network with random gains too, so that every part of it matters.
fn tiny() -> (Model, Cpu<f32>) {
    let config: Config = serde_json::from_str(
        r#"{"img_resolution": 16, "img_channels": 3, "label_dim": 5, "model_channels": 16,
            "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16}"#,
    )
    .unwrap();
    let mut model = Model::init(&config, 3).unwrap();
    for ((id, spec), values) in model.table.iter().zip(&mut model.weights) {
        if spec.shape.is_empty() {
            values[0] = 0.5 + 0.1 * (id.0 % 5) as f32;
        }
    }
    let backend = load(&model);
    (model, backend)
}

fn load(model: &Model) -> Cpu<f32> {
    let mut b = Cpu::for_sampling(&model.table);
    model.load_into(&mut b).unwrap();
    b
}

fn images(model: &Model, b: &mut Cpu<f32>, labels: &[f32], seeds: &[u64], config: &SamplerConfig) -> Vec<f32> {
    let batch = Batch { labels, seeds, size: [12, 20], ..Batch::default() };
    Sampler { backend: b, net: &model.net, gnet: None }.run(&batch, config, None).unwrap()
}

const SHORT: SamplerConfig = SamplerConfig {
    solver: Solver::Dpmpp2m,
    steps: 3,
    sigma_min: 0.002,
    sigma_max: 80.0,
    rho: 7.0,
    guidance: 2.5,
    guidance_interval: None,
    churn: Churn::NONE,
    strength: 1.0,
};

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let (model, mut b) = tiny();
    let seeds = [7, 0, u64::MAX, 12, 3];
    let labels: Vec<f32> = (0..25).map(|i| (i * i % 7) as f32 / 7.0).collect();
    let churned = SamplerConfig { solver: Solver::Heun, churn: Churn { s_churn: 1.0, ..Churn::NONE }, ..SHORT };
    for config in [SHORT, churned] {
        let all = images(&model, &mut b, &labels, &seeds, &config);
        let one = all.len() / seeds.len();
        assert!(all[..one] != all[one..2 * one]);
        for size in [1, 2, 3] {
            let parts = seeds.chunks(size).zip(labels.chunks(5 * size));
            let parts: Vec<f32> = parts.flat_map(|(s, l)| images(&model, &mut b, l, s, &config)).collect();
            let differing = parts.iter().zip(&all).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(differing, 0, "values that differ in batches of {size} from those of a batch of 5");
        }
    }
}

#[test]
fn guidance_one_is_no_guidance_and_the_interval_bounds_it() {
    let (model, mut b) = tiny();
    let labels = [0.0, 1.0, 0.0, 0.0, 0.0];
    let with = |guidance, guidance_interval| SamplerConfig { guidance, guidance_interval, ..SHORT };
    let plain = images(&model, &mut b, &labels, &[4], &with(1.0, None));
    let guided = images(&model, &mut b, &labels, &[4], &with(2.5, None));
    assert!(plain != guided);
    assert!(guided == images(&model, &mut b, &labels, &[4], &with(2.5, Some((0.0, 80.0)))), "the upper end counts");
    for nowhere in [(100.0, 200.0), (80.0f64.next_down() / 2.0, 79.0)] {
        let why = with(2.5, Some(nowhere)).validate().unwrap_err().to_string();
        assert!(why.ends_with("expected one that holds a step's noise level; they go from 80 to 0.002"), "{why}");
        let why = with(1.0, Some(nowhere)).validate().unwrap_err().to_string();
        assert!(why.ends_with("expected none at guidance 1, where nothing guides"), "{why}");
    }
    let unconditional = images(&model, &mut b, &[], &[4], &with(1.0, None));
    assert!(unconditional == images(&model, &mut b, &[], &[4], &with(2.5, None)), "nothing to guide away from");
    assert_close("guidance 0", &images(&model, &mut b, &labels, &[4], &with(0.0, None)), &unconditional, 1e-5);
}

/// A network with its condition and without, one after the other.
struct Halves<'a> {
    net: &'a Precond,
    labels: &'a [f32],
    config: &'a SamplerConfig,
}

impl Denoise<Cpu<f32>> for Halves<'_> {
    fn denoise(&mut self, b: &mut Cpu<f32>, x: &T, sigma: f64) -> Result<Guided<T>, SampleError> {
        let n = b.shape(x)[0];
        let sigmas = b.upload([n, 1, 1, 1], &vec![sigma as f32; n]);
        let labels = b.upload([n, 1, 1, self.labels.len() / n], self.labels);
        let d = self.net.denoise(b, x, &sigmas, Some(&labels));
        let without = self.net.denoise(b, x, &sigmas, None);
        let guides = self.config.guides(sigma);
        Ok(if guides { Guided::new(d, without, self.config.guidance) } else { Guided::unguided(d) })
    }

    fn noise(&mut self, _: &mut Cpu<f32>, _: usize) -> T {
        unreachable!("there is no churn")
    }
}

#[test]
fn latents_have_no_picture() {
    let image = Image { number: 0, seed: 0, values: vec![0.0; 4], picture: None, about: Value::Null };
    assert!(matches!(image.png(), Err(PipelineError::NoPicture)));
}

/// Condition and no condition go through the network as one batch.
#[test]
fn a_guided_batch_is_its_two_halves() {
    let (model, mut b) = tiny();
    let seeds = [7, 3];
    let labels = [0.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.25];
    for solver in [Solver::Dpmpp2m, Solver::Heun, Solver::Euler] {
        for guidance_interval in [None, Some((0.0, 10.0))] {
            let config = SamplerConfig { solver, guidance_interval, ..SHORT };
            let together = images(&model, &mut b, &labels, &seeds, &config);
            let mut noise = Vec::new();
            for seed in seeds {
                let mut values = vec![0.0; 12 * 20 * 3];
                Stream::new(seed, Purpose::SampleNoise, 0).normals(&mut values);
                noise.append(&mut values);
            }
            let noise = b.upload([2, 12, 20, 3], &noise);
            let mut halves = Halves { net: &model.net, labels: &labels, config: &config };
            let noisy = at_first_level(&mut b, &noise, &config);
            let apart = solve(&mut b, &mut halves, &config, &noisy).unwrap();
            assert!(together == b.download(&apart).unwrap(), "{config:?}");
        }
    }
}

/// A negative prompt stands where no condition stood: of zeros nothing changes, of the condition itself guidance is none, and
/// an image without one does not notice that another one in its batch has one.
#[test]
fn guidance_leads_away_from_a_negative_prompt() {
    let (model, mut b) = tiny();
    let labels = [0.0, 1.0, 0.0, 0.5, 0.0];
    let mut image = |away: &[f32], guidance: f64| {
        let batch = Batch { labels: &labels, away, seeds: &[7], size: [12, 20], ..Batch::default() };
        let config = SamplerConfig { guidance, ..SHORT };
        Sampler { backend: &mut b, net: &model.net, gnet: None }.run(&batch, &config, None).unwrap()
    };
    assert!(image(&[0.0; 5], 2.5) == image(&[], 2.5));
    assert_close("away from itself", &image(&labels, 2.5), &image(&[], 1.0), 1e-5);
    let avoided = [0.0, 0.0, 1.0, 0.0, 0.0];
    let away = image(&avoided, 2.5);
    assert!(away != image(&[], 2.5));

    // D = ref + g (D_cond - ref) at a single Euler step to 0.
    let config = SamplerConfig { steps: 1, solver: Solver::Euler, guidance: 3.0, ..SHORT };
    let mut one = |labels: &[f32], away: &[f32], guidance: f64| {
        let batch = Batch { labels, away, seeds: &[7], size: [12, 20], ..Batch::default() };
        let config = SamplerConfig { guidance, ..config.clone() };
        Sampler { backend: &mut b, net: &model.net, gnet: None }.run(&batch, &config, None).unwrap()
    };
    let (with, without) = (one(&labels, &[], 1.0), one(&avoided, &[], 1.0));
    let expected: Vec<f32> = with.iter().zip(&without).map(|(d, r)| r + 3.0 * (d - r)).collect();
    assert_close("guided away", &one(&labels, &avoided, 3.0), &expected, 1e-5);
}

/// Noise on the way from one seed to another is normal, and its ends are theirs; an image to begin from is there at its
/// noise level, and few steps leave it as it is.
#[test]
fn images_begin_between_two_seeds_and_from_other_images() {
    let (model, mut b) = tiny();
    let mut run = |batch: &Batch, config: &SamplerConfig| {
        Sampler { backend: &mut b, net: &model.net, gnet: None }.run(batch, config, None).unwrap()
    };
    let size = [12, 20];
    let of = |seeds| Batch { seeds, size, ..Batch::default() };
    let row = Batch { towards: &[(9, 0.0), (9, 0.5), (9, 1.0)], ..of(&[4, 4, 4]) };
    let made = run(&row, &SHORT);
    let (first, rest) = made.split_at(720);
    assert!(first == run(&of(&[4]), &SHORT));
    assert_close("the other seed", &rest[720..], &run(&of(&[9]), &SHORT), 1e-5);
    assert!(rest[..720] != *first && rest[..720] != rest[720..]);

    let image: Vec<f32> = (0..720).map(|i| (i as f32 / 50.0).sin()).collect();
    let batch = Batch { from: &image, ..of(&[4]) };
    let distance = |strength: f64, run: &mut dyn FnMut(&Batch, &SamplerConfig) -> Vec<f32>| {
        let config = SamplerConfig { steps: 20, strength, ..SHORT };
        let made = run(&batch, &config);
        made.iter().zip(&image).map(|(x, y)| (x - y).powi(2)).sum::<f32>().sqrt()
    };
    let [little, more, all] = [0.1, 0.5, 1.0].map(|strength| distance(strength, &mut run));
    assert!(little < more && more < all, "{little} {more} {all}");
    let whole = SamplerConfig { steps: 20, ..SHORT };
    let half = SamplerConfig { strength: 0.5, ..whole.clone() };
    assert_eq!(half.sigmas(), whole.sigmas()[10..]);
    assert_eq!((half.taken(), whole.taken()), (10, 20));
    assert_eq!(SamplerConfig { strength: 0.001, ..SHORT }.taken(), 1);
}

#[test]
fn another_network_guides() {
    let (model, mut b) = tiny();
    let mut again = load(&model);
    let labels = [0.0, 0.0, 1.0, 1.0, 0.0];
    let config = SamplerConfig { guidance: 3.0, ..SHORT };
    let mut guided_by = |gnet: &Model, other: &mut Cpu<f32>| {
        let batch = Batch { labels: &labels, seeds: &[9], size: [12, 20], ..Batch::default() };
        Sampler { backend: &mut b, net: &model.net, gnet: Some((other, &gnet.net)) }.run(&batch, &config, None)
    };
    let by_itself = guided_by(&model, &mut again).unwrap();
    let unconditional = Model::init(&Config { label_dim: 0, ..model.net.config.clone() }, 8).unwrap();
    let by_other = guided_by(&unconditional, &mut load(&unconditional)).unwrap();
    let wide = Model::init(&Config { label_dim: 6, ..model.net.config.clone() }, 8).unwrap();
    let error = guided_by(&wide, &mut load(&wide)).unwrap_err();
    assert_eq!(error.to_string(), "the guiding network has condition width 6, expected 5");
    // D + 2 (D - D): three times and minus twice the same, which f32 rounds
    let plain = images(&model, &mut b, &labels, &[9], &SamplerConfig { guidance: 1.0, ..SHORT });
    assert_close("a network that guides itself", &by_itself, &plain, 1e-5);
    assert!(by_other != by_itself);
}

#[test]
fn settings_and_shapes_are_checked_before_anything_runs() {
    let (model, mut b) = tiny();
    let mut refused = |batch: Batch, config: SamplerConfig| -> String {
        let error = Sampler { backend: &mut b, net: &model.net, gnet: None }.run(
            &batch,
            &config,
            Some(&mut |_, _| panic!("it ran")),
        );
        error.unwrap_err().to_string()
    };
    let size = [12, 20];
    assert!(refused(Batch { size, ..Batch::default() }, SHORT).starts_with("seeds = none"));
    let away = Batch { size, seeds: &[1], away: &[1.0; 5], ..Batch::default() };
    assert!(refused(away, SHORT).starts_with("labels = none"));
    let mut message = |labels: &[f32], size, config: SamplerConfig| {
        refused(Batch { labels, seeds: &[1, 2], size, ..Batch::default() }, config)
    };
    let config = SHORT;
    assert_eq!(SamplerConfig { steps: 0, ..SHORT }.sigmas(), [0.0]);
    assert!(message(&[], [12, 21], config.clone()).contains("21x12"));
    assert!(message(&[0.0; 9], [12, 20], config.clone()).contains("9 values, expected 2 images times the network's 5"));
    let cases = [
        ("steps = 0", SamplerConfig { steps: 0, ..SHORT }),
        ("sigma_max = NaN", SamplerConfig { sigma_max: f64::NAN, ..SHORT }),
        ("sigma_min = -1", SamplerConfig { sigma_min: -1.0, ..SHORT }),
        ("strength = 0", SamplerConfig { strength: 0.0, ..SHORT }),
        ("guidance = inf", SamplerConfig { guidance: f64::INFINITY, ..SHORT }),
        ("guidance interval = 3,1", SamplerConfig { guidance_interval: Some((3.0, 1.0)), ..SHORT }),
        ("guidance interval = 1,inf", SamplerConfig { guidance_interval: Some((1.0, f64::INFINITY)), ..SHORT }),
        (
            "S_min = inf",
            SamplerConfig { solver: Solver::Heun, churn: Churn { s_min: f64::INFINITY, ..Churn::NONE }, ..SHORT },
        ),
        (
            "S_churn = 5, expected 0 with dpmpp_2m",
            SamplerConfig { churn: Churn { s_churn: 5.0, ..Churn::NONE }, ..SHORT },
        ),
    ];
    for (expected, config) in cases {
        let got = message(&[], [12, 20], config);
        assert!(got.starts_with(expected), "{got}");
    }
    let one_step = images(&model, &mut b, &[], &[1], &SamplerConfig { steps: 1, ..SHORT });
    assert!(one_step.iter().all(|x| x.is_finite()));
}

#[test]
fn a_network_that_makes_nan_is_an_error_that_names_the_seed() {
    let (mut model, _) = tiny();
    let id = model.table.find("unet.out_gain").unwrap();
    model.weights[id.0][0] = f32::NAN;
    let mut b = load(&model);
    let batch = Batch { seeds: &[31], size: [8, 8], ..Batch::default() };
    let error = Sampler { backend: &mut b, net: &model.net, gnet: None }.run(&batch, &SHORT, None).unwrap_err();
    assert!(matches!(error, SampleError::NotFinite { seed: 31, count: 192 }), "{error}");
}

// ---- the command line -----------------------------------------------------------------------

/// A directory with a small model of 16x16 RGB images and five tags, and what commands write there.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::of(|_| {})
    }

    /// With another model.
    fn of(change: impl FnOnce(&mut Model)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut model, _) = tiny();
        change(&mut model);
        model.meta.vocabulary = ["cat", "dog", "heart", "red", "smiling face"].map(String::from).to_vec();
        let path = dir.path().join("m.safetensors");
        model.save(path, Stored::F32).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `edm2k sample` with these arguments, split at spaces except in quotes of |.
    fn sample(&self, arguments: &str) -> assert_cmd::assert::Assert {
        self.command(arguments).assert()
    }

    fn command(&self, arguments: &str) -> assert_cmd::Command {
        let own_steps = arguments.contains("--steps");
        let arguments = arguments.split('|').enumerate().flat_map(|(i, part)| match i % 2 {
            0 => part.split_whitespace().map(String::from).collect(),
            _ => vec![part.to_owned()],
        });
        let mut command = edm2k(self.dir.path(), &["sample", "--model", "m.safetensors"]);
        command.args(if own_steps { &[][..] } else { &["--steps", "2"] }).args(arguments);
        command
    }

    /// The JSON in a picture's text chunk.
    fn about(&self, name: &str) -> Value {
        let text = png::read_text(&self.path(name)).unwrap();
        let json = text.iter().find(|(keyword, _)| keyword == "edm2k").unwrap();
        serde_json::from_str(&json.1).unwrap()
    }

    fn fails(&self, arguments: &str, message: &str) {
        let output = self.sample(arguments).failure().get_output().stderr.clone();
        let stderr = String::from_utf8(output).unwrap();
        assert!(stderr.contains(message), "{arguments}\nsaid: {stderr}expected: {message}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// The same command goes on, whatever moment it was killed at and whatever is missing. No picture of anything else is taken
/// for one of its own.
#[test]
fn what_is_there_is_not_made_again_and_the_rest_is_the_same() {
    let bench = Bench::new();
    let arguments = "--seeds 0-6 --batch 2 --steps 60 --save-steps --tags cat --tags dog --per-condition 4";
    bench.sample(&format!("--outdir whole {arguments}")).success();
    let go_on = |out: &str, expected: &str| {
        let output = bench.sample(&format!("--outdir {out} {arguments}")).success().get_output().clone();
        let said = String::from_utf8([output.stderr, output.stdout].concat()).unwrap();
        assert!(said.contains(expected), "{said}");
        let names = |dir: &str| -> std::collections::BTreeSet<_> {
            fs::read_dir(bench.path(dir)).unwrap().map(|file| file.unwrap().file_name()).collect()
        };
        assert_eq!((names(out).len(), names(out)), (15, names("whole")));
        for name in names(out) {
            let [whole, own] = ["whole", out].map(|dir| fs::read(bench.path(dir).join(&name)).unwrap());
            assert!(whole == own, "{name:?}");
        }
    };
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.current_dir(bench.dir.path()).args(["sample", "--model", "m.safetensors", "--outdir", "a"]);
    command.args(arguments.split(' ')).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    while !bench.path("a/000002.png").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // Where the kill came too late, everything is there; what is missing below is missing for sure.
    let changed = |name: &str| fs::metadata(bench.path(name)).unwrap().modified().unwrap();
    let first = changed("a/000000.png");
    go_on("a", " of 7 images are there\n");
    assert_eq!(changed("a/000000.png"), first, "it was made once");

    // Two batches lack something.
    fs::remove_file(bench.path("a/000002.png")).unwrap();
    fs::remove_file(bench.path("a/000005-steps.png")).unwrap();
    go_on("a", "3 of 7 images are there\n");
    fs::remove_file(bench.path("a/grid.png")).unwrap();
    let all = "7 of 7 images are there\n7 images of 16x16 are there: a/grid.png\n";
    go_on("a", all);

    let exists = "--outdir: a/000000.png exists";
    let other = |what: &str| format!("{exists}, of something else: {what}");
    bench.fails(
        &format!("--outdir a {arguments} --guidance 3"),
        &other("sampler.guidance is 5.0 there, 3.0 here; give --overwrite, or another --outdir"),
    );
    bench.fails(&format!("--outdir a {arguments} --precision f32"), &other("numbers is bf16 there, f32 here"));
    let whole = fs::read(bench.path("a/000000.png")).unwrap();
    fs::write(bench.path("a/000000.png"), &whole[..whole.len() - 1]).unwrap();
    bench.fails(&format!("--outdir a {arguments}"), exists);
    fs::write(bench.path("a/000000.png"), whole).unwrap();
    // Another model of the same name.
    let (mut second, _) = tiny();
    second.meta.vocabulary = Model::load(bench.path("m.safetensors")).unwrap().meta.vocabulary;
    second.weights.iter_mut().flatten().for_each(|w| *w *= 1.5);
    let before = fs::read(bench.path("m.safetensors")).unwrap();
    second.save(bench.path("m.safetensors"), Stored::F32).unwrap();
    bench.fails(&format!("--outdir a {arguments}"), &other("hashes.model is "));
    fs::write(bench.path("m.safetensors"), before).unwrap();
    go_on("a", all);
}

#[test]
fn pictures_carry_their_parameters_and_are_never_overwritten_unasked() {
    let bench = Bench::new();
    let arguments = "--outdir out --seeds 3,0-2 --tags |heart, smiling face| --tags cat --per-condition 2 --size 24x16 \
                     --guidance 2 --guidance-interval 0.001,50 --batch 3 --save-steps";
    bench.sample(arguments).success().stdout(predicates::str::contains("4 images of 24x16"));
    let mut files: Vec<_> =
        fs::read_dir(bench.path("out")).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let names = ["000000", "000001", "000002", "000003"].map(|n| [format!("{n}-steps.png"), format!("{n}.png")]);
    let names: Vec<String> = names.into_iter().flatten().chain(["grid.png".to_owned()]).collect();
    assert_eq!(files, names);

    let about = bench.about("out/000003.png");
    assert_eq!(about["seed"], 3);
    assert_eq!((&about["width"], &about["height"]), (&json!(24), &json!(16)));
    assert_eq!(about["condition"]["tags"], "heart, smiling face", "the first pair of seeds has the first tags");
    assert_eq!(bench.about("out/000002.png")["condition"]["tags"], "cat");
    let sampler = json!({
        "solver": "dpmpp_2m", "steps": 2, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
        "guidance": 2.0, "guidance_interval": [0.001, 50.0],
    });
    assert_eq!(about["sampler"], sampler);
    assert_eq!(bench.about("out/grid.png")["seeds"], json!([3, 0, 1, 2]));
    // What other programs look for.
    let infotext = |name: &str| {
        let texts = png::read_text(&bench.path(name)).unwrap();
        texts.into_iter().find(|(key, _)| key == "parameters").map(|(_, text)| text)
    };
    let settings = "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.0";
    let version = format!("Version: edm2k {}", env!("CARGO_PKG_VERSION"));
    let expected = format!(
        "heart, smiling face\n{settings}, Seed: 3, Size: 24x16, Model: m, \
         Guidance interval: \"[0.001,50.0]\", {version}"
    );
    assert_eq!(infotext("out/000003.png"), Some(expected));
    assert_eq!((infotext("out/grid.png"), infotext("out/000003-steps.png")), (None, None));
    bench.sample("--outdir away --tags |(cat:1.2)| --negative dog --solver heun").success();
    let expected = format!(
        "(cat:1.2)\nNegative prompt: dog\nSteps: 2, Sampler: Heun, Schedule type: Karras, CFG scale: 5.0, Seed: 0, \
         Size: 16x16, Model: m, {version}"
    );
    assert_eq!(infotext("away/000000.png"), Some(expected));

    let before = fs::read(bench.path("out/000003.png")).unwrap();
    bench.fails(
        &arguments.replace("--guidance 2", "--guidance 3"),
        "exists, of something else: sampler.guidance is 2.0 there, 3.0 here; give --overwrite",
    );
    bench.sample(&format!("{arguments} --overwrite --batch 1")).failure(); // --batch twice
    bench.sample(&arguments.replace("--batch 3", "--batch 1 --overwrite")).success();
    assert!(before == fs::read(bench.path("out/000003.png")).unwrap(), "the batch size changed the file");
    bench.sample("--outdir out --seeds 3 --overwrite").success();
    let has = |name: &str| bench.path(name).exists();
    assert!(!has("out/000003-steps.png") && has("out/000002-steps.png"), "the steps of a picture go with it");
}

#[test]
fn a_pipeline_makes_the_files_of_the_command_whatever_it_has_made_before() {
    let bench = Bench::new();
    let arguments = "--seeds 5-7 --tags cat --tags |red, heart| --size 24x16 --guidance 2 --batch 2";
    bench.sample(&format!("--outdir out --device cpu {arguments}")).success();
    let device = Device::open("cpu").unwrap().fastest();
    let mut pipeline = Pipeline::load(&device, bench.path("m.safetensors")).unwrap();
    let conditions = ["cat", "red, heart"].map(|tags| pipeline.tags(tags, 0).unwrap()).to_vec();
    let mut request =
        Request { conditions, seeds: vec![5, 6, 7], size: Some([16, 24]), batch: 2, ..Request::default() };
    (request.sampler.steps, request.sampler.guidance) = (2, 2.0);
    let unconditional = Request { seeds: vec![5], size: None, ..Request::default() };
    let check = |pipeline: &mut Pipeline, watched: bool| {
        let images = pipeline.images(&request).unwrap();
        let images = if watched { images.watched(|_| Ok(())) } else { images };
        let mut count = 0;
        for (image, seed) in images.zip(5..) {
            let mut image = image.unwrap();
            image.about["model"] = "m.safetensors".into(); // which the command was given
            assert!(
                image.png().unwrap() == fs::read(bench.path(&format!("out/{seed:06}.png"))).unwrap(),
                "seed {seed}"
            );
            count += 1;
        }
        assert_eq!(count, 3);
    };
    check(&mut pipeline, false);
    let other = pipeline.generate(&unconditional).unwrap();
    assert_eq!((other.len(), other[0].picture.as_ref().unwrap().width()), (1, 16));
    check(&mut pipeline, true);

    // Each step is seen, the last one is the picture, and whoever sees one may stop the work.
    let mut seen = Vec::new();
    let images: Vec<Image> = pipeline
        .images(&request)
        .unwrap()
        .watched(|step| {
            seen.push((step.first, step.index, step.pictures()?));
            Ok(())
        })
        .collect::<Result<_, _>>()
        .unwrap();
    let places: Vec<_> = seen.iter().map(|(first, index, pictures)| (*first, *index, pictures.len())).collect();
    assert_eq!(places, [(0, 0, 2), (0, 1, 2), (2, 0, 1), (2, 1, 1)]);
    let last: Vec<&Picture> = [&seen[1].2, &seen[3].2].into_iter().flatten().collect();
    assert_eq!(last, images.iter().flat_map(|image| &image.picture).collect::<Vec<_>>());
    assert_ne!(seen[0].2, seen[1].2);
    let stopped = |step: &mut Seen| if step.index == 1 { Err(PipelineError::Stopped) } else { Ok(()) };
    let mut stopped = pipeline.images(&request).unwrap().watched(stopped);
    assert!(matches!(stopped.next(), Some(Err(PipelineError::Stopped))));
    assert!(stopped.next().is_none());
    drop(stopped);
    check(&mut pipeline, false);
}

#[test]
fn the_last_noise_level_is_sigma_min_whatever_rho_is() {
    for solver in [Solver::Dpmpp2m, Solver::Heun, Solver::Euler] {
        for rho in [0.1, 0.3, 0.5, 1.0, 7.0, 100.0] {
            let config = SamplerConfig { solver, rho, steps: 6, ..SamplerConfig::default() };
            let sigmas = config.sigmas();
            assert!(
                (sigmas[5] / config.sigma_min - 1.0).abs() < 1e-3 && sigmas[6] == 0.0,
                "{solver:?} {rho}: {sigmas:?}"
            );
            assert!(sigmas.is_sorted_by(|a, b| a > b), "{solver:?} {rho}: {sigmas:?}");
        }
    }
}

#[test]
fn another_network_guides_from_when_it_is_given_on() {
    let bench = Bench::new();
    let load = || Pipeline::load(&Device::open("cpu").unwrap(), bench.path("m.safetensors")).unwrap();
    let drawn = |pipeline: &mut Pipeline| {
        let conditions = vec![pipeline.tags("cat", 0).unwrap()];
        let mut request = Request { conditions, seeds: vec![3], ..Request::default() };
        (request.sampler.steps, request.sampler.guidance) = (2, 3.0);
        pipeline.generate(&request).unwrap().swap_remove(0).values
    };
    let mut early = load().with_guide(bench.path("m.safetensors")).unwrap();
    let mut late = load();
    let alone = drawn(&mut late);
    let mut late = late.with_guide(bench.path("m.safetensors")).unwrap();
    assert_eq!(drawn(&mut late), drawn(&mut early));
    assert_ne!(drawn(&mut late), alone);
}

#[test]
fn a_pipeline_tells_what_is_wrong_apart() {
    let bench = Bench::new();
    let device = Device::open("cpu").unwrap();
    assert!(matches!(Pipeline::load(&device, bench.path("none")), Err(PipelineError::Model(_))));
    let mut pipeline = Pipeline::load(&device, bench.path("m.safetensors")).unwrap();
    assert!(matches!(pipeline.tags("cta", 0), Err(ConditionError::Vocabulary(VocabularyError::Unknown { .. }))));
    assert!(matches!(pipeline.tags(" ,", 0), Err(ConditionError::NoTag { .. })));
    assert!(matches!(pipeline.complete("cat", 0), Err(ConditionError::NoConditionModel)));
    assert!(matches!(pipeline.like_picture(&Picture::new(1, 1, vec![0; 3]), "x"), Err(ConditionError::NoTagger)));
    let wide = Condition::new(vec![0.0; 6], []);
    let wide = Request { conditions: vec![wide], ..Request::default() };
    assert!(matches!(
        pipeline.generate(&wide),
        Err(PipelineError::ConditionWidth { number: 0, found: 6, expected: 5 })
    ));
    let odd = Request { size: Some([16, 17]), ..Request::default() };
    assert!(matches!(pipeline.generate(&odd), Err(PipelineError::Sample(SampleError::Size(_)))));
    let large = Request { size: Some([1 << 16, 1 << 16]), ..Request::default() };
    assert!(matches!(pipeline.generate(&large), Err(PipelineError::Memory(_))));
    let refused = |request: Request, expected: &str| {
        let error = pipeline.check(&request).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}; expected {expected}");
    };
    refused(Request { per_condition: 0, ..Request::default() }, "per_condition = 0, expected 1 at least");
    refused(Request { batch: 0, ..Request::default() }, "batch = 0, expected 1 at least");
    for share in [-0.5, 1.5, f64::NAN] {
        let request = Request { towards: vec![(1, share)], ..Request::default() };
        refused(request, &format!("towards = {share}, expected a share of 0 to 1"));
    }
    let two = |per_condition, count| {
        let conditions = vec![Condition::new(vec![1.0; 5], []); 3];
        Request { conditions, per_condition, seeds: (0..count).collect(), ..Request::default() }
    };
    refused(two(1, 2), "too few seeds for 3 conditions, 1 of each: found 2, expected 3 at least");
    refused(two(4, 8), "expected 9 at least");
    pipeline.check(&two(4, 9)).unwrap();
    let from = Some(Beginning { values: vec![0.0; 3], name: "x".into() });
    refused(Request { from, ..Request::default() }, "the image to begin from has 3 values, expected 768");
    let [a, b] = [2, 3].map(|width| Condition::new(vec![1.0; width], []));
    let widths = "are 3 wide, those of the first are 2 wide";
    assert!(Condition::between(&a, &b, 0.5).unwrap_err().to_string().contains(widths));
    assert!(Condition::mix(&[(a.clone(), 1.0), (b.clone(), 1.0)]).unwrap_err().to_string().contains(widths));
    let row = Request { conditions: vec![a.clone(), b], ..Request::default() }.interpolated(3);
    assert!(row.unwrap_err().to_string().contains(widths));
    let nan = vec![Condition::new(vec![1.0, 1.0, f32::NAN, 0.0, 0.0], [])];
    refused(
        Request { conditions: nan, seeds: vec![0], ..Request::default() },
        "condition 0 has a value that is no finite number",
    );
    // Only the ratio of weights counts.
    let mixed = |weights: [f64; 2]| {
        let [a, b] = [[1.0, 0.0], [0.0, 1.0]].map(|values| Condition::new(values.to_vec(), []));
        Condition::mix(&[(a, weights[0]), (b, weights[1])]).unwrap().values
    };
    for size in [1e-300, 1e-45, 1e39, 1e300] {
        assert_eq!(mixed([3.0 * size, -4.0 * size]), [0.6, -0.8], "{size:e}");
    }
    let one = "one of two conditions has a negative and the other none, expected both or neither";
    assert_eq!(Condition::between(&a, &a.clone().away_from(&a), 0.5).unwrap_err().to_string(), one);
    assert!(matches!(pipeline.with_codec("none"), Err(PipelineError::NoLatents { .. })));
}

#[test]
fn conditions_come_from_files_and_datasets() {
    let bench = Bench::new();
    let row = |i: usize| (0..5).map(move |j| if i == j { 1.0f32 } else { 0.0 });
    let values: Vec<u8> = (0..3).flat_map(row).flat_map(f32::to_le_bytes).collect();
    safetensors::write(bench.path("c.safetensors"), &[("x", Dtype::F32, &[3, 5], &values)], &HashMap::new()).unwrap();
    fs::write(bench.path("c.NPY"), npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), }", &values))
        .unwrap();
    bench.sample(&format!("--outdir a --conditions {}", bench.path("c.safetensors").display())).success();
    bench.sample("--outdir b --conditions c.NPY").success();
    bench.sample("--outdir t --tags cat --tags dog --tags heart").success();
    assert_eq!(bench.about("a/000002.png")["condition"], json!({"file": "c.safetensors", "row": 2}));
    // Of another norm, which the network has never seen; and what is called features.
    let twice: Vec<u8> = (0..3).flat_map(row).flat_map(|x| (2.0 * x).to_le_bytes()).collect();
    safetensors::write(bench.path("x.safetensors"), &[("x", Dtype::F32, &[3, 5], &twice)], &HashMap::new()).unwrap();
    bench.sample("--outdir doubled --conditions x.safetensors").success();
    let shown = |name: &str| image::open(bench.path(name)).unwrap();
    assert!(shown("a/000001.png") == shown("doubled/000001.png"));
    let ids: Vec<u8> = (0..3i64).flat_map(i64::to_le_bytes).collect();
    let features: [(&str, Dtype, &[usize], &[u8]); 2] =
        [("ids", Dtype::I64, &[3], &ids), ("features", Dtype::F32, &[3, 5], &values)];
    safetensors::write(bench.path("f.safetensors"), &features, &HashMap::new()).unwrap();
    bench.fails("--outdir featured --conditions f.safetensors", "features");
    // Rows of another file of the same name.
    let turned: Vec<u8> = values.chunks(4).rev().flatten().copied().collect();
    let before = fs::read(bench.path("c.NPY")).unwrap();
    fs::write(bench.path("c.NPY"), npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), }", &turned))
        .unwrap();
    bench.fails("--outdir b --conditions c.NPY", "000000.png exists, of something else: hashes.condition is ");
    fs::write(bench.path("c.NPY"), before).unwrap();
    let pixels = |name: &str| image::open(bench.path(name)).unwrap();
    for image in ["000000.png", "000001.png", "000002.png"] {
        assert!(pixels(&format!("a/{image}")) == pixels(&format!("b/{image}")));
        assert!(pixels(&format!("a/{image}")) == pixels(&format!("t/{image}")), "one tag is the one-hot vector");
    }
    safetensors::write(bench.path("w.safetensors"), &[("x", Dtype::F32, &[3, 5], &values)], &HashMap::new()).unwrap();
    let narrow = [("conditions", Dtype::F32, &[5, 3][..], &values[..])];
    safetensors::write(bench.path("narrow.safetensors"), &narrow, &HashMap::new()).unwrap();
    bench.fails("--outdir d --conditions narrow.safetensors", "conditions of shape [5, 3], expected [N, 5]");
    bench.fails("--outdir d --row nowhere:5", "nowhere");
    bench.fails("--outdir d --row nowhere", "expected DATASET:ID");
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    bench.fails(&format!("--outdir d --row {}:-7", emoji.display()), "has the id -7");
    let data = Dataset::open(&emoji, Split::Train).unwrap();
    let id = data.id(0);
    for dir in [emoji.clone(), emoji.join(".")] {
        let origin = Condition::of_image(&data, 0, &dir, Split::Train).origin;
        assert_eq!(origin["dataset"], "emoji", "where it lies is nobody else's business");
    }
    bench.fails(
        &format!("--outdir d --row {}:{id}", emoji.display()),
        "its conditions are 64 wide, those of m.safetensors are 5 wide",
    );
    assert!(!bench.path("d").exists(), "nothing is made before the conditions are read");
}

#[test]
fn conditions_of_another_vocabulary_are_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.path("images")).unwrap();
    let run = |line: &str| edm2k(bench.dir.path(), &line.split_whitespace().collect::<Vec<_>>()).assert();
    let tags = ["cat", "dog", "heart", "red", "smiling face"];
    // Each of the first tags is on one image more than the next, so that this is their order.
    for (name, last) in [("same", "smiling face"), ("other", "crying face")] {
        let mut lines = String::new();
        for (i, _) in tags.iter().enumerate() {
            let own: Vec<_> = tags[..5 - i].iter().map(|tag| if *tag == tags[4] { last } else { tag }).collect();
            lines += &format!("{}\n", json!({"id": i + 2, "file": "a.png", "tags": own}));
        }
        fs::write(bench.path(&format!("{name}.jsonl")), lines).unwrap();
        image::RgbImage::new(16, 16).save(bench.path("images/a.png")).unwrap();
        run(&format!("prepare --images images --metadata {name}.jsonl --out {name} --size 16x16")).success();
        run(&format!("condition train --data {name} --out {name}.safetensors --epochs 1")).success();
        run(&format!("condition sample --model {name}.safetensors --count 2 --out {name}-c.safetensors")).success();
    }
    bench.sample("--outdir a --row same:2").success();
    // Of features nobody may have said what made them.
    let ids: Vec<u8> = (2..7i64).flat_map(i64::to_le_bytes).collect();
    let features: Vec<u8> = (0..25u8).flat_map(|i| (1.0 + f32::from(i % 7)).to_le_bytes()).collect();
    let both = [("ids", Dtype::I64, &[5][..], &ids[..]), ("features", Dtype::F32, &[5, 5][..], &features[..])];
    safetensors::write(bench.path("f.safetensors"), &both, &HashMap::new()).unwrap();
    run("prepare --images images --metadata same.jsonl --out dense --size 16x16 --features f.safetensors").success();
    let (mut model, _) = tiny();
    model.meta.conditioning = Dataset::open(&bench.path("dense"), Split::Train).unwrap().header().conditioning.clone();
    model.save(bench.path("f-m.safetensors"), Stored::F32).unwrap();
    let doubts = |line: &str, name: &str| {
        let said = run(line).success().get_output().stderr.clone();
        String::from_utf8_lossy(&said).contains(&format!("warning: {name}: nobody said what made its features"))
    };
    run("condition train --data dense --out f-c.safetensors --epochs 1").success();
    let sample = "sample --model f-m.safetensors --steps 2 --outdir";
    let (row, eval) =
        (format!("{sample} f --row dense:2"), "eval --model f-m.safetensors --split train --data dense --images 1");
    assert!(doubts(&row, "dense") && doubts(eval, "dense"));
    let invent = format!("{sample} g --random-conditions 1 --condition-model f-c.safetensors");
    assert!(doubts(&invent, "f-c.safetensors"));
    // Of the dataset that a model learned from they are what it knows.
    model.meta.data = Dataset::open(&bench.path("dense"), Split::Train).unwrap().fingerprint();
    model.save(bench.path("f-m.safetensors"), Stored::F32).unwrap();
    assert!(!doubts(&row.replace(" f ", " h "), "dense") && !doubts(eval, "dense"));
    bench.sample("--outdir b --conditions same-c.safetensors").success();
    bench.sample("--outdir c --random-conditions 1 --condition-model same.safetensors").success();
    run("condition sample --model same.safetensors --data same").success();
    let message =
        "made for another vocabulary (it has \"crying face\" where m.safetensors has \"smiling face\"; 1 of 5";
    bench.fails("--outdir d --row other:2", message);
    bench.fails("--outdir d --conditions other-c.safetensors", message);
    bench.fails("--outdir d --random-conditions 1 --condition-model other.safetensors", message);
    let said = run("condition sample --model same.safetensors --data other").failure();
    let said = String::from_utf8(said.get_output().stderr.clone()).unwrap();
    assert!(said.contains("--data: other: made for another vocabulary"), "{said}");
    assert!(!bench.path("d").exists());
}

#[test]
fn prompts_have_weights_negatives_and_seeds() {
    let bench = Bench::new();
    let lines = "(cat:1.5), dog\n\n{\"tags\": \"heart\", \"negative\": \"red, (dog:2)\", \"seed\": 40}\n";
    fs::write(bench.path("prompts.txt"), lines).unwrap();
    bench.sample("--outdir a --prompts prompts.txt --per-condition 2 --negative |smiling face|").success();
    let names = ["000000", "000001", "000040", "000041"];
    let abouts = names.map(|name| bench.about(&format!("a/{name}.png"))["condition"].clone());
    assert_eq!(abouts[1], json!({"tags": "(cat:1.5), dog", "negative": {"tags": "smiling face"}}));
    assert_eq!(abouts[2], json!({"tags": "heart", "negative": {"tags": "(dog:2), red"}}));
    assert_eq!((&abouts[0], &abouts[2]), (&abouts[1], &abouts[3]));

    // The same on the command line.
    bench.sample("--outdir b --tags heart --negative |red, (dog:2)| --seeds 40").success();
    assert!(fs::read(bench.path("a/000040.png")).unwrap() == fs::read(bench.path("b/000040.png")).unwrap());
    bench.sample("--outdir c --tags heart --seeds 40").success();
    let pixels = |name: &str| image::open(bench.path(name)).unwrap();
    assert!(pixels("c/000040.png") != pixels("b/000040.png"));
    fs::write(bench.path("away.txt"), "{\"negative\": \"heart\"}\n").unwrap();
    bench.sample("--outdir away --prompts away.txt").success();
    assert_eq!(bench.about("away/000000.png")["condition"], json!({"negative": {"tags": "heart"}}));
    fs::write(bench.path("away.txt"), "cat\n{\"seed\": 7}\n").unwrap();
    bench.fails("--outdir e --prompts away.txt", "--prompts: away.txt line 2: neither tags nor negative ones");
    bench.sample("--outdir d --negative heart").success();
    assert_eq!(bench.about("d/000000.png")["condition"], json!({"negative": {"tags": "heart"}}));

    bench.fails("--outdir e --prompts prompts.txt --seeds 1", "the prompts of --prompts have seeds of their own");
    bench.fails(
        "--outdir e --tags cat --tags dog --seeds 7",
        "too few seeds for 2 conditions, 1 of each: found 1, expected 2 at least",
    );
    bench.fails("--outdir e --tags cat --negative dog --guidance 1", "a negative does nothing at guidance 1");
    let no_level =
        "guidance interval = 100,200, expected one that holds a step's noise level; they go from 80 to 0.002";
    bench.fails("--outdir e --tags cat --negative dog --guidance-interval 100,200", no_level);
    bench.fails("--outdir e --tags cat --guidance-interval 100,200", no_level);
    let nothing = "guidance interval = 1,20, expected none at guidance 1";
    bench.fails("--outdir e --tags cat --guidance 1 --guidance-interval 1,20", nothing);

    // From standard input; nothing to avoid is no negative.
    let nothing = "{\"tags\": \"heart\", \"negative\": \" \", \"seed\": 40}\n";
    bench.command("--outdir f --prompts - --negative ||").write_stdin(format!("cat\n\n{nothing}")).assert().success();
    assert!(fs::read(bench.path("f/000040.png")).unwrap() == fs::read(bench.path("c/000040.png")).unwrap());
    assert_eq!(bench.about("f/000000.png")["condition"], json!({"tags": "cat"}));
    bench
        .command("--outdir e --prompts -")
        .write_stdin("dgo")
        .assert()
        .failure()
        .stderr(predicates::str::contains("--prompts: standard input line 1: unknown tag \"dgo\""));
    fs::write(bench.path("blank.txt"), "\n \n").unwrap();
    bench.fails("--outdir e --prompts blank.txt", "--prompts: blank.txt: it has no prompt");
    fs::write(bench.path("away.txt"), "{\"negative\": \"\"}\n").unwrap();
    bench.fails("--outdir e --prompts away.txt", "--prompts: away.txt line 1: neither tags nor negative ones");

    // Where there is nothing to lead away from but negatives, all need one.
    let always = Bench::of(|model| model.meta.cond_dropout = Some(0.0));
    fs::write(always.path("prompts.txt"), "cat\n{\"tags\": \"dog\", \"negative\": \"heart\"}\n").unwrap();
    let message = "condition 1 has no negative, and the model was trained without --cond-dropout";
    always.fails("--outdir e --prompts prompts.txt", message);
    always.sample("--outdir a --prompts prompts.txt --negative red").success();
    assert_eq!(always.about("a/000000.png")["sampler"]["guidance"], 5.0);
    always.sample("--outdir b --prompts prompts.txt --guidance 2").success();
    bench.fails("--outdir e --tags cat --negative haert", "--negative: unknown tag \"haert\", did you mean \"heart\"?");
    bench.fails("--outdir e --tags |(cat:1.5|", "--tags: the bracket ( has no partner in \"(cat:1.5\"");
    fs::write(bench.path("bad.txt"), "cat\n(dgo:2)\n").unwrap();
    bench.fails("--outdir e --prompts bad.txt", "--prompts: bad.txt line 2: unknown tag \"dgo\"");
    fs::write(bench.path("bad.txt"), "{\"tag\": \"cat\"}\n").unwrap();
    bench.fails("--outdir e --prompts bad.txt", "--prompts: bad.txt line 1: unknown field `tag`");
    bench.fails("--outdir e --prompts missing.txt", "--prompts: missing.txt: ");
    bench.fails("--outdir e --complete --condition-model m.safetensors", "not a condition model");
    assert!(!bench.path("e").exists());
}

#[test]
fn rows_lead_from_one_image_to_another_and_images_from_pictures() {
    let bench = Bench::new();
    bench.sample("--outdir a --tags cat --tags dog --seeds 7 --interpolate 4").success();
    bench.sample("--outdir b --tags cat --seeds 7").success();
    bench.sample("--outdir c --tags dog --seeds 7").success();
    let pixels = |name: &str| image::open(bench.path(name)).unwrap();
    assert!(pixels("a/000007.png") == pixels("b/000007.png"));
    assert!(pixels("a/000007-4.png") == pixels("c/000007.png"));
    assert!(pixels("a/000007-2.png") != pixels("a/000007-3.png"));
    let about = bench.about("a/000007-2.png");
    assert_eq!(about["condition"]["to"]["tags"], "dog");
    assert!((about["condition"]["share"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12);
    let grid = image::image_dimensions(bench.path("a/grid.png")).unwrap();
    assert!(grid.0 > 4 * 16 && grid.1 < 2 * 16 + 8, "a row, but {grid:?}");

    bench.sample("--outdir d --tags cat --seeds 7,9 --interpolate 3").success();
    assert!(pixels("d/000007.png") == pixels("b/000007.png"));
    assert_eq!(bench.about("d/000007-2.png")["towards"], json!({"seed": 9, "share": 0.5}));
    // Prompts bring their seeds and negatives.
    let row = |first: &str, second: &str, outdir: &str| {
        fs::write(bench.path("row.txt"), format!("{first}\n{second}\n")).unwrap();
        bench.command(&format!("--outdir {outdir} --prompts row.txt --interpolate 3"))
    };
    row(r#"{"tags": "cat", "seed": 7}"#, r#"{"tags": "dog"}"#, "one").assert().success();
    assert!(pixels("one/000007.png") == pixels("b/000007.png") && pixels("one/000007-3.png") == pixels("c/000007.png"));
    row(r#"{"tags": "cat", "seed": 9}"#, r#"{"tags": "dog", "seed": 7}"#, "two").assert().success();
    assert!(pixels("two/000009-3.png") == pixels("c/000007.png"));
    let negatives = [r#"{"tags": "cat", "negative": "red", "seed": 7}"#, r#"{"tags": "dog", "negative": "heart"}"#];
    row(negatives[0], negatives[1], "away").assert().success();
    bench.sample("--outdir avoided --tags dog --negative heart --seeds 7").success();
    assert!(pixels("away/000007-3.png") == pixels("avoided/000007.png"), "the row ends at the second negative");
    let one = row(negatives[0], r#"{"tags": "dog"}"#, "e").assert().failure();
    one.stderr(predicates::str::contains("--interpolate: one of two conditions has a negative and the other none"));
    bench.fails("--outdir e --tags cat --interpolate 3", "1 conditions and 1 seeds, expected two of either");
    bench.fails("--outdir e --tags cat --tags dog --seeds 1-3 --interpolate 3", "2 conditions and 3 seeds");

    // From a picture of another size, which is fitted.
    let picture = image::RgbImage::from_fn(40, 32, |x, y| image::Rgb([6 * x as u8, 8 * y as u8, 90]));
    picture.save(bench.path("drawing.png")).unwrap();
    let from = |strength: &str, outdir: &str| {
        bench
            .sample(&format!("--outdir {outdir} --from drawing.png --strength {strength} --steps 20 --tags cat"))
            .success();
        let small = image::imageops::thumbnail(&image::imageops::crop_imm(&picture, 4, 0, 32, 32).to_image(), 16, 16);
        let made = pixels(&format!("{outdir}/000000.png")).to_rgb8();
        made.iter().zip(small.iter()).map(|(&x, &y)| (f64::from(x) - f64::from(y)).abs()).sum::<f64>() / 768.0
    };
    let (little, much) = (from("0.05", "f"), from("1", "g"));
    assert!(little < 12.0 && much > 2.0 * little, "mean difference {little:.1} and {much:.1}");
    let about = bench.about("f/000000.png");
    assert_eq!((&about["from"], &about["sampler"]["strength"]), (&json!("drawing.png"), &json!(0.05)));
    let said = |size: &str| {
        let done = bench.sample(&format!("--outdir cut{size} --from drawing.png --tags cat --size {size}")).success();
        String::from_utf8(done.get_output().stderr.clone()).unwrap()
    };
    fs::create_dir(bench.path("dir")).unwrap();
    picture.save(bench.path("dir/drawing.png")).unwrap();
    bench.sample(&format!("--outdir place --tags cat --from {}", bench.path("dir/drawing.png").display())).success();
    assert_eq!(bench.about("place/000000.png")["from"], "drawing.png", "where files lie is nobody else's business");
    let above = "guidance interval = 1,20, expected one that holds a step's noise level; they go from 0.";
    bench.fails(
        "--outdir e --from drawing.png --strength 0.3 --steps 16 --negative cat --guidance-interval 1,20",
        above,
    );
    let cut = "warning: --from drawing.png: 60 % of it is cut off to fit it to 16x32";
    assert!(said("16x32").contains(cut) && !said("16x16").contains("cut off"));
    bench.fails("--outdir e --from drawing.png --strength 2", "strength = 2, expected a number above 0, up to 1");
    bench.fails("--outdir e --strength 0.5", "--from");
    let chunk = |kind: &[u8], data: &[u8]| {
        let both = [kind, data].concat();
        [&(data.len() as u32).to_be_bytes()[..], &both, &crc32fast::hash(&both).to_be_bytes()].concat()
    };
    let head = [&100_000u32.to_be_bytes()[..], &100_000u32.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let bomb = [&b"\x89PNG\r\n\x1a\n"[..], &chunk(b"IHDR", &head), &chunk(b"IDAT", &[0x78, 0x9c, 3, 0, 0, 0, 0, 1])];
    fs::write(bench.path("bomb.png"), bomb.concat()).unwrap();
    bench.fails("--outdir e --from bomb.png", "--from: bomb.png: 100000x100000 is more than 67108864 pixels");
    bench.fails("--outdir e --from missing.png", "--from: missing.png: ");
    bench.fails("--outdir e --from drawing.png --size 65536x65536", "a batch of 1 images of 65536x65536 needs ");
    bench.fails("--outdir e --from m.safetensors", "--from: m.safetensors: ");
    assert!(!bench.path("e").exists());
}

#[test]
fn invented_conditions_are_mixed() {
    let bench = Bench::new();
    let tags = ["cat", "dog", "heart", "red", "smiling face"].map(|tag| Tag { tag: tag.into(), count: 1 });
    let rows = Rows {
        kind: ConditionKind::Tags,
        vocabulary: Vocabulary::new(tags.to_vec()).unwrap(),
        tags: vec![vec![0, 1], vec![2], vec![3, 4]],
        dense: Vec::new(),
        conditioning: None,
    };
    let how = LearningSettings { epochs: 1, ..LearningSettings::default() };
    Vae::train(&rows, &how, |_, _| {}).unwrap().save(bench.path("c.safetensors")).unwrap();
    bench.sample("--outdir a --condition-model c.safetensors --mix random-2:1 --seeds 5").success();
    bench.sample("--outdir b --condition-model c.safetensors --random-conditions 3 --seeds 3-5").success();
    let pixels = |name: &str| image::open(bench.path(name)).unwrap();
    assert!(pixels("a/000005.png") == pixels("b/000005.png"), "one alone is what it is");
    bench.sample("--outdir c --condition-model c.safetensors --mix |random-0:0.6, random-1:0.4|").success();
    let mixed = bench.about("c/000000.png")["condition"]["mix"].clone();
    assert_eq!((&mixed[0][1], &mixed[1][0]["invented"]), (&json!(0.6), &json!(1)));
    // What is completed depends on the seed of conditions, and says so.
    let complete = |seed: u64| {
        let outdir = format!("complete-{seed}");
        let arguments = "--condition-model c.safetensors --tags red --complete --condition-seed";
        bench.sample(&format!("--outdir {outdir} {arguments} {seed}")).success();
        bench.about(&format!("{outdir}/000000.png"))["condition"].clone()
    };
    assert_eq!([complete(1), complete(2)].map(|about| about["condition_seed"].clone()), [json!(1), json!(2)]);
    let idle = bench.sample("--outdir idle --condition-model c.safetensors --tags red").success();
    idle.stderr(predicates::str::contains("warning: --condition-model does nothing"));
    bench.fails("--outdir d --condition-model c.safetensors --mix random-0", "'random-0', expected SOURCE:WEIGHT");
    for (mix, expected) in [
        ("random-70000:1", "'random-70000', expected random-0 to random-65535"),
        ("data:2", "'data:2' has no weight, expected data:2:WEIGHT"),
        ("cat:0.5,dog:0.5", "cat: there is no such file; tags are mixed by their weights in --tags"),
        ("a\\,b:c.png:1", "'c.png' is not an id"),
    ] {
        fs::create_dir_all(bench.path("data")).unwrap();
        bench.fails(&format!("--outdir d --condition-model c.safetensors --mix {mix}"), expected);
    }
    bench.fails("--outdir d --mix random-0:1", "--mix random-0:1: there is no condition model");
    bench.fails("--outdir d --mix a.png:x", "--mix a.png:x: 'x' is not a weight");
    bench.fails(
        "--outdir d --condition-model c.safetensors --mix random-0:1,random-0:-1",
        "sum of these conditions is zero",
    );
    assert!(!bench.path("d").exists());
}

#[test]
fn what_no_machine_has_room_for_is_one_line() {
    let bench = Bench::new();
    bench.fails("--outdir o --size 65536x65536", "of memory at least, this machine has ");
    bench.fails(
        "--outdir o --seeds 0-999999 --batch 65535 --size 1024x1024",
        "a batch of 65535 images of 1024x1024 needs",
    );
    assert!(!bench.path("o").exists());
}

#[test]
fn mistakes_are_one_clear_line() {
    let bench = Bench::new();
    bench.fails("--outdir o --tags |smilin face|", "unknown tag \"smilin face\", did you mean \"smiling face\"?");
    bench.fails("--outdir o --tags |,|", "has no tag");
    bench.fails("--outdir o --seeds 5-1", "'5-1' runs backwards");
    bench.fails("--outdir o --seeds 1,x", "'x' is not a seed");
    bench.fails("--outdir o --seeds 18446744073709551615", "is more than the largest seed, 9223372036854775807");
    bench.fails("--outdir o --seeds 0-99999999999", "more than 1000000 seeds");
    bench.fails("--outdir o --size 17x16", "an image of 17x16");
    bench.fails("--outdir o --steps 0", "steps = 0");
    bench.fails("--outdir o --guidance nan", "guidance = NaN");
    // What f32 has no room for is refused, and said without hundreds of digits.
    bench.fails("--outdir o --guidance 1e300", "guidance = 1e300, expected -1000000 to 1000000");
    bench.fails("--outdir o --rho 1e-300", "rho = 1e-300, expected 0.1 to 100");
    bench.fails("--outdir o --sigma-min 1e-300", "sigma_min = 1e-300, expected 1e-30 to 1000000");
    bench.fails("--outdir o --sigma-min 90", "sigma_max = 80, expected more than sigma_min = 90, up to 1000000");
    bench.fails("--outdir o --solver heun --S-noise 1e300", "S_noise = 1e300, expected 0 to 1000000");
    // Places of tags are no classes.
    for class in ["3", "random"] {
        bench.fails(
            &format!("--outdir o --class {class}"),
            "--class: m.safetensors: its conditions are tags, not classes; --tags",
        );
    }
    bench.fails("--outdir o --guidance-interval 5,1", "guidance interval = 5,1");
    bench.fails("--outdir o --S-churn 3", "0 with dpmpp_2m");
    let alone = "S_churn = 0, expected more than 0, with heun or euler, where S_min, S_max or S_noise is given";
    for option in ["--S-noise 1.003", "--S-min 0.1", "--S-max 50"] {
        bench.fails(&format!("--outdir o --solver heun {option}"), alone);
    }
    for option in ["--accum f32", "--conv-loop mma"] {
        let (name, _) = option.split_once(' ').unwrap();
        bench.fails(&format!("--outdir o --device cpu {option}"), &format!("{name} is for GPUs, but the CPU computes"));
    }
    bench.fails("--outdir o --random-conditions 3", "--condition-model");
    bench.fails("--outdir o --random-conditions 3 --condition-model m.safetensors", "not a condition model");
    let tags = ["heart", "cat", "dog", "red", "smiling face"].map(|tag| Tag { tag: tag.into(), count: 1 });
    let vocabulary = Vocabulary::new(tags.to_vec()).unwrap();
    let rows = Rows {
        kind: ConditionKind::Tags,
        vocabulary,
        tags: vec![vec![0, 1], vec![2]],
        dense: Vec::new(),
        conditioning: None,
    };
    let how = LearningSettings { epochs: 1, ..LearningSettings::default() };
    Vae::train(&rows, &how, |_, _| {}).unwrap().save(bench.path("other.safetensors")).unwrap();
    let message = "made for another vocabulary (it has \"heart\" where m.safetensors has \"cat\"; ";
    bench.fails("--outdir o --random-conditions 3 --condition-model other.safetensors", message);
    bench.fails("--outdir m.safetensors/x", "--outdir: m.safetensors/x");
    for guidance in [1, 2] {
        let missing = "--gnet: missing.safetensors: No such file";
        bench.fails(&format!("--outdir o --gnet missing.safetensors --guidance {guidance}"), missing);
    }
    // The start of every series of guidances.
    let said = bench.sample("--outdir plain --gnet m.safetensors --guidance 1 --steps 2").success();
    let said = String::from_utf8_lossy(&said.get_output().stderr).into_owned();
    assert!(said.contains("warning: --gnet does nothing at guidance 1"), "{said}");
    assert!(!bench.path("o").exists());
}

#[test]
fn latents_are_kept_as_they_are() {
    let bench = Bench::new();
    let config = Config { img_channels: 4, ..tiny().0.net.config };
    let model = Model::init(&config, 1).unwrap();
    let path = bench.path("m.safetensors");
    model.save(path, Stored::F16).unwrap();
    bench
        .sample("--outdir o --seeds 1,9 --save-steps --size 8x12")
        .success()
        .stdout(predicates::str::contains("--vae FILE"));
    let file = SafeFile::open(bench.path("o/latents.safetensors")).unwrap();
    assert_eq!(file.shape("latents").unwrap(), [2, 4, 12, 8]);
    assert_eq!(file.i64("seeds").unwrap(), [1, 9]);
    let (latents, steps) = (file.f32("latents").unwrap(), file.f32("steps").unwrap());
    assert_eq!(file.shape("steps").unwrap(), [2, 2, 4, 12, 8]);
    // The last step of dpmpp_2m ends at what the network made of its noise.
    assert_close("last step", &steps[384..768], &latents[..384], 1e-6);
}

#[test]
fn latents_begin_from_latents_and_from_pictures_that_the_codec_encodes() {
    let bench = Bench::new();
    let config = Config { img_channels: 4, ..tiny().0.net.config };
    let mut model = Model::init(&config, 1).unwrap();
    model.meta.encoder = ImageSpace::SdVae;
    model.save(bench.path("m.safetensors"), Stored::F32).unwrap();
    autoencoder::write(&bench.path("vae.safetensors"), &autoencoder::sd_vae(&[32, 32], 1));
    let picture = Picture::new(32, 32, (0..32 * 32 * 3).map(|i| (i * 7 % 256) as u8).collect());
    picture.save(&bench.path("a.png"), &[]).unwrap();
    let mut cpu = Cpu::<f32, ()>::for_codec();
    let codec = CodecFile::open(bench.path("vae.safetensors")).unwrap();
    let [mean, _] = codec.encoder(&mut cpu).unwrap().encode(&mut cpu, &picture).unwrap().scaled();
    let mut planes: Vec<f32> = (0..4).flat_map(|c| mean.iter().skip(c).step_by(4).copied()).collect();
    let write = |name: &str, values: &[f32], shape: &[usize]| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        safetensors::write(bench.path(name), &[("x", Dtype::F32, shape, &bytes)], &HashMap::new()).unwrap();
    };
    write("z.safetensors", &planes, &[1, 4, 16, 16]);
    write("odd.safetensors", &planes, &[4, 8, 32]);

    // Latents, with little left to do, are nearly what they were, and noise is not.
    let made = |options: &str, out: &str| {
        bench.sample(&format!("--outdir {out} --seeds 5 --steps 20 --precision f32 {options}")).success();
        SafeFile::open(bench.path(&format!("{out}/latents.safetensors"))).unwrap().f32("latents").unwrap()
    };
    let away = |latents: &[f32]| {
        latents.iter().zip(&planes).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>() / planes.len() as f64
    };
    let (near, far) = (made("--from z.safetensors --strength 0.05", "a"), made("--from z.safetensors", "b"));
    assert!(away(&near) < 0.01 && away(&far) > 10.0 * away(&near), "{} and {}", away(&near), away(&far));
    // A picture is those latents, by the codec.
    let pixels = |options: &str, out: &str| {
        bench
            .sample(&format!("--outdir {out} --seeds 5 --steps 20 --precision f32 --vae vae.safetensors {options}"))
            .success();
        image::open(bench.path(&format!("{out}/000005.png"))).unwrap().into_rgb8().into_raw()
    };
    let of_picture = pixels("--from a.png --strength 0.4", "c");
    let of_latents = pixels("--from z.safetensors --strength 0.4", "d");
    let furthest = of_picture.iter().zip(&of_latents).map(|(&a, b)| a.abs_diff(*b)).max();
    assert!(furthest <= Some(1), "{furthest:?} away"); // rounding
    assert_ne!(of_latents, pixels("", "e"));
    assert_eq!(bench.about("c/000005.png")["from"], "a.png");
    bench.fails("--outdir f --from a.png", "makes latents, so a picture needs an autoencoder to begin from");
    bench.fails("--outdir f --from odd.safetensors", "odd.safetensors: ");
    planes[7] = f32::NAN;
    write("nan.safetensors", &planes, &[1, 4, 16, 16]);
    let named = "--from: nan.safetensors: tensor x: found NaN at 7, expected finite numbers";
    bench.fails("--outdir f --from nan.safetensors", named);
    assert!(!bench.path("f").exists());
}

fn npy_file(header: &str, values: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(values);
    bytes
}

#[test]
fn npy_files_are_read_with_suspicion() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.npy");
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        npy::read(&path).map_err(|e| e.to_string())
    };
    let header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }          \n";
    let good = npy_file(header, &[1.5f64.to_le_bytes(), (-2.0f64).to_le_bytes()].concat());
    assert_eq!(read(&good).unwrap(), (vec![2], vec![1.5, -2.0]));
    let half = npy_file(&header.replace("<f8", "<f2"), &[0, 0x3c, 0, 0xc0]);
    assert_eq!(read(&half).unwrap(), (vec![2], vec![1.0, -2.0]));
    for length in 0..good.len() {
        assert!(read(&good[..length]).is_err(), "the first {length} bytes were believed");
    }
    for (from, to, message) in [
        ("<f8", ">f8", "elements of type"),
        ("<f8", "|O8", "elements of type"),
        ("False", "True", "Fortran"),
        ("(2,)", "(3,)", "do not make the shape"),
        ("(2,)", "(-2,)", "a side \"-2\""),
        ("(2,)", "(9999999999999,9999999999999)", "do not make the shape"),
        ("(2,)", "2", "not a tuple"),
        ("descr", "type", "no descr"),
    ] {
        let error = read(&npy_file(&header.replace(from, to), &[0; 16])).unwrap_err();
        assert!(error.contains(message), "{to}: {error}");
    }
    let mut random = vec![0; 64];
    for seed in 0..2000 {
        let noise = Stream { seed, purpose: Purpose::Init, step: 0, image: 0 };
        random.copy_from_slice(&good[..64]);
        for position in 0..3 {
            let [at, value, ..] = noise.block(position);
            random[at as usize % 64] = value as u8;
        }
        let _ = read(&random); // must not panic
    }
}

#[test]
fn numbers_that_a_device_does_not_compute_in_are_refused() {
    let bench = Bench::new();
    let sample = "--outdir out --seeds 0 --steps 1 --size 16x16 --device";
    bench.fails(&format!("{sample} cpu --precision f16"), "--precision: the CPU computes in f32 or bf16, not in f16");
    #[cfg(feature = "emulator")]
    bench
        .fails(&format!("{sample} emulated --precision f32"), "--precision: a GPU computes in f16 or bf16, not in f32");
    let exact = bench.sample(&format!("{sample} cpu --precision f32")).success();
    exact.stdout(predicates::str::contains("on the CPU, f32)"));
    let usual = if edm2k::backend::cpu::bf16_is_fast() { "bf16" } else { "f32" };
    let fast = bench.sample(&format!("{sample} cpu --overwrite")).success();
    fast.stdout(predicates::str::contains(format!("on the CPU, {usual})")));
}
