//! The arrows between crates, and what `core` may not touch.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Who may use whom, by folder. `cli` and `tests` may use everything.
const ARROWS: [(&str, &[&str]); 7] = [
    ("core", &[]),
    ("proto", &[]),
    ("figures", &[]),
    ("runtime", &["core", "proto"]),
    ("gateway", &["core", "proto", "runtime"]),
    ("sidecar", &["core", "proto", "runtime"]),
    ("control", &["core", "proto", "runtime"]),
];

/// Small pure crates: no I/O, no clock, no randomness.
const CORE_MAY_USE: [&str; 8] =
    ["bytes", "half", "saphyr-parser", "serde", "serde_json", "sha2", "thiserror", "xxhash-rust"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// Folder of each workspace crate -> its normal and build dependencies.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let folder = |package: &Value| {
        let manifest = Path::new(package["manifest_path"].as_str().expect("a path"));
        manifest.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned()
    };
    let used = |package: &Value| {
        let all = package["dependencies"].as_array().expect("dependencies");
        all.iter()
            .filter(|dependency| dependency["kind"] != "dev")
            .map(|dependency| dependency["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    packages.iter().map(|package| (folder(package), used(package))).collect()
}

#[test]
fn crates_use_only_what_the_arrows_allow() {
    let dependencies = dependencies();
    for (folder, allowed) in ARROWS {
        for used in &dependencies[folder] {
            let Some(inner) = used.strip_prefix("spillway-") else { continue };
            assert!(allowed.contains(&inner), "{folder} uses {inner}; it may use {allowed:?}");
        }
    }
    let known = ARROWS.map(|(folder, _)| folder);
    let unknown: Vec<&String> = dependencies
        .keys()
        .filter(|folder| !known.contains(&folder.as_str()) && !["cli", "tests"].contains(&folder.as_str()))
        .collect();
    assert!(unknown.is_empty(), "say here what these may use: {unknown:?}");
}

#[test]
fn core_uses_small_pure_crates_alone() {
    for used in &dependencies()["core"] {
        assert!(CORE_MAY_USE.contains(&used.as_str()), "core uses {used}");
    }
}

#[test]
fn core_has_no_io_clock_randomness_or_threads() {
    const FORBIDDEN: [&str; 10] = [
        "std::net::Tcp",
        "std::net::Udp",
        "std::fs",
        "std::process",
        "std::thread",
        "std::env",
        "SystemTime::now",
        "Instant::now",
        "tokio",
        "rand::",
    ];
    let mut files = Vec::new();
    collect(&root().join("core/src"), &mut files);
    assert!(files.len() > 10, "the sources of core were found");
    // Tests may run on all cores.
    let is_test = |file: &PathBuf| file.to_string_lossy().ends_with("tests.rs");
    for file in files.into_iter().filter(|file| !is_test(file)) {
        let text = std::fs::read_to_string(&file).expect("a source file");
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for word in FORBIDDEN {
                assert!(!line.contains(word), "{}:{}: {word}", file.display(), number + 1);
            }
        }
    }
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}
