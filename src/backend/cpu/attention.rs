//! Self-attention over the pixels of an image, with pixel-normalised q, k and v (EDM2, appendix B.5).
//!
//! For each image and head: S = q k^T / sqrt(c) over T = h w tokens, y = softmax(S) v. Cost: 2 T^2 c
//! multiply-adds forward, 5 T^2 c backward (the scores are computed again rather than kept).

use super::bf16::{self, Packed, Rows};
use super::tensor::{Halves, Pool, Tensor};
use crate::real::{Dst, Mat, NORM_EPS, Real, Threads, dot, matmul, max, simd, sum};
use rayon::prelude::*;
use std::sync::Arc;

/// q, k or v of one head, normalised: `x / (eps + rms)`, [tokens, c].
struct Normed<T> {
    values: Vec<T>,
    /// Root mean square of each token before the normalisation.
    rms: Vec<T>,
}

/// Reads part `part` (0 q, 1 k, 2 v) of one head from channel `(head * c + i) * 3 + part`.
#[inline(always)]
fn gather<T: Real>(qkv: &[T], width: usize, head: usize, c: usize, part: usize) -> Normed<T> {
    let tokens = qkv.len() / width;
    let (mut values, mut rms) = (vec![T::zero(); tokens * c], vec![T::zero(); tokens]);
    for (i, token) in qkv.chunks_exact(width).enumerate() {
        let (head, row) = (&token[head * c * 3..][..c * 3], &mut values[i * c..][..c]);
        for j in 0..c {
            row[j] = head[3 * j + part];
        }
        let r = (dot(row, row) / T::of(c as f64)).sqrt();
        for x in row {
            *x /= T::of(NORM_EPS) + r;
        }
        rms[i] = r;
    }
    Normed { values, rms }
}

impl<T: Real> Normed<T> {
    /// Turns the gradient of the normalised values into that of the original ones, in place.
    fn backward(&self, grad: &mut [T], c: usize) {
        for ((g, y), &r) in grad.chunks_exact_mut(c).zip(self.values.chunks_exact(c)).zip(&self.rms) {
            normalize_backward(g, y, r, T::of(c as f64));
        }
    }
}

/// Gradient of y = x / (eps + r), where r = rms(x) over `count` values. Turns dL/dy, in `grad`, into dL/dx, given y and
/// r.
#[inline(always)]
pub fn normalize_backward<T: Real>(grad: &mut [T], y: &[T], r: T, count: T) {
    let d = T::of(NORM_EPS) + r;
    let dot = dot(grad, y);
    // dL/dx = g/d - x (g.x) / (count r d^2), and x = y d. At r = 0 the second term vanishes with x.
    let along = if r > T::zero() { dot / (count * r) } else { T::zero() };
    grad.iter_mut().zip(y).for_each(|(g, &y)| *g = *g / d - y * along);
}

/// softmax(q k^T / sqrt(c)), [tokens, tokens].
#[inline(always)]
fn probabilities<T: Real>(q: &Normed<T>, k: &Normed<T>, c: usize) -> Vec<T> {
    let tokens = q.rms.len();
    let mut s = vec![T::zero(); tokens * tokens];
    let scale = T::of(1.0 / (c as f64).sqrt());
    matmul(
        (tokens, tokens, c),
        Dst::new(&mut s, tokens),
        Mat::new(&q.values, c),
        Mat::new(&k.values, c).t(),
        scale,
        Threads::One,
    );
    softmax(&mut s, tokens);
    s
}

/// Turns rows of scores into probabilities.
#[inline(always)]
pub fn softmax<T: Real>(scores: &mut [T], columns: usize) {
    for row in scores.chunks_exact_mut(columns) {
        let max = max(row);
        for x in &mut *row {
            *x = (*x - max).exp_simd();
        }
        let inverse = T::one() / sum(row);
        for x in row {
            *x *= inverse;
        }
    }
}

/// Keys and values of a head [tokens, c], for products in bfloat16.
pub struct NarrowHead {
    keys: Packed,
    values: Packed,
    tokens: usize,
    c: usize,
}

impl NarrowHead {
    /// Rounds keys and values. `T` must be f32.
    pub fn new<T: Real>([tokens, c]: [usize; 2], keys: Mat<T>, values: Mat<T>) -> Self {
        let [keys, values] =
            [keys.t(), values].map(|x| Mat { data: T::as_f32(x.data).expect("f32"), rows: x.rows, cols: x.cols });
        let pack = |matrix, rows, columns| Packed::matrix(matrix, rows, columns, Threads::One);
        Self { keys: pack(keys, c, tokens), values: pack(values, tokens, c), tokens, c }
    }

    /// `out` [m, c] = softmax(q k^T / sqrt(c)) v for m queries, whose rows are contiguous. `T` must be f32.
    pub fn attend<T: Real>(&self, pool: &Arc<Pool<T>>, queries: Mat<T>, out: &mut [T]) {
        let Self { keys, values, tokens, c } = self;
        let (m, scale) = (out.len() / c, T::of(1.0 / (*c as f64).sqrt()));
        let mut left = Halves::uninit(pool, m * keys.k().max(values.k()));
        let mut scores = Tensor::uninit(pool, [1, 1, m, (*tokens).max(*c)]);
        // Writes rows of `scores`, followed by zeros.
        let narrow = |left: &mut [u16], scores: &[T], columns: usize, k: usize| {
            for (to, row) in left.chunks_exact_mut(k).zip(scores.chunks_exact(columns)) {
                bf16::narrow(T::as_f32(row).expect("f32"), &mut to[..columns]);
                to[columns..].fill(0);
            }
        };
        let scaled = &mut scores.values_mut()[..m * c];
        for (i, row) in scaled.chunks_exact_mut(*c).enumerate() {
            row.iter_mut().zip(&queries.data[i * queries.rows..]).for_each(|(y, &x)| *y = x * scale);
        }
        narrow(left.values_mut(), scaled, *c, keys.k());
        let to = T::as_f32_mut(scores.values_mut()).expect("f32");
        bf16::product(Rows::all(m), to, *tokens, &[Mat::new(left.values(), keys.k())], keys, 0, Threads::One);
        let scores = &mut scores.values_mut()[..m * tokens];
        simd(
            #[inline(always)]
            || softmax(scores, *tokens),
        );
        narrow(left.values_mut(), scores, *tokens, values.k());
        let to = T::as_f32_mut(out).expect("f32");
        bf16::product(Rows::all(m), to, *c, &[Mat::new(left.values(), values.k())], values, 0, Threads::One);
    }
}

/// Runs `f(image's qkv, head, result)` for each image and head, then interleaves the heads' results
/// [tokens, `per_head`] to [tokens, heads * `per_head`].
fn for_heads<T: Real>(
    pool: &Arc<Pool<T>>,
    qkv: &Tensor<T>,
    heads: usize,
    per_head: usize,
    f: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Tensor<T> {
    let [n, h, w, _] = qkv.shape();
    let tokens = h * w;
    let mut apart = Tensor::uninit(pool, [n, heads, tokens, per_head]);
    apart.values_mut().par_chunks_mut(tokens * per_head).enumerate().for_each(|(i, out)| {
        simd(
            #[inline(always)]
            || f(i / heads, i % heads, out),
        );
    });
    let mut out = Tensor::uninit(pool, [n, h, w, heads * per_head]);
    crate::real::for_rows(out.values_mut(), heads * per_head, |i, row| {
        let (image, token) = (i / tokens, i % tokens);
        for (head, dst) in row.chunks_exact_mut(per_head).enumerate() {
            dst.copy_from_slice(&apart.values()[((image * heads + head) * tokens + token) * per_head..][..per_head]);
        }
    });
    out
}

/// See [`crate::backend::NetworkBackend::attention`].
pub fn forward<T: Real>(pool: &Arc<Pool<T>>, qkv: &Tensor<T>, heads: usize, narrow: bool) -> Tensor<T> {
    let [_, h, w, width] = qkv.shape();
    let (tokens, c) = (h * w, width / heads / 3);
    for_heads(
        pool,
        qkv,
        heads,
        c,
        #[inline(always)]
        |image, head, out| {
            let x = &qkv.values()[image * tokens * width..][..tokens * width];
            let [q, k, v] = [0, 1, 2].map(
                #[inline(always)]
                |part| gather(x, width, head, c, part),
            );
            if narrow {
                return NarrowHead::new([tokens, c], Mat::new(&k.values, c), Mat::new(&v.values, c)).attend(
                    pool,
                    Mat::new(&q.values, c),
                    out,
                );
            }
            let p = probabilities(&q, &k, c);
            let (p, v) = (Mat::new(&p, tokens), Mat::new(&v.values, c));
            matmul((tokens, c, tokens), Dst::new(out, c), p, v, T::one(), Threads::One);
        },
    )
}

/// See [`crate::backend::TrainingBackend::attention_backward`].
pub fn backward<T: Real>(pool: &Arc<Pool<T>>, qkv: &Tensor<T>, heads: usize, grad: &Tensor<T>) -> Tensor<T> {
    let [_, h, w, width] = qkv.shape();
    let (tokens, c) = (h * w, width / heads / 3);
    let scale = T::of(1.0 / (c as f64).sqrt());
    for_heads(pool, qkv, heads, c * 3, |image, head, out| {
        let x = &qkv.values()[image * tokens * width..][..tokens * width];
        let [q, k, v] = [0, 1, 2].map(|part| gather(x, width, head, c, part));
        let p = probabilities(&q, &k, c);
        let gy = Mat::new(&grad.values()[image * tokens * heads * c + head * c..], heads * c);
        let product = |m, n, k, a, b, beta| {
            let mut out = vec![T::zero(); m * n];
            matmul((m, n, k), Dst::new(&mut out, n), a, b, beta, Threads::One);
            out
        };
        let (probs, one) = (Mat::new(&p[..], tokens), T::one());
        let mut gv = product(tokens, c, tokens, probs.t(), gy, one);
        let mut gs = product(tokens, tokens, c, gy, Mat::new(&v.values, c).t(), one);
        for (gs, p) in gs.chunks_exact_mut(tokens).zip(p.chunks_exact(tokens)) {
            let mean = dot(gs, p);
            gs.iter_mut().zip(p).for_each(|(g, &p)| *g = (*g - mean) * p);
        }
        let scores = Mat::new(&gs[..], tokens);
        let mut gq = product(tokens, c, tokens, scores, Mat::new(&k.values, c), scale);
        let mut gk = product(tokens, c, tokens, scores.t(), Mat::new(&q.values, c), scale);
        q.backward(&mut gq, c);
        k.backward(&mut gk, c);
        v.backward(&mut gv, c);
        for (i, out) in out.chunks_exact_mut(3).enumerate() {
            out.copy_from_slice(&[gq[i], gk[i], gv[i]]);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn a_narrow_head_loses_what_rounding_does() {
        if !bf16::is_available() {
            return eprintln!("skipped: no AVX-512 BF16");
        }
        for [tokens, c] in [[1, 2], [35, 7], [47, 64], [352, 64]] {
            let [q, k, v] = [0, 1, 2].map(|key| {
                let mut values = vec![0f32; tokens * c];
                Stream::new(7, Purpose::Init, key).normals(&mut values);
                values
            });
            let mut out = vec![0.0; tokens * c];
            let head = NarrowHead::new([tokens, c], Mat::new(&k, c), Mat::new(&v, c));
            head.attend(&Arc::default(), Mat::new(&q, c), &mut out);
            // A query does not depend on those beside it.
            for some in [1, 17, 33].into_iter().filter(|&some| some <= tokens) {
                let mut again = vec![0.0; some * c];
                let first = (tokens - some) * c;
                head.attend(&Arc::default(), Mat::new(&q[first..], c), &mut again);
                assert!(again.iter().zip(&out[first..]).all(|(a, b)| a.to_bits() == b.to_bits()), "{some} of {tokens}");
            }

            let round = |x: f32| f64::from(half::bf16::from_f32(x));
            let scale = 1.0 / (c as f32).sqrt();
            for (query, out) in q.chunks_exact(c).zip(out.chunks_exact(c)) {
                let scores = k.chunks_exact(c).map(|k| query.iter().zip(k).map(|(q, &k)| round(q * scale) * round(k)));
                let mut p: Vec<f64> = scores.map(|products| products.sum::<f64>().exp()).collect();
                let sum: f64 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= sum);
                for (i, &got) in out.iter().enumerate() {
                    let terms = || p.iter().enumerate().map(|(j, p)| p * round(v[j * c + i]));
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    // A probability has 8 bits; the rest is f32.
                    let bound = size * (2f64.powi(-9) + 1e-5);
                    assert!((f64::from(got) - want).abs() <= bound, "{tokens} tokens of {c}: {got}, not {want}");
                }
            }
        }
    }
}
