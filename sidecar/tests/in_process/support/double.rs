//! A model server that answers as it is told: right, wrongly, late or never.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use spillway_proto::inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use spillway_proto::inference::{
    InferParameter, InferStatistics, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStatistics, ModelStatisticsRequest,
    ModelStatisticsResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse, StatisticDuration,
    infer_parameter::ParameterChoice, model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Right,
    WrongId,
    WrongDatatype,
    WrongShape,
    WrongLength,
    WrongRows,
    NoOutput,
    Never,
    Full,
    Invalid,
    Broken,
    /// As if nobody were there.
    Gone,
    /// A stream's request gets so many answers.
    Many(usize),
    /// A stream's request gets so many answers and then, alone, the word that there are no more.
    ThenEmpty(usize),
}

#[derive(Debug)]
pub struct State {
    pub answer: Mutex<Answer>,
    pub columns: Mutex<i64>,
    pub calls: AtomicUsize,
    pub cancelled: AtomicUsize,
    /// Warm-up requests that came.
    pub warm_ups: AtomicUsize,
    /// Models whose warm-ups are not answered.
    pub cold: tokio::sync::watch::Sender<BTreeSet<String>>,
    /// Models that are said to be not ready.
    pub away: Mutex<BTreeSet<String>>,
    /// Requests, nanoseconds waited and nanoseconds computed, as statistics tell; none are told if there are none.
    pub statistics: Mutex<Option<[u64; 3]>>,
    /// Metadata and message of the last call.
    pub last: Mutex<Option<(tonic::metadata::MetadataMap, ModelInferRequest)>>,
}

#[derive(Clone)]
pub struct Double {
    pub state: Arc<State>,
    pub endpoint: String,
}

impl Double {
    pub async fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap()).await
    }

    pub async fn on(listener: TcpListener) -> Self {
        let state = Arc::new(State {
            answer: Mutex::new(Answer::Right),
            columns: Mutex::new(9),
            calls: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            warm_ups: AtomicUsize::new(0),
            cold: tokio::sync::watch::Sender::default(),
            away: Mutex::default(),
            statistics: Mutex::default(),
            last: Mutex::new(None),
        });
        let double = Self { state, endpoint: format!("http://{}", listener.local_addr().unwrap()) };
        let service = GrpcInferenceServiceServer::new(double.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        double
    }

    pub fn answers(&self, answer: Answer) {
        *self.state.answer.lock() = answer;
    }

    pub fn calls(&self) -> usize {
        self.state.calls.load(Ordering::SeqCst)
    }

    pub fn warm_ups(&self) -> usize {
        self.state.warm_ups.load(Ordering::SeqCst)
    }

    /// Whether this model's warm-ups are answered from now, also those that wait.
    pub fn warms_up(&self, model: &str, answers: bool) {
        self.state.cold.send_modify(|cold| {
            if answers {
                cold.remove(model)
            } else {
                cold.insert(model.to_owned())
            };
        });
    }

    pub async fn wait_for_warm_up(&self) {
        for _ in 0..500 {
            if self.warm_ups() > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no warm-up came");
    }

    pub async fn wait_for_cancelled(&self, count: usize) {
        for _ in 0..200 {
            if self.state.cancelled.load(Ordering::SeqCst) == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} calls were cancelled, not {count}", self.state.cancelled.load(Ordering::SeqCst));
    }

    async fn answer(&self, request: &ModelInferRequest) -> Result<ModelInferResponse, Status> {
        let answer = *self.state.answer.lock();
        let mut rows = request.inputs[0].shape[0];
        let mut output = InferOutputTensor { name: "score".into(), datatype: "FP32".into(), ..Default::default() };
        let mut id = request.id.clone();
        let mut bytes = 0;
        match answer {
            Answer::Right | Answer::Many(_) | Answer::ThenEmpty(_) | Answer::NoOutput => {}
            Answer::WrongId => id = "another".into(),
            Answer::WrongDatatype => output.datatype = "INT32".into(),
            Answer::WrongShape => output.shape = vec![rows, 1, 1],
            Answer::WrongLength => bytes = 4,
            Answer::WrongRows => rows += 1,
            Answer::Never => {
                let _cancelled = Cancelled(Arc::clone(&self.state));
                std::future::pending::<()>().await;
            }
            Answer::Full => return Err(Status::unavailable("Exceeds maximum queue size")),
            Answer::Invalid => return Err(Status::invalid_argument("no such thing")),
            Answer::Gone => return Err(Status::unavailable("gone")),
            Answer::Broken => return Err(Status::internal("cannot open /srv/models/phishing/model.py\nat line 1")),
        }
        if output.shape.is_empty() {
            output.shape = vec![rows, 1];
        }
        let data = vec![0_u8; usize::try_from(rows).unwrap() * 4 + bytes];
        let (outputs, raw) =
            if answer == Answer::NoOutput { (vec![], vec![]) } else { (vec![output], vec![data.into()]) };
        Ok(ModelInferResponse {
            model_name: request.model_name.clone(),
            model_version: request.model_version.clone(),
            id,
            outputs,
            raw_output_contents: raw,
            ..ModelInferResponse::default()
        })
    }
}

/// Dropped before its end: the call was cancelled.
struct Cancelled(Arc<State>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.0.cancelled.fetch_add(1, Ordering::SeqCst);
    }
}

fn last(answer: &mut ModelInferResponse, last: bool) {
    let parameter = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
    answer.parameters.insert("triton_final_response".into(), parameter);
}

#[tonic::async_trait]
impl GrpcInferenceService for Double {
    type ModelStreamInferStream = ReceiverStream<Result<ModelStreamInferResponse, Status>>;

    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: true }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        Ok(Response::new(ModelReadyResponse { ready: !self.state.away.lock().contains(&request.get_ref().name) }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse::default()))
    }

    async fn model_metadata(
        &self,
        _: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let tensor = |name: &str, columns| TensorMetadata {
            name: name.into(),
            datatype: "FP32".into(),
            shape: vec![-1, columns],
        };
        Ok(Response::new(ModelMetadataResponse {
            inputs: vec![tensor("features", *self.state.columns.lock())],
            outputs: vec![tensor("score", 1)],
            ..ModelMetadataResponse::default()
        }))
    }

    async fn model_statistics(
        &self,
        _: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let [count, queued, computed] = self.state.statistics.lock().ok_or_else(|| Status::unimplemented("none"))?;
        let duration = |ns| Some(StatisticDuration { count, ns });
        let stats = InferStatistics {
            queue: duration(queued),
            compute_input: duration(0),
            compute_infer: duration(computed),
            compute_output: duration(0),
        };
        let model = ModelStatistics { inference_stats: Some(stats), ..ModelStatistics::default() };
        Ok(Response::new(ModelStatisticsResponse { model_stats: vec![model] }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        if message.id == "warm-up" {
            self.state.warm_ups.fetch_add(1, Ordering::SeqCst);
            let cancelled = Cancelled(Arc::clone(&self.state));
            let _ = self.state.cold.subscribe().wait_for(|cold| !cold.contains(&message.model_name)).await;
            std::mem::forget(cancelled);
        } else {
            self.state.calls.fetch_add(1, Ordering::SeqCst);
            *self.state.last.lock() = Some((metadata, message.clone()));
        }
        self.answer(&message).await.map(Response::new)
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (answers, stream) = tokio::sync::mpsc::channel(8);
        let (metadata, _, mut requests) = request.into_parts();
        let double = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = requests.message().await {
                double.state.calls.fetch_add(1, Ordering::SeqCst);
                *double.state.last.lock() = Some((metadata.clone(), message.clone()));
                let (times, then_empty) = match *double.state.answer.lock() {
                    Answer::Many(times) => (times, false),
                    Answer::ThenEmpty(times) => (times + 1, true),
                    _ => (1, false),
                };
                for time in 1..=times {
                    let answer = tokio::select! {
                        answer = double.answer(&message) => answer,
                        () = answers.closed() => return,
                    };
                    let answer = match answer {
                        Ok(mut answer) => {
                            if then_empty && time == times {
                                answer.outputs.clear();
                                answer.raw_output_contents.clear();
                            }
                            last(&mut answer, time == times);
                            ModelStreamInferResponse { error_message: String::new(), infer_response: Some(answer) }
                        }
                        Err(status) => ModelStreamInferResponse {
                            error_message: status.message().into(),
                            infer_response: Some(ModelInferResponse { id: message.id.clone(), ..Default::default() }),
                        },
                    };
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
