//! Who is who where things grow: a gateway, up to a thousand pods, clients of many tenants.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_runtime::authority::{Authority, IssuedLeaf, LeafRequest};

use super::world::{POOL, REGION, TRUST_DOMAIN};

/// Longer than any run.
const LIFE: Duration = Duration::from_secs(3_600);

pub struct Pki {
    folder: PathBuf,
    authority: Authority,
    roots: Arc<RootCertStore>,
}

impl Pki {
    /// The folder gets `trust-bundle.pem`, `gateway.crt` and `gateway.key`.
    pub fn create(folder: &Path) -> Result<Self> {
        let authority = Authority::create(TrustDomain::parse(TRUST_DOMAIN)?)?;
        authority.save(folder)?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.trust_bundle().as_bytes())?)?;
        let pki = Self { folder: folder.to_owned(), authority, roots: Arc::new(roots) };
        let gateway = pki.issue(&format!("region/{REGION}/gateway/gw-0"))?;
        gateway.save(folder.join("gateway.crt"), folder.join("gateway.key"))?;
        Ok(pki)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn pod(&self, pod: &str) -> Result<Arc<ServerConfig>> {
        let (chain, key) = pems(&self.issue(&format!("region/{REGION}/sidecar/{POOL}/{pod}"))?)?;
        let clients = WebPkiClientVerifier::builder(self.roots.clone()).build()?;
        let mut config = ServerConfig::builder().with_client_cert_verifier(clients).with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    pub fn client(&self, tenant: &str) -> Result<Arc<ClientConfig>> {
        let (chain, key) = pems(&self.issue(&format!("tenant/{tenant}/client/bench"))?)?;
        let mut config =
            ClientConfig::builder().with_root_certificates(self.roots.clone()).with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn issue(&self, path: &str) -> Result<IssuedLeaf> {
        let id = SpiffeId::parse(&format!("spiffe://{TRUST_DOMAIN}/{path}"))?;
        Ok(self.authority.issue(&LeafRequest::new(id, LIFE).dialled_locally())?)
    }
}

fn pems(leaf: &IssuedLeaf) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).collect::<Result<_, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_slice(leaf.key.as_bytes())?))
}
