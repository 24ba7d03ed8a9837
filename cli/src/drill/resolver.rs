//! Questions to the DNS nodes, each from a client subnet (ECS, RFC 7871).
//!
//! The rule: what is asked goes out, and nothing is cached here. An answer counts only if it is to the question.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::{ClientSubnet, EdnsOption};
use hickory_proto::rr::{Name, RData, RecordType};
use spillway_core::units::DnsName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// Of one question to one node.
const PATIENCE: Duration = Duration::from_secs(1);
/// As clients' resolvers take (DNS flag day 2020).
const MOST_BYTES: u16 = 1_232;

/// The DNS nodes of a service.
#[derive(Clone, Debug)]
pub struct Resolver {
    servers: Vec<SocketAddr>,
    name: Name,
}

/// Addresses, in the order of the answer, and how long they may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub addresses: Vec<IpAddr>,
    pub ttl: Duration,
}

/// Why there is no answer, of the last node that was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("the DNS node cannot be reached")]
    Link(#[from] std::io::Error),
    #[error("the DNS node does not answer")]
    Silent,
    #[error("the DNS node says {0}")]
    Code(ResponseCode),
    #[error("the DNS node answers something else")]
    Malformed,
    #[error("the name has no address")]
    Empty,
}

impl Resolver {
    /// Servers in the order in which they are asked; at least one.
    pub fn new(servers: Vec<SocketAddr>, name: &DnsName) -> Result<Self, AskError> {
        let name = Name::from_ascii(format!("{name}.")).map_err(|_| AskError::Malformed)?;
        Ok(Self { servers, name })
    }

    /// What clients in the /24 of `subnet` are told. One node after the other is asked; `first` says with which to
    /// begin, so that many clients spread.
    pub async fn ask(&self, subnet: Ipv4Addr, first: usize) -> Result<Answer, AskError> {
        let mut failed = AskError::Silent;
        for turn in 0..self.servers.len() {
            let place = (first + turn) % self.servers.len();
            let Some(server) = self.servers.get(place) else { break };
            match tokio::time::timeout(PATIENCE, self.exchange(*server, subnet)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(problem)) => failed = problem,
                Err(_) => failed = AskError::Silent,
            }
        }
        Err(failed)
    }

    async fn exchange(&self, server: SocketAddr, subnet: Ipv4Addr) -> Result<Answer, AskError> {
        let mut question = Message::new(rand::random(), MessageType::Query, OpCode::Query);
        question.add_query(Query::query(self.name.clone(), RecordType::A));
        let mut edns = Edns::new();
        edns.set_max_payload(MOST_BYTES);
        edns.options_mut().insert(EdnsOption::Subnet(ClientSubnet::new(subnet.into(), 24, 0)));
        question.set_edns(edns);
        let bytes = question.to_vec().map_err(|_| AskError::Malformed)?;
        let answer = over_udp(server, &bytes, &question).await?;
        let answer = if answer.metadata.truncation { over_tcp(server, &bytes, &question).await? } else { answer };
        read(&answer)
    }
}

async fn over_udp(server: SocketAddr, question: &[u8], asked: &Message) -> Result<Message, AskError> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    // Only from there are answers heard.
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = [0; MOST_BYTES as usize];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = Message::from_vec(buffer.get(..length).unwrap_or_default());
        // What is not an answer to this question may be anybody's; the right one may still come.
        if let Some(answer) = answer.ok().filter(|answer| is_to(answer, asked)) {
            return Ok(answer);
        }
    }
}

async fn over_tcp(server: SocketAddr, question: &[u8], asked: &Message) -> Result<Message, AskError> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(|_| AskError::Malformed)?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Message::from_vec(&answer).ok().filter(|answer| is_to(answer, asked)).ok_or(AskError::Malformed)
}

fn is_to(answer: &Message, asked: &Message) -> bool {
    answer.metadata.id == asked.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && answer.queries == asked.queries
}

fn read(answer: &Message) -> Result<Answer, AskError> {
    if answer.metadata.response_code != ResponseCode::NoError {
        return Err(AskError::Code(answer.metadata.response_code));
    }
    let (mut addresses, mut ttl) = (Vec::new(), u32::MAX);
    for record in &answer.answers {
        if let RData::A(address) = &record.data {
            addresses.push(address.0.into());
            ttl = ttl.min(record.ttl);
        }
    }
    if addresses.is_empty() {
        return Err(AskError::Empty);
    }
    Ok(Answer { addresses, ttl: Duration::from_secs(ttl.into()) })
}

/// The subnet of a client: one of the 16,384 /24 of the shared address space (RFC 6598), which no real client has.
pub fn subnet_of(client: u32) -> Ipv4Addr {
    let number = client % 16_384;
    Ipv4Addr::from_bits(u32::from_be_bytes([100, 64, 0, 0]) + (number << 8))
}

#[cfg(test)]
#[path = "resolver_tests.rs"]
mod tests;
