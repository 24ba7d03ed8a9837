//! Which pod gets a request of one model, and whether it may be sent once more.
//!
//! The rule: one choice at a time in a pool, which counts before the next is made. Pods are asked in this
//! order, each step only if those before have none that may take the request:
//!
//! ```text
//! Well     healthy, usable or to be probed, its breaker lets calls through
//! Suspect  healthy, but it owes an answer for too long; for a retry also one to be probed
//! Panic    healthy, but ejected or its breaker is open. Where the pool is in panic, this comes first
//! Any      all
//! ```
//!
//! A pod with as many calls as its limit gets none in any of these; where all others of a step are in that
//! state, the request gets one of those rather than a worse pod if it holds a place at the gate, which has as
//! many as the pods' limits were a moment ago; without one it is refused. A retry goes no further than Suspect, unless
//! the pool is in panic: a pod that is known to be bad is not worth the budget.
//!
//! It decides; the call itself is [`super::call`]'s.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use spillway_core::inference::Entities;
use spillway_core::resilience::outlier::{Outliers, PodId, Standing};
use spillway_core::resilience::{Failed, Failure, HedgeSettings, NoHedge, OutlierSettings, Recent};
use spillway_core::resource::Model;
use spillway_core::routing::{Call, Candidate, Choice, Fresh, Policy, Reason, Totals, address_hash, choose, key_hash};
use spillway_core::units::Name;

use crate::errors::Refusal;
use crate::pods::book::{Book, ModelState, Recorder};
use crate::pods::breaker::SharedBreaker;
use crate::pods::fleet::PoolLinks;
use crate::pods::lease::{Lease, Patience};
use crate::pods::metrics::NotAgain;

/// Pods that one request can have been sent to: the first, the most retries, a hedge.
const MOST_TRIED: usize = 5;
/// Good answers of a model from which on it is known what it usually takes, as the outlier detector has it.
const SAMPLES: u32 = 50;
/// A thread that found a usable pod does not look again for so long: the look takes the pool's lock. What happens to the
/// pods meanwhile shows in the calls to them.
const LOOKED: Duration = Duration::from_millis(5);
/// In a pool of more pods, what they carry is not summed up for each call that finds its pod busy: a sum asks every pod,
/// under the pool's lock.
const FEW_PODS: usize = 64;
/// A thread counts on a sum of such a pool for so long, unless it leaves no pod room.
const SUMMED: Duration = Duration::from_millis(5);
/// Below this a pod's share of failures counts as none: it only halves with time, and any rest of it would
/// leave the pod without a call where the others are idle.
const FORGIVEN: f64 = 0.05;

/// One model on its pool, as one thread sees it.
pub struct Lane {
    pub name: Name,
    pub model: Arc<Model>,
    pub pool: Arc<PoolLinks>,
    pub state: Arc<ModelState>,
    /// Of each pod of the pool.
    pub breakers: Vec<Option<Arc<SharedBreaker>>>,
    pub recorder: Arc<Recorder>,
    /// Until when a look's good news counts, in microseconds of the clock.
    usable_until_us: AtomicU64,
    carried: Carried,
}

/// What the pods carried when this thread summed it up last.
#[derive(Default)]
struct Carried {
    /// Until when it counts, in microseconds of the clock.
    until_us: AtomicU64,
    /// Bits of both totals.
    in_flight: AtomicU64,
    weight: AtomicU64,
}

/// A request that looks for a pod.
#[derive(Clone, Debug)]
pub struct Seek {
    call: Call,
    /// What the model's calls took when it came.
    recent: Recent,
    tried: [PodId; MOST_TRIED],
    count: usize,
    /// It holds a place at the gate.
    placed: bool,
}

/// Why there is no pod for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPod {
    /// All that may take it have as many calls as they can.
    Full,
    /// None is left.
    Gone,
}

impl From<NoPod> for Refusal {
    fn from(no_pod: NoPod) -> Self {
        match no_pod {
            NoPod::Full => Self::PodsBusy,
            NoPod::Gone => Self::NoPod,
        }
    }
}

/// Which pods may be taken, from the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Well,
    Suspect,
    Panic,
    Any,
}

/// What a choice is made from.
struct Scene<'a> {
    lane: &'a Lane,
    outliers: &'a Outliers,
    seek: &'a Seek,
    now: Duration,
    /// Pods' limits count.
    limited: bool,
    /// Whether pods are compared by their load alone.
    by_load: bool,
}

impl Lane {
    pub fn new(name: &Name, model: &Arc<Model>, pool: &Arc<PoolLinks>, book: &Book) -> Self {
        Self {
            name: name.clone(),
            model: model.clone(),
            pool: pool.clone(),
            state: book.model(&pool.name, name, model),
            breakers: pool.pods.iter().map(|pod| book.breaker(pod.state.id, name, model)).collect(),
            recorder: book.recorder.clone(),
            usable_until_us: AtomicU64::new(0),
            carried: Carried::default(),
        }
    }

    /// A request comes: it is counted, for the heat of its entity and for the budget.
    pub fn seek(&self, entities: &Entities, client: Option<IpAddr>) -> Seek {
        let (key, now) = (self.key(entities, client), self.recorder.clock.now());
        let mut traffic = self.state.traffic.lock();
        traffic.budget.request();
        let recent = traffic.latencies.recent(now);
        let hot = match key {
            Some(key) if self.spreads() => traffic.hot.observe(key, now),
            _ => false,
        };
        drop(traffic);
        Seek::new(Call { key, hot, panic: false, random: rand::random() }, recent)
    }

    /// Begins a call to the best pod that has not had the request.
    pub fn take(self: &Arc<Self>, seek: &mut Seek, left: Duration) -> Result<Lease, NoPod> {
        let now = self.recorder.clock.now();
        let mut outliers = self.pool.state.outliers.lock();
        let scene = Scene::of(self, &outliers, seek, now);
        let choice = match scene.choose(|| self.state.turn.fetch_add(1, Ordering::Relaxed)) {
            Ok(choice) => choice,
            Err(no_pod) => {
                if no_pod == NoPod::Full {
                    self.recorder.metrics.full();
                }
                return Err(no_pod);
            }
        };
        let id = self.pool.pods[choice.pod].state.id;
        let call = outliers.begin(id, now);
        let patience = Patience { overdue_after: seek.overdue_after(), deadline: now.saturating_add(left) };
        let lease = Lease::begin(self, choice.pod, call, patience, now);
        drop(outliers);
        self.recorder.metrics.chosen(choice.reason);
        seek.try_pod(id);
        Ok(lease)
    }

    /// What [`Self::take`] would choose for such a request now. Changes nothing that a choice depends on for longer than a sum
    /// is remembered.
    pub fn would_choose(&self, entities: &Entities, client: Option<IpAddr>) -> Result<Choice, NoPod> {
        let (key, now) = (self.key(entities, client), self.recorder.clock.now());
        let hot = key.is_some_and(|key| self.spreads() && self.state.traffic.lock().hot.is_hot(key, now));
        let seek = Seek::new(Call { key, hot, panic: false, random: rand::random() }, Recent::default()).with_place();
        let outliers = self.pool.state.outliers.lock();
        let mut turns = self.state.turn.load(Ordering::Relaxed)..;
        Scene::of(self, &outliers, &seek, now).choose(|| turns.next().unwrap_or_default())
    }

    /// Whether some pod may have a request that is not known to be bad: it passes its checks, is not ejected, and its
    /// breaker is not open.
    pub fn is_usable(&self) -> bool {
        let now = self.recorder.clock.now();
        let seek = Seek::new(Call { key: None, hot: false, panic: false, random: 0 }, Recent::default());
        let outliers = self.pool.state.outliers.lock();
        let scene = Scene::of(self, &outliers, &seek, now);
        let steps = self.pool.pods.iter().enumerate().map(|(index, pod)| (index, outliers.may_take(pod.state.id, now)));
        steps.into_iter().any(|(index, standing)| scene.step_of(index, standing) <= Step::Suspect)
    }

    /// The same, as this thread found it lately. Takes no lock while it is so.
    pub fn was_usable(&self) -> bool {
        let now = self.recorder.clock.now();
        if micros(now) < self.usable_until_us.load(Ordering::Relaxed) {
            return true;
        }
        let usable = self.is_usable();
        if usable {
            self.usable_until_us.store(micros(now + LOOKED), Ordering::Relaxed);
        }
        usable
    }

    /// Whether another pod than those that had it could take the request.
    pub fn has_others(&self, seek: &Seek) -> bool {
        self.pool.pods.len() > seek.count && seek.count < MOST_TRIED
    }

    /// Whether a failed request is sent once more, after that wait. `attempts`: sent so far.
    pub fn may_repeat(
        &self,
        seek: &Seek,
        failure: Failure,
        attempts: u32,
        left: Duration,
    ) -> Result<Duration, NotAgain> {
        let (settings, now) = (&self.model.traffic.retries, self.recorder.clock.now());
        if !self.has_others(seek) && matches!(failure, Failure::Unseen | Failure::Died { .. }) {
            return Err(NotAgain::NoOther);
        }
        let mut traffic = self.state.traffic.lock();
        let expected = traffic.latencies.recent(now).p50;
        let failed = Failed { failure, attempt: attempts, left, expected };
        traffic.budget.may_retry(settings, failed, now).map_err(NotAgain::Core)?;
        Ok(settings.backoff(attempts, rand::random()))
    }

    /// How long the first attempt is waited for before a second is sent beside it; none: this model, or this
    /// request, is not hedged.
    pub fn hedge_delay(&self, seek: &Seek, left: Duration) -> Option<Duration> {
        let delay = self.model.traffic.hedge.then(|| HedgeSettings::default().delay(&seek.recent, left))?;
        delay.map_err(|why| self.recorder.metrics.not_hedged(why)).ok()
    }

    pub fn may_hedge(&self, left: Duration) -> Result<(), NoHedge> {
        let now = self.recorder.clock.now();
        let traffic = &mut *self.state.traffic.lock();
        let recent = traffic.latencies.recent(now);
        HedgeSettings::default().may_send(&recent, left, &mut traffic.budget, now)
    }

    /// A request was answered by a call that took so long.
    pub fn answered(&self, took: Duration) {
        let (traffic, now) = (&mut *self.state.traffic.lock(), self.recorder.clock.now());
        traffic.latencies.record(took, now);
        traffic.budget.answered();
    }

    /// What its answers took lately.
    pub fn recent(&self) -> Recent {
        self.state.traffic.lock().latencies.recent(self.recorder.clock.now())
    }

    fn spreads(&self) -> bool {
        let routing = &self.model.traffic.routing;
        routing.policy == Policy::Ring && routing.spread > 1
    }

    /// The place of such a request on the ring, where its policy gives it one.
    pub fn key(&self, entities: &Entities, client: Option<IpAddr>) -> Option<u64> {
        match (self.model.traffic.routing.policy, entities.ids()) {
            // However it is named: by the parameter, or by an entity input of one row.
            (Policy::Ring, [entity]) => Some(key_hash(entity)),
            (Policy::SourceAddress, _) => client.map(address_hash),
            _ => None,
        }
    }
}

impl Carried {
    fn totals(&self, fresh: Fresh, now: Duration, sum: &dyn Fn() -> Totals) -> Totals {
        if fresh == Fresh::Lately && micros(now) < self.until_us.load(Ordering::Relaxed) {
            let [in_flight, weight] =
                [&self.in_flight, &self.weight].map(|bits| f64::from_bits(bits.load(Ordering::Relaxed)));
            return Totals { in_flight, weight };
        }
        let totals = sum();
        self.in_flight.store(totals.in_flight.to_bits(), Ordering::Relaxed);
        self.weight.store(totals.weight.to_bits(), Ordering::Relaxed);
        self.until_us.store(micros(now + SUMMED), Ordering::Relaxed);
        totals
    }
}

impl Seek {
    fn new(call: Call, recent: Recent) -> Self {
        Self { call, recent, tried: [0; MOST_TRIED], count: 0, placed: false }
    }

    /// It holds a place at the gate.
    pub fn with_place(self) -> Self {
        Self { placed: true, ..self }
    }

    /// When an attempt is unusually late: max(3 x p99, 50 ms) of the model, as the outlier detector has it for
    /// the pool. None until enough answers came.
    pub fn overdue_after(&self) -> Option<Duration> {
        let OutlierSettings { suspect_factor, suspect_min, .. } = OutlierSettings::default();
        (self.recent.samples >= SAMPLES).then(|| self.recent.p99.mul_f64(suspect_factor).max(suspect_min))
    }

    fn tried(&self) -> &[PodId] {
        &self.tried[..self.count]
    }

    fn try_pod(&mut self, pod: PodId) {
        if let Some(place) = self.tried.get_mut(self.count) {
            *place = pod;
            self.count += 1;
        }
    }
}

impl<'a> Scene<'a> {
    fn of(lane: &'a Lane, outliers: &'a Outliers, seek: &'a Seek, now: Duration) -> Self {
        let by_load = match lane.model.traffic.routing.policy {
            Policy::LeastRequest => true,
            Policy::Ring => seek.call.key.is_none() || seek.call.hot,
            Policy::SourceAddress => seek.call.key.is_none(),
            Policy::WeightedRoundRobin => false,
        };
        Self { lane, outliers, seek, now, limited: true, by_load }
    }

    fn choose(mut self, mut next_turn: impl FnMut() -> u64) -> Result<Choice, NoPod> {
        let (panic, again) = (self.outliers.panic(), self.seek.count > 0);
        let steps = match (panic, again) {
            (true, _) => &[Step::Panic, Step::Any][..],
            (false, true) => &[Step::Well, Step::Suspect],
            (false, false) => &[Step::Well, Step::Suspect, Step::Panic, Step::Any],
        };
        for &step in steps {
            self.limited = true;
            let mut chosen = self.choose_within(step, &mut next_turn);
            if chosen.is_none() && self.is_full(step) {
                if !self.seek.placed {
                    return Err(NoPod::Full);
                }
                self.limited = false;
                chosen = self.choose_within(step, &mut next_turn);
            }
            if let Some(choice) = chosen {
                let reason = if step >= Step::Panic { Reason::Panic } else { choice.reason };
                return Ok(Choice { reason, ..choice });
            }
        }
        Err(NoPod::Gone)
    }

    fn choose_within(&self, step: Step, next_turn: &mut impl FnMut() -> u64) -> Option<Choice> {
        let routing = &self.lane.model.traffic.routing;
        let pod = |index| self.candidate(index, step);
        // Who is counted differs from step to step; nearly all calls are placed at the first.
        let remembers = step == Step::Well && self.limited && self.lane.pool.pods.len() > FEW_PODS;
        let totals = |fresh, sum: &dyn Fn() -> Totals| match remembers {
            true => self.lane.carried.totals(fresh, self.now, sum),
            false => sum(),
        };
        let chosen = choose(routing, &self.seek.call, &self.lane.pool.ring, pod, next_turn, totals);
        // Core's own panic knows no steps.
        chosen.filter(|choice| choice.reason != Reason::Panic)
    }

    fn candidate(&self, index: usize, step: Step) -> Candidate {
        let pod = &self.lane.pool.pods[index].state;
        let standing = self.outliers.may_take(pod.id, self.now);
        let mut candidate = Candidate {
            usable: self.step_of(index, standing) <= step && (pod.has_room() || !self.limited),
            tried: self.seek.tried().contains(&pod.id),
            in_flight: pod.in_flight(),
            report: None,
            weight: self.weight(index),
            failing: 0.0,
        };
        if standing == Standing::Probe {
            // It needs calls to come back, and gets one at a time.
            candidate.in_flight = 0;
        } else if self.by_load {
            candidate.report = pod.reported(self.now);
            candidate.failing = Some(self.outliers.penalty(pod.id, self.now)).filter(|f| *f >= FORGIVEN).unwrap_or(0.0);
        }
        candidate
    }

    /// The first step that includes a pod.
    fn step_of(&self, index: usize, standing: Standing) -> Step {
        let breaker = &self.lane.breakers[index];
        if !self.lane.pool.pods[index].state.health.may_serve() {
            return Step::Any;
        }
        match standing {
            Standing::Ejected => Step::Panic,
            _ if breaker.as_ref().is_some_and(|breaker| !breaker.allows(self.now)) => Step::Panic,
            Standing::Suspect => Step::Suspect,
            // Who retries has met one bad pod already.
            Standing::Probe if self.seek.count > 0 => Step::Suspect,
            Standing::Probe | Standing::Usable => Step::Well,
        }
    }

    /// The pod's weight with its slow start. By load alone a pod of little weight gets nothing while the others
    /// are idle, and meets its whole share at once when its time is over; so there it has its whole weight
    /// for that share of the calls.
    fn weight(&self, index: usize) -> f64 {
        let link = &self.lane.pool.pods[index];
        let share = link.state.share(self.lane.model.traffic.routing.slow_start, self.now);
        let whole = self.by_load && draw(self.seek.call.random, link.state.id) < share;
        if whole { link.weight } else { link.weight * share }
    }

    /// Whether some pods would do at this step, and lack nothing but room.
    fn is_full(&self, step: Step) -> bool {
        (0..self.lane.pool.pods.len()).any(|index| {
            let pod = &self.lane.pool.pods[index].state;
            let standing = self.outliers.may_take(pod.id, self.now);
            !pod.has_room() && !self.seek.tried().contains(&pod.id) && self.step_of(index, standing) <= step
        })
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A number in 0..1 for a pod out of the call's own random one (Knuth's multiplicative hash).
fn draw(random: u64, pod: PodId) -> f64 {
    let mixed = (random ^ u64::from(pod)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
