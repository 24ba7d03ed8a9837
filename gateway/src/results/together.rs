//! A request that found nothing fresh: it waits for a call under way, or leads one, by way of the region's
//! Redis.
//!
//! The rule: what a result must know to be given to a request is taken down when the request comes; no
//! answer that knows less reaches it, whoever made it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_core::cache::freshness::{Times, Verdict};
use spillway_core::cache::guard::Observation;
use spillway_core::cache::status::{Status, Tier};
use spillway_core::limit::Class;
use spillway_runtime::oip;
use tokio::time::timeout_at;

use super::Results;
use super::changes::{LONGEST_UNHEARD, Truth};
use super::entry::{About, Entry, Kept};
use super::flight::{Began, Maker, Needed, Turn};
use super::look::{Look, Said, Worth};
use super::memory::{Entered, Entering};
use super::permit::{Pending, Permit};
use super::region::{LONGEST_LEASE, Least, Looked};
use crate::errors::Refusal;

/// Another gateway's call is waited for as long as so many mean calls, and at least for so long; but for no
/// more than half of what a request has left.
const PATIENCE_CALLS: u32 = 8;
const PATIENCE: Duration = Duration::from_millis(500);
/// A lease outlives the patience of those who wait for it; a call that fails gives it back.
const LEASE: (Duration, Duration) = (Duration::from_secs(1), LONGEST_LEASE);
/// Calls that a request waits for whose answers turn out to be too old for it; then it makes its own.
const MOST_ROUNDS: u32 = 2;
/// CPU of one round to Redis, about; the guard counts it as a cost.
const ROUND_COST: Duration = Duration::from_micros(30);

impl Results {
    /// Waits for the call of another request, or makes it.
    pub(super) async fn together(
        self: &Arc<Self>,
        mut pending: Pending,
        until: Instant,
        said: &mut Said,
    ) -> Result<Look, Refusal> {
        let mut again = 0;
        while again < MOST_ROUNDS {
            let turn = match self.enter(&pending, true) {
                None | Some(Entered::Crowded) => {
                    self.metrics.bypassed("crowded");
                    return Ok(self.ask(pending));
                }
                Some(Entered::Found(entry)) => {
                    let now = self.now();
                    return Ok(Look::Kept(self.hit(entry, Tier::L1, now, pending.spent, &pending.judged, said), None));
                }
                Some(Entered::Leads(lead)) => {
                    pending.lead = Some(lead);
                    return Ok(self.ask_region(pending, until, said).await);
                }
                Some(Entered::Waits(turn)) => turn,
            };
            match timeout_at(until.into(), turn).await {
                Err(_) => return self.instead(&pending, Refusal::Deadline, said),
                Ok(Ok(Turn::Again { alone: true })) => break,
                Ok(Err(_) | Ok(Turn::Again { alone: false })) => again += 1,
                Ok(Ok(Turn::Answer { entry, maker: Maker::Region })) => {
                    let now = self.now();
                    if self.is_fresh(&entry, now, &pending) {
                        let kept = self.hit(entry, Tier::L2, now, pending.spent, &pending.judged, said);
                        return Ok(Look::Kept(kept, None));
                    }
                    again += 1;
                }
                Ok(Ok(Turn::Answer { entry, maker: Maker::Call { stored } })) => {
                    self.metrics.coalesced.inc();
                    pending.judged.observe(self.now(), Observation::Hit { cost: pending.spent });
                    said.status = Some(Status::Forwarded { why: pending.why, collapsed: true, stored });
                    return Ok(Look::Kept(Kept { entry, age: Duration::ZERO }, None));
                }
                Ok(Ok(Turn::Failed(refusal))) => return self.instead(&pending, refusal, said),
                Ok(Ok(Turn::Lead(lead))) => {
                    pending.lead = Some(lead);
                    return Ok(self.ask_region(pending, until, said).await);
                }
            }
        }
        Ok(self.ask(pending))
    }

    /// A refresh looks into Redis before it asks the model: another gateway may have been first.
    pub async fn look_again(self: &Arc<Self>, permit: Permit, until: Instant, said: &mut Said) -> Look {
        match permit.into_pending() {
            Some(pending) => self.ask_region(pending, until, said).await,
            None => Look::Ask(Permit::none()),
        }
    }

    /// A leader looks into Redis before it asks the model.
    async fn ask_region(self: &Arc<Self>, mut pending: Pending, until: Instant, said: &mut Said) -> Look {
        let (Some(region), Some(lead)) = (&self.region, &pending.lead) else { return self.ask(pending) };
        if pending.truth == Truth::Unheard || !self.purges_are_known() || !lead.asks_region() {
            return self.ask(pending);
        }
        let sequence = match pending.truth {
            Truth::Numbered => {
                let coherence = self.changes.coherence.lock();
                coherence.number_of(coherence.needed(&pending.dependencies.rows))
            }
            Truth::Timeless | Truth::Unheard => Some(0),
        };
        let Some(sequence) = sequence else { return self.ask(pending) };
        let least = Least { sequence, mark: self.purges.least(&pending.about) };
        let calls = pending.judged.call().saturating_mul(PATIENCE_CALLS);
        let lease = calls.clamp(LEASE.0, LEASE.1);
        let patience = calls.max(PATIENCE).min(until.saturating_duration_since(Instant::now()) / 2);
        pending.spent += ROUND_COST;
        match region.look(&pending.key, pending.class, least, lease, patience).await {
            Looked::Nothing => {}
            Looked::Slot(slot) => lead.hold(slot),
            Looked::Found { stored, left, asked } => {
                let asked = asked.saturating_duration_since(self.origin);
                let age = stored.whole.saturating_sub(left);
                let times = Times { stored: asked.saturating_sub(age), fresh_until: asked.saturating_add(left) };
                let entry = Entry {
                    key: pending.key.clone(),
                    about: pending.about.clone(),
                    message: stored.message,
                    made: stored.made,
                    times,
                    mark: stored.mark,
                    generation: None,
                };
                if let Some(entry) = self.land_from_region(&mut pending, entry, stored.sequence) {
                    return Look::Kept(
                        self.hit(entry, Tier::L2, self.now(), pending.spent, &pending.judged, said),
                        None,
                    );
                }
            }
        }
        self.ask(pending)
    }

    /// Takes a result of another gateway for all who wait, if it is one to this gateway too.
    fn land_from_region(&self, pending: &mut Pending, mut entry: Entry, sequence: u64) -> Option<Arc<Entry>> {
        let now = self.now();
        if oip::decode_response_message(entry.message.clone(), &self.answers).is_err() {
            self.metrics.region_failed("garbage");
            return None;
        }
        let rows = &pending.dependencies.rows;
        let (entry, crowd, tick) = {
            let coherence = (pending.truth == Truth::Numbered).then(|| self.changes.coherence.lock());
            let mut tick = None;
            if let Some(coherence) = &coherence {
                tick = Some(coherence.tick_of(sequence).filter(|tick| *tick >= coherence.needed(rows))?);
                entry.generation = Some(self.changes.generation());
            }
            let fresh = self.is_fresh(&entry, now, pending);
            let lead = pending.lead.take_if(|_| fresh)?;
            let entry = Arc::new(entry);
            let (_, crowd) = self.memory.land(lead.flight(), &entry, Some(rows));
            lead.landed();
            (entry, crowd, tick)
        };
        crowd.give(&entry, Maker::Region, tick, now);
        Some(entry)
    }

    /// The model is asked, from this moment on.
    pub(super) fn ask(&self, mut pending: Pending) -> Look {
        pending.began = self.begin(pending.truth, pending.class);
        if let Some(lead) = &pending.lead {
            lead.begin(pending.began);
        }
        Look::Ask(Permit::of(pending))
    }

    /// The stale answer that the model's failure is replaced by, or the failure.
    fn instead(&self, pending: &Pending, refusal: Refusal, said: &mut Said) -> Result<Look, Refusal> {
        let why = pending.why;
        said.status = Some(Status::Forwarded { why, collapsed: true, stored: false });
        let kept = self.if_error(pending.stale.as_ref(), pending, &refusal, said);
        kept.map(|kept| Look::Kept(kept, None)).ok_or(refusal)
    }

    fn is_fresh(&self, entry: &Entry, now: Duration, pending: &Pending) -> bool {
        matches!(self.worth(entry, now, &pending.lifetimes, &pending.wish), Worth::Times(Verdict::Fresh))
    }

    pub(super) fn begin(&self, truth: Truth, class: Class) -> Began {
        let (at, mark) = (self.now(), self.purges.mark());
        let coherence = (truth == Truth::Numbered).then(|| self.changes.coherence.lock());
        let (tick, number) = coherence.map_or((None, None), |coherence| (Some(coherence.began()), coherence.number()));
        Began { at, tick, number, mark, class }
    }

    pub(super) fn enter(&self, pending: &Pending, waits: bool) -> Option<Entered> {
        let now = self.now();
        let mark = self.purges.mark();
        let coherence = (pending.truth == Truth::Numbered).then(|| self.changes.coherence.lock());
        let mut began = Began { at: now, tick: None, number: None, mark, class: pending.class };
        let mut needed = Needed { class: pending.class, ..Needed::default() };
        if let Some(coherence) = &coherence {
            (began.tick, began.number) = (Some(coherence.began()), coherence.number());
            needed.tick = Some(coherence.needed(&pending.dependencies.rows));
        }
        if pending.truth == Truth::Unheard {
            needed.since = now.saturating_sub(LONGEST_UNHEARD);
        }
        let is_fresh = |entry: &Entry| self.is_fresh(entry, now, pending);
        let is_purged = |about: &About, mark: u64| self.purges.cover(about, mark);
        self.memory.enter(Entering {
            key: &pending.key,
            about: &pending.about,
            began,
            needed,
            waits,
            is_fresh: &is_fresh,
            is_purged: &is_purged,
        })
    }
}
