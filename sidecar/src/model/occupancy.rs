//! How many are inside, on average over the last moments.
//!
//! The rule: it is the time that counts, not who looks when: an answer is given just after a place got free.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A place that was taken or left so long ago still counts 1/e.
const MEMORY: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Occupancy {
    places: usize,
    state: Arc<Mutex<State>>,
}

/// Inside until dropped.
#[derive(Debug)]
pub struct Inside(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    inside: u32,
    /// Exponentially weighted mean of `inside` over time, up to `changed`.
    mean: f64,
    changed: Instant,
}

impl Occupancy {
    pub fn of_places(places: usize) -> Self {
        let state = State { inside: 0, mean: 0.0, changed: Instant::now() };
        Self { places, state: Arc::new(Mutex::new(state)) }
    }

    pub fn enter(&self) -> Inside {
        let mut state = self.state.lock();
        state.advance(Instant::now());
        state.inside += 1;
        Inside(Arc::clone(&self.state))
    }

    /// Those inside for each place; above 1 some wait.
    pub fn load(&self) -> f64 {
        let mut state = self.state.lock();
        state.advance(Instant::now());
        state.mean / self.places.max(1) as f64
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.advance(Instant::now());
        state.inside = state.inside.saturating_sub(1);
    }
}

impl State {
    /// `inside` has been what it is since `changed`: the mean moves towards it by 1 - e^(-t / [`MEMORY`]).
    fn advance(&mut self, now: Instant) {
        let time = now.saturating_duration_since(self.changed).as_secs_f64();
        let weight = -(-time / MEMORY.as_secs_f64()).exp_m1();
        self.mean += (f64::from(self.inside) - self.mean) * weight;
        self.changed = self.changed.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_time_that_places_were_taken() {
        let began = Instant::now();
        let at = |seconds: f64| began + Duration::from_secs_f64(seconds);
        let mut state = State { inside: 0, mean: 0.0, changed: began };
        // Three of four milliseconds taken, ten seconds long.
        for step in 0..2_500 {
            state.inside = 1;
            state.advance(at(f64::from(step) * 0.004 + 0.003));
            state.inside = 0;
            state.advance(at(f64::from(step) * 0.004 + 0.004));
        }
        assert!((state.mean - 0.75).abs() < 0.01, "{}", state.mean);
        state.advance(at(15.0));
        assert!(state.mean < 0.01, "{}", state.mean);
        state.inside = 2;
        state.advance(at(100.0));
        assert!((state.mean - 2.0).abs() < 0.01, "a hang is full load, also where nothing ends: {}", state.mean);
        // A clock that seems to step back changes nothing.
        state.advance(at(1.0));
        assert!((state.mean - 2.0).abs() < 0.01);
    }

    #[test]
    fn who_leaves_is_not_inside_any_more() {
        let occupancy = Occupancy::of_places(2);
        let both = (occupancy.enter(), occupancy.enter());
        assert_eq!(occupancy.state.lock().inside, 2);
        drop(both);
        assert_eq!(occupancy.state.lock().inside, 0);
        assert!(occupancy.load() < 0.1);
    }
}
