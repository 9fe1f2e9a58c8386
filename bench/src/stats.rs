//! Medians and spreads of a handful of rounds. Never averages: one disturbed round must not move a figure.

use serde::Serialize;

/// Median and range of the rounds of one figure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Middle value; of an even number of rounds the mean of the two in the middle.
    pub median: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// Number of rounds.
    pub rounds: usize,
}

/// Median of `values`; nothing for an empty slice. Values that are not finite are left out.
pub fn median(values: &[f64]) -> Option<f64> {
    spread(values).map(|spread| spread.median)
}

/// Median and range of `values`; nothing for an empty slice. Values that are not finite are left out.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let mut sorted: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    Some(Spread {
        median,
        min,
        max,
        rounds: sorted.len(),
    })
}

/// The value below which the share `at` (0 to 1) of all values lies; nothing for an empty slice.
pub fn percentile(values: &[f64], at: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * at).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Median of the quotients of two contenders' values of the *same* round, so that a drift of the machine between rounds
/// cancels out. Each slice holds (round, value); rounds that only one of them has are left out.
pub fn paired_ratio(of: &[(u32, f64)], to: &[(u32, f64)]) -> Option<f64> {
    let quotients: Vec<f64> = of
        .iter()
        .filter_map(|(round, value)| {
            let (_, base) = to.iter().find(|(other, _)| other == round)?;
            (*base > 0.0).then(|| value / base)
        })
        .collect();
    median(&quotients)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_odd_number_is_the_middle_value() {
        assert_eq!(median(&[30.0, 10.0, 20.0]), Some(20.0));
    }

    #[test]
    fn median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&values, 0.5), Some(50.0));
        assert_eq!(percentile(&values[..1], 0.99), Some(100.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn spread_names_the_extremes_and_counts_the_rounds() {
        let spread = spread(&[5.0, f64::NAN, 3.0, 9.0]).unwrap();
        assert_eq!(
            spread,
            Spread {
                median: 5.0,
                min: 3.0,
                max: 9.0,
                rounds: 3
            }
        );
    }

    #[test]
    fn nothing_measured_has_no_median() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[f64::NAN]), None);
    }

    #[test]
    fn paired_ratio_cancels_a_drift_between_rounds() {
        // The machine halves its speed each round; the contender is always 1.5 times as fast as the base.
        let base = [(0, 100.0), (1, 50.0), (2, 25.0)];
        let contender = [(0, 150.0), (1, 75.0), (2, 37.5)];
        assert_eq!(paired_ratio(&contender, &base), Some(1.5));
    }

    #[test]
    fn paired_ratio_ignores_a_round_that_only_one_side_has() {
        assert_eq!(
            paired_ratio(&[(0, 2.0), (1, 900.0)], &[(0, 1.0)]),
            Some(2.0)
        );
        assert_eq!(paired_ratio(&[(0, 2.0)], &[(1, 1.0)]), None);
        assert_eq!(paired_ratio(&[(0, 2.0)], &[(0, 0.0)]), None);
    }
}
