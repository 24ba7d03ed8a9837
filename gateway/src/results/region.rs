//! Results that the gateways of a region share, in its Redis.
//!
//! The rule: Redis is a favour. A request asks it once, for no longer than a small time; gone, slow, full
//! or holding wrong bytes it is a miss, which is counted and never seen by a client. Nothing is put
//! there, and no lease given back, while a client waits.
//!
//! Keys: `spillway:<region>:r:{<hash>}` a result ([`super::stored`]), kept as long as it is fresh;
//! `spillway:<region>:r:{<hash>}:l` the lease of the gateway that makes it. Who finds the lease taken looks
//! again, a few times, and then goes to the model by itself; at once if the holder's class comes after its own.
//!
//! **Rest.** After [`FAILURES`] failed rounds in a row Redis is left alone for [`REST`]; then one round
//! tries it. So a Redis that is slow costs few requests its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fred::interfaces::LuaInterface;
use spillway_core::cache::key::Key;
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_runtime::store::{self, RedisSettings};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::entry::Entry;
use super::metrics::Metrics;
use super::stored::{self, Stored};

const LOOK: &str = include_str!("look.lua");
const KEEP: &str = include_str!("keep.lua");

const FAILURES: u32 = 3;
const REST: Duration = Duration::from_secs(1);
/// Between two looks while another gateway has the lease: the first time, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(16);
/// Puts and returned leases at once; what is more is dropped, and leases end by themselves.
const PUTS: usize = 256;
/// The longest that a lease is asked for.
pub const LONGEST_LEASE: Duration = Duration::from_secs(10);
/// Nobody waits for a put.
const PUT_TIME: Duration = Duration::from_millis(500);

pub struct Region {
    pub(super) connection: Arc<store::Redis>,
    /// `spillway:<region>:`.
    pub(super) prefix: String,
    timeout: Duration,
    rounds: Semaphore,
    puts: Arc<Semaphore>,
    began: Instant,
    failures: AtomicU32,
    /// When it is tried again, in milliseconds since `began`.
    rests_until: AtomicU64,
    metrics: Arc<Metrics>,
}

/// The least that a result must know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Least {
    pub sequence: u64,
    pub mark: u64,
}

/// What came of looking.
pub enum Looked {
    /// A result of this key, fresh for `left` from when it was `asked` for.
    Found { stored: Stored, left: Duration, asked: Instant },
    /// There is none: where it goes once it is made.
    Slot(Slot),
    /// Redis is of no use now.
    Nothing,
}

/// Where a result goes. Dropped, it gives its lease back.
pub struct Slot {
    region: Arc<Region>,
    keys: [String; 2],
    token: String,
    leased: bool,
    /// A moment by Redis' clock in microseconds, and no later moment by ours.
    redis_us: i64,
    heard: Instant,
}

/// What a round gives: what, ms, microseconds, value, odd; see `look.lua`.
type Answer = (i64, i64, i64, Bytes, i64);

impl Region {
    pub fn new(
        connection: Arc<store::Redis>,
        settings: &RedisSettings,
        region: &Name,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            connection,
            prefix: format!("spillway:{region}:"),
            timeout: settings.timeout,
            rounds: Semaphore::new(settings.concurrency.max(1)),
            puts: Arc::new(Semaphore::new(PUTS)),
            began: Instant::now(),
            failures: AtomicU32::new(0),
            rests_until: AtomicU64::new(0),
            metrics,
        })
    }

    pub fn is_connected(&self) -> bool {
        self.connection.is_connected()
    }

    pub fn rests(&self) -> bool {
        self.failures.load(Ordering::Relaxed) >= FAILURES
    }

    /// Looks for a result, or for the lease to make it, and while another gateway makes it, again until
    /// `patience` is over.
    pub async fn look(
        self: &Arc<Self>,
        key: &Key,
        class: Class,
        least: Least,
        lease: Duration,
        patience: Duration,
    ) -> Looked {
        let keys = self.keys(key);
        let token = format!("{:016x}{}", rand::random::<u64>(), class as u8);
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            let asked = Instant::now();
            let Some((what, ms, redis_us, value, odd)) = self.round(&keys, &token, least, lease).await else {
                return Looked::Nothing;
            };
            if odd == 1 {
                self.metrics.region_failed("garbage");
            }
            let slot = |leased| {
                let (region, keys, token) = (self.clone(), keys.clone(), token.clone());
                Slot { region, keys, token, leased, redis_us, heard: Instant::now() }
            };
            match what {
                1 => {
                    let left = u64::try_from(ms).map_or(Duration::ZERO, Duration::from_millis);
                    let stored = stored::decode(&value).filter(|stored| stored.material == key.material);
                    return match stored.filter(|stored| !left.is_zero() && left <= stored.whole) {
                        Some(stored) => Looked::Found { stored, left, asked },
                        None => {
                            self.metrics.region_failed("garbage");
                            Looked::Slot(slot(false))
                        }
                    };
                }
                2 => return Looked::Slot(slot(true)),
                3 if began.elapsed() + pause < patience => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                5 => return Looked::Slot(slot(false)),
                3 => {
                    self.metrics.region_failed("impatient");
                    return Looked::Slot(slot(false));
                }
                _ => {
                    self.metrics.region_failed("full");
                    return Looked::Nothing;
                }
            }
        }
    }

    async fn round(&self, keys: &[String; 2], token: &str, least: Least, lease: Duration) -> Option<Answer> {
        let failed = |reason| {
            self.metrics.region_failed(reason);
            None
        };
        if !self.connection.is_connected() {
            return failed("away");
        }
        if !self.may_try() {
            return failed("resting");
        }
        let Ok(_place) = self.rounds.try_acquire() else { return failed("busy") };
        let deadline = Instant::now() + self.timeout;
        let arguments: Vec<Bytes> = vec![
            token.to_owned().into(),
            lease.as_millis().max(1).to_string().into(),
            least.sequence.to_string().into(),
            least.mark.to_string().into(),
            stored::MOST.to_string().into(),
            LONGEST_LEASE.as_millis().to_string().into(),
        ];
        let client = self.connection.client();
        let script = client.eval::<Answer, _, _, _>(LOOK, keys.to_vec(), arguments);
        match self.connection.in_time("look up a result", script, deadline).await {
            Ok(answer) => {
                self.failures.store(0, Ordering::Relaxed);
                Some(answer)
            }
            Err(store::RedisFailed) => {
                self.fail();
                failed(if Instant::now() < deadline { "error" } else { "timeout" })
            }
        }
    }

    /// Whether Redis is asked: not while it rests, but for one request when that is over.
    fn may_try(&self) -> bool {
        if self.failures.load(Ordering::Relaxed) < FAILURES {
            return true;
        }
        let now = self.now_ms();
        let until = self.rests_until.load(Ordering::Relaxed);
        let next = now.saturating_add(REST.as_millis() as u64);
        now >= until && self.rests_until.compare_exchange(until, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn fail(&self) {
        let until = self.now_ms().saturating_add(REST.as_millis() as u64);
        self.rests_until.store(until, Ordering::Relaxed);
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// In a cluster the braces keep the two in one slot.
    fn keys(&self, key: &Key) -> [String; 2] {
        let result = format!("{}r:{{{}}}", self.prefix, hex(&key.hash));
        let lease = format!("{result}:l");
        [result, lease]
    }
}

impl Slot {
    /// Puts a result there, in the background. `fresh_for` counts from now.
    pub fn keep(mut self, entry: &Entry, sequence: u64, fresh_for: Duration) {
        let Some(value) = stored::encode(entry, sequence) else {
            self.region.metrics.not_stored("too-large-for-l2");
            return;
        };
        // By Redis' clock it ends when `left` has passed since the moment that Redis told.
        let left = fresh_for.saturating_add(self.heard.elapsed());
        self.write(value, left);
    }

    fn write(&mut self, value: Bytes, left: Duration) {
        self.leased = false;
        // No runtime: the process is about to end, and so will the lease.
        let Ok(runtime) = Handle::try_current() else { return };
        let Ok(place) = self.region.puts.clone().try_acquire_owned() else {
            self.region.metrics.region_failed("busy");
            return;
        };
        let (region, is_value) = (self.region.clone(), !value.is_empty());
        let arguments: Vec<Bytes> = vec![
            self.token.clone().into(),
            value,
            left.as_millis().to_string().into(),
            self.redis_us.to_string().into(),
        ];
        let keys = self.keys.to_vec();
        runtime.spawn(async move {
            let _place = place;
            let client = region.connection.client();
            let script = client.eval::<i64, _, _, _>(KEEP, keys, arguments);
            match region.connection.in_time("keep a result", script, Instant::now() + PUT_TIME).await {
                Ok(1) => {
                    region.metrics.stored_in_region.inc();
                }
                Ok(2) => region.metrics.region_failed("full"),
                Ok(_) if is_value => region.metrics.not_stored("too-late-for-l2"),
                Ok(_) => {}
                Err(store::RedisFailed) => region.metrics.region_failed("put"),
            }
        });
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.leased {
            self.write(Bytes::new(), Duration::ZERO);
        }
    }
}

/// A hash as text.
pub fn hex(hash: &[u8; 32]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |number: u8| char::from(DIGITS[usize::from(number & 15)]);
    hash.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}
