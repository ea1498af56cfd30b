//! Products on the matrix unit of Intel's Xeons from Sapphire Rapids on.
//!
//! A tile is 16 rows of 64 bytes. `tdpbf16ps` multiplies 16 rows of 32 values with 16 pairs of rows of 16 columns in 16
//! cycles, 512 products a cycle. Eight tiles are all there are:
//!
//! ```text
//!                 weights    tmm6      tmm7
//! values   tmm4   sums       tmm0      tmm1       32 rows x 32 columns; each step adds 32 of k:
//!          tmm5              tmm2      tmm3       4 loads of 1 KB, 4 products in 64 cycles
//! ```
//!
//! Beside those 64 cycles the bound is the L2 cache, which holds the weights: 2 KB a step, and as much of values that the
//! L1 cache does not hold any more. Stable Rust has no functions for tiles, so this is one piece of assembly.

use std::arch::asm;
use std::sync::OnceLock;

use super::avx512::cpuid;
use super::{Block, LANES, MAX_TERMS};
use crate::system;

/// Whether this processor has the unit, and the system lets this process use it.
pub fn is_available() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        // AMX-BF16 and AMX-TILE.
        let has = cpuid(7).edx & (1 << 22 | 1 << 24) == (1 << 22 | 1 << 24);
        has && system::allow_matrix_unit()
    })
}

/// What the assembly reads. All distances are in bytes.
#[repr(C, align(64))]
struct Sum {
    config: Config,
    terms: [[*const u16; 2]; MAX_TERMS],
    count: u64,
    /// Steps of 32 values in a term.
    steps: u64,
    /// From the first 16 rows or columns to the others; 0 where there are no others.
    a_second: u64,
    b_second: u64,
    dst_second_rows: u64,
    dst_second_columns: u64,
}

/// The operand of `ldtilecfg`.
#[repr(C)]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Asks for eight lines of the weights of the step after next, from line `$from` on.
macro_rules! ahead {
    ($from:literal) => {
        concat!(ahead!(@ $from, 0), ahead!(@ $from, 1), ahead!(@ $from, 2), ahead!(@ $from, 3), ahead!(@ $from, 4),
            ahead!(@ $from, 5), ahead!(@ $from, 6), ahead!(@ $from, 7))
    };
    (@ $from:literal, $line:literal) => {
        concat!("prefetcht0 [{b} + 4096 + 64*(", $from, " + ", $line, ")]\n")
    };
}

/// # Safety
/// The unit [can be used](is_available); `block` is as large as it says, and has no more than 32 rows and columns.
pub unsafe fn sum(block: &Block) {
    // Where there are 16 rows or fewer, the second tile of rows is the first once more: all products are the same four.
    let halves = |all: usize| if all > LANES { [LANES, all - LANES] } else { [all; 2] };
    let (rows, columns) = (halves(block.rows), halves(block.columns));
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile =
        |i: usize, rows: usize, bytes: usize| (config.rows[i], config.row_bytes[i]) = (rows as u8, bytes as u16);
    for i in 0..4 {
        tile(i, rows[i / 2], columns[i % 2] * 4);
    }
    for i in 0..2 {
        tile(4 + i, rows[i], 64);
        tile(6 + i, 16, columns[i] * 4);
    }
    let (below, beside) = (block.rows > LANES, block.columns > LANES);
    let (a_rows, dst_rows) = (block.a_rows * 2, block.dst_rows * 4);
    let b_rows = block.columns.next_multiple_of(LANES) * 4;
    let sum = Sum {
        config,
        terms: block.terms,
        count: block.count as u64,
        steps: (block.k / 32) as u64,
        a_second: if below { LANES * a_rows } else { 0 } as u64,
        b_second: if beside { 64 } else { 0 },
        dst_second_rows: if below { LANES * dst_rows } else { 0 } as u64,
        dst_second_columns: if beside { 64 } else { 0 },
    };
    // SAFETY: the caller's promise. No code of the compiler's holds values in tiles; all are given back at the end.
    unsafe {
        asm!(
            "ldtilecfg [{sum}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "lea {term}, [{sum} + {terms}]",
            "mov {left}, [{sum} + {count}]",
            "2:",
            "mov {a}, [{term}]",
            "mov {b}, [{term} + 8]",
            "add {term}, 16",
            "mov {a2}, {a}",
            "add {a2}, [{sum} + {a_second}]",
            "mov {b2}, {b}",
            "add {b2}, [{sum} + {b_second}]",
            "mov {steps}, [{sum} + {all_steps}]",
            "3:",
            "tileloadd tmm4, [{a} + {a_rows}]",
            "tileloadd tmm6, [{b} + {b_rows}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            ahead!(0),
            "tileloadd tmm5, [{a2} + {a_rows}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            ahead!(8),
            "tileloadd tmm7, [{b2} + {b_rows}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            ahead!(16),
            "tdpbf16ps tmm3, tmm5, tmm7",
            ahead!(24),
            "add {a}, 64",
            "add {a2}, 64",
            // 16 pairs of rows.
            "lea {b}, [{b} + 8*{b_rows}]",
            "lea {b}, [{b} + 8*{b_rows}]",
            "lea {b2}, [{b2} + 8*{b_rows}]",
            "lea {b2}, [{b2} + 8*{b_rows}]",
            "dec {steps}",
            "jnz 3b",
            "dec {left}",
            "jnz 2b",
            "tilestored [{dst} + {dst_rows}], tmm0",
            "mov {a}, {dst}",
            "add {a}, [{sum} + {dst_second_columns}]",
            "tilestored [{a} + {dst_rows}], tmm1",
            "add {dst}, [{sum} + {dst_second_rows}]",
            "add {a}, [{sum} + {dst_second_rows}]",
            "tilestored [{dst} + {dst_rows}], tmm2",
            "tilestored [{a} + {dst_rows}], tmm3",
            "tilerelease",
            sum = in(reg) &sum,
            terms = const std::mem::offset_of!(Sum, terms),
            count = const std::mem::offset_of!(Sum, count),
            all_steps = const std::mem::offset_of!(Sum, steps),
            a_second = const std::mem::offset_of!(Sum, a_second),
            b_second = const std::mem::offset_of!(Sum, b_second),
            dst_second_rows = const std::mem::offset_of!(Sum, dst_second_rows),
            dst_second_columns = const std::mem::offset_of!(Sum, dst_second_columns),
            a_rows = in(reg) a_rows,
            b_rows = in(reg) b_rows,
            dst_rows = in(reg) dst_rows,
            dst = inout(reg) block.dst => _,
            term = out(reg) _,
            left = out(reg) _,
            a = out(reg) _,
            a2 = out(reg) _,
            b = out(reg) _,
            b2 = out(reg) _,
            steps = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
