//! Files mapped into memory.
//!
//! Whoever reads a mapped file that was truncated meanwhile, or whose disk fails, is sent SIGBUS: a mapping has no
//! other way to report an error. So the first mapping installs a handler that looks up whose file it was, says so and
//! ends the process with status 1. What a command writes is whole or not there at any moment, so nothing is lost that
//! had been saved.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};

use memmap2::Mmap;

/// A file's bytes, read-only.
pub struct Mapped {
    map: Mmap,
    entry: &'static Entry,
}

impl Mapped {
    /// Maps a regular file that nobody changes in place meanwhile; `path` is for messages.
    ///
    /// # Errors
    /// Whatever the system reports.
    ///
    /// # Safety
    /// As [`Mmap::map`]: the file's bytes do not change while they are mapped. That it is truncated is allowed.
    pub unsafe fn new(file: &File, path: &Path) -> io::Result<Self> {
        // SAFETY: the caller's promise.
        let map = unsafe { Mmap::map(file) }?;
        static HANDLER: Once = Once::new();
        HANDLER.call_once(install);
        let what = "it can no longer be read: it was truncated while in use, or its disk fails";
        let message = format!("edm2k: error: {}: {what}\n", path.display().to_string().escape_debug());
        let entry = enlist(map.as_ptr() as usize, map.len(), message);
        Ok(Self { map, entry })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.entry.length.store(0, Ordering::Release);
        let mut unused = UNUSED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        unused.push(self.entry);
    }
}

/// A mapping as the handler sees it: it may neither lock nor allocate, so entries live forever, in a list that only
/// grows at its head. Those of ended mappings are used again.
struct Entry {
    start: AtomicUsize,
    /// 0: not in use.
    length: AtomicUsize,
    message: AtomicPtr<String>,
    next: AtomicPtr<Entry>,
}

static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(null_mut());
static UNUSED: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

fn enlist(start: usize, length: usize, message: String) -> &'static Entry {
    let message = Box::into_raw(Box::new(message));
    let unused = UNUSED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
    if let Some(entry) = unused {
        let old = entry.message.swap(message, Ordering::Relaxed);
        // SAFETY: made by `into_raw` below or above. The handler reads it only for an address in the mapping that it
        // was made for, which has ended.
        drop(unsafe { Box::from_raw(old) });
        entry.start.store(start, Ordering::Relaxed);
        entry.length.store(length, Ordering::Release);
        return entry;
    }
    let entry: &'static Entry = Box::leak(Box::new(Entry {
        start: AtomicUsize::new(start),
        length: AtomicUsize::new(length),
        message: AtomicPtr::new(message),
        next: AtomicPtr::new(null_mut()),
    }));
    let mut head = ENTRIES.load(Ordering::Acquire);
    loop {
        entry.next.store(head, Ordering::Relaxed);
        let new = std::ptr::from_ref(entry).cast_mut();
        match ENTRIES.compare_exchange(head, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return entry,
            Err(other) => head = other,
        }
    }
}

fn install() {
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
    // SAFETY: the system passes a valid pointer. Entries are never freed, nor are messages of mappings in use.
    unsafe {
        let at = (*info).si_addr() as usize;
        let mut entry = ENTRIES.load(Ordering::Acquire);
        while let Some(known) = entry.as_ref() {
            let length = known.length.load(Ordering::Acquire);
            if at.wrapping_sub(known.start.load(Ordering::Relaxed)) < length.next_multiple_of(1 << 16) {
                let message = &*known.message.load(Ordering::Relaxed);
                libc::write(2, message.as_ptr().cast(), message.len());
                libc::_exit(1);
            }
            entry = known.next.load(Ordering::Relaxed);
        }
        // Nobody's mapping: as if there were no handler, once it returns.
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}
