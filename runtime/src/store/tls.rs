//! TLS towards the stores: 1.3 only, aws-lc-rs, the operator's own roots.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::settings::{InvalidStore, TlsSettings};
use crate::tls::provider;

pub fn client_config(settings: &TlsSettings) -> Result<Arc<rustls::ClientConfig>, InvalidStore> {
    const ROOTS: &str = "tls.ca";
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&settings.ca, ROOTS)? {
        roots.add(certificate).map_err(|_| InvalidStore::Pem { setting: ROOTS })?;
    }
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|_| InvalidStore::Pem { setting: ROOTS })?
        .with_root_certificates(roots);
    let config = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            const IDENTITY: &str = "tls.certificate and tls.key";
            let chain = certificates(certificate, IDENTITY)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|_| InvalidStore::Pem { setting: IDENTITY })?;
            builder.with_client_auth_cert(chain, key).map_err(|_| InvalidStore::Pem { setting: IDENTITY })?
        }
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path, setting: &'static str) -> Result<Vec<CertificateDer<'static>>, InvalidStore> {
    let pem = std::fs::read(path).map_err(|error| InvalidStore::unreadable(setting, path, &error))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|_| InvalidStore::Pem { setting })?;
    if certificates.is_empty() { Err(InvalidStore::Pem { setting }) } else { Ok(certificates) }
}
