//! The audit trail over the port: one place for what all leaders recorded.

use std::time::{Duration, SystemTime};

use serde_json::Value;
use spillway_proto::control::r#override::Act;
use spillway_proto::control::{AuditRequest, Override};
use tonic::Code;

use crate::cluster::Cluster;
use crate::followers::two;
use crate::support::{Client, Domain, apply, eventually, refused, region};

async fn newest(client: &mut Client, limit: u32) -> Vec<Value> {
    let records = client.audit(AuditRequest { limit }).await.unwrap().into_inner().records;
    records.iter().map(|record| serde_json::from_str(record).unwrap()).collect()
}

/// Until the newest record is of that event.
async fn until_newest(client: &mut Client, event: &str) -> Vec<Value> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    loop {
        let records = newest(client, 0).await;
        if records.first().is_some_and(|record| record["event"] == event) {
            return records;
        }
        assert!(tokio::time::Instant::now() < deadline, "no {event}: {records:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_did_is_told_by_every_node_and_after_its_leaders_end() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let mut alice = domain.alice(&follower).await;
    apply(&mut alice, &[region("eu"), region("us")]).await;
    let until = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + Duration::from_secs(60);
    let until_unix_ms = i64::try_from(until.as_millis()).unwrap();
    let act = Some(Act::Drain(true));
    let order = Override { region: "eu".into(), act, until_unix_ms, reason: "floods".into(), ..Default::default() };
    alice.set_override(order.clone()).await.unwrap();
    let records = until_newest(&mut alice, "override-set").await;
    let set = &records[0];
    assert_eq!((&set["region"], &set["act"], &set["reason"]), (&"eu".into(), &"drain".into(), &"floods".into()));
    assert_eq!(set["author"], "spiffe://spillway.test/operator/alice");
    assert_eq!(set["node"], "c-0", "the leader recorded it");
    let logged = &leader.audited("override-set")[0];
    assert_eq!((&set["time"], &set["until"]), (&logged["time"], &logged["until"]), "as in its log");
    assert!(follower.audited("override-set").is_empty());
    assert_eq!(newest(&mut alice, 1).await, records[..1]);
    assert_eq!(newest(&mut domain.alice(&leader).await, 0).await, records);

    let nowhere = Override { region: "mars".into(), ..order };
    alice.set_override(nowhere).await.unwrap_err();
    let records = until_newest(&mut alice, "intent-refused").await;
    assert!(records[0]["problem"].as_str().unwrap().contains("mars"), "{records:?}");
    for path in ["operator/mallory", "region/eu/control/c-9"] {
        let refusal = refused(domain.caller(path, &follower).await.audit(AuditRequest::default()).await);
        assert_eq!((refusal.0, &*refusal.1), (Code::PermissionDenied, "not-an-operator"), "{path}");
    }

    // The last record of one leader is there before the next leads.
    leader.stop().await;
    eventually("the follower leads", || follower.parts.leading.fence().is_some()).await;
    let leads = |record: &Value| (record["node"].clone(), record["leads"].clone());
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    let records = loop {
        let records = newest(&mut alice, 0).await;
        if leads(&records[0]) == ("c-1".into(), true.into()) {
            break records;
        }
        assert!(tokio::time::Instant::now() < deadline, "{records:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(leads(&records[1]), ("c-0".into(), false.into()));
    assert!(records.iter().any(|record| record["event"] == "override-set"), "{records:?}");
    assert!(records.is_sorted_by(|later, earlier| later["time"].as_str() >= earlier["time"].as_str()), "{records:?}");
    follower.stop().await;
}
