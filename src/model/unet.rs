//! The EDM2 U-Net (config G; EDM2 figure 21 and appendix B), forward and backward.
//!
//! Shapes: x [n, h, w, c] with c = image channels + 1 (the channel of ones comes last), emb
//! [n, 1, 1, emb_channels]. The backward pass is written by hand beside each forward pass;
//! what it needs is kept on a tape of one entry per block.
//!
//! ```
//! use edm2k::model::config::preset;
//! use edm2k::model::unet::UNet;
//! use edm2k::model::{ConfigError, ParamTable};
//!
//! // Which parameters it has, and what a forward pass of 64x64 latents costs.
//! let mut table = ParamTable::default();
//! let unet = UNet::new(&mut table, "unet.", &preset("edm2-img512-xs")?.config);
//! assert!(table.find("unet.enc.64x64_conv.weight").is_some());
//! assert_eq!(unet.macs(&table, 64, 64) / 1_000_000_000, 44); // billions of multiply-adds
//! # Ok::<(), ConfigError>(())
//! ```

use serde::Deserialize;

use super::config::Config;
use crate::backend::{Done, EmbLayer, Masks, NetworkBackend, Operand, OperandGrad, Scale, TrainingBackend};
use crate::params::{Cat, ParamId, ParamTable, Whole, mp_cat_scales, mp_sum_weights};

/// Which side of the U-Net a block is on; in JSON under its official name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Flavor {
    /// Pixel norm on the main path, no concatenation.
    #[serde(rename = "enc")]
    Encoder,
    /// May concatenate a skip connection; no pixel norm.
    #[serde(rename = "dec")]
    Decoder,
}

/// Change of resolution at a block's entry; in JSON under its official name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resample {
    /// None.
    #[default]
    Keep,
    /// 2x2 average.
    Down,
    /// Nearest neighbour.
    Up,
}

/// Settings of one block.
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig {
    /// Side of the U-Net.
    pub flavor: Flavor,
    /// Change of resolution.
    pub resample: Resample,
    /// Channels of the input; of both inputs together if it concatenates.
    pub cin: usize,
    /// Channels of the output.
    pub cout: usize,
    /// Channels of the embedding.
    pub cemb: usize,
    /// Attention heads; 0 = no attention.
    pub heads: usize,
    /// Channels of the concatenated skip connection; 0 = none.
    pub cskip: usize,
    /// Weight of the skip connection in `mp_cat`.
    pub concat_balance: f64,
    /// Weight of the residual branch.
    pub res_balance: f64,
    /// Weight of the attention branch.
    pub attn_balance: f64,
    /// Activations are clipped to +- this.
    pub clip_act: f64,
}

impl BlockConfig {
    /// The concatenation at the block's entry.
    fn cat(&self) -> Option<Cat> {
        let (a, b) = (self.cin - self.cskip, self.cskip);
        (b > 0).then(|| Cat { split: a, scales: mp_cat_scales(a, b, self.concat_balance) })
    }
}

/// One encoder or decoder block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Official name within the U-Net, e.g. `enc.64x64_block0`.
    pub name: String,
    cfg: BlockConfig,
    conv_res0: ParamId,
    emb: EmbLayer,
    conv_res1: ParamId,
    conv_skip: Option<ParamId>,
    attn: Option<(ParamId, ParamId)>,
}

/// What a forward pass keeps for the backward pass, an entry for each block.
pub struct Tape<T> {
    masks: Option<Masks<T>>,
    /// In the order of the forward pass.
    pub blocks: Vec<BlockTape<T>>,
    ends: Option<Ends<T>>,
}

debug!(Tape<T> {} [T]);

impl<T> Tape<T> {
    /// An empty tape, for a pass in which these activations are dropped.
    pub fn new(masks: Option<Masks<T>>) -> Self {
        Self { masks, blocks: Vec::new(), ends: None }
    }
}

/// What the backward pass of a block needs.
pub struct BlockTape<T> {
    input: T,
    skip: Option<T>,
    /// Encoder with conv_skip: input of the pixel norm.
    normed_from: Option<T>,
    /// Start of the residual branch (after resampling and norm).
    x: T,
    /// Its values are zero where the activation was dropped.
    pre: T,
    act: T,
    masks: Option<Masks<T>>,
    /// After the residual sum.
    res: T,
    attn: Option<AttnTape<T>>,
}

debug!(BlockTape<T> {} [T]);

struct AttnTape<T> {
    qkv: T,
    y: T,
    out: T,
}

impl Block {
    /// Pushes the block's parameters under `prefix` (which ends in a dot, or is empty).
    pub fn new(table: &mut ParamTable, prefix: &str, name: &str, cfg: BlockConfig, emb_offset: &mut usize) -> Self {
        let res_in = if cfg.flavor == Flavor::Encoder { cfg.cout } else { cfg.cin };
        let gain = table.gain(format!("{prefix}emb_gain"));
        let conv_res0 = table.conv(format!("{prefix}conv_res0"), res_in, cfg.cout, 3);
        let emb_linear = table.linear(format!("{prefix}emb_linear"), cfg.cemb, cfg.cout);
        let conv_res1 = table.conv(format!("{prefix}conv_res1"), cfg.cout, cfg.cout, 3);
        let conv_skip = (cfg.cin != cfg.cout).then(|| {
            let name = format!("{prefix}conv_skip");
            match cfg.cat() {
                Some(cat) => table.conv_of_cat(name, cfg.cin, cfg.cout, 1, cat),
                None => table.conv(name, cfg.cin, cfg.cout, 1),
            }
        });
        let attn = (cfg.heads > 0).then(|| {
            let qkv = table.qkv(format!("{prefix}attn_qkv"), cfg.cout, cfg.heads);
            (qkv, table.conv(format!("{prefix}attn_proj"), cfg.cout, cfg.cout, 1))
        });
        let emb = EmbLayer { weight: emb_linear, gain, offset: *emb_offset, channels: cfg.cout };
        *emb_offset += cfg.cout;
        Self { name: name.into(), cfg, conv_res0, emb, conv_res1, conv_skip, attn }
    }

    /// The block's `emb_linear` layer.
    pub fn emb_layer(&self) -> EmbLayer {
        self.emb
    }

    /// The number that tells this block's dropout from that of the others.
    fn mask_layer(&self) -> u32 {
        self.emb.offset as u32
    }

    /// The (concatenated) input, as convolutions read it.
    fn operand<'a, T>(&self, x: &'a T, skip: Option<&'a T>, silu: bool) -> Operand<'a, T> {
        match (skip, self.cfg.cat()) {
            (Some(skip), Some(Cat { scales: (a, b), .. })) => Operand { x, x_scale: a, skip: Some((skip, b)), silu },
            _ => Operand { x, x_scale: 1.0, skip: None, silu },
        }
    }

    /// Output of the block for the input `x`, the skip connection that it concatenates, and the
    /// scales of all blocks. With `tape`, keeps there what the backward pass needs.
    pub fn forward<B: NetworkBackend>(
        &self,
        b: &mut B,
        input: &B::Tensor,
        skip: Option<&B::Tensor>,
        scales: &B::Tensor,
        tape: Option<&mut Tape<B::Tensor>>,
    ) -> B::Tensor {
        let cfg = &self.cfg;
        let mut normed_from = None;
        let x = match (cfg.flavor, cfg.resample) {
            (Flavor::Encoder, resample) => match self.conv_skip {
                None => b.pixel_norm(input, resample == Resample::Down),
                Some(w) => {
                    let wide = b.conv(w, Operand::of(input));
                    let x = b.pixel_norm(&wide, false);
                    normed_from = Some(wide);
                    x
                }
            },
            (Flavor::Decoder, Resample::Up) => b.upsample(input),
            (Flavor::Decoder, _) => input.clone(),
        };

        let scale = Scale { all: scales, offset: self.emb.offset };
        let (mut act, mut pre) = b.conv_scale_silu(self.conv_res0, self.operand(&x, skip, true), scale, tape.is_some());
        let masks = tape.as_ref().and_then(|tape| tape.masks.clone());
        if let (Some(masks), Some(pre)) = (&masks, &mut pre) {
            act = b.dropout(&act, masks, self.mask_layer(), masks.gain());
            *pre = b.dropout(pre, masks, self.mask_layer(), 1.0);
        }
        let clip = Some(cfg.clip_act);
        let res_clip = if self.attn.is_some() { None } else { clip };
        let (w, operand, t) = (self.conv_res1, Operand::of(&act), cfg.res_balance);
        let res = match (cfg.flavor, self.conv_skip) {
            (Flavor::Decoder, Some(main)) => {
                b.convs_mp_sum(w, operand, (main, self.operand(&x, skip, false)), t, res_clip)
            }
            _ => b.conv_mp_sum(w, operand, &x, t, res_clip),
        };

        let attn = self.attn.map(|(w_qkv, w_proj)| {
            let qkv = b.conv(w_qkv, Operand::of(&res));
            let y = b.attention(&qkv, cfg.heads);
            let out = b.conv_mp_sum(w_proj, Operand::of(&y), &res, cfg.attn_balance, clip);
            AttnTape { qkv, y, out }
        });
        let out = attn.as_ref().map_or(&res, |a| &a.out).clone();
        if let (Some(tape), Some(pre)) = (tape, pre) {
            let (input, skip) = (input.clone(), skip.cloned());
            tape.blocks.push(BlockTape { input, skip, normed_from, x, pre, act, masks, res, attn });
        }
        out
    }

    /// Gradients with respect to the input (plus `acc`, in the encoder) and the skip connection; those
    /// of the weights are accumulated, those of the scales written into `grad_scales`.
    pub fn backward<B: TrainingBackend>(
        &self,
        b: &mut B,
        tape: BlockTape<B::Tensor>,
        scales: &B::Tensor,
        grad: B::Tensor,
        grad_scales: &mut B::Tensor,
        acc: Option<B::Tensor>,
    ) -> OperandGrad<B::Tensor> {
        let cfg = &self.cfg;
        let BlockTape { input, skip, normed_from, x, pre, act, masks, res, attn } = tape;

        // d/d res, through attention.
        let grad = match (self.attn, attn) {
            (Some((w_qkv, w_proj)), Some(AttnTape { qkv, y, out })) => {
                let (wa, wb) = mp_sum_weights(cfg.attn_balance);
                let g = b.clip_backward(grad, &out, cfg.clip_act);
                b.conv_wgrad(w_proj, Operand::of(&y), &g, wb);
                let gy = b.conv_dgrad(w_proj, &g, wb, Operand::of(&y), None).x;
                let gqkv = b.attention_backward(&qkv, cfg.heads, &gy);
                b.conv_wgrad(w_qkv, Operand::of(&res), &gqkv, 1.0);
                let acc = OperandGrad { x: g, skip: None };
                b.conv_dgrad(w_qkv, &gqkv, 1.0, Operand::of(&res), Some((acc, wa))).x
            }
            _ => b.clip_backward(grad, &res, cfg.clip_act),
        };

        // d/d pre, through the second convolution.
        let (wa, wb) = mp_sum_weights(cfg.res_balance);
        let scale = Scale { all: scales, offset: self.emb.offset };
        b.conv_wgrad(self.conv_res1, Operand::of(&act), &grad, wb);
        let gain = wb * masks.as_ref().map_or(1.0, Masks::gain);
        let mut gpre = b.conv_dgrad_scale_silu(self.conv_res1, &grad, gain, &pre, scale, grad_scales);
        if let Some(masks) = &masks {
            // The gradient of the scales needs no mask: it has the factor `pre`, which is zero where the activation was
            // dropped.
            gpre = b.dropout(&gpre, masks, self.mask_layer(), 1.0);
        }
        drop((act, pre));

        // d/d x and skip, through both paths.
        let silu_in = self.operand(&x, skip.as_ref(), true);
        b.conv_wgrad(self.conv_res0, silu_in, &gpre, 1.0);
        let main = match (cfg.flavor, self.conv_skip) {
            (Flavor::Decoder, Some(w)) => {
                let operand = self.operand(&x, skip.as_ref(), false);
                b.conv_wgrad(w, operand, &grad, wa);
                (b.conv_dgrad(w, &grad, wa, operand, None), 1.0)
            }
            _ => (OperandGrad { x: grad, skip: None }, wa),
        };
        let g = b.conv_dgrad(self.conv_res0, &gpre, 1.0, silu_in, Some(main));

        // d/d input, through what comes before the residual branch.
        match (cfg.flavor, cfg.resample) {
            (Flavor::Encoder, resample) => {
                let x = match (self.conv_skip, normed_from) {
                    (Some(w), Some(wide)) => {
                        let gwide = b.pixel_norm_backward(&wide, &g.x, false, None);
                        b.conv_wgrad(w, Operand::of(&input), &gwide, 1.0);
                        let acc = acc.map(|x| (OperandGrad { x, skip: None }, 1.0));
                        b.conv_dgrad(w, &gwide, 1.0, Operand::of(&input), acc).x
                    }
                    _ => b.pixel_norm_backward(&input, &g.x, resample == Resample::Down, acc),
                };
                OperandGrad { x, skip: None }
            }
            (Flavor::Decoder, resample) => {
                let x = if resample == Resample::Up { b.upsample_backward(&g.x) } else { g.x };
                OperandGrad { x, skip: g.skip }
            }
        }
    }
}

/// The U-Net of a [`Config`].
#[derive(Clone, Debug)]
pub struct UNet {
    conv_in: ParamId,
    conv_in_name: String,
    encoder: Vec<Block>,
    decoder: Vec<Block>,
    conv_out: ParamId,
    emb_layers: Vec<EmbLayer>,
}

/// What the backward pass of a U-Net needs beside its blocks'.
struct Ends<T> {
    input: T,
    scales: T,
    last: T,
}

impl UNet {
    /// Pushes the parameters of the encoder, decoder and output under `prefix`.
    pub fn new(table: &mut ParamTable, prefix: &str, config: &Config) -> Self {
        let cemb = config.emb_channels();
        let mut emb_offset = 0;
        let base = BlockConfig {
            flavor: Flavor::Encoder,
            resample: Resample::Keep,
            cin: 0,
            cout: 0,
            cemb,
            heads: 0,
            cskip: 0,
            concat_balance: config.concat_balance,
            res_balance: config.res_balance,
            attn_balance: config.attn_balance,
            clip_act: config.clip_act,
        };
        let mut block = |table: &mut ParamTable, name: String, cfg: BlockConfig| {
            Block::new(table, &format!("{prefix}{name}."), &name, cfg, &mut emb_offset)
        };
        let heads = |attends: bool, channels: usize| if attends { channels / config.channels_per_head } else { 0 };
        let levels = config.level_channels();
        let attends = |res: usize| config.attn_resolutions.contains(&res);

        let mut encoder = Vec::new();
        let mut cout = levels[0];
        let conv_in_name = format!("enc.{0}x{0}_conv", config.img_resolution);
        let conv_in = table.conv(format!("{prefix}{conv_in_name}"), config.img_channels + 1, cout, 3);
        let mut skips = vec![cout];
        for (level, &channels) in levels.iter().enumerate() {
            let res = config.img_resolution >> level;
            if level > 0 {
                let cfg = BlockConfig { resample: Resample::Down, cin: cout, cout, ..base };
                encoder.push(block(table, format!("enc.{res}x{res}_down"), cfg));
                skips.push(cout);
            }
            for i in 0..config.num_blocks {
                let cfg = BlockConfig { cin: cout, cout: channels, heads: heads(attends(res), channels), ..base };
                encoder.push(block(table, format!("enc.{res}x{res}_block{i}"), cfg));
                cout = channels;
                skips.push(cout);
            }
        }

        let base = BlockConfig { flavor: Flavor::Decoder, ..base };
        let mut decoder = Vec::new();
        for (level, &channels) in levels.iter().enumerate().rev() {
            let res = config.img_resolution >> level;
            if level + 1 == levels.len() {
                let cfg = BlockConfig { cin: cout, cout, heads: heads(true, cout), ..base };
                decoder.push(block(table, format!("dec.{res}x{res}_in0"), cfg));
                decoder.push(block(table, format!("dec.{res}x{res}_in1"), BlockConfig { heads: 0, ..cfg }));
            } else {
                let cfg = BlockConfig { resample: Resample::Up, cin: cout, cout, ..base };
                decoder.push(block(table, format!("dec.{res}x{res}_up"), cfg));
            }
            for i in 0..=config.num_blocks {
                let cskip = skips.pop().expect("one skip connection for each decoder block");
                let heads = heads(attends(res), channels);
                let cfg = BlockConfig { cin: cout + cskip, cout: channels, cskip, heads, ..base };
                decoder.push(block(table, format!("dec.{res}x{res}_block{i}"), cfg));
                cout = channels;
            }
        }
        let conv_out = table.conv(format!("{prefix}out_conv"), cout, config.img_channels, 3);
        let emb_layers = encoder.iter().chain(&decoder).map(Block::emb_layer).collect();
        Self { conv_in, conv_in_name, encoder, decoder, conv_out, emb_layers }
    }

    /// All `emb_linear` layers, in the order of the blocks.
    pub fn emb_layers(&self) -> &[EmbLayer] {
        &self.emb_layers
    }

    /// Output before `out_gain`, [n, h, w, image channels], for the joint scales of all blocks. `probe` sees every
    /// module's output under its official name (`enc.64x64_conv`, ...). With `tape`, keeps there what the backward pass
    /// needs, and drops activations as its masks say.
    pub fn forward<B: NetworkBackend>(
        &self,
        b: &mut B,
        input: &B::Tensor,
        scales: &B::Tensor,
        mut tape: Option<&mut Tape<B::Tensor>>,
        probe: &mut dyn FnMut(&str, &B::Tensor),
    ) -> B::Tensor {
        let mut x = b.conv(self.conv_in, Operand::of(input));
        probe(&self.conv_in_name, &x);
        let mut skips = vec![x.clone()];
        for block in &self.encoder {
            x = block.forward(b, &x, None, scales, tape.as_deref_mut());
            probe(&block.name, &x);
            skips.push(x.clone());
        }
        for block in &self.decoder {
            let skip = if block.cfg.cskip > 0 { skips.pop() } else { None };
            x = block.forward(b, &x, skip.as_ref(), scales, tape.as_deref_mut());
            probe(&block.name, &x);
        }
        let raw = b.conv(self.conv_out, Operand::of(&x));
        if let Some(tape) = tape {
            tape.ends = Some(Ends { input: input.clone(), scales: scales.clone(), last: x });
        }
        raw
    }

    /// Accumulates the gradients of all weights; returns that of `emb`. After each block, `done` is called with the
    /// convolutions whose gradients are complete.
    pub fn backward<B: TrainingBackend>(
        &self,
        b: &mut B,
        tape: Tape<B::Tensor>,
        emb: &B::Tensor,
        grad_raw: &B::Tensor,
        done: &mut Done<B>,
    ) -> B::Tensor {
        let (mut blocks, ends) = (tape.blocks, tape.ends);
        let Ends { input, scales, last } = ends.expect("a forward pass fills its tape");
        let mut grad_scales = b.zero_scales_grad(&scales);
        b.conv_wgrad(self.conv_out, Operand::of(&last), grad_raw, 1.0);
        let mut grad = b.conv_dgrad(self.conv_out, grad_raw, 1.0, Operand::of(&last), None).x;
        drop(last);
        done(b, Whole::ConvsFrom(self.conv_out));

        // The decoder pops skip connections last in, first out; so its gradients are consumed
        // in the encoder in the order in which the backward pass produced them, from the end.
        let mut skip_grads = Vec::new();
        for block in self.decoder.iter().rev() {
            let tape = blocks.pop().expect("one tape entry for each block");
            let g = block.backward(b, tape, &scales, grad, &mut grad_scales, None);
            grad = g.x;
            skip_grads.extend(g.skip);
            done(b, Whole::ConvsFrom(block.conv_res0));
        }
        // The last encoder output went into the first decoder block and into a skip connection;
        // every earlier one into the next encoder block and a skip connection.
        let mut next_skip = || skip_grads.pop().expect("one skip gradient for each encoder output");
        let own = next_skip();
        grad = b.linear_combination(&[(&grad, 1.0), (&own, 1.0)]);
        for block in self.encoder.iter().rev() {
            let tape = blocks.pop().expect("one tape entry for each block");
            grad = block.backward(b, tape, &scales, grad, &mut grad_scales, Some(next_skip())).x;
            done(b, Whole::ConvsFrom(block.conv_res0));
        }
        b.conv_wgrad(self.conv_in, Operand::of(&input), &grad, 1.0);
        b.emb_scales_backward(&self.emb_layers, emb, &grad_scales)
    }

    /// Multiply-adds of one forward pass of an image of `height` x `width` (EDM2's "Gflops" also count elementwise operations, 1 % more).
    pub fn macs(&self, table: &ParamTable, height: usize, width: usize) -> u64 {
        // With some sides and widths 64 bits do not hold the result.
        let macs = |id: ParamId, pixels: u128| table[id].numel() as u128 * pixels;
        let mut pixels = height as u128 * width as u128;
        let mut total = macs(self.conv_in, pixels);
        for block in self.encoder.iter().chain(&self.decoder) {
            match block.cfg.resample {
                Resample::Down => pixels /= 4,
                Resample::Up => pixels *= 4,
                Resample::Keep => {}
            }
            total += macs(block.conv_res0, pixels) + macs(block.conv_res1, pixels) + macs(block.emb.weight, 1);
            total += block.conv_skip.map_or(0, |w| macs(w, pixels));
            total += block.attn.map_or(0, |(qkv, proj)| macs(qkv, pixels) + macs(proj, pixels));
            if block.attn.is_some() {
                total += 2 * pixels * pixels * block.cfg.cout as u128;
            }
        }
        u64::try_from(total + macs(self.conv_out, pixels)).unwrap_or(u64::MAX)
    }
}
