//! Envoy as a peer, started by `tests/servers/envoy.sh`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, said};
use crate::bench::message::{Protocol, grpc, rest};
use crate::bench::process;

/// A process of Envoy; it ends with this value.
#[derive(Debug)]
pub struct Envoy {
    /// Where its listener `edge` is.
    pub address: SocketAddr,
    pub pid: u32,
    _guard: Guard,
}

/// Kills Envoy, which its script starts in a session of its own, when its standard input ends: when this
/// value goes, or when the bench was killed.
#[derive(Debug)]
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Waiting closes the standard input first.
        let _ = self.0.wait();
    }
}

/// Starts Envoy with a configuration whose listener is called `edge`.
pub fn start(folder: &Path, config: &Path, cores: &[usize], threads: usize) -> Result<Envoy> {
    let script = crate::root().join("tests/servers/envoy.sh");
    let guard = Command::new("setsid")
        .args(["bash", "-c", r#"read -r _; exec "$0" kill "$1""#])
        .args([script.as_path(), folder])
        .stdin(Stdio::piped())
        .spawn()
        .context("setsid and bash are needed")?;
    let guard = Guard(guard);
    let mut start = Command::new(&script);
    start.arg("start").args([folder, config]).env("CONCURRENCY", threads.to_string()).stdin(Stdio::null());
    // The log is looked at when a turn ends; left alone, Envoy holds up to 64 KiB of it for 10 s.
    start.env("ENVOY_EXTRA", "--file-flush-interval-msec 1000");
    let output = process::on_cores(cores, || start.output())??;
    ensure!(output.status.success(), "envoy.sh: {}", String::from_utf8_lossy(&output.stderr));
    let pid = std::fs::read_to_string(folder.join("envoy.pid"))?.trim().parse()?;
    let listeners = admin(folder, "/listeners")?;
    let address = listeners.lines().find_map(|line| line.strip_prefix("edge::"));
    let address = address.with_context(|| format!("Envoy has no listener: {listeners}"))?.parse()?;
    Ok(Envoy { address, pid, _guard: guard })
}

/// Its configuration as a gateway. `constant`: it answers itself.
pub(super) fn config(setting: &Setting, folder: &Path, constant: bool) -> Result<PathBuf> {
    let routes = if constant { constant_routes(folder)? } else { upstream_routes() };
    let [grpc, rest] = &routes;
    setting.fill("envoy.yaml", folder, &[("grpc", grpc), ("rest", rest)])
}

fn upstream_routes() -> [String; 2] {
    [grpc::PATH, rest::PATH]
        .map(|path| format!(r#"{{ match: {{ path: "{path}" }}, route: {{ cluster: upstream, timeout: 1s }} }}"#))
}

/// Direct responses. To a call of the content type `application/grpc` Envoy would send no body, but a status with the
/// body as its message; asked otherwise it sends the body, and the status in the head. It has no trailers of its own.
fn constant_routes(folder: &Path) -> Result<[String; 2]> {
    let route = |path: &str, protocol: Protocol, headers: &[(&str, &str)]| -> Result<String> {
        let body = folder.join(format!("answer-{}", protocol.name()));
        std::fs::write(&body, protocol.response())?;
        let header = |(name, value): &(&str, &str)| {
            format!(r#"{{ header: {{ key: {name}, value: "{value}" }}, append_action: OVERWRITE_IF_EXISTS_OR_ADD }}"#)
        };
        let headers: Vec<String> = headers.iter().map(header).collect();
        Ok(format!(
            r#"{{ match: {{ path: "{path}" }}, direct_response: {{ status: 200, body: {{ filename: "{}" }} }}, response_headers_to_add: [{}] }}"#,
            body.display(),
            headers.join(", ")
        ))
    };
    let (grpc_type, rest_type, length) = (grpc::CONTENT_TYPE, rest::CONTENT_TYPE, rest::response_head_length());
    Ok([
        route(grpc::PATH, Protocol::Grpc, &[("content-type", grpc_type.to_str()?), ("grpc-status", "0")])?,
        route(
            rest::PATH,
            Protocol::H2,
            &[("content-type", rest_type.to_str()?), (rest::HEAD_LENGTH.as_str(), length.to_str()?)],
        )?,
    ])
}

/// What Envoy's admin port answers.
fn admin(folder: &Path, path: &str) -> Result<String> {
    let address: SocketAddr = std::fs::read_to_string(folder.join("admin"))?.trim().parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").context("no HTTP answer")?.1.to_owned())
}

/// The version that the binary names: `envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`.
pub fn version() -> Result<String> {
    let text = said("envoy", "--version")?;
    let version = text.split_once("version: ").and_then(|(_, rest)| rest.split('/').nth(1));
    Ok(version.context("Envoy names no version")?.to_owned())
}
