//! Single operations and whole blocks, each computed by the fused operations of which the network is made.
//!
//! A backend knows effective weights only, normalize(w) / sqrt(fan_in), so:
//! * an operation without weights goes through a 1x1 convolution whose effective weight is the identity;
//! * a convolution "as is" is the normalised one with each output channel multiplied by
//!   sqrt(fan_in) (eps + rms(w)), and its weight gradient is projected as the optimizer does;
//! * resampling is fused with pixel norm, which is linear, x / eps, for inputs far below eps;
//! * the weights of attention are seen by giving it unit vectors for v.

use serde::Deserialize;

use super::{Array, Golden, Quantity, Result, Session, download, normalization, param, still_step};
use crate::backend::{Backend, EmbLayer, Logvar, LossInput, NetworkBackend, Operand, Scale, Slot, TrainingBackend};
use crate::device::Backends;
use crate::model::config;
use crate::model::unet::{Block, BlockConfig, Flavor, Resample, Tape};
use crate::params::{ParamId, ParamTable, mp_cat_scales, mp_sum_weights};

/// eps of every normalisation, added to the root mean square (EDM2, eq. 30 and 66).
pub(super) const EPS: f64 = 1e-4;

/// In rows this large, eps vanishes in f32. f16 can still hold the number.
const LARGE: f64 = 32768.0;

pub(super) fn operations<M: Backends>(s: &mut Session<M>) -> Result<()> {
    let f = &s.open(super::OPERATIONS)?;
    let cases = f.cases();
    type Operation<'a, M> = fn(&mut Session<'a, M>, &Golden, &str) -> Result<()>;
    // By what the names of its cases begin with; the longer of two beginnings comes first.
    let replays: [(&str, Operation<M>); 15] = [
        ("mp_silu", mp_silu),
        ("mp_sum_t", mp_sum),
        ("mp_cat_t", mp_cat),
        ("fourier", fourier),
        ("pixel_norm", pixel_norm),
        ("weight_norm_twice", weight_norm_twice),
        ("weight_norm", weight_norm),
        ("attn_norm", attn_norm),
        ("resample_down", resample_down),
        ("resample_up", resample_up),
        ("conv", conv),
        ("linear", linear),
        ("mpconv", mp_conv),
        ("mplinear", mp_linear),
        ("attn", attn),
    ];
    for (prefix, _) in replays {
        if !cases.iter().any(|case| case.starts_with(prefix)) {
            s.skip(format!("ops/{prefix}*"), "no such case");
        }
    }
    for case in &cases {
        match replays.iter().find(|(prefix, _)| case.starts_with(prefix)) {
            Some((_, replay)) => s.case(&format!("ops/{case}"), |s| replay(s, f, case))?,
            None => s.skip(format!("ops/{case}"), "an operation that is not known"),
        }
    }
    s.skip_rest(f, "inside a fused operation, or its case was skipped");
    Ok(())
}

/// The balance in a case's name: `0.3` for `..._t3`.
fn balance(case: &str) -> Option<f64> {
    let digits = case.rsplit_once("_t")?.1;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then(|| format!("0.{digits}").parse().ok())?
}

/// A backend that holds one weight, made effective as for a step of so many micro-batches (0 = evaluation).
fn with_weight<M: Backends>(s: &Session<M>, w: &Array, rounds: usize) -> Result<(M::Training, ParamId)> {
    let mut table = ParamTable::default();
    let id = push(&mut table, "layer", &w.shape);
    let mut b = s.backends.training(&table, 0)?;
    b.write_param(Slot::Weight, id, &w.f32())?;
    b.make_effective(Slot::Weight, normalization(rounds))?;
    Ok((b, id))
}

fn push(table: &mut ParamTable, name: &str, shape: &[usize]) -> ParamId {
    match *shape {
        [o, i, k, _] => table.conv(name.into(), i, o, k),
        [o, i] => table.linear(name.into(), i, o),
        _ => table.gain(name.into()),
    }
}

/// A backend with a 1x1 convolution that does nothing.
fn with_identity<M: Backends>(s: &Session<M>, channels: usize) -> Result<(M::Training, ParamId)> {
    let mut w = Array::new(&[channels, channels, 1, 1], vec![0.0; channels * channels]);
    w.values.iter_mut().step_by(channels + 1).for_each(|x| *x = LARGE);
    with_weight(s, &w, 0)
}

/// A weight whose shape a layer can have.
fn weight(f: &Golden, name: &str, conv: bool) -> Result<Array> {
    let w = f.array(name)?;
    let fits = match *w.shape {
        [_, _, a, b] => conv && a == b && (a == 1 || a == 3),
        [_, _] => !conv,
        _ => false,
    };
    match fits && !w.values.is_empty() {
        true => Ok(w),
        false => Err(f.misshapen(name, &w.shape, if conv { "[O, I, k, k] with k = 1 or 3" } else { "[O, I]" })),
    }
}

/// Input, weight and (if the file has it) upstream gradient of a layer. Their shapes are checked to fit each other.
fn layer(f: &Golden, c: &str, conv: bool) -> Result<(Array, Array, Option<Array>)> {
    let w = weight(f, &format!("{c}.w"), conv)?;
    let x = f.images(&format!("{c}.x"))?;
    let mut shape = x.shape.clone();
    shape[1] = w.shape[1];
    if x.shape != shape || (x.shape.len() == 4) != conv {
        return Err(f.misshapen(&format!("{c}.x"), &x.shape, format!("{} channels", w.shape[1])));
    }
    shape[1] = w.shape[0];
    let gy = format!("{c}.gy");
    let gy = if f.has(&gy) { Some(f.shaped(&gy, &shape)?) } else { None };
    Ok((w, x, gy))
}

/// sqrt(fan_in) (eps + rms) of each row: what turns effective weights back into stored ones.
fn row_scales(w: &Array) -> Vec<f64> {
    let fan_in = w.values.len() / w.shape[0];
    let rms = |row: &[f64]| (row.iter().map(|x| x * x).sum::<f64>() / fan_in as f64).sqrt();
    w.values.chunks(fan_in).map(|row| (fan_in as f64).sqrt() * (EPS + rms(row))).collect()
}

/// Takes the gradient `g` with respect to effective weights through their normalisation, to that of the stored ones.
fn project(w: &Array, g: &Array) -> Array {
    let fan_in = w.values.len() / w.shape[0];
    let mut out = Vec::with_capacity(g.values.len());
    for ((w, g), scale) in w.values.chunks(fan_in).zip(g.values.chunks(fan_in)).zip(row_scales(w)) {
        let rms = (w.iter().map(|x| x * x).sum::<f64>() / fan_in as f64).sqrt();
        let dot: f64 = w.iter().zip(g).map(|(w, g)| w * g).sum();
        let along = dot / ((EPS + rms) * rms * fan_in as f64);
        out.extend(w.iter().zip(g).map(|(w, g)| (g - w * along) / scale));
    }
    Array::new(&g.shape, out)
}

fn mp_silu(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let x = f.images(&format!("{c}.x"))?;
    let (mut b, id) = with_identity(s, x.nhwc()[3])?;
    let tx = x.upload(&mut b);
    let y = b.conv(id, Operand::silu(&tx));
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;
    // Also as the epilogue of a convolution, with all scales 1.
    let [n, .., channels] = x.nhwc();
    let ones = b.upload([n, 1, 1, channels], &vec![1.0; n * channels]);
    let scale = Scale { all: &ones, offset: 0 };
    let (y, pre) = b.conv_scale_silu(id, Operand::of(&tx), scale, true);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;

    let gy = f.shaped(&format!("{c}.gy"), &x.shape)?.upload(&mut b);
    let gx = b.conv_dgrad(id, &gy, 1.0, Operand::silu(&tx), None).x;
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    let mut gscales = b.zero_scales_grad(&ones);
    if let Some(pre) = pre {
        let gx = b.conv_dgrad_scale_silu(id, &gy, 1.0, &pre, scale, &mut gscales);
        s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    }
    Ok(())
}

fn mp_sum(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let Some(t) = balance(c) else {
        s.skip(format!("ops/{c}"), "no balance in its name");
        return Ok(());
    };
    let a = f.images(&format!("{c}.a"))?;
    let other = f.shaped(&format!("{c}.b"), &a.shape)?;
    let (mut b, id) = with_identity(s, a.nhwc()[3])?;
    let (ta, tb) = (a.upload(&mut b), other.upload(&mut b));
    let y = b.conv_mp_sum(id, Operand::of(&tb), &ta, t, None);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;

    let gy = f.shaped(&format!("{c}.gy"), &a.shape)?.upload(&mut b);
    let (wa, wb) = mp_sum_weights(t);
    let ga = b.linear_combination(&[(&gy, wa)]);
    s.check(f, &format!("{c}.g_a"), Quantity::Gradient, &download(&mut b, &ga)?)?;
    let gb = b.conv_dgrad(id, &gy, wb, Operand::of(&tb), None).x;
    s.check(f, &format!("{c}.g_b"), Quantity::Gradient, &download(&mut b, &gb)?)
}

fn mp_cat(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let Some(t) = balance(c) else {
        s.skip(format!("ops/{c}"), "no balance in its name");
        return Ok(());
    };
    let (a, other) = (f.images(&format!("{c}.a"))?, f.images(&format!("{c}.b"))?);
    let (na, nb) = (a.nhwc()[3], other.nhwc()[3]);
    let mut shape = a.shape.clone();
    shape[1] = nb;
    let other = f.shaped(&format!("{c}.b"), &shape)?;
    let (mut b, id) = with_identity(s, na + nb)?;
    let (ta, tb) = (a.upload(&mut b), other.upload(&mut b));
    let (sa, sb) = mp_cat_scales(na, nb, t);
    let both = Operand { x: &ta, x_scale: sa, skip: Some((&tb, sb)), silu: false };
    let y = b.conv(id, both);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;

    shape[1] = na + nb;
    let gy = f.shaped(&format!("{c}.gy"), &shape)?.upload(&mut b);
    let g = b.conv_dgrad(id, &gy, 1.0, both, None);
    s.check(f, &format!("{c}.g_a"), Quantity::Gradient, &download(&mut b, &g.x)?)?;
    if let Some(skip) = g.skip {
        s.check(f, &format!("{c}.g_b"), Quantity::Gradient, &download(&mut b, &skip)?)?;
    }
    Ok(())
}

/// Fourier features of any c_noise: the noise level is exp(4 c_noise).
fn fourier(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let (x, freqs) = (f.array(&format!("{c}.x"))?, f.array(&format!("{c}.freqs"))?);
    let phases = f.shaped(&format!("{c}.phases"), &freqs.shape)?;
    let mut table = ParamTable::default();
    let (tf, tp) = table.fourier("fourier".into(), freqs.values.len());
    let weight = table.linear("linear".into(), freqs.values.len(), 1);
    let mut b = s.backends.sampling(&table)?;
    b.load_param(tf, &freqs.f32())?;
    b.load_param(tp, &phases.f32())?;
    b.load_param(weight, &vec![1.0; freqs.values.len()])?;
    b.normalize()?;
    let sigma: Vec<f32> = x.values.iter().map(|x| (4.0 * x).exp() as f32).collect();
    let sigma = b.upload([sigma.len(), 1, 1, 1], &sigma);
    let (features, _) = b.logvar(&Logvar { freqs: tf, phases: tp, weight }, &sigma);
    let got = download(&mut b, &features)?;
    let y = format!("{c}.y");
    let argument = fourier_argument(&x.values, &freqs.values, &phases.values);
    let bound = s.fourier_bound(argument);
    s.compare(format!("{}/{y}", f.stem), bound, &got, &f.array(&y)?);
    Ok(())
}

/// Largest argument of the cosine.
pub(super) fn fourier_argument(c_noise: &[f64], freqs: &[f64], phases: &[f64]) -> f64 {
    let x = c_noise.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    freqs.iter().zip(phases).fold(0.0, |a: f64, (f, p)| a.max(f.abs() * x + p.abs()))
}

fn pixel_norm(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let x = f.images(&format!("{c}.x"))?;
    let mut b = s.backends.training(&ParamTable::default(), 0)?;
    let tx = x.upload(&mut b);
    let y = b.pixel_norm(&tx, false);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;
    let gy = f.shaped(&format!("{c}.gy"), &x.shape)?.upload(&mut b);
    let gx = b.pixel_norm_backward(&tx, &gy, false, None);
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)
}

/// Large values in further channels make the norm of every pixel the same, so that pixel norm divides by a known
/// number and its gradient does too.
fn resample_down(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    const FURTHER: usize = 8;
    let x = f.images(&format!("{c}.x"))?;
    let [n, h, w, channels] = x.nhwc();
    if x.shape.len() != 4 || h % 2 + w % 2 != 0 {
        return Err(f.misshapen(&format!("{c}.x"), &x.shape, "[N, C, H, W] with even H and W"));
    }
    // Each image has its channels [0, channels), then the further ones.
    let widened = |x: &Array, fill: f64| {
        let [n, channels, h, w] = [x.shape[0], x.shape[1], x.shape[2], x.shape[3]];
        let image = channels * h * w;
        let further = vec![fill; FURTHER * h * w];
        let values = x.values.chunks(image).flat_map(|image| image.iter().chain(&further).copied()).collect();
        Array::new(&[n, channels + FURTHER, h, w], values)
    };
    let narrowed = |values: Vec<f64>, pixels: usize, scale: f64| -> Vec<f64> {
        let images = values.chunks((channels + FURTHER) * pixels);
        images.flat_map(|image| image[..channels * pixels].iter().map(|v| v * scale)).collect()
    };
    let norm = EPS + LARGE * (FURTHER as f64 / (channels + FURTHER) as f64).sqrt();
    let mut b = s.backends.training(&ParamTable::default(), 0)?;
    // The results are as small as 1 / norm; f16 is precise down to 2^-14.
    let tx = widened(&x.scaled(16.0), LARGE).upload(&mut b);
    let y = b.pixel_norm(&tx, true);
    let y = narrowed(download(&mut b, &y)?, h * w / 4, norm / 16.0);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &y)?;
    let gy = f.shaped(&format!("{c}.gy"), &[n, channels, h / 2, w / 2])?;
    let gy = widened(&gy.scaled(4096.0), 0.0).upload(&mut b);
    let gx = b.pixel_norm_backward(&tx, &gy, true, None);
    let gx = narrowed(download(&mut b, &gx)?, h * w, norm / 4096.0);
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &gx)
}

fn resample_up(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let x = f.images(&format!("{c}.x"))?;
    let [n, h, w, channels] = x.nhwc();
    let mut b = s.backends.training(&ParamTable::default(), 0)?;
    let tx = x.upload(&mut b);
    let y = b.upsample(&tx);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;
    let gy = f.shaped(&format!("{c}.gy"), &[n, channels, h * 2, w * 2])?.upload(&mut b);
    let gx = b.upsample_backward(&gy);
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)
}

/// The stored weight after a step that moves nothing, of one and of two micro-batches.
fn weight_norm_twice(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let w = weight(f, &format!("{c}.w"), true)?;
    for (rounds, name) in [(1, "once"), (2, "twice")] {
        let (mut b, id) = with_weight(s, &w, rounds)?;
        still_step(&mut b, rounds, 1.0)?;
        s.check(f, &format!("{c}.{name}"), Quantity::Forward, &param(&mut b, Slot::Weight, id)?)?;
    }
    Ok(())
}

fn weight_norm(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let name = format!("{c}.w");
    let conv = f.file.shape(&name)?.len() == 4;
    let w = weight(f, &name, conv)?;
    let (mut b, id) = with_weight(s, &w, 1)?;
    still_step(&mut b, 1, 1.0)?;
    s.check(f, &format!("{c}.y"), Quantity::Forward, &param(&mut b, Slot::Weight, id)?)?;

    // dL/d(effective weight) = sqrt(fan_in) gy: image i has a single one, in the middle of channel i.
    let gy = f.shaped(&format!("{c}.gy"), &w.shape)?;
    let (cout, cin) = (w.shape[0], w.shape[1]);
    let k = if conv { w.shape[2] } else { 1 };
    let (mut b, id) = with_weight(s, &w, 0)?;
    let mut x = Array::new(&[cin, cin, k, k], vec![0.0; cin * cin * k * k]);
    let mut g = Array::new(&[cin, cout, k, k], vec![0.0; cin * cout * k * k]);
    for i in 0..cin {
        x.values[(i * cin + i) * k * k + k * k / 2] = 1.0;
        for o in 0..cout {
            for tap in 0..k * k {
                // Output pixel p reads the middle through the tap that mirrors it.
                g.values[(i * cout + o) * k * k + tap] = gy.values[(o * cin + i) * k * k + k * k - 1 - tap];
            }
        }
    }
    let (tx, tg) = (x.upload(&mut b), g.upload(&mut b));
    b.conv_wgrad(id, Operand::of(&tx), &tg, ((cin * k * k) as f64).sqrt());
    still_step(&mut b, 0, 1.0)?;
    s.check(f, &format!("{c}.g_w"), Quantity::Gradient, &param(&mut b, Slot::Grad, id)?)
}

fn conv(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let (w, x, gy) = layer(f, c, true)?;
    let scales = row_scales(&w);
    let (mut b, id) = with_weight(s, &w, 0)?;
    let tx = x.upload(&mut b);
    let y = b.conv(id, Operand::of(&tx));
    let got = Array::new(&[x.shape[0], w.shape[0], x.shape[2], x.shape[3]], download(&mut b, &y)?);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &got.scale_channels(|o| scales[o]).values)?;
    let Some(gy) = gy else { return Ok(()) };
    let scaled = gy.scale_channels(|o| scales[o]).upload(&mut b);
    let gx = b.conv_dgrad(id, &scaled, 1.0, Operand::of(&tx), None).x;
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    let tg = gy.upload(&mut b);
    b.conv_wgrad(id, Operand::of(&tx), &tg, 1.0);
    projected_gradient(s, f, c, b, id, &w)
}

/// Compares the weight gradient, as the optimizer sees it, with the projected one of the file.
fn projected_gradient<B: TrainingBackend>(
    s: &mut Session<impl Backends>,
    f: &Golden,
    c: &str,
    mut b: B,
    id: ParamId,
    w: &Array,
) -> Result<()> {
    still_step(&mut b, 0, 1.0)?;
    let name = format!("{c}.g_w");
    let expected = project(w, &f.shaped(&name, &w.shape)?);
    let bound = s.bound(Quantity::Gradient, &f.name, &name, w.values.len());
    s.compare(format!("{}/{name} (projected)", f.stem), bound, &param(&mut b, Slot::Grad, id)?, &expected);
    Ok(())
}

/// A backend with one `emb_linear` layer.
fn with_emb_layer<M: Backends>(s: &Session<M>, w: &Array, gain: f64, rounds: usize) -> Result<(M::Training, EmbLayer)> {
    let mut table = ParamTable::default();
    let gain_id = table.gain("emb_gain".into());
    let weight = table.linear("emb_linear".into(), w.shape[1], w.shape[0]);
    let mut b = s.backends.training(&table, 0)?;
    b.write_param(Slot::Weight, gain_id, &[gain as f32])?;
    b.write_param(Slot::Weight, weight, &w.f32())?;
    b.make_effective(Slot::Weight, normalization(rounds))?;
    Ok((b, EmbLayer { weight, gain: gain_id, offset: 0, channels: w.shape[0] }))
}

/// Linear layers are those of the embedding: emb_gain (W emb) + 1.
fn linear(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let (w, x, gy) = layer(f, c, false)?;
    let scales = row_scales(&w);
    let (mut b, l) = with_emb_layer(s, &w, 1.0, 0)?;
    let tx = x.upload(&mut b);
    let y = b.emb_scales(&[l], &tx);
    let got = download(&mut b, &y)?.iter().map(|y| y - 1.0).collect();
    let got = Array::new(&[x.shape[0], w.shape[0]], got).scale_channels(|o| scales[o]);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &got.values)?;
    let Some(gy) = gy else { return Ok(()) };
    let scaled = gy.scale_channels(|o| scales[o]).upload(&mut b);
    let gx = b.emb_scales_backward(&[l], &tx, &scaled);
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    let (mut b, l) = with_emb_layer(s, &w, 1.0, 0)?;
    let (tx, tg) = (x.upload(&mut b), gy.upload(&mut b));
    b.emb_scales_backward(&[l], &tx, &tg);
    projected_gradient(s, f, c, b, l.weight, &w)
}

/// How many micro-batches' forced normalisations a case has seen: 1 if it is in training mode.
fn rounds(case: &str) -> usize {
    usize::from(case.contains("_train"))
}

fn mp_linear(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let (w, x, gy) = layer(f, c, false)?;
    let gain = f.shaped(&format!("{c}.gain"), &[])?.values[0];
    let (mut b, l) = with_emb_layer(s, &w, gain, rounds(c))?;
    let tx = x.upload(&mut b);
    let y = b.emb_scales(&[l], &tx);
    let y: Vec<f64> = download(&mut b, &y)?.iter().map(|y| y - 1.0).collect();
    s.check(f, &format!("{c}.y"), Quantity::Forward, &y)?;
    if let Some(gy) = gy {
        let gy = gy.upload(&mut b);
        let gx = b.emb_scales_backward(&[l], &tx, &gy);
        s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    }
    after_step(s, f, c, b, l.weight, l.gain)
}

/// Gradients of weight and gain, and the stored weight of a case in training mode.
fn after_step<B: TrainingBackend>(
    s: &mut Session<impl Backends>,
    f: &Golden,
    c: &str,
    mut b: B,
    weight: ParamId,
    gain: ParamId,
) -> Result<()> {
    still_step(&mut b, rounds(c), 1.0)?;
    s.check(f, &format!("{c}.g_w"), Quantity::Gradient, &param(&mut b, Slot::Grad, weight)?)?;
    s.check(f, &format!("{c}.g_gain"), Quantity::Gradient, &param(&mut b, Slot::Grad, gain)?)?;
    if rounds(c) > 0 {
        s.check(f, &format!("{c}.w_after"), Quantity::Forward, &param(&mut b, Slot::Weight, weight)?)?;
    }
    Ok(())
}

/// The one convolution with a gain is the network's last: gain and its gradient belong to the
/// preconditioning and the loss. With noisy image 0, logvar 0 and sigma = sigma_data = 1/2, D = c_out gain
/// conv(x), and the clean image is chosen so that dL/dD = gy / c_out.
fn mp_conv(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    const SIGMA: f64 = 0.5;
    let (w, x, gy) = layer(f, c, true)?;
    let gain = f.shaped(&format!("{c}.gain"), &[])?.values[0];
    let mut table = ParamTable::default();
    let gain_id = table.gain("gain".into());
    let id = push(&mut table, "layer", &w.shape);
    let mut b = s.backends.training(&table, 0)?;
    b.write_param(Slot::Weight, gain_id, &[gain as f32])?;
    b.write_param(Slot::Weight, id, &w.f32())?;
    b.make_effective(Slot::Weight, normalization(rounds(c)))?;

    let tx = x.upload(&mut b);
    let raw = b.conv(id, Operand::of(&tx));
    let shape = b.shape(&raw);
    let noisy = b.upload(shape, &vec![0.0; shape.iter().product()]);
    let sigma = b.upload([shape[0], 1, 1, 1], &vec![SIGMA as f32; shape[0]]);
    let d = b.precond_output(&noisy, &raw, &sigma, gain_id, SIGMA);
    let c_out = SIGMA / 2f64.sqrt();
    let d = download(&mut b, &d)?;
    let y: Vec<f64> = d.iter().map(|d| d / c_out).collect();
    s.check(f, &format!("{c}.y"), Quantity::Forward, &y)?;
    let Some(gy) = gy else { return Ok(()) };

    let weight = 1.0 / (c_out * c_out);
    let clean = d.iter().zip(&gy.values).map(|(d, g)| d - g / c_out / (2.0 * weight)).collect();
    let clean = Array::new(&gy.shape, clean).upload(&mut b);
    let logvar = b.upload([shape[0], 1, 1, 1], &vec![0.0; shape[0]]);
    let loss = b.loss(LossInput {
        clean: &clean,
        noisy: &noisy,
        raw: &raw,
        sigma: &sigma,
        logvar: &logvar,
        out_gain: gain_id,
        sigma_data: SIGMA,
    });
    let gx = b.conv_dgrad(id, &loss.grad_raw, 1.0, Operand::of(&tx), None).x;
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    b.conv_wgrad(id, Operand::of(&tx), &loss.grad_raw, 1.0);
    after_step(s, f, c, b, id, gain_id)
}

/// [N, heads, c, 3, tokens] or three of [N, heads, c, tokens], as the qkv tensor of the network.
fn pack_qkv([n, heads, c, tokens]: [usize; 4], at: impl Fn([usize; 5]) -> f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(n * heads * c * 3 * tokens);
    for image in 0..n {
        for token in 0..tokens {
            for head in 0..heads {
                for i in 0..c {
                    out.extend((0..3).map(|which| at([image, head, i, which, token]) as f32));
                }
            }
        }
    }
    out
}

/// The normalised q, k, v exist inside attention only; so attention of the raw ones is compared with softmax
/// (in f64) of the file's normalised ones.
fn attn_norm(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    let x = f.array(&format!("{c}.x"))?;
    let [n, heads, ch, 3, tokens] = *x.shape else {
        return Err(f.misshapen(&format!("{c}.x"), &x.shape, "[N, heads, c, 3, tokens]"));
    };
    let y = f.shaped(&format!("{c}.y"), &x.shape)?;
    let at =
        |array: &Array, [a, b, c, d, e]: [usize; 5]| array.values[(((a * heads + b) * ch + c) * 3 + d) * tokens + e];
    let mut b = s.backends.sampling(&ParamTable::default())?;
    let qkv = pack_qkv([n, heads, ch, tokens], |index| at(&x, index));
    let qkv = b.upload([n, 1, tokens, heads * ch * 3], &qkv);
    let out = b.attention(&qkv, heads);
    let got = download(&mut b, &out)?;

    let mut expected = Array::new(&[n, heads * ch, 1, tokens], vec![0.0; n * heads * ch * tokens]);
    for image in 0..n {
        for head in 0..heads {
            for query in 0..tokens {
                let logits: Vec<f64> = (0..tokens)
                    .map(|key| {
                        let qk = (0..ch).map(|i| at(&y, [image, head, i, 0, query]) * at(&y, [image, head, i, 1, key]));
                        qk.sum::<f64>() / (ch as f64).sqrt()
                    })
                    .collect();
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                for i in 0..ch {
                    let weighted = |key: usize| (logits[key] - max).exp() * at(&y, [image, head, i, 2, key]);
                    let sum: f64 = (0..tokens).map(weighted).sum();
                    expected.values[((image * heads + head) * ch + i) * tokens + query] = sum / total;
                }
            }
        }
    }
    let name = format!("{c}.y");
    let bound = s.bound(Quantity::Forward, &f.name, &name, expected.values.len());
    s.compare(format!("{}/{name} (through attention)", f.stem), bound, &got, &expected);
    Ok(())
}

fn attn(s: &mut Session<impl Backends>, f: &Golden, c: &str) -> Result<()> {
    const BALANCE: f64 = 0.3;
    let x = f.images(&format!("{c}.x"))?;
    let [n, h, w, channels] = x.nhwc();
    let w_qkv = f.shaped(&format!("{c}.w_qkv"), &[3 * channels, channels, 1, 1])?;
    let w_proj = f.shaped(&format!("{c}.w_proj"), &[channels, channels, 1, 1])?;
    // The number of heads follows from the shapes of the tensors inside.
    let inside = ["q", "k", "v", "probs"].map(|name| format!("{c}.{name}"));
    let Some(inside) = inside.iter().find(|name| f.has(name)) else {
        s.skip(format!("ops/{c}"), "the number of heads is unknown: q, k, v and probs are absent");
        return Ok(());
    };
    let shape = f.file.shape(inside)?;
    let heads = shape.get(1).copied().unwrap_or(0);
    if heads == 0 || channels % heads != 0 {
        return Err(f.misshapen(inside, shape, format!("[N, heads, ...] for {channels} channels")));
    }

    let mut table = ParamTable::default();
    let qkv_id = push(&mut table, "attn_qkv", &w_qkv.shape);
    let proj_id = push(&mut table, "attn_proj", &w_proj.shape);
    let mut b = s.backends.training(&table, 0)?;
    b.write_param(Slot::Weight, qkv_id, &w_qkv.f32())?;
    b.write_param(Slot::Weight, proj_id, &w_proj.f32())?;
    b.make_effective(Slot::Weight, normalization(0))?;
    let tx = x.upload(&mut b);
    let qkv = b.conv(qkv_id, Operand::of(&tx));
    let o = b.attention(&qkv, heads);
    s.check(f, &format!("{c}.o"), Quantity::Forward, &download(&mut b, &o)?)?;
    let z = b.conv(proj_id, Operand::of(&o));
    s.check(f, &format!("{c}.z"), Quantity::Forward, &download(&mut b, &z)?)?;
    let y = b.conv_mp_sum(proj_id, Operand::of(&o), &tx, BALANCE, None);
    s.check(f, &format!("{c}.y"), Quantity::Forward, &download(&mut b, &y)?)?;

    // Token j's v becomes sqrt(c) times unit vector j: the output's channel j is the weight of token j.
    let (ch, tokens) = (channels / heads, h * w);
    if tokens <= ch {
        let mut values = b.download(&qkv)?;
        for (pixel, row) in values.chunks_mut(channels * 3).enumerate() {
            for (i, qkv) in row.chunks_mut(3).enumerate() {
                qkv[2] = if i % ch == pixel % tokens { LARGE as f32 } else { 0.0 };
            }
        }
        let marked = b.upload([n, h, w, channels * 3], &values);
        let out = b.attention(&marked, heads);
        let out = b.download(&out)?;
        let mut probs = Vec::with_capacity(n * heads * tokens * tokens);
        for image in 0..n {
            for head in 0..heads {
                for query in 0..tokens {
                    let row = &out[(image * tokens + query) * channels + head * ch..];
                    probs.extend(row[..tokens].iter().map(|&p| f64::from(p) / (ch as f64).sqrt()));
                }
            }
        }
        s.check(f, &format!("{c}.probs"), Quantity::Forward, &probs)?;
    }

    let gy = f.shaped(&format!("{c}.gy"), &x.shape)?.upload(&mut b);
    let (wa, wb) = mp_sum_weights(BALANCE);
    b.conv_wgrad(proj_id, Operand::of(&o), &gy, wb);
    let go = b.conv_dgrad(proj_id, &gy, wb, Operand::of(&o), None).x;
    let gqkv = b.attention_backward(&qkv, heads, &go);
    b.conv_wgrad(qkv_id, Operand::of(&tx), &gqkv, 1.0);
    let residual = crate::backend::OperandGrad { x: gy, skip: None };
    let gx = b.conv_dgrad(qkv_id, &gqkv, 1.0, Operand::of(&tx), Some((residual, wa))).x;
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &gx)?)?;
    still_step(&mut b, 0, 1.0)?;
    s.check(f, &format!("{c}.g_w_qkv"), Quantity::Gradient, &param(&mut b, Slot::Grad, qkv_id)?)?;
    s.check(f, &format!("{c}.g_w_proj"), Quantity::Gradient, &param(&mut b, Slot::Grad, proj_id)?)
}

/// Settings of a block, with the official names and defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockSettings {
    in_channels: usize,
    out_channels: usize,
    emb_channels: usize,
    train: bool,
    flavor: Flavor,
    #[serde(default)]
    resample_mode: Resample,
    #[serde(default)]
    attention: bool,
    #[serde(default = "config::default_channels_per_head")]
    channels_per_head: usize,
    #[serde(default = "config::default_balance")]
    res_balance: f64,
    #[serde(default = "config::default_balance")]
    attn_balance: f64,
    #[serde(default = "config::default_clip_act")]
    clip_act: f64,
}

impl BlockSettings {
    fn block(&self) -> Result<BlockConfig, String> {
        let (flavor, resample) = (self.flavor, self.resample_mode);
        let built = match (flavor, resample) {
            (Flavor::Encoder, Resample::Down) => self.in_channels == self.out_channels,
            (Flavor::Encoder, Resample::Up) | (Flavor::Decoder, Resample::Down) => false,
            (_, Resample::Keep) | (Flavor::Decoder, Resample::Up) => true,
        };
        if !built {
            return Err(format!("no network has such a block: {flavor:?} {resample:?}"));
        }
        let heads = match self.attention {
            false => 0,
            true if self.channels_per_head > 0 && self.out_channels.is_multiple_of(self.channels_per_head) => {
                self.out_channels / self.channels_per_head
            }
            true => return Err(format!("{} channels in heads of {}", self.out_channels, self.channels_per_head)),
        };
        Ok(BlockConfig {
            flavor,
            resample,
            cin: self.in_channels,
            cout: self.out_channels,
            cemb: self.emb_channels,
            heads,
            cskip: 0,
            concat_balance: 0.5,
            res_balance: self.res_balance,
            attn_balance: self.attn_balance,
            clip_act: self.clip_act,
        })
    }
}

pub(super) fn blocks(s: &mut Session<impl Backends>) -> Result<()> {
    let f = &s.open("ops_blocks.safetensors")?;
    let settings: serde_json::Map<String, serde_json::Value> =
        f.metadata("config")?.ok_or_else(|| f.wrong("config", "it is missing".into()))?;
    for (c, settings) in settings {
        let parsed = serde_json::from_value::<BlockSettings>(settings).map_err(|e| e.to_string());
        match parsed.and_then(|settings| Ok((settings.train, settings.block()?))) {
            Ok((train, cfg)) => s.case(&format!("ops_blocks/{c}"), |s| block(s, f, &c, cfg, usize::from(train)))?,
            Err(why) => s.skip(format!("ops_blocks/{c}"), why),
        }
    }
    s.skip_rest(f, "not computed, or its case was skipped");
    Ok(())
}

fn block(s: &mut Session<impl Backends>, f: &Golden, c: &str, cfg: BlockConfig, rounds: usize) -> Result<()> {
    let x = f.images(&format!("{c}.x"))?;
    let [n, h, w, _] = x.nhwc();
    let x = match (cfg.resample, h % 2 + w % 2) {
        (Resample::Down, 1..) => {
            return Err(f.misshapen(&format!("{c}.x"), &x.shape, "even height and width"));
        }
        _ => f.shaped(&format!("{c}.x"), &[n, cfg.cin, h, w])?,
    };
    let emb = f.shaped(&format!("{c}.emb"), &[n, cfg.cemb])?;
    let mut table = ParamTable::default();
    let block = Block::new(&mut table, "", c, cfg, &mut 0);
    let mut b = s.load(f, &format!("{c}.param."), &table, s.backends.training(&table, 0)?)?;
    b.make_effective(Slot::Weight, normalization(rounds))?;

    let (tx, temb) = (x.upload(&mut b), emb.upload(&mut b));
    let layers = [block.emb_layer()];
    let scales = b.emb_scales(&layers, &temb);
    let mut tape = Tape::new(None);
    let y = block.forward(&mut b, &tx, None, &scales, Some(&mut tape));
    let got = download(&mut b, &y)?;
    s.check(f, &format!("{c}.y"), Quantity::Forward, &got)?;
    let clipped = |y: &f64| y.abs() >= cfg.clip_act;
    let expected = f.array(&format!("{c}.y"))?;
    let flipped = got.iter().zip(&expected.values).filter(|(g, e)| clipped(g) != clipped(e)).count();
    if flipped > 0 {
        let why = format!("{flipped} values are so near the clip that rounding decides whether they have a gradient");
        s.skip(format!("ops_blocks/{c} (gradients)"), why);
        return Ok(());
    }

    let [_, h, w, cout] = b.shape(&y);
    let gy = f.shaped(&format!("{c}.gy"), &[n, cout, h, w])?.upload(&mut b);
    let Some(tape) = tape.blocks.pop() else { return Ok(()) };
    let mut grad_scales = b.zero_scales_grad(&scales);
    let g = block.backward(&mut b, tape, &scales, gy, &mut grad_scales, None);
    s.check(f, &format!("{c}.g_x"), Quantity::Gradient, &download(&mut b, &g.x)?)?;
    let gemb = b.emb_scales_backward(&layers, &temb, &grad_scales);
    s.check(f, &format!("{c}.g_emb"), Quantity::Gradient, &download(&mut b, &gemb)?)?;
    still_step(&mut b, rounds, 1.0)?;
    for (id, spec) in table.iter() {
        s.check(f, &format!("{c}.grad.{}", spec.name), Quantity::Gradient, &param(&mut b, Slot::Grad, id)?)?;
        s.check_if(f, &format!("{c}.after.{}", spec.name), Quantity::Forward, &param(&mut b, Slot::Weight, id)?)?;
    }
    Ok(())
}
