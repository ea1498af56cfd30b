//! How long the operations of a plan take.

use super::*;

/// More than the second-level cache of any card.
const FLUSH_BYTES: usize = 256 << 20;

/// Measured seconds of a plan, one number for each repeat.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    /// Of the whole plan.
    pub whole: Vec<f64>,
    /// Each kind of operation, how many of it there are, and the seconds of one.
    pub kinds: Vec<(Work, usize, Vec<f64>)>,
}

impl<P> Gpu<P> {
    /// Times the last plan made of `key`: the whole, and each kind of operation by itself, as often as asked, each time
    /// with a cold cache. For every kind of operation how many there are, and the seconds of one.
    pub fn time(&mut self, key: &dyn PlanKey, repeats: usize) -> Result<Timing, DeviceError> {
        let runtime = self.runtime.clone();
        let flushed = runtime.allocate(FLUSH_BYTES, "flushing the cache")?;
        let flush = Command::Zero { at: flushed.ptr(), bytes: FLUSH_BYTES };
        // SAFETY: the whole of that memory.
        let flush = unsafe { runtime.record(vec![flush])? };
        let Some(plan) = self.plan(key) else { return Ok(Timing::default()) };
        let mut kinds: Vec<(Work, usize, &Vec<Command>)> = Vec::new();
        for (work, commands) in &plan.operations {
            match kinds.iter_mut().find(|(known, ..)| known == work) {
                Some((_, count, _)) => *count += 1,
                None => kinds.push((*work, 1, commands)),
            }
        }
        let mut timing = Timing { whole: runtime.time(plan, &*flush, repeats)?, kinds: Vec::new() };
        for (work, count, commands) in kinds {
            // SAFETY: as when the plan was recorded.
            let graph = unsafe { runtime.record(commands.clone())? };
            timing.kinds.push((work, count, runtime.time(&*graph, &*flush, repeats)?));
        }
        Ok(timing)
    }
}
