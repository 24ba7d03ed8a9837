//! Model: what it takes, where it runs, how long it may take, what its inputs are bound to.

use std::collections::BTreeSet;
use std::time::Duration;

use super::reader::{Field, Fields};
use super::traffic::{self, Traffic};
use crate::inference::Datatype;
use crate::resilience::Step;
use crate::units::{InvalidUnit, Name, parse_duration};

#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Where it is served, at most one pool in each region.
    pub pools: Vec<Name>,
    /// Offered versions; the first is the default.
    pub versions: Vec<Name>,
    pub backend: Backend,
    /// The time that a request gets when it does not ask.
    pub deadline: Duration,
    /// The most that a request may ask for.
    pub max_deadline: Duration,
    /// The most entities, or rows, in one call.
    pub max_batch: usize,
    /// A BYTES input of shape `[N]` whose elements are entity ids; it is not passed to the model.
    pub entity_input: Option<Name>,
    pub inputs: Vec<InputBinding>,
    pub outputs: Vec<TensorSpec>,
    pub missing_feature: MissingFeature,
    pub warm_up: WarmUp,
    pub tier: Tier,
    pub traffic: Traffic,
}

/// How much depends on a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// A region that cannot serve it is down: probes ask it.
    One,
    #[default]
    Two,
    Three,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// A Triton server beside the sidecar.
    Triton,
    /// In the sidecar's own process (tract).
    Onnx,
}

/// Name, datatype and shape of an input or output; `-1` is any size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub datatype: Datatype,
    pub shape: Vec<i64>,
}

/// Where an input's values come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputBinding {
    pub tensor: TensorSpec,
    /// Empty: the client must send it. Else the columns, in order; a client that sends it wins.
    pub features: Vec<FeatureRef>,
}

/// `group.field`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FeatureRef {
    pub group: Name,
    pub field: Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingFeature {
    /// Use the field's declared default and say so.
    Default,
    /// Refuse the request.
    Refuse,
}

/// Synthetic requests before a pod says that it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmUp {
    pub requests: u32,
    /// Size of every dimension that is `-1`.
    pub batch: u32,
}

impl TensorSpec {
    /// Whether a concrete shape fits.
    pub fn accepts(&self, shape: &[i64]) -> bool {
        self.shape.len() == shape.len() && self.shape.iter().zip(shape).all(|(spec, size)| *spec == -1 || spec == size)
    }
}

impl std::fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.datatype, self.shape)
    }
}

impl Model {
    pub fn input(&self, name: &str) -> Option<&InputBinding> {
        self.inputs.iter().find(|input| input.tensor.name == name)
    }

    pub fn output(&self, name: &str) -> Option<&TensorSpec> {
        self.outputs.iter().find(|output| output.name == name)
    }

    /// The version that a request means; empty asks for the default.
    pub fn version(&self, asked: &str) -> Option<&Name> {
        if asked.is_empty() { self.versions.first() } else { self.versions.iter().find(|v| v.as_str() == asked) }
    }

    /// Whether the model may be served at this level of degradation; at level 0 it always may.
    pub fn allows(&self, step: Step) -> bool {
        let allowed = self.traffic.degradation.as_ref().map_or([false; 4], |degradation| degradation.settings.allowed);
        usize::from(step.number()).checked_sub(1).is_none_or(|index| allowed.get(index) == Some(&true))
    }

    /// The model that stands in for this one, if that is allowed.
    pub fn fallback(&self) -> Option<&Name> {
        let degradation = self.traffic.degradation.as_ref().filter(|_| self.allows(Step::FallbackModel))?;
        degradation.fallback.as_ref()
    }

    /// The feature groups that this model reads, each once, in name order.
    pub fn groups(&self) -> BTreeSet<&Name> {
        self.inputs.iter().flat_map(|input| &input.features).map(|feature| &feature.group).collect()
    }
}

pub(super) fn read(spec: &Field<'_>) -> Option<Model> {
    let fields = spec.map();
    let pools = names(&fields, "pools");
    let versions = names(&fields, "versions");
    let backend = fields
        .required("backend")
        .and_then(|field| field.choice(&[("triton", Backend::Triton), ("onnx", Backend::Onnx)]));
    let deadline = fields.required("deadline").and_then(|field| positive(&field));
    let max_deadline = match fields.optional("maxDeadline") {
        Some(field) => positive(&field).filter(|max| {
            let longer = deadline.is_none_or(|deadline| *max >= deadline);
            if !longer {
                field.fault("expected at least the deadline");
            }
            longer
        }),
        None => deadline,
    };
    let max_batch = fields.optional("maxBatch").map_or(Some(512), |field| field.number(1..=65_536));
    let entity_input = fields.optional("entityInput").map(|field| field.parse(Name::parse));
    let inputs: Vec<InputBinding> = list(&fields, "inputs", read_input);
    let outputs: Vec<TensorSpec> = list(&fields, "outputs", |field| {
        let fields = field.map();
        let tensor = read_tensor(&fields);
        fields.finish();
        tensor
    });
    if let (Some(field), Some(Some(name))) = (fields.optional("entityInput"), &entity_input)
        && inputs.iter().any(|input| input.tensor.name == name.as_str())
    {
        field.fault(format!("'{name}' is also one of the inputs; expected a name of its own"));
    }
    report_twice(&fields, "inputs", inputs.iter().map(|input| input.tensor.name.as_str()));
    report_twice(&fields, "outputs", outputs.iter().map(|output| output.name.as_str()));
    let missing_feature = fields.optional("missingFeature").map_or(Some(MissingFeature::Refuse), |field| {
        field.choice(&[("default", MissingFeature::Default), ("refuse", MissingFeature::Refuse)])
    });
    let warm_up = fields.optional("warmUp").map_or(Some(WarmUp { requests: 1, batch: 1 }), |field| {
        let fields = field.map();
        let requests = fields.optional("requests").map_or(Some(1), |field| field.number(0..=1_000));
        let batch = fields.optional("batch").map_or(Some(1), |field| field.number(1..=512));
        fields.finish();
        Some(WarmUp { requests: u32::try_from(requests?).ok()?, batch: u32::try_from(batch?).ok()? })
    });
    let tier = fields
        .optional("tier")
        .map_or(Some(Tier::Two), |field| field.choice(&[("1", Tier::One), ("2", Tier::Two), ("3", Tier::Three)]));
    let traffic = traffic::read(&fields, &outputs);
    fields.finish();
    Some(Model {
        pools,
        versions,
        backend: backend?,
        deadline: deadline?,
        max_deadline: max_deadline?,
        max_batch: usize::try_from(max_batch?).ok()?,
        entity_input: match entity_input {
            Some(name) => Some(name?),
            None => None,
        },
        inputs,
        outputs,
        missing_feature: missing_feature?,
        warm_up: warm_up?,
        tier: tier?,
        traffic: traffic?,
    })
}

fn read_input(field: &Field<'_>) -> Option<InputBinding> {
    let fields = field.map();
    let tensor = read_tensor(&fields);
    let mut features = Vec::new();
    if let Some(bound) = fields.optional("features") {
        features.extend(bound.items().iter().filter_map(|item| item.parse(parse_feature)));
        if let Some(tensor) = &tensor {
            let columns = i64::try_from(features.len()).ok();
            let fits = matches!(tensor.shape[..], [-1, width] if Some(width) == columns);
            if !fits {
                bound.fault(format!(
                    "a joined input has the shape [-1, number of features], here [-1, {}], but its shape is {:?}",
                    features.len(),
                    tensor.shape
                ));
            }
        }
    }
    fields.finish();
    Some(InputBinding { tensor: tensor?, features })
}

fn read_tensor(fields: &Fields<'_>) -> Option<TensorSpec> {
    const NAME: InvalidUnit = InvalidUnit("a tensor name of 1 to 255 printable characters");
    const DATATYPE: InvalidUnit = InvalidUnit(
        "one of BOOL, UINT8, UINT16, UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, FP32, FP64, BYTES, BF16",
    );
    let name = fields.required("name").and_then(|field| {
        field.parse(|text| {
            let printable = !text.is_empty() && text.len() <= 255 && !text.chars().any(char::is_control);
            printable.then(|| text.to_owned()).ok_or(NAME)
        })
    });
    let datatype =
        fields.required("datatype").and_then(|field| field.parse(|text| Datatype::parse(text).ok_or(DATATYPE)));
    let shape = fields.required("shape").map(|field| {
        let shape: Vec<i64> = field.items().iter().filter_map(|item| item.number(-1..=i64::from(u32::MAX))).collect();
        if shape.len() > 8 || shape.contains(&0) {
            field.fault("expected at most 8 sizes, each at least 1, or -1 for any size");
        }
        shape
    });
    Some(TensorSpec { name: name?, datatype: datatype?, shape: shape? })
}

fn parse_feature(text: &str) -> Result<FeatureRef, InvalidUnit> {
    const EXPECTED: InvalidUnit = InvalidUnit("group.field, such as site.age");
    let (group, field) = text.split_once('.').ok_or(EXPECTED)?;
    let name = |text| Name::parse(text).map_err(|_| EXPECTED);
    Ok(FeatureRef { group: name(group)?, field: name(field)? })
}

fn positive(field: &Field<'_>) -> Option<Duration> {
    let duration = field.parse(parse_duration)?;
    if duration.is_zero() || duration > Duration::from_secs(3_600) {
        field.fault("expected more than 0 and at most 1h");
        return None;
    }
    Some(duration)
}

fn report_twice<'a>(fields: &Fields<'_>, list: &'static str, names: impl Iterator<Item = &'a str>) {
    let mut seen = BTreeSet::new();
    for name in names {
        if seen.insert(name) {
            continue;
        }
        if let Some(field) = fields.optional(list) {
            field.fault(format!("the tensor '{name}' is given twice"));
        }
    }
}

fn names(fields: &Fields<'_>, name: &'static str) -> Vec<Name> {
    list(fields, name, |field| field.parse(Name::parse))
}

/// A required list that is not empty and has no equal items.
fn list<T: PartialEq>(fields: &Fields<'_>, name: &'static str, read: impl Fn(&Field<'_>) -> Option<T>) -> Vec<T> {
    let Some(field) = fields.required(name) else { return Vec::new() };
    let items = field.items();
    if items.is_empty() {
        field.fault("expected at least one item");
    }
    let mut values: Vec<T> = Vec::with_capacity(items.len());
    for item in &items {
        let Some(value) = read(item) else { continue };
        if values.contains(&value) {
            item.fault("is given twice");
        }
        values.push(value);
    }
    values
}
