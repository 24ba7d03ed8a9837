//! What an operator writes of a drill, checked.
//!
//! The rule: as with resources, every fault of the file is found in one pass, and unknown keys are faults.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::fault::{Act, Fault, Names};
use super::guard::Guards;
use super::timeline::Measure;
use crate::resource::API_VERSION;
use crate::resource::reader::{self, Faults, Field};
use crate::resource::yaml;
use crate::units::{Name, Percent, parse_duration};

/// No fault stays longer.
const LONGEST: Duration = Duration::from_secs(3_600);
const MOST_FAULTS: usize = 16;
const CLIENTS: RangeInclusive<i64> = 1..=1_000;
const ATTEMPTS: RangeInclusive<i64> = 1..=8;
/// Between two requests of one client.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(20);

/// A checked drill.
#[derive(Clone, Debug, PartialEq)]
pub struct Drill {
    pub name: Name,
    /// For people.
    pub description: String,
    /// The region that it is about, unless another one is given with the run.
    pub target: Option<Name>,
    pub expects: Expected,
    /// Share of the target's capacity that is gone meanwhile. All of it with `failover`, none with `steady`.
    pub loses: Percent,
    /// Whether it may begin although nobody knows if what is left is enough. No.
    pub accepts_unknown_capacity: bool,
    pub faults: Vec<Fault>,
    /// How long the faults stay at most. 2 min.
    pub hold: Duration,
    /// With `failover`: they go as soon as all that is expected has been seen for so long. 10 s.
    pub settle: Duration,
    /// How long the way back may take. 15 min.
    pub recover: Duration,
    pub load: Load,
    /// None: what a loss of the region would lose is not measured.
    pub heartbeat: Option<Heartbeat>,
    pub objectives: Objectives,
    pub guards: Guards,
}

/// What should come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The target loses its traffic, and gets it back.
    Failover,
    /// No weight changes.
    Steady,
}

/// The synthetic clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Each in a subnet of its own. 60.
    pub clients: u32,
    /// Between two requests of one client. 1 s.
    pub interval: Duration,
    /// What a request may take, attempts together. 5 s.
    pub deadline: Duration,
    /// Attempts of one request, each at another address as long as there is one. 3.
    pub attempts: u32,
}

/// Entities that are written in the target each second, and looked for elsewhere after its loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The feature group that they are written to.
    pub group: Name,
}

/// What makes a run a success. What is not declared is measured, and judged by nobody.
#[derive(Clone, Debug, PartialEq)]
pub struct Objectives {
    pub times: BTreeMap<Measure, Duration>,
    /// Errors are back when no second has a larger share of failed requests. 1 %.
    pub errors: Percent,
    /// Share of all requests from the injection to the end that must be served.
    pub success: Option<Percent>,
    /// How often weights may change. With `steady`, 0.
    pub weight_changes: Option<u64>,
}

/// Reads the one drill of a file; every fault is returned.
pub fn read(text: &str) -> Result<Drill, Vec<reader::Fault>> {
    let whole =
        |line, problem: String| vec![reader::Fault { line, resource: "Drill/?".into(), field: "-".into(), problem }];
    let documents = yaml::documents(text).map_err(|bad| whole(bad.line, format!("no valid YAML: {}", bad.problem)))?;
    let [document] = &documents[..] else {
        return Err(whole(1, format!("expected one drill, found {} documents", documents.len())));
    };
    let faults = Faults::of("Drill/?".into());
    let drill = read_document(&Field::root("", document, &faults));
    match drill {
        Some(drill) if faults.is_empty() => Ok(drill),
        _ => Err(faults.into_vec()),
    }
}

fn read_document(root: &Field<'_>) -> Option<Drill> {
    let fields = root.map();
    if let Some(field) = fields.required("apiVersion") {
        field.choice(&[(API_VERSION, ())]);
    }
    if let Some(field) = fields.required("kind") {
        field.choice(&[("Drill", ())]);
    }
    let name = fields.required("metadata").and_then(|metadata| {
        let metadata = metadata.map();
        let name = metadata.required("name").and_then(|field| field.parse(Name::parse));
        metadata.finish();
        name
    });
    let spec = fields.required("spec");
    fields.finish();
    read_spec(name?, &spec?)
}

fn read_spec(name: Name, spec: &Field<'_>) -> Option<Drill> {
    let fields = spec.map();
    let description = fields.optional("description").and_then(|field| field.text()).unwrap_or_default().to_owned();
    let target = fields.optional("target").and_then(|field| field.parse(Name::parse));
    let expects = fields
        .required("expects")
        .and_then(|field| field.choice(&[("failover", Expected::Failover), ("steady", Expected::Steady)]));
    let loses = fields.optional("loses").and_then(|field| field.parse(Percent::parse));
    let unknown = fields.optional("unknownCapacity");
    let unknown = unknown.and_then(|field| field.choice(&[("refuse", false), ("accept", true)]));
    let list = fields.required("faults");
    let faults: Vec<Fault> = list.iter().flat_map(Field::items).filter_map(|item| read_fault(&item)).collect();
    if let Some(list) = list.filter(|list| list.items().is_empty() || list.items().len() > MOST_FAULTS) {
        list.fault(format!("expected 1 to {MOST_FAULTS} faults"));
    }
    let time = |name: &'static str, default: Duration| match fields.optional(name) {
        Some(field) => read_time(&field, Duration::from_secs(1)),
        None => Some(default),
    };
    let hold = time("hold", Duration::from_secs(120));
    let settle = time("settle", Duration::from_secs(10));
    let recover = time("recover", Duration::from_secs(900));
    let load = fields.optional("load").map_or_else(|| Some(Load::default()), |field| read_load(&field));
    let heartbeat = fields.optional("heartbeat").and_then(|field| {
        let fields = field.map();
        let group = fields.required("group").and_then(|field| field.parse(Name::parse));
        fields.finish();
        Some(Heartbeat { group: group? })
    });
    let expects = expects?;
    let objectives = read_objectives(fields.optional("objectives").as_ref(), expects);
    let guards = fields.optional("guards").map_or_else(|| Some(Guards::default()), |field| read_guards(&field));
    fields.finish();
    let all = if expects == Expected::Failover { "100%" } else { "0%" };
    Some(Drill {
        name,
        description,
        target,
        expects,
        loses: loses.or_else(|| Percent::parse(all).ok())?,
        accepts_unknown_capacity: unknown.unwrap_or(false),
        faults,
        hold: hold?,
        settle: settle?,
        recover: recover?,
        load: load?,
        heartbeat,
        objectives: objectives?,
        guards: guards?,
    })
}

fn read_fault(field: &Field<'_>) -> Option<Fault> {
    let fields = field.map();
    let act = fields.required("act").and_then(|field| {
        let delayed = Act::Delay(Duration::ZERO);
        let acts = [Act::Kill, Act::Pause, Act::Refuse, delayed, Act::Drop].map(|act| (act.name(), act));
        field.choice(&acts)
    });
    let names =
        |field: Field<'_>| -> Vec<Names> { field.items().iter().filter_map(|item| item.parse(Names::parse)).collect() };
    let on = fields.required("on").map(names);
    let from = fields.optional("from");
    let by = fields.optional("by");
    fields.finish();
    let mut act = act?;
    match (by, act) {
        (Some(by), Act::Delay(_)) => act = Act::Delay(read_time(&by, Duration::from_millis(1))?),
        (Some(by), _) => by.fault("only a delay has it"),
        (None, Act::Delay(_)) => field.fault("a delay says by how much: expected by, such as 200ms"),
        (None, _) => {}
    }
    if let Some(from) = from.as_ref().filter(|_| !act.is_of_links()) {
        from.fault("a process is killed or paused for everybody; expected refuse, delay or drop with it");
    }
    let on = on?;
    if on.is_empty() {
        field.fault("names nobody; expected on, a list of patterns");
    }
    Some(Fault { act, on, from: from.map(names).unwrap_or_default() })
}

fn read_load(field: &Field<'_>) -> Option<Load> {
    let fields = field.map();
    let default = Load::default();
    let count = |name: &'static str, bounds: RangeInclusive<i64>, default: u32| match fields.optional(name) {
        Some(field) => field.number(bounds).and_then(|count| u32::try_from(count).ok()),
        None => Some(default),
    };
    let time = |name: &'static str, default: Duration| match fields.optional(name) {
        Some(field) => read_time(&field, SHORTEST_INTERVAL),
        None => Some(default),
    };
    let clients = count("clients", CLIENTS, default.clients);
    let interval = time("interval", default.interval);
    let deadline = time("deadline", default.deadline);
    let attempts = count("attempts", ATTEMPTS, default.attempts);
    fields.finish();
    Some(Load { clients: clients?, interval: interval?, deadline: deadline?, attempts: attempts? })
}

fn read_objectives(field: Option<&Field<'_>>, expects: Expected) -> Option<Objectives> {
    let steady = (expects == Expected::Steady).then_some(0);
    let mut objectives = Objectives {
        times: BTreeMap::new(),
        errors: Percent::parse("1%").ok()?,
        success: None,
        weight_changes: steady,
    };
    let Some(field) = field else { return Some(objectives) };
    let fields = field.map();
    for measure in Measure::ALL {
        let Some(field) = fields.optional(measure.key()) else { continue };
        if let Some(time) = field.parse(parse_duration) {
            objectives.times.insert(measure, time);
        }
    }
    if let Some(field) = fields.optional("errors") {
        objectives.errors = field.parse(Percent::parse)?;
    }
    if let Some(field) = fields.optional("success") {
        objectives.success = field.parse(Percent::parse);
    }
    if let Some(field) = fields.optional("weightChanges") {
        objectives.weight_changes = field.number(0..=1_000).and_then(|count| u64::try_from(count).ok());
    }
    fields.finish();
    Some(objectives)
}

fn read_guards(field: &Field<'_>) -> Option<Guards> {
    let fields = field.map();
    let default = Guards::default();
    let time = |name: &'static str, default: Duration| match fields.optional(name) {
        Some(field) => read_time(&field, Duration::ZERO),
        None => Some(default),
    };
    let success = match fields.optional("success") {
        Some(field) => field.parse(Percent::parse),
        None => Some(default.success),
    };
    let success_for = time("successFor", default.success_for);
    let second_region_for = time("secondRegionFor", default.second_region_for);
    let blind_for = time("blindFor", default.blind_for);
    fields.finish();
    Some(Guards {
        success: success?,
        success_for: success_for?,
        second_region_for: second_region_for?,
        blind_for: blind_for?,
    })
}

fn read_time(field: &Field<'_>, least: Duration) -> Option<Duration> {
    let time = field.parse(parse_duration)?;
    if time < least || time > LONGEST {
        field.fault(format!("expected a time from {} ms to {} s", least.as_millis(), LONGEST.as_secs()));
        return None;
    }
    Some(time)
}

impl Default for Load {
    fn default() -> Self {
        Self { clients: 60, interval: Duration::from_secs(1), deadline: Duration::from_secs(5), attempts: 3 }
    }
}

impl Drill {
    /// Whether it needs to know which region it is about.
    pub fn needs_target(&self) -> bool {
        let named = |fault: &Fault| fault.on.iter().chain(&fault.from).any(Names::needs_target);
        self.expects == Expected::Failover || self.loses.ratio() > 0.0 || self.faults.iter().any(named)
    }
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
