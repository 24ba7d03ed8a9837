//! What tests push: small versions, plans, and a node's folder.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use spillway_core::failover::{Plan, Region, Standing, Traffic};
use spillway_core::units::Name;
use spillway_proto::control;
use tempfile::TempDir;

use super::Intake;
use crate::audit::Audit;
use crate::plan::{Published, seal};
use crate::telemetry::Metrics;

/// A version as the control plane has it.
#[derive(Clone, Debug)]
pub struct Content {
    pub version: u64,
    resources: BTreeMap<(String, String), String>,
}

impl Content {
    pub fn of(version: u64, regions: &[&str]) -> Self {
        let region =
            |name: &&str| (("Region".to_owned(), (*name).to_owned()), r#"{"trustDomain":"spillway.test"}"#.into());
        Self { version, resources: regions.iter().map(region).collect() }
    }

    /// One pod in a region.
    pub fn with_pool(self, region: &str) -> Self {
        let spec = format!(r#"{{"pods":[{{"address":"127.0.0.1:1","name":"pod-0"}}],"region":"{region}"}}"#);
        self.with_raw("Pool", &format!("of-{region}"), &spec)
    }

    pub fn with_raw(mut self, kind: &str, name: &str, spec: &str) -> Self {
        self.resources.insert((kind.to_owned(), name.to_owned()), spec.to_owned());
        self
    }

    /// All its regions have this weight.
    pub fn weighing(mut self, weight: &str) -> Self {
        for ((kind, _), spec) in &mut self.resources {
            if kind == "Region" {
                *spec = format!(r#"{{"trustDomain":"spillway.test","weight":"{weight}"}}"#);
            }
        }
        self
    }

    pub fn encoded(&self) -> Bytes {
        super::encode(self.version, self.resources.clone())
    }

    pub fn sha256(&self) -> Bytes {
        Bytes::copy_from_slice(&Sha256::digest(self.encoded()))
    }

    pub fn whole(&self, epoch: u64) -> control::Delta {
        let nothing = Self { version: 0, resources: BTreeMap::new() };
        control::Delta { base_sha256: Bytes::new(), ..self.since(&nothing, epoch) }
    }

    pub fn since(&self, base: &Self, epoch: u64) -> control::Delta {
        let changed = self.resources.iter().filter(|(key, spec)| base.resources.get(*key) != Some(*spec));
        let removed = base.resources.keys().filter(|key| !self.resources.contains_key(*key));
        control::Delta {
            epoch,
            base: base.version,
            base_sha256: base.sha256(),
            target: self.version,
            target_sha256: self.sha256(),
            changed: changed
                .map(|((kind, name), spec)| control::Resource {
                    kind: kind.clone(),
                    name: name.clone(),
                    spec_json: spec.clone(),
                })
                .collect(),
            removed: removed
                .map(|(kind, name)| control::ResourceName { kind: kind.clone(), name: name.clone() })
                .collect(),
            confirmed_empty: Vec::new(),
        }
    }
}

/// A plan in which all regions have the same weight.
pub fn plan(version: u64, epoch: u64, regions: &[&str]) -> control::SealedPlan {
    let region = |name: &&str| {
        let region = Region { planned: 1.0, share: 1.0, capacity: Some(100.0), load: Some(10.0), overridden: None };
        (Name::parse(name).unwrap(), region)
    };
    let regions: BTreeMap<Name, Region> = regions.iter().map(region).collect();
    let plan = Plan::of(version, &regions, &Traffic::default(), Duration::ZERO).unwrap();
    let standings = regions.keys().map(|name| (name.clone(), (Standing::Steady, String::new()))).collect();
    seal(&Published { epoch, plan, standings })
}

pub fn sealed_plan(plan: &control::Plan) -> control::SealedPlan {
    let plan = plan.encode_to_vec();
    let sha256 = Sha256::digest(&plan).to_vec();
    control::SealedPlan { plan: plan.into(), sha256: sha256.into() }
}

/// Where a node keeps what it was given.
pub struct Node {
    pub folder: TempDir,
    pub metrics: parking_lot::Mutex<Metrics>,
}

impl Node {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), metrics: parking_lot::Mutex::new(Metrics::new("test")) }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("snapshot")
    }

    /// As the process starts; with metrics of its own.
    pub fn intake(&self) -> Intake {
        let metrics = Metrics::new("test");
        *self.metrics.lock() = metrics.clone();
        Intake::resume(&self.path(), &metrics, &Audit::off())
    }

    pub fn shows(&self, line: &str) -> bool {
        self.metrics.lock().encode().unwrap().contains(&format!("\nspillway_{line}\n"))
    }
}
