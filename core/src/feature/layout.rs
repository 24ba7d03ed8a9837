//! Where each field of a group lies in a stored row.
//!
//! ```text
//! format   schema version   fingerprint   event time (µs)   null bitmap      values
//! u8       u16 BE           u64 BE        i64 BE            ⌈fields/8⌉ bytes fixed width, little-endian
//! ```
//!
//! The header is big-endian, so that of two rows of one event time the one with the higher schema
//! version also compares higher byte by byte, which is how tiers break that tie. (Cassandra first looks
//! at which of the two is to expire later, to the second.) A deleted row is a header alone, with zeros
//! for schema version and fingerprint. Bit `i % 8` of bitmap byte `i / 8` says that field `i` is null;
//! its value bytes are zero.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

use super::freshness::check_event_time;
use crate::inference::Datatype;
use crate::resource::{FeatureGroup, FieldValue};
use crate::units::Name;

const VALUE: u8 = 0xF1;
const DELETED: u8 = 0xF0;
const HEADER: usize = 19;

/// A group's fields as offsets.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub schema_version: u16,
    /// Of field names, datatypes, their order and the schema version.
    pub fingerprint: u64,
    fields: Vec<Slot>,
    length: usize,
}

#[derive(Clone, Debug, PartialEq)]
struct Slot {
    name: Name,
    datatype: Datatype,
    offset: usize,
    width: usize,
}

impl Layout {
    pub fn of(group: &FeatureGroup) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&group.schema_version.to_le_bytes());
        let mut offset = HEADER + group.fields.len().div_ceil(8);
        let mut fields = Vec::with_capacity(group.fields.len());
        for field in &group.fields {
            let text = [field.name.as_str(), field.datatype.name()];
            for part in text {
                hash.update(&(part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
            // A checked group has fixed-width fields only; a zero width can hold no value and reads as null.
            let width = field.datatype.width().unwrap_or(0);
            fields.push(Slot { name: field.name.clone(), datatype: field.datatype, offset, width });
            offset += width;
        }
        Self { schema_version: group.schema_version, fingerprint: hash.digest(), fields, length: offset }
    }

    /// Bytes of a stored row.
    pub fn row_length(&self) -> usize {
        self.length
    }

    /// The index of a field by name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|field| field.name.as_str() == name)
    }

    /// Name and datatype of each field, in order.
    pub fn fields(&self) -> impl ExactSizeIterator<Item = (&Name, Datatype)> {
        self.fields.iter().map(|field| (&field.name, field.datatype))
    }

    /// The stored form of one event. `values` are in field order; `None` is null.
    pub fn encode(&self, event_us: i64, values: &[Option<FieldValue>]) -> Result<Row, InvalidRow> {
        if values.len() != self.fields.len() {
            return Err(InvalidRow::Count { expected: self.fields.len(), found: values.len() });
        }
        let mut row = BytesMut::zeroed(self.length);
        let mut header = &mut row[..HEADER];
        header.put_u8(VALUE);
        header.put_u16(self.schema_version);
        header.put_u64(self.fingerprint);
        header.put_i64(event_us);
        for (index, (slot, value)) in self.fields.iter().zip(values).enumerate() {
            match value {
                None => row[HEADER + index / 8] |= 1 << (index % 8),
                Some(value) => {
                    let bytes = value_bytes(*value, slot.datatype).filter(|bytes| bytes.as_ref().len() == slot.width);
                    let bytes =
                        bytes.ok_or_else(|| InvalidRow::Value { field: slot.name.clone(), datatype: slot.datatype })?;
                    row[slot.offset..slot.offset + slot.width].copy_from_slice(bytes.as_ref());
                }
            }
        }
        Ok(Row(row.freeze()))
    }

    /// Reads what a store gave. Bytes of another schema or length are never read as values.
    pub fn decode(&self, bytes: Bytes, now_us: i64) -> Result<Stored, Missing> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Missing::Length)?;
        let event_us = event_us(header);
        check_event_time(event_us, now_us).map_err(|_| Missing::Event)?;
        match header[0] {
            DELETED if bytes.len() == HEADER => Ok(Stored::Deleted { event_us }),
            VALUE if fingerprint(header) != self.fingerprint => Err(Missing::Schema),
            VALUE if bytes.len() == self.length => Ok(Stored::Row(Row(bytes))),
            VALUE | DELETED => Err(Missing::Length),
            _ => Err(Missing::Format),
        }
    }

    /// Whether the row was written with this layout.
    pub fn owns(&self, row: &Row) -> bool {
        row.fingerprint() == self.fingerprint
    }

    /// The little-endian bytes of a field; `None` if it is null or the row is of another layout.
    pub fn field<'a>(&self, row: &'a Row, index: usize) -> Option<&'a [u8]> {
        let slot = self.fields.get(index)?;
        let null = row.0.get(HEADER + index / 8)? >> (index % 8) & 1 == 1;
        if null || slot.width == 0 || !self.owns(row) {
            return None;
        }
        row.0.get(slot.offset..slot.offset + slot.width)
    }

    /// The value of a field; `None` as for [`Self::field`].
    pub fn value(&self, row: &Row, index: usize) -> Option<FieldValue> {
        let bytes = self.field(row, index)?;
        Some(match self.fields.get(index)?.datatype {
            Datatype::Bool => FieldValue::Bool(*bytes.first()? != 0),
            Datatype::Int8 => FieldValue::Int(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Int16 => FieldValue::Int(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Int32 => FieldValue::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Int64 => FieldValue::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
            Datatype::Uint8 => FieldValue::Uint((*bytes.first()?).into()),
            Datatype::Uint16 => FieldValue::Uint(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Uint32 => FieldValue::Uint(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Uint64 => FieldValue::Uint(u64::from_le_bytes(bytes.try_into().ok()?)),
            Datatype::Fp32 => FieldValue::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            Datatype::Fp64 => FieldValue::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            Datatype::Fp16 | Datatype::Bf16 | Datatype::Bytes => return None,
        })
    }
}

/// One entity's stored row: of the length that its fingerprint's layout names.
#[derive(Clone, PartialEq, Eq)]
pub struct Row(Bytes);

impl Row {
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// Unix microseconds.
    pub fn event_us(&self) -> i64 {
        self.0.first_chunk().map_or(0, event_us)
    }

    pub fn fingerprint(&self) -> u64 {
        self.0.first_chunk().map_or(0, fingerprint)
    }

    /// The same row in a buffer of its own, so that a cached row does not keep a whole reply alive.
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }
}

/// Feature values are somebody's; they stay out of logs.
impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Row({} bytes, event {})", self.0.len(), self.event_us())
    }
}

/// What a store holds under a key: the last event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    Row(Row),
    /// Kept until `retainFor` ends, so that an older event that comes late does not bring the row back.
    Deleted {
        event_us: i64,
    },
}

impl Stored {
    pub fn event_us(&self) -> i64 {
        match self {
            Self::Row(row) => row.event_us(),
            Self::Deleted { event_us } => *event_us,
        }
    }

    /// The bytes that byte-wise tiers keep.
    pub fn bytes(&self) -> Bytes {
        match self {
            Self::Row(row) => row.0.clone(),
            Self::Deleted { event_us } => {
                let mut header = BytesMut::zeroed(HEADER);
                header[0] = DELETED;
                header[HEADER - 8..].copy_from_slice(&event_us.to_be_bytes());
                header.freeze()
            }
        }
    }

    /// Whether this event replaces the other: the later one wins; at the same microsecond a deletion
    /// wins over a row, and of two rows the one whose bytes compare higher (Cassandra's own rule, which
    /// SQLite and Redis follow here). A total order, so any order of arrival ends in the same row.
    pub fn supersedes(&self, other: &Self) -> bool {
        let order = self.event_us().cmp(&other.event_us()).then_with(|| match (self, other) {
            (Self::Row(new), Self::Row(old)) => new.0.cmp(&old.0),
            (Self::Deleted { .. }, Self::Row(_)) => std::cmp::Ordering::Greater,
            (Self::Row(_), Self::Deleted { .. }) => std::cmp::Ordering::Less,
            (Self::Deleted { .. }, Self::Deleted { .. }) => std::cmp::Ordering::Equal,
        });
        order.is_gt()
    }
}

/// Why stored bytes are no row of this group. The store, or a writer of another schema, is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Missing {
    /// Not our format.
    Format,
    /// Written with other fields or another schema version.
    Schema,
    /// Not of the length that its format has.
    Length,
    /// An event time that no producer can have written.
    Event,
}

impl Missing {
    /// The word for metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Schema => "schema",
            Self::Length => "length",
            Self::Event => "event_time",
        }
    }
}

/// The producer's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRow {
    #[error("the group has {expected} fields, the row {found}")]
    Count { expected: usize, found: usize },
    #[error("field '{field}': the value is no {datatype}")]
    Value { field: Name, datatype: Datatype },
}

fn fingerprint(header: &[u8; HEADER]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[3..11]);
    u64::from_be_bytes(bytes)
}

fn event_us(header: &[u8; HEADER]) -> i64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[11..19]);
    i64::from_be_bytes(bytes)
}

/// The little-endian bytes of a value as a datatype wants it; `None` if it does not fit. Whole numbers
/// are accepted for floating point where they are exact.
pub(crate) fn value_bytes(value: FieldValue, datatype: Datatype) -> Option<ValueBytes> {
    let signed = || match value {
        FieldValue::Int(value) => Some(value),
        FieldValue::Uint(value) => i64::try_from(value).ok(),
        FieldValue::Bool(_) | FieldValue::Float(_) => None,
    };
    let unsigned = || match value {
        FieldValue::Uint(value) => Some(value),
        FieldValue::Int(value) => u64::try_from(value).ok(),
        FieldValue::Bool(_) | FieldValue::Float(_) => None,
    };
    // `exact`: the largest whole number up to which all of them have a floating-point form.
    let float = |max: f64, exact: u64| match value {
        FieldValue::Float(value) => Some(value).filter(|value| value.is_finite() && value.abs() <= max),
        FieldValue::Int(value) => (value.unsigned_abs() <= exact).then_some(value as f64),
        FieldValue::Uint(value) => (value <= exact).then_some(value as f64),
        FieldValue::Bool(_) => None,
    };
    Some(match datatype {
        Datatype::Bool => match value {
            FieldValue::Bool(value) => ValueBytes::new([u8::from(value)]),
            _ => return None,
        },
        Datatype::Int8 => ValueBytes::new(i8::try_from(signed()?).ok()?.to_le_bytes()),
        Datatype::Int16 => ValueBytes::new(i16::try_from(signed()?).ok()?.to_le_bytes()),
        Datatype::Int32 => ValueBytes::new(i32::try_from(signed()?).ok()?.to_le_bytes()),
        Datatype::Int64 => ValueBytes::new(signed()?.to_le_bytes()),
        Datatype::Uint8 => ValueBytes::new(u8::try_from(unsigned()?).ok()?.to_le_bytes()),
        Datatype::Uint16 => ValueBytes::new(u16::try_from(unsigned()?).ok()?.to_le_bytes()),
        Datatype::Uint32 => ValueBytes::new(u32::try_from(unsigned()?).ok()?.to_le_bytes()),
        Datatype::Uint64 => ValueBytes::new(unsigned()?.to_le_bytes()),
        Datatype::Fp32 => ValueBytes::new((float(f32::MAX.into(), 1 << 24)? as f32).to_le_bytes()),
        Datatype::Fp64 => ValueBytes::new(float(f64::MAX, 1 << 53)?.to_le_bytes()),
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Bytes => return None,
    })
}

/// At most 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ValueBytes {
    bytes: [u8; 8],
    length: usize,
}

impl ValueBytes {
    fn new<const N: usize>(value: [u8; N]) -> Self {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&value);
        Self { bytes, length: N }
    }
}

impl AsRef<[u8]> for ValueBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
