//! `spillway drill` as an operator meets it: a vantage is cut off, a region is lost and comes back, and a controller dies
//! in mid-fault.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use spillway_core::drill::builtin;
use spillway_figures::{Goal, record};
use spillway_proto::drill::ReachRequest;
use spillway_proto::drill::injector_client::InjectorClient;
use spillway_tests::harness::eventually;
use spillway_tests::harness::metrics::{self, Metrics};
use spillway_tests::harness::process::binary;
use spillway_tests::harness::region::text;
use spillway_tests::harness::run_folder::RunFolder;
use spillway_tests::root;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Request;
use tonic::transport::Channel;

use super::{Dev, START, of_dev, read_endpoints};

const TARGET: &str = "eu-central";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_off_vantage_moves_nothing_a_lost_region_is_reported_on_and_a_killed_controller_leaves_no_fault() {
    let folder = RunFolder::new("drill");
    let dir = folder.join("dev");
    let _dev = Dev::start(&dir, &[], START);
    all_are_up(&dir).await;
    an_isolated_vantage_moves_nothing(&dir).await;
    all_are_up(&dir).await;
    a_region_is_lost_and_comes_back(&dir);
    a_controller_dies_in_mid_fault(&dir).await;
}

/// Nothing is broken while a region is in doubt, as those are that began a moment ago.
async fn all_are_up(dir: &Path) {
    eventually("all regions are up", Duration::from_secs(60), async || {
        let mut status = Command::new(binary());
        let output = status.args(["status", &of_dev(dir), "-o", "json"]).current_dir(root()).output().expect("it runs");
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        let regions = status["regions"].as_array()?;
        (regions.len() == 3 && regions.iter().all(|region| region["phase"] == "up")).then_some(())
    })
    .await;
}

async fn an_isolated_vantage_moves_nothing(dir: &Path) {
    let controller =
        drill("vantage-split", dir).args(["-o", "json"]).stdout(Stdio::piped()).spawn().expect("it starts");
    let admin = address(&read_endpoints(dir)["control"][0]["admin"]);
    let isolated = async || (Metrics::of(admin).sum("spillway_control_vantages_isolated", &[]) == 1.0).then_some(());
    eventually("a vantage counts for nothing", Duration::from_secs(60), isolated).await;
    let (succeeded, report) = report(controller.wait_with_output().expect("it ran"));
    let changes =
        report["objectives"].as_array().expect("objectives").iter().find(|one| one["name"] == "weightChanges");
    let changes = changes.and_then(|one| one["found"].as_str()?.parse().ok()).expect("a number");
    record("control.drill.vantage_split.weight_changes", changes, "changes", Goal::AtMost(0.0));
    assert!(succeeded && changes == 0.0, "{report}");
}

fn a_region_is_lost_and_comes_back(dir: &Path) {
    let (succeeded, report) = report(drill("region-loss", dir).args(["-o", "json"]).output().expect("it runs"));
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
    assert!(succeeded, "{report}");
}

async fn a_controller_dies_in_mid_fault(dir: &Path) {
    let mut injector = Injector::of(dir).await;
    // What was paused goes on at once; what was killed takes its time to start.
    let faults = "- { act: pause, on: [$target/gateway*] }\n    - { act: kill, on: [$target/pod-0] }";
    let written =
        builtin::text("gateway-loss").expect("a drill").replace("- { act: kill, on: [$target/gateway*] }", faults);
    let file = dir.join("halves.yaml");
    std::fs::write(&file, written).expect("a file");
    let mut controller = Controller(drill(text(&file), dir).stdout(Stdio::null()).spawn().expect("it starts"));
    let injected = eventually("something is broken", Duration::from_secs(60), async || {
        (injector.drill().await == "gateway-loss").then(Instant::now)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    controller.0.kill().expect("it runs");
    let killed = Instant::now();
    controller.0.wait().expect("it ran");
    assert!(!is_ready(dir, "gateway"), "it stands still");
    eventually("the gateway is back", Duration::from_secs(60), async || is_ready(dir, "gateway").then_some(())).await;
    let took = killed.elapsed().as_secs_f64();
    assert!(injected.elapsed() > Duration::from_secs(12), "the lease held it");
    let goal = Goal::AtMost(15.0);
    assert!(record("control.drill.controller_killed.gateway_back", took, "s", goal), "{took} s");
    eventually("no drill is left", Duration::from_secs(60), async || injector.drill().await.is_empty().then_some(()))
        .await;
    eventually("what was killed is back", Duration::from_secs(60), async || is_ready(dir, "pod").then_some(())).await;
}

/// In `spillway dev --with-servers`.
pub async fn a_region_without_redis_goes_on(dir: &Path) {
    all_are_up(dir).await;
    let file = dir.join("redis.yaml");
    let written = builtin::text("redis-loss").expect("a drill").replace("hold: 60s", "hold: 10s");
    std::fs::write(&file, written).expect("a file");
    let mut command = drill(text(&file), dir);
    let controller = command.args(["-o", "json"]).stdout(Stdio::piped()).spawn().expect("it starts");
    let (lost, other) = (redis_of(dir, TARGET), redis_of(dir, "eu-west"));
    eventually("Redis is away", Duration::from_secs(60), async || (!pongs(lost).await).then_some(())).await;
    assert!(pongs(other).await, "of one region alone");
    let (succeeded, report) = report(controller.wait_with_output().expect("it ran"));
    assert!(succeeded, "{report}");
    assert!(pongs(lost).await, "it is back when the drill is over");
}

/// Where the processes of a region find Redis.
fn redis_of(dir: &Path, region: &str) -> SocketAddr {
    let settings = std::fs::read_to_string(dir.join(format!("{region}/gateway-0.yaml"))).expect("settings");
    let (_, rest) = settings.split_once("redis: { servers: [\"").expect("Redis is named");
    rest.split('"').next().expect("an address").parse().expect("an address")
}

async fn pongs(redis: SocketAddr) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(redis).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await?;
        std::io::Result::Ok(&answer == b"+PONG")
    };
    matches!(tokio::time::timeout(Duration::from_secs(10), ask).await, Ok(Ok(true)))
}

/// Whether the gateway, or the first pod, of the target says that it is ready.
fn is_ready(dir: &Path, which: &str) -> bool {
    let endpoints = read_endpoints(dir);
    let regions = endpoints["regions"].as_array().expect("regions");
    let region = regions.iter().find(|one| one["name"] == TARGET).expect("the region");
    let process = if which == "gateway" { &region["gateway"] } else { &region["sidecars"][0] };
    metrics::get(address(&process["admin"]), "/readyz").is_ok_and(|(status, _)| status == 200)
}

/// Killed when dropped.
struct Controller(Child);

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// That of `spillway dev`, asked as a controller asks it.
struct Injector {
    client: InjectorClient<Channel>,
    secret: String,
}

impl Injector {
    async fn of(dir: &Path) -> Self {
        let json: Value =
            serde_json::from_slice(&std::fs::read(dir.join("injector.json")).expect("a file")).expect("JSON");
        let address = format!("http://{}", json["address"].as_str().expect("an address"));
        let client = InjectorClient::connect(address).await.expect("it listens");
        Self { client, secret: format!("Bearer {}", json["secret"].as_str().expect("a secret")) }
    }

    /// The drill that it has faults of.
    async fn drill(&mut self) -> String {
        let mut request = Request::new(ReachRequest {});
        request.metadata_mut().insert("authorization", self.secret.parse().expect("a header"));
        self.client.reach(request).await.expect("an answer").into_inner().drill
    }
}

fn drill(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(binary());
    // Paths in endpoints.json are relative to where `spillway dev` was started.
    command.args(["drill", "run", name, &of_dev(dir), "--target", TARGET]).current_dir(root());
    command
}

/// Whether it passed, and what it printed.
fn report(output: Output) -> (bool, Value) {
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.success() && report["outcome"] == "pass", report)
}

fn address(url: &Value) -> SocketAddr {
    let (_, address) = url.as_str().and_then(|url| url.split_once("://")).expect("a URL");
    address.parse().expect("an address")
}
