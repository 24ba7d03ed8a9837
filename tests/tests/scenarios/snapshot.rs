//! Resources to a snapshot, and snapshots into service while requests run.

use std::path::Path;
use std::time::Duration;

use prost::Message;
use spillway_proto::control::SealedSnapshot;
use spillway_tests::harness::client::Protocol;
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, entity};
use spillway_tests::harness::load::{Load, failures};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::process::spillway;
use spillway_tests::harness::region::{Region, text};
use spillway_tests::harness::run_folder::RunFolder;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn check_prints_every_fault_with_file_line_resource_field_and_what_is_expected() {
    let folder = RunFolder::new("check");
    let pool = "apiVersion: spillway/v1\nkind: Pool\nmetadata: { name: scorers }\nspec:\n  regoin: eu-west\n  pods:\n    - { name: pod-0, address: nowhere }\n";
    let model = "apiVersion: spillway/v1\nkind: Model\nmetadata: { name: m }\nspec:\n  pools: [scorers, gone]\n  versions: [1]\n  backend: magic\n  deadline: 200\n  inputs: [{ name: x, datatype: FP32, shape: [-1, 2] }]\n  outputs: [{ name: y, datatype: FP33, shape: [-1] }]\n";
    std::fs::create_dir(folder.join("deeper")).expect("a folder");
    std::fs::write(folder.join("pool.yaml"), pool).expect("a file");
    std::fs::write(folder.join("deeper/model.yml"), model).expect("a file");
    std::fs::write(folder.join("broken.yaml"), "kind: [\n").expect("a file");
    std::fs::write(folder.join("notes.txt"), "no resource").expect("a file");
    let snapshot = folder.join("snapshot");
    let output = spillway(&["check", "-f", text(&folder), "-o", text(&snapshot)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!snapshot.exists(), "nothing is written");
    let told = String::from_utf8(output.stdout).expect("text");
    let at = |file: &str| folder.join(file).display().to_string();
    for (place, says) in [
        (format!("{}:5: Pool/scorers: spec.regoin: ", at("pool.yaml")), "expected one of dns, pods, region"),
        (
            format!("{}:7: Pool/scorers: spec.pods[0].address: ", at("pool.yaml")),
            "'nowhere' is not valid: expected an address",
        ),
        (format!("{}:7: Model/m: spec.backend: ", at("deeper/model.yml")), "expected triton or onnx"),
        (format!("{}:8: Model/m: spec.deadline: ", at("deeper/model.yml")), "'200' is not valid: expected"),
        (format!("{}:10: Model/m: spec.outputs[0].datatype: ", at("deeper/model.yml")), "expected one of BOOL"),
        (format!("{}:", at("broken.yaml")), "no valid YAML"),
    ] {
        let found = told.lines().any(|line| line.starts_with(&place) && line.contains(says));
        assert!(found, "{place}…{says}\nin\n{told}");
    }
    assert!(told.contains("spec.region: is missing and required"), "{told}");
}

#[test]
fn check_compiles_equal_resources_to_equal_bytes_and_counts_versions_up() {
    let region = Region::new("check-twice");
    region.apply();
    let first = std::fs::read(region.snapshot()).expect("a snapshot");
    let resources = region.folder.join("resources");
    let again = region.folder.join("again");
    let output = spillway(&["check", "-f", text(&resources), "-o", text(&again)]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(std::fs::read(&again).expect("a snapshot"), first);
    region.apply();
    assert_ne!(std::fs::read(region.snapshot()).expect("a snapshot"), first, "the next version");
    let output = spillway(&["check", "-f", text(&resources)]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b""[..]));
    let output = spillway(&["check", "-f", text(&region.folder.join("nothing-here"))]);
    assert!(!output.status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_policy_takes_effect_under_load_without_a_dropped_request() {
    let mut region = Region::new("snapshot-live");
    region.start().await;
    let client = region.client("acme");
    let make = |client: &spillway_tests::harness::client::Client, number: usize| {
        client.json(INFER, &entity(&format!("site-{:04}", number % 64 + 1)))
    };
    let load = Load::start(&client, Protocol::H2, 4, Duration::from_millis(2), make, |_, answer| {
        match (answer.status.as_u16(), answer.error_code()) {
            (200, "") | (403, "not-allowed") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let status = async || client.post(INFER, &entity("site-0001")).await.expect("an answer").status.as_u16();
    for _ in 0..3 {
        let granted = region.resources["tenants.yaml"].clone();
        region.edit("tenants.yaml", "actions: [infer, metadata]", "actions: [metadata]");
        region.apply();
        eventually("the policy is revoked", SOON, async || (status().await == 403).then_some(())).await;
        region.resources.insert("tenants.yaml".into(), granted);
        region.apply();
        eventually("the policy is granted again", SOON, async || (status().await == 200).then_some(())).await;
    }
    let shots = load.stop().await;
    assert!(
        failures(&shots).is_empty() && shots.len() > 100,
        "{} of {}: {:?}",
        failures(&shots).len(),
        shots.len(),
        failures(&shots)
    );
    assert_eq!(region.gateway_metrics().sum("spillway_snapshot_version", &[]), 7.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t62_a_bad_snapshot_is_refused_whole_and_the_last_good_one_serves() {
    let mut region = Region::new("snapshot-bad");
    region.start().await;
    region.apply();
    let admins: Vec<_> = std::iter::once(region.gateway()).chain(&region.sidecars).map(|one| one.admin).collect();
    let version = async |version: f64| {
        eventually(&format!("version {version} is served by all"), SOON, async || {
            let serves = |admin| Metrics::of(admin).sum("spillway_snapshot_version", &[]) == version;
            admins.iter().all(|admin| serves(*admin)).then_some(())
        })
        .await;
    };
    version(2.0).await;
    let good = std::fs::read(region.snapshot()).expect("a snapshot");
    let mut wrong_sum = SealedSnapshot::decode(&good[..]).expect("a sealed snapshot");
    let mut sum = wrong_sum.sha256.to_vec();
    sum[0] ^= 1;
    wrong_sum.sha256 = sum.into();
    let older = compiled(&region, 1);
    // Nothing, with a sum: without one these bytes would be those of the empty file, which follows.
    let blank = SealedSnapshot { sha256: vec![0; 32].into(), ..SealedSnapshot::default() }.encode_to_vec();
    for (what, reason, bytes) in [
        ("truncated", "malformed", good[..good.len() / 2].to_vec()),
        ("another sum", "checksum", wrong_sum.encode_to_vec()),
        ("a lower version", "version", older),
        ("blank", "malformed", blank),
        ("empty", "malformed", Vec::new()),
        ("no protobuf", "malformed", b"not a snapshot at all".to_vec()),
    ] {
        let label = format!("reason=\"{reason}\"");
        let counted = || {
            admins.iter().map(|admin| Metrics::of(*admin).sum("spillway_snapshot_rejected_total", &[&label])).collect()
        };
        let before: Vec<f64> = counted();
        replace(&region.snapshot(), &bytes);
        eventually(&format!("{what} is refused as {reason} by all"), SOON, async || {
            let now: Vec<f64> = counted();
            now.iter().zip(&before).all(|(now, before)| now > before).then_some(())
        })
        .await;
        let answer = region.client("acme").post(INFER, &entity("site-0001")).await.expect("an answer");
        assert_eq!(answer.status, 200, "{what}");
        version(2.0).await;
    }
    // Then a good one is taken as if nothing had been.
    replace(&region.snapshot(), &compiled(&region, 9));
    version(9.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_does_not_start_from_a_bad_snapshot_and_says_why() {
    let mut region = Region::new("snapshot-start");
    region.start().await;
    replace(&region.snapshot(), b"not a snapshot");
    let config = region.folder.join("gateway-0.yaml");
    let Err(problem) = spillway_tests::harness::process::Process::try_start("again", "gateway", &config) else {
        panic!("it started from a bad snapshot");
    };
    assert!(problem.contains("snapshot"), "{problem}");
}

/// The region's resources as a version of its own.
fn compiled(region: &Region, version: u64) -> Vec<u8> {
    let (resources, output) = (region.folder.join("resources"), region.folder.join("compiled"));
    let version = version.to_string();
    let done = spillway(&["check", "-f", text(&resources), "-o", text(&output), "--snapshot-version", &version]);
    assert!(done.status.success(), "{done:?}");
    std::fs::read(output).expect("a snapshot")
}

fn replace(path: &Path, bytes: &[u8]) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, bytes).expect("it is written");
    std::fs::rename(&beside, path).expect("it is renamed");
}
