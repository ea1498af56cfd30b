//! Which things belong together. One rule serves models, the networks that guide them, datasets, condition models and
//! files of conditions.

use std::fmt::Display;
use std::path::Path;

use crate::codec::Autoencoder;
use crate::condition::vae::Vae;
use crate::condition::{Conditioning, Meaning, OtherMeaning};
use crate::data::dataset::{Dataset, Representation, Split};
use crate::formats::fingerprint::differ;
use crate::model::{Config, ImageSpace, ModelMeta};

/// What something works on, as far as that is known.
#[derive(Clone, Debug, Default)]
pub struct Domain {
    /// Pixels or latents.
    pub encoder: Option<ImageSpace>,
    /// Channels of the images; 0 if it has none.
    pub channels: usize,
    /// Width of the conditions; 0 if it takes none.
    pub width: usize,
    /// What the places of a condition mean.
    pub meaning: Meaning,
    /// The autoencoder that the latents are of.
    pub autoencoder: Option<Autoencoder>,
}

/// Two things that do not belong together: how the one called `name` differs from `other`.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum Mismatch {
    #[error("{name}: its images are {found}, those of {other} are {expected}")]
    Images { name: String, other: String, found: &'static str, expected: &'static str },
    #[error("{name}: its images have {found} channels, those of {other} have {expected}")]
    Channels { name: String, other: String, found: usize, expected: usize },
    #[error("{name}: its images have no conditions, which {other} takes")]
    NoConditions { name: String, other: String },
    #[error("{name}: it takes conditions, {other} none")]
    Unconditional { name: String, other: String },
    #[error("{name}: its conditions are {found} wide, those of {other} are {expected} wide")]
    Width { name: String, other: String, found: usize, expected: usize },
    #[error("{0}")]
    Meaning(#[from] OtherMeaning),
    #[error("{name}: its latents are of {found}, those of {other} are of {expected}")]
    Latents { name: String, other: String, found: Box<Autoencoder>, expected: Box<Autoencoder> },
}

impl Domain {
    /// Of a model.
    pub fn of_model(config: &Config, meta: &ModelMeta) -> Self {
        Self {
            encoder: Some(meta.encoder),
            channels: config.img_channels,
            width: config.label_dim,
            meaning: meta.meaning(),
            autoencoder: meta.autoencoder.clone(),
        }
    }

    /// Of a dataset.
    pub fn of_dataset(data: &Dataset) -> Self {
        let header = data.header();
        Self {
            encoder: Some(if header.kind == Representation::Images { ImageSpace::Rgb } else { ImageSpace::SdVae }),
            channels: header.channels,
            width: header.condition_dim,
            meaning: data.meaning(),
            autoencoder: header.autoencoder.clone(),
        }
    }

    /// Of a condition model.
    pub fn of_condition_model(vae: &Vae) -> Self {
        Self::of_conditions(vae.header().width, vae.meaning())
    }

    /// Of conditions alone.
    pub fn of_conditions(width: usize, meaning: Meaning) -> Self {
        Self { width, meaning, ..Self::default() }
    }

    /// Checks that conditions, or images with conditions (`name` in messages), suit a model. A model that takes conditions needs
    /// matching ones; for a model that takes none, any will do.
    ///
    /// # Errors
    /// The first known difference.
    pub fn check_given(&self, name: impl Display, model: &Self, model_name: impl Display) -> Result<(), Mismatch> {
        let mut all = self.differences(name, model, model_name).into_iter();
        all.find(|what| !matches!(what, Mismatch::Unconditional { .. })).map_or(Ok(()), Err)
    }

    /// The same for a network that is to guide a model: it may do without conditions, but has no others than the model's.
    ///
    /// # Errors
    /// As [`Domain::check_given`].
    pub fn check_guide(&self, name: impl Display, model: &Self, model_name: impl Display) -> Result<(), Mismatch> {
        let mut all = self.differences(name, model, model_name).into_iter();
        all.find(|what| !matches!(what, Mismatch::NoConditions { .. })).map_or(Ok(()), Err)
    }

    /// A warning, if both are of features and nobody knows whether one network made them; or if one is of tags, and nobody
    /// said what the places of the other's conditions mean, as is usual of classes.
    pub fn doubt(&self, name: impl Display, other: &Self, other_name: impl Display) -> Option<String> {
        let named = |domain: &Self| !domain.meaning.tags.is_empty();
        let nameless = |domain: &Self| {
            let features = matches!(domain.meaning.conditioning, Some(Conditioning::Features { .. }));
            domain.width > 0 && !named(domain) && !features
        };
        if let Some((nameless, named)) = match (self, other) {
            (a, b) if nameless(a) && named(b) => Some((name.to_string(), other_name.to_string())),
            (a, b) if named(a) && nameless(b) => Some((other_name.to_string(), name.to_string())),
            _ => None,
        } {
            return Some(format!(
                "{nameless}: nothing says what its conditions mean (classes?), those of {named} are tags"
            ));
        }
        let anonymous = |domain: &Self| match &domain.meaning.conditioning {
            Some(Conditioning::Features { source, fingerprint, .. }) => {
                Some(source.is_empty() && fingerprint.is_none())
            }
            _ => None,
        };
        let text = |name: &dyn Display, other: &dyn Display| {
            format!("{name}: nobody said what made its features, which may be others than those of {other}")
        };
        match (anonymous(self)?, anonymous(other)?) {
            (true, _) => Some(text(&name, &other_name)),
            (false, true) => Some(text(&other_name, &name)),
            (false, false) => None,
        }
    }

    /// All known differences. Meanings are compared even where widths differ.
    pub fn differences(&self, name: impl Display, other: &Self, other_name: impl Display) -> Vec<Mismatch> {
        let names = || (name.to_string(), other_name.to_string());
        let mut all = Vec::new();
        if differ(&self.encoder, &other.encoder) {
            let word =
                |encoder: Option<ImageSpace>| if encoder == Some(ImageSpace::Rgb) { "pixels" } else { "latents" };
            let ((name, other), found, expected) = (names(), word(self.encoder), word(other.encoder));
            all.push(Mismatch::Images { name, other, found, expected });
        }
        let known = |a: usize, b: usize| a > 0 && b > 0;
        let (found, expected) = (self.channels, other.channels);
        if known(found, expected) && found != expected {
            let (name, other) = names();
            all.push(Mismatch::Channels { name, other, found, expected });
        }
        let (found, expected) = (self.width, other.width);
        if found != expected {
            let (name, other) = names();
            all.push(match (found, expected) {
                (0, _) => Mismatch::NoConditions { name, other },
                (_, 0) => Mismatch::Unconditional { name, other },
                _ => Mismatch::Width { name, other, found, expected },
            });
        }
        if known(found, expected) {
            all.extend(self.meaning.check(&name, &other.meaning, &other_name).err().map(Mismatch::Meaning));
        }
        if let (Some(found), Some(expected)) = (&self.autoencoder, &other.autoencoder)
            && found != expected
        {
            let ((name, other), found, expected) = (names(), found.clone().into(), expected.clone().into());
            all.push(Mismatch::Latents { name, other, found, expected });
        }
        all
    }
}

/// Whether a model learned from this dataset, and so knows its conditions.
pub fn learned_from(meta: &ModelMeta, dataset: &Path) -> bool {
    let of = |split| Dataset::open(dataset, split).ok().and_then(|data| data.fingerprint());
    meta.data.is_some() && Split::ALL.into_iter().any(|split| of(split) == meta.data)
}
