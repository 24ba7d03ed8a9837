//! How much is asked of all regions together.
//!
//! The rule: the demand is the most that was asked in the last three minutes. A region that is lost takes the
//! measurement of its load with it, and its clients come back elsewhere one after the other; a plan that saw the
//! dip would find headroom that is not there. Three minutes are longer than the 120 s in which 99 % of
//! clients have moved. The price: after a peak, headroom is seen to return as much later.
//!
//! While nobody reports, the last sum stays.

use std::time::Duration;

use super::weights::rate_of;

/// A peak counts for as long as all slots together, up to one of them less.
const SLOT: Duration = Duration::from_secs(10);
const SLOTS: usize = 18;

/// The demand of the last three minutes. 450 bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    /// Number of the slot since the clock's beginning, and the most that was asked in it, in requests/s.
    slots: [Option<(u64, f64)>; SLOTS],
    latest: Option<f64>,
}

impl Demand {
    /// Requests per second that clients ask of each region now, refused ones included; those that another
    /// region's gateway forwarded count there alone. None where it is not known.
    pub fn observe(&mut self, loads: impl IntoIterator<Item = Option<f64>>, now: Duration) {
        let known = loads.into_iter().filter_map(|load| load.and_then(rate_of));
        let Some(asked) = known.reduce(|sum, load| sum + load) else { return };
        let number = slot_of(now);
        let place = usize::try_from(number % SLOTS as u64).unwrap_or_default();
        let Some(slot) = self.slots.get_mut(place) else { return };
        match slot {
            Some((at, most)) if *at == number => *most = most.max(asked),
            Some((at, _)) if *at > number => return,
            _ => *slot = Some((number, asked)),
        }
        self.latest = Some(asked);
    }

    /// Requests per second. None before the first measurement.
    pub fn at(&self, now: Duration) -> Option<f64> {
        let number = slot_of(now);
        let held = self.slots.iter().flatten().filter(|(at, _)| at.saturating_add(SLOTS as u64) > number);
        held.map(|(_, most)| *most).reduce(f64::max).or(self.latest)
    }
}

fn slot_of(now: Duration) -> u64 {
    now.as_secs() / SLOT.as_secs()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_peak_is_held_while_a_lost_regions_clients_move() {
        let mut demand = Demand::default();
        assert_eq!(demand.at(SECOND), None);
        demand.observe([Some(100.0), Some(200.0)], SECOND);
        demand.observe([None, Some(200.0)], SECOND * 6);
        assert_eq!(demand.at(SECOND * 6), Some(300.0));
        for second in (10..180).step_by(5) {
            demand.observe([None, Some(250.0)], SECOND * second);
            assert_eq!(demand.at(SECOND * second), Some(300.0), "at {second} s");
        }
        demand.observe([None, Some(250.0)], SECOND * 180);
        assert_eq!(demand.at(SECOND * 180), Some(250.0));
    }

    #[test]
    fn without_reports_the_last_sum_stays() {
        let mut demand = Demand::default();
        demand.observe([Some(300.0)], SECOND);
        demand.observe([Some(100.0)], SECOND * 2);
        demand.observe([None, Some(f64::NAN), Some(-4.0)], SECOND * 3);
        assert_eq!(demand.at(SECOND * 3), Some(300.0));
        assert_eq!(demand.at(SECOND * 9_999), Some(100.0));
        demand.observe([Some(0.0)], SECOND * 9_999);
        assert_eq!(demand.at(SECOND * 9_999), Some(0.0), "nothing asked is a measurement");
    }

    #[test]
    fn time_that_steps_back_spoils_nothing() {
        let mut demand = Demand::default();
        demand.observe([Some(300.0)], SECOND * 200);
        demand.observe([Some(900.0)], SECOND * 20);
        assert_eq!(demand.at(SECOND * 200), Some(300.0), "a slot of the same place, but older");
        assert_eq!(demand.at(SECOND * 20), Some(300.0));
        demand.observe([Some(1.0)], Duration::MAX);
        assert_eq!(demand.at(Duration::MAX), Some(1.0));
    }

    proptest! {
        /// Against the list of all measurements.
        #[test]
        fn is_the_most_of_the_last_three_minutes(
            steps in proptest::collection::vec((0_u64..90, 0_u32..1_000), 1..60),
        ) {
            let (mut demand, mut all, mut now) = (Demand::default(), Vec::new(), 0);
            for (step, load) in steps {
                now += step;
                demand.observe([Some(f64::from(load))], SECOND * u32::try_from(now).unwrap());
                all.push((now, f64::from(load)));
                let most = all.iter().filter(|(at, _)| at / 10 + 18 > now / 10).map(|(_, load)| *load);
                prop_assert_eq!(demand.at(SECOND * u32::try_from(now).unwrap()), most.reduce(f64::max));
            }
        }
    }
}
