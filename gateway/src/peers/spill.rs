//! A stranded request's way to another region.
//!
//! The rule: once for each request, and within what is left of its deadline. Where it cannot go, or does not get an
//! answer there, it is as if nobody had been asked. A request that is served here costs no more than a look at whether
//! its pods are usable.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::vec::IntoIter;

use bytes::Bytes;
use http::HeaderValue;
use spillway_core::cache::control::Wish;
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::failover::{MayLeave, Stranded, peers_for};
use spillway_core::inference::Entities;
use spillway_core::resilience::Step;
use spillway_core::resource::Model;
use spillway_core::routing::key_hash;
use spillway_core::units::Name;
use spillway_runtime::telemetry::TraceParent;

use crate::admission::Guest;
use crate::degrade::said_step;
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::peers::attempt::{Came, Outgoing, attempt};
use crate::peers::cause::Cause;
use crate::peers::links::{PeerGateway, PeerRegion, Peers, Sight};
use crate::peers::places::NoPlace;
use crate::peers::visit::Visit;
use crate::pods::attempt::{INFER, PodAnswer};
use crate::pods::fleet::Fleet;
use crate::pods::lane::Lane;
use crate::results::Asked;
use crate::shared::Shared;

/// Gateways that are called for one request.
const MOST_CALLS: usize = 4;
/// Requests of one gateway that are with other regions at a time, and streams; beyond it they stay.
pub const MOST_SPILLING: usize = 1_024;

/// A request, as far as it matters to where it may go.
#[derive(Clone, Copy)]
pub struct Journey<'a> {
    pub shared: &'a Shared,
    pub fleet: &'a Fleet,
    pub tenant: &'a Name,
    pub guest: &'a Guest,
    pub name: &'a str,
    pub model: &'a Model,
    pub entities: &'a Entities,
    /// None: no pool of this region serves the model.
    pub lane: Option<&'a Arc<Lane>>,
    /// It came from another region.
    pub forwarded: bool,
}

impl<'a> Journey<'a> {
    /// Whether any other region might have it. What is counted of those that stay is asked all the same.
    fn leads_somewhere(&self) -> bool {
        !self.forwarded && !self.peers().is_empty() && *self.may_leave() != MayLeave::No
    }

    fn peers(&self) -> &'a Peers {
        &self.fleet.peers
    }

    fn may_leave(&self) -> &'a MayLeave {
        const STAYS: &MayLeave = &MayLeave::No;
        self.fleet.snapshot.tenants.get(self.tenant).map_or(STAYS, |tenant| &tenant.may_leave_region)
    }

    /// Whether it is stranded before any pod is asked.
    pub fn begins(&self) -> Option<Cause> {
        let lane = self.lane.filter(|_| !self.peers().is_empty())?;
        (!lane.was_usable() && self.leads_somewhere()).then_some(Cause::Unusable)
    }

    /// Whether another region may have a better answer than what is degraded here.
    pub fn betters(&self) -> Option<Cause> {
        if !self.leads_somewhere() {
            return None;
        }
        let (rests, now, may_leave) = (&self.shared.rests, self.shared.clock.now(), self.may_leave());
        let mut regions = self.peers().names();
        let better = regions.any(|region| may_leave.permits(region) && !rests.is_lesser(region, self.name, now));
        better.then_some(Cause::Degraded)
    }

    /// Whether it is stranded by what it was refused with.
    pub fn follows(&self, refusal: &Refusal) -> Option<Cause> {
        Cause::of(refusal, || self.lane.is_some_and(|lane| lane.is_usable()))
    }

    /// Where it may go, and the gateways there. `None`: it stays, and why is counted.
    pub fn tour(self, cause: Cause, until: Instant) -> Option<Tour<'a>> {
        let shared = self.shared;
        let plan = shared.plan();
        let sight = Sight {
            snapshot: &self.fleet.snapshot,
            plan: plan.as_deref(),
            rests: &shared.rests,
            model: self.model,
            model_name: self.name,
            tenant: self.tenant,
            class: self.guest.class,
            now: shared.clock.now(),
        };
        let seen = self.peers().seen(&sight);
        let stranded = Stranded {
            region: &shared.region,
            forwarded: self.forwarded,
            may_leave: self.may_leave(),
            left: until.saturating_duration_since(Instant::now()),
            expected: self.lane.map_or(Duration::ZERO, |lane| lane.recent().p50),
            key: self.entities.ids().first().map_or_else(rand::random, |entity| key_hash(entity)),
        };
        match peers_for(&stranded, &seen) {
            Ok(regions) => {
                let regions: Vec<_> = regions.into_iter().filter_map(|name| self.peers().region(name)).collect();
                Some(Tour {
                    journey: self,
                    cause,
                    until,
                    regions: regions.into_iter(),
                    gateways: Vec::new().into_iter(),
                    at: None,
                    calls: 0,
                })
            }
            Err(why) => {
                shared.peer_metrics.stayed(cause, why.as_str());
                None
            }
        }
    }
}

/// The gateways that a request is sent to, one after the other.
pub struct Tour<'a> {
    journey: Journey<'a>,
    cause: Cause,
    until: Instant,
    regions: IntoIter<&'a PeerRegion>,
    /// Of the region that it is at.
    gateways: IntoIter<&'a PeerGateway>,
    at: Option<(&'a PeerRegion, &'a PeerGateway)>,
    calls: usize,
}

impl<'a> Tour<'a> {
    /// Whom to call next, if anybody may be.
    pub fn next_gateway(&mut self) -> Option<(&'a Name, &'a PeerGateway)> {
        if self.calls == MOST_CALLS || self.until.saturating_duration_since(Instant::now()) < SHORTEST_USEFUL {
            return None;
        }
        let mut at = self.at.map(|(region, _)| region);
        let (region, gateway) = loop {
            match (at, self.gateways.next()) {
                (Some(region), Some(gateway)) => break (region, gateway),
                _ => {
                    let region = self.regions.next()?;
                    self.gateways = region.in_turn().into_iter();
                    at = Some(region);
                }
            }
        };
        self.calls += 1;
        self.at = Some((region, gateway));
        Some((&region.name, gateway))
    }

    /// The last one has it.
    pub fn answered(&self) {
        if let Some((region, _)) = self.at {
            self.journey.shared.peer_metrics.sent(&region.name, self.cause, "answered");
        }
    }

    /// The last one has not, which may mean that nobody else is called, either.
    pub fn missed(&mut self, came: &Came) {
        let Some((PeerRegion { name: region, .. }, gateway)) = self.at else { return };
        let Journey { shared, name, tenant, guest, .. } = self.journey;
        shared.peer_metrics.sent(region, self.cause, came.word());
        let now = shared.clock.now();
        match came {
            Came::Unreachable | Came::Lost => shared.nudges.nudge(region, &gateway.at.name),
            Came::Refused | Came::TenantFull => self.gateways = Vec::new().into_iter(),
            Came::Overloaded(after) => {
                shared.rests.refused(region, name, guest.class, *after, now);
                self.gateways = Vec::new().into_iter();
            }
            Came::OverShare(after) => {
                shared.rests.refused_tenant(region, name, tenant, guest.class, *after, now);
                self.gateways = Vec::new().into_iter();
            }
            Came::Failed => {
                shared.rests.lessened(region, name, now);
                self.calls = MOST_CALLS;
            }
            Came::Wrong(_) | Came::TooLate => self.calls = MOST_CALLS,
        }
    }
}

/// The way out of the region, for one unary request.
pub struct Way<'a> {
    journey: Journey<'a>,
    trace: &'a TraceParent,
    wish: Wish,
    /// The length-prefixed message, in pieces.
    frame: &'a [Bytes],
    taken: bool,
}

impl<'a> Way<'a> {
    pub fn of(
        shared: &'a Shared,
        exchange: &Exchange,
        asking: &'a Asking,
        asked: &Asked<'a>,
        guest: &'a Guest,
        lane: Option<&'a Arc<Lane>>,
        frame: &'a [Bytes],
    ) -> Self {
        let journey = Journey {
            shared,
            fleet: &asking.fleet,
            tenant: asked.tenant,
            guest,
            name: &asked.request.model,
            model: asked.model,
            entities: asked.entities,
            lane,
            forwarded: !matches!(exchange.visit, Visit::Client),
        };
        Self { journey, trace: &asking.trace, wish: asked.wish, frame, taken: false }
    }

    /// Whether it is stranded before any pod is asked.
    pub fn begins(&self) -> Option<Cause> {
        if self.taken { None } else { self.journey.begins() }
    }

    /// Whether another region may have a better answer than what is degraded here.
    pub fn betters(&self) -> Option<Cause> {
        if self.taken { None } else { self.journey.betters() }
    }

    /// Whether it is stranded by what it was refused with.
    pub fn follows(&self, refusal: &Refusal) -> Option<Cause> {
        if self.taken { None } else { self.journey.follows(refusal) }
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
        let Journey { shared, name, guest, .. } = self.journey;
        let began = Instant::now();
        let mut tour = self.journey.tour(cause, until)?;
        // It has left the gate, or never came to it: its tenant's bound holds on the way, too.
        let presence = guest.present().map_err(|_| NoPlace::TenantFull);
        let place = presence.and_then(|presence| Ok((presence, shared.spilling.take(guest.tenant)?)));
        let _place = place.inspect_err(|why| shared.peer_metrics.stayed(cause, why.word())).ok()?;
        let (trace, class, wish) = (self.trace, guest.class, self.wish);
        let outgoing = Outgoing { shared, trace, class, wish, path: INFER, until: until.into() };
        while let Some((region, gateway)) = tour.next_gateway() {
            let mut part = exchange.part(&shared.memory);
            match attempt(&outgoing, self.frame, exchange, region, &gateway.upstream, &mut part).await {
                Ok((answer, told)) => {
                    tour.answered();
                    exchange.join(part);
                    exchange.answered_by_peer(&answer, began.elapsed());
                    exchange.making.sidecar_timing = told.timing;
                    exchange.making.region = told.region.or_else(|| HeaderValue::from_str(region.as_str()).ok());
                    exchange.peer_age = told.age;
                    if said_step(&exchange.making) >= Some(Step::FallbackModel) {
                        shared.rests.lessened(region, name, shared.clock.now());
                    }
                    return Some(Ok(answer));
                }
                Err(came) => {
                    tour.missed(&came);
                    if let Came::Wrong(refusal) = came {
                        return Some(Err(refusal));
                    }
                }
            }
        }
        None
    }
}
