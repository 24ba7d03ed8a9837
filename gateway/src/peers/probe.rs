//! A probe: whether this region itself can answer for a model that much depends on.
//!
//! The rule: it takes the real way, from the handshake to a pod's answer, and nothing that hides what is broken: no
//! stored answer, no level of degradation, no other region. No tenant's limits are asked, and no client's figures
//! count it.

use pingora_core::protocols::http::ServerSession;
use spillway_core::deadline::{Asked, allowed, parse_timeout_parameter};
use spillway_core::resource::Tier;
use spillway_proto::inference::ServerReadyResponse;
use spillway_runtime::oip;
use spillway_runtime::telemetry::TraceParent;

use crate::admission::Guest;
use crate::answer::Reply;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::{check, clipped, gone};
use crate::local;
use crate::pods::call::PodCall;
use crate::pods::fleet::Fleet;
use crate::prediction::fetch;
use crate::request::body;
use crate::request::head::Head;
use crate::shared::Shared;

/// Without a model to ask: whether a pod of the region answers its health checks.
pub async fn ready(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    head: &Head,
) -> Result<Reply, Refusal> {
    head.check_uncompressed()?;
    let frame = body::read(session, exchange, head, local::MAX_MESSAGE).await?;
    exchange.received = frame.len();
    body::message(&frame)?;
    Ok(Reply::Grpc(vec![local::frame(&ServerReadyResponse { ready: shared.serves_itself() })]))
}

pub async fn serve(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    head: &Head,
    fleet: &Fleet,
    trace: TraceParent,
) -> Result<Reply, Refusal> {
    head.check_uncompressed()?;
    let limits = &shared.limits.request;
    let frame = body::read(session, exchange, head, limits.body.saturating_add(oip::FRAME_HEADER)).await?;
    exchange.received = frame.len();
    let request = oip::decode_message(body::message(&frame)?, limits)?;
    (exchange.model, exchange.version) = (clipped(&request.model), clipped(&request.version));
    // Who asks may have a newer Snapshot, or an older one: it must not take this region for a sick one.
    let unknown = || Refusal::UnknownModel(clipped(&request.model));
    let model = fleet.snapshot.models.get(request.model.as_str()).filter(|model| model.tier == Tier::One);
    let model = model.ok_or_else(unknown)?;
    fleet.snapshot.pool_of(model, &shared.region).ok_or_else(unknown)?;
    let version = model.version(&request.version).ok_or_else(|| Refusal::UnknownVersion {
        model: clipped(&request.model),
        version: clipped(&request.version),
    })?;
    version.as_str().clone_into(&mut exchange.version);
    let entities = check(model, &request)?;
    let lane = fleet.lane(&request.model).ok_or(Refusal::NoPod)?;
    exchange.auth = exchange.began.elapsed();
    let parameter = request.parameters.integer("timeout").and_then(parse_timeout_parameter);
    let asked = Asked { parameter, ..head.asked };
    let until = exchange.began + allowed(asked, model.deadline, model.max_deadline);
    let guest = Guest::prober();
    let call = PodCall { shared, lane, entities: &entities, frame: &[frame], until: until.into(), trace };
    let answered = tokio::select! {
        biased;
        answered = fetch(shared, exchange, &guest, call) => answered,
        () = gone(session) => Err(Refusal::Cancelled),
    };
    Ok(Reply::Grpc(vec![answered?.frame]))
}
