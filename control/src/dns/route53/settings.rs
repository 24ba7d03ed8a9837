//! Where the records are, as a control node's settings say it.
//!
//! ```yaml
//! route53:
//!   hostedZone: Z0123456789ABCDEFGHIJ
//!   name: infer.example.com           # the service; all its A and AAAA records are ours
//!   ttl: 30s
//!   hurriedTtl: 5s
//!   addresses: 8                      # of a region
//!   credentials: {file: /etc/spillway/aws-credentials, profile: spillway}
//!   endpoint: https://route53.example # default AWS's
//! ```
//!
//! All control nodes need it: any of them may lead.

use std::net::IpAddr;
use std::path::PathBuf;

use http::Uri;
use spillway_core::failover::AnswerSettings;
use spillway_core::units::{DnsName, InvalidUnit};
use spillway_runtime::settings::{Field, FromNode, count, optional, or_default, read_optional};

use crate::dns::settings::lasting;

/// What an answer of 512 octets holds.
pub(super) const MOST_ADDRESSES: usize = 8;

#[derive(Clone, Debug, PartialEq)]
pub struct Route53Settings {
    /// Its id, without `/hostedzone/`.
    pub hosted_zone: String,
    pub name: DnsName,
    /// Defaults: 30 s, 5 s, 8.
    pub answers: AnswerSettings,
    pub credentials: CredentialsSettings,
    /// https, or http on this machine. Default AWS's.
    pub endpoint: Option<String>,
}

/// `credentials`. By default they are looked for as AWS's own tools do: in the environment (`AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), then in the shared file (`AWS_SHARED_CREDENTIALS_FILE`, or
/// `~/.aws/credentials`). Where a file or a profile is named, the environment's keys are not asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CredentialsSettings {
    pub file: Option<PathBuf>,
    /// Default: `AWS_PROFILE`, or `default`.
    pub profile: Option<String>,
}

impl FromNode for Route53Settings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = AnswerSettings::default();
        let fields = field.map();
        let hosted_zone = fields.required("hostedZone").and_then(|field| field.parse(hosted_zone));
        let name = fields.required("name").and_then(|field| field.parse(DnsName::host));
        let ttl = lasting(&fields, "ttl", default.ttl);
        let hurried_ttl = lasting(&fields, "hurriedTtl", default.hurried_ttl);
        let addresses = count(&fields, "addresses", MOST_ADDRESSES, 8);
        let credentials = or_default(&fields, "credentials", CredentialsSettings::default);
        let endpoint = read_optional(&fields, "endpoint", |field| field.parse(endpoint));
        fields.finish();
        if !cfg!(feature = "route53") {
            field.fault("this build cannot write to Route 53: build it with --features route53");
            return None;
        }
        Some(Self {
            hosted_zone: hosted_zone?,
            name: name?,
            answers: AnswerSettings { ttl: ttl?, hurried_ttl: hurried_ttl?, addresses: addresses? },
            credentials: credentials?,
            endpoint: endpoint?,
        })
    }
}

impl FromNode for CredentialsSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let file = optional(&fields, "file");
        let profile = read_optional(&fields, "profile", |field| field.parse(profile));
        fields.finish();
        Some(Self { file: file?, profile: profile? })
    }
}

fn hosted_zone(text: &str) -> Result<String, InvalidUnit> {
    let is_id = (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_id { Ok(text.to_owned()) } else { Err(InvalidUnit("the id of a hosted zone, such as Z0123456789ABCDEFGHIJ")) }
}

fn profile(text: &str) -> Result<String, InvalidUnit> {
    let is_name = !text.is_empty() && !text.contains([']', '\n']);
    if is_name { Ok(text.to_owned()) } else { Err(InvalidUnit("the name of a profile")) }
}

fn endpoint(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("https://HOST, or http:// and a loopback address");
    let uri: Uri = text.parse().map_err(|_| EXPECTED)?;
    let host = uri.host().ok_or(EXPECTED)?;
    let is_here = || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        Some("https") => Ok(text.to_owned()),
        Some("http") if is_here() => Ok(text.to_owned()),
        _ => Err(EXPECTED),
    }
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    #[cfg(feature = "route53")]
    #[test]
    fn what_is_absent_has_a_default_and_what_is_wrong_is_named() {
        let least = "hostedZone: Z1\nname: infer.example.com\n";
        let settings = parse::<Route53Settings>(least).unwrap();
        assert_eq!((settings.endpoint, settings.credentials), (None, CredentialsSettings::default()));
        assert_eq!(settings.answers.addresses, 8);
        let text = format!("{least}credentials: {{file: a, profile: b}}\nendpoint: http://127.0.0.1:5000\nttl: 1m\n");
        let settings = parse::<Route53Settings>(&text).unwrap();
        let credentials = CredentialsSettings { file: Some("a".into()), profile: Some("b".into()) };
        assert_eq!((settings.credentials, settings.answers.ttl.as_secs()), (credentials, 60));
        for (text, fault) in [
            ("name: a.example\n", "hostedZone: is missing"),
            ("hostedZone: /hostedzone/Z1\nname: a.example\n", "hostedZone: "),
            ("hostedZone: Z1\nname: 'a b'\n", "name: "),
            (&format!("{least}endpoint: http://10.0.0.1\n"), "endpoint: '"),
            (&format!("{least}endpoint: route53\n"), "endpoint: '"),
            (&format!("{least}addresses: 9\n"), "addresses: "),
            (&format!("{least}ttl: 0s\n"), "ttl: "),
            (&format!("{least}credentials: {{profile: 'a]'}}\n"), "credentials.profile: "),
            (&format!("{least}credentials: {{secret: x}}\n"), "credentials.secret: unknown key"),
        ] {
            let faults = parse::<Route53Settings>(text).unwrap_err();
            assert!(faults.iter().any(|found| found.to_string().contains(fault)), "{text}: {faults:?}");
        }
    }

    #[cfg(not(feature = "route53"))]
    #[test]
    fn a_build_without_it_says_so() {
        let faults = parse::<Route53Settings>("hostedZone: Z1\nname: infer.example.com\n").unwrap_err();
        assert!(faults[0].to_string().contains("--features route53"), "{faults:?}");
    }
}
