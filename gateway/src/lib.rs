//! The regional edge: proves who calls, decides whether they may, finds the pod, answers in time.
//!
//! One request's path, in reading order: [`listener`] accepts and identifies, [`edge`] takes it from
//! Pingora, [`infer`] decodes and checks, [`pod_call`] asks a pod, [`answer`] writes what came.
//!
//! * [`settings`]: the process's own file.
//! * [`gateway`]: load, bind, run, drain.
//! * [`listener`], [`connection`]: own accept loop and TLS under Pingora's HTTP.
//! * [`h2_connection`]: streams out of an HTTP/2 connection.
//! * [`framing`], [`h2_frames`]: what may stand on the wire, without I/O.
//! * [`head`], [`route`], [`body`], [`inflate`], [`memory`]: one request, read strictly, within bounds.
//! * [`infer`], [`stream`], [`finals`], [`local`]: one prediction, a stream of them, what needs no pod.
//! * [`fleet`], [`health`], [`pod_call`]: the pods, whether they live, a call to one.
//! * [`answer`], [`errors`]: what goes back.
//! * [`exchange`], [`metrics`]: what is recorded.

mod answer;
mod body;
mod connection;
mod edge;
mod errors;
mod exchange;
mod finals;
mod fleet;
mod framing;
mod gateway;
mod h2_connection;
mod h2_frames;
mod head;
mod health;
mod infer;
mod inflate;
mod listener;
mod local;
mod memory;
mod metrics;
mod pod_call;
mod route;
mod settings;
mod stream;

use std::io::Write;

use spillway_runtime::drain::Drain;

pub use gateway::{Gateway, StartError};
pub use settings::{GatewaySettings, Limits};

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
