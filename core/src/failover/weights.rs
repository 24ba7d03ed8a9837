//! What counts as a weight, a share and a rate, and which weights nobody may act on.

use crate::units::Name;

/// More requests per second than this are counted as this many, so that sums stay finite.
const MOST_RATE: f64 = 1e12;

/// Less than this part of all is a rounding error, and counts as nothing.
pub(super) const NOTHING: f64 = 1e-9;

/// How far the sum of a plan's weights may be from 1.
pub(super) const SUM_ERROR: f64 = 1e-6;

/// What is wrong with the weights of regions.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum UnfitWeights {
    #[error("there is no region; expected at least one")]
    NoRegion,
    #[error("no region has a weight above 0")]
    NoWeight,
    #[error("the weight of the region '{region}' is {weight}; expected a finite number, 0 or more")]
    Weight { region: Name, weight: f64 },
    #[error("the region '{region}' is not known")]
    Unknown { region: Name },
}

/// Says all that is wrong with weights; `known` says which regions there are (THREATS 62).
pub fn check_weights<'a>(
    weights: impl IntoIterator<Item = (&'a Name, f64)>,
    known: impl Fn(&Name) -> bool,
) -> Vec<UnfitWeights> {
    let (mut faults, mut regions, mut weighs) = (Vec::new(), 0_usize, false);
    for (region, weight) in weights {
        regions += 1;
        weighs |= weight > 0.0;
        if !weight.is_finite() || weight < 0.0 {
            faults.push(UnfitWeights::Weight { region: region.clone(), weight });
        }
        if !known(region) {
            faults.push(UnfitWeights::Unknown { region: region.clone() });
        }
    }
    if regions == 0 {
        faults.push(UnfitWeights::NoRegion);
    } else if !weighs {
        faults.push(UnfitWeights::NoWeight);
    }
    faults
}

/// A weight as it counts: what is not a positive, finite number is no weight at all.
pub(super) fn weight_of(weight: f64) -> f64 {
    if weight.is_finite() && weight > 0.0 { weight } else { 0.0 }
}

/// A share as it counts: within 0..=1; what is not a number, or less than [`NOTHING`], is 0.
pub(super) fn share_of(share: f64) -> f64 {
    if share >= NOTHING { share.min(1.0) } else { 0.0 }
}

/// Requests per second as they count; what is no rate is not known.
pub(super) fn rate_of(rate: f64) -> Option<f64> {
    // The sum makes 0 of -0, by which nobody may divide.
    (rate.is_finite() && rate >= 0.0).then_some(rate.min(MOST_RATE) + 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(weights: &[(&str, f64)]) -> Vec<UnfitWeights> {
        let named: Vec<(Name, f64)> =
            weights.iter().map(|(name, weight)| (Name::parse(name).unwrap(), *weight)).collect();
        check_weights(named.iter().map(|(name, weight)| (name, *weight)), |name| name.as_str() != "moon")
    }

    #[test]
    fn t62_weights_that_nobody_may_act_on_are_all_named() {
        let weight = |region: &str, weight| UnfitWeights::Weight { region: Name::parse(region).unwrap(), weight };
        assert_eq!(faults(&[("eu", 0.0), ("us", 1e-9)]), []);
        assert_eq!(faults(&[]), [UnfitWeights::NoRegion]);
        assert_eq!(faults(&[("eu", 0.0), ("us", 0.0)]), [UnfitWeights::NoWeight]);
        assert_eq!(faults(&[("eu", -1.0)]), [weight("eu", -1.0), UnfitWeights::NoWeight]);
        assert_eq!(faults(&[("eu", f64::INFINITY)]), [weight("eu", f64::INFINITY)]);
        let nan = faults(&[("eu", f64::NAN), ("us", 1.0)]);
        assert!(matches!(nan[..], [UnfitWeights::Weight { weight, .. }] if weight.is_nan()), "{nan:?}");
        assert_eq!(faults(&[("moon", 1.0)]), [UnfitWeights::Unknown { region: Name::parse("moon").unwrap() }]);
        assert_eq!(faults(&[("moon", -1.0), ("eu", f64::NEG_INFINITY)]).len(), 4, "each fault of each region");
    }

    #[test]
    fn what_is_no_number_counts_as_nothing_known() {
        assert_eq!([f64::NAN, f64::INFINITY, -1.0, 0.0, 2.5].map(weight_of), [0.0, 0.0, 0.0, 0.0, 2.5]);
        assert_eq!([f64::NAN, f64::INFINITY, -1.0, 1e-10, 0.3].map(share_of), [0.0, 1.0, 0.0, 0.0, 0.3]);
        assert_eq!([f64::NAN, f64::INFINITY, -1.0].map(rate_of), [None; 3]);
        assert_eq!([0.0, 7.0, f64::MAX].map(rate_of), [Some(0.0), Some(7.0), Some(1e12)]);
        assert!(rate_of(-0.0).unwrap().is_sign_positive());
    }
}
