//! Injectors of two machines, over mTLS, and processes that are there.

use std::time::Instant;

use spillway_core::drill::Act;
use spillway_core::units::Name;
use spillway_runtime::settings::parse;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::drill::injector::{Injectors, RemoteError};
use crate::drill::place::{Breakers, Server as At};
use crate::drill::support::{Domain, place_of};
use crate::injector::Fault;

struct Machine {
    at: At,
    drain: Drain,
    link: SocketAddr,
    _task: JoinSet<()>,
}

impl Machine {
    /// With one process, `REGION/gateway-0`, and a link to `target` of that name.
    async fn start(domain: &Domain, region: &str, target: SocketAddr) -> Self {
        let identity = domain.identity(&format!("region/{region}/injector/rack-1"));
        let pid = pid_file(domain, region);
        let link = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let text = format!(
            "region: {region}\nname: rack-1\n\
             identity: {{certificate: '{}', key: '{}', trustBundle: '{}'}}\nlisten: 127.0.0.1:0\noperators: [alice]\n\
             processes:\n  - {{name: {region}/gateway-0, pidFile: '{pid}', start: [sh, -c, 'echo $$ > {pid}; exec sleep 60']}}\n\
             links:\n  - {{name: {region}/gateway-0, listen: '{link}', to: '{target}'}}\naudit: '{}'\n",
            identity.certificate.display(),
            identity.key.display(),
            identity.trust_bundle.display(),
            domain.folder.path().join(format!("{region}.audit.log")).display()
        );
        let drain = Drain::new(Duration::from_secs(1));
        let node = InjectorNode::bind(parse(&text).unwrap(), drain.clone()).await.unwrap();
        let at = At { name: region.into(), address: node.address().to_string(), id: node.workload.id() };
        // As its supervisor would.
        let host = Host::new(node.settings.processes.clone(), Default::default());
        host.start(&format!("{region}/gateway-0")).unwrap();
        until(|| running(domain, region).is_some()).await;
        let mut task = JoinSet::new();
        task.spawn(node.serve());
        Self { at, drain, link, _task: task }
    }
}

fn pid_file(domain: &Domain, region: &str) -> String {
    domain.folder.path().join(format!("{region}.pid")).display().to_string()
}

fn running(domain: &Domain, region: &str) -> Option<u32> {
    let pid: u32 = std::fs::read_to_string(pid_file(domain, region)).ok()?.trim().parse().ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    (!stat.contains(") Z ")).then_some(pid)
}

async fn until(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn fault(act: Act, on: &[&str]) -> Fault {
    Fault { act, on: on.iter().map(|name| (*name).to_owned()).collect(), from: Vec::new() }
}

async fn is_open(link: SocketAddr) -> bool {
    let Ok(stream) = TcpStream::connect(link).await else { return false };
    let mut byte = [0];
    // The server says something to everybody.
    matches!(stream.peek(&mut byte).await, Ok(1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drill_breaks_processes_of_two_machines_and_only_for_operators_that_are_named() {
    let domain = Domain::create();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            stream.writable().await.unwrap();
            stream.try_write(b"!").unwrap();
            open.push(stream);
        }
    });
    let (eu, us) = (Machine::start(&domain, "eu", target).await, Machine::start(&domain, "us", target).await);
    let mut place = place_of(&domain, domain.identity("operator/bob"));
    place.injectors = Breakers::Nodes(vec![eu.at.clone(), us.at.clone()]);
    let bob = Injectors::open(&place).await.unwrap();
    assert!(matches!(bob.reach().await, Err(RemoteError::Failed(why)) if why.contains("do not name")));
    place.operator = domain.identity("region/eu/control/c-0");
    let control = Injectors::open(&place).await.unwrap();
    assert!(control.reach().await.is_err(), "who leads the fleet may not for that reason break it");

    place.operator = domain.identity("operator/alice");
    let alice = Injectors::open(&place).await.unwrap();
    let reach = alice.reach().await.unwrap();
    assert_eq!((&reach.processes, reach.links.len()), (&vec!["eu/gateway-0".to_owned(), "us/gateway-0".into()], 2));
    let before = ["eu", "us"].map(|region| running(&domain, region).unwrap());
    assert!(is_open(eu.link).await && is_open(us.link).await);
    let faults = [fault(Act::Kill, &["eu/gateway-0", "us/gateway-0"]), fault(Act::Refuse, &["us/gateway-0"])];
    alice.inject(7, "two-machines", &faults).await.unwrap();
    until(|| running(&domain, "eu").is_none() && running(&domain, "us").is_none()).await;
    assert!(is_open(eu.link).await && !is_open(us.link).await, "each link is its own");
    alice.renew(7).await.unwrap();
    assert_eq!(alice.reach().await.unwrap().drills, ["two-machines", "two-machines"]);
    alice.remove(7).await.unwrap();
    let other = |at: usize| running(&domain, ["eu", "us"][at]).filter(|pid| *pid != before[at]);
    until(|| other(0).is_some() && other(1).is_some()).await;
    assert!(is_open(us.link).await);

    let killed = running(&domain, "eu");
    // Whole or not at all: the other one is told to take its part away.
    let unknown = Fault { from: vec!["ap/gateway-0".into()], ..fault(Act::Drop, &["us/gateway-0"]) };
    let refused = alice.inject(8, "half", &[fault(Act::Kill, &["eu/gateway-0"]), unknown]).await.unwrap_err();
    assert!(refused.to_string().contains("there is no caller 'ap/gateway-0'"), "{refused}");
    until(|| running(&domain, "eu").is_some_and(|pid| Some(pid) != killed)).await;
    assert_eq!(alice.reach().await.unwrap().drills, [""; 0]);

    // An injector that ends leaves nothing broken.
    let paused = fault(Act::Pause, &["eu/gateway-0"]);
    alice.inject(9, "paused", &[paused]).await.unwrap();
    let state = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let pid = running(&domain, "eu").unwrap();
    until(|| state(pid).contains(") T ")).await;
    eu.drain.stop();
    until(|| state(pid).contains(") S ")).await;
    let log = domain.folder.path().join("eu.audit.log");
    until(|| std::fs::read_to_string(&log).unwrap_or_default().contains("\"event\":\"stopped\"")).await;
    let audited = std::fs::read_to_string(&log).unwrap();
    assert!(audited.contains("two-machines") && audited.contains("operator/alice"), "{audited}");
    assert!(audited.contains("not-an-operator") && audited.contains("operator/bob"), "{audited}");
    for region in ["eu", "us"] {
        let pid = i32::try_from(running(&domain, region).unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

#[tokio::test]
async fn an_injector_has_an_identity_of_its_own() {
    let domain = Domain::create();
    let identity = domain.identity("region/eu/gateway/rack-1");
    let settings = InjectorSettings {
        region: Name::parse("eu").unwrap(),
        name: Name::parse("rack-1").unwrap(),
        identity,
        renew: None,
        listen: "127.0.0.1:0".parse().unwrap(),
        operators: Operators::Any,
        processes: Default::default(),
        links: Default::default(),
        callers: Default::default(),
        audit: None,
        drain_timeout: Duration::from_secs(1),
    };
    let refused = InjectorNode::bind(settings, Drain::new(Duration::ZERO)).await.err().unwrap();
    assert!(refused.to_string().contains("/region/eu/injector/rack-1"), "{refused}");
}
