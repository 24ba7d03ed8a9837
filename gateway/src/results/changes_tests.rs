//! Results made of features, while these change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::tests::{Ask, MISS, World, ask, is_hit, read_at, row, said};
use crate::exchange::Making;

#[tokio::test]
async fn a_change_removes_the_results_of_its_rows() {
    let world = World::of(true);
    let (one, other) = (ask("joined", 0.0), Ask { entity: "f", ..ask("joined", 0.0) });
    for ask in [&one, &other] {
        assert_eq!(world.get(ask, "old", read_at(10)).await, ("old".into(), MISS.into()));
    }
    world.changed(11, &row("e"));
    assert_eq!(world.get(&one, "new", read_at(11)).await.0, "new");
    assert_eq!(world.get(&other, "-", read_at(11)).await.0, "old");
    world.flush(20);
    assert_eq!(world.get(&other, "new", read_at(20)).await.0, "new");
    assert_eq!(world.results.metrics.entries.get(), 1, "the flush removes");
}

#[tokio::test]
async fn a_call_that_a_change_overtook_is_answered_and_not_stored() {
    let world = World::of(true);
    let ask = ask("joined", 0.0);
    let changed = async || {
        world.changed(11, &row("e"));
        Ok(("old", read_at(10)))
    };
    assert_eq!(world.infer(&ask, changed).await.1, "spillway; fwd=miss");
    // This gateway heard of it before the call, the sidecar after it had read the row.
    assert_eq!(world.get(&ask, "old", read_at(10)).await.1, "spillway; fwd=miss");
    // A sidecar that does not hear says no number.
    let deaf = Making { feature_sequence: None, ..read_at(0) };
    assert_eq!(world.get(&ask, "old", deaf).await.1, "spillway; fwd=miss");
    assert_eq!(world.get(&ask, "new", read_at(11)).await.1, MISS);
    let ahead = Ask { entity: "f", ..ask };
    assert_eq!(world.get(&ahead, "new", read_at(99)).await.1, MISS, "the sidecar knows more");
}

#[tokio::test]
async fn who_comes_after_a_change_does_not_share_an_older_call() {
    let world = Arc::new(World::of(true));
    let ask = ask("joined", 0.0);
    let slow = |text: &'static str, number| {
        let (world, ask) = (world.clone(), ask.clone());
        tokio::spawn(async move {
            let model = async || {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Ok((text, read_at(number)))
            };
            world.infer(&ask, model).await.0.unwrap()
        })
    };
    let (leader, follower) = (slow("old", 10), slow("-", 10));
    tokio::time::sleep(Duration::from_millis(30)).await;
    world.changed(11, &row("e"));
    let (later, latest) = (slow("new", 11), slow("-", 11));
    assert_eq!((leader.await.unwrap().as_str(), follower.await.unwrap().as_str()), ("old", "old"));
    assert_eq!((later.await.unwrap().as_str(), latest.await.unwrap().as_str()), ("new", "new"));
    assert_eq!(world.calls(), 2);
}

#[tokio::test]
async fn who_joins_a_call_whose_sidecar_was_behind_asks_again() {
    let world = Arc::new(World::of(true));
    world.changed(11, &row("e"));
    let numbers = Arc::new(AtomicU64::new(10));
    let slow = || {
        let (world, numbers) = (world.clone(), numbers.clone());
        tokio::spawn(async move {
            let model = async || {
                let number = numbers.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(100)).await;
                Ok((if number < 11 { "old" } else { "new" }, read_at(number)))
            };
            world.infer(&ask("joined", 0.0), model).await.0.unwrap()
        })
    };
    let leader = slow();
    tokio::time::sleep(Duration::from_millis(30)).await;
    let followers = [slow(), slow(), slow()];
    assert_eq!(leader.await.unwrap(), "old", "it came before anybody could know better");
    for follower in followers {
        assert_eq!(follower.await.unwrap(), "new");
    }
    assert_eq!(world.calls(), 2);
}

#[tokio::test]
async fn a_deaf_gateway_gives_nothing_that_depends_on_features() {
    let world = World::of(true);
    let joined = ask("joined", 0.0);
    world.get(&joined, "old", read_at(10)).await;
    world.hears.store(false, Ordering::SeqCst);
    let (answer, status) = world.get(&joined, "new", read_at(11)).await;
    assert_eq!((answer.as_str(), status.as_str()), ("new", "spillway; fwd=bypass; detail=deaf"));
    world.get(&ask("plain", 1.0), "one", said()).await;
    assert!(is_hit(&world.get(&ask("plain", 1.0), "-", said()).await.1), "other models are as before");
    // Its lease ran out, and nothing was missed.
    world.hears.store(true, Ordering::SeqCst);
    assert_eq!(world.get(&joined, "-", read_at(11)).await.0, "old");
}

#[tokio::test]
async fn without_a_channel_results_of_features_live_for_a_second() {
    let world = World::of(false);
    let ask = ask("joined", 0.0);
    world.get(&ask, "old", Making { feature_sequence: None, ..read_at(0) }).await;
    assert_eq!(world.get(&ask, "-", said()).await.0, "old");
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    assert_eq!(world.get(&ask, "new", said()).await.0, "new");
}
