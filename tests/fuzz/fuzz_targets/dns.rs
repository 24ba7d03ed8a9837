//! Messages of the DNS: whatever comes, an answer is within its bounds, reads as one, and nobody like us answers it.
#![no_main]

use std::net::Ipv4Addr;

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;
use spillway_control::dns::answer::{Responder, Via};
use spillway_control::dns::query::{Unfit, read};
use spillway_control::dns::view::{Place, Served, View};
use spillway_control::dns::zone::{NameServer, Zone, ZoneSettings};
use spillway_core::failover::{AnswerSettings, Standing};
use spillway_core::units::{DnsName, Name};

/// As many addresses as fit into a small datagram, each of IPv6.
const MOST_ADDED: usize = 8 * 28;

fn zone() -> Zone {
    let host = |text| DnsName::host(text).expect("a name");
    Zone::of(ZoneSettings {
        zone: host("example.com"),
        name: host("infer.example.com"),
        name_servers: vec![NameServer { name: host("ns1.example.com"), addresses: vec!["192.0.2.53".parse().unwrap()] }],
        contact: host("hostmaster.example.com"),
        answers: AnswerSettings::default(),
    })
}

fn view() -> View {
    let place = Place {
        weight: 1.0,
        standing: Standing::Steady,
        v4: vec!["192.0.2.1".parse().unwrap()],
        v6: vec!["2001:db8::1".parse().unwrap()],
        port: 8443,
    };
    View { serial: 1, regions: [(Name::parse("eu").expect("a name"), place)].into() }
}

fuzz_target!(|message: &[u8]| {
    let zone = zone();
    let served = Served::of(view(), &zone);
    let responder = Responder::of(&zone, Some(&served));
    let mut answer = Vec::new();
    if responder.respond(message, Ipv4Addr::LOCALHOST.into(), Via::Datagram, &mut answer).is_some() {
        assert!(answer.len() <= 1_232 && answer.len() <= message.len().max(12) + MOST_ADDED);
        Message::from_vec(&answer).expect("an answer is a message");
        assert_eq!(read(&answer), Err(Unfit::Mute));
    }
});
