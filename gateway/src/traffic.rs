//! What this gateway tells the control plane of its requests: how many came, and how well its region served them.
//!
//! The rule: a request costs a few atomics, on its end. What a caller brought on itself is in no figure: it must not look
//! like a sick region, or anybody could have a region taken out, nor like demand, or others would be shed for it.
//!
//! | how it ended                                                        | requests | served | errors | shed |
//! |---------------------------------------------------------------------|----------|--------|--------|------|
//! | an answer                                                           | x        | x      |        |      |
//! | the region's fault                                                  | x        | x      | x      |      |
//! | its deadline, or its client went away, after more than 100 ms        | x        | x      | deadline |    |
//! | the same, sooner: nobody promised that                              | x        |        |        |      |
//! | too much to do here, whoever said so                                | x        |        |        | x    |
//! | shed by plan                                                        | x        |        |        |      |
//! | a tenant's own limit, a bad request, no right to it                 |          |        |        |      |
//! | sent to a peer region, which counts the rest                        | x        |        |        |      |
//!
//! A request that a peer forwarded counts all but `requests` here; probes are not counted. Streams are left out: what their
//! requests take depends on their clients. How much the region's pods could serve is not said: a limit that was never
//! reached measures nothing, and where it is reached, `served` and `shed` say it for the region as a whole.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::limit::Class;
use spillway_proto::control;
use spillway_runtime::link::TrafficSource;
use tonic::Code;

use crate::admission::Why;
use crate::errors::Refusal;

/// Longer than this is slow: `SoftSettings::slow_after` of core's health.
const SLOW: Duration = Duration::from_millis(100);

/// Why there is no answer, as far as regions are compared by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    Caller,
    /// The plan, which says that what comes is too much: that measures nothing.
    Plan,
    /// The region, which failed.
    Region,
    /// The region, which has too much to do.
    Overload,
    /// The time that the caller gave it was over, or the caller went away.
    Impatience {
        gone: bool,
    },
}

/// How one request ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// A gateway of another region sent it.
    pub forwarded: bool,
    pub class: Option<Class>,
    /// A peer region has it.
    pub spilled: bool,
    pub took: Duration,
    /// None: it was answered.
    pub blame: Option<Blame>,
}

/// All counts since they were last asked for. 1.5 KiB.
#[derive(Debug)]
pub struct Tally {
    since: Mutex<Instant>,
    requests: AtomicU64,
    classes: [AtomicU64; Class::ALL.len()],
    served: AtomicU64,
    slow: AtomicU64,
    errors: AtomicU64,
    shed: AtomicU64,
    spilled: AtomicU64,
    /// Of the served: how long they took.
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            since: Mutex::new(Instant::now()),
            requests: AtomicU64::default(),
            classes: Default::default(),
            served: AtomicU64::default(),
            slow: AtomicU64::default(),
            errors: AtomicU64::default(),
            shed: AtomicU64::default(),
            spilled: AtomicU64::default(),
            buckets: std::array::from_fn(|_| AtomicU64::default()),
        }
    }
}

impl TrafficSource for Tally {
    fn since_last(&self) -> control::Traffic {
        self.take()
    }
}

impl Tally {
    pub fn count(&self, ended: &Ended) {
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let is_demand = ended.spilled || ended.blame != Some(Blame::Caller);
        if is_demand && !ended.forwarded {
            add(&self.requests);
            if let Some(class) = ended.class.and_then(|class| self.classes.get(class as usize)) {
                add(class);
            }
            if ended.spilled {
                add(&self.spilled);
            }
        }
        if ended.spilled {
            return;
        }
        let is_slow = ended.took > SLOW;
        let (served, error) = match ended.blame {
            None => (true, false),
            Some(Blame::Region) => (true, true),
            Some(Blame::Impatience { gone }) => (is_slow, is_slow && !gone),
            Some(Blame::Overload) => {
                add(&self.shed);
                (false, false)
            }
            Some(Blame::Caller | Blame::Plan) => (false, false),
        };
        if served {
            add(&self.served);
            if let Some(bucket) = self.buckets.get(bucket(ended.took)) {
                add(bucket);
            }
            if is_slow {
                add(&self.slow);
            }
        }
        if error {
            add(&self.errors);
        }
    }

    /// What was counted since the call before. A request that ends meanwhile may be in one figure now and in the next
    /// ones later.
    pub fn take(&self) -> control::Traffic {
        let now = Instant::now();
        let time = now.saturating_duration_since(std::mem::replace(&mut *self.since.lock(), now));
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let served = take(&self.served);
        let counts: Vec<u64> = self.buckets.iter().map(take).collect();
        control::Traffic {
            milliseconds: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            requests: take(&self.requests),
            classes: self.classes.iter().map(take).collect(),
            served,
            slow: take(&self.slow).min(served),
            errors: take(&self.errors).min(served),
            shed: take(&self.shed),
            p99_us: p99(&counts),
            capacity: None,
            spilled: take(&self.spilled),
        }
    }
}

/// Whose fault a refusal is, for those who compare regions.
pub fn blame(refusal: &Refusal) -> Blame {
    match refusal {
        Refusal::Head(_)
        | Refusal::Path
        | Refusal::NotFound
        | Refusal::NotOffered
        | Refusal::NotImplemented
        | Refusal::UnknownService
        | Refusal::Method { .. }
        | Refusal::Upgrade
        | Refusal::ConnectionHeader
        | Refusal::DuplicateHeader(_)
        | Refusal::ContentType { .. }
        | Refusal::Compressed
        | Refusal::BodyTooLarge { .. }
        | Refusal::Coding
        | Refusal::BodyTooSlow
        | Refusal::Frame
        | Refusal::Invalid(_)
        | Refusal::Untrusted(_)
        | Refusal::Denied(_)
        | Refusal::NoPassage(_)
        | Refusal::UnknownModel(_)
        | Refusal::OtherPool(_)
        | Refusal::UnknownVersion { .. }
        | Refusal::Limited { .. }
        | Refusal::NotCached => Blame::Caller,
        Refusal::Busy { why, .. } => match why {
            Why::TenantFull => Blame::Caller,
            Why::TooShort => Blame::Impatience { gone: false },
            Why::Planned => Blame::Plan,
            Why::Shed | Why::Share | Why::Full | Why::TooLate => Blame::Overload,
        },
        Refusal::Overloaded | Refusal::LowestClass | Refusal::PodsBusy => Blame::Overload,
        Refusal::Deadline => Blame::Impatience { gone: false },
        Refusal::Cancelled => Blame::Impatience { gone: true },
        Refusal::NotReady | Refusal::NoPod | Refusal::PodLost | Refusal::BadAnswer => Blame::Region,
        Refusal::Sidecar { status, .. } => match status {
            Code::DeadlineExceeded => Blame::Impatience { gone: false },
            Code::Cancelled => Blame::Impatience { gone: true },
            Code::ResourceExhausted => Blame::Overload,
            Code::Internal | Code::Unavailable | Code::DataLoss | Code::Unknown | Code::Unimplemented => Blame::Region,
            Code::Ok
            | Code::InvalidArgument
            | Code::OutOfRange
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Aborted => Blame::Caller,
        },
    }
}

/// Eight buckets for each doubling of the time, from 64 µs to two minutes: a bucket's upper end is at most an eighth
/// above what is in it.
const PARTS: u32 = 8;
const FIRST: u32 = 6;
const DOUBLINGS: u32 = 21;
const BUCKETS: usize = (DOUBLINGS * PARTS) as usize;

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1 << FIRST);
    let doubling = micros.ilog2();
    // The three bits below the highest one.
    let part = (micros >> (doubling - 3)) & u64::from(PARTS - 1);
    let index = u64::from((doubling - FIRST) * PARTS) + part;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The time in microseconds that no more than a hundredth took longer than; 0 where there is none.
fn p99(counts: &[u64]) -> u64 {
    let total: u64 = counts.iter().sum();
    let mut above = total / 100;
    for (index, count) in (0..DOUBLINGS * PARTS).zip(counts).rev() {
        match above.checked_sub(*count) {
            Some(left) if *count > 0 => above = left,
            None => {
                let (doubling, part) = (index / PARTS + FIRST, u64::from(index % PARTS));
                return (1 << doubling) + ((part + 1) << (doubling - 3));
            }
            Some(_) => {}
        }
    }
    0
}

#[cfg(test)]
#[path = "traffic_tests.rs"]
mod tests;
