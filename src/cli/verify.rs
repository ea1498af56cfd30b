//! `edm2k verify`: replays a directory of golden numbers.

use std::path::PathBuf;

use anyhow::{Context, bail};

use super::Engine;
use super::say::out;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::engine::Gpu;
use edm2k::verify::{Bounds, Device, Outcome, Summary, verify};

/// Compare a device with numbers of the official implementation.
#[derive(clap::Args)]
#[command(after_help = "\
A line for each check: ok or FAIL, name, relative error, bound, and the worst element
  [index] what the device gave, what the directory says.
What the directory lacks is skipped by name, and a network that the kernels do not take. The exit code is 1
if any check fails or none was made. scripts/golden.py makes directories of other networks.

Example:
  edm2k verify tests/golden")]
pub struct VerifyArgs {
    /// Directory of golden files (see tests/golden/README.md)
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    #[command(flatten)]
    device: super::DeviceArgs,
    /// One JSON object a line instead of text; the last one holds the totals
    #[arg(long)]
    json: bool,
}

/// Replays the directory; results go to stdout.
pub fn run(args: VerifyArgs) -> anyhow::Result<()> {
    let mut print = |outcome: &Outcome| match args.json {
        true => out!("{}", serde_json::json!(outcome)),
        false => out!("{outcome}"),
    };
    let math = args.device.math();
    let summary = match args.device.open()? {
        Engine::Cpu => {
            let device: Device<Cpu> = Device {
                sampling: &|table| Ok(Cpu::for_sampling(table)),
                training: &|table, averages| Ok(Cpu::for_training(table, averages)),
                bounds: Bounds::F32,
            };
            verify(&args.dir, &device, &|| Ok(Cpu::<f32>::for_codec()), &mut print)
        }
        Engine::Gpu(runtime) => {
            let device = Device {
                sampling: &|table| Gpu::for_sampling(runtime.clone(), math, table),
                training: &|table, averages| Gpu::for_training(runtime.clone(), math, table, averages),
                bounds: Bounds::of(math.precision),
            };
            verify(&args.dir, &device, &|| Gpu::for_codec(runtime.clone(), math), &mut print)
        }
    };
    let summary = summary.context("cannot replay the directory")?;
    let Summary { ok, failed, skipped } = summary;
    match args.json {
        true => {
            out!("{}", serde_json::json!({ "kind": "summary", "ok": ok, "failed": failed, "skipped": skipped }))
        }
        false => out!("{ok} ok, {failed} failed, {skipped} skipped"),
    }
    match failed {
        0 if ok == 0 => bail!("nothing was compared"),
        0 => Ok(()),
        _ => bail!("{failed} of {} checks failed", ok + failed),
    }
}
