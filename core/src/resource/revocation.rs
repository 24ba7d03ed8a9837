//! Revocation: certificates that are refused from now on, whatever signed them.

use super::reader::Field;
use crate::identity::{Serial, SpiffeId};
use crate::units::InvalidUnit;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocation {
    /// Serial numbers of certificates.
    pub serials: Vec<Serial>,
    /// Whole identities, with every certificate that names them.
    pub ids: Vec<SpiffeId>,
    /// For people and for the audit log; may be empty.
    pub reason: String,
}

pub(super) fn read(spec: &Field<'_>) -> Option<Revocation> {
    const SERIAL: InvalidUnit = InvalidUnit("a serial number in hexadecimal, such as 0a:1b:2c");
    const ID: InvalidUnit = InvalidUnit("a SPIFFE id, such as spiffe://example.org/tenant/acme/client/web-1");
    let fields = spec.map();
    let items = |name| fields.optional(name).map(|field| field.items()).unwrap_or_default();
    let serials: Vec<Serial> =
        items("serials").iter().filter_map(|item| item.parse(|text| Serial::parse(text).ok_or(SERIAL))).collect();
    let ids: Vec<SpiffeId> =
        items("ids").iter().filter_map(|item| item.parse(|text| SpiffeId::parse(text).map_err(|_| ID))).collect();
    let reason = match fields.optional("reason") {
        Some(field) => field.text()?.to_owned(),
        None => String::new(),
    };
    fields.finish();
    if serials.is_empty() && ids.is_empty() {
        spec.fault("expected at least one item in serials or ids");
    }
    Some(Revocation { serials, ids, reason })
}
