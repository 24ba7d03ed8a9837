//! Whether looking up pays for one model: switches its cache off while it does not, and tries again.
//!
//! The rule: the cache pays while what its hits save is at least `margin` times what all look-ups cost,
//!
//! ```text
//! hits x (mean time of a miss' call) >= margin x (time spent on looking up and storing)
//! ```
//!
//! judged over windows of look-ups. It takes more to be switched on again (`resume`) than to stay on.
//!
//! ```text
//! on --window below margin--> off --retry has passed, next observation--> trial
//! off --window of samples at resume or above--> on; --window below--> off, the next trial no later
//! trial --window at resume or above--> on; --window below--> off
//! ```
//!
//! Off, a sample of the requests is still looked up and stored. It should be a sample of keys: all requests
//! of some keys, not some requests of all keys, which would see few of the repeats (spatial sampling:
//! Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015). Where keys are not known
//! before the look-up, the trial judges alone. What a trial stored is there for the next one, so a cache
//! that is slow to warm up is not judged by its cold start for ever.

use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Look-ups that are judged together. Default 1,000.
    pub window: u64,
    /// Saving over cost below which the cache is switched off; a ratio. Default 2.
    pub margin: u32,
    /// Saving over cost from which it is switched on again; a ratio. Default 3.
    pub resume: u32,
    /// Share of the requests looked up while off, 0 to 1. Default 0.01.
    pub sample: f64,
    /// Time off until all are tried again. Default 30 s.
    pub retry: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { window: 1_000, margin: 2, resume: 3, sample: 0.01, retry: Duration::from_secs(30) }
    }
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Look up, store.
    Use,
    /// Neither.
    Skip,
    /// As with `Use`, so that it can be judged.
    Sample,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    On,
    Off {
        /// When the next trial begins.
        until: Duration,
    },
    Trial,
}

/// What came of a request that was looked up. One whose call failed is not observed: it says nothing of
/// what a hit saves, and a failing model must not switch off the cache that stands in for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// Answered without a call of its own. `cost`: CPU time of looking up.
    Hit { cost: Duration },
    /// `cost`: CPU time of looking up and storing. `call`: how long the model's answer took.
    Miss { cost: Duration, call: Duration },
}

#[derive(Clone, Debug)]
pub struct Guard {
    settings: Settings,
    state: State,
    window: Window,
}

impl Guard {
    pub fn new(settings: Settings) -> Self {
        Self { settings, state: State::On, window: Window::default() }
    }

    /// `random` is evenly spread, and best the same for requests with one key: a hash of the entity.
    pub fn decide(&self, now: Duration, random: u64) -> Decision {
        match self.state {
            State::On | State::Trial => Decision::Use,
            State::Off { until } if now >= until => Decision::Use,
            State::Off { .. } if ratio(random) < self.settings.sample => Decision::Sample,
            State::Off { .. } => Decision::Skip,
        }
    }

    /// The new state, if it changed.
    pub fn observe(&mut self, now: Duration, observation: Observation) -> Option<State> {
        let before = self.state;
        if matches!(self.state, State::Off { until } if now >= until) {
            self.state = State::Trial;
            self.window = Window::default();
        }
        self.window.add(observation);
        if self.window.lookups() >= self.settings.window {
            let window = std::mem::take(&mut self.window);
            let needed = if self.state == State::On { self.settings.margin } else { self.settings.resume };
            self.state = match self.state {
                _ if window.pays(needed) => State::On,
                State::On | State::Trial => State::Off { until: now.saturating_add(self.settings.retry) },
                off @ State::Off { .. } => off,
            };
        }
        (self.state != before).then_some(self.state)
    }

    pub fn state(&self) -> State {
        self.state
    }
}

/// Sums of one window; times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Window {
    hits: u64,
    misses: u64,
    cost: u64,
    calls: u64,
}

impl Window {
    fn lookups(&self) -> u64 {
        self.hits.saturating_add(self.misses)
    }

    fn add(&mut self, observation: Observation) {
        let cost = match observation {
            Observation::Hit { cost } => {
                self.hits = self.hits.saturating_add(1);
                cost
            }
            Observation::Miss { cost, call } => {
                self.misses = self.misses.saturating_add(1);
                self.calls = self.calls.saturating_add(nanos(call));
                cost
            }
        };
        self.cost = self.cost.saturating_add(nanos(cost));
    }

    /// `hits x calls / misses >= needed x cost`, without the division: where all are hits, it pays.
    fn pays(&self, needed: u32) -> bool {
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        product(self.hits, self.calls) >= product(self.cost, self.misses).saturating_mul(needed.into())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// 53 bits as a number from 0 to just below 1.
fn ratio(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
