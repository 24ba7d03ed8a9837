use std::sync::Arc;
use std::time::Duration;

use spillway_core::resource::parse;

use super::*;
use crate::audit::Audit;
use crate::drain::Drain;
use crate::file::write_atomic;
use crate::fixture::eventually;
use crate::telemetry::Metrics;

const RESOURCES: &str = "\
apiVersion: spillway/v1
kind: Region
metadata: {name: eu}
spec: {trustDomain: spillway.test}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {name: acme}
";

fn resources(more_tenants: &[&str]) -> Vec<Resource> {
    let mut text = RESOURCES.to_owned();
    for tenant in more_tenants {
        text += &format!("---\napiVersion: spillway/v1\nkind: Tenant\nmetadata: {{name: {tenant}}}\n");
    }
    parse(&text).unwrap()
}

fn sealed(version: u64, more_tenants: &[&str]) -> Vec<u8> {
    seal(&resources(more_tenants), version)
}

/// A file sealed rightly around whatever bytes.
fn sealed_bytes(snapshot: Vec<u8>) -> Vec<u8> {
    let sha256 = Sha256::digest(&snapshot).to_vec().into();
    control::SealedSnapshot { snapshot: snapshot.into(), sha256 }.encode_to_vec()
}

struct Followed {
    folder: tempfile::TempDir,
    metrics: Metrics,
    subscription: Arc<Subscription>,
}

impl Followed {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let metrics = Metrics::new("test");
        write_atomic(&folder.path().join("snapshot"), &sealed(5, &[]), 0o644).unwrap();
        let subscription =
            Arc::new(Subscription::start(folder.path().join("snapshot"), &metrics, &Audit::off()).unwrap());
        Self { folder, metrics, subscription }
    }

    fn write(&self, content: &[u8]) {
        write_atomic(&self.folder.path().join("snapshot"), content, 0o644).unwrap();
    }

    fn shows(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().contains(&format!("\nspillway_snapshot_{line}\n"))
    }
}

#[test]
fn what_is_sealed_opens_as_itself() {
    let one = sealed(7, &["globex"]);
    let snapshot = open(&one).unwrap();
    assert_eq!(snapshot, Snapshot::compile(7, &resources(&["globex"])).unwrap());
    let mut turned = resources(&["globex"]);
    turned.reverse();
    assert_eq!(seal(&turned, 7), one);
}

#[test]
fn t62_a_file_that_is_not_wholly_right_is_refused_with_its_reason() {
    let good = sealed(7, &[]);
    let region = control::Resource { kind: "Region".into(), name: "eu".into(), spec_json: "{}".into() };
    let bad = control::Snapshot { version: 9, resources: vec![region] }.encode_to_vec();
    let stranger = control::Resource { kind: "Comet".into(), name: "x".into(), spec_json: "{}".into() };
    let unknown = control::Snapshot { version: 9, resources: vec![stranger] }.encode_to_vec();
    for (content, reason) in [
        (Vec::new(), "malformed"),
        (b"kind: Region".to_vec(), "malformed"),
        (good[..good.len() - 1].to_vec(), "malformed"),
        (sealed_bytes(Vec::new()), "malformed"),
        (sealed_bytes(vec![0xff; 32]), "malformed"),
        (sealed_bytes(bad), "invalid"),
        (sealed_bytes(unknown), "invalid"),
        (seal(&[], 9), "invalid"),
    ] {
        let refused = open(&content).map(|_| ()).unwrap_err();
        assert_eq!(refused.reason(), reason, "{refused}");
    }
    for at in 0..good.len() {
        let mut flipped = good.clone();
        flipped[at] ^= 1;
        assert!(open(&flipped).is_err(), "byte {at}");
    }
}

#[tokio::test]
async fn a_new_file_is_taken_and_told() {
    let followed = Followed::start();
    let mut changed = followed.subscription.changed();
    let before = followed.subscription.current();
    let drain = Drain::new(Duration::ZERO);
    let watch = tokio::spawn(followed.subscription.clone().watch(drain.clone()));
    followed.write(&sealed(6, &["globex"]));
    tokio::time::timeout(Duration::from_secs(10), changed.changed()).await.unwrap().unwrap();
    assert_eq!(*changed.borrow(), 6);
    let now = followed.subscription.current();
    assert_eq!((before.version, now.version, now.tenants.len()), (5, 6, 2));
    assert!(followed.shows("version 6") && followed.shows("accepted_total 2"));
    drain.stop();
    watch.await.unwrap();
}

#[tokio::test]
async fn t61_t63_what_is_refused_is_counted_and_the_last_good_one_stays() {
    let followed = Followed::start();
    let drain = Drain::new(Duration::ZERO);
    let watch = tokio::spawn(followed.subscription.clone().watch(drain.clone()));
    let rejected = |reason: &str, count: u32| {
        let line = format!("rejected_total{{reason=\"{reason}\"}} {count}");
        followed.shows(&line)
    };
    followed.write(&sealed(4, &["globex"]));
    eventually("an older version is refused", || rejected("version", 1)).await;
    followed.write(&sealed(5, &["globex"]));
    eventually("the same version with other content is refused", || rejected("version", 2)).await;
    let whole = sealed(6, &["globex"]);
    followed.write(&whole[..whole.len() / 2]);
    eventually("a truncated file is refused", || rejected("malformed", 1)).await;
    std::fs::remove_file(followed.folder.path().join("snapshot")).unwrap();
    eventually("a missing file is told", || rejected("unreadable", 1)).await;
    let serving = followed.subscription.current();
    assert_eq!((serving.version, serving.tenants.len()), (5, 1));
    // The same as what is served is no change, and a good one is taken after all.
    followed.write(&sealed(5, &[]));
    followed.write(&whole);
    eventually("the whole file is taken", || followed.subscription.load().version == 6).await;
    assert!(rejected("version", 2) && rejected("malformed", 1) && rejected("unreadable", 1));
    drain.stop();
    watch.await.unwrap();
}

#[test]
fn a_bad_file_at_start_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    let start = || Subscription::start(&path, &Metrics::new("test"), &Audit::off()).map(|_| ()).unwrap_err();
    assert_eq!(start().reason(), "unreadable");
    std::fs::write(&path, b"").unwrap();
    assert_eq!(start().reason(), "malformed");
    let mut content = sealed(5, &[]);
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &content).unwrap();
    assert_eq!(start().reason(), "checksum");
}
