//! The store on a real etcd: three members, TLS, client certificates.

use std::time::Duration;

use bytes::Bytes;
use spillway_control::store::{Condition, DEADLINE, Leadership, Store, StoreError, StoreSettings, Write};
use spillway_core::units::Name;
use spillway_figures::{Goal, record};
use tokio::runtime::Runtime;
use tokio::time::{Instant, timeout};

use crate::cluster::Cluster;

/// A call may be late by what a busy machine needs. Less than is left of a lease when its leader stops to believe in it.
const SLACK: Duration = Duration::from_millis(900);

fn put(key: &str, value: &str) -> Write {
    Write::Put(key.into(), Bytes::copy_from_slice(value.as_bytes()))
}

async fn open(cluster: &Cluster) -> Store {
    Store::open(&cluster.settings()).await.unwrap()
}

async fn lead(store: &Store, node: &str) -> Leadership {
    let node = Name::parse(node).unwrap();
    let campaign = async {
        loop {
            match store.campaign(&node, "127.0.0.1:7000").await {
                Ok(leadership) => return leadership,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    timeout(Duration::from_secs(20), campaign).await.expect("an election ends")
}

async fn commit(store: &Store, leadership: &Leadership, key: &str, value: &str) -> Result<u64, StoreError> {
    store.commit(&leadership.fence, &[], vec![put(key, value)]).await
}

/// What another process does: it has its own threads, and stands still when nobody asks it for anything.
fn process() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[tokio::test]
async fn a_commit_is_whole_or_not_at_all() {
    let cluster = Cluster::start();
    let store = open(&cluster).await;
    let leadership = lead(&store, "c-0").await;
    let fence = &leadership.fence;
    let first = store.commit(fence, &[], vec![put("a", "1"), put("b/00", "2")]).await.unwrap();
    let conditions = [Condition::At("a".into(), first), Condition::Absent("b/00".into())];
    let refused = store.commit(fence, &conditions, vec![put("a", "3"), put("c", "3")]).await;
    assert!(matches!(refused, Err(StoreError::Conflict(key)) if key == "b/00"));
    assert_eq!(store.get("c").await.unwrap(), None);
    assert_eq!(store.get("a").await.unwrap().unwrap().bytes, "1");
    let many = (1..40).map(|number| put(&format!("b/{number:02}"), "4"));
    let writes = many.chain([Write::Delete("a".into())]).collect();
    let second = store.commit(fence, &conditions[..1], writes).await.unwrap();
    assert!(second > first);
    assert_eq!(store.get("a").await.unwrap(), None);
    // More than one page of them.
    let listed = store.list("b/").await.unwrap();
    assert_eq!(listed.len(), 40);
    assert!(listed.is_sorted_by_key(|(key, _)| key.clone()));
    assert_eq!((&*listed[39].0, &listed[39].1.bytes[..], listed[39].1.revision), ("b/39", &b"4"[..], second));
    let last = store.last("b/", 39).await.unwrap();
    assert_eq!((last.len(), &last[0], &last[38]), (39, &listed[39], &listed[1]), "in one answer");
    let again = store.commit(fence, &conditions[..1], vec![put("a", "5")]).await;
    assert!(matches!(again, Err(StoreError::Conflict(key)) if key == "a"));
    // The largest that is let in gets through.
    let large = Write::Put("large".into(), vec![7; spillway_control::store::MOST_BYTES - 5].into());
    store.commit(fence, &[], vec![large]).await.unwrap();
    assert_eq!(store.get("large").await.unwrap().unwrap().bytes.len(), spillway_control::store::MOST_BYTES - 5);
}

#[test]
fn a_paused_leaders_late_commit_is_refused() {
    let cluster = Cluster::start();
    let (paused, other) = (process(), process());
    let (store, mut before) = paused.block_on(async {
        let store = open(&cluster).await;
        let leadership = lead(&store, "c-0").await;
        commit(&store, &leadership, "plan", "1").await.unwrap();
        (store, leadership)
    });
    // From here on nobody runs its tasks, as if it were stopped.
    let began = Instant::now();
    let after = other.block_on(async {
        let store = open(&cluster).await;
        let leadership = lead(&store, "c-1").await;
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        assert!(leadership.fence.epoch > before.fence.epoch);
        commit(&store, &leadership, "plan", "2").await.unwrap();
        leadership
    });
    assert!(before.is_lost(), "its own clock says so before anybody told it");
    let late = paused.block_on(commit(&store, &before, "plan", "late"));
    let fenced = matches!(late, Err(StoreError::Fenced(epoch)) if epoch == before.fence.epoch);
    assert!(
        record("control.paused_leader.late_writes_taken", f64::from(!fenced), "writes", Goal::AtMost(0.0)),
        "{late:?}"
    );
    paused.block_on(async {
        timeout(Duration::from_secs(10), before.lost.wait_for(|lost| *lost)).await.unwrap().unwrap();
        let leader = store.leader().await.unwrap().unwrap();
        assert_eq!(
            (leader.node.as_str(), &*leader.address, leader.epoch),
            ("c-1", "127.0.0.1:7000", after.fence.epoch)
        );
        assert_eq!(store.get("plan").await.unwrap().unwrap().bytes, "2");
    });
}

#[test]
fn another_node_leads_within_eight_seconds_of_a_leaders_death_and_at_once_after_it_resigned() {
    let cluster = Cluster::start();
    let (killed, other) = (process(), process());
    killed.block_on(async { std::mem::forget(lead(&open(&cluster).await, "c-0").await) });
    killed.shutdown_background();
    other.block_on(async {
        let store = open(&cluster).await;
        let began = Instant::now();
        let leadership = lead(&store, "c-1").await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}");
        println!("the leader was killed: another led after {took:?}");
        let next = tokio::spawn({
            let store = open(&cluster).await;
            async move { lead(&store, "c-2").await }
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!next.is_finished());
        let began = Instant::now();
        leadership.resign().await;
        let next = next.await.unwrap();
        println!("it resigned: another led after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(4) && !next.is_lost(), "before its lease ends");
    });
}

#[tokio::test]
async fn a_watch_tells_and_survives_the_death_of_any_member() {
    let cluster = Cluster::start();
    let store = open(&cluster).await;
    let leadership = lead(&store, "c-0").await;
    let mut overrides = store.watch("overrides/");
    let mut told = async || timeout(Duration::from_secs(20), overrides.changed()).await.expect("told").unwrap();
    told().await; // the watch has begun
    commit(&store, &leadership, "overrides/eu", "1").await.unwrap();
    told().await;
    for member in 0..3 {
        cluster.kill_member(member);
        let began = Instant::now();
        while let Err(error) = commit(&store, &leadership, "overrides/eu", &member.to_string()).await {
            assert!(began.elapsed() < Duration::from_secs(15), "{error:?}");
        }
        println!("member {member} was killed: a commit was done after {:?}", began.elapsed());
        // Of a reconnection it tells as well: what counts is that nothing stays untold.
        let began = Instant::now();
        told().await;
        println!("member {member} was killed: told after {:?}", began.elapsed());
        cluster.start_again();
        let quiet = timeout(Duration::from_secs(1), async {
            loop {
                told().await
            }
        })
        .await;
        assert!(quiet.is_err());
        commit(&store, &leadership, "overrides/eu", "again").await.unwrap();
        told().await;
    }
    assert!(!leadership.is_lost(), "the lease was renewed all the time");
}

#[tokio::test]
async fn without_a_store_calls_end_in_time_and_leaders_know_it_before_their_lease_ends() {
    let cluster = Cluster::start();
    let store = open(&cluster).await;
    let mut leadership = lead(&store, "c-0").await;
    commit(&store, &leadership, "a", "1").await.unwrap();
    cluster.kill();
    let died = Instant::now();
    let unavailable = |result: Result<(), StoreError>| assert!(matches!(result, Err(StoreError::Unavailable(_))));
    for _ in 0..2 {
        let began = Instant::now();
        unavailable(store.get("a").await.map(drop));
        assert!(began.elapsed() < DEADLINE + SLACK, "{:?}", began.elapsed());
        let began = Instant::now();
        unavailable(commit(&store, &leadership, "a", "2").await.map(drop));
        assert!(began.elapsed() < DEADLINE + SLACK, "{:?}", began.elapsed());
    }
    timeout(Duration::from_secs(8), leadership.lost.wait_for(|lost| *lost)).await.unwrap().unwrap();
    assert!(died.elapsed() < Duration::from_secs(5) + SLACK, "{:?}", died.elapsed());
    cluster.start_again();
    // The old lease is still there, for the rest of its life: nobody leads by it.
    let back = lead(&store, "c-0").await;
    assert!(back.fence.epoch > leadership.fence.epoch);
    assert!(matches!(commit(&store, &leadership, "a", "3").await, Err(StoreError::Fenced(_))));
    commit(&store, &back, "a", "4").await.unwrap();
}

#[tokio::test]
async fn a_leader_whose_key_was_removed_is_told_and_fenced() {
    let cluster = Cluster::start();
    let store = open(&cluster).await;
    let mut leadership = lead(&store, "c-0").await;
    cluster.control(&["del", "spillway/leader"]);
    assert!(matches!(commit(&store, &leadership, "a", "1").await, Err(StoreError::Fenced(_))));
    timeout(Duration::from_secs(10), leadership.lost.wait_for(|lost| *lost)).await.unwrap().unwrap();
}

#[tokio::test]
async fn etcd_lets_nobody_in_who_is_not_of_its_authority() {
    let (cluster, other) = (Cluster::start(), Cluster::start());
    let (StoreSettings::Etcd(mut settings), StoreSettings::Etcd(stranger)) = (cluster.settings(), other.settings())
    else {
        panic!("both are etcd")
    };
    settings.identity.certificate = stranger.identity.certificate;
    settings.identity.key = stranger.identity.key;
    let store = Store::open(&StoreSettings::Etcd(settings.clone())).await.unwrap();
    assert!(matches!(store.get("a").await, Err(StoreError::Unavailable(_))));
    settings.identity.trust_bundle = stranger.identity.trust_bundle;
    let store = Store::open(&StoreSettings::Etcd(settings.clone())).await.unwrap();
    assert!(matches!(store.get("a").await, Err(StoreError::Unavailable(_))), "nor are its members believed");
    settings.identity.key = "/nonexistent".into();
    assert!(Store::open(&StoreSettings::Etcd(settings)).await.is_err());
}
