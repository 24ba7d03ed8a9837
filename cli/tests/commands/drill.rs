//! What `spillway drill run` exits with when there is no report.

use std::process::Command;

fn drill(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_spillway")).arg("drill").args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn what_cannot_be_run_is_neither_a_failure_nor_a_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let dev = format!("--dev={}", folder.path().display());
    let (code, said) = drill(&["run", "region-loss", &dev]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("endpoints.json") && said.contains("injector"), "{said}");
    let (code, said) = drill(&["run", "no-such-drill", &dev]);
    assert_eq!(code, Some(4), "{said}");
    let (code, said) = drill(&["run", "--no-such-option"]);
    assert_eq!(code, Some(2), "{said}");
}

#[test]
fn an_injector_that_is_not_there_is_said_to_be_missing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let pair = r#"{ "cert": "c.pem", "key": "c.key" }"#;
    let injector = path("none.json");
    let text = format!(
        r#"{{ "service": {{ "name": "predict.test", "port": 1 }}, "dns": ["127.0.0.1:1"], "trust_bundle": "r.pem",
                 "control": [{{ "name": "a", "grpc": "127.0.0.1:1", "id": "spiffe://td/region/eu/control/a" }}],
                 "operator": {pair}, "clients": {{ "acme": {pair} }}, "model": "m", "example_entity": "e",
                 "injector": "{injector}", "regions": [] }}"#
    );
    std::fs::write(path("endpoints.json"), text).unwrap();
    let dev = format!("--dev={}", folder.path().display());
    let (code, said) = drill(&["run", "region-loss", &dev]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("none.json") && said.contains("spillway drill --help"), "{said}");
}

#[test]
fn help_says_what_is_needed_and_what_each_exit_code_means() {
    let (_, said) = drill(&["--help"]);
    assert!(said.contains("spillway injector"), "{said}");
    let (_, said) = drill(&["run", "--help"]);
    assert!(said.contains("4  no report"), "{said}");
    let (_, said) = drill(&["list"]);
    assert!(said.contains("--with-servers") && said.starts_with("region-loss    Every"), "{said}");
}
