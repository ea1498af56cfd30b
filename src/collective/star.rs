//! Sockets between ranks. Every rank has two to rank 0: one for messages, and one by which the two watch each other.
//!
//! **Meeting.** Rank 0 listens. The others call until it answers, in any order, up to a time limit. Each says its
//! number, how many ranks it expects, its job and its version. One that does not fit is named, and nobody goes on
//! waiting for a rank that cannot come any more.
//!
//! **Watching.** A thread for each socket sends a sign of life every two seconds. A rank that dies closes its sockets,
//! one that fails says why before, and a machine that is lost falls silent: rank 0 tells all others which rank it was.
//! Then the sockets on which a rank waits are cut off. If that does not end the rank in ten seconds, the `on_lost` of
//! [`Star::join`] is called.
//!
//! **Summing**, by [`Collective`] for [`Star`], is for tests on one machine: every value goes through rank 0, which
//! adds them up in the order of the ranks and sends all the same bits. On N ranks that is 8 (N - 1) bytes a value
//! through one socket after the other, too slow to train with. `Nccl` is for training.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Collective, CollectiveError, World};
use crate::backend::Values;
use crate::system;

/// The first bytes of a call, so that nobody takes another service for a rank.
const MAGIC: &[u8; 8] = b"edm2krnk";
/// Longest greeting, and longest reason.
const MAX_TEXT: usize = 1 << 20;
/// Most bytes that a rank says in a meeting.
const MAX_SAID: u64 = 1 << 32;
/// How long a caller may take for its greeting.
const GREETING: Duration = Duration::from_secs(10);
const BEAT: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_secs(1);
/// Ticks without a sign of life until a rank is given up. Ticks are counted, not time: a process that was stopped for a
/// while (a job that Slurm suspends) counts one tick for all of that.
const SILENT: u32 = 30;
/// How long a rank may take to end by itself once another is lost.
const GRACE: Duration = Duration::from_secs(10);
/// Longest time that ranks wait for each other where all have the same amount to do. A checkpoint may take minutes;
/// this is for what nobody foresaw.
pub const LONGEST: Duration = Duration::from_secs(1800);
/// Values that are summed at a time.
const CHUNK: usize = 1 << 16;

/// How long ranks wait for all to come: `EDM2K_RANKS_TIMEOUT` in seconds, or 5 minutes.
///
/// # Errors
/// The variable is no number of seconds.
pub fn limit() -> Result<Duration, CollectiveError> {
    let Some(text) = std::env::var_os("EDM2K_RANKS_TIMEOUT") else { return Ok(Duration::from_secs(300)) };
    let seconds = text.to_str().and_then(|text| text.parse::<u32>().ok()).filter(|&seconds| seconds > 0);
    let wrong = || format!("EDM2K_RANKS_TIMEOUT is '{}', expected seconds", text.display());
    seconds.map(|s| Duration::from_secs(s.into())).ok_or_else(|| CollectiveError::Environment(wrong()))
}

/// What a rank says when it calls.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: String,
    job: String,
    rank: usize,
    size: usize,
    watch: bool,
    /// Machine and process, for people.
    name: String,
}

/// The answer to a call, once all ranks have come.
#[derive(Serialize, Deserialize)]
enum Reply {
    /// The names of all.
    Welcome(Vec<String>),
    /// Why there will be no meeting.
    Refused(String),
}

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Call {
    Gather = 1,
    Sum = 2,
    Broadcast = 3,
}

/// What is known of those who are not there any more.
#[derive(Default)]
struct Fate {
    /// Who was lost first.
    verdict: Option<String>,
    /// The ranks that have said goodbye.
    done: Vec<usize>,
}

/// What the watching threads share with the rank.
struct Watch {
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
    /// Most time that it waits; none: as long as the others give signs of life.
    longest: Option<Duration>,
    on_lost: Box<dyn Fn(&str) + Send + Sync>,
}

/// Rank 0 with a socket to each other rank, or another one with one to rank 0.
pub struct Star {
    world: World,
    links: Vec<TcpStream>,
    watch: Arc<Watch>,
}

impl Star {
    /// Meets the other ranks within `limit`. After that it waits for them for at most `longest` at a time, or for as long
    /// as they are alive. If another rank is lost and this one does not end by itself, `on_lost` is called in a thread of
    /// its own, with the name of the lost rank. It should end the process.
    ///
    /// # Errors
    /// [`CollectiveError::Address`], [`CollectiveError::Unfit`], [`CollectiveError::Missing`].
    pub fn join(
        world: World,
        limit: Duration,
        longest: Option<Duration>,
        on_lost: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, CollectiveError> {
        let (links, watches, names) = if world.rank == 0 { host(&world, limit)? } else { call(&world, limit)? };
        let others = if world.rank == 0 { 1..world.size } else { 0..1 };
        let copies = links.iter().map(TcpStream::try_clone).collect::<io::Result<_>>();
        let broken = |cause: io::Error| CollectiveError::Address(format!("sockets: {cause}"));
        for stream in &watches {
            stream.set_read_timeout(Some(TICK)).map_err(broken)?;
            stream.set_write_timeout(Some(GREETING)).map_err(broken)?;
        }
        let watch = Arc::new(Watch {
            rank: world.rank,
            peers: others.zip(watches).collect(),
            names,
            links: copies.map_err(broken)?,
            fate: Mutex::default(),
            reached: Condvar::new(),
            left: AtomicBool::new(false),
            begun: Instant::now(),
            waiting: AtomicU64::new(0),
            longest,
            on_lost: Box::new(on_lost),
        });
        for number in 0..watch.peers.len() {
            let watch = watch.clone();
            std::thread::spawn(move || watch.peer(number));
        }
        Ok(Self { world, links, watch })
    }

    /// The error for a socket that does not work. The watching threads may know the cause better.
    fn broken(&self, peer: usize, cause: &io::Error) -> CollectiveError {
        let rank = self.watch.peers[peer].0;
        let name = &self.watch.names[rank];
        let fate = self.watch.fate.lock().expect("no thread panics with it");
        let unknown = |fate: &mut Fate| fate.verdict.is_none() && !fate.done.contains(&rank);
        let (fate, _) = self.watch.reached.wait_timeout_while(fate, GRACE, unknown).expect("no thread panics with it");
        CollectiveError::Lost(match &fate.verdict {
            Some(verdict) => verdict.clone(),
            None if fate.done.contains(&rank) => format!("{name} has ended already: was it given another command?"),
            None => format!("the connection to {name} broke: {cause}"),
        })
    }

    /// Sends the beginning of a call, and so many bytes.
    fn send(&mut self, peer: usize, call: Call, bytes: &[u8]) -> Result<(), CollectiveError> {
        let mut head = vec![call as u8];
        head.extend((bytes.len() as u64).to_le_bytes());
        let link = &mut self.links[peer];
        let sent = link.write_all(&head).and_then(|()| link.write_all(bytes));
        sent.map_err(|cause| self.broken(peer, &cause))
    }

    /// Receives the beginning of a call: how many bytes follow.
    fn expect(&mut self, peer: usize, call: Call) -> Result<u64, CollectiveError> {
        let mut head = [0; 9];
        self.links[peer].read_exact(&mut head).map_err(|cause| self.broken(peer, &cause))?;
        let length = u64::from_le_bytes(*head.last_chunk().expect("nine bytes have eight"));
        if head[0] != call as u8 || length > MAX_SAID {
            let name = &self.watch.names[self.watch.peers[peer].0];
            let what = format!("{name} is at call {} of {length} bytes, this one at {call:?}", head[0]);
            return Err(CollectiveError::Differs(what));
        }
        Ok(length)
    }

    fn receive(&mut self, peer: usize, call: Call) -> Result<Vec<u8>, CollectiveError> {
        let mut bytes = vec![0; self.expect(peer, call)? as usize];
        self.links[peer].read_exact(&mut bytes).map_err(|cause| self.broken(peer, &cause))?;
        Ok(bytes)
    }

    /// Receives a call with as many values as this rank has.
    fn receive_values(&mut self, peer: usize, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        let (found, expected) = (self.expect(peer, call)?, size_of_val(values) as u64);
        if found != expected {
            let name = &self.watch.names[self.watch.peers[peer].0];
            return Err(CollectiveError::Differs(format!("{name} sends {found} bytes of values, expected {expected}")));
        }
        let got = self.links[peer].read_exact(bytemuck::cast_slice_mut(values));
        got.map_err(|cause| self.broken(peer, &cause))?;
        // Values are little-endian on the wire, and on all machines for which there are cards.
        Ok(())
    }

    /// Sums values, or replaces them by rank 0's.
    fn exchange(&mut self, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        let mut other = vec![0.0; CHUNK.min(values.len())];
        for values in values.chunks_mut(CHUNK) {
            let other = &mut other[..values.len()];
            if self.world.rank > 0 {
                if call == Call::Sum {
                    self.send(0, call, bytemuck::cast_slice(values))?;
                }
                self.receive_values(0, call, values)?;
                continue;
            }
            if call == Call::Sum {
                for peer in 0..self.links.len() {
                    self.receive_values(peer, call, other)?;
                    values.iter_mut().zip(&*other).for_each(|(sum, x)| *sum += x);
                }
            }
            (0..self.links.len()).try_for_each(|peer| self.send(peer, call, bytemuck::cast_slice(values)))?;
        }
        Ok(())
    }

    fn exchange_anywhere(&mut self, call: Call, values: Values) -> Result<(), CollectiveError> {
        self.waits();
        match values {
            Values::Host(values) => self.exchange(call, values)?,
            Values::Device(memory, bytes) => {
                let mut copy = vec![0f32; bytes.len() / 4];
                memory.read(bytes.start, bytemuck::cast_slice_mut(&mut copy))?;
                self.exchange(call, &mut copy)?;
                memory.write(bytes.start, bytemuck::cast_slice(&copy))?;
            }
        }
        self.watch.waiting.store(0, Ordering::Relaxed);
        Ok(())
    }
}

impl Collective for Star {
    fn rank(&self) -> usize {
        self.world.rank
    }

    fn size(&self) -> usize {
        self.world.size
    }

    fn all_reduce(&mut self, values: Values) -> Result<(), CollectiveError> {
        self.exchange_anywhere(Call::Sum, values)
    }

    fn broadcast(&mut self, values: Values) -> Result<(), CollectiveError> {
        self.exchange_anywhere(Call::Broadcast, values)
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.waits();
        let all = if self.world.rank == 0 {
            let mut all = vec![own.to_vec()];
            for peer in 0..self.links.len() {
                all.push(self.receive(peer, Call::Gather)?);
            }
            let lengths = all.iter().flat_map(|said| (said.len() as u64).to_le_bytes());
            let joined: Vec<u8> = lengths.chain(all.iter().flatten().copied()).collect();
            (0..self.links.len()).try_for_each(|peer| self.send(peer, Call::Gather, &joined))?;
            all
        } else {
            self.send(0, Call::Gather, own)?;
            let joined = self.receive(0, Call::Gather)?;
            taken_apart(&joined, self.world.size)
                .ok_or_else(|| CollectiveError::Differs("what rank 0 sends is not what all said".into()))?
        };
        self.watch.waiting.store(0, Ordering::Relaxed);
        Ok(all)
    }

    fn waits(&self) {
        let now = self.watch.begun.elapsed().as_millis() as u64;
        self.watch.waiting.store(now.max(1), Ordering::Relaxed);
    }

    fn leave(&self, failed: Option<&str>) {
        if self.watch.left.swap(true, Ordering::SeqCst) {
            return;
        }
        match failed {
            None => self.watch.tell(b'G', ""),
            Some(why) => {
                let name = &self.watch.names[self.world.rank];
                self.watch.tell(b'F', &format!("{name} failed: {why}"));
            }
        }
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        // Without a goodbye the others see that this rank is gone.
        self.watch.left.store(true, Ordering::SeqCst);
        self.watch.cut();
        self.watch.peers.iter().for_each(|(_, peer)| drop(peer.shutdown(Shutdown::Both)));
    }
}

/// Takes apart what rank 0 has joined: lengths, then contents.
fn taken_apart(joined: &[u8], count: usize) -> Option<Vec<Vec<u8>>> {
    let (lengths, mut rest) = joined.split_at_checked(8 * count)?;
    let mut all = Vec::with_capacity(count);
    for length in lengths.as_chunks::<8>().0 {
        let (said, behind) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        all.push(said.to_vec());
        rest = behind;
    }
    rest.is_empty().then_some(all)
}

// ---- watching -------------------------------------------------------------------------------

impl Watch {
    /// Sends a letter and a text to every rank at the other end. Errors are ignored: a rank that is gone needs no
    /// message.
    fn tell(&self, letter: u8, text: &str) {
        let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
        let message = [&[letter][..], &(text.len() as u32).to_le_bytes(), text].concat();
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
            while let Some((letter, text)) = first_message(&mut said) {
                match letter {
                    b'G' => {
                        self.fate.lock().expect("no thread panics with it").done.push(*other);
                        return self.reached.notify_all();
                    }
                    b'F' => return self.lost(text),
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
            if let Some(longest) = self.longest.filter(|longest| waited > *longest) {
                let own = &self.names[self.rank];
                return self.lost(format!("{own} has waited {} s for the other ranks", longest.as_secs()));
            }
            if last.elapsed() >= BEAT {
                last = Instant::now();
                // If that fails, reading will tell.
                let _ = stream.write_all(&[b'.', 0, 0, 0, 0]);
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
            self.tell(b'F', &who);
        }
        self.reached.notify_all();
        self.cut();
        let lost = Instant::now();
        while lost.elapsed() < GRACE {
            if self.left.load(Ordering::SeqCst) {
                return;
            }
            sleep(Duration::from_millis(100));
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

/// Takes the first whole message off what was received: a letter and its text.
fn first_message(said: &mut Vec<u8>) -> Option<(u8, String)> {
    let (&letter, rest) = said.split_first()?;
    let length = u32::from_le_bytes(*rest.first_chunk()?) as usize;
    let end = 5 + length.min(MAX_TEXT);
    let text = String::from_utf8_lossy(said.get(5..end)?).into_owned();
    said.drain(..end);
    Some((letter, text))
}

// ---- meeting --------------------------------------------------------------------------------

/// Sockets for messages and for watching, in the order of the ranks at the other end, and the names of all ranks.
type Met = (Vec<TcpStream>, Vec<TcpStream>, Vec<String>);

fn hello(world: &World, watch: bool) -> Hello {
    let (rank, size, job) = (world.rank, world.size, world.job.clone());
    let name = format!("rank {rank} ({}process {})", host_name(), std::process::id());
    Hello { version: env!("CARGO_PKG_VERSION").into(), job, rank, size, watch, name }
}

fn host_name() -> String {
    system::host_name().map_or(String::new(), |name| format!("{name}, "))
}

fn write_json(mut stream: &TcpStream, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(value)?;
    stream.write_all(&[&MAGIC[..], &(text.len() as u32).to_le_bytes(), &text].concat())
}

fn read_json<T: for<'a> Deserialize<'a>>(mut stream: &TcpStream) -> io::Result<T> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let length = u32::from_le_bytes(*head.last_chunk().expect("twelve bytes have four")) as usize;
    if head[..8] != MAGIC[..] || length > MAX_TEXT {
        return Err(io::Error::new(ErrorKind::InvalidData, "what answers there is no edm2k"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Listens on all of the machine's addresses, unless the address can only mean this machine. What a name resolves to does
/// not tell: to itself, many a machine is 127.0.1.1.
fn listen(world: &World) -> Result<TcpListener, CollectiveError> {
    let World { address, port, .. } = world;
    let listener = match &**address {
        "localhost" | "127.0.0.1" | "::1" => TcpListener::bind((&**address, *port)),
        _ => TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port))),
    };
    listener.map_err(|cause| {
        let what = "another rank 0 or another program is there? EDM2K_PORT sets another port on all ranks";
        CollectiveError::Address(format!("rank 0 cannot listen at {address}:{port}: {cause} ({what})"))
    })
}

/// Rank 0's side.
fn host(world: &World, limit: Duration) -> Result<Met, CollectiveError> {
    let begun = Instant::now();
    let listener = listen(world)?;
    let broken = |cause: io::Error| CollectiveError::Address(format!("{}:{}: {cause}", world.address, world.port));
    listener.set_nonblocking(true).map_err(broken)?;
    // The two sockets of each other rank: for messages and for watching.
    let mut come: Vec<[Option<TcpStream>; 2]> = (1..world.size).map(|_| [None, None]).collect();
    let mut names = vec![hello(world, false).name];
    names.resize(world.size, String::new());
    let (sender, callers) = channel::<(TcpStream, Hello)>();
    let result = loop {
        for (place, name) in come.iter_mut().zip(&mut names[1..]) {
            // Whoever has ended leaves its place to a process that is started instead.
            if place.iter().flatten().any(is_gone) {
                (*place, *name) = ([None, None], String::new());
            }
        }
        if come.iter().flatten().all(Option::is_some) {
            break Ok(());
        }
        if begun.elapsed() > limit {
            let who: Vec<_> = (1..world.size).filter(|rank| come[rank - 1].iter().any(Option::is_none)).collect();
            break Err(CollectiveError::Missing { missing: who.len(), size: world.size, who, limit });
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let sender = sender.clone();
                // Each caller is read in a thread of its own, so that one who says nothing holds up nobody.
                std::thread::spawn(move || {
                    let greeting = stream
                        .set_nonblocking(false)
                        .and_then(|()| stream.set_read_timeout(Some(GREETING)))
                        .and_then(|()| read_json(&stream));
                    greeting.map(|hello| sender.send((stream, hello)))
                });
            }
            // Nobody calls at the moment, or a caller has gone already.
            Err(_) => sleep(Duration::from_millis(10)),
        }
        let Ok((stream, caller)) = callers.try_recv() else { continue };
        if caller.job != world.job {
            let why = format!("it belongs to job '{}', {} to job '{}'", world.job, caller.name, caller.job);
            let _ = write_json(&stream, &Reply::Refused(why));
            continue;
        }
        if let Err(why) = fits(world, &caller, &come, &names) {
            let _ = write_json(&stream, &Reply::Refused(why.clone()));
            break Err(CollectiveError::Unfit(why));
        }
        names[caller.rank] = caller.name;
        come[caller.rank - 1][usize::from(caller.watch)] = Some(stream);
    };
    let answer = match &result {
        Ok(()) => Reply::Welcome(names.clone()),
        Err(why) => Reply::Refused(why.to_string()),
    };
    // All are told, though one may have ended since it came.
    let mut told = Ok(());
    for ([link, _], name) in come.iter().zip(&names[1..]) {
        if let Some(Err(cause)) = link.as_ref().map(|link| write_json(link, &answer)) {
            told = Err(CollectiveError::Lost(format!("{name} has ended ({cause})")));
        }
    }
    result?;
    told?;
    let (mut links, mut watches) = (Vec::new(), Vec::new());
    for [link, watch] in come {
        links.extend(link);
        watches.extend(watch);
    }
    for stream in &links {
        stream.set_read_timeout(None).and_then(|()| stream.set_nodelay(true)).map_err(broken)?;
    }
    Ok((links, watches, names))
}

/// Whether nobody is at the other end any more; a caller that waits for an answer sends nothing.
fn is_gone(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let blocking = stream.set_nonblocking(false);
    blocking.is_err() || !matches!(peeked, Err(why) if why.kind() == ErrorKind::WouldBlock)
}

/// Why a caller is none of the ranks that are still missing.
fn fits(world: &World, caller: &Hello, come: &[[Option<TcpStream>; 2]], names: &[String]) -> Result<(), String> {
    let Hello { version, rank, size, watch, name, .. } = caller;
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        return Err(format!("{name} is edm2k {version}, rank 0 is {own}"));
    }
    if *size != world.size {
        return Err(format!("{name} counts {size} ranks, rank 0 counts {}", world.size));
    }
    if *rank == 0 || *rank >= world.size {
        return Err(format!("{name} calls rank 0, expected rank 1 to {}", world.size - 1));
    }
    if come[rank - 1][usize::from(*watch)].is_some() || (!names[*rank].is_empty() && names[*rank] != *name) {
        return Err(format!("two processes have the same number: {} and {name}", names[*rank]));
    }
    Ok(())
}

/// The side of the others.
fn call(world: &World, limit: Duration) -> Result<Met, CollectiveError> {
    let World { rank, address, port, .. } = world;
    let begun = Instant::now();
    let dial = || -> io::Result<TcpStream> {
        let mut last = io::Error::new(ErrorKind::NotFound, "no such machine");
        for place in (&**address, *port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&place, Duration::from_secs(5)) {
                // Where nobody listens, a socket may be given that very port as its own, and then connect to itself.
                Ok(stream) if stream.local_addr().ok() != stream.peer_addr().ok() => return Ok(stream),
                Ok(_) => last = ErrorKind::ConnectionRefused.into(),
                Err(why) => last = why,
            }
        }
        Err(last)
    };
    let link = loop {
        match dial() {
            Ok(stream) => break stream,
            Err(cause) if begun.elapsed() > limit => {
                let seconds = limit.as_secs();
                let what = format!("rank {rank} found no rank 0 at {address}:{port} within {seconds} s: {cause}");
                return Err(CollectiveError::Address(what));
            }
            Err(_) => sleep(Duration::from_millis(100)),
        }
    };
    let silent = |cause: &io::Error| matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    let failed = |cause: io::Error| match cause.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            CollectiveError::Lost(format!("rank 0 at {address}:{port} ended before all ranks had come"))
        }
        _ if silent(&cause) => {
            let seconds = begun.elapsed().as_secs();
            let what = "another program may be there; EDM2K_PORT sets another port on all ranks";
            CollectiveError::Address(format!("rank 0 at {address}:{port} said nothing for {seconds} s: {what}"))
        }
        _ => CollectiveError::Address(format!("{address}:{port}: {cause}")),
    };
    // Rank 0 may have begun to wait later than this one.
    link.set_read_timeout(Some(limit + GREETING)).map_err(failed)?;
    write_json(&link, &hello(world, false)).map_err(failed)?;
    let watch = dial().and_then(|watch| write_json(&watch, &hello(world, true)).map(|()| watch));
    // Rank 0 may have ended since. Then it has said why, on whichever of the two sockets it heard first.
    let answer = read_json(&link).or_else(|cause| {
        let Ok(watch) = &watch else { return Err(cause) };
        if silent(&cause) {
            return Err(cause);
        }
        watch.set_read_timeout(Some(GREETING))?;
        read_json(watch)
    });
    let names = match answer.map_err(failed)? {
        Reply::Welcome(names) if names.len() == world.size => names,
        Reply::Welcome(_) => return Err(CollectiveError::Unfit("rank 0 names others than all ranks".into())),
        Reply::Refused(why) => return Err(CollectiveError::Unfit(format!("rank 0 refuses: {why}"))),
    };
    link.set_read_timeout(None).and_then(|()| link.set_nodelay(true)).map_err(failed)?;
    Ok((vec![link], vec![watch.map_err(failed)?], names))
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
