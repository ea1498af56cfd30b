//! Parameters with their optimizer state: weight normalisation, Adam, moving averages.
//!
//! A weight is held as a matrix `[taps * cin][cout]` (PyTorch: `[cout][cin][taps]`), which is how products
//! read it, so an output row of the paper is a column here and every loop runs over contiguous
//! values with one coefficient for each column.
//!
//! Normalisation (EDM2 eq. 47, 66): normalize(w) = w / (1e-4 + rms(w)), the effective weight is
//! normalize(w) / sqrt(fan_in). Forced normalisation replaces the stored weight by normalize(w)
//! before each micro-batch; it only scales a column, so any number of rounds is one factor.
//!
//! Cost of a step: reads weight, gradient, both moments and each average, writes all but the
//! gradient, and the effective weight: about 4 * (9 + 2 averages) bytes a value.

use super::bf16::Packed;
use super::conv::Filter;
use crate::backend::codec::Reach;
use crate::backend::{BackendError, Normalization, OptimizerStep, Slot, StepStats, Values};
use crate::params::{ParamKind, ParamSpec};
use crate::real::{NORM_EPS, Real, dot, for_rows, simd};
use rayon::prelude::*;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// State that only training needs.
struct OptimizerState<T> {
    grad: Vec<T>,
    /// Whether the gradient belongs to a finished step, so that the next one overwrites it.
    stale: bool,
    m: Vec<T>,
    v: Vec<T>,
    averages: Vec<Vec<T>>,
}

/// One parameter.
pub struct Param<T> {
    spec: ParamSpec,
    /// Stored values. Empty where nothing but the effective weight is needed (sampling).
    weight: Vec<T>,
    /// Values that the network computes with; equal to the stored ones for gains and buffers.
    effective: Vec<T>,
    /// Whether `effective` holds stored values that wait for their normalisation (sampling).
    raw: bool,
    /// The effective values for products in bfloat16, made for the first of those.
    packed: OnceLock<Option<Packed>>,
    training: Option<OptimizerState<T>>,
}

debug!(Param<T> { spec } [T]);

/// Rows of the matrix whose sum is made before it is added to other sums. It is fixed, so that the bits do not depend
/// on the number of threads.
const SUM_ROWS: usize = 32;

/// Sum over rows of f(row index) for each column, in a fixed order.
fn column_sums<T: Real, const N: usize>(
    rows: usize,
    cols: usize,
    f: impl Fn(usize, &mut [Vec<T>; N]) + Sync,
) -> [Vec<T>; N] {
    let zero = || std::array::from_fn(|_| vec![T::zero(); cols]);
    let partial: Vec<[Vec<T>; N]> = (0..rows.div_ceil(SUM_ROWS))
        .into_par_iter()
        .map(|part| {
            let mut sums = zero();
            simd(|| (part * SUM_ROWS..rows.min((part + 1) * SUM_ROWS)).for_each(|row| f(row, &mut sums)));
            sums
        })
        .collect();
    let mut total: [Vec<T>; N] = zero();
    for part in partial {
        for (total, part) in total.iter_mut().zip(&part) {
            total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
        }
    }
    total
}

/// Root mean square of each column.
fn column_rms<T: Real>(w: &[T], cols: usize) -> Vec<T> {
    let rows = w.len() / cols;
    let [sums] = column_sums(rows, cols, |row, [sum]| {
        sum.iter_mut().zip(&w[row * cols..]).for_each(|(s, &w)| *s += w * w);
    });
    sums.into_iter().map(|s: T| (s / T::of(rows as f64)).sqrt()).collect()
}

/// Factor of a column of this rms after `rounds` normalisations, and its rms then.
fn normalized<T: Real>(mut rms: T, rounds: usize) -> (T, T) {
    let mut factor = T::one();
    // A row of zeros stays one; the product of many 1 / NORM_EPS would be infinite.
    if rms == T::zero() {
        return (factor, rms);
    }
    for _ in 0..rounds {
        let f = T::one() / (T::of(NORM_EPS) + rms);
        factor *= f;
        rms *= f;
    }
    (factor, rms)
}

impl<T: Real> Param<T> {
    /// A parameter of zeros, with room for its gradient, moments and so many averages if `training` says how many.
    pub fn new(spec: &ParamSpec, training: Option<usize>) -> Self {
        let zeros = || vec![T::zero(); spec.numel()];
        let training = training.map(|averages| {
            let room = |wanted: bool| if wanted { zeros() } else { Vec::new() };
            OptimizerState {
                grad: room(spec.trained()),
                stale: true,
                m: room(spec.trained()),
                v: room(spec.trained()),
                averages: (0..averages).map(|_| zeros()).collect(),
            }
        });
        let weight = if training.is_some() { zeros() } else { Vec::new() };
        let raw = spec.is_weight();
        Self { spec: spec.clone(), weight, effective: zeros(), raw, packed: OnceLock::new(), training }
    }

    /// Values that the network computes with: weights as `[taps][cin][cout]`.
    pub fn effective(&self) -> &[T] {
        &self.effective
    }

    /// The effective weight of a convolution for products in bfloat16, if [it can be packed](Filter::pack).
    pub fn packed(&self) -> Option<&Packed> {
        let (cout, _, taps) = self.dims();
        self.packed.get_or_init(|| Filter::new(&self.effective, cout, Reach::of_taps(taps).window()).pack()).as_ref()
    }

    /// cout, cin and taps of a weight; a plain vector is 1 x len.
    pub fn dims(&self) -> (usize, usize, usize) {
        match self.spec.kind {
            ParamKind::Weight { cout, cin, taps } => (cout, cin, taps),
            _ => (self.spec.numel(), 1, 1),
        }
    }

    /// Where the gradient is added up, and whether there already is one to add to.
    pub fn grad_mut(&mut self) -> (&mut [T], bool) {
        let training = self.training.as_mut().expect("gradients are computed by a training backend");
        (&mut training.grad, !std::mem::replace(&mut training.stale, false))
    }

    fn slot(&mut self, slot: Slot) -> Result<&mut Vec<T>, BackendError> {
        let missing = BackendError::NotTraining(slot);
        match (slot, &mut self.training) {
            (Slot::Weight, None) if self.raw || !self.spec.is_weight() => Ok(&mut self.effective),
            (Slot::Weight, Some(_)) => Ok(&mut self.weight),
            (Slot::Grad, Some(t)) => Ok(&mut t.grad),
            (Slot::AdamM, Some(t)) => Ok(&mut t.m),
            (Slot::AdamV, Some(t)) => Ok(&mut t.v),
            (Slot::Ema(i), Some(t)) => t.averages.get_mut(i).ok_or(missing),
            _ => Err(missing),
        }
    }

    /// Sets a slot from values in PyTorch's order.
    pub fn write(&mut self, slot: Slot, values: &[T]) -> Result<(), BackendError> {
        let expected = self.spec.numel();
        if values.len() != expected {
            return Err(BackendError::ParamSize { name: self.spec.name.clone(), found: values.len(), expected });
        }
        self.raw |= slot == Slot::Weight && self.spec.is_weight();
        let (cout, cin, taps) = self.dims();
        let to = self.slot(slot)?;
        for_rows(to, cout, |row, to| {
            let (tap, ci) = (row / cin, row % cin);
            to.iter_mut().enumerate().for_each(|(co, x)| *x = values[(co * cin + ci) * taps + tap]);
        });
        if !self.spec.is_weight() && slot == Slot::Weight {
            self.effective.copy_from_slice(values);
        }
        Ok(())
    }

    /// Reads a slot in PyTorch's order.
    pub fn read(&mut self, slot: Slot) -> Result<Vec<T>, BackendError> {
        let (cout, cin, taps) = self.dims();
        let numel = self.spec.numel();
        if !self.spec.trained() && matches!(slot, Slot::Grad | Slot::AdamM | Slot::AdamV) {
            return Ok(vec![T::zero(); numel]);
        }
        let from = self.slot(slot)?;
        let mut values = vec![T::zero(); numel];
        for_rows(&mut values, cin * taps, |co, to| {
            to.iter_mut().enumerate().for_each(|(i, x)| *x = from[(i % taps * cin + i / taps) * cout + co]);
        });
        Ok(values)
    }

    /// See [`crate::backend::TrainingBackend::exchange`].
    pub fn exchange(&mut self, slot: Slot, exchange: &mut dyn FnMut(Values)) -> Result<(), BackendError> {
        if slot == Slot::Grad {
            let (grad, kept) = self.grad_mut();
            if !kept {
                grad.fill(T::zero());
            }
        }
        let values = self.slot(slot)?;
        if let Some(values) = T::as_f32_mut(values) {
            exchange(Values::Host(values));
            return Ok(());
        }
        let mut narrow: Vec<f32> = values.iter().map(|x| x.wide() as f32).collect();
        exchange(Values::Host(&mut narrow));
        values.iter_mut().zip(narrow).for_each(|(to, x)| *to = T::of(x.into()));
        Ok(())
    }

    /// See [`crate::backend::TrainingBackend::make_effective`].
    pub fn make_effective(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError> {
        self.packed.take();
        let cols = self.dims().0;
        let Some(training) = &self.training else {
            if source != Slot::Weight {
                return Err(BackendError::NotTraining(source));
            }
            if std::mem::take(&mut self.raw) && self.spec.is_weight() {
                let factors = effective_factors(&self.effective, cols, how);
                for_rows(&mut self.effective, cols, |_, row| {
                    row.iter_mut().zip(&factors).for_each(|(x, &f)| *x *= f);
                });
            }
            return Ok(());
        };
        let from = match source {
            Slot::Weight => &self.weight,
            Slot::Ema(i) => training.averages.get(i).ok_or(BackendError::NotTraining(source))?,
            other => return Err(BackendError::NotTraining(other)),
        };
        if self.spec.is_weight() {
            scale_columns(&mut self.effective, from, &effective_factors(from, cols, how));
        } else {
            self.effective.copy_from_slice(from);
        }
        Ok(())
    }

    /// See [`crate::backend::TrainingBackend::optimizer_step`]; returns the squared norm of the gradient.
    pub fn step(&mut self, step: &OptimizerStep) -> Result<StepStats, BackendError> {
        self.packed.take();
        let is_weight = self.spec.is_weight();
        let cols = if is_weight { self.dims().0 } else { 1 };
        let Some(training) = &mut self.training else { return Err(BackendError::NotTraining(Slot::Grad)) };
        if !self.spec.trained() {
            return Ok(StepStats::default());
        }
        let OptimizerState { grad, stale, m, v, averages } = training;
        step.check(averages.len());
        if std::mem::replace(stale, true) {
            grad.fill(T::zero());
        }
        let nonfinite = scale_finite(grad, cols, T::of(step.grad_scale));
        // Each column gets the factor of its forced normalisation, and its gradient is projected.
        let [forced, a, b] = match is_weight {
            true => projection(&self.weight, grad, cols, step.rounds),
            false => [T::one(), T::one(), T::zero()].map(|x| vec![x; cols]),
        };

        // Adam (PyTorch's form) and the moving averages.
        let (beta1, beta2) = (T::of(step.betas.0), T::of(step.betas.1));
        let (rate, root) = step.corrected();
        let (rate, root) = (T::of(rate), T::of(root));
        let eps = T::of(step.eps);
        let one = T::one();
        let chunk = (SUM_ROWS * cols).max(1);
        let norms: Vec<f64> = self
            .weight
            .par_chunks_mut(chunk)
            .zip(grad.par_chunks_mut(chunk))
            .zip(m.par_chunks_mut(chunk))
            .zip(v.par_chunks_mut(chunk))
            .map(|(((w, g), m), v)| {
                simd(
                    #[inline(always)]
                    || {
                        let mut norm = T::zero();
                        let rows = w.chunks_exact_mut(cols).zip(g.chunks_exact_mut(cols));
                        for ((w, g), (m, v)) in rows.zip(m.chunks_exact_mut(cols).zip(v.chunks_exact_mut(cols))) {
                            for i in 0..cols {
                                let x = w[i] * forced[i];
                                let grad = a[i] * g[i] - b[i] * x;
                                m[i] = m[i] + (grad - m[i]) * (one - beta1);
                                v[i] = v[i] * beta2 + grad * grad * (one - beta2);
                                w[i] = x - rate * m[i] / (v[i].sqrt() * root + eps);
                                g[i] = grad;
                            }
                            // Apart, since a sum in the loop would keep it from being SIMD code.
                            norm += dot(g, g);
                        }
                        norm.wide()
                    },
                )
            })
            .collect();
        for (average, &beta) in averages.iter_mut().zip(step.ema_betas) {
            let (weight, rest) = (&self.weight, T::of(1.0 - beta));
            for_rows(average, cols, |row, average| {
                let w = &weight[row * cols..][..cols];
                average.iter_mut().zip(w).for_each(|(e, &w)| *e += (w - *e) * rest);
            });
        }
        self.make_effective(Slot::Weight, Normalization::Train { rounds: step.rounds })?;
        Ok(StepStats { grad_norm: norms.iter().sum(), nonfinite })
    }
}

/// Scales a gradient, and makes zero of what is not finite; returns how many values that were.
fn scale_finite<T: Real>(grad: &mut [T], cols: usize, scale: T) -> u64 {
    let bad = AtomicU64::new(0);
    for_rows(grad, cols, |_, row| {
        let mut count = 0;
        for g in row.iter_mut() {
            *g *= scale;
            if !g.is_finite() {
                *g = T::zero();
                count += 1;
            }
        }
        if count > 0 {
            bad.fetch_add(count, Ordering::Relaxed);
        }
    });
    bad.into_inner()
}

/// The factor of each column's forced normalisation, and a and b of its gradient's projection: with x the forced weight and
/// u = x / (eps + r) / sqrt(K), dL/dx = a g - b x.
fn projection<T: Real>(w: &[T], g: &[T], cols: usize, rounds: usize) -> [Vec<T>; 3] {
    let rows = g.len() / cols;
    let [squares, dots]: [Vec<T>; 2] = column_sums(rows, cols, |row, [squares, dots]| {
        let (w, g) = (&w[row * cols..][..cols], &g[row * cols..][..cols]);
        for i in 0..cols {
            squares[i] += w[i] * w[i];
            dots[i] += w[i] * g[i];
        }
    });
    let count = T::of(rows as f64);
    let [mut forced, mut a, mut b] = [(); 3].map(|()| Vec::with_capacity(cols));
    for (square, dot) in squares.into_iter().zip(dots) {
        let (factor, r) = normalized((square / count).sqrt(), rounds);
        let d = T::of(NORM_EPS) + r;
        let along = T::one() / (d * count.sqrt());
        forced.push(factor);
        a.push(along);
        b.push(if r > T::zero() { along * factor * dot / (count * r * d) } else { T::zero() });
    }
    [forced, a, b]
}

/// Factor of each column from stored to effective weight.
fn effective_factors<T: Real>(w: &[T], cols: usize, how: Normalization) -> Vec<T> {
    let root = T::of(((w.len() / cols) as f64).sqrt());
    column_rms(w, cols).into_iter().map(|r| normalized(r, how.rounds()).0 / root).collect()
}

/// to = from, each column times its factor.
fn scale_columns<T: Real>(to: &mut [T], from: &[T], factors: &[T]) {
    let cols = factors.len();
    for_rows(to, cols, |row, to| {
        let from = &from[row * cols..][..cols];
        for i in 0..cols {
            to[i] = from[i] * factors[i];
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_zeros_stays_one_however_often_it_is_normalised() {
        for rounds in [1, 9, 10, 100] {
            assert_eq!(normalized(0.0_f32, rounds), (1.0, 0.0));
            let (factor, rms) = normalized(3.0_f32, rounds);
            assert!((factor * 3.0 - rms).abs() < 1e-6 && (rms - 1.0).abs() < 1e-3, "{factor} {rms}");
        }
    }
}
