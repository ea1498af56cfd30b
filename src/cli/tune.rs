//! `edm2k tune`: which tiles of the convolutions are the fastest on this machine's GPU.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use clap::Args;
use edm2k::backend::gpu::engine::{Gpu, Trial};
use edm2k::backend::gpu::runtime::Runtime;
use edm2k::backend::gpu::tiles::{Choice, Product, Question};
use edm2k::backend::{Backend, Normalization, PlanKey};
use edm2k::codec::{Decoder, LATENTS};
use edm2k::formats::{At, Claim};
use edm2k::median;
use edm2k::model::config::{Preset, preset};
use edm2k::model::precond::Forward;
use edm2k::model::{Config, Model, Precond};
use edm2k::pipeline::check_forward;
use edm2k::rng::{Purpose, Stream};
use edm2k::train::{MicroBatchPlan, micro_batch};
use edm2k::tuning::{self, Table};

use super::bench::{load_random, random_inputs, random_micro_batch};
use super::say::{self, note, out};

/// Measure which tiles of the convolutions are the fastest on a GPU, for the sizes of one network.
#[derive(Args)]
#[command(after_help = "\
A convolution is computed in tiles, and its sums in one or more parts. A model of the costs
chooses them. This times the promising tiles for each matrix size of the network, and keeps those
that are faster than the model's choice by more than the noise. They go into the user's cache: a
file for each card, driver and set of kernels. sample, train, serve and bench take them from there,
for products of these very sizes. For networks of latents the decode by an SD-VAE is measured too.
What was measured before for other sizes stays.

Another number of parts is another order of sums: pictures change within rounding, as on another
card. With the same file they are the same, to the bit. Without the file, or with EDM2K_UNTUNED=1,
the model chooses.

Examples:
  edm2k tune                                        the sizes of EDM2-XS on latents of 64x88
  edm2k tune --model runs/mine/snapshot-000200000-0.100.safetensors --batch 1,8
  edm2k tune --preset edm2-img512-s --batch-gpu 32  training with 32 images at a time too
  edm2k tune --dry-run                              measure, and write nothing")]
pub struct TuneArgs {
    /// Network whose sizes are measured
    #[arg(long, default_value = "1girl-xs", value_name = "NAME", conflicts_with = "model")]
    preset: String,
    /// The network of this model file instead
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Width and height of the images, or latents [default: what the network was made for]
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    size: Option<[usize; 2]>,
    /// Images at a time in sampling, as of `sample`; twice as many are measured too, which is what guidance makes of
    /// them
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4",
          value_parser = clap::value_parser!(u16).range(1..))]
    batch: Vec<u16>,
    /// Measure training too, with so many images at a time, as of `train`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch_gpu: Option<u16>,
    /// Measurements of each choice; the fastest and the model's are measured three times as often
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// Measure, and write nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    device: super::DeviceArgs,
}

/// A measurement under way.
struct Tuning<'a> {
    args: &'a TuneArgs,
    runtime: Rc<dyn Runtime>,
    config: Config,
    size: [usize; 2],
    /// Where the table is written, after each plan.
    path: Option<PathBuf>,
    table: Table,
    known: HashSet<Question>,
}

/// Prints a table to stdout, and writes one.
pub fn run(args: &TuneArgs) -> Result<()> {
    let (name, config, size) = match &args.model {
        Some(path) => {
            let model = Model::load(path).context("--model")?;
            model.doubts.iter().for_each(|doubt| note!("warning: --model {doubt}"));
            (path.display().to_string(), model.net.config, [model.meta.height, model.meta.width])
        }
        None => {
            let Preset { name, config, size, .. } = preset(&args.preset)?;
            (name.into(), config, size)
        }
    };
    let size = args.size.unwrap_or(size);
    config.check_size(size[0], size[1])?;
    let device = args.device.open()?;
    let runtime = device.runtime().context("tune measures a GPU's kernels; give --device cuda")?.clone();
    let most = args.batch.iter().map(|&n| 2 * usize::from(n)).chain(args.batch_gpu.map(usize::from)).max();
    check_forward(&device, &config, size, most.unwrap_or(1), 1)?;
    let origin = runtime.origin();
    let path = match args.dry_run {
        true => None,
        false => {
            let dir = tuning::directory().context("the system names no directory for caches; give --dry-run")?;
            fs::create_dir_all(&dir).at(&dir)?;
            Some(tuning::path_in(&dir, &origin))
        }
    };
    // Claimed before the work, since another process that measured on this card meanwhile would spoil both
    // measurements.
    let _claim = path.as_ref().map(|path| Claim::new(path, true).at(path)).transpose()?;
    // If something is wrong with the table, that was said when the device was opened.
    let before = path.as_ref().and_then(|path| Table::read(path).ok().flatten());
    let table = before.filter(|table| table.origin == origin).unwrap_or_else(|| Table::new(origin));
    out!("{name} at {}x{} on {}, {}", size[1], size[0], table.origin.card, device.math().describe(runtime.card()));
    let latents = config.img_channels == LATENTS;
    let mut tuning = Tuning { args, runtime, config, size, path, table, known: HashSet::new() };
    tuning.sampling()?;
    if latents {
        tuning.decoding()?;
    }
    if let Some(images) = args.batch_gpu {
        tuning.training(images.into())?;
    }
    if let Some(path) = &tuning.path {
        out!("{}: {} choices", path.display(), tuning.table.len());
    }
    Ok(())
}

/// Tile and parts of the sum.
fn in_words(Choice { tile, splits, .. }: &Choice) -> String {
    if *splits == 1 { tile.to_string() } else { format!("{tile} in {splits}") }
}

impl Tuning<'_> {
    fn sampling(&mut self) -> Result<()> {
        let math = self.args.device.math();
        let (net, table) = Precond::new(&self.config)?;
        let mut b = Gpu::for_sampling(self.runtime.clone(), math, &table)?;
        load_random(&mut b, &table, Normalization::Eval)?;
        let mut batches: Vec<usize> = self.args.batch.iter().flat_map(|&n| [n.into(), 2 * usize::from(n)]).collect();
        batches.sort_unstable();
        batches.dedup();
        for n in batches {
            let inputs = random_inputs(&net.config, self.size, n);
            self.plan(&mut b, &format!("forward, batch {n}"), &Forward, &mut |b| {
                let inputs: Vec<_> = inputs.iter().map(|(shape, x)| b.upload(*shape, x)).collect();
                net.planned(b, &inputs)?;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn decoding(&mut self) -> Result<()> {
        let mut b = Gpu::for_codec(self.runtime.clone(), self.args.device.math())?;
        let [h, w] = self.size;
        let (decoder, _) = Decoder::random(&mut b, h, w)?;
        let mut latent = vec![0.0; h * w * LATENTS];
        Stream::new(0, Purpose::SampleNoise, 0).normals(&mut latent);
        self.plan(&mut b, "SD-VAE decode", &decoder.plan(), &mut |b| {
            decoder.decode(b, [h, w], &latent)?;
            Ok(())
        })
    }

    fn training(&mut self, n: usize) -> Result<()> {
        let (net, table) = Precond::new(&self.config)?;
        let mut b = Gpu::for_training(self.runtime.clone(), self.args.device.math(), &table, 0)?;
        load_random(&mut b, &table, Normalization::Train { rounds: 1 })?;
        let inputs = random_inputs(&net.config, self.size, n);
        self.plan(&mut b, &format!("training, batch {n}"), &MicroBatchPlan { dropout: 0.0 }, &mut |b| {
            let batch = random_micro_batch(b, &inputs);
            micro_batch(b, &net, 0.0, batch)?;
            Ok(())
        })
    }

    /// Measures the products of one plan that no other plan had, and prints what was found.
    fn plan<P>(
        &mut self,
        b: &mut Gpu<P>,
        what: &str,
        key: &dyn PlanKey,
        make: &mut dyn FnMut(&mut Gpu<P>) -> Result<()>,
    ) -> Result<()> {
        let bar = say::bar(0, "{msg}: {pos} of {len} choices, {eta} left").with_message(what.to_owned());
        let known = &self.known;
        let trials =
            b.try_tiles(key, self.args.repeats.into(), make, &|question| known.contains(question), &mut |done, of| {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            });
        bar.finish_and_clear();
        let trials = trials?;
        out!("");
        out!("{what}: {} sizes of products", trials.len());
        if !trials.is_empty() {
            out!(
                "  {:<22} {:>34} {:>5}  {:<15} {:>9}  {:<15} {:>9}  gain",
                "kernels",
                "groups x rows x columns, steps",
                "count",
                "guessed",
                "us",
                "fastest",
                "us"
            );
        }
        let (mut guessed, mut chosen) = (0.0, 0.0);
        for trial in &trials {
            let [before, after] = [&trial.model, &trial.fastest].map(|(_, seconds)| median(seconds));
            let taken = self.table.take(trial);
            (guessed, chosen) = (guessed + before, chosen + if taken { after } else { before });
            self.known.insert(trial.question);
            self.print(trial, [before, after], taken);
        }
        if !trials.is_empty() {
            out!("  together {:.0} us as guessed, {:.0} us as chosen", guessed * 1e6, chosen * 1e6);
        }
        Ok(self.path.as_ref().map_or(Ok(()), |path| self.table.write(path))?)
    }

    fn print(&self, trial: &Trial, seconds: [f64; 2], taken: bool) {
        let Trial { question: Question { kernels, product, .. }, count, model, fastest } = trial;
        let Product { groups, rows, columns, steps } = product;
        let [before, after] = seconds.map(|seconds| seconds / *count as f64 * 1e6);
        let gain = if taken { format!("{:.1} %", 100.0 * (1.0 - after / before)) } else { "-".into() };
        out!(
            "  {:<22} {:>34} {count:>5}  {:<15} {before:>9.1}  {:<15} {after:>9.1}  {gain}",
            kernels.to_string(),
            format!("{groups} x {rows} x {columns}, {steps}"),
            in_words(&model.0),
            in_words(&fastest.0),
        );
    }
}
