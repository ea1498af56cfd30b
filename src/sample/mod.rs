//! From noise to images: seeds and conditions in, denoised images out.
//!
//! An image is a function of (network, condition, seed, [`SamplerConfig`]) alone. Its noise is the
//! stream (seed, [`Purpose::SampleNoise`]) in the order of the tensor, `[height, width, channels]`; the
//! noise that churn adds in step i is the stream (seed, [`Purpose::Churn`], step i). So neither the
//! batch that an image is in nor the device changes what it starts from.
//!
//! Guidance (EDM2, eq. 4 of Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself",
//! 2024): D = ref + g (D_cond - ref). The reference is the same network without a condition
//! (classifier-free guidance) or with another one (a negative prompt), or another network, with the same condition if it
//! takes one (autoguidance). Within [`SamplerConfig::guidance_interval`] only (Kynkaanniemi et al., "Applying
//! Guidance in a Limited Interval", 2024); elsewhere, and at g = 1, the reference costs nothing.
//!
//! Cost: one forward pass for each noise level (`heun`: two); where there is guidance, of twice the batch: an image with its
//! condition and without go through the network together. Another network has its own passes.
//!
//! ```
//! use edm2k::sample::{SamplerConfig, Solver, parse_seeds};
//!
//! let config = SamplerConfig { solver: Solver::Heun, steps: 3, ..SamplerConfig::default() };
//! config.validate()?;
//! assert_eq!(config.sigmas().len(), 4); // and they end at 0
//! assert_eq!(parse_seeds("3-5, 0")?, [3, 4, 5, 0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod presets;
mod solvers;

use std::collections::HashSet;
use std::f64::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendError, NetworkBackend, Shape};
use crate::formats::short;
use crate::model::{ConfigError, Precond};
use crate::rng::{Purpose, Stream};

use solvers::levels;
pub use solvers::{Denoise, Guided, SolverStep, solve};

/// How the differential equation is solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Solver {
    /// DPM-Solver++(2M): second order, one evaluation a step.
    #[serde(rename = "dpmpp_2m")]
    #[cfg_attr(feature = "cli", value(name = "dpmpp_2m"))]
    Dpmpp2m,
    /// EDM's: second order, two evaluations a step, optional churn.
    #[serde(rename = "heun")]
    Heun,
    /// EDM's without the correction: first order, one evaluation a step, optional churn.
    #[serde(rename = "euler")]
    Euler,
}

impl Solver {
    /// What other programs that draw call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Dpmpp2m => "DPM++ 2M",
            Self::Heun => "Heun",
            Self::Euler => "Euler",
        }
    }
}

/// Noise that is added back in each step (EDM, algorithm 2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Churn {
    /// S_churn: overall amount; 0 makes sampling deterministic.
    pub s_churn: f64,
    /// S_min: noise level below which none is added.
    pub s_min: f64,
    /// S_max: noise level above which none is added.
    #[serde(skip_serializing_if = "is_infinite")]
    pub s_max: f64,
    /// S_noise: standard deviation of the added noise.
    pub s_noise: f64,
}

impl Churn {
    /// No churn, with the official defaults of the other values.
    pub const NONE: Self = Self { s_churn: 0.0, s_min: 0.0, s_max: f64::INFINITY, s_noise: 1.0 };
}

impl Default for Churn {
    fn default() -> Self {
        Self::NONE
    }
}

fn is_infinite(x: &f64) -> bool {
    x.is_infinite()
}

fn is_none(churn: &Churn) -> bool {
    churn.s_churn == 0.0
}

fn is_whole(strength: &f64) -> bool {
    *strength == 1.0
}

/// Everything that an image depends on besides network, condition and seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplerConfig {
    /// The solver.
    pub solver: Solver,
    /// Noise levels before the final 0.
    pub steps: usize,
    /// Lowest of them.
    pub sigma_min: f64,
    /// Highest of them.
    pub sigma_max: f64,
    /// How much they crowd at the low end (EDM, eq. 5).
    pub rho: f64,
    /// g: 1 = none.
    pub guidance: f64,
    /// Noise levels (low, high] at which to guide; `None` = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<(f64, f64)>,
    /// Of `heun` and `euler`.
    #[serde(skip_serializing_if = "is_none")]
    pub churn: Churn,
    /// Share of the steps that are taken, the last ones. Below 1, a given image keeps what is larger than the noise of
    /// the first step taken.
    #[serde(skip_serializing_if = "is_whole")]
    pub strength: f64,
}

impl Default for SamplerConfig {
    /// 16 steps of `dpmpp_2m` with guidance 5.
    fn default() -> Self {
        Self {
            solver: Solver::Dpmpp2m,
            steps: 16,
            sigma_min: 0.002,
            sigma_max: 80.0,
            rho: 7.0,
            guidance: 5.0,
            guidance_interval: None,
            churn: Churn::NONE,
            strength: 1.0,
        }
    }
}

impl SamplerConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`SampleError::Setting`] naming the first that makes no sense.
    pub fn validate(&self) -> Result<(), SampleError> {
        let check = |ok: bool, name, found: String, expected: &str| match ok {
            true => Ok(()),
            false => Err(SampleError::Setting { name, found, expected: expected.into() }),
        };
        // Devices compute in f32, which would round numbers beyond these to 0 or infinity.
        let number = |ok: bool, name, value: f64, expected: &str| check(ok, name, short(value), expected);
        check((1..=10_000).contains(&self.steps), "steps", self.steps.to_string(), "1 to 10000")?;
        let (sigma_min, sigma_max) = (self.sigma_min, self.sigma_max);
        number((1e-30..=1e6).contains(&sigma_min), "sigma_min", sigma_min, "1e-30 to 1000000")?;
        let range = format!("more than sigma_min = {}, up to 1000000", short(sigma_min));
        number(sigma_max > sigma_min && sigma_max <= 1e6, "sigma_max", sigma_max, &range)?;
        number((0.1..=100.0).contains(&self.rho), "rho", self.rho, "0.1 to 100")?;
        number(self.strength > 0.0 && self.strength <= 1.0, "strength", self.strength, "a number above 0, up to 1")?;
        number(self.guidance.abs() <= 1e6, "guidance", self.guidance, "-1000000 to 1000000")?;
        let Churn { s_churn, s_min, s_max, s_noise } = self.churn;
        number(s_churn >= 0.0 && s_churn.is_finite(), "S_churn", s_churn, "a number from 0")?;
        number(s_min >= 0.0 && s_min.is_finite(), "S_min", s_min, "a number from 0")?;
        number(s_max >= s_min, "S_max", s_max, &format!("a number from S_min = {}", short(s_min)))?;
        number((0.0..=1e6).contains(&s_noise), "S_noise", s_noise, "0 to 1000000")?;
        if self.solver == Solver::Dpmpp2m {
            number(s_churn == 0.0, "S_churn", s_churn, "0 with dpmpp_2m, which adds no noise (heun and euler do)")?;
        }
        let used = s_churn > 0.0 || self.churn == Churn::NONE;
        number(used, "S_churn", s_churn, "more than 0, with heun or euler, where S_min, S_max or S_noise is given")?;
        if let Some((low, high)) = self.guidance_interval {
            let found = format!("{},{}", short(low), short(high));
            // JSON has no infinity.
            let ok = 0.0 <= low && low < high && high.is_finite();
            check(ok, "guidance interval", found.clone(), "finite numbers, 0 <= low < high")?;
            check(
                self.guidance != 1.0,
                "guidance interval",
                found.clone(),
                "none at guidance 1, where nothing guides",
            )?;
            let levels = levels(self);
            let used = levels.iter().any(|&sigma| self.guides(sigma));
            let [first, last] = [levels[0], levels[levels.len() - 1]].map(|level| level as f32);
            let expected = format!("one that holds a step's noise level; they go from {first} to {last}");
            check(used, "guidance interval", found, &expected)?;
        }
        Ok(())
    }

    /// Steps that are taken: at [`strength`](Self::strength) 1 all.
    pub fn taken(&self) -> usize {
        ((self.steps as f64 * self.strength).round() as usize).max(1).min(self.steps)
    }

    /// The noise levels of the steps that are taken, descending, and the final 0 (EDM, eq. 5): [`taken`](Self::taken) + 1
    /// numbers. Those of `heun` and `euler` are computed in f32, as the official sampler does.
    pub fn sigmas(&self) -> Vec<f64> {
        let (high, low) = (self.sigma_max.powf(1.0 / self.rho), self.sigma_min.powf(1.0 / self.rho));
        let last = self.steps.saturating_sub(1).max(1);
        let mut sigmas: Vec<f64> = (0..self.steps)
            .map(|i| match self.solver {
                Solver::Dpmpp2m => (high + i as f64 / last as f64 * (low - high)).powf(self.rho),
                Solver::Heun | Solver::Euler => {
                    let root = high as f32 + i as f32 / last as f32 * (low - high) as f32;
                    f64::from(f64::from(root).powf(self.rho) as f32)
                }
            })
            // With a small rho, the last root may have lost all of its digits.
            .map(|level| if level < 0.999 * self.sigma_min { self.sigma_min } else { level })
            .collect();
        sigmas.drain(..self.steps - self.taken());
        sigmas.push(0.0);
        sigmas
    }

    /// How often the network sees an image in a batch: twice if it guides itself.
    pub fn copies(&self, guides_itself: bool) -> usize {
        if guides_itself && self.guidance != 1.0 { 2 } else { 1 }
    }

    /// Whether there is guidance at a noise level.
    pub fn guides(&self, sigma: f64) -> bool {
        self.guidance != 1.0 && self.guidance_interval.is_none_or(|(low, high)| low < sigma && sigma <= high)
    }
}

/// Why no images could be sampled.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum SampleError {
    /// A setting makes no sense.
    #[error("{name} = {found}, expected {expected}")]
    Setting { name: &'static str, found: String, expected: String },
    #[error("{0}")]
    Size(#[from] ConfigError),
    /// The conditions do not fit the network or the seeds.
    #[error("conditions: {found} values, expected {images} images times the network's {width}, or none")]
    Conditions { found: usize, images: usize, width: usize },
    #[error("the image to begin from has {found} values, expected {expected}")]
    From { found: usize, expected: usize },
    /// The guiding network does not go with the network.
    #[error("the guiding network has {what} {found}, expected {expected}")]
    GuidingNetwork { what: &'static str, found: usize, expected: usize },
    #[error("{0}")]
    Backend(#[from] BackendError),
    /// Somebody who saw a step wanted no more.
    #[error("stopped")]
    Stopped,
    /// The network made something that is no number.
    #[error("seed {seed}: {count} of the image's values are not finite (are the model's weights?)")]
    NotFinite { seed: u64, count: usize },
}

/// What is wrong with a list of seeds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WrongSeeds(String);

/// The seeds of a list such as `0-15,20`, in its order.
///
/// ```
/// assert_eq!(edm2k::sample::parse_seeds("3-5, 0").unwrap(), [3, 4, 5, 0]);
/// assert!(edm2k::sample::parse_seeds("1-3,2").unwrap_err().to_string().contains("2 occurs twice"));
/// ```
///
/// # Errors
/// [`WrongSeeds`]: a part is no number or range, a seed is repeated, or there are more than a million.
pub fn parse_seeds(list: &str) -> Result<Vec<u64>, WrongSeeds> {
    const MAX_SEEDS: usize = 1_000_000;
    let number = |text: &str, part: &str| match text.trim().parse::<u64>() {
        Ok(seed) if seed <= i64::MAX as u64 => Ok(seed),
        Ok(_) => Err(WrongSeeds(format!("'{part}' is more than the largest seed, {}", i64::MAX))),
        Err(_) => Err(WrongSeeds(format!("'{part}' is not a seed or a range of seeds such as 0-15"))),
    };
    let mut seeds = Vec::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first, part)?, number(last, part)?);
        if first > last {
            return Err(WrongSeeds(format!("'{part}' runs backwards")));
        }
        if last - first >= (MAX_SEEDS - seeds.len()) as u64 {
            return Err(WrongSeeds(format!("'{part}' makes more than {MAX_SEEDS} seeds")));
        }
        seeds.extend(first..=last);
    }
    let mut seen = HashSet::new();
    match seeds.iter().find(|&&seed| !seen.insert(seed)) {
        Some(seed) => Err(WrongSeeds(format!("seed {seed} occurs twice"))),
        None => Ok(seeds),
    }
}

/// Sees each step of a batch, may download what it wants of it, and stops the work by an error, such as
/// [`SampleError::Stopped`].
pub type Observe<'a, B> = dyn FnMut(&mut B, SolverStep<<B as Backend>::Tensor>) -> Result<(), SampleError> + 'a;

/// The images of one batch. What is empty is not given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// Seed of each image: n of them.
    pub seeds: &'a [u64],
    /// [height, width].
    pub size: [usize; 2],
    /// Conditions, [n, label_dim]; else the images are unconditional.
    pub labels: &'a [f32],
    /// Conditions to guide away from, [n, label_dim]; else none, or, where another network guides, `labels`. A network
    /// that guides itself needs `labels` too.
    pub away: &'a [f32],
    /// Another seed for each image, whose noise takes this share of it, 0 to 1: on the way from one to the other the noise
    /// stays normal.
    pub towards: &'a [(u64, f64)],
    /// An image in model space, [height, width, channels], that noise is added to instead of zeros.
    pub from: &'a [f32],
}

impl Batch<'_> {
    /// Unit normal noise [n, h, w, c]: each image's from its own stream, in the order of the tensor.
    fn noise(&self, shape: Shape, purpose: Purpose, step: u32) -> Vec<f32> {
        let mut values = vec![0.0; shape.iter().product()];
        let (size, of) = (shape[1..].iter().product(), |seed| Stream { seed, purpose, step, image: 0 });
        for (i, (image, &seed)) in values.chunks_mut(size).zip(self.seeds).enumerate() {
            of(seed).normals(image);
            if let Some(&(other, share)) = self.towards.get(i) {
                let mut there = vec![0.0; size];
                of(other).normals(&mut there);
                let (sin, cos) = (share * FRAC_PI_2).sin_cos();
                let turned = |x: f32, y: f32| (cos * f64::from(x) + sin * f64::from(y)) as f32;
                image.iter_mut().zip(&there).for_each(|(x, &y)| *x = turned(*x, y));
            }
        }
        values
    }
}

/// A network on its device, and optionally another one that guides it.
pub struct Sampler<'a, B: NetworkBackend> {
    /// Device that holds the network, its effective weights made for evaluation.
    pub backend: &'a mut B,
    /// The network.
    pub net: &'a Precond,
    /// Autoguidance: device and network of the reference. `None`: the network itself.
    pub gnet: Option<(&'a mut B, &'a Precond)>,
}

debug!(Sampler<'_, B> { net } [B: NetworkBackend]);

impl<B: NetworkBackend> Sampler<'_, B> {
    /// Samples one batch. `observe` is called after each step, when the one before it is done. The whole batch is one
    /// plan of the device if there is no `observe`, no other network and no churn; otherwise each evaluation is one.
    /// Returns [seeds, height, width, channels] in model space.
    ///
    /// # Errors
    /// [`SampleError`]; settings and shapes are checked before anything is computed.
    pub fn run(
        &mut self,
        batch: &Batch,
        config: &SamplerConfig,
        observe: Option<&mut Observe<B>>,
    ) -> Result<Vec<f32>, SampleError> {
        let shape = self.check(batch, config)?;
        let b = &mut *self.backend;
        let noise = b.upload(shape, &batch.noise(shape, Purpose::SampleNoise, 0));
        let mut terms = vec![(&noise, config.sigmas()[0])];
        let image = (!batch.from.is_empty()).then(|| b.upload(shape, &batch.from.repeat(shape[0])));
        terms.extend(image.iter().map(|image| (image, 1.0)));
        let mut inputs = vec![b.linear_combination(&terms)];
        inputs.extend(conditions(b, batch, self.net, config.copies(self.gnet.is_none()) == 2));
        let net = self.net;
        let scales = |labels: Option<B::Tensor>, b: &B| {
            let images = labels.as_ref().map_or(batch.seeds.len(), |labels| b.shape(labels)[0]);
            Scales { labels, images, levels: levels(config), made: Vec::new() }
        };
        let x = if self.gnet.is_none() && observe.is_none() && config.churn.s_churn == 0.0 {
            let body = &mut |b: &mut B, inputs: &[B::Tensor]| {
                let scales = scales(inputs.get(1).cloned(), b);
                let mut guided = Guidance { net, scales, other: None, config, shape, batch, observe: None };
                Ok(vec![solve(b, &mut guided, config, &inputs[0])?])
            };
            b.planned::<SampleError>(&AllSteps(config.clone()), &inputs, body)?.swap_remove(0)
        } else {
            let other = self.gnet.as_mut().map(|(b, net)| {
                let away = if batch.away.is_empty() { batch.labels } else { batch.away };
                let labels = conditions(*b, &Batch { labels: away, ..*batch }, net, false);
                let scales = scales(labels, b);
                (&mut **b, *net, scales)
            });
            let scales = scales(inputs.get(1).cloned(), b);
            let mut guided = Guidance { net, scales, other, config, shape, batch, observe };
            solve(b, &mut guided, config, &inputs[0])?
        };
        let images = self.backend.download(&x)?;
        for (image, &seed) in images.chunks(shape[1..].iter().product()).zip(batch.seeds) {
            let count = image.iter().filter(|x| !x.is_finite()).count();
            if count > 0 {
                return Err(SampleError::NotFinite { seed, count });
            }
        }
        Ok(images)
    }

    fn check(&self, batch: &Batch, config: &SamplerConfig) -> Result<Shape, SampleError> {
        let (ours, images, [height, width]) = (&self.net.config, batch.seeds.len(), batch.size);
        config.validate()?;
        ours.check_size(height, width)?;
        let nothing =
            |name, expected: &str| SampleError::Setting { name, found: "none".into(), expected: expected.into() };
        if images == 0 {
            return Err(nothing("seeds", "one for each image"));
        }
        if self.gnet.is_none() && batch.labels.is_empty() && !batch.away.is_empty() {
            return Err(nothing("labels", "some, as there are others to guide away from"));
        }
        for labels in [batch.labels, batch.away] {
            if !labels.is_empty() && labels.len() != images * ours.label_dim {
                return Err(SampleError::Conditions { found: labels.len(), images, width: ours.label_dim });
            }
        }
        let expected = height * width * ours.img_channels;
        if !batch.from.is_empty() && batch.from.len() != expected {
            return Err(SampleError::From { found: batch.from.len(), expected });
        }
        if let Some((_, gnet)) = &self.gnet {
            let theirs = &gnet.config;
            theirs.check_size(height, width)?;
            let differs = |what, found, expected| Err(SampleError::GuidingNetwork { what, found, expected });
            if theirs.img_channels != ours.img_channels {
                return differs("image channels", theirs.img_channels, ours.img_channels);
            }
            if theirs.label_dim != ours.label_dim && theirs.label_dim != 0 {
                return differs("condition width", theirs.label_dim, ours.label_dim);
            }
        }
        Ok([images, height, width, ours.img_channels])
    }
}

/// The conditions that a network takes, if any: [n, 1, 1, label_dim], or, where it guides itself, these and what it is guided
/// away from, [2n, 1, 1, label_dim].
fn conditions<B: Backend>(b: &mut B, batch: &Batch, net: &Precond, both: bool) -> Option<B::Tensor> {
    let (labels, dim) = (batch.labels, net.config.label_dim);
    if labels.is_empty() || dim == 0 {
        return None;
    }
    let mut all = labels.to_vec();
    match batch.away {
        _ if !both => {}
        [] => all.resize(2 * labels.len(), 0.0),
        away => all.extend(away),
    }
    Some(b.upload([all.len() / dim, 1, 1, dim], &all))
}

/// A plan of all steps.
#[derive(Clone, Debug, PartialEq)]
struct AllSteps(SamplerConfig);

/// A plan of one evaluation.
#[derive(Clone, Debug, PartialEq)]
struct Evaluation;

/// A plan of the scales of these noise levels, each for so many images.
#[derive(Clone, Debug, PartialEq)]
struct Ahead(Vec<f64>, usize);

/// How many images' scales are made at a time.
const AHEAD: usize = 256;

/// What a network takes from noise levels and conditions. Both are known before the first step, so the scales of many levels
/// are one product.
struct Scales<T> {
    /// The conditions that a network is given, if any.
    labels: Option<T>,
    /// Images at each level.
    images: usize,
    /// All levels that there will be, in their order. Those of another one are made alone.
    levels: Vec<f64>,
    made: Vec<(f64, T)>,
}

impl<T: Clone> Scales<T> {
    /// Those of a level, [images, 1, 1, channels of all blocks].
    fn at<B: NetworkBackend<Tensor = T>>(&mut self, b: &mut B, net: &Precond, sigma: f64) -> Result<T, BackendError> {
        if let Some((_, scales)) = self.made.iter().find(|(level, _)| *level == sigma) {
            return Ok(scales.clone());
        }
        let images = self.images;
        let to_come = self.levels.iter().skip_while(|&&level| level != sigma);
        let mut levels: Vec<f64> = to_come.take((AHEAD / images).max(1)).copied().collect();
        if levels.is_empty() {
            levels.push(sigma);
        }
        let made =
            b.planned::<BackendError>(&Ahead(levels.clone(), images), self.labels.as_slice(), &mut |b, labels| {
                let each: Vec<f32> = levels.iter().flat_map(|&level| vec![level as f32; images]).collect();
                let sigma = b.upload([each.len(), 1, 1, 1], &each);
                let all = net.scales(b, &sigma, labels.first());
                Ok(b.split(&all, levels.len()))
            })?;
        self.made = levels.into_iter().zip(made).collect();
        Ok(self.made[0].1.clone())
    }
}

/// The guided network. Each evaluation is a plan, unless it is part of one, so that a reference may live on another
/// device, a step can be looked at, and churn draws its noise.
struct Guidance<'a, 'o, B: NetworkBackend> {
    net: &'a Precond,
    /// Of twice the images where it guides itself.
    scales: Scales<B::Tensor>,
    /// What guides it instead of itself.
    other: Option<(&'a mut B, &'a Precond, Scales<B::Tensor>)>,
    config: &'a SamplerConfig,
    shape: Shape,
    batch: &'a Batch<'a>,
    observe: Option<&'a mut Observe<'o, B>>,
}

/// D(x; sigma) of a network, of as many images as there are scales: those of x in turn.
fn evaluate<B: NetworkBackend>(
    b: &mut B,
    net: &Precond,
    x: &B::Tensor,
    sigma: f64,
    scales: B::Tensor,
) -> Result<B::Tensor, BackendError> {
    let n = b.shape(&scales)[0];
    let inputs = [x.clone(), b.upload([n, 1, 1, 1], &vec![sigma as f32; n]), scales];
    let body = &mut |b: &mut B, t: &[B::Tensor]| Ok(vec![net.denoise_scaled(b, &t[0], &t[1], &t[2])]);
    Ok(b.planned::<BackendError>(&Evaluation, &inputs, body)?.swap_remove(0))
}

impl<B: NetworkBackend> Denoise<B> for Guidance<'_, '_, B> {
    fn denoise(&mut self, b: &mut B, x: &B::Tensor, sigma: f64) -> Result<Guided<B::Tensor>, SampleError> {
        let n = self.shape[0];
        let guides = self.config.guides(sigma);
        let mut scales = self.scales.at(b, self.net, sigma)?;
        let itself = guides && self.scales.images > n;
        if !itself && self.scales.images > n {
            scales = b.split(&scales, 2).swap_remove(0);
        }
        let d = evaluate(b, self.net, x, sigma, scales)?;
        if itself {
            let mut halves = b.split(&d, 2);
            let reference = halves.swap_remove(1);
            return Ok(Guided::new(halves.swap_remove(0), reference, self.config.guidance));
        }
        let Some((other, net, scales)) = self.other.as_mut().filter(|_| guides) else { return Ok(Guided::unguided(d)) };
        let there = other.upload(self.shape, &b.download(x)?);
        let scales = scales.at(*other, net, sigma)?;
        let reference = evaluate(*other, net, &there, sigma, scales)?;
        let reference = b.upload(self.shape, &other.download(&reference)?);
        Ok(Guided::new(d, reference, self.config.guidance))
    }

    fn noise(&mut self, b: &mut B, step: usize) -> B::Tensor {
        b.upload(self.shape, &self.batch.noise(self.shape, Purpose::Churn, step as u32))
    }

    fn after(&mut self, b: &mut B, step: SolverStep<B::Tensor>) -> Result<(), SampleError> {
        let Some(observe) = &mut self.observe else { return Ok(()) };
        // A device is given all steps in no time: whoever watches is to see them as they are done.
        b.pace()?;
        observe(b, step)
    }
}
