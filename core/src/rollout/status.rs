//! Where the fleet is with its versions, for people.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::change::{Change, Progress};
use super::stages::{Rollout, State};
use crate::identity::SpiffeId;

/// Versions, refusals and strays that are listed.
const MOST_LISTED: usize = 16;

/// Where the fleet is.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// What everyone may have.
    pub settled: u64,
    /// The last change begun.
    pub change: Option<Change>,
    pub progress: Progress,
    /// How long it has been in its stage.
    pub in_stage: Option<Duration>,
    pub canary: Option<SpiffeId>,
    /// Nodes that are there, by the version that they serve: the newest versions.
    pub versions: BTreeMap<u64, usize>,
    pub present: usize,
    pub away: usize,
    /// What nodes that are there refused last, of the first in the order of their ids.
    pub refusals: Vec<Refusal>,
    /// Nodes that serve what has not settled.
    pub strays: Vec<(SpiffeId, u64)>,
}

/// A node's refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub node: SpiffeId,
    pub version: u64,
    pub reasons: Vec<String>,
}

impl Rollout {
    pub fn status(&self, now: Duration) -> Status {
        let mut versions = BTreeMap::new();
        let mut refusals = Vec::new();
        let (mut present, mut away) = (0, 0);
        for (id, node) in self.fleet.iter() {
            if !node.is_present() {
                away += 1;
                continue;
            }
            present += 1;
            *versions.entry(node.serving).or_insert(0) += 1;
            if versions.len() > MOST_LISTED {
                versions.pop_first();
            }
            let listed = node.refused.iter().take(MOST_LISTED.saturating_sub(refusals.len()));
            refusals.extend(listed.map(|(version, reasons)| Refusal {
                node: id.clone(),
                version: *version,
                reasons: reasons.clone(),
            }));
        }
        let running = match &self.state {
            State::Running(running) => Some(running),
            State::Idle | State::Done | State::Stopped(_) => None,
        };
        Status {
            settled: self.settled,
            change: self.change,
            progress: self.progress(),
            in_stage: running.map(|running| now.saturating_sub(running.entered)),
            canary: running.and_then(|running| running.canary.clone()),
            versions,
            present,
            away,
            refusals,
            strays: self.strays().take(MOST_LISTED).map(|(id, version)| (id.clone(), version)).collect(),
        }
    }
}

impl fmt::Display for Status {
    /// One line on the change, one on the nodes, and one for each refusal and each stray.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.change {
            None => write!(f, "version {}", self.settled)?,
            Some(change) => {
                write!(f, "version {} ({}): {}", change.version, change.kind.as_str(), self.progress)?;
                if let Some(canary) = &self.canary {
                    write!(f, ", canary {canary}")?;
                }
                if let Some(time) = self.in_stage {
                    write!(f, ", for {} s", time.as_secs())?;
                }
                if change.version != self.settled {
                    write!(f, "; settled is {}", self.settled)?;
                }
            }
        }
        write!(f, "\n{} nodes", self.present)?;
        for (version, nodes) in self.versions.iter().rev() {
            write!(f, ", {nodes} with {version}")?;
        }
        write!(f, "; {} away", self.away)?;
        for Refusal { node, version, reasons } in &self.refusals {
            write!(f, "\n{node} refused {version}: {}", reasons.join("; "))?;
        }
        self.strays.iter().try_for_each(|(node, version)| write!(f, "\n{node} serves {version}, which has not settled"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::{Ack, Kind, RolloutSettings};

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/region/{path}")).unwrap()
    }

    #[test]
    fn people_read_what_is_done_where_and_why_not() {
        let second = Duration::from_secs(1);
        let mut rollout = Rollout::new(RolloutSettings::default(), 4);
        for node in ["eu/gateway/one", "eu/sidecar/scorers/one", "us/gateway/one"] {
            rollout.join(&id(node), 4);
        }
        rollout.leave(&id("us/gateway/one"), second);
        assert_eq!(rollout.status(second).to_string(), "version 4\n2 nodes, 2 with 4; 1 away");
        rollout.begin(Change { version: 5, kind: Kind::Ordinary }, second).unwrap();
        rollout.ack(&id("eu/gateway/one"), 5, Ack::Applied);
        rollout.tick(second * 4);
        assert_eq!(
            rollout.status(second * 9).to_string(),
            "version 5 (ordinary): given to canary, which is watched, canary spiffe://td/region/eu/gateway/one, for 8 s; \
             settled is 4\n2 nodes, 1 with 5, 1 with 4; 1 away\n\
             spiffe://td/region/eu/gateway/one serves 5, which has not settled"
        );
        rollout.nack(&id("eu/sidecar/scorers/one"), 5, &["no region".to_owned(), "too large".to_owned()]);
        assert!(rollout.needs_rollback());
        assert_eq!(
            rollout.status(second * 9).to_string(),
            "version 5 (ordinary): stopped: spiffe://td/region/eu/sidecar/scorers/one refused it: no region; too large; \
             settled is 4\n2 nodes, 1 with 5, 1 with 4; 1 away\n\
             spiffe://td/region/eu/sidecar/scorers/one refused 5: no region; too large\n\
             spiffe://td/region/eu/gateway/one serves 5, which has not settled"
        );
    }

    #[test]
    fn what_is_listed_is_bounded() {
        let mut rollout = Rollout::new(RolloutSettings::default(), 0);
        for node in 0..100_u64 {
            let id = id(&format!("eu/gateway/{node}"));
            rollout.join(&id, node + 1);
            rollout.nack(&id, 9_999, &["no".to_owned()]);
        }
        let status = rollout.status(Duration::ZERO);
        assert_eq!((status.refusals.len(), status.strays.len()), (MOST_LISTED, MOST_LISTED));
        assert_eq!(status.versions.keys().copied().collect::<Vec<_>>(), (85..=100).collect::<Vec<_>>());
    }
}
