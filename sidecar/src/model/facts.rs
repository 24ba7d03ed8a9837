//! What a model says about itself, held against its manifest when it is started.
//!
//! The rule: every request that the manifest accepts is one that the model accepts.

use spillway_core::inference::Datatype;
use spillway_core::resource::{Model, TensorSpec};

/// A model's inputs and outputs by its own account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub inputs: Vec<TensorFact>,
    pub outputs: Vec<TensorFact>,
    /// Whether every input listed must be sent. Triton's metadata does not tell optional ones apart.
    pub inputs_are_required: bool,
}

/// One input or output. The datatype is a text, as it may be none of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorFact {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<i64>,
}

/// The manifest promises what the model does not hold. The operator's fault; nothing to retry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error("{what} '{name}': the manifest says {manifest}, the model says {model}")]
    Differs { what: &'static str, name: String, manifest: String, model: String },
    #[error("{what} '{name}': the manifest says {manifest}, the model has only {present}")]
    Absent { what: &'static str, name: String, manifest: String, present: String },
    #[error("input '{name}': the model needs {model}, the manifest has no such input")]
    Undeclared { name: String, model: String },
}

impl Facts {
    pub fn check(&self, manifest: &Model) -> Result<(), Mismatch> {
        for input in &manifest.inputs {
            agree("input", &input.tensor, &self.inputs, |manifest, model| model == -1 || manifest == model)?;
        }
        for output in &manifest.outputs {
            agree("output", output, &self.outputs, |manifest, model| {
                manifest == -1 || model == -1 || manifest == model
            })?;
        }
        let undeclared =
            self.inputs.iter().find(|fact| self.inputs_are_required && manifest.input(&fact.name).is_none());
        undeclared.map_or(Ok(()), |fact| Err(Mismatch::Undeclared { name: fact.name.clone(), model: fact.to_string() }))
    }
}

impl std::fmt::Display for TensorFact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.datatype, self.shape)
    }
}

fn agree(
    what: &'static str,
    spec: &TensorSpec,
    facts: &[TensorFact],
    fits: impl Fn(i64, i64) -> bool,
) -> Result<(), Mismatch> {
    let Some(fact) = facts.iter().find(|fact| fact.name == spec.name) else {
        let present: Vec<&str> = facts.iter().map(|fact| fact.name.as_str()).collect();
        return Err(Mismatch::Absent {
            what,
            name: spec.name.clone(),
            manifest: spec.to_string(),
            present: present.join(", "),
        });
    };
    let same_datatype = Datatype::parse(&fact.datatype) == Some(spec.datatype);
    let same_rank = fact.shape.len() == spec.shape.len();
    if same_datatype && same_rank && spec.shape.iter().zip(&fact.shape).all(|(&manifest, &model)| fits(manifest, model))
    {
        return Ok(());
    }
    Err(Mismatch::Differs { what, name: spec.name.clone(), manifest: spec.to_string(), model: fact.to_string() })
}
