//! What the audit log says of a peer that was refused.

use std::net::SocketAddr;

use spillway_core::identity::SpiffeId;
use spillway_runtime::audit::Denial;
use spillway_runtime::tls::PeerError;

use crate::failure::Failure;

/// A call that was refused for who called. Of what the caller says, only the request's id is taken over.
pub fn denial(
    id: &SpiffeId,
    failure: &Failure,
    action: &'static str,
    request_id: &str,
    address: Option<SocketAddr>,
) -> Denial {
    Denial {
        id: Some(id.to_string()),
        action: Some(action),
        code: failure.code().into(),
        reason: reason(failure),
        request_id: (!request_id.is_empty()).then(|| request_id.to_owned()),
        address,
        ..Denial::default()
    }
}

/// A connection that did not come to be because of the certificate.
pub fn no_connection(error: PeerError, address: SocketAddr) -> Denial {
    let failure = Failure::Untrusted(error);
    Denial { code: failure.code().into(), reason: reason(&failure), address: Some(address), ..Denial::default() }
}

fn reason(failure: &Failure) -> Option<&'static str> {
    match failure {
        Failure::Untrusted(error) => Some(error.reason()),
        _ => None,
    }
}
