//! Requests of one stream on their way to their model: made ready side by side, gone on in the order they came in.
//!
//! The rule: a request waits for those before it, no longer than its deadline; what became of it without its
//! model (a failure, its deadline) is told at once. It holds no clock and does not wait itself.

use std::collections::VecDeque;
use std::time::Instant;

/// Each has the number under which it came in; `T` is a request that is ready to go on.
#[derive(Debug)]
pub struct Turns<T> {
    line: VecDeque<(u64, Option<Ready<T>>)>,
}

#[derive(Debug)]
struct Ready<T> {
    deadline: Instant,
    request: T,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { line: VecDeque::new() }
    }
}

impl<T> Turns<T> {
    pub fn len(&self) -> usize {
        self.line.len()
    }

    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// A request that is being made ready takes its place.
    pub fn came(&mut self, number: u64) {
        self.line.push_back((number, None));
    }

    pub fn ready(&mut self, number: u64, request: T, deadline: Instant) {
        if let Some((_, place)) = self.line.iter_mut().find(|(waiting, _)| *waiting == number) {
            *place = Some(Ready { deadline, request });
        }
    }

    /// A request that will not be ready; those behind it do not wait for it any more.
    pub fn gone(&mut self, number: u64) {
        self.line.retain(|(waiting, _)| *waiting != number);
    }

    /// The first of the line, if it is ready.
    pub fn take(&mut self) -> Option<T> {
        let ready = self.line.front_mut()?.1.take()?;
        self.line.pop_front();
        Some(ready.request)
    }

    /// Takes out those that are ready and would go on too late.
    pub fn expired(&mut self, now: Instant) -> Vec<T> {
        let mut late = Vec::new();
        self.line.retain_mut(|(_, place)| {
            let expired = place.take_if(|ready| ready.deadline <= now);
            let stays = expired.is_none();
            late.extend(expired.map(|ready| ready.request));
            stays
        });
        late
    }

    /// When the first of those that are ready expires.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.line.iter().filter_map(|(_, place)| Some(place.as_ref()?.deadline)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn requests_go_on_in_the_order_in_which_they_came() {
        let (mut turns, later) = (Turns::default(), Instant::now() + Duration::from_secs(1));
        (0..4).for_each(|number| turns.came(number));
        turns.ready(2, "two", later);
        turns.ready(1, "one", later);
        assert_eq!(turns.take(), None, "the first is not ready");
        turns.gone(0);
        assert_eq!((turns.take(), turns.take(), turns.take()), (Some("one"), Some("two"), None));
        turns.ready(3, "three", later);
        assert_eq!((turns.take(), turns.len()), (Some("three"), 0));
    }

    #[test]
    fn who_waits_behind_a_slow_one_expires_at_its_own_deadline() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        let at = |seconds| now + Duration::from_secs(seconds);
        (0..3).for_each(|number| turns.came(number));
        assert_eq!(turns.next_deadline(), None);
        turns.ready(1, "one", at(5));
        turns.ready(2, "two", at(3));
        assert_eq!(turns.next_deadline(), Some(at(3)));
        assert_eq!(turns.expired(at(2)), Vec::<&str>::new());
        assert_eq!(turns.expired(at(3)), ["two"]);
        assert_eq!((turns.next_deadline(), turns.len()), (Some(at(5)), 2));
        turns.gone(0);
        assert_eq!(turns.take(), Some("one"));
    }
}
