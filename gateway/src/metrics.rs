//! What the gateway counts. Handles of what every request touches are looked up once, here.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_runtime::telemetry::Metrics as Registry;

use crate::exchange::Protocol;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    protocol: &'static str,
    method: &'static str,
    /// The HTTP status, or for gRPC its number.
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Seconds: from what a local answer takes to the longest deadlines.
const SECONDS: [f64; 16] =
    [0.000_25, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.007_5, 0.01, 0.015, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    /// The successes of [`Protocol::Rest`] and [`Protocol::Grpc`] inference.
    infer_ok: [Counter; 2],
    seconds: Histogram,
    rejected: Family<Reason, Counter>,
    upstream_failures: Family<Reason, Counter>,
    handshake_failures: Family<Reason, Counter>,
    connections_ended: Family<Reason, Counter>,
    pub in_flight: Gauge,
    pub connections: Gauge,
    pub retries: Counter,
    pub pods_unhealthy: Gauge,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Self {
        let requests: Family<RequestLabels, Counter> =
            registry.family("gateway_requests", "Requests answered, by protocol, method and status");
        let ok = |protocol: Protocol, code| {
            requests.get_or_create(&RequestLabels { protocol: protocol.name(), method: "infer", code }).clone()
        };
        Self {
            infer_ok: [ok(Protocol::Rest, 200), ok(Protocol::Grpc, 0)],
            requests,
            seconds: registry.register(
                "gateway_request_seconds",
                "Time from a request's head to its whole answer",
                Histogram::new(SECONDS),
            ),
            rejected: registry.family("gateway_rejected", "Requests refused, by reason"),
            upstream_failures: registry.family("gateway_upstream_failures", "Calls to pods that failed, by reason"),
            handshake_failures: registry.family("gateway_handshake_failures", "Connections refused, by reason"),
            connections_ended: registry
                .family("gateway_connections_ended", "HTTP/2 connections ended for what came over them, by reason"),
            in_flight: registry.register("gateway_in_flight", "Requests being served", Gauge::default()),
            connections: registry.register("gateway_connections", "Open client connections", Gauge::default()),
            retries: registry.register("gateway_retries", "Calls repeated on another pod", Counter::default()),
            pods_unhealthy: registry.register(
                "gateway_pods_unhealthy",
                "Pods of this region whose last health checks failed",
                Gauge::default(),
            ),
        }
    }

    pub fn answered(&self, protocol: Protocol, method: &'static str, code: u16, seconds: f64) {
        self.seconds.observe(seconds);
        match (protocol, method, code) {
            (Protocol::Rest, "infer", 200) => self.infer_ok[0].inc(),
            (Protocol::Grpc, "infer", 0) => self.infer_ok[1].inc(),
            _ => {
                let labels = RequestLabels { protocol: protocol.name(), method, code };
                self.requests.get_or_create(&labels).inc()
            }
        };
    }

    pub fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&Reason { reason }).inc();
    }

    pub fn upstream_failed(&self, reason: &'static str) {
        self.upstream_failures.get_or_create(&Reason { reason }).inc();
    }

    pub fn handshake_failed(&self, reason: &'static str) {
        self.handshake_failures.get_or_create(&Reason { reason }).inc();
    }

    pub fn connection_ended(&self, reason: &'static str) {
        self.connections_ended.get_or_create(&Reason { reason }).inc();
    }
}
