//! The thread that owns the device: it takes batches from the queue and makes pictures of them, by [`Pipeline`], as
//! `edm2k sample` does.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::offers::Offer;
use super::preview::{ColourMap, data_url};
use super::queue::{FinishedPicture, Job, JobBatch, Preview};
use super::request::CheckedRequest;
use super::{Files, ServeError, Server};
use crate::Device;
use crate::condition::classes::ANY;
use crate::condition::tagger::Tagger;
use crate::formats::write_new;
use crate::model::ImageSpace;
use crate::pictures::{Picture, decode};
use crate::pipeline::{self, Condition, Pipeline, PipelineError, Step, Viewer};

/// Previews may take this part of a batch's time.
const PREVIEWS: u32 = 4;

/// What makes pictures.
pub struct Painter {
    device: Device,
    files: Files,
    batch: usize,
    /// Those that were given, and the last snapshot of a run.
    loaded: Vec<(Arc<Offer>, Pipeline)>,
    guest: Option<(Arc<Offer>, Pipeline)>,
    linear: Option<ColourMap>,
    /// Of the jobs of the last batch.
    conditions: HashMap<u64, Vec<Condition>>,
    outdir: Option<PathBuf>,
}

/// Opens a model with all that goes with it, and says what is doubtful about it.
fn open(device: &Device, files: &Files, offer: &Offer, say: &mut dyn FnMut(&str)) -> Result<Pipeline, PipelineError> {
    let mut pipeline = Pipeline::load(device, &offer.path)?;
    let misfits = [&offer.misfits.guide, &offer.misfits.condition_model];
    misfits.into_iter().flatten().for_each(|why| say(&format!("warning: {} goes without: {why}", offer.name)));
    if let Some(path) = files.guide.as_ref().filter(|_| offer.guide.is_some()) {
        pipeline = pipeline.with_guide(path)?;
    }
    match &offer.classes {
        // Requests were checked with these, whatever the file has now.
        Some(names) if !names.is_empty() => pipeline = pipeline.with_class_names(names.clone())?,
        Some(_) => say(&format!(
            "{}: nothing says what its {} conditions mean, so they are taken for classes",
            offer.path.display(),
            offer.config.label_dim
        )),
        None => {}
    }
    if let Some(path) = files.condition_model.as_ref().filter(|_| offer.invents) {
        pipeline = pipeline.with_condition_model(path)?;
    }
    if let Some(path) = files.tagger.as_ref().filter(|_| offer.like) {
        pipeline = pipeline.with_tagger(path, files.tagger_node.as_deref())?;
    }
    if offer.meta.encoder == ImageSpace::SdVae {
        if let Some(path) = &files.vae {
            pipeline = pipeline.with_codec(path)?;
        }
        if let Some(path) = &files.preview {
            pipeline = pipeline.with_preview(path)?;
        }
    }
    pipeline.warnings().iter().for_each(|warning| say(&format!("warning: {warning}")));
    if !offer.guided() {
        say(&format!(
            "{} was trained without --cond-dropout: guidance is 1 unless a request has a negative or says another, which \
             without one makes pictures worse",
            offer.path.display()
        ));
    }
    pipeline.ready()?;
    Ok(pipeline)
}

impl Painter {
    /// Loads the models.
    ///
    /// # Errors
    /// What is wrong with the files; the device's.
    pub fn new(
        device: Device,
        files: Files,
        offers: &[Arc<Offer>],
        batch: usize,
        outdir: Option<PathBuf>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, ServeError> {
        let mut loaded = Vec::new();
        for offer in offers {
            loaded.push((offer.clone(), open(&device, &files, offer, say)?));
        }
        let linear = match &files.vae {
            Some(vae) if files.preview.is_none() => {
                let (size, tiles) = ColourMap::tiles();
                let (mut viewer, _) = Viewer::open(&device, vae, "previews", None).map_err(PipelineError::from)?;
                ColourMap::fit(&viewer.picture(size, &tiles).map_err(PipelineError::from)?)
            }
            _ => None,
        };
        Ok(Self { device, files, batch, loaded, guest: None, linear, conditions: HashMap::new(), outdir })
    }

    /// Works until the queue is closed.
    pub fn work(&mut self, server: &Server, say: &mut dyn FnMut(&str)) {
        while let Some(batch) = server.queue.next(self.batch) {
            match self.paint(server, &batch, say) {
                Ok(()) | Err(PipelineError::Stopped) => {}
                Err(why) => {
                    batch.jobs().for_each(|job| server.queue.fail(job, self.files.told(&why, &job.request.model)))
                }
            }
        }
    }

    /// Makes the pictures of a batch.
    fn paint(&mut self, server: &Server, batch: &JobBatch, say: &mut dyn FnMut(&str)) -> Result<(), PipelineError> {
        let Some((first, _)) = batch.images.first() else { return Ok(()) };
        let CheckedRequest { model: offer, size, sampler, .. } = &first.request;
        let place = self.loaded.iter().position(|(known, _)| Arc::ptr_eq(known, offer));
        if place.is_none() && !self.guest.as_ref().is_some_and(|(known, _)| Arc::ptr_eq(known, offer)) {
            // First, as there may be room for one only.
            self.guest = None;
            self.guest = Some((offer.clone(), open(&self.device, &self.files, offer, say)?));
        }
        let pipeline = match (place, &mut self.guest) {
            (Some(place), _) => &mut self.loaded[place].1,
            (None, Some((_, pipeline))) => pipeline,
            (None, None) => return Ok(()),
        };

        self.conditions.retain(|id, _| batch.jobs().any(|job| job.id == *id));
        for job in batch.jobs() {
            let Entry::Vacant(place) = self.conditions.entry(job.id) else { continue };
            match conditions(pipeline, &job.request, say) {
                Ok(made) => drop(place.insert(made)),
                Err(why) => server.queue.fail(job, self.files.told(&why, &job.request.model)),
            }
        }
        // Each image has a condition of its own, as its neighbours may be of other jobs.
        let all = &self.conditions;
        let images: Vec<&(Arc<Job>, usize)> =
            batch.images.iter().filter(|(job, _)| all.contains_key(&job.id)).collect();
        if images.is_empty() {
            return Ok(());
        }
        let condition = |(job, index): &(Arc<Job>, usize)| {
            let rows = &all[&job.id];
            let row = (!rows.is_empty()).then(|| index / job.request.per_condition % rows.len())?;
            Some(rows[row].clone())
        };
        let request = pipeline::Request {
            conditions: images.iter().filter_map(|image| condition(image)).collect(),
            per_condition: 1,
            seeds: images.iter().map(|(job, index)| job.request.seeds[*index]).collect(),
            size: Some(*size),
            sampler: sampler.clone(),
            batch: images.len(),
            ..pipeline::Request::default()
        };

        let (started, linear) =
            (Instant::now(), self.linear.as_ref().filter(|_| offer.meta.encoder == ImageSpace::SdVae));
        let mut spent = Duration::ZERO;
        let watch = |step: &mut Step| {
            if images.iter().all(|(job, _)| job.is_over()) {
                return Err(PipelineError::Stopped);
            }
            let before = Instant::now();
            // What they cost is bounded: on a CPU an autoencoder is slower than many a step.
            let cheap = spent <= started.elapsed() / PREVIEWS;
            let wanted = cheap && step.index + 1 < step.of && images.iter().any(|(job, _)| job.is_previewed());
            let pictures = if wanted { shown(step, *size, linear)? } else { Vec::new() };
            let previews: Vec<Option<String>> = pictures.iter().map(data_url).collect();
            spent += before.elapsed();
            for job in batch.jobs() {
                tell(job, &images, &previews, step.index + 1, started);
            }
            Ok(())
        };
        for image in pipeline.images(&request)?.watched(watch) {
            let image = image?;
            let (job, index) = images[image.number];
            // It shared the batch with one that goes on.
            if job.is_over() {
                continue;
            }
            let failed = |error: PipelineError| server.queue.fail(job, error.to_string());
            let Ok(png) = image.png().map_err(failed) else { continue };
            let mut unwritten = None;
            if let Some(dir) = &self.outdir {
                let name = format!("{:06}-{:06}.png", job.id, image.seed);
                // A file of that name is somebody else's.
                if let Err(why) = write_new(&dir.join(&name), |out| out.write_all(&png)) {
                    say(&format!("warning: {}: {why}", dir.join(&name).display()));
                    unwritten = Some(format!("{name}: {why}"));
                }
            }
            let (index, seed, parameters, png) = (*index, image.seed, image.about, png.into());
            server.queue.made(job, FinishedPicture { index, seed, parameters, unwritten, png });
        }
        Ok(())
    }
}

/// The conditions of a request, in the order of `edm2k sample`.
fn conditions(
    pipeline: &mut Pipeline,
    request: &CheckedRequest,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Condition>, PipelineError> {
    let mut all = Vec::new();
    let seed = request.condition_seed;
    for text in &request.tags {
        all.push(if request.complete { pipeline.complete(text, seed)? } else { pipeline.tags(text, seed)? });
    }
    if request.classes == [ANY] {
        for &seed in &request.seeds {
            all.push(pipeline.any_class(seed)?);
        }
    } else {
        for class in &request.classes {
            all.push(pipeline.class(class)?);
        }
    }
    for (number, bytes) in request.like.iter().enumerate() {
        let name = format!("upload {number}");
        let image = decode::decode(bytes, Tagger::BACKGROUND);
        let image = image.map_err(|why| pipeline::ConditionError::Picture { name: name.clone(), why: why.into() })?;
        image.warning(&name).iter().for_each(|warning| say(&format!("warning: {warning}")));
        all.push(pipeline.like_picture(&image.picture, &name)?);
    }
    if request.invent > 0 {
        all.extend(pipeline.invent(request.invent, seed)?);
    }
    if let Some(text) = &request.negative {
        let negative = pipeline.tags_or_class(text, seed)?;
        if all.is_empty() {
            all.push(pipeline.none()?);
        }
        all = all.into_iter().map(|condition| condition.away_from(&negative)).collect();
    }
    Ok(all)
}

/// What the images look like at a step.
fn shown(step: &mut Step, size: [usize; 2], linear: Option<&ColourMap>) -> Result<Vec<Picture>, PipelineError> {
    let Some(linear) = linear else { return step.pictures() };
    let values = step.denoised()?;
    Ok(values.chunks(values.len() / step.images).map(|latent| linear.picture(size, latent)).collect())
}

/// Tells a job how far its images of a batch are.
fn tell(job: &Job, images: &[&(Arc<Job>, usize)], previews: &[Option<String>], steps: usize, started: Instant) {
    let ours = || images.iter().enumerate().filter(|(_, (other, _))| other.id == job.id);
    let count = ours().count();
    let rate = steps as f64 / started.elapsed().as_secs_f64().max(1e-9);
    job.update(|view| {
        view.done = view.pictures.len() * job.request.sampler.taken() + count * steps;
        view.rate = Some(rate);
        view.seconds_left = Some((view.of - view.done.min(view.of)) as f64 / (rate * count as f64).max(1e-9));
        if !previews.is_empty() {
            let preview = |(place, (_, index)): (usize, &&(Arc<Job>, usize))| {
                Some(Preview { index: *index, image: previews.get(place)?.clone()? })
            };
            view.previews = ours().filter_map(preview).collect();
        }
    });
}
