//! Envoy as one hop, in the gateway's place or in the sidecar's, with the certificates of a [`Region`]. What it
//! checks is told in `tests/bench/envoy-hop.yaml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::bench::peers::envoy::{self, Envoy};
use crate::harness::region::{Region, id};

const TEMPLATE: &str = "envoy-hop.yaml";

/// Whose place it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Called by the client `acme`, calls another Envoy in the sidecar's place.
    Gateway,
    /// Called by `gateway-0`, calls a model server without TLS.
    Sidecar,
}

/// Starts one with one worker thread on a core; it ends with the value.
pub fn start(place: Place, region: &Region, upstream: SocketAddr, core: usize) -> Result<Envoy> {
    let (name, caller) = match place {
        Place::Gateway => ("gateway-0", id("tenant/acme/client/web")),
        Place::Sidecar => ("pod-0", id("region/eu-west/gateway/gateway-0")),
    };
    let files = region.identity(name);
    let folder = region.folder.join(format!("envoy-{name}"));
    std::fs::create_dir_all(&folder)?;
    let config = fill(
        &folder,
        &[
            ("certificate", &files.certificate.display().to_string()),
            ("key", &files.key.display().to_string()),
            ("bundle", &files.trust_bundle.display().to_string()),
            ("folder", &folder.display().to_string()),
            ("caller", &caller.to_string()),
            ("unlimited", &(place == Place::Sidecar).to_string()),
            ("mtls", &(place == Place::Gateway).to_string()),
            ("upstream_id", &id("region/eu-west/sidecar/scorers/pod-0").to_string()),
            ("upstream_port", &upstream.port().to_string()),
        ],
    )?;
    envoy::start(&folder, &config, &[core], 1)
}

fn fill(folder: &Path, places: &[(&str, &str)]) -> Result<PathBuf> {
    let mut text = std::fs::read_to_string(crate::root().join("tests/bench").join(TEMPLATE))?;
    for (name, value) in places {
        text = text.replace(&format!("{{{{{name}}}}}"), value);
    }
    ensure!(!text.contains("{{"), "{TEMPLATE} has a place that nothing fills");
    let path = folder.join(TEMPLATE);
    std::fs::write(&path, text)?;
    Ok(path)
}
