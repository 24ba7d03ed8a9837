//! A region of gateways, in ticks, with the reference of the script as its Redis: the bound holds.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::lease::Leases;
use super::super::{Class, Decision};
use super::*;

const TICK: Duration = Duration::from_millis(10);
/// Ticks after which an asking is given up.
const TIMEOUT: usize = 20;
const LARGEST_COST: u32 = 3;

/// What happens to a gateway, or to Redis, at a tick.
#[derive(Clone, Copy, Debug)]
enum Event {
    Start,
    Stop,
    /// Tokens a second, in tenths of R.
    Load(u64),
    /// For so many ticks its askings, or its answers, are lost.
    LoseAskings(usize),
    LoseAnswers(usize),
    /// For so many ticks Redis is gone for all; then it remembers, or does not.
    RedisGone(usize, bool),
}

struct Region {
    quota: Quota,
    leases: Leases,
    redis_back: usize,
    gateways: Vec<Gateway>,
    excesses: Vec<Excess>,
    /// The last tick at which Redis did not know every gateway.
    unknown: usize,
    /// The tick and the share of each first grant.
    first_shares: Vec<(usize, f64)>,
    random: u64,
}

#[derive(Default)]
struct Gateway {
    /// None while it is down.
    running: Option<Running>,
    /// Counts its starts.
    life: u32,
    load: u64,
    askings_lost_until: usize,
    answers_lost_until: usize,
}

struct Running {
    slice: Slice,
    state: u64,
    demand: Demand,
    asked: u64,
    /// Tokens that callers want and have not asked for yet, thousandths.
    due: u64,
    next_asking: usize,
    asking: Option<Asking>,
    /// When the askings were sent that were answered.
    answered: Vec<usize>,
}

struct Asking {
    sent: usize,
    arrives: usize,
    returns: usize,
    ask: Ask,
    grant: Option<Grant>,
}

/// A gateway whose rate may come on top of R: its start (share 0, a floor), or its being forgotten.
struct Excess {
    gateway: (usize, u32),
    share: f64,
    begins: usize,
    settled: Option<usize>,
}

impl Region {
    fn new(quota: Quota, count: usize, random: u64) -> Self {
        let gateways = (0..count).map(|_| Gateway { load: 10, ..Gateway::default() }).collect();
        let (excesses, first_shares) = (Vec::new(), Vec::new());
        Self { quota, leases: Leases::default(), redis_back: 0, gateways, excesses, unknown: 0, first_shares, random }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn happen(&mut self, tick: usize, index: usize, event: Event) {
        let next_asking = tick + self.random(10) as usize;
        let gateway = &mut self.gateways[index];
        match event {
            Event::Start if gateway.running.is_none() => {
                gateway.life += 1;
                let (slice, demand) = (Slice::new(self.quota), Demand::default());
                let answered = Vec::new();
                let running =
                    Running { slice, state: 0, demand, asked: 0, due: 0, next_asking, asking: None, answered };
                gateway.running = Some(running);
                let gateway = (index, gateway.life);
                self.excesses.push(Excess { gateway, share: 0.0, begins: tick, settled: None });
            }
            Event::Start => {}
            Event::Stop => gateway.running = None,
            Event::Load(load) => gateway.load = load,
            Event::LoseAskings(ticks) => gateway.askings_lost_until = tick + ticks,
            Event::LoseAnswers(ticks) => gateway.answers_lost_until = tick + ticks,
            Event::RedisGone(ticks, remembers) => {
                self.redis_back = tick + ticks;
                if !remembers {
                    self.leases.0.clear();
                }
            }
        }
    }

    fn forget(&mut self, tick: usize, index: usize, share: f64) {
        let gateway = (index, self.gateways[index].life);
        let open = |excess: &&mut Excess| excess.gateway == gateway && excess.share > 0.0 && excess.settled.is_none();
        match self.excesses.iter_mut().find(open) {
            Some(excess) => excess.share = excess.share.max(share),
            None => self.excesses.push(Excess { gateway, share, begins: tick, settled: None }),
        }
    }

    /// Redis has answered the gateway, and has a record of all that it uses.
    fn knows(&self, tick: usize, index: usize, slice: &Slice) -> bool {
        let record = self.leases.0.get(&index.to_string());
        slice.basis != Basis::Joining
            && record.is_some_and(|lease| lease.expiry > tick_millis(tick) && lease.rate >= slice.rate)
    }

    /// Moves a gateway's asking on, or lets it ask.
    fn exchange(&mut self, tick: usize, index: usize) {
        let delays = (1 + self.random(4) as usize, 1 + self.random(4) as usize);
        let Some(mut running) = self.gateways[index].running.take() else { return };
        if let Some(mut asking) = running.asking.take() {
            if asking.arrives == tick {
                self.arrive(tick, index, &running.slice, &mut asking);
            }
            running.asking = self.answer(tick, index, &mut running, asking);
        }
        if tick >= running.next_asking {
            running.demand.observe(running.asked, self.quota.term, &self.quota);
            running.asked = 0;
            let ask = running.slice.ask(&running.demand);
            let (arrives, returns) = (tick + delays.0, tick + delays.0 + delays.1);
            running.asking = Some(Asking { sent: tick, arrives, returns, ask, grant: None });
            running.next_asking = tick + (self.quota.term.as_millis() / TICK.as_millis()) as usize;
        }
        self.gateways[index].running = Some(running);
    }

    /// An asking reaches Redis, if nothing is in its way. If it raises a rate, those that Redis does not
    /// know are forgotten; those that join are counted as such.
    fn arrive(&mut self, tick: usize, index: usize, slice: &Slice, asking: &mut Asking) {
        if self.gateways[index].askings_lost_until > asking.sent || self.redis_back > tick {
            return;
        }
        let grant = self.leases.renew(tick_millis(tick), &index.to_string(), &asking.ask);
        asking.grant = Some(grant);
        for other in (0..self.gateways.len()).filter(|_| grant.rate > slice.rate) {
            let Some(Running { slice, .. }) = &self.gateways[other].running else { continue };
            if slice.basis != Basis::Joining && !self.knows(tick, other, slice) {
                self.forget(tick, other, slice.rate as f64 / self.quota.rate as f64);
            }
        }
    }

    /// The answer reaches the gateway, or is given up, or is still waited for.
    fn answer(&mut self, tick: usize, index: usize, running: &mut Running, asking: Asking) -> Option<Asking> {
        let lost = self.gateways[index].answers_lost_until > tick;
        if let Some(grant) = asking.grant.filter(|_| asking.returns == tick && !lost) {
            if running.slice.basis == Basis::Joining {
                self.first_shares.push((tick, grant.rate as f64 / self.quota.rate as f64));
            }
            running.go_on(tick, |slice| slice.granted(at(asking.sent), at(tick), grant));
            running.answered.push(asking.sent);
            None
        } else if tick >= asking.sent + TIMEOUT {
            if running.slice.basis == Basis::Joining {
                self.forget(tick, index, 1.0 / f64::from(self.quota.gateways));
            }
            running.go_on(tick, Slice::missed);
            None
        } else {
            Some(asking)
        }
    }

    /// Tokens that a gateway admits in a tick.
    fn serve(&mut self, tick: usize, index: usize) -> u64 {
        let mut admitted = 0;
        let load = self.gateways[index].load * self.quota.rate / 10;
        let Some(mut running) = self.gateways[index].running.take() else { return 0 };
        running.due += load / 100;
        while running.due >= u64::from(LARGEST_COST) * 1_000 {
            let cost = 1 + self.random(LARGEST_COST.into()) as u32;
            running.due -= u64::from(cost) * 1_000;
            running.asked += u64::from(cost);
            let decision = running.slice.bucket().decide(running.state, nanos(tick), cost, Class::Critical);
            if let Decision::Admitted { state, .. } = decision {
                running.state = state;
                admitted += u64::from(cost);
            }
        }
        self.gateways[index].running = Some(running);
        admitted
    }

    /// Settles what began before all were known, if each has had two answers since.
    fn settle(&mut self, tick: usize) {
        let running = || {
            let gateways = self.gateways.iter().enumerate();
            gateways.filter_map(|(index, gateway)| Some((index, gateway.running.as_ref()?)))
        };
        if running().any(|(index, running)| !self.knows(tick, index, &running.slice)) {
            self.unknown = tick;
        }
        let answers = |running: &Running, since| running.answered.iter().filter(|sent| **sent > since).count();
        let settled = |excess: &Excess| {
            let since = self.unknown.max(excess.begins);
            running().all(|(_, running)| answers(running, since) >= 2)
        };
        let settled: Vec<bool> = self.excesses.iter().map(settled).collect();
        for (excess, settled) in self.excesses.iter_mut().zip(settled) {
            excess.settled = excess.settled.or(settled.then_some(tick));
        }
    }

    fn upheaval(&self, from: usize, to: usize, gateways: u32) -> Upheaval {
        let open = |excess: &&Excess| excess.begins < to && excess.settled.is_none_or(|settled| settled >= from);
        let mut forgotten: BTreeMap<(usize, u32), f64> = BTreeMap::new();
        for excess in self.excesses.iter().filter(open) {
            let share = forgotten.entry(excess.gateway).or_default();
            *share = share.max(excess.share);
        }
        let started = self.excesses.iter().filter(open).filter(|excess| excess.share == 0.0).count();
        let within = |first: &&(usize, f64)| (from..to).contains(&first.0);
        Upheaval {
            gateways,
            started: u32::try_from(started).unwrap(),
            first_shares: self.first_shares.iter().filter(within).fold(0.0, |sum, first| sum + first.1),
            forgotten_shares: forgotten.values().fold(0.0, |sum, share| sum + share),
        }
    }
}

impl Running {
    fn go_on(&mut self, tick: usize, what: impl FnOnce(&mut Slice) -> Option<Change>) {
        if let Some(change) = what(&mut self.slice) {
            self.state = change.state(self.state, nanos(tick));
        }
    }
}

fn at(tick: usize) -> Duration {
    TICK * u32::try_from(tick).unwrap()
}

fn nanos(tick: usize) -> u64 {
    u64::try_from(at(tick).as_nanos()).unwrap()
}

/// Redis' clock, which has its own beginning.
fn tick_millis(tick: usize) -> u64 {
    u64::try_from(at(tick).as_millis()).unwrap() + 1_700_000_000_000
}

/// What happened at each tick: tokens admitted, gateways running, the sum of their rates.
struct Course {
    region: Region,
    admitted: Vec<u64>,
    running: Vec<u32>,
    rates: Vec<u64>,
}

fn run(quota: Quota, count: usize, ticks: usize, random: u64, events: &[(usize, usize, Event)]) -> Course {
    let mut region = Region::new(quota, count, random);
    let (mut admitted, mut running, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for tick in 0..ticks {
        let slices = |region: &Region| -> Vec<u64> {
            region.gateways.iter().flat_map(|gateway| &gateway.running).map(|running| running.slice.rate).collect()
        };
        running.push(slices(&region).len() as u32);
        for (_, index, event) in events.iter().filter(|(at, _, _)| *at == tick) {
            region.happen(tick, index % count, *event);
        }
        let first = region.random(count as u64) as usize;
        for index in (0..count).map(|index| (first + index) % count) {
            region.exchange(tick, index);
        }
        rates.push(slices(&region).iter().sum());
        admitted.push((0..count).map(|index| region.serve(tick, index)).sum());
        region.settle(tick);
    }
    Course { region, admitted, running, rates }
}

/// Checks the bound for windows of many lengths, and the sum of the rates at each tick.
fn check(course: &Course) -> Result<(), TestCaseError> {
    let Course { region, admitted, running, rates } = course;
    for (tick, rate) in rates.iter().enumerate() {
        let upheaval = region.upheaval(tick, tick + 1, 0);
        let shares = 1.0 + f64::from(upheaval.started) / 16.0 + upheaval.forgotten_shares;
        let most = region.quota.rate as f64 * shares + 1.0;
        prop_assert!(*rate as f64 <= most, "tick {tick}: rates of {rate}, at most {most}: {upheaval:?}");
    }
    let mut before = vec![0];
    before.extend(admitted.iter().scan(0, |sum, tokens| {
        *sum += tokens;
        Some(*sum)
    }));
    for length in [1, 7, 25, 50, 150, 400, admitted.len() * 3 / 4, admitted.len()] {
        for from in (0..=admitted.len() - length).step_by(3) {
            let tokens = before[from + length] - before[from];
            let upheaval = region.upheaval(from, from + length, running[from]);
            let most = region.quota.most_admitted(at(length), &upheaval);
            prop_assert!(tokens as f64 <= most, "ticks {from}+{length}: {tokens} tokens, at most {most}: {upheaval:?}");
        }
    }
    Ok(())
}

fn quota(burst: u32, gateways: u32) -> Quota {
    let rate = Rate { tokens: 300, per: Duration::from_secs(1) };
    Quota::new(&QuotaSettings { largest_cost: LARGEST_COST, gateways, ..QuotaSettings::new(rate, burst) }).unwrap()
}

fn started(count: usize) -> Vec<(usize, usize, Event)> {
    (0..count).map(|index| (index, index, Event::Start)).collect()
}

#[test]
fn t55_three_gateways_admit_the_quota_and_not_more() {
    for loads in [[10, 10, 10], [30, 0, 0], [20, 5, 1], [3, 3, 3]] {
        let mut events = started(3);
        events.extend(loads.iter().enumerate().map(|(index, load)| (0, index, Event::Load(*load))));
        let course = run(quota(90, 3), 3, 1_500, 7, &events);
        check(&course).unwrap();
        let wanted = loads.iter().sum::<u64>().min(10) as f64 / 10.0;
        let late: u64 = course.admitted[500..].iter().sum();
        let share = late as f64 / 3_000.0;
        assert!(share >= 0.93 * wanted && share <= 1.02, "{loads:?}: {share} of the quota");
    }
}

#[test]
fn redis_gone_changes_no_share_and_its_return_adds_none() {
    for remembers in [false, true] {
        let mut events = started(3);
        events.extend([(500, 0, Event::RedisGone(500, remembers))]);
        let course = run(quota(90, 3), 3, 2_000, 7, &events);
        check(&course).unwrap();
        let rates = &course.rates[300..];
        assert!(rates.iter().all(|rate| *rate <= 300_000), "{:?}", rates.iter().max());
        assert!(course.rates[600..1_000].iter().all(|rate| *rate == course.rates[600]));
    }
}

#[test]
fn demand_that_moves_between_gateways_makes_no_tokens() {
    let mut events = started(5);
    for turn in 0..5 {
        events.extend((0..5).map(|index| (turn * 1_200, index, Event::Load(if index == turn { 9 } else { 0 }))));
        events.extend([(300, 500), (400, 0)].map(|(after, load)| (turn * 1_200 + after, turn, Event::Load(load))));
    }
    let course = run(quota(15_000, 2), 5, 6_000, 7, &events);
    check(&course).unwrap();
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Start),
        2 => Just(Event::Stop),
        3 => prop_oneof![Just(0), Just(1), Just(5), Just(12), Just(30)].prop_map(Event::Load),
        1 => (20_usize..400).prop_map(Event::LoseAskings),
        1 => (20_usize..400).prop_map(Event::LoseAnswers),
        1 => (5_usize..400, any::<bool>()).prop_map(|(ticks, remembers)| Event::RedisGone(ticks, remembers)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Gateways join, leave, idle, take all, restart, lose askings and answers; Redis goes and comes back
    /// with or without its memory: in no window does the region admit more than the bound.
    #[test]
    fn t55_no_upheaval_breaks_the_bound(
        count in 3_usize..9,
        burst in prop_oneof![LARGEST_COST..10, 50_u32..150, 1_000_u32..3_000],
        gateways in 1_u32..5,
        random in any::<u64>(),
        events in proptest::collection::vec((0_usize..1_400, 0_usize..8, event()), 0..40),
    ) {
        let mut all = started(count);
        all.extend(events);
        check(&run(quota(burst, gateways), count, 1_500, random, &all))?;
    }
}
