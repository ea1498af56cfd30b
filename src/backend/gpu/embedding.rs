//! Launches of `kernels/embedding.cu`: the embedding of noise level and label, the scales of all blocks,
//! and their gradients.
//!
//! Per-image vectors are f32 `[n, channels]` without padding. Effective weights are 16 bits and their
//! gradients f32, rows padded by zeros to a multiple of 8 values, as in [`weights`](super::weights).

use super::launch::{DevicePtr, Launch, Precision};
use super::structs::{EmbScales, EmbScalesBackward, EmbedBackward, EmbedParams, ScaleTile};
use super::tables::embedding::{CHUNK, EMBED_ROWS, EMBED_WARPS, IMAGES, TILE};
use super::weights::Effective;
use crate::backend::Embedding;
use crate::params::mp_sum_weights;

/// The most Fourier features that fit: a block reads the weight once for several images, whose features may take 48 KB.
pub const MAX_FEATURES: usize = (48 << 10) / 4 / IMAGES;

// ---- embed ------------------------------------------------------------------------------------------

/// The embedding's parameters on the device.
#[derive(Clone, Copy, Debug)]
pub struct EmbedLayers {
    /// Frequencies `[noise_channels]`, f32.
    pub freqs: DevicePtr,
    /// Phases `[noise_channels]`, f32.
    pub phases: DevicePtr,
    /// Effective weight [emb_channels, noise_channels].
    pub noise: DevicePtr,
    /// That of the labels, unless unconditional.
    pub label: Option<LabelLayer>,
    /// Fourier features, at most [`MAX_FEATURES`].
    pub noise_channels: usize,
    /// Channels of the embedding.
    pub emb_channels: usize,
}

/// The label's layer.
#[derive(Clone, Copy, Debug)]
pub struct LabelLayer {
    /// Effective weight [emb_channels, channels].
    pub weight: DevicePtr,
    /// Values of a label.
    pub channels: usize,
    /// Weight of the label in the `mp_sum`.
    pub balance: f64,
}

impl EmbedLayers {
    /// Factors of the two products: wa and wb sqrt(label_dim).
    fn factors(&self) -> (f32, f32) {
        let Some(label) = self.label else { return (1.0, 0.0) };
        let (wa, wb) = mp_sum_weights(label.balance);
        (wa as f32, (wb * (label.channels as f64).sqrt()) as f32)
    }
}

/// Writes `to` from the noise levels `sigma` `[n]` and `labels` [rows, channels]. Where there are fewer rows than noise
/// levels, they are taken in turn. Labels of [`DevicePtr::NULL`] are zeros.
pub fn embed(
    p: Precision,
    n: usize,
    layers: &EmbedLayers,
    sigma: DevicePtr,
    (labels, label_rows): (DevicePtr, usize),
    to: &Embedding<DevicePtr>,
) -> Launch {
    let shared = layers.noise_channels.next_multiple_of(4) * IMAGES * 4;
    assert!(layers.noise_channels <= MAX_FEATURES, "{} noise channels", layers.noise_channels);
    let (noise_factor, label_factor) = layers.factors();
    let (label, labels, label_channels) = match layers.label {
        Some(label) => (label.weight, labels, label.channels),
        None => (DevicePtr::NULL, DevicePtr::NULL, 0),
    };
    let params = EmbedParams {
        sigma,
        freqs: layers.freqs,
        phases: layers.phases,
        noise: layers.noise,
        label,
        labels,
        features: to.features,
        pre: to.pre,
        emb: to.emb,
        images: n as i32,
        noise_channels: layers.noise_channels as i32,
        label_channels: label_channels as i32,
        emb_channels: layers.emb_channels as i32,
        noise_factor,
        label_factor,
        label_rows: label_rows.max(1) as i32,
        padding: 0,
    };
    let grid = [layers.emb_channels.div_ceil(EMBED_ROWS * EMBED_WARPS) as u32, n.div_ceil(IMAGES) as u32, 1];
    Launch::new(p.pick(["embed_f16", "embed_bf16"]), grid, 128, shared as u32, &params)
}

/// Adds the gradients of the layers' weights to `grad_noise` and, unless `labels` is null, to
/// `grad_label`, from what [`embed`] wrote, its `labels`, and the gradient of its `emb`.
pub fn embed_backward(
    n: usize,
    layers: &EmbedLayers,
    e: &Embedding<DevicePtr>,
    labels: DevicePtr,
    grad_emb: DevicePtr,
    grad_noise: DevicePtr,
    grad_label: DevicePtr,
) -> Launch {
    let (noise_factor, label_factor) = layers.factors();
    let label_channels = layers.label.filter(|_| labels != DevicePtr::NULL).map_or(0, |label| label.channels);
    let noise_chunks = layers.noise_channels.div_ceil(CHUNK);
    let params = EmbedBackward {
        grad_emb,
        pre: e.pre,
        features: e.features,
        labels,
        grad_noise,
        grad_label,
        images: n as i32,
        noise_channels: layers.noise_channels as i32,
        label_channels: label_channels as i32,
        emb_channels: layers.emb_channels as i32,
        noise_factor,
        label_factor,
        noise_chunks: noise_chunks as i32,
        padding: 0,
    };
    let chunks = noise_chunks + label_channels.div_ceil(CHUNK);
    Launch::new("embed_backward", [layers.emb_channels.div_ceil(TILE) as u32, chunks as u32, 1], 128, 0, &params)
}

// ---- emb_scales -------------------------------------------------------------------------------------

/// Where one `emb_linear` layer lies; all positions count values.
#[derive(Clone, Copy, Debug)]
pub struct ScaleLayer {
    /// First value of its weight [channels, emb_channels] among the effective weights, a multiple of 8.
    pub weight: usize,
    /// And in the arena of gradients, a multiple of 8.
    pub grad: usize,
    /// Its gain among the exact values.
    pub gain: usize,
    /// And the gain's gradient in the arena of gradients.
    pub gain_grad: usize,
    /// Where its channels begin in the joint product.
    pub offset: usize,
    /// Output channels.
    pub channels: usize,
}

/// All `emb_linear` layers, cut into tiles.
#[derive(Clone, Debug)]
pub struct ScaleTable {
    tiles: Vec<ScaleTile>,
    emb_channels: usize,
    channels: usize,
}

impl ScaleTable {
    /// The table of these layers, each with `emb_channels` input channels.
    pub fn new(emb_channels: usize, layers: &[ScaleLayer]) -> Self {
        let stride = emb_channels.next_multiple_of(8);
        let tiles = layers.iter().flat_map(|layer| {
            assert!(layer.weight.is_multiple_of(8) && layer.grad.is_multiple_of(8), "an unaligned layer: {layer:?}");
            (0..layer.channels).step_by(TILE).map(move |row| ScaleTile {
                weight: (layer.weight + row * stride) as i64,
                grad: (layer.grad + row * stride) as i64,
                gain: layer.gain as i64,
                gain_grad: layer.gain_grad as i64,
                channel: (layer.offset + row) as i32,
                rows: TILE.min(layer.channels - row) as i32,
                layer_tiles: if row == 0 { layer.channels.div_ceil(TILE) as i32 } else { 0 },
                padding: 0,
            })
        });
        Self { tiles: tiles.collect(), emb_channels, channels: layers.iter().map(|l| l.channels).sum() }
    }

    /// To be uploaded; its address is what the launches call `tiles`.
    pub fn tiles(&self) -> &[ScaleTile] {
        &self.tiles
    }

    /// Output channels of all layers.
    pub fn channels(&self) -> usize {
        self.channels
    }

    fn chunks(&self) -> usize {
        self.emb_channels.div_ceil(CHUNK)
    }

    /// Into how many parts the sum over rows is cut, so that there are some 512 blocks.
    fn splits(&self, n: usize) -> usize {
        512usize.div_ceil(self.chunks() * n.div_ceil(IMAGES)).min(self.tiles.len())
    }

    /// Bytes of scratch memory of [`emb_scales_backward`] for `n` images.
    pub fn scratch(&self, n: usize) -> usize {
        self.gain_sums() + self.splits(n) * n * self.emb_channels.next_multiple_of(4) * 4
    }

    /// Bytes of its first part.
    fn gain_sums(&self) -> usize {
        (self.tiles.len() * self.chunks() * 4).next_multiple_of(16)
    }
}

/// `out` [n, all channels] = gain (W emb) + 1 of all layers; `emb` is [n, emb_channels].
pub fn emb_scales(
    p: Precision,
    n: usize,
    table: &ScaleTable,
    tiles: DevicePtr,
    effective: Effective,
    emb: DevicePtr,
    out: DevicePtr,
) -> Launch {
    let params = EmbScales {
        tiles,
        weights: effective.weights,
        exact: effective.exact,
        emb,
        out,
        images: n as i32,
        emb_channels: table.emb_channels as i32,
        channels: table.channels as i32,
        padding: 0,
    };
    let grid = [table.tiles.len() as u32, n.div_ceil(IMAGES) as u32, 1];
    Launch::new(p.pick(["emb_scales_f16", "emb_scales_bf16"]), grid, 256, 0, &params)
}

/// Gradients of all layers and gains, and of the embedding. `memory` has the addresses; its `gain_sums` is that of
/// [`ScaleTable::scratch`] bytes. The sizes, and the addresses within the scratch memory, are filled in here.
pub fn emb_scales_backward(p: Precision, n: usize, table: &ScaleTable, memory: EmbScalesBackward) -> [Launch; 3] {
    let (count, chunks, splits) = (table.tiles.len(), table.chunks(), table.splits(n));
    let vectors = table.emb_channels.div_ceil(4);
    let params = EmbScalesBackward {
        partial: memory.gain_sums.offset(table.gain_sums()),
        images: n as i32,
        emb_channels: table.emb_channels as i32,
        channels: table.channels as i32,
        count: count as i32,
        chunks: chunks as i32,
        vectors: vectors as i32,
        splits: splits as i32,
        ..memory
    };
    let wgrad = p.pick(["emb_scales_wgrad_f16", "emb_scales_wgrad_bf16"]);
    let dgrad = p.pick(["emb_scales_dgrad_f16", "emb_scales_dgrad_bf16"]);
    [
        Launch::new(wgrad, [count as u32, chunks as u32, 1], 128, 0, &params),
        Launch::new(dgrad, [splits as u32, chunks as u32, n.div_ceil(IMAGES) as u32], 128, 0, &params),
        Launch::over("emb_scales_reduce", count.max(n * vectors), 128, &params),
    ]
}
