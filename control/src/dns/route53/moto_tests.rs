//! Against moto's server (PyPI `moto[server]`), which comes with `tests/servers/install.sh moto`. Without it these tests
//! say so, and fail in CI.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use aws_sdk_route53::types::{Change, ChangeAction};
use spillway_runtime::settings::parse;
use tokio::process::{Child, Command};

use super::*;
use crate::dns::fixture::{name, view};

/// A server with one hosted zone; killed when dropped.
struct Moto {
    _server: Child,
    writer: Writer,
    keys: PathBuf,
    _folder: tempfile::TempDir,
}

impl Moto {
    async fn start() -> Option<Self> {
        let tools = std::env::var_os("SPILLWAY_TOOLS")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.tools"), PathBuf::from);
        let program = tools.join("moto/bin/moto_server");
        if !program.exists() {
            assert!(std::env::var_os("CI").is_none(), "moto is not here: tests/servers/install.sh moto");
            eprintln!("SKIPPED: moto is not here: tests/servers/install.sh moto");
            return None;
        }
        spillway_runtime::tls::install_provider();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("credentials");
        std::fs::write(&keys, "[test]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
        let writer = |hosted_zone: &str| {
            let text = format!(
                "hostedZone: {hosted_zone}\nname: infer.example.com\nendpoint: http://127.0.0.1:{port}\n\
                 credentials: {{file: '{}', profile: test}}\n",
                keys.display()
            );
            Writer::new(parse(&text).unwrap(), &Metrics::new("test"))
        };
        let until = Instant::now() + Duration::from_secs(60);
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(Instant::now() < until, "moto does not listen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let client = writer("Z0").client().await.unwrap();
        let created = client.create_hosted_zone().name("example.com.").caller_reference("test").send().await.unwrap();
        let id = created.hosted_zone().unwrap().id().trim_start_matches("/hostedzone/").to_owned();
        Some(Self { _server: server, writer: writer(&id), keys, _folder: folder })
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
        let client = writer.client().await.unwrap();
        let sent = client.change_resource_record_sets().hosted_zone_id(&writer.settings.hosted_zone);
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
    let Some(moto) = Moto::start().await else { return };
    let corrected = moto.writer.correct(&wanted(1, 1, 20.0)).await.unwrap();
    assert_eq!(corrected.changes, 3);
    let first = [set("A", "eu-west", 255), set("A", "us-east", 64), set("AAAA", "eu-west", 255)];
    assert_eq!(moto.sets().await, first);
    assert_eq!(moto.writer.correct(&wanted(1, 1, 20.0)).await.unwrap().changes, 0, "nothing is written twice");
    assert_eq!(moto.writer.correct(&wanted(1, 2, 40.0)).await.unwrap().changes, 1);
    assert_eq!(moto.sets().await[1], set("A", "us-east", 128));

    // Somebody helps by hand: a weight, and a set of a region that there is not.
    let found = moto.writer.list("infer.example.com.", RrType::A).await.unwrap();
    let mut meddled = found.iter().find(|set| set.set_identifier() == Some("us-east")).unwrap().clone();
    meddled.weight = Some(1);
    moto.change(ChangeAction::Upsert, meddled.clone()).await;
    meddled.set_identifier = Some("mars".into());
    moto.change(ChangeAction::Create, meddled).await;
    assert_eq!(moto.writer.correct(&wanted(1, 2, 40.0)).await.unwrap().changes, 2);
    assert_eq!(moto.sets().await, [set("A", "eu-west", 255), set("A", "us-east", 128), set("AAAA", "eu-west", 255)]);

    // T66: an empty plan takes nothing away.
    let empty = Wanted { epoch: 1, view: View { serial: 3, ..View::default() } };
    assert_eq!(moto.writer.correct(&empty).await.unwrap().changes, 0);
    assert_eq!(moto.sets().await.len(), 3);
}

#[tokio::test]
async fn without_credentials_nothing_is_written_and_with_new_ones_it_goes_on() {
    let Some(moto) = Moto::start().await else { return };
    std::fs::rename(&moto.keys, moto.keys.with_extension("away")).unwrap();
    let refused = moto.writer.correct(&wanted(1, 1, 20.0)).await.unwrap_err();
    assert!(matches!(refused, WriteError::Credentials(NoCredentials::Unreadable { .. })), "{refused:?}");
    std::fs::rename(moto.keys.with_extension("away"), &moto.keys).unwrap();
    assert_eq!(moto.writer.correct(&wanted(1, 1, 20.0)).await.unwrap().changes, 3);
    let (corrections, outcome) = (&moto.writer.metrics.corrections, |outcome| Outcome { outcome });
    let counts = ["failed", "corrected"].map(|word| corrections.get_or_create(&outcome(word)).get());
    assert_eq!((counts, moto.writer.metrics.changes.get(), moto.writer.metrics.plan.get()), ([1, 1], 3, 1));
}

#[tokio::test]
async fn t60_t67_a_leader_of_before_writes_nothing() {
    let Some(moto) = Moto::start().await else { return };
    moto.writer.correct(&wanted(7, 10, 20.0)).await.unwrap();
    for (epoch, serial) in [(6, 11), (7, 9)] {
        let refused = moto.writer.correct(&wanted(epoch, serial, 40.0)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Superseded(Stamp { epoch: 7, version: 10 })), "{refused:?}");
    }
    assert_eq!(moto.sets().await[1], set("A", "us-east", 64));
    moto.writer.correct(&wanted(8, 11, 40.0)).await.unwrap();
    assert_eq!(moto.sets().await[1], set("A", "us-east", 128));
}

#[tokio::test]
async fn a_follower_corrects_when_what_is_wanted_changes_and_a_lost_server_stops_nothing() {
    let Some(moto) = Moto::start().await else { return };
    let (send, receive) = watch::channel(None);
    let drain = Drain::new(Duration::from_secs(1));
    let task = tokio::spawn(moto.writer.clone().follow(receive, drain.clone()));
    for weight in [20.0, 40.0] {
        send.send_replace(Some(Arc::new(wanted(1, weight as u64, weight))));
        let until = Instant::now() + Duration::from_secs(20);
        let expected = if weight == 20.0 { 64 } else { 128 };
        while !moto.sets().await.contains(&set("A", "us-east", expected)) {
            assert!(Instant::now() < until, "{weight} is not written");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    drop(moto);
    send.send_replace(Some(Arc::new(wanted(1, 50, 50.0))));
    drain.stop();
    timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
}
