//! How often an answer out of the result cache asks for memory: a number that shall not creep up.
//!
//! Counted over the whole process, which nextest gives to each test alone: the client's share is in it, and does not
//! change with the gateway's code. The least of several rounds is free of what goes on beside.

use std::time::Duration;

use bytes::Bytes;
use stats_alloc::Region;

use crate::ALLOCATOR;
use crate::support::*;

const ROUNDS: usize = 8;
/// Answers of a round.
const HITS: usize = 50;
/// What a hit takes over REST, client included.
const MOST: f64 = 88.0;

#[tokio::test]
async fn a_hit_asks_for_memory_no_more_often_than_it_did() {
    let world = World::with("").await;
    world.publish(2, &[("deadline: 2s", "deadline: 2s\n  cache: {ttl: 1m}")]).await;
    let http2 = world.http2().await;
    let body = Bytes::from_static(
        br#"{"parameters":{"entity_id":"plain-1"},"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2.0]}]}"#,
    );
    let ask = async || {
        let request = Http2::request("POST", "/v2/models/double/infer", &[]);
        let answer = http2.exchange(request, body.clone()).await.unwrap();
        assert_eq!(answer.status, 200);
        answer.header("cache-status").starts_with("spillway; hit; ")
    };
    // Each worker thread takes the resources up by itself.
    until("it is kept", async || ask().await).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut fewest = f64::INFINITY;
    for _ in 0..ROUNDS {
        let region = Region::new(ALLOCATOR);
        for _ in 0..HITS {
            assert!(ask().await, "an answer was no hit");
        }
        let change = region.change();
        fewest = fewest.min((change.allocations + change.reallocations) as f64 / HITS as f64);
    }
    println!("{fewest:.2} allocations for each hit");
    assert!(fewest <= MOST, "{fewest:.2} allocations for each hit, where {MOST} were enough");
    world.stop().await;
}
