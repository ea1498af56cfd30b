//! `edm2k eval --fid`: the Fréchet distance of what a model makes, or has made, from a dataset.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;

use edm2k::backend::Backend;
use edm2k::backend::cpu::Cpu;
use edm2k::backend::gpu::engine::Gpu;
use edm2k::data::dataset::{Dataset, Kind};
use edm2k::frechet::{Moments, distance};
use edm2k::model::Model;
use edm2k::onnx::{Network, Wanted};
use edm2k::params::ParamTable;
use edm2k::pictures::Picture;
use edm2k::pictures::bicubic::resize;
use edm2k::pictures::decode;
use edm2k::rng::{Purpose, Stream};
use edm2k::sample::{Sampler, SamplerConfig};

use super::Engine;
use super::eval::EvalArgs;
use super::sample::{Decode, SamplerArgs, autoencoder, loaded};
use super::say::{note, out};

/// Pictures that are looked at together.
const CHUNK: usize = 64;

/// What `--fid` needs to know.
#[derive(clap::Args)]
pub struct FidArgs {
    /// Measure the Fréchet distance (FID) of the model's images from the dataset's
    #[arg(long, requires = "network", help_heading = "Distance")]
    pub fid: bool,
    /// ONNX file of the network whose features are compared; see below for what it is given
    #[arg(long, value_name = "FILE", requires = "fid", help_heading = "Distance")]
    network: Option<PathBuf>,
    /// Tensor of the features in it [default: its only output]
    #[arg(long, value_name = "NAME", requires = "fid", help_heading = "Distance")]
    network_node: Option<String>,
    /// Images to make
    #[arg(long, value_name = "N", default_value_t = 50_000, help_heading = "Distance",
          value_parser = clap::value_parser!(u32).range(2..))]
    count: u32,
    /// Take the PNGs of this directory (but grid*.png and *-steps.png) instead of making images
    #[arg(long, value_name = "DIR", requires = "fid", conflicts_with = "model", help_heading = "Distance")]
    generated: Option<PathBuf>,
    /// Autoencoder that makes pictures of latents
    #[arg(long, value_name = "FILE", requires = "fid", help_heading = "Distance")]
    vae: Option<PathBuf>,
    #[command(flatten)]
    sampler: SamplerArgs,
}

/// Prints the distance to stdout, showing progress on stderr.
pub fn run(args: &EvalArgs, model: Option<&Model>, data: &Dataset) -> anyhow::Result<()> {
    let FidArgs { network: Some(network), network_node, generated, .. } = &args.fid else {
        bail!("--network is missing");
    };
    let config = args.fid.sampler.config()?;
    let references = data.len().min(args.images.map_or(usize::MAX, |images| images as usize));
    ensure!(references > 1, "{}: {references} image, expected 2 at least", args.data.display());
    let files = generated.as_ref().map(|dir| pictures(dir).context("--generated")).transpose()?;
    let count = files.as_ref().map_or(args.fid.count as usize, Vec::len);
    let engine = args.device.open()?;
    let [height, width, _] = data.shape();
    if let Some(model) = model {
        super::check_forward(&engine, &model.net.config, [height, width], count.min(args.batch.into()))?;
    }
    let mut decode = decoder(args, data, &engine)?;

    let reference = |i: usize, decode: &mut Decode| {
        let mut image = vec![0.0; data.shape().iter().product()];
        data.image(i, Stream::new(0, Purpose::Latent, i as u64), &mut image);
        decode(&image)
    };
    let first = reference(0, &mut decode)?;
    let wanted = network_node.as_deref().map_or(Wanted::Output, Wanted::Named);
    let network = Network::open(network, wanted, Some([first.height(), first.width()])).context("--network")?;
    let width = network.width();
    if references.min(count) <= width {
        note!(
            "warning: {count} images against {references} have singular covariances of {width} features; the distance \
             depends much on their number (more than {width} of each are needed, and 50000 are usual)"
        );
    }

    let bar = ProgressBar::new((references + count) as u64).with_style(ProgressStyle::with_template(
        "{bar:30} {msg} {human_pos} of {human_len} images, {per_sec}, {eta} left",
    )?);
    let look = Look { network: &network, bar: &bar };
    let started = Instant::now();
    bar.set_message("dataset:");
    let mut dataset = Moments::new(width);
    for first in (0..references).step_by(CHUNK) {
        let chunk = first..references.min(first + CHUNK);
        let pictures: Vec<Picture> = chunk.map(|i| reference(i, &mut decode)).collect::<anyhow::Result<_>>()?;
        look.at(&mut dataset, &pictures, first, "the dataset")?;
    }
    let mut made = Moments::new(width);
    match (files, model) {
        (Some(files), _) => {
            bar.set_message("generated:");
            for (number, chunk) in files.chunks(CHUNK).enumerate() {
                let pictures: Vec<Picture> = chunk.par_iter().map(|file| open(file)).collect::<anyhow::Result<_>>()?;
                look.at(&mut made, &pictures, number * CHUNK, "those generated")?;
            }
        }
        (None, Some(model)) => {
            bar.set_message("sampling:");
            let job = Job { model, data, config: &config, batch: args.batch.into(), references, count };
            match engine {
                Engine::Cpu => {
                    job.run(&|table| Ok(Cpu::<f32>::for_sampling(table)), &mut decode, &look, &mut made)?;
                }
                Engine::Gpu(runtime) => {
                    let new = |table: &_| Ok(Gpu::for_sampling(runtime.clone(), args.device.math(), table)?);
                    job.run(&new, &mut decode, &look, &mut made)?;
                }
            }
        }
        (None, None) => bail!("--model is missing"),
    }
    bar.finish_and_clear();
    let rate = (references + count) as f64 / started.elapsed().as_secs_f64();
    let distance = distance(made, dataset);
    ensure!(distance.is_finite(), "{}: the features are too large to compare", network.path().display());

    let source = generated.as_ref().or(args.model.as_ref()).map(|path| path.display().to_string());
    let split = args.split.to_string();
    if args.json {
        let mut all = json!({
            "frechet_distance": distance, "images": count, "references": references,
            "network": network.path().display().to_string(), "node": network.node(), "features": width,
            "data": args.data.display().to_string(), "split": split, "images_per_second": rate,
        });
        match generated {
            Some(_) => all["generated"] = json!(source),
            None => (all["model"], all["sampler"]) = (json!(source), json!(config)),
        }
        out!("{all}");
    } else {
        out!("Frechet distance {distance:.4}");
        out!("{count} images of {}, {references} of the {split} split", source.unwrap_or_default());
        out!("{width} features, {} of {}; {rate:.1} images/s", network.node(), network.path().display());
    }
    Ok(())
}

/// How what the dataset has, and the model makes, becomes a picture.
fn decoder(args: &EvalArgs, data: &Dataset, engine: &Engine) -> anyhow::Result<Decode> {
    let [height, width, channels] = data.shape();
    let dir = args.data.display();
    match (data.header().kind, &args.fid.vae) {
        (Kind::Images, None) if channels == 3 => {
            Ok(Box::new(move |image| Ok(Picture::from_model(height, width, image))))
        }
        (Kind::Images, None) => bail!("{dir}: images of {channels} channels, expected 3"),
        (Kind::Images, Some(_)) => bail!("--vae: {dir} has no latents, but pixels"),
        (Kind::Latents, Some(vae)) => {
            let of = (dir.to_string(), data.header().autoencoder.as_ref());
            autoencoder(vae, of, [height, width], engine, args.device.math())
        }
        (Kind::Latents, None) => bail!("{dir}: latents; --vae FILE makes pictures of them"),
    }
}

/// The PNG files of a directory, but those that `edm2k sample` writes beside its images; by name.
fn pictures(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect() };
    let mut files = read().with_context(|| dir.display().to_string())?;
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let number = name.strip_prefix("grid").and_then(|rest| rest.strip_suffix(".png"));
        let grid =
            number.is_some_and(|n| n.is_empty() || n.strip_prefix('-').is_some_and(|n| n.parse::<u32>().is_ok()));
        name.ends_with(".png") && !grid && !name.ends_with("-steps.png")
    });
    files.sort();
    ensure!(files.len() > 1, "{}: {} PNG files, expected 2 at least", dir.display(), files.len());
    Ok(files)
}

fn open(file: &Path) -> anyhow::Result<Picture> {
    let image = decode::open(file, [255; 3]);
    image.map(|image| image.picture).map_err(|why| anyhow!("--generated {}: {why}", file.display()))
}

/// The network, and who watches.
struct Look<'a> {
    network: &'a Network,
    bar: &'a ProgressBar,
}

impl Look<'_> {
    /// Adds the features of pictures: RGB from 0 to 255. `first` and `what` say which these are, in errors.
    fn at(&self, moments: &mut Moments, pictures: &[Picture], first: usize, what: &str) -> anyhow::Result<()> {
        let features = |(i, picture): (usize, &Picture)| {
            let picture = resize(picture, self.network.size());
            let values: Vec<f32> = picture.rgb().iter().map(|&x| f32::from(x)).collect();
            let features = self.network.features(&values, &format!("image {} of {what}", first + i));
            self.bar.inc(1);
            features
        };
        let all: Vec<_> =
            pictures.par_iter().enumerate().map(features).collect::<Result<_, _>>().context("--network")?;
        all.iter().for_each(|features| moments.add(features));
        Ok(())
    }
}

/// What to sample.
struct Job<'a> {
    model: &'a Model,
    data: &'a Dataset,
    config: &'a SamplerConfig,
    batch: usize,
    references: usize,
    count: usize,
}

impl Job<'_> {
    fn run<B: Backend>(
        &self,
        new: &dyn Fn(&ParamTable) -> anyhow::Result<B>,
        decode: &mut Decode,
        look: &Look,
        moments: &mut Moments,
    ) -> anyhow::Result<()> {
        let mut backend = loaded(self.model, new)?;
        let [height, width, channels] = self.data.shape();
        let dim = self.model.net.config.label_dim;
        for first in (0..self.count).step_by(self.batch) {
            let seeds: Vec<u64> = (first..self.count.min(first + self.batch)).map(|i| i as u64).collect();
            let mut labels = vec![0.0; seeds.len() * dim];
            for (label, &seed) in labels.chunks_mut(dim.max(1)).zip(&seeds) {
                self.data.condition(seed as usize % self.references, label);
            }
            let mut sampler = Sampler { backend: &mut backend, net: &self.model.net, gnet: None };
            let images = sampler.run(&labels, &seeds, [height, width], self.config, None)?;
            let pictures = images.chunks(height * width * channels).map(&mut *decode);
            let pictures: Vec<Picture> = pictures.collect::<anyhow::Result<_>>()?;
            look.at(moments, &pictures, first, "those made")?;
        }
        Ok(())
    }
}
