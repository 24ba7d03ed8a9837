//! Where a store is and how it is reached. Static: read once, at start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::file::with_path;
use crate::settings::{Field, FromNode, count, optional, or_default, positive, read_optional, required, text, texts};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisSettings {
    /// `host:port`. One server, or some nodes of a cluster.
    pub servers: Vec<String>,
    pub cluster: bool,
    /// ACL user; none: the default user.
    pub username: Option<String>,
    /// A file that holds the password and nothing else but a final line break.
    pub password_file: Option<PathBuf>,
    pub tls: Option<TlsSettings>,
    /// The most that one round may take of a request's time.
    pub timeout: Duration,
    /// How long Redis keeps what it is given, at most.
    pub keep: Duration,
    /// Connections to each server.
    pub connections: usize,
    /// Rounds at once.
    pub concurrency: usize,
}

impl Default for RedisSettings {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            cluster: false,
            username: None,
            password_file: None,
            tls: None,
            timeout: Duration::from_millis(10),
            keep: Duration::from_secs(300),
            connections: 2,
            concurrency: 256,
        }
    }
}

/// TLS 1.3 to a store, its certificate checked against `ca` and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    pub ca: PathBuf,
    /// Our own certificate and key, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// The settings cannot be used. The operator's fault; a retry is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InvalidStore {
    #[error("{setting}: {problem}")]
    Value { setting: &'static str, problem: &'static str },
    #[error("{setting}: the file cannot be read")]
    File { setting: &'static str, source: std::io::Error },
    #[error("{setting}: no usable certificate or key in the file")]
    Pem { setting: &'static str },
    #[error("the Redis client refuses the settings: {0}")]
    Redis(String),
}

impl InvalidStore {
    pub(super) fn unreadable(setting: &'static str, path: &Path, error: &std::io::Error) -> Self {
        Self::File { setting, source: with_path(path, error) }
    }
}

/// `host:port` as its two parts; IPv6 addresses stand in brackets.
pub fn host_and_port(server: &str) -> Option<(String, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (!host.is_empty()).then(|| Some((host.to_owned(), port.parse().ok().filter(|port| *port > 0)?)))?
}

/// A file that holds a secret and nothing else but a final line break.
pub fn read_secret(path: &Path, setting: &'static str) -> Result<String, InvalidStore> {
    let text = std::fs::read_to_string(path).map_err(|error| InvalidStore::unreadable(setting, path, &error))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

impl FromNode for RedisSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        Self::read(field, Self::default())
    }
}

impl RedisSettings {
    /// Reads settings where what is left out is as in `default`.
    pub fn read(field: &Field<'_>, default: Self) -> Option<Self> {
        let fields = field.map();
        let servers = texts(&fields, "servers");
        let cluster = or_default(&fields, "cluster", || false);
        let username = read_optional(&fields, "username", text);
        let password_file = optional(&fields, "passwordFile");
        let tls = optional(&fields, "tls");
        let timeout = positive(&fields, "timeout", default.timeout);
        let keep = positive(&fields, "keep", default.keep);
        let connections = count(&fields, "connections", default.connections, 64);
        let concurrency = count(&fields, "concurrency", default.concurrency, 65_536);
        fields.finish();
        Some(Self {
            servers: servers?,
            cluster: cluster?,
            username: username?,
            password_file: password_file?,
            tls: tls?,
            timeout: timeout?,
            keep: keep?,
            connections: connections?,
            concurrency: concurrency?,
        })
    }
}

impl FromNode for TlsSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let ca = required(&fields, "ca");
        let certificate: Option<Option<PathBuf>> = optional(&fields, "certificate");
        let key: Option<Option<PathBuf>> = optional(&fields, "key");
        fields.finish();
        let identity = match (certificate?, key?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                field.fault("expected certificate and key, or neither");
                return None;
            }
        };
        Some(Self { ca: ca?, identity })
    }
}
