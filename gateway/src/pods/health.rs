//! Asks every pod of the region, each second, whether it serves.
//!
//! The rule: one question at a time to a pod, bounded in time. What is found is an advice to
//! [`crate::pods::fleet`], not a verdict.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, Uri};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use spillway_runtime::upstream::OipBody;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::local::frame;
use crate::pods::fleet::{Fleet, PodLink};
use crate::request::body::message;
use crate::shared::Shared;

const EVERY: Duration = Duration::from_secs(1);
/// Before a pod has answered for the first time, so that a start is quick.
const FIRST_EVERY: Duration = Duration::from_millis(100);
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// A health answer is two bytes.
const MAX_ANSWER: usize = 1 << 10;

/// Checks until the drain is over.
pub async fn watch(shared: Arc<Shared>) {
    let Shared { region, workload, book, upstream_metrics, metrics, drain, .. } = &*shared;
    let mut fleet: Option<Fleet> = None;
    let mut changed = shared.membership.subscribe();
    loop {
        let members = changed.borrow_and_update().clone();
        if fleet.as_ref().is_none_or(|fleet| !Arc::ptr_eq(&fleet.members, &members)) {
            let next = Fleet::new(members, region, workload, book, upstream_metrics, fleet.as_ref());
            fleet = Some(next);
        }
        let Some(fleet) = &fleet else { return };
        // Each time: threads let go of pods that are gone when they have served what they began.
        book.keep(fleet.links().map(|link| &link.key));
        let mut checks: FuturesUnordered<_> = fleet.links().map(|link| check(link)).collect();
        while checks.next().await.is_some() {}
        metrics.pods_unhealthy.set(i64::try_from(book.failed()).unwrap_or(i64::MAX));
        let every = if book.any_serving() { EVERY } else { FIRST_EVERY };
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            // New pods are asked at once, and the old ones' answers do not speak for them.
            Ok(()) = changed.changed() => {}
            () = drain.stopped() => return,
        }
    }
}

async fn check(link: &PodLink) {
    let serving = tokio::time::timeout(ANSWER_TIME, ask(link)).await.ok().flatten().unwrap_or(false);
    if link.health.set(serving) {
        tracing::info!(pool = %link.key.pool, pod = %link.key.pod, serving, "pod health changed");
    }
}

/// Whether the pod says that it serves; `None` if it says nothing that can be read.
async fn ask(link: &PodLink) -> Option<bool> {
    let mut request = Request::new(OipBody::from(frame(&HealthCheckRequest { service: String::new() })));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static("/grpc.health.v1.Health/Check");
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    let answer = link.upstream.call(request).await.ok()?;
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.ok()?.to_bytes();
    let answer = HealthCheckResponse::decode(message(&body).ok()?).ok()?;
    Some(answer.status == ServingStatus::Serving as i32)
}
