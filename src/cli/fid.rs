//! `edm2k fid`: the Fréchet distance of what a model makes, or has made, from a dataset.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::json;

use edm2k::Device;
use edm2k::data::dataset::{Dataset, Representation, Split};
use edm2k::frechet::{Moments, distance};
use edm2k::onnx::{Network, Wanted};
use edm2k::pictures::bicubic::resize;
use edm2k::pictures::{Picture, decode};
use edm2k::pipeline::{Condition, Domain, OutDir, Pipeline, Request, Viewer};
use edm2k::rng::{Purpose, Stream};

use super::DeviceArgs;
use super::sample::SamplerArgs;
use super::say::{self, note, out};

/// Pictures that are looked at together.
const CHUNK: usize = 64;

/// Measure how far the images of a model are from a dataset's: their Frechet distance (FID).
#[derive(clap::Args)]
#[command(after_help = "\
It is the Frechet distance between the features of images that the model makes and of the dataset's, each set taken
for a normal distribution: FID if NETWORK is Inception, FD-DINOv2 if it is DINOv2. NETWORK is given one image at a
time, f32 [1, 3, H, W] or [1, H, W, 3], RGB from 0 to 255; what else it wants (the range -1 to 1 of Inception,
ImageNet's mean and deviation of DINOv2) must be part of it: put it in front when exporting. Images are resized to its
height and width (bicubic); a network that leaves these open gets them as they are. Its only output is [1, D]. Image
number i has seed i and the condition of the split's image i modulo their number. Latents of the dataset are shown as
--vae decodes them. Numbers of other tools need their export, their sampler, and as many images: 50000 against the
whole training split.

Examples:
  edm2k fid --network inception.onnx --model emoji.safetensors --data demo/cache/emoji-32 --split train \\
      --count 5000 --guidance 1
  edm2k fid --network inception.onnx --generated out --data demo/cache/emoji-32 --split train")]
pub struct FidArgs {
    /// ONNX file of the network whose features are compared; see below for what it is given
    #[arg(long, value_name = "FILE")]
    network: PathBuf,
    /// Tensor of the features in it [default: its only output]
    #[arg(long, value_name = "NAME")]
    network_node: Option<String>,
    /// Model file
    #[arg(long, value_name = "FILE", required_unless_present = "generated")]
    model: Option<PathBuf>,
    /// Take the PNGs of this directory (but grid*.png and *-steps.png) instead of making images
    #[arg(long, value_name = "DIR", conflicts_with = "model")]
    generated: Option<PathBuf>,
    /// Dataset made by `edm2k prepare`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which of its images
    #[arg(long, value_enum, default_value_t = Split::Validation)]
    split: Split,
    /// Most of its images to look at: the first ones [default: all]
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

/// Where the images are from that are compared with the dataset's.
enum Source {
    /// Files.
    Files(Vec<PathBuf>),
    /// A model.
    Model(Box<Pipeline>),
}

/// Prints the distance to stdout, showing progress on stderr.
pub fn run(args: FidArgs) -> anyhow::Result<()> {
    let sampler = args.sampler.config()?;
    let data = Dataset::open(&args.data, args.split).context("--data")?;
    let references = data.len().min(args.images.map_or(usize::MAX, |images| images as usize));
    ensure!(references > 1, "{}: {references} image, expected 2 at least", args.data.display());
    let batch = usize::from(args.batch);
    let size = |i: usize| [data.shape_of(i)[0], data.shape_of(i)[1]];
    // Each is of the size of the image that has its condition; those of a request are of one size.
    let request = |pipeline: &Pipeline, numbers: &[usize]| Request {
        conditions: match pipeline.net().config.label_dim {
            0 => Vec::new(),
            _ => numbers
                .iter()
                .map(|number| Condition::of_image(&data, number % references, &args.data, args.split))
                .collect(),
        },
        seeds: numbers.iter().map(|&number| number as u64).collect(),
        size: Some(size(numbers[0] % references)),
        sampler: sampler.clone(),
        batch,
        ..Request::default()
    };
    let device = args.device.open()?;
    let (source, count) = match (&args.generated, &args.model) {
        (Some(dir), _) => {
            let files = OutDir::pictures(dir).context("--generated")?;
            let count = files.len();
            ensure!(count > 1, "--generated: {}: {count} PNG files, expected 2 at least", dir.display());
            (Source::Files(files), count)
        }
        (None, Some(model)) => {
            let pipeline = Pipeline::load(&device, model).context("--model")?;
            let dir = args.data.display();
            Domain::of_dataset(&data).check(&dir, &pipeline.domain(), model.display())?;
            let count = args.count as usize;
            for [height, width] in data.sizes() {
                let size = Some([height, width]);
                let request = Request { size, ..request(&pipeline, &(0..count.min(batch)).collect::<Vec<_>>()) };
                pipeline.check(&request).with_context(|| dir.to_string())?;
            }
            (Source::Model(pipeline.into()), count)
        }
        (None, None) => bail!("--model is missing"),
    };
    let mut viewer = viewer(&args, &data, &device)?;

    let reference = |i: usize, viewer: &mut Viewer| {
        let mut image = vec![0.0; data.shape_of(i).iter().product()];
        data.image(i, Stream::new(0, Purpose::Latent, i as u64), &mut image)?;
        Ok::<_, anyhow::Error>(viewer.picture(size(i), &image)?)
    };
    let first = reference(0, &mut viewer)?;
    let wanted = args.network_node.as_deref().map_or(Wanted::Output, Wanted::Named);
    let network = Network::open(&args.network, wanted, Some([first.height(), first.width()])).context("--network")?;
    let features = network.width();
    if references.min(count) <= features {
        note!(
            "warning: {count} images against {references} have singular covariances of {features} features; the \
             distance depends much on their number (more than {features} of each are needed, and 50000 are usual)"
        );
    }

    let all = (references + count) as u64;
    let bar = say::bar(all, "{msg} {human_pos} of {human_len} images, {per_sec}, {eta} left");
    let look = Look { network: &network, bar: &bar };
    let started = Instant::now();
    bar.set_message("dataset:");
    let (mut dataset, mut made) = (Moments::new(features), Moments::new(features));
    for first in (0..references).step_by(CHUNK) {
        let chunk: Vec<usize> = (first..references.min(first + CHUNK)).collect();
        let pictures = chunk.iter().map(|&i| reference(i, &mut viewer)).collect::<Result<Vec<_>, _>>()?;
        look.at(&mut dataset, &pictures, &chunk, "the dataset")?;
    }
    match source {
        Source::Files(files) => {
            bar.set_message("generated:");
            for (number, chunk) in files.chunks(CHUNK).enumerate() {
                let pictures: Vec<Picture> = chunk.par_iter().map(|file| open(file)).collect::<anyhow::Result<_>>()?;
                let numbers: Vec<usize> = (number * CHUNK..).take(chunk.len()).collect();
                look.at(&mut made, &pictures, &numbers, "those generated")?;
            }
        }
        Source::Model(mut pipeline) => {
            bar.set_message("sampling:");
            let mut by_size: BTreeMap<[usize; 2], Vec<usize>> = BTreeMap::new();
            (0..count).for_each(|number| by_size.entry(size(number % references)).or_default().push(number));
            for (size, numbers) in by_size.iter().flat_map(|(size, all)| all.chunks(batch).map(move |all| (*size, all)))
            {
                let images = pipeline.generate(&request(&pipeline, numbers))?;
                let pictures = images.iter().map(|image| viewer.picture(size, &image.values));
                let pictures: Vec<Picture> = pictures.collect::<Result<_, _>>()?;
                look.at(&mut made, &pictures, numbers, "those made")?;
            }
        }
    }
    bar.finish_and_clear();
    let rate = (references + count) as f64 / started.elapsed().as_secs_f64();
    let distance = distance(made, dataset);
    ensure!(distance.is_finite(), "{}: the features are too large to compare", network.path().display());

    let source = args.generated.as_ref().or(args.model.as_ref()).map(|path| path.display().to_string());
    let split = args.split.to_string();
    if args.json {
        let mut all = json!({
            "frechet_distance": distance, "images": count, "references": references,
            "network": network.path().display().to_string(), "node": network.node(), "features": features,
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
        out!("{features} features, {} of {}; {rate:.1} images/s", network.node(), network.path().display());
    }
    Ok(())
}

/// How what the dataset has, and the model makes, becomes a picture.
fn viewer(args: &FidArgs, data: &Dataset, device: &Device) -> anyhow::Result<Viewer> {
    let channels = data.header().channels;
    let dir = args.data.display();
    match (data.header().kind, &args.vae) {
        (Representation::Images, None) if channels == 3 => Ok(Viewer::Pixels),
        (Representation::Images, None) => bail!("{dir}: images of {channels} channels, expected 3"),
        (Representation::Images, Some(_)) => bail!("--vae: {dir} has no latents, but pixels"),
        (Representation::Latents, Some(vae)) => {
            let made_by = data.header().autoencoder.as_ref();
            let (viewer, warning) = Viewer::open(device, vae, &dir.to_string(), made_by).context("--vae")?;
            warning.iter().for_each(|warning| note!("warning: --vae {warning}"));
            let sizes = data.sizes();
            sizes.into_iter().try_for_each(|size| viewer.check(size)).context("--vae")?;
            Ok(viewer)
        }
        (Representation::Latents, None) => bail!("{dir}: latents; --vae FILE makes pictures of them"),
    }
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
    /// Adds the features of pictures: RGB from 0 to 255. Their numbers and `what` say which these are, in errors.
    fn at(&self, moments: &mut Moments, pictures: &[Picture], numbers: &[usize], what: &str) -> anyhow::Result<()> {
        let features = |(i, picture): (usize, &Picture)| {
            let picture = resize(picture, self.network.size());
            let values: Vec<f32> = picture.rgb().iter().map(|&x| f32::from(x)).collect();
            let features = self.network.features(&values, &format!("image {} of {what}", numbers[i]));
            self.bar.inc(1);
            features
        };
        let all: Vec<_> =
            pictures.par_iter().enumerate().map(features).collect::<Result<_, _>>().context("--network")?;
        all.iter().for_each(|features| moments.add(features));
        Ok(())
    }
}
