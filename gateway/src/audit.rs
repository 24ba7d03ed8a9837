//! What the audit log says of a caller that was refused.

use std::net::SocketAddr;

use http::HeaderValue;
use spillway_core::identity::Role;
use spillway_runtime::audit::Denial;
use spillway_runtime::tls::PeerError;

use crate::errors::{Answer, Refusal};
use crate::exchange::Exchange;

/// A request that was refused for what its caller is, or may not do.
pub fn denial(exchange: &Exchange, refusal: &Refusal, answer: &Answer) -> Denial {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let id = exchange.caller.as_ref().map(|caller| &caller.peer.id);
    let (tenant, client) = match id.map(|id| &id.role) {
        Some(Role::Client { tenant, name }) => (some(tenant.as_str()), some(name.as_str())),
        // Of a request that another region's gateway sent.
        _ => exchange
            .principal
            .as_ref()
            .map_or((None, None), |principal| (some(principal.tenant.as_str()), some(principal.client.as_str()))),
    };
    Denial {
        tenant,
        client,
        id: id.map(ToString::to_string),
        model: some(&exchange.model),
        version: some(&exchange.version),
        action: action(exchange.route),
        code: answer.code.clone().into_owned(),
        reason: match refusal {
            Refusal::Untrusted(error) => Some(error.reason()),
            _ => None,
        },
        request_id: exchange.request_id.as_ref().map(HeaderValue::to_str).and_then(|id| some(id.ok()?)),
        address: exchange.caller.as_ref().map(|caller| caller.address),
    }
}

/// A connection that did not come to be because of the certificate.
pub fn no_connection(error: &PeerError, address: SocketAddr) -> Denial {
    let code = Refusal::Untrusted(error.clone()).answer().code.into_owned();
    Denial { code, reason: Some(error.reason()), address: Some(address), ..Denial::default() }
}

/// What policies call that which a route is for.
fn action(route: &str) -> Option<&'static str> {
    match route {
        "infer" | "stream-infer" | "forwarded" => Some("infer"),
        "model-metadata" | "model-ready" => Some("metadata"),
        _ => None,
    }
}
