//! The drill that everybody is told of: announced by its controller, for as long as it goes on saying so.
//!
//! The rule: one at a time, and none outlives its controller by more than [`Lease::LIFE`].

use std::time::Duration;

use super::lease::{Lease, LeaseId};

/// A drill, as its controller announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub lease: LeaseId,
    pub drill: String,
    /// The region that it is about, if it is about one.
    pub target: Option<String>,
    /// Where it is, in a word.
    pub stage: String,
    /// Who runs it.
    pub author: String,
    /// Since 1970.
    pub began: Duration,
}

/// What came of an announcement that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    Began,
    Renewed,
}

/// The drill that is announced, and until when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Board(Option<(Notice, Duration)>);

impl Board {
    /// Begins or goes on. Refused, with the drill that runs, if that is another one, or another's.
    pub fn announce(&mut self, notice: Notice, now: Duration) -> Result<Announced, &Notice> {
        self.expire(now);
        let until = now.saturating_add(Lease::LIFE);
        match &mut self.0 {
            Some((held, ends)) if held.lease == notice.lease && held.author == notice.author => {
                // It began when it began, whatever its controller says.
                *held = Notice { began: held.began, ..notice };
                *ends = until;
                Ok(Announced::Renewed)
            }
            Some((held, _)) => Err(held),
            free @ None => {
                *free = Some((notice, until));
                Ok(Announced::Began)
            }
        }
    }

    /// Ends it, if it is this one.
    pub fn end(&mut self, lease: LeaseId, author: &str) -> Option<Notice> {
        let ended = self.0.take_if(|(held, _)| held.lease == lease && held.author == author);
        ended.map(|(notice, _)| notice)
    }

    /// Ends it if nobody renewed it in time.
    pub fn expire(&mut self, now: Duration) -> Option<Notice> {
        self.0.take_if(|(_, until)| now >= *until).map(|(notice, _)| notice)
    }

    /// The drill that runs, and what is left of its lease.
    pub fn running(&self, now: Duration) -> Option<(&Notice, Duration)> {
        let (notice, until) = self.0.as_ref()?;
        let left = until.saturating_sub(now);
        (!left.is_zero()).then_some((notice, left))
    }
}

impl Notice {
    /// For people.
    pub fn words(&self) -> String {
        match &self.target {
            Some(target) => format!("{} of {target}", self.drill),
            None => self.drill.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn notice(lease: u64, author: &str) -> Notice {
        Notice {
            lease: LeaseId(lease),
            drill: "region-loss".into(),
            target: Some("eu".into()),
            stage: "preflight".into(),
            author: author.into(),
            began: SECOND * lease as u32,
        }
    }

    #[test]
    fn a_second_drill_is_refused_until_the_first_has_ended_or_is_forgotten() {
        let mut board = Board::default();
        assert_eq!(board.announce(notice(1, "alice"), SECOND), Ok(Announced::Began));
        assert_eq!(board.announce(notice(2, "alice"), SECOND * 15), Err(&notice(1, "alice")));
        assert_eq!(board.announce(notice(1, "bob"), SECOND * 15), Err(&notice(1, "alice")), "a lease is its author's");
        assert_eq!(board.end(LeaseId(1), "bob"), None);
        assert_eq!(board.announce(notice(2, "bob"), SECOND * 16), Ok(Announced::Began), "15 s are over");
        assert_eq!(board.end(LeaseId(1), "alice"), None);
        assert_eq!(board.end(LeaseId(2), "bob"), Some(notice(2, "bob")));
        assert_eq!(board.announce(notice(3, "bob"), SECOND * 16), Ok(Announced::Began));
    }

    #[test]
    fn what_is_renewed_goes_on_from_its_beginning() {
        let mut board = Board::default();
        let observing = |began| Notice { stage: "observe".into(), began, ..notice(1, "alice") };
        assert_eq!(board.announce(notice(1, "alice"), SECOND), Ok(Announced::Began));
        assert_eq!(board.announce(observing(SECOND * 9), SECOND * 10), Ok(Announced::Renewed));
        assert_eq!(board.running(SECOND * 24), Some((&observing(SECOND), SECOND)));
        assert_eq!(board.running(SECOND * 25), None);
        assert_eq!(board.expire(SECOND * 24), None, "a moment is left");
        assert_eq!(board.expire(SECOND * 25), Some(observing(SECOND)));
        assert_eq!(board.expire(SECOND * 25), None, "once");
    }

    proptest! {
        /// Whoever announces, renews and ends: one drill at a time, each for 15 s after its last word and no longer.
        #[test]
        fn one_runs_at_a_time(steps in proptest::collection::vec((0..3_u64, any::<bool>(), 0..20_u32), 1..60)) {
            let (mut board, mut now) = (Board::default(), SECOND);
            let mut runs: Option<(u64, Duration)> = None;
            for (lease, ends, seconds) in steps {
                now += SECOND * seconds;
                runs = runs.filter(|(_, last)| now < *last + Lease::LIFE);
                if ends {
                    let ended = board.end(LeaseId(lease), "alice").is_some();
                    // One whose time is over may still be told to have ended, once.
                    prop_assert!(ended || runs.is_none_or(|(known, _)| known != lease));
                    runs = runs.filter(|(known, _)| *known != lease);
                } else if board.announce(notice(lease, "alice"), now).is_ok() {
                    prop_assert!(runs.is_none_or(|(known, _)| known == lease));
                    runs = Some((lease, now));
                } else {
                    prop_assert!(runs.is_some_and(|(known, _)| known != lease));
                }
                prop_assert_eq!(board.running(now).map(|(notice, _)| notice.lease.0), runs.map(|(known, _)| known));
            }
        }
    }
}
