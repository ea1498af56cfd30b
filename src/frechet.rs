//! The Fréchet distance between two sets of features, each taken as a normal distribution: FID, where the features
//! are Inception's (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, eq. 6).
//!
//! ```text
//! d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
//! ```
//!
//! with means m and covariances S (divided by n - 1). The trace of the root is the sum of the roots of the eigenvalues
//! of S1 S2. S1^(1/2) S2 S1^(1/2) has the same eigenvalues and is symmetric, so they are computed from that, all in
//! f64. Rounding may make eigenvalues of degenerate covariances a little negative: these count as 0.
//!
//! Where there are fewer images than features, or features that never vary, most eigenvalues are 0. The iteration that finds
//! them then has ever smaller numbers, whose squares are 0 in the end, and gives NaN. So the diagonal is lifted by an amount
//! that rounding takes from the largest value anyway.
//!
//! Cost, of D features: D^2 multiply-adds for each image, about 10 D^3 for the distance on one core, 8 D^2 bytes for
//! each set and a few times that for the distance. For D = 2048 the distance takes 13 to 20 s and 0.3 GB.

use nalgebra::linalg::SymmetricEigen;
use nalgebra::{DMatrix, DVector};

/// Features that are added up together.
const BLOCK: usize = 64;

/// Mean and covariance of features, without keeping the features.
pub struct FeatureStatistics {
    count: usize,
    /// The first features. Sums are of the differences to them, which loses fewer digits.
    shift: DVector<f64>,
    sum: DVector<f64>,
    square: DMatrix<f64>, // [D, D]: sum of the outer products
    waiting: Vec<f64>,    // fewer than BLOCK features
}

impl FeatureStatistics {
    /// Mean and covariance of no features yet; each will have D values.
    pub fn new(width: usize) -> Self {
        Self {
            count: 0,
            shift: DVector::zeros(width),
            sum: DVector::zeros(width),
            square: DMatrix::zeros(width, width),
            waiting: Vec::new(),
        }
    }

    /// Adds the features of an image.
    ///
    /// # Panics
    /// If they are not D.
    pub fn add(&mut self, features: &[f32]) {
        assert_eq!(features.len(), self.sum.len(), "width of the features");
        if self.count == 0 {
            self.shift = DVector::from_iterator(features.len(), features.iter().map(|&x| f64::from(x)));
        }
        self.count += 1;
        self.waiting.extend(features.iter().zip(&self.shift).map(|(&x, shift)| f64::from(x) - shift));
        if self.waiting.len() >= BLOCK * features.len() {
            self.settle();
        }
    }

    fn settle(&mut self) {
        let width = self.sum.len();
        let block = DMatrix::from_column_slice(width, self.waiting.len() / width, &self.waiting);
        self.sum += block.column_sum();
        self.square.gemm(1.0, &block, &block.transpose(), 1.0);
        self.waiting.clear();
    }

    /// Mean and covariance.
    ///
    /// # Panics
    /// If there are fewer than 2 features.
    fn gaussian(mut self) -> (DVector<f64>, DMatrix<f64>) {
        assert!(self.count > 1, "the covariance of {} features", self.count);
        if !self.waiting.is_empty() {
            self.settle();
        }
        let n = self.count as f64;
        let mean = &self.sum / n;
        let covariance = (self.square - &mean * self.sum.transpose()) / (n - 1.0);
        (mean + self.shift, covariance)
    }
}

/// The Fréchet distance between two sets of features, not negative; none if the features are too large for it, or rounding
/// leaves nothing of it.
///
/// # Panics
/// If they differ in width, or one of them has fewer than 2 features.
pub fn distance(one: FeatureStatistics, other: FeatureStatistics) -> Option<f64> {
    let ((m1, s1), (m2, s2)) = (one.gaussian(), other.gaussian());
    between(&m1, s1, &m2, s2)
}

/// A symmetric matrix with a lifted diagonal, and what is to be taken off its eigenvalues.
fn lifted(mut symmetric: DMatrix<f64>) -> (DMatrix<f64>, f64) {
    let lift = 1e-14 * symmetric.amax();
    (0..symmetric.nrows()).for_each(|i| symmetric[(i, i)] += lift);
    (symmetric, lift)
}

fn between(m1: &DVector<f64>, s1: DMatrix<f64>, m2: &DVector<f64>, s2: DMatrix<f64>) -> Option<f64> {
    let traces = s1.trace() + s2.trace();
    let root = |eigenvalue: f64, lift: f64| if eigenvalue < lift { 0.0 } else { (eigenvalue - lift).sqrt() };
    // S1 = V L V^T. In the basis V, S1^(1/2) S2 S1^(1/2) is L^(1/2) (V^T S2 V) L^(1/2).
    let (s1, lift) = lifted(s1);
    let SymmetricEigen { eigenvectors: v, eigenvalues } = s1.symmetric_eigen();
    let roots = eigenvalues.map(|x| root(x, lift));
    let mut product = v.transpose() * (s2 * v);
    for (i, mut column) in product.column_iter_mut().enumerate() {
        column.iter_mut().zip(&roots).for_each(|(x, root)| *x *= root * roots[i]);
    }
    // Rounding must not leave it asymmetric.
    product = (&product + product.transpose()) / 2.0;
    let (product, lift) = lifted(product);
    let trace: f64 = product.symmetric_eigenvalues().iter().map(|&x| root(x, lift)).sum();
    let distance = (m1 - m2).norm_squared() + traces - 2.0 * trace;
    // Of thousands of eigenvalues that are 0, each root is off by 1e-8 of the largest at most.
    (distance.is_finite() && distance >= -1e-3 * traces).then(|| distance.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn normals(seed: u64, count: usize) -> Vec<f64> {
        let mut values = vec![0.0; count];
        Stream::new(seed, Purpose::Init, 0).normals(&mut values);
        values.iter().map(|&x| f64::from(x)).collect()
    }

    /// A rotation: the vectors of a symmetric matrix.
    fn rotation(seed: u64, n: usize) -> DMatrix<f64> {
        let random = DMatrix::from_vec(n, n, normals(seed, n * n));
        (&random + random.transpose()).symmetric_eigen().eigenvectors
    }

    /// The distance for covariances with the same eigenvectors, whose roots follow from the eigenvalues.
    fn expected(m1: &[f64], s1: &[f64], m2: &[f64], s2: &[f64]) -> f64 {
        let means: f64 = m1.iter().zip(m2).map(|(a, b)| (a - b).powi(2)).sum();
        means + s1.iter().zip(s2).map(|(a, b)| (a.sqrt() - b.sqrt()).powi(2)).sum::<f64>()
    }

    #[test]
    fn gaussians_with_the_same_axes() {
        for n in [1, 2, 5, 40] {
            let (m1, m2) = (normals(1, n), normals(2, n));
            let squares = |seed| -> Vec<f64> { normals(seed, n).iter().map(|x| x * x).collect() };
            let (mut s1, mut s2) = (squares(3), squares(4));
            for degenerate in [false, true] {
                if degenerate {
                    // Directions in which one, the other, or neither of them varies.
                    (0..n).for_each(|i| match i % 5 {
                        0 => s1[i] = 0.0,
                        1 => s2[i] = 0.0,
                        2 => (s1[i], s2[i]) = (0.0, 0.0),
                        _ => {}
                    });
                }
                let expected = expected(&m1, &s1, &m2, &s2);
                let diagonal = |s: &[f64]| DMatrix::from_diagonal(&DVector::from_row_slice(s));
                for v in [DMatrix::identity(n, n), rotation(5, n)] {
                    let turned = |m: &[f64]| &v * DVector::from_row_slice(m);
                    let spread = |s: &[f64]| &v * diagonal(s) * v.transpose();
                    let found = between(&turned(&m1), spread(&s1), &turned(&m2), spread(&s2)).unwrap();
                    // An eigenvalue of 0 is computed to 1e-16 of the largest, so its root to 1e-8.
                    let bound = if degenerate { 1e-7 } else { 1e-12 } * n as f64;
                    assert!((found - expected).abs() < bound, "{n}: {found}, expected {expected}");
                    let back = between(&turned(&m2), spread(&s2), &turned(&m1), spread(&s1)).unwrap();
                    assert!((back - expected).abs() < bound, "{n}: {back}, expected {expected}");
                }
            }
        }
    }

    /// In two dimensions the root's trace has a closed form: sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2))).
    #[test]
    fn gaussians_with_different_axes() {
        for seed in 0..20 {
            let random = normals(seed, 10);
            let spread = |x: &[f64]| {
                let a = DMatrix::from_column_slice(2, 2, x);
                &a * a.transpose()
            };
            let (s1, s2) = (spread(&random[..4]), spread(&random[4..8]));
            let (m1, m2) = (DVector::from_row_slice(&random[8..]), DVector::zeros(2));
            let product = &s1 * &s2;
            let root = (product.trace() + 2.0 * product.determinant().max(0.0).sqrt()).sqrt();
            let expected = m1.norm_squared() + s1.trace() + s2.trace() - 2.0 * root;
            let found = between(&m1, s1, &m2, s2).unwrap();
            assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
        }
    }

    #[test]
    fn the_distance_to_itself_is_0() {
        let a = DMatrix::from_vec(30, 10, normals(1, 300));
        let (m, s) = (DVector::from_vec(normals(2, 30)), &a * a.transpose());
        // Of rank 10: 20 eigenvalues are rounding.
        assert!(between(&m, s.clone(), &m, s).unwrap() < 1e-5);
    }

    /// Features of all sizes down to nothing, of whose smallest eigenvalues the iteration by itself makes NaN.
    #[test]
    fn features_that_hardly_vary_add_hardly_anything() {
        let n = 32;
        for seed in 0..20 {
            let a = DMatrix::from_vec(n, n, normals(seed, n * n));
            let fading = DMatrix::from_diagonal(&DVector::from_fn(n, |i, _| 10f64.powf(-100.0 * i as f64 / n as f64)));
            let s = &fading * (&a * a.transpose()) * &fading;
            assert!(!s.clone().symmetric_eigenvalues().sum().is_finite(), "{seed}: there is nothing to lift");
            // S and 4 S have the distance tr(S + 4 S - 2 * 2 S).
            let (m, expected) = (DVector::zeros(n), s.trace());
            let found = between(&m, s.clone(), &m, 4.0 * s).unwrap();
            assert!((found - expected).abs() < 1e-6 * expected, "{seed}: {found}, expected {expected}");
        }
    }

    #[test]
    fn no_distance_is_made_up() {
        for n in [1, 3] {
            let (m, s) = (DVector::zeros(n), DMatrix::identity(n, n));
            for wrong in [f64::NAN, f64::INFINITY] {
                assert_eq!(between(&m, s.clone(), &m, wrong * &s), None);
                assert_eq!(between(&m, wrong * &s, &m, s.clone()), None);
            }
            assert_eq!(between(&m, 0.0 * &s, &m, 0.0 * &s), Some(0.0));
        }
    }

    /// Moments of numbers that are known, far from 0, in more than a block.
    #[test]
    fn moments_are_those_of_the_features() {
        let (width, count) = (3, 2 * BLOCK + 5);
        let values: Vec<f32> = normals(7, width * count).iter().map(|&x| (x + 1000.0) as f32).collect();
        let mut moments = FeatureStatistics::new(width);
        values.chunks(width).for_each(|row| moments.add(row));
        let (mean, covariance) = moments.gaussian();
        let column = |i: usize| values.iter().skip(i).step_by(width).map(|&x| f64::from(x));
        let average = |i| column(i).sum::<f64>() / count as f64;
        for i in 0..width {
            assert!((mean[i] - average(i)).abs() < 1e-9);
            for j in 0..width {
                let products = column(i).zip(column(j)).map(|(a, b)| (a - average(i)) * (b - average(j)));
                let expected = products.sum::<f64>() / (count - 1) as f64;
                assert!((covariance[(i, j)] - expected).abs() < 1e-9, "{i} {j}");
            }
        }
    }

    #[test]
    fn samples_come_close_to_the_distance_of_what_they_are_drawn_from() {
        let (width, count) = (4, 200_000);
        let (scale, shift) = ([2.0, 1.0, 0.5, 0.0], [1.0, 0.0, -1.0, 0.25]);
        let (mut one, mut other) = (FeatureStatistics::new(width), FeatureStatistics::new(width));
        for (row, more) in normals(1, width * count).chunks(width).zip(normals(2, width * count).chunks(width)) {
            one.add(&row.iter().map(|&x| x as f32).collect::<Vec<_>>());
            let scaled = more.iter().zip(scale).zip(shift).map(|((x, scale), shift)| (x * scale + shift) as f32);
            other.add(&scaled.collect::<Vec<_>>());
        }
        let expected = expected(&[0.0; 4], &[1.0; 4], &shift, &scale.map(|x| x * x));
        let found = distance(one, other).unwrap();
        // Four standard deviations of the estimate. It follows from the errors of means and deviations, which are 1 /
        // sqrt(n).
        assert!((found - expected).abs() < 0.06, "{found}, expected {expected}");
    }
}
