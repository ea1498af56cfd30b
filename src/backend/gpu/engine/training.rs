//! What learning adds, as launches.

use super::super::attention::Attention;
use super::super::conv::{ConvInputs, Dgrad, Through, Wgrad};
use super::super::embedding;
use super::super::precond;
use super::super::structs::{
    AttentionParams, ConvDgrad, ConvWgrad, Elementwise, EmbScalesBackward, EmbedBackward, LogvarBackward, LossParams,
    PixelNormBackward,
};
use super::*;

impl TrainingBackend for Gpu {
    fn write_param(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        self.params.write(slot, id, values)
    }

    fn read_param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError> {
        self.params.read(slot, id)
    }

    fn portions(&self) -> &Portions {
        self.params.portions()
    }

    fn exchange(&mut self, slot: Slot, portion: usize, exchange: &mut dyn FnMut(Values)) -> Result<(), BackendError> {
        if slot == Slot::Grad {
            self.accumulating();
        }
        self.check()?;
        self.params.exchange(slot, portion, exchange)
    }

    fn planned_pass<E: From<BackendError>>(
        &mut self,
        key: &dyn PlanKey,
        inputs: &[Tensor],
        pass: &mut Pass<Self, E>,
        done: &mut Done<Self>,
    ) -> Result<Vec<Tensor>, E> {
        // A graph ends where another portion is complete, and nowhere else.
        let mut cut = |b: &mut Self, inputs: &[Tensor], done: &mut Done<Self>| {
            let mut portions = 0;
            pass(b, inputs, &mut |b, whole| {
                let now = b.params.portions().whole(whole);
                if std::mem::replace(&mut portions, now) < now {
                    done(b, whole);
                }
            })
        };
        self.run_plan(key, inputs, &mut cut, done)
    }

    fn make_effective(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError> {
        self.params.make_effective(&*self.runtime, source, how)
    }

    fn loss(&mut self, i: LossInput<Tensor>) -> Loss<Tensor> {
        self.accumulating();
        let shape = i.clean.shape();
        let n = shape[0];
        let [clean, noisy] = [i.clean, i.noisy].map(|t| self.float(t));
        let raw = self.half(i.raw);
        let grad_raw = self.unset(shape, Format::Half);
        let [per_image, grad_logvar] = [0; 2].map(|_| self.unset([n, 1, 1, 1], Format::F32));
        let partial = self.scratch(precond::loss_scratch(shape));
        let memory = LossParams {
            clean: clean.ptr(),
            noisy: noisy.ptr(),
            raw: raw.ptr(),
            sigma: i.sigma.ptr(),
            logvar: i.logvar.ptr(),
            gain: self.params.exact(i.out_gain),
            grad_raw: grad_raw.ptr(),
            partial: partial.ptr(),
            per_image: per_image.ptr(),
            grad_logvar: grad_logvar.ptr(),
            grad_gain: self.params.grad(i.out_gain),
            ..Zeroable::zeroed()
        };
        let work = Operation::new("loss", shape).with([&clean, &noisy, &raw, &grad_raw]);
        self.go(work, precond::loss(self.precision, shape, i.sigma_data, memory));
        Loss { per_image, grad_raw, grad_logvar }
    }

    fn logvar_backward(&mut self, p: &Logvar, features: &Tensor, grad: &Tensor) {
        self.accumulating();
        let [n, _, _, channels] = features.shape();
        let memory = LogvarBackward {
            features: features.ptr(),
            grad: grad.ptr(),
            grad_weight: self.params.grad(p.weight),
            ..Zeroable::zeroed()
        };
        let launch = precond::logvar_backward(n, channels, memory);
        self.go(Operation::new("logvar_backward", features.shape()).with([features]), [launch]);
    }

    fn conv_wgrad(&mut self, w: ParamId, x: Operand<Tensor>, grad: &Tensor, gain: f64) {
        self.accumulating();
        let shape = self.conv_shape(w, &x);
        let (inputs, held) = self.inputs(&x);
        let grad = self.as_output_of(w, grad);
        let Some(conv) = self.fits(Wgrad::new(shape, self.math, &self.chooser)) else { return };
        let scratch = self.scratch(conv.scratch_bytes());
        let memory = ConvWgrad {
            grad: grad.ptr(),
            dw: self.params.grad(w),
            partial: scratch.ptr(),
            gain: gain as f32,
            ..Zeroable::zeroed()
        };
        let launches = conv.launches(inputs, memory);
        let [rows, cin, taps] = self.params.dims(w);
        let name = if taps == 9 { "conv3x3_wgrad" } else { "conv1x1_wgrad" };
        let work =
            Operation::new(name, [1, rows, taps, cin]).sums(shape.pixels()).bytes(4 * self.params.effective_bytes(w));
        let work = work.of(conv.question());
        self.go_if(work.with(&held).with([&grad]), launches);
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
        // Pass the tensors before mp_silu, since its slope is computed from them.
        let a = self.half(x.x);
        let (x_scale, skip_scale) = self.factors(w, &x);
        let skip = x.skip.map(|(skip, _)| (self.half(skip), skip_scale as f32));
        let inputs = ConvInputs {
            x: a.ptr(),
            x_scale: x_scale as f32,
            skip: skip.as_ref().map(|(skip, scale)| (skip.ptr(), *scale)),
        };
        let through = if x.silu { Through::Silu } else { Through::Linear };
        let acc_factor = acc.as_ref().map_or(0.0, |(_, factor)| *factor as f32);
        let (acc_x, acc_skip) = acc.map_or((None, None), |(acc, _)| (Some(self.half(&acc.x)), acc.skip));
        let acc_skip = acc_skip.map(|t| self.half(&t));
        let [from_x, from_skip] = [&acc_x, &acc_skip].map(|t| DevicePtr::of(t.as_ref()));
        let [rows, cin, taps] = self.params.dims(w);
        let name = if taps == 9 { "conv3x3_dgrad" } else { "conv1x1_dgrad" };
        let [n, h, width, _] = a.shape();
        let work = Operation::new(name, [n, h, width, cin]).sums(taps * rows).bytes(self.params.effective_bytes(w));
        let work = work.with([&grad]).with(&acc_x).with(&acc_skip);
        let (gx, held_x) = self.sum_into(acc_x, a.shape());
        let (gskip, held_skip) = match &skip {
            Some((skip, _)) => {
                let (gskip, held) = self.sum_into(acc_skip, skip.shape());
                (Some(gskip), held)
            }
            None => (None, acc_skip),
        };
        let Some(conv) = self.fits(Dgrad::new(shape, false, self.math, &self.chooser)) else {
            return OperandGrad { x: gx, skip: gskip };
        };
        let scratch = self.scratch(conv.scratch_bytes());
        let memory = ConvDgrad {
            grad: grad.ptr(),
            turned: self.turned(w),
            acc_x: from_x,
            acc_skip: from_skip,
            gx: gx.ptr(),
            gskip: DevicePtr::of(gskip.as_ref()),
            partial: scratch.ptr(),
            arrived: self.arrived.ptr(),
            gain: gain as f32,
            acc_factor,
            ..Zeroable::zeroed()
        };
        let launches = conv.launches(inputs, through, memory);
        let work = work.of(conv.question()).with([&gx]).with(&gskip);
        self.go_if(if x.silu { work.with([&gx]).with(&gskip) } else { work }, launches);
        drop((held_x, held_skip));
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
        let operand = Operand::of(pre);
        let shape = self.conv_shape(w, &operand);
        let (grad, pre) = (self.as_output_of(w, grad), self.half(pre));
        let gx = self.unset(pre.shape(), Format::Half);
        let Some(conv) = self.fits(Dgrad::new(shape, true, self.math, &self.chooser)) else { return gx };
        let scratch = self.scratch(conv.scratch_bytes());
        let inputs = ConvInputs { x: pre.ptr(), x_scale: 1.0, skip: None };
        let through =
            Through::ScaleSilu { scale: self.scales(&scale), scale_grad: grad_scales.ptr().offset(scale.offset * 4) };
        let memory = ConvDgrad {
            grad: grad.ptr(),
            turned: self.turned(w),
            gx: gx.ptr(),
            partial: scratch.ptr(),
            arrived: self.arrived.ptr(),
            gain: gain as f32,
            ..Zeroable::zeroed()
        };
        let launches = conv.launches(inputs, through, memory);
        let work =
            Operation::new("conv3x3_dgrad_scale_silu", gx.shape()).sums(shape.taps * shape.cout).of(conv.question());
        self.go_if(work.bytes(self.params.effective_bytes(w)).with([&grad, &pre, &gx]), launches);
        gx
    }

    fn clip_backward(&mut self, grad: Tensor, out: &Tensor, clip: f64) -> Tensor {
        let half = self.half(&grad);
        drop(grad);
        let y = self.half(out);
        let (from, shape) = (half.ptr(), half.shape());
        let (to, held) = self.sum_into(Some(half), shape);
        let memory = Elementwise { a: y.ptr(), b: from, out: to.ptr(), ..Zeroable::zeroed() };
        let launch = pixelwise::clip_backward(self.precision, shape, clip, memory);
        self.go(Operation::new("clip_backward", shape).with([&to, &to, &y]), [launch]);
        drop(held);
        to
    }

    fn pixel_norm_backward(&mut self, x: &Tensor, grad: &Tensor, down: bool, acc: Option<Tensor>) -> Tensor {
        let (x, grad) = (self.half(x), self.half(grad));
        let acc = acc.map(|acc| self.half(&acc));
        let name = if down { "pixel_norm_down_backward" } else { "pixel_norm_backward" };
        let work = Operation::new(name, x.shape()).with([&x, &x, &grad]).with(&acc);
        let from = DevicePtr::of(acc.as_ref());
        let (out, held) = self.sum_into(acc, x.shape());
        if !self.normable(x.shape()[3]) {
            return out;
        }
        let memory =
            PixelNormBackward { x: x.ptr(), grad: grad.ptr(), acc: from, out: out.ptr(), ..Zeroable::zeroed() };
        let launch = pixelwise::pixel_norm_backward(self.precision, grad.shape(), down, memory);
        self.go(work, [launch]);
        drop(held);
        out
    }

    fn upsample_backward(&mut self, grad: &Tensor) -> Tensor {
        let (grad, [n, h, w, c]) = (self.half(grad), grad.shape());
        let out = self.unset([n, h / 2, w / 2, c], Format::Half);
        let launch = pixelwise::upsample_backward(self.precision, out.shape(), grad.ptr(), out.ptr());
        self.go(Operation::new("upsample_backward", out.shape()).with([&grad, &out]), [launch]);
        out
    }

    fn attention_backward(&mut self, qkv: &Tensor, heads: usize, grad: &Tensor) -> Tensor {
        let [n, h, w, c] = qkv.shape();
        let (ordered, grad) = (self.reordered(qkv, heads), self.half(grad));
        let out = self.unset(qkv.shape(), Format::Qkv { heads });
        let attention = Attention::new(n, h * w, heads, c / 3 / heads, self.precision);
        let scratch = self.scratch(attention.map_or(0, |attention| attention.scratch_bytes()));
        let memory = AttentionParams {
            qkv: ordered.ptr(),
            grad_out: grad.ptr(),
            out: out.ptr(),
            sums: scratch.ptr(),
            ..Zeroable::zeroed()
        };
        let launches = attention.map(|attention| attention.backward(memory));
        let work = Operation::new("attention_backward", grad.shape()).sums(7 * h * w);
        self.go_if(work.with([&ordered, &grad, &out]), launches);
        out
    }

    fn zero_scales_grad(&mut self, scales: &Tensor) -> Tensor {
        let zeros = self.unset(scales.shape(), Format::F32);
        let work = Operation::new("zero", zeros.shape()).with([&zeros]);
        self.go(work, [Command::Zero { at: zeros.ptr(), bytes: zeros.bytes() }]);
        zeros
    }

    fn emb_scales_backward(&mut self, layers: &[EmbLayer], emb: &Tensor, grad_scales: &Tensor) -> Tensor {
        self.accumulating();
        let n = emb.shape()[0];
        let grad_emb = self.unset(emb.shape(), Format::F32);
        let Some((table, tiles)) = self.scale_table(layers) else { return grad_emb };
        let scratch = self.scratch(table.scratch(n));
        let memory = EmbScalesBackward {
            tiles,
            weights: self.params.all_effective(),
            exact: self.params.all_exact(),
            emb: emb.ptr(),
            grad: grad_scales.ptr(),
            grads: self.params.all_grads(),
            grad_emb: grad_emb.ptr(),
            gain_sums: scratch.ptr(),
            ..Zeroable::zeroed()
        };
        // Effective weights once, their gradients read and written.
        let bytes = layers.iter().map(|layer| 5 * self.params.effective_bytes(layer.weight)).sum();
        let launches = embedding::emb_scales_backward(self.precision, n, &table, memory);
        self.go(
            Operation::new("emb_scales_backward", grad_scales.shape()).bytes(bytes).sums(2 * emb.shape()[3]),
            launches,
        );
        grad_emb
    }

    fn embed_backward(&mut self, p: &Embed, e: &Embedding<Tensor>, labels: Option<&Tensor>, grad_emb: &Tensor) {
        self.accumulating();
        let layers = self.embed_layers(p);
        let n = grad_emb.shape()[0];
        let memory = EmbedBackward {
            grad_emb: grad_emb.ptr(),
            pre: e.pre.ptr(),
            features: e.features.ptr(),
            labels: DevicePtr::of(labels),
            grad_noise: self.params.grad(p.noise),
            grad_label: p.label.map(|w| self.params.grad(w)).unwrap_or_default(),
            ..Zeroable::zeroed()
        };
        let launch = embedding::embed_backward(n, &layers, memory);
        self.go(Operation::new("embed_backward", grad_emb.shape()).bytes(4 * self.embed_bytes(p)), [launch]);
    }

    fn optimizer_step(&mut self, step: &OptimizerStep) -> Result<StepStats, BackendError> {
        self.accumulating();
        self.check()?;
        let stats = self.params.step(&*self.runtime, step)?;
        self.stale = self.params.clear_grads();
        Ok(stats)
    }
}
