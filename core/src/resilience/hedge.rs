//! When a request that takes long is sent to a second pod as well.
//!
//! The rule (Dean and Barroso, "The Tail at Scale", 2013): after the model's p95, so that about 5 % of
//! requests are hedged; out of the budget of the retries; and only if the second can still be in time.
//! The caller hedges idempotent calls alone, takes the first good answer and cancels the other call.
//!
//! ```text
//! sent --delay passes--> may_send: Ok --> sent twice
//!      --answered--> done          Err --> goes on alone
//! ```

use std::time::Duration;

use super::budget::Budget;
use super::latency::Recent;
use crate::deadline::SHORTEST_USEFUL;

/// When to hedge. A model without these settings does not.
#[derive(Clone, Debug, PartialEq)]
pub struct HedgeSettings {
    /// The shortest wait for the first attempt, however fast the model usually is. Default 2 ms.
    pub minimum_delay: Duration,
    /// Latencies that must have been seen before the p95 is believed. Default 100.
    pub samples: u32,
}

impl Default for HedgeSettings {
    fn default() -> Self {
        Self { minimum_delay: Duration::from_millis(2), samples: 100 }
    }
}

/// Why a request is not hedged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoHedge {
    /// Too few latencies are known.
    Samples,
    /// The second attempt could not be answered in time.
    Deadline,
    /// The pool's budget is used up.
    Budget,
}

impl HedgeSettings {
    /// How long the first attempt is waited for, decided as it is sent with `left` to its deadline.
    pub fn delay(&self, recent: &Recent, left: Duration) -> Result<Duration, NoHedge> {
        if recent.samples < self.samples {
            return Err(NoHedge::Samples);
        }
        let delay = recent.p95.max(self.minimum_delay);
        let needed = delay.saturating_add(expected(recent));
        if left < needed { Err(NoHedge::Deadline) } else { Ok(delay) }
    }

    /// Whether the second attempt is sent now that the delay has passed; if so, it is withdrawn.
    pub fn may_send(&self, recent: &Recent, left: Duration, budget: &mut Budget, now: Duration) -> Result<(), NoHedge> {
        if recent.samples < self.samples {
            Err(NoHedge::Samples)
        } else if left < expected(recent) {
            Err(NoHedge::Deadline)
        } else if !budget.take(now) {
            Err(NoHedge::Budget)
        } else {
            Ok(())
        }
    }
}

/// What the second attempt will usually take.
fn expected(recent: &Recent) -> Duration {
    recent.p50.max(SHORTEST_USEFUL)
}

#[cfg(test)]
mod tests {
    use super::super::budget::BudgetSettings;
    use super::*;

    const SETTINGS: HedgeSettings = HedgeSettings { minimum_delay: Duration::from_millis(2), samples: 100 };

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    fn recent(samples: u32, p50: u64, p95: u64) -> Recent {
        Recent { samples, p50: ms(p50), p95: ms(p95), p99: ms(p95 * 2) }
    }

    #[test]
    fn a_hedge_follows_the_p95_but_not_at_once() {
        assert_eq!(HedgeSettings::default(), SETTINGS);
        for (recent, left, verdict) in [
            (recent(100, 4, 9), 100, Ok(ms(9))),
            (recent(99, 4, 9), 100, Err(NoHedge::Samples)),
            (recent(100, 0, 1), 100, Ok(ms(2))),
            (recent(100, 4, 9), 13, Ok(ms(9))),
            (recent(100, 4, 9), 12, Err(NoHedge::Deadline)),
            (recent(0, 0, 0), 0, Err(NoHedge::Samples)),
        ] {
            assert_eq!(SETTINGS.delay(&recent, ms(left)), verdict, "{recent:?}, {left} ms left");
        }
        let endless = Recent { samples: 100, p50: Duration::MAX, p95: Duration::MAX, p99: Duration::MAX };
        assert_eq!(SETTINGS.delay(&endless, ms(1)), Err(NoHedge::Deadline));
    }

    #[test]
    fn hedges_come_out_of_the_retry_budget() {
        let mut budget = Budget::new(&BudgetSettings::default());
        let sent = (0..10).filter(|_| SETTINGS.may_send(&recent(100, 4, 9), ms(50), &mut budget, ms(0)).is_ok());
        assert_eq!(sent.count(), 4, "the reserve");
        assert_eq!(SETTINGS.may_send(&recent(100, 4, 9), ms(50), &mut budget, ms(0)), Err(NoHedge::Budget));
    }

    #[test]
    fn t53_a_hedge_that_could_not_end_in_time_is_not_sent_and_costs_nothing() {
        let mut budget = Budget::new(&BudgetSettings::default());
        for (recent, left, verdict) in [
            (recent(100, 4, 9), ms(3), Err(NoHedge::Deadline)),
            (recent(100, 0, 0), Duration::ZERO, Err(NoHedge::Deadline)),
            (recent(99, 4, 9), ms(50), Err(NoHedge::Samples)),
        ] {
            assert_eq!(SETTINGS.may_send(&recent, left, &mut budget, ms(0)), verdict);
        }
        assert!(budget.left(ms(0)) >= 4.0);
    }
}
