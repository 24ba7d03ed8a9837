//! HAProxy as a peer, from the machine's package.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use http::HeaderValue;

use super::{Foreground, Proxy, Running, Setting, free_address, said};
use crate::bench::identities::CLIENT;
use crate::bench::message::{Protocol, grpc, rest};

/// The tag of a URI among a certificate's subject alternative names (RFC 5280, GeneralName [6]).
const URI_TAG: u8 = 0x86;

/// `constant`: it answers itself.
pub(super) fn start(setting: &Setting, folder: PathBuf, constant: bool) -> Result<Proxy> {
    let address = free_address()?;
    std::fs::write(folder.join("clients.map"), format!("{} {CLIENT}\n", uri_name(CLIENT)?))?;
    let constant = if constant { answers(&folder)? } else { String::new() };
    let port = address.port().to_string();
    let config = setting.fill("haproxy.cfg", &folder, &[("port", &port), ("constant", &constant)])?;
    let log = File::create(folder.join("access.log"))?;
    let config = config.to_string_lossy();
    let (arguments, errors) = (["-db", "-f", &config], folder.join("haproxy.log"));
    let running = Foreground::start("haproxy", &arguments, log.into(), &errors, &setting.cores, address)?;
    Ok(Proxy { address, pid: running.id(), folder, _running: Running::Foreground(running) })
}

/// A URI as it stands in a certificate, in the hexadecimal of HAProxy's `hex`.
fn uri_name(uri: &str) -> Result<String> {
    // Lengths up to 127 take one byte in DER.
    let length = u8::try_from(uri.len()).ok().filter(|length| *length < 0x80).context("a long SPIFFE id")?;
    let mut hex = String::new();
    for byte in [URI_TAG, length].into_iter().chain(uri.bytes()) {
        write!(hex, "{byte:02X}")?;
    }
    Ok(hex)
}

/// The rules with which it answers itself; like Envoy it has no trailers of its own, so the status stands in the head.
fn answers(folder: &Path) -> Result<String> {
    let length = rest::response_head_length();
    let rule = |path: &str,
                protocol: Protocol,
                content_type: &HeaderValue,
                name: &str,
                value: &str|
     -> Result<String> {
        let body = folder.join(format!("answer-{}", protocol.name()));
        std::fs::write(&body, protocol.response())?;
        let (content_type, body) = (content_type.to_str()?, body.display());
        Ok(format!(
            "  http-request return status 200 content-type {content_type} file {body} hdr {name} {value} if {{ path {path} }}"
        ))
    };
    let grpc = rule(grpc::PATH, Protocol::Grpc, &grpc::CONTENT_TYPE, "grpc-status", "0")?;
    let rest = rule(rest::PATH, Protocol::H2, &rest::CONTENT_TYPE, rest::HEAD_LENGTH.as_str(), length.to_str()?)?;
    Ok(format!("{grpc}\n{rest}"))
}

/// The version that the binary names: `HAProxy version 2.6.12-1+deb12u4 2026/10/17 - …`.
pub(super) fn version() -> Result<String> {
    let text = said("haproxy", "-v")?;
    let version = text.strip_prefix("HAProxy version ").and_then(|rest| rest.split(['-', ' ']).next());
    Ok(version.context("HAProxy names no version")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_name_begins_with_tag_and_length() {
        assert_eq!(uri_name("ab:c").unwrap(), "860461623A63");
        assert!(uri_name(&"a".repeat(128)).is_err());
    }
}
