//! `ModelStreamInfer`: many requests and answers on one stream, between one client and one pod, here or in another
//! region.
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
//! Until the pod has taken the call it has one request, and others may get it: see [`opening`]. A pod that the fleet
//! loses answers what it has, and so does a region to which the tenant's requests may not leave any more; then the
//! stream ends, to be opened anew.

mod finals;
mod opening;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Frame;
use pingora_core::protocols::http::ServerSession;
use spillway_core::deadline::allowed;
use spillway_core::policy::{authorize_some, principal};
use spillway_core::resilience::Outcome;
use spillway_core::resource::Action;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{InferParameter, ModelInferResponse, ModelStreamInferResponse};
use spillway_runtime::oip;
use spillway_runtime::tls::PeerError;
use spillway_runtime::upstream::{Aborted, OipSender, UpstreamError};
use tokio::time::Instant;
use tonic::Code;

use crate::admission::Guest;
use crate::answer::{ERROR, Written, head, headers, ok_trailers, status_trailers, text, write_body};
use crate::downstream::connection::{WRITE_TIME, caller};
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::{admit, check, find};
use crate::local::frame;
use crate::peers::visit::{Visit, since_epoch};
use crate::pods::attempt::{Taken, check_status, failed, take_load};
use crate::pods::fleet::Fleet;
use crate::pods::judge::Ended;
use crate::pods::lane::Lane;
use crate::pods::lease::Lease;
use crate::request::body::{Frames, from_client, message};
use crate::shared::Shared;
use finals::Finals;
use opening::{Abroad, Checked};

/// The longest that a stream may be asked to last. Its requests have their own, shorter deadlines.
const LONGEST: Duration = Duration::from_secs(3_600);
/// A pod tells of a deadline that passed in its answer, and then the stream goes on. Only one that says
/// nothing for so long after it is given up.
const GRACE: Duration = Duration::from_secs(1);

/// Serves a stream and writes its end. An error is returned only while nothing was written.
pub async fn serve(
    shared: &Shared,
    session: &mut ServerSession,
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
        abroad: None,
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
    /// Or another region has it.
    abroad: Option<Abroad<'a>>,
    /// It may not stay there: what has it gets nothing more.
    leaving: bool,
    /// The head of the answer was written.
    answered: bool,
    /// The pod must say something until then, or it is given up.
    quiet_until: Instant,
    until: Instant,
}

/// What comes next.
enum Event {
    /// Bytes of the client; `None` at its end; an error when it is gone.
    Client(Result<Option<Bytes>, Refusal>),
    /// The pod took the waiting request, or has ended.
    Taken(Result<(), Aborted>),
    /// A piece of the pod's answer; `None` at its end.
    Pod(Option<Result<Frame<Bytes>, UpstreamError>>),
    Deadline,
}

impl Stream<'_> {
    async fn run(&mut self, session: &mut ServerSession, exchange: &mut Exchange) -> Result<(), Refusal> {
        while let Some(first) = self.first(session, exchange).await? {
            if let Some(taken) = self.open(session, exchange, first).await? {
                if matches!(exchange.visit, Visit::Forwarded(_)) {
                    // The other region asks nobody else from now on.
                    self.write_head(session, exchange).await.map_err(|_| Refusal::Cancelled)?;
                }
                return self.relay(session, exchange, taken).await;
            }
        }
        Ok(())
    }

    /// Passes on requests and answers, to the end of both.
    async fn relay(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        taken: Taken,
    ) -> Result<(), Refusal> {
        let Taken { sender, head, mut body } = taken;
        let (mut sender, mut waiting, mut client_ended) = (Some(sender), None, false);
        let mut answers = Frames::new(self.shared.memory.clone());
        loop {
            if sender.is_some() && waiting.is_none() && !self.leaving {
                waiting = self.take(session, exchange).await?.map(|checked| checked.frame);
            }
            let is_last = waiting.is_none() && (client_ended || self.leaving);
            if let Some(sender) = sender.take_if(|_| is_last) {
                // The pod may have ended first; its answer says so.
                let _ = sender.finish().await;
            }
            let wants_more = waiting.is_none() && !client_ended && !self.leaving;
            let event = tokio::select! {
                piece = body.frame() => Event::Pod(piece),
                taken = offer(&sender, &waiting), if waiting.is_some() && sender.is_some() => Event::Taken(taken),
                bytes = from_client(session, wants_more) => Event::Client(bytes),
                () = tokio::time::sleep_until(self.until.min(self.quiet_until)) => Event::Deadline,
            };
            match event {
                Event::Client(bytes) => client_ended = self.received(exchange, bytes?)?,
                Event::Taken(Ok(())) => waiting = None,
                Event::Taken(Err(Aborted)) => sender = None,
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
                Event::Pod(None) => return self.ended(check_status(&head, &head)),
                Event::Pod(Some(Err(error))) => {
                    let ended = self.lost(error);
                    return self.ended(Err(ended));
                }
                Event::Deadline => {
                    self.give_up();
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
        if let Some(Abroad { region, gateway, .. }) = &self.abroad {
            self.shared.nudges.nudge(region, gateway);
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
        let is_stranger = self.abroad.is_some() && status.as_ref().is_err_and(is_of_resources);
        let status = status.map_err(Ended::refusal);
        if self.leaving || is_stranger { status.and(Err(Refusal::PodLost)) } else { status }
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
    async fn first(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
    ) -> Result<Option<Checked>, Refusal> {
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
    async fn take(&mut self, session: &mut ServerSession, exchange: &mut Exchange) -> Result<Option<Checked>, Refusal> {
        let limits = self.shared.limits.request;
        while let Some(frame) = self.frames.next(limits.body)? {
            let request = match oip::decode_message(message(&frame)?, &limits) {
                Ok(request) => request,
                Err(invalid) => {
                    self.tell(session, exchange, String::new(), invalid.into()).await?;
                    continue;
                }
            };
            self.judge_anew(session, exchange)?;
            let judged = find(&self.asking, exchange, &request.model, &request.version, Action::Infer)
                .and_then(|model| Ok((check(&model, &request)?, self.lane_of(&request.model, exchange)?, model)));
            let (entities, lane, model) = match judged {
                Ok((entities, lane, model)) => (entities, lane, model),
                Err(refusal @ (Refusal::Denied(_) | Refusal::NoPod)) => return Err(refusal),
                Err(refusal) => {
                    self.tell(session, exchange, request.id, refusal).await?;
                    continue;
                }
            };
            let admitted = admit(self.shared, exchange, &self.asking.principal, &model, &request, &entities)
                .and_then(|guest| self.pass(&guest, &request.model).map(|shed| (guest, shed)));
            let (guest, shed) = match admitted {
                Ok(admitted) => admitted,
                Err(refusal) => {
                    self.tell(session, exchange, request.id, refusal).await?;
                    continue;
                }
            };
            exchange.auth = if exchange.auth.is_zero() { exchange.began.elapsed() } else { exchange.auth };
            self.quiet_until = self.quiet_until.min(Instant::now() + model.max_deadline + GRACE);
            if !self.may_stay() {
                self.leaving = true;
                return Ok(None);
            }
            self.finals.asked(&request);
            let (id, name) = (request.id, request.model);
            return Ok(Some(Checked { frame, id, name, model, entities, guest, lane, shed }));
        }
        Ok(None)
    }

    /// What the gate says of a request: the pool's own, or for the first one that another region may have room for it. In
    /// another region that one's gate is asked.
    fn pass(&self, guest: &Guest, model: &str) -> Result<Option<Refusal>, Refusal> {
        if self.abroad.is_some() {
            return Ok(None);
        }
        let admission = &self.shared.admission;
        admission.refuse_planned(guest, self.shared.plan().as_deref()).map_err(Refusal::busy)?;
        match admission.pass(guest, model).map_err(Refusal::busy) {
            Err(refusal) if !self.is_open() => Ok(Some(refusal)),
            passed => passed.map(|()| None),
        }
    }

    fn is_open(&self) -> bool {
        self.lease.is_some() || self.abroad.is_some()
    }

    /// Whether who has the stream may have more of it.
    fn may_stay(&self) -> bool {
        let (fleet, tenant) = (&self.asking.fleet, &self.asking.principal.tenant);
        let may_leave =
            |region| fleet.snapshot.tenants.get(tenant).is_some_and(|tenant| tenant.may_leave_region.permits(region));
        self.lease.as_ref().is_none_or(|lease| fleet.has(lease.link().key()))
            && self.abroad.as_ref().is_none_or(|abroad| may_leave(&abroad.region))
    }

    /// Certificates end, tenants and policies are revoked, models and pods move while a stream lasts.
    fn judge_anew(&mut self, session: &ServerSession, exchange: &Exchange) -> Result<(), Refusal> {
        let caller = caller(session).ok_or(Refusal::Untrusted(PeerError::NoCertificate))?;
        let trusted = self.shared.workload.still_trusted(&caller.peer, SystemTime::now());
        trusted.map_err(Refusal::Untrusted)?;
        let (fleet, region) = (self.fleets.load(), &self.shared.region);
        let is_new = !Arc::ptr_eq(&fleet, &self.asking.fleet);
        match &exchange.visit {
            // The connection's certificate is not the client's.
            Visit::Forwarded(passage) => {
                self.asking.principal = passage.admit_client(&fleet.snapshot, region, since_epoch())?;
            }
            Visit::Client | Visit::Probe if is_new => {
                self.asking.principal = principal(&fleet.snapshot, region, &caller.peer.id)?;
            }
            Visit::Client | Visit::Probe => {}
        }
        if is_new {
            self.asking.fleet = fleet.clone();
        }
        Ok(())
    }

    /// A model on the pool that the stream goes to, if it goes anywhere yet. `None`: no pool of this region serves it, or
    /// another region has the stream.
    fn lane_of(&self, model: &str, exchange: &Exchange) -> Result<Option<Arc<Lane>>, Refusal> {
        if self.abroad.is_some() {
            return Ok(None);
        }
        let lane = self.asking.fleet.lane(model);
        match (&self.lease, lane) {
            (Some(_), None) => Err(Refusal::NoPod),
            (Some(lease), Some(lane)) if lease.link().key().pool != lane.pool.name => {
                Err(Refusal::OtherPool(exchange.model.clone()))
            }
            _ => Ok(lane.cloned()),
        }
    }

    /// Tells who sent a request what is wrong with it; the stream goes on. To another region's gateway, which may ask
    /// somebody else, a stream that nobody has is refused.
    async fn tell(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        id: String,
        refusal: Refusal,
    ) -> Result<(), Refusal> {
        if matches!(exchange.visit, Visit::Forwarded(_)) && !self.answered {
            return Err(refusal);
        }
        self.answer_invalid(session, exchange, id, &refusal).await
    }

    /// Tells the client about one of its requests; the stream goes on.
    async fn answer_invalid(
        &mut self,
        session: &mut ServerSession,
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

    async fn write(
        &mut self,
        session: &mut ServerSession,
        exchange: &mut Exchange,
        frame: Bytes,
    ) -> Result<(), Refusal> {
        self.write_head(session, exchange).await.map_err(|_| Refusal::Cancelled)?;
        exchange.sent += frame.len();
        let began = Instant::now();
        let written = write_body(session, frame, false).await;
        // While the client took its time, nobody listened to the pod.
        self.quiet_until = (self.quiet_until + began.elapsed()).min(self.until);
        written.map_err(|_| Refusal::Cancelled)
    }

    async fn write_head(&mut self, session: &mut ServerSession, exchange: &Exchange) -> Written {
        if std::mem::replace(&mut self.answered, true) {
            return Ok(());
        }
        let mut headers = headers(exchange);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        session.set_write_timeout(Some(WRITE_TIME));
        session.write_response_header(head(StatusCode::OK, headers)).await
    }

    async fn end(&mut self, session: &mut ServerSession, exchange: &mut Exchange) -> Written {
        self.write_head(session, exchange).await?;
        session.write_response_trailers(ok_trailers()).await?;
        exchange.succeed();
        Ok(())
    }

    /// Ends a stream whose answer has begun.
    async fn fail(&mut self, session: &mut ServerSession, exchange: &mut Exchange, refusal: &Refusal) -> Written {
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
        session.write_response_trailers(trailers).await
    }
}

/// Gives the pod the waiting request. A cancelled offer has given nothing.
async fn offer(sender: &Option<OipSender>, waiting: &Option<Bytes>) -> Result<(), Aborted> {
    match (sender, waiting) {
        (Some(sender), Some(frame)) => sender.send(frame.clone()).await,
        _ => std::future::pending().await,
    }
}

/// The other region knows of other resources, or has other rules.
fn is_of_resources(ended: &Ended) -> bool {
    let Ended::Said { status, .. } = ended else { return false };
    matches!(status, Code::PermissionDenied | Code::Unauthenticated | Code::NotFound | Code::Unimplemented)
}
