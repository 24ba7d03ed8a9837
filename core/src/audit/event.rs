//! What is recorded. Texts that a caller chose are bounded by who records them.

use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

use super::{Hash as Sha256, Head};

/// What happened. A field that is not known is null.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Somebody was refused; `count` times within a second.
    Denied {
        #[serde(flatten)]
        denial: Denial,
        count: u64,
    },
    /// Policies and all else are those of this snapshot from now on. The SHA-256 is the file's.
    SnapshotAccepted { version: u64, sha256: Sha256 },
    /// The last good snapshot, `serving`, stayed.
    SnapshotRefused { reason: &'static str, problem: String, serving: u64 },
    /// So many serial numbers and identities are revoked from now on.
    RevocationsChanged { generation: u64, serials: usize, ids: usize },
    /// Our own certificate and the roots that are trusted are these from now on.
    CertificateChanged { generation: u64, serial: String, not_after: Timestamp, trust_bundle_sha256: Sha256 },
    /// The last good certificate and roots stayed.
    CertificateRefused { problem: String },
    /// The authority gave a certificate; `proof` is what its asker showed: `certificate` or `token`.
    CertificateIssued {
        id: String,
        serial: String,
        not_after: Timestamp,
        proof: &'static str,
        address: Option<SocketAddr>,
    },
    /// An operator, `by`, had a token made for this identity, which may carry these names.
    TokenCreated { id: String, names: Vec<String>, until: Timestamp, by: String },
    /// The authority trusts these roots from now on; leaves lead to `signs`. `by` is the operator, if it was one.
    RootsChanged { stage: &'static str, signs: String, other: Option<String>, by: Option<String> },
    /// An operator's resources are this version from now on; `rolled_back_to` where they were that version's before.
    IntentApplied {
        version: u64,
        sha256: Sha256,
        author: String,
        message: String,
        rolled_back_to: Option<u64>,
        added: u32,
        changed: u32,
        removed: u32,
    },
    /// An operator ordered something for a region: `act` is `drain`, `weight 5` or `force-in`.
    OverrideSet { region: String, act: String, until: Timestamp, reason: String, author: String },
    /// An order ended; without an author, because its time was over.
    OverrideEnded { region: String, author: Option<String> },
    /// What an operator asked for was not done: `action` is `apply`, `rollback`, `override`, `lift` or `drill`.
    IntentRefused { author: String, action: &'static str, problem: String },
    /// This control node leads by the election of this epoch, or does so no more.
    LeadershipChanged { epoch: u64, leads: bool },
    /// A region was given traffic, or had it taken away, by its health or by an order; `drill` ran meanwhile.
    RegionMoved { region: String, from: String, to: String, why: String, drill: Option<String> },
    /// A region should have gone out and stays: the last one, too soon after another, or forced in by an operator.
    RegionWithheld { region: String, why: String, drill: Option<String> },
    /// A drill was announced by its controller, whom `author` runs.
    DrillBegan { drill: String, target: Option<String>, author: String },
    /// It is over: `how` its controller says, or `forgotten` if that said nothing for too long.
    DrillEnded { drill: String, target: Option<String>, author: String, how: String },
    /// A process began to write here.
    Started { process: &'static str, id: String, version: &'static str },
    /// It stopped in good order.
    Stopped,
    /// The first record of a new file; `prev` is the last hash of the one before.
    Rotated,
    /// So many records found no room in the queue and are not in the log.
    Lost { records: u64 },
    /// The process found a log that did not end with a whole record, or not where its head said.
    Recovered {
        /// What stands behind the last record, without the line break at its end: a line that a crash cut.
        bytes: u64,
        /// Of these bytes, if there are any.
        sha256: Option<Sha256>,
        /// Whether nothing else is in the file: a crash cut the record of its rotation.
        rotated: bool,
        /// What the head file named, if the log did not go so far: records were cut off.
        head: Option<Head>,
    },
}

/// A decision against somebody.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Denial {
    /// Tenant and client as their certificate names them.
    pub tenant: Option<String>,
    pub client: Option<String>,
    /// The SPIFFE id of the certificate; none if no connection came to be.
    pub id: Option<String>,
    pub model: Option<String>,
    pub version: Option<String>,
    /// What it would have been allowed by.
    pub action: Option<&'static str>,
    /// The stable `spillway-error` code.
    pub code: String,
    /// What is wrong with the certificate, if that is why.
    pub reason: Option<&'static str>,
    /// Of the first of those that are equal.
    pub request_id: Option<String>,
    pub address: Option<SocketAddr>,
}

impl Denial {
    /// Says less, so that many that differ in what the caller chose are one.
    pub fn coarse(&self) -> Self {
        let Self { tenant, client, id, code, reason, .. } = self.clone();
        // The address is all that is known of one without an identity; then there are too many of them.
        Self { tenant, client, id, code, reason, ..Self::default() }
    }

    /// What makes two of them equal: all but which request it was, and from where if it is known from whom.
    fn key(&self) -> impl Hash + Eq + '_ {
        let Self { tenant, client, id, model, version, action, code, reason, request_id: _, address } = self;
        let address = address.map(|address| address.ip()).filter(|_| id.is_none());
        (tenant, client, id, model, version, action, code, reason, address)
    }
}

/// A denial among others, of which those that are equal are one record.
#[derive(Clone, Debug)]
pub struct Folded(pub Denial);

impl PartialEq for Folded {
    fn eq(&self, other: &Self) -> bool {
        self.0.key() == other.0.key()
    }
}

impl Eq for Folded {}

impl Hash for Folded {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key().hash(state);
    }
}

/// A time in milliseconds since 1970, in text RFC 3339 in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The end of the year 9999: RFC 3339 has no later one.
    const LAST: u64 = 253_402_300_799_999;
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX).min(Self::LAST))
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (days, in_day) = (self.0 / 86_400_000, self.0 % 86_400_000);
        // civil_from_days of H. Hinnant, "chrono-Compatible Low-Level Date Algorithms": years of 365.2425
        // days that begin in March, from the year 0.
        let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let year = 400 * era + year + next;
        let (hour, minute) = (in_day / 3_600_000, in_day / 60_000 % 60);
        let (second, milli) = (in_day / 1_000 % 60, in_day % 1_000);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        // Checked with: date -u -d @SECONDS +%FT%T
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.007Z"),
            (951_782_399, "2000-02-28T23:59:59.007Z"),
            (951_782_400, "2000-02-29T00:00:00.007Z"),
            (1_772_323_200, "2026-03-01T00:00:00.007Z"),
            (4_107_542_399, "2100-02-28T23:59:59.007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.007Z"),
            (1_798_761_599, "2026-12-31T23:59:59.007Z"),
        ] {
            let time = SystemTime::UNIX_EPOCH + Duration::from_millis(seconds * 1_000 + 7);
            assert_eq!(Timestamp::from(time).to_string(), text);
        }
        assert_eq!(Timestamp(Timestamp::LAST).to_string(), "9999-12-31T23:59:59.999Z");
    }

    #[test]
    fn denials_of_one_caller_are_equal_whatever_request_it_was() {
        let denial = |id: Option<&str>, model: &str, port: u8| Denial {
            id: id.map(str::to_owned),
            model: Some(model.into()),
            request_id: Some(port.to_string()),
            address: Some(([127, 0, 0, port], port.into()).into()),
            ..Denial::default()
        };
        let (one, two) = (denial(Some("a"), "m", 1), denial(Some("a"), "m", 2));
        assert_eq!(Folded(one.clone()), Folded(two));
        assert_ne!(Folded(one.clone()), Folded(denial(Some("b"), "m", 1)));
        assert_ne!(Folded(one.clone()), Folded(denial(Some("a"), "n", 1)));
        assert_eq!(Folded(one.coarse()), Folded(denial(Some("a"), "n", 1).coarse()));
        assert_ne!(Folded(denial(None, "m", 1)), Folded(denial(None, "m", 2)), "only the address is known");
        assert_eq!(Folded(denial(None, "m", 1).coarse()), Folded(denial(None, "m", 2).coarse()));
    }
}
