//! What an image is asked to show: tags or a tagger's features, the vectors made of them, and a model that invents
//! both.
//!
//! Whatever a condition is made of, the network sees a vector of L2 norm 1, which EDM2 multiplies by sqrt(D): one tag
//! is its class label `one_hot * sqrt(D)`, and of any other condition too the elements have mean square 1. Zeros are
//! no condition.

use std::fmt;

use serde::{Deserialize, Serialize};

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
        /// Name of the file that made them; empty if nobody said.
        source: String,
        /// Name of the tensor in it; empty if nobody said.
        node: String,
    },
}

impl fmt::Display for Conditioning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tags => f.write_str("tags"),
            Self::Features { source, node } => {
                f.write_str("features")?;
                let mut named = |before: &str, name: &str| match name {
                    "" => Ok(()),
                    name => write!(f, "{before}{name}"),
                };
                named(" of ", source)?;
                named(", tensor ", node)
            }
        }
    }
}

/// Divides a vector by its L2 norm, as the network is to see it. Whether there is one: zeros, or a number that is not
/// finite, are left as they are.
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
        let features = Conditioning::Features { source: "tagger.onnx".into(), node: "pooled".into() };
        for (value, text) in [
            (Conditioning::default(), r#""tags""#),
            (features, r#"{"features":{"source":"tagger.onnx","node":"pooled"}}"#),
        ] {
            assert_eq!(serde_json::to_string(&value).unwrap(), text);
            assert_eq!(serde_json::from_str::<Conditioning>(text).unwrap(), value);
        }
    }
}
