//! What tests of the distribution share: small versions, a library, and plans.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use spillway_core::failover::{Plan, Region, Standing, Traffic};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::plan::{Published, seal};
use tokio::sync::watch;

use super::Library;
use crate::intent::{Origin, Version};
use crate::store::StoreError;

/// A version of these regions, which all have this weight.
pub fn version(number: u64, regions: &[&str], weight: &str) -> Arc<Version> {
    let region = |name: &&str| {
        let spec = format!(r#"{{"trustDomain":"spillway.test","weight":"{weight}"}}"#);
        (("Region".to_owned(), (*name).to_owned()), spec)
    };
    of_resources(number, Origin::Applied, regions.iter().map(region).collect())
}

/// The same content as a new version.
pub fn rolled_back(number: u64, to: &Version) -> Arc<Version> {
    let resource =
        |resource: &control::Resource| ((resource.kind.clone(), resource.name.clone()), resource.spec_json.clone());
    let origin = Origin::RolledBack { to: to.number };
    of_resources(number, origin, to.resources.iter().map(resource).collect())
}

pub fn of_resources(number: u64, origin: Origin, resources: BTreeMap<(String, String), String>) -> Arc<Version> {
    let encoded = spillway_runtime::link::encode(number, resources);
    let sha256: [u8; 32] = Sha256::digest(&encoded).into();
    let decoded: control::Snapshot = prost::Message::decode(encoded.clone()).unwrap();
    // Some tests need what no node takes.
    let snapshot = spillway_runtime::snapshot::compile(encoded.clone()).unwrap_or_default();
    Arc::new(Version {
        number,
        origin,
        encoded,
        sha256,
        resources: decoded.resources,
        snapshot: Arc::new(snapshot),
        confirmed_empty: Vec::new(),
    })
}

pub fn plan(version: u64, epoch: u64, regions: &[&str]) -> Arc<control::SealedPlan> {
    let region = |name: &&str| {
        let region = Region { planned: 1.0, share: 1.0, capacity: None, load: None, overridden: None };
        (Name::parse(name).unwrap(), region)
    };
    let regions: BTreeMap<Name, Region> = regions.iter().map(region).collect();
    let plan = Plan::of(version, &regions, &Traffic::default(), Duration::ZERO).unwrap();
    let standings = regions.keys().map(|name| (name.clone(), (Standing::Steady, String::new()))).collect();
    Arc::new(seal(&Published { epoch, plan, standings }))
}

/// Versions in memory.
#[derive(Clone)]
pub struct Shelved {
    versions: Arc<Mutex<BTreeMap<u64, Arc<Version>>>>,
    newest: watch::Sender<u64>,
}

impl Shelved {
    pub fn new() -> Self {
        Self { versions: Arc::default(), newest: watch::Sender::new(0) }
    }

    pub fn add(&self, version: Arc<Version>) {
        let number = version.number;
        self.versions.lock().insert(number, version);
        self.newest.send_replace(number);
    }
}

#[async_trait]
impl Library for Shelved {
    fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    async fn version(&self, number: u64) -> Result<Option<Arc<Version>>, StoreError> {
        Ok(self.versions.lock().get(&number).cloned())
    }
}
