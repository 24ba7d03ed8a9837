//! A DNS node is a node like all others: its first certificate comes by a token, the next ones by the one before.

use spillway_control::dns::{DnsNode, DnsSettings};
use spillway_core::resource;
use spillway_runtime::drain::Drain;
use spillway_runtime::settings::parse;
use spillway_runtime::snapshot::seal;
use spillway_runtime::tls::Workload;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::stand::{SECOND, Stand, id};

const DNS: &str = "spiffe://spillway.test/region/eu/dns/dns-0";
const REGION: &str = "apiVersion: spillway/v1\nkind: Region\nmetadata: {name: eu}\nspec: {trustDomain: spillway.test, \
                      gateways: [{name: gw-0, address: '192.0.2.1:8443'}]}\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_node_gets_its_certificate_and_renews_it() {
    let stand = Stand::start(4 * SECOND, SECOND).await;
    let (identity, token) = stand.machine("dns-0", &stand.token(DNS).await);
    let snapshot = stand.folder.path().join("snapshot.bin");
    std::fs::write(&snapshot, seal(&resource::parse(REGION).unwrap(), 1)).unwrap();
    let text = format!(
        "region: eu\nnode: dns-0\nsnapshot: '{}'\nlisten: ['127.0.0.1:0']\nzone: example.com\ncontact: \
         hostmaster.example.com\nnameServers: [{{name: ns.example.com, addresses: [127.0.0.1]}}]\n\
         identity:\n  certificate: '{}'\n  key: '{}'\n  trustBundle: '{}'\n  renew:\n    servers: ['{}']\n    \
         bootstrap: {{servers: ['{}'], token: '{}'}}\n",
        snapshot.display(),
        identity.certificate.display(),
        identity.key.display(),
        identity.trust_bundle.display(),
        stand.port.address,
        stand.newcomers,
        token.display(),
    );
    let settings: DnsSettings = parse(&text).unwrap();
    let drain = Drain::new(SECOND);
    let node = DnsNode::bind(settings, drain.clone()).await.unwrap();
    let admin = node.addresses().admin;
    let served = tokio::spawn(node.serve());
    let first = Workload::load(&identity).unwrap();
    assert_eq!(first.id(), id(DNS));
    let renewed = async || {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.contains("spillway_identity_renewals_total{outcome=\"renewed\"} 2\n")
    };
    let deadline = tokio::time::Instant::now() + 30 * SECOND;
    while !renewed().await {
        assert!(tokio::time::Instant::now() < deadline, "it has not renewed twice");
        tokio::time::sleep(SECOND / 20).await;
    }
    assert!(Workload::load(&identity).unwrap().life().not_after > first.life().not_after);
    drain.start();
    tokio::time::timeout(10 * SECOND, served).await.unwrap().unwrap();
}
