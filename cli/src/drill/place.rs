//! Whom a drill is about: addresses and identities, as `spillway dev` writes them into `endpoints.json`.
//!
//! ```json
//! {
//!   "service": { "name": "predict.spillway.test", "port": 8443, "server_name": "localhost" },
//!   "dns": ["127.0.0.1:5353"],
//!   "control": [{ "name": "control-0", "grpc": "127.0.0.1:7000", "id": "spiffe://…/region/eu-west/control/control-0" }],
//!   "operator": { "cert": "…", "key": "…" },
//!   "clients": { "acme": { "cert": "…", "key": "…" } },
//!   "trust_bundle": "…",
//!   "model": "phishing",
//!   "example_entity": "site-0001",
//!   "injector": ".dev/injector.json",
//!   "regions": [{ "name": "eu-west", "loader": { "cert": "…", "key": "…" },
//!                 "sidecars": [{ "grpc": "127.0.0.1:9001", "id": "spiffe://…" }] }]
//! }
//! ```
//!
//! In a deployment, in place of `injector`: `"injectors": [{ "grpc": "10.0.4.9:7450", "id": "spiffe://…/injector/rack-4" }]`.
//!
//! `server_name` is the service's name unless it says otherwise; loaders and sidecars are for heartbeats alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use spillway_core::identity::SpiffeId;
use spillway_core::units::{DnsName, Name};
use spillway_runtime::tls::IdentitySettings;

/// Everything that a run connects to.
#[derive(Clone, Debug)]
pub struct Place {
    pub service: DnsName,
    pub port: u16,
    /// What gateways' certificates are checked against.
    pub server_name: String,
    pub dns: Vec<SocketAddr>,
    pub control: Vec<Server>,
    pub operator: IdentitySettings,
    /// Who sends requests.
    pub client: IdentitySettings,
    pub model: String,
    pub entity: String,
    pub injectors: Breakers,
    /// Who reads and writes features, by region.
    pub loaders: BTreeMap<Name, IdentitySettings>,
    /// By region.
    pub sidecars: BTreeMap<Name, Vec<Server>>,
}

/// Who breaks things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Breakers {
    /// The file in which `spillway dev` tells how to reach its own.
    File(PathBuf),
    Nodes(Vec<Server>),
}

/// Where it is, and who it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub name: String,
    pub address: String,
    pub id: SpiffeId,
}

impl Place {
    /// Reads `endpoints.json`. `tenant` sends the requests; `control` is a name or an address of the one to be asked.
    pub fn read(file: &Path, tenant: &str, control: Option<&str>) -> Result<Self> {
        let text = std::fs::read(file).with_context(|| {
            format!(
                "{}: `spillway dev` writes it when all regions are up; elsewhere --endpoints names one, and an injector \
                 must run (spillway drill --help)",
                file.display()
            )
        })?;
        let json: Value = serde_json::from_slice(&text).with_context(|| format!("{}: no JSON", file.display()))?;
        Self::of(&json, tenant, control).with_context(|| file.display().to_string())
    }

    fn of(json: &Value, tenant: &str, control: Option<&str>) -> Result<Self> {
        let bundle = PathBuf::from(text(json, "/trust_bundle")?);
        let identity_in = |json: &Value, at: &str| -> Result<IdentitySettings> {
            let part = |name: &str| text(json, &format!("{at}/{name}")).map(PathBuf::from);
            Ok(IdentitySettings { certificate: part("cert")?, key: part("key")?, trust_bundle: bundle.clone() })
        };
        let identity = |at: &str| identity_in(json, at);
        let service = text(json, "/service/name")?;
        let port = json.pointer("/service/port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        let dns: Vec<SocketAddr> = items(json, "/dns").filter_map(|server| server.as_str()?.parse().ok()).collect();
        if dns.is_empty() {
            bail!("/dns names no DNS node by address and port");
        }
        let nodes: Vec<Server> = items(json, "/control").map(server).collect::<Result<_>>()?;
        let asked = |node: &Server| control.is_none_or(|asked| asked == node.name || asked == node.address);
        let nodes: Vec<Server> = nodes.into_iter().filter(asked).collect();
        if nodes.is_empty() {
            bail!("/control names no such control node");
        }
        let mut sidecars: BTreeMap<Name, Vec<Server>> = BTreeMap::new();
        let mut loaders = BTreeMap::new();
        for region in items(json, "/regions") {
            let name = Name::parse(text(region, "/name")?)?;
            if region.get("loader").is_some() {
                loaders.insert(name.clone(), identity_in(region, "/loader")?);
            }
            // Without an id it cannot be asked.
            let known = items(region, "/sidecars").filter(|sidecar| sidecar["id"].is_string());
            sidecars.insert(name, known.map(server).collect::<Result<_>>()?);
        }
        let injectors = match json.get("injectors") {
            Some(_) => Breakers::Nodes(items(json, "/injectors").map(server).collect::<Result<_>>()?),
            None => Breakers::File(PathBuf::from(text(json, "/injector")?)),
        };
        Ok(Self {
            service: DnsName::host(service).with_context(|| service.to_owned())?,
            port: port.context("/service/port is no port")?,
            server_name: json.pointer("/service/server_name").and_then(Value::as_str).unwrap_or(service).to_owned(),
            dns,
            control: nodes,
            operator: identity("/operator")?,
            client: identity(&format!("/clients/{tenant}"))?,
            model: text(json, "/model")?.to_owned(),
            entity: text(json, "/example_entity")?.to_owned(),
            injectors,
            loaders,
            sidecars,
        })
    }
}

fn server(json: &Value) -> Result<Server> {
    let id = text(json, "/id")?;
    let address = text(json, "/grpc")?.to_owned();
    let name = json["name"].as_str().unwrap_or_default().to_owned();
    Ok(Server { name, address, id: SpiffeId::parse(id).with_context(|| id.to_owned())? })
}

fn text<'a>(json: &'a Value, at: &str) -> Result<&'a str> {
    json.pointer(at).and_then(Value::as_str).with_context(|| format!("{at} is missing"))
}

fn items<'a>(json: &'a Value, at: &str) -> impl Iterator<Item = &'a Value> {
    json.pointer(at).and_then(Value::as_array).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example() -> Value {
        let pair = json!({ "cert": "c.pem", "key": "c.key" });
        json!({
            "service": { "name": "predict.spillway.test", "port": 8443 },
            "dns": ["127.0.0.1:5353"],
            "control": [
                { "name": "a", "grpc": "127.0.0.1:7000", "id": "spiffe://td/region/eu/control/a" },
                { "name": "b", "grpc": "127.0.0.1:7001", "id": "spiffe://td/region/us/control/b" },
            ],
            "operator": pair, "clients": { "acme": pair }, "trust_bundle": "roots.pem",
            "model": "phishing", "example_entity": "site-0001", "injector": "injector.json",
            "regions": [{ "name": "eu", "loader": pair, "sidecars": [
                { "grpc": "127.0.0.1:9001", "id": "spiffe://td/region/eu/sidecar/p/0" }, { "grpc": "127.0.0.1:9002" },
            ] }],
        })
    }

    #[test]
    fn endpoints_are_read() {
        let place = Place::of(&example(), "acme", None).unwrap();
        assert_eq!(
            (place.service.as_str(), place.server_name.as_str()),
            ("predict.spillway.test", "predict.spillway.test")
        );
        assert_eq!((place.control.len(), place.loaders.len()), (2, 1));
        assert_eq!(place.sidecars[&Name::parse("eu").unwrap()].len(), 1, "one cannot be asked");
        for asked in ["b", "127.0.0.1:7001"] {
            assert_eq!(Place::of(&example(), "acme", Some(asked)).unwrap().control[0].name, "b");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for (at, word) in [
            ("/service/port", "port"),
            ("/dns", "/dns"),
            ("/operator/key", "/operator/key"),
            ("/control/0/id", "/id"),
            ("/model", "/model"),
        ] {
            let mut json = example();
            *json.pointer_mut(at).unwrap() = Value::Null;
            let error = format!("{:#}", Place::of(&json, "acme", None).unwrap_err());
            assert!(error.contains(word), "{at}: {error}");
        }
        assert!(Place::of(&example(), "globex", None).is_err());
        assert!(Place::of(&example(), "acme", Some("c")).is_err());
    }
}
