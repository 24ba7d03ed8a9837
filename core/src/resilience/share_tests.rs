use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::{Answer, Bulkhead, BulkheadSettings, Entry, Refusal, ShedSettings, Shedder, Ticket};
use super::*;

/// Requests per second that the simulated pool can do.
const CAPACITY: f64 = 1_000.0;

struct Pool {
    shares: Shares,
    shedder: Shedder,
    random: u64,
    now: f64,
    queue: VecDeque<(usize, f64)>,
    free_at: f64,
}

impl Pool {
    fn new() -> Self {
        let shedder = Shedder::new(ShedSettings::default());
        Self { shares: Shares::default(), shedder, random: 3, now: 0.0, queue: VecDeque::new(), free_at: 0.0 }
    }

    /// SplitMix64 (Steele et al., 2014).
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Poisson arrivals of tenants at these rates and classes; what each was served, per second.
    fn run(&mut self, tenants: &[(Class, f64)], seconds: f64) -> Vec<f64> {
        let (total, end) = (tenants.iter().map(|(_, rate)| rate).sum::<f64>(), self.now + seconds);
        let mut served = vec![0.0; tenants.len()];
        loop {
            self.now += -(1.0 - self.share()).ln() / total;
            if self.now >= end {
                return served;
            }
            while let Some((tenant, arrived)) = self.queue.front().copied()
                && self.free_at.max(arrived) <= self.now
            {
                self.queue.pop_front();
                let start = self.free_at.max(arrived);
                self.free_at = start + 1.0 / CAPACITY;
                self.shedder.observe(Duration::from_secs_f64(start - arrived), true);
                served[tenant] += 1.0 / seconds;
            }
            let mut pick = self.share() * total;
            let tenant = tenants.iter().position(|(_, rate)| {
                pick -= rate;
                pick < 0.0
            });
            let tenant = tenant.unwrap_or(0);
            let (class, now, random) = (tenants[tenant].0, Duration::from_secs_f64(self.now), self.next());
            let place = self.shares.place(tenant as u32, class, random, now);
            if self.shedder.admit(class, place, now) {
                self.queue.push_back((tenant, self.now));
            }
        }
    }
}

#[test]
fn tenants_share_what_there_is_whatever_each_asks_for() {
    use Class::Normal;
    for (rates, fair) in [
        (&[10_000.0, 300.0][..], &[700.0, 300.0][..]),
        (&[4_000.0, 4_000.0], &[500.0, 500.0]),
        (&[600.0, 600.0], &[500.0, 500.0]),
        (&[5_000.0, 800.0, 100.0, 50.0], &[425.0, 425.0, 100.0, 50.0]),
        (&[900.0, 60.0], &[900.0, 60.0]),
    ] {
        let tenants: Vec<_> = rates.iter().map(|rate| (Normal, *rate)).collect();
        let mut pool = Pool::new();
        pool.run(&tenants, 5.0);
        let served = pool.run(&tenants, 20.0);
        for (served, fair) in served.iter().zip(fair) {
            assert!((served / fair - 1.0).abs() < 0.08, "{rates:?}: {served} of {fair}");
        }
    }
}

#[test]
fn a_tenant_that_floods_a_class_does_not_touch_the_one_above() {
    let tenants = [(Class::Low, 9_000.0), (Class::Normal, 200.0), (Class::Low, 150.0), (Class::Critical, 50.0)];
    let mut pool = Pool::new();
    pool.run(&tenants, 5.0);
    let served = pool.run(&tenants, 20.0);
    assert!(served[1] > 195.0 && served[3] > 48.0 && served[2] > 135.0, "{served:?}");
}

#[test]
fn a_tenant_that_begins_to_flood_is_held_within_seconds() {
    let mut pool = Pool::new();
    pool.run(&[(Class::Normal, 100.0), (Class::Normal, 400.0)], 5.0);
    pool.run(&[(Class::Normal, 9_000.0), (Class::Normal, 400.0)], 2.0);
    let served = pool.run(&[(Class::Normal, 9_000.0), (Class::Normal, 400.0)], 3.0);
    assert!(served[1] > 370.0, "{served:?}");
}

#[test]
fn idle_tenants_are_forgotten_and_there_are_never_too_many() {
    let mut shares = Shares::default();
    for tenant in 0..20_000 {
        shares.place(tenant, Class::Normal, 1, Duration::ZERO);
    }
    assert_eq!(shares.tenants.len(), MOST_TENANTS);
    assert_eq!(shares.place(20_001, Class::Normal, 77, Duration::ZERO), 77);
    for second in 1..20 {
        shares.place(1, Class::Normal, 1, Duration::from_secs(second));
    }
    assert_eq!(shares.tenants.len(), 1);
}

/// The whole way of a request: shed, place, queue. Each place serves for a fixed time.
struct Simulated {
    pool: Pool,
    bulkhead: Bulkhead,
    service: f64,
    /// When each place is free again, and whose it is.
    serving: Vec<(f64, u32)>,
    waiting: HashMap<u64, (usize, f64)>,
}

impl Simulated {
    fn new(places: u32, service: f64) -> Self {
        let settings = BulkheadSettings { in_flight: places, queue: 100, tenant_in_flight: places, tenant_queue: 100 };
        let (bulkhead, waiting) = (Bulkhead::new(settings), HashMap::new());
        Self { pool: Pool::new(), bulkhead, service, serving: Vec::new(), waiting }
    }

    fn advance(&mut self, served: &mut [f64]) {
        while let Some(at) = (0..self.serving.len()).min_by(|a, b| self.serving[*a].0.total_cmp(&self.serving[*b].0))
            && self.serving[at].0 <= self.pool.now
        {
            let (end, tenant) = self.serving.swap_remove(at);
            served[tenant as usize] += 1.0;
            for turn in self.bulkhead.leave(tenant, Duration::from_secs_f64(end)) {
                let (tenant, asked) = self.waiting.remove(&turn.id).unwrap();
                if turn.answer == Answer::Enter {
                    self.pool.shedder.observe(Duration::from_secs_f64(end - asked), true);
                    self.serving.push((end + self.service, tenant as u32));
                }
            }
        }
    }

    fn run(&mut self, tenants: &[(Class, f64)], seconds: f64) -> Vec<f64> {
        let (total, end) = (tenants.iter().map(|(_, rate)| rate).sum::<f64>(), self.pool.now + seconds);
        let mut served = vec![0.0; tenants.len()];
        loop {
            self.pool.now += -(1.0 - self.pool.share()).ln() / total;
            self.advance(&mut served);
            if self.pool.now >= end {
                return served.iter().map(|count| count / seconds).collect();
            }
            let mut pick = self.pool.share() * total;
            let tenant = tenants.iter().position(|(_, rate)| {
                pick -= rate;
                pick < 0.0
            });
            let tenant = tenant.unwrap_or(0);
            let (class, now, random) = (tenants[tenant].0, Duration::from_secs_f64(self.pool.now), self.pool.next());
            let place = self.pool.shares.place(tenant as u32, class, random, now);
            if !self.pool.shedder.admit(class, place, now) {
                continue;
            }
            let deadline = now + Duration::from_millis(700);
            match self.bulkhead.try_enter(Ticket { tenant: tenant as u32, class, deadline, now }) {
                Entry::Entered => {
                    self.pool.shedder.observe(Duration::ZERO, true);
                    self.serving.push((self.pool.now + self.service, tenant as u32));
                }
                Entry::Queued { id, displaced } => {
                    self.waiting.insert(id, (tenant, self.pool.now));
                    if let Some(displaced) = displaced {
                        self.waiting.remove(&displaced);
                        self.pool.shedder.observe(Duration::ZERO, false);
                    }
                }
                Entry::Refused(Refusal::Full) => self.pool.shedder.observe(Duration::ZERO, false),
                Entry::Refused(_) => {}
            }
        }
    }
}

#[test]
fn places_stay_taken_and_the_important_are_served_whatever_is_asked_for() {
    for (places, service) in [(6, 0.06), (6, 0.03), (24, 0.02)] {
        let capacity = f64::from(places) / service;
        for factor in [2.0, 4.0, 10.0] {
            let tenants = [
                (Class::Critical, 0.2 * capacity),
                (Class::Normal, (factor * 0.8 - 0.5) * capacity),
                (Class::Low, factor * 0.2 * capacity),
                (Class::Normal, 0.3 * capacity),
            ];
            let mut simulated = Simulated::new(places, service);
            simulated.run(&tenants, 10.0);
            let served: Vec<f64> = simulated.run(&tenants, 60.0).into_iter().map(|rate| rate / capacity).collect();
            let case = format!("{capacity} a second, {factor} x: {served:?} of the capacity");
            assert!(served.iter().sum::<f64>() > 0.94, "{case}");
            assert!(served[0] > 0.195 && served[2] < 0.01 && served[3] > 0.28, "{case}");
        }
    }
}

proptest! {
    #[test]
    fn whatever_is_asked_and_when_a_place_is_a_share_of_the_draw(
        asked in vec((0..20_u32, 0..CLASSES, any::<u64>(), 0..2_000_u64, any::<bool>()), 1..400),
    ) {
        let mut shares = Shares::default();
        let mut now = Duration::from_secs(10);
        for (tenant, class, random, step, back) in asked {
            let step = Duration::from_millis(step);
            now = if back { now.saturating_sub(step) } else { now + step };
            let class = Class::ALL[class];
            let place = shares.place(tenant, class, random, now);
            // A number of 64 bits has no exact double.
            prop_assert!(place <= random.saturating_add(1 << 11), "{place} of {random}");
            let (rate, largest) = shares.rates(tenant, class);
            prop_assert!(rate.is_finite() && (0.0..=largest.max(rate)).contains(&rate));
            prop_assert!(rate <= largest + 1e-9, "{rate} of {largest}");
            if rate > 0.0 && rate >= largest {
                prop_assert!(place >= random.saturating_sub(1 << 11), "who asks for most has the draw as it is");
            }
        }
    }
}
