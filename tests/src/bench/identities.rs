//! The trust domain of a bench: one root, and leaves for the proxy, the upstream and the client.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::crypto::aws_lc_rs::{self, cipher_suite::TLS13_AES_128_GCM_SHA256};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_runtime::authority::{Authority, LeafRequest};

/// Longer than any run.
const LIFE: Duration = Duration::from_secs(3_600);
pub const TRUST_DOMAIN: &str = "spillway.test";
pub const GATEWAY: &str = "spiffe://spillway.test/region/bench/gateway/gw-0";
pub const UPSTREAM: &str = "spiffe://spillway.test/region/bench/sidecar/scorers/pod-0";
pub const CLIENT: &str = "spiffe://spillway.test/tenant/acme/client/bench";
/// A client of the same tenant that nothing allows anything.
pub const STRANGER: &str = "spiffe://spillway.test/tenant/acme/client/stranger";

/// A folder with `trust-bundle.pem` and, for `gateway`, `upstream`, `client` and `stranger`, NAME.crt and NAME.key.
#[derive(Clone, Debug)]
pub struct Identities {
    folder: PathBuf,
}

impl Identities {
    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Makes all certificates anew.
    pub fn create(folder: &Path) -> Result<Self> {
        let authority = Authority::create(TrustDomain::parse(TRUST_DOMAIN)?)?;
        authority.save(folder)?;
        for (name, id) in [("gateway", GATEWAY), ("upstream", UPSTREAM), ("client", CLIENT), ("stranger", STRANGER)] {
            let leaf = authority.issue(&LeafRequest::new(SpiffeId::parse(id)?, LIFE).dialled_locally())?;
            leaf.save(folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")))?;
        }
        Ok(Self::at(folder))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the load generator dials with, HTTP/2 offered.
    pub fn client(&self) -> Result<ClientConfig> {
        self.dialling_as("client", provider())
    }

    /// The same with certain key exchange groups only.
    pub fn client_with(&self, groups: Vec<&'static dyn SupportedKxGroup>) -> Result<ClientConfig> {
        self.dialling_as("client", provider_with(groups))
    }

    /// The same with a key and a certificate that nobody has seen. The authority is [`Self::authority`].
    pub fn newcomer_with(
        &self,
        authority: &Authority,
        groups: Vec<&'static dyn SupportedKxGroup>,
    ) -> Result<ClientConfig> {
        let leaf = authority.issue(&LeafRequest::new(SpiffeId::parse(CLIENT)?, LIFE).dialled_locally())?;
        let chain = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).collect::<Result<_, _>>()?;
        self.dialling_with((chain, PrivateKeyDer::from_pem_slice(leaf.key.as_bytes())?), provider_with(groups))
    }

    /// Who issued all certificates of the bench.
    pub fn authority(&self) -> Result<Authority> {
        Ok(Authority::load(&self.folder)?)
    }

    /// What a client dials with that every proxy must refuse.
    pub fn stranger(&self) -> Result<ClientConfig> {
        self.dialling_as("stranger", provider())
    }

    fn dialling_as(&self, name: &str, provider: Arc<CryptoProvider>) -> Result<ClientConfig> {
        self.dialling_with(self.leaf(name)?, provider)
    }

    fn dialling_with(&self, (chain, key): Leaf, provider: Arc<CryptoProvider>) -> Result<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    /// What the upstream serves with, over HTTP/2 or HTTP/1.1: only clients of this trust domain.
    pub fn upstream(&self) -> Result<Arc<ServerConfig>> {
        let (chain, key) = self.leaf("upstream")?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        let path = self.folder.join("trust-bundle.pem");
        roots.add(CertificateDer::from_pem_file(&path).with_context(|| path.display().to_string())?)?;
        Ok(roots)
    }

    fn leaf(&self, name: &str) -> Result<Leaf> {
        let chain =
            CertificateDer::pem_file_iter(self.folder.join(format!("{name}.crt")))?.collect::<Result<_, _>>()?;
        Ok((chain, PrivateKeyDer::from_pem_file(self.folder.join(format!("{name}.key")))?))
    }
}

/// A chain, and the key of its first certificate.
type Leaf = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn provider_with(groups: Vec<&'static dyn SupportedKxGroup>) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { kx_groups: groups, ..(*provider()).clone() })
}

/// One cipher suite on both hops: left alone, rustls and BoringSSL choose different ones, and the
/// difference between AES-128 and AES-256 would count as a difference between proxies.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { cipher_suites: vec![TLS13_AES_128_GCM_SHA256], ..aws_lc_rs::default_provider() })
}
