//! The one form of a row's key in every tier: `{<owner>:<entity>}:<group>`.
//!
//! `owner` is `s` for a shared group, `t<length>:<tenant>` for a tenant's own. The entity is encoded:
//! letters, digits, `-`, `_` and `.` stand for themselves, every other byte is `%` and two hexadecimal
//! digits. So nothing in an entity id or a tenant can end the braces, the owner or the line, different
//! ids never share a key, and ids are compared byte for byte (no Unicode normalisation).
//!
//! In a Redis cluster the braces make all groups of one entity share a hash slot.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::resource::Scope;
use crate::units::Name;

/// An entity id has 1 to 256 bytes.
pub const MAX_ENTITY: usize = 256;

/// The key of one entity's row in one group.
#[derive(Clone)]
pub struct RowKey {
    text: Arc<str>,
    /// Where the closing brace is.
    brace: usize,
}

impl RowKey {
    /// `tenant` is looked at only if the group's entities are a tenant's own.
    pub fn new(scope: Scope, tenant: &str, entity: &[u8], group: &Name) -> Result<Self, InvalidKey> {
        let mut text = String::with_capacity(entity.len() + tenant.len() + group.as_str().len() + 16);
        let brace = Self::write(&mut text, scope, tenant, entity, group)?;
        Ok(Self { text: text.into(), brace })
    }

    /// Writes a key's text over `text` and returns where its closing brace is: for a look-up that
    /// allocates nothing.
    pub fn write(
        text: &mut String,
        scope: Scope,
        tenant: &str,
        entity: &[u8],
        group: &Name,
    ) -> Result<usize, InvalidKey> {
        if entity.is_empty() || entity.len() > MAX_ENTITY {
            return Err(InvalidKey::Entity);
        }
        text.clear();
        text.push('{');
        match scope {
            Scope::Shared => text.push('s'),
            Scope::Tenant => {
                Name::parse(tenant).map_err(|_| InvalidKey::Tenant)?;
                text.push('t');
                text.push_str(&tenant.len().to_string());
                text.push(':');
                text.push_str(tenant);
            }
        }
        text.push(':');
        for &byte in entity {
            push_encoded(text, byte);
        }
        let brace = text.len();
        text.push_str("}:");
        text.push_str(group.as_str());
        Ok(brace)
    }

    /// A key out of a text that [`Self::write`] made.
    pub fn of_written(text: &str, brace: usize) -> Self {
        Self { text: text.into(), brace: brace.min(text.len()) }
    }

    /// Reads a key that another process sent.
    pub fn parse(text: &str) -> Option<Self> {
        let brace = text.find('}')?;
        let group = text.get(brace..)?.strip_prefix("}:")?;
        (text.starts_with('{') && Name::parse(group).is_ok()).then(|| Self { text: text.into(), brace })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Owner and entity: the partition key.
    pub fn entity(&self) -> &str {
        self.text.get(1..self.brace).unwrap_or_default()
    }

    pub fn group(&self) -> &str {
        self.text.get(self.brace + 2..).unwrap_or_default()
    }
}

// By text alone, as `Borrow<str>` demands; where the brace is follows from the text.
impl PartialEq for RowKey {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for RowKey {}

impl PartialOrd for RowKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for RowKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl Hash for RowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl std::borrow::Borrow<str> for RowKey {
    fn borrow(&self) -> &str {
        &self.text
    }
}

/// Entity ids are somebody's; they stay out of logs.
impl fmt::Debug for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RowKey(…:{})", self.group())
    }
}

fn push_encoded(text: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
        text.push(char::from(byte));
    } else {
        text.push('%');
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// The caller's fault; sending it again unchanged is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    #[error("an entity id has 1 to 256 bytes")]
    Entity,
    #[error("the group's entities belong to tenants, and the tenant is missing or no valid name")]
    Tenant,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn group() -> Name {
        Name::parse("site").unwrap()
    }

    #[test]
    fn keys_read_as_written() {
        let key = RowKey::new(Scope::Tenant, "acme", b"user 7", &group()).unwrap();
        assert_eq!(key.as_str(), "{t4:acme:user%207}:site");
        assert_eq!((key.entity(), key.group()), ("t4:acme:user%207", "site"));
        assert_eq!(RowKey::parse(key.as_str()), Some(key.clone()));
        assert!(HashSet::from([key]).contains("{t4:acme:user%207}:site"), "found by its text");
        assert_eq!(RowKey::new(Scope::Shared, "", b"a.b", &group()).unwrap().as_str(), "{s:a.b}:site");
    }

    #[test]
    fn t42_entities_are_bounded_and_escape_nothing() {
        for entity in [&b""[..], &[b'a'; 257], &vec![b'a'; 1 << 20]] {
            assert_eq!(RowKey::new(Scope::Shared, "", entity, &group()), Err(InvalidKey::Entity));
        }
        let hostile: [&[u8]; 8] = [
            b"a\r\nDEL x",
            b"a\0b",
            b"a:b",
            b"}:site",
            b"{t4:acme:x}",
            b"'; DROP TABLE features; --\"",
            "\u{202e}rtl".as_bytes(),
            b"%41",
        ];
        for entity in hostile {
            let key = RowKey::new(Scope::Tenant, "globex", entity, &group()).unwrap();
            assert!(key.as_str().starts_with("{t6:globex:"), "{entity:?}");
            let inner = key.entity();
            let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.%:".contains(&byte);
            assert!(inner.bytes().all(safe), "{inner}");
            assert_eq!(inner.matches(':').count(), 2, "only the two that we put: {inner}");
            assert_eq!(key.as_str().matches(['{', '}']).count(), 2);
        }
        for tenant in ["", "a}b", "acme:x", "a b", "{"] {
            assert_eq!(RowKey::new(Scope::Tenant, tenant, b"x", &group()), Err(InvalidKey::Tenant), "{tenant:?}");
        }
    }

    #[test]
    fn t43_entities_are_compared_byte_for_byte() {
        let composed = RowKey::new(Scope::Shared, "", "é".as_bytes(), &group()).unwrap();
        let decomposed = RowKey::new(Scope::Shared, "", "e\u{301}".as_bytes(), &group()).unwrap();
        assert_ne!(composed, decomposed);
        assert_ne!(
            RowKey::new(Scope::Shared, "", b"A", &group()).unwrap(),
            RowKey::new(Scope::Shared, "", b"a", &group()).unwrap()
        );
    }

    #[test]
    fn every_byte_has_its_own_encoding() {
        let keys: HashSet<_> = (0..=255)
            .map(|byte| RowKey::new(Scope::Shared, "", &[byte], &group()).unwrap().as_str().to_owned())
            .collect();
        assert_eq!(keys.len(), 256);
    }

    proptest! {
        #[test]
        fn different_owners_or_entities_never_share_a_key(
            a in proptest::collection::vec(any::<u8>(), 1..=8),
            b in proptest::collection::vec(any::<u8>(), 1..=8),
            tenants in ("[a-z]{1,3}", "[a-z]{1,3}"),
            scopes in (any::<bool>(), any::<bool>()),
        ) {
            let scope = |tenant| if tenant { Scope::Tenant } else { Scope::Shared };
            let first = RowKey::new(scope(scopes.0), &tenants.0, &a, &group()).unwrap();
            let second = RowKey::new(scope(scopes.1), &tenants.1, &b, &group()).unwrap();
            let same = a == b && scopes.0 == scopes.1 && (!scopes.0 || tenants.0 == tenants.1);
            prop_assert_eq!(first == second, same);
        }

        #[test]
        fn texts_of_others_never_panic(text in ".{0,40}") {
            if let Some(key) = RowKey::parse(&text) {
                prop_assert_eq!(key.as_str(), text.as_str());
                let _ = (key.entity(), key.group());
            }
        }
    }
}
