//! The command as tests call it, and what it says.

use std::path::Path;

use assert_cmd::Command;
use assert_cmd::assert::Assert;

/// The command in a directory.
pub fn edm2k(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("edm2k").unwrap();
    command.args(arguments).current_dir(dir);
    command
}

/// The command in the checkout, where the committed data is.
pub fn here(arguments: &[&str]) -> Command {
    edm2k(Path::new(env!("CARGO_MANIFEST_DIR")), arguments)
}

/// What it prints when it succeeds.
pub fn printed(done: Assert) -> String {
    String::from_utf8(done.success().get_output().stdout.clone()).unwrap()
}

/// What it says on stderr when it fails.
pub fn refused(done: Assert) -> String {
    String::from_utf8(done.failure().get_output().stderr.clone()).unwrap()
}

/// The same if it is one line of an error, and nothing is printed.
pub fn refused_in_one_line(done: Assert) -> String {
    let said = refused(done.code(1).stdout(""));
    assert!(said.starts_with("edm2k: error: ") && said.lines().count() == 1, "{said}");
    said
}
