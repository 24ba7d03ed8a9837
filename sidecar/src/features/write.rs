//! The write path: check everything, then L3, then L2, then every L1 that may hold the row.
//!
//! The rule: a write may be sent again at any time, since the last event wins in each tier; and one that
//! has begun goes on to the last tier, whether or not its caller still waits. It is confirmed when every process
//! that may serve a row from memory has dropped the old one. What Redis could not be told is remembered and told
//! later (`repair`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use spillway_core::feature::{InvalidEvent, InvalidKey, InvalidRow, RowKey, Stored, check_event_time};
use spillway_core::resource::FieldValue;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use super::groups::Group;
use super::redis::{Put, Value};
use super::store::{Answer, Change, WriteFailed};
use super::{Features, now_us};

/// Redis gets as long as this to take a batch; nobody's request waits for it.
pub(super) const L2_DEADLINE: Duration = Duration::from_secs(1);

/// One thing that happened to one entity in one group.
#[derive(Clone, Debug)]
pub struct Event {
    pub group: Name,
    /// For groups whose entities are a tenant's own; else empty.
    pub tenant: String,
    pub entity: Bytes,
    /// Unix microseconds.
    pub event_us: i64,
    /// In field order, `None` is null. No values at all: the row is deleted.
    pub values: Option<Vec<Option<FieldValue>>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Events that L3 holds now, or holds a later one of.
    pub count: usize,
    /// Events already past their retention, of which there is nothing to keep.
    pub expired: usize,
    /// Whether no process of the region serves what these events overwrote any more. If not, they are kept all
    /// the same, and sending them again may get them confirmed. Without Redis it speaks of this process alone.
    pub confirmed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The producer's fault; nothing was written. Index of the event, and what is wrong with it.
    #[error("{} of the events cannot be accepted", .0.len())]
    Rejected(Vec<(usize, RejectedEvent)>),
    /// The durable tier did not take all events. A retry may help and does no harm.
    #[error("the durable store took {written} of {of} events")]
    Unavailable { written: usize, of: usize },
    /// The durable tier looked at some of the events and refused them. The operator's fault: a retry is
    /// of no use before something is changed. The log says what the store said.
    #[error("the durable store refused {refused} of {of} events; sending them again is of no use")]
    Refused { refused: usize, of: usize },
}

/// The producer's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RejectedEvent {
    #[error("there is no feature group '{0}'")]
    UnknownGroup(Name),
    #[error(transparent)]
    Key(#[from] InvalidKey),
    #[error(transparent)]
    Time(#[from] InvalidEvent),
    #[error(transparent)]
    Row(#[from] InvalidRow),
}

impl Features {
    /// Writes all events, or none if one of them cannot be accepted. Dropping the future does not stop it:
    /// half of a write would leave the nearer tiers with what was overwritten.
    pub async fn write(self: &Arc<Self>, snapshot: &Snapshot, events: &[Event]) -> Result<Written, WriteError> {
        let now_us = now_us();
        let mut changes = Vec::with_capacity(events.len());
        let mut rejected = Vec::new();
        let mut expired = 0;
        for (index, event) in events.iter().enumerate() {
            match self.check(snapshot, event, now_us) {
                Ok((group, change)) if change.expires_us > now_us => changes.push((group, change)),
                Ok(_) => expired += 1,
                Err(fault) => rejected.push((index, fault)),
            }
        }
        if !rejected.is_empty() {
            return Err(WriteError::Rejected(rejected));
        }
        self.metrics.write_expired.inc_by(expired as u64);
        let of = changes.len();
        let features = self.clone();
        // Ends by itself: the stores' write timeouts bound it.
        let write = tokio::spawn(async move { features.keep(changes, now_us).await });
        let (count, told) = write.await.unwrap_or(Err(WriteError::Unavailable { written: 0, of }))?;
        let confirmed = match &self.changes {
            Some(changes) if count > 0 => changes.confirmations.confirm(told).await.is_ok(),
            Some(_) | None => true,
        };
        Ok(Written { count, expired, confirmed })
    }

    /// Through all tiers; how many events L3 took, and what [`Self::tell`] says.
    async fn keep(&self, changes: Vec<(Arc<Group>, Change)>, now_us: i64) -> Result<(usize, Option<u64>), WriteError> {
        let (groups, changes): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
        let results = self.store.write(&changes).await;
        let mut puts = Vec::with_capacity(changes.len());
        let (mut written, mut refused) = (0, 0);
        for ((group, change), result) in groups.iter().zip(&changes).zip(results) {
            let last = match result {
                Ok(held) => {
                    written += 1;
                    held.and_then(|held| last(group, &change.stored, held, now_us))
                }
                Err(WriteFailed::Refused) => {
                    refused += 1;
                    continue;
                }
                // The store may have taken it all the same: nobody may go on serving what was there before.
                Err(WriteFailed::Unreached) => None,
            };
            let value =
                last.map_or(Value::Unknown, |last| Value::Event { bytes: last.bytes(), expires_us: change.expires_us });
            puts.push(Put { key: change.key.clone(), value });
        }
        let of = changes.len();
        self.metrics.written[1].inc_by(written as u64);
        self.metrics.write_failed[1].inc_by((of - written - refused) as u64);
        self.metrics.write_refused.inc_by(refused as u64);
        let told = self.tell(&puts, now_us).await;
        match (written, refused) {
            (written, 0) if written == of => Ok((written, told)),
            (written, 0) => Err(WriteError::Unavailable { written, of }),
            (_, refused) => Err(WriteError::Refused { refused, of }),
        }
    }

    /// Which events cannot be accepted, and why; nothing is written.
    pub fn rejected(&self, snapshot: &Snapshot, events: &[Event]) -> Vec<(usize, RejectedEvent)> {
        let now_us = now_us();
        let fault = |(index, event)| Some((index, self.check(snapshot, event, now_us).err()?));
        events.iter().enumerate().filter_map(fault).collect()
    }

    fn check(&self, snapshot: &Snapshot, event: &Event, now_us: i64) -> Result<(Arc<Group>, Change), RejectedEvent> {
        let group = self.groups.get(snapshot, &event.group);
        let group = group.ok_or_else(|| RejectedEvent::UnknownGroup(event.group.clone()))?;
        let key = RowKey::new(group.scope, &event.tenant, &event.entity, &group.name)?;
        check_event_time(event.event_us, now_us)?;
        let stored = match &event.values {
            Some(values) => Stored::Row(group.layout.encode(event.event_us, values)?),
            None => Stored::Deleted { event_us: event.event_us },
        };
        let change = Change {
            key,
            stored,
            consistency: group.consistency,
            schema_version: group.layout.schema_version,
            expires_us: group.expires_us(event.event_us),
        };
        Ok((group, change))
    }

    /// L2 and, through it, the region; then our own L1. The number of the last change, if all were told.
    async fn tell(&self, puts: &[Put], now_us: i64) -> Option<u64> {
        let mut told = None;
        if let Some(redis) = &self.redis {
            let results = redis.write(puts, true, now_us, Instant::now() + L2_DEADLINE).await;
            let failed: Vec<&RowKey> =
                puts.iter().zip(&results).filter(|(_, result)| result.is_err()).map(|(put, _)| &put.key).collect();
            let numbers = results.iter().map(|result| result.ok().filter(|number| *number > 0));
            told = numbers.collect::<Option<Vec<_>>>().and_then(|numbers| numbers.into_iter().max());
            self.metrics.written[0].inc_by((puts.len() - failed.len()) as u64);
            self.metrics.write_failed[0].inc_by(failed.len() as u64);
            for key in failed {
                if !self.repairs.add(key) {
                    self.metrics.repair_dropped.inc();
                }
            }
        }
        for put in puts {
            self.flights.forget(&put.key);
            self.memory.invalidate(&put.key);
        }
        told
    }
}

/// What the nearer tiers may hold after a write: the last event as far as it is known. `None`: not known.
fn last(group: &Group, written: &Stored, held: Answer, now_us: i64) -> Option<Stored> {
    match held {
        Answer::Failed => None,
        // Our row is gone at once only if a deletion of that time or later is there; ours bounds its time.
        Answer::Absent => Some(Stored::Deleted { event_us: written.event_us() }),
        Answer::Found(bytes) => {
            let held = group.layout.decode(bytes, now_us).ok()?;
            Some(if written.supersedes(&held) { written.clone() } else { held })
        }
    }
}
