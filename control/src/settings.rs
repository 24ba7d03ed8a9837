//! A control node's own settings file.
//!
//! ```yaml
//! region: eu-west
//! name: c-0
//! identity: {certificate: leaf.pem, key: leaf.key, trustBundle: bundle.pem}
//! listen: 0.0.0.0:7443
//! advertise: 10.0.4.1:7443          # where other control nodes reach it
//! store: {sqlite: control.db}       # or etcd: {endpoints, identity, prefix}
//! operators: [alice, bob]           # or any
//! health: {profile: standard}      # how regions are judged: see verdicts/settings.rs
//! rollout: {canaryDwell: 30s}       # how new versions spread: see distribution/settings.rs
//! route53: {hostedZone: Z0123456789ABCDEFGHIJ, name: infer.example.com} # see dns/route53/settings.rs
//! authority: {folder: authority, bootstrap: 0.0.0.0:7444}
//! admin: 127.0.0.1:9090
//! audit: audit.log
//! drainTimeout: 10s
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use spillway_core::resource::yaml;
use spillway_core::units::{InvalidUnit, Name};
use spillway_runtime::admin::AdminSettings;
use spillway_runtime::audit::AuditSettings;
use spillway_runtime::renewal::RenewalSettings;
use spillway_runtime::settings::{
    Field, FromNode, drain_timeout, optional, or_default, read_identity, read_optional, required,
};
use spillway_runtime::tls::IdentitySettings;

use crate::authority::AuthoritySettings;
use crate::distribution::DistributionSettings;
use crate::dns::route53::Route53Settings;
use crate::intent::Operators;
use crate::store::StoreSettings;
use crate::verdicts::HealthSettings;

#[derive(Clone, Debug)]
pub struct ControlSettings {
    pub region: Name,
    pub name: Name,
    pub identity: IdentitySettings,
    /// `identity.renew`: who makes our certificate anew; absent: our own authority, or, without one, whoever else writes
    /// its files.
    pub renew: Option<RenewalSettings>,
    /// Where nodes and operators call; port 0 takes a free one.
    pub listen: SocketAddr,
    /// `host:port` of the same port, as other control nodes reach it. Default: `listen`.
    pub advertise: Option<String>,
    pub store: StoreSettings,
    pub operators: Operators,
    /// How regions are judged.
    pub health: HealthSettings,
    /// How new versions spread.
    pub rollout: DistributionSettings,
    /// Absent: the plan is not written to Route 53.
    pub route53: Option<Route53Settings>,
    /// Absent: this node issues no certificates.
    pub authority: Option<AuthoritySettings>,
    /// Default: a free port of loopback.
    pub admin: AdminSettings,
    /// Absent: none is written.
    pub audit: Option<AuditSettings>,
    /// Default 30s, at most 1h.
    pub drain_timeout: Duration,
}

impl FromNode for ControlSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let region = required(&fields, "region");
        let name = required(&fields, "name");
        let identity = read_identity(&fields);
        let listen = required::<SocketAddr>(&fields, "listen");
        // Others cannot reach it where no address is named.
        let advertise = match listen {
            Some(listen) if listen.ip().is_unspecified() => {
                fields.required("advertise").and_then(|field| field.parse(reachable)).map(Some)
            }
            _ => read_optional(&fields, "advertise", |field| field.parse(reachable)),
        };
        let store = required(&fields, "store");
        let operators = required(&fields, "operators");
        let health = or_default(&fields, "health", HealthSettings::default);
        let rollout = or_default(&fields, "rollout", DistributionSettings::default);
        let route53 = optional(&fields, "route53");
        let authority = optional(&fields, "authority");
        let admin = or_default(&fields, "admin", AdminSettings::default);
        let audit = optional(&fields, "audit");
        let drain_timeout = drain_timeout(&fields);
        fields.finish();
        let (identity, renew) = identity?;
        Some(Self {
            region: region?,
            name: name?,
            identity,
            renew,
            listen: listen?,
            advertise: advertise?,
            store: store?,
            operators: operators?,
            health: health?,
            rollout: rollout?,
            route53: route53?,
            authority: authority?,
            admin: admin?,
            audit: audit?,
            drain_timeout: drain_timeout?,
        })
    }
}

fn reachable(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("HOST:PORT, such as 10.0.4.1:7443");
    let (host, port) = text.rsplit_once(':').ok_or(EXPECTED)?;
    let port: u16 = port.parse().map_err(|_| EXPECTED)?;
    if host.is_empty() || port == 0 { Err(EXPECTED) } else { Ok(text.to_owned()) }
}

impl FromNode for Operators {
    /// `any`, or a list of names, at least one.
    fn from_node(field: &Field<'_>) -> Option<Self> {
        if let yaml::Value::Scalar(_) = field.node.value {
            return field.choice(&[("any", ())]).map(|()| Self::Any);
        }
        let items = field.items();
        if items.is_empty() {
            field.fault("expected at least one name, or any");
            return None;
        }
        items.iter().map(Name::from_node).collect::<Option<_>>().map(Self::Listed)
    }
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    const WHOLE: &str = "region: eu\nname: c-0\nidentity: {certificate: c.pem, key: k.pem, trustBundle: b.pem}\n\
        store: {sqlite: a.db}\n";

    #[test]
    fn what_is_absent_has_a_default() {
        let text = format!("{WHOLE}listen: 127.0.0.1:0\noperators: any\n");
        let settings = parse::<ControlSettings>(&text).unwrap();
        assert_eq!((settings.operators, settings.advertise, settings.audit), (Operators::Any, None, None));
        assert_eq!(settings.drain_timeout, Duration::from_secs(30));
        let text = format!("{WHOLE}listen: 0.0.0.0:7443\nadvertise: c-0.example:7443\noperators: [alice]\n");
        let settings = parse::<ControlSettings>(&text).unwrap();
        assert_eq!(settings.advertise.as_deref(), Some("c-0.example:7443"));
        assert_eq!(settings.operators, Operators::Listed([Name::parse("alice").unwrap()].into()));
    }

    #[test]
    fn what_cannot_work_is_a_fault() {
        for (rest, fault) in [
            ("listen: 127.0.0.1:0\n", "operators: is missing"),
            ("listen: 127.0.0.1:0\noperators: all\n", "operators: "),
            ("listen: 127.0.0.1:0\noperators: []\n", "expected at least one name"),
            ("listen: 127.0.0.1:0\noperators: ['a/b']\n", "operators[0]: "),
            ("listen: 0.0.0.0:1\noperators: any\n", "advertise: is missing"),
            ("listen: 0.0.0.0:1\noperators: any\nadvertise: here\n", "expected HOST:PORT"),
            ("listen: 0.0.0.0:1\noperators: any\nadvertise: 'h:0'\n", "expected HOST:PORT"),
            ("listen: 0.0.0.0:1\noperators: any\nadvertise: ':1'\n", "expected HOST:PORT"),
            ("listen: 127.0.0.1:0\noperators: any\nsnapshot: s.bin\n", "snapshot: unknown key"),
        ] {
            let faults = parse::<ControlSettings>(&format!("{WHOLE}{rest}")).unwrap_err();
            assert!(faults.iter().any(|found| found.to_string().contains(fault)), "{rest}: {faults:?}");
        }
    }
}
