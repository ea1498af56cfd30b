//! An NVIDIA GPU, through the driver's interface alone: libcuda is loaded when a device is asked for, and
//! a machine without it is told so.
//!
//! Two streams. Commands and graphs run on the first, in order, and what is written to memory comes on the second (`memory`).
//! A third one ([`Runtime::beside`]) is for NCCL's commands, which wait for others and are waited for by events.
//! Everything is on one thread; a device used by another thread in between is bound again.

mod commands;
mod driver;
mod memory;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_int;
use std::rc::Rc;

use cudarc::driver::{DriverError, result, sys};

use super::launch::{TensorMap, TensorMapSpec};
use super::runtime::{Beside, Command, Graph, MeasuredOn, Memory, Runtime};
use super::tiles::{Card, Tuned};
use crate::backend::DeviceError;
use crate::system;
use commands::{LoadedKernel, Recorded, Side};
use driver::{card_info, describe, driver_version, in_words};
use memory::{Allocation, DOWNLOAD, RING, Ring};

pub use driver::{CardInfo, devices};

/// Aligned as the driver wants its input.
#[repr(C, align(16))]
struct Fatbin<B: ?Sized>(B);

macro_rules! fatbin {
    ($path:literal) => {
        &Fatbin(*include_bytes!($path))
    };
}
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Whether `kernels/*_hopper.cu` are among them.
pub(super) const HAS_HOPPER: bool = {
    let (mut i, mut has) = (0, false);
    while i < ARCHS.len() {
        has |= ARCHS[i] == 90;
        i += 1;
    }
    has
};

/// What all clones of a [`Cuda`], its memory and its graphs share. Dropped last, so everything it holds is
/// unused by then.
struct CudaDevice {
    info: CardInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    commands: sys::CUstream,
    uploads: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Whether the launches of all graphs, or of none, may overlap (EDM2K_OVERLAP); `None`: those of the graphs for
    /// which that is asked.
    overlap: Option<bool>,
    kernels: RefCell<HashMap<String, LoadedKernel>>,
    /// For messages: the device tells of a fault later.
    last_kernel: RefCell<String>,
    ring: RefCell<Ring>,
    /// Pinned.
    download: *mut u8,
    /// Recorded by the last [`Runtime::pace`], and the next one's.
    paces: Cell<[sys::CUevent; 2]>,
    /// Dropped memory by its size. All commands are on one stream: whatever its next owner does with it comes after
    /// what its last one did.
    kept: RefCell<HashMap<usize, Vec<sys::CUdeviceptr>>>,
}

impl CudaDevice {
    fn failed(&self, error: DriverError) -> DeviceError {
        let last = self.last_kernel.borrow();
        let after = if last.is_empty() { String::new() } else { format!("; the last kernel launched was {last}") };
        self.wrong(describe(error) + &after)
    }

    fn wrong(&self, what: String) -> DeviceError {
        DeviceError::Failed { device: self.info.label(), what }
    }

    fn require<T>(&self, done: Result<T, DriverError>) -> Result<T, DeviceError> {
        done.map_err(|e| self.failed(e))
    }

    /// Makes this thread use the device.
    fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `self`.
        self.require(unsafe { result::ctx::set_current(self.context) })
    }

    /// Waits for all commands.
    fn wait(&self) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: a live stream.
        self.require(unsafe { result::stream::synchronize(self.commands) })
    }

    /// Why a fatbin was refused.
    fn no_code(&self, error: DriverError) -> DeviceError {
        let archs: Vec<_> = ARCHS.iter().map(|arch| format!("sm_{arch}")).collect();
        let (major, minor) = self.info.capability;
        let mut what = format!(
            "{}, sm_{major}{minor}: the driver refuses the kernels, which CUDA {COMPILER} compiled for {} and newer: {}",
            self.info.label(),
            archs.join(", "),
            describe(error)
        );
        let version = driver_version();
        let major = COMPILER.split('.').next().and_then(|major| major.parse::<c_int>().ok());
        if major > Some(version / 1000) {
            what += &format!("; the driver is for CUDA {}: a newer one may help", in_words(version));
        }
        DeviceError::Unavailable(what)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Errors were reported by what caused them; a lost device refuses everything here.
        let _ = self.wait();
        self.free_kept();
        let ring = self.ring.get_mut();
        // SAFETY: all made by us, destroyed once, and idle. What was never made is null.
        unsafe {
            let of_the_ring = ring.events.drain(..).chain(ring.in_flight.drain(..).map(|piece| piece.left));
            for event in of_the_ring.chain(self.paces.get()).filter(|event| !event.is_null()) {
                let _ = result::event::destroy(event);
            }
            if ring.device != 0 {
                let _ = result::free_sync(ring.device);
            }
            for pinned in [ring.pinned, self.download] {
                if !pinned.is_null() {
                    let _ = result::free_host(pinned.cast());
                }
            }
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            for stream in [self.commands, self.uploads] {
                if !stream.is_null() {
                    let _ = result::stream::destroy(stream);
                }
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A GPU, and the choices of tiles that were measured on it. Clones are the same one.
#[derive(Clone)]
pub struct Cuda(Rc<CudaDevice>, Option<Rc<Tuned>>);

impl Cuda {
    /// Opens the device that the driver counts as `ordinal`.
    ///
    /// # Errors
    /// `NoDriver`; `Absent`: no such device; `Unavailable`: the driver does not work, the card is too old, or this program
    /// has no code for it.
    /// `OutOfMemory`, `Failed`: as the device says.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let cards = devices()?;
        let Some(info) = cards.get(ordinal) else {
            let there = cards.len().saturating_sub(1);
            let what = format!("there is no device cuda:{ordinal}; the last one is cuda:{there}");
            return Err(DeviceError::Absent(what));
        };
        info.check(ARCHS)?;
        let unavailable = |e| DeviceError::Unavailable(format!("{}: {}", info.label(), describe(e)));
        let (device, info) = card_info(ordinal).map_err(unavailable)?;
        // SAFETY: `device` is one; released when `CudaDevice` is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(unavailable)?;
        // From here on what is made belongs to `CudaDevice`, whose drop takes it back.
        let mut made = CudaDevice {
            info,
            device,
            context,
            commands: std::ptr::null_mut(),
            uploads: std::ptr::null_mut(),
            modules: Vec::new(),
            overlap: std::env::var_os("EDM2K_OVERLAP").map(|value| value == "1"),
            kernels: RefCell::default(),
            last_kernel: RefCell::default(),
            ring: RefCell::new(Ring {
                pinned: std::ptr::null_mut(),
                device: 0,
                next: 0,
                in_flight: VecDeque::new(),
                events: Vec::new(),
            }),
            download: std::ptr::null_mut(),
            paces: Cell::new([std::ptr::null_mut(); 2]),
            kept: RefCell::default(),
        };
        made.bind()?;
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
        made.commands = made.require(stream())?;
        made.uploads = made.require(stream())?;
        let event = || made.require(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING));
        made.paces.set([event()?, std::ptr::null_mut()]);
        made.paces.set([made.paces.get()[0], event()?]);
        for (_, fatbin) in FATBINS.iter().filter(|(name, _)| made.info.runs(name)) {
            // SAFETY: a fatbin, aligned, that lives as long as the program.
            let module = unsafe { result::module::load_data(fatbin.0.as_ptr().cast()) };
            made.modules.push(module.map_err(|e| made.no_code(e))?);
        }
        let place = made.allocate(RING, "the uploads' ring")?;
        // SAFETY: pinned memory of any content.
        let pinned = |bytes| unsafe { result::malloc_host(bytes, 0) };
        made.ring.get_mut().device = place;
        made.ring.get_mut().pinned = made.require(pinned(RING))?.cast();
        made.download = made.require(pinned(DOWNLOAD))?.cast();
        Ok(Self(Rc::new(made), None))
    }

    /// The same, with these choices of tiles.
    #[must_use]
    pub fn tuned_by(self, tuned: Tuned) -> Self {
        Self(self.0, Some(Rc::new(tuned)))
    }

    /// What it is.
    pub fn info(&self) -> &CardInfo {
        &self.0.info
    }
}

impl Runtime for Cuda {
    fn card(&self) -> Card {
        self.0.info.card()
    }

    fn origin(&self) -> MeasuredOn {
        let archs: Vec<_> = ARCHS.iter().map(u32::to_string).collect();
        let compiled = format!("CUDA {COMPILER} for {}", archs.join(" "));
        let driver = system::nvidia_driver().unwrap_or_else(|| format!("for CUDA {}", in_words(driver_version())));
        MeasuredOn::new(&self.0.info.name, self.card(), driver, &compiled)
    }

    fn tuned(&self) -> Option<Rc<Tuned>> {
        self.1.clone()
    }

    fn name(&self) -> String {
        self.0.info.label()
    }

    fn is_card(&self) -> bool {
        true
    }

    fn uuid(&self) -> Option<String> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes sixteen bytes; `device` is one.
        let told = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.0.device) }.result();
        told.ok().map(|()| uuid.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect())
    }

    fn free(&self) -> Option<u64> {
        self.0.bind().ok()?;
        self.0.require(result::mem_get_info()).ok().map(|(free, _)| free as u64)
    }

    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError> {
        Ok(Rc::new(Allocation::new(&self.0, bytes, purpose)?))
    }

    fn give_back(&self) -> Result<(), DeviceError> {
        self.0.wait()?;
        self.0.free_kept();
        Ok(())
    }

    fn pace(&self) -> Result<(), DeviceError> {
        let device = &self.0;
        device.bind()?;
        let [last, now] = device.paces.get();
        // SAFETY: live events and a live stream; of an event that was never recorded nothing is waited for.
        let paced =
            unsafe { result::event::record(now, device.commands).and_then(|()| result::event::synchronize(last)) };
        device.paces.set([now, last]);
        device.require(paced)
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
        self.0.tensor_map(spec)
    }

    unsafe fn run(&self, command: &Command) -> Result<(), DeviceError> {
        self.0.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.0.give(command, false) }
    }

    unsafe fn record(&self, commands: Vec<Command>, overlap: bool) -> Result<Box<dyn Graph>, DeviceError> {
        // SAFETY: the caller's promise.
        Ok(Box::new(unsafe { Recorded::new(&self.0, &commands, overlap)? }))
    }

    fn beside(&self) -> Result<Option<Box<dyn Beside>>, DeviceError> {
        Ok(Some(Box::new(Side::new(&self.0)?)))
    }

    fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        self.0.time(work, before, repeats)
    }
}
