//! How far numbers are from those that they should be.

/// ||got - want|| / ||want|| <= bound.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = got.iter().zip(want).map(|(&g, &w)| square(g - w)).sum();
    let error = (difference / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt();
    let worst = (0..got.len()).max_by(|&a, &b| (got[a] - want[a]).abs().total_cmp(&(got[b] - want[b]).abs())).unwrap();
    assert!(
        error <= bound,
        "{what}: relative error {error:.1e}, bound {bound:.0e}; worst at {worst}: {}, expected {}",
        got[worst],
        want[worst]
    );
}
