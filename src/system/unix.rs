//! Linux and macOS; contracts are in the module above.

use std::ffi::{CStr, CString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// The last one is what the system's own files give, such as /proc/kmsg.
pub const OF_THE_FILE: &[i32] = &[libc::ELOOP, libc::EISDIR, libc::ENXIO, libc::EAGAIN];

pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

pub fn what_instead(file: &File) -> io::Result<Option<&'static str>> {
    let kind = file.metadata()?.file_type();
    Ok(match () {
        () if kind.is_file() => None,
        () if kind.is_fifo() => Some("a pipe"),
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_char_device() || kind.is_block_device() => Some("a device"),
        () if kind.is_dir() => Some("a directory"),
        () => Some("something else"),
    })
}

pub fn no_follow(how: &mut OpenOptions) -> &mut OpenOptions {
    how.custom_flags(libc::O_NOFOLLOW)
}

pub fn private(how: &mut OpenOptions) -> &mut OpenOptions {
    how.mode(0o600)
}

pub fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

pub fn leads_to_open_file(path: &Path) -> bool {
    let mut path = path.to_owned();
    // Follow as many links as a system does.
    for _ in 0..40 {
        let Ok(to) = path.read_link() else { return false };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Ok(dir) = parent.canonicalize() else { return false };
        if dir == Path::new("/dev") || dir.starts_with("/proc") {
            return true;
        }
        path = dir.join(to);
    }
    false
}

pub fn placed(about: &Metadata) -> Option<SystemTime> {
    let (seconds, nanoseconds) = (u64::try_from(about.ctime()).ok()?, u32::try_from(about.ctime_nsec()).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

pub fn cache() -> Option<PathBuf> {
    // The specification of these directories says that a relative path is to be ignored.
    let named = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let usual = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
    named.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(usual)))
}

pub fn memory() -> Option<u64> {
    // SAFETY: asks for two numbers.
    let [pages, size] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(size).ok()?)
}

pub fn memory_limit() -> Option<u64> {
    smallest_limit(Path::new("/"))
}

/// The smallest limit of this process's control groups and of those around them, of version 2 or 1. A container may see
/// its own groups under another path than the process's. Paths where nothing is are passed over, and the way up ends at
/// what is there.
fn smallest_limit(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let limits = groups.lines().filter_map(|line| {
        let (kinds, group) = line.split_once(':')?.1.split_once(':')?;
        let (mount, file) = match kinds {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if kinds.split(',').any(|kind| kind == "memory") => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return None,
        };
        let ways = Path::new(group.trim_start_matches('/')).ancestors();
        // Without a limit the file says "max", which is no number, or has a number that no machine reaches.
        let limit = |way: &Path| fs::read_to_string(root.join(mount).join(way).join(file)).ok()?.trim().parse().ok();
        ways.filter_map(limit).min()
    });
    limits.min()
}

#[cfg(target_os = "linux")]
pub fn peak_memory() -> Option<u64> {
    // The number of getrusage includes the parent's memory from before this program was started.
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(not(target_os = "linux"))]
pub fn peak_memory() -> Option<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: fills the record, which zeros initialise.
    let known = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } == 0;
    // SAFETY: see above. macOS counts bytes.
    known.then(|| unsafe { usage.assume_init() }.ru_maxrss).and_then(|bytes| u64::try_from(bytes).ok())
}

/// Lets Linux back large untouched memory with pages of 2 MiB: the faults of small ones took a tenth of the time of a
/// large decode.
#[cfg(target_os = "linux")]
pub fn advise_huge_pages<T>(values: &mut [T]) {
    const PAGE: usize = 2 << 20;
    let range = values.as_mut_ptr_range();
    let (begin, end) = ((range.start as usize).next_multiple_of(PAGE), range.end as usize / PAGE * PAGE);
    if begin < end {
        // SAFETY: whole pages within memory that is the caller's. The advice changes no content; that it may be refused
        // is no matter.
        unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub fn advise_huge_pages<T>(_: &mut [T]) {}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn allow_matrix_unit() -> bool {
    // From the kernel's asm/prctl.h, and the number of the tiles' state in XCR0.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: a call with two numbers, which changes what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// macOS runs on no processor that has one.
#[cfg(all(not(target_os = "linux"), target_arch = "x86_64"))]
pub fn allow_matrix_unit() -> bool {
    false
}

static WHOSE: OnceLock<fn(usize) -> Option<&'static str>> = OnceLock::new();

pub fn on_lost_page(whose: fn(usize) -> Option<&'static str>) {
    let _ = WHOSE.set(whose);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    // SAFETY: a zeroed sigaction is a valid one, and the handler calls nothing that a handler may not.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, null_mut());
    }
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system passes a valid pointer, and all that is called may be called in a handler.
    unsafe {
        let at = (*info).si_addr() as usize;
        if let Some(text) = WHOSE.get().and_then(|whose| whose(at)) {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::_exit(1);
        }
        // The address is in no mapping of ours. Once the handler returns, the signal acts as if there were no handler.
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}

/// A thread waits for the signals, so no other one is ever interrupted.
pub fn on_stop(mut heed: impl FnMut(bool) + Send + 'static) {
    let mut set = MaybeUninit::uninit();
    // SAFETY: initialises the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it has just been.
    let mut set = unsafe { set.assume_init() };
    let heeded = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2]
        .into_iter()
        .filter(|&signal| !ignored(signal));
    // SAFETY: valid signal numbers.
    heeded.for_each(|signal| {
        unsafe { libc::sigaddset(&mut set, signal) };
    });
    // SAFETY: a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut()) };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: a valid set, blocked in this thread.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            heed(signal == libc::SIGINT);
        }
    });
}

/// Whether the parent process wants this signal ignored.
fn ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action, which zeros initialise.
    let known = unsafe { libc::sigaction(signal, null(), action.as_mut_ptr()) } == 0;
    // SAFETY: see above.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

pub fn host_name() -> Option<String> {
    let mut name = [0u8; 256];
    // SAFETY: writes no more than there is room for; the last byte stays zero.
    let known = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } == 0;
    let text = CStr::from_bytes_until_nul(&name).ok()?;
    known.then(|| text.to_string_lossy().into_owned())
}

pub const CUDA_DRIVER: &str = "libcuda.so.1";

pub fn why_not_loaded(library: &str) -> Option<String> {
    let name = CString::new(library).ok()?;
    // SAFETY: a library runs its own start and no more; the text is the loader's until its next call in this thread.
    unsafe {
        if !libc::dlopen(name.as_ptr(), libc::RTLD_LAZY).is_null() {
            return None;
        }
        let text = libc::dlerror();
        let text = if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() };
        // glibc and macOS have their own words. Of a library that it needs, glibc gives that one's name.
        let of_itself = text.starts_with(&format!("{library}: ")) || text.starts_with("dlopen(");
        let missing = of_itself && text.to_lowercase().contains("no such file");
        (!missing).then_some(text)
    }
}

pub fn has_nvidia_hardware() -> bool {
    let of_nvidia = |device: fs::DirEntry| {
        let read = |name| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        read("vendor").trim() == "0x10de" && read("class").starts_with("0x03")
    };
    let devices = fs::read_dir("/sys/bus/pci/devices");
    Path::new("/dev/nvidiactl").exists() || devices.is_ok_and(|all| all.flatten().any(of_nvidia))
}

pub fn nvidia_driver() -> Option<String> {
    Some(fs::read_to_string("/sys/module/nvidia/version").ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_of_all_control_groups_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let limit = || smallest_limit(dir.path());
        assert_eq!(limit(), None, "no control groups");
        write("proc/self/cgroup", "0::/user.slice/session\n");
        assert_eq!(limit(), None);
        write("sys/fs/cgroup/user.slice/session/memory.max", "max\n");
        assert_eq!(limit(), None);
        write("sys/fs/cgroup/user.slice/memory.max", "2000000\n");
        assert_eq!(limit(), Some(2_000_000), "that of the group around it");
        write("sys/fs/cgroup/user.slice/session/memory.max", "1000000\n");
        assert_eq!(limit(), Some(1_000_000));

        // Version 1, in a container, where the path is the host's.
        write("proc/self/cgroup", "5:cpu,cpuacct:/docker/0\n4:memory:/docker/0\n0::/docker/0\n");
        assert_eq!(limit(), None);
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit(), Some(9_223_372_036_854_771_712), "what no machine has");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n");
        assert_eq!(limit(), Some(3_000_000));
    }
}
