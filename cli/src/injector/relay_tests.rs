use super::super::tests::Doubles;
use super::*;

const PATIENCE: Duration = Duration::from_secs(5);

/// A server that gives back what it gets, behind a link `eu/gateway`.
async fn echo() -> (Arc<Links>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    let links = Links::new(Arc::new(Doubles::default()));
    let address = links.add("eu/gateway", "127.0.0.1:0".parse().unwrap(), target).await.unwrap();
    (links, address)
}

async fn round(stream: &mut TcpStream, text: &[u8]) -> io::Result<Duration> {
    let began = Instant::now();
    stream.write_all(text).await?;
    let mut back = vec![0; text.len()];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut back)).await??;
    assert_eq!(back, text);
    Ok(began.elapsed())
}

fn rule(mode: Mode) -> Rule {
    Rule { mode, from: Vec::new() }
}

#[tokio::test]
async fn a_link_without_rules_changes_nothing() {
    let (_links, address) = echo().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let large: Vec<u8> = (0..3_000_000_u32).map(|number| number as u8).collect();
    let (mut from, mut to) = stream.split();
    let mut back = Vec::new();
    let write = async {
        to.write_all(&large).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let (_, read) = tokio::join!(write, from.read_to_end(&mut back));
    read.expect("an end, not a reset");
    assert!(back == large);
}

#[tokio::test]
async fn a_refused_link_resets_open_and_new_connections() {
    let (links, address) = echo().await;
    let mut open = TcpStream::connect(address).await.unwrap();
    round(&mut open, b"before").await.unwrap();
    links.add_rule("eu/gateway", rule(Mode::Refuse));
    let error = tokio::time::timeout(PATIENCE, open.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The kernel takes it before it is reset, and may tell of that at any step.
    let new = async {
        let mut stream = TcpStream::connect(address).await?;
        round(&mut stream, b"new").await
    };
    let kind = new.await.unwrap_err().kind();
    assert!(matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{kind:?}");
    links.clear();
    round(&mut TcpStream::connect(address).await.unwrap(), b"after").await.unwrap();
}

#[tokio::test]
async fn a_slow_link_delays_each_direction() {
    let (links, address) = echo().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    links.add_rule("eu/gateway", rule(Mode::Delay(Duration::from_millis(100))));
    // The rule is felt as soon as the link has heard of it.
    while round(&mut stream, b"slow").await.unwrap() < Duration::from_millis(190) {}
    let took = round(&mut stream, b"slow").await.unwrap();
    assert!(took >= Duration::from_millis(200), "{took:?}");
}

#[tokio::test]
async fn a_silent_link_gives_on_what_it_held_back() {
    let (links, address) = echo().await;
    let mut open = TcpStream::connect(address).await.unwrap();
    round(&mut open, b"before").await.unwrap();
    links.add_rule("eu/gateway", rule(Mode::Drop));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut new = TcpStream::connect(address).await.expect("the kernel takes it");
    for stream in [&mut open, &mut new] {
        stream.write_all(b"held").await.unwrap();
        let heard = tokio::time::timeout(Duration::from_millis(200), stream.read_u8()).await;
        assert!(heard.is_err(), "nothing comes: {heard:?}");
    }
    links.clear();
    for stream in [&mut open, &mut new] {
        let mut back = [0; 4];
        tokio::time::timeout(PATIENCE, stream.read_exact(&mut back)).await.unwrap().unwrap();
        assert_eq!(&back, b"held");
    }
}

#[tokio::test]
async fn a_rule_for_some_processes_leaves_all_others_alone() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"!").await;
        }
    });
    let doubles = Arc::new(Doubles::default());
    doubles.run("us/gateway", std::process::id());
    let links = Links::new(doubles.clone());
    let address = links.add("eu/gateway", "127.0.0.1:0".parse().unwrap(), target).await.unwrap();
    let from = |name: &str| Rule { mode: Mode::Drop, from: vec![name.to_owned()] };
    links.add_rule("eu/gateway", from("ap/gateway"));
    let mut ours = TcpStream::connect(address).await.unwrap();
    let heard = tokio::time::timeout(PATIENCE, ours.read_u8()).await.unwrap();
    assert_eq!(heard.unwrap(), b'!', "we are not ap/gateway");
    links.add_rule("eu/gateway", from("us/gateway"));
    let mut ours = TcpStream::connect(address).await.unwrap();
    let heard = tokio::time::timeout(Duration::from_millis(300), ours.read_u8()).await;
    assert!(heard.is_err(), "we are us/gateway");
    links.clear();
    assert_eq!(tokio::time::timeout(PATIENCE, ours.read_u8()).await.unwrap().unwrap(), b'!');
}

#[tokio::test]
async fn the_end_of_the_process_is_the_end_of_its_connections() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    let links = Links::new(Arc::new(Doubles::default()));
    let address = links.add("eu/gateway", "127.0.0.1:0".parse().unwrap(), target).await.unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop((server, listener));
    let error = tokio::time::timeout(PATIENCE, client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "a reset stays a reset");
    let mut client = TcpStream::connect(address).await.unwrap();
    let error = tokio::time::timeout(PATIENCE, client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "nobody listens any more");
}
