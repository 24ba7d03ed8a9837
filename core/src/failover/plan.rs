//! How much of the traffic each region gets.
//!
//! The rule: what a region cannot take goes to where there is room for it, what fits nowhere is said to be shed,
//! lowest class first, and some region is always answered.
//!
//! ```text
//! own      = planned weight x share that health allows          what a region keeps
//! lost     = 1 - sum of own                                     what the others carry for it
//! headroom = capacity x share - demand x own, at least 0        requests/s
//! weight   = own + lost that fits x headroom / sum of headroom  water-filled: proportional and bounded
//!                + lost that fits nowhere x own / sum of own    and to be shed there
//! ```
//!
//! A region that ramps up has as much of its capacity as of its weight. Loads enter as their sum alone
//! ([`super::Demand`]), never one by one: so a plan does not change because traffic follows it, and cannot swing.
//!
//! Of a region whose capacity is not known, nothing is known to be too much: it takes the part of the lost that falls
//! to its weight, and is never said to shed. Where the demand is not known, that holds for all. A planned weight of 0
//! takes nothing while any region with a weight is healthy.
//!
//! A plan keeps what it was made from, so that a node that holds it can make it again under its own view of health
//! ([`Plan::under`]), with the same result where the views agree.

use std::collections::BTreeMap;
use std::time::Duration;

use super::weights::{NOTHING, SUM_ERROR, UnfitWeights, check_weights, rate_of, share_of, weight_of};
use crate::limit::Class;
use crate::units::Name;

const CLASSES: usize = Class::ALL.len();

/// What a region that carries lost load asks of its autoscaler: half as much again (seed: `ScaleUp(region, 1.5)`).
const CARRYING_FACTOR: f64 = 1.5;

/// What is known of a region.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    /// Its planned weight; only the proportions between regions count.
    pub planned: f64,
    /// The share of it that its health allows: 0 when it is out, less than 1 while it ramps up.
    pub share: f64,
    /// Requests/s that it can serve, as measured.
    pub capacity: Option<f64>,
    /// Requests/s that clients ask of it.
    pub load: Option<f64>,
    /// What an operator ordered instead.
    pub overridden: Option<Override>,
}

/// An operator's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    pub act: Act,
    /// From then on it counts for nothing.
    pub until: Duration,
}

/// What an operator ordered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// This is the planned weight. Health goes before it.
    Weight(f64),
    /// It takes nothing while another region is healthy; what it was planned to have is carried as if lost.
    Drain,
}

/// What is asked of all regions together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Requests/s, from [`super::Demand`]. The sum of the loads where that is more.
    pub demand: Option<f64>,
    /// The proportions of the classes in it, in the order of [`Class::ALL`]. All 0 where they are not known: then all
    /// of it counts as normal.
    pub classes: [f64; CLASSES],
}

/// Whom a plan was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Basis {
    /// Healthy regions with a planned weight.
    Healthy,
    /// There are none; those with weight 0 that are healthy.
    Standby,
    /// There are none; the drained ones that are healthy.
    Drained,
    /// No region is healthy: the planned weights, as if all were. Those that are drained only if all are; all alike if
    /// none has a weight.
    Blind,
}

/// What a plan was made from, of one region.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// Planned or ordered weight as a part of all: they sum to 1 unless all are 0.
    pub planned: f64,
    /// 0 to 1.
    pub share: f64,
    pub drained: bool,
    /// Requests/s.
    pub capacity: Option<f64>,
}

/// What a region gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Allotment {
    pub terms: Terms,
    /// Part of all traffic, 0 to 1.
    pub weight: f64,
    /// Requests/s that follow from it, where the demand is known.
    pub load: Option<f64>,
    /// What of them does not fit.
    pub shed: Shed,
    /// Capacity that its autoscaler is asked for, as a multiple: 1.5 while it carries lost load, otherwise 1.
    pub capacity_factor: f64,
}

/// What is refused because it does not fit: the lowest class first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shed {
    /// Share of the load, 0 to 1.
    pub share: f64,
    /// Share of each class, in the order of [`Class::ALL`].
    pub classes: [f64; CLASSES],
}

/// Weights of all regions, and why. Not empty; the weights are finite and sum to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub version: u64,
    pub basis: Basis,
    /// Requests/s asked of all regions together.
    pub demand: Option<f64>,
    /// As in [`Traffic::classes`].
    pub classes: [f64; CLASSES],
    pub regions: BTreeMap<Name, Allotment>,
    /// Of all traffic.
    pub shed: Shed,
}

/// Why a node does not take a plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum UnfitPlan {
    #[error("the plan {offered} is not newer than {served}, which is served")]
    Older { offered: u64, served: u64 },
    #[error(transparent)]
    Weights(#[from] UnfitWeights),
    #[error("the weights sum to {sum}; expected 1")]
    Sum { sum: f64 },
    #[error("{what} of the region '{region}' cannot be what it is said to be")]
    Region { region: Name, what: &'static str },
    #[error("the demand is {demand}; expected a finite number, 0 or more")]
    Demand { demand: f64 },
}

impl Plan {
    /// The plan for these regions, or none if there are none: then the plan of before stays.
    pub fn of(version: u64, regions: &BTreeMap<Name, Region>, traffic: &Traffic, now: Duration) -> Option<Self> {
        let asked = regions.values().filter_map(|region| region.load.and_then(rate_of)).reduce(|sum, load| sum + load);
        let held = traffic.demand.and_then(rate_of);
        let demand = [held, asked].into_iter().flatten().reduce(f64::max);
        let planned: Vec<f64> = regions.values().map(|region| weight_of(region.planned_at(now))).collect();
        let terms = regions.iter().zip(parts_of(&planned)).map(|((name, region), planned)| {
            let share = share_of(region.share);
            let drained = region.act_at(now) == Some(Act::Drain);
            (name.clone(), Terms { planned, share, drained, capacity: region.capacity.and_then(rate_of) })
        });
        Self::from_terms(version, terms.collect(), demand, traffic.classes)
    }

    /// The same plan where `share` says what the health of a region allows; where it says nothing, as before.
    pub fn under(&self, share: impl Fn(&Name) -> Option<f64>) -> Self {
        let terms = self.regions.iter().map(|(name, allotment)| {
            let share = share(name).map_or(allotment.terms.share, share_of);
            (name.clone(), Terms { share, ..allotment.terms.clone() })
        });
        Self::from_terms(self.version, terms.collect(), self.demand, self.classes).unwrap_or_else(|| self.clone())
    }

    /// Part of all traffic; 0 for a region that is not in the plan.
    pub fn weight(&self, region: &Name) -> f64 {
        self.regions.get(region).map_or(0.0, |allotment| allotment.weight)
    }

    /// The least part of all traffic that moves when this plan follows `before`: what regions lose by it.
    pub fn moved_since(&self, before: &Self) -> f64 {
        let lost = |(name, allotment): (&Name, &Allotment)| (allotment.weight - self.weight(name)).max(0.0);
        before.regions.iter().map(lost).sum()
    }

    /// What a node asks of a plan that it is sent, beside the plan `served` now; `known` says which regions there are.
    /// All reasons at once (THREATS 62, 66, 67).
    pub fn check(&self, served: Option<u64>, known: impl Fn(&Name) -> bool) -> Result<(), Vec<UnfitPlan>> {
        let weights = self.regions.iter().map(|(name, allotment)| (name, allotment.weight));
        let mut faults: Vec<UnfitPlan> =
            check_weights(weights.clone(), known).into_iter().map(UnfitPlan::Weights).collect();
        let sum: f64 = weights.map(|(_, weight)| weight).sum();
        if faults.is_empty() && (sum - 1.0).abs() > SUM_ERROR {
            faults.push(UnfitPlan::Sum { sum });
        }
        let odd = |(name, allotment): (&Name, &Allotment)| {
            allotment.odd().map(|what| UnfitPlan::Region { region: name.clone(), what })
        };
        faults.extend(self.regions.iter().filter_map(odd));
        faults
            .extend(self.demand.filter(|demand| rate_of(*demand).is_none()).map(|demand| UnfitPlan::Demand { demand }));
        if let Some(served) = served.filter(|served| self.version <= *served) {
            faults.push(UnfitPlan::Older { offered: self.version, served });
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn from_terms(
        version: u64,
        terms: BTreeMap<Name, Terms>,
        demand: Option<f64>,
        classes: [f64; CLASSES],
    ) -> Option<Self> {
        let (basis, parts) = basis_of(&terms, demand)?;
        let lost: f64 = parts.iter().map(|part| part.lost).sum();
        let carried = water_fill(&parts, lost, demand);
        let total: f64 = parts.iter().zip(&carried).map(|(part, carried)| part.own + carried).sum();
        let mut shed = Shed::default();
        let regions = terms.into_iter().zip(parts).zip(carried).map(|(((name, terms), part), carried)| {
            let weight = (part.own + carried) / total;
            let load = demand.map(|demand| demand * weight);
            let excess = part.capacity.zip(load).map_or(0.0, |(capacity, load)| share_of((load - capacity) / load));
            let mine = Shed::of(excess, &classes);
            shed.add(&mine, weight);
            let capacity_factor = if carried > NOTHING { CARRYING_FACTOR } else { 1.0 };
            (name, Allotment { terms, weight, load, shed: mine, capacity_factor })
        });
        let regions = regions.collect();
        Some(Self { version, basis, demand, classes, regions, shed })
    }
}

impl Allotment {
    /// What of it no plan says, beside the weight. [`Plan::under`] relies on these.
    fn odd(&self) -> Option<&'static str> {
        let Self { terms, load, shed, capacity_factor, .. } = self;
        let part = |value: f64| (0.0..=1.0).contains(&value);
        let rate = |value: Option<f64>| value.is_none_or(|value| rate_of(value).is_some());
        if !part(terms.planned) {
            Some("the planned weight")
        } else if !part(terms.share) {
            Some("the share")
        } else if !rate(terms.capacity) {
            Some("the capacity")
        } else if !rate(*load) {
            Some("the load")
        } else if !part(shed.share) || !shed.classes.into_iter().all(part) {
            Some("what is shed")
        } else if rate_of(*capacity_factor).is_none() {
            Some("the capacity factor")
        } else {
            None
        }
    }
}

impl Region {
    fn act_at(&self, now: Duration) -> Option<Act> {
        self.overridden.as_ref().filter(|overridden| now < overridden.until).map(|overridden| overridden.act)
    }

    fn planned_at(&self, now: Duration) -> f64 {
        match self.act_at(now) {
            Some(Act::Weight(weight)) => weight,
            Some(Act::Drain) | None => self.planned,
        }
    }
}

impl Shed {
    /// The cut through classes of these proportions that leaves out `share` of the load.
    fn of(share: f64, classes: &[f64; CLASSES]) -> Self {
        let mut shed = Self::default();
        if share < NOTHING {
            return shed;
        }
        shed.share = share;
        let parts = parts_of(&classes.map(weight_of));
        let unknown = parts.iter().all(|part| *part == 0.0);
        let mut left = share;
        for (place, class) in Class::ALL.into_iter().enumerate().rev() {
            let normal = if class == Class::Normal { 1.0 } else { 0.0 };
            let part = if unknown { normal } else { parts.get(place).copied().unwrap_or_default() };
            let refused = if left >= part { 1.0 } else { left / part };
            if let Some(of_class) = shed.classes.get_mut(place)
                && left > NOTHING
            {
                *of_class = refused;
            }
            left = (left - part).max(0.0);
        }
        shed
    }

    /// Adds what is shed of a part of all traffic.
    fn add(&mut self, of_part: &Self, part: f64) {
        self.share += part * of_part.share;
        for (mine, theirs) in self.classes.iter_mut().zip(of_part.classes) {
            *mine += part * theirs;
        }
    }
}

/// A region as one basis sees it.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Shares of the demand: what it keeps and what it loses.
    own: f64,
    lost: f64,
    /// Requests/s that it may be given, if that is known.
    capacity: Option<f64>,
}

/// The first basis on which some region keeps something. None without regions.
fn basis_of(terms: &BTreeMap<Name, Terms>, demand: Option<f64>) -> Option<(Basis, Vec<Part>)> {
    type View = fn(&Terms) -> (f64, f64);
    fn undrained(terms: &Terms) -> f64 {
        if terms.drained { 0.0 } else { 1.0 }
    }
    let views: [(Basis, View); 7] = [
        (Basis::Healthy, |terms| (terms.planned, terms.share * undrained(terms))),
        (Basis::Standby, |terms| (1.0, terms.share * undrained(terms))),
        (Basis::Drained, |terms| (terms.planned, terms.share)),
        (Basis::Drained, |terms| (1.0, terms.share)),
        (Basis::Blind, |terms| (terms.planned * undrained(terms), 1.0)),
        (Basis::Blind, |terms| (terms.planned, 1.0)),
        (Basis::Blind, |_| (1.0, 1.0)),
    ];
    let keeps = |(_, view): &(Basis, View)| {
        terms.values().any(|terms| {
            let (weight, share) = view(terms);
            weight * share > 0.0
        })
    };
    let (basis, view) = views.into_iter().find(keeps)?;
    let viewed: Vec<(f64, f64)> = terms.values().map(view).collect();
    let total: f64 = viewed.iter().map(|(weight, _)| weight).sum();
    let part = |(terms, (weight, share)): (&Terms, (f64, f64))| {
        let weight = weight / total;
        // Without a healthy region no measurement says anything.
        let counts = demand.is_some() && basis != Basis::Blind;
        let capacity = terms.capacity.filter(|_| counts).map(|capacity| capacity * share);
        Part { own: weight * share, lost: weight * (1.0 - share), capacity }
    };
    Some((basis, terms.values().zip(viewed).map(part).collect()))
}

/// What each takes of the lost share.
fn water_fill(parts: &[Part], lost: f64, demand: Option<f64>) -> Vec<f64> {
    let headroom = |part: &Part| {
        let (capacity, demand) = part.capacity.zip(demand)?;
        (part.own > 0.0).then_some((capacity - demand * part.own).max(0.0))
    };
    let own = |bounded: bool| -> f64 {
        parts.iter().filter(|part| headroom(part).is_some() == bounded).map(|part| part.own).sum()
    };
    let (bounded, unbounded) = (own(true), own(false));
    let room: f64 = parts.iter().filter_map(headroom).sum();
    // Of the lost, what falls to regions of known capacity, and of that, what they have room for.
    let theirs = lost * (bounded / (bounded + unbounded));
    let fits = if room > 0.0 { (room / demand.unwrap_or_default()).min(theirs) } else { 0.0 };
    let takes = |part: &Part| match headroom(part) {
        _ if part.own <= 0.0 => 0.0,
        None => lost * (part.own / (bounded + unbounded)),
        Some(headroom) => {
            let filled = if room > 0.0 { fits * (headroom / room) } else { 0.0 };
            filled + (theirs - fits) * (part.own / bounded)
        }
    };
    parts.iter().map(takes).collect()
}

/// Weights as parts of their sum; all 0 if that is 0.
fn parts_of(weights: &[f64]) -> Vec<f64> {
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    if heaviest <= 0.0 {
        return vec![0.0; weights.len()];
    }
    // By the heaviest first, so that the sum is finite.
    let total: f64 = weights.iter().map(|weight| weight / heaviest).sum();
    weights.iter().map(|weight| share_of(weight / heaviest / total)).collect()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
