//! What a gateway is given to know: the resources of a small world of which one thing grows.
//!
//! ```text
//! models    calls go to all of them
//! pods      each a real server with a certificate of its own; entities are spread over all of them
//! tenants   each with a token bucket and a policy; calls come from tenants far apart
//! policies  all name the one tenant that calls, each one model, the last in the order of names lets it call
//! ```

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::message::{COLUMNS, INPUT, OUTPUT, SCORES};

pub const TRUST_DOMAIN: &str = "spillway.test";
pub const REGION: &str = "bench";
pub const POOL: &str = "scorers";
/// A model that only the second version of a world has.
pub const MARKER: &str = "marker";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Models,
    Pods,
    Tenants,
    Policies,
}

impl What {
    pub const ALL: [Self; 4] = [Self::Models, Self::Pods, Self::Tenants, Self::Policies];

    pub fn name(self) -> &'static str {
        match self {
            Self::Models => "models",
            Self::Pods => "pods",
            Self::Tenants => "tenants",
            Self::Policies => "policies",
        }
    }

    /// From the smallest to the largest.
    pub fn sizes(self) -> [usize; 3] {
        match self {
            Self::Models => [1, 100, 10_000],
            Self::Pods => [4, 64, 1_000],
            Self::Tenants => [1, 1_000, 100_000],
            Self::Policies => [10, 300, 10_000],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    pub models: usize,
    pub pods: usize,
    pub tenants: usize,
    pub policies: usize,
}

impl World {
    /// The smallest world but for one thing.
    pub fn of(what: What, size: usize) -> Self {
        let [models, pods, tenants, policies] = What::ALL.map(|one| if one == what { size } else { one.sizes()[0] });
        Self { models, pods, tenants, policies }
    }

    /// With `marked`, one model more. `pods`: where they listen, at least as many as there are.
    pub fn resources(&self, pods: &[SocketAddr], marked: bool) -> String {
        let mut text = format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: {REGION} }}\nspec: {{ trustDomain: {TRUST_DOMAIN} }}\n\
             ---\napiVersion: spillway/v1\nkind: Pool\nmetadata: {{ name: {POOL} }}\nspec:\n  region: {REGION}\n  pods:\n"
        );
        for (at, address) in pods.iter().take(self.pods).enumerate() {
            push(&mut text, format_args!("    - {{ name: {}, address: \"{address}\" }}\n", pod(at)));
        }
        let models = (0..self.models).map(model).chain(marked.then(|| MARKER.to_owned()));
        for name in models {
            push(
                &mut text,
                format_args!(
                    "---\napiVersion: spillway/v1\nkind: Model\nmetadata: {{ name: {name} }}\nspec:\n  pools: [{POOL}]\n  \
                     versions: [\"1\"]\n  backend: triton\n  deadline: 5s\n  \
                     inputs: [{{ name: {INPUT}, datatype: FP32, shape: [-1, {COLUMNS}] }}]\n  \
                     outputs: [{{ name: {OUTPUT}, datatype: FP32, shape: [-1, {SCORES}] }}]\n"
                ),
            );
        }
        for at in 0..self.tenants {
            let name = tenant(at);
            push(
                &mut text,
                format_args!(
                    "---\napiVersion: spillway/v1\nkind: Tenant\nmetadata: {{ name: {name} }}\nspec:\n  \
                     limits: [{{ name: all, per: tenant, rate: 1000000/s }}]\n"
                ),
            );
            policy(&mut text, &format!("z-{name}"), &name, "['m-*', marker]");
        }
        for at in 1..self.policies {
            policy(&mut text, &format!("p-{at:06}"), &tenant(0), &format!("[other-{at:06}]"));
        }
        text
    }
}

pub fn pod(at: usize) -> String {
    format!("pod-{at:04}")
}

pub fn model(at: usize) -> String {
    format!("m-{at:06}")
}

pub fn tenant(at: usize) -> String {
    format!("t-{at:06}")
}

fn policy(text: &mut String, name: &str, tenant: &str, models: &str) {
    push(
        text,
        format_args!(
            "---\napiVersion: spillway/v1\nkind: AccessPolicy\nmetadata: {{ name: {name} }}\nspec:\n  \
             subjects: [{{ tenant: {tenant} }}]\n  models: {models}\n  actions: [infer]\n"
        ),
    );
}

fn push(text: &mut String, more: std::fmt::Arguments<'_>) {
    // Writing into a String cannot fail.
    let _ = text.write_fmt(more);
}

#[cfg(test)]
mod tests {
    use spillway_core::resource::{self, PodSource};
    use spillway_core::snapshot::Snapshot;

    use super::*;

    #[test]
    fn each_world_has_what_it_says_and_its_second_version_one_model_more() {
        let pods: Vec<SocketAddr> = (0..64).map(|at| SocketAddr::from(([127, 0, 0, 1], 9_000 + at))).collect();
        for what in What::ALL {
            let world = World::of(what, what.sizes()[1]);
            let compile =
                |marked| Snapshot::compile(1, &resource::parse(&world.resources(&pods, marked)).unwrap()).unwrap();
            let (plain, marked) = (compile(false), compile(true));
            let PodSource::Listed(listed) = &plain.pools.values().next().unwrap().source else { panic!("DNS") };
            let counts = [plain.models.len(), listed.len(), plain.tenants.len()];
            assert_eq!(counts, [world.models, world.pods, world.tenants], "{what:?}");
            assert_eq!(plain.policies.len(), world.policies + world.tenants - 1, "{what:?}");
            assert_eq!(marked.models.len(), world.models + 1);
        }
    }
}
