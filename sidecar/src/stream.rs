//! One client's inference stream: many requests and answers, each treated like a unary call.
//!
//! ```text
//! requests -> prepare (in order, a few at once) -> one stream per model -> answers, as they come
//!                 \--- failure ------------------------- in-band error --/
//! ```
//!
//! The rule: each request has its own deadline, record and answer; an error of one is told in its
//! answer and the stream goes on. At most [`MOST_OPEN`] requests are without their last answer: the
//! next is not read before. The session ends with its client, and with it what the models still do.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use spillway_core::inference::Parameter;
use spillway_core::units::Name;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use tonic::Status;

use crate::failure::{ERROR, Failure};
use crate::inference::{Context, Inference, Prepared};
use crate::metrics::Counted;
use crate::model::triton::WANTS_EMPTY_FINAL;
use crate::model::{Call, ModelError, StreamAnswer, StreamRequest};
use crate::record::{OK, Record};

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
    wants_empty_final: bool,
    /// Of the stream that it went into.
    stream: u64,
}

/// A request on its way to its model.
struct Arrival {
    id: String,
    record: Record,
    prepared: Result<Prepared, Failure>,
}

/// The client is gone, or the stream as a whole has failed and said so.
struct Over;

impl Session {
    pub fn new(inference: Arc<Inference>, context: Context, answers: Answers, allowed: Allowed) -> Self {
        Self {
            deadline: context.grpc_timeout.map(|timeout| context.arrived + timeout),
            inference,
            context,
            answers,
            allowed,
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
        let mut arrivals = FuturesOrdered::new();
        let mut more = true;
        while more || !arrivals.is_empty() || !self.open.is_empty() {
            let room = self.open.len() + arrivals.len() < MOST_OPEN;
            let next_deadline = self.open.values().map(|open| open.prepared.deadline).min();
            let answers = self.answers.clone();
            let step = tokio::select! {
                () = answers.closed() => Err(Over),
                () = until(self.deadline) => self.fail_stream(&Failure::Model(ModelError::DeadlineExceeded)).await,
                request = requests.next(), if more && room => match request {
                    Some(Ok(message)) => match (self.allowed)() {
                        Ok(()) => {
                            arrivals.push_back(prepare(Arc::clone(&inference), self.context.clone(), message));
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
                Some(arrival) = arrivals.next() => self.send_on(arrival).await,
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

    /// Hands a prepared request to its model's stream, which is opened when it is first needed.
    async fn send_on(&mut self, arrival: Arrival) -> Result<(), Over> {
        let Arrival { id, record, prepared } = arrival;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => return self.refuse(id, record, &failure).await,
        };
        let key = self.next_key;
        self.next_key += 1;
        let mut request = prepared.request.clone();
        let wants_empty_final = request.parameters.remove(WANTS_EMPTY_FINAL) == Some(Parameter::Bool(true));
        let model = self.model(&prepared);
        let sent = model.requests.try_send(StreamRequest { key, request, deadline: prepared.deadline });
        let open = Open { prepared, record, sent: Instant::now(), wants_empty_final, stream: model.number };
        self.open.insert(key, open);
        if sent.is_err() {
            // Its stream ended at this moment; its end is not read yet.
            return self.fail(key, ModelError::Unavailable("the stream to the model has ended".into())).await;
        }
        Ok(())
    }

    fn model(&mut self, prepared: &Prepared) -> ToModel {
        let name = prepared.served.name.clone();
        if let Some(open) = self.models.get(&name).filter(|open| !open.requests.is_closed()) {
            return open.clone();
        }
        let (sender, requests) = mpsc::channel(MOST_OPEN);
        let number = self.next_key;
        self.next_key += 1;
        let to_model = ToModel { number, requests: sender };
        let answers = self.from_models.0.clone();
        let backend = Arc::clone(&prepared.served.backend);
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
            // The end of an answer that has no more parts; passed on only to those who asked for it.
            Ok(empty) if last && empty.outputs.is_empty() => {
                open.record.end(OK);
                if !open.wants_empty_final {
                    return Ok(());
                }
                let id = open.prepared.request.id.clone();
                let head = spillway_runtime::oip::encode_response(&empty);
                return self
                    .send(ModelInferResponse { id, model_name: open.prepared.request.model.clone(), ..head })
                    .await;
            }
            Ok(mut answer) => {
                answer.id.clone_from(&open.prepared.request.id);
                Ok(answer)
            }
            Err(error) => Err(error),
        };
        match open.prepared.finish(answer, &self.inference.metrics, &mut open.record) {
            Ok(message) => {
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
        let _ = self.answers.send(Err(failure.status())).await;
        Err(Over)
    }
}

async fn prepare(inference: Arc<Inference>, context: Context, message: ModelInferRequest) -> Arrival {
    // The stream's own age is not the request's.
    let context = Context { arrived: Instant::now(), grpc_timeout: None, ..context };
    let id = message.id.clone();
    let mut record = inference.recorder.begin(&context);
    let prepared = inference.prepare(message, &context, &mut record).await;
    Arrival { id, record, prepared }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
