//! What a leaf may say, held against what its asker proved.
//!
//! The rule: an asker gets a leaf for the identity that it proved and for no other, with names that it was granted
//! and no others, for as long as the authority gives and no longer. Nothing else that it asks for is granted, and what
//! would be refused is not quietly left out.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use crate::identity::SpiffeId;
use crate::units::DnsName;

/// Names beside the identity: what clients dial. They identify nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub dns: BTreeSet<DnsName>,
    pub addresses: BTreeSet<IpAddr>,
}

impl Names {
    /// Of one leaf.
    pub const MOST: usize = 64;

    pub fn len(&self) -> usize {
        self.dns.len() + self.addresses.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn within(&self, other: &Self) -> bool {
        self.dns.is_subset(&other.dns) && self.addresses.is_subset(&other.addresses)
    }
}

/// What the asker proved, and what it may carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub id: SpiffeId,
    pub names: Names,
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// URI names, as they stand there.
    pub uris: Vec<String>,
    /// `None`: the request says nothing of names, and gets all that are granted.
    pub names: Option<Names>,
    /// There are names of other kinds, or some that cannot be read.
    pub other_names: bool,
    /// A certificate that signs others, or revocations.
    pub may_sign: bool,
    /// A use that is no workload's.
    pub other_use: bool,
    /// An extension that nobody here grants.
    pub other_extension: bool,
    /// `None`: what the authority gives.
    pub life: Option<Duration>,
}

/// What the leaf says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approved {
    pub id: SpiffeId,
    pub names: Names,
    pub life: Duration,
}

/// Why there is no leaf. The asker's fault; the same request is denied again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Denied {
    #[error("the request names another identity than the one that was proved")]
    OtherIdentity,
    #[error("the request names what its asker may not carry")]
    OtherNames,
    #[error("the request asks for the right to sign")]
    MaySign,
    #[error("the request asks for a use that is no workload's")]
    OtherUse,
    #[error("the request asks for an extension that is not granted")]
    OtherExtension,
    #[error("the request asks for a longer life than is given")]
    Life,
}

impl Denied {
    /// A stable word for a metric's label and the audit log.
    pub fn reason(self) -> &'static str {
        match self {
            Self::OtherIdentity => "other-identity",
            Self::OtherNames => "other-names",
            Self::MaySign => "may-sign",
            Self::OtherUse => "other-use",
            Self::OtherExtension => "other-extension",
            Self::Life => "life",
        }
    }
}

/// Judges a request; `longest` is the life that the authority gives.
pub fn judge(asked: &Asked, grant: &Grant, longest: Duration) -> Result<Approved, Denied> {
    let id = grant.id.to_string();
    if asked.uris.len() > 1 || asked.uris.iter().any(|uri| *uri != id) {
        return Err(Denied::OtherIdentity);
    }
    if asked.may_sign {
        return Err(Denied::MaySign);
    }
    if asked.other_use {
        return Err(Denied::OtherUse);
    }
    if asked.other_extension {
        return Err(Denied::OtherExtension);
    }
    let names = asked.names.as_ref().unwrap_or(&grant.names);
    if asked.other_names || !names.within(&grant.names) {
        return Err(Denied::OtherNames);
    }
    let life = asked.life.unwrap_or(longest);
    if life > longest || life.is_zero() {
        return Err(Denied::Life);
    }
    Ok(Approved { id: grant.id.clone(), names: names.clone(), life })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
