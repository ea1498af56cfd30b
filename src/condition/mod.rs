//! What an image is asked to show: tags or a tagger's features, the vectors made of them, and a model that invents
//! both.
//!
//! Whatever a condition is made of, the network sees a vector of L2 norm 1, which EDM2 multiplies by sqrt(D): one tag
//! is its class label `one_hot * sqrt(D)`, and of any other condition too the elements have mean square 1. Zeros are
//! no condition.
//!
//! ```
//! use edm2k::condition::vocabulary::{Tag, Vocabulary};
//!
//! let tags = ["cat", "dog", "red"].map(|tag| Tag { tag: tag.into(), count: 0 });
//! let vocabulary = Vocabulary::new(tags.to_vec())?;
//! let half = 0.5f32.sqrt();
//! assert_eq!(vocabulary.condition(&vocabulary.parse("red, cat")?), [half, 0.0, half]);
//! # Ok::<(), edm2k::condition::vocabulary::VocabularyError>(())
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::formats::fingerprint::{self, Fingerprint};

pub mod classes;
pub mod prompt;
pub mod tagger;
pub mod vae;
pub mod vocabulary;

/// What the conditions of a dataset or a model are made of. In JSON `"tags"`, or
/// `{"features": {"source": "tagger.onnx", "node": "pooled"}}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conditioning {
    /// Tags, as [`vocabulary::Vocabulary::multi_hot`] lays them out.
    #[default]
    Tags,
    /// Features of a network, divided by their norm ([`unit_norm`]).
    Features {
        /// Name of the file that made them; empty if unknown.
        source: String,
        /// Name of the tensor in it; empty if unknown.
        node: String,
        /// Fingerprint of that file's content; `None` if unknown.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fingerprint: Option<Fingerprint>,
    },
}

impl Conditioning {
    /// Features of nobody knows which network.
    pub const UNKNOWN_FEATURES: Self = Self::Features { source: String::new(), node: String::new(), fingerprint: None };

    /// Whether the two are known to be different. Where a file's content is known, its name does not matter.
    pub fn differs(&self, other: &Self) -> bool {
        let named = |a: &str, b: &str| !a.is_empty() && !b.is_empty() && a != b;
        match (self, other) {
            (Self::Tags, Self::Tags) => false,
            (
                Self::Features { source, node, fingerprint },
                Self::Features { source: other_source, node: other_node, fingerprint: other },
            ) => {
                let other_file = match (fingerprint, other) {
                    (Some(_), Some(_)) => fingerprint::differ(fingerprint, other),
                    _ => named(source, other_source),
                };
                other_file || named(node, other_node)
            }
            _ => true,
        }
    }
}

impl fmt::Display for Conditioning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tags => f.write_str("tags"),
            Self::Features { source, node, fingerprint } => {
                f.write_str("features")?;
                let mut named = |before: &str, name: &str| match name {
                    "" => Ok(()),
                    name => write!(f, "{before}{name}"),
                };
                named(" of ", source)?;
                named(" ", &fingerprint.map_or(String::new(), |fingerprint| format!("({fingerprint})")))?;
                named(", tensor ", node)
            }
        }
    }
}

/// Key of a [`Meaning`] in the metadata of a file of conditions.
pub const MEANING_KEY: &str = "meaning";

/// What the places of a condition mean. A dataset, a model and a condition model that are used together must agree on
/// it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meaning {
    /// What it is made of; `None` if unknown.
    pub conditioning: Option<Conditioning>,
    /// The tags in order; empty for features, or if unknown.
    pub tags: Vec<String>,
}

impl Meaning {
    /// Checks that what is called `name` here is not known to differ in meaning from `other`.
    ///
    /// # Errors
    /// How they differ.
    pub fn check(
        &self,
        name: impl fmt::Display,
        other: &Self,
        other_name: impl fmt::Display,
    ) -> Result<(), OtherMeaning> {
        let names = || (name.to_string(), other_name.to_string());
        if let (Some(found), Some(expected)) = (&self.conditioning, &other.conditioning)
            && found.differs(expected)
        {
            let ((name, other), found, expected) = (names(), found.clone().into(), expected.clone().into());
            return Err(OtherMeaning::Conditioning { name, other, found, expected });
        }
        if self.tags.is_empty() || other.tags.is_empty() {
            return Ok(());
        }
        let (found, expected) = (self.tags.len(), other.tags.len());
        let mut differing = self.tags.iter().zip(&other.tags).filter(|(found, expected)| found != expected);
        match differing.next() {
            None if found == expected => Ok(()),
            None => {
                let (name, other) = names();
                Err(OtherMeaning::Tags { name, other, found, expected })
            }
            Some((first, wanted)) => {
                let ((name, other), count) = (names(), 1 + differing.count());
                let (tag, wanted, common) = (first.as_str().into(), wanted.as_str().into(), found.min(expected));
                Err(OtherMeaning::Tag { name, other, tag, wanted, count, common })
            }
        }
    }
}

/// How the conditions of what is called `name` differ from those of `other`.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum OtherMeaning {
    #[error("{name}: its conditions are {found}, those of {other} are {expected}")]
    Conditioning { name: String, other: String, found: Box<Conditioning>, expected: Box<Conditioning> },
    #[error("{name}: made for another vocabulary (it has {found} tags, {other} has {expected})")]
    Tags { name: String, other: String, found: usize, expected: usize },
    #[error(
        "{name}: made for another vocabulary (it has {tag:?} where {other} has {wanted:?}; {count} of {common} differ)"
    )]
    Tag { name: String, other: String, tag: Box<str>, wanted: Box<str>, count: usize, common: usize },
}

/// Divides a vector by its L2 norm, as the network is to see it. Returns whether that was possible: a vector of zeros,
/// or one with a number that is not finite, stays as it is.
#[must_use]
pub fn unit_norm(values: &mut [f32]) -> bool {
    let norm = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if !(norm > 0.0 && norm.is_finite()) {
        return false;
    }
    values.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_norm_1_whatever_their_size_and_zeros_have_none() {
        let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        for scale in [1e-30, 1e-3, 1.0, 77.0, 1e30] {
            let mut x = [3.0 * scale, 0.0, -4.0 * scale];
            assert!(unit_norm(&mut x));
            // Three roundings to f32.
            assert!((norm(&x) - 1.0).abs() < 2e-7 && (x[0] - 0.6).abs() < 1e-7 && (x[2] + 0.8).abs() < 1e-7, "{x:?}");
        }
        for mut x in [[0.0, 0.0], [f32::NAN, 1.0], [1.0, f32::INFINITY]] {
            let before = x.map(f32::to_bits);
            assert!(!unit_norm(&mut x));
            assert_eq!(x.map(f32::to_bits), before);
        }
        assert!(!unit_norm(&mut []));
    }

    #[test]
    fn conditioning_has_its_json_and_tags_are_the_default() {
        let features =
            Conditioning::Features { source: "tagger.onnx".into(), node: "pooled".into(), fingerprint: None };
        for (value, text) in [
            (Conditioning::default(), r#""tags""#),
            (features, r#"{"features":{"source":"tagger.onnx","node":"pooled"}}"#),
        ] {
            assert_eq!(serde_json::to_string(&value).unwrap(), text);
            assert_eq!(serde_json::from_str::<Conditioning>(text).unwrap(), value);
        }
    }

    #[test]
    fn features_are_told_apart_by_the_content_of_the_file_and_by_its_name_where_that_is_unknown() {
        let of = |source: &str, node: &str, content: &str| Conditioning::Features {
            source: source.into(),
            node: node.into(),
            fingerprint: (!content.is_empty()).then(|| Fingerprint::of([content])),
        };
        let a = of("model.onnx", "pooled", "a");
        for same in [of("renamed.onnx", "pooled", "a"), of("model.onnx", "pooled", ""), of("", "", "")] {
            assert!(!a.differs(&same) && !same.differs(&a), "{same}");
        }
        let others = [of("model.onnx", "pooled", "b"), of("model.onnx", "logits", "a"), of("x.onnx", "pooled", "")];
        for other in others.into_iter().chain([Conditioning::Tags]) {
            assert!(a.differs(&other) && other.differs(&a), "{other}");
        }
    }
}
