//! AccessPolicy: which clients may do what with which models. What no policy allows is denied.

use super::reader::Field;
use crate::units::{InvalidUnit, Name};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessPolicy {
    pub subjects: Vec<Subject>,
    pub models: Vec<Pattern>,
    pub actions: Vec<Action>,
}

/// A tenant, or some of its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub tenant: Name,
    pub clients: Pattern,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Unary and streamed inference.
    Infer,
    /// Metadata and readiness of a model.
    Metadata,
    /// What operators do.
    Admin,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Metadata => "metadata",
            Self::Admin => "admin",
        }
    }
}

/// A name, or a beginning of names followed by `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    literal: String,
    prefix: bool,
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit("a name, or a beginning and '*', such as fraud-*");
        let (literal, prefix) = text.strip_suffix('*').map_or((text, false), |literal| (literal, true));
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !literal.bytes().all(allowed) || literal.len() > Name::MAX || (literal.is_empty() && !prefix) {
            return Err(EXPECTED);
        }
        Ok(Self { literal: literal.to_owned(), prefix })
    }

    pub fn matches(&self, name: &str) -> bool {
        if self.prefix { name.starts_with(&self.literal) } else { name == self.literal }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.literal, if self.prefix { "*" } else { "" })
    }
}

pub(super) fn read(spec: &Field<'_>) -> Option<AccessPolicy> {
    let fields = spec.map();
    let list = |name: &'static str| {
        let Some(field) = fields.required(name) else { return Vec::new() };
        let items = field.items();
        if items.is_empty() {
            field.fault("expected at least one item");
        }
        items
    };
    let subjects = list("subjects").iter().filter_map(read_subject).collect();
    let models = list("models").iter().filter_map(|item| item.parse(Pattern::parse)).collect();
    let actions = [Action::Infer, Action::Metadata, Action::Admin].map(|action| (action.name(), action));
    let actions = list("actions").iter().filter_map(|item| item.choice(&actions)).collect();
    fields.finish();
    Some(AccessPolicy { subjects, models, actions })
}

fn read_subject(field: &Field<'_>) -> Option<Subject> {
    let fields = field.map();
    let tenant = fields.required("tenant").and_then(|field| field.parse(Name::parse));
    let clients = match fields.optional("client") {
        Some(field) => field.parse(Pattern::parse),
        None => Pattern::parse("*").ok(),
    };
    fields.finish();
    Some(Subject { tenant: tenant?, clients: clients? })
}
