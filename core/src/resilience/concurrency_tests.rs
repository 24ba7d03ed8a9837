use std::cmp::Reverse;
use std::collections::BinaryHeap;

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn limit() -> ConcurrencyLimit {
    ConcurrencyLimit::new(ConcurrencySettings::default(), 0)
}

/// A pod that works on `workers` calls at a time, in order of arrival, and a limit before it.
struct Simulation {
    limit: ConcurrencyLimit,
    random: u64,
    now: u64,
    /// When each worker is free, in microseconds.
    workers: BinaryHeap<Reverse<u64>>,
    /// End, beginning, calls in flight at the beginning.
    calls: BinaryHeap<Reverse<(u64, u64, u32)>>,
    done: u64,
    refused: u64,
}

impl Simulation {
    fn new(workers: usize) -> Self {
        Self {
            limit: limit(),
            random: 0x9e37_79b9_7f4a_7c15,
            now: 0,
            workers: std::iter::repeat_n(Reverse(0), workers).collect(),
            calls: BinaryHeap::new(),
            done: 0,
            refused: 0,
        }
    }

    /// Uniform in 0 .. 1.
    fn uniform(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn begin(&mut self, service: u64) {
        let Reverse(free) = self.workers.pop().unwrap();
        let end = self.now.max(free) + service;
        self.workers.push(Reverse(end));
        self.calls.push(Reverse((end, self.now, self.calls.len() as u32)));
    }

    fn end_next(&mut self) {
        let Reverse((end, begun, in_flight)) = self.calls.pop().unwrap();
        self.now = end;
        self.done += 1;
        let latency = Duration::from_micros(end - begun);
        self.limit.record(latency, in_flight, Outcome::Success, Duration::from_micros(end));
    }

    /// As many calls as the limit lets through, each `service` (given a uniform number), until `calls` more are done.
    fn saturate(&mut self, calls: u64, service: impl Fn(f64) -> u64) {
        let until = self.done + calls;
        while self.done < until {
            while (self.calls.len() as u32) < self.limit.limit() {
                let random = self.uniform();
                self.begin(service(random));
            }
            self.end_next();
        }
    }

    /// Poisson arrivals every `gap` microseconds; what the limit refuses is lost.
    fn offer(&mut self, calls: u64, gap: f64, service: impl Fn(f64) -> u64) {
        let (mut arrival, mut offered) = (self.now as f64, 0);
        while offered < calls {
            arrival += -gap * (1.0 - self.uniform()).ln();
            while self.calls.peek().is_some_and(|Reverse((end, ..))| *end <= arrival as u64) {
                self.end_next();
            }
            self.now = self.now.max(arrival as u64);
            offered += 1;
            if (self.calls.len() as u32) < self.limit.limit() {
                let random = self.uniform();
                self.begin(service(random));
            } else {
                self.refused += 1;
            }
        }
    }
}

const DETERMINISTIC: fn(f64, f64) -> u64 = |mean, _| mean as u64;
const EXPONENTIAL: fn(f64, f64) -> u64 = |mean, random| (-mean * (1.0 - random).ln()) as u64;

#[test]
fn a_full_pod_gets_a_limit_within_twice_its_capacity_or_the_slack() {
    for workers in [4, 8, 20, 64, 300] {
        for mean in [300.0, 5_000.0, 100_000.0] {
            for (name, service, most) in [("equal", DETERMINISTIC, 2.0), ("exponential", EXPONENTIAL, 2.5)] {
                // Or where calls wait for the slack.
                let most = f64::max(most, 1.0 + 1.5 * 5_000.0 / mean);
                let mut simulation = Simulation::new(workers);
                simulation.saturate(15_000, |random| service(mean, random));
                let (done, now, capacity) = (simulation.done, simulation.now, workers as f64);
                for _ in 0..5 {
                    simulation.saturate(1_000, |random| service(mean, random));
                    let limit = simulation.limit.limit;
                    let fits = limit >= capacity / 2.0 && limit <= capacity * most;
                    assert!(fits, "{limit} for {workers} workers, {name} {mean} µs");
                }
                let rate = (simulation.done - done) as f64 / (simulation.now - now) as f64 * mean / capacity;
                assert!(rate > 0.8, "{rate} of the capacity of {workers} workers, {name} {mean} µs");
            }
        }
    }
}

#[test]
fn learning_costs_little_of_a_full_pod() {
    for (name, service) in [("equal", DETERMINISTIC), ("exponential", EXPONENTIAL)] {
        let mut simulation = Simulation::new(8);
        simulation.saturate(2_000, |random| service(20_000.0, random));
        let (done, now, mut quarter) = (simulation.done, simulation.now, 0);
        for _ in 0..25_000 {
            simulation.saturate(1, |random| service(20_000.0, random));
            quarter += u32::from(matches!(simulation.limit.phase, Phase::Learning { .. }));
        }
        let rate = (simulation.done - done) as f64 / (simulation.now - now) as f64 * 20_000.0 / 8.0;
        assert!(rate > 0.98, "{rate} of the capacity, {name}");
        assert!(quarter > 0, "{name}: in a minute it learned");
    }
}

#[test]
fn twice_and_ten_times_the_load_leave_the_goodput_and_bound_the_wait() {
    for times in [2.0, 10.0] {
        let mut simulation = Simulation::new(20);
        // Each 10 s.
        let (calls, gap) = (10_000 * times as u64, 20_000.0 / 20.0 / times);
        simulation.offer(calls, gap, |random| EXPONENTIAL(20_000.0, random));
        let (done, now) = (simulation.done, simulation.now);
        simulation.offer(calls, gap, |random| EXPONENTIAL(20_000.0, random));
        let rate = (simulation.done - done) as f64 / (simulation.now - now) as f64 * 20_000.0 / 20.0;
        assert!(rate > 0.95, "{rate} of the capacity at {times} times the load");
        assert!(simulation.limit.limit <= 40.0, "{}: nobody waits for longer than two turns", simulation.limit.limit);
    }
}

#[test]
fn a_pod_with_room_refuses_next_to_nothing() {
    let mut simulation = Simulation::new(20);
    simulation.offer(10_000, 5_000.0 / 20.0 / 0.7, |random| EXPONENTIAL(5_000.0, random));
    simulation.refused = 0;
    simulation.offer(20_000, 5_000.0 / 20.0 / 0.7, |random| EXPONENTIAL(5_000.0, random));
    assert!(simulation.refused <= 40, "{} of 20,000", simulation.refused);
}

#[test]
fn hiccups_of_some_milliseconds_take_nothing_from_a_quick_pod() {
    let mut simulation = Simulation::new(4);
    for round in 0..120 {
        if round == 20 {
            simulation.refused = 0;
        }
        // 70 % of what it can, for 20 ms.
        simulation.offer(200, 300.0 / 4.0 / 0.7, |random| EXPONENTIAL(300.0, random));
        // The machine is busy with something else: every worker begins the next call 3 ms later.
        simulation.workers =
            simulation.workers.drain().map(|Reverse(free)| Reverse(free.max(simulation.now) + 3_000)).collect();
    }
    assert!(simulation.refused <= 20, "{} of 20,000", simulation.refused);
}

#[test]
fn half_the_capacity_gets_half_the_limit() {
    let mut simulation = Simulation::new(40);
    simulation.saturate(10_000, |_| 20_000);
    assert!((40.0..=80.0).contains(&simulation.limit.limit));
    let rest: Vec<_> = simulation.workers.drain().take(20).collect();
    simulation.workers.extend(rest);
    // 2 s of the smaller pod.
    simulation.saturate(2_000, |_| 20_000);
    assert!((20.0..=40.0).contains(&simulation.limit.limit), "{}", simulation.limit.limit);
}

#[test]
fn a_pod_whose_calls_become_longer_or_shorter_keeps_its_limit() {
    // From 50 ms; each within a minute, in which it learns once at least.
    for mean in [10_000.0, 25_000.0, 100_000.0, 400_000.0, 1_000_000.0] {
        let mut simulation = Simulation::new(20);
        simulation.saturate(5_000, |random| EXPONENTIAL(50_000.0, random));
        let changed = simulation.now;
        while simulation.now < changed + 60_000_000 {
            simulation.saturate(10, |random| EXPONENTIAL(mean, random));
        }
        let (done, now) = (simulation.done, simulation.now);
        simulation.saturate(2_000, |random| EXPONENTIAL(mean, random));
        let rate = (simulation.done - done) as f64 / (simulation.now - now) as f64 * mean / 20.0;
        let limit = simulation.limit.limit;
        assert!(rate > 0.85, "{rate} of the capacity, {limit} at {mean} µs");
        assert!((10.0..=40.0).contains(&limit), "{limit} at {mean} µs");
    }
}

#[test]
fn one_zero_or_minute_in_fifty_changes_little() {
    for odd in [Duration::ZERO, Duration::from_secs(60), Duration::MAX] {
        let mut simulation = Simulation::new(20);
        for _ in 0..600 {
            simulation.saturate(49, |random| EXPONENTIAL(20_000.0, random));
            let now = Duration::from_micros(simulation.now);
            simulation.limit.record(odd, simulation.calls.len() as u32, Outcome::Success, now);
        }
        let limit = simulation.limit.limit;
        assert!((10.0..=40.0).contains(&limit), "{limit} with {odd:?}");
    }
}

#[test]
fn nothing_but_zeros_is_a_quick_pod() {
    let mut limit = limit();
    for call in 0..100_000 {
        limit.record(Duration::ZERO, limit.limit() - 1, Outcome::Success, call * MS);
    }
    assert_eq!(limit.limit(), 1_000);
}

#[test]
fn grows_only_while_half_of_it_is_in_use() {
    let mut idle = limit();
    for call in 0..10_000 {
        idle.record(5 * MS, 8, Outcome::Success, call * MS);
    }
    assert_eq!(idle.limit.round(), 20.0);
    idle.record(5 * MS, 9, Outcome::Success, 10_000 * MS);
    for call in 0..100 {
        idle.record(5 * MS, 9, Outcome::Success, (10_001 + call) * MS);
    }
    assert!(idle.limit > 20.0, "{}", idle.limit);
}

#[test]
fn slow_answers_of_an_idle_pod_take_no_more_than_is_unused() {
    let mut limit = limit();
    for call in 0..1_000 {
        limit.record(5 * MS, 2, Outcome::Success, call * MS);
    }
    for call in 1_000..1_050 {
        limit.record(30 * MS, 6, Outcome::Success, call * MS);
    }
    assert!(limit.limit < 20.0 && limit.limit >= 14.0, "{}", limit.limit);
}

#[test]
fn timeouts_and_overload_take_a_tenth_once_in_a_round_trip() {
    for outcome in [Outcome::Timeout, Outcome::Overload] {
        let mut limit = limit();
        for call in 0..100 {
            limit.record(10 * MS, 3, Outcome::Success, call * MS);
        }
        for _ in 0..50 {
            limit.record(MS, 19, outcome, 200 * MS);
        }
        assert_eq!(limit.limit(), 18);
        limit.record(MS, 19, outcome, 209 * MS);
        assert_eq!(limit.limit(), 18);
        limit.record(MS, 19, outcome, 210 * MS);
        assert_eq!(limit.limit(), 16);
        for call in 0..10_000 {
            limit.record(MS, 19, outcome, (300 + call) * MS);
        }
        assert_eq!(limit.limit(), 4, "never less");
        assert_eq!(limit.limit(), 4);
    }
}

#[test]
fn a_pod_that_hung_is_back_at_its_limit_in_seconds() {
    let mut simulation = Simulation::new(64);
    simulation.saturate(10_000, |_| 5_000);
    for tick in 0..1_000 {
        simulation.limit.record(
            Duration::from_secs(1),
            3,
            Outcome::Timeout,
            Duration::from_micros(simulation.now) + tick * MS,
        );
    }
    assert_eq!(simulation.limit.limit(), 4);
    simulation.calls.clear();
    simulation.now += 1_000_000;
    let healed = simulation.now;
    while simulation.limit.limit < 64.0 {
        simulation.saturate(100, |_| 5_000);
    }
    assert!(simulation.now - healed < 3_000_000, "{} µs", simulation.now - healed);
}

#[test]
fn failures_client_errors_and_cancelled_calls_say_nothing() {
    let mut limit = limit();
    limit.record(5 * MS, 3, Outcome::Success, MS);
    let before = format!("{limit:?}");
    for outcome in [Outcome::Failure, Outcome::ClientError, Outcome::Cancelled] {
        limit.record(Duration::ZERO, 19, outcome, 2 * MS);
    }
    assert_eq!(format!("{limit:?}"), before);
}

#[test]
fn a_limit_is_small() {
    assert!(size_of::<ConcurrencyLimit>() <= 240, "{}", size_of::<ConcurrencyLimit>());
}

#[test]
fn pods_that_began_together_learn_at_different_times() {
    let times: Vec<Duration> = [0, 100, 255, u64::MAX]
        .map(|random| ConcurrencyLimit::new(ConcurrencySettings::default(), random).settings.relearn_after)
        .into();
    assert_eq!(times[0], Duration::from_secs(30));
    assert!(times[1] > times[0] && times[2] > times[1] && times[3] <= Duration::from_millis(37_500));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever is recorded under whatever settings: the limit stays within its bounds, and one call may start.
    #[test]
    fn the_limit_stays_within_its_bounds(
        (min, max, initial) in (0..50_u32, 0..2_000_u32, any::<u32>()),
        (tolerance, smoothing, backoff) in (any::<f64>(), any::<f64>(), any::<f64>()),
        relearn_micros in 0..10_000_000_u64,
        sane in any::<bool>(),
        calls in proptest::collection::vec((0..6_u8, any::<u64>(), any::<u32>(), 0..100_000_u64), 1..400),
    ) {
        let relearn_after = Duration::from_micros(relearn_micros);
        let settings = if sane {
            ConcurrencySettings { relearn_after, ..ConcurrencySettings::default() }
        } else {
            ConcurrencySettings { min, max, initial, tolerance, slack: relearn_after, smoothing, backoff, relearn_after }
        };
        let (min, max) = (settings.min.max(1), settings.max.max(settings.min.max(1)));
        let mut limit = ConcurrencyLimit::new(settings, relearn_micros);
        let mut now = Duration::ZERO;
        for (kind, latency, in_flight, step) in calls {
            let outcome = [
                Outcome::Success, Outcome::Success, Outcome::Success, Outcome::Timeout, Outcome::Overload, Outcome::Failure,
            ][usize::from(kind)];
            // Of all magnitudes, from 0 to beyond what is known.
            let latency = Duration::from_micros(latency >> (latency % 64));
            limit.record(latency, in_flight % 64, outcome, now);
            now += Duration::from_micros(step);
            prop_assert!(limit.limit >= f64::from(min) && limit.limit <= f64::from(max), "{:?}", limit);
            prop_assert!(limit.limit() >= min && limit.limit() <= max, "{:?}", limit);
            prop_assert!((1..=max).contains(&limit.limit()));
            prop_assert!(limit.quiet_latency.is_none_or(f64::is_finite));
        }
    }
}
