//! Learning-rate schedules.
//!
//! `edm2` (EDM2, eq. 67, with a linear ramp-up): lr = ref / sqrt(max(t / t_ref, 1)) * min(t / t_rampup, 1)
//! with t the images seen before the step, t_ref = decay * batch. `linear`: lr falls from ref to zero at the
//! end of training, with the same ramp-up.
//!
//! ```
//! use edm2k::train::{LearningRate, Schedule};
//!
//! let (schedule, batch) = (Schedule::Edm2, 2048.0);
//! let lr = LearningRate { schedule, reference: 0.01, decay: 100.0, rampup: 1e5, batch, duration: 1e6 };
//! assert_eq!(lr.at(50_000), 0.005); // halfway up
//! assert_eq!(lr.at(200_000), 0.01);
//! assert_eq!(lr.at(4 * 100 * 2048), 0.005); // four times as many images as where it begins to fall
//! ```

use serde::{Deserialize, Serialize};

/// Shape of the learning rate over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Constant, then falling as 1/sqrt of the images seen.
    Edm2,
    /// Falling linearly to zero at the end of training.
    Linear,
}

/// A schedule with its settings.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    /// Its shape.
    pub schedule: Schedule,
    /// Reference (highest) learning rate.
    pub reference: f64,
    /// `edm2`: batches after which it begins to fall; 0 = never.
    pub decay: f64,
    /// Images of the linear ramp-up; 0 = none.
    pub rampup: f64,
    /// Images per step.
    pub batch: f64,
    /// `linear`: images of the whole training.
    pub duration: f64,
}

impl LearningRate {
    /// Learning rate of the step that begins when `nimg` images have been seen.
    pub fn at(&self, nimg: u64) -> f64 {
        let t = nimg as f64;
        let decayed = match self.schedule {
            Schedule::Edm2 if self.decay > 0.0 => self.reference / (t / (self.decay * self.batch)).max(1.0).sqrt(),
            Schedule::Edm2 => self.reference,
            Schedule::Linear => self.reference * (1.0 - t / self.duration).max(0.0),
        };
        if self.rampup > 0.0 { decayed * (t / self.rampup).min(1.0) } else { decayed }
    }
}
