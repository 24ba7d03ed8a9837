//! Operators' overrides, as the fleet and the plan take them.
//!
//! The rule: the wall clock says when an override ends, and nothing else. One that the fleet refuses, or has ended by
//! itself because no region would have been left, stays without effect until the operator changes it. One of a region
//! that is not there waits for it: the fleet forgets whom it loses, and the override holds still.

use std::collections::BTreeMap;
use std::time::Duration;

use spillway_core::failover::{self, Act};
use spillway_core::health::{Event, Fleet, Order, Pin, Refused, What};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_proto::control::r#override::Act as Asked;

/// Where things stand in time: by the monotonic clock, and since 1970.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) now: Duration,
    pub(super) wall: Duration,
}

/// Each region's override, and what became of it.
#[derive(Debug, Default)]
pub(super) struct Orders(BTreeMap<Name, (control::Override, Effect)>);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Effect {
    /// The fleet has it.
    Pinned,
    /// The plan has it.
    Weighed(f64),
    /// The fleet has no such region.
    Waits,
    None,
}

impl Orders {
    /// Takes in what operators want now. What was refused is told in words.
    pub(super) fn take(
        &mut self,
        wanted: &BTreeMap<Name, control::Override>,
        fleet: &mut Fleet,
        times: Times,
    ) -> (Vec<Event>, Vec<String>) {
        let (mut events, mut refused) = (Vec::new(), Vec::new());
        let in_force = |wanted: &&control::Override| until(wanted, times) > times.now;
        for (region, (_, effect)) in &self.0 {
            if *effect == Effect::Pinned && wanted.get(region).filter(in_force).is_none() {
                events.extend(fleet.lift(region, times.now));
            }
        }
        self.0.retain(|region, (_, effect)| {
            let applies = fleet.region(region).is_none() == (*effect == Effect::Waits);
            applies && wanted.get(region).filter(in_force).is_some()
        });
        for (region, wanted) in wanted.iter().filter(|(_, wanted)| in_force(wanted)) {
            let before = self.0.get(region);
            if before.is_some_and(|(known, _)| known == wanted) {
                continue;
            }
            let was_pinned = before.is_some_and(|(_, effect)| *effect == Effect::Pinned);
            let pin = match wanted.act {
                Some(Asked::Drain(true)) => Some(Pin::Out),
                Some(Asked::ForceIn(true)) => Some(Pin::In),
                Some(Asked::Weight(_) | Asked::Drain(false) | Asked::ForceIn(false)) | None => None,
            };
            if was_pinned && pin.is_none() {
                events.extend(fleet.lift(region, times.now));
            }
            let effect = match (pin, &wanted.act) {
                (Some(pin), _) => {
                    let order = Order { pin, until: until(wanted, times), reason: wanted.reason.as_str().into() };
                    match fleet.order(region, order, times.now) {
                        Ok(found) => {
                            events.extend(found);
                            Effect::Pinned
                        }
                        Err(why) => {
                            refused.push(format!("the override of '{region}' has no effect: {why}"));
                            if why == Refused::Unknown { Effect::Waits } else { Effect::None }
                        }
                    }
                }
                (None, _) if fleet.region(region).is_none() => Effect::Waits,
                (None, Some(Asked::Weight(weight))) => Effect::Weighed(*weight),
                (None, _) => Effect::None,
            };
            self.0.insert(region.clone(), (wanted.clone(), effect));
        }
        (events, refused)
    }

    /// The fleet ended some by itself. One whose time was over by the monotonic clock alone is taken again.
    pub(super) fn note(&mut self, events: &[Event]) {
        for event in events {
            let What::Ended(order) = &event.what else { continue };
            if order.until <= event.at {
                self.0.remove(&event.region);
            } else if let Some((_, effect)) = self.0.get_mut(&event.region) {
                *effect = Effect::None;
            }
        }
    }

    /// What the plan takes of a region's override.
    pub(super) fn of(&self, region: &Name, fleet: &Fleet, times: Times) -> Option<failover::Override> {
        let (wanted, effect) = self.0.get(region)?;
        let act = match effect {
            Effect::Weighed(weight) => Act::Weight(*weight),
            Effect::Pinned if fleet.region(region)?.pin() == Some(Pin::Out) => Act::Drain,
            Effect::Pinned | Effect::Waits | Effect::None => return None,
        };
        Some(failover::Override { act, until: until(wanted, times) })
    }
}

/// By the monotonic clock; in the past if it is over.
fn until(wanted: &control::Override, times: Times) -> Duration {
    let until = Duration::from_millis(u64::try_from(wanted.until_unix_ms).unwrap_or_default());
    match until.checked_sub(times.wall) {
        Some(left) if !left.is_zero() => times.now.saturating_add(left),
        _ => Duration::ZERO,
    }
}
