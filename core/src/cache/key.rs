//! The key of a result, and the feature rows that the result depends on.
//!
//! The rule: what can change an answer is in the key. A request's members are keyed unless a closed list
//! here says why they need not be; what nobody knows is keyed. Fields are length-prefixed, so that no two
//! requests share an encoding, and values are compared by their bits (NaN, -0.0).
//!
//! The order of inputs, outputs and parameters is not keyed: the protocol names them. So a stored answer
//! may have its outputs in another order than the request, and the id of another request.
//!
//! A row's dependency is a hash of the text that the change channel names the row by, so that a message
//! maps to results without being decoded. Two rows with one hash cost a result too many, never one too few.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use crate::feature::RowKey;
use crate::inference::{Entities, InferRequest, Parameter, Parameters, RequestedOutput, Tensor};
use crate::resource::Model;
use crate::snapshot::Snapshot;
use crate::units::Name;

/// A longer encoding is kept as its identity and a digest.
///
/// An entity's request has some 200 bytes, a row of 1,000 FP64 features 8 KB: those are kept whole.
pub const MOST_MATERIAL: usize = 16 << 10;

/// A result that depends on more rows is not stored: so many changes would rarely leave it standing.
pub const MOST_ROWS: usize = 1_024;

/// Parameters of a request that say when or in which form to answer, not what:
/// * `timeout`: how long it may take. Only whole answers are stored.
/// * `priority`: its place in queues. Answers degraded by class are not stored.
/// * `binary_data_output`: raw or JSON; stored answers are raw.
const UNKEYED_OF_REQUEST: &[&str] = &["timeout", "priority", "binary_data_output"];
/// Of an input: the length of its bytes, which are keyed themselves.
const UNKEYED_OF_INPUT: &[&str] = &["binary_data_size"];
/// Of an output: raw or JSON, as above.
const UNKEYED_OF_OUTPUT: &[&str] = &["binary_data"];

/// First byte of the material; another encoding takes other numbers.
const WHOLE: u8 = 1;
const DIGESTED: u8 = 2;
/// What the digest of a long encoding begins with: no material does.
const DOMAIN: &[u8] = b"spillway result\n";

/// What a result is filed under.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// SHA-256 of the material.
    pub hash: [u8; 32],
    /// The canonical encoding of all that is keyed; of a long one, the identity and a SHA-256 of the whole.
    ///
    /// Long tensors are hashed once, while they are encoded, and never copied. Two materials are equal only
    /// if their identities are, byte for byte, and the rest is or collides in a SHA-256 that does not
    /// depend on how [`Self::hash`] is made.
    pub material: Bytes,
}

/// What is keyed beside the request itself.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub tenant: &'a Name,
    pub model: &'a Name,
    /// The one that will answer, not the one asked for.
    pub version: &'a Name,
    /// Changes with the model's manifest and with what the tenant's policies say of it.
    pub policy_epoch: [u8; 32],
    /// Changes with the schema of the model's feature groups.
    pub feature_epoch: u64,
}

impl Key {
    pub fn of(identity: &Identity<'_>, request: &InferRequest) -> Result<Self, Uncacheable> {
        Self::hashed_by(identity, request, |material| Sha256::digest(material).into())
    }

    /// With another hash function: tests force collisions.
    pub fn hashed_by(
        identity: &Identity<'_>,
        request: &InferRequest,
        hash: impl FnOnce(&[u8]) -> [u8; 32],
    ) -> Result<Self, Uncacheable> {
        check(request)?;
        let material = Encoding::of(identity, request).finish();
        Ok(Self { hash: hash(&material), material })
    }

    /// Whether both are the key of the same request. The hash alone does not say.
    pub fn is(&self, other: &Self) -> bool {
        self == other
    }
}

/// The material holds entity ids and inputs, which are somebody's; they stay out of logs.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(")?;
        self.hash.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("…)")
    }
}

/// Why a result is neither looked up nor stored. Nobody's fault: the request goes to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Uncacheable {
    #[error("a request of a sequence depends on those before it")]
    Sequence,
    #[error("a request of a stream may have any number of answers")]
    Stream,
    #[error("the feature rows it depends on cannot be named")]
    UnknownRows,
    #[error("it depends on more than {MOST_ROWS} feature rows")]
    TooManyRows,
}

impl Uncacheable {
    /// A stable word, for metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::Sequence => "sequence",
            Self::Stream => "stream",
            Self::UnknownRows => "unknown-rows",
            Self::TooManyRows => "too-many-rows",
        }
    }
}

/// Triton's `sequence_id`, `sequence_start` and `sequence_end` give a model state, and its parameter for
/// streams asks for more than one answer.
fn check(request: &InferRequest) -> Result<(), Uncacheable> {
    for (name, _) in &request.parameters.0 {
        if name.starts_with("sequence_") {
            return Err(Uncacheable::Sequence);
        }
        if name == "triton_enable_empty_final_response" {
            return Err(Uncacheable::Stream);
        }
    }
    Ok(())
}

/// The canonical encoding as it grows: bytes, until they are too many; from then on their digest.
///
/// Numbers are 64-bit little-endian; texts, byte strings and lists come behind their length.
struct Encoding {
    kept: Vec<u8>,
    /// Bytes of the first byte and the identity, which stay.
    identity: usize,
    digest: Option<Sha256>,
}

impl Encoding {
    fn of(identity: &Identity<'_>, request: &InferRequest) -> Self {
        // Named member by member, so that a new one is decided on here.
        let Identity { tenant, model, version, policy_epoch, feature_epoch } = *identity;
        // The identity says which model and version; the id is only given back.
        let InferRequest { model: _, version: _, id: _, parameters, inputs, outputs } = request;
        let data: usize = inputs.iter().map(|input| input.data.len()).sum();
        let expected = if data > MOST_MATERIAL { 1_024 } else { 512 + data };
        let mut encoding = Self { kept: Vec::with_capacity(expected), identity: 0, digest: None };
        encoding.put(&[WHOLE]);
        encoding.text(tenant.as_str());
        encoding.text(model.as_str());
        encoding.text(version.as_str());
        encoding.put(&policy_epoch);
        encoding.number(feature_epoch);
        // Names are short: nothing has been digested yet.
        encoding.identity = encoding.kept.len();
        encoding.parameters(parameters, UNKEYED_OF_REQUEST);
        encoding.length(inputs.len());
        by_name(inputs, |input| &input.name, |input| encoding.input(input));
        encoding.length(outputs.len());
        by_name(outputs, |output| &output.name, |output| encoding.output(output));
        encoding
    }

    fn finish(mut self) -> Bytes {
        if let Some(digest) = self.digest {
            if let Some(form) = self.kept.first_mut() {
                *form = DIGESTED;
            }
            self.kept.extend_from_slice(&digest.finalize());
        }
        self.kept.into_boxed_slice().into()
    }

    fn input(&mut self, input: &Tensor) {
        let Tensor { name, datatype, shape, parameters, data } = input;
        self.text(name);
        self.text(datatype.name());
        self.length(shape.len());
        shape.iter().for_each(|size| self.put(&size.to_le_bytes()));
        self.parameters(parameters, UNKEYED_OF_INPUT);
        self.bytes(data);
    }

    fn output(&mut self, output: &RequestedOutput) {
        let RequestedOutput { name, parameters } = output;
        self.text(name);
        self.parameters(parameters, UNKEYED_OF_OUTPUT);
    }

    fn parameters(&mut self, parameters: &Parameters, unkeyed: &[&str]) {
        let keyed = |(name, _): &&(String, Parameter)| !unkeyed.contains(&name.as_str());
        self.length(parameters.0.iter().filter(keyed).count());
        let put = |parameter: &(String, Parameter)| {
            if keyed(&parameter) {
                self.parameter(&parameter.0, &parameter.1);
            }
        };
        by_name(&parameters.0, |(name, _)| name, put);
    }

    /// A value of another type is another value: the model sees the type.
    fn parameter(&mut self, name: &str, value: &Parameter) {
        self.text(name);
        match value {
            Parameter::Bool(value) => self.put(&[0, u8::from(*value)]),
            Parameter::Int(value) => {
                self.put(&[1]);
                self.put(&value.to_le_bytes());
            }
            Parameter::Uint(value) => {
                self.put(&[2]);
                self.number(*value);
            }
            Parameter::Double(value) => {
                self.put(&[3]);
                self.number(value.to_bits());
            }
            Parameter::Text(value) => {
                self.put(&[4]);
                self.text(value);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.put(bytes);
    }

    fn length(&mut self, length: usize) {
        self.number(length as u64);
    }

    fn number(&mut self, number: u64) {
        self.put(&number.to_le_bytes());
    }

    fn put(&mut self, bytes: &[u8]) {
        match &mut self.digest {
            Some(digest) => digest.update(bytes),
            None if self.kept.len() + bytes.len() <= MOST_MATERIAL => self.kept.extend_from_slice(bytes),
            None => {
                self.digest = Some(Sha256::new().chain_update(DOMAIN).chain_update(&self.kept).chain_update(bytes));
                self.kept.truncate(self.identity);
            }
        }
    }
}

/// Visits in the order of names; those of one name in the order they came.
fn by_name<T>(items: &[T], name: impl Fn(&T) -> &String, visit: impl FnMut(&T)) {
    if items.is_sorted_by(|a, b| name(a) <= name(b)) {
        return items.iter().for_each(visit);
    }
    let mut sorted: Vec<&T> = items.iter().collect();
    sorted.sort_by(|a, b| name(a).cmp(name(b)));
    sorted.into_iter().for_each(visit);
}

/// The feature rows that a result is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dependencies {
    /// A [`dependency`] for each row, sorted, each once.
    pub rows: Vec<u64>,
    /// The shortest `freshFor` of their groups; `None` where there are no rows.
    pub fresh_for: Option<Duration>,
}

/// What stands for a row, given its key's text: a result's row and a change message's alike.
pub fn dependency(row: &str) -> u64 {
    xxh3_64(row.as_bytes())
}

impl Dependencies {
    /// Those of a request that has passed the check against its model. An input that the client sent
    /// itself depends on no row.
    pub fn of(
        snapshot: &Snapshot,
        model: &Model,
        tenant: &Name,
        request: &InferRequest,
        entities: &Entities,
    ) -> Result<Self, Uncacheable> {
        let sent = |name: &str| request.inputs.iter().any(|input| input.name == name);
        let joined = model.inputs.iter().filter(|input| !sent(&input.tensor.name));
        let groups: BTreeSet<&Name> = joined.flat_map(|input| &input.features).map(|feature| &feature.group).collect();
        let count = groups.len().saturating_mul(entities.len());
        if count > MOST_ROWS {
            return Err(Uncacheable::TooManyRows);
        }
        let mut dependencies = Self { rows: Vec::with_capacity(count), fresh_for: None };
        let mut text = String::new();
        for name in groups {
            let group = snapshot.groups.get(name).ok_or(Uncacheable::UnknownRows)?;
            let shortest = dependencies.fresh_for.map_or(group.fresh_for, |shortest| shortest.min(group.fresh_for));
            dependencies.fresh_for = Some(shortest);
            for entity in entities.ids() {
                RowKey::write(&mut text, group.scope, tenant.as_str(), entity, name)
                    .map_err(|_| Uncacheable::UnknownRows)?;
                dependencies.rows.push(dependency(&text));
            }
        }
        dependencies.rows.sort_unstable();
        dependencies.rows.dedup();
        Ok(dependencies)
    }
}

#[cfg(test)]
#[path = "key_tests.rs"]
mod tests;
