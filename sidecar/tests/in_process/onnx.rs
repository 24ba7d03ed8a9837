//! The embedded backend on the dev model: the same scores as the library that trained it.

use std::time::{Duration, Instant};

use crate::support::{MODEL, fp32, manifest, models, name, soon};
use spillway_core::inference::InferRequest;
use spillway_runtime::telemetry::TraceParent;
use spillway_sidecar::model::facts::Mismatch;
use spillway_sidecar::model::onnx::{Compute, LoadError, Onnx};
use spillway_sidecar::model::{Backend, Call, ModelError};

fn compute(runs: usize, most_waiting: i64) -> std::sync::Arc<Compute> {
    Compute::new(runs, most_waiting, prometheus_client::metrics::gauge::Gauge::default())
}

async fn load(compute: std::sync::Arc<Compute>) -> Onnx {
    Onnx::load(models().path(), &name(MODEL), &manifest(|text| text), &compute).await.unwrap()
}

fn request(shape: &[i64], values: &[f32]) -> InferRequest {
    InferRequest {
        model: MODEL.into(),
        version: "1".into(),
        id: "r-1".into(),
        inputs: vec![fp32("features", shape, values)],
        ..InferRequest::default()
    }
}

fn call() -> Call {
    Call { deadline: soon(), trace: TraceParent::none() }
}

#[tokio::test]
async fn scores_equal_those_of_the_training_library_for_any_batch_size() {
    let model = load(compute(1, 8)).await;
    let (cases, tolerance) = crate::support::expected();
    assert!(cases.len() >= 64 && tolerance <= 1e-5);
    for size in [1, 2, 7, 64] {
        for batch in cases.chunks(size) {
            let features: Vec<f32> = batch.iter().flat_map(|case| case.features.clone()).collect();
            let rows = i64::try_from(batch.len()).unwrap();
            let answer = model.infer(&request(&[rows, 9], &features), &call()).await.unwrap();
            assert_eq!((answer.id.as_str(), answer.version.as_str()), ("r-1", "1"));
            assert_eq!(answer.outputs[0].shape, [rows, 1]);
            for (case, score) in batch.iter().zip(crate::support::floats(&answer.outputs[0])) {
                assert!((case.score - score).abs() <= tolerance, "{}: {} and {score}", case.entity, case.score);
            }
        }
    }
}

#[tokio::test]
async fn a_manifest_that_differs_from_the_file_is_named_with_both_shapes() {
    let model = load(compute(1, 8)).await;
    let facts = model.facts(&name("1"), soon()).await.unwrap();
    assert_eq!(facts.check(&manifest(|text| text)), Ok(()));
    let wide = facts.check(&manifest(|text| text.replace("[-1, 9]", "[-1, 10]"))).unwrap_err();
    assert_eq!(wide.to_string(), "input 'features': the manifest says FP32 [-1, 10], the model says FP32 [-1, 9]");
    let double =
        facts.check(&manifest(|text| text.replace("FP32, shape: [-1, 1]", "FP64, shape: [-1, 1]"))).unwrap_err();
    assert_eq!(double.to_string(), "output 'score': the manifest says FP64 [-1, 1], the model says FP32 [-1, 1]");
    let renamed = facts.check(&manifest(|text| text.replace("name: features", "name: columns"))).unwrap_err();
    assert!(matches!(renamed, Mismatch::Absent { .. }), "{renamed}");
}

#[tokio::test]
async fn a_file_that_is_no_model_is_refused_at_load() {
    let folder = models();
    let file = folder.path().join(MODEL).join("1/model.onnx");
    std::fs::write(&file, b"not a model").unwrap();
    let fault = Onnx::load(folder.path(), &name(MODEL), &manifest(|text| text), &compute(1, 8)).await.unwrap_err();
    assert!(matches!(fault, LoadError::File { .. }), "{fault}");
    std::fs::remove_file(&file).unwrap();
    let fault = Onnx::load(folder.path(), &name(MODEL), &manifest(|text| text), &compute(1, 8)).await.unwrap_err();
    assert!(matches!(fault, LoadError::File { .. }), "{fault}");
}

#[tokio::test]
async fn t53_expired_work_is_not_computed() {
    let model = load(compute(1, 8)).await;
    let expired = Call { deadline: Instant::now() - Duration::from_millis(1), trace: TraceParent::none() };
    assert_eq!(model.infer(&request(&[1, 9], &[0.0; 9]), &expired).await.unwrap_err(), ModelError::DeadlineExceeded);
}

#[tokio::test]
async fn who_waits_for_a_place_waits_until_the_deadline_and_the_queue_is_bounded() {
    let none = load(compute(0, 1)).await;
    let request = request(&[1, 9], &[0.0; 9]);
    let short = Call { deadline: Instant::now() + Duration::from_millis(50), trace: TraceParent::none() };
    let (first, second) = tokio::join!(none.infer(&request, &short), none.infer(&request, &short));
    assert_eq!(first.unwrap_err(), ModelError::DeadlineExceeded);
    assert!(matches!(second.unwrap_err(), ModelError::Refused(_)));
}

#[tokio::test]
async fn a_shape_that_the_file_does_not_take_is_an_error_not_a_panic() {
    let model = load(compute(1, 8)).await;
    for (shape, values) in [(vec![1, 8], vec![0.0; 8]), (vec![9], vec![0.0; 9]), (vec![1, 3, 3], vec![0.0; 9])] {
        let fault = model.infer(&request(&shape, &values), &call()).await.unwrap_err();
        assert!(matches!(fault, ModelError::Failed(_)), "{shape:?}: {fault}");
    }
}
