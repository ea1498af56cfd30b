//! The API under /api/v1, as `openapi.json` describes it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{self, FromRequest, FromRequestParts, Path, Request as HttpRequest, State};
use axum::http::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER, SET_COOKIE, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream::{Stream, StreamExt, unfold};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::offers::{Offer, Tags};
use super::queue::{Job, JobView, Stage};
use super::refusal::Refusal;
use super::request::{CheckedRequest, MAX_AREA, MAX_IMAGES, MAX_WORK, RequestBody};
use super::runs::{Run, Stats};
use super::{Runs, Server};
use crate::condition::vocabulary::Tag;
use crate::formats::json::Fields;

/// Largest body of a request.
const MAX_BODY: usize = 24 << 20;
/// How much of a body that is too large is read before the connection is cut.
const MAX_DROPPED: usize = 256 << 20;
/// Largest body from somebody who has not given the token yet.
const MAX_SESSION: usize = 1 << 12;
/// Seconds within which a body must arrive.
const BODY_SECONDS: u64 = 30;
/// Least time between two events of a job. Nobody would see more.
const EVENTS: Duration = Duration::from_millis(40);
/// How many tags like a text are shown.
const NEAREST: usize = 8;
/// The description of this API.
pub const OPENAPI: &str = include_str!("openapi.json");

type App = State<Arc<Server>>;
type Answer<T> = Result<Json<T>, Refusal>;

/// Every path, with what it does.
pub fn routes() -> Vec<(&'static str, MethodRouter<Arc<Server>>)> {
    vec![
        ("/api/v1/openapi.json", get(async || ([(CONTENT_TYPE, "application/json")], OPENAPI))),
        ("/api/v1/session", post(session)),
        ("/api/v1/server", get(server)),
        ("/api/v1/models", get(models)),
        ("/api/v1/vocabulary", get(vocabulary)),
        ("/api/v1/prompt", get(prompt)),
        ("/api/v1/generate", post(generate)),
        ("/api/v1/jobs", get(jobs)),
        ("/api/v1/jobs/{id}", get(job).delete(cancel)),
        ("/api/v1/jobs/{id}/events", get(events)),
        ("/api/v1/jobs/{id}/pictures/{index}", get(picture)),
        ("/api/v1/runs", get(runs)),
        ("/api/v1/runs/{run}", get(run)),
        ("/api/v1/runs/{run}/stats", get(stats)),
        ("/api/v1/runs/{run}/grids/{grid}", get(grid)),
    ]
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(json!({"detail": self.to_string()}))).into_response();
        let headers = response.headers_mut();
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        } else if self.status() == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response
    }
}

/// A body of JSON: an object of that type, of `MAX` bytes at most, and there in time. Clients write null for what they leave
/// out.
pub struct Input<T, const MAX: usize = MAX_BODY>(pub T);

impl<T: DeserializeOwned, S: Send + Sync, const MAX: usize> FromRequest<S> for Input<T, MAX> {
    type Rejection = Refusal;

    async fn from_request(request: HttpRequest, _: &S) -> Result<Self, Refusal> {
        let (head, body) = request.into_parts();
        let kind = head.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()?.split(';').next());
        if !kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
            return Err(Refusal::Media);
        }
        let body = tokio::time::timeout(Duration::from_secs(BODY_SECONDS), read(body, MAX));
        let body = body.await.map_err(|_| Refusal::Slow(BODY_SECONDS))??;
        let text = std::str::from_utf8(&body).map_err(|_| Refusal::Invalid("the body is no text in UTF-8".into()))?;
        let read = Fields::parse(text).and_then(|fields| fields.without_nulls().read());
        read.map(Self).map_err(|error| Refusal::Invalid(error.to_string()))
    }
}

/// What follows the question mark of an address.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let read = extract::Query::try_from_uri(&parts.uri).map(|extract::Query(read)| Self(read));
        read.map_err(|error| {
            let text = error.to_string();
            Refusal::Invalid(text.replacen("Failed to deserialize query string", "behind ?", 1))
        })
    }
}

/// Whether a field of an address is set, as people and Python write it.
pub fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match String::deserialize(deserializer)?.to_lowercase().as_str() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        other => Err(serde::de::Error::custom(format!("{other:?}, expected true or false"))),
    }
}

/// The bytes of a body. One that is too large is read on for a while and dropped, since a client that is still sending
/// does not read the answer.
async fn read(body: Body, most: usize) -> Result<Vec<u8>, Refusal> {
    let (mut parts, mut bytes, mut length) = (body.into_data_stream(), Vec::new(), 0);
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| Refusal::Invalid(format!("the body broke off: {error}")))?;
        length += part.len();
        if length > MAX_DROPPED {
            break;
        } else if length > most {
            bytes = Vec::new();
        } else {
            bytes.extend_from_slice(&part);
        }
    }
    if length > most { Err(Refusal::Large(most)) } else { Ok(bytes) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionBody {
    token: String,
}

async fn session(
    State(app): App,
    Input(SessionBody { token }): Input<SessionBody, MAX_SESSION>,
) -> Result<Response, Refusal> {
    if !app.guard.knows(&token) {
        return Err(Refusal::Token);
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    if let Some(cookie) = app.guard.cookie() {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    Ok(response)
}

async fn server(State(app): App) -> Json<Value> {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started": app.started,
        "device": app.device,
        "batch": app.batch,
        "runs": app.runs.is_some(),
        "waiting": app.queue.open().len(),
        "limits": {"images": MAX_IMAGES, "area": MAX_AREA, "work": MAX_WORK, "body": MAX_BODY},
    }))
}

#[derive(Serialize)]
struct ModelView<'a> {
    name: &'a str,
    width: usize,
    height: usize,
    multiple: usize,
    factor: usize,
    tags: Tags,
    classes: usize,
    like: bool,
    invents: bool,
    guided: bool,
    gnet: Option<&'a str>,
    images_seen: u64,
    source: &'a str,
    licence: &'a str,
}

impl<'a> From<&'a Offer> for ModelView<'a> {
    fn from(offer: &'a Offer) -> Self {
        Self {
            name: &offer.name,
            width: offer.meta.width,
            height: offer.meta.height,
            multiple: 1 << (offer.config.channel_mult.len() - 1),
            factor: offer.factor,
            tags: offer.tags,
            classes: offer.classes.as_ref().map_or(0, |_| offer.config.label_dim),
            like: offer.like,
            invents: offer.invents,
            guided: offer.guided(),
            gnet: offer.guide.as_ref().map(|guide| &*guide.name),
            images_seen: offer.meta.images_seen,
            source: &offer.meta.source,
            licence: &offer.meta.licence,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfModel {
    model: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfVocabulary {
    model: Option<String>,
    near: Option<String>,
}

/// All models; with a name that model alone, which may also be a snapshot of a run.
async fn models(State(app): App, Query(of): Query<OfModel>) -> Result<Response, Refusal> {
    let offers = match of.model {
        Some(name) => vec![app.offer(Some(name)).await?],
        None => app.offers.clone(),
    };
    Ok(Json(offers.iter().map(|offer| ModelView::from(&**offer)).collect::<Vec<_>>()).into_response())
}

/// All tags of a model, or those like a text; of a class-conditional one the classes.
async fn vocabulary(State(app): App, Query(of): Query<OfVocabulary>) -> Result<Response, Refusal> {
    let offer = app.offer(of.model).await?;
    let near = of.near.map(|text| text.chars().take(100).collect::<String>());
    let tags: Vec<Value> = match &offer.classes {
        Some(names) => {
            let all = || (0..offer.config.label_dim).collect();
            let near = near.map(|text| names.nearest(&text, offer.config.label_dim, NEAREST));
            let classes: Vec<usize> = near.unwrap_or_else(all);
            classes.into_iter().map(|class| json!({"tag": names.label(class), "count": null})).collect()
        }
        None => {
            let all = offer.vocabulary.tags();
            // A vocabulary from a model's file has no counts.
            let counted = all.iter().any(|tag| tag.count > 0);
            let shown = |tag: &Tag| json!({"tag": tag.tag, "count": counted.then_some(tag.count)});
            let place = |name: &String| all.get(offer.vocabulary.get(name)? as usize);
            match near.map(|text| offer.vocabulary.nearest(&text, NEAREST)) {
                None => all.iter().map(shown).collect(),
                Some(near) => near.iter().filter_map(place).map(shown).collect(),
            }
        }
    };
    Ok(Json(json!({"model": offer.name, "tags": tags})).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfText {
    model: Option<String>,
    text: String,
}

/// The tags of a prompt with their weights, or the class that it names.
async fn prompt(State(app): App, Query(OfText { model, text }): Query<OfText>) -> Answer<Value> {
    let offer = app.offer(model).await?;
    let tags = offer.read(&text)?.into_iter().map(|(tag, weight)| json!({"tag": tag, "weight": weight}));
    Ok(Json(json!({"model": offer.name, "tags": tags.collect::<Vec<_>>()})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    #[serde(default, deserialize_with = "flag")]
    wait: bool,
}

/// The address of a finished picture.
pub fn picture_url(job: u64, index: usize) -> String {
    format!("/api/v1/jobs/{job}/pictures/{index}")
}

/// A job as an answer, with the addresses of its pictures; if `whole`, with the pictures too.
fn shown(view: &JobView, whole: bool) -> Value {
    let mut json = serde_json::to_value(view).unwrap_or_default();
    for (picture, made) in json["pictures"].as_array_mut().into_iter().flatten().zip(&view.pictures) {
        picture["url"] = picture_url(view.id, made.index).into();
        if whole {
            picture["png"] = BASE64_STANDARD.encode(&made.png).into();
        }
    }
    json
}

async fn generate(
    State(app): App,
    Query(Wait { wait }): Query<Wait>,
    Input(wanted): Input<RequestBody>,
) -> Result<Response, Refusal> {
    let job = app.submit(wanted).await?;
    if wait {
        return Ok(Json(shown(&done(ended(&job).await?)?, true)).into_response());
    }
    let place = format!("/api/v1/jobs/{}", job.id);
    Ok((StatusCode::ACCEPTED, [(LOCATION, place)], Json(shown(&job.view(), false))).into_response())
}

/// Waits for the end of a job. Whoever stops waiting cancels it.
pub async fn ended(job: &Job) -> Result<JobView, Refusal> {
    let mut watcher = job.watch();
    let view = watcher.wait_for(|view| view.stage.is_final()).await.map(|view| view.clone());
    view.map_err(|error| Refusal::Failed(error.to_string()))
}

/// A job that has ended, with all its pictures.
///
/// # Errors
/// It failed, or was cancelled.
pub fn done(view: JobView) -> Result<JobView, Refusal> {
    let why = view.why.clone().unwrap_or_default();
    match view.stage {
        Stage::Failed => Err(Refusal::Failed(why)),
        Stage::Cancelled => Err(Refusal::Cancelled(format!("cancelled: {why}"))),
        _ => Ok(view),
    }
}

async fn jobs(State(app): App) -> Json<Vec<Value>> {
    let brief = |job: &Arc<Job>| {
        let view = job.peek();
        json!({"id": view.id, "stage": view.stage, "ahead": view.ahead, "done": view.done, "of": view.of})
    };
    app.queue.asked();
    Json(app.queue.open().iter().map(brief).collect())
}

fn find(app: &Server, id: &str) -> Result<Arc<Job>, Refusal> {
    let found = id.parse().ok().and_then(|id| app.queue.job(id));
    found.ok_or_else(|| Refusal::NotFound(format!("job {id}, or no more")))
}

async fn job(State(app): App, Path(id): Path<String>) -> Answer<Value> {
    Ok(Json(shown(&find(&app, &id)?.view(), false)))
}

async fn cancel(State(app): App, Path(id): Path<String>) -> Answer<Value> {
    let job = find(&app, &id)?;
    app.queue.cancel(&job, "on request");
    Ok(Json(shown(&job.view(), false)))
}

/// The state of a job, and again whenever it changes. The last event is the job's end.
async fn events(
    State(app): App,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let job = find(&app, &id)?;
    job.preview();
    let mut watcher = job.watch();
    watcher.mark_changed();
    let stream = unfold(Some(watcher), async |watcher| {
        let mut watcher = watcher?;
        watcher.changed().await.ok()?;
        let (view, over) = {
            let view = watcher.borrow_and_update();
            (shown(&view, false).to_string(), view.stage.is_final())
        };
        let event = Event::default().event("job").data(view);
        if over {
            return Some((Ok(event), None));
        }
        tokio::time::sleep(EVENTS).await;
        Some((Ok(event), Some(watcher)))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(5))))
}

async fn picture(State(app): App, Path((id, index)): Path<(String, String)>) -> Result<Response, Refusal> {
    let job = find(&app, &id)?;
    let number: Option<usize> = index.parse().ok();
    let png = job.view().pictures.iter().find(|made| Some(made.index) == number).map(|made| made.png.clone());
    let png = png.ok_or_else(|| Refusal::NotFound(format!("picture {index} of job {id}")))?;
    Ok(([(CONTENT_TYPE, "image/png")], Body::from(png)).into_response())
}

/// Reads something of the runs, in a thread where that blocks nobody.
async fn of_runs<T: Send + 'static>(
    app: Arc<Server>,
    read: impl FnOnce(&Runs) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let read = move || match &app.runs {
        Some(runs) => read(runs),
        None => Err(Refusal::NotFound("run: this server has no --runs".into())),
    };
    tokio::task::spawn_blocking(read).await.map_err(|error| Refusal::Failed(error.to_string()))?
}

async fn runs(State(app): App) -> Answer<Vec<Run>> {
    of_runs(app, |runs| Ok(runs.list())).await.map(Json)
}

async fn run(State(app): App, Path(name): Path<String>) -> Answer<Run> {
    of_runs(app, move |runs| runs.get(&name)).await.map(Json)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    #[serde(default)]
    from: u64,
}

async fn stats(State(app): App, Path(name): Path<String>, Query(Since { from }): Query<Since>) -> Answer<Stats> {
    of_runs(app, move |runs| runs.stats(&name, from)).await.map(Json)
}

async fn grid(State(app): App, Path((run, name)): Path<(String, String)>) -> Result<Response, Refusal> {
    let png = of_runs(app, move |runs| runs.grid(&run, &name)).await?;
    Ok(([(CONTENT_TYPE, "image/png")], png).into_response())
}

impl Server {
    /// A model by its name, or the first one; also a snapshot of a run.
    ///
    /// # Errors
    /// There is none, or its file cannot be read.
    pub async fn offer(self: &Arc<Self>, name: Option<String>) -> Result<Arc<Offer>, Refusal> {
        let Some(name) = name else {
            return self.offers.first().cloned().ok_or_else(|| Refusal::NotFound("model".into()));
        };
        if let Some(offer) = self.offers.iter().find(|offer| offer.name == name) {
            return Ok(offer.clone());
        }
        let server = self.clone();
        let read = move || server.snapshot(&name);
        tokio::task::spawn_blocking(read).await.map_err(|error| Refusal::Failed(error.to_string()))?
    }

    /// Checks a request and puts it into the queue.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn submit(self: &Arc<Self>, wanted: RequestBody) -> Result<Arc<Job>, Refusal> {
        let offer = self.offer(wanted.model.clone()).await?;
        // Checking decodes what was uploaded, which takes time.
        let request = tokio::task::spawn_blocking(|| CheckedRequest::new(wanted, offer));
        let request = request.await.map_err(|error| Refusal::Failed(error.to_string()))??;
        self.queue.submit(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_describes_every_path_and_no_other() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut described: Vec<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let mut ours: Vec<&str> =
            routes().into_iter().chain(super::super::a1111::routes()).map(|(path, _)| path).collect();
        described.sort_unstable();
        ours.sort_unstable();
        assert_eq!(described, ours);
    }
}
