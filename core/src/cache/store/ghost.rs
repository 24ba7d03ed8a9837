//! The keys that an owner lost lately: fingerprints in the order in which they came.
//!
//! At most 90 % as many as the owner holds entries, which is what the main queue of a full cache holds.

use std::collections::{HashMap, VecDeque};

use super::seed::Seed;
use super::table_row;

pub struct Ghost {
    queue: VecDeque<u32>,
    /// The number of the first in the queue; those behind it count on, and wrap.
    first: u32,
    /// Fingerprint -> its latest number. One that was taken has none and leaves the queue in its turn.
    numbers: HashMap<u32, u32, Seed>,
}

impl Ghost {
    /// Bytes per fingerprint: its row, and the queue half full.
    pub const OVERHEAD: u64 = (table_row::<(u32, u32)>() + 2 * size_of::<u32>()) as u64;

    pub fn new(seed: Seed) -> Self {
        Self { queue: VecDeque::new(), first: 0, numbers: HashMap::with_hasher(seed) }
    }

    pub fn push(&mut self, fingerprint: u32) {
        self.numbers.insert(fingerprint, self.first.wrapping_add(self.queue.len() as u32));
        self.queue.push_back(fingerprint);
    }

    /// Whether the fingerprint is here; from now on it is not.
    pub fn take(&mut self, fingerprint: u32) -> bool {
        self.numbers.remove(&fingerprint).is_some()
    }

    /// Forgets the oldest beyond what an owner of so many entries may keep.
    pub fn trim(&mut self, entries: u32) {
        let most = entries as usize * 9 / 10;
        while self.queue.len() > most {
            let Some(oldest) = self.queue.pop_front() else { break };
            if self.numbers.get(&oldest) == Some(&self.first) {
                self.numbers.remove(&oldest);
            }
            self.first = self.first.wrapping_add(1);
        }
        // An owner that gave way to others gives this memory back too.
        if self.queue.capacity() > 4 * most {
            self.queue.shrink_to(most);
            self.numbers.shrink_to(most);
        }
    }

    #[cfg(test)]
    pub fn capacity(&self) -> usize {
        self.queue.capacity().max(self.numbers.capacity())
    }

    #[cfg(test)]
    pub fn len(&self) -> (usize, usize) {
        (self.queue.len(), self.numbers.len())
    }
}
