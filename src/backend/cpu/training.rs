//! What learning adds, on the CPU.

use super::*;
use crate::real::mp_silu_grad;

impl<T: Real> TrainingBackend for Cpu<T> {
    fn write_param(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        let values: Vec<T> = values.iter().map(|&v| T::of(f64::from(v))).collect();
        self.set_param(slot, id, &values)
    }

    fn read_param(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError> {
        Ok(self.param(slot, id)?.into_iter().map(|v| v.wide() as f32).collect())
    }

    fn portions(&self) -> &Portions {
        &self.params.portions
    }

    fn exchange(&mut self, slot: Slot, portion: usize, exchange: &mut dyn FnMut(Values)) -> Result<(), BackendError> {
        let Params { portions, all, .. } = &mut self.params;
        portions.ids()[portion].iter().try_for_each(|id| all[id.0].exchange(slot, exchange))
    }

    fn make_effective(&mut self, source: Slot, how: Normalization) -> Result<(), BackendError> {
        self.params.all.iter_mut().try_for_each(|p| p.make_effective(source, how))
    }

    fn loss(&mut self, i: LossInput<Tensor<T>>) -> Loss<Tensor<T>> {
        let [n, h, w, c] = i.clean.shape();
        let gain = self.gain(i.out_gain);
        let mut per_image = self.uninit([n, 1, 1, 1]);
        let mut grad_logvar = self.uninit([n, 1, 1, 1]);
        let mut grad_raw = self.uninit(i.clean.shape());
        let size = h * w * c;
        let data = i.sigma_data;
        let sums: Vec<[f64; 3]> = grad_raw
            .values_mut()
            .par_chunks_mut(size)
            .enumerate()
            .map(|(n, grad)| {
                let sigma = i.sigma.values()[n];
                let logvar = i.logvar.values()[n];
                let (c_skip, c_out) = output_scales(sigma, data);
                let s = sigma * T::of(data);
                let weight = (sigma * sigma + T::of(data * data)) / (s * s) / logvar.exp();
                let [clean, noisy, raw] = [i.clean, i.noisy, i.raw].map(|t| &t.values()[n * size..][..size]);
                // Sums over the image, in f64: of the loss, its derivative by logvar, and by out_gain.
                let (mut loss, mut dlogvar, mut dgain) = (0.0, 0.0, 0.0);
                for j in 0..size {
                    let error = c_skip * noisy[j] + c_out * (gain * raw[j]) - clean[j];
                    let term = weight * error * error;
                    let dout = T::of(2.0) * weight * error * c_out;
                    loss += (term + logvar).wide();
                    dlogvar += (T::one() - term).wide();
                    dgain += (dout * raw[j]).wide();
                    grad[j] = dout * gain;
                }
                [loss, dlogvar, dgain]
            })
            .collect();
        for (n, [loss, dlogvar, _]) in sums.iter().enumerate() {
            per_image.values_mut()[n] = T::of(*loss);
            grad_logvar.values_mut()[n] = T::of(*dlogvar);
        }
        self.add_to_gain(i.out_gain, T::of(sums.iter().map(|s| s[2]).sum()));
        Loss { per_image, grad_raw, grad_logvar }
    }

    fn logvar_backward(&mut self, p: &Logvar, features: &Tensor<T>, grad: &Tensor<T>) {
        self.linear_wgrad(p.weight, features, grad.values(), 1, 1.0);
    }

    fn conv_wgrad(&mut self, w: ParamId, x: Operand<Tensor<T>>, grad: &Tensor<T>, gain: f64) {
        let taps = self.params[w].dims().2;
        let read_x = |row: usize, pixel: usize, dst: &mut [T]| read_operand(&x, row, pixel, dst);
        let read_grad = |row: usize, pixel: usize, dst: &mut [T]| copy_pixels(grad, row, pixel, dst);
        let rows = ImageRows { shape: operand_shape(&x), read: &read_x };
        let grads = ImageRows { shape: grad.shape(), read: &read_grad };
        let wgrad = if self.bf16 { conv::wgrad_narrow } else { conv::wgrad };
        let (out, accumulate) = self.params[w].grad_mut();
        wgrad(&self.pool, rows, grads, taps, T::of(gain), out, accumulate);
    }

    fn conv_dgrad(
        &mut self,
        w: ParamId,
        grad: &Tensor<T>,
        gain: f64,
        x: Operand<Tensor<T>>,
        acc: Option<(OperandGrad<Tensor<T>>, f64)>,
    ) -> OperandGrad<Tensor<T>> {
        let [n, height, width, c] = operand_shape(&x);
        let (gain, silu) = (T::of(gain), x.silu);
        // One row of one part: the gradient through the operand's scale and mp_silu, plus `acc`, to which it is added.
        let mix = |out: &mut [T], g: &[T], x: &[T], scale: T, acc: Option<T>| {
            for ((out, &g), &x) in out.iter_mut().zip(g).zip(x) {
                let slope = if silu { mp_silu_grad(x * scale) } else { T::one() };
                let g = g * gain * scale * slope;
                *out = acc.map_or(g, |acc| *out * acc + g);
            }
        };
        let (acc, acc_scale) = match acc {
            Some((acc, scale)) => (Some(acc), Some(T::of(scale))),
            None => (None, None),
        };
        if x.skip.is_none() {
            let (part, scale) = (x.x, T::of(x.x_scale));
            let mut out = acc.map_or_else(|| self.uninit(part.shape()), |acc| acc.x);
            self.convolve_back(w, grad, out.values_mut(), |row, g, out| {
                mix(out, g, &part.values()[row * out.len()..][..out.len()], scale, acc_scale);
            });
            return OperandGrad { x: out, skip: None };
        }
        let mut whole = self.uninit([n, height, width, c]);
        self.convolve_back(w, grad, whole.values_mut(), |_, g, out| out.copy_from_slice(g));
        let mut acc = acc.map_or([None, None], |acc| [Some(acc.x), acc.skip]).into_iter();
        let mut grads = parts(&x).map(|(part, scale, offset)| {
            let channels = part.shape()[3];
            let mut out = acc.next().flatten().unwrap_or_else(|| self.uninit(part.shape()));
            for_rows(out.values_mut(), width * channels, |row, out| {
                let pixels = whole.values()[row * width * c..].chunks_exact(c);
                let inputs = part.values()[row * width * channels..].chunks_exact(channels);
                for ((out, g), x) in out.chunks_exact_mut(channels).zip(pixels).zip(inputs) {
                    mix(out, &g[offset..offset + channels], x, scale, acc_scale);
                }
            });
            out
        });
        let x = grads.next().expect("an operand has a first part");
        OperandGrad { x, skip: grads.next() }
    }

    fn conv_dgrad_scale_silu(
        &mut self,
        w: ParamId,
        grad: &Tensor<T>,
        gain: f64,
        pre: &Tensor<T>,
        scale: Scale<Tensor<T>>,
        grad_scales: &mut Tensor<T>,
    ) -> Tensor<T> {
        let [n, height, width, c] = pre.shape();
        let gain = T::of(gain);
        // With u = pre * scale: first dL/du, then its products with scale (for pre) and pre (for scale).
        let mut out = self.uninit(pre.shape());
        self.convolve_back(w, grad, out.values_mut(), |row, g, out| {
            let scale = scale_row(&scale, row / height, c);
            let pre = pre.values()[row * width * c..].chunks_exact(c);
            for ((out, g), pre) in out.chunks_exact_mut(c).zip(g.chunks_exact(c)).zip(pre) {
                for i in 0..c {
                    out[i] = g[i] * gain * mp_silu_grad(pre[i] * scale[i]);
                }
            }
        });
        let mut row_sums = self.uninit([n, height, 1, c]);
        for_rows(row_sums.values_mut(), c, |row, sums| {
            sums.fill(T::zero());
            let gu = out.values()[row * width * c..][..width * c].chunks_exact(c);
            for (gu, pre) in gu.zip(pre.values()[row * width * c..].chunks_exact(c)) {
                for i in 0..c {
                    sums[i] += gu[i] * pre[i];
                }
            }
        });
        let all = grad_scales.shape()[3];
        let images = grad_scales.values_mut().chunks_exact_mut(all);
        for (image, rows) in images.zip(row_sums.values().chunks_exact(height * c)) {
            for sums in rows.chunks_exact(c) {
                image[scale.offset..].iter_mut().zip(sums).for_each(|(g, &s)| *g += s);
            }
        }
        for_rows(out.values_mut(), width * c, |row, out| {
            let scale = scale_row(&scale, row / height, c);
            for out in out.chunks_exact_mut(c) {
                out.iter_mut().zip(scale).for_each(|(g, &s)| *g *= s);
            }
        });
        out
    }

    fn clip_backward(&mut self, mut grad: Tensor<T>, out: &Tensor<T>, clip: f64) -> Tensor<T> {
        let limit = T::of(clip);
        let row = out.shape()[2] * out.shape()[3];
        for_rows(grad.values_mut(), row, |i, grad| {
            for (g, &y) in grad.iter_mut().zip(&out.values()[i * row..]) {
                *g = if y.abs() < limit { *g } else { T::zero() };
            }
        });
        grad
    }

    fn pixel_norm_backward(
        &mut self,
        x: &Tensor<T>,
        grad: &Tensor<T>,
        down: bool,
        acc: Option<Tensor<T>>,
    ) -> Tensor<T> {
        let [_, _, w, c] = x.shape();
        let (rows, small) = if down { (2, w / 2) } else { (1, w) };
        let fresh = acc.is_none();
        let mut out = acc.unwrap_or_else(|| self.uninit(x.shape()));
        let share = T::of(if down { 0.25 } else { 1.0 });
        for_rows(out.values_mut(), rows * w * c, |row, out| {
            let mut y = vec![T::zero(); small * c];
            read_normed(x, down, row, &mut y);
            let mut g = grad.values()[row * small * c..][..small * c].to_vec();
            for (g, y) in g.chunks_exact_mut(c).zip(y.chunks_exact_mut(c)) {
                let r = normalize(y);
                attention::normalize_backward(g, y, r, T::of(c as f64));
            }
            for (i, out) in out.chunks_exact_mut(c).enumerate() {
                let column = i % w * small / w;
                let g = &g[column * c..][..c];
                for (out, &g) in out.iter_mut().zip(g) {
                    *out = if fresh { g * share } else { *out + g * share };
                }
            }
        });
        out
    }

    fn upsample_backward(&mut self, grad: &Tensor<T>) -> Tensor<T> {
        let [n, h, w, c] = grad.shape();
        let mut out = self.uninit([n, h / 2, w / 2, c]);
        for_rows(out.values_mut(), w / 2 * c, |row, out| {
            let two = &grad.values()[2 * row * w * c..][..2 * w * c];
            average(&two[..w * c], &two[w * c..], c, out);
            out.iter_mut().for_each(|g| *g *= T::of(4.0));
        });
        out
    }

    fn attention_backward(&mut self, qkv: &Tensor<T>, heads: usize, grad: &Tensor<T>) -> Tensor<T> {
        attention::backward(&self.pool, qkv, heads, grad)
    }

    fn zero_scales_grad(&mut self, scales: &Tensor<T>) -> Tensor<T> {
        let mut zeros = self.uninit(scales.shape());
        zeros.values_mut().fill(T::zero());
        zeros
    }

    fn emb_scales_backward(&mut self, layers: &[EmbLayer], emb: &Tensor<T>, grad_scales: &Tensor<T>) -> Tensor<T> {
        let [n, _, _, width] = emb.shape();
        let stride = grad_scales.shape()[3];
        let mut grad_emb = self.uninit(emb.shape());
        for (i, layer) in layers.iter().enumerate() {
            let grad = &grad_scales.values()[layer.offset..];
            let gain = self.gain(layer.gain);
            // scale = gain * (W emb) + 1
            let y = self.linear(layer.weight, emb, 1.0);
            let rows = grad.chunks(stride).zip(y.values().chunks_exact(layer.channels));
            let dgain = rows.flat_map(|(g, y)| g.iter().zip(y)).map(|(&g, &y)| g * y).fold(T::zero(), |a, b| a + b);
            self.add_to_gain(layer.gain, dgain);
            self.linear_wgrad(layer.weight, emb, grad, stride, gain.wide());
            let weight = Mat::new(self.params[layer.weight].effective(), layer.channels).t();
            let shape = (n, width, layer.channels);
            let out = Dst { values: grad_emb.values_mut(), rows: width, accumulate: i > 0 };
            matmul(shape, out, Mat::new(grad, stride), weight, gain, Threads::All);
        }
        grad_emb
    }

    fn embed_backward(
        &mut self,
        p: &Embed,
        e: &Embedding<Tensor<T>>,
        labels: Option<&Tensor<T>>,
        grad_emb: &Tensor<T>,
    ) {
        let width = e.pre.shape()[3];
        let mut grad = grad_emb.clone();
        for_rows(grad.values_mut(), width, |row, grad| {
            let pre = &e.pre.values()[row * width..];
            grad.iter_mut().zip(pre).for_each(|(g, &x)| *g *= mp_silu_grad(x));
        });
        let (wa, wb) = match p.label {
            Some(_) => mp_sum_weights(p.label_balance),
            None => (1.0, 0.0),
        };
        self.linear_wgrad(p.noise, &e.features, grad.values(), width, wa);
        if let (Some(label), Some(labels)) = (p.label, labels) {
            let scale = wb * (labels.shape()[3] as f64).sqrt();
            self.linear_wgrad(label, labels, grad.values(), width, scale);
        }
    }

    fn optimizer_step(&mut self, step: &OptimizerStep) -> Result<StepStats, BackendError> {
        let mut total = StepStats::default();
        for param in &mut self.params.all {
            let stats = param.step(step)?;
            total.grad_norm += stats.grad_norm;
            total.nonfinite += stats.nonfinite;
        }
        total.grad_norm = total.grad_norm.sqrt();
        Ok(total)
    }
}
