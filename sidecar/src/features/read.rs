//! One look-up: what L1 has, then one round through the other tiers, shared with whoever asks for the
//! same rows at the same time.

use std::time::Instant;

use bytes::Bytes;
use futures_util::future::join;
use futures_util::stream::{FuturesUnordered, StreamExt};
use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::feature::{Freshness, Row, RowKey};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use tokio::time::timeout_at;

use super::flight::Follow;
use super::groups::Group;
use super::lookup::{FailedTiers, FeatureError, Found, Lookup, Present, Reach, Tier};
use super::memory::{Belief, Known};
use super::metrics::Outcome;
use super::round::{Call, Pending, Resolved, What};
use super::{Features, now_us};

/// Rows in one look-up: 512 entities of 16 groups.
const MAX_ROWS: usize = 8_192;

/// A row whose leaders keep failing is given up after so many.
const ATTEMPTS: usize = 3;

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
        self.read_within(Reach::All, snapshot, tenant, groups, entities, deadline).await
    }

    /// Like [`Self::read`], from some of the tiers.
    pub async fn read_within(
        &self,
        reach: Reach,
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
        let now = Instant::now();
        let belief = self.memory.belief(now);
        let call = Call { deadline, now_us: now_us(), arrived: now, belief, began: self.memory.tick(), reach };
        let mut lookup = Lookup {
            found: Vec::with_capacity(rows),
            groups: groups.len(),
            now_us: call.now_us,
            sequence: if let Belief::Full { number } = belief { number } else { None },
            fresh_until_us: None,
            failed_tiers: FailedTiers::default(),
        };
        let mut pending = Vec::new();
        let mut text = String::with_capacity(128);
        for (index, entity) in entities.iter().enumerate() {
            for group in &groups {
                let brace = RowKey::write(&mut text, group.scope, tenant, entity, &group.name)
                    .map_err(|fault| FeatureError::Key { index, fault })?;
                let known = match self.memory.get(&text, group, belief, now, call.now_us) {
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
        let rows = lookup.found.iter().zip(groups.iter().cycle());
        lookup.fresh_until_us = rows.map(|(found, group)| fresh_until_us(found, group, call.now_us)).min();
        Ok(lookup)
    }

    /// Asks the other tiers, together with everyone who asks for the same rows.
    async fn resolve(&self, mut pending: Vec<Pending>, call: Call, lookup: &mut Lookup) {
        if call.reach == Reach::Near {
            // Not together: whoever leads may ask L3, and whoever follows may need its answer.
            let answers =
                if pending.is_empty() { Vec::new() } else { self.round(&pending, call, &|_: Vec<_>| ()).await };
            for (row, resolved) in pending.iter().zip(answers) {
                settle(row, resolved, call, lookup);
            }
            return;
        }
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
                        settle(&row, Resolved { what: What::Unknown, failed }, call, lookup);
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
                // Deaf, nothing tells that the row changed between the leader's question and ours.
                let resolved = resolved.filter(|_| call.belief != Belief::None || follow.began_since(call.arrived));
                if resolved.is_some() {
                    self.metrics.shared.inc();
                }
                (row, resolved)
            })
            .collect();
        waits.collect().await
    }
}

fn settle(row: &Pending, resolved: Resolved, call: Call, lookup: &mut Lookup) {
    lookup.failed_tiers.add(resolved.failed);
    let what = match (resolved.what, &row.known) {
        // Whoever asked for us may not have known what our L1 had.
        (What::Unknown, Some((row, tier))) => What::Row(row.clone(), *tier),
        (what, _) => what,
    };
    let found = match what {
        What::Absent(malformed) => Found::Absent { malformed },
        What::Unknown => Found::Unavailable,
        What::Row(found, tier) => match row.group.freshness(found.event_us(), call.now_us) {
            Freshness::Fresh => {
                // What L1 would have had confirmed, and was not; or, deaf, nobody could say that it was not overwritten.
                let unsure = call.reach == Reach::Near || call.belief == Belief::None;
                present(&row.group, found, unsure && tier == Tier::L1, tier)
            }
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

fn fresh_until_us(found: &Found, group: &Group, now_us: i64) -> i64 {
    match found {
        Found::Present(Present { stale: false, fresh_until_us, .. }) => *fresh_until_us,
        Found::Absent { .. } => group.fresh_until_us(now_us),
        Found::Present(_) | Found::Unavailable => 0,
    }
}
