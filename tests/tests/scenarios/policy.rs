//! Who may do what: proven by certificate on both hops, denied by default.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustls::NamedGroup;
use spillway_core::identity::TrustDomain;
use spillway_proto::inference::{ModelInferRequest, ServerLiveRequest};
use spillway_runtime::authority::Authority;
use spillway_runtime::tls::{IdentitySettings, Workload};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::doubles::Handshakes;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{Asked, INFER, cases, entity, message, scores};
use spillway_tests::harness::metrics;
use spillway_tests::harness::region::{Region, TRUST_DOMAIN, text};
use spillway_tests::harness::{eventually, ports};
use tonic::Code;

const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_policy_allows_is_denied() {
    let mut region = Region::new("policy");
    region.start().await;
    let case = &cases()[0];
    let asked = entity(&case.entity);

    let globex = region.client("globex");
    assert_eq!(globex.get("/v2/models/phishing").await.expect("an answer").status, 200);
    assert_eq!(globex.get("/v2/models/phishing/ready").await.expect("an answer").status, 200);
    let before = region.gateway_metrics().sum("spillway_gateway_rejected_total", &["reason=\"not-allowed\""]);
    let answer = globex.post(INFER, &asked).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "not-allowed"));
    assert!(answer.json()["error"].is_string());
    let answer =
        grpc::call_once(&globex, MODEL_INFER, &message(&Asked::Entity(&case.entity))).await.expect("an answer");
    assert_eq!((answer.code, answer.error_code()), (Code::PermissionDenied, "not-allowed"));
    let after = region.gateway_metrics().sum("spillway_gateway_rejected_total", &["reason=\"not-allowed\""]);
    assert_eq!(after - before, 2.0);

    region.issue("stranger", "tenant/initech/client/web", HOUR);
    let stranger = region.client("stranger");
    for path in ["/v2/models/phishing", "/v2"] {
        let answer = stranger.get(path).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "unknown-tenant"), "{path}");
    }
    assert_eq!(stranger.post(INFER, &asked).await.expect("an answer").status, 403);
    // Workloads of the region are no clients.
    for workload in ["pod-0", "gateway-0", "loader"] {
        let answer = region.client(workload).post(INFER, &asked).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "not-a-client"), "{workload}");
    }
    // What a client writes about itself changes nothing.
    let mut request = globex.json(INFER, &asked);
    for name in ["x-spillway-tenant", "x-forwarded-client-cert", "x-spiffe-id", "x_spillway_tenant"] {
        request.headers_mut().insert(name, "acme".parse().expect("a header"));
    }
    assert_eq!(globex.send(Protocol::H2, request).await.expect("an answer").status, 403);
    assert_eq!(scores(&region.client("acme").post(INFER, &asked).await.expect("an answer")).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t48_t51_a_connection_without_a_valid_certificate_is_refused() {
    let mut region = Region::new("policy-tls");
    region.start().await;
    let gateway = region.gateway().address;
    let bundle = region.identity("acme").trust_bundle;
    let refused = |client: Client| async move {
        // In TLS 1.3 the client may learn of the refusal only with its first read.
        let Ok(mut open) = client.connect(Protocol::H1).await else { return true };
        open.send(client.request("GET", "/v2/health/live").body(http_body_util::Full::default()).expect("a request"))
            .await
            .is_err()
    };
    let handshake_failures = || region.gateway_metrics().sum("spillway_gateway_handshake_failures_total", &[]);

    let before = handshake_failures();
    assert!(refused(Client::anonymous(gateway, &bundle)).await, "no certificate");
    let domain = || TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain");
    let other = Authority::create(domain()).expect("an authority");
    let identity = region.issue_by(&other, "other-root", "tenant/acme/client/web", HOUR);
    assert!(refused(Client::new(gateway, &identity)).await, "a root that is not trusted");
    let identity = region.issue("short", "tenant/acme/client/short", Duration::from_secs(1));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(refused(Client::new(gateway, &identity)).await, "an expired certificate");
    eventually("each is counted", Duration::from_secs(2), async || {
        (handshake_failures() - before >= 3.0).then_some(())
    })
    .await;

    assert!(!curl(&region, &["--tls-max", "1.2"]), "TLS 1.2");
    assert!(curl(&region, &["--tlsv1.3"]), "TLS 1.3");
    let wrong = region.client("acme").handshake(&[b"spdy/3"]).await;
    assert!(wrong.is_err(), "a protocol that is not spoken");
    // openssl shows what the ticket that it got allows, and comes back with it and with early data.
    let folder = tempfile::tempdir().expect("a folder");
    let (ticket, early) = (folder.path().join("ticket"), folder.path().join("early"));
    std::fs::write(&early, HEALTH).expect("written");
    let first = openssl(&region, &["-sess_out", text(&ticket)]);
    assert!(first.contains("New, TLSv1.3") && first.contains("200 OK"), "{first}");
    let again = openssl(&region, &["-sess_in", text(&ticket), "-early_data", text(&early)]);
    assert!(again.contains("Reused, TLSv1.3") && again.contains("200 OK"), "{again}");
    for shown in [&first, &again] {
        assert!(shown.contains("NewSessionTicket") && shown.contains("Max Early Data: 0"), "{shown}");
        assert!(!shown.contains("Early data was accepted"), "{shown}");
    }
    assert!(region.gateway_metrics().sum("spillway_identity_handshakes_resumed_total", &[]) >= 1.0);
}

const HEALTH: &str = "GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// Whether curl as `acme` gets an answer.
fn curl(region: &Region, options: &[&str]) -> bool {
    let IdentitySettings { certificate, key, trust_bundle } = region.identity("acme");
    let url = format!("https://localhost:{}/v2/health/live", region.gateway().address.port());
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", "--cacert", text(&trust_bundle), "--cert", text(&certificate), "--key", text(&key)]);
    curl.args(options).arg(url).output().expect("curl is there").status.success()
}

/// What openssl as `acme` shows of a connection with one request.
fn openssl(region: &Region, options: &[&str]) -> String {
    let IdentitySettings { certificate, key, trust_bundle } = region.identity("acme");
    let address = region.gateway().address.to_string();
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-connect", &address, "-CAfile", text(&trust_bundle), "-cert", text(&certificate)]);
    // `-cert` alone sends the leaf without its intermediate.
    openssl.args(["-cert_chain", text(&certificate), "-key", text(&key), "-msg", "-alpn", "http/1.1", "-ign_eof"]);
    openssl.args(options);
    let openssl = openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut openssl = openssl.spawn().expect("openssl is there");
    let mut request = openssl.stdin.take().expect("a pipe");
    request.write_all(HEALTH.as_bytes()).expect("written");
    drop(request);
    let output = openssl.wait_with_output().expect("it ended");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_serves_gateways_of_its_region_only() {
    let mut region = Region::new("policy-sidecar");
    region.start().await;
    let asked: ModelInferRequest = message(&Asked::Entity("site-0001"));
    region.issue("other-region", "region/us-east/gateway/gateway-0", HOUR);
    let before = region.sidecars_sum("spillway_sidecar_calls_refused_total", &[])
        + region.sidecars_sum("spillway_sidecar_connections_refused_total", &[]);
    for name in ["acme", "pod-1", "other-region"] {
        let client = region.caller_of_pod(name, 0);
        // At the handshake or at the call: no answer but a refusal.
        if let Ok(answer) = grpc::call_once(&client, MODEL_INFER, &asked).await {
            assert_eq!(answer.code, Code::PermissionDenied, "{name}: {answer:?}");
        }
    }
    let other = Authority::create(TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain")).expect("an authority");
    region.issue_by(&other, "false-gateway", "region/eu-west/gateway/gateway-0", HOUR);
    assert!(grpc::call_once(&region.caller_of_pod("false-gateway", 0), MODEL_INFER, &asked).await.is_err());
    let after = region.sidecars_sum("spillway_sidecar_calls_refused_total", &[])
        + region.sidecars_sum("spillway_sidecar_connections_refused_total", &[]);
    assert!(after - before >= 4.0, "each refusal is counted: {before} {after}");
    let gateway = region.caller_of_pod("gateway-0", 0);
    assert_eq!(grpc::call_once(&gateway, MODEL_INFER, &asked).await.expect("an answer").code, Code::Ok);
    // Features come from the region's loaders and gateways alone.
    let put = spillway_proto::feature::PutRequest::default();
    for name in ["acme", "pod-1", "other-region"] {
        let client = region.caller_of_pod(name, 0);
        if let Ok(answer) = grpc::call_once(&client, "/spillway.feature.v1.FeatureService/Put", &put).await {
            assert_eq!(answer.code, Code::PermissionDenied, "{name}: {answer:?}");
        }
    }
}

/// The gateway speaks to nobody that is not the pod it means: here another pod's identity at the pod's address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_calls_no_sidecar_with_another_identity() {
    let mut region = Region::new("policy-impostor");
    region.set_pods(1);
    region.apply();
    let identity = region.issue("impostor", "region/eu-west/sidecar/scorers/pod-9", HOUR);
    let workload = Workload::load(&identity).expect("an identity");
    let impostor = Handshakes::listen(region.pods[0].address, &workload).await;
    region.gateway = Some(region.spawn_gateway("gateway-0"));
    let answer = region.client("acme").post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_eq!(answer.status, 503, "{:?}", answer.json());
    assert!(impostor.groups().is_empty(), "no handshake was completed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_hops_agree_on_a_hybrid_post_quantum_key() {
    let mut region = Region::new("policy-keys");
    region.set_pods(1);
    region.apply();
    let identity = region.issue("pod-0", "region/eu-west/sidecar/scorers/pod-0", HOUR);
    let pod = Handshakes::listen(region.pods[0].address, &Workload::load(&identity).expect("an identity")).await;
    region.gateway = Some(region.spawn_gateway("gateway-0"));
    let client = region.client("acme");
    let stream = client.handshake(&[b"h2"]).await.expect("a connection");
    let group = stream.get_ref().1.negotiated_key_exchange_group().expect("a key was agreed on");
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768, "client to gateway");
    // Its health checks connect without any request.
    let groups = eventually("the gateway calls the pod", Duration::from_secs(10), async || {
        Some(pod.groups()).filter(|groups| !groups.is_empty())
    })
    .await;
    assert!(groups.iter().all(|group| *group == NamedGroup::X25519MLKEM768), "gateway to sidecar: {groups:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t39_the_rest_of_triton_is_refused_at_the_edge() {
    let mut region = Region::new("policy-triton");
    region.start().await;
    let client = region.client("acme");
    let before = region.gateway_metrics().sum("spillway_gateway_rejected_total", &["reason=\"not-offered\""]);
    let paths = [
        "/v2/repository/index",
        "/v2/repository/models/phishing/load",
        "/v2/repository/models/phishing/unload",
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/cudasharedmemory/status",
        "/v2/trace/setting",
        "/v2/logging",
        "/v2/models/stats",
        "/v2/models/phishing/stats",
        "/v2/models/phishing/config",
        "/v2/models/phishing/generate",
    ];
    for path in paths {
        let answer = client.post(path, &serde_json::json!({})).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "not-offered"), "{path}");
    }
    let methods = [
        "RepositoryIndex",
        "RepositoryModelLoad",
        "SystemSharedMemoryRegister",
        "TraceSetting",
        "LogSettings",
        "ModelConfig",
    ];
    for method in methods {
        let path = format!("/inference.GRPCInferenceService/{method}");
        let answer = grpc::call_once(&client, &path, &ServerLiveRequest {}).await.expect("an answer");
        assert_eq!((answer.code, answer.error_code()), (Code::PermissionDenied, "not-offered"), "{method}");
    }
    let after = region.gateway_metrics().sum("spillway_gateway_rejected_total", &["reason=\"not-offered\""]);
    assert_eq!(after - before, (paths.len() + methods.len()) as f64);
    assert_eq!(scores(&client.post(INFER, &entity("site-0001")).await.expect("an answer")).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t58_the_admin_port_serves_nobody_from_elsewhere() {
    let elsewhere = own_address().expect("this machine has an address besides loopback");
    let mut region = Region::new("policy-admin");
    region.start().await;
    let admin = region.gateway().admin;
    assert!(admin.ip().is_loopback(), "by default");
    assert!(metrics::get((elsewhere, admin.port()).into(), "/metrics").is_err(), "not even listened to elsewhere");
    // Opened to all addresses by mistake: who comes from elsewhere is refused, who comes from here is served.
    let port = ports::free();
    let config = region.folder.join("gateway-open.yaml");
    let settings = std::fs::read_to_string(region.folder.join("gateway-0.yaml")).expect("its settings");
    let settings = settings.replace("admin: \"127.0.0.1:0\"", &format!("admin: \"0.0.0.0:{port}\""));
    std::fs::write(&config, settings).expect("settings are written");
    let _open = spillway_tests::harness::process::Process::start("gateway-open", "gateway", &config);
    let from_here: SocketAddr = ports::local(port);
    for path in ["/livez", "/readyz", "/metrics", "/config", "/drain"] {
        let (status, body) = metrics::get((elsewhere, port).into(), path).expect("an answer");
        assert_eq!(status, 403, "{path}: {body}");
    }
    assert_eq!(metrics::get(from_here, "/livez").expect("an answer").0, 200);
}

/// An address of this machine that is not loopback: the one that packets to elsewhere would leave from.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: connecting only chooses the way out. The network is one kept for examples.
    socket.connect("198.51.100.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}
