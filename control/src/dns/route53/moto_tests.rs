//! Against moto's server.

use std::path::PathBuf;
use std::time::Instant;

use aws_sdk_route53::types::{Change, ChangeAction};
use spillway_runtime::settings::parse;

use super::*;
use crate::dns::fixture::{name, view};
use crate::dns::route53::moto::Moto;

/// A writer of a zone of its own.
struct World {
    moto: Moto,
    writer: Writer,
    keys: PathBuf,
    _folder: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        spillway_runtime::tls::install_provider();
        let moto = Moto::start().await;
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("credentials");
        std::fs::write(&keys, "[test]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
        let text = format!(
            "hostedZone: {}\nname: infer.example.com\nendpoint: {}\ncredentials: {{file: '{}', profile: test}}\n",
            moto.zone,
            moto.endpoint,
            keys.display()
        );
        let writer = Writer::new(parse(&text).unwrap(), &Metrics::new("test"));
        Self { moto, writer, keys, _folder: folder }
    }

    /// Type, region, weight and time to live of the service's sets.
    async fn sets(&self) -> Vec<(String, String, i64, i64)> {
        let sets = self.writer.list("infer.example.com.", RrType::A).await.unwrap();
        let tell = |set: &ResourceRecordSet| {
            let region = set.set_identifier().unwrap_or("-").to_owned();
            (set.r#type().as_str().to_owned(), region, set.weight().unwrap_or(-1), set.ttl().unwrap_or(-1))
        };
        let mut told: Vec<_> = sets.iter().map(tell).collect();
        told.sort();
        told
    }

    async fn change(&self, action: ChangeAction, set: ResourceRecordSet) {
        let change = Change::builder().action(action).resource_record_set(set).build().unwrap();
        let batch = ChangeBatch::builder().changes(change).build().unwrap();
        let writer = &self.writer;
        let sent = self.moto.client.change_resource_record_sets().hosted_zone_id(&writer.settings.hosted_zone);
        sent.change_batch(batch).send().await.unwrap();
    }
}

fn wanted(epoch: u64, serial: u64, weight: f64) -> Wanted {
    let mut view = view();
    view.serial = serial;
    view.regions.get_mut(&name("us-east")).unwrap().weight = weight;
    Wanted { epoch, view }
}

fn set(kind: &str, region: &str, weight: i64) -> (String, String, i64, i64) {
    (kind.into(), region.into(), weight, 30)
}

#[tokio::test]
async fn a_plan_is_written_followed_and_put_right() {
    let world = World::start().await;
    let corrected = world.writer.correct(&wanted(1, 1, 20.0)).await.unwrap();
    assert_eq!(corrected.changes, 3);
    let first = [set("A", "eu-west", 255), set("A", "us-east", 64), set("AAAA", "eu-west", 255)];
    assert_eq!(world.sets().await, first);
    assert_eq!(world.writer.correct(&wanted(1, 1, 20.0)).await.unwrap().changes, 0, "nothing is written twice");
    assert_eq!(world.writer.correct(&wanted(1, 2, 40.0)).await.unwrap().changes, 1);
    assert_eq!(world.sets().await[1], set("A", "us-east", 128));

    // Somebody helps by hand: a weight, and a set of a region that there is not.
    let found = world.writer.list("infer.example.com.", RrType::A).await.unwrap();
    let mut meddled = found.iter().find(|set| set.set_identifier() == Some("us-east")).unwrap().clone();
    meddled.weight = Some(1);
    world.change(ChangeAction::Upsert, meddled.clone()).await;
    meddled.set_identifier = Some("mars".into());
    world.change(ChangeAction::Create, meddled).await;
    assert_eq!(world.writer.correct(&wanted(1, 2, 40.0)).await.unwrap().changes, 2);
    assert_eq!(world.sets().await, [set("A", "eu-west", 255), set("A", "us-east", 128), set("AAAA", "eu-west", 255)]);

    // T66: an empty plan takes nothing away.
    let empty = Wanted { epoch: 1, view: View { serial: 3, ..View::default() } };
    assert_eq!(world.writer.correct(&empty).await.unwrap().changes, 0);
    assert_eq!(world.sets().await.len(), 3);
}

#[tokio::test]
async fn without_credentials_nothing_is_written_and_with_new_ones_it_goes_on() {
    let world = World::start().await;
    std::fs::rename(&world.keys, world.keys.with_extension("away")).unwrap();
    let refused = world.writer.correct(&wanted(1, 1, 20.0)).await.unwrap_err();
    assert!(matches!(refused, WriteError::Credentials(NoCredentials::Unreadable { .. })), "{refused:?}");
    std::fs::rename(world.keys.with_extension("away"), &world.keys).unwrap();
    assert_eq!(world.writer.correct(&wanted(1, 1, 20.0)).await.unwrap().changes, 3);
    let (corrections, outcome) = (&world.writer.metrics.corrections, |outcome| Outcome { outcome });
    let counts = ["failed", "corrected"].map(|word| corrections.get_or_create(&outcome(word)).get());
    assert_eq!((counts, world.writer.metrics.changes.get(), world.writer.metrics.plan.get()), ([1, 1], 3, 1));
}

#[tokio::test]
async fn t60_t67_a_leader_of_before_writes_nothing() {
    let world = World::start().await;
    world.writer.correct(&wanted(7, 10, 20.0)).await.unwrap();
    for (epoch, serial) in [(6, 11), (7, 9)] {
        let refused = world.writer.correct(&wanted(epoch, serial, 40.0)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Superseded(Stamp { epoch: 7, version: 10, .. })), "{refused:?}");
    }
    assert_eq!(world.sets().await[1], set("A", "us-east", 64));
    world.writer.correct(&wanted(8, 11, 40.0)).await.unwrap();
    assert_eq!(world.sets().await[1], set("A", "us-east", 128));
}

#[tokio::test]
async fn a_follower_corrects_when_what_is_wanted_changes_and_a_lost_server_stops_nothing() {
    let world = World::start().await;
    let (send, receive) = watch::channel(None);
    let drain = Drain::new(Duration::from_secs(1));
    let task = tokio::spawn(world.writer.clone().follow(receive, drain.clone()));
    for weight in [20.0, 40.0] {
        send.send_replace(Some(Arc::new(wanted(1, weight as u64, weight))));
        let until = Instant::now() + Duration::from_secs(20);
        let expected = if weight == 20.0 { 64 } else { 128 };
        while !world.sets().await.contains(&set("A", "us-east", expected)) {
            assert!(Instant::now() < until, "{weight} is not written");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    drop(world);
    send.send_replace(Some(Arc::new(wanted(1, 50, 50.0))));
    drain.stop();
    timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
}
