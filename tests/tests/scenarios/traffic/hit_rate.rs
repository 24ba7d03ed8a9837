//! The store of the result cache against reference simulators, on the same trace.

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../../../core/src/cache/store_traces.rs"]
mod traces;

use spillway_core::cache::store::{KeyHash, Store};
use spillway_figures::{Goal, record};

const ENTITIES: usize = 1_000_000;
const ENTRIES: u64 = 10_000;
const REQUESTS: usize = 1_000_000;
const BYTES: u64 = 400;

/// Keys are hashes, so that neighbours among the entities are none among the keys.
fn key(number: usize) -> KeyHash {
    let mut state = number as u64;
    let mut key = KeyHash::default();
    key.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&traces::splitmix64(&mut state).to_le_bytes()));
    key
}

#[test]
fn the_hit_rate_under_zipf_is_that_of_the_reference() {
    let mut seed = 1;
    let trace: Vec<usize> =
        traces::zipf(ENTITIES, 0.99, move || traces::splitmix64(&mut seed)).take(REQUESTS).collect();
    let mut store = Store::new(ENTRIES * Store::<()>::weight(BYTES, 0), 7);
    let hits = trace.iter().filter(|number| {
        let key = key(**number);
        let hit = store.get(&key).is_some();
        if !hit {
            store.insert(&key, 0, BYTES, &[], ());
        }
        hit
    });
    let share = |hits: usize| 100.0 * hits as f64 / REQUESTS as f64;
    let rate = share(hits.count());
    let room = ENTRIES as usize;
    let reference = share(traces::s3_fifo(&trace, room));
    record("traffic.results.zipf_hit_rate", rate, "%", Goal::AtLeast(reference - 1.0));
    record("traffic.results.zipf_hit_rate_of_s3_fifo", reference, "%", Goal::None);
    let lru = share(traces::lru(&trace, room));
    record("traffic.results.zipf_hit_rate_of_lru", lru, "%", Goal::None);
    record("traffic.results.zipf_hit_rate_of_optimum", share(traces::optimum(&trace, room)), "%", Goal::None);
    assert!((rate - reference).abs() <= 1.0 && rate > lru, "{rate} %, S3-FIFO {reference} %, LRU {lru} %");
}
