//! Rows that Redis may hold an overwritten version of, because it could not be told in time.
//!
//! The rule: until Redis was told, this process does not believe what Redis holds of them. What it is
//! told is to forget, since what happened to the row meanwhile is not known.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::feature::RowKey;

use super::metrics::Metrics;
use super::now_us;
use super::redis::{Put, Redis, Value};
use super::write::L2_DEADLINE;

/// Beyond it the rows' lifetime in Redis is the bound.
const MOST: usize = 65_536;
const EVERY: Duration = Duration::from_millis(500);
const AT_ONCE: usize = 512;

#[derive(Debug, Default)]
pub(super) struct Repairs(Mutex<Owed>);

#[derive(Debug, Default)]
struct Owed {
    /// With the number of the write that Redis missed: a repair settles no later one.
    rows: BTreeMap<RowKey, u64>,
    last: u64,
}

impl Repairs {
    /// Whether there was room for it.
    pub fn add(&self, key: &RowKey) -> bool {
        let mut owed = self.0.lock();
        if owed.rows.len() >= MOST && !owed.rows.contains_key(key) {
            return false;
        }
        owed.last += 1;
        let number = owed.last;
        owed.rows.insert(key.clone(), number);
        true
    }

    /// Those of `keys`, by their place, that Redis is not to be believed about.
    pub fn among<'a>(&self, keys: impl Iterator<Item = &'a RowKey>) -> Vec<usize> {
        let owed = self.0.lock();
        if owed.rows.is_empty() {
            return Vec::new();
        }
        keys.enumerate().filter_map(|(index, key)| owed.rows.contains_key(key).then_some(index)).collect()
    }

    fn next(&self) -> Vec<(RowKey, u64)> {
        self.0.lock().rows.iter().take(AT_ONCE).map(|(key, number)| (key.clone(), *number)).collect()
    }

    fn settled(&self, key: &RowKey, number: u64) {
        let mut owed = self.0.lock();
        if owed.rows.get(key) == Some(&number) {
            owed.rows.remove(key);
        }
    }
}

/// Tells Redis, until the task is ended.
pub(super) async fn repair(redis: Arc<Redis>, repairs: Arc<Repairs>, metrics: Arc<Metrics>) {
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let owed = repairs.next();
        if owed.is_empty() || !redis.is_connected() {
            continue;
        }
        let puts: Vec<Put> = owed.iter().map(|(key, _)| Put { key: key.clone(), value: Value::Unknown }).collect();
        let results = redis.write(&puts, true, now_us(), Instant::now() + L2_DEADLINE).await;
        for ((key, number), result) in owed.iter().zip(results) {
            if result.is_ok() {
                repairs.settled(key, *number);
                metrics.repaired.inc();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use spillway_core::resource::Scope;
    use spillway_core::units::Name;

    use super::*;

    fn key(entity: &str) -> RowKey {
        RowKey::new(Scope::Shared, "", entity.as_bytes(), &Name::parse("g").unwrap()).unwrap()
    }

    #[test]
    fn a_repair_does_not_settle_a_later_write() {
        let repairs = Repairs::default();
        let keys = [key("a"), key("b")];
        assert!(repairs.add(&keys[1]));
        let owed = repairs.next();
        assert_eq!(repairs.among(keys.iter()), [1]);
        repairs.add(&keys[1]);
        repairs.settled(&owed[0].0, owed[0].1);
        assert_eq!(repairs.among(keys.iter()), [1], "missed again while it was told");
        let owed = repairs.next();
        repairs.settled(&owed[0].0, owed[0].1);
        assert!(repairs.among(keys.iter()).is_empty());
    }

    #[test]
    fn what_is_owed_is_bounded() {
        let repairs = Repairs::default();
        for index in 0..MOST {
            assert!(repairs.add(&key(&index.to_string())));
        }
        assert!(!repairs.add(&key("one more")));
        assert!(repairs.add(&key("7")), "it is there already");
        assert_eq!(repairs.next().len(), AT_ONCE);
    }
}
