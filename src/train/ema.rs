//! Power-function moving averages of the weights (EDM2, section 3.1 and appendix C).
//!
//! The average at time t weighs the past as tau^gamma; its width is given as the relative standard
//! deviation sigma_rel of that profile, which gamma follows from (eq. 123):
//! sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
//!
//! ```
//! use edm2k::train::ema::{MAX_STD, name_of, power_function_beta, std_to_exp};
//!
//! assert!((std_to_exp(0.05) - 16.97).abs() < 0.01);
//! assert!(std_to_exp(MAX_STD).abs() < 1e-6); // a plain average
//! assert_eq!(power_function_beta(0.05, 2048, 2048), 0.0); // the first step takes over the weights
//! assert_eq!(name_of(0.05), "0.050");
//! ```

/// Widest profile: gamma = 0, a plain average over all of training.
pub const MAX_STD: f64 = 0.288_675_134_594_812_9; // 1 / sqrt(12)

/// Narrowest profile: after a million images it averages over about one.
pub const MIN_STD: f64 = 1e-6;

/// Exponent gamma of the profile with relative standard deviation `std`, in (0, [`MAX_STD`]]: the
/// largest real root of g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2).
pub fn std_to_exp(std: f64) -> f64 {
    let k = 1.0 / (std * std);
    // Newton's method from a point right of the root, where the cubic is convex and rising: monotonic.
    let mut g = k.sqrt();
    loop {
        let f = ((g + 7.0) * g + (16.0 - k)) * g + (12.0 - k);
        let slope = (3.0 * g + 14.0) * g + (16.0 - k);
        let next = g - f / slope;
        if next >= g || next.is_nan() {
            return g;
        }
        g = next;
    }
}

/// Decay of the average in the step of `delta` images that ends at `t` images; 0 in the first step.
pub fn power_function_beta(std: f64, t: u64, delta: u64) -> f64 {
    (1.0 - delta as f64 / t as f64).powf(std_to_exp(std) + 1.0)
}

/// A width as the names of files have it: with three decimals, or as many more as tell it from every other width.
pub fn name_of(std: f64) -> String {
    let short = format!("{std:.3}");
    if short.parse() == Ok(std) { short } else { std.to_string() }
}
