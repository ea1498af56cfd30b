//! The operations of autoencoders, as launches. A device that runs them owns no network.

use super::super::codec::{
    bytes, bytes_words, convolve, group_norm, group_norm_scratch, normalise, pack, question, self_attention,
};
use super::super::runtime::PARAMETERS;
use super::super::structs::{CodecConv, CodecNorm};
use super::super::tensor::padded;
use super::*;
use crate::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};

/// A convolution's weight and bias on the device.
pub struct Conv {
    reach: Reach,
    cin: usize,
    cout: usize,
    /// `[phases][cout][taps][cin]`, 16 bits.
    weight: Tensor,
    /// `[cout]`, padded.
    bias: Tensor,
}

/// What a device knows of the autoencoders that it loaded: the bytes of their weights. The weights themselves are in
/// `Conv`s.
#[derive(Default)]
pub struct Loaded {
    bytes: usize,
}

impl Gpu<Loaded> {
    /// A device for codecs, which has no network's parameters.
    pub fn for_codec(runtime: Rc<dyn Runtime>, math: impl Into<Math>) -> Result<Self, DeviceError> {
        Self::new(runtime, math.into(), Loaded::default())
    }

    /// Bytes of device memory for the weights that were loaded.
    pub fn param_bytes(&self) -> usize {
        self.params.bytes
    }

    /// Weights of a codec.
    fn load(&mut self, bytes: &[u8]) -> Buffer {
        self.params.bytes += bytes.len();
        self.own_values(bytes, PARAMETERS)
    }

    /// What a convolution reads: its input through `prologue`.
    fn normalised(&mut self, x: &Tensor, prologue: Prologue<Tensor>) -> Tensor {
        let affine = match prologue {
            Prologue::Affine(affine) | Prologue::AffineSilu(affine) => affine.ptr(),
            Prologue::Nothing | Prologue::SoftClip => DevicePtr::NULL,
        };
        let prologue = match prologue {
            Prologue::Nothing => return x.clone(),
            Prologue::Affine(_) => Prologue::Affine(&affine),
            Prologue::AffineSilu(_) => Prologue::AffineSilu(&affine),
            Prologue::SoftClip => Prologue::SoftClip,
        };
        let y = self.unset(x.shape(), Format::Half);
        let launch = normalise(self.precision, x.shape(), x.ptr(), prologue, y.ptr());
        self.go_if(Operation::new("codec_normalise", x.shape()).with([x, &y]), launch);
        y
    }
}

impl CodecBackend for Gpu<Loaded> {
    type Conv = Conv;

    fn load_conv(&mut self, reach: Reach, cin: usize, weight: &[f32], bias: Option<&[f32]>) -> Conv {
        let cout = weight.len() / (cin * reach.side() * reach.side());
        let bits = pack(self.precision, reach, cin, weight);
        let buffer = self.load(bytemuck::cast_slice(&bits));
        let weight = Tensor::new([1, 1, 1, bits.len()], Format::Half, None, buffer);
        let mut values = bias.map_or(vec![0.0; cout], <[f32]>::to_vec);
        values.resize(padded(cout), 0.0);
        let buffer = self.load(bytemuck::cast_slice(&values));
        let bias = Tensor::new([1, 1, 1, values.len()], Format::F32, None, buffer);
        Conv { reach, cin, cout, weight, bias }
    }

    fn convolve(&mut self, conv: &Conv, x: &Tensor, prologue: Prologue<Tensor>, epilogue: Epilogue<Tensor>) -> Tensor {
        let Conv { reach, cin, cout, weight, bias } = conv;
        let x = self.half(x);
        let shape = reach.window().result(x.shape(), *cout);
        assert_eq!(x.shape()[3], *cin, "channels of a convolution's input");
        let x = self.normalised(&x, prologue);
        let residual = epilogue.residual.map(|residual| self.half(&residual));
        assert!(residual.as_ref().is_none_or(|r| r.shape() == shape), "shape of a residual");
        self.keep(&[weight, bias]);
        let from = DevicePtr::of(residual.as_ref());
        let (math, by) = (self.math, self.chooser.clone());
        let work =
            Operation::new("codec_conv", shape).sums(reach.window().summands(*cin)).with([&x, weight]).with(&residual);
        let work = work.of(question(math, by.card, *reach, x.shape(), *cout));
        let (y, held) = self.sum_into(residual, shape);
        let memory = CodecConv {
            x: x.ptr(),
            weight: weight.ptr(),
            bias: bias.ptr(),
            residual: from,
            y: y.ptr(),
            relu: epilogue.relu.into(),
            ..Zeroable::zeroed()
        };
        self.go_if(work.with([&y]), convolve(math, by, *reach, x.shape(), *cout, memory));
        drop(held);
        y
    }

    fn group_norm(&mut self, x: &Tensor, affine: &Tensor, groups: usize, eps: f64) -> Tensor {
        let (x, [n, _, _, c]) = (self.half(x), x.shape());
        let scales = self.unset([n, 1, 2, c], Format::F32);
        let scratch = self.scratch(group_norm_scratch(x.shape()));
        self.keep(&[affine]);
        let memory = CodecNorm {
            x: x.ptr(),
            affine: affine.ptr(),
            sums: scratch.ptr(),
            scales: scales.ptr(),
            ..Zeroable::zeroed()
        };
        let launches = group_norm(self.precision, x.shape(), groups, eps, memory);
        self.go_if(Operation::new("codec_group_norm", x.shape()).with([&x]), launches);
        scales
    }

    fn self_attention(&mut self, qkv: &Tensor) -> Tensor {
        let (qkv, [n, h, w, c]) = (self.half(qkv), qkv.shape());
        let out = self.unset([n, h, w, c / 3], Format::Half);
        let launch = self_attention(self.precision, out.shape(), qkv.ptr(), out.ptr());
        let work = Operation::new("codec_attention", out.shape()).sums(2 * h * w);
        self.go_if(work.with([&qkv, &out]), launch.map(|launch| [launch]));
        out
    }

    fn download_rgb(&mut self, x: &Tensor, stretch: [f32; 2]) -> Result<(Vec<u8>, bool), BackendError> {
        let (x, [n, h, w, c]) = (self.half(x), x.shape());
        assert_eq!(c, 3, "channels of a picture");
        let pixels = n * h * w;
        let [words, blocks] = bytes_words(pixels);
        let out = self.scratch(4 * (words + blocks));
        let launch = bytes(self.precision, pixels, x.ptr(), stretch, out.ptr());
        self.go(Operation::new("codec_bytes", x.shape()).with([&x, &out]), [launch]);
        self.check()?;
        let (memory, first) = out.memory().expect("nothing is downloaded while a plan is made");
        let mut rgb = vec![0; 4 * (words + blocks)];
        memory.read(first, &mut rgb)?;
        let finite = rgb[4 * words..].iter().all(|&x| x == 0);
        rgb.truncate(3 * pixels);
        Ok((rgb, finite))
    }

    /// Does nothing: a plan's tensors share one place, and outside of plans memory is freed with the last handle.
    fn trim(&mut self) {}
}
