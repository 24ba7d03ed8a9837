//! What is done with what operators ask for. Of the leader alone, one thing at a time.
//!
//! The rule: what changes nothing makes no version, and what a node would refuse is refused here. Whatever is done or
//! refused is in the audit log with who asked for it.

use std::sync::Arc;

use spillway_core::identity::SpiffeId;
use spillway_core::intent::changes::{self, Counts};
use spillway_core::intent::orders::{self, Unfit};
use spillway_core::intent::{Change, Source, compile};
use spillway_core::resource::Fault;
use spillway_core::rollout::semantics::MOST_BYTES;
use spillway_core::rollout::{Confirmed, Contents, Held, Offer, Unsafe, check};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::{ByteSize, Name};
use spillway_proto::control;
use spillway_runtime::audit::{Audit, Event, clipped};
use spillway_runtime::telemetry::Chain;
use tokio::sync::Mutex;

use super::content::{self, set};
use super::drills::Drills;
use super::overrides::{Overrides, order, said, since_1970};
use super::status::Events;
use super::versions::Versions;
use super::{Origin, Version};
use crate::leading::Leading;
use crate::store::{Fence, Leader, StoreError};

/// Bytes of a message for the history.
const MOST_MESSAGE: usize = 4_096;

/// Why what was asked for is not done.
#[derive(Debug, thiserror::Error)]
pub enum IntentError {
    /// Nobody's: it is for the leader to do.
    #[error("this node does not lead")]
    NotLeading(Option<Leader>),
    #[error("the current version is {current}; {expected} was expected")]
    NotExpected { expected: u64, current: u64 },
    #[error("there is no version {0}")]
    NoVersion(u64),
    #[error("there is no override for the region '{0}'")]
    NoOverride(Name),
    #[error("nothing was applied yet")]
    Nothing,
    #[error("{0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("every node would refuse it: {}", listed(.0))]
    Unsafe(Vec<Unsafe>),
    #[error("the resources of version {to} are not valid any more: {}", listed(.faults))]
    Outdated { to: u64, faults: Vec<Fault> },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the drill {drill} runs, by {author}; one at a time")]
    DrillRuns { drill: String, author: String },
    #[error("it came to no end")]
    Lost(#[source] tokio::task::JoinError),
}

pub struct Desk {
    pub versions: Arc<Versions>,
    pub overrides: Arc<Overrides>,
    pub leading: Arc<Leading>,
    pub audit: Audit,
    pub events: Events,
    pub drills: Drills,
    /// One change after the other.
    turn: Mutex<()>,
}

/// A version that is not there yet.
struct Draft {
    version: Version,
    changes: Vec<Change>,
}

impl Desk {
    pub fn new(
        versions: Arc<Versions>,
        overrides: Arc<Overrides>,
        leading: Arc<Leading>,
        audit: Audit,
        events: Events,
        drills: Drills,
    ) -> Self {
        Self { versions, overrides, leading, audit, events, drills, turn: Mutex::default() }
    }

    /// A dry run needs no leader: it says what would be by what this node knows.
    pub async fn apply(
        &self,
        author: &SpiffeId,
        request: control::ApplyRequest,
    ) -> Result<control::ApplyResponse, IntentError> {
        if request.dry_run {
            return self.draft(request).await?.map_or_else(Ok, |draft| Ok(draft.answer()));
        }
        let outcome = self.apply_in_turn(author, request).await;
        self.tell_refused(author, "apply", &outcome);
        if let Ok(control::ApplyResponse { faults, .. }) = &outcome
            && let [first, ..] = &faults[..]
        {
            let problem = format!("{} faults, the first: {first}", faults.len());
            self.refused(author, "apply", &problem);
        }
        outcome
    }

    async fn apply_in_turn(
        &self,
        author: &SpiffeId,
        request: control::ApplyRequest,
    ) -> Result<control::ApplyResponse, IntentError> {
        let fence = self.fence()?;
        let _turn = self.turn.lock().await;
        self.versions.refresh().await?;
        let message = request.message.clone();
        match self.draft(request).await? {
            Err(as_it_is) => Ok(as_it_is),
            Ok(draft) => self.publish(&fence, author, &message, draft).await,
        }
    }

    /// The version that a request asks for, or the answer where it asks for none: because of faults, or because it
    /// would change nothing.
    async fn draft(
        &self,
        request: control::ApplyRequest,
    ) -> Result<Result<Draft, control::ApplyResponse>, IntentError> {
        check_message(&request.message)?;
        let current = self.versions.current();
        let held = current.as_ref().map_or(0, |current| current.number);
        if let Some(expected) = request.expected_version
            && expected != held
        {
            return Err(IntentError::NotExpected { expected, current: held });
        }
        let next = self.versions.next();
        // A large one takes a while.
        let compiled = tokio::task::spawn_blocking(move || {
            let source = |file: control::SourceFile| Source { path: file.path, text: Ok(file.yaml) };
            let sources: Vec<Source> = request.files.into_iter().map(source).collect();
            let compiled = compile(next, &sources);
            compiled.map(|(resources, snapshot)| (content::resources(&resources), snapshot))
        });
        let (resources, snapshot) = match compiled.await.map_err(IntentError::Lost)? {
            Ok(compiled) => compiled,
            Err(faults) => {
                let faults = faults.iter().map(ToString::to_string).collect();
                return Ok(Err(control::ApplyResponse { version: held, faults, ..Default::default() }));
            }
        };
        let draft = Draft::new(current.as_deref(), Origin::Applied, resources, snapshot, request.confirmed_empty)?;
        Ok(draft.ok_or(control::ApplyResponse { version: held, ..Default::default() }))
    }

    pub async fn rollback(
        &self,
        author: &SpiffeId,
        request: control::RollbackRequest,
    ) -> Result<control::ApplyResponse, IntentError> {
        let outcome = self.rollback_in_turn(author, request).await;
        self.tell_refused(author, "rollback", &outcome);
        outcome
    }

    async fn rollback_in_turn(
        &self,
        author: &SpiffeId,
        request: control::RollbackRequest,
    ) -> Result<control::ApplyResponse, IntentError> {
        let fence = self.fence()?;
        let _turn = self.turn.lock().await;
        check_message(&request.message)?;
        let current = self.versions.refresh().await?.ok_or(IntentError::Nothing)?;
        let to = request.version;
        let old = self.versions.version(to).await?.ok_or(IntentError::NoVersion(to))?;
        let next = self.versions.next();
        let compiled = tokio::task::spawn_blocking({
            let old = old.clone();
            move || content::compile(next, &old.resources)
        });
        let compiled = compiled.await.map_err(IntentError::Lost)?;
        let snapshot = compiled.map_err(|faults| IntentError::Outdated { to, faults })?;
        let (resources, confirmed) = (old.resources.clone(), old.confirmed_empty.clone());
        match Draft::new(Some(&current), Origin::RolledBack { to }, resources, snapshot, confirmed)? {
            None => Ok(control::ApplyResponse { version: current.number, ..Default::default() }),
            Some(draft) => self.publish(&fence, author, &request.message, draft).await,
        }
    }

    async fn publish(
        &self,
        fence: &Fence,
        author: &SpiffeId,
        message: &str,
        draft: Draft,
    ) -> Result<control::ApplyResponse, IntentError> {
        let answer = draft.answer();
        let counts = Counts::of(&draft.changes);
        let unix_ms = i64::try_from(since_1970().as_millis()).unwrap_or(i64::MAX);
        let header = draft.version.header(unix_ms, &author.to_string(), message, counts);
        let version = self.versions.append(fence, draft.version, &header).await?;
        self.audit.record(Event::IntentApplied {
            version: version.number,
            sha256: spillway_runtime::audit::Hash::of(&version.encoded),
            author: author.to_string(),
            message: clipped(&message),
            rolled_back_to: header.rolled_back_to,
            added: counts.added,
            changed: counts.changed,
            removed: counts.removed,
        });
        let what = match version.origin {
            Origin::Applied => "applied".to_owned(),
            Origin::RolledBack { to } => format!("with the content of version {to}"),
        };
        self.events.tell(&format!("version {} {what} by {author}", version.number));
        Ok(answer)
    }

    pub async fn set_override(
        &self,
        author: &SpiffeId,
        message: control::Override,
    ) -> Result<control::Overrides, IntentError> {
        let outcome = self.set_override_in_turn(author, message).await;
        self.tell_refused(author, "override", &outcome);
        outcome
    }

    async fn set_override_in_turn(
        &self,
        author: &SpiffeId,
        message: control::Override,
    ) -> Result<control::Overrides, IntentError> {
        let fence = self.fence()?;
        let _turn = self.turn.lock().await;
        let region = Name::parse(&message.region).map_err(|_| IntentError::Malformed("the region is no name"))?;
        let wanted = order(&message).ok_or(IntentError::Malformed("expected drain, a weight or force-in"))?;
        let current = self.versions.refresh().await?.ok_or(IntentError::Nothing)?;
        self.overrides.refresh().await?;
        let now = since_1970();
        let planned = current.snapshot.regions.iter().map(|(name, region)| (name.clone(), region.weight)).collect();
        let in_force = self.overrides.holding(now);
        let in_force = in_force.iter().filter_map(|(name, found)| Some((name.clone(), order(found)?))).collect();
        orders::check(&region, &wanted, &planned, &in_force, now)?;
        let message = control::Override { author: author.to_string(), ..message };
        self.overrides.set(&fence, &region, &message).await?;
        let act = said(wanted.act);
        self.events.tell(&format!("{region}: {act}, ordered by {author}: {}", clipped(&message.reason)));
        self.audit.record(Event::OverrideSet {
            region: region.to_string(),
            act,
            until: (std::time::SystemTime::UNIX_EPOCH + wanted.until).into(),
            reason: message.reason,
            author: author.to_string(),
        });
        Ok(self.holding())
    }

    pub async fn lift_override(&self, author: &SpiffeId, region: &str) -> Result<control::Overrides, IntentError> {
        let outcome = self.lift_override_in_turn(author, region).await;
        self.tell_refused(author, "lift", &outcome);
        outcome
    }

    async fn lift_override_in_turn(&self, author: &SpiffeId, region: &str) -> Result<control::Overrides, IntentError> {
        let fence = self.fence()?;
        let _turn = self.turn.lock().await;
        let region = Name::parse(region).map_err(|_| IntentError::Malformed("the region is no name"))?;
        if !self.overrides.lift(&fence, &region).await? {
            return Err(IntentError::NoOverride(region));
        }
        self.events.tell(&format!("{region}: its override was lifted by {author}"));
        self.audit.record(Event::OverrideEnded { region: region.to_string(), author: Some(author.to_string()) });
        Ok(self.holding())
    }

    /// Takes note of a drill. `direct`: its controller asked this node itself.
    pub fn set_drill(
        &self,
        author: &SpiffeId,
        request: control::SetDrillRequest,
        direct: bool,
    ) -> Result<control::Drills, IntentError> {
        self.may_take_note(direct)?;
        let outcome = self.drills.set(author, request, (&self.audit, &self.events));
        self.tell_refused(author, "drill", &outcome);
        outcome.map(|()| control::Drills { drills: self.drills.shown() })
    }

    pub fn end_drill(
        &self,
        author: &SpiffeId,
        request: &control::EndDrillRequest,
        direct: bool,
    ) -> Result<control::Drills, IntentError> {
        self.may_take_note(direct)?;
        self.drills.end(author, request, (&self.audit, &self.events));
        Ok(control::Drills { drills: self.drills.shown() })
    }

    /// Who does not lead does so only for who asks it itself, where nobody is known to lead.
    fn may_take_note(&self, direct: bool) -> Result<(), IntentError> {
        if direct { Ok(()) } else { self.fence().map(|_| ()) }
    }

    /// The overrides that hold now.
    pub fn holding(&self) -> control::Overrides {
        control::Overrides { overrides: self.overrides.holding(since_1970()).into_values().collect() }
    }

    fn fence(&self) -> Result<Fence, IntentError> {
        self.leading.fence().ok_or_else(|| IntentError::NotLeading(self.leading.leader()))
    }

    fn tell_refused<T>(&self, author: &SpiffeId, action: &'static str, outcome: &Result<T, IntentError>) {
        match outcome {
            // Another node does it, and tells.
            Ok(_) | Err(IntentError::NotLeading(_)) => {}
            Err(error) => self.refused(author, action, &Chain(error).to_string()),
        }
    }

    fn refused(&self, author: &SpiffeId, action: &'static str, problem: &str) {
        let (author, problem) = (author.to_string(), clipped(&problem));
        tracing::warn!(author, action, problem, "refused");
        self.audit.record(Event::IntentRefused { author, action, problem });
    }
}

impl Draft {
    /// None where nothing would change. Refused is what every node would refuse.
    fn new(
        current: Option<&Version>,
        origin: Origin,
        resources: Vec<control::Resource>,
        snapshot: Snapshot,
        confirmed: Vec<control::ResourceName>,
    ) -> Result<Option<Self>, IntentError> {
        let before = current.map(Version::set).unwrap_or_default();
        let changes = changes::changes(&before, &set(&resources));
        if changes.is_empty() {
            return Ok(None);
        }
        let contents = contents(&snapshot);
        let carried = current.map(|current| current.confirmed_empty.as_slice()).unwrap_or_default();
        let confirmed_empty = still_empty(confirmed, carried, &contents);
        let version = Version::new(origin, resources, snapshot, confirmed_empty);
        let held = current.map(|current| (current.number, self::contents(&current.snapshot)));
        let offer = Offer {
            version: version.number,
            epoch: 0,
            size: ByteSize(version.encoded.len() as u64),
            resync: false,
            contents: &contents,
            confirmed: &confirmations(&version.confirmed_empty)?,
        };
        let serving = held.as_ref().map(|(number, contents)| (*number, contents));
        check(&offer, &Held { serving, epoch: 0 }, MOST_BYTES).map_err(IntentError::Unsafe)?;
        Ok(Some(Self { version, changes }))
    }

    fn answer(&self) -> control::ApplyResponse {
        let change = |change: &Change| control::Change {
            resource: Some(control::ResourceName { kind: change.kind.clone(), name: change.name.clone() }),
            before_json: change.before.clone().unwrap_or_default(),
            after_json: change.after.clone().unwrap_or_default(),
        };
        control::ApplyResponse {
            version: self.version.number,
            changes: self.changes.iter().map(change).collect(),
            faults: Vec::new(),
        }
    }
}

fn contents(snapshot: &Snapshot) -> Contents {
    Contents::of(snapshot, |region| snapshot.regions.get(region).map_or(0.0, |region| region.weight))
}

/// What is confirmed now, and what was confirmed for the version before and is still so: a node that missed that one
/// must take this one too.
fn still_empty(
    mut confirmed: Vec<control::ResourceName>,
    before: &[control::ResourceName],
    contents: &Contents,
) -> Vec<control::ResourceName> {
    let pools = || contents.pools.iter();
    let empty = |resource: &&control::ResourceName| match &*resource.kind {
        "Pool" => pools().any(|(name, pool)| name.as_str() == resource.name && !pool.has_pods),
        _ => !pools().any(|(_, pool)| pool.region.as_str() == resource.name && pool.has_pods),
    };
    confirmed.extend(before.iter().filter(empty).cloned());
    confirmed.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    confirmed.dedup();
    confirmed
}

fn confirmations(named: &[control::ResourceName]) -> Result<Confirmed, IntentError> {
    let mut confirmed = Confirmed::default();
    for control::ResourceName { kind, name } in named {
        let name = Name::parse(name).map_err(|_| IntentError::Malformed("what is confirmed to be empty is no name"))?;
        match &**kind {
            "Region" => confirmed.regions.insert(name),
            "Pool" => confirmed.pools.insert(name),
            _ => return Err(IntentError::Malformed("only a Pool or a Region can be confirmed to be empty")),
        };
    }
    Ok(confirmed)
}

fn check_message(message: &str) -> Result<(), IntentError> {
    const TOO_LONG: IntentError = IntentError::Malformed("the message has more than 4096 bytes");
    if message.len() > MOST_MESSAGE { Err(TOO_LONG) } else { Ok(()) }
}

fn listed<T: std::fmt::Display>(problems: &[T]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
