//! What a sidecar's audit log says.

use std::path::PathBuf;
use std::time::Duration;

use crate::support::pod::{Client, Pod, joined_model, resources};
use spillway_core::identity::TrustDomain;
use spillway_proto::feature::PutRequest;
use spillway_proto::feature::feature_service_client::FeatureServiceClient;
use spillway_proto::inference::ServerLiveRequest;
use spillway_runtime::audit::{HeadToCheck, verify};
use spillway_runtime::authority::Authority;
use tonic::Request;

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_are_refused_leave_records() {
    let resources = resources(&joined_model("phishing", "  backend: onnx"));
    let pod = Pod::start(&resources, "audit: FOLDER/audit.log\n").await.ready().await;
    let stranger = "spiffe://spillway.test/tenant/acme/client/web";
    let mut client = Client::new(pod.connect(stranger).await);
    let mut request = Request::new(ServerLiveRequest {});
    request.metadata_mut().insert("x-request-id", "r-1".parse().unwrap());
    assert!(client.server_live(request).await.is_err());
    let control = pod.connect("spiffe://spillway.test/region/us/control/c-0").await;
    assert!(FeatureServiceClient::new(control).put(PutRequest::default()).await.is_err());

    let other = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    pod.trust(&[&other]);
    pod.assert_metric("spillway_identity_reloads_total{outcome=\"accepted\"} 1").await;
    let mut leaves = Client::new(pod.connect_from(&other, crate::support::pod::GATEWAY).await);
    assert!(leaves.server_live(ServerLiveRequest {}).await.is_ok());
    pod.trust(&[]);
    pod.assert_metric("spillway_identity_reloads_total{outcome=\"accepted\"} 2").await;
    assert!(leaves.server_live(ServerLiveRequest {}).await.is_err(), "its open connection");
    // It loses this connection within a second, and gets no other.
    while !pod.metrics().await.contains("spillway_sidecar_connections_refused_total{reason=\"untrusted\"}") {
        assert!(leaves.server_live(ServerLiveRequest {}).await.is_err());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let folder = pod.stop().await;
    let path = folder.path().join("audit.log");
    let report = verify(&[PathBuf::from(&path)], &HeadToCheck::Beside, |_, found| panic!("{found:?}")).unwrap();
    assert_eq!(report.faults, 0);
    let text = std::fs::read_to_string(&path).unwrap();
    let records: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<&str> = records.iter().filter_map(|record| record["event"].as_str()).collect();
    assert_eq!((events.first(), events.last()), (Some(&"started"), Some(&"stopped")));
    assert_eq!(events.iter().filter(|event| **event == "certificate-changed").count(), 3);
    let denied = |code: &str, id: Option<&str>| {
        let is = |record: &&serde_json::Value| record["code"] == code && record["id"].as_str() == id;
        records.iter().find(is).unwrap_or_else(|| panic!("{code} {id:?} in {text}"))
    };
    let record = denied("not-a-gateway", Some(stranger));
    assert_eq!((&record["action"], &record["request_id"]), (&"infer".into(), &"r-1".into()));
    let record = denied("permission-denied", Some("spiffe://spillway.test/region/us/control/c-0"));
    assert_eq!(record["action"], "features");
    assert_eq!(denied("untrusted", Some(crate::support::pod::GATEWAY))["reason"], "untrusted");
    let record = denied("untrusted", None);
    assert!(record["address"].as_str().unwrap().starts_with("127.0.0.1:"));
}
