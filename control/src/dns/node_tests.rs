use std::path::Path;

use hickory_proto::rr::RecordType;
use prost::Message as _;
use spillway_core::failover::{Plan, Region, Traffic};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resource::parse;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::link::ControlSettings;
use spillway_runtime::plan::Published;
use spillway_runtime::settings;
use spillway_runtime::snapshot::seal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::*;
use crate::dns::fixture::Ask;

const WAIT: Duration = Duration::from_secs(10);

/// A folder with identity and snapshot, and the settings that name them.
fn folder(node: &str) -> (tempfile::TempDir, DnsSettings) {
    spillway_runtime::tls::install_provider();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let id = SpiffeId::parse(&format!("spiffe://spillway.test/region/eu-west/dns/{node}")).unwrap();
    let leaf = authority.issue(&LeafRequest::new(id, Duration::from_secs(3_600))).unwrap();
    leaf.save(at("leaf.pem"), at("leaf.key")).unwrap();
    std::fs::write(at("bundle.pem"), authority.trust_bundle()).unwrap();
    write_snapshot(&at("snapshot.bin"), 1, "192.0.2.1:8443");
    let text = format!(
        "region: eu-west\nnode: dns-0\nidentity: {{certificate: {0}/leaf.pem, key: {0}/leaf.key, trustBundle: \
         {0}/bundle.pem}}\nsnapshot: {0}/snapshot.bin\nlisten: ['127.0.0.1:0']\nzone: infer.example.com\ncontact: \
         hostmaster.example.com\nnameServers: [{{name: ns1.infer.example.com, addresses: [127.0.0.1]}}]\n",
        folder.path().display()
    );
    (folder, settings::parse(&text).unwrap())
}

fn write_snapshot(path: &Path, version: u64, gateway: &str) {
    let text = format!(
        "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: eu-west}}\nspec: {{trustDomain: spillway.test, \
         gateways: [{{name: gw-0, address: '{gateway}'}}]}}\n"
    );
    let staged = path.with_extension("new");
    std::fs::write(&staged, seal(&parse(&text).unwrap(), version)).unwrap();
    std::fs::rename(staged, path).unwrap();
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn addresses_at(server: SocketAddr) -> Vec<String> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&Ask::of("infer.example.com.", RecordType::A).bytes(), server).await.unwrap();
    let mut answer = [0; 1_232];
    let length = timeout(WAIT, socket.recv(&mut answer)).await.unwrap().unwrap();
    let message = hickory_proto::op::Message::from_vec(&answer[..length]).unwrap();
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn a_node_answers_its_snapshot_follows_it_and_shows_what_it_does() {
    let (folder, settings) = folder("dns-0");
    let drain = Drain::new(Duration::from_secs(1));
    let node = DnsNode::bind(settings, drain.clone()).await.unwrap();
    let addresses = node.addresses().clone();
    let served = tokio::spawn(node.serve());
    assert_eq!(addresses_at(addresses.dns[0]).await, ["192.0.2.1"]);
    assert!(get(addresses.admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    let config = get(addresses.admin, "/config").await;
    for expected in ["\"zone\":\"infer.example.com\"", "\"planned\":1.0", "\"answered\":1.0", "\"standing\":\"steady\""]
    {
        assert!(config.contains(expected), "{expected} in {config}");
    }
    let metrics = get(addresses.admin, "/metrics").await;
    for expected in [
        "spillway_dns_queries_total{type=\"A\",rcode=\"noerror\"} 1\n",
        "spillway_dns_region_answers_total{region=\"eu-west\"} 1\n",
        "spillway_dns_answer_seconds_count 1\n",
        "spillway_dns_serial 1\n",
    ] {
        assert!(metrics.contains(expected), "{expected} in {metrics}");
    }
    write_snapshot(&folder.path().join("snapshot.bin"), 2, "192.0.2.2:8443");
    timeout(WAIT, async {
        while addresses_at(addresses.dns[0]).await != ["192.0.2.2"] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    drain.start();
    timeout(WAIT, served).await.unwrap().unwrap();
}

/// What an earlier run took from the control plane, which is gone now.
#[tokio::test]
async fn t66_a_node_that_starts_without_its_control_plane_answers_the_plan_that_it_kept() {
    let (folder, mut settings) = folder("dns-0");
    settings.common.control = Some(ControlSettings { servers: vec!["127.0.0.1:1".into()] });
    let region = |name: &str, gateway: &str| {
        format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test, \
             gateways: [{{name: gw-0, address: '{gateway}'}}]}}\n"
        )
    };
    let text = region("eu-west", "127.0.0.2:1") + "---\n" + &region("us-east", "127.0.0.3:1");
    std::fs::write(folder.path().join("snapshot.bin"), seal(&parse(&text).unwrap(), 3)).unwrap();
    let planned = |share| Region { planned: 50.0, share, capacity: None, load: None, overridden: None };
    let (eu, us) = (Name::parse("eu-west").unwrap(), Name::parse("us-east").unwrap());
    let regions = [(eu.clone(), planned(0.0)), (us.clone(), planned(1.0))].into();
    let plan = Plan::of(41, &regions, &Traffic::default(), Duration::ZERO).unwrap();
    let standings = [(eu, (Standing::Out, "probes".into())), (us, (Standing::Steady, String::new()))].into();
    let sealed = spillway_runtime::plan::seal(&Published { epoch: 5, plan, standings });
    std::fs::write(folder.path().join("plan"), sealed.encode_to_vec()).unwrap();

    let drain = Drain::new(Duration::from_secs(1));
    let began = std::time::Instant::now();
    let node = DnsNode::bind(settings.clone(), drain.clone()).await.unwrap();
    let addresses = node.addresses().clone();
    let served = tokio::spawn(node.serve());
    for _ in 0..20 {
        assert_eq!(addresses_at(addresses.dns[0]).await, ["127.0.0.3"]);
    }
    println!("answers from disk after {:?}", began.elapsed());
    assert!(get(addresses.admin, "/config").await.contains("\"plan\":{\"version\":41}"));
    drain.start();
    timeout(WAIT, served).await.unwrap().unwrap();

    // Nothing was kept: it says that it is not ready, and nothing that is not so.
    std::fs::remove_file(folder.path().join("snapshot.bin")).unwrap();
    let drain = Drain::new(Duration::from_secs(1));
    let node = DnsNode::bind(settings, drain.clone()).await.unwrap();
    let addresses = node.addresses().clone();
    let served = tokio::spawn(node.serve());
    assert_eq!(addresses_at(addresses.dns[0]).await, [""; 0]);
    assert!(get(addresses.admin, "/readyz").await.starts_with("HTTP/1.1 503"));
    drain.start();
    timeout(WAIT, served).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_certificate_of_somebody_else_is_refused() {
    let (_folder, settings) = folder("dns-1");
    let refused = DnsNode::bind(settings, Drain::new(Duration::from_secs(1))).await.err();
    assert!(matches!(refused, Some(StartError::NotOurs { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_port_that_somebody_holds_is_said() {
    let (_folder, mut settings) = folder("dns-0");
    let held = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    settings.listen = vec![held.local_addr().unwrap()];
    let refused = DnsNode::bind(settings, Drain::new(Duration::from_secs(1))).await.err();
    assert!(matches!(refused, Some(StartError::Bind { setting: "listen", .. })), "{refused:?}");
}
