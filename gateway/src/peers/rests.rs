//! Regions that have just said that they cannot do more for a model, and are let be for a while.
//!
//! The rule: what was refused to a class is not asked again for it or for lower ones until then; what only came
//! worse than it should is asked again sooner or later, unless there is nothing else.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::limit::Class;
use spillway_core::units::Name;

/// A region is let be for as long as it asks, within these.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// How long a region whose answers are degraded is not preferred to this one's own degraded answers.
const LESSER: Duration = Duration::from_secs(2);
/// Pairs of region and model that are remembered.
const MOST: usize = 4_096;

#[derive(Debug, Default)]
pub struct Rests(Mutex<HashMap<(Name, String), Rest>>);

/// Times on the gateway's clock; zero: never.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    full: [Duration; Class::ALL.len()],
    lesser: Duration,
}

impl Rests {
    /// The region has no room for requests of this class.
    pub fn refused(&self, region: &Name, model: &str, class: Class, after: Duration, now: Duration) {
        let until = now + after.clamp(SHORTEST, LONGEST);
        self.change(region, model, now, |rest| {
            for (at, full) in rest.full.iter_mut().enumerate() {
                if at >= class as usize {
                    *full = until.max(*full);
                }
            }
            rest.lesser = rest.lesser.max(until);
        });
    }

    /// The region's answers are no better than one's own.
    pub fn lessened(&self, region: &Name, model: &str, now: Duration) {
        self.change(region, model, now, |rest| rest.lesser = now + LESSER);
    }

    pub fn is_full(&self, region: &Name, model: &str, class: Class, now: Duration) -> bool {
        self.find(region, model).is_some_and(|rest| rest.full.get(class as usize).is_some_and(|until| now < *until))
    }

    pub fn is_lesser(&self, region: &Name, model: &str, now: Duration) -> bool {
        self.find(region, model).is_some_and(|rest| now < rest.lesser)
    }

    fn find(&self, region: &Name, model: &str) -> Option<Rest> {
        let rests = self.0.lock();
        // The usual case costs no key.
        if rests.is_empty() { None } else { rests.get(&(region.clone(), model.to_owned())).copied() }
    }

    fn change(&self, region: &Name, model: &str, now: Duration, change: impl FnOnce(&mut Rest)) {
        let mut rests = self.0.lock();
        if rests.len() >= MOST {
            rests.retain(|_, rest| rest.full.iter().chain([&rest.lesser]).any(|until| now < *until));
        }
        if rests.len() < MOST {
            change(rests.entry((region.clone(), model.to_owned())).or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn what_was_refused_to_a_class_is_not_asked_again_for_it_or_below_for_a_while() {
        let (rests, us) = (Rests::default(), name("us"));
        rests.refused(&us, "eta", Class::Normal, SECOND, SECOND * 10);
        let full = |model: &str, class, now| rests.is_full(&us, model, class, now);
        let now = SECOND * 10 + SECOND / 2;
        assert_eq!(Class::ALL.map(|class| full("eta", class, now)), [false, false, true, true]);
        assert!(rests.is_lesser(&us, "eta", now));
        assert!(!full("eta", Class::Low, SECOND * 11) && !full("fraud", Class::Low, now));
        assert!(!rests.is_full(&name("ap"), "eta", Class::Low, now));
        rests.refused(&us, "eta", Class::Low, SECOND * 3_600, now);
        assert!(full("eta", Class::Low, now + LONGEST - SHORTEST) && !full("eta", Class::Low, now + LONGEST));
        rests.refused(&us, "fraud", Class::Low, Duration::ZERO, now);
        assert!(full("fraud", Class::Low, now + SHORTEST / 2));
    }

    #[test]
    fn a_region_of_lesser_answers_still_counts_as_having_room() {
        let (rests, us) = (Rests::default(), name("us"));
        rests.lessened(&us, "eta", SECOND);
        assert!(rests.is_lesser(&us, "eta", SECOND * 2) && !rests.is_full(&us, "eta", Class::Low, SECOND * 2));
        assert!(!rests.is_lesser(&us, "eta", SECOND + LESSER));
    }

    #[test]
    fn memory_of_rests_is_bounded_and_what_is_over_makes_room() {
        let (rests, us) = (Rests::default(), name("us"));
        for number in 0..2 * MOST {
            rests.lessened(&us, &format!("m{number}"), SECOND);
        }
        assert_eq!(rests.0.lock().len(), MOST);
        rests.lessened(&us, "late", SECOND * 100);
        assert_eq!(rests.0.lock().len(), 1);
        assert!(rests.is_lesser(&us, "late", SECOND * 100));
    }
}
