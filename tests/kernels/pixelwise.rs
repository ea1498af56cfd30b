//! The kernels between the convolutions, on the emulator and a GPU, against the CPU backend on random data: in
//! f16 and bf16, in three thread orders, in the normal and in the checked build.
//!
//! The twin gets the kernel's inputs, rounded to 16 bits, and computes in f32. What a kernel writes in
//! 16 bits is rounded once: at most 2^-11 = 4.9e-4 of a value in f16, 2^-8 = 3.9e-3 in bf16; the bounds
//! leave room for one more rounding in an accumulated input. What is f32 throughout differs by the
//! order of sums.
#![cfg(any(feature = "emulator", feature = "cuda"))]

use crate::common::normals::normals;
use crate::testbed::{self, Bench, Memory, read};
use bytemuck::Zeroable;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::launch::DevicePtr;
use edm2k::backend::gpu::structs::{
    self, Dropout, Elementwise, LogvarBackward, LossParams, PixelNorm, PixelNormBackward, PrecondInput, PrecondOutput,
    StepScalars, StepTotals, Upsample, WeightEffective, WeightRow, WeightStep, WeightTurn,
};
use edm2k::backend::gpu::weights::{RowTable, Turned};
use edm2k::backend::gpu::{pixelwise, precond, weights};
use edm2k::backend::{
    Backend, Logvar, LossInput, Masks, NetworkBackend, Normalization, Operand, OptimizerStep, Shape, Slot,
    TrainingBackend,
};
use edm2k::params::{Cat, ParamId, ParamKind, ParamTable};
use edm2k::rng::mask_key;

/// Bound of what is f32 throughout.
const F32: f64 = 1e-5;

impl Bench {
    fn zeros(&self, bytes: usize) -> Memory {
        self.upload(&vec![0u8; bytes])
    }

    fn empty(&self, shape: Shape) -> Memory {
        self.kernels.alloc(2 * shape.iter().product::<usize>())
    }

    /// Random 16-bit values, on the device and as floats.
    fn random(&self, shape: Shape, seed: u64, size: f32) -> (Memory, Vec<f32>) {
        let bits = self.narrow(&normals(shape.iter().product(), seed, size));
        (self.upload(&bits), self.widen(&bits))
    }

    fn read16(&self, memory: &Memory) -> Vec<f32> {
        self.widen(&read(memory))
    }

    fn same16(&self, what: &str, got: &Memory, want: &[f32]) {
        self.same(what, &self.read16(got), want);
    }
}

fn silu(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| (f64::from(x) / (1.0 + f64::from(-x).exp()) / 0.596) as f32).collect()
}

fn bare_cpu() -> Cpu<f32> {
    Cpu::for_sampling(&ParamTable::default())
}

fn doubled([n, h, w, c]: Shape, double: bool) -> Shape {
    if double { [n, 2 * h, 2 * w, c] } else { [n, h, w, c] }
}

/// One pixel; odd sizes; more channels than a warp's 32 vectors.
const SHAPES: [Shape; 5] = [[1, 1, 1, 8], [1, 8, 11, 136], [3, 7, 5, 8], [1, 2, 3, 520], [3, 1, 2, 128]];

#[test]
fn pixel_norm_and_its_gradient() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = bare_cpu();
        for (shape, down) in SHAPES.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            let what = format!("pixel_norm {shape:?} down {down}");
            let large = doubled(shape, down);
            let (x, x_values) = d.random(large, 1, 3.0);
            let twin_x = cpu.upload(large, &x_values);
            let twin = cpu.pixel_norm(&twin_x, down);
            let want = cpu.download(&twin).unwrap();
            let (y, y_silu) = (d.empty(shape), d.empty(shape));
            let memory = PixelNorm { x: x.ptr(), y: y.ptr(), silu: y_silu.ptr(), ..Zeroable::zeroed() };
            d.run([&pixelwise::pixel_norm(d.precision, shape, down, memory)]);
            d.same16(&what, &y, &want);
            d.same16(&format!("mp_silu of {what}"), &y_silu, &silu(&want));
            let alone = d.empty(shape);
            let memory = PixelNorm { y: alone.ptr(), silu: DevicePtr::NULL, ..memory };
            d.run([&pixelwise::pixel_norm(d.precision, shape, down, memory)]);
            assert_eq!(read::<u16>(&alone), read::<u16>(&y), "{what} without mp_silu");

            let (grad, g_values) = d.random(shape, 2, 1.0);
            let (acc, acc_values) = d.random(large, 3, 1.0);
            let (twin_g, twin_acc) = (cpu.upload(shape, &g_values), cpu.upload(large, &acc_values));
            for accumulate in [false, true] {
                let out = if accumulate { acc.clone() } else { d.empty(large) };
                let memory = PixelNormBackward {
                    x: x.ptr(),
                    grad: grad.ptr(),
                    acc: if accumulate { acc.ptr() } else { DevicePtr::NULL },
                    out: out.ptr(),
                    ..Zeroable::zeroed()
                };
                let twin = cpu.pixel_norm_backward(&twin_x, &twin_g, down, accumulate.then(|| twin_acc.clone()));
                d.run([&pixelwise::pixel_norm_backward(d.precision, shape, down, memory)]);
                d.same16(&format!("gradient of {what}, acc {accumulate}"), &out, &cpu.download(&twin).unwrap());
            }
        }
        // A pixel of zeros has no direction: its gradient is the plain scaling by 1 / eps, as in the twin.
        let shape = [1, 1, 1, 8];
        let (x, grad, out) = (d.upload(&[0u16; 8]), d.random(shape, 4, 1e-3), d.empty(shape));
        let memory = PixelNormBackward { x: x.ptr(), grad: grad.0.ptr(), out: out.ptr(), ..Zeroable::zeroed() };
        d.run([&pixelwise::pixel_norm_backward(d.precision, shape, false, memory)]);
        let (zero, g) = (cpu.upload(shape, &[0.0; 8]), cpu.upload(shape, &grad.1));
        let twin = cpu.pixel_norm_backward(&zero, &g, false, None);
        d.same16("gradient at a pixel of zeros", &out, &cpu.download(&twin).unwrap());
    });
}

#[test]
fn upsampling_and_its_gradient() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = bare_cpu();
        for shape in SHAPES {
            let large = doubled(shape, true);
            let (x, x_values) = d.random(shape, 5, 1.0);
            let (y, y_silu) = (d.empty(large), d.empty(large));
            let memory = Upsample { from: x.ptr(), y: y.ptr(), silu: y_silu.ptr(), ..Zeroable::zeroed() };
            d.run([&pixelwise::upsample(d.precision, shape, memory)]);
            let twin_x = cpu.upload(shape, &x_values);
            let twin = cpu.upsample(&twin_x);
            let want = cpu.download(&twin).unwrap();
            d.same32(&format!("upsample {shape:?}, a copy"), &d.read16(&y), &want, 0.0);
            d.same16(&format!("mp_silu of upsample {shape:?}"), &y_silu, &silu(&want));
            let alone = d.empty(large);
            let memory = Upsample { y: alone.ptr(), silu: DevicePtr::NULL, ..memory };
            d.run([&pixelwise::upsample(d.precision, shape, memory)]);
            assert_eq!(read::<u16>(&alone), read::<u16>(&y), "upsample {shape:?} without mp_silu");

            let (grad, g_values) = d.random(large, 6, 1.0);
            let out = d.empty(shape);
            d.run([&pixelwise::upsample_backward(d.precision, shape, grad.ptr(), out.ptr())]);
            let twin_g = cpu.upload(large, &g_values);
            let twin = cpu.upsample_backward(&twin_g);
            d.same16(&format!("gradient of upsample {shape:?}"), &out, &cpu.download(&twin).unwrap());
        }
    });
}

#[test]
fn activation_clip_and_combinations() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = bare_cpu();
        for shape in SHAPES {
            let (x, x_values) = d.random(shape, 7, 2.0);
            let out = d.empty(shape);
            d.run([&pixelwise::activate(d.precision, shape, x.ptr(), 0.7, out.ptr())]);
            let scaled: Vec<f32> = x_values.iter().map(|x| x * 0.7).collect();
            d.same16(&format!("mp_silu of scaled {shape:?}"), &out, &silu(&scaled));

            // Values that reached the clip stand at it, on both sides.
            let clipped = d.narrow(&x_values.iter().map(|x| x.clamp(-1.5, 1.5)).collect::<Vec<_>>());
            let (grad, g_values) = d.random(shape, 8, 1.0);
            let (twin_y, twin_g) = (cpu.upload(shape, &d.widen(&clipped)), cpu.upload(shape, &g_values));
            let twin = cpu.clip_backward(twin_g, &twin_y, 1.5);
            let want = cpu.download(&twin).unwrap();
            let y = d.upload(&clipped);
            let memory = Elementwise { a: y.ptr(), b: grad.ptr(), out: grad.ptr(), ..Zeroable::zeroed() };
            d.run([&pixelwise::clip_backward(d.precision, shape, 1.5, memory)]);
            d.same32(&format!("gradient of clip {shape:?}, in place"), &d.read16(&grad), &want, 0.0);

            // Dropout, of images with keys of their own.
            let keys: Vec<f32> = (0..shape[0] as u64).flat_map(|image| mask_key(3, image)).collect();
            let masks = Masks { keys: cpu.upload([shape[0], 1, 1, 2], &keys), rate: 0.3 };
            let there = cpu.upload(shape, &x_values);
            let twin = cpu.dropout(&there, &masks, 5, masks.gain());
            let want = cpu.download(&twin).unwrap();
            let on_device = d.upload(&keys);
            let memory = Dropout {
                x: x.ptr(),
                out: out.ptr(),
                keys: on_device.ptr(),
                layer: 5,
                threshold: masks.threshold(),
                factor: masks.gain() as f32,
                ..Zeroable::zeroed()
            };
            d.run([&pixelwise::dropout(d.precision, shape, memory)]);
            d.same16(&format!("dropout {shape:?}"), &out, &want);
            let zeros = |values: &[f32]| values.iter().map(|&x| x == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros(&d.read16(&out)), zeros(&want), "what is dropped of {shape:?}");

            let terms: Vec<_> = (0..6).map(|k| (d.random(shape, 10 + k, 1.0), 1.5 - k as f64)).collect();
            for count in [1, 2, 6] {
                let on_device: Vec<_> = terms[..count].iter().map(|((m, _), f)| (m.ptr(), *f)).collect();
                let on_cpu: Vec<_> = terms[..count].iter().map(|((_, v), f)| (cpu.upload(shape, v), *f)).collect();
                let twin = cpu.linear_combination(&on_cpu.iter().map(|(t, f)| (t, *f)).collect::<Vec<_>>());
                let want = cpu.download(&twin).unwrap();
                d.run([&pixelwise::combine(d.precision, shape, &on_device, out.ptr())]);
                d.same16(&format!("combination of {count} terms {shape:?}"), &out, &want);
            }
        }
        // A sampler's state is f32 and of any number of values.
        for shape in [[1, 1, 1, 1], [1, 7, 5, 3], [3, 8, 11, 4], [1, 1, 1, 6]] {
            let values: usize = shape.iter().product();
            let terms: Vec<_> = (0..6).map(|k| (normals(values, 20 + k, 1.0), 1.5 - k as f64)).collect();
            let on_device: Vec<_> = terms.iter().map(|(v, f)| (d.upload(v), *f)).collect();
            let on_cpu: Vec<_> = terms.iter().map(|(v, f)| (cpu.upload(shape, v), *f)).collect();
            for count in [1, 3, 6] {
                let twin = cpu.linear_combination(&on_cpu[..count].iter().map(|(t, f)| (t, *f)).collect::<Vec<_>>());
                let out = d.upload(&vec![f32::NAN; values]);
                let pointers: Vec<_> = on_device[..count].iter().map(|(m, f)| (m.ptr(), *f)).collect();
                d.run([&pixelwise::combine_f32(values, &pointers, out.ptr())]);
                let want = cpu.download(&twin).unwrap();
                d.same32(&format!("f32 combination of {count} terms {shape:?}"), &read(&out), &want, F32);
            }
        }
    });
}

#[test]
fn casts_from_and_to_f32() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        for (pixels, c) in [(1, 1), (35, 3), (88, 4), (7, 5), (3, 8), (300, 12), (9, 20), (2, 27)] {
            let what = format!("{pixels} pixels of {c} channels, {}", d.name);
            let values = normals(pixels * c, 9, 1.0);
            let (from, to) = (d.upload(&values), d.empty([1, 1, pixels, c.next_multiple_of(8)]));
            d.run([&pixelwise::narrow(d.precision, pixels, c, from.ptr(), to.ptr())]);
            let width = c.next_multiple_of(8);
            let want: Vec<u16> = values.chunks(c).flat_map(|p| [d.narrow(p), vec![0; width - c]].concat()).collect();
            assert_eq!(read::<u16>(&to), want, "narrow {what}");

            // What stands in the padding must not matter.
            let wide = d.upload(&d.narrow(&padded(&values, c)));
            let back = d.upload(&vec![f32::NAN; pixels * c]);
            d.run([&pixelwise::widen(d.precision, pixels, c, wide.ptr(), back.ptr())]);
            assert_eq!(read::<f32>(&back), d.widen(&d.narrow(&values)), "widen {what}");
        }
    });
}

// ---- weights ----------------------------------------------------------------------------------------

/// Where the parameters of a table lie in the arenas.
struct Layout {
    table: ParamTable,
    first: Vec<usize>,
    exact: Vec<usize>,
    values: usize,
    exact_values: usize,
}

impl Layout {
    fn new(table: &ParamTable) -> Self {
        let mut l = Self { table: table.clone(), first: vec![], exact: vec![], values: 0, exact_values: 0 };
        for (id, _) in table.iter() {
            let (cout, row) = l.rows_of(id);
            l.first.push(l.values);
            l.exact.push(l.exact_values);
            l.values += cout * row;
            if l.fan_in(id) == 0 {
                l.exact_values += row;
            }
        }
        l
    }

    /// Rows, and values of each with padding.
    fn rows_of(&self, id: ParamId) -> (usize, usize) {
        match self.table[id].kind {
            ParamKind::Weight { cout, cin, taps } => (cout, taps * cin.next_multiple_of(8)),
            _ => (1, self.table[id].numel().next_multiple_of(8)),
        }
    }

    fn fan_in(&self, id: ParamId) -> usize {
        match self.table[id].kind {
            ParamKind::Weight { cin, taps, .. } => cin * taps,
            _ => 0,
        }
    }

    fn rows(&self, wanted: impl Fn(ParamId) -> bool) -> RowTable {
        let mut rows = Vec::new();
        for (id, _) in self.table.iter().filter(|(id, _)| wanted(*id)) {
            let (count, length) = self.rows_of(id);
            let fan_in = self.fan_in(id);
            let effective = if fan_in == 0 { self.exact[id.0] } else { self.first[id.0] };
            let cat = self.table[id].cat;
            let cin = match self.table[id].kind {
                ParamKind::Weight { cin, .. } => cin.next_multiple_of(8),
                _ => length,
            };
            rows.extend((0..count).map(|r| WeightRow {
                first: (self.first[id.0] + r * length) as i64,
                effective: (effective + r * length) as i64,
                length: length as i32,
                fan_in: fan_in as i32,
                cin: cin as i32,
                split: cat.map_or(cin, |cat| cat.split) as i32,
                scales: cat.map_or([1.0; 2], |cat| [cat.scales.0 as f32, cat.scales.1 as f32]),
            }));
        }
        RowTable::new(rows)
    }

    /// Position in an arena of each value in PyTorch's order.
    fn places(&self, id: ParamId) -> Vec<usize> {
        let first = self.first[id.0];
        let ParamKind::Weight { cout, cin, taps } = self.table[id].kind else {
            return (first..first + self.table[id].numel()).collect();
        };
        let padded = cin.next_multiple_of(8);
        let index = |i: usize| (i / taps / cin * taps + i % taps) * padded + i / taps % cin;
        (0..cout * cin * taps).map(|i| first + index(i)).collect()
    }

    /// One slot of all parameters of the twin, as an arena.
    fn arena(&self, cpu: &mut Cpu<f32>, slot: Slot) -> Vec<f32> {
        let mut arena = vec![0.0; self.values];
        for (id, _) in self.table.iter() {
            let values = cpu.param(slot, id).unwrap();
            self.places(id).into_iter().zip(values).for_each(|(place, x)| arena[place] = x);
        }
        arena
    }

    /// Effective weights of an arena of stored ones, by the formula in f64; and the exact values.
    fn effective(&self, stored: &[f32], rounds: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut weights, mut exact) = (vec![0.0; self.values], vec![0.0; self.exact_values]);
        for row in self.rows(|_| true).rows() {
            let (from, to, n) = (row.first as usize, row.effective as usize, row.length as usize);
            if row.fan_in == 0 {
                exact[to..to + n].copy_from_slice(&stored[from..from + n]);
                continue;
            }
            let mut w: Vec<f64> = stored[from..from + n].iter().map(|&x| x.into()).collect();
            for _ in 0..rounds {
                let rms = (w.iter().map(|x| x * x).sum::<f64>() / f64::from(row.fan_in)).sqrt();
                w.iter_mut().for_each(|x| *x /= 1e-4 + rms);
            }
            let root = f64::from(row.fan_in).sqrt();
            let scale = |i: usize| f64::from(row.scales[usize::from(i % row.cin as usize >= row.split as usize)]);
            weights[to..to + n]
                .iter_mut()
                .zip(w)
                .enumerate()
                .for_each(|(i, (to, x))| *to = (x / root * scale(i)) as f32);
        }
        (weights, exact)
    }
}

/// Rows of padded channels, of one and of many warps, of the kernel for long rows; gains and buffers.
fn weights_table() -> ParamTable {
    let mut table = ParamTable::default();
    table.conv("in".into(), 5, 3, 3);
    table.gain("gain".into());
    table.linear("linear".into(), 136, 8);
    table.fourier("fourier".into(), 12);
    table.conv("conv".into(), 264, 2, 3);
    table.conv("out".into(), 8, 136, 1);
    table.conv_of_cat("cat".into(), 40, 16, 1, Cat { split: 24, scales: (0.75, 1.375) });
    table.linear("wide".into(), 16_400, 2);
    table
}

/// The copies for the gradients of inputs, bit for bit: output and input channels exchanged, taps in reverse.
#[test]
fn turned_weights() {
    Bench::of(testbed::everywhere()).for_each(|d| {
        // Tiles of 64 x 64 that are cut off, whole, several; one tap and nine.
        let weights = [(8, 8, 1), (16, 72, 9), (64, 64, 9), (136, 200, 1)];
        let values: usize = weights.iter().map(|(cout, cin, taps)| cout * cin * taps).sum();
        let effective: Vec<u16> = (0..values).map(|i| (i * 40503 % 65521) as u16).collect();
        let mut want = vec![0u16; values];
        let (mut tiles, mut first) = (Vec::new(), 0);
        for (cout, cin, taps) in weights {
            tiles.extend(Turned { from: first, to: first, cout, cin, taps }.tiles());
            for i in 0..cout * cin * taps {
                let (co, tap, c) = (i / cin / taps, i / cin % taps, i % cin);
                want[first + (c * taps + taps - 1 - tap) * cout + co] = effective[first + i];
            }
            first += cout * cin * taps;
        }
        let (from, to, table) = (d.upload(&effective), d.zeros(2 * values), d.upload(&tiles));
        let memory = WeightTurn { tiles: table.ptr(), effective: from.ptr(), turned: to.ptr() };
        d.run(&[weights::turn(tiles.len(), memory)]);
        assert!(read::<u16>(&to) == want, "{}: turned weights", d.name);
    });
}

#[test]
fn three_optimizer_steps() {
    let table = weights_table();
    let layout = Layout::new(&table);
    let gain = table.find("gain").unwrap();
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = Cpu::<f32>::for_training(&table, 2);
        for (id, spec) in table.iter() {
            cpu.set_param(Slot::Weight, id, &normals(spec.numel(), 30 + id.0 as u64, 0.9)).unwrap();
            for k in 0..2 {
                cpu.set_param(Slot::Ema(k), id, &normals(spec.numel(), 40 + k as u64, 1.0)).unwrap();
            }
        }
        let rounds = 3;
        cpu.make_effective(Slot::Weight, Normalization::Train { rounds }).unwrap();

        let rows = layout.rows(|id| table[id].trained());
        let weight = d.upload(&layout.arena(&mut cpu, Slot::Weight));
        let emas = [0, 1].map(|k| d.upload(&layout.arena(&mut cpu, Slot::Ema(k))));
        let [grad, m, v] = [0; 3].map(|_| d.zeros(4 * layout.values));
        let effective = d.zeros(2 * layout.values);
        let exact = d.zeros(4 * layout.exact_values);
        let (row_memory, scalars) = (d.upload(rows.rows()), d.zeros(size_of::<StepScalars>()));
        let (stats, totals) = (d.zeros(8 * rows.rows().len()), d.zeros(size_of::<StepTotals>()));
        let memory = WeightStep {
            rows: row_memory.ptr(),
            scalars: scalars.ptr(),
            weight: weight.ptr(),
            grad: grad.ptr(),
            m: m.ptr(),
            v: v.ptr(),
            emas: [emas[0].ptr(), emas[1].ptr(), DevicePtr::NULL, DevicePtr::NULL],
            effective: effective.ptr(),
            exact: exact.ptr(),
            stats: stats.ptr(),
            ema_count: 2,
            rounds: rounds as i32,
        };

        for number in 1..=3u64 {
            // The twin's way to a gradient: products of random numbers. In the second step one is infinite.
            for (id, spec) in table.iter() {
                let ParamKind::Weight { cout, cin, .. } = spec.kind else { continue };
                let seed = 50 + 10 * number + id.0 as u64;
                let mut x = normals(9 * cin, seed, 1.0);
                if number == 2 {
                    x[3] = f32::INFINITY;
                }
                let x = cpu.upload([1, 3, 3, cin], &x);
                let g = cpu.upload([1, 3, 3, cout], &normals(9 * cout, seed + 100, 1.0));
                cpu.conv_wgrad(id, Operand::of(&x), &g, 1.0);
            }
            let image = cpu.upload([1, 1, 2, 4], &normals(8, number, 1.0));
            let one = cpu.upload([1, 1, 1, 1], &[1.0]);
            cpu.loss(LossInput {
                clean: &image,
                noisy: &image,
                raw: &image,
                sigma: &one,
                logvar: &one,
                out_gain: gain,
                sigma_data: 0.5,
            });
            let accumulated = layout.arena(&mut cpu, Slot::Grad);
            grad.upload(0, &accumulated);

            let step = OptimizerStep {
                lr: 0.01,
                betas: (0.9, 0.99),
                eps: 1e-8,
                step: number,
                grad_scale: 0.25,
                rounds,
                ema_betas: &[0.95, 0.5],
            };
            let twin = cpu.optimizer_step(&step).unwrap();
            scalars.upload(0, &[StepScalars::new(&step)]);
            d.run(&weights::step(d.precision, &rows, memory, totals.ptr()));

            let stored = layout.arena(&mut cpu, Slot::Weight);
            let slots = [(&m, Slot::AdamM), (&v, Slot::AdamV), (&emas[0], Slot::Ema(0)), (&emas[1], Slot::Ema(1))];
            d.same32(&format!("weights after step {number}"), &read(&weight), &stored, F32);
            for (memory, slot) in slots {
                d.same32(&format!("{slot:?} after step {number}"), &read(memory), &layout.arena(&mut cpu, slot), F32);
            }
            let want = layout.arena(&mut cpu, Slot::Grad);
            d.same32(&format!("gradient after step {number}"), &read(&grad), &want, F32);
            let total = read::<StepTotals>(&totals)[0];
            assert_eq!((total.nonfinite, total.nonfinite > 0), (twin.nonfinite, number == 2), "{}", d.name);
            d.same32("gradient norm", &[total.grad_norm as f32], &[twin.grad_norm as f32], F32);
            let (want, want_exact) = layout.effective(&stored, rounds + 1);
            d.same16(&format!("effective weights after step {number}"), &effective, &want);
            let at = layout.exact[gain.0];
            d.same32("gain", &read::<f32>(&exact)[at..at + 8], &want_exact[at..at + 8], F32);
        }
    });
}

#[test]
fn effective_weights_of_weights_and_averages() {
    let table = weights_table();
    let layout = Layout::new(&table);
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = Cpu::<f32>::for_training(&table, 1);
        for (id, spec) in table.iter() {
            cpu.set_param(Slot::Weight, id, &normals(spec.numel(), 70 + id.0 as u64, 0.9)).unwrap();
            cpu.set_param(Slot::Ema(0), id, &normals(spec.numel(), 80 + id.0 as u64, 0.1)).unwrap();
        }
        let all = layout.rows(|_| true);
        let rows = d.upload(all.rows());
        for (slot, how, rounds) in
            [(Slot::Weight, Normalization::Train { rounds: 3 }, 4), (Slot::Ema(0), Normalization::Eval, 1)]
        {
            let stored = layout.arena(&mut cpu, slot);
            let source = d.upload(&stored);
            let (effective, exact) = (d.zeros(2 * layout.values), d.zeros(4 * layout.exact_values));
            let memory = WeightEffective {
                rows: rows.ptr(),
                source: source.ptr(),
                effective: effective.ptr(),
                exact: exact.ptr(),
                ..Zeroable::zeroed()
            };
            d.run(&weights::make_effective(d.precision, &all, how, memory));
            let (want, want_exact) = layout.effective(&stored, rounds);
            d.same16(&format!("effective weights of {slot:?}"), &effective, &want);
            d.same32("gains and buffers", &read(&exact), &want_exact, 0.0);

            // And as the twin's convolution sees them: the response to a one in each channel.
            cpu.make_effective(slot, how).unwrap();
            let id = table.find("linear.weight").unwrap();
            let identity: Vec<f32> = (0..136 * 136).map(|i| if i % 137 == 0 { 1.0 } else { 0.0 }).collect();
            let x = cpu.upload([1, 1, 136, 136], &identity);
            let y = cpu.conv(id, Operand::of(&x));
            let response = cpu.download(&y).unwrap();
            let transposed: Vec<f32> = (0..8 * 136).map(|i| response[i % 136 * 8 + i / 136]).collect();
            let first = layout.first[id.0];
            d.same32("the twin's linear layer", &d.read16(&effective)[first..first + 8 * 136], &transposed, d.bound());
        }
    });
}

// ---- preconditioning, loss ---------------------------------------------------------------------

/// Values with `c` channels as the U-Net writes them: padded to a multiple of 8, here with numbers that
/// must not matter.
fn padded(values: &[f32], c: usize) -> Vec<f32> {
    let width = c.next_multiple_of(8);
    let fill = |pixel: &[f32]| pixel.iter().copied().chain(vec![9.0; width - c]).collect::<Vec<_>>();
    values.chunks(c).flat_map(fill).collect()
}

fn without_padding(values: &[f32], c: usize) -> Vec<f32> {
    values.chunks(c.next_multiple_of(8)).flat_map(|pixel| pixel[..c].to_vec()).collect()
}

#[test]
fn preconditioning_and_loss() {
    let mut table = ParamTable::default();
    let gain_id = table.gain("out_gain".into());
    Bench::of(testbed::everywhere()).for_each(|d| {
        for shape in [[1, 1, 1, 4], [3, 7, 5, 3], [2, 8, 11, 4], [1, 17, 16, 4], [1, 2, 3, 9]] {
            let [n, h, w, c] = shape;
            let values = n * h * w * c;
            let mut cpu = Cpu::<f32>::for_training(&table, 0);
            cpu.set_param(Slot::Weight, gain_id, &[0.8]).unwrap();
            cpu.make_effective(Slot::Weight, Normalization::Eval).unwrap();
            let sigmas: Vec<f32> = (0..n).map(|i| 0.2 + 1.7 * i as f32).collect();
            let logvars: Vec<f32> = (0..n).map(|i| 0.4 - 0.5 * i as f32).collect();
            let (clean, noisy) = (normals(values, 91, 0.5), normals(values, 92, 1.0));
            let raw16 = d.narrow(&padded(&normals(values, 93, 1.0), c));
            let raw = without_padding(&d.widen(&raw16), c);

            let [x, sigma, logvar] = [d.upload(&noisy), d.upload(&sigmas), d.upload(&logvars)];
            let (raw_memory, gain) = (d.upload(&raw16), d.upload(&[0.8f32]));
            let [twin_x, twin_raw] = [&noisy, &raw].map(|values| cpu.upload(shape, values));
            let twin_sigma = cpu.upload([n, 1, 1, 1], &sigmas);
            let padding =
                |v: &[f32], c: usize| v.chunks(c.next_multiple_of(8)).all(|p| p[c..].iter().all(|&x| x == 0.0));
            // All images, and the first for each noise level.
            for images in [n, 1] {
                let some = &noisy[..values / n * images];
                let twin_x = cpu.upload([images, h, w, c], some);
                let same = cpu.upload(shape, &some.repeat(n / images));
                let out = d.empty([n, h, w, (c + 1).next_multiple_of(8)]);
                let memory = PrecondInput { x: x.ptr(), sigma: sigma.ptr(), out: out.ptr(), ..Zeroable::zeroed() };
                d.run([&precond::precond_input(d.precision, shape, images, 0.5, memory)]);
                let twin = cpu.precond_input(&twin_x, &twin_sigma, 0.5);
                let want = cpu.download(&twin).unwrap();
                let twin = cpu.precond_input(&same, &twin_sigma, 0.5);
                assert!(want == cpu.download(&twin).unwrap(), "{images} of {n} images in turn");
                let got = d.read16(&out);
                d.same32(&format!("precond_input {shape:?}"), &without_padding(&got, c + 1), &want, d.bound());
                assert!(padding(&got, c + 1), "the padding of precond_input is zero");

                let out = d.upload(&vec![f32::NAN; values]);
                let memory = PrecondOutput {
                    x: x.ptr(),
                    raw: raw_memory.ptr(),
                    sigma: sigma.ptr(),
                    gain: gain.ptr(),
                    out: out.ptr(),
                    ..Zeroable::zeroed()
                };
                d.run([&precond::precond_output(d.precision, shape, images, 0.5, memory)]);
                let twin = cpu.precond_output(&twin_x, &twin_raw, &twin_sigma, gain_id, 0.5);
                let want = cpu.download(&twin).unwrap();
                let twin = cpu.precond_output(&same, &twin_raw, &twin_sigma, gain_id, 0.5);
                assert!(want == cpu.download(&twin).unwrap(), "{images} of {n} images in turn");
                d.same32(&format!("precond_output {shape:?}"), &read(&out), &want, F32);
            }

            let (twin_clean, twin_logvar) = (cpu.upload(shape, &clean), cpu.upload([n, 1, 1, 1], &logvars));
            let twin = cpu.loss(LossInput {
                clean: &twin_clean,
                noisy: &twin_x,
                raw: &twin_raw,
                sigma: &twin_sigma,
                logvar: &twin_logvar,
                out_gain: gain_id,
                sigma_data: 0.5,
            });
            let grad_raw = d.empty([n, h, w, c.next_multiple_of(8)]);
            let [per_image, grad_logvar] = [0; 2].map(|_| d.zeros(4 * n));
            let (clean, grad_gain) = (d.upload(&clean), d.upload(&[100.0f32]));
            let partial = d.kernels.alloc(precond::loss_scratch(shape));
            let memory = LossParams {
                clean: clean.ptr(),
                noisy: x.ptr(),
                raw: raw_memory.ptr(),
                sigma: sigma.ptr(),
                logvar: logvar.ptr(),
                gain: gain.ptr(),
                grad_raw: grad_raw.ptr(),
                partial: partial.ptr(),
                per_image: per_image.ptr(),
                grad_logvar: grad_logvar.ptr(),
                grad_gain: grad_gain.ptr(),
                ..Zeroable::zeroed()
            };
            d.run(&precond::loss(d.precision, shape, 0.5, memory));
            d.same32(&format!("loss {shape:?}"), &read(&per_image), &cpu.download(&twin.per_image).unwrap(), F32);
            let want = cpu.download(&twin.grad_logvar).unwrap();
            d.same32(&format!("gradient of logvar {shape:?}"), &read(&grad_logvar), &want, F32);
            let got = d.read16(&grad_raw);
            let want = cpu.download(&twin.grad_raw).unwrap();
            d.same32(&format!("gradient of raw {shape:?}"), &without_padding(&got, c), &want, d.bound());
            assert!(padding(&got, c), "the padding of the gradient is zero");
            // Added to what was there.
            let want = 100.0 + cpu.param(Slot::Grad, gain_id).unwrap()[0];
            d.same32(&format!("gradient of the gain {shape:?}"), &read(&grad_gain), &[want], F32);
        }
    });
}

#[test]
fn logvar_and_its_gradient() {
    let mut table = ParamTable::default();
    let (freqs, phases) = table.fourier("fourier".into(), 136);
    let weight = table.linear("linear".into(), 136, 1);
    let layer = Logvar { freqs, phases, weight };
    Bench::of(testbed::everywhere()).for_each(|d| {
        let mut cpu = Cpu::<f32>::for_training(&table, 0);
        let frequencies: Vec<f32> = normals(136, 94, std::f32::consts::TAU);
        let offsets: Vec<f32> = (0..136).map(|i| std::f32::consts::TAU * i as f32 / 136.0).collect();
        let stored = normals(136, 95, 1.0);
        for (id, values) in [(freqs, &frequencies), (phases, &offsets), (weight, &stored)] {
            cpu.set_param(Slot::Weight, id, values).unwrap();
        }
        cpu.make_effective(Slot::Weight, Normalization::Eval).unwrap();
        let rms = (stored.iter().map(|x| x * x).sum::<f32>() / 136.0).sqrt();
        let effective: Vec<f32> = stored.iter().map(|x| x / (1e-4 + rms) / 136f32.sqrt()).collect();
        let [f, p, w] = [d.upload(&frequencies), d.upload(&offsets), d.upload(&d.narrow(&effective))];
        for n in [1, 3, 40] {
            let sigmas: Vec<f32> = (0..n).map(|i| 0.002 * 1.3f32.powi(i as i32)).collect();
            let sigma = d.upload(&sigmas);
            let (features, logvar) = (d.zeros(4 * 136 * n), d.zeros(4 * n));
            let memory = structs::Logvar {
                sigma: sigma.ptr(),
                freqs: f.ptr(),
                phases: p.ptr(),
                weight: w.ptr(),
                features: features.ptr(),
                logvar: logvar.ptr(),
                ..Zeroable::zeroed()
            };
            d.run([&precond::logvar(d.precision, n, 136, memory)]);
            let twin_sigma = cpu.upload([n, 1, 1, 1], &sigmas);
            let (twin_features, twin_logvar) = cpu.logvar(&layer, &twin_sigma);
            d.same32("Fourier features", &read(&features), &cpu.download(&twin_features).unwrap(), F32);
            // The weight is rounded to 16 bits.
            d.same32("logvar", &read(&logvar), &cpu.download(&twin_logvar).unwrap(), d.bound());

            let grads = normals(n, 96, 1.0);
            let start = accumulated(&mut cpu, weight);
            let (grad, out) = (d.upload(&grads), d.upload(&start));
            let memory = LogvarBackward {
                features: features.ptr(),
                grad: grad.ptr(),
                grad_weight: out.ptr(),
                ..Zeroable::zeroed()
            };
            d.run([&precond::logvar_backward(n, 136, memory)]);
            let twin_grad = cpu.upload([n, 1, 1, 1], &grads);
            cpu.logvar_backward(&layer, &twin_features, &twin_grad);
            d.same32("gradient of the logvar layer", &read(&out), &accumulated(&mut cpu, weight), F32);
        }
    });
}

/// What the twin has accumulated so far.
fn accumulated(cpu: &mut Cpu<f32>, id: ParamId) -> Vec<f32> {
    cpu.param(Slot::Grad, id).unwrap()
}
