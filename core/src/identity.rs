//! Who a peer is: one SPIFFE id out of a verified certificate, read into a role.
//!
//! The rule: an id that is not exactly of a known form is no identity at all. Ids are compared
//! byte for byte; nothing is normalised (SPIFFE ID specification, sections 2.1 to 2.4).

use std::collections::BTreeSet;
use std::fmt;

use crate::units::Name;

/// A trust domain: lower-case letters, digits, `.`, `-`, `_`; at most 255 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(std::sync::Arc<str>);

impl TrustDomain {
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(InvalidId::TrustDomain);
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a peer is in the trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// `/region/<r>/gateway/<n>`
    Gateway { region: Name, name: Name },
    /// `/region/<r>/sidecar/<pool>/<pod>`
    Sidecar { region: Name, pool: Name, pod: Name },
    /// `/region/<r>/control/<n>`
    Control { region: Name, name: Name },
    /// `/region/<r>/dns/<n>`
    Dns { region: Name, name: Name },
    /// `/region/<r>/injector/<n>`
    Injector { region: Name, name: Name },
    /// `/region/<r>/loader/<n>`: who writes features.
    Loader { region: Name, name: Name },
    /// `/tenant/<t>/client/<n>`
    Client { tenant: Name, name: Name },
    /// `/operator/<n>`
    Operator { name: Name },
}

/// A whole identity: `spiffe://<trust domain>/<role path>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    pub trust_domain: TrustDomain,
    pub role: Role,
}

impl SpiffeId {
    /// A SPIFFE id has at most 2,048 bytes (section 2.3 of the specification).
    pub const MAX: usize = 2_048;

    pub fn parse(uri: &str) -> Result<Self, InvalidId> {
        if uri.len() > Self::MAX {
            return Err(InvalidId::Length);
        }
        let rest = uri.strip_prefix("spiffe://").ok_or(InvalidId::Scheme)?;
        let (domain, path) = rest.split_once('/').ok_or(InvalidId::Path)?;
        let trust_domain = TrustDomain::parse(domain)?;
        let name = |segment: &str| Name::parse(segment).map_err(|_| InvalidId::Path);
        let segments: Vec<&str> = path.split('/').collect();
        let role = match segments[..] {
            ["region", region, "gateway", n] => Role::Gateway { region: name(region)?, name: name(n)? },
            ["region", region, "sidecar", pool, pod] => {
                Role::Sidecar { region: name(region)?, pool: name(pool)?, pod: name(pod)? }
            }
            ["region", region, "control", n] => Role::Control { region: name(region)?, name: name(n)? },
            ["region", region, "dns", n] => Role::Dns { region: name(region)?, name: name(n)? },
            ["region", region, "injector", n] => Role::Injector { region: name(region)?, name: name(n)? },
            ["region", region, "loader", n] => Role::Loader { region: name(region)?, name: name(n)? },
            ["tenant", tenant, "client", n] => Role::Client { tenant: name(tenant)?, name: name(n)? },
            ["operator", n] => Role::Operator { name: name(n)? },
            _ => return Err(InvalidId::Path),
        };
        Ok(Self { trust_domain, role })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.trust_domain)?;
        match &self.role {
            Role::Gateway { region, name } => write!(f, "/region/{region}/gateway/{name}"),
            Role::Sidecar { region, pool, pod } => write!(f, "/region/{region}/sidecar/{pool}/{pod}"),
            Role::Control { region, name } => write!(f, "/region/{region}/control/{name}"),
            Role::Dns { region, name } => write!(f, "/region/{region}/dns/{name}"),
            Role::Injector { region, name } => write!(f, "/region/{region}/injector/{name}"),
            Role::Loader { region, name } => write!(f, "/region/{region}/loader/{name}"),
            Role::Client { tenant, name } => write!(f, "/tenant/{tenant}/client/{name}"),
            Role::Operator { name } => write!(f, "/operator/{name}"),
        }
    }
}

/// Whom a client wants to reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExpectedPeer {
    Exactly(SpiffeId),
    /// Whichever sidecar of a pool it is.
    SidecarOf {
        trust_domain: TrustDomain,
        region: Name,
        pool: Name,
    },
    /// Whichever gateway of a region it is.
    GatewayOf {
        trust_domain: TrustDomain,
        region: Name,
    },
    /// Whichever control node it is.
    ControlOf {
        trust_domain: TrustDomain,
    },
}

impl ExpectedPeer {
    pub fn includes(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exactly(expected) => expected == id,
            Self::SidecarOf { trust_domain, region, pool } => {
                let in_pool = matches!(&id.role, Role::Sidecar { region: r, pool: p, .. } if r == region && p == pool);
                in_pool && id.trust_domain == *trust_domain
            }
            Self::GatewayOf { trust_domain, region } => {
                matches!(&id.role, Role::Gateway { region: r, .. } if r == region) && id.trust_domain == *trust_domain
            }
            Self::ControlOf { trust_domain } => {
                matches!(id.role, Role::Control { .. }) && id.trust_domain == *trust_domain
            }
        }
    }
}

impl From<SpiffeId> for ExpectedPeer {
    fn from(id: SpiffeId) -> Self {
        Self::Exactly(id)
    }
}

impl fmt::Display for ExpectedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(id) => id.fmt(f),
            Self::SidecarOf { trust_domain, region, pool } => {
                write!(f, "spiffe://{trust_domain}/region/{region}/sidecar/{pool}/*")
            }
            Self::GatewayOf { trust_domain, region } => write!(f, "spiffe://{trust_domain}/region/{region}/gateway/*"),
            Self::ControlOf { trust_domain } => write!(f, "spiffe://{trust_domain}/region/*/control/*"),
        }
    }
}

/// A certificate's serial number: its bytes, without leading zeros.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// A serial number has at most 20 bytes (RFC 5280, section 4.1.2.2).
    pub const MAX: usize = 20;

    /// As it stands in the certificate.
    pub fn new(bytes: &[u8]) -> Self {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Self(bytes[zeros..].to_vec())
    }

    /// Hexadecimal digits in pairs, which colons may separate, as openssl writes them.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let pair = |pair: &[u8]| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?);
        let bytes: Vec<u8> = digits.chunks(2).map(pair).collect::<Option<_>>()?;
        let serial = Self::new(&bytes);
        (!serial.0.is_empty() && serial.0.len() <= Self::MAX).then_some(serial)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The certificates that are trusted no more although their chain is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    pub serials: BTreeSet<Serial>,
    pub ids: BTreeSet<SpiffeId>,
}

impl Revoked {
    pub fn includes(&self, id: &SpiffeId, serial: &Serial) -> bool {
        self.ids.contains(id) || self.serials.contains(serial)
    }
}

/// The peer's certificate names no identity that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("a SPIFFE id begins with spiffe:// in lower case")]
    Scheme,
    #[error("the trust domain is 1 to 255 of a-z 0-9 . - _")]
    TrustDomain,
    #[error(
        "the path is /region/R/gateway/N, /region/R/sidecar/POOL/POD, /region/R/control/N, /region/R/dns/N, /region/R/injector/N, /region/R/loader/N, /tenant/T/client/N or /operator/N"
    )]
    Path,
    #[error("a SPIFFE id has at most 2048 bytes")]
    Length,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_compared_as_numbers() {
        let serial = Serial::new(&[0, 0x0a, 0x1b]);
        assert_eq!(Serial::parse("0A:1b"), Some(serial.clone()));
        assert_eq!(Serial::parse("000a1b"), Some(serial.clone()));
        assert_eq!(serial.to_string(), "0a1b");
        for bad in ["", "0", "00", "a", "0g", "0x0a", &"ff".repeat(21)] {
            assert_eq!(Serial::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_expected_peer_is_one_or_any_sidecar_of_one_pool() {
        let id = |path: &str| SpiffeId::parse(&format!("spiffe://{path}")).unwrap();
        let name = |text| Name::parse(text).unwrap();
        let pod = id("td/region/eu/sidecar/scorers/pod-0");
        let other = id("td/region/eu/sidecar/scorers/pod-1");
        let exactly = ExpectedPeer::from(pod.clone());
        assert!(exactly.includes(&pod) && !exactly.includes(&other));
        let (trust_domain, region, pool) = (pod.trust_domain.clone(), name("eu"), name("scorers"));
        let any = ExpectedPeer::SidecarOf { trust_domain, region, pool };
        assert_eq!(any.to_string(), "spiffe://td/region/eu/sidecar/scorers/*");
        assert!(any.includes(&pod) && any.includes(&other));
        for stranger in [
            "other/region/eu/sidecar/scorers/pod-0",
            "td/region/us/sidecar/scorers/pod-0",
            "td/region/eu/sidecar/rankers/pod-0",
            "td/region/eu/gateway/scorers",
            "td/tenant/scorers/client/pod-0",
        ] {
            assert!(!any.includes(&id(stranger)), "{stranger}");
        }
        let gateway = ExpectedPeer::GatewayOf { trust_domain: pod.trust_domain.clone(), region: name("eu") };
        assert_eq!(gateway.to_string(), "spiffe://td/region/eu/gateway/*");
        assert!(gateway.includes(&id("td/region/eu/gateway/one")));
        for stranger in ["td/region/us/gateway/one", "other/region/eu/gateway/one", "td/region/eu/control/one"] {
            assert!(!gateway.includes(&id(stranger)), "{stranger}");
        }
        let control = ExpectedPeer::ControlOf { trust_domain: pod.trust_domain.clone() };
        assert_eq!(control.to_string(), "spiffe://td/region/*/control/*");
        assert!(control.includes(&id("td/region/eu/control/one")) && control.includes(&id("td/region/us/control/two")));
        for stranger in [
            "other/region/eu/control/one",
            "td/region/eu/dns/one",
            "td/region/eu/gateway/one",
            "td/region/eu/sidecar/scorers/pod-0",
            "td/operator/one",
        ] {
            assert!(!control.includes(&id(stranger)), "{stranger}");
        }
    }

    #[test]
    fn ids_round_trip() {
        for id in [
            "spiffe://spillway.test/region/eu-west/gateway/gw-0",
            "spiffe://spillway.test/region/eu-west/sidecar/scorers/pod-0",
            "spiffe://spillway.test/region/eu-west/control/c1",
            "spiffe://spillway.test/region/eu-west/dns/d1",
            "spiffe://spillway.test/region/eu-west/injector/rack-4",
            "spiffe://spillway.test/region/eu-west/loader/nightly",
            "spiffe://spillway.test/tenant/acme/client/web",
            "spiffe://spillway.test/operator/alice",
        ] {
            assert_eq!(SpiffeId::parse(id).unwrap().to_string(), id);
        }
    }

    #[test]
    fn t46_malformed_ids_are_no_identity() {
        for id in [
            "",
            "SPIFFE://td/tenant/a/client/b",
            "Spiffe://td/tenant/a/client/b",
            "https://td/tenant/a/client/b",
            "spiffe://td",
            "spiffe:///tenant/a/client/b",
            "spiffe://TD/tenant/a/client/b",
            "spiffe://td:8443/tenant/a/client/b",
            "spiffe://user@td/tenant/a/client/b",
            "spiffe://td/tenant/a/client/b/",
            "spiffe://td/tenant//client/b",
            "spiffe://td/tenant/./client/b",
            "spiffe://td/tenant/../client/b",
            "spiffe://td/tenant/%61/client/b",
            "spiffe://td/tenant/a/client/b?x=1",
            "spiffe://td/tenant/a/client/b#x",
            "spiffe://td/tenant/a/client",
            "spiffe://td/tenant/a/admin/b",
            "spiffe://td/operator",
            "spiffe://td/operator/",
            "spiffe://td/operator/a/b",
            "spiffe://td/region/eu/operator/a",
            "spiffe://td/region/eu/dns",
            "spiffe://td/dns/a",
            " spiffe://td/tenant/a/client/b",
        ] {
            assert!(SpiffeId::parse(id).is_err(), "{id:?}");
        }
        assert_eq!(SpiffeId::parse(&format!("spiffe://td/{}", "a".repeat(2_048))), Err(InvalidId::Length));
    }
}
