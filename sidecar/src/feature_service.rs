//! `spillway.feature.v1`: features in, and a look at what is kept. Translates and calls [`Features`].
//!
//! The rule: only this region's loaders and gateways may call it, a batch is checked whole before
//! its first row is written, any call may be sent again, and what was written is confirmed or said not to be.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use spillway_core::deadline::parse_grpc_timeout;
use spillway_core::feature::{Layout, Row};
use spillway_core::identity::{Role, SpiffeId};
use spillway_core::resource::{FieldValue, Scope};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::feature::feature_service_server::{FeatureService as Service, FeatureServiceServer};
use spillway_proto::feature::value::Kind;
use spillway_proto::feature::{
    DeleteRequest, DeleteResponse, Found as FoundRow, GetRequest, GetResponse, Key, PutRequest, PutResponse, Rejection,
    Row as ProtoRow, Value,
};
use spillway_runtime::tls::Peer;
use tonic::{Code, Request, Response, Status};

use crate::features::{Event, Features, Found, Present, WriteError, Written};

/// Rows or keys in one call.
pub const BATCH: usize = 1_000;

/// 1,000 rows of 256 fields with short names.
const MESSAGE: usize = 16 << 20;

/// For a caller that names no time, and the most that one may name.
const DEADLINE: Duration = Duration::from_secs(5);

/// The Snapshot that is served from now.
pub type Current = Arc<dyn Fn() -> Arc<Snapshot> + Send + Sync>;

pub struct FeatureService {
    features: Arc<Features>,
    own: SpiffeId,
    snapshot: Current,
}

impl FeatureService {
    /// `own` is the sidecar's identity. The peer is taken from the request's extensions, where the server
    /// puts it as `Arc<Peer>`; a call without one is refused.
    pub fn new(features: Arc<Features>, own: SpiffeId, snapshot: Current) -> Self {
        Self { features, own, snapshot }
    }

    /// The service with its bounds on messages.
    pub fn into_server(self) -> FeatureServiceServer<Self> {
        FeatureServiceServer::new(self).max_decoding_message_size(MESSAGE).max_encoding_message_size(MESSAGE)
    }

    /// Whether a peer may write, and read what is kept: the control plane and the gateways of our own
    /// region and trust domain.
    pub fn may_write(&self, peer: &SpiffeId) -> bool {
        may_call(&self.own, peer)
    }

    fn admit<T>(&self, request: &Request<T>, items: usize) -> Result<(), Status> {
        let peer = request.extensions().get::<Arc<Peer>>();
        if !peer.is_some_and(|peer| self.may_write(&peer.id)) {
            return Err(refusal(
                Code::PermissionDenied,
                "permission-denied",
                "this peer may not call the feature service",
            ));
        }
        if items > BATCH {
            return Err(refusal(
                Code::InvalidArgument,
                "limit-exceeded",
                &format!("at most {BATCH} items in one call"),
            ));
        }
        Ok(())
    }
}

/// [`FeatureService::may_write`] for who has no service at hand; `own` is the sidecar's identity.
pub fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    let Role::Sidecar { region: here, .. } = &own.role else { return false };
    let near = match &peer.role {
        Role::Loader { region, .. } | Role::Gateway { region, .. } => region == here,
        Role::Sidecar { .. }
        | Role::Control { .. }
        | Role::Dns { .. }
        | Role::Injector { .. }
        | Role::Client { .. }
        | Role::Operator { .. } => false,
    };
    near && peer.trust_domain == own.trust_domain
}

#[tonic::async_trait]
impl Service for FeatureService {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.admit(&request, request.get_ref().rows.len())?;
        let snapshot = (self.snapshot)();
        let mut events = Vec::new();
        let mut places = Vec::new();
        let mut rejections = Vec::new();
        for (index, row) in request.into_inner().rows.into_iter().enumerate() {
            match self.event(&snapshot, row) {
                Ok(event) => {
                    events.push(event);
                    places.push(index);
                }
                Err(reason) => rejections.push(rejection(index, reason)),
            }
        }
        let rejected = if rejections.is_empty() {
            match self.features.write(&snapshot, &events).await {
                Ok(Written { count, confirmed, .. }) => {
                    let written = u32::try_from(count).unwrap_or(u32::MAX);
                    return Ok(Response::new(PutResponse { written, rejections, confirmed }));
                }
                Err(WriteError::Rejected(rejected)) => rejected,
                Err(error) => return Err(not_written(&error)),
            }
        } else {
            self.features.rejected(&snapshot, &events)
        };
        rejections.extend(rejected.into_iter().map(|(at, fault)| rejection(places[at], fault.to_string())));
        rejections.sort_by_key(|rejection| rejection.row);
        Ok(Response::new(PutResponse { written: 0, rejections, confirmed: false }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        self.admit(&request, request.get_ref().keys.len())?;
        let deadline = Instant::now() + asked(&request).min(DEADLINE);
        let snapshot = (self.snapshot)();
        let keys = request.into_inner().keys;
        // One look-up for each tenant and group; each is one round per tier.
        let mut lookups: BTreeMap<(&str, Name), Vec<usize>> = BTreeMap::new();
        for (index, key) in keys.iter().enumerate() {
            let (group, tenant) = resolve(&snapshot, key).map_err(|reason| invalid_item(index, &reason))?;
            lookups.entry((tenant, group)).or_default().push(index);
        }
        let reads = lookups.iter().map(async |((tenant, group), indices)| {
            let entities: Vec<Bytes> = indices.iter().map(|&index| keys[index].entity.clone()).collect();
            self.features.read(&snapshot, tenant, &[group], &entities, deadline).await
        });
        let mut rows = vec![FoundRow::default(); keys.len()];
        for (((_, group), indices), lookup) in lookups.iter().zip(join_all(reads).await) {
            let lookup = lookup.map_err(|fault| refusal(Code::InvalidArgument, fault.code(), &fault.to_string()))?;
            let layout = self.features.layout(&snapshot, group);
            for (at, &index) in indices.iter().enumerate() {
                rows[index] = match (lookup.get(at, 0), &layout) {
                    (Found::Present(present), Some(layout)) => found(&keys[index], present, layout),
                    (Found::Absent { .. }, _) => absent(&keys[index]),
                    (Found::Present(_) | Found::Unavailable, _) => {
                        return Err(refusal(
                            Code::Unavailable,
                            "features-unavailable",
                            "no feature store could answer",
                        ));
                    }
                };
            }
        }
        Ok(Response::new(GetResponse { rows }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        self.admit(&request, request.get_ref().keys.len())?;
        let snapshot = (self.snapshot)();
        let DeleteRequest { keys, event_time_micros: event_us } = request.into_inner();
        let mut events = Vec::with_capacity(keys.len());
        for (index, key) in keys.into_iter().enumerate() {
            let (group, tenant) = resolve(&snapshot, &key).map_err(|reason| invalid_item(index, &reason))?;
            events.push(Event { tenant: tenant.to_owned(), entity: key.entity, group, event_us, values: None });
        }
        match self.features.write(&snapshot, &events).await {
            Ok(Written { count, confirmed, .. }) => {
                let deleted = u32::try_from(count).unwrap_or(u32::MAX);
                Ok(Response::new(DeleteResponse { deleted, confirmed }))
            }
            Err(WriteError::Rejected(rejected)) => Err(rejected.first().map_or_else(
                || refusal(Code::InvalidArgument, "invalid-row", "the keys cannot be accepted"),
                |(index, fault)| invalid_item(*index, &fault.to_string()),
            )),
            Err(error) => Err(not_written(&error)),
        }
    }
}

impl FeatureService {
    fn event(&self, snapshot: &Snapshot, row: ProtoRow) -> Result<Event, String> {
        let key = row.key.ok_or("the key is missing")?;
        let (group, tenant) = resolve(snapshot, &key)?;
        let tenant = tenant.to_owned();
        let layout = self.features.layout(snapshot, &group).ok_or("there is no such feature group")?;
        let values = values(&layout, row.fields)?;
        Ok(Event { group, tenant, entity: key.entity, event_us: row.event_time_micros, values: Some(values) })
    }
}

/// The group of a key, and the tenant whose entity it is.
fn resolve<'a>(snapshot: &Snapshot, key: &'a Key) -> Result<(Name, &'a str), String> {
    let known = snapshot.groups.get_key_value(key.group.as_str());
    let (name, group) = known.ok_or("there is no such feature group")?;
    match group.scope {
        Scope::Shared if !key.tenant.is_empty() => Err("the group is shared by all tenants; expected no tenant".into()),
        Scope::Shared => Ok((name.clone(), "")),
        Scope::Tenant if !snapshot.tenants.contains_key(key.tenant.as_str()) => Err("there is no such tenant".into()),
        Scope::Tenant => Ok((name.clone(), &key.tenant)),
    }
}

fn values(layout: &Layout, mut fields: HashMap<String, Value>) -> Result<Vec<Option<FieldValue>>, String> {
    let mut values = Vec::with_capacity(layout.fields().len());
    for (name, datatype) in layout.fields() {
        let Some(Value { kind }) = fields.remove(name.as_str()) else {
            values.push(None);
            continue;
        };
        let value = match kind {
            None => return Err(format!("field '{name}': the value is missing")),
            Some(Kind::BoolValue(value)) => FieldValue::Bool(value),
            Some(Kind::Int64Value(value)) => FieldValue::Int(value),
            Some(Kind::Uint64Value(value)) => FieldValue::Uint(value),
            Some(Kind::DoubleValue(value)) => FieldValue::Float(value),
            Some(Kind::TextValue(text)) => {
                FieldValue::parse(&text, datatype).map_err(|fault| format!("field '{name}': {fault}"))?
            }
        };
        values.push(Some(value));
    }
    match fields.keys().next() {
        // The name is the caller's own text: quoted, and no longer than a name may be.
        Some(unknown) => {
            Err(format!("the group has no field {:?}", unknown.chars().take(Name::MAX).collect::<String>()))
        }
        None => Ok(values),
    }
}

fn found(key: &Key, present: &Present, layout: &Layout) -> FoundRow {
    FoundRow {
        row: Some(ProtoRow {
            key: Some(key.clone()),
            event_time_micros: present.row.event_us(),
            fields: fields(layout, &present.row),
        }),
        present: true,
        stale: present.stale,
        tier: present.tier.name().to_owned(),
        fresh_until_micros: present.fresh_until_us,
    }
}

fn absent(key: &Key) -> FoundRow {
    FoundRow { row: Some(ProtoRow { key: Some(key.clone()), ..ProtoRow::default() }), ..FoundRow::default() }
}

fn fields(layout: &Layout, row: &Row) -> HashMap<String, Value> {
    let value = |index| {
        let kind = match layout.value(row, index)? {
            FieldValue::Bool(value) => Kind::BoolValue(value),
            FieldValue::Int(value) => Kind::Int64Value(value),
            FieldValue::Uint(value) => Kind::Uint64Value(value),
            FieldValue::Float(value) => Kind::DoubleValue(value),
        };
        Some(Value { kind: Some(kind) })
    };
    layout.fields().enumerate().filter_map(|(index, (name, _))| Some((name.to_string(), value(index)?))).collect()
}

fn rejection(index: usize, reason: String) -> Rejection {
    Rejection { row: u32::try_from(index).unwrap_or(u32::MAX), reason }
}

fn asked<T>(request: &Request<T>) -> Duration {
    let header = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
    header.and_then(parse_grpc_timeout).unwrap_or(DEADLINE)
}

fn invalid_item(index: usize, reason: &str) -> Status {
    refusal(Code::InvalidArgument, "invalid-row", &format!("item {index}: {reason}"))
}

fn not_written(error: &WriteError) -> Status {
    let (status, code) = match error {
        WriteError::Rejected(_) => (Code::InvalidArgument, "invalid-row"),
        WriteError::Unavailable { .. } => (Code::Unavailable, "features-unavailable"),
        // Not to be retried before the operator has changed something.
        WriteError::Refused { .. } => (Code::FailedPrecondition, "store-refused"),
    };
    refusal(status, code, &error.to_string())
}

fn refusal(code: Code, error: &'static str, message: &str) -> Status {
    let mut status = Status::new(code, message);
    status.metadata_mut().insert("spillway-error", tonic::metadata::MetadataValue::from_static(error));
    status
}
