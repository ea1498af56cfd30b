//! How far numbers are from those that they should be.

/// ||got - want|| <= bound ||want||.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let far = |i: usize| (f64::from(got[i]) - f64::from(want[i])).abs();
    let error: f64 = (0..got.len()).map(|i| far(i) * far(i)).sum();
    let size: f64 = want.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let worst = (0..got.len()).max_by(|&i, &j| far(i).total_cmp(&far(j))).unwrap();
    let relative = if error == 0.0 { 0.0 } else { (error / size).sqrt() };
    // NaN, which poison leaves behind, must not pass.
    assert!(
        relative <= bound,
        "{what}: relative error {relative:e}, bound {bound:e}; worst element {worst}: {} instead of {}",
        got[worst],
        want[worst],
    );
}
