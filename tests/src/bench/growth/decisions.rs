//! What one decision costs in process: the part of a call's cost that a larger world could make grow.
//!
//! ```text
//! models, tenants, policies    whether this client may call this model
//! pods                         which pod a request with an entity gets, and one without, 64 in flight
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spillway_core::policy::{Principal, authorize};
use spillway_core::resource::Action;
use spillway_core::routing::{Call, Candidate, Ring, RoutingSettings, Totals, choose, key_hash};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use super::callers::mix;
use super::on_cpu;
use super::world::{self, What, World};

/// Decisions between two looks at the clock.
const ROUND: u64 = 64;
/// Requests under way, spread over the pods.
const IN_FLIGHT: usize = 64;

/// Up to so many pods, the gateway sums up what they carry at each choice.
const FEW_PODS: usize = 64;

/// Nanoseconds of CPU time a decision, over so much time.
pub fn measure(what: What, world: &World, snapshot: &Snapshot, time: Duration) -> Result<f64> {
    match what {
        What::Models | What::Tenants | What::Policies => allowing(world, snapshot, time),
        What::Pods => choosing(world, time),
    }
}

/// A name is looked up as one that came with the request: not the snapshot's own.
fn allowing(world: &World, snapshot: &Snapshot, time: Duration) -> Result<f64> {
    let tenants = spread(world.tenants);
    let principals =
        tenants.map(|at| Ok(Principal { tenant: Name::parse(&world::tenant(at))?, client: Name::parse("bench")? }));
    let principals: Vec<Principal> = principals.collect::<Result<_>>()?;
    let models: Vec<String> = spread(world.models).map(world::model).collect();
    for (principal, model) in principals.iter().zip(models.iter().cycle()) {
        authorize(snapshot, principal, model, "", Action::Infer).context("a client of the world may not call")?;
    }
    nanos_each(time, |number| {
        let pick = |count: usize| usize::try_from(mix(number)).unwrap_or_default() % count;
        let (principal, model) = (&principals[pick(principals.len())], &models[pick(models.len())]);
        black_box(authorize(black_box(snapshot), principal, model, "", Action::Infer)).is_ok()
    })
}

fn choosing(world: &World, time: Duration) -> Result<f64> {
    let pods: Vec<String> = (0..world.pods).map(world::pod).collect();
    let ring = Ring::new(pods.iter().map(String::as_str));
    let settings = RoutingSettings::default();
    let pod = |at: usize| Candidate {
        usable: true,
        tried: false,
        in_flight: IN_FLIGHT / world.pods + usize::from(at < IN_FLIGHT % world.pods),
        report: None,
        weight: 1.0,
        failing: 0.0,
    };
    // As the gateway does in a pool of so many: it sums up what they carry once in a while.
    let remembered = Totals { in_flight: IN_FLIGHT as f64, weight: world.pods as f64 };
    let totals = |_, sum: &dyn Fn() -> Totals| if world.pods > FEW_PODS { remembered } else { sum() };
    nanos_each(time, |number| {
        let random = mix(number);
        // Every second request names an entity.
        let key = (number & 1 == 0).then(|| key_hash(&random.to_le_bytes()));
        let call = Call { key, hot: false, panic: false, random };
        black_box(choose(&settings, &call, black_box(&ring), pod, || 0, totals)).is_some()
    })
}

/// As many numbers below `count` as one decision after the other can be made with.
fn spread(count: usize) -> impl Iterator<Item = usize> {
    const MOST: usize = 4_096;
    (0..count.min(MOST)).map(move |at| at * count / count.min(MOST))
}

/// CPU time of this thread for each.
fn nanos_each(time: Duration, mut decide: impl FnMut(u64) -> bool) -> Result<f64> {
    let (mut done, mut well) = (0, 0);
    let ((), used) = on_cpu(|| {
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..ROUND {
                well += u64::from(decide(done));
                done += 1;
            }
        }
    })?;
    // What fails early costs less.
    ensure!(done == well, "{} of {done} decisions went another way", done - well);
    Ok(used.as_nanos() as f64 / done as f64)
}
