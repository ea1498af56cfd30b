//! How ranks watch each other. A thread for each socket sends a sign of life every two seconds. A rank that dies closes its
//! sockets, one that fails says why before, and a machine that is lost falls silent: rank 0 tells all others which rank it
//! was. Then the sockets on which a rank waits are cut off. If the rank then waits for ten seconds more, or has work of its
//! own for longer than [`Patience::alone`], `on_lost` is called.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::meeting::Met;
use super::{GREETING, MAX_TEXT, Patience};

const BEAT: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked whether a rank has ended.
const LOOK: Duration = Duration::from_millis(100);
/// Ticks without a sign of life until a rank is given up. Ticks are counted, not time: a process that was stopped for a
/// while (a job that Slurm suspends) counts one tick for all of that.
const SILENT: u32 = 30;
/// How long a rank that waits for others may take to end by itself once one is lost.
const GRACE: Duration = Duration::from_secs(10);

/// What is known of those who are not there any more.
#[derive(Default)]
struct Fate {
    /// Who was lost first.
    verdict: Option<String>,
    /// The ranks that have said goodbye.
    done: Vec<usize>,
}

/// What a rank says to those that watch it.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Sign {
    Alive = b'.',
    Goodbye = b'G',
    /// This rank has failed, or has learned that another is lost: why.
    Lost = b'F',
}

/// What the watching threads share with the rank.
pub(super) struct Watch {
    rank: usize,
    /// The ranks at the other end, and the sockets to them.
    peers: Vec<(usize, TcpStream)>,
    names: Vec<String>,
    /// The sockets for messages, which are cut off when a rank is lost.
    links: Vec<TcpStream>,
    /// What became of the others, and that somebody waits for it.
    fate: Mutex<Fate>,
    reached: Condvar,
    /// This rank has said goodbye.
    left: AtomicBool,
    begun: Instant,
    /// Since when this rank has been waiting for others, in milliseconds after `begun`; 0 if it is not waiting.
    waiting: AtomicU64,
    patience: Patience,
    on_lost: Box<dyn Fn(&str) + Send + Sync>,
}

impl Watch {
    /// Watches the ranks at the other end of these sockets, each in a thread of its own.
    pub fn begin(
        rank: usize,
        met: Met,
        patience: Patience,
        on_lost: impl Fn(&str) + Send + Sync + 'static,
    ) -> io::Result<Arc<Self>> {
        let Met { links, watches, names } = met;
        for stream in &watches {
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(GREETING))?;
        }
        let others = if rank == 0 { 1..names.len() } else { 0..1 };
        let watch = Arc::new(Self {
            rank,
            peers: others.zip(watches).collect(),
            names,
            links,
            fate: Mutex::default(),
            reached: Condvar::new(),
            left: AtomicBool::new(false),
            begun: Instant::now(),
            waiting: AtomicU64::new(0),
            patience,
            on_lost: Box::new(on_lost),
        });
        for number in 0..watch.peers.len() {
            let watch = watch.clone();
            std::thread::spawn(move || watch.peer(number));
        }
        Ok(watch)
    }

    /// The name of the rank at the other end of a socket.
    pub fn peer_name(&self, peer: usize) -> &str {
        &self.names[self.peers[peer].0]
    }

    /// This rank begins to wait for others.
    pub fn waits(&self) {
        let now = self.begun.elapsed().as_millis() as u64;
        self.waiting.store(now.max(1), Ordering::Relaxed);
    }

    /// This rank has what it waited for.
    pub fn goes_on(&self) {
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Says goodbye, once; or why this rank has failed.
    pub fn leave(&self, failed: Option<&str>) {
        if self.left.swap(true, Ordering::SeqCst) {
            return;
        }
        match failed {
            None => self.tell(Sign::Goodbye, ""),
            Some(why) => self.tell(Sign::Lost, &format!("{} failed: {why}", self.names[self.rank])),
        }
    }

    /// Ends without a goodbye, so that the others see that this rank is gone.
    pub fn end(&self) {
        self.left.store(true, Ordering::SeqCst);
        self.cut();
        self.peers.iter().for_each(|(_, peer)| drop(peer.shutdown(Shutdown::Both)));
    }

    /// Why a socket for messages does not work, which the watching threads may know better than the system.
    pub fn cause(&self, peer: usize, cause: &io::Error) -> String {
        let (rank, name) = (self.peers[peer].0, self.peer_name(peer));
        let fate = self.fate.lock().expect("no thread panics with it");
        let unknown = |fate: &mut Fate| fate.verdict.is_none() && !fate.done.contains(&rank);
        let (fate, _) = self.reached.wait_timeout_while(fate, GRACE, unknown).expect("no thread panics with it");
        match &fate.verdict {
            Some(verdict) => verdict.clone(),
            None if fate.done.contains(&rank) => format!("{name} has ended already: was it given another command?"),
            None => format!("the connection to {name} broke: {cause}"),
        }
    }

    /// Sends a sign and a text to every rank at the other end. Errors are ignored: a rank that is gone needs no message.
    fn tell(&self, sign: Sign, text: &str) {
        let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
        let message = [&[sign as u8][..], &(text.len() as u32).to_le_bytes(), text].concat();
        self.peers.iter().for_each(|(_, peer)| drop((&mut &*peer).write_all(&message)));
    }

    /// Ends all waiting.
    fn cut(&self) {
        self.links.iter().for_each(|link| drop(link.shutdown(Shutdown::Both)));
    }

    /// Watches one other rank until it says goodbye, or this one does.
    fn peer(&self, number: usize) {
        let (other, stream) = &self.peers[number];
        let (mut stream, name) = (stream, &self.names[*other]);
        let (mut said, mut buffer, mut silent, mut last) = (Vec::new(), [0; 4096], 0, Instant::now());
        let (mut waited, mut looked) = (Waited::default(), Instant::now());
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return self.lost(format!("{name} has ended")),
                Ok(n) => {
                    said.extend_from_slice(&buffer[..n]);
                    silent = 0;
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => silent += 1,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return self.lost(format!("{name} has ended ({e})")),
            }
            while let Some((sign, text)) = first_message(&mut said) {
                match sign {
                    sign if sign == Sign::Goodbye as u8 => {
                        self.fate.lock().expect("no thread panics with it").done.push(*other);
                        return self.reached.notify_all();
                    }
                    sign if sign == Sign::Lost as u8 => return self.lost(text),
                    _ => {}
                }
            }
            if self.left.load(Ordering::SeqCst) {
                return;
            }
            if silent > SILENT {
                return self.lost(format!("{name} has been silent for {SILENT} s"));
            }
            let since = self.waiting.load(Ordering::Relaxed);
            let waited = waited.after(since, std::mem::replace(&mut looked, Instant::now()).elapsed());
            if let Some(longest) = self.patience.wait.filter(|longest| waited > *longest) {
                let own = &self.names[self.rank];
                return self.lost(format!("{own} has waited {} s for the other ranks", longest.as_secs()));
            }
            if last.elapsed() >= BEAT {
                last = Instant::now();
                // If that fails, reading will tell.
                let _ = stream.write_all(&[Sign::Alive as u8, 0, 0, 0, 0]);
            }
        }
    }

    /// The first time that a rank is lost, tells every other one which it was, and sees to it that this rank ends.
    fn lost(&self, who: String) {
        if self.left.load(Ordering::SeqCst) {
            return;
        }
        {
            let mut fate = self.fate.lock().expect("no thread panics with it");
            if fate.verdict.is_some() {
                return;
            }
            fate.verdict = Some(who.clone());
            // Tell the others before this rank learns of it and ends. Otherwise they would only see that this one is
            // gone.
            self.tell(Sign::Lost, &who);
        }
        self.reached.notify_all();
        self.cut();
        let (lost, mut waited) = (Instant::now(), Duration::ZERO);
        while waited < GRACE && lost.elapsed() < self.patience.alone.max(GRACE) {
            if self.left.load(Ordering::SeqCst) {
                return;
            }
            sleep(LOOK);
            if self.waiting.load(Ordering::Relaxed) > 0 {
                waited += LOOK;
            }
        }
        (self.on_lost)(&who);
    }
}

/// How long a rank has waited, by what passed between one look and the next. Of that no more than two ticks count: a process
/// that was stopped for a while did not wait.
#[derive(Default)]
struct Waited {
    since: u64,
    time: Duration,
}

impl Waited {
    /// How long it has waited at a look that comes `passed` after the one before; `since` is [`Watch::waiting`] now.
    fn after(&mut self, since: u64, passed: Duration) -> Duration {
        let time = if since > 0 && since == self.since { self.time + passed.min(2 * TICK) } else { Duration::ZERO };
        *self = Self { since, time };
        time
    }
}

/// Takes the first whole message off what was received: a sign and its text.
fn first_message(said: &mut Vec<u8>) -> Option<(u8, String)> {
    let (&sign, rest) = said.split_first()?;
    let length = u32::from_le_bytes(*rest.first_chunk()?) as usize;
    let end = 5 + length.min(MAX_TEXT);
    let text = String::from_utf8_lossy(said.get(5..end)?).into_owned();
    said.drain(..end);
    Some((sign, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_was_stopped_did_not_wait() {
        let (mut waited, second) = (Waited::default(), Duration::from_secs(1));
        assert_eq!(waited.after(0, second), Duration::ZERO);
        assert_eq!(waited.after(7, second), Duration::ZERO, "it began between two looks");
        assert_eq!(waited.after(7, second), second);
        assert_eq!(waited.after(7, 3600 * second), 3 * second, "stopped for an hour");
        assert_eq!(waited.after(7, second), 4 * second);
        assert_eq!(waited.after(9, second), Duration::ZERO, "another wait");
        assert_eq!(waited.after(0, second), Duration::ZERO);
    }
}
