//! What is to be made: [`Request`].

use serde_json::{Value, json};

use super::{Condition, PipelineError};
use crate::formats::short;
use crate::sample::{SampleError, SamplerConfig};

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// The images take these in turn, and reach the last; without any they are unconditional.
    pub conditions: Vec<Condition>,
    /// Images of each condition before the next one, 1 at least.
    pub per_condition: usize,
    /// One image for each.
    pub seeds: Vec<u64>,
    /// For each image a second seed and the share of its noise, 0 to 1. Empty: no second seeds.
    pub towards: Vec<(u64, f64)>,
    /// What all images begin from, beside noise; see [`SamplerConfig::strength`].
    pub from: Option<Beginning>,
    /// [height, width] of the images, or latents; none: what the model was trained on.
    pub size: Option<[usize; 2]>,
    /// How images come out of noise.
    pub sampler: SamplerConfig,
    /// Images at a time, 1 at least: changes speed and memory, not the images.
    pub batch: usize,
}

impl Default for Request {
    /// One unconditional image of seed 0.
    fn default() -> Self {
        Self {
            conditions: Vec::new(),
            per_condition: 1,
            seeds: vec![0],
            towards: Vec::new(),
            from: None,
            size: None,
            sampler: SamplerConfig::default(),
            batch: 4,
        }
    }
}

impl Request {
    /// Place of the condition of image number `number`; none if it is unconditional.
    pub fn condition_of(&self, number: usize) -> Option<usize> {
        number.checked_div(self.per_condition)?.checked_rem(self.conditions.len())
    }

    /// Whether guidance is to lead an image away from a condition of its own.
    pub(super) fn has_negative(&self) -> bool {
        self.conditions.iter().any(|condition| condition.away.is_some())
    }

    /// A row of `count` images on the way from the first to the second of two conditions, of two seeds, or of both.
    ///
    /// # Errors
    /// [`PipelineError::NotTwo`]; or [`PipelineError::Condition`], see [`Condition::between`].
    pub fn interpolated(mut self, count: usize) -> Result<Self, PipelineError> {
        let (conditions, seeds) = (self.conditions.len(), self.seeds.len());
        if !matches!((conditions, seeds), (2, 1 | 2) | (0 | 1, 2)) {
            return Err(NotTwo { conditions, seeds }.into());
        }
        let share = |i: usize| i as f64 / (count.max(2) - 1) as f64;
        if let [a, b] = &self.conditions[..] {
            self.conditions = (0..count).map(|i| Condition::between(a, b, share(i))).collect::<Result<_, _>>()?;
        }
        if let [_, other] = self.seeds[..] {
            self.towards = (0..count).map(|i| (other, share(i))).collect();
        }
        (self.seeds, self.per_condition) = (vec![self.seeds[0]; count], 1);
        Ok(self)
    }

    /// What image `number` says of itself, given [what all say](super::Pipeline::parameters).
    ///
    /// # Panics
    /// If there is no such image, or `common` is no object.
    pub fn about(&self, common: &Value, number: usize) -> Value {
        let mut about = common.clone();
        about["seed"] = self.seeds[number].into();
        if let Some(&(seed, share)) = self.towards.get(number) {
            about["towards"] = json!({"seed": seed, "share": share});
        }
        let condition = self.condition_of(number).map(|row| &self.conditions[row]);
        about["condition"] = condition.map(|condition| condition.origin.clone()).into();
        if let Some(condition) = condition {
            about["hashes"]["condition"] = json!(condition.fingerprint());
        }
        about
    }

    /// Checks that conditions have the network's width, what they begin from as many values, that each condition has an
    /// image, and that there are as many other seeds as images.
    pub(super) fn check_counts(&self, label_dim: usize, values: usize) -> Result<(), PipelineError> {
        let setting = |name, found, expected: &str| SampleError::Setting { name, found, expected: expected.into() };
        for (name, count) in [("per_condition", self.per_condition), ("batch", self.batch)] {
            if count == 0 {
                return Err(setting(name, count.to_string(), "1 at least").into());
            }
        }
        enough_seeds(self.conditions.len(), self.per_condition, self.seeds.len())?;
        check_conditions(&self.conditions, label_dim)?;
        let (found, expected) = (self.towards.len(), self.seeds.len());
        if found > 0 && found != expected {
            return Err(PipelineError::Towards { found, expected });
        }
        if let Some((_, share)) = self.towards.iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            return Err(setting("towards", short(*share), "a share of 0 to 1").into());
        }
        match &self.from {
            Some(from) if from.values.len() != values => {
                Err(SampleError::From { found: from.values.len(), expected: values }.into())
            }
            _ => Ok(()),
        }
    }
}

/// Checks that conditions are vectors of the network's width.
pub(super) fn check_conditions(conditions: &[Condition], expected: usize) -> Result<(), PipelineError> {
    for (number, Condition { values, away, .. }) in conditions.iter().enumerate() {
        for values in [Some(values), away.as_ref()].into_iter().flatten() {
            if values.len() != expected {
                return Err(PipelineError::ConditionWidth { number, found: values.len(), expected });
            }
            if !values.iter().all(|value| value.is_finite()) {
                return Err(PipelineError::ConditionValue { number });
            }
        }
    }
    Ok(())
}

/// Fails if the seeds do not reach the last of the conditions, of which each takes `per_condition`.
pub(crate) fn enough_seeds(conditions: usize, per_condition: usize, seeds: usize) -> Result<(), FewSeeds> {
    let least = conditions.saturating_sub(1).saturating_mul(per_condition);
    if conditions < 2 || seeds > least { Ok(()) } else { Err(FewSeeds { conditions, per_condition, seeds }) }
}

/// Some conditions would get no image, as there are too few seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "too few seeds for {conditions} conditions, {per_condition} of each: found {seeds}, expected {} at least",
    conditions.saturating_sub(1).saturating_mul(*per_condition).saturating_add(1)
)]
pub struct FewSeeds {
    /// Conditions given.
    pub conditions: usize,
    /// Images of each before the next one.
    pub per_condition: usize,
    /// Seeds given.
    pub seeds: usize,
}

/// There are not two things to interpolate between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{conditions} conditions and {seeds} seeds, expected two of either, or of both, and no others")]
pub struct NotTwo {
    /// Conditions given.
    pub conditions: usize,
    /// Seeds given.
    pub seeds: usize,
}

/// An image that others begin from.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// In model space, [height, width, channels].
    pub values: Vec<f32>,
    /// What it is called, for people.
    pub name: String,
}
