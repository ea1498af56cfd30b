//! What nvcc makes of the kernels, for every architecture: nothing spills or has a stack, multiprocessors hold
//! as many blocks as the tile table promises, and docs/kernels.md says so.

use std::process::Command;

#[test]
fn no_kernel_spills_and_the_documented_table_is_true() {
    let mut report = Command::new("python3");
    let out = match report.args(["scripts/ptxas-report", "--compare", "docs/kernels.md"]).output() {
        Ok(out) => out,
        Err(e) => return eprintln!("skipped: cannot run python3: {e}"),
    };
    let said = [out.stdout, out.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    eprint!("{said}");
    assert!(out.status.success());
}
