//! The one crypto provider in use: aws-lc-rs.

use std::sync::{Arc, LazyLock};

use rustls::NamedGroup;
use rustls::crypto::{CryptoProvider, aws_lc_rs};

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

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
    let _ = CryptoProvider::install_default(aws_lc_rs::default_provider());
    let default = CryptoProvider::get_default().expect("it was just installed");
    for provider in [default, &provider()] {
        let first = provider.kx_groups.first().map(|group| group.name());
        assert_eq!(first, Some(NamedGroup::X25519MLKEM768), "build with rustls's feature prefer-post-quantum");
    }
}
