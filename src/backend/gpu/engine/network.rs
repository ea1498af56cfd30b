//! The forward pass as launches.

use super::super::attention::Attention;
use super::super::conv::{Epilogue, MainPath};
use super::super::embedding::{self, EmbedLayers, LabelLayer, ScaleTable};
use super::super::precond;
use super::super::structs::{self, Dropout, EmbScales, EmbedParams, PixelNorm, PrecondInput, PrecondOutput, Upsample};
use super::*;
use crate::params::mp_sum_weights;

impl Gpu {
    pub(super) fn embed_layers(&self, p: &Embed) -> EmbedLayers {
        let [emb_channels, noise_channels, _] = self.params.dims(p.noise);
        let label = p.label.map(|w| LabelLayer { channels: self.params.dims(w)[1], balance: p.label_balance });
        EmbedLayers { noise_channels, label, emb_channels }
    }

    /// Bytes of the effective weights of the embedding.
    pub(super) fn embed_bytes(&self, p: &Embed) -> usize {
        self.params.effective_bytes(p.noise) + p.label.map_or(0, |w| self.params.effective_bytes(w))
    }

    /// The table of the `emb_linear` layers and its address.
    pub(super) fn scale_table(&mut self, layers: &[EmbLayer]) -> Option<(Rc<ScaleTable>, DevicePtr)> {
        let table = self.params.scale_table(&*self.runtime, layers);
        self.try_to(table)
    }

    /// Whether the kernels can norm pixels of so many channels.
    pub(super) fn normable(&mut self, channels: usize) -> bool {
        let whole = channels.is_multiple_of(8);
        if !whole {
            self.unsupported(format!("pixel norm of {channels} channels, expected a multiple of 8"));
        }
        whole
    }

    /// Runs a pointwise operation. Its kernel also writes mp_silu of its result y, where that will be asked for.
    fn with_active(
        &mut self,
        (name, shape): (&'static str, Shape),
        x: &Tensor,
        launch: impl FnOnce(DevicePtr, DevicePtr) -> super::super::launch::Launch,
    ) -> Tensor {
        let (y, active) = self.activation(shape, Format::Half);
        let active = active.filter(|(_, factor)| *factor == 1.0).map(|(t, _)| t);
        let work = Operation::new(name, shape).with([x, &y]).with(&active);
        self.go(work, [launch(y.ptr(), DevicePtr::of(active.as_ref()))]);
        if let Some(active) = active {
            y.set_active(1.0, active);
        }
        y
    }
}

fn mp_sum(main: MainPath, t: f64, clip: Option<f64>) -> Epilogue {
    let (wa, wb) = mp_sum_weights(t);
    Epilogue::MpSum { main, wa: wa as f32, wb: wb as f32, clip: clip.map(|clip| clip as f32) }
}

impl NetworkBackend for Gpu {
    fn table(&self) -> &ParamTable {
        self.params.table()
    }

    fn load_param(&mut self, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        self.params.write(Slot::Weight, id, values)
    }

    fn normalize(&mut self) -> Result<(), BackendError> {
        self.params.make_effective(&*self.runtime, Slot::Weight, Normalization::Eval)
    }

    fn precond_input(&mut self, x: &Tensor, sigma: &Tensor, sigma_data: f64) -> Tensor {
        let (x, [images, h, w, c], n) = (self.float(x), x.shape(), sigma.shape()[0]);
        let (p, shape) = (self.precision, [n, h, w, c]);
        let out = self.unset([n, h, w, c + 1], Format::Half);
        let memory = PrecondInput { x: x.ptr(), sigma: sigma.ptr(), out: out.ptr(), ..Zeroable::zeroed() };
        let launch = precond::precond_input(p, shape, images, sigma_data, memory);
        self.go(Operation::new("precond_input", out.shape()).with([&x, &out]), [launch]);
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
        let out = self.unset(raw.shape(), Format::F32);
        let memory = PrecondOutput {
            x: x.ptr(),
            raw: raw.ptr(),
            sigma: sigma.ptr(),
            gain: self.params.exact(out_gain),
            out: out.ptr(),
            ..Zeroable::zeroed()
        };
        let launch = precond::precond_output(self.precision, raw.shape(), x.shape()[0], sigma_data, memory);
        self.go(Operation::new("precond_output", out.shape()).with([&x, &raw, &out]), [launch]);
        out
    }

    fn embed(&mut self, p: &Embed, sigma: &Tensor, labels: Option<&Tensor>) -> Embedding<Tensor> {
        let layers = self.embed_layers(p);
        let n = sigma.shape()[0];
        if layers.noise_channels > embedding::MAX_FEATURES {
            self.unsupported(format!("{} noise channels, at most {}", layers.noise_channels, embedding::MAX_FEATURES));
        }
        let mut vector = |channels| self.unset([n, 1, 1, channels], Format::F32);
        let features = vector(layers.noise_channels);
        let [pre, emb] = [0; 2].map(|_| vector(layers.emb_channels));
        if self.failed.is_none() {
            let memory = EmbedParams {
                sigma: sigma.ptr(),
                freqs: self.params.exact(p.freqs),
                phases: self.params.exact(p.phases),
                noise: self.params.effective(p.noise),
                label: p.label.map(|w| self.params.effective(w)).unwrap_or_default(),
                labels: DevicePtr::of(labels),
                features: features.ptr(),
                pre: pre.ptr(),
                emb: emb.ptr(),
                ..Zeroable::zeroed()
            };
            let label_rows = labels.map_or(0, |labels| labels.shape()[0]);
            let launch = embedding::embed(self.precision, n, &layers, label_rows, memory);
            self.go(Operation::new("embed", emb.shape()).bytes(self.embed_bytes(p)), [launch]);
        }
        Embedding { features, pre, emb }
    }

    fn emb_scales(&mut self, layers: &[EmbLayer], emb: &Tensor) -> Tensor {
        let n = emb.shape()[0];
        let out = self.unset([n, 1, 1, layers.iter().map(|layer| layer.channels).sum()], Format::F32);
        let Some((table, tiles)) = self.scale_table(layers) else { return out };
        let memory = EmbScales {
            tiles,
            weights: self.params.all_effective(),
            exact: self.params.all_exact(),
            emb: emb.ptr(),
            out: out.ptr(),
            ..Zeroable::zeroed()
        };
        let launch = embedding::emb_scales(self.precision, n, &table, memory);
        let weights = layers.iter().map(|layer| self.params.effective_bytes(layer.weight)).sum();
        let work = Operation::new("emb_scales", out.shape()).sums(emb.shape()[3]);
        self.go(work.bytes(weights).with([&out]), [launch]);
        out
    }

    fn logvar(&mut self, p: &Logvar, sigma: &Tensor) -> (Tensor, Tensor) {
        let (n, channels) = (sigma.shape()[0], self.params.dims(p.weight)[1]);
        let features = self.unset([n, 1, 1, channels], Format::F32);
        let logvar = self.unset([n, 1, 1, 1], Format::F32);
        let memory = structs::Logvar {
            sigma: sigma.ptr(),
            freqs: self.params.exact(p.freqs),
            phases: self.params.exact(p.phases),
            weight: self.params.effective(p.weight),
            features: features.ptr(),
            logvar: logvar.ptr(),
            ..Zeroable::zeroed()
        };
        let launch = precond::logvar(self.precision, n, channels, memory);
        self.go(Operation::new("logvar", logvar.shape()).with([&features]), [launch]);
        (features, logvar)
    }

    fn pixel_norm(&mut self, x: &Tensor, down: bool) -> Tensor {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        let shape = if down { [n, h / 2, w / 2, c] } else { [n, h, w, c] };
        if !self.normable(c) {
            return self.unset(shape, Format::Half);
        }
        let name = if down { "pixel_norm_down" } else { "pixel_norm" };
        let p = self.precision;
        self.with_active((name, shape), &x, |y, silu| {
            pixelwise::pixel_norm(p, shape, down, PixelNorm { x: x.ptr(), y, silu, ..Zeroable::zeroed() })
        })
    }

    fn dropout(&mut self, x: &Tensor, masks: &Masks<Tensor>, layer: u32, factor: f64) -> Tensor {
        let (x, shape) = (self.half(x), x.shape());
        let out = self.unset(shape, Format::Half);
        let memory = Dropout {
            x: x.ptr(),
            out: out.ptr(),
            keys: masks.keys.ptr(),
            layer,
            threshold: masks.threshold(),
            factor: factor as f32,
            ..Zeroable::zeroed()
        };
        let launch = pixelwise::dropout(self.precision, shape, memory);
        self.go(Operation::new("dropout", shape).with([&x, &masks.keys, &out]), [launch]);
        out
    }

    fn upsample(&mut self, x: &Tensor) -> Tensor {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        let (p, shape) = (self.precision, [n, 2 * h, 2 * w, c]);
        self.with_active(("upsample", shape), &x, |y, silu| {
            pixelwise::upsample(p, x.shape(), Upsample { from: x.ptr(), y, silu, ..Zeroable::zeroed() })
        })
    }

    fn conv(&mut self, w: ParamId, x: Operand<Tensor>) -> Tensor {
        let format = match self.params.heads(w) {
            0 => Format::Half,
            heads => Format::Qkv { heads },
        };
        let (y, active) = self.activation(self.output_shape(w, &x), format);
        self.fprop(w, &x, Epilogue::Gain(1.0), (&y, active), []);
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
        let y = self.unset(shape, Format::Half);
        let pre = keep.then(|| self.unset(shape, Format::Half));
        let epilogue = Epilogue::ScaleSilu { scale: self.scales(&scale), pre: pre.as_ref().map(Tensor::ptr) };
        self.fprop(w, &x, epilogue, (&y, None), &pre);
        (y, pre)
    }

    fn conv_mp_sum(&mut self, w: ParamId, x: Operand<Tensor>, residual: &Tensor, t: f64, clip: Option<f64>) -> Tensor {
        let residual = self.half(residual);
        let (y, active) = self.activation(residual.shape(), Format::Half);
        let epilogue = mp_sum(MainPath::Tensor(residual.ptr()), t, clip);
        self.fprop(w, &x, epilogue, (&y, active), [&residual]);
        y
    }

    fn convs_mp_sum(
        &mut self,
        w: ParamId,
        x: Operand<Tensor>,
        (main, of): (ParamId, Operand<Tensor>),
        t: f64,
        clip: Option<f64>,
    ) -> Tensor {
        if mp_sum_weights(t).0 == 0.0 {
            // With wa = 0 nothing of the main path is left, so the sums cannot be divided by its factor.
            let main = self.conv(main, of);
            return self.conv_mp_sum(w, x, &main, t, clip);
        }
        let (y, active) = self.activation(self.output_shape(w, &x), Format::Half);
        self.fprop_onto(w, &x, (main, &of), |main| mp_sum(main, t, clip), (&y, active));
        y
    }

    fn attention(&mut self, qkv: &Tensor, heads: usize) -> Tensor {
        let [n, h, w, c] = qkv.shape();
        let qkv = self.reordered(qkv, heads);
        let out = self.unset([n, h, w, c / 3], Format::Half);
        let attention = Attention::new(n, h * w, heads, c / 3 / heads, self.precision);
        let launch = attention.map(|attention| [attention.forward(qkv.ptr(), out.ptr())]);
        self.go_if(Operation::new("attention", out.shape()).sums(2 * h * w).with([&qkv, &out]), launch);
        out
    }
}
