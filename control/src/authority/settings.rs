//! `authority` of a control node's settings.
//!
//! ```yaml
//! authority:
//!   folder: /etc/spillway/authority
//!   bootstrap: 0.0.0.0:9444
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use spillway_core::units::{InvalidUnit, parse_duration};
use spillway_runtime::settings::{Field, FromNode, optional, required};

const DAY: Duration = Duration::from_secs(86_400);
const HOUR: Duration = Duration::from_secs(3_600);
const LONGEST_LIFE: Duration = Duration::from_secs(90 * 86_400);
const SECOND: Duration = Duration::from_secs(1);

/// The certificate authority of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthoritySettings {
    /// `folder`: root, intermediate and its key, as `spillway pki init` makes them; in folders within it, others of that
    /// kind.
    pub folder: PathBuf,
    /// `life`: of leaves, 1s to 90d; default 24h.
    pub life: Duration,
    /// `notice`: from the announcement of a root to its first leaf, 1s to 90d; default 1h.
    pub notice: Duration,
    /// `bootstrap`: where those connect who have a token and no certificate; absent: nowhere.
    pub bootstrap: Option<SocketAddr>,
}

impl FromNode for AuthoritySettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let folder = required(&fields, "folder");
        let time = |name, default| match fields.optional(name) {
            Some(field) => field.parse(|text| match parse_duration(text)? {
                time if (SECOND..=LONGEST_LIFE).contains(&time) => Ok(time),
                _ => Err(InvalidUnit("1s to 90d")),
            }),
            None => Some(default),
        };
        let (life, notice) = (time("life", DAY), time("notice", HOUR));
        let bootstrap = optional(&fields, "bootstrap");
        fields.finish();
        Some(Self { folder: folder?, life: life?, notice: notice?, bootstrap: bootstrap? })
    }
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    #[test]
    fn only_the_folder_is_required_and_lives_are_bounded() {
        let settings: AuthoritySettings = parse("folder: /ca\n").unwrap();
        assert_eq!((settings.life, settings.notice, settings.bootstrap), (DAY, HOUR, None));
        let all = "folder: /ca\nlife: 1h\nnotice: 5m\nbootstrap: '127.0.0.1:0'\n";
        assert!(parse::<AuthoritySettings>(all).unwrap().bootstrap.is_some());
        for bad in ["life: 1h", "folder: /ca\nlife: 0s", "folder: /ca\nlife: 91d", "folder: /ca\nnotice: 10ms"] {
            assert!(parse::<AuthoritySettings>(bad).is_err(), "{bad}");
        }
    }
}
