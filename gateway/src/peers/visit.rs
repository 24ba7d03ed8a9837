//! Who comes over a connection that is no client's: another region's gateway with a client's request, or a prober.
//!
//! The rule: what such a peer says counts only by its role, and only for inference over gRPC; a prober asks for unary one, or
//! whether the region is ready, too, which it does where there is no model to ask. What is not exactly
//! a forwarded request or a probe is refused as if these did not exist. From clients both headers mean nothing.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};
use spillway_core::failover::{Arrival, NoPassage, Passage};
use spillway_core::identity::Role;
use spillway_core::policy::{Denied, Principal};
use spillway_core::snapshot::Snapshot;
use spillway_runtime::forwarding::{self, FORWARDED, PROBE};

use crate::downstream::connection::Caller;
use crate::errors::Refusal;
use crate::pods::attempt::{INFER, STREAM_INFER};
use crate::shared::Shared;

/// Whose request it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Visit {
    /// Of the connection's own peer.
    #[default]
    Client,
    /// Of a client of another region, whose limits it has passed there.
    Forwarded(Box<Passage>),
    /// Of nobody: it asks whether the region can answer.
    Probe,
}

/// A visitor, and on whose behalf it comes.
#[derive(Debug)]
pub enum Visitor {
    Forwarded { visit: Visit, principal: Principal, request_id: Option<HeaderValue> },
    Prober,
}

/// What is asked for, as far as such peers may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Infer,
    Stream,
    Ready,
    Other,
}

/// `None`: it is a client, or as good as one.
pub fn receive(
    shared: &Shared,
    snapshot: &Snapshot,
    caller: &Caller,
    headers: &HeaderMap,
    asked: Asked,
) -> Result<Option<Visitor>, Refusal> {
    let is_gateway = match &caller.peer.id.role {
        Role::Gateway { .. } => true,
        Role::Control { .. } | Role::Dns { .. } => false,
        Role::Sidecar { .. }
        | Role::Injector { .. }
        | Role::Loader { .. }
        | Role::Client { .. }
        | Role::Operator { .. } => return Ok(None),
    };
    if asked == Asked::Other {
        return Ok(None);
    }
    let path = match asked {
        Asked::Infer => Some(INFER),
        Asked::Stream => Some(STREAM_INFER),
        Asked::Ready | Asked::Other => None,
    };
    let forwarded = headers.get(FORWARDED).zip(path).filter(|_| is_gateway);
    match (forwarded, headers.get(PROBE)) {
        (None, Some(probe)) if probe.as_bytes() == b"1" && asked != Asked::Stream => Ok(Some(Visitor::Prober)),
        (Some((token, path)), None) => arrived(shared, snapshot, caller, token, path).map(Some),
        (Some(_), Some(_)) => Err(Denied::NotAClient.into()),
        (None, _) => Ok(None),
    }
}

/// What passages are compared with.
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn arrived(
    shared: &Shared,
    snapshot: &Snapshot,
    caller: &Caller,
    token: &HeaderValue,
    path: &str,
) -> Result<Visitor, Refusal> {
    let token = token.to_str().map_err(|_| NoPassage::Unreadable)?;
    let passage = forwarding::read(token, &caller.peer)?;
    let arrival = Arrival { snapshot, region: &shared.region, sender: &caller.peer.id, path, now: since_epoch() };
    let principal = passage.admit(&arrival)?;
    let request_id = HeaderValue::from_str(&passage.request_id).ok();
    Ok(Visitor::Forwarded { visit: Visit::Forwarded(Box::new(passage)), principal, request_id })
}
