//! THREATS 49 to 51 for clients that come back with a ticket.

use std::time::SystemTime;

use rustls::HandshakeKind::{Full, Resumed};
use spillway_core::identity::Revoked;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::file::write_atomic;
use crate::telemetry::Metrics;
use crate::tls::newcomer::greet_newcomer;

/// What became of a client: how it was let in, or why not.
#[derive(Debug, PartialEq)]
enum Met {
    Full,
    Resumed,
    /// By a ticket, and no further than the door.
    RefusedResumed(&'static str),
    RefusedFull(&'static str),
}

/// A client that keeps tickets, and wants to send early data.
fn returning(domain: &Domain, leaf: &IssuedLeaf) -> Arc<ClientConfig> {
    let mut config = client_config(domain, Some(leaf));
    config.resumption = Resumption::in_memory_sessions(8);
    config.enable_early_data = true;
    Arc::new(config)
}

async fn meet(server: &Workload, config: &Arc<ClientConfig>) -> Met {
    let (accepted, client) = handshake(server, config.clone(), Offer::H2).await;
    let kind = client.as_ref().ok().and_then(|client| client.get_ref().1.handshake_kind());
    match (accepted, kind) {
        (Ok(mut accepted), kind) => {
            let mut client = client.unwrap();
            // A byte from the server comes after the ticket that it sends.
            accepted.stream.write_all(b"x").await.unwrap();
            client.read_u8().await.unwrap();
            assert_eq!(accepted.stream.get_ref().1.handshake_kind(), kind);
            let (_, connection) = client.get_ref();
            assert_eq!((connection.tls13_tickets_received(), connection.is_early_data_accepted()), (1, false));
            if kind == Some(Resumed) { Met::Resumed } else { Met::Full }
        }
        (Err(error), Some(Resumed)) => Met::RefusedResumed(error.reason()),
        (Err(error), _) => Met::RefusedFull(error.reason()),
    }
}

#[tokio::test]
async fn a_client_comes_back_with_a_ticket_and_is_who_it_was() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let metrics = Metrics::new("test");
    gateway.register(&metrics);
    let config = returning(&domain, &domain.issue(CLIENT));
    let mut peers = Vec::new();
    for kind in [Full, Resumed, Resumed] {
        let (accepted, client) = handshake(&gateway, config.clone(), Offer::H2AndHttp1).await;
        let (mut accepted, mut client) = (accepted.unwrap(), client.unwrap());
        accepted.stream.write_all(b"x").await.unwrap();
        client.read_u8().await.unwrap();
        let (_, connection) = client.get_ref();
        assert_eq!(connection.handshake_kind(), Some(kind));
        // Keys are exchanged anew, and nothing was sent ahead of that.
        assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
        assert_eq!((connection.tls13_tickets_received(), connection.is_early_data_accepted()), (1, false));
        assert_eq!(accepted.protocol, Protocol::H2);
        assert_eq!(gateway.still_trusted(&accepted.peer, SystemTime::now()), Ok(()));
        peers.push(accepted.peer);
    }
    let known = |peer: &Peer| (peer.id.clone(), peer.serial.clone(), peer.not_after, peer.chain.clone(), peer.side);
    assert!(peers.iter().all(|peer| known(peer) == known(&peers[0])));
    let text = metrics.encode().unwrap();
    for line in ["handshakes_full_total 1\n", "handshakes_resumed_total 2\n"] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn each_returning_client_has_its_own_role() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let uris = [CLIENT, SIDECAR, "spiffe://spillway.test/operator/alice"];
    let configs = uris.map(|uri| (id(uri), returning(&domain, &domain.issue(uri))));
    for kind in [Full, Resumed] {
        for (id, config) in &configs {
            let (accepted, client) = handshake(&gateway, config.clone(), Offer::H2).await;
            let (mut accepted, mut client) = (accepted.unwrap(), client.unwrap());
            accepted.stream.write_all(b"x").await.unwrap();
            client.read_u8().await.unwrap();
            assert_eq!((client.get_ref().1.handshake_kind(), &accepted.peer.id), (Some(kind), id));
        }
    }
}

#[tokio::test]
async fn t49_tickets_end_with_our_certificate_and_the_next_ones_are_good() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let config = returning(&domain, &domain.issue(CLIENT));
    assert_eq!((meet(&gateway, &config).await, meet(&gateway, &config).await), (Met::Full, Met::Resumed));
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    assert!(gateway.reload().unwrap());
    assert_eq!((meet(&gateway, &config).await, meet(&gateway, &config).await), (Met::Full, Met::Resumed));
}

#[tokio::test]
async fn t49_a_client_whose_leaf_has_expired_is_refused_with_its_ticket() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let not_after = SystemTime::now() + Duration::from_secs(3);
    let leaf = domain.authority.issue_with(&LeafRequest::new(id(CLIENT), HOUR), |params| {
        params.not_after = not_after.into();
    });
    let config = returning(&domain, &leaf.unwrap());
    assert_eq!((meet(&gateway, &config).await, meet(&gateway, &config).await), (Met::Full, Met::Resumed));
    tokio::time::sleep(not_after.duration_since(SystemTime::now()).unwrap()).await;
    assert_eq!(meet(&gateway, &config).await, Met::RefusedResumed("expired"));
    // A ticket is used once; without one the answer is the same.
    assert_eq!(meet(&gateway, &config).await, Met::RefusedFull("expired"));
}

#[tokio::test]
async fn t50_a_revoked_client_is_refused_with_its_ticket_and_others_come_back() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let leaf = domain.issue(CLIENT);
    let other = returning(&domain, &domain.issue("spiffe://spillway.test/tenant/globex/client/web"));
    let peer = gateway.peer(&rotation::chain(&leaf)).unwrap();
    let by_id = Revoked { ids: [peer.id].into(), ..Revoked::default() };
    let by_serial = Revoked { serials: [peer.serial].into(), ..Revoked::default() };
    for revoked in [by_id, by_serial] {
        gateway.revoke(&Arc::default());
        let config = returning(&domain, &leaf);
        assert_eq!((meet(&gateway, &config).await, meet(&gateway, &config).await), (Met::Full, Met::Resumed));
        assert!(gateway.revoke(&Arc::new(revoked)));
        assert_eq!(meet(&gateway, &config).await, Met::RefusedFull("revoked"));
        assert_eq!((meet(&gateway, &other).await, meet(&gateway, &other).await), (Met::Full, Met::Resumed));
    }
}

#[tokio::test]
async fn a_client_of_a_removed_root_is_refused_with_its_ticket() {
    let (domain, leaving) = (Domain::create(), Domain::create());
    let both = format!("{}{}", domain.authority.trust_bundle(), leaving.authority.trust_bundle());
    let settings = domain.settings(GATEWAY, Some(&both));
    let gateway = Workload::load(&settings).unwrap();
    let config = returning(&domain, &leaving.issue(CLIENT));
    assert_eq!((meet(&gateway, &config).await, meet(&gateway, &config).await), (Met::Full, Met::Resumed));
    write_atomic(&settings.trust_bundle, domain.authority.trust_bundle().as_bytes(), 0o644).unwrap();
    assert!(gateway.reload().unwrap());
    assert_eq!(meet(&gateway, &config).await, Met::RefusedFull("untrusted"));
}

/// The handshake of [`accept`] without its door: what rustls alone lets in.
#[tokio::test]
async fn the_door_judges_what_rustls_takes_from_a_ticket() {
    let (domain, leaving) = (Domain::create(), Domain::create());
    let both = format!("{}{}", domain.authority.trust_bundle(), leaving.authority.trust_bundle());
    let settings = domain.settings(GATEWAY, Some(&both));
    let gateway = Workload::load(&settings).unwrap();
    let config = returning(&domain, &leaving.issue(CLIENT));
    assert_eq!(meet(&gateway, &config).await, Met::Full);
    // The handshake begins before the root is removed, and ends afterwards.
    let (near, far) = tokio::io::duplex(1 << 16);
    let server = tokio_rustls::TlsAcceptor::from(gateway.handshake_config(Offer::H2)).accept(far);
    let name = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
    let (server, client) = tokio::join!(server, TlsConnector::from(config).connect(name, near));
    let (server, _client) = (server.unwrap(), client.unwrap());
    let (_, connection) = server.get_ref();
    assert_eq!(connection.handshake_kind(), Some(Resumed));
    let chain = connection.peer_certificates().unwrap();
    assert!(gateway.peer(chain).is_ok());
    write_atomic(&settings.trust_bundle, domain.authority.trust_bundle().as_bytes(), 0o644).unwrap();
    assert!(gateway.reload().unwrap());
    assert_eq!(gateway.peer(chain).unwrap_err().reason(), "untrusted");
}

#[tokio::test]
async fn another_process_or_authority_takes_no_ticket_of_ours() {
    let (domain, other) = (Domain::create(), Domain::create());
    let (gateway, twin, stranger) = (domain.workload(GATEWAY), domain.workload(GATEWAY), other.workload(GATEWAY));
    let both = format!("{}{}", domain.authority.trust_bundle(), other.authority.trust_bundle());
    let trust = Arc::new(Trust::read(id(GATEWAY).trust_domain, both.as_bytes()).unwrap());
    let mut config = client_config(&domain, Some(&domain.issue(CLIENT)));
    config.dangerous().set_certificate_verifier(Arc::new(ExpectedServer { trust, expected: id(GATEWAY).into() }));
    config.resumption = Resumption::in_memory_sessions(8);
    let config = Arc::new(config);
    assert_eq!(meet(&gateway, &config).await, Met::Full);
    assert_eq!(meet(&twin, &config).await, Met::Full);
    assert_eq!(meet(&gateway, &config).await, Met::Full, "the newest ticket is the twin's");
    assert_eq!(meet(&stranger, &config).await, Met::RefusedFull("untrusted"));
}

#[tokio::test]
async fn a_ticket_is_of_no_use_where_newcomers_are_greeted() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let config = returning(&domain, &domain.issue(CLIENT));
    assert_eq!(meet(&gateway, &config).await, Met::Full);
    let (near, far) = tokio::io::duplex(1 << 16);
    let name = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
    let connect = TlsConnector::from(config.clone()).connect(name, near);
    let (server, client) = tokio::join!(greet_newcomer(&gateway, far, WITHIN), connect);
    let (mut server, mut client) = (server.unwrap(), client.unwrap());
    server.write_all(b"x").await.unwrap();
    client.read_u8().await.unwrap();
    let (_, connection) = client.get_ref();
    assert_eq!((connection.handshake_kind(), connection.tls13_tickets_received()), (Some(Full), 0));
}

#[tokio::test]
async fn the_protocol_is_agreed_on_anew() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let mut config = client_config(&domain, Some(&domain.issue(CLIENT)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::in_memory_sessions(8);
    let config = Arc::new(config);
    let (accepted, client) = handshake(&gateway, config.clone(), Offer::H2AndHttp1).await;
    let (mut accepted, mut client) = (accepted.unwrap(), client.unwrap());
    accepted.stream.write_all(b"x").await.unwrap();
    client.read_u8().await.unwrap();
    let (refused, client) = handshake(&gateway, config, Offer::H2).await;
    assert_eq!(refused.unwrap_err().reason(), "protocol");
    assert!(client.is_err());
}
