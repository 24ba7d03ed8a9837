//! Which region may go out, so that never all of them do.
//!
//! The rules:
//!
//! * In ten minutes at most one region goes out by itself. One that falls back in its ramp has not been back yet, so it
//!   is the same outage.
//! * A region goes only while another one is in that is not in doubt itself. Where all that are in are bad, all of them
//!   stay: an answer that may be wrong is better than none.
//! * For a soft rule a region goes only while all others are up, so that what is too much does not take one after another.
//! * Where all regions with their whole weight are lost, those that nobody doubts get all of theirs at once.
//! * Operators' orders win, and end. Theirs does not count as going by itself. They cannot drain the last region that is
//!   in; should their regions be the only ones left, their drains end. One that keeps a region in against a verdict is
//!   told as withheld.
//!
//! What should go and may not is withheld; it is looked at again each time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::region::{Cause, Move, Phase, Pin, Record, Region, RegionSettings, Why, Word};
use super::verdict::View;
use crate::units::Name;

/// When regions may go out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetSettings {
    pub region: RegionSettings,
    /// From one region that goes out by itself to the next. 10 min.
    pub hold: Duration,
    /// How far ahead the end of an order may be. 7 days.
    pub longest_order: Duration,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self {
            region: RegionSettings::default(),
            hold: Duration::from_secs(600),
            longest_order: Duration::from_secs(7 * 86_400),
        }
    }
}

impl FleetSettings {
    /// For `spillway dev`: the next region may go after a minute.
    pub fn dev() -> Self {
        Self { region: RegionSettings::dev(), hold: Duration::from_secs(60), ..Self::default() }
    }
}

/// An operator's order for one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub pin: Pin,
    pub until: Duration,
    pub reason: Arc<str>,
}

/// Why an order is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("there is no such region")]
    Unknown,
    #[error("it has ended already")]
    Ended,
    #[error("it ends too late")]
    TooLong,
    #[error("no other region is in")]
    Last,
}

/// Why a region stays that should go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// Another one went a short time ago.
    Hold { until: Duration },
    /// No other region is in that nobody doubts.
    Last,
    /// It still answers, and not all others are up.
    Spare,
    /// An operator forced it in, against this verdict.
    Forced(Cause),
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self {
            Self::Hold { .. } => "a region went out a short time ago",
            Self::Last => "no other region is in that nobody doubts",
            Self::Spare => "it still answers, and not all others are up",
            Self::Forced(cause) => {
                return write!(f, "an operator forced it in, against the verdict: {}", Why::Verdict(*cause));
            }
        };
        f.write_str(why)
    }
}

/// What the audit log should say of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub region: Name,
    pub at: Duration,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    Moved(Move),
    /// It should go out, and does not.
    Withheld(Cause, Withheld),
    /// An order ended: its time was over, or it was lifted.
    Ended(Order),
}

/// One region as `spillway status` shows it.
#[derive(Clone, Debug)]
pub struct Standing<'a> {
    pub name: &'a Name,
    pub region: &'a Region,
    /// What was last said of it.
    pub word: Word,
    pub order: Option<&'a Order>,
    pub withheld: Option<Withheld>,
}

/// What the next leader must know. Orders are given to it again by who keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    pub regions: BTreeMap<Name, Record>,
    /// Until the next region may go out by itself.
    pub hold: Duration,
}

/// All regions.
#[derive(Clone, Debug)]
pub struct Fleet {
    settings: FleetSettings,
    members: BTreeMap<Name, Member>,
    /// When the next region may go out by itself.
    next_out: Duration,
}

#[derive(Clone, Debug)]
struct Member {
    region: Region,
    word: Word,
    order: Option<Order>,
    withheld: Option<Withheld>,
}

impl Member {
    fn new(region: Region) -> Self {
        Self { region, word: Word::default(), order: None, withheld: None }
    }

    fn is_in(&self) -> bool {
        self.region.share() > 0.0
    }

    /// Whether it is on its way back: not yet in, as far as the hold is concerned.
    fn is_returning(&self) -> bool {
        matches!(self.region.phase(), Phase::Ramp { .. })
    }

    fn is_doubted(&self) -> bool {
        matches!(self.word.view, View::Doubtful | View::Down)
    }

    fn is_whole(&self) -> bool {
        self.region.share() >= 1.0
    }

    fn is_lost(&self, now: Duration) -> bool {
        self.region.standing_verdict(now) == Some(Cause::Unreachable)
    }

    fn is_pinned(&self, pin: Pin) -> bool {
        self.region.pin() == Some(pin)
    }
}

impl Fleet {
    /// Without regions.
    pub fn new(settings: FleetSettings) -> Self {
        Self { settings, members: BTreeMap::new(), next_out: Duration::ZERO }
    }

    /// As another leader left it.
    pub fn resume(settings: FleetSettings, records: Records, now: Duration) -> Self {
        let region = |record| Member::new(Region::resume(settings.region.clone(), record, now));
        let members = records.regions.into_iter().map(|(name, record)| (name, region(record))).collect();
        let next_out = now.saturating_add(records.hold.min(settings.hold));
        Self { settings, members, next_out }
    }

    pub fn records(&self, now: Duration) -> Records {
        let records = self.members.iter().map(|(name, member)| (name.clone(), member.region.record(now)));
        Records { regions: records.collect(), hold: self.next_out.saturating_sub(now) }
    }

    /// Says which regions there are. What is known of those that stay is kept; new ones are up.
    pub fn keep(&mut self, names: &BTreeSet<Name>, now: Duration) -> Vec<Event> {
        self.members.retain(|name, _| names.contains(name));
        for name in names {
            let new = || Member::new(Region::new(self.settings.region.clone(), now));
            self.members.entry(name.clone()).or_insert_with(new);
        }
        let mut events = Vec::new();
        self.leave_some(now, &mut events);
        events
    }

    /// Hears what is said of all regions, and moves them. A region without a word is unknown. To be called at least
    /// once a second.
    pub fn observe(&mut self, words: &BTreeMap<Name, Word>, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        self.end_orders(now, &mut events);
        for (name, member) in &mut self.members {
            member.word = words.get(name).copied().unwrap_or_default();
            let moved = member.region.hear(member.word, now);
            events.extend(moved.map(|moved| event(name, What::Moved(moved), now)));
        }
        self.relieve(now, &mut events);
        self.put_out(now, &mut events);
        self.leave_some(now, &mut events);
        events
    }

    /// An operator's order, in place of any other for the same region.
    pub fn order(&mut self, name: &Name, order: Order, now: Duration) -> Result<Vec<Event>, Refused> {
        // One that is in against a verdict alone is no other to go to.
        let counts = |member: &Member| member.is_in() && member.region.forced(now).is_none();
        let other_in = self.members.iter().any(|(other, member)| other != name && counts(member));
        let member = self.members.get_mut(name).ok_or(Refused::Unknown)?;
        if order.until <= now {
            return Err(Refused::Ended);
        }
        if order.until.saturating_sub(now) > self.settings.longest_order {
            return Err(Refused::TooLong);
        }
        let moved = match order.pin {
            Pin::Out if !other_in => return Err(Refused::Last),
            Pin::Out => member.region.drain(now),
            Pin::In => member.region.force_in(now),
        };
        member.withheld = None;
        let before = member.order.replace(order);
        let whats = before.map(What::Ended).into_iter().chain(moved.map(What::Moved));
        Ok(whats.map(|what| event(name, what, now)).collect())
    }

    /// Ends an operator's order.
    pub fn lift(&mut self, name: &Name, now: Duration) -> Vec<Event> {
        let Some(member) = self.members.get_mut(name) else { return Vec::new() };
        end_order(name, member, now).into_iter().collect()
    }

    /// The regions without weight, which nobody expects to answer.
    pub fn out(&self) -> BTreeSet<Name> {
        self.members.iter().filter(|(_, member)| !member.is_in()).map(|(name, _)| name.clone()).collect()
    }

    /// Whether all regions that are in are lost, so that nothing can be done.
    pub fn is_helpless(&self, now: Duration) -> bool {
        !self.members.is_empty()
            && self.members.values().filter(|member| member.is_in()).all(|member| member.is_lost(now))
    }

    pub fn region(&self, name: &Name) -> Option<&Region> {
        self.members.get(name).map(|member| &member.region)
    }

    /// Every region, by name.
    pub fn standings(&self) -> impl Iterator<Item = Standing<'_>> {
        self.members.iter().map(|(name, Member { region, word, order, withheld })| Standing {
            name,
            region,
            word: *word,
            order: order.as_ref(),
            withheld: *withheld,
        })
    }

    fn end_orders(&mut self, now: Duration, events: &mut Vec<Event>) {
        for (name, member) in &mut self.members {
            if member.order.as_ref().is_some_and(|order| order.until <= now) {
                events.extend(end_order(name, member, now));
            }
        }
    }

    /// Gives those that nobody doubts all their weight, if those that have it are lost.
    fn relieve(&mut self, now: Duration, events: &mut Vec<Event>) {
        let mut whole = self.members.values().filter(|member| member.is_whole()).peekable();
        if whole.peek().is_none() || !whole.all(|member| member.is_lost(now)) {
            return;
        }
        for (name, member) in &mut self.members {
            if !member.is_doubted() && !member.is_pinned(Pin::Out) {
                let moved = member.region.admit(Why::Needed, now);
                events.extend(moved.map(|moved| event(name, What::Moved(moved), now)));
            }
        }
    }

    fn put_out(&mut self, now: Duration, events: &mut Vec<Event>) {
        let mut due: Vec<(bool, bool, Duration, Name, Cause)> = Vec::new();
        for (name, member) in &mut self.members {
            match member.region.due(now) {
                // First those that fall back, then those that do not answer, then who is so for longest.
                Some(cause) => {
                    let since = member.region.verdict_since().unwrap_or(now);
                    due.push((!member.is_returning(), cause.is_soft(), since, name.clone(), cause));
                }
                None => {
                    let forced = member.region.forced(now);
                    let withheld = forced.map(Withheld::Forced);
                    let known = std::mem::replace(&mut member.withheld, withheld);
                    if let Some(cause) = forced.filter(|_| known != withheld) {
                        events.push(event(name, What::Withheld(cause, Withheld::Forced(cause)), now));
                    }
                }
            }
        }
        due.sort_unstable();
        for (.., name, cause) in due {
            let withheld = self.withheld(&name, cause, now);
            let Some(member) = self.members.get_mut(&name) else { continue };
            let known = std::mem::replace(&mut member.withheld, withheld);
            match withheld {
                Some(withheld) if known == Some(withheld) => {}
                Some(withheld) => events.push(event(&name, What::Withheld(cause, withheld), now)),
                None => {
                    if !member.is_returning() {
                        self.next_out = now.saturating_add(self.settings.hold);
                    }
                    events.push(event(&name, What::Moved(member.region.put_out(cause, now)), now));
                }
            }
        }
    }

    fn withheld(&self, name: &Name, cause: Cause, now: Duration) -> Option<Withheld> {
        let others = || self.members.iter().filter(|(other, _)| *other != name).map(|(_, member)| member);
        if !others().any(|member| member.is_in() && !member.is_doubted()) {
            return Some(Withheld::Last);
        }
        if cause.is_soft() && !others().all(|member| member.region.phase() == Phase::Up) {
            return Some(Withheld::Spare);
        }
        let returning = self.members.get(name).is_some_and(Member::is_returning);
        (!returning && now < self.next_out).then_some(Withheld::Hold { until: self.next_out })
    }

    /// No change of members, and no record, may leave nothing.
    fn leave_some(&mut self, now: Duration, events: &mut Vec<Event>) {
        if self.members.values().any(Member::is_in) {
            return;
        }
        let drained = self.members.values().all(|member| member.is_pinned(Pin::Out));
        for (name, member) in &mut self.members {
            if drained {
                events.extend(end_order(name, member, now));
            }
            if !member.is_pinned(Pin::Out) {
                let moved = member.region.admit(Why::Last, now);
                events.extend(moved.map(|moved| event(name, What::Moved(moved), now)));
            }
        }
    }
}

fn event(name: &Name, what: What, at: Duration) -> Event {
    Event { region: name.clone(), at, what }
}

fn end_order(name: &Name, member: &mut Member, now: Duration) -> Option<Event> {
    member.region.unpin();
    member.order.take().map(|order| event(name, What::Ended(order), now))
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
