//! Requests to stop: Ctrl-C, SIGTERM, SIGHUP, or what a system has in their place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use edm2k::system;

use super::say::note;

/// The requests that have come so far.
pub struct Requests {
    /// A request to stop, and to save before that.
    pub stop: Arc<AtomicBool>,
    begun: Arc<AtomicBool>,
}

impl Requests {
    /// Begins to watch for signals; call it before this process has a second thread. `answer` is printed at the first
    /// request.
    pub fn watch(answer: &'static str) -> Self {
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let requests = Self { stop: stop.clone(), begun: begun.clone() };
        let mut interrupted = false;
        system::on_stop(move |interrupt| {
            // End at once if there is nothing to save yet, or if Ctrl-C came twice. Other signals may come twice: a
            // terminal that closes, or systemd, sends two for one request.
            if !begun.load(Ordering::Relaxed) || interrupt && interrupted {
                std::process::exit(130);
            }
            interrupted |= interrupt;
            if !stop.swap(true, Ordering::Relaxed) {
                // A thread of its own prints this. So where nobody reads what is printed, the second Ctrl-C is still
                // heeded. If no thread can be started, only this line is lost.
                let _ = std::thread::Builder::new().spawn(move || note!("{answer}; a second Ctrl-C quits at once"));
            }
        });
        requests
    }

    /// From now on a request is left to the work at hand. Before this call, it ends the process.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }
}
