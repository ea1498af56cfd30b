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
use super::{Block, LANES, MAX_TERMS, Rows};
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

/// What the assembly reads, and counts in. All distances are in bytes.
#[repr(C, align(64))]
struct Sum {
    config: Config,
    terms: [[*const u16; 2]; MAX_TERMS],
    /// Behind the last of the terms that there are.
    end: *const [*const u16; 2],
    /// Steps of 32 values in a term, and in all of them.
    term_steps: u64,
    steps: u64,
    /// Rows that are summed at once are a group. The groups of a line, and those that are left in all lines.
    line_groups: u64,
    groups: u64,
    /// Where on the left the group begins whose values are loaded.
    a_group: u64,
    /// Groups of a line that are left: from the one on whose values are loaded, and from the one on that is summed. The
    /// former is ahead by the last step of a group.
    a_left: u64,
    dst_left: u64,
    /// From one group to the next, and from behind the last one of a line to the next line.
    a_groups: u64,
    a_lines: u64,
    dst_lines: u64,
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

/// Asks for eight lines of the weights, from line `$from` behind `b` on.
macro_rules! ahead {
    ($from:literal) => {
        concat!(ahead!(@ $from, 0), ahead!(@ $from, 1), ahead!(@ $from, 2), ahead!(@ $from, 3), ahead!(@ $from, 4),
            ahead!(@ $from, 5), ahead!(@ $from, 6), ahead!(@ $from, 7))
    };
    (@ $from:literal, $line:literal) => {
        concat!("prefetcht0 [{b} + 64*(", $from, " + ", $line, ")]\n")
    };
}

/// # Safety
/// The unit [can be used](is_available); `block` is as large as it says, and has no more than 32 columns.
pub unsafe fn sum(block: &Block) {
    let at_once = 2 * LANES;
    let (whole, rest) = (block.rows.width / at_once, block.rows.width % at_once);
    // SAFETY: the caller's promise.
    unsafe {
        if whole > 0 {
            sum_rows(block, 0, whole, at_once);
        }
        if rest > 0 {
            sum_rows(block, whole * at_once, 1, rest);
        }
    }
}

/// Sums `count` times `rows` rows of each line, 32 of them or the last ones, from its row `first` on.
///
/// # Safety
/// As for [`sum`]; the rows are in `block`.
unsafe fn sum_rows(block: &Block, first: usize, count: usize, rows: usize) {
    let Rows { lines, pitch, .. } = block.rows;
    // Where there are 16 rows or fewer, the second tile of rows is the first once more: all products are the same four.
    let halves = |all: usize| if all > LANES { [LANES, all - LANES] } else { [all; 2] };
    let (below, beside) = (rows > LANES, block.columns > LANES);
    let [down, across] = [rows, block.columns].map(halves);
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile =
        |i: usize, rows: usize, bytes: usize| (config.rows[i], config.row_bytes[i]) = (rows as u8, bytes as u16);
    for i in 0..4 {
        tile(i, down[i / 2], across[i % 2] * 4);
    }
    for i in 0..2 {
        tile(4 + i, down[i], 64);
        tile(6 + i, 16, across[i] * 4);
    }
    let (a_rows, dst_rows) = (block.a_rows * 2, block.dst_rows * 4);
    let b_rows = block.columns.next_multiple_of(LANES) * 4;
    let term_steps = block.k / 32;
    let second_rows = if below { LANES * dst_rows } else { 0 };
    let mut sum = Sum {
        config,
        terms: block.terms,
        end: std::ptr::null(),
        term_steps: term_steps as u64,
        steps: (term_steps * block.count) as u64,
        line_groups: count as u64,
        groups: (lines * count) as u64,
        a_group: (first * a_rows) as u64,
        a_left: count as u64,
        dst_left: count as u64,
        a_groups: (rows * a_rows) as u64,
        a_lines: ((pitch - count * rows) * a_rows) as u64,
        // The sums' pointer has passed whole tiles, which may be more than the rows.
        dst_lines: (pitch * dst_rows).wrapping_sub(2 * count * second_rows) as u64,
        a_second: if below { LANES * a_rows } else { 0 } as u64,
        b_second: if beside { 64 } else { 0 },
        dst_second_rows: second_rows as u64,
        dst_second_columns: if beside { 64 } else { 0 },
    };
    let sum = &raw mut sum;
    // SAFETY: the caller's promise. What is loaded after the last step is the first step's once more, of the last group.
    // No code of the compiler's holds values in tiles; all are given back at the end.
    unsafe {
        let terms = (&raw const (*sum).terms).cast::<[*const u16; 2]>();
        (*sum).end = terms.add(block.count);
        let [a, b] = (*sum).terms[0].map(|term| term.cast::<u8>());
        let a = a.add(first * a_rows);
        asm!(
            "ldtilecfg [{sum}]",
            "tileloadd tmm4, [{a} + {a_rows}]",
            "tileloadd tmm5, [{a2} + {a_rows}]",
            "tileloadd tmm6, [{b} + {b_rows}]",
            "tileloadd tmm7, [{b2} + {b_rows}]",
            // A group.
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "mov {left}, [{sum} + {all_steps}]",
            // A step. The next one's operands are loaded as soon as their tiles are free: while other products are made.
            "3:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            ahead!(64),
            "tdpbf16ps tmm1, tmm4, tmm7",
            ahead!(72),
            "dec {steps}",
            "jz 6f",
            "add {a}, 64",
            "add {a2}, 64",
            // 16 pairs of rows.
            "lea {b}, [{b} + 8*{b_rows}]",
            "lea {b}, [{b} + 8*{b_rows}]",
            "lea {b2}, [{b2} + 8*{b_rows}]",
            "lea {b2}, [{b2} + 8*{b_rows}]",
            "4:",
            "tileloadd tmm4, [{a} + {a_rows}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            ahead!(48),
            "tileloadd tmm6, [{b} + {b_rows}]",
            "tdpbf16ps tmm3, tmm5, tmm7",
            ahead!(56),
            "tileloadd tmm5, [{a2} + {a_rows}]",
            "tileloadd tmm7, [{b2} + {b_rows}]",
            "dec {left}",
            "jnz 3b",
            "tilestored [{dst} + {dst_rows}], tmm0",
            "mov {left}, {dst}",
            "add {left}, [{sum} + {dst_second_columns}]",
            "tilestored [{left} + {dst_rows}], tmm1",
            "add {dst}, [{sum} + {dst_second_rows}]",
            "add {left}, [{sum} + {dst_second_rows}]",
            "tilestored [{dst} + {dst_rows}], tmm2",
            "tilestored [{left} + {dst_rows}], tmm3",
            "add {dst}, [{sum} + {dst_second_rows}]",
            "dec qword ptr [{sum} + {dst_left}]",
            "jnz 5f",
            "mov {left}, [{sum} + {line_groups}]",
            "mov [{sum} + {dst_left}], {left}",
            "add {dst}, [{sum} + {dst_lines}]",
            "5:",
            "dec qword ptr [{sum} + {groups}]",
            "jnz 2b",
            "jmp 8f",
            // The end of a term. After the last one the first follows, with the next group's rows if there are any.
            "6:",
            "cmp {term}, [{sum} + {end}]",
            "jne 7f",
            "lea {term}, [{sum} + {terms}]",
            "cmp qword ptr [{sum} + {groups}], 1",
            "je 7f",
            "mov {a}, [{sum} + {a_groups}]",
            "add [{sum} + {a_group}], {a}",
            "dec qword ptr [{sum} + {a_left}]",
            "jnz 7f",
            "mov {a}, [{sum} + {line_groups}]",
            "mov [{sum} + {a_left}], {a}",
            "mov {a}, [{sum} + {a_lines}]",
            "add [{sum} + {a_group}], {a}",
            "7:",
            "mov {a}, [{term}]",
            "add {a}, [{sum} + {a_group}]",
            "mov {a2}, {a}",
            "add {a2}, [{sum} + {a_second}]",
            "mov {b}, [{term} + 8]",
            "mov {b2}, {b}",
            "add {b2}, [{sum} + {b_second}]",
            "add {term}, 16",
            "mov {steps}, [{sum} + {term_steps}]",
            "jmp 4b",
            "8:",
            "tilerelease",
            sum = in(reg) sum,
            terms = const std::mem::offset_of!(Sum, terms),
            end = const std::mem::offset_of!(Sum, end),
            term_steps = const std::mem::offset_of!(Sum, term_steps),
            all_steps = const std::mem::offset_of!(Sum, steps),
            line_groups = const std::mem::offset_of!(Sum, line_groups),
            groups = const std::mem::offset_of!(Sum, groups),
            a_group = const std::mem::offset_of!(Sum, a_group),
            a_left = const std::mem::offset_of!(Sum, a_left),
            dst_left = const std::mem::offset_of!(Sum, dst_left),
            a_groups = const std::mem::offset_of!(Sum, a_groups),
            a_lines = const std::mem::offset_of!(Sum, a_lines),
            dst_lines = const std::mem::offset_of!(Sum, dst_lines),
            a_second = const std::mem::offset_of!(Sum, a_second),
            b_second = const std::mem::offset_of!(Sum, b_second),
            dst_second_rows = const std::mem::offset_of!(Sum, dst_second_rows),
            dst_second_columns = const std::mem::offset_of!(Sum, dst_second_columns),
            a_rows = in(reg) a_rows,
            b_rows = in(reg) b_rows,
            dst_rows = in(reg) dst_rows,
            dst = inout(reg) block.dst.add(first * block.dst_rows) => _,
            term = inout(reg) terms.add(1) => _,
            steps = inout(reg) term_steps => _,
            left = out(reg) _,
            a = inout(reg) a => _,
            a2 = inout(reg) a.add((*sum).a_second as usize) => _,
            b = inout(reg) b => _,
            b2 = inout(reg) b.add((*sum).b_second as usize) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
