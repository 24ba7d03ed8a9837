//! How the store holds a version: a header, and the content in parts.
//!
//! The rule: parts are written before the header, and the header in the commit that makes the version current. What
//! cannot be read as a whole is no version.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use spillway_core::intent::changes::{Counts, Set};
use spillway_core::resource::{Fault, Resource, parse_canonical};
use spillway_core::snapshot::Snapshot;
use spillway_proto::control;

use super::{Origin, Version};
use crate::store::{StoreError, Value};

pub const CURRENT: &str = "intent/current";
pub const HEADERS: &str = "intent/versions/";
/// Bytes of a part.
const PART: usize = 1 << 20;

/// What the store says of a version beside its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub version: u64,
    pub unix_ms: i64,
    /// SPIFFE id.
    pub author: String,
    pub message: String,
    pub rolled_back_to: Option<u64>,
    pub added: u32,
    pub changed: u32,
    pub removed: u32,
    pub parts: usize,
    pub sha256: String,
    /// Kinds and names.
    pub confirmed_empty: Vec<(String, String)>,
}

pub fn header_key(version: u64) -> String {
    format!("{HEADERS}{version}")
}

/// What the keys of all parts begin with.
pub fn parts_prefix(version: u64) -> String {
    format!("intent/content/{version}/")
}

/// Padded, so that parts come in their order.
pub fn part_key(version: u64, part: usize) -> String {
    format!("{}{part:04}", parts_prefix(version))
}

pub fn parts(encoded: &Bytes) -> impl Iterator<Item = Bytes> + '_ {
    (0..encoded.len()).step_by(PART).map(|at| encoded.slice(at..encoded.len().min(at + PART)))
}

/// As they go into a Snapshot.
pub fn resources(resources: &[Resource]) -> Vec<control::Resource> {
    let resource = |resource: &Resource| control::Resource {
        kind: resource.spec.kind().to_owned(),
        name: resource.name.to_string(),
        spec_json: resource.canonical.clone(),
    };
    let mut all: Vec<_> = resources.iter().map(resource).collect();
    all.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    all
}

/// Reads and checks resources out of a Snapshot again.
pub fn compile(number: u64, resources: &[control::Resource]) -> Result<Snapshot, Vec<Fault>> {
    let mut read = Vec::with_capacity(resources.len());
    let mut faults = Vec::new();
    for control::Resource { kind, name, spec_json } in resources {
        match parse_canonical(kind, name, spec_json) {
            Ok(resource) => read.push(resource),
            Err(mut found) => faults.append(&mut found),
        }
    }
    if faults.is_empty() { Snapshot::compile(number, &read) } else { Err(faults) }
}

impl Version {
    pub fn new(
        origin: Origin,
        resources: Vec<control::Resource>,
        snapshot: Snapshot,
        confirmed_empty: Vec<control::ResourceName>,
    ) -> Self {
        let number = snapshot.version;
        let content = control::Snapshot { version: number, resources };
        let encoded = Bytes::from(content.encode_to_vec());
        let sha256 = Sha256::digest(&encoded).into();
        Self {
            number,
            origin,
            encoded,
            sha256,
            resources: content.resources,
            snapshot: Arc::new(snapshot),
            confirmed_empty,
        }
    }

    /// For comparison with another one.
    pub fn set(&self) -> Set {
        set(&self.resources)
    }

    pub fn header(&self, unix_ms: i64, author: &str, message: &str, counts: Counts) -> Header {
        let Counts { added, changed, removed } = counts;
        let rolled_back_to = match self.origin {
            Origin::Applied => None,
            Origin::RolledBack { to } => Some(to),
        };
        let names = self.confirmed_empty.iter().map(|name| (name.kind.clone(), name.name.clone()));
        Header {
            version: self.number,
            unix_ms,
            author: author.to_owned(),
            message: message.to_owned(),
            rolled_back_to,
            added,
            changed,
            removed,
            parts: parts(&self.encoded).count(),
            sha256: hex(&self.sha256),
            confirmed_empty: names.collect(),
        }
    }

    /// Out of the store: its header and all parts that are there under its number.
    pub fn read(header: &Header, parts: &[(String, Value)]) -> Result<Self, StoreError> {
        let corrupt = || StoreError::Corrupt { key: header_key(header.version) };
        let mut encoded = BytesMut::new();
        // More may be left of an attempt that came to nothing.
        for part in parts.get(..header.parts).ok_or_else(corrupt)? {
            encoded.extend_from_slice(&part.1.bytes);
        }
        let encoded = encoded.freeze();
        let sha256: [u8; 32] = Sha256::digest(&encoded).into();
        if hex(&sha256) != header.sha256 {
            return Err(corrupt());
        }
        let content = control::Snapshot::decode(encoded.clone()).map_err(|_| corrupt())?;
        let snapshot = compile(header.version, &content.resources).map_err(|_| corrupt())?;
        if content.version != header.version {
            return Err(corrupt());
        }
        let origin = header.rolled_back_to.map_or(Origin::Applied, |to| Origin::RolledBack { to });
        let name = |(kind, name): &(String, String)| control::ResourceName { kind: kind.clone(), name: name.clone() };
        let confirmed_empty = header.confirmed_empty.iter().map(name).collect();
        let (number, snapshot) = (header.version, Arc::new(snapshot));
        Ok(Self { number, origin, encoded, sha256, resources: content.resources, snapshot, confirmed_empty })
    }
}

pub fn set(resources: &[control::Resource]) -> Set {
    let entry =
        |resource: &control::Resource| ((resource.kind.clone(), resource.name.clone()), resource.spec_json.clone());
    resources.iter().map(entry).collect()
}

impl Header {
    pub fn encode(&self) -> Bytes {
        // A struct of numbers and texts has no form that cannot be written.
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    pub fn decode(key: &str, value: &Value) -> Result<Self, StoreError> {
        serde_json::from_slice(&value.bytes).map_err(|_| StoreError::Corrupt { key: key.to_owned() })
    }

    pub fn revision(&self) -> control::Revision {
        control::Revision {
            version: self.version,
            unix_ms: self.unix_ms,
            author: self.author.clone(),
            message: self.message.clone(),
            rolled_back_to: self.rolled_back_to.unwrap_or(0),
            added: self.added,
            changed: self.changed,
            removed: self.removed,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
