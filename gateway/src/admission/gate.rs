//! Whether a request may be served now: shedding for its pool, places and a queue for its model.
//!
//! The rule: every place that is given comes back, whether its holder is served, fails, or goes away while
//! it waits; and who waits is woken, or finds by itself that its time is over. Decisions are core's
//! ([`Bulkhead`], and those of [`super::shed`]); here they are shared by threads and waited for.
//!
//! ```text
//! asks --tenant at its bound, shed-->  refused
//!      --model's place--pool's place-> inside --drop--> gone
//!      --no place--> waits --turn--^
//!                    waits --displaced, too late, dropped--> gone
//! ```
//!
//! Model and pool each shed for themselves: one model that has too much to do costs its pool's others nothing.
//! A model has as many places as its policy says. The pool that serves it has as many as its pods take at a
//! time, for all its models together; who waits for one of those keeps its model's place.
//!
//! Nothing is locked while something else is, and nobody waits under a lock. An idle gate allocates nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::limit::Class;
use spillway_core::resilience::{Answer, Bulkhead, BulkheadSettings, Entry, Latencies, Refusal, Ticket, Turn};
use tokio::sync::oneshot;

use super::metrics::GateMetrics;
use super::shed::Shed;
use crate::clock::Clock;

/// Times of served requests before their median counts as what the model usually takes.
const SAMPLES: u32 = 20;

/// Why a request is not served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is too much of its class, of which nothing is let in.
    Shed,
    /// There is too much of its class, and its tenant asks for more than its share of what is let in.
    Share,
    /// The plan of all regions has no room for it anywhere.
    Planned,
    /// All places to wait for the model are taken.
    Full,
    /// All of its tenant's places are.
    TenantFull,
    /// It waited until there was less time left than the model usually takes.
    TooLate,
    /// It came with less.
    TooShort,
}

impl Why {
    pub const ALL: [Self; 7] =
        [Self::Shed, Self::Share, Self::Planned, Self::Full, Self::TenantFull, Self::TooLate, Self::TooShort];

    /// For a metric's label.
    pub fn word(self) -> &'static str {
        match self {
            Self::Shed | Self::Share => "shed",
            Self::Planned => "planned",
            Self::Full => "queue-full",
            Self::TenantFull => "tenant-full",
            Self::TooLate => "too-late",
            Self::TooShort => "too-short",
        }
    }
}

impl From<Refusal> for Why {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Full => Self::Full,
            Refusal::TenantFull => Self::TenantFull,
            Refusal::TooLate => Self::TooShort,
        }
    }
}

/// The pods of one pool as they are seen here: what goes to all of them.
pub struct PoolGate {
    places: Arc<Gate>,
}

/// The places of one model, or of one pool.
pub struct Gate {
    clock: Clock,
    metrics: Arc<GateMetrics>,
    shed: Shed,
    inside: Mutex<Inside>,
}

struct Inside {
    bulkhead: Bulkhead,
    waiting: HashMap<u64, Waiter>,
    latencies: Option<Box<Latencies>>,
    /// What the model usually takes, and what it seldom takes longer than; zero until they are known.
    expected: Duration,
    seldom: Duration,
}

struct Waiter {
    tenant: u32,
    turn: oneshot::Sender<Verdict>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Enter,
    TooLate,
    Displaced,
}

/// A gate as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct GateState {
    pub in_flight: u32,
    pub waiting: usize,
    pub settings: BulkheadSettings,
    pub expected: Duration,
    /// Classes that are let in to wait, from critical down: 4 are all.
    pub lets_in: f64,
}

/// Who asks.
#[derive(Clone, Debug)]
pub struct Guest {
    pub class: Class,
    /// The tenant's number.
    pub tenant: u32,
    /// Its bound over all models, if it has one.
    pub bound: Option<TenantBound>,
}

impl Guest {
    /// Who asks for the region's own sake: before others, and bound by no tenant's limits.
    pub fn prober() -> Self {
        Self { class: Class::Critical, tenant: 0, bound: None }
    }

    /// Counts as one of its tenant's, where that has a bound, for as long as this is held.
    pub fn present(&self) -> Result<Option<Presence>, Why> {
        let taken = self.bound.as_ref().map(|bound| bound.take().ok_or(Why::TenantFull));
        taken.transpose()
    }
}

/// Requests of a tenant that wait or are served, and how many may.
#[derive(Clone, Debug)]
pub struct TenantBound {
    pub present: Arc<AtomicUsize>,
    pub most: usize,
}

/// One of a tenant's bound, while it is held.
#[derive(Debug)]
pub struct Presence(Arc<AtomicUsize>);

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One place of a gate; it is free again when this is dropped.
struct Slot {
    gate: Arc<Gate>,
    tenant: u32,
    entered: Duration,
    waited: Duration,
    /// It was served, and took so long.
    took: Option<Duration>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.leave(self.tenant, self.gate.clock.now(), self.took);
    }
}

/// A request's places; they are free again when this is dropped.
pub struct Place {
    model: Slot,
    pool: Slot,
    _presence: Option<Presence>,
}

impl Place {
    /// It was answered as it should be: what it took is what the model takes.
    pub fn served(mut self) {
        self.model.took = Some(self.pool.gate.clock.now().saturating_sub(self.pool.entered));
    }
}

impl PoolGate {
    /// With room for all, while nobody has said how many its pods take.
    pub fn new(clock: Clock, metrics: Arc<GateMetrics>) -> Self {
        Self { places: Arc::new(Gate::new(clock, metrics, room_for(u32::MAX))) }
    }

    /// Takes what its pods take at a time.
    pub fn fit(&self, room: u32) {
        self.places.resize(room_for(room));
    }

    pub fn state(&self) -> GateState {
        self.places.state()
    }

    /// Lets in one that takes no place, such as a request of a stream.
    pub fn admit_placeless(&self, guest: &Guest, now: Duration) -> Result<(), Why> {
        self.places.shed.admit(guest, now)?;
        self.places.shed.observe_placeless();
        Ok(())
    }
}

/// Enters a model and its pool, waiting for places until `deadline` on the gate's clock.
pub async fn enter(model: &Arc<Gate>, pool: &PoolGate, guest: &Guest, deadline: Duration) -> Result<Place, Why> {
    let presence = guest.present()?;
    let (pool, now) = (&pool.places, model.clock.now());
    pool.shed.admit(guest, now)?;
    model.shed.admit(guest, now)?;
    let slot = model.enter(guest, deadline, Duration::ZERO).await.inspect_err(|why| {
        let full = if pool.is_waited_for() { pool } else { model };
        if *why == Why::Full {
            full.shed.observe(None);
        }
    })?;
    let (expected, seldom) = model.expected();
    let latest = deadline.saturating_sub(expected);
    let of_pool = pool.enter(guest, latest, seldom.saturating_sub(expected)).await?;
    // Who waits for the pool keeps a place of the model: then the wait for that was for the pool, too.
    let (for_model, for_pool) = match of_pool.waited {
        Duration::ZERO => (slot.waited, Duration::ZERO),
        waited => (Duration::ZERO, slot.waited + waited),
    };
    model.shed.observe(Some(for_model));
    pool.shed.observe(Some(for_pool));
    Ok(Place { model: slot, pool: of_pool, _presence: presence })
}

/// What [`enter`] would come to now: `enter`, `wait`, or the word of a [`Why`]; and the share of such requests that
/// are not shed, 0 to 1. Changes nothing.
pub fn would_enter(model: &Gate, pool: &PoolGate, guest: &Guest, deadline: Duration) -> (&'static str, f64) {
    let now = model.clock.now();
    let let_in = pool.places.shed.lets_in_of(guest, now).min(model.shed.lets_in_of(guest, now));
    if guest.bound.as_ref().is_some_and(TenantBound::is_reached) {
        return (Why::TenantFull.word(), let_in);
    }
    if let_in <= 0.0 {
        return (Why::Shed.word(), let_in);
    }
    let entry = match model.would_enter(guest, deadline) {
        Entry::Entered => pool.places.would_enter(guest, deadline.saturating_sub(model.expected().0)),
        other => other,
    };
    let would = match entry {
        Entry::Entered => "enter",
        Entry::Queued { .. } => "wait",
        Entry::Refused(refusal) => Why::from(refusal).word(),
    };
    (would, let_in)
}

impl Gate {
    pub fn new(clock: Clock, metrics: Arc<GateMetrics>, settings: BulkheadSettings) -> Self {
        let bulkhead = Bulkhead::new(settings);
        let inside = Inside {
            bulkhead,
            waiting: HashMap::new(),
            latencies: None,
            expected: Duration::ZERO,
            seldom: Duration::ZERO,
        };
        Self { clock, metrics, shed: Shed::new(), inside: Mutex::new(inside) }
    }

    /// Takes other bounds.
    pub fn resize(&self, settings: BulkheadSettings) {
        let turns = {
            let inside = &mut *self.inside.lock();
            let turns = inside.bulkhead.resize(settings, self.clock.now());
            inside.take(turns)
        };
        self.wake(turns);
    }

    fn is_waited_for(&self) -> bool {
        self.inside.lock().bulkhead.waiting() > 0
    }

    /// What the model usually takes, and what it seldom takes longer than; zero until they are known.
    fn expected(&self) -> (Duration, Duration) {
        let inside = &mut *self.inside.lock();
        inside.look(self.clock.now());
        (inside.expected, inside.seldom)
    }

    /// Who has to wait leaves as much as the model seldom takes longer than, and `more`, so that what is served is
    /// served in time.
    async fn enter(self: &Arc<Self>, guest: &Guest, deadline: Duration, more: Duration) -> Result<Slot, Why> {
        let asked = self.clock.now();
        let entered = match self.ask(guest, deadline, more, asked)? {
            None => asked,
            Some(wait) => wait.end().await.map(|()| self.clock.now())?,
        };
        let waited = entered.saturating_sub(asked);
        Ok(Slot { gate: self.clone(), tenant: guest.tenant, entered, waited, took: None })
    }

    pub fn state(&self) -> GateState {
        let lets_in = self.shed.lets_in(self.clock.now());
        let Inside { bulkhead, expected, .. } = &*self.inside.lock();
        let (in_flight, waiting, settings) = (bulkhead.in_flight(), bulkhead.waiting(), bulkhead.settings().clone());
        GateState { in_flight, waiting, settings, expected: *expected, lets_in }
    }

    fn would_enter(&self, guest: &Guest, deadline: Duration) -> Entry {
        let ticket = Ticket { tenant: guest.tenant, class: guest.class, deadline, now: self.clock.now() };
        self.inside.lock().bulkhead.clone().try_enter(ticket)
    }

    /// Asks for a place; `None`: it is taken.
    fn ask(
        self: &Arc<Self>,
        guest: &Guest,
        deadline: Duration,
        more: Duration,
        now: Duration,
    ) -> Result<Option<Wait>, Why> {
        let ticket = Ticket { tenant: guest.tenant, class: guest.class, deadline, now };
        let (wait, displaced) = {
            let inside = &mut *self.inside.lock();
            inside.look(now);
            match inside.bulkhead.try_enter(ticket) {
                Entry::Entered => return Ok(None),
                Entry::Queued { id, displaced } => {
                    let (turn, verdict) = oneshot::channel();
                    inside.waiting.insert(id, Waiter { tenant: guest.tenant, turn });
                    let displaced = displaced.and_then(|id| inside.waiting.remove(&id));
                    let until = deadline.saturating_sub(inside.seldom + more);
                    let wait =
                        Wait { gate: self.clone(), id, tenant: guest.tenant, since: now, until, verdict, ended: false };
                    (wait, displaced)
                }
                Entry::Refused(refusal) => return Err(refusal.into()),
            }
        };
        self.metrics.waiting.inc();
        if let Some(displaced) = displaced {
            // Nobody there: its own drop has taken care of it.
            let _ = displaced.turn.send(Verdict::Displaced);
        }
        Ok(Some(wait))
    }

    /// One that had a place is done; it took so long, if it was served.
    fn leave(&self, tenant: u32, now: Duration, took: Option<Duration>) {
        let turns = {
            let inside = &mut *self.inside.lock();
            if let Some(took) = took {
                inside.learn(took, now);
            }
            let turns = inside.bulkhead.leave(tenant, now);
            inside.take(turns)
        };
        self.wake(turns);
    }

    /// Tells those whose wait has ended. A place that is given to one who has gone goes to the next.
    fn wake(&self, mut turns: Vec<(Waiter, Verdict)>) {
        while let Some((Waiter { tenant, turn }, verdict)) = turns.pop() {
            if turn.send(verdict).is_err() && verdict == Verdict::Enter {
                let inside = &mut *self.inside.lock();
                let next = inside.bulkhead.leave(tenant, self.clock.now());
                turns.extend(inside.take(next));
            }
        }
    }
}

/// The bounds of a pool: its room, and whoever has a place of a model may wait.
fn room_for(room: u32) -> BulkheadSettings {
    let room = room.max(1);
    BulkheadSettings { in_flight: room, queue: u32::MAX, tenant_in_flight: room, tenant_queue: u32::MAX }
}

impl Inside {
    /// The waiters of these turns.
    fn take(&mut self, turns: Vec<Turn>) -> Vec<(Waiter, Verdict)> {
        let waiter = |turn: Turn| {
            let verdict = match turn.answer {
                Answer::Enter => Verdict::Enter,
                Answer::TooLate => Verdict::TooLate,
            };
            Some((self.waiting.remove(&turn.id)?, verdict))
        };
        turns.into_iter().filter_map(waiter).collect()
    }

    fn learn(&mut self, took: Duration, now: Duration) {
        let latencies = self.latencies.get_or_insert_with(|| Box::new(Latencies::new(Latencies::DEFAULT_WINDOW)));
        latencies.record(took, now);
        self.look(now);
    }

    /// What was learned is forgotten with time, also where nobody is served.
    fn look(&mut self, now: Duration) {
        let Some(latencies) = &mut self.latencies else { return };
        let recent = latencies.recent(now);
        let known = recent.samples >= SAMPLES;
        (self.expected, self.seldom) = if known { (recent.p50, recent.p95) } else { Default::default() };
        self.bulkhead.set_expected(self.expected);
    }
}

impl TenantBound {
    fn take(&self) -> Option<Presence> {
        let below = |present: usize| (present < self.most).then_some(present + 1);
        self.present.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).ok()?;
        Some(Presence(self.present.clone()))
    }

    fn is_reached(&self) -> bool {
        self.present.load(Ordering::Relaxed) >= self.most
    }
}

/// One that waits; dropped, it leaves the queue.
struct Wait {
    gate: Arc<Gate>,
    id: u64,
    tenant: u32,
    since: Duration,
    /// From then on there is no use in it.
    until: Duration,
    verdict: oneshot::Receiver<Verdict>,
    /// The verdict was received.
    ended: bool,
}

impl Wait {
    async fn end(mut self) -> Result<(), Why> {
        let left = self.until.saturating_sub(self.since);
        let Ok(verdict) = tokio::time::timeout(left, &mut self.verdict).await else { return Err(Why::TooLate) };
        self.ended = true;
        match verdict {
            Ok(Verdict::Enter) => Ok(()),
            Ok(Verdict::Displaced) => Err(Why::Full),
            // A gate drops no waiter without a verdict.
            Ok(Verdict::TooLate) | Err(_) => Err(Why::TooLate),
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let gate = &self.gate;
        let now = gate.clock.now();
        gate.metrics.waited(now.saturating_sub(self.since));
        if self.ended {
            return;
        }
        // From here on nothing can be sent: either the verdict is here, or the sender hears that we are gone.
        self.verdict.close();
        match self.verdict.try_recv() {
            Ok(Verdict::Enter) => gate.leave(self.tenant, now, None),
            Ok(Verdict::TooLate | Verdict::Displaced) => {}
            Err(_) => {
                let mut inside = gate.inside.lock();
                inside.bulkhead.cancel(self.id);
                inside.waiting.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
