use std::net::Ipv4Addr;

use parking_lot::Mutex;
use spillway_core::units::DnsName;

use super::super::support::{Dns, Domain, Gateway, Mood, SERVICE};
use super::*;

struct Stand {
    _domain: Domain,
    one: Gateway,
    two: Gateway,
    dns: Dns,
    /// What DNS says.
    says: Arc<Mutex<Vec<Ipv4Addr>>>,
    client: Client,
}

/// Two gateways at addresses of their own, and one client.
async fn stand(addresses: [Ipv4Addr; 2], ttl: u32) -> Stand {
    let domain = Domain::create();
    let one = Gateway::start(&domain, "eu", SocketAddr::new(addresses[0].into(), 0)).await;
    let port = one.address.port();
    let two = Gateway::start(&domain, "us", SocketAddr::new(addresses[1].into(), port)).await;
    let says = Arc::new(Mutex::new(addresses.to_vec()));
    let said = says.clone();
    let dns = Dns::start(ttl, move |_| said.lock().clone()).await;
    let regions = [(addresses[0], "eu"), (addresses[1], "us")];
    let regions = regions.map(|(address, region)| (address.into(), Name::parse(region).unwrap()));
    let load = Load { deadline: Duration::from_secs(2), interval: Duration::from_millis(50), ..Load::default() };
    let world = World {
        began: Instant::now(),
        load,
        resolver: Resolver::new(vec![dns.address], &DnsName::host(SERVICE).unwrap()).unwrap(),
        port,
        server_name: ServerName::try_from("localhost").unwrap(),
        tls: tls(&domain.identity("tenant/acme/client/drill")).unwrap(),
        model: "phishing".into(),
        entity: "site-0001".into(),
        regions: regions.into(),
    };
    let client = Client { number: 3, world: Arc::new(world), answer: None, connection: None };
    Stand { _domain: domain, one, two, dns, says, client }
}

fn by(region: &str) -> Result<Served, Failure> {
    Ok(Served { region: Some(Name::parse(region).unwrap()) })
}

#[tokio::test]
async fn the_first_address_is_asked_on_one_connection_and_dns_once_in_a_ttl() {
    let mut stand = stand([[127, 82, 1, 1], [127, 82, 1, 2]].map(Ipv4Addr::from), 60).await;
    let began = Instant::now();
    for _ in 0..3 {
        let request = stand.client.request().await;
        assert_eq!((request.outcome, request.retries), (by("eu"), 0));
        assert_eq!(request.first.unwrap().as_str(), "eu");
    }
    assert_eq!(stand.dns.asked.lock().len(), 1);
    stand.says.lock().reverse();
    let (_, until) = stand.client.answer.as_mut().unwrap();
    assert!((began..=Instant::now()).contains(&(*until - Duration::from_secs(60))));
    *until = Instant::now();
    assert_eq!(stand.client.request().await.outcome, by("us"), "the TTL is over");
    assert_eq!((*stand.one.asked.lock(), *stand.two.asked.lock(), stand.dns.asked.lock().len()), (3, 1, 2));
}

#[tokio::test]
async fn a_gateway_that_died_costs_a_retry_at_the_next_address() {
    let mut stand = stand([[127, 82, 2, 1], [127, 82, 2, 2]].map(Ipv4Addr::from), 60).await;
    assert_eq!(stand.client.request().await.outcome, by("eu"));
    stand.one.kill().await;
    let request = stand.client.request().await;
    assert_eq!((request.outcome, request.retries), (by("us"), 1));
    assert_eq!(request.first.unwrap().as_str(), "eu", "as long as the TTL lasts, it is asked first");
    stand.two.kill().await;
    let request = stand.client.request().await;
    assert_eq!((request.outcome, request.retries), (Err(Failure::Unreachable), 2));
}

#[tokio::test]
async fn a_silent_gateway_leaves_time_for_the_next() {
    let mut stand = stand([[127, 82, 3, 1], [127, 82, 3, 2]].map(Ipv4Addr::from), 60).await;
    *stand.one.mood.lock() = Mood::Silent;
    let request = stand.client.request().await;
    assert_eq!((request.outcome, request.retries), (by("us"), 1));
    assert!(request.took < Duration::from_millis(1_500), "{:?}", request.took);
    *stand.two.mood.lock() = Mood::Silent;
    let request = stand.client.request().await;
    assert_eq!(request.outcome, Err(Failure::TimedOut));
    assert!(request.took < Duration::from_millis(2_500), "within its deadline: {:?}", request.took);
}

#[tokio::test]
async fn each_answer_has_its_kind_and_what_is_refused_for_good_is_not_tried_again() {
    let mut stand = stand([[127, 82, 4, 1], [127, 82, 4, 2]].map(Ipv4Addr::from), 60).await;
    for (status, failure, attempts) in [
        (400, Failure::Rejected, 1),
        (403, Failure::Rejected, 1),
        (503, Failure::Overloaded, 3),
        (500, Failure::Failed, 3),
        (504, Failure::TimedOut, 3),
    ] {
        let before = *stand.one.asked.lock() + *stand.two.asked.lock();
        for gateway in [&stand.one, &stand.two] {
            *gateway.mood.lock() = Mood::Says(StatusCode::from_u16(status).unwrap());
        }
        assert_eq!(stand.client.request().await.outcome, Err(failure), "{status}");
        assert_eq!(*stand.one.asked.lock() + *stand.two.asked.lock() - before, attempts, "{status}");
    }
    *stand.two.mood.lock() = Mood::Serves;
    assert_eq!(stand.client.request().await.outcome, by("us"));
}

#[tokio::test]
async fn a_name_without_an_answer_is_unresolved_and_one_that_had_an_answer_keeps_it() {
    let mut stand = stand([[127, 82, 5, 1], [127, 82, 5, 2]].map(Ipv4Addr::from), 0).await;
    let addresses = std::mem::take(&mut *stand.says.lock());
    let request = stand.client.request().await;
    assert_eq!((request.outcome, request.first), (Err(Failure::Unresolved), None));
    *stand.says.lock() = addresses;
    assert_eq!(stand.client.request().await.outcome, by("eu"));
    stand.says.lock().clear();
    assert_eq!(stand.client.request().await.outcome, by("eu"), "the last answer is better than none");
}

#[tokio::test]
async fn a_client_sends_until_nobody_listens() {
    let stand = stand([[127, 82, 6, 1], [127, 82, 6, 2]].map(Ipv4Addr::from), 60).await;
    let (requests, mut request) = mpsc::channel(1);
    let client = tokio::spawn(run(7, stand.client.world.clone(), requests));
    for _ in 0..3 {
        let request = request.recv().await.unwrap();
        assert_eq!((request.client, request.class), (7, Class::Normal));
    }
    drop(request);
    timeout(Duration::from_secs(5), client).await.unwrap().unwrap();
}

#[test]
fn of_ten_clients_each_class_has_its_part() {
    let count = |class| (0..10).filter(|client| class_of(*client) == class).count();
    assert_eq!(Class::ALL.map(count), [1, 2, 5, 2]);
}
