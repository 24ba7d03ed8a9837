//! Consistent hashing with bounded loads: a key goes along the ring to the first pod that is not full.
//!
//! The rule: of the pods that take traffic, none is given a request beyond
//! `ceil(c * (total in flight + 1) * weight / sum of weights)` in flight, the new request counted. The sums may be
//! those of a moment ago, as their user has it ([`Totals`]); the bound is then that of then.
//! Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016).
//!
//! Full pods are passed over in the key's own order, so each key keeps the same second and third
//! choice. It does not reserve: of calls that decide at the same moment each sees the load without the
//! others, and a pod can be over its bound by as many.

use std::cell::Cell;

use super::{Ring, weight_of};

/// The load factor `c` unless configured otherwise: a pod may have a quarter more than its share.
pub const LOAD_FACTOR: f64 = 1.25;

/// One pod that takes traffic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Requests in flight there.
    pub in_flight: usize,
    /// Only the proportions between pods count. 0 takes nothing.
    pub weight: f64,
    /// May get this request. One that may not (it was tried before) has its part in the mean all the same.
    pub free: bool,
}

/// Where a key was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its index on the ring.
    pub pod: usize,
    /// Whether a pod that the key prefers was passed over because it is full.
    pub passed_full: bool,
}

/// What the pods of a pool that take traffic carry together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    pub in_flight: f64,
    pub weight: f64,
}

/// How fresh totals have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// Those of a moment ago will do.
    Lately,
    /// Summed up anew.
    Now,
}

/// The bound over one pool at one moment. `load` gives a pod's load, or none if it takes no traffic. `totals` gives what
/// all of them carry: by its second argument, which sums it up, or from memory, since a sum asks every pod.
pub struct Bounded<'a, F, T> {
    ring: &'a Ring,
    factor: f64,
    load: F,
    totals: T,
    /// As they were given, once asked for.
    pool: Cell<Option<Totals>>,
}

impl<'a, F: Fn(usize) -> Option<Load>, T: Fn(Fresh, &dyn Fn() -> Totals) -> Totals> Bounded<'a, F, T> {
    /// A `factor` below 1 counts as 1: less could leave a request without a place.
    pub fn new(ring: &'a Ring, factor: f64, load: F, totals: T) -> Self {
        Self { ring, factor: factor.max(1.0), load, totals, pool: Cell::default() }
    }

    /// Whether a pod may get one request more. O(1) for an idle pod, else O(pods) once.
    pub fn admits(&self, load: &Load) -> bool {
        // No capacity is below one request.
        load.in_flight == 0 || load.in_flight < self.capacity(load.weight)
    }

    /// The first free pod that is not full in the key's order. None only if no pod is free.
    ///
    /// Where all free pods are full, as when another was tried before, it is the one with the least
    /// load for its weight.
    pub fn place(&self, key: u64) -> Option<Placed> {
        let (mut passed_full, mut first) = self.first_with_room(key);
        // Since old totals were summed up, more may have come than they leave room for.
        if first.is_none() && passed_full && self.is_renewed() {
            (passed_full, first) = self.first_with_room(key);
        }
        if let Some(pod) = first {
            return Some(Placed { pod, passed_full });
        }
        let relative = |load: Load| (load.in_flight as f64 + 1.0) / load.weight;
        let least = (0..self.ring.pods()).filter_map(|pod| Some((pod, relative(self.free(pod)?))));
        let (pod, _) = least.min_by(|(_, one), (_, other)| one.total_cmp(other))?;
        Some(Placed { pod, passed_full })
    }

    /// Whether a pod was passed over because it is full, and the first that is not.
    fn first_with_room(&self, key: u64) -> (bool, Option<usize>) {
        let mut passed_full = false;
        let first = self.ring.order(key).find(|pod| {
            self.free(*pod).is_some_and(|load| {
                let admits = self.admits(&load);
                passed_full |= !admits;
                admits
            })
        });
        (passed_full, first)
    }

    /// Sums the totals up anew. Whether they are others.
    fn is_renewed(&self) -> bool {
        let renewed = Some((self.totals)(Fresh::Now, &|| self.sum()));
        self.pool.replace(renewed) != renewed
    }

    /// Requests that a pod of this weight may have in flight.
    fn capacity(&self, weight: f64) -> usize {
        let pool = self.pool.get().unwrap_or_else(|| (self.totals)(Fresh::Lately, &|| self.sum()));
        self.pool.set(Some(pool));
        // In this order whole numbers stay whole, and no rounding makes room for one more.
        (self.factor * (pool.in_flight + 1.0) * weight / pool.weight).ceil() as usize
    }

    fn sum(&self) -> Totals {
        let loads = (0..self.ring.pods()).filter_map(|pod| self.counted(pod));
        loads.fold(Totals { in_flight: 0.0, weight: 0.0 }, |sum, load| Totals {
            in_flight: sum.in_flight + load.in_flight as f64,
            weight: sum.weight + load.weight,
        })
    }

    fn counted(&self, pod: usize) -> Option<Load> {
        (self.load)(pod).filter(|load| weight_of(load.weight) > 0.0)
    }

    fn free(&self, pod: usize) -> Option<Load> {
        self.counted(pod).filter(|load| load.free)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::routing::key_hash;

    fn ring(pods: usize) -> Ring {
        let identities: Vec<String> = (0..pods).map(|pod| format!("pod-{pod}")).collect();
        Ring::new(identities.iter().map(String::as_str))
    }

    fn hash(key: u64) -> u64 {
        key_hash(&key.to_le_bytes())
    }

    fn sum(_: Fresh, sum: &dyn Fn() -> Totals) -> Totals {
        sum()
    }

    fn place(ring: &Ring, key: u64, loads: &[Load]) -> Option<Placed> {
        Bounded::new(ring, LOAD_FACTOR, |pod| loads.get(pod).copied(), sum).place(key)
    }

    fn free(in_flight: usize) -> Load {
        Load { in_flight, weight: 1.0, free: true }
    }

    #[test]
    fn a_full_owner_is_passed_over_for_the_next_in_the_keys_order() {
        let ring = ring(3);
        let order: Vec<usize> = ring.order(hash(7)).collect();
        let mut loads = [free(4); 3];
        // (12 + 1) * 1.25 / 3 = 5.4: up to 6 each.
        assert_eq!(place(&ring, hash(7), &loads), Some(Placed { pod: order[0], passed_full: false }));
        // (4 + 4 + 7 + 1) * 1.25 / 3 = 6.7: up to 7 each.
        loads[order[0]].in_flight = 7;
        assert_eq!(place(&ring, hash(7), &loads), Some(Placed { pod: order[1], passed_full: true }));
        loads[order[0]].in_flight = 6;
        assert_eq!(place(&ring, hash(7), &loads), Some(Placed { pod: order[0], passed_full: false }));
    }

    #[test]
    fn the_bound_follows_weight() {
        let ring = ring(2);
        let loads = |heavy, light| [Load { weight: 3.0, ..free(heavy) }, free(light)];
        let full =
            |loads: [Load; 2], pod: usize| !Bounded::new(&ring, 1.25, |pod| Some(loads[pod]), sum).admits(&loads[pod]);
        // (12 + 1) * 1.25 = 16.25 in all: up to 13 and 5.
        assert!(!full(loads(12, 0), 0));
        assert!(!full(loads(8, 4), 1));
        assert!(full(loads(7, 5), 1));
        assert!(!full([Load { weight: 1e-9, ..free(0) }, free(900)], 0), "one request is within any bound");
    }

    #[test]
    fn a_pod_that_takes_no_traffic_has_no_part_in_the_mean() {
        let ring = ring(4);
        let order: Vec<usize> = ring.order(hash(3)).collect();
        let load = |pod: usize| (pod != order[1]).then(|| free(if pod == order[0] { 5 } else { 3 }));
        // Three pods: (11 + 1) * 1.25 / 3 = 5; four would make 4.
        assert_eq!(Bounded::new(&ring, 1.25, load, sum).place(hash(3)).unwrap().pod, order[2]);
    }

    #[test]
    fn the_bound_follows_what_the_pool_is_said_to_carry() {
        let ring = ring(3);
        let asked = Cell::new(0);
        // Summed up it would be (6 + 1) * 1.25 / 3 = 2.9: full with 3.
        let bounded = Bounded::new(
            &ring,
            1.25,
            |_| Some(free(2)),
            |_, _| {
                asked.set(asked.get() + 1);
                Totals { in_flight: 11.0, weight: 3.0 }
            },
        );
        assert!(bounded.admits(&free(0)));
        assert_eq!(asked.get(), 0, "an idle pod is within any bound");
        assert!(bounded.admits(&free(4)) && !bounded.admits(&free(5)));
        assert_eq!(asked.get(), 1);
    }

    #[test]
    fn totals_that_leave_nobody_room_are_summed_up_anew() {
        let ring = ring(3);
        let order: Vec<usize> = ring.order(hash(7)).collect();
        let old = Totals { in_flight: 0.0, weight: 3.0 };
        let place = |loads: [Load; 3]| {
            let totals = |fresh, sum: &dyn Fn() -> Totals| if fresh == Fresh::Now { sum() } else { old };
            Bounded::new(&ring, 1.25, |pod| Some(loads[pod]), totals).place(hash(7)).unwrap()
        };
        // By the old totals each may have 1; in truth (6 + 1) * 1.25 / 3 = 2.9, 3 each.
        assert_eq!(place([free(2); 3]), Placed { pod: order[0], passed_full: false });
        // (13 + 1) * 1.25 / 3 = 5.8: up to 6 each.
        let mut loads = [free(1); 3];
        loads[order[0]].in_flight = 6;
        loads[order[1]].in_flight = 6;
        assert_eq!(place(loads), Placed { pod: order[2], passed_full: true });
    }

    #[test]
    fn the_least_loaded_is_taken_where_all_free_pods_are_full() {
        let ring = ring(3);
        let loads = [free(9), Load { free: false, ..free(0) }, free(8)];
        assert_eq!(place(&ring, 5, &loads), Some(Placed { pod: 2, passed_full: true }));
        let loads = [Load { free: false, ..free(0) }; 3];
        assert_eq!(place(&ring, 5, &loads), None);
        assert_eq!(place(&Ring::default(), 5, &loads), None);
    }

    #[test]
    fn a_pod_without_a_point_is_still_found() {
        let ring = Ring::weighted([("a", 0.0), ("b", 0.0)]);
        assert_eq!(place(&ring, 5, &[free(2), free(1)]), Some(Placed { pod: 1, passed_full: false }));
    }

    #[test]
    fn an_added_pod_moves_its_share_of_the_keys_and_two_percent() {
        const KEYS: u64 = 4_000;
        let loads = [free(3); 21];
        for pods in 2..=20 {
            let (before, after) = (ring(pods), ring(pods + 1));
            let at = |ring: &Ring, key| place(ring, hash(key), &loads[..ring.pods()]).unwrap().pod;
            let moved = (0..KEYS).filter(|key| at(&before, *key) != at(&after, *key)).count();
            let share = moved as f64 / KEYS as f64;
            assert!(share <= 1.0 / pods as f64 + 0.02, "{pods} pods: {share} of the keys moved");
            assert!(share > 0.0);
        }
    }

    proptest! {
        /// Placements and completions in any order, with few keys so that owners fill up: each goes to
        /// the first pod in its key's order that the paper's formula leaves room, and none is over it.
        #[test]
        fn no_pod_is_ever_given_more_than_its_bound(
            weights in proptest::collection::vec(1_u32..=10, 1..8),
            steps in proptest::collection::vec((any::<bool>(), 0_u64..4, any::<prop::sample::Index>()), 1..120),
        ) {
            let ring = ring(weights.len());
            let mut loads: Vec<Load> =
                weights.iter().map(|weight| Load { weight: f64::from(*weight), ..free(0) }).collect();
            let mut running: Vec<usize> = Vec::new();
            for (completes, key, which) in steps {
                if completes && !running.is_empty() {
                    let pod = running.swap_remove(which.index(running.len()));
                    loads[pod].in_flight -= 1;
                    continue;
                }
                // 5/4 in whole numbers, so that the reference has no rounding.
                let share = |pod: usize| 5 * (running.len() as u64 + 1) * u64::from(weights[pod]);
                let capacity = |pod: usize| share(pod).div_ceil(4 * u64::from(weights.iter().sum::<u32>()));
                let room = |pod: &usize| (loads[*pod].in_flight as u64) < capacity(*pod);
                let expected = ring.order(hash(key)).find(room);
                let placed = place(&ring, hash(key), &loads).unwrap();
                prop_assert_eq!(Some(placed.pod), expected);
                prop_assert_eq!(placed.passed_full, ring.owner(hash(key)) != expected);
                loads[placed.pod].in_flight += 1;
                prop_assert!(loads[placed.pod].in_flight as u64 <= capacity(placed.pod));
                running.push(placed.pod);
            }
        }

        #[test]
        fn no_load_is_too_odd(
            loads in proptest::collection::vec((any::<usize>(), prop::num::f64::ANY, any::<bool>()), 0..6),
            factor in prop::num::f64::ANY,
            key: u64,
        ) {
            let ring = ring(loads.len());
            let load = |pod: usize| {
                let (in_flight, weight, free) = loads[pod];
                Some(Load { in_flight, weight, free })
            };
            let placed = Bounded::new(&ring, factor, load, sum).place(key).map(|placed| placed.pod);
            let free = |pod: usize| loads[pod].2 && weight_of(loads[pod].1) > 0.0;
            prop_assert!(placed.is_none_or(free));
            prop_assert_eq!(placed.is_some(), (0..loads.len()).any(free));
        }
    }
}
