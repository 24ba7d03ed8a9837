//! FeatureGroup: a schema'd row per entity, how fresh it must be and how it is read.

use std::collections::BTreeSet;
use std::time::Duration;

use super::reader::Field;
use crate::inference::Datatype;
use crate::units::{InvalidUnit, Name, parse_duration};

#[derive(Clone, Debug, PartialEq)]
pub struct FeatureGroup {
    pub scope: Scope,
    /// Stored with each value; a reader with another version treats the value as missing.
    pub schema_version: u16,
    pub fields: Vec<FieldDefinition>,
    /// From event time; past it a value is served as stale, and said to be.
    pub fresh_for: Duration,
    /// From event time; past it the stores drop the value.
    pub retain_for: Duration,
    pub consistency: Consistency,
}

/// Whose entity ids they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All tenants mean the same thing by an entity id.
    Shared,
    /// Each tenant has its own entities; no other tenant's request can read them.
    Tenant,
}

/// Read consistency in the durable tier (CQL names).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Consistency {
    LocalOne,
    LocalQuorum,
    Quorum,
}

#[derive(Clone, Debug, PartialEq)]
pub struct FieldDefinition {
    pub name: Name,
    /// Fixed width: every datatype but `BYTES`, `FP16` and `BF16`.
    pub datatype: Datatype,
    /// What a model that accepts defaults gets when the field is missing.
    pub default: Option<FieldValue>,
}

/// One value of a fixed-width field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FieldValue {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
}

impl FieldValue {
    /// Reads a text as the datatype wants it; the value fits without loss of range.
    pub fn parse(text: &str, datatype: Datatype) -> Result<Self, InvalidUnit> {
        let int = |min: i64, max: i64, expected| {
            text.parse().ok().filter(|value| (min..=max).contains(value)).map(Self::Int).ok_or(InvalidUnit(expected))
        };
        let uint = |max: u64, expected| {
            text.parse().ok().filter(|value| *value <= max).map(Self::Uint).ok_or(InvalidUnit(expected))
        };
        let float = |max: f64, expected| {
            let value = text.parse::<f64>().ok().filter(|value| value.is_finite() && value.abs() <= max);
            value.map(Self::Float).ok_or(InvalidUnit(expected))
        };
        match datatype {
            Datatype::Bool => match text {
                "true" | "1" => Ok(Self::Bool(true)),
                "false" | "0" => Ok(Self::Bool(false)),
                _ => Err(InvalidUnit("a BOOL: true or false")),
            },
            Datatype::Int8 => int(i8::MIN.into(), i8::MAX.into(), "an INT8: a whole number from -128 to 127"),
            Datatype::Int16 => int(i16::MIN.into(), i16::MAX.into(), "an INT16: a whole number from -32768 to 32767"),
            Datatype::Int32 => int(i32::MIN.into(), i32::MAX.into(), "an INT32: a whole number of 32 bits"),
            Datatype::Int64 => int(i64::MIN, i64::MAX, "an INT64: a whole number of 64 bits"),
            Datatype::Uint8 => uint(u8::MAX.into(), "a UINT8: a whole number from 0 to 255"),
            Datatype::Uint16 => uint(u16::MAX.into(), "a UINT16: a whole number from 0 to 65535"),
            Datatype::Uint32 => uint(u32::MAX.into(), "a UINT32: a whole number from 0 to 4294967295"),
            Datatype::Uint64 => uint(u64::MAX, "a UINT64: a whole number of 64 bits, not negative"),
            Datatype::Fp32 => float(f32::MAX.into(), "an FP32: a finite number"),
            Datatype::Fp64 => float(f64::MAX, "an FP64: a finite number"),
            Datatype::Fp16 | Datatype::Bf16 | Datatype::Bytes => Err(InvalidUnit("a fixed-width datatype")),
        }
    }
}

pub(super) fn read(spec: &Field<'_>) -> Option<FeatureGroup> {
    let fields = spec.map();
    let scope = fields
        .optional("scope")
        .map_or(Some(Scope::Shared), |field| field.choice(&[("shared", Scope::Shared), ("tenant", Scope::Tenant)]));
    let schema_version = fields.required("schemaVersion").and_then(|field| field.number(1..=u16::MAX.into()));
    let fresh_for = fields.required("freshFor").and_then(|field| field.parse(parse_duration));
    let retain_for = fields.required("retainFor").and_then(|field| {
        let retain = field.parse(parse_duration)?;
        // CQL stores a TTL of at most 20 years.
        if retain < fresh_for? || retain < Duration::from_secs(1) || retain > Duration::from_secs(20 * 365 * 86_400) {
            field.fault("expected at least freshFor, at least 1s and at most 7300d");
        }
        Some(retain)
    });
    let consistency = fields.optional("consistency").map_or(Some(Consistency::LocalOne), |field| {
        field.choice(&[
            ("local_one", Consistency::LocalOne),
            ("local_quorum", Consistency::LocalQuorum),
            ("quorum", Consistency::Quorum),
        ])
    });
    let mut definitions: Vec<FieldDefinition> = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some(list) = fields.required("fields") {
        for item in list.items() {
            let Some(definition) = read_field(&item) else { continue };
            if !seen.insert(definition.name.clone()) {
                item.fault(format!("the field '{}' is given twice", definition.name));
            }
            definitions.push(definition);
        }
        if definitions.is_empty() || definitions.len() > 256 {
            list.fault("expected 1 to 256 fields");
        }
    }
    fields.finish();
    Some(FeatureGroup {
        scope: scope?,
        schema_version: u16::try_from(schema_version?).ok()?,
        fields: definitions,
        fresh_for: fresh_for?,
        retain_for: retain_for?,
        consistency: consistency?,
    })
}

fn read_field(field: &Field<'_>) -> Option<FieldDefinition> {
    const FIXED: InvalidUnit = InvalidUnit("one of BOOL, INT8 to INT64, UINT8 to UINT64, FP32, FP64");
    let fields = field.map();
    let name = fields.required("name").and_then(|field| field.parse(Name::parse));
    let datatype = fields.required("datatype").and_then(|field| {
        field.parse(|text| {
            Datatype::parse(text)
                .filter(|datatype| !matches!(datatype, Datatype::Bytes | Datatype::Fp16 | Datatype::Bf16))
                .ok_or(FIXED)
        })
    });
    let default = fields
        .optional("default")
        .and_then(|field| datatype.and_then(|datatype| field.parse(|text| FieldValue::parse(text, datatype))));
    fields.finish();
    Some(FieldDefinition { name: name?, datatype: datatype?, default })
}
