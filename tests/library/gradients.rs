//! Every gradient of the CPU backend is the derivative of its operation: central differences in f64.
//!
//! For an operation y(x) and a random projection p, L = sum p y has the gradient g that the backend computes from
//! the upstream gradient p. Along a random direction d, D(h) = (L(x + h d) - L(x - h d)) / 2h must be sum g d.
//! (4 D(h) - D(2h)) / 3 is off by about h^4 times a fifth derivative and by 1e-16 |L| / h (rounding): with
//! h = 1e-4, 1e-16 and 1e-12 times values that reach some thousands in a whole network; 1e-7 of the typical size
//! |g| |d| / sqrt(n) leaves room for both.

use crate::common::normals::normals;
use edm2k::backend::cpu::{Cpu, Tensor};
use edm2k::backend::*;
use edm2k::model::{Config, Precond};
use edm2k::params::{ParamId, ParamKind, ParamTable, mp_sum_weights};
use edm2k::rng::mask_key;

type B = Cpu<f64>;
type T = Tensor<f64>;

const H: f64 = 1e-4;
const BOUND: f64 = 1e-7;

/// Random numbers, different for each seed.
fn random(len: usize, seed: u64) -> Vec<f64> {
    normals(len, seed, 1.0).into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Compares `grad` with differences of `loss` around `x`, along three random directions.
fn check(name: &str, x: &[f64], grad: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    assert_eq!(x.len(), grad.len(), "{name}: gradient of another size");
    for direction in 0..3 {
        let d = random(x.len(), 1000 + direction);
        let mut at = |h: f64| loss(&x.iter().zip(&d).map(|(x, d)| x + h * d).collect::<Vec<_>>());
        let mut slope = |h: f64| (at(h) - at(-h)) / (2.0 * h);
        let numeric = (4.0 * slope(H) - slope(2.0 * H)) / 3.0;
        let typical = (dot(grad, grad) * dot(&d, &d) / x.len() as f64).sqrt();
        let got = dot(grad, &d);
        assert!(typical > 0.0, "{name}: the gradient is zero");
        let error = (got - numeric).abs() / typical;
        assert!(error < BOUND, "{name}, direction {direction}: {got}, differences give {numeric} ({error:e})");
    }
}

/// A backend that holds weights of these shapes, with random values.
struct Net {
    b: B,
    ids: Vec<ParamId>,
    values: Vec<Vec<f64>>,
}

impl Net {
    fn new(table: &ParamTable) -> Self {
        let ids: Vec<_> = table.iter().map(|(id, _)| id).collect();
        let values: Vec<_> = table.iter().map(|(id, spec)| random(spec.numel(), 100 + id.0 as u64)).collect();
        let mut net = Self { b: Cpu::for_training(table, 0), ids, values };
        for i in 0..net.ids.len() {
            let values = net.values[i].clone();
            net.set(i, &values);
        }
        net
    }

    fn convs(shapes: &[(usize, usize, usize)]) -> Self {
        let mut table = ParamTable::default();
        for (i, &(cin, cout, kernel)) in shapes.iter().enumerate() {
            table.conv(format!("w{i}"), cin, cout, kernel);
        }
        Self::new(&table)
    }

    fn set(&mut self, i: usize, values: &[f64]) {
        self.b.set_param(Slot::Weight, self.ids[i], values).unwrap();
        self.b.make_effective(Slot::Weight, Normalization::Eval).unwrap();
    }

    fn tensor(&self, seed: u64, shape: Shape) -> T {
        self.b.tensor(shape, &random(shape.iter().product(), seed))
    }

    /// Gradients with respect to the stored weights, by an optimizer step that moves nothing.
    fn grads(&mut self, rounds: usize) -> Vec<Vec<f64>> {
        step(&mut self.b, rounds);
        self.ids.iter().map(|&id| self.b.param(Slot::Grad, id).unwrap()).collect()
    }

    /// Checks the gradient of each parameter; `loss` is evaluated with the parameter changed.
    fn check_params(&mut self, name: &str, grads: &[Vec<f64>], loss: impl Fn(&mut B) -> f64) {
        for (i, grad) in grads.iter().enumerate() {
            let spec = self.b.table()[self.ids[i]].clone();
            if !spec.trained() {
                continue;
            }
            let x = self.values[i].clone();
            check(&format!("{name}: {}", spec.name), &x, grad, |x| {
                self.set(i, x);
                loss(&mut self.b)
            });
            self.set(i, &x);
        }
    }
}

fn step(b: &mut B, rounds: usize) {
    let betas = (0.9, 0.99);
    b.optimizer_step(&OptimizerStep { lr: 0.0, betas, eps: 1e-8, step: 1, grad_scale: 1.0, rounds, ema_betas: &[] })
        .unwrap();
}

fn reshaped(b: &B, like: &T, values: &[f64]) -> T {
    b.tensor(like.shape(), values)
}

#[test]
fn convolution_of_a_concatenation_through_mp_silu() {
    for (kernel, silu) in [(3, true), (3, false), (1, true), (1, false)] {
        let name = format!("conv{kernel} silu {silu}");
        let mut net = Net::convs(&[(8, 7, kernel)]);
        let w = net.ids[0];
        let (x, skip) = (net.tensor(1, [2, 5, 3, 3]), net.tensor(2, [2, 5, 3, 5]));
        let p = net.tensor(3, [2, 5, 3, 7]);
        fn op<'a>(x: &'a T, skip: &'a T, silu: bool) -> Operand<'a, T> {
            Operand { x, x_scale: 1.3, skip: Some((skip, 0.6)), silu }
        }
        let gain = 0.7;
        net.b.conv_wgrad(w, op(&x, &skip, silu), &p, gain);
        let acc = OperandGrad { x: net.tensor(4, x.shape()), skip: Some(net.tensor(5, skip.shape())) };
        let acc_x = acc.x.values().to_vec();
        let acc_skip = acc.skip.as_ref().unwrap().values().to_vec();
        let g = net.b.conv_dgrad(w, &p, gain, op(&x, &skip, silu), Some((acc, 0.9)));
        // The accumulated gradient is that of 0.9 acc . x.
        let loss = |b: &mut B, x: &T, skip: &T| {
            let y = b.conv(w, op(x, skip, silu));
            gain * dot(y.values(), p.values()) + 0.9 * (dot(&acc_x, x.values()) + dot(&acc_skip, skip.values()))
        };
        check(&format!("{name}: x"), x.values(), g.x.values(), |v| {
            let x = reshaped(&net.b, &x, v);
            loss(&mut net.b, &x, &skip)
        });
        check(&format!("{name}: skip"), skip.values(), g.skip.unwrap().values(), |v| {
            let skip = reshaped(&net.b, &skip, v);
            loss(&mut net.b, &x, &skip)
        });
        let grads = net.grads(0);
        net.check_params(&name, &grads, |b| loss(b, &x, &skip));
    }
}

#[test]
fn clipped_mp_sum_with_a_convolution() {
    let mut net = Net::convs(&[(3, 5, 3)]);
    let w = net.ids[0];
    let (x, residual, p) = (net.tensor(1, [1, 3, 5, 3]), net.tensor(2, [1, 3, 5, 5]), net.tensor(3, [1, 3, 5, 5]));
    let (t, clip) = (0.3, 0.8);
    let loss = |b: &mut B, x: &T, residual: &T| {
        let y = b.conv_mp_sum(w, Operand::of(x), residual, t, Some(clip));
        dot(y.values(), p.values())
    };
    let out = net.b.conv_mp_sum(w, Operand::of(&x), &residual, t, Some(clip));
    let clipped = out.values().iter().filter(|y| y.abs() >= clip).count();
    assert!((10..out.values().len() - 10).contains(&clipped), "{clipped} of {} clipped", out.values().len());
    let (wa, wb) = mp_sum_weights(t);
    let g = net.b.clip_backward(p.clone(), &out, clip);
    let gx = net.b.conv_dgrad(w, &g, wb, Operand::of(&x), None).x;
    net.b.conv_wgrad(w, Operand::of(&x), &g, wb);
    let gr = net.b.linear_combination(&[(&g, wa)]);
    check("mp_sum: x", x.values(), gx.values(), |v| {
        let x = reshaped(&net.b, &x, v);
        loss(&mut net.b, &x, &residual)
    });
    check("mp_sum: residual", residual.values(), gr.values(), |v| {
        let residual = reshaped(&net.b, &residual, v);
        loss(&mut net.b, &x, &residual)
    });
    let grads = net.grads(0);
    net.check_params("mp_sum", &grads, |b| loss(b, &x, &residual));
}

#[test]
fn convolution_of_scaled_mp_silu() {
    let (n, h, w, c, offset, all) = (2, 3, 5, 4, 2, 9);
    let mut net = Net::convs(&[(c, c, 1), (c, 7, 3)]);
    // The first convolution is made the identity, so that its output is its input.
    let mut identity = vec![0.0; c * c];
    identity.iter_mut().step_by(c + 1).for_each(|x| *x = 1e12);
    net.set(0, &identity);
    let (first, second) = (net.ids[0], net.ids[1]);
    let (pre, scales, p) = (net.tensor(1, [n, h, w, c]), net.tensor(2, [n, 1, 1, all]), net.tensor(3, [n, h, w, 7]));
    let gain = 0.8;
    let loss = |b: &mut B, pre: &T, scales: &T| {
        let scale = Scale { all: scales, offset };
        let (act, kept) = b.conv_scale_silu(first, Operand::of(pre), scale, false);
        assert!(kept.is_none());
        let y = b.conv(second, Operand::of(&act));
        gain * dot(y.values(), p.values())
    };
    let mut gscales = net.b.zero_scales_grad(&scales);
    let scale = Scale { all: &scales, offset };
    let gpre = net.b.conv_dgrad_scale_silu(second, &p, gain, &pre, scale, &mut gscales);
    check("scale_silu: pre", pre.values(), gpre.values(), |v| {
        let pre = reshaped(&net.b, &pre, v);
        loss(&mut net.b, &pre, &scales)
    });
    check("scale_silu: scales", scales.values(), gscales.values(), |v| {
        let scales = reshaped(&net.b, &scales, v);
        loss(&mut net.b, &pre, &scales)
    });
}

#[test]
fn pixel_norm_with_and_without_averaging() {
    let mut net = Net::convs(&[]);
    for (down, out) in [(false, [2, 6, 4, 5]), (true, [2, 3, 2, 5])] {
        let (x, p, acc) = (net.tensor(1, [2, 6, 4, 5]), net.tensor(2, out), net.tensor(3, [2, 6, 4, 5]));
        let g = net.b.pixel_norm_backward(&x, &p, down, Some(acc.clone()));
        check(&format!("pixel_norm down {down}"), x.values(), g.values(), |v| {
            let x = reshaped(&net.b, &x, v);
            let y = net.b.pixel_norm(&x, down);
            dot(y.values(), p.values()) + dot(acc.values(), x.values())
        });
        let g = net.b.pixel_norm_backward(&x, &p, down, None);
        check(&format!("pixel_norm alone down {down}"), x.values(), g.values(), |v| {
            let x = reshaped(&net.b, &x, v);
            let y = net.b.pixel_norm(&x, down);
            dot(y.values(), p.values())
        });
    }
}

#[test]
fn upsampling() {
    let mut net = Net::convs(&[]);
    let (x, p) = (net.tensor(1, [2, 3, 5, 3]), net.tensor(2, [2, 6, 10, 3]));
    let g = net.b.upsample_backward(&p);
    check("upsample", x.values(), g.values(), |v| {
        let x = reshaped(&net.b, &x, v);
        let y = net.b.upsample(&x);
        dot(y.values(), p.values())
    });
}

#[test]
fn attention() {
    let mut net = Net::convs(&[]);
    for (heads, c) in [(1, 5), (3, 4)] {
        let (qkv, p) = (net.tensor(1, [2, 3, 7, heads * c * 3]), net.tensor(2, [2, 3, 7, heads * c]));
        let g = net.b.attention_backward(&qkv, heads, &p);
        check(&format!("attention of {heads} heads"), qkv.values(), g.values(), |v| {
            let qkv = reshaped(&net.b, &qkv, v);
            let y = net.b.attention(&qkv, heads);
            dot(y.values(), p.values())
        });
    }
}

#[test]
fn embedding_of_noise_and_labels() {
    for with_labels in [true, false] {
        let (n, noise_channels, label_dim, channels) = (3, 6, 5, 7);
        let mut table = ParamTable::default();
        let (freqs, phases) = table.fourier("fourier".into(), noise_channels);
        let noise = table.linear("noise".into(), noise_channels, channels);
        let label = with_labels.then(|| table.linear("label".into(), label_dim, channels));
        let p = Embed { freqs, phases, noise, label, label_balance: 0.4 };
        let mut net = Net::new(&table);
        let sigma = net.b.tensor([n, 1, 1, 1], &[0.1, 1.0, 9.0]);
        let labels = net.tensor(2, [n, 1, 1, label_dim]);
        let labels = with_labels.then_some(&labels);
        let g = net.tensor(3, [n, 1, 1, channels]);
        let e = net.b.embed(&p, &sigma, labels);
        net.b.embed_backward(&p, &e, labels, &g);
        let grads = net.grads(0);
        net.check_params("embed", &grads, |b| dot(b.embed(&p, &sigma, labels).emb.values(), g.values()));
    }
}

#[test]
fn scales_of_all_blocks() {
    let (n, cemb) = (3, 5);
    let mut table = ParamTable::default();
    let mut layers = vec![];
    for (i, channels) in [4, 7, 3].into_iter().enumerate() {
        let gain = table.gain(format!("{i}.gain"));
        let weight = table.linear(format!("{i}"), cemb, channels);
        let offset = layers.iter().map(|l: &EmbLayer| l.channels).sum();
        layers.push(EmbLayer { weight, gain, offset, channels });
    }
    let mut net = Net::new(&table);
    let (emb, p) = (net.tensor(1, [n, 1, 1, cemb]), net.tensor(2, [n, 1, 1, 14]));
    let g = net.b.emb_scales_backward(&layers, &emb, &p);
    check("emb_scales: emb", emb.values(), g.values(), |v| {
        let emb = reshaped(&net.b, &emb, v);
        dot(net.b.emb_scales(&layers, &emb).values(), p.values())
    });
    let grads = net.grads(0);
    net.check_params("emb_scales", &grads, |b| dot(b.emb_scales(&layers, &emb).values(), p.values()));
}

#[test]
fn loss_and_learned_uncertainty() {
    let (n, shape) = (3, [3, 5, 3, 2]);
    let mut table = ParamTable::default();
    let out_gain = table.gain("out_gain".into());
    let (freqs, phases) = table.fourier("fourier".into(), 6);
    let weight = table.linear("logvar".into(), 6, 1);
    let p = Logvar { freqs, phases, weight };
    let mut net = Net::new(&table);
    let sigma = net.b.tensor([n, 1, 1, 1], &[0.2, 1.0, 5.0]);
    let (clean, noisy, raw) = (net.tensor(1, shape), net.tensor(2, shape), net.tensor(3, shape));
    let (features, logvar) = net.b.logvar(&p, &sigma);
    let loss = |b: &mut B, raw: &T, logvar: &T| {
        let input = LossInput { clean: &clean, noisy: &noisy, raw, sigma: &sigma, logvar, out_gain, sigma_data: 0.6 };
        b.loss(input)
    };
    let sum = |l: Loss<T>| l.per_image.values().iter().sum::<f64>();
    let l = loss(&mut net.b, &raw, &logvar);
    check("loss: raw", raw.values(), l.grad_raw.values(), |v| {
        let raw = reshaped(&net.b, &raw, v);
        sum(loss(&mut net.b, &raw, &logvar))
    });
    check("loss: logvar", logvar.values(), l.grad_logvar.values(), |v| {
        let logvar = reshaped(&net.b, &logvar, v);
        sum(loss(&mut net.b, &raw, &logvar))
    });
    // The calls above have accumulated the gradient of the gain; a step clears it.
    step(&mut net.b, 0);
    let l = loss(&mut net.b, &raw, &logvar);
    net.b.logvar_backward(&p, &features, &l.grad_logvar);
    let grads = net.grads(0);
    net.check_params("loss", &grads, |b| {
        let (_, logvar) = b.logvar(&p, &sigma);
        sum(loss(b, &raw, &logvar))
    });
}

#[test]
fn whole_network() {
    network(0.0);
}

/// What is dropped has no gradient, in the activation and in what scales it.
#[test]
fn whole_network_with_dropout() {
    network(0.3);
}

/// A network of three levels with everything that a network can have, at an odd aspect ratio; in training
/// mode the gradient is that at the weights as forced normalisation left them.
fn network(rate: f64) {
    let config: Config = serde_json::from_value(serde_json::json!({
        "img_resolution": 16, "img_channels": 2, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2, 1],
        "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 4, "logvar_channels": 5,
    }))
    .unwrap();
    let (model, table) = Precond::new(&config).unwrap();
    let mut net = Net::new(&table);
    for (id, spec) in table.iter() {
        if spec.kind == ParamKind::Gain {
            net.set(id.0, &[0.5 + 0.02 * id.0 as f64]);
        }
    }
    let shape = [2, 4, 12, 2];
    let (clean, noise) = (net.tensor(1, shape), net.tensor(2, shape));
    let sigma = net.b.tensor([2, 1, 1, 1], &[0.3, 2.0]);
    let noisy: Vec<f64> =
        clean.values().iter().zip(noise.values()).enumerate().map(|(i, (x, n))| x + [0.3, 2.0][i / 96] * n).collect();
    let noisy = net.b.tensor(shape, &noisy);
    let labels = net.tensor(3, [2, 1, 1, 3]);
    let keys: Vec<f64> = (0..2).flat_map(|image| mask_key(1, image)).map(f64::from).collect();
    let masks = (rate > 0.0).then(|| Masks { keys: net.b.tensor([2, 1, 1, 2], &keys), rate });
    let pass = |b: &mut B| model.train_forward(b, &clean, &noisy, &sigma, Some(&labels), masks.as_ref());

    net.b.make_effective(Slot::Weight, Normalization::Train { rounds: 1 }).unwrap();
    let first = pass(&mut net.b);
    model.backward(&mut net.b, first, &mut |_, _| {});
    let grads = net.grads(1);
    for (id, _) in table.iter() {
        net.values[id.0] = net.b.param(Slot::Weight, id).unwrap();
    }
    net.b.make_effective(Slot::Weight, Normalization::Eval).unwrap();
    net.check_params("network", &grads, |b| pass(b).per_image.values().iter().sum());
}
