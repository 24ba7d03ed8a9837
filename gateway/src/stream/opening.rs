//! Who gets a stream: a pod of this region, or a gateway of another one where no pod can take it.
//!
//! The rule: until one of them has taken the call there is one request. Who was not reached, or refused it, leaves it to
//! another pod, or to another region, once, for the reasons that a unary one is stranded for. A call that was lost,
//! or failed in the other region, may have been acted on, so it ends the stream, to be opened anew by who knows whether
//! that is safe.
//!
//! ```text
//! no pool, no usable pod, shed --> another region --nobody--> pods --no capacity--> refused
//! else                         --> pods --no capacity--> another region --nobody--> refused
//! ```

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Response};
use pingora_core::protocols::http::ServerSession;
use spillway_core::cache::control::Wish;
use spillway_core::deadline::{SHORTEST_USEFUL, allowed};
use spillway_core::inference::Entities;
use spillway_core::resilience::Outcome;
use spillway_core::resource::Model;
use spillway_core::units::Name;
use spillway_runtime::upstream::{OipBody, OipSender, UpstreamBody, UpstreamError};
use tokio::time::{Duration, Instant, sleep_until};

use super::{LONGEST, Stream};
use crate::admission::Guest;
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::gone;
use crate::peers::attempt::{Came, Outgoing, open};
use crate::peers::cause::Cause;
use crate::peers::places::Place;
use crate::peers::spill::Journey;
use crate::peers::visit::Visit;
use crate::pods::attempt::{STREAM_INFER, Taken, request};
use crate::pods::lane::{Lane, Seek};
use crate::pods::metrics::Again;
use crate::shared::Shared;

/// A request that may be passed on.
pub(super) struct Checked {
    pub frame: Bytes,
    pub id: String,
    pub name: String,
    pub model: Arc<Model>,
    pub entities: Entities,
    pub guest: Guest,
    /// None: no pool of this region serves the model, or the stream is not in this region.
    pub lane: Option<Arc<Lane>>,
    /// This region has no room for it, but another may.
    pub shed: Option<Refusal>,
}

/// The gateway of another region that has the stream.
pub(super) struct Abroad<'a> {
    pub region: Name,
    pub gateway: Name,
    _place: Place<'a>,
}

/// Whether another region has it.
enum Found {
    Taken(Taken),
    /// It says what is wrong with the request.
    Wrong(Refusal),
    Nobody,
}

type Head = BoxFuture<'static, Result<Response<UpstreamBody>, UpstreamError>>;

impl Stream<'_> {
    /// Finds somebody for the stream, who gets its first request. `None`: that was refused, as the client was told.
    pub(super) async fn open(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        first: Checked,
    ) -> Result<Option<Taken>, Refusal> {
        let begins = match (&first.lane, &first.shed) {
            (None, _) => Some(Cause::NoPool),
            (_, Some(_)) => Some(Cause::Shed),
            _ => journey(self.shared, &self.asking, &first, exchange).begins(),
        };
        let mut found = match begins {
            Some(cause) => self.go_abroad(session, exchange, &first, cause).await?,
            None => Found::Nobody,
        };
        if let (Found::Nobody, Some(lane), None) = (&found, &first.lane, &first.shed) {
            let refusal = match self.stay(session, exchange, &first, lane).await {
                Ok(taken) => return Ok(Some(taken)),
                Err(refusal) => refusal,
            };
            let follows = journey(self.shared, &self.asking, &first, exchange).follows(&refusal);
            let unseen = !matches!(refusal, Refusal::PodLost);
            if let Some(cause) = follows.filter(|_| begins.is_none() && unseen) {
                found = self.go_abroad(session, exchange, &first, cause).await?;
            }
            if matches!(found, Found::Nobody) {
                return Err(refusal);
            }
        }
        let refusal = match found {
            Found::Taken(taken) => return Ok(Some(taken)),
            Found::Wrong(refusal) => refusal,
            Found::Nobody => first.shed.ok_or(Refusal::NoPod)?,
        };
        self.tell(session, exchange, first.id, refusal).await?;
        self.quiet_until = self.until;
        Ok(None)
    }

    /// Has a pod take it.
    async fn stay(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        first: &Checked,
        lane: &Arc<Lane>,
    ) -> Result<Taken, Refusal> {
        let mut seek = lane.seek(&first.entities, exchange.caller.as_ref().map(|caller| caller.address.ip()));
        loop {
            let (sender, head) = self.call(lane, &mut seek, exchange)?;
            // It has room for the first; if the call fails, that says why.
            let _ = sender.send(first.frame.clone()).await;
            let response = tokio::select! {
                response = head => response,
                () = gone(session) => return Err(Refusal::Cancelled),
                () = sleep_until(self.until.min(self.quiet_until)) => {
                    self.give_up();
                    return Err(Refusal::Deadline);
                }
            };
            let (ended, seen) = match response {
                Ok(response) => match Taken::of(sender, response) {
                    Ok(taken) => return Ok(taken),
                    Err(ended) => (ended, true),
                },
                Err(error) => (self.lost(error), false),
            };
            let failure = ended.verdict(false).failure;
            let Err(refusal) = self.ended(Err(ended)) else { return Err(Refusal::PodLost) };
            if seen || exchange.retries > 0 {
                return Err(refusal);
            }
            if let Err(why) = lane.may_repeat(&seek, failure, 1, self.until - Instant::now()) {
                lane.recorder.metrics.not_repeated(why);
                return Err(refusal);
            }
            exchange.retries += 1;
            self.shared.metrics.retries.inc();
            lane.recorder.metrics.repeated(Again::Unseen);
        }
    }

    /// Calls a pod for the stream.
    fn call(
        &mut self,
        lane: &Arc<Lane>,
        seek: &mut Seek,
        exchange: &mut Exchange,
    ) -> Result<(OipSender, Head), Refusal> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left < SHORTEST_USEFUL {
            return Err(Refusal::Deadline);
        }
        let lease = lane.take(seek, left)?;
        exchange.pod = Some(lease.link().key().pod.clone());
        let (sender, body) = OipBody::stream();
        let request = request(STREAM_INFER, exchange, &self.asking.trace, self.lasts(), body);
        let upstream = lease.link().upstream.clone();
        self.lease = Some(lease);
        Ok((sender, Box::pin(async move { upstream.call(request).await })))
    }

    /// How long the client has the stream last; none: it did not say.
    fn lasts(&self) -> Option<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        (allowed(self.asking.head.asked, Duration::MAX, Duration::MAX) < LONGEST).then_some(left)
    }

    /// Has another region take it.
    async fn go_abroad(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        first: &Checked,
        cause: Cause,
    ) -> Result<Found, Refusal> {
        let (shared, until) = (self.shared, self.until.min(self.quiet_until));
        let Some(mut tour) = journey(shared, &self.asking, first, exchange).tour(cause, until.into_std()) else {
            return Ok(Found::Nobody);
        };
        let taken = shared.streams_spilling.take(first.guest.tenant);
        let Ok(place) = taken.inspect_err(|why| shared.peer_metrics.stayed(cause, why.word())) else {
            return Ok(Found::Nobody);
        };
        let (trace, class, lasts) = (&self.asking.trace, first.guest.class, self.lasts());
        let outgoing = Outgoing { shared, trace, class, wish: Wish::default(), path: STREAM_INFER, until };
        while let Some((region, gateway)) = tour.next_gateway() {
            // Rarely needed, so it takes no room in every stream's future.
            let opened = Box::pin(open(&outgoing, first.frame.clone(), lasts, exchange, region, &gateway.upstream));
            let opened = tokio::select! {
                opened = opened => opened,
                () = gone(session) => return Err(Refusal::Cancelled),
            };
            match opened {
                Ok(taken) => {
                    tour.answered();
                    (exchange.pod, exchange.making.region) = (None, HeaderValue::from_str(region.as_str()).ok());
                    let gateway = gateway.at.name.clone();
                    self.abroad = Some(Abroad { region: region.clone(), gateway, _place: place });
                    return Ok(Found::Taken(taken));
                }
                Err(came) => {
                    tour.missed(&came);
                    match came {
                        Came::Wrong(refusal) => return Ok(Found::Wrong(refusal)),
                        Came::Lost | Came::Failed => return Err(Refusal::PodLost),
                        Came::TooLate => return Err(Refusal::Deadline),
                        Came::Unreachable
                        | Came::Refused
                        | Came::Overloaded(_)
                        | Came::OverShare(_)
                        | Came::TenantFull => {}
                    }
                }
            }
        }
        Ok(Found::Nobody)
    }

    /// Nobody waits for the pod any more.
    pub(super) fn give_up(&mut self) {
        if let Some(lease) = self.lease.take_if(|_| Instant::now() < self.until) {
            // It is silent.
            lease.close(Outcome::Timeout);
        }
    }
}

fn journey<'a>(shared: &'a Shared, asking: &'a Asking, first: &'a Checked, exchange: &Exchange) -> Journey<'a> {
    Journey {
        shared,
        fleet: &asking.fleet,
        tenant: &asking.principal.tenant,
        guest: &first.guest,
        name: &first.name,
        model: &first.model,
        entities: &first.entities,
        lane: first.lane.as_ref(),
        forwarded: !matches!(exchange.visit, Visit::Client),
    }
}
