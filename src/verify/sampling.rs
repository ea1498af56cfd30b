//! Sampler trajectories: the solvers on recorded denoised images, and end to end with the network.

use serde::Deserialize;

use super::network::{images, labels, network};
use super::{Array, Golden, Quantity, Result, Session, download};
use crate::backend::NetworkBackend;
use crate::device::Backends;
use crate::model::Precond;
use crate::sample::{Churn, Denoise, Guided, SampleError, SamplerConfig, Solver, solve};

/// Settings in the metadata, under the name of the solver.
#[derive(Deserialize)]
struct SamplerCase {
    num_steps: usize,
    sigma_min: f64,
    sigma_max: f64,
    rho: f64,
    #[serde(rename = "S_churn", default)]
    s_churn: f64,
}

pub(super) fn samplers(s: &mut Session<impl Backends>) -> Result<()> {
    let parameters = s.open("tiny_model.safetensors")?;
    let f = &s.open("samplers.safetensors")?;
    s.case("samplers", |s| {
        let (net, _, mut b) = network(s, &parameters)?;
        for case in f.cases() {
            s.case(&format!("samplers/{case}"), |s| sampler(s, f, &case, &net, &mut b))?;
        }
        Ok(())
    })?;
    s.skip_rest(f, "not computed, or its case was skipped");
    Ok(())
}

/// How a case was sampled; none if it is skipped.
fn config(s: &mut Session<impl Backends>, f: &Golden, case: &str) -> Result<Option<SamplerConfig>> {
    let parsed = case.rsplit_once("_g").and_then(|(name, g)| Some((name, g.parse::<f64>().ok()?)));
    let solver = match parsed {
        Some(("heun", _)) => Solver::Heun,
        Some(("dpmpp2m", _)) => Solver::Dpmpp2m,
        _ => {
            s.skip(format!("samplers/{case}"), "a solver that is not known");
            return Ok(None);
        }
    };
    let (key, guidance) = parsed.unwrap_or_default();
    let Some(settings) = f.metadata::<SamplerCase>(key)? else {
        s.skip(format!("samplers/{case}"), format!("metadata \"{key}\" is absent"));
        return Ok(None);
    };
    if settings.s_churn != 0.0 {
        s.skip(format!("samplers/{case}"), "its churn needs the reference's random numbers");
        return Ok(None);
    }
    let SamplerCase { num_steps: steps, sigma_min, sigma_max, rho, .. } = settings;
    let config = SamplerConfig {
        solver,
        steps,
        sigma_min,
        sigma_max,
        rho,
        guidance,
        guidance_interval: None,
        churn: Churn::NONE,
        strength: 1.0,
    };
    config.validate().map_err(|e| f.wrong(key, e.to_string()))?;
    Ok(Some(config))
}

fn sampler<B: NetworkBackend>(
    s: &mut Session<impl Backends>,
    f: &Golden,
    case: &str,
    net: &Precond,
    b: &mut B,
) -> Result<()> {
    let Some(config) = config(s, f, case)? else { return Ok(()) };
    let SamplerConfig { solver, steps, guidance, .. } = config;
    let levels = if solver == Solver::Heun { "t_steps" } else { "sigmas" };
    s.check(f, &format!("{case}.{levels}"), Quantity::Sampler, &config.sigmas())?;

    let noise = images(f, "noise", net)?;
    let noise_there = noise.upload(b);
    let start = b.linear_combination(&[(&noise_there, config.sigmas()[0])]);
    let stack = |name: &str| -> Result<Vec<Array>> {
        let all = f.array(&format!("{case}.{name}"))?;
        let shape = [&[all.shape.first().copied().unwrap_or(0)], &noise.shape[..]].concat();
        let all = f.shaped(&format!("{case}.{name}"), &shape)?;
        Ok(all.values.chunks(noise.values.len()).map(|x| Array::new(&noise.shape, x.to_vec())).collect())
    };
    let expected = stack("x")?;
    // The bound of the trajectory as a whole is used for each of its points.
    let bound = ["x_final", "x_all"]
        .map(|name| s.bound(Quantity::Sampler, &f.name, &format!("{case}.{name}"), noise.values.len()))
        .into_iter()
        .fold(0.0, f64::max);

    let conditional = stack("D_cond")?;
    let unconditional = if guidance == 1.0 { vec![] } else { stack("D_uncond")? };
    let calls = if solver == Solver::Heun { 2 * steps - 1 } else { steps };
    if conditional.len() != calls || guidance != 1.0 && unconditional.len() != calls {
        let found = format!("{} and {} evaluations", conditional.len(), unconditional.len());
        return Err(f.file.unexpected(&format!("{case}.D_cond"), found, format!("{calls} for {steps} steps")).into());
    }
    let mut recorded = RecordedCalls { conditional, unconditional, guidance, seen: vec![], guided: vec![] };
    let x = solve(b, &mut recorded, &config, &start)?;
    recorded.seen.push(x);
    let (mut points, mut corrections) = (vec![], vec![]);
    for (call, x) in recorded.seen.iter().enumerate() {
        // Heun: the input of every second evaluation is the result of an Euler step.
        let to = if solver == Solver::Heun && call % 2 == 1 && call < calls { &mut corrections } else { &mut points };
        to.push(download(b, x)?);
    }
    compare_all(s, f, &format!("{case}.x"), bound, &points, &expected, "given D");
    if solver == Solver::Heun && f.has(&format!("{case}.x_euler")) {
        compare_all(s, f, &format!("{case}.x_euler"), bound, &corrections, &stack("x_euler")?, "given D");
    }
    if f.has(&format!("{case}.D_guided")) {
        let guided = |d: &Guided<B::Tensor>| {
            let d = d.tensor(b);
            download(b, &d)
        };
        let guided: Result<Vec<_>> = recorded.guided.iter().map(guided).collect();
        compare_all(s, f, &format!("{case}.D_guided"), bound, &guided?, &stack("D_guided")?, "given D");
    }

    let labels = labels(f, "labels", noise.shape[0], net)?.map(|labels| labels.upload(b));
    let n = noise.shape[0];
    let mut live = Live { net, labels, guidance, n };
    let x = solve(b, &mut live, &config, &start)?;
    let got = download(b, &x)?;
    let bound = s.bound(Quantity::Forward, &f.name, &format!("{case}.x_final"), got.len());
    if let Some(last) = expected.last() {
        s.compare(format!("{}/{case}.x[{steps}] (end to end)", f.stem), bound, &got, last);
    }
    if f.has(&format!("{case}.x_final.f64")) {
        let last = f.shaped(&format!("{case}.x_final.f64"), &noise.shape)?;
        s.compare(format!("{}/{case}.x_final.f64 (end to end)", f.stem), bound, &got, &last);
    }
    Ok(())
}

fn compare_all(
    s: &mut Session<impl Backends>,
    f: &Golden,
    name: &str,
    bound: f64,
    got: &[Vec<f64>],
    expected: &[Array],
    how: &str,
) {
    if got.len() != expected.len() {
        let count = |n: usize| Array::new(&[], vec![n as f64]);
        let name = format!("{}/{name} (number of points)", f.stem);
        s.compare(name, 0.0, &[got.len() as f64], &count(expected.len()));
    }
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        s.compare(format!("{}/{name}[{i}] ({how})", f.stem), bound, got, expected);
    }
}

/// Returns the denoised images of the file in the order of the calls, and remembers the inputs.
struct RecordedCalls<T> {
    conditional: Vec<Array>,
    unconditional: Vec<Array>,
    guidance: f64,
    seen: Vec<T>,
    guided: Vec<Guided<T>>,
}

impl<B: NetworkBackend> Denoise<B> for RecordedCalls<B::Tensor> {
    fn denoise(&mut self, b: &mut B, x: &B::Tensor, _: f64) -> Result<Guided<B::Tensor>, SampleError> {
        let call = self.seen.len();
        self.seen.push(x.clone());
        let d = self.conditional[call].upload(b);
        let guided = match self.unconditional.get(call) {
            Some(reference) => Guided::new(d, reference.upload(b), self.guidance),
            None => Guided::unguided(d),
        };
        self.guided.push(guided.clone());
        Ok(guided)
    }

    fn noise(&mut self, _: &mut B, _: usize) -> B::Tensor {
        unreachable!("no churn")
    }
}

/// The network, guided by itself without labels.
struct Live<'a, T> {
    net: &'a Precond,
    labels: Option<T>,
    guidance: f64,
    n: usize,
}

impl<B: NetworkBackend> Denoise<B> for Live<'_, B::Tensor> {
    fn denoise(&mut self, b: &mut B, x: &B::Tensor, sigma: f64) -> Result<Guided<B::Tensor>, SampleError> {
        let sigma = b.upload([self.n, 1, 1, 1], &vec![sigma as f32; self.n]);
        let d = self.net.denoise(b, x, &sigma, self.labels.as_ref());
        if self.guidance == 1.0 {
            return Ok(Guided::unguided(d));
        }
        let reference = self.net.denoise(b, x, &sigma, None);
        Ok(Guided::new(d, reference, self.guidance))
    }

    fn noise(&mut self, _: &mut B, _: usize) -> B::Tensor {
        unreachable!("no churn")
    }
}
