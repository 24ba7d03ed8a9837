//! Who gets which version now.
//!
//! The rule: a change is tried on one gateway, then on its region, then given to all; never in two stages at once,
//! and no further once it was stopped. Each stage ends by what nodes say, or else by time: so every change ends.
//!
//! ```text
//! ordinary,   Canary --applied, and well for its dwell--> Region --applied, and well for its dwell--> All --> done
//! rollback       |  ^                                       |                                          |
//!                |  +--lost: another canary                 |                                          |
//!                +--no canary left, or none there           +--by half or fewer                        |
//!                +--worse than its peers                    +--worse than its peers                    |
//!                +--refused (NACK)                          +--refused                                 +--refused
//!                v                                          v                                          v
//!                stopped: nobody else gets it. Who has it keeps it until a rollback, which is a newer version.
//! ```
//!
//! A rollback takes the stages quickly: [`RolloutSettings::longest`] is 9 s for it by default. Plans of
//! [`crate::failover`] are no versions of this kind, and wait for nothing here.
//!
//! Nodes that are away are not waited for: they get what is due when they come. Nodes that are there and silent are
//! waited for as long as [`Pace::patience`]. Then more than half of those that a region's stage was given to must
//! serve the new version and still be there; for all, what is left is said to be behind. Where no gateway was ever
//! seen, there is nothing to try it on, and after `patience` it goes to all: so begin nothing before nodes had the
//! time to connect.
//!
//! A change that was stopped stays so: whoever leads next begins with [`Rollout::stopped`].
//!
//! A newer change takes the place of one under way, whatever the kinds. What was in its last stage then counts as
//! settled, since all were given it; what was in an earlier one does not.
//!
//! [`Rollout::tick`] is O(nodes), all else O(log nodes).

use std::collections::BTreeSet;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::change::{Change, NotNewer, Pace, Progress, RolloutSettings, Stage, Stop};
use super::comparison::{Sample, Tally, Worse};
use super::fleet::{Ack, Fleet, Node, is_gateway, region_of};
use crate::identity::SpiffeId;

/// The versions of a fleet.
#[derive(Clone, Debug)]
pub struct Rollout {
    settings: RolloutSettings,
    /// What everyone may have.
    pub(super) settled: u64,
    pub(super) change: Option<Change>,
    pub(super) state: State,
    pub(super) fleet: Fleet,
}

#[derive(Clone, Debug)]
pub(super) enum State {
    Idle,
    Running(Running),
    Done,
    Stopped(Stop),
}

/// A change under way.
#[derive(Clone, Debug)]
pub(super) struct Running {
    change: Change,
    pace: Pace,
    pub stage: Stage,
    began: Duration,
    pub entered: Duration,
    /// Since when those that were waited for are watched.
    pub watched: Option<Duration>,
    pub canary: Option<SpiffeId>,
    lost: BTreeSet<SpiffeId>,
}

/// What comes of a look at a change.
enum Step {
    Wait,
    Try(SpiffeId),
    LoseCanary,
    Watch,
    Enter(Stage),
    Finish,
    Stop(Stop),
}

impl Rollout {
    /// Everyone may have the version `settled`; of the nodes, nothing is known.
    pub fn new(settings: RolloutSettings, settled: u64) -> Self {
        Self { settings, settled, change: None, state: State::Idle, fleet: Fleet::default() }
    }

    /// The same, and what a leader before stopped.
    pub fn stopped(settings: RolloutSettings, settled: u64, change: Change, why: String) -> Self {
        let state = State::Stopped(Stop::Before { why });
        Self { change: Some(change), state, ..Self::new(settings, settled) }
    }

    /// A node's stream began, and it serves this version. False if it is not let in: it is no node, or one too many.
    pub fn join(&mut self, id: &SpiffeId, serving: u64) -> bool {
        // Who comes while others are watched already is not counted among those that had the time.
        let reached = self.running().is_some_and(|running| running.watched.is_none() && running.reaches(id));
        let joined = self.fleet.join(id, serving);
        if let Some(node) = self.fleet.get_mut(id).filter(|_| joined) {
            node.reached |= reached;
        }
        joined
    }

    /// A node's stream ended.
    pub fn leave(&mut self, id: &SpiffeId, now: Duration) {
        self.fleet.leave(id, now);
        let in_trial = |running: &Running| running.stage == Stage::Canary && running.canary.as_ref() == Some(id);
        if self.running().is_some_and(in_trial) {
            self.take(Step::LoseCanary, now);
        }
    }

    /// What a node says from time to time: the version it serves, and what it measured with it since the last time.
    pub fn heartbeat(&mut self, id: &SpiffeId, serving: u64, sample: &Sample) {
        if let Some(node) = self.fleet.get_mut(id) {
            node.serves(serving);
            node.tally.add_sample(sample);
        }
    }

    /// A node came so far with a version.
    pub fn ack(&mut self, id: &SpiffeId, version: u64, ack: Ack) {
        if let Some(node) = self.fleet.get_mut(id) {
            node.acknowledges(version, ack);
        }
    }

    /// A node refused a version and serves what it served before.
    pub fn nack(&mut self, id: &SpiffeId, version: u64, reasons: &[String]) {
        let Some(node) = self.fleet.get_mut(id) else { return };
        node.refuses(version, reasons);
        let reasons = node.refused.first().map(|(_, reasons)| reasons.clone()).unwrap_or_default();
        if self.running().is_some_and(|running| running.change.version == version) {
            self.state = State::Stopped(Stop::Refused { node: id.clone(), reasons });
        }
    }

    /// Begins a change, and says which one it overtook before that had passed its stages.
    pub fn begin(&mut self, change: Change, now: Duration) -> Result<Option<Change>, NotNewer> {
        let newest = self.change.map_or(0, |change| change.version).max(self.settled);
        if change.version <= newest {
            return Err(NotNewer { offered: change.version, newest });
        }
        let mut overtaken = None;
        if let Some(running) = self.running() {
            let (before, given_to_all) = (running.change, running.stage == Stage::All);
            if given_to_all {
                self.settled = before.version;
            } else {
                overtaken = Some(before);
            }
        }
        self.change = Some(change);
        self.state = State::Running(Running {
            change,
            pace: self.settings.pace(change.kind).clone(),
            stage: Stage::Canary,
            began: now,
            entered: now,
            watched: None,
            canary: None,
            lost: BTreeSet::new(),
        });
        self.enter(Stage::Canary, now);
        self.tick(now);
        Ok(overtaken)
    }

    /// Goes on as far as what is known allows. To be called several times a second while a change is under way.
    pub fn tick(&mut self, now: Duration) {
        self.fleet.forget(now);
        while let Some(running) = self.running() {
            match self.look(running, now) {
                Step::Wait => return,
                step => self.take(step, now),
            }
        }
    }

    /// The version that a node is to be given now, if it should have another one than it serves.
    pub fn wanted(&self, id: &SpiffeId) -> Option<u64> {
        let node = self.fleet.get(id).filter(|node| node.is_present())?;
        let given = self.running().filter(|running| running.reaches(id)).map(|running| running.change.version);
        let fit = |version: &u64| *version > node.serving && !node.has_refused(*version);
        given.filter(fit).or(Some(self.settled).filter(fit))
    }

    /// What everyone may have.
    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// The last change, if it was stopped, and why.
    pub fn stop(&self) -> Option<(Change, &Stop)> {
        match &self.state {
            State::Stopped(stop) => self.change.map(|change| (change, stop)),
            State::Idle | State::Running(_) | State::Done => None,
        }
    }

    pub fn progress(&self) -> Progress {
        match &self.state {
            State::Idle => Progress::Idle,
            State::Running(running) => Progress::Running { stage: running.stage, watching: running.watched.is_some() },
            State::Done => Progress::Done { behind: self.behind() },
            State::Stopped(stop) => Progress::Stopped(stop.clone()),
        }
    }

    /// A change was stopped, and some nodes serve it: only a rollback takes it from them.
    pub fn needs_rollback(&self) -> bool {
        matches!(self.state, State::Stopped(_)) && self.strays().next().is_some()
    }

    /// Nodes that serve what has not settled.
    pub(super) fn strays(&self) -> impl Iterator<Item = (&SpiffeId, u64)> {
        self.fleet.iter().filter(|(_, node)| node.serving > self.settled).map(|(id, node)| (id, node.serving))
    }

    fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            State::Idle | State::Done | State::Stopped(_) => None,
        }
    }

    /// Nodes that are there and serve less than what has settled.
    fn behind(&self) -> usize {
        self.fleet.iter().filter(|(_, node)| node.is_present() && node.serving < self.settled).count()
    }

    fn look(&self, running: &Running, now: Duration) -> Step {
        match running.stage {
            Stage::Canary => self.look_at_canary(running, now),
            Stage::Region => self.look_at_region(running, now),
            Stage::All => self.wait_for_nodes(running, now, Step::Finish),
        }
    }

    fn look_at_canary(&self, running: &Running, now: Duration) -> Step {
        let out_of_time = now.saturating_sub(running.began) >= running.pace.trial();
        let out_of_patience = now.saturating_sub(running.entered) >= running.pace.patience;
        let Some(canary) = &running.canary else {
            let unseen = || running.lost.is_empty() && !self.fleet.iter().any(|(id, _)| is_gateway(id));
            return match self.candidate(running) {
                _ if out_of_time => Step::Stop(Stop::NoCanary),
                Some(candidate) => Step::Try(candidate.clone()),
                None if out_of_patience && unseen() => Step::Enter(Stage::All),
                None => Step::Wait,
            };
        };
        let applied = self.fleet.get(canary).is_some_and(|node| node.is_present() && running.is_served_by(node));
        match running.watched {
            Some(since) if applied => {
                match self.dwell(running, since, running.pace.canary_dwell, now, || Step::Enter(Stage::Region)) {
                    Step::Wait if out_of_time => Step::Stop(Stop::NoCanary),
                    step => step,
                }
            }
            Some(_) => Step::LoseCanary,
            None if applied => Step::Watch,
            None if out_of_patience => Step::LoseCanary,
            None if out_of_time => Step::Stop(Stop::NoCanary),
            None => Step::Wait,
        }
    }

    fn look_at_region(&self, running: &Running, now: Duration) -> Step {
        let Some(since) = running.watched else { return self.wait_for_nodes(running, now, Step::Watch) };
        self.dwell(running, since, running.pace.region_dwell, now, || {
            let given = self.fleet.iter().filter(|(_, node)| node.reached).count();
            let served = |node: &Node| node.reached && node.is_present() && running.is_served_by(node);
            let applied = self.fleet.iter().filter(|(_, node)| served(node)).count();
            if applied * 2 > given { Step::Enter(Stage::All) } else { Step::Stop(Stop::TooFew { applied, given }) }
        })
    }

    /// The step, once no node that could still answer is waited for.
    fn wait_for_nodes(&self, running: &Running, now: Duration, step: Step) -> Step {
        let due =
            |(id, node): (&SpiffeId, &Node)| running.reaches(id) && node.is_present() && !running.is_served_by(node);
        let patient = now.saturating_sub(running.entered) < running.pace.patience;
        if patient && self.fleet.iter().any(due) { Step::Wait } else { step }
    }

    /// What comes after those with the version were watched for long enough, and did no worse than others.
    fn dwell(
        &self,
        running: &Running,
        since: Duration,
        dwell: Duration,
        now: Duration,
        after: impl FnOnce() -> Step,
    ) -> Step {
        match self.worse(running) {
            Some(worse) => Step::Stop(Stop::Worse(worse)),
            None if now.saturating_sub(since) >= dwell => after(),
            None => Step::Wait,
        }
    }

    /// Compares gateways with the version to those without: of the same region where these have measured enough, or
    /// else of all.
    fn worse(&self, running: &Running) -> Option<Worse> {
        let (mut changed, mut near, mut all) = (Tally::default(), Tally::default(), Tally::default());
        let region = running.canary.as_ref().and_then(region_of);
        for (id, node) in self.fleet.iter().filter(|(id, _)| is_gateway(id)) {
            if running.is_served_by(node) {
                changed.add(&node.tally);
            } else {
                all.add(&node.tally);
                if region_of(id) == region {
                    near.add(&node.tally);
                }
            }
        }
        let comparison = &self.settings.comparison;
        changed.worse_than(if near.is_enough(comparison) { &near } else { &all }, comparison)
    }

    /// The gateway to try the change on: one that serves what has not settled if there is one, so that no more of
    /// them do; otherwise any, another one for each version.
    fn candidate(&self, running: &Running) -> Option<&SpiffeId> {
        let version = running.change.version;
        let fit = |(id, node): &(&SpiffeId, &Node)| {
            is_gateway(id) && node.is_present() && node.serving <= version && !running.lost.contains(*id)
        };
        let order = |(id, node): &(&SpiffeId, &Node)| {
            (node.serving <= self.settled, xxh3_64_with_seed(id.to_string().as_bytes(), version))
        };
        self.fleet.iter().filter(fit).min_by_key(order).map(|(id, _)| id)
    }

    fn take(&mut self, step: Step, now: Duration) {
        let State::Running(running) = &mut self.state else { return };
        match step {
            Step::Wait => {}
            Step::Try(canary) => {
                running.canary = Some(canary);
                self.enter(Stage::Canary, now);
            }
            Step::LoseCanary => {
                running.lost.extend(running.canary.take());
                running.watched = None;
                let lost = running.lost.len();
                if lost >= usize::try_from(running.pace.canaries.max(1)).unwrap_or(usize::MAX) {
                    self.state = State::Stopped(Stop::CanariesLost { lost });
                }
            }
            Step::Watch => running.watched = Some(now),
            Step::Enter(stage) => self.enter(stage, now),
            Step::Finish => {
                self.settled = running.change.version;
                self.state = State::Done;
            }
            Step::Stop(stop) => self.state = State::Stopped(stop),
        }
    }

    /// Opens a stage: what is measured and who is reached counts from here.
    fn enter(&mut self, stage: Stage, now: Duration) {
        let State::Running(running) = &mut self.state else { return };
        (running.stage, running.entered, running.watched) = (stage, now, None);
        for (id, node) in self.fleet.iter_mut() {
            node.tally = Tally::default();
            node.reached = node.is_present() && running.reaches(id);
        }
    }
}

impl Running {
    /// Whether the stage is open to a node.
    fn reaches(&self, id: &SpiffeId) -> bool {
        match (self.stage, &self.canary) {
            (Stage::All, _) => true,
            (Stage::Canary, Some(canary)) => canary == id,
            (Stage::Region, Some(canary)) => region_of(canary) == region_of(id),
            (Stage::Canary | Stage::Region, None) => false,
        }
    }

    fn is_served_by(&self, node: &Node) -> bool {
        node.serving == self.change.version
    }
}

#[cfg(test)]
#[path = "stages_tests.rs"]
mod tests;
