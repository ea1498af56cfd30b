//! Tables of scalars: preconditioning, learning rates, moving averages.

use serde::Deserialize;

use super::{Array, Quantity, Result, Session, download, normalization};
use crate::backend::{Backend, Logvar, LossInput, NetworkBackend, Slot, TrainingBackend};
use crate::device::Backends;
use crate::params::ParamTable;
use crate::train::ema::{power_function_beta, std_to_exp};
use crate::train::posthoc::{correlation, exp_to_std, solve_posthoc};
use crate::train::schedule::{LearningRate, Schedule};

/// Bound of what both sides compute in f64. Rounding is 1e-16; the rest is room for the conditioning of roots and
/// powers.
const DOUBLE: f64 = 1e-12;

#[derive(Deserialize)]
struct PrecondRow {
    sigma: f64,
    sigma_data: f64,
    c_skip: f64,
    c_out: f64,
    c_in: f64,
    c_noise: f64,
    loss_weight: f64,
}

/// Each coefficient as the device applies it, to images of ones and zeros.
pub(super) fn precond(s: &mut Session<impl Backends>) -> Result<()> {
    const FREQ: f32 = 0.25;
    let rows: Vec<PrecondRow> = s.json("precond.json")?;
    let phase = -std::f32::consts::FRAC_PI_2;
    let mut table = ParamTable::default();
    let gain = table.gain("out_gain".into());
    let (freqs, phases) = table.fourier("fourier".into(), 1);
    let weight = table.linear("linear".into(), 1, 1);
    let mut b = s.backends.training(&table, 0)?;
    for (id, value) in [(gain, 1.0), (freqs, FREQ), (phases, phase), (weight, 1.0)] {
        b.write_param(Slot::Weight, id, &[value])?;
    }
    b.make_effective(Slot::Weight, normalization(0))?;
    let one = b.upload([1; 4], &[1.0]);
    let zero = b.upload([1; 4], &[0.0]);

    let names = ["c_skip", "c_out", "c_in", "c_noise", "loss_weight"];
    let mut got: [Vec<f64>; 5] = Default::default();
    let mut expected: [Vec<f64>; 5] = Default::default();
    for row in &rows {
        let data = row.sigma_data;
        let sigma = b.upload([1; 4], &[row.sigma as f32]);
        let scaled = b.precond_input(&one, &sigma, data);
        let (features, _) = b.logvar(&Logvar { freqs, phases, weight }, &sigma);
        let skip = b.precond_output(&one, &zero, &sigma, gain, data);
        let out = b.precond_output(&zero, &one, &sigma, gain, data);
        let input = LossInput {
            clean: &one,
            noisy: &zero,
            raw: &zero,
            sigma: &sigma,
            logvar: &zero,
            out_gain: gain,
            sigma_data: data,
        };
        let loss = b.loss(input).per_image;
        // sqrt(2) cos(c_noise / 4 - pi/2) instead of c_noise itself.
        let noise = 2f64.sqrt() * (row.c_noise * f64::from(FREQ) + f64::from(phase)).cos();
        let pairs =
            [(skip, row.c_skip), (out, row.c_out), (scaled, row.c_in), (features, noise), (loss, row.loss_weight)];
        for (i, (t, e)) in pairs.into_iter().enumerate() {
            got[i].push(download(&mut b, &t)?[0]);
            expected[i].push(e);
        }
    }
    for ((name, got), expected) in names.into_iter().zip(got).zip(expected) {
        // Relative to each entry: c_out spans five orders of magnitude. c_noise is 0 at sigma = 1, or what f32 makes
        // of pi/2.
        let zero = f64::from(f32::EPSILON);
        let relative = |(g, e): (&f64, &f64)| if e.abs() < zero { 1.0 + g - e } else { g / e };
        let ratios: Vec<f64> = got.iter().zip(&expected).map(relative).collect();
        let bound = s.bound(Quantity::Forward, "precond.json", name, rows.len());
        let name = format!("precond.json/{name} (device / table)");
        s.compare(name, bound, &ratios, &Array::new(&[rows.len()], vec![1.0; rows.len()]));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RateRow {
    cur_nimg: f64,
    batch_size: f64,
    ref_lr: f64,
    ref_batches: f64,
    #[serde(rename = "rampup_Mimg")]
    rampup: f64,
    lr: f64,
}

pub(super) fn learning_rates(s: &mut Session<impl Backends>) -> Result<()> {
    let rows: Vec<RateRow> = s.json("lr_schedule.json")?;
    let got = |row: &RateRow| {
        let schedule = LearningRate {
            schedule: Schedule::Edm2,
            reference: row.ref_lr,
            decay: row.ref_batches,
            rampup: row.rampup * 1e6,
            batch: row.batch_size,
            duration: 0.0,
        };
        schedule.at(row.cur_nimg as u64)
    };
    let got: Vec<f64> = rows.iter().map(got).collect();
    let expected = Array::new(&[rows.len()], rows.iter().map(|row| row.lr).collect());
    s.compare("lr_schedule.json/lr".into(), DOUBLE, &got, &expected);
    Ok(())
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Profiles {
    std_to_exp: Vec<StdExp>,
    exp_to_std: Vec<StdExp>,
    power_function_beta: Vec<Beta>,
    posthoc: Vec<Posthoc>,
    corr: Option<Correlation>,
}

#[derive(Deserialize)]
struct StdExp {
    std: f64,
    exp: f64,
}

#[derive(Deserialize)]
struct Beta {
    std: f64,
    t_next: f64,
    t_delta: f64,
    beta: f64,
}

#[derive(Deserialize)]
struct Posthoc {
    name: String,
    in_nimg: Vec<f64>,
    in_std: Vec<f64>,
    out_nimg: f64,
    out_std: Vec<f64>,
    #[serde(default)]
    coefficients_exact: Vec<Vec<f64>>,
    #[serde(rename = "cond_A", default)]
    condition: f64,
}

#[derive(Deserialize)]
struct Correlation {
    a_nimg: Vec<f64>,
    a_std: Vec<f64>,
    b_nimg: Vec<f64>,
    b_std: Vec<f64>,
}

/// Time and width of each profile.
fn pairs(nimg: &[f64], std: &[f64]) -> Vec<(f64, f64)> {
    nimg.iter().copied().zip(std.iter().copied()).collect()
}

pub(super) fn moving_averages(s: &mut Session<impl Backends>) -> Result<()> {
    let p: Profiles = s.json("phema.json")?;
    let column = |values: Vec<f64>| Array::new(&[values.len()], values);
    for (name, got, expected) in [
        (
            "std_to_exp",
            p.std_to_exp.iter().map(|row| std_to_exp(row.std)).collect::<Vec<_>>(),
            p.std_to_exp.iter().map(|row| row.exp).collect(),
        ),
        (
            "exp_to_std",
            p.exp_to_std.iter().map(|row| exp_to_std(row.exp)).collect(),
            p.exp_to_std.iter().map(|row| row.std).collect(),
        ),
        (
            "power_function_beta",
            p.power_function_beta
                .iter()
                .map(|row| power_function_beta(row.std, row.t_next as u64, row.t_delta as u64))
                .collect(),
            p.power_function_beta.iter().map(|row| row.beta).collect(),
        ),
    ] {
        match got.is_empty() {
            true => s.skip(format!("phema.json/{name}"), "absent"),
            false => s.compare(format!("phema.json/{name}"), DOUBLE, &got, &column(expected)),
        }
    }

    let f = match s.dir.join("phema.safetensors").exists() {
        true => Some(s.open("phema.safetensors")?),
        false => None,
    };
    if p.posthoc.is_empty() {
        s.skip("phema.json/posthoc", "absent");
    }
    for case in &p.posthoc {
        let (inputs, n) = (pairs(&case.in_nimg, &case.in_std), case.in_nimg.len());
        let outputs: Vec<_> = case.out_std.iter().map(|&std| (case.out_nimg, std)).collect();
        let (a, b) = (correlation(&inputs, &inputs), correlation(&inputs, &outputs));
        let Some(x) = solve_posthoc(&inputs, &outputs) else {
            s.skip(format!("phema.json/{}", case.name), "its profiles have no unique combination");
            continue;
        };
        // Solving multiplies the rounding by the condition number of A.
        let solved = (super::FACTOR * case.condition * f64::EPSILON).max(DOUBLE);
        for (tensor, got, bound) in [("A", &a, DOUBLE), ("B", &b, DOUBLE), ("X_exact", &x, solved)] {
            let tensor = format!("{}.{tensor}", case.name);
            let Some(f) = f.as_ref().filter(|f| f.has(&tensor)) else { continue };
            s.compare(format!("phema/{tensor}"), bound, got, &f.array(&tensor)?);
        }
        if f.as_ref().is_none_or(|f| !f.has(&format!("{}.X_exact", case.name))) && !case.coefficients_exact.is_empty() {
            let expected = Array::new(&[n, outputs.len()], case.coefficients_exact.concat());
            s.compare(format!("phema.json/{}.coefficients_exact", case.name), solved, &x, &expected);
        }
    }
    match (&p.corr, &f) {
        (Some(c), Some(f)) if f.has("corr.matrix") => {
            let got = correlation(&pairs(&c.a_nimg, &c.a_std), &pairs(&c.b_nimg, &c.b_std));
            s.compare("phema/corr.matrix".into(), DOUBLE, &got, &f.array("corr.matrix")?);
        }
        _ => s.skip("phema/corr.matrix", "absent"),
    }
    for name in f.iter().flat_map(|f| f.unseen()) {
        let why = if name.ends_with(".X") { "X_exact is the truth that it approximates" } else { "not used here" };
        s.skip(format!("phema/{name}"), why);
    }
    Ok(())
}
