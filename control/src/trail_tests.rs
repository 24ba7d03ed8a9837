use rusqlite::Connection;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::store::StoreSettings;

const SOON: Duration = Duration::from_secs(10);

/// Node, event, and `generation` of those that a test recorded.
type Stored = (String, String, Option<u64>);

/// One control node's part in it.
struct Node {
    store: Store,
    audit: Audit,
    leading: std::sync::Arc<Leading>,
    metrics: Metrics,
    drain: Drain,
    tasks: [JoinHandle<()>; 2],
}

impl Node {
    /// It takes the file over from whoever had it, and leads.
    async fn start(folder: &TempDir, name: &str) -> Self {
        let store = open(folder).await;
        let metrics = Metrics::new("test");
        let (audit, tap) = tapped(Audit::off(), &metrics);
        let name = Name::parse(name).unwrap();
        let leading = Leading::new(store.clone(), name, "127.0.0.1:1".into(), audit.clone(), &metrics);
        let drain = Drain::new(SOON);
        let trail = Trail::new(tap, store.clone(), &leading);
        let tasks = [tokio::spawn(trail.run(drain.clone())), tokio::spawn(leading.clone().run(drain.clone()))];
        let mut fences = leading.fences();
        timeout(SOON, fences.wait_for(Option::is_some)).await.expect("it is elected").unwrap();
        let node = Self { store, audit, leading, metrics, drain, tasks };
        // What is recorded at once could come before that.
        let began = |last: &Stored| last.0 == node.leading.node().as_str() && last.1 == "leadership-changed";
        node.until("its election", began).await;
        node
    }

    async fn stop(self) {
        self.drain.start();
        for task in self.tasks {
            timeout(SOON, task).await.expect("it ends").unwrap();
        }
    }

    async fn stored(&self) -> Vec<Stored> {
        stored(&self.store).await
    }

    async fn until_stored(&self, generation: u64) {
        self.until(&generation.to_string(), |(.., last)| *last == Some(generation)).await;
    }

    /// Waits until the newest is that.
    async fn until(&self, what: &str, is_it: impl Fn(&Stored) -> bool) {
        let stored = async {
            while !self.stored().await.last().is_some_and(&is_it) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(SOON, stored).await.is_err() {
            panic!("{what} is not in the store, which has {:?}; {} lost", self.stored().await.last(), self.lost());
        }
    }

    fn lost(&self) -> u64 {
        let text = self.metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("spillway_control_audit_lost_total "));
        line.unwrap().parse().unwrap()
    }
}

async fn open(folder: &TempDir) -> Store {
    Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap()
}

/// The oldest first.
async fn stored(store: &Store) -> Vec<Stored> {
    let read = |text: &String| {
        let record: serde_json::Value = serde_json::from_str(text).unwrap();
        let text = |field: &str| record[field].as_str().unwrap().to_owned();
        assert!(text("time").ends_with('Z') && record["hash"].is_null());
        (text("node"), text("event"), record["generation"].as_u64())
    };
    newest(store, KEPT).await.unwrap().iter().rev().map(read).collect()
}

fn change(generation: u64) -> Event {
    Event::RevocationsChanged { generation, serials: 1, ids: 0 }
}

fn issued(proof: &'static str) -> Event {
    let (id, serial) = ("spiffe://td/region/eu/gateway/g".into(), "0a".into());
    Event::CertificateIssued { id, serial, not_after: Timestamp::default(), proof, address: None }
}

fn generations(stored: &[Stored]) -> Vec<u64> {
    stored.iter().filter_map(|(.., generation)| *generation).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaders_records_are_in_the_store_to_the_last_and_the_next_leader_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let first = Node::start(&folder, "c-0").await;
    first.audit.record(change(1));
    first.until_stored(1).await;
    first.audit.record(issued("certificate"));
    first.audit.record(issued("token"));
    // More than one commit, of which the last is that of the drain.
    (2..=80).for_each(|generation| first.audit.record(change(generation)));
    assert_eq!(first.lost(), 0);
    first.stop().await;
    let next = Node::start(&folder, "c-1").await;
    next.audit.record(change(81));
    next.until_stored(81).await;
    let stored = next.stored().await;
    let told: Vec<(&str, &str)> = stored.iter().map(|(node, event, _)| (&**node, &**event)).collect();
    let led = "leadership-changed";
    let mut expected = vec![("c-0", led), ("c-0", "revocations-changed"), ("c-0", "certificate-issued")];
    expected.extend([("c-0", "revocations-changed"); 79]);
    expected.extend([("c-0", led), ("c-1", led), ("c-1", "revocations-changed")]);
    assert_eq!(told, expected, "a renewal is not among them");
    assert_eq!(generations(&stored), (1..=81).collect::<Vec<_>>());
    let newest = newest(&next.store, 2).await.unwrap();
    assert!(newest.len() == 2 && newest[0].contains("\"generation\":81,"), "{newest:?}");
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_thousand_stay_over_leaders() {
    let folder = tempfile::tempdir().unwrap();
    let first = Node::start(&folder, "c-0").await;
    (1..=900).for_each(|generation| first.audit.record(change(generation)));
    first.until_stored(900).await;
    first.stop().await;
    let next = Node::start(&folder, "c-1").await;
    (901..=1_500).for_each(|generation| next.audit.record(change(generation)));
    next.until_stored(1_500).await;
    assert_eq!(next.store.list(PREFIX).await.unwrap().len(), KEPT);
    // Beside them the end of one leadership and the begin of the next.
    assert_eq!(generations(&next.stored().await), (503..=1_500).collect::<Vec<_>>());
    assert_eq!(next.lost(), 0);
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_superseded_writes_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let old = Node::start(&folder, "c-0").await;
    old.audit.record(change(1));
    old.until_stored(1).await;
    let before = old.stored().await;
    let next = open(&folder).await;
    // It may not have heard of it yet.
    (2..=100).for_each(|generation| old.audit.record(change(generation)));
    let mut fences = old.leading.fences();
    timeout(SOON, fences.wait_for(Option::is_none)).await.expect("it hears of it").unwrap();
    old.audit.record(change(101));
    assert_eq!(stored(&next).await, before);
    let counted = async {
        while old.lost() == 0 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, counted).await.expect("it is told what the store does not have");
    old.stop().await;
    assert_eq!(stored(&next).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_away_gets_what_came_meanwhile_as_far_as_the_queue_goes() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(&folder, "c-0").await;
    node.audit.record(change(1));
    node.until_stored(1).await;
    let away = Connection::open(folder.path().join("control.db")).unwrap();
    away.execute_batch("BEGIN IMMEDIATE").unwrap();
    (2..=500).for_each(|generation| node.audit.record(change(generation)));
    // Longer than one attempt.
    sleep(Duration::from_secs(3)).await;
    (501..=900).for_each(|generation| node.audit.record(change(generation)));
    let count = "SELECT count(*) FROM entries WHERE key LIKE 'audit/%'";
    assert_eq!(away.query_row(count, [], |row| row.get(0)), Ok(2), "the election and the first");
    away.execute_batch("ROLLBACK").unwrap();
    node.until_stored(900).await;
    assert_eq!(generations(&node.stored().await), (1..=900).collect::<Vec<_>>(), "each of them once");
    assert_eq!(node.lost(), 0);

    away.execute_batch("BEGIN IMMEDIATE").unwrap();
    (0..BATCH + WAITING + 100).for_each(|_| node.audit.record(change(2_000)));
    away.execute_batch("ROLLBACK").unwrap();
    assert!((100..=100 + BATCH as u64).contains(&node.lost()), "{}", node.lost());
    node.stop().await;
}
