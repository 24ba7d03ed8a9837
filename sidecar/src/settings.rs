//! A sidecar's own settings file.
//!
//! ```yaml
//! region: eu-west
//! pool: scorers
//! pod: pod-0
//! identity: {certificate: leaf.pem, key: leaf.key, trustBundle: bundle.pem}
//! snapshot: snapshot.bin
//! listen: 10.0.0.7:9443
//! models: /models                   # for models of the backend onnx: <models>/<model>/<version>/model.onnx
//! triton: http://127.0.0.1:8001     # for models of the backend triton; or unix:///run/triton.sock
//! features:
//!   memory: 64MiB                   # or {size, keep, keepAbsent}
//!   redis: {servers: ['10.0.1.1:6379'], passwordFile: redis.password, tls: {ca: redis.pem}, timeout: 10ms}
//!   sqlite: features.db             # or cassandra: {contactPoints: ['10.0.2.1:9042'], keyspace: spillway}
//! ```
//!
//! and what all processes share: `admin`, `accessLog`, `otlp`, `drainTimeout`.

use std::net::SocketAddr;
use std::path::PathBuf;

use spillway_core::units::{ByteSize, InvalidUnit, Name};
use spillway_runtime::settings::{
    CommonSettings, Field, FromNode, count, optional, or_default, positive, read_optional, required, text, texts,
};

use crate::features::{CassandraSettings, FeatureSettings, MemorySettings, SqliteSettings, StoreSettings};

#[derive(Clone, Debug)]
pub struct SidecarSettings {
    pub region: Name,
    pub pool: Name,
    pub pod: Name,
    pub common: CommonSettings,
    /// Where gateways call; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where ONNX files lie, in Triton's layout.
    pub models: Option<PathBuf>,
    /// The Triton server beside this sidecar.
    pub triton: Option<String>,
    /// None: requests must bring all inputs of their model.
    pub features: Option<FeatureSettings>,
}

impl FromNode for SidecarSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let region = required(&fields, "region");
        let pool = required(&fields, "pool");
        let pod = required(&fields, "pod");
        let common = CommonSettings::read(&fields);
        let listen = required(&fields, "listen");
        let models = optional(&fields, "models");
        let triton = read_optional(&fields, "triton", |field| field.parse(endpoint));
        let features = optional(&fields, "features");
        fields.finish();
        Some(Self {
            region: region?,
            pool: pool?,
            pod: pod?,
            common: common?,
            listen: listen?,
            models: models?,
            triton: triton?,
            features: features?,
        })
    }
}

impl FromNode for FeatureSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let memory = or_default(&fields, "memory", MemorySettings::default);
        let redis = optional(&fields, "redis");
        let cassandra: Option<Option<CassandraSettings>> = optional(&fields, "cassandra");
        let sqlite: Option<Option<SqliteSettings>> = optional(&fields, "sqlite");
        fields.finish();
        let store = match (cassandra?, sqlite?) {
            (Some(cassandra), None) => StoreSettings::Cassandra(cassandra),
            (None, Some(sqlite)) => StoreSettings::Sqlite(sqlite),
            _ => {
                field.fault("expected one durable store: cassandra or sqlite");
                return None;
            }
        };
        Some(Self { memory: memory?, redis: redis?, store })
    }
}

impl FromNode for MemorySettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        if let spillway_core::resource::yaml::Value::Scalar(_) = field.node.value {
            return Some(Self { size: ByteSize::from_node(field)?, ..default });
        }
        let fields = field.map();
        let size = or_default(&fields, "size", || default.size);
        let keep = or_default(&fields, "keep", || default.keep);
        let keep_absent = or_default(&fields, "keepAbsent", || default.keep_absent);
        fields.finish();
        Some(Self { size: size?, keep: keep?, keep_absent: keep_absent? })
    }
}

impl FromNode for CassandraSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        let fields = field.map();
        let contact_points = texts(&fields, "contactPoints");
        let keyspace = read_optional(&fields, "keyspace", text);
        let data_center = read_optional(&fields, "dataCenter", text);
        let username = read_optional(&fields, "username", text);
        let password_file = optional(&fields, "passwordFile");
        let tls = optional(&fields, "tls");
        let timeout = positive(&fields, "timeout", default.timeout);
        let write_timeout = positive(&fields, "writeTimeout", default.write_timeout);
        let speculate_after = optional(&fields, "speculateAfter");
        let concurrency = count(&fields, "concurrency", default.concurrency, 65_536);
        let create_schema = or_default(&fields, "createSchema", || default.create_schema);
        let replication_factor = count(&fields, "replicationFactor", default.replication_factor.into(), 15);
        fields.finish();
        Some(Self {
            contact_points: contact_points?,
            keyspace: keyspace?.unwrap_or(default.keyspace),
            data_center: data_center?,
            username: username?,
            password_file: password_file?,
            tls: tls?,
            timeout: timeout?,
            write_timeout: write_timeout?,
            speculate_after: speculate_after?,
            concurrency: concurrency?,
            create_schema: create_schema?,
            replication_factor: u8::try_from(replication_factor?).ok()?,
        })
    }
}

impl FromNode for SqliteSettings {
    /// A path, or `{path, timeout, connections}`.
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        if let spillway_core::resource::yaml::Value::Scalar(_) = field.node.value {
            return Some(Self { path: PathBuf::from_node(field)?, ..default });
        }
        let fields = field.map();
        let path = required(&fields, "path");
        let timeout = positive(&fields, "timeout", default.timeout);
        let connections = count(&fields, "connections", default.connections, 64);
        fields.finish();
        Some(Self { path: path?, timeout: timeout?, connections: connections? })
    }
}

/// The form of an endpoint; whether somebody is there, the connection finds out.
fn endpoint(text: &str) -> Result<String, InvalidUnit> {
    crate::model::triton::Server::check(text)
        .map(|()| text.to_owned())
        .map_err(|_| InvalidUnit("an endpoint, such as http://127.0.0.1:8001 or unix:///run/triton.sock"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const IDENTITY: &str = "identity: {certificate: c.pem, key: k.pem, trustBundle: b.pem}\n";

    fn parse(rest: &str) -> Result<SidecarSettings, Vec<String>> {
        let text =
            format!("region: eu\npool: scorers\npod: pod-0\nsnapshot: s.bin\nlisten: 127.0.0.1:0\n{IDENTITY}{rest}");
        spillway_runtime::settings::parse(&text).map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn all_keys_are_read() {
        let settings = parse(
            "models: /models\ntriton: unix:///run/triton.sock\naccessLog: '-'\ndrainTimeout: 3s\nfeatures:\n  memory: 8MiB\n  \
             redis: {servers: ['r:6379'], username: u, passwordFile: p, cluster: true, timeout: 5ms, tls: {ca: ca.pem}}\n  \
             cassandra: {contactPoints: ['c:9042'], keyspace: k, username: u, passwordFile: p, timeout: 15ms}\n",
        )
        .unwrap();
        let features = settings.features.unwrap();
        assert_eq!(features.memory.size, ByteSize(8 << 20));
        assert_eq!(features.redis.unwrap().timeout, Duration::from_millis(5));
        let StoreSettings::Cassandra(cassandra) = features.store else { panic!("cassandra") };
        assert_eq!((cassandra.keyspace.as_str(), cassandra.timeout), ("k", Duration::from_millis(15)));
        assert_eq!(settings.triton.as_deref(), Some("unix:///run/triton.sock"));
        assert_eq!(settings.common.drain_timeout, Duration::from_secs(3));
    }

    #[test]
    fn little_is_needed() {
        let features = parse("features: {sqlite: f.db}\n").unwrap().features.unwrap();
        let StoreSettings::Sqlite(sqlite) = features.store else { panic!("sqlite") };
        assert_eq!(sqlite.path.as_os_str(), "f.db");
        assert!(parse("").unwrap().features.is_none());
    }

    #[test]
    fn faults_are_named_all_at_once() {
        let faults =
            parse("triton: 127.0.0.1:8001\nshards: 3\nfeatures: {memory: 64, redis: {servers: []}}\n").unwrap_err();
        for fault in [
            "triton:",
            "shards: unknown key",
            "features.memory:",
            "features.redis.servers:",
            "features: expected one durable",
        ] {
            assert!(faults.iter().any(|line| line.contains(fault)), "{fault} in {faults:?}");
        }
    }
}
