//! What the key of a DNS node opens: it faces the Internet, and is no control node.

use std::time::Duration;

use spillway_core::identity::ExpectedPeer;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_proto::control::distribution_client::DistributionClient;
use spillway_proto::control::evidence_client::EvidenceClient;
use spillway_proto::control::{
    ApplyRequest, BundleRequest, CreateTokenRequest, FromNode, Hello, RollbackRequest, from_node,
};
use spillway_runtime::dial::dial;
use spillway_runtime::tls::Workload;
use tonic::{Code, Request};

use crate::support::{Domain, files, in_the_name_of, refused, region};

const DNS: &str = "region/us/dns/d-0";
const ALICE: &str = "spiffe://spillway.test/operator/alice";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_node_follows_and_renews_and_speaks_for_nobody() {
    let domain = Domain::issuing(Duration::from_secs(600));
    let node = domain.alone().await;
    let workload = Workload::load(&domain.identity(DNS)).unwrap();
    let control = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
    let channel = dial(&workload, control, &node.address.to_string(), Duration::from_secs(5)).await.unwrap();

    let mut intent = domain.caller(DNS, &node).await;
    let apply: Request<ApplyRequest> = in_the_name_of(ALICE, files(&[region("eu")]));
    let (code, word, _) = refused(intent.apply(apply).await);
    assert_eq!((code, &*word), (Code::PermissionDenied, "not-allowed"));
    let rollback = RollbackRequest { version: 1, message: String::new() };
    assert_eq!(refused(intent.rollback(in_the_name_of(ALICE, rollback)).await).0, Code::PermissionDenied);
    let shared = EvidenceClient::new(channel.clone()).share(futures_util::stream::pending()).await;
    assert_eq!(shared.err().map(|status| status.code()), Some(Code::PermissionDenied));

    let hello = || {
        let hello = FromNode { message: Some(from_node::Message::Hello(Hello::default())) };
        futures_util::StreamExt::chain(futures_util::stream::iter([hello]), futures_util::stream::pending())
    };
    let mut distribution = DistributionClient::new(channel.clone());
    let mut as_another = Request::new(hello());
    let gateway = "spiffe://spillway.test/region/us/gateway/g";
    as_another.metadata_mut().insert("x-spillway-node", gateway.parse().unwrap());
    let followed = distribution.follow(as_another).await;
    assert_eq!(followed.err().map(|status| status.code()), Some(Code::PermissionDenied));
    assert!(distribution.follow(hello()).await.is_ok(), "as itself");

    let mut authority = AuthorityClient::new(channel);
    assert!(authority.bundle(BundleRequest {}).await.is_ok());
    let order = CreateTokenRequest { id: gateway.into(), ..CreateTokenRequest::default() };
    assert_eq!(refused(authority.create_token(order).await).0, Code::PermissionDenied);
    node.stop().await;
}
