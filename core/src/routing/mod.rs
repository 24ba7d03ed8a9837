//! Which pod gets a request: the ring for calls with a key, the better of two for calls without.

mod ring;

pub use ring::{Ring, key_hash};

/// Power of two choices: of two pods picked by `random`, the one with less load; on a tie the first.
///
/// With one pod there is no choice. `None` only if there is no pod. Mitzenmacher, "The Power of Two
/// Choices in Randomized Load Balancing" (2001): the longest queue is O(log log n), not O(log n).
pub fn p2c(random: u64, loads: &[usize]) -> Option<usize> {
    let count = u64::try_from(loads.len()).ok().filter(|count| *count > 0)?;
    let first = (random & 0xffff_ffff) % count;
    // The second choice is one of the others, so that it is never the first again.
    let second = if count == 1 { first } else { (first + 1 + (random >> 32) % (count - 1)) % count };
    let (first, second) = (usize::try_from(first).ok()?, usize::try_from(second).ok()?);
    Some(if loads[second] < loads[first] { second } else { first })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_less_loaded_of_two_wins() {
        assert_eq!(p2c(0, &[]), None);
        assert_eq!(p2c(u64::MAX, &[7]), Some(0));
        for random in 0..1_000_u64 {
            let spread = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(p2c(spread, &[5, 3]), Some(1), "both are always looked at when there are two");
            assert_ne!(p2c(spread, &[1, 1, 9]), Some(2), "the most loaded of three never wins");
        }
    }

    #[test]
    fn ties_spread_over_all_pods() {
        let mut seen = [0; 4];
        for random in 0..4_000_u64 {
            seen[p2c(random.wrapping_mul(0x9e37_79b9_7f4a_7c15), &[0; 4]).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (800..1_200).contains(count)), "{seen:?}");
    }
}
