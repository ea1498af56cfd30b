//! Plans: what is asked of a device again and again, recorded once.
//!
//! A body is recorded three times. The first time shows which tensors are asked for through `mp_silu`, so that the
//! kernel that makes such a tensor writes its activation too. The second shows how much memory that takes. The third,
//! in that memory, gives the graph that is replayed from then on.
//!
//! A pass that says when gradients are complete is cut there into several graphs. Between two of them the caller is
//! told, and may begin to sum these gradients.
//!
//! All plans share one allocation, as large as the largest of them needs. So a plan for another size of images costs a
//! graph, and no memory for activations. When a larger plan comes, the smaller ones are recorded anew as they are
//! needed.

use super::super::runtime::Graph;
use super::*;

/// Most plans that are kept besides those of training: the ones that were used last. Each number of steps is a plan,
/// and a server is asked for ever new ones. Training comes back to all of its plans in each step.
const MOST_PLANS: usize = 64;

/// What a plan costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Kernel launches.
    pub launches: usize,
    /// Sum of what each [`Operation`] reads and writes.
    pub bytes: usize,
    /// Bytes of the workspace.
    pub workspace: usize,
}

/// Operations under way to becoming a plan.
pub(super) struct Recording {
    pub workspace: Rc<Workspace>,
    pub operations: Vec<(Operation, Vec<Command>)>,
    /// Tensors made so far.
    pub numbers: usize,
    /// The factors of the activations that were asked for, by the tensor's number.
    pub asked: HashMap<usize, f64>,
    /// As `asked`, from the first recording.
    pub known: HashMap<usize, f64>,
    /// Memory that the commands refer to beside the workspace.
    pub constants: Vec<Tensor>,
    pub accumulates: bool,
    /// After how many operations which gradients are complete.
    pub done: Vec<(usize, Whole)>,
}

/// Commands of a plan that follow each other, and the gradients that are complete after them.
pub(super) struct Segment {
    graph: Box<dyn Graph>,
    done: Option<Whole>,
}

pub(super) struct Plan {
    key: Box<dyn PlanKey>,
    inputs: Vec<Tensor>,
    /// Where the results lie in the workspace, until its next use.
    outputs: Vec<(DevicePtr, Shape, Format)>,
    _constants: Vec<Tensor>,
    parts: Vec<Segment>,
    pub operations: Vec<(Operation, Vec<Command>)>,
    cost: Cost,
    accumulates: bool,
}

impl Plan {
    fn suits(&self, key: &dyn PlanKey, inputs: &[Tensor]) -> bool {
        let like = |(ours, theirs): (&Tensor, &Tensor)| ours.is_like(theirs);
        self.key.equals(key) && self.inputs.len() == inputs.len() && self.inputs.iter().zip(inputs).all(like)
    }
}

impl Graph for Plan {
    fn run(&self) -> Result<(), DeviceError> {
        self.parts.iter().try_for_each(|part| part.graph.run())
    }
}

impl<P> Gpu<P> {
    /// Costs of the plans, in the order in which they were last used.
    pub fn costs(&self) -> impl Iterator<Item = Cost> {
        self.plans.iter().map(|plan| plan.cost)
    }

    /// The last plan used of this key, for inputs of any shape.
    pub(super) fn plan(&self, key: &dyn PlanKey) -> Option<&Plan> {
        self.plans.iter().rfind(|plan| plan.key.equals(key))
    }

    /// See [`Backend::planned`] and [`TrainingBackend::planned_pass`].
    pub(super) fn run_plan<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Tensor],
        body: &mut Pass<Self, E>,
        done: &mut Done<Self>,
    ) -> Result<Vec<Tensor>, E> {
        if self.recording.is_some() {
            return body(self, inputs, done);
        }
        self.check().map_err(BackendError::from)?;
        // All memory is asked for before anything is added to gradients: a caller that has too little may then try again
        // with fewer images.
        let results = match self.make_ready(key, inputs, body)? {
            // What other plans hold may be what is missing.
            Err(why) if why.is_out_of_memory() && !self.plans.is_empty() => {
                self.forget_plans()?;
                self.make_ready(key, inputs, body)??
            }
            made => made?,
        };
        Ok(self.replay_last(inputs, &results, done).map(|()| results).map_err(BackendError::from)?)
    }

    /// Has the plan that suits as the last one, and memory for its results. The body's error comes first, then the device's.
    fn make_ready<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Tensor],
        body: &mut Pass<Self, E>,
    ) -> Result<Result<Vec<Tensor>, BackendError>, E> {
        let known = self.plans.iter().position(|plan| plan.suits(key, inputs));
        let plan = match known {
            Some(place) => self.plans.remove(place),
            None => match self.record(key, inputs, body)? {
                Ok(plan) => plan,
                Err(why) => return Ok(Err(why)),
            },
        };
        let result = |&(_, shape, format): &(DevicePtr, Shape, Format)| {
            let memory = self.runtime.allocate(bytes_of(shape, format), "results")?;
            Ok(Tensor::new(shape, format, None, Buffer::Own(memory)))
        };
        let results = plan.outputs.iter().map(result).collect::<Result<Vec<_>, DeviceError>>();
        let others: Vec<usize> = (0..self.plans.len()).filter(|&place| !self.plans[place].accumulates).collect();
        if others.len() >= MOST_PLANS {
            self.plans.remove(others[0]);
        }
        self.plans.push(plan);
        Ok(results.map_err(BackendError::from))
    }

    fn replay_last(&mut self, inputs: &[Tensor], results: &[Tensor], done: &mut Done<Self>) -> Result<(), DeviceError> {
        let place = self.plans.len() - 1;
        if self.plans[place].accumulates {
            self.accumulating();
            self.check()?;
        }
        let plan = &self.plans[place];
        for (to, from) in plan.inputs.iter().zip(inputs) {
            // SAFETY: both are of one shape and format.
            unsafe { self.runtime.run(&Command::Copy { from: from.ptr(), to: to.ptr(), bytes: to.bytes() })? };
        }
        for part in 0..plan.parts.len() {
            let part = &self.plans[place].parts[part];
            part.graph.run()?;
            if let Some(whole) = part.done {
                done(self, whole);
            }
        }
        for (to, &(from, ..)) in results.iter().zip(&self.plans[place].outputs) {
            // SAFETY: the plan's workspace holds as many bytes there.
            unsafe { self.runtime.run(&Command::Copy { from, to: to.ptr(), bytes: to.bytes() })? };
        }
        Ok(())
    }

    /// Gives back the memory of all plans, and their workspace.
    fn forget_plans(&mut self) -> Result<(), BackendError> {
        self.plans.clear();
        self.workspace = None;
        Ok(self.runtime.give_back()?)
    }

    fn record<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Tensor],
        body: &mut Pass<Self, E>,
    ) -> Result<Result<Plan, BackendError>, E> {
        // Any address will do until the size is known.
        let nowhere = DevicePtr(1 << 40);
        let (first, ..) = self.trace(nowhere, HashMap::new(), inputs, body)?;
        let known = first.asked;
        let (measured, ..) = self.trace(nowhere, known.clone(), inputs, body)?;
        let bytes = measured.workspace.peak();
        if self.workspace.as_ref().is_none_or(|w| w.bytes() < bytes) {
            // The other plans lie in the old workspace.
            self.forget_plans()?;
            match self.runtime.allocate(bytes, "activations") {
                Ok(memory) => self.workspace = Some(memory),
                Err(why) => return Ok(Err(why.into())),
            }
        }
        let base = self.workspace.as_ref().map_or(nowhere, |w| w.ptr());
        let (recording, inputs, made) = self.trace(base, known, inputs, body)?;
        Ok(self.instantiate(key, recording, inputs, &made, bytes))
    }

    /// Makes the graphs of what was recorded in a workspace of so many bytes.
    fn instantiate(
        &self,
        key: &dyn PlanKey,
        recording: Recording,
        inputs: Vec<Tensor>,
        made: &[Tensor],
        bytes: usize,
    ) -> Result<Plan, BackendError> {
        let outputs = made.iter().map(|t| (t.ptr(), t.shape(), t.format())).collect();
        let Recording { operations, accumulates, constants, done, .. } = recording;
        let commands = |operations: &[(Operation, Vec<Command>)]| -> Vec<Command> {
            operations.iter().flat_map(|(_, commands)| commands).cloned().collect()
        };
        let cost = Cost {
            launches: commands(&operations).iter().filter(|c| matches!(c, Command::Launch(_))).count(),
            bytes: operations.iter().map(|(work, _)| work.bytes).sum(),
            workspace: bytes,
        };
        let rest = done.last().is_none_or(|&(end, _)| end < operations.len()).then_some((operations.len(), None));
        let cuts = done.into_iter().map(|(end, whole)| (end, Some(whole))).chain(rest);
        let (mut parts, mut first) = (Vec::new(), 0);
        for (end, done) in cuts {
            let commands = commands(&operations[std::mem::replace(&mut first, end)..end]);
            // Launches overlap unless a plan trains. Those of training are long, and lose more to the early blocks of
            // their successors than a start costs. So do those of a decode; but a picture has one decode and 16 steps of
            // sampling, which gain (measured, docs/performance.md).
            let overlap = !accumulates;
            // SAFETY: the operations pass buffers of the sizes that the launches' makers ask for, all of them in the
            // workspace, the parameters or memory that the plan keeps.
            let graph = unsafe { self.runtime.record(commands, overlap) }?;
            parts.push(Segment { graph, done });
        }
        Ok(Plan { key: key.boxed(), inputs, outputs, _constants: constants, parts, operations, cost, accumulates })
    }

    /// Records `body` in a workspace at `base`, which begins with places for inputs of these shapes. Returns those
    /// places and the results.
    fn trace<E: From<BackendError>>(
        &mut self,
        base: DevicePtr,
        known: HashMap<usize, f64>,
        inputs: &[Tensor],
        body: &mut Pass<Self, E>,
    ) -> Result<(Recording, Vec<Tensor>, Vec<Tensor>), E> {
        let workspace = Workspace::new(base);
        let place = |x: &Tensor| Tensor::new(x.shape(), x.format(), None, Buffer::Place(workspace.place(x.bytes())));
        let inputs: Vec<Tensor> = inputs.iter().map(place).collect();
        self.recording = Some(Recording {
            workspace,
            operations: Vec::new(),
            numbers: 0,
            asked: HashMap::new(),
            known,
            constants: Vec::new(),
            accumulates: false,
            done: Vec::new(),
        });
        let made = body(self, &inputs, &mut |b: &mut Self, whole| {
            if let Some(r) = &mut b.recording {
                r.done.push((r.operations.len(), whole));
            }
        });
        let recording = self.recording.take().expect("put there above");
        self.check().map_err(BackendError::from)?;
        Ok((recording, inputs, made?))
    }
}
