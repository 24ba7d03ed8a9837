//! What a server can say, against a real h2 server that says it.

use h2::Reason;
use h2::server::SendResponse;
use prost::Message;
use spillway_core::inference::{Datatype, Parameters, Tensor};
use spillway_proto::inference::ModelInferRequest;
use spillway_runtime::telemetry::TraceParent;
use tokio::net::UnixListener;

use super::*;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(4);

fn request() -> InferRequest {
    let data = Bytes::from(vec![7; 1 << 20]);
    let shape = vec![1, 1 << 18];
    let input = Tensor { name: "x".into(), datatype: Datatype::Fp32, shape, parameters: Parameters::default(), data };
    InferRequest {
        model: "fraud".into(),
        version: "3".into(),
        id: "a".into(),
        parameters: Parameters::default(),
        inputs: vec![input],
        outputs: Vec::new(),
    }
}

/// An answer with one output of so many bytes.
fn answer(bytes: usize) -> Vec<Bytes> {
    let data = Bytes::from(vec![9; bytes]);
    let shape = vec![1, bytes as i64];
    let output = Tensor { name: "y".into(), datatype: Datatype::Uint8, shape, parameters: Parameters::default(), data };
    oip::frame_response(&InferResponse {
        model: "fraud".into(),
        version: "3".into(),
        id: "a".into(),
        parameters: Parameters::default(),
        outputs: vec![output],
    })
}

type Say = SendResponse<Bytes>;

fn head(status: u16, headers: &[(&'static str, &'static str)]) -> Response<()> {
    let mut head = Response::builder().status(status);
    for (name, value) in headers {
        head = head.header(*name, *value);
    }
    head.body(()).unwrap()
}

fn status(code: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static(code))])
}

/// A whole body and its trailers.
fn say(mut to: Say, body: Vec<Bytes>, trailers: HeaderMap) {
    let mut stream = to.send_response(head(200, &[]), false).unwrap();
    for piece in body {
        stream.send_data(piece, false).unwrap();
    }
    stream.send_trailers(trailers).unwrap();
}

/// One call, `left` before its deadline, and the message that the server got.
async fn call(left: Duration, say: impl FnOnce(Say)) -> (Result<InferResponse, ModelError>, Bytes) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("triton.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, to) = connection.accept().await.unwrap().unwrap();
        let mut body = request.into_body();
        let mut got = BytesMut::new();
        let reading = async {
            while let Some(Ok(data)) = body.data().await {
                let _ = body.flow_control().release_capacity(data.len());
                got.extend_from_slice(&data);
            }
        };
        tokio::select! {
            () = reading => {}
            _ = connection.accept() => {}
        }
        say(to);
        // Until the client has gone.
        while connection.accept().await.is_some() {}
        got.freeze()
    };
    let asking = async {
        let unary = Unary::at(Beside::Unix(path.clone()), UpstreamMetrics::default());
        let call = Call { deadline: Instant::now() + left, trace: TraceParent::none() };
        unary.infer(&request(), &call).await
    };
    tokio::join!(asking, serving)
}

async fn fails(say: impl FnOnce(Say)) -> ModelError {
    call(LONG, say).await.0.unwrap_err()
}

#[tokio::test]
async fn a_request_arrives_whole_with_its_time_and_an_answer_in_many_frames_is_joined() {
    let (answered, got) = call(LONG, |to| say(to, answer(600_000), status("0"))).await;
    assert_eq!(answered.unwrap().outputs[0].data, vec![9; 600_000]);
    let got = ModelInferRequest::decode(oip::message(&got).unwrap()).unwrap();
    let mut sent = oip::encode_request(&request());
    let timeout = got.parameters[TIMEOUT].clone();
    sent.parameters.insert(TIMEOUT.into(), timeout.clone());
    assert_eq!(got, sent);
    use spillway_proto::inference::infer_parameter::ParameterChoice::Int64Param;
    assert!(matches!(timeout.parameter_choice, Some(Int64Param(micros)) if (1..=20_000_000).contains(&micros)));
}

#[tokio::test]
async fn a_refusal_keeps_its_meaning_wherever_it_stands() {
    let refused = ModelError::Refused("full".into());
    let trailers = HeaderMap::from_iter([
        (HeaderName::from_static("grpc-status"), HeaderValue::from_static("8")),
        (HeaderName::from_static("grpc-message"), HeaderValue::from_static("full")),
    ]);
    assert_eq!(fails(|to| say(to, Vec::new(), trailers)).await, refused);
    for code in [200, 503, 500] {
        let only = head(code, &[("grpc-status", "8"), ("grpc-message", "full")]);
        let found = fails(|mut to| drop(to.send_response(only, true).unwrap())).await;
        assert_eq!(found, refused, "{code}");
    }
    for (code, passes) in [(429, true), (502, true), (503, true), (504, true), (404, false), (500, false)] {
        let found = fails(|mut to| drop(to.send_response(head(code, &[]), true).unwrap())).await;
        assert_eq!(found.may_pass(), passes, "{code}: {found}");
    }
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_a_bad_one() {
    let whole = || answer(8).concat();
    let compressed = [&[1][..], &whole()[1..]].concat();
    let short = whole()[..whole().len() - 1].to_vec();
    let garbage = [&[0, 0, 0, 0, 2][..], &[0xff, 0xff]].concat();
    for (body, trailers) in [
        (whole(), HeaderMap::new()),
        (compressed, status("0")),
        (short, status("0")),
        (garbage, status("0")),
        (Vec::new(), status("0")),
        (vec![0; LARGEST_MESSAGE + FRAME_HEADER + 1], status("0")),
    ] {
        let length = body.len();
        let found = fails(|to| say(to, vec![body.into()], trailers)).await;
        assert!(matches!(found, ModelError::BadAnswer(_)), "{length} bytes: {found:?}");
    }
}

#[tokio::test]
async fn a_broken_connection_is_no_deadline_but_a_call_given_up_at_it_is() {
    let reset = |reason| move |mut to: Say| to.send_reset(reason);
    assert!(matches!(fails(reset(Reason::CANCEL)).await, ModelError::Unavailable(_)));
    assert!(matches!(fails(reset(Reason::INTERNAL_ERROR)).await, ModelError::Unavailable(_)));
    let nobody = Unary::at(Beside::Unix("/nowhere/triton.sock".into()), UpstreamMetrics::default());
    for _ in 0..2 {
        // The second one meets a slot that rests.
        let call = Call { deadline: Instant::now() + SHORT, trace: TraceParent::none() };
        assert!(matches!(nobody.infer(&request(), &call).await, Err(ModelError::Unavailable(_))));
    }
    let (late, _) = call(LONG, |to| say(to, Vec::new(), status("4"))).await;
    assert_eq!(late.unwrap_err(), ModelError::DeadlineExceeded);
}
