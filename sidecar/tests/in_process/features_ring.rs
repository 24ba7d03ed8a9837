//! A ring of three real Cassandra nodes: who is asked, and how many must answer.

use std::time::{Duration, Instant};

use crate::features_harness::*;
use bytes::Bytes;
use futures_util::future::join_all;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use spillway_core::resource::FieldValue;
use spillway_sidecar::features::*;

const TIMEOUT: Duration = Duration::from_millis(700);
const SPECULATE_AFTER: Duration = Duration::from_millis(200);

fn ring(nodes: &[Server; 3], keyspace: &str, copies: u8, speculate_after: Option<Duration>) -> FeatureSettings {
    let cassandra = CassandraSettings {
        contact_points: nodes.iter().map(Server::address).collect(),
        keyspace: keyspace.into(),
        timeout: TIMEOUT,
        create_schema: true,
        replication_factor: copies,
        speculate_after,
        ..CassandraSettings::default()
    };
    settings(StoreSettings::Cassandra(cassandra), None)
}

/// Rows of `site` (LOCAL_ONE) and `user` (LOCAL_QUORUM).
async fn put_all(sidecar: &Sidecar, entities: &[&str]) {
    let mut events = Vec::new();
    for entity in entities {
        events.push(event(entity, Some(1), now_us()));
        events.push(Event {
            group: name("user"),
            tenant: "acme".into(),
            entity: Bytes::copy_from_slice(entity.as_bytes()),
            event_us: now_us(),
            values: Some(vec![Some(FieldValue::Float(0.5))]),
        });
    }
    eventually("the ring takes the rows", async || sidecar.features.write(&sidecar.snapshot, &events).await.is_ok())
        .await;
}

/// A sidecar that remembers nothing of what was read before.
async fn opened(settings: &FeatureSettings) -> Sidecar {
    let sidecar = Sidecar::open(settings);
    sidecar.until_answered().await;
    sidecar
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_is_asked_as_each_group_says() {
    let nodes = Server::cassandra_ring();
    std::thread::scope(|scope| nodes.iter().for_each(|node| drop(scope.spawn(|| node.start()))));
    let session = SessionBuilder::new().known_node(nodes[0].address()).build().await.unwrap();
    for node in &nodes {
        let one = SessionBuilder::new().known_node(node.address()).build().await.unwrap();
        eventually("each node knows the others", async || {
            let peers = one.query_unpaged("SELECT peer FROM system.peers_v2", ()).await.unwrap();
            peers.into_rows_result().unwrap().rows_num() == 2
        })
        .await;
    }
    let (one_copy, three_copies) = (ring(&nodes, "one_copy", 1, None), ring(&nodes, "three_copies", 3, None));
    let entities: Vec<String> = (0..60).map(|index| format!("e{index}")).collect();
    let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
    for settings in [&one_copy, &three_copies] {
        put_all(&opened(settings).await, &entities).await;
    }
    only_the_owner_of_a_row_is_asked(&nodes, &one_copy, &session, &entities).await;
    at_most_one_other_node_is_asked(&nodes, &entities).await;
    each_group_has_its_consistency(&nodes, &three_copies).await;
}

/// With one copy of each row and one node silent, the rows of the others come as if nothing were wrong:
/// nobody asks the silent one on their behalf.
async fn only_the_owner_of_a_row_is_asked(
    nodes: &[Server; 3],
    settings: &FeatureSettings,
    session: &Session,
    entities: &[&str],
) {
    let sidecars = [opened(settings).await, opened(settings).await, opened(settings).await];
    let query = "SELECT entity_key, token(entity_key) FROM one_copy.features WHERE fg_id = 'site' ALLOW FILTERING";
    let rows = session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    let tokens: Vec<(String, i64)> = rows.rows().unwrap().map(Result::unwrap).collect();
    let of_the_last = |entity: &str| {
        let (_, token) = tokens.iter().find(|(key, _)| key.strip_prefix("s:") == Some(entity)).unwrap();
        (Server::TOKENS[1] + 1..=Server::TOKENS[2]).contains(token)
    };
    assert!(entities.iter().any(|entity| of_the_last(entity)));
    nodes[2].freeze();
    for sidecar in &sidecars {
        let lookup = sidecar.look(&["site"], entities, DEADLINE).await;
        for (index, entity) in entities.iter().enumerate() {
            let found = lookup.get(index, 0);
            assert_eq!(*found == Found::Unavailable, of_the_last(entity), "{entity}: {found:?}");
        }
    }
    nodes[2].thaw();
}

/// Two of three nodes are silent. A read that begins at one of them and goes on to the other is given up
/// rather than sent to the third.
async fn at_most_one_other_node_is_asked(nodes: &[Server; 3], entities: &[&str]) {
    let sidecar = opened(&ring(nodes, "three_copies", 3, Some(SPECULATE_AFTER))).await;
    nodes[1].freeze();
    nodes[2].freeze();
    let read = async |entity: &&str| {
        let began = Instant::now();
        (sidecar.site(entity).await, began.elapsed())
    };
    let found = join_all(entities.iter().map(read)).await;
    nodes[1].thaw();
    nodes[2].thaw();
    let answered = |found: &&(Found, Duration)| sidecar.hits(&found.0) == Some(1);
    let at_second = found.iter().filter(answered).filter(|(_, took)| *took >= SPECULATE_AFTER).count();
    let given_up = found.iter().filter(|(found, _)| *found == Found::Unavailable).count();
    assert!(at_second > 0 && given_up > 0, "{at_second} answered by the second node, {given_up} given up");
    assert!(found.iter().all(|(_, took)| *took < TIMEOUT * 2));
}

async fn each_group_has_its_consistency(nodes: &[Server; 3], settings: &FeatureSettings) {
    let sidecar = Sidecar::open(settings);
    let asked = async |group: &str| {
        let entity = unique("nobody");
        let lookup = sidecar.look(&[group], &[&entity], DEADLINE).await;
        is_absent(lookup.get(0, 0))
    };
    nodes[2].kill();
    eventually("two of three answer for both groups", async || asked("site").await && asked("user").await).await;
    nodes[1].kill();
    eventually("one of three is enough for LOCAL_ONE", async || asked("site").await).await;
    for _ in 0..3 {
        assert!(!asked("user").await, "and never for LOCAL_QUORUM");
    }
    let written = sidecar.put("e0", 2, now_us()).await;
    assert!(matches!(written, Err(WriteError::Unavailable { .. })), "a write waits for a quorum: {written:?}");
}
