//! Each dependency refuses, hangs, is slow or answers wrongly: what the client gets, and that nothing wrong stays.

mod cassandra;
mod redis;
mod triton;

use std::time::{Duration, Instant};

use spillway_tests::harness::client::{Answer, Client, Protocol};
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{Asked, Case, INFER, entity, message};
use spillway_tests::harness::region::Region;

/// What each request here asks for.
const DEADLINE: Duration = Duration::from_millis(500);
/// What an answer may come later than that, on a busy machine.
const SLACK: Duration = Duration::from_millis(250);
/// How long a server that is back may take to be used.
const BACK: Duration = Duration::from_secs(60);

/// One entity's prediction on a connection of its own; the answer must come in time.
async fn ask(client: &Client, case: &Case) -> Answer {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let mut request = client.json(INFER, &entity(&case.entity));
    let header = DEADLINE.as_millis().to_string().parse().expect("a header");
    request.headers_mut().insert("x-request-timeout-ms", header);
    let begun = Instant::now();
    let answer = open.send(request).await.expect("an answer");
    let took = begun.elapsed();
    assert!(took <= DEADLINE + SLACK, "answered {} after {took:?}", answer.status);
    answer
}

async fn ask_grpc(client: &Client, case: &Case) -> (grpc::GrpcAnswer, Duration) {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let begun = Instant::now();
    let asked = message(&Asked::Entity(&case.entity));
    let answer = grpc::call(&mut open, client, MODEL_INFER, &asked, Some(DEADLINE)).await.expect("an answer");
    let took = begun.elapsed();
    assert!(took <= DEADLINE + SLACK, "answered {:?} after {took:?}", answer.code);
    (answer, took)
}

/// Sidecars remember nothing themselves, so that the stores are asked each time.
fn forget_at_once(region: &mut Region) {
    region.features = region.features.replace("memory: 64MiB", "memory: { size: 1KiB, keep: 1ms, keepAbsent: 1ms }");
}
