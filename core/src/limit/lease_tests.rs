use proptest::prelude::*;

use super::*;

const RATE: u64 = 1_600_000;
const FLOOR: u64 = 100_000;
const LIFE: u64 = 1_500;

fn ask(demand: u64, held: u64) -> Ask {
    Ask { demand, held, rate: RATE, floor: FLOOR, lease: LIFE }
}

fn lease(rate: u64, demand: u64) -> Lease {
    Lease { rate, demand, expiry: 1 }
}

#[test]
fn a_slice_is_sized_by_demand_and_by_what_is_free() {
    let least_of_two = FLOOR;
    for (fact, others, mine, asked, rate) in [
        ("alone: all of it", vec![], None, ask(0, 0), RATE),
        ("alone, however greedy", vec![], None, ask(LARGEST_DEMAND, 0), RATE),
        ("both idle: half each", vec![lease(RATE / 2, 0)], Some(1), ask(0, 1), RATE / 2),
        ("a newcomer gets the floor", vec![lease(RATE, RATE)], None, ask(RATE, 0), FLOOR),
        ("it keeps the floor until more is free", vec![lease(RATE, RATE)], Some(FLOOR), ask(RATE, FLOOR), least_of_two),
        ("what is free goes to the target", vec![lease(0, RATE)], Some(FLOOR), ask(RATE, FLOOR), RATE / 2),
        ("under the quota: demand and half the rest", vec![lease(0, 0)], Some(1), ask(FLOOR, 1), FLOOR + 750_000),
        ("greedy beside idle: all but the other's standby", vec![lease(0, 0)], Some(1), ask(RATE, 1), RATE - FLOOR / 2),
        ("idle beside greedy: the standby", vec![lease(0, RATE)], Some(1), ask(0, 1), FLOOR / 2),
        ("by demand, 3 to 1", vec![lease(0, 3 * RATE)], Some(1), ask(RATE, 1), 1_500_000 / 4 + FLOOR / 2),
        ("never zero", vec![lease(2 * RATE, RATE)], Some(0), ask(0, 0), 1),
        ("it gives back what is too much", vec![lease(RATE / 2, RATE)], Some(RATE), ask(9 * RATE, RATE), RATE / 2),
        ("one forgotten comes back with what it holds", vec![], None, ask(RATE, 70_000), 70_000),
    ] {
        let grant = grant(others.iter(), mine, &asked);
        assert_eq!(grant, Grant { rate, gateways: others.len() as u64 + 1 }, "{fact}");
    }
}

#[test]
fn a_record_is_the_most_that_a_gateway_may_use() {
    let mut leases = Leases::default();
    assert_eq!(leases.renew(0, "a", &ask(RATE, 0)).rate, RATE);
    assert_eq!(leases.renew(1, "b", &ask(RATE, 0)).rate, FLOOR);
    assert_eq!(leases.renew(500, "a", &ask(RATE, RATE)).rate, RATE / 2);
    assert_eq!(leases.0["a"].rate, RATE, "the answer may be lost");
    assert_eq!(leases.renew(501, "b", &ask(RATE, FLOOR)).rate, FLOOR);
    assert_eq!(leases.renew(1_000, "a", &ask(RATE, RATE / 2)).rate, RATE / 2);
    assert_eq!(leases.0["a"].rate, RATE / 2, "it was not");
    assert_eq!(leases.renew(1_001, "b", &ask(RATE, FLOOR)).rate, RATE / 2);
}

#[test]
fn leases_run_out_by_their_own_expiry() {
    let mut leases = Leases::default();
    let _ = leases.renew(0, "a", &ask(RATE, 0));
    assert_eq!(leases.renew(LIFE - 1, "b", &ask(RATE, 0)), Grant { rate: FLOOR, gateways: 2 });
    assert_eq!(leases.renew(LIFE, "b", &ask(RATE, FLOOR)), Grant { rate: RATE, gateways: 1 });
}

#[test]
fn wrong_records_and_a_clock_far_back_are_forgotten() {
    let right = Lease { rate: RATE, demand: RATE, expiry: 100_000 };
    for (now, lease, kept) in [
        (90_000, right, true),
        (100_000 - LONGEST_LEASE, right, true),
        (100_000 - LONGEST_LEASE - 1, right, false),
        (90_000, Lease { rate: LARGEST_RATE + 1, ..right }, false),
        (90_000, Lease { demand: LARGEST_DEMAND + 1, ..right }, false),
    ] {
        let mut leases = Leases([("a".to_owned(), lease)].into());
        let _ = leases.renew(now, "b", &ask(0, 0));
        assert_eq!(leases.0.contains_key("a"), kept, "{lease:?} at {now}");
    }
}

#[test]
fn arguments_are_in_the_scripts_order() {
    assert_eq!(ask(7, 8).arguments("eu-1"), ["eu-1", "7", "8", "1600000", "100000", "1500"]);
    assert!(SCRIPT.contains("local demand, held = tonumber(ARGV[2]), tonumber(ARGV[3])"));
    assert!(SCRIPT.contains("local rate, floor, lease = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])"));
    for constant in [LARGEST_RATE, LARGEST_DEMAND, LONGEST_LEASE, FINEST] {
        assert!(SCRIPT.contains(&format!("= {constant}\n")), "the script knows {constant}");
    }
}

#[test]
fn products_stay_where_lua_is_exact() {
    let largest = 1_u64 << 53;
    assert!(LARGEST_RATE * FINEST < largest);
    assert!(1_000 * LARGEST_DEMAND < largest, "a thousand gateways");
}

proptest! {
    /// The rates on record sum to at most the quota, and a floor for each newcomer since they last did.
    #[test]
    fn records_sum_to_the_quota_and_a_floor_for_each_newcomer(
        rate in 16_u64..LARGEST_RATE,
        calls in proptest::collection::vec((0_usize..8, 0_u64..LARGEST_DEMAND, 0_u64..400, any::<bool>()), 1..200),
    ) {
        let (mut leases, mut held, mut now, mut newcomers) = (Leases::default(), [0; 8], 0, 0);
        let floor = rate / 16;
        for (index, demand, passed, answered) in calls {
            now += passed;
            let name = index.to_string();
            leases.0.retain(|_, lease| lease.is_right(now));
            if !leases.0.contains_key(&name) {
                held[index] = 0;
                newcomers += 1;
            }
            let asked = Ask { demand, held: held[index], rate, floor, lease: LIFE };
            let grant = leases.renew(now, &name, &asked);
            if answered {
                held[index] = grant.rate;
            }
            prop_assert!((1..=rate).contains(&grant.rate));
            prop_assert!(held[index] <= leases.0[&name].rate);
            let sum: u64 = leases.0.values().map(|lease| lease.rate).sum();
            prop_assert!(sum <= rate + newcomers * floor, "{sum} of {rate} after {newcomers} newcomers");
            if sum <= rate {
                newcomers = 0;
            }
        }
    }

    /// Whatever the demands, with steady ones the sum comes to R, by demand.
    #[test]
    fn steady_demands_come_to_the_whole_quota(demands in proptest::collection::vec(0_u64..10 * RATE, 1..9)) {
        let mut leases = Leases::default();
        let mut held = vec![0; demands.len()];
        for round in 0..12_u64 {
            for (index, demand) in demands.iter().enumerate() {
                held[index] = leases.renew(round * 500, &index.to_string(), &ask(*demand, held[index])).rate;
            }
        }
        let sum: u64 = held.iter().sum();
        prop_assert!((RATE - RATE / 1_000..=RATE).contains(&sum), "{sum}: {held:?}");
        for (demand, rate) in demands.iter().zip(&held) {
            let less = demands.iter().zip(&held).filter(|(other, _)| *other <= demand);
            prop_assert!(less.clone().all(|(_, other)| *other <= rate + RATE / 1_000), "{held:?}");
        }
    }
}
