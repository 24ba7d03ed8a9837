//! What ends a drill early: clients that suffer too much, a second region in doubt, nobody who says how it stands.
//!
//! The rule: a guard looks at all clients and at all regions but the target, and never needs the control plane to be
//! right: what is not known ends a drill too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::units::{Name, Percent};

/// When a drill is broken off.
#[derive(Clone, Debug, PartialEq)]
pub struct Guards {
    /// Share of all clients' requests that must be served. 50 %.
    pub success: Percent,
    /// How long it may be less. 10 s.
    pub success_for: Duration,
    /// How long a region other than the target may be suspected or out. 5 s.
    pub second_region_for: Duration,
    /// How long the control plane may say nothing. 30 s.
    pub blind_for: Duration,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            success: Percent::parse("50%").expect("a share"),
            success_for: Duration::from_secs(10),
            second_region_for: Duration::from_secs(5),
            blind_for: Duration::from_secs(30),
        }
    }
}

/// What was seen since the sample before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Requests that ended.
    pub requests: u64,
    /// Of these, not served.
    pub failed: u64,
    /// Regions other than the target that are suspected or out. None: the control plane does not say.
    pub doubted: Option<BTreeSet<Name>>,
}

/// Why a drill is broken off.
#[derive(Clone, Debug, PartialEq)]
pub enum Breach {
    Success { least: Percent, lasted: Duration },
    SecondRegion { region: Name, lasted: Duration },
    Blind { lasted: Duration },
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Success { least, lasted } => {
                let least = least.ratio() * 100.0;
                write!(f, "fewer than {least} % of all requests were served for {} s", lasted.as_secs())
            }
            Self::SecondRegion { region, lasted } => {
                write!(f, "a second region, {region}, was in doubt for {} s", lasted.as_secs())
            }
            Self::Blind { lasted } => write!(f, "the control plane said nothing for {} s", lasted.as_secs()),
        }
    }
}

/// The guards of one run.
#[derive(Clone, Debug)]
pub struct Watch {
    guards: Guards,
    /// Since when what is told of in a breach has been so, without a break.
    failing: Option<Duration>,
    doubted: BTreeMap<Name, Duration>,
    seen: Duration,
}

impl Watch {
    pub fn new(guards: Guards, now: Duration) -> Self {
        Self { guards, failing: None, doubted: BTreeMap::new(), seen: now }
    }

    /// A second without requests says nothing about their success.
    pub fn observe(&mut self, sample: &Sample, now: Duration) -> Option<Breach> {
        let Guards { success, success_for, second_region_for, blind_for } = self.guards;
        if sample.requests > 0 {
            let served = sample.requests.saturating_sub(sample.failed) as f64 / sample.requests as f64;
            self.failing = (served < success.ratio()).then(|| self.failing.unwrap_or(now));
        }
        if let Some(doubted) = &sample.doubted {
            self.seen = now;
            self.doubted.retain(|region, _| doubted.contains(region));
            for region in doubted {
                self.doubted.entry(region.clone()).or_insert(now);
            }
        }
        let lasted = |since: Duration| now.saturating_sub(since);
        if let Some(since) = self.failing.filter(|since| lasted(*since) >= success_for) {
            return Some(Breach::Success { least: success, lasted: lasted(since) });
        }
        let second = self.doubted.iter().find(|(_, since)| lasted(**since) >= second_region_for);
        if let Some((region, since)) = second {
            return Some(Breach::SecondRegion { region: region.clone(), lasted: lasted(*since) });
        }
        (lasted(self.seen) >= blind_for).then(|| Breach::Blind { lasted: lasted(self.seen) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sample(requests: u64, failed: u64, doubted: &[&str]) -> Sample {
        let doubted = doubted.iter().map(|name| Name::parse(name).unwrap()).collect();
        Sample { requests, failed, doubted: Some(doubted) }
    }

    fn watch() -> Watch {
        Watch::new(Guards::default(), Duration::ZERO)
    }

    #[test]
    fn too_few_served_for_too_long_is_a_breach_and_a_good_second_begins_anew() {
        let mut watch = watch();
        for second in 1..=10 {
            assert_eq!(watch.observe(&sample(10, 6, &[]), SECOND * second), None);
        }
        assert_eq!(watch.observe(&sample(10, 5, &[]), SECOND * 11), None, "half is enough");
        for second in 12..22 {
            assert_eq!(watch.observe(&sample(10, 10, &[]), SECOND * second), None);
        }
        assert!(matches!(watch.observe(&sample(0, 0, &[]), SECOND * 22), Some(Breach::Success { .. })));
    }

    #[test]
    fn a_second_region_in_doubt_is_a_breach() {
        let mut watch = watch();
        assert_eq!(watch.observe(&sample(1, 0, &["us"]), SECOND), None);
        assert_eq!(watch.observe(&sample(1, 0, &[]), SECOND * 5), None);
        assert_eq!(watch.observe(&sample(1, 0, &["us"]), SECOND * 6), None);
        let blind = Sample { doubted: None, ..sample(1, 0, &[]) };
        assert_eq!(watch.observe(&blind, SECOND * 10), None);
        let Some(Breach::SecondRegion { region, lasted }) = watch.observe(&blind, SECOND * 11) else {
            panic!("what is not known does not make it better")
        };
        assert_eq!((region.as_str(), lasted), ("us", SECOND * 5));
    }

    #[test]
    fn a_silent_control_plane_is_a_breach() {
        let mut watch = watch();
        let blind = Sample { requests: 5, failed: 0, doubted: None };
        assert_eq!(watch.observe(&blind, SECOND * 29), None);
        assert_eq!(watch.observe(&blind, SECOND * 30), Some(Breach::Blind { lasted: SECOND * 30 }));
    }
}
