//! The codecs' operations on the CPU.

use super::attention::{NarrowHead, softmax};
use super::bf16::Packed;
use super::conv::{self, Filter, ImageRows};
use super::tensor::Tensor;
use super::{Cpu, copy_pixels, pixels};
use crate::backend::codec::{CodecBackend, Epilogue, Prologue, Reach, Window};
use crate::real::{Dst, Mat, Real, Threads, for_rows, matmul, simd};
use rayon::prelude::*;
use std::sync::Arc;

/// A convolution's weight, as [`conv::conv`] reads it.
pub struct Conv<T> {
    window: Window,
    weight: Vec<T>,
    packed: Option<Packed>,
    bias: Vec<T>,
}

debug!(Conv<T> { window } [T]);

impl<T: Real> Cpu<T, ()> {
    /// A device for codecs, which has no network's parameters.
    pub fn for_codec() -> Self {
        Self { params: (), pool: Arc::default(), bf16: false }
    }
}

/// Queries of [`CodecBackend::self_attention`] whose scores are held at once, on each thread.
const QUERIES: usize = 256;

/// Pixels of image row `row` of x from number `pixel` on, through `prologue`.
#[inline(always)]
fn read<T: Real>(x: &Tensor<T>, prologue: Prologue<Tensor<T>>, row: usize, pixel: usize, dst: &mut [T]) {
    let [_, h, _, c] = x.shape();
    let from = pixels(x, row, pixel);
    let (affine, silu) = match prologue {
        Prologue::Nothing => return copy_pixels(x, row, pixel, dst),
        Prologue::SoftClip => {
            let three = T::of(3.0);
            return dst.iter_mut().zip(from).for_each(|(y, &x)| *y = (x / three).tanh() * three);
        }
        Prologue::Affine(affine) => (affine, false),
        Prologue::AffineSilu(affine) => (affine, true),
    };
    let (scale, shift) = affine.values()[row / h * 2 * c..][..2 * c].split_at(c);
    for (dst, from) in dst.chunks_exact_mut(c).zip(from.chunks_exact(c)) {
        let affine = from.iter().zip(scale).zip(shift).map(
            #[inline(always)]
            |((&x, &scale), &shift)| x * scale + shift,
        );
        if silu {
            dst.iter_mut().zip(affine).for_each(|(dst, y)| *dst = y / (T::one() + (-y).exp_simd()));
        } else {
            dst.iter_mut().zip(affine).for_each(|(dst, y)| *dst = y);
        }
    }
}

impl<T: Real> CodecBackend for Cpu<T, ()> {
    type Conv = Conv<T>;

    fn load_conv(&mut self, reach: Reach, cin: usize, weight: &[f32], bias: Option<&[f32]>) -> Conv<T> {
        let taps = reach.side() * reach.side();
        let cout = weight.len() / (cin * taps);
        let mut turned = vec![T::zero(); weight.len()];
        for_rows(&mut turned, cout, |row, to| {
            let (tap, ci) = (row / cin, row % cin);
            to.iter_mut().enumerate().for_each(|(co, x)| *x = T::of(weight[(co * cin + ci) * taps + tap].into()));
        });
        let window = reach.window();
        let weight = if reach == Reach::Double { conv::enlarging(&turned) } else { turned };
        let bias = bias.map_or(vec![T::zero(); cout], |bias| bias.iter().map(|&x| T::of(x.into())).collect());
        let packed = self.bf16.then(|| Filter::new(&weight, cout, window).pack()).flatten();
        Conv { window, weight, packed, bias }
    }

    fn convolve(
        &mut self,
        conv: &Conv<T>,
        x: &Tensor<T>,
        prologue: Prologue<Tensor<T>>,
        epilogue: Epilogue<Tensor<T>>,
    ) -> Tensor<T> {
        let Conv { window, weight, packed, bias } = conv;
        let cout = bias.len();
        let shape = window.result(x.shape(), cout);
        let add = epilogue.residual.is_some();
        let mut out = epilogue.residual.unwrap_or_else(|| self.uninit(shape));
        assert_eq!(out.shape(), shape, "shape of a residual");
        let read = |row: usize, pixel: usize, dst: &mut [T]| {
            simd(
                #[inline(always)]
                || read(x, prologue, row, pixel, dst),
            )
        };
        let rows = ImageRows { shape: x.shape(), read: &read };
        let filter = Filter { packed: packed.as_ref(), ..Filter::new(weight, cout, *window) };
        conv::conv(
            &self.pool,
            rows,
            filter,
            out.values_mut(),
            #[inline(always)]
            |_, y, out| {
                for (out, y) in out.chunks_exact_mut(cout).zip(y.chunks_exact(cout)) {
                    for ((out, &y), &bias) in out.iter_mut().zip(y).zip(bias) {
                        *out = if add { *out + (y + bias) } else { y + bias };
                    }
                }
                if epilogue.relu {
                    // Written so that NaN passes through.
                    for x in out {
                        *x = if *x < T::zero() { T::zero() } else { *x };
                    }
                }
            },
        );
        out
    }

    fn group_norm(&mut self, x: &Tensor<T>, affine: &Tensor<T>, groups: usize, eps: f64) -> Tensor<T> {
        let [n, h, w, c] = x.shape();
        // Each row and channel has its mean and its sum of squared deviations. Sums of plain squares would cancel where
        // the mean is large.
        let mut rows = self.uninit([n, h, 2, c]);
        for_rows(rows.values_mut(), 2 * c, |row, out| {
            let (mean, deviation) = out.split_at_mut(c);
            let pixels = || x.values()[row * w * c..][..w * c].chunks_exact(c);
            mean.fill(T::zero());
            pixels().for_each(|pixel| mean.iter_mut().zip(pixel).for_each(|(m, &x)| *m += x));
            mean.iter_mut().for_each(|m| *m /= T::of(w as f64));
            deviation.fill(T::zero());
            for pixel in pixels() {
                for ((d, &m), &x) in deviation.iter_mut().zip(&*mean).zip(pixel) {
                    *d += (x - m) * (x - m);
                }
            }
        });
        let mut out = self.uninit([n, 1, 2, c]);
        let (weight, bias) = affine.values().split_at(c);
        for (image, out) in rows.values().chunks_exact(h * 2 * c).zip(out.values_mut().chunks_exact_mut(2 * c)) {
            let (scales, shifts) = out.split_at_mut(c);
            for group in 0..groups {
                let channels = group * c / groups..(group + 1) * c / groups;
                let each = || image.chunks_exact(2 * c).flat_map(|row| channels.clone().map(|i| (row[i], row[c + i])));
                let count = (h * channels.len()) as f64;
                let mean = each().map(|(m, _)| m.wide()).sum::<f64>() / count;
                let squares = each().map(|(m, d)| d.wide() / w as f64 + (m.wide() - mean).powi(2)).sum::<f64>();
                let inverse = 1.0 / (squares / count + eps).sqrt();
                for i in channels.clone() {
                    let scale = weight[i].wide() * inverse;
                    scales[i] = T::of(scale);
                    shifts[i] = T::of(bias[i].wide() - mean * scale);
                }
            }
        }
        out
    }

    fn self_attention(&mut self, qkv: &Tensor<T>) -> Tensor<T> {
        let [n, h, w, width] = qkv.shape();
        let (tokens, c) = (h * w, width / 3);
        let mut out = self.uninit([n, h, w, c]);
        let scale = T::of(1.0 / (c as f64).sqrt());
        let images = qkv.values().chunks_exact(tokens * width);
        for (qkv, out) in images.zip(out.values_mut().chunks_exact_mut(tokens * c)) {
            let [k, v] = [1, 2].map(|part| Mat::new(&qkv[part * c..], width));
            let narrow = self.bf16.then(|| NarrowHead::new([tokens, c], k, v));
            out.par_chunks_mut(QUERIES * c).enumerate().for_each(|(i, out)| {
                let m = out.len() / c;
                let q = Mat::new(&qkv[i * QUERIES * width..], width);
                if let Some(head) = &narrow {
                    return head.attend(&self.pool, q, out);
                }
                let mut scores = Tensor::uninit(&self.pool, [1, 1, m, tokens]);
                matmul((m, tokens, c), Dst::new(scores.values_mut(), tokens), q, k.t(), scale, Threads::One);
                simd(
                    #[inline(always)]
                    || softmax(scores.values_mut(), tokens),
                );
                matmul((m, c, tokens), Dst::new(out, c), Mat::new(scores.values(), tokens), v, T::one(), Threads::One);
            });
        }
        out
    }

    fn trim(&mut self) {
        self.pool.clear();
    }
}
