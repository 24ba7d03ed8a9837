//! Hostile bytes at the real gateway: refused with a status, a code and a count, and nobody else notices.
//!
//! * [`connections`]: heads, frames and bodies on the wire.
//! * [`requests`]: what they ask for.

mod connections;
mod requests;

use std::time::Duration;

use spillway_tests::harness::client::Client;
use spillway_tests::harness::inference::{INFER, assert_scores, cases, entity, scores};
use spillway_tests::harness::region::Region;

pub const SILENCE: Duration = Duration::from_millis(800);

pub async fn region(name: &str) -> Region {
    let mut region = Region::new(name);
    region.gateway_settings = "limits: { body: 1MiB }\n".into();
    region.start().await;
    region
}

pub fn rejected(region: &Region, code: &str) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_rejected_total", &[&format!("reason=\"{code}\"")])
}

/// A request on another connection gets its right answer.
pub async fn others_are_served(client: &Client) {
    let case = &cases()[0];
    let answer = client.post(INFER, &entity(&case.entity)).await.expect("an answer");
    assert_scores("another connection", &scores(&answer), std::slice::from_ref(case));
}

pub fn refused(region: &Region) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_rejected_total", &[])
}
