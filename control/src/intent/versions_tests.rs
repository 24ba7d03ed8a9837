use spillway_core::intent::changes::Counts;
use spillway_core::units::Name;
use spillway_proto::control;

use super::super::Origin;
use super::super::content::compile;
use super::*;
use crate::store::{Leadership, StoreSettings};

async fn open(folder: &tempfile::TempDir) -> (Store, Leadership) {
    let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
    let leadership = store.campaign(&Name::parse("c-0").unwrap(), "127.0.0.1:1").await.unwrap();
    (store, leadership)
}

fn versions(store: &Store) -> Arc<Versions> {
    Versions::new(store.clone(), &Metrics::new("control"))
}

fn version(number: u64) -> (Version, Header) {
    named(number, &format!("r-{number}"))
}

fn named(number: u64, region: &str) -> (Version, Header) {
    let resource = |kind: &str, name: &str, spec_json: String| control::Resource {
        kind: kind.into(),
        name: name.into(),
        spec_json,
    };
    let resources = vec![resource("Region", region, r#"{"trustDomain":"td"}"#.into())];
    let snapshot = compile(number, &resources).unwrap();
    let version = Version::new(Origin::Applied, resources, snapshot, Vec::new());
    let header = version.header(1, "alice", "", Counts::default());
    (version, header)
}

async fn append(versions: &Versions, fence: &Fence, number: u64) -> Result<Arc<Version>, StoreError> {
    let (version, header) = version(number);
    versions.append(fence, version, &header).await
}

#[tokio::test]
async fn the_last_fifty_versions_can_be_gone_back_to() {
    let folder = tempfile::tempdir().unwrap();
    let (store, leadership) = open(&folder).await;
    let versions = versions(&store);
    for number in 1..=KEPT + 3 {
        append(&versions, &leadership.fence, number).await.unwrap();
    }
    let history = versions.history().await.unwrap();
    let numbers: Vec<u64> = history.iter().map(|header| header.version).collect();
    assert_eq!(numbers, (4..=KEPT + 3).rev().collect::<Vec<_>>());
    assert!(store.list("intent/content/3/").await.unwrap().is_empty());
    let fresh = self::versions(&store);
    assert!(fresh.current().is_none());
    assert_eq!(fresh.refresh().await.unwrap().unwrap().number, KEPT + 3);
    assert!(fresh.version(3).await.unwrap().is_none());
    let oldest = fresh.version(4).await.unwrap().unwrap();
    assert_eq!((oldest.number, &oldest.encoded), (4, &version(4).0.encoded));
    for number in 4..KEPT {
        fresh.version(number).await.unwrap().unwrap();
    }
    assert!(fresh.older.lock().len() <= IN_MEMORY);
}

#[tokio::test]
async fn of_two_who_append_the_same_number_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (store, leadership) = open(&folder).await;
    let (one, other) = (versions(&store), versions(&store));
    append(&one, &leadership.fence, 1).await.unwrap();
    assert!(matches!(append(&other, &leadership.fence, 1).await, Err(StoreError::Conflict(_))));
    assert!(other.current().is_none());
    assert_eq!(other.refresh().await.unwrap().unwrap().number, 1);
    assert_eq!(other.next(), 2);
}

/// An attempt whose outcome nobody knew was not lost: it is done in the middle of the next one, and after it.
#[tokio::test]
async fn a_late_attempt_at_the_same_number_spoils_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (store, leadership) = open(&folder).await;
    let versions = versions(&store);
    append(&versions, &leadership.fence, 1).await.unwrap();
    let fence = &leadership.fence;
    let (_, revision) = versions.stored().await.unwrap().unwrap();
    let unchanged = || Condition::At(CURRENT.into(), revision);
    let put = async |what: &Version| versions.put_parts(fence, what, unchanged()).await;
    let ((wanted, header), (late, _)) = (named(2, "wanted"), named(2, "late"));
    let whole = put(&wanted).await.unwrap();
    put(&late).await.unwrap();
    let mixed = versions.put_header(fence, &header, &whole).await;
    assert!(matches!(mixed, Err(StoreError::Conflict(key)) if key == part_key(2, 0)));
    assert_eq!(self::versions(&store).refresh().await.unwrap().unwrap().number, 1);
    versions.append(fence, named(2, "wanted").0, &header).await.unwrap();
    assert!(matches!(put(&late).await, Err(StoreError::Conflict(key)) if key == CURRENT));
    assert_eq!(self::versions(&store).refresh().await.unwrap().unwrap().encoded, wanted.encoded);
}

#[tokio::test]
async fn what_is_broken_in_the_store_leaves_the_last_good_version() {
    let folder = tempfile::tempdir().unwrap();
    let (store, leadership) = open(&folder).await;
    let (writer, reader) = (versions(&store), versions(&store));
    append(&writer, &leadership.fence, 1).await.unwrap();
    reader.refresh().await.unwrap();
    append(&writer, &leadership.fence, 2).await.unwrap();
    let (_, header) = version(2);
    let put = |key: String, bytes: &'static [u8]| vec![Write::Put(key, bytes.into())];
    let whole = header.encode();
    for (key, bytes) in [
        (part_key(2, 0), &b"something else"[..]),
        (header_key(2), b"{}"),
        (CURRENT.to_owned(), b"two"),
        (CURRENT.to_owned(), b"9"),
    ] {
        let good = store.get(&key).await.unwrap().unwrap();
        store.commit(&leadership.fence, &[], put(key.clone(), bytes)).await.unwrap();
        assert!(matches!(reader.refresh().await, Err(StoreError::Corrupt { .. })), "{key}");
        assert_eq!(reader.current().unwrap().number, 1);
        store.commit(&leadership.fence, &[], vec![Write::Put(key, good.bytes)]).await.unwrap();
    }
    assert_eq!(store.get(&header_key(2)).await.unwrap().unwrap().bytes, whole);
    // Parts of an attempt that came to nothing do no harm.
    store.commit(&leadership.fence, &[], put(part_key(2, 1), b"left over")).await.unwrap();
    assert_eq!(reader.refresh().await.unwrap().unwrap().number, 2);
}

#[tokio::test]
async fn a_store_that_fell_back_does_not_make_numbers_fall() {
    let folder = tempfile::tempdir().unwrap();
    let (store, leadership) = open(&folder).await;
    let versions = versions(&store);
    for number in 1..=3 {
        append(&versions, &leadership.fence, number).await.unwrap();
    }
    let writes = vec![Write::Put(CURRENT.into(), "1".into()), Write::Delete(header_key(3))];
    store.commit(&leadership.fence, &[], writes).await.unwrap();
    assert_eq!(versions.refresh().await.unwrap().unwrap().number, 3);
    append(&versions, &leadership.fence, versions.next()).await.unwrap();
    assert_eq!(self::versions(&store).refresh().await.unwrap().unwrap().number, 4);
}
