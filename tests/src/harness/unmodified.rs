//! Clients that others wrote, as they are: tritonclient (HTTP and gRPC), curl and grpcurl.

use std::process::Command;

use serde_json::json;
use spillway_runtime::tls::IdentitySettings;

use super::inference::{INFER, MODEL, TOLERANCE, cases, entity};
use super::region::text;

/// Predictions by all of them against a gateway of the phishing model on this machine.
pub fn predict(port: u16, identity: &IdentitySettings) {
    let [bundle, certificate, key] =
        [&identity.trust_bundle, &identity.certificate, &identity.key].map(|path| text(path));
    let address = format!("localhost:{port}");
    let tools = std::env::var_os("SPILLWAY_TOOLS").map_or_else(|| crate::root().join(".tools"), Into::into);
    let expected = crate::root().join("cli/dev/model/expected.json");
    for script in ["triton_http.py", "triton_grpc.py"] {
        let mut python = Command::new(tools.join("clients/bin/python"));
        python
            .arg(crate::root().join("tests/clients").join(script))
            .args([&address, bundle, certificate, key])
            .arg(&expected);
        assert_eq!(run(python).trim(), "ok", "{script}");
    }
    let case = &cases()[0];
    let body = entity(&case.entity).to_string();
    for version in ["--http1.1", "--http2"] {
        let mut curl = Command::new("curl");
        curl.args([
            "-sS",
            "--fail-with-body",
            "--tlsv1.3",
            version,
            "--cacert",
            bundle,
            "--cert",
            certificate,
            "--key",
            key,
        ]);
        curl.args([&format!("https://{address}{INFER}"), "-d", &body]);
        let answer: serde_json::Value = serde_json::from_str(&run(curl)).expect("JSON");
        let score = answer["outputs"][0]["data"][0].as_f64().expect("a score");
        assert!((score - f64::from(case.score)).abs() <= 1e-5, "{answer}");
    }
    let mut grpcurl = Command::new(tools.join("bin/grpcurl"));
    grpcurl.args(["-cacert", bundle, "-cert", certificate, "-key", key]);
    grpcurl.arg("-import-path").arg(crate::root().join("proto/proto")).args(["-proto", "inference.proto", "-d"]);
    grpcurl.arg(
        json!({ "model_name": MODEL, "parameters": { "entity_id": { "string_param": case.entity } } }).to_string(),
    );
    grpcurl.args([&address, "inference.GRPCInferenceService/ModelInfer"]);
    let answer: serde_json::Value = serde_json::from_str(&run(grpcurl)).expect("JSON");
    assert_eq!(answer["modelName"], MODEL, "{answer}");
    // Protobuf's JSON has bytes in base64: eight letters for one FP32.
    let raw = answer["rawOutputContents"][0].as_str().expect("raw contents");
    let score = f32::from_le_bytes(base64(raw)[..4].try_into().expect("four bytes"));
    assert!((score - case.score).abs() <= TOLERANCE, "{answer}");
}

fn base64(text: &str) -> Vec<u8> {
    const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().map(|letter| LETTERS.bytes().position(|known| known == letter).unwrap_or(0) as u32);
    let digits: Vec<u32> = digits.collect();
    let bits = |four: &[u32]| four.iter().fold(0, |bits, digit| bits << 6 | digit);
    digits.chunks_exact(4).flat_map(|four| bits(four).to_be_bytes()[1..].to_vec()).collect()
}

/// Runs a client; returns what it printed, fails with all that it said.
fn run(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}
