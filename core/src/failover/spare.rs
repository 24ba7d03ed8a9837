//! What a plan leaves of a region for requests that others forward to it, and what it has a region refuse.
//!
//! The rule: a region that is out or drained gets none while any other serves, and what is not known is not full.

use super::answer::Standing;
use super::plan::{Basis, Plan, Shed};
use crate::limit::Class;
use crate::units::Name;

/// A region as its plan leaves it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spare {
    /// It is there to be asked.
    pub serves: bool,
    /// Requests/s that it could take more: capacity x share - load; below 0 it has too many.
    pub headroom: Option<f64>,
}

/// Of a region that the plan does not know, nothing is known.
pub fn spare(plan: &Plan, standing: Standing, region: &Name) -> Spare {
    let Some(allotment) = plan.regions.get(region).filter(|_| plan.basis != Basis::Blind) else {
        return Spare { serves: true, headroom: None };
    };
    let terms = &allotment.terms;
    let is_drained = terms.drained && allotment.weight <= 0.0;
    let headroom = terms.capacity.zip(allotment.load).map(|(capacity, load)| capacity * terms.share - load);
    Spare { serves: standing != Standing::Out && !is_drained, headroom }
}

impl Shed {
    /// Whether a request of this class is one of those that do not fit. `random` in 0..1 spreads the refusals.
    pub fn refuses(&self, class: Class, random: f64) -> bool {
        let at = Class::ALL.into_iter().position(|one| one == class);
        at.and_then(|at| self.classes.get(at)).is_some_and(|share| random < *share)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::failover::{Act, Override, Region, Traffic};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn region(share: f64, capacity: Option<f64>) -> Region {
        Region { planned: 100.0, share, capacity, load: Some(100.0), overridden: None }
    }

    fn plan(regions: [(&str, Region); 3]) -> Plan {
        let regions: BTreeMap<Name, Region> = regions.map(|(text, region)| (name(text), region)).into();
        Plan::of(1, &regions, &Traffic::default(), Duration::ZERO).unwrap()
    }

    #[test]
    fn headroom_is_what_capacity_leaves_beyond_the_planned_load() {
        let plan = plan([("a", region(1.0, Some(250.0))), ("b", region(1.0, Some(80.0))), ("c", region(1.0, None))]);
        let spare = |text| spare(&plan, Standing::Steady, &name(text));
        assert!((spare("a").headroom.unwrap() - 150.0).abs() < 1e-9 && spare("a").serves);
        assert!(spare("b").headroom.unwrap() < 0.0);
        assert_eq!(spare("c"), Spare { serves: true, headroom: None });
        assert_eq!(spare("d"), Spare { serves: true, headroom: None });
    }

    #[test]
    fn who_is_out_or_drained_is_not_asked_while_another_serves() {
        let drained = Some(Override { act: Act::Drain, until: Duration::from_secs(9) });
        let some = plan([
            ("a", region(1.0, Some(900.0))),
            ("b", region(0.0, Some(250.0))),
            ("c", Region { overridden: drained, ..region(1.0, Some(250.0)) }),
        ]);
        assert!(!spare(&some, Standing::Out, &name("b")).serves);
        assert!(!spare(&some, Standing::Steady, &name("c")).serves);
        assert!(spare(&some, Standing::Unsteady, &name("a")).serves);
        let none = plan(["a", "b", "c"].map(|text| (text, region(0.0, Some(250.0)))));
        assert_eq!(spare(&none, Standing::Out, &name("b")), Spare { serves: true, headroom: None }, "nothing is known");
    }

    #[test]
    fn the_share_of_a_class_that_does_not_fit_is_refused() {
        let shed = Shed { share: 0.3, classes: [0.0, 0.0, 0.25, 1.0] };
        let refused = |class| (0..1_000).filter(|n| shed.refuses(class, f64::from(*n) / 1e3)).count();
        assert_eq!(Class::ALL.map(refused), [0, 0, 250, 1_000]);
        assert!(!Shed { classes: [f64::NAN; 4], ..shed }.refuses(Class::Low, 0.0));
    }
}
