//! moto's server (PyPI `moto[server]`) as Route 53 for tests, here and in `tests/in_process`. It comes with
//! `tests/servers/install.sh moto`.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_sdk_route53::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_route53::{Client, Config};
use aws_smithy_http_client::Builder;
use tokio::process::{Child, Command};

/// A server with one hosted zone, `example.com`; killed when dropped.
pub struct Moto {
    _server: Child,
    pub endpoint: String,
    pub client: Client,
    /// The hosted zone's id.
    pub zone: String,
}

impl Moto {
    pub async fn start() -> Self {
        let tools = std::env::var_os("SPILLWAY_TOOLS")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.tools"), PathBuf::from);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Command::new(tools.join("moto/bin/moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("moto: {error}; it comes with tests/servers/install.sh moto"));
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
        Self { _server: server, endpoint, client, zone }
    }
}
