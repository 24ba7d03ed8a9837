//! The small documents of the REST interface.

use bytes::Bytes;
use serde_json::{Value, json};

use super::super::{ModelMetadata, ServerMetadata};
use crate::resource::TensorSpec;

/// `GET /v2`.
pub fn server_metadata(server: &ServerMetadata) -> Bytes {
    document(&json!({ "name": server.name, "version": server.version, "extensions": server.extensions }))
}

/// `GET /v2/models/MODEL[/versions/VERSION]`.
pub fn model_metadata(model: &ModelMetadata) -> Bytes {
    let tensors = |specs: &[TensorSpec]| -> Vec<Value> {
        let tensor =
            |spec: &TensorSpec| json!({ "name": spec.name, "datatype": spec.datatype.name(), "shape": spec.shape });
        specs.iter().map(tensor).collect()
    };
    document(&json!({
        "name": model.name,
        "versions": model.versions,
        "platform": model.platform,
        "inputs": tensors(&model.inputs),
        "outputs": tensors(&model.outputs),
    }))
}

/// `GET /v2/health/live`.
pub fn live(live: bool) -> Bytes {
    document(&json!({ "live": live }))
}

/// `GET /v2/health/ready`.
pub fn ready(ready: bool) -> Bytes {
    document(&json!({ "ready": ready }))
}

/// `GET /v2/models/MODEL[/versions/VERSION]/ready`.
pub fn model_ready(name: &str, ready: bool) -> Bytes {
    document(&json!({ "name": name, "ready": ready }))
}

/// The body of every refusal.
pub fn error(message: &str) -> Bytes {
    document(&json!({ "error": message }))
}

fn document(value: &Value) -> Bytes {
    Bytes::from(value.to_string())
}
