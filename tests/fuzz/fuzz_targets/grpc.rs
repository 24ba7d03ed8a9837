//! Messages of the gRPC interface: a request that is accepted is the same after its frame.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use spillway_core::inference::Limits;
use spillway_runtime::oip;

fuzz_target!(|message: &[u8]| {
    let limits = Limits::default();
    if let Ok(request) = oip::decode_message(Bytes::copy_from_slice(message), &limits) {
        let frame = Bytes::from(oip::frame(&request).concat());
        let again = oip::decode_message(frame.slice(5..), &limits).expect("what was accepted is accepted again");
        // NaN parameters are not equal to themselves, their text is.
        assert_eq!(format!("{request:?}"), format!("{again:?}"));
    }
    let _ = oip::decode_response_message(Bytes::copy_from_slice(message), &limits);
});
