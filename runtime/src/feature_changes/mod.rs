//! Feature changes in a region: told over Redis by who writes, heard by whoever keeps what is made of rows.
//!
//! The rule: a change is confirmed only when every listener that may still give what it kept has applied it.
//! A listener applies first and says so afterwards; without a lease that it has renewed in time it gives
//! nothing that it kept. What all of that rests on is decided in [`spillway_core::feature::hearing`].
//!
//! * [`listen`](mod@listen): the task that hears, for a [`Listener`]; what it knows is a [`Hearing`].
//! * [`confirm`]: a writer's wait.
//!
//! In Redis, under `spillway:<region>:`, each in a slot of its own: the channel `features` with
//! `<number> <row>[\n<row>…]`, the counter `features:changes`, and the hash `features:listeners`
//! (`lease.lua` says what is in it).

pub mod confirm;
pub mod listen;
mod metrics;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fred::interfaces::LuaInterface;
use spillway_core::feature::Audience;
use spillway_core::feature::hearing::LEASE;
use spillway_core::units::Name;

pub use confirm::Confirmations;
pub use listen::{Listening, listen};
pub use metrics::Metrics;

use crate::store::{Redis, RedisFailed};

const LEASES: &str = include_str!("lease.lua");
const COUNTER: &str = include_str!("counter.lua");

/// Redis gets as long as this for one call about changes; nobody's request waits for it.
const PATIENCE: Duration = Duration::from_millis(500);

/// The least time between two of a process's words, or questions, to Redis: a lone write is not kept waiting,
/// and in a burst all processes together say, or ask, 10,000 times a second at most.
fn pace(listeners: u64) -> Duration {
    Duration::from_micros(listeners.saturating_mul(100)).clamp(Duration::from_millis(1), Duration::from_millis(100))
}

/// What must not be given any more when rows change. Called from one task, one call at a time; each call is
/// to be done with when it returns, since it is said to be right afterwards.
pub trait Listener: Send + 'static {
    /// Change `number` overwrote the rows of these names, one a line. `false`: one of them is no row's name,
    /// and everything is flushed.
    fn changed(&mut self, number: u64, rows: &str) -> bool;

    /// Changes up to `number` may have been missed: nothing that was read before may be given any more.
    fn flush(&mut self, number: u64);

    /// Whether changes are heard from now on. When not, nothing kept may be given; when again, a flush has
    /// come before. Begins with not.
    fn hearing(&mut self, hears: bool);
}

/// What a listener's task knows, for whoever reads what it guards. Cheap to clone and to ask.
#[derive(Clone, Debug)]
pub struct Hearing(Arc<Heard>);

#[derive(Debug)]
struct Heard {
    began: Instant,
    /// Microseconds after `began`; 0: deaf.
    until: AtomicU64,
    number: AtomicU64,
}

impl Default for Hearing {
    fn default() -> Self {
        Self(Arc::new(Heard { began: Instant::now(), until: AtomicU64::new(0), number: AtomicU64::new(0) }))
    }
}

impl Hearing {
    /// Whether what was kept may be given. To be asked with a time from after the request came.
    pub fn hears(&self, now: Instant) -> bool {
        micros(now.saturating_duration_since(self.0.began)) < self.0.until.load(Ordering::Acquire)
    }

    /// The last change that was applied; all before it were too. Counts only while it [`Self::hears`].
    pub fn number(&self) -> u64 {
        self.0.number.load(Ordering::Acquire)
    }

    /// Both in one: what is looked up after this reflects every change up to the number. `None`: deaf.
    pub fn heard(&self, now: Instant) -> Option<u64> {
        self.hears(now).then(|| self.number())
    }

    fn applied(&self, number: u64) {
        self.0.number.store(number, Ordering::Release);
    }

    fn until(&self, until: Option<Duration>) {
        self.0.until.store(until.map_or(0, micros), Ordering::Release);
    }

    fn now(&self) -> Duration {
        self.0.began.elapsed()
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Where a region's changes are told.
pub struct Changes {
    redis: Arc<Redis>,
    channel: String,
    counter: String,
    listeners: String,
}

/// Redis took a lease, or renewed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    since: u64,
    listeners: u64,
}

impl Changes {
    pub fn of(redis: Arc<Redis>, region: &Name) -> Arc<Self> {
        let name = |rest| format!("spillway:{region}:{rest}");
        let (counter, listeners) = (name("features:changes"), name("features:listeners"));
        Arc::new(Self { redis, channel: name("features"), counter, listeners })
    }

    /// Where the messages go.
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// The key of the last message's number.
    pub fn counter(&self) -> &str {
        &self.counter
    }

    async fn begin(&self, id: &str) -> Result<Given, RedisFailed> {
        given(&self.leases("begin", id, 0).await?).ok_or(RedisFailed)
    }

    /// `None`: there is no such lease any more.
    async fn renew(&self, id: &str, number: u64) -> Result<Option<Given>, RedisFailed> {
        let answer = self.leases("renew", id, number).await?;
        if answer.is_empty() { Ok(None) } else { given(&answer).map(Some).ok_or(RedisFailed) }
    }

    async fn end(&self, id: &str) -> Result<(), RedisFailed> {
        self.leases("end", id, 0).await.map(drop)
    }

    async fn audience(&self) -> Result<Audience, RedisFailed> {
        audience(&self.leases("ask", "", 0).await?).ok_or(RedisFailed)
    }

    /// The number of the last message, raised to `since`.
    async fn number(&self, since: u64) -> Result<u64, RedisFailed> {
        let client = self.redis.client();
        let script = client.eval::<String, _, _, _>(COUNTER, vec![self.counter.as_str()], vec![since.to_string()]);
        let number = self.redis.in_time("poll", script, Instant::now() + PATIENCE).await?;
        number.parse().map_err(|_| RedisFailed)
    }

    async fn leases(&self, what: &str, id: &str, number: u64) -> Result<Vec<String>, RedisFailed> {
        let arguments = vec![what.to_owned(), LEASE.as_millis().to_string(), id.to_owned(), number.to_string()];
        let client = self.redis.client();
        let script = client.eval::<Vec<String>, _, _, _>(LEASES, vec![self.listeners.as_str()], arguments);
        self.redis.in_time("lease", script, Instant::now() + PATIENCE).await
    }
}

fn given(answer: &[String]) -> Option<Given> {
    let [since, listeners] = answer else { return None };
    Some(Given { since: since.parse().ok()?, listeners: listeners.parse().ok()? })
}

fn audience(answer: &[String]) -> Option<Audience> {
    let [since, listeners, listed, lowest] = answer else { return None };
    Some(Audience {
        since: since.parse().ok()?,
        listeners: listeners.parse().ok()?,
        listed: Duration::from_millis(listed.parse().ok()?),
        lowest: if lowest == "-" { None } else { Some(lowest.parse().ok()?) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_has_run_out_is_not_heard() {
        let hearing = Hearing::default();
        let began = hearing.0.began;
        assert_eq!(hearing.heard(began), None);
        hearing.applied(7);
        hearing.until(Some(Duration::from_millis(2)));
        assert_eq!(hearing.heard(began + Duration::from_micros(1_999)), Some(7));
        assert_eq!(hearing.heard(began + Duration::from_millis(2)), None);
        hearing.until(None);
        assert_eq!(hearing.heard(began), None);
    }

    #[test]
    fn what_redis_says_of_leases_is_checked() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(given(&words(&["5", "2"])), Some(Given { since: 5, listeners: 2 }));
        let asked = audience(&words(&["5", "2", "3000", "18446744073709551615"])).unwrap();
        assert_eq!((asked.listed, asked.lowest), (LEASE, Some(u64::MAX)));
        assert_eq!(audience(&words(&["5", "0", "3000", "-"])).unwrap().lowest, None);
        for wrong in [&["5"][..], &["5", "x"], &["-5", "1"], &["", ""]] {
            assert_eq!(given(&words(wrong)), None);
        }
        for wrong in [&["5", "0", "3000"][..], &["5", "0", "3000", ""], &["5", "0", "3e3", "1"]] {
            assert_eq!(audience(&words(wrong)), None);
        }
    }
}
