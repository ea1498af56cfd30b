//! What nvcc makes of the kernels, for every architecture: nothing spills or has a stack, registers suffice for as many blocks
//! as the tiles promise, the convolutions' loops are lean, and the table of all that is the one that was looked at last.
//!
//! Without the test harness, which would keep the counts to itself.

use std::process::Command;

const NAME: &str = "no_kernel_spills_and_the_loops_are_lean";

fn main() {
    let wanted = std::env::args().skip(1).filter(|word| !word.starts_with('-')).all(|filter| NAME.contains(&filter));
    // Without a compiler there is nothing to look at; with one, everything must be seen.
    if cfg!(not(feature = "cuda")) || !wanted {
        return println!(
            "test {NAME} ... skipped: {}",
            if wanted { "built without CUDA" } else { "another was asked for" }
        );
    }
    let arguments = ["scripts/kernel-report", "--compare", "tests/data/kernels.tsv"];
    let status = Command::new("python3").args(arguments).status().expect("python3 runs");
    println!("test {NAME} ... {}", if status.success() { "ok" } else { "FAILED" });
    if !status.success() {
        std::process::exit(1);
    }
}
