//! L1: rows in this process, bounded by bytes.
//!
//! The rule: a fill that is older than an invalidation seen since its read began is refused. While changes that
//! are told cannot be heard, no row is believed: it is of use only where no other tier answers. Where nobody
//! tells of changes, rows are believed for moments.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use spillway_core::feature::{Freshness, Row, RowKey, may_fill};
use spillway_runtime::feature_changes::Hearing;

use super::groups::Group;
use super::settings::MemorySettings;

/// A stale row was just confirmed by the durable tier: that long it is not asked again.
const STALE_RECHECK: Duration = Duration::from_secs(1);

/// Rows share an invalidation tick with those of the same slot: a collision only refuses a fill.
const SLOTS: usize = 4_096;

pub(super) struct Memory {
    rows: Cache<RowKey, Entry, Weight, ahash::RandomState>,
    settings: MemorySettings,
    hash: ahash::RandomState,
    /// Rises with every invalidation.
    tick: AtomicU64,
    flushed: AtomicU64,
    invalidated: Box<[AtomicU64]>,
    /// What is heard from Redis; none: there is no Redis, and `heard` says whether a file tells of changes.
    hearing: Option<Hearing>,
    heard: AtomicBool,
}

#[derive(Clone)]
struct Entry {
    /// None: known to be absent.
    row: Option<Row>,
    filled: Instant,
}

/// How far L1 is to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Belief {
    /// Changes are heard, from Redis up to a number.
    Full { number: Option<u64> },
    /// Nobody tells of changes.
    Moments,
    /// Changes are told, and not heard.
    None,
}

/// What L1 knows of a row.
pub(super) enum Known {
    Fresh(Row),
    /// Stale, but the durable tier was asked a moment ago.
    Stale(Row),
    Absent,
    /// To be asked for again; of use if no other tier answers.
    Outdated(Row),
    Nothing,
}

#[derive(Clone)]
struct Weight;

impl Weighter<RowKey, Entry> for Weight {
    fn weight(&self, key: &RowKey, entry: &Entry) -> u64 {
        // The entry, the two buffers' headers and the cache's own slot.
        const OVERHEAD: usize = 160;
        let row = entry.row.as_ref().map_or(0, |row| row.bytes().len());
        (key.as_str().len() + row + OVERHEAD) as u64
    }
}

impl Memory {
    pub fn new(settings: MemorySettings, hearing: Option<Hearing>) -> Self {
        let hash = ahash::RandomState::new();
        let capacity = settings.size.0.max(1 << 16);
        let rows = Cache::with(
            usize::try_from(capacity / 256).unwrap_or(usize::MAX),
            capacity,
            Weight,
            hash.clone(),
            Default::default(),
        );
        let keep_absent = settings.keep_absent.min(MemorySettings::MAX_KEEP_ABSENT);
        Self {
            rows,
            settings: MemorySettings { keep_absent, ..settings },
            hash,
            tick: AtomicU64::new(1),
            flushed: AtomicU64::new(0),
            invalidated: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hearing,
            heard: AtomicBool::new(false),
        }
    }

    /// To be asked before the first look, with a time from after the request came.
    pub fn belief(&self, now: Instant) -> Belief {
        match &self.hearing {
            Some(hearing) => match hearing.heard(now) {
                Some(number) => Belief::Full { number: Some(number) },
                None => Belief::None,
            },
            None if self.heard.load(Ordering::Relaxed) => Belief::Full { number: None },
            None => Belief::Moments,
        }
    }

    pub fn get(&self, key: &str, group: &Group, belief: Belief, now: Instant, now_us: i64) -> Known {
        let Some(entry) = self.rows.get(key) else { return Known::Nothing };
        let age = now.saturating_duration_since(entry.filled);
        let keep = match belief {
            Belief::Full { .. } => self.settings.keep,
            Belief::Moments => self.settings.keep_absent,
            Belief::None => Duration::ZERO,
        };
        let Some(row) = entry.row else {
            return if age < self.settings.keep_absent.min(keep) { Known::Absent } else { Known::Nothing };
        };
        if !group.layout.owns(&row) {
            return Known::Nothing;
        }
        match group.freshness(row.event_us(), now_us) {
            Freshness::Fresh if age < keep => Known::Fresh(row),
            Freshness::Stale if age < STALE_RECHECK.min(keep) => Known::Stale(row),
            Freshness::Fresh | Freshness::Stale => Known::Outdated(row),
            Freshness::Expired => Known::Nothing,
        }
    }

    /// To be taken before a read asks any other tier.
    pub fn tick(&self) -> u64 {
        self.tick.load(Ordering::SeqCst)
    }

    /// Whether the row was taken; `began` is the [`Self::tick`] from before its read.
    pub fn fill(&self, key: &RowKey, row: Option<&Row>, began: u64) -> bool {
        if !self.may_fill(key, began) {
            return false;
        }
        self.rows.insert(key.clone(), Entry { row: row.map(Row::detached), filled: Instant::now() });
        // An invalidation between the check and the insert found nothing to remove.
        if self.may_fill(key, began) {
            return true;
        }
        self.rows.remove(key);
        false
    }

    pub fn invalidate(&self, key: &RowKey) {
        let tick = self.tick.fetch_add(1, Ordering::SeqCst) + 1;
        self.invalidated[self.slot(key)].fetch_max(tick, Ordering::SeqCst);
        self.rows.remove(key);
    }

    pub fn flush(&self) {
        let tick = self.tick.fetch_add(1, Ordering::SeqCst) + 1;
        self.flushed.fetch_max(tick, Ordering::SeqCst);
        self.rows.clear();
    }

    /// Whether a file tells of changes; and what was said last.
    pub fn set_heard(&self, heard: bool) -> bool {
        self.heard.swap(heard, Ordering::SeqCst)
    }

    pub fn hears(&self) -> bool {
        matches!(self.belief(Instant::now()), Belief::Full { .. })
    }

    pub fn weight(&self) -> u64 {
        self.rows.weight()
    }

    fn may_fill(&self, key: &RowKey, began: u64) -> bool {
        let invalidated = self.invalidated[self.slot(key)].load(Ordering::SeqCst);
        may_fill(began, invalidated, self.flushed.load(Ordering::SeqCst))
    }

    fn slot(&self, key: &RowKey) -> usize {
        usize::try_from(self.hash.hash_one(key) % SLOTS as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use spillway_core::feature::Layout;
    use spillway_core::resource::{self, FeatureGroup, FieldValue, Scope, Spec};
    use spillway_core::units::Name;

    use super::*;

    const GROUP: &str = "apiVersion: spillway/v1\nkind: FeatureGroup\nmetadata: {name: g}\nspec:\n  schemaVersion: 1\n  \
                         freshFor: 1m\n  retainFor: 1h\n  fields: [{name: n, datatype: INT64}]\n";

    fn group() -> FeatureGroup {
        let Spec::FeatureGroup(group) = resource::parse(GROUP).unwrap().remove(0).spec else { panic!("a group") };
        group
    }

    fn key(entity: &str) -> RowKey {
        RowKey::new(Scope::Shared, "", entity.as_bytes(), &Name::parse("g").unwrap()).unwrap()
    }

    fn row(event_us: i64) -> Row {
        Layout::of(&group()).encode(event_us, &[Some(FieldValue::Int(1))]).unwrap()
    }

    #[test]
    fn a_fill_from_before_an_invalidation_is_refused() {
        let memory = Memory::new(MemorySettings::default(), None);
        let (key, row) = (key("a"), row(1));
        let began = memory.tick();
        memory.invalidate(&key);
        assert!(!memory.fill(&key, Some(&row), began));
        assert!(memory.rows.get(key.as_str()).is_none());
        assert!(memory.fill(&key, Some(&row), memory.tick()));
        let began = memory.tick();
        memory.flush();
        assert!(!memory.fill(&key, Some(&row), began));
        assert!(memory.rows.get(key.as_str()).is_none());
    }

    #[test]
    fn fills_and_invalidations_at_once_leave_nothing_old() {
        let memory = Arc::new(Memory::new(MemorySettings::default(), None));
        let latest = Arc::new(AtomicU64::new(1));
        let key = key("a");
        // Each round: the "store" moves on, then the row is invalidated, while readers fill what they read.
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let began = memory.tick();
                        let read = row(latest.load(Ordering::SeqCst).cast_signed());
                        memory.fill(&key, Some(&read), began);
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..5_000 {
                    latest.fetch_add(1, Ordering::SeqCst);
                    memory.invalidate(&key);
                }
            });
        });
        if let Some(entry) = memory.rows.get(key.as_str()) {
            assert_eq!(entry.row.unwrap().event_us().cast_unsigned(), latest.load(Ordering::SeqCst));
        }
    }
}
