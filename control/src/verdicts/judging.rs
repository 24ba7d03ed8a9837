//! The task: it hears all the time, judges four times a second while its node leads, and tells what was written.
//!
//! ```text
//! Follower --leading--> Taking --plan and overrides read--> Leading --lost, or fenced by the store--> Follower
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message;
use spillway_core::health::{Event, Records, Vantage, What};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control::{self, SealedPlan};
use spillway_runtime::audit::{Audit, Event as AuditEvent};
use spillway_runtime::drain::Drain;
use spillway_runtime::plan::{Published, open, seal};
use spillway_runtime::telemetry::{Chain, Metrics};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use super::docket::{Docket, Due};
use super::judge::Judge;
use super::metrics::VerdictMetrics;
use super::orders::Times;
use super::status::{self, Findings};
use super::stored::Stored;
use super::{HealthSettings, Verdicts, vantage};
use crate::distribution::Report;
use crate::intent::{Drills, Events};
use crate::store::{Condition, Fence, Store, StoreError, Write};

const PLAN: &str = "plan";
const OVERRIDES: &str = "overrides/";
const TICK: Duration = Duration::from_millis(250);
/// How soon it is judged when a probe failed.
const SOON: Duration = Duration::from_millis(20);
/// Between two attempts at a store that does not answer.
const REST: Duration = Duration::from_secs(1);
/// Where this task's time begins: records say how long something lasted, which may be longer than this process.
const ORIGIN: Duration = Duration::from_secs(365 * 86_400);

/// What judging needs of its process.
pub struct Inputs {
    /// This node's own vantage.
    pub us: Vantage,
    /// What nodes say, this one among them.
    pub reports: mpsc::Receiver<Report>,
    /// The newest intent: which regions are judged. Asked often; must not block.
    pub snapshot: Box<dyn Fn() -> Option<Arc<Snapshot>> + Send>,
    /// What all nodes may serve: which of them a plan is for, and their weights. None: it is not known yet.
    pub served: Box<dyn Fn() -> Option<Arc<Snapshot>> + Send>,
    pub store: Store,
    /// While this node leads, by which election.
    pub leading: watch::Receiver<Option<Fence>>,
    /// Told of gateways, as `region/gateway`, that were just refused to somebody or whose stream ended: all vantages
    /// should probe them at once.
    pub nudges: broadcast::Sender<String>,
    /// What vantages said, while this node leads: the next leader should know it, too.
    pub shared: broadcast::Sender<Arc<Report>>,
    pub audit: Audit,
    /// For people.
    pub events: Events,
    /// What runs meanwhile is told with every change.
    pub drills: Drills,
}

/// Judges until the drain is over.
pub struct Judging {
    inputs: Inputs,
    judge: Judge,
    term: Term,
    /// The election that the store said is over.
    fenced: Option<u64>,
    overrides: BTreeMap<Name, control::Override>,
    overrides_changed: watch::Receiver<u64>,
    plan_changed: watch::Receiver<u64>,
    /// What has changed in the store and was not read yet.
    stale: Stale,
    rests_until: Duration,
    published: u64,
    plan: watch::Sender<Option<Arc<SealedPlan>>>,
    findings: status::Shared,
    metrics: VerdictMetrics,
    regions: BTreeSet<Name>,
}

#[derive(Debug)]
enum Term {
    Follower,
    Taking(Fence),
    Leading(Fence, Docket),
}

#[derive(Clone, Copy, Debug)]
struct Stale {
    plan: bool,
    overrides: bool,
}

impl Judging {
    pub fn new(inputs: Inputs, settings: HealthSettings, metrics: &Metrics) -> (Self, Verdicts) {
        let (plan, planned) = watch::channel(None);
        let (findings, found) = watch::channel(Arc::new(Findings::default()));
        let verdicts = Verdicts { plan: planned, findings: found };
        let judging = Self {
            judge: Judge::new(settings, inputs.us.clone()),
            term: Term::Follower,
            fenced: None,
            overrides: BTreeMap::new(),
            overrides_changed: inputs.store.watch(OVERRIDES),
            plan_changed: inputs.store.watch(PLAN),
            stale: Stale { plan: true, overrides: true },
            rests_until: Duration::ZERO,
            published: 0,
            plan,
            findings,
            metrics: VerdictMetrics::register(metrics),
            regions: BTreeSet::new(),
            inputs,
        };
        (judging, verdicts)
    }

    pub async fn run(mut self, drain: Drain) {
        let began = Instant::now();
        let mut next = began;
        loop {
            tokio::select! {
                report = self.inputs.reports.recv() => {
                    let Some(report) = report else { return };
                    if self.hear(&report, ORIGIN + began.elapsed()) {
                        next = next.min(Instant::now() + SOON);
                    }
                    self.share(report);
                }
                Ok(()) = self.inputs.leading.changed() => next = Instant::now(),
                () = tokio::time::sleep_until(next) => {
                    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                    self.tick(Times { now: ORIGIN + began.elapsed(), wall }).await;
                    next = Instant::now() + TICK;
                }
                () = drain.stopped() => return,
            }
        }
    }

    /// Takes in a report. Whether it should be judged soon.
    pub(super) fn hear(&mut self, report: &Report, now: Duration) -> bool {
        let heard = self.judge.hear(report, now);
        self.metrics.ignored(heard.ignored);
        if heard.disbelieved {
            self.metrics.disbelieved();
        }
        for gateway in heard.nudged {
            // Nobody passes them on: then there is no vantage.
            let _ = self.inputs.nudges.send(format!("{}/{}", gateway.region, gateway.node));
        }
        heard.failed
    }

    fn share(&self, report: Report) {
        let leads = !matches!(self.term, Term::Follower);
        if leads && vantage(report.node()).is_some() {
            // Nobody follows: then there is nobody to lead next.
            let _ = self.inputs.shared.send(Arc::new(report));
        }
    }

    /// One look at everything. Takes no longer than three calls to the store.
    pub(super) async fn tick(&mut self, times: Times) {
        self.stale.plan |= self.plan_changed.has_changed().unwrap_or(false);
        self.stale.overrides |= self.overrides_changed.has_changed().unwrap_or(false);
        self.follow_election();
        match std::mem::replace(&mut self.term, Term::Follower) {
            Term::Follower => self.follow(times).await,
            Term::Taking(fence) => match self.take(times).await {
                Some(docket) => self.lead(fence, docket, times).await,
                None => self.term = Term::Taking(fence),
            },
            Term::Leading(fence, docket) => self.lead(fence, docket, times).await,
        }
    }

    fn follow_election(&mut self) {
        let leading = self.inputs.leading.borrow_and_update().clone();
        let leading = leading.filter(|fence| self.fenced != Some(fence.epoch));
        match (&self.term, leading) {
            (Term::Taking(known) | Term::Leading(known, _), Some(fence)) if *known == fence => {}
            (_, Some(fence)) => self.term = Term::Taking(fence),
            (Term::Follower, None) => {}
            (_, None) => self.resign(),
        }
    }

    fn resign(&mut self) {
        self.term = Term::Follower;
        self.stale = Stale { plan: true, overrides: true };
        self.metrics.resign();
    }

    /// Tells what the leader wrote.
    async fn follow(&mut self, times: Times) {
        if let Some(snapshot) = (self.inputs.snapshot)() {
            self.judge.keep(&snapshot, times.now);
        }
        self.judge.look(times.now);
        if self.stale.plan && times.now >= self.rests_until {
            // What is known of another time is not this node's to judge by.
            let _ = self.read_plan(times).await;
        }
    }

    /// Goes on where the last leader ended. None: the store does not answer.
    async fn take(&mut self, times: Times) -> Option<Docket> {
        if times.now < self.rests_until || !self.read_overrides(times).await {
            return None;
        }
        let (revision, stored) = self.read_plan(times).await?;
        let (records, before) = stored.unzip();
        self.judge.resume(records.unwrap_or_default(), before.as_ref().map(|before| &before.plan), times.now);
        let newest = before.map_or(0, |before| before.plan.version).max(self.published);
        // Of what cannot be read at least its number is known: each plan took a revision.
        Some(Docket::new(revision, newest.max(revision.unwrap_or_default()), times.now))
    }

    async fn lead(&mut self, fence: Fence, mut docket: Docket, times: Times) {
        if self.stale.overrides && times.now >= self.rests_until {
            self.read_overrides(times).await;
        }
        if let Some(snapshot) = (self.inputs.snapshot)() {
            let mut events = self.judge.keep(&snapshot, times.now);
            let (ordered, refused) = self.judge.order(&self.overrides, times);
            events.extend(ordered);
            events.extend(self.judge.observe(times.now));
            self.tell(&events, &refused);
            let served = (self.inputs.served)();
            let draft = served.and_then(|served| self.judge.plan(&served, (docket.next(), fence.epoch), times));
            let records = self.judge.records(times.now);
            let due = draft.and_then(|draft| docket.due(draft, &records, times.now));
            if let Some(due) = due.filter(|_| times.now >= self.rests_until)
                && let Err(Fenced) = self.write(&fence, &mut docket, due, records, times).await
            {
                tracing::warn!(epoch = fence.epoch, "another node leads; this one judges no more");
                self.fenced = Some(fence.epoch);
                self.resign();
                return;
            }
        }
        self.show(&docket);
        self.term = Term::Leading(fence, docket);
    }

    /// Writes, and then tells.
    async fn write(
        &mut self,
        fence: &Fence,
        docket: &mut Docket,
        due: Due,
        records: Records,
        times: Times,
    ) -> Result<(), Fenced> {
        docket.attempt(&due);
        let published = match (&due, docket.written()) {
            (Due::Plan(draft), _) => draft.clone(),
            (Due::Records, Some(written)) => written.clone(),
            (Due::Records, None) => return Ok(()),
        };
        let plan = seal(&published);
        let key = || PLAN.to_owned();
        let condition = docket.revision().map_or(Condition::Absent(key()), |revision| Condition::At(key(), revision));
        let value = Stored { plan: plan.clone(), records }.encode();
        let written = self.inputs.store.commit(fence, &[condition], vec![Write::Put(key(), value)]).await;
        match written {
            Ok(revision) => {
                self.metrics.written("done");
                docket.done(due, revision, times.now);
                self.publish(plan, &published);
            }
            Err(StoreError::Fenced(_)) => {
                self.metrics.written("fenced");
                return Err(Fenced);
            }
            // Only an attempt of this same term can have written it, one that was thought to be lost.
            Err(StoreError::Conflict(_)) => {
                self.metrics.written("conflict");
                if let Some((revision, stored)) = self.read_plan(times).await {
                    docket.found(revision, stored.map_or(0, |(_, found)| found.plan.version));
                }
            }
            Err(error) => {
                self.metrics.written("failed");
                self.failed(&error, times);
            }
        }
        Ok(())
    }

    /// Reads and tells what is in the store: its revision, and what is there if it can be read. None: the store does
    /// not answer.
    #[allow(clippy::type_complexity)]
    async fn read_plan(&mut self, times: Times) -> Option<(Option<u64>, Option<(Records, Published)>)> {
        self.plan_changed.mark_unchanged();
        let value = match self.inputs.store.get(PLAN).await {
            Ok(value) => value,
            Err(error) => {
                self.failed(&error, times);
                return None;
            }
        };
        self.stale.plan = false;
        let Some(value) = value else { return Some((None, None)) };
        let stored = Stored::decode(value.bytes);
        let read = stored.and_then(|stored| open(&stored.plan).ok().map(|published| (stored, published)));
        let Some((Stored { plan, records }, published)) = read else {
            tracing::error!(revision = value.revision, "the plan in the store cannot be read");
            return Some((Some(value.revision), None));
        };
        self.publish(plan, &published);
        if matches!(self.term, Term::Follower) {
            self.findings.send_replace(Arc::new(status::read(&published, &records)));
        }
        Some((Some(value.revision), Some((records, published))))
    }

    async fn read_overrides(&mut self, times: Times) -> bool {
        self.overrides_changed.mark_unchanged();
        let entries = match self.inputs.store.list(OVERRIDES).await {
            Ok(entries) => entries,
            Err(error) => {
                self.failed(&error, times);
                return false;
            }
        };
        self.stale.overrides = false;
        self.overrides.clear();
        for (key, value) in entries {
            let region = key.strip_prefix(OVERRIDES).and_then(|region| Name::parse(region).ok());
            match region.zip(control::Override::decode(value.bytes).ok()) {
                Some((region, wanted)) => {
                    self.overrides.insert(region, wanted);
                }
                None => tracing::error!(key, "an override in the store cannot be read"),
            }
        }
        true
    }

    fn failed(&mut self, error: &StoreError, times: Times) {
        // Each failure after a rest is told: that is once a second at most.
        tracing::warn!(error = %Chain(error), serving = self.published, "the store; the last plan stays");
        self.rests_until = times.now + REST;
    }

    fn publish(&mut self, plan: SealedPlan, published: &Published) {
        if published.plan.version > self.published {
            self.published = published.plan.version;
            self.metrics.published(published);
            self.plan.send_replace(Some(Arc::new(plan)));
        }
    }

    fn tell(&self, events: &[Event], refused: &[String]) {
        for text in refused {
            tracing::warn!("{text}");
            self.inputs.events.tell(text);
        }
        let drill = if events.is_empty() { None } else { self.inputs.drills.running() };
        for event in events {
            let mut text = status::words(event);
            if let Some(drill) = &drill {
                text += &format!(" (during the drill {drill})");
            }
            tracing::warn!(region = %event.region, "{text}");
            self.inputs.events.tell(&text);
            self.metrics.happened(event);
            let (region, drill) = (event.region.to_string(), drill.clone());
            self.inputs.audit.record(match &event.what {
                What::Moved(moved) => AuditEvent::RegionMoved {
                    region,
                    from: moved.from.to_string(),
                    to: moved.to.to_string(),
                    why: moved.why.to_string(),
                    drill,
                },
                What::Withheld(_, why) => AuditEvent::RegionWithheld { region, why: why.to_string(), drill },
                // Who ended it is recorded by who did, or by who keeps overrides.
                What::Ended(_) => continue,
            });
        }
    }

    fn show(&mut self, docket: &Docket) {
        let regions: BTreeSet<Name> = self.judge.seen().map(|seen| seen.name.clone()).collect();
        self.metrics.forget(&self.regions.difference(&regions).cloned().collect());
        self.regions = regions;
        self.metrics.judged(&self.judge);
        let findings = status::judged(&self.judge, docket.written());
        self.findings.send_if_modified(|known| {
            let changed = **known != findings;
            if changed {
                *known = Arc::new(findings);
            }
            changed
        });
    }
}

/// Another node leads.
#[derive(Debug)]
struct Fenced;
