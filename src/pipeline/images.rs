//! The images of a request, made as they are asked for: [`Images`].

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Condition, Pipeline, PipelineError, Request, SOFTWARE, Viewer};
use crate::backend::BackendError;
use crate::pictures::Picture;
use crate::pictures::png::PARAMETERS;
use crate::sample::{Batch, SampleError, SamplerConfig};

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
    /// The PNG file of the picture, with its parameters in text chunks: what `edm2k sample` writes.
    ///
    /// # Errors
    /// [`PipelineError::NoPicture`]: latents without an autoencoder have none. [`PipelineError::Png`]: it is too large for one.
    pub fn png(&self) -> Result<Vec<u8>, PipelineError> {
        let picture = self.picture.as_ref().ok_or(PipelineError::NoPicture)?;
        let (about, infotext) = (self.about.to_string(), self.infotext(picture));
        picture.png(&text_of(&about, Some(&infotext))).map_err(PipelineError::Png)
    }

    /// See [`infotext`].
    pub(super) fn infotext(&self, picture: &Picture) -> String {
        infotext(&self.about, [picture.height(), picture.width()])
    }
}

/// The text chunks of a PNG, as (keyword, text); that of one image alone has an [`infotext`].
pub(super) fn text_of<'a>(about: &'a str, infotext: Option<&'a str>) -> Vec<(&'a str, &'a str)> {
    let infotext = infotext.map(|text| (PARAMETERS, text));
    [("Software", SOFTWARE), ("edm2k", about)].into_iter().chain(infotext).collect()
}

/// A picture of [height, width] pixels as AUTOMATIC1111's web UI describes one, and programs that know it read: the prompt,
/// the negative prompt, and a line of settings. It has no words for some conditions; all of it is in the chunk "edm2k".
pub(crate) fn infotext(about: &Value, [height, width]: [usize; 2]) -> String {
    let prompt = |condition: &Value| {
        let said = ["asked", "tags", "name", "class"].into_iter().find_map(|key| condition.get(key));
        said.map_or(String::new(), |said| said.as_str().map_or_else(|| said.to_string(), String::from))
    };
    let (condition, sampler) = (&about["condition"], &about["sampler"]);
    let (made, usual) = (SamplerConfig::deserialize(sampler).unwrap_or_default(), SamplerConfig::default());
    let mut settings = vec![
        ("Steps", json!(made.steps)),
        ("Sampler", made.solver.title().into()),
        ("Schedule type", "Karras".into()),
        ("CFG scale", made.guidance.into()),
        ("Seed", about["seed"].clone()),
        ("Size", format!("{width}x{height}").into()),
        ("Model", stem(&about["model"])),
    ];
    let unusual = [
        ("Denoising strength", json!(made.strength), made.strength != usual.strength),
        ("Schedule rho", json!(made.rho), made.rho != usual.rho),
        ("Schedule min sigma", json!(made.sigma_min), made.sigma_min != usual.sigma_min),
        ("Schedule max sigma", json!(made.sigma_max), made.sigma_max != usual.sigma_max),
        ("Sigma churn", json!(made.churn.s_churn), made.churn.s_churn != 0.0),
        ("Guidance interval", json!(made.guidance_interval), made.guidance_interval.is_some()),
        ("Guiding network", stem(&about["gnet"]), about.get("gnet").is_some()),
        ("Variation seed", about["towards"]["seed"].clone(), about.get("towards").is_some()),
        ("Variation seed strength", about["towards"]["share"].clone(), about.get("towards").is_some()),
    ];
    settings.extend(unusual.into_iter().filter(|(.., is)| *is).map(|(key, value, _)| (key, value)));
    settings.push(("Version", SOFTWARE.into()));
    // Readers split the line at commas and take what is in quotes for JSON.
    let shown = |value: &Value| match value.as_str() {
        Some(text) if !text.contains([',', '"', '\n']) => text.to_owned(),
        None if value.is_array() => json!(value.to_string()).to_string(),
        _ => value.to_string(),
    };
    let settings: Vec<_> = settings.iter().map(|(key, value)| format!("{key}: {}", shown(value))).collect();
    let negative = condition.get("negative").map(|away| format!("Negative prompt: {}", prompt(away)));
    [Some(prompt(condition)), negative, Some(settings.join(", "))].into_iter().flatten().collect::<Vec<_>>().join("\n")
}

/// A file's name without its ending.
fn stem(name: &Value) -> Value {
    Path::new(name.as_str().unwrap_or_default()).file_stem().unwrap_or_default().to_string_lossy().into()
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

debug!(Step<'_> { first, images, index, of, sigma });

impl Step<'_> {
    /// The network's current estimate of the finished images, [images, height, width, channels].
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

/// Sees each step, and stops the work by an error.
type Watcher<'a> = dyn FnMut(&mut Step) -> Result<(), PipelineError> + 'a;

/// Where the time went that images took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
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
    watch: Option<Box<Watcher<'a>>>,
    /// Numbers of the images that are still to be made.
    left: VecDeque<Range<usize>>,
    /// Images of the current batch that were made and not yet handed out.
    made: VecDeque<(usize, Vec<f32>)>,
    spent: Timings,
}

debug!(Images<'_> { left });

impl<'a> Images<'a> {
    /// Of a request that was checked, on a pipeline that is ready; `common` is what all images say of themselves.
    pub(super) fn new(pipeline: &'a mut Pipeline, request: &'a Request, common: Value) -> Self {
        let (made, spent) = (VecDeque::new(), Timings::default());
        let images = Self { pipeline, request, common, watch: None, left: VecDeque::new(), made, spent };
        images.only(std::iter::once(0..request.seeds.len()))
    }

    /// Has `watch` see each step of each batch; by an error, such as [`PipelineError::Stopped`], it stops the work. On
    /// a GPU, steps that are watched cost a little more than those that nobody sees.
    #[must_use]
    pub fn watched(mut self, watch: impl FnMut(&mut Step) -> Result<(), PipelineError> + 'a) -> Self {
        self.watch = Some(Box::new(watch));
        self
    }

    /// Makes only the images of these ranges. They are those of the whole request if each range begins at a batch.
    #[must_use]
    pub fn only(mut self, ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let count = self.request.seeds.len();
        let within = ranges.into_iter().map(|range| range.start..range.end.min(count));
        self.left = within.filter(|range| !range.is_empty()).collect();
        self
    }

    /// Where the time went so far.
    #[doc(hidden)]
    pub fn spent(&self) -> Timings {
        self.spent
    }

    /// Makes the next batch.
    fn batch(&mut self) -> Result<(), PipelineError> {
        let began = Instant::now();
        let (request, Some(range)) = (self.request, self.left.pop_front()) else { return Ok(()) };
        let first = range.start;
        let last = range.end.min(first + request.batch);
        if last < range.end {
            self.left.push_front(last..range.end);
        }
        let size = self.pipeline.size(request);
        let Pipeline { device, guide, networks, viewer, preview, .. } = &mut *self.pipeline;
        let conditions: Vec<&Condition> =
            (first..last).filter_map(|number| Some(&request.conditions[request.condition_of(number)?])).collect();
        let labels: Vec<f32> = conditions.iter().flat_map(|condition| &condition.values).copied().collect();
        let mut away = Vec::new();
        if conditions.iter().any(|condition| condition.away.is_some()) {
            conditions.iter().for_each(|condition| away.extend(condition.reference(guide.is_some())));
        }
        let batch = Batch {
            seeds: &request.seeds[first..last],
            size,
            labels: &labels,
            away: &away,
            towards: request.towards.get(first..last).unwrap_or_default(),
            from: request.from.as_ref().map_or(&[], |from| &from.values),
        };
        let network = networks.placed(device)?;
        let mut viewer = preview.as_mut().or(viewer.as_mut());
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
            && let Err(why) = self.batch()
        {
            self.left.clear();
            return Some(Err(why));
        }
        let (number, values) = self.made.pop_front()?;
        Some(self.image(number, values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_programs_read_what_differs_from_the_usual() {
        let mut about = json!({"model": "a,b.c.safetensors", "seed": 7, "sampler": SamplerConfig::default()});
        let said = |about: &Value| infotext(about, [704, 512]);
        let usual = "Steps: 16, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 7, Size: 512x704, \
                     Model: \"a,b.c\"";
        assert_eq!(said(&about), format!("\n{usual}, Version: {SOFTWARE}"));
        for (condition, prompt) in [
            (json!({"asked": "cat", "tags": "cat, face"}), "cat"),
            (json!({"class": 3, "name": "shark"}), "shark"),
            (json!({"class": 3}), "3"),
            (json!({"tags": "dog", "negative": {"class": 4}}), "dog\nNegative prompt: 4"),
        ] {
            about["condition"] = condition;
            assert_eq!(said(&about), format!("{prompt}\n{usual}, Version: {SOFTWARE}"));
        }
        about["condition"] = Value::Null;
        about["gnet"] = "g.pkl".into();
        about["towards"] = json!({"seed": 9, "share": 0.25});
        about["sampler"]["strength"] = 0.3.into();
        about["sampler"]["rho"] = 6.0.into();
        about["sampler"]["guidance_interval"] = json!([0.5, 20.0]);
        let unusual = "Denoising strength: 0.3, Schedule rho: 6.0, Guidance interval: \"[0.5,20.0]\", Guiding network: g, \
                       Variation seed: 9, Variation seed strength: 0.25";
        assert_eq!(said(&about), format!("\n{usual}, {unusual}, Version: {SOFTWARE}"));
    }
}
