use proptest::prelude::*;
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::fixture::{CLIENT, Domain, GATEWAY, id};

const PEER: &str = "spiffe://spillway.test/region/us/gateway/gw-7";
const NOW: Duration = Duration::from_millis(1_700_000_000_123);

fn some() -> Passage {
    let name = |text| Name::parse(text).unwrap();
    Passage {
        client: id(CLIENT),
        serial: Serial::parse("0a1b").unwrap(),
        not_after: NOW + Duration::from_secs(60),
        class: Class::High,
        from: name("eu"),
        to: name("us"),
        path: "/inference.GRPCInferenceService/ModelInfer".to_owned(),
        request_id: "r-1:2.3_4".to_owned(),
        issued: NOW,
        expires: NOW + Duration::from_secs(5),
        hops: 1,
    }
}

/// A workload, and the peer that others see in its certificate.
fn gateway(domain: &Domain, uri: &str) -> (std::sync::Arc<Workload>, Peer) {
    crate::tls::install_provider();
    let settings = domain.settings(uri, None);
    let workload = Workload::load(&settings).unwrap();
    let pem = std::fs::read(&settings.certificate).unwrap();
    let chain: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(&pem).map(Result::unwrap).collect();
    let peer = workload.peer(&chain).unwrap();
    (workload, peer)
}

#[test]
fn what_a_gateway_signs_its_peer_reads() {
    let domain = Domain::create();
    let (workload, peer) = gateway(&domain, GATEWAY);
    let text = issue(&workload, &some()).unwrap();
    assert!(http::HeaderValue::from_str(&text).is_ok() && text.len() < 512, "{text}");
    assert_eq!(read(&text, &peer), Ok(some()));
}

#[test]
fn t21_another_key_or_another_word_is_not_believed() {
    let domain = Domain::create();
    let (workload, peer) = gateway(&domain, GATEWAY);
    let (_, other) = gateway(&domain, PEER);
    let text = issue(&workload, &some()).unwrap();
    assert_eq!(read(&text, &other), Err(NoPassage::Unsigned), "over another gateway's connection");
    for (from, to) in [
        ("/tenant/acme/", "/tenant/globex/"),
        (" 0a1b ", " 0a1c "),
        (" high ", " critical "),
        (" us ", " ap "),
        (" 1700000000123 ", " 1700000000124 "),
        (" r-1:2.3_4 ", " r-2 "),
    ] {
        assert!(text.contains(from), "{from}");
        assert_eq!(read(&text.replacen(from, to, 1), &peer), Err(NoPassage::Unsigned), "{to}");
    }
    let end = text.len() - 2;
    let flipped = if &text[end..] == "00" { "01" } else { "00" };
    assert_eq!(read(&format!("{}{flipped}", &text[..end]), &peer), Err(NoPassage::Unsigned));
}

#[test]
fn what_is_not_written_as_we_write_it_is_not_read() {
    let domain = Domain::create();
    let (workload, peer) = gateway(&domain, GATEWAY);
    let text = issue(&workload, &some()).unwrap();
    let (said, signature) = text.rsplit_once(' ').unwrap();
    for bad in [
        "".to_owned(),
        " ".to_owned(),
        said.to_owned(),
        format!("{said}  {signature}"),
        format!("{text} "),
        format!("{text}0"),
        text.to_uppercase(),
        text.replacen("1 ", "2 ", 1),
        text.replacen(" 1700000000123 ", " +1700000000123 ", 1),
        text.replacen(" 1700000000123 ", " 01700000000123 ", 1),
        text.replacen(" 1700000000123 ", " -1 ", 1),
        text.replacen(" 0a1b ", " 00:0a:1b ", 1),
        text.replacen(" high ", " urgent ", 1),
        // PKCS#1 1.5, which TLS 1.3 has not.
        format!("{} 1025 {signature}", said.rsplit_once(' ').unwrap().0),
        format!("{text}{}", "0".repeat(MOST)),
    ] {
        assert_eq!(read(&bad, &peer), Err(NoPassage::Unreadable), "{bad}");
    }
    assert_eq!(read(&format!("{said} "), &peer), Err(NoPassage::Unsigned), "no signature at all");
}

proptest! {
    #[test]
    fn no_text_makes_a_reader_panic(text in "[ -~]{0,200}", at in 0_usize..400, byte in 32_u8..127) {
        thread_local! {
            static SIGNED: (String, Peer) = {
                let (workload, peer) = gateway(&Domain::create(), GATEWAY);
                (issue(&workload, &some()).unwrap(), peer)
            };
        }
        SIGNED.with(|(signed, peer)| {
            prop_assert!(read(&text, peer).is_err());
            let mut changed = signed.clone().into_bytes();
            let at = at % changed.len();
            let same = changed[at] == byte;
            changed[at] = byte;
            let changed = String::from_utf8(changed).unwrap();
            prop_assert_eq!(read(&changed, peer).is_ok(), same, "{}", changed);
            Ok(())
        })?;
    }
}
