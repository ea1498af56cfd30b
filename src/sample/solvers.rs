//! The solvers, independent of what denoises.
//!
//! They follow the probability flow of x = y + sigma n from sigma_max to 0 (EDM, Karras et al. 2022, "Elucidating the
//! Design Space of Diffusion-Based Generative Models", eq. 1 with sigma(t) = t): dx/dsigma = (x - D(x; sigma)) / sigma.
//! Each update is linear in x and the denoised images, and so is guidance. So an update is one
//! [`Backend::linear_combination`] whose factors are computed in f64.

use super::{Churn, SampleError, SamplerConfig, Solver};
use crate::backend::Backend;

/// A denoised image D = ref + g (D_cond - ref), kept as its two parts.
#[derive(Clone, Debug)]
pub struct Guided<T> {
    d: T,
    weight: f64,
    reference: Option<(T, f64)>,
}

impl<T> Guided<T> {
    /// Without guidance.
    pub fn unguided(d: T) -> Self {
        Self { d, weight: 1.0, reference: None }
    }

    /// `d` guided away from `reference` by the factor `guidance`.
    pub fn new(d: T, reference: T, guidance: f64) -> Self {
        Self { d, weight: guidance, reference: Some((reference, 1.0 - guidance)) }
    }

    /// Terms of a [`Backend::linear_combination`] whose sum is `factor` times the denoised image.
    pub fn terms(&self, factor: f64) -> impl Iterator<Item = (&T, f64)> {
        let reference = self.reference.as_ref().map(|(t, weight)| (t, factor * weight));
        std::iter::once((&self.d, factor * self.weight)).chain(reference)
    }

    /// The denoised image itself.
    pub fn tensor<B: Backend<Tensor = T>>(&self, b: &mut B) -> T {
        let terms: Vec<_> = self.terms(1.0).collect();
        b.linear_combination(&terms)
    }
}

/// What a solver shows after a step.
#[derive(Debug)]
pub struct SolverStep<'a, T> {
    /// Index of the step, from 0.
    pub index: usize,
    /// Number of steps.
    pub of: usize,
    /// Noise level that the step began at.
    pub sigma: f64,
    /// Noisy images that it arrived at, [n, h, w, c].
    pub x: &'a T,
    /// Denoised images at its beginning.
    pub denoised: &'a Guided<T>,
}

/// What a solver needs.
pub trait Denoise<B: Backend> {
    /// D(x; sigma) of the noisy images x [n, h, w, c].
    ///
    /// # Errors
    /// The device's, or whatever else keeps the denoiser from its work.
    fn denoise(&mut self, b: &mut B, x: &B::Tensor, sigma: f64) -> Result<Guided<B::Tensor>, SampleError>;
    /// Unit normal noise for the churn of a step, [n, h, w, c].
    fn noise(&mut self, b: &mut B, step: usize) -> B::Tensor;
    /// Called after each step.
    ///
    /// # Errors
    /// An error stops the solver, which returns it.
    fn after(&mut self, b: &mut B, step: SolverStep<B::Tensor>) -> Result<(), SampleError> {
        let _ = (b, step);
        Ok(())
    }
}

/// Turns noisy images [n, h, w, c] at the first noise level of a valid `config` into images, by the config's solver.
/// Guidance is left to the denoiser.
///
/// # Errors
/// Those of the denoiser.
pub fn solve<B: Backend>(
    b: &mut B,
    denoiser: &mut impl Denoise<B>,
    config: &SamplerConfig,
    noisy: &B::Tensor,
) -> Result<B::Tensor, SampleError> {
    let (sigmas, x) = (config.sigmas(), noisy.clone());
    match config.solver {
        Solver::Dpmpp2m => dpmpp_2m(b, denoiser, &sigmas, x),
        Solver::Heun => edm(b, denoiser, &sigmas, config.churn, true, x),
        Solver::Euler => edm(b, denoiser, &sigmas, config.churn, false, x),
    }
}

/// The noise levels at which the solver evaluates the network, in order; none twice in a row.
pub fn levels(config: &SamplerConfig) -> Vec<f64> {
    let sigmas = config.sigmas();
    let of = sigmas.len() - 1;
    let corrected = |next| if config.solver == Solver::Heun { next } else { 0.0 };
    let of_step = |pair: &[f64]| [churned(config.churn, pair[0], of), corrected(pair[1])];
    let mut levels: Vec<f64> = sigmas.windows(2).flat_map(of_step).filter(|&sigma| sigma > 0.0).collect();
    levels.dedup();
    levels
}

/// t_hat: the noise level to which churn raises that of a step.
fn churned(churn: Churn, sigma: f64, of: usize) -> f64 {
    let raises = churn.s_churn > 0.0 && (churn.s_min..=churn.s_max).contains(&sigma);
    let gamma = if raises { (churn.s_churn / of as f64).min(std::f64::consts::SQRT_2 - 1.0) } else { 0.0 };
    sigma + sigma * gamma
}

/// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with h = ln(sigma / sigma_next):
/// x <- (sigma_next / sigma) x + (1 - exp(-h)) d, d = D_i + (D_i - D_{i-1}) h / (2 h_last),
/// but d = D_i in the first step and in the last, which ends at 0.
fn dpmpp_2m<B: Backend>(
    b: &mut B,
    denoiser: &mut impl Denoise<B>,
    sigmas: &[f64],
    mut x: B::Tensor,
) -> Result<B::Tensor, SampleError> {
    let of = sigmas.len() - 1;
    let mut last: Option<(Guided<B::Tensor>, f64)> = None;
    for (index, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoiser.denoise(b, &x, sigma)?;
        let ratio = next / sigma;
        let h = -ratio.ln();
        let previous = last.as_ref().filter(|_| next > 0.0);
        let extrapolate = previous.map_or(0.0, |(_, h_last)| h / (2.0 * h_last));
        x = {
            let mut terms = Vec::with_capacity(5);
            if next > 0.0 {
                terms.push((&x, ratio));
            }
            terms.extend(denoised.terms((1.0 - ratio) * (1.0 + extrapolate)));
            if let Some((before, _)) = previous {
                terms.extend(before.terms(-(1.0 - ratio) * extrapolate));
            }
            b.linear_combination(&terms)
        };
        denoiser.after(b, SolverStep { index, of, sigma, x: &x, denoised: &denoised })?;
        last = Some((denoised, h));
    }
    Ok(x)
}

/// EDM's stochastic sampler (algorithm 2): churn, an Euler step, and, if `correct` and not at the end, the
/// trapezoidal correction.
fn edm<B: Backend>(
    b: &mut B,
    denoiser: &mut impl Denoise<B>,
    sigmas: &[f64],
    churn: Churn,
    correct: bool,
    mut x: B::Tensor,
) -> Result<B::Tensor, SampleError> {
    let of = sigmas.len() - 1;
    for (index, pair) in sigmas.windows(2).enumerate() {
        let (current, next) = (pair[0], pair[1]);
        let sigma = churned(churn, current, of);
        if sigma > current {
            let added = (sigma * sigma - current * current).sqrt() * churn.s_noise;
            let noise = denoiser.noise(b, index);
            x = b.linear_combination(&[(&x, 1.0), (&noise, added)]);
        }
        let denoised = denoiser.denoise(b, &x, sigma)?;
        let ratio = next / sigma;
        let mut terms = Vec::with_capacity(6);
        if next > 0.0 {
            terms.push((&x, ratio));
        }
        terms.extend(denoised.terms(1.0 - ratio));
        let mut arrived = b.linear_combination(&terms);
        if correct && next > 0.0 {
            let second = denoiser.denoise(b, &arrived, next)?;
            // x + (next - sigma) / 2 * ((x - D) / sigma + (x' - D') / next)
            let (half, half_next) = ((ratio - 1.0) / 2.0, (1.0 - 1.0 / ratio) / 2.0);
            let mut terms = vec![(&x, 1.0 + half), (&arrived, half_next)];
            terms.extend(denoised.terms(-half));
            terms.extend(second.terms(-half_next));
            arrived = b.linear_combination(&terms);
        }
        x = arrived;
        denoiser.after(b, SolverStep { index, of, sigma, x: &x, denoised: &denoised })?;
    }
    Ok(x)
}
