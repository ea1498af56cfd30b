//! How EDM2's authors sampled their published networks: which file, guided by which other one, and how strongly.
//!
//! Names are `edm2-SET-SIZE[-HOW]-METRIC`: `guid` is guidance by a network without condition, `autog` is guidance by a
//! smaller one that was trained for less long. `fid` or `dino` is the metric by which the network is the best. All take
//! 32 steps of Heun's method. The files are `NAME-IMAGES-EMA.pkl`: thousands of images seen, and the length of the
//! average, which `edm2k ema` makes of a run's snapshots.
//!
//! ```
//! use edm2k::sample::presets::preset;
//!
//! let preset = preset("edm2-img512-s-autog-fid")?;
//! assert_eq!((preset.net, preset.guide), ("edm2-img512-s-2147483-0.070", Some(("edm2-img512-xs-0134217-0.125", 2.1))));
//! assert_eq!((preset.config().steps, preset.config().guidance), (32, 2.1));
//! # Ok::<(), edm2k::sample::presets::UnknownPreset>(())
//! ```

use super::{SamplerConfig, Solver};

/// One of these presets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingPreset {
    /// Its name.
    pub name: &'static str,
    /// The network's file, without `.pkl`.
    pub net: &'static str,
    /// The file of the network to guide away from, and the strength of guidance.
    pub guide: Option<(&'static str, f64)>,
}

impl SamplingPreset {
    /// How it samples.
    pub fn config(&self) -> SamplerConfig {
        let guidance = self.guide.map_or(1.0, |(_, guidance)| guidance);
        SamplerConfig { solver: Solver::Heun, steps: 32, guidance, ..SamplerConfig::default() }
    }
}

/// No preset has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("preset '{0}' is unknown, expected one of {names}", names = PRESETS.map(|preset| preset.name).join(", "))]
pub struct UnknownPreset(String);

/// The preset of this name.
///
/// # Errors
/// [`UnknownPreset`]; the message names those that there are.
pub fn preset(name: &str) -> Result<SamplingPreset, UnknownPreset> {
    PRESETS.into_iter().find(|preset| preset.name == name).ok_or_else(|| UnknownPreset(name.into()))
}

const fn alone(name: &'static str, net: &'static str) -> SamplingPreset {
    SamplingPreset { name, net, guide: None }
}

const fn guided(name: &'static str, net: &'static str, by: &'static str, guidance: f64) -> SamplingPreset {
    SamplingPreset { name, net, guide: Some((by, guidance)) }
}

/// All of them.
pub const PRESETS: [SamplingPreset; 36] = [
    alone("edm2-img512-xs-fid", "edm2-img512-xs-2147483-0.135"),
    alone("edm2-img512-xs-dino", "edm2-img512-xs-2147483-0.200"),
    alone("edm2-img512-s-fid", "edm2-img512-s-2147483-0.130"),
    alone("edm2-img512-s-dino", "edm2-img512-s-2147483-0.190"),
    alone("edm2-img512-m-fid", "edm2-img512-m-2147483-0.100"),
    alone("edm2-img512-m-dino", "edm2-img512-m-2147483-0.155"),
    alone("edm2-img512-l-fid", "edm2-img512-l-1879048-0.085"),
    alone("edm2-img512-l-dino", "edm2-img512-l-1879048-0.155"),
    alone("edm2-img512-xl-fid", "edm2-img512-xl-1342177-0.085"),
    alone("edm2-img512-xl-dino", "edm2-img512-xl-1342177-0.155"),
    alone("edm2-img512-xxl-fid", "edm2-img512-xxl-0939524-0.070"),
    alone("edm2-img512-xxl-dino", "edm2-img512-xxl-0939524-0.150"),
    alone("edm2-img64-s-fid", "edm2-img64-s-1073741-0.075"),
    alone("edm2-img64-m-fid", "edm2-img64-m-2147483-0.060"),
    alone("edm2-img64-l-fid", "edm2-img64-l-1073741-0.040"),
    alone("edm2-img64-xl-fid", "edm2-img64-xl-0671088-0.040"),
    guided("edm2-img512-xs-guid-fid", "edm2-img512-xs-2147483-0.045", "edm2-img512-xs-uncond-2147483-0.045", 1.4),
    guided("edm2-img512-xs-guid-dino", "edm2-img512-xs-2147483-0.150", "edm2-img512-xs-uncond-2147483-0.150", 1.7),
    guided("edm2-img512-s-guid-fid", "edm2-img512-s-2147483-0.025", "edm2-img512-xs-uncond-2147483-0.025", 1.4),
    guided("edm2-img512-s-guid-dino", "edm2-img512-s-2147483-0.085", "edm2-img512-xs-uncond-2147483-0.085", 1.9),
    guided("edm2-img512-m-guid-fid", "edm2-img512-m-2147483-0.030", "edm2-img512-xs-uncond-2147483-0.030", 1.2),
    guided("edm2-img512-m-guid-dino", "edm2-img512-m-2147483-0.015", "edm2-img512-xs-uncond-2147483-0.015", 2.0),
    guided("edm2-img512-l-guid-fid", "edm2-img512-l-1879048-0.015", "edm2-img512-xs-uncond-2147483-0.015", 1.2),
    guided("edm2-img512-l-guid-dino", "edm2-img512-l-1879048-0.035", "edm2-img512-xs-uncond-2147483-0.035", 1.7),
    guided("edm2-img512-xl-guid-fid", "edm2-img512-xl-1342177-0.020", "edm2-img512-xs-uncond-2147483-0.020", 1.2),
    guided("edm2-img512-xl-guid-dino", "edm2-img512-xl-1342177-0.030", "edm2-img512-xs-uncond-2147483-0.030", 1.7),
    guided("edm2-img512-xxl-guid-fid", "edm2-img512-xxl-0939524-0.015", "edm2-img512-xs-uncond-2147483-0.015", 1.2),
    guided("edm2-img512-xxl-guid-dino", "edm2-img512-xxl-0939524-0.015", "edm2-img512-xs-uncond-2147483-0.015", 1.7),
    guided("edm2-img512-s-autog-fid", "edm2-img512-s-2147483-0.070", "edm2-img512-xs-0134217-0.125", 2.1),
    guided("edm2-img512-s-autog-dino", "edm2-img512-s-2147483-0.120", "edm2-img512-xs-0134217-0.165", 2.45),
    guided("edm2-img512-xxl-autog-fid", "edm2-img512-xxl-0939524-0.075", "edm2-img512-m-0268435-0.155", 2.05),
    guided("edm2-img512-xxl-autog-dino", "edm2-img512-xxl-0939524-0.130", "edm2-img512-m-0268435-0.205", 2.3),
    guided(
        "edm2-img512-s-uncond-autog-fid",
        "edm2-img512-s-uncond-2147483-0.070",
        "edm2-img512-xs-uncond-0134217-0.110",
        2.85,
    ),
    guided(
        "edm2-img512-s-uncond-autog-dino",
        "edm2-img512-s-uncond-2147483-0.090",
        "edm2-img512-xs-uncond-0134217-0.125",
        2.9,
    ),
    guided("edm2-img64-s-autog-fid", "edm2-img64-s-1073741-0.045", "edm2-img64-xs-0134217-0.110", 1.7),
    guided("edm2-img64-s-autog-dino", "edm2-img64-s-1073741-0.105", "edm2-img64-xs-0134217-0.175", 2.2),
];
