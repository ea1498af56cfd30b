//! Kernel launches as values: what the typed functions beside this file make, a plan records, and a
//! device runs. A kernel takes one argument, the params struct of its family.
//!
//! A function that needs more than two addresses takes them in that struct, by their names. It calls the struct `memory`, and
//! fills in the sizes, for which its callers leave zeros.

use std::borrow::Cow;

use crate::backend::DeviceError;
pub use crate::backend::memory::DevicePtr;
use bytemuck::NoUninit;

/// A size as kernels and the driver take it.
///
/// # Panics
/// If the type does not hold it; shapes are checked before.
pub(super) fn int<T: TryFrom<usize>>(x: usize) -> T {
    T::try_from(x).ok().expect("checked against the kernels' limits")
}

/// The 16-bit type of activations and effective weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE half: 11 significant bits, up to 65504
    F16,
    /// bfloat16: 8 significant bits, the range of f32
    Bf16,
}

impl Precision {
    /// The one of a kernel's two instances, [f16, bf16].
    pub fn pick(self, kernels: [&'static str; 2]) -> &'static str {
        kernels[self as usize]
    }

    /// As it stands in the names of kernels.
    pub fn name(self) -> &'static str {
        self.pick(["f16", "bf16"])
    }
}

/// What kernels and their tiles are chosen by, besides shapes: the properties of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Multiprocessors.
    pub sms: usize,
    /// Compute capability: 89 is 8.9.
    pub capability: u32,
    /// Whether its tensor cores take twice the time for f32 sums: GeForce's do, those of most other cards of the same compute
    /// capability (RTX 6000, L40S) do not.
    pub halves_f32_sums: bool,
    /// Bytes of shared memory of a multiprocessor.
    pub shared: usize,
}

impl Card {
    /// A card of this compute capability: a GeForce if there are any.
    pub const fn new(sms: usize, capability: u32) -> Self {
        let shared = match capability {
            80 | 87 => 164 << 10,
            90..=119 => 228 << 10,
            _ => 100 << 10,
        };
        Self { sms, capability, halves_f32_sums: matches!(capability, 86 | 89 | 120), shared }
    }
}

/// The type in which convolutions sum their products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Accum {
    /// f32
    F32,
    /// The 64 products of a step in f16, the steps in f32: twice the rate on GeForce cards. With bf16 it is f32
    F16x2,
}

impl Accum {
    /// The faster one on a card.
    pub fn fastest(card: Card) -> Self {
        if card.halves_f32_sums { Self::F16x2 } else { Self::F32 }
    }
}

/// The loop that convolutions are computed by, where channels are multiples of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum ConvLoop {
    /// mma.sync, on every card
    Mma,
    /// Bulk copies and wgmma, on Hopper (H100, H200) alone; sums in f32
    Wgmma,
}

impl ConvLoop {
    /// The faster one on a card, of those that this program was compiled for.
    pub fn fastest(card: Card) -> Self {
        if card.capability == 90 && super::HAS_HOPPER { Self::Wgmma } else { Self::Mma }
    }
}

/// How the network is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Math {
    /// The type of activations and effective weights.
    pub precision: Precision,
    /// The type of sums in convolutions; none: the fastest on the card.
    pub accum: Option<Accum>,
    /// The loop of convolutions; none: the fastest on the card.
    pub conv_loop: Option<ConvLoop>,
}

impl Default for Math {
    /// f16, with the sums and the loop that are the fastest on the card.
    fn default() -> Self {
        Precision::F16.into()
    }
}

impl From<Precision> for Math {
    fn from(precision: Precision) -> Self {
        Self { precision, accum: None, conv_loop: None }
    }
}

impl Math {
    /// The loop of convolutions on a card.
    pub fn conv_loop(self, card: Card) -> ConvLoop {
        self.conv_loop.unwrap_or(ConvLoop::fastest(card))
    }

    /// For people: the types, and the loop if it is not the one for every card.
    pub fn describe(self, card: Card) -> String {
        let conv_loop = if self.conv_loop(card) == ConvLoop::Wgmma { ", wgmma" } else { "" };
        match self.name(card) {
            "f16x2" => format!("f16, sums in two levels{conv_loop}"),
            name => format!("{name}{conv_loop}"),
        }
    }

    /// As it stands in the names of convolution kernels, on a card.
    pub fn name(self, card: Card) -> &'static str {
        match (self.precision, self.accum.unwrap_or(Accum::fastest(card))) {
            (Precision::F16, Accum::F16x2) => "f16x2",
            (precision, _) => precision.name(),
        }
    }
}

/// One launch, complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Name of the kernel.
    pub kernel: Cow<'static, str>,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Blocks of a cluster, which follow each other along x and run together; 1: no clusters.
    pub cluster: u32,
    params: Box<[u8]>,
    /// Tensor maps in the params struct: where each lies, and what it says.
    maps: Vec<(usize, TensorMapSpec)>,
}

impl Launch {
    /// A launch whose kernel takes `params`.
    pub fn new<P: NoUninit>(
        kernel: impl Into<Cow<'static, str>>,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: &P,
    ) -> Self {
        Self::with_maps(kernel, grid, block, shared, bytemuck::bytes_of(params).into(), vec![])
    }

    /// A launch whose params struct has tensor maps in it: at each of these offsets.
    pub fn with_maps(
        kernel: impl Into<Cow<'static, str>>,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: Vec<u8>,
        maps: Vec<(usize, TensorMapSpec)>,
    ) -> Self {
        let (grid, block, shared) = (grid.map(int), int(block), int(shared));
        Self { kernel: kernel.into(), grid, block, shared, cluster: 1, params: params.into(), maps }
    }

    /// The same launch in clusters of `blocks` blocks along x, at most 8, of which the grid's are a multiple. Cards older
    /// than compute capability 9.0 refuse more than 1.
    pub fn in_clusters_of(self, blocks: usize) -> Self {
        Self { cluster: int(blocks), ..self }
    }

    /// One thread for each of `items`, in blocks of `block`.
    pub fn over<P: NoUninit>(kernel: &'static str, items: usize, block: usize, params: &P) -> Self {
        Self::new(kernel, [items.div_ceil(block), 1, 1], block, 0, params)
    }

    /// Bytes of the params struct.
    pub fn params_len(&self) -> usize {
        self.params.len()
    }

    /// The bytes of the params struct, with tensor maps as `encode` makes them.
    pub fn params(
        &self,
        encode: impl Fn(&TensorMapSpec) -> Result<TensorMap, DeviceError>,
    ) -> Result<Cow<'_, [u8]>, DeviceError> {
        let mut params = Cow::Borrowed(&*self.params);
        for (at, spec) in &self.maps {
            let map = encode(spec)?;
            params.to_mut()[*at..*at + size_of::<TensorMap>()].copy_from_slice(bytemuck::bytes_of(&map));
        }
        Ok(params)
    }
}

/// How a bulk copy of a Hopper kernel finds its tile (`TensorMap` of kernels/hopper.cuh): opaque, made by
/// [`Runtime::tensor_map`](super::runtime::Runtime::tensor_map) for the device's own kernels, part of a params struct.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct TensorMap(pub(super) [u8; 128]);

/// What a [`TensorMap`] says. Tiles in shared memory have rows of 128 bytes, 64 elements, whose 16-byte chunks are
/// swizzled; what lies outside the tensor is zeros.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorMapSpec {
    /// Boxes of 64 columns of a matrix, for `tma_load_2d`.
    Tiled {
        /// The first element, aligned to 16 bytes.
        at: DevicePtr,
        /// Of its elements.
        precision: Precision,
        /// Columns and rows.
        size: [u32; 2],
        /// Bytes from row to row, a multiple of 16.
        stride: u64,
        /// Columns and rows of a box: 64, and at most 256.
        tile: [u32; 2],
    },
    /// Pixels of a batch of images, 64 channels of each, for `tma_load_im2col`.
    Im2col {
        /// The first element, aligned to 16 bytes.
        at: DevicePtr,
        /// Of its elements.
        precision: Precision,
        /// Channels, width, height, images.
        size: [u32; 4],
        /// Bytes from pixel to pixel, row to row, image to image; multiples of 16.
        strides: [u64; 3],
        /// First base of pixels along width and height.
        lower: [i32; 2],
        /// Last base, from the last pixel: -1 and -1 for a 3x3 convolution, 0 and 0 for 1x1.
        upper: [i32; 2],
        /// Channels per pixel: 64.
        channels: u32,
        /// Pixels per column, which are the rows of the tile: at most 1024.
        pixels: u32,
    },
}

impl TensorMapSpec {
    /// Refuses what the driver refuses, and tiles that are not 128 bytes wide.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let (at, size, strides, tile, most) = match self {
            Self::Tiled { at, size, stride, tile, .. } => (at, &size[..], std::slice::from_ref(stride), *tile, 256),
            Self::Im2col { at, size, strides, channels, pixels, .. } => {
                (at, &size[..], &strides[..], [*channels, *pixels], 1024)
            }
        };
        let wrong = |what: String| Err(DeviceError::Unavailable(format!("tensor map: {what} in {self:?}")));
        if at.0 == 0 || at.0 % 16 != 0 {
            return wrong("the address is null or no multiple of 16".into());
        }
        if size.contains(&0) {
            return wrong("a size is 0".into());
        }
        if strides.iter().any(|&s| s == 0 || s % 16 != 0 || s >= 1 << 40) {
            return wrong("a stride is no multiple of 16 from 16 to 2^40 - 16".into());
        }
        if tile[0] != 64 || tile[1] == 0 || tile[1] > most {
            return wrong(format!("a tile of {} elements by {}, expected 64 by 1 to {most}", tile[0], tile[1]));
        }
        if let Self::Im2col { size, lower, upper, .. } = self {
            for i in 0..2 {
                let last = i64::from(size[1 + i]) - 1 + i64::from(upper[i]);
                if [lower[i], upper[i]].iter().any(|corner| !(-128..128).contains(corner)) || last < i64::from(lower[i])
                {
                    return wrong("the bounding box is empty, or a corner is not in -128..128".into());
                }
            }
        }
        Ok(())
    }
}
