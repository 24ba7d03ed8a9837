//! The regional edge: proves who calls, decides whether they may, finds the pod, answers in time.
//!
//! One request's path, in reading order: [`downstream::listener`] accepts and identifies, [`edge`] takes it
//! from Pingora, [`infer`] decodes and checks, [`admission`] lets in, [`prediction`] says where
//! the answer comes from, [`pods::call`] asks a pod, [`answer`] writes
//! what came.
//!
//! * [`settings`]: the process's own file. [`gateway`]: load, bind, run, drain. [`shared`]: what its threads share.
//! * [`downstream`]: connections of clients, and what may stand on the wire.
//! * [`request`]: one request, read strictly, within bounds.
//! * [`admission`]: who may pass now.
//! * [`infer`], [`stream`], [`local`]: a request for one prediction, a stream of them, what needs no pod.
//! * [`prediction`]: where an answer comes from. [`results`]: answers that are given again.
//! * [`members`]: who is in each pool. [`pods`]: the ways to them, whether they live, a call to one.
//! * [`degrade`]: what is given when a model is in trouble. [`peers`]: other regions.
//! * [`answer`], [`errors`]: what goes back.
//! * [`explain`]: what a request would meet.
//! * [`exchange`], [`audit`], [`metrics`]: what is recorded. [`traffic`]: what the control plane is told of it.
//! * [`clock`]: the time that decisions are made with.

mod admission;
mod answer;
mod audit;
mod clock;
mod degrade;
mod downstream;
mod edge;
mod errors;
mod exchange;
mod explain;
mod gateway;
mod infer;
mod local;
mod members;
mod metrics;
mod peers;
mod pods;
mod prediction;
mod request;
mod results;
mod settings;
mod shared;
mod stream;
mod traffic;

use std::io::Write;

use spillway_runtime::drain::Drain;

pub use gateway::{Gateway, StartError};
pub use results::ResultSettings;
pub use settings::{DnsSettings, GatewaySettings, Limits, QuotaSettings};

/// Runs a gateway until `drain` is over. Once it is bound, it writes one line to stdout:
/// `{"listening":{"https":"ADDRESS","admin":"ADDRESS"}}`.
pub async fn run(settings: GatewaySettings, drain: Drain) -> Result<(), StartError> {
    let gateway = Gateway::start(settings, drain).await?;
    let listening = serde_json::json!({
        "listening": { "https": gateway.https.to_string(), "admin": gateway.admin.to_string() }
    });
    let mut stdout = std::io::stdout();
    // Nobody may be reading; that is not a reason to stop serving.
    let _ = writeln!(stdout, "{listening}").and_then(|()| stdout.flush());
    gateway.finish().await;
    Ok(())
}

#[cfg(test)]
#[path = "../tests/support/redis.rs"]
mod redis_server;
