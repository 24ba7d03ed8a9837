//! What goes on without requests: every pod of the region is asked each second whether it serves, and the
//! outlier detectors look at what calls have shown.
//!
//! The rule: one question at a time to a pod, bounded in time. What is found is an advice to
//! [`crate::pods::lane`], not a verdict.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, Uri};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use spillway_runtime::upstream::OipBody;
use tokio::time::MissedTickBehavior;
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
/// How often the rules of time and comparison are applied, as the outlier detector wants it.
const SWEEP_EVERY: Duration = Duration::from_millis(100);
/// How often breakers are counted, of which there may be 65,536.
const SHOW_BREAKERS_EVERY: Duration = Duration::from_secs(1);

/// Checks until the drain is over.
pub async fn watch(shared: Arc<Shared>) {
    let Shared { region, workload, book, upstream_metrics, metrics, drain, .. } = &*shared;
    let mut changed = shared.membership.subscribe();
    let mut fleet: Option<Arc<Fleet>> = None;
    loop {
        let members = changed.borrow_and_update().clone();
        let next = match fleet.take().filter(|fleet| Arc::ptr_eq(&fleet.members, &members)) {
            Some(fleet) => fleet,
            None => {
                let before = book.newest();
                Arc::new(Fleet::new(members, region, workload, book, upstream_metrics, before.as_deref()))
            }
        };
        // Each time: threads let go of pods that are gone when they have served what they began.
        book.keep(&next);
        let round = async {
            let mut checks: FuturesUnordered<_> = next.links().map(|link| check(&shared, link)).collect();
            while checks.next().await.is_some() {}
            metrics.pods_unhealthy.set(i64::try_from(book.failed()).unwrap_or(i64::MAX));
            tokio::time::sleep(if book.any_serving() { EVERY } else { FIRST_EVERY }).await;
        };
        tokio::select! {
            () = round => {}
            // New pods are asked at once, and the old ones' answers do not speak for them.
            Ok(()) = changed.changed() => {}
            () = drain.stopped() => return,
        }
        fleet = Some(next);
    }
}

/// Looks at the pods until the drain is over.
pub async fn sweep(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(SWEEP_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut breakers = tokio::time::interval(SHOW_BREAKERS_EVERY);
    breakers.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                shared.book.sweep();
                shared.book.show_pods();
                let fleet = shared.book.newest();
                let pools = fleet.iter().flat_map(|fleet| fleet.pools());
                pools.for_each(|pool| shared.admission.fit(&pool.name, pool.capacity()));
            }
            _ = breakers.tick() => shared.book.show_breakers(),
            () = shared.drain.stopped() => return,
        }
    }
}

async fn check(shared: &Shared, link: &PodLink) {
    let serving = tokio::time::timeout(ANSWER_TIME, ask(link)).await.ok().flatten().unwrap_or(false);
    if link.state.checked(serving, shared.clock.now()) {
        tracing::info!(pool = %link.key().pool, pod = %link.key().pod, serving, "pod health changed");
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
