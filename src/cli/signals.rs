//! Requests to stop: Ctrl-C, SIGTERM, SIGHUP, or what a system has in their place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use edm2k::system;

use super::say::note;

/// What was asked so far.
pub struct Requests {
    /// To stop, and save before that.
    pub stop: Arc<AtomicBool>,
    begun: Arc<AtomicBool>,
}

impl Requests {
    /// Begins to watch, before this process has a second thread; `answer` is what the first request is answered with.
    pub fn watch(answer: &'static str) -> Self {
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let requests = Self { stop: stop.clone(), begun: begun.clone() };
        let mut interrupted = false;
        system::on_stop(move |interrupt| {
            // There is nothing to save yet, or Ctrl-C came twice: a terminal that closes, or systemd, sends two signals
            // for one request.
            if !begun.load(Ordering::Relaxed) || interrupt && interrupted {
                std::process::exit(130);
            }
            interrupted |= interrupt;
            if !stop.swap(true, Ordering::Relaxed) {
                // By a thread of its own: where nobody reads what is printed, the second Ctrl-C still is heeded.
                // Where there can be none, only this line is lost.
                let _ = std::thread::Builder::new().spawn(move || note!("{answer}; a second Ctrl-C quits at once"));
            }
        });
        requests
    }

    /// From now on a request is left to the work at hand; before, it ends the process.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }
}
