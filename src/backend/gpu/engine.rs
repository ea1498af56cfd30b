//! The network's operations as kernel launches, run at once or recorded into a plan.
//!
//! Outside of [`Backend::planned`] an operation runs when it is called and a tensor has memory of its own.
//! Within it, operations are recorded, three times over: first to learn which tensors are asked for through
//! `mp_silu`, so that the kernel that makes one writes its activation too; then to learn how much memory that
//! takes; then in that memory, into a graph that is replayed from then on.

use std::collections::HashMap;
use std::rc::Rc;

use super::attention::{self, Attention};
use super::conv::{ConvShape, Dgrad, Epilogue, Fprop, Inputs, Scales, Through, Wgrad};

use super::embedding::{self, EmbedLayers, LabelLayer, ScaleGrads, ScaleLayer, ScaleTable};
use super::launch::{ConvLoop, DevicePtr, Math, Precision};
use super::params::Params;
use super::precond::{self, LogvarParams, LossArenas};
use super::runtime::{Command, Graph, Imagined, Memory, Runtime};
use super::tensor::{Buffer, Format, Tensor, Workspace, bytes_of, padded};
use super::{pixelwise, tiles::Card};
use crate::backend::*;
use crate::params::mp_sum_weights;
use half::{bf16, f16};

/// One operation of a plan: what it is, and what it takes at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Work {
    /// Its name.
    pub name: &'static str,
    /// Shape of its result.
    pub shape: Shape,
    /// Products that are summed for each value of the result; 0 where the operation is none of matrices.
    pub sums: usize,
    /// Bytes of the tensors and weights that it reads and writes, each once.
    pub bytes: usize,
}

impl Work {
    pub(super) fn new(name: &'static str, shape: Shape, bytes: usize) -> Self {
        Self { name, shape, sums: 0, bytes }
    }

    pub(super) fn sums(self, sums: usize) -> Self {
        Self { sums, ..self }
    }

    /// Multiply-adds.
    pub fn macs(&self) -> usize {
        self.shape.iter().product::<usize>() * self.sums
    }
}

/// What a plan costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Kernel launches.
    pub launches: usize,
    /// Sum of [`Work::bytes`].
    pub bytes: usize,
    /// Bytes of the workspace.
    pub workspace: usize,
}

/// Operations under way to becoming a plan.
struct Recording {
    workspace: Rc<Workspace>,
    operations: Vec<(Work, Vec<Command>)>,
    /// Tensors made so far.
    numbers: usize,
    /// The factors of the activations that were asked for, by the tensor's number.
    asked: HashMap<usize, f64>,
    /// As `asked`, of the first time over.
    known: HashMap<usize, f64>,
    /// Memory that the commands refer to beside the workspace.
    constants: Vec<Tensor>,
    accumulates: bool,
}

struct Plan {
    inputs: Vec<Tensor>,
    /// Where the results lie in the workspace, until its next use.
    outputs: Vec<(DevicePtr, Shape, Format)>,
    _constants: Vec<Tensor>,
    graph: Box<dyn Graph>,
    operations: Vec<(Work, Vec<Command>)>,
    cost: Cost,
    accumulates: bool,
}

/// A table on both sides.
type ScaleTables = (Rc<ScaleTable>, Rc<dyn Memory>);

/// Executes the network on a [`Runtime`].
pub struct Gpu {
    runtime: Rc<dyn Runtime>,
    pub(super) math: Math,
    pub(super) precision: Precision,
    pub(super) card: Card,
    params: Params,
    /// Bytes of the weights of codecs that were loaded.
    pub(super) codec_bytes: usize,
    recording: Option<Recording>,
    plans: HashMap<String, Plan>,
    workspace: Option<Rc<dyn Memory>>,
    /// Tables of `emb_linear` layers by their weights.
    scale_tables: HashMap<Vec<ParamId>, ScaleTables>,
    /// The first error since the last call that could return one.
    failed: Option<DeviceError>,
}

impl Gpu {
    /// Holds the effective weights only.
    ///
    /// # Errors
    /// Device memory does not suffice, or the network has rows too long for the kernels.
    pub fn for_sampling(
        runtime: Rc<dyn Runtime>,
        math: impl Into<Math>,
        table: &ParamTable,
    ) -> Result<Self, DeviceError> {
        Self::new(runtime, math.into(), table, None)
    }

    /// Holds gradients, Adam's moments and `emas` moving averages too.
    ///
    /// # Errors
    /// As [`Gpu::for_sampling`].
    pub fn for_training(
        runtime: Rc<dyn Runtime>,
        math: impl Into<Math>,
        table: &ParamTable,
        emas: usize,
    ) -> Result<Self, DeviceError> {
        Self::new(runtime, math.into(), table, Some(emas))
    }

    fn new(runtime: Rc<dyn Runtime>, math: Math, table: &ParamTable, emas: Option<usize>) -> Result<Self, DeviceError> {
        let precision = math.precision;
        let card = runtime.card();
        if math.conv_loop == ConvLoop::Wgmma && card.capability != 90 {
            let (name, found) = (runtime.name(), card.capability);
            let what =
                format!("{name}: compute capability {}.{}, wgmma (--conv-loop) needs 9.0", found / 10, found % 10);
            return Err(DeviceError::Unavailable(what));
        }
        let params = Params::new(&*runtime, precision, table, emas)?;
        Ok(Self {
            runtime,
            math,
            precision,
            card,
            params,
            codec_bytes: 0,
            recording: None,
            plans: HashMap::new(),
            workspace: None,
            scale_tables: HashMap::new(),
            failed: None,
        })
    }

    /// Costs of the plans so far, by key.
    pub fn costs(&self) -> impl Iterator<Item = (&str, Cost)> {
        self.plans.iter().map(|(key, plan)| (key.as_str(), plan.cost))
    }

    /// Bytes of device memory for parameters and training state, and for the weights of codecs.
    pub fn param_bytes(&self) -> usize {
        self.params.bytes() + self.codec_bytes
    }

    // ---- recording and running --------------------------------------------------------------

    pub(super) fn fail(&mut self, error: DeviceError) {
        self.failed.get_or_insert(error);
    }

    /// A shape that the kernels do not take.
    pub(super) fn unsupported(&mut self, error: impl std::fmt::Display) {
        self.fail(DeviceError::Unavailable(format!("the network does not fit the kernels: {error}")));
    }

    /// Runs or records the commands of one operation.
    pub(super) fn go<C: Into<Command>>(&mut self, work: Work, commands: impl IntoIterator<Item = C>) {
        let commands: Vec<Command> = commands.into_iter().map(C::into).collect();
        match &mut self.recording {
            Some(r) => r.operations.push((work, commands)),
            None => {
                for command in &commands {
                    if self.failed.is_some() {
                        return;
                    }
                    // SAFETY: the operations below pass buffers of the sizes that the launches' makers ask for.
                    if let Err(e) = unsafe { self.runtime.run(command) } {
                        self.fail(e);
                    }
                }
            }
        }
    }

    pub(super) fn own(&mut self, bytes: usize, purpose: &'static str) -> Rc<dyn Memory> {
        self.runtime.allocate(bytes, purpose).unwrap_or_else(|e| {
            self.fail(e);
            let nowhere = Imagined::new(self.card).allocate(bytes, purpose);
            nowhere.expect("an imagined device has memory")
        })
    }

    /// Keeps tensors outside of the workspace for as long as the plan that is being recorded reads them.
    pub(super) fn keep(&mut self, tensors: &[&Tensor]) {
        if let Some(r) = &mut self.recording {
            r.constants.extend(tensors.iter().map(|&t| t.clone()));
        }
    }

    fn buffer(&mut self, bytes: usize) -> Buffer {
        match &self.recording {
            Some(r) => Buffer::Place(r.workspace.place(bytes)),
            None => Buffer::Own(self.own(bytes, "activations")),
        }
    }

    /// A tensor of any content that nobody asks for the activation of.
    pub(super) fn plain(&mut self, shape: Shape, format: Format) -> Tensor {
        let buffer = self.buffer(bytes_of(shape, format));
        Tensor::new(shape, format, None, buffer)
    }

    /// An activation of any content; and room for mp_silu(factor x) of it where that will be asked for.
    fn activation(&mut self, shape: Shape, format: Format) -> (Tensor, Option<(Tensor, f64)>) {
        let number = self.recording.as_mut().map(|r| {
            r.numbers += 1;
            r.numbers
        });
        let buffer = self.buffer(bytes_of(shape, format));
        let x = Tensor::new(shape, format, number, buffer);
        let known = self.recording.as_ref().and_then(|r| r.known.get(&number?).copied());
        let active = known.map(|factor| (self.plain(shape, Format::Half), factor));
        (x, active)
    }

    /// Scratch memory; free for others when dropped.
    pub(super) fn scratch(&mut self, bytes: usize) -> Tensor {
        self.plain([1, 1, 1, bytes.div_ceil(4)], Format::F32)
    }

    /// mp_silu(scale x): what the kernel that made x wrote, else one more launch.
    fn active(&mut self, x: &Tensor, scale: f64) -> Tensor {
        if let Some(made) = x.active(scale) {
            return made;
        }
        let out = self.plain(x.shape(), Format::Half);
        let work = Work::new("mp_silu", x.shape(), x.bytes() + out.bytes());
        self.go(work, [pixelwise::activate(self.precision, x.shape(), x.ptr(), scale, out.ptr())]);
        x.set_active(scale, out.clone());
        if let (Some(r), Some(number)) = (&mut self.recording, x.number()) {
            r.asked.insert(number, scale);
        }
        out
    }

    /// Whether the kernels can norm pixels of so many channels.
    fn normable(&mut self, channels: usize) -> bool {
        let whole = channels.is_multiple_of(8);
        if !whole {
            self.unsupported(format!("pixel norm of {channels} channels, expected a multiple of 8"));
        }
        whole
    }

    // ---- formats ----------------------------------------------------------------------------

    fn decode(&self, bits: u16) -> f32 {
        match self.precision {
            Precision::F16 => f16::from_bits(bits).to_f32(),
            Precision::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }

    /// x as 16 bits, q, k and v in the official order. The network's activations are that already; images and
    /// vectors come through here where single operations are tried.
    pub(super) fn half(&mut self, x: &Tensor) -> Tensor {
        match x.format() {
            Format::Half => x.clone(),
            Format::F32 => {
                let out = self.plain(x.shape(), Format::Half);
                let [n, h, w, c] = x.shape();
                let work = Work::new("narrow", x.shape(), x.bytes() + out.bytes());
                self.go(work, [pixelwise::narrow(self.precision, n * h * w, c, x.ptr(), out.ptr())]);
                out
            }
            Format::Qkv { .. } => self.reordered(x, 0),
        }
    }

    /// x as f32.
    fn float(&mut self, x: &Tensor) -> Tensor {
        if x.format() == Format::F32 {
            return x.clone();
        }
        let half = self.half(x);
        let out = self.plain(x.shape(), Format::F32);
        let [n, h, w, c] = x.shape();
        let work = Work::new("widen", x.shape(), x.bytes() + out.bytes());
        self.go(work, [pixelwise::widen(self.precision, n * h * w, c, half.ptr(), out.ptr())]);
        out
    }

    /// q, k and v in the kernels' order for so many heads, or in the official one for 0: by way of the host,
    /// since the network never asks for another order than it made.
    fn reordered(&mut self, x: &Tensor, heads: usize) -> Tensor {
        let format = if heads > 0 { Format::Qkv { heads } } else { Format::Half };
        if x.format() == format {
            return x.clone();
        }
        let x = if x.format() == Format::F32 { self.half(x) } else { x.clone() };
        let c = x.shape()[3];
        let (out, mut bits) = (self.plain(x.shape(), format), vec![0u16; x.bytes() / 2]);
        let (Some(from), Some(to)) = (x.memory(), out.memory()) else {
            self.unsupported("q, k and v of a convolution that is not their layer");
            return out;
        };
        let moved = from.read(0, bytemuck::cast_slice_mut(&mut bits)).and_then(|()| {
            for pixel in bits.chunks_exact_mut(padded(c)) {
                match (x.format(), heads) {
                    (Format::Qkv { heads }, _) => to_official(&mut pixel[..c], heads),
                    (_, heads) => to_kernels(&mut pixel[..c], heads),
                }
            }
            to.write(0, bytemuck::cast_slice(&bits))
        });
        if let Err(e) = moved {
            self.fail(e);
        }
        out
    }

    /// A gradient or activation in the order of the output channels of a weight.
    fn as_output_of(&mut self, w: ParamId, x: &Tensor) -> Tensor {
        match self.params.heads(w) {
            0 => self.half(x),
            heads => self.reordered(x, heads),
        }
    }

    // ---- convolutions -----------------------------------------------------------------------

    fn conv_shape(&mut self, w: ParamId, x: &Operand<Tensor>) -> ConvShape {
        let [n, h, width, c] = x.x.shape();
        let [rows, cin, taps] = self.params.dims(w);
        let skip = x.skip.map_or(0, |(skip, _)| skip.shape()[3]);
        if c + skip != cin {
            self.unsupported(format!("a convolution of {} channels given {}", cin, c + skip));
        }
        if skip > 0 && !(c.is_multiple_of(8) && skip.is_multiple_of(8)) {
            self.unsupported(format!("a concatenation of {c} and {skip} channels, expected multiples of 8"));
        }
        ConvShape { n, h, w: width, ca: padded(c), cb: padded(skip), cout: padded(rows), taps }
    }

    /// The factors of an operand that neither the weight nor `mp_silu` takes in.
    fn factors(&mut self, w: ParamId, x: &Operand<Tensor>) -> (f64, f64) {
        let given = (x.x_scale, x.skip.map_or(1.0, |(_, scale)| scale));
        match self.params.table()[w].cat {
            Some(cat) if x.silu || cat.split != x.x.shape()[3] || cat.scales != given => {
                self.unsupported("a weight with the scales of one concatenation given another");
                given
            }
            Some(_) => (1.0, 1.0),
            None => given,
        }
    }

    /// What a forward convolution multiplies: the operand with those of its factors that are not in the weight.
    fn multiplied(&mut self, w: ParamId, x: &Operand<Tensor>) -> (Tensor, Option<Tensor>) {
        let factors = self.factors(w, x);
        let mut part = |x: &Tensor, scale: f64, factor: f64, silu: bool| {
            let half = self.half(x);
            match silu {
                true => self.active(&half, scale),
                false if factor == 1.0 => half,
                // The network's weights have their factors; only single operations that are tried come here.
                false => self.linear_combination(&[(&half, factor)]),
            }
        };
        let a = part(x.x, x.x_scale, factors.0, x.silu);
        (a, x.skip.map(|(skip, scale)| part(skip, scale, factors.1, x.silu)))
    }

    /// What a convolution reads, and the tensors that hold it.
    fn inputs(&mut self, x: &Operand<Tensor>) -> (Inputs, Vec<Tensor>) {
        let mut part = |x: &Tensor, scale: f64, silu: bool| {
            let half = self.half(x);
            if silu { (self.active(&half, scale), 1.0) } else { (half, scale as f32) }
        };
        let (a, x_scale) = part(x.x, x.x_scale, x.silu);
        let skip = x.skip.map(|(skip, scale)| part(skip, scale, x.silu));
        let inputs = Inputs { x: a.ptr(), x_scale, skip: skip.as_ref().map(|(skip, scale)| (skip.ptr(), *scale)) };
        let held = std::iter::once(a).chain(skip.map(|(skip, _)| skip)).collect();
        (inputs, held)
    }

    /// Runs a forward convolution into `y`; `also` are the other tensors that it reads or writes.
    fn fprop(
        &mut self,
        w: ParamId,
        x: &Operand<Tensor>,
        epilogue: Epilogue,
        y: &Tensor,
        active: Option<(Tensor, f64)>,
        also: usize,
    ) {
        let shape = self.conv_shape(w, x);
        let (a, skip) = self.multiplied(w, x);
        let conv = match Fprop::new(shape, self.math, self.card) {
            Ok(conv) => conv,
            Err(e) => return self.unsupported(e),
        };
        let scratch = self.scratch(conv.scratch_bytes());
        let act = active.as_ref().map(|(t, factor)| (t.ptr(), *factor as f32));
        let inputs = (a.ptr(), skip.as_ref().map(Tensor::ptr));
        match conv.launches(inputs, self.params.effective(w), epilogue, y.ptr(), act, scratch.ptr()) {
            Err(e) => self.unsupported(e),
            Ok(launches) => {
                let read = a.bytes() + skip.as_ref().map_or(0, Tensor::bytes);
                let made = y.bytes() + active.as_ref().map_or(0, |(t, _)| t.bytes());
                let bytes = read + made + also + self.params.effective_bytes(w);
                let name = if shape.taps == 9 { "conv3x3_fprop" } else { "conv1x1_fprop" };
                self.go(Work::new(name, y.shape(), bytes).sums(shape.taps * self.params.dims(w)[1]), launches);
            }
        }
        if let Some((t, factor)) = active {
            y.set_active(factor, t);
        }
    }

    /// A weight's transposed and turned copy.
    fn turned(&mut self, w: ParamId) -> DevicePtr {
        self.params.turned(&*self.runtime, w).unwrap_or_else(|e| {
            self.fail(e);
            DevicePtr::NULL
        })
    }

    fn output_shape(&self, w: ParamId, x: &Operand<Tensor>) -> Shape {
        let [n, h, width, _] = x.x.shape();
        [n, h, width, self.params.dims(w)[0]]
    }

    fn scales(&self, scale: &Scale<Tensor>) -> Scales {
        Scales { all: scale.all.ptr().offset(scale.offset * 4), stride: scale.all.shape()[3] }
    }

    fn accumulating(&mut self) {
        match &mut self.recording {
            Some(r) => r.accumulates = true,
            None => {
                if let Err(e) = self.params.begin_accumulation(&*self.runtime) {
                    self.fail(e);
                }
            }
        }
    }

    // ---- embedding --------------------------------------------------------------------------

    fn embed_layers(&self, p: &Embed) -> EmbedLayers {
        let [emb_channels, noise_channels, _] = self.params.dims(p.noise);
        let label = p.label.map(|w| LabelLayer {
            weight: self.params.effective(w),
            channels: self.params.dims(w)[1],
            balance: p.label_balance,
        });
        EmbedLayers {
            freqs: self.params.plain(p.freqs),
            phases: self.params.plain(p.phases),
            noise: self.params.effective(p.noise),
            label,
            noise_channels,
            emb_channels,
        }
    }

    /// The table of the `emb_linear` layers and its address; a network has one.
    fn scale_table(&mut self, layers: &[EmbLayer]) -> (Rc<ScaleTable>, DevicePtr) {
        let key: Vec<ParamId> = layers.iter().map(|layer| layer.weight).collect();
        if let Some((table, memory)) = self.scale_tables.get(&key) {
            return (table.clone(), memory.ptr());
        }
        let emb_channels = layers.first().map_or(0, |layer| self.params.dims(layer.weight)[1]);
        let place = |layer: &EmbLayer| ScaleLayer {
            weight: self.params.first(layer.weight),
            grad: self.params.first(layer.weight),
            gain: self.params.first_plain(layer.gain),
            gain_grad: self.params.first(layer.gain),
            offset: layer.offset,
            channels: layer.channels,
        };
        let table = Rc::new(ScaleTable::new(emb_channels, &layers.iter().map(place).collect::<Vec<_>>()));
        let bytes: &[u8] = bytemuck::cast_slice(table.tiles());
        let memory = self.own(bytes.len(), "parameters");
        if let Err(e) = memory.write(0, bytes) {
            self.fail(e);
        }
        let at = memory.ptr();
        if self.failed.is_none() {
            self.scale_tables.insert(key, (table.clone(), memory));
        }
        (table, at)
    }

    // ---- plans ------------------------------------------------------------------------------

    /// Records `body` in a workspace at `base`.
    fn trace(
        &mut self,
        base: DevicePtr,
        known: HashMap<usize, f64>,
        inputs: &[Tensor],
        body: &mut Body<Self>,
    ) -> Result<(Recording, Vec<Tensor>), DeviceError> {
        self.recording = Some(Recording {
            workspace: Workspace::new(base),
            operations: Vec::new(),
            numbers: 0,
            asked: HashMap::new(),
            known,
            constants: Vec::new(),
            accumulates: false,
        });
        let outputs = body(self, inputs);
        let recording = self.recording.take().expect("put there above");
        self.failed.take().map_or(Ok((recording, outputs)), Err)
    }

    fn record(&mut self, inputs: &[Input], body: &mut Body<Self>) -> Result<Plan, DeviceError> {
        let own = |(shape, _): &Input| -> Result<Tensor, DeviceError> {
            let memory = self.runtime.allocate(bytes_of(*shape, Format::F32), "inputs")?;
            Ok(Tensor::new(*shape, Format::F32, None, Buffer::Own(memory)))
        };
        let inputs = inputs.iter().map(own).collect::<Result<Vec<_>, _>>()?;
        // Any address will do until the size is known.
        let nowhere = DevicePtr(1 << 40);
        let (first, _) = self.trace(nowhere, HashMap::new(), &inputs, body)?;
        let known = first.asked;
        let (measured, _) = self.trace(nowhere, known.clone(), &inputs, body)?;
        let bytes = measured.workspace.peak();
        if self.workspace.as_ref().is_none_or(|w| w.bytes() < bytes) {
            // The other plans are of the old workspace.
            self.plans.clear();
            self.workspace = None;
            self.workspace = Some(self.runtime.allocate(bytes, "activations")?);
        }
        let base = self.workspace.as_ref().map_or(nowhere, |w| w.ptr());
        let (recording, made) = self.trace(base, known, &inputs, body)?;
        let outputs = made.iter().map(|t| (t.ptr(), t.shape(), t.format())).collect();
        let Recording { operations, accumulates, constants, .. } = recording;
        let commands: Vec<Command> = operations.iter().flat_map(|(_, commands)| commands).cloned().collect();
        let cost = Cost {
            launches: commands.iter().filter(|c| matches!(c, Command::Launch(_))).count(),
            bytes: operations.iter().map(|(work, _)| work.bytes).sum(),
            workspace: bytes,
        };
        // SAFETY: the operations pass buffers of the sizes that the launches' makers ask for, all of them in the
        // workspace, the parameters or memory that the plan keeps.
        let graph = unsafe { self.runtime.record(commands)? };
        Ok(Plan { inputs, outputs, _constants: constants, graph, operations, cost, accumulates })
    }

    /// Times the plans whose keys begin with `key`: the whole, and each kind of operation by itself, as often as
    /// asked, each time with a cold cache. For every kind of operation how many there are, and the seconds of one.
    ///
    /// # Errors
    /// The device's.
    pub fn time(&mut self, key: &str, repeats: usize) -> Result<Timing, DeviceError> {
        let runtime = self.runtime.clone();
        let flushed = runtime.allocate(FLUSH_BYTES, "flushing the cache")?;
        let flush = Command::Zero { at: flushed.ptr(), bytes: FLUSH_BYTES };
        // SAFETY: the whole of that memory.
        let flush = unsafe { runtime.record(vec![flush])? };
        let Some(plan) = self.plans.iter().find(|(k, _)| k.starts_with(key)).map(|(_, plan)| plan) else {
            return Ok(Timing::default());
        };
        let mut kinds: Vec<(Work, usize, &Vec<Command>)> = Vec::new();
        for (work, commands) in &plan.operations {
            match kinds.iter_mut().find(|(known, ..)| known == work) {
                Some((_, count, _)) => *count += 1,
                None => kinds.push((*work, 1, commands)),
            }
        }
        let mut timing = Timing { whole: runtime.time(&*plan.graph, &*flush, repeats)?, kinds: Vec::new() };
        for (work, count, commands) in kinds {
            // SAFETY: as when the plan was recorded.
            let graph = unsafe { runtime.record(commands.clone())? };
            timing.kinds.push((work, count, runtime.time(&*graph, &*flush, repeats)?));
        }
        Ok(timing)
    }
}

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

/// One pixel's q, k and v from the kernels' order to the official one.
fn to_official(pixel: &mut [u16], heads: usize) {
    let from = pixel.to_vec();
    for (row, to) in pixel.iter_mut().enumerate() {
        *to = from[attention::row_of(row, heads, from.len() / 3 / heads)];
    }
}

/// And back.
fn to_kernels(pixel: &mut [u16], heads: usize) {
    let from = pixel.to_vec();
    for (row, &value) in from.iter().enumerate() {
        pixel[attention::row_of(row, heads, from.len() / 3 / heads)] = value;
    }
}

impl Backend for Gpu {
    type Tensor = Tensor;

    fn shape(&self, t: &Tensor) -> Shape {
        t.shape()
    }

    fn upload(&mut self, shape: Shape, values: &[f32]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of a tensor of shape {shape:?}");
        let memory = self.own(values.len() * 4, "inputs");
        if let Err(e) = memory.write(0, bytemuck::cast_slice(values)) {
            self.fail(e);
        }
        let tensor = Tensor::new(shape, Format::F32, None, Buffer::Own(memory));
        self.keep(&[&tensor]);
        tensor
    }

    fn download(&mut self, t: &Tensor) -> Result<Vec<f32>, BackendError> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        let memory = t.memory().expect("nothing is downloaded while a plan is made").clone();
        let [n, h, w, c] = t.shape();
        if t.format() == Format::F32 {
            let mut values = vec![0.0f32; n * h * w * c];
            memory.read(0, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        let mut bits = vec![0u16; t.bytes() / 2];
        memory.read(0, bytemuck::cast_slice_mut(&mut bits))?;
        let mut values = Vec::with_capacity(n * h * w * c);
        for pixel in bits.chunks_exact_mut(padded(c)) {
            if let Format::Qkv { heads } = t.format() {
                to_official(&mut pixel[..c], heads);
            }
            values.extend(pixel[..c].iter().map(|&bits| self.decode(bits)));
        }
        Ok(values)
    }

    fn planned(&mut self, key: &str, inputs: &[Input], body: &mut Body<Self>) -> Result<Vec<Tensor>, BackendError> {
        let shapes: Vec<Shape> = inputs.iter().map(|(shape, _)| *shape).collect();
        let key = format!("{key} {shapes:?}");
        if !self.plans.contains_key(&key) {
            let plan = self.record(inputs, body)?;
            self.plans.insert(key.clone(), plan);
        }
        let plan = &self.plans[&key];
        for (tensor, (_, values)) in plan.inputs.iter().zip(inputs) {
            let memory = tensor.memory().expect("inputs have memory of their own");
            memory.write(0, bytemuck::cast_slice(values))?;
        }
        if plan.accumulates {
            self.params.begin_accumulation(&*self.runtime)?;
        }
        plan.graph.run()?;
        let result = |&(from, shape, format): &(DevicePtr, Shape, Format)| {
            let bytes = bytes_of(shape, format);
            let memory = self.runtime.allocate(bytes, "results")?;
            // SAFETY: the plan's workspace holds as many bytes there.
            unsafe { self.runtime.run(&Command::Copy { from, to: memory.ptr(), bytes })? };
            Ok(Tensor::new(shape, format, None, Buffer::Own(memory)))
        };
        plan.outputs.iter().map(result).collect()
    }

    fn table(&self) -> &ParamTable {
        self.params.table()
    }

    fn write_param(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        self.params.write(slot, id, values)
    }

    fn read_param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError> {
        self.params.read(slot, id)
    }

    fn prepare(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError> {
        self.params.prepare(&*self.runtime, source, how)
    }

    fn precond_input(&mut self, x: &Tensor, sigma: &Tensor, sigma_data: f64) -> Tensor {
        let (x, [n, h, w, c]) = (self.float(x), x.shape());
        let out = self.plain([n, h, w, c + 1], Format::Half);
        let launch = precond::precond_input(self.precision, x.shape(), x.ptr(), sigma.ptr(), sigma_data, out.ptr());
        self.go(Work::new("precond_input", out.shape(), x.bytes() + out.bytes()), [launch]);
        out
    }

    fn precond_output(
        &mut self,
        x: &Tensor,
        raw: &Tensor,
        sigma: &Tensor,
        out_gain: ParamId,
        sigma_data: f64,
    ) -> Tensor {
        let (x, raw) = (self.float(x), self.half(raw));
        let out = self.plain(x.shape(), Format::F32);
        let gain = self.params.plain(out_gain);
        let (p, shape) = (self.precision, x.shape());
        let launch = precond::precond_output(p, shape, x.ptr(), raw.ptr(), sigma.ptr(), gain, sigma_data, out.ptr());
        self.go(Work::new("precond_output", out.shape(), x.bytes() + raw.bytes() + out.bytes()), [launch]);
        out
    }

    fn embed(&mut self, p: &Embed, sigma: &Tensor, labels: Option<&Tensor>) -> Embedding<Tensor> {
        let layers = self.embed_layers(p);
        let n = sigma.shape()[0];
        if layers.noise_channels > embedding::MAX_FEATURES {
            self.unsupported(format!("{} noise channels, at most {}", layers.noise_channels, embedding::MAX_FEATURES));
        }
        let mut vector = |channels| self.plain([n, 1, 1, channels], Format::F32);
        let features = vector(layers.noise_channels);
        let [pre, emb] = [0; 2].map(|_| vector(layers.emb_channels));
        if self.failed.is_some() {
            return Embedding { features, pre, emb };
        }
        let to = Embedding { features: features.ptr(), pre: pre.ptr(), emb: emb.ptr() };
        let labels = labels.map_or(DevicePtr::NULL, Tensor::ptr);
        let bytes = self.params.effective_bytes(p.noise) + p.label.map_or(0, |w| self.params.effective_bytes(w));
        let launch = embedding::embed(self.precision, n, &layers, sigma.ptr(), labels, &to);
        self.go(Work::new("embed", emb.shape(), bytes), [launch]);
        Embedding { features, pre, emb }
    }

    fn emb_scales(&mut self, layers: &[EmbLayer], emb: &Tensor) -> Tensor {
        let (table, tiles) = self.scale_table(layers);
        let n = emb.shape()[0];
        let out = self.plain([n, 1, 1, table.channels()], Format::F32);
        let effective = self.params.all_effective();
        let launch = embedding::emb_scales(self.precision, n, &table, tiles, effective, emb.ptr(), out.ptr());
        let bytes: usize = layers.iter().map(|layer| self.params.effective_bytes(layer.weight)).sum();
        self.go(Work::new("emb_scales", out.shape(), bytes + out.bytes()).sums(emb.shape()[3]), [launch]);
        out
    }

    fn logvar(&mut self, p: &Logvar, sigma: &Tensor) -> (Tensor, Tensor) {
        let (n, channels) = (sigma.shape()[0], self.params.dims(p.weight)[1]);
        let features = self.plain([n, 1, 1, channels], Format::F32);
        let logvar = self.plain([n, 1, 1, 1], Format::F32);
        let layer = LogvarParams {
            freqs: self.params.plain(p.freqs),
            phases: self.params.plain(p.phases),
            weight: self.params.effective(p.weight),
            channels,
        };
        let launch = precond::logvar(self.precision, n, &layer, sigma.ptr(), features.ptr(), logvar.ptr());
        self.go(Work::new("logvar", logvar.shape(), features.bytes()), [launch]);
        (features, logvar)
    }

    fn pixel_norm(&mut self, x: &Tensor, down: bool) -> Tensor {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        let shape = if down { [n, h / 2, w / 2, c] } else { [n, h, w, c] };
        let (y, active) = self.activation(shape, Format::Half);
        if !self.normable(c) {
            return y;
        }
        let fused = active.filter(|(_, factor)| *factor == 1.0).map(|(t, _)| t);
        let silu = fused.as_ref().map_or(DevicePtr::NULL, Tensor::ptr);
        let bytes = x.bytes() + y.bytes() + fused.as_ref().map_or(0, Tensor::bytes);
        let name = if down { "pixel_norm_down" } else { "pixel_norm" };
        let launch = pixelwise::pixel_norm(self.precision, shape, down, x.ptr(), y.ptr(), silu);
        self.go(Work::new(name, shape, bytes), [launch]);
        if let Some(active) = fused {
            y.set_active(1.0, active);
        }
        y
    }

    fn upsample(&mut self, x: &Tensor) -> Tensor {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        let (y, active) = self.activation([n, 2 * h, 2 * w, c], Format::Half);
        let fused = active.filter(|(_, factor)| *factor == 1.0).map(|(t, _)| t);
        let silu = fused.as_ref().map_or(DevicePtr::NULL, Tensor::ptr);
        let bytes = x.bytes() + y.bytes() + fused.as_ref().map_or(0, Tensor::bytes);
        let launch = pixelwise::upsample(self.precision, x.shape(), x.ptr(), y.ptr(), silu);
        self.go(Work::new("upsample", y.shape(), bytes), [launch]);
        if let Some(active) = fused {
            y.set_active(1.0, active);
        }
        y
    }

    fn conv(&mut self, w: ParamId, x: Operand<Tensor>) -> Tensor {
        let format = match self.params.heads(w) {
            0 => Format::Half,
            heads => Format::Qkv { heads },
        };
        let shape = self.output_shape(w, &x);
        let (y, active) = self.activation(shape, format);
        self.fprop(w, &x, Epilogue::Gain(1.0), &y, active, 0);
        y
    }

    fn conv_scale_silu(
        &mut self,
        w: ParamId,
        x: Operand<Tensor>,
        scale: Scale<Tensor>,
        keep: bool,
    ) -> (Tensor, Option<Tensor>) {
        let shape = self.output_shape(w, &x);
        let y = self.plain(shape, Format::Half);
        let pre = keep.then(|| self.plain(shape, Format::Half));
        let epilogue = Epilogue::ScaleSilu { scale: self.scales(&scale), pre: pre.as_ref().map(Tensor::ptr) };
        self.fprop(w, &x, epilogue, &y, None, pre.as_ref().map_or(0, Tensor::bytes));
        (y, pre)
    }

    fn conv_mp_sum(&mut self, w: ParamId, x: Operand<Tensor>, residual: &Tensor, t: f64, clip: Option<f64>) -> Tensor {
        let (wa, wb) = mp_sum_weights(t);
        let residual = self.half(residual);
        let (y, active) = self.activation(residual.shape(), Format::Half);
        let epilogue = Epilogue::MpSum {
            residual: residual.ptr(),
            wa: wa as f32,
            wb: wb as f32,
            clip: clip.map(|clip| clip as f32),
        };
        self.fprop(w, &x, epilogue, &y, active, residual.bytes());
        y
    }

    fn attention(&mut self, qkv: &Tensor, heads: usize) -> Tensor {
        let [n, h, w, c] = qkv.shape();
        let qkv = self.reordered(qkv, heads);
        let out = self.plain([n, h, w, c / 3], Format::Half);
        match Attention::new(n, h * w, heads, c / 3 / heads, self.precision) {
            Ok(attention) => {
                let work = Work::new("attention", out.shape(), qkv.bytes() + out.bytes()).sums(2 * h * w);
                self.go(work, [attention.forward(qkv.ptr(), out.ptr())]);
            }
            Err(e) => self.unsupported(e),
        }
        out
    }

    fn loss(&mut self, i: LossInput<Tensor>) -> Loss<Tensor> {
        self.accumulating();
        let shape = i.clean.shape();
        let n = shape[0];
        let [clean, noisy] = [i.clean, i.noisy].map(|t| self.float(t));
        let raw = self.half(i.raw);
        let grad_raw = self.plain(shape, Format::Half);
        let [per_image, grad_logvar] = [0; 2].map(|_| self.plain([n, 1, 1, 1], Format::F32));
        let partial = self.scratch(precond::loss_scratch(shape));
        let arenas = LossArenas {
            clean: clean.ptr(),
            noisy: noisy.ptr(),
            raw: raw.ptr(),
            sigma: i.sigma.ptr(),
            logvar: i.logvar.ptr(),
            gain: self.params.plain(i.out_gain),
            grad_raw: grad_raw.ptr(),
            partial: partial.ptr(),
            per_image: per_image.ptr(),
            grad_logvar: grad_logvar.ptr(),
            grad_gain: self.params.grad(i.out_gain),
        };
        let bytes = clean.bytes() + noisy.bytes() + raw.bytes() + grad_raw.bytes();
        self.go(Work::new("loss", shape, bytes), precond::loss(self.precision, shape, &arenas, i.sigma_data));
        Loss { per_image, grad_raw, grad_logvar }
    }

    fn logvar_backward(&mut self, p: &Logvar, features: &Tensor, grad: &Tensor) {
        self.accumulating();
        let [n, _, _, channels] = features.shape();
        let to = self.params.grad(p.weight);
        let launch = precond::logvar_backward(n, channels, features.ptr(), grad.ptr(), to);
        self.go(Work::new("logvar_backward", features.shape(), features.bytes()), [launch]);
    }

    fn conv_wgrad(&mut self, w: ParamId, x: Operand<Tensor>, grad: &Tensor, gain: f64) {
        self.accumulating();
        let shape = self.conv_shape(w, &x);
        let (inputs, held) = self.inputs(&x);
        let grad = self.as_output_of(w, grad);
        let conv = match Wgrad::new(shape, self.math, self.card) {
            Ok(conv) => conv,
            Err(e) => return self.unsupported(e),
        };
        let scratch = self.scratch(conv.scratch_bytes());
        match conv.launches(inputs, grad.ptr(), gain as f32, self.params.grad(w), scratch.ptr()) {
            Err(e) => self.unsupported(e),
            Ok(launches) => {
                let read: usize = held.iter().map(Tensor::bytes).sum();
                let bytes = read + grad.bytes() + 4 * self.params.effective_bytes(w);
                let [rows, cin, taps] = self.params.dims(w);
                let name = if taps == 9 { "conv3x3_wgrad" } else { "conv1x1_wgrad" };
                self.go(Work::new(name, [1, rows, taps, cin], bytes).sums(shape.pixels()), launches);
            }
        }
    }

    fn conv_dgrad(
        &mut self,
        w: ParamId,
        grad: &Tensor,
        gain: f64,
        x: Operand<Tensor>,
        acc: Option<(OperandGrad<Tensor>, f64)>,
    ) -> OperandGrad<Tensor> {
        let shape = self.conv_shape(w, &x);
        let grad = self.as_output_of(w, grad);
        // The tensors before mp_silu: its slope is computed from them.
        let a = self.half(x.x);
        let (x_scale, skip_scale) = self.factors(w, &x);
        let skip = x.skip.map(|(skip, _)| (self.half(skip), skip_scale as f32));
        let inputs = Inputs {
            x: a.ptr(),
            x_scale: x_scale as f32,
            skip: skip.as_ref().map(|(skip, scale)| (skip.ptr(), *scale)),
        };
        let through = if x.silu { Through::Silu } else { Through::Linear };
        let factor = acc.as_ref().map(|(_, factor)| *factor as f32);
        let (acc_x, acc_skip) = acc.map_or((None, None), |(acc, _)| (Some(self.half(&acc.x)), acc.skip));
        let acc_skip = acc_skip.map(|t| self.half(&t));
        let bytes_acc = acc_x.as_ref().map_or(0, Tensor::bytes) + acc_skip.as_ref().map_or(0, Tensor::bytes);
        let at = |t: &Option<Tensor>| t.as_ref().map_or(DevicePtr::NULL, Tensor::ptr);
        let acc = factor.map(|factor| ([at(&acc_x), at(&acc_skip)], factor));
        // Where nobody else reads what is added to, the sum takes its place.
        let room = |gpu: &mut Self, acc: Option<Tensor>, shape: Shape| match acc {
            Some(acc) if acc.is_unique() => acc,
            _ => gpu.plain(shape, Format::Half),
        };
        let held =
            (acc_x.as_ref().filter(|t| !t.is_unique()).cloned(), acc_skip.as_ref().filter(|t| !t.is_unique()).cloned());
        let gx = room(self, acc_x, a.shape());
        let gskip = skip.as_ref().map(|(skip, _)| room(self, acc_skip, skip.shape()));
        let conv = match Dgrad::new(shape, false, self.math, self.card) {
            Ok(conv) => conv,
            Err(e) => {
                self.unsupported(e);
                return OperandGrad { x: gx, skip: gskip };
            }
        };
        let scratch = self.scratch(conv.scratch_bytes());
        let to = (gx.ptr(), at(&gskip));
        let (turned, gain) = (self.turned(w), gain as f32);
        match conv.launches(grad.ptr(), turned, gain, inputs, through, acc, to, scratch.ptr()) {
            Err(e) => self.unsupported(e),
            Ok(launches) => {
                let made = gx.bytes() + gskip.as_ref().map_or(0, Tensor::bytes);
                let read = grad.bytes() + if x.silu { made } else { 0 } + bytes_acc;
                let bytes = read + made + self.params.effective_bytes(w);
                let [rows, cin, taps] = self.params.dims(w);
                let name = if taps == 9 { "conv3x3_dgrad" } else { "conv1x1_dgrad" };
                let [n, h, width, _] = gx.shape();
                self.go(Work::new(name, [n, h, width, cin], bytes).sums(taps * rows), launches);
            }
        }
        drop(held);
        OperandGrad { x: gx, skip: gskip }
    }

    fn conv_dgrad_scale_silu(
        &mut self,
        w: ParamId,
        grad: &Tensor,
        gain: f64,
        pre: &Tensor,
        scale: Scale<Tensor>,
        grad_scales: &mut Tensor,
    ) -> Tensor {
        let operand = Operand::plain(pre);
        let shape = self.conv_shape(w, &operand);
        let (grad, pre) = (self.as_output_of(w, grad), self.half(pre));
        let gx = self.plain(pre.shape(), Format::Half);
        let conv = match Dgrad::new(shape, true, self.math, self.card) {
            Ok(conv) => conv,
            Err(e) => {
                self.unsupported(e);
                return gx;
            }
        };
        let scratch = self.scratch(conv.scratch_bytes());
        let inputs = Inputs { x: pre.ptr(), x_scale: 1.0, skip: None };
        let through =
            Through::ScaleSilu { scale: self.scales(&scale), scale_grad: grad_scales.ptr().offset(scale.offset * 4) };
        let (turned, to) = (self.turned(w), (gx.ptr(), DevicePtr::NULL));
        match conv.launches(grad.ptr(), turned, gain as f32, inputs, through, None, to, scratch.ptr()) {
            Err(e) => self.unsupported(e),
            Ok(launches) => {
                let bytes = grad.bytes() + pre.bytes() + gx.bytes() + self.params.effective_bytes(w);
                self.go(
                    Work::new("conv3x3_dgrad_scale_silu", gx.shape(), bytes).sums(shape.taps * shape.cout),
                    launches,
                );
            }
        }
        gx
    }

    fn clip_backward(&mut self, grad: Tensor, out: &Tensor, clip: f64) -> Tensor {
        let half = self.half(&grad);
        drop(grad);
        let y = self.half(out);
        let (from, bytes) = (half.ptr(), 2 * half.bytes() + y.bytes());
        let held = (!half.is_unique()).then(|| half.clone());
        let to = if held.is_none() { half } else { self.plain(half.shape(), Format::Half) };
        let launch = pixelwise::clip_backward(self.precision, to.shape(), from, y.ptr(), clip, to.ptr());
        self.go(Work::new("clip_backward", to.shape(), bytes), [launch]);
        drop(held);
        to
    }

    fn pixel_norm_backward(&mut self, x: &Tensor, grad: &Tensor, down: bool, acc: Option<Tensor>) -> Tensor {
        let (x, grad) = (self.half(x), self.half(grad));
        let acc = acc.map(|acc| self.half(&acc));
        let from = acc.as_ref().map_or(DevicePtr::NULL, Tensor::ptr);
        let bytes = 2 * x.bytes() + grad.bytes() + acc.as_ref().map_or(0, Tensor::bytes);
        let held = acc.as_ref().filter(|acc| !acc.is_unique()).cloned();
        let out = match acc {
            Some(acc) if held.is_none() => acc,
            _ => self.plain(x.shape(), Format::Half),
        };
        if !self.normable(x.shape()[3]) {
            return out;
        }
        let (p, shape) = (self.precision, grad.shape());
        let name = if down { "pixel_norm_down_backward" } else { "pixel_norm_backward" };
        let launch = pixelwise::pixel_norm_backward(p, shape, down, x.ptr(), grad.ptr(), from, out.ptr());
        self.go(Work::new(name, out.shape(), bytes), [launch]);
        drop(held);
        out
    }

    fn upsample_backward(&mut self, grad: &Tensor) -> Tensor {
        let (grad, [n, h, w, c]) = (self.half(grad), grad.shape());
        let out = self.plain([n, h / 2, w / 2, c], Format::Half);
        let launch = pixelwise::upsample_backward(self.precision, out.shape(), grad.ptr(), out.ptr());
        self.go(Work::new("upsample_backward", out.shape(), grad.bytes() + out.bytes()), [launch]);
        out
    }

    fn attention_backward(&mut self, qkv: &Tensor, heads: usize, grad: &Tensor) -> Tensor {
        let [n, h, w, c] = qkv.shape();
        let (ordered, grad) = (self.reordered(qkv, heads), self.half(grad));
        let out = self.plain(qkv.shape(), Format::Qkv { heads });
        match Attention::new(n, h * w, heads, c / 3 / heads, self.precision) {
            Ok(attention) => {
                let scratch = self.scratch(attention.scratch_bytes());
                let launches = attention.backward(ordered.ptr(), grad.ptr(), out.ptr(), scratch.ptr());
                let bytes = ordered.bytes() + grad.bytes() + out.bytes();
                self.go(Work::new("attention_backward", grad.shape(), bytes).sums(7 * h * w), launches);
            }
            Err(e) => self.unsupported(e),
        }
        out
    }

    fn zero_scales_grad(&mut self, scales: &Tensor) -> Tensor {
        let zeros = self.plain(scales.shape(), Format::F32);
        let work = Work::new("zero", zeros.shape(), zeros.bytes());
        self.go(work, [Command::Zero { at: zeros.ptr(), bytes: zeros.bytes() }]);
        zeros
    }

    fn emb_scales_backward(&mut self, layers: &[EmbLayer], emb: &Tensor, grad_scales: &Tensor) -> Tensor {
        self.accumulating();
        let (table, tiles) = self.scale_table(layers);
        let n = emb.shape()[0];
        let grad_emb = self.plain(emb.shape(), Format::F32);
        let scratch = self.scratch(table.scratch(n));
        let grads = ScaleGrads {
            emb: emb.ptr(),
            scales: grad_scales.ptr(),
            arena: self.params.all_grads(),
            grad_emb: grad_emb.ptr(),
            scratch: scratch.ptr(),
        };
        let effective = self.params.all_effective();
        // Effective weights once, their gradients read and written.
        let bytes: usize = layers.iter().map(|layer| 5 * self.params.effective_bytes(layer.weight)).sum();
        let launches = embedding::emb_scales_backward(self.precision, n, &table, tiles, effective, &grads);
        self.go(Work::new("emb_scales_backward", grad_scales.shape(), bytes).sums(2 * emb.shape()[3]), launches);
        grad_emb
    }

    fn embed_backward(&mut self, p: &Embed, e: &Embedding<Tensor>, labels: Option<&Tensor>, grad_emb: &Tensor) {
        self.accumulating();
        let layers = self.embed_layers(p);
        let n = grad_emb.shape()[0];
        let e = Embedding { features: e.features.ptr(), pre: e.pre.ptr(), emb: e.emb.ptr() };
        let at = |labels: Option<&Tensor>| labels.map_or(DevicePtr::NULL, Tensor::ptr);
        let [noise, label] = [Some(p.noise), p.label].map(|w| w.map_or(DevicePtr::NULL, |w| self.params.grad(w)));
        let labels = if p.label.is_some() { at(labels) } else { DevicePtr::NULL };
        let launch = embedding::embed_backward(n, &layers, &e, labels, grad_emb.ptr(), noise, label);
        let bytes = 4 * (self.params.effective_bytes(p.noise) + p.label.map_or(0, |w| self.params.effective_bytes(w)));
        self.go(Work::new("embed_backward", grad_emb.shape(), bytes), [launch]);
    }

    fn optimizer_step(&mut self, step: &Step) -> Result<StepStats, BackendError> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        self.params.step(&*self.runtime, step)
    }

    fn linear_combination(&mut self, terms: &[(&Tensor, f64)]) -> Tensor {
        let shape = terms[0].0.shape();
        let float = terms.iter().all(|(t, _)| t.format() == Format::F32);
        let held: Vec<Tensor> = terms.iter().map(|(t, _)| if float { (*t).clone() } else { self.half(t) }).collect();
        let from: Vec<(DevicePtr, f64)> = held.iter().zip(terms).map(|(t, (_, f))| (t.ptr(), *f)).collect();
        let out = if float { self.plain(shape, Format::F32) } else { self.activation(shape, Format::Half).0 };
        let launch = match float {
            true => pixelwise::combine_f32(shape.iter().product(), &from, out.ptr()),
            false => pixelwise::combine(self.precision, shape, &from, out.ptr()),
        };
        self.go(Work::new("linear_combination", shape, (terms.len() + 1) * out.bytes()), [launch]);
        out
    }
}
