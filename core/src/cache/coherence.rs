//! What a gateway may believe of the results in its memory while features change.
//!
//! The rule: a result is given only if no row that it was made of has been overwritten by a write that
//! this gateway has acknowledged, or that nobody waits for this gateway to acknowledge any more. A result
//! that depends on no row is not asked about.
//!
//! ```text
//!                     message n+1: results of the named rows go
//! deaf --any word--> hearing --gap--> all results that depend on rows go, hearing
//!                     | ^
//!     lease runs out  v |  everything published before a poll was heard
//!                    silent: results stay, and are not given
//! ```
//!
//! **Calls that race with a message.** Ticks count the messages. A result whose call began at a tick before
//! the last message about one of its rows may have read the row's old value, and is not stored. The last
//! tick of each row is remembered for a bounded number of rows; what is forgotten raises a floor, and no
//! result of a call that began below the floor is stored.
//!
//! **The lease.** A writer waits for a gateway's acknowledgement no longer than the lease, counted from
//! when it published. So results are given only while less than the lease has passed since a moment before
//! which everything published is known to have been heard. Only a poll of the sender's counter tells such
//! a moment: when it was asked. A message does not; it may have been long on its way.
//!
//! Which gateways a writer waits for, and that what a model reads is overwritten before the message goes
//! out, is the sender's part.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::feature::{Channel, Heard, may_fill};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Rows whose last message is remembered, about 25 bytes each. Default 65,536: at 10,000 writes a
    /// second, calls of up to 3 s are stored.
    pub remembered: usize,
    /// How long results are given after the last moment that is known to be heard; writers wait for an
    /// acknowledgement as long and some clock drift more. Default 3 s.
    pub lease: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { remembered: 65_536, lease: Duration::from_secs(3) }
    }
}

/// How many messages had been heard when something began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(u64);

/// A poll of the sender's counter that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    at: Duration,
    connection: u64,
    heard: Option<u64>,
}

/// The listening end of the region's feature changes, for one gateway.
#[derive(Clone, Debug)]
pub struct Coherence {
    lease: Duration,
    channel: Channel,
    /// Connections lost so far.
    connection: u64,
    /// The last number that was believed, of a message or the counter.
    heard: Option<u64>,
    tick: u64,
    /// The tick of the last gap, and the number that was believed at it.
    flushed: u64,
    gap: Option<u64>,
    recent: Recent,
    /// Everything published before this moment has been heard.
    complete: Option<Duration>,
    /// Everything published before this moment will have been, once this number is.
    awaited: Option<(u64, Duration)>,
}

impl Coherence {
    pub fn new(settings: &Settings) -> Self {
        Self {
            lease: settings.lease,
            channel: Channel::default(),
            connection: 0,
            heard: None,
            tick: 0,
            flushed: 0,
            gap: None,
            recent: Recent { half: (settings.remembered / 2).max(1), ..Recent::default() },
            complete: None,
            awaited: None,
        }
    }

    /// To be asked before a call begins.
    pub fn began(&self) -> Tick {
        Tick(self.tick)
    }

    /// Whether the result of a call that began then is still one: to be asked when it is stored, and when
    /// another request joins the call.
    pub fn may_store(&self, began: Tick, dependencies: &[u64]) -> bool {
        let floor = self.flushed.max(self.recent.floor);
        dependencies.iter().all(|row| may_fill(began.0, self.recent.last(*row), floor))
    }

    /// The earliest tick at which the call of a result may have begun that still is one:
    /// [`Self::may_store`] for every tick from this one on.
    pub fn needed(&self, dependencies: &[u64]) -> Tick {
        let floor = if dependencies.is_empty() { 0 } else { self.flushed.max(self.recent.floor) };
        Tick(dependencies.iter().map(|row| self.recent.last(*row)).fold(floor, u64::max))
    }

    /// When everything up to this number, and nothing after it, had been heard: what another listener of
    /// the channel knew. `None` where this one does not know: a gap has come since, or it is yet to come.
    pub fn tick_of(&self, number: u64) -> Option<Tick> {
        let (first, heard) = (self.gap?, self.heard?);
        let since = number.checked_sub(first).filter(|_| number <= heard)?;
        Some(Tick(self.flushed.saturating_add(since)))
    }

    /// The reverse of [`Self::tick_of`]: what another listener must know to have known what was known then.
    pub fn number_of(&self, tick: Tick) -> Option<u64> {
        let number = self.gap?.saturating_add(tick.0.checked_sub(self.flushed)?);
        (number <= self.heard?).then_some(number)
    }

    /// The last number that was heard; `None` while the next word will be a gap.
    pub fn number(&self) -> Option<u64> {
        self.heard
    }

    /// Whether stored results that depend on rows may be given. `now` was read after the request came.
    pub fn may_serve(&self, now: Duration) -> bool {
        self.complete.is_some_and(|moment| now < moment.saturating_add(self.lease))
    }

    /// A message and the [dependencies](super::key::dependency) it names. [`Heard::Next`]: their results
    /// are to be removed. [`Heard::Gap`]: all that depend on rows are. When they have been, every message
    /// up to this number is acknowledged.
    pub fn message(&mut self, number: u64, rows: impl IntoIterator<Item = u64>) -> Heard {
        let heard = self.channel.message(number);
        if heard == Heard::Next {
            self.tick = self.tick.saturating_add(1);
            rows.into_iter().for_each(|row| self.recent.put(row, self.tick));
        }
        self.believe(heard, number);
        heard
    }

    /// A poll of the counter begins.
    pub fn ask(&self, now: Duration) -> Poll {
        Poll { at: now, connection: self.connection, heard: self.heard }
    }

    /// The poll's answer. [`Heard::Gap`]: all results that depend on rows are to be removed. When they have
    /// been, every message up to this number is acknowledged.
    pub fn answer(&mut self, poll: Poll, number: u64) -> Heard {
        if poll.connection != self.connection {
            // The counter may have begun anew since.
            return Heard::Nothing;
        }
        // Messages overtake answers: a counter between what was heard then and now is no step back.
        let overtaken = poll.heard.is_some_and(|then| then <= number) && self.heard.is_some_and(|now| number < now);
        let heard = if overtaken { Heard::Nothing } else { self.channel.counter(number) };
        self.awaited = Some((number, poll.at));
        self.believe(heard, number);
        heard
    }

    /// The connection was lost: the next word is a gap. Until the lease ends, results are given.
    pub fn lost(&mut self) {
        self.channel.lost();
        self.connection = self.connection.saturating_add(1);
        self.heard = None;
        self.awaited = None;
    }

    fn believe(&mut self, heard: Heard, number: u64) {
        match heard {
            Heard::Nothing => {}
            Heard::Next => self.heard = Some(number),
            Heard::Gap => {
                self.heard = Some(number);
                self.tick = self.tick.saturating_add(1);
                self.flushed = self.tick;
                self.gap = Some(number);
                self.recent.clear();
            }
        }
        if let Some((awaited, moment)) = self.awaited
            && self.heard.is_some_and(|heard| awaited <= heard)
        {
            self.complete = self.complete.max(Some(moment));
            self.awaited = None;
        }
    }
}

/// The last tick of the rows named last, in two generations: when the younger one is full, the older one
/// is forgotten. A tree, not a hash table: entity ids, and so the hashes, are chosen by strangers.
#[derive(Clone, Debug, Default)]
struct Recent {
    /// Rows of one generation.
    half: usize,
    young: BTreeMap<u64, u64>,
    old: BTreeMap<u64, u64>,
    /// The last ticks of the two.
    young_last: u64,
    old_last: u64,
    /// No forgotten tick is above it.
    floor: u64,
}

impl Recent {
    fn put(&mut self, row: u64, tick: u64) {
        if self.young.len() >= self.half && !self.young.contains_key(&row) {
            self.floor = self.old_last.max(self.floor);
            self.old_last = self.young_last;
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(row, tick);
        self.young_last = tick;
    }

    /// 0 where it is not known.
    fn last(&self, row: u64) -> u64 {
        self.young.get(&row).or_else(|| self.old.get(&row)).copied().unwrap_or(0)
    }

    /// A gap stands for all of it.
    fn clear(&mut self) {
        *self = Self { half: self.half, ..Self::default() };
    }
}

#[cfg(test)]
#[path = "coherence_tests.rs"]
mod tests;
