//! The command line: one file per subcommand, and what they share.

pub mod advice;
pub mod bench;
pub mod condition;
pub mod ema;
pub mod eval;
pub mod export;
pub mod fid;
pub mod import;
pub mod info;
pub mod picture;
pub mod prepare;
pub mod ranks;
pub mod sample;
pub mod say;
#[cfg(feature = "serve")]
pub mod serve;
pub mod signals;
pub mod train;
pub mod tune;
pub mod verify;

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};

use edm2k::backend::gpu::launch::{Accum, ConvLoop, Math, Precision};
use edm2k::formats::{Claim, ends_in};
use edm2k::{Device, DeviceName, Numbers};

use say::note;

/// How a subcommand ended that did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All was done.
    Done,
    /// It was told to stop, and has saved what the same command goes on from.
    Stopped,
}

/// Where a network computes.
#[derive(clap::Args)]
pub struct DeviceArgs {
    /// What computes: auto (a GPU if there is one), cpu, cuda, cuda:N, emulated (slow; checks the kernels)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceName,
    /// Numbers of the network; default: f16 on a GPU; on a CPU f32, but in sample, serve and bench bf16 where it is faster
    #[arg(long, value_enum)]
    pub precision: Option<Numbers>,
    /// Sums of convolutions in f16 on a GPU: f32, or f16 in two levels; default: f16x2 on GeForce cards, f32 elsewhere
    #[arg(long, value_enum)]
    pub accum: Option<Accum>,
    /// Loop of convolutions on a GPU; default: wgmma on Hopper (H100, H200), mma elsewhere
    #[arg(long, value_enum)]
    pub conv_loop: Option<ConvLoop>,
}

impl DeviceArgs {
    /// How a GPU computes.
    pub fn math(&self) -> Math {
        let precision = self.precision.and_then(Numbers::precision).unwrap_or(Precision::F16);
        Math { precision, accum: self.accum, conv_loop: self.conv_loop }
    }

    /// The device that they opened, unless it ignores some of them.
    ///
    /// # Errors
    /// It is the CPU, and one of them is of GPUs.
    pub fn heeded(&self, device: Device) -> anyhow::Result<Device> {
        for (option, given) in [("--accum", self.accum.is_some()), ("--conv-loop", self.conv_loop.is_some())] {
            ensure!(!given || device.runtime().is_some(), "{option} is for GPUs, but the CPU computes");
        }
        Ok(device)
    }

    /// Opens the device; with `auto`, says on stderr which GPU was taken, and why not one before it, or none.
    ///
    /// # Errors
    /// The device is not there, or this program was built without what it needs.
    pub fn open(&self) -> anyhow::Result<Device> {
        self.heeded(self.open_as(self.device)?)
    }

    /// The same of the device `name` instead of the one that was asked for.
    pub fn open_as(&self, name: DeviceName) -> anyhow::Result<Device> {
        let device = Device::named(name).with_context(|| format!("--device {name}"))?;
        let on = device.runtime().map_or_else(|| "the CPU".into(), |gpu| gpu.name());
        if self.device == DeviceName::Auto && device.runtime().is_some() {
            note!("computing on {on}");
        }
        device.passed_over().iter().for_each(|why| note!("warning: computing on {on}: {why}"));
        device.untuned().iter().for_each(|why| note!("warning: {why}"));
        let device = device.with_math(self.math());
        match self.precision {
            Some(numbers) => device.with_numbers(numbers).context("--precision"),
            None => Ok(device),
        }
    }
}

/// Claims an output before the work begins. So it is known by then that the output can be written, and that nothing
/// will be lost.
///
/// # Errors
/// It exists and `overwrite` was not given, or it cannot be written; it is one of the `inputs`, which would be lost.
pub fn claim(path: &Path, overwrite: bool, inputs: &[&Path]) -> anyhow::Result<Claim> {
    may_be_written(path, inputs)?;
    match Claim::new(path, overwrite) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(exists(path)),
        other => other.with_context(|| path.display().to_string()),
    }
}

/// The same for a file of tensors.
pub fn claim_tensors(path: &Path, overwrite: bool, inputs: &[&Path]) -> anyhow::Result<Claim> {
    no_other_format(path, &["pkl", "pt", "pth", "ckpt", "bin", "onnx", "npy", "npz"], "safetensors")?;
    claim(path, overwrite, inputs)
}

/// Refuses the ending of another format, under which nobody would find what the file is.
pub fn no_other_format(path: &Path, others: &[&str], format: &str) -> anyhow::Result<()> {
    match others.iter().find(|other| ends_in(path, other)) {
        Some(other) => bail!("{}: found the ending .{other}, expected .{format}, which it would be", path.display()),
        None => Ok(()),
    }
}

/// Says of an output that it is there already.
pub fn exists(path: &Path) -> anyhow::Error {
    anyhow!("{} exists; give --overwrite, or another name", path.display())
}

/// Refuses a path that cannot be that of a file to be written, or is one of the inputs.
pub fn may_be_written(path: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    let text = path.as_os_str().to_string_lossy();
    if text.ends_with(std::path::is_separator) || text.ends_with("/.") || path.file_name().is_none() {
        bail!("{}: the name of a directory, expected that of a file", path.display());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.exists()) {
        bail!("{}: the directory does not exist", parent.display());
    }
    let place = path.canonicalize().ok();
    if let Some(input) = inputs.iter().find(|input| place.is_some() && input.canonicalize().ok() == place) {
        bail!("{}: what is to be written would replace {}, which is read", path.display(), input.display());
    }
    Ok(())
}

/// Parses a size given as width x height, e.g. `64x88`; returns [height, width].
pub fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let wrong = || format!("'{text}' is not a size, expected WIDTHxHEIGHT, e.g. 512x704");
    let (width, height) = text.split_once(['x', 'X']).ok_or_else(wrong)?;
    let number = |n: &str| n.parse().ok().filter(|n| (1..=1 << 16).contains(n)).ok_or_else(wrong);
    Ok([number(height)?, number(width)?])
}
