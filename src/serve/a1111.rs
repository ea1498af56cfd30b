//! The part of the API of AUTOMATIC1111's Stable Diffusion web UI that its clients use, under /sdapi/v1.
//!
//! Prompt and negative prompt are tags, weighed as in that web UI; an unknown one is an error that names its neighbours. Of a
//! class-conditional model each is a class.
//! What this engine does not have (upscaling, and so on) is ignored, as that web UI ignores unknown fields, and named in the
//! answer's `info`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::routing::{MethodRouter, get, post};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Server;
use super::api::{Input, Query, done, ended, flag};
use super::offers::Offer;
use super::queue::{JobView, Stage};
use super::refusal::Refusal;
use super::request::{MAX_IMAGES, RequestBody, SamplerBody};
use crate::pipeline::infotext;
use crate::sample::{SamplerConfig, Solver};

type App = State<Arc<Server>>;

/// Every path, with what it does.
pub fn routes() -> Vec<(&'static str, MethodRouter<Arc<Server>>)> {
    vec![
        ("/sdapi/v1/txt2img", post(txt2img)),
        ("/sdapi/v1/progress", get(progress)),
        ("/sdapi/v1/interrupt", post(interrupt)),
        ("/sdapi/v1/sd-models", get(models)),
        ("/sdapi/v1/samplers", get(samplers)),
        ("/sdapi/v1/options", get(options).post(set_options)),
    ]
}

/// The names by which clients know each solver, beside its title.
const SAMPLERS: [(Solver, &[&str]); 3] = [
    (Solver::Dpmpp2m, &["DPM++ 2M Karras", "dpmpp_2m", "k_dpmpp_2m"]),
    (Solver::Heun, &["k_heun"]),
    (Solver::Euler, &["k_euler"]),
];

/// The fields that mean something here.
#[derive(Deserialize)]
#[serde(default)]
struct TextToImage {
    prompt: String,
    negative_prompt: String,
    seed: i64,
    steps: usize,
    cfg_scale: Option<f64>,
    width: Option<usize>,
    height: Option<usize>,
    batch_size: usize,
    n_iter: usize,
    sampler_name: Option<String>,
    sampler_index: Option<String>,
    override_settings: WebUiOptions,
    send_images: bool,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Default for TextToImage {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            seed: -1,
            steps: SamplerConfig::default().steps,
            cfg_scale: None,
            width: None,
            height: None,
            batch_size: 1,
            n_iter: 1,
            sampler_name: None,
            sampler_index: None,
            override_settings: WebUiOptions::default(),
            send_images: true,
            others: Map::new(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WebUiOptions {
    sd_model_checkpoint: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// The model that clients have chosen, or another one by its name or title.
fn chosen(app: &Server, name: Option<&str>) -> Result<(usize, Arc<Offer>), Refusal> {
    let place = match name.filter(|name| !name.is_empty()) {
        None => app.chosen.load(Ordering::Relaxed),
        Some(name) => {
            // Some send the name of its file.
            let is = |offer: &Arc<Offer>| offer.name == name || offer.path.file_name().is_some_and(|file| file == name);
            let found = app.offers.iter().position(is);
            found.ok_or_else(|| Refusal::NotFound(format!("model {name:?}")))?
        }
    };
    let offer = app.offers.get(place).cloned().ok_or_else(|| Refusal::NotFound("model".into()))?;
    Ok((place, offer))
}

fn solver(name: Option<&str>) -> Result<Solver, Refusal> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(SamplerConfig::default().solver) };
    let is = |known: &str| known.eq_ignore_ascii_case(name);
    let known = SAMPLERS.iter().find(|(solver, others)| is(solver.title()) || others.iter().any(|other| is(other)));
    let all = || SAMPLERS.map(|(solver, _)| solver.title()).join(", ");
    known
        .map(|(solver, _)| *solver)
        .ok_or_else(|| Refusal::Invalid(format!("sampler {name:?}, expected one of {}", all())))
}

async fn txt2img(State(app): App, Input(asked): Input<TextToImage>) -> Result<Json<Value>, Refusal> {
    let (_, offer) = chosen(&app, asked.override_settings.sd_model_checkpoint.as_deref())?;
    let sampler_name = asked.sampler_name.as_deref().filter(|name| !name.is_empty()).or(asked.sampler_index.as_deref());
    let images = asked.batch_size.saturating_mul(asked.n_iter);
    if !(1..=MAX_IMAGES).contains(&images) {
        return Err(Refusal::Invalid(format!("{images} images, expected 1 to {MAX_IMAGES}")));
    }
    // Clients show a seed, and some keep it in 32 bits.
    let first = u64::try_from(asked.seed).unwrap_or_else(|_| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::from(now.as_secs() as u32 ^ now.subsec_nanos())
    });
    let last = first.saturating_add(images as u64 - 1);
    let side = |pixels: Option<usize>| pixels.map(|pixels| pixels.div_ceil(offer.factor));
    // Commas alone are nothing.
    let said = |text: &str| Some(text.to_owned()).filter(|text| text.split(',').any(|tag| !tag.trim().is_empty()));
    let (prompt, none) = (said(&asked.prompt).into_iter().collect(), Vec::new());
    let (tags, classes) = if offer.classes.is_some() { (none, prompt) } else { (prompt, none) };
    let usual = SamplerConfig::default();
    let (solver, guidance) = (solver(sampler_name)?, asked.cfg_scale.unwrap_or(usual.guidance));
    let config = SamplerConfig { solver, steps: asked.steps, guidance, ..usual };
    // Some clients send the negative prompt that they keep, always.
    let unguided = asked.cfg_scale == Some(1.0);
    let wanted = RequestBody {
        model: Some(offer.name.clone()),
        tags,
        classes,
        negative: said(&asked.negative_prompt).filter(|_| !unguided).unwrap_or_default(),
        seeds: Some(format!("{first}-{last}")),
        width: side(asked.width),
        height: side(asked.height),
        sampler: SamplerBody { config, says_guidance: asked.cfg_scale.is_some() },
        ..RequestBody::default()
    };
    let job = app.submit(wanted).await?;
    let ended = ended(&job).await?;
    // As in that web UI, an interrupted job answers with what is done.
    let interrupted = ended.stage == Stage::Cancelled && ended.why.as_deref() == Some(INTERRUPTED);
    let JobView { mut pictures, .. } = if interrupted { ended } else { done(ended)? };
    pictures.sort_by_key(|made| made.index);
    let sampler = &job.request.sampler;
    let [height, width] = job.request.size.map(|side| side * offer.factor);
    let asking = |fields: &Map<String, Value>, of: &str| -> Vec<String> {
        fields.iter().filter(|(_, value)| says_something(value)).map(|(key, _)| format!("{of}{key}")).collect()
    };
    let mut ignored =
        [asking(&asked.others, ""), asking(&asked.override_settings.others, "override_settings.")].concat();
    if unguided && !asked.negative_prompt.is_empty() {
        ignored.push("negative_prompt".into());
    }
    if asked.sampler_index.as_deref().is_some_and(|index| !index.is_empty() && Some(index) != sampler_name) {
        ignored.push("sampler_index".into());
    }
    let parameters = json!({
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "seed": first,
        "steps": sampler.steps,
        "cfg_scale": sampler.guidance,
        "width": width,
        "height": height,
        "batch_size": asked.batch_size,
        "n_iter": asked.n_iter,
        "sampler_name": sampler.solver.title(),
    });
    let info = json!({
        "prompt": asked.prompt,
        "all_prompts": vec![&asked.prompt; pictures.len()],
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": vec![&asked.negative_prompt; pictures.len()],
        "seed": first,
        "all_seeds": pictures.iter().map(|made| made.seed).collect::<Vec<_>>(),
        "width": width,
        "height": height,
        "sampler_name": sampler.solver.title(),
        "cfg_scale": sampler.guidance,
        "steps": sampler.steps,
        "batch_size": asked.batch_size,
        "infotexts": pictures.iter().map(|made| infotext(&made.parameters, [height, width])).collect::<Vec<_>>(),
        "sd_model_name": offer.name,
        "ignored": ignored,
    });
    let sent = if asked.send_images { &pictures[..] } else { &[] };
    let images: Vec<String> = sent.iter().map(|made| BASE64_STANDARD.encode(&made.png)).collect();
    Ok(Json(json!({"images": images, "parameters": parameters, "info": info.to_string()})))
}

/// Whether the value of a field asks for something. Most clients send all fields that there are.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(all) => !all.is_empty(),
        Value::Object(all) => !all.is_empty(),
        _ => true,
    }
}

#[derive(Deserialize)]
struct Skip {
    #[serde(default, deserialize_with = "flag")]
    skip_current_image: bool,
}

async fn progress(State(app): App, Query(Skip { skip_current_image }): Query<Skip>) -> Json<Value> {
    app.queue.asked();
    let open = app.queue.open();
    let running = open.iter().find(|job| job.peek().stage == Stage::Running);
    if let Some(job) = running.filter(|_| !skip_current_image) {
        job.preview();
    }
    let view = running.map(|job| job.peek());
    let image = view.as_ref().filter(|_| !skip_current_image).and_then(|view| {
        let preview = view.previews.first()?;
        preview.image.split_once(";base64,").map(|(_, data)| data.to_owned())
    });
    let (done, of) = view.as_ref().map_or((0, 0), |view| (view.done, view.of));
    let steps = running.map_or(0, |job| job.request.sampler.taken());
    // All images of a batch take a step together.
    let finished = view.as_ref().map_or(0, |view| view.pictures.len());
    let making = (of / steps.max(1)).saturating_sub(finished).clamp(1, app.batch);
    let step = done.saturating_sub(finished * steps) / making;
    Json(json!({
        "progress": done as f64 / of.max(1) as f64,
        "eta_relative": view.as_ref().and_then(|view| view.seconds_left).unwrap_or(0.0),
        "state": {
            "skipped": false,
            "interrupted": false,
            "job": view.as_ref().map_or(String::new(), |view| view.id.to_string()),
            "job_count": open.len(),
            "job_no": view.as_ref().map_or(0, |view| view.pictures.len()),
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": image,
        "textinfo": null,
    }))
}

/// Why a job was cancelled by [`interrupt`].
const INTERRUPTED: &str = "interrupted";

/// Cancels the jobs that the device works on.
async fn interrupt(State(app): App) -> Json<Value> {
    for job in app.queue.open().iter().filter(|job| job.peek().stage == Stage::Running) {
        app.queue.cancel(job, INTERRUPTED);
    }
    Json(json!({}))
}

async fn models(State(app): App) -> Json<Value> {
    let model = |offer: &Arc<Offer>| {
        let file = offer.path.file_name().unwrap_or_default().to_string_lossy();
        json!({
            "title": offer.name, "model_name": offer.name, "hash": null, "sha256": null, "filename": file, "config": null,
        })
    };
    Json(app.offers.iter().map(model).collect())
}

async fn samplers() -> Json<Value> {
    Json(
        SAMPLERS
            .iter()
            .map(|(solver, others)| json!({"name": solver.title(), "aliases": others, "options": {}}))
            .collect(),
    )
}

async fn options(State(app): App) -> Result<Json<Value>, Refusal> {
    let (_, offer) = chosen(&app, None)?;
    Ok(Json(json!({"sd_model_checkpoint": offer.name, "sd_checkpoint_hash": "", "samples_format": "png"})))
}

/// Chooses the model; every other option stays what it is, and is named.
async fn set_options(State(app): App, Input(settings): Input<WebUiOptions>) -> Result<Json<Value>, Refusal> {
    if let Some(name) = settings.sd_model_checkpoint {
        app.chosen.store(chosen(&app, Some(&name))?.0, Ordering::Relaxed);
    }
    let ignored: Vec<_> =
        settings.others.iter().filter(|(_, value)| says_something(value)).map(|(key, _)| key).collect();
    Ok(Json(if ignored.is_empty() { json!({}) } else { json!({"ignored": ignored}) }))
}
