//! Which requests of a class go first while some must go: those of tenants that ask for more than their share.
//!
//! The rule: what there is goes to tenants as if it were poured in: each gets what it asks for, up to a
//! level that is the same for all (max-min fairness). So no tenant can starve another by asking for more.
//!
//! [`super::shed`] lets in what lies below a point on its line. A request's place on the line is drawn at
//! random, scaled by what its tenant asks for:
//!
//! ```text
//! place  = u x r / R        u: random, 0 to 1; r: requests/s of the tenant and class; R: the largest r of any tenant
//! let in = min(1, p x R / r) x r = min(r, p x R)      for the point p
//! ```
//!
//! A draw for each request, not one for each caller and minute as in DAGOR: a caller that sends all as one
//! user would else be let in with all of it, and be followed by others who noticed.
//!
//! Rates are moving averages over windows of 200 ms, as the shedder's are. A tenant's first window counts
//! as none, so that it is let in for that long. O(1) but at the end of a window, which is O(tenants); a tenant
//! that has asked for nothing for some seconds is forgotten.

use std::collections::HashMap;
use std::time::Duration;

use crate::limit::Class;

const WINDOW: Duration = Duration::from_millis(200);
/// The weight of a new window.
const WEIGHT: f64 = 0.3;
/// Requests per second below which a tenant is forgotten.
const LEAST: f64 = 0.01;
/// Tenants that are told apart; those beyond count as the largest.
const MOST_TENANTS: usize = 10_000;

const CLASSES: usize = Class::ALL.len();

/// What the tenants of one pool ask for.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    tenants: HashMap<u32, Asked>,
    /// Requests per second of the tenant that asks for most, by class.
    largest: [f64; CLASSES],
    opened: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// In the window.
    counted: [u32; CLASSES],
    /// Requests per second, lately.
    rates: [f64; CLASSES],
    known: bool,
}

impl Shares {
    /// The place of a request within its class, 0 to `u64::MAX`, for [`super::Shedder::admit`]. Counts it.
    pub fn place(&mut self, tenant: u32, class: Class, random: u64, now: Duration) -> u64 {
        let open = now.saturating_sub(*self.opened.get_or_insert(now));
        if open >= WINDOW {
            self.end_window(open.as_secs_f64());
            self.opened = Some(now);
        }
        let class = class as usize;
        if self.tenants.len() >= MOST_TENANTS && !self.tenants.contains_key(&tenant) {
            return random;
        }
        let asked = self.tenants.entry(tenant).or_default();
        asked.counted[class] = asked.counted[class].saturating_add(1);
        let largest = self.largest[class];
        if largest > 0.0 { (random as f64 * (asked.rates[class] / largest)) as u64 } else { random }
    }

    /// Requests per second that a tenant asks for in a class, and the most that any does.
    pub fn rates(&self, tenant: u32, class: Class) -> (f64, f64) {
        let rate = self.tenants.get(&tenant).map_or(0.0, |asked| asked.rates[class as usize]);
        (rate, self.largest[class as usize])
    }

    fn end_window(&mut self, seconds: f64) {
        // A pause counts as the windows that it was.
        let weight = 1.0 - (1.0 - WEIGHT).powf(seconds / WINDOW.as_secs_f64());
        let mut largest = [0.0_f64; CLASSES];
        self.tenants.retain(|_, asked| {
            let weight = if asked.known { weight } else { 1.0 };
            for ((rate, counted), largest) in asked.rates.iter_mut().zip(asked.counted).zip(&mut largest) {
                *rate += (f64::from(counted) / seconds - *rate) * weight;
                *largest = largest.max(*rate);
            }
            asked.counted = [0; CLASSES];
            asked.known = true;
            asked.rates.iter().any(|rate| *rate > LEAST)
        });
        self.largest = largest;
    }
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
