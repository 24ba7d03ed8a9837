//! A unary call: attempts on pods until one brings an answer, or no more may be made.
//!
//! The rule: this is the one place that sends a request again. What fails is sent to another pod, within the
//! model's budget and the deadline, never on overload or a client's fault. What takes too long is sent to a
//! second pod beside the first, and the first good answer wins:
//!
//! ```text
//! sent --the model's p95, if it is hedged------------------> a hedge beside it
//!      --overdue: max(3 x p99, 50 ms) of the model;
//!        half of its time while that is not known ---------> a retry beside it
//!      --failed, nothing beside it------------------------> a retry
//! ```
//!
//! An overdue attempt is not given up: where a model has become slow as a whole, its answers still arrive. If
//! the budget refuses, it is asked again each time that an attempt would be overdue. At most two are under
//! way at a time; the loser's stream is reset.

use std::future::pending;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::inference::Entities;
use spillway_core::resilience::Failure;
use spillway_core::resilience::budget::NoRetry;
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::upstream::OipBody;
use tokio::time::{Instant, sleep_until};

use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::pods::attempt::{Attempted, INFER, PodAnswer, attempt, request};
use crate::pods::judge::Ended;
use crate::pods::lane::{Lane, Seek};
use crate::pods::lease::Lease;
use crate::pods::metrics::{Again, NotAgain};
use crate::shared::Shared;

/// A call that is ready to be made, by one that holds a place at the gate.
pub struct PodCall<'a> {
    pub shared: &'a Shared,
    pub lane: &'a Arc<Lane>,
    pub entities: &'a Entities,
    /// The length-prefixed message, in pieces.
    pub frame: &'a [Bytes],
    pub until: Instant,
    pub trace: TraceParent,
}

impl<'c> PodCall<'c> {
    pub async fn make(self, exchange: &mut Exchange) -> Result<PodAnswer, Refusal> {
        let client = exchange.caller.as_ref().map(|caller| caller.address.ip());
        let mut course = Course::new(&self, client);
        let lease = course.take()?;
        let mut first = pin!(Some(self.send(exchange, lease)));
        // Rarely needed, so it takes no room in every request's future.
        let mut second: Option<Pin<Box<_>>> = None;
        let mut timer = pin!(sleep_until(course.at));
        loop {
            let ended = tokio::select! {
                biased;
                attempted = async { match first.as_mut().as_pin_mut() { Some(first) => first.await, None => pending().await } } => {
                    first.set(None);
                    Some((attempted, false))
                }
                attempted = async { match &mut second { Some(second) => second.await, None => pending().await } } => {
                    second = None;
                    Some((attempted, true))
                }
                () = timer.as_mut() => None,
            };
            let lease = match ended {
                Some((Attempted { link, took, said, result: Ok((frame, response, part)) }, of_second)) => {
                    exchange.pod = Some(link.key().pod.clone());
                    exchange.making.sidecar_timing.clone_from(&said.timing);
                    exchange.join(part);
                    // A hedge hides what the first attempt would have taken; counted as quick, it would lower the
                    // p95, and with it the next hedges' wait.
                    self.lane.answered(if course.hedged { course.began.elapsed() } else { took });
                    if of_second && course.hedged {
                        self.lane.recorder.metrics.hedge_won();
                    }
                    return Ok(PodAnswer { frame, response, said });
                }
                // The other one may still bring an answer.
                Some(_) if first.is_some() || second.is_some() => {
                    course.wait_until_overdue(Instant::now());
                    None
                }
                Some((Attempted { said, result: Err(ended), .. }, _)) => {
                    exchange.making.sidecar_timing = said.timing;
                    course.failed(ended)?
                }
                None => course.due()?,
            };
            exchange.retries = course.retries;
            if let Some(lease) = lease {
                let sent = self.send(exchange, lease);
                if first.is_none() {
                    first.set(Some(sent));
                } else {
                    second = Some(Box::pin(sent));
                }
            }
            timer.as_mut().reset(course.at);
        }
    }

    fn send(&self, exchange: &mut Exchange, lease: Lease) -> impl Future<Output = Attempted<'c>> + use<'c> {
        exchange.pod = Some(lease.link().key().pod.clone());
        let body = OipBody::segments(self.frame);
        let request = request(INFER, exchange, &self.trace, Some(self.until - Instant::now()), body);
        attempt(self.shared, lease, request, exchange.part(&self.shared.memory))
    }
}

/// What is due at [`Course::at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Hedge,
    /// The attempt that is under way is overdue.
    Beside,
    /// The wait before a retry is over.
    Retry(Again),
    /// The deadline.
    End,
}

/// What is decided on the way. It does not wait and does not send.
struct Course<'a> {
    call: &'a PodCall<'a>,
    began: Instant,
    seek: Seek,
    /// Sent so far.
    attempts: u32,
    retries: u32,
    hedged: bool,
    /// The budget had nothing for an overdue attempt.
    is_refused: bool,
    due: Due,
    at: Instant,
}

impl<'a> Course<'a> {
    fn new(call: &'a PodCall<'a>, client: Option<IpAddr>) -> Self {
        let (seek, began) = (call.lane.seek(call.entities, client).with_place(), Instant::now());
        let (due, at) = (Due::End, call.until);
        let mut course = Self { call, began, seek, attempts: 0, retries: 0, hedged: false, is_refused: false, due, at };
        match call.lane.hedge_delay(&course.seek, call.until - began) {
            Some(delay) => course.wait(Due::Hedge, delay, began),
            None => course.wait_until_overdue(began),
        }
        course
    }

    /// Takes a pod for the next attempt.
    fn take(&mut self) -> Result<Lease, Refusal> {
        let left = self.left()?;
        let lease = self.call.lane.take(&mut self.seek, left)?;
        self.attempts += 1;
        Ok(lease)
    }

    /// The time has come: what is to be sent now, if anything.
    fn due(&mut self) -> Result<Option<Lease>, Refusal> {
        let (lane, left) = (self.call.lane, self.left()?);
        let lease = match self.due {
            Due::End => return Err(Refusal::Deadline),
            Due::Retry(why) => return self.again(why).map(Some),
            Due::Hedge if !lane.has_others(&self.seek) => None,
            Due::Hedge => match lane.may_hedge(left) {
                Ok(()) => self.take().ok().inspect(|_| {
                    lane.recorder.metrics.hedge_started();
                    self.hedged = true;
                }),
                Err(why) => {
                    lane.recorder.metrics.not_hedged(why);
                    self.wait_until_overdue(Instant::now());
                    return Ok(None);
                }
            },
            Due::Beside => match lane.may_repeat(&self.seek, Failure::Died { idempotent: true }, self.attempts, left) {
                Ok(_) => self.again(Again::Overdue).ok(),
                Err(why) => {
                    if !std::mem::replace(&mut self.is_refused, true) {
                        lane.recorder.metrics.not_repeated(why);
                    }
                    if why == NotAgain::Core(NoRetry::Budget) {
                        self.wait_until_overdue(Instant::now());
                        return Ok(None);
                    }
                    None
                }
            },
        };
        (self.due, self.at) = (Due::End, self.call.until);
        Ok(lease)
    }

    /// The last attempt under way failed: what is to be sent now, if anything.
    fn failed(&mut self, ended: Ended) -> Result<Option<Lease>, Refusal> {
        let metrics = &self.call.lane.recorder.metrics;
        let failure = ended.verdict(true).failure;
        let left = self.call.until - Instant::now();
        let wait = match self.call.lane.may_repeat(&self.seek, failure, self.attempts, left) {
            Ok(wait) => wait,
            Err(why) => {
                metrics.not_repeated(why);
                return Err(ended.refusal());
            }
        };
        let why = if failure == Failure::Unseen { Again::Unseen } else { Again::Died };
        if !wait.is_zero() {
            self.wait(Due::Retry(why), wait, Instant::now());
            return Ok(None);
        }
        self.again(why).map(Some).map_err(|_| {
            metrics.not_repeated(NotAgain::NoOther);
            ended.refusal()
        })
    }

    /// Takes a pod for a retry that the budget has allowed.
    fn again(&mut self, why: Again) -> Result<Lease, Refusal> {
        let lease = self.take()?;
        self.retries += 1;
        self.call.shared.metrics.retries.inc();
        self.call.lane.recorder.metrics.repeated(why);
        self.wait_until_overdue(Instant::now());
        Ok(lease)
    }

    fn wait_until_overdue(&mut self, now: Instant) {
        let half = (self.call.until - now) / 2;
        self.wait(Due::Beside, self.seek.overdue_after().unwrap_or(half), now);
    }

    fn wait(&mut self, due: Due, time: Duration, now: Instant) {
        let at = now.checked_add(time).filter(|at| *at < self.call.until);
        (self.due, self.at) = at.map_or((Due::End, self.call.until), |at| (due, at));
    }

    /// What is left, if something can still come of it.
    fn left(&self) -> Result<Duration, Refusal> {
        let left = self.call.until - Instant::now();
        if left < SHORTEST_USEFUL { Err(Refusal::Deadline) } else { Ok(left) }
    }
}
