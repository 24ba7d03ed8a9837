use std::collections::VecDeque;

use super::super::{ShedSettings, Shedder};
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
