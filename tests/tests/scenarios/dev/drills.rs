//! `spillway drill` as an operator meets it: a region is lost and comes back, and a controller dies in mid-fault.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use spillway_figures::{Goal, record};
use spillway_tests::harness::eventually;
use spillway_tests::harness::process::binary;
use spillway_tests::harness::region::text;
use spillway_tests::harness::run_folder::RunFolder;
use tokio::net::TcpStream;

use super::{Dev, START, read_endpoints};

const TARGET: &str = "eu-central";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_region_is_reported_on_and_a_killed_controller_leaves_no_fault() {
    let folder = RunFolder::new("drill");
    let dir = folder.join("dev");
    let _dev = Dev::start(&dir, &[], START);
    a_region_is_lost_and_comes_back(&dir);
    a_controller_dies_in_mid_fault(&dir, gateway_of(&read_endpoints(&dir), TARGET)).await;
}

fn a_region_is_lost_and_comes_back(dir: &Path) {
    let output = drill("region-loss", dir).args(["-o", "json"]).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let marks = report["timeline"].as_array().expect("a timeline");
    for (figure, name, limit) in [
        ("verdict", "verdict", 19.0),
        ("plan", "plan published", 19.0),
        ("dns_changed", "DNS answers changed", 22.0),
        ("moved_95", "95 % of clients moved", 60.0),
        ("moved_99", "99 % of clients moved", 120.0),
    ] {
        let mark = marks.iter().find(|mark| mark["name"] == name).unwrap_or_else(|| panic!("no '{name}' in {report}"));
        let seconds = mark["atMs"].as_f64().expect("a time") / 1e3;
        record(&format!("control.drill.region_loss.{figure}"), seconds, "s", Goal::AtMost(limit));
    }
    let back = marks.iter().find(|mark| mark["mark"] == "T7").and_then(|mark| mark["atMs"].as_f64());
    record("control.drill.region_loss.back", back.expect("it came back") / 1e3, "s", Goal::None);
    assert!(output.status.success() && report["outcome"] == "pass", "{report}");
}

async fn a_controller_dies_in_mid_fault(dir: &Path, gateway: SocketAddr) {
    let mut controller = drill("gateway-loss", dir).stdout(Stdio::null()).spawn().expect("it starts");
    // The link before a killed gateway resets whoever comes.
    let is_up = async || {
        let Ok(stream) = TcpStream::connect(gateway).await else { return false };
        let mut byte = [0];
        tokio::time::timeout(Duration::from_millis(200), stream.peek(&mut byte)).await.is_err()
    };
    eventually("the gateway is gone", Duration::from_secs(60), async || (!is_up().await).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    controller.kill().expect("it runs");
    let killed = Instant::now();
    controller.wait().expect("it ran");
    eventually("the gateway is back", Duration::from_secs(30), async || is_up().await.then_some(())).await;
    let took = killed.elapsed().as_secs_f64();
    record("control.drill.controller_killed.gateway_back", took, "s", Goal::AtMost(15.0));
    assert!(took < 20.0, "{took} s");
}

fn drill(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(binary());
    command.args(["drill", "run", name, "--dev", text(dir), "--target", TARGET]);
    command
}

fn gateway_of(endpoints: &Value, region: &str) -> SocketAddr {
    let regions = endpoints["regions"].as_array().expect("regions");
    let region = regions.iter().find(|one| one["name"] == region).expect("the region");
    let https = region["gateway"]["https"].as_str().expect("an address");
    https.trim_start_matches("https://").parse().expect("an address")
}
