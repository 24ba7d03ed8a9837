//! The orders that hold for regions.
//!
//! The rule: one for each region, and none after its time, whether or not anybody has removed it. The leader removes
//! those that have ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use prost::Message;
use spillway_core::intent::{Act, Order};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_proto::control::r#override::Act as ActCode;
use spillway_runtime::audit::{Audit, Event};
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::Chain;
use tokio::sync::watch;

use crate::leading::Leading;
use crate::store::{Condition, Fence, Store, StoreError, Write};

const PREFIX: &str = "overrides/";
/// The store is read again after so long, told or not, and what has ended is removed.
const LOOK_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Overrides {
    store: Store,
    /// With the revision of each.
    read: ArcSwap<BTreeMap<Name, (control::Override, u64)>>,
    changed: watch::Sender<u64>,
}

impl Overrides {
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, read: ArcSwap::default(), changed: watch::Sender::new(0) })
    }

    /// Those that hold at a time since 1970.
    pub fn holding(&self, now: Duration) -> BTreeMap<Name, control::Override> {
        let holds = |found: &control::Override| until(found) > now;
        let read = self.read.load();
        read.iter()
            .filter(|(_, (found, _))| holds(found))
            .map(|(name, (found, _))| (name.clone(), found.clone()))
            .collect()
    }

    /// Tells that one was given, lifted or removed. That time passes is for who asks to see.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub async fn set(&self, fence: &Fence, region: &Name, order: &control::Override) -> Result<(), StoreError> {
        let put = Write::Put(key(region), order.encode_to_vec().into());
        self.store.commit(fence, &[], vec![put]).await?;
        self.refresh().await
    }

    /// Whether there was one.
    pub async fn lift(&self, fence: &Fence, region: &Name) -> Result<bool, StoreError> {
        let there = self.store.get(&key(region)).await?;
        let Some(there) = there else { return Ok(false) };
        let condition = Condition::At(key(region), there.revision);
        self.store.commit(fence, &[condition], vec![Write::Delete(key(region))]).await?;
        self.refresh().await?;
        Ok(true)
    }

    pub async fn refresh(&self) -> Result<(), StoreError> {
        let mut read = BTreeMap::new();
        for (key, value) in self.store.list(PREFIX).await? {
            let corrupt = || StoreError::Corrupt { key: key.clone() };
            let name = key.strip_prefix(PREFIX).and_then(|name| Name::parse(name).ok()).ok_or_else(corrupt)?;
            let order = control::Override::decode(value.bytes).map_err(|_| corrupt())?;
            read.insert(name, (order, value.revision));
        }
        if **self.read.load() != read {
            self.read.store(Arc::new(read));
            self.changed.send_modify(|changes| *changes += 1);
        }
        Ok(())
    }

    /// Follows the store until stopped; while this node leads, removes what has ended.
    pub async fn follow(self: Arc<Self>, leading: Arc<Leading>, audit: Audit, drain: Drain) {
        let mut changed = self.store.watch(PREFIX);
        let mut told = false;
        loop {
            changed.mark_unchanged();
            let mut done = self.refresh().await;
            if done.is_ok()
                && let Some(fence) = leading.fence()
            {
                done = self.remove_ended(&fence, &audit).await;
            }
            match done {
                Ok(()) => told = false,
                Err(error) if std::mem::replace(&mut told, true) => drop(error),
                Err(error) => tracing::error!(error = %Chain(&error), "overrides cannot be read, the last ones stay"),
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = drain.stopped() => return,
            }
        }
    }

    async fn remove_ended(&self, fence: &Fence, audit: &Audit) -> Result<(), StoreError> {
        let now = since_1970();
        let read = self.read.load_full();
        for (region, (_, revision)) in read.iter().filter(|(_, (order, _))| until(order) <= now) {
            let condition = Condition::At(key(region), *revision);
            match self.store.commit(fence, &[condition], vec![Write::Delete(key(region))]).await {
                Ok(_) => {
                    tracing::info!(%region, "an override has ended");
                    audit.record(Event::OverrideEnded { region: region.to_string(), author: None });
                }
                // Another one was given meanwhile.
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What a message orders; `None` if it orders nothing.
pub fn order(message: &control::Override) -> Option<Order> {
    let act = match message.act.as_ref()? {
        ActCode::Drain(true) => Act::Drain,
        ActCode::ForceIn(true) => Act::ForceIn,
        ActCode::Drain(false) | ActCode::ForceIn(false) => return None,
        ActCode::Weight(weight) => Act::Weight(*weight),
    };
    Some(Order { act, until: until(message), reason: message.reason.clone() })
}

/// For people and the audit log.
pub fn said(act: Act) -> String {
    match act {
        Act::Drain => "drain".into(),
        Act::Weight(weight) => format!("weight {weight}"),
        Act::ForceIn => "force-in".into(),
    }
}

pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO)
}

fn until(order: &control::Override) -> Duration {
    Duration::from_millis(u64::try_from(order.until_unix_ms).unwrap_or(0))
}

fn key(region: &Name) -> String {
    format!("{PREFIX}{region}")
}
