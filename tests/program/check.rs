//! `check.sh` says what failed, what was missing and what the machine is not, and its exit code is right. The programs
//! that it runs are stubs here; the real ones need a GPU.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// A bundle whose programs are shell scripts.
fn bundle(kernels: &str, edm2k: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let script = |path: &str, text: &str| {
        let path = dir.path().join(path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    fs::create_dir(dir.path().join("bin")).unwrap();
    script("bin/kernels", &format!("#!/bin/sh\n{kernels}\n"));
    script("bin/edm2k", &format!("#!/bin/sh\n{edm2k}\n"));
    // No tool of this machine's is to be found, neither a sanitizer nor a Python that has PyTorch.
    script("bin/python3", "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1");
    script("bin/compute-sanitizer", "#!/bin/sh\necho 'Device not supported'; exit 1");
    script("check.sh", include_str!("../../scripts/check.sh"));
    dir
}

/// Exit code and what is said after the last line of dashes, the summary.
fn check(bundle: &Path, arguments: &[&str]) -> (i32, String) {
    let path = format!("{}:{}", bundle.join("bin").display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command.arg(bundle.join("check.sh")).args(arguments).env("PATH", path).env_remove("EDM2_CHECKOUT");
    let out = command.output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap() + &String::from_utf8(out.stderr).unwrap();
    let summary = said.rsplit("---- summary").next().unwrap().to_owned();
    (out.status.code().unwrap(), summary)
}

const PASSED: &str = "echo 'test result: ok. 9 passed; 0 failed'";

#[test]
fn all_parts_are_listed_and_what_is_missing_is_no_failure() {
    let dir = bundle(PASSED, "echo '7 ok, 0 failed, 0 skipped'");
    let (code, said) = check(dir.path(), &[]);
    assert_eq!(code, 0, "{said}");
    for line in [
        "ok       engine, ",
        "ok       conv, ",
        "ok       pixelwise, ",
        "ok       verify-bf16, ",
        "-------- tests: ",
        "ok       bench, ",
        "no tool  peers: ModuleNotFoundError",
        "no tool  memcheck-conv, ",
        "-------- sanitize: ",
        "==== all ok",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
}

#[test]
fn parts_are_chosen() {
    let dir = bundle(PASSED, "echo done");
    let (code, said) = check(dir.path(), &["bench"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("bench, ") && !said.contains("engine") && !said.contains("sanitize"), "{said}");
    let (code, said) = check(dir.path(), &["bench", "benhc"]);
    assert!(code == 2 && said.contains("there is no part 'benhc'"), "{said}");
    let (code, said) = check(dir.path(), &["-h"]);
    assert!(code == 0 && said.contains("sanitize   the tests"), "{said}");
}

#[test]
fn a_failure_a_program_without_tests_and_a_skipped_test_are_failures() {
    for (gpu, verdict) in [
        (format!("case \"$*\" in *codec*) echo 'worst element 3'; exit 101;; *) {PASSED};; esac"), "FAIL 101 codec, "),
        (format!("case \"$*\" in *codec*) echo 'test result: ok. 0 passed';; *) {PASSED};; esac"), "FAIL 0   codec, "),
        (
            format!("case \"$*\" in *codec*) echo 'skipped on a GPU: it is lost';; *) {PASSED};; esac"),
            "SKIPPED  codec, ",
        ),
    ] {
        let dir = bundle(&gpu, "echo '7 ok, 0 failed, 0 skipped'");
        let (code, said) = check(dir.path(), &["tests"]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(verdict) && said.contains("==== NOT all ok"), "{verdict}: {said}");
        assert!(said.contains("ok       engine, "), "{said}");
    }
}

#[test]
fn without_a_gpu_it_says_so_and_fails() {
    let dir = bundle("echo 'skipped on a GPU: no NVIDIA driver'", "exit 0");
    let (code, said) = check(dir.path(), &["tests", "bench"]);
    assert_eq!(code, 1, "{said}");
    assert_eq!(said.trim(), "FAIL     there is no GPU to check: no NVIDIA driver");
}
