//! The CUDA kernels on the CPU: a safe wrapper of the emulator in `simt`.
//!
//! ```no_run
//! use edm2k::backend::gpu::emulated::{Arg, Build, Emulator};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Emulator::new(Build::Checked)?;
//! let (x, y) = (device.alloc(2 * 1000)?, device.alloc(2 * 1000)?);
//! x.upload(0, &[half::f16::ONE; 1000])?;
//! // SAFETY: one block reads and writes 1000 halves.
//! unsafe { device.launch("softmax", [1, 1, 1], [128, 1, 1], 0, &[x.arg(), y.arg(), Arg::of(&1000i32)])? };
//! # Ok(()) }
//! ```

mod device;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytemuck::{NoUninit, Pod};
use libloading::Library;

pub use device::Emulated;

use super::launch::{DevicePtr, Launch, TensorMap, TensorMapSpec};

/// Which of the two libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// Fast; finds what shows in results or hits a guard page.
    Normal,
    /// Instrumented: finds races, unwritten reads and exact bounds, about 3x slower on products and
    /// 5x on elementwise kernels.
    Checked,
}

/// In which order blocks, and the threads that can go on, are run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ThreadOrder {
    /// Thread 0 first, as far as it gets.
    #[default]
    Forward,
    /// The last thread first.
    Reversed,
    /// At random by this seed, drawn anew at every choice.
    Random(u64),
}

/// Why the emulator did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum EmulatorError {
    /// The library could not be loaded.
    #[error("cannot load the emulator: {0}")]
    Load(#[from] libloading::Error),
    /// A kernel file could not be compiled.
    #[error("{} does not compile: {said}", path.display())]
    Compile { path: PathBuf, said: String },
    /// A launch, allocation or setting that a device would refuse too.
    #[error("{0}")]
    Refused(String),
    /// A kernel did something wrong; names kernel, block, thread and source line.
    #[error("{0}")]
    Fault(String),
    /// A kernel was given other arguments than it takes.
    #[error("kernel {kernel}: arguments of {found:?} bytes, expected {expected:?}")]
    Arguments { kernel: String, found: Vec<usize>, expected: Vec<usize> },
    /// A copy beyond the end of device memory.
    #[error("copy of {bytes} bytes at {offset}, but the memory has {size}")]
    CopyRange { offset: usize, bytes: usize, size: usize },
}

type Result<T> = std::result::Result<T, EmulatorError>;

/// One argument of a launch: its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a>(&'a [u8]);

impl<'a> Arg<'a> {
    /// A number, a [`DevicePtr`] or a `#[repr(C)]` struct.
    pub fn of<T: NoUninit>(value: &'a T) -> Self {
        Self(bytemuck::bytes_of(value))
    }

    /// The bytes of one argument.
    pub fn bytes(value: &'a [u8]) -> Self {
        Self(value)
    }
}

/// What a launch counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Wavefronts of shared-memory accesses beyond the fewest possible: in the normal build those of ldmatrix, in the
    /// checked build those of all accesses.
    pub bank_conflicts: u64,
}

/// The C functions of `simt/src/simt.cpp`.
struct Api {
    last_error: unsafe extern "C" fn() -> *const c_char,
    config: unsafe extern "C" fn(*const c_char, u64) -> c_int,
    kernel_name: unsafe extern "C" fn(c_int) -> *const c_char,
    kernel_info: unsafe extern "C" fn(*const c_char, *mut c_int, *mut usize, c_int) -> c_int,
    set_max_dyn_smem: unsafe extern "C" fn(*const c_char, usize) -> c_int,
    bank_conflicts: unsafe extern "C" fn() -> u64,
    malloc: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
    launch: unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, u32, u32, u32, *mut *mut c_void) -> c_int,
    /// Settings now in force; held during launches and copies, which must not overlap.
    settings: Mutex<Option<LaunchSettings>>,
}

impl Api {
    fn get(build: Build) -> Result<&'static Self> {
        static LOADED: [OnceLock<Api>; 2] = [const { OnceLock::new() }; 2];
        static LOADING: Mutex<()> = Mutex::new(());
        let (slot, path) = match build {
            Build::Normal => (&LOADED[0], env!("EMULATOR_LIBRARY")),
            Build::Checked => (&LOADED[1], env!("EMULATOR_LIBRARY_CHECKED")),
        };
        let _one = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.get() {
            Some(api) => Ok(api),
            None => Self::load(path.as_ref()).map(|api| slot.get_or_init(|| api)),
        }
    }

    /// Loads a library, for as long as the process lives: its helper threads do.
    fn load(path: &Path) -> Result<Self> {
        // SAFETY: our own library, whose constructors only register kernels, and its own signatures.
        unsafe {
            let library = Box::leak(Box::new(Library::new(path)?));
            Ok(Self {
                last_error: *library.get(b"emu_last_error")?,
                config: *library.get(b"emu_config")?,
                kernel_name: *library.get(b"emu_kernel_name")?,
                kernel_info: *library.get(b"emu_kernel_info")?,
                set_max_dyn_smem: *library.get(b"emu_set_max_dyn_smem")?,
                bank_conflicts: *library.get(b"emu_bank_conflicts")?,
                malloc: *library.get(b"emu_malloc")?,
                free: *library.get(b"emu_free")?,
                launch: *library.get(b"emu_launch")?,
                settings: Mutex::new(None),
            })
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<LaunchSettings>> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn message(&self) -> String {
        // SAFETY: a string that lives until this OS thread's next error.
        unsafe { CStr::from_ptr((self.last_error)()) }.to_string_lossy().into_owned()
    }

    fn require(&self, code: c_int) -> Result<()> {
        match code {
            0 => Ok(()),
            1 => Err(EmulatorError::Refused(self.message())),
            _ => Err(EmulatorError::Fault(self.message())),
        }
    }
}

fn c_name(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| EmulatorError::Refused(format!("no kernel named {name:?}")))
}

/// An emulated device. Devices of one [`Build`] share the library; launches take turns.
#[derive(Clone)]
pub struct Emulator {
    api: &'static Api,
    settings: LaunchSettings,
    beside: bool,
    cluster: u32,
    /// Whether a launch asks for its shared memory by itself.
    asks: bool,
}

/// How launches run.
#[derive(Clone, Copy, PartialEq, Eq)]
struct LaunchSettings {
    order: ThreadOrder,
    threads: usize,
    strict_exits: bool,
}

impl Emulator {
    /// Loads the library; forward order, one OS thread for each core.
    pub fn new(build: Build) -> Result<Self> {
        Api::get(build).map(Self::on)
    }

    fn on(api: &'static Api) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let settings = LaunchSettings { order: ThreadOrder::Forward, threads, strict_exits: false };
        Self { api, settings, beside: false, cluster: 1, asks: false }
    }

    /// Compiles a kernel file and loads it in place of this project's kernels: for kernels under development. It may
    /// include the headers of `kernels/`, and is compiled where this library was, by the same compiler.
    ///
    /// # Errors
    /// [`EmulatorError::Compile`] has what the compiler said.
    pub fn compile(source: &Path, build: Build) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let recipe = match build {
            Build::Normal => include_str!(env!("EMULATOR_RECIPE")),
            Build::Checked => include_str!(env!("EMULATOR_RECIPE_CHECKED")),
        };
        let failed = |said: String| EmulatorError::Compile { path: source.into(), said };
        let io_failed = |e: std::io::Error| failed(e.to_string());
        let source = std::path::absolute(source).map_err(io_failed)?;
        // The library is kept, since the lines that a message names are read from it.
        let kept = Path::new(env!("EMULATOR_LIBRARY")).with_file_name("own");
        std::fs::create_dir_all(&kept).map_err(io_failed)?;
        let library = kept.join(source.file_stem().unwrap_or_default()).with_extension(format!("{build:?}.so"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let made = library.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let (command, runtime) = recipe.split_once("\n\n").unwrap_or((recipe, ""));
        let (compiler, flags) = command.split_once('\n').unwrap_or((command, ""));
        let run = |arguments: &mut dyn FnMut(&mut Command)| {
            let mut command = Command::new(compiler);
            arguments(&mut command);
            let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().map_err(io_failed)?;
            let said = || String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(failed(said())) }
        };
        let object = made.with_extension("o");
        run(&mut |c| {
            c.args(flags.lines()).arg("-c").arg(&source).arg("-o").arg(&object);
        })?;
        // The flags of the sanitizer are left out here: with them the sanitizer would be linked, whose place the
        // emulator takes.
        let shared = ["-shared", "-pthread", "-Wl,-Bsymbolic,--no-undefined", "-o"];
        run(&mut |c| {
            c.args(shared).arg(&made).arg(&object).args(runtime.lines()).arg("-ldl");
        })?;
        std::fs::remove_file(&object).map_err(io_failed)?;
        std::fs::rename(&made, &library).map_err(io_failed)?;
        Ok(Self::on(Box::leak(Box::new(Api::load(&library)?))))
    }

    /// The same device with another thread order.
    pub fn with_order(self, order: ThreadOrder) -> Self {
        Self { settings: LaunchSettings { order, ..self.settings }, ..self }
    }

    /// The same device with blocks spread over so many OS threads. With more than one, the results of kernels whose
    /// blocks meet in atomics depend on the order of blocks.
    pub fn with_threads(self, threads: usize) -> Self {
        Self { settings: LaunchSettings { threads: threads.clamp(1, 1024), ..self.settings }, ..self }
    }

    /// The same device; if `strict`, a barrier or a warp that is short of a thread because it has left the kernel is an
    /// error. CUDA does not wait for such threads on cards since Volta.
    pub fn with_strict_exits(self, strict: bool) -> Self {
        Self { settings: LaunchSettings { strict_exits: strict, ..self.settings }, ..self }
    }

    /// The same device; if `beside`, its launches may begin while the ones before them still run: it is a fault if a kernel
    /// touches what those have written before it has waited (`begin_kernel` of `kernels/ptx.cuh`).
    pub fn with_launches_beside(self, beside: bool) -> Self {
        Self { beside, ..self }
    }

    /// The same device; its launches are in clusters of `blocks` blocks along x ([`Launch::in_clusters_of`]).
    pub fn with_clusters_of(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }

    /// The exported kernels in alphabetical order.
    pub fn kernels(&self) -> Vec<String> {
        (0..)
            // SAFETY: any index is allowed; names live as long as the library.
            .map(|i| unsafe { (self.api.kernel_name)(i) })
            .take_while(|name| !name.is_null())
            .map(|name| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
            .collect()
    }

    /// Sizes in bytes of a kernel's parameters.
    pub fn parameters(&self, kernel: &str) -> Result<Vec<usize>> {
        let name = c_name(kernel)?;
        let (mut count, mut sizes) = (0, [0; 64]);
        // SAFETY: at most 64 sizes are written.
        self.api.require(unsafe { (self.api.kernel_info)(name.as_ptr(), &mut count, sizes.as_mut_ptr(), 64) })?;
        Ok(sizes[..(count as usize).min(64)].to_vec())
    }

    /// Allows a kernel more than 48 KB of dynamic shared memory: up to 99 KB, and 227 KB if it is one for Hopper.
    pub fn allow_shared(&self, kernel: &str, bytes: usize) -> Result<()> {
        let name = c_name(kernel)?;
        // SAFETY: a C string.
        self.api.require(unsafe { (self.api.set_max_dyn_smem)(name.as_ptr(), bytes) })
    }

    /// Device memory, aligned to 256 bytes and filled with NaN (0xff), between guard pages.
    pub fn alloc(&self, bytes: usize) -> Result<EmulatedMemory> {
        // SAFETY: any size is allowed.
        let start = unsafe { (self.api.malloc)(bytes) };
        if start.is_null() {
            return Err(EmulatorError::Refused(self.api.message()));
        }
        Ok(EmulatedMemory(Arc::new(Allocation { api: self.api, start: start as u64, bytes })))
    }

    /// Runs a kernel to its end on `grid` blocks of `block` threads with `shared` bytes of dynamic
    /// shared memory. A kernel's fault is an error and leaves the device usable.
    ///
    /// # Safety
    ///
    /// Pointers among the arguments must point into live [`EmulatedMemory`] of this build, and the kernel
    /// must stay within it. The checked build refuses everything else; the normal build stops at
    /// unmapped pages only.
    pub unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[Arg],
    ) -> Result<Counters> {
        let expected = self.parameters(kernel)?;
        if !args.iter().map(|a| a.0.len()).eq(expected.iter().copied()) {
            let found = args.iter().map(|a| a.0.len()).collect();
            return Err(EmulatorError::Arguments { kernel: kernel.into(), found, expected });
        }
        let name = c_name(kernel)?;
        let mut pointers: Vec<*mut c_void> = args.iter().map(|a| a.0.as_ptr().cast_mut().cast()).collect();
        let mut settings = self.api.lock();
        if *settings != Some(self.settings) {
            let LaunchSettings { order, threads, strict_exits } = self.settings;
            let (order, seed) = match order {
                ThreadOrder::Forward => (0, 0),
                ThreadOrder::Reversed => (1, 0),
                ThreadOrder::Random(seed) => (2, seed),
            };
            let values =
                [(c"order", order), (c"seed", seed), (c"threads", threads as u64), (c"strict", strict_exits.into())];
            for (key, value) in values {
                // SAFETY: C strings.
                self.api.require(unsafe { (self.api.config)(key.as_ptr(), value) })?;
            }
            *settings = Some(self.settings);
        }
        // Set for this launch alone, since other threads launch the same kernels with other sizes.
        if self.asks && shared > 0 {
            self.allow_shared(kernel, shared as usize)?;
        }
        if self.beside {
            // SAFETY: a C string.
            self.api.require(unsafe { (self.api.config)(c"overlap".as_ptr(), 1) })?;
        }
        if self.cluster != 1 {
            // SAFETY: a C string.
            self.api.require(unsafe { (self.api.config)(c"cluster".as_ptr(), self.cluster.into()) })?;
        }
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        // SAFETY: the arguments have the sizes that the kernel reads; their meaning is the caller's.
        unsafe {
            self.api.require((self.api.launch)(
                name.as_ptr(),
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                shared,
                pointers.as_mut_ptr(),
            ))?;
            Ok(Counters { bank_conflicts: (self.api.bank_conflicts)() })
        }
    }
}

impl Emulator {
    /// Runs a launch that a typed function made.
    ///
    /// # Safety
    /// As [`Emulator::launch`].
    pub unsafe fn run(&self, l: &Launch) -> Result<Counters> {
        let encode = |spec: &TensorMapSpec| spec.check().map(|()| tensor_map(spec));
        let params = l.params(encode).map_err(|e| EmulatorError::Refused(e.to_string()))?;
        // As on a card: what is above 48 KB, with static shared memory, is asked for.
        let device = Self { asks: true, cluster: l.cluster, ..self.clone() };
        // SAFETY: the caller's promise.
        unsafe { device.launch(&l.kernel, l.grid, [l.block, 1, 1], l.shared, &[Arg::bytes(&params)]) }
    }
}

/// `struct Map` of simt/src/hopper.cpp, in place of the driver's encoding.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Map {
    tag: u64,
    at: u64,
    strides: [u64; 3],
    size: [u32; 4],
    im2col: u32,
    tile: [u32; 2],
    lower: [i32; 2],
    upper: [i32; 2],
    padding: [u32; 11],
}

/// The map that the emulated bulk copies read; `spec` has been checked.
fn tensor_map(spec: &TensorMapSpec) -> TensorMap {
    let mut map = Map { tag: 0x7061_6d20_7273_6e74, ..bytemuck::Zeroable::zeroed() };
    match *spec {
        TensorMapSpec::Tiled { at, size, stride, tile, .. } => {
            map.at = at.0;
            map.size[..2].copy_from_slice(&size);
            map.strides[0] = stride;
            map.tile = tile;
        }
        TensorMapSpec::Im2col { at, size, strides, lower, upper, channels, pixels, .. } => {
            let (at, tile, im2col) = (at.0, [channels, pixels], 1);
            map = Map { at, size, strides, lower, upper, tile, im2col, ..map };
        }
    }
    TensorMap(bytemuck::cast(map))
}

struct Allocation {
    api: &'static Api,
    start: u64,
    bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; a launch in another thread holds the library's lock.
        unsafe { (self.api.free)(self.start as *mut c_void) };
    }
}

/// Device memory; freed when the last clone is dropped.
#[derive(Clone)]
pub struct EmulatedMemory(Arc<Allocation>);

impl EmulatedMemory {
    /// Its address.
    pub fn ptr(&self) -> DevicePtr {
        DevicePtr(self.0.start)
    }

    /// Its address as an argument of a launch.
    pub fn arg(&self) -> Arg<'_> {
        Arg::of(&self.0.start)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    fn range(&self, offset: usize, bytes: usize) -> Result<*mut u8> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.0.bytes => Ok((self.0.start as *mut u8).wrapping_add(offset)),
            _ => Err(EmulatorError::CopyRange { offset, bytes, size: self.0.bytes }),
        }
    }

    /// Copies values to the device, `offset` bytes from its start.
    pub fn upload<T: NoUninit>(&self, offset: usize, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = self.range(offset, bytes.len())?;
        let _no_launch = self.0.api.lock();
        // SAFETY: within the allocation; launches and other copies wait for the lock.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Copies values from the device, `offset` bytes from its start.
    pub fn download<T: Pod>(&self, offset: usize, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        let from = self.range(offset, bytes.len())?;
        let _no_launch = self.0.api.lock();
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}
