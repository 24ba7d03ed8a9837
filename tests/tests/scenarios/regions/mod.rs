//! Three regions on this machine: one is lost, its pods are lost, what decides is lost.
//!
//! * [`lost`]: a region dies, with all that decides alive, and without.
//! * [`stranded`]: a region's pods die, its gateways live.
//! * [`intent`]: who may write, and what nodes refuse.
//! * [`rotation`]: another root is trusted by all.

mod intent;
mod lost;
mod rotation;
mod stranded;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use spillway_tests::harness::client::Client;
use spillway_tests::harness::crowd::{Call, Crowd, Outcome};
use spillway_tests::harness::fleet::{Fleet, SERVICE, Store};
use spillway_tests::harness::inference::cases;
use spillway_tests::harness::servers::Server;
use tempfile::TempDir;

/// Clients of as many subnets.
const CLIENTS: usize = 120;
const PAUSE: Duration = Duration::from_secs(1);

/// A fleet on a real etcd, whose folder must outlive it.
fn on_etcd(name: &str) -> (Fleet, TempDir) {
    let run = tempfile::tempdir().expect("a folder");
    let etcd = Server::etcd(run.path());
    let mut fleet = Fleet::new(name, Store::Etcd(etcd, 3));
    fleet.edit("model.yaml", "  backend: onnx\n", "  backend: onnx\n  tier: 1\n");
    (fleet, run)
}

/// Clients of acme, wherever DNS sends them.
fn crowd(fleet: &Fleet) -> Crowd {
    let client: Client = fleet.client("acme", "eu-west");
    let dns = fleet.dns.iter().map(|node| node.listen).collect();
    Crowd::start(&client, fleet.port, dns, SERVICE, CLIENTS, PAUSE, &cases())
}

/// Requests to gateways that live, all but those at `lost`, that got no right answer, from a time on.
fn failed_since(calls: &[Call], lost: IpAddr, since: Instant) -> Vec<&Call> {
    let is_right = |call: &&Call| matches!(call.outcome, Outcome::Right { .. });
    calls.iter().filter(|call| call.begun >= since && call.dialled != lost && !is_right(call)).collect()
}
