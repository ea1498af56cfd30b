//! The codecs' kernels compute what their CPU twins compute, on random data, odd sizes included, in f16 and bf16, on
//! the emulator in every thread order and under all of its checks, and on a GPU; whole autoencoders on the engine; and
//! the memory of a decode.
#![cfg(any(feature = "emulator", feature = "cuda"))]

use std::ops::Deref;
use std::rc::Rc;

use crate::common::close::assert_close;
use crate::common::normals::normals;
use crate::testbed::{self, Both, Kernels, Memory, PRECISIONS, padded};
use bytemuck::Zeroable;
use edm2k::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::codec::{self, ShapeError};
use edm2k::backend::gpu::engine::Gpu;
use edm2k::backend::gpu::launch::{ConvLoop, DevicePtr, Math, Precision};
use edm2k::backend::gpu::runtime::Imagined;
use edm2k::backend::gpu::structs::{CodecConv, CodecNorm};
use edm2k::backend::gpu::tiles::{Card, Chooser, Tuned};
use edm2k::backend::{Backend, Shape};
use edm2k::codec::{self as codecs, Decoder};
use edm2k::pictures::Picture;
use edm2k::rng::{Purpose, Stream};

fn card_of(sms: usize) -> Chooser {
    Card::new(sms, 90).into()
}

const REACHES: [Reach; 5] = [Reach::Point, Reach::Same, Reach::Double, Reach::Down, Reach::Halve];

/// Kernels, and the CPU.
struct Bench {
    on: testbed::Bench,
    /// Few multiprocessors make large tiles, many small ones.
    by: Chooser,
    cpu: Cpu<f32, ()>,
    seed: u64,
}

impl Deref for Bench {
    type Target = testbed::Bench;

    fn deref(&self) -> &testbed::Bench {
        &self.on
    }
}

impl Bench {
    fn new(on: testbed::Bench) -> Self {
        Self { on, by: card_of(1), cpu: Cpu::for_codec(), seed: 0 }
    }

    fn normals(&mut self, count: usize) -> Vec<f32> {
        self.seed += 1;
        normals(count, self.seed, 1.0)
    }

    fn random(&mut self, shape: Shape) -> Both {
        let values = self.normals(shape.iter().product());
        self.both(&values, shape[3])
    }

    fn room(&self, shape: Shape) -> Memory {
        self.kernels.alloc(shape[..3].iter().product::<usize>() * padded(shape[3]) * 2)
    }

    /// A convolution of x [n, h, w, cin], with and without all that may follow.
    fn convolve(&mut self, reach: Reach, shape: Shape, cout: usize) {
        let [_, _, _, cin] = shape;
        let side = reach.side();
        let x = self.random(shape);
        // Weights whose sums over an enlarged pixel's taps are exact in both types: what is tested is the kernel.
        let fan_in = (cin * side * side) as f32;
        let weight = self.normals(cout * cin * side * side);
        let weight: Vec<f32> = weight.iter().map(|x| (x * 8.0).round().clamp(-31.0, 31.0) / 8.0).collect();
        let bias: Vec<f32> = self.normals(cout).iter().map(|x| x * fan_in.sqrt()).collect();
        let packed = self.upload(&codec::pack(self.precision, reach, cin, &weight));
        let mut wide = bias.clone();
        wide.resize(padded(cout), 0.0);
        let on_device = self.upload(&wide);

        let conv = self.cpu.load_conv(reach, cin, &weight, Some(&bias));
        let tx = self.cpu.upload(shape, &x.values);
        for after in 0..3 {
            let plain = self.cpu.convolve(&conv, &tx, Prologue::Nothing, Epilogue::NOTHING);
            let out = self.cpu.shape(&plain);
            let (add, relu) = (after == 2, after > 0);
            let values: Vec<f32> = self.normals(out.iter().product()).iter().map(|x| x * fan_in.sqrt()).collect();
            let residual = self.both(&values, cout);
            let tr = add.then(|| self.cpu.upload(out, &residual.values));
            let want = self.cpu.convolve(&conv, &tx, Prologue::Nothing, Epilogue { residual: tr, relu });
            let want = self.cpu.download(&want).unwrap();
            let what = format!("{reach:?} of {shape:?} to {cout}, {after}");
            for conv_loop in [ConvLoop::Mma, ConvLoop::Wgmma] {
                let math = Math { conv_loop: Some(conv_loop), ..self.precision.into() };
                let run = |residual: DevicePtr, y: &Memory| {
                    let memory = CodecConv {
                        x: x.memory.ptr(),
                        weight: packed.ptr(),
                        bias: on_device.ptr(),
                        residual,
                        y: y.ptr(),
                        relu: relu.into(),
                        ..Zeroable::zeroed()
                    };
                    let launches = codec::convolve(math, &self.by, reach, shape, cout, memory);
                    self.run_loops(&launches.unwrap());
                };
                let y = self.room(out);
                run(if add { residual.memory.ptr() } else { DevicePtr::NULL }, &y);
                self.same_in_rows(&format!("{what}, {conv_loop:?}"), &y, &want, cout);
                if add {
                    let residual = self.both(&values, cout);
                    run(residual.memory.ptr(), &residual.memory);
                    self.same_in_rows(&format!("{what}, {conv_loop:?}, in place"), &residual.memory, &want, cout);
                }
            }
        }
    }

    /// What becomes of an input, through a 1x1 convolution by one on the CPU.
    fn normalise(&mut self, shape: Shape) {
        let [n, _, _, c] = shape;
        let x = self.random(shape);
        let affine = self.normals(n * 2 * c);
        let on_device = self.upload(&affine);
        let one: Vec<f32> = (0..c * c).map(|i| if i / c == i % c { 1.0 } else { 0.0 }).collect();
        let conv = self.cpu.load_conv(Reach::Point, c, &one, None);
        let (tx, ta) = (self.cpu.upload(shape, &x.values), self.cpu.upload([n, 1, 2, c], &affine));
        let at = on_device.ptr();
        let all = [
            ("affine", Prologue::Affine(&ta), Prologue::Affine(&at)),
            ("affine and silu", Prologue::AffineSilu(&ta), Prologue::AffineSilu(&at)),
            ("soft clip", Prologue::SoftClip, Prologue::SoftClip),
        ];
        for (what, on_cpu, before) in all {
            let want = self.cpu.convolve(&conv, &tx, on_cpu, Epilogue::NOTHING);
            let want = self.cpu.download(&want).unwrap();
            let y = self.room(shape);
            let launch = codec::normalise(self.precision, shape, x.memory.ptr(), before, y.ptr()).unwrap();
            self.run_loops([&launch.unwrap()]);
            self.same_in_rows(&format!("{what} of {shape:?}"), &y, &want, c);
        }
    }

    /// Scale and shift of a group norm of values about `mean`.
    fn group_norm(&mut self, shape: Shape, groups: usize, mean: f32) {
        let [n, _, _, c] = shape;
        let values: Vec<f32> = self.normals(shape.iter().product()).iter().map(|x| x + mean).collect();
        let x = self.both(&values, c);
        let affine = self.normals(2 * c);
        let (on_device, scales) = (self.upload(&affine), self.kernels.alloc(n * 2 * c * 4));
        let scratch = self.kernels.alloc(codec::group_norm_scratch(shape));
        let eps = 1e-6;
        let memory = CodecNorm {
            x: x.memory.ptr(),
            affine: on_device.ptr(),
            sums: scratch.ptr(),
            scales: scales.ptr(),
            ..Zeroable::zeroed()
        };
        // Sums of one channel, by a thread each, may meet banks twice.
        self.run(&codec::group_norm(self.precision, shape, groups, eps, memory).unwrap());
        let mut found = vec![0.0f32; n * 2 * c];
        scales.download(0, &mut found);
        let (tx, ta) = (self.cpu.upload(shape, &x.values), self.cpu.upload([1, 1, 2, c], &affine));
        let want = self.cpu.group_norm(&tx, &ta, groups, eps);
        let want = self.cpu.download(&want).unwrap();
        // Sums of f32 on both sides: eps of the mean, which the deviation of 1 makes one of the shift.
        let what = format!("group norm of {shape:?} in {groups}, {}", self.name);
        assert_close(&what, &found, &want, 2e-6 * f64::from(1.0 + mean.abs()));
    }

    fn attention(&mut self, [n, h, w, c]: Shape, strength: f32) {
        let values: Vec<f32> = self.normals(n * h * w * 3 * c).iter().map(|x| x * strength).collect();
        let qkv = self.both(&values, 3 * c);
        let tensor = self.cpu.upload([n, h, w, 3 * c], &qkv.values);
        let want = self.cpu.self_attention(&tensor);
        let want = self.cpu.download(&want).unwrap();
        let out = self.room([n, h, w, c]);
        let launch = codec::self_attention(self.precision, [n, h, w, c], qkv.memory.ptr(), out.ptr()).unwrap();
        self.run_loops([&launch]);
        self.same_in_rows(&format!("attention of {:?} by {strength}", [n, h, w, c]), &out, &want, c);
    }
}

impl Bench {
    /// A picture of values about [0, 1] in 8 bits, which is the CPU's to the bit; and whether one that is no finite number
    /// is noticed, in the first and the last place.
    fn bytes(&mut self, [n, h, w]: [usize; 3], stretch: [f32; 2]) {
        let count = n * h * w * 3;
        let mut values: Vec<f32> = self.normals(count).iter().map(|x| 0.5 + 0.4 * x).collect();
        // Where the bytes change, and where they stop.
        for (value, i) in values.iter_mut().zip(0..768).skip(3) {
            *value = (i as f32 / 3.0 - stretch[1]) / 255.0 / stretch[0];
        }
        let mut spoil = vec![None, Some((0, f32::NAN)), Some((count - 1, f32::INFINITY))];
        spoil.push(Some((count / 2, f32::NEG_INFINITY)));
        for spoilt in spoil {
            let mut values = values.clone();
            if let Some((at, value)) = spoilt {
                values[at] = value;
            }
            let x = self.both(&values, 3);
            let tensor = self.cpu.upload([n, h, w, 3], &x.values);
            let (want, finite) = self.cpu.download_rgb(&tensor, stretch).unwrap();
            assert_eq!(finite, spoilt.is_none());
            let pixels = n * h * w;
            let [words, blocks] = codec::bytes_words(pixels);
            let to = self.kernels.alloc(4 * (words + blocks));
            self.run_loops([&codec::bytes(self.precision, pixels, x.memory.ptr(), stretch, to.ptr())]);
            let mut got = vec![0u8; 4 * (words + blocks)];
            to.download(0, &mut got);
            let what = format!("{n} pictures of {h}x{w} in bytes, {stretch:?}, {spoilt:?}");
            assert_eq!(got[..count], want, "{what}");
            assert_eq!(got[4 * words..].iter().all(|&x| x == 0), finite, "{what}");
        }
    }
}

/// Every device in both types.
fn benches(devices: Vec<Kernels>) -> impl Iterator<Item = Bench> {
    testbed::Bench::of(devices).map(Bench::new)
}

/// The emulator's orders and builds, each type in every build: 6 instead of 12.
fn checked() -> impl Iterator<Item = Bench> {
    let kinds = testbed::every_order().into_iter().enumerate();
    kinds.map(|(i, device)| Bench::new(testbed::Bench::new(device, PRECISIONS[(i + i / 3) % 2])))
}

#[test]
fn convolutions_of_every_reach() {
    for mut bench in benches(testbed::once()) {
        for (reach, sms) in REACHES.into_iter().flat_map(|reach| [(reach, 1), (reach, 500)]) {
            bench.by = card_of(sms);
            // The first and last layers' channels, odd ones, several tiles each way, several images.
            bench.convolve(reach, [1, 2, 2, 3], 8);
            bench.convolve(reach, [2, 6, 10, 4], 136);
            bench.convolve(reach, [1, 12, 14, 40], 3);
            bench.convolve(reach, [3, 10, 4, 64], 72);
            bench.convolve(reach, [2, 12, 14, 128], 264);
        }
        bench.convolve(Reach::Same, [2, 1, 1, 5], 9);
        bench.convolve(Reach::Double, [1, 7, 5, 8], 24);
        bench.convolve(Reach::Point, [1, 11, 8, 512], 17);
    }
}

/// Whatever `edm2k tune` may choose is right.
#[test]
fn convolutions_by_every_tile_that_is_tried() {
    for mut bench in benches(testbed::once()) {
        for reach in REACHES {
            for (shape, cout) in [([2, 6, 10, 4], 136), ([3, 10, 4, 64], 72)] {
                let card = bench.by.card;
                let maths = [ConvLoop::Mma, ConvLoop::Wgmma]
                    .map(|conv_loop| Math { conv_loop: Some(conv_loop), ..bench.precision.into() });
                let questions = maths.map(|math| codec::question(math, card, reach, shape, cout));
                let rounds = questions.map(|question| question.candidates(card).len()).into_iter().max().unwrap();
                assert!(rounds > 1);
                for round in 0..rounds {
                    let nth = |candidates: Vec<_>| candidates[round.min(candidates.len() - 1)];
                    let choices = questions.map(|question| (question, nth(question.candidates(card))));
                    assert!(choices.iter().all(|(_, choice)| choice.splits == 1), "the kernels know no parts");
                    bench.by.tuned = Some(Rc::new(Tuned::from_iter(choices)));
                    bench.convolve(reach, shape, cout);
                }
                bench.by.tuned = None;
            }
        }
    }
}

#[test]
fn inputs_on_their_way() {
    for mut bench in benches(testbed::once()) {
        for shape in [[1, 1, 1, 3], [3, 5, 7, 4], [2, 8, 11, 64], [2, 3, 5, 17]] {
            bench.normalise(shape);
        }
    }
}

#[test]
fn group_norms() {
    for mut bench in benches(testbed::once()) {
        bench.group_norm([2, 8, 11, 128], 32, 0.0);
        bench.group_norm([1, 1, 1, 32], 4, 0.0);
        bench.group_norm([3, 7, 5, 24], 3, 2.0);
        bench.group_norm([1, 16, 22, 512], 32, -1.0);
        bench.group_norm([1, 9, 9, 36], 6, 0.0);
        // More chunks than fit one size, the last one short; a mean that would cancel if squared.
        bench.group_norm([1, 257, 259, 8], 1, 100.0);
        bench.group_norm([1, 9, 9, 16], 16, 1000.0);
    }
}

#[test]
fn attention_of_any_width_and_number_of_pixels() {
    for mut bench in benches(testbed::once()) {
        bench.attention([1, 1, 1, 8], 1.0);
        bench.attention([3, 5, 7, 32], 1.0);
        bench.attention([1, 9, 11, 136], 1.0);
        bench.attention([2, 8, 11, 512], 1.0);
        bench.attention([1, 8, 8, 128], 1.0);
        // Scores far apart: the running maximum moves, probabilities are near 0 and 1.
        bench.attention([1, 5, 13, 64], 4.0);
    }
}

#[test]
fn pictures_in_bytes() {
    for mut bench in benches(testbed::once()) {
        for (size, stretch) in [([1, 1, 1], [1.0, 0.0]), ([2, 5, 7], [2.0, -1.0]), ([1, 33, 41], [1.0, 0.0])] {
            bench.bytes(size, stretch);
        }
    }
}

#[test]
fn any_thread_order_no_races_no_unwritten_reads_nothing_out_of_bounds() {
    for mut bench in checked() {
        for reach in REACHES {
            bench.convolve(reach, [2, 4, 6, 3], 9);
            bench.by = card_of(500);
            bench.convolve(reach, [1, 6, 2, 40], 24);
            bench.convolve(reach, [1, 4, 6, 64], 72);
            bench.by = card_of(1);
        }
        bench.convolve(Reach::Same, [1, 6, 4, 8], 136);
        bench.normalise([2, 3, 5, 17]);
        bench.normalise([2, 1, 3, 16]);
        bench.group_norm([2, 9, 9, 40], 5, 1.0);
        bench.group_norm([1, 3, 2, 264], 33, 1.0);
        for c in [40, 200, 512] {
            bench.attention([2, 5, 7, c], 1.0);
        }
        bench.attention([1, 7, 11, 8], 1.0);
        bench.bytes([1, 33, 35], [1.0, 0.0]);
    }
}

#[test]
fn the_same_bits_in_every_run() {
    for device in testbed::once() {
        let mut bench = Bench::new(testbed::Bench::new(device, Precision::F16));
        let shape = [1, 33, 40, 64];
        let (x, affine) = (bench.random(shape), bench.normals(128));
        let at = bench.upload(&affine);
        let run = |device: &Kernels| {
            let (scales, scratch) = (device.alloc(128 * 4), device.alloc(codec::group_norm_scratch(shape)));
            let memory = CodecNorm {
                x: x.memory.ptr(),
                affine: at.ptr(),
                sums: scratch.ptr(),
                scales: scales.ptr(),
                ..Zeroable::zeroed()
            };
            for launch in codec::group_norm(Precision::F16, shape, 32, 1e-6, memory).unwrap() {
                // SAFETY: every address is of memory as large as the call's documentation says.
                unsafe { device.run(&launch) };
            }
            let mut found = vec![0u32; 128];
            scales.download(0, &mut found);
            found
        };
        assert_eq!(run(&bench.kernels), run(&bench.kernels.otherwise()));
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let (p, null) = (Precision::F16, DevicePtr::NULL);
    let attention = |c| codec::self_attention(p, [1, 2, 2, c], null, null).unwrap_err().to_string();
    assert_eq!(attention(12), "self-attention of 12 channels, expected a multiple of 8 up to 512");
    assert_eq!(codec::self_attention(p, [1, 2, 2, 520], null, null).unwrap_err(), ShapeError::Width(520));
    let conv =
        |reach, shape| codec::convolve(p.into(), Card::new(1, 90), reach, shape, 8, Zeroable::zeroed()).unwrap_err();
    assert_eq!(conv(Reach::Down, [1, 3, 4, 8]), ShapeError::Odd([1, 3, 4, 8]));
    assert_eq!(conv(Reach::Double, [1, 20000, 4, 8]), ShapeError::Shape([1, 40000, 8, 8]));
    assert_eq!(conv(Reach::Same, [1, 0, 4, 8]), ShapeError::Shape([1, 0, 4, 8]));
    let norm = codec::group_norm(p, [1, 2, 2, 30], 32, 1e-6, Zeroable::zeroed()).unwrap_err();
    assert_eq!(norm.to_string(), "a group norm of 30 channels in 32 groups");
}

/// A decoder of the published size and a tiny latent, on the engine, within a network's bounds.
#[test]
fn a_whole_decoder() {
    let Some(runtime) = testbed::runtime() else { return };
    let size = [2, 3];
    let mut latent = vec![0.0; 2 * 3 * 4];
    Stream::new(5, Purpose::Init, 0).normals(&mut latent);
    let mut cpu = Cpu::<f32, ()>::for_codec();
    let (decoder, _) = Decoder::random(&mut cpu, size[0], size[1]).unwrap();
    let want = decoder.image(&mut cpu, size, &latent).unwrap();
    let picture = decoder.decode(&mut cpu, size, &latent).unwrap();
    drop(decoder);
    for (precision, bound) in [(Precision::F16, 5e-3), (Precision::Bf16, 4e-2)] {
        let mut gpu = Gpu::for_codec(runtime.clone(), precision).unwrap();
        let (decoder, _) = Decoder::random(&mut gpu, size[0], size[1]).unwrap();
        // Recorded, then replayed.
        for _ in 0..2 {
            let got = decoder.image(&mut gpu, size, &latent).unwrap();
            assert_close(&format!("picture in {precision:?}"), &got, &want, bound);
        }
        let got = decoder.decode(&mut gpu, size, &latent).unwrap();
        assert_eq!((got.height(), got.width()), (picture.height(), picture.width()));
        let bytes = |picture: &Picture| picture.rgb().iter().map(|&x| f32::from(x)).collect::<Vec<_>>();
        assert_close(&format!("bytes in {precision:?}"), &bytes(&got), &bytes(&picture), bound);
        // Beyond f16, within bf16.
        let huge = decoder.decode(&mut gpu, size, &[1e30; 24]);
        assert_eq!(matches!(huge, Err(codecs::CodecError::Overflow)), precision == Precision::F16);
        assert_eq!(huge.is_ok(), precision == Precision::Bf16);
        // What is larger comes into another workspace.
        let other = decoder.image(&mut gpu, [3, 3], &[latent.clone(), latent[..12].to_vec()].concat()).unwrap();
        assert_eq!(other.len(), 3 * 3 * 64 * 3);
        assert_close("after another plan", &decoder.image(&mut gpu, size, &latent).unwrap(), &want, bound);
    }
}

/// What [`codecs::Decoder`] needs of a GPU for a picture of 512x704, by its plan.
#[test]
fn a_decode_of_512x704_fits_in_2_gb() {
    let mut gpu = Gpu::for_codec(Rc::new(Imagined::rtx_4090()), Precision::F16).unwrap();
    let (decoder, _) = Decoder::random(&mut gpu, 88, 64).unwrap();
    decoder.image(&mut gpu, [88, 64], &vec![0.0; 88 * 64 * codecs::RAW_MEAN.len()]).unwrap();
    let cost = gpu.costs().next().unwrap();
    let bytes = gpu.param_bytes() + cost.workspace;
    eprintln!("weights {} MB, {cost:?}", gpu.param_bytes() / 1_000_000);
    // 2 GB are promised; three quarters of one are needed.
    assert!(bytes < 750_000_000, "{bytes} bytes");
}
