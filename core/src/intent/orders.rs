//! Which overrides of regions are taken.
//!
//! The rule: an order ends, says why it was given, and never leaves all traffic without a region.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::units::Name;

/// The longest that an order may hold.
pub const LONGEST: Duration = Duration::from_secs(7 * 86_400);
/// Bytes of a reason.
pub const MOST_REASON: usize = 1_024;
/// As with a Region's own weight.
pub const MOST_WEIGHT: f64 = 1_000_000.0;

/// What an operator ordered for a region.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// It takes nothing while another region is healthy.
    Drain,
    /// Instead of the planned weight.
    Weight(f64),
    /// Health does not take it out.
    ForceIn,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    pub act: Act,
    /// Since 1970.
    pub until: Duration,
    pub reason: String,
}

/// Why an order is not taken. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("there is no Region '{0}'")]
    UnknownRegion(Name),
    #[error("it would have ended already")]
    Past,
    #[error("it would hold for longer than 7d, which is the most")]
    TooLong,
    #[error("a reason is needed, of at most {MOST_REASON} bytes")]
    Reason,
    #[error("expected a weight from 0 to {MOST_WEIGHT}")]
    Weight,
    #[error("'{0}' is the last region that is to take traffic; lift another override first")]
    LastRegion(Name),
}

/// Whether an order for `region` is taken. `planned` has each region's own weight, `in_force` the orders of others and
/// of this region; those that have ended count for nothing.
pub fn check(
    region: &Name,
    order: &Order,
    planned: &BTreeMap<Name, f64>,
    in_force: &BTreeMap<Name, Order>,
    now: Duration,
) -> Result<(), Unfit> {
    if !planned.contains_key(region) {
        return Err(Unfit::UnknownRegion(region.clone()));
    }
    if order.until <= now {
        return Err(Unfit::Past);
    }
    if order.until - now > LONGEST {
        return Err(Unfit::TooLong);
    }
    if order.reason.trim().is_empty() || order.reason.len() > MOST_REASON {
        return Err(Unfit::Reason);
    }
    if let Act::Weight(weight) = order.act
        && !(0.0..=MOST_WEIGHT).contains(&weight)
    {
        return Err(Unfit::Weight);
    }
    let takes_traffic = |name: &Name, weight: f64| {
        let holding = in_force.get(name).filter(|order| order.until > now);
        let order = if name == region { Some(order) } else { holding };
        match order.map(|order| order.act) {
            Some(Act::Drain) => false,
            Some(Act::Weight(weight)) => weight > 0.0,
            Some(Act::ForceIn) | None => weight > 0.0,
        }
    };
    if matches!(order.act, Act::ForceIn) || planned.iter().any(|(name, weight)| takes_traffic(name, *weight)) {
        return Ok(());
    }
    Err(Unfit::LastRegion(region.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_000_000);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn order(act: Act) -> Order {
        Order { act, until: NOW + Duration::from_secs(60), reason: "maintenance".into() }
    }

    fn planned(regions: &[(&str, f64)]) -> BTreeMap<Name, f64> {
        regions.iter().map(|(region, weight)| (name(region), *weight)).collect()
    }

    fn judge(region: &str, order: &Order, in_force: &[(&str, Order)]) -> Result<(), Unfit> {
        let in_force = in_force.iter().map(|(region, order)| (name(region), order.clone())).collect();
        check(&name(region), order, &planned(&[("eu", 1.0), ("us", 1.0), ("ap", 0.0)]), &in_force, NOW)
    }

    #[test]
    fn an_order_ends_has_a_reason_and_a_region() {
        let good = order(Act::Drain);
        let with = |change: fn(&mut Order)| {
            let mut order = good.clone();
            change(&mut order);
            judge("eu", &order, &[])
        };
        assert_eq!(judge("eu", &good, &[]), Ok(()));
        assert_eq!(judge("mars", &good, &[]), Err(Unfit::UnknownRegion(name("mars"))));
        assert_eq!(with(|order| order.until = NOW), Err(Unfit::Past));
        assert_eq!(with(|order| order.until = NOW + LONGEST), Ok(()));
        assert_eq!(with(|order| order.until = NOW + LONGEST + Duration::from_millis(1)), Err(Unfit::TooLong));
        assert_eq!(with(|order| order.reason = "  ".into()), Err(Unfit::Reason));
        assert_eq!(with(|order| order.reason = "x".repeat(MOST_REASON + 1)), Err(Unfit::Reason));
        for weight in [-1.0, f64::NAN, f64::INFINITY, MOST_WEIGHT * 2.0] {
            assert_eq!(judge("eu", &order(Act::Weight(weight)), &[]), Err(Unfit::Weight), "{weight}");
        }
    }

    #[test]
    fn the_last_region_that_takes_traffic_is_not_taken_out() {
        let drained = [("us", order(Act::Drain))];
        let last = Err(Unfit::LastRegion(name("eu")));
        assert_eq!(judge("eu", &order(Act::Drain), &drained), last);
        assert_eq!(judge("eu", &order(Act::Weight(0.0)), &drained), last);
        assert_eq!(judge("eu", &order(Act::Drain), &[("us", order(Act::Weight(0.0)))]), last);
        // One that is planned to have nothing does not count, unless an order gives it something.
        let helped = [drained[0].clone(), ("ap", order(Act::Weight(1.0)))];
        assert_eq!(judge("eu", &order(Act::Drain), &helped), Ok(()));
        let ended = Order { until: NOW, ..order(Act::Drain) };
        assert_eq!(judge("eu", &order(Act::Drain), &[("us", ended)]), Ok(()));
        assert_eq!(judge("us", &order(Act::Drain), &drained), Ok(()), "in place of the same");
        assert_eq!(judge("eu", &order(Act::ForceIn), &drained), Ok(()));
    }
}
