//! `ModelStreamInfer`: many requests and answers on one stream, between one client and one pod.
//!
//! The rule: every request is decoded, checked and authorised like a unary one, against the Snapshot of
//! its own moment, before it is passed on. One that is not valid is answered on the stream, as Triton
//! does; one that is not allowed ends it. Each side is slowed down to the other's pace, and its end or
//! reset reaches the other.
//!
//! ```text
//! client --frames--> checked --room for one--> pod
//! client <--frames-- pod
//! ```
//!
//! Until the pod has answered the call itself it has one request, which another pod gets if it never
//! saw it. A pod that the fleet loses answers what it has; then the stream ends, to be opened anew.

mod finals;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::BodyExt;
use hyper::body::Frame;
use pingora_proxy::Session;
use spillway_core::deadline::{SHORTEST_USEFUL, allowed};
use spillway_core::inference::Entities;
use spillway_core::policy::{authorize_some, principal};
use spillway_core::resilience::Outcome;
use spillway_core::resource::Action;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{InferParameter, ModelInferResponse, ModelStreamInferResponse};
use spillway_runtime::oip;
use spillway_runtime::tls::PeerError;
use spillway_runtime::upstream::{Aborted, OipBody, OipSender, UpstreamBody, UpstreamError};
use tokio::time::Instant;

use crate::answer::{ERROR, Written, head, ok_trailers, status_trailers, text, write_body};
use crate::downstream::connection::{WRITE_TIME, caller};
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::{admit, check, find};
use crate::local::frame;
use crate::pods::attempt::{STREAM_INFER, check_status, failed, request, take_load};
use crate::pods::fleet::Fleet;
use crate::pods::judge::Ended;
use crate::pods::lane::{Lane, Seek};
use crate::pods::lease::Lease;
use crate::pods::metrics::Again;
use crate::request::body::{Frames, from_client, message};
use crate::shared::Shared;
use finals::Finals;

/// The longest that a stream may be asked to last. Its requests have their own, shorter deadlines.
const LONGEST: Duration = Duration::from_secs(3_600);
/// A pod tells of a deadline that passed in its answer, and then the stream goes on. Only one that says
/// nothing for so long after it is given up.
const GRACE: Duration = Duration::from_secs(1);

/// Serves a stream and writes its end. An error is returned only while nothing was written.
pub async fn serve(
    shared: &Shared,
    session: &mut Session,
    exchange: &mut Exchange,
    asking: Asking,
    fleets: &ArcSwap<Fleet>,
) -> Result<(), Refusal> {
    asking.head.check_uncompressed()?;
    authorize_some(&asking.fleet.snapshot, &asking.principal, Action::Infer)?;
    let until = Instant::from_std(exchange.began) + allowed(asking.head.asked, LONGEST, LONGEST);
    let mut stream = Stream {
        shared,
        fleets,
        asking,
        frames: Frames::new(shared.memory.clone()),
        finals: Finals::default(),
        lease: None,
        leaving: false,
        answered: false,
        quiet_until: until,
        until,
    };
    let outcome = stream.run(session, exchange).await;
    let written = match outcome {
        Ok(()) => stream.end(session, exchange).await,
        Err(refusal) if !stream.answered => return Err(refusal),
        Err(refusal) => stream.fail(session, exchange, &refusal).await,
    };
    if written.is_err() {
        exchange.outcome = None;
    }
    Ok(())
}

struct Stream<'a> {
    shared: &'a Shared,
    /// The newest fleet is in it.
    fleets: &'a ArcSwap<Fleet>,
    /// Its fleet and principal are those of the last request.
    asking: Asking,
    /// What the client sent and was not looked at.
    frames: Frames,
    finals: Finals,
    /// Where the stream goes, once its first request said so.
    lease: Option<Lease>,
    /// The fleet has lost that pod: it gets nothing more.
    leaving: bool,
    /// The head of the answer was written.
    answered: bool,
    /// The pod must say something until then, or it is given up.
    quiet_until: Instant,
    until: Instant,
}

/// A request that may be passed on.
struct Checked {
    frame: Bytes,
    lane: Arc<Lane>,
    entities: Entities,
}

/// A call to a pod that has not answered.
struct Call {
    sender: Option<OipSender>,
    head: BoxFuture<'static, Result<Response<UpstreamBody>, UpstreamError>>,
}

/// What comes next.
enum Event {
    /// Bytes of the client; `None` at its end; an error when it is gone.
    Client(Result<Option<Bytes>, Refusal>),
    /// The pod took the waiting request, or has ended.
    Taken(Result<(), Aborted>),
    Head(Result<Response<UpstreamBody>, UpstreamError>),
    /// A piece of the pod's answer; `None` at its end.
    Pod(Option<Result<Frame<Bytes>, UpstreamError>>),
    Deadline,
}

impl Stream<'_> {
    async fn run(&mut self, session: &mut Session, exchange: &mut Exchange) -> Result<(), Refusal> {
        let Some(first) = self.first(session, exchange).await? else { return Ok(()) };
        let mut seek = first.lane.seek(&first.entities, exchange.caller.as_ref().map(|caller| caller.address.ip()));
        let mut call = self.call(&first, &mut seek, exchange)?;
        let mut waiting = Some(first.frame.clone());
        // Until it is known that it need not be sent again.
        let mut first = Some(first);
        let mut client_ended = false;
        let mut pod: Option<(HeaderMap, UpstreamBody)> = None;
        let mut answers = Frames::new(self.shared.memory.clone());
        loop {
            let open = pod.is_some() && call.sender.is_some();
            if open && waiting.is_none() && !self.leaving {
                waiting = self.take(session, exchange).await?.map(|checked| checked.frame);
            }
            let is_last = open && waiting.is_none() && (client_ended || self.leaving);
            if let Some(sender) = call.sender.take_if(|_| is_last) {
                // The pod may have ended first; its answer says so.
                let _ = sender.finish().await;
            }
            let wants_more = pod.is_some() && waiting.is_none() && !client_ended && !self.leaving;
            let event = tokio::select! {
                piece = next_piece(&mut pod), if pod.is_some() => Event::Pod(piece),
                head = &mut call.head, if pod.is_none() => Event::Head(head),
                taken = offer(&call.sender, &waiting), if waiting.is_some() && call.sender.is_some() => {
                    Event::Taken(taken)
                }
                bytes = from_client(session, wants_more) => Event::Client(bytes),
                () = tokio::time::sleep_until(self.until.min(self.quiet_until)) => Event::Deadline,
            };
            match event {
                Event::Client(bytes) => client_ended = self.received(exchange, bytes?)?,
                Event::Taken(Ok(())) => waiting = None,
                Event::Taken(Err(Aborted)) => call.sender = None,
                Event::Head(Ok(response)) => {
                    let (head, body) = response.into_parts();
                    if !head.status.is_success() {
                        return self.ended(Err(Ended::Http(head.status)));
                    }
                    pod = Some((head.headers, body));
                    first = None;
                }
                Event::Head(Err(error)) => {
                    let ended = self.lost(error);
                    let failure = ended.verdict(false).failure;
                    let refused = self.ended(Err(ended));
                    let Some(first) = first.as_ref().filter(|_| exchange.retries == 0) else { return refused };
                    let left = self.until - Instant::now();
                    if let Err(why) = first.lane.may_repeat(&seek, failure, 1, left) {
                        first.lane.recorder.metrics.not_repeated(why);
                        return refused;
                    }
                    call = self.call(first, &mut seek, exchange)?;
                    exchange.retries += 1;
                    self.shared.metrics.retries.inc();
                    first.lane.recorder.metrics.repeated(Again::Unseen);
                    waiting = Some(first.frame.clone());
                }
                Event::Pod(Some(Ok(piece))) => match piece.into_data() {
                    Ok(data) => {
                        self.quiet_until = self.until;
                        answers.push(&data)?;
                        loop {
                            let answer = match answers.next(self.shared.limits.answer) {
                                Ok(Some(answer)) => answer,
                                Ok(None) => break,
                                Err(_) => return self.ended(Err(Ended::Unreadable)),
                            };
                            self.lease.iter_mut().for_each(Lease::answered);
                            if self.finals.passes(&answer) {
                                self.write(session, exchange, answer).await?;
                            }
                        }
                    }
                    Err(piece) => {
                        let trailers = piece.into_trailers().unwrap_or_default();
                        if let Some(lease) = &self.lease {
                            take_load(self.shared, lease.link(), &trailers);
                        }
                        return self.ended(check_status(&trailers, &trailers));
                    }
                },
                // No trailers: the status stands in the head, or there is none.
                Event::Pod(None) => {
                    let status = pod.as_ref().map_or(Err(Ended::Unreadable), |(head, _)| check_status(head, head));
                    return self.ended(status);
                }
                Event::Pod(Some(Err(error))) => {
                    let ended = self.lost(error);
                    return self.ended(Err(ended));
                }
                Event::Deadline => {
                    if let Some(lease) = self.lease.take_if(|_| Instant::now() < self.until) {
                        // It is silent.
                        lease.close(Outcome::Timeout);
                    }
                    return Err(Refusal::Deadline);
                }
            }
        }
    }

    /// Counts a call that failed below gRPC.
    fn lost(&self, error: UpstreamError) -> Ended {
        if let Some(lease) = &self.lease {
            failed(self.shared, lease.link(), &error);
        }
        Ended::Call(error)
    }

    /// What the pod's end means to those who judge it, and to the client: where the stream moves on, it is not
    /// the client's own.
    fn ended(&mut self, status: Result<(), Ended>) -> Result<(), Refusal> {
        let outcome = status.as_ref().map_or_else(|ended| ended.verdict(false).outcome, |()| Outcome::Success);
        if let Some(lease) = self.lease.take() {
            lease.close(outcome);
        }
        let status = status.map_err(Ended::refusal);
        if self.leaving { status.and(Err(Refusal::PodLost)) } else { status }
    }

    /// Calls a pod for the stream.
    fn call(&mut self, first: &Checked, seek: &mut Seek, exchange: &mut Exchange) -> Result<Call, Refusal> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left < SHORTEST_USEFUL {
            return Err(Refusal::Deadline);
        }
        let lease = first.lane.take(seek, left)?;
        exchange.pod = Some(lease.link().key().pod.clone());
        let asked = (allowed(self.asking.head.asked, Duration::MAX, Duration::MAX) < LONGEST).then_some(left);
        let (sender, body) = OipBody::stream();
        let request = request(STREAM_INFER, exchange, &self.asking.trace, asked, body);
        let upstream = lease.link().upstream.clone();
        let head = Box::pin(async move { upstream.call(request).await });
        self.lease = Some(lease);
        Ok(Call { sender: Some(sender), head })
    }

    /// Takes in what the client sent. Whether that was its end.
    fn received(&mut self, exchange: &mut Exchange, bytes: Option<Bytes>) -> Result<bool, Refusal> {
        match bytes {
            Some(bytes) => {
                exchange.received += bytes.len();
                self.frames.push(&bytes)?;
                Ok(false)
            }
            None if self.frames.is_cut() => Err(Refusal::Frame),
            None => Ok(true),
        }
    }

    /// Reads the first request that is valid, which says what pod gets the stream. `None`: the client
    /// ended before it.
    async fn first(&mut self, session: &mut Session, exchange: &mut Exchange) -> Result<Option<Checked>, Refusal> {
        loop {
            if let Some(checked) = self.take(session, exchange).await? {
                return Ok(Some(checked));
            }
            let read = tokio::time::timeout_at(self.until, from_client(session, true)).await;
            if self.received(exchange, read.map_err(|_| Refusal::Deadline)??)? {
                return Ok(None);
            }
        }
    }

    /// The next whole and valid request that has arrived. Others are answered here.
    async fn take(&mut self, session: &mut Session, exchange: &mut Exchange) -> Result<Option<Checked>, Refusal> {
        let limits = self.shared.limits.request;
        while let Some(frame) = self.frames.next(limits.body)? {
            let request = match oip::decode_message(message(&frame)?, &limits) {
                Ok(request) => request,
                Err(invalid) => {
                    self.answer_invalid(session, exchange, String::new(), &invalid.into()).await?;
                    continue;
                }
            };
            self.judge_anew(session)?;
            let judged = find(&self.asking, exchange, &request.model, &request.version, Action::Infer)
                .and_then(|model| Ok((check(&model, &request)?, self.lane_of(&request.model, exchange)?, model)));
            let (entities, lane, model) = match judged {
                Ok((entities, lane, model)) => (entities, lane, model),
                Err(refusal @ (Refusal::Denied(_) | Refusal::NoPod)) => return Err(refusal),
                Err(refusal) => {
                    self.answer_invalid(session, exchange, request.id, &refusal).await?;
                    continue;
                }
            };
            let (admission, plan) = (&self.shared.admission, self.shared.plan());
            let admitted =
                admit(self.shared, exchange, &self.asking.principal, &model, &request, &entities).and_then(|guest| {
                    let planned = admission.refuse_planned(&guest, plan.as_deref());
                    planned.and_then(|()| admission.pass(&guest, &request.model)).map_err(Refusal::busy)
                });
            if let Err(refusal) = admitted {
                self.answer_invalid(session, exchange, request.id, &refusal).await?;
                continue;
            }
            exchange.auth = if exchange.auth.is_zero() { exchange.began.elapsed() } else { exchange.auth };
            self.quiet_until = self.quiet_until.min(Instant::now() + model.max_deadline + GRACE);
            if self.lease.as_ref().is_some_and(|lease| !self.asking.fleet.has(lease.link().key())) {
                self.leaving = true;
                return Ok(None);
            }
            self.finals.asked(&request);
            return Ok(Some(Checked { frame, lane, entities }));
        }
        Ok(None)
    }

    /// Certificates end, tenants and policies are revoked, models and pods move while a stream lasts.
    fn judge_anew(&mut self, session: &Session) -> Result<(), Refusal> {
        let caller = caller(session).ok_or(Refusal::Untrusted(PeerError::NoCertificate))?;
        let trusted = self.shared.workload.still_trusted(&caller.peer, SystemTime::now());
        trusted.map_err(Refusal::Untrusted)?;
        let fleet = self.fleets.load();
        if !Arc::ptr_eq(&fleet, &self.asking.fleet) {
            self.asking.principal = principal(&fleet.snapshot, &self.shared.region, &caller.peer.id)?;
            self.asking.fleet = fleet.clone();
        }
        Ok(())
    }

    /// A model on the pool that the stream goes to, if it goes anywhere yet.
    fn lane_of(&self, model: &str, exchange: &Exchange) -> Result<Arc<Lane>, Refusal> {
        let lane = self.asking.fleet.lane(model).ok_or(Refusal::NoPod)?;
        match &self.lease {
            Some(lease) if lease.link().key().pool != lane.pool.name => Err(Refusal::OtherPool(exchange.model.clone())),
            _ => Ok(lane.clone()),
        }
    }

    /// Tells the client about one of its requests; the stream goes on.
    async fn answer_invalid(
        &mut self,
        session: &mut Session,
        exchange: &mut Exchange,
        id: String,
        refusal: &Refusal,
    ) -> Result<(), Refusal> {
        self.shared.metrics.rejected(refusal.reason());
        let code = ParameterChoice::StringParam(refusal.answer().code.into_owned());
        let parameters = [(ERROR.to_string(), InferParameter { parameter_choice: Some(code) })].into();
        let head = ModelInferResponse { id, parameters, ..ModelInferResponse::default() };
        let answer = ModelStreamInferResponse { error_message: text(refusal), infer_response: Some(head) };
        self.write(session, exchange, frame(&answer)).await
    }

    async fn write(&mut self, session: &mut Session, exchange: &mut Exchange, frame: Bytes) -> Result<(), Refusal> {
        self.write_head(session, exchange).await.map_err(|_| Refusal::Cancelled)?;
        exchange.sent += frame.len();
        let began = Instant::now();
        let written = write_body(&mut session.downstream_session, frame, false).await;
        // While the client took its time, nobody listened to the pod.
        self.quiet_until = (self.quiet_until + began.elapsed()).min(self.until);
        written.map_err(|_| Refusal::Cancelled)
    }

    async fn write_head(&mut self, session: &mut Session, exchange: &Exchange) -> Written {
        if std::mem::replace(&mut self.answered, true) {
            return Ok(());
        }
        let mut head = head(200, exchange)?;
        head.insert_header(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))?;
        session.downstream_session.set_write_timeout(Some(WRITE_TIME));
        session.downstream_session.write_response_header(Box::new(head)).await
    }

    async fn end(&mut self, session: &mut Session, exchange: &mut Exchange) -> Written {
        self.write_head(session, exchange).await?;
        session.downstream_session.write_response_trailers(ok_trailers()).await?;
        exchange.succeed();
        Ok(())
    }

    /// Ends a stream whose answer has begun.
    async fn fail(&mut self, session: &mut Session, exchange: &mut Exchange, refusal: &Refusal) -> Written {
        let answer = exchange.refuse(refusal);
        if matches!(refusal, Refusal::Cancelled) {
            return Ok(());
        }
        if matches!(refusal, Refusal::Untrusted(_))
            && let Some(caller) = caller(session)
        {
            caller.close.notify_one();
        }
        let mut trailers = status_trailers(answer.grpc, &text(refusal));
        if let Ok(code) = HeaderValue::from_str(&answer.code) {
            trailers.insert(ERROR, code);
        }
        session.downstream_session.write_response_trailers(trailers).await
    }
}

/// Gives the pod the waiting request. A cancelled offer has given nothing.
async fn offer(sender: &Option<OipSender>, waiting: &Option<Bytes>) -> Result<(), Aborted> {
    match (sender, waiting) {
        (Some(sender), Some(frame)) => sender.send(frame.clone()).await,
        _ => std::future::pending().await,
    }
}

async fn next_piece(pod: &mut Option<(HeaderMap, UpstreamBody)>) -> Option<Result<Frame<Bytes>, UpstreamError>> {
    match pod {
        Some((_, body)) => body.frame().await,
        None => std::future::pending().await,
    }
}
