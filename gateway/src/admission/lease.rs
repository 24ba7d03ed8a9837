//! One bucket: of a whole rate, or of a slice of its region's quota.

use std::time::Duration;

use spillway_core::limit::lease::{Ask, Grant};
use spillway_core::limit::quota::{Change, Demand};
use spillway_core::limit::{Class, Decision, Gcra, Quota, Slice, Standing};

use super::limit::Charge;

/// A slice that nobody asked for so long is given up, once its bucket is full.
const IDLE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Bucket {
    gcra: Gcra,
    pub state: u64,
    /// The state if the request that is being judged is admitted.
    pub next: u64,
    lease: Option<Box<Lease>>,
}

/// What a gateway has of a quota, and why.
#[derive(Clone)]
struct Lease {
    slice: Slice,
    quota: Quota,
    /// Under which it is asked for; `None`: it is not.
    listing: Option<u64>,
    demand: Demand,
    /// Tokens that were asked for since the demand was told.
    asked: u64,
    told: Duration,
    used: Duration,
}

/// A slice as it is, in milli-tokens a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub rate: u64,
    pub demand: u64,
    pub standing: Standing,
}

impl Bucket {
    pub fn full(gcra: Gcra) -> Self {
        Self { gcra, state: 0, next: 0, lease: None }
    }

    /// Goes on as a bucket of another rate, or of a slice of another quota, with the same fraction used.
    pub fn follow(mut self, gcra: Gcra, quota: Option<Quota>, now_ns: u64) -> Self {
        match (&mut self.lease, quota) {
            (Some(lease), Some(quota)) => {
                lease.quota = quota.admitting(1, &lease.quota);
                let change = lease.slice.change_quota(lease.quota);
                self.change(change, now_ns);
            }
            _ => {
                self.lease = None;
                self.turn_into(gcra, now_ns);
            }
        }
        self
    }

    /// Whether Redis is asked for it.
    pub fn is_listed(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.listing.is_some())
    }

    /// Uses a slice of a quota from now on. `placed`: there is nobody to ask, so it has its own share at once.
    pub fn begin(&mut self, quota: Quota, listing: Option<u64>, placed: bool, now_ns: u64) {
        if let Some(lease) = &mut self.lease {
            lease.listing = listing;
            return;
        }
        let now = Duration::from_nanos(now_ns);
        let mut slice = Slice::new(quota);
        if placed {
            let _ = slice.missed();
        }
        self.turn_into(slice.bucket(), now_ns);
        let lease = Lease { slice, quota, listing, demand: Demand::default(), asked: 0, told: now, used: now };
        self.lease = Some(Box::new(lease));
    }

    /// Judges, and sets `next`.
    pub fn decide(&mut self, cost: u32, charge: &Charge<'_>) -> Decision {
        self.count(cost, charge.now_ns);
        let decision = self.gcra.decide(self.state, charge.now_ns, cost, charge.class);
        self.next = match decision {
            Decision::Admitted { state, .. } => state,
            Decision::Refused { .. } | Decision::Never { .. } => self.state,
        };
        decision
    }

    /// Counts what is asked for, and makes the slice's bucket large enough for it.
    fn count(&mut self, cost: u32, now_ns: u64) {
        let Some(lease) = self.lease.as_mut().filter(|lease| cost <= lease.quota.burst()) else { return };
        lease.asked = lease.asked.saturating_add(cost.into());
        lease.used = Duration::from_nanos(now_ns);
        if cost > self.gcra.burst() {
            lease.quota = lease.quota.admitting(cost, &lease.quota);
            let change = lease.slice.change_quota(lease.quota);
            self.change(change, now_ns);
        }
    }

    /// What to ask of Redis under this listing; `None`: nothing, it has ended.
    pub fn ask(&mut self, listing: u64, now: Duration) -> Option<Ask> {
        let full = Duration::from_nanos(self.state) <= now;
        let lease = self.lease.as_mut().filter(|lease| lease.listing == Some(listing))?;
        if full && now.saturating_sub(lease.used) >= IDLE {
            self.lease = None;
            return None;
        }
        lease.demand.observe(lease.asked, now.saturating_sub(lease.told), &lease.quota);
        (lease.asked, lease.told) = (0, now);
        Some(lease.slice.ask(&lease.demand))
    }

    /// Takes the answer to what was asked at `sent`, or that there is none.
    pub fn answer(&mut self, listing: u64, sent: Duration, now: Duration, grant: Option<Grant>) -> Option<Report> {
        let lease = self.lease.as_mut().filter(|lease| lease.listing == Some(listing))?;
        let change = match grant {
            Some(grant) => lease.slice.granted(sent, now, grant),
            None => lease.slice.missed(),
        };
        self.change(change, u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        self.report(now)
    }

    /// The slice, if it is one.
    pub fn report(&self, now: Duration) -> Option<Report> {
        let Lease { slice, demand, .. } = &**self.lease.as_ref()?;
        Some(Report { rate: slice.rate(), demand: demand.milli_per_second(), standing: slice.standing(now) })
    }

    /// All tokens, also those that only the highest class may take.
    pub fn remaining(&self, now_ns: u64) -> u32 {
        self.gcra.remaining(self.state, now_ns, Class::Critical)
    }

    pub fn burst(&self) -> u32 {
        self.gcra.burst()
    }

    fn turn_into(&mut self, gcra: Gcra, now_ns: u64) {
        self.state = self.gcra.rescale(self.state, now_ns, &gcra);
        (self.gcra, self.next) = (gcra, self.state);
    }

    fn change(&mut self, change: Option<Change>, now_ns: u64) {
        if let Some(change) = change {
            self.state = change.state(self.state, now_ns);
            (self.gcra, self.next) = (change.to, self.state);
        }
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
