//! Who may do what: a principal, a model, an action; denied unless a policy allows it.

use crate::identity::{Role, SpiffeId};
use crate::resource::{AccessPolicy, Action, Model, Subject};
use crate::snapshot::Snapshot;
use crate::units::Name;

/// A client of a known tenant, proved by its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal {
    pub tenant: Name,
    pub client: Name,
}

/// Why a caller is refused. Never says whether a model exists to one who may not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("the certificate does not name a client of a tenant in this trust domain")]
    NotAClient,
    #[error("the tenant is not known here")]
    UnknownTenant,
    #[error("no policy allows this client to do this with this model")]
    NotAllowed,
}

impl Denied {
    /// The stable `spillway-error` code.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotAClient => "not-a-client",
            Self::UnknownTenant => "unknown-tenant",
            Self::NotAllowed => "not-allowed",
        }
    }
}

/// Reads a verified SPIFFE id as a client of a region.
pub fn principal(snapshot: &Snapshot, region: &Name, id: &SpiffeId) -> Result<Principal, Denied> {
    let region = snapshot.regions.get(region).ok_or(Denied::NotAClient)?;
    let Role::Client { tenant, name } = &id.role else { return Err(Denied::NotAClient) };
    if id.trust_domain != region.trust_domain {
        return Err(Denied::NotAClient);
    }
    if !snapshot.tenants.contains_key(tenant) {
        return Err(Denied::UnknownTenant);
    }
    Ok(Principal { tenant: tenant.clone(), client: name.clone() })
}

/// Whether a principal may do this with this model. An unknown model is judged like a known one, so
/// that only who may use a name learns whether it exists.
pub fn authorize(snapshot: &Snapshot, principal: &Principal, model: &str, action: Action) -> Result<(), Denied> {
    let allowed = snapshot.policies.values().any(|policy| {
        policy.actions.contains(&action)
            && policy.models.iter().any(|pattern| pattern.matches(model))
            && is_subject(policy, principal)
    });
    if allowed { Ok(()) } else { Err(Denied::NotAllowed) }
}

/// Whether there is any model with which a principal may do this: asked before memory is spent on a
/// request that does not say its model yet.
pub fn authorize_some(snapshot: &Snapshot, principal: &Principal, action: Action) -> Result<(), Denied> {
    let allowed = |policy: &AccessPolicy| policy.actions.contains(&action) && is_subject(policy, principal);
    if snapshot.policies.values().any(|policy| allowed(policy)) { Ok(()) } else { Err(Denied::NotAllowed) }
}

fn is_subject(policy: &AccessPolicy, principal: &Principal) -> bool {
    let is =
        |subject: &Subject| subject.tenant == principal.tenant && subject.clients.matches(principal.client.as_str());
    policy.subjects.iter().any(is)
}

/// The models that a principal may see, for listings.
pub fn visible<'a>(
    snapshot: &'a Snapshot,
    principal: &'a Principal,
) -> impl Iterator<Item = (&'a Name, &'a std::sync::Arc<Model>)> {
    snapshot.models.iter().filter(|(name, _)| authorize(snapshot, principal, name.as_str(), Action::Metadata).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource;

    const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {name: one}
spec: {subjects: [{tenant: acme, client: web-*}], models: [fraud-*, eta], actions: [infer]}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {name: two}
spec: {subjects: [{tenant: acme}, {tenant: globex}], models: ['*'], actions: [metadata]}
";

    fn snapshot() -> Snapshot {
        Snapshot::compile(1, &resource::parse(RESOURCES).unwrap()).unwrap()
    }

    fn principal_of(id: &str) -> Result<Principal, Denied> {
        principal(&snapshot(), &Name::parse("eu").unwrap(), &SpiffeId::parse(id).unwrap())
    }

    #[test]
    fn only_clients_of_known_tenants_in_the_regions_trust_domain_are_principals() {
        assert!(principal_of("spiffe://td/tenant/acme/client/web-1").is_ok());
        assert_eq!(principal_of("spiffe://other/tenant/acme/client/web-1"), Err(Denied::NotAClient));
        assert_eq!(principal_of("spiffe://td/region/eu/gateway/g"), Err(Denied::NotAClient));
        assert_eq!(principal_of("spiffe://td/tenant/initech/client/web-1"), Err(Denied::UnknownTenant));
    }

    #[test]
    fn what_no_policy_allows_is_denied() {
        let snapshot = snapshot();
        for (id, model, action, allowed) in [
            ("spiffe://td/tenant/acme/client/web-1", "fraud-eu", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/web-1", "eta", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/web-1", "eta2", Action::Infer, false),
            ("spiffe://td/tenant/acme/client/batch", "eta", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Metadata, true),
            ("spiffe://td/tenant/globex/client/web-1", "eta", Action::Admin, false),
        ] {
            let principal = principal_of(id).unwrap();
            assert_eq!(authorize(&snapshot, &principal, model, action).is_ok(), allowed, "{id} {model} {action:?}");
        }
    }

    #[test]
    fn who_may_use_some_model_is_known_before_the_model_is() {
        let snapshot = snapshot();
        for (id, action, allowed) in [
            ("spiffe://td/tenant/acme/client/web-1", Action::Infer, true),
            ("spiffe://td/tenant/acme/client/batch", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", Action::Infer, false),
            ("spiffe://td/tenant/globex/client/web-1", Action::Metadata, true),
        ] {
            let principal = principal_of(id).unwrap();
            assert_eq!(authorize_some(&snapshot, &principal, action).is_ok(), allowed, "{id} {action:?}");
        }
    }
}
