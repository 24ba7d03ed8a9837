//! Which entries a changed dependency makes wrong.
//!
//! One link per entry and dependency. Links of one dependency form a doubly linked list, links of one
//! entry a single one. A link lives as long as its entry.

use std::collections::HashMap;

use super::arena::{Arena, NONE};
use super::seed::Seed;
use super::table_row;

pub struct Dependencies {
    links: Arena<Link>,
    /// The first link of each dependency.
    first: HashMap<u64, u32, Seed>,
}

struct Link {
    dependency: u64,
    entry: u32,
    previous: u32,
    next: u32,
    /// The next link of the same entry.
    sibling: u32,
}

impl Dependencies {
    /// Bytes per link, its row included.
    pub const OVERHEAD: u64 = (size_of::<Link>() + table_row::<(u64, u32)>()) as u64;

    pub fn new(seed: Seed) -> Self {
        Self { links: Arena::default(), first: HashMap::with_hasher(seed) }
    }

    /// An entry that has this dependency.
    pub fn first(&self, dependency: u64) -> Option<u32> {
        self.first.get(&dependency).map(|link| self.links[*link].entry)
    }

    /// Links an entry to its dependencies; returns what [`Self::unlink`] needs.
    pub fn link(&mut self, entry: u32, dependencies: &[u64]) -> u32 {
        let mut sibling = NONE;
        for dependency in dependencies {
            let next = self.first.get(dependency).copied().unwrap_or(NONE);
            let link = self.links.put(Link { dependency: *dependency, entry, previous: NONE, next, sibling });
            if next != NONE {
                self.links[next].previous = link;
            }
            self.first.insert(*dependency, link);
            sibling = link;
        }
        sibling
    }

    /// Removes all links of an entry.
    pub fn unlink(&mut self, mut link: u32) {
        while link != NONE {
            let Link { dependency, previous, next, sibling, .. } = self.links[link];
            if next != NONE {
                self.links[next].previous = previous;
            }
            match (previous, next) {
                (NONE, NONE) => {
                    self.first.remove(&dependency);
                }
                (NONE, next) => {
                    self.first.insert(dependency, next);
                }
                (previous, next) => self.links[previous].next = next,
            }
            self.links.free(link);
            link = sibling;
        }
    }

    /// Checks every list; returns the number of links.
    #[cfg(test)]
    pub fn check(&self, alive: impl Fn(u32, u64) -> bool) -> usize {
        let mut count = 0;
        for (dependency, first) in &self.first {
            let (mut previous, mut link) = (NONE, *first);
            assert_ne!(link, NONE);
            while link != NONE {
                let at = &self.links[link];
                assert_eq!((at.dependency, at.previous), (*dependency, previous));
                assert!(alive(at.entry, *dependency), "a link to a dead entry");
                (previous, link) = (link, at.next);
                count += 1;
            }
        }
        count
    }
}
