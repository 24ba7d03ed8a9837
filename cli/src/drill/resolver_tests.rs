use super::super::support::{Dns, SERVICE, reply, subnet};
use super::*;

fn resolver(servers: Vec<SocketAddr>) -> Resolver {
    Resolver::new(servers, &DnsName::host(SERVICE).unwrap()).unwrap()
}

/// A node whose answer is whatever a test makes of the question.
async fn node(answer: impl Fn(&Message) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2_048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            for part in answer(&Message::from_vec(&buffer[..length]).unwrap()) {
                socket.send_to(&part, from).await.unwrap();
            }
        }
    });
    address
}

#[tokio::test]
async fn each_client_asks_from_a_subnet_of_its_own() {
    let dns = Dns::start(7, |subnet| vec![Ipv4Addr::new(127, 0, 0, subnet.octets()[2])]).await;
    let resolver = resolver(vec![dns.address]);
    for client in [0, 5, 300] {
        let answer = resolver.ask(subnet_of(client), 0).await.unwrap();
        let last = u8::try_from(client % 256).unwrap();
        assert_eq!(answer.addresses, [IpAddr::from([127, 0, 0, last])]);
        assert_eq!(answer.ttl, Duration::from_secs(7));
    }
    assert_eq!(*dns.asked.lock(), [[100, 64, 0, 0], [100, 64, 5, 0], [100, 65, 44, 0]].map(Ipv4Addr::from));
}

#[tokio::test]
async fn what_answers_another_question_is_not_heard() {
    let good = |question: &Message| reply(question, 3, &[Ipv4Addr::LOCALHOST]).to_vec().unwrap();
    let address = node(move |question| {
        let mut other_id = good(question);
        other_id[0] ^= 1;
        let mut other_name = question.clone();
        other_name.queries[0].name = Name::from_ascii("other.test.").unwrap();
        vec![vec![0xff; 9], other_id, good(&other_name), good(question)]
    })
    .await;
    let answer = resolver(vec![address]).ask(subnet_of(1), 0).await.unwrap();
    assert_eq!(answer.addresses, [IpAddr::from(Ipv4Addr::LOCALHOST)]);
}

#[tokio::test]
async fn a_node_that_fails_or_is_silent_is_followed_by_the_next() {
    let refuses = node(|question| {
        let mut answer = reply(question, 3, &[]);
        answer.metadata.response_code = ResponseCode::ServFail;
        vec![answer.to_vec().unwrap()]
    })
    .await;
    let empty = node(|question| vec![reply(question, 3, &[]).to_vec().unwrap()]).await;
    let silent = node(|_| Vec::new()).await;
    let good = Dns::start(3, |_| vec![Ipv4Addr::LOCALHOST]).await;
    assert!(matches!(resolver(vec![refuses]).ask(subnet_of(1), 0).await, Err(AskError::Code(ResponseCode::ServFail))));
    assert!(matches!(resolver(vec![empty]).ask(subnet_of(1), 0).await, Err(AskError::Empty)));
    assert!(matches!(resolver(vec![silent]).ask(subnet_of(1), 0).await, Err(AskError::Silent)));
    let all = resolver(vec![refuses, silent, empty, good.address]);
    for first in 0..9 {
        assert!(all.ask(subnet_of(1), first).await.is_ok());
    }
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_asked_for_over_tcp() {
    let (udp, tcp) = loop {
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
            break (udp, tcp);
        }
    };
    let address = udp.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2_048];
        let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
        let mut answer = reply(&Message::from_vec(&buffer[..length]).unwrap(), 3, &[]);
        answer.metadata.truncation = true;
        udp.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        let (mut stream, _) = tcp.accept().await.unwrap();
        let mut question = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut question).await.unwrap();
        let question = Message::from_vec(&question).unwrap();
        assert!(subnet(&question).is_some());
        let answer = reply(&question, 3, &[Ipv4Addr::LOCALHOST; 9]).to_vec().unwrap();
        stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
        stream.write_all(&answer).await.unwrap();
    });
    assert_eq!(resolver(vec![address]).ask(subnet_of(1), 0).await.unwrap().addresses.len(), 9);
}
