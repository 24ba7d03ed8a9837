use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P521_SHA512, PKCS_RSA_SHA256, SanType,
};
use spillway_core::authority::request::{Denied, Grant, judge};

use super::*;
use crate::fixture::{GATEWAY, HOUR, SIDECAR, id};

fn der(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    signed_by(&KeyPair::generate().unwrap(), change)
}

fn signed_by(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    change(&mut params);
    params.serialize_request(key).unwrap().der().to_vec()
}

fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

fn grant() -> Grant {
    let names = Names { dns: [DnsName::host("edge.example").unwrap()].into(), ..Names::default() };
    Grant { id: id(GATEWAY), names }
}

#[test]
fn t52_requests_for_more_than_was_granted_are_denied_with_their_reason() {
    let denied = |change: fn(&mut CertificateParams)| {
        let csr = Csr::read(&der(change)).unwrap();
        judge(&csr.asked, &grant(), HOUR)
    };
    for (change, expected) in [
        (
            (|params: &mut CertificateParams| params.subject_alt_names = vec![uri(SIDECAR)])
                as fn(&mut CertificateParams),
            Denied::OtherIdentity,
        ),
        (|params| params.subject_alt_names = vec![uri(GATEWAY), uri(SIDECAR)], Denied::OtherIdentity),
        (|params| params.subject_alt_names = vec![uri("https://spillway.test")], Denied::OtherIdentity),
        (|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), Denied::MaySign),
        (|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)), Denied::MaySign),
        (|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign], Denied::MaySign),
        (
            |params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
            Denied::MaySign,
        ),
        (|params| params.key_usages = vec![KeyUsagePurpose::ContentCommitment], Denied::OtherUse),
        (|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any], Denied::OtherUse),
        (|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning], Denied::OtherUse),
        (|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning], Denied::OtherUse),
        (|params| params.subject_alt_names = vec![dns("bank.example")], Denied::OtherNames),
        (|params| params.subject_alt_names = vec![dns("edge.example"), dns("*.example")], Denied::OtherNames),
        (|params| params.subject_alt_names = vec![SanType::IpAddress([192, 0, 2, 1].into())], Denied::OtherNames),
        (
            |params| params.subject_alt_names = vec![SanType::Rfc822Name("a@example.net".try_into().unwrap())],
            Denied::OtherNames,
        ),
        (
            // Name constraints: of an authority's certificate.
            |params| {
                let oid = [2, 5, 29, 30];
                params.custom_extensions = vec![CustomExtension::from_oid_content(&oid, vec![0x30, 0])];
            },
            Denied::OtherExtension,
        ),
        (
            |params| params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])],
            Denied::OtherExtension,
        ),
    ] {
        assert_eq!(denied(change), Err(expected));
    }
}

#[test]
fn a_request_for_what_was_granted_is_approved() {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let csr = signed_by(&key, |params| {
        params.subject_alt_names = vec![uri(GATEWAY), dns("EDGE.example")];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    });
    let csr = Csr::read(&csr).unwrap();
    assert_eq!(judge(&csr.asked, &grant(), HOUR).unwrap().names, grant().names);
    assert_eq!(csr.key.der_bytes(), PublicKeyData::der_bytes(&key));
    let plain = Csr::read(&der(|_| {})).unwrap();
    assert_eq!(plain.asked, Asked::default());
}

#[test]
fn t52_keys_of_other_kinds_are_refused() {
    for algorithm in [&PKCS_RSA_SHA256, &PKCS_ECDSA_P521_SHA512] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert_eq!(Csr::read(&signed_by(&key, |_| {})).err(), Some(BadCsr::Key), "{algorithm:?}");
    }
    // openssl req -new -newkey rsa:1024 -nodes -keyout /dev/null -subj /CN=x -outform DER | base64 -w0
    assert_eq!(Csr::read(&RSA_1024).err(), Some(BadCsr::Key));
}

#[test]
fn t52_a_request_that_is_not_signed_with_its_key_is_refused() {
    let mut csr = der(|params| params.subject_alt_names = vec![uri(GATEWAY)]);
    // Somewhere in the identity: another one under the same signature.
    let at = csr.windows(4).position(|window| window == b"gw-0").unwrap();
    csr[at + 3] = b'1';
    assert_eq!(Csr::read(&csr).err(), Some(BadCsr::Signature));
}

#[test]
fn t52_garbage_is_refused_and_never_panics() {
    let good = der(|params| params.subject_alt_names = vec![uri(GATEWAY), dns("edge.example")]);
    for bad in [&b""[..], b"\x30", b"-----BEGIN CERTIFICATE REQUEST-----", &[0x30; 1_000], &[0; MOST_BYTES + 1]] {
        assert_eq!(Csr::read(bad).err(), Some(BadCsr::Malformed));
    }
    assert_eq!(Csr::read(&[good.clone(), vec![0]].concat()).err(), Some(BadCsr::Malformed));
    for cut in 0..good.len() {
        assert_eq!(Csr::read(&good[..cut]).err(), Some(BadCsr::Malformed));
    }
    let original = Csr::read(&good).unwrap();
    for at in 0..good.len() {
        for flip in [1, 0x80, 0xff] {
            let mut changed = good.clone();
            changed[at] ^= flip;
            // The parser takes the outermost tag less exactly than DER has it; what is signed cannot change.
            if let Ok(read) = Csr::read(&changed) {
                assert_eq!(
                    (read.key, read.asked),
                    (original.key.clone(), original.asked.clone()),
                    "byte {at} ^ {flip}"
                );
            }
        }
    }
}

const RSA_1024: [u8; 335] = [
    48, 130, 1, 75, 48, 129, 181, 2, 1, 0, 48, 12, 49, 10, 48, 8, 6, 3, 85, 4, 3, 12, 1, 120, 48, 129, 159, 48, 13, 6,
    9, 42, 134, 72, 134, 247, 13, 1, 1, 1, 5, 0, 3, 129, 141, 0, 48, 129, 137, 2, 129, 129, 0, 198, 60, 252, 141, 190,
    61, 249, 104, 205, 254, 220, 192, 8, 63, 104, 185, 6, 8, 98, 17, 149, 52, 242, 25, 110, 252, 74, 137, 72, 195, 61,
    231, 230, 40, 20, 136, 192, 117, 184, 189, 135, 158, 72, 212, 79, 202, 12, 73, 243, 126, 143, 85, 103, 91, 211,
    174, 123, 28, 247, 109, 7, 58, 239, 99, 141, 180, 153, 223, 206, 250, 227, 240, 83, 206, 59, 86, 17, 43, 187, 146,
    133, 57, 160, 98, 144, 19, 234, 245, 38, 165, 183, 106, 187, 235, 68, 57, 217, 248, 218, 245, 41, 51, 177, 160, 47,
    236, 146, 170, 217, 98, 190, 28, 206, 97, 163, 90, 195, 209, 192, 101, 185, 211, 168, 226, 171, 184, 93, 91, 2, 3,
    1, 0, 1, 160, 0, 48, 13, 6, 9, 42, 134, 72, 134, 247, 13, 1, 1, 11, 5, 0, 3, 129, 129, 0, 12, 198, 0, 220, 230,
    201, 163, 7, 220, 30, 66, 34, 228, 9, 226, 202, 71, 85, 217, 135, 175, 144, 221, 223, 26, 90, 146, 72, 121, 185,
    57, 168, 201, 95, 29, 129, 179, 62, 90, 228, 155, 107, 78, 196, 124, 225, 104, 134, 23, 35, 12, 103, 132, 80, 12,
    62, 22, 3, 140, 54, 87, 245, 208, 177, 224, 200, 109, 135, 240, 157, 73, 217, 234, 219, 47, 238, 241, 230, 192,
    137, 102, 180, 96, 7, 224, 54, 168, 95, 85, 248, 193, 211, 158, 195, 199, 233, 38, 77, 204, 89, 119, 25, 108, 124,
    155, 70, 151, 163, 90, 57, 73, 19, 141, 89, 35, 12, 106, 42, 199, 150, 251, 138, 199, 231, 28, 243, 18, 214,
];
