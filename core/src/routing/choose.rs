//! The one decision on where a request goes: which pod of a pool, and why.
//!
//! The rule: a pod that was tried is never given again, one without weight never at all, and a pod that
//! may serve is always found if there is one. If none may, but some were not tried, the request goes to
//! one of those rather than nowhere: panic routing.
//!
//! It reads the pods through a closure and allocates nothing. It does not judge them: who is usable, and
//! when panic begins, is the outlier detector's word. Until that is spoken, least request counts a pod's
//! failures as load, so that errors which take no time attract no traffic.

use std::time::Duration;

use super::bounded::{Bounded, Fresh, LOAD_FACTOR, Load, Totals};
use super::slow_start::SLOW_START;
use super::weighted::turn;
use super::{HotSettings, Ring, share_of, weight_of};

/// How a model's requests are spread over its pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// By the entity: along the ring with bounded load, spread if the entity is hot. Requests without
    /// one key go by least request.
    #[default]
    Ring,
    /// The less loaded of two at random.
    LeastRequest,
    /// In turn, in proportion to weights.
    WeightedRoundRobin,
    /// By the client's address along the ring, whatever the load.
    SourceAddress,
}

impl Policy {
    /// As operators write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::LeastRequest => "least_request",
            Self::WeightedRoundRobin => "weighted_round_robin",
            Self::SourceAddress => "source_address",
        }
    }
}

/// How a model's requests find their pod.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingSettings {
    /// Default: the ring.
    pub policy: Policy,
    /// The most load of a pod, as a multiple of its share of the pool's. Default 1.25.
    pub load_factor: f64,
    /// Pods that a hot entity is spread over, up to [`MAX_SPREAD`]; 1 switches it off. Default 4.
    pub spread: usize,
    /// From when on an entity is hot.
    pub hot: HotSettings,
    /// How long a new or healed pod's weight rises ([`super::slow_start`]); 0 switches it off.
    /// Default 30 s.
    pub slow_start: Duration,
    /// A load report older than this says nothing any more. Default 1 s.
    pub report_life: Duration,
}

impl Default for RoutingSettings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            load_factor: LOAD_FACTOR,
            spread: 4,
            hot: HotSettings::default(),
            slow_start: SLOW_START,
            report_life: Duration::from_secs(1),
        }
    }
}

/// The most pods that a hot entity is spread over.
pub const MAX_SPREAD: usize = 16;

/// One request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Its place on the ring: [`super::key_hash`] of its entity, or [`super::address_hash`] of the client
    /// for [`Policy::SourceAddress`]. None if it has no one key.
    pub key: Option<u64>,
    /// Whether its entity is hot.
    pub hot: bool,
    /// Whether so few pods are usable that all count as such.
    pub panic: bool,
    /// Uniformly random.
    pub random: u64,
}

/// One pod as it is now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Not ejected, its breaker not open, its checks not failed.
    pub usable: bool,
    /// Had this request before.
    pub tried: bool,
    /// Requests of this gateway in flight there.
    pub in_flight: usize,
    /// What the pod last said of its load.
    pub report: Option<Report>,
    /// Configured weight × slow start; only the proportions between pods count. 0 takes no request, also
    /// in panic.
    pub weight: f64,
    /// The share of its recent answers that were failures, 0 to 1.
    pub failing: f64,
}

/// A pod's own report of its load (ORCA).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// What it said.
    pub reported: Reported,
    /// The time since it came.
    pub age: Duration,
}

/// What a pod says of its load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reported {
    /// The busy share of what it can do, 0 to 1.
    Utilisation(f64),
    /// Requests there from all gateways, waiting or running.
    Requests(usize),
}

/// The pod of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its index on the ring.
    pub pod: usize,
    /// Why it is this one.
    pub reason: Reason,
}

/// Why it is this pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The key's first pod.
    Owner,
    /// The next on the ring: those before it may not serve or were tried.
    Successor,
    /// Further on the ring: one before it is over its bound.
    Bounded,
    /// One of the pods that a hot entity is spread over.
    Spread,
    /// The less loaded of two.
    LessLoaded,
    /// Its turn.
    Turn,
    /// No other pod could be taken.
    OnlyOne,
    /// No pod is known to be able to serve.
    Panic,
}

impl Reason {
    /// As metrics and `explain` call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Successor => "successor",
            Self::Bounded => "bounded",
            Self::Spread => "spread",
            Self::LessLoaded => "less_loaded",
            Self::Turn => "turn",
            Self::OnlyOne => "only_one",
            Self::Panic => "panic",
        }
    }
}

/// The pod for a request. `pod` gives each pod of the ring's list by its index; `next_turn` the next
/// number of the pool's counter, asked for by weighted round robin alone; `totals` what the pool carries
/// ([`Bounded`]), asked for on the ring where a key's pod is not idle.
///
/// None only if every pod with weight was tried. O(1) by least request and O(log pods) on the ring while
/// few pods are full or out and totals are remembered, else O(pods).
pub fn choose(
    settings: &RoutingSettings,
    call: &Call,
    ring: &Ring,
    pod: impl Fn(usize) -> Candidate,
    mut next_turn: impl FnMut() -> u64,
    totals: impl Fn(Fresh, &dyn Fn() -> Totals) -> Totals,
) -> Option<Choice> {
    let mut pods = Pods { settings, ring, pod, totals, panic: call.panic };
    let chosen = pods.choose(call, &mut next_turn);
    if chosen.is_some() || call.panic {
        return chosen;
    }
    pods.panic = true;
    pods.choose(call, &mut next_turn)
}

/// The pods of a pool as one call sees them.
struct Pods<'a, F, T> {
    settings: &'a RoutingSettings,
    ring: &'a Ring,
    pod: F,
    totals: T,
    /// All pods count as usable.
    panic: bool,
}

impl<F: Fn(usize) -> Candidate, T: Fn(Fresh, &dyn Fn() -> Totals) -> Totals> Pods<'_, F, T> {
    fn choose(&self, call: &Call, next_turn: impl FnMut() -> u64) -> Option<Choice> {
        let choice = match (self.settings.policy, call.key) {
            (Policy::Ring, Some(key)) => self.by_entity(key, call.hot, call.random),
            (Policy::SourceAddress, Some(key)) => self.by_address(key),
            (Policy::WeightedRoundRobin, _) => self.by_turn(next_turn),
            (Policy::LeastRequest, _) | (_, None) => self.by_load(call.random),
        };
        choice.map(|choice| if self.panic { Choice { reason: Reason::Panic, ..choice } } else { choice })
    }

    fn by_entity(&self, key: u64, hot: bool, random: u64) -> Option<Choice> {
        // In panic others are counted: sums of theirs are not to be remembered.
        let totals = |fresh, sum: &dyn Fn() -> Totals| if self.panic { sum() } else { (self.totals)(fresh, sum) };
        let bounded = Bounded::new(self.ring, self.settings.load_factor, |pod| self.load(pod), totals);
        if hot
            && let Some(pod) = self.spread(key, random)
            && self.load(pod).is_some_and(|load| bounded.admits(&load))
        {
            return Some(Choice { pod, reason: Reason::Spread });
        }
        let placed = bounded.place(key)?;
        let reason = if placed.passed_full { Reason::Bounded } else { self.rank(key, placed.pod) };
        Some(Choice { pod: placed.pod, reason })
    }

    /// The less loaded of two of the first pods in the key's order. None if there are no two.
    fn spread(&self, key: u64, random: u64) -> Option<usize> {
        let mut near = [0; MAX_SPREAD];
        let mut count = 0;
        let free = self.ring.order(key).filter(|pod| self.free(*pod).is_some());
        for (place, pod) in near.iter_mut().zip(free.take(self.settings.spread)) {
            *place = pod;
            count += 1;
        }
        let (one, other) = two_of(mix(random, 0), count)?;
        let (one, other) = (near[one], near[other]);
        Some(self.less_loaded((one, self.free(one)?), (other, self.free(other)?)))
    }

    fn by_address(&self, key: u64) -> Option<Choice> {
        let first = self.ring.order(key).find(|pod| self.free(*pod).is_some());
        // A pod may have weight without a place on the ring.
        let pod = first.or_else(|| (0..self.ring.pods()).find(|pod| self.free(*pod).is_some()))?;
        Some(Choice { pod, reason: self.rank(key, pod) })
    }

    fn by_turn(&self, next_turn: impl FnMut() -> u64) -> Option<Choice> {
        let weight = |pod| self.free(pod).map_or(0.0, |pod| pod.weight);
        let pod = turn(self.ring.pods(), weight, next_turn)?;
        Some(Choice { pod, reason: Reason::Turn })
    }

    /// Power of two choices: the longest queue is O(log log n), not O(log n). Mitzenmacher, "The Power of
    /// Two Choices in Randomized Load Balancing" (2001).
    fn by_load(&self, random: u64) -> Option<Choice> {
        /// With half of the pods out, one call in ten has to look at all of them.
        const DRAWS: u64 = 8;
        let count = self.ring.pods();
        let drawn = (0..DRAWS).find_map(|draw| {
            let (one, other) = two_of(mix(random, draw), count)?;
            Some(((one, self.free(one)?), (other, self.free(other)?)))
        });
        let (one, other) = match drawn {
            Some((one, other)) => (one, other),
            None => match self.sample(mix(random, DRAWS)) {
                [Some(one), Some(other)] => (one, other),
                [only, _] => return Some(Choice { pod: only?.0, reason: Reason::OnlyOne }),
            },
        };
        Some(Choice { pod: self.less_loaded(one, other), reason: Reason::LessLoaded })
    }

    /// Two free pods, each pair as likely, or as many as there are (Vitter's reservoir, algorithm R).
    fn sample(&self, random: u64) -> [Option<(usize, Candidate)>; 2] {
        let mut sample = [None; 2];
        let free = (0..self.ring.pods()).filter_map(|pod| Some((pod, self.free(pod)?)));
        for (seen, pod) in free.enumerate() {
            let place = if seen < 2 { seen } else { below(mix(random, seen as u64), seen + 1) };
            if let Some(kept) = sample.get_mut(place) {
                *kept = Some(pod);
            }
        }
        // On a tie the first wins, and it must not be the one that stands first in the list.
        if sample[1].is_some() && mix(random, 0) & 1 == 1 {
            sample.swap(0, 1);
        }
        sample
    }

    /// On a tie the first.
    fn less_loaded(&self, one: (usize, Candidate), other: (usize, Candidate)) -> usize {
        if self.score(&other.1) < self.score(&one.1) { other.0 } else { one.0 }
    }

    /// The load of a pod for its weight, with the request to be placed: less is better.
    ///
    /// `(in flight + 1) / (weight × (1 - utilisation) × (1 - failing))`. A queue at utilisation u is
    /// 1 / (1 - u) long (M/M/1). Of answers of which the share f are errors that take no time, 1 - f are
    /// in flight that else would be: with the division a pod looks as busy as one that works.
    fn score(&self, pod: &Candidate) -> f64 {
        /// What is left of a weight at least: a report or a bad moment does not shut a pod out.
        const MIN_IDLE: f64 = 0.1;
        const MIN_GOOD: f64 = 0.01;
        let (mut in_flight, mut idle) = (pod.in_flight, 1.0);
        match pod.report.filter(|report| report.age <= self.settings.report_life).map(|report| report.reported) {
            Some(Reported::Utilisation(utilisation)) => idle = 1.0 - share_of(utilisation),
            Some(Reported::Requests(requests)) => in_flight = in_flight.max(requests),
            None => {}
        }
        let good = 1.0 - share_of(pod.failing);
        (in_flight as f64 + 1.0) / (pod.weight * idle.max(MIN_IDLE) * good.max(MIN_GOOD))
    }

    /// A pod that takes traffic and was not tried.
    fn free(&self, pod: usize) -> Option<Candidate> {
        self.serving(pod).filter(|pod| !pod.tried)
    }

    /// A pod that takes traffic.
    fn serving(&self, pod: usize) -> Option<Candidate> {
        Some((self.pod)(pod)).filter(|pod| (pod.usable || self.panic) && weight_of(pod.weight) > 0.0)
    }

    fn load(&self, pod: usize) -> Option<Load> {
        self.serving(pod).map(|pod| Load { in_flight: pod.in_flight, weight: pod.weight, free: !pod.tried })
    }

    fn rank(&self, key: u64, pod: usize) -> Reason {
        if self.ring.owner(key) == Some(pod) { Reason::Owner } else { Reason::Successor }
    }
}

/// Two different numbers below `count`, each pair as likely. None if there are no two.
fn two_of(random: u64, count: usize) -> Option<(usize, usize)> {
    let others = count.checked_sub(1).filter(|others| *others > 0)?;
    let one = below(random, count);
    let step = 1 + below(mix(random, 0), others);
    Some((one, (one + step) % count))
}

/// A number below `count`, by multiplication (Lemire, "Fast Random Integer Generation in an Interval", 2019).
fn below(random: u64, count: usize) -> usize {
    ((u128::from(random) * count as u128) >> 64) as usize
}

/// The `index`-th number drawn from a seed: SplitMix64 (Steele, Lea, Flood, 2014).
fn mix(seed: u64, index: u64) -> u64 {
    let mut mixed = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
