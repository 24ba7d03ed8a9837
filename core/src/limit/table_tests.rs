use proptest::prelude::*;

use super::super::{Rate, Reserves};
use super::*;

const MILLISECOND: u64 = 1_000_000;

/// A bucket of 4 tokens, one of which comes each 10 ms.
fn gcra() -> Gcra {
    let rate = Rate { tokens: 100, per: Duration::from_secs(1) };
    Gcra::new(rate, 4, Reserves::default()).unwrap()
}

fn table(keys: usize, keys_of_owner: usize) -> Table {
    Table::new(TableBounds { keys, keys_of_owner })
}

/// Spreads small numbers as a hash does.
fn key(number: u64, owner: u32) -> Key {
    let spread = (u128::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    Key { hash: spread, owner }
}

fn ask(table: &mut Table, key: Key, now_ns: u64, overflow: &mut u64) -> (bool, bool) {
    let judged = table.decide(key, &gcra(), now_ns, 1, Class::Critical, overflow);
    (matches!(judged.decision, Decision::Admitted { .. }), judged.overflowed)
}

#[test]
fn a_key_has_its_own_bucket() {
    let (mut table, mut overflow) = (table(100, 100), 0);
    for number in 0..10 {
        for _ in 0..4 {
            assert_eq!(ask(&mut table, key(number, 0), 0, &mut overflow), (true, false));
        }
        assert_eq!(ask(&mut table, key(number, 0), 0, &mut overflow), (false, false));
    }
    assert_eq!((table.len(), overflow), (10, 0));
}

#[test]
fn a_paid_off_key_is_forgotten() {
    let (mut table, mut overflow) = (table(10_000, 10_000), 0);
    for number in 0..10_000 {
        assert_eq!(ask(&mut table, key(number, 0), number * MILLISECOND, &mut overflow), (true, false));
        assert!(table.len() <= 2 * SMALL, "each is paid off after 10 ms: {} are held", table.len());
    }
    assert!(table.buckets.capacity() < 4 * SMALL);
}

#[test]
fn memory_is_given_back_after_a_wave() {
    let (mut table, mut overflow) = (table(20_000, 20_000), 0);
    for number in 0..20_000 {
        ask(&mut table, key(number, 0), 0, &mut overflow);
    }
    assert_eq!(table.len(), 20_000);
    ask(&mut table, key(20_000, 0), 1_000 * MILLISECOND, &mut overflow);
    assert_eq!(table.len(), 1, "all were paid off");
    assert!(table.buckets.capacity() <= 4 * SMALL, "{}", table.buckets.capacity());
}

#[test]
fn t56_a_million_keys_of_one_owner_take_no_memory_and_nobodys_place() {
    let (mut table, mut sweeping, mut honest) = (table(2_000, 500), 0, 0);
    let mut overflowed = 0;
    for number in 0..100_000 {
        let (_, no_room) = ask(&mut table, key(number, 1), number, &mut sweeping);
        overflowed += u32::from(no_room);
        assert!(table.len_of(1) <= 500);
        if number % 250 == 0 {
            let other = ask(&mut table, key(1_000_000 + number, 2), number, &mut honest);
            assert_eq!(other, (true, false), "the other one has its own places");
        }
    }
    assert_eq!(overflowed, 100_000 - 500);
    assert!(table.len() <= 2_000);
}

#[test]
fn keys_without_room_share_their_owners_bucket() {
    let (mut table, mut overflow) = (table(3, 3), 0);
    for number in 0..3 {
        assert_eq!(ask(&mut table, key(number, 0), 0, &mut overflow), (true, false));
    }
    let strangers: Vec<_> = (3..9).map(|number| ask(&mut table, key(number, 0), 0, &mut overflow)).collect();
    let (admitted, refused) = ((true, true), (false, true));
    assert_eq!(strangers, [admitted, admitted, admitted, admitted, refused, refused], "one bucket of 4 for all");
    assert_eq!(ask(&mut table, key(0, 0), 0, &mut overflow), (true, false), "those who have a place keep it");
    assert_eq!(ask(&mut table, key(3, 0), 99 * MILLISECOND, &mut overflow), (true, true), "not looked for so soon");
    let later = 100 * MILLISECOND;
    assert_eq!(ask(&mut table, key(3, 0), later, &mut overflow), (true, false), "paid-off keys make room");
}

#[test]
fn what_is_given_back_was_never_taken() {
    let (mut table, mut overflow) = (table(2, 2), 0);
    let now_ns = 50 * MILLISECOND;
    ask(&mut table, key(0, 0), now_ns, &mut overflow);
    for number in 0..2 {
        let before = table.would_decide(key(number, 0), &gcra(), now_ns, 1, Class::Critical, overflow);
        ask(&mut table, key(number, 0), now_ns, &mut overflow);
        table.give_back(key(number, 0).hash, &gcra(), now_ns, 1);
        let after = table.would_decide(key(number, 0), &gcra(), now_ns, 1, Class::Critical, overflow);
        assert_eq!(before, after);
    }
    assert_eq!((table.len(), table.len_of(0)), (1, 1), "a full bucket takes no place");
    // Nothing was taken from a key without room.
    ask(&mut table, key(1, 0), now_ns, &mut overflow);
    assert!(table.would_decide(key(2, 0), &gcra(), now_ns, 1, Class::Critical, overflow).overflowed);
    table.give_back(key(2, 0).hash, &gcra(), now_ns, 1);
    assert_eq!(table.len(), 2);
}

#[test]
fn what_changes_nothing_takes_no_place() {
    let (mut table, mut overflow) = (table(3, 3), 0);
    let never = table.decide(key(0, 0), &gcra(), 0, 5, Class::Low, &mut overflow);
    assert_eq!(never, Judged { decision: Decision::Never { remaining: 2 }, overflowed: false });
    let free = table.decide(key(0, 0), &gcra(), 0, 0, Class::Low, &mut overflow);
    assert!(matches!(free.decision, Decision::Admitted { .. }));
    assert!(table.is_empty());
}

#[test]
fn a_place_takes_32_bytes() {
    assert_eq!(size_of::<(u128, Bucket)>(), 32);
}

#[test]
fn tables_may_be_picked_by_any_bits_of_the_hash() {
    for shift in [0, 58, 64, 122] {
        let of_one_table = (0..64_000_u64).map(|number| key(number, 0).hash).filter(|hash| (hash >> shift) & 63 == 5);
        let places = of_one_table.map(|hash| {
            let mut hasher = Folded::default();
            hasher.write_u128(hash);
            hasher.finish() & 0xff
        });
        let places: std::collections::BTreeSet<u64> = places.collect();
        assert!(places.len() > 200, "{} of 256 first places by bits from {shift}", places.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Against a map that never forgets: the same decisions wherever there was room; no room only when
    /// there was none; the bounds never passed.
    #[test]
    fn keys_are_judged_as_by_a_map_that_never_forgets(
        bounds in (1_usize..150, 1_usize..150),
        requests in proptest::collection::vec((0_u64..300, 0_u32..3, 0_u64..4, 1_u32..6), 1..600),
    ) {
        let gcra = gcra();
        let mut table = table(bounds.0, bounds.1);
        let mut model: HashMap<(u64, u32), u64> = HashMap::new();
        let mut overflow = [(0, 0); 3];
        let mut now = 0;
        for (number, owner, passed, cost) in requests {
            now += passed * MILLISECOND;
            let own = &mut overflow[owner as usize];
            let id = Key { hash: key(number, owner).hash ^ u128::from(owner), owner };
            let judged = table.decide(id, &gcra, now, cost, Class::Critical, &mut own.0);
            let state = if judged.overflowed {
                let lately = |state: &u64| state.saturating_add(100 * MILLISECOND) > now;
                let held = model.iter().filter(|(_, state)| lately(state)).count();
                let of_owner = model.iter().filter(|((_, of), state)| *of == owner && lately(state)).count();
                prop_assert!(held >= bounds.0 || of_owner >= bounds.1, "there was room");
                &mut own.1
            } else {
                model.entry((number, owner)).or_insert(0)
            };
            let expected = gcra.decide(*state, now, cost, Class::Critical);
            keep(expected, state);
            prop_assert_eq!(outcome(judged.decision), outcome(expected));
            prop_assert!(table.len() <= bounds.0 && (0..3).all(|owner| table.len_of(owner) <= bounds.1));
            prop_assert_eq!((0..3).map(|owner| table.len_of(owner)).sum::<usize>(), table.len());
        }
    }
}

/// A forgotten bucket may be told as 0 or as any time that has passed: compare what callers see.
fn outcome(decision: Decision) -> (u8, u32, Option<Duration>) {
    let kind = match decision {
        Decision::Admitted { .. } => 0,
        Decision::Refused { .. } => 1,
        Decision::Never { .. } => 2,
    };
    (kind, decision.remaining(), decision.reset())
}
