//! Windows; contracts are in the module above.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::windows::ffi::OsStrExt;
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::AsRawHandle;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use windows_sys::Win32::Foundation::{
    ERROR_DIRECTORY, ERROR_INVALID_NAME, ERROR_MOD_NOT_FOUND, ERROR_NO_MORE_ITEMS, ERROR_SUCCESS,
    EXCEPTION_IN_PAGE_ERROR, FreeLibrary,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT, FILE_TYPE_CHAR,
    FILE_TYPE_DISK, FILE_TYPE_PIPE, GetFileInformationByHandle, GetFileType, WriteFile,
};
use windows_sys::Win32::System::Console::{
    CTRL_BREAK_EVENT, CTRL_C_EVENT, GetStdHandle, STD_ERROR_HANDLE, SetConsoleCtrlHandler,
};
use windows_sys::Win32::System::Diagnostics::Debug::{
    AddVectoredExceptionHandler, EXCEPTION_CONTINUE_SEARCH, EXCEPTION_POINTERS,
};
use windows_sys::Win32::System::LibraryLoader::LoadLibraryW;
use windows_sys::Win32::System::ProcessStatus::{K32GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::Registry::{
    HKEY, HKEY_LOCAL_MACHINE, KEY_READ, RegCloseKey, RegEnumKeyExW, RegOpenKeyExW,
};
use windows_sys::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, TerminateProcess};
use windows_sys::core::BOOL;

pub const OF_THE_FILE: &[i32] = &[ERROR_DIRECTORY as i32, ERROR_INVALID_NAME as i32];

pub fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

pub fn what_instead(file: &File) -> io::Result<Option<&'static str>> {
    // SAFETY: an open handle.
    Ok(match unsafe { GetFileType(file.as_raw_handle()) } {
        FILE_TYPE_PIPE => Some("a pipe"),
        FILE_TYPE_CHAR => Some("a device"),
        FILE_TYPE_DISK if file.metadata()?.is_file() => None,
        FILE_TYPE_DISK => Some("a directory"),
        _ => Some("something else"),
    })
}

pub fn no_follow(how: &mut OpenOptions) -> &mut OpenOptions {
    how.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT)
}

pub fn private(how: &mut OpenOptions) -> &mut OpenOptions {
    how
}

pub fn is_at(file: &File, path: &Path) -> bool {
    let itself = FILE_FLAG_OPEN_REPARSE_POINT | FILE_FLAG_BACKUP_SEMANTICS;
    let there = OpenOptions::new().access_mode(0).custom_flags(itself).open(path);
    there.is_ok_and(|there| matches!((place(file), place(&there)), (Some(a), Some(b)) if a == b))
}

/// Volume and number of a file.
fn place(file: &File) -> Option<(u32, u32, u32)> {
    // SAFETY: an open handle, and a record that zeros initialise.
    unsafe {
        let mut about: BY_HANDLE_FILE_INFORMATION = zeroed();
        let known = GetFileInformationByHandle(file.as_raw_handle(), &mut about) != 0;
        known.then_some((about.dwVolumeSerialNumber, about.nFileIndexHigh, about.nFileIndexLow))
    }
}

pub fn leads_to_open_file(_: &Path) -> bool {
    false
}

pub fn placed(about: &Metadata) -> Option<SystemTime> {
    about.created().ok()
}

pub fn cache() -> Option<PathBuf> {
    std::env::var_os("LOCALAPPDATA").map(PathBuf::from)
}

pub fn memory() -> Option<u64> {
    // SAFETY: fills a record of the length that it says.
    unsafe {
        let mut status = MEMORYSTATUSEX { dwLength: size_of::<MEMORYSTATUSEX>() as u32, ..zeroed() };
        (GlobalMemoryStatusEx(&mut status) != 0).then_some(status.ullTotalPhys)
    }
}

pub fn memory_limit() -> Option<u64> {
    None
}

pub fn peak_memory() -> Option<u64> {
    let length = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
    // SAFETY: fills a record of that length.
    unsafe {
        let mut counters = PROCESS_MEMORY_COUNTERS { cb: length, ..zeroed() };
        let known = K32GetProcessMemoryInfo(GetCurrentProcess(), &mut counters, length) != 0;
        known.then_some(counters.PeakWorkingSetSize as u64)
    }
}

/// Does nothing: large pages need a right that users do not have.
pub fn advise_huge_pages<T>(_: &mut [T]) {}

/// Windows has a call for it since 2021, which nobody has tried.
#[cfg(target_arch = "x86_64")]
pub fn allow_matrix_unit() -> bool {
    false
}

static WHOSE: OnceLock<fn(usize) -> Option<&'static str>> = OnceLock::new();

pub fn on_lost_page(whose: fn(usize) -> Option<&'static str>) {
    let _ = WHOSE.set(whose);
    // SAFETY: the handler lives as long as the process.
    unsafe { AddVectoredExceptionHandler(1, Some(on_exception)) };
}

unsafe extern "system" fn on_exception(about: *mut EXCEPTION_POINTERS) -> i32 {
    // SAFETY: the system passes valid pointers; of this exception the second number is the address.
    unsafe {
        let record = &*(*about).ExceptionRecord;
        if record.ExceptionCode == EXCEPTION_IN_PAGE_ERROR
            && let Some(text) = WHOSE.get().and_then(|whose| whose(record.ExceptionInformation[1]))
        {
            let mut written = 0;
            WriteFile(GetStdHandle(STD_ERROR_HANDLE), text.as_ptr(), text.len() as u32, &mut written, null_mut());
            TerminateProcess(GetCurrentProcess(), 1);
        }
    }
    EXCEPTION_CONTINUE_SEARCH
}

static HEED: Mutex<Option<Box<dyn FnMut(bool) + Send>>> = Mutex::new(None);

/// The system calls the handler in a thread of its own. If the process ignores Ctrl-C, it does not call it at all.
pub fn on_stop(heed: impl FnMut(bool) + Send + 'static) {
    *HEED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Box::new(heed));
    // SAFETY: the handler lives as long as the process.
    unsafe { SetConsoleCtrlHandler(Some(on_control), 1) };
}

unsafe extern "system" fn on_control(kind: u32) -> BOOL {
    let asked = matches!(kind, CTRL_C_EVENT | CTRL_BREAK_EVENT);
    if let Some(heed) = HEED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).as_mut() {
        heed(asked);
    }
    if !asked {
        // The window closes or the user logs off. The process ends when this handler returns, or after some seconds.
        std::thread::sleep(Duration::from_secs(60));
    }
    1
}

pub fn host_name() -> Option<String> {
    std::env::var("COMPUTERNAME").ok()
}

pub const CUDA_DRIVER: &str = "nvcuda.dll";

pub fn why_not_loaded(library: &str) -> Option<String> {
    let name = wide(library);
    // SAFETY: a text that ends with 0; a library runs its own start and no more.
    let loaded = unsafe { LoadLibraryW(name.as_ptr()) };
    if !loaded.is_null() {
        // SAFETY: loaded above.
        unsafe { FreeLibrary(loaded) };
        return None;
    }
    let why = io::Error::last_os_error();
    if why.raw_os_error() != Some(ERROR_MOD_NOT_FOUND as i32) {
        return Some(why.to_string());
    }
    // The same error says that the library is there, and one that it needs is not.
    in_system(library).then(|| format!("{library} is there, but a library that it needs is not"))
}

/// Whether the system's directory has a library, which is where drivers put theirs.
fn in_system(library: &str) -> bool {
    let root = std::env::var_os("SystemRoot").map(PathBuf::from);
    root.is_some_and(|root| root.join("System32").join(library).exists())
}

/// Looks at the devices that have ever been plugged in. A card's key begins with its maker's number.
pub fn has_nvidia_hardware() -> bool {
    let path = wide("SYSTEM\\CurrentControlSet\\Enum\\PCI");
    // SAFETY: texts that end with 0, and a buffer of the length that is told.
    unsafe {
        let mut key: HKEY = null_mut();
        if RegOpenKeyExW(HKEY_LOCAL_MACHINE, path.as_ptr(), 0, KEY_READ, &mut key) != ERROR_SUCCESS {
            return false;
        }
        let found = (0..).find_map(|index| {
            let mut name = [0u16; 256];
            let mut length = name.len() as u32;
            let (reserved, class) = (null(), null_mut());
            let name_at = name.as_mut_ptr();
            match RegEnumKeyExW(key, index, name_at, &mut length, reserved, class, null_mut(), null_mut()) {
                ERROR_NO_MORE_ITEMS => Some(false),
                ERROR_SUCCESS => {
                    String::from_utf16_lossy(&name[..length as usize]).starts_with("VEN_10DE").then_some(true)
                }
                _ => Some(false),
            }
        });
        RegCloseKey(key);
        found == Some(true)
    }
}

pub fn nvidia_driver() -> Option<String> {
    None
}

fn wide(text: &str) -> Vec<u16> {
    std::ffi::OsStr::new(text).encode_wide().chain([0]).collect()
}
