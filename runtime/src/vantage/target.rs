//! Whom to probe, and with what.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use spillway_core::health::Gateway;
use spillway_core::identity::{Role, SpiffeId};
use spillway_core::inference::InferRequest;
use spillway_core::inference::synthetic::synthetic;
use spillway_core::resource::{Model, Tier};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use crate::oip;

/// The id of synthetic requests.
const ID: &str = "probe";

/// One gateway.
pub(super) struct Target {
    pub(super) region: Name,
    pub(super) address: SocketAddr,
    pub(super) expected: SpiffeId,
    /// For each tier-1 model that its region serves.
    pub(super) asked: Arc<[Asked]>,
}

/// A synthetic request.
pub(super) struct Asked {
    pub(super) model: Arc<Model>,
    pub(super) request: InferRequest,
    /// The length-prefixed message, in pieces.
    pub(super) frame: Vec<Bytes>,
}

impl Target {
    /// Whether it is the same gateway at the same place.
    pub(super) fn reaches(&self, other: &Self) -> bool {
        (self.address, &self.expected) == (other.address, &other.expected)
    }
}

/// The gateways of all regions but our own.
pub(super) fn targets(snapshot: &Snapshot, own: Option<&Name>) -> Vec<(Gateway, Target)> {
    let mut targets = Vec::new();
    for (region, spec) in snapshot.regions.iter().filter(|(region, _)| own != Some(*region)) {
        let asked: Arc<[Asked]> = asked(snapshot, region).into();
        for gateway in &spec.gateways {
            let role = Role::Gateway { region: region.clone(), name: gateway.name.clone() };
            let expected = SpiffeId { trust_domain: spec.trust_domain.clone(), role };
            let target = Target { region: region.clone(), address: gateway.address, expected, asked: asked.clone() };
            targets.push((Gateway { region: region.clone(), node: gateway.name.clone() }, target));
        }
    }
    targets
}

fn asked(snapshot: &Snapshot, region: &Name) -> Vec<Asked> {
    let served = |model: &Model| model.tier == Tier::One && snapshot.pool_of(model, region).is_some();
    let request = |(name, model): (&Name, &Arc<Model>)| {
        let version = model.versions.first()?;
        let request = synthetic(name.as_str(), version.as_str(), ID, model)?;
        Some(Asked { model: model.clone(), frame: oip::frame(&request), request })
    };
    snapshot.models.iter().filter(|(_, model)| served(model)).filter_map(request).collect()
}
