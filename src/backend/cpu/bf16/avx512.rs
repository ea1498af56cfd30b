//! Products with AVX-512 BF16.
//!
//! ```text
//! sums     6 rows x 64 columns in 24 registers; in each step 4 loads of weights, 6 pairs of values, 24 instructions
//! ```
//!
//! The bound is the instruction rate: on Zen 4 one `vdpbf16ps` a cycle at 512 bits. A block of columns of a 3x3
//! convolution of 256 channels is 295 KB of weights, which stay in the L2 cache and are read at 11 bytes a cycle.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::{Block, LANES, Rows};

/// Whether this processor has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// What the processor says of itself.
pub fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every processor of 64 bits has the instruction.
    #[allow(unused_unsafe, reason = "Rust before 1.94 asks for it")]
    unsafe {
        __cpuid_count(leaf, 0)
    }
}

/// Whether Intel made it.
pub fn is_intel() -> bool {
    let maker = cpuid(0);
    [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

/// # Safety
/// The processor [can](is_available); there are as many values in `from` as in `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn narrow(from: &[f32], to: &mut [u16]) {
    let half = LANES * 2;
    let (tail, rest) = (from.len() % half, from.len() / half);
    for i in 0..rest {
        // SAFETY: 32 values from 32 i on are there.
        unsafe {
            let (low, high) = (from.as_ptr().add(i * half), from.as_ptr().add(i * half + LANES));
            let both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
            _mm512_storeu_si512(to.as_mut_ptr().add(i * half).cast(), transmute::<__m512bh, __m512i>(both));
        }
    }
    let start = from.len() - tail;
    to[start..].iter_mut().zip(&from[start..]).for_each(|(to, &x)| *to = half::bf16::from_f32(x).to_bits());
}

/// # Safety
/// The processor [can](is_available); there are twice as many places in `to` as values in each of the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn interleave([even, odd]: [&[f32]; 2], to: &mut [u16]) {
    let order: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
    // SAFETY: as many bytes as a register has.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    let whole = even.len() / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        // SAFETY: 16 values from `i` on are there, and 32 places from 2 i on.
        unsafe {
            let (even, odd) = (_mm512_loadu_ps(even.as_ptr().add(i)), _mm512_loadu_ps(odd.as_ptr().add(i)));
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_storeu_si512(to.as_mut_ptr().add(2 * i).cast(), _mm512_permutexvar_epi16(order, both));
        }
    }
    for (i, to) in to.chunks_exact_mut(2).enumerate().skip(whole) {
        to.copy_from_slice(&[even[i], odd[i]].map(|x| half::bf16::from_f32(x).to_bits()));
    }
}

/// # Safety
/// The processor [can](is_available); `block` is as large as it says, and has no more than 64 columns.
pub unsafe fn sum(block: &Block) {
    let Rows { lines, width, pitch } = block.rows;
    for (line, first) in (0..lines).flat_map(|line| (0..width).step_by(6).map(move |first| (line, first))) {
        let row = line * pitch + first;
        // SAFETY: the caller's promise.
        unsafe {
            match width - first {
                1 => rows::<1>(block, row),
                2 => rows::<2>(block, row),
                3 => rows::<3>(block, row),
                4 => rows::<4>(block, row),
                5 => rows::<5>(block, row),
                _ => rows::<6>(block, row),
            }
        }
    }
}

#[inline]
unsafe fn rows<const R: usize>(block: &Block, first: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match block.columns.div_ceil(LANES) {
            1 => tile::<R, 1>(block, first),
            2 => tile::<R, 2>(block, first),
            3 => tile::<R, 3>(block, first),
            _ => tile::<R, 4>(block, first),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const R: usize, const C: usize>(block: &Block, first: usize) {
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let step = 2 * LANES;
    for [a, mut b] in block.terms[..block.count].iter().copied() {
        // SAFETY: the row is there.
        let mut a = unsafe { a.add(first * block.a_rows) };
        for _ in 0..block.k / 2 {
            // SAFETY: C registers of `b`; two values of each of R rows of `a`.
            unsafe {
                let mut w = [_mm512_setzero_si512(); C];
                for (j, w) in w.iter_mut().enumerate() {
                    *w = _mm512_loadu_si512(b.add(j * step).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let pair = _mm512_set1_epi32(a.add(i * block.a_rows).cast::<i32>().read_unaligned());
                    for (sum, &w) in sums.iter_mut().zip(&w) {
                        *sum = _mm512_dpbf16_ps(
                            *sum,
                            transmute::<__m512i, __m512bh>(pair),
                            transmute::<__m512i, __m512bh>(w),
                        );
                    }
                }
                a = a.add(2);
                b = b.add(C * step);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, &sum) in sums.iter().enumerate() {
            // The last register may be wider than the matrix.
            let mask = ((1u32 << (block.columns - j * LANES).min(LANES)) - 1) as __mmask16;
            // SAFETY: masked to the columns that are there.
            unsafe { _mm512_mask_storeu_ps(block.dst.add((first + i) * block.dst_rows + j * LANES), mask, sum) };
        }
    }
}
