//! Whether this node leads, and who does.
//!
//! ```text
//! standing ──won──▶ leading ──lease lost──▶ standing
//!    │                 └── draining: resigned
//!    └── superseded (SQLite alone): the process drains
//! ```
//!
//! The rule: who acts as leader asks for the fence each time, and every write carries it. It does not act itself.
//! Before it resigns it waits, a while, for who has something to write at the very end.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::units::Name;
use spillway_runtime::audit::{Audit, Event};
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::{Chain, Metrics};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::store::{DEADLINE, Fence, Leader, Leadership, Store, StoreError};

/// How long it rests after a campaign that failed.
const REST: Duration = Duration::from_millis(500);
/// Who leads is read again after so long, told or not.
const LOOK_EVERY: Duration = Duration::from_secs(2);

pub struct Leading {
    store: Store,
    node: Name,
    /// Where our gRPC services are.
    address: String,
    held: Mutex<Option<Leadership>>,
    fences: watch::Sender<Option<Fence>>,
    leaders: watch::Sender<Option<Leader>>,
    last_words: TaskTracker,
    audit: Audit,
    leads: Gauge,
    epoch: Gauge,
}

impl Leading {
    /// Shows `spillway_control_leader` (1 here, 0 elsewhere) and `spillway_control_epoch` (of whoever leads).
    pub fn new(store: Store, node: Name, address: String, audit: Audit, metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
            store,
            node,
            address,
            held: Mutex::default(),
            fences: watch::Sender::new(None),
            leaders: watch::Sender::new(None),
            last_words: TaskTracker::new(),
            audit,
            leads: metrics.register("control_leader", "Whether this node leads", Gauge::default()),
            epoch: metrics.register("control_epoch", "Revision of the leader's election", Gauge::default()),
        })
    }

    /// This node.
    pub fn node(&self) -> &Name {
        &self.node
    }

    /// What its writes carry while this node leads.
    pub fn fence(&self) -> Option<Fence> {
        self.held.lock().as_ref().filter(|held| !held.is_lost()).map(|held| held.fence.clone())
    }

    /// Tells when this node begins to lead, and when it ends.
    pub fn fences(&self) -> watch::Receiver<Option<Fence>> {
        self.fences.subscribe()
    }

    /// While this is held, this node does not resign for a drain, for [`DEADLINE`] at most: its holder writes once more
    /// when it hears that the leadership has ended.
    pub fn last_words(&self) -> TaskTrackerToken {
        self.last_words.token()
    }

    /// Who leads, as last heard.
    pub fn leader(&self) -> Option<Leader> {
        self.leaders.borrow().clone()
    }

    /// Tells of each other leader.
    pub fn leaders(&self) -> watch::Receiver<Option<Leader>> {
        self.leaders.subscribe()
    }

    /// Stands for election until draining, and hears of who wins. Returns when another node may lead.
    pub async fn run(self: Arc<Self>, drain: Drain) {
        tokio::select! {
            () = self.campaign(&drain) => {}
            () = self.follow() => {}
        }
    }

    async fn campaign(&self, drain: &Drain) {
        let mut told = false;
        loop {
            let campaign = self.store.campaign(&self.node, &self.address);
            let won = tokio::select! {
                biased;
                () = drain.draining() => return,
                won = campaign => won,
            };
            match won {
                Ok(leadership) => {
                    told = false;
                    self.lead(leadership, drain).await;
                }
                Err(StoreError::Fenced(epoch)) => {
                    tracing::error!(epoch, "another process has opened the store since: this one ends");
                    return drain.start();
                }
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(error = %Chain(&error), "no election can be held; trying again");
                    }
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }

    /// Until the leadership is lost, or resigned because of a drain.
    async fn lead(&self, leadership: Leadership, drain: &Drain) {
        let fence = leadership.fence.clone();
        let mut lost = leadership.lost.clone();
        let leader = Leader { node: self.node.clone(), address: self.address.clone(), epoch: fence.epoch };
        *self.held.lock() = Some(leadership);
        self.fences.send_replace(Some(fence.clone()));
        self.hear(Some(leader));
        self.leads.set(1);
        tracing::info!(epoch = fence.epoch, "this node leads");
        self.audit.record(Event::LeadershipChanged { epoch: fence.epoch, leads: true });
        let drains = tokio::select! {
            _ = lost.wait_for(|lost| *lost) => false,
            () = drain.draining() => true,
        };
        let held = self.held.lock().take();
        self.leads.set(0);
        // Whoever hears of the end has all records of this leadership.
        self.audit.record(Event::LeadershipChanged { epoch: fence.epoch, leads: false });
        self.fences.send_replace(None);
        if drains {
            self.last_words.close();
            let _ = tokio::time::timeout(DEADLINE, self.last_words.wait()).await;
        }
        if let Some(held) = held {
            held.resign().await;
        }
    }

    async fn follow(&self) {
        let mut changed = self.store.watch("leader");
        loop {
            changed.mark_unchanged();
            // Who led goes on to be told of while the store cannot be reached.
            if let Ok(leader) = self.store.leader().await {
                self.hear(leader);
            }
            let _ = tokio::time::timeout(LOOK_EVERY, changed.changed()).await;
        }
    }

    fn hear(&self, leader: Option<Leader>) {
        self.epoch.set(leader.as_ref().map_or(0, |leader| i64::try_from(leader.epoch).unwrap_or(i64::MAX)));
        self.leaders.send_if_modified(|known| {
            // What was read before the last election came late.
            let older = matches!((&*known, &leader), (Some(known), Some(read)) if read.epoch < known.epoch);
            let differs = *known != leader && !older;
            if differs {
                *known = leader;
            }
            differs
        });
    }
}

#[cfg(test)]
#[path = "leading_tests.rs"]
mod tests;
