//! What a gateway's audit log says.

use std::path::PathBuf;

use crate::support::*;
use serde_json::Value;
use spillway_runtime::audit::{HeadToCheck, verify};

const REVOKED: &str = "spiffe://spillway.test/tenant/acme/client/web";

/// The records of a log that is whole.
fn records(path: &std::path::Path) -> Vec<Value> {
    let report = verify(&[PathBuf::from(path)], &HeadToCheck::Beside, |_, found| panic!("{found:?}")).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(report.records, records.len() as u64);
    records
}

#[tokio::test]
async fn denials_and_changes_leave_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let world = World::with(&format!("audit: {}", path.display())).await;
    let infer = "/v2/models/double/versions/1/infer";
    let globex = world.client("globex");
    let connect = async || Http1::connect(world.gateway.https, &globex).await.unwrap();
    for _ in 0..3 {
        let answer = connect().await.exchange(&h1_request("POST", infer, &["x-request-id: r-1"], b"{}")).await;
        assert_eq!((answer.status, answer.header("spillway-error")), (403, "not-allowed"));
    }
    let answer = connect().await.exchange(&h1_request("GET", "/v2/models/wide", &[], b"")).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (403, "not-allowed"));
    let mut initech = Http1::connect(world.gateway.https, &world.client("initech")).await.unwrap();
    assert_eq!(initech.exchange(&h1_request("GET", "/v2", &[], b"")).await.header("spillway-error"), "unknown-tenant");
    let answer = world.http1().await.exchange(&h1_request("POST", "/v2/repository/index", &[], b"")).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (403, "not-offered"));
    // What is refused for other reasons is no matter of rights.
    let answer = world.http1().await.exchange(&h1_request("POST", infer, &[], b"{}")).await;
    assert_eq!(answer.status, 400);

    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
    assert!(answers.next().await.is_some());
    let policy = "kind: AccessPolicy\nmetadata: { name: globex }";
    let revocation = format!(
        "kind: Revocation\nmetadata: {{ name: stolen }}\nspec: {{ ids: [\"{REVOKED}\"], reason: stolen }}\n---\n\
         apiVersion: spillway/v1\n{policy}"
    );
    world.publish(2, &[(policy, &revocation)]).await;
    until("a new connection is refused", async || !world.lets_in("acme").await).await;
    stream.send_data(request("double", "1", "a"), false).unwrap();
    assert_eq!(answers.status().await, ("7".into(), "untrusted-certificate".into()));
    world.stop().await;

    let records = records(&path);
    let events: Vec<&str> = records.iter().filter_map(|record| record["event"].as_str()).collect();
    assert_eq!((events[0], events[1], events.last()), ("started", "snapshot-accepted", Some(&"stopped")));
    let of = |event: &str| records.iter().filter(|record| record["event"] == event).collect::<Vec<_>>();
    assert_eq!(of("started")[0]["id"], GATEWAY);
    assert_eq!(of("snapshot-accepted")[1]["version"], 2);
    assert_eq!((&of("revocations-changed")[0]["ids"], of("certificate-changed").len()), (&1.into(), 1));
    let denied = |code: &str, model: Option<&str>| {
        let is = |record: &&&Value| record["code"] == code && record["model"].as_str() == model;
        let denied = of("denied");
        (*denied.iter().find(is).unwrap_or_else(|| panic!("{code} {model:?} in {denied:?}"))).clone()
    };
    let record = denied("not-allowed", Some("double"));
    for (field, value) in [
        ("tenant", "globex"),
        ("client", "web"),
        ("id", "spiffe://spillway.test/tenant/globex/client/web"),
        ("version", "1"),
        ("action", "infer"),
        ("request_id", "r-1"),
    ] {
        assert_eq!(record[field], value, "{field}");
    }
    assert!(record["address"].as_str().unwrap().starts_with("127.0.0.1:"));
    let count = |model: &str| {
        let of_it = of("denied").into_iter().filter(|record| record["model"] == model);
        of_it.map(|record| record["count"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((count("double"), count("wide")), (3 + 1, 1));
    assert_eq!(denied("not-allowed", Some("wide"))["action"], "metadata");
    assert_eq!(denied("unknown-tenant", None)["tenant"], "initech");
    assert_eq!(denied("not-offered", None)["tenant"], "acme");
    // Of the open stream, and of the connection that was refused.
    let record = denied("untrusted-certificate", Some("double"));
    assert_eq!((&record["id"], &record["reason"]), (&REVOKED.into(), &"revoked".into()));
    let refused: Vec<_> = of("denied").into_iter().filter(|record| record["id"].is_null()).collect();
    assert!(!refused.is_empty() && refused.iter().all(|record| record["reason"] == "revoked"), "{refused:?}");
    assert!(of("denied").iter().all(|record| record["code"] != "missing-input"));
}
