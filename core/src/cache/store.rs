//! The bounded store behind a gateway's results in memory: what stays and what goes.
//!
//! The rule: bytes never pass the capacity, and a tenant (the *owner* of entries) that holds no more than
//! its fair share, capacity / owners that hold something, loses nothing to another one. An owner alone
//! may use everything. When the store is full, the owner that holds most gives way; as that one holds
//! more than the average, it is over its fair share.
//!
//! It knows neither time nor freshness, does not lock, and does not read values: it hands back what was
//! stored last under a key, or nothing.
//!
//! What an owner loses is decided by S3-FIFO (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023), with the owner's own bytes as the size of the cache:
//!
//! ```text
//!   insert                          insert of a ghost
//!     v                                v
//!   small (10 %) --2 or more uses--> main (90 %) --used: one use less, once more around--+
//!     | fewer uses                    | ^                                                |
//!     v                               | +------------------------------------------------+
//!   gone, leaves a ghost              v not used
//!   (32 bits of its key)             gone
//! ```
//!
//! An eviction takes from the tail of a queue alone, so that a scan passes through `small` and leaves
//! `main` as it is. A look-up and an insert take O(1), amortised, and O(log owners) where bytes change.
//!
//! Weighed is what an entry takes. Not weighed are about 200 bytes for each owner that holds something,
//! and the places of entries that went: these serve later entries, or go with [`Store::clear`].

mod arena;
mod dependencies;
mod ghost;
mod holding;
mod seed;
mod shares;

use std::collections::HashMap;

use arena::{Arena, NONE};
use dependencies::Dependencies;
use ghost::Ghost;
use holding::{Holding, Queue};
use seed::Seed;
use shares::Shares;

/// The key of a result: a uniformly distributed hash of all that makes it what it is, the tenant included.
pub type KeyHash = [u8; 32];

/// The largest capacity: every entry and dependency weighs more than 32 bytes, so 32 bits count them all.
const MOST_BYTES: u64 = 1 << 37;
/// An entry may take 1 / this of the capacity.
const LARGEST: u64 = 8;
/// Uses are counted to here (the paper's 2 bits).
const MOST_USES: u8 = 3;
/// With this many uses an entry goes from `small` to `main` (the paper's "more than once").
const PROMOTED_AT: u8 = 2;
/// Entries that one eviction may spare before it takes the next one whatever its uses: bounds the time
/// under the caller's lock to about 50 µs. Common evictions spare a handful.
const MOST_SPARED: u32 = 1_000;

/// Values of type `V` by [`KeyHash`].
pub struct Store<V> {
    capacity: u64,
    bytes: u64,
    entries: Arena<Entry<V>>,
    /// Entries by the first 8 bytes of their key. Two keys that share these do not fit beside each other:
    /// the later one replaces the earlier one (at a million entries, one chance in 37 million).
    table: HashMap<u64, u32, Seed>,
    holdings: Arena<Holding>,
    owners: HashMap<u32, u32, Seed>,
    shares: Shares,
    dependencies: Dependencies,
    seed: Seed,
}

/// How many entries went, and their weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub entries: u64,
    pub bytes: u64,
}

/// What an insert did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted {
    /// False where the entry is too large: for the store, or for a share of it while the store is full.
    pub stored: bool,
    /// What made room. An older value of the same key is not counted.
    pub evicted: Removed,
}

struct Entry<V> {
    key: KeyHash,
    /// None in a free place alone.
    value: Option<V>,
    weight: u32,
    holding: u32,
    previous: u32,
    next: u32,
    /// Its first link among the dependencies.
    dependencies: u32,
    queue: Queue,
    uses: u8,
}

impl<V> Store<V> {
    /// What an entry weighs beyond its value: its place, and its rows in the table and among the ghosts
    /// at their emptiest load.
    pub const ENTRY_OVERHEAD: u64 = (size_of::<Entry<V>>() + table_row::<(u64, u32)>()) as u64 + Ghost::OVERHEAD;
    /// What each dependency of an entry weighs, likewise.
    pub const DEPENDENCY_OVERHEAD: u64 = Dependencies::OVERHEAD;

    /// An empty store of `capacity` bytes, at most 128 GiB. `seed` is drawn at random once per process, so
    /// that nobody outside can prepare keys that crowd one place of the tables.
    pub fn new(capacity: u64, seed: u64) -> Self {
        let seed = Seed(seed);
        Self {
            capacity: capacity.min(MOST_BYTES),
            bytes: 0,
            entries: Arena::default(),
            table: HashMap::with_hasher(seed),
            holdings: Arena::default(),
            owners: HashMap::with_hasher(seed),
            shares: Shares::default(),
            dependencies: Dependencies::new(seed),
            seed,
        }
    }

    /// The weight of an entry whose value takes `bytes`.
    pub fn weight(bytes: u64, dependencies: usize) -> u64 {
        (dependencies as u64)
            .saturating_mul(Self::DEPENDENCY_OVERHEAD)
            .saturating_add(bytes)
            .saturating_add(Self::ENTRY_OVERHEAD)
    }

    /// The value last stored under the key, counted as a use.
    pub fn get(&mut self, key: &KeyHash) -> Option<&V> {
        let index = self.find(key)?;
        let entry = &mut self.entries[index];
        entry.uses = (entry.uses + 1).min(MOST_USES);
        entry.value.as_ref()
    }

    /// Like [`Self::get`], not counted as a use.
    pub fn peek(&self, key: &KeyHash) -> Option<&V> {
        self.entries[self.find(key)?].value.as_ref()
    }

    /// Stores a value of `bytes` for `owner`; [`Self::invalidate`] with any of `dependencies` removes it.
    /// Whatever the outcome, an older value of the key is gone. A new value of a key stays in the queue,
    /// and keeps the uses, of the old one.
    pub fn insert(&mut self, key: &KeyHash, owner: u32, bytes: u64, dependencies: &[u64], value: V) -> Inserted {
        let mut evicted = Removed::default();
        let mut former = None;
        if let Some(index) = self.table.get(&prefix(key)).copied() {
            let entry = &self.entries[index];
            let same = entry.key == *key;
            if same && self.holdings[entry.holding].owner == owner {
                former = Some((entry.queue, entry.uses));
            }
            let weight = self.delete(index);
            if !same {
                evicted.add(weight);
            }
        }
        let weight = Self::weight(bytes, dependencies.len());
        let small_enough = u32::try_from(weight).ok().filter(|_| weight <= self.capacity / LARGEST);
        match small_enough {
            Some(weight) if self.make_room(owner, weight.into(), &mut evicted) => {
                self.add(key, owner, weight, dependencies, value, former);
                Inserted { stored: true, evicted }
            }
            _ => Inserted { stored: false, evicted },
        }
    }

    /// Removes the entry of a key.
    pub fn remove(&mut self, key: &KeyHash) -> Removed {
        let mut removed = Removed::default();
        if let Some(index) = self.find(key) {
            removed.add(self.delete(index));
        }
        removed
    }

    /// Removes every entry that was stored with this dependency.
    pub fn invalidate(&mut self, dependency: u64) -> Removed {
        let mut removed = Removed::default();
        while let Some(index) = self.dependencies.first(dependency) {
            removed.add(self.delete(index));
        }
        removed
    }

    /// Removes everything that an owner holds.
    pub fn remove_owner(&mut self, owner: u32) -> Removed {
        let mut removed = Removed::default();
        while let Some(holding) = self.owners.get(&owner) {
            let index = self.holdings[*holding].next_out().1;
            removed.add(self.delete(index));
        }
        removed
    }

    /// Removes the entries that `keep` (owner, value) does not want. Looks at all of them.
    pub fn retain(&mut self, mut keep: impl FnMut(u32, &V) -> bool) -> Removed {
        let mut removed = Removed::default();
        for index in self.entries.indexes() {
            let entry = &self.entries[index];
            let owner = self.holdings[entry.holding].owner;
            if entry.value.as_ref().is_some_and(|value| !keep(owner, value)) {
                removed.add(self.delete(index));
            }
        }
        removed
    }

    /// Removes everything and gives its memory back, also that which other removals keep for later entries.
    pub fn clear(&mut self) -> Removed {
        let removed = Removed { entries: self.len() as u64, bytes: self.bytes };
        *self = Self::new(self.capacity, self.seed.0);
        removed
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The weight of all entries, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The weight of an owner's entries, in bytes.
    pub fn bytes_of(&self, owner: u32) -> u64 {
        self.owners.get(&owner).map_or(0, |holding| self.holdings[*holding].bytes())
    }

    /// KeyHash, owner and value of every entry, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&KeyHash, u32, &V)> {
        self.entries.indexes().filter_map(|index| {
            let entry = &self.entries[index];
            let value = entry.value.as_ref()?;
            Some((&entry.key, self.holdings[entry.holding].owner, value))
        })
    }

    fn find(&self, key: &KeyHash) -> Option<u32> {
        self.table.get(&prefix(key)).copied().filter(|index| self.entries[*index].key == *key)
    }

    /// Evicts until `weight` more bytes of `owner` fit; false where no owner but others within their share
    /// could give way.
    fn make_room(&mut self, owner: u32, weight: u64, evicted: &mut Removed) -> bool {
        while self.bytes + weight > self.capacity {
            let own = self.owners.get(&owner).copied();
            let after = own.map_or(0, |own| self.holdings[own].bytes()) + weight;
            let victim = match self.shares.largest() {
                Some((holding, bytes)) if bytes > after => Some(holding),
                _ => own,
            };
            let Some(victim) = victim else { return false };
            evicted.add(self.evict(victim));
        }
        true
    }

    /// Takes one entry from a holding and returns its weight.
    fn evict(&mut self, holding: u32) -> u64 {
        let mut spared = 0;
        loop {
            let (queue, index) = self.holdings[holding].next_out();
            let entry = &mut self.entries[index];
            let needed = if queue == Queue::Small { PROMOTED_AT } else { 1 };
            if entry.uses < needed || spared == MOST_SPARED {
                if queue == Queue::Small {
                    let fingerprint = fingerprint(&entry.key);
                    self.holdings[holding].ghost.push(fingerprint);
                }
                return self.delete(index);
            }
            spared += 1;
            entry.uses = if queue == Queue::Small { 0 } else { entry.uses - 1 };
            self.unlink(index);
            self.link(index, Queue::Main);
        }
    }

    fn add(
        &mut self,
        key: &KeyHash,
        owner: u32,
        weight: u32,
        dependencies: &[u64],
        value: V,
        former: Option<(Queue, u8)>,
    ) {
        let holding = match self.owners.get(&owner) {
            Some(holding) => *holding,
            None => {
                let holding = self.holdings.put(Holding::new(owner, self.seed));
                self.owners.insert(owner, holding);
                holding
            }
        };
        let held = &mut self.holdings[holding];
        held.entries += 1;
        let was_ghost = held.ghost.take(fingerprint(key));
        let (queue, uses) = former.unwrap_or((if was_ghost { Queue::Main } else { Queue::Small }, 0));
        let index = self.entries.put(Entry {
            key: *key,
            value: Some(value),
            weight,
            holding,
            previous: NONE,
            next: NONE,
            dependencies: NONE,
            queue,
            uses,
        });
        self.entries[index].dependencies = self.dependencies.link(index, dependencies);
        self.table.insert(prefix(key), index);
        self.link(index, queue);
        self.bytes += u64::from(weight);
        self.shares.set(holding, self.holdings[holding].bytes());
    }

    /// Removes an entry from everywhere and returns its weight.
    fn delete(&mut self, index: u32) -> u64 {
        self.unlink(index);
        let entry = &mut self.entries[index];
        entry.value = None;
        let (weight, holding) = (u64::from(entry.weight), entry.holding);
        self.table.remove(&prefix(&entry.key));
        self.dependencies.unlink(entry.dependencies);
        self.entries.free(index);
        self.bytes -= weight;
        let held = &mut self.holdings[holding];
        held.entries -= 1;
        held.ghost.trim(held.entries);
        self.shares.set(holding, held.bytes());
        if held.entries == 0 {
            self.owners.remove(&held.owner);
            self.holdings.free(holding);
        }
        weight
    }

    /// Puts an entry at the head of a queue of its holding.
    fn link(&mut self, index: u32, queue: Queue) {
        let entry = &mut self.entries[index];
        let list = self.holdings[entry.holding].list(queue);
        let head = list.head;
        (entry.queue, entry.previous, entry.next) = (queue, NONE, head);
        list.bytes += u64::from(entry.weight);
        list.head = index;
        match head {
            NONE => list.tail = index,
            head => self.entries[head].previous = index,
        }
    }

    /// Takes an entry out of its queue.
    fn unlink(&mut self, index: u32) {
        let entry = &self.entries[index];
        let list = self.holdings[entry.holding].list(entry.queue);
        let (previous, next) = (entry.previous, entry.next);
        list.bytes -= u64::from(entry.weight);
        match previous {
            NONE => list.head = next,
            previous => self.entries[previous].next = next,
        }
        match next {
            NONE => list.tail = previous,
            next => self.entries[next].previous = previous,
        }
    }
}

impl Removed {
    fn add(&mut self, weight: u64) {
        self.entries += 1;
        self.bytes += weight;
    }
}

/// The bytes of the key that place it in the table.
fn prefix(key: &KeyHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *key;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// The bytes of the key that stay when the entry is gone.
fn fingerprint(key: &KeyHash) -> u32 {
    let [.., a, b, c, d] = *key;
    u32::from_le_bytes([a, b, c, d])
}

/// Bytes per row of a `HashMap`: the row and a control byte, at its emptiest load after growing, 7/16.
const fn table_row<Row>() -> usize {
    (size_of::<Row>() + 1) * 16 / 7
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "store_traces.rs"]
mod traces;
