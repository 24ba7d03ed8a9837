//! Stale answers replaced in the background.
//!
//! The rule: a refresh is a call of the request that caused it, with its rights, its Snapshot and the
//! model's own deadline; there are no more of them than a bound, and one at a time for a key. It is
//! recorded like a request, with the method `refresh`.

use std::sync::Arc;

use bytes::Bytes;
use spillway_core::inference::Entities;
use spillway_core::limit::Class;
use spillway_runtime::oip::FRAME_HEADER;
use tokio::time::Instant;

use super::look::Look;
use super::permit::{Fresh, Permit};
use crate::admission::Guest;
use crate::edge::Asking;
use crate::exchange::{Exchange, Protocol};
use crate::pods::call::PodCall;
use crate::pods::lane::Lane;
use crate::prediction::fetch;

/// Nobody waits for a refresh: it is the first to go.
pub const CLASS: Class = Class::Low;

/// Fetches the next answer for a request that was given a stale one.
pub fn start(
    exchange: &Exchange,
    asking: &Asking,
    lane: &Arc<Lane>,
    guest: &Guest,
    entities: &Entities,
    frame: Vec<Bytes>,
    permit: Permit,
) {
    let shared = exchange.shared.clone();
    let metrics = shared.results.metrics.clone();
    let Ok(place) = shared.results.refreshes.clone().try_acquire_owned() else {
        return metrics.refreshed("busy");
    };
    let mut own = Exchange::begin(shared.clone());
    own.protocol = Protocol::Grpc;
    own.route = "refresh";
    own.principal.clone_from(&exchange.principal);
    own.request_id.clone_from(&exchange.request_id);
    own.trace_id.clone_from(&exchange.trace_id);
    own.model.clone_from(&exchange.model);
    own.version.clone_from(&exchange.version);
    if let Err(refusal) = own.keep(frame.iter().map(Bytes::len).sum()) {
        own.refuse(&refusal);
        return metrics.refreshed("memory");
    }
    let guest = Guest { class: CLASS, ..guest.clone() };
    let (lane, entities, trace) = (lane.clone(), entities.clone(), asking.trace.clone());
    tokio::spawn(async move {
        let _place = place;
        let results = &shared.results;
        let until = Instant::now() + lane.model.deadline;
        let permit = match results.look_again(permit, until.into_std(), &mut own.cached).await {
            Look::Ask(permit) => permit,
            Look::Kept(..) => {
                own.succeed();
                return metrics.refreshed("l2");
            }
        };
        let call = PodCall { shared: &shared, lane: &lane, entities: &entities, frame: &frame, until, trace };
        match fetch(&shared, &mut own, &guest, call).await {
            Ok(fetched) => {
                let fresh = Fresh {
                    message: fetched.frame.get(FRAME_HEADER..).unwrap_or_default(),
                    making: &own.making,
                    took: own.upstream,
                };
                permit.keep(results, &fresh, &mut own.cached);
                own.succeed();
                metrics.refreshed("ok");
            }
            Err(refusal) => {
                // Who asked has a stale answer already.
                let _ = permit.fail(results, &refusal, &mut own.cached);
                own.refuse(&refusal);
                metrics.refreshed("failed");
            }
        }
    });
}
