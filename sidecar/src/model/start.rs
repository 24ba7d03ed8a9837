//! Starting a model: loaded or connected, held against its manifest, warmed up.
//!
//! The rule: what [`Backends::start`] gives has answered as its manifest promises.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_core::inference::check;
use spillway_core::inference::synthetic::synthetic;
use spillway_core::resource::{self, Model};
use spillway_core::units::Name;
use spillway_runtime::telemetry::TraceParent;

use super::facts::Mismatch;
use super::onnx::{Compute, LoadError, Onnx};
use super::triton::Server;
use super::{Backend, Call, ModelError};

/// How long a model may take to say whether it is there and what it takes.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// First runs compile, allocate and load; they may take far longer than any request.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// Where models come from.
pub struct Backends {
    /// Triton's repository layout: `<models>/<model>/<version>/model.onnx`.
    pub models: Option<PathBuf>,
    pub triton: Option<Server>,
    /// Where those of the backend onnx compute.
    pub compute: Arc<Compute>,
}

/// Why a model is not served. The operator's fault, or the model server's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotServed {
    #[error("the settings name no folder of models, which the backend onnx needs")]
    NoFolder,
    #[error("the settings name no Triton server, which the backend triton needs")]
    NoTriton,
    #[error("the snapshot lacks a feature that the model binds")]
    Features,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("version '{version}': {mismatch}")]
    Mismatch { version: Name, mismatch: Mismatch },
    #[error("version '{version}': {error}")]
    Model { version: Name, error: ModelError },
    #[error("version '{version}': the warm-up was not answered: {error}")]
    WarmUp { version: Name, error: ModelError },
}

impl NotServed {
    /// Whether it may pass by itself.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::NoFolder | Self::NoTriton | Self::Features | Self::Load(_) | Self::Mismatch { .. } => false,
            Self::Model { error, .. } | Self::WarmUp { error, .. } => error.may_pass(),
        }
    }
}

impl Backends {
    /// Loads or connects, holds the model's facts against the manifest, warms up.
    pub(super) async fn start(&self, name: &Name, manifest: &Arc<Model>) -> Result<Arc<dyn Backend>, NotServed> {
        let backend: Arc<dyn Backend> = match manifest.backend {
            resource::Backend::Onnx => {
                let folder = self.models.as_deref().ok_or(NotServed::NoFolder)?;
                Arc::new(Onnx::load(folder, name, manifest, &self.compute).await?)
            }
            resource::Backend::Triton => Arc::new(self.triton.as_ref().ok_or(NotServed::NoTriton)?.model(name)),
        };
        for version in &manifest.versions {
            let model = |error| NotServed::Model { version: version.clone(), error };
            let deadline = Instant::now() + PROBE_TIMEOUT;
            backend.ready(version, deadline).await.map_err(model)?;
            let facts = backend.facts(version, deadline).await.map_err(model)?;
            facts.check(manifest).map_err(|mismatch| NotServed::Mismatch { version: version.clone(), mismatch })?;
            warm_up(&*backend, name, version, manifest)
                .await
                .map_err(|error| NotServed::WarmUp { version: version.clone(), error })?;
        }
        Ok(backend)
    }
}

async fn warm_up(backend: &dyn Backend, name: &Name, version: &Name, manifest: &Model) -> Result<(), ModelError> {
    let request = synthetic(name.as_str(), version.as_str(), "warm-up", manifest)
        .ok_or_else(|| ModelError::Rejected("a tensor of the warm-up would be too large".into()))?;
    for _ in 0..manifest.warm_up.requests {
        let call = Call { deadline: Instant::now() + WARM_UP_TIMEOUT, trace: TraceParent::none() };
        let answer = backend.infer(&request, &call).await?;
        let checked = check::check_answer(manifest, &request, &answer, None);
        checked.map_err(|fault| ModelError::BadAnswer(fault.to_string()))?;
    }
    Ok(())
}
