//! `ModelStreamInfer`: many requests and answers on one stream, between one client and one pod.
//!
//! The rule: every request is decoded, checked and authorised like a unary one before it is passed on.
//! One that is not valid is answered on the stream, as Triton does; one that is not allowed ends it.
//! Each side is slowed down to the other's pace, and its end or reset reaches the other.
//!
//! ```text
//! client --frames--> checked --room for one--> pod
//! client <--frames-- pod
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::BodyExt;
use hyper::body::Frame;
use pingora_proxy::Session;
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::resource::Action;
use spillway_core::units::Name;
use spillway_proto::inference::{ModelInferResponse, ModelStreamInferResponse};
use spillway_runtime::oip;
use spillway_runtime::upstream::{Aborted, OipBody, OipSender, UpstreamBody, UpstreamError};
use tokio::time::Instant;

use crate::answer::{ERROR, Written, head, ok_trailers, status_trailers, text};
use crate::body::{Frames, message};
use crate::connection::{WRITE_TIME, caller};
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::fleet::PodLink;
use crate::gateway::Shared;
use crate::infer::{check, find, gone};
use crate::local::frame;
use crate::pod_call::{check_status, failed, request};

/// The longest that a stream may be asked to last. Its requests have their own, shorter deadlines.
const LONGEST: Duration = Duration::from_secs(3_600);

/// Serves a stream and writes its end. An error is returned only while nothing was written.
pub async fn serve(
    shared: &Shared,
    session: &mut Session,
    exchange: &mut Exchange,
    asking: &Asking,
) -> Result<(), Refusal> {
    asking.head.check_uncompressed()?;
    let asked = asking.head.asked.grpc_timeout.filter(|time| !time.is_zero());
    let until = Instant::from_std(exchange.began) + asked.unwrap_or(LONGEST).min(LONGEST);
    let mut stream =
        Stream { shared, asking, frames: Frames::default(), pool: None, answered: false, quiet_until: until, until };
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
    asking: &'a Asking,
    /// What the client sent and was not looked at.
    frames: Frames,
    /// Where the stream goes, once its first request said so.
    pool: Option<Name>,
    /// The head of the answer was written.
    answered: bool,
    /// The pod must say something until then, or its next request's deadline has passed.
    quiet_until: Instant,
    until: Instant,
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
        let Some((first, link)) = self.first(session, exchange).await? else { return Ok(()) };
        let left = self.until.saturating_duration_since(Instant::now());
        if left < SHORTEST_USEFUL {
            return Err(Refusal::Deadline);
        }
        exchange.pod = Some(link.key.pod.clone());
        let asked = self.asking.head.asked.grpc_timeout.map(|_| left);
        let (sender, body) = OipBody::stream();
        let call = link.upstream.call(request("ModelStreamInfer", exchange, &self.asking.trace, asked, body));
        tokio::pin!(call);
        let mut sender = Some(sender);
        let mut waiting = Some(first);
        let mut client_ended = false;
        let mut pod: Option<(HeaderMap, UpstreamBody)> = None;
        let mut answers = Frames::default();
        loop {
            if waiting.is_none() && sender.is_some() {
                waiting = self.take(session, exchange).await?.map(|(frame, _)| frame);
            }
            if waiting.is_none()
                && client_ended
                && let Some(sender) = sender.take()
            {
                // The pod may have ended first; its answer says so.
                let _ = sender.finish().await;
            }
            let wants_more = waiting.is_none() && !client_ended;
            let event = tokio::select! {
                piece = next_piece(&mut pod), if pod.is_some() => Event::Pod(piece),
                head = &mut call, if pod.is_none() => Event::Head(head),
                taken = offer(&sender, &waiting), if waiting.is_some() && sender.is_some() => Event::Taken(taken),
                bytes = from_client(session, wants_more) => Event::Client(bytes),
                () = tokio::time::sleep_until(self.until.min(self.quiet_until)) => Event::Deadline,
            };
            match event {
                Event::Client(bytes) => client_ended = self.received(exchange, bytes?)?,
                Event::Taken(Ok(())) => waiting = None,
                Event::Taken(Err(Aborted)) => sender = None,
                Event::Head(Ok(response)) => {
                    let (head, body) = response.into_parts();
                    pod = Some((head.headers, body));
                }
                Event::Pod(Some(Ok(piece))) => match piece.into_data() {
                    Ok(data) => {
                        self.quiet_until = self.until;
                        answers.push(&data);
                        let limit = self.shared.limits.answer;
                        while let Some(answer) = answers.next(limit).map_err(|_| Refusal::BadAnswer)? {
                            self.write(session, exchange, answer).await?;
                        }
                    }
                    Err(piece) => {
                        let trailers = piece.into_trailers().unwrap_or_default();
                        return check_status(&trailers, &trailers);
                    }
                },
                // No trailers: the status stands in the head, or there is none.
                Event::Pod(None) => {
                    return pod.as_ref().map_or(Err(Refusal::BadAnswer), |(head, _)| check_status(head, head));
                }
                Event::Head(Err(error)) | Event::Pod(Some(Err(error))) => return Err(failed(&link, &error, exchange)),
                Event::Deadline => return Err(Refusal::Deadline),
            }
        }
    }

    /// Takes in what the client sent. Whether that was its end.
    fn received(&mut self, exchange: &mut Exchange, bytes: Option<Bytes>) -> Result<bool, Refusal> {
        match bytes {
            Some(bytes) => {
                exchange.received += bytes.len();
                self.frames.push(&bytes);
                Ok(false)
            }
            None if self.frames.is_cut() => Err(Refusal::Frame),
            None => Ok(true),
        }
    }

    /// Reads the first request that is valid, which says what pod gets the stream. `None`: the client
    /// ended before it.
    async fn first(
        &mut self,
        session: &mut Session,
        exchange: &mut Exchange,
    ) -> Result<Option<(Bytes, Arc<PodLink>)>, Refusal> {
        loop {
            if let Some((frame, link)) = self.take(session, exchange).await? {
                return Ok(Some((frame, link)));
            }
            let read = tokio::time::timeout_at(self.until, from_client(session, true)).await;
            if self.received(exchange, read.map_err(|_| Refusal::Deadline)??)? {
                return Ok(None);
            }
        }
    }

    /// The next whole and valid request that has arrived, and a pod for it. Others are answered here.
    async fn take(
        &mut self,
        session: &mut Session,
        exchange: &mut Exchange,
    ) -> Result<Option<(Bytes, Arc<PodLink>)>, Refusal> {
        let limits = self.shared.limits.request;
        while let Some(framed) = self.frames.next(limits.body)? {
            let request = match oip::decode_message(message(&framed)?, &limits) {
                Ok(request) => request,
                Err(invalid) => {
                    self.answer_invalid(session, exchange, String::new(), &invalid.into()).await?;
                    continue;
                }
            };
            // Its certificate may have ended since the stream began.
            let caller = caller(session).ok_or(Refusal::Untrusted)?;
            let trusted = self.shared.workload.still_trusted(&caller.peer, SystemTime::now());
            trusted.map_err(|_| Refusal::Untrusted)?;
            let judged = find(self.asking, exchange, &request.model, &request.version, Action::Infer)
                .and_then(|model| Ok((check(&model, &request)?, model)));
            let (entities, model) = match judged {
                Ok(judged) => judged,
                Err(refusal @ Refusal::Denied(_)) => return Err(refusal),
                Err(refusal) => {
                    self.answer_invalid(session, exchange, request.id, &refusal).await?;
                    continue;
                }
            };
            exchange.auth = if exchange.auth.is_zero() { exchange.began.elapsed() } else { exchange.auth };
            let pool = self.asking.fleet.pool(&model).ok_or(Refusal::NoPod)?;
            let link = pool.pick(&entities, rand::random(), None).ok_or(Refusal::NoPod)?;
            if self.pool.get_or_insert_with(|| link.key.pool.clone()) != &link.key.pool {
                let link_is_taken = Refusal::OtherPool(exchange.model.clone());
                self.answer_invalid(session, exchange, request.id, &link_is_taken).await?;
                continue;
            }
            self.quiet_until = self.quiet_until.min(Instant::now() + model.max_deadline);
            return Ok(Some((framed, link.clone())));
        }
        Ok(None)
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
        let answer = ModelStreamInferResponse {
            error_message: text(refusal),
            infer_response: Some(ModelInferResponse { id, ..ModelInferResponse::default() }),
        };
        self.write(session, exchange, frame(&answer)).await
    }

    async fn write(&mut self, session: &mut Session, exchange: &mut Exchange, frame: Bytes) -> Result<(), Refusal> {
        self.write_head(session, exchange).await.map_err(|_| Refusal::Cancelled)?;
        exchange.sent += frame.len();
        session.downstream_session.write_response_body(frame, false).await.map_err(|_| Refusal::Cancelled)
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
        if matches!(refusal, Refusal::Untrusted)
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

/// The client's next bytes; while they are not wanted, only whether it is still there.
async fn from_client(session: &mut Session, wanted: bool) -> Result<Option<Bytes>, Refusal> {
    if wanted {
        return session.downstream_session.read_request_body().await.map_err(|_| Refusal::Cancelled);
    }
    gone(session).await;
    Err(Refusal::Cancelled)
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
