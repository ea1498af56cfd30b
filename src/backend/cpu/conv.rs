//! Convolutions as implicit matrix products: forward, input gradient, weight gradient.
//!
//! With NHWC data the three horizontal taps of a pixel lie side by side in memory. So a 3x3
//! convolution is three matrix products, one for each row of taps, whose left matrix has rows of
//! 3 C values that overlap: nothing is copied but the input itself, once, into rows that are
//! separated by a zero pixel (right edge of one row and left edge of the next) and images that are
//! separated by a zero row. Concatenation, scaling and mp_silu happen during that copy.
//!
//! ```text
//! y[m, :] = sum over dy of  x[m + dy*(w+1) .. + 3, :]  (3C values)  times  W[dy]  (3C x Cout)
//! ```
//!
//! Cost: 9 C Cout multiply-adds a pixel (1x1: C Cout), 1 in w+1 of them wasted on the zero pixel. The
//! work is cut into bands of image rows, so that a band's input stays in cache; few-pixel layers
//! are one band and the product itself is spread over the threads.

use super::real::{Mat, Real, Threads, matmul, simd};
use super::tensor::{Pool, Tensor};
use crate::backend::Shape;
use rayon::prelude::*;
use std::sync::Arc;

/// Pixels of a band. Its input (some hundred channels) fits the L2 cache of one core.
const BAND_PIXELS: usize = 1024;

/// Where the values of image row `row` (counted over the whole batch) come from: `read(row, dst)` writes
/// w * channels values.
pub struct Rows<'a, T> {
    /// Shape of the image that is read.
    pub shape: Shape,
    /// Writes one row.
    pub read: &'a (dyn Fn(usize, &mut [T]) + Sync),
}

/// The rows `first..first + count` of a batch, copied with the zero pixels and rows around them, and a zero pixel
/// after all of them.
struct Band<T: Real> {
    data: Tensor<T>,
    /// Values from one pixel to the next: the channels.
    channels: usize,
    /// Pixels from one row to the next.
    pitch: usize,
    /// Rows of an image.
    height: usize,
    /// Rows of zeros above each image: one, or none for a 1x1 convolution.
    gap: usize,
    /// First image row that the band gives results for.
    first: usize,
}

impl<T: Real> Band<T> {
    /// Image row `row` among the rows of the batch with the zero rows between images.
    fn padded_row(&self, row: usize) -> usize {
        row + (row / self.height + 1) * self.gap
    }

    /// First result row of the product that belongs to image row `row`.
    fn result(&self, row: usize) -> usize {
        (self.padded_row(row) - self.padded_row(self.first)) * self.pitch
    }

    fn new(pool: &Arc<Pool<T>>, rows: &Rows<T>, taps: usize, first: usize, count: usize) -> Self {
        let [_, h, w, c] = rows.shape;
        if taps == 1 {
            let mut data = Tensor::uninit(pool, [1, 1, count * w + 1, c]);
            simd(|| {
                let (lines, corner) = data.values_mut().split_at_mut(count * w * c);
                corner.fill(T::zero());
                for (i, dst) in lines.chunks_exact_mut(w * c).enumerate() {
                    (rows.read)(first + i, dst);
                }
            });
            return Self { data, channels: c, pitch: w, height: h, gap: 0, first };
        }
        let pitch = w + 1;
        let mut band = Self { data: Tensor::uninit(pool, [0; 4]), channels: c, pitch, height: h, gap: 1, first };
        let top = band.padded_row(first) - 1;
        let padded = band.padded_row(first + count - 1) + 2 - top;
        let mut data = Tensor::uninit(pool, [1, 1, padded * pitch + 2, c]);
        simd(|| {
            let (lines, corner) = data.values_mut().split_at_mut(padded * pitch * c);
            corner.fill(T::zero());
            for (i, line) in lines.chunks_exact_mut(pitch * c).enumerate() {
                let (edge, dst) = line.split_at_mut(c);
                edge.fill(T::zero());
                let (image, y) = ((top + i) / (h + 1), (top + i) % (h + 1));
                if y == 0 || image * h + y > rows.shape[0] * h {
                    dst.fill(T::zero());
                } else {
                    (rows.read)(image * h + y - 1, dst);
                }
            }
        });
        band.data = data;
        band
    }
}

/// Below this many pixels a band spends more on packing the weights than its thread gains.
const MIN_BAND_PIXELS: usize = 512;

/// Cuts `rows` image rows of `width` pixels into bands of about equal height, as many for each thread, and
/// says who shares the work.
fn bands(rows: usize, width: usize) -> (usize, Threads) {
    let threads = rayon::current_num_threads();
    if rows * width < threads * MIN_BAND_PIXELS {
        return (rows, Threads::All);
    }
    let count = (rows * width).div_ceil(BAND_PIXELS).next_multiple_of(threads);
    (rows.div_ceil(count), Threads::One)
}

/// Longest sum that `gemm` never cuts into parts. Where it cuts longer ones depends on the size of the product,
/// so on the batch, which the bits of an image must not.
const MAX_SUM: usize = 512;

/// Convolution of `rows` with `weight` `[taps][C][cout]`: calls `done(row, y, out)` for each image row, where `y`
/// holds w * cout results and `out` is that row's share of `out`.
pub fn conv<T: Real>(
    pool: &Arc<Pool<T>>,
    rows: Rows<T>,
    weight: &[T],
    taps: usize,
    cout: usize,
    out: &mut [T],
    done: impl Fn(usize, &[T], &mut [T]) + Sync,
) {
    let [n, h, w, c] = rows.shape;
    let total = n * h;
    if total * w == 0 {
        return;
    }
    let (height, threads) = bands(total, w);
    let per_row = out.len() / total;
    out.par_chunks_mut(height * per_row).enumerate().for_each(|(i, out)| {
        let first = i * height;
        let count = height.min(total - first);
        let band = Band::new(pool, &rows, taps, first, count);
        // One row alone would be a product of a vector, which sums in another order.
        let m = (band.result(first + count - 1) + w).max(2);
        let mut y = Tensor::uninit(pool, [1, 1, m, cout]);
        let (side, k) = (taps.isqrt(), c * taps.isqrt());
        let block = k.div_ceil(k.div_ceil(MAX_SUM));
        for (dy, k0) in (0..side).flat_map(|dy| (0..k).step_by(block).map(move |k0| (dy, k0))) {
            let a = Mat::new(&band.data.values()[dy * band.pitch * c + k0..], c);
            let b = Mat::new(&weight[(dy * k + k0) * cout..], cout);
            matmul((m, cout, block.min(k - k0)), y.values_mut(), dy + k0 > 0, a, b, T::one(), threads);
        }
        simd(|| {
            for (j, out) in out.chunks_exact_mut(per_row).enumerate() {
                let start = band.result(first + j);
                done(first + j, &y.values()[start * cout..][..w * cout], out);
            }
        });
    });
}

/// Bytes of weight gradient that the partial sums of [`wgrad`] may take together.
const PARTIAL_BYTES: usize = 16 << 20;

/// Weight gradient: adds `gain` * sum over pixels of `x[pixel + tap]` `grad[pixel]` to `out` `[taps][C][cout]`
/// (or overwrites it, unless `accumulate`).
///
/// Bands are summed in a fixed order that depends on the shapes only, so the bits do not depend on
/// the number of threads.
pub fn wgrad<T: Real>(
    pool: &Arc<Pool<T>>,
    rows: Rows<T>,
    grad: Rows<T>,
    taps: usize,
    gain: T,
    out: &mut [T],
    accumulate: bool,
) {
    let [n, h, w, c] = rows.shape;
    let cout = grad.shape[3];
    let total = n * h;
    let height = (BAND_PIXELS / w).max(1);
    let parts = (total.div_ceil(height)).min(PARTIAL_BYTES / size_of_val(out).max(1)).clamp(1, 16);

    let sum_bands = |part: usize, out: &mut [T], mut accumulate: bool, threads: Threads| {
        let per_part = total.div_ceil(parts);
        let end = total.min((part + 1) * per_part);
        let height = if threads == Threads::All { per_part } else { height };
        let mut first = part * per_part;
        while first < end {
            let count = height.min(end - first);
            let x = Band::new(pool, &rows, taps, first, count);
            let g = Band::new(pool, &grad, taps, first, count);
            let m = x.result(first + count - 1) + w;
            for dy in 0..taps.isqrt() {
                // Result row m is pixel m of the band; its gradient is one row and one pixel further
                // in, where the zero pixels between the rows cancel what the product computes there.
                let skip = x.gap * (x.pitch + 1) * cout;
                let k = c * taps.isqrt();
                let a = Mat::new(&x.data.values()[dy * x.pitch * x.channels..], c).t();
                let b = Mat::new(&g.data.values()[skip..], cout);
                let out = &mut out[dy * k * cout..][..k * cout];
                matmul((k, cout, m), out, accumulate, a, b, gain, threads);
            }
            accumulate = true;
            first += count;
        }
        if !accumulate {
            out.fill(T::zero());
        }
    };
    if parts == 1 {
        return sum_bands(0, out, accumulate, Threads::All);
    }
    let mut partial = Tensor::uninit(pool, [parts, 1, 1, out.len()]);
    let len = out.len();
    partial
        .values_mut()
        .par_chunks_mut(len)
        .enumerate()
        .for_each(|(part, out)| sum_bands(part, out, false, Threads::One));
    super::real::for_rows(out, len.min(4096), |i, out| {
        for (part, values) in partial.values().chunks_exact(len).enumerate() {
            let values = &values[i * len.min(4096)..][..out.len()];
            if part == 0 && !accumulate {
                out.copy_from_slice(values);
            } else {
                out.iter_mut().zip(values).for_each(|(o, &v)| *o += v);
            }
        }
    });
}

/// The weight of the input gradient: taps reversed, channels exchanged, `[taps][cout][cin]`.
pub fn transpose<T: Real>(pool: &Arc<Pool<T>>, weight: &[T], taps: usize, cin: usize, cout: usize) -> Tensor<T> {
    const TILE: usize = 16;
    let mut out = Tensor::uninit(pool, [1, taps, cout, cin]);
    out.values_mut().par_chunks_mut(TILE * cin).enumerate().for_each(|(i, out)| {
        // A chunk may reach over the end of a tap where cout is no multiple of the tile.
        for (j, row) in out.chunks_mut(cin).enumerate() {
            let (tap, co) = ((i * TILE + j) / cout, (i * TILE + j) % cout);
            let from = &weight[(taps - 1 - tap) * cin * cout + co..];
            row.iter_mut().enumerate().for_each(|(ci, o)| *o = from[ci * cout]);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn an_image_does_not_depend_on_its_batch() {
        let noise = |len, image| {
            let mut values = vec![0f32; len];
            Stream::new(1, Purpose::Init, image).normals(&mut values);
            values
        };
        let pool = Arc::default();
        for [h, w] in [[1, 1], [2, 1], [4, 4], [8, 8], [40, 24]] {
            for (c, cout, taps) in [(128, 64, 9), (256, 64, 9), (600, 16, 9), (600, 64, 1), (130, 130, 9), (5, 3, 9)] {
                let weight = noise(taps * c * cout, 99);
                let run = |first: usize, n: usize| {
                    let rows =
                        |row: usize, dst: &mut [f32]| dst.copy_from_slice(&noise(w * c, (first * h + row) as u64));
                    let rows = Rows { shape: [n, h, w, c], read: &rows };
                    let mut out = vec![0.0; n * h * w * cout];
                    conv(&pool, rows, &weight, taps, cout, &mut out, |_, y, out| out.copy_from_slice(y));
                    out
                };
                let together: Vec<u32> = run(0, 5).iter().map(|x| x.to_bits()).collect();
                let alone: Vec<u32> = (0..5).flat_map(|i| run(i, 1)).map(f32::to_bits).collect();
                let differing = together.iter().zip(&alone).filter(|(a, b)| a != b).count();
                assert_eq!(differing, 0, "values of {} at {h}x{w}, {c} to {cout} channels, {taps} taps", alone.len());
            }
        }
    }
}
