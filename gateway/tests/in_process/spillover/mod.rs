//! Requests that a region cannot serve are answered by another one; and nobody gets more by that than by asking there.
//!
//! * [`unary`]: when another region is asked, and what becomes of its answer.
//! * [`streams`]: the same of streams, until they are taken.
//! * [`visitors`]: who may come as another region's gateway, and who only probes.

mod streams;
mod unary;
mod visitors;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::support::*;
use prost::Message;
use spillway_core::failover::{Passage, Plan, Region, Standing, Traffic};
use spillway_core::identity::Serial;
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_proto::inference::*;
use spillway_runtime::forwarding::issue;
use spillway_runtime::plan::Published;
use tonic::Code;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const SECOND: Duration = Duration::from_secs(1);
/// That of the models.
const DEADLINE: Duration = Duration::from_secs(2);

const MORE: &str = "---
apiVersion: spillway/v1
kind: Model
metadata: { name: double }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  entityInput: site
  tier: 1
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
apiVersion: spillway/v1
kind: Model
metadata: { name: kept }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
  cache: { ttl: 1m }
  degradation: { levels: [3, 4], static: { y: [7] } }
---
apiVersion: spillway/v1
kind: Model
metadata: { name: small }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
apiVersion: spillway/v1
kind: Model
metadata: { name: laddered }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
  degradation: { levels: [2], fallback: small, enterAfter: 500ms }
---
apiVersion: spillway/v1
kind: Model
metadata: { name: abroad }
spec:
  pools: [scorers-us]
  versions: [1]
  backend: onnx
  deadline: 1m
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}, spec: {mayLeaveRegion: true, limits: [{name: all, per: tenant, rate: 1000/s, burst: 1000}]}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: initech}, spec: {mayLeaveRegion: [us]}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: single}, spec: {mayLeaveRegion: true, inFlight: 1}}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: { name: all }
spec:
  subjects: [{ tenant: acme }, { tenant: globex }, { tenant: initech }, { tenant: single }]
  models: ['*']
  actions: [infer, metadata]
";

async fn call(http2: &Http2, model: &str, entity: &str) -> Grpc {
    Grpc::call(http2, INFER, &[], request(model, "7", entity)).await
}

/// The regions `eu` and `us`, with a gateway each.
async fn two() -> Regions {
    Regions::start(&["eu", "us"], 1, MORE).await
}

/// The pods of `eu` are gone; this client's requests go to `us`, which costs less than `ap`.
async fn three() -> (Regions, Http2) {
    let mut regions = Regions::start(&["eu", "us", "ap"], 1, MORE).await;
    let ap = "metadata: { name: ap }\nspec: { trustDomain: spillway.test,";
    regions.publish_and_wait(3, &[(ap, &ap.replace("spec: {", "spec: { cost: 9,"))]).await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    until("the cheaper region comes first", async || {
        for number in 0..20 {
            let answer = call(&acme, "double", &format!("e{number}")).await;
            if answer.answer.header("spillway-region") != "us" {
                return false;
            }
        }
        true
    })
    .await;
    (regions, acme)
}
