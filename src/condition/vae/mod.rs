//! A tiny variational autoencoder that invents conditions: three linear layers in all.
//!
//! With x the condition and c the tags that it is asked to have (none, or a part of those of x):
//!
//! ```text
//! mean, logvar = encoder(x, c)                   [D + V] -> [2 Z]
//! z            = mean + exp(logvar / 2) * eps    [Z]
//! out          = output(mp_silu(hidden(z, c)))   [Z + V] -> [H] -> [D], of features [D + V]
//! loss         = -ln p(x | out) + beta * KL(N(mean, exp(logvar)) | N(0, 1))
//! ```
//!
//! [`ConditionKind`] says what x is, and so what p is: tags in a multi-hot vector are Bernoulli variables whose logits
//! are `out`. Dense features are normal variables with mean `out` and one variance, the one that fits the batch best.
//! Since features do not say what tags they have, their `out` is longer: V logits of the row's tags follow, and the
//! loss counts these too, so that z knows them. In training c is empty for half of the rows. So one network can both
//! invent freely (from z alone) and complete given tags. The encoder sees c too, so that z learns what c leaves open,
//! and a z drawn from N(0, 1) does not contradict c.
//!
//! At beta = 1 the latents say too little, and conditions come out as a mush of the commonest tags. At a beta that
//! keeps conditions apart, most of N(0, 1) is empty. So a condition is not invented from N(0, 1). It comes from the
//! codes of some training rows, the anchors: an anchor that makes the given tags likely is mixed with a neighbour. What
//! that decodes to is encoded and decoded a few times more, which moves it towards the data (Rezende et al.,
//! "Stochastic Backpropagation", 2014, section 6). Tags are those that are likelier than not: drawing each by itself
//! would put in tags that do not belong together. For features, z is moved each time before it is decoded to where the
//! given tags are likely.
//!
//! The network is in `net`, how it learns in `training`, how it invents in `inventing`, its file in `file`.
//!
//! Memory: (D + V) 2Z + (Z + V) H + H D values (of features H (D + V), as the tags' logits come on top), 0.7 M for
//! 1,024 tags; in training four times as much, and a few bytes a row: rows are read when they are needed. Cost of a
//! training row: six multiply-adds for each value.
//!
//! ```
//! use edm2k::condition::vae::Vae;
//!
//! let vae = Vae::load("demo/conditions.safetensors")?;
//! let cat = vae.vocabulary().parse("cat, face")?;
//! let invented = vae.invent(&cat, 2, 0); // two conditions, by seed 0
//! assert_eq!(invented.conditions.len(), 2 * vae.header().width);
//! let asked = cat.places();
//! assert!(invented.tags.iter().all(|tags| asked.iter().all(|tag| tags.places().contains(tag))));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod file;
mod inventing;
mod net;
mod training;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::prompt::Prompt;
use super::vocabulary::{Tag, Vocabulary, VocabularyError};
use super::{Conditioning, Meaning};
use crate::formats::safetensors::SafeError;
use crate::formats::short;
use crate::real::Real;

pub use file::is_one;
pub use inventing::Invented;
pub use net::VaeLoss;
pub use training::{ConditionSource, Learning, LearningSettings, Rows};

/// What a condition is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConditionKind {
    /// Tags, as [`Vocabulary::multi_hot`] lays them out.
    Tags,
    /// Features of a tagger or another network, of norm 1 ([`unit_norm`](crate::condition::unit_norm)).
    #[serde(rename = "dense")]
    Features,
}

/// Sizes of the layers, and what they work on; the JSON in the file's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeHeader {
    /// What a condition is made of.
    pub kind: ConditionKind,
    /// D: width of a condition.
    pub width: usize,
    /// Z: latent variables.
    pub latent: usize,
    /// H: width of the hidden layer.
    pub hidden: usize,
    /// The V tags that can be asked for. With [`ConditionKind::Tags`], V = D.
    pub vocabulary: Vec<Tag>,
    /// What made the conditions; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditioning: Option<Conditioning>,
}

/// Key of the [`VaeHeader`] in the file's metadata.
const HEADER_KEY: &str = "condition_model";

/// What can be wrong with a condition model.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum VaeError {
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{}: metadata \"{HEADER_KEY}\": {what}", path.display())]
    Header { path: PathBuf, what: String },
    #[error("{}: its vocabulary: {cause}", path.display())]
    Vocabulary { path: PathBuf, cause: VocabularyError },
    #[error("{}: damaged: {what}; remove it, and the training begins anew", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{}: of a training with {what}; give the same, or remove it to begin anew", path.display())]
    OtherTraining { path: PathBuf, what: String },
    #[error("all {0} features are the same, so there is nothing to learn: are they of the right output of the tagger?")]
    Alike(usize),
    #[error("training diverged in epoch {0}: the loss or a weight is not finite, or not in f16")]
    Diverged(usize),
    /// A training that makes no sense.
    #[error("{name} = {}, expected {expected}", short(*.found))]
    Setting { name: &'static str, found: f64, expected: &'static str },
}

/// The autoencoder.
pub struct Vae<T: Real = f32> {
    header: VaeHeader,
    vocabulary: Vocabulary,
    params: Vec<T>,
    /// Codes (mean, logvar) of some training rows, [K, 2 Z]. They show which regions of the latent space are inhabited.
    anchors: Vec<T>,
    /// [`ConditionKind::Features`]: mean and standard deviation of each feature, `[D]`. Else empty.
    mean: Vec<f32>,
    std: Vec<f32>,
}

debug!(Vae<T> { header } [T: Real]);

impl<T: Real> Vae<T> {
    /// A model whose parameters are still to be filled in.
    fn new(header: VaeHeader, vocabulary: Vocabulary) -> Self {
        Self { header, vocabulary, params: Vec::new(), anchors: Vec::new(), mean: Vec::new(), std: Vec::new() }
    }

    /// What the model works on.
    pub fn header(&self) -> &VaeHeader {
        &self.header
    }

    /// What the conditions that it invents mean.
    pub fn meaning(&self) -> Meaning {
        let VaeHeader { kind, conditioning, vocabulary, .. } = &self.header;
        let unsaid = || match kind {
            ConditionKind::Tags => Conditioning::Tags,
            ConditionKind::Features => Conditioning::UNKNOWN_FEATURES,
        };
        Meaning {
            conditioning: Some(conditioning.clone().unwrap_or_else(unsaid)),
            tags: match kind {
                ConditionKind::Tags => vocabulary.iter().map(|tag| tag.tag.clone()).collect(),
                ConditionKind::Features => Vec::new(),
            },
        }
    }

    /// How many values its layers have.
    pub fn parameters(&self) -> usize {
        self.params.len()
    }

    /// How many training rows' codes it keeps.
    pub fn anchors(&self) -> usize {
        self.anchors.len() / (2 * self.header.latent)
    }

    /// The tags that can be asked for.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

/// Writes the normalised input of a prompt: sqrt(V) times its condition, so that its mean square is 1.
fn tag_input(prompt: &Prompt, width: usize, out: &mut [f32]) {
    let norm: f32 = prompt.tags().iter().map(|(_, weight)| weight * weight).sum();
    let value = (width as f32 / norm.max(f32::MIN_POSITIVE)).sqrt();
    prompt.tags().iter().for_each(|&(tag, weight)| out[tag as usize] = weight * value);
}
