//! One root follows another, under load.

use std::time::Instant;

use spillway_core::identity::TrustDomain;
use spillway_figures::{Goal, record};
use spillway_proto::control::rotate_request::Act;
use spillway_proto::control::{RotateRequest, Rotation};
use spillway_runtime::authority::Authority as Signer;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::Upstream;

use super::load::Traffic;
use super::stand::{GATEWAY, HOUR, OPERATOR, Port, SECOND, SIDECAR, Stand, eventually, id, issue};

async fn rotate(stand: &Stand, act: Act, root: &str) -> Result<Rotation, tonic::Status> {
    // Of the control node's own bundle and of a leaf that is good in every stage.
    let identity = stand.issued(OPERATOR);
    let mut client = stand.client(&identity).await;
    client.rotate(RotateRequest { act: act.into(), root: root.into() }).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_under_load_and_no_request_fails() {
    let (life, notice) = (6 * SECOND, 2 * SECOND);
    let stand = Stand::start(life, notice).await;
    let traffic = Traffic::start(&stand, life).await;
    let stray = issue(&stand.signer, GATEWAY, HOUR, &stand.folder.path().join("stray"));
    let refused = rotate(&stand, Act::Announce, "").await.unwrap_err();
    assert!(refused.message().starts_with("argument"), "there is no other root: {refused}");
    let next = Signer::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    next.save(stand.folder.path().join("authority/next")).unwrap();
    let announced = rotate(&stand, Act::Announce, &next.root_id().to_string()[..8]).await.unwrap();
    assert_eq!((announced.stage.as_str(), announced.other.as_str()), ("announced", &*next.root_id().to_string()));
    let again = rotate(&stand, Act::Announce, "").await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::FailedPrecondition);
    let bundle = |node: &super::stand::Node| std::fs::read_to_string(&node.identity.trust_bundle).unwrap();
    let both = |text: &str| text.contains(next.trust_bundle()) && text.contains(stand.signer.trust_bundle());
    eventually("nodes trust both", || both(&bundle(&traffic.gateway)) && both(&bundle(&traffic.sidecar))).await;
    assert_eq!(stand.signer.root_id().to_string(), announced.signs, "the old root still signs");
    eventually("the new root signs", || stand.counted("spillway_authority_stage{stage=\"signing\"} 1")).await;
    eventually("the old root is retired", || {
        let settled = stand.counted("spillway_authority_stage{stage=\"settled\"} 1");
        let old = |node| bundle(node).contains(stand.signer.trust_bundle());
        settled && !old(&traffic.gateway) && !old(&traffic.sidecar)
    })
    .await;
    // Whoever comes with a leaf of the old root is a stranger now, although it has not expired.
    let served = traffic.served.clone();
    let port = Port::of_server(&traffic.sidecar.workload, &served).await;
    let stranger = Workload::load(&stray).unwrap();
    std::fs::write(&stray.trust_bundle, next.trust_bundle()).unwrap();
    assert!(stranger.reload().unwrap());
    let deadline = Instant::now() + 15 * SECOND;
    // The file has changed; the sidecar looks at it twice a second.
    while Upstream::new(stranger.clone(), port.address, id(SIDECAR)).connect().await.is_ok() {
        assert!(Instant::now() < deadline, "a leaf of the retired root is let in");
        tokio::time::sleep(SECOND / 10).await;
    }
    let good = Upstream::new(traffic.gateway.workload.clone(), port.address, id(SIDECAR));
    good.connect().await.unwrap();
    let (gateway, sidecar) = (traffic.gateway.renewed(), traffic.sidecar.renewed());
    let served = traffic.finish().await;
    record("control.root_replaced.requests", served as f64, "requests", Goal::AtLeast(1.0));
    record("control.root_replaced.renewals", (gateway + sidecar) as f64, "renewals", Goal::AtLeast(4.0));
    assert!(gateway >= 2 && sidecar >= 2);
}

#[tokio::test]
async fn an_announced_root_can_be_withdrawn_and_nobody_but_operators_rotates() {
    let stand = Stand::start(HOUR, HOUR).await;
    let next = Signer::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    next.save(stand.folder.path().join("authority/next")).unwrap();
    assert!(rotate(&stand, Act::Withdraw, "").await.unwrap_err().message().starts_with("rotation"));
    let announced = rotate(&stand, Act::Announce, "").await.unwrap();
    assert_eq!((announced.stage.as_str(), announced.ready.len()), ("announced", 2));
    assert!(announced.next_stage_unix_ms > 0);
    assert!(stand.authority.bundle().unwrap().contains(next.trust_bundle()));
    let withdrawn = rotate(&stand, Act::Withdraw, "").await.unwrap();
    assert_eq!((withdrawn.stage.as_str(), withdrawn.next_stage_unix_ms), ("settled", 0));
    assert_eq!(stand.authority.bundle().unwrap(), stand.signer.trust_bundle());
    let mut gateway = stand.client(&stand.issued(GATEWAY)).await;
    let refused = gateway.rotate(RotateRequest { act: Act::Announce.into(), root: String::new() }).await.unwrap_err();
    assert_eq!(refused.message(), "not-an-operator");
    assert_eq!(stand.audited(&["\"event\":\"denied\"", "not-an-operator", "gw-0"]).await, 1);
    assert_eq!(stand.audited(&["\"event\":\"roots-changed\"", "\"stage\":\"announced\"", "operator/ada"]).await, 1);
}

#[tokio::test]
async fn a_node_that_starts_anew_goes_on_with_the_roots_of_the_store() {
    let stand = Stand::start(HOUR, HOUR).await;
    let next = Signer::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    next.save(stand.folder.path().join("authority/next")).unwrap();
    rotate(&stand, Act::Announce, "").await.unwrap();
    let again = stand.open_again(true).await;
    assert_eq!(again.bundle().unwrap(), stand.authority.bundle().unwrap());
    // Without the store it cannot know which of the two is trusted, and says nothing rather than something wrong.
    let alone = stand.open_again(false).await;
    assert_eq!(alone.bundle().unwrap_err().reason(), "no-signer");
}
