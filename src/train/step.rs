//! One optimizer step of a run, on all its ranks: micro-batches, the sum of their gradients, Adam. After it the ranks
//! exchange what they have found.
//!
//! Gradients are summed in [`Portions`](crate::params::Portions). The backward pass of a rank's last micro-batch says
//! when a portion's gradients are complete. Then its sum begins, beside the rest of the pass. So the ranks sum the same
//! portions in the same order, however many micro-batches each of them has. On a CPU, where ranks are for tests, the
//! pass waits.

use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::{Pod, Zeroable};

use super::{Event, Run, TrainError, ema};
use crate::backend::{BackendError, Done, Masks, OptimizerStep, Slot, TrainingBackend, Values};
use crate::collective::{Collective, CollectiveError};
use crate::model::Precond;
use crate::params::Whole;

/// Adam's decay rates of the two moments.
const BETAS: (f64, f64) = (0.9, 0.99);
/// Adam's eps.
const EPS: f64 = 1e-8;

impl<B: TrainingBackend> Run<'_, '_, B> {
    /// One optimizer step; returns its learning rate, and whether some rank is to stop.
    pub(super) fn step(&mut self, stop: &AtomicBool, event: &mut dyn FnMut(Event)) -> Result<(f64, bool), TrainError> {
        let s = self.settings;
        let lr = s.learning_rate().at(self.state.nimg);
        let end = self.state.nimg + s.batch;
        let losses = self.gradients(event)?;
        let betas: Vec<f64> = s.ema.iter().map(|&std| ema::power_function_beta(std, end, s.batch)).collect();
        let stats = self.backend.optimizer_step(&OptimizerStep {
            lr,
            betas: BETAS,
            eps: EPS,
            step: self.state.step + 1,
            grad_scale: 1.0 / s.batch as f64,
            rounds: self.rounds,
            ema_betas: &betas,
        })?;
        // The losses are read only now, so that the device computes on while the host gets the next micro-batch ready.
        let mut loss = 0.0;
        for (per_image, weight) in losses {
            loss += weight * self.backend.download(&per_image)?.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
        let stop = u64::from(stop.load(Ordering::Relaxed));
        let own = StepReport { loss, grad_norm: stats.grad_norm, stop, rounds: self.own_rounds() };
        let all = own.of_all(self.ranks)?;
        let loss: f64 = all.iter().map(|rank| rank.loss).sum();
        self.rounds = StepReport::rounds(&all);
        self.state.nimg = end;
        if !loss.is_finite() {
            return Err(self.diverged(format!("the loss is {loss}")));
        }
        self.state.step += 1;
        self.state.seconds = self.clock.seconds();
        let per_element = loss / self.usual_numel();
        let sums = &mut self.state.sums;
        sums.nonfinite += stats.nonfinite;
        // A step that overflowed is left out: in the mean it would hide all other steps of the interval.
        if stats.grad_norm.is_finite() {
            sums.images += s.batch;
            sums.steps += 1;
            sums.loss += per_element;
            sums.grad_norm += stats.grad_norm;
        }
        Ok((lr, all.iter().any(|rank| rank.stop > 0)))
    }

    /// Adds up the gradients of a step: this rank's share of its images, micro-batch by micro-batch, and then the ranks'.
    /// Returns the losses of each micro-batch's images, on the device, and the weight that they have in a step's loss.
    fn gradients(&mut self, event: &mut dyn FnMut(Event)) -> Result<Vec<(B::Tensor, f64)>, TrainError> {
        let dropout = self.settings.dropout;
        let own = self.ranks.part().share(self.settings.batch as usize).len();
        let mut reduction = Reduction::new();
        let (mut losses, mut seen) = (Vec::new(), 0);
        while seen < own {
            let batch = self.batches.recv().expect("batches are made as long as they are asked for")?;
            let weight = self.usual_numel() / numel(batch.shape);
            let mut first = 0;
            while first < batch.n {
                let n = self.batch_gpu.min(batch.n - first);
                let last = seen + n == own;
                let inputs = batch.upload(self.backend, first..first + n);
                let made = match self.ranks.size() {
                    1 => micro_batch(self.backend, &self.net, dropout, inputs),
                    _ => shared_micro_batch(self.backend, &self.net, dropout, inputs, &mut |b, whole| {
                        if last {
                            reduction.go_on(b, self.ranks, whole);
                        }
                    }),
                };
                match made {
                    Err(why) if n > 1 && why.is_out_of_memory() => self.halve(n, &why, event),
                    made => {
                        losses.push((made?, weight));
                        (first, seen) = (first + n, seen + n);
                    }
                }
            }
        }
        if self.ranks.size() > 1 {
            reduction.done?;
            self.ranks.summed()?;
        }
        Ok(losses)
    }

    /// Elements of an image of the most frequent size. Losses of other sizes are scaled to it.
    fn usual_numel(&self) -> f64 {
        numel(self.data.train.shape())
    }

    /// Micro-batches of a step on the rank with the largest share, if all took as many images at a time as this one.
    fn own_rounds(&self) -> u64 {
        let largest = self.settings.batch.div_ceil(self.ranks.size() as u64);
        largest.div_ceil(self.batch_gpu as u64)
    }

    /// The most that any rank has of these micro-batches.
    pub(super) fn agreed_rounds(&mut self) -> Result<usize, CollectiveError> {
        let own = StepReport { rounds: self.own_rounds(), ..StepReport::zeroed() };
        Ok(StepReport::rounds(&own.of_all(self.ranks)?))
    }

    /// Takes fewer images at a time from here on, as the device has no memory for `n`.
    fn halve(&mut self, n: usize, why: &BackendError, event: &mut dyn FnMut(Event)) {
        // This step keeps the number of rounds that all ranks agreed on. The next one will have more.
        self.batch_gpu = n.div_ceil(2);
        event(Event::Fewer(format!("{why}; going on with {} images at a time", self.batch_gpu)));
    }
}

fn numel(shape: [usize; 3]) -> f64 {
    shape.iter().product::<usize>() as f64
}

/// The sum of a step's gradients over all ranks.
struct Reduction {
    /// How many portions have been given to it in this step, each once.
    portions: usize,
    done: Result<(), TrainError>,
}

impl Reduction {
    fn new() -> Self {
        Self { portions: 0, done: Ok(()) }
    }

    /// Begins the sums of the portions that have become complete.
    fn go_on<B: TrainingBackend>(&mut self, backend: &mut B, ranks: &mut dyn Collective, whole: Whole) {
        while self.done.is_ok() && self.portions < backend.portions().whole(whole) {
            self.done = with_values(backend, Slot::Grad, self.portions, |values| ranks.all_reduce(values));
            self.portions += 1;
        }
    }
}

/// What a rank says after a step.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct StepReport {
    /// Sum of its images' losses, each scaled to the number of elements of the most frequent size.
    loss: f64,
    grad_norm: f64,
    /// Whether it is to stop: not 0.
    stop: u64,
    rounds: u64,
}

impl StepReport {
    /// The most of what ranks have said.
    fn rounds(said: &[Self]) -> usize {
        said.iter().map(|rank| rank.rounds).max().unwrap_or(1) as usize
    }

    /// What all ranks say, in their order. The gradients were the same on all of them, so their results must be the
    /// same too. It is checked, as a rank with other results would otherwise go on unseen.
    fn of_all(&self, ranks: &mut dyn Collective) -> Result<Vec<Self>, CollectiveError> {
        let all = ranks.gather(bytemuck::bytes_of(self))?;
        let all: Result<Vec<Self>, _> = all.iter().map(|said| bytemuck::try_pod_read_unaligned(said)).collect();
        let all = all.map_err(|_| CollectiveError::Differs("ranks are at different steps".into()))?;
        let bits = all[0].grad_norm.to_bits();
        match all.iter().position(|rank| rank.grad_norm.to_bits() != bits) {
            None => Ok(all),
            Some(rank) => Err(CollectiveError::Differs(format!(
                "rank {rank} computes otherwise than rank 0: the gradient's norm is {:e} there, {:e} here (cards of one kind, \
                 and one edm2k, compute alike)",
                all[rank].grad_norm, all[0].grad_norm
            ))),
        }
    }
}

/// The plan of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroBatchPlan {
    /// See [`Settings::dropout`](super::Settings::dropout).
    pub dropout: f64,
}

/// The plan of a micro-batch whose gradients are summed over ranks while it goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct SharedMicroBatchPlan {
    dropout: f64,
}

/// What a micro-batch is made of.
#[derive(Debug)]
pub struct Inputs<T> {
    /// Clean images [n, h, w, c].
    pub clean: T,
    /// clean + sigma * noise [n, h, w, c].
    pub noisy: T,
    /// Noise levels [n, 1, 1, 1].
    pub sigma: T,
    /// Keys of the masks [n, 1, 1, 2], with dropout.
    pub keys: Option<T>,
    /// Conditions [n, 1, 1, label_dim], unless unconditional.
    pub labels: Option<T>,
}

impl<T> Inputs<T> {
    /// As a plan takes them, with dropout or without.
    fn into_vec(self, dropout: f64) -> Vec<T> {
        assert_eq!(self.keys.is_some(), dropout > 0.0, "keys are for dropout");
        [self.clean, self.noisy, self.sigma].into_iter().chain(self.keys).chain(self.labels).collect()
    }
}

impl<'a, T> Inputs<&'a T> {
    /// Of what [`Inputs::into_vec`] makes, with dropout or without.
    fn of(inputs: &'a [T], dropout: bool) -> Self {
        let [clean, noisy, sigma, rest @ ..] = inputs else {
            unreachable!("a micro-batch has images and noise levels")
        };
        let (keys, labels) = rest.split_at(usize::from(dropout));
        Self { clean, noisy, sigma, keys: keys.first(), labels: labels.first() }
    }
}

/// Forward and backward; the loss of each image. The gradients add up in the backend.
pub fn micro_batch<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    inputs: Inputs<B::Tensor>,
) -> Result<B::Tensor, BackendError> {
    let body = &mut |b: &mut B, inputs: &[B::Tensor]| pass(b, net, dropout, inputs, &mut |_, _| {});
    Ok(b.planned(&MicroBatchPlan { dropout }, &inputs.into_vec(dropout), body)?.swap_remove(0))
}

/// As [`micro_batch`]; `done` is called when the device has been given everything that adds to the named gradients.
pub fn shared_micro_batch<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    inputs: Inputs<B::Tensor>,
    done: &mut Done<B>,
) -> Result<B::Tensor, BackendError> {
    let body = &mut |b: &mut B, inputs: &[B::Tensor], done: &mut Done<B>| pass(b, net, dropout, inputs, done);
    Ok(b.planned_pass(&SharedMicroBatchPlan { dropout }, &inputs.into_vec(dropout), body, done)?.swap_remove(0))
}

/// The pass that both of these run.
fn pass<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    inputs: &[B::Tensor],
    done: &mut Done<B>,
) -> Result<Vec<B::Tensor>, BackendError> {
    let Inputs { clean, noisy, sigma, keys, labels } = Inputs::of(inputs, dropout > 0.0);
    let masks = keys.map(|keys| Masks { keys: keys.clone(), rate: dropout });
    let pass = net.train_forward(b, clean, noisy, sigma, labels, masks.as_ref());
    let per_image = pass.per_image.clone();
    net.backward(b, pass, done);
    Ok(vec![per_image])
}

/// Runs a micro-batch of [n, height, width] images of zeros, so that a device plans it and knows what it costs. The
/// caller must clear its gradients, if there is any use for gradients afterwards.
///
/// # Errors
/// The device does not have the memory.
pub fn rehearse<B: TrainingBackend>(
    b: &mut B,
    net: &Precond,
    dropout: f64,
    [n, h, w]: [usize; 3],
) -> Result<(), BackendError> {
    let dim = net.config.label_dim;
    let image = b.upload([n, h, w, net.config.img_channels], &vec![0.0; n * h * w * net.config.img_channels]);
    let inputs = Inputs {
        clean: image.clone(),
        noisy: image,
        sigma: b.upload([n, 1, 1, 1], &vec![1.0; n]),
        keys: (dropout > 0.0).then(|| b.upload([n, 1, 1, 2], &vec![0.0; 2 * n])),
        labels: (dim > 0).then(|| b.upload([n, 1, 1, dim], &vec![0.0; n * dim])),
    };
    micro_batch(b, net, dropout, inputs).map(|_| ())
}

/// Gives the values of a portion to a call that all ranks make.
pub(super) fn with_values<B: TrainingBackend>(
    backend: &mut B,
    slot: Slot,
    portion: usize,
    mut call: impl FnMut(Values) -> Result<(), CollectiveError>,
) -> Result<(), TrainError> {
    let mut done = Ok(());
    backend.exchange(slot, portion, &mut |values| {
        if done.is_ok() {
            done = call(values);
        }
    })?;
    Ok(done?)
}
