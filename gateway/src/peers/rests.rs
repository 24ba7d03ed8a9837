//! Regions that have just said that they cannot do more for a model, and are let be for a while.
//!
//! The rule: what was refused to a class is not asked again for it or for lower ones until then, of all tenants or of
//! the one that is the reason; what only came worse than it should is asked again sooner or later, unless there is
//! nothing else.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::limit::Class;
use spillway_core::units::Name;

/// A region is let be for as long as it asks, within these.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// How long a region whose answers are degraded is not preferred to this one's own degraded answers.
const LESSER: Duration = Duration::from_secs(2);
/// Pairs of region and model that are remembered, and as many of region, model and tenant.
const MOST: usize = 4_096;

#[derive(Debug, Default)]
pub struct Rests {
    everybodys: Mutex<HashMap<(Name, String), Rest>>,
    tenants: Mutex<HashMap<(Name, String, Name), Rest>>,
}

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
        change(&mut self.everybodys.lock(), (region.clone(), model.to_owned()), now, |rest| {
            rest.fill(class, until);
            rest.lesser = rest.lesser.max(until);
        });
    }

    /// It has none for those of this tenant.
    pub fn refused_tenant(
        &self,
        region: &Name,
        model: &str,
        tenant: &Name,
        class: Class,
        after: Duration,
        now: Duration,
    ) {
        let until = now + after.clamp(SHORTEST, LONGEST);
        let key = (region.clone(), model.to_owned(), tenant.clone());
        change(&mut self.tenants.lock(), key, now, |rest| rest.fill(class, until));
    }

    /// The region's answers are no better than one's own.
    pub fn lessened(&self, region: &Name, model: &str, now: Duration) {
        let key = (region.clone(), model.to_owned());
        change(&mut self.everybodys.lock(), key, now, |rest| rest.lesser = now + LESSER);
    }

    pub fn is_full(&self, region: &Name, model: &str, tenant: &Name, class: Class, now: Duration) -> bool {
        let own = || find(&self.tenants, || (region.clone(), model.to_owned(), tenant.clone()));
        let is_full = |rest: Rest| rest.full.get(class as usize).is_some_and(|until| now < *until);
        self.find(region, model).is_some_and(is_full) || own().is_some_and(is_full)
    }

    pub fn is_lesser(&self, region: &Name, model: &str, now: Duration) -> bool {
        self.find(region, model).is_some_and(|rest| now < rest.lesser)
    }

    fn find(&self, region: &Name, model: &str) -> Option<Rest> {
        find(&self.everybodys, || (region.clone(), model.to_owned()))
    }
}

impl Rest {
    fn fill(&mut self, class: Class, until: Duration) {
        for full in self.full.iter_mut().skip(class as usize) {
            *full = until.max(*full);
        }
    }

    fn lasts(&self, now: Duration) -> bool {
        self.full.iter().chain([&self.lesser]).any(|until| now < *until)
    }
}

fn find<K: Eq + Hash>(rests: &Mutex<HashMap<K, Rest>>, key: impl FnOnce() -> K) -> Option<Rest> {
    let rests = rests.lock();
    // The usual case costs no key.
    if rests.is_empty() { None } else { rests.get(&key()).copied() }
}

fn change<K: Eq + Hash>(rests: &mut HashMap<K, Rest>, key: K, now: Duration, change: impl FnOnce(&mut Rest)) {
    if rests.len() >= MOST {
        rests.retain(|_, rest| rest.lasts(now));
    }
    if rests.len() < MOST {
        change(rests.entry(key).or_default());
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
        let acme = name("acme");
        let full = |model: &str, class, now| rests.is_full(&us, model, &acme, class, now);
        let now = SECOND * 10 + SECOND / 2;
        assert_eq!(Class::ALL.map(|class| full("eta", class, now)), [false, false, true, true]);
        assert!(rests.is_lesser(&us, "eta", now));
        assert!(!full("eta", Class::Low, SECOND * 11) && !full("fraud", Class::Low, now));
        assert!(!rests.is_full(&name("ap"), "eta", &acme, Class::Low, now));
        rests.refused(&us, "eta", Class::Low, SECOND * 3_600, now);
        assert!(full("eta", Class::Low, now + LONGEST - SHORTEST) && !full("eta", Class::Low, now + LONGEST));
        rests.refused(&us, "fraud", Class::Low, Duration::ZERO, now);
        assert!(full("fraud", Class::Low, now + SHORTEST / 2));
    }

    #[test]
    fn a_region_of_lesser_answers_still_counts_as_having_room() {
        let (rests, us) = (Rests::default(), name("us"));
        rests.lessened(&us, "eta", SECOND);
        assert!(rests.is_lesser(&us, "eta", SECOND * 2));
        assert!(!rests.is_full(&us, "eta", &name("acme"), Class::Low, SECOND * 2));
        assert!(!rests.is_lesser(&us, "eta", SECOND + LESSER));
    }

    #[test]
    fn what_one_tenant_is_the_reason_for_is_refused_to_nobody_else() {
        let (rests, us) = (Rests::default(), name("us"));
        rests.refused_tenant(&us, "eta", &name("acme"), Class::Normal, SECOND, SECOND * 10);
        let full = |tenant, class, now| rests.is_full(&us, "eta", &name(tenant), class, now);
        assert_eq!(Class::ALL.map(|class| full("acme", class, SECOND * 10)), [false, false, true, true]);
        assert_eq!(Class::ALL.map(|class| full("globex", class, SECOND * 10)), [false; 4]);
        assert!(!full("acme", Class::Low, SECOND * 11) && !rests.is_lesser(&us, "eta", SECOND * 10));
        // Tenants, however many, leave room for what concerns everybody.
        for number in 0..2 * MOST {
            rests.refused_tenant(&us, "eta", &name(&format!("t{number}")), Class::Low, SECOND, SECOND * 20);
        }
        assert_eq!(rests.tenants.lock().len(), MOST);
        rests.refused(&us, "eta", Class::Low, SECOND, SECOND * 20);
        assert!(full("late", Class::Low, SECOND * 20));
    }

    #[test]
    fn memory_of_rests_is_bounded_and_what_is_over_makes_room() {
        let (rests, us) = (Rests::default(), name("us"));
        for number in 0..2 * MOST {
            rests.lessened(&us, &format!("m{number}"), SECOND);
        }
        assert_eq!(rests.everybodys.lock().len(), MOST);
        rests.lessened(&us, "late", SECOND * 100);
        assert_eq!(rests.everybodys.lock().len(), 1);
        assert!(rests.is_lesser(&us, "late", SECOND * 100));
    }
}
