//! TLS towards the stores: 1.3 only, aws-lc-rs, the operator's own roots.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::settings::{InvalidSettings, TlsSettings};

pub(super) fn client_config(settings: &TlsSettings) -> Result<Arc<rustls::ClientConfig>, InvalidSettings> {
    const ROOTS: &str = "tls.ca";
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&settings.ca, ROOTS)? {
        roots.add(certificate).map_err(|_| InvalidSettings::Pem { setting: ROOTS })?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|_| InvalidSettings::Pem { setting: ROOTS })?
        .with_root_certificates(roots);
    let config = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            const IDENTITY: &str = "tls.certificate and tls.key";
            let chain = certificates(certificate, IDENTITY)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|_| InvalidSettings::Pem { setting: IDENTITY })?;
            builder.with_client_auth_cert(chain, key).map_err(|_| InvalidSettings::Pem { setting: IDENTITY })?
        }
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path, setting: &'static str) -> Result<Vec<CertificateDer<'static>>, InvalidSettings> {
    let pem = std::fs::read(path).map_err(|source| InvalidSettings::File { setting, source })?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|_| InvalidSettings::Pem { setting })?;
    if certificates.is_empty() { Err(InvalidSettings::Pem { setting }) } else { Ok(certificates) }
}
