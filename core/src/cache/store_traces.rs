//! Traces of requests, and reference simulators that say how many of them a cache of equal entries hits.
//!
//! Plain functions over std, so that other crates' tests can take this file as it is. A trace is a list of
//! small numbers, one per key; a cache has `room` for so many entries.

use std::collections::{BinaryHeap, VecDeque};

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: a 64-bit random
/// source from any state, zero included.
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Endless draws of ranks 0..n, where rank r has probability (r + 1)^-exponent / sum over all ranks:
/// inverse transform by binary search, 8 n bytes.
pub fn zipf(n: usize, exponent: f64, mut random: impl FnMut() -> u64) -> impl Iterator<Item = usize> {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=n)
        .map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        })
        .collect();
    std::iter::repeat_with(move || {
        // 53 bits are what a double holds.
        let uniform = (random() >> 11) as f64 / (1_u64 << 53) as f64;
        sums.partition_point(|below| *below <= uniform * sum).min(n.saturating_sub(1))
    })
}

/// Hits of a cache that evicts the least recently used.
pub fn lru(trace: &[usize], room: usize) -> usize {
    let mut last_use = vec![None; keys(trace)];
    let (mut uses, mut held, mut hits) = (VecDeque::new(), 0, 0);
    for (now, key) in trace.iter().enumerate() {
        uses.push_back((*key, now));
        if last_use[*key].replace(now).is_some() {
            hits += 1;
            continue;
        }
        held += 1;
        while held > room {
            let Some((oldest, at)) = uses.pop_front() else { break };
            if last_use[oldest] == Some(at) {
                last_use[oldest] = None;
                held -= 1;
            }
        }
    }
    hits
}

/// Hits of the offline optimum: Belady's rule, which evicts what is used again last, and may refuse to
/// take what it would evict at once.
pub fn optimum(trace: &[usize], room: usize) -> usize {
    let mut next_use = vec![usize::MAX; trace.len()];
    let mut seen = vec![usize::MAX; keys(trace)];
    for (at, key) in trace.iter().enumerate().rev() {
        next_use[at] = std::mem::replace(&mut seen[*key], at);
    }
    // What is held, by its next use; an item of the heap is current where the two agree.
    let mut held_until = vec![None; seen.len()];
    let (mut latest, mut held, mut hits) = (BinaryHeap::new(), 0, 0);
    for (key, next) in trace.iter().zip(next_use) {
        latest.push((next, *key));
        if held_until[*key].replace(next).is_some() {
            hits += 1;
            continue;
        }
        held += 1;
        while held > room {
            let Some((until, victim)) = latest.pop() else { break };
            if held_until[victim] == Some(until) {
                held_until[victim] = None;
                held -= 1;
            }
        }
    }
    hits
}

/// Hits of S3-FIFO as in Algorithm 1 of its paper.
pub fn s3_fifo(trace: &[usize], room: usize) -> usize {
    let mut cache = S3Fifo::new(keys(trace), room);
    trace.iter().filter(|key| cache.hits(**key)).count()
}

fn keys(trace: &[usize]) -> usize {
    trace.iter().max().map_or(0, |most| most + 1)
}

struct S3Fifo {
    small_room: usize,
    main_room: usize,
    small: VecDeque<usize>,
    main: VecDeque<usize>,
    /// (key, number); a key is a ghost while its number is the one in `ghost_number`.
    ghost: VecDeque<(usize, u64)>,
    ghosts: usize,
    number: u64,
    ghost_number: Vec<Option<u64>>,
    /// Uses of what is held.
    uses: Vec<Option<u8>>,
}

impl S3Fifo {
    fn new(keys: usize, room: usize) -> Self {
        Self {
            small_room: room / 10,
            main_room: room - room / 10,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghost: VecDeque::new(),
            ghosts: 0,
            number: 0,
            ghost_number: vec![None; keys],
            uses: vec![None; keys],
        }
    }

    fn hits(&mut self, key: usize) -> bool {
        if let Some(uses) = &mut self.uses[key] {
            *uses = (*uses + 1).min(3);
            return true;
        }
        while self.small.len() + self.main.len() >= self.small_room + self.main_room {
            if self.small.len() >= self.small_room { self.evict_small() } else { self.evict_main() }
        }
        self.uses[key] = Some(0);
        if self.ghost_number[key].take().is_some() {
            self.ghosts -= 1;
            self.main.push_front(key);
        } else {
            self.small.push_front(key);
        }
        false
    }

    fn evict_small(&mut self) {
        while let Some(tail) = self.small.pop_back() {
            if self.uses[tail] <= Some(1) {
                self.uses[tail] = None;
                self.remember(tail);
                return;
            }
            self.uses[tail] = Some(0);
            self.main.push_front(tail);
            if self.main.len() > self.main_room {
                self.evict_main();
            }
        }
    }

    fn evict_main(&mut self) {
        while let Some(tail) = self.main.pop_back() {
            self.uses[tail] = self.uses[tail].and_then(|uses| uses.checked_sub(1));
            if self.uses[tail].is_none() {
                return;
            }
            self.main.push_front(tail);
        }
    }

    fn remember(&mut self, key: usize) {
        self.number += 1;
        self.ghost.push_front((key, self.number));
        self.ghost_number[key] = Some(self.number);
        self.ghosts += 1;
        while self.ghosts > self.main_room {
            let Some((oldest, number)) = self.ghost.pop_back() else { break };
            if self.ghost_number[oldest] == Some(number) {
                self.ghost_number[oldest] = None;
                self.ghosts -= 1;
            }
        }
    }
}
