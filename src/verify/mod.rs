//! Replays numbers of the official implementation on a device and measures how far off it is.
//!
//! A directory holds safetensors and JSON files in the layout that `tests/golden/README.md` describes: inputs,
//! parameters and results of single operations, blocks, whole networks, training steps, samplers and schedules. Each
//! result becomes one [`Check`]: the relative error |got - expected| / |expected| (L2 norm over the tensor) against a
//! bound. Network, sizes and settings come from the files. What a directory lacks is reported as skipped, by its name.
//!
//! # Bounds
//! `tolerances.json` says how far the official float32 run is from the same computation in float64. A bound is
//! [`FACTOR`] times that, since a device rounds as much as the reference does, and sums in another order. A tensor of
//! few values shows one draw of that rounding and not its size. So for fewer than [`FEW`] values the worst tensor of
//! the same quantity counts. Operations that were computed in float64 have no such entry. Their bound is the floor of
//! [`Bounds`], times sqrt(n) for an autoencoder of n convolutions. No bound exceeds the contract of its quantity, with
//! one exception: a tensor of few values of which the reference itself loses more, as in a sum with cancellation.
//!
//! For a device of 16 bits an entry may also have `f16` and `bf16`: how far the official code's own run at that
//! precision is from its float32, the root mean square of several draws of the rounding (`scripts/golden.py` writes
//! them). Then the bound is [`OFFICIAL`] times that, or [`OFFICIAL_FEW`] times for a tensor of few values. So it
//! follows what this very tensor loses; a sum with cancellation loses more than others. Its floor is that of an
//! operation, since the official code computes the embedding and the log-variance in float32 and a device need not.
//! Where there is no such entry, the bounds of the precision hold.

mod codec;
mod network;
mod ops;
mod sampling;
mod tables;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::backend::DeviceError;
use crate::backend::gpu::launch::Precision;
use crate::backend::{
    BackendError, NetworkBackend, Normalization, OptimizerStep, Shape, Slot, StepStats, TrainingBackend,
};
use crate::codec::CodecError;
use crate::device::{Backends, Device, Work};
use crate::formats::safetensors::{SafeError, SafeFile};
use crate::formats::{input, json, names, transposed};
use crate::model::{Config, ConfigError};
use crate::params::{ParamId, ParamTable};
use crate::sample::SampleError;

/// How much more than the reference's own float32 rounding is allowed.
pub const FACTOR: f64 = 10.0;

/// A tensor of fewer values says too little about the size of its rounding error.
pub const FEW: usize = 64;

/// How much more than the official 16-bit run may be lost. Both round the results of the same operations, but not at
/// the same places. The L2 norm of many roundings hardly varies from draw to draw. On the emulator the two differ by
/// 0.5 to 1.7.
pub const OFFICIAL: f64 = 3.0;

/// As [`OFFICIAL`], for fewer than [`FEW`] values. There one error is compared with the root mean square of a few
/// draws. Student's t for 16 draws exceeds this in 2 of 100,000 cases, and a directory has hundreds of such tensors.
pub const OFFICIAL_FEW: f64 = 6.0;

/// The file of single operations.
const OPERATIONS: &str = "ops.safetensors";

/// Smallest and largest bound for one quantity: what rounding alone may cause, and the contract.
#[derive(Clone, Copy, Debug)]
pub struct BoundRange {
    /// Bound where the reference is exact (computed in float64).
    pub floor: f64,
    /// Bound that nothing exceeds.
    pub contract: f64,
}

/// What a device's arithmetic allows.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Precision of the official runs that the device is compared with; none if the device computes in float32.
    pub precision: Option<Precision>,
    /// Results of single operations.
    pub operation: BoundRange,
    /// Gradients of single operations.
    pub operation_gradient: BoundRange,
    /// Results of blocks and networks.
    pub forward: BoundRange,
    /// Gradients of blocks and networks.
    pub gradient: BoundRange,
    /// Losses, weights, moments and averages of training steps.
    pub training: BoundRange,
    /// Sampler trajectories, given the denoiser.
    pub sampler: BoundRange,
}

impl Bounds {
    /// Devices that compute in float32. The rounding of a sum of k products grows as sqrt(k) eps / 2, and
    /// k reaches 2304 here: 24 eps, of which blocked summation leaves less than 16. A gradient passes about four
    /// such sums.
    pub const F32: Self = {
        let eps = f32::EPSILON as f64;
        Self {
            precision: None,
            operation: BoundRange { floor: 16.0 * eps, contract: 1e-5 },
            operation_gradient: BoundRange { floor: 64.0 * eps, contract: 1e-4 },
            forward: BoundRange { floor: 16.0 * eps, contract: 1e-5 },
            gradient: BoundRange { floor: 64.0 * eps, contract: 1e-4 },
            training: BoundRange { floor: 16.0 * eps, contract: 1e-4 },
            sampler: BoundRange { floor: 16.0 * eps, contract: 1e-5 },
        }
    };

    /// Devices that round activations and effective weights to 16 bits and sum in f32. f16 has 11 significant bits. The
    /// rounding of inputs, weights and result, each 2^-11 / sqrt(3) on average, makes 2e-3 at most for an operation.
    /// The errors of a network's operations add up as independent ones do. bf16 has 8 bits. A sampler's images must be
    /// as close as a peak signal to noise ratio of 40 dB asks.
    pub fn of(precision: Precision) -> Self {
        let scale = match precision {
            Precision::F16 => 1.0,
            Precision::Bf16 => 8.0,
        };
        let limits = |bound: f64| BoundRange { floor: bound * scale, contract: bound * scale };
        Self {
            precision: Some(precision),
            operation: limits(2e-3),
            operation_gradient: limits(2e-3),
            forward: limits(5e-3),
            gradient: limits(2e-2),
            training: limits(2e-2),
            sampler: limits(1e-2),
        }
    }
}

/// The element of a tensor that is furthest off.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Worst {
    /// Its index, in PyTorch's order.
    pub index: Vec<usize>,
    /// What the device gave.
    pub got: f64,
    /// What the directory says.
    pub expected: f64,
}

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// File (without ending) and tensor.
    pub name: String,
    /// |got - expected| / |expected|; absolute where everything expected is 0; infinite where something is not
    /// a number.
    pub error: f64,
    /// Largest error that is ok.
    pub bound: f64,
    /// Whether the error is within it.
    pub ok: bool,
    /// Where it is worst.
    pub worst: Option<Worst>,
}

/// What became of one thing that a directory may hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Finding {
    /// It was compared.
    Check(Check),
    /// It was not compared.
    #[allow(missing_docs)] // file, case or tensor, and why
    Skip { name: String, why: String },
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let check = match self {
            Self::Check(check) => check,
            Self::Skip { name, why } => return write!(out, "skip {name}: {why}"),
        };
        let verdict = if check.ok { "ok  " } else { "FAIL" };
        write!(out, "{verdict} {:<64} error {:<8.1e} bound {:<8.1e}", check.name, check.error, check.bound)?;
        match &check.worst {
            Some(worst) => {
                write!(out, " worst {:?} {:e}, expected {:e}", worst.index, worst.got as f32, worst.expected as f32)
            }
            None => Ok(()),
        }
    }
}

/// Totals of a replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Checks within their bounds.
    pub ok: usize,
    /// Checks beyond them.
    pub failed: usize,
    /// Things skipped.
    pub skipped: usize,
}

/// Why a directory could not be replayed at all.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum VerifyError {
    /// It cannot be listed, or holds nothing that is known.
    #[error("{}: {what}", path.display())]
    Directory { path: PathBuf, what: String },
    #[error("{0}")]
    File(#[from] SafeError),
    /// A JSON file or an entry of a file's metadata.
    #[error("{}: {what}", path.display())]
    Json { path: PathBuf, what: String },
    /// A config that describes no network.
    #[error("{}: {cause}", path.display())]
    Config { path: PathBuf, cause: ConfigError },
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("{0}")]
    Backend(#[from] BackendError),
    #[error("{0}")]
    Device(#[from] DeviceError),
    #[error("{0}")]
    Sample(#[from] SampleError),
}

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// Replays a directory on a device, within `bounds`. `report` is called with each finding as it comes.
///
/// # Errors
/// See [`VerifyError`]. A failed check is no error: it is counted in the totals.
pub fn verify(dir: &Path, device: &Device, bounds: Bounds, report: &mut dyn FnMut(&Finding)) -> Result<Totals> {
    device.run(Replay { dir, bounds, report })
}

/// A directory to replay.
struct Replay<'a> {
    dir: &'a Path,
    bounds: Bounds,
    report: &'a mut dyn FnMut(&Finding),
}

impl Work for Replay<'_> {
    type Output = Result<Totals>;

    fn run<M: Backends>(self, backends: &M) -> Result<Totals> {
        replay(self, backends)
    }
}

fn replay<M: Backends>(Replay { dir, bounds, report }: Replay, backends: &M) -> Result<Totals> {
    let names = names(dir).map_err(|e| VerifyError::Directory { path: dir.into(), what: e.to_string() })?;
    let names: Vec<String> = names.into_iter().collect();
    let (summary, tolerances) = (Totals::default(), Value::Null);
    let mut s = Session { dir, names: names.clone(), backends, bounds, report, summary, tolerances };
    if names.iter().any(|name| name == "tolerances.json") {
        s.tolerances = s.json("tolerances.json")?;
    } else {
        s.skip("tolerances.json", "absent: the bounds are the floors of the device's precision");
    }

    type Step<'a, M> = fn(&mut Session<'a, M>) -> Result<()>;
    let replays: [(&[&str], Step<M>); 12] = [
        (&[OPERATIONS], ops::operations),
        (&["ops_blocks.safetensors"], ops::blocks),
        (&["tiny_model.safetensors", "tiny_forward.safetensors"], network::forward),
        (&["tiny_model.safetensors", "tiny_grads.safetensors"], network::gradients),
        (&["tiny_train.json", "tiny_train_init.safetensors"], network::training),
        (&["tiny_train.json", "tiny_train_init.safetensors", "tiny_train_accum.safetensors"], network::accumulation),
        (&["tiny_model.safetensors", "samplers.safetensors"], sampling::samplers),
        (&["precond.json"], tables::precond),
        (&["lr_schedule.json"], tables::learning_rates),
        (&["vae_model.safetensors", "vae.safetensors"], codec::sd_vae),
        (&["taesd_model.safetensors", "taesd.safetensors"], codec::taesd),
        (&["phema.json"], tables::moving_averages),
    ];
    let mut known = 0;
    for (needs, replay) in replays {
        match needs.iter().find(|need| !names.iter().any(|name| name == *need)) {
            Some(absent) => s.skip(needs[needs.len() - 1], format!("{absent} is absent")),
            None => {
                known += 1;
                replay(&mut s)?;
            }
        }
    }
    if known == 0 {
        let what = "no golden data in it (expected ops.safetensors, tiny_model.safetensors, ...)".into();
        return Err(VerifyError::Directory { path: dir.into(), what });
    }
    for name in names {
        let used = replays.iter().any(|(needs, _)| needs.contains(&name.as_str()));
        let about = ["README.md", "configs.json", "tolerances.json", "phema.safetensors"];
        let numbered = name.starts_with("tiny_train_step") || name.starts_with("tiny_train_accum");
        // The tests of `import` read these; there is nothing to compute.
        let snapshot = name.starts_with("official_style_snapshot");
        if !used && !numbered && !snapshot && !about.contains(&name.as_str()) {
            s.skip(&name, "nothing of this program computes it yet");
        }
    }
    Ok(s.summary)
}

/// A replay under way.
struct Session<'a, M> {
    dir: &'a Path,
    /// What the directory holds, sorted.
    names: Vec<String>,
    backends: &'a M,
    bounds: Bounds,
    report: &'a mut dyn FnMut(&Finding),
    summary: Totals,
    tolerances: Value,
}

/// Which contract a quantity falls under.
#[derive(Clone, Copy)]
enum Quantity {
    Forward,
    Gradient,
    Training,
    Sampler,
}

impl<M: Backends> Session<'_, M> {
    fn skip(&mut self, name: impl Into<String>, why: impl Into<String>) {
        self.summary.skipped += 1;
        (self.report)(&Finding::Skip { name: name.into(), why: why.into() });
    }

    /// Runs one case. It is skipped if it needs a tensor that the file lacks, or a network that the device does not
    /// take.
    fn case(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match run(self) {
            Err(VerifyError::File(SafeError::Missing { name: tensor, .. })) => {
                self.skip(name, format!("tensor {tensor} is absent"));
                Ok(())
            }
            Err(
                VerifyError::Backend(BackendError::Device(DeviceError::Unavailable(why) | DeviceError::NoLoop(why)))
                | VerifyError::Device(DeviceError::Unavailable(why) | DeviceError::NoLoop(why)),
            ) => {
                self.skip(name, why);
                Ok(())
            }
            other => other,
        }
    }

    /// Skips the tensors of a file that nothing has asked for.
    fn skip_rest(&mut self, f: &Golden, why: &str) {
        f.unseen().into_iter().for_each(|name| self.skip(format!("{}/{name}", f.stem), why));
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.dir.join(name);
        let wrong = |what: String| VerifyError::Json { path: path.clone(), what };
        let text = input::text(&path).map_err(|e| wrong(e.to_string()))?;
        json::read(&text).map_err(|e| wrong(e.to_string()))
    }

    fn open(&self, name: &str) -> Result<Golden> {
        let file = SafeFile::open(self.dir.join(name))?;
        let stem = name.trim_end_matches(".safetensors").to_owned();
        Ok(Golden { file, name: name.into(), stem, seen: RefCell::default() })
    }

    /// The network that a file is about, by its metadata or else by the entry `key` of `configs.json`.
    fn config(&self, f: &Golden, key: &str) -> Result<Config> {
        if let Some(config) = f.metadata("config")? {
            return Ok(config);
        }
        let all: Value = match self.names.iter().any(|name| name == "configs.json") {
            true => self.json("configs.json")?,
            false => Value::Null,
        };
        let config = all.get(key).cloned().ok_or_else(|| f.wrong("config", "it is missing".into()))?;
        serde_json::from_value(config)
            .map_err(|e| VerifyError::Json { path: self.dir.join("configs.json"), what: format!("\"{key}\": {e}") })
    }

    /// Bound of a tensor of `numel` values, see the module's text.
    fn bound(&self, what: Quantity, file: &str, tensor: &str, numel: usize) -> f64 {
        let p = &self.bounds;
        let limits = match what {
            Quantity::Forward if file == OPERATIONS => p.operation,
            Quantity::Gradient if file == OPERATIONS => p.operation_gradient,
            Quantity::Forward => p.forward,
            Quantity::Gradient => p.gradient,
            Quantity::Training => p.training,
            Quantity::Sampler => p.sampler,
        };
        if let Some(lost) = self.official(file, tensor) {
            return (lost * if numel < FEW { OFFICIAL_FEW } else { OFFICIAL }).max(p.operation.floor);
        }
        let rounding = |v: &Value| v["rel_l2"].as_f64().filter(|x| x.is_finite() && *x >= 0.0);
        let entries = self.tolerances.get(file).and_then(Value::as_object);
        let own = entries.and_then(|e| e.get(tensor)).and_then(rounding);
        let kin = |name: &str| name.split('.').next() == tensor.split('.').next();
        let few = (numel < FEW && own.is_some()).then(|| {
            let all = entries.into_iter().flatten().filter(|(name, _)| kin(name));
            all.filter_map(|(_, v)| rounding(v)).fold(0.0, f64::max)
        });
        let bound = (FACTOR * own.unwrap_or(0.0).max(few.unwrap_or(0.0))).max(limits.floor).min(limits.contract);
        if numel < FEW { bound.max(FACTOR * own.unwrap_or(0.0)) } else { bound }
    }

    /// What the official code loses of a tensor at the device's precision, if the directory says so.
    fn official(&self, file: &str, tensor: &str) -> Option<f64> {
        let precision = self.bounds.precision?;
        let entry = self.tolerances.get(file)?.get(tensor)?;
        entry.get(precision.name())?.as_f64().filter(|lost| lost.is_finite() && *lost >= 0.0)
    }

    /// Bound of Fourier features: rounding the argument of a cosine moves it by eps times the argument.
    fn fourier_bound(&self, argument: f64) -> f64 {
        let limits = self.bounds.forward;
        (argument * limits.floor / 8.0).max(limits.floor).min(limits.contract)
    }

    /// Compares and reports. `name` is shown, `expected` has PyTorch's layout.
    fn compare(&mut self, name: String, bound: f64, got: &[f64], expected: &Array) {
        let check = compare(name, bound, got, expected);
        match check.ok {
            true => self.summary.ok += 1,
            false => self.summary.failed += 1,
        }
        (self.report)(&Finding::Check(check));
    }

    /// Compares with a tensor of a file, if the file has it; the bound is that of `what`.
    fn check(&mut self, f: &Golden, tensor: &str, what: Quantity, got: &[f64]) -> Result<()> {
        self.check_as(f, tensor, tensor.trim_end_matches(".f64"), what, got)
    }

    /// As [`Session::check`], but if the file lacks the tensor, nothing is reported.
    fn check_if(&mut self, f: &Golden, tensor: &str, what: Quantity, got: &[f64]) -> Result<()> {
        if f.has(tensor) { self.check(f, tensor, what, got) } else { Ok(()) }
    }

    /// As [`Session::check`]. But unless the directory says what the official code loses of this tensor, the bound of
    /// another one, `kin`, counts if it is larger.
    fn check_as(&mut self, f: &Golden, tensor: &str, kin: &str, what: Quantity, got: &[f64]) -> Result<()> {
        if !f.has(tensor) {
            self.skip(format!("{}/{tensor}", f.stem), "absent");
            return Ok(());
        }
        let expected = f.array(tensor)?;
        let bound = |name: &str| self.bound(what, &f.name, name, expected.values.len());
        let bound = match self.official(&f.name, tensor) {
            Some(_) => bound(tensor),
            None => bound(tensor).max(bound(kin)),
        };
        self.compare(format!("{}/{tensor}", f.stem), bound, got, &expected);
        Ok(())
    }

    /// The backend with the file's parameters in its weights. There they are named `prefix` + their name in the table.
    fn load<B: NetworkBackend>(&self, f: &Golden, prefix: &str, table: &ParamTable, mut b: B) -> Result<B> {
        for (id, spec) in table.iter() {
            let array = f.shaped(&format!("{prefix}{}", spec.name), &spec.shape)?;
            b.load_param(id, &array.f32())?;
        }
        Ok(b)
    }
}

/// Relative error of `got` and its worst element.
fn compare(name: String, bound: f64, got: &[f64], expected: &Array) -> Check {
    if got.len() != expected.values.len() {
        let worst = Worst { index: vec![], got: got.len() as f64, expected: expected.values.len() as f64 };
        let name = format!("{name} (number of values)");
        return Check { name, error: f64::INFINITY, bound, ok: false, worst: Some(worst) };
    }
    let (mut diff2, mut norm2, mut worst) = (0.0, 0.0, (0.0, None));
    for (i, (&g, &e)) in got.iter().zip(&expected.values).enumerate() {
        let diff = (g - e).abs();
        diff2 += diff * diff;
        norm2 += e * e;
        if worst.1.is_none() || diff > worst.0 || diff.is_nan() && !f64::is_nan(worst.0) {
            worst = (diff, Some(i));
        }
    }
    let error = if norm2 > 0.0 { (diff2 / norm2).sqrt() } else { diff2.sqrt() };
    let error = if error.is_nan() { f64::INFINITY } else { error };
    let worst =
        worst.1.map(|i| Worst { index: unravel(i, &expected.shape), got: got[i], expected: expected.values[i] });
    Check { name, error, bound, ok: error <= bound, worst }
}

fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (at, &side) in index.iter_mut().zip(shape).rev() {
        *at = i % side;
        i /= side;
    }
    index
}

/// An open tensor file that remembers what was read of it.
struct Golden {
    file: SafeFile,
    name: String,
    stem: String,
    seen: RefCell<BTreeSet<String>>,
}

impl Golden {
    fn has(&self, tensor: &str) -> bool {
        self.file.contains(tensor)
    }

    fn array(&self, tensor: &str) -> Result<Array> {
        let array = Array { shape: self.file.shape(tensor)?.to_vec(), values: self.file.f64(tensor)? };
        self.seen.borrow_mut().insert(tensor.into());
        Ok(array)
    }

    /// A tensor of a certain shape.
    fn shaped(&self, tensor: &str, shape: &[usize]) -> Result<Array> {
        self.file.expect_shape(tensor, shape)?;
        self.array(tensor)
    }

    /// The error for a tensor whose shape its use does not allow.
    fn misshapen(&self, tensor: &str, shape: &[usize], expected: impl fmt::Display) -> VerifyError {
        self.file.unexpected(tensor, format!("shape {shape:?}"), expected).into()
    }

    /// [N, C, H, W] or [N, C], none of them 0.
    fn images(&self, tensor: &str) -> Result<Array> {
        let array = self.array(tensor)?;
        match matches!(array.shape.len(), 2 | 4) && !array.shape.contains(&0) {
            true => Ok(array),
            false => Err(self.misshapen(tensor, &array.shape, "[N, C, H, W] or [N, C], none 0")),
        }
    }

    /// Tensors that nothing has asked for.
    fn unseen(&self) -> Vec<String> {
        let seen = self.seen.borrow();
        self.file.names().filter(|name| !seen.contains(*name)).map(str::to_owned).collect()
    }

    /// Names of the cases: the parts of tensors' names before the first dot.
    fn cases(&self) -> Vec<String> {
        let cases: BTreeSet<_> = self.file.names().filter_map(|name| name.split_once('.')).map(|n| n.0).collect();
        cases.into_iter().map(str::to_owned).collect()
    }

    fn metadata<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let parsed = self.file.metadata().get(key).map(|text| serde_json::from_str(text)).transpose();
        parsed.map_err(|e| self.wrong(key, e.to_string()))
    }

    fn wrong(&self, key: &str, what: String) -> VerifyError {
        VerifyError::Json { path: self.file.path().into(), what: format!("metadata \"{key}\": {what}") }
    }

    fn config_error(&self, cause: ConfigError) -> VerifyError {
        VerifyError::Config { path: self.file.path().into(), cause }
    }
}

/// A tensor of a file, in PyTorch's layout.
#[derive(Clone)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn new(shape: &[usize], values: Vec<f64>) -> Self {
        Self { shape: shape.to_vec(), values }
    }

    fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|&x| x as f32).collect()
    }

    /// As an activation: [n, h, w, c] of [n, c, h, w] or [n, c].
    fn nhwc(&self) -> Shape {
        match *self.shape {
            [n, c, h, w] => [n, h, w, c],
            [n, c] => [n, 1, 1, c],
            _ => [1, 1, 1, self.values.len()],
        }
    }

    /// Its values in the order of [`Array::nhwc`].
    fn nhwc_values(&self) -> Vec<f32> {
        let [n, h, w, c] = self.nhwc();
        let mut values = Vec::with_capacity(self.values.len());
        for image in 0..n {
            for pixel in 0..h * w {
                values.extend((0..c).map(|i| self.values[(image * c + i) * h * w + pixel] as f32));
            }
        }
        values
    }

    fn upload<B: NetworkBackend>(&self, b: &mut B) -> B::Tensor {
        b.upload(self.nhwc(), &self.nhwc_values())
    }

    /// Each value times the factor of its channel, the second dimension.
    fn scale_channels(&self, factor: impl Fn(usize) -> f64) -> Self {
        let inner: usize = self.shape[2..].iter().product();
        let values = self.values.iter().enumerate().map(|(i, x)| x * factor(i / inner % self.shape[1])).collect();
        Self::new(&self.shape, values)
    }

    fn scaled(&self, factor: f64) -> Self {
        Self::new(&self.shape, self.values.iter().map(|x| x * factor).collect())
    }
}

/// Copies an activation to the host, in PyTorch's layout.
fn download<B: NetworkBackend>(b: &mut B, t: &B::Tensor) -> Result<Vec<f64>> {
    Ok(planar(&b.download(t)?, b.shape(t)))
}

/// NHWC values of this shape in PyTorch's layout.
fn planar(values: &[f32], [_, h, w, c]: Shape) -> Vec<f64> {
    let images = values.chunks((h * w * c).max(1));
    images.flat_map(|image| transposed(image, c)).map(f64::from).collect()
}

fn param<B: TrainingBackend>(b: &mut B, slot: Slot, id: ParamId) -> Result<Vec<f64>> {
    Ok(b.read_param(slot, id)?.into_iter().map(f64::from).collect())
}

/// The forced normalisations of a step, as its forward pass saw them.
fn normalization(rounds: usize) -> Normalization {
    if rounds == 0 { Normalization::Eval } else { Normalization::Train { rounds } }
}

/// An optimizer step that leaves the weights as the forward pass saw them. It is taken to make the gradients readable.
fn still_step<B: TrainingBackend>(b: &mut B, rounds: usize, grad_scale: f64) -> Result<StepStats> {
    let betas = (0.9, 0.99);
    Ok(b.optimizer_step(&OptimizerStep { lr: 0.0, betas, eps: 1e-8, step: 1, grad_scale, rounds, ema_betas: &[] })?)
}
