//! What a run shows on stderr.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar};

use super::super::ranks::Ranks;
use super::super::say::{above, note};
use edm2k::train::{Event, Status};

/// Rank 0 speaks for all, unless another rank has something of its own to say.
pub struct Progress {
    bar: ProgressBar,
    rank: usize,
    /// Images that the run is to see.
    duration: u64,
    terminal: bool,
    /// Images seen, once a step is done.
    pub seen: Option<u64>,
    /// Whether a file was written.
    pub saved: bool,
}

impl Progress {
    /// That of a run that is to see so many images.
    pub fn new(ranks: &mut Ranks, duration: u64) -> Self {
        let bar = ranks.bar(duration, "{human_pos} of {human_len} images, {eta} left, {msg}");
        let (rank, terminal) = (ranks.met().rank(), std::io::stderr().is_terminal());
        Self { bar, rank, duration, terminal, seen: None, saved: false }
    }

    /// Shows what happens.
    pub fn show(&mut self, event: Event) {
        match event {
            Event::Note(text) => self.say(&text),
            Event::Warning(text) => self.say(&format!("warning: {text}")),
            Event::Fewer(text) => self.say(&format!("warning: {text}; --batch-gpu sets how many")),
            Event::Saved(path) => {
                self.saved = true;
                above(&self.bar, &format!("wrote {}", path.display()));
            }
            Event::Step(nimg) => {
                if self.seen.is_none() {
                    // What was done before the restart says nothing about the time that is left.
                    self.bar.set_position(nimg);
                    self.bar.reset_eta();
                }
                self.seen = Some(nimg);
                self.bar.set_position(nimg);
            }
            Event::Status(status) => self.status(status),
            _ => {}
        }
    }

    fn say(&self, text: &str) {
        match self.rank {
            0 => above(&self.bar, text),
            rank => note!("rank {rank}: {text}"),
        }
    }

    fn status(&self, status: &Status) {
        let Status { nimg, loss, lr, grad_norm, images_per_s, .. } = status;
        let text = format!("loss {loss:.4}, lr {lr:.2e}, gradient {grad_norm:.3}, {images_per_s:.1} images/s");
        if self.terminal {
            self.bar.set_message(text);
        } else {
            let left = self.duration.saturating_sub(*nimg) as f64 / images_per_s.max(1e-9);
            let left = HumanDuration(Duration::from_secs_f64(left.min(1e9)));
            note!("{nimg} of {} images, {text}, {left} left", self.duration);
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
