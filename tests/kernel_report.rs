//! What nvcc makes of the kernels, for every architecture: nothing spills or has a stack, registers suffice for as many blocks
//! as the tiles promise, the convolutions' loops are lean, and the table of all that is the one that was looked at last.

use std::process::Command;

/// Without a compiler there is nothing to look at; with one, everything must be seen.
#[test]
fn no_kernel_spills_and_the_loops_are_lean() {
    if cfg!(not(feature = "cuda")) {
        return eprintln!("skipped: built without CUDA");
    }
    let arguments = ["scripts/kernel-report", "--compare", "tests/data/kernels.tsv"];
    let out = Command::new("python3").args(arguments).output().expect("python3 runs");
    let said = [out.stdout, out.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    eprint!("{said}");
    assert!(out.status.success());
}
