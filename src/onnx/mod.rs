//! Networks of images in ONNX files, for the features that they make: a tagger's, Inception's, DINOv2's.
//!
//! [tract](https://github.com/sonos/tract) runs them, on the CPU: it is Rust, so nothing has to be installed, and it
//! makes any tensor of a graph its output. `ort` is several times faster, but needs the shared library of onnxruntime
//! on the machine, and the tensor that taggers keep inside would have to be made an output in the file first.
//!
//! Only the part of the graph on which the wanted tensor depends is kept, for one image of a fixed size. So what comes
//! after that tensor, and a batch size that is a symbol, play no role. Images are independent; to compute many, use
//! many threads. The weights are read whole, and opening needs about three times the file's size.
//!
//! An ONNX file is trusted as little as any other. tract panics on some graphs that make no sense. Such a panic is
//! caught here and becomes an [`OnnxError`]. Before that, Rust's panic hook prints it; the program has it not printed
//! (`hush_panics`). A graph of more than [`MAX_NODES`], or with a tensor of more than [`MAX_ELEMENTS`], or with a window or
//! a shape that large, is refused before tract sees it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::formats::fingerprint::Fingerprint;
use crate::formats::{FileError, transposed};

#[cfg(feature = "onnx")]
mod tract;
#[cfg(feature = "onnx")]
pub use tract::hush_panics;

/// Most elements of a tensor inside a network: 2^28, 1 GiB in f32.
pub const MAX_ELEMENTS: usize = 1 << 28;

/// Most nodes of a network: taggers have up to 5,000, and time grows faster than their number.
pub const MAX_NODES: usize = 20_000;

/// Largest height and width of a network's images.
#[cfg(feature = "onnx")]
const MAX_SIDE: usize = 4096;

/// What can go wrong with a network.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum OnnxError {
    #[error("{}: this edm2k was built without ONNX (cargo feature `onnx`)", path.display())]
    NotBuilt { path: PathBuf },
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not an ONNX file: {what}", path.display())]
    NotOnnx { path: PathBuf, what: String },
    #[error("{}: a damaged ONNX file: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{}: no node makes a tensor {name}{}", path.display(), listed("; names near it: ", near))]
    Missing { path: PathBuf, name: String, near: Vec<String> },
    #[error(
        "{}: no classifier of a WD tagger (a node predictions_dense, or a matrix product in core_model/head), so the \
         tensor of the features must be named{}",
        path.display(),
        listed("; inputs of matrix products are ", candidates)
    )]
    NoClassifier { path: PathBuf, candidates: Vec<String> },
    #[error("{}: {found} outputs, so the tensor of the features must be named{}", path.display(), listed("; they are ", names))]
    Outputs { path: PathBuf, found: usize, names: Vec<String> },
    #[error("{}: {found}, expected one input of images, f32 [N, H, W, 3] or [N, 3, H, W]", path.display())]
    Input { path: PathBuf, found: String },
    #[error("{}: the operator {operator} (node {node}) is not supported", path.display())]
    Operator { path: PathBuf, operator: String, node: String },
    #[error("{}: {what} (node {node}) is not supported", path.display())]
    Otherwise { path: PathBuf, node: String, what: &'static str },
    #[error("{}: the tensor {name} is {found}, expected a vector for each image", path.display())]
    NoVector { path: PathBuf, name: String, found: String },
    #[error("{}: a tensor of {elements} elements, expected {MAX_ELEMENTS} at most", path.display())]
    TooLarge { path: PathBuf, elements: String },
    #[error("{}: {nodes} nodes, expected {MAX_NODES} at most", path.display())]
    TooLong { path: PathBuf, nodes: usize },
    #[error("{}: the network cannot be run: {what}", path.display())]
    Run { path: PathBuf, what: String },
    #[error("{}: the features of {what} are not finite numbers", path.display())]
    NotFinite { path: PathBuf, what: String },
}

fn listed(before: &str, names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("{before}{}", names.join(", ")),
    }
}

/// Which tensor has the features.
#[derive(Clone, Copy, Debug)]
pub enum FeatureTensor<'a> {
    /// The tensor of this name.
    Named(&'a str),
    /// What the classifier of a WD tagger is given. The nodes' names tell which tensor that is.
    Pooled,
    /// The only output.
    Output,
}

/// What an ONNX file says of its network. Nothing is run, and unknown operators do no harm.
#[derive(Clone, Debug, Serialize)]
pub struct About {
    /// The program that wrote it; may be empty.
    pub producer: String,
    /// Its inputs, without the weights.
    pub inputs: Vec<Port>,
    /// Its outputs.
    pub outputs: Vec<Port>,
    /// How many operations it has.
    pub nodes: usize,
    /// Values of all its weights.
    pub values: u64,
    /// The tensor that [`FeatureTensor::Pooled`] is, if it is a WD tagger.
    pub features: Option<String>,
    /// Operators that cannot be run here, sorted.
    pub unsupported: Vec<String>,
    /// As [`OnnxNetwork::fingerprint`].
    pub fingerprint: Fingerprint,
}

/// An input or an output of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    /// Name of the tensor.
    pub name: String,
    /// Its element type, in lower case.
    pub kind: String,
    /// Its sides: numbers, names where the file leaves them open, `?` where it says nothing.
    pub shape: Vec<String>,
}

impl About {
    /// Reads a file.
    ///
    /// # Errors
    /// [`OnnxError`]: it is no ONNX file, or damaged.
    pub fn open(path: &Path) -> Result<Self, OnnxError> {
        tract::about(path)
    }
}

/// Where the channels of a network's images are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "onnx"), expect(dead_code, reason = "a build without tract opens no network"))]
enum Layout {
    /// [N, H, W, 3]
    Last,
    /// [N, 3, H, W]
    First,
}

impl Layout {
    /// The shape of one image.
    fn shape(self, [height, width]: [usize; 2]) -> [usize; 4] {
        match self {
            Self::Last => [1, height, width, 3],
            Self::First => [1, 3, height, width],
        }
    }
}

/// A network that makes a vector of an image.
pub struct OnnxNetwork {
    path: PathBuf,
    node: String,
    layout: Layout,
    size: [usize; 2],
    any_size: bool,
    width: usize,
    fingerprint: Fingerprint,
    runnable: tract::Runnable,
}

impl OnnxNetwork {
    /// Opens a file and prepares to compute a tensor for images of the network's height and width; where the file
    /// leaves these open, for images of `size` = [height, width].
    pub fn open(path: &Path, wanted: FeatureTensor, size: Option<[usize; 2]>) -> Result<Self, OnnxError> {
        tract::open(path, wanted, size)
    }

    /// Height and width of the images.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// Whether the file leaves the size open, so that it may be opened for another one.
    pub fn any_size(&self) -> bool {
        self.any_size
    }

    /// Elements of the features.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Name of the tensor that has them.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Fingerprint of the file, and of the files beside it that hold its weights.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The features of an image [H, W, 3], of [`OnnxNetwork::size`], with values as the network wants them. `name` says
    /// which image it is, in errors.
    ///
    /// # Errors
    /// [`OnnxError::Run`]; [`OnnxError::NotFinite`].
    ///
    /// # Panics
    /// If `image` does not have H * W * 3 values.
    pub fn features(&self, image: &[f32], name: &str) -> Result<Vec<f32>, OnnxError> {
        let [height, width] = self.size;
        assert_eq!(image.len(), height * width * 3, "values of an image of {width}x{height}");
        let shape = self.layout.shape(self.size);
        let features = match self.layout {
            Layout::Last => self.runnable.run(&shape, image),
            Layout::First => self.runnable.run(&shape, &transposed(image, 3).collect::<Vec<f32>>()),
        };
        let features = features.map_err(|what| OnnxError::Run { path: self.path.clone(), what })?;
        match features.len() == self.width && features.iter().all(|x| x.is_finite()) {
            true => Ok(features),
            false => Err(OnnxError::NotFinite { path: self.path.clone(), what: name.into() }),
        }
    }
}

/// A build without tract opens no network.
#[cfg(not(feature = "onnx"))]
mod tract {
    use super::{About, FeatureTensor, OnnxError, OnnxNetwork, Path};

    pub enum Runnable {}

    impl Runnable {
        pub fn run(&self, _: &[usize], _: &[f32]) -> Result<Vec<f32>, String> {
            match *self {}
        }
    }

    pub fn open(path: &Path, _: FeatureTensor, _: Option<[usize; 2]>) -> Result<OnnxNetwork, OnnxError> {
        Err(OnnxError::NotBuilt { path: path.into() })
    }

    pub fn about(path: &Path) -> Result<About, OnnxError> {
        Err(OnnxError::NotBuilt { path: path.into() })
    }
}
