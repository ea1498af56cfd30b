//! `edm2k verify`: replays a directory of golden numbers.

use std::path::PathBuf;

use anyhow::{Context, bail};

use edm2k::verify::{Bounds, Finding, Totals, verify};

use super::say::out;

/// Compare a device with numbers of the official implementation.
#[derive(clap::Args)]
#[command(after_help = "\
A line for each check: ok or FAIL, name, relative error, bound, and the worst element
  [index] what the device gave, what the directory says.
What the directory lacks is skipped by name, and a network that the kernels do not take. The exit
code is 1 if any check fails or none was made. scripts/golden.py makes directories of other
networks.

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
    let mut print = |outcome: &Finding| match args.json {
        true => out!("{}", serde_json::json!(outcome)),
        false => out!("{outcome}"),
    };
    let device = args.device.open()?;
    let bounds = device.precision().map_or(Bounds::F32, Bounds::of);
    let summary = verify(&args.dir, &device, bounds, &mut print);
    let summary = summary.context("cannot replay the directory")?;
    let Totals { ok, failed, skipped } = summary;
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
