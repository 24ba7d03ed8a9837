//! Several regions in one process: a gateway or more of each, and pods of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use spillway_core::resource;
use spillway_gateway::Gateway;
use spillway_runtime::drain::Drain;
use spillway_runtime::plan::{self, Published};
use spillway_runtime::snapshot::seal;
use spillway_runtime::tls::Workload;

use super::{Ground, HOUR, Http2, Sidecar, ask_admin, gateway_in, metric_of, ready, sidecar_in, until, workload};

/// A region: its pods are of the pool `scorers-REGION`.
pub struct Place {
    pub name: String,
    pub sidecars: Vec<Sidecar>,
    pub gateways: Vec<Gateway>,
    /// Of each gateway.
    pub drains: Vec<Drain>,
    folder: PathBuf,
}

pub struct Regions {
    pub ground: Ground,
    pub places: Vec<Place>,
    more: String,
}

impl Regions {
    /// Regions with so many gateways each and two pods; `more` are resources beside regions, pools and policies.
    pub async fn start(names: &[&str], gateways: usize, more: &str) -> Self {
        let ground = Ground::new();
        let mut places = Vec::new();
        for name in names {
            let folder = ground.folder.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            let mut sidecars = Vec::new();
            for pod in 0..2 {
                let proves = format!("scorers-{name}/pod-{pod}");
                sidecars.push(sidecar_in(name, &ground.authority, &folder, &proves, "127.0.0.1:0").await);
            }
            places.push(Place { name: (*name).to_owned(), sidecars, gateways: Vec::new(), drains: Vec::new(), folder });
        }
        let mut regions = Self { ground, places, more: more.to_owned() };
        regions.publish(1, &[]);
        for place in 0..names.len() {
            for gateway in 0..gateways {
                regions.add_gateway(place, gateway).await;
            }
        }
        // Where gateways listen is known only now.
        regions.publish_and_wait(2, &[]).await;
        regions
    }

    async fn add_gateway(&mut self, place: usize, number: usize) {
        let place = &mut self.places[place];
        let (name, own) = (format!("gw-{number}"), place.folder.join(format!("gateway-{number}")));
        workload(&self.ground.authority, &own, &place.id(number), HOUR);
        let extra = format!("audit: {}/audit-{number}.log\n", place.folder.display());
        let drain = Drain::new(Duration::from_secs(2));
        let gateway = gateway_in(&place.name, &place.folder, &name, &own, &extra, &drain).await;
        place.drains.push(drain);
        ready(&gateway).await;
        place.gateways.push(gateway);
    }

    /// One more gateway of a region, `gw-7`: what it serves from was pushed to it before it started, with a plan.
    pub async fn resumed(&self, region: &str, plan: &Published) -> (Gateway, Drain) {
        let folder = self.ground.folder.path().join(format!("{region}-resumed"));
        let own = folder.join("gateway");
        let id = format!("spiffe://spillway.test/region/{region}/gateway/gw-7");
        workload(&self.ground.authority, &own, &id, HOUR);
        std::fs::write(folder.join("snapshot"), seal(&resource::parse(&self.resources()).unwrap(), 2)).unwrap();
        std::fs::write(folder.join("plan"), plan::seal(plan).encode_to_vec()).unwrap();
        let drain = Drain::new(Duration::from_secs(2));
        // Nobody listens there.
        let extra = "control: { servers: ['127.0.0.1:1'] }\n";
        let gateway = gateway_in(region, &folder, "gw-7", &own, extra, &drain).await;
        ready(&gateway).await;
        (gateway, drain)
    }

    fn publish(&self, version: u64, replaced: &[(&str, &str)]) {
        let text = super::replace(self.resources(), replaced);
        for place in &self.places {
            let (new, path) = (place.folder.join("snapshot.new"), place.folder.join("snapshot"));
            std::fs::write(&new, seal(&resource::parse(&text).unwrap(), version)).unwrap();
            std::fs::rename(new, path).unwrap();
        }
    }

    /// Serves other resources from now on, in all regions: each `(from, to)` is replaced in the first ones.
    pub async fn publish_and_wait(&self, version: u64, replaced: &[(&str, &str)]) {
        self.publish(version, replaced);
        for gateway in self.places.iter().flat_map(|place| &place.gateways) {
            until("the snapshot is read", async || {
                metric_of(gateway.admin, "spillway_snapshot_version").await == version
            })
            .await;
        }
    }

    pub fn place(&self, name: &str) -> &Place {
        self.places.iter().find(|place| place.name == name).unwrap()
    }

    pub fn kill_pods(&mut self, name: &str) {
        let place = self.places.iter_mut().find(|place| place.name == name).unwrap();
        place.sidecars.iter_mut().for_each(Sidecar::kill);
    }

    /// Any identity of the trust domain.
    pub fn workload(&self, path: &str) -> Arc<Workload> {
        let folder = self.ground.folder.path().join(path.replace('/', "-"));
        workload(&self.ground.authority, &folder, &format!("spiffe://spillway.test/{path}"), HOUR).1
    }

    /// A client of this tenant, at a region's first gateway.
    pub async fn client(&self, region: &str, tenant: &str) -> Http2 {
        self.connect(region, 0, &self.workload(&format!("tenant/{tenant}/client/web"))).await
    }

    pub async fn connect(&self, region: &str, gateway: usize, as_whom: &Workload) -> Http2 {
        let place = self.place(region);
        Http2::to(&place.id(gateway), place.gateways[gateway].https, as_whom).await.unwrap()
    }

    fn resources(&self) -> String {
        let mut text = String::new();
        for place in &self.places {
            let gateways: Vec<String> = place
                .gateways
                .iter()
                .enumerate()
                .map(|(number, gateway)| format!("{{ name: gw-{number}, address: \"{}\" }}", gateway.https))
                .collect();
            let pods: Vec<String> = place
                .sidecars
                .iter()
                .map(|pod| format!("{{ name: {}, address: \"{}\" }}", pod.name, pod.address))
                .collect();
            text += &format!(
                "---
apiVersion: spillway/v1
kind: Region
metadata: {{ name: {name} }}
spec: {{ trustDomain: spillway.test, gateways: [{gateways}] }}
---
apiVersion: spillway/v1
kind: Pool
metadata: {{ name: scorers-{name} }}
spec: {{ region: {name}, pods: [{pods}] }}
",
                name = place.name,
                gateways = gateways.join(", "),
                pods = pods.join(", "),
            );
        }
        let pools: Vec<String> = self.places.iter().map(|place| format!("scorers-{}", place.name)).collect();
        text + &self.more.replace("POOLS", &pools.join(", "))
    }
}

impl Place {
    pub fn id(&self, gateway: usize) -> String {
        format!("spiffe://spillway.test/region/{}/gateway/gw-{gateway}", self.name)
    }

    /// Of its first gateway: the sum of all series of that name whose labels contain `labels`.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = ask_admin(self.gateways[0].admin, "GET", "/metrics", "").await;
        let value = |line: &str| -> Option<u64> {
            let rest = line.strip_prefix(name)?;
            let fits = rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label));
            if fits { rest.rsplit(' ').next()?.parse().ok() } else { None }
        };
        text.lines().filter_map(value).sum()
    }

    /// The line of the access log that contains this.
    pub async fn logged(&self, text: &str) -> serde_json::Value {
        line_of(&self.folder.join("access.log"), text).await
    }

    /// The line of its first gateway's audit log that contains this.
    pub async fn audited(&self, text: &str) -> serde_json::Value {
        line_of(&self.folder.join("audit-0.log"), text).await
    }

    /// Requests that its pods have seen, in no order, but for the probes that gateways make of each other.
    pub fn seen(&self) -> Vec<super::Seen> {
        let seen = self.sidecars.iter().flat_map(|sidecar| sidecar.seen());
        seen.filter(|seen| seen.message.id != "probe").collect()
    }
}

async fn line_of(path: &Path, text: &str) -> serde_json::Value {
    let mut found = None;
    until(&format!("a line with {text}"), async || {
        let log = std::fs::read_to_string(path).unwrap_or_default();
        found = log.lines().find(|line| line.contains(text)).map(|line| serde_json::from_str(line).unwrap());
        found.is_some()
    })
    .await;
    found.unwrap()
}
