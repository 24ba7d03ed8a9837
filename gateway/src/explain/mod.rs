//! What a request would meet, told by the gateway that would serve it, without sending it: `POST /explain` of
//! the admin port, and `spillway explain`.
//!
//! The body, and the headers that mean something, are those of the REST request; the URL says who asks and for
//! which model: `?as=SPIFFE_ID` or `?tenant=NAME&client=NAME`, `&model=NAME`, and where wanted `&version=NAME`,
//! `&address=IP` (of the client).
//!
//! The rule: it takes a request's steps in their order, decides with the same code, and changes nothing: no
//! token, count, place or turn is taken. It tells of this moment and this gateway: Redis is not asked, and a pod
//! that is found by chance is one that might be it; so is a region, where nothing but chance is between two.
//!
//! * [`who`]: who asks, and for what. [`told`]: the shape of what is told.

mod told;
mod who;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use http::header::{CACHE_CONTROL, HOST};
use http::{HeaderMap, StatusCode};
use pingora_http::RequestHeader;
use serde_json::{Value, json};
use spillway_core::deadline::{self, decided, parse_timeout_parameter};
use spillway_core::failover::{MayLeave, NoPeer, Peer, Stranded, peers_for, unfit};
use spillway_core::inference::json::decode_request;
use spillway_core::inference::{Entities, InferRequest};
use spillway_core::limit::Class;
use spillway_core::policy::{Misfit, Principal, considered, principal};
use spillway_core::resilience::{Level, Step};
use spillway_core::resource::{Action, Model};
use spillway_core::routing::{Policy, Reason, key_hash};
use spillway_core::units::Name;
use spillway_runtime::admin;
use spillway_runtime::tls::PeerError;
use tokio::runtime::Handle;

use crate::admission::view::{WouldAdmit, WouldTake};
use crate::admission::{Ask, Why, priority};
use crate::degrade::Question;
use crate::errors::Refusal;
use crate::infer::{check, permitted};
use crate::peers::cause::Cause;
use crate::peers::links::{PeerRegion, Sight};
use crate::pods::fleet::Fleet;
use crate::pods::lane::{Lane, NoPod};
use crate::request::head::Head;
use crate::request::inflate::inflate;
use crate::results::view::{Finds, WouldFind};
use crate::results::{self, Asked};
use crate::shared::Shared;
use told::{
    AccessPart, CachePart, CallerPart, ClassPart, DeadlinePart, DegradationPart, Explanation, ModelPart, Outcome,
    PeerPart, PeersPart, PodPart, RequestPart, Source, Unfit,
};
use who::Who;

/// Policies that are named, of each kind.
const MOST_POLICIES: usize = 20;
/// How long other regions' gateways may take to be reached.
const REACH: Duration = Duration::from_secs(1);
/// Pods that are named beside the one that gets the request.
const MOST_PODS: usize = 2;

/// `POST /explain` of the admin port.
pub fn action(shared: Arc<Shared>) -> admin::Action {
    let most_body = shared.limits.request.body;
    let run = move |asked: admin::Asked| -> BoxFuture<'static, (StatusCode, Value)> {
        let shared = shared.clone();
        Box::pin(async move {
            let failed = |status, problem: &str| (status, json!({ "error": problem }));
            let Some(fleet) = shared.book.newest() else {
                return failed(StatusCode::SERVICE_UNAVAILABLE, "the gateway has just begun; again in a second");
            };
            let trust_domain = shared.workload.id().trust_domain;
            let who = match Who::read(&asked.query, &trust_domain) {
                Ok(who) => who,
                Err(problem) => return failed(StatusCode::BAD_REQUEST, &problem),
            };
            // These ways are this thread's own: whether they are open is known once they were tried.
            let _ = tokio::time::timeout(REACH, fleet.peers.open()).await;
            // A large body takes long to read, and this thread looks after the pods.
            let explained = tokio::task::spawn_blocking(move || explain(&shared, &fleet, &who, asked));
            match explained.await {
                Ok(explanation) => (StatusCode::OK, serde_json::to_value(explanation).unwrap_or_default()),
                Err(_) => failed(StatusCode::INTERNAL_SERVER_ERROR, "the explanation failed; please report this"),
            }
        })
    };
    admin::Action { path: "/explain", word: "explain", most_body, run: Arc::new(run) }
}

fn explain(shared: &Shared, fleet: &Fleet, who: &Who, asked: admin::Asked) -> Explanation {
    let mut told = Explanation {
        region: shared.region.to_string(),
        gateway: shared.name.to_string(),
        snapshot: fleet.snapshot.version,
        ..Explanation::default()
    };
    let outcome = walk(shared, fleet, who, asked, &mut told);
    told.outcome = outcome.unwrap_or_else(|refusal| Outcome::refused(&refusal));
    told
}

/// A request's way to where it is read and known to be valid; then [`Valid::meet`].
fn walk(
    shared: &Shared,
    fleet: &Fleet,
    who: &Who,
    asked: admin::Asked,
    told: &mut Explanation,
) -> Result<Outcome, Refusal> {
    let admin::Asked { headers, body, .. } = asked;
    let snapshot = &*fleet.snapshot;
    told.caller = Some(CallerPart { id: who.id.to_string(), tenant: None, client: None });
    let head = read_head(&headers)?;
    if snapshot.revoked.ids.contains(&who.id) {
        let refused = Outcome::refused(&Refusal::Untrusted(PeerError::Revoked));
        return Ok(Outcome { why: PeerError::Revoked.to_string(), ..refused });
    }
    let principal = principal(snapshot, &shared.region, &who.id)?;
    told.caller = Some(CallerPart {
        id: who.id.to_string(),
        tenant: Some(principal.tenant.to_string()),
        client: Some(principal.client.to_string()),
    });
    let permitted = permitted(snapshot, &principal, &who.model, &who.version, Action::Infer);
    told.access = Some(access(fleet, &principal, who, !matches!(permitted, Err(Refusal::Denied(_)))));
    let (model, version) = permitted?;
    told.model = Some(ModelPart { name: who.model.clone(), version: version.to_string() });
    let (coding, header_length) = (head.coding()?, head.header_length()?);
    let limits = &shared.limits.request;
    let body = match coding {
        // The admin port takes such bodies one by one.
        Some(coding) => Handle::current().block_on(inflate(coding, body, limits.body, |_| Ok(())))?,
        None => body,
    };
    let request = decode_request(body, header_length, &who.model, &who.version, limits)?;
    let entities = check(model, &request)?;
    told.request = Some(RequestPart {
        entities: entities.ids().len(),
        input_bytes: request.inputs.iter().map(|input| input.data.len()).sum(),
    });
    let valid = Valid { shared, fleet, who, principal: &principal, model, request: &request, entities: &entities };
    valid.meet(&head, &headers, told)
}

/// A request that may be made, and has passed its checks.
struct Valid<'a> {
    shared: &'a Shared,
    fleet: &'a Fleet,
    who: &'a Who,
    principal: &'a Principal,
    model: &'a Model,
    request: &'a InferRequest,
    entities: &'a Entities,
}

/// What admission says.
struct Admitted {
    class: Class,
    /// Why the tenant's limits refuse it.
    limited: Option<Refusal>,
    /// Why there is no place for it.
    busy: Option<Refusal>,
}

impl Valid<'_> {
    /// Tells all that there is to be told, also beyond what refuses the request.
    fn meet(&self, head: &Head, headers: &HeaderMap, told: &mut Explanation) -> Result<Outcome, Refusal> {
        let Self { shared, fleet, principal, model, request, .. } = *self;
        let parameter = request.parameters.integer("timeout").and_then(parse_timeout_parameter);
        let asked = deadline::Asked { parameter, ..head.asked };
        let (time, source) = decided(asked, model.deadline, model.max_deadline);
        told.deadline = Some(DeadlinePart::of(time, source.as_str()));
        let until = Instant::now() + time;
        let admitted = self.admission(until, told);
        let snapshot = &*fleet.snapshot;
        let wish = results::wish(snapshot, &principal.tenant, model, headers);
        let (tenant, class) = (&principal.tenant, admitted.class);
        let asked = Asked { snapshot, tenant, model, request, entities: self.entities, wish, class, until };
        let would = shared.results.would_find(&asked);
        let (finds, waits) = (would.finds, would.waits);
        told.cache = Some(self.cache(would, headers));
        let level = shared.degradation.level(&request.model);
        let level = if model.allows(level.step) { level } else { Level::default() };
        told.degradation = Some(DegradationPart::of(level, model));
        let lane = fleet.lane(&request.model);
        told.peers = Some(self.peers(lane.map(|lane| &**lane), admitted.class, until));
        let found = lane.ok_or((Refusal::NoPod, "no-pool")).and_then(|lane| self.pod(lane));
        let pod = match found {
            Ok(part) => Ok(told.pod.insert(part).pod.clone().unwrap_or_default()),
            Err((refusal, none)) => {
                let pool = lane.map(|lane| lane.pool.name.to_string());
                told.pod = Some(PodPart { pool, none: Some(none), ..PodPart::default() });
                Err(refusal)
            }
        };

        // From here on it is decided as for a request.
        if let Some(refusal) = admitted.limited {
            return Err(refusal);
        }
        let Some(lane) = lane else {
            return leaves(told, Cause::NoPool).ok_or(Refusal::NoPod);
        };
        match finds {
            Finds::Fresh => return Ok(Outcome::of(Source::Cache, "its answer is stored and fresh")),
            Finds::Stale => {
                return Ok(Outcome::of(Source::Cache, "its answer is stored; a new one is fetched for others"));
            }
            Finds::Miss | Finds::IfError | Finds::Refused if asked.wish.only_if_cached => {
                return Err(Refusal::NotCached);
            }
            _ if waits => return Ok(Outcome::of(Source::Call, "the same is being asked for another request")),
            _ => {}
        }
        let question = Question { model, request, entities: self.entities, class: admitted.class, here: true };
        if level.step >= Step::FallbackModel
            && self.is_better_elsewhere()
            && let Some(outcome) = leaves(told, Cause::Degraded)
        {
            return Ok(outcome);
        }
        let here = || question.would_answer(shared.results.last_cached(&asked).is_some());
        if level.step >= Step::CachedPrediction
            && let Some(step) = here()
        {
            let why = format!("the model is at level {} of degradation", level.step.number());
            return Ok(Outcome::of(Source::Gateway, why).at(step));
        }
        let usable = lane.is_usable();
        if !usable && let Some(outcome) = leaves(told, Cause::Unusable) {
            return Ok(outcome);
        }
        let lowest = level.step == Step::StaticAnswer && admitted.class == Class::Low;
        let met = lowest.then_some(Refusal::LowestClass).or(admitted.busy).map_or(pod, Err);
        if let Err(refusal) = &met
            && let Some(outcome) = Cause::of(refusal, || usable).and_then(|cause| leaves(told, cause))
        {
            return Ok(outcome);
        }
        match met {
            Ok(pod) => {
                let asked_for = level.step.min(Step::FallbackModel);
                let asked_for = if model.allows(asked_for) { asked_for } else { Step::Normal };
                Ok(Outcome::of(Source::Pod, format!("pod '{pod}' is asked")).at(asked_for))
            }
            Err(refusal) if finds == Finds::IfError => {
                Ok(Outcome::of(Source::Cache, format!("a stale answer instead of: {refusal}")))
            }
            Err(refusal) => match here() {
                Some(step) => Ok(Outcome::of(Source::Gateway, format!("instead of: {refusal}")).at(step)),
                None => Err(refusal),
            },
        }
    }

    /// What the tenant's limits and the model's gate would say.
    fn admission(&self, until: Instant, told: &mut Explanation) -> Admitted {
        let Self { model, request, entities, principal, .. } = *self;
        let ask = Ask { tenant: &principal.tenant, name: &request.model, model, request, entities };
        let WouldAdmit { class, limits, gate } = self.shared.admission.would_admit(&ask, until);
        let highest = self.fleet.snapshot.tenants.get(&principal.tenant).map_or(Class::Low, |own| own.highest_class);
        let from = if priority(request) > 0 { "priority" } else { "tenant" };
        told.class = Some(ClassPart { class, from, highest: highest.name() });
        let refuses = gate.as_ref().and_then(|gate| Why::ALL.into_iter().find(|why| why.word() == gate.would));
        let admitted = Admitted {
            class: Class::parse(class).unwrap_or(Class::Low),
            limited: limited(&limits),
            busy: refuses.map(Refusal::busy),
        };
        (told.limits, told.gate) = (Some(limits), gate);
        admitted
    }

    fn cache(&self, would: WouldFind, headers: &HeaderMap) -> CachePart {
        let tenant = self.fleet.snapshot.tenants.get(&self.principal.tenant);
        let honoured = tenant.is_some_and(|tenant| tenant.honours_cache_control);
        let ignores_cache_control = would.finds != Finds::Off && !honoured && headers.contains_key(CACHE_CONTROL);
        CachePart { would, ignores_cache_control }
    }

    /// Other regions, as a request sees them that is stranded here.
    fn peers(&self, lane: Option<&Lane>, class: Class, until: Instant) -> PeersPart {
        let Self { shared, fleet, model, request, principal, .. } = *self;
        let (plan, may_leave) = (shared.plan(), self.may_leave());
        let sight = Sight {
            snapshot: &fleet.snapshot,
            plan: plan.as_deref(),
            rests: &shared.rests,
            model,
            model_name: &request.model,
            tenant: &principal.tenant,
            class,
            now: shared.clock.now(),
        };
        let stranded = Stranded {
            region: &shared.region,
            forwarded: false,
            may_leave,
            left: until.saturating_duration_since(Instant::now()),
            expected: lane.map_or(Duration::ZERO, |lane| lane.recent().p50),
            key: self.entities.ids().first().map_or(0, |entity| key_hash(entity)),
        };
        let seen = fleet.peers.seen(&sight);
        let (to, none) = match peers_for(&stranded, &seen) {
            Ok(regions) => (regions.into_iter().map(ToString::to_string).collect(), None),
            Err(why) => (Vec::new(), Some(why.as_str())),
        };
        let part = |peer: &Peer| {
            let (gateways, reachable) = fleet.peers.region(&peer.region).map_or((0, 0), PeerRegion::gateways);
            PeerPart {
                region: peer.region.to_string(),
                unfit: unfit(&stranded, peer).map(NoPeer::as_str),
                cost: peer.cost,
                round_trip_us: peer.round_trip.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
                headroom: peer.headroom,
                gateways,
                reachable,
            }
        };
        let regions = seen.iter().map(part).collect();
        PeersPart { may_leave: PeersPart::may_leave(may_leave), cause: None, to, none, regions }
    }

    fn may_leave(&self) -> &MayLeave {
        const STAYS: &MayLeave = &MayLeave::No;
        self.fleet.snapshot.tenants.get(&self.principal.tenant).map_or(STAYS, |tenant| &tenant.may_leave_region)
    }

    /// Whether some region's answers are not known to be degraded, too.
    fn is_better_elsewhere(&self) -> bool {
        let (rests, now) = (&self.shared.rests, self.shared.clock.now());
        let mut may = self.fleet.peers.names().filter(|region| self.may_leave().permits(region));
        may.any(|region| !rests.is_lesser(region, &self.request.model, now))
    }

    fn pod(&self, lane: &Lane) -> Result<PodPart, (Refusal, &'static str)> {
        let choice = lane.would_choose(self.entities, self.who.address).map_err(|none| {
            let word = match none {
                NoPod::Full => "full",
                NoPod::Gone => "gone",
            };
            (none.into(), word)
        })?;
        let policy = lane.model.traffic.routing.policy;
        let key = lane.key(self.entities, self.who.address);
        let placed_by = key.map(|_| if policy == Policy::SourceAddress { "address" } else { "entity" });
        let name = |index: usize| lane.pool.pods.get(index).map(|link| link.key().pod.to_string());
        let then = key.into_iter().flat_map(|key| lane.pool.ring.order(key)).filter(|pod| *pod != choice.pod);
        Ok(PodPart {
            pool: Some(lane.pool.name.to_string()),
            policy: Some(policy.as_str()),
            placed_by,
            pod: name(choice.pod),
            address: lane.pool.pods.get(choice.pod).map(|link| link.key().address.to_string()),
            reason: Some(choice.reason.as_str()),
            by_chance: matches!(choice.reason, Reason::LessLoaded | Reason::Spread | Reason::Turn),
            then: then.take(MOST_PODS).filter_map(name).collect(),
            none: None,
        })
    }
}

/// Another region is asked, if there is one that may have it.
fn leaves(told: &mut Explanation, cause: Cause) -> Option<Outcome> {
    let peers = told.peers.as_mut()?;
    let region = peers.to.first()?;
    peers.cause = Some(cause.word());
    Some(Outcome::of(Source::Peer, format!("region '{region}' is asked: here it is stranded ({})", cause.word())))
}

/// The head as it is read of a request; what belongs to the admin port is none of it.
fn read_head(headers: &HeaderMap) -> Result<Head, Refusal> {
    // Neither is anything that a client could get wrong.
    let mut request = RequestHeader::build("POST", b"/", None).map_err(|_| Refusal::Path)?;
    for (name, value) in headers.iter().filter(|(name, _)| **name != HOST && *name != admin::MEANT) {
        request.append_header(name, value).map_err(|_| Refusal::Path)?;
    }
    Head::read(&request)
}

/// The refusal by the limit that refuses for longest.
fn limited(limits: &[WouldTake]) -> Option<Refusal> {
    // Never is longer than any time.
    let wait = |limit: &WouldTake| limit.retry_after_ms.unwrap_or(u64::MAX);
    let longest = limits.iter().filter(|limit| !limit.passes).rev().max_by_key(|limit| wait(limit))?;
    let after = longest.retry_after_ms.map(Duration::from_millis);
    Some(Refusal::Limited { limit: Name::parse(&longest.limit).ok()?, after })
}

fn access(fleet: &Fleet, principal: &Principal, who: &Who, allowed: bool) -> AccessPart {
    let mut part = AccessPart { allowed, by: Vec::new(), others: Vec::new(), left_out: 0 };
    for (policy, misfits) in considered(&fleet.snapshot, principal, &who.model, &who.version, Action::Infer) {
        let policy = policy.to_string();
        if misfits.is_empty() && part.by.len() < MOST_POLICIES {
            part.by.push(policy);
        } else if !misfits.is_empty() && part.others.len() < MOST_POLICIES {
            part.others.push(Unfit { policy, unfit: misfits.into_iter().map(Misfit::as_str).collect() });
        } else {
            part.left_out += 1;
        }
    }
    part
}
