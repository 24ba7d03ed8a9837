//! Takes a request from Pingora's session, finds out whose it is and what it asks for, and has it answered.
//!
//! The rule: it translates and calls. Pingora reads requests and writes answers; its proxy, which would move each request
//! through a dozen phases that are empty here, is not used.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::HeaderValue;
use pingora_core::protocols::http::ServerSession;
use spillway_core::policy::{Principal, principal};
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::tls::PeerError;

use crate::answer::{self, Reply};
use crate::downstream::connection::caller;
use crate::errors::Refusal;
use crate::exchange::{Exchange, FORWARDED, Protocol};
use crate::peers::probe;
use crate::peers::visit::{Asked, Visit, Visitor, receive};
use crate::pods::fleet::Fleet;
use crate::request::body;
use crate::request::head::Head;
use crate::request::route::{GrpcMethod, Route, route};
use crate::shared::Shared;
use crate::{infer, local, stream};

/// One worker thread's edge.
pub struct Edge {
    pub shared: Arc<Shared>,
    pub fleet: Arc<ArcSwap<Fleet>>,
}

/// What serving a request needs beside the session.
pub struct Asking {
    pub head: Head,
    pub fleet: Arc<Fleet>,
    pub principal: Principal,
    /// The trace that calls upstream belong to.
    pub trace: TraceParent,
}

impl Edge {
    /// Has the request answered whose head the session has.
    pub async fn answer(&self, session: &mut ServerSession) {
        let mut exchange = Exchange::begin(self.shared.clone());
        let exchange = &mut exchange;
        let parent = TraceParent::read(&session.req_header().headers);
        let span = self.shared.traces.span("gateway.request", &parent);
        let trace = span.as_parent();
        exchange.span = Some(span);
        let written = match self.serve(session, exchange, trace).await {
            Ok(Some(reply)) => answer::reply(session, exchange, reply).await,
            Ok(None) => Ok(()),
            Err(refusal) => self.refuse(session, exchange, &refusal).await,
        };
        if written.is_err() {
            // The client is gone, or takes nothing: the record says so.
            exchange.outcome = None;
            session.set_keepalive(None);
        }
    }

    /// Serves a request. `None`: the answer was written on the way.
    async fn serve(
        &self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        trace: TraceParent,
    ) -> Result<Option<Reply>, Refusal> {
        let request = session.req_header();
        if Head::is_grpc(request) {
            exchange.protocol = Protocol::Grpc;
        }
        let caller = caller(session).cloned().ok_or(Refusal::Untrusted(PeerError::NoCertificate))?;
        exchange.caller = Some(caller.clone());
        let read = Head::read(request);
        let id = read.as_ref().ok().and_then(|head| head.request_id.clone());
        exchange.request_id = Some(id.unwrap_or_else(new_request_id));
        let head = read?;
        exchange.trace_id = trace.trace_id();
        let trusted = self.shared.workload.still_trusted(&caller.peer, SystemTime::now());
        trusted.map_err(Refusal::Untrusted)?;
        // The path outlives the borrow of the session; both are views of one buffer.
        let (method, uri) = (request.method.clone(), request.uri.clone());
        let route = route(&method, uri.path())?;
        exchange.route = route.name();
        let fleet = self.fleet.load_full();
        let asked = match route {
            Route::Grpc(GrpcMethod::ModelInfer) if exchange.protocol == Protocol::Grpc => Asked::Infer,
            Route::Grpc(GrpcMethod::ModelStreamInfer) if exchange.protocol == Protocol::Grpc => Asked::Stream,
            Route::Grpc(GrpcMethod::ServerReady) if exchange.protocol == Protocol::Grpc => Asked::Ready,
            _ => Asked::Other,
        };
        let headers = &session.req_header().headers;
        let principal = match receive(&self.shared, &fleet.snapshot, &caller, headers, asked)? {
            None => principal(&fleet.snapshot, &self.shared.region, &caller.peer.id)?,
            Some(Visitor::Forwarded { visit, principal, request_id }) => {
                let route = if asked == Asked::Stream { "forwarded-stream" } else { FORWARDED };
                (exchange.visit, exchange.route) = (visit, route);
                exchange.request_id = request_id.or(exchange.request_id.take());
                principal
            }
            Some(Visitor::Prober) => {
                (exchange.visit, exchange.route) = (Visit::Probe, "probe");
                let shared = &self.shared;
                return match asked {
                    Asked::Ready => probe::ready(shared, session, exchange, &head).await.map(Some),
                    _ => probe::serve(shared, session, exchange, &head, &fleet, trace).await.map(Some),
                };
            }
        };
        exchange.principal = Some(principal.clone());
        let asking = Asking { head, fleet, principal, trace };
        match route {
            Route::Live => Ok(Some(local::live())),
            Route::Ready => local::ready(&self.shared).map(Some),
            Route::ServerMetadata => Ok(Some(local::server_metadata())),
            Route::ModelMetadata { model, version } => {
                local::model_metadata(&asking, exchange, model, version).map(Some)
            }
            Route::ModelReady { model, version } => local::model_ready(&asking, exchange, model, version).map(Some),
            Route::ModelInfer { model, version } => {
                infer::rest(&self.shared, session, exchange, &asking, model, version).await.map(Some)
            }
            Route::Grpc(method) => {
                if exchange.protocol != Protocol::Grpc {
                    return Err(Refusal::ContentType { expected: "application/grpc, over HTTP/2" });
                }
                match method {
                    GrpcMethod::ModelInfer => infer::grpc(&self.shared, session, exchange, &asking).await.map(Some),
                    GrpcMethod::ModelStreamInfer => {
                        stream::serve(&self.shared, session, exchange, asking, &self.fleet).await.map(|()| None)
                    }
                    other => local::grpc(&self.shared, session, exchange, &asking, other).await.map(Some),
                }
            }
        }
    }

    async fn refuse(&self, session: &mut ServerSession, exchange: &mut Exchange, refusal: &Refusal) -> answer::Written {
        if matches!(refusal, Refusal::Untrusted(_))
            && let Some(caller) = &exchange.caller
        {
            caller.close.notify_one();
        }
        if !refusal.ends_connection() {
            body::discard(session).await;
        }
        answer::refuse(session, exchange, refusal).await
    }
}

fn new_request_id() -> HeaderValue {
    let id = format!("{:032x}", rand::random::<u128>());
    HeaderValue::from_maybe_shared(bytes::Bytes::from(id)).unwrap_or(HeaderValue::from_static("-"))
}
