use tempfile::TempDir;

use super::super::{Store, StoreSettings};
use super::*;

async fn open(folder: &TempDir) -> Store {
    Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap()
}

async fn lead(store: &Store) -> Leadership {
    store.campaign(&Name::parse("c-0").unwrap(), "127.0.0.1:1").await.unwrap()
}

fn put(key: &str, value: &'static str) -> Write {
    Write::Put(key.into(), Bytes::from_static(value.as_bytes()))
}

#[tokio::test]
async fn a_commit_is_whole_or_not_at_all_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let leadership = lead(&store).await;
    let first = store.commit(&leadership.fence, &[], vec![put("a", "1"), put("b/x", "2")]).await.unwrap();
    let conditions = [Condition::At("a".into(), first), Condition::Absent("b/x".into())];
    let refused = store.commit(&leadership.fence, &conditions, vec![put("a", "3"), put("c", "3")]).await;
    assert!(matches!(refused, Err(StoreError::Conflict(key)) if key == "b/x"));
    assert_eq!(store.get("c").await.unwrap(), None);
    let writes = vec![put("b/y", "4"), Write::Delete("a".into())];
    let second = store.commit(&leadership.fence, &conditions[..1], writes).await.unwrap();
    assert!(second > first);
    drop(store);
    let store = open(&folder).await;
    let value = |bytes: &'static str, revision| Value { bytes: bytes.into(), revision };
    let listed = store.list("b/").await.unwrap();
    assert_eq!(listed, [("b/x".into(), value("2", first)), ("b/y".into(), value("4", second))]);
    assert_eq!(store.list("").await.unwrap().len(), 2);
    let last = |most| {
        let store = &store;
        async move { store.last("b/", most).await.unwrap() }
    };
    assert_eq!((last(1).await, last(9).await), (vec![listed[1].clone()], vec![listed[1].clone(), listed[0].clone()]));
    assert_eq!((store.get("a").await.unwrap(), store.list("b_").await.unwrap()), (None, vec![]));
}

#[tokio::test]
async fn an_older_process_is_refused_and_told_and_leads_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let old = open(&folder).await;
    let mut before = lead(&old).await;
    old.commit(&before.fence, &[], vec![put("a", "1")]).await.unwrap();
    let new = open(&folder).await;
    let late = old.commit(&before.fence, &[], vec![put("a", "late")]).await;
    assert!(matches!(late, Err(StoreError::Fenced(epoch)) if epoch == before.fence.epoch));
    let after = lead(&new).await;
    assert!(after.fence.epoch > before.fence.epoch);
    tokio::time::timeout(DEADLINE * 5, before.lost.wait_for(|lost| *lost)).await.unwrap().unwrap();
    assert!(matches!(old.campaign(&Name::parse("c-0").unwrap(), "x").await, Err(StoreError::Fenced(_))));
    new.commit(&after.fence, &[], vec![put("a", "2")]).await.unwrap();
    assert!(!after.is_lost());
    let leader = old.leader().await.unwrap().unwrap();
    assert_eq!((leader.node.as_str(), &*leader.address, leader.epoch), ("c-0", "127.0.0.1:1", after.fence.epoch));
}

#[tokio::test]
async fn watches_tell_of_their_prefix_and_of_other_processes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let leadership = lead(&store).await;
    let (mut overrides, plan) = (store.watch("overrides/"), store.watch("plan"));
    store.commit(&leadership.fence, &[], vec![put("overrides/eu", "1")]).await.unwrap();
    assert!(overrides.has_changed().unwrap() && !plan.has_changed().unwrap());
    overrides.mark_unchanged();
    let other = open(&folder).await;
    let leadership = lead(&other).await;
    other.commit(&leadership.fence, &[], vec![put("overrides/eu", "2")]).await.unwrap();
    tokio::time::timeout(DEADLINE * 5, overrides.changed()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_resigned_leader_may_lead_again_by_a_higher_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let first = lead(&store).await;
    let fence = first.fence.clone();
    first.resign().await;
    let second = lead(&store).await;
    assert!(second.fence.epoch > fence.epoch);
    assert!(matches!(store.commit(&fence, &[], vec![put("a", "1")]).await, Err(StoreError::Fenced(_))));
    store.commit(&second.fence, &[], vec![put("a", "1")]).await.unwrap();
}

#[tokio::test]
async fn a_commit_that_etcd_would_not_take_is_refused_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let Leadership { fence, .. } = lead(&store).await;
    let large = vec![Write::Put("a".into(), vec![0; super::super::MOST_BYTES].into())];
    assert!(matches!(store.commit(&fence, &[], large).await, Err(StoreError::TooLarge(_))));
    let many = (0..=super::super::MOST_WRITES).map(|number| put(&format!("a/{number}"), "1")).collect();
    assert!(matches!(store.commit(&fence, &[], many).await, Err(StoreError::TooMany(_))));
}

#[tokio::test]
async fn what_is_no_store_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.db");
    std::fs::write(&path, "x".repeat(4_096)).unwrap();
    assert!(matches!(Store::open(&StoreSettings::Sqlite(path)).await, Err(OpenError::Sqlite { .. })));
}
