//! Two listeners, writers and a store, in any order of events: messages and answers that are late or lost, listeners that
//! stop for a while or for good, connections that are cut unnoticed, a store that forgets.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::super::coherence::may_fill;
use super::*;

#[test]
fn a_listener_hears_once_it_has_a_lease_and_has_read_the_counter() {
    let second = Duration::from_secs(1);
    let mut ear = Ear::default();
    assert_eq!((ear.message(7), ear.hears_until()), (Heard::Gap, None), "no lease");
    ear.leased(second);
    assert!(ear.is_leased(3 * second) && !ear.is_leased(second + LEASE - MARGIN));
    assert_eq!(ear.message(8), Heard::Next);
    assert_eq!(ear.hears_until(), None, "changes may have been confirmed without us");
    assert_eq!(ear.counter(8), Heard::Gap, "everything kept is dropped");
    assert_eq!((ear.hears_until(), ear.number()), (Some(second + LEASE - MARGIN), 8));
    assert_eq!((ear.counter(9), ear.number()), (Heard::Nothing, 8), "its message may be on its way");
    assert_eq!((ear.message(9), ear.number()), (Heard::Next, 9));
    ear.renewed(2 * second);
    ear.renewed(second);
    assert_eq!(ear.hears_until(), Some(2 * second + LEASE - MARGIN), "a late answer does not shorten it");
    ear.lost();
    ear.renewed(3 * second);
    assert_eq!(ear.hears_until(), None, "an answer from before the loss");
}

#[test]
fn a_change_is_confirmed_when_all_who_hold_a_lease_have_applied_it() {
    let audience = |listed, lowest| Audience { listed, since: 100, listeners: 1, lowest };
    for (audience, verdict) in [
        (audience(LEASE, Some(500)), Verdict::Confirmed),
        (audience(LEASE, Some(501)), Verdict::Confirmed),
        (audience(LEASE, Some(499)), Verdict::NotYet),
        (audience(LEASE, None), Verdict::Confirmed),
        (audience(LEASE - MARGIN, Some(500)), Verdict::NotYet),
        (audience(LEASE - MARGIN, None), Verdict::NotYet),
        (Audience { since: 501, ..audience(LEASE, Some(600)) }, Verdict::Never),
    ] {
        assert_eq!(audience.judge(500), verdict, "{audience:?}");
    }
}

const ROWS: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The store's row changes; the word about it comes later, or never.
    Write(usize),
    Announce,
    /// The writer of this change asks who has applied it.
    Ask(usize),
    Pass(u64),
    /// The listener's next call: sent, taken up by the store, answered; all at once or one after another.
    Work(usize),
    Send(usize),
    Execute(usize),
    Answer(usize),
    GiveUp(usize),
    Hear(usize),
    Lose(usize, usize),
    /// The store does not reach the listener any more; the listener does not know.
    Cut(usize),
    Reconnect(usize),
    Pause(usize),
    Resume(usize),
    /// It never comes back; another one begins with nothing.
    Crash(usize),
    BeginFill(usize, usize),
    EndFill(usize),
    Read(usize, usize),
    /// The store forgets who listens and what was not confirmed, and counts from earlier on.
    Forget(u64),
}

#[derive(Default)]
struct Store {
    rows: [u64; ROWS],
    counter: u64,
    highest: u64,
    listed: BTreeMap<u64, (u64, Duration)>,
    listed_since: Duration,
    since: u64,
    /// Sent and not executed, whoever still waits for it.
    calls: Vec<(u64, Call)>,
}

#[derive(Clone, Copy)]
enum Call {
    Begin { id: u64 },
    Counter { since: u64 },
    Renew { id: u64, number: u64 },
    End { id: u64 },
}

#[derive(Clone, Copy)]
enum Reply {
    Given { since: u64 },
    Counter(u64),
    Renewed,
    Refused,
}

#[derive(Default)]
struct Listener {
    ear: Ear,
    id: u64,
    since: u64,
    attached: bool,
    paused: bool,
    mailbox: VecDeque<(u64, usize)>,
    waiting: Option<(u64, Duration)>,
    reply: Option<Reply>,
    polled: bool,
    kept: [Option<u64>; ROWS],
    tick: u64,
    invalidated: [u64; ROWS],
    flushed: u64,
    fills: VecDeque<(usize, u64, u64)>,
}

struct Write {
    row: usize,
    version: u64,
    number: Option<u64>,
    /// Told to a store that has forgotten it, or had just begun anew.
    void: bool,
}

#[derive(Default)]
struct World {
    now: Duration,
    store: Store,
    listeners: [Listener; 2],
    writes: Vec<Write>,
    confirmed: [u64; ROWS],
    last: u64,
}

impl Store {
    fn execute(&mut self, call: Call, now: Duration) -> Reply {
        match call {
            Call::Begin { id } => {
                self.listed.insert(id, (0, now + LEASE));
                Reply::Given { since: self.since }
            }
            Call::Counter { since } => {
                self.counter = self.counter.max(since);
                Reply::Counter(self.counter)
            }
            Call::Renew { id, number } => match self.listed.get_mut(&id) {
                Some(lease) if lease.1 >= now => {
                    *lease = (number, now + LEASE);
                    Reply::Renewed
                }
                _ => Reply::Refused,
            },
            Call::End { id } => {
                self.listed.remove(&id);
                Reply::Refused
            }
        }
    }

    fn audience(&self, now: Duration) -> Audience {
        let live = self.listed.values().filter(|lease| lease.1 >= now);
        Audience {
            listed: now.saturating_sub(self.listed_since),
            since: self.since,
            listeners: live.clone().count() as u64,
            lowest: live.map(|lease| lease.0).min(),
        }
    }
}

impl Listener {
    fn flush(&mut self) {
        self.tick += 1;
        self.flushed = self.tick;
        self.kept = [None; ROWS];
    }

    fn lost(&mut self, id: u64) {
        self.ear.lost();
        self.flush();
        self.id = id;
    }

    /// What the runtime's listener does next.
    fn next(&mut self, id: u64, now: Duration) -> Call {
        if !self.ear.is_leased(now) {
            self.lost(id);
            return Call::Begin { id };
        }
        self.polled = !self.polled;
        if self.ear.hears_until().is_none() || self.polled {
            Call::Counter { since: self.since }
        } else {
            Call::Renew { id: self.id, number: self.ear.number() }
        }
    }

    fn answered(&mut self, reply: Reply, asked: Duration, id: u64) {
        match reply {
            Reply::Given { since } => {
                self.since = since;
                self.ear.leased(asked);
            }
            Reply::Counter(number) => {
                if self.ear.counter(number) == Heard::Gap {
                    self.flush();
                }
            }
            Reply::Renewed => self.ear.renewed(asked),
            Reply::Refused => self.lost(id),
        }
    }

    fn heard(&mut self, number: u64, row: usize) {
        match self.ear.message(number) {
            Heard::Next => {
                self.tick += 1;
                self.invalidated[row] = self.tick;
                self.kept[row] = None;
            }
            _ => self.flush(),
        }
    }
}

impl World {
    fn run(&mut self, op: Op) {
        let now = self.now;
        self.last += 1;
        let fresh = self.last;
        match op {
            Op::Pass(ms) => self.now += Duration::from_millis(ms),
            Op::Write(row) => {
                let version = fresh;
                self.store.rows[row] = version;
                self.writes.push(Write { row, version, number: None, void: false });
            }
            Op::Announce => {
                let Some(write) = self.writes.iter_mut().find(|write| write.number.is_none()) else { return };
                self.store.counter += 1;
                let number = self.store.counter;
                self.store.highest = self.store.highest.max(number);
                (write.number, write.void) = (Some(number), number < self.store.since);
                for listener in self.listeners.iter_mut().filter(|listener| listener.attached) {
                    listener.mailbox.push_back((number, write.row));
                }
            }
            Op::Ask(back) => {
                let audience = self.store.audience(now);
                let Some(write) = self.writes.iter().rev().nth(back) else { return };
                if write.number.is_some_and(|number| audience.judge(number) == Verdict::Confirmed) {
                    self.confirmed[write.row] = self.confirmed[write.row].max(write.version);
                }
            }
            Op::Forget(steps) => {
                let store = &mut self.store;
                store.listed.clear();
                (store.listed_since, store.since) = (now, store.highest + 1_000);
                store.highest = store.since;
                store.counter = store.counter.saturating_sub(steps);
                store.rows = self.confirmed;
                self.writes.retain(|write| write.number.is_some());
                let lost = |write: &&mut Write| write.version > self.confirmed[write.row];
                self.writes.iter_mut().filter(lost).for_each(|write| write.void = true);
                self.listeners.iter_mut().for_each(|listener| listener.attached = false);
            }
            Op::Execute(at) => {
                if at >= self.store.calls.len() {
                    return;
                }
                let (token, call) = self.store.calls.remove(at);
                let reply = self.store.execute(call, now);
                let waits = |listener: &&mut Listener| listener.waiting.is_some_and(|waiting| waiting.0 == token);
                if let Some(listener) = self.listeners.iter_mut().find(waits) {
                    listener.reply = Some(reply);
                }
            }
            Op::Work(who) => {
                self.run(Op::Send(who));
                self.run(Op::Execute(self.store.calls.len().saturating_sub(1)));
                self.run(Op::Answer(who));
            }
            Op::Cut(who) => self.listeners[who].attached = false,
            Op::Resume(who) => self.listeners[who].paused = false,
            Op::Crash(who) => self.listeners[who] = Listener::default(),
            Op::Lose(who, at) => drop(self.listeners[who].mailbox.remove(at)),
            Op::Send(who)
            | Op::Answer(who)
            | Op::GiveUp(who)
            | Op::Hear(who)
            | Op::Reconnect(who)
            | Op::Pause(who)
            | Op::BeginFill(who, _)
            | Op::EndFill(who)
            | Op::Read(who, _)
                if self.listeners[who].paused => {}
            Op::Send(who) => {
                let listener = &mut self.listeners[who];
                if listener.waiting.is_none() {
                    if !listener.ear.is_leased(now) {
                        self.store.calls.push((0, Call::End { id: listener.id }));
                    }
                    let call = listener.next(fresh, now);
                    listener.waiting = Some((fresh, now));
                    self.store.calls.push((fresh, call));
                }
            }
            Op::Answer(who) => {
                let listener = &mut self.listeners[who];
                if let (Some((_, asked)), Some(reply)) = (listener.waiting, listener.reply.take()) {
                    listener.waiting = None;
                    listener.answered(reply, asked, fresh);
                }
            }
            Op::GiveUp(who) => (self.listeners[who].waiting, self.listeners[who].reply) = (None, None),
            Op::Hear(who) => {
                if let Some((number, row)) = self.listeners[who].mailbox.pop_front() {
                    self.listeners[who].heard(number, row);
                }
            }
            Op::Reconnect(who) => {
                let listener = &mut self.listeners[who];
                self.store.calls.push((0, Call::End { id: listener.id }));
                listener.lost(fresh);
                listener.mailbox.clear();
                listener.attached = true;
                (listener.waiting, listener.reply) = (None, None);
            }
            Op::Pause(who) => self.listeners[who].paused = true,
            Op::BeginFill(who, row) => {
                let listener = &mut self.listeners[who];
                listener.fills.push_back((row, self.store.rows[row], listener.tick));
                // Most end before anything else happens.
                if !fresh.is_multiple_of(3) {
                    self.run(Op::EndFill(who));
                }
            }
            Op::EndFill(who) => {
                let listener = &mut self.listeners[who];
                if let Some((row, version, began)) = listener.fills.pop_front()
                    && may_fill(began, listener.invalidated[row], listener.flushed)
                {
                    listener.kept[row] = Some(version);
                }
            }
            Op::Read(who, row) => self.read(who, row),
        }
    }

    fn read(&mut self, who: usize, row: usize) {
        let listener = &self.listeners[who];
        let (Some(until), Some(version)) = (listener.ear.hears_until(), listener.kept[row]) else { return };
        if self.now >= until {
            return;
        }
        assert!(version >= self.confirmed[row], "{version} of row {row} although {} is confirmed", self.confirmed[row]);
        for write in self.writes.iter().filter(|write| write.row == row && !write.void) {
            let reflected = write.number.is_some_and(|number| number <= listener.ear.number());
            assert!(!reflected || version >= write.version, "{version} does not reflect {:?}", write.number);
        }
    }
}

/// What happens next, out of a number; the common things come more often.
fn op(number: u32) -> Op {
    let (kind, rest) = (number % 400, number as usize / 400);
    let (who, row, few) = (rest % 2, rest / 2 % ROWS, rest / 8 % 4);
    match kind {
        0..12 => Op::Write(row),
        12..30 => Op::Announce,
        30..60 => Op::Ask(few),
        60..68 => Op::Pass(few as u64 * 100),
        68 => Op::Pass(few as u64 * 1_000),
        69..139 => Op::Work(who),
        139..142 => Op::Send(who),
        142..145 => Op::Execute(few),
        145..148 => Op::Answer(who),
        148 => Op::GiveUp(who),
        149..209 => Op::Hear(who),
        209 => Op::Lose(who, few),
        210 => Op::Cut(who),
        211..215 => Op::Reconnect(who),
        215 => Op::Pause(who),
        216..218 => Op::Resume(who),
        218 => Op::Crash(who),
        219 => Op::Forget(few as u64),
        220..300 => Op::BeginFill(who, row),
        300..340 => Op::EndFill(who),
        _ => Op::Read(who, row),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// After a change was confirmed nobody gives what it overwrote; and what is given reflects every change up to the number
    /// that its giver had applied.
    #[test]
    fn after_confirmation_nobody_gives_the_old_row(ops in proptest::collection::vec(any::<u32>(), 1..600)) {
        let mut world = World { now: LEASE, ..World::default() };
        for op in [0, 1].into_iter().flat_map(|who| [Op::Reconnect(who), Op::Work(who), Op::Work(who)]) {
            world.run(op);
        }
        for number in ops {
            world.run(op(number));
        }
    }
}
