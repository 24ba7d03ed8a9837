//! Whether a failed request is sent again, and how many such extra attempts a pool may cost.
//!
//! The rule: extra attempts (retries and hedges) stay within `ratio` of the requests, whatever fails.
//! One gateway asks here and no other layer retries, so attempts do not multiply along the path.
//! Which pod gets the retry is not decided here.
//!
//! A first attempt that no pod ever saw has cost no pod anything: its retry is not an extra attempt and takes
//! nothing from the budget (the transparent retry of gRFC A6). So a pod that is replaced costs no request, however
//! many were on their way to it. Good answers pay for that, one each and [`MOST_FREE`] at most, so that a pool of
//! which no pod can be reached falls back to the budget.
//!
//! The budget is a token bucket filled by requests (Finagle's `RetryBudget`): a first attempt deposits
//! `deposit`, time adds `minimum` per second, the bucket holds `reserve`, an extra attempt costs 1. So a
//! window of W seconds with N first attempts sees at most `reserve + minimum W + deposit N` extra ones.
//!
//! Reserve and minimum are advances, which the deposits pay back: with N0 = max(100, 10 / ratio),
//!
//! ```text
//! deposit = ratio - (reserve + 10 s x minimum) / N0
//! ```
//!
//! so that W <= 10 s and N >= N0 give at most `ratio x N`: with the defaults, attempts <= 1.1 x requests over
//! any 10 s with 100 requests or more, also while the whole pool fails. The price is a lasting rate of 5 %
//! for a reserve of 4; what saves requests is the burst until a bad pod is ejected. Windows with fewer
//! requests are held to the first formula alone.

use std::time::Duration;

use crate::deadline::SHORTEST_USEFUL;

/// The window over which the ratio is kept, in seconds.
const WINDOW_S: f64 = 10.0;

/// Good answers that are saved up for retries of what no pod saw.
pub const MOST_FREE: u32 = 100;

/// How many extra attempts a pool may cost.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetSettings {
    /// Extra attempts per request, over any 10 s with enough of them. 0 to 1, default 0.1.
    pub ratio: f64,
    /// Extra attempts that may come at once. At least 1, default 4.
    pub reserve: f64,
    /// Extra attempts per second that a pool with few requests may make. Default 0.1.
    ///
    /// Reserve and ten seconds of the minimum together are cut to half of `ratio x max(100, 10 / ratio)`.
    pub minimum: f64,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { ratio: 0.1, reserve: 4.0, minimum: 0.1 }
    }
}

/// When and how often a request is sent again.
#[derive(Clone, Debug, PartialEq)]
pub struct RetrySettings {
    /// Retries of one request, 0 to [`RetrySettings::MOST`]. Default 1.
    pub retries: u32,
    /// The wait before the second retry; each later one waits twice as long. Default 100 ms.
    pub base: Duration,
    /// The longest wait, before jitter. Default 5 s.
    pub cap: Duration,
    /// Random addition to a wait, as a share of it. 0 to 1, default 0.1.
    pub jitter: f64,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self { retries: 1, base: Duration::from_millis(100), cap: Duration::from_secs(5), jitter: 0.1 }
    }
}

impl RetrySettings {
    /// More retries than this are not made, whatever is set.
    pub const MOST: u32 = 3;

    /// The wait after `attempt` attempts failed, for `random` in 0..1.
    ///
    /// The first retry goes to another pod at once. Later ones wait `min(base x 2^(attempt - 2), cap)` and up
    /// to `jitter` of that more.
    pub fn backoff(&self, attempt: u32, random: f64) -> Duration {
        let Some(doublings) = attempt.checked_sub(2) else { return Duration::ZERO };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let wait = self.base.saturating_mul(factor).min(self.cap);
        let share = between(self.jitter, 0.0, 1.0) * between(random, 0.0, 1.0);
        wait.saturating_add(Duration::try_from_secs_f64(wait.as_secs_f64() * share).unwrap_or_default())
    }
}

/// How an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The pod never saw it: no connection, or the stream was refused before it was read.
    Unseen,
    /// The connection died, or the pod answered with a 5xx or garbage.
    Died {
        /// A second run does no harm: unary inference, of which the caller has got nothing yet.
        idempotent: bool,
    },
    /// The pod said that it has too much to do.
    Overload,
    /// The caller's fault.
    Client,
    /// The time was used up.
    Deadline,
    /// The caller has gone.
    Cancelled,
}

/// A failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    pub failure: Failure,
    /// Attempts sent so far for this request, hedges included: 1 for the first.
    pub attempt: u32,
    /// Time left until the request's deadline.
    pub left: Duration,
    /// What the model usually takes: its recent p50.
    pub expected: Duration,
}

/// Why a request is not sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoRetry {
    /// It would add to the load of pods that have too much.
    Overload,
    /// It would fail again.
    Client,
    /// A second run could do harm.
    NotIdempotent,
    /// The caller has gone.
    Cancelled,
    /// It has had its retries.
    Attempts,
    /// It could not be answered in time.
    Deadline,
    /// The pool's budget is used up.
    Budget,
}

/// The extra attempts that a pool has left.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    tokens: f64,
    reserve: f64,
    deposit: f64,
    minimum: f64,
    filled: Option<Duration>,
    /// Retries of unseen attempts that good answers have paid for.
    free: u32,
}

impl Budget {
    /// A full budget. Values out of their range are brought into it.
    pub fn new(settings: &BudgetSettings) -> Self {
        let ratio = between(settings.ratio, 0.0, 1.0);
        if ratio == 0.0 {
            return Self { tokens: 0.0, reserve: 0.0, deposit: 0.0, minimum: 0.0, filled: None, free: 0 };
        }
        let requests = (10.0 / ratio).max(100.0);
        let advances = ratio * requests / 2.0;
        let reserve = between(settings.reserve, 1.0, advances);
        let minimum = between(settings.minimum, 0.0, (advances - reserve) / WINDOW_S);
        let deposit = ratio - (reserve + minimum * WINDOW_S) / requests;
        Self { tokens: reserve, reserve, deposit, minimum, filled: None, free: 0 }
    }

    /// A first attempt is sent.
    pub fn request(&mut self) {
        self.tokens = (self.tokens + self.deposit).min(self.reserve);
    }

    /// A pod gave a good answer.
    pub fn answered(&mut self) {
        self.free = (self.free + 1).min(MOST_FREE);
    }

    /// Withdraws one extra attempt, or says that none is left.
    pub fn take(&mut self, now: Duration) -> bool {
        self.tokens = self.left(now);
        self.filled = self.filled.max(Some(now));
        let some = self.tokens >= 1.0;
        if some {
            self.tokens -= 1.0;
        }
        some
    }

    /// Extra attempts left.
    pub fn left(&self, now: Duration) -> f64 {
        let since = self.filled.map_or(Duration::ZERO, |filled| now.saturating_sub(filled));
        (self.tokens + self.minimum * since.as_secs_f64()).min(self.reserve)
    }

    /// Whether a failed request is sent again; if so, the attempt is withdrawn. The retry is due after
    /// [`RetrySettings::backoff`], which has been taken into account here at its longest.
    pub fn may_retry(&mut self, settings: &RetrySettings, failed: Failed, now: Duration) -> Result<(), NoRetry> {
        match failed.failure {
            Failure::Unseen | Failure::Died { idempotent: true } => {}
            Failure::Died { idempotent: false } => return Err(NoRetry::NotIdempotent),
            Failure::Overload => return Err(NoRetry::Overload),
            Failure::Client => return Err(NoRetry::Client),
            Failure::Deadline => return Err(NoRetry::Deadline),
            Failure::Cancelled => return Err(NoRetry::Cancelled),
        }
        if failed.attempt > settings.retries.min(RetrySettings::MOST) {
            return Err(NoRetry::Attempts);
        }
        let needed = settings.backoff(failed.attempt, 1.0).saturating_add(failed.expected.max(SHORTEST_USEFUL));
        if failed.left < needed {
            return Err(NoRetry::Deadline);
        }
        if failed.failure == Failure::Unseen && failed.attempt == 1 && self.free > 0 {
            self.free -= 1;
            return Ok(());
        }
        if self.take(now) { Ok(()) } else { Err(NoRetry::Budget) }
    }
}

/// `value` within its range; what is not a number is the least.
fn between(value: f64, least: f64, most: f64) -> f64 {
    value.max(least).min(most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn failed(failure: Failure) -> Failed {
        Failed { failure, attempt: 1, left: SECOND, expected: Duration::from_millis(10) }
    }

    fn judge(settings: &RetrySettings, failed: Failed) -> Result<(), NoRetry> {
        Budget::new(&BudgetSettings::default()).may_retry(settings, failed, SECOND)
    }

    #[test]
    fn only_safe_failures_are_retried() {
        let settings = RetrySettings::default();
        for (failure, verdict) in [
            (Failure::Unseen, Ok(())),
            (Failure::Died { idempotent: true }, Ok(())),
            (Failure::Died { idempotent: false }, Err(NoRetry::NotIdempotent)),
            (Failure::Overload, Err(NoRetry::Overload)),
            (Failure::Client, Err(NoRetry::Client)),
            (Failure::Deadline, Err(NoRetry::Deadline)),
            (Failure::Cancelled, Err(NoRetry::Cancelled)),
        ] {
            assert_eq!(judge(&settings, failed(failure)), verdict, "{failure:?}");
        }
    }

    #[test]
    fn a_request_gets_one_retry_by_default_and_never_more_than_three() {
        for (retries, most) in [(0, 0), (1, 1), (2, 2), (3, 3), (u32::MAX, 3)] {
            let settings = RetrySettings { retries, ..RetrySettings::default() };
            let made = (1..10).filter(|&attempt| {
                judge(&settings, Failed { attempt, left: SECOND * 60, ..failed(Failure::Unseen) }).is_ok()
            });
            assert_eq!(made.count(), most);
        }
        assert_eq!(RetrySettings::default().retries, 1);
    }

    #[test]
    fn t53_no_retry_starts_that_could_not_end_in_time() {
        let settings = RetrySettings { retries: 3, ..RetrySettings::default() };
        let ms = Duration::from_millis;
        for (attempt, left, expected, verdict) in [
            (1, ms(10), ms(10), Ok(())),
            (1, ms(9), ms(10), Err(NoRetry::Deadline)),
            (1, Duration::ZERO, Duration::ZERO, Err(NoRetry::Deadline)),
            (1, Duration::from_micros(499), Duration::ZERO, Err(NoRetry::Deadline)),
            (2, ms(119), ms(10), Err(NoRetry::Deadline)),
            (2, ms(120), ms(10), Ok(())),
            (1, SECOND, Duration::MAX, Err(NoRetry::Deadline)),
        ] {
            let call = Failed { attempt, left, expected, failure: Failure::Unseen };
            assert_eq!(judge(&settings, call), verdict, "{call:?}");
        }
    }

    #[test]
    fn the_first_retry_is_immediate_and_later_ones_back_off() {
        let settings = RetrySettings::default();
        let waits = [0, 1, 2, 3, 4, 7, 8, 100, u32::MAX].map(|attempt| settings.backoff(attempt, 0.0).as_millis());
        assert_eq!(waits, [0, 0, 100, 200, 400, 3_200, 5_000, 5_000, 5_000]);
        assert_eq!(settings.backoff(2, 1.0), Duration::from_millis(110));
        assert_eq!(settings.backoff(2, f64::NAN), Duration::from_millis(100));
        assert_eq!(settings.backoff(2, f64::INFINITY), Duration::from_millis(110));
        let endless = RetrySettings { base: Duration::MAX, cap: Duration::MAX, jitter: f64::NAN, ..settings };
        assert_eq!(endless.backoff(5, 1.0), Duration::MAX);
    }

    #[test]
    fn an_empty_budget_refuses_until_requests_or_time_fill_it() {
        let mut budget = Budget::new(&BudgetSettings::default());
        assert_eq!((0..10).filter(|_| budget.take(SECOND)).count(), 4, "the reserve");
        (0..20).for_each(|_| budget.request());
        assert!(budget.take(SECOND), "20 deposits of 0.05");
        assert!(!budget.take(SECOND));
        assert!(!budget.take(Duration::ZERO), "time that steps back fills nothing");
        assert!(budget.take(SECOND * 12), "0.1 per second");
        let died = failed(Failure::Died { idempotent: true });
        assert_eq!(budget.may_retry(&RetrySettings::default(), died, SECOND), Err(NoRetry::Budget));
        let unseen = |budget: &mut Budget| budget.may_retry(&RetrySettings::default(), failed(Failure::Unseen), SECOND);
        assert_eq!(unseen(&mut budget), Err(NoRetry::Budget), "no pod has answered");
        budget.answered();
        assert_eq!(
            [unseen(&mut budget), unseen(&mut budget)],
            [Ok(()), Err(NoRetry::Budget)],
            "an answer pays for one"
        );
        budget.answered();
        let again = Failed { attempt: 2, ..failed(Failure::Unseen) };
        let twice = RetrySettings { retries: 2, ..RetrySettings::default() };
        assert_eq!(budget.may_retry(&twice, again, SECOND), Err(NoRetry::Budget), "but once");
        assert!((budget.left(SECOND * 9_999) - 4.0).abs() < 1e-9, "never more than the reserve");
    }

    #[test]
    fn a_refusal_for_another_reason_costs_nothing() {
        let mut budget = Budget::new(&BudgetSettings::default());
        for failure in [Failure::Overload, Failure::Client, Failure::Deadline, Failure::Cancelled] {
            assert!(budget.may_retry(&RetrySettings::default(), failed(failure), SECOND).is_err());
        }
        assert!(budget.left(SECOND) >= 4.0);
    }

    #[test]
    fn unusable_settings_become_usable_ones() {
        for bad in [f64::NAN, -1.0, 0.0, f64::NEG_INFINITY] {
            let mut budget = Budget::new(&BudgetSettings { ratio: bad, ..BudgetSettings::default() });
            budget.request();
            assert!(!budget.take(SECOND), "no ratio, no retries");
        }
        let greedy = BudgetSettings { ratio: 0.1, reserve: f64::INFINITY, minimum: f64::INFINITY };
        assert!((Budget::new(&greedy).left(SECOND) - 5.0).abs() < 1e-9);
    }

    #[test]
    fn t54_attempts_stay_within_1_1_of_the_requests_when_all_fail() {
        for rate in [10, 100, 5_000_u32] {
            let (mut budget, settings) = (Budget::new(&BudgetSettings::default()), RetrySettings::default());
            let requests = rate * 10;
            let attempts: u32 = (0..requests)
                .map(|index| {
                    budget.request();
                    let now = SECOND * index / rate;
                    let failure = if index % 2 == 0 { Failure::Unseen } else { Failure::Died { idempotent: true } };
                    1 + u32::from(budget.may_retry(&settings, failed(failure), now).is_ok())
                })
                .sum();
            assert!(attempts * 10 <= requests * 11, "{attempts} attempts for {requests} requests");
        }
    }

    #[test]
    fn a_pod_that_is_gone_costs_no_request_while_others_answer() {
        let (mut budget, settings) = (Budget::new(&BudgetSettings::default()), RetrySettings::default());
        (0..MOST_FREE * 2).for_each(|_| budget.answered());
        for _ in 0..10_000 {
            // Of two pods one: each second request, and then the other answers both.
            budget.request();
            assert_eq!(budget.may_retry(&settings, failed(Failure::Unseen), SECOND), Ok(()));
            budget.answered();
        }
        (0..MOST_FREE).for_each(|_| assert!(budget.may_retry(&settings, failed(Failure::Unseen), SECOND).is_ok()));
        let extra = (0..1_000).filter(|_| budget.may_retry(&settings, failed(Failure::Unseen), SECOND).is_ok());
        assert_eq!(extra.count(), 4, "none answers: what the budget has");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Over every window of at most 10 s: the formula always, the ratio where it has N0 requests.
        #[test]
        fn t54_extra_attempts_stay_within_the_ratio_of_any_ten_seconds(
            ratio in prop_oneof![Just(0.1), 0.02_f64..1.0],
            reserve in 0.0_f64..20.0,
            minimum in 0.0_f64..2.0,
            bursts in proptest::collection::vec((0_u64..4_000, 0_u32..80, 0_u32..40), 1..60),
        ) {
            let mut budget = Budget::new(&BudgetSettings { ratio, reserve, minimum });
            let (mut now, mut log) = (Duration::ZERO, Vec::new());
            for (pause, requests, wishes) in bursts {
                now += Duration::from_millis(pause);
                (0..requests).for_each(|_| budget.request());
                let extra = (0..wishes).filter(|_| budget.take(now)).count();
                log.push((now, requests, extra as f64));
            }
            let least = (10.0 / ratio).max(100.0);
            for (first, (start, _, first_extra)) in log.iter().enumerate() {
                // The worst window begins after the requests of its first burst.
                let (mut requests, mut extra) = (0.0, *first_extra);
                for (end, more_requests, more_extra) in &log[first + 1..] {
                    let length = (*end - *start).as_secs_f64();
                    if length > 10.0 {
                        break;
                    }
                    requests += f64::from(*more_requests);
                    extra += more_extra;
                    let bound = budget.reserve + budget.minimum * length + budget.deposit * requests;
                    prop_assert!(extra <= bound + 1e-6);
                    prop_assert!(requests < least || extra <= ratio * requests + 1e-6);
                }
            }
        }
    }
}
