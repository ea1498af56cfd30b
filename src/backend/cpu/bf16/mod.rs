//! Products in bfloat16 with f32 sums: on the matrix unit of an Intel Xeon (AMX), or with AVX-512 BF16.
//!
//! Both multiply pairs of values: `vdpbf16ps` adds two products to each of 16 sums, `tdpbf16ps` 32 products to each of
//! 256. So weights are packed in pairs of rows, once; the rows of the left matrix are read as they lie in memory:
//!
//! ```text
//! weights  for each block of columns, of the rows 0 1, 2 3, ...:   w[0][0] w[1][0]  w[0][1] w[1][1]  ...
//! ```
//!
//! A sum runs over all of k in an order that depends on nothing else, whatever the number of rows: an image does not depend
//! on its batch.

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use rayon::prelude::*;

use crate::real::{Mat, Threads};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// The instructions of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub enum Unit {
    /// `vdpbf16ps`.
    Avx512,
    /// `tdpbf16ps`, for sums over a multiple of 32 values.
    Amx,
}

impl Unit {
    /// What this processor and system have.
    pub fn all() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        return match avx512::is_available() {
            true if amx::is_available() => &[Self::Avx512, Self::Amx],
            true => &[Self::Avx512],
            false => &[],
        };
        #[cfg(not(target_arch = "x86_64"))]
        &[]
    }

    /// The best for products over `k` values.
    fn best(k: usize) -> Option<Self> {
        Self::all().iter().rev().copied().find(|unit| k.is_multiple_of(unit.step()))
    }

    /// Values of k that an instruction takes.
    fn step(self) -> usize {
        match self {
            Self::Avx512 => 2,
            Self::Amx => 32,
        }
    }

    /// Rows that are summed at once.
    fn rows(self) -> usize {
        match self {
            Self::Avx512 => 6,
            Self::Amx => 32,
        }
    }

    /// Columns that are summed at once.
    fn columns(self) -> usize {
        match self {
            Self::Avx512 => 64,
            Self::Amx => 32,
        }
    }

    /// Packs a matrix into `to`, which has `k` rows.
    fn pack(self, to: &mut [u16], k: usize, from: Mat<f32>, [rows, cout]: [usize; 2], threads: Threads) {
        let round =
            |row: usize, column: usize| half::bf16::from_f32(from.data[row * from.rows + column * from.cols]).to_bits();
        // Every column has k values, so a block begins k times as far in as the columns before it.
        let pack = |(block, to): (usize, &mut [u16])| {
            let (first, wide) = (block * self.columns(), to.len() / k);
            let columns = wide.min(cout - first);
            for (row, to) in (0..rows).step_by(2).zip(to.chunks_exact_mut(2 * wide)) {
                let to = &mut to[..2 * columns];
                if from.cols == 1 && row + 1 < rows {
                    let part = |row: usize| &from.data[row * from.rows + first..][..columns];
                    interleave([part(row), part(row + 1)], to);
                    continue;
                }
                for (i, to) in to.chunks_exact_mut(2).enumerate() {
                    to[0] = round(row, first + i);
                    to[1] = if row + 1 < rows { round(row + 1, first + i) } else { 0 };
                }
            }
        };
        match threads {
            Threads::One => to.chunks_mut(k * self.columns()).enumerate().for_each(pack),
            Threads::All => to.par_chunks_mut(k * self.columns()).enumerate().for_each(pack),
        }
    }
}

/// Columns of a register or a tile.
const LANES: usize = 16;

/// Whether this processor multiplies in bfloat16.
pub fn is_available() -> bool {
    !Unit::all().is_empty()
}

/// Whether it does so faster than in f32. Of Intel's processors only those with a matrix unit are taken to: where it was
/// tried, `vdpbf16ps` took longer than the f32 instructions that it stands for.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Unit::all().contains(&Unit::Amx) || (is_available() && !avx512::is_intel());
    #[cfg(not(target_arch = "x86_64"))]
    false
}

const NO_UNIT: &str = "a processor that multiplies in bfloat16";

/// A cache line of values.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u16; 32]);

/// Right matrices `[parts][k][cout]` of products, k even, rounded and packed.
#[derive(Clone)]
pub struct Packed {
    lines: Vec<Line>,
    unit: Unit,
    k: usize,
    cout: usize,
}

debug!(Packed { unit, k, cout });

impl Packed {
    /// Packs matrices of `k` rows, an even number, and `cout` columns.
    ///
    /// # Panics
    /// If the processor has no unit.
    pub fn new(weight: &[f32], k: usize, cout: usize) -> Self {
        Self::for_unit(Unit::best(k).expect(NO_UNIT), weight, k, cout)
    }

    fn for_unit(unit: Unit, weight: &[f32], k: usize, cout: usize) -> Self {
        let parts = weight.len() / (k * cout);
        let mut packed = Self::zeros(unit, parts, k, cout);
        let size = packed.size();
        let values: &mut [u16] = cast_slice_mut(&mut packed.lines);
        values.par_chunks_mut(size).zip(weight.par_chunks(k * cout)).for_each(|(to, from)| {
            unit.pack(to, k, Mat::new(from, cout), [k, cout], Threads::All);
        });
        packed
    }

    /// Packs one matrix of `rows` rows and `cout` columns, with rows of zeros below it. Left matrices must have [`Self::k`]
    /// columns.
    ///
    /// # Panics
    /// If the processor has no unit.
    pub fn matrix(from: Mat<f32>, rows: usize, cout: usize, threads: Threads) -> Self {
        let k = rows.next_multiple_of(32);
        let unit = Unit::best(k).expect(NO_UNIT);
        let mut packed = Self::zeros(unit, 1, k, cout);
        unit.pack(cast_slice_mut(&mut packed.lines), k, from, [rows, cout], threads);
        packed
    }

    fn zeros(unit: Unit, parts: usize, k: usize, cout: usize) -> Self {
        assert!(k > 0 && k.is_multiple_of(unit.step()), "{k} rows for {unit:?}");
        let mut packed = Self { lines: Vec::new(), unit, k, cout };
        packed.lines = vec![Line::zeroed(); parts * packed.size() / 32];
        packed
    }

    /// Values of a packed matrix.
    fn size(&self) -> usize {
        self.k * self.cout.next_multiple_of(LANES)
    }

    /// Rows of a matrix.
    pub fn k(&self) -> usize {
        self.k
    }

    /// `columns` columns of matrix number `part` from `first` on, where a block begins.
    fn block(&self, part: usize, first: usize, columns: usize) -> &[u16] {
        let values: &[u16] = cast_slice(&self.lines);
        &values[part * self.size() + first * self.k..][..columns.next_multiple_of(LANES) * self.k]
    }
}

/// Rounds values to bfloat16, to nearest even.
///
/// # Panics
/// If there are more of them than places, or the processor does not multiply in bfloat16.
pub fn narrow(from: &[f32], to: &mut [u16]) {
    assert!(is_available() && from.len() == to.len(), "{} values for {} places", from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as asserted.
    unsafe {
        avx512::narrow(from, to);
    }
}

/// Rounds two rows and writes their values in turns.
fn interleave(rows: [&[f32]; 2], to: &mut [u16]) {
    assert!(is_available() && rows.iter().all(|row| 2 * row.len() == to.len()));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as asserted.
    unsafe {
        avx512::interleave(rows, to);
    }
}

/// Matrices that [`product`] takes at most: the rows of a 3x3 kernel.
const MAX_TERMS: usize = 3;

/// The rows of a product that are needed: `width` rows in each of some lines, which begin `pitch` rows apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// How many lines there are.
    pub lines: usize,
    /// Needed rows of a line.
    pub width: usize,
    /// From line to line.
    pub pitch: usize,
}

impl Rows {
    /// All of `m` rows.
    pub fn all(m: usize) -> Self {
        Self { lines: 1, width: m, pitch: m }
    }

    /// From the first row to the last one.
    fn span(self) -> usize {
        (self.lines - 1) * self.pitch + self.width
    }

    /// With the rows between the lines too if these cost less than lines that end with a part of `at_once` rows.
    fn cheaper(self, at_once: usize) -> Self {
        let apart = self.lines * self.width.div_ceil(at_once);
        if apart <= self.span().div_ceil(at_once) { self } else { Self::all(self.span()) }
    }
}

/// The sums of some columns.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct Block {
    rows: Rows,
    columns: usize,
    /// Values of a matrix's row on the left.
    k: usize,
    /// First values of the left and of the right matrices.
    terms: [[*const u16; 2]; MAX_TERMS],
    /// How many of them there are.
    count: usize,
    /// Values from row to row of the left matrices.
    a_rows: usize,
    dst: *mut f32,
    /// The same of the sums.
    dst_rows: usize,
}

/// Where sums are written.
#[derive(Clone, Copy)]
struct Target(*mut f32);

// SAFETY: no two threads write the same value.
unsafe impl Sync for Target {}
// SAFETY: as above.
unsafe impl Send for Target {}

/// Writes the sum over i of `a[i]` [m, k], whose rows are contiguous and equally far apart, times matrix `part + i` of
/// `b` to `dst` [m, cout], whose rows are `dst_rows` values apart. Of the m rows, what lies between the lines of `rows`
/// may be written or not.
///
/// # Panics
/// If there are no lines, or they are empty or overlap; if there are none or more than three matrices on the left, or a
/// slice is too short.
pub fn product(
    rows: Rows,
    dst: &mut [f32],
    dst_rows: usize,
    a: &[Mat<u16>],
    b: &Packed,
    part: usize,
    threads: Threads,
) {
    let (k, cout, unit) = (b.k, b.cout, b.unit);
    assert!(rows.lines > 0 && (1..=rows.pitch).contains(&rows.width));
    let last = rows.span() - 1;
    assert!(cout <= dst_rows && last * dst_rows + cout <= dst.len());
    assert!((1..=MAX_TERMS).contains(&a.len()));
    let a_rows = a[0].rows;
    assert!(a.iter().all(|a| a.cols == 1 && a.rows == a_rows && last * a_rows + k <= a.data.len()));
    let dst = Target(dst.as_mut_ptr());
    let blocks = cout.div_ceil(unit.columns());
    // Some tasks for each thread: of columns and, where there are not enough of these, of lines or rows.
    let parts = match threads {
        Threads::One => 1,
        Threads::All => (4 * rayon::current_num_threads()).div_ceil(blocks),
    };
    let rows = if rows.lines < parts { Rows::all(rows.span()) } else { rows.cheaper(unit.rows()) };
    let few = match rows {
        Rows { lines: 1, width, .. } => Rows::all(width.div_ceil(parts).next_multiple_of(unit.rows())),
        Rows { lines, .. } => Rows { lines: lines.div_ceil(parts), ..rows },
    };
    let step = few.lines * few.pitch;
    let parts = rows.span().div_ceil(step);
    let task = |i: usize| {
        // The whole of it: a closure would take the pointer alone.
        let Target(dst) = { dst };
        let (column, row) = (i / parts * unit.columns(), i % parts * step);
        let columns = unit.columns().min(cout - column);
        let mut terms = [[std::ptr::null(); 2]; MAX_TERMS];
        for (i, a) in a.iter().enumerate() {
            terms[i] = [a.data[row * a_rows..].as_ptr(), b.block(part + i, column, columns).as_ptr()];
        }
        let left = rows.span() - row;
        let rows = Rows { lines: few.lines.min(left.div_ceil(few.pitch)), width: few.width.min(left), ..few };
        // SAFETY: the assertions above bound every access, `block` those to the right matrices.
        unsafe {
            let dst = dst.add(row * dst_rows + column);
            unit.sum(&Block { rows, columns, k, terms, count: a.len(), a_rows, dst, dst_rows });
        }
    };
    match threads {
        Threads::One => (0..blocks * parts).for_each(task),
        Threads::All => (0..blocks * parts).into_par_iter().for_each(task),
    }
}

impl Unit {
    /// # Safety
    /// The processor has it; what `block` points to is as large as it says.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    unsafe fn sum(self, block: &Block) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Avx512 => avx512::sum(block),
                Self::Amx => amx::sum(block),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no processor of this kind has it")
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
        let shapes = [
            (1, 2, 1),
            (6, 32, 64),
            (7, 30, 65),
            (13, 96, 130),
            (100, 576, 192),
            (5, 10, 16),
            (47, 64, 47),
            (16, 32, 16),
            (17, 64, 17),
            (31, 32, 48),
            (33, 64, 3),
            (131, 64, 40),
        ];
        if !is_available() {
            eprintln!("skipped: no AVX-512 BF16");
        }
        for (&unit, (m, k, cout)) in Unit::all().iter().flat_map(|unit| shapes.map(|shape| (unit, shape))) {
            for (part, terms, threads) in [(0, 1, Threads::One), (1, 3, Threads::All), (2, 2, Threads::One)] {
                check(unit, Rows::all(m), [k, cout], part, terms, threads);
            }
        }
    }

    #[test]
    fn lines_are_computed_without_what_lies_between_them() {
        let lines = |lines, width, pitch| Rows { lines, width, pitch };
        // Whole groups of rows; whole ones and a part; a part alone, whose tiles reach beyond the next line's beginning.
        for rows in
            [lines(3, 64, 65), lines(2, 84, 97), lines(2, 20, 21), lines(3, 23, 24), lines(4, 18, 25), lines(1, 5, 7)]
        {
            for &unit in Unit::all() {
                for (part, terms, cout) in [(0, 1, 40), (1, 3, 16), (2, 2, 130)] {
                    check(unit, rows, [64, cout], part, terms, Threads::One);
                    for threads in [1, 2, 16] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                        pool.install(|| check(unit, rows, [64, cout], part, terms, Threads::All));
                    }
                }
            }
        }
        let kept = |rows: Rows, at_once| rows.cheaper(at_once).lines > 1;
        assert!(kept(lines(3, 64, 65), 32) && kept(lines(2, 84, 97), 32) && kept(lines(3, 23, 24), 32));
        assert!(kept(lines(4, 18, 25), 6) && !kept(lines(4, 13, 14), 6) && !kept(lines(9, 16, 17), 32));
    }

    /// Products of some shapes with parts of four matrices beside those of the rounded values in f64.
    fn check(unit: Unit, rows: Rows, [k, cout]: [usize; 2], part: usize, terms: usize, threads: Threads) {
        if k % unit.step() != 0 {
            return;
        }
        let round = |x: f32| f64::from(half::bf16::from_f32(x));
        let (m, a_rows, dst_rows, parts) = (rows.span(), k + 4, cout + 3, 4);
        let (x, w) = (noise(3 * m * a_rows, 1), noise(parts * k * cout, 2));
        let mut a = vec![0; x.len()];
        narrow(&x, &mut a);
        let b = Packed::for_unit(unit, &w, k, cout);
        let start = noise((m + 1) * dst_rows, 3);
        let mut dst = start.clone();
        let left: Vec<_> = (0..terms).map(|i| Mat::new(&a[i * m * a_rows..], a_rows)).collect();
        product(rows, &mut dst, dst_rows, &left, &b, part, threads);
        for (i, (&got, &before)) in dst.iter().zip(&start).enumerate() {
            let (row, column) = (i / dst_rows, i % dst_rows);
            if column >= cout || row >= m {
                assert_eq!(got, before, "row {row}, column {column} is not of the result");
                continue;
            }
            if row % rows.pitch >= rows.width {
                continue;
            }
            let x = |term: usize, j: usize| round(x[(term * m + row) * a_rows + j]);
            let w = |term: usize, j: usize| round(w[((part + term) * k + j) * cout + column]);
            let want: f64 = (0..terms * k).map(|j| x(j / k, j % k) * w(j / k, j % k)).sum();
            // As many roundings to f32, of sums of about sqrt(k).
            let bound = (terms * k) as f64 * f64::from(f32::EPSILON) * ((terms * k) as f64).sqrt();
            assert!((f64::from(got) - want).abs() <= bound, "{unit:?} {rows:?} {k} {cout}: {got}, not {want}");
        }
    }
}
