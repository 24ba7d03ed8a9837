//! An injector's own settings file.
//!
//! ```yaml
//! region: eu-west
//! name: rack-4
//! identity: {certificate: leaf.pem, key: leaf.key, trustBundle: bundle.pem} # spiffe://TD/region/eu-west/injector/rack-4
//! listen: 10.0.4.9:7450
//! operators: [alice]                      # who may break things here; there is no `any`
//! processes:                              # of this machine; names as drills use them
//!   - name: eu-west/gateway-0
//!     pidFile: /run/spillway/gateway.pid
//!     hold: [systemctl, mask, --runtime, spillway-gateway]   # before it is killed, so that nobody starts it again
//!     start: [/usr/local/sbin/start-gateway]                 # when the fault is over
//! links:                                  # each stands before a process of this machine
//!   - {name: eu-west/gateway-0, listen: 10.0.4.9:443, to: 127.0.0.1:8443}
//! callers:                                # who comes through links, for faults that are for some of them alone
//!   - {name: us-east/gateway-0, addresses: [10.1.4.9]}
//! audit: audit.log
//! drainTimeout: 10s
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use spillway_control::intent::Operators;
use spillway_core::units::{InvalidUnit, Name};
use spillway_runtime::audit::AuditSettings;
use spillway_runtime::renewal::RenewalSettings;
use spillway_runtime::settings::{Field, Fields, FromNode, drain_timeout, optional, read_identity, required, texts};
use spillway_runtime::tls::IdentitySettings;

#[derive(Clone, Debug)]
pub struct InjectorSettings {
    pub region: Name,
    pub name: Name,
    pub identity: IdentitySettings,
    /// `identity.renew`; absent: whoever else writes its files.
    pub renew: Option<RenewalSettings>,
    pub listen: SocketAddr,
    pub operators: Operators,
    pub processes: BTreeMap<String, HeldProcess>,
    pub links: BTreeMap<String, LinkSettings>,
    pub callers: BTreeMap<String, Vec<IpAddr>>,
    /// Absent: none is written.
    pub audit: Option<AuditSettings>,
    /// Default 30s, at most 1h.
    pub drain_timeout: Duration,
}

/// How one process is found, ended and begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldProcess {
    pub pid_file: PathBuf,
    /// A command and its arguments.
    pub hold: Option<Vec<String>>,
    pub start: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    pub listen: SocketAddr,
    pub to: SocketAddr,
}

impl FromNode for InjectorSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let region = required(&fields, "region");
        let name = required(&fields, "name");
        let identity = read_identity(&fields);
        let listen = required(&fields, "listen");
        let operators = fields.required("operators").and_then(|field| match Operators::from_node(&field)? {
            Operators::Any => {
                field.fault("expected names: whoever may break things is to be named");
                None
            }
            listed @ Operators::Listed(_) => Some(listed),
        });
        let processes = named(fields.optional("processes"), |fields| {
            let pid_file = required(fields, "pidFile");
            let hold = fields.optional("hold").is_some().then(|| texts(fields, "hold"));
            let start = texts(fields, "start");
            Some(HeldProcess {
                pid_file: pid_file?,
                hold: hold.map_or(Some(None), |hold| hold.map(Some))?,
                start: start?,
            })
        });
        let links = named(fields.optional("links"), |fields| {
            let (listen, to) = (required(fields, "listen"), required(fields, "to"));
            Some(LinkSettings { listen: listen?, to: to? })
        });
        let callers = named(fields.optional("callers"), |fields| {
            let ip = |text: &str| text.parse().map_err(|_| InvalidUnit("an IP address"));
            fields.required("addresses")?.items().iter().map(|item| item.parse(ip)).collect()
        });
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
            operators: operators?,
            processes: processes?,
            links: links?,
            callers: callers?,
            audit: audit?,
            drain_timeout: drain_timeout?,
        })
    }
}

/// A list of maps that each have a `name`, as drills name processes; none where it is absent.
fn named<T>(list: Option<Field<'_>>, read: impl Fn(&Fields<'_>) -> Option<T>) -> Option<BTreeMap<String, T>> {
    let mut all = BTreeMap::new();
    let mut good = true;
    for item in list.iter().flat_map(Field::items) {
        let fields = item.map();
        let name = fields.required("name").and_then(|field| field.parse(process_name));
        let value = read(&fields);
        fields.finish();
        match name.zip(value) {
            Some((name, value)) => {
                if all.insert(name, value).is_some() {
                    item.fault("there is another one of this name");
                    good = false;
                }
            }
            None => good = false,
        }
    }
    good.then_some(all)
}

fn process_name(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("a name of one to three parts, such as eu-west/gateway-0 or etcd-1");
    let parts: Vec<&str> = text.split('/').collect();
    let good = parts.len() <= 3 && parts.iter().all(|part| Name::parse(part).is_ok());
    if good { Ok(text.to_owned()) } else { Err(EXPECTED) }
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    const MINIMAL: &str = "region: eu\nname: one\nidentity: {certificate: c, key: k, trustBundle: b}\n\
                           listen: 127.0.0.1:0\noperators: [alice]\n";

    #[test]
    fn what_is_absent_reaches_nobody() {
        let settings: InjectorSettings = parse(MINIMAL).unwrap();
        assert!(settings.processes.is_empty() && settings.links.is_empty() && settings.callers.is_empty());
        assert_eq!(settings.drain_timeout, Duration::from_secs(30));
    }

    #[test]
    fn all_of_it_is_read() {
        let more = "processes:\n  - {name: eu/gateway-0, pidFile: g.pid, hold: [systemctl, mask, g], start: [begin]}\n\
                    links:\n  - {name: eu/gateway-0, listen: 127.0.0.1:1, to: 127.0.0.1:2}\n\
                    callers:\n  - {name: us/gateway-0, addresses: [10.1.0.1, '::1']}\n";
        let settings: InjectorSettings = parse(&format!("{MINIMAL}{more}")).unwrap();
        let process = &settings.processes["eu/gateway-0"];
        assert_eq!(
            (process.hold.as_ref().map(Vec::len), process.start.as_slice()),
            (Some(3), &["begin".to_owned()][..])
        );
        assert_eq!(settings.links["eu/gateway-0"].to, "127.0.0.1:2".parse().unwrap());
        assert_eq!(settings.callers["us/gateway-0"].len(), 2);
    }

    #[test]
    fn each_fault_is_named() {
        for (wrong, told) in [
            ("processes: [{name: eu/gateway-0, pidFile: p}]", "start"),
            ("processes: [{name: 'eu/*', pidFile: p, start: [s]}]", "a name of one to three parts"),
            ("processes: [{name: a, pidFile: p, start: [s]}, {name: a, pidFile: q, start: [s]}]", "another one"),
            ("links: [{name: a, listen: 127.0.0.1, to: 127.0.0.1:2}]", "listen"),
            ("callers: [{name: a, addresses: [here]}]", "an IP address"),
            ("more: 1", "more"),
        ] {
            let faults = parse::<InjectorSettings>(&format!("{MINIMAL}{wrong}\n")).unwrap_err();
            assert!(faults.iter().any(|fault| fault.to_string().contains(told)), "{wrong}: {faults:?}");
        }
        let any = MINIMAL.replace("[alice]", "any");
        assert!(parse::<InjectorSettings>(&any).unwrap_err()[0].to_string().contains("is to be named"));
    }
}
