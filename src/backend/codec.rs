//! The operations of which the codecs ([`crate::codec`]) are made, one kernel each.
//!
//! Their networks are ordinary ones: convolutions with biases, group norms, SiLU or ReLU. So their
//! weights are used as stored; a device holds them in whatever layout its convolution reads.

use super::{Backend, BackendError, Shape};

/// Where a convolution reads, and how large its result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// 1x1.
    Point,
    /// 3x3, zeros around the image.
    Same,
    /// 3x3 on the image enlarged by two (nearest neighbour), zeros around that: twice the size.
    Double,
    /// 3x3 with stride 2, zeros right and below only: half the size, which must be even.
    Down,
    /// 3x3 with stride 2, zeros around: half the size, which must be even.
    Halve,
}

impl Reach {
    /// Taps of the kernel in each direction.
    pub fn side(self) -> usize {
        if self == Self::Point { 1 } else { 3 }
    }

    /// That of a kernel of 9 or 1 taps which keeps the size.
    pub fn of_taps(taps: usize) -> Self {
        if taps == 1 { Self::Point } else { Self::Same }
    }

    /// How it is computed.
    pub fn window(self) -> Window {
        let window = |side, stride, scale, before| Window { side, stride, scale, before };
        match self {
            Self::Point => window(1, 1, 1, 0),
            Self::Same => window(3, 1, 1, 1),
            Self::Double => window(2, 1, 2, 1),
            Self::Down => window(3, 2, 1, 0),
            Self::Halve => window(3, 2, 1, 1),
        }
    }
}

/// The pixels that a result sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Taps in each direction.
    pub side: usize,
    /// Pixels from one result to the next in each direction; height and width are multiples of it.
    pub stride: usize,
    /// How many results there are for one pixel in each direction; each has a kernel of its own.
    pub scale: usize,
    /// How many pixels above and to the left of the image the first tap of its first result lies.
    pub before: usize,
}

impl Window {
    /// Shape of the result: `cout` channels for an input of `shape`.
    pub fn result(self, [n, h, w, _]: Shape, cout: usize) -> Shape {
        [n, h / self.stride * self.scale, w / self.stride * self.scale, cout]
    }

    /// Products that a value of the result sums.
    pub fn summands(self, cin: usize) -> usize {
        self.side * self.side * cin
    }

    /// The tap that tap `t` of the given kernel falls on, for the results in half `p` of an enlarged pixel.
    pub fn tap(self, t: usize, p: usize) -> usize {
        if self.scale == 1 { t } else { (t + 1 - p) / 2 }
    }
}

/// What happens to the input of a convolution as it is read. The zeros around the image stay zeros.
#[derive(Debug)]
pub enum Prologue<'a, T> {
    /// Nothing.
    Nothing,
    /// x * scale + shift, with scale and shift of each image and channel: [n, 1, 2, c].
    Affine(&'a T),
    /// silu(x * scale + shift).
    AffineSilu(&'a T),
    /// 3 tanh(x / 3).
    SoftClip,
}

impl<T> Clone for Prologue<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Prologue<'_, T> {}

/// What happens to the result of a convolution and its bias: residual + y, then max(0, y).
#[derive(Debug)]
pub struct Epilogue<T> {
    /// What is added to y. The result may be written over it.
    pub residual: Option<T>,
    /// Whether negative values become zero.
    pub relu: bool,
}

impl<T> Epilogue<T> {
    /// Nothing.
    pub const NOTHING: Self = Self { residual: None, relu: false };
    /// max(0, y).
    pub const RELU: Self = Self { residual: None, relu: true };

    /// residual + y.
    pub fn add(residual: T) -> Self {
        Self { residual: Some(residual), relu: false }
    }
}

/// A device that runs codecs.
pub trait CodecBackend: Backend {
    /// A kernel with its bias on the device.
    type Conv;

    /// Takes a kernel [cout, cin, side, side] and a bias `[cout]` (none = zeros), both in PyTorch's order.
    fn load_conv(&mut self, reach: Reach, cin: usize, weight: &[f32], bias: Option<&[f32]>) -> Self::Conv;
    /// A convolution of x [n, h, w, cin].
    fn convolve(
        &mut self,
        conv: &Self::Conv,
        x: &Self::Tensor,
        prologue: Prologue<Self::Tensor>,
        epilogue: Epilogue<Self::Tensor>,
    ) -> Self::Tensor;
    /// Group norm, as a scale and a shift for each image and channel, [n, 1, 2, c]. They make the mean over the image
    /// and the group's channels 0 and the variance (plus eps) 1, and then apply the weight and the bias in `affine`
    /// [1, 1, 2, c].
    fn group_norm(&mut self, x: &Self::Tensor, affine: &Self::Tensor, groups: usize, eps: f64) -> Self::Tensor;
    /// Self-attention over the pixels with one head: softmax(q k / sqrt(c)) v, [n, h, w, c]. `qkv` is [n, h, w, 3 c]:
    /// q, k, v one after the other. The scores of all pixels with all others are never held at once.
    fn self_attention(&mut self, qkv: &Self::Tensor) -> Self::Tensor;
    /// Waits for the device and copies an image [n, h, w, 3] to the host in 8 bits: trunc(255 clamp(scale x + shift, 0,
    /// 1)), and 0 for NaN. Also says whether all of x is finite. The scale must be a power of two, so that its product
    /// is exact.
    ///
    /// # Errors
    /// The device's.
    fn download_rgb(&mut self, x: &Self::Tensor, [scale, shift]: [f32; 2]) -> Result<(Vec<u8>, bool), BackendError> {
        let values = self.download(x)?;
        // The cast truncates, and makes 0 of a NaN.
        let rgb = values.iter().map(|x| ((x * scale + shift).clamp(0.0, 1.0) * 255.0) as u8).collect();
        Ok((rgb, values.iter().all(|x| x.is_finite())))
    }
    /// Gives the memory that no tensor holds back to the system. Call it when other sizes come from now on.
    fn trim(&mut self);
}
