use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use spillway_core::failover::Standing;
use spillway_core::units::{Name, Rate};
use spillway_figures::{Goal, record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;
use crate::dns::fixture::{Ask, Running, name, place, unlimited, view, zone};

const WAIT: Duration = Duration::from_secs(10);
const SUBNETS: u32 = 10_000;

fn limited(rate: u64, burst: u32) -> RateLimitSettings {
    let rate = Rate { count: rate, per: Duration::from_secs(1) };
    RateLimitSettings { rate, burst, networks: 1_024, slip: 2 }
}

async fn client(from: [u8; 4], to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::from(from), 0)).await.unwrap();
    socket.connect(to).await.unwrap();
    socket
}

async fn ask(socket: &UdpSocket, message: &[u8]) -> Option<Message> {
    socket.send(message).await.unwrap();
    let mut answer = [0; 2_048];
    let length = timeout(Duration::from_millis(500), socket.recv(&mut answer)).await.ok()?.unwrap();
    Some(Message::from_vec(&answer[..length]).unwrap())
}

fn first_address(message: &Message) -> IpAddr {
    match &message.answers[0].data {
        RData::A(address) => address.0.into(),
        other => panic!("{other:?}"),
    }
}

/// Which region each of 10,000 client subnets is given, asked by UDP.
async fn regions_of_subnets(running: &Running, view: &View) -> Vec<Name> {
    let owners: BTreeMap<IpAddr, &Name> =
        view.regions.iter().flat_map(|(name, place)| place.v4.iter().map(move |address| (*address, name))).collect();
    let socket = client([127, 0, 0, 1], running.address).await;
    let mut regions = Vec::new();
    for subnet in 0..SUBNETS {
        let subnet = Ipv4Addr::from_bits(0x0b00_0000 + (subnet << 8));
        let bytes = Ask::of("infer.example.com.", RecordType::A).subnet(subnet.into(), 24).bytes();
        let message = ask(&socket, &bytes).await.expect("an answer");
        regions.push(owners[&first_address(&message)].clone());
    }
    regions
}

#[tokio::test]
async fn show_6_80_to_20_over_10_000_subnets_by_udp_and_80_to_70_moves_at_most_12_percent() {
    let running = Running::start(zone(), &unlimited(), TcpSettings::default());
    let mut view = view();
    assert!(running.server.take(view.clone()));
    let before = regions_of_subnets(&running, &view).await;
    let share = before.iter().filter(|region| **region == name("eu-west")).count() as f64 / f64::from(SUBNETS);
    view.regions.get_mut(&name("eu-west")).unwrap().weight = 70.0;
    view.regions.get_mut(&name("us-east")).unwrap().weight = 30.0;
    assert!(running.server.take(view.clone()));
    let after = regions_of_subnets(&running, &view).await;
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count() as f64 / f64::from(SUBNETS);
    let off = (share - 0.8).abs() * 100.0;
    assert!(record("control.dns.weights_80_20.off_by", off, "%", Goal::AtMost(2.0)), "{share}");
    assert!(record("control.dns.weights_80_to_70.moved", moved * 100.0, "%", Goal::AtMost(12.0)), "{moved}");
    let counted = running.server.metrics.answers();
    assert_eq!(counted.values().sum::<u64>(), 2 * u64::from(SUBNETS));
    assert_eq!(running.metric("spillway_dns_queries_total{type=\"A\",rcode=\"noerror\"}"), 2.0 * f64::from(SUBNETS));
}

#[tokio::test]
async fn a_view_is_followed_and_an_empty_one_is_not() {
    let running = Running::start(zone(), &unlimited(), TcpSettings::default());
    let socket = client([127, 0, 0, 1], running.address).await;
    let bytes = Ask::of("infer.example.com.", RecordType::A).bytes();
    assert_eq!(ask(&socket, &bytes).await.unwrap().metadata.response_code, ResponseCode::ServFail);
    assert!(!running.server.take(View::default()), "nothing to begin with");
    let one = |address: &str, standing| View {
        serial: 1,
        regions: [(name("eu-west"), place(1.0, standing, &[address]))].into(),
    };
    assert!(running.server.take(one("192.0.2.1", Standing::Steady)));
    let message = ask(&socket, &bytes).await.unwrap();
    assert_eq!((first_address(&message).to_string(), message.answers[0].ttl), ("192.0.2.1".into(), 30));
    assert!(running.server.take(one("192.0.2.2", Standing::Unsteady)));
    let message = ask(&socket, &bytes).await.unwrap();
    assert_eq!((first_address(&message).to_string(), message.answers[0].ttl), ("192.0.2.2".into(), 5));
    assert!(!running.server.take(View { serial: 2, ..View::default() }), "T66");
    assert_eq!(first_address(&ask(&socket, &bytes).await.unwrap()).to_string(), "192.0.2.2");
    assert_eq!(running.metric("spillway_dns_views_kept_total"), 1.0);
}

#[tokio::test]
async fn t68_a_network_over_its_limit_gets_half_of_the_rest_as_cut_answers_and_others_all_of_theirs() {
    let running = Running::start(zone(), &limited(1, 5), TcpSettings::default());
    running.server.take(view());
    let bytes = Ask::of("infer.example.com.", RecordType::A).bytes();
    let (greedy, other) =
        (client([127, 1, 1, 1], running.address).await, client([127, 1, 2, 1], running.address).await);
    let (mut whole, mut cut, mut none) = (0, 0, 0);
    for _ in 0..15 {
        match ask(&greedy, &bytes).await {
            Some(message) if message.metadata.truncation => {
                assert!(message.answers.is_empty());
                cut += 1;
            }
            Some(_) => whole += 1,
            None => none += 1,
        }
    }
    assert!((5..=9).contains(&whole) && cut > 0 && none > 0, "{whole} {cut} {none}");
    assert!(ask(&other, &bytes).await.is_some_and(|message| !message.answers.is_empty()));
    assert!(!by_tcp(running.address, &[&bytes]).await[0].answers.is_empty(), "by TCP it comes back");
    assert_eq!(running.metric("spillway_dns_limited_total{action=\"slipped\"}"), f64::from(cut));
    assert_eq!(running.metric("spillway_dns_limited_total{action=\"dropped\"}"), f64::from(none));
}

/// Asks all at once on one connection, and reads as many answers.
async fn by_tcp(to: SocketAddr, messages: &[&[u8]]) -> Vec<Message> {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let mut written = Vec::new();
    for message in messages {
        written.extend_from_slice(&(message.len() as u16).to_be_bytes());
        written.extend_from_slice(message);
    }
    stream.write_all(&written).await.unwrap();
    let mut answers = Vec::new();
    for _ in messages {
        let length = timeout(WAIT, stream.read_u16()).await.unwrap().unwrap();
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await.unwrap();
        answers.push(Message::from_vec(&answer).unwrap());
    }
    answers
}

#[tokio::test]
async fn queries_of_a_stream_are_answered_in_order() {
    let running = Running::start(zone(), &limited(1, 1), TcpSettings::default());
    running.server.take(view());
    let kinds = [RecordType::A, RecordType::NS, RecordType::TXT, RecordType::HTTPS].repeat(25);
    let bytes: Vec<Vec<u8>> = kinds.iter().map(|kind| Ask::of("infer.example.com.", *kind).bytes()).collect();
    let answers = by_tcp(running.address, &bytes.iter().map(Vec::as_slice).collect::<Vec<_>>()).await;
    let asked: Vec<RecordType> = answers.iter().map(|answer| answer.queries[0].query_type()).collect();
    assert_eq!(asked, kinds, "more than a datagram's limit, too");
}

/// Whether the server closes it.
async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(timeout(WAIT, stream.read(&mut [0; 1])).await.unwrap(), Ok(0) | Err(_))
}

#[tokio::test]
async fn streams_are_bounded_in_number_and_idleness() {
    let tcp = TcpSettings { connections: 2, per_network: 2, idle: Duration::from_millis(300) };
    let running = Running::start(zone(), &unlimited(), tcp);
    running.server.take(view());
    let mut first = TcpStream::connect(running.address).await.unwrap();
    let _second = TcpStream::connect(running.address).await.unwrap();
    let mut third = TcpStream::connect(running.address).await.unwrap();
    assert!(is_closed(&mut third).await, "there are two places");
    assert_eq!(running.metric("spillway_dns_connections_refused_total"), 1.0);
    assert!(is_closed(&mut first).await, "it is idle");
    for garbage in [&b"\x00\x00"[..], b"\xff\xff", b"\x00\x0b"] {
        let mut stream = loop {
            // Places come back when the others' ends are seen.
            let mut stream = TcpStream::connect(running.address).await.unwrap();
            if stream.write_all(garbage).await.is_ok() {
                break stream;
            }
        };
        assert!(is_closed(&mut stream).await, "{garbage:?} is no length of a query");
    }
}

#[tokio::test]
async fn a_drain_ends_it_and_what_had_come_is_answered() {
    let running = Running::start(zone(), &unlimited(), TcpSettings::default());
    running.server.take(view());
    let socket = client([127, 0, 0, 1], running.address).await;
    let bytes = Ask::of("infer.example.com.", RecordType::A).bytes();
    assert!(ask(&socket, &bytes).await.is_some());
    running.drain.start();
    running.drain.stop();
    let gone = timeout(WAIT, async {
        while TcpStream::connect(running.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    gone.await.unwrap();
}

#[tokio::test]
async fn messages_that_are_no_queries_of_ours_are_counted_and_not_answered() {
    let running = Running::start(zone(), &unlimited(), TcpSettings::default());
    running.server.take(view());
    let socket = client([127, 0, 0, 1], running.address).await;
    let mut response = Ask::of("infer.example.com.", RecordType::A).bytes();
    response[2] |= 0x80;
    for message in [&response[..], b"", b"x", &[0; 5_000]] {
        assert!(ask(&socket, message).await.is_none());
    }
    assert_eq!(running.metric("spillway_dns_mute_total"), 3.0);
    assert_eq!(running.metric("spillway_dns_oversized_total"), 1.0);
}
