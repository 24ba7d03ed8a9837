//! Who is there, what each serves, and what each is sent now.
//!
//! The rule: it decides and queues; it waits for nothing. A node has one seat, that of its newest stream; a queue that
//! is full ends the stream. What a node says counts before what it was sent.
//!
//! ```text
//! wanted version ─▶ base known, and the node's hash is its ─▶ Delta
//!                └▶ otherwise, or refused for its base ─────▶ whole
//! hash is not that of the version served ───────────────────▶ that version, whole
//! ```
//!
//! A stream that ends is not at once a node that is away: it may come again, through another control node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::SpiffeId;
use spillway_core::rollout::{Ack, Change, Kind, Rollout, RolloutSettings, Sample};
use spillway_proto::control;
use spillway_proto::control::ack::{Document, Step};
use spillway_proto::control::from_node::Message as FromNode;
use spillway_runtime::plan::version_of;
use tokio::sync::mpsc;

use super::settled::{Settled, Stopped};
use super::shelf::Shelf;
use crate::intent::{Origin, Version};

/// Messages that wait for a node: a version, a plan, pulses.
const QUEUE: usize = 8;
/// How long a node whose stream ended may take to come again before its change is lost by it.
const GRACE: Duration = Duration::from_millis(1_500);
/// How long it is remembered after that, as core does.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// Versions that are asked of the library at once.
const MOST_MISSING: usize = 8;

/// A message for a node. What is large is shared by all whom it is for.
#[derive(Clone, Debug)]
pub(super) enum ToNode {
    Delta(Arc<control::Delta>),
    Plan(Arc<control::SealedPlan>),
    Pulse(Arc<control::Pulse>),
}

#[derive(Debug)]
pub(super) struct Hub {
    settings: RolloutSettings,
    /// Of the election that whatever is sent counts by.
    pub epoch: u64,
    pub(super) rollout: Rollout,
    pub(super) seats: BTreeMap<SpiffeId, Seat>,
    shelf: Shelf,
    pub(super) plan: Option<(u64, Arc<control::SealedPlan>)>,
    /// The newest version, if its change has not begun.
    pending: Option<Change>,
    /// The newest version that there is.
    newest: u64,
    /// Versions that were needed and not at hand.
    missing: BTreeSet<u64>,
    /// A version that had settled and cannot be had any more.
    gone: Option<u64>,
    sessions: u64,
}

#[derive(Debug)]
pub(super) struct Seat {
    session: u64,
    /// None: its stream ended.
    out: Option<mpsc::Sender<ToNode>>,
    pub(super) serving: control::Serving,
    pub(super) build: String,
    /// Sent last and neither acknowledged nor refused: the version, and whether it was whole.
    offered: Option<(u64, bool)>,
    /// The newest plan that was sent.
    plan_offered: u64,
    /// Its hash is not that of the version that it says it serves.
    pub(super) differs: bool,
    /// The version that it refused last, and why.
    pub(super) refused: Option<(u64, String)>,
    pub(super) refused_plan: Option<(u64, String)>,
    /// When its stream ended, and whether the rollout knows.
    pub(super) left: Option<(Duration, bool)>,
}

/// A node's place, as long as its stream lasts.
#[derive(Debug)]
pub(super) struct Joined {
    pub session: u64,
    pub queue: mpsc::Receiver<ToNode>,
}

impl Hub {
    pub fn new(settings: RolloutSettings, epoch: u64, settled: &Settled) -> Self {
        let Settled { version: settled, stopped, .. } = settled;
        let (settled, newest) = (*settled, stopped.as_ref().map_or(*settled, |stopped| stopped.version));
        let rollout = match stopped {
            Some(stopped) => Rollout::stopped(settings.clone(), settled, stopped.change(), stopped.why.clone()),
            None => Rollout::new(settings.clone(), settled),
        };
        Self {
            settings,
            epoch,
            rollout,
            seats: BTreeMap::new(),
            shelf: Shelf::default(),
            plan: None,
            pending: None,
            newest,
            missing: BTreeSet::from_iter((settled > 0).then_some(settled)),
            gone: None,
            sessions: 0,
        }
    }

    pub fn settled(&self) -> u64 {
        self.rollout.settled()
    }

    /// What the next leader must know.
    pub fn to_keep(&self) -> Settled {
        let stopped = self.rollout.stop().map(|(change, stop)| Stopped::of(change, stop));
        Settled { version: self.settled(), epoch: self.epoch, stopped }
    }

    /// What all nodes may serve; the newest version, where none has settled yet or that one is gone. None: it is not at
    /// hand yet.
    pub fn served(&self) -> Option<&Arc<Version>> {
        let settled = Some(self.settled()).filter(|settled| *settled > 0 && self.gone != Some(*settled));
        self.shelf.get(settled.unwrap_or(self.newest))
    }

    /// There is no such version any more.
    pub fn lose(&mut self, number: u64) {
        if number == self.settled() && self.gone.replace(number) != Some(number) {
            tracing::warn!(
                number,
                "what has settled is not in the store any more; plans are made of the newest version"
            );
        }
    }

    /// Gives a node its seat. None: it is no node, or one too many.
    pub fn join(&mut self, id: &SpiffeId, hello: control::Hello, now: Duration) -> Option<Joined> {
        let serving = hello.serving.unwrap_or_default();
        if !self.rollout.join(id, serving.snapshot_version) {
            return None;
        }
        self.sessions += 1;
        let (session, (out, queue)) = (self.sessions, mpsc::channel(QUEUE));
        let seat = Seat {
            session,
            out: Some(out),
            plan_offered: serving.plan_version,
            serving,
            build: hello.build.chars().take(64).collect(),
            offered: None,
            differs: false,
            refused: None,
            refused_plan: None,
            left: None,
        };
        // The queue of a stream before ends, and with it the stream.
        self.seats.insert(id.clone(), seat);
        self.compare(id);
        // The plan first: it is small, and a version may take a while.
        self.offer_plan(id, now);
        self.offer(id, now);
        Some(Joined { session, queue })
    }

    /// A stream ended. Whether that was the node's seat.
    pub fn leave(&mut self, id: &SpiffeId, session: u64, now: Duration) -> bool {
        let Some(seat) = self.seats.get_mut(id).filter(|seat| seat.session == session) else { return false };
        seat.leave(now);
        true
    }

    /// Takes what a node says. Whether its stream is still its seat.
    pub fn hear(&mut self, id: &SpiffeId, session: u64, message: &FromNode, now: Duration) -> bool {
        let Some(seat) = self.seats.get_mut(id).filter(|seat| seat.session == session && seat.out.is_some()) else {
            return false;
        };
        match message {
            FromNode::Hello(_) | FromNode::Sightings(_) => {}
            FromNode::Heartbeat(heartbeat) => {
                let serving = heartbeat.serving.clone().unwrap_or_default();
                let version = serving.snapshot_version;
                seat.serving = serving;
                self.rollout.heartbeat(id, version, &heartbeat.traffic.as_ref().map(sample).unwrap_or_default());
                self.compare(id);
            }
            FromNode::Ack(ack) => self.acknowledged(id, ack),
            FromNode::Nack(nack) => self.refused(id, nack),
        }
        self.offer_plan(id, now);
        self.offer(id, now);
        true
    }

    /// A version that is the newest, or that was missing.
    pub fn shelve(&mut self, version: Arc<Version>, now: Duration) {
        self.missing.remove(&version.number);
        let keep = self.kept(version.number);
        self.shelf.put(version, &keep);
        self.sweep(now);
    }

    /// There is a newer version: its change begins as soon as `begin` is called.
    pub fn announce(&mut self, version: Arc<Version>, now: Duration) {
        if version.number > self.newest {
            self.newest = version.number;
            let kind = match version.origin {
                Origin::Applied => Kind::Ordinary,
                Origin::RolledBack { .. } => Kind::Rollback,
            };
            self.pending = Some(Change { version: version.number, kind });
        }
        self.shelve(version, now);
    }

    /// Begins the change to the newest version, if it has not begun.
    pub fn begin(&mut self, now: Duration) {
        let Some(change) = self.pending.take() else { return };
        let none_serves = || self.seats.values().all(|seat| seat.serving.snapshot_version == 0);
        if self.settled() == 0 && none_serves() {
            // The first version of all: there is nothing to compare it to, and nothing to lose by it.
            self.rollout = Rollout::new(self.settings.clone(), change.version);
            for (id, seat) in self.seats.iter().filter(|(_, seat)| seat.out.is_some()) {
                self.rollout.join(id, seat.serving.snapshot_version);
            }
            tracing::info!(version = change.version, "the first version settles at once");
        } else {
            match self.rollout.begin(change, now) {
                Ok(_) => tracing::info!(version = change.version, kind = change.kind.as_str(), "a change begins"),
                Err(error) => tracing::warn!(%error, "the change does not begin"),
            }
        }
        self.sweep(now);
    }

    pub fn set_plan(&mut self, plan: Arc<control::SealedPlan>, now: Duration) {
        let version = version_of(&plan);
        if self.plan.as_ref().is_some_and(|(newest, _)| *newest >= version) {
            return;
        }
        self.plan = Some((version, plan));
        for id in self.present() {
            self.offer_plan(&id, now);
        }
    }

    /// Goes on as far as what is known and the time allow.
    pub fn tick(&mut self, now: Duration) {
        for (id, seat) in &mut self.seats {
            if let Some((since, told @ false)) = &mut seat.left
                && now.saturating_sub(*since) >= GRACE
            {
                *told = true;
                self.rollout.leave(id, *since);
            }
        }
        let remembered = |since: Duration| now.saturating_sub(since) < FORGOTTEN_AFTER;
        self.seats.retain(|_, seat| seat.left.is_none_or(|(since, _)| remembered(since)));
        let before = self.rollout.progress();
        self.rollout.tick(now);
        let after = self.rollout.progress();
        if before != after {
            tracing::info!(progress = %after, settled = self.settled(), "the rollout goes on");
        }
        if before != after || matches!(after, spillway_core::rollout::Progress::Running { .. }) {
            self.sweep(now);
        }
    }

    pub fn pulse(&mut self, pulse: control::Pulse, now: Duration) {
        let pulse = Arc::new(pulse);
        for seat in self.seats.values_mut() {
            seat.send(ToNode::Pulse(Arc::clone(&pulse)), now);
        }
    }

    /// Versions that are needed and not at hand.
    pub fn take_missing(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.missing)
    }

    fn present(&self) -> Vec<SpiffeId> {
        self.seats.iter().filter(|(_, seat)| seat.out.is_some()).map(|(id, _)| id.clone()).collect()
    }

    fn kept(&self, new: u64) -> Vec<u64> {
        let change = self.pending.map(|change| change.version);
        [Some(new), Some(self.settled()), change, Some(self.newest)].into_iter().flatten().collect()
    }

    fn sweep(&mut self, now: Duration) {
        for id in self.present() {
            self.compare(&id);
            self.offer(&id, now);
        }
    }

    /// Holds a node's hash against that of the version that it says it serves.
    fn compare(&mut self, id: &SpiffeId) {
        let Some(seat) = self.seats.get_mut(id) else { return };
        let serving = seat.serving.snapshot_version;
        match self.shelf.get(serving) {
            Some(version) => seat.differs = version.sha256[..] != seat.serving.snapshot_sha256[..],
            None if (1..=self.newest).contains(&serving) && self.missing.len() < MOST_MISSING => {
                self.missing.insert(serving);
            }
            None => {}
        }
    }

    fn acknowledged(&mut self, id: &SpiffeId, ack: &control::Ack) {
        let Some(seat) = self.seats.get_mut(id) else { return };
        let step = match ack.step() {
            Step::Validated => Ack::Validated,
            Step::Persisted => Ack::Persisted,
            Step::Applied => Ack::Applied,
            Step::Unspecified => return,
        };
        match ack.document() {
            Document::Snapshot => {
                self.rollout.ack(id, ack.version, step);
                if step != Ack::Applied {
                    return;
                }
                seat.serving.snapshot_version = ack.version;
                if let Some(version) = self.shelf.get(ack.version) {
                    seat.serving.snapshot_sha256 = version.sha256.to_vec().into();
                }
                // Another one may be on its way behind it.
                seat.offered.take_if(|(offered, _)| *offered <= ack.version);
                seat.differs = false;
                seat.refused.take_if(|(refused, _)| *refused <= ack.version);
                // What it refused of the plan may have been a region that it knows now.
                if seat.refused_plan.take().is_some() {
                    seat.plan_offered = seat.serving.plan_version;
                }
            }
            Document::Plan if step == Ack::Applied => {
                seat.serving.plan_version = ack.version;
                seat.refused_plan = None;
            }
            Document::Plan | Document::Unspecified => {}
        }
    }

    fn refused(&mut self, id: &SpiffeId, nack: &control::Nack) {
        let Some(seat) = self.seats.get_mut(id) else { return };
        if let Some(serving) = &nack.serving {
            seat.serving = serving.clone();
        }
        let why = format!("{}: {}", nack.reason, nack.errors.join("; "));
        if nack.document() == Document::Plan {
            tracing::warn!(node = %id, plan = nack.version, why, "a plan was refused");
            seat.refused_plan = Some((nack.version, clipped(&why)));
            return;
        }
        // What could not even be read has no version: it was what was sent last.
        let version = if nack.version == 0 { seat.offered.map_or(0, |(version, _)| version) } else { nack.version };
        let offered = seat.offered.take_if(|(offered, _)| *offered <= version);
        let of_base = matches!(nack.reason.as_str(), "base" | "checksum");
        if of_base && offered == Some((version, false)) {
            tracing::info!(node = %id, version, why, "a node does not serve what it was thought to; it gets all");
            seat.differs = true;
            return;
        }
        tracing::warn!(node = %id, version, why, "a version was refused");
        seat.refused = Some((version, clipped(&why)));
        let reasons: Vec<String> = std::iter::once(nack.reason.clone()).chain(nack.errors.iter().cloned()).collect();
        self.rollout.nack(id, version, &reasons);
    }

    fn offer_plan(&mut self, id: &SpiffeId, now: Duration) {
        let (Some((version, plan)), Some(seat)) = (&self.plan, self.seats.get_mut(id)) else { return };
        if seat.serving.plan_version.max(seat.plan_offered) < *version {
            seat.plan_offered = *version;
            seat.send(ToNode::Plan(Arc::clone(plan)), now);
        }
    }

    /// Sends a node the version that it should have, if it has another one.
    fn offer(&mut self, id: &SpiffeId, now: Duration) {
        let Some(seat) = self.seats.get_mut(id).filter(|seat| seat.out.is_some()) else { return };
        let serving = seat.serving.snapshot_version;
        let has_refused = seat.refused.as_ref().is_some_and(|(refused, _)| *refused == serving);
        let again = || (seat.differs && !has_refused).then_some(serving);
        let Some(wanted) = self.rollout.wanted(id).or_else(again) else { return };
        if seat.offered.is_some_and(|(offered, _)| offered == wanted) {
            return;
        }
        let Some(target) = self.shelf.get(wanted).cloned() else {
            if self.missing.len() < MOST_MISSING {
                self.missing.insert(wanted);
            }
            return;
        };
        let base = self.shelf.get(serving).filter(|_| !seat.differs && serving != wanted).cloned();
        let delta = self.shelf.delta(self.epoch, base.as_ref(), &target);
        seat.offered = Some((wanted, base.is_none()));
        seat.send(ToNode::Delta(delta), now);
    }
}

impl Seat {
    /// A node that does not read is cut off: it comes again.
    fn send(&mut self, message: ToNode, now: Duration) {
        if self.out.as_ref().is_some_and(|out| out.try_send(message).is_err()) {
            self.leave(now);
        }
    }

    fn leave(&mut self, now: Duration) {
        self.out = None;
        self.offered = None;
        self.left.get_or_insert((now, false));
    }
}

fn sample(traffic: &control::Traffic) -> Sample {
    let control::Traffic { served, errors, p99_us, .. } = *traffic;
    Sample { requests: served, errors, p99: (p99_us > 0).then(|| Duration::from_micros(p99_us)) }
}

fn clipped(text: &str) -> String {
    text.chars().take(512).collect()
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
