//! What one region's gateway tells another's of a request that it forwards, and whether that is believed.
//!
//! The rule: only a gateway of another region speaks for a client, about one path of one region, for a few seconds.
//! What was forwarded stays where it came: one border is the most. Who the client is and what it may do is judged
//! here as if it had come itself: its certificate, its tenant's residence, and after that its policies.
//!
//! That the words are the sender's is proved elsewhere, by the key of its own certificate.

use std::time::Duration;

use crate::identity::{Role, Serial, SpiffeId};
use crate::limit::Class;
use crate::policy::{Denied, Principal, principal};
use crate::snapshot::Snapshot;
use crate::units::Name;

/// How long a passage holds: forwarding takes a round trip, and a connect at worst.
pub const LIFE: Duration = Duration::from_secs(5);
/// How far the clocks of two regions may be apart.
pub const SKEW: Duration = Duration::from_secs(5);

/// What is told. Times are since the Unix epoch, in whole milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    pub client: SpiffeId,
    /// Of the client's certificate.
    pub serial: Serial,
    /// When the client's certificate ends.
    pub not_after: Duration,
    /// What the request was granted where it came in.
    pub class: Class,
    pub from: Name,
    pub to: Name,
    pub path: String,
    pub request_id: String,
    pub issued: Duration,
    pub expires: Duration,
    /// Borders that it crosses with this: 1.
    pub hops: u32,
}

/// Where and how a passage came.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub snapshot: &'a Snapshot,
    /// The region that it came to.
    pub region: &'a Name,
    /// Whom the connection belongs to.
    pub sender: &'a SpiffeId,
    pub path: &'a str,
    /// Since the Unix epoch.
    pub now: Duration,
}

/// Why nobody is let through. The sender's fault, or its client's; the same again is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPassage {
    #[error("what a gateway says of the request cannot be read")]
    Unreadable,
    #[error("what a gateway says of the request is not signed by it")]
    Unsigned,
    #[error("only gateways of other regions forward requests, and only in their own region's name")]
    Stranger,
    #[error("the request was forwarded to another region or for another method")]
    Elsewhere,
    #[error("the request was forwarded already")]
    Twice,
    #[error("what a gateway says of the request is too old, or from the future")]
    Stale,
    #[error("the client's certificate has expired or is revoked")]
    Client,
    #[error("the tenant's requests may not be answered in this region")]
    Residence,
    #[error(transparent)]
    Denied(#[from] Denied),
}

impl NoPassage {
    /// The stable `spillway-error` code.
    pub fn code(self) -> &'static str {
        match self {
            Self::Unreadable => "forwarded-unreadable",
            Self::Unsigned => "forwarded-unsigned",
            Self::Stranger => "forwarded-by-stranger",
            Self::Elsewhere => "forwarded-elsewhere",
            Self::Twice => "forwarded-twice",
            Self::Stale => "forwarded-stale",
            Self::Client => "forwarded-untrusted",
            Self::Residence => "forwarded-residence",
            Self::Denied(denied) => denied.code(),
        }
    }
}

impl Passage {
    /// Whom the request is from, if it may be answered here.
    pub fn admit(&self, arrival: &Arrival<'_>) -> Result<Principal, NoPassage> {
        let Arrival { snapshot, region, sender, path, now } = *arrival;
        let own = snapshot.regions.get(region).ok_or(NoPassage::Stranger)?;
        let Role::Gateway { region: origin, .. } = &sender.role else { return Err(NoPassage::Stranger) };
        let is_known = origin != region && snapshot.regions.contains_key(origin);
        if !is_known || *origin != self.from || sender.trust_domain != own.trust_domain {
            return Err(NoPassage::Stranger);
        }
        if self.to != *region || self.path != path {
            return Err(NoPassage::Elsewhere);
        }
        if self.hops != 1 {
            return Err(NoPassage::Twice);
        }
        let lives = self.expires >= self.issued && self.expires - self.issued <= LIFE;
        if !lives || self.issued > now.saturating_add(SKEW) || now > self.expires.saturating_add(SKEW) {
            return Err(NoPassage::Stale);
        }
        self.admit_client(snapshot, region, now)
    }

    /// The same of the client alone: for what goes on after it was let in.
    pub fn admit_client(&self, snapshot: &Snapshot, region: &Name, now: Duration) -> Result<Principal, NoPassage> {
        if now > self.not_after || snapshot.revoked.includes(&self.client, &self.serial) {
            return Err(NoPassage::Client);
        }
        let principal = principal(snapshot, region, &self.client)?;
        let tenant = snapshot.tenants.get(&principal.tenant).ok_or(Denied::UnknownTenant)?;
        if tenant.may_leave_region.permits(region) { Ok(principal) } else { Err(NoPassage::Residence) }
    }
}

#[cfg(test)]
#[path = "passage_tests.rs"]
mod tests;
