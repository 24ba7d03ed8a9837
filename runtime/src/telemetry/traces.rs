//! Traces over OTLP: spans that the request path opens and closes itself.
//!
//! The rule: a caller's decision to sample is followed, and who has none is sampled by a ratio. Spans
//! wait in a bounded queue for one exporter; what does not fit is dropped and counted. Without an
//! endpoint a trace still passes through: what came in goes out.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanContext, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData, SpanProcessor,
};
use prometheus_client::metrics::counter::Counter;

use super::Metrics;

/// Finished spans that may wait; a span is about 1 KiB.
const QUEUE: usize = 8_192;
const BATCH: usize = 512;
const EXPORT_EVERY: Duration = Duration::from_secs(1);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of a `tracestate` that are passed on; what is longer may be dropped (W3C Trace Context, 3.3.1.5).
const MAX_STATE: usize = 512;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

#[derive(Clone, Debug, PartialEq)]
pub struct OtlpSettings {
    /// OTLP over gRPC, such as `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// The share of traces that begin here and are sampled, 0 to 1. Default 0.01.
    pub sample: f64,
}

impl Default for OtlpSettings {
    fn default() -> Self {
        Self { endpoint: "http://127.0.0.1:4317".into(), sample: 0.01 }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the trace exporter cannot be made")]
pub struct TracesError(#[from] ExporterBuildError);

/// How a span ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    Error(&'static str),
}

/// Makes spans. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Pipeline>>);

#[derive(Debug)]
struct Pipeline {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// No spans are made; what came in is passed on.
    pub fn off() -> Self {
        Self(None)
    }

    /// Exports to the endpoint. To be called within a tokio runtime. The endpoint need not be there.
    /// Counts `spillway_trace_spans_dropped_total` and `spillway_trace_spans_failed_total`.
    pub fn start(settings: &OtlpSettings, process: &'static str, metrics: &Metrics) -> Result<Self, TracesError> {
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&settings.endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        Ok(Self::to(exporter, settings.sample, process, metrics))
    }

    fn to(
        exporter: impl opentelemetry_sdk::trace::SpanExporter + 'static,
        sample: f64,
        process: &'static str,
        metrics: &Metrics,
    ) -> Self {
        let help = "Spans dropped because the exporter was behind";
        let dropped = metrics.register("trace_spans_dropped", help, Counter::default());
        let help = "Spans that the collector did not take";
        let failed = metrics.register("trace_spans_failed", help, Counter::default());
        let waiting = Arc::new(AtomicUsize::new(0));
        let exporter = CountingExporter { inner: exporter, waiting: waiting.clone(), failed };
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(EXPORT_EVERY)
            .build();
        let inner = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        let resource = Resource::builder_empty()
            .with_service_name(format!("spillway-{process}"))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BoundedProcessor { inner, waiting, dropped })
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample))))
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("spillway");
        Self(Some(Arc::new(Pipeline { provider, tracer })))
    }

    /// Opens a span. `parent` is what came with the request.
    pub fn span(&self, name: impl Into<Cow<'static, str>>, parent: &TraceParent) -> Span {
        let Some(pipeline) = &self.0 else { return Span { parent: parent.clone(), own: None } };
        // An invalid parent in the context would count as one that declined to sample.
        let context = match parent.is_some() {
            true => Context::new().with_remote_span_context(parent.0.clone()),
            false => Context::new(),
        };
        let own = pipeline.tracer.start_with_context(name, &context);
        Span { parent: parent.clone(), own: Some(own) }
    }

    /// Exports what waits, within a few seconds, and stops. Blocks.
    pub fn stop(&self) {
        let Some(pipeline) = &self.0 else { return };
        if let Err(error) = pipeline.provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// One step of a request; it ends when dropped, also when the request is cancelled.
#[derive(Debug)]
pub struct Span {
    parent: TraceParent,
    own: Option<opentelemetry_sdk::trace::Span>,
}

impl Span {
    /// What a child of this span, here or in the next process, has as its parent.
    pub fn as_parent(&self) -> TraceParent {
        use opentelemetry::trace::Span as _;
        self.own.as_ref().map_or_else(|| self.parent.clone(), |own| TraceParent(own.span_context().clone()))
    }

    /// Whether what is set on it goes anywhere.
    pub fn is_recording(&self) -> bool {
        use opentelemetry::trace::Span as _;
        self.own.as_ref().is_some_and(|own| own.is_recording())
    }

    /// Nothing secret, no bodies, no entity ids.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        use opentelemetry::trace::Span as _;
        if let Some(own) = self.own.as_mut().filter(|own| own.is_recording()) {
            own.set_attribute(KeyValue::new(key, value));
        }
    }

    pub fn status(&mut self, status: Status) {
        use opentelemetry::trace::Span as _;
        let Some(own) = &mut self.own else { return };
        own.set_status(match status {
            Status::Ok => opentelemetry::trace::Status::Ok,
            Status::Error(description) => opentelemetry::trace::Status::error(description),
        });
    }
}

/// A place in a trace as `traceparent` and `tracestate` carry it (W3C Trace Context, level 1). One that
/// cannot be read is none.
#[derive(Clone, PartialEq)]
pub struct TraceParent(SpanContext);

impl TraceParent {
    pub fn none() -> Self {
        Self(SpanContext::empty_context())
    }

    pub fn read(headers: &HeaderMap) -> Self {
        if !headers.contains_key(TRACEPARENT) {
            return Self::none();
        }
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        Self(context.span().span_context().clone())
    }

    /// Replaces both headers; without a trace they are removed.
    pub fn write(&self, headers: &mut HeaderMap) {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
        if self.0.is_valid() {
            let context = Context::new().with_remote_span_context(self.0.clone());
            TraceContextPropagator::new().inject_context(&context, &mut HeadersMut(headers));
        }
    }

    pub fn is_some(&self) -> bool {
        self.0.is_valid()
    }

    /// 32 hexadecimal digits, for the access log.
    pub fn trace_id(&self) -> Option<String> {
        self.is_some().then(|| self.0.trace_id().to_string())
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.trace_id(), self.0.span_id())
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        // A header given twice is ambiguous, and so none.
        let mut values = self.0.get_all(key).iter();
        let value = values.next()?;
        if key == TRACESTATE.as_str() && value.len() > MAX_STATE {
            return None;
        }
        if values.next().is_some() && key == TRACEPARENT.as_str() { None } else { value.to_str().ok() }
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value))
            && !value.is_empty()
        {
            self.0.insert(name, value);
        }
    }
}

/// Lets so many spans wait and counts the others.
#[derive(Debug)]
struct BoundedProcessor {
    inner: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
    dropped: Counter,
}

impl SpanProcessor for BoundedProcessor {
    fn on_start(&self, span: &mut opentelemetry_sdk::trace::Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= QUEUE {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.inc();
            return;
        }
        self.inner.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[derive(Debug)]
struct CountingExporter<E> {
    inner: E,
    waiting: Arc<AtomicUsize>,
    failed: Counter,
}

impl<E: opentelemetry_sdk::trace::SpanExporter> opentelemetry_sdk::trace::SpanExporter for CountingExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let result = self.inner.export(batch).await;
        self.waiting.fetch_sub(count, Ordering::Relaxed);
        if result.is_err() {
            self.failed.inc_by(count as u64);
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
#[path = "traces_tests.rs"]
mod tests;
