//! Where the store is.
//!
//! ```yaml
//! store: {sqlite: control.db}       # one node alone
//! store:
//!   etcd:
//!     endpoints: ['https://10.0.3.1:2379', 'https://10.0.3.2:2379', 'https://10.0.3.3:2379']
//!     identity: {certificate: etcd.pem, key: etcd.key, trustBundle: etcd-ca.pem}
//!     prefix: spillway
//! ```

use std::path::PathBuf;

use spillway_core::units::{InvalidUnit, Name};
use spillway_runtime::settings::{Field, FromNode, optional, or_default, required};
use spillway_runtime::tls::IdentitySettings;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSettings {
    Etcd(EtcdSettings),
    Sqlite(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdSettings {
    /// At least one `https://host:port`. Any of them will do; all of them are better.
    pub endpoints: Vec<String>,
    /// What etcd knows us by, and the authority that its certificates come from: names and addresses count there.
    /// Read again for each new connection.
    pub identity: IdentitySettings,
    /// What keys begin with, before a slash. Default: `spillway`.
    pub prefix: Name,
}

impl FromNode for StoreSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let etcd = optional(&fields, "etcd");
        let sqlite = optional(&fields, "sqlite");
        fields.finish();
        match (etcd?, sqlite?) {
            (Some(etcd), None) => Some(Self::Etcd(etcd)),
            (None, Some(path)) => Some(Self::Sqlite(path)),
            _ => {
                field.fault("expected either etcd or sqlite");
                None
            }
        }
    }
}

impl FromNode for EtcdSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let endpoints = fields.required("endpoints").and_then(|field| {
            let items = field.items();
            if items.is_empty() {
                field.fault("expected at least one");
                return None;
            }
            items.iter().map(|item| item.parse(endpoint)).collect()
        });
        let identity = required(&fields, "identity");
        let prefix = or_default(&fields, "prefix", || Name::parse("spillway").expect("it is a name"));
        fields.finish();
        Some(Self { endpoints: endpoints?, identity: identity?, prefix: prefix? })
    }
}

fn endpoint(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("an endpoint with TLS, such as https://10.0.3.1:2379");
    let authority = text.strip_prefix("https://").ok_or(EXPECTED)?;
    let (host, port) = authority.rsplit_once(':').ok_or(EXPECTED)?;
    let plain = !host.is_empty() && !authority.contains(['/', '?', '#', '@', ' ']);
    if plain && port.parse::<u16>().is_ok() { Ok(text.to_owned()) } else { Err(EXPECTED) }
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    #[test]
    fn a_store_is_one_file_or_one_cluster() {
        assert_eq!(parse::<StoreSettings>("sqlite: a.db").unwrap(), StoreSettings::Sqlite("a.db".into()));
        let identity = "identity: {certificate: c.pem, key: c.key, trustBundle: ca.pem}";
        let etcd = format!("etcd: {{endpoints: ['https://127.0.0.1:1'], {identity}}}");
        let StoreSettings::Etcd(settings) = parse::<StoreSettings>(&etcd).unwrap() else { panic!("etcd") };
        assert_eq!((settings.endpoints.len(), settings.prefix.as_str()), (1, "spillway"));
        for (bad, fault) in [
            ("{}".to_owned(), "expected either etcd or sqlite"),
            (format!("{etcd}\nsqlite: a.db"), "expected either etcd or sqlite"),
            (format!("etcd: {{endpoints: [], {identity}}}"), "etcd.endpoints: expected at least one"),
            (format!("etcd: {{endpoints: ['http://h:1'], {identity}}}"), "expected an endpoint with TLS"),
            (format!("etcd: {{endpoints: ['https://h'], {identity}}}"), "expected an endpoint with TLS"),
            (format!("etcd: {{endpoints: ['https://u@h:1'], {identity}}}"), "expected an endpoint with TLS"),
            ("etcd: {endpoints: ['https://h:1']}".to_owned(), "etcd.identity: is missing"),
        ] {
            let faults = parse::<StoreSettings>(&bad).unwrap_err();
            assert!(faults.iter().any(|found| found.to_string().contains(fault)), "{bad}: {faults:?}");
        }
    }
}
