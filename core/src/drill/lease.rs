//! The faults' hold on life: whoever injects keeps it, and takes the faults away when nobody renews it.
//!
//! The rule: faults never outlive their controller by more than [`Lease::LIFE`], and there is one drill at a time.
//!
//! ```text
//! free --granted--> held --renewed--> held
//! held --given back, or LIFE without renewal--> ending: faults are being taken away
//! ending --all of them are--> free
//! ending --one could not be--> ending, and it is tried again
//! ```

use std::time::Duration;

/// Names a lease: random, so that a controller that was forgotten cannot renew its successor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub u64);

/// Why a controller has no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("another drill runs")]
    Busy,
    #[error("the lease is over, and its faults are gone")]
    Over,
}

/// The one lease of an injector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease(State);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Held {
        id: LeaseId,
        until: Duration,
    },
    Ending {
        id: LeaseId,
    },
}

impl Lease {
    /// How long faults stay without a word of their controller.
    pub const LIFE: Duration = Duration::from_secs(15);
    /// How often a controller renews: four of its words may be lost.
    pub const RENEW_EVERY: Duration = Duration::from_secs(3);

    /// Begins a lease.
    pub fn grant(&mut self, id: LeaseId, now: Duration) -> Result<(), Denied> {
        if self.0 != State::Free {
            return Err(Denied::Busy);
        }
        self.0 = State::Held { id, until: now + Self::LIFE };
        Ok(())
    }

    /// Goes on with it. One that has run out is over, also if nobody noticed yet.
    pub fn renew(&mut self, id: LeaseId, now: Duration) -> Result<(), Denied> {
        self.expire(now);
        match &mut self.0 {
            State::Held { id: held, until } if *held == id => {
                // A clock that stepped back takes nothing away.
                *until = (*until).max(now + Self::LIFE);
                Ok(())
            }
            _ => Err(Denied::Over),
        }
    }

    /// Gives it back. Whether it was there to give back; the same word twice is no fault.
    pub fn give_back(&mut self, id: LeaseId) -> bool {
        match self.0 {
            State::Held { id: held, .. } if held == id => {
                self.0 = State::Ending { id };
                true
            }
            State::Held { .. } | State::Ending { .. } | State::Free => false,
        }
    }

    /// Ends it if its time is over. Whether faults have to be taken away now.
    pub fn expire(&mut self, now: Duration) -> bool {
        if let State::Held { id, until } = self.0
            && now >= until
        {
            self.0 = State::Ending { id };
        }
        matches!(self.0, State::Ending { .. })
    }

    /// All faults are gone.
    pub fn ended(&mut self) {
        if let State::Ending { .. } = self.0 {
            self.0 = State::Free;
        }
    }

    /// Whether nobody has it and no fault is left.
    pub fn is_free(&self) -> bool {
        self.0 == State::Free
    }

    /// Whether this one holds it, and faults may be injected under it.
    pub fn is_held_by(&self, id: LeaseId) -> bool {
        matches!(self.0, State::Held { id: held, .. } if held == id)
    }

    /// Whether there is one, and it is not this.
    pub fn is_held_by_another(&self, id: LeaseId) -> bool {
        matches!(self.0, State::Held { id: held, .. } | State::Ending { id: held } if held != id)
    }

    /// What is left of it.
    pub fn left(&self, now: Duration) -> Duration {
        match self.0 {
            State::Held { until, .. } => until.saturating_sub(now),
            State::Free | State::Ending { .. } => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: LeaseId = LeaseId(1);
    const TWO: LeaseId = LeaseId(2);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lease_lives_from_renewal_to_renewal() {
        let mut lease = Lease::default();
        assert!(lease.is_free() && !lease.expire(SECOND));
        assert_eq!(lease.grant(ONE, SECOND), Ok(()));
        assert!(lease.is_held_by(ONE) && !lease.is_held_by(TWO));
        assert!(lease.is_held_by_another(TWO) && !lease.is_held_by_another(ONE));
        assert_eq!(lease.grant(TWO, SECOND), Err(Denied::Busy));
        assert_eq!(lease.renew(TWO, SECOND), Err(Denied::Over));
        assert_eq!(lease.renew(ONE, SECOND * 10), Ok(()));
        assert_eq!(lease.left(SECOND * 10), Lease::LIFE);
        assert!(!lease.expire(SECOND * 24));
        assert!(lease.expire(SECOND * 25), "15 s after the last word");
    }

    #[test]
    fn a_lease_that_is_over_is_not_renewed_and_the_next_waits_until_faults_are_gone() {
        let mut lease = Lease::default();
        lease.grant(ONE, Duration::ZERO).unwrap();
        assert_eq!(lease.renew(ONE, SECOND * 15), Err(Denied::Over), "nobody had noticed");
        assert!(lease.expire(SECOND * 15));
        assert_eq!(lease.grant(TWO, SECOND * 16), Err(Denied::Busy), "faults are still being taken away");
        lease.ended();
        assert_eq!(lease.grant(TWO, SECOND * 17), Ok(()));
        assert_eq!(lease.renew(ONE, SECOND * 17), Err(Denied::Over));
    }

    #[test]
    fn given_back_it_ends_at_once() {
        let mut lease = Lease::default();
        lease.grant(ONE, Duration::ZERO).unwrap();
        assert!(!lease.give_back(TWO));
        assert!(lease.give_back(ONE) && !lease.give_back(ONE));
        assert!(lease.expire(Duration::ZERO), "there are faults to take away");
        lease.ended();
        assert!(lease.is_free());
    }

    proptest! {
        #[test]
        fn faults_never_outlive_the_last_word_by_more_than_a_life(
            steps in proptest::collection::vec((0_u8..5, 0_u64..9, 0_u64..3), 0..200),
        ) {
            let (mut lease, mut now, mut last) = (Lease::default(), Duration::ZERO, None);
            for (step, seconds, id) in steps {
                now += SECOND * u32::try_from(seconds).unwrap();
                let id = LeaseId(id);
                match step {
                    0 if lease.grant(id, now).is_ok() => {
                        prop_assert_eq!(last, None, "one at a time");
                        last = Some((id, now));
                    }
                    1 if lease.renew(id, now).is_ok() => {
                        let (holder, word) = last.unwrap();
                        prop_assert!(holder == id && now < word + Lease::LIFE);
                        last = Some((id, now));
                    }
                    2 if lease.give_back(id) => {
                        prop_assert_eq!(last.unwrap().0, id);
                        prop_assert!(lease.expire(now));
                    }
                    3 if lease.expire(now) => {
                        lease.ended();
                        last = None;
                    }
                    _ => {}
                }
                if !lease.expire(now) {
                    prop_assert_eq!(lease.is_free(), last.is_none());
                    if let Some((holder, word)) = last {
                        prop_assert!(lease.is_held_by(holder) && now < word + Lease::LIFE);
                    }
                }
            }
        }
    }
}
