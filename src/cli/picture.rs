//! `edm2k bench --picture`: how long somebody waits for a picture, by parts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use edm2k::codec::{self, LATENTS};
use edm2k::model::config::{Preset, preset};
use edm2k::model::file::Stored;
use edm2k::model::{ImageSpace, Model};
use edm2k::pipeline::{Condition, Request};
use edm2k::rng::{Purpose, Stream};
use edm2k::{Device, Pipeline, median};
use serde_json::{Value, json};

use super::bench::BenchArgs;
use super::say::{self, out};

/// Has a process of its own draw, so that its start counts too. Without a model it draws with random weights.
pub fn run(args: &BenchArgs) -> Result<()> {
    if let Some(started) = args.started {
        return draw(args, UNIX_EPOCH + Duration::from_nanos(started));
    }
    let dir = tempfile::tempdir().context("a directory for the model")?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1));
    if args.model.is_none() {
        let Preset { config, size, .. } = preset(&args.preset)?;
        let (path, vae) = (dir.path().join("model.safetensors"), dir.path().join("vae.safetensors"));
        let latents = config.img_channels == LATENTS;
        let mut model = Model::init(&config, 0)?;
        [model.meta.height, model.meta.width] = size;
        model.meta.encoder = if latents { ImageSpace::SdVae } else { ImageSpace::Rgb };
        model.save(&path, Stored::F16)?;
        command.arg("--model").arg(path);
        if latents && args.vae.is_none() {
            codec::write_random(&vae)?;
            command.arg("--vae").arg(vae);
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let status = command.arg("--started").arg(now.as_nanos().to_string()).status()?;
    ensure!(status.success(), "the process that draws failed");
    Ok(())
}

/// Seconds of the parts of something, in order.
type Timings = Vec<(&'static str, f64)>;

fn draw(args: &BenchArgs, started: SystemTime) -> Result<()> {
    let mut last = Instant::now();
    let mut parts: Timings = vec![("start of the process", started.elapsed()?.as_secs_f64())];
    let mut passed = |parts: &mut Timings, what| {
        parts.push((what, last.elapsed().as_secs_f64()));
        last = Instant::now();
    };
    let device = args.device.open()?.fastest();
    passed(&mut parts, "opening the device");
    let mut pipeline = Pipeline::load(&device, args.model.as_ref().context("--started needs --model")?)?;
    passed(&mut parts, "reading the model");
    if let Some(vae) = &args.vae {
        pipeline = pipeline.with_codec(vae)?;
        passed(&mut parts, "reading the autoencoder");
    }
    pipeline.ready()?;
    passed(&mut parts, "putting the model on the device");

    let mut values = vec![0.0; pipeline.net().config.label_dim];
    Stream::new(0, Purpose::Condition, 0).normals(&mut values);
    let conditions = if values.is_empty() { vec![] } else { vec![Condition::new(values, [])] };
    let seeds = (0..=u64::from(args.repeats)).collect();
    let request = Request { conditions, seeds, size: args.size, batch: 1, ..Request::default() };
    let dir = tempfile::tempdir().context("a directory for the pictures")?;
    let mut pictures: Vec<Timings> = Vec::new();
    let mut images = pipeline.images(&request)?;
    let mut before = images.spent();
    while let Some(image) = images.next().transpose()? {
        let spent = images.spent();
        let began = Instant::now();
        if image.picture.is_some() {
            fs::write(dir.path().join(format!("{:06}.png", image.seed)), image.png()?)?;
        }
        let [sampling, decoding] = [spent.sampling - before.sampling, spent.decoding - before.decoding];
        pictures.push(vec![
            ("sampling", sampling.as_secs_f64()),
            ("decoding", decoding.as_secs_f64()),
            ("PNG file", began.elapsed().as_secs_f64()),
        ]);
        before = spent;
    }
    drop(images);
    parts.extend(pictures.remove(0));
    let whole = |parts: &Timings| parts.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let after: Vec<f64> = pictures.iter().map(whole).collect();
    let fastest = after.iter().copied().fold(f64::INFINITY, f64::min);
    let seconds = |i: usize| pictures.iter().map(|picture| picture[i].1).collect::<Vec<_>>();
    let part = |i: usize| (pictures[0][i].0, median(&seconds(i)));
    let of_after: Timings = (0..3).map(part).collect();
    report(
        args,
        &device,
        &pipeline,
        &request,
        [(whole(&parts), whole(&parts), parts), (median(&after), fastest, of_after)],
    );
    Ok(())
}

/// Of the first picture and of those after it: the median, the fastest, and the parts.
fn report(args: &BenchArgs, device: &Device, pipeline: &Pipeline, request: &Request, found: [(f64, f64, Timings); 2]) {
    let [height, width] = pipeline.size(request);
    let model = args.model.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let names = ["first picture, from the start of the process", "each picture after it"];
    if args.json {
        let row = |(what, (median_s, fastest_s, parts)): (&str, (f64, f64, Timings))| {
            let parts: serde_json::Map<_, _> = parts.into_iter().map(|(part, s)| (part.into(), s.into())).collect();
            json!({"what": what, "median_s": median_s, "fastest_s": fastest_s, "parts": parts})
        };
        let rows: Vec<Value> = names.into_iter().zip(found).map(row).collect();
        let report = json!({
            "device": device.to_string(), "height": height, "width": width, "sampler": request.sampler, "rows": rows,
        });
        say::results(&format!("{report:#}"));
        return;
    }
    out!("{model} at {width}x{height} on {device}: pictures of {} steps, one at a time", request.sampler.steps);
    for (what, (median_s, fastest_s, parts)) in names.into_iter().zip(found) {
        let fastest = if fastest_s < median_s { format!(" (fastest {fastest_s:.4})") } else { String::new() };
        out!("{what:<46} {median_s:9.4} s{fastest}");
        for (part, seconds) in parts {
            out!("  {part:<44} {seconds:9.4} s");
        }
    }
}
