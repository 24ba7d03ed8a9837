//! How everything stands, for people: each part says its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use spillway_proto::control;
use spillway_runtime::audit::Timestamp;

/// A part that has something to say of how it stands. It must be quick: it reads a state, it does not find one out.
pub trait StatusSource: Send + Sync {
    fn add_to(&self, status: &mut control::StatusResponse);
}

/// What happened lately on this node. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Mutex<VecDeque<String>>>);

impl Events {
    const MOST: usize = 100;

    pub fn tell(&self, event: &str) {
        let mut events = self.0.lock();
        if events.len() == Self::MOST {
            events.pop_front();
        }
        events.push_back(format!("{} {event}", Timestamp::from(SystemTime::now())));
    }
}

impl StatusSource for Events {
    fn add_to(&self, status: &mut control::StatusResponse) {
        status.events.extend(self.0.lock().iter().cloned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_events_are_kept() {
        let events = Events::default();
        (0..=Events::MOST).for_each(|number| events.tell(&format!("number {number}")));
        let mut status = control::StatusResponse::default();
        events.add_to(&mut status);
        assert_eq!(status.events.len(), Events::MOST);
        assert!(status.events[0].ends_with("Z number 1") && status.events[99].ends_with("Z number 100"));
    }
}
