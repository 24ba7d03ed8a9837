//! A control node that writes its plan to moto's Route 53.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_sdk_route53::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_route53::{Client, Config};
use aws_smithy_http_client::Builder;
use tokio::process::{Child, Command};

use crate::support::{Domain, apply, eventually};

/// A server with one hosted zone; killed when dropped.
struct Moto {
    _server: Child,
    endpoint: String,
    client: Client,
    zone: String,
}

impl Moto {
    async fn start() -> Option<Self> {
        let tools = std::env::var_os("SPILLWAY_TOOLS")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.tools"), PathBuf::from);
        let program = tools.join("moto/bin/moto_server");
        if !program.exists() {
            assert!(std::env::var_os("CI").is_none(), "moto is not here: tests/servers/install.sh moto");
            eprintln!("SKIPPED: moto is not here: tests/servers/install.sh moto");
            return None;
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(Instant::now() < until, "moto does not listen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let endpoint = format!("http://127.0.0.1:{port}");
        let config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .credentials_provider(Credentials::new("test", "test", None, None, "test"))
            .endpoint_url(&endpoint)
            .http_client(Builder::new().build_http());
        let client = Client::from_conf(config.build());
        let created = client.create_hosted_zone().name("example.com.").caller_reference("test").send().await.unwrap();
        let zone = created.hosted_zone().unwrap().id().trim_start_matches("/hostedzone/").to_owned();
        Some(Self { _server: server, endpoint, client, zone })
    }

    /// Region, value and weight of each record, but those of the zone itself.
    async fn records(&self) -> Vec<(String, String, i64)> {
        let listed = self.client.list_resource_record_sets().hosted_zone_id(&self.zone).send().await.unwrap();
        let sets = listed.resource_record_sets().iter().filter(|set| set.name() != "example.com.");
        let record = |set: &aws_sdk_route53::types::ResourceRecordSet| {
            let value = set.resource_records()[0].value().to_owned();
            (set.set_identifier().unwrap_or(set.name()).to_owned(), value, set.weight().unwrap_or(-1))
        };
        sets.map(record).collect()
    }
}

fn regions(us: u32) -> [String; 2] {
    [("eu", "127.0.0.1", 80), ("us", "127.0.0.2", us)].map(|(name, address, weight)| {
        format!(
            "---\napiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test, \
             weight: {weight}, gateways: [{{name: g, address: '{address}:1'}}]}}\n"
        )
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_writes_its_plan_by_its_settings() {
    let Some(moto) = Moto::start().await else { return };
    let domain = Domain::create();
    let keys = domain.path("aws");
    std::fs::write(&keys, "[default]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
    let store = format!(
        "sqlite: {}\nroute53: {{hostedZone: {}, name: infer.example.com, endpoint: '{}', credentials: {{file: '{}'}}}}",
        domain.path("control.db").display(),
        moto.zone,
        moto.endpoint,
        keys.display()
    );
    let node = domain.node("c-0", &store).await;
    let epoch = node.parts.leading.fence().unwrap().epoch;
    let mut alice = domain.alice(&node).await;
    for (us, weight) in [(20, 64), (40, 128)] {
        assert_eq!(apply(&mut alice, &regions(us)).await.faults, Vec::<String>::new());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let records = moto.records().await;
            let is = |region: &str, value: &str, weight| {
                records.iter().any(|(name, found, its)| name == region && found.starts_with(value) && *its == weight)
            };
            let stamp = format!("\"epoch={epoch} plan=");
            if is("eu", "127.0.0.1", 255)
                && is("us", "127.0.0.2", weight)
                && is("_spillway.infer.example.com.", &stamp, -1)
            {
                assert_eq!(records.len(), 3, "{records:?}");
                break;
            }
            assert!(Instant::now() < deadline, "{us} is not written: {records:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let shows = |line: &str| node.parts.metrics.encode().unwrap().contains(line);
    eventually("it is counted", || shows("spillway_control_route53_corrections_total{outcome=\"corrected\"}")).await;
    node.stop().await;
}
