//! What a Delta makes of the Snapshot that it is for.
//!
//! The rule: the result is encoded again, in the one canonical form, and counts only if its SHA-256 is the one that
//! the sender said. So neither side needs to trust the other's idea of what was there before.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use spillway_proto::control;

use super::refusal::{Reason, Refusal};

/// The canonical form: sorted by kind and name, each once.
pub fn encode(version: u64, resources: BTreeMap<(String, String), String>) -> Bytes {
    let resource = |((kind, name), spec_json)| control::Resource { kind, name, spec_json };
    let resources = resources.into_iter().map(resource).collect();
    control::Snapshot { version, resources }.encode_to_vec().into()
}

/// The encoded Snapshot that the Delta makes of `base`, which is the encoded Snapshot that is served. Of a whole one
/// the base does not matter.
pub(super) fn apply(delta: control::Delta, base: &Bytes) -> Result<Bytes, Refusal> {
    let mut resources = BTreeMap::new();
    if delta.base != 0 {
        let unreadable = |_| Refusal::new(Reason::Base, "what is served cannot be read again; send it whole");
        let base = control::Snapshot::decode(base.clone()).map_err(unreadable)?;
        resources.extend(base.resources.into_iter().map(keyed));
    }
    for control::ResourceName { kind, name } in delta.removed {
        resources.remove(&(kind, name));
    }
    resources.extend(delta.changed.into_iter().map(keyed));
    let encoded = encode(delta.target, resources);
    if Sha256::digest(&encoded)[..] != delta.target_sha256[..] {
        return Err(Refusal::new(Reason::Checksum, "what it makes of the base does not match its SHA-256"));
    }
    Ok(encoded)
}

fn keyed(resource: control::Resource) -> ((String, String), String) {
    ((resource.kind, resource.name), resource.spec_json)
}
