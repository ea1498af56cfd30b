//! Post-hoc moving averages (EDM2, section 3.2, appendix C.3 and algorithm 3): the average of any width is made as a
//! combination of stored ones.
//!
//! A profile of exponent gamma that ends at t is p(tau) = (gamma + 1) / t * (tau / t)^gamma on [0, t]. The coefficients
//! x minimise the L2 distance of sum x_i p_i from the wanted profile, A x = b with the inner products of the profiles,
//! and are scaled to sum to 1. Cost: n^3 / 3 operations for n profiles.
//!
//! [`Reconstruction`] makes the averages from snapshots: it reads each file once, however many are wanted,
//! and keeps one parameter of each in memory.
//!
//! ```
//! use edm2k::train::posthoc::{mismatch, solve_posthoc};
//!
//! // Averages of two widths, stored after half of a million images and at the end; of a third width there is none.
//! let stored = [(5e5, 0.05), (1e6, 0.05), (5e5, 0.10), (1e6, 0.10)];
//! let wanted = [(1e6, 0.08)];
//! let factors = solve_posthoc(&stored, &wanted).unwrap();
//! assert!((factors.iter().sum::<f64>() - 1.0).abs() < 1e-9);
//! assert!(mismatch(&stored, &wanted, &factors)[0] < 0.1);
//! ```

use std::path::{Path, PathBuf};

use nalgebra::DMatrix;
use serde_json::Value;

use super::ema::{MAX_STD, std_to_exp};
use crate::formats::short;
use crate::model::{ModelError, ModelFile, ModelMeta, ModelWriter, Stored};

/// A profile: time at which it ends, in images, and its relative standard deviation.
pub type Profile = (f64, f64);

/// Relative standard deviation of the profile with exponent `gamma`; the inverse of [`std_to_exp`] (eq. 123).
pub fn exp_to_std(gamma: f64) -> f64 {
    (gamma + 1.0).sqrt() / ((gamma + 2.0) * (gamma + 3.0).sqrt())
}

/// Inner products of profiles, [a.len(), b.len()], row-major (eq. 151).
pub fn correlation(a: &[Profile], b: &[Profile]) -> Vec<f64> {
    let with_exp = |profiles: &[Profile]| profiles.iter().map(|&(t, std)| (t, std_to_exp(std))).collect::<Vec<_>>();
    let (a, b) = (with_exp(a), with_exp(b));
    let product = |&(ta, ga): &(f64, f64), &(tb, gb): &(f64, f64)| {
        // Only [0, earlier] counts for both. There the later profile has the factor (earlier / later)^gamma.
        let (earlier, later, gamma) = if ta < tb { (ta, tb, gb) } else { (tb, ta, ga) };
        (ga + 1.0) * (gb + 1.0) / ((ga + gb + 1.0) * later) * (earlier / later).powf(gamma)
    };
    a.iter().flat_map(|x| b.iter().map(move |y| product(x, y))).collect()
}

/// Coefficients of the stored profiles `inputs` for each of the wanted `outputs`, [inputs, outputs],
/// row-major; each column sums to 1. `None` if two inputs are the same profile (or nearly so).
pub fn solve_posthoc(inputs: &[Profile], outputs: &[Profile]) -> Option<Vec<f64>> {
    let (n, m) = (inputs.len(), outputs.len());
    let a = DMatrix::from_row_slice(n, n, &correlation(inputs, inputs));
    let b = DMatrix::from_row_slice(n, m, &correlation(inputs, outputs));
    let factor = a.clone().cholesky()?;
    // Such a diagonal element should be zero, and is what rounding left.
    if factor.l_dirty().diagonal().iter().zip(&a.diagonal()).any(|(l, a)| l * l <= 1e-13 * a) {
        return None;
    }
    let mut x = DMatrix::zeros(n, m);
    for (b, mut x) in b.column_iter().zip(x.column_iter_mut()) {
        let mut rest = b.into_owned();
        // The second round corrects what rounding left over in the first.
        for _ in 0..2 {
            x += factor.solve(&rest);
            for (i, rest) in rest.iter_mut().enumerate() {
                *rest = a.row(i).iter().zip(&x).fold(b[i], |rest, (a, x)| (-a).mul_add(*x, rest));
            }
        }
        x /= x.sum();
    }
    Some(x.transpose().as_slice().to_vec()) // row-major
}

/// How far sum x_i p_i is from the wanted profile p, for each of the `outputs`: the L2 norm of the difference,
/// relative to that of p. `x` are coefficients as from [`solve_posthoc`].
///
/// # Panics
/// If there are not as many coefficients as inputs times outputs.
pub fn mismatch(inputs: &[Profile], outputs: &[Profile], x: &[f64]) -> Vec<f64> {
    let (n, m) = (inputs.len(), outputs.len());
    let a = correlation(inputs, inputs);
    let b = correlation(inputs, outputs);
    let column = |k: usize| (0..n).map(move |i| (i, x[i * m + k]));
    let relative = |k: usize| {
        let norm = correlation(&outputs[k..=k], &outputs[k..=k])[0];
        let cross: f64 = column(k).map(|(i, x)| x * b[i * m + k]).sum();
        let square: f64 = column(k)
            .flat_map(|(i, x)| column(k).map(move |(j, y)| (i, x, j, y)))
            .map(|(i, x, j, y)| x * a[i * n + j] * y)
            .sum();
        ((norm - 2.0 * cross + square).clamp(0.0, f64::INFINITY) / norm).sqrt()
    };
    (0..m).map(relative).collect()
}

/// The largest [`mismatch`] at which a result still counts as the average that was asked for.
const MAX_MISMATCH: f64 = 0.5;

/// Why an average cannot be reconstructed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum PosthocError {
    #[error("{}: no usable {what} in its metadata, so it is no snapshot of a moving average", path.display())]
    NoAverage { path: PathBuf, what: &'static str },
    #[error("{} is not of the same run as {}: they differ in {differences}", path.display(), first.display())]
    Differs { path: PathBuf, first: PathBuf, differences: String },
    #[error("{} and {} are the same average (std {std} at {at} images)", path.display(), first.display())]
    Same { path: PathBuf, first: PathBuf, std: f64, at: u64 },
    #[error("snapshots up to {at} images: {found}, expected 2 or more")]
    TooFew { found: usize, at: u64 },
    #[error("no snapshot at {at} images; the nearest is at {nearest}")]
    Time { at: u64, nearest: u64 },
    #[error("the {snapshots} snapshots are too much alike to be combined")]
    Alike { snapshots: usize },
    #[error(
        "no combination of the {snapshots} snapshots comes near std {}: {:.0} % of its profile are missed, \
         expected at most {:.0} %", short(*std), 100.0 * mismatch, 100.0 * MAX_MISMATCH
    )]
    OutOfReach { snapshots: usize, std: f64, mismatch: f64 },
}

/// Averages that are to be made of snapshots.
pub struct Reconstruction {
    snapshots: Vec<ModelFile>,
    at: u64,
    stds: Vec<f64>,
    coefficients: Vec<f64>,
    mismatch: Vec<f64>,
}

debug!(Reconstruction { at, stds });

impl Reconstruction {
    /// Finds how to combine the snapshots of a run to averages of relative standard deviations `stds`, each in
    /// (0, [`MAX_STD`]], that end at `at` images (none = the last snapshot). Later ones are not used.
    ///
    /// # Errors
    /// [`PosthocError`]: the snapshots are too few, too much alike, or of several runs; none is at `at`; or no combination
    /// of them comes near one of the averages.
    pub fn new(mut snapshots: Vec<ModelFile>, stds: &[f64], at: Option<u64>) -> Result<Self, PosthocError> {
        for file in &snapshots {
            let what = match (file.meta.ema_std, file.meta.images_seen) {
                (_, 0) => "images_seen",
                (Some(std), _) if std > 0.0 && std <= MAX_STD => continue,
                _ => "ema_std",
            };
            return Err(PosthocError::NoAverage { path: file.path().into(), what });
        }
        if let Some((first, others)) = snapshots.split_first() {
            for file in others {
                let differences = differences(first, file);
                if !differences.is_empty() {
                    return Err(PosthocError::Differs {
                        path: file.path().into(),
                        first: first.path().into(),
                        differences,
                    });
                }
            }
        }
        let times = || snapshots.iter().map(|file| file.meta.images_seen);
        let at = at.or(times().max()).unwrap_or(0);
        if let Some(nearest) = times().min_by_key(|time| time.abs_diff(at)).filter(|&time| time != at) {
            return Err(PosthocError::Time { at, nearest });
        }
        snapshots.retain(|file| file.meta.images_seen <= at);
        let found = snapshots.len();
        if found < 2 {
            return Err(PosthocError::TooFew { found, at });
        }
        let profile = |file: &ModelFile| (file.meta.images_seen as f64, file.meta.ema_std.unwrap_or_default());
        let inputs: Vec<Profile> = snapshots.iter().map(profile).collect();
        for (i, file) in snapshots.iter().enumerate() {
            if let Some(first) = inputs[..i].iter().position(|&other| other == inputs[i]) {
                let (std, at) = (inputs[i].1, file.meta.images_seen);
                return Err(PosthocError::Same {
                    path: file.path().into(),
                    first: snapshots[first].path().into(),
                    std,
                    at,
                });
            }
        }
        let outputs: Vec<Profile> = stds.iter().map(|&std| (at as f64, std)).collect();
        let coefficients = solve_posthoc(&inputs, &outputs).ok_or(PosthocError::Alike { snapshots: found })?;
        let mismatch = mismatch(&inputs, &outputs, &coefficients);
        if let Some(k) = mismatch.iter().position(|&missed| missed.is_nan() || missed > MAX_MISMATCH) {
            return Err(PosthocError::OutOfReach { snapshots: found, std: stds[k], mismatch: mismatch[k] });
        }
        Ok(Self { snapshots, at, stds: stds.into(), coefficients, mismatch })
    }

    /// Images seen at the end of the averages.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// How many snapshots are combined.
    pub fn snapshots(&self) -> usize {
        self.snapshots.len()
    }

    /// The [`mismatch`] of each average.
    pub fn mismatch(&self) -> &[f64] {
        &self.mismatch
    }

    /// Values that [`Reconstruction::write`] will have read in all.
    pub fn values(&self) -> u64 {
        self.snapshots.iter().flat_map(|file| file.table.iter()).map(|(_, spec)| spec.numel() as u64).sum()
    }

    /// Writes a model file (f16) for each average; `progress` is called with how many more values have been read.
    ///
    /// # Errors
    /// [`ModelError`] of a snapshot or an output.
    ///
    /// # Panics
    /// If there are not as many paths as averages.
    pub fn write(&self, paths: &[impl AsRef<Path>], progress: &mut dyn FnMut(u64)) -> Result<(), ModelError> {
        assert_eq!(paths.len(), self.stds.len(), "paths of the averages");
        let ModelFile { meta, net, table, .. } = &self.snapshots[0];
        // The run may have begun late to leave conditions out.
        let newest = self.snapshots.iter().map(|file| &file.meta).max_by_key(|meta| meta.images_seen);
        let cond_dropout = newest.and_then(|meta| meta.cond_dropout);
        let create = |(path, &std)| {
            let meta = ModelMeta { images_seen: self.at, cond_dropout, ema_std: Some(std), ..meta.clone() };
            ModelWriter::create(path, &net.config, &meta, table, Stored::F16)
        };
        let mut outputs = paths.iter().zip(&self.stds).map(create).collect::<Result<Vec<_>, _>>()?;
        for (id, spec) in table.iter() {
            let mut sums = vec![vec![0.0; spec.numel()]; outputs.len()];
            for (file, coefficients) in self.snapshots.iter().zip(self.coefficients.chunks(outputs.len().max(1))) {
                let values = file.values(id)?;
                for (sum, &x) in sums.iter_mut().zip(coefficients) {
                    sum.iter_mut().zip(&values).for_each(|(sum, value)| *sum += x as f32 * value);
                }
                progress(values.len() as u64);
            }
            outputs.iter_mut().zip(&sums).try_for_each(|(output, sum)| output.write(sum))?;
        }
        outputs.into_iter().try_for_each(ModelWriter::finish)
    }
}

/// What differs between two snapshots although those of one run have it in common: names of entries of config and
/// metadata.
fn differences(a: &ModelFile, b: &ModelFile) -> String {
    let entries = |file: &ModelFile| {
        let mut meta = ModelMeta { images_seen: 0, cond_dropout: None, ema_std: None, ..file.meta.clone() };
        meta.settle(&a.meta);
        [serde_json::to_value(&file.net.config), serde_json::to_value(meta)].map(Result::unwrap_or_default)
    };
    let names = entries(a).into_iter().zip(entries(b)).flat_map(|pair| match pair {
        (Value::Object(a), Value::Object(b)) => {
            a.into_iter().filter(|(name, value)| b.get(name) != Some(value)).map(|(name, _)| name).collect()
        }
        _ => Vec::new(),
    });
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_profile_is_its_own_reconstruction() {
        let inputs = [(1e6, 0.05), (1e6, 0.1), (2.5e6, 0.05), (2.5e6, 0.1)];
        let x = solve_posthoc(&inputs, &inputs[2..3]).unwrap();
        for (got, want) in x.iter().zip([0.0, 0.0, 1.0, 0.0]) {
            assert!((got - want).abs() < 1e-13, "{x:?}");
        }
    }

    #[test]
    fn the_same_profile_twice_has_no_unique_combination() {
        assert!(solve_posthoc(&[(1e6, 0.05), (1e6, 0.05)], &[(1e6, 0.1)]).is_none());
    }
}
