//! A view as weighted records, and what to change so that they are there.
//!
//! The rule: all A and AAAA records of the service's name are ours. What is not as it should be is put right, and what
//! should not be there goes, but never the last address of a family (THREATS 66).
//!
//! One set for each region and family: SetIdentifier is the region, no health check. Weights are 0 to 255, the heaviest
//! region's 255: a share is off by 1/255 of the heaviest at most. A region that is out has 0, unless all are. All sets of
//! a name have one time to live, as Route 53 advises: the hurried one while any region is not steady.
//!
//! Whose word the records are stands beside them, in a TXT record. Each batch replaces it, is all or nothing, and deletes
//! the stamp that was read by its exact value. No two stamps that follow one another are alike, so of those who read the
//! same one writes: a leader that was paused does no harm (THREATS 60, 67).

use std::net::IpAddr;

use aws_sdk_route53::error::BuildError;
use aws_sdk_route53::types::{Change, ChangeAction, ResourceRecord, ResourceRecordSet, RrType};
use spillway_core::failover::{AnswerSettings, Standing};
use spillway_core::units::DnsName;

use super::settings::MOST_ADDRESSES;
use crate::dns::view::{Place, View};

const HEAVIEST: f64 = 255.0;
const STAMP_TTL: i64 = 60;

/// Whose plan the records are, which, and how often they were written. Later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// Revision of the leader's election.
    pub epoch: u64,
    /// Version of the plan.
    pub version: u64,
    /// Number of the batch. It tells two of one plan apart.
    pub batch: u64,
}

/// Where the stamp is kept.
pub fn stamp_name(service: &DnsName) -> String {
    format!("_spillway.{service}.")
}

impl Stamp {
    fn text(self) -> String {
        format!("\"epoch={} plan={} batch={}\"", self.epoch, self.version, self.batch)
    }

    /// None: somebody else's TXT record.
    pub fn read(set: &ResourceRecordSet) -> Option<Self> {
        let [record] = set.resource_records() else { return None };
        let (epoch, rest) = record.value().trim_matches('"').strip_prefix("epoch=")?.split_once(" plan=")?;
        let (version, batch) = rest.split_once(" batch=")?;
        Some(Self { epoch: epoch.parse().ok()?, version: version.parse().ok()?, batch: batch.parse().ok()? })
    }

    /// The next one, for this plan.
    pub fn after(read: Option<Self>, epoch: u64, version: u64) -> Self {
        Self { epoch, version, batch: read.map_or(1, |read| read.batch.saturating_add(1)) }
    }

    /// Whose it is, and its version.
    pub fn plan(self) -> (u64, u64) {
        (self.epoch, self.version)
    }

    pub fn record(self, service: &DnsName) -> Result<ResourceRecordSet, BuildError> {
        let value = ResourceRecord::builder().value(self.text()).build()?;
        let set = ResourceRecordSet::builder().name(stamp_name(service)).r#type(RrType::Txt);
        set.ttl(STAMP_TTL).resource_records(value).build()
    }
}

/// The sets that a view asks for.
pub fn desired(view: &View, answers: &AnswerSettings, service: &DnsName) -> Result<Vec<ResourceRecordSet>, BuildError> {
    let counts = |place: &Place| place.weight.is_finite() && place.weight > 0.0;
    let mut sets = Vec::new();
    for (kind, family) in [(RrType::A, v4 as fn(&Place) -> &[IpAddr]), (RrType::Aaaa, v6)] {
        let there = || view.regions.iter().filter(move |(_, place)| !family(place).is_empty());
        // As `core::failover::answer` does it: those that are not out, of them those with weight; or else all alike.
        let blind = there().all(|(_, place)| place.standing == Standing::Out);
        let in_view = move |place: &Place| blind || place.standing != Standing::Out;
        let weighted = there().any(|(_, place)| in_view(place) && counts(place));
        let weight = |place: &Place| match (in_view(place), weighted) {
            (false, _) => 0.0,
            (true, false) => 1.0,
            (true, true) if counts(place) => place.weight,
            (true, true) => 0.0,
        };
        let heaviest = there().map(|(_, place)| weight(place)).fold(0.0, f64::max);
        let hurried = there().any(|(_, place)| place.standing != Standing::Steady);
        let ttl = if hurried { answers.hurried_ttl } else { answers.ttl };
        for (region, place) in there() {
            let weight = weight(place);
            // What has any weight keeps some.
            let whole = if weight > 0.0 { (weight / heaviest * HEAVIEST).round().max(1.0) } else { 0.0 };
            let addresses = family(place).iter().take(answers.addresses.min(MOST_ADDRESSES));
            let records = addresses.map(|address| ResourceRecord::builder().value(address.to_string()).build());
            let set = ResourceRecordSet::builder()
                .name(format!("{service}."))
                .r#type(kind.clone())
                .set_identifier(region.as_str())
                .weight(whole as i64)
                .ttl(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX))
                .set_resource_records(Some(records.collect::<Result<_, _>>()?));
            sets.push(set.build()?);
        }
    }
    Ok(sets)
}

/// What makes the listed sets of the service the desired ones; empty if they are.
pub fn changes(listed: &[ResourceRecordSet], desired: &[ResourceRecordSet]) -> Result<Vec<Change>, BuildError> {
    let key = |set: &ResourceRecordSet| (set.r#type().clone(), set.set_identifier().map(str::to_owned));
    let is_kept = |set: &ResourceRecordSet| desired.iter().any(|wanted| key(wanted) == key(set));
    let of_kind = |kind: &RrType| desired.iter().any(|wanted| wanted.r#type() == kind);
    let mut changes = Vec::new();
    for set in listed {
        // A family without any desired address keeps what it has, but for IPv6 beside IPv4, which may go.
        let may_go = of_kind(set.r#type()) || *set.r#type() == RrType::Aaaa && of_kind(&RrType::A);
        if !is_kept(set) && may_go {
            changes.push(change(ChangeAction::Delete, set.clone())?);
        }
    }
    for wanted in desired {
        let found = listed.iter().find(|set| key(set) == key(wanted));
        match found {
            Some(found) if is_same(found, wanted) => {}
            // A set of another policy under our identifier cannot be turned into a weighted one.
            Some(found) if found.weight().is_none() => {
                changes.push(change(ChangeAction::Delete, found.clone())?);
                changes.push(change(ChangeAction::Create, wanted.clone())?);
            }
            _ => changes.push(change(ChangeAction::Upsert, wanted.clone())?),
        }
    }
    Ok(changes)
}

/// Replaces the stamp that was read by this one. The deletion fails if it is not that one any more.
pub fn restamp(read: Option<&ResourceRecordSet>, stamp: ResourceRecordSet) -> Result<Vec<Change>, BuildError> {
    let mut changes = Vec::with_capacity(2);
    if let Some(read) = read {
        changes.push(change(ChangeAction::Delete, read.clone())?);
    }
    changes.push(change(ChangeAction::Create, stamp)?);
    Ok(changes)
}

/// The same, whatever the order of addresses. An attribute that we never set makes a set another one.
fn is_same(found: &ResourceRecordSet, wanted: &ResourceRecordSet) -> bool {
    let sorted = |set: &ResourceRecordSet| {
        let mut values: Vec<String> = set.resource_records().iter().map(|record| record.value().to_owned()).collect();
        values.sort();
        values
    };
    let is_plain = found.health_check_id().is_none()
        && found.alias_target().is_none()
        && found.region().is_none()
        && found.failover().is_none()
        && found.geo_location().is_none();
    is_plain && found.weight() == wanted.weight() && found.ttl() == wanted.ttl() && sorted(found) == sorted(wanted)
}

fn change(action: ChangeAction, set: ResourceRecordSet) -> Result<Change, BuildError> {
    Change::builder().action(action).resource_record_set(set).build()
}

fn v4(place: &Place) -> &[IpAddr] {
    &place.v4
}

fn v6(place: &Place) -> &[IpAddr] {
    &place.v6
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
