//! What is known of each node: where it is, what it serves, what it refused.
//!
//! The rule: a node is what its certificate says, is away when its stream ends, and is forgotten when it has been
//! away for ten minutes. Clients are no nodes.

use std::collections::BTreeMap;
use std::time::Duration;

use super::comparison::Tally;
use crate::identity::{Role, SpiffeId};
use crate::units::Name;

/// Nodes that are known at once. More are not let in.
const MOST_NODES: usize = 50_000;

/// How long a node that is away is remembered.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// Refusals of a node that are kept.
const MOST_REFUSED: usize = 2;

/// Reasons of one refusal that are kept, and how long each may be, in bytes.
const MOST_REASONS: usize = 16;
const MOST_REASON: usize = 256;

/// How far a node is with a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ack {
    /// It would take it.
    Validated,
    /// It lies on its disk.
    Persisted,
    /// It serves it.
    Applied,
}

/// One node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Since when it has been away, if it is.
    pub away: Option<Duration>,
    /// The version that it serves.
    pub serving: u64,
    /// How far it is with the version that it was given last.
    pub progress: Option<(u64, Ack)>,
    /// The versions that it refused last, and why: at most two, since it is given none but the newest or what has
    /// settled.
    pub refused: Vec<(u64, Vec<String>)>,
    /// It was there while the present stage was open to it.
    pub reached: bool,
    /// What it measured in the present stage with the version that it serves.
    pub tally: Tally,
}

/// All nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct Fleet {
    nodes: BTreeMap<SpiffeId, Node>,
}

impl Fleet {
    /// A node's stream began. False if it is none, or one too many.
    pub fn join(&mut self, id: &SpiffeId, serving: u64) -> bool {
        if region_of(id).is_none() || (self.nodes.len() >= MOST_NODES && !self.nodes.contains_key(id)) {
            return false;
        }
        // What it refused before, another build of it may take.
        let node = Node {
            away: None,
            serving,
            progress: None,
            refused: Vec::new(),
            reached: self.get(id).is_some_and(|node| node.reached),
            tally: Tally::default(),
        };
        self.nodes.insert(id.clone(), node);
        true
    }

    pub fn leave(&mut self, id: &SpiffeId, now: Duration) {
        if let Some(node) = self.nodes.get_mut(id) {
            node.away.get_or_insert(now);
        }
    }

    pub fn forget(&mut self, now: Duration) {
        let long = |since: Duration| now.saturating_sub(since) >= FORGOTTEN_AFTER;
        self.nodes.retain(|_, node| !node.away.is_some_and(long));
    }

    pub fn get(&self, id: &SpiffeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    pub fn get_mut(&mut self, id: &SpiffeId) -> Option<&mut Node> {
        self.nodes.get_mut(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&SpiffeId, &Node)> {
        self.nodes.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&SpiffeId, &mut Node)> {
        self.nodes.iter_mut()
    }
}

impl Node {
    pub fn is_present(&self) -> bool {
        self.away.is_none()
    }

    /// It was seen to serve this version.
    pub fn serves(&mut self, version: u64) {
        if self.serving != version {
            self.serving = version;
            self.tally = Tally::default();
        }
    }

    pub fn acknowledges(&mut self, version: u64, ack: Ack) {
        self.progress = self.progress.filter(|(of, _)| *of == version).max(Some((version, ack)));
        if ack == Ack::Applied {
            self.serves(version);
        }
    }

    pub fn refuses(&mut self, version: u64, reasons: &[String]) {
        let cut = |reason: &String| {
            let end = (0..=reason.len().min(MOST_REASON)).rev().find(|end| reason.is_char_boundary(*end));
            reason.get(..end.unwrap_or_default()).unwrap_or_default().to_owned()
        };
        self.refused.retain(|(refused, _)| *refused != version);
        self.refused.insert(0, (version, reasons.iter().take(MOST_REASONS).map(cut).collect()));
        self.refused.truncate(MOST_REFUSED);
    }

    pub fn has_refused(&self, version: u64) -> bool {
        self.refused.iter().any(|(refused, _)| *refused == version)
    }
}

/// The region of a node; none for who is no node.
pub(super) fn region_of(id: &SpiffeId) -> Option<&Name> {
    match &id.role {
        Role::Gateway { region, .. }
        | Role::Sidecar { region, .. }
        | Role::Control { region, .. }
        | Role::Dns { region, .. } => Some(region),
        Role::Injector { .. } | Role::Loader { .. } | Role::Client { .. } | Role::Operator { .. } => None,
    }
}

pub(super) fn is_gateway(id: &SpiffeId) -> bool {
    matches!(id.role, Role::Gateway { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()
    }

    #[test]
    fn clients_are_no_nodes() {
        let mut fleet = Fleet::default();
        assert!(!fleet.join(&id("tenant/shop/client/one"), 1));
        let paths =
            ["region/eu/gateway/one", "region/eu/control/one", "region/eu/dns/one", "region/eu/sidecar/scorers/one"];
        for path in paths {
            assert!(fleet.join(&id(path), 1));
            assert_eq!(region_of(&id(path)).unwrap().as_str(), "eu");
        }
        assert!(is_gateway(&id("region/eu/gateway/one")) && !is_gateway(&id("region/eu/control/one")));
        assert_eq!(fleet.iter().count(), paths.len());
    }

    #[test]
    fn who_is_away_for_long_is_forgotten() {
        let (mut fleet, second) = (Fleet::default(), Duration::from_secs(1));
        let [one, other] = ["one", "other"].map(|name| id(&format!("region/eu/gateway/{name}")));
        fleet.join(&one, 1);
        fleet.join(&other, 1);
        fleet.leave(&one, second * 5);
        fleet.leave(&one, second * 300);
        fleet.forget(second * 604);
        assert_eq!(fleet.iter().count(), 2);
        fleet.forget(second * 605);
        assert_eq!(fleet.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&other]);
        fleet.leave(&other, second * 605);
        fleet.join(&other, 1);
        fleet.forget(second * 9_999);
        assert!(fleet.get(&other).unwrap().is_present());
    }

    #[test]
    fn the_number_of_nodes_is_bounded() {
        let mut fleet = Fleet::default();
        let node = |number: usize| id(&format!("region/eu/sidecar/scorers/{number}"));
        assert!((0..MOST_NODES).all(|number| fleet.join(&node(number), 1)));
        assert!(!fleet.join(&node(MOST_NODES), 1));
        assert!(fleet.join(&node(7), 2), "one that is known comes again");
    }

    #[test]
    fn acknowledgements_go_forward_only() {
        let mut fleet = Fleet::default();
        let one = id("region/eu/gateway/one");
        fleet.join(&one, 1);
        let node = fleet.get_mut(&one).unwrap();
        for (version, ack, progress, serving) in [
            (2, Ack::Validated, (2, Ack::Validated), 1),
            (2, Ack::Applied, (2, Ack::Applied), 2),
            (2, Ack::Persisted, (2, Ack::Applied), 2),
            (3, Ack::Persisted, (3, Ack::Persisted), 2),
        ] {
            node.acknowledges(version, ack);
            assert_eq!((node.progress, node.serving), (Some(progress), serving));
        }
    }

    #[test]
    fn refusals_are_bounded_and_forgotten_when_the_node_comes_again() {
        let mut fleet = Fleet::default();
        let one = id("region/eu/gateway/one");
        fleet.join(&one, 1);
        let node = fleet.get_mut(&one).unwrap();
        node.refuses(2, &vec!["ä".repeat(200); 40]);
        assert_eq!(node.refused, [(2, vec!["ä".repeat(128); MOST_REASONS])]);
        node.refuses(3, &["a".repeat(255) + "ä", "short".to_owned()]);
        assert_eq!(node.refused[0], (3, vec!["a".repeat(255), "short".to_owned()]));
        for (version, refused) in [(2, [2, 3]), (3, [3, 2]), (5, [5, 3]), (2, [2, 5])] {
            node.refuses(version, &[]);
            assert_eq!(node.refused.iter().map(|(version, _)| *version).collect::<Vec<_>>(), refused);
            assert!(refused.iter().all(|version| node.has_refused(*version)) && !node.has_refused(4));
        }
        fleet.join(&one, 1);
        assert!(!fleet.get(&one).unwrap().has_refused(5));
    }
}
