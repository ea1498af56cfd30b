//! `edm2k bench`: how fast a device runs a network, and in how much memory.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use edm2k::backend::codec::CodecBackend;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::engine::{Cost, Gpu, Operation};
use edm2k::backend::gpu::launch::ConvLoop;
use edm2k::backend::gpu::limits::{self, Peaks};
use edm2k::backend::gpu::runtime::Runtime;
use edm2k::backend::{Normalization, OptimizerStep, PlanKey, Shape, Slot, TrainingBackend};
use edm2k::codec::{CodecPlan, Decoder, LATENTS};
use edm2k::median;
use edm2k::memory;
use edm2k::model::config::{Preset, preset};
use edm2k::model::precond::Forward;
use edm2k::model::{Config, Precond};
use edm2k::params::ParamTable;
use edm2k::pipeline::check_forward;
use edm2k::rng::{Purpose, Stream};
use edm2k::train::stats::peak_mib;
use edm2k::train::{self, MicroBatchPlan, micro_batch};

use super::say::{self, out};

const EXAMPLES: &str = "\
Examples:
  edm2k bench                                    EDM2-XS on 512x704 images (64x88 latents)
  edm2k bench --preset edm2-img512-s --size 64x64 --repeats 9
  edm2k bench --device cuda --kernels --json > bench.json
  edm2k bench --picture                          one picture: the first, and those after it
  edm2k bench --picture --model demo/emoji.safetensors

Times are medians of repeated runs after one that warms up. Multiply-adds are EDM2's \"Gflops\",
but for 1 % of those, which are elementwise. On the CPU, peak memory is that of the whole process
up to the end of the measurement, weights included. Training there is in f32, and also in bf16
where that is faster. A training step includes Adam's moments but no moving averages; on a GPU it
is two micro-batches. The limits of a card, a loop of its products and a copy of memory, are
measured in the same run.";

/// Measure forward passes and training steps of a network.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// Network to measure.
    #[arg(long, default_value = "1girl-xs", value_name = "NAME", conflicts_with = "model")]
    pub preset: String,
    /// Size of the image or latent [default: the preset's].
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    pub size: Option<[usize; 2]>,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// On a GPU: images at a time in training.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    batch_gpu: u32,
    /// On a GPU: every kernel too, each time with a cold cache, against the card's limits.
    #[arg(long)]
    kernels: bool,
    /// How long a picture of 16 guided steps takes instead: the first, from the start of the process, and each after it,
    /// by parts.
    #[arg(long, conflicts_with_all = ["kernels", "batch_gpu"])]
    pub picture: bool,
    /// With --picture: draw with this model [default: the preset with random weights, and an SD-VAE of the published size].
    #[arg(long, value_name = "FILE", requires = "picture", conflicts_with_all = ["kernels", "batch_gpu"])]
    pub model: Option<PathBuf>,
    /// With --picture: make pictures of latents with this autoencoder.
    #[arg(long, value_name = "FILE", requires = "picture", conflicts_with_all = ["kernels", "batch_gpu"])]
    pub vae: Option<PathBuf>,
    /// When the process was started, in nanoseconds of the system's clock.
    #[arg(long, hide = true, requires = "model")]
    pub started: Option<u64>,
    #[command(flatten)]
    pub device: super::DeviceArgs,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// One measured figure.
#[derive(serde::Serialize)]
struct Figure {
    what: String,
    median_s: f64,
    fastest_s: f64,
    gmac_per_s: f64,
    images_per_s: f64,
    /// Of the process, or of the device's arenas.
    memory_mib: Option<f64>,
}

/// One kind of operation of a plan.
#[derive(serde::Serialize)]
struct KernelRow {
    plan: &'static str,
    name: &'static str,
    /// Shape of the result.
    shape: Shape,
    /// How many operations of this kind the plan has.
    count: usize,
    median_s: f64,
    tflop_per_s: f64,
    gbyte_per_s: f64,
    /// Share of whichever limit of the card is nearer.
    of_limit: f64,
}

/// A measurement under way.
struct Bench<'a> {
    args: &'a BenchArgs,
    net: Precond,
    table: ParamTable,
    size: [usize; 2],
    rows: Vec<Figure>,
    kernels: Vec<KernelRow>,
    limits: Option<Peaks>,
}

/// Runs the subcommand.
pub fn run(args: BenchArgs) -> Result<()> {
    let Preset { config, size, name, .. } = preset(&args.preset)?;
    let size = args.size.unwrap_or(size);
    config.check_size(size[0], size[1])?;
    let opened = args.device.open()?.fastest();
    let device = match opened.runtime() {
        None => format!("{opened}, {} threads", rayon::current_num_threads()),
        Some(_) => opened.to_string(),
    };
    let (net, table) = Precond::new(&config)?;
    let images = if opened.runtime().is_some() { args.batch_gpu as usize } else { 2 };
    check_forward(&opened, &config, size, images, 1)?;
    if opened.runtime().is_none() {
        let training = train::memory::estimate(&config, &table, size[0], size[1], 1, 0);
        let needed = u128::from(training.parameters) + u128::from(training.activations);
        memory::check("a training step of one image", needed)?;
    }
    if !args.json {
        out!("{name} at {}x{} on {device}", size[1], size[0]);
    }
    let macs = net.macs(&table, size[0], size[1]);
    let mut bench = Bench { args: &args, net, table, size, rows: vec![], kernels: vec![], limits: None };
    match opened.runtime() {
        None => {
            ensure!(!args.kernels, "--kernels measures a GPU's kernels; give --device cuda");
            bench.cpu(opened.precision().is_some())?;
        }
        Some(runtime) => bench.gpu(runtime.clone())?,
    }
    if args.json {
        let report = serde_json::json!({
            "preset": name, "height": size[0], "width": size[1], "device": device, "forward_gmac": macs as f64 * 1e-9,
            "rows": bench.rows, "limits": bench.limits, "kernels": bench.kernels,
        });
        say::results(&serde_json::to_string_pretty(&report).context("printing the report")?);
    }
    Ok(())
}

/// MiB of the parameters and the largest workspace of a device.
fn mib(parameters: usize, plans: impl Iterator<Item = Cost>) -> Option<f64> {
    Some((parameters + plans.map(|cost| cost.workspace).max().unwrap_or(0)) as f64 / f64::from(1 << 20))
}

/// Loads random parameters one at a time, so that the memory's peak is that of the network and not of making it.
pub fn load_random<B: TrainingBackend>(b: &mut B, table: &ParamTable, how: Normalization) -> Result<()> {
    for (id, spec) in table.iter() {
        let mut values = vec![0.0; spec.numel()];
        Stream { seed: 0, purpose: Purpose::Init, step: id.0 as u32, image: 0 }.normals(&mut values);
        b.write_param(Slot::Weight, id, &values)?;
    }
    Ok(b.make_effective(Slot::Weight, how)?)
}

/// So many images, noise levels and, unless it is unconditional, labels.
pub fn random_inputs(config: &Config, [h, w]: [usize; 2], n: usize) -> Vec<(Shape, Vec<f32>)> {
    let mut x = vec![0.0; n * h * w * config.img_channels];
    Stream::new(0, Purpose::SampleNoise, 0).normals(&mut x);
    let dim = config.label_dim;
    let images = [([n, h, w, config.img_channels], x), ([n, 1, 1, 1], vec![1.0; n])];
    images.into_iter().chain((dim > 0).then(|| ([n, 1, 1, dim], vec![0.03; n * dim]))).collect()
}

/// Those as a micro-batch.
pub fn random_micro_batch<B: TrainingBackend>(b: &mut B, inputs: &[(Shape, Vec<f32>)]) -> train::Inputs<B::Tensor> {
    let mut upload = |(shape, values): &(Shape, Vec<f32>)| b.upload(*shape, values);
    let (clean, noisy, sigma) = (upload(&inputs[0]), upload(&inputs[0]), upload(&inputs[1]));
    train::Inputs { clean, noisy, sigma, keys: None, labels: inputs.get(2).map(upload) }
}

impl Bench<'_> {
    fn cpu(&mut self, bf16: bool) -> Result<()> {
        let mut b = Cpu::<f32>::for_sampling(&self.table).with_bf16(bf16);
        load_random(&mut b, &self.table, Normalization::Eval)?;
        for n in [1, 2] {
            self.forward(&mut b, n, &|_| peak_mib())?;
        }
        drop(b);
        // This comes before the training, whose peak of memory would hide its own.
        if self.net.config.img_channels == LATENTS {
            self.decoding(&mut Cpu::<f32, ()>::for_codec().with_bf16(bf16), &|_| peak_mib())?;
        }
        // Training is in f32 unless it is told otherwise.
        let ways: &[_] = if bf16 { &[(false, ", f32"), (true, "")] } else { &[(false, "")] };
        for &(bf16, numbers) in ways {
            let mut b = Cpu::<f32>::for_training(&self.table, 0).with_bf16(bf16);
            self.training(&mut b, 1, 1, numbers, &|_| peak_mib())?;
        }
        Ok(())
    }

    /// An SD-VAE of the published size, with random weights, makes an image of a latent.
    fn decoding<B: CodecBackend>(&mut self, b: &mut B, memory: &dyn Fn(&B) -> Option<f64>) -> Result<CodecPlan> {
        let size = self.size;
        let (decoder, macs) = Decoder::random(b, size[0], size[1])?;
        let mut latent = vec![0.0; size[0] * size[1] * LATENTS];
        Stream::new(0, Purpose::SampleNoise, 0).normals(&mut latent);
        let mut run = || {
            decoder.decode(b, size, &latent)?;
            Ok(())
        };
        let times = self.time(&mut run)?;
        self.row("SD-VAE decode, one image".into(), [macs as f64, 1.0], times, memory(b));
        Ok(decoder.plan())
    }

    fn gpu(&mut self, runtime: Rc<dyn Runtime>) -> Result<()> {
        let (math, repeats) = (self.args.device.math(), self.args.repeats as usize);
        let limits = limits::measure(&*runtime, math, repeats)?;
        if !self.args.json {
            let (tflops, bandwidth) = (limits.macs_per_s * 2e-12, limits.bytes_per_s * 1e-9);
            let products = match (math.conv_loop(runtime.card()), math.name(runtime.card())) {
                (ConvLoop::Wgmma, _) => "wgmma, f32 sums",
                (ConvLoop::Mma, "f16x2") => "mma.sync, f16 sums",
                (ConvLoop::Mma, _) => "mma.sync, f32 sums",
            };
            out!("limits measured: {tflops:.1} TFLOP/s ({products}), {bandwidth:.0} GB/s (copy)");
        }
        self.limits = Some(limits);
        let memory = |b: &Gpu| mib(b.param_bytes(), b.costs());
        let mut b = Gpu::for_sampling(runtime.clone(), math, &self.table)?;
        load_random(&mut b, &self.table, Normalization::Eval)?;
        for n in [1, 2, 8] {
            self.forward(&mut b, n, &memory)?;
            if self.args.kernels && n == 1 {
                self.time_kernels(&mut b, "forward, batch 1", &Forward)?;
            }
        }
        drop(b);
        if self.net.config.img_channels == LATENTS {
            let mut b = Gpu::for_codec(runtime.clone(), math)?;
            let plan = self.decoding(&mut b, &|b| mib(b.param_bytes(), b.costs()))?;
            if self.args.kernels {
                self.time_kernels(&mut b, "SD-VAE decode", &plan)?;
            }
        }
        let mut b = Gpu::for_training(runtime, math, &self.table, 0)?;
        self.training(&mut b, self.args.batch_gpu as usize, 2, "", &memory)?;
        if self.args.kernels {
            self.time_kernels(&mut b, "training", &MicroBatchPlan { dropout: 0.0 })?;
        }
        Ok(())
    }

    /// Seconds of repeated runs after one that warms up.
    fn time(&self, run: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        run()?;
        let timed = |_| {
            let start = Instant::now();
            run()?;
            Ok(start.elapsed().as_secs_f64())
        };
        (0..self.args.repeats).map(timed).collect()
    }

    fn row(&mut self, what: String, [macs, images]: [f64; 2], times: Vec<f64>, memory_mib: Option<f64>) {
        let fastest_s = times.iter().copied().fold(f64::INFINITY, f64::min);
        let median_s = median(&times);
        let (gmac_per_s, images_per_s) = (macs / median_s * 1e-9, images / median_s);
        let row = Figure { what, median_s, fastest_s, gmac_per_s, images_per_s, memory_mib };
        if !self.args.json {
            let memory = row.memory_mib.map_or("unknown".into(), |m| format!("{m:.0} MiB"));
            out!(
                "{:<24} {:10.3} ms (fastest {:.3}) {:9.1} GMAC/s {:9.2} images/s   memory {memory}",
                row.what,
                row.median_s * 1e3,
                row.fastest_s * 1e3,
                row.gmac_per_s,
                row.images_per_s
            );
        }
        self.rows.push(row);
    }

    fn forward<B: TrainingBackend>(&mut self, b: &mut B, n: usize, memory: &dyn Fn(&B) -> Option<f64>) -> Result<()> {
        let inputs = random_inputs(&self.net.config, self.size, n);
        let macs = self.net.macs(&self.table, self.size[0], self.size[1]) as f64 * n as f64;
        let net = self.net.clone();
        let mut run = || {
            let inputs: Vec<_> = inputs.iter().map(|(shape, x)| b.upload(*shape, x)).collect();
            let made = net.planned(b, &inputs)?;
            b.download(&made)?;
            Ok(())
        };
        let times = self.time(&mut run)?;
        self.row(format!("forward, batch {n}"), [macs, n as f64], times, memory(b));
        Ok(())
    }

    /// A step of `rounds` micro-batches of `n` images; `numbers` ends its name.
    fn training<B: TrainingBackend>(
        &mut self,
        b: &mut B,
        n: usize,
        rounds: usize,
        numbers: &str,
        memory: &dyn Fn(&B) -> Option<f64>,
    ) -> Result<()> {
        load_random(b, &self.table, Normalization::Train { rounds })?;
        let inputs = random_inputs(&self.net.config, self.size, n);
        let total = (n * rounds) as f64;
        let macs = 3.0 * self.net.macs(&self.table, self.size[0], self.size[1]) as f64 * total;
        let net = self.net.clone();
        let mut step = 0;
        let mut run = || {
            step += 1;
            let mut losses = Vec::new();
            for _ in 0..rounds {
                let batch = random_micro_batch(b, &inputs);
                losses.push(micro_batch(b, &net, 0.0, batch)?);
            }
            let (betas, grad_scale) = ((0.9, 0.99), 1.0 / total);
            b.optimizer_step(&OptimizerStep { lr: 1e-3, betas, eps: 1e-8, step, grad_scale, rounds, ema_betas: &[] })?;
            losses.iter().try_for_each(|loss| b.download(loss).map(|_| ()))?;
            Ok(())
        };
        let times = self.time(&mut run)?;
        self.row(format!("training step, batch {}{numbers}", n * rounds), [macs, total], times, memory(b));
        Ok(())
    }

    /// Times each kind of operation of the plan `key` and compares it with the card's limits; the kind that takes the
    /// longest comes first.
    fn time_kernels<P>(&mut self, b: &mut Gpu<P>, plan: &'static str, key: &dyn PlanKey) -> Result<()> {
        let Some(limits) = self.limits else { return Ok(()) };
        let timing = b.time(key, self.args.repeats as usize)?;
        let whole = median(&timing.whole);
        let row = |(work, count, seconds): (Operation, usize, Vec<f64>)| {
            let median_s = median(&seconds);
            let (macs, bytes) = (work.macs() as f64, work.bytes as f64);
            let floor = (macs / limits.macs_per_s).max(bytes / limits.bytes_per_s);
            KernelRow {
                plan,
                name: work.name,
                shape: work.shape,
                count,
                median_s,
                tflop_per_s: 2e-12 * macs / median_s,
                gbyte_per_s: 1e-9 * bytes / median_s,
                of_limit: floor / median_s,
            }
        };
        let mut kernels: Vec<KernelRow> = timing.kinds.into_iter().map(row).collect();
        kernels.sort_by(|a, b| (b.median_s * b.count as f64).total_cmp(&(a.median_s * a.count as f64)));
        if !self.args.json {
            let apart: f64 = kernels.iter().map(|k| k.median_s * k.count as f64).sum();
            out!("");
            out!("{plan}: {:.3} ms with a cold cache; its operations one by one {:.3} ms", whole * 1e3, apart * 1e3);
            out!("  {:<26} {:<22} count   microseconds  TFLOP/s   GB/s  of the limit", "operation", "result");
            for k in &kernels {
                out!(
                    "  {:<26} {:<22} {:5} {:14.1} {:8.1} {:6.0} {:8.1} %",
                    k.name,
                    format!("{:?}", k.shape),
                    k.count,
                    k.median_s * 1e6,
                    k.tflop_per_s,
                    k.gbyte_per_s,
                    k.of_limit * 100.0
                );
            }
            out!("");
        }
        self.kernels.append(&mut kernels);
        Ok(())
    }
}
