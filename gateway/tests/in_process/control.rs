//! A gateway whose control plane is gone: what it serves, and what it does without anything to serve.

use std::time::Duration;

use crate::support::*;
use spillway_gateway::{Gateway, GatewaySettings};
use spillway_runtime::settings;

/// Nobody listens there.
const GONE: &str = "control: {servers: ['127.0.0.1:9']}";

#[tokio::test]
async fn t59_t63_without_control_what_was_kept_is_served_or_the_one_before_where_that_is_damaged() {
    let world = World::with(GONE).await;
    world.check_alive().await;
    let file = world.folder.path().join("snapshot");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(world.folder.path().join("snapshot.previous"), &whole).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let again = world.another(GONE).await;
    assert_eq!(metric_of(again.admin, "spillway_snapshot_version").await, 1);
    assert_eq!(metric_of(again.admin, "spillway_snapshot_rejected_total{reason=\"malformed\"}").await, 1);
    assert_eq!(metric_of(again.admin, "spillway_control_connected").await, 0);
    assert!(!world.admin("/metrics").await.contains("spillway_snapshot_rejected_total{"), "the file is not followed");
    world.stop().await;
}

#[tokio::test]
async fn t63_with_nothing_to_serve_it_is_not_ready_and_takes_nobody_for_a_stranger() {
    let world = World::start().await;
    let folder = world.folder.path().display().to_string();
    let text = format!(
        "region: eu\nname: gw-0\nlisten: 127.0.0.1:0\nthreads: 1\nsnapshot: {folder}/none\n{GONE}\nidentity:\n  \
         certificate: {folder}/gateway/certificate.pem\n  key: {folder}/gateway/key.pem\n  \
         trustBundle: {folder}/gateway/trust-bundle.pem\n"
    );
    let settings: GatewaySettings = settings::parse(&text).unwrap();
    let empty = Gateway::start(settings, world.drain.clone()).await.unwrap();
    let page = ask_admin(empty.admin, "GET", "/readyz", "").await;
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("the first push"), "{page}");
    let client = world.client("acme");
    let handshake = tokio::time::timeout(Duration::from_millis(300), Http2::connect(empty.https, &client)).await;
    assert!(handshake.is_err(), "the connection waits");
    world.check_alive().await;
    world.stop().await;
    empty.finish().await;
}
