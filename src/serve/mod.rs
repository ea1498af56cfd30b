//! `edm2k serve`: a page and an API to draw with models and to look at training runs.
//!
//! Two threads. The thread that called [`serve`] owns the device and works through the queue, as a device stays in one
//! thread. The other speaks HTTP. Only the queue lies between them:
//!
//! ```text
//! page, clients -> guard -> api, a1111 -> request (checked) -> queue -> paint: Pipeline on the device
//!                                  ^                             |
//!                                  +---- JobView of each job ----+
//! ```
//!
//! A server listens on loopback unless it has a token (`guard`); what it takes on is bounded (`request`, `queue`),
//! and so are connections and how long a request may take to arrive. Nothing is written but pictures to an outdir.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicBool, Ordering};
//!
//! use edm2k::serve::{Files, Options, serve};
//!
//! let stop = Arc::new(AtomicBool::new(false));
//! let options = Options {
//!     files: Files { models: vec!["demo/emoji.safetensors".into()], ..Files::default() },
//!     listen: "127.0.0.1:0".parse()?,
//!     runs: None,
//!     outdir: None,
//!     hosts: vec![],
//!     token: None,
//!     batch: 4,
//! };
//! let mut said = String::new();
//! let device = edm2k::Device::open("cpu")?;
//! serve(options, device, stop.clone(), &mut |text| {
//!     said += text;
//!     stop.store(true, Ordering::Relaxed); // what would else wait for Ctrl-C
//! })?;
//! assert!(said.contains("http://127.0.0.1:"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod a1111;
mod api;
mod guard;
mod offers;
mod paint;
mod preview;
mod queue;
mod refusal;
mod request;
mod runs;

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::Uri;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::Device;
use crate::codec::CodecError;
use crate::condition::classes::ClassesError;
use crate::condition::tagger::Tagger;
use crate::condition::vae::VaeError;
use crate::formats::fingerprint::name;
use crate::formats::{DirLock, LockError};
use crate::model::ModelError;
use crate::onnx::OnnxError;
use crate::pipeline::PipelineError;
use crate::system;

use guard::{Guard, Unsafe};
use offers::{Offer, Shelf};
use queue::{Capacity, Queue};
use refusal::Refusal;
use runs::Runs;

/// Connections at a time. More of them wait in the system's own queue, until that is full.
const MAX_CONNECTIONS: usize = 400;
/// Seconds for the head of a request to arrive, and for a connection to be idle.
const HEAD_SECONDS: u64 = 10;
/// Seconds for answers to get out when the server stops.
const LAST_SECONDS: u64 = 3;
/// How many offers of snapshots are remembered.
const SNAPSHOTS: usize = 16;

/// The page: paths, kinds and contents.
const PAGE: [(&str, &str, &str); 10] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("page/app.js")),
    ("/server.js", "text/javascript; charset=utf-8", include_str!("page/server.js")),
    ("/store.js", "text/javascript; charset=utf-8", include_str!("page/store.js")),
    ("/draw.js", "text/javascript; charset=utf-8", include_str!("page/draw.js")),
    ("/tags.js", "text/javascript; charset=utf-8", include_str!("page/tags.js")),
    ("/png.js", "text/javascript; charset=utf-8", include_str!("page/png.js")),
    ("/runs.js", "text/javascript; charset=utf-8", include_str!("page/runs.js")),
];

/// The files that pictures are made with.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Models. Requests that name none get the first.
    pub models: Vec<PathBuf>,
    /// Autoencoder for models of latents.
    pub vae: Option<PathBuf>,
    /// TAESD for previews of their latents.
    pub preview: Option<PathBuf>,
    /// Network that guides those models that it goes with (autoguidance).
    pub guide: Option<PathBuf>,
    /// Names of the classes of class-conditional models.
    pub class_names: Option<PathBuf>,
    /// Model of conditions.
    pub condition_model: Option<PathBuf>,
    /// Tagger for models of its features.
    pub tagger: Option<PathBuf>,
    /// Tensor of the features in it.
    pub tagger_node: Option<String>,
}

impl Files {
    /// What clients are told of an error that a model met with.
    fn told(&self, error: &PipelineError, Offer { path, name: of_model, .. }: &Offer) -> String {
        let Self { models: _, vae, preview, guide, class_names, condition_model, tagger, tagger_node: _ } = self;
        let others = [vae, preview, guide, class_names, condition_model, tagger].into_iter().flatten();
        let names: Vec<_> = others.map(|path| (&**path, name(path))).collect();
        without_paths(error, names.iter().map(|(path, name)| (*path, &**name)).chain([(&**path, &**of_model)]))
    }
}

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The models, and what goes with them.
    pub files: Files,
    /// Directory of training runs.
    pub runs: Option<PathBuf>,
    /// Directory that pictures are also written to.
    pub outdir: Option<PathBuf>,
    /// Address; port 0 takes one that is free.
    pub listen: SocketAddr,
    /// Names that it is reached by, beside addresses and localhost.
    pub hosts: Vec<String>,
    /// The token that clients must know.
    pub token: Option<String>,
    /// Images at a time; 0 counts as 1.
    pub batch: usize,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ServeError {
    #[error("{0}")]
    Unsafe(#[from] Unsafe),
    #[error("{address}: {cause}")]
    Listen { address: SocketAddr, cause: io::Error },
    #[error("{}: {cause}", path.display())]
    Directory { path: PathBuf, cause: io::Error },
    #[error("{0}")]
    Lock(#[from] LockError),
    #[error("{}: its images are latents, which need an autoencoder (--vae)", model.display())]
    NoCodec { model: PathBuf },
    #[error("{}: its images have {channels} channels, of which no picture is made", model.display())]
    NoPicture { model: PathBuf, channels: usize },
    #[error("{}: goes with none of the models{}", path.display(), why.as_ref().map_or(String::new(), |why| format!(": {why}")))]
    Unused { path: PathBuf, why: Option<String> },
    #[error("{0}")]
    Model(#[from] ModelError),
    #[error("{0}")]
    ClassNames(#[from] ClassesError),
    #[error("{0}")]
    ConditionModel(#[from] VaeError),
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("{0}")]
    Tagger(#[from] OnnxError),
    #[error("{0}")]
    Pipeline(#[from] PipelineError),
    #[error("the thread that speaks HTTP: {0}")]
    Http(io::Error),
}

/// What both threads share.
struct Server {
    offers: Vec<Arc<Offer>>,
    shelf: Shelf,
    snapshots: Mutex<Vec<(Stamp, Arc<Offer>)>>,
    queue: Queue,
    guard: Arc<Guard>,
    runs: Option<Runs>,
    /// Place of the model that clients of the A1111 API have chosen.
    chosen: AtomicUsize,
    device: String,
    batch: usize,
    /// Milliseconds from 1970 to its start: another server counts its jobs anew.
    started: u64,
}

/// What tells a file from another that had its name: its length, and when it was put there.
type Stamp = (u64, Option<SystemTime>);

impl Server {
    /// The offer of a run's snapshot. A run that began anew may have written another of the same name.
    fn snapshot(&self, name: &str) -> Result<Arc<Offer>, Refusal> {
        let path = self.runs.as_ref().and_then(|runs| runs.snapshot(name));
        let path = path.ok_or_else(|| Refusal::NotFound(format!("model {name:?}")))?;
        let failed = |error: &dyn std::fmt::Display| Refusal::Failed(without_paths(error, [(&*path, name)]));
        let about = fs::metadata(&path).map_err(|error| failed(&format!("{name}: {error}")))?;
        let stamp = (about.len(), system::changed(&about));
        let mut known = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, offer)) = known.iter().find(|(then, offer)| *then == stamp && offer.path == path) {
            return Ok(offer.clone());
        }
        let offer = Arc::new(self.shelf.offer(name.into(), &path).map_err(|error| failed(&error))?);
        known.retain(|(_, other)| other.path != path);
        if known.len() == SNAPSHOTS {
            known.remove(0);
        }
        known.push((stamp, offer.clone()));
        Ok(offer)
    }
}

/// What clients are told of an error with files, each with its name. Where files lie is nobody's business.
fn without_paths<'a>(error: &dyn std::fmt::Display, files: impl IntoIterator<Item = (&'a Path, &'a str)>) -> String {
    files.into_iter().fold(error.to_string(), |text, (path, name)| text.replace(&*path.to_string_lossy(), name))
}

/// Serves until `stop` is set. `say` is called with the address, and with warnings.
///
/// # Errors
/// [`ServeError`], before anything is served.
pub fn serve(
    options: Options,
    device: Device,
    stop: Arc<AtomicBool>,
    say: &mut dyn FnMut(&str),
) -> Result<(), ServeError> {
    let guard = Arc::new(Guard::new(options.listen, options.hosts, options.token.as_deref())?);
    let directory = |path: &PathBuf| {
        let path = path.clone();
        |cause| ServeError::Directory { path, cause }
    };
    let runs = options.runs.map(|dir| Runs::new(dir.clone()).map_err(directory(&dir))).transpose()?;
    // Job numbers go on from the last one there, and no other process adds to it, so that pictures are never replaced.
    let lock = options.outdir.as_deref().map(DirLock::exclusive).transpose()?;
    lock.iter().filter_map(DirLock::warning).for_each(|warning| say(&format!("warning: {warning}")));
    let last = options.outdir.as_ref().map(|dir| last_number(dir).map_err(directory(dir))).transpose()?;
    let usual = Capacity::default();
    // What is written is wanted, whoever asks for it.
    let limits = Capacity { unasked: usual.unasked.filter(|_| lock.is_none()), ..usual };
    let shelf = Shelf::new(&options.files)?;
    let offers = shelf.offers(&options.files, runs.is_some())?;
    if let Some(path) = options.files.tagger.as_ref().filter(|_| !offers.iter().any(|offer| offer.like)) {
        // It is for snapshots of runs, and is opened again for each of those.
        Tagger::open(path, options.files.tagger_node.as_deref())?;
    }
    // This comes before the models are opened, so that a taken port is known at once.
    let listen = |address: SocketAddr| {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    let address = options.listen;
    let (listener, address) = listen(address).map_err(|cause| ServeError::Listen { address, cause })?;
    let batch = options.batch.max(1);
    let mut painter = paint::Painter::new(device.clone(), options.files, &offers, batch, options.outdir, say)?;
    let server = Arc::new(Server {
        offers,
        shelf,
        snapshots: Mutex::default(),
        queue: Queue::new(limits, last.unwrap_or(0)),
        guard,
        runs,
        chosen: AtomicUsize::new(0),
        device: device.to_string(),
        batch,
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Http)?;
    let http = {
        let server = server.clone();
        thread::Builder::new().name("http".into()).spawn(move || {
            let _closes = Closes(server.clone());
            let served = runtime.block_on(http(listener, server, &stop));
            // Do not wait for a thread that still reads a slow disk.
            runtime.shutdown_background();
            served
        })
    };
    let http = http.map_err(ServeError::Http)?;
    say(&format!("listening on http://{address}"));
    painter.work(&server, say);
    http.join().unwrap_or_else(|_| Err(io::Error::other("it panicked"))).map_err(ServeError::Http)
}

/// Ends the work when the thread that speaks HTTP ends, for whatever reason.
struct Closes(Arc<Server>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.queue.close();
    }
}

/// The highest number of a job in the names of a directory's pictures. One that clients could not read as a number of
/// JavaScript's is none of a job.
fn last_number(dir: &Path) -> io::Result<u64> {
    let number = |name: &String| name.strip_suffix(".png")?.split_once('-')?.0.parse().ok().filter(|n| *n < 1 << 53);
    Ok(crate::formats::names(dir)?.iter().filter_map(number).max().unwrap_or(0))
}

fn router(server: Arc<Server>) -> Router {
    let mut router = Router::new();
    for (path, kind, content) in PAGE {
        router = router.route(path, get(async move || ([(CONTENT_TYPE, kind)], content)));
    }
    for (path, what) in api::routes().into_iter().chain(a1111::routes()) {
        router = router.route(path, what);
    }
    let router = router.fallback(async |uri: Uri| Refusal::NotFound(uri.path().chars().take(100).collect()));
    router.layer(from_fn_with_state(server.guard.clone(), guard::guard)).with_state(server)
}

/// Accepts connections until `stop` is set, then ends gracefully: it takes no new work, cancels what runs at its next
/// step, and tells those who wait.
async fn http(listener: TcpListener, server: Arc<Server>, stop: &AtomicBool) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = router(server.clone());
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stopping, stopped) = watch::channel(());
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let next = async || {
        let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
        Ok::<_, io::Error>((listener.accept().await?.0, permit))
    };
    let mut coming = Box::pin(next());
    while !stop.load(Ordering::Relaxed) {
        tokio::select! {
            came = &mut coming => {
                match came {
                    Ok((stream, permit)) => {
                        tokio::spawn(connection(stream, router.clone(), stopped.clone(), permit));
                    }
                    // There are no file descriptors left, or the client has gone again.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
                coming.set(next());
            }
            _ = tick.tick() => server.queue.cancel_abandoned(),
        }
    }
    drop(coming);
    drop(listener);
    server.queue.close();
    drop(stopping);
    let all = room.acquire_many(MAX_CONNECTIONS as u32);
    let _ = tokio::time::timeout(Duration::from_secs(LAST_SECONDS), all).await;
    Ok(())
}

/// Speaks with one client.
async fn connection(
    stream: TcpStream,
    router: Router,
    mut stopped: watch::Receiver<()>,
    _permit: OwnedSemaphorePermit,
) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_SECONDS)).max_buf_size(1 << 16);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    // An error of a client ends that client's connection only.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
