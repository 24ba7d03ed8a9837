//! One client's inference stream: many requests and answers, each treated like a unary call.
//!
//! ```text
//! requests -> prepare (a few at once) -> in order -> one stream per model -> answers, as they come
//!                 \--- failure, deadline ----------------- in-band error --/
//! ```
//!
//! The rule: each request has its own deadline, record and answer; an error of one is told in its
//! answer and the stream goes on. Every request's last message says that it is the last, also where
//! its model has nothing more to say. At most [`MOST_OPEN`] requests are without their last answer: the
//! next is not read before. The session ends with its client, and with it what the models still do.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use spillway_core::inference::InferRequest;
use spillway_core::units::Name;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use spillway_runtime::telemetry::{Span, Status as SpanStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use tonic::Status;

use crate::failure::{ERROR, Failure};
use crate::inference::{Context, Inference, Prepared};
use crate::metrics::Counted;
use crate::model::triton::{FINAL, WANTS_EMPTY_FINAL};
use crate::model::{Call, ModelError, StreamAnswer, StreamRequest};
use crate::record::{OK, Record};
use crate::turns::Turns;

/// Requests of one stream that may be without their last answer.
const MOST_OPEN: usize = 64;

pub type Answers = mpsc::Sender<Result<ModelStreamInferResponse, Status>>;

/// Whether the peer may still call; asked for every request.
pub type Allowed = Box<dyn Fn() -> Result<(), Failure> + Send + Sync>;

pub struct Session {
    inference: Arc<Inference>,
    context: Context,
    answers: Answers,
    allowed: Allowed,
    /// Of the whole stream, if the client set one.
    deadline: Option<Instant>,
    /// Of the whole stream; those of its requests and of the models' streams are its children.
    span: Span,
    turns: Turns<(Prepared, Record)>,
    open: HashMap<u64, Open>,
    next_key: u64,
    models: HashMap<Name, ToModel>,
    from_models: (mpsc::Sender<StreamAnswer>, mpsc::Receiver<StreamAnswer>),
    running: JoinSet<(u64, Result<(), ModelError>)>,
}

/// The stream to one model; a new one with a new number takes the place of one that ended.
#[derive(Clone)]
struct ToModel {
    number: u64,
    requests: mpsc::Sender<StreamRequest>,
}

/// A request without its last answer.
struct Open {
    prepared: Prepared,
    record: Record,
    sent: Instant,
    /// Of the stream that it went into.
    stream: u64,
}

/// What became of a request before its model.
struct Arrival {
    number: u64,
    id: String,
    record: Record,
    prepared: Result<Prepared, Failure>,
}

/// The client is gone, or the stream as a whole has failed and said so.
struct Over;

impl Session {
    pub fn new(inference: Arc<Inference>, context: Context, answers: Answers, allowed: Allowed) -> Self {
        let span = inference.recorder.traces.span("stream", &context.trace);
        Self {
            deadline: context.grpc_timeout.map(|timeout| context.arrived + timeout),
            context: Context { trace: span.as_parent(), ..context },
            span,
            inference,
            answers,
            allowed,
            turns: Turns::default(),
            open: HashMap::new(),
            next_key: 0,
            models: HashMap::new(),
            from_models: mpsc::channel(MOST_OPEN),
            running: JoinSet::new(),
        }
    }

    /// Runs to the end of the stream. Dropping it cancels what the models still do.
    pub async fn run(
        mut self,
        mut requests: impl futures_util::Stream<Item = Result<ModelInferRequest, Status>> + Unpin,
    ) {
        let _counted = Counted::new(&self.inference.metrics.streams);
        let inference = Arc::clone(&self.inference);
        let mut preparing = FuturesUnordered::new();
        let mut more = true;
        while more || !self.turns.is_empty() || !self.open.is_empty() {
            let room = self.open.len() + self.turns.len() < MOST_OPEN;
            let next_deadline = self.open.values().map(|open| open.prepared.deadline).chain(self.turns.next_deadline());
            let next_deadline = next_deadline.min();
            let answers = self.answers.clone();
            let step = tokio::select! {
                () = answers.closed() => Err(Over),
                () = until(self.deadline) => self.fail_stream(&Failure::Model(ModelError::DeadlineExceeded)).await,
                request = requests.next(), if more && room => match request {
                    Some(Ok(message)) => match (self.allowed)() {
                        Ok(()) => {
                            let number = self.number();
                            self.turns.came(number);
                            preparing.push(prepare(Arc::clone(&inference), self.context.clone(), number, message));
                            Ok(())
                        }
                        Err(failure) => self.fail_stream(&failure).await,
                    },
                    // The client broke off, or what it sent is no message.
                    Some(Err(status)) => {
                        let _ = self.answers.send(Err(status)).await;
                        Err(Over)
                    }
                    None => { more = false; Ok(()) }
                },
                Some(arrival) = preparing.next() => self.arrived(arrival).await,
                Some(answer) = self.from_models.1.recv() => self.answered(answer).await,
                Some(ended) = self.running.join_next() => match ended {
                    Ok((number, result)) => self.model_ended(number, result).await,
                    Err(_) => self.fail_stream(&Failure::NotReady).await,
                },
                () = until(next_deadline) => self.expire().await,
            };
            if step.is_err() {
                return;
            }
        }
    }

    /// Takes a request that is ready, or tells at once that it never will be; then sends on whose turn it is.
    async fn arrived(&mut self, Arrival { number, id, record, prepared }: Arrival) -> Result<(), Over> {
        match prepared {
            Ok(prepared) => {
                let deadline = prepared.deadline;
                self.turns.ready(number, (prepared, record), deadline);
            }
            Err(failure) => {
                self.turns.gone(number);
                self.refuse(id, record, &failure).await?;
            }
        }
        // It may have waited for those before it, and its client for room in the answers.
        self.expire().await?;
        while let Some((prepared, record)) = self.turns.take() {
            self.send_on(prepared, record).await?;
        }
        Ok(())
    }

    /// Hands a prepared request to its model's stream, which is opened when it is first needed.
    async fn send_on(&mut self, prepared: Prepared, record: Record) -> Result<(), Over> {
        let key = self.number();
        let mut request = prepared.request.clone();
        // We ask for it on our own account.
        request.parameters.remove(WANTS_EMPTY_FINAL);
        let model = self.model(&prepared);
        let sent = model.requests.try_send(StreamRequest { key, request, deadline: prepared.deadline });
        self.open.insert(key, Open { prepared, record, sent: Instant::now(), stream: model.number });
        if sent.is_err() {
            // Its stream ended at this moment; its end is not read yet.
            return self.fail(key, ModelError::Unavailable("the stream to the model has ended".into())).await;
        }
        Ok(())
    }

    fn number(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    fn model(&mut self, prepared: &Prepared) -> ToModel {
        let name = prepared.served.name.clone();
        if let Some(open) = self.models.get(&name).filter(|open| !open.requests.is_closed()) {
            return open.clone();
        }
        let (sender, requests) = mpsc::channel(MOST_OPEN);
        let number = self.number();
        let to_model = ToModel { number, requests: sender };
        let answers = self.from_models.0.clone();
        let backend = Arc::clone(&prepared.served.running.backend);
        // A stream without a deadline of its own lives as long as its client; each request in it has one.
        let far = Instant::now() + std::time::Duration::from_secs(86_400);
        let call = Call { deadline: self.deadline.unwrap_or(far), trace: self.context.trace.clone() };
        self.models.insert(name, to_model.clone());
        self.running.spawn(async move { (number, backend.stream(requests, answers, &call).await) });
        to_model
    }

    async fn answered(&mut self, StreamAnswer { key, answer, last }: StreamAnswer) -> Result<(), Over> {
        // Late: its deadline has passed, and its client was told so.
        let Some(mut open) = self.open.remove(&key) else { return Ok(()) };
        open.record.model_took(open.sent.elapsed());
        let answer = match answer {
            // The end of an answer that has no more parts, or never had any: the gateway waits for it.
            Ok(empty) if last && empty.outputs.is_empty() => {
                open.record.end(OK);
                return self.send(end_of(&open.prepared.request)).await;
            }
            Ok(mut answer) => {
                answer.id.clone_from(&open.prepared.request.id);
                Ok(answer)
            }
            Err(error) => Err(error),
        };
        match open.prepared.finish(answer, &self.inference, &mut open.record) {
            Ok(mut message) => {
                message.parameters.insert(FINAL.to_owned(), bool_parameter(last));
                open.record.end(OK);
                if !last {
                    self.open.insert(key, open);
                }
                self.send(message).await
            }
            Err(failure) => {
                let id = open.prepared.request.id.clone();
                self.refuse(id, open.record, &failure).await
            }
        }
    }

    /// A model's stream is over: what it has not answered will not be.
    async fn model_ended(&mut self, number: u64, result: Result<(), ModelError>) -> Result<(), Over> {
        self.models.retain(|_, model| model.number != number);
        // Answers that it gave before its end still wait to be read.
        while let Ok(answer) = self.from_models.1.try_recv() {
            self.answered(answer).await?;
        }
        let error = result.err().unwrap_or_else(|| ModelError::Unavailable("the stream to the model has ended".into()));
        let lost: Vec<u64> = self.open.iter().filter(|(_, open)| open.stream == number).map(|(key, _)| *key).collect();
        for key in lost {
            self.fail(key, error.clone()).await?;
        }
        Ok(())
    }

    async fn expire(&mut self) -> Result<(), Over> {
        let now = Instant::now();
        let expired: Vec<u64> =
            self.open.iter().filter(|(_, open)| open.prepared.deadline <= now).map(|(key, _)| *key).collect();
        for key in expired {
            self.fail(key, ModelError::DeadlineExceeded).await?;
        }
        for (prepared, record) in self.turns.expired(now) {
            self.refuse(prepared.request.id.clone(), record, &Failure::DeadlineExceeded).await?;
        }
        Ok(())
    }

    async fn fail(&mut self, key: u64, error: ModelError) -> Result<(), Over> {
        self.answered(StreamAnswer { key, answer: Err(error), last: true }).await
    }

    /// Tells one request's failure in its answer.
    async fn refuse(&mut self, id: String, mut record: Record, failure: &Failure) -> Result<(), Over> {
        record.end(failure.code());
        let code = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(failure.code().to_owned())) };
        let head =
            ModelInferResponse { id, parameters: [(ERROR.to_owned(), code)].into(), ..ModelInferResponse::default() };
        let message = ModelStreamInferResponse {
            error_message: failure.status().message().to_owned(),
            infer_response: Some(head),
        };
        self.answers.send(Ok(message)).await.map_err(|_| Over)
    }

    async fn send(&self, answer: ModelInferResponse) -> Result<(), Over> {
        let message = ModelStreamInferResponse { error_message: String::new(), infer_response: Some(answer) };
        self.answers.send(Ok(message)).await.map_err(|_| Over)
    }

    /// Ends the stream as a whole.
    async fn fail_stream(&mut self, failure: &Failure) -> Result<(), Over> {
        for (_, mut open) in self.open.drain() {
            open.record.end(failure.code());
        }
        self.span.status(SpanStatus::Error(failure.code()));
        let _ = self.answers.send(Err(failure.status())).await;
        Err(Over)
    }
}

async fn prepare(inference: Arc<Inference>, context: Context, number: u64, message: ModelInferRequest) -> Arrival {
    // The stream's own age is not the request's.
    let context = Context { arrived: Instant::now(), grpc_timeout: None, degrade: None, ..context };
    let id = message.id.clone();
    let mut record = inference.recorder.begin(&context);
    let prepared = inference.prepare(message, &context, &mut record).await;
    Arrival { number, id, record, prepared }
}

/// What a model that sends no more outputs leaves to say: that it does not, as Triton puts it.
fn end_of(request: &InferRequest) -> ModelInferResponse {
    ModelInferResponse {
        id: request.id.clone(),
        model_name: request.model.clone(),
        model_version: request.version.clone(),
        parameters: [(FINAL.to_owned(), bool_parameter(true))].into(),
        ..ModelInferResponse::default()
    }
}

fn bool_parameter(value: bool) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
