//! Which fills and which invalidations an in-process tier may believe.
//!
//! A tier that is filled from another one must not bring back what was overwritten while the fill was
//! under way, and must know when it may have missed a word about an overwritten value.

/// Whether a read that began at tick `began` may fill a row whose last invalidation was at tick
/// `invalidated` and whose tier was last flushed at tick `flushed`. Ticks rise with every invalidation.
pub fn may_fill(began: u64, invalidated: u64, flushed: u64) -> bool {
    invalidated <= began && flushed <= began
}

/// What to do with a sequence number that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The next one: drop what the message names.
    Next,
    /// Something was missed, or the counter began anew: drop everything.
    Gap,
    /// Nothing new.
    Nothing,
}

/// The listening end of a channel whose messages are numbered 1, 2, 3 …
///
/// ```text
/// unknown --message n--> at n (Gap: what came before was not heard)
/// at n --message n+1--> at n+1 (Next); --any other message--> at it (Gap)
/// at n --counter is n--> Nothing; --counter ahead at two polls in a row, or behind--> at it (Gap)
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Channel {
    last: Option<u64>,
    /// The counter at the last poll, where it was ahead of the last message.
    ahead: Option<u64>,
}

impl Channel {
    /// A message that carries `number`.
    pub fn message(&mut self, number: u64) -> Heard {
        let next = self.last.is_some_and(|last| last.checked_add(1) == Some(number));
        *self = Self { last: Some(number), ahead: None };
        if next { Heard::Next } else { Heard::Gap }
    }

    /// The sender's counter as polled. Messages on their way explain a counter that is ahead once,
    /// but not one whose messages have still not come at the next poll.
    pub fn counter(&mut self, number: u64) -> Heard {
        match self.last {
            Some(last) if last == number => {
                self.ahead = None;
                Heard::Nothing
            }
            Some(last) if last < number && self.ahead.is_none_or(|ahead| last >= ahead) => {
                self.ahead = Some(number);
                Heard::Nothing
            }
            _ => {
                *self = Self { last: Some(number), ahead: None };
                Heard::Gap
            }
        }
    }

    /// The connection was lost: the next word is a gap.
    pub fn lost(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_fill_older_than_an_invalidation_is_refused() {
        assert!(may_fill(5, 0, 0));
        assert!(may_fill(5, 5, 3), "the invalidation had been seen when the read began");
        assert!(!may_fill(5, 6, 0));
        assert!(!may_fill(5, 0, 6));
    }

    #[test]
    fn a_gap_or_a_new_counter_flushes() {
        let mut channel = Channel::default();
        assert_eq!(channel.message(7), Heard::Gap, "the first word says nothing of what came before");
        assert_eq!(channel.message(8), Heard::Next);
        assert_eq!(channel.message(10), Heard::Gap);
        assert_eq!(channel.message(11), Heard::Next);
        assert_eq!(channel.message(1), Heard::Gap, "the counter began anew");
        channel.lost();
        assert_eq!(channel.message(2), Heard::Gap);
    }

    #[test]
    fn a_lost_last_message_is_noticed_at_the_second_poll() {
        let mut channel = Channel::default();
        assert_eq!(channel.counter(4), Heard::Gap);
        assert_eq!(channel.counter(4), Heard::Nothing);
        assert_eq!(channel.counter(5), Heard::Nothing, "its message may be on its way");
        assert_eq!(channel.counter(5), Heard::Gap);
        assert_eq!(channel.counter(5), Heard::Nothing);
        assert_eq!(channel.counter(6), Heard::Nothing);
        assert_eq!(channel.message(6), Heard::Next);
        assert_eq!(channel.counter(2), Heard::Gap, "the counter began anew");
    }

    proptest! {
        /// Whatever is lost, after the next message everything overwritten before it was dropped,
        /// row by row or by a flush.
        #[test]
        fn no_lost_message_goes_unnoticed(delivered in proptest::collection::vec(any::<bool>(), 1..60)) {
            let mut channel = Channel::default();
            let _ = channel.counter(0);
            let mut missed = false;
            for (index, arrives) in delivered.into_iter().enumerate() {
                let number = index as u64 + 1;
                if !arrives {
                    missed = true;
                } else {
                    let heard = channel.message(number);
                    prop_assert_eq!(heard, if missed { Heard::Gap } else { Heard::Next });
                    missed = false;
                }
            }
        }
    }
}
