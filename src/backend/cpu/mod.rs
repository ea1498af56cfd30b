//! The CPU backend: plain Rust in f32 or f64. Every CUDA kernel is compared with it, and machines without a GPU compute
//! with it.
//!
//! Each operation composes the paper's formulas plainly. What makes it fast is in `conv` (implicit matrix products) and
//! in `tensor` (memory that is reused).

mod attention;
mod bf16;
mod codec;
mod conv;
mod tensor;
mod training;
mod weights;

use super::*;
use crate::backend::codec::Reach;
use crate::params::{ParamId, ParamTable, Portions, mp_sum_weights};
use crate::real::{Dst, Mat, NORM_EPS, Threads, dot, for_rows, matmul, mp_silu, simd};
use crate::rng::dropped;
use conv::{Filter, ImageRows};
use rayon::prelude::*;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use tensor::Pool;
use weights::Param;

pub use crate::real::Real;
pub use bf16::{is_available as bf16_is_available, is_fast as bf16_is_fast};
pub use tensor::Tensor;

/// A CPU as a device; it computes on all threads of rayon's pool. It holds the parameters of a network, or none
/// (`Cpu<T, ()>`) for what needs no network.
pub struct Cpu<T: Real = f32, P = Params<T>> {
    params: P,
    pool: Arc<Pool<T>>,
    bf16: bool,
}

debug!(Cpu<T, P> { bf16 } [T: Real, P]);

/// A network's parameters.
pub struct Params<T: Real> {
    table: ParamTable,
    portions: Portions,
    all: Vec<Param<T>>,
}

debug!(Params<T> { table } [T: Real]);

impl<T: Real> Index<ParamId> for Params<T> {
    type Output = Param<T>;
    fn index(&self, id: ParamId) -> &Param<T> {
        &self.all[id.0]
    }
}

impl<T: Real> IndexMut<ParamId> for Params<T> {
    fn index_mut(&mut self, id: ParamId) -> &mut Param<T> {
        &mut self.all[id.0]
    }
}

impl<T: Real, P> Cpu<T, P> {
    /// A tensor of given values, in full precision.
    pub fn tensor(&self, shape: Shape, values: &[T]) -> Tensor<T> {
        let mut t = self.uninit(shape);
        t.values_mut().copy_from_slice(values);
        t
    }

    fn uninit(&self, shape: Shape) -> Tensor<T> {
        Tensor::uninit(&self.pool, shape)
    }
}

impl<P> Cpu<f32, P> {
    /// Sets whether convolutions, their gradients and attention's forward pass round their inputs to bfloat16 and sum in
    /// f32, also those of autoencoders that are loaded later. The processor [may](bf16_is_fast) be two to three times as
    /// fast then.
    ///
    /// # Panics
    /// If `bf16` is asked for and the processor has no AVX-512 BF16.
    pub fn with_bf16(self, bf16: bool) -> Self {
        assert!(!bf16 || bf16_is_available(), "AVX-512 BF16");
        Self { bf16, ..self }
    }
}

impl<T: Real> Cpu<T> {
    /// Holds the effective weights only.
    pub fn for_sampling(table: &ParamTable) -> Self {
        Self::new(table, None)
    }

    /// Holds gradients, Adam's moments and `averages` moving averages too.
    pub fn for_training(table: &ParamTable, averages: usize) -> Self {
        Self::new(table, Some(averages))
    }

    fn new(table: &ParamTable, training: Option<usize>) -> Self {
        let all = table.iter().map(|(_, spec)| Param::new(spec, training)).collect();
        let params = Params { table: table.clone(), portions: Portions::of(table), all };
        Self { params, pool: Arc::default(), bf16: false }
    }

    /// Sets a slot of a parameter in full precision, values in PyTorch's order.
    ///
    /// # Errors
    /// [`BackendError::ParamSize`], [`BackendError::NotTraining`].
    pub fn set_param(&mut self, slot: Slot, id: ParamId, values: &[T]) -> Result<(), BackendError> {
        self.params[id].write(slot, values)
    }

    /// Reads a slot of a parameter in full precision, in PyTorch's order.
    ///
    /// # Errors
    /// [`BackendError::NotTraining`].
    pub fn param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<T>, BackendError> {
        self.params[id].read(slot)
    }

    /// A scalar parameter.
    fn gain(&self, id: ParamId) -> T {
        self.params[id].effective()[0]
    }

    fn add_to_gain(&mut self, id: ParamId, value: T) {
        let (grad, accumulate) = self.params[id].grad_mut();
        grad[0] = if accumulate { grad[0] + value } else { value };
    }

    /// x [n, cin] times the effective weight of a linear layer: [n, cout].
    fn linear(&self, id: ParamId, x: &Tensor<T>, scale: f64) -> Tensor<T> {
        let param = &self.params[id];
        let (cout, cin, _) = param.dims();
        let n = x.shape()[0];
        let mut y = self.uninit([n, 1, 1, cout]);
        // One image at a time: `gemm` computes a product of one row in another way than one of many rows, and an image
        // must not depend on its batch.
        let weight = Mat::new(param.effective(), cout);
        y.values_mut().par_chunks_mut(cout).zip(x.values().par_chunks(cin)).for_each(|(y, x)| {
            matmul((1, cout, cin), Dst::new(y, cout), Mat::new(x, cin), weight, T::of(scale), Threads::One);
        });
        y
    }

    /// Accumulates `scale` * x^T grad; `grad` has `stride` values from row to row.
    fn linear_wgrad(&mut self, id: ParamId, x: &Tensor<T>, grad: &[T], stride: usize, scale: f64) {
        let (cout, cin, _) = self.params[id].dims();
        let (values, accumulate) = self.params[id].grad_mut();
        let out = Dst { values, rows: cout, accumulate };
        let (a, b) = (Mat::new(x.values(), cin).t(), Mat::new(grad, stride));
        matmul((cin, cout, x.shape()[0]), out, a, b, T::of(scale), Threads::All);
    }

    /// Fourier features sqrt(2) cos(x f + p) of ln(sigma)/4 (EDM2 eq. 75).
    fn fourier(&self, freqs: ParamId, phases: ParamId, sigma: &Tensor<T>) -> Tensor<T> {
        let (freqs, phases) = (self.params[freqs].effective(), self.params[phases].effective());
        let mut out = self.uninit([sigma.shape()[0], 1, 1, freqs.len()]);
        for_rows(out.values_mut(), freqs.len(), |i, row| {
            let c_noise = sigma.values()[i].ln() / T::of(4.0);
            for ((y, &f), &p) in row.iter_mut().zip(freqs).zip(phases) {
                *y = (c_noise * f + p).cos() * T::of(std::f64::consts::SQRT_2);
            }
        });
        out
    }

    /// Runs a convolution; `done(row, y, out)` as in [`conv::conv`], `out` of shape `out_shape`.
    fn convolve(&self, id: ParamId, x: Operand<Tensor<T>>, out: &mut [T], done: impl Fn(usize, &[T], &mut [T]) + Sync) {
        let param = &self.params[id];
        let (cout, _, taps) = param.dims();
        let read = |row: usize, pixel: usize, dst: &mut [T]| read_operand(&x, row, pixel, dst);
        let rows = ImageRows { shape: operand_shape(&x), read: &read };
        let packed = self.bf16.then(|| param.packed()).flatten();
        let filter = Filter { packed, ..Filter::new(param.effective(), cout, Reach::of_taps(taps).window()) };
        conv::conv(&self.pool, rows, filter, out, done);
    }

    /// Gradient of a convolution's input; `done(row, g, out)` gets w * cin values a row.
    fn convolve_back(&self, id: ParamId, grad: &Tensor<T>, out: &mut [T], done: impl Fn(usize, &[T], &mut [T]) + Sync) {
        let param = &self.params[id];
        let (cout, cin, taps) = param.dims();
        let weight = conv::transpose(&self.pool, param.effective(), taps, cin, cout);
        let read = |row: usize, pixel: usize, dst: &mut [T]| copy_pixels(grad, row, pixel, dst);
        let rows = ImageRows { shape: grad.shape(), read: &read };
        let filter = Filter::new(weight.values(), cin, Reach::of_taps(taps).window());
        let packed = self.bf16.then(|| filter.pack()).flatten();
        conv::conv(&self.pool, rows, Filter { packed: packed.as_ref(), ..filter }, out, done);
    }
}

/// Copies pixels of image row `row` of x from number `pixel` on.
fn copy_pixels<T: Real>(x: &Tensor<T>, row: usize, pixel: usize, dst: &mut [T]) {
    dst.copy_from_slice(&pixels(x, row, pixel)[..dst.len()]);
}

/// The pixels of image row `row` of x from number `pixel` on.
fn pixels<T: Real>(x: &Tensor<T>, row: usize, pixel: usize) -> &[T] {
    let [_, _, w, c] = x.shape();
    &x.values()[(row * w + pixel) * c..]
}

fn operand_shape<T: Real>(x: &Operand<Tensor<T>>) -> Shape {
    let [n, h, w, c] = x.x.shape();
    [n, h, w, c + x.skip.map_or(0, |(skip, _)| skip.shape()[3])]
}

/// The parts of an operand with the channels that each takes in the concatenation.
fn parts<'a, T: Real>(x: &Operand<'a, Tensor<T>>) -> impl Iterator<Item = (&'a Tensor<T>, T, usize)> {
    let first = (x.x, T::of(x.x_scale), 0);
    let second = x.skip.map(|(skip, scale)| (skip, T::of(scale), x.x.shape()[3]));
    std::iter::once(first).chain(second)
}

/// Writes pixels of image row `row` of the operand from number `pixel` on, concatenated, scaled and activated.
fn read_operand<T: Real>(x: &Operand<Tensor<T>>, row: usize, pixel: usize, dst: &mut [T]) {
    let [.., c] = operand_shape(x);
    simd(
        #[inline(always)]
        || {
            for (part, scale, offset) in parts(x) {
                let channels = part.shape()[3];
                let from = pixels(part, row, pixel).chunks_exact(channels);
                for (dst, from) in dst.chunks_exact_mut(c).zip(from) {
                    let dst = dst[offset..offset + channels].iter_mut().zip(from);
                    if x.silu {
                        dst.for_each(|(d, &x)| *d = mp_silu(x * scale));
                    } else {
                        dst.for_each(|(d, &x)| *d = x * scale);
                    }
                }
            }
        },
    );
}

/// 2x2 average of two image rows of `c` channels into one.
#[inline(always)]
fn average<T: Real>(upper: &[T], lower: &[T], c: usize, dst: &mut [T]) {
    let rows = upper.chunks_exact(2 * c).zip(lower.chunks_exact(2 * c));
    for (dst, (u, l)) in dst.chunks_exact_mut(c).zip(rows) {
        for i in 0..c {
            dst[i] = (u[i] + u[i + c] + l[i] + l[i + c]) * T::of(0.25);
        }
    }
}

/// mp_silu(y * scale) of some pixels.
#[inline(always)]
fn scale_silu<T: Real>(scale: &[T], y: &[T], out: &mut [T]) {
    for (out, y) in out.chunks_exact_mut(scale.len()).zip(y.chunks_exact(scale.len())) {
        for i in 0..scale.len() {
            out[i] = mp_silu(y[i] * scale[i]);
        }
    }
}

/// x / (eps + rms(x)); returns the rms.
#[inline(always)]
fn normalize<T: Real>(x: &mut [T]) -> T {
    let mean_square = dot(x, x) / T::of(x.len() as f64);
    let r = mean_square.sqrt();
    let factor = T::one() / (T::of(NORM_EPS) + r);
    for x in x {
        *x *= factor;
    }
    r
}

/// One row of the input of a pixel norm: row `row` of x, or the average of rows 2 `row` and 2 `row` + 1.
#[inline(always)]
fn read_normed<T: Real>(x: &Tensor<T>, down: bool, row: usize, dst: &mut [T]) {
    if down {
        let [_, _, w, c] = x.shape();
        let two = &x.values()[2 * row * w * c..][..2 * w * c];
        average(&two[..w * c], &two[w * c..], c, dst);
    } else {
        copy_pixels(x, row, 0, dst);
    }
}

fn halved([n, h, w, c]: Shape, down: bool) -> Shape {
    if down { [n, h / 2, w / 2, c] } else { [n, h, w, c] }
}

impl<T: Real, W> Backend for Cpu<T, W> {
    type Tensor = Tensor<T>;

    fn shape(&self, t: &Tensor<T>) -> Shape {
        t.shape()
    }

    fn upload(&mut self, shape: Shape, values: &[f32]) -> Tensor<T> {
        let mut t = self.uninit(shape);
        assert_eq!(t.values().len(), values.len(), "values of a tensor of shape {shape:?}");
        t.values_mut().iter_mut().zip(values).for_each(|(t, &v)| *t = T::of(f64::from(v)));
        t
    }

    fn download(&mut self, t: &Tensor<T>) -> Result<Vec<f32>, BackendError> {
        Ok(t.values().iter().map(|v| v.wide() as f32).collect())
    }

    fn linear_combination(&mut self, terms: &[(&Tensor<T>, f64)]) -> Tensor<T> {
        let shape = terms[0].0.shape();
        let row = shape[2] * shape[3];
        let mut out = self.uninit(shape);
        for_rows(out.values_mut(), row, |i, out| {
            for (k, (t, factor)) in terms.iter().enumerate() {
                let factor = T::of(*factor);
                let t = &t.values()[i * row..];
                for (o, &t) in out.iter_mut().zip(t) {
                    *o = if k == 0 { t * factor } else { *o + t * factor };
                }
            }
        });
        out
    }

    fn split(&mut self, x: &Tensor<T>, parts: usize) -> Vec<Tensor<T>> {
        let [n, h, w, c] = x.shape();
        let shape = [n / parts, h, w, c];
        x.values().chunks_exact(shape.iter().product()).map(|values| self.tensor(shape, values)).collect()
    }
}

impl<T: Real> NetworkBackend for Cpu<T> {
    fn table(&self) -> &ParamTable {
        &self.params.table
    }

    fn load_param(&mut self, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        self.write_param(Slot::Weight, id, values)
    }

    fn normalize(&mut self) -> Result<(), BackendError> {
        self.make_effective(Slot::Weight, Normalization::Eval)
    }

    fn precond_input(&mut self, x: &Tensor<T>, sigma: &Tensor<T>, sigma_data: f64) -> Tensor<T> {
        let [images, h, w, c] = x.shape();
        let mut out = self.uninit([sigma.shape()[0], h, w, c + 1]);
        for_rows(out.values_mut(), w * (c + 1), |row, out| {
            let s = sigma.values()[row / h];
            let c_in = T::one() / (T::of(sigma_data * sigma_data) + s * s).sqrt();
            let x = x.values()[row % (images * h) * w * c..].chunks_exact(c);
            for (out, x) in out.chunks_exact_mut(c + 1).zip(x) {
                out.iter_mut().zip(x).for_each(|(o, &x)| *o = x * c_in);
                out[c] = T::one();
            }
        });
        out
    }

    fn precond_output(
        &mut self,
        x: &Tensor<T>,
        raw: &Tensor<T>,
        sigma: &Tensor<T>,
        out_gain: ParamId,
        sigma_data: f64,
    ) -> Tensor<T> {
        let [images, h, w, c] = x.shape();
        let gain = self.gain(out_gain);
        let mut out = self.uninit(raw.shape());
        for_rows(out.values_mut(), w * c, |row, out| {
            let (c_skip, c_out) = output_scales(sigma.values()[row / h], sigma_data);
            let x = &x.values()[row % (images * h) * w * c..];
            let raw = &raw.values()[row * w * c..];
            for ((out, &x), &raw) in out.iter_mut().zip(x).zip(raw) {
                *out = c_skip * x + c_out * (gain * raw);
            }
        });
        out
    }

    fn embed(&mut self, p: &Embed, sigma: &Tensor<T>, labels: Option<&Tensor<T>>) -> Embedding<Tensor<T>> {
        let features = self.fourier(p.freqs, p.phases, sigma);
        let mut pre = self.linear(p.noise, &features, 1.0);
        if let Some(label) = p.label {
            let (wa, wb) = mp_sum_weights(p.label_balance);
            let values = pre.values_mut();
            values.iter_mut().for_each(|x| *x *= T::of(wa));
            if let Some(labels) = labels {
                let y = self.linear(label, labels, wb * (labels.shape()[3] as f64).sqrt());
                values.iter_mut().zip(y.values().iter().cycle()).for_each(|(x, &y)| *x += y);
            }
        }
        let mut emb = pre.clone();
        for_rows(emb.values_mut(), pre.shape()[3], |_, row| row.iter_mut().for_each(|x| *x = mp_silu(*x)));
        Embedding { features, pre, emb }
    }

    fn emb_scales(&mut self, layers: &[EmbLayer], emb: &Tensor<T>) -> Tensor<T> {
        let n = emb.shape()[0];
        let width: usize = layers.iter().map(|l| l.channels).sum();
        let mut out = self.uninit([n, 1, 1, width]);
        for layer in layers {
            let y = self.linear(layer.weight, emb, 1.0);
            let gain = self.gain(layer.gain);
            for (out, y) in out.values_mut().chunks_exact_mut(width).zip(y.values().chunks_exact(layer.channels)) {
                let out = &mut out[layer.offset..][..layer.channels];
                out.iter_mut().zip(y).for_each(|(o, &y)| *o = y * gain + T::one());
            }
        }
        out
    }

    fn logvar(&mut self, p: &Logvar, sigma: &Tensor<T>) -> (Tensor<T>, Tensor<T>) {
        let features = self.fourier(p.freqs, p.phases, sigma);
        let logvar = self.linear(p.weight, &features, 1.0);
        (features, logvar)
    }

    fn pixel_norm(&mut self, x: &Tensor<T>, down: bool) -> Tensor<T> {
        let shape = halved(x.shape(), down);
        let c = shape[3];
        let mut out = self.uninit(shape);
        for_rows(out.values_mut(), shape[2] * c, |row, out| {
            read_normed(x, down, row, out);
            out.chunks_exact_mut(c).for_each(|pixel| {
                normalize(pixel);
            });
        });
        out
    }

    fn dropout(&mut self, x: &Tensor<T>, masks: &Masks<Tensor<T>>, layer: u32, factor: f64) -> Tensor<T> {
        let [_, h, w, c] = x.shape();
        let (mut out, threshold, factor) = (self.uninit(x.shape()), masks.threshold(), T::of(factor));
        let vectors = c.div_ceil(8);
        for_rows(out.values_mut(), w * c, |row, out| {
            let key = [0, 1].map(|word| masks.keys.values()[2 * (row / h) + word].wide() as f32);
            let pixels = out.chunks_exact_mut(c).zip(x.values()[row * w * c..].chunks_exact(c));
            for (column, (out, x)) in pixels.enumerate() {
                for (k, (out, x)) in out.chunks_mut(8).zip(x.chunks(8)).enumerate() {
                    let vector = ((row % h * w + column) * vectors + k) as u32;
                    let dropped = dropped(key, layer, vector, threshold);
                    for ((out, &x), dropped) in out.iter_mut().zip(x).zip(dropped) {
                        *out = if dropped { T::zero() } else { x * factor };
                    }
                }
            }
        });
        out
    }

    fn upsample(&mut self, x: &Tensor<T>) -> Tensor<T> {
        let [n, h, w, c] = x.shape();
        let mut out = self.uninit([n, h * 2, w * 2, c]);
        for_rows(out.values_mut(), 2 * w * c, |row, out| {
            let from = x.values()[row / 2 * w * c..].chunks_exact(c);
            for (two, from) in out.chunks_exact_mut(2 * c).zip(from) {
                two[..c].copy_from_slice(from);
                two[c..].copy_from_slice(from);
            }
        });
        out
    }

    fn conv(&mut self, w: ParamId, x: Operand<Tensor<T>>) -> Tensor<T> {
        let [n, height, width, _] = x.x.shape();
        let mut out = self.uninit([n, height, width, self.params[w].dims().0]);
        self.convolve(w, x, out.values_mut(), |_, y, out| out.copy_from_slice(y));
        out
    }

    fn conv_scale_silu(
        &mut self,
        w: ParamId,
        x: Operand<Tensor<T>>,
        scale: Scale<Tensor<T>>,
        keep: bool,
    ) -> (Tensor<T>, Option<Tensor<T>>) {
        let [n, height, width, _] = x.x.shape();
        let cout = self.params[w].dims().0;
        let mut act = self.uninit([n, height, width, cout]);
        let pre = keep.then(|| self.conv(w, x));
        let scale = |row: usize| scale_row(&scale, row / height, cout);
        match &pre {
            Some(pre) => for_rows(
                act.values_mut(),
                width * cout,
                #[inline(always)]
                |row, out| scale_silu(scale(row), &pre.values()[row * out.len()..][..out.len()], out),
            ),
            None => self.convolve(
                w,
                x,
                act.values_mut(),
                #[inline(always)]
                |row, y, out| scale_silu(scale(row), y, out),
            ),
        }
        (act, pre)
    }

    fn conv_mp_sum(
        &mut self,
        w: ParamId,
        x: Operand<Tensor<T>>,
        residual: &Tensor<T>,
        t: f64,
        clip: Option<f64>,
    ) -> Tensor<T> {
        let (wa, wb) = mp_sum_weights(t);
        let (wa, wb) = (T::of(wa), T::of(wb));
        let limit = clip.map_or(T::infinity(), T::of);
        let mut out = self.uninit(residual.shape());
        self.convolve(
            w,
            x,
            out.values_mut(),
            #[inline(always)]
            |row, y, out| {
                let residual = &residual.values()[row * out.len()..];
                for ((out, &y), &r) in out.iter_mut().zip(y).zip(residual) {
                    let sum = wa * r + wb * y;
                    // Written so that NaN passes through, as in PyTorch.
                    *out = if sum > limit {
                        limit
                    } else if sum < -limit {
                        -limit
                    } else {
                        sum
                    };
                }
            },
        );
        out
    }

    fn attention(&mut self, qkv: &Tensor<T>, heads: usize) -> Tensor<T> {
        attention::forward(&self.pool, qkv, heads, self.bf16)
    }
}

/// c_skip and c_out (EDM table 1).
fn output_scales<T: Real>(sigma: T, sigma_data: f64) -> (T, T) {
    let data = T::of(sigma_data);
    let total = sigma * sigma + data * data;
    (data * data / total, sigma * data / total.sqrt())
}

/// The scales of one block for one image.
fn scale_row<'a, T: Real>(scale: &Scale<'a, Tensor<T>>, image: usize, channels: usize) -> &'a [T] {
    &scale.all.values()[image * scale.all.shape()[3] + scale.offset..][..channels]
}
