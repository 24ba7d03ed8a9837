//! The Plan in a file and in messages: sealed by the control plane, checked by who acts on it.
//!
//! The rule: as with the Snapshot, it is taken whole or not at all, and versions only rise.

mod plans;

use std::collections::BTreeMap;

use prost::Message;
use sha2::{Digest, Sha256};
use spillway_core::failover::{Allotment, Basis, Plan, Shed, Standing, Terms};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_proto::control::plan::Basis as BasisCode;
use spillway_proto::control::region_plan::Standing as StandingCode;

pub use plans::Plans;
pub(crate) use plans::{KeptPlan, MOST_BYTES as MOST_PLAN_BYTES};

/// A plan and what is said beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// Revision of the election that its maker won.
    pub epoch: u64,
    pub plan: Plan,
    /// What health means for DNS answers, and why, for people.
    pub standings: BTreeMap<Name, (Standing, String)>,
}

/// Why a sealed plan is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("this is no sealed plan")]
    Malformed,
    #[error("the plan's bytes do not match its SHA-256")]
    Checksum,
    #[error("the plan says of '{0}' what cannot be")]
    Region(String),
}

/// Encodes a plan. The same plan gives the same bytes.
pub fn seal(published: &Published) -> control::SealedPlan {
    let plan = encode(published).encode_to_vec();
    let sha256 = Sha256::digest(&plan).to_vec();
    control::SealedPlan { plan: plan.into(), sha256: sha256.into() }
}

/// Decodes a plan. Whether its weights make sense is for [`Plan::check`].
pub fn open(sealed: &control::SealedPlan) -> Result<Published, Unreadable> {
    if Sha256::digest(&sealed.plan)[..] != sealed.sha256[..] {
        return Err(Unreadable::Checksum);
    }
    decode(control::Plan::decode(sealed.plan.clone()).map_err(|_| Unreadable::Malformed)?)
}

pub fn encode(published: &Published) -> control::Plan {
    let Published { epoch, plan, standings } = published;
    let region = |(name, allotment): (&Name, &Allotment)| {
        let (standing, why) = standings.get(name).cloned().unwrap_or((Standing::Steady, String::new()));
        control::RegionPlan {
            region: name.to_string(),
            weight: allotment.weight,
            load: allotment.load,
            shed: allotment.shed.share,
            shed_classes: allotment.shed.classes.to_vec(),
            capacity_factor: allotment.capacity_factor,
            planned: allotment.terms.planned,
            share: allotment.terms.share,
            drained: allotment.terms.drained,
            capacity: allotment.terms.capacity,
            standing: match standing {
                Standing::Steady => StandingCode::Steady,
                Standing::Unsteady => StandingCode::Unsteady,
                Standing::Out => StandingCode::Out,
            }
            .into(),
            why,
        }
    };
    control::Plan {
        version: plan.version,
        epoch: *epoch,
        basis: match plan.basis {
            Basis::Healthy => BasisCode::Healthy,
            Basis::Standby => BasisCode::Standby,
            Basis::Drained => BasisCode::Drained,
            Basis::Blind => BasisCode::Blind,
        }
        .into(),
        demand: plan.demand,
        classes: plan.classes.to_vec(),
        regions: plan.regions.iter().map(region).collect(),
        shed_classes: plan.shed.classes.to_vec(),
    }
}

pub fn decode(plan: control::Plan) -> Result<Published, Unreadable> {
    let epoch = plan.epoch;
    let mut regions = BTreeMap::new();
    let mut standings = BTreeMap::new();
    for region in plan.regions {
        let wrong = || Unreadable::Region(region.region.clone());
        let name = Name::parse(&region.region).map_err(|_| wrong())?;
        let standing = match region.standing() {
            StandingCode::Steady => Standing::Steady,
            StandingCode::Unsteady => Standing::Unsteady,
            StandingCode::Out => Standing::Out,
            StandingCode::Unspecified => return Err(wrong()),
        };
        let shed = Shed { share: region.shed, classes: classes(&region.shed_classes).ok_or_else(wrong)? };
        let terms =
            Terms { planned: region.planned, share: region.share, drained: region.drained, capacity: region.capacity };
        let allotment = Allotment {
            terms,
            weight: region.weight,
            load: region.load,
            shed,
            capacity_factor: region.capacity_factor,
        };
        if !is_possible(&allotment) || regions.insert(name.clone(), allotment).is_some() {
            return Err(wrong());
        }
        standings.insert(name, (standing, region.why));
    }
    let basis = match BasisCode::try_from(plan.basis) {
        Ok(BasisCode::Healthy) => Basis::Healthy,
        Ok(BasisCode::Standby) => Basis::Standby,
        Ok(BasisCode::Drained) => Basis::Drained,
        Ok(BasisCode::Blind) => Basis::Blind,
        Ok(BasisCode::Unspecified) | Err(_) => return Err(Unreadable::Malformed),
    };
    let of_all = classes(&plan.shed_classes).ok_or(Unreadable::Malformed)?;
    let share = regions.values().map(|allotment| allotment.weight * allotment.shed.share).sum();
    let plan = Plan {
        version: plan.version,
        basis,
        demand: plan.demand,
        classes: classes(&plan.classes).ok_or(Unreadable::Malformed)?,
        regions,
        shed: Shed { share, classes: of_all },
    };
    Ok(Published { epoch, plan, standings })
}

fn classes(shares: &[f64]) -> Option<[f64; 4]> {
    shares.try_into().ok()
}

/// Whether all but the weight, which [`Plan::check`] judges, is what a region can have: what a node makes of the plan
/// under its own view of health is only as sound as that.
fn is_possible(allotment: &Allotment) -> bool {
    let Allotment { terms, weight: _, load, shed, capacity_factor } = allotment;
    let share = |share: &f64| (0.0..=1.0).contains(share);
    let amount = |amount: &f64| amount.is_finite() && *amount >= 0.0;
    let shares = [terms.planned, terms.share, shed.share];
    let amounts = [Some(*capacity_factor), *load, terms.capacity];
    shares.iter().chain(&shed.classes).all(share) && amounts.iter().flatten().all(amount)
}

/// The version that a sealed plan says it has; 0 if it cannot be read.
pub fn version_of(sealed: &control::SealedPlan) -> u64 {
    control::Plan::decode(sealed.plan.clone()).map_or(0, |plan| plan.version)
}
