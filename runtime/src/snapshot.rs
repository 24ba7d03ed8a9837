//! The Snapshot in a file and in pushes: sealed by who writes it, checked and followed by who serves from it.
//!
//! The rule: a file is taken as a whole or not at all, and versions only rise. What is refused leaves
//! the last good Snapshot in place, with a reason and a count.

mod subscription;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use spillway_core::resource::{Fault, Resource, parse_canonical};
use spillway_core::snapshot::Snapshot;
use spillway_proto::control;

pub(crate) use subscription::Kept;
pub use subscription::Subscription;

/// 100,000 resources of a size seen in practice fit; more is a mistake.
const MAX_FILE: u64 = 256 << 20;

/// Why a Snapshot is not taken. The writer's fault; the last good one stays.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("the snapshot file cannot be read")]
    Unreadable(#[from] std::io::Error),
    #[error("this is no sealed snapshot")]
    Malformed,
    #[error("the snapshot's bytes do not match its SHA-256")]
    Checksum,
    #[error("the snapshot's version {found} is not above {current}, which is served")]
    Version { found: u64, current: u64 },
    #[error("the snapshot is not valid: {}", listed(.0))]
    Invalid(Vec<Fault>),
}

impl Refused {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::Malformed => "malformed",
            Self::Checksum => "checksum",
            Self::Version { .. } => "version",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// Encodes resources as a snapshot file. The same resources and version give the same bytes.
pub fn seal(resources: &[Resource], version: u64) -> Vec<u8> {
    let mut resources: Vec<_> = resources
        .iter()
        .map(|resource| control::Resource {
            kind: resource.spec.kind().to_owned(),
            name: resource.name.to_string(),
            spec_json: resource.canonical.clone(),
        })
        .collect();
    resources.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    wrap(control::Snapshot { version, resources }.encode_to_vec().into())
}

/// Puts an encoded Snapshot into a snapshot file.
pub(crate) fn wrap(encoded: Bytes) -> Vec<u8> {
    let sha256 = Sha256::digest(&encoded).to_vec();
    control::SealedSnapshot { snapshot: encoded, sha256: sha256.into() }.encode_to_vec()
}

/// Checks a snapshot file and compiles what is in it.
pub fn open(sealed: &[u8]) -> Result<Snapshot, Refused> {
    compile(unwrap(sealed)?)
}

/// The encoded Snapshot in a snapshot file.
pub(crate) fn unwrap(sealed: &[u8]) -> Result<Bytes, Refused> {
    let sealed = control::SealedSnapshot::decode(sealed).map_err(|_| Refused::Malformed)?;
    if sealed.snapshot.is_empty() {
        return Err(Refused::Malformed);
    }
    if Sha256::digest(&sealed.snapshot)[..] != sealed.sha256[..] {
        return Err(Refused::Checksum);
    }
    Ok(sealed.snapshot)
}

/// Compiles an encoded Snapshot.
pub fn compile(encoded: Bytes) -> Result<Snapshot, Refused> {
    let snapshot = control::Snapshot::decode(encoded).map_err(|_| Refused::Malformed)?;
    let mut resources = Vec::with_capacity(snapshot.resources.len());
    let mut faults = Vec::new();
    for control::Resource { kind, name, spec_json } in &snapshot.resources {
        match parse_canonical(kind, name, spec_json) {
            Ok(resource) => resources.push(resource),
            Err(mut found) => faults.append(&mut found),
        }
    }
    if !faults.is_empty() {
        return Err(Refused::Invalid(faults));
    }
    Snapshot::compile(snapshot.version, &resources).map_err(Refused::Invalid)
}

/// The first faults, so that one log line stays one.
fn listed(faults: &[Fault]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = faults.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = faults.len().saturating_sub(SHOWN);
    if more == 0 { shown.join("; ") } else { format!("{}; and {more} more", shown.join("; ")) }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
