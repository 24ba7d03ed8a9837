//! How much memory the bodies of requests and answers take, over all threads.
//!
//! The rule: bytes are counted before they are kept, and given back when what kept them is dropped.
//! At the limit a request is refused; those that have their bytes go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::errors::Refusal;

/// A request takes at least this much at once, so that a small one and its answer are counted once.
const STEP: usize = 4 << 10;

#[derive(Debug)]
pub struct Memory {
    taken: AtomicUsize,
    limit: usize,
}

impl Memory {
    pub fn new(limit: usize) -> Self {
        Self { taken: AtomicUsize::new(0), limit }
    }

    pub fn take(&self, bytes: usize) -> Result<(), Refusal> {
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.limit {
            self.give_back(bytes);
            return Err(Refusal::Overloaded);
        }
        Ok(())
    }

    pub fn give_back(&self, bytes: usize) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

/// What one unary request keeps until its end; its exchange gives it back.
#[derive(Debug, Default)]
pub struct Kept {
    taken: usize,
    room: usize,
}

impl Kept {
    pub fn add(&mut self, memory: &Memory, bytes: usize) -> Result<(), Refusal> {
        if bytes > self.room {
            let more = (bytes - self.room).max(STEP);
            memory.take(more)?;
            self.taken += more;
            self.room += more;
        }
        self.room -= bytes;
        Ok(())
    }

    pub fn give_back(&mut self, memory: &Memory) {
        if self.taken > 0 {
            memory.give_back(self.taken);
        }
        *self = Self::default();
    }
}

/// What a part of a request keeps that may end before the request does, and gives back then.
#[derive(Debug)]
pub struct Part<'a> {
    memory: &'a Memory,
    kept: Kept,
}

impl<'a> Part<'a> {
    /// Begins with the room that the request has left.
    pub fn of(whole: &mut Kept, memory: &'a Memory) -> Self {
        let room = std::mem::take(&mut whole.room);
        whole.taken -= room;
        Self { memory, kept: Kept { taken: room, room } }
    }

    pub fn keep(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.kept.add(self.memory, bytes)
    }

    /// What it keeps is the request's from now on.
    pub fn join(mut self, whole: &mut Kept) {
        let Kept { taken, room } = std::mem::take(&mut self.kept);
        whole.taken += taken;
        whole.room += room;
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.kept.give_back(self.memory);
    }
}

/// Bytes that were counted already, which are given back with their last handle.
pub fn counted(bytes: Bytes, memory: Arc<Memory>) -> Bytes {
    struct Counted(Bytes, Arc<Memory>);

    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.give_back(self.0.len());
        }
    }

    Bytes::from_owner(Counted(bytes, memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_request_is_counted_once_and_a_large_one_by_its_bytes() {
        let memory = Memory::new(100 << 10);
        let mut small = Kept::default();
        for _ in 0..4 {
            small.add(&memory, 1_000).unwrap();
        }
        assert_eq!(memory.taken(), STEP);
        let mut large = Kept::default();
        large.add(&memory, 90 << 10).unwrap();
        assert_eq!(memory.taken(), (90 << 10) + STEP);
        assert!(matches!(large.add(&memory, 7 << 10), Err(Refusal::Overloaded)));
        assert_eq!(memory.taken(), (90 << 10) + STEP, "what was refused is not kept");
        large.give_back(&memory);
        small.give_back(&memory);
        small.give_back(&memory);
        assert_eq!(memory.taken(), 0);
    }

    #[test]
    fn a_part_that_ends_early_gives_back_and_another_stays_with_its_request() {
        let memory = Memory::new(100 << 10);
        let mut whole = Kept::default();
        whole.add(&memory, 1_000).unwrap();
        let mut lost = Part::of(&mut whole, &memory);
        let mut won = Part::of(&mut whole, &memory);
        lost.keep(2_000).unwrap();
        assert_eq!(memory.taken(), STEP, "it has the room of the request");
        won.keep(8 << 10).unwrap();
        assert_eq!(memory.taken(), STEP + (8 << 10));
        won.join(&mut whole);
        drop(lost);
        assert_eq!(memory.taken(), 1_000 + (8 << 10));
        whole.give_back(&memory);
        assert_eq!(memory.taken(), 0);
    }

    #[test]
    fn counted_bytes_are_given_back_with_their_last_handle() {
        let memory = Arc::new(Memory::new(10));
        memory.take(6).unwrap();
        let bytes = counted(Bytes::from_static(b"abcdef"), memory.clone());
        let part = bytes.slice(2..4);
        drop(bytes);
        assert_eq!((memory.taken(), &part[..]), (6, &b"cd"[..]));
        assert!(memory.take(5).is_err());
        drop(part);
        assert_eq!(memory.taken(), 0);
    }
}
