use super::*;
use parking_lot::Mutex;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A collector in this process; while `closed` is held it takes nothing.
#[derive(Clone, Debug, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<SpanData>>>,
    closed: Arc<Mutex<()>>,
}

impl opentelemetry_sdk::trace::SpanExporter for Collector {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        drop(self.closed.lock());
        self.spans.lock().append(&mut batch);
        Ok(())
    }
}

fn headers(traceparent: &[&'static str]) -> HeaderMap {
    traceparent.iter().map(|value| (TRACEPARENT, HeaderValue::from_static(value))).collect()
}

#[test]
fn a_trace_goes_on_through_spans_and_headers() {
    let collector = Collector::default();
    let traces = Traces::to(collector.clone(), 0.0, "test", &Metrics::new("test"));
    let mut incoming = headers(&[PARENT]);
    incoming.insert(TRACESTATE, HeaderValue::from_static("vendor=1"));
    let parent = TraceParent::read(&incoming);
    let mut span = traces.span("request", &parent);
    span.set("model", "fraud");
    span.status(Status::Error("overload"));
    let child = traces.span("upstream", &span.as_parent());
    let mut outgoing = headers(&["00-11111111111111111111111111111111-2222222222222222-00"]);
    child.as_parent().write(&mut outgoing);
    drop((child, span));
    traces.stop();
    let spans = collector.spans.lock();
    let [child, request] = &spans[..] else { panic!("two spans: {spans:?}") };
    assert_eq!(child.parent_span_id, request.span_context.span_id());
    assert_eq!(request.parent_span_id.to_string(), "b7ad6b7169203331");
    let expected = format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", child.span_context.span_id());
    assert_eq!(outgoing[TRACEPARENT], expected);
    assert_eq!(outgoing[TRACESTATE], "vendor=1");
    assert_eq!(parent.trace_id().unwrap(), "0af7651916cd43dd8448eb211c80319c");
}

#[test]
fn a_long_tracestate_is_dropped_and_the_trace_goes_on() {
    for (length, passed) in [(MAX_STATE, true), (MAX_STATE + 1, false)] {
        let mut incoming = headers(&[PARENT]);
        let (long, rest) = ("a".repeat(200), "b".repeat(length - 408));
        let state = format!("u={long},v={long},w={rest}");
        assert_eq!(state.len(), length);
        incoming.insert(TRACESTATE, HeaderValue::try_from(state).unwrap());
        let mut outgoing = HeaderMap::new();
        TraceParent::read(&incoming).write(&mut outgoing);
        assert_eq!(outgoing[TRACEPARENT], PARENT);
        assert_eq!(outgoing.contains_key(TRACESTATE), passed, "{length}");
    }
}

#[test]
fn what_is_no_traceparent_is_none() {
    for bad in [
        &[][..],
        &["", PARENT],
        &["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"],
        &["00-00000000000000000000000000000000-b7ad6b7169203331-01"],
        &["00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"],
        &["ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
        &["00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"],
        &["rubbish"],
        &[PARENT, PARENT],
    ] {
        let parent = TraceParent::read(&headers(bad));
        assert!(!parent.is_some() && parent.trace_id().is_none(), "{bad:?}");
        let mut outgoing = headers(&[PARENT]);
        parent.write(&mut outgoing);
        assert!(outgoing.is_empty());
    }
}

#[test]
fn who_has_no_parent_is_sampled_by_the_ratio_and_a_caller_who_declined_is_not() {
    let collector = Collector::default();
    let traces = Traces::to(collector.clone(), 1.0, "test", &Metrics::new("test"));
    assert!(traces.span("root", &TraceParent::none()).is_recording());
    let declined = headers(&["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"]);
    assert!(!traces.span("declined", &TraceParent::read(&declined)).is_recording());
    traces.stop();
    assert_eq!(collector.spans.lock().len(), 1);
}

#[test]
fn without_an_endpoint_a_trace_passes_through() {
    let parent = TraceParent::read(&headers(&[PARENT]));
    let span = Traces::off().span("request", &parent);
    assert!(span.as_parent() == parent && !span.is_recording());
}

#[test]
fn spans_beyond_the_queue_are_dropped_and_counted() {
    let collector = Collector::default();
    let closed = collector.closed.lock();
    let metrics = Metrics::new("test");
    let traces = Traces::to(collector.clone(), 1.0, "test", &metrics);
    for _ in 0..QUEUE + 100 {
        drop(traces.span("request", &TraceParent::none()));
    }
    assert!(metrics.encode().unwrap().contains("spillway_trace_spans_dropped_total 100\n"));
    drop(closed);
    traces.stop();
    assert_eq!(collector.spans.lock().len(), QUEUE);
}

#[tokio::test]
async fn an_absent_collector_stops_nothing() {
    let settings = OtlpSettings { endpoint: "http://127.0.0.1:1".into(), sample: 1.0 };
    let metrics = Metrics::new("test");
    let traces = Traces::start(&settings, "test", &metrics).unwrap();
    drop(traces.span("request", &TraceParent::none()));
    let stopping = traces.clone();
    tokio::task::spawn_blocking(move || stopping.stop()).await.unwrap();
    assert!(metrics.encode().unwrap().contains("spillway_trace_spans_failed_total 1\n"));
}
