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
mod output;
mod viewer;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use conditions::{Condition, ConditionError};
pub use domain::{Domain, Mismatch, learned_from};
pub use output::{Kept, OutDir, OutputError};
pub use viewer::Viewer;

use crate::backend::{BackendError, NetworkBackend};
use crate::codec::{CodecError, CodecFile, LATENTS};
use crate::condition::tagger::Tagger;
use crate::condition::vae::Vae;
use crate::data::prepare::encoder;
use crate::device::{Backends, Device, Work};
use crate::formats::fingerprint::{Identity, name};
use crate::formats::safetensors::{SafeError, SafeFile};
use crate::formats::{At, FileError};
pub use crate::memory::TooLarge;
use crate::model::{Encoder, Model, ModelError, ModelMeta, Precond};
use crate::pictures::{Picture, PictureError, decode, fit, to_model};
use crate::sample::{self, Batch, Observe, SampleError, Sampler, SamplerConfig};

/// The program, as text chunks name it.
pub const SOFTWARE: &str = concat!("edm2k ", env!("CARGO_PKG_VERSION"));

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// The images take these in turn; without any they are unconditional.
    pub conditions: Vec<Condition>,
    /// Images of each condition before the next one; 0 counts as 1.
    pub per_condition: usize,
    /// One image for each.
    pub seeds: Vec<u64>,
    /// Of each image another seed, and the share of its noise, 0 to 1; empty: none.
    pub towards: Vec<(u64, f64)>,
    /// What all images begin from, beside noise; see [`SamplerConfig::strength`].
    pub from: Option<Beginning>,
    /// [height, width] of the images, or latents; none: what the model was trained on.
    pub size: Option<[usize; 2]>,
    /// How images come out of noise.
    pub sampler: SamplerConfig,
    /// Images at a time, 0 counts as 1: changes speed and memory, not the images.
    pub batch: usize,
}

impl Default for Request {
    /// One unconditional image of seed 0.
    fn default() -> Self {
        Self {
            conditions: Vec::new(),
            per_condition: 1,
            seeds: vec![0],
            towards: Vec::new(),
            from: None,
            size: None,
            sampler: SamplerConfig::default(),
            batch: 4,
        }
    }
}

impl Request {
    /// Place of the condition of image number `number`; none if it is unconditional.
    pub fn condition_of(&self, number: usize) -> Option<usize> {
        let count = self.conditions.len();
        (count > 0).then(|| number / self.per_condition.max(1) % count)
    }

    /// A row of `count` images on the way from the first to the second of two conditions, of two seeds, or of both.
    ///
    /// # Errors
    /// [`NotTwo`].
    pub fn interpolated(mut self, count: usize) -> Result<Self, NotTwo> {
        let (conditions, seeds) = (self.conditions.len(), self.seeds.len());
        if !matches!((conditions, seeds), (2, 1 | 2) | (0 | 1, 2)) {
            return Err(NotTwo { conditions, seeds });
        }
        let share = |i: usize| i as f64 / (count.max(2) - 1) as f64;
        if let [a, b] = &self.conditions[..] {
            self.conditions = (0..count).map(|i| Condition::between(a, b, share(i))).collect();
        }
        if let [_, other] = self.seeds[..] {
            self.towards = (0..count).map(|i| (other, share(i))).collect();
        }
        (self.seeds, self.per_condition) = (vec![self.seeds[0]; count], 1);
        Ok(self)
    }
}

/// There are not two things to interpolate between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{conditions} conditions and {seeds} seeds, expected two of either, or of both, and no others")]
pub struct NotTwo {
    /// Conditions given.
    pub conditions: usize,
    /// Seeds given.
    pub seeds: usize,
}

/// An image that others begin from.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// In model space, [height, width, channels].
    pub values: Vec<f32>,
    /// What it is called, for people.
    pub name: String,
}

/// One image that was made.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its place among the seeds of the request.
    pub number: usize,
    /// Its seed.
    pub seed: u64,
    /// What the network made, [height, width, channels]: pixels from -1 to 1, or latents.
    pub values: Vec<f32>,
    /// As a picture; none of latents without an autoencoder.
    pub picture: Option<Picture>,
    /// All parameters that it was made with.
    pub about: Value,
}

impl Image {
    /// The PNG file of the picture, with its parameters in a text chunk: what `edm2k sample` writes.
    ///
    /// # Errors
    /// [`PipelineError::NoPicture`]: latents without an autoencoder have none. [`PipelineError::Png`]: it is too large for one.
    pub fn png(&self) -> Result<Vec<u8>, PipelineError> {
        let picture = self.picture.as_ref().ok_or(PipelineError::NoPicture)?;
        picture.png(&text_of(&self.about.to_string())).map_err(PipelineError::Png)
    }
}

/// Keywords and texts of the chunks that a PNG carries, of what is known of it.
fn text_of(about: &str) -> [(&str, &str); 2] {
    [("Software", SOFTWARE), ("edm2k", about)]
}

/// What [`Images::watched`] is shown after each step of a batch.
pub struct Step<'a> {
    /// Place of the batch's first image among the seeds of the request.
    pub first: usize,
    /// Images of the batch.
    pub images: usize,
    /// Index of the step, from 0.
    pub index: usize,
    /// Number of steps.
    pub of: usize,
    /// Noise level that the step began at.
    pub sigma: f64,
    size: [usize; 2],
    download: &'a mut dyn FnMut() -> Result<Vec<f32>, BackendError>,
    viewer: Option<&'a mut Viewer>,
}

impl Step<'_> {
    /// What the network takes the images for so far, [images, height, width, channels].
    ///
    /// # Errors
    /// The device's.
    pub fn denoised(&mut self) -> Result<Vec<f32>, PipelineError> {
        Ok((self.download)()?)
    }

    /// The same as pictures, by the autoencoder for previews if there is one; none without any autoencoder.
    ///
    /// # Errors
    /// The device's.
    pub fn pictures(&mut self) -> Result<Vec<Picture>, PipelineError> {
        let values = self.denoised()?;
        let Some(viewer) = &mut self.viewer else { return Ok(Vec::new()) };
        let pictures = values.chunks(values.len() / self.images).map(|image| viewer.picture(self.size, image));
        Ok(pictures.collect::<Result<_, _>>()?)
    }
}

/// Why there are no images.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PipelineError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Condition(#[from] ConditionError),
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    #[error("{} makes no latents of an SD-VAE, but pixels", model.display())]
    NoLatents { model: PathBuf },
    #[error("{0} has no latents, but pixels")]
    Pixels(String),
    #[error("condition {number} has {found} values, expected the model's {expected}")]
    ConditionWidth { number: usize, found: usize, expected: usize },
    #[error("{found} seeds to go towards, expected one for each of the {expected} images")]
    Towards { found: usize, expected: usize },
    #[error("{}: {why}", path.display())]
    Picture { path: PathBuf, why: Box<PictureError> },
    #[error("{} makes latents, so a picture needs an autoencoder to begin from", model.display())]
    NoCodec { model: PathBuf },
    #[error("{}: an image of shape {found:?}, expected {expected:?}", path.display())]
    Shape { path: PathBuf, found: Vec<usize>, expected: [usize; 3] },
    #[error(transparent)]
    File(#[from] SafeError),
    #[error(transparent)]
    Memory(#[from] TooLarge),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("latents have no picture")]
    NoPicture,
    #[error("no PNG: {0}")]
    Png(io::Error),
    /// Whoever watched wanted no more.
    #[error("stopped")]
    Stopped,
}

/// A model on a device with all that makes pictures of it: where conditions come from, a sampler, an autoencoder.
///
/// It lives in one thread, as devices do; requests and images go to others. Its weights are put on the device when they
/// are first needed, see [`Pipeline::ready`].
pub struct Pipeline {
    device: Device,
    path: PathBuf,
    meta: ModelMeta,
    net: Precond,
    guide: Option<PathBuf>,
    /// The model, and what guides it, until they are on the device.
    weights: Vec<Model>,
    network: Option<Box<dyn Network>>,
    codec: Option<PathBuf>,
    viewer: Option<Viewer>,
    preview: Option<Viewer>,
    inventor: Option<(PathBuf, Vae)>,
    tagger: Option<Tagger>,
    warnings: Vec<String>,
}

impl Pipeline {
    /// Opens a model file.
    ///
    /// # Errors
    /// [`PipelineError::Model`].
    pub fn load(device: &Device, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        let model = Model::load(&path)?;
        let pixels = model.meta.encoder == Encoder::Rgb && model.net.config.img_channels == 3;
        Ok(Self {
            device: device.clone(),
            path: path.as_ref().into(),
            meta: model.meta.clone(),
            net: model.net.clone(),
            guide: None,
            weights: vec![model],
            network: None,
            codec: None,
            viewer: pixels.then_some(Viewer::Pixels),
            preview: None,
            inventor: None,
            tagger: None,
            warnings: Vec::new(),
        })
    }

    /// Takes another network to guide away from (autoguidance); without one, it is the model without its condition.
    ///
    /// # Errors
    /// [`PipelineError::Model`], or [`PipelineError::Mismatch`] if it is one of other images or conditions.
    pub fn with_guide(mut self, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        let path = path.as_ref();
        let guide = Model::load(path)?;
        let theirs = Domain::of_model(&guide.net.config, &guide.meta);
        theirs.check(path.display(), &self.domain(), self.path.display())?;
        self.guide = Some(path.into());
        self.weights.push(guide);
        Ok(self)
    }

    /// Takes the autoencoder that makes pictures of the model's latents: an SD-VAE or TAESD.
    ///
    /// # Errors
    /// [`PipelineError::NoLatents`], or [`PipelineError::Codec`] if it is none, or known to be another one than that of
    /// the latents.
    pub fn with_codec(mut self, path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        self.viewer = Some(self.viewer_of(path.as_ref())?);
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
        if self.meta.encoder != Encoder::SdVae || self.net.config.img_channels != LATENTS {
            return Err(PipelineError::NoLatents { model: self.path.clone() });
        }
        let of = self.path.display().to_string();
        let (viewer, warning) = Viewer::open(&self.device, path, &of, self.meta.autoencoder.as_ref())?;
        self.warnings.extend(warning);
        Ok(viewer)
    }

    /// A file for images of a request to begin from: latents [C, H, W] or [1, C, H, W] as .safetensors (the only tensor,
    /// or the one named "latents"), or a picture, which is cropped and resized to `size` = [height, width] as `prepare`
    /// does, and encoded by the autoencoder if the model makes latents.
    ///
    /// # Errors
    /// [`PipelineError`]: it cannot be read, is of another shape, or there is no autoencoder to encode it.
    pub fn beginning(&mut self, path: impl AsRef<Path>, size: [usize; 2]) -> Result<Beginning, PipelineError> {
        let (path, name) = (path.as_ref(), path.as_ref().display().to_string());
        let [height, width] = size;
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let (file, channels) = (SafeFile::open(path)?, self.net.config.img_channels);
            let names: Vec<_> = file.names().collect();
            let tensor = if let [one] = names[..] { one } else { "latents" };
            let (expected, found) = ([channels, height, width], file.shape(tensor)?);
            if found.strip_prefix(&[1]).unwrap_or(found) != expected {
                return Err(PipelineError::Shape { path: path.into(), found: found.to_vec(), expected });
            }
            let (planar, area) = (file.f32(tensor)?, height * width);
            let values = (0..planar.len()).map(|i| planar[i % channels * area + i / channels]).collect();
            return Ok(Beginning { values, name });
        }
        let wrong = |why: PictureError| PipelineError::Picture { path: path.into(), why: why.into() };
        let image = decode::open(path, Tagger::BACKGROUND).map_err(wrong)?;
        if let Some(profile) = image.unapplied {
            self.warnings.push(format!("{name}: its colour profile ({profile}) cannot be applied; taken for sRGB"));
        }
        let codec = match (self.meta.encoder, &self.codec) {
            (Encoder::Rgb, _) => None,
            (Encoder::SdVae, Some(path)) => Some(CodecFile::open(path)?),
            (Encoder::SdVae, None) => return Err(PipelineError::NoCodec { model: self.path.clone() }),
        };
        let factor = codec.as_ref().map_or(1, CodecFile::factor);
        let target = [width, height].map(|side| (side * factor) as u32);
        let crop = fit::crop([image.picture.width() as u32, image.picture.height() as u32], target);
        let picture = fit::fit(image.picture, crop, target).map_err(wrong)?;
        let values = match codec {
            None => picture.rgb().iter().copied().map(to_model).collect(),
            Some(codec) => {
                let [mean, _] = encoder(&self.device, &codec)?(&picture)?;
                mean
            }
        };
        Ok(Beginning { values, name })
    }

    /// Warnings since the last call, such as that something stands in for something else.
    pub fn warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// What computes.
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

    /// Whether pictures come out; else latents, as there is no autoencoder.
    pub fn makes_pictures(&self) -> bool {
        self.viewer.is_some()
    }

    /// Puts the weights on the device, which [`Pipeline::images`] does otherwise.
    ///
    /// # Errors
    /// The device's: they do not fit, for one.
    pub fn ready(&mut self) -> Result<(), PipelineError> {
        if self.network.is_none() {
            self.network = Some(self.device.run(Placing(&self.weights))?);
            self.weights = Vec::new();
        }
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
        let expected = config.label_dim;
        for (number, Condition { values, away, .. }) in request.conditions.iter().enumerate() {
            let away = Some(away).filter(|away| !away.is_empty());
            if let Some(wrong) = [Some(values), away].into_iter().flatten().find(|values| values.len() != expected) {
                return Err(PipelineError::ConditionWidth { number, found: wrong.len(), expected });
            }
        }
        let (found, expected) = (request.towards.len(), request.seeds.len());
        if found > 0 && found != expected {
            return Err(PipelineError::Towards { found, expected });
        }
        let images = request.seeds.len().min(request.batch.max(1));
        self.device.check_forward(config, size, images, request.sampler.copies(self.guide.is_none()))?;
        self.viewer.iter().chain(&self.preview).try_for_each(|viewer| viewer.check(size))?;
        Ok(())
    }

    /// The files that were given, by what they are for. Reads them: whoever makes parts of the same knows it by them.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn files(&self) -> Result<Vec<(&'static str, Identity)>, FileError> {
        let files = [("model", Some(&self.path)), ("gnet", self.guide.as_ref()), ("vae", self.codec.as_ref())];
        let given = files.into_iter().filter_map(|(key, path)| Some((key, path?)));
        given.map(|(key, path)| Ok((key, Identity::of_file(path).at(path)?))).collect()
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
        Ok(Images {
            common: self.parameters(request),
            pipeline: self,
            request,
            watch: None,
            next: 0,
            end: request.seeds.len(),
            made: VecDeque::new(),
            spent: Spent::default(),
        })
    }

    /// Parameters that all images of a request have in common. Of files the names: where they lie is nobody else's business.
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
        for (key, path) in [("gnet", &self.guide), ("vae", &self.codec)] {
            if let Some(path) = path {
                all[key] = name(path).into();
            }
        }
        all
    }
}

/// Sees each step, and stops the work by an error.
type Watch<'a> = dyn FnMut(&mut Step) -> Result<(), PipelineError> + 'a;

/// Where the time went that images took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// In the network, from noise to images in model space.
    pub sampling: Duration,
    /// Making pictures of those.
    pub decoding: Duration,
}

/// The images of a request, made as they are asked for.
pub struct Images<'a> {
    pipeline: &'a mut Pipeline,
    request: &'a Request,
    common: Value,
    watch: Option<Box<Watch<'a>>>,
    /// Number of the first image that has not been made.
    next: usize,
    /// Number of the first image that is not to be made any more.
    end: usize,
    /// Images of the current batch that were made and not yet handed out.
    made: VecDeque<(usize, Vec<f32>)>,
    spent: Spent,
}

impl Request {
    /// What image `number` says of itself, given [what all say](Pipeline::parameters).
    pub fn about(&self, common: &Value, number: usize) -> Value {
        let mut about = common.clone();
        about["seed"] = self.seeds[number].into();
        if let Some(&(seed, share)) = self.towards.get(number) {
            about["towards"] = json!({"seed": seed, "share": share});
        }
        let condition = self.condition_of(number).map(|row| self.conditions[row].origin.clone());
        about["condition"] = condition.unwrap_or(Value::Null);
        about
    }
}

impl<'a> Images<'a> {
    /// Has `watch` see each step of each batch; by an error, such as [`PipelineError::Stopped`], it stops the work. On
    /// a GPU, steps that are watched cost a little more than those that nobody sees.
    #[must_use]
    pub fn watched(mut self, watch: impl FnMut(&mut Step) -> Result<(), PipelineError> + 'a) -> Self {
        self.watch = Some(Box::new(watch));
        self
    }

    /// Makes only images `range`. They are those of the whole request if the range begins at a batch.
    #[must_use]
    pub fn only(mut self, range: Range<usize>) -> Self {
        self.end = range.end.min(self.request.seeds.len());
        self.next = range.start.min(self.end);
        self
    }

    /// Where the time went so far.
    pub fn spent(&self) -> Spent {
        self.spent
    }

    /// Makes the next batch.
    fn batch(&mut self) -> Result<(), PipelineError> {
        let began = Instant::now();
        let (request, first) = (self.request, self.next);
        let last = self.end.min(first + request.batch.max(1));
        let pipeline = &mut *self.pipeline;
        let (size, guide) = (pipeline.size(request), pipeline.guide.is_some());
        let conditions: Vec<&Condition> =
            (first..last).filter_map(|number| Some(&request.conditions[request.condition_of(number)?])).collect();
        let labels: Vec<f32> = conditions.iter().flat_map(|condition| &condition.values).copied().collect();
        let mut away = Vec::new();
        if conditions.iter().any(|condition| !condition.away.is_empty()) {
            conditions.iter().for_each(|condition| away.extend(condition.reference(guide)));
        }
        let batch = Batch {
            seeds: &request.seeds[first..last],
            size,
            labels: &labels,
            away: &away,
            towards: request.towards.get(first..last).unwrap_or_default(),
            from: request.from.as_ref().map_or(&[], |from| &from.values),
        };
        let Some(network) = &mut pipeline.network else { return Ok(()) }; // ready() has put it there
        let mut viewer = pipeline.preview.as_mut().or(pipeline.viewer.as_mut());
        let mut failed = None;
        let config = &request.sampler;
        let made = match &mut self.watch {
            None => network.sample(&batch, config, None),
            Some(watch) => network.sample(
                &batch,
                config,
                Some(&mut |index, sigma, download| {
                    let (images, of, viewer) = (last - first, config.taken(), viewer.as_deref_mut());
                    let mut step = Step { first, images, index, of, sigma, size, download, viewer };
                    watch(&mut step).map_err(|why| {
                        failed = Some(why);
                        SampleError::Stopped
                    })
                }),
            ),
        };
        if let Some(why) = failed {
            return Err(why);
        }
        let made = made?;
        self.made.extend((first..last).zip(made.chunks(made.len() / (last - first)).map(<[f32]>::to_vec)));
        self.next = last;
        self.spent.sampling += began.elapsed();
        Ok(())
    }

    fn image(&mut self, number: usize, values: Vec<f32>) -> Result<Image, PipelineError> {
        let size = self.pipeline.size(self.request);
        let began = Instant::now();
        let picture = self.pipeline.viewer.as_mut().map(|viewer| viewer.picture(size, &values)).transpose()?;
        self.spent.decoding += began.elapsed();
        let seed = self.request.seeds[number];
        Ok(Image { number, seed, values, picture, about: self.request.about(&self.common, number) })
    }
}

impl Iterator for Images<'_> {
    type Item = Result<Image, PipelineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.made.is_empty()
            && self.next < self.end
            && let Err(why) = self.batch()
        {
            self.next = self.end;
            return Some(Err(why));
        }
        let (number, values) = self.made.pop_front()?;
        Some(self.image(number, values))
    }
}

/// Sees the index and the noise level of a step, and downloads the denoised images if it wants them.
type Observer<'a> =
    dyn FnMut(usize, f64, &mut dyn FnMut() -> Result<Vec<f32>, BackendError>) -> Result<(), SampleError> + 'a;

/// A network on whichever device.
trait Network {
    /// See [`Sampler::run`].
    fn sample(
        &mut self,
        batch: &Batch,
        config: &SamplerConfig,
        observer: Option<&mut Observer>,
    ) -> Result<Vec<f32>, SampleError>;
}

/// A network and what guides it.
struct Loaded<B: NetworkBackend> {
    backend: B,
    net: Precond,
    guide: Option<(B, Precond)>,
}

impl<B: NetworkBackend> Network for Loaded<B> {
    fn sample(
        &mut self,
        batch: &Batch,
        config: &SamplerConfig,
        observer: Option<&mut Observer>,
    ) -> Result<Vec<f32>, SampleError> {
        let gnet = self.guide.as_mut().map(|(backend, net)| (backend, &*net));
        let mut sampler = Sampler { backend: &mut self.backend, net: &self.net, gnet };
        let Some(observer) = observer else { return sampler.run(batch, config, None) };
        let mut observe = |b: &mut B, step: sample::Step<B::Tensor>| {
            let mut download = || {
                let denoised = step.denoised.tensor(b);
                b.download(&denoised)
            };
            observer(step.index, step.sigma, &mut download)
        };
        let observe: &mut Observe<B> = &mut observe;
        sampler.run(batch, config, Some(observe))
    }
}

/// Puts a model, and what guides it, on a device.
struct Placing<'a>(&'a [Model]);

impl Work for Placing<'_> {
    type Output = Result<Box<dyn Network>, BackendError>;

    fn run<M: Backends>(self, backends: &M) -> Self::Output {
        let [model, guide @ ..] = self.0 else { unreachable!("a pipeline has a model") };
        let backend = backends.loaded(model)?;
        let guide = guide.last().map(|guide| Ok::<_, BackendError>((backends.loaded(guide)?, guide.net.clone())));
        Ok(Box::new(Loaded { backend, net: model.net.clone(), guide: guide.transpose()? }))
    }
}
