use hickory_proto::op::Message;
use proptest::prelude::*;

use super::*;

/// A head with these counts, and a body.
fn message(flags: u16, counts: [u16; 4], body: &[u8]) -> Vec<u8> {
    let mut message = vec![0x12, 0x34];
    for word in [&[flags][..], &counts].concat() {
        message.extend_from_slice(&word.to_be_bytes());
    }
    message.extend_from_slice(body);
    message
}

const QUESTION: &[u8] = b"\x05InFer\x07example\x03com\x00\x00\x01\x00\x01";

fn with_opt(time: [u8; 4], options: &[u8]) -> Vec<u8> {
    let mut body = QUESTION.to_vec();
    body.extend_from_slice(b"\x00\x00\x29\x10\x00");
    body.extend_from_slice(&time);
    body.extend_from_slice(&(options.len() as u16).to_be_bytes());
    body.extend_from_slice(options);
    message(0x0100, [1, 0, 0, 1], &body)
}

fn subnet(family: u8, source: u8, scope: u8, address: &[u8]) -> Vec<u8> {
    let mut option = vec![0, 8, 0, 4 + address.len() as u8, 0, family, source, scope];
    option.extend_from_slice(address);
    with_opt([0; 4], &option)
}

fn is_malformed(message: &[u8]) -> bool {
    matches!(read(message), Err(Unfit::Malformed { .. }))
}

#[test]
fn a_query_is_read_and_its_question_kept_as_it_came() {
    let bytes = message(0x0100, [1, 0, 0, 0], QUESTION);
    let query = read(&bytes).unwrap();
    assert_eq!(query.head, Head { id: 0x1234, opcode: 0, recursion_desired: true });
    assert_eq!(query.question, QUESTION);
    assert_eq!(query.name.octets(), b"\x05infer\x07example\x03com\x00");
    assert_eq!((query.kind, query.class, query.edns), (RecordType::A, 1, None));
}

#[test]
fn edns_says_payload_version_and_flags() {
    let bytes = with_opt([0, 0, 0x80, 0], b"\x00\x0a\x00\x02ab");
    let edns = read(&bytes).unwrap().edns.unwrap();
    assert_eq!((edns.payload, edns.version, edns.dnssec_ok, edns.client_subnet), (4_096, 0, true, None));
    let of_version_1 = with_opt([0, 1, 0, 0], b"anything");
    assert_eq!(read(&of_version_1).unwrap().edns.unwrap().version, 1, "its options are not looked at");
}

#[test]
fn what_is_no_query_is_met_with_silence() {
    let response = message(0x8000, [1, 0, 0, 0], QUESTION);
    for bytes in [&b""[..], b"\x12\x34", &response, &response[..12], &message(0x8000, [9, 9, 9, 9], b"")] {
        assert_eq!(read(bytes), Err(Unfit::Mute));
    }
    let whole = message(0, [1, 0, 0, 0], QUESTION);
    for length in 0..HEADER {
        assert_eq!(read(&whole[..length]), Err(Unfit::Mute));
    }
}

#[test]
fn another_opcode_is_told_apart_before_the_rest_is_read() {
    for opcode in 1..16_u16 {
        let bytes = message(opcode << 11, [9, 9, 9, 9], b"rubbish");
        let head = Head { id: 0x1234, opcode: opcode as u8, recursion_desired: false };
        assert_eq!(read(&bytes), Err(Unfit::Opcode(head)));
    }
}

#[test]
fn t69_there_is_exactly_one_question() {
    assert!(is_malformed(&message(0, [0, 0, 0, 0], b"")));
    assert!(is_malformed(&message(0, [2, 0, 0, 0], &[QUESTION, QUESTION].concat())));
    assert!(is_malformed(&message(0, [65_535, 0, 0, 0], QUESTION)));
}

#[test]
fn t69_a_message_that_is_cut_anywhere_is_malformed() {
    let whole = subnet(1, 24, 0, &[192, 0, 2]);
    read(&whole).unwrap();
    for length in HEADER..whole.len() {
        assert!(is_malformed(&whole[..length]), "{length}");
    }
    assert!(is_malformed(&[&whole[..], b"\x00"].concat()), "and so is one with more than it says");
}

#[test]
fn names_are_labels_to_the_end_within_255_octets() {
    let question = |name: &[u8]| message(0, [1, 0, 0, 0], &[name, b"\x00\x01\x00\x01"].concat());
    let of_length = |length: usize| {
        let mut name = Vec::new();
        while name.len() + 64 < length {
            name.extend_from_slice(&[63; 64]);
        }
        let last = length - name.len() - 2;
        name.push(last as u8);
        name.resize(length - 1, b'x');
        name.push(0);
        name
    };
    assert!(read(&question(b"\x00")).is_ok(), "the root");
    assert!(read(&question(&of_length(255))).is_ok());
    assert!(is_malformed(&question(&of_length(256))));
    assert!(is_malformed(&question(b"\xc0\x0c")), "nothing to point to but the head");
    assert!(is_malformed(&question(b"\x40a\x00")), "reserved");
    assert!(is_malformed(&question(b"\x80a\x00")));
}

#[test]
fn t69_there_is_one_opt_of_the_root_among_the_additionals() {
    let opt: &[u8] = b"\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x00";
    let named: &[u8] = b"\x01a\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x00";
    assert!(read(&message(0, [1, 0, 0, 1], &[QUESTION, opt].concat())).is_ok());
    let two = message(0, [1, 0, 0, 2], &[QUESTION, opt, opt].concat());
    assert!(matches!(read(&two), Err(Unfit::Malformed { edns: true, question: QUESTION, .. })));
    assert!(is_malformed(&message(0, [1, 0, 0, 1], &[QUESTION, named].concat())));
    assert!(is_malformed(&message(0, [1, 1, 0, 0], &[QUESTION, opt].concat())), "among the answers");
}

#[test]
fn records_that_mean_nothing_here_are_stepped_over() {
    // IXFR brings a SOA; TSIG comes last. Names may be pointers.
    let record: &[u8] = b"\xc0\x0c\x00\x06\x00\x01\x00\x00\x00\x00\x00\x03abc";
    assert!(read(&message(0, [1, 0, 1, 0], &[QUESTION, record].concat())).is_ok());
    let nine: Vec<u8> = record.repeat(9);
    assert!(is_malformed(&message(0, [1, 0, 9, 0], &[QUESTION, &nine].concat())), "but not many");
}

#[test]
fn the_client_subnet_is_taken_only_as_rfc_7871_says() {
    let read_subnet = |bytes: &[u8]| {
        let subnet = read(bytes).ok()?.edns?.client_subnet?;
        Some((subnet.address.map(|address| address.to_string()), subnet.source))
    };
    let address = |text: &str| Some(text.to_owned());
    assert_eq!(read_subnet(&subnet(1, 24, 0, &[192, 0, 2])), Some((address("192.0.2.0"), 24)));
    assert_eq!(read_subnet(&subnet(1, 32, 0, &[192, 0, 2, 7])), Some((address("192.0.2.7"), 32)));
    assert_eq!(read_subnet(&subnet(1, 20, 0, &[192, 0, 0x20])), Some((address("192.0.32.0"), 20)));
    assert_eq!(read_subnet(&subnet(1, 0, 0, &[])), Some((address("0.0.0.0"), 0)));
    assert_eq!(read_subnet(&subnet(2, 56, 0, &[0x20, 1, 0xd, 0xb8, 0, 0, 1])), Some((address("2001:db8:0:100::"), 56)));
    assert_eq!(read_subnet(&subnet(0, 0, 0, &[])), Some((None, 0)));
    for (what, bytes) in [
        ("too few octets", subnet(1, 24, 0, &[192, 0])),
        ("too many octets", subnet(1, 24, 0, &[192, 0, 2, 0])),
        ("bits beyond the length", subnet(1, 20, 0, &[192, 0, 0x21])),
        ("longer than an address", subnet(1, 33, 0, &[192, 0, 2, 1, 0])),
        ("longer than an address of IPv6", subnet(2, 129, 0, &[0; 17])),
        ("a scope in a query", subnet(1, 24, 24, &[192, 0, 2])),
        ("an unknown family", subnet(3, 8, 0, &[1])),
        ("family 0 with an address", subnet(0, 8, 0, &[1])),
        ("no lengths", with_opt([0; 4], b"\x00\x08\x00\x02\x00\x01")),
        ("twice", with_opt([0; 4], b"\x00\x08\x00\x04\x00\x01\x00\x00\x00\x08\x00\x04\x00\x01\x00\x00")),
    ] {
        assert!(is_malformed(&bytes), "{what}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_query_or_unfit(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = read(&bytes);
    }

    /// Damaged queries get further than bytes by chance.
    #[test]
    fn damaged_queries_are_queries_or_unfit(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = subnet(2, 56, 0, &[0x20, 1, 0xd, 0xb8, 0, 0, 1]);
        for (place, octet) in damage {
            let place = place.index(bytes.len());
            bytes[place] = octet;
        }
        let _ = read(&bytes);
        let _ = read(&bytes[..cut.index(bytes.len())]);
    }

    /// What is taken for a query, hickory's reader takes for the same one.
    #[test]
    fn a_query_is_what_hickory_reads(
        labels in proptest::collection::vec("[a-zA-Z0-9]{1,20}", 0..6),
        kind: u16,
        id: u16,
        payload: u16,
        edns: bool,
    ) {
        let mut body = Vec::new();
        for label in &labels {
            body.push(label.len() as u8);
            body.extend_from_slice(label.as_bytes());
        }
        body.push(0);
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(&[0, 1]);
        if edns {
            body.extend_from_slice(b"\x00\x00\x29");
            body.extend_from_slice(&payload.to_be_bytes());
            body.extend_from_slice(&[0; 6]);
        }
        let mut bytes = message(0, [1, 0, 0, u16::from(edns)], &body);
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        let query = read(&bytes).unwrap();
        let theirs = Message::from_vec(&bytes).unwrap();
        prop_assert_eq!(query.head.id, theirs.metadata.id);
        prop_assert_eq!(query.kind, theirs.queries[0].query_type());
        let name: String = labels.iter().map(|label| format!("{label}.")).collect();
        let name = if name.is_empty() { ".".into() } else { name };
        prop_assert_eq!(theirs.queries[0].name().to_ascii(), name);
        prop_assert_eq!(query.edns.is_some(), theirs.edns.is_some());
    }
}
