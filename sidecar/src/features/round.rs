//! One round through L2 and L3, for all rows of a call that L1 does not have: one question to each tier.
//!
//! The rule: what a tier said goes to L1 at once and to L2 in the background, never over something later;
//! what a tier could not say goes nowhere. Followers get an answer as soon as it is there, and a failure
//! only from a leader that had given the tier all the time that it may take.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::feature::{Freshness, Missing, Row, RowKey, Stored};

use super::Features;
use super::groups::Group;
use super::lookup::{FailedTiers, Reach, Tier};
use super::memory::Belief;
use super::metrics::Outcome;
use super::redis::{Put, Value};
use super::store::{Answer, Wanted};

/// What the tiers said about one row; shared with those who asked for it at the same time.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub what: What,
    pub failed: FailedTiers,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Row(Row, Tier),
    Absent(Option<Missing>),
    /// No tier that could know answered.
    Unknown,
}

/// A row that L1 does not have, or not fresh.
pub(super) struct Pending {
    /// In the look-up.
    pub index: usize,
    pub group: Arc<Group>,
    pub key: RowKey,
    /// The newest that is known so far.
    pub known: Option<(Row, Tier)>,
}

/// What all rows of a call have in common.
#[derive(Clone, Copy)]
pub(super) struct Call {
    pub deadline: Instant,
    pub now_us: i64,
    /// When it came, and how far L1 was to be believed then.
    pub arrived: Instant,
    pub belief: Belief,
    /// L1's tick from before the call.
    pub began: u64,
    pub reach: Reach,
}

/// How far a round has come with one row.
#[derive(Clone, Default)]
struct Progress {
    answer: Option<What>,
    /// The best so far.
    known: Option<(Row, Tier)>,
    failed: FailedTiers,
}

impl Features {
    /// One round in L2, then one in L3 for what is left, as far as the call reaches. Answers are in the order of `rows`.
    pub(super) async fn round(
        &self,
        rows: &[Pending],
        call: Call,
        publish: &(impl Fn(Vec<(usize, Resolved)>) + Sync),
    ) -> Vec<Resolved> {
        let mut progress: Vec<Progress> =
            rows.iter().map(|row| Progress { known: row.known.clone(), ..Progress::default() }).collect();
        if self.redis.is_some() {
            self.ask_l2(rows, call, &mut progress).await;
            publish(answered(&progress));
        }
        if call.reach == Reach::All && progress.iter().any(|row| row.answer.is_none()) {
            self.ask_l3(rows, call, &mut progress).await;
            publish(answered(&progress));
        }
        progress.into_iter().map(Progress::end).collect()
    }

    async fn ask_l2(&self, rows: &[Pending], call: Call, progress: &mut [Progress]) {
        let Some(redis) = &self.redis else { return };
        let keys: Vec<&RowKey> = rows.iter().map(|row| &row.key).collect();
        // Looked at before Redis is asked: what is told meanwhile may be told after our answer was made.
        let outdated = self.repairs.among(keys.iter().copied());
        // A third, so that a Redis that hangs leaves the durable tier time to answer.
        let mut found = match slice(Instant::now(), call.deadline, redis.timeout(), 3) {
            Some(until) => redis.read(&keys, until).await,
            None => vec![Answer::Failed; rows.len()],
        };
        for index in outdated {
            if found[index] != Answer::Failed {
                found[index] = Answer::Absent;
            }
        }
        let mut mend = Vec::new();
        for ((row, progress), answer) in rows.iter().zip(progress).zip(found) {
            let outcome = match answer {
                Answer::Failed => {
                    progress.failed.l2 = true;
                    Outcome::Error
                }
                Answer::Absent => Outcome::Miss,
                Answer::Found(bytes) => self.l2_found(row, bytes, call, progress, &mut mend),
            };
            self.metrics.read(Tier::L2, outcome);
        }
        self.fill_l2(mend, call);
    }

    fn l2_found(
        &self,
        row: &Pending,
        bytes: Bytes,
        call: Call,
        progress: &mut Progress,
        mend: &mut Vec<Put>,
    ) -> Outcome {
        match row.group.layout.decode(bytes.clone(), call.now_us) {
            Ok(Stored::Deleted { .. }) => {
                self.memory_fill(&row.key, None, call);
                progress.answer = Some(What::Absent(None));
                Outcome::Absent
            }
            Ok(Stored::Row(found)) => match row.group.freshness(found.event_us(), call.now_us) {
                Freshness::Fresh => {
                    let (best, tier) = newer(progress.known.take(), (found, Tier::L2));
                    self.memory_fill(&row.key, Some(&best), call);
                    progress.answer = Some(What::Row(best, tier));
                    Outcome::Hit
                }
                Freshness::Stale => {
                    progress.known = Some(newer(progress.known.take(), (found, Tier::L2)));
                    Outcome::Stale
                }
                Freshness::Expired => Outcome::Miss,
            },
            Err(missing) => {
                self.metrics.malformed(missing);
                // Another schema may be another reader's: a rollout is under way. The rest is nobody's.
                if missing != Missing::Schema {
                    mend.push(Put { key: row.key.clone(), value: Value::Garbage(bytes) });
                }
                Outcome::Malformed
            }
        }
    }

    async fn ask_l3(&self, rows: &[Pending], call: Call, progress: &mut [Progress]) {
        let open: Vec<usize> = (0..rows.len()).filter(|&index| progress[index].answer.is_none()).collect();
        let wanted: Vec<Wanted> = open
            .iter()
            .map(|&index| Wanted { key: rows[index].key.clone(), consistency: rows[index].group.consistency })
            .collect();
        let now = Instant::now();
        let in_full = call.deadline.saturating_duration_since(now) >= self.store.timeout();
        let found = match slice(now, call.deadline, self.store.timeout(), 1) {
            Some(until) => self.store.read(&wanted, until).await,
            None => vec![Answer::Failed; wanted.len()],
        };
        let mut fills = Vec::new();
        for (index, answer) in open.into_iter().zip(found) {
            let (row, progress) = (&rows[index], &mut progress[index]);
            let outcome = match answer {
                Answer::Failed => {
                    progress.failed.l3 = true;
                    // A follower with more time than we had may fare better: then this is for us alone.
                    if in_full {
                        progress.answer = Some(progress.best());
                    }
                    Outcome::Error
                }
                Answer::Absent => self.l3_absent(row, call, progress),
                Answer::Found(bytes) => match row.group.layout.decode(bytes, call.now_us) {
                    Ok(Stored::Row(found)) => self.l3_found(row, found, call, progress, &mut fills),
                    Ok(Stored::Deleted { .. }) => self.l3_absent(row, call, progress),
                    Err(missing) => {
                        self.metrics.malformed(missing);
                        progress.answer = Some(What::Absent(Some(missing)));
                        Outcome::Malformed
                    }
                },
            };
            self.metrics.read(Tier::L3, outcome);
        }
        self.fill_l2(fills, call);
    }

    fn l3_absent(&self, row: &Pending, call: Call, progress: &mut Progress) -> Outcome {
        self.memory_fill(&row.key, None, call);
        progress.answer = Some(What::Absent(None));
        Outcome::Absent
    }

    fn l3_found(
        &self,
        row: &Pending,
        found: Row,
        call: Call,
        progress: &mut Progress,
        fills: &mut Vec<Put>,
    ) -> Outcome {
        if row.group.freshness(found.event_us(), call.now_us) == Freshness::Expired {
            progress.answer = Some(What::Absent(None));
            return Outcome::Absent;
        }
        let (best, tier) = newer(progress.known.take(), (found, Tier::L3));
        self.memory_fill(&row.key, Some(&best), call);
        if tier == Tier::L3 {
            let expires_us = row.group.expires_us(best.event_us());
            let value = Value::Event { bytes: best.bytes().clone(), expires_us };
            fills.push(Put { key: row.key.clone(), value });
        }
        let stale = row.group.freshness(best.event_us(), call.now_us) == Freshness::Stale;
        progress.answer = Some(What::Row(best, tier));
        if stale { Outcome::Stale } else { Outcome::Hit }
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

impl Progress {
    fn best(&self) -> What {
        self.known.clone().map_or(What::Unknown, |(row, tier)| What::Row(row, tier))
    }

    fn end(mut self) -> Resolved {
        let what = self.answer.take().unwrap_or_else(|| self.best());
        Resolved { what, failed: self.failed }
    }
}

impl Resolved {
    /// Whether the answer is for this group: another request may have come with another Snapshot.
    pub(super) fn fits(&self, group: &Group) -> bool {
        match &self.what {
            What::Row(row, _) => group.layout.owns(row),
            What::Absent(malformed) => *malformed != Some(Missing::Schema),
            What::Unknown => true,
        }
    }
}

fn answered(progress: &[Progress]) -> Vec<(usize, Resolved)> {
    let answer =
        |(index, row): (usize, &Progress)| Some((index, Resolved { what: row.answer.clone()?, failed: row.failed }));
    progress.iter().enumerate().filter_map(answer).collect()
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
