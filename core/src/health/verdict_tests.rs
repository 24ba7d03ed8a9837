use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const NOW: Duration = Duration::from_secs(100);

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// `a/1` is the first gateway of region a.
fn gateway(text: &str) -> Gateway {
    let (region, node) = text.split_once('/').unwrap();
    Gateway { region: name(region), node: name(node) }
}

/// `a/1`, or a control node that stands in no region: `c1`.
fn vantage(text: &str) -> Vantage {
    if text.contains('/') {
        Vantage::Gateway(gateway(text))
    } else {
        Vantage::Control { region: None, node: name(text) }
    }
}

fn board(vantages: &[&str], gateways: &[&str]) -> Board {
    let mut board = Board::new(VerdictSettings::default());
    board.keep(
        &vantages.iter().map(|text| vantage(text)).collect(),
        &gateways.iter().map(|text| gateway(text)).collect(),
    );
    board
}

/// The vantage has so many failures in a row with the gateway; none is an answer.
fn report(board: &mut Board, from: &str, to: &str, failures: u32) {
    if failures == 0 {
        board.record(&vantage(from), &gateway(to), Outcome::Good, NOW);
    }
    for _ in 0..failures {
        board.record(&vantage(from), &gateway(to), Outcome::Failed, NOW);
    }
}

fn reports(board: &mut Board, all: &[(&str, &str, u32)]) {
    for (from, to, failures) in all {
        report(board, from, to, *failures);
    }
}

fn judge(board: &Board) -> Judgement {
    board.judge(&BTreeSet::new(), NOW)
}

fn view(board: &Board, region: &str) -> View {
    judge(board).regions[region].view
}

/// Regions a, b and c with a gateway each, which all probe each other, and two control nodes. All is well.
fn three() -> Board {
    let all = ["a/1", "b/1", "c/1"];
    let mut board = board(&["a/1", "b/1", "c/1", "c1", "c2"], &all);
    for from in ["a/1", "b/1", "c/1", "c1", "c2"] {
        for to in all {
            report(&mut board, from, to, 0);
        }
    }
    board
}

#[test]
fn a_region_is_down_when_more_than_half_of_its_pairs_have_failed() {
    let mut board = board(&["c1", "c2"], &["a/1", "a/2", "b/1"]);
    reports(&mut board, &[("c1", "b/1", 0), ("c2", "b/1", 0), ("c1", "a/1", 0), ("c1", "a/2", 3), ("c2", "a/1", 0)]);
    report(&mut board, "c2", "a/2", 3);
    assert_eq!(view(&board, "a"), View::SomeFailing, "two of four");
    report(&mut board, "c1", "a/1", 3);
    assert_eq!(view(&board, "a"), View::Doubtful, "three of four, but one of two for the second vantage");
    report(&mut board, "c2", "a/1", 3);
    assert_eq!(view(&board, "a"), View::Down);
    assert_eq!(view(&board, "b"), View::Up);
}

#[test]
fn a_region_is_doubtful_when_most_of_its_last_probes_failed() {
    let mut board = three();
    for (index, from) in ["b/1", "c/1", "c1"].into_iter().enumerate() {
        assert_eq!(view(&board, "a"), View::Up, "{index} of four");
        report(&mut board, from, "a/1", 1);
    }
    assert_eq!(view(&board, "a"), View::Doubtful);
    report(&mut board, "c1", "a/1", 0);
    assert_eq!(view(&board, "a"), View::Up);
}

#[test]
fn a_vantage_that_sees_nothing_counts_for_nothing() {
    let mut board = three();
    reports(&mut board, &[("a/1", "b/1", 3), ("a/1", "c/1", 3)]);
    let judgement = judge(&board);
    assert_eq!(judgement.isolated, BTreeSet::from([vantage("a/1")]));
    for region in ["b", "c"] {
        let evidence = judgement.regions[region];
        assert_eq!((evidence.view, evidence.known, evidence.failed), (View::Up, 3, 0));
        assert_eq!((evidence.vantages, evidence.configured), (3, 4));
    }
}

#[test]
fn a_vantage_is_isolated_before_its_first_pair_has_failed() {
    let mut board = board(&["c1", "c2"], &["a/1", "b/1"]);
    for from in ["c1", "c2"] {
        reports(&mut board, &[(from, "a/1", 3), (from, "b/1", 2)]);
    }
    assert_eq!(judge(&board).isolated.len(), 2);
    assert_eq!(view(&board, "a"), View::Unknown, "b would follow, and then there would be nothing left");
    report(&mut board, "c1", "b/1", 0);
    assert_eq!(view(&board, "a"), View::Doubtful, "on the word of one");
    report(&mut board, "c2", "b/1", 0);
    assert_eq!(view(&board, "a"), View::Down);
}

#[test]
fn who_probes_one_region_only_is_not_isolated_by_its_silence() {
    let mut board = board(&["a/1", "a/2", "b/1"], &["a/1", "a/2", "b/1"]);
    reports(&mut board, &[("b/1", "a/1", 0), ("b/1", "a/2", 0), ("a/1", "b/1", 3), ("a/2", "b/1", 3)]);
    assert_eq!(view(&board, "b"), View::Down);
    assert_eq!(judge(&board).isolated, BTreeSet::new());
}

#[test]
fn regions_that_are_out_are_not_expected_to_answer() {
    let mut board = board(&["a/1", "a/2"], &["a/1", "a/2", "b/1", "c/1"]);
    for from in ["a/1", "a/2"] {
        reports(&mut board, &[(from, "b/1", 3), (from, "c/1", 3)]);
    }
    assert_eq!(view(&board, "b"), View::Unknown);
    let judgement = board.judge(&BTreeSet::from([name("c")]), NOW);
    assert_eq!(judgement.regions["b"].view, View::Down);
    report(&mut board, "a/1", "c/1", 0);
    assert!(!judge(&board).isolated.contains(&vantage("a/1")), "but an answer is an answer");
}

#[test]
fn nobody_is_down_on_the_word_of_one_of_several_vantages() {
    let mut board = board(&["c1", "c2"], &["a/1", "b/1"]);
    reports(&mut board, &[("c1", "b/1", 0), ("c1", "a/1", 3)]);
    assert_eq!(view(&board, "a"), View::Doubtful, "the second has said nothing");
    board.keep(&BTreeSet::from([vantage("c1")]), &BTreeSet::from([gateway("a/1"), gateway("b/1")]));
    assert_eq!(view(&board, "a"), View::Down, "there is no second");
}

#[test]
fn unknown_is_not_down() {
    let mut board = three();
    for from in ["b/1", "c/1", "c1", "c2"] {
        report(&mut board, from, "a/1", 3);
    }
    assert_eq!(view(&board, "a"), View::Down);
    let at = |seconds| board.judge(&BTreeSet::new(), NOW + seconds * SECOND).regions["a"];
    assert_eq!(at(15).view, View::Down);
    assert_eq!((at(16).view, at(16).known), (View::Unknown, 0));
    assert_eq!(view(&self::board(&[], &["a/1"]), "a"), View::Unknown);
}

#[test]
fn one_vantage_is_enough_to_prove_that_a_region_answers() {
    let mut board = board(&["c1", "c2", "c3"], &["a/1"]);
    report(&mut board, "c2", "a/1", 0);
    assert_eq!(view(&board, "a"), View::Up);
}

#[test]
fn a_vantage_has_no_word_on_its_own_region() {
    let mut board = three();
    assert_eq!(board.record(&vantage("a/1"), &gateway("a/1"), Outcome::Refused, NOW), Noted::Ignored);
    assert_eq!(judge(&board).regions["a"].configured, 4);
    let control = Vantage::Control { region: Some(name("a")), node: name("c1") };
    board.keep(&BTreeSet::from([control.clone()]), &BTreeSet::from([gateway("a/1"), gateway("b/1")]));
    assert_eq!(board.record(&control, &gateway("a/1"), Outcome::Good, NOW), Noted::Ignored);
    assert_eq!(board.record(&control, &gateway("b/1"), Outcome::Good, NOW), Noted::Counted);
}

#[test]
fn the_first_refusal_is_urgent() {
    let mut board = three();
    let mut refuse = || board.record(&vantage("b/1"), &gateway("a/1"), Outcome::Refused, NOW);
    assert_eq!([refuse(), refuse(), refuse()], [Noted::Urgent, Noted::Counted, Noted::Counted]);
    assert_eq!(board.record(&vantage("c/1"), &gateway("a/1"), Outcome::Failed, NOW), Noted::Counted);
}

#[test]
fn clean_is_what_more_than_half_of_the_pairs_have() {
    let mut board = board(&["c1", "c2", "c3", "c4"], &["a/1"]);
    for (clean, from) in ["c1", "c2", "c3", "c4"].into_iter().enumerate() {
        (0..=clean).for_each(|_| report(&mut board, from, "a/1", 0));
    }
    assert_eq!(judge(&board).regions["a"].clean, 2, "three of four had two in a row");
    report(&mut board, "c4", "a/1", 1);
    assert_eq!(judge(&board).regions["a"].clean, 1);
}

#[test]
fn what_is_known_of_those_that_stay_is_kept() {
    let mut board = three();
    for from in ["b/1", "c/1", "c1", "c2"] {
        report(&mut board, from, "a/1", 3);
    }
    let vantages = ["b/1", "c1", "c2", "c3"].map(vantage);
    let gateways = ["a/1", "b/1"].map(gateway);
    board.keep(&BTreeSet::from(vantages), &BTreeSet::from(gateways));
    let evidence = judge(&board).regions["a"];
    assert_eq!((evidence.view, evidence.known, evidence.configured), (View::Down, 3, 4));
    assert!(!judge(&board).regions.contains_key("c"));
    assert_eq!(board.record(&vantage("c/1"), &gateway("a/1"), Outcome::Good, NOW), Noted::Ignored);
}

#[test]
fn the_evidence_reads_well() {
    let mut board = three();
    reports(&mut board, &[("a/1", "b/1", 3), ("a/1", "c/1", 3), ("c1", "b/1", 3), ("c2", "b/1", 2)]);
    let text = judge(&board).regions["b"].to_string();
    assert_eq!(text, "1 of 3 pairs failed, 1 failing; down for 1 of 3 vantages, 1 more do not count");
    assert_eq!(Evidence::default().to_string(), "nothing is known: none of 0 vantages counts");
}

static REGIONS: [&str; 3] = ["a", "b", "c"];
static GATEWAYS: [&str; 5] = ["a/1", "a/2", "b/1", "c/1", "c/2"];
static VANTAGES: [&str; 6] = ["a/1", "b/1", "c/1", "c/2", "c1", "c2"];

/// Failures in a row by vantage and gateway; 4 is no report.
fn states() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let failures = prop_oneof![4 => Just(0_u32), 1 => Just(1), 1 => Just(2), 5 => Just(3), 1 => Just(4)];
    let row = prop_oneof![
        5 => proptest::collection::vec(failures, GATEWAYS.len()),
        1 => proptest::collection::vec(1..4_u32, GATEWAYS.len()),
    ];
    proptest::collection::vec(row, VANTAGES.len())
}

fn filled(board: &mut Board, vantages: &[&str], states: &[Vec<u32>]) {
    for (from, row) in vantages.iter().zip(states) {
        for (to, failures) in GATEWAYS.iter().zip(row).filter(|(_, failures)| **failures < 4) {
            report(board, from, to, *failures);
        }
    }
}

proptest! {
    /// The rules once more, word by word.
    #[test]
    fn verdicts_are_what_the_rules_say(states in states(), out in proptest::sample::subsequence(&REGIONS[..], 0..3)) {
        let mut board = board(&VANTAGES, &GATEWAYS);
        filled(&mut board, &VANTAGES, &states);
        let judgement = board.judge(&out.iter().map(|region| name(region)).collect(), NOW);
        let pairs = |of: usize| {
            let own = VANTAGES[of].split_once('/').map(|(region, _)| region);
            let pairs = GATEWAYS.iter().map(|to| to.split_once('/').unwrap().0).zip(states[of].iter().copied());
            pairs.filter(move |(region, failures)| Some(*region) != own && *failures < 4)
        };
        let isolated = |of: usize| {
            let silent = pairs(of).filter(|(region, _)| !out.contains(region));
            let regions: BTreeSet<&str> = silent.map(|(region, _)| region).collect();
            regions.len() >= 2 && pairs(of).all(|(_, failures)| failures > 0)
        };
        for (of, text) in VANTAGES.iter().enumerate() {
            prop_assert_eq!(judgement.isolated.contains(&vantage(text)), isolated(of), "{}", text);
        }
        for region in REGIONS {
            let counted = (0..VANTAGES.len()).filter(|of| !isolated(*of));
            let seen: Vec<Vec<u32>> = counted
                .map(|of| pairs(of).filter(|(of, _)| *of == region).map(|(_, failures)| failures).collect())
                .collect();
            let all: Vec<u32> = seen.concat();
            let most = |list: &[u32], least: u32| list.iter().filter(|failures| **failures >= least).count() * 2 > list.len();
            let against = seen.iter().filter(|list| most(list, 3)).count();
            let expected = if all.is_empty() {
                View::Unknown
            } else if most(&all, 3) && against >= 2 {
                View::Down
            } else if most(&all, 1) {
                View::Doubtful
            } else if all.contains(&3) {
                View::SomeFailing
            } else {
                View::Up
            };
            prop_assert_eq!(judgement.regions[region].view, expected, "{}", region);
        }
    }

    /// One more vantage that sees nothing at all takes no region down.
    #[test]
    fn an_isolated_vantage_takes_nothing_down(states in states(), failures in 1..4_u32) {
        let down = |board: &Board| {
            let regions = judge(board).regions.into_iter();
            regions.filter(|(_, evidence)| evidence.view == View::Down).map(|(name, _)| name).collect::<BTreeSet<Name>>()
        };
        let mut before = board(&VANTAGES[..5], &GATEWAYS);
        filled(&mut before, &VANTAGES[..5], &states);
        let mut after = board(&VANTAGES, &GATEWAYS);
        filled(&mut after, &VANTAGES[..5], &states);
        for to in GATEWAYS {
            report(&mut after, VANTAGES[5], to, failures);
        }
        prop_assert!(judge(&after).isolated.contains(&vantage(VANTAGES[5])));
        prop_assert_eq!(down(&after), down(&before));
    }
}
