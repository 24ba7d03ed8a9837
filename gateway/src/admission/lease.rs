//! One bucket: of a whole rate, or of a slice of its region's quota.

use std::time::Duration;

use spillway_core::limit::lease::{Ask, Grant};
use spillway_core::limit::quota::{Change, Demand};
use spillway_core::limit::{Decision, Gcra, Quota, Slice, Standing};

use super::limit::Charge;

/// A slice that nobody asked for so long is given up, once its bucket is full.
const IDLE: Duration = Duration::from_secs(60);

pub(super) struct Bucket {
    pub gcra: Gcra,
    pub state: u64,
    /// The state if the request that is being judged is admitted.
    pub next: u64,
    lease: Option<Box<Lease>>,
}

/// What a gateway has of a quota, and why.
struct Lease {
    slice: Slice,
    quota: Quota,
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

    /// Goes on as a bucket of another rate, with the same fraction used.
    pub fn follow(mut self, gcra: Gcra, quota: Option<Quota>, now_ns: u64) -> Self {
        match (&mut self.lease, quota) {
            (Some(lease), Some(quota)) => {
                lease.quota = quota;
                let change = lease.slice.change_quota(quota);
                self.change(change, now_ns);
            }
            _ => {
                self.lease = None;
                self.state = self.gcra.rescale(self.state, now_ns, &gcra);
                self.gcra = gcra;
            }
        }
        self.next = self.state;
        self
    }

    pub fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Begins to use a quota. `alone`: there is nobody to share it by.
    pub fn begin(&mut self, quota: Quota, alone: bool, now_ns: u64) {
        let now = Duration::from_nanos(now_ns);
        let mut slice = Slice::new(quota);
        if alone {
            slice.missed();
        }
        let gcra = slice.bucket();
        self.state = self.gcra.rescale(self.state, now_ns, &gcra);
        self.gcra = gcra;
        let demand = Demand::default();
        self.lease = Some(Box::new(Lease { slice, quota, demand, asked: 0, told: now, used: now }));
    }

    /// Judges, and sets `next`.
    pub fn decide(&mut self, cost: u32, charge: &Charge<'_>) -> Decision {
        let decision = self.would_decide(cost, charge);
        self.next = match decision {
            Decision::Admitted { state, .. } => state,
            Decision::Refused { .. } | Decision::Never { .. } => self.state,
        };
        if let Some(lease) = &mut self.lease
            && !matches!(decision, Decision::Never { .. })
        {
            lease.asked = lease.asked.saturating_add(cost.into());
            lease.used = Duration::from_nanos(charge.now_ns);
        }
        decision
    }

    pub fn would_decide(&self, cost: u32, charge: &Charge<'_>) -> Decision {
        self.gcra.decide(self.state, charge.now_ns, cost, charge.class)
    }

    /// What to ask of Redis; `None`: nothing, since nobody uses the quota here any more.
    pub fn ask(&mut self, now: Duration) -> Option<Ask> {
        let full = Duration::from_nanos(self.state) <= now;
        let lease = self.lease.as_mut()?;
        if full && now.saturating_sub(lease.used) >= IDLE {
            self.lease = None;
            return None;
        }
        lease.demand.observe(lease.asked, now.saturating_sub(lease.told), &lease.quota);
        (lease.asked, lease.told) = (0, now);
        Some(lease.slice.ask(&lease.demand))
    }

    /// Takes the answer to what was asked at `sent`, or that there is none.
    pub fn answer(&mut self, sent: Duration, now: Duration, grant: Option<Grant>) -> Option<Report> {
        let lease = self.lease.as_mut()?;
        let change = match grant {
            Some(grant) => lease.slice.granted(sent, now, grant),
            None => lease.slice.missed(),
        };
        self.change(change, u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        self.report(now)
    }

    pub fn report(&self, now: Duration) -> Option<Report> {
        let Lease { slice, demand, .. } = &**self.lease.as_ref()?;
        Some(Report { rate: slice.rate(), demand: demand.milli_per_second(), standing: slice.standing(now) })
    }

    fn change(&mut self, change: Option<Change>, now_ns: u64) {
        if let Some(change) = change {
            self.state = change.state(self.state, now_ns);
            self.gcra = change.to;
        }
    }
}
