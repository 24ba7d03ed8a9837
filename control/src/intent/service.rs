//! The gRPC service for operators: it says who asks, has it done here or by the leader, and puts answers and errors
//! into gRPC's words.
//!
//! The rule: only operators that the settings name may call, and who they are is in their certificate.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use spillway_core::identity::{Role, SpiffeId};
use spillway_core::units::Name;
use spillway_proto::control::intent_server::{Intent, IntentServer};
use spillway_proto::control::{self, ApplyResponse, Overrides};
use spillway_runtime::audit::Denial;
use spillway_runtime::telemetry::{Chain, Metrics};
use spillway_runtime::tls::{Peer, Workload};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};

use super::desk::{Desk, IntentError};
use super::forward::{self, OPERATOR};
use super::status::StatusSource;
use crate::store::{Leader, Store, StoreError};
use crate::trail;

/// What one call may take, the leader's part included.
const WITHIN: Duration = Duration::from_secs(30);
/// How long the leader may take to tell its status before this node tells its own.
const LEADERS_STATUS: Duration = Duration::from_secs(1);
/// Bytes of a request: all resources.
const MOST_REQUEST: usize = 64 << 20;
/// Revisions of a history, and records of the audit trail, unless asked for otherwise.
const SHOWN: usize = 50;

/// Which operators may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operators {
    /// Whoever has an operator's certificate.
    Any,
    Listed(BTreeSet<Name>),
}

pub struct IntentService {
    desk: Arc<Desk>,
    store: Store,
    operators: Operators,
    workload: Arc<Workload>,
    status: Vec<Arc<dyn StatusSource>>,
    requests: Family<ByOutcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    action: &'static str,
    /// `ok` or a `spillway-error` code.
    outcome: &'static str,
}

/// Who asks.
struct Caller {
    author: SpiffeId,
    /// Not by way of another control node.
    direct: bool,
}

impl Operators {
    pub(crate) fn include(&self, name: &Name) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(names) => names.contains(name),
        }
    }
}

/// Who may come in at all: operators, and control nodes in their name.
pub fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    let role = matches!(peer.role, Role::Operator { .. } | Role::Control { .. });
    role && own.trust_domain == peer.trust_domain
}

impl IntentService {
    /// `status`: the parts that say how they stand. Counts `spillway_control_intent_requests_total`.
    pub fn new(
        desk: Arc<Desk>,
        store: Store,
        operators: Operators,
        workload: Arc<Workload>,
        status: Vec<Arc<dyn StatusSource>>,
        metrics: &Metrics,
    ) -> Self {
        let requests = metrics.family("control_intent_requests", "Operators' requests, by what became of them");
        Self { desk, store, operators, workload, status, requests }
    }

    pub fn into_server(self) -> IntentServer<Self> {
        IntentServer::new(self).max_decoding_message_size(MOST_REQUEST).max_encoding_message_size(usize::MAX)
    }

    fn caller<T>(&self, request: &Request<T>, action: &'static str) -> Result<Caller, Status> {
        let peer = request.extensions().get::<Arc<Peer>>().map(|peer| peer.id.clone());
        let own = self.workload.id();
        let named = || {
            let text = request.metadata().get(OPERATOR)?.to_str().ok()?;
            SpiffeId::parse(text).ok()
        };
        let caller = match peer.clone().filter(|peer| peer.trust_domain == own.trust_domain) {
            Some(id) if matches!(id.role, Role::Operator { .. }) => Some(Caller { author: id, direct: true }),
            Some(id) if matches!(id.role, Role::Control { .. }) => {
                named().map(|author| Caller { author, direct: false })
            }
            _ => None,
        };
        let allowed = |caller: &Caller| match &caller.author.role {
            Role::Operator { name } => caller.author.trust_domain == own.trust_domain && self.operators.include(name),
            _ => false,
        };
        if let Some(caller) = caller.filter(allowed) {
            return Ok(caller);
        }
        self.desk.audit.denied(|| Denial {
            id: peer.map(|peer| peer.to_string()),
            action: Some(action),
            code: "not-an-operator".into(),
            ..Denial::default()
        });
        self.count(action, "not-an-operator");
        Err(coded(Code::PermissionDenied, "not-an-operator", "expected an operator that this control plane names"))
    }

    /// Who leads instead of this node; for a caller who was sent on already, nobody.
    fn elsewhere(&self, caller: &Caller) -> Option<Leader> {
        let leading = &self.desk.leading;
        if !caller.direct || leading.fence().is_some() {
            return None;
        }
        leading.leader().filter(|leader| leader.node != *leading.node())
    }

    async fn done<T>(
        &self,
        action: &'static str,
        work: impl Future<Output = Result<T, IntentError>>,
    ) -> Result<Response<T>, Status> {
        let (outcome, answer) = match tokio::time::timeout(WITHIN, work).await {
            Ok(Ok(answer)) => ("ok", Ok(Response::new(answer))),
            Ok(Err(error)) => {
                tracing::debug!(action, error = %Chain(&error), "an operator's request was not done");
                let (code, word) = seen(&error);
                let text = match &error {
                    IntentError::NotLeading(Some(leader)) => format!("{error}; '{}' does", leader.node),
                    IntentError::NotLeading(None) => format!("{error}, and nobody is known to"),
                    error => error.to_string(),
                };
                (word, Err(coded(code, word, text)))
            }
            Err(_) => {
                ("deadline-exceeded", Err(coded(Code::DeadlineExceeded, "deadline-exceeded", "it took too long")))
            }
        };
        self.count(action, outcome);
        answer
    }

    /// Has the leader do it.
    async fn forwarded<T>(
        &self,
        action: &'static str,
        leader: &Leader,
        work: impl Future<Output = Option<Result<Response<T>, Status>>>,
    ) -> Result<Response<T>, Status> {
        let unreachable = || {
            let text = format!("'{}' leads, and cannot be reached from here", leader.node);
            coded(Code::Unavailable, "leader-unreachable", text)
        };
        let answer = tokio::time::timeout(WITHIN, work).await;
        let answer = answer.ok().flatten().unwrap_or_else(|| Err(unreachable()));
        self.count(action, if answer.is_ok() { "forwarded" } else { "forward-failed" });
        answer
    }

    fn count(&self, action: &'static str, outcome: &'static str) {
        self.requests.get_or_create(&ByOutcome { action, outcome }).inc();
    }
}

#[tonic::async_trait]
impl Intent for IntentService {
    async fn apply(&self, request: Request<control::ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let caller = self.caller(&request, "apply")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller).filter(|_| !message.dry_run) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.apply(request).await)
            };
            return self.forwarded("apply", &leader, work).await;
        }
        self.done("apply", self.desk.apply(&caller.author, message)).await
    }

    async fn get(&self, request: Request<control::GetRequest>) -> Result<Response<control::GetResponse>, Status> {
        self.caller(&request, "get")?;
        let control::GetRequest { kind, name, version } = request.into_inner();
        let work = async {
            let versions = &self.desk.versions;
            let found = match version {
                0 => versions.current().ok_or(IntentError::Nothing)?,
                number => versions.version(number).await?.ok_or(IntentError::NoVersion(number))?,
            };
            let meant = |resource: &&control::Resource| {
                (kind.is_empty() || resource.kind == kind) && (name.is_empty() || resource.name == name)
            };
            let resources = found.resources.iter().filter(meant).cloned().collect();
            Ok(control::GetResponse { version: found.number, resources })
        };
        self.done("get", work).await
    }

    async fn history(
        &self,
        request: Request<control::HistoryRequest>,
    ) -> Result<Response<control::HistoryResponse>, Status> {
        self.caller(&request, "history")?;
        let limit = match usize::try_from(request.into_inner().limit) {
            Ok(0) | Err(_) => SHOWN,
            Ok(limit) => limit,
        };
        let work = async {
            let headers = self.desk.versions.history().await?;
            let revisions = headers.iter().take(limit).map(|header| header.revision()).collect();
            Ok(control::HistoryResponse { revisions })
        };
        self.done("history", work).await
    }

    async fn audit(&self, request: Request<control::AuditRequest>) -> Result<Response<control::AuditResponse>, Status> {
        self.caller(&request, "audit")?;
        let limit = match usize::try_from(request.into_inner().limit) {
            Ok(0) | Err(_) => SHOWN,
            Ok(limit) => limit,
        };
        let work = async { Ok(control::AuditResponse { records: trail::newest(&self.store, limit).await? }) };
        self.done("audit", work).await
    }

    async fn rollback(&self, request: Request<control::RollbackRequest>) -> Result<Response<ApplyResponse>, Status> {
        let caller = self.caller(&request, "rollback")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.rollback(request).await)
            };
            return self.forwarded("rollback", &leader, work).await;
        }
        self.done("rollback", self.desk.rollback(&caller.author, message)).await
    }

    async fn set_override(&self, request: Request<control::Override>) -> Result<Response<Overrides>, Status> {
        let caller = self.caller(&request, "override")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.set_override(request).await)
            };
            return self.forwarded("override", &leader, work).await;
        }
        self.done("override", self.desk.set_override(&caller.author, message)).await
    }

    async fn lift_override(
        &self,
        request: Request<control::LiftOverrideRequest>,
    ) -> Result<Response<Overrides>, Status> {
        let caller = self.caller(&request, "lift")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.lift_override(request).await)
            };
            return self.forwarded("lift", &leader, work).await;
        }
        self.done("lift", self.desk.lift_override(&caller.author, &message.region)).await
    }

    async fn set_drill(&self, request: Request<control::SetDrillRequest>) -> Result<Response<control::Drills>, Status> {
        let caller = self.caller(&request, "drill")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.set_drill(request).await)
            };
            return self.forwarded("drill", &leader, work).await;
        }
        self.done("drill", async { self.desk.set_drill(&caller.author, message, caller.direct) }).await
    }

    async fn end_drill(&self, request: Request<control::EndDrillRequest>) -> Result<Response<control::Drills>, Status> {
        let caller = self.caller(&request, "end-drill")?;
        let message = request.into_inner();
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, message, WITHIN);
                Some(forward::to(&leader, &self.workload).await?.end_drill(request).await)
            };
            return self.forwarded("end-drill", &leader, work).await;
        }
        self.done("end-drill", async { self.desk.end_drill(&caller.author, &message, caller.direct) }).await
    }

    async fn status(
        &self,
        request: Request<control::StatusRequest>,
    ) -> Result<Response<control::StatusResponse>, Status> {
        let caller = self.caller(&request, "status")?;
        // The leader alone knows all nodes, and what is heard of regions.
        if let Some(leader) = self.elsewhere(&caller) {
            let work = async {
                let request = forward::on_behalf(&caller.author, request.into_inner(), LEADERS_STATUS);
                forward::to(&leader, &self.workload).await?.status(request).await.ok()
            };
            if let Ok(Some(told)) = tokio::time::timeout(LEADERS_STATUS, work).await {
                self.count("status", "forwarded");
                return Ok(told);
            }
        }
        let leading = &self.desk.leading;
        let leader = leading.leader();
        let mut status = control::StatusResponse {
            leader: leader.as_ref().map(|leader| leader.node.to_string()).unwrap_or_default(),
            epoch: leader.map_or(0, |leader| leader.epoch),
            answered_by: leading.node().to_string(),
            intent_version: self.desk.versions.current().map_or(0, |current| current.number),
            overrides: Some(self.desk.holding()),
            ..Default::default()
        };
        for source in &self.status {
            source.add_to(&mut status);
        }
        self.done("status", async { Ok(status) }).await
    }
}

/// What a caller sees of an error: gRPC's code and ours.
fn seen(error: &IntentError) -> (Code, &'static str) {
    match error {
        IntentError::NotLeading(_) => (Code::Unavailable, "not-leading"),
        IntentError::NotExpected { .. } => (Code::Aborted, "not-expected-version"),
        IntentError::NoVersion(_) => (Code::NotFound, "no-such-version"),
        IntentError::NoOverride(_) => (Code::NotFound, "no-such-override"),
        IntentError::Nothing => (Code::NotFound, "nothing-applied"),
        IntentError::Malformed(_) => (Code::InvalidArgument, "malformed"),
        IntentError::Unfit(_) => (Code::FailedPrecondition, "unfit-override"),
        IntentError::Unsafe(_) => (Code::FailedPrecondition, "unsafe"),
        IntentError::DrillRuns { .. } => (Code::FailedPrecondition, "drill-runs"),
        IntentError::Outdated { .. } => (Code::FailedPrecondition, "outdated"),
        IntentError::Store(StoreError::Unavailable(_)) => (Code::Unavailable, "store-unavailable"),
        IntentError::Store(StoreError::Fenced(_)) => (Code::Unavailable, "not-leading"),
        IntentError::Store(StoreError::Conflict(_)) => (Code::Aborted, "conflict"),
        IntentError::Store(StoreError::TooLarge(_) | StoreError::TooMany(_)) => (Code::ResourceExhausted, "too-large"),
        IntentError::Store(StoreError::Corrupt { .. }) => (Code::DataLoss, "store-corrupt"),
        IntentError::Lost(_) => (Code::Internal, "internal"),
    }
}

fn coded(code: Code, word: &'static str, text: impl Into<String>) -> Status {
    let mut status = Status::new(code, text);
    status.metadata_mut().insert("spillway-error", MetadataValue::from_static(word));
    status
}
