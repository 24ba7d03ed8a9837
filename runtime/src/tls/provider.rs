//! The one crypto provider in use: aws-lc-rs, AES-128-GCM with SHA-256 first.
//!
//! Processors of today have instructions for SHA-256 and few for SHA-384, whose suite rustls prefers: hashing was 23 % of the
//! samples of a loop of handshakes (perf, both ends). AES-128 is the mandatory suite of TLS 1.3 (RFC 8446, section 9.1), and
//! NIST's first category of strength against quantum computers is defined by it. Who offers AES-256 alone gets it.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CipherSuite, NamedGroup};

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(ordered()));

/// The provider of every TLS config of ours.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// Makes aws-lc-rs the process's default, for libraries that ask for one. Call it first in `main`;
/// later calls change nothing.
///
/// # Panics
/// If the build is wrong: the provider does not prefer X25519MLKEM768, or another part of the program
/// has installed a provider that does not.
pub fn install_provider() {
    // An error says that a default exists already: it is judged like our own.
    let _ = CryptoProvider::install_default(ordered());
    let default = CryptoProvider::get_default().expect("it was just installed");
    for provider in [default, &provider()] {
        let first = provider.kx_groups.first().map(|group| group.name());
        assert_eq!(first, Some(NamedGroup::X25519MLKEM768), "build with rustls's feature prefer-post-quantum");
    }
}

fn ordered() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}
