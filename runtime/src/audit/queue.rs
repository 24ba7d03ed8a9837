//! Records on their way to the writer: bounded, and equal denials folded.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};
use spillway_core::audit::{Denial, Event, Folded, Timestamp};

/// Records that may wait. One has some hundred bytes.
pub(super) const WAITING: usize = 10_000;
/// The writer gathers so long before it takes records, and waits so long before it tries again.
const GATHER: Duration = Duration::from_millis(100);
/// Equal denials within this are one record.
pub(super) const FOLD: Duration = Duration::from_secs(1);
/// Of one caller. The rest differ in what the caller makes up, such as names of models; they are one record
/// without it, or a flood of them would rotate everything else out of the log.
pub(super) const DIFFERENT: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// For the writer.
    filled: Condvar,
    /// For those who flush.
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    events: Vec<(Timestamp, Event)>,
    denials: Denials,
    /// Records that found no room since the last that did.
    lost: u64,
    /// How many times somebody flushed, and for how many of them all is written.
    asked: u64,
    answered: u64,
    /// The writer sleeps until it is told of something.
    is_idle: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Denials {
    began: Option<Instant>,
    equal: HashMap<Folded, Equal>,
    /// How many of `equal` are the same but for what the caller chose.
    different: HashMap<Folded, usize>,
}

#[derive(Debug)]
struct Equal {
    first: Timestamp,
    count: u64,
}

/// What the writer got.
pub(super) struct Taken {
    pub events: Vec<(Timestamp, Event)>,
    /// Somebody waits until all is on the disk; to be given to [`Queue::answer`].
    pub flush: Option<u64>,
    /// Nobody is left who could record something.
    pub closed: bool,
}

/// What the writer has to do beside new records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chores {
    None,
    /// Something is not on the disk yet.
    Sync,
    /// What it took last was not written: it wants nothing new.
    Retry,
}

impl Queue {
    /// Whether there was room.
    pub fn push(&self, time: Timestamp, event: Event) -> bool {
        self.add(|state, has_room| {
            if has_room {
                state.events.push((time, event));
            }
            has_room
        })
    }

    /// Whether there was room.
    pub fn push_denial(&self, time: Timestamp, now: Instant, denial: Denial) -> bool {
        self.add(|state, has_room| state.denials.add(time, now, denial, has_room))
    }

    fn add(&self, add: impl FnOnce(&mut State, bool) -> bool) -> bool {
        let mut state = self.state.lock();
        let has_room = state.events.len() + state.denials.equal.len() < WAITING;
        let added = add(&mut state, has_room);
        state.lost += u64::from(!added);
        let wake = std::mem::take(&mut state.is_idle);
        drop(state);
        if wake {
            self.filled.notify_one();
        }
        added
    }

    pub fn flush(&self, until: Instant) {
        let mut state = self.state.lock();
        state.asked += 1;
        let asked = state.asked;
        self.filled.notify_one();
        while state.answered < asked && !self.written.wait_until(&mut state, until).timed_out() {}
    }

    /// All that was there at this flush is on the disk.
    pub fn answer(&self, flush: u64) {
        self.state.lock().answered = flush;
        self.written.notify_all();
    }

    pub fn close(&self) {
        self.state.lock().closed = true;
        self.filled.notify_one();
    }

    /// Waits for what there is to do. For the one writer.
    pub fn take(&self, chores: Chores) -> Taken {
        let mut state = self.state.lock();
        while chores == Chores::None && !state.has_work() {
            state.is_idle = true;
            self.filled.wait(&mut state);
            state.is_idle = false;
        }
        if chores == Chores::Retry || !state.is_urgent() {
            self.filled.wait_for(&mut state, GATHER);
        }
        let closed = state.closed;
        if chores == Chores::Retry {
            return Taken { events: Vec::new(), flush: None, closed };
        }
        let flush = (state.asked > state.answered).then_some(state.asked);
        Taken { events: state.drain(Instant::now()), flush, closed }
    }
}

impl State {
    fn has_work(&self) -> bool {
        !self.events.is_empty() || !self.denials.equal.is_empty() || self.lost > 0 || self.is_urgent()
    }

    fn is_urgent(&self) -> bool {
        self.closed || self.asked > self.answered
    }

    /// What is to be written now, in the order of time.
    fn drain(&mut self, now: Instant) -> Vec<(Timestamp, Event)> {
        let mut events = std::mem::take(&mut self.events);
        if self.is_urgent() || self.denials.are_due(now) {
            events.extend(self.denials.drain());
            events.sort_by_key(|(time, _)| *time);
        }
        if self.lost > 0 {
            events.push((SystemTime::now().into(), Event::Lost { records: std::mem::take(&mut self.lost) }));
        }
        events
    }
}

impl Denials {
    fn add(&mut self, time: Timestamp, now: Instant, denial: Denial, has_room: bool) -> bool {
        let mut denial = Folded(denial);
        if let Some(equal) = self.equal.get_mut(&denial) {
            equal.count += 1;
            return true;
        }
        let coarse = Folded(denial.0.coarse());
        if self.different.get(&coarse).is_some_and(|different| *different >= DIFFERENT) {
            denial = coarse.clone();
            if let Some(equal) = self.equal.get_mut(&denial) {
                equal.count += 1;
                return true;
            }
        }
        if !has_room {
            return false;
        }
        self.began.get_or_insert(now);
        *self.different.entry(coarse).or_default() += 1;
        self.equal.insert(denial, Equal { first: time, count: 1 });
        true
    }

    fn are_due(&self, now: Instant) -> bool {
        self.began.is_some_and(|began| now.saturating_duration_since(began) >= FOLD)
    }

    fn drain(&mut self) -> impl Iterator<Item = (Timestamp, Event)> {
        self.began = None;
        self.different.clear();
        let equal = std::mem::take(&mut self.equal);
        equal.into_iter().map(|(Folded(denial), Equal { first, count })| (first, Event::Denied { denial, count }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(tenant: &str, model: usize) -> Denial {
        Denial {
            tenant: Some(tenant.into()),
            id: Some(tenant.into()),
            model: Some(format!("m{model}")),
            code: "not-allowed".into(),
            ..Denial::default()
        }
    }

    fn drained(queue: &Queue, now: Instant) -> Vec<(Option<String>, u64)> {
        let events = queue.state.lock().drain(now).into_iter().map(|(_, event)| match event {
            Event::Denied { denial, count } => (denial.model, count),
            other => panic!("{other:?}"),
        });
        let mut events: Vec<_> = events.collect();
        events.sort();
        events
    }

    #[test]
    fn equal_denials_of_a_second_are_one() {
        let (queue, now) = (Queue::default(), Instant::now());
        for _ in 0..1_000 {
            assert!(queue.push_denial(Timestamp::default(), now, denial("acme", 1)));
        }
        assert!(queue.push_denial(Timestamp::default(), now + FOLD / 2, denial("acme", 2)));
        assert_eq!(drained(&queue, now + FOLD / 2), [], "the second is not over");
        assert_eq!(drained(&queue, now + FOLD), [(Some("m1".into()), 1_000), (Some("m2".into()), 1)]);
        assert_eq!(drained(&queue, now + 2 * FOLD), []);
    }

    #[test]
    fn one_caller_has_a_bounded_number_of_different_denials_and_none_goes_uncounted() {
        let (queue, now) = (Queue::default(), Instant::now());
        for model in 0..1_000 {
            assert!(queue.push_denial(Timestamp::default(), now, denial("acme", model)));
        }
        assert!(queue.push_denial(Timestamp::default(), now, denial("globex", 1_000)));
        let told = drained(&queue, now + FOLD);
        assert_eq!(told.len(), DIFFERENT + 2);
        assert_eq!(told[0], (None, 1_000 - DIFFERENT as u64));
        assert!(told.contains(&(Some("m1000".into()), 1)), "another's is its own");
        assert_eq!(told.iter().map(|(_, count)| count).sum::<u64>(), 1_001);
    }

    #[test]
    fn what_finds_no_room_is_told_as_lost() {
        let (queue, now) = (Queue::default(), Instant::now());
        assert!(queue.push_denial(Timestamp::default(), now, denial("acme", 1)));
        for _ in 1..WAITING {
            assert!(queue.push(Timestamp::default(), Event::Stopped));
        }
        assert!(!queue.push(Timestamp::default(), Event::Stopped));
        assert!(!queue.push_denial(Timestamp::default(), now, denial("acme", 2)));
        assert!(queue.push_denial(Timestamp::default(), now, denial("acme", 1)), "one more of those takes no room");
        let events = queue.state.lock().drain(now + FOLD);
        assert_eq!(events.len(), WAITING + 1);
        assert_eq!(events.last().map(|(_, event)| event), Some(&Event::Lost { records: 2 }));
        assert!(queue.push(Timestamp::default(), Event::Stopped));
    }
}
