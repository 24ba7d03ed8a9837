//! Everybody is told of the drill, for as long as it runs.
//!
//! The rule: said again every 3 s, at each stage, and at once when the control plane has forgotten it. Refused once, it
//! is not said again. When this process dies, the control plane forgets the drill within 15 s.

use spillway_core::drill::{Announcement, Lease};
use spillway_proto::control::SetDrillRequest;
use tokio::sync::{mpsc, watch};

use super::control::Control;

/// Says it until dropped, or refused. `stage`: where it is; changes are told at once.
pub async fn tell(
    mut control: Control,
    drill: SetDrillRequest,
    mut stage: watch::Receiver<&'static str>,
    heard: mpsc::Sender<Announcement>,
) {
    loop {
        let stage_now = (*stage.borrow_and_update()).to_owned();
        let announcement = match control.announce(SetDrillRequest { stage: stage_now, ..drill.clone() }).await {
            Ok(Ok(())) => Announcement::Taken,
            Ok(Err(why)) => Announcement::Refused(why),
            Err(_) => Announcement::Unanswered,
        };
        let refused = matches!(announcement, Announcement::Refused(_));
        if heard.send(announcement).await.is_err() || refused {
            return;
        }
        if let Ok(Err(_)) = tokio::time::timeout(Lease::RENEW_EVERY, stage.changed()).await {
            return;
        }
    }
}
