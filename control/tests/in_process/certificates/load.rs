//! Steady requests between two nodes whose leaves live for seconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::Request;
use http_body_util::BodyExt;
use spillway_runtime::upstream::{OipBody, Upstream};
use tokio::task::JoinHandle;

use super::stand::{GATEWAY, Node, Port, SECOND, SIDECAR, Stand, eventually, id};

/// A gateway that calls a sidecar every few milliseconds.
pub struct Traffic {
    pub gateway: Node,
    pub sidecar: Node,
    pub served: Arc<AtomicU64>,
    task: JoinHandle<Vec<String>>,
    stop: Arc<AtomicU64>,
}

impl Traffic {
    pub async fn start(stand: &Stand, life: Duration) -> Self {
        let (gateway, sidecar) = (stand.node(GATEWAY, life), stand.node(SIDECAR, life));
        let served = Arc::new(AtomicU64::new(0));
        let port = Port::of_server(&sidecar.workload, &served).await;
        let upstream = Upstream::new(gateway.workload.clone(), port.address, id(SIDECAR));
        let stop = Arc::new(AtomicU64::new(0));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let _port = port;
            let mut failed = Vec::new();
            while stopped.load(Ordering::Relaxed) == 0 {
                let call =
                    upstream.call_by(Request::post("/").body(OipBody::empty()).unwrap(), Instant::now() + 2 * SECOND);
                match call.await {
                    Ok(response) if response.status().is_success() => {
                        if let Err(error) = response.into_body().collect().await {
                            failed.push(error.to_string());
                        }
                    }
                    Ok(response) => failed.push(response.status().to_string()),
                    Err(error) => failed.push(format!("{error:?}")),
                }
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            failed
        });
        Self { gateway, sidecar, served, task, stop }
    }

    /// Ends it: how many requests there were. None has failed.
    pub async fn finish(self) -> u64 {
        self.stop.store(1, Ordering::Relaxed);
        let failed = self.task.await.unwrap();
        assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), &failed[..failed.len().min(5)]);
        self.served.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t49_leaves_of_seconds_are_renewed_many_times_and_no_request_fails() {
    let life = 6 * SECOND;
    let stand = Stand::start(life, SECOND).await;
    let traffic = Traffic::start(&stand, life).await;
    eventually("both have renewed six times", || traffic.gateway.renewed() >= 6 && traffic.sidecar.renewed() >= 6)
        .await;
    let refused = "spillway_identity_reloads_total{outcome=\"refused\"}";
    assert_eq!((traffic.gateway.count(refused), traffic.sidecar.count(refused)), (0, 0), "a half pair was never read");
    let (gateway, sidecar) = (traffic.gateway.renewed(), traffic.sidecar.renewed());
    let served = traffic.finish().await;
    println!("{served} requests, {gateway} + {sidecar} renewals of leaves of {life:?}, 0 failed");
    assert!(served > 500, "{served}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_that_is_away_for_half_of_a_life_is_not_noticed() {
    let life = 12 * SECOND;
    let mut stand = Stand::start(life, SECOND).await;
    let traffic = Traffic::start(&stand, life).await;
    eventually("both have renewed", || traffic.gateway.renewed() >= 1 && traffic.sidecar.renewed() >= 1).await;
    // Just before the next one is due: the worst moment.
    let due = |node: &Node| node.workload.life().first_attempt(0.0);
    let first = due(&traffic.gateway).min(due(&traffic.sidecar)) - SECOND / 10;
    tokio::time::sleep(first.duration_since(SystemTime::now()).unwrap()).await;
    stand.port.close().await;
    let renewed = (traffic.gateway.renewed(), traffic.sidecar.renewed());
    tokio::time::sleep(life / 2).await;
    let unreachable = "spillway_identity_renewals_total{outcome=\"unreachable\"}";
    assert!(traffic.gateway.count(unreachable) > 0 && traffic.sidecar.count(unreachable) > 0, "it was missed");
    assert_eq!((traffic.gateway.renewed(), traffic.sidecar.renewed()), renewed);
    stand.port = Port::open(&stand.authority, &stand.workload, stand.port.address).await;
    eventually("both have renewed again", || {
        traffic.gateway.renewed() > renewed.0 && traffic.sidecar.renewed() > renewed.1
    })
    .await;
    let served = traffic.finish().await;
    println!("{served} requests, the authority away for {:?} of a life of {life:?}, 0 failed", life / 2);
}
