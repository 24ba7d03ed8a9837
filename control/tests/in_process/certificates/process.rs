//! A whole control node with an authority: its ports, its doors, its own certificate.

use spillway_control::{Control, ControlSettings};
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_proto::control::{BundleRequest, CreateTokenRequest};
use spillway_runtime::authority::Authority as Signer;
use spillway_runtime::dial::dial;
use spillway_runtime::drain::Drain;
use spillway_runtime::renewal::{BootstrapSettings, RenewalSettings, prepare};
use spillway_runtime::settings::parse;
use spillway_runtime::tls::{IdentitySettings, Workload};
use tonic::Code;

use super::stand::{GATEWAY, HOUR, OPERATOR, SECOND, eventually, id, issue};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_node_gives_tokens_first_certificates_and_its_own_ones() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let signer = Signer::create(id(GATEWAY).trust_domain).unwrap();
    signer.save(at("authority")).unwrap();
    let own = issue(&signer, "spiffe://spillway.test/region/eu/control/c-0", 4 * SECOND, &at("c-0"));
    // It renews at its own port, which it must know before it listens.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = format!(
        "region: eu\nname: c-0\nlisten: {port}\nstore: {{sqlite: '{}'}}\noperators: [ada]\n\
         authority: {{folder: '{}', life: 1h, bootstrap: '127.0.0.1:0'}}\n\
         identity:\n  certificate: '{}'\n  key: '{}'\n  trustBundle: '{}'\n  renew: {{servers: ['{port}']}}\n",
        at("control.db").display(),
        at("authority").display(),
        own.certificate.display(),
        own.key.display(),
        own.trust_bundle.display(),
    );
    let settings: ControlSettings = parse(&text).unwrap();
    let drain = Drain::new(SECOND);
    let control = Control::bind(settings, drain.clone()).await.unwrap();
    let (parts, bootstrap) = (control.parts().clone(), control.addresses().bootstrap.unwrap());
    let served = tokio::spawn(control.serve());
    eventually("it leads", || parts.leading.fence().is_some()).await;
    let client = async |identity: &IdentitySettings| {
        let workload = Workload::load(identity).unwrap();
        let control = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        AuthorityClient::new(dial(&workload, control, &port.to_string(), 5 * SECOND).await.unwrap())
    };
    let order = CreateTokenRequest { id: GATEWAY.into(), ..CreateTokenRequest::default() };
    let eve = issue(&signer, "spiffe://spillway.test/operator/eve", HOUR, &at("eve"));
    assert_eq!(client(&eve).await.create_token(order.clone()).await.unwrap_err().message(), "not-an-operator");
    let tenant = issue(&signer, "spiffe://spillway.test/tenant/acme/client/web", HOUR, &at("web"));
    let refused = client(&tenant).await.bundle(BundleRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "it is no affair of tenants");
    let ada = issue(&signer, OPERATOR, HOUR, &at("ada"));
    let token = client(&ada).await.create_token(order).await.unwrap().into_inner().token;
    std::fs::create_dir(at("gateway")).unwrap();
    std::fs::write(at("gateway/trust-bundle.pem"), signer.trust_bundle()).unwrap();
    std::fs::write(at("gateway/token"), token).unwrap();
    let identity = IdentitySettings {
        certificate: at("gateway/certificate.pem"),
        key: at("gateway/key.pem"),
        trust_bundle: at("gateway/trust-bundle.pem"),
    };
    let renew = RenewalSettings {
        servers: vec![port.to_string()],
        bootstrap: Some(BootstrapSettings { servers: vec![bootstrap.to_string()], token: at("gateway/token") }),
        every: HOUR,
    };
    prepare(&identity, Some(&renew), &id(GATEWAY).role).await.unwrap();
    let bundle = client(&identity).await.bundle(BundleRequest {}).await.unwrap().into_inner();
    assert_eq!(bundle.roots, signer.trust_bundle());
    let renewed = "spillway_identity_renewals_total{outcome=\"renewed\"} 1";
    eventually("its own certificate is renewed", || parts.metrics.encode().unwrap().contains(renewed)).await;
    drain.start();
    tokio::time::timeout(10 * SECOND, served).await.unwrap().unwrap();
}
