//! A request's passage to another region as a header says it: signed by the gateway that forwards it.
//!
//! The rule: what is signed is exactly what is read, and the signature is that of the certificate of the connection
//! that it came over: so a passage is of no use to whoever sees it. Whether it is let in is core's
//! ([`spillway_core::failover::passage`]).
//!
//! ```text
//! 1 CLIENT SERIAL NOT_AFTER CLASS FROM TO PATH REQUEST_ID ISSUED EXPIRES HOPS SCHEME SIGNATURE
//! ```
//! One space between words; times are milliseconds since the Unix epoch; CLASS is a name, SCHEME the TLS signature
//! scheme's number, SIGNATURE hexadecimal, over [`CONTEXT`] and all that is before its space.

use std::fmt::Write;
use std::time::Duration;

use http::HeaderName;
use rustls::SignatureScheme;
use rustls_pki_types::CertificateDer;
use spillway_core::failover::{NoPassage, Passage};
use spillway_core::identity::{Serial, SpiffeId};
use spillway_core::limit::Class;
use spillway_core::units::Name;

use crate::tls::{Peer, Workload, provider};

/// Carries a passage. Counts only from gateways.
pub const FORWARDED: HeaderName = HeaderName::from_static("spillway-forwarded");
/// `1`: a probe of the region itself. Counts only from gateways and control nodes.
pub const PROBE: HeaderName = HeaderName::from_static("spillway-probe");

/// What keeps this signature apart from all others by the same key. Those of TLS begin with spaces
/// (RFC 8446, section 4.4.3).
const CONTEXT: &[u8] = b"spillway-forwarded 1\0";
const VERSION: &str = "1";
/// Two SPIFFE ids of their longest, and all else.
const MOST: usize = 6 << 10;
/// Those that TLS 1.3 has for certificates' keys.
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
];

/// Our key cannot sign; the operator's fault, who chose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("our certificate's key signs in no way that peers accept")]
pub struct CannotSign;

/// The header's value. Signed by the key of our certificate of now.
pub fn issue(workload: &Workload, passage: &Passage) -> Result<String, CannotSign> {
    let key = workload.signing_key();
    let signer = key.choose_scheme(&SCHEMES).ok_or(CannotSign)?;
    let mut text = words(passage, signer.scheme());
    let signature = signer.sign(&signed(&text)).map_err(|_| CannotSign)?;
    text.push(' ');
    for byte in signature {
        // Writing to memory cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// Reads what a peer says over a connection of its own.
pub fn read(text: &str, peer: &Peer) -> Result<Passage, NoPassage> {
    let (said, signature) = text.rsplit_once(' ').filter(|_| text.len() <= MOST).ok_or(NoPassage::Unreadable)?;
    let (passage, scheme) = passage(said).ok_or(NoPassage::Unreadable)?;
    let signature = hexadecimal(signature).ok_or(NoPassage::Unreadable)?;
    let leaf = peer.chain.first().ok_or(NoPassage::Unsigned)?;
    if is_signed(leaf, scheme, &signed(said), &signature) { Ok(passage) } else { Err(NoPassage::Unsigned) }
}

fn words(passage: &Passage, scheme: SignatureScheme) -> String {
    let Passage { client, serial, not_after, class, from, to, path, request_id, issued, expires, hops } = passage;
    let [not_after, issued, expires] = [not_after, issued, expires].map(Duration::as_millis);
    let scheme = u16::from(scheme);
    format!(
        "{VERSION} {client} {serial} {not_after} {class} {from} {to} {path} {request_id} {issued} {expires} {hops} {scheme}"
    )
}

/// Exact: what is not written as [`words`] writes it is not read.
fn passage(said: &str) -> Option<(Passage, SignatureScheme)> {
    let words_of: Vec<&str> = said.split(' ').collect();
    let [VERSION, client, serial, not_after, class, from, to, path, request_id, issued, expires, hops, scheme] =
        words_of[..]
    else {
        return None;
    };
    let time = |text: &str| Some(Duration::from_millis(text.parse().ok()?));
    let scheme: u16 = scheme.parse().ok()?;
    let scheme = SCHEMES.into_iter().find(|known| u16::from(*known) == scheme)?;
    let passage = Passage {
        client: SpiffeId::parse(client).ok()?,
        serial: Serial::parse(serial)?,
        not_after: time(not_after)?,
        class: Class::parse(class)?,
        from: Name::parse(from).ok()?,
        to: Name::parse(to).ok()?,
        path: path.to_owned(),
        request_id: request_id.to_owned(),
        issued: time(issued)?,
        expires: time(expires)?,
        hops: hops.parse().ok()?,
    };
    (words(&passage, scheme) == said).then_some((passage, scheme))
}

fn signed(said: &str) -> Vec<u8> {
    [CONTEXT, said.as_bytes()].concat()
}

fn is_signed(leaf: &CertificateDer<'_>, scheme: SignatureScheme, message: &[u8], signature: &[u8]) -> bool {
    let algorithms = provider().signature_verification_algorithms;
    let Some((_, candidates)) = algorithms.mapping.iter().find(|(known, _)| *known == scheme) else { return false };
    let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return false };
    candidates.iter().any(|algorithm| leaf.verify_signature(*algorithm, message, signature).is_ok())
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let pair = |pair: &[u8]| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?);
    text.as_bytes().chunks(2).map(pair).collect()
}

#[cfg(test)]
#[path = "forwarding_tests.rs"]
mod tests;
