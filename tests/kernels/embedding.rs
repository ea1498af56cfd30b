//! The embedding, the scales of all blocks and their gradients, on the emulator and a GPU, against the CPU backend
//! on random data: in f16 and bf16, in three thread orders, in the normal and in the checked build.
//!
//! Everything is f32 but the effective weights, and those of the tests are numbers that 16 bits hold, so
//! that the twin has the same: what differs is the order of sums.
#![cfg(any(feature = "emulator", feature = "cuda"))]

use crate::common::normals::normals;
use crate::testbed::{self, Bench, Memory, in_rows, read};
use bytemuck::Zeroable;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::embedding::{self, EmbedLayers, LabelLayer, ScaleLayer, ScaleTable};
use edm2k::backend::gpu::launch::DevicePtr;
use edm2k::backend::gpu::structs::{EmbScales, EmbScalesBackward, EmbedBackward, EmbedParams};
use edm2k::backend::{Backend, EmbLayer, Embed, NetworkBackend, Normalization, Slot, TrainingBackend};
use edm2k::params::{ParamId, ParamTable};

/// Sums of up to 1000 values in f32.
const BOUND: f64 = 1e-5;

impl Bench {
    /// Room for f32 values, which are NaN.
    fn empty32(&self, values: usize) -> Memory {
        self.kernels.alloc(4 * values)
    }

    /// Gives a linear layer of the twin random weights whose effective ones are 16-bit values; returns
    /// those, padded as on the device.
    fn random_weights(&self, cpu: &mut Cpu<f32>, id: ParamId, cin: usize, cout: usize, seed: u64) -> Vec<u16> {
        let (mut bits, mut stored) = (vec![], vec![]);
        let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
        for row in normals(cin * cout, seed, 1.0).chunks(cin) {
            // Of norm 1/2. A stored row s with effective row w of norm r < 1 is s = w eps sqrt(cin) / (1 - r),
            // because w = s / ((eps + |s| / sqrt(cin)) sqrt(cin)).
            let size = norm(&row.iter().map(|&x| x.into()).collect::<Vec<_>>()) as f32;
            let row = self.narrow(&row.iter().map(|x| 0.5 * x / size).collect::<Vec<_>>());
            let values: Vec<f64> = self.widen(&row).into_iter().map(f64::from).collect();
            let by = 1e-4 * (cin as f64).sqrt() / (1.0 - norm(&values));
            stored.extend(values.into_iter().map(|w| (w * by) as f32));
            bits.extend(row);
            bits.resize(bits.len().next_multiple_of(8), 0);
        }
        cpu.set_param(Slot::Weight, id, &stored).unwrap();
        bits
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

// ---- noise level and label ----------------------------------------------------------------------------

#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    noise: usize,
    label: Option<usize>,
    emb: usize,
}

/// One of each; several chunks of 128 channels, several groups of 8 images, tiles of rows not full;
/// widths that 16-byte reads fit and widths that they do not.
const CASES: [Case; 6] = [
    Case { n: 1, noise: 32, label: None, emb: 24 },
    Case { n: 1, noise: 32, label: Some(5), emb: 64 },
    Case { n: 3, noise: 192, label: Some(16), emb: 24 },
    Case { n: 3, noise: 30, label: Some(131), emb: 27 },
    Case { n: 40, noise: 32, label: Some(1000), emb: 64 },
    Case { n: 40, noise: 136, label: None, emb: 40 },
];

#[test]
fn embedding_and_its_gradient() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        for case in CASES {
            check_embedding(&d, case, true);
        }
        check_embedding(&d, CASES[2], false);
    });
}

fn check_embedding(d: &Bench, case: Case, with_labels: bool) {
    let Case { n, noise, label, emb } = case;
    let what = |of: &str| format!("{of} of {case:?}, labels {with_labels}");
    let mut table = ParamTable::default();
    let (freqs, phases) = table.fourier("fourier".into(), noise);
    let noise_id = table.linear("noise".into(), noise, emb);
    let label_id = label.map(|channels| table.linear("label".into(), channels, emb));
    let p = Embed { freqs, phases, noise: noise_id, label: label_id, label_balance: 0.3 };

    let mut cpu = Cpu::<f32>::for_training(&table, 0);
    let frequencies = normals(noise, 1, std::f32::consts::TAU);
    let offsets: Vec<f32> = (0..noise).map(|i| std::f32::consts::TAU * i as f32 / noise as f32).collect();
    cpu.set_param(Slot::Weight, freqs, &frequencies).unwrap();
    cpu.set_param(Slot::Weight, phases, &offsets).unwrap();
    let noise_weight = d.upload(&d.random_weights(&mut cpu, noise_id, noise, emb, 2));
    let label_weight =
        label_id.zip(label).map(|(id, channels)| d.upload(&d.random_weights(&mut cpu, id, channels, emb, 3)));
    cpu.make_effective(Slot::Weight, Normalization::Eval).unwrap();

    // From 0.002 to 80, where c_noise freq reaches some 30.
    let sigmas: Vec<f32> = (0..n).map(|i| 0.002 * 40_000f32.powf(i as f32 / n.max(2) as f32)).collect();
    let labels = label.filter(|_| with_labels).map(|channels| normals(n * channels, 4, 1.0));
    let twin_sigma = cpu.upload([n, 1, 1, 1], &sigmas);
    let twin_labels = labels.as_ref().map(|labels| cpu.upload([n, 1, 1, labels.len() / n], labels));
    let twin = cpu.embed(&p, &twin_sigma, twin_labels.as_ref());

    let [freqs, phases, sigma] = [d.upload(&frequencies), d.upload(&offsets), d.upload(&sigmas)];
    let host_labels = labels;
    let labels = host_labels.as_ref().map(|labels| d.upload(labels));
    let labels_ptr = labels.as_ref().map_or(DevicePtr::NULL, Memory::ptr);
    let layers = EmbedLayers {
        noise_channels: noise,
        label: label.map(|channels| LabelLayer { channels, balance: 0.3 }),
        emb_channels: emb,
    };
    let out = [n * noise, n * emb, n * emb].map(|values| d.empty32(values));
    let run = |labels: DevicePtr, rows: usize, [features, pre, emb]: &[Memory; 3]| {
        let memory = EmbedParams {
            sigma: sigma.ptr(),
            freqs: freqs.ptr(),
            phases: phases.ptr(),
            noise: noise_weight.ptr(),
            label: label_weight.as_ref().map_or(DevicePtr::NULL, Memory::ptr),
            labels,
            features: features.ptr(),
            pre: pre.ptr(),
            emb: emb.ptr(),
            ..Zeroable::zeroed()
        };
        d.run_clean([&embedding::embed(d.precision, n, &layers, rows, memory)])
    };
    run(labels_ptr, n, &out);
    let want = [&twin.features, &twin.pre, &twin.emb].map(|t| cpu.download(t).unwrap());
    d.same32(&what("Fourier features"), &read(&out[0]), &want[0], BOUND);
    d.same32(&what("pre"), &read(&out[1]), &want[1], BOUND);
    d.same32(&what("emb"), &read(&out[2]), &want[2], BOUND);
    let again = out.each_ref().map(|m| d.empty32(m.bytes() / 4));
    run(labels_ptr, n, &again);
    for (once, twice) in out.iter().zip(&again) {
        assert_eq!(bits(&read(once)), bits(&read(twice)), "{}", what("a second run"));
    }

    // Fewer labels are taken in turn.
    if let Some(values) = host_labels.filter(|_| n % 2 == 0) {
        let half = &values[..values.len() / 2];
        let [few, all] = [d.upload(half), d.upload(&half.repeat(2))];
        let [in_turn, one_by_one] = [(&few, n / 2), (&all, n)].map(|(labels, rows)| {
            let to = out.each_ref().map(|m| d.empty32(m.bytes() / 4));
            run(labels.ptr(), rows, &to);
            bits(&read(&to[1]))
        });
        assert_eq!(in_turn, one_by_one, "{}", what("labels in turn"));
        let twins = [half.to_vec(), half.repeat(2)].map(|labels| {
            let labels = cpu.upload([labels.len() * n / values.len(), 1, 1, values.len() / n], &labels);
            let twin = cpu.embed(&p, &twin_sigma, Some(&labels));
            cpu.download(&twin.pre).unwrap()
        });
        assert_eq!(twins[0], twins[1], "{}", what("labels in turn"));
    }

    // The gradients, from the twin's features, twice added to what was there.
    let e = want.map(|values| d.upload(&values));
    let grads = normals(n * emb, 5, 1.0);
    let twin_grad = cpu.upload([n, 1, 1, emb], &grads);
    let grad = d.upload(&grads);
    let start = [noise, label.unwrap_or(0)].map(|cin| normals(emb * cin, 6, 3.0));
    let begin = || [in_rows(&start[0], noise), in_rows(&start[1], label.unwrap_or(8))].map(|values| d.upload(&values));
    let run = |to: &[Memory; 2], times| {
        let memory = EmbedBackward {
            grad_emb: grad.ptr(),
            pre: e[1].ptr(),
            features: e[0].ptr(),
            labels: labels_ptr,
            grad_noise: to[0].ptr(),
            grad_label: to[1].ptr(),
            ..Zeroable::zeroed()
        };
        let launch = embedding::embed_backward(n, &layers, memory);
        (0..times).for_each(|_| d.run_clean([&launch]));
    };
    let sums = begin();
    run(&sums, 2);
    cpu.embed_backward(&p, &twin, twin_labels.as_ref(), &twin_grad);
    cpu.embed_backward(&p, &twin, twin_labels.as_ref(), &twin_grad);
    let layers = [("noise", Some(noise_id), noise), ("label", label_id, label.unwrap_or(8))];
    for (((name, id, cin), start), got) in layers.into_iter().zip(&start).zip(&sums) {
        let Some(id) = id else { continue };
        let mut want = start.clone();
        // Without labels the twin has no gradient.
        if name == "noise" || with_labels {
            let grad = cpu.param(Slot::Grad, id).unwrap();
            want.iter_mut().zip(grad).for_each(|(w, g)| *w += g);
        }
        d.same32(&what(&format!("gradient of the {name} layer")), &read(got), &in_rows(&want, cin), BOUND);
    }
    let again = begin();
    run(&again, 2);
    for (once, twice) in sums.iter().zip(&again) {
        assert_eq!(bits(&read(once)), bits(&read(twice)), "{}", what("a second backward run"));
    }
}

// ---- scales of all blocks -----------------------------------------------------------------------------

#[test]
fn scales_of_all_blocks_and_their_gradients() {
    let unequal = [(40, 0.7), (8, -1.3), (64, 0.0), (33, 2.1)];
    let one = [(3, 0.5)];
    // More tiles than parts of the sum over rows.
    let many: Vec<(usize, f32)> = (0..60).map(|i| (1 + i % 5, 0.1 * i as f32 - 2.0)).collect();
    Bench::of(testbed::everywhere()).for_each(|d| {
        for (n, emb) in [(1, 24), (3, 64), (3, 27), (40, 64), (9, 136)] {
            check_scales(&d, n, emb, &unequal);
        }
        check_scales(&d, 2, 8, &one);
        check_scales(&d, 72, 24, &many);
    });
    Bench::of(testbed::once()).for_each(|d| check_scales(&d, 80, 136, &many));
}

fn check_scales(d: &Bench, n: usize, emb: usize, layers: &[(usize, f32)]) {
    let what = |of: &str| format!("{of}: {n} images, {emb} channels, {} layers", layers.len());
    let mut table = ParamTable::default();
    let mut offset = 0;
    let mut ids = Vec::new();
    for (i, &(channels, _)) in layers.iter().enumerate() {
        let weight = table.linear(format!("linear{i}"), emb, channels);
        ids.push(EmbLayer { weight, gain: table.gain(format!("gain{i}")), offset, channels });
        offset += channels;
    }
    let channels = offset;
    let mut cpu = Cpu::<f32>::for_training(&table, 0);

    // Layers lie apart, in other orders in the arenas than in the product; between them are NaN, among
    // the gradients sevens, which must stay.
    const NAN: u16 = 0xffff;
    let row = emb.next_multiple_of(8);
    let mut placed = Vec::new();
    let (mut weights, mut exact, mut start) = (vec![NAN; 8], vec![f32::NAN; 3], vec![7.0; 16]);
    for (i, (layer, &(count, gain))) in ids.iter().zip(layers).enumerate().rev() {
        cpu.set_param(Slot::Weight, layer.gain, &[gain]).unwrap();
        let at = ScaleLayer {
            weight: weights.len(),
            grad: start.len(),
            gain: exact.len(),
            gain_grad: start.len() + count * row + 3,
            offset: layer.offset,
            channels: count,
        };
        placed.push(at);
        weights.extend(d.random_weights(&mut cpu, layer.weight, emb, count, 10 + i as u64));
        weights.extend([NAN; 16]);
        exact.extend([gain, f32::NAN, f32::NAN]);
        start.extend(in_rows(&normals(count * emb, 20 + i as u64, 3.0), emb));
        start.extend([7.0; 8]);
    }
    placed.reverse();
    cpu.make_effective(Slot::Weight, Normalization::Eval).unwrap();

    let scales = ScaleTable::new(emb, &placed);
    assert_eq!(scales.channels(), channels);
    let [weights, tiles] = [d.upload(&weights), d.upload(scales.tiles())];
    let exact = d.upload(&exact);
    let (emb_values, grad_values) = (normals(n * emb, 7, 1.0), normals(n * channels, 8, 1.0));
    let (twin_emb, twin_grad) =
        (cpu.upload([n, 1, 1, emb], &emb_values), cpu.upload([n, 1, 1, channels], &grad_values));
    let (emb_memory, grad) = (d.upload(&emb_values), d.upload(&grad_values));

    let forward = || {
        let out = d.empty32(n * channels);
        let memory = EmbScales {
            tiles: tiles.ptr(),
            weights: weights.ptr(),
            exact: exact.ptr(),
            emb: emb_memory.ptr(),
            out: out.ptr(),
            ..Zeroable::zeroed()
        };
        d.run_clean([&embedding::emb_scales(d.precision, n, &scales, memory)]);
        read(&out)
    };
    let got = forward();
    let twin = cpu.emb_scales(&ids, &twin_emb);
    let less_one = |values: &[f32]| values.iter().map(|x| x - 1.0).collect::<Vec<_>>();
    d.same32(&what("scales less 1"), &less_one(&got), &less_one(&cpu.download(&twin).unwrap()), BOUND);
    assert_eq!(bits(&forward()), bits(&got), "{}", what("a second run"));

    // The gradients, twice added to what was there.
    let backward = || {
        let (arena, grad_emb) = (d.upload(&start), d.empty32(n * emb));
        let scratch = d.kernels.alloc(scales.scratch(n));
        let memory = EmbScalesBackward {
            tiles: tiles.ptr(),
            weights: weights.ptr(),
            exact: exact.ptr(),
            emb: emb_memory.ptr(),
            grad: grad.ptr(),
            grads: arena.ptr(),
            grad_emb: grad_emb.ptr(),
            gain_sums: scratch.ptr(),
            ..Zeroable::zeroed()
        };
        let launches = embedding::emb_scales_backward(d.precision, n, &scales, memory);
        d.run_clean(&launches);
        d.run_clean(&launches);
        (read(&arena), read(&grad_emb))
    };
    let (mut arena, grad_emb) = backward();
    let second = backward();
    assert_eq!((bits(&second.0), bits(&second.1)), (bits(&arena), bits(&grad_emb)), "{}", what("a second run"));

    cpu.emb_scales_backward(&ids, &twin_emb, &twin_grad);
    let twin = cpu.emb_scales_backward(&ids, &twin_emb, &twin_grad);
    d.same32(&what("gradient of emb"), &grad_emb, &cpu.download(&twin).unwrap(), BOUND);
    let (mut gains, mut want_gains) = (vec![], vec![]);
    let mut want = start.clone();
    for (layer, id) in placed.iter().zip(&ids) {
        // Apart: they are sums over many weights, of another size.
        gains.push(std::mem::replace(&mut arena[layer.gain_grad], 7.0) - 7.0);
        want_gains.push(cpu.param(Slot::Grad, id.gain).unwrap()[0]);
        let grad = in_rows(&cpu.param(Slot::Grad, id.weight).unwrap(), emb);
        want[layer.grad..].iter_mut().zip(grad).for_each(|(w, g)| *w += g);
    }
    d.same32(&what("gradients of the gains"), &gains, &want_gains, BOUND);
    d.same32(&what("gradients of the weights"), &arena, &want, BOUND);
    let inside = |i: usize| placed.iter().any(|l| (l.grad..l.grad + l.channels * row).contains(&i));
    assert!((0..arena.len()).all(|i| inside(i) || arena[i] == 7.0), "{}", what("what lies between the gradients"));
}
