use proptest::prelude::*;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const PACE: Pace = Pace { notice: Duration::from_secs(600), longest_life: Duration::from_secs(3_600) };

fn root(first: u8) -> RootId {
    let mut bytes = [0; 32];
    bytes[0] = first;
    RootId(bytes)
}

fn at(minutes: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + 60 * minutes)
}

#[test]
fn a_root_is_trusted_then_signs_then_stands_alone() {
    let settled = Rotation::settled(root(1));
    assert_eq!(settled.advance(at(1_000), &PACE), None);
    let announced = settled.announce(root(2), at(0)).unwrap();
    assert_eq!((announced.signs, announced.trusted().collect::<Vec<_>>()), (root(1), vec![root(1), root(2)]));
    assert_eq!(announced.advance(at(9), &PACE), None);
    let signing = announced.advance(at(10), &PACE).unwrap();
    assert_eq!((signing.signs, signing.trusted().collect::<Vec<_>>()), (root(2), vec![root(2), root(1)]));
    assert_eq!(signing.next_stage(&PACE), Some(at(10 + 60 + 10)));
    assert_eq!(signing.advance(at(79), &PACE), None);
    assert_eq!(signing.advance(at(80), &PACE), Some(Rotation::settled(root(2))));
}

#[test]
fn what_does_not_fit_the_stage_is_refused() {
    let settled = Rotation::settled(root(1));
    let announced = settled.announce(root(2), at(0)).unwrap();
    let signing = announced.advance(at(10), &PACE).unwrap();
    assert_eq!(settled.announce(root(1), at(0)), Err(NotNow::SignsAlready));
    assert_eq!(announced.announce(root(3), at(0)), Err(NotNow::UnderWay("announced")));
    assert_eq!(signing.announce(root(1), at(0)), Err(NotNow::UnderWay("signing")));
    assert_eq!(announced.withdraw(), Ok(settled));
    assert_eq!(signing.withdraw(), Err(NotNow::NotAnnounced));
    assert_eq!(settled.withdraw(), Err(NotNow::NotAnnounced));
}

#[test]
fn a_clock_that_steps_back_hurries_nothing() {
    let announced = Rotation::settled(root(1)).announce(root(2), at(100)).unwrap();
    assert_eq!(announced.advance(at(0), &PACE), None);
    assert_eq!(announced.advance(at(109), &PACE), None);
}

#[test]
fn a_rotation_is_read_as_it_was_written() {
    let announced = Rotation::settled(root(1)).announce(root(2), at(0)).unwrap();
    for rotation in [Rotation::settled(root(1)), announced, announced.advance(at(10), &PACE).unwrap()] {
        let text = serde_json::to_string(&rotation).unwrap();
        assert_eq!(serde_json::from_str::<Rotation>(&text).unwrap(), rotation, "{text}");
    }
    assert_eq!(RootId::parse(&root(7).to_string()), Some(root(7)));
    for bad in ["", "07", &"g".repeat(64), &"0".repeat(65)] {
        assert_eq!(RootId::parse(bad), None, "{bad}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Announce(u8),
    Withdraw,
    Pass(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        (0u8..4).prop_map(Act::Announce),
        Just(Act::Withdraw),
        (1u64..60).prop_map(Act::Pass),
        (1u64..60).prop_map(Act::Pass),
    ];
    proptest::collection::vec(act, 0..60)
}

proptest! {
    /// A node hears of a change of the roots up to a notice late, and so does who signs.
    #[test]
    fn every_leaf_that_may_exist_leads_to_a_root_that_every_node_trusts(acts in acts()) {
        let mut rotation = Rotation::settled(root(0));
        let mut now = at(0);
        // Since when each root is trusted without a break, and when it signed last.
        let mut trusted_since = [None; 4];
        trusted_since[0] = Some(SystemTime::UNIX_EPOCH);
        let mut signed_last = [None; 4];
        for act in acts {
            let minutes = match act {
                Act::Announce(which) => {
                    rotation = rotation.announce(root(which), now).unwrap_or(rotation);
                    0
                }
                Act::Withdraw => {
                    rotation = rotation.withdraw().unwrap_or(rotation);
                    0
                }
                Act::Pass(minutes) => minutes,
            };
            for step in 0..=minutes {
                if step > 0 {
                    now += MINUTE;
                }
                rotation = rotation.advance(now, &PACE).unwrap_or(rotation);
                for which in 0..4u8 {
                    let index = usize::from(which);
                    let trusted = rotation.trusted().any(|known| known == root(which));
                    match (trusted, trusted_since[index]) {
                        (true, None) => trusted_since[index] = Some(now),
                        (false, Some(_)) => trusted_since[index] = None,
                        _ => {}
                    }
                    if rotation.signs == root(which) {
                        let since: Option<SystemTime> = trusted_since[index];
                        let noticed = since.and_then(|since| now.duration_since(since).ok());
                        prop_assert!(noticed.is_some_and(|time| time >= PACE.notice), "{which} signs unheard of");
                        signed_last[index] = Some(now);
                    }
                    let last: Option<SystemTime> = signed_last[index];
                    let lives = last.is_some_and(|last| now < last + PACE.longest_life + PACE.notice);
                    prop_assert!(!lives || trusted, "a leaf of {which} lives, and {which} is not trusted");
                }
            }
        }
    }
}
