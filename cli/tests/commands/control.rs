//! What an operator does with a control plane: one node, its own process, and the commands.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::spillway;

/// A trust domain, a control node of it, and whoever has a certificate.
struct Plane {
    folder: tempfile::TempDir,
    address: String,
    process: Child,
}

impl Plane {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pki = folder.path().join("pki");
        assert!(spillway(&["pki", "init", pki.to_str().unwrap()], "").1);
        for id in ["region/eu/control/c-0", "region/eu/gateway/gw-0", "operator/alice", "operator/mallory"] {
            let id = format!("spiffe://spillway.test/{id}");
            let (text, ok) = spillway(&["pki", "issue", pki.to_str().unwrap(), &id], "");
            assert!(ok, "{text}");
        }
        let settings = format!(
            "region: eu\nname: c-0\nlisten: 127.0.0.1:0\nstore: {{sqlite: {dir}/control.db}}\noperators: [alice]\n\
             identity: {{certificate: {dir}/pki/c-0.pem, key: {dir}/pki/c-0.key, trustBundle: {dir}/pki/trust-bundle.pem}}\n",
            dir = folder.path().display()
        );
        let config = folder.path().join("control.yaml");
        std::fs::write(&config, settings).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_spillway"))
            .args(["control", "-c", config.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let listening: serde_json::Value = serde_json::from_str(&line).unwrap();
        let address = listening["listening"]["grpc"].as_str().unwrap().to_owned();
        let plane = Self { folder, address, process };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // It leads as soon as it has stood for election.
        while !plane.alice(&["override", "lift", "nowhere"]).0.contains("there is no override") {
            assert!(std::time::Instant::now() < deadline, "no leader");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        plane
    }

    fn alice(&self, arguments: &[&str]) -> (String, bool) {
        self.with("alice", arguments)
    }

    /// Runs a command with somebody's certificate: what is printed, and whether it exits with 0.
    fn with(&self, name: &str, arguments: &[&str]) -> (String, bool) {
        let file = |name: &str| self.folder.path().join("pki").join(name).display().to_string();
        let (certificate, key, bundle) =
            (file(&format!("{name}.pem")), file(&format!("{name}.key")), file("trust-bundle.pem"));
        let identity =
            ["--control", &*self.address, "--certificate", &*certificate, "--key", &*key, "--trust-bundle", &*bundle];
        spillway(&[arguments, &identity].concat(), "")
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const REGIONS: &str = "
apiVersion: spillway/v1
kind: Region
metadata: {name: eu}
spec: {trustDomain: spillway.test}
---
apiVersion: spillway/v1
kind: Region
metadata: {name: us}
spec: {trustDomain: spillway.test, weight: 50}
";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn resources_are_applied_shown_and_rolled_back() {
    let plane = Plane::start();
    let file = plane.write("regions.yaml", REGIONS);
    let (said, ok) = plane.alice(&["apply", "-f", text(&file), "--dry-run"]);
    assert!(ok && said.contains("+ Region/eu\n+ Region/us\n") && said.contains("this would be version 1"), "{said}");
    let (said, ok) = plane.alice(&["get"]);
    assert!(!ok && said.contains("the control plane says: nothing was applied yet"), "{said}");
    let (said, ok) = plane.alice(&["apply", "-f", text(&file), "-m", "the first", "--expect", "0"]);
    assert!(ok && said.contains("version 1, 2 changes"), "{said}");

    let (yaml, ok) = plane.alice(&["get", "-o", "yaml"]);
    assert!(ok, "{yaml}");
    let again = plane.write("again.yaml", &yaml);
    let (said, ok) = plane.alice(&["apply", "-f", text(&again)]);
    assert!(ok && said.contains("nothing changes; version 1 stays"), "{said}");

    let heavier = plane.write("heavier.yaml", &REGIONS.replace("weight: 50", "weight: 60"));
    let (said, ok) = plane.alice(&["apply", "-f", text(&heavier), "--expect", "7"]);
    assert!(!ok && said.contains("the current version is 1; 7 was expected"), "{said}");
    let (said, ok) = plane.alice(&["apply", "-f", text(&heavier)]);
    assert!(
        ok && said.contains("~ Region/us\n    ~ spec.weight: 50 -> 60\n") && said.contains("version 2, 1 change"),
        "{said}"
    );
    let (said, ok) = plane.alice(&["rollback", "1", "-m", "too much"]);
    assert!(ok && said.contains("spec.weight: 60 -> 50") && said.contains("version 3"), "{said}");
    let (said, ok) = plane.alice(&["get", "Region", "us", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(ok && shown["version"] == 3 && shown["resources"][0]["spec"]["weight"] == "50", "{said}");
    assert!(plane.alice(&["get", "Region", "us", "--version", "2", "-o", "yaml"]).0.contains("weight: 60"));
    let (said, ok) = plane.alice(&["get", "Region", "mars"]);
    assert!(!ok && said.contains("there is no Region/mars in version 3"), "{said}");
    let (said, ok) = plane.alice(&["rollback", "9"]);
    assert!(!ok && said.contains("there is no version 9; `spillway history` shows"), "{said}");
    let (said, ok) = plane.alice(&["history"]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(ok && lines.len() == 3 && lines[0].contains("(version 1 again)  too much"), "{said}");
    assert!(lines[2].ends_with("+2 ~0 -0  spiffe://spillway.test/operator/alice  the first"), "{said}");
}

#[test]
fn faults_are_told_as_by_check() {
    let plane = Plane::start();
    let pool = "---\napiVersion: spillway/v1\nkind: Pool\nmetadata: {name: p}\nspec:\n  region: mars\n  pods: [{name: a, address: '10.0.0.1:1'}]\n";
    let file = plane.write("wrong.yaml", &format!("{REGIONS}{pool}"));
    let (applied, ok) = plane.alice(&["apply", "-f", text(&file)]);
    let (checked, _) = spillway(&["check", "-f", text(&file)], "");
    assert!(!ok && applied.contains("1 fault in 1 file; nothing was changed"), "{applied}");
    assert_eq!(applied.lines().next(), checked.lines().next());
    assert!(
        applied.starts_with(&format!("{}:16: Pool/p: spec.region: there is no Region 'mars'", file.display())),
        "{applied}"
    );
}

#[test]
fn overrides_are_given_shown_and_lifted() {
    let plane = Plane::start();
    let file = plane.write("regions.yaml", REGIONS);
    assert!(plane.alice(&["apply", "-f", text(&file)]).1);
    let (said, ok) = plane.alice(&["override", "drain", "eu", "--for", "30m", "--reason", "a flood"]);
    assert!(ok && said.contains("eu: drain until 2") && said.contains("operator/alice: a flood"), "{said}");
    let (said, ok) = plane.alice(&["override", "weight", "us", "--to", "0", "--for", "30m", "--reason", "x"]);
    assert!(!ok && said.contains("'us' is the last region that is to take traffic"), "{said}");
    let (said, ok) = plane.alice(&["override", "weight", "us", "--to", "2.5", "--for", "8d", "--reason", "x"]);
    assert!(!ok && said.contains("longer than 7d"), "{said}");
    assert!(!plane.alice(&["override", "drain", "eu", "--for", "30m"]).1, "a reason is needed");
    let (said, ok) = plane.alice(&["override", "list", "-o", "json"]);
    let held: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(ok && held["overrides"][0]["act"] == "drain" && held["overrides"].as_array().unwrap().len() == 1, "{said}");
    let (said, ok) = plane.alice(&["override", "lift", "eu"]);
    assert!(ok && said.contains("eu: lifted\nno overrides hold"), "{said}");
}

#[test]
fn the_audit_trail_is_shown() {
    let plane = Plane::start();
    let file = plane.write("regions.yaml", REGIONS);
    assert!(plane.alice(&["apply", "-f", text(&file)]).1);
    assert!(plane.alice(&["override", "drain", "eu", "--for", "30m", "--reason", "a flood"]).1);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    // Records are written in the background.
    let said = loop {
        let (said, ok) = plane.alice(&["audit", "show"]);
        if ok && said.lines().next().is_some_and(|newest| newest.contains("override-set")) {
            break said;
        }
        assert!(std::time::Instant::now() < deadline, "{said}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].starts_with("20"), "{said}");
    let by =
        "  override-set        spiffe://spillway.test/operator/alice  act=drain node=c-0 reason=\"a flood\" region=eu";
    assert!(lines[0].contains(by), "{said}");
    assert!(lines[1].contains("  intent-applied      spiffe://spillway.test/operator/alice  added=2 "), "{said}");
    assert!(lines.iter().any(|line| line.ends_with("leadership-changed  c-0  epoch=2 leads=true")), "{said}");
    let (said, ok) = plane.alice(&["audit", "show", "--limit", "1", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&said).unwrap();
    let records = shown["records"].as_array().unwrap();
    assert!(ok && records.len() == 1 && records[0]["event"] == "override-set", "{said}");
    assert_eq!(records[0]["reason"], "a flood");
    let (said, ok) = plane.with("mallory", &["audit", "show"]);
    assert!(!ok && said.contains("the control plane says: "), "{said}");
}

#[test]
fn who_may_not_is_told_so() {
    let plane = Plane::start();
    for name in ["mallory", "gw-0"] {
        let (said, ok) = plane.with(name, &["history"]);
        assert!(!ok && said.contains("the control plane says: "), "{name}: {said}");
    }
    let (said, ok) = spillway(&["history", "--control", &plane.address], "");
    assert!(!ok && said.contains("--identity, or all of --certificate"), "{said}");
    let (said, ok) = spillway(&["history"], "");
    assert!(!ok && said.contains("--control"), "{said}");
}
