//! Requests to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP.
//!
//! A thread waits for them, so no other one is ever interrupted. What the parent process set to be ignored stays
//! ignored: `nohup` and shells' background jobs rely on it.

use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::say::note;

/// What was asked so far.
pub struct Requests {
    /// To stop, and save before that.
    pub stop: Arc<AtomicBool>,
    begun: Arc<AtomicBool>,
}

impl Requests {
    /// Begins to watch. To be called before this process has a second thread: those begun later leave the signals to
    /// the one that waits for them.
    pub fn watch() -> Self {
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let requests = Self { stop: stop.clone(), begun: begun.clone() };
        let mut set = MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: it has just been.
        let mut set = unsafe { set.assume_init() };
        let heeded = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].into_iter().filter(|&signal| !ignored(signal));
        // SAFETY: valid signal numbers.
        heeded.for_each(|signal| {
            unsafe { libc::sigaddset(&mut set, signal) };
        });
        // SAFETY: a valid set.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut()) };
        std::thread::spawn(move || {
            let mut interrupted = false;
            loop {
                let mut signal = 0;
                // SAFETY: a valid set, blocked in this thread.
                if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                    return;
                }
                // There is nothing to save yet, or Ctrl-C came twice: a terminal that closes, or systemd, sends two
                // signals for one request.
                if !begun.load(Ordering::Relaxed) || signal == libc::SIGINT && interrupted {
                    std::process::exit(130);
                }
                interrupted |= signal == libc::SIGINT;
                if !stop.swap(true, Ordering::Relaxed) {
                    note!("finishing this step, then saving; a second Ctrl-C quits at once");
                }
            }
        });
        requests
    }

    /// From now on a request is left to the work at hand; before, it ends the process.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }
}

/// Whether the parent process wants this signal ignored.
fn ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action, which zeros initialise.
    let known = unsafe { libc::sigaction(signal, null(), action.as_mut_ptr()) } == 0;
    // SAFETY: see above.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
