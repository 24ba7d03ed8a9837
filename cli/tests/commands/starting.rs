//! What a process says that cannot start: the cause once, and the file.

use std::path::Path;

use crate::support::spillway;

/// A gateway with these settings does not start, names the file, and says once what is wrong with it.
fn misses(config: &Path, file: &Path) {
    let (text, ok) = spillway(&["gateway", "--config", config.to_str().unwrap()], "");
    assert!(!ok, "{text}");
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
    assert_eq!(text.matches(file.to_str().unwrap()).count(), 1, "{text}");
}

#[test]
fn a_missing_settings_file_is_named_and_its_cause_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("gateway.yaml");
    misses(&config, &config);
}

#[test]
fn a_missing_file_of_the_identity_is_named_and_its_cause_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("leaf.pem"), "").unwrap();
    std::fs::write(at("bundle.pem"), "").unwrap();
    let settings = format!(
        "region: eu\nname: gw-0\nlisten: 127.0.0.1:0\nsnapshot: {dir}/snapshot\n\
         identity: {{certificate: {dir}/leaf.pem, key: {dir}/leaf.key, trustBundle: {dir}/bundle.pem}}\n",
        dir = folder.path().display()
    );
    std::fs::write(at("gateway.yaml"), settings).unwrap();
    misses(&at("gateway.yaml"), &at("leaf.key"));
}
