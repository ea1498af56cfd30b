//! What kernels are tested on: the emulator (feature `emulator`), and a GPU where there is one (feature `cuda`).

use std::rc::Rc;

use crate::common::close::assert_close;
#[cfg(feature = "cuda")]
use edm2k::backend::gpu::cuda::Cuda;
#[cfg(feature = "emulator")]
use edm2k::backend::gpu::emulated::{self, Build, Emulator, ThreadOrder};
use edm2k::backend::gpu::launch::{DevicePtr, Launch, Precision};
#[cfg(feature = "cuda")]
use edm2k::backend::gpu::runtime;
use edm2k::backend::gpu::runtime::Runtime;
use half::{bf16, f16};

/// The first GPU, or none and the reason printed. EDM2K_NO_GPU=1 leaves it alone.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<Cuda> {
    if std::env::var_os("EDM2K_NO_GPU").is_some() {
        eprintln!("skipped on a GPU: EDM2K_NO_GPU is set");
        return None;
    }
    Cuda::new(0).inspect_err(|why| eprintln!("skipped on a GPU: {why}")).ok()
}

/// A GPU if there is one, else the emulator; none if this build has neither.
pub fn runtime() -> Option<Rc<dyn Runtime>> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = gpu() {
        return Some(Rc::new(gpu));
    }
    #[cfg(feature = "emulator")]
    return Some(Rc::new(emulated::Emulated::new(Emulator::new(Build::Normal).unwrap(), u64::MAX)));
    #[cfg(not(feature = "emulator"))]
    None
}

/// What runs single kernels.
#[derive(Clone)]
pub struct Kernels {
    /// For messages.
    pub name: String,
    /// Whether everything is checked, and bank conflicts of plain accesses are counted too.
    pub checked: bool,
    device: Device,
}

#[derive(Clone)]
enum Device {
    #[cfg(feature = "emulator")]
    Emulated(Emulator),
    #[cfg(feature = "cuda")]
    Gpu(Cuda),
}

/// Device memory.
#[derive(Clone)]
pub enum Memory {
    #[cfg(feature = "emulator")]
    Emulated(emulated::EmulatedMemory),
    #[cfg(feature = "cuda")]
    Gpu(Rc<dyn runtime::Memory>),
}

/// The emulator in both builds and three thread orders, on one OS thread.
pub fn every_order() -> Vec<Kernels> {
    #[allow(unused_mut)]
    let mut all = Vec::new();
    #[cfg(feature = "emulator")]
    for build in [Build::Normal, Build::Checked] {
        for order in [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(7)] {
            let emulator = Emulator::new(build).unwrap().with_order(order).with_threads(1);
            let (name, checked) = (format!("{build:?} {order:?}"), build == Build::Checked);
            all.push(Kernels { name, checked, device: Device::Emulated(emulator) });
        }
    }
    all
}

/// A GPU, if there is one.
pub fn on_gpu() -> Option<Kernels> {
    #[cfg(feature = "cuda")]
    return gpu().map(|gpu| Kernels { name: gpu.name(), checked: false, device: Device::Gpu(gpu) });
    #[cfg(not(feature = "cuda"))]
    None
}

/// The emulator as it runs by default, and a GPU.
pub fn once() -> Vec<Kernels> {
    every_order().into_iter().take(1).chain(on_gpu()).collect()
}

/// All of them.
pub fn everywhere() -> Vec<Kernels> {
    every_order().into_iter().chain(on_gpu()).collect()
}

impl Kernels {
    /// The same device, where it can running blocks in another order.
    pub fn otherwise(&self) -> Self {
        let device = match &self.device {
            #[cfg(feature = "emulator")]
            Device::Emulated(e) => Device::Emulated(e.clone().with_threads(3).with_order(ThreadOrder::Random(5))),
            #[cfg(feature = "cuda")]
            Device::Gpu(gpu) => Device::Gpu(gpu.clone()),
        };
        Self { name: self.name.clone() + ", otherwise", device, ..*self }
    }

    /// Memory of NaNs.
    pub fn alloc(&self, bytes: usize) -> Memory {
        match &self.device {
            #[cfg(feature = "emulator")]
            Device::Emulated(emulator) => Memory::Emulated(emulator.alloc(bytes).unwrap()),
            #[cfg(feature = "cuda")]
            Device::Gpu(gpu) => {
                let memory = Memory::Gpu(gpu.allocate(bytes, "a test").unwrap());
                memory.upload(0, &vec![0xffu8; bytes]);
                memory
            }
        }
    }

    /// Runs a launch; how many bank conflicts were counted.
    ///
    /// # Safety
    /// The launch's pointers are to memory of this device, as large as its function says.
    pub unsafe fn run(&self, launch: &Launch) -> u64 {
        match &self.device {
            #[cfg(feature = "emulator")]
            // SAFETY: the caller's promise.
            Device::Emulated(emulator) => match unsafe { emulator.run(launch) } {
                Ok(counters) => counters.bank_conflicts,
                Err(e) => panic!("{}: {e}", self.name),
            },
            #[cfg(feature = "cuda")]
            Device::Gpu(gpu) => {
                // SAFETY: the caller's promise.
                unsafe { gpu.run(&runtime::Command::Launch(launch.clone())) }.unwrap();
                0
            }
        }
    }
}

impl Memory {
    pub fn ptr(&self) -> DevicePtr {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(memory) => memory.ptr(),
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.ptr(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(memory) => memory.bytes(),
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.bytes(),
        }
    }

    pub fn upload<T: bytemuck::NoUninit>(&self, offset: usize, values: &[T]) {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(memory) => memory.upload(offset, values).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.write(offset, bytemuck::cast_slice(values)).unwrap(),
        }
    }

    pub fn download<T: bytemuck::Pod>(&self, offset: usize, values: &mut [T]) {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(memory) => memory.download(offset, values).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.read(offset, bytemuck::cast_slice_mut(values)).unwrap(),
        }
    }
}

/// The 16-bit types.
pub const PRECISIONS: [Precision; 2] = [Precision::F16, Precision::Bf16];

/// Kernels that compute in a 16-bit type.
#[derive(Clone)]
pub struct Bench {
    pub kernels: Kernels,
    pub precision: Precision,
    /// For messages.
    pub name: String,
}

/// Values of [.., channels], exact in 16 bits, and the device's copy, whose channels are padded with zeros.
pub struct Both {
    pub values: Vec<f32>,
    pub memory: Memory,
}

impl Bench {
    pub fn new(kernels: Kernels, precision: Precision) -> Self {
        let name = format!("{} {precision:?}", kernels.name);
        Self { kernels, precision, name }
    }

    /// All of these, in both types.
    pub fn of(all: Vec<Kernels>) -> impl Iterator<Item = Self> {
        all.into_iter().flat_map(|kernels| PRECISIONS.map(|precision| Self::new(kernels.clone(), precision)))
    }

    /// The bound for one kernel: 16-bit inputs are exact on both sides, so what remains is the rounding of the result
    /// (2^-11, 2^-8 at most), of what a kernel holds in 16 bits in between, and the order of f32 sums.
    pub fn bound(&self) -> f64 {
        match self.precision {
            Precision::F16 => 2e-3,
            Precision::Bf16 => 1.6e-2,
        }
    }

    pub fn narrow(&self, values: &[f32]) -> Vec<u16> {
        match self.precision {
            Precision::F16 => values.iter().map(|&x| f16::from_f32(x).to_bits()).collect(),
            Precision::Bf16 => values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect(),
        }
    }

    pub fn widen(&self, bits: &[u16]) -> Vec<f32> {
        match self.precision {
            Precision::F16 => bits.iter().map(|&x| f16::from_bits(x).to_f32()).collect(),
            Precision::Bf16 => bits.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
        }
    }

    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Memory {
        let memory = self.kernels.alloc(size_of_val(values));
        memory.upload(0, values);
        memory
    }

    /// Rounds values to 16 bits.
    pub fn both(&self, values: &[f32], channels: usize) -> Both {
        let bits = self.narrow(values);
        let memory = self.upload(&in_rows(&bits, channels));
        Both { values: self.widen(&bits), memory }
    }

    /// Runs launches; how many bank conflicts were counted.
    pub fn run<'a>(&self, launches: impl IntoIterator<Item = &'a Launch>) -> u64 {
        // SAFETY: tests allocate what the launches' functions say; the checked build controls it.
        launches.into_iter().map(|launch| unsafe { self.kernels.run(launch) }).sum()
    }

    /// Runs launches that meet no bank twice, in plain accesses neither, which the checked build counts.
    pub fn run_clean<'a>(&self, launches: impl IntoIterator<Item = &'a Launch>) {
        for launch in launches {
            assert_eq!(self.run([launch]), 0, "bank conflicts of {}, {}", launch.kernel, self.name);
        }
    }

    /// Runs launches whose main loops meet no bank twice.
    pub fn run_loops<'a>(&self, launches: impl IntoIterator<Item = &'a Launch>) {
        for launch in launches {
            let conflicts = self.run([launch]);
            assert!(self.kernels.checked || conflicts == 0, "{}: {conflicts} bank conflicts", launch.kernel);
        }
    }

    /// `got`, from the device, is `want` but for so much.
    pub fn same32(&self, what: &str, got: &[f32], want: &[f32], bound: f64) {
        assert_close(&format!("{what}, {}", self.name), got, want, bound);
    }

    /// The same but for rounding to 16 bits.
    pub fn same(&self, what: &str, got: &[f32], want: &[f32]) {
        self.same32(what, got, want, self.bound());
    }

    /// The same of 16-bit values in rows of padded channels; the padding must be zero.
    pub fn same_in_rows(&self, what: &str, memory: &Memory, want: &[f32], channels: usize) {
        let all = self.widen(&read(memory));
        let mut got = Vec::new();
        for row in all[..want.len() / channels * padded(channels)].chunks_exact(padded(channels)) {
            got.extend_from_slice(&row[..channels]);
            assert!(row[channels..].iter().all(|&x| x == 0.0), "{what}: padding is not zero");
        }
        self.same(what, &got, want);
    }
}

/// Channels as the device has them.
pub fn padded(channels: usize) -> usize {
    channels.next_multiple_of(8)
}

/// Rows of `channels` values, padded with zeros.
pub fn in_rows<T: bytemuck::Zeroable + Copy>(values: &[T], channels: usize) -> Vec<T> {
    let row = |row: &[T]| [row, &vec![T::zeroed(); padded(channels) - channels]].concat();
    values.chunks(channels).flat_map(row).collect()
}

pub fn read<T: bytemuck::Pod>(memory: &Memory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.bytes() / size_of::<T>()];
    memory.download(0, &mut values);
    values
}
