//! The command line: one file per subcommand, and what they share.

pub mod bench;
pub mod condition;
pub mod ema;
pub mod eval;
pub mod export;
pub mod fid;
pub mod import;
pub mod info;
pub mod prepare;
pub mod sample;
pub mod say;
pub mod signals;
pub mod train;
pub mod verify;

use std::io::ErrorKind;
use std::path::Path;
use std::rc::Rc;
use std::str::FromStr;

use anyhow::{Context, bail};

use edm2k::backend::DeviceError;
use edm2k::backend::gpu::launch::{Accum, ConvLoop, Math, Precision};
use edm2k::backend::gpu::runtime::Runtime;
use edm2k::formats::Claim;
use edm2k::memory;
use edm2k::model::Config;

use say::note;

/// What computes, as `--device` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if there is one, else the processor.
    Auto,
    /// This machine's processor.
    Cpu,
    /// A CUDA device by number.
    Cuda(usize),
    /// The CUDA kernels on the processor, checked.
    Emulated,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not a device, expected auto, cpu, cuda, cuda:N or emulated");
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => {
                let number = text.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                number.map(Self::Cuda).ok_or_else(wrong)
            }
        }
    }
}

/// Where a network computes.
#[derive(clap::Args)]
pub struct DeviceArgs {
    /// What computes: auto (a GPU if there is one), cpu, cuda, cuda:N, emulated (slow; checks the kernels)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// 16-bit type of activations and weights on a GPU; the CPU computes in f32
    #[arg(long, value_enum, default_value_t = Precision::F16)]
    pub precision: Precision,
    /// Sums of convolutions in f16 on a GPU: f32, or f16 in two levels; default: f16x2 on GeForce cards, f32 elsewhere
    #[arg(long, value_enum)]
    pub accum: Option<Accum>,
    /// Loop of convolutions on a GPU
    #[arg(long, value_enum, default_value_t)]
    pub conv_loop: ConvLoop,
}

/// An open device.
pub enum Engine {
    /// This machine's processor.
    Cpu,
    /// What runs kernels.
    Gpu(Rc<dyn Runtime>),
}

impl DeviceArgs {
    /// The numbers that a GPU computes in.
    pub fn math(&self) -> Math {
        Math { precision: self.precision, accum: self.accum, conv_loop: self.conv_loop }
    }

    /// Opens the device; with `auto`, says on stderr which GPU was taken, or why none of those that there seem to be.
    ///
    /// # Errors
    /// The device is not there, or this program was built without what it needs.
    pub fn open(&self) -> anyhow::Result<Engine> {
        match self.device {
            Device::Cpu => Ok(Engine::Cpu),
            Device::Auto => match cuda(0) {
                Ok(gpu) => {
                    note!("computing on {}", gpu.name());
                    Ok(Engine::Gpu(gpu))
                }
                // On a machine that never had a GPU, nobody wonders.
                Err(DeviceError::Absent(_)) if !has_nvidia_hardware() => Ok(Engine::Cpu),
                Err(why) => {
                    note!("warning: computing on the CPU: {why}");
                    Ok(Engine::Cpu)
                }
            },
            Device::Cuda(ordinal) => cuda(ordinal).map(Engine::Gpu).with_context(|| format!("--device cuda:{ordinal}")),
            Device::Emulated => emulated().map(Engine::Gpu).context("--device emulated"),
        }
    }
}

impl Engine {
    /// Device and numbers, for people: what a run notes.
    pub fn describe(&self, math: Math) -> String {
        match self {
            Self::Cpu => "the CPU, f32".into(),
            Self::Gpu(gpu) => format!("{}, {}", gpu.name(), math.describe(gpu.card().capability)),
        }
    }
}

/// Whether this machine has a card of NVIDIA's, driver or not (Linux).
fn has_nvidia_hardware() -> bool {
    let of_nvidia = |device: std::fs::DirEntry| {
        let read = |name| std::fs::read_to_string(device.path().join(name)).unwrap_or_default();
        read("vendor").trim() == "0x10de" && read("class").starts_with("0x03")
    };
    let devices = std::fs::read_dir("/sys/bus/pci/devices");
    Path::new("/dev/nvidiactl").exists() || devices.is_ok_and(|all| all.flatten().any(of_nvidia))
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Rc<dyn Runtime>, DeviceError> {
    Ok(Rc::new(edm2k::backend::gpu::cuda::Cuda::new(ordinal)?))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Rc<dyn Runtime>, DeviceError> {
    Err(DeviceError::Absent("this edm2k was built without CUDA (cargo feature `cuda`); use --device cpu".into()))
}

#[cfg(feature = "emulator")]
fn emulated() -> Result<Rc<dyn Runtime>, DeviceError> {
    use edm2k::backend::gpu::emulated::{Build, Emulator};
    use edm2k::backend::gpu::runtime::Emulated;
    let emulator = Emulator::new(Build::Normal).map_err(|e| DeviceError::Unavailable(e.to_string()))?;
    Ok(Rc::new(Emulated::new(emulator, u64::MAX)))
}

#[cfg(not(feature = "emulator"))]
fn emulated() -> Result<Rc<dyn Runtime>, DeviceError> {
    Err(DeviceError::Absent("this edm2k was built without the emulator (cargo feature `emulator`)".into()))
}

/// Claims an output before the work, so that it is known then that it can be written, and that nothing is lost.
///
/// # Errors
/// It exists and `overwrite` was not given, or it cannot be written.
pub fn claim(path: &Path, overwrite: bool) -> anyhow::Result<Claim> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.exists()) {
        bail!("{}: the directory does not exist", parent.display());
    }
    match Claim::new(path, overwrite) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            bail!("{} exists; give --overwrite, or another name", path.display())
        }
        other => other.with_context(|| path.display().to_string()),
    }
}

/// Refuses a forward pass that this machine has no room for; a GPU knows its own memory.
pub fn check_forward(
    engine: &Engine,
    config: &Config,
    [height, width]: [usize; 2],
    images: usize,
) -> anyhow::Result<()> {
    let what = format!("a batch of {images} images of {width}x{height}");
    let needed = match engine {
        Engine::Cpu => config.forward_bytes(images, height, width),
        Engine::Gpu(_) => 8 * images as u128 * (height * width * config.img_channels) as u128,
    };
    Ok(memory::check(what, needed)?)
}

/// Parses a size given as width x height, e.g. `64x88`; returns [height, width].
pub fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let wrong = || format!("'{text}' is not a size, expected WIDTHxHEIGHT, e.g. 512x704");
    let (width, height) = text.split_once(['x', 'X']).ok_or_else(wrong)?;
    let number = |n: &str| n.parse().ok().filter(|n| (1..=1 << 16).contains(n)).ok_or_else(wrong);
    Ok([number(height)?, number(width)?])
}
