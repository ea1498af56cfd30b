//! TAESD, the tiny autoencoder for Stable Diffusion's latents (Ollin Boer Bohan): previews at a twentieth of the
//! SD-VAE's cost. Width follows from the file.
//!
//! ```text
//! encoder  conv 3->c, block; three times: conv of stride 2 without bias, 3 blocks; conv c->4
//! decoder  3 tanh(x/3), conv 4->c, relu, 3 blocks; three times: enlarge by two, conv without bias, 3 blocks
//!          (the last time 1); conv c->3
//! block    y = relu(x + conv(relu(conv(relu(conv(x))))))
//! ```
//!
//! Its own images are in [0, 1], and its latents those of the SD-VAE times 0.18215; [`super`] deals with that.

use super::layers::{ConvId, Layers, Weights};
use super::sd_vae::LATENTS;
use crate::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};

const PIXELS: usize = 3;

/// Pixels of the image for one of the latent, in each direction.
pub const FACTOR: usize = 8;

struct Block([ConvId; 3]);

impl Block {
    fn new(t: &mut Layers, name: &str, c: usize) -> Self {
        Self([0, 2, 4].map(|i| t.conv(format!("{name}.conv.{i}"), c, c, Reach::Same)))
    }

    fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: B::Tensor) -> B::Tensor {
        let y = w.conv(b, self.0[0], &x, Prologue::Nothing, Epilogue::RELU);
        let y = w.conv(b, self.0[1], &y, Prologue::Nothing, Epilogue::RELU);
        w.conv(b, self.0[2], &y, Prologue::Nothing, Epilogue { residual: Some(x), relu: true })
    }
}

/// Blocks of one size after a convolution to that size.
struct Level {
    resize: ConvId,
    blocks: Vec<Block>,
}

impl Level {
    fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: &B::Tensor) -> B::Tensor {
        b.trim();
        let x = w.conv_alone(b, self.resize, x);
        self.blocks.iter().fold(x, |x, block| block.forward(b, w, x))
    }
}

/// Images to latents.
pub struct Encoder {
    conv_in: ConvId,
    first: Block,
    levels: Vec<Level>,
    conv_out: ConvId,
}

impl Encoder {
    /// The encoder of `c` channels, and its layers, named `prefix` and a number.
    pub fn new(prefix: &str, c: usize) -> (Self, Layers) {
        let mut t = Layers::default();
        let conv_in = t.conv(format!("{prefix}0"), PIXELS, c, Reach::Same);
        let first = Block::new(&mut t, &format!("{prefix}1"), c);
        let level = |i: usize| Level {
            resize: t.unbiased(format!("{prefix}{i}"), c, c, Reach::Halve),
            blocks: (1..4).map(|j| Block::new(&mut t, &format!("{prefix}{}", i + j), c)).collect(),
        };
        let levels = [2, 6, 10].map(level).into();
        let conv_out = t.conv(format!("{prefix}14"), c, LATENTS, Reach::Same);
        (Self { conv_in, first, levels, conv_out }, t)
    }

    /// Pixels [n, h, w, 3] with values v, which it sees as (v + 1) / 2, to latents [n, h/8, w/8, 4].
    pub fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, x: &B::Tensor) -> B::Tensor {
        let n = b.shape(x)[0];
        let half = b.upload([n, 1, 2, PIXELS], &vec![0.5; n * 2 * PIXELS]);
        let x = w.conv(b, self.conv_in, x, Prologue::Affine(&half), Epilogue::NOTHING);
        let x = self.first.forward(b, w, x);
        let x = self.levels.iter().fold(x, |x, level| level.forward(b, w, &x));
        let latents = w.conv_alone(b, self.conv_out, &x);
        b.trim();
        latents
    }
}

/// Latents to images.
pub struct Decoder {
    conv_in: ConvId,
    blocks: Vec<Block>,
    levels: Vec<Level>,
    conv_out: ConvId,
}

impl Decoder {
    /// The decoder of `c` channels, and its layers, named `prefix` and a number, that of the first one `first`.
    pub fn new(prefix: &str, first: usize, c: usize) -> (Self, Layers) {
        let mut t = Layers::default();
        let name = |i: usize| format!("{prefix}{}", first + i);
        let conv_in = t.conv(name(0), LATENTS, c, Reach::Same);
        let blocks = (2..5).map(|i| Block::new(&mut t, &name(i), c)).collect();
        let level = |(i, count): (usize, usize)| Level {
            resize: t.unbiased(name(i), c, c, Reach::Double),
            blocks: (1..=count).map(|j| Block::new(&mut t, &name(i + j), c)).collect(),
        };
        let levels = [(6, 3), (11, 3), (16, 1)].map(level).into();
        let conv_out = t.conv(name(18), c, PIXELS, Reach::Same);
        (Self { conv_in, blocks, levels, conv_out }, t)
    }

    /// Latents [n, h, w, 4] to pixels [n, 8 h, 8 w, 3] in [0, 1], about.
    pub fn forward<B: CodecBackend>(&self, b: &mut B, w: &Weights<B>, z: &B::Tensor) -> B::Tensor {
        let x = w.conv(b, self.conv_in, z, Prologue::SoftClip, Epilogue::RELU);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(b, w, x));
        let x = self.levels.iter().fold(x, |x, level| level.forward(b, w, &x));
        let image = w.conv_alone(b, self.conv_out, &x);
        drop(x);
        b.trim();
        image
    }

    /// Multiply-adds of decoding `pixels` latent pixels; of enlarged images those of the original's pixels.
    pub fn macs(&self, t: &Layers, mut pixels: u64) -> u64 {
        let blocks = |blocks: &[Block]| -> u64 { blocks.iter().flat_map(|block| block.0).map(|id| t.macs(id)).sum() };
        let mut macs = (t.macs(self.conv_in) + blocks(&self.blocks)) * pixels;
        for level in &self.levels {
            pixels *= 4;
            macs += (t.macs(level.resize) + blocks(&level.blocks)) * pixels;
        }
        macs + t.macs(self.conv_out) * pixels
    }
}
