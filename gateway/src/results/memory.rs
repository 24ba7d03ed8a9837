//! Results in this process' memory, and the calls that are under way for them.
//!
//! The rule: a result and the flight that will replace it lie behind one lock, so that nobody misses
//! the one and does not find the other. Locks are held for look-ups and inserts alone, and never across
//! a wait. Where the feature channel's lock is held too, it is taken first.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use spillway_core::cache::key::Key;
use spillway_core::cache::store::{KeyHash, Removed, Store};
use spillway_core::units::Name;
use tokio::sync::oneshot;

use super::entry::{About, Entry};
use super::flight::{Began, Crowd, Flight, Joined, Lead, Needed, Turn};
use super::metrics::Metrics;

/// A shard has room for 8 results of its largest size, here 1 MiB.
const SHARD: u64 = 8 << 20;
const MOST_SHARDS: u64 = 64;

pub struct Memory {
    shards: Box<[Mutex<Shard>]>,
    capacity: u64,
    /// A number for each tenant that stored something; few, and never another one's.
    owners: Mutex<HashMap<Name, u32>>,
    pub metrics: Arc<Metrics>,
}

struct Shard {
    store: Store<Arc<Entry>>,
    flights: HashMap<KeyHash, Arc<Flight>>,
}

/// What a request that found nothing fresh does.
pub enum Entered {
    /// Somebody has stored it since.
    Found(Arc<Entry>),
    Waits(oneshot::Receiver<Turn>),
    Leads(Lead),
    /// It goes alone.
    Crowded,
}

impl Memory {
    pub fn new(capacity: u64, metrics: Arc<Metrics>) -> Self {
        let shards = (capacity / SHARD).clamp(1, MOST_SHARDS);
        let shard = || {
            let store = Store::new(capacity / shards, rand::random());
            Mutex::new(Shard { store, flights: HashMap::new() })
        };
        Self { shards: (0..shards).map(|_| shard()).collect(), capacity, owners: Mutex::default(), metrics }
    }

    /// The result of a key, counted as a use.
    pub fn get(&self, key: &Key) -> Option<Arc<Entry>> {
        let mut shard = self.shard(&key.hash).lock();
        shard.store.get(&key.hash).filter(|entry| entry.key.is(key)).cloned()
    }

    /// The same, not counted.
    pub fn peek(&self, key: &Key) -> Option<Arc<Entry>> {
        let shard = self.shard(&key.hash).lock();
        shard.store.peek(&key.hash).filter(|entry| entry.key.is(key)).cloned()
    }

    /// Whether a call for this key is under way.
    pub fn is_called(&self, key: &Key) -> bool {
        let shard = self.shard(&key.hash).lock();
        shard.flights.get(&key.hash).is_some_and(|flight| flight.key.is(key))
    }

    /// Waits for a call that is under way, or leads one that begins. `waits`: false only leads.
    pub fn enter(self: &Arc<Self>, entering: Entering<'_>) -> Option<Entered> {
        let Entering { key, about, began, needed, waits, is_fresh, is_purged } = entering;
        let mut shard = self.shard(&key.hash).lock();
        if let Some(entry) = shard.store.peek(&key.hash).filter(|entry| entry.key.is(key) && is_fresh(entry)) {
            return Some(Entered::Found(entry.clone()));
        }
        // One hash for two keys, and a call that does not fit: the newer one takes the place.
        if let Some(flight) = shard.flights.get(&key.hash).filter(|flight| flight.key.is(key)) {
            if !waits {
                return None;
            }
            match flight.join(needed, is_purged) {
                Joined::Waits(turn) => return Some(Entered::Waits(turn)),
                Joined::Full => return Some(Entered::Crowded),
                Joined::Unfit => {}
            }
        }
        let flight = Arc::new(Flight::new(key.clone(), about.clone(), began));
        shard.flights.insert(key.hash, flight.clone());
        drop(shard);
        Some(Entered::Leads(Lead::new(self.clone(), flight)))
    }

    /// Ends a flight, and stores its answer where it may be: `dependencies` are what removes it. Whether it
    /// was, and who waited.
    pub fn land(&self, flight: &Arc<Flight>, entry: &Arc<Entry>, dependencies: Option<&[u64]>) -> (bool, Crowd) {
        let mut shard = self.shard(&flight.key.hash).lock();
        let stored = dependencies.is_some_and(|dependencies| self.put(&mut shard, entry, dependencies));
        remove(&mut shard, flight);
        (stored, flight.end())
    }

    /// Stores an answer of a call that was nobody else's. Whether it was.
    pub fn insert(&self, entry: &Arc<Entry>, dependencies: &[u64]) -> bool {
        let mut shard = self.shard(&entry.key.hash).lock();
        self.put(&mut shard, entry, dependencies)
    }

    /// Ends a flight. Who waited.
    pub fn end(&self, flight: &Arc<Flight>) -> Crowd {
        let mut shard = self.shard(&flight.key.hash).lock();
        remove(&mut shard, flight);
        flight.end()
    }

    /// Ends a flight that nobody waits for; false: somebody does.
    pub fn end_if_empty(&self, flight: &Arc<Flight>) -> bool {
        let mut shard = self.shard(&flight.key.hash).lock();
        if flight.anyone_waits() {
            return false;
        }
        remove(&mut shard, flight);
        true
    }

    /// Removes an entry that was found to be void.
    pub fn remove(&self, entry: &Arc<Entry>) -> Removed {
        let mut shard = self.shard(&entry.key.hash).lock();
        if shard.store.peek(&entry.key.hash).is_none_or(|found| !Arc::ptr_eq(found, entry)) {
            return Removed::default();
        }
        let removed = shard.store.remove(&entry.key.hash);
        self.removed(removed)
    }

    /// Removes all results that depend on any of these rows.
    pub fn invalidate(&self, rows: &[u64]) -> Removed {
        self.each(|store| sum(rows.iter().map(|row| store.invalidate(*row))))
    }

    /// Removes what `keep` does not want, shard by shard.
    pub fn retain(&self, keep: impl Fn(&Entry) -> bool) -> Removed {
        self.each(|store| store.retain(|_, entry| keep(entry)))
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Longer messages are not stored.
    pub fn largest(&self) -> usize {
        usize::try_from(self.capacity / self.shards.len() as u64 / 8).unwrap_or(usize::MAX)
    }

    /// Calls under way.
    pub fn flights(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().flights.len()).sum()
    }

    /// The tenants that hold most, and how much.
    pub fn largest_tenants(&self, most: usize) -> Vec<(Name, u64)> {
        let owners: Vec<(Name, u32)> = self.owners.lock().iter().map(|(name, owner)| (name.clone(), *owner)).collect();
        let bytes = |owner| self.shards.iter().map(|shard| shard.lock().store.bytes_of(owner)).sum();
        let mut held: Vec<(Name, u64)> = owners.into_iter().map(|(name, owner)| (name, bytes(owner))).collect();
        held.sort_unstable_by(|(one, most), (other, less)| less.cmp(most).then_with(|| one.cmp(other)));
        held.retain(|(_, bytes)| *bytes > 0);
        held.truncate(most);
        held
    }

    /// The last bytes of a hash choose the shard, as the first ones choose the place within it.
    fn shard(&self, hash: &KeyHash) -> &Mutex<Shard> {
        let last = u64::from_le_bytes([hash[24], hash[25], hash[26], hash[27], hash[28], hash[29], hash[30], hash[31]]);
        &self.shards[(last % self.shards.len() as u64) as usize]
    }

    fn put(&self, shard: &mut Shard, entry: &Arc<Entry>, dependencies: &[u64]) -> bool {
        let owner = self.owner(&entry.about.tenant);
        let before = (shard.store.len(), shard.store.bytes());
        let inserted = shard.store.insert(&entry.key.hash, owner, entry.bytes(), dependencies, entry.clone());
        self.count(before, (shard.store.len(), shard.store.bytes()));
        self.metrics.evicted.inc_by(inserted.evicted.entries);
        if inserted.stored {
            self.metrics.stored.inc();
        }
        inserted.stored
    }

    fn owner(&self, tenant: &Name) -> u32 {
        let mut owners = self.owners.lock();
        if let Some(owner) = owners.get(tenant) {
            return *owner;
        }
        let next = u32::try_from(owners.len()).unwrap_or(u32::MAX);
        owners.insert(tenant.clone(), next);
        next
    }

    fn each(&self, mut remove: impl FnMut(&mut Store<Arc<Entry>>) -> Removed) -> Removed {
        sum(self.shards.iter().map(|shard| self.removed(remove(&mut shard.lock().store))))
    }

    fn removed(&self, removed: Removed) -> Removed {
        self.metrics.entries.dec_by(signed(removed.entries));
        self.metrics.bytes.dec_by(signed(removed.bytes));
        removed
    }

    fn count(&self, before: (usize, u64), after: (usize, u64)) {
        self.metrics.entries.inc_by(signed(after.0 as u64) - signed(before.0 as u64));
        self.metrics.bytes.inc_by(signed(after.1) - signed(before.1));
    }
}

/// A request on its way into a flight.
pub struct Entering<'a> {
    pub key: &'a Key,
    pub about: &'a Arc<About>,
    /// What is known now, if it leads.
    pub began: Began,
    /// What a call must have known, if it waits.
    pub needed: Needed,
    pub waits: bool,
    pub is_fresh: &'a dyn Fn(&Entry) -> bool,
    pub is_purged: &'a dyn Fn(&About, u64) -> bool,
}

fn remove(shard: &mut Shard, flight: &Arc<Flight>) {
    if shard.flights.get(&flight.key.hash).is_some_and(|found| Arc::ptr_eq(found, flight)) {
        shard.flights.remove(&flight.key.hash);
    }
}

fn sum(removed: impl Iterator<Item = Removed>) -> Removed {
    removed.fold(Removed::default(), |sum, removed| Removed {
        entries: sum.entries + removed.entries,
        bytes: sum.bytes + removed.bytes,
    })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
