//! Two leaders, of whom the first has read the records, and its batch comes when the second has written: against a zone
//! that holds a batch to the stamp that it deletes.

use spillway_runtime::settings::parse;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::dns::fixture::{name, view};
use crate::dns::route53::strict::{Held, Zone};

struct World {
    zone: Zone,
    writer: Writer,
    _folder: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        spillway_runtime::tls::install_provider();
        let zone = Zone::start().await;
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("credentials");
        std::fs::write(&keys, "[default]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
        let text = format!(
            "hostedZone: Z1\nname: infer.example.com\nendpoint: {}\ncredentials: {{file: '{}'}}\n",
            zone.endpoint,
            keys.display()
        );
        let writer = Writer::new(parse(&text).unwrap(), &Metrics::new("test"));
        Self { zone, writer, _folder: folder }
    }

    /// A correction whose batch is on its way.
    async fn late(&self, wanted: Wanted) -> (oneshot::Sender<()>, JoinHandle<Result<Corrected, WriteError>>) {
        let Held { came, let_go } = self.zone.hold();
        let writer = self.writer.clone();
        let task = tokio::spawn(async move { writer.correct(&wanted).await });
        came.await.unwrap();
        (let_go, task)
    }

    /// The weight of `us-east`, and the stamp.
    async fn told(&self) -> (Option<i64>, Option<Stamp>) {
        let sets = self.writer.list("infer.example.com.", RrType::A).await.unwrap();
        let weight = sets.iter().find(|set| set.set_identifier() == Some("us-east")).and_then(|set| set.weight());
        let stamps = self.writer.list(&stamp_name(&self.writer.settings.name), RrType::Txt).await.unwrap();
        (weight, stamps.first().and_then(Stamp::read))
    }
}

fn wanted(epoch: u64, serial: u64, weight: f64) -> Wanted {
    let mut view = view();
    view.serial = serial;
    view.regions.get_mut(&name("us-east")).unwrap().weight = weight;
    Wanted { epoch, view }
}

fn stamp(epoch: u64, version: u64, batch: u64) -> Option<Stamp> {
    Some(Stamp { epoch, version, batch })
}

#[tokio::test]
async fn t60_t67_what_a_leader_of_before_puts_right_late_is_refused() {
    let world = World::start().await;
    world.writer.correct(&wanted(5, 10, 20.0)).await.unwrap();
    assert_eq!(world.told().await, (Some(64), stamp(5, 10, 1)));
    // Its plan is the one of the stamp, and so is its next correction's.
    world.zone.lose("us-east");
    let (let_go, late) = world.late(wanted(5, 10, 20.0)).await;
    world.writer.correct(&wanted(6, 11, 40.0)).await.unwrap();
    let_go.send(()).unwrap();
    let refused = late.await.unwrap().unwrap_err();
    assert!(matches!(&refused, WriteError::Batch(why) if why.contains("InvalidChangeBatch")), "{refused:?}");
    assert_eq!(world.told().await, (Some(128), stamp(6, 11, 2)));
}

#[tokio::test]
async fn t60_t67_a_leader_that_finds_all_in_order_still_keeps_out_the_one_of_before() {
    let world = World::start().await;
    world.writer.correct(&wanted(5, 10, 20.0)).await.unwrap();
    let (let_go, late) = world.late(wanted(5, 11, 40.0)).await;
    let corrected = world.writer.correct(&wanted(6, 12, 20.0)).await.unwrap();
    assert_eq!(corrected.changes, 0, "no set differs");
    let_go.send(()).unwrap();
    assert!(matches!(late.await.unwrap(), Err(WriteError::Batch(_))));
    assert_eq!(world.told().await, (Some(64), stamp(6, 12, 2)));
    // Once is enough.
    world.writer.correct(&wanted(6, 12, 20.0)).await.unwrap();
    assert_eq!(world.told().await.1, stamp(6, 12, 2));
}

#[tokio::test]
async fn of_two_corrections_that_read_the_same_stamp_one_is_taken() {
    let world = World::start().await;
    world.writer.correct(&wanted(5, 10, 20.0)).await.unwrap();
    world.zone.lose("us-east");
    let (let_go, late) = world.late(wanted(5, 10, 20.0)).await;
    world.writer.correct(&wanted(5, 10, 40.0)).await.unwrap();
    let_go.send(()).unwrap();
    assert!(matches!(late.await.unwrap(), Err(WriteError::Batch(_))));
    assert_eq!(world.told().await, (Some(128), stamp(5, 10, 2)));
}
