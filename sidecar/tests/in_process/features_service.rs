//! The gRPC service of features: who may call, what is refused, what comes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::features_harness::*;
use bytes::Bytes;
use spillway_core::identity::SpiffeId;
use spillway_proto::feature::feature_service_server::FeatureService as _;
use spillway_proto::feature::value::Kind;
use spillway_proto::feature::{DeleteRequest, GetRequest, Key, PutRequest, Row, Value};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::{IdentitySettings, Peer, Workload};
use spillway_sidecar::feature_service::{BATCH, FeatureService};
use spillway_sidecar::features::now_us;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tonic::{Code, Request, Status};

struct Region {
    service: FeatureService,
    sidecar: Sidecar,
    authority: Authority,
    workload: Arc<Workload>,
    folder: tempfile::TempDir,
}

impl Region {
    async fn start() -> Self {
        spillway_runtime::tls::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let own = id("region/eu/sidecar/scorers/pod-0");
        let authority = Authority::create(own.trust_domain.clone()).unwrap();
        let path = |name: &str| folder.path().join(name);
        let leaf = authority.issue(&LeafRequest::new(own.clone(), Duration::from_secs(3_600))).unwrap();
        leaf.save(path("leaf.pem"), path("leaf.key")).unwrap();
        std::fs::write(path("bundle.pem"), authority.trust_bundle()).unwrap();
        let identity =
            IdentitySettings { certificate: path("leaf.pem"), key: path("leaf.key"), trust_bundle: path("bundle.pem") };
        let sidecar = Sidecar::open(&settings(sqlite(folder.path()), None));
        sidecar.until_well().await;
        let snapshot = Arc::new(sidecar.snapshot.clone());
        let service = FeatureService::new(sidecar.features.clone(), own, Arc::new(move || snapshot.clone()));
        Self { service, sidecar, authority, workload: Workload::load(&identity).unwrap(), folder }
    }

    /// A peer as the server's handshake verifies it.
    fn peer(&self, path: &str) -> Arc<Peer> {
        let leaf = self.authority.issue(&LeafRequest::new(id(path), Duration::from_secs(3_600))).unwrap();
        let chain: Vec<_> = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).map(Result::unwrap).collect();
        Arc::new(self.workload.peer(&chain).unwrap())
    }

    fn as_loader<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.extensions_mut().insert(self.peer("region/eu/loader/one"));
        request
    }

    async fn put(&self, rows: Vec<Row>) -> Result<(u32, Vec<(u32, String)>), Status> {
        let answer = self.service.put(self.as_loader(PutRequest { rows })).await?.into_inner();
        Ok((answer.written, answer.rejections.into_iter().map(|rejection| (rejection.row, rejection.reason)).collect()))
    }

    async fn get(&self, keys: Vec<Key>) -> Result<Vec<spillway_proto::feature::Found>, Status> {
        Ok(self.service.get(self.as_loader(GetRequest { keys })).await?.into_inner().rows)
    }
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://spillway.test/{path}")).unwrap()
}

fn key(group: &str, tenant: &str, entity: &str) -> Key {
    Key { group: group.into(), tenant: tenant.into(), entity: Bytes::copy_from_slice(entity.as_bytes()) }
}

fn row(key: Key, fields: &[(&str, Kind)]) -> Row {
    let fields = fields.iter().map(|(name, kind)| ((*name).to_owned(), Value { kind: Some(kind.clone()) }));
    Row { key: Some(key), event_time_micros: now_us(), fields: fields.collect() }
}

fn code(status: &Status) -> (Code, &str) {
    (status.code(), status.metadata().get("spillway-error").unwrap().to_str().unwrap())
}

#[tokio::test]
async fn rows_come_back_with_tier_freshness_and_values_of_their_types() {
    let region = Region::start().await;
    let rows = vec![
        row(key("site", "", "a"), &[("age", Kind::DoubleValue(2.5)), ("hits", Kind::Int64Value(-3))]),
        row(
            key("site", "", "b"),
            &[("age", Kind::TextValue("4".into())), ("hits", Kind::TextValue("9007199254740993".into()))],
        ),
        row(key("site", "", "c"), &[("hits", Kind::Uint64Value(1))]),
        row(key("user", "acme", "a"), &[("score", Kind::Int64Value(7))]),
    ];
    assert_eq!(region.put(rows.clone()).await.unwrap(), (4, vec![]));
    let keys = rows.iter().map(|row| row.key.clone().unwrap()).chain([key("user", "globex", "a")]).collect();
    let found = region.get(keys).await.unwrap();
    let fields = |index: usize| -> HashMap<&str, Kind> {
        let row = found[index].row.as_ref().unwrap();
        row.fields.iter().map(|(name, value)| (name.as_str(), value.kind.clone().unwrap())).collect()
    };
    assert_eq!(fields(0), HashMap::from([("age", Kind::DoubleValue(2.5)), ("hits", Kind::Int64Value(-3))]));
    assert_eq!(
        fields(1),
        HashMap::from([("age", Kind::DoubleValue(4.0)), ("hits", Kind::Int64Value(9_007_199_254_740_993))])
    );
    assert_eq!(fields(2), HashMap::from([("hits", Kind::Int64Value(1))]), "a field that was not given is null");
    assert_eq!(fields(3), HashMap::from([("score", Kind::DoubleValue(7.0))]));
    assert_eq!((found[0].present, found[0].stale, found[0].tier.as_str()), (true, false, "l3"));
    assert_eq!(found[0].fresh_until_micros, rows[0].event_time_micros + 60_000_000);
    assert_eq!((found[4].present, found[4].row.as_ref().unwrap().fields.len()), (false, 0), "another tenant's entity");

    let deletion = DeleteRequest { keys: vec![key("site", "", "a")], event_time_micros: now_us() };
    assert_eq!(region.service.delete(region.as_loader(deletion)).await.unwrap().into_inner().deleted, 1);
    assert!(!region.get(vec![key("site", "", "a")]).await.unwrap()[0].present);
}

#[tokio::test]
async fn bad_rows_are_named_with_a_reason_and_nothing_is_written() {
    let region = Region::start().await;
    let good = || row(key("site", "", "good"), &[("hits", Kind::Int64Value(1))]);
    let mut future = good();
    future.event_time_micros += 3_600_000_000;
    let bad = vec![
        (row(key("nobody", "", "a"), &[]), "no such feature group"),
        (row(key("site", "acme", "a"), &[]), "shared"),
        (row(key("user", "", "a"), &[]), "no such tenant"),
        (row(key("user", "nobody", "a"), &[]), "no such tenant"),
        (row(key("site", "", "a"), &[("hats", Kind::Int64Value(1))]), "no field \"hats\""),
        (row(key("site", "", "a"), &[("hits", Kind::TextValue("1.5".into()))]), "'hits'"),
        (Row { key: None, ..good() }, "key is missing"),
        (future, "future"),
        (row(key("site", "", ""), &[]), "1 to 256 bytes"),
        (row(key("site", "", "a"), &[("hits", Kind::DoubleValue(1.0))]), "INT64"),
        (row(key("site", "", "a"), &[("age", Kind::DoubleValue(f64::NAN))]), "FP32"),
    ];
    // All of them at once, and each way of being wrong on its own.
    let batches = [bad.clone()].into_iter().chain(bad.iter().map(|one| vec![one.clone()]));
    for batch in batches {
        let rows = batch.iter().map(|(row, _)| row.clone()).chain([good()]).collect();
        let (written, rejections) = region.put(rows).await.unwrap();
        assert_eq!((written, rejections.len()), (0, batch.len()));
        for (index, (rejected, (_, expected))) in rejections.iter().zip(&batch).enumerate() {
            assert!(rejected.0 as usize == index && rejected.1.contains(expected), "{rejected:?} {expected}");
        }
    }
    assert!(!region.get(vec![key("site", "", "good")]).await.unwrap()[0].present);
    assert_eq!(region.sidecar.reads("l3", "hit"), 0);

    let many = vec![good(); BATCH + 1];
    assert_eq!(code(&region.put(many).await.unwrap_err()), (Code::InvalidArgument, "limit-exceeded"));
    let unknown = region.get(vec![key("nobody", "", "a")]).await.unwrap_err();
    assert_eq!(code(&unknown), (Code::InvalidArgument, "invalid-row"));
    assert_eq!(region.put(vec![good(); BATCH]).await.unwrap().0, 1_000, "replays in one batch are harmless");
}

#[tokio::test]
async fn only_loaders_and_gateways_of_the_region_may_call() {
    let region = Region::start().await;
    for (path, may) in [
        ("region/eu/loader/one", true),
        ("region/eu/gateway/gw-0", true),
        ("region/us/loader/one", false),
        ("region/eu/control/c-0", false),
        ("region/eu/dns/d-0", false),
        ("region/us/gateway/gw-0", false),
        ("region/eu/sidecar/scorers/pod-1", false),
        ("tenant/acme/client/web", false),
    ] {
        let mut request = Request::new(GetRequest { keys: vec![] });
        request.extensions_mut().insert(region.peer(path));
        let answer = region.service.get(request).await;
        match answer {
            Ok(_) => assert!(may, "{path}"),
            Err(status) => assert!(!may && code(&status) == (Code::PermissionDenied, "permission-denied"), "{path}"),
        }
    }
    let nobody = region.service.get(Request::new(GetRequest { keys: vec![] })).await.unwrap_err();
    assert_eq!(code(&nobody), (Code::PermissionDenied, "permission-denied"));
    let stranger = SpiffeId::parse("spiffe://elsewhere.test/region/eu/loader/one").unwrap();
    assert!(!region.service.may_write(&stranger));
}

#[tokio::test]
async fn what_the_store_refuses_is_told_as_not_worth_a_retry() {
    let region = Region::start().await;
    let outside = rusqlite::Connection::open(region.folder.path().join("features.db")).unwrap();
    outside.execute_batch("ALTER TABLE features RENAME TO away").unwrap();
    let refused = region.put(vec![row(key("site", "", "a"), &[("hits", Kind::Int64Value(1))])]).await.unwrap_err();
    assert_eq!(code(&refused), (Code::FailedPrecondition, "store-refused"));
    let deletion = DeleteRequest { keys: vec![key("site", "", "a")], event_time_micros: now_us() };
    let refused = region.service.delete(region.as_loader(deletion)).await.unwrap_err();
    assert_eq!(code(&refused), (Code::FailedPrecondition, "store-refused"));
    // A reader cannot know what is there, and may ask again.
    let unknown = region.get(vec![key("site", "", "a")]).await.unwrap_err();
    assert_eq!(code(&unknown), (Code::Unavailable, "features-unavailable"));
    outside.execute_batch("ALTER TABLE away RENAME TO features").unwrap();
    assert_eq!(region.put(vec![row(key("site", "", "a"), &[])]).await.unwrap().0, 1);
}
