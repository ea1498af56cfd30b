//! Post-hoc moving averages (EDM2, section 3.2, appendix C.3 and algorithm 3): the average of any width as
//! a combination of stored ones.
//!
//! A profile of exponent gamma that ends at t is p(tau) = (gamma + 1) / t * (tau / t)^gamma on [0, t]. The
//! coefficients x minimise the L2 distance of sum x_i p_i from the wanted profile, A x = b with the
//! inner products of the profiles, and are scaled to sum to 1. Cost: n^3 / 3 operations of n profiles.

use super::ema::std_to_exp;

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
        // Both live on [0, earlier]; there the later one has fallen to (earlier / later)^gamma.
        let (earlier, later, gamma) = if ta < tb { (ta, tb, gb) } else { (tb, ta, ga) };
        (ga + 1.0) * (gb + 1.0) / ((ga + gb + 1.0) * later) * (earlier / later).powf(gamma)
    };
    a.iter().flat_map(|x| b.iter().map(move |y| product(x, y))).collect()
}

/// Coefficients of the stored profiles `inputs` for each of the wanted `outputs`, [inputs, outputs],
/// row-major; each column sums to 1. `None` if two inputs are the same profile (or nearly so).
pub fn solve_posthoc(inputs: &[Profile], outputs: &[Profile]) -> Option<Vec<f64>> {
    let (n, m) = (inputs.len(), outputs.len());
    let a = correlation(inputs, inputs);
    let b = correlation(inputs, outputs);
    let factor = cholesky(&a, n)?;
    let mut x = vec![0.0; n * m];
    for column in 0..m {
        let mut rest: Vec<f64> = (0..n).map(|i| b[i * m + column]).collect();
        let mut solution = vec![0.0; n];
        // The second round solves for what rounding left over in the first.
        for _ in 0..2 {
            let step = substitute(&factor, n, &rest);
            solution.iter_mut().zip(&step).for_each(|(x, d)| *x += d);
            for (i, rest) in rest.iter_mut().enumerate() {
                let row = &a[i * n..(i + 1) * n];
                *rest = row.iter().zip(&solution).fold(b[i * m + column], |r, (a, x)| (-a).mul_add(*x, r));
            }
        }
        let sum: f64 = solution.iter().sum();
        for (i, value) in solution.into_iter().enumerate() {
            x[i * m + column] = value / sum;
        }
    }
    Some(x)
}

/// Lower triangle L of the symmetric positive definite A = L L^T.
fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut l = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            let rest = a[i * n + j] - dot;
            l[i * n + j] = match i == j {
                // What rounding leaves of a diagonal element that should vanish.
                true if rest <= 1e-13 * a[i * n + i] => return None,
                true => rest.sqrt(),
                false => rest / l[j * n + j],
            };
        }
    }
    Some(l)
}

/// x with L L^T x = b.
fn substitute(l: &[f64], n: usize, b: &[f64]) -> Vec<f64> {
    let mut x = b.to_vec();
    for i in 0..n {
        let dot: f64 = (0..i).map(|k| l[i * n + k] * x[k]).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    x
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
