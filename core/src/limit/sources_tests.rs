use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::limit::{Rate, Reserves};

const SECOND: u64 = 1_000_000_000;

fn sources(rate: u64, burst: u32, slip: u32, places: usize) -> Sources {
    let rate = Rate { tokens: rate, per: Duration::from_secs(1) };
    Sources::new(Gcra::new(rate, burst, Reserves::default()).unwrap(), slip, places)
}

fn hash(address: impl Into<IpAddr>) -> u64 {
    network_hash(address.into(), 7)
}

#[test]
fn a_network_is_answered_up_to_its_limit_and_slipped_every_second_time_beyond() {
    let mut sources = sources(10, 3, 2, 64);
    let judged: Vec<Judged> = (0..7).map(|_| sources.decide(1, SECOND)).collect();
    use Judged::{Answered, Dropped, Slipped};
    assert_eq!(judged, [Answered, Answered, Answered, Dropped, Slipped, Dropped, Slipped]);
    assert_eq!(sources.decide(2, SECOND), Answered, "another network has its own bucket");
    assert_eq!(sources.decide(1, SECOND + SECOND / 10), Answered, "a token has come");
    assert_eq!(sources.decide(1, SECOND + SECOND / 10), Dropped);
}

#[test]
fn slip_0_drops_all_and_slip_1_none() {
    for (slip, expected) in [(0, Judged::Dropped), (1, Judged::Slipped)] {
        let mut sources = sources(1, 1, slip, 8);
        assert_eq!(sources.decide(1, SECOND), Judged::Answered);
        assert!((0..10).all(|_| sources.decide(1, SECOND) == expected));
    }
}

#[test]
fn networks_are_24_bits_of_ipv4_and_56_of_ipv6() {
    let v4 = |text: &str| hash(text.parse::<Ipv4Addr>().unwrap());
    let v6 = |text: &str| hash(text.parse::<Ipv6Addr>().unwrap());
    assert_eq!(v4("192.0.2.1"), v4("192.0.2.254"));
    assert_ne!(v4("192.0.2.1"), v4("192.0.3.1"));
    assert_eq!(v6("2001:db8:0:100::1"), v6("2001:db8:0:1ff:ffff::"));
    assert_ne!(v6("2001:db8:0:100::1"), v6("2001:db8:0:200::1"));
    assert_eq!(v6("::ffff:192.0.2.9"), v4("192.0.2.1"), "a socket of both families");
    assert_ne!(network_hash(Ipv4Addr::LOCALHOST.into(), 1), network_hash(Ipv4Addr::LOCALHOST.into(), 2));
}

#[test]
fn who_asks_too_much_is_not_forgotten_for_a_flood_of_new_networks() {
    let mut sources = sources(100, 50, 2, 1_024);
    let (greedy, mut answered) = (hash(Ipv4Addr::new(192, 0, 2, 1)), 0);
    // 20,000 new networks and 2,000 of the greedy one's datagrams in a second.
    for index in 0..20_000_u64 {
        let now = SECOND + index * SECOND / 20_000;
        sources.decide(hash(Ipv4Addr::from_bits(0x0b00_0000 + ((index as u32) << 8))), now);
        if index % 10 == 0 {
            answered += u32::from(sources.decide(greedy, now) == Judged::Answered);
        }
    }
    assert!(answered <= 150, "burst and a second's rate: {answered}");
}

#[test]
fn a_flood_of_new_networks_costs_nobody_an_answer() {
    let mut sources = sources(100, 50, 2, 64);
    for index in 0..50_000_u64 {
        let now = SECOND + index * SECOND / 20_000;
        assert_eq!(sources.decide(hash(Ipv4Addr::from_bits((index as u32) << 8)), now), Judged::Answered);
    }
}

proptest! {
    /// However datagrams of a few networks mix, in a table that has room for them.
    #[test]
    fn no_network_gets_more_than_burst_and_rate(
        datagrams in proptest::collection::vec((0_u64..6, 0_u64..SECOND / 20), 1..400),
        burst in 1_u32..20,
        rate in 1_u64..200,
    ) {
        let mut sources = sources(rate, burst, 2, 64);
        let (mut now, mut answered) = (SECOND, [0_u64; 6]);
        for (network, pause) in datagrams {
            now += pause;
            if sources.decide(network, now) == Judged::Answered {
                answered[network as usize] += 1;
            }
            let most = u64::from(burst) + (now - SECOND) * rate / SECOND;
            prop_assert!(answered[network as usize] <= most, "{answered:?} of {most}");
        }
    }

    /// Any hashes at any times, also backwards: a decision, and at least the first of each network is answered.
    #[test]
    fn any_hash_at_any_time_is_judged(hashes in proptest::collection::vec(any::<(u64, u64)>(), 1..200)) {
        let mut sources = sources(5, 2, 2, 16);
        for (hash, now) in hashes {
            sources.decide(hash, now);
        }
        prop_assert_eq!(sources.buckets.len(), 16);
    }
}
