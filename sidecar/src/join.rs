//! Features into a request: which groups a model reads, and their rows as the inputs that bind them.
//!
//! The rule: an input that the client sent wins, and costs no look-up. One look-up serves all entities
//! and all groups of a request; its rows are written straight into the tensor that the model gets.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use spillway_core::feature::{Gather, Layout, MissingFields};
use spillway_core::inference::{InferRequest, Parameters, Tensor};
use spillway_core::resource::{MissingFeature, Model, TensorSpec};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use crate::features::{FeatureError, Features, Reach};

/// How one model's inputs are made of features; worked out before the first request.
pub struct Join {
    /// Those that the model reads, in name order.
    groups: Vec<Name>,
    inputs: Vec<Input>,
}

struct Input {
    tensor: TensorSpec,
    gather: Gather,
    /// Indices into the model's groups.
    groups: Vec<usize>,
}

/// What was joined, for the answer to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Joined {
    /// Elements that are declared defaults.
    pub defaults: usize,
    pub stale: bool,
    /// Event time of the oldest row used, in Unix microseconds.
    pub oldest_event_us: Option<i64>,
    /// As [`crate::features::Lookup`] says.
    pub sequence: Option<u64>,
    pub fresh_until_us: Option<i64>,
}

/// Whom to join for.
#[derive(Clone, Copy)]
pub struct For<'a> {
    pub tenant: &'a str,
    pub entities: &'a [Bytes],
    pub deadline: Instant,
    /// [`Reach::Near`]: declared defaults stand in for what is not there, whatever the model says else.
    pub reach: Reach,
}

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The look-up itself failed; whose fault says the source.
    #[error(transparent)]
    Features(#[from] FeatureError),
    /// The stores answered, and the features are not there: the caller's or the producer's fault.
    #[error("{0}")]
    Missing(MissingFields),
    /// The operator's fault: the settings name no store.
    #[error("this pod has no feature store; send the model's inputs in the request")]
    NoStore,
    /// The features are not there because no store answered. A retry may help.
    #[error("no feature store could answer; {0}")]
    Unreachable(MissingFields),
}

impl Join {
    /// `None` if the snapshot lacks a group or field that the model binds; a checked one does not.
    pub fn of(model: &Model, snapshot: &Snapshot) -> Option<Self> {
        let groups: Vec<Name> = model.groups().into_iter().cloned().collect();
        let known = groups.iter().map(|name| {
            let group = snapshot.groups.get(name)?;
            Some((name, &**group, Arc::new(Layout::of(group))))
        });
        let known = known.collect::<Option<Vec<_>>>()?;
        let inputs = model.inputs.iter().filter(|input| !input.features.is_empty()).map(|input| {
            let mut used: Vec<usize> = input
                .features
                .iter()
                .filter_map(|feature| groups.iter().position(|name| *name == feature.group))
                .collect();
            used.sort_unstable();
            used.dedup();
            Some(Input { tensor: input.tensor.clone(), gather: Gather::of(input, &known)?, groups: used })
        });
        let inputs = inputs.collect::<Option<Vec<_>>>()?;
        Some(Self { groups, inputs })
    }

    /// Adds the bound inputs that the request lacks.
    pub async fn fill(
        &self,
        request: &mut InferRequest,
        model: &Model,
        features: Option<&Features>,
        snapshot: &Snapshot,
        whom: For<'_>,
    ) -> Result<Joined, JoinError> {
        let sent = |name: &str| request.inputs.iter().any(|tensor| tensor.name == name);
        let lacking: Vec<&Input> = self.inputs.iter().filter(|input| !sent(&input.tensor.name)).collect();
        if lacking.is_empty() {
            return Ok(Joined::default());
        }
        let features = features.ok_or(JoinError::NoStore)?;
        // Where each of the model's groups lies in the look-up, which asks only for those needed.
        let mut place = vec![None; self.groups.len()];
        let mut asked = Vec::with_capacity(self.groups.len());
        for (index, name) in self.groups.iter().enumerate() {
            if lacking.iter().any(|input| input.groups.contains(&index)) {
                place[index] = Some(asked.len());
                asked.push(name);
            }
        }
        let For { tenant, entities, deadline, reach } = whom;
        let lookup = features.read_within(reach, snapshot, tenant, &asked, entities, deadline).await?;
        let missing = if reach == Reach::Near { MissingFeature::Default } else { model.missing_feature };
        let cell =
            |entity, group: usize| place.get(group).copied().flatten().and_then(|group| lookup.cell(entity, group));
        // Rows that no tier could speak of may be there: that is another fault than a row that is not.
        let unknown = lookup.unavailable() > 0;
        let (sequence, fresh_until_us) = (lookup.sequence, lookup.fresh_until_us);
        let mut joined = Joined { sequence, fresh_until_us, ..Joined::default() };
        for input in lacking {
            let mut data = BytesMut::with_capacity(input.gather.length(entities.len()));
            let gathered = input.gather.write(entities.len(), cell, missing, &mut data).map_err(|missing| {
                if unknown { JoinError::Unreachable(missing) } else { JoinError::Missing(missing) }
            })?;
            joined.defaults += gathered.defaults;
            joined.stale |= gathered.stale;
            joined.oldest_event_us = match (joined.oldest_event_us, gathered.oldest_event_us) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            request.inputs.push(input.tensor(entities.len(), data.freeze()));
        }
        Ok(joined)
    }
}

impl Input {
    fn tensor(&self, rows: usize, data: Bytes) -> Tensor {
        // A joined input has the shape [-1, columns]: the resource's reader sees to it.
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let shape = self.tensor.shape.iter().map(|&size| if size == -1 { rows } else { size }).collect();
        Tensor {
            name: self.tensor.name.clone(),
            datatype: self.tensor.datatype,
            shape,
            parameters: Parameters::default(),
            data,
        }
    }
}
