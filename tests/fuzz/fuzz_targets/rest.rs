//! REST bodies, JSON and binary. The first two bytes say how long the JSON is; all ones: no binary data.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use spillway_core::inference::Limits;
use spillway_core::inference::json::decode_request;

fuzz_target!(|input: &[u8]| {
    let Some((length, body)) = input.split_first_chunk::<2>() else { return };
    let length = Some(u16::from_le_bytes(*length)).filter(|length| *length != u16::MAX).map(usize::from);
    if let Ok(request) = decode_request(Bytes::copy_from_slice(body), length, "m", "", &Limits::default()) {
        for input in request.inputs {
            input.check_length().expect("what leaves the decoder is well formed");
        }
    }
});
