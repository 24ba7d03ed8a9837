//! A gateway's admin port, as the commands of operators ask it.
//!
//! The rule: no step of an exchange is waited for without end, no answer read without a bound, and every fault
//! says which port.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// For each step of an exchange; a gateway itself waits a second for Redis.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an answer: `/config` names every pod, model and bucket.
const MOST: u64 = 64 << 20;
const END: &[u8] = b"\r\n\r\n";

/// Which gateway.
#[derive(clap::Args)]
#[command(next_help_heading = "Gateway")]
pub struct Target {
    /// Its admin port, which answers its own machine alone
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "dev", conflicts_with = "dev")]
    admin: Option<String>,
    /// One that `spillway dev` runs out of this folder (.dev)
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, default_missing_value = ".dev")]
    dev: Option<PathBuf>,
    /// Of which region, with --dev [default: the first one]
    #[arg(long, value_name = "NAME", requires = "dev")]
    region: Option<String>,
}

impl Target {
    pub fn address(&self) -> Result<SocketAddr> {
        match (&self.admin, &self.dev) {
            (Some(admin), _) => address(admin),
            (None, Some(folder)) => address(&crate::dev::admin(folder, self.region.as_deref())?),
            (None, None) => bail!("--admin or --dev is needed"),
        }
    }
}

/// Of `HOST:PORT`, also as a URL.
pub fn address(given: &str) -> Result<SocketAddr> {
    let host = given.strip_prefix("http://").unwrap_or(given).trim_end_matches('/');
    let found = host.to_socket_addrs().with_context(|| format!("{given}: expected HOST:PORT"))?.next();
    found.with_context(|| format!("{given} has no address"))
}

/// What is posted.
#[derive(Default)]
pub struct Post<'a> {
    /// Says what is meant, for `x-spillway-admin`.
    pub word: &'a str,
    /// More headers, checked.
    pub headers: &'a [(String, String)],
    pub body: &'a [u8],
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// The answer, if it is a good one of JSON.
    pub fn good(self) -> Result<serde_json::Value> {
        let json = self.json();
        if self.status == 404 {
            bail!("what answers there cannot do this: it is no gateway, or an older one");
        }
        if self.status != 200 {
            bail!("the gateway says {}: {}", self.status, json["error"].as_str().unwrap_or(self.body.trim()));
        }
        if !json.is_object() {
            bail!("what answers there is no gateway of this version: it gave no JSON");
        }
        Ok(json)
    }
}

pub fn get(admin: SocketAddr, path: &str) -> Result<Answer> {
    exchange(admin, &format!("GET {path}"), &Post::default()).with_context(|| port(admin))
}

pub fn post(admin: SocketAddr, path: &str, post: &Post<'_>) -> Result<Answer> {
    exchange(admin, &format!("POST {path}"), post).with_context(|| port(admin))
}

fn port(admin: SocketAddr) -> String {
    format!("the gateway's admin port {admin}")
}

fn exchange(admin: SocketAddr, line: &str, post: &Post<'_>) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = format!("{line} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n");
    if !post.word.is_empty() {
        // Writing to memory cannot fail.
        let _ = write!(head, "x-spillway-admin: {}\r\ncontent-length: {}\r\n", post.word, post.body.len());
    }
    for (name, value) in post.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if !post.body.is_empty() {
        // A body that is not wanted is not sent: its refusal could be lost.
        head.push_str("expect: 100-continue\r\n");
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let mut read = Vec::new();
    let mut answer = read_head(&mut stream, &mut read)?;
    if answer.0 == 100 {
        stream.write_all(post.body)?;
        answer = read_head(&mut stream, &mut read)?;
    }
    let (status, length) = answer;
    stream.take(MOST).read_to_end(&mut read)?;
    if length.is_some_and(|length| length != read.len()) {
        bail!("the answer broke off");
    }
    Ok(Answer { status, body: String::from_utf8(read).context("the answer is no text")? })
}

/// The next status, and how long its body is if it says so; what came after its head stays in `read`.
fn read_head(stream: &mut TcpStream, read: &mut Vec<u8>) -> Result<(u16, Option<usize>)> {
    const MOST_HEAD: usize = 64 << 10;
    let mut piece = [0; 4_096];
    let end = loop {
        if let Some(end) = read.windows(END.len()).position(|window| window == END) {
            break end + END.len();
        }
        let count = stream.read(&mut piece)?;
        if count == 0 || read.len() > MOST_HEAD {
            bail!("no HTTP answer");
        }
        read.extend_from_slice(piece.get(..count).unwrap_or_default());
    };
    let rest = read.split_off(end);
    let head = std::mem::replace(read, rest);
    let head = String::from_utf8(head).context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok()).flatten()
    });
    Ok((status, length))
}

/// For a URL's query.
pub fn encoded(value: &str) -> String {
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
