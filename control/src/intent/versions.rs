//! All versions, out of the store, the newest in memory.
//!
//! The rule: the newest version that could be read whole stays until a newer one can be. Without the store it goes on
//! to be given. Numbers rise above everything that this node has seen, also when an older store was restored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::{Chain, Metrics};
use tokio::sync::watch;

use super::Version;
use super::content::{CURRENT, HEADERS, Header, header_key, part_key, parts, parts_prefix};
use crate::store::{Condition, Fence, Store, StoreError, Value, Write};

/// Versions that can be gone back to.
pub const KEPT: u64 = 50;
/// Of these, others than the newest in memory.
const IN_MEMORY: usize = 8;
/// The store is read again after so long, told or not.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Room in one commit for the parts of versions that are not kept.
const MOST_DELETES: usize = 80;

#[derive(Debug)]
pub struct Versions {
    store: Store,
    current: ArcSwapOption<Version>,
    older: Mutex<BTreeMap<u64, Arc<Version>>>,
    changed: watch::Sender<u64>,
    shown: Gauge,
}

impl Versions {
    /// Empty until [`Self::refresh`] or [`Self::follow`] has read the store. Shows `spillway_control_intent_version`.
    pub fn new(store: Store, metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
            store,
            current: ArcSwapOption::empty(),
            older: Mutex::default(),
            changed: watch::Sender::new(0),
            shown: metrics.register("control_intent_version", "The newest version of intent", Gauge::default()),
        })
    }

    /// The newest version; none where nothing was applied, or nothing could be read yet.
    pub fn current(&self) -> Option<Arc<Version>> {
        self.current.load_full()
    }

    /// Tells of each newer version, with its number; 0: none yet.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// One of those that are kept.
    pub async fn version(&self, number: u64) -> Result<Option<Arc<Version>>, StoreError> {
        if let Some(current) = self.current().filter(|current| current.number == number) {
            return Ok(Some(current));
        }
        if let Some(version) = self.older.lock().get(&number) {
            return Ok(Some(version.clone()));
        }
        let Some(version) = self.load(number).await? else { return Ok(None) };
        Ok(Some(self.remember(version)))
    }

    /// The headers of all versions that are kept, the newest first.
    pub async fn history(&self) -> Result<Vec<Header>, StoreError> {
        let headers = self.store.list(HEADERS).await?;
        let mut headers: Vec<Header> =
            headers.iter().map(|(key, value)| Header::decode(key, value)).collect::<Result<_, _>>()?;
        headers.sort_by_key(|header| std::cmp::Reverse(header.version));
        Ok(headers)
    }

    /// Reads the store, and says what is current then.
    pub async fn refresh(&self) -> Result<Option<Arc<Version>>, StoreError> {
        let stored = self.stored().await?.map(|(number, _)| number);
        let held = self.current().map(|current| current.number);
        if let Some(number) = stored
            && held.is_none_or(|held| held < number)
        {
            let version = self.load(number).await?.ok_or_else(|| StoreError::Corrupt { key: header_key(number) })?;
            self.take(Arc::new(version));
        }
        Ok(self.current())
    }

    /// Follows the store until stopped.
    pub async fn follow(self: Arc<Self>, drain: Drain) {
        let mut changed = self.store.watch(CURRENT);
        let mut told = false;
        loop {
            changed.mark_unchanged();
            match self.refresh().await {
                Ok(_) => told = false,
                Err(error) if std::mem::replace(&mut told, true) => drop(error),
                Err(error) => {
                    let serving = self.current().map(|current| current.number);
                    tracing::error!(error = %Chain(&error), serving, "intent cannot be read, the last good one stays");
                }
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep(if told { Duration::from_secs(1) } else { LOOK_EVERY }) => {}
                () = drain.stopped() => return,
            }
        }
    }

    /// Makes a version current, in place of the one that is. Its number is [`Self::next`]'s.
    pub async fn append(&self, fence: &Fence, version: Version, header: &Header) -> Result<Arc<Version>, StoreError> {
        let number = version.number;
        let stored = self.stored().await?;
        if stored.as_ref().is_some_and(|(stored, _)| *stored >= number) {
            return Err(StoreError::Conflict(CURRENT.into()));
        }
        let unchanged = match stored {
            Some((_, revision)) => Condition::At(CURRENT.into(), revision),
            None => Condition::Absent(CURRENT.into()),
        };
        let whole = self.put_parts(fence, &version, unchanged).await?;
        self.put_header(fence, header, &whole).await?;
        let version = Arc::new(version);
        self.take(version.clone());
        Ok(version)
    }

    /// The number of the next version.
    pub fn next(&self) -> u64 {
        self.current().map_or(1, |current| current.number + 1)
    }

    /// Writes a version's content; what must hold for its header. A commit of which nobody knows what became of it may
    /// be done late: then another version of the number is current already, or else finds a part that is not its own.
    async fn put_parts(
        &self,
        fence: &Fence,
        version: &Version,
        unchanged: Condition,
    ) -> Result<Vec<Condition>, StoreError> {
        let mut whole = vec![unchanged.clone()];
        for (part, bytes) in parts(&version.encoded).enumerate() {
            let key = part_key(version.number, part);
            let write = vec![Write::Put(key.clone(), bytes)];
            let revision = self.store.commit(fence, std::slice::from_ref(&unchanged), write).await?;
            whole.push(Condition::At(key, revision));
        }
        Ok(whole)
    }

    async fn put_header(&self, fence: &Fence, header: &Header, whole: &[Condition]) -> Result<(), StoreError> {
        let mut writes = vec![
            Write::Put(CURRENT.into(), header.version.to_string().into()),
            Write::Put(header_key(header.version), header.encode()),
        ];
        writes.extend(self.outdated(header.version).await?);
        self.store.commit(fence, whole, writes).await.map(|_| ())
    }

    /// Removes versions that are not kept beside a new one, as far as one commit can.
    async fn outdated(&self, newest: u64) -> Result<Vec<Write>, StoreError> {
        let oldest = (newest + 1).saturating_sub(KEPT);
        let mut writes = Vec::new();
        let headers = self.history().await?;
        for header in headers.iter().rev().take_while(|header| header.version < oldest) {
            if writes.len() + header.parts >= MOST_DELETES && !writes.is_empty() {
                break;
            }
            writes.push(Write::Delete(header_key(header.version)));
            writes.extend((0..header.parts).map(|part| Write::Delete(part_key(header.version, part))));
        }
        Ok(writes)
    }

    /// The number and its revision.
    async fn stored(&self) -> Result<Option<(u64, u64)>, StoreError> {
        let Some(Value { bytes, revision }) = self.store.get(CURRENT).await? else { return Ok(None) };
        let number = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
        Ok(Some((number.ok_or_else(|| StoreError::Corrupt { key: CURRENT.into() })?, revision)))
    }

    async fn load(&self, number: u64) -> Result<Option<Version>, StoreError> {
        let key = header_key(number);
        let Some(header) = self.store.get(&key).await? else { return Ok(None) };
        let header = Header::decode(&key, &header)?;
        let parts = self.store.list(&parts_prefix(number)).await?;
        // A large one takes a while to compile.
        let read = tokio::task::spawn_blocking(move || Version::read(&header, &parts));
        read.await.map_err(|lost| StoreError::Unavailable(lost.into()))?.map(Some)
    }

    fn take(&self, version: Arc<Version>) {
        let mut older = self.older.lock();
        let current = self.current();
        if current.as_ref().is_some_and(|current| current.number >= version.number) {
            return;
        }
        if let Some(current) = current {
            older.insert(current.number, current);
            bound(&mut older);
        }
        let number = version.number;
        self.current.store(Some(version));
        drop(older);
        self.shown.set(i64::try_from(number).unwrap_or(i64::MAX));
        self.changed.send_replace(number);
        tracing::info!(version = number, "intent");
    }

    fn remember(&self, version: Version) -> Arc<Version> {
        let version = Arc::new(version);
        let mut older = self.older.lock();
        older.insert(version.number, version.clone());
        bound(&mut older);
        version
    }
}

fn bound(older: &mut BTreeMap<u64, Arc<Version>>) {
    while older.len() > IN_MEMORY {
        older.pop_first();
    }
}

#[cfg(test)]
#[path = "versions_tests.rs"]
mod tests;
