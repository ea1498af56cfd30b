//! The table of an autoencoder's layers: names and shapes in its file, checked before anything is
//! loaded; networks refer to them by id.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::CodecError;
use crate::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};
use crate::formats::safetensors::SafeFile;

/// GroupNorm's groups, of every SD-VAE.
pub const GROUPS: usize = 32;
/// GroupNorm's eps, of every SD-VAE.
const EPS: f64 = 1e-6;

/// A convolution of a [`Layers`] table.
#[derive(Clone, Copy, Debug)]
pub struct ConvId(usize);

/// A group norm of a [`Layers`] table.
#[derive(Clone, Copy, Debug)]
pub struct NormId(usize);

/// A convolution.
pub struct ConvSpec {
    /// Names without `.weight` and `.bias`. Layers of several names are computed as one, with their channels one after
    /// the other.
    names: Vec<String>,
    cin: usize,
    /// Output channels of each name.
    cout: usize,
    bias: bool,
    reach: Reach,
}

/// A group norm.
pub struct NormSpec {
    name: String,
    channels: usize,
}

/// The layers of an encoder or a decoder.
#[derive(Default)]
pub struct Layers {
    convs: Vec<ConvSpec>,
    norms: Vec<NormSpec>,
}

impl Layers {
    /// A convolution with bias.
    pub fn conv(&mut self, name: impl Into<String>, cin: usize, cout: usize, reach: Reach) -> ConvId {
        self.push(ConvSpec { names: vec![name.into()], cin, cout, bias: true, reach })
    }

    /// A convolution without bias.
    pub fn unbiased(&mut self, name: impl Into<String>, cin: usize, cout: usize, reach: Reach) -> ConvId {
        self.push(ConvSpec { names: vec![name.into()], cin, cout, bias: false, reach })
    }

    /// Several linear layers with the same input, as one 1x1 convolution.
    pub fn linear(&mut self, names: Vec<String>, cin: usize, cout: usize) -> ConvId {
        self.push(ConvSpec { names, cin, cout, bias: true, reach: Reach::Point })
    }

    /// A group norm.
    pub fn norm(&mut self, name: impl Into<String>, channels: usize) -> NormId {
        self.norms.push(NormSpec { name: name.into(), channels });
        NormId(self.norms.len() - 1)
    }

    fn push(&mut self, spec: ConvSpec) -> ConvId {
        self.convs.push(spec);
        ConvId(self.convs.len() - 1)
    }

    /// Number of convolutions.
    pub fn len(&self) -> usize {
        self.convs.len()
    }

    /// Names and shapes of all tensors. Linear layers are 1x1 convolutions here.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        for spec in &self.convs {
            let side = spec.reach.side();
            for name in &spec.names {
                all.push((format!("{name}.weight"), vec![spec.cout, spec.cin, side, side]));
                if spec.bias {
                    all.push((format!("{name}.bias"), vec![spec.cout]));
                }
            }
        }
        for NormSpec { name, channels } in &self.norms {
            all.extend(["weight", "bias"].map(|part| (format!("{name}.{part}"), vec![*channels])));
        }
        all
    }

    /// Multiply-adds for each pixel of the result of a convolution.
    pub fn macs(&self, ConvId(id): ConvId) -> u64 {
        let ConvSpec { names, cin, cout, reach, .. } = &self.convs[id];
        (names.len() * cout * reach.window().summands(*cin)) as u64
    }

    /// Output channels of a convolution.
    pub fn cout(&self, ConvId(id): ConvId) -> usize {
        self.convs[id].cout * self.convs[id].names.len()
    }

    /// Takes all weights to a device; `get` gives the values of a tensor.
    pub fn load<B: CodecBackend>(
        &self,
        b: &mut B,
        get: &mut dyn FnMut(&str) -> Result<Vec<f32>, CodecError>,
    ) -> Result<Weights<B>, CodecError> {
        let mut join = |names: &[String], part: &str| -> Result<Vec<f32>, CodecError> {
            let mut parts = names.iter().map(|name| get(&format!("{name}.{part}")));
            // With one name, which nearly all have, nothing is copied.
            let mut all = parts.next().unwrap_or(Ok(Vec::new()))?;
            for part in parts {
                all.append(&mut part?);
            }
            Ok(all)
        };
        static LOADED: AtomicUsize = AtomicUsize::new(0);
        let plan = CodecPlan(LOADED.fetch_add(1, Ordering::Relaxed));
        let mut weights = Weights { plan, convs: Vec::new(), norms: Vec::new() };
        for spec in &self.convs {
            let weight = join(&spec.names, "weight")?;
            let bias = if spec.bias { Some(join(&spec.names, "bias")?) } else { None };
            weights.convs.push(b.load_conv(spec.reach, spec.cin, &weight, bias.as_deref()));
        }
        for NormSpec { name, channels } in &self.norms {
            let name = std::slice::from_ref(name);
            let affine = [join(name, "weight")?, join(name, "bias")?].concat();
            weights.norms.push(b.upload([1, 1, 2, *channels], &affine));
        }
        Ok(weights)
    }

    /// Takes all weights from a file that [`check`] has passed.
    pub fn load_file<B: CodecBackend>(&self, b: &mut B, file: &SafeFile) -> Result<Weights<B>, CodecError> {
        self.load(b, &mut |name| Ok(file.finite_f32(name)?))
    }
}

/// Checks that a file holds the tensors of these tables and no others; `network` says in an error what the
/// file is taken for.
pub fn check(file: &SafeFile, tables: &[&Layers], network: &str) -> Result<(), CodecError> {
    let mut known = std::collections::HashSet::new();
    for (name, expected) in tables.iter().flat_map(|table| table.tensors()) {
        // A linear layer may be stored as such.
        if !(expected.ends_with(&[1, 1]) && file.shape(&name)? == &expected[..2]) {
            file.expect_shape(&name, &expected)?;
        }
        known.insert(name);
    }
    match file.names().find(|name| !known.contains(*name)) {
        None => Ok(()),
        Some(name) => {
            Err(CodecError::Extra { path: file.path().into(), name: name.into(), network: network.to_owned() })
        }
    }
}

/// The plan of a codec, by the number of the weights that were loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodecPlan(usize);

/// The weights of a [`Layers`] table on a device.
pub struct Weights<B: CodecBackend> {
    /// The plan of what is done with these weights.
    pub plan: CodecPlan,
    convs: Vec<B::Conv>,
    norms: Vec<B::Tensor>,
}

impl<B: CodecBackend> Weights<B> {
    /// A convolution of x.
    pub fn conv(
        &self,
        b: &mut B,
        ConvId(id): ConvId,
        x: &B::Tensor,
        prologue: Prologue<B::Tensor>,
        epilogue: Epilogue<B::Tensor>,
    ) -> B::Tensor {
        b.convolve(&self.convs[id], x, prologue, epilogue)
    }

    /// A convolution of x as it is, with nothing after it.
    pub fn conv_alone(&self, b: &mut B, id: ConvId, x: &B::Tensor) -> B::Tensor {
        self.conv(b, id, x, Prologue::Nothing, Epilogue::NOTHING)
    }

    /// Scale and shift of a group norm of x.
    pub fn norm(&self, b: &mut B, NormId(id): NormId, x: &B::Tensor) -> B::Tensor {
        b.group_norm(x, &self.norms[id], GROUPS, EPS)
    }

    /// A convolution of silu(group norm of x).
    pub fn norm_silu_conv(
        &self,
        b: &mut B,
        norm: NormId,
        conv: ConvId,
        x: &B::Tensor,
        epilogue: Epilogue<B::Tensor>,
    ) -> B::Tensor {
        let affine = self.norm(b, norm, x);
        self.conv(b, conv, x, Prologue::AffineSilu(&affine), epilogue)
    }
}

/// How many numbered names `{before}{i}{after}` a file has, from 0 without a gap.
pub fn count(file: &SafeFile, before: &str, after: &str) -> usize {
    let numbers: Range<usize> = 0..file.names().count();
    numbers.take_while(|i| file.contains(&format!("{before}{i}{after}"))).count()
}
