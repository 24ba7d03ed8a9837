//! A message in, an answer out: all that is decided of one query.
//!
//! The rule: the answer is a function of the message, its sender, the zone and the view. It is never longer than the
//! sender takes, nor than 1,232 octets in a datagram, and a live name never gives NXDOMAIN or, for A, NODATA
//! (THREATS 66, 68, 69).
//!
//! | asked                                         | answered                                   |
//! |-----------------------------------------------|--------------------------------------------|
//! | EDNS of a version above 0                     | BADVERS                                    |
//! | another class than IN, a name out of the zone | REFUSED                                    |
//! | AXFR, IXFR                                    | REFUSED                                    |
//! | OPT; other types that are no data             | FORMERR; NOTIMP                            |
//! | ANY                                           | HINFO (RFC 8482)                           |
//! | A, AAAA, HTTPS of the service                 | one region's, by weight and client subnet  |
//! | A, AAAA, HTTPS of a region                    | its own                                    |
//! | SOA, NS of the zone; A, AAAA of name servers  | as set                                     |
//! | the service or an unknown name, before the first view | SERVFAIL                           |
//! | another type; another name                    | NODATA; NXDOMAIN, with the SOA             |
//!
//! A datagram without EDNS has 512 octets: fewer addresses are chosen then, so that TC is not needed for them.

use std::cell::OnceCell;
use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use spillway_core::failover::{AnswerSettings, Subnet, answer};
use spillway_core::units::Name;

use super::query::{self, Edns, HEADER, Query, Unfit};
use super::reply::{Ending, LEAST_DATAGRAM, MOST_DATAGRAM, RECORD, Reply, Section, push};
use super::view::{Family, Served, Sites};
use super::zone::{Node, Zone};

const IN: u16 = 1;
/// Names of the zone and of its servers change by hand, with notice.
const FIXED_TTL: u32 = 3_600;
/// Secondaries' business (RFC 1912, section 2.2); there are none, since nobody may transfer the zone.
const REFRESH: u32 = 3_600;
const RETRY: u32 = 600;
const EXPIRE: u32 = 604_800;
/// An HTTPS record but for its hints: priority, target, alpn, port, two hints' keys.
const SERVICE_BINDING: usize = RECORD + 3 + 16 + 6 + 8;

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Datagram,
    Stream,
}

/// What was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said<'a> {
    /// None: the question could not be read.
    pub kind: Option<RecordType>,
    pub code: ResponseCode,
    /// The name is there, and nothing of the type.
    pub is_no_data: bool,
    pub is_truncated: bool,
    /// Which region the service's client got.
    pub region: Option<&'a Name>,
}

/// Answers from one view.
#[derive(Debug)]
pub struct Responder<'a> {
    zone: &'a Zone,
    /// None: nothing is known of the regions yet.
    served: Option<&'a Served>,
    /// Each when it is first asked for: most batches are of one query.
    v4: OnceCell<Sites<'a>>,
    v6: OnceCell<Sites<'a>>,
    both: OnceCell<Sites<'a>>,
}

impl<'a> Responder<'a> {
    pub fn of(zone: &'a Zone, served: Option<&'a Served>) -> Self {
        Self { zone, served, v4: OnceCell::new(), v6: OnceCell::new(), both: OnceCell::new() }
    }

    /// Writes the answer. None: there is none to give, and `out` says nothing.
    pub fn respond(&self, message: &[u8], from: IpAddr, via: Via, out: &mut Vec<u8>) -> Option<Said<'a>> {
        match query::read(message) {
            Ok(query) => Some(self.answer(&query, from, via, out)),
            Err(unfit) => decline(&unfit, out),
        }
    }

    /// Writes an empty answer that says to come by TCP. None: there is none to give.
    pub fn slip(&self, message: &[u8], out: &mut Vec<u8>) -> Option<Said<'a>> {
        let query = query::read(message).ok()?;
        let draft = Draft::of(&query, Via::Datagram, out);
        Some(draft.end(ResponseCode::NoError, Ended { is_truncated: true, ..Ended::default() }))
    }

    fn answer(&self, query: &Query<'_>, from: IpAddr, via: Via, out: &mut Vec<u8>) -> Said<'a> {
        let draft = Draft::of(query, via, out);
        let apex = self.zone.apex_in(query.name.octets());
        let code = match (query.kind, apex) {
            _ if query.edns.is_some_and(|edns| edns.version > 0) => ResponseCode::BADVERS,
            _ if query.class != IN => ResponseCode::Refused,
            (_, None) | (RecordType::AXFR | RecordType::IXFR, _) => ResponseCode::Refused,
            (RecordType::OPT, _) => ResponseCode::FormErr,
            (RecordType::ANY, Some(apex)) => return self.in_zone(draft, apex, from),
            (kind, _) if (249..=255).contains(&u16::from(kind)) => ResponseCode::NotImp,
            (_, Some(apex)) => return self.in_zone(draft, apex, from),
        };
        draft.end(code, Ended::default())
    }

    fn in_zone(&self, mut draft: Draft<'_, '_>, apex: usize, from: IpAddr) -> Said<'a> {
        draft.apex = HEADER + apex;
        let name = draft.query.name;
        let node = self.zone.find(name.octets());
        let pinned = self.served.and_then(|served| served.region(name.octets()));
        // Of a region's name, `pinned` is some region; of one above it, none.
        let is_live = node.map_or(pinned.flatten().is_some(), |node| node.is_service);
        if self.served.is_none() && node.is_none() {
            // It may be a region's.
            return draft.end(ResponseCode::ServFail, Ended::default());
        }
        let (node, region) = match (node, pinned) {
            (Some(node), _) => (node, None),
            (None, Some(region)) => (Node::default(), region),
            (None, None) => return self.negative(draft, ResponseCode::NXDomain),
        };
        match draft.query.kind {
            RecordType::ANY => self.any(draft),
            RecordType::SOA if node.is_apex => {
                self.soa(&mut draft, Section::Answer, FIXED_TTL);
                draft.positive()
            }
            RecordType::NS if node.is_apex => self.name_servers(draft),
            RecordType::A | RecordType::AAAA | RecordType::HTTPS => match (self.served, node.name_server) {
                (_, Some(place)) => self.name_server(draft, place),
                (Some(served), None) if is_live => self.regional(draft, served, region, from),
                (None, None) if is_live => draft.end(ResponseCode::ServFail, Ended::default()),
                _ => self.negative(draft, ResponseCode::NoError),
            },
            _ => self.negative(draft, ResponseCode::NoError),
        }
    }

    /// Addresses of the region that the client's subnet has, or of `pinned`.
    fn regional(&self, mut draft: Draft<'_, '_>, served: &'a Served, pinned: Option<&Name>, from: IpAddr) -> Said<'a> {
        let (family, all) = match draft.query.kind {
            RecordType::A => (Family::V4, &self.v4),
            RecordType::AAAA => (Family::V6, &self.v6),
            _ => (Family::Both, &self.both),
        };
        let of_pinned = pinned.map(|region| served.pinned(region, family));
        let ecs = draft.query.edns.and_then(|edns| edns.client_subnet);
        let told = ecs.and_then(|ecs| ecs.address.map(|address| (address, ecs.source)));
        let (subnet, scope) = Subnet::of_query(told, from);
        let settings = self.chosen(&draft, family);
        let Some(given) =
            answer(of_pinned.as_ref().unwrap_or_else(|| all.get_or_init(|| served.sites(family))), &subnet, &settings)
        else {
            return self.negative(draft, ResponseCode::NoError);
        };
        let ttl = seconds(given.ttl);
        let mut fits = true;
        if family == Family::Both {
            let own = served.all_of(given.region);
            let port = served.view.regions.get(given.region).map_or(443, |place| place.port);
            let hints: Vec<IpAddr> = given.addresses.into_iter().filter(|address| own.contains(address)).collect();
            fits &=
                draft.reply.record(Section::Answer, HEADER, RecordType::HTTPS, ttl, |out| binding(out, port, &hints));
        } else {
            for address in given.addresses {
                fits &= draft.reply.address(Section::Answer, HEADER, ttl, address);
            }
        }
        draft.scope = scope;
        let region = pinned.is_none().then_some(given.region);
        let ended = Ended { is_authoritative: true, is_truncated: !fits, region, ..Ended::default() };
        draft.end(ResponseCode::NoError, ended)
    }

    /// As many addresses as the settings allow and as fit.
    fn chosen(&self, draft: &Draft<'_, '_>, family: Family) -> AnswerSettings {
        let settings = &self.zone.settings.answers;
        let fit = match family {
            Family::V4 => draft.reply.room() / (RECORD + 4),
            Family::V6 => draft.reply.room() / (RECORD + 16),
            Family::Both => draft.reply.room().saturating_sub(SERVICE_BINDING) / 16,
        };
        AnswerSettings { addresses: settings.addresses.min(fit), ..settings.clone() }
    }

    fn any(&self, mut draft: Draft<'_, '_>) -> Said<'a> {
        let ttl = seconds(self.zone.settings.answers.ttl);
        let data = |out: &mut Vec<u8>| out.extend_from_slice(b"\x07RFC8482\x00");
        draft.reply.record(Section::Answer, HEADER, RecordType::HINFO, ttl, data);
        draft.positive()
    }

    fn name_servers(&self, mut draft: Draft<'_, '_>) -> Said<'a> {
        let (zone, apex) = (self.zone, draft.apex);
        let mut named = Vec::with_capacity(zone.name_servers.len());
        let mut fits = true;
        for target in &zone.name_servers {
            let at = draft.reply.place() + RECORD;
            fits &= draft.reply.record(Section::Answer, HEADER, RecordType::NS, FIXED_TTL, |out| {
                target.write(out, apex);
            });
            named.push(at);
        }
        // What of their addresses does not fit is asked for.
        let glue = zone.settings.name_servers.iter().zip(named).filter(|_| fits);
        for (server, at) in glue {
            for address in &server.addresses {
                draft.reply.address(Section::Additional, at, FIXED_TTL, *address);
            }
        }
        let ended = Ended { is_authoritative: true, is_truncated: !fits, ..Ended::default() };
        draft.end(ResponseCode::NoError, ended)
    }

    fn name_server(&self, mut draft: Draft<'_, '_>, place: usize) -> Said<'a> {
        let server = self.zone.settings.name_servers.get(place);
        let wanted = |address: &&IpAddr| match draft.query.kind {
            RecordType::A => address.is_ipv4(),
            RecordType::AAAA => address.is_ipv6(),
            _ => false,
        };
        let addresses: Vec<IpAddr> =
            server.map(|server| server.addresses.iter().filter(wanted).copied().collect()).unwrap_or_default();
        if addresses.is_empty() {
            return self.negative(draft, ResponseCode::NoError);
        }
        for address in addresses {
            draft.reply.address(Section::Answer, HEADER, FIXED_TTL, address);
        }
        draft.positive()
    }

    /// That there is no such name or nothing of the type, for as long as an answer would hold (RFC 2308).
    fn negative(&self, mut draft: Draft<'_, '_>, code: ResponseCode) -> Said<'a> {
        self.soa(&mut draft, Section::Authority, seconds(self.zone.settings.answers.ttl));
        let is_no_data = code == ResponseCode::NoError;
        draft.end(code, Ended { is_authoritative: true, is_no_data, ..Ended::default() })
    }

    fn soa(&self, draft: &mut Draft<'_, '_>, section: Section, ttl: u32) {
        let (zone, apex) = (self.zone, draft.apex);
        // Serial numbers go round (RFC 1982).
        let serial = self.served.map_or(0, |served| served.view.serial) as u32;
        let minimum = seconds(zone.settings.answers.ttl);
        draft.reply.record(section, apex, RecordType::SOA, ttl, |out| {
            zone.primary.write(out, apex);
            zone.contact.write(out, apex);
            for number in [serial, REFRESH, RETRY, EXPIRE, minimum] {
                out.extend_from_slice(&number.to_be_bytes());
            }
        });
    }
}

/// An answer that knows its query.
struct Draft<'q, 'o> {
    query: &'q Query<'q>,
    reply: Reply<'o>,
    /// Where in the message the zone's name is.
    apex: usize,
    scope: u8,
}

/// What an ending adds to its code.
#[derive(Default)]
struct Ended<'a> {
    is_authoritative: bool,
    is_truncated: bool,
    is_no_data: bool,
    region: Option<&'a Name>,
}

impl<'q, 'o> Draft<'q, 'o> {
    fn of(query: &'q Query<'q>, via: Via, out: &'o mut Vec<u8>) -> Self {
        let edns = query.edns.as_ref();
        let most = match (via, edns) {
            (Via::Stream, _) => u16::MAX,
            (Via::Datagram, None) => LEAST_DATAGRAM,
            (Via::Datagram, Some(edns)) => edns.payload.clamp(LEAST_DATAGRAM, MOST_DATAGRAM),
        };
        let reply = Reply::begin(out, query.head, query.question, edns, most.into());
        Self { query, reply, apex: HEADER, scope: 0 }
    }

    fn positive<'a>(self) -> Said<'a> {
        self.end(ResponseCode::NoError, Ended { is_authoritative: true, ..Ended::default() })
    }

    fn end<'a>(self, code: ResponseCode, ended: Ended<'a>) -> Said<'a> {
        let Ended { is_authoritative: authoritative, is_truncated, is_no_data, region } = ended;
        let edns = self.query.edns;
        self.reply.end(&Ending { code, authoritative, truncated: is_truncated, edns, scope: self.scope });
        Said { kind: Some(self.query.kind), code, is_no_data, is_truncated, region }
    }
}

fn decline<'a>(unfit: &Unfit<'_>, out: &mut Vec<u8>) -> Option<Said<'a>> {
    let (head, question, speaks_edns, code) = match *unfit {
        Unfit::Mute => return None,
        Unfit::Opcode(head) => (head, &[][..], false, ResponseCode::NotImp),
        Unfit::Malformed { head, question, edns } => (head, question, edns, ResponseCode::FormErr),
    };
    let plain = Edns { payload: LEAST_DATAGRAM, version: 0, dnssec_ok: false, client_subnet: None };
    let edns = speaks_edns.then_some(plain);
    let reply = Reply::begin(out, head, question, edns.as_ref(), LEAST_DATAGRAM.into());
    reply.end(&Ending { code, authoritative: false, truncated: false, edns, scope: 0 });
    Some(Said { kind: None, code, is_no_data: false, is_truncated: false, region: None })
}

/// The data of an HTTPS record: this very name, with these protocols, at this port and these addresses (RFC 9460).
fn binding(out: &mut Vec<u8>, port: u16, hints: &[IpAddr]) {
    const ALPN: u16 = 1;
    const PORT: u16 = 3;
    const V4_HINT: u16 = 4;
    const V6_HINT: u16 = 6;
    const PROTOCOLS: &[u8] = b"\x02h2\x08http/1.1";
    push(out, 1);
    out.push(0);
    push(out, ALPN);
    push(out, PROTOCOLS.len() as u16);
    out.extend_from_slice(PROTOCOLS);
    if port != 443 {
        push(out, PORT);
        push(out, 2);
        push(out, port);
    }
    for (key, is_mine) in [(V4_HINT, IpAddr::is_ipv4 as fn(&IpAddr) -> bool), (V6_HINT, IpAddr::is_ipv6)] {
        let mine = || hints.iter().filter(|address| is_mine(address));
        let length: usize = mine().map(|address| if address.is_ipv4() { 4 } else { 16 }).sum();
        if length > 0 {
            push(out, key);
            push(out, length as u16);
            for address in mine() {
                match address {
                    IpAddr::V4(address) => out.extend_from_slice(&address.octets()),
                    IpAddr::V6(address) => out.extend_from_slice(&address.octets()),
                }
            }
        }
    }
}

fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
