use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
use hickory_proto::rr::rdata::svcb::SvcParamValue;
use hickory_proto::rr::{RData, Record};
use proptest::prelude::*;
use spillway_core::failover::Standing;
use spillway_core::units::DnsName;

use super::*;
use crate::dns::fixture::{Ask, addresses, name, place, view, zone};
use crate::dns::view::View;
use crate::dns::zone::ZoneSettings;

const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77));

/// The answer's bytes.
fn raw(zone: ZoneSettings, view: Option<View>, message: &[u8], via: Via) -> Option<Vec<u8>> {
    let zone = Zone::of(zone);
    let served = view.map(|view| Served::of(view, &zone));
    let mut out = Vec::new();
    let said = Responder::of(&zone, served.as_ref()).respond(message, FROM, via, &mut out);
    said.map(|_| out)
}

fn ask(ask: &Ask) -> Message {
    Message::from_vec(&raw(zone(), Some(view()), &ask.bytes(), Via::Datagram).unwrap()).unwrap()
}

fn of(name: &str, kind: RecordType) -> Message {
    ask(&Ask::of(name, kind))
}

fn ips(records: &[Record]) -> Vec<IpAddr> {
    let ip = |record: &Record| match &record.data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    };
    records.iter().filter_map(ip).collect()
}

/// Code, answers, whether a SOA is among the authorities.
fn shape(message: &Message) -> (ResponseCode, usize, bool) {
    let soa = message.authorities.iter().any(|record| record.record_type() == RecordType::SOA);
    (message.metadata.response_code, message.answers.len(), soa)
}

const NO_DATA: (ResponseCode, usize, bool) = (ResponseCode::NoError, 0, true);

#[test]
fn the_service_has_the_addresses_of_one_region() {
    let message = of("infer.example.com.", RecordType::A);
    let found: BTreeSet<IpAddr> = ips(&message.answers).into_iter().collect();
    let view = view();
    assert!(view.regions.values().any(|place| place.v4.iter().copied().collect::<BTreeSet<_>>() == found), "{found:?}");
    assert!(message.metadata.authoritative && !message.metadata.truncation && !message.metadata.recursion_available);
    assert!(message.answers.iter().all(|record| record.ttl == 30));
}

#[test]
fn t66_aaaa_without_any_address_of_ipv6_is_no_data_and_a_never_is() {
    let mut view = view();
    assert_eq!(ips(&of("infer.example.com.", RecordType::AAAA).answers), addresses(&["2001:db8:e::1"]));
    view.regions.values_mut().for_each(|place| place.v6.clear());
    let answer = |view: &View, kind| {
        let bytes = Ask::of("infer.example.com.", kind).bytes();
        Message::from_vec(&raw(zone(), Some(view.clone()), &bytes, Via::Datagram).unwrap()).unwrap()
    };
    assert_eq!(shape(&answer(&view, RecordType::AAAA)), NO_DATA);
    for (weight, standing) in [(0.0, Standing::Steady), (1.0, Standing::Out), (f64::NAN, Standing::Out)] {
        for place in view.regions.values_mut() {
            (place.weight, place.standing) = (weight, standing);
        }
        let message = answer(&view, RecordType::A);
        assert!(!message.answers.is_empty(), "{weight} {standing:?}");
        assert_eq!(message.answers[0].ttl, if standing == Standing::Steady { 30 } else { 5 });
    }
}

#[test]
fn https_says_protocols_port_and_where_the_region_is() {
    let mut view = view();
    view.regions.remove(&name("us-east"));
    for port in [443, 8_443] {
        view.regions.values_mut().for_each(|place| place.port = port);
        let bytes = Ask::of("infer.example.com.", RecordType::HTTPS).bytes();
        let answer = raw(zone(), Some(view.clone()), &bytes, Via::Datagram).unwrap();
        let message = Message::from_vec(&answer).unwrap();
        let [record] = &message.answers[..] else { panic!("one record: {message:?}") };
        let RData::HTTPS(binding) = &record.data else { panic!("HTTPS: {record:?}") };
        assert_eq!((binding.svc_priority, binding.target_name.to_ascii()), (1, ".".into()));
        let (mut protocols, mut ports, mut hints) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (_, value) in &binding.svc_params {
            match value {
                SvcParamValue::Alpn(alpn) => protocols.clone_from(&alpn.0),
                SvcParamValue::Port(port) => ports.push(*port),
                SvcParamValue::Ipv4Hint(hint) => hints.extend(hint.0.iter().map(|address| IpAddr::V4(address.0))),
                SvcParamValue::Ipv6Hint(hint) => hints.extend(hint.0.iter().map(|address| IpAddr::V6(address.0))),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(protocols, ["h2", "http/1.1"]);
        assert_eq!(ports, if port == 443 { vec![] } else { vec![port] });
        let expected = addresses(&["198.51.100.1", "198.51.100.2", "2001:db8:e::1"]);
        assert_eq!(hints, expected.into_iter().collect());
    }
}

#[test]
fn the_zone_has_its_soa_and_its_servers_with_their_addresses() {
    let message = of("example.com.", RecordType::SOA);
    let [record] = &message.answers[..] else { panic!("one record") };
    let RData::SOA(soa) = &record.data else { panic!("SOA") };
    assert_eq!(
        (soa.mname.to_ascii(), soa.rname.to_ascii()),
        ("ns1.example.com.".into(), "hostmaster.example.com.".into())
    );
    assert_eq!((soa.serial, soa.minimum), (7, 30), "the plan's version");
    let message = of("example.com.", RecordType::NS);
    let names: Vec<String> = message.answers.iter().map(|record| record.data.to_string()).collect();
    assert_eq!(names, ["ns1.example.com.", "ns2.example.net."]);
    assert_eq!(ips(&message.additionals), addresses(&["192.0.2.53", "2001:db8::53"]));
    assert!(message.additionals.iter().all(|record| record.name.to_ascii() == "ns1.example.com."));
    assert_eq!(ips(&of("ns1.example.com.", RecordType::A).answers), addresses(&["192.0.2.53"]));
    assert_eq!(ips(&of("ns1.example.com.", RecordType::AAAA).answers), addresses(&["2001:db8::53"]));
}

#[test]
fn a_region_has_a_name_of_its_own_whatever_its_health() {
    let mut view = view();
    view.regions.insert(name("ap.south"), place(0.0, Standing::Out, &["192.0.2.200"]));
    let ask = |text: &str, kind| {
        let answer = raw(zone(), Some(view.clone()), &Ask::of(text, kind).bytes(), Via::Datagram).unwrap();
        Message::from_vec(&answer).unwrap()
    };
    assert_eq!(ips(&ask("us-east.example.com.", RecordType::A).answers), addresses(&["203.0.113.1"]));
    assert_eq!(ips(&ask("ap.south.example.com.", RecordType::A).answers), addresses(&["192.0.2.200"]));
    assert_eq!(shape(&ask("us-east.example.com.", RecordType::AAAA)), NO_DATA, "it has none");
    assert_eq!(shape(&ask("south.example.com.", RecordType::A)), NO_DATA, "a name is below it");
    assert_eq!(shape(&ask("us-east.example.com.", RecordType::HTTPS)).1, 1);
}

#[test]
fn what_is_not_there_is_said_with_the_soa() {
    let nx = (ResponseCode::NXDomain, 0, true);
    assert_eq!(shape(&of("nobody.example.com.", RecordType::A)), nx);
    assert_eq!(shape(&of("below.infer.example.com.", RecordType::A)), nx);
    assert_eq!(shape(&of("nobody.example.com.", RecordType::ANY)), nx);
    for (text, kind) in [
        ("infer.example.com.", RecordType::TXT),
        ("infer.example.com.", RecordType::NS),
        ("infer.example.com.", RecordType::DS),
        ("example.com.", RecordType::A),
        ("ns1.example.com.", RecordType::HTTPS),
    ] {
        assert_eq!(shape(&of(text, kind)), NO_DATA, "{text} {kind}");
    }
    let message = of("nobody.example.com.", RecordType::A);
    assert_eq!((message.authorities[0].ttl, message.authorities[0].name.to_ascii()), (30, "example.com.".into()));
}

#[test]
fn t68_t69_what_is_not_ours_or_not_done_is_refused() {
    let refused = (ResponseCode::Refused, 0, false);
    for (text, kind) in [
        ("example.net.", RecordType::A),
        ("badexample.com.", RecordType::A),
        (".", RecordType::NS),
        ("example.com.", RecordType::AXFR),
        ("example.com.", RecordType::IXFR),
    ] {
        let message = of(text, kind);
        assert_eq!(shape(&message), refused, "{text} {kind}");
        assert!(!message.metadata.authoritative);
    }
    let any = of("infer.example.com.", RecordType::ANY);
    let [record] = &any.answers[..] else { panic!("one record: {any:?}") };
    assert_eq!((record.record_type(), record.data.to_string()), (RecordType::HINFO, "RFC8482 ".into()));
    assert_eq!(shape(&of("example.com.", RecordType::from(254))).0, ResponseCode::NotImp);
    assert_eq!(shape(&of("example.com.", RecordType::OPT)).0, ResponseCode::FormErr);
    let mut chaos = Ask::of("example.com.", RecordType::SOA).bytes();
    *chaos.last_mut().unwrap() = 3;
    let answer = raw(zone(), Some(view()), &chaos, Via::Datagram).unwrap();
    assert_eq!(answer[3] & 0xf, 5);
}

#[test]
fn t69_edns_of_another_version_is_badvers_and_says_ours() {
    let mut bytes = Ask::of("infer.example.com.", RecordType::A).edns(1_232).bytes();
    let version = bytes.len() - 5;
    bytes[version] = 1;
    let message = Message::from_vec(&raw(zone(), Some(view()), &bytes, Via::Datagram).unwrap()).unwrap();
    // 16 is the code of BADSIG, too, and hickory reads that.
    assert_eq!(u16::from(shape(&message).0), u16::from(ResponseCode::BADVERS));
    assert!(message.answers.is_empty() && message.authorities.is_empty());
    assert_eq!(message.edns.unwrap().version(), 0);
}

#[test]
fn before_the_first_view_only_what_is_set_is_answered() {
    let code = |text: &str, kind| {
        let answer = raw(zone(), None, &Ask::of(text, kind).bytes(), Via::Datagram).unwrap();
        shape(&Message::from_vec(&answer).unwrap()).0
    };
    assert_eq!(code("infer.example.com.", RecordType::A), ResponseCode::ServFail);
    assert_eq!(code("eu-west.example.com.", RecordType::A), ResponseCode::ServFail, "it may be a region");
    assert_eq!(code("example.com.", RecordType::SOA), ResponseCode::NoError);
    assert_eq!(code("ns1.example.com.", RecordType::A), ResponseCode::NoError);
    assert_eq!(code("example.net.", RecordType::A), ResponseCode::Refused);
}

#[test]
fn the_question_is_repeated_letter_by_letter() {
    let bytes = Ask::of("iNfEr.ExAmPlE.cOm.", RecordType::A).bytes();
    let answer = raw(zone(), Some(view()), &bytes, Via::Datagram).unwrap();
    assert_eq!(answer[12..bytes.len()], bytes[12..], "0x20");
    assert!(
        Message::from_vec(&answer).unwrap().answers[0]
            .name
            .eq_case(&hickory_proto::rr::Name::from_ascii("iNfEr.ExAmPlE.cOm.").unwrap())
    );
}

#[test]
fn the_client_subnet_comes_back_with_the_scope_of_the_answer() {
    for (text, kind, address, source, scope) in [
        ("infer.example.com.", RecordType::A, "198.51.100.77", 32, 24),
        ("infer.example.com.", RecordType::A, "198.51.100.0", 24, 24),
        ("infer.example.com.", RecordType::A, "198.51.0.0", 16, 16),
        ("infer.example.com.", RecordType::A, "0.0.0.0", 0, 0),
        ("infer.example.com.", RecordType::A, "2001:db8:0:ff00::", 64, 56),
        ("eu-west.example.com.", RecordType::A, "198.51.100.0", 24, 24),
        ("example.com.", RecordType::NS, "198.51.100.0", 24, 0),
        ("nobody.example.com.", RecordType::A, "198.51.100.0", 24, 0),
    ] {
        let message = ask(&Ask::of(text, kind).subnet(address.parse().unwrap(), source));
        let edns = message.edns.unwrap();
        let Some(EdnsOption::Subnet(subnet)) = edns.option(EdnsCode::Subnet) else { panic!("{text}: no subnet") };
        assert_eq!(
            (subnet.addr(), subnet.source_prefix(), subnet.scope_prefix()),
            (address.parse().unwrap(), source, scope),
            "{text}"
        );
    }
    assert!(of("infer.example.com.", RecordType::A).edns.is_none(), "who does not speak EDNS hears none");
}

#[test]
fn t68_without_edns_fewer_addresses_are_given_and_none_is_cut() {
    let mut zone = zone();
    zone.zone = DnsName::host(&format!("{0}.{0}.{0}.example", "x".repeat(60))).unwrap();
    zone.name = zone.zone.clone();
    zone.answers.addresses = 30;
    let v6: Vec<IpAddr> = (1..=30_u16).map(|host| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, host])).collect();
    let mut view = view();
    view.regions.values_mut().for_each(|place| place.v6.clone_from(&v6));
    for kind in [RecordType::AAAA, RecordType::HTTPS] {
        let plain = Ask::of(zone.name.as_str(), kind);
        let wide =
            Ask::of(zone.name.as_str(), kind).edns(65_535).subnet("2001:db8::".parse().unwrap(), 56).edns(65_535);
        for (ask, via, most, least) in
            [(&plain, Via::Datagram, 512, 9), (&wide, Via::Datagram, 1_232, 28), (&plain, Via::Stream, 65_535, 30)]
        {
            let answer = raw(zone.clone(), Some(view.clone()), &ask.bytes(), via).unwrap();
            assert!(answer.len() <= most, "{kind} {via:?}: {}", answer.len());
            let message = Message::from_vec(&answer).unwrap();
            assert!(!message.metadata.truncation && !message.answers.is_empty());
            if kind == RecordType::AAAA {
                assert!(message.answers.len() >= least, "{via:?}: {}", message.answers.len());
            }
        }
    }
}

#[test]
fn t68_name_servers_that_do_not_fit_are_cut_and_said_to_be() {
    let mut zone = zone();
    let host = |place: u8| DnsName::host(&format!("{0}{place}.{0}.{0}.{0}", "y".repeat(60))).unwrap();
    zone.name_servers =
        (0..8).map(|place| crate::dns::zone::NameServer { name: host(place), addresses: Vec::new() }).collect();
    let bytes = Ask::of("example.com.", RecordType::NS).edns(4_096).bytes();
    let answer = raw(zone.clone(), Some(view()), &bytes, Via::Datagram).unwrap();
    assert!(answer.len() <= 1_232 && Message::from_vec(&answer).unwrap().metadata.truncation);
    let answer = raw(zone, Some(view()), &bytes, Via::Stream).unwrap();
    let message = Message::from_vec(&answer).unwrap();
    assert!(!message.metadata.truncation && message.answers.len() == 8);
}

#[test]
fn a_slipped_answer_is_empty_and_says_to_come_by_tcp() {
    let zone = Zone::of(zone());
    let responder = Responder::of(&zone, None);
    let mut out = Vec::new();
    let bytes = Ask::of("infer.example.com.", RecordType::A).edns(1_232).bytes();
    let said = responder.slip(&bytes, &mut out).unwrap();
    let message = Message::from_vec(&out).unwrap();
    assert!(said.is_truncated && message.metadata.truncation && message.answers.is_empty());
    assert!(out.len() <= bytes.len(), "it amplifies nothing");
    assert_eq!(responder.slip(b"\x12\x34\x81", &mut out), None);
}

/// What an answer may add to its query: eight addresses of IPv6, or an HTTPS record of them.
const MOST_ADDED: usize = 8 * 28;

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let names = prop_oneof![
        Just("infer.example.com."),
        Just("example.com."),
        Just("eu-west.example.com."),
        Just("ns1.example.com."),
        Just("nobody.example.com."),
        Just("example.net."),
        Just("."),
    ];
    let kinds = prop_oneof![
        Just(RecordType::A),
        Just(RecordType::AAAA),
        Just(RecordType::HTTPS),
        Just(RecordType::SOA),
        Just(RecordType::NS),
        Just(RecordType::ANY),
        any::<u16>().prop_map(RecordType::from),
    ];
    let query =
        (names, kinds, any::<Option<u16>>(), any::<Option<(u32, u8)>>()).prop_map(|(name, kind, payload, subnet)| {
            let mut ask = Ask::of(name, kind);
            if let Some((address, source)) = subnet {
                let source = source % 33;
                let mask = u32::MAX.checked_shl(32 - u32::from(source)).unwrap_or(0);
                ask = ask.subnet(Ipv4Addr::from_bits(address & mask).into(), source);
            }
            if let Some(payload) = payload {
                ask = ask.edns(payload);
            }
            ask.bytes()
        });
    let damage = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let damaged = (query.clone(), damage).prop_map(|(mut bytes, damage)| {
        for (place, octet) in damage {
            let place = place.index(bytes.len());
            bytes[place] = octet;
        }
        bytes
    });
    prop_oneof![4 => query, 4 => damaged, 1 => proptest::collection::vec(any::<u8>(), 0..700)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn t68_any_message_is_answered_within_bounds_or_not_at_all(message in any_message(), has_view: bool) {
        let Some(answer) = raw(zone(), has_view.then(view), &message, Via::Datagram) else { return Ok(()) };
        prop_assert!(answer.len() <= 1_232);
        prop_assert!(answer.len() <= message.len().max(12) + MOST_ADDED, "{} for {}", answer.len(), message.len());
        prop_assert_eq!(&answer[..2], &message[..2], "the id");
        prop_assert!(answer[2] & 0x80 != 0, "a response");
        let edns = query::read(&message).ok().and_then(|query| query.edns);
        let most = edns.map_or(512, |edns| usize::from(edns.payload).clamp(512, 1_232));
        prop_assert!(answer.len() <= most);
        let read = Message::from_vec(&answer);
        prop_assert!(read.is_ok(), "{read:?} of {}", answer.escape_ascii());
        prop_assert_eq!(query::read(&answer), Err(Unfit::Mute), "nobody like us answers it");
    }

    #[test]
    fn t66_the_service_always_has_an_address(
        states in proptest::collection::vec((prop::num::f64::ANY, 0_u8..3), 2),
        client: u32,
    ) {
        let mut view = view();
        for (place, (weight, standing)) in view.regions.values_mut().zip(states) {
            place.weight = weight;
            place.standing = [Standing::Steady, Standing::Unsteady, Standing::Out][usize::from(standing)];
        }
        let bytes = Ask::of("infer.example.com.", RecordType::A).subnet(Ipv4Addr::from_bits(client).into(), 32).bytes();
        let answer = Message::from_vec(&raw(zone(), Some(view), &bytes, Via::Datagram).unwrap()).unwrap();
        prop_assert!(!ips(&answer.answers).is_empty());
    }
}
