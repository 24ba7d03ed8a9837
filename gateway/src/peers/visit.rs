//! Who comes over a connection that is no client's: another region's gateway with a client's request, or a prober.
//!
//! The rule: what such a peer says counts only by its role, and only for unary inference over gRPC; a prober may ask
//! whether the region is ready, too, which it does where there is no model to ask. What is not exactly
//! a forwarded request or a probe is refused as if these did not exist. From clients both headers mean nothing.

use std::time::SystemTime;

use http::{HeaderMap, HeaderValue};
use spillway_core::failover::{Arrival, NoPassage};
use spillway_core::identity::Role;
use spillway_core::limit::Class;
use spillway_core::policy::{Denied, Principal};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::forwarding::{self, FORWARDED, PROBE};

use crate::downstream::connection::Caller;
use crate::errors::Refusal;
use crate::pods::attempt::INFER;
use crate::shared::Shared;

/// Whose request it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Visit {
    /// Of the connection's own peer.
    #[default]
    Client,
    /// Of a client of another region, whose limits it has passed there.
    Forwarded { from: Name, class: Class },
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
        Role::Control { .. } => false,
        _ => return Ok(None),
    };
    if asked == Asked::Other {
        return Ok(None);
    }
    let may_forward = is_gateway && asked == Asked::Infer;
    match (headers.get(FORWARDED).filter(|_| may_forward), headers.get(PROBE)) {
        (None, Some(probe)) if probe.as_bytes() == b"1" => Ok(Some(Visitor::Prober)),
        (Some(token), None) => forwarded(shared, snapshot, caller, token).map(Some),
        (Some(_), Some(_)) => Err(Denied::NotAClient.into()),
        (None, _) => Ok(None),
    }
}

fn forwarded(shared: &Shared, snapshot: &Snapshot, caller: &Caller, token: &HeaderValue) -> Result<Visitor, Refusal> {
    let token = token.to_str().map_err(|_| NoPassage::Unreadable)?;
    let passage = forwarding::read(token, &caller.peer)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let arrival = Arrival { snapshot, region: &shared.region, sender: &caller.peer.id, path: INFER, now };
    let principal = passage.admit(&arrival)?;
    let visit = Visit::Forwarded { from: passage.from, class: passage.class };
    Ok(Visitor::Forwarded { visit, principal, request_id: HeaderValue::from_str(&passage.request_id).ok() })
}
