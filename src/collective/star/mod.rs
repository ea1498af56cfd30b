//! Sockets between ranks. Every rank has two to rank 0: one for messages, and one by which the two watch each other.
//!
//! `meeting` says how they come together, and `watch` how each learns that another is lost.
//!
//! **Summing**, by [`Collective`] for [`Star`], is for tests on one machine: every value goes through rank 0, which
//! adds them up in the order of the ranks and sends all the same bits. On N ranks that is 8 (N - 1) bytes a value
//! through one socket after the other, too slow to train with. `Nccl` is for training.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

mod meeting;
mod watch;

use super::{Collective, CollectiveError, World};
use crate::backend::Values;
use meeting::{call, host};
use watch::Watch;

/// Longest greeting, and longest reason.
const MAX_TEXT: usize = 1 << 20;
/// Most bytes that a rank says in a meeting.
const MAX_SAID: u64 = 1 << 32;
/// How long a caller may take for its greeting.
const GREETING: Duration = Duration::from_secs(10);
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

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Call {
    Gather = 1,
    Sum = 2,
    Broadcast = 3,
}

/// How long ranks wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all to come.
    pub meet: Duration,
    /// For others, at a time; none: as long as they are alive.
    pub wait: Option<Duration>,
    /// How long a rank that waits for nobody may go on once another is lost, to end what it writes.
    pub alone: Duration,
}

/// Rank 0 with a socket to each other rank, or another one with one to rank 0.
pub struct Star {
    world: World,
    /// The sockets for messages, in the order of the ranks at the other end.
    links: Vec<TcpStream>,
    watch: Arc<Watch>,
}

impl Star {
    /// Meets the other ranks. If that takes long, `say` is told whom it waits for. If another rank is lost and this one does
    /// not end by itself, `on_lost` is called in a thread of its own, with the name of the lost rank. It should end the
    /// process.
    ///
    /// # Errors
    /// [`CollectiveError::Address`], [`CollectiveError::Unfit`], [`CollectiveError::Missing`].
    pub fn join(
        world: World,
        patience: Patience,
        say: &mut dyn FnMut(&str),
        on_lost: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, CollectiveError> {
        let met = if world.rank == 0 { host(&world, patience.meet, say)? } else { call(&world, patience.meet, say)? };
        let copies: io::Result<Vec<_>> = met.links.iter().map(TcpStream::try_clone).collect();
        let begun = copies.and_then(|links| Ok((links, Watch::begin(world.rank, met, patience, on_lost)?)));
        let (links, watch) = begun.map_err(|cause| CollectiveError::Address(format!("sockets: {cause}")))?;
        Ok(Self { world, links, watch })
    }

    /// The error for a socket that does not work.
    fn broken(&self, peer: usize, cause: &io::Error) -> CollectiveError {
        CollectiveError::Lost(self.watch.cause(peer, cause))
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
            let name = self.watch.peer_name(peer);
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
            let name = self.watch.peer_name(peer);
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
        self.watch.goes_on();
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
        self.watch.goes_on();
        Ok(all)
    }

    fn waits(&self) {
        self.watch.waits();
    }

    fn leave(&self, failed: Option<&str>) {
        self.watch.leave(failed);
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        self.watch.end();
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
