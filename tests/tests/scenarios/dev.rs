//! `spillway dev`: three regions on this machine, from nothing to a prediction, and gone with Ctrl-C.

mod drills;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use spillway_figures::{Goal, record};
use spillway_runtime::tls::IdentitySettings;
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, assert_scores, cases, entity, features, scores};
use spillway_tests::harness::load::percentile;
use spillway_tests::harness::metrics;
use spillway_tests::harness::process::binary;
use spillway_tests::harness::region::text;
use spillway_tests::harness::run_folder::RunFolder;
use spillway_tests::harness::unmodified;
use spillway_tests::root;

const START: Duration = Duration::from_secs(60);
/// Its children are drained one after the other.
const END: Duration = Duration::from_secs(60);

/// A running `spillway dev`. Killed with its children when dropped.
struct Dev {
    child: Child,
    /// What it printed until it said how to stop it.
    printed: String,
}

impl Dev {
    fn start(dir: &Path, more: &[&str], within: Duration) -> Self {
        let mut child = Command::new(binary())
            .args(["dev", "--port", "0", "--dir", text(dir)])
            .args(more)
            .current_dir(root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("it is piped");
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let mut dev = Self { child, printed: String::new() };
        let end = Instant::now() + within;
        while !dev.printed.contains("Ctrl-C") {
            let left = end.saturating_duration_since(Instant::now());
            let line = told.recv_timeout(left).unwrap_or_else(|_| panic!("not up within {within:?}: {}", dev.printed));
            dev.printed.push_str(&line);
            dev.printed.push('\n');
        }
        dev
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    /// The curl command that it printed, its lines joined as a shell would.
    fn curl(&self) -> String {
        let lines = self.printed.lines().skip_while(|line| !line.trim_start().starts_with("curl "));
        let mut command = String::new();
        for line in lines {
            command.push_str(line);
            command.push('\n');
            if !line.trim_end().ends_with('\\') {
                break;
            }
        }
        assert!(!command.is_empty(), "no curl line in\n{}", self.printed);
        command
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // What it started ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_gives_a_right_prediction_by_the_printed_line_and_leaves_nothing_behind() {
    let folder = RunFolder::new("dev");
    // A path relative to the repository, as people give it.
    let dir = folder.strip_prefix(root()).expect("it lies in the repository").join("region");
    let begun = Instant::now();
    let mut dev = Dev::start(&dir, &[], START);
    let start = begun.elapsed();
    let output = Command::new("sh").args(["-c", &dev.curl()]).current_dir(root()).output().expect("sh is there");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let first = begun.elapsed();
    let score = answer["outputs"][0]["data"][0].as_f64().expect("a score");
    assert!((score - f64::from(cases()[0].score)).abs() <= 1e-5, "{answer}");
    record("path.dev.first_prediction_s", first.as_secs_f64(), "s", Goal::None);
    // Others use the machine meanwhile.
    record("path.dev.start_s", start.as_secs_f64(), "s", Goal::AtMost(5.0));

    let endpoints = read_endpoints(&dir);
    check_endpoints(&endpoints);
    let client = client_of(&endpoints, "acme");
    unmodified::predict(client.address.port(), &identity_of(&endpoints, "acme"));
    sequential_calls(&client).await;
    let refused = client_of(&endpoints, "globex").post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_eq!(refused.status, 403);
    assert_eq!(client_of(&endpoints, "globex").get("/v2/models/phishing").await.expect("an answer").status, 200);
    repeats_are_cached_and_limits_are_met(&endpoints).await;
    operators_see_what_happened(&dir).await;
    a_sidecar_that_dies_is_started_again(&client, &dev).await;

    let children = descendants(dev.pid());
    assert!(children.len() >= 11, "three gateways, six sidecars, a control node and a DNS node: {children:?}");
    kill(Pid::from_raw(dev.pid()), Signal::SIGINT).expect("it runs");
    let status = eventually("dev ends", END, async || dev.child.try_wait().expect("a child")).await;
    assert!(status.success(), "{status}");
    for file in ["endpoints.json", "injector.json"] {
        assert!(!root().join(&dir).join(file).exists(), "{file} tells of what is gone");
    }
    let left: Vec<i32> = children.into_iter().filter(|process| is_alive(*process)).collect();
    assert!(left.is_empty(), "processes are left: {left:?}");

    // Again in the same folder: the authority stays, so certificates of clients do.
    let bundle = std::fs::read(root().join(endpoints["trust_bundle"].as_str().expect("a path"))).expect("a bundle");
    let dev = Dev::start(&dir, &[], START);
    let endpoints = read_endpoints(&dir);
    assert_eq!(
        std::fs::read(root().join(endpoints["trust_bundle"].as_str().expect("a path"))).expect("a bundle"),
        bundle
    );
    let answer = client_of(&endpoints, "acme").post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_scores("again", &scores(&answer), &cases()[..1]);

    // Its end, however sudden, ends the children, also one that stands still, as a drill would have it.
    let children = descendants(dev.pid());
    kill(Pid::from_raw(children[0]), Signal::SIGSTOP).expect("it runs");
    kill(Pid::from_raw(dev.pid()), Signal::SIGKILL).expect("it runs");
    eventually("all children end", Duration::from_secs(15), async || {
        children.iter().all(|process| !is_alive(*process)).then_some(())
    })
    .await;
    drop(dev);
    // Nothing of it is in the way.
    let dev = Dev::start(&dir, &[], START);
    let answer = client_of(&read_endpoints(&dir), "acme").post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_scores("after a sudden end", &scores(&answer), &cases()[..1]);
    drop(dev);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_with_servers_predicts_the_same() {
    let folder = RunFolder::new("dev-servers");
    let dir = folder.strip_prefix(root()).expect("it lies in the repository").join("region");
    let mut dev = Dev::start(&dir, &["--with-servers"], Duration::from_secs(180));
    let client = client_of(&read_endpoints(&dir), "acme");
    for case in &cases()[..8] {
        let answer = client.post(INFER, &entity(&case.entity)).await.expect("an answer");
        assert_scores("real servers", &scores(&answer), std::slice::from_ref(case));
        assert_eq!(answer.header("spillway-degraded"), "");
    }
    drills::a_region_without_redis_goes_on(&root().join(&dir)).await;
    kill(Pid::from_raw(dev.pid()), Signal::SIGINT).expect("it runs");
    let status = eventually("dev ends", 2 * END, async || dev.child.try_wait().expect("a child")).await;
    assert!(status.success(), "{status}");
    for server in ["redis", "cassandra", "triton"] {
        assert!(!root().join(&dir).join(format!("servers/{server}/{server}.pid")).exists(), "{server} runs on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_while_the_printed_line_goes_on_working() {
    let folder = RunFolder::new("dev-rotation");
    let dir = folder.strip_prefix(root()).expect("it lies in the repository").join("region");
    let mut dev = Dev::start(&dir, &["--life", "30s"], START);
    let curl = dev.curl();
    let pki = root().join(&dir).join("pki");
    let read = |file: &str| std::fs::read_to_string(pki.join(file)).expect("a PEM file");
    let (old, first) = (read("root.pem"), read("eu-west.pod-1.pem"));

    let calls = Calls::start(curl.clone());
    operate(&["pki", "init", text(&pki.join("next"))]);
    let new = read("next/root.pem");
    let begun = Instant::now();
    assert!(operate(&["pki", "rotate", "--to", &of_dev(&dir)]).starts_with("stage  announced"));
    eventually("clients trust both", Duration::from_secs(10), async || {
        (read("trust-bundle.pem") == format!("{old}{new}")).then_some(())
    })
    .await;
    eventually("the old root is retired", Duration::from_secs(90), async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let settled = operate(&["pki", "rotate", &of_dev(&dir)]).starts_with("stage  settled");
        (settled && read("trust-bundle.pem") == new).then_some(())
    })
    .await;
    let processes = ["control-0", "dns-0", "eu-west.gateway-0", "eu-central.pod-0", "us-east.pod-1"];
    eventually("processes trust the new root alone", Duration::from_secs(20), async || {
        processes.iter().all(|name| read(&format!("{name}.trust.pem")) == new).then_some(())
    })
    .await;
    println!("a root was replaced in {:?}", begun.elapsed());
    assert_ne!(read("eu-west.pod-1.pem"), first, "it is renewed");
    let calls = calls.stop();
    let failed: Vec<&String> = calls.iter().filter_map(|call| call.as_ref().err()).collect();
    assert!(failed.is_empty() && calls.len() > 20, "{} of {}: {failed:?}", failed.len(), calls.len());

    kill(Pid::from_raw(dev.pid()), Signal::SIGTERM).expect("it runs");
    let status = eventually("dev ends", END, async || dev.child.try_wait().expect("a child")).await;
    assert!(status.success(), "{status}");
    // With the new root from the first leaf on, since clients know no other.
    let dev = Dev::start(&dir, &[], START);
    assert_eq!(read("trust-bundle.pem"), new);
    let answer = client_of(&read_endpoints(&dir), "acme").post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_scores("after a restart", &scores(&answer), &cases()[..1]);
    drop(dev);
}

/// The option for what `spillway dev` runs out of this folder.
fn of_dev(dir: &Path) -> String {
    format!("--dev={}", text(dir))
}

/// A command of the binary; returns what it printed.
fn operate(arguments: &[&str]) -> String {
    let output = Command::new(binary()).args(arguments).current_dir(root()).output().expect("it runs");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The printed curl line, again and again.
struct Calls {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<Result<(), String>>>,
}

impl Calls {
    fn start(curl: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut calls = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let output = Command::new("sh").args(["-c", &curl]).current_dir(root()).output().expect("sh is there");
                let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
                let right = answer["outputs"][0]["data"][0].is_number();
                calls.push(if right { Ok(()) } else { Err(format!("{output:?}")) });
                std::thread::sleep(Duration::from_millis(200));
            }
            calls
        });
        Self { stop, thread }
    }

    fn stop(self) -> Vec<Result<(), String>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

fn read_endpoints(dir: &Path) -> Value {
    let file = std::fs::read(root().join(dir).join("endpoints.json")).expect("endpoints.json");
    serde_json::from_slice(&file).expect("JSON")
}

/// What black-box checks rely on.
fn check_endpoints(endpoints: &Value) {
    let region = &endpoints["regions"][0];
    let words = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value} in {endpoints}")).to_owned();
    assert!(!words(&region["name"]).is_empty());
    assert!(words(&region["gateway"]["https"]).starts_with("https://"));
    let sidecars = region["sidecars"].as_array().expect("a list");
    assert_eq!(sidecars.len(), 2);
    let mut admins = vec![words(&region["gateway"]["admin"])];
    for sidecar in sidecars {
        assert!(!words(&sidecar["name"]).is_empty() && !words(&sidecar["grpc"]).is_empty());
        admins.push(words(&sidecar["admin"]));
    }
    for admin in admins {
        let address = admin.trim_start_matches("http://").parse().unwrap_or_else(|error| panic!("{admin}: {error}"));
        assert_eq!(metrics::get(address, "/readyz").expect("an answer").0, 200, "{admin}");
    }
    for path in [&endpoints["trust_bundle"], &endpoints["pki_dir"]] {
        let path = words(path);
        assert!(Path::new(&path).is_relative() && root().join(&path).exists(), "{path}");
    }
    for tenant in ["acme", "globex", "initech"] {
        for file in ["cert", "key"] {
            let path = words(&endpoints["clients"][tenant][file]);
            assert!(Path::new(&path).is_relative() && root().join(&path).is_file(), "{path}");
        }
    }
    assert_eq!(words(&endpoints["model"]), "phishing");
    assert!(cases().iter().any(|case| case.entity == words(&endpoints["example_entity"])));
}

fn identity_of(endpoints: &Value, tenant: &str) -> IdentitySettings {
    let path = |value: &Value| root().join(value.as_str().expect("a path"));
    IdentitySettings {
        certificate: path(&endpoints["clients"][tenant]["cert"]),
        key: path(&endpoints["clients"][tenant]["key"]),
        trust_bundle: path(&endpoints["trust_bundle"]),
    }
}

fn client_of(endpoints: &Value, tenant: &str) -> Client {
    let https = endpoints["regions"][0]["gateway"]["https"].as_str().expect("an address");
    Client::new(https.trim_start_matches("https://").parse().expect("an address"), &identity_of(endpoints, tenant))
}

async fn sequential_calls(client: &Client) {
    const CALLS: usize = 1_000;
    let all = cases();
    let mut open = client.connect(Protocol::H1).await.expect("a connection");
    let mut took = Vec::with_capacity(CALLS);
    for case in all.iter().cycle().take(CALLS) {
        let begun = Instant::now();
        let answer = open.send(client.json(INFER, &entity(&case.entity))).await.expect("an answer");
        took.push(begun.elapsed());
        assert_scores("sequential", &scores(&answer), std::slice::from_ref(case));
    }
    for (share, name) in [(0.5, "path.dev.p50_ms"), (0.99, "path.dev.p99_ms")] {
        record(name, percentile(&mut took, share).as_secs_f64() * 1e3, "ms", Goal::None);
    }
}

async fn repeats_are_cached_and_limits_are_met(endpoints: &Value) {
    let (client, body) = (client_of(endpoints, "initech"), features(&cases()[..1]));
    let mut answers = Vec::new();
    for _ in 0..12 {
        answers.push(client.post(INFER, &body).await.expect("an answer"));
    }
    assert!(answers[0].header("cache-status").contains("fwd=miss"), "{:?}", answers[0]);
    assert!(answers[1].header("cache-status").contains("hit"), "{:?}", answers[1]);
    let limited = answers.iter().find(|answer| answer.status == 429).expect("12 at once are too many for it");
    assert!(limited.error_code() == "rate-limited" && !limited.header("retry-after").is_empty(), "{limited:?}");
}

/// By what the README and the printed lines say.
async fn operators_see_what_happened(dir: &Path) {
    let dev = &*of_dev(dir);
    let status = operate(&["status", dev, "--region", "eu-west"]);
    assert!(status.contains("gateway-0") && status.contains("initech"), "{status}");
    let request = root().join(dir).join("request.json");
    std::fs::write(&request, entity("site-0001").to_string()).expect("a file");
    let caller = ["--tenant", "globex", "--client", "dev", "--model", "phishing", text(&request)];
    let told = operate(&[&["explain", dev], &caller[..]].concat());
    assert!(told.contains("not-allowed"), "{told}");
    assert!(operate(&["cache", "purge", dev, "--tenant", "initech"]).contains("results purged: 1,"));
    let audit = root().join(dir).join("eu-west/gateway-0.audit.log");
    // Equal refusals of a second are one record.
    eventually("the refusal is in the log", Duration::from_secs(5), async || {
        std::fs::read_to_string(&audit).expect("the log").contains("globex").then_some(())
    })
    .await;
    assert!(operate(&["audit", "verify", text(&audit)]).starts_with("ok: "));
}

async fn a_sidecar_that_dies_is_started_again(client: &Client, dev: &Dev) {
    let sidecars = || {
        let is_sidecar = |process: &i32| command_line(*process).contains("sidecar");
        descendants(dev.pid()).into_iter().filter(is_sidecar).collect::<BTreeSet<i32>>()
    };
    let before = sidecars();
    assert_eq!(before.len(), 6);
    let victim = *before.first().expect("two");
    kill(Pid::from_raw(victim), Signal::SIGKILL).expect("it runs");
    eventually("another takes its place", Duration::from_secs(15), async || {
        let now = sidecars();
        (now.len() == 6 && !now.contains(&victim)).then_some(())
    })
    .await;
    let answer = client.post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_scores("after a death", &scores(&answer), &cases()[..1]);
}

fn command_line(process: i32) -> String {
    std::fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default().replace('\0', " ")
}

/// Alive, and not a process that ended and waits to be reaped.
fn is_alive(process: i32) -> bool {
    stat(process).is_some_and(|(state, _)| state != 'Z')
}

/// All children of a process and theirs.
fn descendants(process: i32) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let all: Vec<(i32, i32)> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|process| Some((process, stat(process)?.1)))
        .collect();
    let mut found = vec![process];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(all.iter().filter(|(_, of)| *of == parent).map(|(child, _)| *child));
        at += 1;
    }
    found.split_off(1)
}

/// State and parent of a process.
fn stat(process: i32) -> Option<(char, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
