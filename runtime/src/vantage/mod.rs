//! What is seen of other regions from here: each of their gateways is asked again and again, the way that clients ask.
//!
//! The rule: one probe of a gateway at a time, each over a connection of its own, so that it sees what a new client
//! would see. The connection of the last good probe stays open for one purpose: its end says that the gateway may be
//! gone, and the next probe is due. Nothing here decides where traffic goes.
//!
//! ```text
//! Snapshot: gateways of other regions ──▶ a schedule for each ──due──▶ probe ──▶ sighting, for control
//!            nudges, ended connections ──────────▲                       └─────▶ board of our own pairs ──▶ down
//! ```
//!
//! `down` is what this process sees with its own eyes, for when control is gone: regions of whose gateways more than
//! half have failed, seen from here. Who sees nothing at all, in two regions or more that should answer, is itself cut
//! off and knows nothing: then it is empty.

mod metrics;
mod post;
mod probe;
mod target;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use spillway_core::health::{Board, Gateway, Outcome, Schedule, Vantage, VerdictSettings, View};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control::{self, sighting};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use self::metrics::ProbeMetrics;
pub use self::post::{Post, Sources};
use self::probe::Probed;
use self::target::{Target, targets};
use crate::drain::Drain;
use crate::telemetry::Metrics;
use crate::tls::Workload;
use crate::upstream::{Upstream, UpstreamMetrics, UpstreamSettings};

/// Nudges that wait; more are of the same few gateways.
const NUDGES: usize = 256;
/// How often one gateway is nudged at most. Its probes come a second apart at least, whatever is nudged.
const NUDGED: Duration = Duration::from_millis(100);
/// How often the Snapshot is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What a prober asks and tells its process. None of it may block.
pub struct Surroundings {
    /// The Snapshot that is served: its regions, gateways and models.
    pub snapshot: Box<dyn Fn() -> Arc<Snapshot> + Send>,
    /// Regions that are out by the plan, and so not expected to answer.
    pub out: Box<dyn Fn() -> BTreeSet<Name> + Send>,
    /// A probe ended.
    pub sighted: Box<dyn Fn(control::Sighting) + Send>,
}

/// What a prober finds.
#[derive(Clone, Debug)]
pub struct Lookout {
    /// Regions that are down as seen from here.
    pub down: watch::Receiver<BTreeSet<Name>>,
    pub nudges: Nudges,
}

/// Says that a gateway may be gone. Cheap to clone; all clones are bounded as one.
#[derive(Clone, Debug)]
pub struct Nudges {
    sender: mpsc::Sender<Gateway>,
    /// Gateways that were nudged within [`NUDGED`], and when.
    recent: Arc<Mutex<BTreeMap<Gateway, Instant>>>,
}

impl Nudges {
    /// A connection to it was lost, or a request could not be sent. Never waits; says it at most once in [`NUDGED`],
    /// so that a thousand requests that are lost together wake the prober once.
    pub fn nudge(&self, region: &Name, gateway: &Name) {
        let (gateway, now) = (Gateway { region: region.clone(), node: gateway.clone() }, Instant::now());
        let mut recent = self.recent.lock();
        recent.retain(|_, at| now.duration_since(*at) < NUDGED);
        // Full: so many are to be probed anyway.
        let is_new = recent.len() < NUDGES && !recent.contains_key(&gateway);
        if is_new && self.sender.try_send(gateway.clone()).is_ok() {
            recent.insert(gateway, now);
        }
    }

    /// Somebody else says so: `region/gateway`, as in a Pulse. What is not of this form is ignored.
    pub fn hear(&self, nudged: &str) {
        if let Some((region, gateway)) = nudged.split_once('/')
            && let (Ok(region), Ok(gateway)) = (Name::parse(region), Name::parse(gateway))
        {
            self.nudge(&region, &gateway);
        }
    }
}

/// Probes until the drain is over.
pub struct Prober {
    workload: Arc<Workload>,
    us: Vantage,
    surroundings: Surroundings,
    settings: VerdictSettings,
    metrics: ProbeMetrics,
    began: Instant,
    snapshot: Option<Arc<Snapshot>>,
    watched: BTreeMap<Gateway, Watched>,
    board: Board,
    isolated: bool,
    down: watch::Sender<BTreeSet<Name>>,
    nudged: mpsc::Receiver<Gateway>,
}

/// One gateway.
struct Watched {
    target: Arc<Target>,
    upstream: Upstream,
    schedule: Schedule,
    /// Counts probes. The end of an older one's connection, or of one to an address of before, says nothing.
    number: u64,
    under_way: bool,
}

/// Something ended.
enum Ended {
    Probe(Gateway, u64, Probed),
    Connection(Gateway, u64),
}

impl Prober {
    /// `us`: whose word it is. It has none on its own region.
    pub fn new(
        workload: Arc<Workload>,
        us: Vantage,
        surroundings: Surroundings,
        settings: VerdictSettings,
        metrics: &Metrics,
    ) -> (Self, Lookout) {
        let (nudges, nudged) = mpsc::channel(NUDGES);
        let (down, is_down) = watch::channel(BTreeSet::new());
        let prober = Self {
            workload,
            us,
            surroundings,
            board: Board::new(settings.clone()),
            settings,
            metrics: ProbeMetrics::register(metrics),
            began: Instant::now(),
            snapshot: None,
            watched: BTreeMap::new(),
            isolated: false,
            down,
            nudged,
        };
        (prober, Lookout { down: is_down, nudges: Nudges { sender: nudges, recent: Arc::default() } })
    }

    pub async fn run(mut self, drain: Drain) {
        // Bounded: a probe and an open connection for each gateway, and those of gateways that are being let go.
        let mut running: FuturesUnordered<BoxFuture<'static, Ended>> = FuturesUnordered::new();
        loop {
            self.look();
            let now = self.now();
            for (gateway, watched) in &mut self.watched {
                if !watched.under_way && watched.schedule.due() <= now {
                    running.push(watched.begin(gateway.clone(), self.settings.probe.timeout, now));
                }
            }
            let idle = self.watched.values().filter(|watched| !watched.under_way);
            let due = idle.map(|watched| watched.schedule.due()).min().unwrap_or(Duration::MAX);
            let wake = self.began + due.min(now + LOOK);
            tokio::select! {
                Some(ended) = running.next() => match ended {
                    Ended::Probe(gateway, number, probed) => {
                        running.extend(self.note(gateway, number, probed));
                    }
                    Ended::Connection(gateway, number) => self.lost(&gateway, number),
                },
                Some(gateway) = self.nudged.recv() => self.nudge(&gateway),
                () = tokio::time::sleep_until(wake) => {}
                () = drain.stopped() => return,
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Takes in what there is to be probed.
    fn look(&mut self) {
        let snapshot = (self.surroundings.snapshot)();
        if self.snapshot.as_ref().is_some_and(|known| Arc::ptr_eq(known, &snapshot)) {
            return;
        }
        let now = self.now();
        let mut before = std::mem::take(&mut self.watched);
        for (gateway, target) in targets(&snapshot, self.us.region()) {
            let watched = match before.remove(&gateway) {
                Some(watched) if watched.target.reaches(&target) => Watched { target: Arc::new(target), ..watched },
                Some(watched) => Watched { number: watched.number + 1, ..self.watch(target, now) },
                None => self.watch(target, now),
            };
            self.watched.insert(gateway, watched);
        }
        before.keys().for_each(|gateway| self.metrics.forget(gateway));
        self.board.keep(&BTreeSet::from([self.us.clone()]), &self.watched.keys().cloned().collect());
        self.snapshot = Some(snapshot);
        self.judge();
    }

    /// The first probe comes within an interval, at a time of its own.
    fn watch(&self, target: Target, now: Duration) -> Watched {
        let probe = &self.settings.probe;
        let settings = UpstreamSettings {
            connect_timeout: probe.timeout,
            // Schedules say when to try again.
            rest: Duration::ZERO,
            longest_rest: Duration::ZERO,
            ..UpstreamSettings::default()
        };
        let (workload, expected) = (self.workload.clone(), target.expected.clone());
        let upstream = Upstream::with(workload, target.address, expected, settings, UpstreamMetrics::default());
        let first = now + probe.interval.mul_f64(rand::random::<f64>());
        let schedule = Schedule::new(probe.clone(), first);
        Watched { target: Arc::new(target), upstream, schedule, number: 0, under_way: false }
    }

    /// Takes in how a probe ended. While it was good, its connection is watched.
    fn note(&mut self, gateway: Gateway, number: u64, probed: Probed) -> Option<BoxFuture<'static, Ended>> {
        let now = self.now();
        let watched = self.watched.get_mut(&gateway).filter(|watched| watched.number == number)?;
        watched.under_way = false;
        watched.schedule.end(probed.outcome);
        let follow = (!probed.outcome.is_failure()).then(|| watched.follow(gateway.clone()));
        let failed_before = self.board.pair(&self.us, &gateway).is_some_and(|pair| pair.failures() > 0);
        self.board.record(&self.us, &gateway, probed.outcome, now);
        self.metrics.probed(&gateway, &probed);
        if probed.outcome == Outcome::Refused && !failed_before {
            self.ask_others(&gateway.region);
        }
        let Gateway { region, node } = &gateway;
        match (failed_before, probed.outcome.is_failure()) {
            (false, true) => tracing::warn!(%region, gateway = %node, why = probed.why, "a probe failed"),
            (true, false) => tracing::info!(%region, gateway = %node, "probes are answered again"),
            _ => {}
        }
        (self.surroundings.sighted)(control::Sighting {
            region: gateway.region.to_string(),
            gateway: gateway.node.to_string(),
            outcome: outcome_code(probed.outcome).into(),
            round_trip_us: u64::try_from(probed.took.as_micros()).unwrap_or(u64::MAX),
        });
        self.judge();
        follow
    }

    /// Who is refused asks other regions soon: it may be itself that is cut off, and it must not take one region for
    /// dead because the turn of the next has not come.
    fn ask_others(&mut self, refused: &Name) {
        let now = self.now();
        for (_, watched) in self.watched.iter_mut().filter(|(gateway, _)| gateway.region != *refused) {
            watched.schedule.nudge(now);
        }
    }

    fn lost(&mut self, gateway: &Gateway, number: u64) {
        if self.watched.get(gateway).is_some_and(|watched| watched.number == number && !watched.under_way) {
            self.nudge(gateway);
        }
    }

    fn nudge(&mut self, gateway: &Gateway) {
        let now = self.now();
        if let Some(watched) = self.watched.get_mut(gateway) {
            self.metrics.nudged();
            watched.schedule.nudge(now);
        }
    }

    /// What is seen from here now.
    fn judge(&mut self) {
        let judgement = self.board.judge(&(self.surroundings.out)(), self.now());
        let isolated = judgement.isolated.contains(&self.us);
        if std::mem::replace(&mut self.isolated, isolated) != isolated {
            if isolated {
                tracing::warn!("no other region answers: this process is taken to be cut off");
            } else {
                tracing::info!("other regions answer again");
            }
        }
        self.metrics.show(&judgement, isolated);
        let is_down = |view: View| view == View::Down;
        let down = judgement.regions.into_iter().filter(|(_, evidence)| is_down(evidence.view)).map(|(name, _)| name);
        let down: BTreeSet<Name> = down.collect();
        self.down.send_if_modified(|known| {
            let changed = *known != down;
            if changed {
                let names: Vec<&str> = down.iter().map(Name::as_str).collect();
                tracing::warn!(down = names.join(" "), "regions that are down as seen from here");
                known.clone_from(&down);
            }
            changed
        });
    }
}

impl Watched {
    fn begin(&mut self, gateway: Gateway, timeout: Duration, now: Duration) -> BoxFuture<'static, Ended> {
        self.schedule.begin(now);
        self.number += 1;
        self.under_way = true;
        self.upstream.forget();
        let (target, upstream, number) = (self.target.clone(), self.upstream.clone(), self.number);
        Box::pin(async move { Ended::Probe(gateway, number, probe::probe(&target, &upstream, timeout).await) })
    }

    fn follow(&self, gateway: Gateway) -> BoxFuture<'static, Ended> {
        let (upstream, number) = (self.upstream.clone(), self.number);
        Box::pin(async move {
            upstream.ended().await;
            Ended::Connection(gateway, number)
        })
    }
}

/// An outcome in messages.
pub fn outcome_code(outcome: Outcome) -> sighting::Outcome {
    match outcome {
        Outcome::Good => sighting::Outcome::Good,
        Outcome::Overloaded => sighting::Outcome::Overloaded,
        Outcome::Failed => sighting::Outcome::Failed,
        Outcome::Refused => sighting::Outcome::Refused,
    }
}
