//! Several processes, one for each card, that work on one thing: who they are, and how values come together.
//!
//! A launcher that people have (torchrun, Slurm, mpirun) starts the processes, which are called ranks and numbered from 0;
//! [`launcher`] reads from the environment who this one is. The ranks find each other by sockets at one address, and
//! watch each other through them ([`star`]): what is small goes that way. What is large, the gradients, is summed behind
//! [`Collective`], of which there are three:
//!
//! ```text
//! Alone   one rank: nothing to do
//! Nccl    NVIDIA's library, between cards        (nccl)
//! Star    through rank 0, over TCP: for tests    (star)
//! ```
//!
//! Every rank makes the same calls in the same order; each call is a meeting that no rank leaves before all have come.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use crate::backend::{DeviceError, Values};
use crate::formats::differences::{differing, there_and_here};

pub mod launcher;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod star;

pub use launcher::World;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use star::{LONGEST, Star, limit};

/// Why ranks do not work together.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CollectiveError {
    /// The launcher says something that cannot be.
    #[error("{0}")]
    Environment(String),
    /// Nobody is at the address, or it cannot be listened at.
    #[error("{0}")]
    Address(String),
    /// Those that came are not the ranks of this run.
    #[error("{0}")]
    Unfit(String),
    /// Ranks that have not come within the limit.
    #[error("{missing} of {size} ranks did not come within {} s: {}", limit.as_secs(), list(who))]
    Missing { missing: usize, size: usize, who: Vec<usize>, limit: Duration },
    /// A rank is gone. The text names it.
    #[error("{0}")]
    Lost(String),
    /// Ranks that should do the same do not.
    #[error("{0}")]
    Differs(String),
    /// NCCL is not there, or failed.
    #[error("NCCL: {0}")]
    Nccl(String),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The first few numbers of ranks.
fn list(who: &[usize]) -> String {
    let first: Vec<_> = who.iter().take(8).map(|rank| format!("rank {rank}")).collect();
    first.join(", ") + if who.len() > 8 { ", ..." } else { "" }
}

/// What ranks do together.
pub trait Collective {
    /// The number of this one, from 0.
    fn rank(&self) -> usize;
    /// How many there are.
    fn size(&self) -> usize;
    /// Replaces f32 values by their sum over all ranks, which has the same bits on all of them. On a device, that is done
    /// after the commands given before, and beside those given from here on: nobody touches the values, or frees them,
    /// before [`summed`](Self::summed).
    fn all_reduce(&mut self, values: Values) -> Result<(), CollectiveError>;
    /// What a device is told from here on comes after all sums that were begun; the host waits for nothing.
    fn summed(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
    /// Replaces f32 values by those of rank 0.
    fn broadcast(&mut self, values: Values) -> Result<(), CollectiveError>;
    /// What each rank says, in the order of their numbers; meant for little.
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;
    /// Returns when all ranks have come here.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.gather(&[]).map(|_| ())
    }
    /// From now on this rank may wait for others, in a library that has no limit of its own; until the next `gather`.
    fn waits(&self) {}
    /// Parts from the others: done together, or `failed` for a reason that they are told. From now on nobody is missed.
    fn leave(&self, _failed: Option<&str>) {}
}

/// One rank, and no other.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _: Values) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn broadcast(&mut self, _: Values) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![own.to_vec()])
    }
}

/// One of several parts that work is done in, by ranks or by processes that do not know of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which one, from 0.
    pub number: usize,
    /// How many there are.
    pub of: usize,
}

impl Part {
    /// All of the work.
    pub const WHOLE: Self = Self { number: 0, of: 1 };

    /// What it leaves for the others: `losses-2-of-4.safetensors`.
    pub fn file(self, what: &str) -> String {
        format!("{what}-{}-of-{}.safetensors", self.number + 1, self.of)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number + 1, self.of)
    }
}

/// What does not name a part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a part, expected K/N with K from 1 to N, such as 2/4")]
pub struct NoPart(String);

/// As people write it, counted from 1: `2/4`.
impl FromStr for Part {
    type Err = NoPart;

    fn from_str(text: &str) -> Result<Self, NoPart> {
        let numbers = text.split_once('/').and_then(|(k, n)| Some((k.parse::<u16>().ok()?, n.parse::<u16>().ok()?)));
        match numbers {
            Some((k, n)) if (1..=n).contains(&k) => Ok(Self { number: usize::from(k) - 1, of: n.into() }),
            _ => Err(NoPart(text.into())),
        }
    }
}

/// What of `total` things is the share of part number `part` of `parts`: ranges that follow each other, of lengths that
/// differ by one at most.
///
/// ```
/// use edm2k::collective::share;
///
/// assert_eq!([0, 1, 2].map(|part| share(8, part, 3)), [0..2, 2..5, 5..8]);
/// ```
pub fn share(total: u64, part: usize, parts: usize) -> std::ops::Range<u64> {
    let cut = |part: usize| (u128::from(total) * part as u128 / parts as u128) as u64;
    cut(part)..cut(part + 1)
}

/// Sees to it that all ranks say the same `about`; where texts differ, `differences` tells what that means, given rank 0's
/// text and the other, and is empty where it means nothing.
///
/// # Errors
/// [`CollectiveError::Differs`] names the first rank that differs; the same on all ranks.
pub fn agree(
    ranks: &mut dyn Collective,
    about: &str,
    differences: impl Fn(&str, &str) -> String,
) -> Result<(), CollectiveError> {
    let all = ranks.gather(about.as_bytes())?;
    let texts: Vec<_> = all.iter().map(|text| String::from_utf8_lossy(text)).collect();
    for (rank, text) in texts.iter().enumerate().filter(|(_, text)| **text != texts[0]) {
        let what = differences(&texts[0], text);
        if !what.is_empty() {
            return Err(CollectiveError::Differs(format!("rank {rank} differs from rank 0: {what}")));
        }
    }
    Ok(())
}

/// As [`agree`], about JSON: what differs is named field by field.
///
/// # Errors
/// As [`agree`].
pub fn agree_on(ranks: &mut dyn Collective, given: &Value) -> Result<(), CollectiveError> {
    agree(ranks, &given.to_string(), |ours, theirs| {
        let [ours, theirs] = [ours, theirs].map(|text| serde_json::from_str::<Value>(text).unwrap_or_default());
        differing(&ours, &theirs, there_and_here)
    })
}
