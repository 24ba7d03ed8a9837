//! How many requests a model serves at once, who waits, and who is next.
//!
//! The rule: a model never has more in flight or waiting than it may, nor has any tenant of it; and
//! whenever a slot is free, nobody waits who could have it. The next is of the highest class that waits,
//! then of the tenant with the least in flight (of equals, the one served longest ago), then the one with
//! the earliest deadline. A tenant at its own bound is passed over, whatever the class.
//!
//! Who cannot be done in time is refused at once instead of taking a slot from one who can: less is left
//! to the deadline than the model usually takes (its recent p50).
//!
//! ```text
//! asks --slot free--------------> in flight --leave--> gone
//!      --no slot--> waits --Enter--^
//!                   waits --TooLate, displaced, cancel--> gone
//!      --too late, or all places to wait taken--> refused
//! ```
//!
//! When all places to wait are taken, the newest of the lowest class below the asker's gives up its own.
//! Nothing here waits or wakes: the caller parks the request under the id it is given.
//!
//! A call is O(log n) for each wait that begins or ends in it, [`Bulkhead::resize`] O(n log n). It allocates
//! only for one who waits or for a new tenant. What is held is bounded by `in_flight + queue` and 64 idle tenants.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::limit::Class;

/// Idle tenants that are kept, so that their next request does not allocate.
const IDLE_TENANTS: usize = 64;

/// The bounds of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BulkheadSettings {
    /// Requests in flight. Default 100.
    pub in_flight: u32,
    /// Requests that wait. Default 500.
    pub queue: u32,
    /// Requests of one tenant in flight. Default 80.
    pub tenant_in_flight: u32,
    /// Requests of one tenant that wait. Default 250.
    pub tenant_queue: u32,
}

impl Default for BulkheadSettings {
    fn default() -> Self {
        Self { in_flight: 100, queue: 500, tenant_in_flight: 80, tenant_queue: 250 }
    }
}

/// A request that asks to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub tenant: u32,
    pub class: Class,
    /// When its answer is due, on the clock of `now`.
    pub deadline: Duration,
    pub now: Duration,
}

/// What becomes of a request that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It has a slot, until [`Bulkhead::leave`].
    Entered,
    /// It waits, perhaps in the place of another, which is to be refused as [`Refusal::Full`].
    Queued {
        id: u64,
        displaced: Option<u64>,
    },
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// All of the model's places to wait are taken.
    Full,
    /// It could not be done before its deadline.
    TooLate,
    /// All of the tenant's places to wait are taken.
    TenantFull,
}

/// The end of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    pub id: u64,
    pub answer: Answer,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has a slot from now on, until [`Bulkhead::leave`], even if its caller has gone meanwhile.
    Enter,
    /// To be refused as [`Refusal::TooLate`].
    TooLate,
}

/// The requests of one model.
#[derive(Clone, Debug)]
pub struct Bulkhead {
    settings: BulkheadSettings,
    expected: Duration,
    in_flight: u32,
    next_id: u64,
    turns: u64,
    tenants: BTreeMap<u32, Tenant>,
    waiting: BTreeMap<u64, Ticket>,
    by_deadline: BTreeSet<(Duration, u64)>,
    by_class: BTreeSet<(u8, u64)>,
    /// The tenants that wait and are below their own bound, the next one first.
    ready: BTreeSet<Place>,
}

/// Class of its first request, requests in flight, turn at which it was last served, tenant.
type Place = (u8, u32, u64, u32);

#[derive(Clone, Debug, Default)]
struct Tenant {
    in_flight: u32,
    served: u64,
    /// In the order in which they are served.
    line: BTreeSet<(u8, Duration, u64)>,
    by_class: BTreeSet<(u8, u64)>,
}

impl Bulkhead {
    pub fn new(settings: BulkheadSettings) -> Self {
        Self {
            settings,
            expected: Duration::ZERO,
            in_flight: 0,
            next_id: 0,
            turns: 0,
            tenants: BTreeMap::new(),
            waiting: BTreeMap::new(),
            by_deadline: BTreeSet::new(),
            by_class: BTreeSet::new(),
            ready: BTreeSet::new(),
        }
    }

    /// What the model usually takes: its recent p50. Zero until it is known.
    pub fn set_expected(&mut self, expected: Duration) {
        self.expected = expected;
    }

    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub fn settings(&self) -> &BulkheadSettings {
        &self.settings
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A request asks for a slot.
    pub fn try_enter(&mut self, ticket: Ticket) -> Entry {
        if self.too_late(ticket.deadline, ticket.now) {
            return Entry::Refused(Refusal::TooLate);
        }
        let tenant = self.tenants.get(&ticket.tenant);
        let held = tenant.map_or(0, |tenant| tenant.in_flight);
        if self.in_flight < self.settings.in_flight && held < self.settings.tenant_in_flight {
            self.enter(ticket.tenant);
            return Entry::Entered;
        }
        // Below the asker's class, the newest of the lowest class is the last by class and id.
        let below = |last: Option<&(u8, u64)>| last.filter(|(class, _)| *class > ticket.class as u8).map(|(_, id)| *id);
        let displaced = if full(tenant.map_or(0, |tenant| tenant.line.len()), self.settings.tenant_queue) {
            let own = below(tenant.and_then(|tenant| tenant.by_class.last()));
            let Some(own) = own else { return Entry::Refused(Refusal::TenantFull) };
            Some(own)
        } else if full(self.waiting.len(), self.settings.queue) {
            let Some(any) = below(self.by_class.last()) else { return Entry::Refused(Refusal::Full) };
            Some(any)
        } else {
            None
        };
        if let Some(id) = displaced {
            self.take(id);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.wait(id, ticket);
        Entry::Queued { id, displaced }
    }

    /// A request that had a slot is done. Says whose wait ends by that.
    pub fn leave(&mut self, tenant: u32, now: Duration) -> Vec<Turn> {
        if self.tenants.get(&tenant).is_none_or(|tenant| tenant.in_flight == 0) {
            return Vec::new();
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.change(tenant, |tenant| tenant.in_flight -= 1);
        self.fill(now)
    }

    /// A waiting request's caller has gone. `false`: it does not wait any more; if it was given a slot, it
    /// has to leave.
    pub fn cancel(&mut self, id: u64) -> bool {
        self.take(id).is_some()
    }

    /// Those whose wait is in vain by now, to be refused as [`Refusal::TooLate`].
    pub fn expire(&mut self, now: Duration) -> Vec<u64> {
        let mut expired = Vec::new();
        while let Some((deadline, id)) = self.by_deadline.first().copied()
            && self.too_late(deadline, now)
        {
            self.take(id);
            expired.push(id);
        }
        expired
    }

    /// Other bounds. Who is in flight or waits beyond them stays. Says whose wait ends by that.
    pub fn resize(&mut self, settings: BulkheadSettings, now: Duration) -> Vec<Turn> {
        self.settings = settings;
        let bound = self.settings.tenant_in_flight;
        self.ready = self.tenants.iter().filter_map(|(id, tenant)| tenant.place(*id, bound)).collect();
        self.fill(now)
    }

    fn too_late(&self, deadline: Duration, now: Duration) -> bool {
        deadline <= now.saturating_add(self.expected)
    }

    /// Gives the free slots to those who are next.
    fn fill(&mut self, now: Duration) -> Vec<Turn> {
        let expired = self.expire(now).into_iter();
        let mut turns: Vec<Turn> = expired.map(|id| Turn { id, answer: Answer::TooLate }).collect();
        while self.in_flight < self.settings.in_flight
            && let Some((.., tenant)) = self.ready.first().copied()
            && let Some((.., id)) = self.tenants.get(&tenant).and_then(|tenant| tenant.line.first()).copied()
        {
            self.take(id);
            self.enter(tenant);
            turns.push(Turn { id, answer: Answer::Enter });
        }
        turns
    }

    fn enter(&mut self, tenant: u32) {
        self.in_flight += 1;
        self.turns = self.turns.wrapping_add(1);
        let turn = self.turns;
        self.change(tenant, |tenant| {
            tenant.in_flight += 1;
            tenant.served = turn;
        });
    }

    fn wait(&mut self, id: u64, ticket: Ticket) {
        let class = ticket.class as u8;
        self.waiting.insert(id, ticket);
        self.by_deadline.insert((ticket.deadline, id));
        self.by_class.insert((class, id));
        self.change(ticket.tenant, |tenant| {
            tenant.line.insert((class, ticket.deadline, id));
            tenant.by_class.insert((class, id));
        });
    }

    /// Ends a wait.
    fn take(&mut self, id: u64) -> Option<Ticket> {
        let ticket = self.waiting.remove(&id)?;
        let class = ticket.class as u8;
        self.by_deadline.remove(&(ticket.deadline, id));
        self.by_class.remove(&(class, id));
        self.change(ticket.tenant, |tenant| {
            tenant.line.remove(&(class, ticket.deadline, id));
            tenant.by_class.remove(&(class, id));
        });
        Some(ticket)
    }

    /// The only way to change a tenant: its place among the ready follows, and idle it is forgotten.
    fn change(&mut self, id: u32, change: impl FnOnce(&mut Tenant)) {
        let bound = self.settings.tenant_in_flight;
        let tenant = self.tenants.entry(id).or_default();
        let before = tenant.place(id, bound);
        change(tenant);
        let after = tenant.place(id, bound);
        if tenant.in_flight == 0 && tenant.line.is_empty() {
            tenant.served = 0;
            if self.tenants.len() > IDLE_TENANTS {
                self.tenants.remove(&id);
            }
        }
        if before != after {
            before.map(|place| self.ready.remove(&place));
            after.map(|place| self.ready.insert(place));
        }
    }
}

impl Tenant {
    fn place(&self, id: u32, bound: u32) -> Option<Place> {
        let (class, ..) = self.line.first().filter(|_| self.in_flight < bound)?;
        Some((*class, self.in_flight, self.served, id))
    }
}

fn full(waiting: usize, bound: u32) -> bool {
    u32::try_from(waiting).unwrap_or(u32::MAX) >= bound
}

#[cfg(test)]
#[path = "bulkhead_tests.rs"]
mod tests;
