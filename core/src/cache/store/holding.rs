//! What one owner holds: its two queues of entries, and the ghosts of those it lost.

use super::arena::NONE;
use super::ghost::Ghost;
use super::seed::Seed;

/// `small` gives way from 1 / this of its owner's bytes (the paper's 10 %).
const SMALL: u64 = 10;

/// What one owner holds. It exists while there is an entry in it.
pub struct Holding {
    pub owner: u32,
    pub entries: u32,
    pub small: List,
    pub main: List,
    pub ghost: Ghost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Small,
    Main,
}

/// A doubly linked list through the entries: in at the head, out at the tail.
#[derive(Clone, Copy)]
pub struct List {
    pub head: u32,
    pub tail: u32,
    pub bytes: u64,
}

impl Holding {
    pub fn new(owner: u32, seed: Seed) -> Self {
        let empty = List { head: NONE, tail: NONE, bytes: 0 };
        Self { owner, entries: 0, small: empty, main: empty, ghost: Ghost::new(seed) }
    }

    pub fn bytes(&self) -> u64 {
        self.small.bytes + self.main.bytes
    }

    pub fn list(&mut self, queue: Queue) -> &mut List {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Main => &mut self.main,
        }
    }

    /// The queue that gives way next, and the entry at its tail.
    pub fn next_out(&self) -> (Queue, u32) {
        if self.main.tail == NONE || self.small.bytes * SMALL >= self.bytes() {
            (Queue::Small, self.small.tail)
        } else {
            (Queue::Main, self.main.tail)
        }
    }
}
