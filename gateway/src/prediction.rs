//! Where the answer to a request that may pass comes from: the cache, the model's pods, another region, or what is left
//! when they fail.
//!
//! ```text
//! cache --has it--------------------------------------------------> given
//!   | permit
//!   v
//! ladder --level 2 to 4, or no usable pod--> another region ------> given, not kept
//!   |                                          | none, or not better
//!   +--ask--> gate --> pods --answer--> kept by the cache --------> given
//!   ^           |       |
//!   |           +-------+--no capacity--> another region ---------> given, not kept
//!   |                   |                  | none
//!   |                   | failure <--------+
//!   |                   +--a stale answer may replace it----------> given
//!   |   +<--------------+
//!   |   +--asked again at a lower level
//!   |   +--answered here (levels 3 and 4), or refused
//!   none: the failure is the answer
//! ```
//!
//! The rule: every request that goes to a pod comes through [`fetch`], and so through the gate. Another region is asked
//! once at most. A real answer from there comes before levels 2 to 4 here; the ladder hears of this region alone.

use std::sync::Arc;

use bytes::Bytes;
use spillway_core::inference::InferResponse;
use spillway_core::resilience::Step;
use spillway_runtime::oip::FRAME_HEADER;
use tokio::time::Instant;

use crate::admission::Guest;
use crate::degrade::{Next, Question};
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::peers::cause::Cause;
use crate::peers::spill::Way;
use crate::peers::visit::Visit;
use crate::pods::attempt::PodAnswer;
use crate::pods::call::PodCall;
use crate::pods::lane::Lane;
use crate::results::{Asked, Fresh, Kept, Look, message, refresh};
use crate::shared::Shared;

/// An answer, and where it comes from.
pub enum Prediction {
    Fetched(PodAnswer),
    Kept(Kept),
    /// By this gateway, in place of one that pods did not give.
    Made(InferResponse),
}

/// A request that has passed its checks and its tenant's limits.
pub struct Ready<'a> {
    pub asking: &'a Asking,
    /// None: no pool of this region serves the model.
    pub lane: Option<&'a Arc<Lane>>,
    pub guest: &'a Guest,
    pub asked: Asked<'a>,
    /// The length-prefixed message for a pod, in pieces.
    pub frame: Vec<Bytes>,
}

pub async fn predict(shared: &Shared, exchange: &mut Exchange, ready: Ready<'_>) -> Result<Prediction, Refusal> {
    let Ready { asking, lane, guest, asked, frame } = ready;
    let (results, degradation) = (&shared.results, &shared.degradation);
    let here = matches!(exchange.visit, Visit::Client);
    let question =
        Question { model: asked.model, request: asked.request, entities: asked.entities, class: guest.class, here };
    // Who waits for another's call in vain may still be answered here.
    let until = asked.until;
    let asked = Asked { until: question.wait_until(until), ..asked };
    let mut way = Way::of(shared, exchange, asking, &asked, guest, lane, &frame);
    let Some(lane) = lane else {
        let answered = way.take(exchange, Cause::NoPool, until).await;
        return answered.unwrap_or(Err(Refusal::NoPod)).map(Prediction::Fetched);
    };
    let cached = || {
        if !asked.model.allows(Step::CachedPrediction) {
            return None;
        }
        let kept = results.last_cached(&asked)?;
        message::response(&kept, &asked.request.id, &shared.limits.of_answers()).ok()
    };
    let permit = match results.look(&asked, &mut exchange.cached).await {
        Ok(Look::Ask(permit)) => permit,
        Ok(Look::Kept(kept, refreshes)) => {
            // A model in trouble is not asked for what nobody waits for.
            if let Some(permit) = refreshes.filter(|_| degradation.is_normal(&asked.request.model)) {
                refresh::start(exchange, asking, lane, guest, asked.entities, frame, permit);
            }
            return exchange.made(&kept).map(|()| Prediction::Kept(kept));
        }
        // Mostly that of the call that this request waited for.
        Err(refusal) => return degradation.instead(exchange, &question, cached, refusal).map(Prediction::Made),
    };
    let call = |until: std::time::Instant| {
        let (until, trace) = (Instant::from_std(until), asking.trace.clone());
        PodCall { shared, lane, entities: asked.entities, frame: &frame, until, trace }
    };
    let answered = match degradation.turn(&asked.request.model, asked.model, until) {
        None => match begin(&mut way, exchange, until).await {
            Some(answered) => answered,
            None => {
                let fetched = fetch(shared, exchange, guest, call(until)).await;
                match follow(&mut way, exchange, &fetched, until).await {
                    Some(answered) => answered,
                    None => fetched,
                }
            }
        },
        Some(mut turn) => loop {
            if turn.is_lesser()
                && let Some(cause) = way.betters()
                && let Some(answered) = way.take(exchange, cause, turn.last(&question)).await
            {
                break answered;
            }
            let until = match turn.next(exchange, &question, cached) {
                Next::Ask(until) => until,
                Next::Answer(response, failed) => {
                    if let Some(refusal) = failed {
                        permit.let_go(&refusal);
                    }
                    return Ok(Prediction::Made(response));
                }
                Next::Refuse(refusal) => break Err(refusal),
            };
            if let Some(answered) = begin(&mut way, exchange, until).await {
                break answered;
            }
            let fetched = fetch(shared, exchange, guest, call(until)).await;
            let replaced = matches!(&fetched, Err(refusal) if permit.may_replace(results, refusal));
            turn.hear(exchange, &fetched);
            if let Some(answered) = follow(&mut way, exchange, &fetched, until).await {
                break answered;
            }
            match turn.told(fetched) {
                Some(fetched) => break fetched,
                None if replaced => break Err(turn.give_up()),
                None => {}
            }
        },
    };
    match answered {
        Ok(fetched) => {
            let message = fetched.frame.get(FRAME_HEADER..).unwrap_or_default();
            let fresh = Fresh { message, making: &exchange.making, took: exchange.upstream };
            permit.keep(results, &fresh, &mut exchange.cached);
            Ok(Prediction::Fetched(fetched))
        }
        Err(refusal) => {
            let kept = permit.fail(results, &refusal, &mut exchange.cached).ok_or(refusal)?;
            exchange.made(&kept).map(|()| Prediction::Kept(kept))
        }
    }
}

/// What came of another region, if the request is stranded before any pod is asked.
async fn begin(
    way: &mut Way<'_>,
    exchange: &mut Exchange,
    until: std::time::Instant,
) -> Option<Result<PodAnswer, Refusal>> {
    let cause = way.begins()?;
    way.take(exchange, cause, until).await
}

/// The same, if it is stranded by what this region's pods and their gate said.
async fn follow(
    way: &mut Way<'_>,
    exchange: &mut Exchange,
    fetched: &Result<PodAnswer, Refusal>,
    until: std::time::Instant,
) -> Option<Result<PodAnswer, Refusal>> {
    let cause = way.follows(fetched.as_ref().err()?)?;
    way.take(exchange, cause, until).await
}

/// Asks the pods of a model, when there is a place.
pub async fn fetch(
    shared: &Shared,
    exchange: &mut Exchange,
    guest: &Guest,
    call: PodCall<'_>,
) -> Result<PodAnswer, Refusal> {
    let (asked, until) = (Instant::now(), call.until.into_std());
    let answered = async {
        let model = call.lane.name.as_str();
        if exchange.visit != Visit::Probe {
            shared.admission.refuse_planned(guest, shared.plans.look().as_deref()).map_err(Refusal::busy)?;
        }
        let place = shared.admission.enter(guest, model, until).await.map_err(Refusal::busy)?;
        let answer = call.make(exchange).await?;
        if let Some(place) = place {
            place.served();
        }
        Ok(answer)
    };
    let answered = answered.await;
    exchange.upstream = asked.elapsed();
    if let Ok(answer) = &answered {
        exchange.describe(answer);
    }
    answered
}
