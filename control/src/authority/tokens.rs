//! One-time tokens: who has one may have the first certificate of the identity that it is for.
//!
//! ```text
//! open --redeemed: one fenced commit--> used by one key --its time is over--> gone
//! ```
//!
//! The rule: a token is used once. It is bound to the key of who comes first, in a commit that can be won by one alone.
//! The same key may ask again within [`RETRY`], since its answer may have been lost; another key never. The store has
//! only the token's hash, so who reads the store cannot use it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use spillway_core::authority::request::{Grant, Names};
use spillway_core::identity::SpiffeId;
use spillway_core::units::DnsName;

use super::refusal::{BadToken, Refusal};
use crate::store::{Condition, Fence, MOST_WRITES, Store, StoreError, Write};

const PREFIX: &str = "tokens/";
/// How long who redeemed a token may ask again.
pub const RETRY: Duration = Duration::from_secs(60);
/// Tokens that are open or were used, until their time is over.
const MOST: usize = 2_000;
/// A token is 256 random bits.
const BYTES: usize = 32;
/// How often a commit is tried that somebody else's came before.
const ATTEMPTS: usize = 3;

/// What an operator said of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub grant: Grant,
    pub until: SystemTime,
    pub by: SpiffeId,
}

/// A token in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    id: String,
    dns: Vec<String>,
    addresses: Vec<IpAddr>,
    until_ms: u64,
    by: String,
    used: Option<Used>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Used {
    /// SHA-256 of the public key.
    key: String,
    at_ms: u64,
}

/// A token that proves something, not redeemed yet.
#[derive(Debug)]
pub(super) struct Found {
    pub grant: Grant,
    key: String,
    record: Record,
    revision: u64,
}

/// Makes a token and gives its text, which is kept nowhere.
pub(super) async fn create(store: &Store, fence: &Fence, order: &Order, now: SystemTime) -> Result<String, Refusal> {
    let known = store.list(PREFIX).await?;
    let expired = known.iter().filter(|(_, value)| record(&value.bytes).is_none_or(|record| record.has_ended(now)));
    let expired: Vec<&String> = expired.map(|(key, _)| key).collect();
    if known.len() - expired.len() >= MOST {
        return Err(Refusal::Busy);
    }
    let token = hex(&rand::random::<[u8; BYTES]>());
    let record = Record {
        id: order.grant.id.to_string(),
        dns: order.grant.names.dns.iter().map(ToString::to_string).collect(),
        addresses: order.grant.names.addresses.iter().copied().collect(),
        until_ms: milliseconds(order.until),
        by: order.by.to_string(),
        used: None,
    };
    let key = key(&token);
    let mut writes = vec![Write::Put(key.clone(), encode(&record))];
    writes.extend(expired.into_iter().take(MOST_WRITES - 1).map(|key| Write::Delete(key.clone())));
    store.commit(fence, &[Condition::Absent(key)], writes).await?;
    Ok(token)
}

/// What a token proves, if it is one. `asker` is the fingerprint of the key that the certificate is for.
pub(super) async fn find(store: &Store, token: &str, asker: &[u8; 32], now: SystemTime) -> Result<Found, Refusal> {
    let key = key(token);
    let value = store.get(&key).await?.ok_or(BadToken::Unknown)?;
    let corrupt = || StoreError::Corrupt { key: key.clone() };
    let record = record(&value.bytes).ok_or_else(corrupt)?;
    if record.has_ended(now) {
        return Err(BadToken::Unknown.into());
    }
    if !record.may_be_used_by(asker, now) {
        return Err(BadToken::Used.into());
    }
    let grant = record.grant().ok_or_else(corrupt)?;
    Ok(Found { grant, key, record, revision: value.revision })
}

impl Found {
    /// Binds the token to this key. Of many at once, one wins.
    pub async fn redeem(self, store: &Store, fence: &Fence, asker: &[u8; 32], now: SystemTime) -> Result<(), Refusal> {
        let Self { key, mut record, mut revision, .. } = self;
        for _ in 0..ATTEMPTS {
            if record.used.is_some() {
                return if record.may_be_used_by(asker, now) { Ok(()) } else { Err(BadToken::Used.into()) };
            }
            let used = Some(Used { key: hex(asker), at_ms: milliseconds(now) });
            let write = Write::Put(key.clone(), encode(&Record { used, ..record.clone() }));
            match store.commit(fence, &[Condition::At(key.clone(), revision)], vec![write]).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
            let value = store.get(&key).await?.ok_or(BadToken::Unknown)?;
            record = self::record(&value.bytes).ok_or_else(|| StoreError::Corrupt { key: key.clone() })?;
            revision = value.revision;
        }
        Err(Refusal::Busy)
    }
}

impl Record {
    fn has_ended(&self, now: SystemTime) -> bool {
        milliseconds(now) >= self.until_ms
    }

    fn may_be_used_by(&self, asker: &[u8; 32], now: SystemTime) -> bool {
        self.used.as_ref().is_none_or(|used| {
            let since = milliseconds(now).saturating_sub(used.at_ms);
            used.key == hex(asker) && Duration::from_millis(since) <= RETRY
        })
    }

    fn grant(&self) -> Option<Grant> {
        let dns: Option<BTreeSet<DnsName>> = self.dns.iter().map(|name| DnsName::host(name).ok()).collect();
        let names = Names { dns: dns?, addresses: self.addresses.iter().copied().collect() };
        Some(Grant { id: SpiffeId::parse(&self.id).ok()?, names })
    }
}

fn record(bytes: &[u8]) -> Option<Record> {
    serde_json::from_slice(bytes).ok()
}

fn encode(record: &Record) -> bytes::Bytes {
    serde_json::to_vec(record).expect("texts and numbers are JSON").into()
}

fn key(token: &str) -> String {
    format!("{PREFIX}{}", hex(&Sha256::digest(token)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Into a text it never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
