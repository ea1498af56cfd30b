//! Attention and its gradient, on the emulator and a GPU, against the CPU backend on random data: f16 and bf16,
//! every head size, odd and even numbers of tokens, three thread orders, both builds.
//!
//! The twin gets the kernel's inputs, rounded to 16 bits, and computes in f32. The kernels round the
//! normalised q, k and v, the probabilities and the result: each at most 2^-11 = 4.9e-4 of a value in
//! f16, 2^-8 = 3.9e-3 in bf16, which is the fourfold of what their mean square is.

#![cfg(any(feature = "emulator", feature = "cuda"))]

use crate::common::normals::normals;
use crate::testbed::{self, Bench, Kernels, PRECISIONS, read};
use bytemuck::Zeroable;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::attention::{Attention, AttentionError, row_of};
use edm2k::backend::gpu::launch::{DevicePtr, Precision};
use edm2k::backend::gpu::structs::AttentionParams;
use edm2k::backend::{Backend, NetworkBackend, TrainingBackend};
use edm2k::params::ParamTable;

struct Shape {
    images: usize,
    height: usize,
    width: usize,
    heads: usize,
    c: usize,
}

const fn shape(images: usize, height: usize, width: usize, heads: usize, c: usize) -> Shape {
    Shape { images, height, width, heads, c }
}

impl Bench {
    /// Random values that 16 bits can hold.
    fn random16(&self, n: usize, seed: u64) -> Vec<f32> {
        self.widen(&self.narrow(&normals(n, seed, 1.0)))
    }

    fn check(&self, s: &Shape) {
        let tokens = s.height * s.width;
        let width = 3 * s.heads * s.c;
        let mut qkv = self.random16(s.images * tokens * width, 1);
        if tokens > 2 {
            // Sizes that the norm takes away again.
            qkv[width..2 * width].iter_mut().for_each(|x| *x *= 64.0);
        }
        self.check_values(s, &qkv, &["q", "k", "v"]);
    }

    /// Checks the result, and the gradients of `parts`.
    fn check_values(&self, s: &Shape, qkv: &[f32], parts: &[&str]) {
        let tokens = s.height * s.width;
        let (out_width, width) = (s.heads * s.c, 3 * s.heads * s.c);
        let what = format!("{} images of {tokens} tokens, {} heads of {}", s.images, s.heads, s.c);
        let grad = self.random16(s.images * tokens * out_width, 2);
        let to_kernel = |x: &[f32]| -> Vec<f32> {
            let mut y = vec![0.0; x.len()];
            for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                x.iter().enumerate().for_each(|(row, &x)| y[row_of(row, s.heads, s.c)] = x);
            }
            y
        };

        let mut cpu = Cpu::<f32>::for_sampling(&ParamTable::default());
        let twin_qkv = cpu.upload([s.images, s.height, s.width, width], qkv);
        let twin_grad = cpu.upload([s.images, s.height, s.width, out_width], &grad);
        let twin_out = cpu.attention(&twin_qkv, s.heads);
        let twin_grad_qkv = cpu.attention_backward(&twin_qkv, s.heads, &twin_grad);

        let attention = Attention::new(s.images, tokens, s.heads, s.c, self.precision).unwrap();
        let (x, g) = (self.upload(&self.narrow(&to_kernel(qkv))), self.upload(&self.narrow(&grad)));
        let out = self.kernels.alloc(2 * grad.len());
        let grad_qkv = self.kernels.alloc(2 * qkv.len());
        let scratch = self.kernels.alloc(attention.scratch_bytes());
        self.run_clean([&attention.forward(x.ptr(), out.ptr())]);
        self.run_clean(&attention.backward(AttentionParams {
            qkv: x.ptr(),
            grad_out: g.ptr(),
            out: grad_qkv.ptr(),
            sums: scratch.ptr(),
            ..Zeroable::zeroed()
        }));

        self.same(&format!("out of {what}"), &self.widen(&read(&out)), &cpu.download(&twin_out).unwrap());
        let got = self.widen(&read(&grad_qkv));
        let want = to_kernel(&cpu.download(&twin_grad_qkv).unwrap());
        assert!(got.iter().all(|x| x.is_finite()), "gradient of {what}, {}", self.name);
        if parts.len() == 3 {
            self.same(&format!("gradient of {what}"), &got, &want);
        }
        // With one token the gradients of q and k are zero, but for rounding.
        for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
            if parts.contains(&name) && (tokens > 1 || name == "v") {
                let of = |x: &[f32]| -> Vec<f32> {
                    x.chunks_exact(width).flat_map(|x| &x[part * out_width..][..out_width]).copied().collect()
                };
                self.same(&format!("gradient of {name} of {what}"), &of(&got), &of(&want));
            }
        }
    }
}

#[test]
fn every_head_size_and_any_number_of_tokens() {
    let shapes = [
        shape(3, 1, 1, 2, 16),
        shape(2, 5, 7, 3, 16),
        shape(2, 7, 11, 1, 32),
        shape(1, 1, 1, 1, 64),
        shape(1, 8, 11, 2, 64),
        shape(1, 16, 22, 1, 64),
        shape(1, 7, 11, 2, 128),
    ];
    for device in Bench::of(testbed::once()) {
        shapes.iter().for_each(|s| device.check(s));
    }
}

/// Kernels that one shape does not reach: which of them run is told by the launches' names.
#[test]
fn every_kernel_and_token_counts_around_its_tiles() {
    let split = |c: usize, tokens| shape(1, 1, tokens, 1, c);
    // 128 blocks: the forward pass does not split the keys.
    let many = |c, tokens: usize| shape(32, 1, tokens, 4usize.div_ceil(tokens.div_ceil(192)), c);
    let cases = [
        ("forward_split", "grad_q_6", split(16, 95)),
        ("forward_split", "grad_q_6", split(32, 96)),
        ("forward_split", "grad_q_12", split(32, 97)),
        // All tiles of keys stay in shared memory up to 384 tokens, and a warp has one share of keys up to 352.
        ("forward_split", "grad_q_12", split(64, 353)),
        ("forward_split", "grad_q_12", split(32, 384)),
        ("forward_split", "grad_q_12", split(32, 385)),
        ("forward_split", "grad_q_12", split(16, 769)),
        ("forward_split", "grad_q_6", split(128, 193)),
        ("forward_3", "grad_q_6", many(16, 1)),
        ("forward_3", "grad_q_6", many(64, 88)),
        ("forward_3", "grad_q_6", many(32, 96)),
        ("forward_6", "grad_q_12", many(16, 97)),
        ("forward_6", "grad_q_12", many(64, 193)),
        ("forward_3", "grad_q_6", many(128, 17)),
        ("forward_6", "grad_q_6", many(128, 49)),
    ];
    for device in Bench::of(testbed::once()) {
        for (forward, grad_q, s) in &cases {
            let attention = Attention::new(s.images, s.width, s.heads, s.c, device.precision).unwrap();
            let none = DevicePtr::NULL;
            let name = |part: &&str| format!("attention_{}_{}_c{}", part, device.precision.name(), s.c);
            assert_eq!(attention.forward(none, none).kernel, name(forward), "{} tokens", s.width);
            assert_eq!(attention.backward(Zeroable::zeroed())[0].kernel, name(grad_q), "{} tokens", s.width);
            device.check(s);
        }
    }
}

/// No score needs a maximum taken away: none is beyond sqrt(c), which is reached where q and k are parallel,
/// however large they are. The gradients of such q and k are zero but for rounding: they lie along q and k.
#[test]
fn the_largest_and_the_smallest_scores() {
    for device in Bench::of(testbed::once()) {
        for c in [16, 32, 64, 128] {
            for (images, tokens) in [(1, 1), (1, 49), (64, 49)] {
                let s = shape(images, 1, tokens, 2, c);
                let mut qkv = device.random16(images * tokens * 6 * c, 1);
                let direction = device.random16(c, 3);
                for (token, qkv) in qkv.chunks_exact_mut(6 * c).enumerate() {
                    for (i, qkv) in qkv.chunks_exact_mut(3).enumerate() {
                        // Every fifth k is along all q, all others against them. Head 1 has the reverse.
                        let sign = if (token % 5 == 4) == (i < c) { 1.0 } else { -1.0 };
                        // Exact in 16 bits, as a power of two changes no digit.
                        qkv[0] = direction[i % c] * 8192.0;
                        qkv[1] = direction[i % c] * sign * 8192.0;
                    }
                }
                device.check_values(&s, &qkv, &["v"]);
            }
        }
    }
}

#[test]
fn any_thread_order() {
    for kernels in testbed::every_order().into_iter().filter(|k| !k.checked) {
        for (precision, c) in PRECISIONS.into_iter().flat_map(|p| [(p, 16), (p, 32), (p, 64), (p, 128)]) {
            let device = Bench::new(kernels.clone(), precision);
            device.check(&shape(1, 7, 11, 1, c));
            device.check(&shape(64, 1, 49, 2, c));
            device.check(&shape(1, 1, 99, 1, c));
        }
    }
}

#[test]
fn no_races_no_unwritten_reads_nothing_out_of_bounds() {
    let precisions = [Precision::F16, Precision::Bf16, Precision::F16];
    for (kernels, precision) in testbed::every_order().into_iter().filter(|k| k.checked).zip(precisions) {
        let device = Bench::new(kernels, precision);
        for c in [16, 32, 64, 128] {
            device.check(&shape(1, 5, 7, 1, c));
        }
        // More than a block, two heads, more keys than all warps take at once, than stay in shared memory.
        device.check(&shape(2, 7, 11, 2, 16));
        device.check(&shape(1, 1, 401, 1, 16));
        // Keys that are not split; blocks of 3 and of 6 warps.
        device.check(&shape(32, 1, 5, 4, 64));
        device.check(&shape(64, 1, 97, 2, 16));
    }
}

#[test]
fn the_same_bits_in_every_run() {
    for kernels in testbed::once() {
        let device = Bench::new(kernels, Precision::F16);
        let attention = Attention::new(1, 77, 1, 32, Precision::F16).unwrap();
        let [x, g] = [(96, 1), (32, 2)].map(|(c, seed)| device.both(&normals(77 * c, seed, 1.0), c).memory);
        let scratch = device.kernels.alloc(attention.scratch_bytes());
        let run = |kernels: Kernels| {
            let device = Bench::new(kernels, Precision::F16);
            let grad_qkv = device.kernels.alloc(2 * 77 * 96);
            device.run_clean(&attention.backward(AttentionParams {
                qkv: x.ptr(),
                grad_out: g.ptr(),
                out: grad_qkv.ptr(),
                sums: scratch.ptr(),
                ..Zeroable::zeroed()
            }));
            read::<u16>(&grad_qkv)
        };
        assert_eq!(run(device.kernels.clone()), run(device.kernels.otherwise()));
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    assert_eq!(Attention::new(1, 9, 1, 48, Precision::F16), Err(AttentionError::HeadSize(48)));
    let error = Attention::new(0, 9, 1, 64, Precision::F16).unwrap_err();
    assert_eq!(error.to_string(), "attention: 0 images, expected 1 to 65535");
}
