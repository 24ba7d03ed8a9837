//! `spillway cache purge`: sends results away before their time.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The gateway itself waits a second for Redis.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of its answer.
const MOST: u64 = 64 << 10;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Send results away: of a gateway at once, of the region's others within moments
    Purge(Purge),
}

#[derive(clap::Args)]
struct Purge {
    /// The admin port of a gateway, from its own machine
    #[arg(long, value_name = "ADDRESS")]
    admin: SocketAddr,
    #[command(flatten)]
    what: What,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Every result of a model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Every result about an entity, of any model and tenant
    #[arg(long, value_name = "ID")]
    entity: Option<String>,
    /// Every result of a tenant
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Action::Purge(Purge { admin, what }) = &arguments.action;
    let all = [("model", &what.model), ("entity", &what.entity), ("tenant", &what.tenant)];
    let query = all.into_iter().find_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_ref()?))));
    let (status, body) = post(*admin, &format!("/cache/purge?{}", query.unwrap_or_default()))
        .with_context(|| format!("the gateway's admin port {admin}"))?;
    let purged: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
    if status != 200 {
        bail!("the gateway says {status}: {}", purged["error"].as_str().unwrap_or(body.trim()));
    }
    println!("{} results purged, {} bytes", purged["entries"], purged["bytes"]);
    if purged["region"] == false {
        eprintln!("Redis could not be told: the region's other gateways keep theirs; purge again when it is back");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Status and body.
fn post(admin: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let head = format!("POST {path} HTTP/1.1\r\nhost: {admin}\r\nx-spillway-admin: purge\r\n");
    stream.write_all(format!("{head}content-length: 0\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MOST).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
    Ok((status, body.to_owned()))
}

/// For a URL's query.
fn encoded(value: &str) -> String {
    value.bytes().fold(String::new(), |mut text, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => text.push(char::from(byte)),
            // Writing to memory cannot fail.
            byte => drop(write!(text, "%{byte:02x}")),
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_any_bytes_fit_into_a_url() {
        assert_eq!(encoded("a-b_c.9"), "a-b_c.9");
        assert_eq!(encoded("a b&c=\u{e9}\n"), "a%20b%26c%3d%c3%a9%0a");
    }
}
