//! Which part of the answers of all DNS nodes each region got in the last 20 s, to be held against the plan.
//!
//! The rule: it speaks of answers, not of traffic: one answer to a resolver may serve thousands of clients.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use spillway_core::units::Name;
use spillway_proto::control;

/// Four heartbeats: more answers would be surer, and would tell later of a change.
const WINDOW: Duration = Duration::from_secs(20);
/// Heartbeats that are remembered: those of 256 DNS nodes.
const MOST: usize = 1_024;

#[derive(Debug, Default)]
pub(super) struct Answered(VecDeque<(Duration, BTreeMap<Name, u64>)>);

impl Answered {
    /// A heartbeat's. Regions that are not `known` are left out.
    pub(super) fn hear(&mut self, told: &control::Answers, known: impl Fn(&Name) -> bool, now: Duration) {
        self.forget(now);
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        let mut counts = BTreeMap::new();
        for told in &told.regions {
            if let Some(region) = Name::parse(&told.region).ok().filter(&known) {
                counts.insert(region, told.answers);
            }
        }
        self.0.push_back((now, counts));
    }

    pub(super) fn forget(&mut self, now: Duration) {
        while self.0.pop_front_if(|(at, _)| now.saturating_sub(*at) >= WINDOW).is_some() {}
    }

    /// A region's part of all answers; none where nothing was answered.
    pub(super) fn part(&self, region: &Name) -> Option<f64> {
        let sum = |counts: &BTreeMap<Name, u64>| counts.values().map(|count| *count as f64).sum::<f64>();
        let all: f64 = self.0.iter().map(|(_, counts)| sum(counts)).sum();
        let its = |counts: &BTreeMap<Name, u64>| counts.get(region).map_or(0.0, |count| *count as f64);
        (all > 0.0).then(|| self.0.iter().map(|(_, counts)| its(counts)).sum::<f64>() / all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn told(regions: &[(&str, u64)]) -> control::Answers {
        let region =
            |(region, answers): &(&str, u64)| control::RegionAnswers { region: (*region).into(), answers: *answers };
        control::Answers { regions: regions.iter().map(region).collect() }
    }

    #[test]
    fn parts_are_of_all_nodes_answers_of_late() {
        let mut answered = Answered::default();
        let known = |region: &Name| region.as_str() != "mars";
        assert_eq!(answered.part(&name("eu")), None);
        answered.hear(&told(&[("eu", 10), ("us", 10)]), known, SECOND);
        answered.hear(&told(&[("eu", 10), ("mars", 1_000), ("no name!", 7)]), known, SECOND * 10);
        assert_eq!((answered.part(&name("eu")), answered.part(&name("us"))), (Some(20.0 / 30.0), Some(10.0 / 30.0)));
        assert_eq!(answered.part(&name("mars")), Some(0.0));
        answered.forget(SECOND * 21);
        assert_eq!(answered.part(&name("eu")), Some(1.0));
        answered.forget(SECOND * 30);
        assert_eq!(answered.part(&name("eu")), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut answered = Answered::default();
        for _ in 0..2 * MOST {
            answered.hear(&told(&[("eu", u64::MAX)]), |_| true, SECOND);
        }
        assert_eq!((answered.0.len(), answered.part(&name("eu"))), (MOST, Some(1.0)));
    }
}
