//! What calls to pods count. Labels are of our own lists: neither pods nor models make series.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::resilience::breaker::BreakerState;
use spillway_core::resilience::budget::NoRetry;
use spillway_core::resilience::hedge::NoHedge;
use spillway_core::resilience::{Outcome, outlier};
use spillway_core::routing::Reason;
use spillway_runtime::telemetry::Metrics as Registry;

type Label = [(&'static str, &'static str); 1];

/// Counters of one name for the values of one label, looked up once.
struct Counters<const N: usize>([Counter; N]);

impl<const N: usize> Counters<N> {
    fn new(registry: &Registry, name: &str, help: &str, label: &'static str, values: [&'static str; N]) -> Self {
        let family: Family<Label, Counter> = registry.family(name, help);
        Self(values.map(|value| family.get_or_create(&[(label, value)]).clone()))
    }

    fn inc(&self, index: usize) {
        if let Some(counter) = self.0.get(index) {
            counter.inc();
        }
    }
}

/// Why a request is sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// No pod has seen it.
    Unseen,
    /// The pod died, failed or answered garbage.
    Died,
    /// The first attempt takes unusually long; it goes on beside the second.
    Overdue,
}

/// Why it is not, though it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAgain {
    Core(NoRetry),
    /// There is no other pod that may take it.
    NoOther,
}

/// The pods of the region, by what may be sent to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standings {
    pub usable: i64,
    pub suspect: i64,
    pub probing: i64,
    pub ejected: i64,
    /// Failed its last health check, whatever its calls say.
    pub failed: i64,
}

pub struct PodMetrics {
    attempts: Counters<6>,
    choices: Counters<8>,
    repeated: Counters<3>,
    not_repeated: Counters<8>,
    hedges: Counters<5>,
    ejections: Counters<5>,
    held: Counters<5>,
    restored: Counter,
    breakers: Counters<3>,
    reports: Counters<2>,
    full: Counter,
    standings: [Gauge; 5],
    pub breakers_open: Gauge,
    limits: [Gauge<f64, AtomicU64>; 2],
}

impl PodMetrics {
    pub fn new(registry: &Registry) -> Self {
        let standings: Family<Label, Gauge> = registry.family("gateway_pods", "Pods of this region, by standing");
        let limits: Family<Label, Gauge<f64, AtomicU64>> = registry
            .family("gateway_concurrency_limit", "Calls that a pod may have at a time: the lowest and the mean");
        Self {
            attempts: Counters::new(
                registry,
                "gateway_attempts",
                "Calls to pods, by how they ended",
                "outcome",
                ["success", "failure", "timeout", "overload", "client_error", "cancelled"],
            ),
            choices: Counters::new(
                registry,
                "gateway_choices",
                "Pods chosen, by why it was this one",
                "reason",
                CHOICES.map(Reason::as_str),
            ),
            repeated: Counters::new(
                registry,
                "gateway_repeated",
                "Requests sent to a second pod (hedges aside), by why",
                "reason",
                ["unseen", "died", "overdue"],
            ),
            not_repeated: Counters::new(
                registry,
                "gateway_not_repeated",
                "Attempts that failed or are overdue and that no other followed, by why",
                "reason",
                ["overload", "client", "not_idempotent", "cancelled", "attempts", "deadline", "budget", "no_other"],
            ),
            hedges: Counters::new(
                registry,
                "gateway_hedges",
                "Second attempts beside a slow first one, by what became of them",
                "event",
                ["started", "won", "samples", "deadline", "budget"],
            ),
            ejections: Counters::new(registry, "gateway_ejections", "Pods put out, by the rule", "reason", RULES),
            held: Counters::new(
                registry,
                "gateway_pods_held",
                "Pods that broke a rule and stay because too many are out, by the rule",
                "reason",
                RULES,
            ),
            restored: registry.register("gateway_pods_restored", "Pods that came back", Counter::default()),
            breakers: Counters::new(
                registry,
                "gateway_breaker_transitions",
                "Circuit breakers that changed, by their new state",
                "to",
                ["closed", "open", "half_open"],
            ),
            reports: Counters::new(
                registry,
                "gateway_load_reports",
                "Load reports of pods, by whether they could be read",
                "result",
                ["read", "unreadable"],
            ),
            full: registry.register(
                "gateway_pods_full",
                "Attempts not sent because every pod had as many calls as it takes",
                Counter::default(),
            ),
            standings: ["usable", "suspect", "probing", "ejected", "failed"]
                .map(|state| standings.get_or_create(&[("state", state)]).clone()),
            breakers_open: registry.register(
                "gateway_breakers_open",
                "Circuit breakers that are open or probing",
                Gauge::default(),
            ),
            limits: ["min", "mean"].map(|of| limits.get_or_create(&[("of", of)]).clone()),
        }
    }

    pub fn ended(&self, outcome: Outcome) {
        self.attempts.inc(match outcome {
            Outcome::Success => 0,
            Outcome::Failure => 1,
            Outcome::Timeout => 2,
            Outcome::Overload => 3,
            Outcome::ClientError => 4,
            Outcome::Cancelled => 5,
        });
    }

    pub fn chosen(&self, reason: Reason) {
        self.choices.inc(reason as usize);
    }

    pub fn repeated(&self, again: Again) {
        self.repeated.inc(match again {
            Again::Unseen => 0,
            Again::Died => 1,
            Again::Overdue => 2,
        });
    }

    pub fn not_repeated(&self, why: NotAgain) {
        self.not_repeated.inc(match why {
            NotAgain::Core(NoRetry::Overload) => 0,
            NotAgain::Core(NoRetry::Client) => 1,
            NotAgain::Core(NoRetry::NotIdempotent) => 2,
            NotAgain::Core(NoRetry::Cancelled) => 3,
            NotAgain::Core(NoRetry::Attempts) => 4,
            NotAgain::Core(NoRetry::Deadline) => 5,
            NotAgain::Core(NoRetry::Budget) => 6,
            NotAgain::NoOther => 7,
        });
    }

    pub fn hedge_started(&self) {
        self.hedges.inc(0);
    }

    pub fn hedge_won(&self) {
        self.hedges.inc(1);
    }

    pub fn not_hedged(&self, why: NoHedge) {
        self.hedges.inc(match why {
            NoHedge::Samples => 2,
            NoHedge::Deadline => 3,
            NoHedge::Budget => 4,
        });
    }

    pub fn changed(&self, change: &outlier::Change) {
        match change {
            outlier::Change::Ejected { reason, .. } => self.ejections.inc(rule(*reason)),
            outlier::Change::Held { reason, .. } => self.held.inc(rule(*reason)),
            outlier::Change::Restored { .. } => {
                self.restored.inc();
            }
        }
    }

    pub fn breaker(&self, state: BreakerState) {
        self.breakers.inc(match state {
            BreakerState::Closed { .. } => 0,
            BreakerState::Open { .. } => 1,
            BreakerState::HalfOpen { .. } => 2,
        });
    }

    pub fn reported(&self, is_readable: bool) {
        self.reports.inc(usize::from(!is_readable));
    }

    pub fn full(&self) {
        self.full.inc();
    }

    pub fn show_pods(&self, standings: Standings, limits: (f64, f64)) {
        let Standings { usable, suspect, probing, ejected, failed } = standings;
        for (gauge, value) in self.standings.iter().zip([usable, suspect, probing, ejected, failed]) {
            gauge.set(value);
        }
        self.limits[0].set(limits.0);
        self.limits[1].set(limits.1);
    }
}

/// The names of what [`rule`] gives.
pub const RULES: [&str; 5] = ["consecutive_failures", "success_rate", "latency", "silence", "failed_probe"];

/// In the order of their numbers.
const CHOICES: [Reason; 8] = [
    Reason::Owner,
    Reason::Successor,
    Reason::Bounded,
    Reason::Spread,
    Reason::LessLoaded,
    Reason::Turn,
    Reason::OnlyOne,
    Reason::Panic,
];

pub fn rule(reason: outlier::Reason) -> usize {
    match reason {
        outlier::Reason::ConsecutiveFailures => 0,
        outlier::Reason::SuccessRate => 1,
        outlier::Reason::Latency => 2,
        outlier::Reason::Silence => 3,
        outlier::Reason::FailedProbe => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_choice_is_counted_under_its_own_reason() {
        let registry = Registry::new("test");
        let metrics = PodMetrics::new(&registry);
        for (times, reason) in (1..).zip(CHOICES) {
            (0..times).for_each(|_| metrics.chosen(reason));
        }
        let text = registry.encode().unwrap();
        for (times, reason) in (1..).zip(CHOICES) {
            let line = format!("spillway_gateway_choices_total{{reason=\"{}\"}} {times}\n", reason.as_str());
            assert!(text.contains(&line), "{line}{text}");
        }
    }
}
