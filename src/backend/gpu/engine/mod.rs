//! Operations as kernel launches, run at once or recorded into a plan.
//!
//! Outside of [`Backend::planned`] an operation runs when it is called and a tensor has memory of its own.
//! Within it, operations are recorded (`plan`). Here are what both have in common and the formats of tensors; the network's
//! operations are in `network` and `training`, on top of `conv`, the autoencoders' in `codec`.

mod codec;
mod conv;
mod network;
mod plan;
mod timing;
mod training;

use std::collections::HashMap;
use std::rc::Rc;

use super::attention;
use super::conv::ARRIVED_BYTES;
use super::launch::{ConvLoop, DevicePtr, Math, Precision};
use super::params::Params;
use super::pixelwise;
use super::runtime::{Command, Imagined, Memory, Runtime};
use super::tensor::{Buffer, Format, Tensor, Workspace, bytes_of, padded};
use super::tiles::{Chooser, Question};
use crate::backend::*;
use crate::params::{ParamId, ParamTable, Portions, Whole};
use bytemuck::Zeroable;
use half::{bf16, f16};
use plan::{Plan, Recording};

pub use codec::Loaded;
pub use plan::Cost;
pub use timing::{Timing, Trial};

/// One operation of a plan: what it is, and the least work that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operation {
    /// Its name.
    pub name: &'static str,
    /// Shape of its result.
    pub shape: Shape,
    /// Products that are summed for each value of the result; 0 where the operation is no matrix product.
    pub sums: usize,
    /// Bytes of the tensors and weights that it reads and writes, each once.
    pub bytes: usize,
    /// The product for which a tile was chosen, where it has a tile.
    pub product: Option<Question>,
}

impl Operation {
    pub(super) fn new(name: &'static str, shape: Shape) -> Self {
        Self { name, shape, sums: 0, bytes: 0, product: None }
    }

    /// Counts the bytes of these tensors, which it reads or writes.
    pub(super) fn with<'a>(self, tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        self.bytes(tensors.into_iter().map(Tensor::bytes).sum())
    }

    /// Counts further bytes.
    pub(super) fn bytes(self, bytes: usize) -> Self {
        Self { bytes: self.bytes + bytes, ..self }
    }

    pub(super) fn sums(self, sums: usize) -> Self {
        Self { sums, ..self }
    }

    pub(super) fn of(self, product: Question) -> Self {
        Self { product: Some(product), ..self }
    }

    /// Multiply-adds.
    pub fn macs(&self) -> usize {
        self.shape.iter().product::<usize>() * self.sums
    }
}

/// Computes on a [`Runtime`]: a network, with its [`Params`], or an autoencoder, `Gpu<`[`Loaded`]`>`.
pub struct Gpu<P = Params> {
    pub(super) runtime: Rc<dyn Runtime>,
    pub(super) math: Math,
    pub(super) precision: Precision,
    pub(super) chooser: Chooser,
    pub(super) params: P,
    recording: Option<Recording>,
    plans: Vec<Plan>,
    workspace: Option<Rc<dyn Memory>>,
    /// See [`ARRIVED_BYTES`].
    arrived: Rc<dyn Memory>,
    /// The command that clears the gradients of a finished step; it runs before anything is added to them again.
    stale: Option<Command>,
    /// The first error since the last call that could return one.
    failed: Option<DeviceError>,
}

impl Gpu {
    /// A device that holds a network's effective weights only.
    ///
    /// # Errors
    /// Device memory does not suffice, or the network has rows too long for the kernels.
    pub fn for_sampling(
        runtime: Rc<dyn Runtime>,
        math: impl Into<Math>,
        table: &ParamTable,
    ) -> Result<Self, DeviceError> {
        let math = math.into();
        let params = Params::new(&*runtime, math.precision, table, None)?;
        Self::new(runtime, math, params)
    }

    /// A device that also holds gradients, Adam's moments and `emas` moving averages.
    pub fn for_training(
        runtime: Rc<dyn Runtime>,
        math: impl Into<Math>,
        table: &ParamTable,
        emas: usize,
    ) -> Result<Self, DeviceError> {
        let math = math.into();
        let params = Params::new(&*runtime, math.precision, table, Some(emas))?;
        Self::new(runtime, math, params)
    }

    /// Bytes of device memory for parameters and training state.
    pub fn param_bytes(&self) -> usize {
        self.params.bytes()
    }
}

impl<P> Gpu<P> {
    pub(super) fn new(runtime: Rc<dyn Runtime>, math: Math, params: P) -> Result<Self, DeviceError> {
        let card = runtime.card();
        if math.conv_loop == Some(ConvLoop::Wgmma) && card.capability != 90 {
            let (name, found) = (runtime.name(), card.capability);
            let what =
                format!("{name}: compute capability {}.{}, convolutions by wgmma need 9.0", found / 10, found % 10);
            return Err(DeviceError::NoLoop(what));
        }
        let arrived = runtime.allocate(ARRIVED_BYTES, "counters")?;
        // SAFETY: the whole of that memory.
        unsafe { runtime.run(&Command::Zero { at: arrived.ptr(), bytes: ARRIVED_BYTES })? };
        let chooser = Chooser { card, tuned: runtime.tuned() };
        Ok(Self {
            arrived,
            runtime,
            math,
            precision: math.precision,
            chooser,
            params,
            recording: None,
            plans: Vec::new(),
            workspace: None,
            stale: None,
            failed: None,
        })
    }

    // ---- recording and running --------------------------------------------------------------

    pub(super) fn fail(&mut self, error: DeviceError) {
        self.failed.get_or_insert(error);
    }

    /// Keeps an error for the next call that can return one.
    pub(super) fn try_to<T>(&mut self, result: Result<T, DeviceError>) -> Option<T> {
        result.map_err(|e| self.fail(e)).ok()
    }

    /// A shape that the kernels do not take.
    pub(super) fn unsupported(&mut self, error: impl std::fmt::Display) {
        self.fail(DeviceError::Unavailable(format!("the network does not fit the kernels: {error}")));
    }

    /// What was made for a shape, if the kernels take that shape; else the error is kept.
    pub(super) fn fits<T, E: std::fmt::Display>(&mut self, made: Result<T, E>) -> Option<T> {
        made.map_err(|e| self.unsupported(e)).ok()
    }

    /// Returns the error that no call has returned yet.
    pub(super) fn check(&mut self) -> Result<(), DeviceError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Runs or records the commands of one operation.
    pub(super) fn go<C: Into<Command>>(&mut self, work: Operation, commands: impl IntoIterator<Item = C>) {
        let commands: Vec<Command> = commands.into_iter().map(C::into).collect();
        match &mut self.recording {
            Some(r) => r.operations.push((work, commands)),
            None => {
                for command in &commands {
                    if self.failed.is_some() {
                        return;
                    }
                    // SAFETY: the operations pass buffers of the sizes that the launches' makers ask for.
                    let ran = unsafe { self.runtime.run(command) };
                    self.try_to(ran);
                }
            }
        }
    }

    /// As [`Gpu::go`], for launches that a shape may forbid.
    pub(super) fn go_if<C: Into<Command>, E: std::fmt::Display>(
        &mut self,
        work: Operation,
        commands: Result<impl IntoIterator<Item = C>, E>,
    ) {
        if let Some(commands) = self.fits(commands) {
            self.go(work, commands);
        }
    }

    /// To be called by whatever adds to gradients.
    fn accumulating(&mut self) {
        if let Some(r) = &mut self.recording {
            r.accumulates = true;
        } else if let Some(clear) = self.stale.take() {
            // SAFETY: the whole arena of gradients.
            let ran = unsafe { self.runtime.run(&clear) };
            self.try_to(ran);
        }
    }

    // ---- memory -----------------------------------------------------------------------------

    pub(super) fn own(&mut self, bytes: usize, purpose: &'static str) -> Rc<dyn Memory> {
        let memory = self.runtime.allocate(bytes, purpose);
        self.try_to(memory).unwrap_or_else(|| {
            let nowhere = Imagined::new(self.chooser.card).allocate(bytes, purpose);
            nowhere.expect("an imagined device has memory")
        })
    }

    /// Values in memory of their own.
    pub(super) fn own_values(&mut self, bytes: &[u8], purpose: &'static str) -> Buffer {
        let memory = self.own(bytes.len(), purpose);
        let written = memory.write(0, bytes);
        self.try_to(written);
        Buffer::Own(memory)
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

    /// An uninitialised tensor whose activation will not be asked for.
    pub(super) fn unset(&mut self, shape: Shape, format: Format) -> Tensor {
        let buffer = self.buffer(bytes_of(shape, format));
        Tensor::new(shape, format, None, buffer)
    }

    /// An uninitialised activation x; and where mp_silu(factor x) will be asked for, room for that and the factor.
    fn activation(&mut self, shape: Shape, format: Format) -> (Tensor, Option<(Tensor, f64)>) {
        let number = self.recording.as_mut().map(|r| {
            r.numbers += 1;
            r.numbers
        });
        let buffer = self.buffer(bytes_of(shape, format));
        let x = Tensor::new(shape, format, number, buffer);
        let known = self.recording.as_ref().and_then(|r| r.known.get(&number?).copied());
        let active = known.map(|factor| (self.unset(shape, Format::Half), factor));
        (x, active)
    }

    /// Scratch memory; free for others when dropped.
    pub(super) fn scratch(&mut self, bytes: usize) -> Tensor {
        self.unset([1, 1, 1, bytes.div_ceil(4)], Format::F32)
    }

    /// Room for a sum with `acc`: the place of `acc` where nobody else reads it, else a new one. With a new one `acc`
    /// is returned too, and must be held until the sum is made.
    pub(super) fn sum_into(&mut self, acc: Option<Tensor>, shape: Shape) -> (Tensor, Option<Tensor>) {
        match acc {
            Some(acc) if acc.is_unique() => (acc, None),
            acc => (self.unset(shape, Format::Half), acc),
        }
    }

    /// mp_silu(scale x): either the kernel that made x has written it, or one more launch does.
    fn active(&mut self, x: &Tensor, scale: f64) -> Tensor {
        if let Some(made) = x.active(scale) {
            return made;
        }
        let out = self.unset(x.shape(), Format::Half);
        let work = Operation::new("mp_silu", x.shape()).with([x, &out]);
        self.go(work, [pixelwise::activate(self.precision, x.shape(), x.ptr(), scale, out.ptr())]);
        x.set_active(scale, out.clone());
        if let (Some(r), Some(number)) = (&mut self.recording, x.number()) {
            r.asked.insert(number, scale);
        }
        out
    }

    // ---- formats ----------------------------------------------------------------------------

    fn decode(&self, bits: u16) -> f32 {
        match self.precision {
            Precision::F16 => f16::from_bits(bits).to_f32(),
            Precision::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }

    /// x as 16 bits, with q, k and v in the official order. The network's activations are so already; images and
    /// vectors are brought into this form where single operations are tested.
    pub(super) fn half(&mut self, x: &Tensor) -> Tensor {
        match x.format() {
            Format::Half => x.clone(),
            Format::F32 => {
                let out = self.unset(x.shape(), Format::Half);
                let [n, h, w, c] = x.shape();
                let work = Operation::new("narrow", x.shape()).with([x, &out]);
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
        let out = self.unset(x.shape(), Format::F32);
        let [n, h, w, c] = x.shape();
        let work = Operation::new("widen", x.shape()).with([x, &out]);
        self.go(work, [pixelwise::widen(self.precision, n * h * w, c, half.ptr(), out.ptr())]);
        out
    }

    /// q, k and v in the kernels' order for so many heads, or in the official order for 0. This goes by way of the
    /// host, since the network never asks for an order other than the one it made.
    fn reordered(&mut self, x: &Tensor, heads: usize) -> Tensor {
        let format = if heads > 0 { Format::Qkv { heads } } else { Format::Half };
        if x.format() == format {
            return x.clone();
        }
        let x = if x.format() == Format::F32 { self.half(x) } else { x.clone() };
        let c = x.shape()[3];
        let (out, mut bits) = (self.unset(x.shape(), format), vec![0u16; x.bytes() / 2]);
        let (Some((from, first)), Some((to, _))) = (x.memory(), out.memory()) else {
            self.unsupported("q, k and v of a convolution that is not their layer");
            return out;
        };
        let moved = from.read(first, bytemuck::cast_slice_mut(&mut bits)).and_then(|()| {
            for pixel in bits.chunks_exact_mut(padded(c)) {
                match (x.format(), heads) {
                    (Format::Qkv { heads }, _) => to_official(&mut pixel[..c], heads),
                    (_, heads) => to_kernels(&mut pixel[..c], heads),
                }
            }
            to.write(0, bytemuck::cast_slice(&bits))
        });
        self.try_to(moved);
        out
    }
}

/// One pixel's q, k and v from the kernels' order to the official one.
fn to_official(pixel: &mut [u16], heads: usize) {
    let from = pixel.to_vec();
    for (row, to) in pixel.iter_mut().enumerate() {
        *to = from[attention::row_of(row, heads, from.len() / 3 / heads)];
    }
}

/// One pixel's q, k and v from the official order to the kernels'.
fn to_kernels(pixel: &mut [u16], heads: usize) {
    let from = pixel.to_vec();
    for (row, &value) in from.iter().enumerate() {
        pixel[attention::row_of(row, heads, from.len() / 3 / heads)] = value;
    }
}

impl<P> Backend for Gpu<P> {
    type Tensor = Tensor;

    fn shape(&self, t: &Tensor) -> Shape {
        t.shape()
    }

    fn upload(&mut self, shape: Shape, values: &[f32]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of a tensor of shape {shape:?}");
        let buffer = self.own_values(bytemuck::cast_slice(values), "inputs");
        let tensor = Tensor::new(shape, Format::F32, None, buffer);
        self.keep(&[&tensor]);
        tensor
    }

    fn download(&mut self, t: &Tensor) -> Result<Vec<f32>, BackendError> {
        self.check()?;
        let (memory, first) = t.memory().expect("nothing is downloaded while a plan is made");
        let [n, h, w, c] = t.shape();
        if t.format() == Format::F32 {
            let mut values = vec![0.0f32; n * h * w * c];
            memory.read(first, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        let mut bits = vec![0u16; t.bytes() / 2];
        memory.read(first, bytemuck::cast_slice_mut(&mut bits))?;
        let mut values = Vec::with_capacity(n * h * w * c);
        for pixel in bits.chunks_exact_mut(padded(c)) {
            if let Format::Qkv { heads } = t.format() {
                to_official(&mut pixel[..c], heads);
            }
            values.extend(pixel[..c].iter().map(|&bits| self.decode(bits)));
        }
        Ok(values)
    }

    fn pace(&mut self) -> Result<(), BackendError> {
        self.check()?;
        Ok(self.runtime.pace()?)
    }

    fn planned<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Tensor],
        body: &mut Body<Self, E>,
    ) -> Result<Vec<Tensor>, E> {
        self.run_plan(key, inputs, &mut |b, inputs, _| body(b, inputs), &mut |_, _| {})
    }

    fn linear_combination(&mut self, terms: &[(&Tensor, f64)]) -> Tensor {
        let shape = terms[0].0.shape();
        let float = terms.iter().all(|(t, _)| t.format() == Format::F32);
        let held: Vec<Tensor> = terms.iter().map(|(t, _)| if float { (*t).clone() } else { self.half(t) }).collect();
        let from: Vec<(DevicePtr, f64)> = held.iter().zip(terms).map(|(t, (_, f))| (t.ptr(), *f)).collect();
        let out = if float { self.unset(shape, Format::F32) } else { self.activation(shape, Format::Half).0 };
        let launch = match float {
            true => pixelwise::combine_f32(shape.iter().product(), &from, out.ptr()),
            false => pixelwise::combine(self.precision, shape, &from, out.ptr()),
        };
        self.go(Operation::new("linear_combination", shape).with(&held).with([&out]), [launch]);
        out
    }

    fn split(&mut self, x: &Tensor, parts: usize) -> Vec<Tensor> {
        if let Some(parts) = x.parts(parts) {
            return parts;
        }
        let [n, h, w, c] = x.shape();
        let out: Vec<_> = (0..parts).map(|_| self.unset([n / parts, h, w, c], x.format())).collect();
        let bytes = x.bytes() / parts;
        let copy = |(i, to): (usize, &Tensor)| Command::Copy { from: x.ptr().offset(i * bytes), to: to.ptr(), bytes };
        self.go(Operation::new("split", x.shape()).bytes(2 * x.bytes()), out.iter().enumerate().map(copy));
        out
    }
}
