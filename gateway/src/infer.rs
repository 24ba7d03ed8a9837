//! One request for a prediction: decode, check, admit, answer in the client's own protocol.
//!
//! The rule: who may not use a model learns nothing about it; a request is decoded once and held
//! against the model before a pod sees it; what the client spoke as gRPC is passed on as it came.

use std::sync::Arc;

use bytes::Bytes;
use pingora_core::protocols::http::ServerSession;
use spillway_core::deadline::{Asked, allowed, parse_timeout_parameter};
use spillway_core::inference::json::{OutputForms, decode_request, encode_response};
use spillway_core::inference::{Entities, InferRequest, check_against, entities};
use spillway_core::policy::{Principal, authorize, authorize_some};
use spillway_core::resource::{Action, Model};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::oip;

use crate::admission::{Ask, Guest, Verdict};
use crate::answer::Reply;
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::peers::visit::Visit;
use crate::prediction::{Prediction, Ready, predict};
use crate::request::body;
use crate::request::inflate::inflate;
use crate::results::{self, message};
use crate::shared::Shared;

/// REST, JSON or binary.
pub async fn rest(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    asking: &Asking,
    model: &str,
    version: &str,
) -> Result<Reply, Refusal> {
    let found = find(asking, exchange, model, version, Action::Infer)?;
    exchange.auth = exchange.began.elapsed();
    let coding = asking.head.coding()?;
    let header_length = asking.head.header_length()?;
    let limit = shared.limits.request.body;
    let mut body = body::read(session, exchange, &asking.head, limit).await?;
    exchange.received = body.len();
    if let Some(coding) = coding {
        body = inflate(coding, body, limit, |bytes| exchange.keep(bytes)).await?;
    }
    let mut request = decode_request(body, header_length, model, version, &shared.limits.request)?;
    if header_length.is_none() {
        // Text became tensors of their own; binary ones are slices of the body.
        exchange.keep(request.inputs.iter().map(|input| input.data.len()).sum())?;
    }
    let forms = OutputForms::take(&mut request);
    let frame = oip::frame(&request);
    Ok(Reply::Rest(match answer(shared, session, exchange, asking, &found, &request, frame).await? {
        Prediction::Fetched(answer) => encode_response(&answer.response, &forms)?,
        Prediction::Kept(kept) => {
            let response = message::response(&kept, &request.id, &shared.limits.of_answers());
            encode_response(&response.map_err(|_| Refusal::BadAnswer)?, &forms)?
        }
        Prediction::Made(response) => encode_response(&response, &forms)?,
    }))
}

/// gRPC `ModelInfer`.
pub async fn grpc(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    asking: &Asking,
) -> Result<Reply, Refusal> {
    asking.head.check_uncompressed()?;
    // Only its body says which model it is for.
    authorize_some(&asking.fleet.snapshot, &asking.principal, Action::Infer)?;
    let limits = &shared.limits.request;
    let frame = body::read(session, exchange, &asking.head, limits.body.saturating_add(oip::FRAME_HEADER)).await?;
    exchange.received = frame.len();
    let request = oip::decode_message(body::message(&frame)?, limits)?;
    let found = find(asking, exchange, &request.model, &request.version, Action::Infer)?;
    exchange.auth = exchange.began.elapsed();
    Ok(Reply::Grpc(match answer(shared, session, exchange, asking, &found, &request, vec![frame]).await? {
        Prediction::Fetched(answer) => vec![answer.frame],
        Prediction::Kept(kept) => message::frame(&kept, &request.id),
        Prediction::Made(response) => oip::frame_response(&response),
    }))
}

/// The model, for one who may do this with it, if it is there.
pub fn find(
    asking: &Asking,
    exchange: &mut Exchange,
    model: &str,
    version: &str,
    action: Action,
) -> Result<Arc<Model>, Refusal> {
    // Operators want to see what was refused, too.
    exchange.model = clipped(model);
    exchange.version = clipped(version);
    let (found, served) = permitted(&asking.fleet.snapshot, &asking.principal, model, version, action)?;
    served.as_str().clone_into(&mut exchange.version);
    Ok(found.clone())
}

/// The model and the version that answers, likewise.
pub fn permitted<'a>(
    snapshot: &'a Snapshot,
    principal: &Principal,
    model: &str,
    version: &str,
    action: Action,
) -> Result<(&'a Arc<Model>, &'a Name), Refusal> {
    authorize(snapshot, principal, model, version, action)?;
    let found = snapshot.models.get(model).ok_or_else(|| Refusal::UnknownModel(clipped(model)))?;
    let unknown = || Refusal::UnknownVersion { model: clipped(model), version: clipped(version) };
    Ok((found, found.version(version).ok_or_else(unknown)?))
}

/// Whom a request is about, if the model can serve it.
pub fn check(model: &Model, request: &InferRequest) -> Result<Entities, Refusal> {
    let entities = entities(model, request)?;
    check_against(model, request, &entities)?;
    Ok(entities)
}

/// Takes what a valid request costs from its tenant's token buckets, and says how it comes to the gate. One that another
/// region's gateway sent has paid there.
pub fn admit(
    shared: &Shared,
    exchange: &mut Exchange,
    principal: &Principal,
    model: &Model,
    request: &InferRequest,
    entities: &Entities,
) -> Result<Guest, Refusal> {
    if let Visit::Forwarded(passage) = &exchange.visit {
        let guest = shared.admission.guest(&principal.tenant, request, passage.class);
        exchange.class = Some(guest.class);
        return Ok(guest);
    }
    let ask = Ask { tenant: &principal.tenant, name: &request.model, model, request, entities };
    let Verdict { guest, taken } = shared.admission.judge(&ask);
    (exchange.class, exchange.limit, exchange.limited) = (Some(guest.class), taken.standing, taken.refused);
    match &exchange.limit {
        Some(standing) if taken.refused => {
            Err(Refusal::Limited { limit: standing.limit.clone(), after: standing.reset })
        }
        _ => Ok(guest),
    }
}

async fn answer(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    asking: &Asking,
    model: &Model,
    request: &InferRequest,
    frame: Vec<Bytes>,
) -> Result<Prediction, Refusal> {
    let entities = check(model, request)?;
    let guest = admit(shared, exchange, &asking.principal, model, request, &entities)?;
    let parameter = request.parameters.integer("timeout").and_then(parse_timeout_parameter);
    let asked = Asked { parameter, ..asking.head.asked };
    let until = exchange.began + allowed(asked, model.deadline, model.max_deadline);
    let (snapshot, tenant) = (&*asking.fleet.snapshot, &asking.principal.tenant);
    let wish = results::wish(snapshot, tenant, model, &session.req_header().headers);
    let asked =
        results::Asked { snapshot, tenant, model, request, entities: &entities, wish, class: guest.class, until };
    let lane = asking.fleet.lane(&request.model);
    let ready = Ready { asking, lane, guest: &guest, asked, frame };
    let answered = tokio::select! {
        biased;
        answered = predict(shared, exchange, ready) => answered,
        () = gone(session) => Err(Refusal::Cancelled),
    };
    if answered.is_ok() {
        shared.degradation.answered(&exchange.making);
    }
    answered
}

/// Returns when the client has gone away: it reset the stream, or closed the connection.
pub async fn gone(session: &mut ServerSession) {
    // Whatever comes here instead of silence ends the request: there is no more of it to come.
    let _ = session.read_body_or_idle(true).await;
}

/// A caller's, or an operator's, word within a message.
pub fn clipped(text: &str) -> String {
    const LONGEST: usize = 64;
    if text.len() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST).collect() }
}
