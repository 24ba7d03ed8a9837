//! What all vantages together say of each region.
//!
//! The rule: a region is down when more than half of its pairs (a vantage, a gateway) have failed, among those of
//! which something is known, and at least two vantages see it so.
//!
//! Whose word counts:
//!
//! * A vantage has no pairs in its own region: it would not get there the way that clients do.
//! * A vantage that sees nothing at all is itself cut off, and counts for nothing: no probe of its was answered last,
//!   in two regions or more that should answer. One region's silence cannot tell who of the two is cut off; then the
//!   vantage counts, as one of many. Regions that are out already are not expected to answer.
//! * A vantage that has not reported of late knows nothing. Unknown is not down.
//! * Nobody is taken out on the word of one vantage, unless there is only one that could give it.
//!
//! That a region answers, one vantage is enough to prove.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use super::probe::{Outcome, Pair, ProbeSettings, Seen};
use crate::units::Name;

/// When a region is down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerdictSettings {
    pub probe: ProbeSettings,
    /// Vantages that must see a region down, or all that probe it if they are fewer. 2.
    pub vantages: usize,
}

impl Default for VerdictSettings {
    fn default() -> Self {
        Self { probe: ProbeSettings::default(), vantages: 2 }
    }
}

/// Who is probed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gateway {
    pub region: Name,
    pub node: Name,
}

/// Who probes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vantage {
    Gateway(Gateway),
    /// `region` is none for a node that stands outside of all regions, and so has a word on each.
    Control {
        region: Option<Name>,
        node: Name,
    },
    /// `region` as of a control node.
    Dns {
        region: Option<Name>,
        node: Name,
    },
}

impl Vantage {
    /// The region on which it has no word.
    pub fn region(&self) -> Option<&Name> {
        match self {
            Self::Gateway(gateway) => Some(&gateway.region),
            Self::Control { region, .. } | Self::Dns { region, .. } => region.as_ref(),
        }
    }
}

/// What is seen of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// Nobody who counts has reported of late. What was so stays so.
    #[default]
    Unknown,
    Up,
    /// Some pairs have failed, no more than half.
    SomeFailing,
    /// Of more than half of the pairs the last probe failed, but that is not enough to be down.
    Doubtful,
    Down,
}

impl View {
    /// Whether the region can be given traffic.
    pub fn is_good(self) -> bool {
        matches!(self, Self::Up | Self::SomeFailing)
    }
}

/// A region's view and what it was made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    pub view: View,
    /// Pairs of which something is known, without those of isolated vantages.
    pub known: usize,
    /// Of the known: those that failed their last probe, but not enough in a row.
    pub failing: usize,
    /// Of the known: those that have failed.
    pub failed: usize,
    /// Vantages for which more than half of their known pairs here have failed.
    pub against: usize,
    /// Vantages that have known pairs here.
    pub vantages: usize,
    /// Vantages that probe here, known or not, isolated or not.
    pub configured: usize,
    /// More than half of the known pairs had at least so many good probes in a row.
    pub clean: u32,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { known, failing, failed, against, vantages, configured, .. } = self;
        if *known == 0 {
            return write!(f, "nothing is known: none of {configured} vantages counts");
        }
        write!(f, "{failed} of {known} pairs failed, {failing} failing; down for {against} of {vantages} vantages")?;
        if vantages < configured { write!(f, ", {} more do not count", configured - vantages) } else { Ok(()) }
    }
}

/// All regions at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    pub regions: BTreeMap<Name, Evidence>,
    /// Vantages that see nothing and count for nothing.
    pub isolated: BTreeSet<Vantage>,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// It is of a pair that there is not.
    Ignored,
    Counted,
    /// The first refusal: all other vantages should [`super::Schedule::nudge`] their probes of this gateway, so that
    /// they agree within seconds.
    Urgent,
}

/// All pairs. Bounded by vantages times gateways, which only [`Board::keep`] sets.
#[derive(Clone, Debug, Default)]
pub struct Board {
    settings: VerdictSettings,
    regions: BTreeSet<Name>,
    pairs: BTreeMap<Vantage, BTreeMap<Gateway, Pair>>,
}

impl Board {
    /// Without pairs.
    pub fn new(settings: VerdictSettings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Says which vantages and gateways there are. What is known of those that stay is kept.
    pub fn keep(&mut self, vantages: &BTreeSet<Vantage>, gateways: &BTreeSet<Gateway>) {
        self.regions = gateways.iter().map(|gateway| gateway.region.clone()).collect();
        self.pairs.retain(|vantage, _| vantages.contains(vantage));
        for vantage in vantages {
            let pairs = self.pairs.entry(vantage.clone()).or_default();
            pairs.retain(|gateway, _| gateways.contains(gateway));
            for gateway in gateways.iter().filter(|gateway| vantage.region() != Some(&gateway.region)) {
                pairs.entry(gateway.clone()).or_default();
            }
        }
    }

    /// A vantage reports the end of a probe.
    pub fn record(&mut self, vantage: &Vantage, gateway: &Gateway, outcome: Outcome, now: Duration) -> Noted {
        let Some(pair) = self.pairs.get_mut(vantage).and_then(|pairs| pairs.get_mut(gateway)) else {
            return Noted::Ignored;
        };
        pair.record(outcome, &self.settings.probe, now);
        if outcome == Outcome::Refused && pair.failures() == 1 { Noted::Urgent } else { Noted::Counted }
    }

    pub fn pair(&self, vantage: &Vantage, gateway: &Gateway) -> Option<&Pair> {
        self.pairs.get(vantage)?.get(gateway)
    }

    /// What is seen now. `out` are the regions that are not expected to answer.
    pub fn judge(&self, out: &BTreeSet<Name>, now: Duration) -> Judgement {
        let mut tallies: BTreeMap<&Name, Tally> = self.regions.iter().map(|name| (name, Tally::default())).collect();
        let mut isolated = BTreeSet::new();
        let probe = &self.settings.probe;
        for (vantage, pairs) in &self.pairs {
            let sights: Vec<Sight<'_>> =
                pairs.iter().map(|(gateway, pair)| Sight::of(gateway, pair, probe, now)).collect();
            let is_isolated = sees_nothing(&sights, out);
            if is_isolated {
                isolated.insert(vantage.clone());
            }
            // Gateways are sorted by region.
            for of_region in sights.chunk_by(|one, next| one.region == next.region) {
                let Some(tally) = of_region.first().and_then(|sight| tallies.get_mut(sight.region)) else { continue };
                tally.configured += 1;
                if !is_isolated {
                    tally.add(of_region);
                }
            }
        }
        let least = self.settings.vantages;
        let regions = tallies.into_iter().map(|(name, tally)| (name.clone(), tally.evidence(least))).collect();
        Judgement { regions, isolated }
    }
}

/// What one vantage sees of one gateway.
struct Sight<'a> {
    region: &'a Name,
    seen: Seen,
    /// Good probes in a row.
    clean: u32,
}

impl<'a> Sight<'a> {
    fn of(gateway: &'a Gateway, pair: &Pair, probe: &ProbeSettings, now: Duration) -> Self {
        Self { region: &gateway.region, seen: pair.seen(probe, now), clean: pair.clean() }
    }
}

fn sees_nothing(sights: &[Sight<'_>], out: &BTreeSet<Name>) -> bool {
    let known = || sights.iter().filter(|sight| sight.seen != Seen::Unknown);
    let mut silent = known().map(|sight| sight.region).filter(|region| !out.contains(*region));
    let first = silent.next();
    silent.any(|region| Some(region) != first) && known().all(|sight| sight.seen != Seen::Answering)
}

#[derive(Default)]
struct Tally {
    /// Good probes in a row, for each known pair.
    clean: Vec<u32>,
    failing: usize,
    failed: usize,
    against: usize,
    vantages: usize,
    configured: usize,
}

impl Tally {
    /// Adds what one vantage sees of the region.
    fn add(&mut self, sights: &[Sight<'_>]) {
        let before = self.clean.len();
        self.clean.extend(sights.iter().filter(|sight| sight.seen != Seen::Unknown).map(|sight| sight.clean));
        let known = self.clean.len() - before;
        let count = |seen| sights.iter().filter(|sight| sight.seen == seen).count();
        let failed = count(Seen::Failed);
        self.failing += count(Seen::Failing);
        self.failed += failed;
        self.vantages += usize::from(known > 0);
        self.against += usize::from(failed * 2 > known);
    }

    fn evidence(mut self, least: usize) -> Evidence {
        let Self { failing, failed, against, vantages, configured, .. } = self;
        let known = self.clean.len();
        let view = if known == 0 {
            View::Unknown
        } else if failed * 2 > known && against >= least.min(configured) {
            View::Down
        } else if (failed + failing) * 2 > known {
            View::Doubtful
        } else if failed > 0 {
            View::SomeFailing
        } else {
            View::Up
        };
        self.clean.sort_unstable();
        // Those from here on are more than half.
        let clean = self.clean.get((known.saturating_sub(1)) / 2).copied().unwrap_or_default();
        Evidence { view, known, failing, failed, against, vantages, configured, clean }
    }
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
