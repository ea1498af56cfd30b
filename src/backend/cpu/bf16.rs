//! Products in bfloat16 with f32 sums, where the processor has AVX-512 BF16: convolutions for sampling.
//!
//! `vdpbf16ps` adds two products to each of 16 sums, twice what an f32 multiply-add does. So weights are packed in pairs of
//! rows, once; the rows of the left matrix are read as they lie in memory:
//!
//! ```text
//! weights  for each block of 64 columns, of the rows 0 1, 2 3, ...:   w[0][0] w[1][0]  w[0][1] w[1][1]  ...
//! sums     6 rows x 64 columns in 24 registers; in each step 4 loads of weights, 6 pairs of values, 24 instructions
//! ```
//!
//! A sum runs over all of k in order, whatever the number of rows: an image does not depend on its batch.
//!
//! The bound is the instruction rate: on Zen 4 one `vdpbf16ps` a cycle at 512 bits. A block of columns of a 3x3
//! convolution of 256 channels is 98 KB of weights, which stay in the L2 cache and are read at 11 bytes a cycle.

use rayon::prelude::*;

use crate::real::{Dst, Mat, Threads};

/// Columns that are summed at once.
const BLOCK: usize = 64;
/// Columns of a register.
const LANES: usize = 16;
/// Rows that are summed at once.
const ROWS: usize = 6;

/// Whether this processor has the instructions.
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Right matrices `[parts][k][cout]` of products, k even, rounded and packed.
#[derive(Clone)]
pub struct Packed {
    values: Vec<u16>,
    k: usize,
    cout: usize,
}

debug!(Packed { k, cout });

impl Packed {
    /// Packs matrices of `k` rows, an even number, and `cout` columns.
    pub fn new(weight: &[f32], k: usize, cout: usize) -> Self {
        let wide = cout.next_multiple_of(LANES);
        let parts = weight.len() / (k * cout);
        let mut values = vec![0; parts * k * wide];
        values.par_chunks_mut(k * wide).zip(weight.par_chunks(k * cout)).for_each(|(to, from)| {
            // Every column has k values, so a block begins k times as far in as the columns before it.
            for (block, to) in to.chunks_mut(k * BLOCK).enumerate() {
                let columns = to.len() / k;
                for (row, from) in from.chunks_exact(cout).enumerate() {
                    let from = &from[block * BLOCK..cout.min((block + 1) * BLOCK)];
                    let to = &mut to[row / 2 * 2 * columns + row % 2..];
                    from.iter().enumerate().for_each(|(i, &x)| to[2 * i] = half::bf16::from_f32(x).to_bits());
                }
            }
        });
        Self { values, k, cout }
    }

    /// Matrix number `part`.
    fn part(&self, part: usize) -> &[u16] {
        let size = self.k * self.cout.next_multiple_of(LANES);
        &self.values[part * size..][..size]
    }
}

/// Rounds values to bfloat16, to nearest even.
pub fn narrow(from: &[f32]) -> Vec<u16> {
    crate::real::simd(|| from.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect())
}

/// dst [m, cout] = a [m, k], whose rows are contiguous, times matrix `part` of `b`.
///
/// # Panics
/// If the slices are too short, or the processor lacks the instructions.
pub fn product(m: usize, dst: Dst<f32>, a: Mat<u16>, b: &Packed, part: usize, threads: Threads) {
    assert!(is_available(), "AVX-512 BF16");
    let (k, cout) = (b.k, b.cout);
    assert!(a.cols == 1 && m > 0 && (m - 1) * a.rows + k <= a.data.len());
    assert!(cout <= dst.rows && (m - 1) * dst.rows + cout <= dst.values.len());
    let to = Target { dst: dst.values.as_mut_ptr(), rows: dst.rows, accumulate: dst.accumulate, a_rows: a.rows };
    let block = |block: usize| {
        let (first, columns) = (block * BLOCK, BLOCK.min(cout - block * BLOCK));
        let b = &b.part(part)[first * k..][..columns.next_multiple_of(LANES) * k];
        for row in (0..m).step_by(ROWS) {
            // SAFETY: the assertions above bound every access; blocks write columns of their own.
            unsafe { to.block(row, ROWS.min(m - row), first, columns, &a.data[row * a.rows..], b) };
        }
    };
    match threads {
        Threads::One => (0..cout.div_ceil(BLOCK)).for_each(block),
        Threads::All => (0..cout.div_ceil(BLOCK)).into_par_iter().for_each(block),
    }
}

/// Where the sums are written.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct Target {
    dst: *mut f32,
    rows: usize,
    accumulate: bool,
    a_rows: usize,
}

// SAFETY: each thread writes columns that no other one does.
unsafe impl Sync for Target {}
// SAFETY: as above.
unsafe impl Send for Target {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{LANES, Target};

    impl Target {
        /// Sums of `rows` rows from `row` on and `columns` columns from `first` on.
        ///
        /// # Safety
        /// The processor has AVX-512 BF16; all rows and columns are within `dst` and `a`.
        pub unsafe fn block(self, row: usize, rows: usize, first: usize, columns: usize, a: &[u16], b: &[u16]) {
            // SAFETY: the caller's promise.
            unsafe {
                let dst = self.dst.add(row * self.rows + first);
                match rows {
                    1 => self.rows::<1>(dst, columns, a, b),
                    2 => self.rows::<2>(dst, columns, a, b),
                    3 => self.rows::<3>(dst, columns, a, b),
                    4 => self.rows::<4>(dst, columns, a, b),
                    5 => self.rows::<5>(dst, columns, a, b),
                    _ => self.rows::<6>(dst, columns, a, b),
                }
            }
        }

        #[inline]
        unsafe fn rows<const R: usize>(self, dst: *mut f32, columns: usize, a: &[u16], b: &[u16]) {
            // SAFETY: the caller's promise.
            unsafe {
                match columns.div_ceil(LANES) {
                    1 => self.sum::<R, 1>(dst, columns, a, b),
                    2 => self.sum::<R, 2>(dst, columns, a, b),
                    3 => self.sum::<R, 3>(dst, columns, a, b),
                    _ => self.sum::<R, 4>(dst, columns, a, b),
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn sum<const R: usize, const C: usize>(self, dst: *mut f32, columns: usize, a: &[u16], b: &[u16]) {
            let mut sums = [[_mm512_setzero_ps(); C]; R];
            // The last register may be wider than the matrix.
            let mask = |j: usize| ((1u32 << (columns - j * LANES).min(LANES)) - 1) as __mmask16;
            if self.accumulate {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: masked to the columns that are there.
                        *sum = unsafe { _mm512_maskz_loadu_ps(mask(j), dst.add(i * self.rows + j * LANES)) };
                    }
                }
            }
            let (mut a, step) = (a.as_ptr(), 2 * LANES);
            for b in b.chunks_exact(C * step) {
                // SAFETY: C registers of `b`; two values of each of R rows of `a`.
                unsafe {
                    let mut w = [_mm512_setzero_si512(); C];
                    for (j, w) in w.iter_mut().enumerate() {
                        *w = _mm512_loadu_si512(b.as_ptr().add(j * step).cast());
                    }
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let pair = _mm512_set1_epi32(a.add(i * self.a_rows).cast::<i32>().read_unaligned());
                        for (sum, &w) in sums.iter_mut().zip(&w) {
                            *sum = _mm512_dpbf16_ps(
                                *sum,
                                transmute::<__m512i, __m512bh>(pair),
                                transmute::<__m512i, __m512bh>(w),
                            );
                        }
                    }
                    a = a.add(2);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { _mm512_mask_storeu_ps(dst.add(i * self.rows + j * LANES), mask(j), sum) };
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Target {
    unsafe fn block(self, _: usize, _: usize, _: usize, _: usize, _: &[u16], _: &[u16]) {
        unreachable!("`product` asks whether the instructions are there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn noise(len: usize, key: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        Stream::new(5, Purpose::Init, key).normals(&mut values);
        values
    }

    #[test]
    fn products_are_those_of_the_rounded_values() {
        if !is_available() {
            return eprintln!("skipped: no AVX-512 BF16");
        }
        for (m, k, cout) in [(1, 2, 1), (6, 32, 64), (7, 30, 65), (13, 96, 130), (100, 576, 192), (5, 10, 16)] {
            let (a_rows, dst_rows, parts) = (k + 4, cout + 3, 2);
            let (x, w) = (noise(m * a_rows, 1), noise(parts * k * cout, 2));
            let a = narrow(&x);
            let b = Packed::new(&w, k, cout);
            let start = noise(m * dst_rows, 3);
            for (part, accumulate, threads) in [(0, false, Threads::One), (1, true, Threads::All)] {
                let mut dst = start.clone();
                let to = Dst { values: &mut dst, rows: dst_rows, accumulate };
                product(m, to, Mat::new(&a, a_rows), &b, part, threads);
                let round = |x: f32| f64::from(half::bf16::from_f32(x));
                for (i, (&got, &before)) in dst.iter().zip(&start).enumerate() {
                    let (row, column) = (i / dst_rows, i % dst_rows);
                    if column >= cout {
                        assert_eq!(got, before, "column {column} is not of the result");
                        continue;
                    }
                    let at = |j: usize| w[(part * k + j) * cout + column];
                    let sum: f64 = (0..k).map(|j| round(x[row * a_rows + j]) * round(at(j))).sum();
                    let want = sum + if accumulate { f64::from(before) } else { 0.0 };
                    // k roundings to f32 of sums of about sqrt(k).
                    let bound = (k as f64) * f64::from(f32::EPSILON) * (k as f64).sqrt();
                    assert!((f64::from(got) - want).abs() <= bound, "{m} {k} {cout}: {got} instead of {want}");
                }
            }
        }
    }
}
