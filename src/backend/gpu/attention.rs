//! Launches of `kernels/attention.cu`: attention and its gradient, with the pixel norm of q, k and v.
//!
//! Channels of `qkv` are in the kernels' order: all of q, then k, then v, each by head (see [`row_of`]).

use super::launch::{DevicePtr, Launch, Precision};
use super::structs::AttentionParams;

/// Sizes for which there are kernels.
const HEAD_SIZES: [usize; 4] = [16, 32, 64, 128];

/// A kernel in both precisions and for each head size.
type Names = [[&'static str; 2]; 4];

macro_rules! names {
    ($operation:literal) => {
        [names!($operation, "16"), names!($operation, "32"), names!($operation, "64"), names!($operation, "128")]
    };
    ($operation:literal, $c:literal) => {
        [concat!("attention_", $operation, "_f16_c", $c), concat!("attention_", $operation, "_bf16_c", $c)]
    };
}
const FORWARD_3: Names = names!("forward_3");
const FORWARD_6: Names = names!("forward_6");
const FORWARD_SPLIT: Names = names!("forward_split");
const GRAD_Q_6: Names = names!("grad_q_6");
const GRAD_Q: Names = names!("grad_q");
const GRAD_KV: Names = names!("grad_kv");

/// Warps of a block of `forward_split`; `kSplitWarps`.
const SPLIT_WARPS: usize = 11;
/// Tiles that `grad_q` keeps; `kResident`.
const RESIDENT: usize = 4;
/// Rows of a block, and of a streamed tile, of `grad_kv`; `kQueries`.
const KV_ROWS: usize = 96;
const KV_STREAM: usize = 48;
/// With fewer blocks than this the forward pass splits the keys among warps: a multiprocessor for each.
const FEW_BLOCKS: usize = 128;

/// A shape that the kernels do not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum AttentionError {
    /// No kernel for heads of this size.
    #[error("attention: heads of {0} channels, expected 16, 32, 64 or 128")]
    HeadSize(usize),
    /// A count beyond a launch's limits.
    #[error("attention: {found} {what}, expected 1 to {most}")]
    Count { what: &'static str, found: usize, most: usize },
}

/// The shape of one attention layer's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    images: usize,
    tokens: usize,
    heads: usize,
    head_size: usize,
    precision: Precision,
}

impl Attention {
    /// For `images` of `tokens` pixels, whose `qkv` has `3 * heads * head_size` channels.
    pub fn new(
        images: usize,
        tokens: usize,
        heads: usize,
        head_size: usize,
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        if !HEAD_SIZES.contains(&head_size) {
            return Err(AttentionError::HeadSize(head_size));
        }
        for (what, found, most) in [("images", images, 65535), ("heads", heads, 65535), ("tokens", tokens, 1 << 24)] {
            if !(1..=most).contains(&found) {
                return Err(AttentionError::Count { what, found, most });
            }
        }
        Ok(Self { images, tokens, heads, head_size, precision })
    }

    /// Bytes of the scratch memory of [`Attention::backward`].
    pub fn scratch_bytes(&self) -> usize {
        self.images * self.heads * self.tokens * 8
    }

    /// Writes `out` [images, tokens, heads * head_size] from `qkv` [images, tokens, 3 * heads * head_size].
    pub fn forward(&self, qkv: DevicePtr, out: DevicePtr) -> Launch {
        let params = self.params(qkv, DevicePtr::NULL, out, DevicePtr::NULL);
        let warp_rows = if self.head_size == 128 { 16 } else { 32 };
        if self.images * self.heads * self.tokens.div_ceil(6 * warp_rows) < FEW_BLOCKS {
            let slots = SPLIT_WARPS * warp_rows * self.head_size * 4;
            let shared = slots + warp_rows * self.row() + SPLIT_WARPS * warp_rows * 4;
            return self.launch(FORWARD_SPLIT, SPLIT_WARPS, warp_rows, shared, params);
        }
        let (names, warps) = if self.tokens <= 3 * warp_rows { (FORWARD_3, 3) } else { (FORWARD_6, 6) };
        let rows = warps * warp_rows;
        self.launch(names, warps, rows, self.stages(2, rows * self.row()), params)
    }

    /// Writes `grad_qkv`, of the shape of `qkv`, from `grad` of the shape of the result; `scratch` has
    /// [`Attention::scratch_bytes`]. The launches run in this order.
    pub fn backward(&self, qkv: DevicePtr, grad: DevicePtr, grad_qkv: DevicePtr, scratch: DevicePtr) -> [Launch; 2] {
        let params = self.params(qkv, grad, grad_qkv, scratch);
        let few = self.tokens <= 96 || self.head_size == 128;
        let (names, warps) = if few { (GRAD_Q_6, 6) } else { (GRAD_Q, 12) };
        let rows = warps * 16;
        let shared = self.stages(RESIDENT, 2 * rows * self.row());
        let stage = 2 * KV_STREAM * self.row() + KV_STREAM * 8;
        [
            self.launch(names, warps, rows, shared, params),
            self.launch(GRAD_KV, 6, KV_ROWS, stage + stage.max(2 * KV_ROWS * self.row()), params),
        ]
    }

    fn params(&self, qkv: DevicePtr, grad_out: DevicePtr, out: DevicePtr, sums: DevicePtr) -> AttentionParams {
        AttentionParams { qkv, grad_out, out, sums, tokens: self.tokens as i32, heads: self.heads as i32 }
    }

    /// Bytes of a token's q.
    fn row(&self) -> usize {
        2 * self.head_size
    }

    /// Shared memory for at most `most` tiles of keys and values, and for `own` bytes behind the first of them.
    fn stages(&self, most: usize, own: usize) -> usize {
        let keys = if self.head_size == 128 { 48 } else { 96 };
        let stage = 2 * keys * self.row();
        stage + own.max((self.tokens.div_ceil(keys).min(most) - 1) * stage)
    }

    /// A launch of blocks of `rows` tokens.
    fn launch(&self, names: Names, warps: usize, rows: usize, shared: usize, params: AttentionParams) -> Launch {
        let kernel = self.precision.pick(names[self.head_size.ilog2() as usize - 4]);
        let grid = [self.tokens.div_ceil(rows) as u32, self.heads as u32, self.images as u32];
        Launch::new(kernel, grid, warps as u32 * 32, shared as u32, &params)
    }
}

/// Where row `row` of the official qkv weight, `(head * head_size + i) * 3 + {0 q, 1 k, 2 v}`, goes in the
/// kernels' order, `({q,k,v} * heads + head) * head_size + i`.
pub fn row_of(row: usize, heads: usize, head_size: usize) -> usize {
    row % 3 * heads * head_size + row / 3
}
