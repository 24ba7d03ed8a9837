//! A vantage and gateways that answer, hang, refuse and die, over real TLS on loopback.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use spillway_core::health::ProbeSettings;
use spillway_core::inference::{InferResponse, Limits, Parameter, Parameters, Tensor, check_against, entities};
use spillway_core::resource::parse;
use spillway_proto::inference::ServerReadyResponse;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::{AbortHandle, JoinSet};

use super::*;
use crate::fixture::*;
use crate::forwarding::PROBE;
use crate::oip;
use crate::tls::{Offer, accept};

/// What a gateway does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Answer,
    /// Takes connections and says nothing.
    Hang,
    /// Answers no call.
    HangCall,
    /// Resets connections.
    Reset,
    Status(&'static str),
    Said(&'static str, &'static str),
    Degraded(&'static str),
    WrongAnswer,
    OtherRegion,
    NotReady,
    HttpError,
}

/// A gateway; dropped, it is as dead as one that was killed.
struct Double {
    address: SocketAddr,
    state: Arc<State>,
    task: AbortHandle,
}

struct State {
    mode: Mutex<Mode>,
    region: &'static str,
    connections: AtomicUsize,
    /// Synthetic requests that a real gateway would have taken.
    valid: AtomicUsize,
}

impl Drop for Double {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Double {
    fn start(domain: &Domain, region: &'static str) -> Self {
        Self::at(domain, region, "127.0.0.1:0".parse().unwrap())
    }

    /// Also where one was before.
    fn at(domain: &Domain, region: &'static str, address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        Self::serve(domain, region, socket.listen(64).unwrap())
    }

    fn serve(domain: &Domain, region: &'static str, listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap();
        let workload = domain.workload(&format!("spiffe://spillway.test/region/{region}/gateway/{region}-0"));
        let (connections, valid) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let state = Arc::new(State { mode: Mutex::new(Mode::Answer), region, connections, valid });
        let shared = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let (state, workload) = (shared.clone(), workload.clone());
                connections.spawn(async move {
                    let mode = *state.mode.lock();
                    if mode == Mode::Hang {
                        std::future::pending::<()>().await;
                    }
                    if mode == Mode::Reset {
                        stream.set_zero_linger().unwrap();
                        return;
                    }
                    let Ok(accepted) = accept(&workload, stream, Offer::H2, Duration::from_secs(5)).await else {
                        return;
                    };
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = http.serve_connection(TokioIo::new(accepted.stream), service).await;
                });
            }
        });
        Self { address, state, task: task.abort_handle() }
    }

    fn set(&self, mode: Mode) {
        *self.state.mode.lock() = mode;
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let mode = *state.mode.lock();
    assert_eq!(request.headers().get(PROBE).unwrap(), "1");
    assert!(request.headers().contains_key("grpc-timeout"));
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let message = match path.rsplit('/').next().unwrap() {
        "ServerReady" => ServerReadyResponse { ready: mode != Mode::NotReady }.encode_to_vec(),
        _ => predict(&state, body.slice(5..), mode),
    };
    if mode == Mode::HangCall {
        std::future::pending::<()>().await;
    }
    let mut trailers = HeaderMap::new();
    let (status, error) = match mode {
        Mode::Status(status) => (status, None),
        Mode::Said(status, error) => (status, Some(error)),
        _ => ("0", None),
    };
    trailers.insert("grpc-status", status.parse().unwrap());
    if let Some(error) = error {
        trailers.insert("spillway-error", error.parse().unwrap());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&message);
    let frame = if status == "0" { frame.into() } else { Bytes::new() };
    let region = if mode == Mode::OtherRegion { "mars" } else { state.region };
    let body = Full::new(frame).with_trailers(async move { Some(Ok(trailers)) }).boxed_unsync();
    let status = if mode == Mode::HttpError { 502 } else { 200 };
    Ok(Response::builder().status(status).header("spillway-region", region).body(body).unwrap())
}

fn predict(state: &State, message: Bytes, mode: Mode) -> Vec<u8> {
    let request = oip::decode_message(message, &Limits::OF_CLIENTS).unwrap();
    let model = snapshot(&[]).models["score"].clone();
    let whom = entities(&model, &request).unwrap();
    check_against(&model, &request, &whom).unwrap();
    state.valid.fetch_add(1, Ordering::SeqCst);
    let mut parameters = Parameters::default();
    if let Mode::Degraded(degraded) = mode {
        parameters.set("spillway-degraded", Parameter::Text(degraded.into()));
    }
    let output = Tensor {
        name: if mode == Mode::WrongAnswer { "other" } else { "o" }.into(),
        datatype: spillway_core::inference::Datatype::Fp32,
        shape: vec![1],
        parameters: Parameters::default(),
        data: Bytes::from_static(&[0; 4]),
    };
    let response = InferResponse {
        model: request.model,
        version: request.version,
        id: request.id,
        parameters,
        outputs: vec![output],
    };
    oip::encode_response(&response).encode_to_vec()
}

/// Regions eu (ours), us and ap; each serves a tier-1 model, if it has a gateway.
fn snapshot(gateways: &[(&str, SocketAddr)]) -> Arc<Snapshot> {
    snapshot_of(gateways, 1)
}

fn snapshot_of(gateways: &[(&str, SocketAddr)], tier: u8) -> Arc<Snapshot> {
    let mut text = String::new();
    for region in ["eu", "us", "ap"] {
        let found = gateways.iter().filter(|(of, _)| *of == region);
        let list: Vec<String> =
            found.map(|(of, address)| format!("{{name: {of}-0, address: \"{address}\"}}")).collect();
        text += &format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {region}}}\n\
             spec: {{trustDomain: spillway.test, gateways: [{}]}}\n---\n\
             apiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: of-{region}}}\n\
             spec: {{region: {region}, pods: [{{name: p, address: \"127.0.0.1:1\"}}]}}\n---\n",
            list.join(", ")
        );
    }
    text += &format!(
        "apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: score}}\nspec:\n  pools: [of-eu, of-us, of-ap]\n  \
         versions: [1]\n  backend: onnx\n  tier: {tier}\n  deadline: 1s\n  inputs: [{{name: x, datatype: FP32, shape: [-1, 2]}}]\n  \
         outputs: [{{name: o, datatype: FP32, shape: [-1]}}]\n"
    );
    Arc::new(Snapshot::compile(1, &parse(&text).unwrap()).unwrap())
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn us() -> Vantage {
    Vantage::Gateway(Gateway { region: name("eu"), node: name("gw-0") })
}

fn fast(interval: Duration) -> VerdictSettings {
    let probe = ProbeSettings {
        interval,
        timeout: Duration::from_millis(1_000),
        urgent: Duration::from_millis(50),
        stale_after: interval * 3 + Duration::from_secs(1),
        ..ProbeSettings::default()
    };
    VerdictSettings { probe, ..VerdictSettings::default() }
}

/// A prober that runs, and what it is told.
struct World {
    lookout: Lookout,
    sightings: mpsc::UnboundedReceiver<control::Sighting>,
    snapshot: Arc<Mutex<Arc<Snapshot>>>,
    out: Arc<Mutex<BTreeSet<Name>>>,
    metrics: Metrics,
    drain: Drain,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    fn start(domain: &Domain, served: Arc<Snapshot>, settings: VerdictSettings) -> Self {
        let metrics = Metrics::new("test");
        let (snapshot, out) = (Arc::new(Mutex::new(served)), Arc::new(Mutex::new(BTreeSet::new())));
        let (shown, is_out) = (snapshot.clone(), out.clone());
        let (told, sightings) = mpsc::unbounded_channel();
        let surroundings = Surroundings {
            snapshot: Box::new(move || shown.lock().clone()),
            out: Box::new(move || is_out.lock().clone()),
            sighted: Box::new(move |sighting| told.send(sighting).unwrap()),
        };
        let (prober, lookout) = Prober::new(domain.workload(GATEWAY), us(), surroundings, settings, &metrics);
        let drain = Drain::new(Duration::from_secs(1));
        let task = tokio::spawn(prober.run(drain.clone()));
        Self { lookout, sightings, snapshot, out, metrics, drain, task }
    }

    async fn sighting(&mut self) -> (String, sighting::Outcome) {
        let sighting = tokio::time::timeout(Duration::from_secs(10), self.sightings.recv());
        let sighting = sighting.await.unwrap().unwrap();
        (format!("{}/{}", sighting.region, sighting.gateway), sighting.outcome())
    }

    async fn until_down(&mut self, expected: &[&str]) {
        let expected: BTreeSet<Name> = expected.iter().map(|region| name(region)).collect();
        let waited = self.lookout.down.wait_for(|down| *down == expected);
        tokio::time::timeout(Duration::from_secs(10), waited).await.expect("not in time").unwrap();
    }
}

const EACH: Duration = Duration::from_millis(200);

#[tokio::test]
async fn what_a_gateway_does_is_told_as_what_it_is() {
    let domain = Domain::create();
    let double = Double::start(&domain, "us");
    let settings =
        UpstreamSettings { rest: Duration::ZERO, longest_rest: Duration::ZERO, ..UpstreamSettings::default() };
    let workload = domain.workload(GATEWAY);
    let ask = async |target: Target, time: u64| {
        let expected = target.expected.clone();
        let upstream =
            Upstream::with(workload.clone(), target.address, expected, settings.clone(), UpstreamMetrics::default());
        probe::probe(&target, &upstream, Duration::from_millis(time)).await
    };
    let target = |tier: u8| {
        let mut targets = targets(&snapshot_of(&[("us", double.address)], tier), Some(&name("eu")));
        assert_eq!(targets.len(), 1);
        targets.remove(0).1
    };
    for (mode, outcome) in [
        (Mode::Answer, Outcome::Good),
        (Mode::Degraded("1 stale-feature"), Outcome::Good),
        (Mode::Degraded("4 static"), Outcome::Overloaded),
        (Mode::Status("8"), Outcome::Overloaded),
        (Mode::Said("14", "pods-busy"), Outcome::Overloaded),
        (Mode::Said("14", "no-pod"), Outcome::Failed),
        (Mode::Status("4"), Outcome::Failed),
        (Mode::Status("7"), Outcome::Failed),
        (Mode::Status("13"), Outcome::Failed),
        (Mode::WrongAnswer, Outcome::Failed),
        (Mode::OtherRegion, Outcome::Failed),
        (Mode::HttpError, Outcome::Failed),
        (Mode::Reset, Outcome::Refused),
    ] {
        double.set(mode);
        let probed = ask(target(1), 5_000).await;
        assert_eq!(probed.outcome, outcome, "{mode:?}: {}", probed.why);
    }
    for mode in [Mode::Hang, Mode::HangCall] {
        double.set(mode);
        let probed = ask(target(1), 300).await;
        assert_eq!(probed.outcome, Outcome::Failed, "{mode:?}");
        assert!(probed.took < Duration::from_secs(2), "{mode:?}");
    }
    assert!(double.state.valid.load(Ordering::SeqCst) >= 10);
    let asked = double.state.valid.load(Ordering::SeqCst);
    for (mode, outcome) in [(Mode::Answer, Outcome::Good), (Mode::NotReady, Outcome::Failed)] {
        double.set(mode);
        assert_eq!(ask(target(2), 5_000).await.outcome, outcome, "without a tier-1 model: {mode:?}");
    }
    assert_eq!(double.state.valid.load(Ordering::SeqCst), asked, "no model was asked");
    let stranger = Double::start(&domain, "ap");
    let taken_for = Target { address: stranger.address, ..target(1) };
    assert_eq!(ask(taken_for, 5_000).await.outcome, Outcome::Failed, "only this gateway will do");
}

#[tokio::test]
async fn a_region_that_has_another_version_of_a_model_is_not_failed_for_it() {
    let domain = Domain::create();
    let double = Double::start(&domain, "us");
    double.set(Mode::Status("5"));
    let mut world = World::start(&domain, snapshot(&[("us", double.address)]), fast(EACH));
    // The double refuses ServerReady likewise, which is one more word than a gateway would say; that it is asked is
    // what is seen here.
    assert_eq!(world.sighting().await, ("us/us-0".into(), sighting::Outcome::Failed));
    double.set(Mode::Answer);
    while world.sighting().await.1 != sighting::Outcome::Good {}
}

#[tokio::test]
async fn a_killed_gateway_is_down_within_moments_and_up_when_it_is_back() {
    let domain = Domain::create();
    let (us, ap) = (Double::start(&domain, "us"), Double::start(&domain, "ap"));
    // Without a notice, the next probe would come in 30 s.
    let settings = fast(Duration::from_secs(30));
    let mut world = World::start(&domain, snapshot(&[("us", us.address), ("ap", ap.address)]), settings);
    eventually("the first look", || Arc::strong_count(&world.snapshot.lock()) > 1).await;
    world.lookout.nudges.hear("us/us-0");
    world.lookout.nudges.hear("ap/ap-0");
    for text in ["us", "us/us-0/x", "us/", "/", "mars/us-0", "us/\u{e9}"] {
        world.lookout.nudges.hear(text);
    }
    let seen = BTreeSet::from([world.sighting().await, world.sighting().await]);
    let good = sighting::Outcome::Good;
    assert_eq!(seen, BTreeSet::from([("us/us-0".to_owned(), good), ("ap/ap-0".to_owned(), good)]));
    let (address, killed) = (us.address, std::time::Instant::now());
    drop(us);
    world.until_down(&["us"]).await;
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
    let mut refused = 0;
    while refused < 3 {
        let (gateway, outcome) = world.sighting().await;
        refused += usize::from(gateway == "us/us-0");
        assert_eq!(outcome == good, gateway == "ap/ap-0", "{gateway}: {outcome:?}");
    }
    let _back = Double::at(&domain, "us", address);
    world.lookout.nudges.nudge(&name("us"), &name("us-0"));
    world.until_down(&[]).await;
    let text = world.metrics.encode().unwrap();
    for line in [
        "spillway_vantage_probes_total{region=\"us\",gateway=\"us-0\",outcome=\"refused\"} 3",
        "spillway_vantage_probes_total{region=\"ap\",gateway=\"ap-0\",outcome=\"good\"} 2",
        "spillway_vantage_down{region=\"us\"} 0",
        "spillway_vantage_isolated 0",
        "spillway_vantage_nudges_total 4",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn each_probe_is_a_new_connection_and_only_one_is_kept() {
    let domain = Domain::create();
    let double = Double::start(&domain, "us");
    let mut world = World::start(&domain, snapshot(&[("us", double.address)]), fast(EACH));
    for probes in 1..=4 {
        assert_eq!(world.sighting().await.1, sighting::Outcome::Good);
        assert_eq!(double.state.connections.load(Ordering::SeqCst), probes);
    }
    let text = world.metrics.encode().unwrap();
    assert!(text.contains("spillway_vantage_nudges_total 0"), "our own closing is no notice: {text}");
}

#[tokio::test]
async fn who_sees_nothing_in_two_regions_knows_nothing() {
    let domain = Domain::create();
    let (us, ap) = (Double::start(&domain, "us"), Double::start(&domain, "ap"));
    let mut world = World::start(&domain, snapshot(&[("us", us.address), ("ap", ap.address)]), fast(EACH));
    for _ in 0..4 {
        world.sighting().await;
    }
    us.set(Mode::Reset);
    ap.set(Mode::Reset);
    let mut refused = 0;
    while refused < 8 {
        refused += usize::from(world.sighting().await.1 == sighting::Outcome::Refused);
        assert!(world.lookout.down.borrow().is_empty());
    }
    assert!(world.metrics.encode().unwrap().contains("spillway_vantage_isolated 1"));
    // One of them is out anyway: then the silence of the other says something.
    world.out.lock().insert(name("ap"));
    world.until_down(&["ap", "us"]).await;
    us.set(Mode::Answer);
    world.until_down(&["ap"]).await;
}

#[tokio::test]
async fn the_snapshot_says_whom_to_probe_and_the_drain_until_when() {
    let domain = Domain::create();
    let (us, ap) = (Double::start(&domain, "us"), Double::start(&domain, "ap"));
    let eu = Double::start(&domain, "eu");
    let all = [("us", us.address), ("eu", eu.address)];
    let mut world = World::start(&domain, snapshot(&all), fast(EACH));
    for _ in 0..3 {
        assert_eq!(world.sighting().await, ("us/us-0".into(), sighting::Outcome::Good));
    }
    *world.snapshot.lock() = snapshot(&[("ap", ap.address)]);
    while world.sighting().await.0 != "ap/ap-0" {}
    assert_eq!(world.sighting().await, ("ap/ap-0".into(), sighting::Outcome::Good));
    assert!(!world.metrics.encode().unwrap().contains("us-0"));
    assert_eq!(eu.state.connections.load(Ordering::SeqCst), 0, "our own region is not probed");
    world.drain.stop();
    tokio::time::timeout(Duration::from_secs(5), world.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_thousand_nudges_of_one_gateway_are_one() {
    let domain = Domain::create();
    let surroundings =
        Surroundings { snapshot: Box::new(|| snapshot(&[])), out: Box::new(BTreeSet::new), sighted: Box::new(|_| {}) };
    let metrics = Metrics::new("test");
    let (mut prober, lookout) =
        Prober::new(domain.workload(GATEWAY), us(), surroundings, VerdictSettings::default(), &metrics);
    let (region, gateway, began) = (name("us"), name("us-0"), Instant::now());
    for _ in 0..1_000 {
        lookout.nudges.clone().nudge(&region, &gateway);
    }
    let most = 1 + began.elapsed().div_duration_f64(NUDGED) as usize;
    assert!((1..=most).contains(&prober.nudged.len()), "{} of {most}", prober.nudged.len());
    tokio::time::sleep(NUDGED).await;
    prober.nudged.recv().await.unwrap();
    let before = prober.nudged.len();
    lookout.nudges.nudge(&region, &gateway);
    assert_eq!(prober.nudged.len(), before + 1);
    for number in 0..2 * NUDGES {
        lookout.nudges.nudge(&region, &name(&format!("gw-{number}")));
    }
    assert!(prober.nudged.len() <= NUDGES && lookout.nudges.recent.lock().len() <= NUDGES);
}
