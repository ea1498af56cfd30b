//! Files mapped into memory.
//!
//! Reading a mapped file that was truncated meanwhile, or whose disk fails, raises a signal (SIGBUS), since a mapping has
//! no other way to report an error. A process that does nothing about it is killed. The program installs a handler by
//! [`end_on_lost_page`]; the library leaves the signals of its process alone. At any moment what a command writes is either
//! whole or not there, so nothing that had been saved is lost.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use memmap2::Mmap;

use crate::system;

/// From now on, when a mapped file can no longer be read, this process prints which one it is, and ends with status 1.
pub fn end_on_lost_page() {
    system::on_lost_page(whose);
}

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
    /// As [`Mmap::map`]: the file's bytes must not change while they are mapped. The file may be truncated.
    pub unsafe fn new(file: &File, path: &Path) -> io::Result<Self> {
        // SAFETY: the caller's promise.
        let map = unsafe { Mmap::map(file) }?;
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

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
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

/// A mapping as the handler sees it. The handler may neither lock nor allocate. So entries live forever, in a list that
/// only grows at its head, and those of ended mappings are used again.
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

/// The message of the mapping that an address is in. Mappings are counted up to whole pages, so an address may seem to
/// be in several small files that lie side by side. Then it is in the one that begins last.
fn whose(at: usize) -> Option<&'static str> {
    // SAFETY: entries are never freed, nor are messages of mappings in use.
    unsafe {
        let mut entry = ENTRIES.load(Ordering::Acquire);
        let (mut found, mut begins) = (None, 0);
        while let Some(known) = entry.as_ref() {
            let (start, length) = (known.start.load(Ordering::Relaxed), known.length.load(Ordering::Acquire));
            if start >= begins && at.wrapping_sub(start) < length.next_multiple_of(1 << 16) {
                (found, begins) = (Some(known), start);
            }
            entry = known.next.load(Ordering::Relaxed);
        }
        found.map(|known| (*known.message.load(Ordering::Relaxed)).as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_files_side_by_side_the_right_one_is_named() {
        // No mapping of this process lies at such low addresses.
        let (low, high) = (1 << 20, (1 << 20) + 4096);
        for (start, length, name) in [(high, 100, "high"), (low, 4000, "low"), (high + 4096, 50, "highest")] {
            enlist(start, length, name.into());
        }
        for (at, name) in [(low, "low"), (low + 3999, "low"), (high, "high"), (high + 99, "high")] {
            assert_eq!(whose(at), Some(name), "{at:#x}");
        }
        assert_eq!((whose(low - 1), whose(high + 4096)), (None, Some("highest")));
    }
}
