//! One bucket for each network that datagrams come from, in memory that never grows.
//!
//! The rule: senders' addresses can be forged, so nobody's bucket may cost another one an answer: without room, the
//! bucket that is nearest to full is forgotten, which gives away least. Who asks too much keeps its bucket, since it is
//! the one that is farthest from full.
//!
//! ```text
//! within the limit                  -> answered
//! over it, each time but ...        -> dropped: whoever is meant by a forged address gets nothing
//! ... every `slip`th time           -> slipped: told to come by TCP, which nobody does with a forged address
//! ```
//!
//! Networks are /24 of IPv4 and /56 of IPv6. Response rate limiting: Vixie and Schryver, "DNS Response Rate Limiting"
//! (ISC-TN-2012-1), with networks alone as keys: a service zone has few names, and all answers are about as long.
//!
//! Memory: 24 bytes a place, all taken at once. O([`WAYS`]) a decision.

use std::net::IpAddr;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Class, Decision, Gcra};

/// Places among which the one to forget is chosen.
pub const WAYS: usize = 8;

const V4_MASK: u32 = u32::MAX << 8;
const V6_MASK: u128 = u128::MAX << 72;

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    Answered,
    /// Its answer is empty and says that more is to be had by TCP.
    Slipped,
    Dropped,
}

/// Stands for the network of an address, under a secret seed.
pub fn network_hash(address: IpAddr, seed: u64) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => xxh3_64_with_seed(&(address.to_bits() & V4_MASK).to_be_bytes(), seed),
        IpAddr::V6(address) => xxh3_64_with_seed(&(address.to_bits() & V6_MASK).to_be_bytes(), seed),
    }
}

/// Buckets by network.
#[derive(Clone, Debug)]
pub struct Sources {
    gcra: Gcra,
    /// 0: nothing is slipped.
    slip: u32,
    /// Sets of [`WAYS`].
    buckets: Box<[Bucket]>,
}

/// The first state is that of a full bucket, and so is an empty place.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    hash: u64,
    /// Theoretical arrival time, ns.
    state: u64,
    /// Datagrams over the limit since the bucket is held.
    over: u32,
}

impl Sources {
    /// `places` is rounded up to sets of [`WAYS`].
    pub fn new(gcra: Gcra, slip: u32, places: usize) -> Self {
        let places = places.div_ceil(WAYS).max(1) * WAYS;
        Self { gcra, slip, buckets: vec![Bucket::default(); places].into() }
    }

    /// Judges a datagram by its [`network_hash`].
    pub fn decide(&mut self, hash: u64, now_ns: u64) -> Judged {
        let sets = self.buckets.len() / WAYS;
        // The high bits pick the table where there are many: these are the low ones.
        let set = (hash & u64::from(u32::MAX)) as usize % sets;
        let (gcra, slip) = (self.gcra, self.slip);
        let Some(bucket) = Self::bucket(&mut self.buckets, set, hash) else { return Judged::Answered };
        match gcra.decide(bucket.state, now_ns, 1, Class::Critical) {
            Decision::Admitted { state, .. } => {
                bucket.state = state;
                Judged::Answered
            }
            Decision::Refused { .. } | Decision::Never { .. } => {
                bucket.over = bucket.over.wrapping_add(1);
                if slip > 0 && bucket.over.is_multiple_of(slip) { Judged::Slipped } else { Judged::Dropped }
            }
        }
    }

    /// The bucket of the hash, or the one that is nearest to full, taken over. There is always one.
    fn bucket(buckets: &mut [Bucket], set: usize, hash: u64) -> Option<&mut Bucket> {
        let ways = buckets.get_mut(set * WAYS..(set + 1) * WAYS)?;
        if let Some(place) = ways.iter().position(|bucket| bucket.hash == hash) {
            return ways.get_mut(place);
        }
        let bucket = ways.iter_mut().min_by_key(|bucket| bucket.state)?;
        *bucket = Bucket { hash, ..Bucket::default() };
        Some(bucket)
    }
}

#[cfg(test)]
#[path = "sources_tests.rs"]
mod tests;
