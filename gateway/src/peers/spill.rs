//! A stranded request's way to another region.
//!
//! The rule: once for each request, and within what is left of its deadline. Where it cannot go, or does not get an
//! answer there, it is as if nobody had been asked.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::failover::{MayLeave, NoPeer, Stranded, peers_for};
use spillway_core::resilience::Step;
use spillway_core::routing::key_hash;

use crate::degrade::said_step;
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::peers::attempt::{Came, Outgoing, attempt};
use crate::peers::cause::Cause;
use crate::peers::links::{Peers, Sight};
use crate::peers::visit::Visit;
use crate::pods::attempt::PodAnswer;
use crate::pods::lane::Lane;
use crate::results::Asked;
use crate::shared::Shared;

/// Gateways that are called for one request.
const MOST_CALLS: usize = 4;
/// Requests of one gateway that are with other regions at a time; beyond it they stay.
pub const MOST_SPILLING: usize = 1_024;

/// The way out of the region, for one request.
pub struct Way<'a> {
    shared: &'a Shared,
    asking: &'a Asking,
    asked: &'a Asked<'a>,
    /// None: no pool of this region serves the model.
    lane: Option<&'a Arc<Lane>>,
    may_leave: &'a MayLeave,
    /// Empty where it goes nowhere anyway.
    frame: Vec<Bytes>,
    forwarded: bool,
    taken: bool,
}

impl<'a> Way<'a> {
    pub fn of(
        shared: &'a Shared,
        exchange: &Exchange,
        asking: &'a Asking,
        asked: &'a Asked<'a>,
        lane: Option<&'a Arc<Lane>>,
        frame: &[Bytes],
    ) -> Self {
        const STAYS: &MayLeave = &MayLeave::No;
        let may_leave = asked.snapshot.tenants.get(asked.tenant).map_or(STAYS, |tenant| &tenant.may_leave_region);
        let forwarded = !matches!(exchange.visit, Visit::Client);
        let mut way = Self { shared, asking, asked, lane, may_leave, frame: Vec::new(), forwarded, taken: false };
        if way.leads_somewhere() {
            way.frame = frame.to_vec();
        }
        way
    }

    /// Whether any other region might have it. What is counted of those that stay is asked all the same.
    fn leads_somewhere(&self) -> bool {
        !self.forwarded && *self.may_leave != MayLeave::No && !self.peers().is_empty()
    }

    fn peers(&self) -> &'a Peers {
        &self.asking.fleet.peers
    }

    /// Whether it is stranded before any pod is asked.
    pub fn begins(&self) -> Option<Cause> {
        let lane = self.lane.filter(|_| !self.taken && self.leads_somewhere())?;
        (!lane.is_usable()).then_some(Cause::Unusable)
    }

    /// Whether another region may have a better answer than what is degraded here.
    pub fn betters(&self) -> Option<Cause> {
        if self.taken || !self.leads_somewhere() {
            return None;
        }
        let (rests, now) = (&self.shared.rests, self.shared.clock.now());
        let better = self
            .peers()
            .names()
            .any(|region| self.may_leave.permits(region) && !rests.is_lesser(region, &self.asked.request.model, now));
        better.then_some(Cause::Degraded)
    }

    /// Whether it is stranded by what it was refused with.
    pub fn follows(&self, refusal: &Refusal) -> Option<Cause> {
        if self.taken {
            return None;
        }
        Cause::of(refusal, || self.lane.is_some_and(|lane| lane.is_usable()))
    }

    /// Sends it on. `None`: it stays here.
    pub async fn take(
        &mut self,
        exchange: &mut Exchange,
        cause: Cause,
        until: Instant,
    ) -> Option<Result<PodAnswer, Refusal>> {
        self.taken = true;
        // Rarely needed, so it takes no room in every request's future.
        Box::pin(self.send(exchange, cause, until)).await
    }

    async fn send(&self, exchange: &mut Exchange, cause: Cause, until: Instant) -> Option<Result<PodAnswer, Refusal>> {
        let (shared, model) = (self.shared, self.asked.request.model.as_str());
        let began = Instant::now();
        let plan = shared.plan();
        let sight = Sight {
            snapshot: self.asked.snapshot,
            plan: plan.as_deref(),
            rests: &shared.rests,
            model: self.asked.model,
            model_name: model,
            class: self.asked.class,
            now: shared.clock.now(),
        };
        let seen = self.peers().seen(&sight);
        let stranded = Stranded {
            region: &shared.region,
            forwarded: self.forwarded,
            may_leave: self.may_leave,
            left: until.saturating_duration_since(began),
            expected: self.lane.map_or(Duration::ZERO, |lane| lane.recent().p50),
            key: self.asked.entities.ids().first().map_or_else(rand::random, |entity| key_hash(entity)),
        };
        let regions = match peers_for(&stranded, &seen) {
            Ok(regions) => regions,
            Err(why) => {
                shared.peer_metrics.stayed(cause, why);
                return None;
            }
        };
        let Ok(_place) = shared.spilling.try_acquire() else {
            shared.peer_metrics.stayed(cause, NoPeer::Full);
            return None;
        };
        let outgoing = Outgoing {
            shared,
            trace: &self.asking.trace,
            class: self.asked.class,
            wish: self.asked.wish,
            frame: &self.frame,
            until: until.into(),
        };
        let mut calls = 0;
        for name in regions {
            let Some(region) = self.peers().region(name) else { continue };
            for gateway in region.in_turn() {
                if calls == MOST_CALLS || until.saturating_duration_since(Instant::now()) < SHORTEST_USEFUL {
                    return None;
                }
                calls += 1;
                let part = exchange.part(&shared.memory);
                let (came, part) = attempt(&outgoing, exchange, name, &gateway.upstream, part).await;
                shared.peer_metrics.sent(name, cause, came.word());
                let now = shared.clock.now();
                match came {
                    Came::Answer(answer) => {
                        let (answer, told) = *answer;
                        if let Some(part) = part {
                            exchange.join(part);
                        }
                        exchange.answered_by_peer(&answer, began.elapsed());
                        exchange.making.sidecar_timing = told.timing;
                        exchange.making.region = told.region.or_else(|| HeaderValue::from_str(name.as_str()).ok());
                        exchange.peer_age = told.age;
                        if said_step(&exchange.making) >= Some(Step::FallbackModel) {
                            shared.rests.lessened(name, model, now);
                        }
                        return Some(Ok(answer));
                    }
                    Came::Wrong(refusal) => return Some(Err(refusal)),
                    Came::Unreachable | Came::Lost => {}
                    Came::Refused => break,
                    Came::Overloaded(after) => {
                        shared.rests.refused(name, model, self.asked.class, after, now);
                        break;
                    }
                    Came::Failed => {
                        shared.rests.lessened(name, model, now);
                        return None;
                    }
                    Came::TooLate => return None,
                }
            }
        }
        None
    }
}
