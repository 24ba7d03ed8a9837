//! The circuit breaker of one model on one pod, shared by all threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::resilience::Outcome;
use spillway_core::resilience::breaker::{Breaker, BreakerSettings, BreakerState, Permit};

#[derive(Debug)]
pub struct SharedBreaker {
    /// Whether it is anything but closed: a closed one is asked without its lock.
    open: AtomicBool,
    inner: Mutex<(BreakerSettings, Breaker)>,
}

impl SharedBreaker {
    pub fn new(settings: BreakerSettings) -> Self {
        let breaker = Breaker::new(settings.clone());
        Self { open: AtomicBool::new(false), inner: Mutex::new((settings, breaker)) }
    }

    /// Takes other settings, and begins anew if they are others.
    pub fn set(&self, settings: &BreakerSettings) {
        let mut inner = self.inner.lock();
        if inner.0 != *settings {
            *inner = (settings.clone(), Breaker::new(settings.clone()));
            self.open.store(false, Ordering::Relaxed);
        }
    }

    pub fn state(&self) -> BreakerState {
        self.inner.lock().1.state()
    }

    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    pub fn allows(&self, now: Duration) -> bool {
        !self.is_open() || self.inner.lock().1.allows(now)
    }

    /// Asks for one call. The new state, if that began its probes.
    pub fn permit(&self, now: Duration) -> (Option<Permit>, Option<BreakerState>) {
        let breaker = &mut self.inner.lock().1;
        let was_open = matches!(breaker.state(), BreakerState::Open { .. });
        let permit = breaker.permit(now).ok();
        let began = was_open && permit.is_some();
        (permit, began.then(|| breaker.state()))
    }

    /// How a call ended. The new state, if it changed.
    pub fn record(&self, permit: Permit, outcome: Outcome, now: Duration) -> Option<BreakerState> {
        let breaker = &mut self.inner.lock().1;
        let changed = breaker.record(permit, outcome, now)?;
        self.open.store(!matches!(changed, BreakerState::Closed { .. }), Ordering::Relaxed);
        Some(changed)
    }
}
