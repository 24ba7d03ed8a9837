//! Whose turn it is, in proportion to weights, from a counter alone.
//!
//! The rule: with numbers 0, 1, 2 … and n pods, a pod of u units out of `UNITS` gets exactly u of each
//! n × `UNITS` numbers, evenly spread. There is no order to keep or to rebuild: threads share no more
//! than the counter, and weights may change between any two turns.
//!
//! The static stride scheduler of gRPC (proposal A58): number s offers a turn to pod s mod n for the
//! (s / n)-th time. A pod takes it whenever u × (s / n) has come to the next multiple of `UNITS`, which
//! the heaviest pod has in each round.

use super::weight_of;

/// Units of the heaviest pod: weights are told apart to 0.1 % of it.
const UNITS: u64 = 1_000;

/// The pod whose turn it is, of `count`. `weight` gives a pod's weight, 0 for one that gets no turn; only
/// the proportions count. `next` gives the next number of the counter that all callers share.
///
/// None only if no pod has weight. O(count): at most one number for each pod, one if all weigh the same.
pub fn turn(count: usize, weight: impl Fn(usize) -> f64, mut next: impl FnMut() -> u64) -> Option<usize> {
    let weighed = (0..count).map(|pod| (pod, weight_of(weight(pod))));
    let (heaviest, most) = weighed.max_by(|(_, one), (_, other)| one.total_cmp(other))?;
    if most == 0.0 {
        return None;
    }
    for _ in 0..count {
        let number = next();
        let (round, pod) = (number / count as u64, number % count as u64);
        let weight = weight_of(weight(pod as usize));
        if weight > 0.0 {
            let units = ((weight / most * UNITS as f64).round() as u64).clamp(1, UNITS);
            // Every other pod begins half a turn later, so that pods of one weight do not go together.
            if (round % UNITS * units + pod % 2 * (UNITS / 2)) % UNITS >= UNITS - units {
                return Some(pod as usize);
            }
        }
    }
    // Other threads took the numbers in between.
    Some(heaviest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counter(from: u64) -> impl FnMut() -> u64 {
        let mut numbers = from..;
        move || numbers.next().unwrap()
    }

    fn turns(weights: &[f64], count: usize) -> Vec<usize> {
        let mut next = counter(0);
        (0..count).map(|_| turn(weights.len(), |pod| weights[pod], &mut next).unwrap()).collect()
    }

    #[test]
    fn equal_pods_take_turns() {
        assert_eq!(turns(&[0.7; 3], 7), [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(turns(&[1.0], 3), [0, 0, 0]);
    }

    #[test]
    fn turns_of_a_heavy_pod_are_spread_between_those_of_the_others() {
        assert_eq!(turns(&[1.0, 0.5], 6), [0, 1, 0, 0, 1, 0]);
        assert_eq!(turns(&[0.25, 1.0, 0.25], 12), [1, 1, 1, 0, 1, 2, 1, 1, 1, 0, 1, 2]);
    }

    #[test]
    fn without_weight_there_is_no_turn() {
        assert_eq!(turn(0, |_| 1.0, counter(0)), None);
        assert_eq!(turn(3, |_| 0.0, counter(0)), None);
        assert_eq!(turn(3, |_| f64::NAN, counter(0)), None);
        assert_eq!(turns(&[0.0, 1.0, f64::INFINITY, -1.0], 3), [1, 1, 1]);
        assert!(turns(&[1.0, 1e-300], 2_000).contains(&1), "the lightest has a turn too");
    }

    #[test]
    fn numbers_that_others_take_in_between_leave_nobody_without_a_pod() {
        let odd = || counter(0)() * 2 + 1;
        assert_eq!(turn(2, |pod| [1.0, 0.0][pod], odd), Some(0));
        assert_eq!(turn(3, |_| 1.0, || u64::MAX), Some(0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Also with weights that were others before, as the counter goes on from anywhere.
        #[test]
        fn shares_are_exact_over_one_cycle_and_turns_are_even(
            units in proptest::collection::vec(0..=UNITS, 1..5),
            heaviest: prop::sample::Index,
            cycles in 0_u64..1_000_000,
        ) {
            let mut units = units;
            let heaviest = heaviest.index(units.len());
            units[heaviest] = UNITS;
            let (count, total) = (units.len(), units.iter().sum::<u64>());
            let mut next = counter(cycles * UNITS * count as u64);
            let mut taken = vec![0_u64; count];
            for number in 1..=total {
                let pod = turn(count, |pod| units[pod] as f64, &mut next).unwrap();
                taken[pod] += 1;
                // Rounds begun so far are the heaviest pod's turns, one more or less.
                let due = units[pod] as f64 * taken[heaviest] as f64 / UNITS as f64;
                prop_assert!((taken[pod] as f64 - due).abs() <= 2.0, "{pod} at {number}: {taken:?} of {units:?}");
            }
            prop_assert_eq!(taken, units);
        }

        #[test]
        fn only_pods_with_weight_get_a_turn(
            weights in proptest::collection::vec(prop_oneof![Just(0.0), 0.0..1.0, prop::num::f64::ANY], 0..8),
            numbers: [u64; 8],
        ) {
            let mut numbers = numbers.into_iter().cycle();
            let pod = turn(weights.len(), |pod| weights[pod], || numbers.next().unwrap());
            prop_assert_eq!(pod.is_some(), weights.iter().any(|weight| weight_of(*weight) > 0.0));
            prop_assert!(pod.is_none_or(|pod| weight_of(weights[pod]) > 0.0));
        }
    }
}
