//! Who is let in to wait for a place at all.
//!
//! The rule: both decisions are core's, who goes first by class and who in it by what each asks for; here they are
//! shared by threads, behind one short mutex.

use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::limit::Class;
use spillway_core::resilience::{Shares, ShedSettings, Shedder, shed::STEPS};

use super::gate::{Guest, Why};

pub struct Shed(Mutex<(Shedder, Shares)>);

impl Shed {
    pub fn new() -> Self {
        Self(Mutex::new((Shedder::new(ShedSettings::default()), Shares::default())))
    }

    pub fn admit(&self, guest: &Guest, now: Duration) -> Result<(), Why> {
        let random = rand::random();
        let (shedder, shares) = &mut *self.0.lock();
        let place = shares.place(guest.tenant, guest.class, random, now);
        if shedder.admit(guest.class, place, now) {
            return Ok(());
        }
        Err(if classes(shedder) > guest.class as usize as f64 { Why::Share } else { Why::Shed })
    }

    /// What became of one that was let in: it has its place after such a wait, or there was none to wait.
    pub fn observe(&self, wait: Option<Duration>) {
        self.0.lock().0.observe(wait.unwrap_or_default(), wait.is_some());
    }

    /// One that was let in takes no place, so that it neither waits nor says how long others do.
    pub fn observe_placeless(&self) {
        self.0.lock().0.observe_waitless();
    }

    /// Classes that are let in, from critical down: 4 are all.
    pub fn lets_in(&self, now: Duration) -> f64 {
        // It moves when it is asked.
        let mut shedder = self.0.lock().0.clone();
        shedder.tick(now);
        classes(&shedder)
    }

    /// The share of a guest's requests that are let in: as in [`spillway_core::resilience::share`], min(1, p x R / r).
    pub fn lets_in_of(&self, guest: &Guest, now: Duration) -> f64 {
        let share = (self.lets_in(now) - guest.class as usize as f64).clamp(0.0, 1.0);
        let (rate, largest) = self.0.lock().1.rates(guest.tenant, guest.class);
        if share > 0.0 && largest > 0.0 { (share * largest / rate).min(1.0) } else { share }
    }
}

fn classes(shedder: &Shedder) -> f64 {
    shedder.level() * Class::ALL.len() as f64 / STEPS as f64
}
