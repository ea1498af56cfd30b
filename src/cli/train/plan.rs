//! What a run will need of a GPU, by the plan that it would get, and what `--dry-run` prints.

use std::rc::Rc;

use serde::Serialize;
use serde_json::json;

use edm2k::Device;
use edm2k::backend::BackendError;
use edm2k::backend::gpu::engine::Gpu;
use edm2k::backend::gpu::launch::{Card, ConvLoop, Math};
use edm2k::backend::gpu::runtime::Imagined;
use edm2k::model::Model;
use edm2k::train::{self, Execution, Settings, checkpoint, memory};

/// What fits into a GPU.
pub struct Fit {
    /// Images at a time.
    pub images: u64,
    /// Bytes that they take, with the parameters.
    pub takes: u64,
    /// Bytes that are free.
    pub free: u64,
}

/// How many images at a time fit into the GPU's free memory: `most`, a half, a quarter, ...; none if there is no GPU.
pub fn fitting(device: &Device, most: u64, needed: impl Fn(u64) -> Option<u64>) -> Option<Fit> {
    let free = device.runtime()?.free()?;
    let halves = std::iter::successors(Some(most), |&n| (n > 1).then(|| n.div_ceil(2)));
    let mut tried = halves.map_while(|n| Some((n, needed(n)?)));
    // A twentieth is left for what the driver and fragmentation take.
    let (images, takes) = tried.find(|&(n, needed)| n == 1 || needed <= free / 20 * 19)?;
    Some(Fit { images, takes, free })
}

/// The resolved configuration as JSON.
pub fn describe(
    settings: &Settings,
    execution: &Execution,
    model: &Model,
    device: &Device,
    math: Math,
) -> anyhow::Result<String> {
    let [height, width] = settings.data.largest();
    let averages = settings.ema.len();
    let memory = memory::estimate(&settings.config, &model.table, height, width, execution.batch_gpu, averages);
    let gpu = match plan_on_gpu(settings, execution.batch_gpu, model, device, math) {
        Ok(plan) => json!(plan),
        Err(why) => json!(why.to_string()),
    };
    let goes_on = execution.outdir.is_dir() && !execution.restart;
    let newest = if goes_on { checkpoint::list(&execution.outdir)?.into_iter().next() } else { None };
    Ok(serde_json::to_string_pretty(&json!({
        "settings": settings,
        "execution": execution,
        "parameters": model.table.trained_values(),
        "multiply_adds_per_forward": model.net.macs(&model.table, height, width),
        "memory_bytes": memory,
        "on_a_gpu": gpu,
        "resumes_from": newest.map(|path| path.display().to_string()),
    }))?)
}

/// Memory, launches and traffic of a micro-batch on a GPU.
#[derive(Serialize)]
pub struct GpuPlan {
    parameters_bytes: usize,
    activations_bytes: usize,
    pub total_bytes: usize,
    launches: usize,
    bytes_moved: usize,
}

/// A micro-batch's plan on a GPU: that which the device would get if it is one; else an H100 if its loop of convolutions is
/// asked for; else a GeForce RTX 4090. No GPU is needed for it. If images have several sizes, the plan is that of the size
/// which needs the most memory.
pub fn plan_on_gpu(
    settings: &Settings,
    batch_gpu: u64,
    model: &Model,
    device: &Device,
    math: Math,
) -> Result<GpuPlan, BackendError> {
    let card = match (device.runtime(), math.conv_loop) {
        (Some(runtime), _) => Imagined::new(runtime.card()),
        (None, Some(ConvLoop::Wgmma)) => Imagined::new(Card::new(132, 90)),
        (None, _) => Imagined::rtx_4090(),
    };
    let mut gpu = Gpu::for_training(Rc::new(card), math, &model.table, settings.ema.len())?;
    for [height, width] in settings.data.all_sizes() {
        train::rehearse(&mut gpu, &model.net, settings.dropout, [batch_gpu as usize, height, width])?;
    }
    let cost = gpu.costs().max_by_key(|cost| cost.workspace).unwrap_or_default();
    let parameters_bytes = gpu.param_bytes();
    Ok(GpuPlan {
        parameters_bytes,
        activations_bytes: cost.workspace,
        total_bytes: parameters_bytes + cost.workspace,
        launches: cost.launches,
        bytes_moved: cost.bytes,
    })
}
