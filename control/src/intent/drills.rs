//! The drill that runs, as its controller announces it.
//!
//! The rule: the leader takes note, in memory alone: a drill that stops the store must not be forgotten for it, and one
//! that the next leader does not know is announced to it again within seconds. Where nobody leads, whoever is asked
//! takes note.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::drill::{Announced, Board, Lease, LeaseId, Notice};
use spillway_core::identity::SpiffeId;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::audit::{Audit, Event};
use spillway_runtime::drain::Drain;
use tokio::time::Instant;

use super::desk::IntentError;
use super::overrides::since_1970;
use super::status::{Events, StatusSource};
use crate::leading::Leading;

/// How often it is seen that nobody renews a drill.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Characters of a stage, and of how a drill ended.
const MOST_WORD: usize = 64;

/// Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Drills(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    board: Mutex<Board>,
    /// From which its time counts.
    zero: Instant,
}

impl Default for Drills {
    fn default() -> Self {
        Self(Arc::new(Inner { board: Mutex::default(), zero: Instant::now() }))
    }
}

impl Drills {
    /// The drill that runs, for people.
    pub fn running(&self) -> Option<String> {
        self.0.board.lock().running(self.now()).map(|(notice, _)| notice.words())
    }

    /// As operators are shown it.
    pub fn shown(&self) -> Vec<control::RunningDrill> {
        let board = self.0.board.lock();
        let shown = |(notice, left): (&Notice, Duration)| control::RunningDrill {
            drill: notice.drill.clone(),
            target: notice.target.clone().unwrap_or_default(),
            stage: notice.stage.clone(),
            author: notice.author.clone(),
            began_unix_ms: i64::try_from(notice.began.as_millis()).unwrap_or(i64::MAX),
            left_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            lease: notice.lease.0,
        };
        board.running(self.now()).map(shown).into_iter().collect()
    }

    /// Takes note of a drill, or of its going on.
    pub(crate) fn set(
        &self,
        author: &SpiffeId,
        request: control::SetDrillRequest,
        (audit, events): (&Audit, &Events),
    ) -> Result<(), IntentError> {
        let control::SetDrillRequest { lease, drill, target, stage } = request;
        let drill = Name::parse(&drill).map_err(|_| IntentError::Malformed("the drill's name is no name"))?;
        let target = match target.as_str() {
            "" => None,
            target => Some(Name::parse(target).map_err(|_| IntentError::Malformed("the target is no name"))?),
        };
        let notice = Notice {
            lease: LeaseId(lease),
            drill: drill.to_string(),
            target: target.map(|target| target.to_string()),
            stage: word(&stage),
            author: author.to_string(),
            began: since_1970(),
        };
        self.forget_lost(Some((audit, events)));
        match self.0.board.lock().announce(notice.clone(), self.now()) {
            Err(held) => Err(IntentError::DrillRuns { drill: held.words(), author: held.author.clone() }),
            Ok(Announced::Renewed) => Ok(()),
            Ok(Announced::Began) => {
                let Notice { drill, target, author, .. } = &notice;
                tracing::warn!(drill, target, author, "a drill begins");
                events.tell(&format!("the drill {} begins, run by {author}", notice.words()));
                let (drill, target, author) = (drill.clone(), target.clone(), author.clone());
                audit.record(Event::DrillBegan { drill, target, author });
                Ok(())
            }
        }
    }

    /// It is over. One that is not known, or was forgotten, is no fault.
    pub(crate) fn end(
        &self,
        author: &SpiffeId,
        request: &control::EndDrillRequest,
        (audit, events): (&Audit, &Events),
    ) {
        let ended = self.0.board.lock().end(LeaseId(request.lease), &author.to_string());
        if let Some(notice) = ended {
            tell_ended(&notice, &word(&request.how), audit, events);
        }
    }

    /// Sees until stopped that a drill is forgotten of which nobody says anything more.
    pub async fn tend(self, leading: Arc<Leading>, audit: Audit, events: Events, drain: Drain) {
        loop {
            // Of another leader's drill this node may know an old word.
            let leads = leading.fence().is_some();
            self.forget_lost(leads.then_some((&audit, &events)));
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = drain.stopped() => return,
            }
        }
    }

    fn forget_lost(&self, told: Option<(&Audit, &Events)>) {
        let lost = self.0.board.lock().expire(self.now());
        if let Some((notice, (audit, events))) = lost.zip(told) {
            tell_ended(&notice, "forgotten", audit, events);
        }
    }

    fn now(&self) -> Duration {
        self.0.zero.elapsed()
    }
}

impl StatusSource for Drills {
    fn add_to(&self, status: &mut control::StatusResponse) {
        status.drills = self.shown();
    }
}

fn tell_ended(notice: &Notice, how: &str, audit: &Audit, events: &Events) {
    let Notice { drill, target, author, .. } = notice;
    tracing::warn!(drill, target, how, "a drill has ended");
    let why = match how {
        "forgotten" => format!("its controller said nothing for {} s", Lease::LIFE.as_secs()),
        how => how.to_owned(),
    };
    events.tell(&format!("the drill {} has ended: {why}", notice.words()));
    let (drill, target, author) = (drill.clone(), target.clone(), author.clone());
    audit.record(Event::DrillEnded { drill, target, author, how: how.to_owned() });
}

/// A caller's word, as it may stand in a line.
fn word(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MOST_WORD).collect()
}
