//! What operators write, checked: Region, Pool, Model, FeatureGroup, Tenant, AccessPolicy,
//! Revocation.
//!
//! The rule: only checked values leave this module, unknown keys are faults, and every fault is found
//! in one pass. A resource on its own is checked here; references between resources are checked by
//! [`crate::snapshot`].

mod access_policy;
mod feature_group;
mod model;
mod pool;
pub mod reader;
mod region;
mod revocation;
mod tenant;
mod traffic;
pub mod yaml;

pub use access_policy::{AccessPolicy, Action, Pattern, Subject};
pub use feature_group::{Consistency, FeatureGroup, FieldDefinition, FieldValue, Scope};
pub use model::{Backend, FeatureRef, InputBinding, MissingFeature, Model, TensorSpec, Tier, WarmUp};
pub use pool::{DnsSource, Pod, PodSource, Pool};
pub use reader::Fault;
pub use region::{GatewayAddress, Region};
pub use revocation::Revocation;
pub use tenant::{Per, RateLimit, Scope as LimitScope, Tenant, Unit};
pub use traffic::{Cost, Degradation, Traffic};

use crate::units::Name;
use reader::{Faults, Field};
use yaml::{Node, Value};

pub const API_VERSION: &str = "spillway/v1";

/// One checked resource and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    pub line: usize,
    pub name: Name,
    pub spec: Spec,
    /// The spec as written, in canonical form: what a Snapshot carries.
    pub canonical: String,
    /// The spec with its lines, so that a fault found later still names one.
    source: Node,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Spec {
    Region(Region),
    Pool(Pool),
    Model(Box<Model>),
    FeatureGroup(FeatureGroup),
    Tenant(Tenant),
    AccessPolicy(AccessPolicy),
    Revocation(Revocation),
}

impl Spec {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Region(_) => "Region",
            Self::Pool(_) => "Pool",
            Self::Model(_) => "Model",
            Self::FeatureGroup(_) => "FeatureGroup",
            Self::Tenant(_) => "Tenant",
            Self::AccessPolicy(_) => "AccessPolicy",
            Self::Revocation(_) => "Revocation",
        }
    }
}

impl Resource {
    /// `kind/name`, as messages name it.
    pub fn label(&self) -> String {
        format!("{}/{}", self.spec.kind(), self.name)
    }

    /// A fault in this resource that another resource brought to light.
    pub fn fault(&self, field: &str, problem: String) -> Fault {
        let spec = field.strip_prefix("spec").unwrap_or_default();
        let line = self.source.line_of(spec).unwrap_or(self.line);
        Fault { line, resource: self.label(), field: field.to_owned(), problem }
    }
}

/// Reads all resources of a file; every fault of every resource is returned.
pub fn parse(text: &str) -> Result<Vec<Resource>, Vec<Fault>> {
    let (resources, faults) = parse_each(text);
    if faults.is_empty() { Ok(resources) } else { Err(faults) }
}

/// Reads the resources of a file: those that are right, and the faults of the others.
pub fn parse_each(text: &str) -> (Vec<Resource>, Vec<Fault>) {
    let documents = match yaml::documents(text) {
        Ok(documents) => documents,
        Err(yaml::InvalidYaml { line, problem }) => {
            let problem = format!("no valid YAML: {problem}");
            return (Vec::new(), vec![Fault { line, resource: "-".into(), field: "-".into(), problem }]);
        }
    };
    let mut resources = Vec::new();
    let mut faults = Vec::new();
    for document in &documents {
        match parse_document(document) {
            Ok(resource) => resources.push(resource),
            Err(mut found) => faults.append(&mut found),
        }
    }
    (resources, faults)
}

/// Reads one resource as a Snapshot carries it.
pub fn parse_canonical(kind: &str, name: &str, spec: &str) -> Result<Resource, Vec<Fault>> {
    let label = format!("{kind}/{name}");
    let faults = Faults::of(label);
    let nodes = yaml::documents(spec).unwrap_or_default();
    let [node] = &nodes[..] else {
        faults.add(0, "spec", "is not one canonical document");
        return Err(faults.into_vec());
    };
    let name = Name::parse(name).map_err(|fault| faults.add(0, "metadata.name", fault.to_string())).ok();
    let spec = read_spec(kind, &Field::root("spec", node, &faults), &faults);
    finish(0, name, spec, node, faults)
}

fn parse_document(document: &Node) -> Result<Resource, Vec<Fault>> {
    let peek = |path: &[&str]| peek(document, path).unwrap_or("?").to_owned();
    let faults = Faults::of(format!("{}/{}", peek(&["kind"]), peek(&["metadata", "name"])));
    let root = Field::root("", document, &faults).map();
    if let Some(field) = root.required("apiVersion") {
        field.choice(&[(API_VERSION, ())]);
    }
    let kind = root.required("kind").and_then(|field| field.text());
    let name = root.required("metadata").and_then(|metadata| {
        let metadata = metadata.map();
        let name = metadata.required("name").and_then(|field| field.parse(Name::parse));
        metadata.finish();
        name
    });
    static EMPTY: Node = Node { line: 0, value: Value::Null };
    let node = root.optional("spec").map_or(&EMPTY, |field| field.node);
    let line = if node.line == 0 { document.line } else { node.line };
    let placed = Node { line, value: node.value.clone() };
    root.finish();
    let spec = kind.and_then(|kind| read_spec(kind, &Field::root("spec", &placed, &faults), &faults));
    finish(document.line, name, spec, &placed, faults)
}

fn finish(
    line: usize,
    name: Option<Name>,
    spec: Option<Spec>,
    node: &Node,
    faults: Faults,
) -> Result<Resource, Vec<Fault>> {
    // A spec left out is an empty one.
    let canonical = if node.value == Value::Null { "{}".into() } else { node.canonical() };
    match (name, spec, faults.is_empty()) {
        (Some(name), Some(spec), true) => Ok(Resource { line, name, spec, canonical, source: node.clone() }),
        _ => Err(faults.into_vec()),
    }
}

/// `None` only after a fault was added.
fn read_spec(kind: &str, spec: &Field<'_>, faults: &Faults) -> Option<Spec> {
    match kind {
        "Region" => region::read(spec).map(Spec::Region),
        "Pool" => pool::read(spec).map(Spec::Pool),
        "Model" => model::read(spec).map(Box::new).map(Spec::Model),
        "FeatureGroup" => feature_group::read(spec).map(Spec::FeatureGroup),
        "Tenant" => tenant::read(spec).map(Spec::Tenant),
        "AccessPolicy" => access_policy::read(spec).map(Spec::AccessPolicy),
        "Revocation" => revocation::read(spec).map(Spec::Revocation),
        _ => {
            let expected =
                "unknown kind, expected Region, Pool, Model, FeatureGroup, Tenant, AccessPolicy or Revocation";
            faults.add(spec.node.line, "kind", expected);
            None
        }
    }
}

fn peek<'a>(node: &'a Node, path: &[&str]) -> Option<&'a str> {
    let Some((first, rest)) = path.split_first() else {
        let Value::Scalar(text) = &node.value else { return None };
        return Some(text);
    };
    let Value::Map(entries) = &node.value else { return None };
    peek(&entries.iter().find(|(key, _)| key.text == *first)?.1, rest)
}

#[cfg(test)]
mod tests;
