//! Requests, which are checked before they wait. Once it is taken, a request can fail only because of the device or the
//! disk.

use std::sync::Arc;

use axum::body::Bytes;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::offers::{Offer, Tags};
use super::refusal::{Refusal, ensure};
use crate::condition::classes::ANY;
use crate::condition::tagger::Tagger;
use crate::formats::json::{Fields, JsonError};
use crate::pictures::decode;
use crate::pipeline::{PipelineError, enough_seeds};
use crate::sample::{SamplerConfig, parse_seeds};

/// Most images of a job.
pub const MAX_IMAGES: usize = 64;
/// Largest area of a picture, as a multiple of the area that the model learned from.
pub const MAX_AREA: usize = 4;
/// Most steps of a job, counted over all its pictures. A step counts in proportion to the picture's area: as 1 for the
/// area that the model learned from.
pub const MAX_WORK: usize = 4096;
/// Longest settings of a sampler.
const MAX_SETTINGS: usize = 1 << 12;
/// Most pixels of an uploaded picture, as it may be decoded beside others.
const MAX_PIXELS: u64 = 1 << 24;

/// The body of a request for pictures. What is left out has the default of `edm2k sample`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestBody {
    /// Name of the model; the first one if it is left out.
    pub model: Option<String>,
    /// Tags of each condition, as `--tags` takes them.
    pub tags: Vec<String>,
    /// Tags, or of a class-conditional model a class, that guidance leads away from; empty: none.
    pub negative: String,
    /// Whether the condition model completes them.
    pub complete: bool,
    /// Classes of a class-conditional model, each a condition: numbers, names, or [`ANY`] alone.
    pub classes: Vec<String>,
    /// Pictures whose features are conditions, in base64.
    pub like: Vec<String>,
    /// How many conditions the condition model invents.
    pub invent: usize,
    /// Seed of the conditions that are invented.
    pub condition_seed: u64,
    /// Images of each condition.
    pub per_condition: Option<usize>,
    /// Seeds as `--seeds` takes them.
    pub seeds: Option<String>,
    /// Width of the images, or latents.
    pub width: Option<usize>,
    /// Their height.
    pub height: Option<usize>,
    /// How images come out of noise.
    pub sampler: SamplerBody,
}

/// The settings of a sampler.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Box<RawValue>")]
pub struct SamplerBody {
    /// What is left out has its default.
    pub config: SamplerConfig,
    /// Whether guidance was not left out. Its default depends on the model.
    pub says_guidance: bool,
}

impl TryFrom<Box<RawValue>> for SamplerBody {
    type Error = String;

    fn try_from(json: Box<RawValue>) -> Result<Self, Self::Error> {
        if json.get().len() > MAX_SETTINGS {
            return Err(format!("more than {MAX_SETTINGS} bytes"));
        }
        let said = |error: JsonError| error.to_string();
        let mut fields = Fields::parse(json.get()).map_err(said)?.without_nulls();
        if let Some(churn) = fields.get("churn") {
            let churn = Fields::parse(churn).map_err(|error| format!("churn: {error}"))?.without_nulls();
            fields.set("churn", churn);
        }
        let says_guidance = fields.get("guidance").is_some();
        Ok(Self { config: fields.read().map_err(said)?, says_guidance })
    }
}

/// A request that can be done.
#[derive(Clone, Debug)]
pub struct CheckedRequest {
    /// The model.
    pub model: Arc<Offer>,
    /// Tags of conditions.
    pub tags: Vec<String>,
    /// Tags, or the class, that guidance leads away from.
    pub negative: Option<String>,
    /// Whether the condition model completes them.
    pub complete: bool,
    /// Classes; or [`ANY`] alone, one for each seed.
    pub classes: Vec<String>,
    /// Uploaded pictures.
    pub like: Vec<Bytes>,
    /// Conditions to invent.
    pub invent: usize,
    /// Seed of the conditions that are invented.
    pub condition_seed: u64,
    /// Images of each condition.
    pub per_condition: usize,
    /// The seed of each image.
    pub seeds: Vec<u64>,
    /// [height, width].
    pub size: [usize; 2],
    /// The sampler.
    pub sampler: SamplerConfig,
}

impl CheckedRequest {
    /// Checks everything that can be checked without computing.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] with what is wrong.
    pub fn new(wanted: RequestBody, model: Arc<Offer>) -> Result<Self, Refusal> {
        let RequestBody { tags, negative, complete, classes, like, invent, condition_seed, .. } = wanted;
        let SamplerBody { config: mut sampler, says_guidance } = wanted.sampler;
        let negative = Some(negative).filter(|text| !text.trim().is_empty());
        let invalid = |error: &dyn std::fmt::Display| Refusal::Invalid(error.to_string());
        let name = &model.name;
        let rows = tags.len() + classes.len() + like.len() + invent;
        // As `edm2k sample` does.
        if !says_guidance && negative.is_none() && rows > 0 && !model.guided() {
            sampler.guidance = 1.0;
        }
        sampler.validate().map_err(|error| invalid(&error))?;
        ensure(sampler.strength == 1.0, || "strength: there is no image to begin from".into())?;
        ensure(negative.is_none() || sampler.guidance != 1.0, || PipelineError::UnusedNegative.to_string())?;

        let most =
            |what, found, most: usize| ensure(found <= most, || format!("{found} {what}, expected {most} at most"));
        most("sets of tags", tags.len(), MAX_IMAGES)?;
        most("classes", classes.len(), MAX_IMAGES)?;
        most("pictures", like.len(), MAX_IMAGES)?;
        most("invented conditions", invent, MAX_IMAGES)?;
        ensure(tags.is_empty() || model.tags != Tags::No, || format!("{name} takes no tags"))?;
        ensure(classes.is_empty() || model.classes.is_some(), || format!("{name} takes no classes"))?;
        ensure(negative.is_none() || model.tags != Tags::No || model.classes.is_some(), || {
            format!("{name} takes neither tags nor classes")
        })?;
        ensure(negative.is_none() || model.guide.as_ref().is_none_or(|guide| guide.conditional), || {
            format!("the network that guides {name} takes no condition, so a negative does nothing")
        })?;
        ensure(like.is_empty() || model.like, || format!("{name} takes no pictures"))?;
        let invents = invent > 0 || complete;
        ensure(!invents || model.invents, || format!("{name} has no condition model that could invent or complete"))?;
        ensure(!complete || !tags.is_empty(), || "there are no tags to complete".into())?;
        let any = classes.iter().any(|class| class == ANY);
        for text in tags.iter().chain(classes.iter().filter(|_| !any)).chain(&negative) {
            ensure(!model.read(text)?.is_empty(), || format!("{text:?} has no tag"))?;
        }

        let per_condition = wanted.per_condition.unwrap_or(1);
        ensure(per_condition > 0, || "per_condition is 0".into())?;
        ensure(!any || rows == 1 && per_condition == 1, || format!("classes: {ANY:?} goes alone"))?;
        most("images of a condition", per_condition, MAX_IMAGES)?;
        let seeds = match &wanted.seeds {
            Some(list) => parse_seeds(list).map_err(|error| invalid(&error))?,
            None => (0..(rows.max(1) * per_condition) as u64).collect(),
        };
        most("images", seeds.len(), MAX_IMAGES)?;
        enough_seeds(rows, per_condition, seeds.len()).map_err(|error| invalid(&error))?;

        let size = [wanted.height.unwrap_or(model.meta.height), wanted.width.unwrap_or(model.meta.width)];
        model.config.check_size(size[0], size[1]).map_err(|error| invalid(&error))?;
        let area = |[height, width]: [usize; 2]| height.saturating_mul(width);
        let (ours, native) = (area(size), area(model.size()));
        ensure(ours <= native.saturating_mul(MAX_AREA), || {
            let [height, width] = model.size();
            format!("{}x{} is more than {MAX_AREA} times {name}'s {width}x{height}", size[1], size[0])
        })?;
        let work = ours.saturating_mul(seeds.len()).saturating_mul(sampler.taken());
        ensure(work <= native.saturating_mul(MAX_WORK), || {
            let steps = sampler.taken();
            format!("{} images of {steps} steps are too much at this size; ask for fewer of either", seeds.len())
        })?;
        // Last, as this decodes them.
        let like = like.iter().map(|text| picture(text)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            model,
            tags,
            negative,
            complete,
            classes,
            like,
            invent,
            condition_seed,
            per_condition,
            seeds,
            size,
            sampler,
        })
    }

    /// Whether it has any condition.
    pub fn conditioned(&self) -> bool {
        let none = self.tags.is_empty() && self.classes.is_empty() && self.like.is_empty() && self.invent == 0;
        !none || self.negative.is_some()
    }

    /// Whether images of both may be in one batch.
    pub fn fits(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.model, &other.model)
            && (self.size, self.conditioned()) == (other.size, other.conditioned())
            && self.sampler == other.sampler
    }
}

/// Checks that an uploaded picture is small enough and whole, so that it can be decoded when its turn comes. Until then
/// it is kept as it is, since a queue of decoded pictures would take much more room.
fn picture(base64: &str) -> Result<Bytes, Refusal> {
    // A page gives a file as a `data:` URL, which begins so.
    let base64 = base64.split_once(";base64,").map_or(base64, |(_, data)| data);
    let refused = |why: &dyn std::fmt::Display| Refusal::Invalid(format!("a picture: {why}"));
    let bytes = BASE64_STANDARD.decode(base64).map_err(|why| refused(&why))?;
    let size = decode::size(&bytes).map_err(|why| refused(&why))?;
    ensure(size.pixels() <= MAX_PIXELS, || format!("a picture of {size}, expected {MAX_PIXELS} pixels at most"))?;
    decode::decode(&bytes, Tagger::BACKGROUND).map_err(|why| refused(&why))?;
    Ok(bytes.into())
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use super::super::offers::Misfits;
    use super::*;
    use crate::condition::vocabulary::Vocabulary;
    use crate::model::ModelMeta;
    use crate::model::config::preset;
    use crate::sample::Churn;

    /// An offer of a model that is nowhere.
    pub fn model() -> Arc<Offer> {
        let config = preset("1girl-xs").unwrap().config;
        let (path, vocabulary, meta) = (PathBuf::new(), Vocabulary::default(), ModelMeta::of(&config));
        let (name, tags, like, invents, factor) = ("m".into(), Tags::No, true, false, 1);
        let (classes, guide, misfits) = (None, None, Misfits::default());
        Arc::new(Offer { name, path, config, meta, vocabulary, tags, classes, like, invents, guide, factor, misfits })
    }

    #[test]
    fn nothing_is_decoded_for_a_request_that_is_too_much() {
        let model = model();
        let refused = |body: RequestBody| CheckedRequest::new(body, model.clone()).unwrap_err().to_string();
        let body = RequestBody { like: vec!["?".into()], ..RequestBody::default() };
        assert!(refused(body.clone()).starts_with("a picture: "));
        let large = refused(RequestBody { width: Some(1 << 15), height: Some(1 << 15), ..body.clone() });
        assert!(large.contains("32768x32768 is more than 4 times"), "{large}");
        let many = refused(RequestBody { seeds: Some("0-64".into()), ..body });
        assert_eq!(many, "65 images, expected 64 at most");
    }

    #[test]
    fn bodies_are_read_by_their_fields() {
        let read = |json: &str| Fields::parse(json)?.without_nulls().read::<RequestBody>();
        let body =
            read(r#"{"width": null, "seeds": "7", "sampler": {"steps": 3, "guidance": null, "churn": null}}"#).unwrap();
        assert_eq!((body.width, body.seeds.as_deref(), body.sampler.config.steps), (None, Some("7"), 3));
        assert!(!body.sampler.says_guidance && body.sampler.config.churn == Churn::NONE);
        for (json, expected) in [
            (r#"{"seeds": "1", "seeds": null}"#, "duplicate field `seeds`"),
            (r#"{"sampler": {"steps": 3, "steps": 4}}"#, "sampler: duplicate field `steps`"),
            (r#"{"sampler": {"churn": {"s_min": 1, "s_min": 2}}}"#, "sampler: churn: duplicate field `s_min`"),
            (r#"{"sampler": {"stpes": 4}}"#, "sampler: unknown field `stpes`"),
        ] {
            let said = read(json).unwrap_err().to_string();
            assert!(said.starts_with(expected), "{json}: {said}");
        }
    }
}
