//! What depends on the operating system. Each function stands here once, with what it promises. Two modules keep the
//! promises: `unix` (Linux and macOS) and `windows`.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

#[cfg_attr(unix, path = "unix.rs")]
#[cfg_attr(windows, path = "windows.rs")]
mod side;

// ---- files ----

/// Opens a file for reading, without ever waiting for somebody to write into it.
pub fn open(path: &Path) -> io::Result<File> {
    side::open(path)
}

/// What an open file is, in words, if it is not a regular one.
pub fn what_instead(file: &File) -> io::Result<Option<&'static str>> {
    side::what_instead(file)
}

/// Whether an error in opening a file says something of the file alone, and nothing of the disk or the process.
pub fn is_of_the_file(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    let kinds =
        [Kind::NotFound, Kind::PermissionDenied, Kind::InvalidInput, Kind::InvalidFilename, Kind::NotADirectory];
    kinds.contains(&error.kind()) || error.raw_os_error().is_some_and(|code| side::OF_THE_FILE.contains(&code))
}

/// Has a link itself opened, or nothing, but never what it leads to.
pub fn no_follow(how: &mut OpenOptions) -> &mut OpenOptions {
    side::no_follow(how)
}

/// Has a file created so that only its owner may use it. Where rights are inherited from the directory, those count.
pub fn private(how: &mut OpenOptions) -> &mut OpenOptions {
    side::private(how)
}

/// Whether `path` itself, not what it may lead to, is the open file.
pub fn is_at(file: &File, path: &Path) -> bool {
    side::is_at(file, path)
}

/// Whether a link leads to an open file by way of one of the system's links, as /dev/stdout does. That is no place for
/// a new file.
pub fn leads_to_open_file(path: &Path) -> bool {
    side::leads_to_open_file(path)
}

/// When a file was last changed, or put where it is, as far as the system knows.
pub fn changed(about: &Metadata) -> Option<SystemTime> {
    about.modified().ok().max(side::placed(about))
}

/// The directory where this user's programs keep what can be made again.
pub fn cache() -> Option<PathBuf> {
    side::cache().filter(|path| path.is_absolute())
}

// ---- memory ----

/// Bytes of main memory.
pub fn memory() -> Option<u64> {
    side::memory().filter(|&bytes| bytes > 0)
}

/// Bytes of memory that this process may use, where somebody has set a limit (Linux: its control groups).
pub fn memory_limit() -> Option<u64> {
    side::memory_limit()
}

/// How many bytes of memory this process has had at its peak.
pub fn peak_memory() -> Option<u64> {
    side::peak_memory()
}

/// Asks for large pages behind memory that is about to be filled; its content stays.
pub fn advise_huge_pages<T>(values: &mut [T]) {
    side::advise_huge_pages(values);
}

/// Asks that this process may use the processor's matrix unit, whose state the system has to keep too. Says whether it may.
#[cfg(target_arch = "x86_64")]
pub fn allow_matrix_unit() -> bool {
    side::allow_matrix_unit()
}

/// From now on, when a mapped file can no longer be read, `whose` is called with the address. If it knows the address,
/// the text that it returns goes to stderr, and the process ends with status 1. `whose` may neither lock nor allocate.
pub fn on_lost_page(whose: fn(usize) -> Option<&'static str>) {
    side::on_lost_page(whose);
}

// ---- the process ----

/// Calls `heed` in a thread of its own whenever this process is asked to end; with `true` if Ctrl-C asks. Launchers of
/// jobs ask by SIGTERM, and before that by SIGUSR1 or SIGUSR2 if they are told to (`sbatch --signal`). Signals that the
/// parent process wants ignored stay ignored, since `nohup` and shells' background jobs rely on that.
///
/// Call it before there is a second thread. Threads that begin later leave signals to the one that waits for them.
pub fn on_stop(heed: impl FnMut(bool) + Send + 'static) {
    side::on_stop(heed);
}

/// This machine's name among others.
pub fn host_name() -> Option<String> {
    side::host_name().filter(|name| !name.is_empty())
}

// ---- devices ----

/// The library that NVIDIA's driver brings.
pub const CUDA_DRIVER: &str = side::CUDA_DRIVER;

/// Tries to load a library and returns why that fails; `None` if it does not fail, or there is no such library. The
/// library is not used.
pub fn why_not_loaded(library: &str) -> Option<String> {
    side::why_not_loaded(library)
}

/// Whether this machine has an NVIDIA card, with or without a driver.
pub fn has_nvidia_hardware() -> bool {
    side::has_nvidia_hardware()
}

/// The version of NVIDIA's driver, where the system tells it.
pub fn nvidia_driver() -> Option<String> {
    side::nvidia_driver().filter(|version| !version.is_empty())
}
