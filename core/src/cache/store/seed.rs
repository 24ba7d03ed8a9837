//! Hashing with a seed that nobody outside knows.

use std::hash::{BuildHasher, Hasher};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// XXH3-64 from a seed.
#[derive(Clone, Copy)]
pub struct Seed(pub u64);

/// The hash of what was written so far; at first, the seed.
pub struct Seeded(u64);

impl BuildHasher for Seed {
    type Hasher = Seeded;

    fn build_hasher(&self) -> Seeded {
        Seeded(self.0)
    }
}

impl Hasher for Seeded {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
