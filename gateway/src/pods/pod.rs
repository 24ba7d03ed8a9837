//! What is known of one pod, shared by all threads and kept across Snapshots.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::resilience::outlier::PodId;
use spillway_core::resilience::{ConcurrencyLimit, ConcurrencySettings, Outcome};
use spillway_core::routing::{Report, Reported, slow_start};
use spillway_core::units::Name;

/// Where a pod is and who it must be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodKey {
    pub pool: Name,
    pub pod: Name,
    pub address: SocketAddr,
}

/// What its health checks say.
///
/// ```text
/// Unknown --answered--> Serving --failed--> Failed --answered--> Serving
/// ```
#[derive(Debug, Default)]
pub struct Health(
    /// 0: unknown.
    AtomicU8,
);

impl Health {
    const SERVING: u8 = 1;
    const FAILED: u8 = 2;

    /// Whether the last check was answered.
    pub fn is_serving(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::SERVING
    }

    /// Not checked yet counts as alive: unknown is not down.
    pub fn may_serve(&self) -> bool {
        self.0.load(Ordering::Relaxed) != Self::FAILED
    }
}

#[derive(Debug)]
pub struct PodState {
    pub key: PodKey,
    pub id: PodId,
    pub health: Health,
    /// When its weight began to rise.
    since_us: AtomicU64,
    /// Calls under way, of streams until their first answer.
    calls: AtomicU32,
    /// Streams beyond that: load, but idle ones must not fill the limit.
    streams: AtomicU32,
    /// That of `concurrency`, to be read without its lock.
    limit: AtomicU32,
    concurrency: Mutex<ConcurrencyLimit>,
    /// 0: it has reported nothing.
    reported_us: AtomicU64,
    /// The bits of a utilisation, or of -1 - requests. The two words may be of two reports, both fresh.
    reported: AtomicU64,
}

impl PodState {
    pub fn new(key: PodKey, id: PodId, random: u64, now: Duration) -> Self {
        let concurrency = ConcurrencyLimit::new(ConcurrencySettings::default(), random);
        Self {
            key,
            id,
            health: Health::default(),
            since_us: AtomicU64::new(micros(now)),
            calls: AtomicU32::new(0),
            streams: AtomicU32::new(0),
            limit: AtomicU32::new(concurrency.limit()),
            concurrency: Mutex::new(concurrency),
            reported_us: AtomicU64::new(0),
            reported: AtomicU64::new(0),
        }
    }

    /// Says what the last check showed. Whether that is a change.
    pub fn checked(&self, serving: bool, now: Duration) -> bool {
        let next = if serving { Health::SERVING } else { Health::FAILED };
        let before = self.health.0.swap(next, Ordering::Relaxed);
        if serving && before == Health::FAILED {
            self.healed(now);
        }
        before != next
    }

    /// Its weight rises from now on.
    pub fn healed(&self, now: Duration) {
        self.since_us.store(micros(now), Ordering::Relaxed);
    }

    /// The share of its weight that it has.
    pub fn share(&self, window: Duration, now: Duration) -> f64 {
        let since = Duration::from_micros(self.since_us.load(Ordering::Relaxed));
        slow_start(now.saturating_sub(since), window)
    }

    /// Calls and streams of all threads.
    pub fn in_flight(&self) -> usize {
        (self.calls() + self.streams.load(Ordering::Relaxed)) as usize
    }

    /// Calls that the limit is for.
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    pub fn has_room(&self) -> bool {
        self.calls() < self.limit()
    }

    /// A call begins. How many there were before it.
    pub fn begin(&self) -> u32 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    /// A call ended that began beside others.
    pub fn end(&self, took: Duration, beside: u32, outcome: Outcome, now: Duration) {
        let mut concurrency = self.concurrency.lock();
        concurrency.record(took, beside, outcome, now);
        self.limit.store(concurrency.limit(), Ordering::Relaxed);
        self.calls.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn open_stream(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub fn close_stream(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn report(&self, reported: Reported, now: Duration) {
        let value = match reported {
            Reported::Utilisation(utilisation) => utilisation,
            Reported::Requests(requests) => -1.0 - requests as f64,
        };
        self.reported.store(value.to_bits(), Ordering::Relaxed);
        self.reported_us.store(micros(now).max(1), Ordering::Relaxed);
    }

    pub fn reported(&self, now: Duration) -> Option<Report> {
        let at = self.reported_us.load(Ordering::Relaxed);
        let value = f64::from_bits(self.reported.load(Ordering::Relaxed));
        let reported =
            if value < 0.0 { Reported::Requests((-1.0 - value) as usize) } else { Reported::Utilisation(value) };
        (at > 0).then(|| Report { reported, age: now.saturating_sub(Duration::from_micros(at)) })
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pod() -> PodState {
        let name = |text| Name::parse(text).unwrap();
        let key = PodKey { pool: name("scorers"), pod: name("pod-0"), address: "127.0.0.1:1".parse().unwrap() };
        PodState::new(key, 1, 0, SECOND)
    }

    #[test]
    fn unknown_is_not_down_and_a_healed_pod_starts_slowly() {
        let pod = pod();
        assert!(pod.health.may_serve() && !pod.health.is_serving());
        assert!(pod.checked(true, SECOND * 20));
        assert_eq!(pod.share(SECOND * 10, SECOND * 20), 1.0, "it was only unknown");
        assert!(pod.checked(false, SECOND * 20) && !pod.checked(false, SECOND * 20));
        assert!(!pod.health.may_serve());
        assert!(pod.checked(true, SECOND * 21));
        assert_eq!(pod.share(SECOND * 10, SECOND * 26), 0.5);
    }

    #[test]
    fn both_forms_of_a_report_are_kept_with_their_age() {
        let pod = pod();
        assert_eq!(pod.reported(SECOND), None);
        for reported in [Reported::Utilisation(0.25), Reported::Requests(0), Reported::Requests(17)] {
            pod.report(reported, SECOND);
            assert_eq!(pod.reported(SECOND * 3), Some(Report { reported, age: SECOND * 2 }));
        }
    }

    #[test]
    fn streams_are_load_and_take_no_room() {
        let pod = pod();
        assert_eq!((0..pod.limit()).map(|_| pod.begin()).last(), Some(pod.limit() - 1));
        assert!(!pod.has_room());
        pod.end(SECOND, 0, Outcome::Cancelled, SECOND);
        pod.open_stream();
        assert!(pod.has_room());
        assert_eq!(pod.in_flight(), pod.limit() as usize);
    }
}
