//! Requests in the order that they came, for the one thread that owns the device.
//!
//! A job's state is a [`JobView`] in a channel that keeps only the last one. So a slow watcher may miss previews but
//! never the end, and costs no memory. Jobs of one shape and setting fill a batch together ([`Queue::next`]). An image
//! depends on its own request only, so its neighbours in the batch do not change it. Everything is bounded: the jobs
//! that wait, the bytes that were uploaded, and what is kept of jobs that are done ([`Capacity::kept`],
//! [`Capacity::kept_bytes`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use super::refusal::Refusal;
use super::request::CheckedRequest;

/// What a server takes on.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// Jobs that wait or run.
    pub jobs: usize,
    /// Bytes of all their uploads together.
    pub uploads: usize,
    /// Jobs that are done and can still be asked for.
    pub kept: usize,
    /// Bytes of all their pictures together.
    pub kept_bytes: usize,
    /// How long a job runs on after its last watcher has gone.
    pub patience: Duration,
    /// How long a job runs on that nobody has watched, while nobody asks about any job either; none: to its end.
    pub unasked: Option<Duration>,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            jobs: 256,
            uploads: 256 << 20,
            kept: 256,
            kept_bytes: 256 << 20,
            patience: Duration::from_secs(3),
            unasked: Some(Duration::from_secs(120)),
        }
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It waits.
    Queued,
    /// The device works on it.
    Running,
    /// All pictures are there.
    Done,
    /// It cannot be done.
    Failed,
    /// Somebody cancelled it, or nobody waited for it any more.
    Cancelled,
}

impl Stage {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// A finished picture.
#[derive(Clone, Debug, Serialize)]
pub struct FinishedPicture {
    /// Which of the job's pictures it is.
    pub index: usize,
    /// Its seed.
    pub seed: u64,
    /// Its parameters, as its file carries them.
    pub parameters: Value,
    /// Why it is not in the server's outdir, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unwritten: Option<String>,
    /// The PNG file.
    #[serde(skip)]
    pub png: Bytes,
}

/// What a picture looks like so far.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// Which of the job's pictures it is.
    pub index: usize,
    /// A `data:` URL.
    pub image: String,
}

/// What is known of a job.
#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    /// Number of the job.
    pub id: u64,
    /// Where it stands.
    pub stage: Stage,
    /// Jobs before it.
    pub ahead: usize,
    /// Steps that are done, counted over all of its pictures, each of which takes `steps` of them.
    pub done: usize,
    /// Steps in all.
    pub of: usize,
    /// Steps of the device a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Seconds until it is done, once it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
    /// The pictures that are finished.
    pub pictures: Vec<FinishedPicture>,
    /// The last preview of each picture that is being made.
    pub previews: Vec<Preview>,
    /// Why it failed or was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A request that was taken.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What is wanted.
    pub request: CheckedRequest,
    /// Images that were given to the device.
    given: AtomicUsize,
    watched: AtomicBool,
    previewed: AtomicBool,
    /// When it began to run, or somebody was last there for it.
    seen: Mutex<Instant>,
    view: watch::Sender<JobView>,
}

impl Job {
    fn new(id: u64, request: CheckedRequest) -> Self {
        let of = request.seeds.len() * request.sampler.taken();
        let view = JobView {
            id,
            stage: Stage::Queued,
            ahead: 0,
            done: 0,
            of,
            rate: None,
            seconds_left: None,
            pictures: Vec::new(),
            previews: Vec::new(),
            why: None,
        };
        Self {
            id,
            request,
            given: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            previewed: AtomicBool::new(false),
            seen: Mutex::new(Instant::now()),
            view: watch::Sender::new(view),
        }
    }

    /// What is known of the job now. Asking counts as waiting for it.
    pub fn view(&self) -> watch::Ref<'_, JobView> {
        *lock(&self.seen) = Instant::now();
        self.peek()
    }

    /// What is known of the job now, for somebody who is not waiting for it. While the result is held, the job's state
    /// cannot change.
    pub fn peek(&self) -> watch::Ref<'_, JobView> {
        self.view.borrow()
    }

    /// Watches it. A job whose watchers have all gone is cancelled.
    pub fn watch(&self) -> watch::Receiver<JobView> {
        self.watched.store(true, Ordering::Relaxed);
        *lock(&self.seen) = Instant::now();
        self.view.subscribe()
    }

    /// Makes previews from now on, as long as somebody watches.
    pub fn preview(&self) {
        self.previewed.store(true, Ordering::Relaxed);
    }

    /// Whether somebody looks at previews.
    pub fn is_previewed(&self) -> bool {
        self.previewed.load(Ordering::Relaxed) && self.is_watched()
    }

    fn is_watched(&self) -> bool {
        self.view.receiver_count() > 0
    }

    /// Changes what is known, unless the job has ended.
    pub fn update(&self, change: impl FnOnce(&mut JobView)) {
        self.view.send_if_modified(|view| {
            let goes_on = !view.stage.is_final();
            if goes_on {
                change(view);
            }
            goes_on
        });
    }

    fn end(&self, stage: Stage, why: Option<String>) {
        self.update(|view| {
            (view.stage, view.why, view.ahead, view.seconds_left) = (stage, why, 0, None);
            view.previews.clear();
        });
    }

    /// Whether it has ended, so that its work may be dropped.
    pub fn is_over(&self) -> bool {
        self.peek().stage.is_final()
    }

    fn bytes(&self) -> usize {
        self.peek().pictures.iter().map(|made| made.png.len()).sum()
    }

    /// The device is given images of it.
    fn runs(&self) {
        let begins = self.peek().stage == Stage::Queued;
        if begins {
            *lock(&self.seen) = Instant::now();
        }
        self.update(|view| view.stage = Stage::Running);
    }

    /// Whether all who wanted it have gone, if somebody last asked about any job at `asked`. Who polls several jobs in their
    /// order asks about the first until it is done, and the others wait meanwhile or run beside it.
    fn is_abandoned(&self, limits: &Capacity, asked: Instant) -> bool {
        // What somebody looks at is never locked together with this.
        let waits = self.peek().stage == Stage::Queued;
        let mut seen = lock(&self.seen);
        if self.is_watched() {
            *seen = Instant::now();
            return false;
        }
        if self.watched.load(Ordering::Relaxed) {
            return seen.elapsed() > limits.patience;
        }
        limits.unasked.is_some_and(|unasked| !waits && asked.max(*seen).elapsed() > unasked)
    }
}

/// What the device is given at a time: images of one job, or of several of one shape and setting.
pub struct JobBatch {
    /// Each image: its job, and which of the job's it is.
    pub images: Vec<(Arc<Job>, usize)>,
}

impl JobBatch {
    /// The jobs, each once.
    pub fn jobs(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.images.chunk_by(|a, b| a.0.id == b.0.id).map(|part| &part[0].0)
    }
}

#[derive(Default)]
struct QueueState {
    last: u64,
    /// The open jobs in order. Those at the front may have images on the device already.
    open: VecDeque<Arc<Job>>,
    over: VecDeque<Arc<Job>>,
    closed: bool,
}

/// The queue.
pub struct Queue {
    limits: Capacity,
    state: Mutex<QueueState>,
    changed: Condvar,
    /// When somebody last asked about a job.
    asked: Mutex<Instant>,
}

/// Locks even if a thread has panicked, as it leaves nothing half done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    /// An empty queue, whose jobs get numbers after `last`.
    pub fn new(limits: Capacity, last: u64) -> Self {
        let state = Mutex::new(QueueState { last, ..QueueState::default() });
        Self { limits, state, changed: Condvar::new(), asked: Mutex::new(Instant::now()) }
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`Refusal::Full`], [`Refusal::Stopping`].
    pub fn submit(&self, request: CheckedRequest) -> Result<Arc<Job>, Refusal> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(Refusal::Stopping);
        }
        let uploads = |request: &CheckedRequest| request.like.iter().map(Bytes::len).sum::<usize>();
        let uploaded: usize = state.open.iter().map(|job| uploads(&job.request)).sum();
        if state.open.len() >= self.limits.jobs || uploaded + uploads(&request) > self.limits.uploads {
            return Err(Refusal::Full(state.open.len()));
        }
        state.last += 1;
        let job = Arc::new(Job::new(state.last, request));
        state.open.push_back(job.clone());
        self.settle(&mut state);
        self.changed.notify_one();
        Ok(job)
    }

    /// The job of a number, while it is known, for somebody who asks about it.
    pub fn job(&self, id: u64) -> Option<Arc<Job>> {
        let state = lock(&self.state);
        let found = state.open.iter().chain(&state.over).find(|job| job.id == id).cloned();
        drop(state);
        found.inspect(|_| self.asked())
    }

    /// Somebody asks how jobs get on.
    pub fn asked(&self) {
        *lock(&self.asked) = Instant::now();
    }

    /// The jobs that wait or run, in order.
    pub fn open(&self) -> Vec<Arc<Job>> {
        // Those who wait for a job hear of its end a moment before it is put away.
        lock(&self.state).open.iter().filter(|job| !job.is_over()).cloned().collect()
    }

    /// Waits for work, and takes up to `most` images of the first job, and of others of its shape and setting if it has
    /// fewer. None if the queue is closed.
    pub fn next(&self, most: usize) -> Option<JobBatch> {
        let mut state = lock(&self.state);
        loop {
            if state.closed {
                return None;
            }
            self.settle(&mut state);
            let mut images: Vec<(Arc<Job>, usize)> = Vec::new();
            for job in &state.open {
                let fits = images.first().is_none_or(|(first, _)| first.request.fits(&job.request));
                let (given, all) = (job.given.load(Ordering::Relaxed), job.request.seeds.len());
                if fits && given < all {
                    let until = all.min(given + most - images.len());
                    images.extend((given..until).map(|index| (job.clone(), index)));
                    job.given.store(until, Ordering::Relaxed);
                }
                if images.len() == most {
                    break;
                }
            }
            if !images.is_empty() {
                let batch = JobBatch { images };
                batch.jobs().for_each(|job| job.runs());
                return Some(batch);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Adds a finished picture to a job.
    pub fn made(&self, job: &Job, made: FinishedPicture) {
        let mut complete = false;
        job.update(|view| {
            view.previews.retain(|preview| preview.index != made.index);
            view.pictures.push(made);
            complete = view.pictures.len() == job.request.seeds.len();
        });
        if complete {
            self.end(job, Stage::Done, None);
        }
    }

    /// Ends a job that cannot be done.
    pub fn fail(&self, job: &Job, why: String) {
        self.end(job, Stage::Failed, Some(why));
    }

    /// Cancels a job. Its finished pictures stay.
    pub fn cancel(&self, job: &Job, why: &str) {
        self.end(job, Stage::Cancelled, Some(why.into()));
    }

    /// Cancels the jobs that nobody waits for.
    pub fn cancel_abandoned(&self) {
        let asked = *lock(&self.asked);
        for job in self.open().into_iter().filter(|job| job.is_abandoned(&self.limits, asked)) {
            self.cancel(&job, "nobody waited for it any more");
        }
    }

    /// Takes no more jobs, and cancels those that are there.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        for job in self.open() {
            self.cancel(&job, "the server stopped");
        }
        self.changed.notify_all();
    }

    fn end(&self, job: &Job, stage: Stage, why: Option<String>) {
        job.end(stage, why);
        self.settle(&mut lock(&self.state));
    }

    /// Puts away the jobs that have ended, forgets the oldest of those, and tells the others how many are ahead of
    /// them.
    fn settle(&self, state: &mut QueueState) {
        let (over, open): (VecDeque<_>, _) = state.open.drain(..).partition(|job| job.is_over());
        state.open = open;
        state.over.extend(over);
        let mut bytes: usize = state.over.iter().map(|job| job.bytes()).sum();
        while state.over.len() > self.limits.kept || bytes > self.limits.kept_bytes {
            let Some(job) = state.over.pop_front() else { break };
            bytes -= job.bytes();
        }
        for (place, job) in state.open.iter().enumerate() {
            if job.peek().ahead != place {
                job.update(|view| view.ahead = place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::tests::model;
    use super::*;
    use crate::serve::request::RequestBody;

    #[test]
    fn a_job_is_given_up_when_it_runs_and_nobody_asks_about_any() {
        let queue = |unasked| Queue::new(Capacity { unasked, ..Capacity::default() }, 0);
        let model = model();
        let submit = |queue: &Queue| {
            let body = RequestBody::default();
            queue.submit(CheckedRequest::new(body, model.clone()).unwrap()).unwrap()
        };
        let later = || std::thread::sleep(Duration::from_millis(10));

        let hasty = queue(Some(Duration::ZERO));
        let [first, second] = [submit(&hasty), submit(&hasty)];
        later();
        hasty.cancel_abandoned();
        assert_eq!(hasty.open().len(), 2, "jobs that wait are not given up");
        hasty.next(1);
        later();
        hasty.cancel_abandoned();
        assert_eq!([first.peek().stage, second.peek().stage], [Stage::Cancelled, Stage::Queued]);

        // Both run, as one batch, and the client asks about the first.
        let polled = queue(Some(Duration::from_millis(500)));
        let [first, second] = [submit(&polled), submit(&polled)];
        polled.next(2);
        for _ in 0..60 {
            later();
            assert!(polled.job(first.id).is_some());
            polled.cancel_abandoned();
        }
        assert_eq!(second.peek().stage, Stage::Running);

        let written = queue(None);
        let job = submit(&written);
        written.next(1);
        later();
        written.cancel_abandoned();
        assert_eq!(job.peek().stage, Stage::Running, "its pictures are also written to a directory");
    }
}
