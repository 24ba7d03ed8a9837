//! Which requests are let in while a region has more to do than it can.
//!
//! The rule: the less important goes first, and no more of it than needed, so that what is let in is done in
//! time. Overload control in the manner of WeChat's DAGOR (Zhou et al., "Overload Control for Scaling WeChat
//! Microservices", SoCC 2018): the region is overloaded when requests waited more than 20 ms on average
//! before their work began (longer where it takes long: [`ShedSettings::queue_wait`]), or were refused by a full bulkhead. The level is a point on a line of
//! 4 classes x 128 steps; what lies below it is let in. A request's step within its class comes from outside
//! ([`super::share`]: by what its tenant asks for).
//!
//! ```text
//! critical            high                normal              low
//! 0 ...............128 ...............256 ...............384 ...............512
//!                               ^ level: below it admitted, above it shed
//! at the end of a window, where it is      overloaded: fall    else: rise
//! ```
//!
//! At the end of each window a target is set in requests per second, and the level to where it would have
//! let in the target of what was offered lately (a moving average by step):
//!
//! ```text
//! overloaded: target = 0.95 x started, unless less was let in than started: then a backlog drains
//!             level for target x (1 - drain), drain = (mean wait - 20 ms) / window, at most 0.3
//! else:       target x 1.01, or x 1.1 while the mean wait is below a quarter of 20 ms
//! ```
//!
//! The paper falls by 5 % of the admitted, not to the started, always rises by 1 %, and has no drain. By that,
//! 10 times the capacity takes 45 windows to shed, and since the level falls until the backlog has drained, it
//! ends far too low. If nothing was started, nothing is known, and the target stays.
//!
//! A critical request is shed only while more critical ones are offered than requests of any class were
//! started. The step on the boundary is let in in part, evenly, so that one large caller does not go on and off.
//!
//! 4 KiB; no allocation. [`Shedder::admit`] and [`Shedder::observe`] are O(1), the end of a window O(512).

use std::time::Duration;

use crate::limit::Class;

const CLASSES: usize = 4;
const STEPS_PER_CLASS: usize = 128;
/// The level at which all are let in.
pub const STEPS: usize = CLASSES * STEPS_PER_CLASS;
/// How far the target falls below the started, and what it rises by (DAGOR's alpha and beta).
const FALL: f64 = 0.05;
const RISE: f64 = 0.01;
/// The rise while requests wait less than the share `IDLE` of `queue_wait`.
const RETURN: f64 = 0.1;
const IDLE: f64 = 0.25;
/// The most of the target that is left out to drain a backlog.
const DRAIN: f64 = 0.3;
/// Where the work of this many requests takes longer than `queue_wait`, they may wait for that long instead, up to
/// so many times `queue_wait`.
const EVEN: f64 = 20.0;
const LONGEST: f64 = 5.0;
/// The weight of a new window in what is offered lately.
const WEIGHT: f64 = 0.3;

/// When a region counts as overloaded.
#[derive(Clone, Debug, PartialEq)]
pub struct ShedSettings {
    /// Mean wait before the work begins, above which the region is overloaded. Default 20 ms.
    ///
    /// It is also what evens out arrivals: with Poisson arrivals at one queue, overload keeps 97 % of the
    /// capacity busy where this is the time of 20 requests, 93 % for 6 and 88 % for 2. So where fewer than 1,000 a
    /// second are started, they may wait for the time of 20, but for no more than 5 times this.
    pub queue_wait: Duration,
    /// Share of requests refused by full bulkheads, above which it is. Default 0.01.
    pub refusals: f64,
    /// The shortest time that is judged at once. Default 200 ms.
    pub window: Duration,
    /// The longest; a window with fewer than `samples` observed lasts until then. Default 1 s.
    pub longest_window: Duration,
    /// Default 100.
    pub samples: u32,
}

impl Default for ShedSettings {
    fn default() -> Self {
        Self {
            queue_wait: Duration::from_millis(20),
            refusals: 0.01,
            window: Duration::from_millis(200),
            longest_window: Duration::from_secs(1),
            samples: 100,
        }
    }
}

/// The admission level of one region.
#[derive(Clone, Debug)]
pub struct Shedder {
    settings: ShedSettings,
    /// Whole steps let in, and the part of the next one.
    level: f64,
    /// Requests per second to let in. Infinite before the first overload.
    target: f64,
    /// Requests per second of each step, lately.
    offered: [f32; STEPS],
    /// What the boundary step has saved up; a request of it costs 1.
    part: f64,
    opened: Option<Duration>,
    window: Window,
}

#[derive(Clone, Debug)]
struct Window {
    offered: [u32; STEPS],
    admitted: u32,
    started: u32,
    refused: u32,
    /// Of the started, those that could have had to wait, and how long they did.
    could_wait: u32,
    waited_us: u64,
}

impl Window {
    const EMPTY: Self = Self { offered: [0; STEPS], admitted: 0, started: 0, refused: 0, could_wait: 0, waited_us: 0 };
}

impl Shedder {
    /// All are let in.
    pub fn new(settings: ShedSettings) -> Self {
        Self {
            settings,
            level: STEPS as f64,
            target: f64::INFINITY,
            offered: [0.0; STEPS],
            part: 0.0,
            opened: None,
            window: Window::EMPTY,
        }
    }

    /// Steps let in, [`STEPS`] for all.
    pub fn level(&self) -> f64 {
        self.level
    }

    /// Whether a request is let in. Each is asked about once, before any queue.
    pub fn admit(&mut self, class: Class, hash: u64, now: Duration) -> bool {
        self.tick(now);
        // The top 7 bits.
        let step = (class as usize * STEPS_PER_CLASS + (hash >> 57) as usize).min(STEPS - 1);
        self.window.offered[step] = self.window.offered[step].saturating_add(1);
        let share = (self.level - step as f64).clamp(0.0, 1.0);
        let admitted = share >= 1.0 || {
            self.part += share;
            self.part >= 1.0
        };
        if admitted && share < 1.0 {
            self.part -= 1.0;
        }
        self.window.admitted = self.window.admitted.saturating_add(u32::from(admitted));
        admitted
    }

    /// What became of one that was let in: its work began after `queue_wait`, or else (`admitted` false) a
    /// bulkhead refused it as full. Refusals for other reasons, a tenant's bound or too late, say nothing
    /// about the region.
    pub fn observe(&mut self, queue_wait: Duration, admitted: bool) {
        if admitted {
            self.window.started = self.window.started.saturating_add(1);
            self.window.could_wait = self.window.could_wait.saturating_add(1);
            let waited_us = u64::try_from(queue_wait.as_micros()).unwrap_or(u64::MAX);
            self.window.waited_us = self.window.waited_us.saturating_add(waited_us);
        } else {
            self.window.refused = self.window.refused.saturating_add(1);
        }
    }

    /// One that was let in began its work where nobody waits, so that it says nothing about waits.
    pub fn observe_waitless(&mut self) {
        self.window.started = self.window.started.saturating_add(1);
    }

    /// Moves the level if a window has ended. [`Shedder::admit`] does so too.
    pub fn tick(&mut self, now: Duration) {
        let open = now.saturating_sub(*self.opened.get_or_insert(now));
        let few = self.window.started.saturating_add(self.window.refused) < self.settings.samples;
        if open < self.settings.window || (few && open < self.settings.longest_window) {
            return;
        }
        self.end_window(open.as_secs_f64().max(0.001));
        self.window = Window::EMPTY;
        self.opened = Some(now);
    }

    fn end_window(&mut self, seconds: f64) {
        let Window { admitted, started, refused, .. } = self.window;
        let [admitted, started, refused] = [admitted, started, refused].map(|count| f64::from(count) / seconds);
        let weight = if self.offered.iter().any(|rate| *rate > 0.0) { WEIGHT } else { 1.0 };
        for (rate, count) in self.offered.iter_mut().zip(&self.window.offered) {
            *rate += ((f64::from(*count) / seconds - f64::from(*rate)) * weight) as f32;
        }
        let (wait, most) = (self.mean_wait(), self.most_wait(started));
        let overloaded = wait > most || refused > self.settings.refusals * (started + refused);
        let mut drain = 0.0;
        if !overloaded {
            self.target *= 1.0 + if wait < most * IDLE { RETURN } else { RISE };
        } else if started > 0.0 {
            drain = ((wait - most) / seconds).clamp(0.0, DRAIN);
            // With less let in than started, a backlog drains, and the started may not be all that could be.
            if admitted > started {
                self.target = (1.0 - FALL) * started;
            }
        }
        let critical: f64 = self.offered[..STEPS_PER_CLASS].iter().map(|rate| f64::from(*rate)).sum();
        let least = if critical * (1.0 - FALL) <= self.target { STEPS_PER_CLASS as f64 } else { 0.0 };
        self.level = self.level_for(self.target * (1.0 - drain)).max(least);
    }

    /// The mean wait in seconds above which so many started a second are overload.
    fn most_wait(&self, started: f64) -> f64 {
        let most = self.settings.queue_wait.as_secs_f64();
        (EVEN / started).clamp(most, most * LONGEST)
    }

    /// Mean wait in seconds before the work began.
    fn mean_wait(&self) -> f64 {
        self.window.waited_us as f64 / 1e6 / f64::from(self.window.could_wait.max(1))
    }

    /// The level that would let in `target` of what is offered.
    fn level_for(&self, target: f64) -> f64 {
        let mut left = target;
        for (step, rate) in self.offered.iter().enumerate() {
            let rate = f64::from(*rate);
            if rate > left {
                return step as f64 + left / rate;
            }
            left -= rate;
        }
        STEPS as f64
    }
}

#[cfg(test)]
#[path = "shed_tests.rs"]
mod tests;
