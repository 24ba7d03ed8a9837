//! One bucket for each key, exactly, in bounded memory.
//!
//! The rule: a key's bucket is never shared with another key's, and a caller who makes up a million
//! keys takes neither memory nor places from others. The table does not hash (the caller does, with a
//! secret seed, over all that tells one key from another) and does not know the keys' limits.
//!
//! ```text
//! unseen (full) --admitted, room--> held --TAT passes, a sweep--> unseen
//! unseen --no room: the table's or its owner's bound is reached--> judged by the owner's overflow bucket
//! ```
//!
//! A bucket whose theoretical arrival time has passed is full, and so is a key that was never seen:
//! forgetting it loses nothing. A sweep forgets all such keys. It runs when the table has twice the
//! keys that the last sweep left (two looks for each new key), and when there is no room, at most once
//! in [`SWEEP_EVERY`]: a paid-off key may keep its place that long. A sweep takes about 2 ns for a key
//! that stays and 30 ns for one that goes, so a process with many keys keeps many tables and picks one
//! by the key's hash.
//!
//! Memory: 33 bytes a place, in powers of two of which 7/8 are used: 38 to 75 bytes for a key of a full
//! table. Bounds of 7/8 of a power of two (14,336; 28,672) use it best.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use super::{Class, Decision, Gcra};

/// How often a table without room looks for room.
pub const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// Keys below which growing is not worth a sweep.
const SMALL: usize = 64;

/// How much a table holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableBounds {
    /// Keys in debt. Default 28,672: 64 such tables hold 1.8 million.
    pub keys: usize,
    /// Keys in debt of one owner. Default 14,336: half of them.
    pub keys_of_owner: usize,
}

impl Default for TableBounds {
    fn default() -> Self {
        Self { keys: 28_672, keys_of_owner: 14_336 }
    }
}

/// A key as the table knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// A hash under a secret seed of the limit, the tenant and the entity: equal hashes are equal keys.
    pub hash: u128,
    /// Who answers for the key: the tenant's number in this process.
    pub owner: u32,
}

/// What the table says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    pub decision: Decision,
    /// There was no room for the key: the owner's overflow bucket decided.
    pub overflowed: bool,
}

/// Buckets by key.
#[derive(Clone, Debug)]
pub struct Table {
    bounds: TableBounds,
    buckets: HashMap<u128, Bucket, BuildHasherDefault<Folded>>,
    /// Keys held of each owner that has any.
    held: BTreeMap<u32, usize>,
    /// Keys at which growing is worth a sweep.
    sweep_at: usize,
    /// When the last sweep was, ns.
    swept: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Theoretical arrival time, ns.
    state: u64,
    owner: u32,
}

impl Table {
    pub fn new(bounds: TableBounds) -> Self {
        Self { bounds, buckets: HashMap::default(), held: BTreeMap::new(), sweep_at: SMALL, swept: None }
    }

    /// Judges a request by the bucket of its key, which follows `gcra`. `overflow` is the state of the
    /// owner's bucket for keys that find no room; it follows the same `gcra`.
    pub fn decide(
        &mut self,
        key: Key,
        gcra: &Gcra,
        now_ns: u64,
        cost: u32,
        class: Class,
        overflow: &mut u64,
    ) -> Judged {
        if let Some(bucket) = self.buckets.get_mut(&key.hash) {
            let decision = gcra.decide(bucket.state, now_ns, cost, class);
            keep(decision, &mut bucket.state);
            return Judged { decision, overflowed: false };
        }
        let mut state = now_ns;
        let decision = gcra.decide(state, now_ns, cost, class);
        keep(decision, &mut state);
        if state == now_ns {
            return Judged { decision, overflowed: false };
        }
        if !self.make_room(key.owner, now_ns) {
            let decision = gcra.decide(*overflow, now_ns, cost, class);
            keep(decision, overflow);
            return Judged { decision, overflowed: true };
        }
        self.buckets.insert(key.hash, Bucket { state, owner: key.owner });
        *self.held.entry(key.owner).or_default() += 1;
        Judged { decision, overflowed: false }
    }

    /// Undoes an admission of `cost` by a key's own bucket; one that is full again is forgotten.
    pub fn give_back(&mut self, hash: u128, gcra: &Gcra, now_ns: u64, cost: u32) {
        let Some(bucket) = self.buckets.get_mut(&hash) else { return };
        bucket.state = gcra.give_back(bucket.state, cost);
        let Bucket { state, owner } = *bucket;
        if state <= now_ns {
            self.buckets.remove(&hash);
            self.release(owner);
        }
    }

    /// What [`Table::decide`] would say, but for the room that a sweep might find.
    pub fn would_decide(&self, key: Key, gcra: &Gcra, now_ns: u64, cost: u32, class: Class, overflow: u64) -> Judged {
        let held = self.buckets.get(&key.hash).map(|bucket| bucket.state);
        let overflowed = held.is_none() && cost > 0 && !self.has_room(key.owner);
        let state = if overflowed { overflow } else { held.unwrap_or(now_ns) };
        Judged { decision: gcra.decide(state, now_ns, cost, class), overflowed }
    }

    /// Keys held: those in debt, and those that no sweep has found since they were paid off.
    pub fn len(&self) -> usize {
        self.buckets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// Keys held of one owner.
    pub fn len_of(&self, owner: u32) -> usize {
        self.held.get(&owner).copied().unwrap_or(0)
    }

    fn make_room(&mut self, owner: u32, now_ns: u64) -> bool {
        let due = self.swept.is_none_or(|swept| u128::from(now_ns.saturating_sub(swept)) >= SWEEP_EVERY.as_nanos());
        if self.len() >= self.sweep_at || (due && !self.has_room(owner)) {
            self.sweep(now_ns);
        }
        self.has_room(owner)
    }

    fn has_room(&self, owner: u32) -> bool {
        self.len() < self.bounds.keys && self.len_of(owner) < self.bounds.keys_of_owner
    }

    fn release(&mut self, owner: u32) {
        if let Some(count) = self.held.get_mut(&owner) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.held.remove(&owner);
            }
        }
    }

    fn sweep(&mut self, now_ns: u64) {
        let held = &mut self.held;
        self.buckets.retain(|_, bucket| {
            let in_debt = bucket.state > now_ns;
            if !in_debt && let Some(count) = held.get_mut(&bucket.owner) {
                *count = count.saturating_sub(1);
            }
            in_debt
        });
        held.retain(|_, count| *count > 0);
        self.sweep_at = self.len().saturating_mul(2).max(SMALL);
        self.swept = Some(now_ns);
        if self.buckets.capacity() / 2 > self.sweep_at {
            self.buckets.shrink_to(self.sweep_at);
        }
    }
}

fn keep(decision: Decision, state: &mut u64) {
    if let Decision::Admitted { state: next, .. } = decision {
        *state = next;
    }
}

/// The keys are hashes already. Both halves count, so that tables may be picked by any bits of them.
#[derive(Clone, Copy, Debug, Default)]
struct Folded(u64);

impl Hasher for Folded {
    fn write_u128(&mut self, hash: u128) {
        self.0 = (hash >> 64) as u64 ^ hash as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
