//! The audit trail of the control plane: what its leaders recorded, in the store, so that it is in one place and
//! outlives the nodes.
//!
//! ```text
//! Audit::record ──tap──▶ queue ──leads: ≤ 32 of 100 ms──▶ one fenced commit: the records, and the oldest go
//!                          └── does not lead: dropped, they are in this node's file
//! ```
//!
//! The rule: whoever records never waits. The store is tried again every second while it does not answer, and what then
//! finds no room in the queue is counted. A record keeps its key when it is tried again, so that none is there twice.
//!
//! It is no proof of anything: whoever may write to the store may change it. The chain of hashes is in each node's file.
//! Renewals of certificates are not in it: any node does them, and a fleet's would leave room for nothing else.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use spillway_core::line;
use spillway_core::units::Name;
use spillway_runtime::audit::{Audit, Event, Timestamp};
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::{Chain, Metrics};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::leading::Leading;
use crate::store::{Fence, MOST_BYTES, MOST_WRITES, Store, StoreError, Value, Write};

const PREFIX: &str = "audit/";
/// Records in the store.
pub const KEPT: usize = 1_000;
/// Records that may wait for it.
const WAITING: usize = 1_024;
/// Records of one commit.
const BATCH: usize = 32;
/// A commit is for what comes within this.
const GATHER: Duration = Duration::from_millis(100);
const REST: Duration = Duration::from_secs(1);
/// How long the end of a leadership may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes of a record: a token for 64 of the longest names. All that are kept come in one answer of the store.
const MOST_RECORD: usize = 24 << 10;

// Each record that is written may have another one deleted.
const _: () = assert!(2 * BATCH <= MOST_WRITES && BATCH * (MOST_RECORD + 128) <= MOST_BYTES);

/// What is recorded, on its way to the store.
#[derive(Debug)]
pub struct Tap {
    records: mpsc::Receiver<(Timestamp, Event)>,
    lost: Counter,
}

/// Counts `spillway_control_audit_lost_total`.
pub fn tapped(audit: Audit, metrics: &Metrics) -> (Audit, Tap) {
    let help = "Records of a leader that are in its own audit log alone, not in the store";
    let lost = metrics.register("control_audit_lost", help, Counter::default());
    let (to, records) = mpsc::channel(WAITING);
    (audit.tapped(to, lost.clone()), Tap { records, lost })
}

/// The newest records, JSON each, the very newest first.
pub async fn newest(store: &Store, most: usize) -> Result<Vec<String>, StoreError> {
    let found = store.last(PREFIX, most.min(KEPT)).await?;
    let text =
        |(key, value): (String, Value)| String::from_utf8(value.bytes.into()).map_err(|_| StoreError::Corrupt { key });
    found.into_iter().map(text).collect()
}

/// Writes them, while this node leads.
pub struct Trail {
    store: Store,
    node: Name,
    fences: watch::Receiver<Option<Fence>>,
    tap: Tap,
    /// How many of the lost were told of.
    told: u64,
    _last_words: TaskTrackerToken,
}

/// What one leader writes.
struct Ledger {
    fence: Fence,
    /// Of its records so far.
    count: u64,
    /// The keys that are in the store, the oldest first; none before they were read.
    kept: Option<VecDeque<String>>,
    /// What is to be committed next, with the keys that it keeps.
    batch: Vec<(String, Bytes)>,
}

/// A record as it is kept: as in the log, without the chain, with the node whose log has it.
#[derive(Serialize)]
struct Record<'a> {
    time: Timestamp,
    node: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

impl Trail {
    pub fn new(tap: Tap, store: Store, leading: &Leading) -> Self {
        let (node, fences, last_words) = (leading.node().clone(), leading.fences(), leading.last_words());
        Self { store, node, fences, tap, told: 0, _last_words: last_words }
    }

    /// Until draining; the leader's last records are written before another node leads.
    pub async fn run(mut self, drain: Drain) {
        let (mut over, mut first) = (0, None);
        loop {
            let leads = self.fences.borrow_and_update().clone().filter(|fence| fence.epoch > over);
            match leads {
                Some(fence) => {
                    over = fence.epoch;
                    self.keep(Ledger::new(fence), first.take()).await;
                }
                None if !drain.is_serving() => return,
                None => tokio::select! {
                    Ok(()) = self.fences.changed() => {}
                    // It may be the first of a leadership that began meanwhile.
                    Some(record) = self.tap.records.recv() => first = Some(record).filter(|_| self.leads_since(over)),
                    () = drain.draining() => {}
                },
            }
        }
    }

    fn leads_since(&self, epoch: u64) -> bool {
        self.fences.borrow().as_ref().is_some_and(|fence| fence.epoch > epoch)
    }

    /// Writes until the leadership ends.
    async fn keep(&mut self, mut ledger: Ledger, first: Option<(Timestamp, Event)>) {
        if let Some(record) = first {
            self.add(&mut ledger, record);
        }
        let (mut fences, epoch) = (self.fences.clone(), ledger.fence.epoch);
        let is_refused = tokio::select! {
            () = self.write(&mut ledger) => true,
            _ = fences.wait_for(|now| now.as_ref().is_none_or(|fence| fence.epoch != epoch)) => false,
        };
        if !is_refused {
            // What is left then is counted.
            let _ = timeout(LAST_WORDS, self.finish(&mut ledger)).await;
        }
        let in_queue = std::iter::from_fn(|| self.tap.records.try_recv().ok()).filter(|(_, event)| belongs(event));
        let left = ledger.batch.len() + in_queue.count();
        self.tap.lost.inc_by(left as u64);
        self.tell_lost();
    }

    /// Returns when the store refuses this leader.
    async fn write(&mut self, ledger: &mut Ledger) {
        let mut is_away = false;
        loop {
            self.gather(ledger).await;
            match self.commit(ledger).await {
                Ok(()) => {
                    is_away = false;
                    self.tell_lost();
                }
                Err(StoreError::Fenced(_)) => return,
                Err(error) => {
                    if !std::mem::replace(&mut is_away, true) {
                        tracing::warn!(error = %Chain(&error), "the audit trail cannot be written; trying again");
                    }
                    sleep(REST).await;
                }
            }
        }
    }

    /// Waits for records, unless some are left from before.
    async fn gather(&mut self, ledger: &mut Ledger) {
        while ledger.batch.is_empty() {
            match self.tap.records.recv().await {
                Some(record) => self.add(ledger, record),
                // Nobody is left who could record something.
                None => std::future::pending().await,
            }
        }
        let until = Instant::now() + GATHER;
        while ledger.batch.len() < BATCH
            && let Ok(Some(record)) = timeout_at(until, self.tap.records.recv()).await
        {
            self.add(ledger, record);
        }
    }

    /// Writes what is there.
    async fn finish(&mut self, ledger: &mut Ledger) -> Result<(), StoreError> {
        loop {
            while ledger.batch.len() < BATCH
                && let Ok(record) = self.tap.records.try_recv()
            {
                self.add(ledger, record);
            }
            if ledger.batch.is_empty() {
                return Ok(());
            }
            self.commit(ledger).await?;
        }
    }

    fn add(&self, ledger: &mut Ledger, (time, event): (Timestamp, Event)) {
        if !belongs(&event) {
            return;
        }
        let mut text = Vec::new();
        match line::write(&Record { time, node: self.node.as_str(), event: &event }, &mut text) {
            Ok(()) if text.len() <= MOST_RECORD => ledger.add(text.into()),
            _ => {
                self.tap.lost.inc();
            }
        }
    }

    async fn commit(&self, ledger: &mut Ledger) -> Result<(), StoreError> {
        let kept = match ledger.kept.take() {
            Some(kept) => kept,
            None => self.store.last(PREFIX, KEPT).await?.into_iter().rev().map(|(key, _)| key).collect(),
        };
        let kept = ledger.kept.insert(kept);
        let too_many = (kept.len() + ledger.batch.len()).saturating_sub(KEPT);
        let puts = ledger.batch.iter().map(|(key, record)| Write::Put(key.clone(), record.clone()));
        let deletes = kept.iter().take(too_many).cloned().map(Write::Delete);
        self.store.commit(&ledger.fence, &[], puts.chain(deletes).collect()).await?;
        kept.drain(..too_many);
        kept.extend(ledger.batch.drain(..).map(|(key, _)| key));
        Ok(())
    }

    fn tell_lost(&mut self) {
        let lost = self.tap.lost.get();
        if lost > self.told {
            tracing::warn!(records = lost - self.told, "audit records are in this node's log alone, not in the store");
            self.told = lost;
        }
    }
}

impl Ledger {
    fn new(fence: Fence) -> Self {
        Self { fence, count: 0, kept: None, batch: Vec::new() }
    }

    fn add(&mut self, record: Bytes) {
        self.count += 1;
        // As texts, keys are in the order of epochs and counts.
        self.batch.push((format!("{PREFIX}{:020}-{:010}", self.fence.epoch, self.count), record));
    }
}

/// Whether it is for the store.
fn belongs(event: &Event) -> bool {
    !matches!(event, Event::CertificateIssued { proof: "certificate", .. })
}

#[cfg(test)]
#[path = "trail_tests.rs"]
mod tests;
