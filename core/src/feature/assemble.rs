//! Rows into a tensor: a gather by columns that was worked out before the request came.
//!
//! The rule: a field that is missing is the model's declared default, or a refusal, never a silent zero.

use bytes::{BufMut, BytesMut};

use super::layout::{Layout, Row, ValueBytes, value_bytes};
use crate::resource::{FeatureGroup, FeatureRef, InputBinding, MissingFeature};
use crate::units::Name;

/// At most this many missing fields are named; all of them are counted.
pub const NAMED: usize = 8;

/// One row of one group as a look-up found it.
#[derive(Clone, Copy, Debug)]
pub struct Cell<'a> {
    pub row: &'a Row,
    pub stale: bool,
}

/// How one input tensor `[N, columns]` is made out of the rows of N entities.
#[derive(Clone, Debug)]
pub struct Gather {
    columns: Vec<Column>,
    /// Bytes of one tensor row.
    width: usize,
}

#[derive(Clone, Debug)]
struct Column {
    feature: FeatureRef,
    /// Index into the groups that the caller looks up.
    group: usize,
    layout: std::sync::Arc<Layout>,
    field: usize,
    default: Option<ValueBytes>,
}

/// What the tensor was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gathered {
    /// Elements that are declared defaults.
    pub defaults: usize,
    /// Whether any row used was past its freshness.
    pub stale: bool,
    /// Event time of the oldest row used, in Unix microseconds.
    pub oldest_event_us: Option<i64>,
}

/// Fields that are missing and have, or may use, no default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MissingFields {
    pub count: usize,
    /// The first few: the index of the entity, and which field.
    pub first: Vec<(usize, FeatureRef)>,
}

impl Gather {
    /// `groups` are those that the caller looks up, in its order. `None` if the input binds no features,
    /// or one of them is not in `groups`: a checked Snapshot has no such input.
    pub fn of(input: &InputBinding, groups: &[(&Name, &FeatureGroup, std::sync::Arc<Layout>)]) -> Option<Self> {
        let width = input.tensor.datatype.width()?;
        let columns = input.features.iter().map(|feature| {
            let group = groups.iter().position(|(name, _, _)| **name == feature.group)?;
            let (_, definition, layout) = &groups[group];
            let field = layout.index_of(feature.field.as_str())?;
            let definition = definition.fields.get(field)?;
            if definition.datatype != input.tensor.datatype {
                return None;
            }
            let default = definition.default.and_then(|value| value_bytes(value, definition.datatype));
            Some(Column { feature: feature.clone(), group, layout: layout.clone(), field, default })
        });
        let columns = columns.collect::<Option<Vec<_>>>()?;
        (!columns.is_empty()).then(|| Self { width: columns.len() * width, columns })
    }

    /// Bytes of the tensor for so many entities.
    pub fn length(&self, entities: usize) -> usize {
        self.width.saturating_mul(entities)
    }

    /// Appends row after row to `tensor`. `cell(entity, group)` is what the look-up found.
    ///
    /// On an error `tensor` is as it was.
    pub fn write<'a>(
        &self,
        entities: usize,
        cell: impl Fn(usize, usize) -> Option<Cell<'a>>,
        missing: MissingFeature,
        tensor: &mut BytesMut,
    ) -> Result<Gathered, MissingFields> {
        let before = tensor.len();
        tensor.reserve(self.length(entities));
        let mut gathered = Gathered::default();
        let mut lacking = MissingFields::default();
        for entity in 0..entities {
            for column in &self.columns {
                let cell = cell(entity, column.group);
                if let Some(bytes) = cell.and_then(|cell| column.layout.field(cell.row, column.field)) {
                    tensor.put_slice(bytes);
                } else if let (Some(default), MissingFeature::Default) = (&column.default, missing) {
                    tensor.put_slice(default.as_ref());
                    gathered.defaults += 1;
                    continue;
                } else {
                    lacking.count += 1;
                    if lacking.first.len() < NAMED {
                        lacking.first.push((entity, column.feature.clone()));
                    }
                    continue;
                }
                if let Some(cell) = cell {
                    gathered.stale |= cell.stale;
                    let event = cell.row.event_us();
                    gathered.oldest_event_us = Some(gathered.oldest_event_us.map_or(event, |oldest| oldest.min(event)));
                }
            }
        }
        if lacking.count > 0 {
            tensor.truncate(before);
            return Err(lacking);
        }
        Ok(gathered)
    }
}

impl std::fmt::Display for MissingFields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named: Vec<String> = self
            .first
            .iter()
            .map(|(entity, feature)| format!("{}.{} of row {entity}", feature.group, feature.field))
            .collect();
        write!(f, "missing: {}", named.join(", "))?;
        let more = self.count.saturating_sub(self.first.len());
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

#[cfg(test)]
#[path = "assemble_tests.rs"]
mod tests;
