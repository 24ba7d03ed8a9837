//! The call over REST with the binary tensor extension, as tritonclient sends it: a JSON head, then the raw values.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::{COLUMNS, DATATYPE, ID, INPUT, MODEL, OUTPUT, SCORES, VERSION, values};

pub const PATH: &str = "/v2/models/scorer/infer";
pub const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/octet-stream");
/// How many bytes of the body are JSON.
pub const HEAD_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The request's body: its JSON, and 112 bytes of values.
pub fn request() -> Bytes {
    body(&request_head(), COLUMNS)
}

pub fn request_head_length() -> HeaderValue {
    HeaderValue::from(request_head().to_string().len())
}

/// The answer's body: its JSON, and 208 bytes of values.
pub fn response() -> Bytes {
    body(&response_head(), SCORES)
}

pub fn response_head_length() -> HeaderValue {
    HeaderValue::from(response_head().to_string().len())
}

/// Whether it is the answer. A proxy may add parameters and write the JSON anew; the rest stays.
pub fn is_answer(head: &HeaderMap, body: &[u8]) -> bool {
    let length = head.get(HEAD_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let Some((json, raw)) = length.and_then(|length| body.split_at_checked(length)) else { return false };
    let Ok(answer) = serde_json::from_slice::<Value>(json) else { return false };
    contains(&answer, &response_head()) && raw == values(SCORES)
}

/// Whether all of `expected` is there; objects may hold more, lists and values may not.
fn contains(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            expected.iter().all(|(name, value)| found.get(name).is_some_and(|found| contains(found, value)))
        }
        (Value::Array(found), Value::Array(expected)) => {
            found.len() == expected.len() && found.iter().zip(expected).all(|(found, value)| contains(found, value))
        }
        (found, expected) => found == expected,
    }
}

fn request_head() -> Value {
    json!({
        "id": ID,
        "inputs": [{
            "name": INPUT,
            "shape": [1, COLUMNS],
            "datatype": DATATYPE,
            "parameters": { "binary_data_size": COLUMNS * 4 },
        }],
        "parameters": { "binary_data_output": true },
    })
}

fn response_head() -> Value {
    json!({
        "model_name": MODEL,
        "model_version": VERSION,
        "id": ID,
        "outputs": [{
            "name": OUTPUT,
            "datatype": DATATYPE,
            "shape": [1, SCORES],
            "parameters": { "binary_data_size": SCORES * 4 },
        }],
    })
}

fn body(head: &Value, columns: usize) -> Bytes {
    [head.to_string().as_bytes(), &values(columns)].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(length: usize) -> HeaderMap {
        HeaderMap::from_iter([(HEAD_LENGTH, HeaderValue::from(length))])
    }

    #[test]
    fn the_path_names_the_model() {
        assert_eq!(PATH, format!("/v2/models/{MODEL}/infer"));
    }

    #[test]
    fn the_values_come_last() {
        assert!(request().ends_with(&values(COLUMNS)) && response().ends_with(&values(SCORES)));
        let length: usize = request_head_length().to_str().unwrap().parse().unwrap();
        assert_eq!(length + COLUMNS * 4, request().len());
    }

    #[test]
    fn only_the_right_answer_passes() {
        let length = response_head().to_string().len();
        assert!(is_answer(&head(length), &response()));
        for at in 0..response().len() {
            let mut wrong = response().to_vec();
            wrong[at] ^= 0x40;
            assert!(!is_answer(&head(length), &wrong), "byte {at}");
        }
        assert!(!is_answer(&head(length), &response()[..300]));
        assert!(!is_answer(&head(10_000), &response()));
        assert!(!is_answer(&HeaderMap::new(), &response()));
        assert!(!is_answer(&head(0), b""));
    }

    #[test]
    fn an_added_parameter_is_no_fault() {
        let mut answer = response_head();
        answer["parameters"] = json!({ "spillway-region": "eu" });
        let length = answer.to_string().len();
        assert!(is_answer(&head(length), &body(&answer, SCORES)));
    }
}
