//! What this control node is for the nodes' streams.

use tokio::sync::watch;

use crate::leading::Leading;
use crate::store::{Fence, Leader};

/// What this control node is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    Leading(Fence),
    Following(Leader),
    /// Nobody is known to lead.
    #[default]
    Alone,
}

impl Standing {
    fn of(leading: &Leading) -> Self {
        match (leading.fence(), leading.leader()) {
            (Some(fence), _) => Self::Leading(fence),
            // Ourselves, whose election is over.
            (None, Some(leader)) if leader.node == *leading.node() => Self::Alone,
            (None, Some(leader)) => Self::Following(leader),
            (None, None) => Self::Alone,
        }
    }

    /// Tells of each change, for ever. The caller drops it to stop it.
    pub async fn follow(leading: &Leading, told: watch::Sender<Self>) {
        let (mut fences, mut leaders) = (leading.fences(), leading.leaders());
        loop {
            fences.mark_unchanged();
            leaders.mark_unchanged();
            let now = Self::of(leading);
            told.send_if_modified(|standing| {
                let differs = *standing != now;
                if differs {
                    *standing = now;
                }
                differs
            });
            // Neither fails: who leads, which we hold, is the sender.
            tokio::select! {
                _ = fences.changed() => {}
                _ = leaders.changed() => {}
            }
        }
    }
}
