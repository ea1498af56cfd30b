//! An NVIDIA GPU, through the driver's interface alone: libcuda is loaded when a device is asked for, and
//! a machine without it is told so.
//!
//! Two streams. Commands and graphs run on the first, in order. What [`Memory::write`] brings takes two
//! steps, so that the transfer overlaps with the commands given before and yet happens after them:
//!
//! ```text
//! caller's buffer --host--> pinned ring --upload stream--> ring on the device --command stream--> its place
//! ```
//!
//! The caller's buffer is free after the first step; the host waits for the device only when the ring is
//! full. Everything is on one thread; a device used by another thread in between is bound again.
//!
//! A third one ([`Runtime::beside`]) is for NCCL's commands, which wait for others and are waited for by events.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_int, c_void};
use std::rc::Rc;

use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;

use super::launch::{DevicePtr, Launch, Precision, TensorMap, TensorMapSpec};
use super::runtime::{Beside, Command, Graph, Memory, Origin, Runtime, advice, behind_launches};
use super::tiles::{Card, Tuned};
use crate::backend::DeviceError;
use crate::system;

use sys::CUdevice_attribute as Attribute;
use sys::CUfunction_attribute as FunctionAttribute;
use sys::CUlaunchAttributeID as AttributeId;

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

/// The first driver version with all functions called here, as the driver counts: CUDA 12.4.
const OLDEST_DRIVER: i32 = 12040;
/// The functions that are called here, and cudarc panics where one is missing; the first four serve to ask for the version.
/// Tensor maps' are for cards whose drivers have them.
#[rustfmt::skip]
const FUNCTIONS: [&str; 45] = [
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuCtxSetCurrent", "cuDeviceGet",
    "cuDeviceGetAttribute", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2", "cuDevicePrimaryCtxRetain", "cuDeviceTotalMem_v2", "cuEventCreate",
    "cuEventDestroy_v2", "cuEventElapsedTime", "cuEventRecord", "cuEventSynchronize", "cuFuncGetAttribute", "cuFuncGetParamInfo",
    "cuFuncSetAttribute", "cuGraphDestroy", "cuGraphExecDestroy", "cuGraphInstantiateWithFlags",
    "cuGraphLaunch", "cuGraphUpload", "cuLaunchKernelEx", "cuMemAlloc_v2", "cuMemFreeHost", "cuMemFree_v2",
    "cuMemGetInfo_v2", "cuMemHostAlloc", "cuMemcpyDtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuStreamBeginCapture_v2",
    "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamEndCapture", "cuStreamSynchronize", "cuStreamWaitEvent",
];
/// Bytes of the ring of uploads. A write is cut into pieces of a quarter at most.
const RING: usize = 32 << 20;
/// Pieces that may be under way. Small ones would take an event each until the ring is full.
const MOST_IN_FLIGHT: usize = 64;
/// Bytes that a thread copies into it at a time.
const PIECE: usize = 1 << 20;
/// Bytes of the pinned memory that reads pass through.
const DOWNLOAD: usize = 8 << 20;
const OUT_OF_MEMORY: DriverError = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
/// A purpose of memory; how much it takes, the driver does not say.
const GRAPH: &str = "a graph";
/// Allocations start at multiples of this.
const ALIGNMENT: usize = 256;

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct CardInfo {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// Its maker's name for it.
    pub name: String,
    /// Compute capability, (9, 0) for sm_90.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Most bytes of shared memory of a block.
    pub shared: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_of_sm: u32,
}

impl CardInfo {
    /// What tiles are chosen for. That f32 sums halve the rate of its products is a property of what is sold for games. Of the
    /// cards of the same chips for work, two have it by their data sheets.
    fn card(&self) -> Card {
        let usual = Card::new(self.sms, self.capability.0 * 10 + self.capability.1);
        let halves = self.name.contains("GeForce") || ["NVIDIA L40", "NVIDIA A10G"].contains(&&*self.name);
        let halves_f32_sums = usual.halves_f32_sums && halves;
        Card { halves_f32_sums, shared: self.shared_of_sm as usize, ..usual }
    }

    /// For people: name and ordinal.
    fn label(&self) -> String {
        format!("{} (cuda:{})", self.name, self.ordinal)
    }

    /// Whether it runs the kernels of a file. Of `*_hopper.cu` there is code for sm_90a alone, and the driver of another card
    /// refuses to load that.
    fn runs(&self, file: &str) -> bool {
        self.capability == (9, 0) || !file.ends_with("_hopper")
    }

    /// Whether this program has code for the card, whose `archs` are 80 for sm_80 and so on.
    fn check(&self, archs: &[u32]) -> Result<(), DeviceError> {
        let (major, minor) = self.capability;
        let unavailable = |what| Err(DeviceError::Unavailable(format!("{}: {what}", self.label())));
        if major < 8 {
            return unavailable(format!("compute capability {major}.{minor}, needs 8.0 or newer (RTX 30, A100)"));
        }
        let lowest = archs.iter().min().copied().unwrap_or(u32::MAX);
        if major * 10 + minor < lowest {
            let what = format!("compute capability {major}.{minor}, this edm2k was compiled for {lowest} and newer");
            return unavailable(what + " (EDM2K_CUDA_ARCHS)");
        }
        Ok(())
    }
}

/// Text of a driver's error: its name and meaning.
fn describe(error: DriverError) -> String {
    let text = |s: Result<&std::ffi::CStr, DriverError>| s.ok().map(|s| s.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(meaning)) => format!("{name}, {meaning}"),
        _ => format!("driver error {}", error.0 as u32),
    }
}

/// Loads the driver, once.
fn start_driver() -> Result<(), DeviceError> {
    let unavailable = |what: String| Err(DeviceError::Unavailable(what));
    // SAFETY: opens the library as any of cudarc's functions would, which panic where it is missing.
    if !unsafe { sys::is_culib_present() } {
        return match system::why_not_loaded(system::CUDA_DRIVER) {
            Some(why) => unavailable(format!("the NVIDIA driver does not load: {why}")),
            None => Err(DeviceError::NoDriver { library: system::CUDA_DRIVER }),
        };
    }
    // SAFETY: it loads, as was seen above.
    let library = unsafe { sys::culib() };
    // SAFETY: what is found is not called.
    let lacks = |name: &&&str| unsafe { library.get::<fn()>(name.as_bytes()) }.is_err();
    let has_all = |names: &[&str]| match names.iter().find(lacks) {
        Some(name) => unavailable(format!("the NVIDIA driver does not load: its library has no function {name}")),
        None => Ok(()),
    };
    let (first, others) = FUNCTIONS.split_at(4);
    has_all(first)?;
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(DeviceError::Absent("no NVIDIA GPU found".into()));
        }
        Err(e) => return unavailable(format!("the NVIDIA driver does not start: {}", describe(e))),
    }
    let version = driver_version();
    if version < OLDEST_DRIVER {
        let [found, needed] = [version, OLDEST_DRIVER].map(in_words);
        return unavailable(format!("the NVIDIA driver is for CUDA {found}, needs {needed} or newer"));
    }
    has_all(others)
}

/// The newest CUDA that the driver knows, as it counts; 0 if it does not say.
fn driver_version() -> c_int {
    let mut version: c_int = 0;
    // SAFETY: writes one integer; the library is loaded, and has the function.
    let told = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    told.map_or(0, |()| version)
}

/// CUDA's version as people write it.
fn in_words(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn card_info(ordinal: usize) -> Result<(sys::CUdevice, CardInfo), DriverError> {
    let device = result::device::get(ordinal as c_int)?;
    // SAFETY: `device` is one.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map(|value| value.max(0) as u32);
    let info = CardInfo {
        ordinal,
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: `device` is one.
        memory: unsafe { result::device::total_mem(device)? } as u64,
        shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_of_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    };
    Ok((device, info))
}

/// The GPUs of this machine, in the driver's order, of any age.
///
/// # Errors
/// `NoDriver`; `Absent`: the driver finds none; `Unavailable`: it does not start.
pub fn devices() -> Result<Vec<CardInfo>, DeviceError> {
    start_driver()?;
    let count = result::device::get_count();
    let list = count.and_then(|n| (0..n as usize).map(|i| Ok(card_info(i)?.1)).collect::<Result<Vec<_>, _>>());
    list.map_err(|e| DeviceError::Unavailable(format!("the NVIDIA driver lists no devices: {}", describe(e))))
}

/// What is said where a kernel is in none of the files.
fn no_kernel(name: &str) -> String {
    match HAS_HOPPER {
        false if name.starts_with("hopper_") => {
            "this edm2k has no wgmma: it was compiled without 90 (EDM2K_CUDA_ARCHS)".into()
        }
        _ => format!("there is no kernel {name}"),
    }
}

/// A kernel ready to be launched.
#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    /// Bytes of its params struct.
    params: usize,
    /// Whether its code waits for the launch before it (`begin_kernel` of `kernels/ptx.cuh`): that for sm_90 and newer does.
    waits: bool,
}

/// A range of the ring in use, until its event.
struct InFlight {
    first: usize,
    end: usize,
    left: sys::CUevent,
}

/// The way of data to the device.
struct Ring {
    pinned: *mut u8,
    device: sys::CUdeviceptr,
    /// Where the next piece goes.
    next: usize,
    in_flight: VecDeque<InFlight>,
    /// Events to be used again.
    events: Vec<sys::CUevent>,
}

/// What all clones of a [`Cuda`], its memory and its graphs share. Dropped last, so everything it holds is
/// unused by then.
struct Device {
    info: CardInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    commands: sys::CUstream,
    uploads: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Whether the launches of all graphs, or of none, may overlap (EDM2K_OVERLAP); otherwise of those for which it is asked.
    overlap: Option<bool>,
    kernels: RefCell<HashMap<String, Kernel>>,
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

impl Device {
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

    /// Makes the device the one of this thread.
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

    /// The kernel of a launch, looked up once.
    fn kernel(&self, launch: &Launch) -> Result<Kernel, DeviceError> {
        let known = self.kernels.borrow().get(&*launch.kernel).copied();
        let kernel = match known {
            Some(kernel) => kernel,
            None => {
                let name = CString::new(&*launch.kernel).ok();
                // SAFETY: live modules.
                let find =
                    |module: &sys::CUmodule| unsafe { result::module::get_function(*module, name.clone()?) }.ok();
                let found = self.modules.iter().find_map(find);
                let function = found.ok_or_else(|| self.wrong(no_kernel(&launch.kernel)))?;
                let kernel = self.require(self.load(function, launch.shared > 0))?;
                self.kernels.borrow_mut().insert(launch.kernel.to_string(), kernel);
                kernel
            }
        };
        let given = launch.params_len();
        if kernel.params != given {
            let what = format!("kernel {} takes {} bytes of parameters, given {given}", launch.kernel, kernel.params);
            return Err(self.wrong(what));
        }
        Ok(kernel)
    }

    /// Loads a kernel's code, which must not happen during a capture, and lets it use all shared memory.
    fn load(&self, function: sys::CUfunction, dynamic_shared: bool) -> Result<Kernel, DriverError> {
        let (mut at, mut params) = (0, 0);
        // SAFETY: a live function, attributes that exist; each writes or reads one integer.
        let compiled_for = unsafe {
            sys::cuFuncGetParamInfo(function, 0, &mut at, &mut params).result()?;
            let fixed = FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let fixed = result::function::get_function_attribute(function, fixed)?;
            let most = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(function, most, self.info.shared as c_int - fixed)?;
            if dynamic_shared {
                // The L1 cache gets the rest; the tile table counts on all that there is.
                let share = FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                result::function::set_function_attribute(function, share, 100)?;
            }
            result::function::get_function_attribute(function, FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?
        };
        Ok(Kernel { function, params, waits: compiled_for >= 90 })
    }

    /// See [`Runtime::tensor_map`].
    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
        spec.check()?;
        if self.info.capability.0 < 9 {
            return Err(self.wrong("there are no tensor maps before compute capability 9.0".into()));
        }
        let element = |precision| match precision {
            Precision::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Precision::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let plain = sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE;
        let swizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
        let cache = sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
        let zeros = sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
        let mut map = TensorMap([0; 128]);
        let to: *mut sys::CUtensorMap = (&raw mut map).cast();
        let each = [1u32; 4];
        // SAFETY: the driver (12.0 or newer) writes 128 bytes, aligned to 64, and reads arrays of as many elements as
        // the rank says; it does not touch the tensor.
        let encoded = unsafe {
            match *spec {
                TensorMapSpec::Tiled { at, precision, size, stride, tile } => sys::cuTensorMapEncodeTiled(
                    to,
                    element(precision),
                    2,
                    at.0 as *mut c_void,
                    size.map(u64::from).as_ptr(),
                    &stride,
                    tile.as_ptr(),
                    each.as_ptr(),
                    plain,
                    swizzle,
                    cache,
                    zeros,
                ),
                TensorMapSpec::Im2col { at, precision, size, strides, lower, upper, channels, pixels } => {
                    sys::cuTensorMapEncodeIm2col(
                        to,
                        element(precision),
                        4,
                        at.0 as *mut c_void,
                        size.map(u64::from).as_ptr(),
                        strides.as_ptr(),
                        lower.as_ptr(),
                        upper.as_ptr(),
                        channels,
                        pixels,
                        each.as_ptr(),
                        plain,
                        swizzle,
                        cache,
                        zeros,
                    )
                }
            }
        };
        let refused = |e| self.wrong(format!("the driver refuses the tensor map {spec:?}: {}", describe(e)));
        encoded.result().map_err(refused)?;
        Ok(map)
    }

    /// Gives a command to the first stream. If `beside`, a kernel that waits by itself may begin while the launch that was
    /// given last ends.
    ///
    /// # Safety
    /// See [`Command`]; and the device is bound.
    unsafe fn give(&self, command: &Command, beside: bool) -> Result<(), DeviceError> {
        match command {
            Command::Launch(launch) => {
                let kernel = self.kernel(launch)?;
                let mut last = self.last_kernel.borrow_mut();
                last.clear();
                last.push_str(&launch.kernel);
                drop(last);
                let bytes = launch.params(|spec| self.tensor_map(spec))?;
                let mut params = [bytes.as_ptr().cast_mut().cast::<c_void>()];
                let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
                let mut attributes = Vec::new();
                if launch.cluster > 1 {
                    let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
                    let value = sys::CUlaunchAttributeValue { clusterDim: size };
                    attributes.push(attribute(AttributeId::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
                }
                if beside && kernel.waits {
                    let id = AttributeId::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                    let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
                    attributes.push(attribute(id, value));
                }
                let [x, y, z] = launch.grid;
                let config = sys::CUlaunchConfig {
                    gridDimX: x,
                    gridDimY: y,
                    gridDimZ: z,
                    blockDimX: launch.block,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: launch.shared,
                    hStream: self.commands,
                    attrs: attributes.as_mut_ptr(),
                    numAttrs: attributes.len() as u32,
                };
                let (function, extra) = (kernel.function, std::ptr::null_mut());
                // SAFETY: the parameters have the size that the kernel reads, during the call; what they
                // point to is the caller's promise.
                let launched = unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), extra) };
                launched.result().map_err(|e| {
                    let Launch { grid, block, shared, cluster, .. } = launch;
                    let clusters = if *cluster > 1 { format!(", clusters of {cluster}") } else { String::new() };
                    let shape = format!("{grid:?} blocks of {block} threads, {shared} bytes{clusters}");
                    self.wrong(format!("launch of {}, {shape}: {}", launch.kernel, describe(e)))
                })
            }
            Command::Zero { bytes: 0, .. } | Command::Copy { bytes: 0, .. } => Ok(()),
            // SAFETY: the caller's promise.
            Command::Zero { at, bytes } => {
                self.require(unsafe { result::memset_d8_async(at.0, 0, *bytes, self.commands) })
            }
            // SAFETY: the caller's promise.
            Command::Copy { from, to, bytes } => {
                self.require(unsafe { result::memcpy_dtod_async(to.0, from.0, *bytes, self.commands) })
            }
        }
    }

    /// Brings at most a quarter of the ring to device memory.
    ///
    /// # Safety
    /// There are as many bytes of live memory at `to`; and the device is bound.
    unsafe fn bring(&self, to: sys::CUdeviceptr, values: &[u8]) -> Result<(), DeviceError> {
        let mut ring = self.ring.borrow_mut();
        let length = values.len().next_multiple_of(ALIGNMENT);
        let first = if ring.next + length > RING { 0 } else { ring.next };
        let end = first + length;
        let overlaps = |ring: &Ring| ring.in_flight.iter().any(|piece| piece.first < end && first < piece.end);
        while ring.in_flight.len() >= MOST_IN_FLIGHT || overlaps(&ring) {
            let oldest = ring.in_flight.pop_front().expect("there is one");
            // SAFETY: an event of ours that was recorded.
            let left = unsafe { result::event::synchronize(oldest.left) };
            ring.events.push(oldest.left);
            self.require(left)?;
        }
        ring.next = end;
        let mut event = || match ring.events.pop() {
            Some(event) => Ok(event),
            None => result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING),
        };
        let (arrived, left) = (self.require(event())?, self.require(event())?);
        let place = ring.device + first as u64;
        // SAFETY: the range of the ring is within it and nobody's; both streams and events are live; the
        // destination is the caller's promise.
        let done = unsafe {
            let pinned = std::slice::from_raw_parts_mut(ring.pinned.add(first), values.len());
            let pieces = pinned.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            result::memcpy_htod_async(place, pinned, self.uploads)
                .and_then(|()| result::event::record(arrived, self.uploads))
                .and_then(|()| {
                    let plainly = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    result::stream::wait_event(self.commands, arrived, plainly)
                })
                .and_then(|()| result::memcpy_dtod_async(to, place, values.len(), self.commands))
                .and_then(|()| result::event::record(left, self.commands))
        };
        // The wait has been given: the event may be recorded anew.
        ring.events.push(arrived);
        ring.in_flight.push_back(InFlight { first, end, left });
        self.require(done)
    }

    /// Frees what is kept; the commands given before must be done.
    fn free_kept(&self) {
        for at in self.kept.borrow_mut().drain().flat_map(|(_, places)| places) {
            // SAFETY: allocated by us, and owned by none.
            let _ = unsafe { result::free_sync(at) };
        }
    }
}

impl Drop for Device {
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
pub struct Cuda(Rc<Device>, Option<Rc<Tuned>>);

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
        // SAFETY: `device` is one; released when `Device` is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(unavailable)?;
        // From here on what is made belongs to `Device`, whose drop takes it back.
        let mut made = Device {
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

impl Device {
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

    /// Device memory of at least 1 byte.
    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<sys::CUdeviceptr, DeviceError> {
        self.bind()?;
        if let Some(at) = self.kept.borrow_mut().get_mut(&bytes).and_then(Vec::pop) {
            return Ok(at);
        }
        // SAFETY: memory of any content.
        self.with_memory(|| unsafe { result::malloc_sync(bytes) }, bytes, purpose)
    }

    /// What takes so much of the device's memory; where that does not suffice, again without what is kept.
    fn with_memory<T>(
        &self,
        take: impl Fn() -> Result<T, DriverError>,
        bytes: usize,
        purpose: &'static str,
    ) -> Result<T, DeviceError> {
        let mut got = take();
        if matches!(got, Err(OUT_OF_MEMORY)) {
            self.wait()?;
            self.free_kept();
            got = take();
        }
        if !matches!(got, Err(OUT_OF_MEMORY)) {
            return self.require(got);
        }
        let (free, total) = self.require(result::mem_get_info())?;
        let (asked, free, total) = (bytes as u64, free as u64, total as u64);
        Err(DeviceError::OutOfMemory {
            device: self.info.label(),
            asked,
            purpose,
            free,
            total,
            advice: advice(purpose),
        })
    }
}

struct Allocation {
    device: Rc<Device>,
    at: sys::CUdeviceptr,
    bytes: usize,
    /// What was allocated.
    room: usize,
}

impl Allocation {
    fn range(&self, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr, DeviceError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let what = format!("copy of {bytes} bytes at {offset}, but the memory has {}", self.bytes);
            return Err(self.device.wrong(what));
        }
        Ok(self.at + offset as u64)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.kept.borrow_mut().entry(self.room).or_default().push(self.at);
    }
}

impl Memory for Allocation {
    fn ptr(&self) -> DevicePtr {
        DevicePtr(self.at)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(&self, offset: usize, values: &[u8]) -> Result<(), DeviceError> {
        let mut to = self.range(offset, values.len())?;
        self.device.bind()?;
        for piece in values.chunks(RING / 4) {
            // SAFETY: within this allocation.
            unsafe { self.device.bring(to, piece)? };
            to += piece.len() as u64;
        }
        Ok(())
    }

    fn read(&self, offset: usize, values: &mut [u8]) -> Result<(), DeviceError> {
        let mut from = self.range(offset, values.len())?;
        self.device.bind()?;
        for piece in values.chunks_mut(DOWNLOAD) {
            // SAFETY: within this allocation and within the pinned memory, which nothing else uses until the
            // wait is over.
            let (pinned, copied) = unsafe {
                let pinned = std::slice::from_raw_parts_mut(self.device.download, piece.len());
                let copied = result::memcpy_dtoh_async(pinned, from, self.device.commands);
                (pinned, copied)
            };
            self.device.require(copied)?;
            self.device.wait()?;
            piece.copy_from_slice(pinned);
            from += piece.len() as u64;
        }
        Ok(())
    }
}

struct Recorded {
    device: Rc<Device>,
    graph: sys::CUgraphExec,
    last_kernel: String,
}

impl Graph for Recorded {
    fn run(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        self.device.last_kernel.borrow_mut().clone_from(&self.last_kernel);
        // SAFETY: a live graph, whose pointers were promised to `record`.
        self.device.require(unsafe { result::graph::launch(self.graph, self.device.commands) })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let _ = self.device.wait();
        // SAFETY: made by us, destroyed once, and not running.
        let _ = unsafe { result::graph::exec_destroy(self.graph) };
    }
}

impl Runtime for Cuda {
    fn card(&self) -> Card {
        self.0.info.card()
    }

    fn origin(&self) -> Origin {
        let archs: Vec<_> = ARCHS.iter().map(u32::to_string).collect();
        let compiled = format!("CUDA {COMPILER} for {}", archs.join(" "));
        let driver = system::nvidia_driver().unwrap_or_else(|| format!("for CUDA {}", in_words(driver_version())));
        Origin::new(&self.0.info.name, self.card(), driver, &compiled)
    }

    fn tuned(&self) -> Option<Rc<Tuned>> {
        self.1.clone()
    }

    fn name(&self) -> String {
        self.0.info.label()
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
        let room = bytes.max(1).next_multiple_of(ALIGNMENT);
        let at = self.0.allocate(room, purpose)?;
        Ok(Rc::new(Allocation { device: self.0.clone(), at, bytes, room }))
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
        let device = &self.0;
        device.bind()?;
        let launches = || commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(l) } else { None });
        // All that may load code or allocate comes before the capture.
        launches().try_for_each(|launch| device.kernel(launch).map(|_| ()))?;
        let before = device.last_kernel.borrow().clone();
        // SAFETY: live streams and graphs, each destroyed once; the commands are the caller's promise. A failed
        // capture is ended too, or the stream could not be used again.
        let graph = unsafe {
            let here = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            device.require(result::stream::begin_capture(device.commands, here))?;
            let mut commands = behind_launches(&commands);
            let overlap = device.overlap.unwrap_or(overlap);
            let given = commands.try_for_each(|(command, beside)| device.give(command, beside && overlap));
            let captured = result::stream::end_capture(device.commands);
            device.last_kernel.replace(before);
            if let (Err(e), captured) = (given, &captured) {
                if let Ok(graph) = captured {
                    let _ = result::graph::destroy(*graph);
                }
                return Err(e);
            }
            let captured = device.require(captured)?;
            let ready = || result::graph::instantiate(captured, sys::CUgraphInstantiate_flags(0));
            let ready = device.with_memory(ready, 1, GRAPH);
            let _ = result::graph::destroy(captured);
            ready?
        };
        let last_kernel = launches().next_back().map(|launch| launch.kernel.to_string()).unwrap_or_default();
        let recorded = Recorded { device: device.clone(), graph, last_kernel };
        // SAFETY: a live graph and stream.
        device.with_memory(|| unsafe { result::graph::upload(graph, device.commands) }, 1, GRAPH)?;
        Ok(Box::new(recorded))
    }

    fn beside(&self) -> Result<Option<Box<dyn Beside>>, DeviceError> {
        let device = &self.0;
        device.bind()?;
        let mut made = Side { device: device.clone(), stream: std::ptr::null_mut(), event: std::ptr::null_mut() };
        made.stream = device.require(result::stream::create(result::stream::StreamKind::NonBlocking))?;
        made.event = device.require(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
        Ok(Some(Box::new(made)))
    }

    fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        let device = &self.0;
        device.bind()?;
        let mut events = Timers(Vec::new());
        // All is given before anything is waited for: the device does not wait for the host in between.
        for _ in 0..repeats {
            before.run()?;
            device.require(events.record(device.commands))?;
            work.run()?;
            device.require(events.record(device.commands))?;
        }
        device.wait()?;
        // SAFETY: recorded, and the stream is idle.
        let seconds = |pair: &[sys::CUevent]| unsafe { result::event::elapsed(pair[0], pair[1]) }.map(f64::from);
        let milliseconds: Result<Vec<f64>, _> = events.0.chunks(2).map(seconds).collect();
        Ok(device.require(milliseconds)?.into_iter().map(|x| x * 1e-3).collect())
    }
}

/// A stream beside that of commands.
struct Side {
    device: Rc<Device>,
    stream: sys::CUstream,
    event: sys::CUevent,
}

impl Side {
    /// What `later` is given from here on waits for all that `earlier` was given.
    fn order(&self, earlier: sys::CUstream, later: sys::CUstream) -> Result<(), DeviceError> {
        self.device.bind()?;
        let plainly = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: live streams and a live event. A wait is for what was recorded when it was given: the event may be
        // recorded anew at once.
        let ordered = unsafe {
            result::event::record(self.event, earlier)
                .and_then(|()| result::stream::wait_event(later, self.event, plainly))
        };
        self.device.require(ordered)
    }
}

impl Beside for Side {
    fn stream(&self) -> Result<*mut c_void, DeviceError> {
        self.device.bind()?;
        Ok(self.stream.cast())
    }

    fn follow(&self) -> Result<(), DeviceError> {
        self.order(self.device.commands, self.stream)
    }

    fn lead(&self) -> Result<(), DeviceError> {
        self.order(self.stream, self.device.commands)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: made by us, destroyed once; what is under way on them goes on to its end. What was never made is null.
        unsafe {
            if !self.event.is_null() {
                let _ = result::event::destroy(self.event);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
        }
    }
}

/// Events that know the time.
struct Timers(Vec<sys::CUevent>);

impl Timers {
    fn record(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        self.0.push(event);
        // SAFETY: a live event and stream.
        unsafe { result::event::record(event, stream) }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        for event in self.0.drain(..) {
            // SAFETY: made by us, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(capability: (u32, u32)) -> CardInfo {
        let (ordinal, name) = (1, "NVIDIA Test 1".into());
        CardInfo { ordinal, name, capability, sms: 1, memory: 0, shared: 0, shared_of_sm: 0 }
    }

    #[test]
    fn code_for_hopper_alone_is_loaded_on_hopper_alone() {
        for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)] {
            assert!(card(capability).runs("conv_fprop") && !card(capability).runs("conv_hopper"), "{capability:?}");
        }
        assert!(card((9, 0)).runs("conv_fprop") && card((9, 0)).runs("limits_hopper"));
    }

    #[test]
    fn sums_are_in_two_levels_on_cards_that_halve_the_rate_of_f32() {
        let halves = |name: &str, capability| CardInfo { name: name.into(), ..card(capability) }.card().halves_f32_sums;
        for (name, capability) in [
            ("GeForce RTX 3090", (8, 6)),
            ("GeForce RTX 4060 Ti", (8, 9)),
            ("GeForce RTX 5090", (12, 0)),
            ("L40", (8, 9)),
        ] {
            assert!(halves(&format!("NVIDIA {name}"), capability), "{name}");
        }
        for (name, capability) in
            [("RTX A6000", (8, 6)), ("L40S", (8, 9)), ("RTX 6000 Ada Generation", (8, 9)), ("H100 80GB HBM3", (9, 0))]
        {
            assert!(!halves(&format!("NVIDIA {name}"), capability), "{name}");
        }
    }

    #[test]
    fn the_driver_is_asked_for_all_functions_that_the_emulators_has() {
        let source = include_str!("../../../tests/driver.cpp");
        let words = source.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let of_the_driver =
            |word: &&str| word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(char::is_uppercase));
        let defined: std::collections::BTreeSet<_> = words.filter(of_the_driver).collect();
        assert_eq!(defined, FUNCTIONS.into());
    }

    #[test]
    fn cards_without_code_are_named_with_what_they_are_and_what_is_needed() {
        let message = |capability, archs| card(capability).check(archs).unwrap_err().to_string();
        let too_old = "NVIDIA Test 1 (cuda:1): compute capability 7.5, needs 8.0 or newer (RTX 30, A100)";
        assert_eq!(message((7, 5), &[80, 89]), too_old);
        let no_code = "NVIDIA Test 1 (cuda:1): compute capability 8.6, this edm2k was compiled for 89 and newer \
                       (EDM2K_CUDA_ARCHS)";
        assert_eq!(message((8, 6), &[89, 90]), no_code);
        for capability in [(8, 9), (9, 0), (10, 3), (12, 0)] {
            assert_eq!(card(capability).check(&[89, 120]), Ok(()));
        }
    }
}
