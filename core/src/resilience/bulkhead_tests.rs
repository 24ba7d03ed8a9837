use proptest::prelude::*;

use super::*;

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

fn bulkhead(in_flight: u32, queue: u32, tenant_in_flight: u32, tenant_queue: u32) -> Bulkhead {
    Bulkhead::new(BulkheadSettings { in_flight, queue, tenant_in_flight, tenant_queue })
}

/// A request at 0 ms.
fn ticket(tenant: u32, class: Class, deadline: u64) -> Ticket {
    Ticket { tenant, class, deadline: ms(deadline), now: ms(0) }
}

fn queued(id: u64) -> Entry {
    Entry::Queued { id, displaced: None }
}

fn enters(id: u64) -> Vec<Turn> {
    vec![Turn { id, answer: Answer::Enter }]
}

#[test]
fn a_free_slot_is_taken_and_else_one_waits_until_the_queue_is_full() {
    let mut bulkhead = bulkhead(1, 1, 1, 1);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 100)), Entry::Entered);
    assert_eq!(bulkhead.try_enter(ticket(2, Class::Normal, 100)), queued(0));
    assert_eq!(bulkhead.try_enter(ticket(3, Class::Normal, 100)), Entry::Refused(Refusal::Full));
    assert_eq!((bulkhead.in_flight(), bulkhead.waiting()), (1, 1));
    assert_eq!(bulkhead.leave(1, ms(1)), enters(0));
    assert_eq!(bulkhead.leave(2, ms(1)), []);
    assert_eq!((bulkhead.in_flight(), bulkhead.waiting()), (0, 0));
    assert!(bulkhead.ready.is_empty());
}

#[test]
fn a_tenant_at_its_bound_waits_while_others_enter() {
    let mut bulkhead = bulkhead(3, 9, 2, 1);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::High, 100)), Entry::Entered);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::High, 100)), Entry::Entered);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::High, 100)), queued(0));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::High, 100)), Entry::Refused(Refusal::TenantFull));
    assert_eq!(bulkhead.try_enter(ticket(2, Class::Low, 100)), Entry::Entered);
    assert_eq!(bulkhead.leave(2, ms(1)), [], "the tenant is still at its bound");
    assert_eq!(bulkhead.leave(1, ms(1)), enters(0));
}

#[test]
fn t53_what_cannot_be_done_in_time_is_refused_or_expires() {
    let mut bulkhead = bulkhead(1, 9, 9, 9);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Critical, 0)), Entry::Refused(Refusal::TooLate), "due already");
    bulkhead.set_expected(ms(10));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Critical, 10)), Entry::Refused(Refusal::TooLate));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 11)), Entry::Entered);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 40)), queued(0));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 20)), queued(1));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 30)), queued(2));
    assert!(bulkhead.expire(ms(9)).is_empty());
    assert_eq!(bulkhead.expire(ms(10)), [1]);
    let turns = bulkhead.leave(1, ms(25));
    assert_eq!(turns, [Turn { id: 2, answer: Answer::TooLate }, Turn { id: 0, answer: Answer::Enter }]);
    assert_eq!(bulkhead.waiting(), 0);
    bulkhead.set_expected(Duration::MAX);
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Critical, u64::MAX)), Entry::Refused(Refusal::TooLate));
}

#[test]
fn the_highest_class_is_next_then_the_earliest_deadline() {
    let mut bulkhead = bulkhead(1, 9, 9, 9);
    bulkhead.try_enter(ticket(1, Class::Low, 900));
    for (class, deadline) in [(Class::Low, 100), (Class::Normal, 300), (Class::Normal, 200), (Class::Critical, 800)] {
        bulkhead.try_enter(ticket(1, class, deadline));
    }
    let order: Vec<_> = (0..4).flat_map(|_| bulkhead.leave(1, ms(1))).map(|turn| turn.id).collect();
    assert_eq!(order, [3, 2, 1, 0]);
}

#[test]
fn a_full_queue_gives_up_the_newest_of_the_lowest_class_below() {
    let mut bulkhead = bulkhead(0, 3, 9, 9);
    for (tenant, class) in [(1, Class::Normal), (2, Class::Low), (3, Class::Low)] {
        bulkhead.try_enter(ticket(tenant, class, 100));
    }
    assert_eq!(bulkhead.try_enter(ticket(4, Class::Low, 50)), Entry::Refused(Refusal::Full), "not of its own class");
    for (class, displaced) in [(Class::Normal, 2), (Class::High, 1), (Class::Critical, 3), (Class::Critical, 0)] {
        let Entry::Queued { displaced: gone, .. } = bulkhead.try_enter(ticket(4, class, 100)) else { panic!() };
        assert_eq!(gone, Some(displaced), "{class:?}");
    }
    assert!(!bulkhead.cancel(2), "it does not wait any more");
    assert_eq!(bulkhead.waiting(), 3);
}

#[test]
fn a_tenant_with_a_full_queue_displaces_its_own() {
    let mut bulkhead = bulkhead(0, 9, 9, 1);
    assert_eq!(bulkhead.try_enter(ticket(2, Class::Low, 100)), queued(0));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 100)), queued(1));
    assert_eq!(bulkhead.try_enter(ticket(1, Class::Normal, 100)), Entry::Refused(Refusal::TenantFull));
    let displacing = Entry::Queued { id: 2, displaced: Some(1) };
    assert_eq!(bulkhead.try_enter(ticket(1, Class::High, 100)), displacing);
}

#[test]
fn a_greedy_tenant_does_not_starve_another_of_the_same_class() {
    let mut bulkhead = bulkhead(4, 100, 4, 90);
    (0..90).for_each(|_| assert!(!matches!(bulkhead.try_enter(ticket(1, Class::High, 10)), Entry::Refused(_))));
    // The modest tenant asks last and has the latest deadlines.
    let Entry::Queued { id: first, .. } = bulkhead.try_enter(ticket(2, Class::High, 99)) else { panic!() };
    (0..5).for_each(|_| _ = bulkhead.try_enter(ticket(2, Class::High, 99)));
    assert_eq!(bulkhead.leave(1, ms(1)), enters(first), "it had nothing in flight");
    let second = bulkhead.leave(1, ms(1));
    assert_eq!(second, enters(first + 1), "1 in flight against 2");
    assert_eq!(bulkhead.leave(2, ms(1)), enters(first + 2), "1 against 2 again");
    for _ in 0..4 {
        assert!(bulkhead.leave(1, ms(1))[0].id < first, "the greedy one gets its own slots back, 1 against 2");
    }
}

#[test]
fn equal_tenants_take_turns() {
    let mut bulkhead = bulkhead(1, 100, 1, 90);
    bulkhead.try_enter(ticket(9, Class::Normal, 100));
    let mut owner = BTreeMap::new();
    for tenant in [1, 1, 1, 1, 2, 2, 3] {
        let Entry::Queued { id, .. } = bulkhead.try_enter(ticket(tenant, Class::Normal, 100)) else { panic!() };
        owner.insert(id, tenant);
    }
    let mut last = 9;
    let order: Vec<_> = (0..7)
        .map(|_| {
            last = owner[&bulkhead.leave(last, ms(1))[0].id];
            last
        })
        .collect();
    assert_eq!(order, [1, 2, 3, 1, 2, 1, 1]);
}

#[test]
fn other_bounds_take_effect_at_once_and_harm_nobody() {
    let mut bulkhead = bulkhead(1, 9, 1, 9);
    bulkhead.try_enter(ticket(1, Class::Normal, 100));
    (0..3).for_each(|_| _ = bulkhead.try_enter(ticket(1, Class::Normal, 100)));
    let wider = BulkheadSettings { in_flight: 3, tenant_in_flight: 3, queue: 9, tenant_queue: 9 };
    assert_eq!(bulkhead.resize(wider, ms(1)).iter().map(|turn| turn.id).collect::<Vec<_>>(), [0, 1]);
    let narrower = BulkheadSettings { in_flight: 1, tenant_in_flight: 1, queue: 0, tenant_queue: 0 };
    assert_eq!(bulkhead.resize(narrower, ms(1)), []);
    assert_eq!((bulkhead.in_flight(), bulkhead.waiting()), (3, 1));
    assert_eq!(bulkhead.leave(1, ms(1)), []);
    assert_eq!(bulkhead.leave(1, ms(1)), []);
    assert_eq!(bulkhead.leave(1, ms(1)), enters(2));
}

#[test]
fn a_sweep_of_tenants_leaves_no_more_than_a_few_idle_ones() {
    let mut bulkhead = bulkhead(1, 1, 1, 1);
    for tenant in 0..10_000 {
        assert_eq!(bulkhead.try_enter(ticket(tenant, Class::Normal, 100)), Entry::Entered);
        bulkhead.leave(tenant, ms(1));
    }
    assert!(bulkhead.tenants.len() <= IDLE_TENANTS);
}

#[test]
fn leaving_without_a_slot_changes_nothing() {
    let mut bulkhead = bulkhead(1, 1, 1, 1);
    assert_eq!(bulkhead.leave(7, ms(0)), []);
    bulkhead.try_enter(ticket(1, Class::Normal, 100));
    bulkhead.try_enter(ticket(2, Class::Normal, 100));
    assert_eq!(bulkhead.leave(2, ms(0)), [], "it waits");
    assert_eq!(bulkhead.in_flight(), 1);
}

/// The same rules over plain lists.
#[derive(Default)]
struct Naive {
    settings: BulkheadSettings,
    expected: Duration,
    /// The tenant of each.
    flying: Vec<u32>,
    waiting: Vec<(u64, Ticket)>,
    served: BTreeMap<u32, u64>,
    turns: u64,
    next_id: u64,
}

impl Naive {
    fn held(&self, tenant: u32) -> u32 {
        self.flying.iter().filter(|flying| **flying == tenant).count() as u32
    }

    fn enter(&mut self, tenant: u32) {
        self.turns += 1;
        self.flying.push(tenant);
        self.served.insert(tenant, self.turns);
    }

    fn next(&self) -> Option<usize> {
        let eligible = self.waiting.iter().enumerate().filter(|(_, (_, ticket))| {
            (self.flying.len() as u32) < self.settings.in_flight
                && self.held(ticket.tenant) < self.settings.tenant_in_flight
        });
        let order = |ticket: &Ticket, id: u64| {
            let served = self.served.get(&ticket.tenant).copied().unwrap_or(0);
            (ticket.class, self.held(ticket.tenant), served, ticket.tenant, ticket.deadline, id)
        };
        eligible.min_by_key(|(_, (id, ticket))| order(ticket, *id)).map(|(at, _)| at)
    }

    fn forget_idle(&mut self) {
        let (flying, waiting) = (&self.flying, &self.waiting);
        self.served.retain(|id, _| flying.contains(id) || waiting.iter().any(|(_, ticket)| ticket.tenant == *id));
    }

    fn try_enter(&mut self, ticket: Ticket) -> Entry {
        if ticket.deadline <= ticket.now + self.expected {
            return Entry::Refused(Refusal::TooLate);
        }
        if (self.flying.len() as u32) < self.settings.in_flight
            && self.held(ticket.tenant) < self.settings.tenant_in_flight
        {
            self.enter(ticket.tenant);
            return Entry::Entered;
        }
        let own = self.waiting.iter().filter(|(_, waits)| waits.tenant == ticket.tenant).count();
        let tenant_full = own as u32 >= self.settings.tenant_queue;
        let full = self.waiting.len() as u32 >= self.settings.queue;
        let mut displaced = None;
        if tenant_full || full {
            let candidates = self
                .waiting
                .iter()
                .filter(|(_, waits)| waits.class > ticket.class && (!tenant_full || waits.tenant == ticket.tenant));
            let Some((id, _)) = candidates.max_by_key(|(id, waits)| (waits.class, *id)) else {
                return Entry::Refused(if tenant_full { Refusal::TenantFull } else { Refusal::Full });
            };
            displaced = Some(*id);
        }
        self.waiting.retain(|(id, _)| Some(*id) != displaced);
        self.forget_idle();
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push((id, ticket));
        Entry::Queued { id, displaced }
    }

    fn expire(&mut self, now: Duration) -> Vec<u64> {
        let late = |ticket: &Ticket| ticket.deadline <= now + self.expected;
        let mut gone: Vec<_> =
            self.waiting.iter().filter(|(_, ticket)| late(ticket)).map(|(id, ticket)| (ticket.deadline, *id)).collect();
        gone.sort_unstable();
        self.waiting.retain(|(_, ticket)| ticket.deadline > now + self.expected);
        gone.into_iter().map(|(_, id)| id).collect()
    }

    fn fill(&mut self, now: Duration) -> Vec<Turn> {
        let mut turns: Vec<_> = self.expire(now).into_iter().map(|id| Turn { id, answer: Answer::TooLate }).collect();
        while let Some(at) = self.next() {
            let (id, ticket) = self.waiting.remove(at);
            self.enter(ticket.tenant);
            turns.push(Turn { id, answer: Answer::Enter });
        }
        turns
    }

    fn leave(&mut self, tenant: u32, now: Duration) -> Vec<Turn> {
        let Some(at) = self.flying.iter().position(|flying| *flying == tenant) else { return Vec::new() };
        self.flying.swap_remove(at);
        self.forget_idle();
        self.fill(now)
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Enter { tenant: u32, class: Class, left: u64 },
    Leave { tenant: u32 },
    Cancel { id: u64 },
    Expire,
    Expect { expected: u64 },
    Resize { in_flight: u32, queue: u32, tenant_in_flight: u32, tenant_queue: u32 },
    Pass { time: u64 },
}

fn classes() -> impl Strategy<Value = Class> {
    prop_oneof![Just(Class::Critical), Just(Class::High), Just(Class::Normal), Just(Class::Low)]
}

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => (0_u32..4, classes(), 0_u64..300).prop_map(|(tenant, class, left)| Operation::Enter { tenant, class, left }),
        6 => (0_u32..4).prop_map(|tenant| Operation::Leave { tenant }),
        1 => (0_u64..60).prop_map(|id| Operation::Cancel { id }),
        1 => Just(Operation::Expire),
        1 => (0_u64..40).prop_map(|expected| Operation::Expect { expected }),
        1 => (0_u32..6, 0_u32..8, 0_u32..4, 0_u32..6).prop_map(|(in_flight, queue, tenant_in_flight, tenant_queue)| {
            Operation::Resize { in_flight, queue, tenant_in_flight, tenant_queue }
        }),
        2 => (0_u64..30).prop_map(|time| Operation::Pass { time }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Answers as the naive rules do: so bounds hold and no free slot leaves an eligible one waiting.
    #[test]
    fn any_sequence_is_answered_as_the_plain_rules_say(steps in proptest::collection::vec(operations(), 1..150)) {
        let settings = BulkheadSettings { in_flight: 3, queue: 6, tenant_in_flight: 2, tenant_queue: 4 };
        let mut bulkhead = Bulkhead::new(settings.clone());
        let mut naive = Naive { settings, ..Naive::default() };
        let mut now = ms(0);
        for step in steps {
            let (flying, waiting) = (bulkhead.in_flight(), bulkhead.waiting() as u32);
            match step {
                Operation::Enter { tenant, class, left } => {
                    let ticket = Ticket { tenant, class, deadline: now + ms(left), now };
                    prop_assert_eq!(bulkhead.try_enter(ticket), naive.try_enter(ticket));
                }
                Operation::Leave { tenant } => prop_assert_eq!(bulkhead.leave(tenant, now), naive.leave(tenant, now)),
                Operation::Cancel { id } => {
                    let waited = naive.waiting.iter().any(|(waits, _)| *waits == id);
                    naive.waiting.retain(|(waits, _)| *waits != id);
                    prop_assert_eq!(bulkhead.cancel(id), waited);
                }
                Operation::Expire => prop_assert_eq!(bulkhead.expire(now), naive.expire(now)),
                Operation::Expect { expected } => {
                    bulkhead.set_expected(ms(expected));
                    naive.expected = ms(expected);
                }
                Operation::Resize { in_flight, queue, tenant_in_flight, tenant_queue } => {
                    let settings = BulkheadSettings { in_flight, queue, tenant_in_flight, tenant_queue };
                    naive.settings = settings.clone();
                    prop_assert_eq!(bulkhead.resize(settings, now), naive.fill(now));
                }
                Operation::Pass { time } => now += ms(time),
            }
            naive.forget_idle();
            prop_assert!(bulkhead.in_flight() <= flying.max(naive.settings.in_flight));
            prop_assert!(bulkhead.waiting() as u32 <= waiting.max(naive.settings.queue));
            for (id, tenant) in &bulkhead.tenants {
                prop_assert_eq!(tenant.in_flight, naive.held(*id));
            }
            prop_assert_eq!(naive.next(), None, "a slot is free and one waits who could have it");
            prop_assert_eq!(bulkhead.by_deadline.len(), bulkhead.waiting());
            prop_assert_eq!(bulkhead.by_class.len(), bulkhead.waiting());
        }
    }
}
