//! Tenant: a customer, how important its requests may be, and how much it may ask for.

use std::collections::BTreeSet;

use super::access_policy::Pattern;
use super::reader::{Field, Fields};
use super::yaml::Value;
use crate::failover::MayLeave;
use crate::limit::{self, Class, Gcra, InvalidLimit, Quota, QuotaSettings, Reserves};
use crate::units::{Name, Rate};

/// A customer. Its clients prove themselves as `spiffe://<trust domain>/tenant/<name>/client/<client>`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tenant {
    /// For people; may be empty.
    pub description: String,
    /// The class of a request that does not say its priority; default normal.
    pub default_class: Class,
    /// The most important class that a request may ask for; default `default_class`.
    pub highest_class: Class,
    /// Token buckets; a request must pass all that apply to it. Default none.
    pub limits: Vec<RateLimit>,
    /// Requests at a gateway at once, and waiting; default no bound of its own.
    pub in_flight: Option<usize>,
    /// Whether the `Cache-Control` of a request is honoured; default not.
    pub honours_cache_control: bool,
    /// Where its requests may be answered beside the region that they were sent to; default nowhere.
    pub may_leave_region: MayLeave,
}

/// One token bucket, or one for each model or entity.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimit {
    /// In `RateLimit` headers and messages.
    pub name: Name,
    pub per: Per,
    /// Default all.
    pub models: Vec<Pattern>,
    pub unit: Unit,
    pub rate: Rate,
    /// Tokens that a full bucket holds; default those of a second, at least 1.
    pub burst: u32,
    pub scope: Scope,
}

/// What has a bucket of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Per {
    Tenant,
    Model,
    Entity,
}

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Request,
    /// The cost that the model declares.
    Cost,
}

/// Where the rate is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Each gateway gives the whole rate.
    Gateway,
    /// The gateways of a region share the rate.
    Region,
}

impl RateLimit {
    pub fn applies_to(&self, model: &str) -> bool {
        self.models.iter().any(|pattern| pattern.matches(model))
    }

    /// The bucket of the whole rate, for a tenant of this highest class.
    pub fn bucket(&self, highest: Class) -> Result<Gcra, InvalidLimit> {
        Gcra::new(self.rate.into(), self.burst, Reserves::default().up_to(highest))
    }

    /// The quota of a region, for a tenant of this highest class. The rest has its defaults.
    pub fn quota(&self, highest: Class) -> QuotaSettings {
        let reserves = Reserves::default().up_to(highest);
        QuotaSettings { reserves, ..QuotaSettings::new(self.rate.into(), self.burst) }
    }
}

impl From<Rate> for limit::Rate {
    fn from(rate: Rate) -> Self {
        Self { tokens: rate.count, per: rate.per }
    }
}

fn classes() -> [(&'static str, Class); 4] {
    Class::ALL.map(|class| (class.name(), class))
}

pub(super) fn read(spec: &Field<'_>) -> Option<Tenant> {
    let fields = spec.map();
    let description = match fields.optional("description") {
        Some(field) => field.text()?.to_owned(),
        None => String::new(),
    };
    let (default_class, highest_class) = read_priority(&fields)?;
    let limits = read_limits(&fields);
    let in_flight = fields.optional("inFlight").map(|field| field.number(1..=1_000_000));
    let honours = fields
        .optional("cacheControl")
        .map_or(Some(false), |field| field.choice(&[("honour", true), ("ignore", false)]));
    let may_leave = fields.optional("mayLeaveRegion").map_or(Some(MayLeave::No), |field| read_may_leave(&field));
    fields.finish();
    Some(Tenant {
        description,
        default_class,
        highest_class,
        limits,
        in_flight: match in_flight {
            Some(number) => Some(usize::try_from(number?).ok()?),
            None => None,
        },
        honours_cache_control: honours?,
        may_leave_region: may_leave?,
    })
}

fn read_priority(fields: &Fields<'_>) -> Option<(Class, Class)> {
    let Some(field) = fields.optional("priority") else { return Some((Class::Normal, Class::Normal)) };
    let fields = field.map();
    let default = fields.optional("default").map_or(Some(Class::Normal), |field| field.choice(&classes()));
    let highest = fields.optional("highest").map_or(default, |field| field.choice(&classes()));
    fields.finish();
    let (default, highest) = (default?, highest?);
    // Critical is the least of the order.
    if highest > default {
        field.fault("the default is above the highest; expected at most the highest");
        return None;
    }
    Some((default, highest))
}

fn read_may_leave(field: &Field<'_>) -> Option<MayLeave> {
    if !matches!(field.node.value, Value::List(_)) {
        return field
            .choice(&[("true", true), ("false", false)])
            .map(|may| if may { MayLeave::Anywhere } else { MayLeave::No });
    }
    let items = field.items();
    if items.is_empty() {
        field.fault("names no region; expected some, or true or false");
    }
    Some(MayLeave::To(items.iter().filter_map(|item| item.parse(Name::parse)).collect()))
}

fn read_limits(fields: &Fields<'_>) -> Vec<RateLimit> {
    let Some(field) = fields.optional("limits") else { return Vec::new() };
    let items = field.items();
    /// Each is looked at for each request.
    const MOST: usize = 16;
    if items.len() > MOST {
        field.fault(format!("expected at most {MOST} limits"));
    }
    let mut names = BTreeSet::new();
    let mut limits = Vec::with_capacity(items.len());
    for item in &items {
        let Some(limit) = read_limit(item) else { continue };
        if !names.insert(limit.name.clone()) {
            item.fault(format!("the limit '{}' is given twice", limit.name));
        }
        limits.push(limit);
    }
    limits
}

fn read_limit(field: &Field<'_>) -> Option<RateLimit> {
    const MOST: i64 = 1_000_000_000;
    let fields = field.map();
    let name = fields.required("name").and_then(|field| field.parse(Name::parse));
    let per = fields
        .required("per")
        .and_then(|field| field.choice(&[("tenant", Per::Tenant), ("model", Per::Model), ("entity", Per::Entity)]));
    let models = match fields.optional("models") {
        Some(field) => field.items().iter().filter_map(|item| item.parse(Pattern::parse)).collect(),
        None => vec![Pattern::any()],
    };
    let unit = fields
        .optional("of")
        .map_or(Some(Unit::Request), |field| field.choice(&[("requests", Unit::Request), ("cost", Unit::Cost)]));
    let rate = fields.required("rate").and_then(|field| field.parse(Rate::parse));
    let burst = match fields.optional("burst") {
        Some(field) => field.number(1..=MOST).and_then(|burst| u32::try_from(burst).ok()),
        None => rate.map(|rate| rate.per_second().ceil().max(1.0) as u32),
    };
    let scope = fields
        .optional("scope")
        .map_or(Some(Scope::Gateway), |field| field.choice(&[("gateway", Scope::Gateway), ("region", Scope::Region)]));
    if per == Some(Per::Entity) && scope == Some(Scope::Region) {
        field.fault(
            "scope is region, but the limit is per entity; expected gateway: an entity has one gateway's bucket",
        );
    }
    fields.finish();
    let limit = RateLimit { name: name?, per: per?, models, unit: unit?, rate: rate?, burst: burst?, scope: scope? };
    let checked = match limit.scope {
        Scope::Gateway => limit.bucket(Class::Critical).map(drop),
        Scope::Region => Quota::new(&limit.quota(Class::Critical)).map(drop),
    };
    checked.map_err(|fault| field.fault(fault.to_string())).ok()?;
    Some(limit)
}
