//! Elections: one key that lives as long as the lease of who made it.
//!
//! ```text
//! waiting ──key absent──▶ lease granted ──key made──▶ leading ──renewed in time──▶ leading
//!    ▲                         │ another was faster      │ not renewed in time, key gone, resigned
//!    └─────────────────────────┘                         ▼
//!    └────────────── the caller stands again ────────── lost
//! ```
//!
//! The rule: a leader believes in its lease for a shorter time than etcd does. Its time begins before the request that
//! renews it was sent and ends [`MARGIN`] early, by this machine's monotonic clock.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, Error, KeyValue, PutOptions, Txn, TxnOp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use spillway_core::units::Name;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::super::{Fence, Leader, Leadership, StoreError};
use super::{Etcd, LEADER, is_of, kv, unsigned};

/// How long a leader that vanished keeps others from leading, in seconds.
const TIME_TO_LIVE: i64 = 6;
/// A leader that could not renew its lease stops so long before the lease ends.
const MARGIN: Duration = Duration::from_secs(1);
const RENEW_EVERY: Duration = Duration::from_millis(1_500);
const RENEW_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Who waits looks again after this, also if no watch told of a change.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The value of the election key.
#[derive(Serialize, Deserialize)]
struct Seat {
    node: String,
    address: String,
}

struct Lease {
    id: i64,
    time_to_live: Duration,
    /// Believed in so long.
    until: Instant,
}

pub fn leader(found: &KeyValue) -> Result<Leader, StoreError> {
    let corrupt = || StoreError::Corrupt { key: LEADER.into() };
    let seat: Seat = serde_json::from_slice(found.value()).map_err(|_| corrupt())?;
    let node = Name::parse(&seat.node).map_err(|_| corrupt())?;
    Ok(Leader { node, address: seat.address, epoch: unsigned(found.create_revision()) })
}

pub async fn campaign(etcd: &Etcd, node: &Name, address: &str) -> Result<Leadership, StoreError> {
    let seat = Seat { node: node.to_string(), address: address.to_owned() };
    let seat = serde_json::to_vec(&seat).map_err(|error| StoreError::Unavailable(error.into()))?;
    let mut changed = etcd.watch(LEADER);
    loop {
        changed.mark_unchanged();
        if etcd.look(LEADER).await?.is_some() {
            // Late or told, it looks again.
            let _ = timeout(LOOK_EVERY, changed.changed()).await;
            continue;
        }
        let lease = grant(etcd).await?;
        match stand(etcd, &lease, &seat).await {
            Ok(Some(epoch)) => return Ok(lead(etcd.clone(), lease, epoch)),
            Ok(None) => revoke(etcd, lease.id).await,
            Err(error) => {
                revoke(etcd, lease.id).await;
                return Err(error);
            }
        }
    }
}

/// Makes the key if there is none; the epoch then.
async fn stand(etcd: &Etcd, lease: &Lease, seat: &[u8]) -> Result<Option<u64>, StoreError> {
    let key = etcd.key(LEADER);
    let put = TxnOp::put(key.clone(), seat, Some(PutOptions::new().with_lease(lease.id)));
    let absent = Compare::create_revision(key, CompareOp::Equal, 0);
    let transaction = Txn::new().when([absent]).and_then([put]);
    let answer = etcd.0.members.write(|client| async move { kv(&client).txn(transaction).await }).await?;
    let revision = answer.header().map(|header| unsigned(header.revision()));
    Ok(revision.filter(|_| answer.succeeded()))
}

async fn grant(etcd: &Etcd) -> Result<Lease, StoreError> {
    let asked = Instant::now();
    let grant = |client: Client| async move { client.lease_client().grant(TIME_TO_LIVE, None).await };
    // A grant that was sent twice leaves a lease that ends by itself.
    let granted = etcd.0.members.read(grant).await?;
    let time_to_live = Duration::from_secs(unsigned(granted.ttl()));
    Ok(Lease { id: granted.id(), time_to_live, until: asked + time_to_live.saturating_sub(MARGIN) })
}

/// Without success the lease ends by itself.
async fn revoke(etcd: &Etcd, id: i64) {
    let revoke = |client: Client| async move { client.lease_client().revoke(id).await };
    if let Err(error) = etcd.0.members.read(revoke).await {
        tracing::debug!(error = %spillway_runtime::telemetry::Chain(&error), "a lease was not given back");
    }
}

fn lead(etcd: Etcd, lease: Lease, epoch: u64) -> Leadership {
    let fence = Fence { epoch, key: etcd.key(LEADER).into() };
    let (sender, lost) = watch::channel(false);
    let (held, dropped) = oneshot::channel();
    let until = Arc::new(Mutex::new(lease.until));
    // Ends with the leadership.
    tokio::spawn({
        let (fence, until) = (fence.clone(), Arc::clone(&until));
        async move {
            let id = lease.id;
            tokio::select! {
                why = keep_up(&etcd, &fence, lease, &until) => {
                    tracing::warn!(epoch = fence.epoch, why, "this node leads no more");
                    sender.send_replace(true);
                    revoke(&etcd, id).await;
                }
                _ = dropped => {
                    revoke(&etcd, id).await;
                    sender.send_replace(true);
                }
            }
        }
    });
    Leadership { fence, lost, until: Some(until), held }
}

/// Renews the lease, and says why that came to an end.
async fn keep_up(etcd: &Etcd, fence: &Fence, mut lease: Lease, until: &Mutex<Instant>) -> &'static str {
    loop {
        sleep_until(lease.until.min(Instant::now() + RENEW_EVERY)).await;
        loop {
            let asked = Instant::now();
            match timeout_at(lease.until, renew(etcd, lease.id)).await {
                Err(_) => return "the lease was not renewed in time",
                Ok(Ok(false)) => return "the lease is gone",
                Ok(Ok(true)) => {
                    lease.until = asked + lease.time_to_live.saturating_sub(MARGIN);
                    *until.lock() = lease.until;
                    break;
                }
                Ok(Err(error)) => {
                    tracing::debug!(error = %spillway_runtime::telemetry::Chain(&error), "the lease was not renewed");
                    sleep(RENEW_AGAIN_AFTER).await;
                }
            }
        }
        // Somebody may have removed the key but not the lease.
        if let Ok(found) = etcd.look(LEADER).await
            && !is_of(found.as_ref(), fence)
        {
            return "the election key is gone";
        }
    }
}

/// Whether the lease is still there.
async fn renew(etcd: &Etcd, id: i64) -> Result<bool, StoreError> {
    let renew = |client: Client| async move {
        match client.lease_client().keep_alive(id).await {
            Ok(_) => Ok(true),
            Err(Error::LeaseKeepAliveError(_)) => Ok(false),
            Err(error) => Err(error),
        }
    };
    etcd.0.members.read(renew).await
}
