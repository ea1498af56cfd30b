//! What all convolutions of the network have in common.

use super::super::conv::{BlockScales, ConvInputs, ConvShape, Epilogue, Fprop, MainPath};
use super::super::structs::ConvFprop;
use super::*;

impl Gpu {
    pub(super) fn conv_shape(&mut self, w: ParamId, x: &Operand<Tensor>) -> ConvShape {
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

    /// The factors of an operand's two inputs that are neither in the weight nor in what `mp_silu` made.
    pub(super) fn factors(&mut self, w: ParamId, x: &Operand<Tensor>) -> (f64, f64) {
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

    /// What a forward convolution multiplies: the operand, times those of its factors that are not in the weight.
    pub(super) fn multiplied(&mut self, w: ParamId, x: &Operand<Tensor>) -> (Tensor, Option<Tensor>) {
        let factors = self.factors(w, x);
        let mut part = |x: &Tensor, scale: f64, factor: f64, silu: bool| {
            let half = self.half(x);
            match silu {
                true => self.active(&half, scale),
                false if factor == 1.0 => half,
                // In the network these factors are in the weights. Only tests of single operations come here.
                false => self.linear_combination(&[(&half, factor)]),
            }
        };
        let a = part(x.x, x.x_scale, factors.0, x.silu);
        (a, x.skip.map(|(skip, scale)| part(skip, scale, factors.1, x.silu)))
    }

    /// What a convolution reads, and the tensors that hold it.
    pub(super) fn inputs(&mut self, x: &Operand<Tensor>) -> (ConvInputs, Vec<Tensor>) {
        let mut part = |x: &Tensor, scale: f64, silu: bool| {
            let half = self.half(x);
            if silu { (self.active(&half, scale), 1.0) } else { (half, scale as f32) }
        };
        let (a, x_scale) = part(x.x, x.x_scale, x.silu);
        let skip = x.skip.map(|(skip, scale)| part(skip, scale, x.silu));
        let inputs = ConvInputs { x: a.ptr(), x_scale, skip: skip.as_ref().map(|(skip, scale)| (skip.ptr(), *scale)) };
        let held = std::iter::once(a).chain(skip.map(|(skip, _)| skip)).collect();
        (inputs, held)
    }

    /// Runs a forward convolution into `y`; `also` are the other tensors that it reads or writes.
    pub(super) fn fprop<'a>(
        &mut self,
        w: ParamId,
        x: &Operand<Tensor>,
        epilogue: Epilogue,
        to: (&Tensor, Option<(Tensor, f64)>),
        also: impl IntoIterator<Item = &'a Tensor>,
    ) {
        let shape = self.conv_shape(w, x);
        let (a, skip) = self.multiplied(w, x);
        let Some(conv) = self.fits(Fprop::new(shape, self.math, &self.chooser)) else { return };
        let work = self.work_of(shape.taps, &[w], to.0).with([&a]).with(&skip).with(also);
        self.launch_fprop(conv, (&a, skip.as_ref()), w, epilogue, to, work);
    }

    /// Runs a forward convolution and that of the main path, to which `epilogue` adds it, into `y`.
    pub(super) fn fprop_onto(
        &mut self,
        w: ParamId,
        x: &Operand<Tensor>,
        (main_w, main): (ParamId, &Operand<Tensor>),
        epilogue: impl FnOnce(MainPath) -> Epilogue,
        to: (&Tensor, Option<(Tensor, f64)>),
    ) {
        let (shape, of_main) = (self.conv_shape(w, x), self.conv_shape(main_w, main));
        let (a, skip) = self.multiplied(w, x);
        let (main_a, main_skip) = self.multiplied(main_w, main);
        let Some(conv) = self.fits(Fprop::and_main(shape, of_main, self.math, &self.chooser)) else { return };
        let inputs = (main_a.ptr(), main_skip.as_ref().map(Tensor::ptr));
        let main = MainPath::Conv { inputs, weight: self.params.effective(main_w) };
        let work = self.work_of(shape.taps, &[w, main_w], to.0).with([&a, &main_a]).with(&skip).with(&main_skip);
        self.launch_fprop(conv, (&a, skip.as_ref()), w, epilogue(main), to, work);
    }

    /// What convolutions into one result cost, without what they read and write. The first has `taps` taps.
    fn work_of(&self, taps: usize, weights: &[ParamId], y: &Tensor) -> Operation {
        let name = if taps == 9 { "conv3x3_fprop" } else { "conv1x1_fprop" };
        let sums = weights.iter().map(|&w| self.params.dims(w)).map(|[_, cin, taps]| cin * taps).sum();
        Operation::new(name, y.shape()).sums(sums).bytes(weights.iter().map(|&w| self.params.effective_bytes(w)).sum())
    }

    fn launch_fprop(
        &mut self,
        conv: Fprop,
        (a, skip): (&Tensor, Option<&Tensor>),
        w: ParamId,
        epilogue: Epilogue,
        (y, active): (&Tensor, Option<(Tensor, f64)>),
        work: Operation,
    ) {
        let scratch = self.scratch(conv.scratch_bytes());
        let act = active.as_ref().map(|(t, factor)| (t.ptr(), *factor as f32));
        let inputs = (a.ptr(), skip.map(Tensor::ptr));
        let work = work.of(conv.question());
        let memory = ConvFprop {
            weight: self.params.effective(w),
            y: y.ptr(),
            partial: scratch.ptr(),
            arrived: self.arrived.ptr(),
            ..Zeroable::zeroed()
        };
        let launch = conv.launch(inputs, epilogue, act, memory);
        self.go_if(work.with([y]).with(active.as_ref().map(|(t, _)| t)), launch.map(|launch| [launch]));
        if let Some((t, factor)) = active {
            y.set_active(factor, t);
        }
    }

    /// The address of a weight's turned copy.
    pub(super) fn turned(&mut self, w: ParamId) -> DevicePtr {
        let turned = self.params.turned(&*self.runtime, w);
        self.try_to(turned).unwrap_or(DevicePtr::NULL)
    }

    pub(super) fn output_shape(&self, w: ParamId, x: &Operand<Tensor>) -> Shape {
        let [n, h, width, _] = x.x.shape();
        [n, h, width, self.params.dims(w)[0]]
    }

    pub(super) fn scales(&self, scale: &Scale<Tensor>) -> BlockScales {
        BlockScales { all: scale.all.ptr().offset(scale.offset * 4), stride: scale.all.shape()[3] }
    }

    /// A gradient or an activation, brought into the order that the output channels of this weight have.
    pub(super) fn as_output_of(&mut self, w: ParamId, x: &Tensor) -> Tensor {
        match self.params.heads(w) {
            0 => self.half(x),
            heads => self.reordered(x, heads),
        }
    }
}
