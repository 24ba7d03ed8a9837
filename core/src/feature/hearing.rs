//! When a listener to feature changes may give what it keeps, and when a writer may say that nobody gives
//! what it overwrote.
//!
//! The rule: a listener gives what it keeps only while it holds a lease, which it got before it last dropped
//! everything and read the counter of changes. A change is confirmed when every listener whose lease has
//! not run out says that it has applied it.
//!
//! ```text
//! deaf --lease given--> leased --counter read, everything kept dropped--> hearing
//! leased, hearing --the lease ran out or was refused, or the connection was lost--> deaf
//! ```
//!
//! The lease comes before the counter: a change that was confirmed without this listener was announced
//! before its lease was listed, and so is no later than the counter; what it overwrote is dropped.
//! Of the clocks only the rates matter, and that the store's does not leap ahead unnoticed.

use std::time::Duration;

use super::coherence::{Channel, Heard};

/// How long a lease is listed after it was given or renewed, by the store's clock.
pub const LEASE: Duration = Duration::from_secs(3);

/// A listener takes its lease for over so much earlier, by its own clock, from when it asked for it.
pub const MARGIN: Duration = Duration::from_millis(500);

/// One listener. All times by its own clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ear {
    channel: Channel,
    number: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Deaf,
    Leased {
        until: Duration,
    },
    Hearing {
        until: Duration,
    },
}

impl Ear {
    /// A message that carries `number`. To be applied before [`Self::number`] is told to anybody; at a gap
    /// everything kept is to be dropped.
    pub fn message(&mut self, number: u64) -> Heard {
        let heard = self.channel.message(number);
        self.number = number;
        heard
    }

    /// The counter as polled, after the lease was given. To be applied like a message.
    pub fn counter(&mut self, number: u64) -> Heard {
        if let State::Leased { until } = self.state {
            // Messages that the counter is ahead by may be on their way, and writers did not wait for us.
            self.channel.lost();
            self.state = State::Hearing { until };
        }
        let heard = self.channel.counter(number);
        if heard == Heard::Gap {
            self.number = number;
        }
        heard
    }

    /// A message was lost on its last yards, or was none: everything kept is to be dropped.
    pub fn missed(&mut self) {
        self.channel.lost();
    }

    /// A new lease was given, asked for at `asked`.
    pub fn leased(&mut self, asked: Duration) {
        self.state = State::Leased { until: asked + LEASE - MARGIN };
    }

    /// The lease, listed without interruption, was renewed.
    pub fn renewed(&mut self, asked: Duration) {
        if let State::Leased { until } | State::Hearing { until } = &mut self.state {
            *until = (*until).max(asked + LEASE - MARGIN);
        }
    }

    /// The lease is gone, or messages do not come any more.
    pub fn lost(&mut self) {
        self.channel.lost();
        self.state = State::Deaf;
    }

    /// Changes up to this one have been applied.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Until when what is kept may be given, without another word. `None`: not at all.
    pub fn hears_until(&self) -> Option<Duration> {
        match self.state {
            State::Hearing { until } => Some(until),
            State::Deaf | State::Leased { .. } => None,
        }
    }

    /// Whether there is a lease that has not run out.
    pub fn is_leased(&self, now: Duration) -> bool {
        matches!(self.state, State::Leased { until } | State::Hearing { until } if now < until)
    }
}

/// Who listens, as the store lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audience {
    /// How long every lease given has been listed. A store that lost its list begins again at zero: leases
    /// that it does not know of may not have run out.
    pub listed: Duration,
    /// Changes with a lower number were told to a store that has lost them, and may have lost the rows.
    pub since: u64,
    /// Listeners whose lease has not run out.
    pub listeners: u64,
    /// The last change that all of them have applied; `None` if there are none.
    pub lowest: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Confirmed,
    NotYet,
    /// It will never be: the change is to be told again.
    Never,
}

impl Audience {
    pub fn judge(&self, number: u64) -> Verdict {
        if number < self.since {
            Verdict::Never
        } else if self.listed >= LEASE && self.lowest.is_none_or(|lowest| lowest >= number) {
            Verdict::Confirmed
        } else {
            Verdict::NotYet
        }
    }
}

#[cfg(test)]
#[path = "hearing_tests.rs"]
mod tests;
