//! The two number types of the CPU backend, and how its loops use the machine: SIMD, threads, and
//! matrix products (the `gemm` crate).

use rayon::prelude::*;

/// A number type: f32, the working precision, or f64, in which finite differences prove the gradients.
pub trait Real: num_traits::Float + num_traits::NumAssign + std::fmt::Debug + Default + Send + Sync + 'static {
    /// Rounds a scalar to this type.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn wide(self) -> f64;
    /// e^x, written so that loops over it become SIMD code.
    fn exp_simd(self) -> Self;
    /// The same values, if they are f32.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The same values, if they are f32.
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn wide(self) -> f64 {
        self
    }
    fn exp_simd(self) -> Self {
        self.exp()
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    /// Exact to 2 ulp between -87 and 88, constant beyond. With x = n ln 2 + r and |r| <= ln(2)/2, it is a Taylor
    /// series in r.
    #[inline(always)]
    fn exp_simd(self) -> Self {
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 88.0 { 88.0 } else { x };
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
        let p = 1.0 / 720.0 + r * (1.0 / 5040.0);
        let p = (((p * r + 1.0 / 120.0) * r + 1.0 / 24.0) * r + 1.0 / 6.0) * r + 0.5;
        let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        ((p * r) * r + r + 1.0) * power
    }
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
}

/// Runs a loop with the widest SIMD instructions that the machine has.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Below this many values, starting a second thread costs more than it saves.
const SERIAL: usize = 1 << 14;

/// Calls `f(i, row)` for each row of `len` values of `out`, on all threads, in SIMD code.
pub fn for_rows<T: Real>(out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    // The only call of `f`, so that it is compiled as part of the loop, for the same instructions.
    let some_rows = |first: usize, chunk: &mut [T]| {
        simd(
            #[inline(always)]
            || {
                for (i, row) in chunk.chunks_mut(len).enumerate() {
                    f(first + i, row);
                }
            },
        );
    };
    if out.len() <= SERIAL {
        return some_rows(0, out);
    }
    let rows = (SERIAL / 2 / len).max(1);
    out.par_chunks_mut(rows * len).enumerate().for_each(|(i, chunk)| some_rows(i * rows, chunk));
}

/// A matrix in memory: `data[row * rows + column * cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    /// Its values; the slice may reach beyond the matrix.
    pub data: &'a [T],
    /// Distance between rows.
    pub rows: usize,
    /// Distance between columns.
    pub cols: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major with `rows` values from row to row.
    pub fn new(data: &'a [T], rows: usize) -> Self {
        Self { data, rows, cols: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { data: self.data, rows: self.cols, cols: self.rows }
    }
}

/// Where a product goes: `values[row * rows + column]`.
pub struct Dst<'a, T> {
    /// May reach beyond the product.
    pub values: &'a mut [T],
    /// Distance between rows.
    pub rows: usize,
    /// Whether it is added to what is there.
    pub accumulate: bool,
}

impl<'a, T> Dst<'a, T> {
    /// Instead of what is there, with `rows` values from row to row.
    pub fn new(values: &'a mut [T], rows: usize) -> Self {
        Self { values, rows, accumulate: false }
    }
}

/// Which threads a matrix product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling one.
    One,
    /// All of the pool.
    All,
}

/// dst (m x n) = `beta` * a (m x k) b (k x n).
pub fn matmul<T: Real>((m, n, k): (usize, usize, usize), dst: Dst<T>, a: Mat<T>, b: Mat<T>, beta: T, threads: Threads) {
    if m == 0 || n == 0 {
        return;
    }
    let last = |x: &Mat<T>, rows: usize, cols: usize| (rows - 1) * x.rows + (cols - 1) * x.cols;
    assert!(k > 0 && n <= dst.rows && (m - 1) * dst.rows + n <= dst.values.len());
    assert!(last(&a, m, k) < a.data.len() && last(&b, k, n) < b.data.len());
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the assertions above bound every index that the product reads or writes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.values.as_mut_ptr(),
            1,
            dst.rows as isize,
            dst.accumulate,
            a.data.as_ptr(),
            a.cols as isize,
            a.rows as isize,
            b.data.as_ptr(),
            b.cols as isize,
            b.rows as isize,
            T::one(),
            beta,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Parts that a sum over contiguous values is made in, so that its loop becomes SIMD code.
const LANES: usize = 16;

/// The sum of products `a[i] b[i]`, in an order that the number of values alone decides.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [T::zero(); LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b);
    sums.into_iter().chain(rest).fold(T::zero(), |a, b| a + b)
}

/// The sum of values, in an order that their number alone decides.
#[inline(always)]
pub fn sum<T: Real>(values: &[T]) -> T {
    fold(
        values,
        T::zero(),
        #[inline(always)]
        |a, b| a + b,
    )
}

/// The largest value, NaN apart.
#[inline(always)]
pub fn max<T: Real>(values: &[T]) -> T {
    fold(
        values,
        T::neg_infinity(),
        #[inline(always)]
        |most, x| if x > most { x } else { most },
    )
}

/// `f` of all values, begun with `from`, which leaves the others as they are, in each part.
#[inline(always)]
fn fold<T: Real>(values: &[T], from: T, f: impl Fn(T, T) -> T) -> T {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut parts = [from; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            parts[i] = f(parts[i], chunk[i]);
        }
    }
    parts.iter().chain(rest).fold(from, |a, &b| f(a, b))
}

/// SiLU divided by the magnitude of its output for unit normal input (eq. 81).
#[inline(always)]
pub fn mp_silu<T: Real>(x: T) -> T {
    x / ((T::one() + (-x).exp_simd()) * T::of(0.596))
}

/// Derivative of [`mp_silu`].
#[inline(always)]
pub fn mp_silu_grad<T: Real>(x: T) -> T {
    let s = T::one() / (T::one() + (-x).exp_simd());
    s * (T::one() + x * (T::one() - s)) / T::of(0.596)
}

/// eps of every normalisation, added to the root mean square (EDM2, eq. 30 and 66).
pub const NORM_EPS: f64 = 1e-4;

/// The median of some numbers, such as times.
///
/// # Panics
/// If there are none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = (0.0, 0.0);
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let err = (f64::from(x.exp_simd()) - want).abs() / want;
            if err > worst.0 {
                worst = (err, x);
            }
        }
        assert!(worst.0 < 2.0 * f64::from(f32::EPSILON), "relative error {} at {}", worst.0, worst.1);
    }
}
