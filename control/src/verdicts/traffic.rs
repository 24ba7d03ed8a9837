//! What the gateways of one region counted, put together.
//!
//! The rule: rates are each gateway's own counts over its own time, so that a heartbeat that comes late, or twice in a
//! window, changes no rate. A gateway that was silent for three heartbeats has none. What no gateway can do is not
//! believed: one broken counter would have all regions shed everything for as long as demand is remembered. Of the
//! figures beside each other nothing follows: a flood that a gateway refuses is in `requests` alone.
//!
//! What a region can serve is declared, or else measured where it shows: while it refuses more than 1 % because there is
//! too much, what it serves is what it can. That is believed for ten minutes, since regions grow; serving more without
//! refusing raises it. Before, nothing is known, and the plan never says that it is too much.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use spillway_core::health::{Quality, Sample, SoftSettings, Watch};
use spillway_core::units::Name;
use spillway_proto::control;

/// What is judged together: about one heartbeat of each gateway.
const WINDOW: Duration = Duration::from_secs(5);
/// Three heartbeats.
const STALE: Duration = Duration::from_secs(15);
/// How long a measured capacity is believed.
const MEASURED: Duration = Duration::from_secs(600);
/// The share refused above which a region is full.
const FULL: f64 = 0.01;
/// Fewer served requests measure nothing.
const LEAST: u64 = 100;
/// Requests/s above which a gateway's counter is broken, or the gateway is not itself: what 64 cores could refuse that
/// take 64 µs for each.
const MOST: f64 = 1_000_000.0;

/// One region. Bounded by its gateways, of which who calls says which there are.
#[derive(Clone, Debug)]
pub(super) struct RegionTraffic {
    watch: Watch,
    beats: BTreeMap<Name, Beat>,
    window: Option<Window>,
    measured: Option<(f64, Duration)>,
    /// Gateways whose last heartbeat was not believed.
    disbelieved: BTreeSet<Name>,
}

/// What a gateway said last, per second.
#[derive(Clone, Copy, Debug)]
struct Beat {
    at: Duration,
    requests: f64,
    classes: [f64; 4],
}

#[derive(Clone, Debug)]
struct Window {
    from: Duration,
    gateways: BTreeMap<Name, Counts>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    time: Duration,
    served: u64,
    slow: u64,
    errors: u64,
    shed: u64,
}

impl RegionTraffic {
    pub(super) fn new(settings: SoftSettings) -> Self {
        Self {
            watch: Watch::new(settings),
            beats: BTreeMap::new(),
            window: None,
            measured: None,
            disbelieved: BTreeSet::new(),
        }
    }

    /// What another leader knew of its capacity.
    pub(super) fn resume(&mut self, capacity: f64, now: Duration) {
        self.measured.get_or_insert((capacity, now));
    }

    /// A gateway's heartbeat. Whether it is believed.
    pub(super) fn hear(&mut self, gateway: &Name, told: &control::Traffic, now: Duration) -> bool {
        let time = Duration::from_millis(told.milliseconds.clamp(1, 3_600_000));
        let rate = |count: u64| count as f64 / time.as_secs_f64();
        let counts = [told.requests, told.served, told.shed].into_iter().chain(told.classes.iter().copied());
        let most = counts.max().unwrap_or_default();
        if rate(most) > MOST {
            if self.disbelieved.insert(gateway.clone()) {
                let milliseconds = told.milliseconds;
                tracing::warn!(%gateway, most, milliseconds, "a gateway counts more requests than any can have");
            }
            return false;
        }
        self.disbelieved.remove(gateway);
        let mut classes = [0.0; 4];
        for (class, count) in classes.iter_mut().zip(&told.classes) {
            *class = rate(*count);
        }
        self.beats.insert(gateway.clone(), Beat { at: now, requests: rate(told.requests), classes });
        let new = || Window { from: now.saturating_sub(time.min(WINDOW)), gateways: BTreeMap::new() };
        let counts = self.window.get_or_insert_with(new).gateways.entry(gateway.clone()).or_default();
        counts.time = counts.time.saturating_add(time);
        counts.served = counts.served.saturating_add(told.served);
        counts.slow = counts.slow.saturating_add(told.slow.min(told.served));
        counts.errors = counts.errors.saturating_add(told.errors.min(told.served));
        counts.shed = counts.shed.saturating_add(told.shed);
        true
    }

    /// Its clients may be counted elsewhere from now on, so they count here no longer: counted twice, they would be
    /// shed for a demand that nobody has. That the sum dips meanwhile is what the demand's memory is for.
    pub(super) fn left(&mut self, gateway: &Name) {
        self.beats.remove(gateway);
    }

    /// Forgets who is no gateway of it.
    pub(super) fn keep(&mut self, is_gateway: impl Fn(&Name) -> bool) {
        self.beats.retain(|gateway, _| is_gateway(gateway));
        self.disbelieved.retain(|gateway| is_gateway(gateway));
    }

    /// Looks at what was counted. `declared`: what it is sized for, in requests/s.
    pub(super) fn observe(&mut self, declared: Option<f64>, now: Duration) {
        self.beats.retain(|_, beat| now.saturating_sub(beat.at) <= STALE);
        self.measured = self.measured.filter(|(_, at)| now.saturating_sub(*at) <= MEASURED);
        let Some(window) = self.window.take_if(|window| now.saturating_sub(window.from) >= WINDOW) else { return };
        let sum = |count: fn(&Counts) -> u64| window.gateways.values().map(count).fold(0, u64::saturating_add);
        let per_second = |count: fn(&Counts) -> u64| -> f64 {
            window.gateways.values().map(|counts| count(counts) as f64 / counts.time.as_secs_f64()).sum()
        };
        let (served, shed) = (sum(|counts| counts.served), sum(|counts| counts.shed));
        let rate = per_second(|counts| counts.served);
        let asked = rate + per_second(|counts| counts.shed);
        self.watch.observe(Sample {
            from: window.from,
            to: now,
            requests: served,
            slow: sum(|counts| counts.slow),
            errors: sum(|counts| counts.errors),
            shed,
            utilisation: declared.filter(|capacity| *capacity > 0.0).map(|capacity| asked / capacity),
        });
        let is_full = shed as f64 > FULL * served.saturating_add(shed) as f64;
        let more = self.measured.is_some_and(|(known, _)| rate > known);
        if served >= LEAST && (is_full || more) {
            self.measured = Some((rate, now));
        }
    }

    pub(super) fn quality(&self, now: Duration) -> Quality {
        self.watch.quality(now)
    }

    /// Both measures of quality, for people.
    pub(super) fn reason(&self) -> String {
        self.watch.reason()
    }

    /// Requests/s of clients. None if no gateway says it.
    pub(super) fn load(&self) -> Option<f64> {
        self.beats.values().map(|beat| beat.requests).reduce(|sum, rate| sum + rate)
    }

    /// Of these: critical, high, normal, low.
    pub(super) fn classes(&self) -> [f64; 4] {
        let mut sums = [0.0; 4];
        for beat in self.beats.values() {
            sums.iter_mut().zip(beat.classes).for_each(|(sum, rate)| *sum += rate);
        }
        sums
    }

    /// Requests/s that it showed to be all it can serve.
    pub(super) fn measured(&self) -> Option<f64> {
        self.measured.map(|(rate, _)| rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const START: Duration = Duration::from_secs(1_000);

    fn told(milliseconds: u64, served: u64, shed: u64) -> control::Traffic {
        let requests = served + shed;
        control::Traffic {
            milliseconds,
            requests,
            classes: vec![0, 0, requests, 0],
            served,
            shed,
            ..Default::default()
        }
    }

    fn gateway(number: u32) -> Name {
        Name::parse(&format!("gw-{number}")).unwrap()
    }

    #[test]
    fn rates_are_each_gateways_own_and_end_with_its_heartbeats() {
        let mut traffic = RegionTraffic::new(SoftSettings::default());
        assert_eq!((traffic.load(), traffic.classes()), (None, [0.0; 4]));
        traffic.hear(&gateway(0), &told(5_000, 500, 0), START);
        traffic.hear(&gateway(1), &told(10_000, 500, 0), START + SECOND);
        assert_eq!((traffic.load(), traffic.classes()), (Some(150.0), [0.0, 0.0, 150.0, 0.0]));
        traffic.hear(&gateway(0), &told(5_000, 500, 0), START + SECOND * 10);
        traffic.observe(None, START + SECOND * 17);
        assert_eq!(traffic.load(), Some(100.0));
        traffic.hear(&gateway(1), &told(10_000, 500, 0), START + SECOND * 17);
        assert_eq!(traffic.load(), Some(150.0));
        traffic.left(&gateway(1));
        assert_eq!(traffic.load(), Some(100.0));
        traffic.keep(|name| *name != gateway(0));
        assert_eq!(traffic.load(), None);
    }

    /// Each figure alone would move plans: the demand, the capacity, the classes that are shed.
    #[test]
    fn what_no_gateway_can_do_is_not_believed() {
        let mut traffic = RegionTraffic::new(SoftSettings::default());
        let good = told(5_000, 500, 0);
        let bad = [
            control::Traffic { requests: u64::MAX, ..good.clone() },
            control::Traffic { requests: 5_000_001, ..good.clone() },
            control::Traffic { served: u64::MAX, ..good.clone() },
            control::Traffic { shed: u64::MAX, ..good.clone() },
            control::Traffic { classes: vec![0, 0, 0, u64::MAX], ..good.clone() },
            control::Traffic { milliseconds: 0, requests: 5_000, ..good.clone() },
        ];
        for (number, told) in bad.iter().enumerate() {
            assert!(!traffic.hear(&gateway(0), told, START), "{number}");
        }
        traffic.observe(None, START + SECOND * 5);
        assert_eq!((traffic.load(), traffic.classes(), traffic.measured()), (None, [0.0; 4], None));
        assert!(traffic.hear(&gateway(0), &good, START));
        assert!(traffic.hear(&gateway(1), &told(5_000, 0, 5_000_000), START), "a flood that it refuses");
        assert_eq!(traffic.load(), Some(1_000_100.0));
        assert!(!traffic.hear(&gateway(1), &bad[0], START));
        assert_eq!(traffic.load(), Some(1_000_100.0), "what it said before stands for its time");
    }

    #[test]
    fn capacity_shows_where_there_is_too_much_and_is_believed_for_ten_minutes() {
        let mut traffic = RegionTraffic::new(SoftSettings::default());
        let beat = |traffic: &mut RegionTraffic, second: u32, served, shed| {
            let now = START + SECOND * second;
            for number in 0..2 {
                traffic.hear(&gateway(number), &told(5_000, served, shed), now);
            }
            traffic.observe(None, now);
        };
        beat(&mut traffic, 5, 500, 5);
        assert_eq!(traffic.measured(), None, "1 % is no more than noise");
        beat(&mut traffic, 10, 500, 50);
        assert_eq!(traffic.measured(), Some(200.0));
        beat(&mut traffic, 15, 400, 0);
        assert_eq!(traffic.measured(), Some(200.0), "serving less, it is not full");
        beat(&mut traffic, 20, 600, 0);
        assert_eq!(traffic.measured(), Some(240.0), "it grew");
        beat(&mut traffic, 25, 550, 55);
        assert_eq!(traffic.measured(), Some(220.0));
        beat(&mut traffic, 25 + 600, 10, 0);
        assert_eq!(traffic.measured(), Some(220.0));
        beat(&mut traffic, 25 + 605, 10, 0);
        assert_eq!(traffic.measured(), None);
    }

    #[test]
    fn errors_for_three_minutes_are_a_verdict_unless_there_is_too_much() {
        for (shed, quality) in [(0, Quality::Failing), (200, Quality::Fine)] {
            let mut traffic = RegionTraffic::new(SoftSettings::default());
            for beat in 1..=38_u32 {
                let now = START + SECOND * (beat * 5);
                let sick = control::Traffic { errors: 60, ..told(5_000, 500, shed) };
                traffic.hear(&gateway(0), &sick, now);
                traffic.observe(None, now);
                if beat == 30 {
                    let so_far = if shed == 0 { Quality::Breaching } else { Quality::Fine };
                    assert_eq!(traffic.quality(now), so_far);
                }
            }
            assert_eq!(traffic.quality(START + SECOND * 190), quality, "{}", traffic.reason());
        }
    }
}
