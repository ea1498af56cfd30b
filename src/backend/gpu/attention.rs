//! Launches of `kernels/attention.cu`: attention and its gradient, with the pixel norm of q, k and v.
//!
//! Channels of `qkv` are in the kernels' order: all of q, then k, then v, each by head (see [`row_of`]).

use super::launch::{DevicePtr, Launch, Precision};
use bytemuck::{Pod, Zeroable};

/// `struct AttentionParams` of the kernels.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    qkv: DevicePtr,
    grad_out: DevicePtr,
    out: DevicePtr,
    sums: DevicePtr,
    tokens: i32,
    heads: i32,
}
const _: () = assert!(size_of::<Params>() == 40);

const THREADS: u32 = 128;
/// Rows of a block; `kRows`.
const ROWS: usize = 64;
/// Rows of a streamed tile; `kStream`.
const STREAM: usize = 32;

/// Sizes for which there are kernels.
const HEAD_SIZES: [usize; 4] = [16, 32, 64, 128];

macro_rules! names {
    ($operation:literal) => {
        [names!($operation, "16"), names!($operation, "32"), names!($operation, "64"), names!($operation, "128")]
    };
    ($operation:literal, $c:literal) => {
        [concat!("attention_", $operation, "_f16_c", $c), concat!("attention_", $operation, "_bf16_c", $c)]
    };
}
const FORWARD: [[&str; 2]; 4] = names!("forward");
const GRAD_Q: [[&str; 2]; 4] = names!("grad_q");
const GRAD_KV: [[&str; 2]; 4] = names!("grad_kv");

/// A shape that the kernels do not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttentionError {
    /// No kernel for heads of this size.
    #[error("attention: heads of {0} channels, expected 16, 32, 64 or 128")]
    HeadSize(usize),
    /// A count beyond a launch's limits.
    #[error("attention: {found} {what}, expected 1 to {most}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// The most that a launch takes.
        most: usize,
    },
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
        self.launch(FORWARD, 1, 4, 0, self.params(qkv, DevicePtr::NULL, out, DevicePtr::NULL))
    }

    /// Writes `grad_qkv`, of the shape of `qkv`, from `grad` of the shape of the result; `scratch` has
    /// [`Attention::scratch_bytes`]. The launches run in this order.
    pub fn backward(&self, qkv: DevicePtr, grad: DevicePtr, grad_qkv: DevicePtr, scratch: DevicePtr) -> [Launch; 2] {
        let params = self.params(qkv, grad, grad_qkv, scratch);
        [self.launch(GRAD_Q, 2, 4, ROWS * 4, params), self.launch(GRAD_KV, 2, 4, 2 * STREAM * 8 + 2 * ROWS * 4, params)]
    }

    fn params(&self, qkv: DevicePtr, grad_out: DevicePtr, out: DevicePtr, sums: DevicePtr) -> Params {
        Params { qkv, grad_out, out, sums, tokens: self.tokens as i32, heads: self.heads as i32 }
    }

    /// A launch with shared memory for `own` tiles of a block's rows, `streamed` of the other side, and
    /// `extra` bytes.
    fn launch(
        &self,
        names: [[&'static str; 2]; 4],
        own: usize,
        streamed: usize,
        extra: usize,
        params: Params,
    ) -> Launch {
        let kernel = self.precision.pick(names[self.head_size.ilog2() as usize - 4]);
        let shared = (own * ROWS + streamed * STREAM) * self.head_size * 2 + extra;
        let grid = [self.tokens.div_ceil(ROWS) as u32, self.heads as u32, self.images as u32];
        Launch::new(kernel, grid, THREADS, shared as u32, &params)
    }
}

/// Where row `row` of the official qkv weight, `(head * head_size + i) * 3 + {0 q, 1 k, 2 v}`, goes in the
/// kernels' order, `({q,k,v} * heads + head) * head_size + i`.
pub fn row_of(row: usize, heads: usize, head_size: usize) -> usize {
    row % 3 * heads * head_size + row / 3
}
