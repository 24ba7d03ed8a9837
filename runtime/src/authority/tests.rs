use std::os::unix::fs::PermissionsExt;

use rustls::pki_types::pem::PemObject;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

#[test]
fn a_saved_authority_issues_after_loading_and_its_keys_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let made = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    made.save(folder.path()).unwrap();
    let loaded = Authority::load(folder.path()).unwrap();
    assert_eq!(loaded.trust_domain().as_str(), "spillway.test");
    assert_eq!(loaded.trust_bundle(), made.trust_bundle());
    let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), YEAR);
    let leaf = loaded.issue(&request).unwrap();
    assert_eq!(leaf.certificate.matches("BEGIN CERTIFICATE").count(), 2);
    let settings = leaf.save_workload(folder.path().join("web"), loaded.trust_bundle()).unwrap();
    for key in [folder.path().join("root.key"), folder.path().join("intermediate.key"), settings.key] {
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_leaf_of_another_trust_domain_is_not_issued() {
    let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let request = LeafRequest::new(id("spiffe://other.test/tenant/acme/client/web"), YEAR);
    assert!(matches!(authority.issue(&request), Err(AuthorityError::TrustDomain(_))));
}

#[test]
fn a_leaf_never_outlives_its_issuer() {
    let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), 5 * YEAR);
    let leaf = authority.issue(&request).unwrap();
    let der = CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap();
    let (_, read) = X509Certificate::from_der(&der).unwrap();
    let end = u64::try_from(read.validity().not_after.timestamp()).unwrap();
    let limit = authority.not_after().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(end <= limit);
}

#[test]
fn an_authority_without_its_roots_key_issues_and_one_with_a_strangers_root_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let made = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    made.save(folder.path()).unwrap();
    let renewed = Authority::load(folder.path()).unwrap().with_new_intermediate().unwrap();
    assert_eq!((renewed.root_id(), renewed.root_key.is_some()), (made.root_id(), true));
    assert_ne!(renewed.intermediate.key_pem(), made.intermediate.key_pem());
    renewed.save(folder.path()).unwrap();
    std::fs::remove_file(folder.path().join("root.key")).unwrap();
    let loaded = Authority::load(folder.path()).unwrap();
    assert_eq!(loaded.root_id(), made.root_id());
    let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), YEAR);
    assert!(loaded.issue(&request).is_ok());
    assert!(matches!(loaded.with_new_intermediate(), Err(AuthorityError::NoRootKey)));
    let other = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    std::fs::write(folder.path().join("root.pem"), other.trust_bundle()).unwrap();
    assert!(matches!(Authority::load(folder.path()), Err(AuthorityError::OtherRoot(_))));
    made.save(folder.path()).unwrap();
    std::fs::write(folder.path().join("intermediate.key"), other.intermediate.key_pem()).unwrap();
    assert!(matches!(Authority::load(folder.path()), Err(AuthorityError::OtherKey(_))));
}

#[test]
fn leaves_of_one_key_differ_in_their_serial_numbers() {
    let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), YEAR);
    let key = KeyPair::generate().unwrap();
    let certified = || authority.certify(&request, &key).unwrap();
    let (one, other) = (certified(), certified());
    assert_ne!(one.serial, other.serial);
    let der = CertificateDer::from_pem_slice(one.chain.as_bytes()).unwrap();
    let (_, read) = X509Certificate::from_der(&der).unwrap();
    assert_eq!((read.raw_serial().len(), read.raw_serial_as_string().replace(':', "")), (16, one.serial.to_string()));
}

#[test]
fn a_leaf_for_a_key_that_is_there_fits_it_beside_the_one_before() {
    let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), YEAR);
    let first = authority.issue(&request).unwrap();
    let again = authority.issue_again(&request, &first.key).unwrap();
    assert_eq!(again.key, first.key);
    assert_ne!(again.certificate, first.certificate);
    let public = |leaf: &IssuedLeaf| {
        let der = CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap();
        X509Certificate::from_der(&der).unwrap().1.public_key().raw.to_vec()
    };
    assert_eq!(public(&again), public(&first));
    assert!(authority.issue_again(&request, "rubbish").is_err());
}
