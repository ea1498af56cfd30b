//! Several processes, one for each card, that do one thing together: which process is which, and how their values are
//! exchanged.
//!
//! A launcher that people have (torchrun, Slurm, mpirun) starts the processes, which are called ranks and numbered from
//! 0; [`launcher`] reads from the environment who this one is. The ranks find each other by sockets at one address, and
//! watch each other through them ([`star`]). Small values go that way. The gradients, which are large, are summed by a
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
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use crate::backend::{DeviceError, Values};
use crate::formats::differences::differing_texts;

pub mod launcher;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod star;

pub use launcher::World;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use star::{LONGEST, Patience, Star, limit};

/// Why ranks do not work together.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum CollectiveError {
    /// The launcher says something impossible.
    #[error("{0}")]
    Environment(String),
    /// Nobody answers at the address, or it cannot be listened on.
    #[error("{0}")]
    Address(String),
    /// Processes that came are not ranks of this run.
    #[error("{0}")]
    Unfit(String),
    /// Ranks that have not come within the limit.
    #[error("{missing} of {size} ranks did not come within {} s: {}", limit.as_secs(), list(who))]
    Missing { missing: usize, size: usize, who: Vec<usize>, limit: Duration },
    /// A rank is gone. The text names it.
    #[error("{0}")]
    Lost(String),
    /// Ranks that should do the same do something else.
    #[error("{0}")]
    Differs(String),
    /// NCCL is not there, or failed.
    #[error("NCCL: {0}")]
    Nccl(String),
    #[error("{0}")]
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
    /// The part of the work that is its own.
    fn part(&self) -> Part {
        Part { number: self.rank(), of: self.size() }
    }
    /// Replaces f32 values by their sum over all ranks, which has the same bits on all of them. On a device, the sum is
    /// made after the commands given before, and beside those given from here on. So the values must not be touched or
    /// freed before [`summed`](Self::summed).
    fn all_reduce(&mut self, values: Values) -> Result<(), CollectiveError>;
    /// From here on, what a device is told waits for all sums that were begun. The host waits for nothing.
    fn summed(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
    /// Replaces f32 values by those of rank 0.
    fn broadcast(&mut self, values: Values) -> Result<(), CollectiveError>;
    /// Returns what each rank gave, in the order of their numbers. It is meant for small messages.
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;
    /// Returns when all ranks have come here.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.gather(&[]).map(|_| ())
    }
    /// From now on, and until the next `gather`, this rank may wait for others in a library that has no limit of its
    /// own.
    fn waits(&self) {}
    /// Says goodbye to the others: because all are done, or because this one `failed` for a reason, which they are
    /// told. From now on nobody waits for it.
    fn leave(&self, _failed: Option<&str>) {}
}

/// One rank, and no other.
#[derive(Debug)]
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

/// One of the parts into which work is divided among ranks, or among processes that do not know of each other.
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

    /// All parts of some work.
    pub fn all(of: usize) -> impl Iterator<Item = Self> {
        (0..of).map(move |number| Self { number, of })
    }

    /// Which of `total` things are in it. Those of all parts follow each other, and are equally many but for one.
    ///
    /// ```
    /// use edm2k::collective::Part;
    ///
    /// let shares: Vec<_> = Part::all(3).map(|part| part.share(8)).collect();
    /// assert_eq!(shares, [0..2, 2..5, 5..8]);
    /// ```
    pub fn share(self, total: usize) -> Range<usize> {
        let cut = |part: usize| (total as u128 * part as u128 / self.of as u128) as usize;
        cut(self.number)..cut(self.number + 1)
    }

    /// The name of the file that it leaves for the others: `losses-2-of-4.safetensors`.
    pub fn file(self, what: &str) -> String {
        format!("{what}-{}-of-{}.safetensors", self.number + 1, self.of)
    }

    /// Whether some part's file has this name.
    pub fn is_file(name: &str, what: &str) -> bool {
        let numbers = || {
            let (number, of) =
                name.strip_prefix(what)?.strip_prefix('-')?.strip_suffix(".safetensors")?.split_once("-of-")?;
            Some(Self { number: number.parse::<usize>().ok()?.checked_sub(1)?, of: of.parse().ok()? })
        };
        numbers().is_some_and(|part| part.file(what) == name)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number + 1, self.of)
    }
}

/// A text that names no part.
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

/// Checks that all ranks give the same `about`. Where a text differs from rank 0's, `differences` is given that rank's
/// text and rank 0's, and says what differs; an empty answer means that it does not matter.
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
    agree(ranks, &given.to_string(), differing_texts)
}
