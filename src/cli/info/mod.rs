//! `edm2k info`: what a file or a directory of this program is, or this machine.

mod dataset;
mod parts;
pub mod run;

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{anyhow, bail, ensure};
use serde::Serialize;

use edm2k::backend::DeviceError;
#[cfg(feature = "cuda")]
use edm2k::backend::gpu::cuda::{self, CardInfo};
use edm2k::backend::gpu::engine::Gpu;
use edm2k::backend::gpu::launch::Precision;
use edm2k::backend::gpu::runtime::Imagined;
use edm2k::backend::{Backend, BackendError};
use edm2k::codec::CodecFile;
use edm2k::condition::Conditioning;
use edm2k::condition::vae::{self, Vae};
use edm2k::data::dataset::{DatasetError, Header};
use edm2k::formats::{At, ends_in, input, short, weights};
use edm2k::model::config::preset;
use edm2k::model::{Config, Model, ModelMeta, Precond};
use edm2k::params::ParamTable;
use edm2k::train::{checkpoint, stats};

use super::say::out;
use dataset::DatasetInfo;

/// Show what a file or a directory is: a model, a dataset, a run, ...; or this machine.
#[derive(clap::Args)]
#[command(after_help = "\
Without arguments: the devices of this machine.

Examples:
  edm2k info demo/emoji.safetensors
  edm2k info --preset 1girl-xs
  edm2k info --preset edm2-img512-s --size 64x88
  edm2k info runs/mine
  edm2k info --check runs/mine/checkpoint-000204800.safetensors
  edm2k info wd-v1-4-swinv2-tagger-v2.onnx
  edm2k info out/000007.png
  edm2k info path/of/dataset
  edm2k info --check path/of/dataset")]
pub struct InfoArgs {
    /// Model, dataset or shard of one, directory of a run, checkpoint, condition model, autoencoder, ONNX file, or a picture
    /// that `edm2k` made, which says how
    #[arg(value_name = "FILE|DIR", conflicts_with = "preset")]
    path: Option<PathBuf>,
    /// A named configuration instead of a file
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Image or latent that the multiply-adds are counted for [default: what the model was made for]
    #[arg(long, value_name = "WxH", value_parser = super::parse_size)]
    size: Option<[usize; 2]>,
    /// Read all of a dataset, a shard, a checkpoint or a run's checkpoints and compare it with the checksums that it
    /// was written with
    #[arg(long, requires = "path", conflicts_with = "preset")]
    check: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// A network's size and cost.
#[derive(Serialize)]
struct NetworkReport<'a> {
    kind: &'static str,
    config: &'a Config,
    /// Trained values.
    parameters: usize,
    height: usize,
    width: usize,
    /// Multiply-adds of one forward pass of one image at that size.
    multiply_adds: u64,
    on_a_gpu: Result<GpuCost, String>,
    #[serde(flatten)]
    meta: Option<&'a ModelMeta>,
    /// What was assumed where the file leaves it open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    doubts: Vec<String>,
}

/// What a forward pass of one image takes on a GPU, by the plan for an RTX 4090. No GPU is needed to know it.
#[derive(Serialize)]
struct GpuCost {
    launches: usize,
    /// Bytes that all operations together read and write.
    bytes: usize,
    /// The fewest bytes that it could be: every effective weight once, and the image in and out.
    least_bytes: usize,
    /// Device memory.
    memory_bytes: usize,
}

impl GpuCost {
    fn new(net: &Precond, table: &ParamTable, [h, w]: [usize; 2]) -> Result<Self, BackendError> {
        let mut gpu = Gpu::for_sampling(Rc::new(Imagined::rtx_4090()), Precision::F16, table)?;
        let dim = net.config.label_dim;
        let (image, label) = (vec![0.0; h * w * net.config.img_channels], vec![0.0; dim]);
        let mut inputs = vec![gpu.upload([1, h, w, net.config.img_channels], &image), gpu.upload([1; 4], &[1.0])];
        if dim > 0 {
            inputs.push(gpu.upload([1, 1, 1, dim], &label));
        }
        net.planned(&mut gpu, &inputs)?;
        let cost = gpu.costs().next().unwrap_or_default();
        Ok(Self {
            launches: cost.launches,
            bytes: cost.bytes,
            least_bytes: 2 * table.trained_values() + 8 * image.len(),
            memory_bytes: gpu.param_bytes() + cost.workspace,
        })
    }
}

impl<'a> NetworkReport<'a> {
    fn new(config: &'a Config, meta: Option<&'a ModelMeta>, [height, width]: [usize; 2]) -> anyhow::Result<Self> {
        config.check_size(height, width)?;
        let (net, table) = Precond::new(config)?;
        let multiply_adds = net.macs(&table, height, width);
        let parameters = table.trained_values();
        let widest = config.level_channels().into_iter().max().unwrap_or(0).max(config.img_channels);
        let on_a_gpu = match (height * width).checked_mul(widest).filter(|&count| count <= i32::MAX as usize) {
            Some(_) => GpuCost::new(&net, &table, [height, width]).map_err(|why| why.to_string()),
            None => Err(format!("no: an image of {width}x{height} has more elements than the kernels count")),
        };
        Ok(Self { kind: "model", config, parameters, height, width, multiply_adds, on_a_gpu, meta, doubts: Vec::new() })
    }

    fn show(&self, json: bool) -> anyhow::Result<()> {
        if json {
            out!("{}", serde_json::to_value(self)?);
            return Ok(());
        }
        let giga = self.multiply_adds as f64 / 1e9;
        out!("parameters     {} ({:.1} M)", self.parameters, self.parameters as f64 / 1e6);
        out!("image          {} x {} (width x height), {} channels", self.width, self.height, self.config.img_channels);
        let over = if self.multiply_adds == u64::MAX { "more than " } else { "" };
        out!(
            "forward pass   {over}{} G multiply-adds an image (EDM2's \"Gflops\": these, and 1 % elementwise)",
            digits(giga)
        );
        out!("               {over}{} GFLOP, counting multiplication and addition each", digits(2.0 * giga));
        let mega = |bytes: usize| bytes as f64 / 1e6;
        match &self.on_a_gpu {
            Ok(GpuCost { launches, bytes, least_bytes, memory_bytes }) => out!(
                "on a GPU       {launches} launches, {:.0} MB read and written (at least {:.0} MB), {:.0} MB of memory",
                mega(*bytes),
                mega(*least_bytes),
                mega(*memory_bytes)
            ),
            Err(why) => out!("on a GPU       {why}"),
        }
        match self.config.label_dim {
            0 => out!("condition      none"),
            width => out!("condition      {width} values"),
        }
        if let Some(meta) = self.meta {
            out!("images are     {}", serde_json::json!(meta.encoder).as_str().unwrap_or_default());
            if let Some(autoencoder) = &meta.autoencoder {
                out!("latents are of {autoencoder}");
            }
            if self.config.label_dim > 0 {
                let tags = !meta.vocabulary.is_empty();
                out!("conditions are {}", made_of(&meta.conditioning, tags, self.config.label_dim));
            }
            if meta.images_seen > 0 {
                out!("trained on     {} images", meta.images_seen);
            }
            if let Some(share) = meta.cond_dropout.filter(|_| self.config.label_dim > 0) {
                out!("guidance       {} % of the last images had no condition (--cond-dropout)", short(100.0 * share));
            }
            if let Some(data) = meta.data {
                out!("data           {data} (fingerprint of the training split)");
            }
            if let Some(std) = meta.ema_std {
                out!("weights        moving average of relative width {std}");
            }
            if !meta.vocabulary.is_empty() {
                out!("vocabulary     {} tags: {}", meta.vocabulary.len(), head(&meta.vocabulary));
            }
            for (name, text) in [("source", &meta.source), ("licence", &meta.licence)] {
                if !text.is_empty() {
                    out!("{name:15}{text}");
                }
            }
        }
        self.doubts.iter().for_each(|doubt| out!("note           {doubt}"));
        show_config(self.config);
        Ok(())
    }
}

/// What conditions of this width are made of, in words: classes, if they are neither features nor has anything `tags`.
fn made_of(conditioning: &Conditioning, tags: bool, width: usize) -> String {
    match conditioning {
        Conditioning::Tags if !tags && width == 0 => "none".into(),
        Conditioning::Tags if !tags => format!("classes ({width})"),
        _ => conditioning.to_string(),
    }
}

fn show_config(config: &Config) {
    out!("config");
    if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(config) {
        fields.iter().for_each(|(name, value)| out!("  {name:20} {value}"));
    }
}

/// Three significant digits at least.
fn digits(x: f64) -> String {
    format!(
        "{x:.*}",
        if x >= 100.0 {
            0
        } else if x >= 10.0 {
            1
        } else {
            3
        }
    )
}

/// The first few tags.
fn head(tags: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<&str> = tags.iter().take(SHOWN).map(AsRef::as_ref).collect();
    shown.join(", ") + if tags.len() > SHOWN { ", ..." } else { "" }
}

/// The GPUs in words, or why there are none.
#[cfg(feature = "cuda")]
fn gpus() -> Result<Vec<String>, DeviceError> {
    let in_words = |card: &CardInfo| {
        let ((major, minor), gib) = (card.capability, card.memory as f64 / f64::from(1 << 30));
        format!("{}, sm_{major}{minor}, {} multiprocessors, {gib:.1} GiB", card.name, card.sms)
    };
    Ok(cuda::devices()?.iter().map(in_words).collect())
}

/// A build without CUDA names none.
#[cfg(not(feature = "cuda"))]
fn gpus() -> Result<Vec<String>, DeviceError> {
    Err(DeviceError::NotBuilt("this edm2k was built without CUDA (cargo feature `cuda`)".into()))
}

/// Prints to stdout.
pub fn run(args: InfoArgs) -> anyhow::Result<()> {
    if let Some(name) = &args.preset {
        let preset = preset(name)?;
        let network = NetworkReport::new(&preset.config, None, args.size.unwrap_or(preset.size))?;
        return network.show(args.json);
    }
    let only_of_models = || match args.size {
        Some(_) => bail!("--size goes with a model or a --preset"),
        None => Ok(()),
    };
    let Some(path) = &args.path else {
        only_of_models()?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let gpus = gpus();
        if args.json {
            let gpus = gpus.unwrap_or_default();
            out!("{}", serde_json::json!({ "kind": "devices", "cpu": { "threads": threads }, "cuda": gpus }));
            return Ok(());
        }
        out!("cpu            {threads} threads");
        match gpus {
            Ok(gpus) => gpus.iter().enumerate().for_each(|(i, name)| out!("{:15}{name}", format!("cuda:{i}"))),
            Err(why) => out!("cuda           {why}"),
        }
        return Ok(());
    };
    // An error in opening names the file itself.
    let ends = |ending: &str| ends_in(path, ending);
    let unchecked = |what: &str| {
        only_of_models()?;
        ensure!(!args.check, "{}: {what}, which has no checksums", path.display());
        Ok(())
    };
    if path.is_dir() || ends("zip") {
        only_of_models()?;
    }
    if path.is_dir() && run::is_one(path)? {
        return run::show(path, args.check, args.json);
    }
    if path.is_dir() || ends("zip") {
        let opened = DatasetInfo::open(path, args.check).map_err(|why| match why.downcast_ref() {
            Some(DatasetError::NoDataset { .. }) => anyhow!("{why}; expected one, a run's directory, or a file"),
            _ => why,
        });
        return opened?.show(args.json);
    }
    let head = input::head(&input::open(path).at(path)?).at(path)?;
    if ends("onnx") || input::kind(&head).is_some_and(|kind| kind.contains("ONNX")) {
        unchecked("an ONNX file")?;
        return parts::onnx(path, args.json);
    }
    if head.starts_with(b"\x89PNG") {
        unchecked("a picture")?;
        return parts::picture(path, args.json);
    }
    ensure!(
        !ends("jsonl") || stats::latest(path).at(path)?.0.is_empty(),
        "{}: the statistics of a run; give the run's directory",
        path.display()
    );
    let file = weights::open(path)?;
    if let Some(header) = Header::of(&file)? {
        only_of_models()?;
        return DatasetInfo::of_shard(&file, header, args.check)?.show(args.json);
    }
    if checkpoint::is_one(&file) {
        only_of_models()?;
        return run::show_checkpoint(path, args.check, args.json);
    }
    if vae::is_one(&file) {
        unchecked("a condition model")?;
        return parts::condition_model(path, &Vae::load(path)?, args.json);
    }
    if CodecFile::is_one(&file) {
        unchecked("an autoencoder")?;
        return parts::autoencoder(path, args.json);
    }
    ensure!(!args.check, "{}: neither a dataset nor a checkpoint, which has no checksums", path.display());
    drop(file);
    let model = Model::load(path)?;
    let size = args.size.unwrap_or([model.meta.height, model.meta.width]);
    let mut network = NetworkReport::new(&model.net.config, Some(&model.meta), size)?;
    let name = format!("{}: ", path.display());
    network.doubts = model.doubts.iter().map(|doubt| doubt.replacen(&name, "", 1)).collect();
    network.show(args.json)
}
