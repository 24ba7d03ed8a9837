//! The token buckets of entities, of all tenants and limits, in bounded memory.
//!
//! The rule: whoever takes from a tenant's entities holds that tenant's mutex ([`super::limits`]), so that
//! what was taken can be given back as if it never was. The tables here are shared by all tenants; their
//! own mutexes are held for one run of keys.
//!
//! An entity is known by a hash under two keys of this process (SipHash, std's), so that nobody can
//! make two of them collide.

use std::hash::{BuildHasher, Hasher, RandomState};

use bytes::Bytes;
use parking_lot::Mutex;
use spillway_core::limit::{Class, Decision, Gcra, Judged, Key, Table, TableBounds};

/// A sweep of a table then looks at 28,672 keys at most: about 0.3 ms.
const TABLES: usize = 64;

/// Entities of one request, each once and in the order of hashes, with what each pays.
pub type Keys = Vec<(u128, u32)>;

pub struct EntityBuckets {
    tables: Box<[Mutex<Table>]>,
    seeds: [RandomState; 2],
}

/// Whose entities pay, by which limit, now.
#[derive(Clone, Copy)]
pub struct Payer {
    pub owner: u32,
    pub gcra: Gcra,
    pub now_ns: u64,
    pub class: Class,
}

/// What was taken before one was refused, if one was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub keys: usize,
    pub overflowed: u64,
    pub refused: bool,
}

impl EntityBuckets {
    pub fn new(bounds: &TableBounds) -> Self {
        let tables = (0..TABLES).map(|_| Mutex::new(Table::new(bounds.clone()))).collect();
        Self { tables, seeds: [RandomState::new(), RandomState::new()] }
    }

    /// The keys of entities under a limit. One that is named twice pays twice.
    pub fn keys(&self, keys: &mut Keys, limit: u32, entities: &[Bytes], cost: u32) {
        keys.clear();
        keys.extend(entities.iter().map(|entity| (self.hash(limit, entity), cost)));
        keys.sort_unstable();
        keys.dedup_by(|later, first| {
            let same = later.0 == first.0;
            if same {
                first.1 = first.1.saturating_add(later.1);
            }
            same
        });
    }

    /// Takes from each until one refuses; `hear` is told what each says, also those after that one.
    pub fn take(
        &self,
        keys: &[(u128, u32)],
        payer: &Payer,
        overflow: &mut u64,
        mut hear: impl FnMut(Decision, u32),
    ) -> Taken {
        let Payer { owner, gcra, now_ns, class } = *payer;
        let mut taken = Taken::default();
        for run in keys.chunk_by(|one, other| table(one.0) == table(other.0)) {
            let mut table = self.tables[table(run[0].0)].lock();
            for (hash, cost) in run {
                let key = Key { hash: *hash, owner };
                let Judged { decision, overflowed } = if taken.refused {
                    table.would_decide(key, &gcra, now_ns, *cost, class, *overflow)
                } else {
                    table.decide(key, &gcra, now_ns, *cost, class, overflow)
                };
                hear(decision, *cost);
                taken.refused |= !matches!(decision, Decision::Admitted { .. });
                if !taken.refused {
                    taken.keys += 1;
                }
                taken.overflowed += u64::from(overflowed);
            }
        }
        taken
    }

    /// Tells `hear` what [`Self::take`] would, but for entities that share the overflow. Changes nothing.
    pub fn would_take(&self, keys: &[(u128, u32)], payer: &Payer, overflow: u64, mut hear: impl FnMut(Decision, u32)) {
        let Payer { owner, gcra, now_ns, class } = *payer;
        for (hash, cost) in keys {
            let table = self.tables[table(*hash)].lock();
            let key = Key { hash: *hash, owner };
            hear(table.would_decide(key, &gcra, now_ns, *cost, class, overflow).decision, *cost);
        }
    }

    /// Undoes what was taken from keys; those without room took from the overflow, which is the caller's.
    pub fn give_back(&self, keys: &[(u128, u32)], payer: &Payer) {
        for (hash, cost) in keys {
            self.tables[table(*hash)].lock().give_back(*hash, &payer.gcra, payer.now_ns, *cost);
        }
    }

    /// Keys held by all tenants.
    pub fn len(&self) -> usize {
        self.tables.iter().map(|table| table.lock().len()).sum()
    }

    fn hash(&self, limit: u32, entity: &[u8]) -> u128 {
        let half = |seed: &RandomState| {
            let mut hasher = seed.build_hasher();
            hasher.write_u32(limit);
            hasher.write(entity);
            hasher.finish()
        };
        u128::from(half(&self.seeds[0])) << 64 | u128::from(half(&self.seeds[1]))
    }
}

/// The table of a hash: its top bits, so that sorted keys of one table follow each other.
fn table(hash: u128) -> usize {
    (hash >> (128 - TABLES.ilog2())) as usize
}
