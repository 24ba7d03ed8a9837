//! A process's own settings file: YAML, strict, every fault at once with its line.
//!
//! The rule: unknown keys are faults, and only a checked value leaves this module. Traffic settings are
//! not here; they come with the Snapshot.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use spillway_core::resource::Fault;
pub use spillway_core::resource::reader::{Faults, Field, Fields};
use spillway_core::resource::yaml;
use spillway_core::units::{ByteSize, InvalidUnit, parse_duration};

use crate::access_log::AccessLogSettings;
use crate::admin::AdminSettings;
use crate::audit::AuditSettings;
use crate::link::ControlSettings;
use crate::telemetry::OtlpSettings;
use crate::tls::IdentitySettings;

/// A settings file larger than this is a mistake.
const MAX_FILE: u64 = 1 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const LONGEST_DRAIN: Duration = Duration::from_secs(3_600);

/// A value read out of a field.
pub trait FromNode: Sized {
    /// `None` only after a fault was added to the field.
    fn from_node(field: &Field<'_>) -> Option<Self>;
}

/// The operator's fault: the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{}: cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        problem: std::io::Error,
    },
    /// One line for each fault: `file:line: field: problem`.
    #[error("{}", Lines { path, faults })]
    Faults { path: PathBuf, faults: Vec<Fault> },
}

/// Reads a settings file.
pub fn read<T: FromNode>(path: impl AsRef<Path>) -> Result<T, SettingsError> {
    let path = path.as_ref();
    let unreadable = |problem| SettingsError::Unreadable { path: path.to_owned(), problem };
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_FILE {
        return Err(unreadable(std::io::ErrorKind::FileTooLarge.into()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    parse(&text).map_err(|faults| SettingsError::Faults { path: path.to_owned(), faults })
}

/// Reads the text of a settings file.
pub fn parse<T: FromNode>(text: &str) -> Result<T, Vec<Fault>> {
    let faults = Faults::of("settings".into());
    let documents = match yaml::documents(text) {
        Ok(documents) => documents,
        Err(invalid) => {
            faults.add(invalid.line, "-", format!("no valid YAML: {}", invalid.problem));
            return Err(faults.into_vec());
        }
    };
    let [document] = &documents[..] else {
        faults.add(1, "-", format!("expected one YAML document, found {}", documents.len()));
        return Err(faults.into_vec());
    };
    let value = T::from_node(&Field::root("", document, &faults));
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        _ => Err(faults.into_vec()),
    }
}

/// What gateway and sidecar both need.
#[derive(Clone, Debug, PartialEq)]
pub struct CommonSettings {
    /// `identity`: who we are.
    pub identity: IdentitySettings,
    /// `snapshot`: the file to serve from. With `control`, where what was pushed is kept, and not followed.
    pub snapshot: PathBuf,
    /// `control`: the control plane; absent: there is none.
    pub control: Option<ControlSettings>,
    /// `admin`: the admin port; default a free port on loopback.
    pub admin: AdminSettings,
    /// `accessLog`: a path, or `-` for stdout; absent: none is written.
    pub access_log: Option<AccessLogSettings>,
    /// `audit`: where the audit log is; absent: none is written.
    pub audit: Option<AuditSettings>,
    /// `otlp`: where traces go; absent: none are made.
    pub otlp: Option<OtlpSettings>,
    /// `drainTimeout`: how long open work may take after TERM; default 30s, at most 1h.
    pub drain_timeout: Duration,
}

impl CommonSettings {
    /// Reads the common keys of a process's map; the process reads its own and then calls `finish`.
    pub fn read(fields: &Fields<'_>) -> Option<Self> {
        let identity = required(fields, "identity");
        let snapshot = required(fields, "snapshot");
        let control = optional(fields, "control");
        let admin = or_default(fields, "admin", AdminSettings::default);
        let access_log = optional(fields, "accessLog");
        let audit = optional(fields, "audit");
        let otlp = optional(fields, "otlp");
        let drain_timeout = drain_timeout(fields);
        Some(Self {
            identity: identity?,
            snapshot: snapshot?,
            control: control?,
            admin: admin?,
            access_log: access_log?,
            audit: audit?,
            otlp: otlp?,
            drain_timeout: drain_timeout?,
        })
    }
}

/// `drainTimeout`: its default is 30s.
pub fn drain_timeout(fields: &Fields<'_>) -> Option<Duration> {
    match fields.optional("drainTimeout") {
        Some(field) => field.parse(|text| match parse_duration(text)? {
            time if time <= LONGEST_DRAIN => Ok(time),
            _ => Err(InvalidUnit("at most 1h")),
        }),
        None => Some(DRAIN_TIMEOUT),
    }
}

/// A required value of a map; `None` only after a fault was added.
pub fn required<T: FromNode>(fields: &Fields<'_>, name: &'static str) -> Option<T> {
    fields.required(name).and_then(|field| T::from_node(&field))
}

/// An optional value of a map; `None` only after a fault was added, `Some(None)` when absent.
#[allow(clippy::option_option)]
pub fn optional<T: FromNode>(fields: &Fields<'_>, name: &'static str) -> Option<Option<T>> {
    match fields.optional(name) {
        Some(field) => T::from_node(&field).map(Some),
        None => Some(None),
    }
}

/// A value of a map, or its default; `None` only after a fault was added.
pub fn or_default<T: FromNode>(fields: &Fields<'_>, name: &'static str, default: impl FnOnce() -> T) -> Option<T> {
    optional(fields, name).map(|value| value.unwrap_or_else(default))
}

/// The text of a scalar, kept.
pub fn text(field: &Field<'_>) -> Option<String> {
    field.text().map(str::to_owned)
}

/// `None` only after a fault was added, `Some(None)` when absent.
#[allow(clippy::option_option)]
pub fn read_optional<T>(
    fields: &Fields<'_>,
    name: &'static str,
    read: impl FnOnce(&Field<'_>) -> Option<T>,
) -> Option<Option<T>> {
    fields.optional(name).map_or(Some(None), |field| read(&field).map(Some))
}

/// A required list of texts, at least one.
pub fn texts(fields: &Fields<'_>, name: &'static str) -> Option<Vec<String>> {
    let field = fields.required(name)?;
    let items = field.items();
    if items.is_empty() {
        field.fault("expected at least one");
        return None;
    }
    items.iter().map(text).collect()
}

/// A time above 0, or its default.
pub fn positive(fields: &Fields<'_>, name: &'static str, default: Duration) -> Option<Duration> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    let time = Duration::from_node(&field)?;
    if time.is_zero() {
        field.fault("expected more than 0");
        return None;
    }
    Some(time)
}

/// A count from 1 to `most`, or its default.
pub fn count(fields: &Fields<'_>, name: &'static str, default: usize, most: i64) -> Option<usize> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    field.number(1..=most).and_then(|number| usize::try_from(number).ok())
}

impl FromNode for PathBuf {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const EXPECTED: InvalidUnit = InvalidUnit("a path");
        field.parse(|text| if text.is_empty() || text.contains('\0') { Err(EXPECTED) } else { Ok(text.into()) })
    }
}

impl FromNode for SocketAddr {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const EXPECTED: InvalidUnit = InvalidUnit("an address and a port, such as 127.0.0.1:8443");
        field.parse(|text| text.parse().map_err(|_| EXPECTED))
    }
}

impl FromNode for Duration {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        field.parse(parse_duration)
    }
}

impl FromNode for bool {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        field.choice(&[("true", true), ("false", false)])
    }
}

impl FromNode for spillway_core::units::Name {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        field.parse(Self::parse)
    }
}

impl FromNode for ByteSize {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        field.parse(Self::parse)
    }
}

impl FromNode for IdentitySettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let certificate = required(&fields, "certificate");
        let key = required(&fields, "key");
        let trust_bundle = required(&fields, "trustBundle");
        fields.finish();
        Some(Self { certificate: certificate?, key: key?, trust_bundle: trust_bundle? })
    }
}

impl FromNode for AdminSettings {
    /// An address, or `{listen, remote}` where `remote: true` lets others than loopback in.
    fn from_node(field: &Field<'_>) -> Option<Self> {
        if let yaml::Value::Scalar(_) = field.node.value {
            return Some(Self { listen: SocketAddr::from_node(field)?, remote: false });
        }
        let fields = field.map();
        let listen = or_default(&fields, "listen", || (Ipv4Addr::LOCALHOST, 0).into());
        let remote = or_default(&fields, "remote", || false);
        fields.finish();
        Some(Self { listen: listen?, remote: remote? })
    }
}

impl FromNode for AccessLogSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let path = PathBuf::from_node(field)?;
        Some(if path == Path::new("-") { Self::Stdout } else { Self::File(path) })
    }
}

impl FromNode for AuditSettings {
    /// A path, or `{path, rotate, keep}`.
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const LEAST: ByteSize = ByteSize(1 << 20);
        let (rotate, keep) = (ByteSize(64 << 20), 10);
        if let yaml::Value::Scalar(_) = field.node.value {
            return Some(Self { path: audit_path(field)?, rotate: rotate.0, keep });
        }
        let fields = field.map();
        let path = fields.required("path").and_then(|field| audit_path(&field));
        let rotate = match fields.optional("rotate") {
            Some(field) => field.parse(|text| match ByteSize::parse(text)? {
                size if size >= LEAST => Ok(size),
                _ => Err(InvalidUnit("at least 1MiB")),
            }),
            None => Some(rotate),
        };
        let keep = match fields.optional("keep") {
            Some(field) => field.number(1..=10_000).and_then(|keep| u32::try_from(keep).ok()),
            None => Some(keep),
        };
        fields.finish();
        Some(Self { path: path?, rotate: rotate?.0, keep: keep? })
    }
}

/// The log is read again after a restart, so that a stream is none.
fn audit_path(field: &Field<'_>) -> Option<PathBuf> {
    let path = PathBuf::from_node(field)?;
    if path == Path::new("-") {
        field.fault("expected a file: the log is continued after a restart");
        return None;
    }
    Some(path)
}

impl FromNode for OtlpSettings {
    /// An endpoint, or `{endpoint, sample}` where `sample` is the share of traces that begin here.
    fn from_node(field: &Field<'_>) -> Option<Self> {
        if let yaml::Value::Scalar(_) = field.node.value {
            return Some(Self { endpoint: field.parse(endpoint)?, ..Self::default() });
        }
        let fields = field.map();
        let endpoint = fields.required("endpoint").and_then(|field| field.parse(endpoint));
        let sample = match fields.optional("sample") {
            Some(field) => field.parse(percent),
            None => Some(Self::default().sample),
        };
        fields.finish();
        Some(Self { endpoint: endpoint?, sample: sample? })
    }
}

fn endpoint(text: &str) -> Result<String, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("an endpoint such as http://127.0.0.1:4317");
    let uri: http::Uri = text.parse().map_err(|_| EXPECTED)?;
    let accepted = uri.scheme_str() == Some("http") && uri.authority().is_some();
    if accepted { Ok(text.to_owned()) } else { Err(EXPECTED) }
}

fn percent(text: &str) -> Result<f64, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("a share from 0% to 100%, such as 1% or 0.5%");
    let number = text.strip_suffix('%').ok_or(EXPECTED)?;
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let percent: f64 = number.parse().map_err(|_| EXPECTED)?;
    if plain && (0.0..=100.0).contains(&percent) { Ok(percent / 100.0) } else { Err(EXPECTED) }
}

struct Lines<'a> {
    path: &'a Path,
    faults: &'a [Fault],
}

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Fault { line, field, problem, .. }) in self.faults.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{}:{line}: {field}: {problem}", self.path.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "identity: {certificate: c.pem, key: k.pem, trustBundle: b.pem}\nsnapshot: s.bin\n";

    #[derive(Debug)]
    struct Process(CommonSettings);

    impl FromNode for Process {
        fn from_node(field: &Field<'_>) -> Option<Self> {
            let fields = field.map();
            let common = CommonSettings::read(&fields);
            fields.finish();
            Some(Self(common?))
        }
    }

    #[test]
    fn what_is_absent_has_a_default() {
        let Process(settings) = parse(WHOLE).unwrap();
        assert_eq!(settings.drain_timeout, Duration::from_secs(30));
        assert!(settings.admin.listen.ip().is_loopback() && !settings.admin.remote);
        assert_eq!((settings.access_log, settings.audit, settings.otlp), (None, None, None));
    }

    #[test]
    fn short_and_long_forms_are_read() {
        let rest = "admin: 127.0.0.1:9000\notlp: http://127.0.0.1:4317\naccessLog: '-'\ndrainTimeout: 5s\n";
        let Process(settings) = parse(&format!("{WHOLE}{rest}")).unwrap();
        assert_eq!(settings.admin.listen, "127.0.0.1:9000".parse().unwrap());
        assert_eq!(settings.access_log, Some(AccessLogSettings::Stdout));
        let rest = "admin: {listen: '0.0.0.0:9000', remote: true}\notlp: {endpoint: 'http://c:4317', sample: 50%}\n";
        let Process(settings) = parse(&format!("{WHOLE}{rest}")).unwrap();
        assert!(settings.admin.remote);
        assert_eq!(settings.otlp.unwrap().sample, 0.5);
    }

    #[test]
    fn an_audit_log_is_a_file_of_a_reasonable_size() {
        let audit =
            |text: &str| parse::<Process>(&format!("{WHOLE}audit: {text}\n")).map(|Process(common)| common.audit);
        let settings = |rotate, keep| Some(AuditSettings { path: "a.log".into(), rotate, keep });
        assert_eq!(audit("a.log").unwrap(), settings(64 << 20, 10));
        assert_eq!(audit("{path: a.log, rotate: 1MiB, keep: 3}").unwrap(), settings(1 << 20, 3));
        for (bad, fault) in [
            ("'-'", "audit: expected a file"),
            ("{path: '-'}", "audit.path: expected a file"),
            ("{path: a.log, rotate: 1023KiB}", "audit.rotate: '1023KiB' is not valid: expected at least 1MiB"),
            ("{path: a.log, keep: 0}", "audit.keep:"),
            ("{rotate: 1MiB}", "audit.path: is missing"),
        ] {
            let faults = audit(bad).unwrap_err();
            assert!(faults.iter().any(|found| found.to_string().contains(fault)), "{bad}: {faults:?}");
        }
    }

    #[test]
    fn every_fault_is_told_at_once_with_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gateway.yaml");
        let text = "identity: {certificate: c.pem, keys: k.pem}\nadmin: nowhere\ndrainTimeout: 2h\notlp: {sample: 5}\n";
        std::fs::write(&path, text).unwrap();
        let error = read::<Process>(&path).unwrap_err().to_string();
        let told = |line: &str| error.lines().any(|told| told == format!("{}:{line}", path.display()));
        assert!(told("1: identity.key: is missing and required"), "{error}");
        assert!(told("1: identity.trustBundle: is missing and required"), "{error}");
        assert!(error.contains(":1: identity.keys: unknown key"), "{error}");
        assert!(error.contains(":2: admin: 'nowhere' is not valid"), "{error}");
        assert!(error.contains(":3: drainTimeout: '2h' is not valid: expected at most 1h"), "{error}");
        assert!(error.contains(":4: otlp.endpoint: is missing"), "{error}");
        assert!(error.contains(":4: otlp.sample: '5' is not valid"), "{error}");
        assert!(error.contains("snapshot: is missing and required"), "{error}");
    }

    #[test]
    fn no_document_and_no_yaml_are_faults() {
        assert!(parse::<Process>("").is_err());
        assert!(parse::<Process>("a: [").is_err());
        assert!(parse::<Process>("- 1\n").is_err());
        assert!(read::<Process>("/nonexistent").unwrap_err().to_string().contains("cannot be read"));
    }
}
