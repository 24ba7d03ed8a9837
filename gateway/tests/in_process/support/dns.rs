//! A DNS server that says what a test wants said, over UDP and TCP.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, SRV};
use hickory_resolver::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// How questions are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Answers,
    /// Over UDP it says that the answer does not fit.
    Truncates,
    ServFail,
    NxDomain,
    /// Answers without records.
    Empty,
    Silent,
    /// What is no DNS message, what answers another question, and a message that breaks off.
    Garbage,
}

pub struct Dns {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    tasks: JoinSet<()>,
}

struct State {
    mood: Mood,
    records: Vec<Record>,
    /// Goes with answers to SRV questions.
    beside: Vec<Record>,
    asked: Vec<(Instant, RecordType)>,
}

impl Dns {
    pub async fn start() -> Self {
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            // A port that is free over TCP may be in use over UDP.
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = tcp.local_addr().unwrap();
        let state = State { mood: Mood::Answers, records: Vec::new(), beside: Vec::new(), asked: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, state.clone()));
        tasks.spawn(serve_tcp(tcp, state.clone()));
        Self { address, state, tasks }
    }

    /// Lines of a gateway's settings.
    pub fn settings(&self) -> String {
        format!("dns: {{ servers: ['{}'], timeout: 300ms }}", self.address)
    }

    pub fn mood(&self, mood: Mood) {
        self.state.lock().mood = mood;
    }

    /// Replaces all records.
    pub fn say(&self, records: Vec<Record>) {
        self.state.lock().records = records;
    }

    /// Replaces what goes beside SRV records.
    pub fn say_beside(&self, records: Vec<Record>) {
        self.state.lock().beside = records;
    }

    /// When records of this type were asked for, over UDP.
    pub fn asked(&self, kind: RecordType) -> Vec<Instant> {
        self.state.lock().asked.iter().filter(|(_, asked)| *asked == kind).map(|(at, _)| *at).collect()
    }

    /// The port refuses from now on.
    pub async fn kill(&mut self) {
        self.tasks.shutdown().await;
    }
}

pub fn address(name: &str, ttl: u32, address: &str) -> Record {
    let data = match address.parse().unwrap() {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
}

pub fn alias(name: &str, ttl: u32, other: &str) -> Record {
    Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, RData::CNAME(CNAME(Name::from_ascii(other).unwrap())))
}

pub fn service(name: &str, ttl: u32, priority: u16, target: &str, port: u16) -> Record {
    let srv = SRV::new(priority, 10, port, Name::from_ascii(target).unwrap());
    Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, RData::SRV(srv))
}

async fn serve_udp(socket: UdpSocket, state: Arc<Mutex<State>>) {
    let mut buffer = [0; 4_096];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        for answer in answers(&state, &buffer[..length], false) {
            socket.send_to(&answer, from).await.unwrap();
        }
    }
}

async fn serve_tcp(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        connections.spawn(serve_stream(stream, state.clone()));
    }
}

async fn serve_stream(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    while let Ok(length) = stream.read_u16().await {
        let mut question = vec![0; length.into()];
        if stream.read_exact(&mut question).await.is_err() {
            return;
        }
        for answer in answers(&state, &question, true) {
            let length = u16::try_from(answer.len()).unwrap();
            if stream.write_u16(length).await.is_err() || stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

fn answers(state: &Mutex<State>, question: &[u8], tcp: bool) -> Vec<Vec<u8>> {
    let question = Message::from_vec(question).unwrap();
    let query = question.queries[0].clone();
    let mut state = state.lock();
    if !tcp {
        state.asked.push((Instant::now(), query.query_type()));
    }
    let mut answer = Message::new(question.id, MessageType::Response, OpCode::Query);
    answer.add_query(query.clone());
    match state.mood {
        Mood::Silent => return Vec::new(),
        Mood::ServFail => answer.metadata.response_code = ResponseCode::ServFail,
        Mood::NxDomain => answer.metadata.response_code = ResponseCode::NXDomain,
        Mood::Empty => {}
        Mood::Truncates if !tcp => answer.metadata.truncation = true,
        Mood::Answers | Mood::Truncates => {
            let mut known = false;
            let mut name = query.name().clone();
            for record in &state.records {
                if record.name == name {
                    known = true;
                    if let RData::CNAME(other) = &record.data {
                        name = other.0.clone();
                        answer.add_answer(record.clone());
                    } else if record.record_type() == query.query_type() {
                        answer.add_answer(record.clone());
                    }
                }
            }
            if query.query_type() == RecordType::SRV {
                answer.add_additionals(state.beside.clone());
            }
            if !known {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
        }
        Mood::Garbage => {
            let mut other = Message::new(question.id, MessageType::Response, OpCode::Query);
            other.add_query(Query::query(Name::from_ascii("other.test.").unwrap(), query.query_type()));
            other.add_answer(address("other.test.", 1, "127.0.0.9"));
            let mut foreign = answer.clone();
            let mut record = address(&query.name().to_ascii(), 1, "127.0.0.9");
            record.dns_class = DNSClass::CH;
            foreign.add_answer(record);
            let mut broken = foreign.to_vec().unwrap();
            broken.truncate(broken.len() - 3);
            let id = question.id.to_be_bytes();
            let wrong_id = [&(question.id ^ 1).to_be_bytes(), &broken[2..]].concat();
            return vec![vec![0xff], wrong_id, [&id[..], &[0xff; 40]].concat(), other.to_vec().unwrap(), broken];
        }
    }
    vec![answer.to_vec().unwrap()]
}
