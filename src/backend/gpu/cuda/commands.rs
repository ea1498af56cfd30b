//! What a device is told to do: launches, graphs, and the times that they take.

use std::ffi::{CString, c_int, c_void};
use std::rc::Rc;

use cudarc::driver::{DriverError, result, sys};

use super::driver::describe;
use super::{CudaDevice, HAS_HOPPER};
use crate::backend::DeviceError;
use crate::backend::gpu::launch::{Launch, Precision, TensorMap, TensorMapSpec};
use crate::backend::gpu::runtime::{Beside, Command, Graph, behind_launches};

use sys::CUfunction_attribute as FunctionAttribute;
use sys::CUlaunchAttributeID as AttributeId;

/// A purpose of memory. The driver does not say how much it takes.
const GRAPH: &str = "a graph";

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
pub(super) struct LoadedKernel {
    function: sys::CUfunction,
    /// Bytes of its params struct.
    params: usize,
    /// Whether its code waits for the launch before it (`begin_kernel` of `kernels/ptx.cuh`): that for sm_90 and newer does.
    waits: bool,
}

impl CudaDevice {
    /// The kernel of a launch, looked up once.
    fn kernel(&self, launch: &Launch) -> Result<LoadedKernel, DeviceError> {
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
    fn load(&self, function: sys::CUfunction, dynamic_shared: bool) -> Result<LoadedKernel, DriverError> {
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
        Ok(LoadedKernel { function, params, waits: compiled_for >= 90 })
    }

    /// See [`Runtime::tensor_map`](super::Runtime::tensor_map).
    pub(super) fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
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
    pub(super) unsafe fn give(&self, command: &Command, beside: bool) -> Result<(), DeviceError> {
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

    /// See [`Runtime::time`](super::Runtime::time).
    pub(super) fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        self.bind()?;
        let mut events = Timers(Vec::new());
        // All is given before anything is waited for: the device does not wait for the host in between.
        for _ in 0..repeats {
            before.run()?;
            self.require(events.record(self.commands))?;
            work.run()?;
            self.require(events.record(self.commands))?;
        }
        self.wait()?;
        // SAFETY: recorded, and the stream is idle.
        let seconds = |pair: &[sys::CUevent]| unsafe { result::event::elapsed(pair[0], pair[1]) }.map(f64::from);
        let milliseconds: Result<Vec<f64>, _> = events.0.chunks(2).map(seconds).collect();
        Ok(self.require(milliseconds)?.into_iter().map(|x| x * 1e-3).collect())
    }
}

pub(super) struct Recorded {
    device: Rc<CudaDevice>,
    graph: sys::CUgraphExec,
    last_kernel: String,
}

impl Recorded {
    /// See [`Runtime::record`](super::Runtime::record).
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn new(
        device: &Rc<CudaDevice>,
        commands: &[Command],
        overlap: bool,
    ) -> Result<Self, DeviceError> {
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
            let mut commands = behind_launches(commands);
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
            let ready = device.with_memory(ready, None, GRAPH);
            let _ = result::graph::destroy(captured);
            ready?
        };
        let last_kernel = launches().next_back().map(|launch| launch.kernel.to_string()).unwrap_or_default();
        let recorded = Self { device: device.clone(), graph, last_kernel };
        // SAFETY: a live graph and stream.
        device.with_memory(|| unsafe { result::graph::upload(graph, device.commands) }, None, GRAPH)?;
        Ok(recorded)
    }
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

/// A stream beside that of commands.
pub(super) struct Side {
    device: Rc<CudaDevice>,
    stream: sys::CUstream,
    event: sys::CUevent,
}

impl Side {
    pub(super) fn new(device: &Rc<CudaDevice>) -> Result<Self, DeviceError> {
        device.bind()?;
        let mut made = Self { device: device.clone(), stream: std::ptr::null_mut(), event: std::ptr::null_mut() };
        made.stream = device.require(result::stream::create(result::stream::StreamKind::NonBlocking))?;
        made.event = device.require(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
        Ok(made)
    }

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

/// Events that record the time.
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
