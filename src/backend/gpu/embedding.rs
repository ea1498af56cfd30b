//! Launches of `kernels/embedding.cu`: the embedding of noise level and label, the scales of all blocks,
//! and their gradients.
//!
//! Per-image vectors are f32 `[n, channels]` without padding. Effective weights are 16 bits and their
//! gradients f32, rows padded by zeros to a multiple of 8 values, as in [`weights`](super::weights).

use super::launch::{DevicePtr, Launch, Precision, int};
use super::structs::{EmbScales, EmbScalesBackward, EmbedBackward, EmbedParams, ScaleTile};
use super::tables::embedding::{CHUNK, EMBED_ROWS, EMBED_WARPS, IMAGES, TILE};
use crate::params::mp_sum_weights;

/// The most Fourier features that fit: a block reads the weight once for several images, whose features may take 48 KB.
pub const MAX_FEATURES: usize = (48 << 10) / 4 / IMAGES;

// ---- embed ------------------------------------------------------------------------------------------

/// The sizes of the embedding's layers.
#[derive(Clone, Copy, Debug)]
pub struct EmbedLayers {
    /// Fourier features, at most [`MAX_FEATURES`].
    pub noise_channels: usize,
    /// The label's layer, unless unconditional.
    pub label: Option<LabelLayer>,
    /// Channels of the embedding.
    pub emb_channels: usize,
}

/// The label's layer.
#[derive(Clone, Copy, Debug)]
pub struct LabelLayer {
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

/// Writes `features`, `pre` and `emb` from the noise levels `sigma` `[n]` and `labels` [label_rows, channels]. Where there
/// are fewer rows than noise levels, they are taken in turn. Labels of [`DevicePtr::NULL`] are zeros.
pub fn embed(p: Precision, n: usize, layers: &EmbedLayers, label_rows: usize, memory: EmbedParams) -> Launch {
    let shared = layers.noise_channels.next_multiple_of(4) * IMAGES * 4;
    assert!(layers.noise_channels <= MAX_FEATURES, "{} noise channels", layers.noise_channels);
    let (noise_factor, label_factor) = layers.factors();
    let params = EmbedParams {
        labels: layers.label.map_or(DevicePtr::NULL, |_| memory.labels),
        images: int(n),
        noise_channels: int(layers.noise_channels),
        label_channels: int(layers.label.map_or(0, |label| label.channels)),
        emb_channels: int(layers.emb_channels),
        noise_factor,
        label_factor,
        label_rows: int(label_rows.max(1)),
        ..memory
    };
    let grid = [layers.emb_channels.div_ceil(EMBED_ROWS * EMBED_WARPS), n.div_ceil(IMAGES), 1];
    Launch::new(p.pick(["embed_f16", "embed_bf16"]), grid, 128, shared, &params)
}

/// Adds the gradients of the layers' weights to `grad_noise` and, unless `labels` is null, to
/// `grad_label`, from what [`embed`] wrote, its `labels`, and the gradient of its `emb`.
pub fn embed_backward(n: usize, layers: &EmbedLayers, memory: EmbedBackward) -> Launch {
    let (noise_factor, label_factor) = layers.factors();
    let label_channels = layers.label.filter(|_| memory.labels != DevicePtr::NULL).map_or(0, |label| label.channels);
    let noise_chunks = layers.noise_channels.div_ceil(CHUNK);
    let params = EmbedBackward {
        images: int(n),
        noise_channels: int(layers.noise_channels),
        label_channels: int(label_channels),
        emb_channels: int(layers.emb_channels),
        noise_factor,
        label_factor,
        noise_chunks: int(noise_chunks),
        ..memory
    };
    let chunks = noise_chunks + label_channels.div_ceil(CHUNK);
    Launch::new("embed_backward", [layers.emb_channels.div_ceil(TILE), chunks, 1], 128, 0, &params)
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
                weight: int(layer.weight + row * stride),
                grad: int(layer.grad + row * stride),
                gain: int(layer.gain),
                gain_grad: int(layer.gain_grad),
                channel: int(layer.offset + row),
                rows: int(TILE.min(layer.channels - row)),
                layer_tiles: if row == 0 { int(layer.channels.div_ceil(TILE)) } else { 0 },
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
pub fn emb_scales(p: Precision, n: usize, table: &ScaleTable, memory: EmbScales) -> Launch {
    let params =
        EmbScales { images: int(n), emb_channels: int(table.emb_channels), channels: int(table.channels), ..memory };
    let grid = [table.tiles.len(), n.div_ceil(IMAGES), 1];
    Launch::new(p.pick(["emb_scales_f16", "emb_scales_bf16"]), grid, 256, 0, &params)
}

/// Gradients of all layers and gains, and of the embedding. `gain_sums` is of [`ScaleTable::scratch`] bytes, of which a part
/// becomes `partial`.
pub fn emb_scales_backward(p: Precision, n: usize, table: &ScaleTable, memory: EmbScalesBackward) -> [Launch; 3] {
    let (count, chunks, splits) = (table.tiles.len(), table.chunks(), table.splits(n));
    let vectors = table.emb_channels.div_ceil(4);
    let params = EmbScalesBackward {
        partial: memory.gain_sums.offset(table.gain_sums()),
        images: int(n),
        emb_channels: int(table.emb_channels),
        channels: int(table.channels),
        count: int(count),
        chunks: int(chunks),
        vectors: int(vectors),
        splits: int(splits),
        ..memory
    };
    let wgrad = p.pick(["emb_scales_wgrad_f16", "emb_scales_wgrad_bf16"]);
    let dgrad = p.pick(["emb_scales_dgrad_f16", "emb_scales_dgrad_bf16"]);
    [
        Launch::new(wgrad, [count, chunks, 1], 128, 0, &params),
        Launch::new(dgrad, [splits, chunks, n.div_ceil(IMAGES)], 128, 0, &params),
        Launch::over("emb_scales_reduce", count.max(n * vectors), 128, &params),
    ]
}
