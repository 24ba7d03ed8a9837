//! An answer's bytes, as they are written.
//!
//! The rule: never longer than was allowed, whatever is written; what does not fit is left out whole and said to be.
//! Names are pointers into the question, which every answer of the zone repeats, so an answer is short and its name
//! has the letters that were asked with (0x20).

use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::query::{ClientSubnet, Edns, HEADER, Head};

/// Octets of any datagram of ours: what passes every path unfragmented (DNS flag day 2020).
pub const MOST_DATAGRAM: u16 = 1_232;
/// Octets of a datagram for who does not speak EDNS (RFC 1035, section 4.2.1).
pub const LEAST_DATAGRAM: u16 = 512;

const IN: u16 = 1;
const POINTER: u16 = 0xc000;
/// A record without its data: pointer, type, class, time to live, length.
pub const RECORD: usize = 12;
const OPT: usize = 11;

/// Where a record stands, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    Answer,
    Authority,
    Additional,
}

/// How an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending<'a> {
    pub code: ResponseCode,
    pub authoritative: bool,
    pub truncated: bool,
    /// Of the query: an answer to EDNS speaks EDNS.
    pub edns: Option<Edns<'a>>,
    /// Bits of the client's subnet for which the answer holds (RFC 7871, section 7.2.1).
    pub scope: u8,
}

/// An answer under way.
#[derive(Debug)]
pub struct Reply<'o> {
    out: &'o mut Vec<u8>,
    head: Head,
    questions: u16,
    counts: [u16; 3],
    most: usize,
}

impl<'o> Reply<'o> {
    /// `question` is repeated; `edns` is what the ending will speak of.
    pub fn begin(out: &'o mut Vec<u8>, head: Head, question: &[u8], edns: Option<&Edns<'_>>, most: usize) -> Self {
        out.clear();
        out.resize(HEADER, 0);
        out.extend_from_slice(question);
        let opt = edns.map_or(0, |edns| OPT + edns.client_subnet.map_or(0, |subnet| 4 + subnet.option.len()));
        let questions = u16::from(!question.is_empty());
        Self { out, head, questions, counts: [0; 3], most: most.saturating_sub(opt) }
    }

    /// Octets that records may still take.
    pub fn room(&self) -> usize {
        self.most.saturating_sub(self.out.len())
    }

    /// Where the next record begins.
    pub fn place(&self) -> usize {
        self.out.len()
    }

    /// Writes a record, whose name begins at `owner` in the message, and says whether it fitted. Sections in order.
    pub fn record(
        &mut self,
        section: Section,
        owner: usize,
        kind: RecordType,
        ttl: u32,
        data: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        let start = self.out.len();
        push(self.out, pointer(owner));
        push(self.out, kind.into());
        push(self.out, IN);
        self.out.extend_from_slice(&ttl.to_be_bytes());
        push(self.out, 0);
        data(self.out);
        let length = u16::try_from(self.out.len() - start - RECORD);
        let (true, Ok(length)) = (self.out.len() <= self.most, length) else {
            self.out.truncate(start);
            return false;
        };
        set(self.out, start + RECORD - 2, length);
        if let Some(count) = self.counts.get_mut(section as usize) {
            *count += 1;
        }
        true
    }

    pub fn address(&mut self, section: Section, owner: usize, ttl: u32, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                let data = |out: &mut Vec<u8>| out.extend_from_slice(&address.octets());
                self.record(section, owner, RecordType::A, ttl, data)
            }
            IpAddr::V6(address) => {
                let data = |out: &mut Vec<u8>| out.extend_from_slice(&address.octets());
                self.record(section, owner, RecordType::AAAA, ttl, data)
            }
        }
    }

    pub fn end(mut self, ending: &Ending<'_>) {
        let code = u16::from(ending.code);
        if let Some(edns) = &ending.edns {
            self.edns(edns, code, ending.scope);
        }
        let flag = |set: bool, bit: u16| if set { bit } else { 0 };
        let flags = 0x8000
            | u16::from(self.head.opcode) << 11
            | flag(ending.authoritative, 0x0400)
            | flag(ending.truncated, 0x0200)
            | flag(self.head.recursion_desired, 0x0100)
            | (code & 0xf);
        let [answers, authorities, additionals] = self.counts;
        let words = [self.head.id, flags, self.questions, answers, authorities, additionals];
        for (place, word) in words.into_iter().enumerate() {
            set(self.out, 2 * place, word);
        }
    }

    fn edns(&mut self, edns: &Edns<'_>, code: u16, scope: u8) {
        self.out.push(0);
        push(self.out, RecordType::OPT.into());
        push(self.out, MOST_DATAGRAM);
        // High bits of the code, then version 0.
        push(self.out, (code >> 4) << 8);
        push(self.out, if edns.dnssec_ok { 0x8000 } else { 0 });
        match edns.client_subnet {
            Some(ClientSubnet { option: [high, low, source, _, address @ ..], .. }) => {
                let length = 4 + address.len() as u16;
                for word in [4 + length, 8, length] {
                    push(self.out, word);
                }
                self.out.extend_from_slice(&[*high, *low, *source, scope]);
                self.out.extend_from_slice(address);
            }
            _ => push(self.out, 0),
        }
        self.counts[Section::Additional as usize] += 1;
    }
}

/// A name that is the end of the question from there on.
pub fn pointer(at: usize) -> u16 {
    POINTER | (at as u16 & !POINTER)
}

/// In network order.
pub fn push(out: &mut Vec<u8>, word: u16) {
    out.extend_from_slice(&word.to_be_bytes());
}

fn set(out: &mut [u8], at: usize, word: u16) {
    if let Some(place) = out.get_mut(at..at + 2) {
        place.copy_from_slice(&word.to_be_bytes());
    }
}
