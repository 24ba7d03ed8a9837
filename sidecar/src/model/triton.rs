//! A Triton server beside the sidecar: OIP gRPC over TCP or a unix socket.
//!
//! The rule: what is left of the deadline goes with every call, and is kept here whatever Triton does.
//! The connection is made when it is needed and again when it breaks; dropping a call resets its
//! stream, which Triton takes as cancellation. Inferences that are not streamed have a connection of their
//! own ([`unary`]): all else goes through tonic's client. No HTTP/2 keep-alive: Triton's gRPC answers pings more
//! often than every 5 minutes with GOAWAY, and the deadline notices a hanging server sooner.

mod unary;

use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream;
use spillway_core::inference::{InferRequest, InferResponse, Limits};
use spillway_core::units::Name;
use spillway_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{
    InferParameter, InferStatistics, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelReadyRequest,
    ModelStatisticsRequest, ModelStreamInferResponse, StatisticDuration, model_metadata_response::TensorMetadata,
};
use spillway_runtime::oip;
use spillway_runtime::upstream::{Beside, UpstreamMetrics};
use tokio::sync::mpsc;
use tokio::time::timeout_at;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use self::unary::Unary;
use super::facts::{Facts, TensorFact};
use super::{Backend, Call, ModelError, StreamAnswer, StreamRequest, for_caller};

/// More than any tensor set that the edge lets in, so that an answer never fails for its size alone.
const LARGEST_MESSAGE: usize = 64 << 20;
/// What a model may answer; wider than what a caller may ask, as one request may have large answers.
const ANSWER_LIMITS: Limits = Limits {
    body: LARGEST_MESSAGE,
    tensors: 256,
    tensor: LARGEST_MESSAGE,
    dimensions: 8,
    parameters: 64,
    text: 4_096,
    json_depth: 64,
};
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Triton's request parameter: microseconds that the request may wait in its queue.
const TIMEOUT: &str = "timeout";
/// Triton's parameters for the end of a streamed answer.
pub const WANTS_EMPTY_FINAL: &str = "triton_enable_empty_final_response";
pub const FINAL: &str = "triton_final_response";

/// The Triton server of this pod.
#[derive(Clone, Debug)]
pub struct Server {
    client: GrpcInferenceServiceClient<Channel>,
    unary: Unary,
}

#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no endpoint; expected http://HOST:PORT or unix:///PATH")]
pub struct InvalidEndpoint(String);

impl Server {
    /// Whether a text has the form of an endpoint.
    pub fn check(endpoint: &str) -> Result<(), InvalidEndpoint> {
        parse(endpoint).map(|_| ())
    }

    /// Does not connect yet. To be called within a tokio runtime.
    pub fn at(endpoint: &str, metrics: &UpstreamMetrics) -> Result<Self, InvalidEndpoint> {
        let (endpoint, server) = parse(endpoint)?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .connect_lazy();
        let client = GrpcInferenceServiceClient::new(channel)
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE);
        Ok(Self { client, unary: Unary::at(server, metrics.clone()) })
    }

    pub fn model(&self, name: &Name) -> Triton {
        Triton { client: self.client.clone(), unary: self.unary.clone(), name: name.clone() }
    }

    /// What all of its models together have done since it began.
    pub async fn totals(&self, deadline: Instant) -> Result<Totals, ModelError> {
        let mut client = self.client.clone();
        let answer =
            in_time(deadline, client.model_statistics(Request::new(ModelStatisticsRequest::default()))).await?;
        let mut totals = Totals::default();
        let nanos = |duration: Option<StatisticDuration>| duration.unwrap_or_default().ns;
        for InferStatistics { queue, compute_input, compute_infer, compute_output } in
            answer.model_stats.into_iter().filter_map(|model| model.inference_stats)
        {
            let computed = [compute_input, compute_infer, compute_output].map(nanos);
            let queue = queue.unwrap_or_default();
            totals.requests = totals.requests.saturating_add(queue.count);
            totals.queued_ns = totals.queued_ns.saturating_add(queue.ns);
            totals.computed_ns = computed.into_iter().fold(totals.computed_ns, u64::saturating_add);
        }
        Ok(totals)
    }
}

/// What a Triton server counts over requests that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub requests: u64,
    pub queued_ns: u64,
    pub computed_ns: u64,
}

/// One model of the Triton server.
#[derive(Clone, Debug)]
pub struct Triton {
    client: GrpcInferenceServiceClient<Channel>,
    unary: Unary,
    name: Name,
}

#[async_trait]
impl Backend for Triton {
    async fn facts(&self, version: &Name, deadline: Instant) -> Result<Facts, ModelError> {
        let asked = ModelMetadataRequest { name: self.name.to_string(), version: version.to_string() };
        let mut client = self.client.clone();
        let answer = in_time(deadline, client.model_metadata(Request::new(asked))).await?;
        let facts = |tensors: Vec<TensorMetadata>| tensors.into_iter().map(fact).collect();
        Ok(Facts { inputs: facts(answer.inputs), outputs: facts(answer.outputs), inputs_are_required: false })
    }

    async fn ready(&self, version: &Name, deadline: Instant) -> Result<(), ModelError> {
        let asked = ModelReadyRequest { name: self.name.to_string(), version: version.to_string() };
        let mut client = self.client.clone();
        let answer = in_time(deadline, client.model_ready(Request::new(asked))).await?;
        if answer.ready {
            Ok(())
        } else {
            Err(ModelError::Unavailable("Triton says that the model is not ready".into()))
        }
    }

    async fn infer(&self, request: &InferRequest, call: &Call) -> Result<InferResponse, ModelError> {
        self.unary.infer(request, call).await
    }

    async fn stream(
        &self,
        requests: mpsc::Receiver<StreamRequest>,
        answers: mpsc::Sender<StreamAnswer>,
        call: &Call,
    ) -> Result<(), ModelError> {
        let mut requests = requests;
        let outbound = stream::poll_fn(move |context| {
            loop {
                let Some(request) = ready!(requests.poll_recv(context)) else { return Poll::Ready(None) };
                // One that waited for the connection until it was too late is not sent; who asked tells its end.
                if let Ok(left) = left(request.deadline) {
                    return Poll::Ready(Some(stream_message(request, left)));
                }
            }
        });
        let request = with_metadata(Request::new(outbound), call, left(call.deadline)?);
        let mut client = self.client.clone();
        let mut inbound = in_time(call.deadline, client.model_stream_infer(request)).await?;
        loop {
            let message = timeout_at(call.deadline.into(), inbound.message()).await;
            let message =
                message.map_err(|_| ModelError::DeadlineExceeded)?.map_err(|status| fault(&status, call.deadline))?;
            let Some(message) = message else { return Ok(()) };
            if answers.send(stream_answer(message)?).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn parse(endpoint: &str) -> Result<(Endpoint, Beside), InvalidEndpoint> {
    let invalid = || InvalidEndpoint(endpoint.to_owned());
    let parsed = Endpoint::from_shared(endpoint.to_owned()).map_err(|_| invalid())?;
    let server = match endpoint.strip_prefix("unix://") {
        Some(path) if path.len() > 1 && path.starts_with('/') => Beside::Unix(path.into()),
        Some(_) => return Err(invalid()),
        None if endpoint.starts_with("http://") => {
            let uri = parsed.uri();
            let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(invalid)?;
            let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
            Beside::Tcp(address.parse().map_err(|_| invalid())?)
        }
        None => return Err(invalid()),
    };
    Ok((parsed, server))
}

async fn in_time<T>(
    deadline: Instant,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ModelError> {
    match timeout_at(deadline.into(), answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(fault(&status, deadline)),
        Err(_) => Err(ModelError::DeadlineExceeded),
    }
}

fn left(deadline: Instant) -> Result<Duration, ModelError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ModelError::DeadlineExceeded) } else { Ok(left) }
}

fn message(request: &InferRequest, left: Duration) -> ModelInferRequest {
    let mut message = oip::encode_request(request);
    let timeout = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(micros(left))) };
    message.parameters.insert(TIMEOUT.into(), timeout);
    message
}

/// For [`TIMEOUT`], where 0 would be no limit at all.
fn micros(left: Duration) -> i64 {
    i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1)
}

fn stream_message(StreamRequest { key, mut request, .. }: StreamRequest, left: Duration) -> ModelInferRequest {
    request.id = key.to_string();
    let mut message = message(&request, left);
    // So that Triton says when a request has its last answer, also where a model answers many times or not at all.
    let flag = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
    message.parameters.insert(WANTS_EMPTY_FINAL.into(), flag);
    message
}

fn with_metadata<T>(mut request: Request<T>, call: &Call, left: Duration) -> Request<T> {
    request.set_timeout(left);
    call.trace.write(request.metadata_mut().as_mut());
    request
}

fn decode(answer: ModelInferResponse) -> Result<InferResponse, ModelError> {
    oip::decode_response(answer, &ANSWER_LIMITS).map_err(|fault| ModelError::BadAnswer(fault.to_string()))
}

fn stream_answer(message: ModelStreamInferResponse) -> Result<StreamAnswer, ModelError> {
    let ModelStreamInferResponse { error_message, infer_response } = message;
    let answer = infer_response.unwrap_or_default();
    let failed = (!error_message.is_empty()).then(|| ModelError::Failed(for_caller(&error_message)));
    // Without a key nobody knows whose answer it is, so that no later one can be trusted either.
    let Ok(key) = answer.id.parse() else {
        return Err(
            failed.unwrap_or_else(|| ModelError::BadAnswer("an answer belongs to no request of the stream".into()))
        );
    };
    let last = matches!(
        answer.parameters.get(FINAL),
        Some(InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) })
    );
    Ok(match failed {
        Some(failed) => StreamAnswer { key, answer: Err(failed), last: true },
        None => StreamAnswer { key, answer: decode(answer), last },
    })
}

fn fact(tensor: TensorMetadata) -> TensorFact {
    TensorFact { name: tensor.name, datatype: tensor.datatype, shape: tensor.shape }
}

/// What a status means. One that was made on this side, as the connection broke, has a source; Triton's own have none.
fn fault(status: &Status, deadline: Instant) -> ModelError {
    let text = || status.message().to_owned();
    let made_here = std::error::Error::source(status).is_some();
    match status.code() {
        Code::DeadlineExceeded => ModelError::DeadlineExceeded,
        Code::Cancelled if at_deadline(deadline) => ModelError::DeadlineExceeded,
        _ if made_here => ModelError::Unavailable(text()),
        Code::ResourceExhausted => ModelError::Refused(text()),
        // Triton's only sign that a model's queue is full.
        Code::Unavailable if status.message().contains("maximum queue size") => ModelError::Refused(text()),
        Code::Unavailable | Code::NotFound | Code::Cancelled => ModelError::Unavailable(text()),
        Code::InvalidArgument => ModelError::Rejected(for_caller(status.message())),
        Code::OutOfRange | Code::DataLoss => ModelError::BadAnswer(text()),
        Code::Ok
        | Code::Unknown
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unauthenticated => ModelError::Failed(for_caller(status.message())),
    }
}

/// Triton's own timer, tonic's and ours aim at the same moment; whichever fires first, it is the deadline.
fn at_deadline(deadline: Instant) -> bool {
    const SLACK: Duration = Duration::from_millis(5);
    Instant::now() + SLACK >= deadline
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_port_or_an_absolute_path() {
        let server = |text: &str| parse(text).map(|(_, server)| server).ok();
        let tcp = |text: &str| Some(Beside::Tcp(text.parse().unwrap()));
        assert_eq!(server("http://127.0.0.1:8001"), tcp("127.0.0.1:8001"));
        assert_eq!(server("http://[::1]:8001"), tcp("[::1]:8001"));
        assert_eq!(server("http://triton"), tcp("triton:80"));
        assert_eq!(server("unix:///run/triton.sock"), Some(Beside::Unix("/run/triton.sock".into())));
        for bad in
            ["", "http://", "http:///x", "unix://", "unix:///", "unix://run/x", "https://triton:8001", "triton:8001"]
        {
            assert!(Server::check(bad).is_err(), "{bad}");
        }
    }
}
