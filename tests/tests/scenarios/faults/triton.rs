//! The model server: without it there is a clear refusal in time, and never a wrong score.

use std::time::Duration;

use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::doubles::{Manner, TritonDouble};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, MODEL, assert_scores, cases, entity, scores};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::relay::{Link, Relay};
use spillway_tests::harness::servers::Server;
use tonic::Code;

use super::{BACK, ask, ask_grpc};

/// A region whose real Triton is behind a relay.
struct WithTriton {
    client: Client,
    relay: Relay,
    triton: Server,
    region: Region,
}

impl WithTriton {
    async fn start(name: &str) -> Self {
        let mut region = Region::new(name);
        let triton = Server::triton(&region.folder, &[MODEL]);
        let relay = Relay::to(triton.address).await;
        region.use_triton(relay.address);
        region.start().await;
        let this = Self { client: region.client("acme"), relay, triton, region };
        this.is_right_after("nothing").await;
        this
    }

    /// By both protocols, in time, and counted.
    async fn is_refused(&self, status: u16, code: Code, error: &str) {
        let errors =
            || self.region.sidecars_sum("spillway_sidecar_model_errors_total", &[&format!("reason=\"{error}\"")]);
        let before = errors();
        let case = &cases()[0];
        let answer = ask(&self.client, case).await;
        assert_eq!((answer.status.as_u16(), answer.error_code()), (status, error), "{:?}", answer.json());
        let (answer, took) = ask_grpc(&self.client, case).await;
        assert_eq!((answer.code, answer.error_code()), (code, error), "{took:?}");
        eventually("each is counted", Duration::from_secs(5), async || (errors() > before).then_some(())).await;
    }

    async fn is_right_after(&self, what: &str) {
        let case = &cases()[0];
        eventually(&format!("the right answer after {what}"), BACK, async || {
            let answer = ask(&self.client, case).await;
            (answer.status == 200).then(|| assert_scores(what, &scores(&answer), std::slice::from_ref(case)))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_that_refuses_is_a_503() {
    let it = WithTriton::start("faults-triton-refuses").await;
    it.triton.kill();
    it.is_refused(503, Code::Unavailable, "model-unavailable").await;
    it.triton.restart();
    it.is_right_after("refusing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_that_hangs_is_a_504_in_time() {
    let it = WithTriton::start("faults-triton-hangs").await;
    it.triton.hang();
    it.is_refused(504, Code::DeadlineExceeded, "deadline-exceeded").await;
    it.triton.resume();
    it.is_right_after("hanging").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_that_is_slow_is_a_504_in_time() {
    let it = WithTriton::start("faults-triton-slow").await;
    it.relay.set(Link::Slow(Duration::from_secs(2)));
    it.is_refused(504, Code::DeadlineExceeded, "deadline-exceeded").await;
    it.relay.set(Link::Good);
    it.is_right_after("slow").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t40_a_wrong_answer_of_triton_is_a_502_and_never_reaches_the_client() {
    let triton = TritonDouble::start();
    let mut region = Region::new("faults-wrong");
    region.use_triton(triton.address);
    region.start().await;
    let client = region.client("acme");
    let case = &cases()[0];
    let wrong = [Manner::WrongId, Manner::WrongShape, Manner::WrongDatatype, Manner::WrongLength, Manner::WrongName];
    for manner in wrong {
        let errors = || region.sidecars_sum("spillway_sidecar_model_errors_total", &["reason=\"bad-model-answer\""]);
        let before = errors();
        triton.set(manner);
        let answer = ask(&client, case).await;
        assert_eq!(
            (answer.status.as_u16(), answer.error_code()),
            (502, "bad-model-answer"),
            "{manner:?}: {:?}",
            answer.json()
        );
        let (answer, _) = ask_grpc(&client, case).await;
        assert_eq!((answer.code, answer.error_code()), (Code::Internal, "bad-model-answer"), "{manner:?}");
        assert!(errors() - before >= 2.0, "{manner:?} is counted");
        triton.set(Manner::Right);
        let answer = ask(&client, case).await;
        assert_scores("nothing wrong stayed", &scores(&answer), std::slice::from_ref(case));
    }
    // t54: one request is one call, or at most one more on another pod.
    triton.set(Manner::Fails);
    let before = triton.seen().len();
    for _ in 0..20 {
        let answer = ask(&client, case).await;
        assert!(answer.status.is_server_error(), "{}", answer.status);
    }
    let calls = triton.seen().len() - before;
    assert!(calls <= 22, "{calls} calls for 20 requests");
    // t53: work whose time is over before it arrives never reaches the model.
    triton.set(Manner::Right);
    let before = triton.seen().len();
    let mut request = client.json(INFER, &entity(&case.entity));
    request.headers_mut().insert("grpc-timeout", "1n".parse().expect("a header"));
    let answer = client.send(Protocol::H2, request).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
    assert_eq!(triton.seen().len(), before);
    // Late is late, however right: and the time is kept though nobody downstream keeps it.
    triton.set(Manner::Late(Duration::from_secs(5)));
    let answer = ask(&client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
}
