//! Reads the fields of a node and collects every fault instead of stopping at the first.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use super::yaml::{Node, Value};
use crate::units::InvalidUnit;

/// One thing that is wrong in a resource, for the operator who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub line: usize,
    /// `kind/name`, as far as it could be read.
    pub resource: String,
    /// Dotted path, such as `spec.inputs[0].shape`.
    pub field: String,
    /// What is wrong and what is expected.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.resource, self.field, self.problem)
    }
}

/// Where the faults of one resource are gathered.
#[derive(Debug)]
pub struct Faults {
    resource: String,
    found: RefCell<Vec<Fault>>,
}

impl Faults {
    pub fn of(resource: String) -> Self {
        Self { resource, found: RefCell::default() }
    }

    pub fn add(&self, line: usize, field: &str, problem: impl Into<String>) {
        let fault = Fault { line, resource: self.resource.clone(), field: field.to_owned(), problem: problem.into() };
        self.found.borrow_mut().push(fault);
    }

    pub fn into_vec(self) -> Vec<Fault> {
        self.found.into_inner()
    }

    pub fn is_empty(&self) -> bool {
        self.found.borrow().is_empty()
    }
}

/// One node and the way to it.
#[derive(Clone)]
pub struct Field<'a> {
    pub path: String,
    pub node: &'a Node,
    faults: &'a Faults,
}

impl<'a> Field<'a> {
    pub fn root(path: &str, node: &'a Node, faults: &'a Faults) -> Self {
        Self { path: path.to_owned(), node, faults }
    }

    pub fn fault(&self, problem: impl Into<String>) {
        self.faults.add(self.node.line, &self.path, problem);
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Scalar(text) => Some(text),
            _ => {
                self.fault(format!("expected a single value, found {}", self.node.what()));
                None
            }
        }
    }

    /// A scalar that `parse` accepts.
    pub fn parse<T>(&self, parse: impl FnOnce(&str) -> Result<T, InvalidUnit>) -> Option<T> {
        let text = self.text()?;
        parse(text).map_err(|fault| self.fault(format!("'{}' is not valid: {fault}", clipped(text)))).ok()
    }

    /// A whole number within bounds.
    pub fn number(&self, bounds: std::ops::RangeInclusive<i64>) -> Option<i64> {
        let text = self.text()?;
        let number = text.parse().ok().filter(|number| bounds.contains(number));
        if number.is_none() {
            let (from, to) = bounds.into_inner();
            self.fault(format!("'{}' is not valid: expected a whole number from {from} to {to}", clipped(text)));
        }
        number
    }

    /// One of a closed set of words.
    pub fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            self.fault(format!("'{}' is not valid: expected {}", clipped(text), words.join(" or ")));
        }
        found
    }

    /// The items of a list.
    pub fn items(&self) -> Vec<Field<'a>> {
        match &self.node.value {
            Value::List(items) => items
                .iter()
                .enumerate()
                .map(|(index, node)| Field { path: format!("{}[{index}]", self.path), node, faults: self.faults })
                .collect(),
            _ => {
                self.fault(format!("expected a list, found {}", self.node.what()));
                Vec::new()
            }
        }
    }

    /// The entries of a map whose keys are the operator's own names.
    pub fn entries(&self) -> Vec<(String, Field<'a>)> {
        let Value::Map(entries) = &self.node.value else {
            self.fault(format!("expected a map, found {}", self.node.what()));
            return Vec::new();
        };
        let field =
            |name: &str, node| Field { path: format!("{}.{}", self.path, clipped(name)), node, faults: self.faults };
        entries.iter().map(|(key, node)| (key.text.clone(), field(&key.text, node))).collect()
    }

    /// The fields of a map.
    pub fn map(&self) -> Fields<'a> {
        let entries = match &self.node.value {
            Value::Map(entries) => entries.iter().map(|(key, node)| (key.text.as_str(), key.line, node)).collect(),
            Value::Null => Vec::new(),
            _ => {
                self.fault(format!("expected a map, found {}", self.node.what()));
                Vec::new()
            }
        };
        Fields {
            path: self.path.clone(),
            line: self.node.line,
            entries,
            known: RefCell::default(),
            faults: self.faults,
        }
    }
}

/// The fields of one map. Those never asked for are unknown keys: call [`Fields::finish`].
pub struct Fields<'a> {
    path: String,
    line: usize,
    entries: Vec<(&'a str, usize, &'a Node)>,
    known: RefCell<BTreeSet<&'static str>>,
    faults: &'a Faults,
}

impl<'a> Fields<'a> {
    pub fn optional(&self, name: &'static str) -> Option<Field<'a>> {
        self.known.borrow_mut().insert(name);
        let (_, _, node) = self.entries.iter().find(|(key, _, _)| *key == name)?;
        if node.value == Value::Null {
            return None;
        }
        Some(Field { path: self.path_of(name), node, faults: self.faults })
    }

    pub fn required(&self, name: &'static str) -> Option<Field<'a>> {
        let field = self.optional(name);
        if field.is_none() {
            self.faults.add(self.line, &self.path_of(name), "is missing and required");
        }
        field
    }

    /// Reports the keys that nobody asked for.
    pub fn finish(self) {
        let known = self.known.borrow();
        for (key, line, _) in self.entries.iter().filter(|(key, _, _)| !known.contains(key)) {
            let known: Vec<&str> = known.iter().copied().collect();
            let problem = format!("unknown key, expected one of {}", known.join(", "));
            self.faults.add(*line, &self.path_of(&clipped(key)), problem);
        }
    }

    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

/// An operator's text within a message: one line, not too long.
fn clipped(text: &str) -> String {
    let clean: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().count() > 80 { clean + "…" } else { clean }
}
