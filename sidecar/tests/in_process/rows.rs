//! Row i of an answer is entity i's, whatever the order, however often an entity comes, and whichever is missing.

use std::time::Duration;

use crate::support::Case;
use crate::support::pod::{Client, Pod, code, joined_model, resources, scores, text_parameter};
use spillway_core::inference::{Datatype, InferRequest, Parameters, Tensor};
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse};
use spillway_runtime::oip;
use tonic::{Code, Status};

const COLUMNS: usize = 9;
const KNOWN: u32 = 500;
/// The most entities of one request that the promise is made for.
const MOST: u32 = 512;

/// Numbers that look like chance and are the same in every run (SplitMix64, Steele, Lea and Flood 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((mixed ^ (mixed >> 31)) % u64::from(end)).unwrap()
    }
}

/// No two entities have a value in common; all are whole, so exact.
fn row(entity: u32) -> Vec<f32> {
    (0..9_u16).map(|column| (entity * 16) as f32 + f32::from(column) + 1.0).collect()
}

fn entity(number: u32) -> String {
    // Of different lengths, so that a wrong offset shows.
    format!("entity-{}{number}", "x".repeat(number as usize % 7))
}

fn request(model: &str, entities: &[u32]) -> ModelInferRequest {
    let mut data = Vec::new();
    for number in entities {
        let id = entity(*number);
        data.extend(u32::try_from(id.len()).unwrap().to_le_bytes());
        data.extend(id.as_bytes());
    }
    let ids = Tensor {
        name: "entity".into(),
        datatype: Datatype::Bytes,
        shape: vec![i64::try_from(entities.len()).unwrap()],
        parameters: Parameters::default(),
        data: data.into(),
    };
    oip::encode_request(&InferRequest { model: model.into(), inputs: vec![ids], ..InferRequest::default() })
}

async fn infer(client: &mut Client, model: &str, entities: &[u32]) -> Result<ModelInferResponse, Status> {
    client.model_infer(request(model, entities)).await.map(tonic::Response::into_inner)
}

fn assert_rows(answer: &ModelInferResponse, entities: &[u32], default: f32) {
    let found = scores(answer);
    assert_eq!(found.len(), entities.len() * COLUMNS);
    for (at, (entity, found)) in entities.iter().zip(found.chunks(COLUMNS)).enumerate() {
        let expected = if *entity < KNOWN { row(*entity) } else { vec![default; COLUMNS] };
        assert_eq!(found, expected, "row {at} of {} is entity {entity}'s", entities.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn t45_every_row_is_its_entitys_in_any_order_with_repeats_and_gaps() {
    let model = |name: &str, missing: &str| {
        joined_model(name, &format!("  backend: onnx\n  maxDeadline: 10s\n  missingFeature: {missing}"))
            .replace("name: score, datatype: FP32, shape: [-1, 1]", "name: score, datatype: FP32, shape: [-1, 9]")
            .replace("deadline: 2s", "deadline: 10s")
    };
    let resources = resources(&[model("refusing", "refuse"), model("defaulting", "default")].join("---\n"))
        .replace("datatype: FP32}\n", "datatype: FP32, default: 0.5}\n");
    let pod = Pod::start(&resources, "").await.ready().await;
    let cases: Vec<Case> =
        (0..KNOWN).map(|number| Case { entity: entity(number), features: row(number), score: 0.0 }).collect();
    for batch in cases.chunks(250) {
        pod.put(batch, Duration::ZERO).await;
    }
    let mut gateway = pod.gateway().await;
    let mut dice = Dice(7);
    for round in 0..24_u32 {
        // The whole size first, while nothing is in memory; then any.
        let size = if round % 3 == 0 { MOST } else { 1 + dice.below(MOST) };
        let mut entities: Vec<u32> = (0..size).map(|_| dice.below(KNOWN)).collect();
        assert_rows(&infer(&mut gateway, "refusing", &entities).await.unwrap(), &entities, f32::NAN);
        let gap = dice.below(size) as usize;
        entities[gap] = KNOWN + round;
        let status = infer(&mut gateway, "refusing", &entities).await.unwrap_err();
        assert_eq!((status.code(), code(&status)), (Code::FailedPrecondition, "missing-feature"));
        let answer = infer(&mut gateway, "defaulting", &entities).await.unwrap();
        assert_eq!(text_parameter(&answer, "spillway-degraded"), Some("1 default-feature"));
        assert_rows(&answer, &entities, 0.5);
    }
}
