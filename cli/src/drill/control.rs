//! What the control plane says, by whichever of its nodes answers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use spillway_core::drill::preflight::{RegionBefore, Situation};
use spillway_core::drill::record::{RegionSight, Sight};
use spillway_core::health::Phase;
use spillway_core::resource::{Spec, parse_canonical};
use spillway_core::units::Name;
use spillway_proto::control::intent_client::IntentClient;
use spillway_proto::control::{EndDrillRequest, GetRequest, SetDrillRequest, StatusRequest, StatusResponse};
use spillway_runtime::tls::{IdentitySettings, Workload};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::channel;
use super::place::Server;

/// Of one call.
const CALL: Duration = Duration::from_secs(2);

/// The control nodes.
pub struct Control {
    workload: Arc<Workload>,
    nodes: Vec<Server>,
    /// The one that answered last.
    at: usize,
    client: Option<IntentClient<Channel>>,
}

impl Control {
    pub fn new(nodes: Vec<Server>, operator: &IdentitySettings) -> Result<Self> {
        let workload = Workload::load(operator).context("the operator's identity")?;
        Ok(Self { workload, nodes, at: 0, client: None })
    }

    /// What any of them says.
    pub async fn status(&mut self) -> Result<StatusResponse> {
        self.ask(|mut client| async move { client.status(StatusRequest {}).await }).await
    }

    /// Tells everybody of a drill, or that it goes on. An answer may be that it is refused, and why.
    pub async fn announce(&mut self, drill: SetDrillRequest) -> Result<Result<(), String>> {
        let announced = |mut client: IntentClient<Channel>| {
            let drill = drill.clone();
            async move {
                match client.set_drill(drill).await {
                    Ok(_) => Ok(Response::new(Ok(()))),
                    // Another node would say the same.
                    Err(status) if is_refusal(status.code()) => Ok(Response::new(Err(status.message().to_owned()))),
                    Err(status) => Err(status),
                }
            }
        };
        self.ask(announced).await
    }

    /// Tells everybody that it is over.
    pub async fn ended(&mut self, lease: u64, how: &str) -> Result<()> {
        let ended = |mut client: IntentClient<Channel>| {
            let request = EndDrillRequest { lease, how: how.to_owned() };
            async move { client.end_drill(request).await }
        };
        self.ask(ended).await.map(|_| ())
    }

    /// Asks each node once, the one that answered last first.
    async fn ask<T, F>(&mut self, call: impl Fn(IntentClient<Channel>) -> F) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut failed = None;
        for _ in 0..self.nodes.len() {
            let asked = async { Ok::<_, anyhow::Error>(call(self.connected().await?.clone()).await?) };
            match asked.await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(problem) => failed = Some(problem),
            }
            self.client = None;
            self.at = (self.at + 1) % self.nodes.len();
        }
        Err(failed.context("there is no control node")?.context("no control node answers"))
    }

    /// The region of each gateway's address.
    pub async fn gateways(&mut self) -> Result<BTreeMap<IpAddr, Name>> {
        let request = GetRequest { kind: "Region".into(), ..GetRequest::default() };
        let answer = self.connected().await?.get(request).await?.into_inner();
        let mut gateways = BTreeMap::new();
        for resource in answer.resources {
            let read = parse_canonical(&resource.kind, &resource.name, &resource.spec_json);
            let Ok(resource) = read else { continue };
            let Spec::Region(region) = resource.spec else { continue };
            gateways.extend(region.gateways.iter().map(|gateway| (gateway.address.ip(), resource.name.clone())));
        }
        Ok(gateways)
    }

    async fn connected(&mut self) -> Result<&mut IntentClient<Channel>> {
        if self.client.is_none() {
            let node = self.nodes.get(self.at).context("there is no control node")?;
            let channel = channel::connect(&self.workload, &node.address, &node.id, CALL).await?;
            self.client = Some(IntentClient::new(channel));
        }
        self.client.as_mut().context("it was just connected")
    }
}

/// What a status says for the record.
pub fn sight(status: &StatusResponse) -> Sight {
    let regions = status.regions.iter().filter_map(|region| {
        let name = Name::parse(&region.region).ok()?;
        let failing = region.failing_pairs.into();
        Some((name, RegionSight { phase: phase(&region.phase), failing, weight: region.weight }))
    });
    Sight { plan_version: status.plan.as_ref().map_or(0, |plan| plan.version), regions: regions.collect() }
}

fn is_refusal(code: Code) -> bool {
    matches!(code, Code::FailedPrecondition | Code::PermissionDenied | Code::InvalidArgument | Code::Unimplemented)
}

/// What it says for the preflight of the drill that is announced by `own`.
pub fn situation(status: &StatusResponse, own: u64) -> Situation {
    let plan = status.plan.as_ref();
    let capacity = |name: &str| {
        let region = plan?.regions.iter().find(|region| region.region == name)?;
        region.capacity
    };
    let regions = status.regions.iter().filter_map(|region| {
        let before =
            RegionBefore { phase: phase(&region.phase), weight: region.weight, capacity: capacity(&region.region) };
        Some((Name::parse(&region.region).ok()?, before))
    });
    let others = status.drills.iter().filter(|drill| drill.lease != own);
    let overrides = status.overrides.iter().flat_map(|overrides| &overrides.overrides);
    Situation {
        leader: !status.leader.is_empty(),
        regions: regions.collect(),
        demand: plan.and_then(|plan| plan.demand),
        drills: others.map(|other| other.drill.clone()).collect(),
        overridden: overrides.map(|order| order.region.clone()).collect(),
        ..Situation::default()
    }
}

fn phase(word: &str) -> Option<Phase> {
    // A ramp may say how far it is.
    Some(match word.to_ascii_lowercase().split(' ').next()? {
        "up" => Phase::Up,
        "suspect" => Phase::Suspect,
        "down" => Phase::Down,
        "probation" => Phase::Probation,
        "ramp" => Phase::Ramp { percent: 0 },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_phases_are_known_or_nothing() {
        assert_eq!(phase("up"), Some(Phase::Up));
        assert_eq!(phase("RAMP 25 %"), Some(Phase::Ramp { percent: 0 }));
        assert_eq!(phase("fine"), None);
        assert_eq!(phase(""), None);
    }
}
