//! Real processes, real servers and the faults between them.
//!
//! The rule: everything that a test starts ends with the test, also when it panics, and nothing is
//! waited for without a limit.
//!
//! * [`run_folder`]: where one test's files lie; kept when the test fails.
//! * [`process`]: one process of the real binary.
//! * [`servers`]: Redis, Cassandra and Triton.
//! * [`region`]: authority, resources, sidecars and gateway of one region.
//! * [`fleet`]: three regions with control and DNS nodes. [`crowd`]: clients that go where DNS says.
//! * [`client`]: calls over mTLS, h1 and h2; [`grpc`] on top of them.
//! * [`unmodified`]: tritonclient, curl and grpcurl.
//! * [`raw`], [`h2_frames`]: bytes that no client would send.
//! * [`inference`]: the requests of the phishing model and what must come back.
//! * [`metrics`]: what the admin port says.
//! * [`load`]: steady calls, and what they met.
//! * [`relay`], [`doubles`]: a slow link, a wrong Triton, a pod that listens.
//! * [`collector`]: takes spans over OTLP.

pub mod client;
pub mod collector;
pub mod crowd;
pub mod doubles;
pub mod fleet;
pub mod grpc;
pub mod h2_frames;
pub mod inference;
pub mod load;
pub mod metrics;
pub mod ports;
pub mod process;
pub mod raw;
pub mod region;
pub mod relay;
pub mod run_folder;
pub mod servers;
pub mod unmodified;

use std::time::{Duration, Instant};

/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `look` finds something; panics with `what` when the time is over.
pub async fn eventually<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "not within {within:?}: {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
