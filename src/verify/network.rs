//! Whole networks: evaluation, gradients, and training steps.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::ops::{EPS, fourier_argument};
use super::{Array, Golden, Quantity, Result, Session, VerifyError, download, normalization, param, still_step};
use crate::backend::{Embed, NetworkBackend, OptimizerStep, Slot, TrainingBackend};
use crate::device::Backends;
use crate::model::{Config, Precond};
use crate::params::{ParamKind, ParamSpec, ParamTable};

/// Weights are normalised once in a training step, unless gradients are accumulated.
const ROUNDS: usize = 1;

/// The network of a parameter file, ready to be evaluated.
pub(super) fn network<M: Backends>(s: &Session<M>, parameters: &Golden) -> Result<(Precond, ParamTable, M::Sampling)> {
    let config = s.config(parameters, "model")?;
    let (net, table) = Precond::new(&config).map_err(|e| parameters.config_error(e))?;
    let mut b = s.load(parameters, "", &table, s.backends.sampling(&table)?)?;
    b.normalize()?;
    Ok((net, table, b))
}

/// The same to be trained.
fn trainable<M: Backends>(
    s: &Session<M>,
    parameters: &Golden,
    config: &Config,
    averages: usize,
) -> Result<(Precond, ParamTable, M::Training)> {
    let (net, table) = Precond::new(config).map_err(|e| parameters.config_error(e))?;
    let b = s.load(parameters, "", &table, s.backends.training(&table, averages)?)?;
    Ok((net, table, b))
}

/// Images [n, c, h, w] that suit the network.
pub(super) fn images(f: &Golden, name: &str, net: &Precond) -> Result<Array> {
    let x = f.images(name)?;
    let [n, h, w, _] = x.nhwc();
    net.config.check_size(h, w).map_err(|e| f.config_error(e))?;
    f.shaped(name, &[n, net.config.img_channels, h, w])
}

/// One value for each of `n` images, in whatever shape they are stored.
pub(super) fn per_image(f: &Golden, name: &str, n: usize) -> Result<Array> {
    let x = f.array(name)?;
    match x.values.len() == n {
        true => Ok(Array::new(&[n, 1, 1, 1], x.values)),
        false => Err(f.misshapen(name, &x.shape, format!("one value for each of {n} images"))),
    }
}

/// Labels [n, label_dim], where the file has them.
pub(super) fn labels(f: &Golden, name: &str, n: usize, net: &Precond) -> Result<Option<Array>> {
    if net.config.label_dim == 0 || !f.has(name) {
        return Ok(None);
    }
    Ok(Some(f.shaped(name, &[n, net.config.label_dim])?))
}

pub(super) fn forward(s: &mut Session<impl Backends>) -> Result<()> {
    let parameters = s.open("tiny_model.safetensors")?;
    let f = &s.open("tiny_forward.safetensors")?;
    s.case("tiny_forward", |s| {
        let (net, table, mut b) = network(s, &parameters)?;
        for set in f.cases() {
            s.case(&format!("tiny_forward/{set}"), |s| forward_set(s, f, &set, &parameters, &net, &table, &mut b))?;
        }
        Ok(())
    })?;
    s.skip_rest(f, "not computed, or its set was skipped");
    Ok(())
}

fn forward_set<B: NetworkBackend>(
    s: &mut Session<impl Backends>,
    f: &Golden,
    set: &str,
    parameters: &Golden,
    net: &Precond,
    table: &ParamTable,
    b: &mut B,
) -> Result<()> {
    let x = images(f, &format!("{set}.x"), net)?;
    let n = x.shape[0];
    let sigmas = per_image(f, &format!("{set}.sigma"), n)?;
    let labels = labels(f, &format!("{set}.class_labels"), n, net)?;
    let (tx, sigma) = (x.upload(b), sigmas.upload(b));
    let labels = labels.map(|labels| labels.upload(b));

    let mut activations = Vec::new();
    let mut probe = |name: &str, t: &B::Tensor| {
        let tensor = format!("{set}.act.{name}");
        if f.has(&tensor) {
            activations.push((tensor, t.clone()));
        }
    };
    let (d, raw, e) = net.denoise_probed(b, &tx, &sigma, labels.as_ref(), &mut probe);
    for (tensor, t) in activations {
        s.check(f, &tensor, Quantity::Forward, &download(b, &t)?)?;
    }
    let out_gain = parameters.shaped("unet.out_gain", &[])?.values[0];
    let got: Vec<f64> = download(b, &raw)?.iter().map(|x| x * out_gain).collect();
    s.check(f, &format!("{set}.F_x"), Quantity::Forward, &got)?;
    let has = |name: &str| f.has(&format!("{set}.{name}"));
    s.check_if(f, &format!("{set}.F_x.f64"), Quantity::Forward, &got)?;
    let got = download(b, &d)?;
    s.check(f, &format!("{set}.D_x"), Quantity::Forward, &got)?;
    s.check_if(f, &format!("{set}.D_x.f64"), Quantity::Forward, &got)?;
    let (features, logvar) = net.logvar(b, &sigma);
    s.check_if(f, &format!("{set}.logvar"), Quantity::Forward, &download(b, &logvar)?)?;
    // The c_noise from which the features were computed is no tensor of the file, so it is computed by its formula.
    let c_noise: Vec<f64> = sigmas.values.iter().map(|sigma| sigma.ln() / 4.0).collect();
    s.check_if(f, &format!("{set}.c_noise"), Quantity::Forward, &c_noise)?;
    for (name, buffers, features) in
        [("emb_fourier", "unet.emb_fourier", &e.features), ("logvar_fourier", "logvar_fourier", &features)]
    {
        let tensor = format!("{set}.{name}");
        if has(name) {
            let freqs = parameters.array(&format!("{buffers}.freqs"))?.values;
            let phases = parameters.array(&format!("{buffers}.phases"))?.values;
            let bound = s.fourier_bound(fourier_argument(&c_noise, &freqs, &phases));
            s.compare(format!("{}/{tensor}", f.stem), bound, &download(b, features)?, &f.array(&tensor)?);
        }
    }
    let find = |name: &str| table.find(name);
    let layers = (find("unet.emb_fourier.freqs"), find("unet.emb_fourier.phases"), find("unet.emb_noise.weight"));
    if let (Some(freqs), Some(phases), Some(noise)) = layers {
        // Checks each branch of the embedding alone: without labels, and with all the weight on them.
        let label = find("unet.emb_label.weight");
        for (name, label, label_balance) in [("emb_noise", None, 0.5), ("emb_label", label, 1.0)] {
            if has(name) {
                let branch = b.embed(&Embed { freqs, phases, noise, label, label_balance }, &sigma, labels.as_ref());
                s.check(f, &format!("{set}.{name}"), Quantity::Forward, &download(b, &branch.pre)?)?;
            }
        }
    }
    s.check_if(f, &format!("{set}.emb"), Quantity::Forward, &download(b, &e.emb)?)
}

/// Inputs of a training pass, the tensors of a file whose names begin with `prefix`.
struct PassInputs<T> {
    clean: T,
    noisy: T,
    sigma: T,
    labels: Option<T>,
    /// `[n, c, h, w]` and `[n]`, for recomputing the loss.
    images: Array,
    sigmas: Array,
}

impl<T> PassInputs<T> {
    fn new<B: TrainingBackend<Tensor = T>>(f: &Golden, prefix: &str, net: &Precond, b: &mut B) -> Result<Self> {
        let clean = images(f, &format!("{prefix}images"), net)?;
        let noise = f.shaped(&format!("{prefix}noise_unit"), &clean.shape)?;
        let n = clean.shape[0];
        let sigmas = per_image(f, &format!("{prefix}sigma"), n)?;
        let size = clean.values.len() / n;
        let noisy = clean.values.iter().zip(&noise.values).enumerate();
        let noisy = noisy.map(|(i, (x, noise))| x + sigmas.values[i / size] * noise).collect();
        let noisy = Array::new(&clean.shape, noisy).upload(b);
        let labels = labels(f, &format!("{prefix}labels"), n, net)?.map(|labels| labels.upload(b));
        Ok(Self { clean: clean.upload(b), noisy, sigma: sigmas.upload(b), labels, images: clean, sigmas })
    }
}

/// What a training pass gives for its loss.
struct Losses {
    /// `[n, c, h, w]`
    denoised: Vec<f64>,
    /// `[n]`
    logvar: Vec<f64>,
    /// The loss of each element, computed from those two, [n, c, h, w].
    elements: Vec<f64>,
    /// The loss as the backend summed it, `[n]`.
    per_image: Vec<f64>,
}

/// Forward and backward; the gradients are left in the backend.
fn pass<B: TrainingBackend>(net: &Precond, b: &mut B, batch: &PassInputs<B::Tensor>) -> Result<Losses> {
    let pass = net.train_forward(b, &batch.clean, &batch.noisy, &batch.sigma, batch.labels.as_ref(), None);
    let d = b.precond_output(&batch.noisy, &pass.raw, &batch.sigma, net.out_gain(), net.config.sigma_data);
    let denoised = download(b, &d)?;
    let logvar = download(b, &pass.logvar)?;
    let per_image = download(b, &pass.per_image)?;
    net.backward(b, pass, &mut |_, _| {});
    let size = denoised.len() / logvar.len();
    let data = net.config.sigma_data;
    let element = |(i, (d, clean)): (usize, (&f64, &f64))| {
        let (sigma, logvar) = (batch.sigmas.values[i / size], logvar[i / size]);
        let weight = (sigma * sigma + data * data) / (sigma * data).powi(2);
        weight / logvar.exp() * (d - clean).powi(2) + logvar
    };
    let elements = denoised.iter().zip(&batch.images.values).enumerate().map(element).collect();
    Ok(Losses { denoised, logvar, elements, per_image })
}

impl Losses {
    /// Compares with the tensors of a file; `total` images are in the batch that the scalar is an average of.
    fn check(
        &self,
        s: &mut Session<impl Backends>,
        f: &Golden,
        suffix: &str,
        total: usize,
        what: Quantity,
    ) -> Result<()> {
        let elements = format!("loss_elem{suffix}");
        s.check(f, &elements, what, &self.elements)?;
        if !f.has(&elements) {
            return Ok(());
        }
        // Compares the sums that the backend computes itself with those of the file's elements.
        let expected = f.array(&elements)?;
        let size = expected.values.len() / self.per_image.len().max(1);
        let sums: Vec<f64> = expected.values.chunks(size.max(1)).map(|image| image.iter().sum()).collect();
        let bound = s.bound(what, &f.name, &elements, expected.values.len());
        let name = format!("{}/{elements} (sum of each image)", f.stem);
        s.compare(name, bound, &self.per_image, &Array::new(&[sums.len()], sums));
        let scalar = format!("loss_scalar{suffix}");
        let sum: f64 = self.per_image.iter().sum();
        if f.has(&scalar) {
            s.check_as(f, &scalar, &elements, what, &[sum / total as f64])?;
        }
        for (name, got) in [
            ("denoised", self.denoised.clone()),
            ("logvar", self.logvar.clone()),
            ("loss_per_sample", self.per_image.clone()),
            ("loss_mean", vec![sum / self.elements.len() as f64]),
        ] {
            if f.has(name) {
                s.check_as(f, name, if name == "denoised" { name } else { &elements }, what, &got)?;
            }
        }
        Ok(())
    }
}

/// The noise levels of the training distribution.
fn check_sigma(s: &mut Session<impl Backends>, f: &Golden, prefix: &str, mean: f64, std: f64) -> Result<()> {
    let normal = format!("{prefix}rnd_normal");
    if f.has(&normal) {
        let got: Vec<f64> = f.array(&normal)?.values.iter().map(|x| (x * std + mean).exp()).collect();
        s.check(f, &format!("{prefix}sigma"), Quantity::Forward, &got)?;
    }
    Ok(())
}

/// The first rows of a gradient. Where the directory says how exact the whole is but not these rows, rounding may do
/// to them what it does to the others: if they are smaller than the average row, then relatively more.
fn check_rows(s: &mut Session<impl Backends>, f: &Golden, spec: &ParamSpec, got: &[f64]) -> Result<()> {
    let rows = format!("grad_rows.{}", spec.name);
    let norm = format!("gradnorm.{}", spec.name);
    let expected = f.array(&rows)?;
    let len = expected.values.len().min(got.len());
    let own = s.tolerances.get(&f.name).is_some_and(|entries| entries.get(&rows).is_some());
    let bound = match own {
        true => s.bound(Quantity::Gradient, &f.name, &rows, len),
        false => {
            let whole = if f.has(&norm) { f.shaped(&norm, &[])?.values[0] / (spec.numel() as f64).sqrt() } else { 0.0 };
            let here = (expected.values.iter().map(|x| x * x).sum::<f64>() / len.max(1) as f64).sqrt();
            let smaller = if whole > here && here > 0.0 { whole / here } else { 1.0 };
            s.bound(Quantity::Gradient, &f.name, &format!("grad.{}", spec.name), len) * smaller
        }
    };
    s.compare(format!("{}/{rows}", f.stem), bound, &got[..len], &expected);
    Ok(())
}

pub(super) fn gradients(s: &mut Session<impl Backends>) -> Result<()> {
    let parameters = s.open("tiny_model.safetensors")?;
    let f = &s.open("tiny_grads.safetensors")?;
    s.case("tiny_grads", |s| {
        let config = s.config(&parameters, "model")?;
        let (net, table, mut b) = trainable(s, &parameters, &config, 0)?;
        b.make_effective(Slot::Weight, normalization(ROUNDS))?;
        let batch = PassInputs::new(f, "", &net, &mut b)?;
        check_sigma(s, f, "", -0.4, 1.0)?;
        let losses = pass(&net, &mut b, &batch)?;
        let n = batch.images.shape[0];
        losses.check(s, f, "", n, Quantity::Gradient)?;
        still_step(&mut b, ROUNDS, 1.0 / n as f64)?;
        for (id, spec) in table.iter().filter(|(_, spec)| spec.trained()) {
            let got = param(&mut b, Slot::Grad, id)?;
            let key = format!("grad.{}", spec.name);
            let rows = format!("grad_rows.{}", spec.name);
            if f.has(&key) {
                s.check(f, &key, Quantity::Gradient, &got)?;
            } else if f.has(&rows) {
                check_rows(s, f, spec, &got)?;
            } else {
                s.skip(format!("tiny_grads/{key}"), "absent");
            }
            let norm = format!("gradnorm.{}", spec.name);
            if f.has(&norm) {
                let got = got.iter().map(|x| x * x).sum::<f64>().sqrt();
                s.check_as(f, &norm, &key, Quantity::Gradient, &[got])?;
            }
        }
        Ok(())
    })?;
    s.skip_rest(f, "not computed");
    Ok(())
}

/// `tiny_train.json`.
#[derive(Deserialize)]
struct TrainingCase {
    adam: AdamSettings,
    #[serde(rename = "P_mean")]
    p_mean: f64,
    #[serde(rename = "P_std")]
    p_std: f64,
    sigma_data: Option<f64>,
    #[serde(default)]
    ema_stds: Vec<f64>,
    #[serde(default)]
    lrs: Vec<f64>,
    steps: Vec<TrainingStep>,
}

#[derive(Deserialize)]
struct AdamSettings {
    betas: (f64, f64),
    eps: f64,
    #[serde(default)]
    weight_decay: f64,
}

#[derive(Deserialize)]
struct TrainingStep {
    lr: f64,
    #[serde(default)]
    ema_betas: Vec<f64>,
    loss_scalar: Option<f64>,
    loss_mean: Option<f64>,
}

impl TrainingCase {
    fn read(s: &Session<impl Backends>) -> Result<Self> {
        let training: Self = s.json("tiny_train.json")?;
        let wrong = |what: &str| VerifyError::Json { path: s.dir.join("tiny_train.json"), what: what.into() };
        if training.adam.weight_decay != 0.0 {
            return Err(wrong("weight_decay is not 0, but EDM2 has none"));
        }
        if training.steps.iter().any(|step| step.ema_betas.len() != training.ema_stds.len()) {
            return Err(wrong("a step's ema_betas are not as many as ema_stds"));
        }
        Ok(training)
    }

    /// The network before training.
    fn network<M: Backends>(
        &self,
        s: &Session<M>,
        init: &Golden,
        averages: usize,
    ) -> Result<(Precond, ParamTable, M::Training)> {
        let mut config = s.config(init, "train")?;
        config.sigma_data = self.sigma_data.unwrap_or(config.sigma_data);
        trainable(s, init, &config, averages)
    }

    fn step<'a>(
        &'a self,
        lr: f64,
        number: usize,
        images: usize,
        rounds: usize,
        ema_betas: &'a [f64],
    ) -> OptimizerStep<'a> {
        let AdamSettings { betas, eps, .. } = self.adam;
        OptimizerStep { lr, betas, eps, step: number as u64, grad_scale: 1.0 / images as f64, rounds, ema_betas }
    }
}

/// All steps in a row, each from what this device made of the one before.
pub(super) fn training(s: &mut Session<impl Backends>) -> Result<()> {
    let init = s.open("tiny_train_init.safetensors")?;
    let t = TrainingCase::read(s)?;
    s.case("tiny_train", |s| {
        let (net, table, mut b) = t.network(s, &init, t.ema_stds.len())?;
        for (id, _) in table.iter() {
            let values = b.read_param(Slot::Weight, id)?;
            (0..t.ema_stds.len()).try_for_each(|ema| b.write_param(Slot::Ema(ema), id, &values))?;
        }
        b.make_effective(Slot::Weight, normalization(ROUNDS))?;
        let mut run = Run { t: &t, net, table, b, open: Undetermined::default() };
        for number in 1..=t.steps.len() {
            let name = format!("tiny_train_step{number}.safetensors");
            if !s.dir.join(&name).exists() {
                s.skip(name, "absent, so the steps from here on cannot be taken");
                break;
            }
            let f = &s.open(&name)?;
            run.step(s, f, number)?;
            s.skip_rest(f, "not computed");
        }
        Ok(())
    })
}

/// A training run from step to step.
struct Run<'a, B> {
    t: &'a TrainingCase,
    net: Precond,
    table: ParamTable,
    b: B,
    open: Undetermined,
}

impl<B: TrainingBackend> Run<'_, B> {
    fn step(&mut self, s: &mut Session<impl Backends>, f: &Golden, number: usize) -> Result<()> {
        let Self { t, net, table, b, .. } = &mut *self;
        let step = &t.steps[number - 1];
        let batch = PassInputs::new(f, "data.", net, b)?;
        check_sigma(s, f, "data.", t.p_mean, t.p_std)?;
        let losses = pass(net, b, &batch)?;
        let images = batch.images.shape[0];
        losses.check(s, f, "", images, Quantity::Training)?;
        let sum: f64 = losses.per_image.iter().sum();
        for (name, expected, got) in [
            ("loss_scalar", step.loss_scalar, sum / images as f64),
            ("loss_mean", step.loss_mean, sum / losses.elements.len() as f64),
        ] {
            if let Some(expected) = expected {
                let bound = s.bound(Quantity::Training, &f.name, "loss_elem", losses.elements.len());
                let name = format!("tiny_train.json/steps[{}].{name}", number - 1);
                s.compare(name, bound, &[got], &Array::new(&[], vec![expected]));
            }
        }
        if f.file.names().any(|name| name.starts_with("wnorm.")) {
            // The weights as the forward pass left them: a second backend takes the step at learning rate 0.
            let mut second = s.backends.training(table, 0)?;
            for (id, _) in table.iter() {
                let values = b.read_param(Slot::Weight, id)?;
                second.write_param(Slot::Weight, id, &values)?;
            }
            still_step(&mut second, ROUNDS, 1.0)?;
            for (id, spec) in table.iter() {
                let got = param(&mut second, Slot::Weight, id)?;
                s.check_if(f, &format!("wnorm.{}", spec.name), Quantity::Training, &got)?;
            }
        }
        b.optimizer_step(&t.step(step.lr, number, images, ROUNDS, &step.ema_betas))?;
        self.check(s, f)
    }

    /// Gradients, weights, moments and averages after a step, those that the file has.
    fn check(&mut self, s: &mut Session<impl Backends>, f: &Golden) -> Result<()> {
        let Self { t, table, b, open, .. } = self;
        for (_, spec) in table.iter() {
            let gradient = format!("grad.{}", spec.name);
            if f.has(&gradient) {
                let bound = s.bound(Quantity::Gradient, &f.name, &gradient, spec.numel());
                open.note(&spec.name, &f.shaped(&gradient, &spec.shape)?, bound);
            }
        }
        let mut slots = vec![
            ("grad".to_owned(), Slot::Grad, Quantity::Gradient),
            ("weight".to_owned(), Slot::Weight, Quantity::Training),
            ("adam_m".to_owned(), Slot::AdamM, Quantity::Training),
            ("adam_v".to_owned(), Slot::AdamV, Quantity::Training),
        ];
        for (ema, std) in t.ema_stds.iter().enumerate() {
            slots.push((format!("ema{:03}", (std * 1000.0).round()), Slot::Ema(ema), Quantity::Training));
        }
        for (prefix, slot, what) in slots {
            for (id, spec) in table.iter() {
                let tensor = format!("{prefix}.{}", spec.name);
                if !f.has(&tensor) {
                    continue;
                }
                let got = param(b, slot, id)?;
                match slot {
                    Slot::Weight | Slot::Ema(_) => open.check(s, f, &tensor, spec, got)?,
                    _ => s.check(f, &tensor, what, &got)?,
                }
            }
        }
        Ok(())
    }
}

/// Elements whose gradient in some step is too close to zero for its sign to be known: closer than the bound of the
/// gradient times its root mean square. Adam's first steps are the gradient's sign times the learning rate, so rounding
/// decides where such a weight goes; it is left out of the comparison. They are few: their share is about the bound.
#[derive(Default)]
struct Undetermined(BTreeMap<String, BTreeSet<usize>>);

impl Undetermined {
    fn note(&mut self, name: &str, gradient: &Array, bound: f64) {
        let mean_square = gradient.values.iter().map(|g| g * g).sum::<f64>() / gradient.values.len().max(1) as f64;
        let limit = bound * mean_square.sqrt();
        let few = gradient.values.iter().enumerate().filter(|(_, g)| g.abs() < limit).map(|(i, _)| i);
        self.0.entry(name.to_owned()).or_default().extend(few);
    }

    fn check(
        &self,
        s: &mut Session<impl Backends>,
        f: &Golden,
        tensor: &str,
        spec: &ParamSpec,
        mut got: Vec<f64>,
    ) -> Result<()> {
        let expected = f.shaped(tensor, &spec.shape)?;
        let bound = s.bound(Quantity::Training, &f.name, tensor, expected.values.len());
        let mut name = format!("{}/{tensor}", f.stem);
        if let Some(open) = self.0.get(&spec.name).filter(|open| !open.is_empty()) {
            open.iter().for_each(|&i| got[i] = expected.values[i]);
            name += &format!(" (but {} of gradient 0)", open.len());
        }
        s.compare(name, bound, &got, &expected);
        Ok(())
    }
}

/// How much a step of several micro-batches may differ by the eps of the normalisation. The reference projects the
/// gradient of the first micro-batch at weights that were normalised once: a row of rms r then has rms r / (r + eps).
/// It projects those of the other micro-batches at rms 1 - eps. A step here projects their sum at the latter. The
/// gradient is inverse to the rms, so for each row the two differ by eps |1/r - 1|.
fn renormalization(init: &Golden, spec: &ParamSpec) -> Result<f64> {
    let ParamKind::Weight { cout, .. } = spec.kind else { return Ok(0.0) };
    let w = init.shaped(&spec.name, &spec.shape)?;
    let row = |row: &[f64]| {
        let rms = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64).sqrt();
        EPS * (1.0 / rms - 1.0).abs()
    };
    Ok(w.values.chunks(w.values.len() / cout).map(row).fold(0.0, f64::max))
}

/// One step of several micro-batches.
pub(super) fn accumulation(s: &mut Session<impl Backends>) -> Result<()> {
    let init = s.open("tiny_train_init.safetensors")?;
    let t = TrainingCase::read(s)?;
    let variant = |name: &&String| name.starts_with("tiny_train_accum") && name.ends_with(".safetensors");
    let files: Vec<_> = s.names.iter().filter(variant).cloned().collect();
    files.iter().try_for_each(|name| {
        let f = s.open(name)?;
        accumulated_step(s, &init, &t, &f)
    })
}

fn accumulated_step(s: &mut Session<impl Backends>, init: &Golden, t: &TrainingCase, f: &Golden) -> Result<()> {
    let rounds = (0..).take_while(|i| f.has(&format!("data{i}.images"))).count();
    let lr = match f.metadata("lr")? {
        Some(lr) => lr,
        None => t.lrs.first().copied().ok_or_else(|| f.wrong("lr", "it is missing".into()))?,
    };
    if rounds == 0 {
        s.skip(&f.stem, "tensor data0.images is absent");
        return Ok(());
    }
    s.case(&f.stem, |s| {
        let (net, table, mut b) = t.network(s, init, 0)?;
        b.make_effective(Slot::Weight, normalization(rounds))?;
        let batches: Result<Vec<_>> =
            (0..rounds).map(|i| PassInputs::new(f, &format!("data{i}."), &net, &mut b)).collect();
        let batches = batches?;
        let total = batches.iter().map(|batch| batch.images.shape[0]).sum();
        for (i, batch) in batches.iter().enumerate() {
            check_sigma(s, f, &format!("data{i}."), t.p_mean, t.p_std)?;
            pass(&net, &mut b, batch)?.check(s, f, &i.to_string(), total, Quantity::Training)?;
        }
        b.optimizer_step(&t.step(lr, 1, total, rounds, &[]))?;
        let mut open = Undetermined::default();
        for (id, spec) in table.iter() {
            let gradient = format!("grad.{}", spec.name);
            if f.has(&gradient) {
                let expected = f.shaped(&gradient, &spec.shape)?;
                let bound = s.bound(Quantity::Gradient, &f.name, &gradient, spec.numel());
                let bound = bound + renormalization(init, spec)?;
                open.note(&spec.name, &expected, bound);
                s.compare(format!("{}/{gradient}", f.stem), bound, &param(&mut b, Slot::Grad, id)?, &expected);
            }
            let weight = format!("weight.{}", spec.name);
            if f.has(&weight) {
                open.check(s, f, &weight, spec, param(&mut b, Slot::Weight, id)?)?;
            }
        }
        Ok(())
    })?;
    s.skip_rest(f, "not computed");
    Ok(())
}
