//! `identity.renew`: who makes our certificate anew.

use std::path::PathBuf;
use std::time::Duration;

use spillway_core::units::{InvalidUnit, parse_duration};

use crate::settings::{Field, Fields, FromNode, optional};
use crate::store::settings::host_and_port;

/// How often a new trust bundle is asked for.
const EVERY: Duration = Duration::from_secs(300);
const LONGEST: Duration = Duration::from_secs(3_600);
const MOST_SERVERS: usize = 16;

/// Whom to ask for certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenewalSettings {
    /// `servers`: the control nodes, `host:port`, 1 to 16.
    pub servers: Vec<String>,
    /// `bootstrap`: where the first certificate comes from; absent: it is put there by others.
    pub bootstrap: Option<BootstrapSettings>,
    /// `every`: how often the trust bundle is asked for, at most 1h; default 5m.
    pub every: Duration,
}

/// How a process that has no certificate gets one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapSettings {
    /// `servers`: the control nodes' ports for those without a certificate, `host:port`, 1 to 16.
    pub servers: Vec<String>,
    /// `token`: the file of the one-time token.
    pub token: PathBuf,
}

impl RenewalSettings {
    /// By these control nodes, for who has a certificate.
    pub fn by(servers: Vec<String>) -> Self {
        Self { servers, bootstrap: None, every: EVERY }
    }
}

impl FromNode for RenewalSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const EXPECTED: InvalidUnit = InvalidUnit("more than 0 and at most 1h");
        let fields = field.map();
        let servers = servers(&fields);
        let bootstrap = optional(&fields, "bootstrap");
        let every = match fields.optional("every") {
            Some(field) => field.parse(|text| match parse_duration(text)? {
                time if !time.is_zero() && time <= LONGEST => Ok(time),
                _ => Err(EXPECTED),
            }),
            None => Some(EVERY),
        };
        fields.finish();
        Some(Self { servers: servers?, bootstrap: bootstrap?, every: every? })
    }
}

impl FromNode for BootstrapSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let servers = servers(&fields);
        let token = fields.required("token").and_then(|field| PathBuf::from_node(&field));
        fields.finish();
        Some(Self { servers: servers?, token: token? })
    }
}

fn servers(fields: &Fields<'_>) -> Option<Vec<String>> {
    let field = fields.required("servers")?;
    let items = field.items();
    if items.is_empty() || items.len() > MOST_SERVERS {
        field.fault("expected 1 to 16 servers");
        return None;
    }
    items.iter().map(|item| item.parse(server)).collect()
}

fn server(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("a host and a port, such as control-0.example.net:9443");
    host_and_port(text).filter(|(host, _)| !host.contains('/')).ok_or(EXPECTED)?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::parse;

    #[test]
    fn servers_are_hosts_and_ports_and_the_first_certificate_needs_a_token() {
        let all = "servers: [control-0.example.net:9443, '[::1]:9443']\nevery: 1m\n\
                   bootstrap: {servers: ['127.0.0.1:9444'], token: /run/token}\n";
        let settings: RenewalSettings = parse(all).unwrap();
        assert_eq!((settings.servers.len(), settings.every), (2, Duration::from_secs(60)));
        assert_eq!(settings.bootstrap.unwrap().token, PathBuf::from("/run/token"));
        assert_eq!(parse::<RenewalSettings>("servers: ['127.0.0.1:1']").unwrap().every, EVERY);
        for bad in [
            "{}",
            "servers: []",
            "servers: [control]",
            "servers: ['control:port']",
            "servers: ['https://control:9443']",
            "servers: ['a:1']\nevery: 0s",
            "servers: ['a:1']\nevery: 2h",
            "servers: ['a:1']\nbootstrap: {servers: ['a:2']}",
            "servers: ['a:1']\ntoken: here",
        ] {
            assert!(parse::<RenewalSettings>(bad).is_err(), "{bad}");
        }
    }
}
