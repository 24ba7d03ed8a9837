//! The audit log: who was denied what, and what changed who may do what. One JSON line each, hash-chained.
//!
//! ```text
//! {"seq":7,"time":"2026-03-01T12:00:00.000Z","event":"…", the event's fields, "prev":"…","hash":"…"}
//! hash = SHA-256(prev, as it is written || the line without `,"hash":"…"`); prev is the hash before, of seq 1 zeros
//! ```
//!
//! The rule: a hash covers every byte of its own line and, through `prev`, of all lines before it. Who
//! changes, drops or moves one has to write all later ones anew, and the [`Head`] that was kept elsewhere
//! still tells. The chain has no secret: it proves nothing about who wrote it.

mod event;
mod verify;

pub use event::{Denial, Event, Folded, Timestamp};
pub use verify::{Finding, Found, Verifier};

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::line;

/// A SHA-256, in text 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hash([u8; 32]);

impl Hash {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    fn parse(text: &str) -> Option<Self> {
        let digit = |byte: &u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = digit(&pair[0])? << 4 | digit(&pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&str>::deserialize(deserializer)?;
        Self::parse(text).ok_or_else(|| serde::de::Error::custom("expected 64 hexadecimal digits"))
    }
}

/// The end of a chain: its last record. The default is a chain without any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub seq: u64,
    pub hash: Hash,
}

impl Head {
    /// Appends the next record as a line, and is its end from now on. After an error nothing was appended.
    pub fn append(&mut self, time: Timestamp, event: &Event, into: &mut Vec<u8>) -> serde_json::Result<()> {
        let (from, seq) = (into.len(), self.seq.saturating_add(1));
        if let Err(error) = line::write(&Body { seq, time, event, prev: self.hash }, into) {
            into.truncate(from);
            return Err(error);
        }
        let hash = chained(self.hash, &into[from..]);
        into.pop();
        into.extend_from_slice(end(hash).as_bytes());
        into.push(b'\n');
        *self = Self { seq, hash };
        Ok(())
    }
}

/// What a hash covers.
#[derive(Serialize)]
struct Body<'a> {
    seq: u64,
    time: Timestamp,
    #[serde(flatten)]
    event: &'a Event,
    prev: Hash,
}

fn chained(prev: Hash, body: &[u8]) -> Hash {
    Hash(Sha256::new().chain_update(prev.to_string()).chain_update(body).finalize().into())
}

/// How each line ends.
fn end(hash: Hash) -> String {
    format!(",\"hash\":\"{hash}\"}}")
}

/// A line that was read. Its fields are not all looked at: the hash is for those.
#[derive(Clone, Debug)]
pub struct Record {
    pub seq: u64,
    prev: Hash,
    hash: Hash,
    kind: Kind,
    is_sound: bool,
}

/// The events that say something about the log itself.
#[derive(Clone, Debug)]
enum Kind {
    Rotated,
    Lost { records: u64 },
    Recovered { bytes: u64, sha256: Option<Hash>, rotated: bool, head: Option<Head> },
    Other,
}

/// The keys that are read, of all events.
#[derive(Deserialize)]
struct Keys<'a> {
    seq: u64,
    event: &'a str,
    prev: Hash,
    hash: Hash,
    records: Option<u64>,
    bytes: Option<u64>,
    sha256: Option<Hash>,
    rotated: Option<bool>,
    head: Option<Head>,
}

impl Record {
    /// Reads a line without its line break. `None`: it has not a record's form.
    pub fn read(line: &[u8]) -> Option<Self> {
        let Keys { seq, event, prev, hash, records, bytes, sha256, rotated, head } =
            serde_json::from_slice(line).ok()?;
        let mut body = line.strip_suffix(end(hash).as_bytes())?.to_vec();
        body.push(b'}');
        let kind = match event {
            "rotated" => Kind::Rotated,
            "lost" => Kind::Lost { records: records? },
            "recovered" => Kind::Recovered { bytes: bytes?, sha256, rotated: rotated?, head },
            _ => Kind::Other,
        };
        Some(Self { seq, prev, hash, kind, is_sound: chained(prev, &body) == hash })
    }

    /// Whether its bytes match its hash.
    pub fn is_sound(&self) -> bool {
        self.is_sound
    }

    /// The end of the chain up to it.
    pub fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
