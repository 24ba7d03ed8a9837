//! All resources as one consistent value: what a gateway or sidecar serves from.
//!
//! The rule: a [`Snapshot`] exists only if every reference in it resolves. A request loads one
//! Snapshot and keeps it to its end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::failover::MayLeave;
use crate::identity::Revoked;
use crate::policy::Policies;
use crate::resource::{
    AccessPolicy, Backend, Fault, FeatureGroup, MissingFeature, Model, Pool, Region, Resource, Spec, Tenant, TensorSpec,
};
use crate::units::Name;

/// Stands for the text of some resources: the same text, the same epoch.
pub type Epoch = [u8; 32];

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Rises with every change, never falls.
    pub version: u64,
    pub regions: BTreeMap<Name, Arc<Region>>,
    pub pools: BTreeMap<Name, Arc<Pool>>,
    pub models: BTreeMap<Name, Arc<Model>>,
    pub groups: BTreeMap<Name, Arc<FeatureGroup>>,
    pub tenants: BTreeMap<Name, Arc<Tenant>>,
    pub policies: BTreeMap<Name, Arc<AccessPolicy>>,
    /// Of all Revocations.
    pub revoked: Arc<Revoked>,
    /// What concerns one tenant.
    grants: BTreeMap<Name, Grants>,
    /// Of each model, its own text and that of its feature groups.
    model_epochs: BTreeMap<Name, Epoch>,
}

/// What a tenant may do: the policies that name it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grants {
    pub policies: Policies,
    /// Of the tenant and these policies.
    pub epoch: Epoch,
}

impl Snapshot {
    /// Builds the one value from checked resources, or says every reference that does not resolve.
    pub fn compile(version: u64, resources: &[Resource]) -> Result<Self, Vec<Fault>> {
        Self::compile_beside(version, resources, &BTreeSet::new())
    }

    /// Like [`Self::compile`], where others could not be read: a reference to one of those, named by
    /// `kind/name`, is no fault of its own.
    pub fn compile_beside(
        version: u64,
        resources: &[Resource],
        unreadable: &BTreeSet<String>,
    ) -> Result<Self, Vec<Fault>> {
        let mut snapshot = Self { version, ..Self::default() };
        let mut faults = Vec::new();
        let mut revocations = BTreeSet::new();
        for resource in resources {
            let name = resource.name.clone();
            let replaced = match &resource.spec {
                Spec::Region(spec) => snapshot.regions.insert(name, Arc::new(spec.clone())).is_some(),
                Spec::Pool(spec) => snapshot.pools.insert(name, Arc::new(spec.clone())).is_some(),
                Spec::Model(spec) => snapshot.models.insert(name, Arc::new((**spec).clone())).is_some(),
                Spec::FeatureGroup(spec) => snapshot.groups.insert(name, Arc::new(spec.clone())).is_some(),
                Spec::Tenant(spec) => snapshot.tenants.insert(name, Arc::new(spec.clone())).is_some(),
                Spec::AccessPolicy(spec) => snapshot.policies.insert(name, Arc::new(spec.clone())).is_some(),
                Spec::Revocation(spec) => {
                    let revoked = Arc::make_mut(&mut snapshot.revoked);
                    revoked.serials.extend(spec.serials.iter().cloned());
                    revoked.ids.extend(spec.ids.iter().cloned());
                    !revocations.insert(name)
                }
            };
            if replaced {
                faults
                    .push(resource.fault("metadata.name", "is given twice; expected one resource of this name".into()));
            }
        }
        for resource in resources {
            snapshot.check_references(resource, unreadable, &mut faults);
        }
        if snapshot.regions.is_empty() && unreadable.is_empty() {
            faults.push(Fault {
                line: 0,
                resource: "-".into(),
                field: "-".into(),
                problem: "there is no Region; expected at least one".into(),
            });
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        snapshot.grants = grants(&snapshot, resources);
        snapshot.model_epochs = model_epochs(&snapshot, resources);
        Ok(snapshot)
    }

    /// What a tenant may do; `None` for a tenant that is not known.
    pub fn grants(&self, tenant: &Name) -> Option<&Grants> {
        self.grants.get(tenant)
    }

    /// Stands for what a model is and what it joins; `None` for a model that is not known.
    pub fn model_epoch(&self, model: &str) -> Option<&Epoch> {
        self.model_epochs.get(model)
    }

    /// The pool that serves a model in a region.
    pub fn pool_of(&self, model: &Model, region: &Name) -> Option<(&Name, &Arc<Pool>)> {
        model.pools.iter().filter_map(|name| self.pools.get_key_value(name)).find(|(_, pool)| pool.region == *region)
    }

    /// The models that a pool serves, in name order.
    pub fn models_of<'a>(&'a self, pool: &Name) -> impl Iterator<Item = (&'a Name, &'a Arc<Model>)> {
        self.models.iter().filter(move |(_, model)| model.pools.contains(pool))
    }

    /// The models that stand in for others of a pool (level 2), each once, in name order.
    pub fn fallbacks_of(&self, pool: &Name) -> impl Iterator<Item = (&Name, &Arc<Model>)> {
        let names: BTreeSet<&Name> = self
            .models
            .values()
            .filter(|model| model.pools.contains(pool))
            .filter_map(|model| model.fallback())
            .collect();
        names.into_iter().filter_map(|name| self.models.get_key_value(name))
    }

    fn check_references(&self, resource: &Resource, unreadable: &BTreeSet<String>, faults: &mut Vec<Fault>) {
        let mut fault = |field: String, problem: String| faults.push(resource.fault(&field, problem));
        let missing = |kind: &str, name: &Name, field: String, fault: &mut dyn FnMut(String, String)| {
            if !unreadable.contains(&format!("{kind}/{name}")) {
                fault(field, format!("there is no {kind} '{name}'"));
            }
        };
        match &resource.spec {
            Spec::FeatureGroup(_) | Spec::Revocation(_) => {}
            Spec::Region(region) => self.check_gateways(&resource.name, region, &mut fault),
            Spec::Tenant(tenant) => {
                let MayLeave::To(regions) = &tenant.may_leave_region else { return };
                for region in regions.iter().filter(|region| !self.regions.contains_key(*region)) {
                    missing("Region", region, "spec.mayLeaveRegion".into(), &mut fault);
                }
            }
            Spec::Pool(pool) => {
                if !self.regions.contains_key(&pool.region) {
                    missing("Region", &pool.region, "spec.region".into(), &mut fault);
                }
            }
            Spec::AccessPolicy(policy) => {
                for (index, subject) in policy.subjects.iter().enumerate() {
                    if !self.tenants.contains_key(&subject.tenant) {
                        missing("Tenant", &subject.tenant, format!("spec.subjects[{index}].tenant"), &mut fault);
                    }
                }
            }
            Spec::Model(model) => {
                self.check_model(model, &missing, &mut fault);
                self.check_fallback(&resource.name, model, &missing, &mut fault);
            }
        }
    }

    /// Whoever dials an address expects one gateway there.
    fn check_gateways(&self, name: &Name, region: &Region, fault: &mut dyn FnMut(String, String)) {
        for (index, gateway) in region.gateways.iter().enumerate() {
            let has = |(_, other): &(&Name, &Arc<Region>)| {
                other.gateways.iter().any(|taken| taken.address == gateway.address)
            };
            if let Some((other, _)) = self.regions.iter().filter(|(other, _)| *other != name).find(has) {
                let problem = format!("the region '{other}' has the address {} too; expected one", gateway.address);
                fault(format!("spec.gateways[{index}].address"), problem);
            }
        }
    }

    fn check_model(&self, model: &Model, missing: &Missing<'_>, fault: &mut dyn FnMut(String, String)) {
        let mut regions: BTreeMap<&Name, &Name> = BTreeMap::new();
        for (index, name) in model.pools.iter().enumerate() {
            match self.pools.get(name) {
                None => missing("Pool", name, format!("spec.pools[{index}]"), fault),
                Some(pool) => {
                    if let Some(other) = regions.insert(&pool.region, name) {
                        let problem =
                            format!("'{name}' and '{other}' are both in the region '{}'; expected one", pool.region);
                        fault(format!("spec.pools[{index}]"), problem);
                    }
                }
            }
        }
        for (index, input) in model.inputs.iter().enumerate() {
            for (column, feature) in input.features.iter().enumerate() {
                let at = format!("spec.inputs[{index}].features[{column}]");
                let Some(group) = self.groups.get(&feature.group) else {
                    missing("FeatureGroup", &feature.group, at, fault);
                    continue;
                };
                let Some(field) = group.fields.iter().find(|field| field.name == feature.field) else {
                    fault(at, format!("the FeatureGroup '{}' has no field '{}'", feature.group, feature.field));
                    continue;
                };
                if field.datatype != input.tensor.datatype {
                    let (found, expected) = (field.datatype, input.tensor.datatype);
                    fault(at.clone(), format!("the field is {found}; expected {expected}, as the input is"));
                }
                if model.missing_feature == MissingFeature::Default && field.default.is_none() {
                    let problem = "missingFeature is default, but the field declares none; expected a default";
                    fault(at, problem.into());
                }
            }
        }
    }

    /// A fallback gets the primary's requests, and its answers are given as the primary's.
    fn check_fallback(&self, name: &Name, model: &Model, missing: &Missing<'_>, fault: &mut dyn FnMut(String, String)) {
        let degradation = model.traffic.degradation.as_ref();
        let Some(named) = degradation.and_then(|degradation| degradation.fallback.as_ref()) else { return };
        let at = "spec.degradation.fallback".to_owned();
        let Some(fallback) = self.models.get(named) else { return missing("Model", named, at, fault) };
        if named == name {
            return fault(at, "is the model itself; expected another one".into());
        }
        if fallback.backend != Backend::Onnx {
            return fault(at, format!("the Model '{named}' is not of the backend onnx, which the sidecar runs itself"));
        }
        if fallback.traffic.degradation.as_ref().is_some_and(|degradation| degradation.fallback.is_some()) {
            return fault(at, format!("the Model '{named}' has a fallback itself; expected one without"));
        }
        let inputs = |model: &Model| model.inputs.iter().map(|input| input.tensor.clone()).collect::<Vec<_>>();
        let differs = difference("input", &inputs(model), &inputs(fallback))
            .or_else(|| difference("output", &model.outputs, &fallback.outputs));
        if let Some(difference) = differs {
            fault(at, format!("the Model '{named}' does not fit: {difference}"));
        }
    }
}

/// The first tensor that two models do not have in common; their order does not matter.
fn difference(what: &str, ours: &[TensorSpec], theirs: &[TensorSpec]) -> Option<String> {
    let of = |specs: &[TensorSpec], name: &str| {
        specs.iter().find(|spec| spec.name == name).map_or_else(|| "absent".to_owned(), ToString::to_string)
    };
    let mut all = ours.iter().chain(theirs);
    let name = &all.find(|spec| !(ours.contains(spec) && theirs.contains(spec)))?.name;
    Some(format!("the {what} '{name}' is {} here and {} there", of(ours, name), of(theirs, name)))
}

/// Adds a resource's text to an epoch. Names and lengths keep texts apart.
fn add(epoch: &mut Sha256, resource: &Resource) {
    for part in [resource.spec.kind(), resource.name.as_str(), &resource.canonical] {
        epoch.update((part.len() as u64).to_le_bytes());
        epoch.update(part);
    }
}

/// In the order of names, so that the order of files does not matter.
fn sorted<'a>(resources: &'a [Resource], kind: &str) -> Vec<&'a Resource> {
    let mut sorted: Vec<&Resource> = resources.iter().filter(|resource| resource.spec.kind() == kind).collect();
    sorted.sort_by(|one, other| one.name.cmp(&other.name));
    sorted
}

fn grants(snapshot: &Snapshot, resources: &[Resource]) -> BTreeMap<Name, Grants> {
    let mut found: BTreeMap<Name, (Vec<Arc<AccessPolicy>>, Sha256)> = BTreeMap::new();
    for tenant in sorted(resources, "Tenant") {
        let mut epoch = Sha256::new();
        add(&mut epoch, tenant);
        found.insert(tenant.name.clone(), (Vec::new(), epoch));
    }
    for resource in sorted(resources, "AccessPolicy") {
        let Some(policy) = snapshot.policies.get(&resource.name) else { continue };
        let tenants: BTreeSet<&Name> = policy.subjects.iter().map(|subject| &subject.tenant).collect();
        for tenant in tenants {
            let Some((policies, epoch)) = found.get_mut(tenant) else { continue };
            policies.push(policy.clone());
            add(epoch, resource);
        }
    }
    let grants = |(tenant, (policies, epoch)): (Name, (Vec<_>, Sha256))| {
        (tenant.clone(), Grants { policies: Policies::of(&tenant, policies), epoch: epoch.finalize().into() })
    };
    found.into_iter().map(grants).collect()
}

fn model_epochs(snapshot: &Snapshot, resources: &[Resource]) -> BTreeMap<Name, Epoch> {
    let groups: BTreeMap<&Name, &Resource> =
        sorted(resources, "FeatureGroup").into_iter().map(|group| (&group.name, group)).collect();
    let epoch = |resource: &Resource| {
        let mut epoch = Sha256::new();
        add(&mut epoch, resource);
        let model = snapshot.models.get(&resource.name)?;
        model.groups().into_iter().filter_map(|name| groups.get(name)).for_each(|group| add(&mut epoch, group));
        Some((resource.name.clone(), epoch.finalize().into()))
    };
    sorted(resources, "Model").into_iter().filter_map(epoch).collect()
}

/// Reports a reference to a resource that is not there: kind, name, field, and where faults go.
type Missing<'a> = dyn Fn(&str, &Name, String, &mut dyn FnMut(String, String)) + 'a;
