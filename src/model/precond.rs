//! Preconditioning (EDM, Karras et al. 2022, table 1), the learned uncertainty and the training loss
//! (EDM2, section 2.1 and eq. 14-15) around the [`UNet`].
//!
//! ```
//! use edm2k::backend::{Backend, NetworkBackend, cpu::Cpu};
//! use edm2k::model::Model;
//!
//! let model = Model::load("demo/emoji.safetensors")?;
//! let mut cpu = Cpu::<f32>::for_sampling(&model.table);
//! model.load_into(&mut cpu)?;
//! let noisy = cpu.upload([1, 32, 32, 3], &[2.0; 32 * 32 * 3]);
//! let sigma = cpu.upload([1, 1, 1, 1], &[2.0]);
//! let denoised = model.net.denoise(&mut cpu, &noisy, &sigma, None);
//! assert_eq!(cpu.shape(&denoised), [1, 32, 32, 3]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use super::config::{Config, ConfigError};
use super::unet::{Tape, UNet};
use crate::backend::{BackendError, Done, Embed, Embedding, Logvar, LossInput, Masks, NetworkBackend, TrainingBackend};
use crate::params::{ParamId, ParamTable, Whole};

/// The denoiser D(x; sigma, labels) of a [`Config`].
#[derive(Clone, Debug)]
pub struct Precond {
    /// Its architecture.
    pub config: Config,
    unet: UNet,
    embed: Embed,
    logvar: Logvar,
    out_gain: ParamId,
}

/// The plan of a forward pass, [`Precond::planned`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forward;

/// Inputs and results of a forward pass for training, kept for [`Precond::backward`].
pub struct TrainPass<T> {
    /// Loss of each image, summed over its elements, [n, 1, 1, 1].
    pub per_image: T,
    /// logvar [n, 1, 1, 1].
    pub logvar: T,
    /// Output of the U-Net before `out_gain`.
    pub raw: T,
    grad_raw: T,
    grad_logvar: T,
    logvar_features: T,
    embedding: Embedding<T>,
    labels: Option<T>,
    tape: Tape<T>,
}

debug!(TrainPass<T> {} [T]);

impl Precond {
    /// The network of a valid config, and the table of its parameters.
    ///
    /// # Errors
    /// What [`Config::validate`] says.
    pub fn new(config: &Config) -> Result<(Self, ParamTable), ConfigError> {
        config.validate()?;
        let mut table = ParamTable::default();
        let out_gain = table.gain("unet.out_gain".into());
        let (freqs, phases) = table.fourier("unet.emb_fourier".into(), config.noise_channels());
        let noise = table.linear("unet.emb_noise".into(), config.noise_channels(), config.emb_channels());
        let label = (config.label_dim > 0)
            .then(|| table.linear("unet.emb_label".into(), config.label_dim, config.emb_channels()));
        let embed = Embed { freqs, phases, noise, label, label_balance: config.label_balance };
        let unet = UNet::new(&mut table, "unet.", config);
        let (freqs, phases) = table.fourier("logvar_fourier".into(), config.logvar_channels);
        let weight = table.linear("logvar_linear".into(), config.logvar_channels, 1);
        let logvar = Logvar { freqs, phases, weight };
        Ok((Self { config: config.clone(), unet, embed, logvar, out_gain }, table))
    }

    /// The gain of the output convolution.
    pub fn out_gain(&self) -> ParamId {
        self.out_gain
    }

    /// Multiply-adds of one forward pass for an image of `height` x `width`.
    pub fn macs(&self, table: &ParamTable, height: usize, width: usize) -> u64 {
        let embed = table[self.embed.noise].numel() + self.embed.label.map_or(0, |id| table[id].numel());
        self.unet.macs(table, height, width).saturating_add(embed as u64)
    }

    /// D(x; sigma, labels) for noisy images `x` [n, h, w, c], noise levels `sigma` [n, 1, 1, 1] and labels
    /// [n, 1, 1, label_dim] (none = zeros: the unconditional prediction; of fewer images, a divisor of n, they are taken in
    /// turn). The backend must hold normalised weights
    /// ([`Model::load_into`](super::Model::load_into)), and sigma must be above 0.
    ///
    /// # Panics
    /// If a shape is another, h and w are not of a size that the network takes ([`Config::check_size`]), or there are labels
    /// and label_dim is 0.
    pub fn denoise<B: NetworkBackend>(
        &self,
        b: &mut B,
        x: &B::Tensor,
        sigma: &B::Tensor,
        labels: Option<&B::Tensor>,
    ) -> B::Tensor {
        let scales = self.scales(b, sigma, labels);
        self.denoise_scaled(b, x, sigma, &scales)
    }

    /// What all blocks take from noise levels and labels, [n, 1, 1, channels of all blocks]. It does not depend on the
    /// images.
    ///
    /// # Panics
    /// As [`Precond::denoise`].
    pub fn scales<B: NetworkBackend>(&self, b: &mut B, sigma: &B::Tensor, labels: Option<&B::Tensor>) -> B::Tensor {
        self.embedded(b, sigma, labels).1
    }

    /// The embedding of noise levels and labels, and the scales that it gives to all blocks.
    fn embedded<B: NetworkBackend>(
        &self,
        b: &mut B,
        sigma: &B::Tensor,
        labels: Option<&B::Tensor>,
    ) -> (Embedding<B::Tensor>, B::Tensor) {
        let [n, rest @ ..] = b.shape(sigma);
        assert_eq!(rest, [1; 3], "noise levels are [n, 1, 1, 1]");
        if let Some(labels) = labels {
            assert!(self.config.label_dim > 0, "the network takes no labels");
            let [given, rest @ ..] = b.shape(labels);
            assert_eq!(rest, [1, 1, self.config.label_dim], "labels are [n, 1, 1, label_dim]");
            assert!(given > 0 && n.is_multiple_of(given), "labels of {given} images, and {n} noise levels");
        }
        let embedding = b.embed(&self.embed, sigma, labels);
        let scales = b.emb_scales(self.unet.emb_layers(), &embedding.emb);
        (embedding, scales)
    }

    /// As [`Precond::denoise`], given the [`scales`](Precond::scales) of the noise levels. x may have fewer than n
    /// images, a divisor of n; then they are taken in turn.
    ///
    /// # Panics
    /// As there.
    pub fn denoise_scaled<B: NetworkBackend>(
        &self,
        b: &mut B,
        x: &B::Tensor,
        sigma: &B::Tensor,
        scales: &B::Tensor,
    ) -> B::Tensor {
        self.output(b, x, sigma, scales, &mut |_, _| {}).0
    }

    /// Panics unless the network takes these images under noise levels [n, 1, 1, 1].
    fn check_images<B: NetworkBackend>(&self, b: &B, x: &B::Tensor, sigma: &B::Tensor) {
        let ([images, h, w, c], [n, ..]) = (b.shape(x), b.shape(sigma));
        assert_eq!(c, self.config.img_channels, "channels of the images [n, h, w, c]");
        assert!(images > 0 && n.is_multiple_of(images), "{images} images, and {n} noise levels");
        self.config.check_size(h, w).expect("a size of images that the network takes");
    }

    /// D(x; sigma), and the U-Net's output before `out_gain`.
    fn output<B: NetworkBackend>(
        &self,
        b: &mut B,
        x: &B::Tensor,
        sigma: &B::Tensor,
        scales: &B::Tensor,
        probe: &mut dyn FnMut(&str, &B::Tensor),
    ) -> (B::Tensor, B::Tensor) {
        self.check_images(b, x, sigma);
        let input = b.precond_input(x, sigma, self.config.sigma_data);
        let raw = self.unet.forward(b, &input, scales, None, probe);
        (b.precond_output(x, &raw, sigma, self.out_gain, self.config.sigma_data), raw)
    }

    /// As [`Precond::denoise`], as a plan. `inputs` are images, noise levels and perhaps labels.
    ///
    /// # Errors
    /// The device's: it has no memory for the plan, for one.
    ///
    /// # Panics
    /// As [`Precond::denoise`]; or there are not two or three inputs.
    pub fn planned<B: NetworkBackend>(&self, b: &mut B, inputs: &[B::Tensor]) -> Result<B::Tensor, BackendError> {
        assert!((2..=3).contains(&inputs.len()), "images, noise levels and perhaps labels");
        let body = &mut |b: &mut B, t: &[B::Tensor]| Ok(vec![self.denoise(b, &t[0], &t[1], t.get(2))]);
        Ok(b.planned::<BackendError>(&Forward, inputs, body)?.swap_remove(0))
    }

    /// As [`Precond::denoise`]; also returns the U-Net's output before `out_gain` and the embedding, and
    /// shows `probe` the output of every module.
    pub fn denoise_probed<B: NetworkBackend>(
        &self,
        b: &mut B,
        x: &B::Tensor,
        sigma: &B::Tensor,
        labels: Option<&B::Tensor>,
        probe: &mut dyn FnMut(&str, &B::Tensor),
    ) -> (B::Tensor, B::Tensor, Embedding<B::Tensor>) {
        let (embedding, scales) = self.embedded(b, sigma, labels);
        let (d, raw) = self.output(b, x, sigma, &scales, probe);
        (d, raw, embedding)
    }

    /// logvar(sigma), [n, 1, 1, 1], with the Fourier features that feed it.
    pub fn logvar<B: NetworkBackend>(&self, b: &mut B, sigma: &B::Tensor) -> (B::Tensor, B::Tensor) {
        b.logvar(&self.logvar, sigma)
    }

    /// Forward pass with the loss of `noisy` = `clean` + `sigma` * noise, and with dropout if there are `masks`. Shapes are
    /// those of [`Precond::denoise`].
    ///
    /// # Panics
    /// As there; or `clean` and `noisy` differ in shape.
    pub fn train_forward<B: TrainingBackend>(
        &self,
        b: &mut B,
        clean: &B::Tensor,
        noisy: &B::Tensor,
        sigma: &B::Tensor,
        labels: Option<&B::Tensor>,
        masks: Option<&Masks<B::Tensor>>,
    ) -> TrainPass<B::Tensor> {
        self.check_images(b, noisy, sigma);
        assert_eq!(b.shape(clean), b.shape(noisy), "clean images, and the same with noise");
        assert_eq!(b.shape(noisy)[0], b.shape(sigma)[0], "images, and their noise levels");
        let input = b.precond_input(noisy, sigma, self.config.sigma_data);
        let (embedding, scales) = self.embedded(b, sigma, labels);
        let mut tape = Tape::new(masks.cloned());
        let raw = self.unet.forward(b, &input, &scales, Some(&mut tape), &mut |_, _| {});
        let (logvar_features, logvar) = b.logvar(&self.logvar, sigma);
        let loss = b.loss(LossInput {
            clean,
            noisy,
            raw: &raw,
            sigma,
            logvar: &logvar,
            out_gain: self.out_gain,
            sigma_data: self.config.sigma_data,
        });
        TrainPass {
            per_image: loss.per_image,
            logvar,
            raw,
            grad_raw: loss.grad_raw,
            grad_logvar: loss.grad_logvar,
            logvar_features,
            embedding,
            labels: labels.cloned(),
            tape,
        }
    }

    /// Backward pass: accumulates the gradients of all parameters, and calls `done` with those that are complete.
    pub fn backward<B: TrainingBackend>(&self, b: &mut B, pass: TrainPass<B::Tensor>, done: &mut Done<B>) {
        b.logvar_backward(&self.logvar, &pass.logvar_features, &pass.grad_logvar);
        let grad_emb = self.unet.backward(b, pass.tape, &pass.embedding.emb, &pass.grad_raw, done);
        b.embed_backward(&self.embed, &pass.embedding, pass.labels.as_ref(), &grad_emb);
        done(b, Whole::All);
    }
}
