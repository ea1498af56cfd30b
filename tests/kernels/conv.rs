//! The convolution kernels compute what their CPU twins compute, on random data, at sizes of the model
//! in miniature and odd ones, in f16 and bf16, on the emulator in every thread order and under all of its
//! checks, and on a GPU; and no ldmatrix of theirs meets a bank twice.
#![cfg(any(feature = "emulator", feature = "cuda"))]

use std::ops::Deref;
use std::rc::Rc;

use crate::testbed::{self, Both, Kernels, Memory, padded};
use bytemuck::Zeroable;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::conv::{
    ARRIVED_BYTES, BlockScales, ConvError, ConvInputs, ConvShape, Dgrad, Epilogue, Fprop, MainPath, Through, Wgrad,
};
use edm2k::backend::gpu::launch::{Accum, ConvLoop, DevicePtr, Launch, Math, Precision};
use edm2k::backend::gpu::structs::{ConvDgrad, ConvFprop, ConvWgrad};
use edm2k::backend::gpu::tiles::{Card, Chooser, Question, Tuned};
use edm2k::backend::{Backend, NetworkBackend, Operand, OperandGrad, Scale, Slot, TrainingBackend};
use edm2k::params::{ParamId, ParamTable, mp_sum_weights};

/// xorshift64*: values that differ from each other, the same in every run.
struct Random(u64);

impl Random {
    /// Uniform, of unit variance.
    fn float(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3f32.sqrt()
    }
}

/// What is common to all comparisons.
struct Bench {
    on: testbed::Bench,
    math: Math,
    by: Chooser,
    random: Random,
    /// Of tiles whose sums come in parts, one after the other.
    arrived: Memory,
}

impl Deref for Bench {
    type Target = testbed::Bench;

    fn deref(&self) -> &testbed::Bench {
        &self.on
    }
}

impl Both {
    fn at(&self) -> DevicePtr {
        self.memory.ptr()
    }
}

fn at(memory: &Memory) -> DevicePtr {
    memory.ptr()
}

impl Bench {
    fn new(kernels: Kernels, math: Math, card: Card) -> Self {
        let name = format!("{} {math:?}", kernels.name);
        let on = testbed::Bench { kernels, precision: math.precision, name };
        let arrived = on.upload(&[0u32; ARRIVED_BYTES / 4]);
        Self { on, math, by: card.into(), random: Random(0x9e37_79b9_7f4a_7c15), arrived }
    }

    /// Random values of this magnitude.
    fn random(&mut self, count: usize, channels: usize, magnitude: f32) -> Both {
        let values: Vec<f32> = (0..count).map(|_| self.random.float() * magnitude).collect();
        self.both(&values, channels)
    }

    fn room(&self, bytes: usize) -> Memory {
        self.kernels.alloc(bytes.max(16))
    }

    fn go(&self, launches: Result<Vec<Launch>, ConvError>) {
        self.run_loops(&launches.unwrap());
    }
}

/// A convolution of the test: real channels, not padded.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    h: usize,
    w: usize,
    ca: usize,
    cb: usize,
    cout: usize,
    taps: usize,
}

const fn case(n: usize, h: usize, w: usize, ca: usize, cb: usize, cout: usize, taps: usize) -> Case {
    Case { n, h, w, ca, cb, cout, taps }
}

/// The factors of mp_cat, where there are two inputs.
const CAT: (f64, f64) = (0.75, 1.375);

impl Case {
    fn shape(&self) -> ConvShape {
        let Case { n, h, w, ca, cb, cout, taps } = *self;
        ConvShape { n, h, w, ca: padded(ca), cb: padded(cb), cout: padded(cout), taps }
    }
    fn pixels(&self) -> usize {
        self.n * self.h * self.w
    }
    fn cin(&self) -> usize {
        self.ca + self.cb
    }
    fn tensor(&self, channels: usize) -> [usize; 4] {
        [self.n, self.h, self.w, channels]
    }
    fn scales(&self) -> (f64, f64) {
        if self.cb == 0 { (1.0, 1.0) } else { CAT }
    }
    /// Addresses of the inputs, and the factors that gradients get.
    fn inputs(&self, x: &Both, skip: &Both) -> ConvInputs {
        let (a, b) = self.scales();
        ConvInputs { x: x.at(), x_scale: a as f32, skip: (self.cb != 0).then(|| (skip.at(), b as f32)) }
    }
}

/// The CPU with one convolution; its weight on the device, [cout][taps][cin], padded, with the scales of the inputs in it;
/// and transposed with taps in reverse, without those scales.
fn with_weight(bench: &mut Bench, case: Case) -> (Cpu<f32>, ParamId, [Memory; 2]) {
    let Case { cout, taps, ca, .. } = case;
    let (cin, wide) = (case.cin(), padded(ca) + padded(case.cb));
    let mut table = ParamTable::default();
    let id = table.conv("conv".into(), cin, cout, if taps == 9 { 3 } else { 1 });
    let weight = bench.random(cout * taps * cin, 1, 1.0 / ((cin * taps) as f32).sqrt()).values;
    let mut torch = vec![0.0; weight.len()];
    let mut weights = [(); 2].map(|()| vec![0u16; padded(cout) * taps * wide]);
    let (a, b) = case.scales();
    for (i, &value) in weight.iter().enumerate() {
        let (co, tap, c) = (i / (taps * cin), i / cin % taps, i % cin);
        torch[(co * cin + c) * taps + tap] = value;
        let (c, scale) = if c < ca { (c, a) } else { (c - ca + padded(ca), b) };
        weights[0][(co * taps + tap) * wide + c] = bench.narrow(&[value * scale as f32])[0];
        weights[1][(c * taps + taps - 1 - tap) * padded(cout) + co] = bench.narrow(&[value])[0];
    }
    // Without `make_effective` what is written is what the convolution multiplies.
    let mut cpu = Cpu::for_sampling(&table);
    cpu.write_param(Slot::Weight, id, &torch).unwrap();
    (cpu, id, weights.map(|weight| bench.upload(&weight)))
}

fn mp_silu(x: f32) -> f32 {
    x / ((1.0 + (-x).exp()) * 0.596)
}

/// Every epilogue against `conv`, `conv_scale_silu` and `conv_mp_sum`.
fn check_fprop(bench: &mut Bench, case: Case) {
    let (mut cpu, id, [weight, _]) = with_weight(bench, case);
    let (pixels, cout) = (case.pixels(), case.cout);
    let (a, b) = case.scales();
    let x = bench.random(pixels * case.ca, case.ca, 1.0);
    let skip = bench.random(pixels * case.cb.max(1), case.cb.max(1), 1.0);
    let residual = bench.random(pixels * cout, cout, 1.0);
    let fprop = Fprop::new(case.shape(), bench.math, &bench.by).unwrap();
    let (y, extra) = (bench.room(pixels * padded(cout) * 2), bench.room(pixels * padded(cout) * 2));
    let scratch = bench.room(fprop.scratch_bytes());

    let x_cpu = cpu.upload(case.tensor(case.ca), &x.values);
    let skip_cpu = (case.cb != 0).then(|| cpu.upload(case.tensor(case.cb), &skip.values));
    let operand = Operand { x: &x_cpu, x_scale: a, skip: skip_cpu.as_ref().map(|s| (s, b)), silu: false };
    let inputs = (x.at(), (case.cb != 0).then(|| skip.at()));
    let memory = ConvFprop {
        weight: at(&weight),
        y: at(&y),
        partial: at(&scratch),
        arrived: at(&bench.arrived),
        ..Zeroable::zeroed()
    };
    let go = |bench: &Bench, epilogue, act| {
        bench.go(fprop.launch(inputs, epilogue, act, memory).map(|launch| vec![launch]));
    };

    // Nothing after it; and mp_silu of a multiple of it beside.
    go(bench, Epilogue::Gain(1.0), Some((at(&extra), 0.875)));
    let expected = cpu.conv(id, operand);
    bench.same_in_rows(&format!("conv {case:?}"), &y, expected.values(), cout);
    let activated: Vec<f32> = expected.values().iter().map(|&y| mp_silu(0.875 * y)).collect();
    bench.same_in_rows(&format!("activated conv {case:?}"), &extra, &activated, cout);

    // Scaled by the channels of one block of many, activated, with what comes before.
    let stride = padded(cout) + 24;
    let scales: Vec<f32> = (0..case.n * stride).map(|_| 1.0 + 0.5 * bench.random.float()).collect();
    let on_device = bench.upload(&scales);
    let scale = BlockScales { all: DevicePtr(at(&on_device).0 + 16 * 4), stride };
    let all = cpu.upload([case.n, 1, 1, stride], &scales);
    let (expected, pre) = cpu.conv_scale_silu(id, operand, Scale { all: &all, offset: 16 }, true);
    for wanted in [None, Some(at(&extra))] {
        go(bench, Epilogue::ScaleSilu { scale, pre: wanted }, None);
        bench.same_in_rows(&format!("conv_scale_silu {case:?}"), &y, expected.values(), cout);
    }
    bench.same_in_rows(&format!("its input {case:?}"), &extra, pre.unwrap().values(), cout);

    // mp_sum, clipped where it matters.
    let (wa, wb) = mp_sum_weights(0.3);
    let (wa, wb) = (wa as f32, wb as f32);
    go(bench, Epilogue::MpSum { main: MainPath::Tensor(residual.at()), wa, wb, clip: Some(1.5) }, None);
    let residual_cpu = cpu.upload(case.tensor(cout), &residual.values);
    let expected = cpu.conv_mp_sum(id, operand, &residual_cpu, 0.3, Some(1.5));
    bench.same_in_rows(&format!("conv_mp_sum {case:?}"), &y, expected.values(), cout);
}

/// Main paths: of the same two tensors, of others, or of one alone.
fn mains(case: Case) -> [Case; 4] {
    [(case.ca, case.cb), (padded(case.cin()), 64), (256, 128), (128, 0)].map(|(ca, cb)| Case {
        ca,
        cb,
        taps: 1,
        ..case
    })
}

/// `convs_mp_sum`: the main path reads the same two tensors, one of another width, or one alone.
fn check_onto(bench: &mut Bench, case: Case) {
    let (mut cpu, id, [weight, _]) = with_weight(bench, case);
    let x = bench.random(case.pixels() * case.ca, case.ca, 1.0);
    let skip = bench.random(case.pixels() * case.cb.max(1), case.cb.max(1), 1.0);
    let [y, extra] = [(); 2].map(|()| bench.room(case.pixels() * padded(case.cout) * 2));
    let cat = case.scales();
    let on_device = |case: &Case, x: &Both, skip: &Both| (x.at(), (case.cb != 0).then(|| skip.at()));
    for main in mains(case) {
        let (mut main_cpu, main_id, [main_weight, _]) = with_weight(bench, main);
        let main_x = bench.random(main.pixels() * main.ca, main.ca, 1.0);
        let main_skip = bench.random(main.pixels() * main.cb.max(1), main.cb.max(1), 1.0);
        let fprop = Fprop::and_main(case.shape(), main.shape(), bench.math, &bench.by).unwrap();
        let scratch = bench.room(fprop.scratch_bytes());
        let (wa, wb) = mp_sum_weights(0.3);
        let path = MainPath::Conv { inputs: on_device(&main, &main_x, &main_skip), weight: at(&main_weight) };
        let epilogue = Epilogue::MpSum { main: path, wa: wa as f32, wb: wb as f32, clip: Some(1.5) };
        let inputs = on_device(&case, &x, &skip);
        let act = Some((at(&extra), 0.875));
        let memory = ConvFprop {
            weight: at(&weight),
            y: at(&y),
            partial: at(&scratch),
            arrived: at(&bench.arrived),
            ..Zeroable::zeroed()
        };
        let launch = fprop.launch(inputs, epilogue, act, memory);
        bench.go(launch.map(|launch| vec![launch]));

        let upload = |cpu: &mut Cpu<f32>, case: &Case, x: &Both, skip: &Both| {
            let skip = (case.cb != 0).then(|| cpu.upload(case.tensor(case.cb), &skip.values));
            (cpu.upload(case.tensor(case.ca), &x.values), skip)
        };
        let (a, b) = upload(&mut main_cpu, &main, &main_x, &main_skip);
        let scales = main.scales();
        let operand = Operand { x: &a, x_scale: scales.0, skip: b.as_ref().map(|b| (b, scales.1)), silu: false };
        let onto = main_cpu.conv(main_id, operand);
        let (a, b) = upload(&mut cpu, &case, &x, &skip);
        let operand = Operand { x: &a, x_scale: cat.0, skip: b.as_ref().map(|b| (b, cat.1)), silu: false };
        let expected = cpu.conv_mp_sum(id, operand, &onto, 0.3, Some(1.5));
        bench.same_in_rows(&format!("convs_mp_sum {case:?} {main:?}"), &y, expected.values(), case.cout);
        let activated: Vec<f32> = expected.values().iter().map(|&y| mp_silu(0.875 * y)).collect();
        bench.same_in_rows(&format!("activated {case:?} {main:?}"), &extra, &activated, case.cout);
    }
}

/// `conv_dgrad` with and without mp_silu and accumulation, and `conv_dgrad_scale_silu`.
fn check_dgrad(bench: &mut Bench, case: Case) {
    let (mut cpu, id, [_, weight]) = with_weight(bench, case);
    let (pixels, ca, cb) = (case.pixels(), case.ca, case.cb);
    let (a, b) = case.scales();
    let x = bench.random(pixels * ca, ca, 1.0);
    let skip = bench.random(pixels * cb.max(1), cb.max(1), 1.0);
    let accs = [bench.random(pixels * ca, ca, 1.0), bench.random(pixels * cb.max(1), cb.max(1), 1.0)];
    let grad = bench.random(pixels * case.cout, case.cout, 1.0);
    let (gx, gskip) = (bench.room(pixels * padded(ca) * 2), bench.room(pixels * padded(cb) * 2));
    let grad_cpu = cpu.upload(case.tensor(case.cout), &grad.values);
    let x_cpu = cpu.upload(case.tensor(ca), &x.values);
    let skip_cpu = (cb != 0).then(|| cpu.upload(case.tensor(cb), &skip.values));
    let inputs = case.inputs(&x, &skip);

    let dgrad = Dgrad::new(case.shape(), false, bench.math, &bench.by).unwrap();
    let scratch = bench.room(dgrad.scratch_bytes());
    let plain = ConvDgrad {
        grad: grad.at(),
        turned: at(&weight),
        gx: at(&gx),
        gskip: at(&gskip),
        partial: at(&scratch),
        arrived: at(&bench.arrived),
        gain: 0.8,
        ..Zeroable::zeroed()
    };
    for (silu, accumulate) in [(false, false), (true, true), (false, true), (true, false)] {
        let through = if silu { Through::Silu } else { Through::Linear };
        let memory = match accumulate {
            true => ConvDgrad { acc_x: accs[0].at(), acc_skip: accs[1].at(), acc_factor: 0.625, ..plain },
            false => plain,
        };
        bench.go(dgrad.launches(inputs, through, memory));
        let operand = Operand { x: &x_cpu, x_scale: a, skip: skip_cpu.as_ref().map(|s| (s, b)), silu };
        let acc = accumulate.then(|| {
            let skip = (cb != 0).then(|| cpu.upload(case.tensor(cb), &accs[1].values));
            (OperandGrad { x: cpu.upload(case.tensor(ca), &accs[0].values), skip }, 0.625)
        });
        let expected = cpu.conv_dgrad(id, &grad_cpu, f64::from(0.8f32), operand, acc);
        bench.same_in_rows(&format!("conv_dgrad, silu {silu}, {case:?}"), &gx, expected.x.values(), ca);
        if let Some(expected) = expected.skip {
            bench.same_in_rows(&format!("conv_dgrad of skip, silu {silu}, {case:?}"), &gskip, expected.values(), cb);
        }
    }
    if cb != 0 {
        return;
    }

    let dgrad = Dgrad::new(case.shape(), true, bench.math, &bench.by).unwrap();
    let scratch = bench.room(dgrad.scratch_bytes());
    let stride = padded(ca) + 24;
    let scales: Vec<f32> = (0..case.n * stride).map(|_| 1.0 + 0.5 * bench.random.float()).collect();
    let (on_device, grads) = (bench.upload(&scales), bench.upload(&vec![0.0; scales.len()]));
    let scale = BlockScales { all: DevicePtr(at(&on_device).0 + 16 * 4), stride };
    let through = Through::ScaleSilu { scale, scale_grad: DevicePtr(at(&grads).0 + 16 * 4) };
    bench.go(dgrad.launches(inputs, through, ConvDgrad { partial: at(&scratch), ..plain }));
    let all = cpu.upload([case.n, 1, 1, stride], &scales);
    let mut grads_cpu = cpu.zero_scales_grad(&all);
    let scale = Scale { all: &all, offset: 16 };
    let expected = cpu.conv_dgrad_scale_silu(id, &grad_cpu, f64::from(0.8f32), &x_cpu, scale, &mut grads_cpu);
    bench.same_in_rows(&format!("conv_dgrad_scale_silu {case:?}"), &gx, expected.values(), ca);
    let mut found = vec![0.0f32; scales.len()];
    grads.download(0, &mut found);
    bench.same(&format!("gradient of the scales {case:?}"), &found, grads_cpu.values());
}

/// `conv_wgrad`, twice: the second call adds to the first.
fn check_wgrad(bench: &mut Bench, case: Case) {
    let Case { cout, taps, ca, .. } = case;
    let (cin, wide) = (case.cin(), padded(case.ca) + padded(case.cb));
    let mut table = ParamTable::default();
    let id = table.conv("conv".into(), cin, cout, if taps == 9 { 3 } else { 1 });
    let mut cpu: Cpu<f32> = Cpu::for_training(&table, 0);
    let (a, b) = case.scales();
    let wgrad = Wgrad::new(case.shape(), bench.math, &bench.by).unwrap();
    let dw = bench.upload(&vec![0.0; padded(cout) * taps * wide]);
    let scratch = bench.room(wgrad.scratch_bytes());
    for gain in [0.8, -1.5f32] {
        let x = bench.random(case.pixels() * ca, ca, 1.0);
        let skip = bench.random(case.pixels() * case.cb.max(1), case.cb.max(1), 1.0);
        let grad = bench.random(case.pixels() * cout, cout, 1.0);
        let memory = ConvWgrad { grad: grad.at(), dw: at(&dw), partial: at(&scratch), gain, ..Zeroable::zeroed() };
        bench.go(wgrad.launches(case.inputs(&x, &skip), memory));
        let x_cpu = cpu.upload(case.tensor(ca), &x.values);
        let skip_cpu = (case.cb != 0).then(|| cpu.upload(case.tensor(case.cb), &skip.values));
        let operand = Operand { x: &x_cpu, x_scale: a, skip: skip_cpu.as_ref().map(|s| (s, b)), silu: false };
        let grad_cpu = cpu.upload(case.tensor(cout), &grad.values);
        cpu.conv_wgrad(id, operand, &grad_cpu, f64::from(gain));
    }
    let mut found = vec![0.0f32; padded(cout) * taps * wide];
    dw.download(0, &mut found);
    let torch = cpu.read_param(Slot::Grad, id).unwrap();
    let (mut found_real, mut expected) = (Vec::new(), Vec::new());
    for (i, &value) in torch.iter().enumerate() {
        let (co, c, tap) = (i / (cin * taps), i / taps % cin, i % taps);
        let c = if c < ca { c } else { c - ca + padded(ca) };
        found_real.push(found[(co * taps + tap) * wide + c]);
        expected.push(value);
    }
    bench.same(&format!("conv_wgrad {case:?}"), &found_real, &expected);
}

/// Odd ones, and the model's in miniature: small maps, two inputs, 5 channels in, 4 out. Channels in multiples of 64
/// and others take different ways to the same result.
const CASES: &[Case] = &[
    case(1, 1, 1, 8, 0, 8, 9),
    case(3, 1, 1, 136, 0, 8, 1),
    case(150, 1, 1, 16, 0, 24, 1),
    case(3, 7, 5, 24, 16, 40, 9),
    case(1, 7, 5, 136, 8, 72, 1),
    case(2, 6, 5, 24, 56, 80, 1),
    case(3, 8, 11, 136, 0, 136, 9),
    case(1, 11, 8, 64, 64, 64, 9),
    case(2, 5, 3, 128, 64, 192, 9),
    case(1, 9, 7, 192, 128, 64, 1),
    case(3, 8, 11, 64, 0, 128, 9),
    case(1, 1, 40, 16, 0, 24, 9),
    case(1, 40, 1, 64, 0, 64, 9),
    case(2, 22, 16, 5, 0, 64, 9),
    case(2, 22, 16, 64, 0, 4, 9),
];

/// Few multiprocessors: large tiles, whole sums. Many: small tiles, split sums.
const CARDS: [Card; 3] = [card_of(1), card_of(128), card_of(8)];

const fn card_of(sms: usize) -> Card {
    Card::new(sms, 90)
}

/// Every loop and type.
const MATHS: [Math; 5] = [
    math(Precision::F16, Accum::F32, ConvLoop::Mma),
    math(Precision::Bf16, Accum::F32, ConvLoop::Mma),
    math(Precision::F16, Accum::F16x2, ConvLoop::Mma),
    math(Precision::F16, Accum::F32, ConvLoop::Wgmma),
    math(Precision::Bf16, Accum::F32, ConvLoop::Wgmma),
];

const fn math(precision: Precision, accum: Accum, conv_loop: ConvLoop) -> Math {
    Math { precision, accum: Some(accum), conv_loop: Some(conv_loop) }
}

fn for_all(check: fn(&mut Bench, Case)) {
    for device in testbed::once() {
        for math in MATHS {
            for card in CARDS {
                let mut bench = Bench::new(device.clone(), math, card);
                CASES.iter().for_each(|&case| check(&mut bench, case));
            }
        }
    }
}

#[test]
fn forward_is_the_twins() {
    for_all(check_fprop);
}

/// Images of more than 2^14 pixels are told apart in another way than smaller ones.
#[test]
fn rows_of_a_tile_are_of_the_right_one_of_two_large_images() {
    for device in testbed::once() {
        let mut bench = Bench::new(device, Precision::F16.into(), card_of(40));
        check_fprop(&mut bench, case(2, 129, 129, 8, 0, 8, 1));
    }
}

#[test]
fn two_convolutions_are_the_twins() {
    for_all(check_onto);
}

#[test]
fn input_gradient_is_the_twins() {
    for_all(check_dgrad);
}

#[test]
fn weight_gradient_is_the_twins() {
    for_all(check_wgrad);
}

/// Checks with each of the candidates of these products in turn.
fn check_all(bench: &mut Bench, questions: &[Question], check: fn(&mut Bench, Case), case: Case) {
    let card = bench.by.card;
    let candidates: Vec<_> = questions.iter().map(|question| (*question, question.candidates(card))).collect();
    for round in 0..candidates.iter().map(|(_, all)| all.len()).max().unwrap() {
        let choices = candidates.iter().map(|(question, all)| (*question, all[round.min(all.len() - 1)]));
        bench.by.tuned = Some(Rc::new(Tuned::from_iter(choices)));
        for (question, all) in &candidates {
            assert_eq!(bench.by.choose(question), all[round.min(all.len() - 1)]);
        }
        check(bench, case);
    }
    bench.by.tuned = None;
}

/// Whatever `edm2k tune` may choose is right: every tile, and every number of parts of a sum.
#[test]
fn every_choice_that_is_tried_is_the_twins() {
    let mut splits = std::collections::BTreeSet::new();
    // Each math meets two of the shapes, as each takes seconds. Hopper's loop takes whole steps of channels only, so the first
    // shape is for the others.
    let met = [[0, 1], [2, 3], [0, 3], [1, 2], [3, 1]];
    for device in testbed::once() {
        for (math, met) in MATHS.into_iter().zip(met) {
            let mut bench = Bench::new(device.clone(), math, card_of(40));
            let cases = [
                case(1, 8, 11, 136, 0, 136, 9),
                case(1, 5, 3, 128, 64, 128, 9),
                case(1, 19, 13, 64, 0, 72, 1),
                // Tiles of several images, each with sums of its own for the gradient of its scales.
                case(3, 5, 3, 64, 0, 128, 9),
            ];
            for case in met.map(|i| cases[i]) {
                let (shape, by) = (case.shape(), bench.by.clone());
                let fprop = Fprop::new(shape, math, &by).unwrap().question();
                let onto = mains(case).map(|main| Fprop::and_main(shape, main.shape(), math, &by).unwrap().question());
                let mut dgrads = vec![Dgrad::new(shape, false, math, &by).unwrap().question()];
                dgrads.extend(Dgrad::new(shape, true, math, &by).map(|scaled| scaled.question()));
                let wgrad = Wgrad::new(shape, math, &by).unwrap().question();
                for question in onto.iter().chain(&dgrads).chain([&fprop, &wgrad]) {
                    let candidates = question.candidates(by.card);
                    assert_eq!(candidates[0], by.choose(question), "the model's is among them");
                    splits.extend(candidates.iter().map(|choice| choice.splits));
                }
                check_all(&mut bench, &[fprop], check_fprop, case);
                check_all(&mut bench, &onto, check_onto, case);
                check_all(&mut bench, &dgrads, check_dgrad, case);
                check_all(&mut bench, &[wgrad], check_wgrad, case);
            }
        }
    }
    assert!(splits.len() > 5, "{splits:?}");
}

#[test]
fn any_thread_order_and_all_checks_pass() {
    for device in testbed::every_order() {
        for (card, math) in [(CARDS[0], MATHS[0]), (CARDS[1], MATHS[2]), (CARDS[0], MATHS[3]), (CARDS[1], MATHS[3])] {
            let mut bench = Bench::new(device.clone(), math, card);
            for case in [case(1, 3, 5, 24, 16, 24, 9), case(2, 1, 3, 64, 64, 72, 9), case(3, 1, 3, 136, 0, 8, 1)] {
                check_fprop(&mut bench, case);
                check_onto(&mut bench, case);
                check_dgrad(&mut bench, case);
                check_wgrad(&mut bench, case);
            }
        }
    }
}

#[cfg(feature = "emulator")]
#[test]
fn every_instance_exists_and_is_chosen_for_some_shape() {
    use edm2k::backend::gpu::emulated::{Build, Emulator};
    let exported = Emulator::new(Build::Normal).unwrap().kernels();
    let mut chosen = std::collections::BTreeSet::new();
    let mut large =
        [(128, 128), (128, 4), (4, 128), (256, 256)].map(|(ca, cout)| case(1, 64, 64, ca, 0, cout, 9)).to_vec();
    large.push(case(4, 64, 64, 256, 0, 256, 9));
    for sms in [1, 2, 8, 16, 128] {
        let card = Card::new(sms, 90);
        for case in CASES.iter().chain(&large) {
            for math in MATHS {
                let shape = case.shape();
                chosen.insert(Fprop::new(shape, math, card).unwrap().kernel());
                chosen.insert(Dgrad::new(shape, false, math, card).unwrap().kernel());
                chosen.insert(Wgrad::new(shape, math, card).unwrap().kernel());
            }
        }
    }
    let product = |name: &&String| {
        let kinds = ["conv_fprop_", "conv_dgrad_", "conv_wgrad_", "hopper_fprop_", "hopper_dgrad_", "hopper_wgrad_"];
        kinds.iter().any(|kind| name.starts_with(kind))
            && name
                .rsplit('_')
                .next()
                .is_some_and(|tile| tile.split_once('x').is_some_and(|(m, _)| m.parse::<u32>().is_ok()))
    };
    let instances: Vec<_> = exported.iter().filter(product).collect();
    assert_eq!(chosen.iter().collect::<Vec<_>>(), instances);
}

#[test]
fn what_the_kernels_cannot_do_is_refused() {
    let good = ConvShape { n: 1, h: 8, w: 8, ca: 8, cb: 0, cout: 8, taps: 9 };
    let card = CARDS[0];
    for bad in [
        ConvShape { ca: 5, ..good },
        ConvShape { cout: 0, ..good },
        ConvShape { taps: 4, ..good },
        ConvShape { n: 1 << 30, ..good },
    ] {
        let error = Fprop::new(bad, Precision::F16.into(), card).unwrap_err();
        assert_eq!(error.shape, bad, "{error}");
    }
    let scaled = Dgrad::new(good, true, Precision::F16.into(), card).unwrap();
    let scale = BlockScales { all: DevicePtr(16), stride: 8 };
    let through = Through::ScaleSilu { scale, scale_grad: DevicePtr(16) };
    let memory = ConvDgrad { acc_x: DevicePtr(16), ..Zeroable::zeroed() };
    for (x_scale, memory) in [(1.0, memory), (0.5, Zeroable::zeroed())] {
        let inputs = ConvInputs { x: DevicePtr(16), x_scale, skip: None };
        let error = scaled.launches(inputs, through, memory).unwrap_err();
        assert!(error.what.contains("no other factor"), "{error}");
    }
    let modulated = Fprop::new(good, Precision::F16.into(), card).unwrap();
    let act = Some((DevicePtr(16), 1.0));
    let epilogue = Epilogue::ScaleSilu { scale, pre: None };
    let error = modulated.launch((DevicePtr(16), None), epilogue, act, Zeroable::zeroed()).unwrap_err();
    assert!(error.what.contains("no other beside it"), "{error}");
    let two = Fprop::new(ConvShape { cb: 8, ..good }, Precision::F16.into(), card).unwrap();
    let none = DevicePtr::NULL;
    let error = two.launch((none, None), Epilogue::Gain(1.0), None, Zeroable::zeroed()).unwrap_err();
    assert!(error.what.contains("a second input"), "{error}");
    let refused =
        |conv: &Fprop, epilogue| conv.launch((none, None), epilogue, None, Zeroable::zeroed()).unwrap_err().what;
    let onto = |wa| {
        let main = MainPath::Conv { inputs: (none, None), weight: none };
        Epilogue::MpSum { main, wa, wb: 1.0, clip: None }
    };
    let one = Fprop::new(good, Precision::F16.into(), card).unwrap();
    let main = Fprop::and_main(good, ConvShape { taps: 1, ..good }, Precision::F16.into(), card).unwrap();
    assert!(refused(&main, Epilogue::Gain(1.0)).contains("of the main path and called without"));
    assert!(refused(&one, onto(1.0)).contains("or the reverse"));
    assert!(refused(&main, onto(0.0)).contains("does not count"));
    for bad in [good, ConvShape { taps: 1, cout: 16, ..good }] {
        let error = Fprop::and_main(good, bad, Precision::F16.into(), card).unwrap_err();
        assert!(error.shape == bad && error.what.contains("not of one tap"), "{error}");
    }
}
