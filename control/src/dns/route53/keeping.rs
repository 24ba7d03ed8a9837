//! What the leader wants the records to be: the plan in force, with the addresses of what all nodes may serve.
//!
//! The rule: nothing is wanted of who does not lead, nor before the leader has written a plan of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use spillway_core::snapshot::Snapshot;
use spillway_proto::control::SealedPlan;
use spillway_runtime::drain::Drain;
use spillway_runtime::plan;
use tokio::sync::watch;

use super::writer::{Wanted, Writer};
use crate::dns::view::View;
use crate::intent::Version;
use crate::store::Fence;

/// What it is made of.
pub struct Sources {
    /// While this node leads, by which election.
    pub leading: watch::Receiver<Option<Fence>>,
    pub plan: watch::Receiver<Option<Arc<SealedPlan>>>,
    /// What all nodes may serve.
    pub served: watch::Receiver<Option<Arc<Version>>>,
}

impl Sources {
    /// Has the writer correct the records until stopped.
    pub async fn keep(self, writer: Writer, drain: Drain) {
        let (want, wanted) = watch::channel(None);
        tokio::select! {
            () = writer.follow(wanted, drain) => {}
            () = self.tell(want) => {}
        }
    }

    /// Ends with the process's other parts.
    async fn tell(mut self, want: watch::Sender<Option<Arc<Wanted>>>) {
        loop {
            let fence = self.leading.borrow_and_update().clone();
            let plan = self.plan.borrow_and_update().clone();
            let served = self.served.borrow_and_update().as_ref().map(|version| version.snapshot.clone());
            let now = wanted(fence.as_ref(), plan.as_deref(), served.as_deref());
            want.send_if_modified(|known| {
                let differs = known.as_deref() != now.as_ref();
                if differs {
                    *known = now.map(Arc::new);
                }
                differs
            });
            let changed = tokio::select! {
                changed = self.leading.changed() => changed,
                changed = self.plan.changed() => changed,
                changed = self.served.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }
}

fn wanted(fence: Option<&Fence>, sealed: Option<&SealedPlan>, snapshot: Option<&Snapshot>) -> Option<Wanted> {
    let (fence, published, snapshot) = (fence?, plan::open(sealed?).ok()?, snapshot?);
    // What a single vantage sees is no reason to move everybody.
    let nothing = BTreeSet::new();
    let view = || View::of(snapshot, Some(&published), &nothing);
    (published.epoch == fence.epoch).then(|| Wanted { epoch: fence.epoch, view: view() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use spillway_core::failover::{Plan, Region, Standing, Traffic};
    use spillway_core::resource::parse;
    use spillway_core::units::Name;
    use spillway_runtime::plan::{Published, seal};

    use super::*;

    #[test]
    fn only_the_leaders_own_plan_is_wanted() {
        let name = |text| Name::parse(text).unwrap();
        let region = |name: &str, address: &str| {
            format!(
                "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: td, gateways: \
                 [{{name: g, address: \"{address}:443\"}}]}}\n"
            )
        };
        let text = [region("eu", "192.0.2.1"), region("us", "192.0.2.2")].join("---\n");
        let snapshot = Snapshot::compile(1, &parse(&text).unwrap()).unwrap();
        let of = |planned| Region { planned, share: 1.0, capacity: None, load: None, overridden: None };
        let regions = BTreeMap::from([(name("eu"), of(3.0)), (name("us"), of(1.0))]);
        let plan = Plan::of(9, &regions, &Traffic::default(), Duration::ZERO).unwrap();
        let standings = regions.keys().map(|name| (name.clone(), (Standing::Steady, String::new()))).collect();
        let sealed = seal(&Published { epoch: 5, plan, standings });
        let fence = |epoch| Fence { epoch, key: "".into() };
        let found = wanted(Some(&fence(5)), Some(&sealed), Some(&snapshot)).unwrap();
        assert_eq!((found.epoch, found.view.serial, found.view.regions[&name("eu")].weight), (5, 9, 0.75));
        assert_eq!(wanted(Some(&fence(6)), Some(&sealed), Some(&snapshot)), None, "of the leader before");
        assert_eq!(wanted(None, Some(&sealed), Some(&snapshot)), None);
        assert_eq!(wanted(Some(&fence(5)), None, Some(&snapshot)), None);
        assert_eq!(wanted(Some(&fence(5)), Some(&sealed), None), None);
    }
}
