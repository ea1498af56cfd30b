//! `edm2k bench`: how fast a device runs a network, and in how much memory.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::{Backend, Normalization, Slot, Step};
use edm2k::codec::{Decoder, LATENTS};
use edm2k::model::config::{Preset, preset};
use edm2k::model::{ParamTable, Precond};
use edm2k::rng::{Purpose, Stream};
use edm2k::train::stats::peak_mib;

const EXAMPLES: &str = "\
Examples:
  edm2k bench                                    EDM2-XS on 512x704 images (64x88 latents)
  edm2k bench --preset edm2-img512-s --size 64x64 --repeats 9
  edm2k bench --json > bench.json

Times are medians of repeated runs after one that warms up. Multiply-adds are what EDM2 calls
\"Gflops\". Peak memory is that of the whole process up to the end of the measurement, weights
included; a training step includes Adam's moments but no moving averages.";

/// Measure forward passes and training steps of a network.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// Network to measure.
    #[arg(long, default_value = "1girl-xs", value_name = "NAME")]
    preset: String,
    /// Size of the image or latent [default: the preset's].
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    size: Option<[usize; 2]>,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    #[command(flatten)]
    device: super::DeviceArgs,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// One measured figure.
#[derive(serde::Serialize)]
struct Row {
    what: String,
    median_s: f64,
    fastest_s: f64,
    gmac_per_s: f64,
    peak_mib: Option<f64>,
}

/// Runs the subcommand.
pub fn run(args: BenchArgs) -> Result<()> {
    let Preset { config, size, name, .. } = preset(&args.preset)?;
    let [height, width] = args.size.unwrap_or(size);
    config.check_size(height, width)?;
    let threads = rayon::current_num_threads();
    if !args.json {
        println!("{name} at {width}x{height} on the CPU, {threads} threads, f32");
    }
    let (net, table) = Precond::new(&config)?;
    let macs = net.macs(&table, height, width) as f64;
    let input = |b: &mut Cpu, n: usize| {
        let mut values = vec![0.0; n * height * width * config.img_channels];
        Stream::new(0, Purpose::SampleNoise, 0).normals(&mut values);
        let x = b.upload([n, height, width, config.img_channels], &values);
        let sigma = b.upload([n, 1, 1, 1], &vec![1.0; n]);
        let labels = b.upload([n, 1, 1, config.label_dim], &vec![0.03; n * config.label_dim]);
        (x, sigma, (config.label_dim > 0).then_some(labels))
    };
    let mut rows = Vec::new();
    let mut measure = |what: String, macs: f64, run: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        run()?;
        let mut times = Vec::new();
        for _ in 0..args.repeats {
            let start = Instant::now();
            run()?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let median_s = times[times.len() / 2];
        let row = Row { what, median_s, fastest_s: times[0], gmac_per_s: macs / median_s * 1e-9, peak_mib: peak_mib() };
        if !args.json {
            let peak = row.peak_mib.map_or("unknown".into(), |m| format!("{m:.0} MiB"));
            println!(
                "{:<24} {:8.3} s (fastest {:.3}) {:8.1} GMAC/s   peak {peak}",
                row.what, row.median_s, row.fastest_s, row.gmac_per_s
            );
        }
        rows.push(row);
        Ok(())
    };

    let mut b = Cpu::<f32>::for_sampling(&table);
    randomise(&mut b, &table)?;
    b.prepare(Slot::Weight, Normalization::Eval)?;
    for n in [1, 2] {
        let (x, sigma, labels) = input(&mut b, n);
        measure(format!("forward, batch {n}"), macs * n as f64, &mut || {
            net.denoise(&mut b, &x, &sigma, labels.as_ref());
            Ok(())
        })?;
    }
    drop(b);

    let mut b = Cpu::<f32>::for_training(&table, 0);
    randomise(&mut b, &table)?;
    b.prepare(Slot::Weight, Normalization::Train { rounds: 1 })?;
    let (x, sigma, labels) = input(&mut b, 1);
    let mut step = 0;
    measure("training step, batch 1".into(), macs * 3.0, &mut || {
        step += 1;
        let pass = net.train_forward(&mut b, &x, &x, &sigma, labels.as_ref());
        net.backward(&mut b, pass);
        let betas = (0.9, 0.99);
        b.optimizer_step(&Step { lr: 1e-3, betas, eps: 1e-8, step, grad_scale: 1.0, rounds: 1, ema_betas: &[] })?;
        Ok(())
    })?;
    drop((b, x, sigma, labels));

    if config.img_channels == LATENTS {
        let mut b = Cpu::<f32>::for_codec();
        let (decoder, macs) = Decoder::random(&mut b, height, width)?;
        let mut latent = vec![0.0; height * width * LATENTS];
        Stream::new(0, Purpose::SampleNoise, 0).normals(&mut latent);
        measure("SD-VAE decode, one image".into(), macs as f64, &mut || {
            decoder.decode(&mut b, [height, width], &latent)?;
            Ok(())
        })?;
    }
    if args.json {
        let report = serde_json::json!({
            "preset": name, "height": height, "width": width, "device": "cpu", "threads": threads,
            "forward_gmac": macs * 1e-9, "rows": rows,
        });
        println!("{}", serde_json::to_string_pretty(&report).context("printing the report")?);
    }
    Ok(())
}

/// Random parameters, one at a time: the peak is to be that of the network, not of its making.
fn randomise(b: &mut Cpu, table: &ParamTable) -> Result<()> {
    for (id, spec) in table.iter() {
        let mut values = vec![0.0; spec.numel()];
        Stream { seed: 0, purpose: Purpose::Init, step: id.0 as u32, image: 0 }.normals(&mut values);
        b.write_param(Slot::Weight, id, &values)?;
    }
    Ok(())
}
