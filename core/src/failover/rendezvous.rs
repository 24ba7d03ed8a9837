//! Weighted rendezvous hashing: who of several is first for a key.
//!
//! Each has a draw for each key, -ln(u) / weight with u from a hash of name and key. The least draw wins: it is the
//! first of exponential clocks that run at the rates of the weights, so each wins in proportion to its
//! weight, and a changed weight moves keys to or from its owner alone. Schindelhauer and Schomaker, "Weighted
//! Distributed Hash Tables" (SPAA 2005), the logarithmic method.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The draw of `name` for the key of this hash. Without weight it is infinite.
pub fn draw(name: &[u8], key: u64, weight: f64) -> f64 {
    if !(weight.is_finite() && weight > 0.0) {
        return f64::INFINITY;
    }
    // 52 bits and a half: exact in a double, never 0 and never 1.
    let unit = ((xxh3_64_with_seed(name, key) >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
    -unit.ln() / weight
}

#[cfg(test)]
mod tests {
    use super::*;

    fn winner(weights: &[(&str, f64)], key: u64) -> usize {
        let draws = weights.iter().map(|(name, weight)| draw(name.as_bytes(), key, *weight));
        draws.enumerate().min_by(|(_, one), (_, other)| one.total_cmp(other)).unwrap().0
    }

    fn shares(weights: &[(&str, f64)]) -> Vec<f64> {
        const KEYS: u64 = 20_000;
        let mut counts = vec![0.0; weights.len()];
        (0..KEYS).for_each(|key| counts[winner(weights, key)] += 1.0 / KEYS as f64);
        counts
    }

    #[test]
    fn each_wins_in_proportion_to_its_weight() {
        for weights in [[0.5, 0.3, 0.2], [90.0, 9.0, 1.0], [1e-9, 2e-9, 1e-9], [1e300, 1e300, 2e300]] {
            let total: f64 = weights.iter().map(|weight| weight / 4.0).sum::<f64>() * 4.0;
            let names = ["eu-west", "us-east", "ap-south"];
            let pairs: Vec<(&str, f64)> = names.into_iter().zip(weights).collect();
            for (share, weight) in shares(&pairs).into_iter().zip(weights) {
                assert!((share - weight / total).abs() < 0.012, "{weights:?}: {share}");
            }
        }
    }

    #[test]
    fn a_changed_weight_moves_keys_to_or_from_its_owner_alone() {
        let before = [("eu", 2.0), ("us", 1.0), ("ap", 1.0)];
        for (heavier, after) in
            [(true, [("eu", 3.0), ("us", 1.0), ("ap", 1.0)]), (false, [("eu", 0.5), ("us", 1.0), ("ap", 1.0)])]
        {
            for key in 0..20_000 {
                let (from, to) = (winner(&before, key), winner(&after, key));
                assert!(from == to || if heavier { to == 0 } else { from == 0 }, "{key}: {from} to {to}");
            }
        }
    }

    #[test]
    fn without_weight_nobody_wins() {
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(draw(b"eu", 7, weight), f64::INFINITY);
            assert_eq!(winner(&[("eu", weight), ("us", 1e-300)], 7), 1);
        }
    }
}
