//! What an admin port says.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The samples of one scrape.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    pub fn of(admin: SocketAddr) -> Self {
        let (status, body) = get(admin, "/metrics").expect("the admin port answers");
        assert_eq!(status, 200, "{body}");
        Self(body)
    }

    /// The sum of all samples of this name whose labels hold all of these `label="value"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let samples = self.0.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, given) = series.split_once('{').unwrap_or((series, ""));
            let value = value.parse::<f64>().ok()?;
            (found == name && labels.iter().all(|label| given.contains(label))).then_some(value)
        });
        samples.sum()
    }

    /// The sum of all counters of the process whose name begins with this.
    pub fn sum_of_family(&self, prefix: &str, labels: &[&str]) -> f64 {
        let names: std::collections::BTreeSet<&str> = self
            .0
            .lines()
            .filter(|line| line.starts_with(prefix))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        names.into_iter().map(|name| self.sum(name, labels)).sum()
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

/// A GET over plain HTTP: status and body.
pub fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    let broken = || std::io::Error::other(format!("no HTTP answer: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(broken)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(broken)?;
    let body =
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunked(body) } else { body.into() };
    Ok((status, body))
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}
