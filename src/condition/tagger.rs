//! Features of a picture from a WD tagger: the vector that its classifier is given.
//!
//! A tagger pools what it sees into one vector, 768 or 1024 wide. Its last layer makes the probabilities of tags out of
//! that. The vector says more than the tags: divided by its norm ([`unit_norm`](super::unit_norm)), it is the condition
//! of a model.
//!
//! The tagger is shown a picture as its authors show it. The picture stands on white, padded by white to a square about
//! its centre, and is resized to the network's side (448) by Pillow's bicubic filter. The values are 0 to 255 in the
//! order blue, green, red, [1, H, W, 3] in f32. A network whose input is [1, 3, H, W] gets the same values in that
//! layout.

use std::path::Path;

use super::Conditioning;
use crate::formats::fingerprint;
pub use crate::onnx::OnnxError;
use crate::onnx::{FeatureTensor, OnnxNetwork};
use crate::pictures::Picture;
use crate::pictures::bicubic::within;

/// A tagger, ready to look at pictures.
pub struct Tagger {
    network: OnnxNetwork,
}

debug!(Tagger {});

impl Tagger {
    /// What is behind a transparent picture.
    pub const BACKGROUND: [u8; 3] = [255; 3];

    /// Opens a tagger's ONNX file. `node` names the tensor of the features; without it, it is the classifier's input,
    /// found by the names that the taggers of SmilingWolf have.
    ///
    /// # Errors
    /// The file is no ONNX file, or has an operator that is not supported; it has no such node, or no classifier; its
    /// images are not square; or this crate was built without the feature `onnx`.
    pub fn open(path: &Path, node: Option<&str>) -> Result<Self, OnnxError> {
        let network = OnnxNetwork::open(path, node.map_or(FeatureTensor::Pooled, FeatureTensor::Named), None)?;
        match network.size() {
            [height, width] if height == width => Ok(Self { network }),
            [height, width] => {
                let found = format!("images of {width}x{height}, which is no square");
                Err(OnnxError::Input { path: path.into(), found })
            }
        }
    }

    /// The tagger's network.
    #[doc(hidden)]
    pub fn network(&self) -> &OnnxNetwork {
        &self.network
    }

    /// Name of the file.
    pub fn source(&self) -> String {
        fingerprint::name(self.network.path())
    }

    /// The [`Conditioning`] of conditions that are these features.
    pub fn conditioning(&self) -> Conditioning {
        Conditioning::Features {
            source: self.source(),
            node: self.network.node().into(),
            fingerprint: Some(self.network.fingerprint()),
        }
    }

    /// The features of a whole picture, which must not have been cropped. `name` names it in errors.
    ///
    /// # Errors
    /// [`OnnxError::Run`], [`OnnxError::NotFinite`].
    pub fn features(&self, picture: &Picture, name: &str) -> Result<Vec<f32>, OnnxError> {
        let side = picture.height().max(picture.width());
        let square = within(picture, [side, side], Self::BACKGROUND[0], self.network.size());
        let bgr: Vec<f32> = square.rgb().as_chunks().0.iter().flat_map(|&[r, g, b]| [b, g, r].map(f32::from)).collect();
        self.network.features(&bgr, name)
    }
}
