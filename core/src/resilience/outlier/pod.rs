//! What is known of one pod.

use std::time::Duration;

use super::settings::SLOTS;
use super::{PodId, Reason};

#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub id: PodId,
    /// Rises whenever the pod goes or comes back, and is no other pod's.
    pub period: u64,
    pub state: State,
    pub held: Option<Held>,
    pub window: Window,
    pub failures_in_row: u32,
    pub failures: FailureShare,
    pub outstanding: Outstanding,
    pub last_answer: Duration,
    /// What calls waited in vain for since the last answer.
    pub unanswered: Duration,
    /// How often it was ejected, less what is forgiven.
    pub ejections: u32,
    forgiven: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    In,
    Ejected {
        until: Duration,
        reason: Reason,
    },
    Probing {
        successes: u32,
        /// When the probe that is under way began.
        since: Option<Duration>,
        reason: Reason,
    },
}

/// Broke a rule, but has to stay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub until: Duration,
    pub reason: Reason,
}

impl Pod {
    pub fn new(id: PodId, period: u64) -> Self {
        Self {
            id,
            period,
            state: State::In,
            held: None,
            window: Window::default(),
            failures_in_row: 0,
            failures: FailureShare::default(),
            outstanding: Outstanding::default(),
            last_answer: Duration::ZERO,
            unanswered: Duration::ZERO,
            ejections: 0,
            forgiven: None,
        }
    }

    /// Begins a period: calls of earlier ones no longer count.
    pub fn enter(&mut self, state: State, period: u64) {
        self.state = state;
        self.period = period;
        self.outstanding = Outstanding::default();
        self.forgiven = None;
    }

    pub fn forget_evidence(&mut self) {
        self.window = Window::default();
        self.failures_in_row = 0;
        self.unanswered = Duration::ZERO;
    }

    /// For how long it has owed an answer: since the oldest call under way began, or the last answer.
    pub fn owes_for(&self, now: Duration) -> Duration {
        self.outstanding.oldest().map_or(Duration::ZERO, |oldest| now.saturating_sub(oldest.max(self.last_answer)))
    }

    /// Forgets one ejection for each `after` that it is in.
    pub fn forgive(&mut self, now: Duration, after: Duration) {
        if self.state == State::In
            && self.held.is_none()
            && now.saturating_sub(*self.forgiven.get_or_insert(now)) >= after
        {
            self.ejections = self.ejections.saturating_sub(1);
            self.forgiven = Some(now);
        }
    }

    pub fn until(&self) -> Option<Duration> {
        match self.state {
            State::Ejected { until, .. } => Some(until),
            State::In | State::Probing { .. } => None,
        }
    }

    pub fn reason(&self) -> Option<Reason> {
        match self.state {
            State::Ejected { reason, .. } | State::Probing { reason, .. } => Some(reason),
            State::In => self.held.map(|held| held.reason),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub successes: u32,
    pub failures: u32,
    /// Of the latencies of the successes, each as log2 of its microseconds.
    pub log2_sum: f64,
}

impl Counts {
    fn plus(self, other: Self) -> Self {
        Self {
            successes: self.successes.saturating_add(other.successes),
            failures: self.failures.saturating_add(other.failures),
            log2_sum: self.log2_sum + other.log2_sum,
        }
    }
}

/// A window that slides by a tenth of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Window {
    slots: [Counts; SLOTS],
    /// The slot of the newest call.
    newest: u64,
}

impl Window {
    pub fn add(&mut self, counts: Counts, slot: u64) {
        self.advance(slot);
        let place = &mut self.slots[(self.newest % SLOTS as u64) as usize];
        *place = place.plus(counts);
    }

    /// Forgets what is a window older than `slot`. A clock that steps back stays in the newest slot.
    pub fn advance(&mut self, slot: u64) {
        let gone = slot.saturating_sub(self.newest).min(SLOTS as u64);
        for step in 0..gone {
            self.slots[((slot - step) % SLOTS as u64) as usize] = Counts::default();
        }
        self.newest = self.newest.max(slot);
    }

    pub fn total(&self) -> Counts {
        self.slots.iter().fold(Counts::default(), |sum, slot| sum.plus(*slot))
    }
}

/// Calls under way, in two groups by age, so that the start of the oldest is known without a list of all.
///
/// New calls join the young group. When the last of the old group has ended, the young group is the old one.
#[derive(Clone, Debug, Default)]
pub(super) struct Outstanding {
    old: u32,
    old_since: Duration,
    young: u32,
    young_since: Duration,
    /// The number of the young group; the old one's is one less.
    group: u64,
}

impl Outstanding {
    /// Its group, to be given back to [`Self::end`].
    pub fn begin(&mut self, now: Duration) -> u64 {
        if self.young == 0 {
            self.young_since = now;
        }
        self.young = self.young.saturating_add(1);
        let group = self.group;
        self.age();
        group
    }

    pub fn end(&mut self, group: u64) {
        let calls = if group == self.group { &mut self.young } else { &mut self.old };
        *calls = calls.saturating_sub(1);
        self.age();
    }

    /// When the oldest began, or earlier: the start of its group.
    pub fn oldest(&self) -> Option<Duration> {
        (self.old > 0).then_some(self.old_since)
    }

    fn age(&mut self) {
        if self.old == 0 && self.young > 0 {
            (self.old, self.old_since) = (self.young, self.young_since);
            self.young = 0;
            self.group += 1;
        }
    }
}

/// An average of failures (1) and successes (0): each call moves it by an eighth of the difference (the gain of
/// TCP's round trip time, RFC 6298), and time takes half of it each [`Self::HALF_LIFE`], called or not.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FailureShare {
    share: f64,
    since: Duration,
}

impl FailureShare {
    const GAIN: f64 = 1.0 / 8.0;
    const HALF_LIFE: Duration = Duration::from_secs(2);

    pub fn add(&mut self, failed: bool, now: Duration) {
        let share = self.at(now);
        self.share = share + Self::GAIN * (f64::from(u8::from(failed)) - share);
        self.since = self.since.max(now);
    }

    pub fn at(&self, now: Duration) -> f64 {
        if self.share == 0.0 {
            return 0.0;
        }
        let half_lives = now.saturating_sub(self.since).as_secs_f64() / Self::HALF_LIFE.as_secs_f64();
        self.share * (-half_lives).exp2()
    }
}
