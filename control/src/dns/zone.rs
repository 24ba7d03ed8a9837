//! What of the zone no plan changes: which names there are, who serves them, how long answers hold.
//!
//! ```text
//! example.com            SOA, NS
//! infer.example.com      A, AAAA, HTTPS     the service; may be the zone's own name
//! eu-west.example.com    A, AAAA, HTTPS     one region, whatever its health: for probes and for clients that choose
//! ns1.example.com        A, AAAA            who serves the zone
//! ```
//!
//! The rule: a name is in the zone or it is nobody's concern here. Names are compared in their form on the wire, in
//! lower case.

use std::collections::HashMap;
use std::net::IpAddr;

use spillway_core::failover::AnswerSettings;
use spillway_core::units::DnsName;

use super::reply::{pointer, push};

/// What the operator says of the zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneSettings {
    pub zone: DnsName,
    /// The service; in the zone. Default its own name.
    pub name: DnsName,
    /// At least one.
    pub name_servers: Vec<NameServer>,
    /// Whom to write to, as a name: `hostmaster.example.com` for `hostmaster@example.com`.
    pub contact: DnsName,
    pub answers: AnswerSettings,
}

/// Who serves the zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameServer {
    pub name: DnsName,
    /// At least one where the name is in the zone; none where it is not.
    pub addresses: Vec<IpAddr>,
}

/// The zone as it is asked for.
#[derive(Clone, Debug)]
pub struct Zone {
    pub settings: ZoneSettings,
    apex: Vec<u8>,
    nodes: HashMap<Vec<u8>, Node>,
    pub primary: Target,
    pub contact: Target,
    pub name_servers: Vec<Target>,
}

/// What a name is. All false: there are only names below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub is_apex: bool,
    pub is_service: bool,
    /// Its place in the settings.
    pub name_server: Option<usize>,
}

/// A name inside a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Without the root.
    labels: Vec<u8>,
    /// It goes on with the zone's name; the labels are those before.
    is_in_zone: bool,
}

impl Zone {
    pub fn of(settings: ZoneSettings) -> Self {
        let apex = wire(&settings.zone);
        let mut zone = Self {
            apex,
            nodes: HashMap::new(),
            primary: Target { labels: Vec::new(), is_in_zone: true },
            contact: Target { labels: Vec::new(), is_in_zone: true },
            name_servers: Vec::new(),
            settings,
        };
        zone.contact = zone.target(&zone.settings.contact);
        zone.name_servers = zone.settings.name_servers.iter().map(|server| zone.target(&server.name)).collect();
        if let Some(first) = zone.name_servers.first() {
            zone.primary = first.clone();
        }
        let (apex, service) = (zone.apex.clone(), wire(&zone.settings.name));
        let servers: Vec<Vec<u8>> = zone.settings.name_servers.iter().map(|server| wire(&server.name)).collect();
        zone.node(&apex).is_apex = true;
        zone.node(&service).is_service = true;
        for (place, name) in servers.into_iter().enumerate() {
            if zone.apex_in(&name).is_some() {
                zone.node(&name).name_server = Some(place);
            }
        }
        zone
    }

    /// Where in a name the zone's own begins. None: it is not in the zone.
    pub fn apex_in(&self, name: &[u8]) -> Option<usize> {
        let before = name.len().checked_sub(self.apex.len())?;
        let mut at = 0;
        while at < before {
            at += usize::from(*name.get(at)?) + 1;
        }
        (at == before && name.get(at..) == Some(&self.apex)).then_some(at)
    }

    /// What a name is; None if no name is, or ends in, it.
    pub fn find(&self, name: &[u8]) -> Option<Node> {
        self.nodes.get(name).copied()
    }

    /// A region's own name, on the wire. None if the region's name is none for a host, or would be too long.
    pub fn name_of(&self, region: &str) -> Option<Vec<u8>> {
        DnsName::host(&format!("{region}.{}", self.settings.zone)).ok().map(|name| wire(&name))
    }

    /// The node of a name in the zone, with those between it and the zone's own.
    fn node(&mut self, name: &[u8]) -> &mut Node {
        for between in parents(name).take_while(|parent| parent.len() > self.apex.len()) {
            self.nodes.entry(between.to_vec()).or_default();
        }
        self.nodes.entry(name.to_vec()).or_default()
    }

    fn target(&self, name: &DnsName) -> Target {
        let mut labels = wire(name);
        let apex = self.apex_in(&labels);
        labels.truncate(apex.unwrap_or(labels.len() - 1));
        Target { labels, is_in_zone: apex.is_some() }
    }
}

impl Target {
    /// `apex`: where in the message the zone's name is.
    pub fn write(&self, out: &mut Vec<u8>, apex: usize) {
        out.extend_from_slice(&self.labels);
        if self.is_in_zone { push(out, pointer(apex)) } else { out.push(0) }
    }
}

/// The names that a name is below.
pub fn parents(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    let up = |name: &&'_ [u8]| name.first().filter(|length| **length > 0).map(|length| usize::from(*length) + 1);
    std::iter::successors(Some(name), move |name| up(name).and_then(|label| name.get(label..))).skip(1)
}

fn wire(name: &DnsName) -> Vec<u8> {
    let mut wire = Vec::with_capacity(name.as_str().len() + 2);
    for label in name.as_str().split('.') {
        // At most 63, as it is a host's name.
        wire.push(label.len() as u8);
        wire.extend_from_slice(label.as_bytes());
    }
    wire.push(0);
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DnsName {
        DnsName::host(text).unwrap()
    }

    fn zone(service: &str) -> Zone {
        let server = |text, addresses: &[&str]| NameServer {
            name: name(text),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        };
        Zone::of(ZoneSettings {
            zone: name("example.com"),
            name: name(service),
            name_servers: vec![server("ns1.dns.example.com", &["192.0.2.53"]), server("ns2.example.net", &[])],
            contact: name("hostmaster.example.com"),
            answers: AnswerSettings::default(),
        })
    }

    #[test]
    fn a_name_is_in_the_zone_by_whole_labels() {
        let zone = zone("infer.example.com");
        for (text, expected) in [
            ("example.com", Some(0)),
            ("infer.example.com", Some(6)),
            ("a.b.example.com", Some(4)),
            ("badexample.com", None),
            ("example.com.net", None),
            ("com", None),
        ] {
            assert_eq!(zone.apex_in(&wire(&name(text))), expected, "{text}");
        }
        assert_eq!(zone.apex_in(&[0]), None, "the root");
    }

    #[test]
    fn names_are_what_the_settings_say_and_those_between() {
        let zone = zone("infer.example.com");
        let find = |text: &str| zone.find(&wire(&name(text)));
        let node = Node::default();
        assert_eq!(find("example.com"), Some(Node { is_apex: true, ..node }));
        assert_eq!(find("infer.example.com"), Some(Node { is_service: true, ..node }));
        assert_eq!(find("ns1.dns.example.com"), Some(Node { name_server: Some(0), ..node }));
        assert_eq!(find("dns.example.com"), Some(node), "RFC 8020: it exists, since a name is below it");
        assert_eq!(find("ns2.example.net"), None);
        assert_eq!(find("other.example.com"), None);
    }

    #[test]
    fn the_service_may_be_the_zone_itself() {
        let both = Node { is_apex: true, is_service: true, name_server: None };
        assert_eq!(zone("example.com").find(&wire(&name("example.com"))), Some(both));
    }

    #[test]
    fn names_in_records_end_in_the_questions_zone_where_they_can() {
        let zone = zone("example.com");
        let written = |target: &Target| {
            let mut out = Vec::new();
            target.write(&mut out, 20);
            out
        };
        assert_eq!(written(&zone.contact), b"\x0ahostmaster\xc0\x14");
        assert_eq!(written(&zone.name_servers[1]), b"\x03ns2\x07example\x03net\x00");
    }

    #[test]
    fn a_regions_name_is_below_the_zone_if_a_host_can_have_it() {
        let zone = zone("example.com");
        assert_eq!(zone.name_of("EU-West"), Some(wire(&name("eu-west.example.com"))));
        assert_eq!(zone.name_of("eu_west"), None);
    }
}
