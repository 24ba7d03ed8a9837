//! The read path: L1, then one round in L2, then one round in L3, for all rows of a call at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join;
use futures_util::stream::{FuturesUnordered, StreamExt};
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::feature::{Freshness, Missing, Row, RowKey, Stored};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use tokio::time::timeout_at;

use super::flight::Follow;
use super::groups::Group;
use super::lookup::{FailedTiers, FeatureError, Found, Lookup, Present, Tier};
use super::memory::Known;
use super::metrics::Outcome;
use super::redis::Put;
use super::store::{Answer, Wanted};
use super::{Features, now_us};

/// Rows in one look-up: 512 entities of 16 groups.
const MAX_ROWS: usize = 8_192;

/// A row whose leaders keep failing is given up after so many.
const ATTEMPTS: usize = 3;

/// What the tiers said about one row; shared with those who asked for it at the same time.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    what: What,
    failed: FailedTiers,
}

#[derive(Clone, Debug)]
enum What {
    Row(Row, Tier),
    Absent(Option<Missing>),
    /// No tier that could know answered.
    Unknown,
}

/// A row that L1 does not have, or not fresh.
struct Pending {
    /// In the look-up.
    index: usize,
    group: Arc<Group>,
    key: RowKey,
    /// The newest that is known so far.
    known: Option<(Row, Tier)>,
}

/// What all rows of a call have in common.
#[derive(Clone, Copy)]
struct Call {
    deadline: Instant,
    now_us: i64,
    /// L1's tick from before the call.
    began: u64,
}

impl Features {
    /// Reads the rows of all `entities` in all `groups`, before `deadline`. Tiers that fail make rows
    /// unavailable or stale, not an error.
    pub async fn read(
        &self,
        snapshot: &Snapshot,
        tenant: &str,
        groups: &[&Name],
        entities: &[Bytes],
        deadline: Instant,
    ) -> Result<Lookup, FeatureError> {
        let groups: Result<Vec<_>, _> = groups
            .iter()
            .map(|name| self.groups.get(snapshot, name).ok_or_else(|| FeatureError::UnknownGroup((*name).clone())))
            .collect();
        let groups = groups?;
        let rows = groups.len().saturating_mul(entities.len());
        if rows > MAX_ROWS {
            return Err(FeatureError::TooMany { limit: MAX_ROWS, found: rows });
        }
        let call = Call { deadline, now_us: now_us(), began: self.memory.tick() };
        let mut lookup = Lookup {
            found: Vec::with_capacity(rows),
            groups: groups.len(),
            now_us: call.now_us,
            failed_tiers: FailedTiers::default(),
        };
        let mut pending = Vec::new();
        let mut text = String::with_capacity(128);
        let now = Instant::now();
        for (index, entity) in entities.iter().enumerate() {
            for group in &groups {
                let brace = RowKey::write(&mut text, group.scope, tenant, entity, &group.name)
                    .map_err(|fault| FeatureError::Key { index, fault })?;
                let known = match self.memory.get(&text, group, now, call.now_us) {
                    Known::Fresh(row) => {
                        self.metrics.read(Tier::L1, Outcome::Hit);
                        lookup.found.push(present(group, row, false, Tier::L1));
                        continue;
                    }
                    Known::Stale(row) => {
                        self.metrics.read(Tier::L1, Outcome::Stale);
                        lookup.found.push(present(group, row, true, Tier::L1));
                        continue;
                    }
                    Known::Absent => {
                        self.metrics.read(Tier::L1, Outcome::Absent);
                        lookup.found.push(Found::Absent { malformed: None });
                        continue;
                    }
                    Known::Outdated(row) => Some((row, Tier::L1)),
                    Known::Nothing => None,
                };
                self.metrics.read(Tier::L1, Outcome::Miss);
                let key = RowKey::of_written(&text, brace);
                pending.push(Pending { index: lookup.found.len(), group: group.clone(), key, known });
                lookup.found.push(Found::Unavailable);
            }
        }
        self.resolve(pending, call, &mut lookup).await;
        Ok(lookup)
    }

    /// Asks the other tiers, together with everyone who asks for the same rows.
    async fn resolve(&self, mut pending: Vec<Pending>, call: Call, lookup: &mut Lookup) {
        for attempt in 1..=ATTEMPTS {
            if pending.is_empty() {
                return;
            }
            let (lead, places) = self.flights.join(pending.iter().map(|row| &row.key));
            let mut leading = Vec::new();
            let mut following = Vec::new();
            for (row, place) in std::mem::take(&mut pending).into_iter().zip(places) {
                match place {
                    Ok(_) => leading.push(row),
                    Err(follow) => following.push((row, follow)),
                }
            }
            // The lead ends with its round, so that whoever follows in this very call is not kept waiting.
            let round = async {
                let publish = |answers: Vec<(usize, Resolved)>| lead.publish(answers.into_iter());
                let answers = if leading.is_empty() { Vec::new() } else { self.round(&leading, call, &publish).await };
                drop(lead);
                answers
            };
            let (answers, followed) = join(round, self.follow(following, call)).await;
            for (row, resolved) in leading.iter().zip(answers) {
                settle(row, resolved, call, lookup);
            }
            for (row, resolved) in followed {
                match resolved {
                    Some(resolved) if resolved.fits(&row.group) => settle(&row, resolved, call, lookup),
                    _ if attempt < ATTEMPTS && Instant::now() + SHORTEST_USEFUL < call.deadline => {
                        self.metrics.handed_over.inc();
                        pending.push(row);
                    }
                    _ => {
                        // Nobody asked in our name: all that is known is what L1 had.
                        let failed = FailedTiers { l2: self.redis.is_some(), l3: true };
                        let what = row.known.clone().map_or(What::Unknown, |(row, tier)| What::Row(row, tier));
                        settle(&row, Resolved { what, failed }, call, lookup);
                    }
                }
            }
        }
    }

    async fn follow(&self, rows: Vec<(Pending, Follow<Resolved>)>, call: Call) -> Vec<(Pending, Option<Resolved>)> {
        let waits: FuturesUnordered<_> = rows
            .into_iter()
            .map(|(row, mut follow)| async move {
                let resolved = timeout_at(call.deadline.into(), follow.wait()).await.ok().flatten();
                if resolved.is_some() {
                    self.metrics.shared.inc();
                }
                (row, resolved)
            })
            .collect();
        waits.collect().await
    }

    /// One round in L2, then one in L3 for what is left. Answers are in the order of `rows`.
    async fn round(
        &self,
        rows: &[Pending],
        call: Call,
        publish: &(impl Fn(Vec<(usize, Resolved)>) + Sync),
    ) -> Vec<Resolved> {
        let mut answers: Vec<Option<Resolved>> = vec![None; rows.len()];
        let mut known: Vec<Option<(Row, Tier)>> = rows.iter().map(|row| row.known.clone()).collect();
        let mut failed = vec![FailedTiers::default(); rows.len()];
        if self.redis.is_some() {
            self.ask_l2(rows, call, &mut answers, &mut known, &mut failed).await;
            publish(answered(&answers));
        }
        if answers.iter().any(Option::is_none) {
            self.ask_l3(rows, call, &mut answers, &mut known, &mut failed).await;
            publish(answered(&answers));
        }
        let unknown = |failed| Resolved { what: What::Unknown, failed };
        answers.into_iter().zip(failed).map(|(answer, failed)| answer.unwrap_or(unknown(failed))).collect()
    }

    async fn ask_l2(
        &self,
        rows: &[Pending],
        call: Call,
        answers: &mut [Option<Resolved>],
        known: &mut [Option<(Row, Tier)>],
        failed: &mut [FailedTiers],
    ) {
        let Some(redis) = &self.redis else { return };
        let keys: Vec<&RowKey> = rows.iter().map(|row| &row.key).collect();
        // A third, so that a Redis that hangs leaves the durable tier time to answer.
        let until = slice(Instant::now(), call.deadline, redis.timeout(), 3);
        let found = match until {
            Some(until) => redis.read(&keys, until).await,
            None => vec![Answer::Failed; rows.len()],
        };
        let mut mend = Vec::new();
        for (index, (row, answer)) in rows.iter().zip(found).enumerate() {
            let outcome = match answer {
                Answer::Failed => {
                    failed[index].l2 = true;
                    Outcome::Error
                }
                Answer::Absent => Outcome::Miss,
                Answer::Found(bytes) => match row.group.layout.decode(bytes, call.now_us) {
                    Ok(Stored::Deleted { .. }) => {
                        self.memory_fill(&row.key, None, call);
                        answers[index] = Some(Resolved { what: What::Absent(None), failed: failed[index] });
                        Outcome::Absent
                    }
                    Ok(Stored::Row(found)) => match row.group.freshness(found.event_us(), call.now_us) {
                        Freshness::Fresh => {
                            let best = newer(known[index].take(), (found, Tier::L2));
                            self.memory_fill(&row.key, Some(&best.0), call);
                            answers[index] = Some(Resolved { what: What::Row(best.0, best.1), failed: failed[index] });
                            Outcome::Hit
                        }
                        Freshness::Stale => {
                            known[index] = Some(newer(known[index].take(), (found, Tier::L2)));
                            Outcome::Stale
                        }
                        Freshness::Expired => Outcome::Miss,
                    },
                    Err(missing) => {
                        self.metrics.malformed(missing);
                        // Another schema may be another reader's: a rollout is under way. The rest is nobody's.
                        if missing != Missing::Schema {
                            mend.push(Put { key: row.key.clone(), bytes: None, expires_us: 0 });
                        }
                        Outcome::Malformed
                    }
                },
            };
            self.metrics.read(Tier::L2, outcome);
        }
        self.fill_l2(mend, call);
    }

    async fn ask_l3(
        &self,
        rows: &[Pending],
        call: Call,
        answers: &mut [Option<Resolved>],
        known: &mut [Option<(Row, Tier)>],
        failed: &mut [FailedTiers],
    ) {
        let open: Vec<usize> = (0..rows.len()).filter(|&index| answers[index].is_none()).collect();
        let wanted: Vec<Wanted> = open
            .iter()
            .map(|&index| Wanted { key: rows[index].key.clone(), consistency: rows[index].group.consistency })
            .collect();
        let found = match slice(Instant::now(), call.deadline, self.store.timeout(), 1) {
            Some(until) => self.store.read(&wanted, until).await,
            None => vec![Answer::Failed; wanted.len()],
        };
        let mut fills = Vec::new();
        for (index, answer) in open.into_iter().zip(found) {
            let row = &rows[index];
            let (outcome, what) = match answer {
                Answer::Failed => {
                    failed[index].l3 = true;
                    (Outcome::Error, known[index].take().map(|(row, tier)| What::Row(row, tier)))
                }
                Answer::Absent => {
                    self.memory_fill(&row.key, None, call);
                    (Outcome::Absent, Some(What::Absent(None)))
                }
                Answer::Found(bytes) => match row.group.layout.decode(bytes, call.now_us) {
                    Ok(Stored::Row(found)) => {
                        let freshness = row.group.freshness(found.event_us(), call.now_us);
                        if freshness == Freshness::Expired {
                            (Outcome::Absent, Some(What::Absent(None)))
                        } else {
                            let (best, tier) = newer(known[index].take(), (found, Tier::L3));
                            self.memory_fill(&row.key, Some(&best), call);
                            if tier == Tier::L3 {
                                let expires_us = row.group.expires_us(best.event_us());
                                fills.push(Put { key: row.key.clone(), bytes: Some(best.bytes().clone()), expires_us });
                            }
                            let stale = row.group.freshness(best.event_us(), call.now_us) == Freshness::Stale;
                            (if stale { Outcome::Stale } else { Outcome::Hit }, Some(What::Row(best, tier)))
                        }
                    }
                    Ok(Stored::Deleted { .. }) => {
                        self.memory_fill(&row.key, None, call);
                        (Outcome::Absent, Some(What::Absent(None)))
                    }
                    Err(missing) => {
                        self.metrics.malformed(missing);
                        (Outcome::Malformed, Some(What::Absent(Some(missing))))
                    }
                },
            };
            self.metrics.read(Tier::L3, outcome);
            answers[index] = what.map(|what| Resolved { what, failed: failed[index] });
        }
        self.fill_l2(fills, call);
    }

    fn memory_fill(&self, key: &RowKey, row: Option<&Row>, call: Call) {
        if self.memory.fill(key, row, call.began) {
            self.metrics.l1_filled.inc();
        } else {
            self.metrics.l1_refused.inc();
        }
    }

    /// In the background: nobody waits for it, and a few at once are enough.
    fn fill_l2(&self, puts: Vec<Put>, call: Call) {
        let Some(redis) = self.redis.clone().filter(|_| !puts.is_empty()) else { return };
        let count = puts.len() as u64;
        let Ok(permit) = self.fills.clone().try_acquire_owned() else {
            self.metrics.l2_fill_skipped.inc_by(count);
            return;
        };
        let metrics = self.metrics.clone();
        tokio::spawn(async move {
            let _permit = permit;
            // It is off the request's path, so it may take longer than a read.
            let deadline = Instant::now() + redis.timeout().saturating_mul(10);
            let results = redis.write(&puts, false, call.now_us, deadline).await;
            let filled = results.iter().filter(|result| result.is_ok()).count() as u64;
            metrics.l2_filled.inc_by(filled);
            metrics.l2_fill_failed.inc_by(count - filled);
        });
    }
}

impl Resolved {
    /// Whether the answer is for this group: another request may have come with another Snapshot.
    fn fits(&self, group: &Group) -> bool {
        match &self.what {
            What::Row(row, _) => group.layout.owns(row),
            What::Absent(malformed) => malformed.is_none(),
            What::Unknown => false,
        }
    }
}

fn answered(answers: &[Option<Resolved>]) -> Vec<(usize, Resolved)> {
    answers.iter().enumerate().filter_map(|(index, answer)| Some((index, answer.clone()?))).collect()
}

fn settle(row: &Pending, resolved: Resolved, call: Call, lookup: &mut Lookup) {
    lookup.failed_tiers.add(resolved.failed);
    let found = match resolved.what {
        What::Absent(malformed) => Found::Absent { malformed },
        What::Unknown => Found::Unavailable,
        What::Row(found, tier) => match row.group.freshness(found.event_us(), call.now_us) {
            Freshness::Fresh => present(&row.group, found, false, tier),
            Freshness::Stale => present(&row.group, found, true, tier),
            Freshness::Expired => Found::Absent { malformed: None },
        },
    };
    if let Some(slot) = lookup.found.get_mut(row.index) {
        *slot = found;
    }
}

fn present(group: &Group, row: Row, stale: bool, tier: Tier) -> Found {
    let fresh_until_us = group.fresh_until_us(row.event_us());
    Found::Present(Present { row, stale, tier, fresh_until_us })
}

/// The later event; of equal ones the one from further back, since it was just confirmed.
fn newer(known: Option<(Row, Tier)>, found: (Row, Tier)) -> (Row, Tier) {
    match known {
        Some(known) if known.0.event_us() > found.0.event_us() => known,
        _ => found,
    }
}

/// When a tier must have answered: after at most `cap`, and a part of what is left. `None`: too late to ask.
fn slice(now: Instant, deadline: Instant, cap: Duration, parts: u32) -> Option<Instant> {
    let left = deadline.saturating_duration_since(now);
    (left >= SHORTEST_USEFUL).then(|| now + cap.min(left / parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_gets_a_slice_of_what_is_left() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        assert_eq!(slice(now, now + ms(300), ms(10), 3), Some(now + ms(10)));
        assert_eq!(slice(now, now + ms(15), ms(10), 3), Some(now + ms(5)));
        assert_eq!(slice(now, now + Duration::from_micros(400), ms(10), 3), None);
        assert_eq!(slice(now, now, ms(10), 1), None);
    }
}
