//! Launches of `kernels/attention.cu`: attention and its gradient, with the pixel norm of q, k and v.
//!
//! Channels of `qkv` are in the kernels' order: all of q, then k, then v, each by head (see [`row_of`]).

use super::launch::{DevicePtr, Launch, Precision, int};
use super::structs::AttentionParams;
use super::tables::attention::{FORWARD, GRAD_KV, GRAD_Q, QUERIES, RESIDENT, SPLIT};
use bytemuck::Zeroable;

/// Instances of a kernel: channels of a head, warps of a block, blocks of a multiprocessor.
type Instances = [[usize; 3]];

/// Whether a kernel has an instance for each head size, and each instance's blocks can be launched.
const fn complete(kernel: &Instances) -> bool {
    let (mut size, mut found) = (0, 0);
    while size < SPLIT.len() {
        let mut line = 0;
        while line < kernel.len() && kernel[line][0] != SPLIT[size][0] {
            line += 1;
        }
        found += (line < kernel.len() && kernel[line][1] <= 32) as usize;
        size += 1;
    }
    found == SPLIT.len()
}
const _: () = assert!(complete(&FORWARD) && complete(&SPLIT) && complete(&GRAD_Q) && complete(&GRAD_KV));

/// With fewer blocks than this, some multiprocessors would have none, so the forward pass splits the keys among the
/// warps of a block.
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
        if !SPLIT.iter().any(|&[size, ..]| size == head_size) {
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

    /// Warps of the smallest block that holds all tokens, `rows` for each warp, or of the largest there is.
    fn warps(&self, kernel: &Instances, rows: usize) -> usize {
        let of_size = || kernel.iter().filter(|[size, ..]| *size == self.head_size).map(|&[_, warps, _]| warps);
        of_size().find(|warps| self.tokens <= warps * rows).or(of_size().next_back()).expect("asserted of all kernels")
    }

    /// Writes `out` [images, tokens, heads * head_size] from `qkv` [images, tokens, 3 * heads * head_size].
    pub fn forward(&self, qkv: DevicePtr, out: DevicePtr) -> Launch {
        let params = AttentionParams { qkv, out, ..Zeroable::zeroed() };
        let warp_rows = if self.head_size == 128 { 16 } else { 32 };
        if self.images * self.heads * self.tokens.div_ceil(6 * warp_rows) < FEW_BLOCKS {
            let warps = self.warps(&SPLIT, warp_rows);
            let slots = warps * warp_rows * self.head_size * 4;
            let shared = slots + warp_rows * self.row() + warps * warp_rows * 4;
            return self.launch("forward_split", warps, warp_rows, shared, params);
        }
        let warps = self.warps(&FORWARD, warp_rows);
        let rows = warps * warp_rows;
        self.launch(&format!("forward_{warps}"), warps, rows, self.stages(2, rows * self.row()), params)
    }

    /// Writes `out`, the gradient of `qkv` and of its shape, from `grad_out` of the shape of the result; `sums` has
    /// [`Attention::scratch_bytes`]. The launches run in this order.
    pub fn backward(&self, memory: AttentionParams) -> [Launch; 2] {
        let [q_warps, kv_warps] = [self.warps(&GRAD_Q, 16), self.warps(&GRAD_KV, 16)];
        let [q_rows, kv_rows] = [16 * q_warps, 16 * kv_warps];
        let shared = self.stages(RESIDENT, 2 * q_rows * self.row());
        let stage = 2 * QUERIES * self.row() + QUERIES * 8;
        let kv_shared = stage + stage.max(2 * kv_rows * self.row());
        [
            self.launch(&format!("grad_q_{q_warps}"), q_warps, q_rows, shared, memory),
            self.launch("grad_kv", kv_warps, kv_rows, kv_shared, memory),
        ]
    }

    /// Bytes of a token's q.
    fn row(&self) -> usize {
        2 * self.head_size
    }

    /// Bytes of shared memory for at most `most` tiles of keys and values, and for `own` bytes behind the first of
    /// them.
    fn stages(&self, most: usize, own: usize) -> usize {
        let keys = if self.head_size == 128 { 48 } else { 96 };
        let stage = 2 * keys * self.row();
        stage + own.max((self.tokens.div_ceil(keys).min(most) - 1) * stage)
    }

    /// A launch of blocks of `rows` tokens.
    fn launch(&self, kernel: &str, warps: usize, rows: usize, shared: usize, memory: AttentionParams) -> Launch {
        let kernel = format!("attention_{kernel}_{}_c{}", self.precision.name(), self.head_size);
        let params = AttentionParams { tokens: int(self.tokens), heads: int(self.heads), ..memory };
        Launch::new(kernel, [self.tokens.div_ceil(rows), self.heads, self.images], warps * 32, shared, &params)
    }
}

/// Where row `row` of the official qkv weight, `(head * head_size + i) * 3 + {0 q, 1 k, 2 v}`, goes in the
/// kernels' order, `({q,k,v} * heads + head) * head_size + i`.
pub fn row_of(row: usize, heads: usize, head_size: usize) -> usize {
    row % 3 * heads * head_size + row / 3
}

/// The row of the official weight that lies at row `at` of the kernels' order: the inverse of [`row_of`].
pub fn row_at(at: usize, heads: usize, head_size: usize) -> usize {
    at % (heads * head_size) * 3 + at / (heads * head_size)
}
