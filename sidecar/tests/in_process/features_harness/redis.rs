//! A region of sidecars on one Redis, with one SQLite file behind it.

use std::time::Duration;

use spillway_sidecar::features::*;

use super::{Link, Server, Sidecar, settings, sqlite};

pub fn redis(address: String) -> RedisSettings {
    RedisSettings { servers: vec![address], timeout: Duration::from_millis(100), ..RedisSettings::default() }
}

pub struct Region {
    pub server: Server,
    pub folder: tempfile::TempDir,
    pub settings: FeatureSettings,
}

impl Region {
    pub fn start(mode: &str) -> Self {
        let server = Server::redis(mode);
        let folder = tempfile::tempdir().unwrap();
        let mut redis = redis(server.address());
        redis.cluster = mode == "cluster";
        if mode == "tls" {
            let password = folder.path().join("password");
            std::fs::write(&password, "spillway-password\n").unwrap();
            redis.servers = vec![format!("localhost:{}", server.port)];
            redis.username = Some("spillway".into());
            redis.password_file = Some(password);
            redis.tls = Some(TlsSettings { ca: server.folder.path().join("tls/ca.crt"), identity: None });
        }
        let settings = settings(sqlite(folder.path()), Some(redis));
        Self { server, folder, settings }
    }

    pub async fn sidecar(&self) -> Sidecar {
        let sidecar = Sidecar::open(&self.settings);
        sidecar.until_well().await;
        sidecar
    }

    /// The sidecar's way to Redis is a link of our own.
    pub async fn linked(&self) -> (Sidecar, Link) {
        let link = Link::to(self.server.address()).await;
        let settings = FeatureSettings { redis: Some(redis(link.address.to_string())), ..self.settings.clone() };
        let sidecar = Sidecar::open(&settings);
        sidecar.until_well().await;
        (sidecar, link)
    }

    /// A sidecar that hears of changes from Redis alone: its store is its own.
    pub async fn apart(&self, link: Option<&Link>) -> (Sidecar, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let mut redis = self.settings.redis.clone().unwrap();
        if let Some(link) = link {
            redis.servers = vec![link.address.to_string()];
        }
        let sidecar = Sidecar::open(&settings(sqlite(folder.path()), Some(redis)));
        sidecar.until_well().await;
        (sidecar, folder)
    }

    /// Calls of one command since the server started.
    pub fn calls(&self, command: &str) -> u64 {
        let stats = self.server.redis_cli(&["info", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    }

    /// Changes what lies under the key of an entity's row in `site`.
    pub fn meddle(&self, entity: &str, command: impl FnOnce(&str) -> Vec<String>) -> String {
        let arguments = command(&key(entity));
        self.server.redis_cli(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Overwrites a row in the store behind everyone's back.
    pub fn set_aside_store(&self) -> rusqlite::Connection {
        let store = rusqlite::Connection::open(self.folder.path().join("features.db")).unwrap();
        store.execute_batch("ALTER TABLE features RENAME TO away").unwrap();
        store
    }
}

pub fn key(entity: &str) -> String {
    format!("spillway:eu:f:{{s:{entity}}}:site")
}

pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
