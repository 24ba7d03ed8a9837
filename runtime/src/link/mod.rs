//! The stream to the control plane: what is to be served comes in, what is served and seen goes out.
//!
//! The rule: it never stops traffic. Without a stream, or with bad pushes on it, what was served goes on; a process
//! that starts without one serves what it kept. Only control nodes of our own trust domain are believed.
//!
//! ```text
//! resting ──a server's turn──▶ connecting ──Hello──▶ following ──closed, or silent for 12 s──▶ resting
//!    ▲                             └──not in 3 s, refused──▶┐                                     │
//!    └──────────── up to 5 s, jittered ─────────────────────┴─────────────────────────────────────┘
//! ```
//!
//! A node says `Heartbeat` every 5 s, and hears a `Pulse` as often: a stream that is open at one end alone is noticed
//! after three missed ones, and another stands within 15 s.
//!
//! * [`Source`]: what a process begins with, with a control plane or without.
//! * `delta`, `refusal`: pure. [`Intake`]: what is judged, kept and served.
//! * `session`: one stream. `sightings`: what waits to be sent.

mod codec;
mod delta;
mod epoch;
mod intake;
mod metrics;
mod refusal;
mod session;
mod settings;
mod sightings;
mod source;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_proto::control;
use tokio::sync::watch;
use tokio::time::Instant;

pub use delta::encode;
pub use intake::Intake;
pub use refusal::{Reason, Refusal};
pub use settings::ControlSettings;
pub use sightings::SightingLog;
pub use source::{Feed, Source};

use crate::drain::Drain;
use crate::snapshot::Subscription;
use crate::telemetry::Metrics;
use crate::tls::Workload;
use intake::Serving;
use metrics::LinkMetrics;

/// A heartbeat, and a pulse.
pub const BEAT: Duration = Duration::from_secs(5);
/// Messages larger than this are refused while they are read: the largest snapshot, and what it is wrapped in.
pub const MOST_MESSAGE: usize = 80 << 20;

/// The first rest after a stream ended; it doubles.
const REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(5);
/// A stream that lasted so long was a good one: the rests begin anew.
const STEADY: Duration = Duration::from_secs(1);

/// What a gateway counted since it was asked last.
pub trait TrafficSource: Send + Sync {
    fn since_last(&self) -> control::Traffic;
}

/// What a DNS node answered since it was asked last.
pub type AnswersSource = Box<dyn Fn() -> control::Answers + Send + Sync>;

/// A process's end of the stream.
pub struct Link {
    settings: ControlSettings,
    workload: Arc<Workload>,
    intake: Arc<Mutex<Intake>>,
    snapshots: Arc<Subscription>,
    serving: Serving,
    /// None: a process that takes no traffic of clients.
    traffic: Option<Arc<dyn TrafficSource>>,
    /// None: a process that answers no DNS.
    answers: Option<AnswersSource>,
    pulses: watch::Sender<control::Pulse>,
    sightings: SightingLog,
    metrics: LinkMetrics,
}

impl Link {
    pub fn new(
        settings: ControlSettings,
        workload: Arc<Workload>,
        intake: Intake,
        traffic: Option<Arc<dyn TrafficSource>>,
        metrics: &Metrics,
    ) -> Self {
        let metrics = LinkMetrics::register(metrics);
        Self {
            settings,
            workload,
            snapshots: intake.snapshots(),
            serving: intake.serving(),
            intake: Arc::new(Mutex::new(intake)),
            traffic,
            answers: None,
            pulses: watch::Sender::default(),
            sightings: SightingLog::new(metrics.sightings_dropped.clone()),
            metrics,
        }
    }

    /// Tells the control plane what a DNS node answers.
    pub fn with_answers(self, answers: AnswersSource) -> Self {
        Self { answers: Some(answers), ..self }
    }

    /// The last pulse: who leads, and whom to probe soon.
    pub fn pulses(&self) -> watch::Receiver<control::Pulse> {
        self.pulses.subscribe()
    }

    /// Where what probes saw goes.
    pub fn sightings(&self) -> SightingLog {
        self.sightings.clone()
    }

    /// Follows one control node after the other until stopped.
    pub async fn follow(self, drain: Drain) {
        let servers = &self.settings.servers;
        // Not all processes begin with the same one.
        let first = rand::random_range(0..servers.len().max(1));
        let mut failures = 0_u32;
        for server in servers.iter().cycle().skip(first) {
            let began = Instant::now();
            let ended = tokio::select! {
                ended = self.session(server) => ended,
                () = drain.stopped() => break,
            };
            self.metrics.ended(ended.reason());
            if ended.was_open() && began.elapsed() >= STEADY {
                failures = 0;
            }
            failures = failures.saturating_add(1);
            if failures == 1 {
                tracing::warn!(server, %ended, "the stream to the control plane ended; what is served stays");
            } else {
                tracing::debug!(server, %ended, failures, "the control plane cannot be followed");
            }
            tokio::select! {
                () = tokio::time::sleep(rest(failures)) => {}
                () = drain.stopped() => break,
            }
        }
        self.metrics.open.set(0);
    }
}

/// Doubles up to the longest, less up to a half: many do not come back at the same moment.
fn rest(failures: u32) -> Duration {
    let doubled = REST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST_REST).mul_f64(1.0 - 0.5 * rand::random::<f64>())
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;
