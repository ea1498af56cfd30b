//! Devices by name, and one way to run on whichever it is.

use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

use crate::backend::codec::CodecBackend;
use crate::backend::cpu::{Cpu, bf16_is_available, bf16_is_fast};
use crate::backend::gpu::engine::{Gpu, Loaded};
use crate::backend::gpu::launch::{Math, Precision};
use crate::backend::gpu::runtime::Runtime;
use crate::backend::{BackendError, DeviceError, NetworkBackend, TrainingBackend};
use crate::codec::{CodecError, CodecFile};
use crate::params::ParamTable;
use crate::pictures::Picture;
use crate::{system, tuning};

/// What computes, as `--device` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// `auto`: the first GPU that can be used, else the processor.
    Auto,
    /// `cpu`: this machine's processor.
    Cpu,
    /// `cuda` or `cuda:N`: a CUDA device by number.
    Cuda(usize),
    /// `emulated`: the CUDA kernels on the processor, checked.
    Emulated,
}

/// The numbers that a network is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Numbers {
    /// f32, on the CPU
    F32,
    /// bfloat16, 8 significant bits; on a CPU, which needs AVX-512 BF16, in the products of convolutions and attention
    Bf16,
    /// IEEE half, 11 significant bits, on a GPU
    F16,
}

impl Numbers {
    /// The type of 16 bits; none: f32.
    pub fn precision(self) -> Option<Precision> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(Precision::Bf16),
            Self::F16 => Some(Precision::F16),
        }
    }
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a device, expected auto, cpu, cuda, cuda:N or emulated")]
pub struct NoDevice(String);

impl FromStr for DeviceName {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => {
                let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
                number.map(Self::Cuda).ok_or_else(|| NoDevice(text.into()))
            }
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

/// An open device, and the numbers that it computes in. Clones are the same device.
///
/// ```
/// use edm2k::Device;
///
/// let device = Device::open("cpu")?;
/// assert_eq!(device.to_string(), "the CPU, f32");
/// assert!(Device::open("gpu").unwrap_err().to_string().contains("'gpu' is not a device"));
/// # Ok::<(), edm2k::DeviceError>(())
/// ```
#[derive(Clone)]
pub struct Device {
    runtime: Option<Rc<dyn Runtime>>,
    math: Math,
    /// Whether the CPU multiplies in bf16; `None` if that was not chosen.
    bf16: Option<bool>,
    /// Why `auto` took no GPU, or not the first.
    passed_over: Vec<DeviceError>,
    /// Why choices of tiles that somebody measured are not used.
    untuned: Option<String>,
}

impl Device {
    /// Opens a device: `auto` (the first GPU that can be used), `cpu`, `cuda`, `cuda:N`, or `emulated`.
    ///
    /// # Errors
    /// [`DeviceError`]: `name` names no device, the device is not there, or this program was built without what it
    /// needs.
    pub fn open(name: &str) -> Result<Self, DeviceError> {
        let name: DeviceName = name.parse().map_err(|wrong: NoDevice| DeviceError::Unknown(wrong.to_string()))?;
        Self::named(name)
    }

    /// As [`Device::open`].
    ///
    /// # Errors
    /// As there, but that a name always is one.
    pub fn named(name: DeviceName) -> Result<Self, DeviceError> {
        let on = Self::of_runtime;
        let on_cuda = |(gpu, untuned): Opened| Self { untuned, ..on(Some(gpu)) };
        match name {
            DeviceName::Cpu => Ok(on(None)),
            DeviceName::Cuda(ordinal) => Ok(on_cuda(cuda(ordinal)?)),
            DeviceName::Emulated => Ok(on(Some(emulated()?))),
            DeviceName::Auto => match any_cuda() {
                Ok((gpu, passed_over)) => Ok(Self { passed_over, ..on_cuda(gpu) }),
                // On a machine that never had a GPU, nobody wonders.
                Err(DeviceError::NotBuilt(_) | DeviceError::NoDriver { .. } | DeviceError::Absent(_))
                    if !system::has_nvidia_hardware() =>
                {
                    Ok(on(None))
                }
                Err(why) => Ok(Self { passed_over: vec![why], ..on(None) }),
            },
        }
    }

    /// How many of NVIDIA's GPUs this process may use.
    pub fn cards() -> usize {
        #[cfg(feature = "cuda")]
        return crate::backend::gpu::cuda::devices().map_or(0, |cards| cards.len());
        #[cfg(not(feature = "cuda"))]
        0
    }

    /// The same device, computing in these numbers instead of f16 on a GPU and f32 on the CPU.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if it cannot.
    pub fn with_numbers(mut self, numbers: Numbers) -> Result<Self, DeviceError> {
        let unavailable = |what: &str| Err(DeviceError::Unavailable(what.into()));
        match (&self.runtime, numbers, numbers.precision()) {
            (Some(_), _, Some(precision)) => self.math.precision = precision,
            (Some(_), _, None) => return unavailable("a GPU computes in f16 or bf16, not in f32"),
            (None, Numbers::F16, _) => return unavailable("the CPU computes in f32 or bf16, not in f16"),
            (None, Numbers::Bf16, _) if !bf16_is_available() => {
                return unavailable("bf16 on the CPU needs AVX-512 BF16, which it does not have");
            }
            (None, ..) => self.bf16 = Some(numbers == Numbers::Bf16),
        }
        Ok(self)
    }

    /// The same device in the numbers that it samples fastest in, unless some were [chosen](Self::with_numbers): bf16 on a
    /// CPU that is faster then: one with AMX under Linux, or one of AMD's with AVX-512 BF16.
    #[must_use]
    pub fn fastest(self) -> Self {
        let bf16 = self.bf16.or_else(|| Some(bf16_is_fast()));
        Self { bf16, ..self }
    }

    /// Whether it computes in 16 bits, and in which.
    pub fn precision(&self) -> Option<Precision> {
        match self.runtime {
            Some(_) => Some(self.math.precision),
            None => (self.bf16 == Some(true)).then_some(Precision::Bf16),
        }
    }

    /// The same device with other choices of how a GPU computes.
    #[must_use]
    pub fn with_math(self, math: Math) -> Self {
        Self { math, ..self }
    }

    /// How a GPU computes.
    pub fn math(&self) -> Math {
        self.math
    }

    /// The types that it computes in, and the loop of convolutions, for people: what all ranks and parts must have alike.
    pub fn numbers(&self) -> String {
        match &self.runtime {
            None => self.precision().map_or("f32", Precision::name).into(),
            Some(gpu) => self.math.describe(gpu.card()),
        }
    }

    /// What decides how its sums round, on one kind of card: [`Device::numbers`], and which tiles `edm2k tune` has chosen.
    pub fn rounding(&self) -> String {
        let tuned = self.runtime.as_ref().and_then(|gpu| gpu.tuned());
        let tuned = tuned.map_or(String::new(), |tuned| format!(", tuned {}", tuning::fingerprint(&tuned)));
        format!("{}{tuned}", self.numbers())
    }

    /// What runs kernels; `None` for the CPU, which computes without them.
    #[doc(hidden)]
    pub fn runtime(&self) -> Option<&Rc<dyn Runtime>> {
        self.runtime.as_ref()
    }

    /// Why `auto` took the CPU on a machine that seems to have a GPU; or of each GPU before the one that it took, what is wrong
    /// with it.
    pub fn passed_over(&self) -> &[DeviceError] {
        &self.passed_over
    }

    /// Why tiles that `edm2k tune` measured are not used, if there are such.
    #[doc(hidden)]
    pub fn untuned(&self) -> Option<&str> {
        self.untuned.as_deref()
    }

    /// A device that computes on this runtime, or on the CPU without one.
    #[doc(hidden)]
    pub fn of_runtime(runtime: Option<Rc<dyn Runtime>>) -> Self {
        Self { runtime, math: Math::default(), bf16: None, passed_over: Vec::new(), untuned: None }
    }

    /// Runs code for any backend on this device's. Not public: a caller elsewhere would compile the network again for each
    /// backend.
    pub(crate) fn run<W: Work>(&self, work: W) -> W::Output {
        match &self.runtime {
            None => work.run(&OnCpu { bf16: self.precision().is_some() }),
            Some(runtime) => work.run(&OnGpu { runtime: runtime.clone(), math: self.math }),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

impl fmt::Display for Device {
    /// Device and numbers, for people: what a run notes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.runtime {
            None => write!(f, "the CPU, {}", self.numbers()),
            Some(gpu) => write!(f, "{}, {}", gpu.name(), self.rounding()),
        }
    }
}

/// Makes the backends of one device.
pub(crate) trait Backends {
    /// Those that run networks.
    type Sampling: NetworkBackend + 'static;
    /// Those that train them.
    type Training: TrainingBackend + 'static;
    /// Those of codecs.
    type Codec: CodecBackend + 'static;

    /// One that holds the parameters of a network, to run it.
    ///
    /// # Errors
    /// The weights do not fit into the device's memory, or the kernels do not take the network.
    fn sampling(&self, table: &ParamTable) -> Result<Self::Sampling, DeviceError>;
    /// One that also holds gradients, moments, and `averages` moving averages.
    ///
    /// # Errors
    /// As [`Backends::sampling`]; or there are more averages than the kernels take.
    fn training(&self, table: &ParamTable, averages: usize) -> Result<Self::Training, DeviceError>;
    /// One that holds no network, to run codecs.
    ///
    /// # Errors
    /// A GPU cannot be used.
    fn codec(&self) -> Result<Self::Codec, DeviceError>;
}

/// Code for any backend. A closure cannot be generic, so its captures are the fields of a type with this trait.
pub(crate) trait Work {
    /// What comes of it.
    type Output;
    /// Does it, on backends that `backends` makes.
    fn run<M: Backends>(self, backends: &M) -> Self::Output;
}

struct OnCpu {
    bf16: bool,
}

impl Backends for OnCpu {
    type Sampling = Cpu<f32>;
    type Training = Cpu<f32>;
    type Codec = Cpu<f32, ()>;

    fn sampling(&self, table: &ParamTable) -> Result<Cpu<f32>, DeviceError> {
        Ok(Cpu::for_sampling(table).with_bf16(self.bf16))
    }
    fn training(&self, table: &ParamTable, averages: usize) -> Result<Cpu<f32>, DeviceError> {
        Ok(Cpu::for_training(table, averages).with_bf16(self.bf16))
    }
    fn codec(&self) -> Result<Cpu<f32, ()>, DeviceError> {
        Ok(Cpu::for_codec().with_bf16(self.bf16))
    }
}

struct OnGpu {
    runtime: Rc<dyn Runtime>,
    math: Math,
}

impl Backends for OnGpu {
    type Sampling = Gpu;
    type Training = Gpu;
    type Codec = Gpu<Loaded>;

    fn sampling(&self, table: &ParamTable) -> Result<Gpu, DeviceError> {
        Gpu::for_sampling(self.runtime.clone(), self.math, table)
    }
    fn training(&self, table: &ParamTable, averages: usize) -> Result<Gpu, DeviceError> {
        Gpu::for_training(self.runtime.clone(), self.math, table, averages)
    }
    fn codec(&self) -> Result<Gpu<Loaded>, DeviceError> {
        Gpu::for_codec(self.runtime.clone(), self.math)
    }
}

/// A GPU with the choices of tiles that were measured on it; and why some are not used.
type Opened = (Rc<dyn Runtime>, Option<String>);

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Opened, DeviceError> {
    let gpu = crate::backend::gpu::cuda::Cuda::new(ordinal)?;
    let (tuned, untuned) = tuning::of(&gpu.origin());
    let gpu = match tuned {
        Some(tuned) => gpu.tuned_by(tuned),
        None => gpu,
    };
    Ok((Rc::new(gpu), untuned.map(|why| why.to_string())))
}

/// The first card that can be used, with the errors of those before it, or else the first card's error.
fn any_cuda() -> Result<(Opened, Vec<DeviceError>), DeviceError> {
    first_of(Device::cards(), cuda)
}

fn first_of<T>(
    cards: usize,
    open: impl Fn(usize) -> Result<T, DeviceError>,
) -> Result<(T, Vec<DeviceError>), DeviceError> {
    let mut passed_over = Vec::new();
    // Where no card is known, the first says why.
    for ordinal in 0..cards.max(1) {
        match open(ordinal) {
            Ok(card) => return Ok((card, passed_over)),
            Err(why) => passed_over.push(why),
        }
    }
    Err(passed_over.swap_remove(0))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Opened, DeviceError> {
    Err(DeviceError::NotBuilt("this edm2k was built without CUDA (cargo feature `cuda`)".into()))
}

#[cfg(feature = "emulator")]
fn emulated() -> Result<Rc<dyn Runtime>, DeviceError> {
    use crate::backend::gpu::emulated::{Build, Emulated, Emulator};
    let emulator = Emulator::new(Build::Normal).map_err(|e| DeviceError::Unavailable(e.to_string()))?;
    Ok(Rc::new(Emulated::new(emulator, u64::MAX)))
}

#[cfg(not(feature = "emulator"))]
fn emulated() -> Result<Rc<dyn Runtime>, DeviceError> {
    Err(DeviceError::NotBuilt("this edm2k was built without the emulator (cargo feature `emulator`)".into()))
}

/// Mean and standard deviation of a picture's latents, [H / factor, W / factor, C] each, in the network's scale.
pub type Encode = dyn FnMut(&Picture) -> Result<[Vec<f32>; 2], CodecError>;

/// The picture of a latent [height, width], in the network's scale.
pub type Decode = dyn FnMut([usize; 2], &[f32]) -> Result<Picture, CodecError>;

impl Device {
    /// An autoencoder's encoder on this device.
    ///
    /// # Errors
    /// The file has none, or its weights are damaged; or the device's.
    pub fn encoder(&self, file: &CodecFile) -> Result<Box<Encode>, CodecError> {
        struct Encoding<'a>(&'a CodecFile);
        impl Work for Encoding<'_> {
            type Output = Result<Box<Encode>, CodecError>;

            fn run<M: Backends>(self, backends: &M) -> Self::Output {
                let mut b = backends.codec().map_err(BackendError::from)?;
                let encoder = self.0.encoder(&mut b)?;
                Ok(Box::new(move |picture| Ok(encoder.encode(&mut b, picture)?.scaled())))
            }
        }
        self.run(Encoding(file))
    }

    /// An autoencoder's decoder on this device.
    ///
    /// # Errors
    /// As [`Device::encoder`].
    pub fn decoder(&self, file: &CodecFile) -> Result<Box<Decode>, CodecError> {
        struct Decoding<'a>(&'a CodecFile);
        impl Work for Decoding<'_> {
            type Output = Result<Box<Decode>, CodecError>;

            fn run<M: Backends>(self, backends: &M) -> Self::Output {
                let mut b = backends.codec().map_err(BackendError::from)?;
                let decoder = self.0.decoder(&mut b)?;
                Ok(Box::new(move |size, latent| decoder.decode(&mut b, size, latent)))
            }
        }
        self.run(Decoding(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::gpu::launch::{Accum, ConvLoop};
    use crate::backend::gpu::runtime::Imagined;
    use crate::backend::gpu::tiles::Card;

    #[test]
    fn cards_that_are_passed_over_are_told() {
        let broken = |ordinal: usize| DeviceError::Unavailable(format!("card {ordinal} is broken"));
        let open = |good: usize| move |n: usize| if n == good { Ok(n) } else { Err(broken(n)) };
        assert_eq!(first_of(3, open(0)), Ok((0, vec![])));
        assert_eq!(first_of(3, open(2)), Ok((2, vec![broken(0), broken(1)])));
        assert_eq!(first_of(3, open(3)), Err(broken(0)));
        assert_eq!(first_of(0, open(3)), Err(broken(0)));
    }

    #[test]
    fn numbers_tell_sums_and_loops_apart() {
        let cpu = Device::open("cpu").unwrap();
        assert_eq!(cpu.numbers(), "f32");
        let on = |card| Device { runtime: Some(Rc::new(Imagined::new(card))), ..cpu.clone() };
        let (game, hopper) = (on(Card::new(128, 89)), on(Card::new(132, 90)));
        let numbers = |device: &Device, math: Math| device.clone().with_math(math).numbers();
        let [f32, f16x2] = [Accum::F32, Accum::F16x2].map(|accum| Math { accum: Some(accum), ..Math::default() });
        assert_ne!(numbers(&game, f32), numbers(&game, f16x2));
        // What was asked for, and what is taken unasked, is the same.
        assert_eq!(numbers(&game, f16x2), numbers(&game, Math::default()));
        let [mma, wgmma] = [ConvLoop::Mma, ConvLoop::Wgmma].map(|way| Math { conv_loop: Some(way), ..Math::default() });
        assert_ne!(numbers(&hopper, mma), numbers(&hopper, wgmma));
    }
}
