//! One call to the model for all who ask the same at the same time.
//!
//! The rule: a flight has one leader. Those who ask the same while it calls wait, each no longer than its
//! own deadline, and are given the answer if it is not older than what they may be given.
//!
//! ```text
//! begun --answer--> landed: all who wait have it, but those it is too old for, who ask again
//!   | ^
//!   | +-- the leader failed or went away: the first who waits leads
//!   +---- nobody waits, or the failure is everybody's: ended
//! ```
//!
//! **Failures.** What says something of the request (it is invalid, a feature is missing) or that the
//! model is overloaded is everybody's at once. A pod's failure is tried again by one who waits, once
//! ([`MOST_FAILURES`]); then it is everybody's, so that a thousand who wait for a model that fails do not
//! fail it a thousand times. What is the leader's own (it left, its deadline passed, it was refused
//! before any pod saw it) says nothing of the others: the next one leads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::cache::coherence::Tick;
use spillway_core::cache::key::Key;
use spillway_core::limit::Class;
use tokio::sync::oneshot;
use tonic::Code;

use super::entry::{About, Entry};
use super::memory::Memory;
use super::region::Slot;
use crate::errors::Refusal;

/// Pods' failures in one flight that end it.
const MOST_FAILURES: u32 = 2;
/// Who wait in one flight at most; others go to the model by themselves, and are bounded there.
pub const MOST_WAITING: usize = 16_384;
/// From here on those who have left are looked for, each time the number has doubled.
const TIDY: usize = 64;

/// What was known when a call began.
#[derive(Clone, Copy, Debug)]
pub struct Began {
    pub at: Duration,
    /// The feature messages heard; `None` where the result depends on no row, or there is no channel.
    pub tick: Option<Tick>,
    /// The number of the last of them.
    pub number: Option<u64>,
    /// The last purge.
    pub mark: u64,
    /// Whose turn it takes at the gate.
    pub class: Class,
}

/// What a call must have known for its answer to be given to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    pub tick: Option<Tick>,
    /// When it must have begun; where no channel tells of changes.
    pub since: Duration,
    /// The class that it must at least have: who comes before others does not wait behind them.
    pub class: Class,
}

/// What one who waited is told.
pub enum Turn {
    Answer {
        entry: Arc<Entry>,
        maker: Maker,
    },
    Failed(Refusal),
    /// It leads now.
    Lead(Lead),
    /// The answer was too old for it. `alone`: so would the next one be, for all that is known.
    Again {
        alone: bool,
    },
}

/// Who made an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// The call that was waited for: it is new.
    Call { stored: bool },
    /// Another gateway: it comes out of Redis, as old as it is.
    Region,
}

struct Waiting {
    needed: Needed,
    turn: oneshot::Sender<Turn>,
}

pub struct Flight {
    pub key: Key,
    pub about: Arc<About>,
    state: Mutex<State>,
}

struct State {
    began: Began,
    waiting: VecDeque<Waiting>,
    /// When those who left are looked for next.
    tidy_at: usize,
    failures: u32,
    /// Where the answer goes in Redis, which is asked once in a flight. Goes with it.
    slot: Option<Slot>,
    asked_region: bool,
}

/// How a request came into a flight.
pub enum Joined {
    Waits(oneshot::Receiver<Turn>),
    /// Its call began too early for this request, or is of a lesser class.
    Unfit,
    /// Too many wait already.
    Full,
}

impl Flight {
    pub fn new(key: Key, about: Arc<About>, began: Began) -> Self {
        let state =
            State { began, waiting: VecDeque::new(), tidy_at: TIDY, failures: 0, slot: None, asked_region: false };
        Self { key, about, state: Mutex::new(state) }
    }

    /// To be called under the lock of the flights' shard.
    pub fn join(&self, needed: Needed, is_purged: impl FnOnce(&About, u64) -> bool) -> Joined {
        let mut state = self.state.lock();
        let Began { at, tick, mark, class, .. } = state.began;
        if needed.class < class || tick < needed.tick || at < needed.since || is_purged(&self.about, mark) {
            return Joined::Unfit;
        }
        if state.waiting.len() >= state.tidy_at {
            state.waiting.retain(|waiting| !waiting.turn.is_closed());
            state.tidy_at = (state.waiting.len() * 2).max(TIDY);
        }
        if state.waiting.len() >= MOST_WAITING {
            return Joined::Full;
        }
        let (turn, told) = oneshot::channel();
        state.waiting.push_back(Waiting { needed, turn });
        Joined::Waits(told)
    }

    /// Who leads next: the first of the most important class. From now on it is the flight's.
    fn next(&self) -> Option<Waiting> {
        let state = &mut *self.state.lock();
        state.waiting.retain(|waiting| !waiting.turn.is_closed());
        let (place, _) = state.waiting.iter().enumerate().min_by_key(|(_, waiting)| waiting.needed.class)?;
        let next = state.waiting.remove(place)?;
        state.began.class = next.needed.class;
        Some(next)
    }

    /// Who wait, at the end of a flight. To be called under the lock of the flights' shard.
    pub fn end(&self) -> Crowd {
        Crowd(std::mem::take(&mut self.state.lock().waiting))
    }

    pub fn anyone_waits(&self) -> bool {
        self.state.lock().waiting.iter().any(|waiting| !waiting.turn.is_closed())
    }
}

/// Those who waited in a flight that is over.
#[derive(Default)]
pub struct Crowd(VecDeque<Waiting>);

impl Crowd {
    /// Gives the answer of a call that knew `tick` and began at `at`; the number of those who took it.
    pub fn give(self, entry: &Arc<Entry>, maker: Maker, tick: Option<Tick>, at: Duration) -> u64 {
        let mut given = 0;
        for Waiting { needed, turn } in self.0 {
            let young_enough = tick >= needed.tick && at >= needed.since;
            let answer = match young_enough {
                true => Turn::Answer { entry: entry.clone(), maker },
                false => Turn::Again { alone: tick.is_none() },
            };
            given += u64::from(turn.send(answer).is_ok() && young_enough);
        }
        given
    }

    fn fail(self, refusal: &Refusal) {
        for waiting in self.0 {
            // Who left needs no telling.
            let _ = waiting.turn.send(Turn::Failed(refusal.clone()));
        }
    }
}

/// That one calls for the others. Dropped, it goes to one of them.
pub struct Lead {
    memory: Arc<Memory>,
    flight: Arc<Flight>,
    armed: bool,
}

impl Lead {
    pub fn new(memory: Arc<Memory>, flight: Arc<Flight>) -> Self {
        Self { memory, flight, armed: true }
    }

    /// The call begins anew: what is known now counts for those who join from here on.
    pub fn begin(&self, began: Began) {
        self.flight.state.lock().began = began;
    }

    pub fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }

    /// Whether Redis is to be asked: the first leader does, for all who come after it.
    pub fn asks_region(&self) -> bool {
        !std::mem::replace(&mut self.flight.state.lock().asked_region, true)
    }

    pub fn hold(&self, slot: Slot) {
        self.flight.state.lock().slot = Some(slot);
    }

    pub fn take_slot(&self) -> Option<Slot> {
        self.flight.state.lock().slot.take()
    }

    /// The flight is over: it is not to be handed on.
    pub fn landed(mut self) {
        self.armed = false;
    }

    /// The call failed.
    pub fn fail(mut self, refusal: &Refusal) {
        let everybodys = match fate(refusal) {
            Fate::Leaders => false,
            Fate::Everybodys => true,
            Fate::Pods => {
                let mut state = self.flight.state.lock();
                state.failures += 1;
                state.failures >= MOST_FAILURES
            }
        };
        if everybodys {
            self.armed = false;
            self.memory.end(&self.flight).fail(refusal);
        }
    }

    /// Gives the lead to the first of those who still wait. Whoever joins in between is seen: it is looked again
    /// under the shard's lock before the flight ends.
    fn hand_over(&self) {
        loop {
            let Some(waiting) = self.flight.next() else {
                if self.memory.end_if_empty(&self.flight) {
                    return;
                }
                continue;
            };
            let lead = Self::new(self.memory.clone(), self.flight.clone());
            match waiting.turn.send(Turn::Lead(lead)) {
                Ok(()) => {
                    self.memory.metrics.handed_over.inc();
                    return;
                }
                // It has left: what it would have been is not to hand itself on.
                Err(Turn::Lead(mut lead)) => lead.armed = false,
                Err(_) => {}
            }
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if self.armed {
            self.hand_over();
        }
    }
}

/// Whose a leader's failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Leaders,
    Pods,
    Everybodys,
}

fn fate(refusal: &Refusal) -> Fate {
    match refusal {
        Refusal::Cancelled | Refusal::Deadline | Refusal::Overloaded | Refusal::NotReady => Fate::Leaders,
        // Of its class, or of the time that it had.
        Refusal::Busy { .. } | Refusal::LowestClass => Fate::Leaders,
        Refusal::PodsBusy => Fate::Everybodys,
        Refusal::NoPod | Refusal::PodLost | Refusal::BadAnswer => Fate::Pods,
        Refusal::Sidecar { status, .. } => match status {
            Code::Cancelled | Code::DeadlineExceeded => Fate::Leaders,
            Code::Unavailable | Code::Internal | Code::Unknown | Code::DataLoss | Code::Aborted => Fate::Pods,
            Code::Ok
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => Fate::Everybodys,
        },
        // Said of a request before it comes to the cache, or of its own form.
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
        | Refusal::Limited { .. }
        | Refusal::UnknownModel(_)
        | Refusal::OtherPool(_)
        | Refusal::UnknownVersion { .. }
        | Refusal::NoPassage(_)
        | Refusal::NotCached => Fate::Leaders,
    }
}
