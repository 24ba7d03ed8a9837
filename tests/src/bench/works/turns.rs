//! Whose turn it is: peers take turns, and who begins changes each time, so that a machine that slows down
//! slows all of them.

use anyhow::{Context, Result};

use crate::bench::peers::Kind;
use crate::bench::statistics::{Median, median};

/// What each peer's turns showed, in the order of `kinds`.
pub fn interleaved<T>(
    kinds: &[Kind],
    repetitions: usize,
    mut turn: impl FnMut(Kind, usize) -> Result<T>,
) -> Result<Vec<(Kind, Vec<T>)>> {
    let mut turns: Vec<(Kind, Vec<T>)> = kinds.iter().map(|kind| (*kind, Vec::new())).collect();
    for repetition in 0..repetitions {
        for (kind, turns) in &mut turns {
            let shown = turn(*kind, repetition);
            turns.push(shown.with_context(|| format!("{} in repetition {repetition}", kind.name()))?);
        }
        turns.reverse();
    }
    turns.sort_by_key(|(kind, _)| kinds.iter().position(|one| one == kind));
    Ok(turns)
}

/// The turns of one peer.
pub fn of<T>(turns: &[(Kind, Vec<T>)], kind: Kind) -> Option<&[T]> {
    turns.iter().find_map(|(one, turns)| (*one == kind).then_some(turns.as_slice()))
}

/// One quantity of one peer, turn by turn.
pub fn values<T>(turns: &[T], value: impl Fn(&T) -> f64) -> Vec<f64> {
    turns.iter().map(value).collect()
}

/// The ratio of what two peers showed in the same repetition.
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Median {
    median(&ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_begins_changes_and_the_order_of_the_results_does_not() {
        let mut order = Vec::new();
        let turns = interleaved(&[Kind::Spillway, Kind::Envoy], 3, |kind, repetition| {
            order.push(kind);
            Ok((kind, repetition))
        })
        .unwrap();
        let [ours, theirs] = [Kind::Spillway, Kind::Envoy];
        assert_eq!(order, [ours, theirs, theirs, ours, ours, theirs]);
        let expected = |kind| (kind, vec![(kind, 0), (kind, 1), (kind, 2)]);
        assert_eq!(turns, [expected(ours), expected(theirs)]);
        assert_eq!(of(&turns, theirs).unwrap()[1], (theirs, 1));
        assert_eq!(of(&turns, Kind::Caching), None);
    }

    #[test]
    fn what_fails_says_who_and_when() {
        let failed = interleaved(&[Kind::Envoy], 2, |_, repetition| {
            anyhow::ensure!(repetition == 0, "gone");
            Ok(())
        });
        assert_eq!(format!("{:#}", failed.unwrap_err()), "envoy in repetition 1: gone");
    }

    #[test]
    fn ratios_are_of_the_same_repetition() {
        assert_eq!(ratio(&[1.0, 20.0, 3.0], &[2.0, 40.0, 6.0]), Median { value: 0.5, low: 0.5, high: 0.5 });
    }
}
