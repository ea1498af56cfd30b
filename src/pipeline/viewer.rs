//! Pictures of what a network makes.

use std::path::Path;

use super::PipelineError;
use crate::codec::{Autoencoder, CodecError, CodecFile};
use crate::data::dataset::{Dataset, Representation};
use crate::device::{Decode, Device};
use crate::memory::{self, TooLarge};
use crate::pictures::Picture;

/// Makes pictures of images in model space.
pub struct Viewer {
    /// What decodes latents; none: the images are pixels.
    decoder: Option<Decoder>,
}

debug!(Viewer {});

/// An autoencoder's decoder on a device.
struct Decoder {
    /// Bytes that it needs for each place of a latent.
    bytes: u128,
    decode: Box<Decode>,
}

impl Viewer {
    /// Of images that are pixels.
    pub(super) const PIXELS: Self = Self { decoder: None };

    /// Opens an SD-VAE's or TAESD's file, for the latents of what messages call `of`. If it is known, `made_by` is the
    /// autoencoder that made them. Also returns a warning if the file is of another kind, which only stands in for that
    /// one.
    ///
    /// # Errors
    /// See [`CodecError`].
    pub fn open(
        device: &Device,
        path: &Path,
        of: &str,
        made_by: Option<&Autoencoder>,
    ) -> Result<(Self, Option<String>), CodecError> {
        let file = CodecFile::open(path)?;
        let warning = file.check_latents(of, made_by)?;
        let decode = device.decoder(&file)?;
        Ok((Self { decoder: Some(Decoder { bytes: file.decoder_bytes(), decode }) }, warning))
    }

    /// A viewer for the images of a dataset that messages call `of`, in all its sizes. None if they are latents and
    /// there is no autoencoder `vae`, or pixels with other than three channels. Also returns a warning, as
    /// [`Viewer::open`] does.
    ///
    /// # Errors
    /// [`PipelineError`]: as [`Viewer::open`] and [`Viewer::check`]; or there is an autoencoder, and no latents.
    pub fn of(
        device: &Device,
        data: &Dataset,
        of: &str,
        vae: Option<&Path>,
    ) -> Result<(Option<Self>, Option<String>), PipelineError> {
        let header = data.header();
        let (viewer, warning) = match (header.kind, vae) {
            (Representation::Images, None) => ((header.channels == 3).then_some(Self::PIXELS), None),
            (Representation::Images, Some(_)) => return Err(PipelineError::Pixels(of.into())),
            (Representation::Latents, None) => (None, None),
            (Representation::Latents, Some(path)) => {
                let (viewer, warning) = Self::open(device, path, of, header.autoencoder.as_ref())?;
                (Some(viewer), warning)
            }
        };
        data.sizes().iter().try_for_each(|&size| viewer.iter().try_for_each(|viewer| viewer.check(size)))?;
        Ok((viewer, warning))
    }

    /// Refuses pictures of images of [height, width] that this machine has no room for.
    ///
    /// # Errors
    /// [`TooLarge`].
    pub fn check(&self, size: [usize; 2]) -> Result<(), TooLarge> {
        let Some(decoder) = &self.decoder else { return Ok(()) };
        let needed = decoder.bytes * size[0] as u128 * size[1] as u128;
        memory::check(format!("decoding latents of {}x{}", size[1], size[0]), needed)
    }

    /// The picture of an image [height, width, channels].
    ///
    /// # Errors
    /// The device's, or [`CodecError::Overflow`].
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn picture(&mut self, size: [usize; 2], image: &[f32]) -> Result<Picture, CodecError> {
        match &mut self.decoder {
            None => Ok(Picture::from_model(size[0], size[1], image)),
            Some(decoder) => (decoder.decode)(size, image),
        }
    }
}
