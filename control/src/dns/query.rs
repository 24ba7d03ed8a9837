//! A query out of the bytes of a message.
//!
//! The rule: bytes are a query or they are not; nothing is mended. What is read is bounded by the message, costs no
//! memory of its own, and never panics. Whether there is an answer is not decided here.
//!
//! | bytes                                               | are                     | answered with       |
//! |-----------------------------------------------------|-------------------------|---------------------|
//! | less than a header, or a response                   | [`Unfit::Mute`]         | nothing             |
//! | another opcode than QUERY                           | [`Unfit::Opcode`]       | NOTIMP, header only |
//! | not one question, cut off, bytes left, two OPT, ... | [`Unfit::Malformed`]    | FORMERR             |
//!
//! Messages: RFC 1035, section 4.1. One question: RFC 9619. EDNS: RFC 6891. Client subnet: RFC 7871, whose malformed
//! options are refused as it says (sections 6 and 7.1.2).
//!
//! Why not hickory's reader: it answers malformed *responses* too (hickory-server 0.26), so two servers could keep
//! each other busy, it mends what is malformed in a client subnet, and it allocates for each name and record.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::RecordType;

/// The head of a message.
pub const HEADER: usize = 12;
/// Octets of a name (RFC 1035, section 2.3.4).
pub const MOST_NAME: usize = 255;

const MOST_LABEL: u8 = 63;
/// Records beside the question that are skipped: IXFR brings one, TSIG another.
const MOST_RECORDS: u16 = 8;
const CLIENT_SUBNET: u16 = 8;
const DNSSEC_OK: u16 = 0x8000;

/// A query, as it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query<'a> {
    pub head: Head,
    /// Name, type and class as they came: an answer repeats them, letter by letter (0x20).
    pub question: &'a [u8],
    pub name: Lowered,
    pub kind: RecordType,
    pub class: u16,
    pub edns: Option<Edns<'a>>,
}

/// What an answer repeats of a query's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub id: u16,
    pub opcode: u8,
    pub recursion_desired: bool,
}

/// What the OPT record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns<'a> {
    /// Octets that the sender takes in a datagram.
    pub payload: u16,
    pub version: u8,
    pub dnssec_ok: bool,
    pub client_subnet: Option<ClientSubnet<'a>>,
}

/// The client subnet option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientSubnet<'a> {
    /// Family, lengths and address as they came, for the option of the answer.
    pub option: &'a [u8],
    /// None for family 0, which says nothing.
    pub address: Option<IpAddr>,
    /// Bits of it that the sender tells.
    pub source: u8,
}

/// Bytes that are no query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit<'a> {
    /// To be met with silence.
    Mute,
    Opcode(Head),
    Malformed {
        head: Head,
        /// The question, if that much could be read.
        question: &'a [u8],
        /// Whether an OPT record was seen.
        edns: bool,
    },
}

/// A name in its form on the wire, in lower case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lowered {
    octets: [u8; MOST_NAME],
    length: u8,
}

impl Lowered {
    pub fn octets(&self) -> &[u8] {
        self.octets.get(..usize::from(self.length)).unwrap_or_default()
    }
}

impl std::fmt::Debug for Lowered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.octets().escape_ascii())
    }
}

/// Reads a message. The answer to what is unfit needs nothing else.
pub fn read(message: &[u8]) -> Result<Query<'_>, Unfit<'_>> {
    let mut bytes = Bytes { all: message, at: 0 };
    let Some((head, counts)) = bytes.head() else { return Err(Unfit::Mute) };
    if head.opcode != 0 {
        return Err(Unfit::Opcode(head));
    }
    let mut edns_seen = false;
    let mut question: &[u8] = &[];
    bytes.body(head, counts, &mut question, &mut edns_seen).ok_or(Unfit::Malformed { head, question, edns: edns_seen })
}

struct Counts {
    questions: u16,
    /// Answers and authorities.
    before: u16,
    additionals: u16,
}

/// A place in a message. None: there is not as much, or not as it must be.
struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.all.get(self.at..)?.get(..count)?;
        self.at += count;
        Some(taken)
    }

    fn octet(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn short(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// None also for a response.
    fn head(&mut self) -> Option<(Head, Counts)> {
        let id = self.short()?;
        let flags = self.short()?;
        let [questions, answers, authorities, additionals] =
            [self.short()?, self.short()?, self.short()?, self.short()?];
        let is_response = flags & 0x8000 != 0;
        let head = Head { id, opcode: (flags >> 11) as u8 & 0xf, recursion_desired: flags & 0x0100 != 0 };
        let counts = Counts { questions, before: answers.saturating_add(authorities), additionals };
        (!is_response).then_some((head, counts))
    }

    fn body(&mut self, head: Head, counts: Counts, question: &mut &'a [u8], edns_seen: &mut bool) -> Option<Query<'a>> {
        if counts.questions != 1 || counts.before.saturating_add(counts.additionals) > MOST_RECORDS {
            return None;
        }
        let name = self.question_name()?;
        let kind = RecordType::from(self.short()?);
        let class = self.short()?;
        *question = self.all.get(HEADER..self.at)?;
        for _ in 0..counts.before {
            if self.record()?.kind == RecordType::OPT {
                return None;
            }
        }
        let mut edns = None;
        for _ in 0..counts.additionals {
            let record = self.record()?;
            if record.kind == RecordType::OPT {
                if std::mem::replace(edns_seen, true) || !record.of_root {
                    return None;
                }
                edns = Some(record.edns()?);
            }
        }
        let query = Query { head, question, name, kind, class, edns };
        (self.at == self.all.len()).then_some(query)
    }

    /// Before it there is no name to point to.
    fn question_name(&mut self) -> Option<Lowered> {
        let start = self.at;
        loop {
            match self.octet()? {
                0 => break,
                length @ 1..=MOST_LABEL => self.take(length.into())?,
                _ => return None,
            };
        }
        let name = self.all.get(start..self.at)?;
        let mut octets = [0; MOST_NAME];
        let lowered = octets.get_mut(..name.len())?;
        lowered.copy_from_slice(name);
        // Lengths of labels are below 'A'.
        lowered.make_ascii_lowercase();
        Some(Lowered { octets, length: u8::try_from(name.len()).ok()? })
    }

    /// Steps over a name, which may end in a pointer, and says whether it is the root.
    fn skip_name(&mut self) -> Option<bool> {
        let start = self.at;
        loop {
            match self.octet()? {
                0 => return Some(self.at == start + 1),
                length @ 1..=MOST_LABEL => {
                    self.take(length.into())?;
                }
                0xc0.. => {
                    self.octet()?;
                    return Some(false);
                }
                _ => return None,
            }
        }
    }

    fn record(&mut self) -> Option<Record<'a>> {
        let of_root = self.skip_name()?;
        let (kind, class) = (RecordType::from(self.short()?), self.short()?);
        let time = [self.short()?, self.short()?];
        let length = self.short()?;
        let data = self.take(length.into())?;
        Some(Record { of_root, kind, class, time, data })
    }
}

struct Record<'a> {
    of_root: bool,
    kind: RecordType,
    class: u16,
    /// The time to live.
    time: [u16; 2],
    data: &'a [u8],
}

impl<'a> Record<'a> {
    /// As OPT puts it into a record: the class is a size, the time to live is code, version and flags.
    fn edns(&self) -> Option<Edns<'a>> {
        let [high, flags] = self.time;
        let version = high as u8;
        let mut edns = Edns { payload: self.class, version, dnssec_ok: flags & DNSSEC_OK != 0, client_subnet: None };
        if version > 0 {
            // What options look like there is not known.
            return Some(edns);
        }
        let mut options = Bytes { all: self.data, at: 0 };
        while options.at < self.data.len() {
            let (code, length) = (options.short()?, options.short()?);
            let option = options.take(length.into())?;
            if code == CLIENT_SUBNET && edns.client_subnet.replace(client_subnet(option)?).is_some() {
                return None;
            }
        }
        Some(edns)
    }
}

/// Exactly as many octets of address as the length says, no bit beyond it, and no scope, which is the answer's.
fn client_subnet(option: &[u8]) -> Option<ClientSubnet<'_>> {
    let [family_high, family_low, source, 0, told @ ..] = option else { return None };
    let source = *source;
    if told.len() != usize::from(source).div_ceil(8) {
        return None;
    }
    let address = match u16::from_be_bytes([*family_high, *family_low]) {
        0 if source == 0 => None,
        1 => {
            let mut octets = [0; 4];
            octets.get_mut(..told.len())?.copy_from_slice(told);
            let address = Ipv4Addr::from(octets);
            let beyond = u32::MAX.checked_shr(source.into()).unwrap_or_default();
            (source <= 32 && address.to_bits() & beyond == 0).then_some(Some(address.into()))?
        }
        2 => {
            let mut octets = [0; 16];
            octets.get_mut(..told.len())?.copy_from_slice(told);
            let address = Ipv6Addr::from(octets);
            let beyond = u128::MAX.checked_shr(source.into()).unwrap_or_default();
            (source <= 128 && address.to_bits() & beyond == 0).then_some(Some(address.into()))?
        }
        _ => return None,
    };
    Some(ClientSubnet { option, address, source })
}

#[cfg(test)]
#[path = "query_tests.rs"]
mod tests;
