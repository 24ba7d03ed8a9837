//! One call to one gateway of another region, and what its end means.
//!
//! The rule: what goes there is set here and nowhere else. The call is signed for that region alone, and bounded by
//! the request's deadline; dropped, its stream is reset.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AGE, CACHE_CONTROL};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use spillway_core::cache::control::Wish;
use spillway_core::failover::{Passage, passage};
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_runtime::forwarding::{self, FORWARDED};
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::upstream::{OipBody, Upstream, UpstreamError};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Code;

use crate::answer::{PUSHBACK, REGION, SERVER_TIMING};
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::peers::concern::Concern;
use crate::pods::attempt::{PodAnswer, Said, Taken, Whole, oip_request, read_whole};
use crate::pods::judge::Ended;
use crate::request::memory::Part;
use crate::shared::Shared;

/// A region that does not say for how long it has no room.
const PUSHED_BACK: Duration = Duration::from_secs(1);
/// A peer's own code that says nothing of the request: our certificate changed between signature and call.
const UNSIGNED: &str = "forwarded-unsigned";
/// The code of a pod that had the request and went away: the request may be why.
const POD_LOST: &str = "pod-lost";

/// What is forwarded, whichever gateway gets it.
pub struct Outgoing<'a> {
    pub shared: &'a Shared,
    pub trace: &'a TraceParent,
    pub class: Class,
    pub wish: Wish,
    pub path: &'static str,
    pub until: Instant,
}

/// What came of a call without an answer.
#[derive(Debug)]
pub enum Came {
    /// The request is wrong, and would be wrong anywhere.
    Wrong(Refusal),
    /// Another gateway of the region may have it: this one was not reached, or lost it.
    Unreachable,
    Lost,
    /// The region does not want it.
    Refused,
    /// It has no room, for so long.
    Overloaded(Duration),
    /// It has no room for more of this tenant, which asks for more than its share, for so long.
    OverShare(Duration),
    /// The tenant has as many requests there as it may have.
    TenantFull,
    /// It failed there. Nobody else is asked: it would fail again.
    Failed,
    /// There was no time left.
    TooLate,
}

/// What a region says beside its answer.
#[derive(Debug, Default)]
pub struct Told {
    pub region: Option<HeaderValue>,
    pub timing: Option<HeaderValue>,
    /// Of an answer that was kept there.
    pub age: Option<Duration>,
}

impl Came {
    /// For a metric's label.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Wrong(_) => "wrong-request",
            Self::Unreachable => "unreachable",
            Self::Lost => "lost",
            Self::Refused => "refused",
            Self::Overloaded(_) | Self::OverShare(_) => "overloaded",
            Self::TenantFull => "tenant-full",
            Self::Failed => "failed",
            Self::TooLate => "deadline",
        }
    }
}

/// Calls a gateway of `region` with this message, in pieces. `part`: the memory that the answer takes.
pub async fn attempt(
    outgoing: &Outgoing<'_>,
    frame: &[Bytes],
    exchange: &Exchange,
    region: &Name,
    upstream: &Upstream,
    part: &mut Part<'_>,
) -> Result<(PodAnswer, Told), Came> {
    let left = reach(outgoing, upstream).await?;
    let body = OipBody::segments(frame.to_vec());
    let request = request(outgoing, exchange, region, Some(left), body).ok_or(Came::Refused)?;
    let called = async {
        let response = upstream.call(request).await.map_err(Ended::Call)?;
        read_whole(outgoing.shared, response, part).await
    };
    let late = Err(Ended::Call(UpstreamError::Deadline { sent: true }));
    let whole = timeout_at(outgoing.until, called).await.unwrap_or(late);
    let answered = whole.map_err(Failed::from).and_then(|whole| answer(outgoing, whole));
    answered.map_err(|Failed { ended, beside }| judge(ended, beside))
}

/// Opens a stream to a gateway of `region`, and returns when it has taken it with its first message. `lasts`: how long
/// the client has it last; none: it did not say.
pub async fn open(
    outgoing: &Outgoing<'_>,
    first: Bytes,
    lasts: Option<Duration>,
    exchange: &Exchange,
    region: &Name,
    upstream: &Upstream,
) -> Result<Taken, Came> {
    reach(outgoing, upstream).await?;
    let (sender, body) = OipBody::stream();
    let request = request(outgoing, exchange, region, lasts, body).ok_or(Came::Refused)?;
    // It has room for the first; if the call fails, that says why.
    let _ = sender.send(first).await;
    let late = Err(UpstreamError::Deadline { sent: true });
    let response = timeout_at(outgoing.until, upstream.call(request)).await.unwrap_or(late);
    let response = response.map_err(|error| judge(Ended::Call(error), Beside::default()))?;
    let beside = Beside::of(response.headers());
    Taken::of(sender, response).map_err(|ended| judge(ended, beside))
}

/// Connects, if there is no connection. What time is left then.
async fn reach(outgoing: &Outgoing<'_>, upstream: &Upstream) -> Result<Duration, Came> {
    let left = || outgoing.until.saturating_duration_since(Instant::now());
    // A gateway that does not answer a connect leaves time for another one.
    match timeout(left() / 2, upstream.connect()).await {
        Ok(Ok(())) => Ok(left()),
        Ok(Err(_)) | Err(_) => Err(Came::Unreachable),
    }
}

/// What a region says beside its refusal.
#[derive(Clone, Copy, Debug, Default)]
struct Beside {
    /// When it may be asked again.
    after: Option<Duration>,
    /// None: everybody.
    concern: Option<Concern>,
}

impl Beside {
    fn of(head: &HeaderMap) -> Self {
        Self { after: number(head, &PUSHBACK).map(Duration::from_millis), concern: Concern::read(head) }
    }
}

/// A call that brought no answer.
struct Failed {
    ended: Ended,
    beside: Beside,
}

impl From<Ended> for Failed {
    fn from(ended: Ended) -> Self {
        Self { ended, beside: Beside::default() }
    }
}

fn answer(outgoing: &Outgoing<'_>, whole: Whole) -> Result<(PodAnswer, Told), Failed> {
    let beside = Beside::of(&whole.head);
    whole.check().map_err(|ended| Failed { ended, beside })?;
    let told = Told {
        region: whole.head.get(REGION).cloned(),
        timing: whole.head.get(SERVER_TIMING).and_then(model_timing),
        age: number(&whole.head, &AGE).map(Duration::from_secs),
    };
    let (frame, response) = whole.decode(outgoing.shared).map_err(|problem| {
        tracing::warn!(%problem, "another region's answer could not be read");
        Ended::Unreadable
    })?;
    // Which changes of features the region knew of does not compare with what is known here.
    Ok((PodAnswer { frame, response, said: Said::default() }, told))
}

fn judge(ended: Ended, beside: Beside) -> Came {
    match &ended {
        Ended::Call(UpstreamError::Unreachable(_) | UpstreamError::Refused) => Came::Unreachable,
        Ended::Call(UpstreamError::Lost(_)) => Came::Lost,
        Ended::Call(UpstreamError::Deadline { .. }) => Came::TooLate,
        Ended::Http(_) | Ended::Unreadable | Ended::NoRoom => Came::Failed,
        Ended::Said { status, code, .. } => match status {
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => Came::Wrong(ended.refusal()),
            Code::PermissionDenied if code == UNSIGNED => Came::Lost,
            Code::PermissionDenied | Code::Unauthenticated | Code::NotFound | Code::Unimplemented => Came::Refused,
            Code::Unavailable if code == POD_LOST => Came::Failed,
            Code::ResourceExhausted | Code::Unavailable => {
                let after = beside.after.unwrap_or(PUSHED_BACK);
                match beside.concern {
                    None => Came::Overloaded(after),
                    Some(Concern::Share) => Came::OverShare(after),
                    Some(Concern::Bound) => Came::TenantFull,
                    Some(Concern::Time) => Came::TooLate,
                }
            }
            Code::DeadlineExceeded => Came::TooLate,
            _ => Came::Failed,
        },
    }
}

/// `None`: nobody can be told who asks.
fn request(
    outgoing: &Outgoing<'_>,
    exchange: &Exchange,
    region: &Name,
    left: Option<Duration>,
    body: OipBody,
) -> Option<Request<OipBody>> {
    let (shared, caller) = (outgoing.shared, exchange.caller.as_ref()?);
    let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok().map(whole_milliseconds);
    let issued = since_epoch(SystemTime::now())?;
    let passage = Passage {
        client: caller.peer.id.clone(),
        serial: caller.peer.serial.clone(),
        not_after: since_epoch(caller.peer.not_after)?,
        class: outgoing.class,
        from: shared.region.clone(),
        to: region.clone(),
        path: outgoing.path.to_owned(),
        request_id: exchange.request_id.as_ref()?.to_str().ok()?.to_owned(),
        issued,
        expires: issued + passage::LIFE,
        hops: 1,
    };
    let token = forwarding::issue(&shared.workload, &passage)
        .inspect_err(|error| tracing::error!(%error, "a request cannot be forwarded"))
        .ok()?;
    let mut request = oip_request(outgoing.path, exchange, outgoing.trace, left, body);
    let headers = request.headers_mut();
    headers.insert(FORWARDED, HeaderValue::from_str(&token).ok()?);
    if outgoing.wish != Wish::default() {
        // Whatever it wishes of stored answers was asked of those that are stored here.
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    }
    Some(request)
}

fn whole_milliseconds(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// What the model took there, of all that its gateway says: the rest would stand beside ours under the same names.
fn model_timing(timing: &HeaderValue) -> Option<HeaderValue> {
    let parts = timing.to_str().ok()?.split(',').map(str::trim);
    let of_model = |part: &&str| ["features;", "model;", "fallback;"].iter().any(|name| part.starts_with(name));
    let kept: Vec<&str> = parts.filter(of_model).collect();
    (!kept.is_empty()).then(|| HeaderValue::from_str(&kept.join(", ")).ok())?
}

/// Digits only; anything else was not said.
fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_regions_refusal_means() {
        let said = |status, code: &'static str| Ended::Said { status, code: code.into(), message: String::new() };
        for (ended, concern, word) in [
            (said(Code::InvalidArgument, "model-rejected"), None, "wrong-request"),
            (said(Code::FailedPrecondition, "missing-feature"), None, "wrong-request"),
            (said(Code::PermissionDenied, "forwarded-residence"), None, "refused"),
            (said(Code::PermissionDenied, "forwarded-unsigned"), None, "lost"),
            (said(Code::NotFound, "unknown-model"), None, "refused"),
            (said(Code::Unavailable, "overloaded"), None, "overloaded"),
            (said(Code::Unavailable, "overloaded"), Some(Concern::Share), "overloaded"),
            (said(Code::Unavailable, "overloaded"), Some(Concern::Bound), "tenant-full"),
            (said(Code::Unavailable, "overloaded"), Some(Concern::Time), "deadline"),
            (said(Code::Unavailable, "no-pod"), None, "overloaded"),
            (said(Code::Unavailable, "pod-lost"), None, "failed"),
            (said(Code::ResourceExhausted, "rate-limited"), None, "overloaded"),
            (said(Code::DeadlineExceeded, "deadline-exceeded"), None, "deadline"),
            (said(Code::Internal, "model-failed"), None, "failed"),
            (Ended::Unreadable, None, "failed"),
            (Ended::Call(UpstreamError::Refused), None, "unreachable"),
            (Ended::Call(UpstreamError::Deadline { sent: true }), None, "deadline"),
        ] {
            let shown = format!("{ended:?}");
            let beside = Beside { concern, ..Beside::default() };
            assert_eq!(judge(ended, beside).word(), word, "{shown}");
        }
    }

    #[test]
    fn whose_the_rest_is_and_how_long() {
        let overloaded =
            || Ended::Said { status: Code::Unavailable, code: "overloaded".into(), message: String::new() };
        let after = Duration::from_millis(700);
        let judged = |concern| judge(overloaded(), Beside { after: Some(after), concern });
        assert!(matches!(judged(None), Came::Overloaded(for_long) if for_long == after));
        assert!(matches!(judged(Some(Concern::Share)), Came::OverShare(for_long) if for_long == after));
        assert!(matches!(judge(overloaded(), Beside::default()), Came::Overloaded(PUSHED_BACK)));
    }

    #[test]
    fn only_the_models_own_times_are_passed_on() {
        let timing = |text| model_timing(&HeaderValue::from_static(text));
        let told = timing("auth;dur=0.1, queue;dur=1.0, features;dur=0.2, model;dur=1.5, total;dur=3.1");
        assert_eq!(told.unwrap(), "features;dur=0.2, model;dur=1.5");
        assert_eq!(timing("auth;dur=0.1, total;dur=3.1"), None);
    }

    #[test]
    fn a_pushback_is_digits_alone() {
        let read = |text| number(&HeaderMap::from_iter([(PUSHBACK, HeaderValue::from_static(text))]), &PUSHBACK);
        assert_eq!(read("250"), Some(250));
        assert_eq!((read("-1"), read("1.5"), read("")), (None, None, None));
    }
}
