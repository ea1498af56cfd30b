//! From a model file to pictures: [`Pipeline`].
//!
//! ```
//! use edm2k::{Device, Pipeline, Request};
//!
//! let device = Device::open("cpu")?;
//! let mut pipeline = Pipeline::load(&device, "demo/emoji.safetensors")?;
//! let conditions = vec![pipeline.tags("cat, face", 0)?, pipeline.tags("red, heart", 0)?];
//! let mut request = Request { conditions, seeds: vec![7, 8], ..Request::default() };
//! request.sampler.steps = 2; // 16 make better ones
//! for image in pipeline.generate(&request)? {
//!     assert!(image.png()?.starts_with(b"\x89PNG"));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod conditions;
mod domain;
mod images;
mod output;
mod request;
mod viewer;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use conditions::{Condition, ConditionError};
#[doc(hidden)]
pub use domain::learned_from;
pub use domain::{Domain, Mismatch};
#[doc(hidden)]
pub use images::Timings;
pub use images::{Image, Images, Step};
#[doc(hidden)]
pub use output::{Lacking, OutDir, OutputError, OutputKind};
use request::check_conditions;
pub use request::{Beginning, FewSeeds, NotTwo, Request};
pub use viewer::Viewer;
#[cfg(feature = "serve")]
pub(crate) use {images::infotext, request::enough_seeds};

use crate::backend::{BackendError, NetworkBackend, Shape};
use crate::codec::{CodecError, CodecFile, LATENTS};
use crate::condition::classes::Classes;
use crate::condition::tagger::Tagger;
use crate::condition::vae::Vae;
use crate::device::{Backends, Device, Work};
use crate::formats::fingerprint::{Fingerprint, Identity, name};
use crate::formats::safetensors::{SafeError, SafeFile};
use crate::formats::{At, FileError, ends_in, transposed};
use crate::memory;
pub use crate::memory::TooLarge;
use crate::model::{Config, ImageSpace, Model, ModelError, ModelMeta, Precond};
use crate::pictures::{PictureError, Size, decode, fit, to_model};
use crate::sample::{self, Batch, Observe, SampleError, Sampler, SamplerConfig};

/// The program's name and version, as text chunks have them.
pub(crate) const SOFTWARE: &str = concat!("edm2k ", env!("CARGO_PKG_VERSION"));

/// Why there are no images.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum PipelineError {
    #[error("{0}")]
    Model(#[from] ModelError),
    #[error("{0}")]
    Condition(#[from] ConditionError),
    #[error("{0}")]
    Mismatch(#[from] Mismatch),
    #[error("{} makes no latents of an SD-VAE, but pixels", model.display())]
    NoLatents { model: PathBuf },
    #[error("{0} has no latents, but pixels")]
    Pixels(String),
    #[error("condition {number} has {found} values, expected the model's {expected}")]
    ConditionWidth { number: usize, found: usize, expected: usize },
    #[error("condition {number} has a value that is no finite number")]
    ConditionValue { number: usize },
    #[error("{found} seeds to go towards, expected one for each of the {expected} images")]
    Towards { found: usize, expected: usize },
    #[error("{}: {why}", path.display())]
    Picture { path: PathBuf, why: Box<PictureError> },
    #[error("{} makes latents, so a picture needs an autoencoder to begin from", model.display())]
    NoCodec { model: PathBuf },
    #[error("{}: an image of shape {found:?}, expected {expected:?}", path.display())]
    Shape { path: PathBuf, found: Vec<usize>, expected: [usize; 3] },
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{0}")]
    Memory(#[from] TooLarge),
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("{0}")]
    Sample(#[from] SampleError),
    #[error("{0}")]
    NotTwo(#[from] NotTwo),
    #[error("{0}")]
    FewSeeds(#[from] FewSeeds),
    #[error("a negative does nothing at guidance 1, which leads away from nothing")]
    UnusedNegative,
    #[error("{} guides and takes no condition, so a negative does nothing", guide.display())]
    NegativeOfGuide { guide: PathBuf },
    #[error("{0}")]
    Backend(#[from] BackendError),
    #[error("latents have no picture")]
    NoPicture,
    #[error("{}: it has changed since it was loaded", path.display())]
    Changed { path: PathBuf },
    #[error("no PNG: {0}")]
    Png(io::Error),
    /// Whoever watched stopped the work.
    #[error("stopped")]
    Stopped,
}

/// Another network that a model is guided away from.
struct Guide {
    path: PathBuf,
    /// Whether it takes conditions.
    conditional: bool,
}

/// A model on a device, with all that is needed to make pictures: sources of conditions, a sampler, an autoencoder.
///
/// It stays in one thread, as devices do. Requests and images can be sent to other threads. Its weights are put on the
/// device when they are first needed, see [`Pipeline::ready`].
pub struct Pipeline {
    device: Device,
    path: PathBuf,
    /// What the images depend on, by what it is for: the model, what guides it, the autoencoder.
    files: BTreeMap<&'static str, Identity>,
    meta: ModelMeta,
    net: Precond,
    guide: Option<Guide>,
    networks: Networks,
    codec: Option<PathBuf>,
    viewer: Option<Viewer>,
    preview: Option<Viewer>,
    class_names: Classes,
    inventor: Option<(PathBuf, Vae)>,
    tagger: Option<Tagger>,
    warnings: Vec<String>,
}

debug!(Pipeline { path, device });

impl Pipeline {
    /// Opens a model file.
    ///
    /// # Errors
    /// [`PipelineError::Model`].
    pub fn load(device: &Device, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        let mut model = Model::load(&path)?;
        let warnings = std::mem::take(&mut model.doubts);
        let pixels = model.meta.encoder == ImageSpace::Rgb && model.net.config.img_channels == 3;
        Ok(Self {
            device: device.clone(),
            path: path.as_ref().into(),
            files: BTreeMap::from([("model", Identity::of_file(path.as_ref()).at(path)?)]),
            meta: model.meta.clone(),
            net: model.net.clone(),
            guide: None,
            networks: Networks::Loaded { model: Box::new(model), guide: None },
            codec: None,
            viewer: pixels.then_some(Viewer::PIXELS),
            preview: None,
            class_names: Classes::default(),
            inventor: None,
            tagger: None,
            warnings,
        })
    }

    /// Takes another network to guide away from (autoguidance); without one, it is the model without its condition. At
    /// guidance 1 it is not needed.
    ///
    /// # Errors
    /// [`PipelineError::Model`]; or [`PipelineError::Mismatch`] if that network is for other images or conditions; or
    /// [`PipelineError::Changed`] if the model is on the device already, and its file is another by now.
    pub fn with_guide(mut self, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        let path = path.as_ref();
        let mut guide = Model::load(path)?;
        self.warnings.append(&mut guide.doubts);
        let theirs = Domain::of_model(&guide.net.config, &guide.meta);
        theirs.check_guide(path.display(), &self.domain(), self.path.display())?;
        self.warnings.extend(theirs.doubt(path.display(), &self.domain(), self.path.display()));
        let [found, expected] = [&guide.meta, &self.meta].map(|meta| format!("{}x{}", meta.width, meta.height));
        if found != expected {
            let (path, model) = (path.display(), self.path.display());
            self.warnings.push(format!("{path}: it learned from images of {found}, {model} from {expected}"));
        }
        self.files.insert("gnet", Identity::of_file(path).at(path)?);
        self.guide = Some(Guide { path: path.into(), conditional: guide.net.config.label_dim > 0 });
        let model = match self.networks {
            Networks::Loaded { model, .. } => model,
            // The device has the weights; the file has them too, unless it is another by now.
            Networks::Placed(_) => {
                let found = Identity::of_file(&self.path).at(&self.path)?;
                if self.files.get("model") != Some(&found) {
                    return Err(PipelineError::Changed { path: self.path });
                }
                Box::new(Model::load(&self.path)?)
            }
        };
        self.networks = Networks::Loaded { model, guide: Some(Box::new(guide)) };
        Ok(self)
    }

    /// Takes the autoencoder that makes pictures of the model's latents: an SD-VAE or TAESD.
    ///
    /// # Errors
    /// [`PipelineError::NoLatents`]; or [`PipelineError::Codec`] if the file is no autoencoder, or known to be another
    /// one than that of the latents.
    pub fn with_codec(mut self, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        self.viewer = Some(self.viewer_of(path.as_ref())?);
        self.files.insert("vae", Identity::of_file(path.as_ref()).at(&path)?);
        self.codec = Some(path.as_ref().into());
        Ok(self)
    }

    /// Takes an autoencoder for [`Step::pictures`] alone, such as a TAESD, which is quick.
    ///
    /// # Errors
    /// As [`Pipeline::with_codec`].
    pub fn with_preview(mut self, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        self.preview = Some(self.viewer_of(path.as_ref())?);
        Ok(self)
    }

    fn viewer_of(&mut self, path: &Path) -> Result<Viewer, PipelineError> {
        if self.meta.encoder != ImageSpace::SdVae || self.net.config.img_channels != LATENTS {
            return Err(PipelineError::NoLatents { model: self.path.clone() });
        }
        let of = self.path.display().to_string();
        let (viewer, warning) = Viewer::open(&self.device, path, &of, self.meta.autoencoder.as_ref())?;
        self.warnings.extend(warning);
        Ok(viewer)
    }

    /// Reads what the images of a request are to begin from. It may be latents [C, H, W] or [1, C, H, W] as
    /// .safetensors (the only tensor, or the one named "latents"). Or it is a picture, which is cropped and resized to
    /// `size` = [height, width] as `prepare` does, and encoded by the autoencoder if the model makes latents.
    ///
    /// # Errors
    /// [`PipelineError`]: it cannot be read, is of another shape, or there is no autoencoder to encode it.
    pub fn beginning(&mut self, path: impl AsRef<Path>, size: [usize; 2]) -> Result<Beginning, PipelineError> {
        let (path, shown) = (path.as_ref(), path.as_ref().display().to_string());
        let [height, width] = size;
        if ends_in(path, "safetensors") {
            let (file, channels) = (SafeFile::open(path)?, self.net.config.img_channels);
            let names: Vec<_> = file.names().collect();
            let tensor = if let [one] = names[..] { one } else { "latents" };
            let (expected, found) = ([channels, height, width], file.shape(tensor)?);
            if found.strip_prefix(&[1]).unwrap_or(found) != expected {
                return Err(PipelineError::Shape { path: path.into(), found: found.to_vec(), expected });
            }
            let values = transposed(&file.finite_f32(tensor)?, height * width).collect();
            return Ok(Beginning { values, name: name(path) });
        }
        let wrong = |why: PictureError| PipelineError::Picture { path: path.into(), why: why.into() };
        let image = decode::open(path, decode::WHITE).map_err(wrong)?;
        self.warnings.extend(image.warning(&shown));
        let codec = match (self.meta.encoder, &self.codec) {
            (ImageSpace::Rgb, _) => None,
            (ImageSpace::SdVae, Some(path)) => Some(CodecFile::open(path)?),
            (ImageSpace::SdVae, None) => return Err(PipelineError::NoCodec { model: self.path.clone() }),
        };
        let factor = codec.as_ref().map_or(1, CodecFile::factor);
        let target = Size { width: (width * factor) as u32, height: (height * factor) as u32 };
        let crop = fit::crop(image.picture.size(), target);
        if crop.lost > 0.2 {
            self.warnings.push(format!("{shown}: {:.0} % of it is cut off to fit it to {target}", 100.0 * crop.lost));
        }
        let picture = fit::fit(image.picture, crop, target).map_err(wrong)?;
        let values = match codec {
            None => picture.rgb().iter().copied().map(to_model).collect(),
            Some(codec) => {
                let [mean, _] = self.device.encoder(&codec)?(&picture)?;
                mean
            }
        };
        Ok(Beginning { values, name: name(path) })
    }

    /// Warnings since the last call, such as that something stands in for something else.
    pub fn warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Whether the model has never seen an image without its condition, as far as its file says, and there is no other network.
    /// Then guidance has nothing to lead away from but negative prompts, and pictures get worse by it.
    pub fn cannot_guide(&self) -> bool {
        self.guide.is_none() && self.meta.is_always_conditional(&self.net.config)
    }

    /// The device that computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the model's file says of it.
    pub fn meta(&self) -> &ModelMeta {
        &self.meta
    }

    /// The network.
    pub fn net(&self) -> &Precond {
        &self.net
    }

    /// What the model works on.
    pub fn domain(&self) -> Domain {
        Domain::of_model(&self.net.config, &self.meta)
    }

    /// Whether pictures come out. Otherwise latents do, as there is no autoencoder.
    pub fn makes_pictures(&self) -> bool {
        self.viewer.is_some()
    }

    /// Puts the weights on the device. Without this call, [`Pipeline::images`] does so.
    ///
    /// # Errors
    /// The device's: they do not fit, for one.
    pub fn ready(&mut self) -> Result<(), PipelineError> {
        self.networks.placed(&self.device)?;
        Ok(())
    }

    /// [height, width] of the request's images, or latents.
    pub fn size(&self, request: &Request) -> [usize; 2] {
        request.size.unwrap_or([self.meta.height, self.meta.width])
    }

    /// Checks everything about a request that can be wrong before anything is computed.
    ///
    /// # Errors
    /// What is wrong with it, or that this machine has no room for it.
    pub fn check(&self, request: &Request) -> Result<(), PipelineError> {
        let (size, config) = (self.size(request), &self.net.config);
        request.sampler.validate()?;
        config.check_size(size[0], size[1]).map_err(SampleError::from)?;
        request.check_counts(config.label_dim, size[0] * size[1] * config.img_channels)?;
        let (negative, guided) = (request.has_negative(), request.sampler.guidance != 1.0);
        if negative && !guided {
            return Err(PipelineError::UnusedNegative);
        }
        if let Some(guide) = self.guide.as_ref().filter(|guide| negative && !guide.conditional) {
            return Err(PipelineError::NegativeOfGuide { guide: guide.path.clone() });
        }
        let images = request.seeds.len().min(request.batch);
        check_forward(&self.device, config, size, images, request.sampler.copies(self.guide.is_none()))?;
        self.viewer.iter().chain(&self.preview).try_for_each(|viewer| viewer.check(size))?;
        Ok(())
    }

    /// The files that images depend on, by what they are for: processes that make parts of one request compare them.
    pub fn files(&self) -> &BTreeMap<&'static str, Identity> {
        &self.files
    }

    /// The network by itself, for a solver of one's own: D(x; sigma) of noisy images x [n, height, width, channels] at their
    /// noise levels sigma `[n]`, each under its condition; without conditions, all under none. Nothing is guided, so negatives
    /// play no role.
    ///
    /// ```
    /// use edm2k::{Device, Pipeline};
    ///
    /// let mut pipeline = Pipeline::load(&Device::open("cpu")?, "demo/emoji.safetensors")?;
    /// let conditions = [pipeline.tags("green, heart", 0)?];
    /// let (levels, mut x) = ([80.0, 20.0, 5.0, 1.0, 0.2, 0.0], vec![0.0; 32 * 32 * 3]);
    /// // Noise of standard deviation 80; a program would draw its own.
    /// x.iter_mut().enumerate().for_each(|(i, x)| *x = 80.0 * 1.4 * ((i * i) as f32).sin());
    /// for (sigma, next) in levels.iter().zip(&levels[1..]) {
    ///     let denoised = pipeline.denoise([32, 32], &x, &[*sigma], &conditions)?;
    ///     // Euler's method: dx/dsigma = (x - D(x; sigma)) / sigma.
    ///     x.iter_mut().zip(denoised).for_each(|(x, d)| *x += (next - sigma) * (*x - d) / sigma);
    /// }
    /// // An emoji on white: values of -1 to 1.
    /// assert!(x.iter().all(|x| x.abs() < 1.5) && x[..96].iter().all(|&corner| corner > 0.8));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A size or a condition that the model does not take; the device's.
    ///
    /// # Panics
    /// If x does not have as many values as the noise levels say, or there is another number of conditions; if there is no
    /// noise level, or one that is not above 0.
    pub fn denoise(
        &mut self,
        [height, width]: [usize; 2],
        x: &[f32],
        sigma: &[f32],
        conditions: &[Condition],
    ) -> Result<Vec<f32>, PipelineError> {
        let (config, n) = (&self.net.config, sigma.len());
        config.check_size(height, width).map_err(SampleError::from)?;
        let shape = [n, height, width, config.img_channels];
        assert_eq!(x.len(), shape.iter().product::<usize>(), "values of x [n, height, width, channels]");
        assert!(n > 0 && sigma.iter().all(|&sigma| sigma > 0.0 && sigma.is_finite()), "noise levels above 0");
        assert!(conditions.is_empty() || conditions.len() == n, "{} conditions of {n} images", conditions.len());
        check_conditions(conditions, config.label_dim)?;
        let labels: Vec<f32> = conditions.iter().flat_map(|condition| condition.values.iter().copied()).collect();
        let labels = Some(&labels[..]).filter(|labels| !labels.is_empty());
        Ok(self.networks.placed(&self.device)?.denoise(shape, x, sigma, labels)?)
    }

    /// Makes all images of a request.
    ///
    /// # Errors
    /// [`PipelineError`]; see [`Pipeline::check`].
    pub fn generate(&mut self, request: &Request) -> Result<Vec<Image>, PipelineError> {
        self.images(request)?.collect()
    }

    /// Makes the images of a request one after the other, as they are asked for: an iterator.
    ///
    /// # Errors
    /// See [`Pipeline::check`].
    pub fn images<'a>(&'a mut self, request: &'a Request) -> Result<Images<'a>, PipelineError> {
        self.check(request)?;
        self.ready()?;
        let common = self.parameters(request);
        Ok(Images::new(self, request, common))
    }

    /// Parameters that all images of a request have in common. Files are given by their names, as where they lie is
    /// nobody else's business, and by their fingerprints.
    pub fn parameters(&self, request: &Request) -> Value {
        let [height, width] = self.size(request);
        let mut all = json!({
            "model": name(&self.path),
            "images_seen": self.meta.images_seen,
            "width": width,
            "height": height,
            "sampler": request.sampler,
        });
        if let Some(from) = &request.from {
            all["from"] = from.name.clone().into();
        }
        let guided = request.sampler.guidance != 1.0;
        let used = self.files.iter().filter(|(key, _)| guided || **key != "gnet");
        let mut hashes: BTreeMap<_, _> = used.clone().map(|(key, file)| (*key, file.fingerprint)).collect();
        for (key, file) in used {
            all[*key] = file.name.clone().into();
        }
        if let Some(from) = &request.from {
            hashes.insert("from", Some(Fingerprint::of([bytemuck::cast_slice::<f32, u8>(&from.values)])));
        }
        (all["numbers"], all["hashes"]) = (self.device.rounding().into(), json!(hashes));
        all
    }
}

/// Fails if main memory cannot hold a forward pass of `images` images of [height, width], each computed `times` times
/// ([`SamplerConfig::copies`]). A GPU checks its own memory.
///
/// # Errors
/// [`TooLarge`].
#[doc(hidden)]
pub fn check_forward(
    device: &Device,
    config: &Config,
    [height, width]: [usize; 2],
    images: usize,
    times: usize,
) -> Result<(), TooLarge> {
    let needed = match device.runtime() {
        None => config.forward_bytes(images * times, height, width),
        Some(_) => 8 * images as u128 * (height * width * config.img_channels) as u128,
    };
    memory::check(format!("a batch of {images} images of {width}x{height}"), needed)
}

/// Sees the index and the noise level of a step, and downloads the denoised images if it wants them.
type Observer<'a> =
    dyn FnMut(usize, f64, &mut dyn FnMut() -> Result<Vec<f32>, BackendError>) -> Result<(), SampleError> + 'a;

/// A network on whichever device.
trait PlacedNetwork {
    /// See [`Sampler::run`].
    fn sample(
        &mut self,
        batch: &Batch,
        config: &SamplerConfig,
        observer: Option<&mut Observer>,
    ) -> Result<Vec<f32>, SampleError>;

    /// See [`Precond::denoise`].
    fn denoise(
        &mut self,
        shape: Shape,
        x: &[f32],
        sigma: &[f32],
        labels: Option<&[f32]>,
    ) -> Result<Vec<f32>, BackendError>;
}

/// The network, and what guides it: in this machine's memory until they are on the device.
enum Networks {
    Loaded { model: Box<Model>, guide: Option<Box<Model>> },
    Placed(Box<dyn PlacedNetwork>),
}

impl Networks {
    /// Those on the device, where they are put if they are not there yet.
    fn placed(&mut self, device: &Device) -> Result<&mut dyn PlacedNetwork, BackendError> {
        if let Self::Loaded { model, guide } = self {
            *self = Self::Placed(device.run(Placing(model, guide.as_deref()))?);
        }
        match self {
            Self::Placed(networks) => Ok(&mut **networks),
            Self::Loaded { .. } => unreachable!("they were placed above"),
        }
    }
}

/// A network and what guides it.
struct Placed<B: NetworkBackend> {
    backend: B,
    net: Precond,
    guide: Option<(B, Precond)>,
}

impl<B: NetworkBackend> PlacedNetwork for Placed<B> {
    fn sample(
        &mut self,
        batch: &Batch,
        config: &SamplerConfig,
        observer: Option<&mut Observer>,
    ) -> Result<Vec<f32>, SampleError> {
        let gnet = self.guide.as_mut().map(|(backend, net)| (backend, &*net));
        let mut sampler = Sampler { backend: &mut self.backend, net: &self.net, gnet };
        let Some(observer) = observer else { return sampler.run(batch, config, None) };
        let mut observe = |b: &mut B, step: sample::SolverStep<B::Tensor>| {
            let mut download = || {
                let denoised = step.denoised.tensor(b);
                b.download(&denoised)
            };
            observer(step.index, step.sigma, &mut download)
        };
        let observe: &mut Observe<B> = &mut observe;
        sampler.run(batch, config, Some(observe))
    }

    fn denoise(
        &mut self,
        shape: Shape,
        x: &[f32],
        sigma: &[f32],
        labels: Option<&[f32]>,
    ) -> Result<Vec<f32>, BackendError> {
        let (b, n) = (&mut self.backend, shape[0]);
        let mut inputs = vec![b.upload(shape, x), b.upload([n, 1, 1, 1], sigma)];
        inputs.extend(labels.map(|labels| b.upload([n, 1, 1, labels.len() / n], labels)));
        let denoised = self.net.planned(b, &inputs)?;
        b.download(&denoised)
    }
}

/// Puts a model, and what guides it, on a device.
struct Placing<'a>(&'a Model, Option<&'a Model>);

impl Work for Placing<'_> {
    type Output = Result<Box<dyn PlacedNetwork>, BackendError>;

    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let loaded = |model: &Model| -> Result<_, BackendError> {
            let mut backend = backends.sampling(&model.table)?;
            model.load_into(&mut backend)?;
            Ok((backend, model.net.clone()))
        };
        let Self(model, guide) = self;
        let (backend, net) = loaded(model)?;
        Ok(Box::new(Placed { backend, net, guide: guide.map(loaded).transpose()? }))
    }
}
