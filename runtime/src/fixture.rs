//! What this crate's tests share: a trust domain in a temporary folder.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::{SpiffeId, TrustDomain};
use tempfile::TempDir;

use crate::authority::{Authority, IssuedLeaf, LeafRequest};
use crate::tls::{IdentitySettings, Workload};

pub const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gw-0";
pub const SIDECAR: &str = "spiffe://spillway.test/region/eu/sidecar/scorers/pod-0";
pub const CLIENT: &str = "spiffe://spillway.test/tenant/acme/client/web";
pub const HOUR: Duration = Duration::from_secs(3_600);

pub struct Domain {
    pub folder: TempDir,
    pub authority: Authority,
}

impl Domain {
    pub fn create() -> Self {
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), authority }
    }

    pub fn issue(&self, uri: &str) -> IssuedLeaf {
        self.authority.issue(&LeafRequest::new(id(uri), HOUR)).unwrap()
    }

    /// Saves a leaf of ours with a bundle, which is ours if none is given.
    pub fn settings(&self, uri: &str, bundle: Option<&str>) -> IdentitySettings {
        let folder = self.folder.path().join(uri.rsplit('/').next().unwrap());
        self.issue(uri).save_workload(folder, bundle.unwrap_or(self.authority.trust_bundle())).unwrap()
    }

    pub fn workload(&self, uri: &str) -> Arc<Workload> {
        Workload::load(&self.settings(uri, None)).unwrap()
    }
}

pub fn id(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

/// Waits for a condition, at most ten seconds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not in ten seconds: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
