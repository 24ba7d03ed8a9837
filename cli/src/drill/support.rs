//! A fleet of three regions that are made up: gateways, DNS, a control plane, sidecars, in this process.
//!
//! What the control plane would find out is a table: a region that was killed is suspected after a second, down after
//! two, and on its way back for four after it was started.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hickory_proto::op::{Message, MessageType, OpCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
use hickory_proto::rr::{RData, Record};
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use spillway_core::drill::{Board, LeaseId, Notice};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::units::{DnsName, Name};
use spillway_proto::control::intent_server::{Intent, IntentServer};
use spillway_proto::control::*;
use spillway_proto::feature::feature_service_server::{FeatureService, FeatureServiceServer};
use spillway_proto::feature::{
    DeleteRequest, DeleteResponse, Found, GetRequest as GetRows, GetResponse as GotRows, PutRequest, PutResponse, Row,
};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::{IdentitySettings, Offer, Workload, accept, install_provider};
use tempfile::TempDir;
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;
use tonic::{Request, Response as Answered, Status};

use super::place::{Breakers, Place, Server};
use crate::injector::Processes;

pub const REGIONS: [&str; 3] = ["eu-west", "us-east", "ap-south"];
pub const SERVICE: &str = "predict.spillway.test";
/// What DNS says; short, so that clients move while one looks.
pub const TTL: u32 = 2;

/// A trust domain in a temporary folder.
pub struct Domain {
    pub folder: TempDir,
    authority: Authority,
}

impl Domain {
    pub fn create() -> Self {
        install_provider();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), authority }
    }

    pub fn identity(&self, path: &str) -> IdentitySettings {
        let id = SpiffeId::parse(&format!("spiffe://spillway.test/{path}")).unwrap();
        let request = LeafRequest::new(id, Duration::from_secs(3_600)).dialled_locally();
        let folder = self.folder.path().join(path.replace('/', "-"));
        self.authority.issue(&request).unwrap().save_workload(folder, self.authority.trust_bundle()).unwrap()
    }
}

/// A place with nobody in it.
pub fn place_of(domain: &Domain, operator: IdentitySettings) -> Place {
    Place {
        service: DnsName::host(SERVICE).unwrap(),
        port: 1,
        server_name: "localhost".into(),
        dns: Vec::new(),
        control: Vec::new(),
        operator,
        client: domain.identity("tenant/acme/client/drill"),
        model: "phishing".into(),
        entity: "site-0001".into(),
        injectors: Breakers::Nodes(Vec::new()),
        loaders: BTreeMap::new(),
        sidecars: BTreeMap::new(),
    }
}

/// How a gateway treats requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Serves,
    Says(StatusCode),
    Silent,
}

/// A gateway that answers with its region. Its connections end with it.
pub struct Gateway {
    pub address: SocketAddr,
    pub mood: Arc<Mutex<Mood>>,
    pub asked: Arc<Mutex<u64>>,
    tasks: JoinSet<()>,
}

impl Gateway {
    pub async fn start(domain: &Domain, region: &str, address: SocketAddr) -> Self {
        let identity = domain.identity(&format!("region/{region}/gateway/gateway-0"));
        let workload = Workload::load(&identity).unwrap();
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mood = Arc::new(Mutex::new(Mood::Serves));
        let asked = Arc::<Mutex<u64>>::default();
        let mut tasks = JoinSet::new();
        let (region, moods, count) = (region.to_owned(), mood.clone(), asked.clone());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (workload, region, mood, count) = (workload.clone(), region.clone(), moods.clone(), count.clone());
                connections.spawn(async move {
                    let Ok(accepted) = accept(&workload, stream, Offer::H2, Duration::from_secs(5)).await else {
                        return;
                    };
                    let service = service_fn(move |_: http::Request<Incoming>| {
                        let (region, mood) = (region.clone(), *mood.lock());
                        *count.lock() += 1;
                        async move {
                            let status = match mood {
                                Mood::Serves => StatusCode::OK,
                                Mood::Says(status) => status,
                                Mood::Silent => std::future::pending().await,
                            };
                            let answer = Response::builder().status(status).header("spillway-region", region);
                            Ok::<_, Infallible>(answer.body(Full::new(Bytes::from_static(b"{}"))).unwrap())
                        }
                    });
                    let server = http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(accepted.stream), service).await;
                });
            }
        });
        Self { address, mood, asked, tasks }
    }

    pub async fn kill(&mut self) {
        self.tasks.shutdown().await;
    }
}

type Says = dyn Fn(Ipv4Addr) -> Vec<Ipv4Addr> + Send + Sync;

/// A DNS node over UDP; what it says depends on the subnet of the ECS option.
pub struct Dns {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<Ipv4Addr>>>,
    _tasks: JoinSet<()>,
}

impl Dns {
    pub async fn start(ttl: u32, says: impl Fn(Ipv4Addr) -> Vec<Ipv4Addr> + Send + Sync + 'static) -> Self {
        let says: Arc<Says> = Arc::new(says);
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let asked = Arc::<Mutex<Vec<Ipv4Addr>>>::default();
        let heard = asked.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut buffer = [0; 2_048];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let question = Message::from_vec(&buffer[..length]).unwrap();
                let subnet = subnet(&question).expect("a client subnet");
                heard.lock().push(subnet);
                let _ = socket.send_to(&reply(&question, ttl, &says(subnet)).to_vec().unwrap(), from).await;
            }
        });
        Self { address, asked, _tasks: tasks }
    }
}

pub fn subnet(question: &Message) -> Option<Ipv4Addr> {
    match question.edns.as_ref()?.option(EdnsCode::Subnet)? {
        EdnsOption::Subnet(subnet) => match subnet.addr() {
            IpAddr::V4(address) if subnet.source_prefix() == 24 => Some(address),
            _ => None,
        },
        _ => None,
    }
}

pub fn reply(question: &Message, ttl: u32, addresses: &[Ipv4Addr]) -> Message {
    let mut answer = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
    for query in &question.queries {
        answer.add_query(query.clone());
        for address in addresses {
            answer.add_answer(Record::from_rdata(query.name().clone(), ttl, RData::A(A(*address))));
        }
    }
    answer
}

/// Serves gRPC over mTLS until dropped.
pub async fn serve_grpc<S>(identity: &IdentitySettings, service: S) -> (SocketAddr, JoinSet<()>)
where
    S: tower::Service<http::Request<Incoming>, Response = Response<tonic::body::Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    let workload = Workload::load(identity).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let (workload, service) = (workload.clone(), service.clone());
            connections.spawn(async move {
                let Ok(accepted) = accept(&workload, stream, Offer::H2, Duration::from_secs(5)).await else { return };
                let server = http2::Builder::new(TokioExecutor::new());
                let service = TowerToHyperService::new(service);
                let _ = server.serve_connection(TokioIo::new(accepted.stream), service).await;
            });
        }
    });
    (address, tasks)
}

/// Feature rows that are one region's, and reach others or not.
#[derive(Clone, Default)]
pub struct Rows(pub Arc<Mutex<Option<Row>>>);

#[tonic::async_trait]
impl FeatureService for Rows {
    async fn put(&self, request: Request<PutRequest>) -> Result<Answered<PutResponse>, Status> {
        *self.0.lock() = request.into_inner().rows.pop();
        Ok(Answered::new(PutResponse { written: 1, ..PutResponse::default() }))
    }

    async fn get(&self, _: Request<GetRows>) -> Result<Answered<GotRows>, Status> {
        let row = self.0.lock().clone();
        let found = Found { present: row.is_some(), row, ..Found::default() };
        Ok(Answered::new(GotRows { rows: vec![found] }))
    }

    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Answered<DeleteResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

pub async fn serve_rows(domain: &Domain, region: &str, rows: Rows) -> (Server, JoinSet<()>) {
    let identity = domain.identity(&format!("region/{region}/sidecar/scorers/pod-0"));
    let id = Workload::load(&identity).unwrap().id();
    let (address, tasks) = serve_grpc(&identity, FeatureServiceServer::new(rows)).await;
    (Server { name: String::new(), address: address.to_string(), id }, tasks)
}

/// The whole of it.
pub struct Fleet {
    pub domain: Domain,
    pub place: Place,
    pub truth: Arc<Truth>,
    pub gateways: Arc<Gateways>,
    _dns: Dns,
    _tasks: Vec<JoinSet<()>>,
}

/// What became of each region, from which all else follows.
#[derive(Default)]
pub struct Truth {
    killed: Mutex<BTreeMap<String, Instant>>,
    started: Mutex<BTreeMap<String, Instant>>,
    pub overrides: Mutex<Vec<Override>>,
    /// Kept out of everything: the control plane says nothing.
    pub mute: Mutex<bool>,
    pub drills: Mutex<Board>,
}

impl Truth {
    fn phase(&self, region: &str) -> (&'static str, f64) {
        let since = |times: &Mutex<BTreeMap<String, Instant>>| times.lock().get(region).map(Instant::elapsed);
        let seconds = |time: Duration| time.as_secs();
        match (since(&self.killed).map(seconds), since(&self.started).map(seconds)) {
            (None, None) | (Some(0), None) | (_, Some(4..)) => ("up", 1.0),
            (Some(1), None) => ("suspect", 1.0),
            (Some(_), None) | (_, Some(0..2)) => ("down", 0.0),
            (_, Some(2)) => ("probation", 0.0),
            (_, Some(_)) => ("ramp", 0.5),
        }
    }

    fn weights(&self) -> BTreeMap<&'static str, f64> {
        let shares = REGIONS.map(|region| (region, self.phase(region).1));
        let sum: f64 = shares.iter().map(|(_, share)| share).sum();
        shares.into_iter().map(|(region, share)| (region, share / sum)).collect()
    }

    fn status(&self) -> StatusResponse {
        let weights = self.weights();
        // Any number that rises with each change.
        let version = 1
            + weights.values().filter(|weight| **weight != 1.0 / 3.0).count() as u64
            + 10 * self.started.lock().len() as u64;
        let regions = REGIONS.map(|region| {
            let (phase, _) = self.phase(region);
            RegionStatus {
                region: region.into(),
                phase: phase.into(),
                weight: weights[region],
                failing_pairs: if phase == "up" { 0 } else { 4 },
                ..RegionStatus::default()
            }
        });
        let planned = REGIONS.map(|region| RegionPlan {
            region: region.into(),
            weight: weights[region],
            capacity: Some(100.0),
            ..RegionPlan::default()
        });
        StatusResponse {
            leader: "control-0".into(),
            plan: Some(Plan { version, demand: Some(150.0), regions: planned.to_vec(), ..Plan::default() }),
            regions: regions.to_vec(),
            overrides: Some(Overrides { overrides: self.overrides.lock().clone() }),
            drills: self.running().into_iter().collect(),
            ..StatusResponse::default()
        }
    }
}

impl Truth {
    /// The drill that everybody is told of.
    pub fn running(&self) -> Option<RunningDrill> {
        let drills = self.drills.lock();
        let (notice, _) = drills.running(since_start())?;
        let Notice { lease, drill, stage, .. } = notice.clone();
        Some(RunningDrill { lease: lease.0, drill, stage, ..RunningDrill::default() })
    }
}

pub fn notice(lease: u64, drill: &str, stage: &str) -> Notice {
    let (drill, stage) = (drill.to_owned(), stage.to_owned());
    Notice { lease: LeaseId(lease), drill, target: None, stage, author: "alice".into(), began: Duration::ZERO }
}

/// Of all tests.
pub fn since_start() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// Each region has one, at an address of its own.
pub struct Gateways {
    running: Mutex<BTreeMap<String, Gateway>>,
    truth: Arc<Truth>,
}

impl Processes for Gateways {
    fn names(&self) -> Vec<String> {
        REGIONS.map(|region| format!("{region}/gateway")).to_vec()
    }

    fn pid(&self, name: &str) -> Option<u32> {
        let region = name.split('/').next().unwrap();
        let since = |times: &Mutex<BTreeMap<String, Instant>>| times.lock().get(region).copied();
        let (killed, started) = (since(&self.truth.killed), since(&self.truth.started));
        // Any number: these are no processes.
        (started >= killed).then_some(1)
    }

    fn kill(&self, name: &str) -> anyhow::Result<()> {
        let region = name.split('/').next().unwrap().to_owned();
        self.running.lock().remove(&region);
        self.truth.killed.lock().insert(region, Instant::now());
        Ok(())
    }

    fn pause(&self, _: &str) -> anyhow::Result<()> {
        anyhow::bail!("these are no processes")
    }

    fn resume(&self, _: &str) -> anyhow::Result<()> {
        anyhow::bail!("these are no processes")
    }

    fn start(&self, name: &str) -> anyhow::Result<()> {
        let region = name.split('/').next().unwrap().to_owned();
        // Clients may as well find nobody there: that it is back is what the control plane is told.
        self.truth.started.lock().insert(region, Instant::now());
        Ok(())
    }
}

pub fn address_of(region: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 81, u8::try_from(region).unwrap() + 1, 1)
}

struct Asked {
    truth: Arc<Truth>,
    port: u16,
}

#[tonic::async_trait]
impl Intent for Asked {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Answered<StatusResponse>, Status> {
        if *self.truth.mute.lock() {
            return Err(Status::unavailable("mute"));
        }
        Ok(Answered::new(self.truth.status()))
    }

    async fn get(&self, _: Request<GetRequest>) -> Result<Answered<GetResponse>, Status> {
        let resources = REGIONS.iter().enumerate().map(|(place, region)| Resource {
            kind: "Region".into(),
            name: (*region).into(),
            spec_json: format!(
                r#"{{"gateways":[{{"address":"{}:{}","name":"gateway-0"}}],"trustDomain":"spillway.test"}}"#,
                address_of(place),
                self.port
            ),
        });
        Ok(Answered::new(GetResponse { version: 1, resources: resources.collect() }))
    }

    async fn set_drill(&self, request: Request<SetDrillRequest>) -> Result<Answered<Drills>, Status> {
        let SetDrillRequest { lease, drill, stage, .. } = request.into_inner();
        let mut drills = self.truth.drills.lock();
        match drills.announce(notice(lease, &drill, &stage), since_start()) {
            Ok(_) => Ok(Answered::new(Drills::default())),
            Err(held) => Err(Status::failed_precondition(format!("the drill {} runs", held.drill))),
        }
    }

    async fn end_drill(&self, request: Request<EndDrillRequest>) -> Result<Answered<Drills>, Status> {
        self.truth.drills.lock().end(LeaseId(request.into_inner().lease), "alice");
        Ok(Answered::new(Drills::default()))
    }

    async fn apply(&self, _: Request<ApplyRequest>) -> Result<Answered<ApplyResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn history(&self, _: Request<HistoryRequest>) -> Result<Answered<HistoryResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn audit(&self, _: Request<AuditRequest>) -> Result<Answered<AuditResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn rollback(&self, _: Request<RollbackRequest>) -> Result<Answered<ApplyResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn set_override(&self, _: Request<Override>) -> Result<Answered<Overrides>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn lift_override(&self, _: Request<LiftOverrideRequest>) -> Result<Answered<Overrides>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

impl Fleet {
    pub async fn start() -> Self {
        let domain = Domain::create();
        let truth = Arc::new(Truth::default());
        let mut running = BTreeMap::new();
        let mut port = 0;
        for (place, region) in REGIONS.into_iter().enumerate() {
            let gateway = Gateway::start(&domain, region, SocketAddr::new(address_of(place).into(), port)).await;
            port = gateway.address.port();
            running.insert(region.to_owned(), gateway);
        }
        let gateways = Arc::new(Gateways { running: Mutex::new(running), truth: truth.clone() });
        let answers = truth.clone();
        let dns = Dns::start(TTL, move |subnet| {
            let weights = answers.weights();
            let home = usize::from(subnet.octets()[2]) % REGIONS.len();
            let places = (0..REGIONS.len()).map(|turn| (home + turn) % REGIONS.len());
            let mut healthy = places.filter(|place| weights[REGIONS[*place]] > 0.0);
            let first = healthy.next().unwrap();
            // The next one too, as a sensible operator would have it.
            [Some(first), healthy.next()].into_iter().flatten().map(address_of).collect()
        })
        .await;
        let control = domain.identity("region/eu-west/control/control-0");
        let (address, tasks) = serve_grpc(&control, IntentServer::new(Asked { truth: truth.clone(), port })).await;
        let id = Workload::load(&control).unwrap().id();
        let mut all = vec![tasks];
        let shared = Rows::default();
        let (mut sidecars, mut loaders) = (BTreeMap::new(), BTreeMap::new());
        for region in REGIONS {
            let (server, tasks) = serve_rows(&domain, region, shared.clone()).await;
            sidecars.insert(Name::parse(region).unwrap(), vec![server]);
            loaders.insert(Name::parse(region).unwrap(), domain.identity(&format!("region/{region}/loader/one")));
            all.push(tasks);
        }
        let place = Place {
            service: DnsName::host(SERVICE).unwrap(),
            port,
            server_name: "localhost".into(),
            dns: vec![dns.address],
            control: vec![Server { name: "control-0".into(), address: address.to_string(), id }],
            operator: domain.identity("region/eu-west/control/operator"),
            client: domain.identity("tenant/acme/client/drill"),
            model: "phishing".into(),
            entity: "site-0001".into(),
            injectors: Breakers::File(domain.folder.path().join("injector.json")),
            loaders,
            sidecars,
        };
        Self { domain, place, truth, gateways, _dns: dns, _tasks: all }
    }
}
