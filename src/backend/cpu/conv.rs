//! Convolutions as implicit matrix products: forward, input gradient, weight gradient.
//!
//! With NHWC data the three horizontal taps of a pixel lie side by side in memory. So a 3x3
//! convolution is three matrix products, one for each row of taps, whose left matrix has rows of
//! 3 C values that overlap: nothing is copied but the input itself, once, into rows that are
//! separated by a zero pixel (right edge of one row and left edge of the next) and images that are
//! separated by a zero row. Concatenation, scaling and activations happen during that copy.
//!
//! ```text
//! y[m, :] = sum over dy of  x[m + dy*(w+1) .. + 3, :]  (3C values)  times  W[dy]  (3C x Cout)
//! ```
//!
//! With stride 2 the rows of the left matrix begin two pixels apart. Even and odd image rows are copied to separate
//! places, so that the rows that one tap needs follow each other. A 3x3 kernel on an image that was enlarged by two
//! (nearest neighbour) sees 2x2 pixels of the original, each through the sum of the taps that fall on it: four products
//! with 2x2 kernels, one for each place in the enlarged pixel.
//!
//! Cost: 9 C Cout multiply-adds a result (1x1: C Cout; enlarged: 4 C Cout), up to 1 in w+1 of them wasted on the zero pixel.
//! The work is cut into bands of image rows, so that a band's input and results stay in cache. Several of them after each
//! other are a strip, the work of one thread: with stride 1, what two of them see is read once. A layer of few pixels is
//! one band, and each of its stages is spread over the threads.

use super::bf16::{self, Packed, Rows};
use super::tensor::{Halves, Pool, Tensor};
use crate::backend::Shape;
use crate::backend::codec::{Reach, Window};
use crate::real::{Dst, Mat, Real, Threads, for_rows, matmul, simd};
use rayon::prelude::*;
use std::sync::Arc;

/// Pixels of a band. Its input (some hundred channels) fits the L2 cache of one core.
const BAND_PIXELS: usize = 1024;

/// Bytes that a band's input in bfloat16 and its results may take. With the weights of some columns, 0.3 MB for 256
/// channels, that is half of the L2 cache of a Xeon with AMX, which is where it was measured.
const PACKED_BAND_BYTES: usize = 768 << 10;

/// Strips of a convolution for each thread. With more of them the threads end at about the same time, with fewer the rows
/// that two strips see are a smaller part.
const STRIPS: usize = 4;

/// Where the values of an image come from: `read(row, pixel, dst)` writes some of the pixels of row `row` (counted over
/// the whole batch), from number `pixel` on.
pub struct ImageRows<'a, T> {
    /// Shape of the image that is read.
    pub shape: Shape,
    /// Writes some pixels.
    pub read: &'a (dyn Fn(usize, usize, &mut [T]) + Sync),
}

/// Zero pixels between two rows of a band, and zero rows between two of its images.
fn gap(window: Window) -> usize {
    let Window { side, stride, before, .. } = window;
    before.max(side - 1 - before).next_multiple_of(stride)
}

/// A kernel, its results, and where it is applied.
#[derive(Clone, Copy)]
pub struct Filter<'a, T> {
    /// `[scale * scale][side * side][C][cout]`.
    pub weight: &'a [T],
    /// The same for products in bfloat16, as [`Filter::pack`] makes it.
    pub packed: Option<&'a Packed>,
    /// Output channels.
    pub cout: usize,
    /// Which pixels it sees.
    pub window: Window,
}

impl<'a, T: Real> Filter<'a, T> {
    /// For products of f32 or f64.
    pub fn new(weight: &'a [T], cout: usize, window: Window) -> Self {
        Self { weight, packed: None, cout, window }
    }

    /// Its weight for products in bfloat16: a matrix for each row of taps. None if the number of channels is odd, as in
    /// the first convolution: a pair of values would reach into the next pixel.
    pub fn pack(&self) -> Option<Packed> {
        let Window { side, scale, .. } = self.window;
        let k = self.weight.len() / (scale * scale * side * self.cout);
        let channels = k / side;
        T::as_f32(self.weight).filter(|_| channels.is_multiple_of(2)).map(|weight| Packed::new(weight, k, self.cout))
    }
}

/// Where the rows lie that results `first..first + count` see, with the zero pixels and rows around them, and zero
/// pixels for one more result after all of them.
///
/// Rows of results are counted over the whole batch. Those of [`Reach::Double`] are counted in rows of the small
/// image.
struct Band {
    window: Window,
    /// Shape of all images.
    shape: Shape,
    /// Pixels from one row to the next.
    pitch: usize,
    /// The row that the first tap of its first result reads.
    top: usize,
    /// Rows of the band.
    lines: usize,
}

impl Band {
    fn new(shape: Shape, window: Window, first: usize, count: usize) -> Self {
        let [_, _, w, _] = shape;
        let band = Self { window, shape, pitch: w + gap(window), top: 0, lines: 0 };
        let top = band.row(first);
        Self { top, lines: band.row(first + count - 1) + window.side + window.scale - 1 - top, ..band }
    }

    /// The row that the first tap of results row `row` reads, counted over the batch with the zero rows between images.
    fn row(&self, row: usize) -> usize {
        let (stride, gap, [_, height, ..]) = (self.window.stride, gap(self.window), self.shape);
        let rows = height / stride;
        row / rows * (height + gap) + row % rows * stride
    }

    /// First row of the product that belongs to results row `row`.
    fn result(&self, row: usize) -> usize {
        (self.row(row) - self.top) / self.window.stride * (self.pitch / self.window.stride)
    }

    /// Pixel at which the band's row `line` begins. With stride 2 the odd rows come behind the even ones.
    fn line(&self, line: usize) -> usize {
        let stride = self.window.stride;
        (line % stride * self.lines.div_ceil(stride) + line / stride) * self.pitch
    }

    /// The row of the band that lies at place number `place`: the inverse of [`Self::line`], in rows.
    fn line_at(&self, place: usize) -> usize {
        let evens = self.lines.div_ceil(self.window.stride);
        place % evens * self.window.stride + place / evens
    }

    /// Values of the band.
    fn len(&self) -> usize {
        let [.., channels] = self.shape;
        (self.lines * self.pitch + gap(self.window) + self.window.stride) * channels
    }

    /// Fills `values`; `read` writes an image row. `values` may hold a band of the same convolution that began no later:
    /// with stride 1, the rows that this one has too are kept.
    fn fill<E: Copy + Send + Sync>(
        &self,
        values: &mut [E],
        held: Option<&Self>,
        threads: Threads,
        zero: E,
        read: impl Fn(usize, &mut [E]) + Sync,
    ) {
        let ([n, height, w, channels], before) = (self.shape, self.window.before);
        let (gap, line) = (gap(self.window), self.pitch * channels);
        debug_assert!(held.is_none_or(|held| held.top <= self.top), "bands follow each other");
        let kept = match held {
            Some(held) if self.window.stride == 1 => {
                let first = (self.top - held.top).min(held.lines);
                values.copy_within(first * line..held.lines * line, 0);
                held.lines - first
            }
            _ => 0,
        };
        let (lines, end) = values[..self.len()].split_at_mut(self.lines * line);
        end.fill(zero);
        for_parts(threads, &mut lines[kept * line..], line, |place, line| {
            let row = self.top + self.line_at(kept + place);
            let (image, y) = (row / (height + gap), row % (height + gap));
            if image < n && (before..before + height).contains(&y) {
                let (left, rest) = line.split_at_mut(before * channels);
                let (dst, right) = rest.split_at_mut(w * channels);
                left.fill(zero);
                read(image * height + y - before, dst);
                right.fill(zero);
            } else {
                line.fill(zero);
            }
        });
    }

    /// The band of `rows`.
    fn read<T: Real>(&self, pool: &Arc<Pool<T>>, rows: &ImageRows<T>) -> Tensor<T> {
        let mut data = Tensor::uninit(pool, [1, 1, 1, self.len()]);
        self.fill(data.values_mut(), None, Threads::One, T::zero(), |row, dst| (rows.read)(row, 0, dst));
        data
    }

    /// Reads it in bfloat16, after the band `held`. `T` is f32.
    fn read_narrow<T: Real>(
        &self,
        pool: &Arc<Pool<T>>,
        data: &mut [u16],
        held: Option<&Self>,
        threads: Threads,
        rows: &ImageRows<T>,
    ) {
        let [.., channels] = self.shape;
        let pixels = (NARROWED / channels).max(1);
        self.fill(data, held, threads, 0, |row, dst| {
            let mut some = Tensor::uninit(pool, [1, 1, pixels, channels]);
            let some = some.values_mut();
            for (i, dst) in dst.chunks_mut(some.len()).enumerate() {
                let some = &mut some[..dst.len()];
                (rows.read)(row, i * pixels, some);
                bf16::narrow(T::as_f32(some).expect("f32"), dst);
            }
        });
    }
}

/// Calls `f(i, part)` for each part of `len` values.
fn for_parts<E: Send>(threads: Threads, values: &mut [E], len: usize, f: impl Fn(usize, &mut [E]) + Sync) {
    match threads {
        Threads::One => values.chunks_exact_mut(len).enumerate().for_each(|(i, part)| f(i, part)),
        Threads::All => values.par_chunks_exact_mut(len).enumerate().for_each(|(i, part)| f(i, part)),
    }
}

/// Values that are read before they are rounded to bfloat16: what the L1 cache holds beside those that they are made of.
const NARROWED: usize = 4096;

/// What a band holds.
enum Data<'a, T: Real> {
    Wide(Tensor<T>),
    /// In bfloat16, with the weights that it is multiplied by. `T` is f32.
    Narrow(Halves<T>, &'a Packed),
}

impl<'a, T: Real> Data<'a, T> {
    /// Room for bands of up to `len` values.
    fn new(pool: &Arc<Pool<T>>, len: usize, packed: Option<&'a Packed>) -> Self {
        match packed {
            None => Self::Wide(Tensor::uninit(pool, [1, 1, 1, len])),
            Some(packed) => Self::Narrow(Halves::uninit(pool, len), packed),
        }
    }

    /// Reads a band, after the band `held`.
    fn read(&mut self, pool: &Arc<Pool<T>>, band: &Band, held: Option<&Band>, threads: Threads, rows: &ImageRows<T>) {
        match self {
            Self::Wide(data) => {
                band.fill(data.values_mut(), held, threads, T::zero(), |row, dst| (rows.read)(row, 0, dst));
            }
            Self::Narrow(data, _) => band.read_narrow(pool, data.values_mut(), held, threads, rows),
        }
    }
}

/// Below this many pixels for each thread a layer is one band. In several of them each thread would pack, or read, the
/// weights of all columns, which takes it longer than waiting for the others after each stage.
const MIN_PIXELS: usize = 512;

/// How the rows of a convolution are shared out.
struct Cut {
    /// Rows of a strip, which is one task, and of a band.
    strip: usize,
    band: usize,
    /// Who computes a band.
    threads: Threads,
}

impl Cut {
    /// For `rows` rows of `width` pixels in the smaller of image and result. `narrow` if the products are in bfloat16.
    fn new(rows: usize, width: usize, [c, cout]: [usize; 2], window: Window, narrow: bool) -> Self {
        let Window { stride, scale, .. } = window;
        // Bytes of the band and the results.
        let pixel = 2 * c * stride * stride + 4 * cout * scale * scale;
        let threads = rayon::current_num_threads();
        if rows * width < threads * MIN_PIXELS {
            return Self { strip: rows, band: rows, threads: Threads::All };
        }
        let pixels = if narrow { (PACKED_BAND_BYTES / pixel).max(1) } else { BAND_PIXELS };
        // As many for each thread, of about the same height.
        let bands = (rows * width).div_ceil(pixels).next_multiple_of(threads);
        let band = rows.div_ceil(bands);
        Self { strip: rows.div_ceil(threads * STRIPS).next_multiple_of(band), band, threads: Threads::One }
    }
}

/// The longest sum that `gemm` never cuts into parts. Where it cuts longer ones depends on the size of the product, and
/// so on the batch. But the bits of an image must not depend on the batch.
const MAX_SUM: usize = 512;

/// Convolution of `rows`: calls `done(row, y, out)` for each row of results, where `y` holds its
/// width * cout values and `out` is that row's share of `out`.
pub fn conv<T: Real>(
    pool: &Arc<Pool<T>>,
    rows: ImageRows<T>,
    filter: Filter<T>,
    out: &mut [T],
    done: impl Fn(usize, &[T], &mut [T]) + Sync,
) {
    let Filter { weight, packed, cout, window } = filter;
    let Window { side, stride, scale, .. } = window;
    let [n, h, w, c] = rows.shape;
    let (total, w) = (n * h / stride, w / stride);
    if total * w == 0 {
        return;
    }
    let Cut { strip, band: height, threads } = Cut::new(total, w, [c, cout], window, packed.is_some());
    let (per_row, k) = (out.len() / total, c * side);
    let block = k.div_ceil(k.div_ceil(MAX_SUM));
    let compute = |band: &Band, data: &Data<T>, first: usize, count: usize, out: &mut [T]| {
        let last = band.result(first + count - 1);
        // A product with one row would be one with a vector, which `gemm` sums in another order.
        let m = (last + w).max(2);
        let pitch = band.pitch / stride;
        let lines = Rows { lines: last / pitch + 1, width: w, pitch };
        let mut y = Tensor::uninit(pool, [scale, m, scale, cout]);
        for (phase, weight) in weight.chunks_exact(side * k * cout).enumerate() {
            let (py, px) = (phase / scale, phase % scale);
            let y = &mut y.values_mut()[(py * m * scale + px) * cout..];
            let begin = |dy: usize| (band.line(py + dy) + px) * c;
            match data {
                Data::Narrow(x, packed) => {
                    let a: Vec<_> = (0..side).map(|dy| Mat::new(&x.values()[begin(dy)..], stride * c)).collect();
                    let y = T::as_f32_mut(y).expect("f32");
                    bf16::product(lines, y, scale * cout, &a, packed, phase * side, threads);
                }
                Data::Wide(x) => {
                    for (dy, k0) in (0..side).flat_map(|dy| (0..k).step_by(block).map(move |k0| (dy, k0))) {
                        let a = Mat { rows: stride * c, ..Mat::new(&x.values()[begin(dy) + k0..], c) };
                        let b = Mat::new(&weight[(dy * k + k0) * cout..], cout);
                        let shape = (m, cout, block.min(k - k0));
                        let to = Dst { values: y, rows: scale * cout, accumulate: dy + k0 > 0 };
                        matmul(shape, to, a, b, T::one(), threads);
                    }
                }
            }
        }
        let y = y.values();
        for_parts(threads, out, per_row / scale, |j, out| {
            let (row, py) = (first + j / scale, j % scale);
            let start = (py * m + band.result(row)) * scale;
            simd(
                #[inline(always)]
                || done(row * scale + py, &y[start * cout..][..w * scale * cout], out),
            );
        });
    };
    out.par_chunks_mut(strip * per_row).enumerate().for_each(|(i, out)| {
        let bands = out.chunks_mut(height * per_row).enumerate().map(|(j, out)| {
            let (first, count) = (i * strip + j * height, out.len() / per_row);
            (Band::new(rows.shape, window, first, count), first, count, out)
        });
        let bands: Vec<_> = bands.collect();
        let mut data = Data::new(pool, bands.iter().map(|(band, ..)| band.len()).max().unwrap_or(0), packed);
        let mut held = None;
        for (band, first, count, out) in bands {
            data.read(pool, &band, held.as_ref(), threads, &rows);
            compute(&band, &data, first, count, out);
            held = Some(band);
        }
    });
}

/// The four 2x2 kernels `[py][px]` that the 3x3 `weight` `[9][C][cout]` amounts to on an image that is enlarged by two:
/// those for the results in the upper left, upper right, lower left and lower right.
pub fn enlarging<T: Real>(weight: &[T]) -> Vec<T> {
    let tap = weight.len() / 9;
    let mut out = vec![T::zero(); 16 * tap];
    let window = Reach::Double.window();
    for (i, from) in weight.chunks_exact(tap).enumerate() {
        for phase in 0..4 {
            let at = phase * 4 + window.tap(i / 3, phase / 2) * 2 + window.tap(i % 3, phase % 2);
            out[at * tap..][..tap].iter_mut().zip(from).for_each(|(o, &w)| *o += w);
        }
    }
    out
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
    rows: ImageRows<T>,
    grad: ImageRows<T>,
    taps: usize,
    gain: T,
    out: &mut [T],
    accumulate: bool,
) {
    let [n, h, w, c] = rows.shape;
    let cout = grad.shape[3];
    let (total, window) = (n * h, Reach::of_taps(taps).window());
    let height = (BAND_PIXELS / w).max(1);
    let parts = (total.div_ceil(height)).min(PARTIAL_BYTES / size_of_val(out).max(1)).clamp(1, 16);

    let sum_bands = |part: usize, out: &mut [T], mut accumulate: bool, threads: Threads| {
        let per_part = total.div_ceil(parts);
        let end = total.min((part + 1) * per_part);
        let height = if threads == Threads::All { per_part } else { height };
        let mut first = part * per_part;
        while first < end {
            let count = height.min(end - first);
            let band = Band::new(rows.shape, window, first, count);
            let x = band.read(pool, &rows);
            let g = Band::new(grad.shape, window, first, count).read(pool, &grad);
            let m = band.result(first + count - 1) + w;
            for dy in 0..window.side {
                // Result row m is pixel m of the band; its gradient is one row and one pixel further
                // in, where the zero pixels between the rows cancel what the product computes there.
                let skip = window.before * (band.pitch + 1) * cout;
                let k = c * window.side;
                let a = Mat::new(&x.values()[dy * band.pitch * c..], c).t();
                let b = Mat::new(&g.values()[skip..], cout);
                let out = Dst { values: &mut out[dy * k * cout..][..k * cout], rows: cout, accumulate };
                matmul((k, cout, m), out, a, b, gain, threads);
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
    for_rows(out, len.min(4096), |i, out| {
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

/// Pixels that a weight gradient in bfloat16 sums over at a time: those of a tile's columns fit half of the L2 cache.
const NARROW_PIXELS: usize = 8192;

/// As [`wgrad`], in bfloat16: for each tap one product of the transposed image and the gradient. `T` is f32.
pub fn wgrad_narrow<T: Real>(
    pool: &Arc<Pool<T>>,
    rows: ImageRows<T>,
    grad: ImageRows<T>,
    taps: usize,
    gain: T,
    out: &mut [T],
    mut accumulate: bool,
) {
    let [n, h, w, c] = rows.shape;
    let (cout, window, all) = (grad.shape[3], Reach::of_taps(taps).window(), Threads::All);
    let height = (NARROW_PIXELS / w).max(1);
    for first in (0..n * h).step_by(height) {
        let count = height.min(n * h - first);
        let [band, grads] = [rows.shape, grad.shape].map(|shape| Band::new(shape, window, first, count));
        let mut x = Halves::uninit(pool, band.len());
        band.read_narrow(pool, x.values_mut(), None, all, &rows);
        let mut g = Tensor::uninit(pool, [1, 1, 1, grads.len()]);
        grads.fill(g.values_mut(), None, all, T::zero(), |row, dst| {
            (grad.read)(row, 0, dst);
            dst.iter_mut().for_each(|g| *g *= gain);
        });
        // As in `wgrad`, row m of the right matrix is a pixel of the band, and the zero pixels are rows of zeros.
        let g = T::as_f32(&g.values()[window.before * (band.pitch + 1) * cout..]).expect("f32");
        let g = Packed::matrix(Mat::new(g, cout), band.result(first + count - 1) + w, cout, all);
        let pixels = (window.side - 1) * (band.pitch + 1) + g.k();
        let mut columns = Halves::uninit(pool, c * pixels);
        transpose_halves(x.values(), c, columns.values_mut(), pixels);
        let mut some = accumulate.then(|| Tensor::uninit(pool, [1, 1, 1, out.len()]));
        let sums = some.as_mut().map_or(&mut *out, Tensor::values_mut);
        for (tap, sums) in T::as_f32_mut(sums).expect("f32").chunks_exact_mut(c * cout).enumerate() {
            let pixel = tap / window.side * band.pitch + tap % window.side;
            let x = Mat::new(&columns.values()[pixel..], pixels);
            bf16::product(Rows::all(c), sums, cout, &[x], &g, 0, all);
        }
        if let Some(some) = some {
            let len = out.len().min(4096);
            for_rows(out, len, |i, out| {
                out.iter_mut().zip(&some.values()[i * len..]).for_each(|(out, &x)| *out += x);
            });
        }
        accumulate = true;
    }
}

/// Pixels of `c` channels as rows of `pixels` values, one for each channel, with zeros where there are no more pixels.
fn transpose_halves(from: &[u16], c: usize, to: &mut [u16], pixels: usize) {
    const TILE: usize = 32;
    let there = pixels.min(from.len() / c);
    to.par_chunks_mut(TILE * pixels).enumerate().for_each(|(block, to)| {
        for first in (0..there).step_by(TILE) {
            let last = there.min(first + TILE);
            for (channel, row) in (block * TILE..).zip(to.chunks_exact_mut(pixels)) {
                let from = from[first * c + channel..].iter().step_by(c);
                row[first..last].iter_mut().zip(from).for_each(|(to, &from)| *to = from);
            }
        }
        to.chunks_exact_mut(pixels).for_each(|row| row[there..].fill(0));
    });
}

/// The weight of the input gradient: taps reversed, channels exchanged, `[taps][cout][cin]`.
pub fn transpose<T: Real>(pool: &Arc<Pool<T>>, weight: &[T], taps: usize, cin: usize, cout: usize) -> Tensor<T> {
    const TILE: usize = 16;
    let mut out = Tensor::uninit(pool, [1, taps, cout, cin]);
    out.values_mut().par_chunks_mut(TILE * cin).enumerate().for_each(|(i, out)| {
        // Where cout is no multiple of the tile, a chunk may reach into the next tap.
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

    fn noise(len: usize, image: u64) -> Vec<f32> {
        let mut values = vec![0f32; len];
        Stream::new(1, Purpose::Init, image).normals(&mut values);
        values
    }

    /// Beside sums of the rounded values in f64; in one piece and in several, over image edges and odd sizes.
    #[test]
    fn a_weight_gradient_in_bfloat16_is_that_of_the_rounded_values() {
        if !bf16::is_available() {
            return;
        }
        let round = |x: f32| half::bf16::from_f32(x).to_f64();
        for ([n, h, w, c], cout, taps, accumulate) in [
            ([2, 5, 7, 35], 33, 9, false),
            ([2, 5, 7, 35], 33, 9, true),
            ([3, 4, 4, 64], 48, 1, true),
            ([1, 1, 1, 3], 5, 9, false),
            ([3, 60, 50, 2], 3, 9, false), // 9000 pixels
            ([3, 60, 50, 2], 3, 1, true),
        ] {
            let (x, g) = (noise(n * h * w * c, 1), noise(n * h * w * cout, 2));
            let read = |values: &[f32], c: usize, row: usize, pixel: usize, dst: &mut [f32]| {
                dst.copy_from_slice(&values[(row * w + pixel) * c..][..dst.len()]);
            };
            let read_x = |row: usize, pixel: usize, dst: &mut [f32]| read(&x, c, row, pixel, dst);
            let read_g = |row: usize, pixel: usize, dst: &mut [f32]| read(&g, cout, row, pixel, dst);
            let before = noise(taps * c * cout, 3);
            let mut out = before.clone();
            let rows = ImageRows { shape: [n, h, w, c], read: &read_x };
            let grad = ImageRows { shape: [n, h, w, cout], read: &read_g };
            wgrad_narrow(&Arc::default(), rows, grad, taps, 0.5, &mut out, accumulate);
            let (side, reach) = if taps == 9 { (3, 1) } else { (1, 0) };
            for (i, (&got, &before)) in out.iter().zip(&before).enumerate() {
                let (tap, channel, column) = (i / cout / c, i / cout % c, i % cout);
                let (dy, dx) = (tap / side, tap % side);
                let (mut want, mut size) = (if accumulate { f64::from(before) } else { 0.0 }, 1.0f64);
                for (row, left) in (0..n * h).flat_map(|row| (0..w).map(move |left| (row, left))) {
                    let (y, x_there) = ((row % h + dy).wrapping_sub(reach), (left + dx).wrapping_sub(reach));
                    if y < h && x_there < w {
                        let x = round(x[((row / h * h + y) * w + x_there) * c + channel]);
                        let term = x * round(0.5 * g[(row * w + left) * cout + column]);
                        want += term;
                        size += term.abs();
                    }
                }
                // Sums of n terms are rounded n times, mostly in both directions.
                let bound = f64::from(f32::EPSILON) * size * 4.0;
                assert!(
                    (f64::from(got) - want).abs() <= bound,
                    "{n}x{h}x{w}x{c} to {cout}, {taps} taps, {i}: {got}, not {want}"
                );
            }
        }
    }

    #[test]
    fn an_image_does_not_depend_on_its_batch() {
        let pool = Arc::default();
        for [h, w] in [[1, 1], [2, 1], [4, 4], [8, 8], [40, 24]] {
            for (c, cout, taps) in [(128, 64, 9), (256, 64, 9), (600, 16, 9), (600, 64, 1), (130, 130, 9), (5, 3, 9)] {
                let weight = noise(taps * c * cout, 99);
                let run = |first: usize, n: usize, narrow: bool| {
                    let rows = |row: usize, pixel: usize, dst: &mut [f32]| {
                        dst.copy_from_slice(&noise(w * c, (first * h + row) as u64)[pixel * c..][..dst.len()]);
                    };
                    let rows = ImageRows { shape: [n, h, w, c], read: &rows };
                    let mut out = vec![0.0; n * h * w * cout];
                    let mut filter = Filter::new(&weight, cout, Reach::of_taps(taps).window());
                    let packed = filter.pack().filter(|_| narrow);
                    filter.packed = packed.as_ref();
                    conv(&pool, rows, filter, &mut out, |_, y, out| out.copy_from_slice(y));
                    out
                };
                for narrow in [false, bf16::is_available()] {
                    let together: Vec<u32> = run(0, 5, narrow).iter().map(|x| x.to_bits()).collect();
                    let alone: Vec<u32> = (0..5).flat_map(|i| run(i, 1, narrow)).map(f32::to_bits).collect();
                    let differing = together.iter().zip(&alone).filter(|(a, b)| a != b).count();
                    let what = format!("{h}x{w}, {c} to {cout} channels, {taps} taps, narrow {narrow}");
                    assert_eq!(differing, 0, "values of {} at {what}", alone.len());
                }
            }
        }
    }

    const REACHES: [Reach; 5] = [Reach::Point, Reach::Same, Reach::Double, Reach::Down, Reach::Halve];

    /// Runs `f` on so many threads.
    fn on<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }

    #[test]
    fn a_band_after_another_holds_what_it_would_alone() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let shape @ [n, h, w, c] = [3, 12, 6, 2];
        for reach in REACHES {
            let window = reach.window();
            let (rows, gap) = (n * h / window.stride, gap(window));
            for height in 1..=rows {
                let firsts = (0..rows).step_by(height);
                let bands: Vec<_> =
                    firsts.map(|first| Band::new(shape, window, first, height.min(rows - first))).collect();
                let mut values = vec![-1; bands.iter().map(Band::len).max().unwrap()];
                let mut held = None;
                let reads = AtomicUsize::new(0);
                for band in &bands {
                    band.fill(&mut values, held, Threads::One, 0, |row, dst| {
                        reads.fetch_add(1, Ordering::Relaxed);
                        dst.iter_mut().enumerate().for_each(|(i, x)| *x = (row * w * c + i) as i32 + 1);
                    });
                    // Row by row, where `line` says that it is.
                    for i in 0..band.lines {
                        assert_eq!(band.line_at(band.line(i) / band.pitch), i);
                        let row = band.top + i;
                        let (image, y) = (row / (h + gap), (row % (h + gap)).wrapping_sub(window.before));
                        let line = &values[band.line(i) * c..][..band.pitch * c];
                        for (j, &x) in line.iter().enumerate() {
                            let inside = (window.before * c..(window.before + w) * c).contains(&j);
                            let at = ((image * h).wrapping_add(y) * w * c).wrapping_add(j)
                                - window.before * c * usize::from(inside);
                            let want = if inside && image < n && y < h { at as i32 + 1 } else { 0 };
                            assert_eq!(x, want, "{reach:?}, {height} rows at a time, row {row}, value {j}");
                        }
                    }
                    assert!(values[band.lines * band.pitch * c..band.len()].iter().all(|&x| x == 0));
                    held = Some(band);
                }
                if window.stride == 1 {
                    assert_eq!(reads.into_inner(), n * h, "{reach:?}, {height} rows at a time: each is read once");
                }
            }
        }
    }

    #[test]
    fn the_rows_are_shared_out_evenly() {
        for threads in [1, 2, 3, 16] {
            for (rows, width, c, cout) in
                [(704, 512, 128, 128), (88, 1408, 256, 256), (1024, 352, 256, 256), (90, 64, 512, 512)]
            {
                for (reach, narrow) in REACHES.iter().flat_map(|&reach| [(reach, false), (reach, true)]) {
                    let cut = on(threads, || Cut::new(rows, width, [c, cout], reach.window(), narrow));
                    let strips = rows.div_ceil(cut.strip);
                    let bands = rows.div_ceil(cut.band);
                    if cut.threads == Threads::All {
                        assert_eq!((strips, bands), (1, 1));
                        assert!(rows * width < threads * MIN_PIXELS);
                        continue;
                    }
                    let what = format!("{threads} threads, {rows}x{width}, {c} to {cout}, {reach:?}, narrow {narrow}");
                    assert!(
                        strips >= (threads * STRIPS).min(bands) / 2 && strips <= threads * STRIPS,
                        "{strips}: {what}"
                    );
                    assert_eq!(cut.strip % cut.band, 0, "{what}");
                }
            }
        }
    }

    #[test]
    fn a_convolution_does_not_depend_on_the_threads() {
        for (reach, [n, h, w, c], cout) in [
            (Reach::Same, [2, 90, 40, 256], 128),
            (Reach::Point, [2, 90, 40, 256], 128),
            (Reach::Double, [2, 62, 32, 192], 64),
            (Reach::Down, [2, 180, 64, 96], 64),
            (Reach::Halve, [2, 180, 64, 96], 64),
        ] {
            let window = reach.window();
            let side = window.side * window.scale;
            let (weight, x) = (noise(side * side * c * cout, 9), noise(n * h * w * c, 10));
            let read = |row: usize, pixel: usize, dst: &mut [f32]| {
                dst.copy_from_slice(&x[(row * w + pixel) * c..][..dst.len()]);
            };
            for narrow in [false, bf16::is_available()] {
                let mut filter = Filter::new(&weight, cout, window);
                let packed = filter.pack().filter(|_| narrow);
                filter.packed = packed.as_ref();
                let run = |threads: usize| {
                    let mut out = vec![0.0; window.result([n, h, w, c], cout).iter().product()];
                    let rows = ImageRows { shape: [n, h, w, c], read: &read };
                    on(threads, || conv(&Arc::default(), rows, filter, &mut out, |_, y, out| out.copy_from_slice(y)));
                    out
                };
                let cut = |threads: usize| {
                    let (rows, width) = (n * h / window.stride, w / window.stride);
                    let cut = on(threads, || Cut::new(rows, width, [c, cout], window, narrow));
                    (cut.strip > cut.band, cut.threads == Threads::All)
                };
                let one = run(1);
                let what = format!("{reach:?}, narrow {narrow}");
                // Several bands after each other on one thread; one band, whose stages are spread over the threads.
                assert_eq!((narrow && !cut(1).0, cut(64)), (false, (false, true)), "{what}");
                for threads in [3, 64] {
                    let differing = run(threads).iter().zip(&one).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                    assert_eq!(differing, 0, "values of {} on {threads} threads, {what}", one.len());
                }
            }
        }
    }
}
