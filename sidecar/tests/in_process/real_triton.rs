//! The backend triton against the real server (tests/servers/triton.sh): right answers, streams, and a
//! server that hangs, is killed and comes back.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::pod::{Client, Pod, code, joined_model, parameters, resources, scores, text_parameter};
use crate::support::{expected, fp32};
use bytes::Bytes;
use spillway_core::inference::{Datatype, InferRequest, Parameters, Tensor};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse, ModelReadyRequest};
use spillway_runtime::oip;
use tonic::{Code, Status};

struct Triton {
    folder: tempfile::TempDir,
    ports: [u16; 3],
}

impl Triton {
    fn start() -> Self {
        let repository = repository();
        let tools = std::env::var_os("SPILLWAY_TOOLS").map_or_else(|| repository.join(".tools"), PathBuf::from);
        let installed = tools.join("triton/bin/python").exists();
        assert!(installed, "Triton is not installed: run tests/servers/install.sh triton");
        let port = |_| std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let ports = [(), (), ()].map(port).map(|listener| listener.local_addr().unwrap().port());
        let triton = Self { folder: tempfile::tempdir().unwrap(), ports };
        triton.spawn();
        triton
    }

    fn spawn(&self) {
        let [http, grpc, metrics] = self.ports.map(|port| port.to_string());
        self.script(&["start", &self.at(), &http, &grpc, &metrics, "phishing", "sleepy", "tokens", "grumpy"]);
    }

    fn kill(&self) {
        self.script(&["kill", &self.at()]);
    }

    fn signal(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.folder.path().join("triton.pid")).unwrap();
        assert!(Command::new("kill").args([signal, pid.trim()]).status().unwrap().success());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("triton.log")).unwrap()
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[1])
    }

    fn at(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn script(&self, arguments: &[&str]) {
        let script = repository().join("tests/servers/triton.sh");
        assert!(Command::new(script).args(arguments).status().unwrap().success(), "{arguments:?}");
    }
}

impl Drop for Triton {
    fn drop(&mut self) {
        let _ = Command::new(repository().join("tests/servers/triton.sh")).args(["kill", &self.at()]).status();
    }
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn models() -> String {
    let simple = |name: &str, input: &str, output: &str, warm_up: u32| {
        format!(
            "---\napiVersion: spillway/v1\nkind: Model\nmetadata: {{name: {name}}}\nspec:\n  pools: [scorers]\n  versions: ['1']\n  \
             backend: triton\n  deadline: 2s\n  maxDeadline: 10s\n  warmUp: {{requests: {warm_up}}}\n  \
             inputs: [{input}]\n  outputs: [{output}]\n"
        )
    };
    let ms = "{name: ms, datatype: INT32, shape: [1]}";
    let x = "{name: x, datatype: FP32, shape: [-1]}";
    // tokens is decoupled: only a stream can call it, so that it is not warmed up.
    joined_model("phishing", "  backend: triton")
        + &simple("sleepy", ms, ms, 1)
        + &simple("tokens", "{name: n, datatype: INT32, shape: [1]}", "{name: token, datatype: BYTES, shape: [1]}", 0)
        + &simple("grumpy", x, x, 0)
}

fn number(name: &str, value: i32) -> Tensor {
    let data = Bytes::copy_from_slice(&value.to_le_bytes());
    Tensor { name: name.into(), datatype: Datatype::Int32, shape: vec![1], parameters: Parameters::default(), data }
}

fn request(model: &str, inputs: Vec<Tensor>) -> ModelInferRequest {
    oip::encode_request(&InferRequest { model: model.into(), id: "r".into(), inputs, ..InferRequest::default() })
}

fn sleep(ms: i32, timeout: Duration) -> ModelInferRequest {
    let micros = ParameterChoice::Int64Param(i64::try_from(timeout.as_micros()).unwrap());
    ModelInferRequest { parameters: parameters([("timeout", micros)]), ..request("sleepy", vec![number("ms", ms)]) }
}

async fn infer(client: &mut Client, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
    client.model_infer(request).await.map(tonic::Response::into_inner)
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_triton_answers_streams_hangs_dies_and_comes_back() {
    let triton = tokio::task::spawn_blocking(Triton::start).await.unwrap();
    let pod = Pod::start(&resources(&models()), &format!("triton: {}\n", triton.endpoint())).await.ready().await;
    let mut gateway = pod.gateway().await;
    let (cases, tolerance) = expected();
    pod.put(&cases, Duration::ZERO).await;

    // The same scores as the training library, by one entity and by many.
    for case in &cases[..4] {
        let entity = ParameterChoice::StringParam(case.entity.clone());
        let joined =
            ModelInferRequest { parameters: parameters([("entity_id", entity)]), ..request("phishing", Vec::new()) };
        let answer = infer(&mut gateway, joined).await.unwrap();
        assert!((scores(&answer)[0] - case.score).abs() <= tolerance, "{}", case.entity);
    }
    let features: Vec<f32> = cases.iter().flat_map(|case| case.features.clone()).collect();
    let answer = infer(&mut gateway, request("phishing", vec![fp32("features", &[64, 9], &features)])).await.unwrap();
    for (case, score) in cases.iter().zip(scores(&answer)) {
        assert!((score - case.score).abs() <= tolerance, "{}", case.entity);
    }

    // A model's own error, without the server's paths.
    let status = infer(&mut gateway, request("grumpy", vec![fp32("x", &[1], &[0.0])])).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Internal, "model-failed"));
    assert!(status.message().contains("grumpy says no") && !status.message().contains('/'), "{}", status.message());

    // A decoupled model: every answer of every request, an error in band, and the stream goes on.
    let sent = vec![request("tokens", vec![number("n", 3)]), request("tokens", vec![number("n", -2)])];
    let mut stream = gateway.model_stream_infer(futures_util::stream::iter(sent)).await.unwrap().into_inner();
    let (mut tokens, mut ends, mut errors) = (0, 0, Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        let outputs = message.infer_response.as_ref().unwrap().outputs.len();
        match (message.error_message.is_empty(), outputs) {
            (true, 1) => tokens += 1,
            (true, _) => ends += 1,
            (false, _) => errors.push(message),
        }
    }
    assert_eq!((tokens, ends, errors.len()), (5, 1, 1));
    assert_eq!(text_parameter(errors[0].infer_response.as_ref().unwrap(), "spillway-error"), Some("model-failed"));

    // Its statistics say how long requests wait for a place.
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut client = gateway.clone();
        waiting.spawn(async move {
            loop {
                infer(&mut client, sleep(50, Duration::from_secs(5))).await.unwrap();
            }
        });
    }
    until("the load is told", async || {
        let answer = gateway.clone().model_infer(sleep(0, Duration::from_secs(5))).await.unwrap();
        let said = answer.metadata().get("endpoint-load-metrics").unwrap().to_str().unwrap();
        let figure =
            |name: &str| said.split([' ', ',', '=']).skip_while(|word| *word != name).nth(1)?.parse::<f64>().ok();
        let wait_us = figure("named_metrics.model_queue_us").unwrap_or_default();
        // Four at a time and one place, 50 ms each.
        wait_us > 75_000.0 && figure("application_utilization").is_some_and(|load| load > 0.5)
    })
    .await;
    waiting.shutdown().await;

    // The deadline is kept and reaches Triton as a cancellation.
    let begun = Instant::now();
    let status = infer(&mut gateway, sleep(8_000, Duration::from_millis(300))).await.unwrap_err();
    assert_eq!(code(&status), "deadline-exceeded");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    until("sleepy is cancelled", async || triton.log().contains("sleepy: cancelled")).await;

    // Hanging: the deadline holds; going on: the next call is right.
    triton.signal("-STOP");
    let begun = Instant::now();
    let status = infer(&mut gateway, sleep(0, Duration::from_millis(300))).await.unwrap_err();
    assert_eq!(code(&status), "deadline-exceeded");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    triton.signal("-CONT");
    let sent = || request("phishing", vec![fp32("features", &[1, 9], &cases[0].features)]);
    until("an answer after going on", async || infer(&mut gateway.clone(), sent()).await.is_ok()).await;

    // Gone: at once, clearly. Back: found without a restart, warmed up and ready.
    let ready = ModelReadyRequest { name: "phishing".into(), version: String::new() };
    let triton = tokio::task::spawn_blocking(move || {
        triton.kill();
        triton
    });
    let triton = triton.await.unwrap();
    let begun = Instant::now();
    let status = infer(&mut gateway, sent()).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Unavailable, "model-unavailable"));
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    until("not ready while gone", async || {
        !gateway.clone().model_ready(ready.clone()).await.unwrap().into_inner().ready
    })
    .await;
    let triton = tokio::task::spawn_blocking(move || {
        triton.spawn();
        triton
    });
    let triton = triton.await.unwrap();
    until("ready again", async || gateway.clone().model_ready(ready.clone()).await.unwrap().into_inner().ready).await;
    infer(&mut gateway, sent()).await.unwrap();
    tokio::task::spawn_blocking(move || drop(triton)).await.unwrap();
}
