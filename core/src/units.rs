//! Units as operators write them. A bare number is never a duration or a size.

use std::fmt;
use std::time::Duration;

/// A name of a resource: 1 to 63 of `A-Z a-z 0-9 . _ -`, starting and ending with a letter or digit.
///
/// The alphabet is what is safe in a URL path segment, a SPIFFE path, a metric label and a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(std::sync::Arc<str>);

impl Name {
    pub const MAX: usize = 63;

    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let bytes = text.as_bytes();
        if edge(bytes.first()) && edge(bytes.last()) && bytes.len() <= Self::MAX && bytes.iter().all(inner) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidUnit(
                "a name: 1 to 63 letters, digits, '.', '_' or '-', beginning and ending with a letter or digit",
            ))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A whole name in the DNS, in lower case and without the dot at its end. No search list applies to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(std::sync::Arc<str>);

impl DnsName {
    /// Octets of a name as text (RFC 1035, section 2.3.4), and of one of its labels.
    const MAX: usize = 253;
    const MAX_LABEL: usize = 63;

    /// The name of a host (RFC 1123, section 2.1): what ends in digits alone is an address, not a name.
    pub fn host(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit(
            "a DNS name: labels of 1 to 63 letters, digits or inner '-', 253 in all, the last not of digits alone",
        );
        let name = Self::normal(text);
        let digits = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
        let numeric = name.rsplit('.').next().is_none_or(digits);
        if numeric || name.len() > Self::MAX || !name.split('.').all(Self::is_label) {
            return Err(EXPECTED);
        }
        Ok(Self(name.into()))
    }

    /// The name of SRV records of a service over TCP (RFC 2782).
    pub fn service(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit =
            InvalidUnit("the name of a service over TCP, such as _oip._tcp.scorers.example.net");
        let name = Self::normal(text);
        let (service, domain) = name.split_once("._tcp.").ok_or(EXPECTED)?;
        let label = service.strip_prefix('_').ok_or(EXPECTED)?;
        if !Self::is_label(label) || service.len() > Self::MAX_LABEL || name.len() > Self::MAX {
            return Err(EXPECTED);
        }
        Self::host(domain).map_err(|_| EXPECTED)?;
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn normal(text: &str) -> String {
        text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase()
    }

    fn is_label(label: &str) -> bool {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let edges = !label.is_empty() && !label.starts_with('-') && !label.ends_with('-');
        edges && label.len() <= Self::MAX_LABEL && label.bytes().all(inner)
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A count of bytes, written `512B`, `64KiB`, `16MiB`, `2GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit("a size with its unit: B, KiB, MiB or GiB, such as 64KiB");
        let (number, unit) = split_unit(text).ok_or(EXPECTED)?;
        let factor: u64 = match unit {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(EXPECTED),
        };
        number.checked_mul(factor).map(Self).ok_or(EXPECTED)
    }

    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n > 0 && n % (1 << 30) == 0 => write!(f, "{}GiB", n >> 30),
            n if n > 0 && n % (1 << 20) == 0 => write!(f, "{}MiB", n >> 20),
            n if n > 0 && n % (1 << 10) == 0 => write!(f, "{}KiB", n >> 10),
            n => write!(f, "{n}B"),
        }
    }
}

/// A rate, written `100/s`, `60/m` or `1000/h`; more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub count: u64,
    pub per: Duration,
}

impl Rate {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit("a rate of at least 1, per s, m or h, such as 100/s");
        let (count, unit) = split_unit(text).ok_or(EXPECTED)?;
        let per = match unit {
            "/s" => 1,
            "/m" => 60,
            "/h" => 3_600,
            _ => return Err(EXPECTED),
        };
        if count == 0 || count > Self::MOST { Err(EXPECTED) } else { Ok(Self { count, per: Duration::from_secs(per) }) }
    }

    /// Above any that a gateway can serve, and small enough to count in.
    const MOST: u64 = 1_000_000_000;

    pub fn per_second(self) -> f64 {
        self.count as f64 / self.per.as_secs_f64()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per.as_secs() {
            60 => "m",
            3_600 => "h",
            _ => "s",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

/// A share of a whole, written `10%` or `0.5%`, up to `100%`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Percent(f64);

impl Percent {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit("a share from 0% to 100%, such as 2.5%");
        let number = text.strip_suffix('%').ok_or(EXPECTED)?;
        let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let percent = number.parse::<f64>().ok().filter(|percent| plain && (0.0..=100.0).contains(percent));
        percent.map(|percent| Self(percent / 100.0)).ok_or(EXPECTED)
    }

    /// From 0 to 1.
    pub fn ratio(self) -> f64 {
        self.0
    }
}

/// Reads a duration: a whole number with `us`, `ms`, `s`, `m`, `h` or `d`, such as `250ms`.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("a duration with its unit: us, ms, s, m, h or d, such as 250ms");
    let (number, unit) = split_unit(text).ok_or(EXPECTED)?;
    let micros: u64 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return Err(EXPECTED),
    };
    number.checked_mul(micros).map(Duration::from_micros).ok_or(EXPECTED)
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    Some((text.get(..digits)?.parse().ok()?, &text[digits..]))
}

/// A text that is not what its field wants; says what the field wants.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct InvalidUnit(pub &'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_duration("24h").unwrap(), Duration::from_secs(86_400));
        for bad in ["", "5", "ms", "-5s", "1.5s", "5 s", "5S", "99999999999999999999s", "18446744073709551615d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_need_a_binary_unit() {
        assert_eq!(ByteSize::parse("64KiB").unwrap(), ByteSize(65_536));
        assert_eq!(ByteSize::parse("3MiB").unwrap().to_string(), "3MiB");
        for bad in ["", "64", "64KB", "64k", "-1B", "17179869185GiB"] {
            assert!(ByteSize::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rates_and_shares_need_their_unit() {
        assert_eq!(Rate::parse("90/m").unwrap().per_second(), 1.5);
        assert_eq!(Rate::parse("1000/h").unwrap().to_string(), "1000/h");
        for bad in ["", "5", "/s", "0/s", "-1/s", "5/d", "1.5/s", "1000000001/s"] {
            assert!(Rate::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Percent::parse("2.5%").unwrap().ratio(), 0.025);
        for bad in ["", "5", "%", "-1%", "101%", "1e1%", "nan%", "inf%", "1.2.3%"] {
            assert!(Percent::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn dns_names_are_whole_names_of_hosts_or_of_services_over_tcp() {
        let longest = format!("{}{}", "a.".repeat(96), "b".repeat(63));
        assert_eq!(
            DnsName::host("Scorers.models.svc.Cluster.local.").unwrap().as_str(),
            "scorers.models.svc.cluster.local"
        );
        for good in ["scorers", "a.b-c.d1", "1.example", "xn--bcher-kva.example", &longest[2..]] {
            assert_eq!(DnsName::host(good).unwrap().as_str(), good);
        }
        let too_long = format!("{}.a", "a".repeat(64));
        for bad in [
            "", ".", "a..b", ".a", "-a.b", "a-.b", "a_b", "a b", "10.0.0.7", "a.7", "fd00::7", "ä.b", "*.a", &longest,
            &too_long,
        ] {
            assert!(DnsName::host(bad).is_err(), "{bad:?}");
        }
        assert_eq!(DnsName::service("_OIP._tcp.scorers.").unwrap().as_str(), "_oip._tcp.scorers");
        for bad in
            ["scorers", "oip._tcp.scorers", "_oip._udp.scorers", "_oip._tcp", "__oip._tcp.a", "_a.b._tcp.c", "_._tcp.a"]
        {
            assert!(DnsName::service(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_safe_in_paths_labels_and_ids() {
        for good in ["a", "eu-west", "resnet50_v1.5", "A9"] {
            assert_eq!(Name::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", ".", "..", "a/b", "a b", "ä", &"a".repeat(64), "a\n"] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
    }
}
