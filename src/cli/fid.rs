//! `edm2k fid`: the Fréchet distance of what a model makes, or has made, from a dataset.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::json;

use edm2k::Device;
use edm2k::data::dataset::{Dataset, Representation, Split};
use edm2k::frechet::{FeatureStatistics, distance};
use edm2k::memory;
use edm2k::onnx::{FeatureTensor, OnnxNetwork};
use edm2k::pictures::bicubic::resize;
use edm2k::pictures::{Picture, decode};
use edm2k::pipeline::{Condition, Domain, OutDir, Pipeline, Request, Viewer, learned_from};
use edm2k::rng::{Purpose, Stream};
use edm2k::sample::SamplerConfig;

use super::DeviceArgs;
use super::sample::SamplerArgs;
use super::say::{self, note, out};

/// Pictures that are looked at together.
const CHUNK: usize = 64;
/// Most sizes of pictures for a network that leaves the size open. It is opened for each.
const MOST_SIZES: usize = 64;

/// Measure how far the images of a model are from a dataset's: their Fréchet distance (FID).
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("images_of").required(true)), after_help = "\
It is the Fréchet distance between the features of images that the model makes and of the
dataset's. Each set is treated as a normal distribution. It is FID if NETWORK is Inception,
FD-DINOv2 if it is DINOv2. NETWORK is given one image at a time, f32 [1, 3, H, W] or [1, H, W, 3],
RGB from 0 to 255; what else it wants (the range -1 to 1 of Inception, ImageNet's mean and
deviation of DINOv2) must be part of it: put it in front when exporting. Images are resized to its
height and width (bicubic); a network that leaves these open gets them as they are. Its only output
is [1, D].
Image number i has seed i and the condition of the split's image i modulo their number. Latents of
the dataset are shown as --vae decodes them. Numbers of other tools need their export, their
sampler, and as many images: 50000 against the whole training split.

Examples:
  edm2k fid --network inception.onnx --model emoji.safetensors \\
      --data demo/cache/emoji-32 --split train --count 5000 --guidance 1
  edm2k fid --network inception.onnx --generated out --data demo/cache/emoji-32 --split train")]
pub struct FidArgs {
    /// ONNX file of the network whose features are compared; see below for what it is given
    #[arg(long, value_name = "FILE")]
    network: PathBuf,
    /// Tensor of the features in it [default: its only output]
    #[arg(long, value_name = "NAME")]
    network_node: Option<String>,
    /// Model file
    #[arg(long, value_name = "FILE", group = "images_of")]
    model: Option<PathBuf>,
    /// Take the PNGs of this directory (but grid*.png and *-steps.png) instead of making images
    #[arg(long, value_name = "DIR", group = "images_of", conflicts_with = "count")]
    generated: Option<PathBuf>,
    /// Dataset made by `edm2k prepare`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which of its images
    #[arg(long, value_enum, default_value_t = Split::Validation)]
    split: Split,
    /// Use only the first N images of the split [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    images: Option<u32>,
    /// Images to make
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(2..))]
    count: u32,
    /// Autoencoder that makes pictures of latents
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// Images at a time; changes speed and memory only
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
}

/// The source of the images that are compared with the dataset's.
enum Source {
    /// Files.
    Files(Vec<PathBuf>),
    /// A model.
    Model(Box<Pipeline>),
}

/// Prints the distance to stdout, showing progress on stderr.
pub fn run(args: FidArgs) -> anyhow::Result<()> {
    let sampler = args.sampler.config(&SamplerConfig::default())?;
    let there = args.generated.is_some();
    ensure!(
        !there || sampler == SamplerConfig::default(),
        "--generated: its images are there, so no sampler makes them"
    );
    let data = Dataset::open(&args.data, args.split).context("--data")?;
    let count = data.len().min(args.images.map_or(usize::MAX, |images| images as usize));
    ensure!(count > 1, "{}: {count} image, expected 2 at least", args.data.display());
    let mut references = References { args: &args, data, count, sampler };
    let device = args.device.open()?;
    let (source, count) = references.source(&device)?;
    let mut viewer = viewer(&args, &references.data, &device)?;
    let first = references.picture(0, &mut viewer)?;
    let wanted = args.network_node.as_deref().map_or(FeatureTensor::Output, FeatureTensor::Named);
    let mut networks = vec![];
    let network = of_size(&mut networks, &first, &args.network, wanted)?;
    let (features, node) = (network.width(), network.node().to_owned());
    // Those of both sets, and their product.
    memory::check(format!("covariances of {features} features"), 3 * 8 * (features as u128).pow(2))?;
    if references.count.min(count) <= features {
        note!(
            "warning: {count} images against {} have singular covariances of {features} features; the distance depends \
             much on their number (more than {features} of each are needed, and 50000 are usual)",
            references.count
        );
    }

    let all = references.count + count;
    let bar = say::bar(all as u64, "{msg} {human_pos} of {human_len} images, {per_sec}, {eta} left");
    let mut extractor = FeatureExtractor { path: &args.network, wanted, networks, bar: &bar };
    let started = Instant::now();
    let dataset = references.moments(&mut extractor, &mut viewer)?;
    let made = match source {
        Source::Files(files) => of_files(&files, &mut extractor)?,
        Source::Model(mut pipeline) => references.of_model(&mut pipeline, count, &mut extractor, &mut viewer)?,
    };
    bar.finish_and_clear();
    let rate = all as f64 / started.elapsed().as_secs_f64();
    let distance = distance(made, dataset);
    let distance = distance.with_context(|| format!("{}: these features have no distance", args.network.display()))?;

    let source = args.generated.as_ref().or(args.model.as_ref()).map(|path| path.display().to_string());
    let (split, References { count: references, sampler, .. }) = (args.split.to_string(), references);
    if args.json {
        let mut all = json!({
            "frechet_distance": distance, "images": count, "references": references,
            "network": args.network.display().to_string(), "node": node, "features": features,
            "data": args.data.display().to_string(), "split": split, "images_per_second": rate,
        });
        match args.generated {
            Some(_) => all["generated"] = json!(source),
            None => (all["model"], all["sampler"]) = (json!(source), json!(sampler)),
        }
        out!("{all}");
    } else {
        out!("Frechet distance {distance:.4}");
        out!("{count} images of {}, {references} of the {split} split", source.unwrap_or_default());
        out!("{features} features, {node} of {}; {rate:.1} images/s", args.network.display());
    }
    Ok(())
}

/// The images of the dataset (the first `count` of the split), and how images are made that are compared with them.
struct References<'a> {
    args: &'a FidArgs,
    data: Dataset,
    count: usize,
    sampler: SamplerConfig,
}

impl References<'_> {
    fn size(&self, i: usize) -> [usize; 2] {
        [self.data.shape_of(i)[0], self.data.shape_of(i)[1]]
    }

    fn picture(&self, i: usize, viewer: &mut Viewer) -> anyhow::Result<Picture> {
        let mut image = vec![0.0; self.data.shape_of(i).iter().product()];
        self.data.image(i, Stream::new(0, Purpose::Latent, i as u64), &mut image)?;
        Ok(viewer.picture(self.size(i), &image)?)
    }

    /// The request for the images with these numbers. Each has the size of the dataset's image whose condition it has;
    /// all of one request must have the same size.
    fn request(&self, pipeline: &Pipeline, numbers: &[usize]) -> Request {
        let condition =
            |number: &usize| Condition::of_image(&self.data, number % self.count, &self.args.data, self.args.split);
        let conditional = pipeline.net().config.label_dim > 0;
        Request {
            conditions: numbers.iter().filter(|_| conditional).map(condition).collect(),
            seeds: numbers.iter().map(|&number| number as u64).collect(),
            size: Some(self.size(numbers[0] % self.count)),
            sampler: self.sampler.clone(),
            batch: usize::from(self.args.batch),
            ..Request::default()
        }
    }

    /// What is compared with the dataset, and how many images that is.
    fn source(&mut self, device: &Device) -> anyhow::Result<(Source, usize)> {
        let args = self.args;
        if let Some(dir) = &args.generated {
            let files = OutDir::pictures(dir).context("--generated")?;
            let count = files.len();
            ensure!(count > 1, "--generated: {}: {count} PNG files, expected 2 at least", dir.display());
            return Ok((Source::Files(files), count));
        }
        let model = args.model.as_ref().context("--model is missing")?;
        let mut pipeline = Pipeline::load(device, model).context("--model")?;
        pipeline.warnings().iter().for_each(|warning| note!("warning: --model {warning}"));
        if pipeline.cannot_guide() {
            args.sampler.without_guide(&mut self.sampler).iter().for_each(|text| note!("{text}"));
        }
        let dir = args.data.display();
        let (theirs, ours) = (Domain::of_dataset(&self.data), pipeline.domain());
        theirs.check_given(&dir, &ours, model.display())?;
        let unknown = theirs.doubt(&dir, &ours, model.display()).filter(|_| !learned_from(pipeline.meta(), &args.data));
        unknown.iter().for_each(|warning| note!("warning: {warning}"));
        let count = args.count as usize;
        let numbers: Vec<usize> = (0..count.min(args.batch.into())).collect();
        for size in self.data.sizes() {
            let request = Request { size: Some(size), ..self.request(&pipeline, &numbers) };
            pipeline.check(&request).with_context(|| dir.to_string())?;
        }
        Ok((Source::Model(pipeline.into()), count))
    }

    /// The features of the dataset's images.
    fn moments(&self, extractor: &mut FeatureExtractor, viewer: &mut Viewer) -> anyhow::Result<FeatureStatistics> {
        extractor.bar.set_message("dataset:");
        let mut moments = FeatureStatistics::new(extractor.networks[0].width());
        for first in (0..self.count).step_by(CHUNK) {
            let chunk: Vec<usize> = (first..self.count.min(first + CHUNK)).collect();
            let pictures = chunk.iter().map(|&i| self.picture(i, viewer)).collect::<Result<Vec<_>, _>>()?;
            extractor.add(&mut moments, &pictures, &chunk, "the dataset")?;
        }
        Ok(moments)
    }

    /// The features of `count` images that a model makes, size by size.
    fn of_model(
        &self,
        pipeline: &mut Pipeline,
        count: usize,
        extractor: &mut FeatureExtractor,
        viewer: &mut Viewer,
    ) -> anyhow::Result<FeatureStatistics> {
        extractor.bar.set_message("sampling:");
        let mut moments = FeatureStatistics::new(extractor.networks[0].width());
        let mut by_size: BTreeMap<[usize; 2], Vec<usize>> = BTreeMap::new();
        (0..count).for_each(|number| by_size.entry(self.size(number % self.count)).or_default().push(number));
        for (size, all) in &by_size {
            for numbers in all.chunks(self.args.batch.into()) {
                let images = pipeline.generate(&self.request(pipeline, numbers))?;
                let pictures = images.iter().map(|image| viewer.picture(*size, &image.values));
                let pictures: Vec<Picture> = pictures.collect::<Result<_, _>>()?;
                extractor.add(&mut moments, &pictures, numbers, "those made")?;
            }
        }
        Ok(moments)
    }
}

/// The features of pictures that are there.
fn of_files(files: &[PathBuf], extractor: &mut FeatureExtractor) -> anyhow::Result<FeatureStatistics> {
    extractor.bar.set_message("generated:");
    let mut moments = FeatureStatistics::new(extractor.networks[0].width());
    for (number, chunk) in files.chunks(CHUNK).enumerate() {
        let pictures: Vec<Picture> = chunk.par_iter().map(|file| open(file)).collect::<anyhow::Result<_>>()?;
        let numbers: Vec<usize> = (number * CHUNK..).take(chunk.len()).collect();
        extractor.add(&mut moments, &pictures, &numbers, "those generated")?;
    }
    Ok(moments)
}

/// What turns the dataset's images, and those that the model makes, into pictures.
fn viewer(args: &FidArgs, data: &Dataset, device: &Device) -> anyhow::Result<Viewer> {
    let dir = args.data.display().to_string();
    let (viewer, warning) = Viewer::of(device, data, &dir, args.vae.as_deref()).context("--vae")?;
    warning.iter().for_each(|warning| note!("warning: --vae {warning}"));
    viewer.with_context(|| match data.header().kind {
        Representation::Images => format!("{dir}: images of {} channels, expected 3", data.header().channels),
        Representation::Latents => format!("{dir}: latents; --vae FILE makes pictures of them"),
    })
}

fn open(file: &Path) -> anyhow::Result<Picture> {
    let image = decode::open(file, [255; 3]);
    image.map(|image| image.picture).map_err(|why| anyhow!("--generated {}: {why}", file.display()))
}

/// Whether a network is for pictures of this one's size. One that has a size serves all.
fn serves(network: &OnnxNetwork, picture: &Picture) -> bool {
    !network.any_size() || network.size() == [picture.height(), picture.width()]
}

/// The network for pictures of this one's size. It is opened unless it is there.
fn of_size<'a>(
    networks: &'a mut Vec<OnnxNetwork>,
    picture: &Picture,
    path: &Path,
    wanted: FeatureTensor,
) -> anyhow::Result<&'a OnnxNetwork> {
    let size = [picture.height(), picture.width()];
    let place = match networks.iter().position(|network| serves(network, picture)) {
        Some(place) => place,
        None => {
            ensure!(
                networks.len() < MOST_SIZES,
                "--network: {}: the pictures have more than {MOST_SIZES} sizes, and it takes each as it is; export it with a \
                 size, to which all are brought",
                path.display()
            );
            let bytes = path.metadata().map_or(0, |about| u128::from(about.len()));
            memory::check("the network, once for each size of pictures", bytes * (networks.len() as u128 + 1))?;
            let other = OnnxNetwork::open(path, wanted, Some(size)).context("--network")?;
            if let Some(first) = networks.first() {
                let [a, b] = [first, &other].map(|network| (network.width(), network.size()));
                let shown = |(width, [h, w]): (usize, [usize; 2])| format!("{width} features of {w}x{h}");
                ensure!(a.0 == b.0, "--network: {}: it makes {}, {}", path.display(), shown(a), shown(b));
            }
            networks.push(other);
            networks.len() - 1
        }
    };
    Ok(&networks[place])
}

/// The network whose features are compared, for each size of pictures that it was given, and the progress bar.
struct FeatureExtractor<'a> {
    path: &'a Path,
    wanted: FeatureTensor<'a>,
    networks: Vec<OnnxNetwork>,
    bar: &'a ProgressBar,
}

impl FeatureExtractor<'_> {
    /// Adds the features of pictures: RGB from 0 to 255. Errors name them by `numbers` and `what`.
    fn add(
        &mut self,
        moments: &mut FeatureStatistics,
        pictures: &[Picture],
        numbers: &[usize],
        what: &str,
    ) -> anyhow::Result<()> {
        let Self { path, wanted, networks, bar } = self;
        for picture in pictures {
            of_size(networks, picture, path, *wanted)?;
        }
        let features = |(i, picture): (usize, &Picture)| {
            let network = networks.iter().find(|network| serves(network, picture)).expect("opened above");
            let picture = resize(picture, network.size());
            let values: Vec<f32> = picture.rgb().iter().map(|&x| f32::from(x)).collect();
            let features = network.features(&values, &format!("image {} of {what}", numbers[i]));
            bar.inc(1);
            features
        };
        let all: Vec<_> =
            pictures.par_iter().enumerate().map(features).collect::<Result<_, _>>().context("--network")?;
        all.iter().for_each(|features| moments.add(features));
        Ok(())
    }
}
