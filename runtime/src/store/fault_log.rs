//! What a store says is wrong, for the log: each kind at once, and then again only every [`EVERY`].
//!
//! A store that is ill fails thousands of statements a second; each is counted in the metrics, and the
//! log says why.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

const EVERY: Duration = Duration::from_secs(10);

/// Of a server's own text. Statements are prepared, so it names tables and limits, not values.
const TEXT: usize = 300;

#[derive(Debug)]
pub struct FaultLog {
    store: &'static str,
    /// By what was done, and the kind of fault: both are fixed words, so it stays small.
    said: Mutex<BTreeMap<(&'static str, &'static str), Said>>,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    unsaid: u64,
}

impl FaultLog {
    pub fn of(store: &'static str) -> Self {
        Self { store, said: Mutex::default() }
    }

    pub fn say(&self, doing: &'static str, kind: &'static str, fault: &dyn std::fmt::Display) {
        if let Some(unsaid) = self.due(doing, kind, Instant::now()) {
            let fault = one_line(&fault.to_string());
            tracing::warn!(store = self.store, doing, kind, fault, unsaid, "a store fails");
        }
    }

    /// Whether it is to be said now, and how many times it was not since the last time.
    fn due(&self, doing: &'static str, kind: &'static str, now: Instant) -> Option<u64> {
        let mut said = self.said.lock();
        match said.get_mut(&(doing, kind)) {
            Some(said) if now.saturating_duration_since(said.at) < EVERY => {
                said.unsaid += 1;
                None
            }
            Some(said) => {
                said.at = now;
                Some(std::mem::take(&mut said.unsaid))
            }
            None => {
                said.insert((doing, kind), Said { at: now, unsaid: 0 });
                Some(0)
            }
        }
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_said_at_once_and_then_again_after_a_while() {
        let log = FaultLog::of("cassandra");
        let now = Instant::now();
        assert_eq!(log.due("write", "invalid", now), Some(0));
        assert_eq!(log.due("write", "timeout", now), Some(0), "another kind");
        assert_eq!(log.due("read", "invalid", now), Some(0), "something else was being done");
        for _ in 0..3 {
            assert_eq!(log.due("write", "invalid", now + EVERY / 2), None);
        }
        assert_eq!(log.due("write", "invalid", now + EVERY), Some(3));
        assert_eq!(log.due("write", "invalid", now + EVERY * 2), Some(0));
    }

    #[test]
    fn a_servers_text_cannot_write_lines_of_its_own() {
        assert_eq!(one_line("a\r\nb\u{1b}[31m"), "a  b [31m");
        assert_eq!(one_line(&"x".repeat(10_000)).len(), TEXT);
    }
}
