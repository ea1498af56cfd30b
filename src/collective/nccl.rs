//! Sums between cards by NVIDIA's NCCL, which is loaded when it is first needed.
//!
//! The library is `EDM2K_NCCL`, or the system's `libnccl.so.2`, or that of the wheel `nvidia-nccl-cu13` (or `-cu12`) in the
//! Python environment that this program was installed in or that is active. Its functions are declared here: cudarc's
//! bindings panic where there is no library, and cannot be told where it is.
//!
//! Its calls go to a stream of their own. A sum of gradients waits for what the device was given before. It runs beside
//! what the device is given after that, which is the rest of the backward pass. The optimizer's step waits for all
//! sums. Whatever NCCL is waiting for, the ranks go on watching each other.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use super::{Collective, CollectiveError};
use crate::backend::Values;
use crate::backend::gpu::runtime::Beside;

/// How many bytes NCCL's unique id has, in all its versions.
const ID: usize = 128;
/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
/// `ncclInProgress`: no error.
const IN_PROGRESS: c_int = 7;

#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([c_char; ID]);

type Comm = *mut c_void;
type Stream = *mut c_void;

/// The functions of the library that are called, under their names.
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    /// Keeps the functions' code loaded; dropped last.
    _library: Library,
}

/// Where the library may be, in the order in which it is looked for.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("EDM2K_NCCL") {
        return vec![path.into()];
    }
    let mut all = vec![PathBuf::from("libnccl.so.2")];
    // The environment that has this program as .../bin/edm2k, and the one that is active.
    let own = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].map(|name| std::env::var_os(name).map(PathBuf::from));
    for environment in own.into_iter().chain(active.into_iter().flatten()) {
        all.extend(wheels(&environment));
    }
    all
}

/// The libraries of NCCL's wheels in a Python environment.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let pythons = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
    let library = |python: PathBuf| python.join("site-packages/nvidia/nccl/lib/libnccl.so.2");
    pythons.map(|entry| library(entry.path())).filter(|path| path.exists()).collect()
}

impl Functions {
    fn load() -> Result<Self, CollectiveError> {
        let mut reasons = Vec::new();
        for path in candidates() {
            // SAFETY: NCCL runs its own start and no more.
            match unsafe { Library::new(&path) } {
                Ok(library) => return Self::of(library).map_err(|why| wrong(&format!("{}: {why}", path.display()))),
                Err(why) => reasons.push(why.to_string()),
            }
        }
        let why = reasons.join("; ");
        Err(wrong(&format!(
            "the library is missing ({why}): pip install nvidia-nccl-cu13, or let EDM2K_NCCL name a libnccl.so.2"
        )))
    }

    fn of(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types are those of nccl.h, where the results are enums of C's int.
        unsafe {
            Ok(Self {
                get_version: *library.get(b"ncclGetVersion\0")?,
                get_error_string: *library.get(b"ncclGetErrorString\0")?,
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0")?,
                comm_get_async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                comm_destroy: *library.get(b"ncclCommDestroy\0")?,
                comm_abort: *library.get(b"ncclCommAbort\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                broadcast: *library.get(b"ncclBroadcast\0")?,
                _library: library,
            })
        }
    }

    /// Turns the result of a call into an error, if it is one. `what` says what the call was for.
    fn require(&self, result: c_int, what: &str) -> Result<(), CollectiveError> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: the library has a static text for any number.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(result)) }.to_string_lossy().into_owned();
        Err(wrong(&format!("{what}: {text} (NCCL_DEBUG=INFO says more)")))
    }

    /// NCCL's version as people write it.
    fn version(&self) -> Result<String, CollectiveError> {
        let mut version = 0;
        // SAFETY: writes one integer.
        self.require(unsafe { (self.get_version)(&mut version) }, "its version")?;
        Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
    }
}

fn wrong(what: &str) -> CollectiveError {
    CollectiveError::Nccl(what.into())
}

/// The version of the NCCL that is found.
///
/// # Errors
/// [`CollectiveError::Nccl`]: there is none; it says where NCCL was looked for.
pub fn version() -> Result<String, CollectiveError> {
    Functions::load()?.version()
}

/// Ranks with a card each.
pub struct Nccl {
    /// The connection for small values.
    ranks: Box<dyn Collective>,
    beside: Box<dyn Beside>,
    comm: Comm,
    functions: Functions,
    /// Whether all ranks said that they are done.
    done: Cell<bool>,
}

impl Nccl {
    /// Joins the cards of ranks that have met. `beside` is a queue of this rank's card.
    ///
    /// # Errors
    /// [`CollectiveError::Nccl`]: there is no library, or it refuses. One rank's error is every rank's.
    pub fn new(mut ranks: Box<dyn Collective>, beside: Box<dyn Beside>) -> Result<Self, CollectiveError> {
        let loaded = Functions::load().and_then(|functions| Ok((functions.version()?, functions)));
        // A rank without the library says so before the others wait for it.
        let said = match &loaded {
            Ok((version, _)) => version.clone(),
            Err(why) => format!("!{why}"),
        };
        let all = ranks.gather(said.as_bytes())?;
        let functions = loaded?.1;
        let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        if let Some(rank) = all.iter().position(|said| said.starts_with(b"!")) {
            return Err(CollectiveError::Differs(format!("rank {rank}: {}", &text(rank)[1..])));
        }
        if let Some(rank) = all.iter().position(|said| *said != all[0]) {
            let [theirs, ours] = [rank, 0].map(text);
            return Err(CollectiveError::Differs(format!("rank {rank} has NCCL {theirs}, rank 0 has {ours}")));
        }
        let mut id = UniqueId([0; ID]);
        let made = match ranks.rank() {
            // SAFETY: writes the id.
            0 => functions.require(unsafe { (functions.get_unique_id)(&mut id) }, "ncclGetUniqueId"),
            _ => Ok(()),
        };
        let bytes = id.0.map(|x| x as u8);
        let said = if made.is_ok() { &bytes[..] } else { &[] };
        let all = ranks.gather(said)?;
        made?;
        let Ok(bytes) = <[u8; ID]>::try_from(&*all[0]) else { return Err(wrong("rank 0 could not begin")) };
        let id = UniqueId(bytes.map(|x| x as c_char));
        // This makes the device the current one of this thread.
        beside.stream()?;
        let mut comm = std::ptr::null_mut();
        ranks.waits();
        // SAFETY: the device is this thread's, and all ranks make the call; which of them are alive is watched.
        let joined = unsafe { (functions.comm_init_rank)(&mut comm, ranks.size() as c_int, id, ranks.rank() as c_int) };
        functions.require(joined, "ncclCommInitRank")?;
        ranks.barrier()?;
        Ok(Self { ranks, beside, comm, functions, done: Cell::new(false) })
    }

    /// Sums values in device memory, or replaces them by rank 0's.
    fn exchange(&mut self, values: Values, sum: bool) -> Result<(), CollectiveError> {
        let Values::Device(memory, bytes) = values else { return Err(wrong("the values are not on a card")) };
        let (at, count) = (memory.ptr().offset(bytes.start).0 as *mut c_void, bytes.len() / 4);
        let stream = self.beside.stream()?;
        self.beside.follow()?;
        self.ranks.waits();
        // SAFETY: `count` values of live memory of this device, which commands touch that come before, or after `summed`; all
        // ranks make the same call with as many.
        let done = unsafe {
            match sum {
                true => (self.functions.all_reduce)(at, at, count, FLOAT32, SUM, self.comm, stream),
                false => (self.functions.broadcast)(at, at, count, FLOAT32, 0, self.comm, stream),
            }
        };
        self.functions.require(done, if sum { "ncclAllReduce" } else { "ncclBroadcast" })?;
        self.check()
    }

    /// The error of a call that failed after it had returned.
    fn check(&self) -> Result<(), CollectiveError> {
        let mut error = 0;
        // SAFETY: a live communicator; writes one integer.
        let asked = unsafe { (self.functions.comm_get_async_error)(self.comm, &mut error) };
        self.functions.require(asked, "ncclCommGetAsyncError")?;
        self.functions.require(if error == IN_PROGRESS { 0 } else { error }, "between the cards")
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn size(&self) -> usize {
        self.ranks.size()
    }

    fn all_reduce(&mut self, values: Values) -> Result<(), CollectiveError> {
        self.exchange(values, true)
    }

    fn summed(&mut self) -> Result<(), CollectiveError> {
        Ok(self.beside.lead()?)
    }

    fn broadcast(&mut self, values: Values) -> Result<(), CollectiveError> {
        self.exchange(values, false)?;
        Ok(self.beside.lead()?)
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let all = self.ranks.gather(own)?;
        self.check()?;
        Ok(all)
    }

    fn waits(&self) {
        self.ranks.waits();
    }

    fn leave(&self, failed: Option<&str>) {
        self.done.set(failed.is_none());
        self.ranks.leave(failed);
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: made by us, and used no more. Unless all are done, a destruction might wait for those that are gone.
        let _ = unsafe {
            match self.done.get() {
                true => (self.functions.comm_destroy)(self.comm),
                false => (self.functions.comm_abort)(self.comm),
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_found_in_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let lib = dir.path().join("lib/python3.12/site-packages/nvidia/nccl/lib");
        assert_eq!(wheels(dir.path()), Vec::<PathBuf>::new());
        std::fs::create_dir_all(&lib).unwrap();
        assert_eq!(wheels(dir.path()), Vec::<PathBuf>::new(), "without the library");
        std::fs::write(lib.join("libnccl.so.2"), "").unwrap();
        assert_eq!(wheels(dir.path()), [lib.join("libnccl.so.2")]);
    }
}
