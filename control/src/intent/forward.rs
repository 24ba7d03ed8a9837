//! The way to the leader, for what only it may do.
//!
//! The rule: one hop. The leader believes a control node's word for who asked, and nobody else's.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::{ExpectedPeer, SpiffeId};
use spillway_proto::control::intent_client::IntentClient;
use spillway_runtime::dial::dial;
use spillway_runtime::telemetry::Chain;
use spillway_runtime::tls::Workload;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;

use crate::store::Leader;

/// The operator's SPIFFE id, set by the control node that was asked.
pub const OPERATOR: &str = "spillway-operator";
const DIAL: Duration = Duration::from_secs(2);

/// Connects to the leader; `None`, and why in the log, if it cannot be reached.
pub async fn to(leader: &Leader, workload: &Arc<Workload>) -> Option<IntentClient<Channel>> {
    let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
    match dial(workload, expected, &leader.address, DIAL).await {
        // What is asked for was let in here, and an answer can have it twice.
        Ok(channel) => Some(IntentClient::new(channel).max_decoding_message_size(usize::MAX)),
        Err(error) => {
            let (leader, error) = (leader.node.as_str(), Chain(&error));
            tracing::warn!(leader, %error, "the leader cannot be reached");
            None
        }
    }
}

/// A request in an operator's name.
pub fn on_behalf<T>(author: &SpiffeId, message: T, within: Duration) -> Request<T> {
    let mut request = Request::new(message);
    // An id is printable ASCII.
    if let Ok(author) = author.to_string().parse::<MetadataValue<Ascii>>() {
        request.metadata_mut().insert(OPERATOR, author);
    }
    request.set_timeout(within);
    request
}
