//! How long the operations of a plan take, and which tiles make them take the least.

use super::super::runtime::Graph;
use super::super::tiles::{Choice, Tuned};
use super::*;
use crate::real::median;

/// More than the second-level cache of any card.
const FLUSH_BYTES: usize = 256 << 20;
/// The same for a small card, for each multiprocessor: no card has more of that cache for one.
const FLUSH_BYTES_OF_SM: usize = 2 << 20;

/// Measured seconds of a plan, one number for each repeat.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    /// Of the whole plan.
    pub whole: Vec<f64>,
    /// Each kind of operation, how often it occurs, and the seconds of one.
    pub kinds: Vec<(Operation, usize, Vec<f64>)>,
}

/// What was found out about the tiles of a product. Seconds are the sum over all operations of the plan that have this
/// product, one number for each repeat.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The product.
    pub question: Question,
    /// How many operations of the plan have this product.
    pub count: usize,
    /// The choice of the model of the costs, and its seconds.
    pub model: (Choice, Vec<f64>),
    /// The fastest of the candidates, and its seconds.
    pub fastest: (Choice, Vec<f64>),
}

/// The model's choices and the fastest are timed in turns, so often each.
const TURNS: usize = 2;

impl<P> Gpu<P> {
    /// Times the last plan made of `key`: the whole, and each kind of operation by itself, as often as asked, each time
    /// with a cold cache. For every kind of operation it returns how often it occurs, and the seconds of one.
    pub fn time(&mut self, key: &dyn PlanKey, repeats: usize) -> Result<Timing, DeviceError> {
        let flush = self.flush()?;
        let Some(plan) = self.plan(key) else { return Ok(Timing::default()) };
        let whole = self.runtime.time(plan, &*flush.graph, repeats)?;
        Ok(Timing { whole, kinds: self.time_kinds(key, &flush, repeats, |_| true)? })
    }

    /// What empties the cache.
    fn flush(&self) -> Result<Flush, DeviceError> {
        let bytes = FLUSH_BYTES.min(self.chooser.card.sms * FLUSH_BYTES_OF_SM);
        let memory = self.runtime.allocate(bytes, "flushing the cache")?;
        let flush = Command::Zero { at: memory.ptr(), bytes };
        // SAFETY: the whole of that memory.
        Ok(Flush { graph: unsafe { self.runtime.record(vec![flush], false)? }, _memory: memory })
    }

    /// Times each kind of operation that is `wanted`: how often it occurs, and the seconds of one.
    fn time_kinds(
        &self,
        key: &dyn PlanKey,
        flush: &Flush,
        repeats: usize,
        wanted: impl Fn(&Operation) -> bool,
    ) -> Result<Vec<(Operation, usize, Vec<f64>)>, DeviceError> {
        let mut kinds: Vec<(Operation, usize, &Vec<Command>)> = Vec::new();
        for (work, commands) in self.plan(key).into_iter().flat_map(|plan| &plan.operations) {
            match kinds.iter_mut().find(|(known, ..)| known == work) {
                Some((_, count, _)) => *count += 1,
                None if wanted(work) => kinds.push((*work, 1, commands)),
                None => {}
            }
        }
        let time = |(work, count, commands): (Operation, usize, &Vec<Command>)| {
            // SAFETY: as when the plan was recorded.
            let graph = unsafe { self.runtime.record(commands.clone(), false)? };
            Ok((work, count, self.runtime.time(&*graph, &*flush.graph, repeats)?))
        };
        kinds.into_iter().map(time).collect()
    }

    /// Times the candidates ([`Question::candidates`]) for the tile of every product of the plan that `make` makes of
    /// `key`, each with a cold cache, `repeats` times; then the fastest once more, in turns with the model's choice.
    /// Products for which `known` is true are left out. `passed` is called with the number of plans that were timed,
    /// and of all.
    ///
    /// # Errors
    /// Those of `make`, and the device's.
    pub fn try_tiles<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        repeats: usize,
        make: &mut dyn FnMut(&mut Self) -> Result<(), E>,
        known: &dyn Fn(&Question) -> bool,
        passed: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Trial>, E> {
        let before = self.chooser.tuned.take();
        let found = self.try_candidates(key, repeats, make, known, passed);
        self.choose_by(before);
        found
    }

    fn try_candidates<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        repeats: usize,
        make: &mut dyn FnMut(&mut Self) -> Result<(), E>,
        known: &dyn Fn(&Question) -> bool,
        passed: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Trial>, E> {
        self.choose_by(None);
        make(self)?;
        let mut trials: Vec<(Trial, Vec<Choice>)> = Vec::new();
        for question in
            self.plan(key).into_iter().flat_map(|plan| &plan.operations).filter_map(|(work, _)| work.product)
        {
            match trials.iter_mut().find(|(trial, _)| trial.question == question) {
                Some((trial, _)) => trial.count += 1,
                None if known(&question) => {}
                None => {
                    let candidates = question.candidates(self.chooser.card);
                    let model = (candidates[0], Vec::new());
                    trials.push((Trial { question, count: 1, fastest: model.clone(), model }, candidates));
                }
            }
        }
        let rounds = trials.iter().map(|(_, candidates)| candidates.len()).max().unwrap_or(0);
        let all = if rounds == 0 { 0 } else { rounds + 2 * TURNS };
        let flush = self.flush().map_err(BackendError::from)?;
        // A plan for each round, in which every product has another of its candidates.
        let mut times = |gpu: &mut Self, round: usize, choices: Vec<(Question, Choice)>| {
            let tuned: Rc<Tuned> = Rc::new(choices.into_iter().collect());
            gpu.choose_by(Some(tuned.clone()));
            make(gpu)?;
            let wanted = |work: &Operation| work.product.is_some_and(|question| tuned.has(&question));
            let kinds = gpu.time_kinds(key, &flush, repeats, wanted).map_err(BackendError::from)?;
            let mut sums: HashMap<Question, Vec<f64>> = HashMap::new();
            for (work, count, seconds) in kinds {
                let Some(question) = work.product else { continue };
                let sum = sums.entry(question).or_insert_with(|| vec![0.0; seconds.len()]);
                sum.iter_mut().zip(seconds).for_each(|(sum, seconds)| *sum += count as f64 * seconds);
            }
            passed(round + 1, all);
            Ok::<_, E>(sums)
        };
        for round in 0..rounds {
            let next = trials.iter().filter_map(|(trial, all)| Some((trial.question, *all.get(round)?))).collect();
            let mut seconds = times(self, round, next)?;
            for (Trial { question, fastest, .. }, candidates) in &mut trials {
                let Some(seconds) = seconds.remove(question) else { continue };
                if fastest.1.is_empty() || median(&seconds) < median(&fastest.1) {
                    *fastest = (candidates[round], seconds);
                }
            }
        }
        let mut trials: Vec<Trial> = trials.into_iter().map(|(trial, _)| trial).collect();
        // The least of many times may be an accident. So the times that made it the fastest do not count, and the next
        // ones do.
        trials.iter_mut().for_each(|trial| trial.fastest.1.clear());
        for turn in 0..2 * TURNS {
            let of = |trial: &Trial| if turn % 2 == 0 { trial.model.0 } else { trial.fastest.0 };
            let choices = trials.iter().map(|trial| (trial.question, of(trial))).collect();
            let mut seconds = if rounds == 0 { HashMap::new() } else { times(self, rounds + turn, choices)? };
            for Trial { question, model, fastest, .. } in &mut trials {
                let side = if turn % 2 == 0 { model } else { fastest };
                side.1.extend(seconds.remove(question).unwrap_or_default());
            }
        }
        Ok(trials)
    }

    /// Chooses tiles by another table from now on; plans of the old one are forgotten.
    fn choose_by(&mut self, tuned: Option<Rc<Tuned>>) {
        self.plans.clear();
        self.chooser.tuned = tuned;
    }
}

/// What empties the cache of a device.
struct Flush {
    graph: Box<dyn Graph>,
    _memory: Rc<dyn Memory>,
}
